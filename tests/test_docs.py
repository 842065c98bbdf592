"""The documentation holds: its commands exist, its links resolve, both READMEs say the same."""

import json
import re
import shlex
from pathlib import Path

import pytest

import packlight

ROOT = Path(__file__).resolve().parent.parent
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Every command line of packlight: in code blocks, and with its arguments in running text."""
    lines = [line.strip() for block in blocks(page) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if len(span.split()) > 2]
    return [line for line in (*lines, *spans) if line.startswith("packlight ")]


def numbers(page: Path) -> list[str]:
    """The cells and numbers that must not differ between translations."""
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text(encoding="utf-8"))
    return re.findall(r"@@\w+@@|[-+]?\d+(?:[.,_]\d+)*", text)


def refused(command: str) -> str:
    """Why the real command line refuses a command; '' when it takes it."""
    import click
    import typer

    from packlight.cli import app

    group = typer.main.get_command(app)
    verb, *arguments = shlex.split(command, comments=True)[1:]
    if verb not in group.commands:
        return f"there is no verb {verb}"
    try:
        group.commands[verb].make_context(verb, arguments)
    except Exception as error:
        # typer may carry its own click, whose errors have other classes but the same method.
        if not isinstance(error, click.ClickException) and not hasattr(error, "format_message"):
            raise
        return error.format_message()
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_taken_by_the_command_line(page: Path) -> None:
    problems = {command: why for command in commands(page) if (why := refused(command))}
    assert not problems


def test_commands_are_refused_when_an_option_does_not_exist() -> None:
    assert "no-such-option" in refused("packlight fit MODEL --data DIR --no-such-option")
    assert refused("packlight fit MODEL -o OUT")  # --data is missing
    assert refused("packlight shrink MODEL")


def test_every_verb_is_documented() -> None:
    import typer

    from packlight.cli import app

    said = " ".join(command for page in PAGES for command in commands(page))
    assert [v for v in typer.main.get_command(app).commands if f"packlight {v} " not in said] == []


def test_options_named_in_the_docs_exist() -> None:
    import typer

    from packlight.cli import app

    verbs = typer.main.get_command(app).commands.values()
    known = {option for verb in verbs for p in verb.params for option in p.opts}
    for page in PAGES:
        named = set(re.findall(r"`(--[a-z-]+)[^`]*`", page.read_text(encoding="utf-8")))
        assert named - known == set(), page


def test_readme_has_five_commands_and_five_lines_of_python() -> None:
    five = next(b for b in blocks(README) if b.startswith("packlight "))
    assert len(five.splitlines()) == 5
    lines = [line for line in blocks(README, "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 5
    compile("\n".join(lines), "README.md", "exec")


def test_chinese_readme_has_the_same_commands_python_and_numbers() -> None:
    assert commands(CHINESE) == commands(README)
    assert blocks(CHINESE, "python") == blocks(README, "python")
    assert sorted(numbers(CHINESE)) == sorted(numbers(README))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    lost = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not lost


def test_make_targets_named_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = {t for b in blocks(page) for t in re.findall(r"^make ([a-z-]+)", b, re.MULTILINE)}
        assert named <= targets, page


def test_public_names_are_documented_and_importable() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in packlight.__all__ if f"packlight.{name}" not in text] == []
    for name in ("Plan", "Step", "Target"):
        assert getattr(packlight, name).__name__ == name


def test_plans_in_the_docs_are_read() -> None:
    from packlight.plan import plan_from_dict

    found = [json.loads(b) for page in PAGES for b in blocks(page, "json")]
    plans = [plan_from_dict(v if "steps" in v else {"steps": [v]}) for v in found if {"steps", "technique"} & set(v)]
    assert len(plans) >= 5


def test_students_in_the_docs_are_built() -> None:
    pytest.importorskip("torch")
    from packlight.designing import design_of
    from packlight.families.whisper import FAMILY, tiny
    from packlight.inheriting import student
    from packlight.model import Model

    found = [json.loads(b) for b in blocks(ROOT / "docs" / "howto" / "distill.md", "json")]
    described = [v for v in found if not {"steps", "technique", "vision"} & set(v)]
    assert described
    assert [design_of(v["vision"]).share for v in found if "vision" in v] == [0.5]
    module = tiny(encoder_layers=4, decoder_layers=4, encoder_ffn_dim=1536, decoder_ffn_dim=1536)
    for description in described:
        shape = {k: v for k, v in description.items() if k not in ("distill", "scope", "audio_context")}
        made = student(Model(module, FAMILY, None, "", {}), shape)  # type: ignore[arg-type]
        assert made.module.config.decoder_layers == 2


def test_howto_pages_cover_every_technique_and_setting() -> None:
    pytest.importorskip("torch")
    from packlight.tables import TECHNIQUES

    for name, technique in TECHNIQUES.items():
        page = (ROOT / "docs" / "howto" / f"{name}.md").read_text(encoding="utf-8")
        for setting in technique.config.__dataclass_fields__:
            assert f"`{setting}`" in page, (name, setting)


def test_bundle_page_names_every_key_that_readers_ask_for() -> None:
    from packlight import bundle, codec
    from packlight.images import ImageSettings
    from packlight.patches import PatchSettings
    from packlight.serving.dual_encoder import Settings as Dual
    from packlight.serving.whisper import Settings
    from packlight.sounds import SoundSettings
    from packlight.texts import TextSettings

    page = (ROOT / "docs" / "reference" / "bundle.md").read_text(encoding="utf-8")
    contents = (ImageSettings, PatchSettings, SoundSettings)
    dual = {"image", "audio", *TextSettings.__dataclass_fields__, *Dual.__dataclass_fields__} - {"content"}
    dual |= {key for kind in contents for key in kind.__dataclass_fields__}
    assert [k for k in (*bundle._KEYS, *Settings.__dataclass_fields__, *sorted(dual)) if f"`{k}`" not in page] == []
    assert [d for d in codec._DTYPES if d not in page] == []
    assert f"format version {bundle.VERSION}" in page
