"""The pictures of the report, as SVG strings, drawn with `report_svg`."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from packlight.report_svg import (
    across,
    at_log,
    colours,
    decades,
    line,
    linear_ticks,
    log_rows,
    power_of_ten,
    say,
    size_axis,
    svg,
    tight,
    tipped,
)
from packlight.report_text import Words, named, number, percent, ratio, small, text
from packlight.target import format_bytes

_LEVELS = 88  # pixels for the names of levels


# --- Pareto front ---


def front_chart(points: Sequence[dict[str, Any]], limit: float | None, w: Words) -> str:
    """Bytes across, KL on a log axis, the chosen and the measured points marked, a line at the target.

    Args:
        points: rows of the result's 'front'; those without bytes or KL are left out.
        limit: the target in bytes, or None.
        w: the words of one language.

    Returns:
        SVG, or '' when fewer than two points can be drawn.
    """
    drawn = sorted(
        (p for p in points if (number(p.get("bytes")) or 0) > 0 and (number(p.get("kl")) or 0) > 0),
        key=lambda p: p["bytes"],
    )
    if len(drawn) < 2:
        return ""
    height, sizes = 320, [float(p["bytes"]) for p in drawn]
    sizes += [size for p in drawn if (size := _measured(p)) is not None] + ([limit] if limit else [])
    pad = 0.06 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    low, high = max(min(sizes) - pad, 0.0), max(sizes) + pad
    span, clipped = _without_outlier([p["kl"] for p in drawn])

    def x(size: float) -> float:
        return (size - low) / (high - low)

    def y(kl: float) -> float:
        return height * (1 - at_log(kl, span))

    body = log_rows(span, height, clipped=clipped) + size_axis(low, high, height, w)
    if limit:
        side = ("end", -8) if x(limit) > 0.6 else ("start", 8)
        said = f"{w['target']} {w['at_most'].format(value=format_bytes(limit))}"
        body += line(across(x(limit)), 0, across(x(limit)), height, "target")
        body += say(across(x(limit)), 14, said, side[0], "target", side[1])
    for a, b in pairwise(drawn):
        body += line(across(x(a["bytes"])), y(a["kl"]), across(x(b["bytes"])), y(b["kl"]), "front")
    for p in sorted(drawn, key=lambda p: bool(p.get("chosen"))):
        body += _front_point(p, x, y(p["kl"]), w)
    return svg(body, f"{w['front']}{w['colon']}{w['front.lead']}", height, 58, 14)


def _without_outlier(values: Sequence[float]) -> tuple[tuple[float, float], bool]:
    """The span of the values, and whether its lower end is above the lowest.

    A plan without loss stands many decades below the others, which would lie in a corner if its own were shown.
    """
    least, second = sorted(values)[:2]
    floor = 10.0 ** math.floor(math.log10(second / 10))
    return tight([max(v, floor) for v in values]), least < floor


def _measured(point: dict[str, Any]) -> float | None:
    measured = point.get("measured")
    return number(measured.get("size")) if isinstance(measured, dict) else None


def _front_point(point: dict[str, Any], x: Any, y: float, w: Words) -> str:
    size, chosen, plan = _measured(point), bool(point.get("chosen")), text(point.get("plan"))
    known = isinstance(point.get("measured"), dict)
    place = x(size if size is not None else point["bytes"])
    tip = [plan, f"{w['predicted']} {format_bytes(point['bytes'])}", f"KL {small(point['kl'])}"]
    if size is not None:
        tip.append(f"{w['measured']} {format_bytes(size)}")
    body = ""
    if size is not None:
        body += line(across(x(point["bytes"])), y, across(place), y, "lead")
    style = "chosen" if chosen else "measured" if known else "predicted"
    if chosen:
        body += f'<circle cx="{across(place)}" cy="{y:.1f}" r="12" class="halo"/>'
    body += f'<circle cx="{across(place)}" cy="{y:.1f}" r="{6 if chosen else 4.5}" class="{style}"/>'
    if chosen or known:
        # A front falls to the right, so below and to the left of its points is free.
        left = place > 0.2
        said = f"{plan} {w['chosen']}" if chosen else plan
        if left:
            body += say(across(place), y + 18, said, "end", style, -9)
        else:
            body += say(across(place), y - 10, said, "start", style, 6)
    return tipped(body, " · ".join(filter(None, tip)))


# --- where the bytes are ---


def parts_chart(parts: Sequence[dict[str, Any]], w: Words) -> str:
    """Three stacked bars: the original, the bundle at the same scale, the bundle enlarged to full width.

    Args:
        parts: rows of the result's 'parts' with 'name', 'before' and 'after' in bytes.
        w: the words of one language.

    Returns:
        SVG, or '' when there are no bytes to draw.
    """
    before = [max(number(p.get("before")) or 0.0, 0.0) for p in parts]
    after = [max(number(p.get("after")) or 0.0, 0.0) for p in parts]
    whole = max(sum(before), sum(after))
    if not whole:
        return ""
    names = [text(p.get("name")) for p in parts]
    body = say("0%", 12, f"{w['before']} {format_bytes(sum(before))}", style="strong")
    body += _stack(names, before, whole, 20, w)
    body += say("0%", 84, f"{w['after']} {format_bytes(sum(after))}", style="strong")
    body += _stack(names, after, whole, 92, w)
    share = sum(after) / whole
    if not 0 < share < 0.9:
        return svg(body, w["parts"], 130)
    wedge = f"0,0 {100 * share:.2f},0 100,100 0,100"
    body += '<svg x="0" y="126" width="100%" height="34" viewBox="0 0 100 100" preserveAspectRatio="none">'
    body += f'<polygon points="{wedge}" class="wedge"/></svg>' + _stack(names, after, sum(after), 160, w)
    body += say("100%", 212, w["enlarged"].format(ratio=ratio(1 / share)), "end", "quiet")
    return svg(body, f"{w['parts']}{w['colon']}{w['parts.lead']}", 216)


def _stack(names: Sequence[str], values: Sequence[float], whole: float, y: int, w: Words) -> str:
    body, start, colour = "", 0.0, colours(names)
    for name, value in zip(names, values, strict=True):
        width = value / whole
        tip = f"{named(w, name)} · {format_bytes(value)} · {percent(value / (sum(values) or 1))}"
        bar = f'<rect x="{across(start)}" y="{y}" width="{across(width)}" height="34" class="c{colour[name]}"/>'
        body += tipped(bar, tip, "cut")
        start += width
    return body


# --- sensitivity ---


def sensitivity_chart(entries: Sequence[dict[str, Any]], w: Words) -> str:
    """One line per part and level, from the left edge to its KL on a log axis.

    Args:
        entries: rows of the result's 'sensitivity' with 'part', 'level' and 'kl'.
        w: the words of one language.

    Returns:
        SVG, or '' when nothing can be drawn.
    """
    drawn = [e for e in entries if number(e.get("kl")) is not None]
    if not drawn:
        return ""
    span = decades([e["kl"] for e in drawn])
    by_part: dict[str, list[dict[str, Any]]] = {}
    for e in drawn:
        by_part.setdefault(text(e.get("part")), []).append(e)
    y, body = 0.0, ""
    for part, levels in by_part.items():
        y += 26
        body += say("0%", y, named(w, part), style="strong", shift=-_LEVELS)
        for e in levels:
            y += 20
            body += _sensitivity_row(e, part, y, at_log(e["kl"], span), w)
        y += 8
    grid = ""
    for exponent in range(span[0], span[1] + 1):
        place = across((exponent - span[0]) / (span[1] - span[0]))
        grid += line(place, 6, place, y, "grid") + say(place, y + 18, power_of_ten(exponent), "middle")
    grid += say("100%", y + 40, w["kl"], "end", "quiet")
    return svg(grid + body, f"{w['sensitivity']}{w['colon']}{w['sensitivity.lead']}", int(y), _LEVELS, 58)


def _sensitivity_row(entry: dict[str, Any], part: str, y: float, place: float, w: Words) -> str:
    flips, level = number(entry.get("flips")), text(entry.get("level"))
    tip = [named(w, part), _level(level, w), f"KL {small(entry['kl'])}"]
    size = number(entry.get("bytes"))
    if size is not None:
        tip.append(format_bytes(size))
    if flips is not None:
        tip.append(w["flips"].format(value=percent(flips)))
    bar = say("0%", y, _level(level, w), "end", "", -10)
    bar += f'<rect x="0" y="{y - 8:.1f}" width="{across(place)}" height="8" rx="1" class="bar"/>'
    return tipped(bar + say(across(place), y, small(entry["kl"]), "start", "quiet", 8), " · ".join(tip))


def _level(level: str, w: Words) -> str:
    bits = level.removesuffix(" bits")
    return w["bits"].format(n=bits) if bits != level else named(w, level)


# --- layers ---


def layers_chart(entries: Sequence[dict[str, Any]], colour: dict[str, int], w: Words) -> str:
    """A column per layer: its bits per weight above, its relative output error on a log axis below.

    Args:
        entries: rows of the result's 'layers', in the order of the model.
        colour: a colour number per part, as `colours` gives.
        w: the words of one language.

    Returns:
        SVG, or '' when no layer has a rate or a distortion.
    """
    rates = [max(number(e.get("rate")) or 0.0, 0.0) for e in entries]
    errors = [max(number(e.get("distortion")) or 0.0, 0.0) for e in entries]
    body, top = "", 24.0
    if any(rates):
        high = max(rates) * 1.05
        body += say("0%", top - 12, w["rate.axis"], style="quiet", shift=-52)
        for tick in linear_ticks(0, high):
            y = top + 110 * (1 - tick / high)
            body += line("0%", y, "100%", y, "grid") + say("0%", y + 4, f"{tick:g}", "end", "", -10)
        body += _columns(entries, [r / high for r in rates], top, 110, colour, w)
        top += 110 + 44
    if any(errors):
        span = decades(errors)
        body += say("0%", top - 12, w["distortion.axis"], style="quiet", shift=-52)
        body += log_rows(span, 130, top)
        body += _columns(entries, [at_log(e, span) for e in errors], top, 130, colour, w)
        top += 130 + 44
    return svg(body, f"{w['layers']}{w['colon']}{w['layers.lead']}", int(top) - 40, 52, 2) if body else ""


def _columns(
    entries: Sequence[dict[str, Any]],
    heights: Sequence[float],
    top: float,
    tall: float,
    colour: dict[str, int],
    w: Words,
) -> str:
    body = ""
    for i, (e, height) in enumerate(zip(entries, heights, strict=True)):
        part, rate, error = text(e.get("part")), number(e.get("rate")), number(e.get("distortion"))
        tip = [text(e.get("path")), named(w, part), text(e.get("technique"))]
        if rate is not None:
            tip.append(f"{rate:.2f} {w['rate.axis']}")
        if error is not None:
            tip.append(f"{w['distortion']} {small(error)}")
        place = f'x="{across((i + 0.12) / len(entries))}" width="{across(0.76 / len(entries))}"'
        size = f'y="{top + tall * (1 - height):.1f}" height="{max(tall * height, 1):.1f}"'
        body += tipped(f'<rect {place} {size} class="c{colour.get(part, 0)}"/>', " · ".join(filter(None, tip)))
    return body


# --- small pictures inside the cards ---


def gauge(before: float | None, after: float, limit: float | None, label: str) -> str:
    """A bar of what is left of the original, with a tick at the limit. The original is full width."""
    whole = max(before or 0.0, after, limit or 0.0)
    if whole <= 0:
        return ""
    body = '<rect x="0" y="8" width="100%" height="6" rx="3" class="rail"/>'
    if before:
        body += f'<rect x="0" y="8" width="{across(before / whole)}" height="6" rx="3" class="was"/>'
    body += f'<rect x="0" y="8" width="{across(after / whole)}" height="6" rx="3" class="now"/>'
    if limit:
        body += line(across(limit / whole), 3, across(limit / whole), 19, "tick")
    return svg(body, label, 22)


def interval_chart(low: float | None, middle: float, high: float | None, limit: float | None, label: str) -> str:
    """The estimate with its interval on a line through zero, with a tick at the limit. All in ratios."""
    marks = [v for v in (low, middle, high, limit, 0.0) if v is not None]
    start, reach = min(marks), (max(marks) - min(marks)) or 1.0

    def x(value: float) -> str:
        return across(0.03 + 0.94 * (value - start) / reach)

    body = line("0%", 11, "100%", 11, "rail-line") + line(x(0), 5, x(0), 17, "zero")
    if low is not None and high is not None:
        body += line(x(low), 11, x(high), 11, "span")
    if limit is not None:
        body += line(x(limit), 3, x(limit), 19, "tick")
    return svg(body + f'<circle cx="{x(middle)}" cy="11" r="5" class="now"/>', label, 22)
