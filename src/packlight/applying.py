"""Run a plan on a model and write the bundle, deciding nothing: what `fit` does with each plan, callable alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from packlight.audio import RATE, read_audio
from packlight.bundle import is_bundle
from packlight.compress import check, compress_
from packlight.data import CALIBRATION_LIMIT, Dataset, prompted, read_dataset, split
from packlight.deploy import deploy
from packlight.errors import DataError
from packlight.evaluate import answers, spread, threads_or_all
from packlight.families import BESIDE, Batch, Family
from packlight.loading import load
from packlight.model import Model
from packlight.plan import Plan
from packlight.tables import TECHNIQUES
from packlight.target import find_device
from packlight.techniques import Stage

Progress = Callable[[str, int, int], None]

OBSERVED = 40  # calibration samples for the Gram matrices with which sensitivities are measured
JUDGED = 10  # further ones for sensitivity
_BESIDE = 20_000  # texts of further ones
_OURS = ("work", "result.json", "plan.json", "bundle", "report.html", "log.jsonl", "sweep.json", "plans", "bundles")


@dataclass(frozen=True)
class Options:
    """What a fit may be told besides its target.

    Args:
        calibration: folder of calibration samples; None splits the data.
        language, task: of a multilingual model; None detects the language.
        threads: 0 for all cores.
        seed: of everything random.
        trust_remote_code: see `load`.
        command: the command line, for the report.
        texts: file or folder of texts that the model is to write well, for pruning the vocabulary.
        templates: what labels are asked with, {} in place of the label; none for the default.
        prune_vocabulary: whether plans may; a model of several languages needs `language` for it.
        freeze: ship the classes of labelled samples in place of the text tower; `fit` alone.
    """

    calibration: Path | None = None
    language: str | None = None
    task: str = "transcribe"
    threads: int = 0
    seed: int = 0
    trust_remote_code: bool = False
    command: str = ""
    texts: Path | None = None
    prune_vocabulary: bool = True
    templates: tuple[str, ...] = ()
    freeze: bool = False


def threads_of(options: Options, device: str = "local") -> int:
    """Threads for everything that is run and timed: asked for, else the named device's, else all cores."""
    return threads_or_all(options.threads or find_device(device).threads)


def check_out(out: Path) -> None:
    """Refuse an output folder that holds anything that is not ours. Raises DataError."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file. Name a folder for the results.")
    present = {p.name for p in out.iterdir()} if out.is_dir() else set()
    strangers = present - {*_OURS, *(f"{name}.part" for name in _OURS)}  # .part: what a kill or a full disk left
    if not present & {"work", "bundle", "result.json", "sweep.json"}:
        strangers = present  # a plan.json alone was written by hand
    bundle = out / "bundle"
    if bundle.exists() and not (is_bundle(bundle) or (bundle.is_dir() and not any(bundle.iterdir()))):
        strangers |= {"bundle"}
    if strangers:
        raise DataError(
            f"{out} holds {min(strangers)!r}, which is not ours, so nothing was written. Choose an empty folder."
        )


def calibration_batches(
    model: Model,
    calibration: Dataset,
    options: Options,
    work: Path,
    progress: Progress | None,
    limit: int | None = None,
) -> list[Batch]:
    """Teacher-forced batches of calibration samples with the original's own words; `limit` at most, None for as many as a fit takes."""
    limit = OBSERVED + JUDGED if limit is None else limit
    family = model.family
    if family.group > 1:
        return _grouped(model, calibration, limit)
    picked = replace(calibration, samples=spread(calibration, limit))

    def answer(audio: Any) -> list[int]:
        heard = audio[: round(family.window * RATE)]  # a batch holds no more, so no words beyond it either
        return family.answer(model.module, heard, model.settings, options.language, options.task)

    words = answers(picked, answer, work / "words.jsonl", "original on calibration samples", progress)
    batches = []
    for sample, ids in zip(picked.samples, words, strict=True):
        audio = read_audio(sample.path)
        language = options.language
        if language is None and family.detect_language is not None:
            language = family.detect_language(model.module, audio, model.settings)
        opening = family.prompt(model.settings, language, options.task)
        batches.append(family.prepare(model.module, audio, ids, opening, model.settings))
    return batches


