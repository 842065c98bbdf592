"""Convolutions in integers throughout: planted integers, ranges, feedback, and the same bytes in ONNX Runtime."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import packlight
from packlight.compress import check, compress_
from packlight.deploy import deploy, parity
from packlight.errors import PlanError
from packlight.families import Graph
from packlight.layers import Edit, StaticConv, replace_
from packlight.observe import ranges
from packlight.plan import Plan, Step
from packlight.quant import LIMIT, channel_grid
from packlight.ranging import with_static
from packlight.runtimes import onnx_static
from packlight.runtimes.onnx import open_graphs, read_graph
from packlight.runtimes.onnx_export import export
from packlight.serve import open_served
from packlight.static import Range, fake, geometry_of, is_depthwise, kernel_of, range_of, rows_of, static_conv, taps_of
from packlight.techniques.static_int8 import (
    StaticConfig,
    choose_range,
    grouped_feedback,
    seen,
    static_int8,
)

CONVOLUTIONS = [
    nn.Conv2d(6, 10, 1),
    nn.Conv2d(6, 10, 3, stride=2, padding=1),
    nn.Conv2d(8, 8, 5, padding=2, groups=8),
    nn.Conv2d(8, 12, 3, groups=4, bias=False),
    nn.Conv2d(6, 10, (3, 5), padding="same"),
    nn.Conv1d(6, 10, 3, stride=2, padding=1),
]


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Layers that a test makes are the same, whichever tests ran before it."""
    torch.manual_seed(0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def input_of(conv: Any) -> Tensor:
    return noise(2, conv.in_channels, *([9, 12] if isinstance(conv, nn.Conv2d) else [31]))


def watched(root: nn.Module, path: str, x: Tensor) -> dict[str, Any]:
    """What a convolution's technique takes, from one pass."""
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), ranges(root, [path], sums):
        root(x)
    return seen(path, root.get_submodule(path), sums)


def compressed_(root: nn.Module, path: str, x: Tensor, config: StaticConfig | None = None) -> StaticConv:
    """Put a convolution in integers in the place of one in floats."""
    made = static_int8(rows_of(root.get_submodule(path)), None, config or StaticConfig(), **watched(root, path, x))
    layer = replace_(root, Edit(path, made.kind, made.args))
    for name, buffer in layer.named_buffers():
        buffer.copy_(made.tensors[name])
    assert isinstance(layer, StaticConv)
    return layer


# The integers -------------------------------------------------------------------------------------------------------


