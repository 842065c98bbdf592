"""Pruned vocabularies of models that compare texts: the same vectors of what is covered, in PyTorch, bundle and reload."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import small_dual
from packlight import open_served
from packlight.compress import compress_
from packlight.deploy import deploy
from packlight.errors import PlanError
from packlight.families import BESIDE
from packlight.families.dual_content import Pair
from packlight.fewer_tokens import prunings
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.reloading import load
from packlight.techniques.prune_vocabulary import step
from packlight.token_pruning import without_rows_
from packlight.vocabulary import choose, read_vocabulary
from packlight.vocabulary_rewrite import decode_ids
from packlight.vocabulary_usage import measure_usage

SPECIALS = small_dual.SPECIALS
COVERED = ["a red square on green", "the blue dot", "photo of a dark stripe", "light red of the square"]
OTHER = ["zebra crossing", "quiet harbours", "a zebra and a walnut", "seventeen walnuts", "harbour walls"]
KINDS = {"clip": "BPE", "vit_bert": "WordPiece", "siglip": "Unigram", "altclip": "BPE"}


def tokenizer_of(kind: str) -> Tokenizer:
    """A tokenizer whose words are all tokens, with the special tokens first."""
    model, trainer = {
        "BPE": (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(vocab_size=220, special_tokens=SPECIALS)),
        "WordPiece": (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=220, special_tokens=SPECIALS),
        ),
        "Unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIALS, unk_token="[UNK]"),
        ),
    }[kind]
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = "abcdefghijklmnopqrstuvwxyz"
    made.train_from_iterator([*(COVERED + OTHER) * 20, *letters, *(f"a{c}" for c in letters)], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


def model_of(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Model:
    from transformers import PreTrainedTokenizerFast

    made = tokenizer_of(KINDS[kind])
    monkeypatch.setitem(small_dual.TEXT, "vocab_size", made.get_vocab_size())
    torch.manual_seed(0)
    path = small_dual.save_model(folder / kind, kind)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, eos_token="[SEP]", **names).save_pretrained(
        path
    )
    model = load(str(path))
    with torch.no_grad():
        for table in model.family.tables:
            model.module.get_submodule(table).weight.mul_(30)  # so that words matter
    return model


def ids_of(model: Model, texts: list[str]) -> list[list[int]]:
    return [model.settings["tokenizer"]([text])["input_ids"][0].tolist() for text in texts]


def vectors(model: Model, texts: list[str]) -> np.ndarray:
    with torch.no_grad():
        return np.array(model.family.answer(model.module, (small_dual.picture(0), texts), model.settings)[1:])


def kept_step(model: Model, texts: list[str]) -> Step:
    """The step that keeps what these texts need and nothing else that may go."""
    usage = measure_usage(model.tokenizer, texts=texts)
    words = {i for ids in ids_of(model, texts) for i in ids}
    return step(choose(read_vocabulary(model.tokenizer), usage, always=words), model.family.tables)


def batch_of(model: Model, texts: list[str]) -> dict[str, Any]:
    pairs = [Pair(small_dual.picture(i), (text,)) for i, text in enumerate(texts)]
    return model.family.prepare(model.module, pairs, [], [], model.settings)


def test_texts_beside_lose_their_rows_with_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no tower is run on is renamed like what one is; texts that need lost tokens go."""
    model = model_of(tmp_path, "vit_bert", monkeypatch)
    before = ids_of(model, COVERED)
    beside = model.settings["tokenizer"]([COVERED[0], OTHER[0], COVERED[1]])["input_ids"]
    batch = {**batch_of(model, COVERED), BESIDE: beside}
    (left,) = without_rows_(model, Plan((kept_step(model, COVERED),), model.family.name), [batch])
    after = ids_of(model, COVERED)
    assert after != before and left[model.family.reads].shape == batch[model.family.reads].shape
    assert [row[: len(ids)] for row, ids in zip(left[BESIDE].tolist(), after, strict=False)] == after[:2]
    assert len(left[BESIDE]) == 2


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in ("siglip", "altclip") else k for k in KINDS]
)
def test_covered_texts_keep_their_vectors_in_torch_bundle_and_reload(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path, kind, monkeypatch)
    before, others = vectors(model, COVERED), ids_of(model, OTHER)
    pruning = kept_step(model, COVERED)
    rows = len(model.module.get_submodule(model.family.tables[0]).weight)
    plan = Plan((pruning, Step("round_to_nearest", {"activations": "float"})), family=model.family.name)
    batch = batch_of(model, COVERED)
    records = compress_(model, plan, [batch], tmp_path / "waves")
    table = model.module.get_submodule(model.family.tables[0])
    assert len(table.scale) < rows and pruning.config["size"] == len(table.codes.T)
    # 7-bit codes move a vector a little; wrong rows or places would move it anywhere.
    after = vectors(model, COVERED)
    assert np.abs(after - before).max() < 0.03
    bundle = tmp_path / "bundle"
    deploy(model, plan, records, bundle, None, "")
    served, again = open_served(bundle), load(str(bundle))
    for i, text in enumerate(COVERED):
        assert np.abs(served.encoder.embed_text(text) - after[i]).max() < 1e-4
    assert np.abs(vectors(again, COVERED) - after).max() < 1e-5
    # Other words are read in smaller pieces: a text all the same.
    pieces = ids_of(model, OTHER)
    assert all(len(ids) > 2 and max(ids) < pruning.config["size"] for ids in pieces)
    assert sum(np.count_nonzero(ids) for ids in pieces) > sum(np.count_nonzero(ids) for ids in others)


