"""Timing and scoring one thing: what `packlight bench` and `packlight eval` do."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from packlight.audio import read_audio
from packlight.bundle import is_bundle
from packlight.data import read_dataset
from packlight.evaluate import TIMED, Asked, rate, spread, threads_or_all, time_pair
from packlight.measure import machine, measure
from packlight.serve import open_served
from packlight.target import format_bytes, format_seconds

Progress = Callable[[str, int, int], None]
Reply = Callable[[Any], tuple[list[int], str | None]]


def bench_bundle(
    bundle: Path, data: Path | None, against: str | None, asked: Asked, progress: Progress | None = None
) -> dict[str, Any]:
    """Time a bundle, alone or against a model that is asked the same.

    Args:
        bundle: its folder.
        data: samples to time on; None is ten seconds of noise.
        against: a model's folder or hub id.
        asked: language and task; what it leaves open is as in the bundle, for the model too.
        progress: called with (what, done, total).

    Returns:
        'bundle' and 'against' as `packlight.measure.measure` gives them, with 'size' in bytes; 'pair' as
        `packlight.evaluate.time_pair` gives it; 'threads', 'machine'.

    Raises:
        PacklightError: no bundle, no model, or no samples there.
    """
    threads = threads_or_all(asked.threads)
    served = open_served(bundle, threads)
    own = served.bundle.manifest["serving"]
    language, task = asked.language or own["language"], asked.task or own["task"]
    with tempfile.TemporaryDirectory() as folder:
        dataset = read_dataset(data or _noise(Path(folder)))
        files = [str(s.path.resolve()) for s in spread(dataset, 3)]
        found: dict[str, Any] = {
            "bundle": measure("bundle", str(bundle.resolve()), files, threads, language, task)
            | {"size": served.bundle.size}
        }
        if against:
            import torch

            from packlight.loading import load

            torch.set_num_threads(threads)
            trust = asked.trust_remote_code
            model = load(against, trust_remote_code=trust)
            family = model.family
            family.prompt(model.settings, language, task)  # raises for a language or task that it does not know
            found["against"] = measure("model", model.source.path, files, threads, language, task, trust)
            found["against"]["size"] = model.source.bytes
            found["pair"] = time_pair(
                spread(dataset, TIMED),
                lambda audio: family.answer(model.module, audio, model.settings, language, task),
                lambda audio: list(served.answer(audio, language, task).tokens),
                progress,
            )
    return found | {"threads": threads, "machine": machine(), "language": language, "task": task}


def _noise(folder: Path) -> Path:
    import soundfile

    noise = 0.01 * np.random.default_rng(0).standard_normal(160_000)
    soundfile.write(folder / "noise.wav", noise, 16_000)
    return folder


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


def evaluate_one(name: str, data: Path, asked: Asked, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the task's metric of a model or bundle.

    Args:
        name: a bundle's folder, or a model's folder or hub id.
        data: samples with transcripts.
        asked: without a language, each sample is scored in the one that the model hears in it.
        progress: called with (what, done, total).

    Returns:
        what `packlight.evaluate.rate` gives, and 'seconds' of audio.

    Raises:
        PacklightError: no model, no bundle or no samples there, or none with words.
    """
    dataset = read_dataset(data, need_text=True)
    reply, decode = _of_bundle(name, asked) if is_bundle(Path(name)) else _of_model(name, asked)
    texts, spoken = [], []
    for i, sample in enumerate(dataset.samples):
        ids, language = reply(read_audio(sample.path))
        texts.append(decode(ids))
        spoken.append(language)
        if progress:
            progress("answering", i + 1, dataset.n)
    return rate(dataset, texts, [language or "en" for language in spoken]) | {"seconds": dataset.seconds}


def _of_bundle(name: str, asked: Asked) -> tuple[Reply, Callable[[Any], str]]:
    served = open_served(Path(name), asked.threads)

    def reply(audio: Any) -> tuple[list[int], str | None]:
        said = served.answer(audio, asked.language, asked.task)
        return list(said.tokens), said.language

    return reply, served.decode


def _of_model(name: str, asked: Asked) -> tuple[Reply, Callable[[Any], str]]:
    import torch

    from packlight.loading import load

    torch.set_num_threads(threads_or_all(asked.threads))
    model = load(name, trust_remote_code=asked.trust_remote_code)
    family, task = model.family, asked.task or "transcribe"
    family.prompt(model.settings, asked.language, task)  # raises for a language or task that it does not know

    def reply(audio: Any) -> tuple[list[int], str | None]:
        language = asked.language or family.detect_language(model.module, audio, model.settings)
        return family.answer(model.module, audio, model.settings, language, task), language

    return reply, model.decoder()
