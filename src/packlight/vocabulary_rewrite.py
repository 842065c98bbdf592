"""The tokenizer and the settings of a model once tokens are gone: new ids everywhere. No torch, no model.

`packlight.vocabulary` chooses the tokens and says why the smaller tokenizer is exact on covered text.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from packlight.errors import PlanError
from packlight.vocabulary import Vocabulary, merge_of, parsed, read_vocabulary


@dataclass(frozen=True)
class Pruned:
    """A smaller tokenizer.

    Args:
        tokenizer_json: its text.
        ids: the old id of each new one, ascending.
    """

    tokenizer_json: str
    ids: tuple[int, ...]

    @cached_property
    def old_to_new(self) -> dict[int, int]:
        """Old id -> new id, for the ids that stayed."""
        return {old: new for new, old in enumerate(self.ids)}


def rewrite(tokenizer_json: str, ids: Sequence[int], rows: int = 0) -> Pruned:
    """The tokenizer with these tokens only, under new ids.

    Args:
        tokenizer_json: text of the original's tokenizer.json.
        ids: old ids that stay, ascending, as `choose` gives them.
        rows: rows of the model's table; 0 for as many as the tokenizer names.

    Raises:
        PlanError: ids out of order or range, a token without its pieces, one missing that must stay, a part of the
            tokenizer that holds ids in a way we don't know.
    """
    from tokenizers import Tokenizer

    vocabulary = read_vocabulary(tokenizer_json, rows)
    _check(vocabulary, ids)
    values = parsed(tokenizer_json)
    made = Pruned("", tuple(ids))
    new = made.old_to_new
    model = values["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
    if "merges" in model:
        model["merges"] = [entry for entry in model["merges"] if merge_of(entry, model)[2] in model["vocab"]]
    for entry in values.get("added_tokens") or ():
        entry["id"] = new[entry["id"]]
    if values.get("padding"):
        values["padding"]["pad_id"] = new[values["padding"]["pad_id"]]
    _remap_processor(values.get("post_processor"), new)
    made = Pruned(json.dumps(values, ensure_ascii=False, separators=(",", ":")), made.ids)
    # The library has its own rules for the ids of added tokens: believe what it loads, not what was written.
    wanted = {token: new[i] for token, i in _vocabulary_of(Tokenizer, tokenizer_json).items() if i in new}
    if _vocabulary_of(Tokenizer, made.tokenizer_json) != wanted:
        raise PlanError("The ids of this tokenizer are not consecutive, so it can't be pruned. Leave out that step.")
    return made


def _vocabulary_of(kind: Any, tokenizer_json: str) -> dict[str, int]:
    return dict(kind.from_str(tokenizer_json).get_vocab(with_added_tokens=True))


def _check(vocabulary: Vocabulary, ids: Sequence[int]) -> None:
    kept = set(ids)
    ordered = all(a < b for a, b in pairwise(ids))
    if not ids or not ordered or ids[0] < 0 or ids[-1] >= vocabulary.rows:
        raise PlanError(f"The kept ids must ascend within 0 to {vocabulary.rows - 1}.")
    if lost := vocabulary.fixed - kept:
        raise PlanError(f"{len(lost)} ids must stay (bytes, added tokens) but are not kept, first {min(lost)}.")
    if pieces := vocabulary.closure(kept) - kept:
        raise PlanError(f"{len(pieces)} ids are pieces of kept tokens but are not kept, first {min(pieces)}.")


def _remap_processor(processor: dict[str, Any] | None, new: Mapping[int, int]) -> None:
    """Rewrite the ids in a post-processor, in place."""
    if processor is None:
        return
    kind = processor.get("type")
    if kind == "Sequence":
        for inner in processor["processors"]:
            _remap_processor(inner, new)
    elif kind == "TemplateProcessing":
        for entry in processor["special_tokens"].values():
            entry["ids"] = [new[i] for i in entry["ids"]]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for key in ("sep", "cls"):
            token, i = processor[key]
            processor[key] = [token, new[i]]
    elif kind != "ByteLevel":
        raise PlanError(f"This tokenizer has a post-processor {kind}, whose ids we can't rewrite.")


# Ids elsewhere ------------------------------------------------------------------------------------------------------


def remap_ids(ids: Iterable[int], old_to_new: Mapping[int, int]) -> list[int]:
    """New ids for old ones. Raises PlanError naming an id that is gone."""
    old = list(ids)
    if lost := sorted({i for i in old if i not in old_to_new}):
        raise PlanError(f"{len(lost)} token ids were pruned but are still wanted, first {lost[0]}. Keep them.")
    return [old_to_new[i] for i in old]


def remap_settings(settings: Mapping[str, Any], old_to_new: Mapping[int, int]) -> dict[str, Any]:
    """Generation settings with new ids, by the names that transformers gives them; other values stay as they are.

    '*_token_id' is one id (or a list of them) and '*_to_id' a table of ids: none of these may be gone. '*_tokens' is a
    list of ids to suppress, from which pruned ones vanish. 'forced_decoder_ids' is a list of [position, id].

    Raises:
        PlanError: an id is gone that is still wanted.
    """
    found = dict(settings)
    for key, value in settings.items():
        try:
            if key.endswith("token_id") and value is not None:
                found[key] = (
                    remap_ids(value, old_to_new) if isinstance(value, list) else remap_ids([value], old_to_new)[0]
                )
            elif key.endswith("_to_id") and isinstance(value, Mapping):
                found[key] = dict(zip(value, remap_ids(value.values(), old_to_new), strict=True))
            elif key.endswith("_tokens") and isinstance(value, list | tuple):
                found[key] = [old_to_new[i] for i in value if i in old_to_new]
            elif key == "forced_decoder_ids" and value:
                found[key] = [[at, remap_ids([i], old_to_new)[0] if i is not None else None] for at, i in value]
        except PlanError as error:
            raise PlanError(f"The model's setting {key!r}: {error}") from None
    return found


def encode_ids(ids: Iterable[int], rows: int) -> str:
    """Ids as text for a plan: the number of rows, a colon, and one bit per row in base 85.

    Not packed further: at 40 % of the rows little is to be gained, and packers differ between machines.
    """
    bits = np.zeros(rows, bool)
    bits[list(ids)] = True
    return f"{rows}:{base64.b85encode(np.packbits(bits).tobytes()).decode('ascii')}"


def decode_ids(text: str) -> tuple[tuple[int, ...], int]:
    """What `encode_ids` wrote: (ids, rows). Raises PlanError when it is damaged."""
    count, colon, body = text.partition(":") if isinstance(text, str) else ("", "", "")
    try:
        rows, data = int(count), base64.b85decode(body)
    except ValueError:
        rows, data = 0, b""
    if not colon or rows < 1 or len(data) != -(-rows // 8):
        raise PlanError("The kept ids are damaged: they are written 'ROWS:BITS', one bit per row in base 85.")
    bits = np.unpackbits(np.frombuffer(data, np.uint8)).astype(bool)
    if bits[rows:].any() or not bits.any():
        raise PlanError(f"The kept ids are damaged: they name none of the {rows} rows, or others.")
    return tuple(np.flatnonzero(bits).tolist()), rows
