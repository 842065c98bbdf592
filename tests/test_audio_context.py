"""Audio context to length: which positions stay, that nothing else changes, and that the bundle runs on them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from packlight.bundle import open_bundle
from packlight.compress import check, compress_
from packlight.context import AudioContext, places, spoken_positions
from packlight.deploy import deploy, parity
from packlight.errors import PlanError
from packlight.families.whisper import prepare, run, shorten_, tiny
from packlight.families.whisper_graphs import hear
from packlight.loading import load
from packlight.plan import Plan, Step
from packlight.sensitivity import CONTEXTS, contexts
from packlight.serve import open_served
from packlight.serving.whisper import Settings, encoder_inputs
from packlight.techniques.audio_context import AudioContextConfig, step
from small_whisper import save_model, save_speech

CONTEXT = AudioContext(64, 16, 32)


@pytest.mark.parametrize("spoken", [0, 1, 100, 384, 1387])
def test_every_position_is_kept_or_stood_for_once(spoken: int) -> None:
    positions, sizes = places(spoken, 1500, CONTEXT)
    assert len(positions) == len(sizes) == spoken + CONTEXT.kept
    assert np.exp(sizes).sum() == pytest.approx(1500)
    assert positions[: spoken + 64].tolist() == list(range(spoken + 64))
    assert positions[-32:].tolist() == list(range(1468, 1500))
    assert (np.diff(positions) > 0).all()


@pytest.mark.parametrize("spoken", [1388, 1400, 1500])
def test_the_window_stays_whole_where_nothing_would_be_saved(spoken: int) -> None:
    positions, sizes = places(spoken, 1500, CONTEXT)
    assert positions.tolist() == list(range(1500))
    assert not sizes.any()


def test_spoken_positions_reach_to_the_last_sample() -> None:
    assert [spoken_positions(n, 1500) for n in (0, 1, 320, 321, 480_000, 999_999)] == [0, 1, 1, 2, 1500, 1500]


def uniform_silence(spoken: int) -> torch.nn.Module:
    """A random model to which all positions of the silence between look the same, so that merging them is exact."""
    module = tiny()
    table = module.model.encoder.embed_positions.weight
    with torch.no_grad():
        table.normal_(generator=torch.Generator().manual_seed(1))
        table[spoken + CONTEXT.near : 1500 - CONTEXT.far] = table[spoken + CONTEXT.near].clone()
    return module


def states(module: torch.nn.Module, features: torch.Tensor, spoken: int, sized: bool) -> tuple[torch.Tensor, Any]:
    positions, sizes = (torch.from_numpy(a) for a in places(spoken, 1500, CONTEXT))
    with torch.no_grad():
        found = hear(module.model.encoder, features[..., : 2 * len(positions)], positions, sizes * sized)
    return found, positions


def test_silence_that_is_all_the_same_is_merged_exactly() -> None:
    spoken = 200
    module = uniform_silence(spoken)
    features = torch.zeros(1, 80, 3000)
    features[..., : 2 * spoken] = torch.randn(80, 2 * spoken, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = module.model.encoder(features).last_hidden_state
    made, positions = states(module, features, spoken, sized=True)
    assert torch.allclose(made, whole[:, positions], atol=2e-5)
    wrong, _ = states(module, features, spoken, sized=False)  # each counts as one: the silence loses its pull
    assert not torch.allclose(wrong, whole[:, positions], atol=1e-3)


def test_keeping_the_padding_loses_less_than_cutting_it_off() -> None:
    module = tiny(seed=3)
    settings: dict[str, Any] = {}
    audio = np.random.default_rng(0).standard_normal(16000 * 3).astype(np.float32) * 0.1
    batch = prepare(module, audio, [3, 4, 5], [1], settings)
    with torch.no_grad():
        whole = run(module, batch)
        shorten_(module, CONTEXT)
        kept = run(module, batch)
        spoken = int(batch["spoken"])
        cut = hear(
            module.model.encoder,
            batch["input_features"][..., : 2 * spoken],
            torch.arange(spoken),
            torch.zeros(spoken),
        )
        bare = run(module, {**batch, "states": cut})
    assert (kept - whole).norm() < 0.8 * (bare - whole).norm()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path]:
    """(data, model compressed with a short context, its bundle)."""
    base = tmp_path_factory.mktemp("context")
    folder, data = save_model(base / "model"), save_speech(base / "data")
    shorter = step(AudioContextConfig(8, 4, 8), "model.encoder.layers", "for the test")
    plan = Plan((shorter, Step("round_to_nearest", {"activations": "float"}), Step("float16")))
    model = load(str(folder))
    records = compress_(model, plan, [], base / "waves")
    deploy(model, plan, records, base / "bundle", None, "transcribe")
    return data, model, base / "bundle"


def test_the_bundle_agrees_with_torch_and_runs_on_clips_of_any_length(made: tuple[Path, Any, Path]) -> None:
    _, model, bundle = made
    served = open_served(bundle, threads=2)
    assert open_bundle(bundle).manifest["serving"]["context"] == {"near": 8, "middle": 4, "far": 8}
    draw = np.random.default_rng(0)
    for seconds in (0.5, 2.0, 31.0):
        audio = (0.1 * draw.standard_normal(int(16000 * seconds))).astype(np.float32)
        assert served.answer(audio).windows >= 1
    batch = prepare(model.module, audio[:24000], [3, 4], [151, 152], model.settings)
    assert parity(model, served, [batch])["passed"]


def test_the_device_feeds_the_encoder_what_torch_does(made: tuple[Path, Any, Path]) -> None:
    _, model, bundle = made
    settings = Settings.from_dict(open_bundle(bundle).manifest["serving"])
    for seconds in (0.3, 1.0, 29.9):
        audio = (0.1 * np.random.default_rng(5).standard_normal(int(16000 * seconds))).astype(np.float32)
        theirs = model.family.inputs(model.module, prepare(model.module, audio, [3], [151, 152], model.settings))
        for name, ours in encoder_inputs(settings, audio).items():
            assert np.allclose(ours, theirs[name].numpy(), atol=1e-4), (seconds, name)


def test_measuring_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = load(str(save_model(tmp_path / "model")))
    audio = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    batch = prepare(model.module, audio, [3, 4, 5], [151, 152], model.settings)
    with torch.no_grad():
        before = run(model.module, batch)
    found = contexts(model, [batch], tmp_path / "contexts.jsonl")
    assert [s.context for s in found] == list(CONTEXTS)
    assert [round(1500 * s.share) for s in found] == [50 + c.kept for c in CONTEXTS]
    assert all(s.kl > 0 for s in found)
    with torch.no_grad():
        assert torch.equal(run(model.module, batch), before)
    assert contexts(model, [], tmp_path / "contexts.jsonl") == found  # an earlier run's are taken up


def test_settings_that_drop_a_register_are_refused() -> None:
    with pytest.raises(PlanError, match="leans on each"):
        AudioContextConfig(far=0)


def test_a_context_as_long_as_the_window_is_refused(tmp_path: Path) -> None:
    model = load(str(save_model(tmp_path / "model")))
    plan = Plan((step(AudioContextConfig(near=1500), "model.encoder.layers", ""), Step("float16")))
    with pytest.raises(PlanError, match="keeps all 1500"):  # before any work
        check(plan, model)
