"""SigLIP 2 NaFlex: pictures of any shape as patches, equal to transformers', and one graph for all of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

import packlight
from packlight.compress import compress_
from packlight.deploy import deploy, parity
from packlight.errors import BundleError, ModelError
from packlight.families.dual_encoder import Pair, content_of, embed_text, run
from packlight.patches import PatchSettings, grid, patches, resizing
from packlight.plan import Plan, Step
from packlight.serve import open_served
from small_dual import TEXT, VISION, picture

SETTINGS = PatchSettings(8, 24, 4, 2, (1 / 127.5,) * 3, (-1.0,) * 3)
TEXTS = ("a red square on the light dot", "Blue.", "")


LETTERS = "▁abcdefghijklmnopqrstuvwxyz.,!"


def write_tokenizer(folder):
    """One of the class of SigLIP 2, which knows letters and puts capitals in lower case."""
    from transformers import Siglip2Tokenizer

    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS)
    vocabulary = {name: i for i, name in enumerate(names)}
    Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right", model_max_length=16).save_pretrained(folder)


def save_model(folder):
    import transformers as t

    torch.manual_seed(0)
    vision = {**{k: v for k, v in VISION.items() if k != "image_size"}, "num_patches": 16}
    text = {**TEXT, "projection_size": 32, "vocab_size": len(LETTERS) + 5}
    folder.mkdir(parents=True)
    t.Siglip2Model(t.Siglip2Config(text_config=text, vision_config=vision)).eval().save_pretrained(folder)
    write_tokenizer(folder)
    t.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("naflex") / "model")


def shaped(high, wide, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (high, wide, 3), dtype=np.uint8)


SHAPES = [(48, 64), (64, 48), (8, 500), (500, 8), (1, 1), (3, 1000), (2000, 1500), (33, 65)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [SETTINGS, PatchSettings(16, 256, 16, 2, (1 / 127.5,) * 3, (-1.0,) * 3)])
def test_patches_are_those_of_transformers(shape, settings):
    from transformers import Siglip2ImageProcessorPil

    theirs = Siglip2ImageProcessorPil(patch_size=settings.patch, max_num_patches=settings.most)
    image = shaped(*shape)
    found = theirs(images=Image.fromarray(image), return_tensors="np")
    count = int(found["pixel_attention_mask"][0].sum())
    ours = patches(image, settings)
    assert ours["pixel_values"].shape[1] == count <= settings.most
    assert tuple(found["spatial_shapes"][0]) == grid(*shape, settings)
    assert np.abs(found["pixel_values"][0][:count] - ours["pixel_values"][0]).max() < 1e-4


@pytest.mark.parametrize("size", [(4, 6), (2, 11), (1, 24), (7, 3), (16, 16)])
def test_positions_are_resized_as_torch_resizes_them(size):
    table = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0))
    due = functional.interpolate(table.permute(2, 0, 1)[None], size=size, mode="bilinear", antialias=True)[0]
    rows, columns = (torch.from_numpy(resizing(4, n)) for n in size)
    assert torch.allclose(torch.einsum("ri,cj,ijd->drc", rows, columns, table), due, atol=1e-5)


def test_vectors_and_logits_are_those_of_the_models_own_forward(folder):
    from transformers import AutoImageProcessor

    model = packlight.load(str(folder))
    # Not one patch wide: to that width PyTorch 2.13 resizes every row to the first's values.
    pictures = [shaped(*shape) for shape in SHAPES if grid(*shape, SETTINGS)[1] > 1]
    batch = model.family.prepare(model.module, [Pair(p, (TEXTS[0],)) for p in pictures], [], [], model.settings)
    theirs = AutoImageProcessor.from_pretrained(folder)(
        images=list(map(Image.fromarray, pictures)), return_tensors="pt"
    )
    with torch.no_grad():
        own = model.module(input_ids=batch["input_ids"], **theirs)
        images, words = content_of(model.module, batch), embed_text(model.module, batch["input_ids"])
        logits = run(model.module, batch)
    assert torch.allclose(images, own.image_embeds, atol=1e-5) and torch.allclose(words, own.text_embeds, atol=1e-5)
    due = torch.log_softmax(torch.cat([own.logits_per_image, own.logits_per_text]), -1)
    assert torch.allclose(torch.log_softmax(logits, -1), due, atol=1e-4)


@pytest.mark.parametrize("codes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_bundle_gives_the_originals_vectors_for_pictures_of_every_shape(folder, tmp_path, codes):
    model = packlight.load(str(folder))
    pairs = [Pair(picture(i), (TEXTS[i % 2],)) for i in range(8)]
    batch = model.family.prepare(model.module, pairs, [], [], model.settings)
    steps = (Step("error_feedback", {"rate": None}),) if codes else ()
    plan = Plan((*steps, Step("float16")), family="dual-encoder")
    records = compress_(model, plan, [batch], tmp_path / "waves")
    deploy(model, plan, records, tmp_path / "bundle", None, "")
    device, original = open_served(tmp_path / "bundle", 1), packlight.load(str(folder))
    assert parity(model, device, [batch])["passed"]
    for shape in SHAPES[:6]:
        pair = (shaped(*shape), TEXTS)
        theirs = np.array(original.family.answer(original.module, pair, original.settings))
        assert np.abs(np.array(device.reply(pair)) - theirs).max() < (0.15 if codes else 3e-3)
    again = packlight.load(str(tmp_path / "bundle"))  # the bundle as a PyTorch model
    with torch.no_grad():
        assert torch.equal(again.family.run(again.module, batch), model.family.run(model.module, batch))
    assert np.array_equal(device.encoder.embed_text("Red DOT"), device.encoder.embed_text("red dot"))


def test_other_settings_and_processors_are_refused(folder, tmp_path):
    import shutil

    assert PatchSettings.from_dict(SETTINGS.to_dict()) == SETTINGS
    for wrong in ({"patch": 0}, {"most": 10**6}, {"gain": [1.0]}, {"offset": [0.0, 0.0, float("nan")]}, {"more": 1}):
        with pytest.raises(BundleError):
            PatchSettings.from_dict({**SETTINGS.to_dict(), **wrong})
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = next(f for f in copy.glob("*.json") if "max_num_patches" in f.read_text())
    values = json.loads(file.read_text())
    (values.get("image_processor") or values).update(do_resize=False)
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="processor"):
        packlight.load(str(copy))


def test_a_teacher_is_compared_with_inside_its_towers(folder, tmp_path):
    from packlight.lessons import School, lesson, points

    model = packlight.load(str(folder))
    pairs = [Pair(shaped(high, wide), (TEXTS[0],)) for high, wide in SHAPES[:2]]
    batch = model.family.prepare(model.module, pairs, [], [], model.settings)
    inside = points(model.family, model.module, model.module, True, True)
    school = School(model.family, model.module, model.module, model.settings, [batch], inside, tmp_path)
    given, aim = lesson(school, 0)  # the positions of its patches are a matrix, and none of them is left out
    with torch.no_grad():
        now = school.studied(given)
    assert {n: v.shape for n, v in now.items()} == {n: v.shape for n, v in aim.items()}
    assert {"hidden.vision.0", "values.vision", "hidden.text.1"} < set(aim)
    assert torch.allclose(now["hidden.vision.1"], aim["hidden.vision.1"], atol=2e-3)
