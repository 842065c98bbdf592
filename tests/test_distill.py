"""The technique distill on small models: a student recovers, better with a teacher than without, and refuses nonsense."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from packlight.compress import check, compress_
from packlight.context import AudioContext
from packlight.errors import DataError, PlanError
from packlight.families import whisper
from packlight.families.whisper_augment import vary
from packlight.lessons import School, lesson, points
from packlight.loading import load
from packlight.plan import Plan, Step
from packlight.techniques.distill import DistillConfig, check_distill, distill_, trained
from small_dual import picture
from small_dual import save_model as save_dual
from small_whisper import save_model

FAST = DistillConfig(epochs=8, rate=5e-3, accumulate=2, filter=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small Whisper on a window of a second, whose answers are sharp enough to lose something."""
    model = load(str(save_model(tmp_path_factory.mktemp("distill") / "model")))
    module = whisper.tiny(vocab_size=153, max_source_positions=50)
    draw = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.3 if "embed_tokens" in name else 0.12, generator=draw)
    return replace(model, module=module)


def batches(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "input_features": torch.randn(1, 80, 100, generator=draw),
            "spoken": torch.tensor(20),
            "decoder_input_ids": torch.cat([torch.tensor([[151, 152]]), torch.randint(0, 150, (1, 6), generator=draw)], 1),
            "first": torch.tensor(1),
        }
        for _ in range(count)
    ]  # fmt: skip


def damaged(original: Any) -> Any:
    """A student that lost half of its hidden units."""
    student = replace(original, module=copy.deepcopy(original.module))
    for tower in (student.module.model.encoder, student.module.model.decoder):
        for layer in tower.layers:
            layer.fc2.weight.data[:, ::2] = 0
    return student


