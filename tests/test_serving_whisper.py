"""Whisper on the device: features, rules and decoding, against planted parts and against transformers."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packlight.audio import read_audio
from packlight.errors import BundleError, DataError
from packlight.serving import whisper
from packlight.serving.whisper import Settings, log_mel, timestamp_rules_, transcribe

# A small vocabulary in Whisper's order: text 0..99, then these, then 1501 timestamps.
EOS, START, EN, ZH, TRANSCRIBE, TRANSLATE, NO_STAMPS, STAMP = range(100, 108)
VOCABULARY = STAMP + 1501
RATE = 16000

ENGLISH = Settings(
    mel_bins=80, layers=2, heads=2, head_size=4, start=START, eos=EOS, no_timestamps=NO_STAMPS,
    timestamp_begin=STAMP, language_ids={}, task_ids={}, suppress=(97, 98, START), begin_suppress=(96, EOS),
    max_tokens=40,
)  # fmt: skip
MULTILINGUAL = replace(
    ENGLISH, language_ids={"en": EN, "zh": ZH}, task_ids={"transcribe": TRANSCRIBE, "translate": TRANSLATE}
)


def at(seconds: float) -> int:
    """The timestamp token of that time."""
    return STAMP + round(seconds * 50)


def spell(tokens: Any) -> str:
    return "".join(f" {token}" for token in tokens)


@dataclass(frozen=True)
class Opaque:
    """A runtime's own value: only `numpy()` is known of it."""

    array: np.ndarray

    def numpy(self) -> np.ndarray:
        return self.array


@dataclass
class Planted:
    """Parts whose decoder says what `speak(window, tokens so far, prompt first)` returns: logits or a token.

    The window is what the encoder was given. The past carries the tokens, so a wrong past is a wrong answer.
    """

    speak: Callable[[np.ndarray, list[int]], np.ndarray | int]
    settings: Settings = ENGLISH
    fed: list[list[int]] = field(default_factory=list)

    def parts(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def encoder(self, inputs: dict[str, Any]) -> dict[str, Any]:
        features = inputs["input_features"]
        assert features.dtype == np.float32
        return {f"cross_{kind}_{i}": Opaque(features) for kind in ("key", "value") for i in range(2)}

    def decoder(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        assert ids.dtype == np.int64
        names = [f"{kind}_{i}" for kind in ("key", "value") for i in range(2)]
        assert set(inputs) == {"input_ids", *(f"past_{n}" for n in names), *(f"cross_{n}" for n in names)}
        past = [inputs[f"past_{name}"] for name in names]
        first = isinstance(past[0], np.ndarray)
        past = [value if first else value.numpy() for value in past]
        assert not first or past[0].shape == (1, self.settings.heads, 0, self.settings.head_size)
        new = np.broadcast_to(ids[0, None, :, None], (1, 2, ids.shape[1], 4)).astype(np.float32)
        present = [np.concatenate([value, new], 2) for value in past]
        heard = [int(token) for token in present[0][0, 0, :, 0]]
        self.fed.append([int(token) for token in ids[0]])
        said = self.speak(inputs["cross_key_0"].numpy(), heard)
        logits = said if isinstance(said, np.ndarray) else peaks({said: 9.0})
        logits.flags.writeable = False
        return {
            "logits": Opaque(logits[None]),
            **{f"present_{n}": Opaque(v) for n, v in zip(names, present, strict=True)},
        }


def peaks(values: dict[int, float]) -> np.ndarray:
    logits = np.full(VOCABULARY, -9.0, np.float32)
    logits[list(values)] = list(values.values())
    return logits


def script(tokens: list[int], prompt: int = 2) -> Callable[[np.ndarray, list[int]], int]:
    """Say these tokens in every window, then end."""
    return lambda window, heard: [*tokens, EOS][min(len(heard) - prompt, len(tokens))]


def quiet(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


# Features


@pytest.fixture(scope="module")
def speech(data_dir: Path) -> np.ndarray:
    paths = sorted((data_dir / "librispeech_train_clean_calib" / "audio").glob("*.flac"))[:3]
    return np.concatenate([read_audio(path) for path in paths])


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("samples", [1, 150, 3 * RATE + 7, 479_700, 479_970, 480_000, 600_000])
def test_log_mel_equals_the_reference_on_speech(speech: np.ndarray, mel_bins: int, samples: int) -> None:
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=mel_bins)
    audio = speech[:samples]
    expected = extractor(audio, sampling_rate=RATE, return_tensors="np").input_features
    features = log_mel(audio, mel_bins)
    assert features.dtype == np.float32
    assert features.flags.c_contiguous
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_log_mel_equals_the_reference_on_noise_and_silence(mel_bins: int) -> None:
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=mel_bins)
    noise = np.random.default_rng(0).normal(0, 0.1, 5 * RATE).astype(np.float32)
    for audio in (noise, quiet(2)):
        expected = extractor(audio, sampling_rate=RATE, return_tensors="np").input_features
        np.testing.assert_allclose(log_mel(audio, mel_bins), expected, rtol=0, atol=1e-4)


def test_log_mel_of_silence_is_the_known_constant() -> None:
    assert (log_mel(quiet(1), 80) == np.float32(-1.5)).all()
    assert (log_mel(quiet(0), 80) == np.float32(-1.5)).all()


def test_log_mel_of_fewer_frames_starts_as_the_full_one_does() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * RATE).astype(np.float32)
    np.testing.assert_allclose(log_mel(noise, 80, 500), log_mel(noise, 80)[:, :, :500], atol=1e-5)