def test_a_planted_convolution_gives_the_integers_worked_out_by_hand() -> None:
    # Inputs in steps of 1/2 about byte 10, weights 3 and -2 in steps of 1/4, bias 7/8: sums are whole eighths.
    x = torch.tensor([[[[1.0, -2.5], [40.0, -40.0]]], [[[0.26, 0.24], [0.0, 122.5]]]])[:, :, :, :]
    codes, scale = torch.tensor([[3, -2]], dtype=torch.int8), torch.tensor([0.25, 0.25])
    y = static_conv(x, codes, scale, torch.tensor([0.875, 0.875]), [0.5, 10, 1.0, 100], [1, 1, 1, 1, 1, 0, 0])
    # bytes less 10: 2, -5, 80, -10 (below byte 0); 1, 0, 0, 245. Sums in eighths: 3 or -2 times that, plus 7.
    first = [13 / 8, -8 / 8, 247 / 8, -23 / 8, 10 / 8, 7 / 8, 7 / 8, 742 / 8]
    second = [3 / 8, 17 / 8, -153 / 8, 27 / 8, 5 / 8, 7 / 8, 7 / 8, -483 / 8]
    due = torch.stack([torch.tensor(v).round().view(2, 2, 2) for v in (first, second)], 1)
    assert torch.equal(y, due)


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_the_layer_is_the_convolution_within_its_steps(conv: Any) -> None:
    x, root = input_of(conv), nn.Sequential(conv)
    exact = conv(x).detach()
    layer = compressed_(root, "0", x, StaticConfig(range="all"))
    assert layer.weight.shape == conv.weight.shape
    error = (root(x) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03
    assert float(fake(layer(x), Range(layer.held[2], int(layer.held[3]))).sub(layer(x)).abs().max()) < 1e-6
    layer.activations = "float"
    assert torch.allclose(root(x), _dense(layer, conv, x), atol=1e-4)


def _dense(layer: StaticConv, conv: Any, x: Tensor) -> Tensor:
    """The float convolution with the weight that the codes stand for."""
    with torch.no_grad():
        conv.weight.copy_(layer.weight)
    return conv(x)


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_rows_and_windows_multiply_to_the_output(conv: Any) -> None:
    x = input_of(conv)
    taps, rows = taps_of(conv, x), rows_of(conv)
    made = taps @ rows.reshape(len(taps), -1, rows.shape[1]).transpose(1, 2)
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    out = conv(x)
    due = out.flatten(2).transpose(1, 2).reshape(-1, len(taps), conv.out_channels // len(taps)).transpose(0, 1)
    assert torch.allclose(made + bias.view(len(taps), 1, -1), due, atol=1e-4)
    assert torch.equal(kernel_of(rows.T, geometry_of(conv)), conv.weight)


# Ranges -------------------------------------------------------------------------------------------------------------


def test_a_range_holds_zero_and_its_ends() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 3.0), (-3.0, -0.5), (0.0, 0.0)):
        held = range_of(low, high)
        ends = torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)])
        rounded = fake(ends, held)
        assert float(rounded[1]) == 0
        assert float((rounded - ends).abs().max()) <= 0.51 * held.scale
    for scale, zero in ((0.0, 0), (-1.0, 0), (float("nan"), 0), (1.0, 256), (1.0, -1)):
        with pytest.raises(PlanError, match="range"):
            Range(scale, zero)


def test_a_calibrated_range_beats_that_of_an_outlier() -> None:
    values = torch.cat([noise(90_000).abs(), torch.tensor([10.0])])
    errors = {}
    for how in ("error", "all"):
        held = choose_range(values, how)
        errors[how] = float((fake(values, held) - values).square().sum())
    assert errors["error"] < 0.95 * errors["all"]
    assert float(fake(torch.tensor([10.0]), choose_range(values, "all"))) == pytest.approx(10, abs=0.03)
    assert float(fake(torch.tensor([10.0]), choose_range(values, "error"))) < 9.1


def test_what_is_padded_has_the_range_of_what_is_inside() -> None:
    root = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, groups=4))
    root.limits = (0.0, 6.0)
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), ranges(root, ["0", "1", "3"], sums):
        root(4 * noise(2, 3, 16, 16))
    assert torch.equal(sums["0.output"], sums["3.input"])
    assert "1.input" not in sums
    assert "0.taps" not in sums
    assert sums["3.taps"].shape == (4, 9, 9)


def test_a_convolution_that_nothing_went_through_is_refused() -> None:
    with pytest.raises(PlanError, match="no calibration sample"):
        seen("stem", nn.Conv2d(3, 4, 3), {})


# Codes --------------------------------------------------------------------------------------------------------------


def test_feedback_of_groups_beats_rounding_to_nearest() -> None:
    shares = []
    for seed in range(10):
        torch.manual_seed(seed)
        conv = nn.Conv2d(8, 8, 5, groups=8)
        x = noise(4, 8, 12, 12, seed=seed).cumsum(2).cumsum(3)  # neighbours are alike, as in pictures
        taps, rows = taps_of(conv, x), rows_of(conv)
        grid = channel_grid(rows, None, 7)
        codes = grouped_feedback(rows, taps.transpose(1, 2) @ taps, grid, 0.01)
        assert int(codes.abs().max()) <= 7
        losses = [(taps @ (grid.values(c) - rows)[:, :, None]).square().sum() for c in (codes, grid.codes(rows))]
        shares.append(float(losses[0] / losses[1]))
    assert max(shares) < 0.5
    assert sum(shares) < 0.3 * len(shares)


