"""Tables that are only looked up: rows get bits by how often calibration reads them."""

import pytest

pytest.importorskip("torch")

import torch

from packlight.applying import Options, calibration_batches, divide
from packlight.data import prompted, read_dataset
from packlight.families import BESIDE
from packlight.loading import load
from packlight.observe import read_use
from packlight.sensitivity import measure_grams, settings
from packlight.techniques.codes import CodesConfig, feedback
from packlight.waves import waves
from small_dual import save_model, save_pictures


def weighted(weight: torch.Tensor, made: torch.Tensor, use: torch.Tensor) -> float:
    """The mean squared error of what is read."""
    return float((use * (weight - made).double().square().mean(1)).sum())


def test_use_is_the_share_of_what_was_read_and_never_none() -> None:
    use = read_use([torch.tensor([[0, 1], [0, 2]]), torch.tensor([0])], 5)
    assert use.sum() == pytest.approx(1) and (use > 0).all()
    assert use[0] / use[1] == pytest.approx(3.3 / 1.3) and use[3] == use[4] < use[1]


def test_bits_follow_use_at_the_same_rate() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 32, generator=draw)
    use = 1 / torch.arange(1, 2001, dtype=torch.float64)  # Zipf's law
    use = use[torch.randperm(2000, generator=draw)] / use.sum()
    made = {}
    for name, given in (("even", None), ("used", use), ("opposite", 1 / use)):
        found = feedback(weight, None, CodesConfig(rate=2.0, columns=True, use=0.25), given)
        assert found.rate == pytest.approx(2.0, abs=0.1)
        made[name] = weighted(weight, found.approximation, use)
    assert made["used"] < 0.6 * made["even"] < 0.6 * made["opposite"]


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("dual")
    model = load(str(save_model(folder / "model")))
    data = prompted(read_dataset(save_pictures(folder / "data", 24)), needed=False)
    found = calibration_batches(model, data, Options(), folder, None)
    return model, divide(found)[0]


def test_planning_and_compressing_see_the_same_use(batches) -> None:
    model, observed = batches
    (table,) = model.family.tables
    ids = torch.cat([b[model.family.reads].flatten() for b in observed])
    use = measure_grams(model, observed)[f"{table}.use"]
    assert int(use.argmax()) == int(torch.bincount(ids).argmax())
    with torch.no_grad():
        measured = [sums for paths, measure in waves(model, observed) if table in paths for sums in [measure()]]
    assert len(measured) == 1 and torch.equal(measured[0][f"{table}.use"], use)
    part = model.family.part_of(table)
    assert settings(model, part.name, 2.0)["use"] > 0


def test_texts_that_no_tower_is_run_on_count_and_change_nothing_else(tmp_path) -> None:
    model = load(str(save_model(tmp_path / "model")))
    folder = save_pictures(tmp_path / "data", 24)
    data = prompted(read_dataset(folder), needed=False)
    words = [s.texts[0] for s in data.samples]
    few = calibration_batches(model, data, Options(), tmp_path, None, 1)  # one batch of sixteen
    picked = sum(len(b[model.family.reads]) for b in few)
    assert picked < len(words) and len(few[0][BESIDE]) == len(words) - picked
    assert all(BESIDE not in b for b in few[1:])
    (table,) = model.family.tables
    use, bare = (
        measure_grams(model, given) for given in (few, [{k: v for k, v in b.items() if k != BESIDE} for b in few])
    )
    rows = model.layers()[table].num_embeddings
    everything = [model.settings["tokenizer"]([w])["input_ids"] for w in words]
    pad = model.settings["text"]["pad"]
    counted = torch.stack([read_use(ids, rows) for ids in (everything, [b[model.family.reads] for b in few])])
    counted[:, pad] = 0
    expected = counted / counted.sum(1, keepdim=True)
    for found, due in zip((use, bare), expected, strict=True):
        own = found[f"{table}.use"].clone()
        own[pad] = 0
        assert torch.allclose(own / own.sum(), due)
    assert all(torch.equal(use[k], bare[k]) for k in bare if k != f"{table}.use")
