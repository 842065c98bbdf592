"""The command line: parse, call, print. Everything it does can be done from Python with the same names."""

import inspect as signatures
import json
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from packlight import __version__
from packlight.cli_web import web
from packlight.errors import DataError, TargetError
from packlight.target import Target, format_bytes, format_seconds, parse_bytes, parse_drop, parse_seconds
from packlight.terminal import goes_on, progress_bar, sentence

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fit a multimodal model to the device it must run on: size, speed, quality, measured in the runtime that ships.",
)
app.command()(web)

# readable=False: what can't be read is our sentence, not typer's.
Folder = Annotated[Path, typer.Argument(readable=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Data = Annotated[
    Path, typer.Option("--data", readable=False, help="Folder or .jsonl manifest with samples and transcripts.")
]
Calibration = Annotated[
    Path | None, typer.Option(readable=False, help="Calibration samples; without it --data is divided.")
]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0 for all cores.")]
Language = Annotated[
    str | None,
    typer.Option(help="Language code of a multilingual model; else it is detected. In fit, also of texts to compare."),
]
Task = Annotated[str | None, typer.Option(help="transcribe or translate.")]
Templates = Annotated[
    list[str] | None,
    typer.Option("--template", help="What labels are asked with: 'a photo of a {}.'; may be repeated."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Accept Python code that the model brings.")]


class _Stopped(BaseException):
    """Ctrl-C. Not KeyboardInterrupt, which typer would answer by itself, without a word."""


def main() -> None:
    """Entry point: an error that the user can mend is one sentence on stderr and exit status 2; Ctrl-C gives 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        app()
    except _Stopped:
        typer.echo(f"\npacklight: stopped.{goes_on()}", err=True)
        sys.exit(130)
    except Exception as error:
        said = sentence(error)
        if not said:
            raise
        typer.echo(f"packlight: {said}", err=True)
        sys.exit(2)


def _stop(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: what ends now ends in order
    raise _Stopped


def _asking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say how a model is asked, which reach it as one `asked`."""
    options = (("language", Language, None), ("task", Task, None), ("threads", Threads, 0),
               ("trust_remote_code", Trust, False), ("template", Templates, None), ("as_json", Json, False))  # fmt: skip
    shared = [
        signatures.Parameter(name, signatures.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in options
    ]
    own = [p for p in signatures.signature(command).parameters.values() if p.name not in ("asked", "as_json")]

    def run(**values: Any) -> None:
        from packlight.evaluate import Asked

        as_json = values.pop("as_json")
        templates = tuple(values.pop("template") or ())
        named = {p.name: values.pop(p.name) for p in shared if p.name not in ("as_json", "template")}
        asked = Asked(**named, templates=templates)
        command(asked=asked, as_json=as_json, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    signature = signatures.Signature([*own, *shared])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return run


def _version(show: bool) -> None:
    if show:
        typer.echo(f"packlight {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


def _say(values: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, indent=1) if as_json else text)


def _quiet_libraries() -> None:
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@app.command()
def inspect(
    model: str,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer's path.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show a model's parts, parameters, bytes, multiply-adds, licence, and what can be done with it."""
    _quiet_libraries()
    from packlight.inspecting import describe_model, describe_text

    found = describe_model(model, trust_remote_code)
    _say(found, as_json, describe_text(found, layers))


@app.command()
@_asking
def fit(
    model: str,
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path("out"),
    calibration: Calibration = None,
    max_size: Annotated[str | None, typer.Option(help="Bytes of the whole folder, e.g. 12MB or 12MiB.")] = None,
    max_drop: Annotated[str | None, typer.Option(help="Allowed loss of the metric: 0.5pp, or 2% of it.")] = None,
    max_latency: Annotated[str | None, typer.Option(help="Median seconds per sample, e.g. 300ms.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Peak memory of a process, e.g. 250MB.")] = None,
    device: Annotated[str, typer.Option(help="local, two-core, pi4, pi5 or phone.")] = "local",
    strict: Annotated[bool, typer.Option("--strict", help="The interval's upper end must keep the drop too.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    texts: Annotated[Path | None, typer.Option(help="Texts that the model is to write well.")] = None,
    keep_vocabulary: Annotated[bool, typer.Option("--keep-vocabulary", help="Never prune the vocabulary.")] = False,
    freeze: Annotated[bool, typer.Option("--freeze", help="Ship the data's classes, no text tower.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="Measure the curve of size against quality instead.")] = False,
    points: Annotated[int | None, typer.Option(min=1, help="Points of the sweep; 6 when not said.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="A plan of the sweep whose bundle is to stay.")] = None,
    *,
    asked: Any,
    as_json: bool,
) -> None:
    """Fit a model to a target and prove it, or --sweep the whole curve. Exit status 0: met; 3: not met; 2: wrong input."""
    drop, relative = parse_drop(max_drop) if max_drop else (None, None)
    target = Target(
        size=parse_bytes(max_size) if max_size else None,
        latency=parse_seconds(max_latency) if max_latency else None,
        memory=parse_bytes(max_memory, "memory") if max_memory else None,
        drop=drop,
        drop_relative=relative,
        device=device,
        strict=strict,
    )
    if not sweep and (points or keep):
        raise TargetError("--points and --keep belong to --sweep. Add it, or leave them out.")
    _quiet_libraries()
    options = replace(
        _options(asked, calibration, seed), texts=texts, prune_vocabulary=not keep_vocabulary, freeze=freeze
    )
    if sweep:
        from packlight.sweeping import SweepOptions, sweep_text
        from packlight.sweeping import sweep as run_sweep

        wanted = SweepOptions(keep=tuple(keep or ()), **({"points": points} if points else {}))
        swept = run_sweep(model, data, target, out, options, wanted, progress_bar(as_json))
        _say(swept.result, as_json, sweep_text(swept.result, out))
        return
    from packlight.fitting import fit as run
    from packlight.verdict import verdict_text

    found = run(model, data, target, out, options, progress_bar(as_json))
    _say(found.result, as_json, verdict_text(found.result, out))
    raise typer.Exit(0 if found.met else 3)


def _options(asked: Any, calibration: Path | None, seed: int) -> Any:
    """What `fit` and `apply` are told, with the command line for the report."""
    from packlight.applying import Options

    command = "packlight " + shlex.join(sys.argv[1:])
    task = asked.task or "transcribe"
    how = (asked.threads, seed, asked.trust_remote_code, command)
    return Options(calibration, asked.language, task, *how, templates=asked.templates)


@app.command()
@_asking
def apply(
    model: str,
    plan: Annotated[Path, typer.Argument(readable=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder that gets bundle/.")],
    data: Annotated[Path | None, typer.Option(readable=False, help="The samples that the fit was given.")] = None,
    calibration: Calibration = None,
    *,
    asked: Any,
    as_json: bool,
) -> None:
    """Run a plan: repeat a fit exactly, or a plan written by hand."""
    from packlight.plan import read_plan

    steps = read_plan(plan)
    _quiet_libraries()
    from packlight.applying import apply as run

    bundle = run(model, steps, data, out, _options(asked, calibration, steps.seed), progress_bar(as_json))
    from packlight.bundle import open_bundle

    size = open_bundle(bundle).size
    _say({"bundle": str(bundle), "size": size}, as_json, f"{bundle}   {format_bytes(size)}")


@app.command()
@_asking
def distill(
    model: str,
    student: Annotated[Path, typer.Option(readable=False, help="JSON: which blocks, units and heads stay.")],
    calibration: Annotated[Path, typer.Option(readable=False, help="Samples to teach with; no transcripts needed.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the student, as transformers writes it.")],
    *,
    asked: Any,
    as_json: bool,
) -> None:
    """Make a smaller model: cut a student out of a model and let the model teach it."""
    _quiet_libraries()
    from packlight import teaching

    found = teaching.distill(model, student, _options(asked, calibration, 0), out, progress_bar(as_json))
    _say(found, as_json, teaching.distill_text(found, out))


@app.command()
def run(
    bundle: Folder,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Audio files: FLAC, WAV, OGG or MP3. Or words, with --images or --sounds."),
    ] = None,
    images: Annotated[Path | None, typer.Option(readable=False, help="Pictures to search or sort.")] = None,
    sounds: Annotated[Path | None, typer.Option(readable=False, help="Recordings to search or sort.")] = None,
    labels: Annotated[str | None, typer.Option(help="Classes: cat,dog or a file with one per line.")] = None,
    template: Templates = None,
    top: Annotated[int, typer.Option(min=1, help="Answers to name.")] = 5,
    language: Language = None,
    task: Task = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Transcribe files, rank pictures or sounds for words, or sort them into classes. Needs no PyTorch."""
    from packlight.answering import Question, ask, labels_of
    from packlight.serve import open_served

    named = labels_of(labels) if labels else ()
    question = Question(tuple(inputs or ()), images, sounds, named, tuple(template or ()), top, language, task)
    rows, failed = [], False
    for row, line in ask(open_served(bundle, threads), question):
        if row is None:
            failed = True
            typer.echo(f"packlight: {line}", err=True)
            continue
        rows.append(row)
        if not as_json:
            typer.echo(line)
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
    raise typer.Exit(2 if failed else 0)


@app.command()
def freeze(
    bundle: Folder,
    labels: Annotated[str, typer.Option(help="Classes: cat,dog or a file with one per line.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the new bundle.")],
    template: Templates = None,
    as_json: Json = False,
) -> None:
    """Of a bundle for pictures and text keep the pictures' side and a fixed list of classes. Needs no PyTorch."""
    from packlight.answering import labels_of
    from packlight.freezing import freeze as run
    from packlight.serve import open_served

    made = run(open_served(bundle), labels_of(labels), out, tuple(template or ()))
    _say({"bundle": str(out), "size": made.size}, as_json, f"{out}   {format_bytes(made.size)}")


@app.command()
def unpack(
    bundle: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the model.")],
    as_json: Json = False,
) -> None:
    """Write a bundle's model as a folder with float weights, as its original was, where its config can say what it is."""
    _quiet_libraries()
    from packlight.unpacking import unpack as run
    from packlight.unpacking import unpacked_text

    found = run(bundle, out)
    _say({"model": str(out), "size": found.bytes, "differs": list(found.differs)}, as_json, unpacked_text(found))


@app.command()
def verify(bundle: Folder, as_json: Json = False) -> None:
    """Check a bundle: every file's sha256, and that its graphs load and answer."""
    from packlight.serve import open_served

    served = open_served(bundle, 0)
    served.answer(served.example, None, None)
    files, size, load = len(served.bundle.manifest["files"]), served.bundle.size, served.load_seconds
    found = {"bundle": str(bundle), "files": files, "size": size, "load": load, "ok": True}
    text = f"{bundle} is whole: {files} files, {format_bytes(size)}; loaded in {format_seconds(load)} and answered."
    _say(found, as_json, text)


@app.command()
@_asking
def bench(
    bundle: Folder,
    data: Annotated[Path | None, typer.Option(readable=False, help="Samples to time on; else 10 s of noise.")] = None,
    against: Annotated[str | None, typer.Option(help="A model to time in the same run, sample by sample.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time goes, and with how many threads.")
    ] = False,
    *,
    asked: Any,
    as_json: bool,
) -> None:
    """Seconds, memory and load time of a bundle, alone or against a model in one interleaved run; or where time goes."""
    from packlight.benching import bench_or_profile

    if against:
        _quiet_libraries()
    found, text = bench_or_profile(bundle, data, against, asked, profile, progress_bar(as_json))
    _say(found, as_json, text)


@app.command("eval")
@_asking
def evaluate(model_or_bundle: str, data: Data, *, asked: Any, as_json: bool) -> None:
    """The task's metric of a model or a bundle on your samples, with a 95 % interval."""
    from packlight.bundle import is_bundle

    if not is_bundle(Path(model_or_bundle)):
        _quiet_libraries()
    from packlight.benching import evaluate_one, evaluate_text

    found = evaluate_one(model_or_bundle, data, asked, progress_bar(as_json))
    _say(found, as_json, evaluate_text(found))


@app.command()
def report(out: Path, as_json: Json = False) -> None:
    """Write OUT/report.html again from OUT/result.json, or from OUT/sweep.json where that is newer."""
    from packlight.report import write_report
    from packlight.report_sweep import write_sweep_report

    fitted, swept = out / "result.json", out / "sweep.json"
    newer = swept.is_file() and not (fitted.is_file() and fitted.stat().st_mtime >= swept.stat().st_mtime)
    file = swept if newer else fitted
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} can't be read ({error}). `packlight fit` writes it.") from None
    (write_sweep_report if newer else write_report)(result, out / "report.html")
    _say({"report": str(out / "report.html")}, as_json, str(out / "report.html"))
