"""A fair bake-off: packlight against real libraries, on one model, with the same weights and samples.

    python benchmarks/bakeoff.py MODEL --calibration DIR [--evaluation DIR --wer] -o OUT

Prints one table, and writes OUT/results.json, OUT/results.md and OUT/bakeoff.svg. A row that was measured is kept in
OUT/work, so a run that was cut off goes on; `--only REGEX` measures the rows whose names match, `--again` measures
them anew. benchmarks/requirements.txt installs the libraries; one that is missing is named in the table.

What is compared is weights only: activations stay float, in every row. Norms, biases and positions are float16 in
every row and cost the same everywhere. The bytes are those of the file that the library writes. Quality is the KL
divergence of the next-token distribution from the original's, per token, teacher-forced with the original's own words
on calibration utterances that no row has seen.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from bakeoff_report import equal_kl, markdown, picture
from competitors import Case, Row, compressible
from ours import rows
from torch import Tensor

import packlight
from packlight.applying import JUDGED, OBSERVED, Options, calibration_batches, divide
from packlight.bundle import folder_bytes
from packlight.data import Dataset, check_disjoint, read_dataset
from packlight.errors import DataError, PacklightError
from packlight.evaluate import answers, quality, spread, threads_or_all
from packlight.families import Batch
from packlight.loading import load
from packlight.model import Model
from packlight.plan import write_json

FURTHER = 30  # judged utterances beside those that packlight's own calibration sets aside


@dataclass
class Bench:
    """What all rows share.

    Args:
        model: name or folder of the original.
        calibration: samples, split into those that calibrate and those that judge.
        evaluation: samples with transcripts for `--wer`, or None.
        out: results folder.
        options: see `packlight.applying.Options`.
    """

    model: str
    calibration: Dataset
    evaluation: Dataset | None
    out: Path
    options: Options

    @cached_property
    def original(self) -> Model:
        """The original, never changed."""
        return load(self.model)

    @cached_property
    def work(self) -> Path:
        """What is kept for this model and these samples."""
        parts = [self.original.source.sha256, self.calibration.sha256, FURTHER]
        folder = self.out / "work" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def batches(self) -> tuple[list[Batch], list[Batch]]:
        """(calibrating, judging) batches, with the original's own words."""
        if self.calibration.n < 5:
            raise DataError(f"{self.calibration.source} has {self.calibration.n} recordings; this needs at least 5.")
        observed, judged = divide(self._batches(self.calibration))
        seen = {s.sha256 for s in spread(self.calibration, OBSERVED + JUDGED)}
        rest = replace(self.calibration, samples=tuple(s for s in self.calibration.samples if s.sha256 not in seen))
        return observed, [*judged, *self._batches(replace(rest, samples=spread(rest, FURTHER)))]

    def _batches(self, samples: Dataset) -> list[Batch]:
        return calibration_batches(self.original, samples, self.options, self.work, say) if samples.n else []

    @cached_property
    def reference(self) -> list[Tensor]:
        """The original's log-probabilities on the judging batches."""
        return log_probabilities(self.original, self.batches[1])


