"""Running a plan: checked first, wave by wave, taken up again after a stop; and the graphs that come of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from packlight import compress
from packlight.compress import check, compress_
from packlight.errors import BundleError, PlanError
from packlight.families import Batch, Graph, whisper
from packlight.information import row_costs
from packlight.layers import CodeLinear
from packlight.model import Model, Source
from packlight.observe import grams
from packlight.plan import Plan, Step
from packlight.quant import LIMIT, distortion
from packlight.runtimes.onnx import open_graphs
from packlight.runtimes.onnx_export import export
from packlight.runtimes.onnx_wire import external_names
from packlight.windows import matrix

REST = Step("float16")
CODES = Step("error_feedback", {"rate": 5.0}, ("model.encoder.conv*", "model.*coder.layers.*"))
WIDE = {"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
EXPORTED: dict[str, tuple[Step, ...]] = {
    "codes": (Step("round_to_nearest", {"activations": "float"}),),
    "groups": (Step("group_weights", {"bits": 4, "group": 32, "feedback": False}),),
}


def fresh(**changes: Any) -> Model:
    source = Source("tiny", "", "huggingface", "WhisperForConditionalGeneration", None, "mit", "float32", "0", 0)
    return Model(whisper.tiny(**changes), whisper.FAMILY, source, "{}", {})


def calibration() -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    return [
        {
            "input_features": torch.randn(1, 80, 3000, generator=generator),
            "decoder_input_ids": torch.randint(0, 200, (1, 12), generator=generator),
            "first": torch.tensor(1),
        }
        for _ in range(2)
    ]


def distortions(technique: str, gram_of: dict[str, torch.Tensor], work: Path) -> dict[str, float]:
    """What a technique does to each layer's output, measured with the same Gram matrices whatever the technique."""
    model, original = fresh(), fresh()
    scope = ("model.encoder.layers.*", "model.decoder.layers.*")
    compress_(model, Plan((Step(technique, {"rate": 3.0}, scope),)), calibration(), work)
    found = {}
    for path, gram in gram_of.items():
        layer = model.module.get_submodule(path)
        weight = (layer.codes.float() * layer.scale).T  # type: ignore[operator, union-attr]
        found[path] = distortion(matrix(original.module.get_submodule(path)), weight, gram)
    return found


# The check before any work -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original() -> Model:
    return fresh()


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (Plan((Step("magic"),)), "Step 1.*magic.*Known.*error_feedback"),
        (Plan((REST, Step("round_to_nearest", {"bits": 4}))), "Step 2.*no setting bits.*rate"),
        (Plan((Step("round_to_nearest", {"rate": 9.0}),)), "rate is 9"),
        (Plan((Step("round_to_nearest", {"rate": "four"}),)), "wrong type"),
        (Plan((Step("round_to_nearest", {"activations": "int4"}),)), "int4"),
        (Plan((Step("group_weights", {"bits": 3}),)), "4 or 8"),
        (Plan((Step("group_weights", {"group": 33}),)), "33"),
        (Plan((Step("error_feedback", {"damp": 0.0}),)), "damp"),
        (Plan((Step("round_to_nearest", scope=("encoder.*",)),)), r"encoder\.\*.*inspect"),
        (Plan((Step("round_to_nearest", scope=("proj_out",)), REST)), "one step must take both"),
        (Plan((Step("round_to_nearest", scope=("*embed_tokens",)),)), "one step must take both"),
        (Plan((REST,), family="llava"), "llava.*whisper"),
        (Plan((Step("error_feedback"),)), "calibration samples.*--data"),
        (Plan((Step("group_weights"),)), "calibration samples.*--data"),
    ],
)
def test_check_refuses_a_plan_with_what_is_wrong(original: Model, plan: Plan, named: str) -> None:
    with pytest.raises(PlanError, match=named):
        check(plan, original)


