"""Measure what a smaller vocabulary costs: a few sizes, each with its step for the plan and its loss.

A model that writes can't write a lost token any more; one that reads gets the text in smaller pieces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from packlight.errors import PlanError
from packlight.families import Batch, ids_read
from packlight.model import Model
from packlight.plan import Step
from packlight.sensitivity import Progress, divergence
from packlight.techniques.prune_vocabulary import step as prune_step
from packlight.texts import TextSettings, tokenizer_decoder, tokenizer_of
from packlight.vocabulary import Kept, Usage, choose, read_vocabulary
from packlight.vocabulary_rewrite import rewrite
from packlight.vocabulary_usage import measure_usage, texts_sha256

_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.32, 0.25)  # of the rows that a pruned vocabulary keeps
_LARGE = 0.2  # share of all parameters from which a table is worth pruning


@dataclass(frozen=True)
class Pruning:
    """A way to treat the vocabulary table.

    Args:
        share: of the table's rows that stay.
        kl: per token, from tokens that go.
        step: of the plan; None to keep all.
    """

    share: float = 1.0
    kl: float = 0.0
    step: Step | None = None


def prunings(
    model: Model,
    observed: Sequence[Batch],
    judged: Sequence[Batch],
    wanted: tuple[Sequence[str], Sequence[str]],
    progress: Progress | None = None,
) -> list[Pruning]:
    """Ways to prune the vocabulary, the first of which is not to.

    The loss is measured as if the judged samples were not known: tokens are chosen by the languages, the texts and the
    observed samples. Of a model that writes, where the original gives a share m of its probability to tokens that went,
    the KL divergence of what is left is -log(1 - m); of one that compares, it is measured with the judged texts in the
    pieces that are left. The tokens of a plan are then chosen with the words of all samples.

    Args:
        model: the original.
        observed: calibration batches that the tokens are chosen with.
        judged: others, that say what it costs.
        wanted: codes of the languages that it is to write or read, and further texts; none of a language, and of both for
            a model that compares, means no pruning, since any token may then be needed.
        progress: called with (what, done, total).
    """
    family, module, (languages, texts) = model.family, model.module, wanted
    tables = family.token_tables
    asked = languages if family.sides is None else (*languages, *texts)
    if not asked or len(tables) != 1:
        return [Pruning()]
    table = module.get_submodule(tables[0])
    if table.weight.numel() < _LARGE * sum(p.numel() for p in module.parameters()):  # type: ignore[operator]
        return [Pruning()]
    scope, rows = next((pair for pair in family.tied), tables), int(table.num_embeddings)  # type: ignore[arg-type]
    known = read_vocabulary(model.tokenizer, rows)
    own = ids_read(observed, family.reads)
    words = [[int(i) for i in ids.flatten()] for ids in (*own, *ids_read(judged, family.reads))]
    usages: list[Usage] = []
    for i, said in enumerate((words[: len(own)], words)):
        if progress:
            progress("counting how often each token is used", i, 2)
        usages.append(measure_usage(model.tokenizer, rows, languages=languages, texts=texts, words=said))
    if progress:
        progress("counting how often each token is used", 2, 2)
    loss = _writing(model, judged) if family.sides is None else _reading(model, judged, rows)
    found = [Pruning()]
    for share in _SHARES:
        size = int(rows * share)
        try:
            blind = choose(known, usages[0], size=size, always={i for w in words[: len(own)] for i in w})
            kept = choose(known, usages[1], size=size, always={i for w in words for i in w})
        except PlanError:  # fewer than what must stay
            continue
        kl = loss(blind)
        made = prune_step(kept, scope, tuple(languages), texts_sha256(texts) if texts else "")
        why = f"{made.reason}; KL {kl:.2g} per token on samples that had no part in choosing"
        found.append(Pruning(len(kept.ids) / rows, kl, replace(made, reason=why)))
    return found


def _writing(model: Model, judged: Sequence[Batch]) -> Callable[[Kept], float]:
    """What it costs a model that writes to lose tokens."""
    with torch.no_grad():
        written = [torch.softmax(model.family.run(model.module, b), -1) for b in judged]

    def loss(kept: Kept) -> float:
        stay = torch.tensor(kept.ids)
        return float(torch.cat([-torch.log(p[:, stay].sum(-1).clamp(max=1)) for p in written]).mean())

    return loss


def _reading(model: Model, judged: Sequence[Batch], rows: int) -> Callable[[Kept], float]:
    """What it costs a model that compares texts to read them in the pieces that are left."""
    family, module = model.family, model.module
    settings = TextSettings.from_dict(model.settings["text"])
    say = tokenizer_decoder(model.tokenizer)
    with torch.no_grad():
        judged = [family.encode(module, b) for b in judged]
        pairs = [(b, torch.log_softmax(family.run(module, b), -1)) for b in judged]

    def loss(kept: Kept) -> float:
        left = rewrite(model.tokenizer, kept.ids, rows).tokenizer_json
        read = tokenizer_of(left, replace(settings, pad_to=0))

        def spelled(ids: list[int]) -> list[int]:
            return ids if stay.issuperset(ids) else [kept.ids[i] for i in read(say(ids))]

        stay = set(kept.ids)
        again = [({**b, **_spelled(b, family.reads, settings, spelled)}, aim) for b, aim in pairs]
        with torch.no_grad():
            return divergence(model, again)[0]

    return loss


def _spelled(batch: Batch, key: str, settings: TextSettings, spelled: Callable[[list[int]], list[int]]) -> Batch:
    """Ids and mask of a batch's texts in other pieces."""
    mask = batch.get("attention_mask", torch.ones_like(batch[key]))
    texts = [spelled(row[used.bool()].tolist()) for row, used in zip(batch[key], mask, strict=True)]
    filled = torch.full((len(texts), max(settings.pad_to, *map(len, texts))), settings.pad)
    used = torch.zeros_like(filled)
    for i, ids in enumerate(texts):
        filled[i, : len(ids)], used[i, : len(ids)] = torch.tensor(ids), 1
    return {key: filled, **({"attention_mask": used} if "attention_mask" in batch else {})}
