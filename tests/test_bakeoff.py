"""The bake-off: its yardstick, its arithmetic, and that nothing is dropped in silence. A small random model."""

import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from small_whisper import save_model, save_speech

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bakeoff
from bakeoff_report import bits_at, equal_kl, markdown, picture
from competitors import Row, by_library, compressible, gguf_weights
from ours import by_plan, per_column

from packlight import applying
from packlight.applying import Options
from packlight.data import read_dataset
from packlight.errors import DataError


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bakeoff")
    return save_model(root / "model"), save_speech(root / "speech", 8)


@pytest.fixture(scope="module")
def bench(places: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> bakeoff.Bench:
    out = tmp_path_factory.mktemp("out")
    return bakeoff.Bench(str(places[0]), read_dataset(places[1]), None, out, Options())


def point(method: str, bits: float, kl: float, ours: bool = False) -> dict:
    sizes = {"bytes": int(1e6 * bits), "bytes_table": 0, "bytes_rest": 0, "weights": 8_000_000}
    rest = {"flips": 0.0, "tokens": 9, "utterances": [[0.0, 0, 9]], "package": "x", "status": "measured"}
    return {"method": method, "setting": f"{bits:g} bits", "bits": bits, "kl": kl, "ours": ours, **sizes, **rest}


def run(
    places: tuple[Path, Path], out: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, dict[str, dict]]:
    """Run the command with these rows; returns its status and the rows of results.json by name."""
    monkeypatch.setattr(bakeoff, "rows", lambda: rows)
    monkeypatch.setattr(sys, "argv", ["bakeoff", str(places[0]), "--calibration", str(places[1]), "-o", str(out)])
    status = bakeoff.main()
    found = json.loads((out / "results.json").read_text())["rows"]
    return status, {f"{r['method']}, {r['setting']}": r for r in found}


def test_kl_of_unquantized_weights_is_zero(bench: bakeoff.Bench) -> None:
    found = bakeoff.divergence(bench.original, bench.batches[1], bench.reference)
    assert found
    assert all((kl, flips) == (0.0, 0) and tokens > 0 for kl, flips, tokens in found)


def test_no_utterance_both_calibrates_and_judges(bench: bakeoff.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (applying, bakeoff):
        monkeypatch.setattr(module, "OBSERVED", 4)
        monkeypatch.setattr(module, "JUDGED", 1)
    fresh = bakeoff.Bench(bench.model, bench.calibration, None, bench.out, Options())
    observed, judged = ({float(b["input_features"].sum()) for b in half} for half in fresh.batches)
    assert (len(observed), len(judged)) == (4, 4)  # of eight: four, the fifth, and the three that were not picked
    assert not observed & judged


def test_too_few_utterances_are_refused(bench: bakeoff.Bench) -> None:
    few = replace(bench.calibration, samples=bench.calibration.samples[:4])
    with pytest.raises(DataError, match="at least 5"):
        assert bakeoff.Bench(bench.model, few, None, bench.out, Options()).batches


def test_weights_that_a_library_leaves_cost_sixteen_bits(bench: bakeoff.Bench) -> None:
    found, model = bakeoff.measure(bench, Row("nothing", "", "packlight", partial(by_library, lambda *_: {})))
    header = 8 * 160 * sum(len(x) for x in compressible(model).values()) / found["weights"]
    assert 16 <= found["bits"] <= 16 + header
    assert found["kl"] < 1e-4
    parameters = sum(p.numel() for p in bench.original.module.parameters())
    assert found["bytes_rest"] == 2 * (parameters - found["weights"])


def test_a_row_of_ours_costs_about_its_rate_and_loses_less_with_more_bits(bench: bakeoff.Bench) -> None:
    found = {}
    for rate in (3, 6):
        row = Row("ours", f"{rate}", "packlight", partial(by_plan, per_column(rate)), ours=True)
        found[rate] = bakeoff.measure(bench, row)[0]
    assert found[3]["kl"] > 4 * found[6]["kl"] > 0
    for rate, row in found.items():
        # A small model: float16 scales and headers weigh much on its 64 columns.
        assert rate < row["bits"] < rate + 3.5


def test_a_library_that_is_missing_is_named_and_rows_are_kept(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def once(layers: dict, folder: Path) -> dict:
        calls.append(folder)
        return {}

    table = [
        Row("Absent", "4 bit", "no-such-package-of-ours", partial(by_library, once)),
        Row("Present", "float16", "packlight", partial(by_library, once)),
    ]
    status, found = run(places, tmp_path, table, monkeypatch)
    assert status == 0
    assert found["Absent, 4 bit"]["status"] == "not installed"
    assert found["Present, float16"]["status"] == "measured"
    text = capsys.readouterr().out
    assert re.search(r"Absent +\| 4 bit +\| not installed", text)
    assert "no-such-package-of-ours" in text.split("Not installed")[1]
    assert len(calls) == 2
    assert run(places, tmp_path, table, monkeypatch)[1] == found
    assert len(calls) == 2, "a row that was measured is not measured again"


def test_more_bits_of_gguf_have_lower_kl(bench: bakeoff.Bench) -> None:
    if find_spec("gguf") is None:
        pytest.skip("gguf is not installed; see benchmarks/requirements.txt")
    rows = {k: Row("GGUF", k, "gguf", partial(by_library, partial(gguf_weights, k))) for k in ("Q8_0", "Q4_0")}
    found = {k: bakeoff.measure(bench, row)[0] for k, row in rows.items()}
    assert 0 < found["Q8_0"]["kl"] < found["Q4_0"]["kl"] / 10
    assert found["Q4_0"]["bits_table"] == pytest.approx(4.5, abs=0.5)


def test_ours_at_equal_kl_is_interpolated_in_the_logarithm() -> None:
    curve = [(2.0, math.exp(-2)), (4.0, math.exp(-6))]
    assert bits_at(curve, math.exp(-4)) == pytest.approx(3.0)
    assert bits_at(curve, math.exp(-6)) == pytest.approx(4.0)
    assert bits_at(curve, math.exp(-7)) is None
    assert bits_at(curve, math.exp(-1)) is None


def test_statement_counts_the_best_competitors_between_two_and_a_half_and_five_bits() -> None:
    ours = [point("ours", b, math.exp(-2 * b), True) for b in (2.0, 4.0)]
    theirs = [
        point("A", 4.0, math.exp(-6)),  # ours: 3 bits, 25 % smaller
        point("B", 4.8, math.exp(-7.2)),  # ours: 3.6 bits, 25 % smaller
        point("C", 4.5, math.exp(-4)),  # worse than A in more bits
        point("D", 2.4, math.exp(-4.4)),  # below the range
        point("E", 4.9, math.exp(-9)),  # our curve ends before
    ]
    said = equal_kl([*ours, *theirs])
    found = {r["method"]: r for r in said["rows"]}
    assert (found["A"]["ours"], found["A"]["smaller"]) == (pytest.approx(3.0), pytest.approx(0.25))
    assert (said["least"], said["most"]) == (pytest.approx(0.25), pytest.approx(0.25))
    assert [m for m, r in found.items() if r["best"]] == ["A", "B", "D", "E"]
    assert found["E"]["ours"] is None
    text = markdown([*ours, *theirs], said)
    assert "ours is 25% to 25% smaller" in text
    assert "does not reach the KL of E 4.9 bits" in text


def test_statement_says_larger_where_ours_is_larger() -> None:
    rows = [*(point("ours", b, math.exp(-2 * b), True) for b in (2.0, 5.0)), point("A", 4.0, math.exp(-9))]
    said = equal_kl(rows)
    assert said["least"] == pytest.approx(-0.125)
    assert "12% larger" in markdown(rows, said)


def test_picture_has_a_line_per_method_and_a_mark_per_row() -> None:
    rows = [point("ours", b, 10**-b, True) for b in (2, 3, 4)] + [point("A & B", 4.5, 0.01), point("A & B", 8.5, 1e-4)]
    root = ElementTree.fromstring(picture(rows))
    name = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{name}polyline")) == 2
    assert len(root.findall(f"{name}circle")) == 5
    assert "A & B" in [t.text for t in root.findall(f"{name}text")]
    higher, lower = (float(c.get("cy")) for c in root.findall(f"{name}circle")[:2])
    assert higher < lower, "fewer bits have a higher KL"
    ElementTree.fromstring(picture([]))