def test_check_refuses_other_calibration_samples(original: Model) -> None:
    plan = Plan((Step("error_feedback"),), calibration={"sha256": "a" * 64})
    with pytest.raises(PlanError, match="Name the same samples"):
        check(plan, original, "b" * 64)
    assert check(plan, original, "a" * 64)


def test_check_gives_each_layer_to_the_first_step_that_names_it(original: Model) -> None:
    plan = Plan((Step("float16", scope=("*.fc1",)), Step("round_to_nearest", scope=("model.encoder.*",)), REST))
    found = check(plan, original)
    assert found.keys() == original.layers().keys()
    assert found["model.encoder.layers.1.fc1"].technique.name == "float16"
    assert found["model.encoder.layers.1.fc2"].technique.name == "round_to_nearest"
    assert found["model.decoder.layers.1.fc2"].technique.name == "float16"


def test_check_needs_no_samples_when_no_layer_does(original: Model) -> None:
    assert check(Plan((Step("round_to_nearest"),)), original)


# Carrying it out ------------------------------------------------------------------------------------------------------


def test_a_run_stopped_after_a_wave_ends_like_one_that_was_not(tmp_path: Path) -> None:
    plan, batches = (
        Plan((CODES, Step("error_feedback", {"rate": 6.0}, ("*embed_tokens", "proj_out")), REST)),
        calibration(),
    )
    whole = fresh()
    records = compress_(whole, plan, batches, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_(fresh(), plan, batches, tmp_path / "stopped", stop)
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "stopped").glob("wave_*.safetensors")}
    assert sorted(kept) == ["wave_000.safetensors", "wave_001.safetensors"]

    calls: list[tuple[int, int]] = []
    resumed = fresh()
    again = compress_(resumed, plan, batches, tmp_path / "stopped", lambda what, n, total: calls.append((n, total)))
    assert again == records
    assert calls == [(n, 7) for n in range(1, 8)]
    assert all((tmp_path / "stopped" / name).stat().st_mtime_ns == t for name, t in kept.items())
    assert [asdict(e) for e in resumed.edits] == [asdict(e) for e in whole.edits]
    expected, got = whole.module.state_dict(), resumed.module.state_dict()
    assert expected.keys() == got.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, got[name])] == []


def test_plans_of_one_model_share_what_errors_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def counted(*args: Any) -> dict[str, torch.Tensor]:
        measured.append(1)
        return row_costs(*args)

    monkeypatch.setattr(compress, "row_costs", counted)

    def run(name: str, batches: list[Batch], shared: bool = True, other: bool = False, **config: Any) -> Model:
        model = fresh()
        if other:
            next(model.module.parameters()).data[0] += 0.1
        step = Step("error_feedback", {"rate": 3.0, "use": 0.5, "positions": 0.5, **config}, CODES.scope)
        compress_(model, Plan((step, REST)), batches, tmp_path / name, None, tmp_path / "costs" if shared else None)
        return model

    batches = calibration()
    run("first", batches)
    taken = run("second", batches, activations="float")
    assert len(measured) == 1  # the same model, the same samples
    alone = run("alone", batches, shared=False, activations="float").module.state_dict()
    assert [n for n, t in taken.module.state_dict().items() if not torch.equal(t, alone[n])] == []
    run("changed", batches, other=True)
    run("fewer", batches[:1])
    assert len(measured) == 4  # another model, other samples: their costs are their own


def test_error_feedback_distorts_less_than_rounding_at_the_same_rate(tmp_path: Path) -> None:
    original = fresh()
    layers = {p: layer for p, layer in original.layers().items() if ".layers." in p}
    with torch.no_grad(), grams(layers) as sums:
        for batch in calibration():
            whisper.run(original.module, batch)
    assert len(sums) == 2 * 6 + 2 * 10
    rounded = distortions("round_to_nearest", sums, tmp_path / "rounded")
    fed = distortions("error_feedback", sums, tmp_path / "fed")
    worse = [p for p in fed if fed[p] >= rounded[p]]
    assert not worse
    assert np.mean(list(fed.values())) < 0.8 * np.mean(list(rounded.values()))


