"""A random Whisper of 0.2 M parameters as a folder, and made-up speech: the whole road in a minute, with real parts."""

import json
from pathlib import Path

import numpy as np
import soundfile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from packlight.families.whisper import tiny


def save_model(folder: Path) -> Path:
    """Write the model as transformers would."""
    folder.mkdir(parents=True)
    # No token above the specials: a random model would say timestamps, and transformers would seek by them.
    model = tiny(vocab_size=153)
    model.save_pretrained(folder)
    settings = {
        "decoder_start_token_id": 151,
        "eos_token_id": 150,
        "pad_token_id": 150,
        "no_timestamps_token_id": 152,
        "is_multilingual": False,
        "suppress_tokens": [3, 5],
        "begin_suppress_tokens": [7],
        "max_length": 64,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:150]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def save_speech(folder: Path, count: int = 8) -> Path:
    """Write `count` recordings of one to two seconds, each another chord, with a transcript."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        time = np.arange(int(16000 * rng.uniform(1, 2))) / 16000
        sound = sum(np.sin(2 * np.pi * f * time) for f in rng.uniform(100, 3000, 4)) * 0.1
        soundfile.write(folder / f"{i}.wav", sound, 16000)
        lines.append(json.dumps({"file_name": f"{i}.wav", "text": f"number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
