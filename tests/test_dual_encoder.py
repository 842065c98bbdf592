"""Every dual encoder goes the whole way with its own towers: float weights give the original's vectors on the device."""

import numpy as np
import pytest
import torch
from torch import nn

import packlight
from packlight.compress import check, compress_
from packlight.deploy import deploy, parity
from packlight.errors import ModelError
from packlight.families.dual_encoder import Pair, embed_content, embed_text, run
from packlight.plan import Plan, Step
from packlight.serve import open_served
from small_dual import KINDS, picture, save_model

TEXTS = (
    "a red square on the light dot",
    "Blue.",
    "",
    "green green green green green green green green green green green green green green green green green",
)
PAIRS = [Pair(picture(i), (TEXTS[i % 2],)) for i in range(8)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {kind: save_model(base / kind, kind) for kind in KINDS}


def served(folder, path, codes):
    """(the original, the compressed model, the open bundle) of one plan."""
    model = packlight.load(str(folder))
    whole = tuple(p for p, layer in model.layers().items() if getattr(layer, "groups", 1) > 1)
    steps = [Step("float16", {}, whole)] if whole else []
    steps += [Step("error_feedback", {"rate": None})] if codes else []
    batch = model.family.prepare(model.module, PAIRS, [], [], model.settings)
    plan = Plan((*steps, Step("float16")), family="dual-encoder")
    records = compress_(model, plan, [batch], path / "waves")
    deploy(model, plan, records, path / "bundle", None, "")
    return packlight.load(str(folder)), model, open_served(path / "bundle", 1), batch


SLOW = [k if k == "siglip" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]


@pytest.mark.parametrize("kind", SLOW)
def test_float_weights_give_the_originals_vectors_without_torch(folders, tmp_path, kind):
    original, _, device, _ = served(folders[kind], tmp_path, codes=False)
    for i in range(3):
        pair = (picture(i), TEXTS)
        theirs = np.array(original.family.answer(original.module, pair, original.settings))
        ours = np.array(device.reply(pair))
        assert np.abs(theirs - ours).max() < 3e-3  # float16 weights
        assert np.linalg.norm(ours, axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", [k if k == "align" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_codes_give_in_the_runtime_what_they_give_in_torch(folders, tmp_path, kind):
    original, model, device, batch = served(folders[kind], tmp_path, codes=True)
    assert parity(model, device, [batch])["passed"]
    # Not one layer that could hold codes is left out, patches and convolutions among them.
    left = [p for p, layer in model.layers().items() if getattr(layer, "groups", 1) == 1]
    assert left == []
    theirs = np.array(original.family.answer(original.module, PAIRS[0], original.settings))
    assert 0 < np.abs(np.array(device.reply(PAIRS[0])) - theirs).max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_a_part_and_each_part_its_tower(folders, kind):
    model = packlight.load(str(folders[kind]))
    names = {tower.name for tower in model.family.towers}
    for path in model.layers():
        part = model.family.part_of(path)
        assert part is not None and part.tower in names
        assert [t.name for t in model.family.towers if t.has(path)] == [part.tower]
    for tower in model.family.towers:
        assert isinstance(model.module.get_submodule(tower.blocks), nn.ModuleList)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_logits_are_those_of_the_models_own_forward(folders, kind):
    model = packlight.load(str(folders[kind]))
    batch = model.family.prepare(model.module, PAIRS, [], [], model.settings)
    with torch.no_grad():
        out = model.module(**batch)
        image = embed_content(model.module, batch["pixel_values"])
        text = embed_text(model.module, batch["input_ids"], batch.get("attention_mask"))
        logits = run(model.module, batch)
    assert torch.allclose(image, out.image_embeds, atol=1e-5) and torch.allclose(text, out.text_embeds, atol=1e-5)
    # SigLIP adds a bias, which no softmax sees.
    theirs = torch.log_softmax(torch.cat([out.logits_per_image, out.logits_per_text]), -1)
    assert torch.allclose(torch.log_softmax(logits, -1), theirs, atol=1e-4)


def test_a_layer_that_is_no_matrix_is_refused_by_codes_and_taken_by_float16(folders):
    model = packlight.load(str(folders["align"]))
    with pytest.raises(packlight.errors.PlanError, match="convolutions"):
        check(Plan((Step("round_to_nearest"),), family="dual-encoder"), model)


def test_a_processor_that_the_device_cannot_repeat_is_refused(folders, tmp_path):
    import json
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(folders["clip"], folder)
    file = next(f for f in folder.glob("*.json") if "image_mean" in f.read_text())
    values = json.loads(file.read_text())
    (values.get("image_processor") or values).update(do_pad=True, pad_size={"height": 48, "width": 48})
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="processor"):
        packlight.load(str(folder))


def test_pictures_are_prepared_by_pillow_also_where_torchvision_is_installed(folders, monkeypatch):
    from transformers.models.auto import image_processing_auto as auto

    from packlight.families.dual_processing import _image_processor

    chosen, pick = [], auto._load_class_with_fallback
    monkeypatch.setattr(auto, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(auto, "_load_class_with_fallback", lambda m, b: chosen.append(b) or pick(m, b))
    assert type(_image_processor(folders["clip"]).original).__name__.endswith("Pil")
    assert chosen == ["pil"]


def test_a_transformers_without_backends_is_asked_for_slow_processors(monkeypatch):
    from transformers.models.auto import image_processing_auto as auto

    from packlight.families.dual_processing import _by_pillow

    monkeypatch.delattr(auto, "_resolve_backend")
    assert _by_pillow() == {"use_fast": False}


def test_a_tokenizer_json_of_another_model_is_refused(folders, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(folders["siglip"], folder)
    text = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(text.replace('"model_max_length": 16', '"model_max_length": 8'))
    assert packlight.load(str(folder)).settings["text"]["max_tokens"] == 8
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        packlight.load(str(folder))


def named_siglip(folder):
    """The folder with a tokenizer of the class that Google's first checkpoints name, which needs SentencePiece."""
    import json

    values = json.loads((folder / "tokenizer_config.json").read_text())
    values |= {"tokenizer_class": "SiglipTokenizer", "pad_token": {"content": "[PAD]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("spiece", [False, True])
def test_siglips_tokenizer_is_read_from_its_tokenizer_json_without_sentencepiece(tmp_path, monkeypatch, spiece):
    from transformers import AutoTokenizer

    def refuse(*args, **kwargs):
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library. Install it")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    folder = named_siglip(save_model(tmp_path / "model", "siglip"))
    if spiece:
        (folder / "spiece.model").write_bytes(b"not read")
    original, _, device, _ = served(folder, tmp_path / "made", codes=False)
    assert original.settings["text"] == {"max_tokens": 16, "pad_to": 16, "pad": 0, "canonical": True}
    ids = original.settings["tokenizer"](["  A red, DOT.", "a red dot"])["input_ids"]
    assert ids[0].tolist() == ids[1].tolist() == [1, 12, 4, 11, 2] + [0] * 11
    again = packlight.load(str(tmp_path / "made" / "bundle"))
    pair = (picture(0), ["A red, DOT!", "blue"])
    theirs = np.array(original.family.answer(original.module, pair, original.settings))
    assert np.array(again.family.answer(again.module, pair, again.settings)) == pytest.approx(theirs, abs=3e-3)
    assert np.array(device.reply(pair)) == pytest.approx(theirs, abs=3e-3)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        ModelError, match=r"\(SiglipTokenizer requires the SentencePiece library\). Put the model's own tok"
    ):
        packlight.load(str(folder))


def test_a_tokenizer_json_that_does_not_end_texts_as_siglips_does_is_refused(tmp_path):
    import json

    folder = named_siglip(save_model(tmp_path / "model", "siglip"))
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | {"post_processor": None}))
    with pytest.raises(ModelError, match="does not end a text"):
        packlight.load(str(folder))


def test_what_makes_a_tokenizer_json_is_named(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    from packlight.families.pretrained import tokenizer_json

    def refuse(*args, **kwargs):
        raise ImportError("\nThis needs SentencePiece. Read on\nand on")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"\(This needs SentencePiece\).*pip install sentencepiece protobuf"):
        tokenizer_json(tmp_path)


@pytest.mark.parametrize("kind", ["siglip", "vit_bert"])
def test_samples_of_several_batches_are_compared_with_all_others(folders, kind):
    from packlight.applying import together

    model = packlight.load(str(folders[kind]))
    made = [Pair(picture(i), (TEXTS[i % 2],)) for i in range(20)]  # texts of two lengths, more than run at once
    batches = [model.family.prepare(model.module, made[i : i + 5], [], [], model.settings) for i in range(0, 20, 5)]
    batches[0]["input_ids"] = batches[0]["input_ids"][:, : 5 if kind == "vit_bert" else None]  # the first ends early
    if kind == "vit_bert":
        batches[0]["attention_mask"] = batches[0]["attention_mask"][:, :5]
    (joint,) = together(model.family, batches)
    with torch.no_grad():
        sides = [model.family.sides(model.module, b) for b in batches]
        first, second = (torch.cat([s[i] for s in sides]) for i in (0, 1))
        logits = run(model.module, joint)
        again = run(model.module, model.family.encode(model.module, joint))
    scaled = sides[0][2] * first @ second.T
    assert logits.shape == (40, 20)
    assert torch.allclose(logits, torch.cat([scaled, scaled.T]), atol=1e-4)
    assert torch.equal(again, logits)
    assert together(model.family, batches[:1]) == batches[:1]