def test_records_say_what_happened_to_every_layer(tmp_path: Path) -> None:
    model = fresh()
    sizes = {path: layer.weight.numel() for path, layer in model.layers().items()}  # type: ignore[union-attr]
    records = compress_(model, Plan((CODES, REST)), calibration(), tmp_path)
    assert sorted(r.path for r in records) == sorted(sizes)
    for record in records:
        assert record.parameters == (0 if record.path == "proj_out" else sizes[record.path])
        if record.technique == "error_feedback":
            assert record.rate == pytest.approx(5.0, abs=0.3) and 0 < record.distortion < 0.01
        assert record.part != "other"


def test_float16_steps_leave_floats_that_float16_holds(tmp_path: Path) -> None:
    model = fresh()
    compress_(model, Plan((REST,)), [], tmp_path)
    assert not model.edits
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, parameter.half().float()), name


def test_a_tied_head_shares_its_tables_codes(tmp_path: Path) -> None:
    model = fresh()
    compress_(model, Plan(EXPORTED["codes"]), [], tmp_path)
    table, head = model.module.model.decoder.embed_tokens, model.module.proj_out  # type: ignore[union-attr]
    assert table.codes.data_ptr() == head.codes.data_ptr()  # type: ignore[union-attr, operator]
    assert table.scale.data_ptr() == head.scale.data_ptr()  # type: ignore[union-attr, operator]


# The exported graphs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(EXPORTED))
def exported(request: Any, tmp_path_factory: Any) -> tuple[Model, dict[str, Graph], dict[str, tuple[bytes, Any]]]:
    model = fresh(**WIDE)
    compress_(model, Plan(EXPORTED[request.param]), calibration()[:1], tmp_path_factory.mktemp("work"))
    graphs = {g.name: g for g in whisper.graphs(model.module)}
    return model, graphs, {name: export(g, model.module) for name, g in graphs.items()}


def inputs_of(graph: Graph) -> list[torch.Tensor]:
    """Other inputs than those it was exported with: random, and with another number of tokens in the cache."""
    generator = torch.Generator().manual_seed(8)
    made = []
    for name, arg in zip(graph.inputs, graph.args, strict=True):
        shape = [5 if axis in graph.dynamic.get(name, {}) else n for axis, n in enumerate(arg.shape)]
        whole = arg.dtype == torch.long
        made.append(
            torch.randint(0, 200, shape, generator=generator) if whole else torch.randn(shape, generator=generator)
        )
    return made


def float_kernels(data: bytes) -> bytes:
    """The same graph with MatMulNBits told to compute in floats instead of rounding its inputs to 8 bits."""
    import onnx

    model = onnx.load_from_string(data)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return model.SerializeToString()


@pytest.mark.parametrize(("change", "bound"), [(float_kernels, 1e-4), (bytes, 3e-2)], ids=["float", "shipped"])
def test_the_graphs_agree_with_torch(exported: Any, tmp_path: Path, change: Any, bound: float) -> None:
    _, graphs, made = exported
    coded = not any("packed" in name for name in made["encoder"][1])
    bound = 1e-4 if coded else bound  # only grouped weights are multiplied with rounded inputs
    files = {name: tmp_path / f"{name}.onnx" for name in made}
    for name, file in files.items():
        file.write_bytes(change(made[name][0]))
    weights = {k: v for _, arrays in made.values() for k, v in arrays.items()}
    opened = open_graphs(files, lambda names: ((n, weights[n]) for n in names), 1)
    for name, graph in graphs.items():
        args = inputs_of(graph)
        with torch.no_grad():
            expected = graph.module(*args)
        got = opened[name].run({n: a.numpy() for n, a in zip(graph.inputs, args, strict=True)})
        for output, tensor in zip(graph.outputs, expected, strict=True):
            assert got[output].numpy().shape == tuple(tensor.shape)
            error = np.abs(got[output].numpy() - tensor.numpy()).max()
            assert error < bound * max(1.0, float(tensor.abs().max())), f"{name} {output}: {error}"


