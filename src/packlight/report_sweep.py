"""The report of a sweep: the curve of size against quality as one page, in both languages, built like `report`."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from packlight.report import foot, how, notes, page, write_page
from packlight.report_html import code, maybe, p, section, table
from packlight.report_svg import across, at_log, line, linear_ticks, log_rows, say, svg, tight, tipped, unit_of
from packlight.report_text import Words, group, number, percent, ratio, rows, signed, small, text
from packlight.report_verdict import asked
from packlight.target import format_bytes

_TALL, _BETWEEN, _LOW = 260, 56, 150  # pixels: the differences, what is between, the predicted KL
_APART = 0.09  # of the width: names of points that are closer would overlap
_LINEAR = 0.01  # differences up to a percentage point are drawn to scale, larger ones by their logarithm
_TICKS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_SIZES = tuple(m * 10.0**e for e in range(3, 12) for m in (1, 1.5, 2, 3, 5, 7))


def write_sweep_report(result: dict[str, Any], path: Path) -> None:
    """Write the page of a sweep.

    Args:
        result: what `packlight fit --sweep` writes as sweep.json; any field may be missing or None.
        path: the file to write, e.g. OUT/report.html.

    Raises:
        DataError: the result is no object, or is newer than this packlight.
    """
    write_page(page(result, _body), path)


def _body(result: dict[str, Any], w: Words) -> str:
    return "\n".join(filter(None, (part(result, w) for part in (_head, _curve, _points, how, notes, foot))))


def _head(result: dict[str, Any], w: Words) -> str:
    model, metric = group(result.get("model")), group(result.get("metric"))
    top = p(" · ".join(filter(None, (text(model.get(key)) for key in ("source", "family")))), "eyebrow")
    size, before = number(group(result.get("before")).get("size")), number(metric.get("before"))
    name = text(metric.get("name")) or w["metric"]
    said = [w["sweep.original"].format(size=format_bytes(size), metric=name, value=percent(before))] if (
        size is not None and before is not None) else []  # fmt: skip
    within = [r for r in rows(result.get("points")) if r.get("within") is True and number(r.get("size"))]
    if within:
        least = min(within, key=lambda r: float(r["size"]))
        said.append(w["sweep.within"].format(plan=text(least.get("plan")), size=format_bytes(least["size"])))
    elif any(r.get("within") is False for r in rows(result.get("points"))):
        said.append(w["sweep.none"])
    wanted = asked(result, w)
    more = p(f"{w['asked']}{w['colon']}{wanted}", "after quiet") if wanted.count("·") > 1 else ""
    body = f"<h1>{escape(w['sweep'])}</h1>" + p((" " if w["stop"] == "." else "").join(said), "sentence") + more
    return f'<header class="verdict curve">{top}{body}</header>'


def _curve(result: dict[str, Any], w: Words) -> str:
    name = text(group(result.get("metric")).get("name")) or w["metric"]
    chart = sweep_chart(rows(result.get("points")), rows(result.get("front")), name, w)
    keys = "".join(f'<li><i class="dot {key}"></i>{escape(w[key])}</li>' for key in ("measured", "predicted"))
    body = f'<figure class="with-axis">{chart}</figure><ul class="legend">{keys}</ul>' if chart else ""
    return section(w, "sweep.curve", body, w["sweep.lead"])


def sweep_chart(points: Sequence[dict[str, Any]], front: Sequence[dict[str, Any]], metric: str, w: Words) -> str:
    """Bytes on a log axis across; above, the measured differences with their intervals; below, the predicted KL.

    Args:
        points: rows of the sweep's 'points'; those without size or difference are left out.
        front: rows of its 'front'.
        metric: the metric's name.
        w: the words of one language.

    Returns:
        SVG, or '' when no point can be drawn.
    """
    drawn = [r for r in points if (number(r.get("size")) or 0) > 0 and number(r.get("difference")) is not None]
    curve = [r for r in front if (number(r.get("bytes")) or 0) > 0 and (number(r.get("kl")) or 0) > 0]
    if not drawn:
        return ""
    sizes = [float(r["size"]) for r in drawn] + [float(r["bytes"]) for r in curve]
    ends = math.log(min(sizes)), math.log(max(sizes))
    pad = 0.05 * (ends[1] - ends[0]) or 0.2

    def x(size: float) -> float:
        return (math.log(size) - ends[0] + pad) / (ends[1] - ends[0] + 2 * pad)

    body = say("0%", 12, w["sweep.axis"].format(metric=metric), style="quiet", shift=-58)
    body += _differences(drawn, x, 24.0, w)
    bottom = 24.0 + _TALL
    if curve:
        top = bottom + _BETWEEN
        body += say("0%", top - 12, w["kl"], style="quiet", shift=-58) + _predicted(curve, x, top, w)
        bottom = top + _LOW
    body += _sizes_below(x, (math.exp(ends[0] - pad), math.exp(ends[1] + pad)), bottom, w)
    return svg(body, f"{w['sweep']}{w['colon']}{w['sweep.lead']}", int(bottom), 58, 14)


def _bent(difference: float) -> float:
    return math.asinh(difference / _LINEAR)


def _differences(drawn: Sequence[dict[str, Any]], x: Any, top: float, w: Words) -> str:
    """The measured points, with their intervals, joined."""
    values = [v for r in drawn for key in ("difference", "low", "high") if (v := number(r.get(key))) is not None]
    low, high = min(*values, -_LINEAR), max(*values, _LINEAR)

    def y(difference: float) -> float:
        return top + _TALL * (_bent(high) - _bent(difference)) / (_bent(high) - _bent(low))

    body = ""
    for tick in sorted({*_TICKS, *(-t for t in _TICKS)}):
        if low <= tick <= high:
            style = "axis" if tick == 0 else "grid"
            body += line("0%", y(tick), "100%", y(tick), style)
            body += say("0%", y(tick) + 4, signed(tick, 0), "end", "", -10)
    for a, b in pairwise(sorted(drawn, key=lambda r: float(r["size"]))):
        ends = across(x(a["size"])), y(a["difference"]), across(x(b["size"])), y(b["difference"])
        body += line(*ends, "front")
    last = -1.0
    for r in sorted(drawn, key=lambda r: float(r["size"])):
        named = x(r["size"]) - last > _APART
        last = x(r["size"]) if named else last
        body += _point(r, x, y, named, w)
    return body


def _point(r: dict[str, Any], x: Any, y: Any, named: bool, w: Words) -> str:
    place, least, most = across(x(r["size"])), number(r.get("low")), number(r.get("high"))
    tip = [text(r.get("plan")), format_bytes(r["size"]), f"{signed(r['difference'], 2)} {w['pp']}"]
    shapes = ""
    if least is not None and most is not None:
        tip.append(f"[{signed(least, 2)}, {signed(most, 2)}]")
        shapes += line(place, y(least), place, y(most), "span")
    shapes += f'<circle cx="{place}" cy="{y(r["difference"]):.1f}" r="5" class="measured"/>'
    side = ("end", -9) if x(r["size"]) > 0.85 else ("start", 9)
    said = text(r.get("plan")) if named else ""
    shapes += say(place, y(r["difference"]) - 7, said, side[0], "measured", side[1])
    return tipped(shapes, " · ".join(filter(None, tip)))


def _predicted(curve: Sequence[dict[str, Any]], x: Any, top: float, w: Words) -> str:
    """The front's predicted KL, and which of its plans were measured."""
    span = tight([float(r["kl"]) for r in curve])

    def y(kl: float) -> float:
        return top + _LOW * (1 - at_log(kl, span))

    body = log_rows(span, _LOW, top)
    for a, b in pairwise(sorted(curve, key=lambda r: float(r["bytes"]))):
        body += line(across(x(a["bytes"])), y(a["kl"]), across(x(b["bytes"])), y(b["kl"]), "front")
    for r in curve:
        style = "measured" if r.get("measured") is True else "predicted"
        tip = [text(r.get("plan")), f"{w['predicted']} {format_bytes(r['bytes'])}", f"KL {small(r['kl'])}"]
        radius = 4.5 if style == "measured" else 2.5
        dot = f'<circle cx="{across(x(r["bytes"]))}" cy="{y(r["kl"]):.1f}" r="{radius}" class="{style}"/>'
        body += tipped(dot, " · ".join(filter(None, tip)))
    return body


