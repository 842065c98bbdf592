"""Timing and scoring one thing: what `packlight bench` and `packlight eval` do."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from packlight.bundle import is_bundle
from packlight.data import read_dataset
from packlight.evaluate import TIMED, answers, spread, threads_or_all, time_pair
from packlight.measure import machine, measure
from packlight.serve import open_served
from packlight.target import format_bytes, format_seconds

Progress = Callable[[str, int, int], None]


def bench_bundle(
    bundle: Path, data: Path | None, against: str | None, threads: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Load time, peak memory and seconds per sample of a bundle, each in a process of its own; see `bench`."""
    threads = threads_or_all(threads)
    served = open_served(bundle, threads)
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            import soundfile

            noise = 0.01 * np.random.default_rng(0).standard_normal(160_000)
            soundfile.write(Path(folder) / "noise.wav", noise, 16_000)
            data = Path(folder)
        dataset = read_dataset(data)
        files = [str(s.path.resolve()) for s in spread(dataset, 3)]
        found: dict[str, Any] = {
            "bundle": measure("bundle", str(bundle.resolve()), files, threads) | {"size": served.bundle.size}
        }
        if against:
            import torch

            from packlight.loading import load

            torch.set_num_threads(threads)
            model = load(against)
            found["against"] = measure("model", model.source.path, files, threads) | {"size": model.source.bytes}
            found["pair"] = time_pair(
                spread(dataset, TIMED),
                lambda audio: model.family.answer(model.module, audio, model.settings, None, "transcribe"),
                lambda audio: list(served.answer(audio).tokens),
                progress,
            )
    return found | {"threads": threads, "machine": machine()}


def bench_text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for name in ("against", "bundle"):
        if name in found:
            row = found[name]
            energy = f"{row['energy']:.2f} J" if row["energy"] else "energy not reported here"
            lines.append(
                f"{name:8} {format_bytes(row['size']):>9}   load {format_seconds(row['load'])}   "
                f"{format_seconds(row['latency'])} a sample   peak {format_bytes(row['memory'])}   {energy}"
            )
    if "pair" in found:
        pair = found["pair"]
        lines.append(
            f"in turn  {format_seconds(pair['before_mean'])} and {format_seconds(pair['after_mean'])} a sample (means of "
            f"{pair['samples']}): {pair['ratio']:.2f} times faster, 95 % interval [{pair['low']:.2f}, {pair['high']:.2f}]"
        )
    return "\n".join([*lines, f"{found['threads']} threads, {found['machine']}"])


def evaluate_one(
    name: str,
    data: Path,
    language: str | None,
    task: str,
    threads: int,
    trust: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The metric of a model or bundle with a bootstrap interval over samples."""
    from packlight.metrics import error_counts, metric_name, normalize, word_error_rate

    dataset = read_dataset(data, need_text=True)
    answer: Callable[[Any], list[int]]
    decode: Callable[[Any], str]
    if is_bundle(Path(name)):
        served = open_served(Path(name), threads)
        decode = served.decode

        def answer(audio: Any) -> list[int]:
            return list(served.answer(audio, language, task).tokens)
    else:
        import torch
        from tokenizers import Tokenizer

        from packlight.loading import load

        torch.set_num_threads(threads_or_all(threads))
        model = load(name, trust_remote_code=trust)
        tokenizer = Tokenizer.from_str(model.tokenizer)

        def decode(ids: Any) -> str:
            return str(tokenizer.decode(list(ids)))

        def answer(audio: Any) -> list[int]:
            return model.family.answer(model.module, audio, model.settings, language, task)

    said = answers(dataset, answer, None, "answering", progress)
    edits, words = [], []
    for sample, ids in zip(dataset.samples, said, strict=True):
        reference = normalize(sample.text or "", language or "en")
        wrong, count = error_counts(reference.split(), normalize(decode(ids), language or "en").split())
        edits.append(wrong)
        words.append(count)
    picks = np.random.default_rng(0).integers(0, dataset.n, (10_000, dataset.n))
    rates = np.array(edits)[picks].sum(1) / np.maximum(np.array(words)[picks].sum(1), 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return {
        "metric": metric_name(language or "en"), "value": word_error_rate(edits, words), "low": float(low),
        "high": float(high), "n": dataset.n, "seconds": dataset.seconds,
    }  # fmt: skip
