"""Quality and timing in the language and task that were asked for; the language of each sample where none was."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import packlight
from data_files import audio, planted
from packlight.errors import DataError, PacklightError
from packlight.evaluate import Asked, languages, quality, rate
from small_whisper import save_model, save_speech

WORDS = {1: "设定29度", 2: "设定28度", 3: "colour", 4: "color", 5: "paint"}


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def said(*texts: str):
    data = planted(*texts)
    return replace(data, samples=tuple(replace(s, text=t) for s, t in zip(data.samples, texts, strict=True)))


def test_quality_scores_each_sample_in_its_own_language() -> None:
    data = said("設定二十九度", "color paint")
    found, rows = quality(data, [[1], [3, 5]], [[2], [3, 5]], decode, ["zh", "en"])
    # The same characters and the same spelling after each language's normaliser; one digit of five is wrong after.
    assert (found.before, found.n, found.name) == (0.0, 2, "WER/CER")
    assert found.after == pytest.approx(1 / 7)
    assert found.languages == {"zh": 1, "en": 1}
    assert (rows[0]["language"], rows[0]["after_errors"], rows[0]["words"]) == ("zh", 1, 5)
    as_english, _ = quality(data, [[1], [3, 5]], [[2], [3, 5]], decode, "en")
    assert as_english.before > 0
    assert as_english.languages == {"en": 2}


def test_quality_keeps_the_numbers_of_the_paired_bootstrap() -> None:
    from packlight.metrics import paired_bootstrap

    data = said("paint", "color", "paint color")
    found, _ = quality(data, [[5], [4], [5, 4]], [[5], [5], [4, 4]], decode, "en")
    paired = paired_bootstrap([0, 0, 0], [0, 1, 1], [1, 1, 2])
    assert {name: getattr(found, name) for name in vars(paired)} == vars(paired)
    assert (found.token_agreement, found.identical) == (0.5, pytest.approx(1 / 3))


def test_quality_and_rate_refuse_samples_without_transcript() -> None:
    data = said("paint")
    silent = replace(data, samples=(replace(data.samples[0], text=None),))
    with pytest.raises(DataError, match="has no transcript"):
        quality(silent, [[5]], [[5]], decode, "en")
    with pytest.raises(DataError, match="has no transcript"):
        rate(silent, ["paint"], ["en"])


def test_rate_is_the_corpus_rate_with_an_interval_around_it() -> None:
    found = rate(said("paint", "paint color", "color"), ["paint", "paint", "colour"], ["en"] * 3)
    assert found["value"] == pytest.approx(1 / 4)
    assert found["low"] == 0.0 and 1 / 4 < found["high"] <= 0.5
    assert (found["metric"], found["n"], found["languages"]) == ("WER", 3, {"en": 3})


def test_languages_are_detected_once_per_sample_and_kept(tmp_path: Path) -> None:
    from packlight.data import read_dataset

    for i in range(3):
        audio(tmp_path / "data" / f"{i}.wav", i, seconds=0.1 * (i + 1))
    data = read_dataset(tmp_path / "data")
    heard = []

    def detect(samples):
        heard.append(len(samples))
        return {1600: "zh", 3200: "en"}.get(len(samples))

    kept = tmp_path / "languages.jsonl"
    assert languages(data, detect, None, kept) == ["zh", "en", "en"]  # None is a model of English only
    assert languages(data, detect, None, kept) == ["zh", "en", "en"]
    assert heard == [1600, 3200, 4800]
    assert languages(data, detect, "de", kept) == ["de"] * 3


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, data, bundle) of a small Whisper that knows English and Chinese, both tasks."""
    pytest.importorskip("torch")
    from tokenizers import Tokenizer

    from packlight.families.whisper import tiny

    base = tmp_path_factory.mktemp("multilingual")
    model, data = save_model(base / "model"), save_speech(base / "data")
    special = ["<|en|>", "<|zh|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|notimestamps|>"]
    made = Tokenizer.from_str(json.dumps(tokenizer))
    made.add_special_tokens(special)
    assert made.token_to_id("<|notimestamps|>") == 156
    made.save(str(model / "tokenizer.json"))
    (model / "model.safetensors").unlink()
    tiny(seed=3, vocab_size=157).save_pretrained(model)
    settings = {"decoder_start_token_id": 151, "eos_token_id": 150, "pad_token_id": 150, "no_timestamps_token_id": 156,
                "is_multilingual": True, "suppress_tokens": [3], "begin_suppress_tokens": [7],
                "max_length": 64}  # fmt: skip
    (model / "generation_config.json").write_text(json.dumps(settings))
    plan = packlight.Plan((packlight.Step("float16"),))
    return model, data, packlight.apply(str(model), plan, None, base / "out")


