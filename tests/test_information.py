"""What errors in rows cost: dead rows cost nothing, known curvature is found, and steps that follow it are better."""

import pytest

pytest.importorskip("torch")

import torch

import packlight.information as information
import small_whisper
from packlight.applying import Options, calibration_batches, divide
from packlight.data import prompted, read_dataset
from packlight.information import bits_between, row_costs
from packlight.loading import load
from packlight.observe import grams
from packlight.techniques.codes import CodesConfig, feedback
from small_dual import save_model, save_pictures
from small_pruning import batches, divergence, fresh, kill_units_, logits

FC = "model.encoder.layers.1.fc1"


def test_a_row_that_nothing_reads_costs_least_and_the_model_stays(tmp_path) -> None:
    model = fresh(small_whisper.save_model(tmp_path / "model"))
    kill_units_(model.module, "model.encoder.layers.1", range(3, 9))
    before = {k: (v.clone(), v.requires_grad) for k, v in model.module.named_parameters()}
    found = row_costs(model, batches(4), [FC])
    assert {*found} == {f"{FC}.use"}
    cost = found[f"{FC}.use"]
    dead = torch.zeros(len(cost), dtype=torch.bool)
    dead[3:9] = True
    least = float(cost.mean()) * information._LEAST / (1 + information._LEAST)
    assert torch.allclose(cost[dead], torch.tensor(least, dtype=cost.dtype)) and (cost[~dead] > 1.01 * least).all()
    for name, parameter in model.module.named_parameters():
        assert parameter.equal(before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert row_costs(model, batches(4), [FC])[f"{FC}.use"].equal(cost)  # the same seed draws the same words


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("dual")
    model = load(str(save_model(folder / "model")))
    data = prompted(read_dataset(save_pictures(folder / "data", 40)), needed=False)
    observed, judged = divide(calibration_batches(model, data, Options(), folder, None))
    return model, observed, judged


def test_vectors_have_the_curvature_of_their_length(dual, monkeypatch) -> None:
    """Of v = y / |y|, JᵀJ = (1 - v vᵀ) / |y|², so the costs of the last projection's rows are known."""
    model, observed, _ = dual
    monkeypatch.setattr(information, "_PROJECTIONS", 200)
    with torch.no_grad():
        vectors = [model.module.text_projection(model.module.text_model(**_texts(b)).pooler_output) for b in observed]
    wanted = sum(
        ((1 - torch.nn.functional.normalize(y, dim=-1) ** 2) / y.square().sum(-1, keepdim=True)).sum(0) for y in vectors
    )
    found = row_costs(model, observed, ["text_projection"])["text_projection.use"]
    found = found / found.mean() * (1 + information._LEAST) - information._LEAST
    assert torch.allclose(found, (wanted / wanted.mean()).double(), rtol=0.25)


def _texts(batch):
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def _error(model, judged, path, made) -> float:
    """How far the vectors of texts move when a layer has other weights."""
    weight = model.module.get_submodule(path).weight
    kept = weight.detach().clone()
    with torch.no_grad():
        right = [model.family.sides(model.module, b)[1] for b in judged]
        weight.copy_(made)
        moved = sum(
            float((model.family.sides(model.module, b)[1] - r).square().sum())
            for b, r in zip(judged, right, strict=True)
        )
        weight.copy_(kept)
    return moved


def test_steps_that_follow_costs_are_better_than_even_and_than_the_opposite(tmp_path) -> None:
    """What is made of hidden units differs between them: those that count get smaller steps at the same rate."""
    model = fresh(small_whisper.save_model(tmp_path / "model"))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(3)
        reader = model.module.get_submodule(FC.replace("fc1", "fc2")).weight
        reader *= torch.randn(reader.shape[1], generator=draw).exp()
    given, judged = batches(6), batches(6, seed=1)
    original, layer = logits(model, judged), model.module.get_submodule(FC)
    with torch.no_grad(), grams({FC: layer}) as sums:
        logits(model, given)
    cost, weight = row_costs(model, given, [FC])[f"{FC}.use"], layer.weight.detach().clone()
    errors = []
    for known in (cost, None, 1 / cost):
        made = feedback(weight, sums[FC], CodesConfig(2.0, columns=True, use=0.35), known)
        assert made.rate == pytest.approx(2.0, abs=0.15)
        with torch.no_grad():
            layer.weight.copy_(made.approximation)
            errors.append(divergence(model, original, judged))
            layer.weight.copy_(weight)
    assert errors[0] < 0.85 * errors[1] and errors[1] < 0.7 * errors[2], errors


def test_a_table_moves_errors_to_columns_that_cost_less(dual) -> None:
    model, observed, judged = dual
    (table,) = model.family.tables
    weight = model.layers()[table].weight.detach()
    gram = row_costs(model, observed, [table])[table]
    assert gram.shape == (weight.shape[1],) * 2 and torch.equal(gram, gram.T)
    opposite = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)))
    use = torch.ones(len(weight), dtype=torch.float64)
    errors = [
        _error(model, judged, table, feedback(weight, g, CodesConfig(2.0, columns=True, use=0.35), use).approximation)
        for g in (gram, None, opposite)
    ]
    assert errors[0] < 0.9 * errors[1] < errors[2]


def test_bits_go_to_the_layers_whose_outputs_count(tmp_path) -> None:
    """One layer's output is read ten times as strongly as another's: it gets log2(10) bits more, and the loss is less."""
    model = fresh(small_whisper.save_model(tmp_path / "model"))
    other = FC.replace("layers.1", "layers.0")
    with torch.no_grad():
        model.module.get_submodule(other.replace("fc1", "fc2")).weight *= 0.1
    given, judged = batches(6), batches(6, seed=1)
    layers = {p: model.module.get_submodule(p) for p in (FC, other)}
    weights = {p: layer.weight.detach().clone() for p, layer in layers.items()}
    with torch.no_grad(), grams(layers) as sums:
        original = logits(model, judged)
        logits(model, given)
    sums = {**sums, **row_costs(model, given, layers)}
    found = bits_between(weights, sums, 0.01, 0.35)
    assert found[FC] == pytest.approx(-found[other]) and found[FC] > 0.8
    errors = []
    for sign in (1, 0, -1):
        with torch.no_grad():
            for path, layer in layers.items():
                config = CodesConfig(3.0 + sign * found[path], columns=True, use=0.35)
                layer.weight.copy_(feedback(weights[path], sums[path], config, sums[f"{path}.use"]).approximation)
            errors.append(divergence(model, original, judged))
            for path, layer in layers.items():
                layer.weight.copy_(weights[path])
    assert errors[0] < 0.85 * errors[1] and errors[1] < 0.85 * errors[2], errors
    assert bits_between({FC: weights[FC]}, sums, 0.01, 0.35) == {}
