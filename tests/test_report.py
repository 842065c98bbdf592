"""The report: what it says, what it survives, and that nothing of a stranger's runs in it."""

import base64
import copy
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from packlight.errors import DataError
from packlight.report import render, write_report
from packlight.report_svg import at_log, decades, linear_ticks, tight
from packlight.report_text import TABLE, count, differences, percent, ratio, signed, small, words

FIXTURE = Path(__file__).parent / "fixtures" / "result.json"
ATTACK = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>"
WITHOUT_CLOSING = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects tags and the text a reader sees, and checks that tags nest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: dict[str, list[str]] = {"en": [], "zh-Hans": []}
        self.language = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "main":
            self.language = dict(attrs)["lang"] or ""
        if tag not in WITHOUT_CLOSING:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "main":
            self.language = ""

    def handle_data(self, data: str) -> None:
        if self.language and data.strip():
            self.said[self.language].append(data.strip())

    def text(self, language: str = "en") -> str:
        return " ".join(self.said[language])


@pytest.fixture
def result() -> dict[str, Any]:
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


@pytest.fixture
def short(result: dict[str, Any]) -> dict[str, Any]:
    """The example with at most two rows in every list."""
    return {k: v[:2] if isinstance(v, list) else v for k, v in result.items()}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside a result, containers too."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    changed = copy.deepcopy(value)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return changed


def planted(value: Any) -> Any:
    """The same result with the attack in every string, and as a key of every object."""
    if isinstance(value, dict):
        return {**{k: planted(v) for k, v in value.items()}, f"x{ATTACK}": ATTACK}
    if isinstance(value, list):
        return [planted(v) for v in value] + [ATTACK]
    return ATTACK if isinstance(value, str) else value


# --- the page ---


def test_page_holds_every_section_in_both_languages(result: dict[str, Any]) -> None:
    page = Page(render(result))
    assert page.open == []
    headings = (
        "front",
        "parts",
        "sensitivity",
        "layers",
        "certificate",
        "worst",
        "plan",
        "tries",
        "ladder",
        "how",
        "notes",
    )
    for language, code in (("en", "en"), ("zh", "zh-Hans")):
        w = words(language)
        assert w["met"] in page.text(code)
        assert [key for key in headings if w[key] not in page.said[code]] == []
    assert "MEETS TARGET" not in page.text("zh-Hans")


def test_page_says_verdict_before_anything_else(result: dict[str, Any]) -> None:
    said = Page(render(result)).text()
    order = [said.index(words("en")[key]) for key in ("met", "card.size", "front", "plan", "how")]
    assert order == sorted(order)
    assert said.index(result["verdict"]["sentence"]) < said.index("Bundle size")


def test_cards_show_before_after_ratio_and_target(result: dict[str, Any]) -> None:
    said = Page(render(result)).text()
    for phrase in (
        "39.2 MB",
        "from 151.1 MB",
        "3.8× smaller",
        "target ≤ 40.0 MB",
        "2.6× faster",
        "from 612 ms",
    ):
        assert phrase in said
    assert "95 % interval −0.1 to +0.7 pp, n = 100, paired" in said
    assert said.count("no target set") == 2  # latency and memory


def test_card_says_worse_when_the_bundle_is_slower(result: dict[str, Any]) -> None:
    result["ratios"]["latency"] = 0.5
    assert "2.0× slower" in Page(render(result)).text()


def test_card_says_by_how_much_when_a_limit_is_missed(result: dict[str, Any]) -> None:
    result["target"].update(size=39_000_000, drop=0.0025)
    said = Page(render(result)).text()
    assert "over by 247.3 kB" in said
    assert "over by +0.05 pp" in said


def test_strict_target_judges_the_upper_end_of_the_interval(result: dict[str, Any]) -> None:
    result["target"].update(drop=0.005)
    assert "over by" not in Page(render(result)).text()
    result["target"].update(strict=True)
    assert "over by +0.20 pp" in Page(render(result)).text()


def test_memory_limit_is_the_devices_when_none_is_asked_for(result: dict[str, Any]) -> None:
    result["target"]["device"] = "pi5"
    assert "target ≤ 3.0 GB" in Page(render(result)).text()