def test_a_student_recovers_and_repeats_bit_by_bit(original: Any, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        student = damaged(original)
        found = distill_(student, original.module, batches(15), (FAST, ("*",), 0), tmp_path / name)
        made.append((found, student.module.state_dict()))
    assert made[0][0]["after"] < 0.5 * made[0][0]["before"]
    assert made[0][0] == made[1][0]
    assert all(torch.equal(t, made[1][1][n]) for n, t in made[0][1].items())


def test_a_teacher_is_worth_more_than_its_words_alone(original: Any, tmp_path: Path) -> None:
    data = batches(15)
    for b in data:  # the teacher's own words
        with torch.no_grad():
            said = original.family.run(original.module, b).argmax(-1)[:-1]
        b["decoder_input_ids"] = torch.cat([b["decoder_input_ids"][:, :2], said[None]], 1)
    after = {}
    for name, losses in (("teacher", None), ("words", {"words": 1.0})):
        found = distill_(
            damaged(original), original.module, data, (replace(FAST, losses=losses), ("*",), 0), tmp_path / name
        )
        after[name] = found["after"]
    assert after["teacher"] < 0.8 * after["words"]


def test_only_what_the_scope_names_moves(original: Any, tmp_path: Path) -> None:
    student = damaged(original)
    before = copy.deepcopy(student.module.state_dict())
    distill_(student, original.module, batches(5), (replace(FAST, epochs=1), ("model.encoder.*.fc?",), 0), tmp_path)
    moved = {n for n, t in student.module.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and all("encoder" in n and ".fc" in n for n in moved)
    assert set(trained(student.module, ("*.bias",))) == {
        n for n, _ in student.module.named_parameters() if n.endswith("bias")
    }


def test_a_student_that_sees_less_is_compared_at_the_places_that_it_sees(original: Any, tmp_path: Path) -> None:
    student = replace(original, module=copy.deepcopy(original.module))
    whisper.shorten_(student.module, AudioContext(4, 2, 3))
    school = School(original.family, student.module, original.module, {}, batches(1), points(
        original.family, student.module, original.module, True, True), tmp_path)  # fmt: skip
    batch, aim = lesson(school, 0)
    places = original.family.inputs(student.module, batch)["positions"]
    with torch.no_grad():
        whole = original.family.encode(original.module, batch)["states"]
        assert torch.allclose(aim["hidden.states"], whole[:, places], atol=2e-3)
        now = school.studied(batch)
    assert {n: t.shape for n, t in now.items()} == {n: t.shape for n, t in aim.items()}
    assert {"values.encoder", "values.decoder", "hidden.encoder.0", "hidden.decoder.1"} < set(aim)


def test_a_narrower_student_is_compared_through_a_map_that_is_thrown_away(original: Any, tmp_path: Path) -> None:
    from packlight.inheriting import student

    small = student(original, {"heads": 1, "encoder_layers": [1]})
    found = distill_(small, original.module, batches(10), (replace(FAST, epochs=4), ("*",), 0), tmp_path)
    assert found["after"] < found["before"]
    assert not any("map" in n for n, _ in small.module.named_parameters())


def test_bad_words_are_left_out_and_counted(original: Any, tmp_path: Path) -> None:
    data = batches(6)
    data[2]["decoder_input_ids"] = torch.tensor([[151, 152, *([4, 9, 6] * 8)]])  # planted
    student, config = damaged(original), replace(FAST, epochs=1, filter=True)
    import packlight.distilling as d

    least, d.LEAST_LOG_PROBABILITY = d.LEAST_LOG_PROBABILITY, -1e9  # a random model is sure of nothing
    try:
        found = distill_(student, original.module, data, (config, ("*",), 0), tmp_path)
    finally:
        d.LEAST_LOG_PROBABILITY = least
    assert sum(found["left_out"].values()) == 1
    with pytest.raises(PlanError, match="6: the teacher is unsure"):
        distill_(student, original.module, data, (config, ("*",), 0), tmp_path / "again")


def test_two_towers_learn_from_two_towers(tmp_path: Path) -> None:
    model = load(str(save_dual(tmp_path / "model", "clip")))
    from packlight.families.dual_encoder import Pair

    pairs = [Pair(picture(i), (f"{['red', 'green', 'blue', 'dark', 'light'][i % 5]} dot",)) for i in range(32)]
    data = [model.family.prepare(model.module, pairs[k : k + 4], [], [], model.settings) for k in range(0, 32, 4)]
    student = replace(model, module=copy.deepcopy(model.module))
    for layer in student.module.vision_model.encoder.layers:
        layer.mlp.fc2.weight.data[:, ::2] *= -1
    every = {"kl": 1, "features": 100, "interactive": 0.1, "affinity": 0.1, "hidden": 1, "relations": 1}
    found = distill_(student, model.module, data, (DistillConfig(epochs=8, rate=5e-3, accumulate=2, losses=every), ("vision*", "visual*"), 0), tmp_path / "w")  # fmt: skip
    assert found["after"] < 0.5 * found["before"]


def test_a_caption_that_a_batch_has_twice_is_no_wrong_answer(tmp_path: Path) -> None:
    from packlight.families.dual_encoder import Pair
    from packlight.techniques.distill import _losses

    model = load(str(save_dual(tmp_path / "model", "clip")))
    pairs = [Pair(picture(0), ("red dot",)), Pair(picture(0), ("red dot",))]
    batch = model.family.prepare(model.module, pairs, [], [], model.settings)
    school = School(model.family, model.module, model.module, model.settings, [batch], [], tmp_path)
    given, aim = lesson(school, 0)
    with torch.no_grad():
        found = _losses(school, given, school.studied(given), aim, (1.0, {}))
        assert float(found["contrastive"]()) == float(found["interactive"]()) == 0


def test_a_plan_distils_before_it_quantizes_and_repeats(original: Any, tmp_path: Path) -> None:
    steps = (Step("distill", {"epochs": 2, "accumulate": 2, "filter": False}, ("*.bias",)),
             Step("audio_context", {"near": 4, "middle": 2, "far": 3}, ("model.encoder.layers.*",)), Step("float16"))  # fmt: skip
    made = []
    for work in ("a", "a", "b"):  # the second goes on after the first
        model = replace(original, module=copy.deepcopy(original.module), edits=[])
        compress_(model, Plan(steps, "whisper"), batches(6), tmp_path / work)
        made.append(model.module.state_dict())
    assert all(torch.equal(t, made[1][n]) and torch.equal(t, made[2][n]) for n, t in made[0].items())
    bias = "model.decoder.layers.0.fc1.bias"
    assert not torch.equal(made[0][bias], original.module.state_dict()[bias].half().float())


def test_variants_of_a_recording_repeat_and_differ() -> None:
    audio, other = (np.sin(np.arange(n) / 20).astype(np.float32) * 0.3 for n in (16000, 8000))
    made = [vary(audio, other, seed) for seed in range(8)]
    assert all(np.array_equal(a, vary(audio, other, seed)) for seed, a in enumerate(made))
    assert len({len(a) for a in made}) > 4 and all(np.abs(a).max() <= 1 and a.dtype == np.float32 for a in made)
    assert any(len(a) > 22000 for a in made) and len(vary(audio, other, 0, longest=0.5)) == 8000
    assert len(vary(audio[:0], audio[:0], 1)) <= 16000  # two gaps


def test_what_cannot_be_is_refused_before_work(original: Any) -> None:
    for wrong in ({"losses": {"magic": 1}}, {"losses": {}}, {"losses": {"kl": 0}}, {"held": 1}, {"temperature": 0},
                  {"augment": -1}, {"rate": 2}, {"epochs": -1}):  # fmt: skip
        with pytest.raises(PlanError):
            DistillConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no loss affinity"):
        check_distill(original, DistillConfig(losses={"affinity": 1}), ("*",))
    with pytest.raises(PlanError, match="names no parameter"):
        check_distill(original, DistillConfig(), ("nothing",))
    with pytest.raises(PlanError, match="needs calibration"):
        check(Plan((Step("distill"), Step("float16")), "whisper"), original)


def test_a_description_that_is_wrong_is_refused(tmp_path: Path) -> None:
    from packlight.applying import Options
    from packlight.teaching import distill, read_description

    file = tmp_path / "student.json"
    with pytest.raises(PlanError, match="no file"):
        read_description(file)
    for text, why in (("[", "no readable JSON"), ("[]", "JSON object"), ('{"scope": "x"}', "list of wildcards")):
        file.write_text(text)
        with pytest.raises(PlanError, match=why):
            read_description(file)
    file.write_text(json.dumps({"ffn": 64}))
    with pytest.raises(DataError, match="--calibration"):
        distill("model", file, Options(), tmp_path / "out")
