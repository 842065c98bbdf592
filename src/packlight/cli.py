"""The command line: parse, call, print. Everything it does can be done from Python with the same names."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from packlight import __version__
from packlight.errors import DataError, PacklightError, RuntimeMissing
from packlight.target import Target, format_bytes, format_seconds, parse_bytes, parse_drop, parse_seconds

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fit a multimodal model to the device it must run on: size, speed, quality, measured in the runtime that ships.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Data = Annotated[Path, typer.Option("--data", help="Folder or .jsonl manifest with samples and transcripts.")]
Calibration = Annotated[Path | None, typer.Option(help="Calibration samples; without it --data is divided.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads; 0 for all cores.")]
Language = Annotated[str | None, typer.Option(help="Language code of a multilingual model; else it is detected.")]
Task = Annotated[str, typer.Option(help="transcribe or translate.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Accept Python code that the model brings.")]


def main() -> None:
    """Entry point: an error of ours is one sentence on stderr and exit status 2."""
    try:
        app()
    except PacklightError as error:
        typer.echo(f"packlight: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        import errno

        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        typer.echo(
            f"packlight: {error.filename or 'the disk'}: {error.strerror}. Make room or choose another folder.",
            err=True,
        )
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in (
            "torch",
            "transformers",
            "onnx",
            "onnxscript",
            "onnx_ir",
            "huggingface_hub",
        ):
            raise
        typer.echo(f"packlight: this needs {error.name}: pip install 'packlight[fit]'", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("packlight: stopped; the same command goes on from here.", err=True)
        sys.exit(130)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"packlight {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def _say(values: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, indent=1) if as_json else text)


def _bar(quiet: bool) -> Callable[[str, int, int], None]:
    """Progress with time left on stderr: one line that moves on a terminal, a line per tenth elsewhere."""
    state: dict[str, Any] = {"what": "", "start": 0.0, "tenth": -1}
    terminal = sys.stderr.isatty()

    def show(what: str, done: int, total: int) -> None:
        if quiet:
            return
        now = time.monotonic()
        if what != state["what"]:
            state.update(what=what, start=now, tenth=-1)
        left = (now - state["start"]) / max(done, 1) * (total - done)
        tenth = 10 * done // max(total, 1)
        line = f"{what}: {done}/{total}, {format_seconds(left)} left"
        if terminal:
            typer.echo(f"\r\x1b[K{line}" + ("\n" if done == total else ""), err=True, nl=False)
        elif tenth != state["tenth"] and (done == 1 or done == total or tenth % 5 == 0):
            typer.echo(line, err=True)
        state["tenth"] = tenth

    return show


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
    language: Language = None,
    task: Task = "transcribe",
    threads: Threads = 0,
    seed: int = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Fit a model to a target, prove it, and write a bundle. Exit status 0: met; 3: not; 2: wrong input."""
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
    _quiet_libraries()
    from packlight.applying import Options
    from packlight.fitting import fit as run

    command = "packlight " + shlex.join(sys.argv[1:])
    options = Options(calibration, language, task, threads, seed, trust_remote_code, command)
    found = run(model, data, target, out, options, _bar(as_json))
    _say(found.result, as_json, verdict_text(found.result, out))
    raise typer.Exit(0 if found.met else 3)


def verdict_text(result: dict[str, Any], out: Path) -> str:
    """The verdict, the table, and where to look."""
    before, after, ratios = result["before"], result["after"], result["ratios"]
    metric, target = result["metric"], result["target"]
    how = result["timing"]
    limit = {k: f"<= {f(target[k])}" if target[k] else "" for k, f in
             (("size", format_bytes), ("latency", format_seconds), ("memory", format_bytes))}  # fmt: skip
    drop = f"<= +{100 * target['drop']:.1f} pp" if target["drop"] is not None else (
        f"<= {100 * target['drop_relative']:.1f} %" if target["drop_relative"] is not None else "")  # fmt: skip
    lines = [
        result["verdict"]["headline"],
        f"{'':13}{'original':>12}{'bundle':>12}{'ratio':>10}   target",
        f"{'size':13}{format_bytes(before['size']):>12}{format_bytes(after['size']):>12}{ratios['size']:>9.1f}x   {limit['size']}",
        f"{metric['name']:13}{metric['before']:>11.1%} {metric['after']:>11.1%}{100 * metric['difference']:>+7.2f} pp   {drop}"
        f"   95 % interval [{100 * metric['low']:+.2f}, {100 * metric['high']:+.2f}], n = {metric['n']}, paired",
        f"{'latency':13}{format_seconds(before['latency']):>12}{format_seconds(after['latency']):>12}{ratios['latency']:>9.2f}x   "
        f"{limit['latency']}   ratio of sums [{ratios['latency_low']:.2f}, {ratios['latency_high']:.2f}], median of "
        f"{how['samples']}, {how['threads']} threads, {after['runtime']}",
        f"{'memory':13}{format_bytes(before['memory']):>12}{format_bytes(after['memory']):>12}{ratios['memory']:>9.1f}x   {limit['memory']}",
        f"{'load':13}{format_seconds(before['load']):>12}{format_seconds(after['load']):>12}{ratios['load']:>9.1f}x",
        f"{'energy':13}" + (f"{before['energy']:>10.1f} J{after['energy']:>10.1f} J" if after["energy"] and before["energy"] else
                            "not measured: this machine reports none"),
        f"{'tokens':13}{metric['token_agreement']:.1%} as the original's, {metric['identical']:.0%} of transcripts the same",
        f"{'plan':13}{result['plan']['name']}: " + "; ".join(
            f"{p['name']} {p['rate']:.2f} b" for p in result["parts"] if p["rate"] is not None),
    ]  # fmt: skip
    lines += [f"{'':13}{result['verdict']['sentence']}"]
    if result["verdict"]["nearest"]:
        lines += [
            f"{'binds':13}{result['verdict']['binding']}",
            f"{'apply':13}packlight apply MODEL {out / 'plan.json'} --data DIR -o OUT2",
        ]
    lines += [
        f"{'bundle':13}{out / 'bundle'}   packlight run {out / 'bundle'} speech.wav",
        f"{'report':13}{out / 'report.html'}",
    ]
    return "\n".join(lines)