def test_missed_target_shows_what_binds_and_the_nearest_point(result: dict[str, Any]) -> None:
    nearest = {"plan": "p04", "relax": {"size": 23_100_000, "drop": 0.013}, "sentence": "Then p04 fits."}
    result["verdict"].update(met=False, binding="size", interval_crosses=True, nearest=nearest)
    page = Page(render(result))
    for phrase in ("DOES NOT MEET TARGET", "Binding constraint: size", "p04", "Then p04 fits."):
        assert phrase in page.text()
    assert "relax size to 23.1 MB, relax quality drop to +1.3 pp" in page.text()
    assert words("en")["crosses"] in page.text()
    assert "未达到目标" in page.text("zh-Hans")
    assert "将大小放宽到 23.1 MB" in page.text("zh-Hans")
    assert not any("verdict met" in (attrs.get("class") or "") for _, attrs in page.tags)


def test_chinese_verdict_says_the_numbers_in_its_own_words(result: dict[str, Any]) -> None:
    said = Page(render(result)).text("zh-Hans")
    assert result["verdict"]["sentence"] not in said
    assert "大小 151.1 MB 变为 39.2 MB（缩小 3.8×）" in said
    assert "WER 14.5 % 变为 14.8 %（+0.3 个百分点）" in said


def test_sensitivity_has_one_bar_per_part_and_level(result: dict[str, Any]) -> None:
    page = render(result)
    assert page.count('class="bar"') == 2 * len(result["sensitivity"])  # both languages


def test_front_marks_one_chosen_point_and_the_target(result: dict[str, Any]) -> None:
    page = render(result)
    assert len(re.findall(r'<circle[^>]*class="chosen"', page)) == 2
    assert len(re.findall(r'<circle[^>]*class="measured"', page)) == 4
    assert len(re.findall(r'<line[^>]*class="target"', page)) == 2
    result["target"]["size"] = None
    assert not re.findall(r'<line[^>]*class="target"', render(result))


def test_every_picture_has_a_label_and_tooltips(result: dict[str, Any]) -> None:
    page = render(result)
    charts = [attrs for tag, attrs in Page(page).tags if tag == "svg" and attrs.get("class") == "chart"]
    assert len(charts) == 2 * (5 + 4)  # front, parts, sensitivity, layers, certificate and one in each card
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in charts)
    assert page.count("<title>") > 2 * (len(result["layers"]) + len(result["front"]))


def test_utterance_marks_only_what_differs(result: dict[str, Any]) -> None:
    result["worst"] = [{"id": "a", "reference": "one two three", "before": "One, two three.", "after": "one too"}]
    page = render(result)
    start = page.index('<article class="sample">')
    sample = page[start : page.index("</article>", start)]
    assert re.findall(r'<span class="mark (\w+)"[^>]*>([^<]*)', sample) == [("sub", "too"), ("del", "three")]


# --- safety ---


def test_page_lets_nothing_through_when_every_string_is_an_attack(result: dict[str, Any]) -> None:
    page = render(planted(result))
    tags = Page(page).tags
    assert page.lower().count("<script") == 1
    assert [tag for tag, _ in tags if tag in ("img", "iframe", "object", "embed", "form", "base")] == []
    assert [name for _, attrs in tags for name in attrs if name.startswith("on")] == []
    assert "&lt;script&gt;" in page


def test_page_asks_the_network_for_nothing(result: dict[str, Any]) -> None:
    page = render(result)
    for tag, attrs in Page(page).tags:
        assert not {"src", "srcset", "data", "poster", "action", "xlink:href"} & set(attrs), tag
        assert tag == "a" or re.match(r"#|data:,$", attrs.get("href") or "#"), attrs
    assert not re.search(r"url\(|@import|@font-face|fetch\(|XMLHttpRequest", page)
    assert "default-src 'none'" in page


def test_page_allows_exactly_its_own_script(result: dict[str, Any]) -> None:
    page = render(result)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = re.search(r"'sha256-([^']+)'", page)
    assert script is not None
    assert allowed is not None
    assert base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode() == allowed[1]


def test_template_signs_in_a_result_stay_as_they_are(result: dict[str, Any]) -> None:
    result["notes"] = ["costs $title and {value} and %s"]
    assert "costs $title and {value} and %s" in Page(render(result)).text()


# --- what is missing ---


def test_empty_result_renders_and_says_not_measured() -> None:
    page = Page(render({}))
    assert page.text().count("not measured") == 4
    assert "NO TARGET SET" in page.text()
    assert "The plan" not in page.text()


