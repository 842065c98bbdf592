"""The bake-off's table, its picture, and how much smaller ours is at equal KL."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from packlight.report_charts import at_log, linear_ticks, tight

LOW, HIGH = 2.5, 5.0  # bits per weight between which the statement holds
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31", "#7f7f7f")
_OURS = ("#d62728", "#111111", "#9467bd")
_WIDTH, _HEIGHT, _LEFT, _TOP, _LEGEND = 560, 400, 70, 64, 240

Values = dict[str, Any]
Curve = list[tuple[float, float]]  # (bits per weight, KL), fewest bits first


def measured(rows: Sequence[Values]) -> list[Values]:
    """The rows that have numbers."""
    return [r for r in rows if r["status"] == "measured"]


def curves(rows: Sequence[Values]) -> dict[str, Curve]:
    """Method -> its points, fewest bits first."""
    found: dict[str, Curve] = {}
    for row in measured(rows):
        found.setdefault(row["method"], []).append((row["bits"], row["kl"]))
    return {method: sorted(points) for method, points in found.items()}


def bits_at(curve: Curve, kl: float) -> float | None:
    """The bits at which a curve reaches a KL, log(KL) linear in bits between its points; None outside them."""
    for (few, high), (many, low) in pairwise(curve):
        if low <= kl <= high and low < high:
            share = (math.log(high) - math.log(kl)) / (math.log(high) - math.log(low))
            return few + share * (many - few)
    return next((bits for bits, value in curve if value == kl), None)


def equal_kl(rows: Sequence[Values]) -> Values:
    """Compare sizes at equal KL.

    Returns:
        'rows': for each competitor's row its name, bits, KL, the bits that ours takes at that KL, how much smaller that
        is (None where our curve does not reach), and 'best': whether no other competitor has a KL as low in as few
        bits. 'least', 'most': over the best ones from `LOW` to `HIGH` bits per weight, None where there are none.
    """
    theirs = [r for r in measured(rows) if not r["ours"]]
    ours = curves([r for r in rows if r["ours"]])
    compared = []
    for row in theirs:
        reached = [bits for curve in ours.values() if (bits := bits_at(curve, row["kl"])) is not None]
        better = [r for r in theirs if r is not row and r["bits"] <= row["bits"] and r["kl"] <= row["kl"]]
        bits = min(reached, default=None)
        compared.append(
            {"method": row["method"], "setting": row["setting"], "bits": row["bits"], "kl": row["kl"], "best": not better,
             "ours": bits, "smaller": None if bits is None else 1 - bits / row["bits"]}
        )  # fmt: skip
    counted = [c["smaller"] for c in compared if c["best"] and c["ours"] and LOW <= c["bits"] <= HIGH]
    return {"rows": compared, "least": min(counted, default=None), "most": max(counted, default=None)}


# The table ----------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Values], said: Values) -> str:
    """The table and the statement, in Markdown whose columns are aligned for the terminal too."""
    against = {(c["method"], c["setting"]): c for c in said["rows"]}
    with_errors = any("wer" in r for r in rows)
    head = ["method", "setting", "bits/weight", "MB", "MB without table", "KL", "top token changed", "ours at that KL"]
    lines = [head + (["WER, pp [95 %]"] if with_errors else [])]
    for row in rows:
        found = against.get((row["method"], row["setting"]))
        lines.append(_cells(row, found) + ([_errors(row)] if with_errors else []))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * w for w in widths])
    text = "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
    return f"{text}\n\n{_notes(rows, said)}\n"


def _cells(row: Values, found: Values | None) -> list[str]:
    name = [row["method"], row["setting"]]
    if row["status"] != "measured":
        return [*name, row["status"], *[""] * 5]
    ours = "" if found is None else "not reached"
    if found is not None and found["ours"] is not None:
        ours = (
            f"{found['ours']:.2f} bits, {abs(found['smaller']):.0%} {'smaller' if found['smaller'] >= 0 else 'larger'}"
        )
    ours += " *" if found is not None and found["best"] else ""
    sizes = [f"{row['bytes'] / 1e6:.2f}", f"{(row['bytes'] - row['bytes_table']) / 1e6:.2f}"]
    return [*name, f"{row['bits']:.2f}", *sizes, f"{row['kl']:.4g}", f"{row['flips']:.1%}", ours]


def _errors(row: Values) -> str:
    if "wer" not in row:
        return ""
    wer = row["wer"]
    return f"{100 * wer['difference']:+.2f} [{100 * wer['low']:+.2f}, {100 * wer['high']:+.2f}]"


def _notes(rows: Sequence[Values], said: Values) -> str:
    done = measured(rows)
    notes = []
    if done:
        n, tokens = len(done[0]["utterances"]), done[0]["tokens"]
        notes.append(
            f"KL in nats per token from the original's next-token distribution, {n} held-out calibration utterances, "
            f"{tokens} tokens; weights only, activations float in every row. Bytes: the library's own file, with "
            f"{done[0]['bytes_rest'] / 1e6:.2f} MB of float16 norms, biases and positions in every row. "
            "*: no other competitor has a KL as low in as few bits."
        )
    wer = [r["wer"] for r in done if "wer" in r]
    if wer:
        notes.append(
            f"WER: difference from the original's {wer[0]['before']:.2%} on the same {wer[0]['n']} utterances, in "
            "PyTorch with the compressed weights."
        )
    missing = sorted({r["package"] for r in rows if r["status"] == "not installed"})
    if missing:
        notes.append(f"Not installed, so not compared: {', '.join(missing)}. See benchmarks/requirements.txt.")
    return "\n".join([*notes, _statement(said)])


def _statement(said: Values) -> str:
    where = f"between {LOW:g} and {HIGH:g} bits per weight"
    if said["least"] is None:
        return f"At equal KL {where}: no competitor whose KL our curve reaches."
    inside = [c for c in said["rows"] if c["best"] and LOW <= c["bits"] <= HIGH]
    beyond = [f"{c['method']} {c['setting']}" for c in inside if c["ours"] is None]
    text = (
        f"At equal KL {where}, against the best competitors there: ours is {said['least']:.0%} to {said['most']:.0%} "
        "smaller (log KL interpolated in bits)."
    )
    return text + (f" Our curve does not reach the KL of {', '.join(beyond)}." if beyond else "")


# The picture --------------------------------------------------------------------------------------------------------


def picture(rows: Sequence[Values]) -> str:
    """SVG: bits per weight across (megabytes above), KL on a log axis, a line per method."""
    done = measured(rows)
    body = ""
    if done:
        bits, kls = [r["bits"] for r in done], [max(r["kl"], 1e-9) for r in done]
        low, high = math.floor(2 * min(bits)) / 2, math.ceil(2 * max(bits)) / 2
        span = tight(kls)

        def place(point: tuple[float, float]) -> tuple[float, float]:
            x = _LEFT + _WIDTH * (point[0] - low) / max(high - low, 0.5)
            return x, _TOP + _HEIGHT * (1 - at_log(point[1], span))

        body = _axes(done[0], (low, high), span, place) + _lines(done, place)
    width, height = _LEFT + _WIDTH + _LEGEND, _TOP + _HEIGHT + 56
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#222"><rect width="100%" height="100%" fill="#fff"/>'
        f"{body}</svg>\n"
    )


def _axes(row: Values, bits: tuple[float, float], span: tuple[float, float], place: Any) -> str:
    bottom, kls = _TOP + _HEIGHT, [m * 10.0**e for e in range(-9, 3) for m in (1, 2, 5)]
    parts = []
    for tick in linear_ticks(*bits, most=9):
        x = place((tick, 1.0))[0]
        size = (tick * row["weights"] / 8 + row["bytes_rest"]) / 1e6
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="#eee"/>')
        parts.append(_say(x, bottom + 18, f"{tick:g}") + _say(x, _TOP - 8, f"{size:.0f}"))
    for kl in (k for k in kls if 10 ** span[0] * 0.999 <= k <= 10 ** span[1] * 1.001):
        y = place((bits[0], kl))[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        parts.append(_say(_LEFT - 8, y + 4, f"{kl:g}", "end"))
    middle = _LEFT + _WIDTH / 2
    turned = f'transform="rotate(-90 16 {_TOP + _HEIGHT / 2:.0f})"'
    parts.append(
        _say(middle, bottom + 40, "bits per weight") + _say(middle, _TOP - 30, "MB of weights, norms, positions")
    )
    return "".join(parts) + _say(16, _TOP + _HEIGHT / 2, "KL per token to the original", "middle", turned)


def _lines(done: Sequence[Values], place: Any) -> str:
    parts, ours = [], {r["method"] for r in done if r["ours"]}
    palette = {True: iter(_OURS * 9), False: iter(_COLOURS * 9)}
    for number, (method, curve) in enumerate(curves(done).items()):
        colour, width = next(palette[method in ours]), 3 if method in ours else 1.5
        points = [place((b, k)) for b, k in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        names = {(r["bits"], r["kl"]): r["setting"] for r in done if r["method"] == method}
        for (x, y), point in zip(points, curve, strict=True):
            tip = f"{method}, {names[point]}: {point[0]:.2f} bits, KL {point[1]:.3g}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 2}" fill="{colour}"><title>{escape(tip)}</title></circle>'
            )
        x, y = _LEFT + _WIDTH + 18, _TOP + 12 + 22 * number
        parts.append(f'<line x1="{x}" x2="{x + 20}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="{width}"/>')
        weight = 'font-weight="600"' if method in ours else ""
        parts.append(_say(x + 27, y + 4, method, "start", weight))
    return "".join(parts)


def _say(x: float, y: float, words: str, anchor: str = "middle", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(words)}</text>'
