"""Timing and scoring one thing: what `packlight bench` and `packlight eval` do."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from packlight.bundle import is_bundle
from packlight.data import prompted, read_dataset
from packlight.errors import DataError
from packlight.evaluate import TIMED, Asked, spread, threads_or_all, time_pair
from packlight.measure import machine, measure
from packlight.profiling import profile, profile_text
from packlight.scoring import SCORES
from packlight.serve import Served, open_served
from packlight.target import format_bytes, format_seconds

PROFILED = 5  # samples whose answers are profiled
Progress = Callable[[str, int, int], None]
Reply = Callable[[Any], tuple[list[Any], str | None]]


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
        PacklightError: no bundle, no model, or no samples there; templates for frozen classes.
    """
    threads = threads_or_all(asked.threads)
    served = open_served(bundle, threads)
    _check_templates(served, asked)
    own = served.bundle.manifest["serving"]
    language, task = asked.language or own["language"], asked.task or own["task"]
    with tempfile.TemporaryDirectory() as folder:
        dataset = prompted(read_dataset(data or _made_up(served, Path(folder))), asked.templates)
        if _frozen(served):  # it has no words, so the model is timed without them, too: one tower against the other
            dataset = replace(dataset, samples=tuple(replace(s, texts=()) for s in dataset.samples))
        files = [(str(s.path.resolve()), s.texts) for s in spread(dataset, 3)]
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
            _check_same(model, served)
            family.prompt(model.settings, language, task)  # raises for a language or task that it does not know
            found["against"] = measure("model", model.source.path, files, threads, language, task, trust)
            found["against"]["size"] = model.source.bytes
            found["pair"] = time_pair(
                spread(dataset, TIMED),
                lambda content: family.answer(model.module, content, model.settings, language, task),
                lambda content: served.reply(content, language, task),
                progress,
                served.open_input,
            )
    return found | {"threads": threads, "machine": machine(), "language": language, "task": task}


def bench_or_profile(
    bundle: Path, data: Path | None, against: str | None, asked: Asked, inside: bool, progress: Progress | None = None
) -> tuple[dict[str, Any], str]:
    """What `packlight bench` finds, and the same for people: `bench_bundle`, or with `inside` where the time goes."""
    if not inside:
        found = bench_bundle(bundle, data, against, asked, progress)
        return found, bench_text(found)
    if against:
        raise DataError("--profile looks at the bundle alone. Leave --against out.")
    served = open_served(bundle, threads_or_all(asked.threads))
    _check_templates(served, asked)
    with tempfile.TemporaryDirectory() as folder:
        dataset = prompted(read_dataset(data or _made_up(served, Path(folder))), asked.templates)
        contents = [served.open_input(s.path, s.texts) for s in spread(dataset, PROFILED)]
    del served
    found = profile(bundle, contents, asked, progress)
    return found, profile_text(found)


def _made_up(served: Served, folder: Path) -> Path:
    """A sample of the kind that the bundle takes."""
    if served.encoder is not None and served.encoder.settings.kind == "image":
        return _picture(folder)
    return _noise(folder)


def _noise(folder: Path) -> Path:
    """Ten seconds of noise, with a text for what compares it."""
    import soundfile

    noise = 0.01 * np.random.default_rng(0).standard_normal(160_000)
    soundfile.write(folder / "noise.wav", noise, 16_000)
    (folder / "noise.txt").write_text("the sound of noise")
    return folder


def _picture(folder: Path) -> Path:
    """A picture of noise with a text."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (folder / "noise.txt").write_text("a photo of noise")
    return folder


def _frozen(served: Served) -> bool:
    return str(served.bundle.manifest["task"]).endswith("-classes")


def _check_templates(served: Served, asked: Asked) -> None:
    """Refuse templates for frozen classes, which would do nothing."""
    if asked.templates and _frozen(served):
        raise DataError(
            f"{served.bundle.path} was frozen with the texts of its classes in it, so --template would do nothing. Leave "
            "it out."
        )


def _check_same(model: Any, served: Served) -> None:
    """Refuse a model of another task; frozen classes are half of a model that compares the same things with words."""
    own, task = model.family.task, served.bundle.manifest["task"]
    if own != task and not (_frozen(served) and own == task.replace("-classes", "-text")):
        raise DataError(
            f"{model.source.name} is for {model.family.task}, the bundle for {served.bundle.manifest['task']}: they can't "
            "be timed on the same samples."
        )


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
    dataset = prompted(read_dataset(data, need_text=True), asked.templates)
    one = _of_bundle(name, asked) if is_bundle(Path(name)) else _of_model(name, asked)
    if dataset.modality not in one.modalities:
        raise DataError(f"{data} holds {dataset.modality} files; {name} takes {' and '.join(one.modalities)}.")
    found, spoken = [], []
    for i, sample in enumerate(dataset.samples):
        ids, language = one.reply(one.open_input(sample.path, sample.texts))
        found.append(ids)
        spoken.append(language or "en")
        if progress:
            progress("answering", i + 1, dataset.n)
    return SCORES[one.task][1](dataset, found, one.decode, spoken) | {"seconds": dataset.seconds}


def evaluate_text(found: dict[str, Any]) -> str:
    """The same for people."""
    spoken = ", ".join(f"{code} {n}" for code, n in found["languages"].items())
    details = "".join(f"\n{name:24}{value:7.2%}" for name, value in found.get("details", {}).items())
    return (
        f"{found['metric']} {found['value']:.2%}   95 % interval [{found['low']:.2%}, {found['high']:.2%}], "
        f"n = {found['n']}" + (f", scored as {spoken}" if spoken else "") + details
    )


@dataclass(frozen=True)
class _One:
    """What is evaluated: how it answers, and what its answers are."""

    task: str
    modalities: tuple[str, ...]
    reply: Reply
    decode: Callable[[Any], str]
    open_input: Callable[..., Any]


def _of_bundle(name: str, asked: Asked) -> _One:
    served = open_served(Path(name), asked.threads)
    task = served.bundle.manifest["task"]
    _check_templates(served, asked)
    kind = "audio" if served.encoder is None else served.encoder.settings.kind

    def reply(content: Any) -> tuple[list[Any], str | None]:
        said = served.answer(content, asked.language, asked.task)
        return (said, None) if isinstance(said, list) else (list(said.tokens), said.language)

    return _One(task, (kind, "text"), reply, served.decode, served.open_input)


def _of_model(name: str, asked: Asked) -> _One:
    import torch

    from packlight.loading import load

    torch.set_num_threads(threads_or_all(asked.threads))
    model = load(name, trust_remote_code=asked.trust_remote_code)
    family, task = model.family, asked.task or "transcribe"
    family.prompt(model.settings, asked.language, task)  # raises for a language or task that it does not know

    def reply(content: Any) -> tuple[list[Any], str | None]:
        language = asked.language
        if language is None and family.detect_language is not None:
            language = family.detect_language(model.module, content, model.settings)
        return family.answer(model.module, content, model.settings, language, task), language

    return _One(family.task, family.modalities, reply, model.decoder(), family.open_input)
