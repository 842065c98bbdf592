"""Take rows out of a model's vocabulary as a plan says, and give its calibration samples the ids that the rest has."""

import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from packlight.errors import PlanError
from packlight.families import BESIDE, Batch
from packlight.model import Model
from packlight.plan import Plan
from packlight.reloading import described, write_inputs
from packlight.techniques.prune_vocabulary import PRUNE_VOCABULARY, PruneVocabularyConfig, prune_
from packlight.vocabulary_rewrite import decode_ids, remap_ids

log = logging.getLogger(__name__)
_SAME = 1e-4  # how far a vector of length 1 may move where nothing was changed but ids


def without_rows_(model: Model, plan: Plan, batches: Sequence[Batch]) -> Sequence[Batch]:
    """Take rows out of the vocabulary where the plan says so. Returns the batches with the ids that the rest has.

    Raises:
        PlanError: no sample is left that needs none of the lost tokens, or a model that reads other texts differently.
    """
    config = _config(plan)
    if config is None:
        return batches
    family, kept = model.family, set(decode_ids(config.kept)[0])
    left = [found for b in batches if (found := _covered(b, family.reads, kept)) is not None]
    if batches and not left:
        raise PlanError("Every calibration sample has words that the plan prunes. Give it others, or keep more tokens.")
    lost = sum(len(b[family.reads]) for b in batches) - sum(len(b[family.reads]) for b in left)
    if lost:
        log.warning("%d calibration samples have words that the plan prunes: left out.", lost)
    before = [_words_of(model, b) for b in left[:1]]
    new = prune_(model, config).old_to_new
    if family.bind is not None:  # its processing and its graphs' examples hold ids
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), described(model), model.tokenizer)
            model.settings = family.equip(model.module, Path(folder), model.settings, model.tokenizer)
        model.family = family.bind(family, model.module, model.settings)
    left = [{**b, **{k: _renamed(b[k], new) for k in (family.reads, BESIDE) if k in b}} for b in left]
    for batch, vectors in zip(left, before, strict=False):
        after = _words_of(model, batch)
        if vectors is not None and after is not None and not torch.allclose(vectors, after, atol=_SAME):
            raise PlanError(
                f"{model.source.architecture} reads texts otherwise once tokens are gone, even texts that need none of "
                "them. Leave out the step that prunes the vocabulary."
            )
    return left


def old_ids(plan: Plan) -> tuple[int, ...] | None:
    """The ids that the original's vocabulary has for those of a pruned one, in their order; None when none is pruned."""
    config = _config(plan)
    return None if config is None else decode_ids(config.kept)[0]


def _config(plan: Plan) -> PruneVocabularyConfig | None:
    step = next((s for s in plan.steps if s.technique == PRUNE_VOCABULARY.name), None)
    return None if step is None else PruneVocabularyConfig(**step.config)


def _renamed(ids: Tensor, new: Mapping[int, int]) -> Tensor:
    return torch.tensor([remap_ids(row, new) for row in ids.tolist()])


def _covered(batch: Batch, key: str, kept: Collection[int]) -> Batch | None:
    """The samples of a batch whose token ids all stay; None where there are none."""
    beside = {BESIDE: _whole(batch[BESIDE], kept)} if BESIDE in batch else {}
    ids, rest = batch[key], {k: v for k, v in batch.items() if k != BESIDE}
    stay = torch.isin(ids, torch.tensor(sorted(kept))).all(1)
    rows = torch.nonzero(stay).flatten().tolist()
    if not rows:
        return None
    if len(rows) < len(ids):
        rest = {k: v[rows] if v.dim() and len(v) == len(ids) else v for k, v in rest.items()}
    return {**rest, **beside}


def _whole(ids: Tensor, kept: Collection[int]) -> Tensor:
    """The rows of ids that all stay."""
    return ids[torch.isin(ids, torch.tensor(sorted(kept))).all(1)]


def _words_of(model: Model, batch: Batch) -> Tensor | None:
    """The vectors of a batch's texts; None for a family that compares nothing."""
    if model.family.sides is None or model.family.reads not in batch:
        return None
    with torch.no_grad():
        return model.family.sides(model.module, batch)[1]