def test_what_lost_tokens_cost_is_measured_on_texts_that_had_no_part_in_choosing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path, "vit_bert", monkeypatch)
    seen, other = batch_of(model, COVERED), batch_of(model, OTHER)
    assert prunings(model, [seen], [other], ([], [])) == prunings(model, [seen], [seen], (["en"], []))[:1]
    monkeypatch.setattr("packlight.fewer_tokens._LARGE", 0.0)
    known, lost = (prunings(model, [seen], [judged], ([], COVERED))[1:] for judged in (seen, other))
    assert len(known) > 1 and [p.share for p in known] == sorted((p.share for p in known), reverse=True)
    assert all(p.kl <= 1e-6 for p in known)  # these words are all there, whatever goes
    assert lost[-1].kl > 1e-5 and lost[0].kl <= lost[-1].kl
    # The words that judged are kept in the plan nevertheless: they are known, after all.
    kept = set(decode_ids(lost[-1].step.config["kept"])[0])
    assert kept.issuperset(i for ids in ids_of(model, OTHER) for i in ids)


def test_samples_with_lost_words_are_left_out_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(tmp_path, "vit_bert", monkeypatch)
    batch = batch_of(model, [COVERED[0], OTHER[0], COVERED[1]])
    plan = Plan((kept_step(model, COVERED), Step("error_feedback", {"rate": 4.0})), family=model.family.name)
    compress_(model, plan, [batch], tmp_path / "waves")
    assert "1 calibration samples have words that the plan prunes" in caplog.text


def test_a_tower_that_counts_from_an_id_keeps_that_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tmp_path, "altclip", monkeypatch)
    plan = Plan((kept_step(model, COVERED), Step("float16", {})), family=model.family.name)
    table = model.module.get_submodule(model.family.tables[0])
    places = [m for path, m in model.module.named_modules() if path.endswith("position_embeddings")]
    assert places[0].padding_idx == 0
    places[0].padding_idx = len(table.weight) - 1  # as if the padding came last
    with pytest.raises(PlanError, match="means something to the text tower"):
        compress_(model, plan, [], tmp_path / "waves")


def test_wrong_ids_are_noticed_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deliberate fault: rows taken in another order."""
    import packlight.techniques.prune_vocabulary as technique

    model = model_of(tmp_path, "vit_bert", monkeypatch)
    slice_ = technique._slice_
    monkeypatch.setattr(technique, "_slice_", lambda layer, index, **more: slice_(layer, index.flip(0), **more))
    plan = Plan((kept_step(model, COVERED), Step("float16", {})), family=model.family.name)
    with pytest.raises(PlanError, match="reads texts otherwise"):
        compress_(model, plan, [batch_of(model, COVERED)], tmp_path / "waves")
