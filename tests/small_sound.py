"""Random models of sound and text, and made-up sounds with words: the whole road, real parts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from small_dual import TEXT, WORDS, tokenizer_file

RATE = 16000
EXTRACTOR = {
    "feature_size": 64, "sampling_rate": RATE, "hop_length": 160, "max_length_s": 1, "fft_window_size": 512,
    "frequency_min": 50, "frequency_max": 7000,
}  # fmt: skip


def build(fused: bool = False) -> Any:
    """A random CLAP of 0.2 M parameters that hears one second."""
    import transformers as t

    torch.manual_seed(0)
    audio = {
        "window_size": 4, "num_mel_bins": 64, "spec_size": 128, "patch_size": 8, "patch_stride": [8, 8],
        "patch_embeds_hidden_size": 16, "hidden_size": 32, "depths": [2, 2], "num_attention_heads": [2, 4],
        "num_hidden_layers": 2, "projection_dim": 24, "aff_block_r": 4, "enable_fusion": fused,
        "fusion_type": None,
    }  # fmt: skip
    text = {**TEXT, "projection_dim": 24, "max_position_embeddings": 40}
    model = t.ClapModel(t.ClapConfig(text_config=text, audio_config=audio, projection_dim=24)).eval()
    with torch.no_grad():
        model.logit_scale_t.fill_(3.0)  # the two sides of published models differ
        for name, tensor in model.named_parameters():
            if "relative_position_bias_table" in name:
                tensor.normal_(0, 0.5)  # zeros would hide a mistake
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(-30 if layer.num_features == 64 else 0, 1)
                layer.running_var.uniform_(0.5, 400 if layer.num_features == 64 else 2)
    return model


def save_model(folder: Path, fused: bool = False) -> Path:
    """Write a model as transformers would, with tokenizer and feature extractor."""
    from transformers import ClapFeatureExtractor

    folder.mkdir(parents=True)
    build(fused).save_pretrained(folder)
    tokenizer_file(folder)
    ClapFeatureExtractor(**EXTRACTOR, truncation="fusion" if fused else "rand_trunc").save_pretrained(folder)
    return folder


def sound(i: int, seconds: float | None = None) -> np.ndarray:
    """A sound of its own for every number, 0.3 to 2 seconds long: two tones, one that swells, and noise."""
    draw = np.random.default_rng(i)
    count = round((seconds or float(draw.uniform(0.3, 2.0))) * RATE)
    at = np.arange(count) / RATE
    tones = np.sin(2 * np.pi * draw.uniform(100, 3000) * at) + np.sin(2 * np.pi * draw.uniform(100, 6000) * at) * at
    made = 0.2 * tones + draw.normal(0, 0.01, count)
    return made.clip(-1, 1).astype(np.float32)


def save_sounds(folder: Path, count: int = 40, labels: bool = False) -> Path:
    """Write `count` recordings with two captions each, or with a label; every third at another sampling rate."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        name = f"{i:02d}.{('wav', 'flac')[i % 2]}"
        soundfile.write(folder / name, sound(i), RATE if i % 3 else 44100)
        draw = np.random.default_rng(i)
        words = [" ".join(draw.choice(WORDS, 5)) for _ in range(2)]
        row = {"label": WORDS[i % 3]} if labels else {"texts": words}
        lines.append(json.dumps({"file_name": name, **row}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
