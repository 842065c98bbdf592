"""Every kind of dual encoder that fits comes back to PyTorch: by packlight.load, and as the folder that it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import packlight
import small_dual
import small_sound
import test_dual_patches
import test_mobile_dual
from packlight.bundle import open_bundle
from packlight.compress import compress_
from packlight.deploy import deploy
from packlight.errors import BundleError
from packlight.freezing import freeze
from packlight.layers import Edit
from packlight.loading import load as load_folder
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.serve import open_served
from packlight.tables import FAMILIES
from packlight.unpacking import unpack

OTHERS = {"siglip2": test_dual_patches.save_model, "clap": small_sound.save_model, "own": test_mobile_dual.save}
TEXTS = ["a red dot", "blue"]


def saved(folder: Path, kind: str) -> Path:
    return OTHERS[kind](folder) if kind in OTHERS else small_dual.save_model(folder, kind)


def compressed(folder: Path, kind: str) -> tuple[Model, Path]:
    """A model whose text tower is codes and whose other tower is float16, and its bundle."""
    model = load_folder(str(saved(folder / "model", kind)))
    codes = Step("round_to_nearest", {"activations": "float"}, ("text_model.*",))
    plan = Plan((codes, Step("float16")), "dual-encoder")
    compress_(model, plan, [], folder / "work")
    return model, deploy(model, plan, [], folder / "bundle", None, "").path


def answer(model: Model) -> np.ndarray:
    content = small_sound.sound(1) if model.source.architecture == "ClapModel" else small_dual.picture(1)
    return np.array(model.family.answer(model.module, (content, TEXTS), model.settings, None, ""))


def test_every_architecture_of_the_family_is_tried_here() -> None:
    family = next(f for f in FAMILIES if f.name == "dual-encoder")
    assert len(family.architectures) == len((*small_dual.KINDS, *OTHERS))


@pytest.mark.parametrize("kind", [*small_dual.KINDS, *OTHERS])
def test_a_dual_encoder_comes_back_by_both_ways(tmp_path: Path, kind: str) -> None:
    model, bundle = compressed(tmp_path, kind)
    due = answer(model)
    again = packlight.load(str(bundle))
    assert again.edits == model.edits and len(model.edits) > 5
    assert np.allclose(answer(again), due, atol=1e-6)
    found = unpack(bundle, tmp_path / "folder")
    reader = "packlight" if kind == "own" else "transformers"
    assert open_bundle(bundle).manifest["reload"] == reader
    assert f"`{'packlight.load' if kind == 'own' else 'transformers'}` loads" in (found.path / "README.md").read_text()
    ours = load_folder(str(found.path))
    assert not ours.edits and np.allclose(answer(ours), due, atol=1e-5)
    assert {k: v for k, v in ours.settings.items() if not callable(v)} == {
        k: v for k, v in model.settings.items() if not callable(v)
    }
    if kind != "own":
        compare_with_transformers(found.path, ours, due)


@torch.no_grad()
def compare_with_transformers(folder: Path, ours: Model, due: np.ndarray) -> None:
    from transformers import AutoModel

    theirs: Any
    theirs, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = ours.settings["tokenizer"](TEXTS[:1])["input_ids"]
    found = theirs.eval().get_text_features(input_ids=ids)
    vector = found if isinstance(found, torch.Tensor) else found.pooler_output
    assert np.allclose(torch.nn.functional.normalize(vector, dim=-1)[0].numpy(), due[1], atol=1e-5)


def test_a_smaller_tower_of_our_own_keeps_its_smaller_pictures(tmp_path: Path) -> None:
    vision = {"stem": 16, "head": 64, "stages": [[1, 3, 1, 16, 1], [4, 3, 2, 24, 2]]}
    model = load_folder(str(test_mobile_dual.save(tmp_path / "model", vision, side=64)))
    plan = Plan((Step("student_tower", {"share": 0.2, "size": 32}), Step("float16")), "dual-encoder")
    compress_(model, plan, [], tmp_path / "work")
    bundle = deploy(model, plan, [], tmp_path / "bundle", None, "").path
    ours = load_folder(str(unpack(bundle, tmp_path / "folder").path))
    assert ours.settings["image"]["height"] == 32
    assert np.allclose(answer(ours), answer(model), atol=1e-5)


def test_what_our_own_config_cannot_say_is_refused(tmp_path: Path) -> None:
    model = load_folder(str(test_mobile_dual.save(tmp_path / "model")))
    model.edit_(Edit("text_model.encoder.layer.0.intermediate.dense", "low_rank", {"rank": 4}))
    bundle = deploy(model, Plan((Step("float16"),), "dual-encoder"), [], tmp_path / "bundle", None, "").path
    with pytest.raises(BundleError, match=r"no config of PacklightDualEncoder can say"):
        unpack(bundle, tmp_path / "folder")
    assert not list(tmp_path.glob("folder*"))


def test_frozen_classes_say_why_they_are_no_model(tmp_path: Path) -> None:
    _, bundle = compressed(tmp_path, "own")
    frozen = freeze(open_served(bundle, 1), ("red", "green"), tmp_path / "frozen").path
    with pytest.raises(BundleError, match="has frozen classes and no text tower"):
        unpack(frozen, tmp_path / "folder")
    with pytest.raises(BundleError, match="has frozen classes and no text tower"):
        packlight.load(str(frozen))
