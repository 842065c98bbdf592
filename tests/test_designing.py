"""Vision towers designed from a budget: the budget is met, what counts is inherited, and the result goes the whole road."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import packlight
from packlight import designing
from packlight.applying import Options
from packlight.compress import check, compress_
from packlight.deploy import deploy, parity
from packlight.designing import Design, blocks_from, cost, design_of, designs, inherit_, tower_of
from packlight.errors import PlanError
from packlight.families.dual_encoder import Pair
from packlight.families.mobile_dual import LITE0, EfficientNetLite
from packlight.inheriting import student
from packlight.plan import Plan, Step
from packlight.pruning_plan import tower_cost
from packlight.serve import open_served
from packlight.teaching import distill
from small_dual import picture, save_pictures
from test_mobile_dual import save

LITE = {"stem": 32, "head": 1280, "stages": [list(s) for s in LITE0]}
STAGES = [[1, 3, 1, 16, 1], [4, 3, 2, 24, 3], [4, 5, 2, 32, 2]]
SMALL = {"stem": 16, "head": 64, "stages": STAGES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("design") / "model", SMALL, side=64)


def tower(config: dict[str, Any], seed: int = 0) -> EfficientNetLite:
    torch.manual_seed(seed)
    made = EfficientNetLite(**config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.1 if p.dim() == 1 else 1.2 / p[0].numel() ** 0.5)
    return made


def pictures(count: int = 4, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


# Budgets ------------------------------------------------------------------------------------------------------------


def test_the_cost_is_that_of_the_layers(folder: Path) -> None:
    model = packlight.load(str(folder))
    layers = [m for p, m in model.layers().items() if p.startswith("vision_model.")]
    assert cost(SMALL, 64, "parameters") == sum(p.numel() for m in layers for p in m.parameters())
    projection = model.module.visual_projection.weight.numel()
    assert cost(SMALL, 64, "operations") == tower_cost(model, model.family.towers[0], "operations") - projection


@pytest.mark.parametrize("unit", ["operations", "parameters"])
@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_every_design_keeps_its_budget_and_uses_it(share: float, unit: Any) -> None:
    whole = cost(LITE, 224, unit)
    found = designs(LITE, 224, Design(share, unit, depth=(1.0, 0.75)))
    sizes = [config["size"] for config in found]
    assert sizes == sorted(sizes, reverse=True)
    assert (len(set(sizes)) > 1) == (unit == "operations")
    used = [cost(config, config["size"], unit) / whole for config in found]
    assert max(used) <= share
    for config, part in zip(found, used, strict=True):
        full = all(e == 6 for e, *_ in config["stages"][1:])
        assert full or part > share - 0.03


def test_sides_that_nobody_named_use_the_budget() -> None:
    """Half of Lite0 at 224 pixels: whole at 160, but at 128 two thirds of the budget are all that there is."""
    shallow = designs(LITE, 224, Design(0.5, depth=(1.0, 0.25)))
    assert [c["size"] for c in shallow] == [224, 224, 192, 192, 160, 160]  # depths are named, so they stay
    (named,) = designs(LITE, 224, Design(0.5, size=(128,)))
    assert cost(named, 128, "operations") < 0.7 * 0.5 * cost(LITE, 224, "operations")
    assert len(designs(LITE, 224, Design(0.9, expansion=0.0))) == 4  # where no side uses the budget, all are tried


def test_blocks_are_spread_over_a_stage_and_keep_its_first() -> None:
    other = {"stages": [[1, 3, 1, 16, 1], [4, 3, 2, 24, 2], [4, 5, 2, 32, 1]]}
    assert blocks_from(SMALL, other) == [0, 1, 3, 4]


# Inheritance --------------------------------------------------------------------------------------------------------


def test_a_student_of_everything_is_the_original() -> None:
    old, new = tower(SMALL), tower(SMALL, seed=9)
    inherit_(new, old, range(6), "importance")
    assert all(torch.equal(t, new.state_dict()[n]) for n, t in old.state_dict().items())


def dead_half(old: EfficientNetLite) -> list[list[int]]:
    """Plant dead hidden channels everywhere, and a dead half of every stream; returns which hidden ones live."""
    draw = torch.Generator().manual_seed(4)
    alive: list[list[int]] = []
    streams = {32: torch.arange(1, 32, 2)}  # the stem's, to which the first block adds
    with torch.no_grad():
        for block in old.blocks:
            inner, wide = block.project.conv.in_channels, block.project.conv.out_channels
            gone = streams.setdefault(wide, torch.randperm(wide, generator=draw)[: wide // 2])
            block.project.conv.weight[gone], block.project.conv.bias[gone] = 0, 0
            if hasattr(block.expand, "conv"):
                hidden = torch.randperm(inner, generator=draw)[: inner // 2]
                block.project.conv.weight[:, hidden] = 0
                alive.append(sorted(set(range(inner)) - set(hidden.tolist())))
        old.stem.conv.weight[1::2], old.stem.conv.bias[1::2] = 0, 0
        old.blocks[0].project.conv.weight[:, 1::2] = 0
    return alive


def test_dead_channels_are_the_ones_that_are_left_out() -> None:
    """Planted: half of all channels give nothing, here and there; a student of half the width says the same."""
    old = tower({**SMALL, "stages": [[e, k, s, 2 * c, n] for e, k, s, c, n in STAGES], "stem": 32})
    alive = dead_half(old)
    config = designing.shape({**SMALL, "stages": [[e, k, s, 2 * c, n] for e, k, s, c, n in STAGES], "stem": 32},
                             Design(width=0.5), 64, 1.0, 1.0)  # fmt: skip
    new = EfficientNetLite(**{**config, "size": 0}).eval()
    inherit_(new, old, range(6), "importance")
    x = pictures()
    with torch.no_grad():
        whole = old(x)
        assert torch.allclose(new(x), whole, atol=1e-4 * float(whole.abs().max()))
        inherit_(new, old, range(6), "first")
        assert not torch.allclose(new(x), whole, atol=1e-2 * float(whole.abs().max()))
    assert len(alive) == 5


def test_a_fault_in_who_shares_channels_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deliberate fault: each block chooses the channels of its output alone, whatever is added to them."""
    shared = designing._stream

    def alone(old: EfficientNetLite, index: int) -> torch.Tensor:
        return shared(old, index).roll(index)

    monkeypatch.setattr(designing, "_stream", alone)
    with pytest.raises(AssertionError):
        test_dead_channels_are_the_ones_that_are_left_out()


