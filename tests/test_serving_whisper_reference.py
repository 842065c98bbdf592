"""Whisper on the device against transformers: the rules of timestamps, and the tokens of a small random model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from packlight.serving import whisper
from packlight.serving.whisper import log_mel, timestamp_rules_, transcribe
from planted_whisper import (
    EN,
    ENGLISH,
    EOS,
    MULTILINGUAL,
    NO_STAMPS,
    RATE,
    STAMP,
    START,
    VOCABULARY,
    ZH,
    Opaque,
    Planted,
    at,
    peaks,
    spell,
)

# The rules of timestamps


def random_walk(seed: int, begin_scale: float) -> list[int]:
    """Tokens of a window drawn at random under the rules."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < 60:
        logits = rng.normal(0, 3, VOCABULARY).astype(np.float32)
        logits[STAMP:] += begin_scale
        logits[START:STAMP] = -np.inf
        timestamp_rules_(logits, tokens, ENGLISH)
        token = int(logits.argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", [-9.0, -5.0, 0.0])
def test_timestamp_rules_keep_the_pattern(seed: int, scale: float) -> None:
    tokens = random_walk(seed, scale)
    stamps = [token for token in tokens if token >= STAMP]
    assert STAMP <= tokens[0] <= STAMP + ENGLISH.max_initial_timestamp_index
    assert stamps == sorted(stamps)
    assert len(set(stamps)) >= len(stamps) / 2
    assert NO_STAMPS not in tokens
    kinds = "".join("s" if token >= STAMP else "t" for token in tokens)
    assert "sss" not in kinds
    assert not kinds.startswith("ss")
    assert "tst" not in kinds


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scale", [-9.0, -5.0, 0.0])
def test_timestamp_rules_equal_those_of_transformers(seed: int, scale: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

    config = transformers.GenerationConfig(
        eos_token_id=EOS, no_timestamps_token_id=NO_STAMPS, max_initial_timestamp_index=50
    )
    reference = WhisperTimeStampLogitsProcessor(config, begin_index=1)
    tokens = random_walk(seed, scale)
    rng = np.random.default_rng(seed)
    for n in range(len(tokens) + 1):
        logits = rng.normal(0, 3, VOCABULARY).astype(np.float32)
        logits[STAMP:] += scale
        expected = reference(torch.tensor([[START, *tokens[:n]]]), torch.from_numpy(logits[None].copy()))[0].numpy()
        timestamp_rules_(logits, tokens[:n], ENGLISH)
        np.testing.assert_array_equal(logits, expected)


def test_timestamp_rules_ask_for_a_timestamp_when_all_together_are_likelier() -> None:
    logits = peaks({5: 2.0})
    logits[STAMP + 10 :] = -4.0  # each far below the text, but 1491 of them
    timestamp_rules_(logits, [STAMP, 6], ENGLISH)
    assert logits.argmax() >= STAMP
    few = peaks({5: 2.0, at(3): 1.0})
    timestamp_rules_(few, [STAMP, 6], ENGLISH)
    assert few.argmax() == 5


# The whole, with a small random model


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small spend their time waiting for one another's threads."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference_model(seed: int, multilingual: bool) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=40,
        pad_token_id=EOS, bos_token_id=EOS, eos_token_id=EOS, decoder_start_token_id=START, init_std=0.6,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    names: dict[str, Any] = {"is_multilingual": multilingual}
    if multilingual:
        names |= {"lang_to_id": {"<|en|>": EN, "<|zh|>": ZH}, "language": None, "task": "transcribe",
                  "task_to_id": dict(MULTILINGUAL.task_ids)}  # fmt: skip
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=EOS, bos_token_id=EOS, pad_token_id=EOS, decoder_start_token_id=START, max_length=40,
        no_timestamps_token_id=NO_STAMPS, suppress_tokens=list(ENGLISH.suppress),
        begin_suppress_tokens=list(ENGLISH.begin_suppress), max_initial_timestamp_index=50, **names,
    )  # fmt: skip
    return model


def parts_of(model: Any) -> dict[str, Any]:
    """The model as parts: the encoder's output stands for all cross keys and values."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    def speak(hidden: np.ndarray, heard: list[int]) -> np.ndarray:
        with torch.no_grad():
            encoded = BaseModelOutput(last_hidden_state=torch.from_numpy(hidden))
            ids = torch.tensor([heard])
            return model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits[0, -1].numpy()

    def encoder(inputs: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            hidden = model.model.encoder(torch.from_numpy(inputs["input_features"])).last_hidden_state.numpy()
        return {f"cross_{kind}_{i}": Opaque(hidden) for kind in ("key", "value") for i in range(2)}

    return {"encoder": encoder, "decoder": Planted(speak).decoder}


def noise_bursts(seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0, 0.3, round(seconds * 4)), RATE // 4)
    return (rng.normal(0, 1, loudness.size) * loudness).astype(np.float32)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("multilingual", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_transcribe_yields_the_tokens_of_generate(seed: int, multilingual: bool) -> None:
    model = reference_model(seed, multilingual)
    import torch

    audio = noise_bursts(9, seed)
    # A random model says timestamps unasked, which makes `generate` seek through a short clip.
    settings = replace(MULTILINGUAL if multilingual else ENGLISH, suppress=(97, 98, *range(START, VOCABULARY)))
    model.generation_config.suppress_tokens = list(settings.suppress)
    expected = model.generate(torch.from_numpy(log_mel(audio, 80)), num_beams=1, do_sample=False)[0].tolist()
    expected = [token for token in expected if token != EOS]
    assert len(set(expected)) > 1
    assert list(transcribe(parts_of(model), spell, settings, audio).tokens) == expected


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", range(4))
def test_transcribe_yields_the_tokens_of_generate_when_long(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference_model(seed, multilingual=False)
    import torch

    audio = noise_bursts(75, seed)
    features = log_mel(audio, 80, 7500)
    origin = audio.__array_interface__["data"][0]

    def same_features(window: np.ndarray, mel_bins: int, frames: int) -> np.ndarray:
        """The reference takes its windows from the features of the whole recording."""
        start = (window.__array_interface__["data"][0] - origin) // 4 // 160
        cut = features[:, :, start : start + frames]
        return np.pad(cut, ((0, 0), (0, 0), (0, frames - cut.shape[2])))

    monkeypatch.setattr(whisper, "log_mel", same_features)
    monkeypatch.setattr(whisper, "_STRIDE", 0)
    monkeypatch.setattr(whisper, "_loop_period", lambda tokens: 0)
    expected = model.generate(torch.from_numpy(features), return_timestamps=True, num_beams=1, do_sample=False)
    expected = [token for token in expected[0].tolist() if token < EOS]
    assert len(set(expected)) > 1
    assert list(transcribe(parts_of(model), spell, ENGLISH, audio).tokens) == expected