def say(what: str, done: int, total: int) -> None:
    """Report progress."""
    print(f"\r{what}: {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def log_probabilities(model: Model, batches: Sequence[Batch]) -> list[Tensor]:
    """Log-probabilities [words + 1, vocabulary] for each batch."""
    with torch.no_grad():
        return [torch.log_softmax(model.family.run(model.module, b), -1) for b in batches]


def divergence(model: Model, batches: Sequence[Batch], reference: Sequence[Tensor]) -> list[tuple[float, int, int]]:
    """For each batch: (summed KL from the reference in nats, top tokens that changed, tokens)."""
    found = []
    for batch, wanted in zip(batches, reference, strict=True):
        now = log_probabilities(model, [batch])[0]
        kl = float((wanted.exp() * (wanted - now)).double().sum())
        found.append((kl, int((now.argmax(-1) != wanted.argmax(-1)).sum()), len(now)))
    return found


def float_rest_(model: Model, weights: set[str]) -> int:
    """Round what no row compresses (norms, biases, positions) to float16, and activations to nothing. Its bytes."""
    count = 0
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if name not in weights:
                parameter.copy_(parameter.half().float())
                count += 2 * parameter.numel()
    for layer in model.module.modules():
        if hasattr(layer, "activations"):
            layer.activations = "float"
    return count


def measure(bench: Bench, row: Row) -> tuple[dict[str, Any], Model]:
    """Make a row's model and measure it. Returns the row's numbers and the model."""
    case = Case(load(bench.model), bench.batches[0], bench.work / slug(row.name))
    counted = compressible(case.model)
    sizes = {name: sum(x.weight.numel() for x in layers.values()) for name, layers in counted.items()}
    names = {f"{p}.weight" for layers in counted.values() for p in layers}
    shutil.rmtree(case.folder, ignore_errors=True)
    case.folder.mkdir(parents=True)
    torch.manual_seed(0)
    row.make(case)
    rest = float_rest_(case.model, names)
    size = {name: folder_bytes(case.folder / name) for name in counted}
    found = divergence(case.model, bench.batches[1], bench.reference)
    tokens = sum(n for _, _, n in found)
    values = {
        "weights": sum(sizes.values()), "bits": 8 * sum(size.values()) / sum(sizes.values()),
        "bits_layers": 8 * size["layers"] / sizes["layers"], "bits_table": 8 * size["table"] / max(1, sizes["table"]),
        "bytes_layers": size["layers"], "bytes_table": size["table"], "bytes_rest": rest,
        "bytes": sum(size.values()) + rest, "kl": sum(k for k, _, _ in found) / tokens,
        "flips": sum(f for _, f, _ in found) / tokens, "tokens": tokens, "utterances": found,
    }  # fmt: skip
    shutil.rmtree(case.folder)
    return values, case.model


def errors(bench: Bench, model: Model, kept: Path) -> dict[str, Any]:
    """Word errors of a row's model and of the original on the evaluation samples, with a paired interval."""
    from tokenizers import Tokenizer

    assert bench.evaluation is not None
    options, family = bench.options, model.family

    def answering(which: Model) -> Any:
        return lambda audio: family.answer(which.module, audio, which.settings, options.language, options.task)

    before = answers(bench.evaluation, answering(bench.original), bench.work / "before.jsonl", "original", say)
    after = answers(bench.evaluation, answering(model), kept, kept.stem, say)
    decode = Tokenizer.from_str(model.tokenizer).decode
    return asdict(quality(bench.evaluation, before, after, decode, options.language or "en")[0])


def run_row(bench: Bench, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """A row's numbers: kept ones where they are of the same versions, else measured if it is asked for."""
    values = {"method": row.method, "setting": row.setting, "ours": row.ours, "package": row.package}
    try:
        values["version"] = version(row.package)
    except PackageNotFoundError:
        return {**values, "status": "not installed"}
    wanted = re.search(args.only, row.name, re.IGNORECASE) is not None
    kept = bench.work / "rows" / f"{slug(row.name)}.json"
    key = [values["version"], torch.__version__, sources() if row.ours else ""]
    done = json.loads(kept.read_text()) if kept.is_file() and not (args.again and wanted) else {}
    if done.get("key") != key:
        done = {}
    evaluated = bench.evaluation.sha256 if bench.evaluation and args.wer and row.headline else None
    need_wer = evaluated not in (None, done.get("wer", {}).get("evaluation"))
    if not wanted or (done and not need_wer):
        return done or {**values, "status": "not measured yet"}
    print(f"{row.name} ...", file=sys.stderr, flush=True)
    said = kept.with_suffix(".jsonl")
    if not done:
        said.unlink(missing_ok=True)
    found, model = measure(bench, row)
    done = {**done, **values, "status": "measured", "key": key, **found}
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, done)
    if need_wer:
        done["wer"] = {"evaluation": evaluated, **errors(bench, model, said)}
        write_json(kept, done)
    return done


def sources() -> str:
    """Hash of what makes packlight's own rows, so that a changed technique is measured anew."""
    root = Path(packlight.__file__).parent
    files = [
        root / f"{n}.py" for n in ("quant", "viterbi", "trellis", "chunks", "codec", "rans", "compress", "layers")
    ] + sorted(root.glob("techniques/*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def slug(name: str) -> str:
    """A row's name as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="packlight against real libraries; see the top of this file")
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of calibration recordings")
    parser.add_argument("--evaluation", type=Path, help="folder of recordings with transcripts")
    parser.add_argument("--wer", action="store_true", help="word errors of one setting per library: minutes each")
    parser.add_argument("--only", default="", metavar="REGEX", help="measure only rows whose names match")
    parser.add_argument("--again", action="store_true", help="measure these rows anew")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    """Run the bake-off; returns the exit status."""
    args = parse()
    torch.set_num_threads(threads_or_all(0))
    try:
        calibration = read_dataset(args.calibration)
        evaluation = read_dataset(args.evaluation, need_text=True) if args.evaluation else None
        if args.wer and evaluation is None:
            print("--wer needs --evaluation, a folder of recordings with transcripts.", file=sys.stderr)
            return 2
        if evaluation is not None:
            check_disjoint(calibration, evaluation)
        args.out.mkdir(parents=True, exist_ok=True)
        bench = Bench(args.model, calibration, evaluation, args.out, Options())
        found = [run_row(bench, row, args) for row in rows()]
    except PacklightError as error:
        print(error, file=sys.stderr)
        return 2
    write(args, found)
    return 0


def write(args: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """Print the table; write table, picture and numbers."""
    said = equal_kl(found)
    text = markdown(found, said)
    how = {"model": Path(args.model).name, "torch": torch.__version__, "packlight": packlight.__version__}
    write_json(args.out / "results.json", {"how": how, "rows": found, "equal_kl": said})
    (args.out / "results.md").write_text(text, encoding="utf-8")
    (args.out / "bakeoff.svg").write_text(picture(found), encoding="utf-8")
    print(text)
    print(f"Picture: {args.out / 'bakeoff.svg'}")


if __name__ == "__main__":
    sys.exit(main())
