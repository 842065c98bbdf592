"""Reading Whisper from a CTranslate2 folder, the form in which faster-whisper's models are published.

`model.bin`, version 6, little endian: u32 version; the spec's name; u32 revision; u32 number of variables; for each
its name, u8 rank, u32 sizes, u8 type, u32 byte length, data; then u32 number of aliases, pairs of names. A name is a
u16 length, which counts its final zero byte, and the bytes.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packlight.errors import ModelError

_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def is_ctranslate2(folder: Path) -> bool:
    """Whether a folder holds a CTranslate2 Whisper model."""
    file = folder / "model.bin"
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        head = opened.read(64)
    return len(head) > 20 and head[4:6] == struct.pack("<H", 12) and head[6:17] == b"WhisperSpec"


def read_variables(file: Path) -> dict[str, np.ndarray]:
    """All variables of a model.bin, aliases resolved.

    Raises:
        ModelError: another version or type, or a file that ends too early.
    """
    data = memoryview(file.read_bytes())
    at = 0

    def take(count: int) -> memoryview:
        nonlocal at
        if at + count > len(data):
            raise ModelError(f"{file} ends after {len(data)} bytes, in the middle of a tensor. Download it again.")
        at += count
        return data[at - count : at]

    def number(fmt: str) -> int:
        return int(struct.unpack(fmt, take(struct.calcsize(fmt)))[0])

    def name() -> str:
        return bytes(take(number("<H"))).rstrip(b"\0").decode()

    if number("<I") != 6:
        raise ModelError(f"{file} is not in version 6 of CTranslate2's format. Convert it with a current CTranslate2.")
    name()
    number("<I")
    variables: dict[str, np.ndarray] = {}
    for _ in range(number("<I")):
        key = name()
        shape = [number("<I") for _ in range(number("<B"))]
        kind = number("<B")
        if kind not in _TYPES:
            raise ModelError(f"{file}: {key} has the unknown type {kind}.")
        variables[key] = np.frombuffer(take(number("<I")), dtype=_TYPES[kind]).reshape(shape)
    for _ in range(number("<I")):
        alias, target = name(), name()
        variables[alias] = variables[target]
    return variables


def _floats(variables: dict[str, np.ndarray], key: str) -> Tensor:
    """A weight as float32; int8 weights with their scale per row, as `ct2-transformers-converter` writes them."""
    value = variables[key]
    if value.dtype == np.int8:
        return torch.from_numpy(value.astype(np.float32) / variables[key + "_scale"].astype(np.float32)[:, None])
    if value.dtype == np.int16:
        return torch.from_numpy(value.astype(np.float32) / float(variables[key + "_scale"]))
    return torch.from_numpy(value.astype(np.float32))


def state_dict(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The variables under the names of transformers' WhisperForConditionalGeneration. Raises ModelError on a gap."""
    state: dict[str, Tensor] = {}

    def get(key: str) -> Tensor:
        if key not in variables:
            raise ModelError(f"The CTranslate2 model has no {key}; it is no complete Whisper model.")
        return _floats(variables, key)

    def linear(theirs: str, *ours: str) -> None:
        for suffix in ("weight", "bias"):
            for path, piece in zip(ours, get(f"{theirs}/{suffix}").chunk(len(ours)), strict=True):
                if not (suffix == "bias" and path.endswith("k_proj")):  # the key bias is zero, and not in transformers
                    state[f"{path}.{suffix}"] = piece.clone()

    def norm(theirs: str, ours: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = get(f"{theirs}/gamma"), get(f"{theirs}/beta")

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"model.encoder.{conv}")
    state["model.encoder.embed_positions.weight"] = get("encoder/position_encodings/encodings")
    state["model.decoder.embed_positions.weight"] = get("decoder/position_encodings/encodings")
    state["model.decoder.embed_tokens.weight"] = get("decoder/embeddings/weight")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    for tower in ("encoder", "decoder"):
        norm(f"{tower}/layer_norm", f"model.{tower}.layer_norm")
        for i in range(count_layers(variables, tower)):
            theirs, ours = f"{tower}/layer_{i}", f"model.{tower}.layers.{i}"
            own = f"{ours}.self_attn"
            linear(f"{theirs}/self_attention/linear_0", *(f"{own}.{p}_proj" for p in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if tower == "decoder":
                cross = f"{ours}.encoder_attn"
                linear(f"{theirs}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{theirs}/attention/linear_1", *(f"{cross}.{p}_proj" for p in "kv"))
                linear(f"{theirs}/attention/linear_2", f"{cross}.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
    return state


def count_layers(variables: dict[str, np.ndarray], tower: str) -> int:
    """Number of layers of a tower."""
    return len({key.split("/")[1] for key in variables if key.startswith(f"{tower}/layer_") and key.count("/") > 2})


def config_values(variables: dict[str, np.ndarray], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of WhisperConfig, generation settings), from the shapes and the folder's config.json."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    multilingual = vocabulary > 51864
    file = folder / "config.json"
    extra = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = _special_ids(vocabulary, multilingual)
    config = {
        "vocab_size": int(vocabulary),
        "num_mel_bins": int(variables["encoder/conv1/weight"].shape[1]),
        "d_model": int(width),
        "encoder_layers": count_layers(variables, "encoder"),
        "decoder_layers": count_layers(variables, "decoder"),
        "encoder_attention_heads": int(width) // 64,
        "decoder_attention_heads": int(width) // 64,
        "encoder_ffn_dim": int(variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]),
        "decoder_ffn_dim": int(variables["decoder/layer_0/ffn/linear_0/weight"].shape[0]),
        "max_source_positions": int(variables["encoder/position_encodings/encodings"].shape[0]),
        "max_target_positions": int(variables["decoder/position_encodings/encodings"].shape[0]),
        "decoder_start_token_id": ids["start"],
        "bos_token_id": ids["eos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["eos"],
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    settings = {
        "suppress_tokens": list(extra.get("suppress_ids", [])),
        "begin_suppress_tokens": list(extra.get("suppress_ids_begin", [])),
        "no_timestamps_token_id": ids["no_timestamps"],
        "is_multilingual": multilingual,
        "decoder_start_token_id": ids["start"],
        "eos_token_id": ids["eos"],
        "max_initial_timestamp_index": 50,
    }
    return config, settings


def _special_ids(vocabulary: int, multilingual: bool) -> dict[str, int]:
    """Ids of the special tokens: the text vocabulary, end, start, languages, six task tokens, 1501 timestamps."""
    eos = 50257 if multilingual else 50256
    return {"eos": eos, "start": eos + 1, "no_timestamps": vocabulary - 1502}
