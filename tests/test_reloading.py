"""From a bundle back to PyTorch: the same logits by packlight.load, and folders that transformers loads unchanged."""

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

import packlight
import small_dual
from packlight.bundle import HISTORY, MANIFEST, open_bundle
from packlight.compress import compress_
from packlight.deploy import deploy
from packlight.errors import BundleError
from packlight.layers import KINDS, CodeLinear, Edit
from packlight.loading import load as load_folder
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.reloading import floats
from packlight.runtimes.onnx import read_graph
from packlight.serve import open_served
from packlight.unpacking import unpack
from small_whisper import save_model
from test_whole_model import batches, merging_tokenizer, pruning

TABLE = ("model.decoder.embed_tokens", "proj_out")
STEPS = {
    "floats": (Step("float16"),),
    "codes": (
        Step("error_feedback", {"activations": "int8_rows"}, ("model.*layers*", "model.*conv*")),
        Step("float16"),
    ),
    "columns": (Step("error_feedback", {"rate": 3.0, "columns": True, "activations": "float"}), Step("float16")),
    "groups": (
        Step("group_weights", {"bits": 8}, TABLE),
        Step("group_weights", {"bits": 4, "group": 16}, ("*.fc?", "*conv*")),
        Step("round_to_nearest", {}, ("*attn*",)),
        Step("float16"),
    ),
    "pruned": (pruning(), Step("round_to_nearest", {"activations": "float"}, TABLE), Step("float16")),
    "short": (
        Step("audio_context", {"near": 20, "middle": 4, "far": 8}, ("model.encoder.layers.*",)),
        Step("round_to_nearest", {"activations": "float"}, ("*.fc?",)),
        Step("float16"),
    ),
}


def made(folder: Path, name: str) -> tuple[Model, Path]:
    """A compressed Whisper and its bundle."""
    model = load_folder(str(save_model(folder / "model")))
    if name == "pruned":
        model.tokenizer = merging_tokenizer()
    data = [{**b, "spoken": torch.tensor(40)} for b in batches(3)]
    for b in data:
        b["decoder_input_ids"][b["decoder_input_ids"] < 150] %= 100
    plan = Plan(STEPS[name], "whisper")
    compress_(model, plan, data, folder / "work")
    return model, deploy(model, plan, [], folder / "bundle", None, "transcribe").path