@pytest.mark.parametrize(("seconds", "frames"), [(0, 2), (3, 302), (29.99, 3000), (40, 3000)])
def test_log_mel_transforms_only_frames_that_touch_audio(
    monkeypatch: pytest.MonkeyPatch, seconds: float, frames: int
) -> None:
    transformed = []
    rfft = np.fft.rfft
    monkeypatch.setattr(np.fft, "rfft", lambda block: transformed.append(len(block)) or rfft(block))
    log_mel(quiet(seconds), 80)
    assert sum(transformed) == frames


# Settings


def test_settings_survive_json() -> None:
    for settings in (ENGLISH, MULTILINGUAL, replace(ENGLISH, timestamp_begin=None, language="en")):
        assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("name", sorted(ENGLISH.to_dict()))
def test_settings_refuse_a_missing_key(name: str) -> None:
    values = ENGLISH.to_dict()
    del values[name]
    with pytest.raises(BundleError, match=f"missing keys: {name}"):
        Settings.from_dict(values)


def test_settings_refuse_an_unknown_key_and_what_is_no_object() -> None:
    with pytest.raises(BundleError, match="unknown keys: beam"):
        Settings.from_dict(ENGLISH.to_dict() | {"beam": 5})
    with pytest.raises(BundleError, match="no JSON object"):
        Settings.from_dict([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("layers", 0), ("heads", "2"), ("max_tokens", True), ("eos", -1), ("timestamp_begin", 1.5),
     ("suppress", [-1]),
     ("suppress", "ab"), ("language_ids", {"en": "x"}), ("task_ids", []), ("language", 3), ("task", None)],
)  # fmt: skip
def test_settings_refuse_a_wrong_value(name: str, value: Any) -> None:
    with pytest.raises(BundleError, match=f"'{name}' must be"):
        Settings.from_dict(ENGLISH.to_dict() | {name: value})


# Up to 30 s


def test_transcribe_returns_the_planted_text_and_feeds_each_token_once() -> None:
    planted = Planted(script([5, 6, 7]))
    heard = transcribe(planted.parts(), spell, ENGLISH, quiet(4))
    assert (heard.tokens, heard.text, heard.windows, heard.language) == ((5, 6, 7), "5 6 7", 1, None)
    assert planted.fed == [[START, NO_STAMPS], [5], [6], [7]]
    assert set(heard.seconds) == {"features", "encoder", "decoder"}
    assert all(value > 0 for value in heard.seconds.values())


def test_transcribe_never_says_a_suppressed_token() -> None:
    said = Planted(lambda window, heard: peaks({97: 9.0, START: 8.0, 5: 7.0, EOS: 6.0 + (len(heard) > 4) * 2}))
    assert transcribe(said.parts(), spell, ENGLISH, quiet(1)).tokens == (5, 5, 5)


def test_transcribe_leaves_unasked_timestamps_out_of_the_text() -> None:
    said = Planted(script([at(0), 5, at(2), 6]))
    assert transcribe(said.parts(), spell, ENGLISH, quiet(4)).tokens == (5, 6)


def test_transcribe_suppresses_begin_tokens_at_the_beginning_only() -> None:
    said = Planted(lambda window, heard: peaks({[96, 96, EOS][min(len(heard) - 2, 2)]: 9.0, 5: 8.0}))
    assert transcribe(said.parts(), spell, ENGLISH, quiet(1)).tokens == (5, 96)


