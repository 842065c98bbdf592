"""What each step buys, on a speech model: one table, at one budget of bytes.

    python benchmarks/ablation.py MODEL --calibration DIR [--bits 3] [--alone [WORD ...]] [--tune] [--last] -o OUT

Every row is the row before it and one step more, brought to the same bits per weight over all layers, codes and
scales. Bits count per weight of the original, so a smaller vocabulary leaves more for the rest. `--alone` adds rows that
have every step but one, with words only those whose name has one of them; `--tune` adds the tuning of scales; `--last`
leaves out the rows before the one that has every step. Prints the table and writes it to OUT/ablation.md and
OUT/ablation.json, after every row; OUT/work keeps finished layers, so a run that was cut off goes on.

Quality is the KL divergence of the next-token distribution from the original's, per token, teacher-forced with the
original's own words, on calibration recordings that nothing here has seen: not those that gave the Gram matrices, not
those that measured the sensitivities, and never evaluation data. Activations stay float, in every row. Where the
original gives a share m of its probability to tokens that a row has lost, -log(1 - m) is added; a recording ends with the
first such token of its words, in every row.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_report import markdown
from bakeoff import divergence, log_probabilities, say
from torch import Tensor

from packlight.applying import JUDGED, OBSERVED, Options, calibration_batches, divide
from packlight.compress import compress_
from packlight.data import Dataset, read_dataset
from packlight.errors import DataError, PacklightError
from packlight.evaluate import spread, threads_or_all
from packlight.families import Batch
from packlight.fewer_tokens import Pruning, prunings
from packlight.loading import load
from packlight.model import Model
from packlight.plan import Plan, Step, write_json
from packlight.planner import levels_between
from packlight.quant import channel_grid, error_feedback, rate_of
from packlight.sensitivity import Level, measure_grams, sensitivity, settings
from packlight.tables import TECHNIQUES
from packlight.techniques import Compressed, Stage, Technique
from packlight.techniques.codes import CodesConfig
from packlight.token_pruning import old_ids

HELD = 30  # recordings that only judge
NEAR = 0.01  # bits per weight that a row may be off the budget
TRIES = 5


@dataclass(frozen=True)
class Row:
    """A row of the table: which steps it has."""

    name: str
    coded: bool = True  # entropy-coded, with a step for all rows; else fixed width, a step per row
    feedback: bool = True
    columns: bool = True  # steps per column, and rescaling
    allocated: bool = True
    use: bool = True
    informed: bool = True  # bits by layer and steps by row, by the Fisher information of what they give
    weighed: bool = True  # positions in Gram matrices likewise
    trellis: bool = True
    pruned: bool = True  # the vocabulary, to what the language needs
    tuned: bool = False


_FEEDBACK = Row("+ error feedback", True, True, False, False, False, False, False, False, False)
STEPS = (
    replace(_FEEDBACK, name="round to nearest, fixed width, one scale per channel", coded=False, feedback=False),
    replace(_FEEDBACK, name="+ entropy-aware step", feedback=False),
    _FEEDBACK,
    replace(_FEEDBACK, name="+ column steps and rescaling", columns=True),
    Row("+ bits by part", use=False, informed=False, weighed=False, trellis=False, pruned=False),
    Row("+ rows by token use", informed=False, weighed=False, trellis=False, pruned=False),
    Row("+ layers and rows by Fisher information", weighed=False, trellis=False, pruned=False),
    Row("+ positions by Fisher information", trellis=False, pruned=False),
    Row("+ along a trellis", pruned=False),
    Row("+ a vocabulary of the language"),
)
TUNED = Row("+ tuning of scales", tuned=True)
ALONE = (
    Row("all but error feedback", feedback=False, columns=False),
    Row("all but column steps and rescaling", columns=False),
    Row("all but bits by part", allocated=False),
    Row("all but rows by token use", use=False),
    Row("all but layers and rows by Fisher information", informed=False),
    Row("all but positions by Fisher information", weighed=False),
    Row("all but the trellis", trellis=False),
    Row("all but a vocabulary of the language", pruned=False),
)


def fixed_width(weight: Tensor, gram: Tensor | None, config: CodesConfig) -> Compressed:
    """Round to nearest, the largest symmetric codes that fit `config.rate` bits, a scale per channel, no coder."""
    limit = max(1, int(2 ** (config.rate or 8) - 1) // 2)
    grid = channel_grid(weight, None, limit)
    return _made(grid.codes(weight), grid, config, float(np.ceil(np.log2(2 * limit + 1))))


def feedback_alone(weight: Tensor, gram: Tensor | None, config: CodesConfig) -> Compressed:
    """Error feedback on one step for all rows, its scales left as they are."""
    grid = channel_grid(weight, config.rate)
    codes = grid.codes(weight) if gram is None else error_feedback(weight, gram, grid, config.damp)
    return _made(codes, grid, config, rate_of(codes))


def _made(codes: Tensor, grid: Any, config: CodesConfig, rate: float) -> Compressed:
    tensors = {"codes": codes.T.to(torch.int8).contiguous(), "scale": grid.scale[:, 0].contiguous()}
    return Compressed("codes", {"activations": config.activations}, tensors, grid.values(codes), rate)


# Techniques of this table alone; `compress_` finds them by name like any other.
OWN = {
    "fixed_width": Technique("fixed_width", CodesConfig, fixed_width, Stage.QUANTIZE),
    "feedback_alone": Technique("feedback_alone", CodesConfig, feedback_alone, Stage.QUANTIZE, ("gram",)),
}


@contextmanager
def own_techniques() -> Iterator[None]:
    """While this is open, plans may name the techniques of this table."""
    TECHNIQUES.update(OWN)
    try:
        yield
    finally:
        for name in OWN:
            del TECHNIQUES[name]


@dataclass
class Bench:
    """What all rows share."""

    model: str
    calibration: Dataset
    bits: float
    out: Path
    language: str = "en"
    shift: float = 0.0  # bits by which the last row's rates were moved to come to the budget

    @cached_property
    def original(self) -> Model:
        """The original, never changed."""
        return load(self.model)

    @cached_property
    def work(self) -> Path:
        """What is kept for this model and these recordings."""
        key = hashlib.sha256(json.dumps([self.original.source.sha256, self.calibration.sha256]).encode()).hexdigest()
        folder = self.out / "work" / key[:12]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def batches(self) -> tuple[list[Batch], list[Batch], list[Batch]]:
        """(for Gram matrices, for sensitivity, held back) batches, no recording in two of them."""
        samples = self.calibration.samples
        count = min(OBSERVED + JUDGED, len(samples) * 5 // 8)
        known = spread(self.calibration, count)
        rest = tuple(s for s in samples if s.sha256 not in {k.sha256 for k in known})
        if count < 5 or not rest:
            raise DataError(f"{self.calibration.source} has {len(samples)} recordings; this needs at least 8.")
        held = spread(replace(self.calibration, samples=rest), HELD)
        observed, judged = divide(self._batches(known))
        return observed, judged, self._batches(held)

    @cached_property
    def weights(self) -> int:
        """Weights of the original's layers; a head that is tied counts once."""
        heads = {head for _, head in self.original.family.tied}
        return sum(x.weight.numel() for p, x in self.original.layers().items() if p not in heads)

    @cached_property
    def vocabulary(self) -> Pruning:
        """The vocabulary with which the summed KL is least at this budget; all of it where none can go."""
        observed, judged, _ = self.batches
        found = prunings(self.original, observed, judged, ([self.language], []), say)

        def expected(choice: Pruning) -> float:
            levels = allocate(shrunk(self, choice), self.bits * self.weights / 8)
            return choice.kl + sum(level.kl for level in levels.values())

        return min(found, key=expected)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The original's ids of the tokens that stay in rows with a smaller vocabulary."""
        step = self.vocabulary.step
        return tuple(range(self.rows)) if step is None else old_ids(Plan((step,), "")) or ()

    @cached_property
    def rows(self) -> int:
        """Tokens of the original."""
        return int(self.original.layers()[self.original.family.token_tables[0]].weight.shape[0])

    @cached_property
    def held(self) -> list[Batch]:
        """What is held back, each recording up to the first word that rows with a smaller vocabulary can't write."""
        key, stay = self.original.family.reads, set(self.kept)
        ends = [next((i for i, t in enumerate(b[key][0].tolist()) if t not in stay), None) for b in self.batches[2]]
        return [{**b, key: b[key][:, :end]} for b, end in zip(self.batches[2], ends, strict=True)]

    def _batches(self, samples: Sequence[Any]) -> list[Batch]:
        picked = replace(self.calibration, samples=tuple(samples))
        return calibration_batches(self.original, picked, Options(), self.work, say)

    @cached_property
    def reference(self) -> list[Tensor]:
        """The original's log-probabilities on what is held back."""
        return log_probabilities(self.original, self.held)

    @cached_property
    def levels(self) -> dict[str, list[Level]]:
        """By part: what each rate costs, as the planner sees it."""
        observed, judged, _ = self.batches
        sums = measure_grams(self.original, observed, say)
        found: dict[str, list[Level]] = {}
        for level in sensitivity(self.original, sums, judged, self.work / "sensitivity.jsonl", say):
            found.setdefault(level.part, []).append(level)
        return {part: levels_between(levels) for part, levels in found.items()}