@pytest.fixture(scope="module", params=list(STEPS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    return made(tmp_path_factory.mktemp(request.param), request.param)


def probe(model: Model) -> dict[str, Tensor]:
    first = model.settings["decoder_start_token_id"]
    batch = {**batches(1, 7)[0], "spoken": torch.tensor(40)}
    return {**batch, "decoder_input_ids": torch.tensor([[first, first + 1, 3, 9, 12]])}


@torch.no_grad()
def test_a_bundle_becomes_the_model_that_was_deployed(pair: tuple[Model, Path]) -> None:
    model, bundle = pair
    again = packlight.load(str(bundle))
    batch = probe(model)
    assert torch.allclose(
        again.family.run(again.module, batch), model.family.run(model.module, batch), atol=1e-6, rtol=0
    )
    assert again.settings == model.settings
    assert json.loads(again.tokenizer) == json.loads(model.tokenizer)
    assert again.edits == model.edits
    assert again.source.architecture == "WhisperForConditionalGeneration"
    assert not any(p.is_meta for p in [*again.module.parameters(), *again.module.buffers()])


@torch.no_grad()
def test_its_graphs_agree_with_the_model_that_was_loaded_from_it(pair: tuple[Model, Path]) -> None:
    from packlight.deploy import parity

    _, bundle = pair
    again = packlight.load(str(bundle))
    assert parity(again, open_served(bundle, 1), [probe(again)])["passed"]
    assert b"Softmax" not in read_graph(bundle / "decoder.onnx.gz")  # its attention is one operation
    floating = all(not isinstance(m, CodeLinear) or m.activations == "float" for m in again.module.modules())
    if floating:
        assert parity(again, open_served(bundle, 1), [probe(again)])["error"] < 1e-3


@torch.no_grad()
def test_transformers_loads_what_was_unpacked(pair: tuple[Model, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    model, bundle = pair
    found = unpack(bundle, tmp_path / "folder")
    assert open_bundle(bundle).manifest["reload"] == "transformers"
    theirs, report = AutoModelForSpeechSeq2Seq.from_pretrained(found.path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    theirs.eval()
    batch = probe(model)
    logits = theirs(input_features=batch["input_features"], decoder_input_ids=batch["decoder_input_ids"]).logits[0, 1:]
    plain = packlight.load(str(bundle))
    for layer in plain.module.modules():
        if isinstance(layer, CodeLinear):
            layer.activations = "float"
    plain.module.config.audio_context = None
    assert torch.allclose(plain.family.run(plain.module, batch), logits, atol=1e-5)
    assert theirs.generation_config.eos_token_id == model.settings["eos_token_id"]
    assert AutoProcessor.from_pretrained(found.path).feature_extractor.feature_size == 80
    ours = packlight.load(str(found.path))
    assert ours.settings == model.settings
    ours.module.config.audio_context = None
    assert torch.allclose(ours.family.run(ours.module, batch), logits, atol=1e-5)


def test_a_dual_encoder_comes_back_by_both_ways(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = load_folder(str(small_dual.save_model(tmp_path / "model")))
    plan = Plan(
        (Step("round_to_nearest", {"activations": "float"}, ("*.layer*", "*projection*")), Step("float16")),
        "dual-encoder",
    )
    compress_(model, plan, [], tmp_path / "work")
    bundle = deploy(model, plan, [], tmp_path / "bundle", None, "").path
    again = packlight.load(str(bundle))
    pairs = [small_dual.picture(i) for i in range(3)]
    content = (pairs[0], ["a red dot", "blue"])
    answers = [m.family.answer(m.module, content, m.settings, None, "") for m in (model, again)]
    assert np.allclose(answers[0], answers[1], atol=1e-6)
    assert np.allclose(open_served(bundle, 1).reply(content), answers[0], atol=1e-3)
    found = unpack(bundle, tmp_path / "folder")
    theirs = AutoModel.from_pretrained(found.path).eval()
    own = load_folder(str(found.path))
    pixels = own.settings["processor"](pairs[0])["pixel_values"]
    with torch.no_grad():
        a, b = (m.get_image_features(pixel_values=pixels) for m in (theirs, again.module))
    first, second = (x if isinstance(x, Tensor) else x.pooler_output for x in (a, b))
    assert torch.allclose(first, second, atol=1e-5)
    assert np.allclose(own.family.answer(own.module, content, own.settings, None, ""), answers[0], atol=1e-5)


def test_a_model_that_its_config_cannot_say_is_only_packlights(tmp_path: Path) -> None:
    from torch import nn

    model = load_folder(str(save_model(tmp_path / "model")))
    block = model.module.model.encoder.layers[1]
    block.fc1, block.fc2 = nn.Linear(64, 96), nn.Linear(96, 64)  # one layer narrower than the others
    bundle = deploy(model, Plan((Step("float16"),), "whisper"), [], tmp_path / "bundle", None, "transcribe").path
    assert open_bundle(bundle).manifest["reload"] == "packlight"
    with pytest.raises(BundleError, match=r"only packlight\.load reads it"):
        unpack(bundle, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_edits_start_from_the_config_that_was_there_before_them(tmp_path: Path) -> None:
    model = load_folder(str(save_model(tmp_path / "model")))
    model.edit_(Edit("model.encoder.conv2", "grouped", {"groups": 2}))
    model.module.config.decoder_ffn_dim = 100  # as a step that narrows layers says it after its edits
    bundle = deploy(model, Plan((Step("float16"),), "whisper"), [], tmp_path / "bundle", None, "transcribe").path
    assert open_bundle(bundle).manifest["model"]["base"] == {"decoder_ffn_dim": 128}
    again = packlight.load(str(bundle))
    assert again.module.config.decoder_ffn_dim == 100
    assert again.module.model.decoder.layers[0].fc1.out_features == 128


@pytest.mark.skipif("drop_layer" not in KINDS, reason="no step takes layers out yet")
def test_a_model_with_fewer_layers_is_transformers_own(tmp_path: Path) -> None:
    from packlight.structure import update_config_

    model = load_folder(str(save_model(tmp_path / "model")))
    model.edit_(Edit("model.encoder.layers.0", "drop_layer"))
    update_config_(model.module, model.family.towers)
    bundle = deploy(model, Plan((Step("float16"),), "whisper"), [], tmp_path / "bundle", None, "transcribe").path
    again = packlight.load(str(bundle))
    with torch.no_grad():
        assert torch.equal(again.family.run(again.module, probe(model)), model.family.run(model.module, probe(model)))
    assert load_folder(str(unpack(bundle, tmp_path / "folder").path)).module.config.encoder_layers == 1


@pytest.mark.skipif("low_rank" not in KINDS, reason="no step factors layers yet")
def test_factors_and_narrower_layers_come_back_by_packlight_alone(tmp_path: Path) -> None:
    model = load_folder(str(save_model(tmp_path / "model")))
    model.edit_(Edit("model.encoder.layers.0.fc1", "low_rank", {"rank": 16}))
    block = "model.encoder.layers.1"
    args = {"keep": 96, "size": 1, "rows": [f"{block}.fc1"], "columns": f"{block}.fc2", "attributes": {}}
    model.edit_(Edit(block, "hidden", args))
    bundle = deploy(model, Plan((Step("float16"),), "whisper"), [], tmp_path / "bundle", None, "transcribe").path
    assert open_bundle(bundle).manifest["reload"] == "packlight"
    again = packlight.load(str(bundle))
    with torch.no_grad():
        assert torch.equal(again.family.run(again.module, probe(model)), model.family.run(model.module, probe(model)))


# Hostile manifests --------------------------------------------------------------------------------------------------


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown kind": (lambda m: m["edits"].append({"path": "proj_out", "kind": "magic", "args": {}}), "kind 'magic'"),
    "path outside": (lambda m: m["edits"][0].update(path="../../etc"), "an edit that is none"),
    "private path": (lambda m: m["edits"][0].update(path="__class__.mro"), "does not fit"),
    "no path": (lambda m: m["edits"][0].update(path="model.encoder.layers.9.fc1"), "does not fit"),
    "further keys": (lambda m: m["edits"][0].update(run="rm"), "an edit that is none"),
    "wide": (lambda m: m["config"].update(d_model=2**40), "in the weights; the model wants|gives no"),
    "wider than numbers": (lambda m: m["config"].update(d_model=2**70), "gives no|in the weights"),
    "deep": (lambda m: m["config"].update(encoder_layers=10**9), "more than 1024 layers"),
    "negative": (lambda m: m["config"].update(d_model=-64), "gives no"),
    "huge groups": (lambda m: m["edits"][0].update(kind="groups", args={"bits": 2**60, "group": 2**60}), "does not fit|in the weights"),
    "other array": (lambda m: m["tensors"].update({"model.encoder.conv1.bias": {"array": "nothing"}}), "lack nothing"),
    "wrong array": (lambda m: m["tensors"].update({"model.encoder.conv1.bias": {"array": "model.encoder.embed_positions.weight"}}), "in the weights"),
    "no array": (lambda m: m["tensors"].update({"model.encoder.conv1.bias": 3}), "says no array"),
    "other files": (lambda m: m["files"].update({"../evil.json": {}}), "files that are not ours"),
    "not objects": (lambda m: m.update(config=[1]), "must be an object"),
}  # fmt: skip


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("hostile"), "codes")[1]


def rewritten(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the manifest and the history say, and pack it again as the writer does."""
    values = open_bundle(bundle).manifest
    change(values)
    packed = {key: values.pop(key) for key in ("plan", "records", "model") if key in values}
    data = gzip.compress(json.dumps(packed).encode())
    (bundle / HISTORY).write_bytes(data)
    values["files"][HISTORY] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_manifests_are_refused(coded: Path, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(coded, bundle)
    change, words = HOSTILE[name]
    rewritten(bundle, lambda values: change(values["model"]))
    with pytest.raises(BundleError, match=words):
        packlight.load(str(bundle))


def test_a_bundle_without_a_description_says_so(coded: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(coded, bundle)
    rewritten(bundle, lambda values: (values.pop("model"), values.pop("reload")))
    with pytest.raises(BundleError, match="holds no description"):
        packlight.load(str(bundle))
    open_served(bundle, 1)  # it still runs


def test_unpack_leaves_a_folder_in_use_alone(coded: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="nothing was written"):
        unpack(coded, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_float_weights_are_those_of_the_codes(coded: Path) -> None:
    model = packlight.load(str(coded))
    layer = model.module.model.encoder.layers[0].fc1
    assert torch.equal(floats(model.module)["model.encoder.layers.0.fc1.weight"], (layer.codes.float() * layer.scale).T)


def test_eval_and_fit_take_an_unpacked_folder(coded: Path, tmp_path: Path) -> None:
    from packlight.applying import Options
    from packlight.benching import evaluate_one
    from packlight.evaluate import Asked
    from packlight.fitting import fit
    from packlight.target import Target
    from small_whisper import save_speech

    folder = unpack(coded, tmp_path / "folder").path
    speech = save_speech(tmp_path / "speech", 8)
    assert evaluate_one(str(folder), speech, Asked(threads=1))["n"] == 8
    found = fit(str(folder), speech, Target(size=10_000_000), tmp_path / "out", Options(threads=1))
    assert found.met