@pytest.mark.parametrize(
    "wrong",
    [None, "words", -1, 1e-320, float("nan"), 10**400, True, [], {}, ["x"]],
    ids=lambda value: repr(value)[:8],
)
def test_page_renders_when_any_one_field_is_wrong(short: dict[str, Any], wrong: Any) -> None:
    for path in places(short):
        if path != ("version",):
            page = render(put(short, path, wrong))
            assert "</html>" in page


def test_verdict_is_open_when_a_target_was_set_but_not_judged(result: dict[str, Any]) -> None:
    result["verdict"]["met"] = None
    said = Page(render(result)).text()
    assert "NOT JUDGED" in said
    assert "MEETS TARGET" not in said


def test_unmeasured_latency_and_memory_are_said(result: dict[str, Any]) -> None:
    result["after"].update(latency=None, memory=None)
    result["ratios"].update(latency=None, memory=None)
    said = Page(render(result)).text()
    assert said.count("not measured") == 2
    assert "faster" not in said.replace(result["verdict"]["sentence"], "")


@pytest.mark.parametrize("bad", [{"version": 2}, {"version": "new"}, [], "text"])
def test_render_refuses_what_it_can_not_read(bad: Any) -> None:
    with pytest.raises(DataError):
        render(bad)


def test_write_report_writes_the_page_even_with_half_a_surrogate(result: dict[str, Any], tmp_path: Path) -> None:
    result["notes"] = ["broken \ud800 text"]
    write_report(result, tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert "broken ? text" in (tmp_path / "report.html").read_text(encoding="utf-8")


# --- words and numbers ---


def test_language_table_is_complete() -> None:
    assert words("en").keys() == words("zh").keys() == TABLE.keys()
    for key, (english, chinese) in TABLE.items():
        assert english.strip(), key
        assert chinese.strip(), key
        assert sorted(re.findall(r"{\w+}", english)) == sorted(re.findall(r"{\w+}", chinese)), key
        if key not in ("at_most",):
            assert re.search(r"[一-鿿：，。]", chinese), key
        assert not re.search(r"[一-鿿]", english), key


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(0.148), "14.8 %"),
        (percent(0.95, 0), "95 %"),
        (signed(0.003), "+0.3"),
        (signed(-0.001), "−0.1"),
        (signed(-0.0001), "0.0"),
        (ratio(12.84), "12.8×"),
        (ratio(140), "140×"),
        (count(37_760_640), "37.8 M"),
        (count(980), "980"),
        (small(0.0031), "0.0031"),
        (small(0.0005), "0.00050"),
        (small(0.000031), "3.1 × 10⁻⁵"),
        (small(0), "0"),
    ],
)
def test_numbers_read_as_people_write_them(shown: str, expected: str) -> None:
    assert shown == expected


def test_differences_find_planted_edits() -> None:
    found = differences("the cat sat on the mat", "The cat sits on mat, now.")
    assert found == [
        ("same", "The", ""),
        ("same", "cat", ""),
        ("sub", "sits", "sat"),
        ("same", "on", ""),
        ("del", "", "the"),
        ("same", "mat,", ""),
        ("ins", "now.", ""),
    ]


def test_differences_compare_chinese_by_character() -> None:
    found = differences("老洋房饭店", "老羊房饭店。")
    assert [(mark, word) for mark, word, _ in found if mark != "same"] == [("sub", "羊")]
    assert len(found) == 5


def test_differences_ignore_a_dash_that_stands_alone() -> None:
    assert {mark for mark, _, _ in differences("yes he said", "Yes - he said.")} == {"same"}


# --- axes ---


def test_linear_ticks_are_round_and_inside() -> None:
    assert linear_ticks(11.2, 54.9) == [20, 30, 40, 50]
    assert linear_ticks(0, 8.4) == [0, 2, 4, 6, 8]
    assert linear_ticks(5, 5) == [5]


def test_log_axis_encloses_its_values() -> None:
    assert decades([0.0031, 0.04]) == (-3, -1)
    assert decades([0.01]) == (-2, -1)
    assert decades([0.0]) == (-1, 0)
    assert at_log(0.01, (-3, -1)) == pytest.approx(0.5)
    assert at_log(0.0, (-3, -1)) == 0
    low, high = tight([0.0005, 0.081])
    assert (10**low, 10**high) == (pytest.approx(0.0005), pytest.approx(0.1))