def test_integers_stay_integers_and_no_float_copy_of_them_is_kept(exported: Any) -> None:
    model, _, made = exported
    weights = {k: v for _, arrays in made.values() for k, v in arrays.items()}
    state = model.module.state_dict()
    large = {n: t for n, t in state.items() if n.endswith((".codes", ".packed"))}
    assert len(large) == 2 * 6 + 2 * 10 + 2 + 2 + 2
    pointers = {t.data_ptr() for n, t in state.items() if n in weights}
    assert [n for n, t in large.items() if t.data_ptr() not in pointers] == []
    for name, array in weights.items():
        last = name.rpartition(".")[2]
        if last in ("codes", "packed", "zeros"):
            assert array.dtype == (np.int8 if last == "codes" else np.uint8) and np.array_equal(array, state[name]), (
                name
            )
        if last == "codes":
            assert np.abs(array.astype(int)).max() <= LIMIT
        if array.dtype.kind == "f":  # scales, biases, norms: far fewer than the codes of the smallest matrix
            assert last != "weight" or "norm" in name, name
            assert array.size < 128 * 128, f"{name}: {array.shape}"


def test_small_codes_with_float_activations_stay_integers_too() -> None:
    layer = CodeLinear(64, 64, False, "float")
    _, arrays = export(Graph("one", layer, (torch.ones(1, 64),), ("x",), ("y",), {}), layer)
    assert arrays["codes"].dtype == np.int8


def test_weights_are_shared_by_name_and_few_beside_the_codes(exported: Any) -> None:
    _, _, made = exported
    shared = made["encoder"][1].keys() & made["decoder"][1].keys()
    for name in shared:
        assert np.array_equal(made["encoder"][1][name], made["decoder"][1][name])
    for data, arrays in made.values():
        assert sorted(set(external_names(data))) == sorted(arrays)
        assert len(data) < 400_000


def test_exporting_twice_gives_the_same_bytes(exported: Any) -> None:
    model, _, made = exported
    graph = next(g for g in whisper.graphs(model.module) if g.name == "encoder")
    data, arrays = export(graph, model.module)
    assert data == made["encoder"][0]
    assert arrays.keys() == made["encoder"][1].keys()
    assert all(np.array_equal(array, made["encoder"][1][name]) for name, array in arrays.items())


def test_open_refuses_graphs_that_lack_weights_or_are_cut_short(exported: Any, tmp_path: Path) -> None:
    data, arrays = exported[2]["encoder"]
    file = tmp_path / "encoder.onnx"
    file.write_bytes(data)
    lacking = dict(list(arrays.items())[1:])
    with pytest.raises(BundleError, match="expects 1 weights that the bundle lacks"):
        open_graphs({"encoder": file}, lambda names: lacking.items(), 1)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError):
        open_graphs({"encoder": file}, lambda names: arrays.items(), 1)


def test_a_tower_is_only_said_to_be_idle_after_a_look_at_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    from packlight import compress

    looked: list[Any] = []

    def silent(model: Any, batches: Any) -> list[str]:
        looked.extend(batches)
        return [name for name in ("vision", "text") if not any(name in batch for batch in batches)] if batches else []

    monkeypatch.setattr(compress, "silent", silent)
    model: Any = None
    some, both, every = {"vision": 1}, {"vision": 1, "text": 1}, {"text": 2}
    assert compress._unexercised(model, [some, some, both, every]) == []
    assert looked == [some, some, both]
    assert compress._unexercised(model, [some, every]) == []
    assert compress._unexercised(model, [some, some]) == ["text"]
    assert compress._unexercised(model, []) == []
