"""Rows out of the vocabulary table and the head tied to it, and their tokens out of the tokenizer.

Text that needs none of these tokens is written and read as before.

When to use: where the table is a large part of the file, as in every small speech or translation model, and the words
to come are known: one language, a field, a product's menu. When not: for open text in many languages at once.

Papers: Abdaoui et al. 2020, arXiv 2010.05609; Purason et al. 2025, arXiv 2512.03989. `packlight.vocabulary` says what
is different here and why the result is exact.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packlight.errors import PlanError
from packlight.model import Model
from packlight.plan import Step
from packlight.techniques import Stage, Technique
from packlight.vocabulary import Kept, read_vocabulary
from packlight.vocabulary_rewrite import Pruned, decode_ids, encode_ids, remap_settings, rewrite

NAME = "prune_vocabulary"


@dataclass(frozen=True)
class PruneVocabularyConfig:
    """Settings.

    Args:
        kept: the ids that stay, as `encode_ids` writes them; what alone decides.
        size: how many they are; a check, and for people to read.
        vocabulary_sha256: the vocabulary they were chosen from; '' for any with as many rows.
        languages: codes of the languages they were chosen for; a note.
        texts_sha256: the texts they were chosen for; a note.
    """

    kept: str
    size: int
    vocabulary_sha256: str = ""
    languages: tuple[str, ...] = ()
    texts_sha256: str = ""

    def __post_init__(self) -> None:
        ids, _ = decode_ids(self.kept)
        if len(ids) != self.size:
            raise PlanError(f"size is {self.size}, but {len(ids)} tokens are kept; one of both was changed.")
        if isinstance(self.languages, str):
            raise PlanError(f"languages is {self.languages!r}; it must be a list of codes.")
        object.__setattr__(self, "languages", tuple(self.languages))  # JSON has lists only


def step(
    kept: Kept, scope: tuple[str, ...], languages: tuple[str, ...] = (), texts_sha256: str = "", reason: str = ""
) -> Step:
    """The step of a plan for chosen tokens.

    Args:
        kept: what `choose` gave.
        scope: paths of the table and its head.
        languages: that were asked for.
        texts_sha256: of the texts that were used, '' for none.
        reason: in place of the usual one, which names the size and the coverage.
    """
    usual = (
        f"{len(kept.ids)} of {kept.rows} tokens cover {kept.covered:.2%} of what is expected; the rest falls back to "
        "smaller pieces"
    )
    config: dict[str, Any] = {
        "kept": encode_ids(kept.ids, kept.rows),
        "size": len(kept.ids),
        "vocabulary_sha256": kept.sha256,
        "languages": list(languages),
        "texts_sha256": texts_sha256,
    }
    return Step(NAME, config, scope, reason or usual)


def prune_(model: Model, config: PruneVocabularyConfig) -> Pruned:
    """Take the rows out of a model, in place: table, head, tokenizer, settings, and ids in the module's configuration.

    Args:
        model: not yet quantized there.
        config: the step's settings.

    Returns:
        what `rewrite` gives, with the map of ids for everything outside the model (prompts, transcripts, batches).

    Raises:
        PlanError: another vocabulary, a family without a vocabulary table, a table that is quantized already, ids that
            must stay but don't.
    """
    ids, rows = decode_ids(config.kept)
    found = read_vocabulary(model.tokenizer, rows)
    if config.vocabulary_sha256 and found.sha256 != config.vocabulary_sha256:
        raise PlanError("The plan prunes another vocabulary than this model's. Make the plan anew for this model.")
    if not model.family.token_tables:
        raise PlanError(f"The family {model.family.name} names no vocabulary table, so none can be pruned.")
    heads = {table: _layer(model, head, rows) for table, head in model.family.tied}
    tables = {table: _layer(model, table, rows) for table in model.family.token_tables}
    pruned = rewrite(model.tokenizer, ids, rows)
    new = pruned.old_to_new
    _check_places(model, new)
    settings = remap_settings(model.settings, new)
    owners = _owners(model.module)
    changed = [_remapped(owner.to_dict(), new, rows) for owner in owners]  # raises before anything is changed
    index = torch.tensor(ids)
    for path, table in tables.items():
        head = heads.get(path)
        shared = head is not None and head.weight is table.weight
        _slice_(table, index)
        if shared:
            head.weight = table.weight
        if head is not None:
            _slice_(head, index, weight=not shared)
        table.padding_idx = None if table.padding_idx is None else new.get(table.padding_idx)
    for owner, values in zip(owners, changed, strict=True):
        for key, value in values.items():
            setattr(owner, key, value)
        if hasattr(owner, "vocab_size"):
            owner.vocab_size = len(ids)
    for layer in model.module.modules():  # CLIP's text tower keeps the id that it looks for
        if isinstance(getattr(layer, "eos_token_id", None), int) and layer.eos_token_id in new:
            layer.eos_token_id = new[layer.eos_token_id]
    model.tokenizer, model.settings = pruned.tokenizer_json, settings
    return pruned


def _owners(module: Any) -> list[Any]:
    """The configurations of a module that name token ids."""
    config = module.config
    found = (config, getattr(config, "text_config", None), getattr(module, "generation_config", None))
    return [owner for owner in found if owner is not None]


def _remapped(values: dict[str, Any], new: dict[int, int], rows: int) -> dict[str, Any]:
    """The values of a configuration that change; ids that the vocabulary never had are nobody's."""
    own = {k: v for k, v in values.items() if not (k.endswith("token_id") and isinstance(v, int) and v >= rows)}
    return {k: v for k, v in remap_settings(own, new).items() if v != values[k]}


def _check_places(model: Model, new: dict[int, int]) -> None:
    """Refuse ids whose number itself means something to a text tower, where that number would change."""
    config = getattr(model.module.config, "text_config", None)
    numbers = {
        layer.padding_idx
        for path, layer in model.module.named_modules()
        if path.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None
    }  # RoBERTa counts positions from the padding's id on
    if getattr(config, "eos_token_id", None) == 2 and hasattr(config, "projection_dim"):
        numbers.add(2)  # CLIP takes this to mean: the largest id ends the text
    if wrong := sorted(i for i in numbers if new.get(i) != i):
        raise PlanError(f"The id {wrong[0]} means something to the text tower, so every token before it must stay.")


def _layer(model: Model, path: str, rows: int) -> Any:
    layer = model.module.get_submodule(path)
    if not isinstance(layer, nn.Embedding | nn.Linear):
        raise PlanError(f"{path} is quantized already; the vocabulary is pruned before that.")
    if len(layer.weight) != rows:
        raise PlanError(f"{path} has {len(layer.weight)} rows, the plan was made for {rows}. Make it anew.")
    return layer


def _slice_(layer: Any, index: torch.Tensor, weight: bool = True) -> None:
    """Keep these rows of a layer, in place."""
    if weight:
        kept = layer.weight.detach()[index].clone()
        layer.weight = nn.Parameter(kept, requires_grad=layer.weight.requires_grad)
    if getattr(layer, "bias", None) is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[index].clone(), requires_grad=layer.bias.requires_grad)
    setattr(layer, "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features", len(index))


PRUNE_VOCABULARY = Technique(
    name=NAME,
    config=PruneVocabularyConfig,
    layer=None,
    stage=Stage.PRUNE,
    paper="Load What You Need, Abdaoui et al. 2020, arXiv 2010.05609",
    summary="rows of the vocabulary table that the texts to come don't need; exact on covered text",
)