def shrunk(bench: Bench, vocabulary: Pruning) -> dict[str, list[Level]]:
    """The levels of all parts, those of a table in proportion to the rows that stay."""
    found = dict(bench.levels)
    for table in bench.original.family.token_tables:
        part = bench.original.family.part_of(table)
        if part is not None:
            found[part.name] = [replace(v, bytes=int(v.bytes * vocabulary.share)) for v in found[part.name]]
    return found


def allocate(levels: dict[str, list[Level]], budget: float) -> dict[str, Level]:
    """The level of each part that has the least summed KL within `budget` bytes: one price per byte for all."""
    low, high = -20.0, 0.0  # decimal logarithm of the price
    best: dict[str, Level] = {}
    for _ in range(60):
        price = 10 ** ((low + high) / 2)
        picked = {
            part: min(found, key=lambda lv, price=price: lv.kl + price * lv.bytes) for part, found in levels.items()
        }
        if sum(lv.bytes for lv in picked.values()) > budget:
            low = (low + high) / 2
        else:
            high, best = (low + high) / 2, picked
    return best or {part: min(found, key=lambda lv: lv.bytes) for part, found in levels.items()}


def steps(bench: Bench, row: Row, shift: float) -> tuple[Step, ...]:
    """The plan's steps for a row; every rate that the budget gives is moved by `shift` bits, since scales cost some."""
    model = bench.original
    parts = [p for p in model.family.parts if any(p is model.family.part_of(path) for path in model.layers())]
    tied = {p.name for table, _ in model.family.tied if (p := model.family.part_of(table)) is not None}
    vocabulary = bench.vocabulary if row.pruned else Pruning()
    levels = allocate(shrunk(bench, vocabulary), bench.bits * bench.weights / 8) if row.allocated else {}
    found = [] if vocabulary.step is None else [vocabulary.step]
    for part in parts:
        level = levels.get(part.name)
        rate = bench.bits if level is None else level.rate
        rate = None if rate is None else min(max(rate + shift, 1.0), 8.0)
        if level is not None and level.technique == "group_weights":
            found.append(Step("group_weights", {"bits": 8, "group": 32}, part.paths))
            continue
        config = settings(model, part.name, rate) if row.columns else {"rate": rate}
        if not (row.use if part.name in tied else row.informed):
            config.pop("use", None)
        if not row.weighed:
            config.pop("positions", None)
        if row.trellis and row.columns and rate is not None:
            config["trellis"] = True
        config["activations"] = "float"
        name = "error_feedback" if row.columns else "feedback_alone" if row.feedback else "round_to_nearest"
        spread = bench.levels[part.name][0].spread if row.informed and row.coded and rate is not None else {}
        found += [
            Step(name, {**config, "rate": min(max((rate or 0) + bits, 1.0), 8.0)}, (path,))
            for path, bits in spread.items()
        ]
        found.append(Step(name if row.coded else "fixed_width", config, part.paths))
    found += [Step("tune_scales")] if row.tuned else []
    return (*found, Step("float16"))


