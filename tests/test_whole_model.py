"""Techniques of whole models on a small random Whisper: pruning its vocabulary, tuning what is left in floats."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from packlight.compress import compress_
from packlight.errors import PlanError
from packlight.loading import load
from packlight.plan import Plan, Step
from packlight.techniques.prune_vocabulary import PruneVocabularyConfig, prune_
from packlight.techniques.tune_scales import TuneScalesConfig, tunable, tune_
from packlight.token_pruning import old_ids
from packlight.vocabulary_rewrite import encode_ids, remap_ids
from small_whisper import save_model

ROWS = 153
SCOPE = ("model.decoder.embed_tokens", "proj_out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("whole") / "model")


def batches(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "input_features": torch.randn(1, 80, 3000, generator=draw),
            "decoder_input_ids": torch.cat([torch.tensor([[151, 152]]), torch.randint(0, 150, (1, 6), generator=draw)], 1),
            "first": torch.tensor(1),
        }
        for _ in range(count)
    ]  # fmt: skip


def merging_tokenizer() -> str:
    """A hundred letters and fifty pairs of them: ids as in the small model's tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:100]
    pairs = [(letters[i], letters[i + 50]) for i in range(50)]
    tokens = [*letters, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    return tokenizer.to_str()


def pruning() -> Step:
    """All letters and specials stay, and every other pair."""
    ids = [*range(100), *range(100, 150, 2), 150, 151, 152]
    return Step("prune_vocabulary", {"kept": encode_ids(ids, ROWS), "size": len(ids)}, SCOPE)


def test_pruned_logits_are_those_of_the_kept_tokens(folder: Path) -> None:
    model = load(str(folder))
    model.tokenizer = merging_tokenizer()
    before = copy.deepcopy(model.module)
    pruned = prune_(model, PruneVocabularyConfig(**pruning().config))
    batch = batches(1)[0]
    keys = batch["decoder_input_ids"].tolist()
    batch["decoder_input_ids"] = torch.tensor([[i for i in keys[0] if i in pruned.old_to_new]])
    new = {
        **batch,
        "decoder_input_ids": torch.tensor([remap_ids(batch["decoder_input_ids"][0].tolist(), pruned.old_to_new)]),
    }
    with torch.no_grad():
        expected = model.family.run(before, batch)[:, list(pruned.ids)]
        assert torch.allclose(model.family.run(model.module, new), expected, atol=1e-6)
    assert len(pruned.ids) == 128 == model.module.config.vocab_size
    assert model.settings["eos_token_id"] == 125
    assert model.module.proj_out.weight is model.module.model.decoder.embed_tokens.weight


def test_a_plan_prunes_compresses_and_keeps_the_way_back(folder: Path, tmp_path: Path) -> None:
    model = load(str(folder))
    model.tokenizer = merging_tokenizer()
    plan = Plan((pruning(), *small_plan().steps), "whisper")
    data = batches(4)
    for b in data:
        b["decoder_input_ids"][b["decoder_input_ids"] < 150] %= 100
    compress_(model, plan, data, tmp_path)
    assert model.module.get_submodule("proj_out").codes.shape == (64, 128)
    assert old_ids(plan) == (*range(100), *range(100, 150, 2), 150, 151, 152)


def small_plan(*more: Step) -> Plan:
    weights = Step("error_feedback", {"rate": 2.5, "columns": True, "activations": "float"}, ("*",), "planted")
    return Plan((weights, Step("float16"), *more), "whisper")


def compressed(folder: Path, work: Path) -> tuple[Any, Any, list[dict[str, torch.Tensor]]]:
    model, data = load(str(folder)), batches(6)
    teacher = copy.deepcopy(model.module)
    compress_(model, small_plan(), data, work)
    return model, teacher, data


def test_tuning_brings_the_output_nearer_to_the_original_and_moves_no_integer(folder: Path, tmp_path: Path) -> None:
    model, teacher, data = compressed(folder, tmp_path / "w")
    codes = {n: b.clone() for n, b in model.module.named_buffers() if b.dtype == torch.int8}
    floats = {n: t.detach().clone() for n, t in tunable(model.module).items()}
    report = tune_(model, teacher, data, TuneScalesConfig(tower_epochs=6, epochs=6, rate=3e-3), tmp_path / "t")
    assert report["tower after"] < 0.97 * report["tower before"]
    assert report["rest after"] < 0.97 * report["rest before"]
    assert codes
    assert all(torch.equal(b, codes[n]) for n, b in model.module.named_buffers() if n in codes)
    assert any(not torch.equal(t, floats[n]) for n, t in tunable(model.module).items())
    assert not any(p.requires_grad for p in model.module.parameters())


def test_tuning_that_helps_nobody_changes_nothing_but_the_last_digits(folder: Path, tmp_path: Path) -> None:
    model, teacher, data = compressed(folder, tmp_path / "w")
    floats = {n: t.detach().clone() for n, t in tunable(model.module).items()}
    report = tune_(model, teacher, data, TuneScalesConfig(tower_epochs=1, epochs=1, rate=0.9), tmp_path / "t")
    assert report["tower after"] == report["tower before"]
    for name, tensor in tunable(model.module).items():
        assert torch.allclose(tensor, floats[name], rtol=1e-3, atol=1e-6), name


def test_a_killed_tuning_goes_on_to_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    config = TuneScalesConfig(tower_epochs=2, epochs=3, rate=2e-3)
    model, teacher, data = compressed(folder, tmp_path / "w")
    tune_(model, teacher, data, config, tmp_path / "whole")
    whole = {n: t.clone() for n, t in tunable(model.module).items()}
    for stop in (2, 11, 17):  # steps: in the first tower epoch, in the second phase, later
        work = tmp_path / f"killed {stop}"
        model, teacher, _ = compressed(folder, tmp_path / "w")
        with pytest.raises(ZeroDivisionError):
            tune_(model, teacher, data, config, work, stopper(stop))
        model, teacher, _ = compressed(folder, tmp_path / "w")
        tune_(model, teacher, data, config, work)
        for name, tensor in tunable(model.module).items():
            assert torch.equal(tensor, whole[name]), (stop, name)
        shutil.rmtree(work)


def stopper(after: int) -> Any:
    calls = iter(range(10_000))

    def progress(what: str, done: int, total: int) -> None:
        if next(calls) >= after:
            raise ZeroDivisionError

    return progress


def test_a_plan_tunes_and_repeats(folder: Path, tmp_path: Path) -> None:
    plan = small_plan(Step("tune_scales", {"tower_epochs": 1, "epochs": 2}))
    made = []
    for work in ("a", "b"):
        model = load(str(folder))
        compress_(model, plan, batches(5), tmp_path / work)
        made.append({n: t.clone() for n, t in tunable(model.module).items()})
    assert all(torch.equal(t, made[1][n]) for n, t in made[0].items())
    assert old_ids(plan) is None


def test_refusals(folder: Path, tmp_path: Path) -> None:
    model = load(str(folder))
    with pytest.raises(PlanError, match="twice"):
        compress_(model, small_plan(Step("tune_scales"), Step("tune_scales")), batches(3), tmp_path)
    with pytest.raises(PlanError, match="at least two"):
        tune_(model, model.module, batches(1), TuneScalesConfig(), tmp_path)
    with pytest.raises(PlanError, match="needs calibration"):
        compress_(model, Plan((Step("float16"), Step("tune_scales")), "whisper"), [], tmp_path)
