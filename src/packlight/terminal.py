"""Progress on a terminal."""

import sys
import time
from collections.abc import Callable
from typing import Any

import typer

from packlight.target import format_seconds


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
        line = f"{what}: {done}/{total}, {format_seconds(left)} left"
        if terminal:
            typer.echo(f"\r\x1b[K{line}" + ("\n" if done == total else ""), err=True, nl=False)
        elif tenth != state["tenth"] and (done == 1 or done == total or tenth % 5 == 0):
            typer.echo(line, err=True)
        state["tenth"] = tenth

    return show
