"""The result of a run as one HTML page that stands alone: nothing is fetched, both languages are inside.

The page is the template `report_page.html` with the same body twice, in English and in Simplified Chinese, of
which the style sheet shows one. Everything that comes from a result is escaped where it enters the page. A
field that is missing, or of the wrong kind, leaves its place out or says that it was not measured.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from packlight.errors import DataError
from packlight.report_certificate import certificate
from packlight.report_charts import front_chart, layers_chart, parts_chart, sensitivity_chart
from packlight.report_html import code, fold, maybe, p, pairs, section, table
from packlight.report_svg import colours
from packlight.report_text import (
    Words,
    count,
    differences,
    group,
    joined,
    named,
    number,
    percent,
    ratio,
    rows,
    signed,
    small,
    text,
    words,
)
from packlight.report_verdict import asked, cards, verdict
from packlight.target import format_bytes, format_seconds

VERSION = 1
OPEN_SAMPLES = 6  # utterances shown at once; the others wait behind a click


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write the page of a fit.

    Args:
        result: what `packlight fit` writes as result.json.
        path: the file to write, e.g. OUT/report.html.

    Raises:
        DataError: the result is no object, or is newer than this packlight.
    """
    write_page(render(result), path)


def write_page(page: str, path: Path) -> None:
    """Write a page so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".part")
    # A transcript may hold half a surrogate pair, which no encoding can write.
    temporary.write_bytes(page.encode("utf-8", "replace"))
    temporary.replace(path)


def render(result: dict[str, Any]) -> str:
    """The page as a string.

    Args:
        result: what `packlight fit` writes as result.json; any field may be missing or None.

    Returns:
        One HTML document without references to anything outside it.

    Raises:
        DataError: the result is no object, or is newer than this packlight.
    """
    return page(result, _body)


def page(result: dict[str, Any], body: Callable[[dict[str, Any], Words], str]) -> str:
    """The template around the body in both languages. Raises DataError for what `render` refuses."""
    if not isinstance(result, dict):
        raise DataError("The result of a run is a JSON object; this is none. Run `packlight fit` again.")
    version = result.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise DataError(f"The result has version {version!r}; this packlight reads {VERSION}. Update packlight.")
    page = files("packlight").joinpath("report_page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    # The page allows this one script by its hash, so that nothing else could run even if it got in.
    digest = hashlib.sha256(script[1].encode() if script else b"").digest()
    return Template(page).substitute(
        title=escape(" · ".join(filter(None, (text(group(result.get("model")).get("source")), "packlight")))),
        script_hash=base64.b64encode(digest).decode(),
        english=body(result, words("en")),
        chinese=body(result, words("zh")),
    )


def _body(result: dict[str, Any], w: Words) -> str:
    sections = (
        verdict,
        cards,
        _front,
        _parts,
        _sensitivity,
        _layers,
        certificate,
        _worst,
        _plan,
        _tries,
        _ladder,
        how,
        notes,
        foot,
    )
    return "\n".join(filter(None, (part(result, w) for part in sections)))


# --- pictures ---


def _front(result: dict[str, Any], w: Words) -> str:
    limit = number(group(result.get("target")).get("size"))
    chart = front_chart(rows(result.get("front")), limit, w)
    keys = "".join(f'<li><i class="dot {key}"></i>{escape(w[key])}</li>' for key in ("chosen", "measured", "predicted"))
    if not chart:
        return ""
    above = p(w["kl"], "axis-title")
    body = f'<figure class="with-axis">{above}{chart}</figure><ul class="legend">{keys}</ul>'
    return section(w, "front", body, w["front.lead"])


def _parts(result: dict[str, Any], w: Words) -> str:
    parts = rows(result.get("parts"))
    chart = parts_chart(parts, w)
    if not chart:
        return ""
    colour = colours([text(part.get("name")) for part in parts])
    keys = ("part", "before", "after", "smaller", "rate", "share", "parameters")
    lines = [_part_line(part, colour[text(part.get("name"))], w) for part in parts]
    before, after, weights = (
        sum(number(part.get(key)) or 0 for part in parts) for key in ("before", "after", "parameters")
    )
    ends = [w["total"], *_bytes_pair(before, after), "", "", escape(count(weights)) if weights else ""]
    listed = table([_capital(w[key]) for key in keys], lines, "numbers", ends)
    return section(w, "parts", f"<figure>{chart}</figure>{listed}", w["parts.lead"])


def _part_line(part: dict[str, Any], colour: int, w: Words) -> list[str]:
    name = f'<i class="swatch c{colour}"></i>{escape(named(w, part.get("name")))}'
    pair = _bytes_pair(number(part.get("before")), number(part.get("after")))
    rate, share = maybe(part.get("rate"), "{:.2f}".format), maybe(part.get("share_of_multiply_adds"), percent)
    return [name, *pair, rate, share, maybe(part.get("parameters"), count)]


def _bytes_pair(before: float | None, after: float | None) -> list[str]:
    """Cells: before, after, and how many times smaller."""
    times = before / after if before and after else None
    return [maybe(before, format_bytes), maybe(after, format_bytes), maybe(times, ratio)]


def _capital(said: str) -> str:
    return said[:1].upper() + said[1:]


def _sensitivity(result: dict[str, Any], w: Words) -> str:
    chart = sensitivity_chart(rows(result.get("sensitivity")), w)
    return section(w, "sensitivity", f"<figure>{chart}</figure>" if chart else "", w["sensitivity.lead"])


def _layers(result: dict[str, Any], w: Words) -> str:
    layers = rows(result.get("layers"))
    # The parts keep the colours they have in the picture of the bytes.
    names = [text(part.get("name")) for part in rows(result.get("parts"))]
    colour = colours(names + [text(layer.get("part")) for layer in layers])
    chart = layers_chart(layers, colour, w)
    if not chart:
        return ""
    used = dict.fromkeys(text(layer.get("part")) for layer in layers)
    keys = "".join(f'<li><i class="swatch c{colour[n]}"></i>{escape(named(w, n))}</li>' for n in used if n)
    lines = [
        [
            code(text(layer.get("path"))),
            maybe(layer.get("rate"), "{:.2f}".format),
            maybe(layer.get("distortion"), small),
            maybe(layer.get("parameters"), count),
            code(text(layer.get("technique"))),
        ]
        for layer in layers
    ]
    head = [w[key] for key in ("layer", "rate", "distortion", "parameters", "technique")]
    listed = fold(w["all_layers"].format(n=len(layers)), table(head, lines, "numbers"))
    body = f'<figure>{chart}</figure><ul class="legend">{keys}</ul>{listed}'
    return section(w, "layers", body, w["layers.lead"])


# --- samples ---


def _worst(result: dict[str, Any], w: Words) -> str:
    shown = [_sample(row, w) for row in rows(result.get("worst"))]
    if not shown:
        return ""
    keys = "".join(f'<li><span class="mark {key}">{escape(w[key])}</span></li>' for key in ("sub", "ins", "del"))
    rest = fold(w["more_samples"].format(n=len(shown) - OPEN_SAMPLES), "".join(shown[OPEN_SAMPLES:]))
    body = f'<ul class="legend">{keys}</ul>{"".join(shown[:OPEN_SAMPLES])}{rest}'
    return section(w, "worst", body, w["worst.lead"])


def _sample(row: dict[str, Any], w: Words) -> str:
    before, after, n = (number(row.get(key)) for key in ("before_errors", "after_errors", "words"))
    said = ""
    if before is not None and after is not None and n is not None:
        said = w["errors"].format(before=f"{before:g}", after=f"{after:g}", words=f"{n:g}")
    top = f'<p class="id">{code(text(row.get("id")))}<span>{escape(said)}</span></p>'
    reference = text(row.get("reference"))
    sides = f'<div class="said reference"><h4>{escape(w["reference"])}</h4>{p(reference)}</div>'
    for key in ("before", "after"):
        heard = row.get(key)
        words_ = _marked(reference, text(heard), w) if heard is not None else p(w["not_measured"], "quiet")
        sides += f'<div class="said"><h4>{escape(w[key])}</h4>{words_}</div>'
    return f'<article class="sample">{top}{sides}</article>'


def _marked(reference: str, said: str, w: Words) -> str:
    """The transcript with what it changed; a word that is missing stands struck through in its place."""
    pieces = []
    for mark, word, instead in differences(reference, said):
        shown = escape(word or instead)
        if mark != "same":
            tip = w["instead"].format(words=instead) if mark == "sub" else w[mark]
            shown = f'<span class="mark {mark}" title="{escape(tip)}">{shown}</span>'
        pieces.append((word or instead, shown))
    return f"<p>{joined(pieces)}</p>" if said.strip() else p(w["nothing"], "quiet")


# --- plan, tries, ladder ---


def _plan(result: dict[str, Any], w: Words) -> str:
    plan = group(result.get("plan"))
    lines = []
    for step in rows(plan.get("steps")):
        config = "".join(code(f"{k} = {_value(v)}") for k, v in group(step.get("config")).items() if v is not None)
        scope = step.get("scope")
        paths = "".join(code(text(path)) for path in scope) if isinstance(scope, list) else code(text(scope))
        reason = escape(text(step.get("reason")))
        lines.append([code(text(step.get("technique"))), f'<span lang="en">{reason}</span>', config, paths])
    head = [w[key] for key in ("technique", "reason", "config", "scope")]
    return section(w, "plan", table(head, lines, "stack steps"), text(plan.get("name")))


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_value(v)}" for k, v in value.items())
    return text(value)


def _tries(result: dict[str, Any], w: Words) -> str:
    chosen = text(group(result.get("plan")).get("name"))
    lines = []
    for row in rows(result.get("tries")):
        low, high = number(row.get("low")), number(row.get("high"))
        difference = maybe(row.get("difference"), lambda d: f"{signed(d)} {w['pp']}")
        if low is not None and high is not None:
            difference += f' <span class="quiet">[{signed(low)}, {signed(high)}]</span>'
        missed = row.get("missed")
        names = w["comma"].join(named(w, name) for name in missed) if isinstance(missed, list) else ""
        met = row.get("met")
        judged = f"✓ {w['within']}" if met is True else f"✕ {w['misses'].format(names=names)}" if names else "–"
        name = code(text(row.get("plan")))
        if chosen and row.get("plan") == chosen:
            name += f' <b class="pick">{escape(w["chosen"])}</b>'
        tone = "yes" if met is True else "no" if met is False else ""
        size, latency = maybe(row.get("size"), format_bytes), maybe(row.get("latency"), format_seconds)
        lines.append([name, f'<span class="{tone}">{escape(judged)}</span>', size, difference, latency])
    head = [_capital(w[key]) for key in ("plan_name", "result", "size", "difference", "latency")]
    return section(w, "tries", table(head, lines, "numbers words-second"))


def _ladder(result: dict[str, Any], w: Words) -> str:
    body = ""
    for rung in rows(result.get("ladder")):
        passed = rung.get("passed")
        tone = "passed" if passed is True else "failed" if passed is False else "not_run"
        said = f"<b>{escape(named(w, rung.get('rung')))}</b> <em>{escape(w[tone])}</em>"
        body += f'<li class="{tone}">{said}{p(text(rung.get("detail")))}</li>'
    return section(w, "ladder", f'<ol class="rungs">{body}</ol>' if body else "")


# --- method ---


def how(result: dict[str, Any], w: Words) -> str:
    """The section on how it was measured."""
    done, model, data = (group(result.get(key)) for key in ("how", "model", "data"))
    before, after = (text(group(result.get(key)).get("runtime")) for key in ("before", "after"))
    timing, metric = group(result.get("timing")), group(result.get("metric"))
    model_facts = [text(model.get(key)) for key in ("source", "architecture", "dtype")]
    threads = number(done.get("threads")) or number(timing.get("threads"))
    machine = [text(done.get("machine")) or text(timing.get("machine")), text(done.get("os"))]
    machine.append(w["threads"].format(n=f"{threads:g}") if threads is not None else "")
    versions = {"Python": done.get("python"), **group(done.get("versions"))}
    n, resamples, level = (
        number(timing.get("samples")),
        number(metric.get("resamples")),
        number(metric.get("level")),
    )
    timed = [w["median_of"].format(n=f"{n:g}") if n is not None else ""]
    timed.append(w["interleaved"] if timing.get("interleaved") is True else "")
    drawn = [percent(level, 0) if level is not None else ""]
    drawn.append(w["resamples"].format(n=f"{resamples:,.0f}") if resamples is not None else "")
    listed = [
        ("command", code(text(result.get("command")))),
        ("asked", escape(asked(result, w))),
        ("model", _facts(model_facts)),
        ("licence", escape(text(model.get("licence")))),
        ("revision", code(text(model.get("revision")))),
        ("calibration", _data(group(data.get("calibration")), w)),
        ("evaluation", _data(group(data.get("evaluation")), w)),
        ("runtimes", _facts([before, after], " → ")),
        ("timing", _facts(timed)),
        ("bootstrap", _facts(drawn)),
        ("machine", _facts(machine)),
        ("versions", _facts([f"{k} {text(v)}" for k, v in versions.items() if text(v)])),
        ("date", escape(text(done.get("date")))),
        (
            "took",
            escape(format_seconds(number(done.get("seconds")) or 0)) if number(done.get("seconds")) else "",
        ),
        ("seed", escape(text(group(result.get("plan")).get("seed")))),
    ]
    body = pairs([(w[key], value) for key, value in listed], "how-list")
    return section(w, "how", body + _files(result, w))


def _facts(said: list[str], between: str = " · ") -> str:
    return escape(between.join(filter(None, said)))


def _data(data: dict[str, Any], w: Words) -> str:
    n, seconds, digest = number(data.get("n")), number(data.get("seconds")), text(data.get("sha256"))
    facts = [text(data.get("source")), w["samples"].format(n=f"{n:g}") if n is not None else ""]
    facts.append(format_seconds(seconds) if seconds is not None else "")
    facts.append(w["words_from"].format(value=named(w, data["words_from"])) if data.get("words_from") else "")
    return _facts(facts) + (f" {code('sha256 ' + digest)}" if digest else "")


def _files(result: dict[str, Any], w: Words) -> str:
    found = [(text(row.get("name")), number(row.get("bytes"))) for row in rows(result.get("files"))]
    lines = [[code(name), maybe(size, format_bytes)] for name, size in found]
    total = [escape(w["total"]), escape(format_bytes(sum(size or 0 for _, size in found)))]
    return fold(w["files"], table([w["file"], _capital(w["size"])], lines, "numbers", total))


def notes(result: dict[str, Any], w: Words) -> str:
    """The section of the notes."""
    found = result.get("notes")
    said = [text(note) for note in found] if isinstance(found, list) else []
    body = "".join(f"<li>{escape(note)}</li>" for note in said if note)
    return section(w, "notes", f'<ul lang="en">{body}</ul>' if body else "")


def foot(result: dict[str, Any], w: Words) -> str:
    """The last line of a page."""
    made_by = w["made_by"].format(version=text(result.get("packlight"))).strip()
    return p(f"{made_by}{w['stop']} {w['as_recorded']}", "foot")