@app.command()
def apply(
    model: str,
    plan: Path,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder that gets bundle/.")],
    data: Annotated[Path | None, typer.Option(help="The samples that the fit was given.")] = None,
    calibration: Calibration = None,
    language: Language = None,
    task: Task = "transcribe",
    threads: Threads = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Run a plan: repeat a fit exactly, or a plan written by hand."""
    from packlight.plan import read_plan

    steps = read_plan(plan)
    _quiet_libraries()
    from packlight.applying import Options
    from packlight.applying import apply as run

    options = Options(calibration, language, task, threads, steps.seed, trust_remote_code)
    bundle = run(model, steps, data, out, options, _bar(as_json))
    from packlight.bundle import open_bundle

    size = open_bundle(bundle).size
    _say({"bundle": str(bundle), "size": size}, as_json, f"{bundle}   {format_bytes(size)}")


@app.command()
def run(
    bundle: Path,
    inputs: Annotated[list[Path], typer.Argument(help="Audio files: FLAC, WAV, OGG or MP3 of any rate and length.")],
    language: Language = None,
    task: Annotated[str | None, typer.Option(help="transcribe or translate.")] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Transcribe files with a bundle. Needs no PyTorch."""
    from packlight.audio import read_audio
    from packlight.serve import open_served

    served = open_served(bundle, threads)
    rows, failed = [], False
    for file in inputs:
        try:
            start = time.perf_counter()
            found = served.answer(read_audio(file), language, task)
        except DataError as error:
            failed = True
            typer.echo(f"packlight: {error}", err=True)
            continue
        seconds = time.perf_counter() - start
        rows.append({"file": str(file), "text": found.text.strip(), "language": found.language, "seconds": seconds})
        if not as_json:
            typer.echo(f"{file}: {rows[-1]['text']}" if len(inputs) > 1 else rows[-1]["text"])
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
    raise typer.Exit(2 if failed else 0)


@app.command()
def verify(bundle: Path, as_json: Json = False) -> None:
    """Check a bundle: every file's sha256, and that its graphs load and answer."""
    import numpy as np

    from packlight.serve import open_served

    served = open_served(bundle, 0)
    served.answer(np.zeros(16000, np.float32), None, None)
    files = len(served.bundle.manifest["files"])
    found = {
        "bundle": str(bundle),
        "files": files,
        "size": served.bundle.size,
        "load": served.load_seconds,
        "ok": True,
    }
    text = f"{bundle} is whole: {files} files, {format_bytes(served.bundle.size)}; loaded in {format_seconds(served.load_seconds)} and answered."
    _say(found, as_json, text)


@app.command()
def bench(
    bundle: Path,
    data: Annotated[Path | None, typer.Option(help="Samples to time on; else 10 s of noise.")] = None,
    against: Annotated[str | None, typer.Option(help="A model to time in the same run, sample by sample.")] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Seconds, memory and load time of a bundle, alone or against a model in one interleaved run."""
    from packlight.benching import bench_bundle, bench_text

    if against:
        _quiet_libraries()
    found = bench_bundle(bundle, data, against, threads, _bar(as_json))
    _say(found, as_json, bench_text(found))


@app.command("eval")
def evaluate(
    model_or_bundle: str,
    data: Data,
    language: Language = None,
    task: Task = "transcribe",
    threads: Threads = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """The task's metric of a model or a bundle on your samples, with a 95 % interval."""
    from packlight.bundle import is_bundle

    if not is_bundle(Path(model_or_bundle)):
        _quiet_libraries()
    from packlight.benching import evaluate_one

    found = evaluate_one(model_or_bundle, data, language, task, threads, trust_remote_code, _bar(as_json))
    text = f"{found['metric']} {found['value']:.2%}   95 % interval [{found['low']:.2%}, {found['high']:.2%}], n = {found['n']}"
    _say(found, as_json, text)


@app.command()
def report(out: Path, as_json: Json = False) -> None:
    """Write OUT/report.html again from OUT/result.json."""
    from packlight.report import write_report

    file = out / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} can't be read ({error}). `packlight fit` writes it.") from None
    write_report(result, out / "report.html")
    _say({"report": str(out / "report.html")}, as_json, str(out / "report.html"))


__all__ = ["RuntimeMissing", "app", "main"]