def test_transcribe_ends_at_the_last_position_and_cuts_no_loop_in_short_audio() -> None:
    planted = Planted(lambda window, heard: 5)
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(30)).tokens == (5,) * (ENGLISH.max_tokens - 2)
    assert len(planted.fed) == ENGLISH.max_tokens - 2


def test_transcribe_returns_no_text_when_the_model_says_nothing() -> None:
    settings = replace(ENGLISH, begin_suppress=())
    heard = transcribe(Planted(script([])).parts(), spell, settings, quiet(2))
    assert (heard.tokens, heard.text) == ((), "")


def test_transcribe_detects_the_language_among_language_tokens() -> None:
    def speak(window: np.ndarray, heard: list[int]) -> np.ndarray | int:
        return peaks({5: 9.0, EN: 1.0, ZH: 2.0}) if heard == [START] else script([5], prompt=4)(window, heard)

    planted = Planted(speak)
    heard = transcribe(planted.parts(), spell, MULTILINGUAL, quiet(2))
    assert (heard.language, heard.tokens) == ("zh", (5,))
    assert planted.fed == [[START], [START, ZH, TRANSCRIBE, NO_STAMPS], [5]]


@pytest.mark.parametrize(
    ("settings", "language", "task", "prompt"),
    [
        (MULTILINGUAL, "en", "translate", [START, EN, TRANSLATE, NO_STAMPS]),
        (replace(MULTILINGUAL, language="zh"), None, None, [START, ZH, TRANSCRIBE, NO_STAMPS]),
        (replace(MULTILINGUAL, language="zh"), "en", None, [START, EN, TRANSCRIBE, NO_STAMPS]),
        (ENGLISH, "en", "transcribe", [START, NO_STAMPS]),
        (replace(ENGLISH, no_timestamps=None, timestamp_begin=None), None, None, [START]),
    ],
)
def test_transcribe_prompts_as_asked(
    settings: Settings, language: str | None, task: str | None, prompt: list[int]
) -> None:
    planted = Planted(script([5], prompt=len(prompt)))
    assert transcribe(planted.parts(), spell, settings, quiet(2), language, task).tokens == (5,)
    assert planted.fed[0] == prompt


@pytest.mark.parametrize(
    ("settings", "language", "task", "words"),
    [
        (MULTILINGUAL, "xx", None, "'xx'. Known: en, zh"),
        (MULTILINGUAL, "en", "sing", "'sing'. Known: transcribe, translate"),
        (ENGLISH, "zh", None, "'zh'. Known: en"),
        (ENGLISH, None, "translate", "'translate'. Known: transcribe"),
    ],
)
def test_transcribe_names_the_known_when_the_asked_is_unknown(
    settings: Settings, language: str | None, task: str | None, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        transcribe(Planted(script([5])).parts(), spell, settings, quiet(1), language, task)


@pytest.mark.parametrize("audio", [np.zeros(0, np.float32), np.zeros((2, 100), np.float32)])
def test_transcribe_refuses_what_is_no_mono_audio(audio: np.ndarray) -> None:
    with pytest.raises(DataError, match="mono"):
        transcribe(Planted(script([5])).parts(), spell, ENGLISH, audio)


# Beyond 30 s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], np.ndarray]:
    """Audio whose every sample is its time in seconds, and an encoder input that still shows it."""
    monkeypatch.setattr(whisper, "log_mel", lambda audio, mel_bins, frames: audio[None, None])
    return lambda seconds: (np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


def speaker(words: list[tuple[float, float]], unfinished: int) -> Callable[[np.ndarray, list[int]], int]:
    """Says, as Whisper does, the words inside the window with their times, and a wrong one for a cut word."""

    def speak(window: np.ndarray, heard: list[int]) -> int:
        begin, end = float(window.flat[0]), float(window.flat[-1])
        tokens: list[int] = []
        for word, (start, stop) in enumerate(words):
            if start < begin - 0.01 or start > end:
                continue
            if stop <= end:
                tokens += [at(start - begin), word, at(stop - begin)]
            else:
                tokens += [at(start - begin), unfinished]
        return script(tokens, prompt=1)(window, heard)

    return speak


def test_transcribe_puts_long_audio_together_in_order_and_without_loss(
    clock: Callable[[float], np.ndarray],
) -> None:
    words = [(3.0 * i + 0.5, 3.0 * i + 3.2) for i in range(24)]
    planted = Planted(speaker(words, unfinished=95))
    heard = transcribe(planted.parts(), spell, replace(ENGLISH, suppress=()), clock(75))
    assert heard.tokens == tuple(range(24))
    assert heard.windows == 3
    assert planted.fed[0] == [START]


def test_transcribe_goes_on_where_the_last_closed_segment_ended(clock: Callable[[float], np.ndarray]) -> None:
    starts: list[float] = []

    def speak(window: np.ndarray, heard: list[int]) -> int:
        if len(heard) == 1:
            starts.append(float(window.flat[0]))
        return script([at(0), 5, at(12.34), at(12.34)], prompt=1)(window, heard)

    transcribe(Planted(speak).parts(), spell, ENGLISH, clock(40))
    np.testing.assert_allclose(starts, [0, 12.34, 24.68, 37.02], atol=1e-3)


def test_transcribe_passes_over_the_whole_window_when_nothing_is_said_after_its_last_segment() -> None:
    planted = Planted(script([at(0), 5, at(4)], prompt=1))
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(61)).windows == 3


@pytest.mark.parametrize(("rest", "windows"), [(0.05, 1), (0.2, 2)])
def test_transcribe_decodes_a_rest_only_when_it_can_hold_a_word(rest: float, windows: int) -> None:
    planted = Planted(script([at(0), 5, at(4)], prompt=1))
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(30 + rest)).windows == windows


