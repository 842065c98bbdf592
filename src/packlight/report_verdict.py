"""The top of the report: the verdict, and the four quantities it rests on."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from packlight.report_charts import gauge, interval_chart
from packlight.report_html import code, maybe, p, pairs
from packlight.report_text import Words, count, group, named, number, percent, ratio, signed, text
from packlight.target import DEVICES, format_bytes, format_seconds


@dataclass(frozen=True)
class Measure:
    """Size, latency or memory: bytes or seconds before and after, the limit, and how many times better."""

    name: str
    before: float | None
    after: float | None
    limit: float | None
    ratio: float | None

    def show(self, value: float) -> str:
        """The value with its unit."""
        return format_seconds(value) if self.name == "latency" else format_bytes(value)

    def change(self, w: Words) -> str:
        """'3.8× smaller', or '' when either side was not measured."""
        if self.ratio is None or self.ratio <= 0:
            return ""
        if abs(self.ratio - 1) < 0.005:
            return w["same"]
        better = self.ratio > 1
        times = ratio(self.ratio if better else 1 / self.ratio)
        return w[f"{self.name}.{'better' if better else 'worse'}"].format(ratio=times)


def _measures(result: dict[str, Any]) -> list[Measure]:
    """Size, latency and memory. The memory limit is the target's, else the named device's."""
    before, after, target = (group(result.get(key)) for key in ("before", "after", "target"))
    found = []
    for name in ("size", "latency", "memory"):
        limit, b, a = number(target.get(name)), number(before.get(name)), number(after.get(name))
        if name == "memory" and limit is None:
            limit = next((d.memory for d in DEVICES if d.name == target.get("device") and d.memory), None)
        times = number(group(result.get("ratios")).get(name))
        if times is None and a and b:
            times = b / a
        found.append(Measure(name, b, a, limit, times))
    return found


def _allowed_drop(result: dict[str, Any]) -> float | None:
    target, before = group(result.get("target")), number(group(result.get("metric")).get("before"))
    relative = number(target.get("drop_relative"))
    if relative is not None and before is not None:
        return relative * before
    return number(target.get("drop"))


def _relaxed(name: str, value: Any, w: Words) -> str:
    found = number(value)
    if found is None:
        said = text(value)
    elif name in ("drop", "drop_relative"):
        said = f"{signed(found)} {w['pp']}" if name == "drop" else percent(found)
    else:
        said = format_seconds(found) if name == "latency" else format_bytes(found)
    return w["relax"].format(name=named(w, name), value=said)


def asked(result: dict[str, Any], w: Words) -> str:
    """The target in one line: the limits that were set, the runtime and the device."""
    target = group(result.get("target"))
    said = [
        f"{w[m.name]} {w['at_most'].format(value=m.show(m.limit))}" for m in _measures(result) if m.limit is not None
    ]
    drop, relative = number(target.get("drop")), number(target.get("drop_relative"))
    if drop is not None:
        said.append(f"{w['drop']} {w['at_most'].format(value=f'{signed(drop)} ' + w['pp'])}")
    if relative is not None:
        said.append(f"{w['drop']} {w['at_most'].format(value=percent(relative))}")
    said += [w["strict"]] if target.get("strict") is True else []
    return " · ".join(filter(None, [*said, text(target.get("runtime")), text(target.get("device"))]))


def _summary(result: dict[str, Any], w: Words) -> str:
    """One sentence on what changed, from the numbers."""
    said, metric = [], group(result.get("metric"))
    for m in _measures(result):
        if m.before is not None and m.after is not None and m.change(w):
            change = w["change"]
            said.append(change.format(name=w[m.name], before=m.show(m.before), after=m.show(m.after), how=m.change(w)))
    before, after, difference = (number(metric.get(key)) for key in ("before", "after", "difference"))
    if before is not None and after is not None and difference is not None:
        step = f"{signed(difference)} {w['pp']}"
        name = text(metric.get("name")) or w["metric"]
        said.insert(1, w["change"].format(name=name, before=percent(before), after=percent(after), how=step))
    line = w["comma"].join(said)
    return line[:1].upper() + line[1:] + w["stop"] if line else ""


def verdict(result: dict[str, Any], w: Words) -> str:
    """The verdict in large letters, what changed, what binds, and the nearest point when missed."""
    judged, model, english = group(result.get("verdict")), group(result.get("model")), w["stop"] == "."
    limits = [m.limit for m in _measures(result)] + [_allowed_drop(result)]
    tone = "untargeted" if all(limit is None for limit in limits) else "unjudged"
    if isinstance(judged.get("met"), bool):
        tone = "met" if judged["met"] else "missed"
    facts = [text(model.get("source")), text(model.get("family")), _weights(model, w)]
    body = p(" · ".join(filter(None, facts)), "eyebrow") + f"<h1>{escape(w[tone])}</h1>"
    # The sentence of the run is English; the other language says the same numbers in its own words.
    body += p((text(judged.get("sentence")) if english else "") or _summary(result, w), "sentence")
    marks = []
    if judged.get("binding"):
        marks.append((w["binding"], named(w, judged["binding"]), "binding"))
    if judged.get("rung"):
        marks.append((w["rung"], named(w, judged["rung"]), "rung"))
    said = (f'<li class="{c}">{escape(k)}{escape(w["colon"])}<b>{escape(v)}</b></li>' for k, v, c in marks)
    body += f'<ul class="marks">{"".join(said)}</ul>' if marks else ""
    body += p(w["crosses"] if judged.get("interval_crosses") is True else "", "caution")
    nearest = group(judged.get("nearest"))
    if nearest:
        relax = w["comma"].join(_relaxed(k, v, w) for k, v in group(nearest.get("relax")).items())
        own = text(nearest.get("sentence")) if english else ""
        point = f"<b>{escape(w['nearest'])}</b> {code(text(nearest.get('plan')))}"
        body += f'<div class="nearest">{point}{p(relax)}{p(own, "quiet")}</div>'
    return f'<header class="verdict {tone}">{body}</header>'


def _weights(model: dict[str, Any], w: Words) -> str:
    found = number(model.get("parameters"))
    return "" if found is None else w["with_parameters"].format(n=count(found))


def cards(result: dict[str, Any], w: Words) -> str:
    """Size, quality, latency and memory: before, after, how many times better, against the target."""
    size, latency, memory = _measures(result)
    timing, ratios = group(result.get("timing")), group(result.get("ratios"))
    low, high, n = (
        number(ratios.get("latency_low")),
        number(ratios.get("latency_high")),
        number(timing.get("samples")),
    )
    note = [w["median_of"].format(n=f"{n:g}")] if n is not None else []
    note += [w["interleaved"]] if timing.get("interleaved") is True else []
    if low is not None and high is not None:
        note.append(w["interval_short"].format(low=ratio(low), high=ratio(high)))
    four = _card(size, w) + _metric_card(result, w) + _card(latency, w, " · ".join(note)) + _card(memory, w)
    return f'<section class="cards">{four}</section>' + _more(result, w)


def _card(m: Measure, w: Words, note: str = "") -> str:
    if m.after is None:
        parts = ["", p(w["not_measured"], "big none"), "", ""]
        if m.before is not None:
            parts[2] = p(w["from"].format(value=m.show(m.before)), "quiet")
        return _card_box(w[f"card.{m.name}"], parts, _limit_line(None, m.limit and m.show(m.limit), "", w))
    was = w["from"].format(value=m.show(m.before)) if m.before is not None else ""
    label = w["comma"].join(filter(None, (f"{w['after']} {m.show(m.after)}", was)))
    parts = [p(m.change(w), "change"), p(m.show(m.after), "big"), p(was, "quiet")]
    parts.append(gauge(m.before, m.after, m.limit, label) + p(note, "quiet note"))
    within = None if m.limit is None else m.after <= m.limit
    over = m.show(m.after - m.limit) if m.limit is not None and not within else ""
    return _card_box(w[f"card.{m.name}"], parts, _limit_line(within, m.limit and m.show(m.limit), over, w))


def _card_box(name: str, parts: Sequence[str], limit: str) -> str:
    change, big, was, picture = parts
    return f'<article class="card"><h3>{escape(name)}{change}</h3>{big}{was}{picture}{limit}</article>'


def _limit_line(within: bool | None, limit: Any, over: str, w: Words) -> str:
    if not limit:
        return p(w["no_target"], "limit quiet")
    said = f"{w['target']} {w['at_most'].format(value=limit)}"
    if within is None:
        return p(said, "limit")
    end = f"✓ {w['within']}" if within else f"✕ {w['over'].format(value=over)}"
    return f'<p class="limit {"yes" if within else "no"}">{escape(said)} <b>{escape(end)}</b></p>'


def _metric_card(result: dict[str, Any], w: Words) -> str:
    metric, allowed = group(result.get("metric")), _allowed_drop(result)
    name = text(metric.get("name")) or w["card.metric"]
    before, after, low, high = (number(metric.get(key)) for key in ("before", "after", "low", "high"))
    difference, limit = number(metric.get("difference")), ""
    if allowed is not None:
        limit = f"{signed(allowed)} {w['pp']}"
    if after is None:
        return _card_box(name, ["", p(w["not_measured"], "big none"), "", ""], _limit_line(None, limit, "", w))
    was = p(w["from"].format(value=percent(before)), "quiet") if before is not None else ""
    change, picture, within, over = "", "", None, ""
    if difference is not None:
        change = p(f"{signed(difference)} {w['pp']}", "change")
        said = _interval(metric, w)
        picture = interval_chart(low, difference, high, allowed, said or f"{signed(difference)} {w['pp']}")
        picture += p(said, "quiet note")
        strict = group(result.get("target")).get("strict") is True and high is not None
        judged = high if strict and high is not None else difference
        within = None if allowed is None else judged <= allowed
        over = f"{signed(judged - allowed, 2)} {w['pp']}" if allowed is not None and not within else ""
    return _card_box(name, [change, p(percent(after), "big"), was, picture], _limit_line(within, limit, over, w))


def _interval(metric: dict[str, Any], w: Words) -> str:
    low, high, level, n = (number(metric.get(key)) for key in ("low", "high", "level", "n"))
    said = []
    if low is not None and high is not None:
        sides = {"low": signed(low), "high": f"{signed(high)} {w['pp']}"}
        said.append(w["interval"].format(level=percent(level if level is not None else 0.95, 0), **sides))
    if n is not None:
        said.append(w["paired"].format(n=f"{n:g}"))
    return w["comma"].join(said)


def _more(result: dict[str, Any], w: Words) -> str:
    """The quantities that have no card, in one quiet line of pairs."""
    before, after, metric = (group(result.get(key)) for key in ("before", "after", "metric"))
    said = []
    shows = (
        ("latency_mean", "mean", format_seconds),
        ("load", "load", format_seconds),
        ("energy", "energy", _joules),
    )
    for key, name, show in shows:
        if number(after.get(key)) is not None:
            pair = " → ".join(maybe(side.get(key), show) for side in (before, after) if side.get(key) is not None)
            said.append((w[f"more.{name}"], pair))
    for key, name in (("token_agreement", "agreement"), ("identical", "identical")):
        if number(metric.get(key)) is not None:
            said.append((w[f"more.{name}"], maybe(metric[key], percent)))
    return pairs(said, "more")


def _joules(value: float) -> str:
    return f"{value:.2f} J"