def measure(bench: Bench, row: Row) -> dict[str, Any]:
    """A row's numbers: bits are brought to the budget, then the KL is measured."""
    observed = bench.batches[0]
    bits = bench.bits
    for _ in range(TRIES if row.coded else 1):
        bench.shift += bench.bits - bits
        model, bits = run(bench, steps(bench, replace(row, tuned=False), bench.shift), observed)
        if abs(bits - bench.bits) <= NEAR:
            break
    if row.tuned:
        model, bits = run(bench, steps(bench, row, bench.shift), observed)
    found = losses(bench, row, model)
    tokens = sum(n for _, _, n in found)
    return {
        "name": row.name, "bits": bits, "kl": sum(k for k, _, _ in found) / tokens,
        "flips": sum(f for _, f, _ in found) / tokens, "tokens": tokens, "utterances": found,
    }  # fmt: skip


def losses(bench: Bench, row: Row, model: Model) -> list[tuple[float, int, int]]:
    """For each recording: (summed KL with what lost tokens cost, top tokens that changed, tokens)."""
    if not row.pruned:
        return divergence(model, bench.held, bench.reference)
    key, stay, new = bench.original.family.reads, torch.tensor(bench.kept), {t: i for i, t in enumerate(bench.kept)}
    batches = [{**b, key: torch.tensor([[new[t] for t in b[key][0].tolist()]])} for b in bench.held]
    left = [aim[:, stay] for aim in bench.reference]
    lost = [-float(aim.logsumexp(-1).clamp(max=0).double().sum()) for aim in left]
    found = divergence(model, batches, [torch.log_softmax(aim, -1) for aim in left])
    return [(kl + more, flips, n) for (kl, flips, n), more in zip(found, lost, strict=True)]


