"""The few pieces of HTML that the report is made of. Arguments named `said` are plain text, escaped here."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from packlight.report_text import Words, number


def p(said: str, style: str = "") -> str:
    """A paragraph, or '' when there is nothing to say."""
    return f'<p class="{style}">{escape(said)}</p>' if said else ""


def section(w: Words, key: str, body: str, lead: str = "") -> str:
    """A section under the heading `w[key]`, or '' when its body (HTML) is empty."""
    if not body:
        return ""
    return f'<section class="{key.replace(".", "-")}"><h2>{escape(w[key])}</h2>{p(lead, "lead")}{body}</section>'


def table(head: Sequence[str], body: Sequence[Sequence[str]], style: str = "", foot: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already. On a phone a 'stack' table has each cell under its heading."""
    if not body:
        return ""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)

    def line(cells: Sequence[str]) -> str:
        said = zip(head, cells, strict=True)
        return "<tr>" + "".join(f'<td data-label="{escape(h)}">{cell}</td>' for h, cell in said) + "</tr>"

    end = f"<tfoot>{line(foot)}</tfoot>" if foot else ""
    rest = f"<thead><tr>{top}</tr></thead><tbody>{''.join(map(line, body))}</tbody>{end}"
    return f'<div class="scroll"><table class="{style}">{rest}</table></div>'


def fold(summary: str, body: str) -> str:
    """HTML that waits behind a click on its summary."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def code(said: str) -> str:
    """A name or a command, in the face of code."""
    return f"<code>{escape(said)}</code>" if said else ""


def maybe(value: Any, show: Callable[[float], str]) -> str:
    """A number through `show`, escaped; a dash where there is none."""
    found = number(value)
    return "–" if found is None else escape(show(found))


def pairs(said: Sequence[tuple[str, str]], style: str) -> str:
    """Names with values that are HTML already."""
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in said if v)
    return f'<dl class="{style}">{shown}</dl>' if shown else ""
