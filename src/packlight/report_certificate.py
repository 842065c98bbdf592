"""The certificate in the report: how far above the theoretical limit the layers are, as words, picture and table."""

from collections.abc import Sequence
from html import escape
from typing import Any

from packlight.report_html import maybe, p, section, table
from packlight.report_svg import across, colours, line, linear_ticks, say, svg, tipped
from packlight.report_text import Words, group, named, number, percent, rows, text
from packlight.target import format_bytes

_TALL = 150  # pixels of the plot


def certificate(result: dict[str, Any], w: Words) -> str:
    """The section, or '' when no layer of the result has a bound."""
    found = group(result.get("certificate"))
    said = _said(found, w)
    if not said:
        return ""
    layers = [r for r in rows(result.get("layers")) if number(r.get("bound")) is not None and number(r.get("rate"))]
    # The parts keep the colours they have in the picture of the bytes.
    names = [text(part.get("name")) for part in rows(result.get("parts"))]
    colour = colours(names + [text(layer.get("part")) for layer in layers])
    chart = bound_chart(layers, colour, w)
    keys = "".join(f"<li>{escape(w[key])}</li>" for key in ("certificate.solid", "certificate.pale"))
    figure = f'<figure>{chart}</figure><ul class="legend">{keys}</ul>' if chart else ""
    return section(w, "certificate", f"{said}{figure}{_table(found, colour, w)}", w["certificate.lead"])


def _said(found: dict[str, Any], w: Words) -> str:
    rate, limit, gap, mean = (number(found.get(key)) for key in ("rate", "bound", "gap", "gap_mean"))
    if rate is None or limit is None or gap is None:
        return ""
    key = "certificate.above" if gap >= 0 else "certificate.below"
    said = w[key].format(rate=f"{rate:.2f}", gap=f"{abs(gap):.2f}", limit=f"{limit:.2f}")
    body = p(said, "sentence")
    layers, rated, every = (number(found.get(key)) for key in ("layers", "rated", "of_layers"))
    covered, weights = number(found.get("parameters")), number(found.get("of_parameters"))
    more = []
    if mean is not None:
        more.append(w["certificate.mean"].format(gap=f"{mean:.2f}"))
    if layers and every and covered and weights:
        share = percent(covered / weights)
        more.append(w["certificate.covers"].format(n=f"{layers:g}", all=f"{every:g}", share=share))
    if layers and rated is not None and rated < layers:
        more.append(w["certificate.finest"].format(n=f"{layers - rated:g}"))
    return body + p((" " if w["stop"] == "." else "").join(more), "quiet")


def bound_chart(layers: Sequence[dict[str, Any]], colour: dict[str, int], w: Words) -> str:
    """A column per layer: up to its bound in full colour, what it spends above that in pale.

    Args:
        layers: rows of the result's 'layers' with a rate and a bound, in the order of the model.
        colour: a colour number per part.
        w: the words of one language.

    Returns:
        SVG, or '' when there is nothing to draw.
    """
    pairs = [(max(number(e.get("rate")) or 0.0, 0.0), max(number(e.get("bound")) or 0.0, 0.0)) for e in layers]
    high = 1.05 * max((max(pair) for pair in pairs), default=0.0)
    if not high:
        return ""
    top = 24.0
    body = say("0%", top - 12, w["rate.axis"], style="quiet", shift=-52)
    for tick in linear_ticks(0, high):
        y = top + _TALL * (1 - tick / high)
        body += line("0%", y, "100%", y, "grid") + say("0%", y + 4, f"{tick:g}", "end", "", -10)
    for i, (e, (rate, limit)) in enumerate(zip(layers, pairs, strict=True)):
        kind = f"c{colour.get(text(e.get('part')), 0)}"
        place = f'x="{across((i + 0.12) / len(pairs))}" width="{across(0.76 / len(pairs))}"'

        def column(value: float, style: str, place: str = place) -> str:
            y = top + _TALL * (1 - value / high)
            return f'<rect {place} y="{y:.1f}" height="{_TALL * value / high:.1f}" class="{style}"/>'

        bars = column(rate, f"{kind} pale") + column(min(rate, limit), kind)
        tip = [text(e.get("path")), named(w, text(e.get("part"))), f"{rate:.2f} {w['rate.axis']}"]
        tip += [f"{w['limit']} {limit:.2f}", f"{w['gap']} {rate - limit:+.2f}"]
        body += tipped(bars, " · ".join(filter(None, tip)))
    return svg(body, f"{w['certificate']}{w['colon']}{w['certificate.lead']}", int(top) + _TALL + 4, 52, 2)


def _table(found: dict[str, Any], colour: dict[str, int], w: Words) -> str:
    def line_(part: dict[str, Any], name: str) -> list[str]:
        bits = [maybe(part.get(key), "{:.2f}".format) for key in ("rate", "bound", "gap")]
        sizes = [maybe(part.get(key), format_bytes) for key in ("bytes", "bytes_at_bound")]
        return [name, maybe(part.get("layers"), "{:g}".format), *bits, *sizes]

    lines = []
    for part in rows(found.get("parts")):
        name = text(part.get("name"))
        swatch = f'<i class="swatch c{colour.get(name, 0)}"></i>{escape(named(w, name))}'
        lines.append(line_(part, swatch))
    head = [w[key] for key in ("part", "layers.count", "rate", "limit", "gap", "bytes", "bytes.limit")]
    return table(head, lines, "numbers", line_(found, escape(w["total"])))