def test_transcribe_always_moves_on_when_segments_are_tiny() -> None:
    planted = Planted(script([at(0), 5, at(0.02), at(0.02)], prompt=1))
    heard = transcribe(planted.parts(), spell, ENGLISH, quiet(300))
    assert heard.windows == 10
    assert heard.tokens == (5,) * 10


def test_transcribe_takes_at_most_one_window_per_second() -> None:
    planted = Planted(script([at(0), 5, at(1), at(1)], prompt=1))
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(60)).windows == 60


def test_transcribe_detects_the_language_in_the_first_window_only() -> None:
    def speak(window: np.ndarray, heard: list[int]) -> np.ndarray | int:
        said = script([at(0), 5, at(4)], prompt=3)
        return peaks({EN: 1.0, ZH: 2.0}) if heard == [START] else said(window, heard)

    planted = Planted(speak)
    heard = transcribe(planted.parts(), spell, MULTILINGUAL, quiet(61))
    assert (heard.language, heard.tokens) == ("zh", (5, 5, 5))
    assert planted.fed.count([START]) == 1
    assert planted.fed.count([START, ZH, TRANSCRIBE]) == 3


def test_transcribe_uses_fixed_windows_when_the_model_has_no_timestamps(
    clock: Callable[[float], np.ndarray],
) -> None:
    settings = replace(ENGLISH, timestamp_begin=None, suppress=())
    planted = Planted(lambda window, heard: script([int(window.flat[0])])(window, heard))
    heard = transcribe(planted.parts(), spell, settings, clock(75))
    assert heard.tokens == (0, 30, 60)
    assert planted.fed[0] == [START, NO_STAMPS]


@pytest.mark.parametrize("phrase", [[5], [5, 6, 7], [5, 6, 5, 7, 8, 9, 10]])
def test_transcribe_cuts_a_loop_to_one_round_and_stops_early(phrase: list[int]) -> None:
    settings = replace(ENGLISH, max_tokens=448)
    planted = Planted(script([at(0), 1, 2, *phrase * 60], prompt=1))
    heard = transcribe(planted.parts(), spell, settings, quiet(31))
    assert heard.tokens == (1, 2, *phrase) * 2
    assert len(planted.fed) < 2 * 40


def test_transcribe_cuts_a_loop_with_timestamps_and_goes_on_after_it() -> None:
    said = [token for i in range(30) for token in (at(i), 5, 6, 7, 8, at(i + 1))]
    planted = Planted(script(said, prompt=1))
    heard = transcribe(planted.parts(), spell, replace(ENGLISH, max_tokens=448), quiet(31))
    assert heard.tokens == (5, 6, 7, 8) * heard.windows
    assert heard.windows < 8


def test_transcribe_keeps_what_people_do_repeat() -> None:
    said = [1, *[2] * 8, *[3, 4, 5, 6] * 3, *[7, 8] * 5]
    planted = Planted(script([at(0), *said, at(9)], prompt=1))
    assert transcribe(planted.parts(), spell, ENGLISH, quiet(30.05)).tokens == tuple(said)


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


# The whole, against transformers with a small random model


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


def test_serving_whisper_imports_neither_torch_nor_transformers_nor_audio_libraries() -> None:
    code = (
        "import sys, packlight.serving.whisper, packlight.audio; "
        "print([m for m in ('torch', 'transformers', 'scipy', 'soundfile', 'soxr') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
