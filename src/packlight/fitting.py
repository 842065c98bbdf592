"""The five steps in a row: target, choice, application, evaluation, deployment. The whole product on one page."""

import datetime
import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import packlight
from packlight.applying import (
    Options,
    calibration_batches,
    check_calibration,
    check_input,
    check_out,
    divide,
    plan_batches,
    threads_of,
    together,
)
from packlight.bundle import is_bundle, open_bundle
from packlight.compress import check, compress_
from packlight.data import Dataset, check_disjoint, prompted, read_dataset, split
from packlight.deploy import deploy, ladder, parity, versions
from packlight.errors import DataError, TargetError
from packlight.evaluate import TIMED, Asked, answers, languages, spread, time_pair
from packlight.families import Batch
from packlight.fewer_tokens import prunings
from packlight.freezing import check_classes, frozen_reply, left_out
from packlight.loading import load
from packlight.measure import machine, measure
from packlight.model import Model
from packlight.plan import Plan, append_line, write_json
from packlight.planner import front
from packlight.ranging import with_static
from packlight.recovering import taught, unrounded
from packlight.report import write_report
from packlight.scoring import SCORES
from packlight.searching import search
from packlight.sensitivity import Level, activations, contexts, measure_grams, profile, sensitivity
from packlight.serve import open_served
from packlight.speeding import Slow, lighter
from packlight.tables import TECHNIQUES
from packlight.target import Target
from packlight.techniques import Stage
from packlight.token_pruning import old_ids
from packlight.verdict import conclude, missed
from packlight.vocabulary_usage import check_language, has_word_list, read_texts, texts_sha256

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FitResult:
    """What a fit found. `result` is the content of result.json; docs/reference/result.md names its keys."""

    met: bool
    out: Path
    result: dict[str, Any]


@dataclass
class Run:
    """What the steps of one fit share."""

    model: Model
    target: Target
    options: Options
    out: Path
    work: Path
    calibration: Dataset
    evaluation: Dataset
    progress: Progress | None
    language: str | None = None  # of the words to come; a model that compares is not told of it
    texts: list[str] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    before: list[list[int]] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)  # of the evaluation samples
    overhead: int = 145_000  # bytes of a bundle beside what plans expect, until one was measured


