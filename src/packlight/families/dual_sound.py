"""The audio tower of CLAP (Wu et al. 2023, arXiv 2211.06687): HTSAT, a Swin transformer over a log-mel spectrogram.

The tower is run by its own modules, in the order of its own forward, so that it exports: the original picks out of a
batch the sounds that were fused, which no graph can hold. One sound alone is always fused by the original's extractor, so
all are here. Its grouped pooling is the mean over all positions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packlight.errors import ModelError
from packlight.sounds import SoundSettings, features

ARCHITECTURE = "ClapModel"
_TOLERANCE = 1e-3  # decibels


def embed(module: nn.Module, input_features: Tensor) -> Tensor:
    """What get_audio_features gives before it is brought to length 1: [n, d] of spectrograms [n, 1 or 4, frames, mels]."""
    encoder: Any = module.audio_model.audio_encoder
    x = encoder.batch_norm(input_features.transpose(1, 3)).transpose(1, 3)
    x = _patches(encoder.patch_embed, encoder.reshape_mel2img(x))
    for stage, size in zip(encoder.layers, encoder.input_resolutions, strict=True):
        x = stage(x, size)[0]
    pooled: Tensor = module.audio_projection(encoder.norm(x).mean(1))
    return pooled


def _patches(layer: Any, x: Tensor) -> Tensor:
    """Patches [n, patches, width] of spectrograms laid out as pictures [n, 1 or 4, height, width]; cuts are fused in."""
    whole = layer.proj(x[:, :1])
    if layer.enable_fusion:
        n, cuts = x.shape[0], x.shape[1] - 1
        local = layer.mel_conv2d(x[:, 1:].reshape(n * cuts, 1, *x.shape[2:]))
        local = local.unflatten(0, (n, cuts)).permute(0, 2, 3, 1, 4).flatten(3)
        local = nn.functional.pad(local, (0, whole.shape[-1] - local.shape[-1]))
        whole = layer.fusion_model(whole, local)
    made: Tensor = layer.norm(whole.flatten(2).transpose(1, 2))
    return made


def text_scale(module: nn.Module) -> Tensor:
    """What multiplies the cosine before the softmax over sounds; over texts the scale is another."""
    scale: Tensor = module.logit_scale_t.exp()
    return scale


def processing(folder: Path, module: nn.Module) -> tuple[Callable[[np.ndarray], dict[str, Tensor]], SoundSettings]:
    """How sounds become the tower's input, as the folder's feature extractor says, tried against it.

    Returns:
        (float32 [samples] -> {'input_features' [1, 1 or 4, frames, mels]}, the settings).

    Raises:
        ModelError: no feature extractor, or one that the device can't repeat.
    """
    from transformers import AutoFeatureExtractor

    try:
        original: Any = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"{folder} has no feature extractor that transformers reads ({str(error).splitlines()[0]}). Put the model's "
            "preprocessor_config.json there."
        ) from None
    try:
        settings = SoundSettings(
            rate=int(original.sampling_rate), window=int(original.fft_window_size), hop=int(original.hop_length),
            longest=int(original.nb_max_samples), mels=int(original.feature_size), low=float(original.frequency_min),
            high=float(original.frequency_max), fused=original.truncation == "fusion", padding=str(original.padding),
        )  # fmt: skip
        SoundSettings.from_dict(settings.to_dict())
        if settings.fused != bool(module.config.audio_config.enable_fusion):
            raise ValueError(f"truncation is {original.truncation!r}, which is not how the model was made")
        if (flaw := _flaw(original, settings)) is not None:
            raise ValueError(flaw)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"The feature extractor in {folder} ({type(original).__name__}) can't be served yet: {error}. Those of CLAP can."
        ) from None

    def process(audio: np.ndarray) -> dict[str, Tensor]:
        return {"input_features": torch.from_numpy(features(audio, settings))}

    return process, settings


def _flaw(original: Any, settings: SoundSettings) -> str | None:
    """What the device would make otherwise than the original, if anything."""
    draw = np.random.default_rng(0)
    state = np.random.get_state()  # the original draws its cuts from it
    try:
        for share in (0.3, 0.77, 1.0, 1.2):
            if share > 1 and not settings.fused:
                continue  # a cut out of it is a sound of the full length
            count = int(settings.longest * share)
            sound = (np.sin(np.arange(count) * 0.05) * 0.3 + draw.normal(0, 0.01, count)).astype(np.float32)
            due = original(sound, sampling_rate=settings.rate, return_tensors="np")["input_features"]
            ours = features(sound, settings)
            if due.shape != ours.shape:
                return f"it gives the shape {due.shape}, the device {ours.shape}"
            known = 1 if share > 1 else ours.shape[1]  # of a longer sound only the whole is not drawn by chance
            if np.abs(due[:, :known] - ours[:, :known]).max() > _TOLERANCE:
                return "its spectrogram differs from that which the device would make"
    finally:
        np.random.set_state(state)
    return None