def _sizes_below(x: Any, ends: tuple[float, float], height: float, w: Words) -> str:
    """Ticks at round sizes, a few, and the title of the axis."""
    unit, scale = unit_of(ends[1])
    marks = [s for s in _SIZES if ends[0] <= s <= ends[1]]
    if len(marks) < 2:
        marks = [t * scale for t in linear_ticks(ends[0] / scale, ends[1] / scale) if t > 0]
    body, last = "", -1.0
    for mark in marks:
        if x(mark) - last < 0.07:
            continue
        last = x(mark)
        place = across(last)
        body += line(place, height, place, height + 5, "axis") + say(place, height + 21, f"{mark / scale:g}", "middle")
    return body + say("100%", height + 42, w["size.axis"].format(unit=unit), "end", "quiet")


def _points(result: dict[str, Any], w: Words) -> str:
    judged = any(isinstance(r.get("within"), bool) for r in rows(result.get("points")))
    lines = []
    for r in rows(result.get("points")):
        low, high = number(r.get("low")), number(r.get("high"))
        difference = maybe(r.get("difference"), lambda d: f"{signed(d, 2)} {w['pp']}")
        if low is not None and high is not None:
            difference += f' <span class="quiet">[{signed(low, 2)}, {signed(high, 2)}]</span>'
        name = code(text(r.get("plan")))
        if r.get("bundle"):
            name += f' <b class="pick">{escape(w["sweep.kept"])}</b>'
        bits = [maybe(r.get(key), "{:.2f}".format) for key in ("rate", "gap")]
        cells = [name, maybe(r.get("size"), format_bytes), difference, maybe(r.get("after"), percent)]
        cells += [maybe(r.get("ratio"), ratio), *bits, maybe(r.get("kl"), small)]
        within = r.get("within")
        if judged:
            tone, said = ("yes", f"✓ {w['within']}") if within is True else ("no", f"✕ {w['sweep.misses']}")
            cells.append(f'<span class="{tone}">{escape(said)}</span>')
        lines.append(cells)
    metric = text(group(result.get("metric")).get("name")) or w["metric"]
    head = [w["plan_name"], w["size"], w["difference"], metric, w["smaller"], w["rate"], w["gap"], w["sweep.kl"]]
    head += [w["drop"]] if judged else []
    shown = table([h[:1].upper() + h[1:] for h in head], lines, "numbers points")
    how_to = f"{escape(w['sweep.apply'])} {code('packlight apply MODEL OUT/plans/pNN.json --data DIR -o OUT2')}"
    body = f'{shown}<p class="after quiet">{how_to}</p>'
    return section(w, "sweep.points", body if lines else "")