def fit(
    model: str,
    data: str | Path,
    target: Target,
    out: str | Path = "out",
    options: Options | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Fit a model to a target and prove it.

    Args:
        model: a folder or a hub id.
        data: samples with transcripts; evaluation only, or both when `options.calibration` is None.
        target: what the bundle must meet.
        out: folder for the results; a killed fit goes on there.
        options: see `Options`.
        progress: called with (what, done, total).

    Returns:
        the result, whether the target was met or not.

    Raises:
        PacklightError: input that can't be used; nothing was written.
    """
    if target.empty:
        raise TargetError(
            "The target asks for nothing. Name at least one of --max-size, --max-latency, --max-memory, --max-drop, "
            "or ask for the whole curve with --sweep."
        )
    options = options or Options()
    start = time.perf_counter()
    run = prepare(model, Path(data), target, Path(out), options, progress)
    observe(run)
    levels, plans = make_plans(run)
    tried = _search(run, plans)
    chosen = conclude(tried, run.target)
    result = _finish(run, levels, plans, tried, chosen, time.perf_counter() - start)
    return FitResult(result["verdict"]["met"], run.out, result)


def prepare(model: str, data: Path, target: Target, out: Path, options: Options, progress: Progress | None) -> Run:
    """Check everything that can be checked before work starts, then load the model and make the work folder."""
    import torch

    check_out(out)
    dataset = prompted(read_dataset(data, need_text=True), options.templates)
    if options.calibration is None:
        calibration, evaluation = split(dataset, options.seed)
    else:
        calibration, evaluation = prompted(read_dataset(options.calibration), options.templates, needed=False), dataset
        check_disjoint(calibration, evaluation)
    torch.set_num_threads(threads_of(options, target.device))
    loaded = load(model, trust_remote_code=options.trust_remote_code)
    check_input(loaded, evaluation)
    check_calibration(loaded, calibration)
    check_classes(evaluation, options.freeze)
    if loaded.family.sides is None or options.language is None:
        loaded.family.prompt(loaded.settings, options.language, options.task)  # raises for a language it does not know
    else:
        check_language(options.language)
    free = shutil.disk_usage(next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())).free
    needed = 3 * loaded.source.bytes + 200_000_000
    if free < needed:
        raise DataError(
            f"{out} has {free / 1e6:.0f} MB free; this fit needs about {needed / 1e6:.0f} MB. Make room or choose another disk."
        )
    identity = [loaded.source.sha256, calibration.sha256, evaluation.sha256, options.language, options.task]
    texts = read_texts(options.texts) if options.texts else []
    identity += [str(options.prune_vocabulary), texts_sha256(texts), *(["frozen"] if options.freeze else [])]
    key = hashlib.sha256(json.dumps([*identity, options.seed, packlight.__version__]).encode()).hexdigest()[:12]
    work = out / "work" / key
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"Can't write to {out} ({error.strerror}). Choose a folder that you may write to.") from None
    language = options.language
    options = options if loaded.family.sides is None else replace(options, language=None)
    run = Run(loaded, target, options, out, work, calibration, evaluation, progress, language, texts)
    run.overhead = 100_000 if options.freeze else run.overhead  # no tokenizer
    return run


def _answer_of(run: Run) -> Callable[[Any], list[int]]:
    model, options = run.model, run.options
    return lambda audio: model.family.answer(model.module, audio, model.settings, options.language, options.task)


def observe(run: Run) -> None:
    """The original's own words: on the evaluation samples to compare with, on the calibration samples to imitate."""
    family = run.model.family
    run.before = answers(
        run.evaluation,
        _answer_of(run),
        run.work / "before.jsonl",
        "original on evaluation samples",
        run.progress,
        family.open_input,
    )
    detect = family.detect_language
    run.languages = languages(
        run.evaluation,
        None if detect is None else lambda audio: detect(run.model.module, audio, run.model.settings),
        run.options.language,
        run.work / "languages.jsonl",
        run.progress,
    )
    run.batches = calibration_batches(run.model, run.calibration, run.options, run.work, run.progress)


def _calibration(run: Run) -> dict[str, Any]:
    seen = run.calibration
    return {"sha256": seen.sha256, "n": seen.n, "seconds": round(seen.seconds, 1)}


def _divided(run: Run) -> tuple[list[Batch], list[Batch]]:
    observed, judged = divide(run.batches)
    return observed, together(run.model.family, judged)


def make_plans(run: Run) -> tuple[list[Level], list[Plan]]:
    """Measure the sensitivities; returns them, and the plans along the front, each checked."""
    observed, judged = _divided(run)
    kept = run.work / "sensitivity.jsonl"
    sums = measure_grams(run.model, observed, run.progress)
    unshipped = left_out(run.model) if run.options.freeze else set()
    levels = [v for v in sensitivity(run.model, sums, judged, kept, run.progress) if v.part not in unshipped]
    rounding = activations(run.model, judged, run.work / "activations.jsonl", run.progress)
    rounding = with_static(rounding, run.model, (observed, judged), run.work / "static.jsonl", run.progress)
    rounding = {part: kl for part, kl in rounding.items() if part not in unshipped}
    wanted = (_languages(run), run.texts) if run.options.prune_vocabulary else ([], [])
    vocabularies = prunings(run.model, observed, judged, wanted, run.progress)
    fast, origin = run.target.latency is not None, (_calibration(run), run.options.seed)
    shortened = contexts(run.model, judged, run.work / "contexts.jsonl", run.progress) if fast else []
    plans = front(run.model, levels, rounding, vocabularies, shortened, origin, run.target)
    for plan in plans:
        check(plan, run.model, run.calibration.sha256)
    return levels, plans


def _languages(run: Run) -> list[str]:
    """What the model is to write or read; empty when that is not known."""
    options, several = run.options, bool(run.model.settings.get("lang_to_id"))
    if several and (not run.language or options.task != "transcribe"):
        return []
    language = run.language or ("en" if run.model.family.sides is None else "")
    return [language] if language and has_word_list(language) else []  # the report's plan then has no such step


def _lighter(run: Run, plan: Plan, outcome: dict[str, Any]) -> list[Plan]:
    """The plan with fewer operations, as many as the measured times ask for; none where the model has none to give."""
    assert run.target.latency is not None
    slow = Slow(plan, run.work / plan.key[:12] / "bundle", outcome["timing"]["after"], run.target.latency)
    asked = Asked(run.options.language, _task(run), threads_of(run.options, run.target.device))
    contents = [run.model.family.open_input(s.path, s.texts) for s in spread(run.evaluation, 5)]
    found = lighter(run.model, slow, contents, asked, _divided(run), run.work / "pruning.jsonl", run.progress)
    return [] if found is None else [found]


def _search(run: Run, plans: list[Plan]) -> list[dict[str, Any]]:
    """Try plans until one meets the target, or until none is left that could; those that were made on the way join them."""

    def attempt(plan: Plan) -> dict[str, Any]:
        found = _attempt(run, plan)
        row = {key: found[key] for key in ("plan", "size", "quality", "timing", "process", "missed")}
        append_line(run.out / "log.jsonl", row)
        return found

    def derive(kind: str, plan: Plan, outcome: dict[str, Any]) -> list[Plan]:
        if kind == "s":
            return _lighter(run, plan, outcome)
        lessons = taught(run.model, plan, run.calibration.n)
        return lessons if kind == "t" else unrounded(lessons[0] if lessons else plan)

    outcomes, run.overhead = search(plans, attempt, derive, run.target, run.overhead)
    return outcomes


def _attempt(run: Run, plan: Plan) -> dict[str, Any]:
    """Apply, deploy and measure one plan; what an earlier run finished is kept."""
    folder = run.work / plan.key[:12]
    done = folder / "outcome.json"
    if done.is_file():
        earlier = dict(json.loads(done.read_text()))
        return earlier | {"plan": plan.name, "missed": missed(run.target, earlier)}
    built = build(run, plan)
    family, samples = run.model.family, spread(run.evaluation, TIMED)
    timing = time_pair(samples, _answer_of(run), built.reply, run.progress, family.open_input)
    asked = (threads_of(run.options, run.target.device), run.options.language, _task(run))
    process = measure("bundle", str(built.bundle.resolve()), _measured(run), *asked)
    outcome = built.outcome | {"timing": timing, "process": process}
    write_json(done, outcome)
    return outcome | {"missed": missed(run.target, outcome)}


@dataclass(frozen=True)
class Built:
    """A bundle in the work folder, judged: how it answers, and what is known of it but time and memory."""

    bundle: Path
    reply: Callable[[Any], list[Any]]
    outcome: dict[str, Any]


def rounding(model: Model, plan: Plan) -> Plan:
    """The plan that gives the same integers: without the tuning that follows, where both observe the same samples."""
    if model.family.group > 1:  # here only a plan that teaches observes all, see `plan_batches`
        return plan
    return replace(plan, steps=tuple(s for s in plan.steps if TECHNIQUES[s.technique].stage is not Stage.TUNE))


def build(run: Run, plan: Plan) -> Built:
    """Apply and deploy one plan and let the bundle answer; waves and answers of an earlier run are kept."""
    folder = run.work / plan.key[:12]
    judged = divide(run.batches)[1]
    bundle = folder / "bundle"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", plan.to_dict())  # of every plan that was tried, not only of the one that is taken
    fresh = load(run.model.source.path, trust_remote_code=run.options.trust_remote_code)
    given = plan_batches(run.model, plan, run.calibration, run.options, run.work, run.progress)
    waves = run.work / rounding(run.model, plan).key[:12] / "waves"
    records = compress_(fresh, plan, given, waves, _named(run, plan), run.work / "costs")
    whole = folder / "whole" if run.options.freeze else bundle
    if not is_bundle(whole):
        deploy(fresh, plan, records, whole, run.options.language, run.options.task)
    threads = threads_of(run.options, run.target.device)
    served = open_served(whole, threads)
    shipped = served.reply
    if run.options.freeze:
        shipped = frozen_reply(served, bundle, (run.calibration, run.evaluation), run.options.templates, threads)
        records = [r for r in records if r.part not in left_out(run.model)]
    names = old_ids(plan) if run.model.family.sides is None else None  # vectors hold no ids

    def reply(content: Any) -> list[Any]:
        tokens = shipped(content, run.options.language, _task(run))
        return tokens if names is None else [names[t] for t in tokens]

    family = run.model.family
    said = (f"{plan.name} in ONNX Runtime", run.progress)
    after = answers(run.evaluation, reply, folder / "after.jsonl", *said, family.open_input)
    found, rows = SCORES[family.task][0](run.evaluation, run.before, after, run.model.decoder(), run.languages)
    outcome = {
        "plan": plan.name, "size": open_bundle(bundle).size, "quality": asdict(found), "rows": rows[:10],
        "records": [asdict(r) for r in records], "parity": parity(fresh, served, judged[:2]),
    }  # fmt: skip
    return Built(bundle, reply, outcome)


def _task(run: Run) -> str | None:
    return run.options.task if run.model.family.detect_language else None


def _measured(run: Run) -> list[tuple[str, Sequence[str]]]:
    """The samples that the processes are measured on."""
    return [(str(s.path.resolve()), s.texts) for s in spread(run.evaluation, 3)]


def _named(run: Run, plan: Plan) -> Progress | None:
    progress = run.progress
    return None if progress is None else lambda what, i, n: progress(f"{what} by plan {plan.name}", i, n)


def _finish(
    run: Run,
    levels: list[Level],
    plans: list[Plan],
    tried: list[dict[str, Any]],
    chosen: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Put the bundle, the plan, the result and the report in place."""
    from packlight.result import assemble

    outcome, plan = chosen["outcome"], next(p for p in plans if p.name == chosen["outcome"]["plan"])
    source = run.work / plan.key[:12] / "bundle"
    draft = run.out / "bundle.part"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    shutil.rmtree(run.out / "bundle", ignore_errors=True)
    draft.rename(run.out / "bundle")
    kept = run.work / "original.json"
    if not kept.is_file():
        options = run.options
        asked = (threads_of(options, run.target.device), options.language, options.task, options.trust_remote_code)
        write_json(kept, measure("model", run.model.source.path, _measured(run), *asked))
    rungs = ladder(
        run.out / "bundle",
        outcome["parity"],
        outcome["quality"]["summary"],
        outcome["quality"]["name"],
        run.evaluation.n,
    )
    result = assemble(
        run=run, levels=levels, plans=plans, tried=tried, chosen=chosen,
        extra={"original": json.loads(kept.read_text()), "ladder": rungs, "how": circumstances(run, seconds),
               "profile": profile(run.model)},
    )  # fmt: skip
    if run.options.freeze:
        result["model"]["usage"] = result["model"]["usage"].rpartition(" ")[0]  # no words to look for
    write_json(run.out / "plan.json", plan.to_dict())
    write_json(run.out / "result.json", result)
    write_report(result, run.out / "report.html")
    return result


def circumstances(run: Run, seconds: float) -> dict[str, Any]:
    """On what and with what a result was measured."""
    return {
        "machine": machine(), "threads": threads_of(run.options, run.target.device), "os": platform.platform(),
        "python": platform.python_version(), "versions": versions(), "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
