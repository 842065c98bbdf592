"""What a terminal is told: progress, and errors in one sentence."""

import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import typer

from packlight.errors import PacklightError
from packlight.target import format_seconds

_FITTING = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "huggingface_hub", "accelerate")
_ADVICE = {
    errno.ENOSPC: "Make room, or choose another disk.",
    errno.EDQUOT: "Make room, or choose another disk.",
    errno.EFBIG: "Files of that size are not allowed here: raise the limit, or choose another disk.",
    errno.EACCES: "Check its permissions, or name another.",
    errno.EPERM: "Check its permissions, or name another.",
    errno.EROFS: "Nothing can be written there: choose another folder.",
}


def progress_bar(quiet: bool) -> Callable[[str, int, int], None]:
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
        known = now > state["start"]  # the first report says nothing of how long the others take
        line = f"{what}: {done}/{total}" + (f", {format_seconds(left)} left" if known else "")
        if terminal:
            typer.echo(f"\r\x1b[K{line}" + ("\n" if done == total else ""), err=True, nl=False)
        elif tenth != state["tenth"] and (done == 1 or done == total or tenth % 5 == 0):
            typer.echo(line, err=True)
        state["tenth"] = tenth

    return show


def goes_on() -> str:
    """What to add when a command that keeps what is finished stops."""
    return (
        " What is finished is kept: the same command goes on from here."
        if sys.argv[1:2] in (["fit"], ["apply"], ["distill"])
        else ""
    )


def sentence(error: Exception) -> str:
    """What to tell the user about an error, or '' when only a traceback helps."""
    if isinstance(error, PacklightError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _FITTING:
        return f"this needs {error.name}: pip install 'packlight[fit]'"
    # safetensors writes with Rust, and `shutil` copies many files: their messages have the system's number in them.
    telling = type(error).__name__ == "SafetensorError" or isinstance(error, shutil.Error)
    told = re.search(r"(?:\(os error |\[Errno )(\d+)[)\]]", str(error)) if telling else None
    number = int(told[1]) if told else error.errno if isinstance(error, OSError) else None
    if number is None:
        return ""
    where = getattr(error, "filename", None) or "a file of the results"
    return f"{where}: {os.strerror(number)}. {_ADVICE.get(number, 'Check the path.')}{goes_on()}"