def run(bench: Bench, made: tuple[Step, ...], observed: Sequence[Batch]) -> tuple[Model, float]:
    """Carry out a plan on a fresh model. Returns it, and its bits per weight of the original."""
    plan = Plan(made, bench.original.family.name, {"sha256": bench.calibration.sha256})
    model = load(bench.model)
    with own_techniques():
        records = compress_(model, plan, observed, bench.work / plan.key[:12], say)
    return model, sum(r.rate * r.parameters for r in records) / bench.weights


def main(say_row: Callable[[str], None] = lambda said: print(said, file=sys.stderr, flush=True)) -> int:
    """Make the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="what each step buys; see the top of this file")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of calibration recordings")
    parser.add_argument("--bits", type=float, default=3.0, help="bits per weight over all layers, scales included")
    parser.add_argument(
        "--alone", nargs="*", metavar="WORD", help="also every step left out alone, or those with a word"
    )
    parser.add_argument("--tune", action="store_true", help="also tuning of scales: some minutes")
    parser.add_argument("--last", action="store_true", help="of the rows of steps, only the last, which has them all")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(threads_or_all(0))
    last = len(STEPS) - 1
    rows = [*STEPS[last if args.last else 0 :], *((TUNED,) if args.tune else ())]
    without = [r for r in ALONE if args.alone is not None and (not args.alone or any(w in r.name for w in args.alone))]
    done: list[dict[str, Any]] = []
    try:
        bench = Bench(args.model, read_dataset(args.calibration), args.bits, args.out)
        for row in (*rows, *without):
            say_row(f"{row.name} ...")
            done.append(measure(bench, row))
            found, alone = done[: len(rows)], done[len(rows) :]
            text = markdown(found, alone, done[0 if args.last else min(last, len(done) - 1)])
            head = {"bits": args.bits, "model": Path(args.model).name}
            write_json(args.out / "ablation.json", {**head, "rows": found, "alone": alone})
            (args.out / "ablation.md").write_text(text, encoding="utf-8")
    except PacklightError as error:
        print(error, file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
