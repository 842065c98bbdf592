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


# Positions ----------------------------------------------------------------------------------------------------------


def test_positions_cost_what_their_gradients_say(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(information, "_FEW", 1)
    model = fresh(small_whisper.save_model(tmp_path / "model"))
    head, given = "model.decoder.layers.1.encoder_attn.k_proj", batches(4)
    found = row_costs(model, given, [FC, head], every=True)
    inputs = {FC: 0, head: 0}
    for path in inputs:
        handle = model.module.get_submodule(path).register_forward_pre_hook(
            lambda m, args, path=path: inputs.__setitem__(path, inputs[path] + args[0][..., 0].numel())
        )
        with torch.no_grad():
            for batch in given:
                model.family.run(model.module, batch)
        handle.remove()
    for path, count in inputs.items():
        cost = found[f"{path}.positions"]
        assert cost.shape == (count,) and (cost >= 0).all() and float(cost.mean()) == pytest.approx(1, rel=1e-5)
    # Both are sums over the same squares: by rows and by positions.
    assert found[f"{FC}.use"].numel() == model.module.get_submodule(FC).out_features
    assert not any(k.endswith(".positions") for k in row_costs(model, given, [FC]))
    monkeypatch.undo()  # so few positions are too few to choose among
    assert f"{FC}.positions" not in row_costs(model, given, [FC], every=True)


def test_positions_that_no_word_comes_from_cost_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(information, "_FEW", 0.01)
    model = fresh(small_whisper.save_model(tmp_path / "model"))
    for layer in model.module.model.decoder.layers:  # the decoder looks at nothing but the encoder's first positions
        layer.encoder_attn.forward = _only_first(layer.encoder_attn.forward, 5)
    cost = row_costs(model, batches(1), ["model.encoder.layers.1.fc2"], every=True)[
        "model.encoder.layers.1.fc2.positions"
    ]
    assert (cost[:5] > 0).all() and not cost[5:].any()


def _only_first(forward, count):
    def run(hidden, key_value_states=None, **rest):
        return forward(hidden, key_value_states=key_value_states[:, :count], **rest)

    return run


def test_weighted_gram_matrices_are_sums_over_positions_in_order() -> None:
    layer = torch.nn.Linear(6, 3)
    parts = [torch.randn(1, n, 6) for n in (4, 7)]
    weights = torch.rand(11)
    with torch.no_grad(), grams({"a": layer}, {"a": weights}) as sums:
        for part in parts:
            layer(part)
    rows = torch.cat(parts, 1)[0]
    assert torch.allclose(sums["a"], (rows.T @ torch.diag(weights) @ rows).double(), atol=1e-5)
    with torch.no_grad(), grams({"a": layer}, {"a": weights[:5]}):  # weights of other batches
        layer(parts[0])
        with pytest.raises(ValueError, match="more positions"):
            layer(parts[1])


def test_errors_go_to_where_they_cost_least() -> None:
    torch.manual_seed(0)
    speech, silence = (torch.randn(400, 32) @ torch.randn(32, 32) for _ in range(2))
    weight = torch.randn(64, 32)

    def loss(share: float) -> float:
        gram = speech.T @ speech * (1 + share * 0.9) + silence.T @ silence * (1 - share * 0.9)
        made = feedback(weight, gram.double(), CodesConfig(rate=2.0, columns=True, damp=0.002))
        return float(((made.approximation - weight) @ speech.T).square().sum())

    assert loss(1.0) < 0.85 * loss(0.0) < 0.85 * loss(-1.0)


def test_weighing_positions_is_refused_where_no_words_are_written(dual) -> None:
    from packlight.compress import check
    from packlight.errors import PlanError
    from packlight.plan import Plan, Step

    model, _, _ = dual
    step = Step("error_feedback", {"rate": 3, "positions": 0.5}, ("*",))
    with pytest.raises(PlanError, match="models that write text only"):
        check(Plan((step,), model.family.name), model, "any")