def test_the_most_important_channels_beat_the_first() -> None:
    old = tower(SMALL)
    with torch.no_grad():
        for block in old.blocks:
            scale = torch.logspace(0.3, -1.5, block.project.conv.in_channels)
            block.project.conv.weight.mul_(scale.flip(0)[:, None, None])
    x, found = pictures(8), {}
    config = designing.shape(SMALL, Design(), 64, 1.0, 0.5)
    for choose in ("importance", "first"):
        new = EfficientNetLite(**config).eval()
        inherit_(new, old, range(6), choose)
        with torch.no_grad():
            found[choose] = float((new(x) - old(x)).square().mean())
    assert found["importance"] < 0.5 * found["first"]


def test_groups_keep_what_lies_within_them() -> None:
    """Planted: each hidden channel is driven by one half of the inputs and read by one half of the outputs."""
    config = {"stem": 16, "head": 64, "stages": [[1, 3, 1, 16, 1], [4, 3, 1, 16, 2]]}
    old = tower(config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        first = old.blocks[0].project.conv.weight
        dealt = (
            torch.arange(16).view(2, 2, 4).transpose(0, 1).reshape(2, 8)
        )  # those that enter, to each half of the outputs
        first[:8, dealt[1]], first[8:, dealt[0]] = 0, 0
        for block in list(old.blocks)[1:]:
            order = torch.randperm(64, generator=draw)
            for cell in range(4):
                own = order[cell * 16 : (cell + 1) * 16]
                half, reading = slice(8, 16) if cell & 1 else slice(8), slice(8, 16) if cell & 2 else slice(8)
                block.expand.conv.weight[own, half] = 0
                read = torch.zeros(16, 1)
                read[reading] = 1
                block.project.conv.weight[:, own, 0, 0] *= read
    new = EfficientNetLite(**config, groups=2).eval()
    inherit_(new, old, range(3), "importance")
    x = pictures(side=32)
    with torch.no_grad():
        whole = old(x)
        assert torch.allclose(new(x), whole, atol=1e-4 * float(whole.abs().max()))
    assert sum(p.numel() for p in new.parameters()) < 0.75 * sum(p.numel() for p in old.parameters())


def test_separable_blocks_take_the_filters_that_each_channel_drives_most() -> None:
    """Planted: hidden channel 3 c + 1 passes channel c on, the others are silent, and nothing is cut off by ReLU6."""
    config = {"stem": 8, "head": 32, "stages": [[1, 3, 1, 8, 1], [3, 3, 1, 8, 1]]}
    old = tower(config)
    with torch.no_grad():
        block = old.blocks[1]
        for conv in (old.blocks[0].project.conv, block.expand.conv):
            conv.weight.abs_()
            conv.bias.zero_()
        own = torch.arange(8) * 3 + 1
        block.expand.conv.weight.zero_()
        block.expand.conv.weight[own, torch.arange(8), 0, 0] = 0.01
        block.depthwise.conv.weight.abs_()
        block.depthwise.conv.bias.zero_()
    made = designing.shape(config, Design(expansion=0.0), 32, 1.0, 0.0)
    assert [s[0] for s in made["stages"]] == [1, 1.0]
    new = EfficientNetLite(**made).eval()
    inherit_(new, old, range(2), "importance")
    with torch.no_grad():
        x = pictures(side=32)
        assert torch.allclose(new(x), old(x), atol=1e-4)
    assert not hasattr(new.blocks[1].expand, "conv")


# Choosing -----------------------------------------------------------------------------------------------------------


def test_the_design_nearest_to_the_teacher_is_taken(folder: Path) -> None:
    """Planted: the second block of a stage does nothing, so a student of fewer blocks says the same."""
    module = packlight.load(str(folder)).module
    with torch.no_grad():
        for index in (2, 3, 5):
            module.vision_model.blocks[index].project.conv.weight.zero_()
            module.vision_model.blocks[index].project.conv.bias.zero_()
    given = [{"pixel_values": pictures(6)}]
    design = Design(0.9, size=(64,), depth=(1.0, 0.34))
    assert [len(tower_of(module, 64, design, batches)[2]) for batches in ((), given)] == [6, 3]


# The whole road -----------------------------------------------------------------------------------------------------


def batches(model: Any, count: int = 5) -> list[Any]:
    pairs = [Pair(picture(i), (f"{['red', 'green', 'blue', 'dark'][i % 4]} dot",)) for i in range(4 * count)]
    return [model.family.prepare(model.module, pairs[k::count], [], [], model.settings) for k in range(count)]


STEP = Step("student_tower", {"share": 0.5, "size": [64, 32], "depth": [1.0, 0.5]})


def test_a_plan_with_a_student_is_deployed_and_loads_again(folder: Path, tmp_path: Path) -> None:
    model = packlight.load(str(folder))
    given = batches(model)
    depthwise = tuple(p for p, layer in model.layers().items() if getattr(layer, "groups", 1) > 1)
    lesson = Step("distill", {"epochs": 1, "losses": {"features": 2000}}, ("vision_model.*",))
    steps = (STEP, lesson, Step("float16", {}, depthwise), Step("error_feedback", {"rate": 5.0}), Step("float16"))
    plan = Plan(steps, family="dual-encoder")
    check(plan, model, "samples")
    records = compress_(model, plan, given, tmp_path / "waves")
    side = model.module.vision_model.size
    assert side < 64 and model.family.graphs(model.module)[0].args[0].shape[-1] == side
    assert cost(model.module.config.vision_config, side, "operations") <= 0.5 * cost(SMALL, 64, "operations")
    deploy(model, plan, records, tmp_path / "bundle", None, "")
    device = open_served(tmp_path / "bundle", 1)
    assert parity(model, device, given[:1])["passed"]
    again = packlight.load(str(tmp_path / "bundle"))
    assert again.settings["processor"](picture(1))["pixel_values"].shape[-1] == side
    own = batches(again, 2)
    with torch.no_grad():
        assert torch.equal(again.family.run(again.module, own[0]), model.family.run(model.module, own[0]))
    asked = (picture(3), ("a red dot",))
    theirs = torch.tensor(again.family.answer(again.module, asked, again.settings))
    assert (torch.tensor(device.reply(asked)) - theirs).abs().max() < 0.05
    twice = packlight.load(str(folder))  # a second call takes up what the first one made
    compress_(twice, plan, given, tmp_path / "waves")
    assert twice.edits == model.edits and twice.settings["image"] == model.settings["image"]
    assert all(torch.equal(t, twice.module.state_dict()[n]) for n, t in model.module.state_dict().items())


def test_a_student_by_description_is_a_folder_that_loads(folder: Path, tmp_path: Path) -> None:
    wanted = {"vision": {"share": 0.6, "size": 32}, "text_ffn": 32, "distill": {"epochs": 1}}
    (tmp_path / "student.json").write_text(json.dumps(wanted))
    data = save_pictures(tmp_path / "data", 24)
    found = distill(str(folder), tmp_path / "student.json", Options(calibration=data), tmp_path / "out")
    assert found["parameters"][1] < found["parameters"][0]
    made = packlight.load(str(tmp_path / "out"))
    assert made.settings["image"]["height"] == 32 == made.module.vision_model.size
    assert made.module.text_model.encoder.layer[0].intermediate.dense.out_features == 32


def test_a_teacher_is_worth_more_than_the_pairs_alone(folder: Path, tmp_path: Path) -> None:
    """The same student, the same pictures and steps: with its teacher it comes nearer to what the teacher says."""
    from packlight.techniques.distill import DistillConfig, distill_

    model = packlight.load(str(folder))
    given, after = batches(model, 10), {}
    for name, losses in (("teacher", {"features": 2000, "kl": 1}), ("pairs", {"contrastive": 1})):
        small = student(model, {"vision": {"share": 0.5, "size": 64}})
        config = DistillConfig(epochs=6, rate=5e-3, accumulate=2, patience=0, losses=losses)  # type: ignore[arg-type]
        found = distill_(
            small, copy.deepcopy(model.module), given, (config, ("vision*", "visual*"), 0), tmp_path / name
        )
        after[name] = found["after"]
        before = found["before"]
    assert after["teacher"] < 0.7 * before
    assert after["teacher"] < 0.8 * after["pairs"]


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"share": 1.0}, "share is 1.0"),
        ({"size": 100}, "multiples of 32"),
        ({"depth": 0}, "depth and width"),
        ({"expansion": 2}, "expansion is 2"),
        ({"groups": 0}, "groups is 0"),
        ({"unit": "bits"}, "unit must be"),
        ({"layers": 2}, "names layers"),
        ({"width": "x"}, "wrong type"),
        ([1], "no JSON object"),
    ],
)
def test_wrong_designs_are_refused(values: Any, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        design_of(values)


def test_what_cannot_be_had_is_refused(folder: Path) -> None:
    model = packlight.load(str(folder))
    for design, why in (
        (Design(0.02), "larger share"),
        (Design(size=(96,)), "its teacher's have 64"),
        (Design(groups=7), "7 groups do not divide"),
    ):
        with pytest.raises(PlanError, match=why):
            tower_of(model.module, 64, design)
    with pytest.raises(PlanError, match="no vision tower"):
        tower_of(torch.nn.Linear(1, 1), 64, Design())
    pruning = Step("prune_structure", {"channels": {"vision_model.blocks.1": 8}})
    with pytest.raises(PlanError, match="leave one out"):
        check(Plan((STEP, pruning, Step("float16")), family="dual-encoder"), model, "samples")
    with pytest.raises(PlanError, match="needs calibration"):
        check(Plan((STEP, Step("float16")), family="dual-encoder"), model)


def test_blocks_of_convolutions_are_not_compared_with_those_of_a_smaller_tower(folder: Path) -> None:
    model = packlight.load(str(folder))
    smaller = Step("student_tower", {"size": 32, "depth": 1, "width": 0.5}, ("vision_model.*",))
    for losses in ({"hidden": 1}, {"features": 1}):
        plan = Plan((smaller, Step("distill", {"losses": losses}, ("vision_model.*",))), "dual-encoder")
        if "hidden" in losses:
            with pytest.raises(PlanError, match="hidden compares outputs of blocks.*Leave it out"):
                check(plan, model, "given")
        else:
            check(plan, model, "given")