def test_only_depthwise_codes_use_the_whole_byte() -> None:
    for conv, limit in ((CONVOLUTIONS[2], 127), (CONVOLUTIONS[1], LIMIT), (CONVOLUTIONS[3], LIMIT)):
        x = input_of(conv)
        made = static_int8(rows_of(conv), None, StaticConfig(), **watched(nn.Sequential(conv), "0", x))
        assert int(made.tensors["codes"].abs().max()) == limit
    assert not is_depthwise(nn.Conv2d(8, 16, 3, groups=8))  # two filters a channel: another kernel, which may saturate


def test_a_channel_of_nothing_but_its_bias_keeps_it() -> None:
    conv = nn.Conv2d(4, 3, 1)
    conv.weight.data[1] = 1e-12
    conv.bias.data[1] = 1.25
    x, root = noise(2, 4, 8, 8), nn.Sequential(conv)
    due = conv(x)
    compressed_(root, "0", x, StaticConfig(range="all"))
    assert float((root(x) - due)[:, 1].abs().max()) < 0.03


def test_wrong_settings_are_refused() -> None:
    for wrong in ({"rate": 9.0}, {"range": "widest"}, {"damp": 0.0}):
        with pytest.raises(PlanError):
            StaticConfig(**wrong)
    with pytest.raises(PlanError, match="Linear"):
        rows_of(nn.Linear(3, 3))
    with pytest.raises(PlanError, match="dilation"):
        rows_of(nn.Conv2d(3, 3, 3, dilation=2))


# In the runtime -----------------------------------------------------------------------------------------------------


def run_in_onnx(root: nn.Module, x: Tensor, tmp_path: Path) -> tuple[np.ndarray, Counter[str]]:
    """The output of the exported module, and its kinds of nodes."""
    module = _Wrapped(root)
    graph, weights = export(Graph("g", module, (x,), ("x",), ("y",), {}), root)
    file = tmp_path / "g.onnx"
    file.write_bytes(graph)
    opened = open_graphs({"g": file}, lambda names: [(n, weights[n]) for n in names], 1)["g"]
    nodes = Counter(n.op_type for n in onnx.load_model_from_string(graph).graph.node)
    return opened.run({"x": x.numpy()})["y"].numpy(), nodes


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """One output."""
        return (self.inner(x),)


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_the_runtime_gives_the_same_bytes(conv: Any, tmp_path: Path) -> None:
    import copy

    root, x = nn.Sequential(copy.deepcopy(conv)), input_of(conv)
    layer = compressed_(root, "0", x)
    y, nodes = run_in_onnx(root, 1.3 * x, tmp_path)
    assert nodes["QLinearConv"] == 1
    with torch.no_grad():
        assert np.abs(y - root(1.3 * x).numpy()).max() < 1e-3 * layer.held[2]


class Chain(nn.Module):
    """Three convolutions, each clipped, with zeros put around in between, and a sum at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 3, 1)])
        self.limits = (0.0, 6.0)
        self.convs.limits = self.limits  # where observers look for them

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, h, w] to the same."""
        y = nn.functional.relu6(self.convs[0](x))
        y = nn.functional.relu6(self.convs[1](nn.functional.pad(y, (1, 1, 1, 1))))
        return x + nn.functional.relu6(self.convs[2](y))


def test_a_chain_stays_in_integers_and_a_range_that_differs_breaks_it(tmp_path: Path) -> None:
    root, x = Chain(), 4 * noise(1, 3, 16, 16)
    sums: dict[str, Tensor] = {}
    paths = [f"convs.{i}" for i in range(3)]
    with torch.no_grad(), ranges(root, paths, sums):
        root(x)
    for path in paths:
        layer = root.get_submodule(path)
        made = static_int8(rows_of(layer), None, StaticConfig(), **seen(path, layer, sums))
        new = replace_(root, Edit(path, made.kind, made.args))
        for name, buffer in new.named_buffers():
            buffer.copy_(made.tensors[name])
    y, nodes = run_in_onnx(root, x, tmp_path)
    assert (nodes["QLinearConv"], nodes["QuantizeLinear"], nodes["DequantizeLinear"], nodes["Pad"]) == (3, 1, 1, 0)
    with torch.no_grad():
        assert np.abs(y - root(x).numpy()).max() < 1e-5
    root.convs[1].held[0] *= 1.1
    y, nodes = run_in_onnx(root, x, tmp_path)
    assert nodes["QuantizeLinear"] == 2
    with torch.no_grad():
        assert np.abs(y - root(x).numpy()).max() < 1e-5


