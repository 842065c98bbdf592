"""What the pictures of the report are drawn with: shapes and axes, as SVG strings.

A chart has no viewBox: its box is the plot area, positions across are percentages and text keeps its size, so
one picture serves a phone and a desk. Labels stand in the margins, outside the box; the page's style sheet
gives the box those margins from `--left` and `--right`, and all colours.
"""

import math
from collections.abc import Sequence
from html import escape

from packlight.report_text import Words, superscript

COLOURS = 8  # the style sheet has c0 to c7


def across(value: float) -> str:
    """A position 0..1 as a percentage of the plot's width."""
    return f"{100 * value:.2f}%"


def svg(body: str, label: str, height: int, left: int = 0, right: int = 0) -> str:
    """A chart of that height, with margins in pixels for what stands beside it."""
    box = f"height:{height}px;--left:{left}px;--right:{right}px"
    return f'<svg class="chart" role="img" aria-label="{escape(label)}" style="{box}">{body}</svg>'


def say(x: str, y: float, words: str, anchor: str = "start", style: str = "", shift: int = 0) -> str:
    """Words at a place across and down."""
    move = f' dx="{shift}"' if shift else ""
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x}" y="{y:.1f}" text-anchor="{anchor}"{move}{kind}>{escape(words)}</text>'


def line(x1: str, y1: float, x2: str, y2: float, style: str) -> str:
    """A straight line."""
    return f'<line x1="{x1}" y1="{y1:.1f}" x2="{x2}" y2="{y2:.1f}" class="{style}"/>'


def tipped(body: str, tip: str, style: str = "") -> str:
    """Shapes that say `tip` when pointed at."""
    return f'<g class="tip {style}"><title>{escape(tip)}</title>{body}</g>'


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most`, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Exponents of the powers of ten that enclose the values above zero; at least one decade."""
    above = [v for v in values if v > 0]
    if not above:
        return -1, 0
    low = math.floor(math.log10(min(above)) + 1e-9)
    return low, max(math.ceil(math.log10(max(above)) - 1e-9), low + 1)


def tight(values: Sequence[float]) -> tuple[float, float]:
    """Exponents that enclose the values, all above zero, at 1, 2 or 5 times a power of ten."""
    low, high = (math.floor(math.log10(v)) for v in (min(values), max(values)))
    below = max(m for m in (1, 2, 5) if m * 10.0**low <= min(values) * (1 + 1e-9))
    above = min(m for m in (1, 2, 5, 10) if m * 10.0**high >= max(values) * (1 - 1e-9))
    ends = low + math.log10(below), high + math.log10(above)
    return ends if ends[1] > ends[0] else (ends[0] - 0.5, ends[1] + 0.5)


def at_log(value: float, span: tuple[float, float]) -> float:
    """Where a value stands on a log axis: 0 at the lower end (and for zero), 1 at the upper end."""
    if value <= 0:
        return 0.0
    return min(max((math.log10(value) - span[0]) / (span[1] - span[0]), 0.0), 1.0)


def power_of_ten(exponent: int) -> str:
    """0.001 for -3; below it 10⁻⁴, which is shorter."""
    return f"{10.0**exponent:g}" if -3 <= exponent <= 4 else f"10{superscript(exponent)}"


def colours(names: Sequence[str]) -> dict[str, int]:
    """A colour number per name, in order of appearance."""
    return {name: i % COLOURS for i, name in enumerate(dict.fromkeys(names))}


def unit_of(largest: float) -> tuple[str, float]:
    """The unit, and its bytes, in which an axis up to `largest` bytes is written."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if largest >= scale:
            return unit, scale
    return "B", 1.0


def log_rows(span: tuple[float, float], height: float, top: float = 0, clipped: bool = False) -> str:
    """Grid lines and their labels at powers of ten."""
    body = ""
    for exponent in range(math.ceil(span[0] - 1e-9), math.floor(span[1] + 1e-9) + 1):
        y = top + height * (1 - (exponent - span[0]) / (span[1] - span[0]))
        said = ("≤ " if clipped and exponent <= span[0] + 1e-9 else "") + power_of_ten(exponent)
        body += line("0%", y, "100%", y, "grid") + say("0%", y + 4, said, "end", "", -10)
    return body


def size_axis(low: float, high: float, height: float, w: Words) -> str:
    """Ticks and a title below a chart whose width stands for bytes."""
    unit, scale = unit_of(high)
    body = ""
    for tick in linear_ticks(low / scale, high / scale):
        place = across((tick * scale - low) / (high - low))
        body += line(place, height, place, height + 5, "axis") + say(place, height + 21, f"{tick:g}", "middle")
    return body + say("100%", height + 42, w["size.axis"].format(unit=unit), "end", "quiet")