def test_eval_scores_in_the_language_that_the_model_hears(multilingual: tuple[Path, Path, Path]) -> None:
    from packlight.audio import read_audio
    from packlight.benching import evaluate_one
    from packlight.data import read_dataset

    model, data, bundle = multilingual
    original = packlight.load(str(model))
    heard = Counter(
        original.family.detect_language(original.module, read_audio(s.path), original.settings)
        for s in read_dataset(data).samples
    )
    assert set(heard) <= {"en", "zh"}
    for name in (bundle, model):
        assert evaluate_one(str(name), data, Asked(threads=1))["languages"] == dict(heard)
        found = evaluate_one(str(name), data, Asked(language="zh", threads=1))
        assert (found["languages"], found["metric"]) == ({"zh": 8}, "CER")


def test_measure_and_bench_ask_for_the_language_and_task(multilingual: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from packlight.benching import bench_bundle
    from packlight.measure import measure

    model, data, bundle = multilingual
    for kind, folder in (("bundle", bundle), ("model", model)):
        assert measure(kind, str(folder), [str(data / "0.wav")], 1, "zh", "translate")["memory"] > 10_000_000
        with pytest.raises(PacklightError, match="xx"):
            measure(kind, str(folder), [str(data / "0.wav")], 1, "xx", "transcribe")
    found = bench_bundle(bundle, data, str(model), Asked("zh", "translate", 1))
    assert (found["language"], found["task"], found["pair"]["samples"]) == ("zh", "translate", 8)
    chinese = tmp_path / "bundle"
    shutil.copytree(bundle, chinese)
    manifest = json.loads((chinese / "manifest.json").read_text())
    manifest["serving"] |= {"language": "zh", "task": "translate"}
    (chinese / "manifest.json").write_text(json.dumps(manifest))
    found = bench_bundle(chinese, data, None, Asked(threads=1))
    assert (found["language"], found["task"]) == ("zh", "translate")  # the bundle's own
    with pytest.raises(PacklightError, match="^The model does not know the task 'sing'"):
        bench_bundle(bundle, data, str(model), Asked("zh", "sing", 1))


def test_answers_are_kept_by_content_and_texts(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from packlight.evaluate import answers
    from packlight.families import whisper

    def with_texts(*texts: tuple[str, ...]):
        return replace(data, samples=tuple(replace(s, texts=t) for s, t in zip(data.samples, texts, strict=True)))

    data, made = planted("one", "one"), []  # the same content under two names
    kept = tmp_path / "kept.jsonl"

    def read(path: Path, texts: tuple[str, ...]) -> tuple[str, ...]:
        return texts

    def answer(texts: tuple[str, ...]) -> list[list[float]]:
        made.append(texts)
        return [[float(len(t))] for t in ("picture", *texts)]

    asked = with_texts(("a", "bb"), ("ccc",))
    first = answers(asked, answer, kept, "", open_input=read)
    assert first == [[[7.0], [1.0], [2.0]], [[7.0], [3.0]]]
    assert answers(asked, answer, kept, "", open_input=read) == first and made == [("a", "bb"), ("ccc",)]
    # Speech is kept by the recording alone, whatever was said in it, as in the work folders that are there.
    kept.write_text(json.dumps({"id": "s0", "sha256": data.samples[0].sha256, "tokens": [5]}) + "\n")
    assert answers(asked, answer, kept, "", open_input=whisper.FAMILY.open_input) == [[5], [5]]
    assert answers(data, answer, kept, "", open_input=read) == [[5], [5]]
    assert len(made) == 2
