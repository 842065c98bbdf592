"""The benchmark of divergence: finer weights are nearer, the same bundle is as near, and words that are lost are left out."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import divergence

import packlight
from packlight.applying import apply
from packlight.plan import Plan, Step
from small_whisper import save_model, save_speech


def test_finer_weights_are_nearer(tmp_path, monkeypatch, capsys) -> None:
    model, data = save_model(tmp_path / "model"), save_speech(tmp_path / "speech", 5)
    bundles = []
    for name, rate in (("coarse", 2.0), ("fine", 6.0), ("again", 2.0)):
        plan = Plan((Step("round_to_nearest", {"rate": rate}, ("*",)), Step("float16")), "whisper", name=name)
        bundles.append(str(apply(str(model), plan, None, tmp_path / name, packlight.Options())))
    arguments = ["divergence", str(model), *bundles, "--data", str(data), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert divergence.main() == 0
    said = capsys.readouterr().out.splitlines()
    coarse, fine, again = (float(line.split("KL ")[1].split()[0]) for line in said[1:])
    assert coarse == again > 2 * fine > 0
    assert said[0].startswith("5 of 5 recordings") and "+0% [+0%, +0%]" in said[3]
    share = float(said[2].rpartition("  ")[2].split("%")[0]) / 100
    assert share == pytest.approx(fine / coarse - 1, abs=0.01)
    monkeypatch.setattr(sys, "argv", [*arguments[:2], str(tmp_path / "none"), *arguments[-4:]])
    assert divergence.main() == 2


def test_recordings_with_words_that_are_lost_are_left_out() -> None:
    batches = [{"ids": torch.tensor([[1, 2]])}, {"ids": torch.tensor([[1, 3]])}]
    assert divergence.covered(batches, "ids", [(1, 2, 3), (1, 2)]) == batches[:1]
    assert divergence.covered(batches, "ids", [(1, 2, 3)]) == batches
    low, middle, high = (divergence.against([(1.0, 0, 9)] * 8, [(k, 0, 9)] * 8)[0] for k in (0.5, 1.0, 2.0))
    assert (low, middle, high) == pytest.approx((-0.5, 0.0, 1.0))