def _grouped(model: Model, calibration: Dataset, limit: int) -> list[Batch]:
    """Batches of several samples, which are compared with each other; at least five where there are samples for it."""
    family = model.family
    samples = spread(calibration, limit * family.group)
    size = max(2, min(family.group, len(samples) // 5))
    batches: list[Batch] = []
    picked: set[int] = set()
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        if len(some) > 1 or not batches:
            inputs = [family.open_input(s.path, s.texts) for s in some]
            batches.append(family.prepare(model.module, inputs, [], [], model.settings))
            picked |= {id(s) for s in some}
    texts = [s.texts[0] for s in calibration.samples if s.texts and id(s) not in picked]
    if texts and batches:  # no tower is run on these, but they say which tokens are read, and how often
        batches[0][BESIDE] = model.settings["tokenizer"](texts[:: -(-len(texts) // _BESIDE)])[family.reads]
    return batches


def check_input(model: Model, dataset: Dataset) -> None:
    """Refuse samples that this model can't take. Raises DataError."""
    if dataset.modality not in model.family.modalities:
        raise DataError(
            f"{dataset.source} holds {dataset.modality} files; {model.source.architecture} takes "
            f"{' and '.join(model.family.modalities)}. Give it samples of its own kind."
        )


def check_calibration(model: Model, calibration: Dataset) -> None:
    """Refuse calibration samples that this model can't take, or that a plan can't be judged by. Raises DataError."""
    check_input(model, calibration)
    bare = [s.id for s in calibration.samples if not s.texts]
    if model.family.group > 1 and (bare or calibration.n < 2):
        raise DataError(
            f"{calibration.source}: {model.source.architecture} is judged by how well its towers match, so calibration "
            f"needs at least two samples, each with a text or label"
            + (f"; {len(bare)} have none, first {bare[0]}." if bare else ".")
        )


def plan_batches(
    model: Model, plan: Plan, calibration: Dataset, options: Options, work: Path, progress: Progress | None
) -> list[Batch]:
    """The calibration batches that a plan is carried out with.

    All of a family whose batches hold one sample each, since a Gram matrix of few words fits these words alone; of one
    that compares, all to teach with, else those for Gram matrices: each batch already holds many.
    """
    teaches = any(TECHNIQUES[s.technique].stage in (Stage.DISTILL, Stage.TUNE) for s in plan.steps)
    if teaches or model.family.group == 1:
        work = work / "lessons"
        work.mkdir(parents=True, exist_ok=True)
        return calibration_batches(model, calibration, options, work, progress, CALIBRATION_LIMIT)
    return divide(calibration_batches(model, calibration, options, work, progress))[0]


def divide(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(for Gram matrices, for sensitivity): every fifth judges."""
    judged = [b for i, b in enumerate(batches) if i % 5 == 4]
    return [b for i, b in enumerate(batches) if i % 5 != 4], judged or batches[:1]


def together(family: Family, batches: list[Batch]) -> list[Batch]:
    """Of a family that compares, all samples in one batch: among sixteen nearly every plan finds the right one."""
    if family.sides is None or len(batches) < 2:
        return batches
    joint = {}
    for name in batches[0]:
        values = [b[name] for b in batches]
        if values[0].dim() > 1:  # texts, and pictures of any shape, are filled up to the longest and masked
            longest = max(v.shape[1] for v in values)
            values = [torch.nn.functional.pad(v, (0, 0) * (v.dim() - 2) + (0, longest - v.shape[1])) for v in values]
        joint[name] = torch.cat(values)
    return [joint]


def apply(
    model: str,
    plan: Plan,
    data: Path | None,
    out: Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Path:
    """Run a plan on a model and write the bundle, deciding nothing.

    Args:
        model: folder or hub id.
        plan: checked whole before any work.
        data: the folder that `fit` was given, or its calibration folder as `options.calibration`; None for plans
            whose techniques need no data.
        out: folder that gets `bundle/`.
        options: see `Options`.
        progress: called with (what, done, total).

    Returns:
        the bundle's folder. The same model, plan and samples give the same bytes as the fit that wrote the plan.
    """
    options = options or Options()
    check_out(out)
    dataset = None
    if options.calibration is not None:
        dataset = prompted(read_dataset(options.calibration), options.templates, needed=False)
    elif data is not None:
        dataset = split(prompted(read_dataset(data), options.templates), plan.seed)[0]
    torch.set_num_threads(threads_or_all(options.threads))
    loaded = load(model, trust_remote_code=options.trust_remote_code)
    if dataset is not None:
        check_input(loaded, dataset)
    check(plan, loaded, dataset.sha256 if dataset else None)
    work = out / "work" / plan.key[:12]
    work.mkdir(parents=True, exist_ok=True)
    batches: list[Batch] = []
    if dataset is not None:
        batches = plan_batches(loaded, plan, dataset, options, work, progress)
    records = compress_(loaded, plan, batches, work / "waves", progress, work / "costs")
    deploy(loaded, plan, records, out / "bundle", options.language, options.task)
    return out / "bundle"