# On a whole model ---------------------------------------------------------------------------------------------------


def plan_of(model: Any, **config: Any) -> Plan:
    convs = tuple(p for p, layer in model.layers().items() if isinstance(layer, nn.Conv2d))
    steps = (Step("static_int8", config, convs), Step("error_feedback"), Step("float16"))
    return Plan(steps, family="dual-encoder")


def batch_of(model: Any, count: int = 8) -> dict[str, Tensor]:
    from packlight.families.dual_encoder import Pair
    from small_dual import picture

    pairs = [Pair(picture(i), ("a red square",)) for i in range(count)]
    return dict(model.family.prepare(model.module, pairs, [], [], model.settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_mobile_dual import save

    return Path(save(tmp_path_factory.mktemp("static") / "model"))


def test_the_bundle_agrees_with_torch_and_loads_again(folder: Path, tmp_path: Path) -> None:
    model = packlight.load(str(folder))
    batch, plan = batch_of(model), plan_of(model, rate=6.0)
    records = compress_(model, plan, [batch], tmp_path / "waves")
    deploy(model, plan, records, tmp_path / "bundle", None, "")
    served = open_served(tmp_path / "bundle", 1)
    found = parity(model, served, [batch])
    assert found["passed"]
    assert found["error"] < 1e-3
    nodes = Counter(
        n.op_type for n in onnx.load_from_string(read_graph(tmp_path / "bundle" / "image.onnx.gz")).graph.node
    )
    convs = sum(isinstance(m, StaticConv) for m in model.module.modules())
    assert nodes["QLinearConv"] == convs == 13
    assert nodes["QuantizeLinear"] < 6
    again = packlight.load(str(tmp_path / "bundle"))
    original = packlight.load(str(folder))
    with torch.no_grad():
        made = model.family.run(model.module, batch)
        assert torch.equal(again.family.run(again.module, batch), made)
        exact = original.family.encode(original.module, batch)["states"]
        ours = model.family.encode(model.module, batch)["states"]
        assert float((ours - exact).norm() / exact.norm()) < 0.05

    again = packlight.load(str(folder))
    compress_(again, plan, [batch], tmp_path / "waves")  # an interrupted run goes on with what is kept
    with torch.no_grad():
        assert torch.equal(again.family.run(again.module, batch), made)


def test_a_lowering_that_forgets_the_zero_point_is_caught(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packlight.load(str(folder))
    batch, plan = batch_of(model), plan_of(model)
    records = compress_(model, plan, [batch], tmp_path / "waves")
    right = onnx_static._constant
    monkeypatch.setattr(onnx_static, "_constant", lambda v, kind: right(0 if kind is np.uint8 else v, kind))
    deploy(model, plan, records, tmp_path / "bundle", None, "")
    found = parity(model, open_served(tmp_path / "bundle", 1), [batch])
    assert not found["passed"]
    assert found["graph"] == "image"


def test_layers_that_are_no_convolutions_are_refused_before_any_work(folder: Path) -> None:
    model = packlight.load(str(folder))
    with pytest.raises(PlanError, match="Linear"):
        check(
            Plan((Step("static_int8", {}, ("visual_projection",)), Step("float16")), family="dual-encoder"), model, "x"
        )


def test_fixed_ranges_are_measured_for_towers_of_convolutions_and_nothing_is_left_changed(
    folder: Path, tmp_path: Path
) -> None:
    model = packlight.load(str(folder))
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    batch = batch_of(model)
    rounding = {"vision convolutions": {"int8": 1.0}, "text attention": {"int8": 2.0}}
    found = with_static(rounding, model, ([batch], [batch]), tmp_path / "static.jsonl")
    assert found["text attention"] == {"int8": 2.0}
    assert found["vision convolutions"]["int8"] == 1
    assert 1e-9 < found["vision convolutions"]["static"] < 0.1
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert with_static(rounding, model, ([], []), tmp_path / "static.jsonl") == found  # kept, not measured again
