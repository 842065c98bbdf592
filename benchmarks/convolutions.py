"""What separable and grouped convolutions save in Whisper's stem, and what they cost: KL to the original, on its own words.

python benchmarks/convolutions.py MODEL RECORDINGS
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packlight.applying import Options, calibration_batches, divide
from packlight.compress import compress_
from packlight.data import read_dataset
from packlight.families import Graph
from packlight.loading import load
from packlight.plan import Plan, Step
from packlight.runtimes.onnx import open_graphs
from packlight.runtimes.onnx_export import export

SCOPE = ("model.encoder.conv?",)
FRAMES, ROUNDS = 1000, 12  # of 10 ms that are timed; times each
ROWS: tuple[tuple[str, Step | None], ...] = (
    ("the original's", None),
    *((f"separable, rank {r}", Step("separable_convolution", {"rank": r}, SCOPE)) for r in (1, 2)),
    ("separable, rank 1, from weights alone", Step("separable_convolution", {"rank": 1, "feedback": False}, SCOPE)),
    *((f"grouped in {g}", Step("grouped_convolution", {"groups": g}, SCOPE)) for g in (2, 4)),
    ("grouped in 2, from weights alone", Step("grouped_convolution", {"groups": 2, "feedback": False}, SCOPE)),
)


class _Stem(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = encoder.conv1, encoder.conv2

    def forward(self, features: Tensor) -> tuple[Tensor]:
        return (nn.functional.gelu(self.conv2(nn.functional.gelu(self.conv1(features)))),)


def opened(module: Any, folder: Path) -> Any:
    """The stem in ONNX Runtime, on one thread."""
    mel = torch.zeros(1, module.config.num_mel_bins, FRAMES)
    graph = Graph("stem", _Stem(module.model.encoder), (mel,), ("features",), ("states",), {})
    data, arrays = export(graph, module)
    (folder / "stem.onnx").write_bytes(data)
    return open_graphs({"stem": folder / "stem.onnx"}, lambda names: [(n, arrays[n]) for n in names], 1)["stem"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--work", type=Path, default=Path("work"), help="keeps what the original said")
    parser.add_argument("--taught", type=int, default=12, help="recordings that teach; every fifth only judges")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = load(options.model)
    batches = calibration_batches(model, read_dataset(options.recordings), Options(), options.work, None)
    taught, judged = divide(batches)
    family = model.family
    with torch.inference_mode():
        whole = [torch.log_softmax(family.run(model.module, b), -1) for b in judged]
    count = sum(map(len, whole))
    rows, stems = [], []
    for name, step in ROWS:
        changed = copy.copy(model)
        changed.module, changed.edits = copy.deepcopy(model.module), []
        with tempfile.TemporaryDirectory() as folder:
            if step is not None:
                compress_(changed, Plan((step,)), taught[: options.taught], Path(folder) / "float")
            with torch.inference_mode():
                now = [torch.log_softmax(family.run(changed.module, b), -1) for b in judged]
            kl = sum(float((w.exp() * (w - n)).sum()) for w, n in zip(whole, now, strict=True)) / count
            stem = _Stem(changed.module.model.encoder)
            numbers = sum(p.numel() for p in stem.parameters())
            inner = [p for p, m in changed.module.named_modules() if isinstance(m, nn.Conv1d) and m.groups == 1]
            whole_floats = opened(changed.module, Path(folder))
            if inner:
                compress_(changed, Plan((Step("round_to_nearest", {}, tuple(inner)),)), [], Path(folder) / "codes")
            rows.append((name, numbers, kl))
            stems.append((whole_floats, opened(changed.module, Path(folder))))
    times = np.zeros((len(stems), 2, ROUNDS))
    feed = {"features": judged[0]["input_features"][..., :FRAMES].numpy()}
    for i in range(ROUNDS):
        for k, pair in enumerate(stems):
            for j, part in enumerate(pair):
                start = time.perf_counter()
                part.run(feed)
                times[k, j, i] = time.perf_counter() - start
    print("| convolutions | numbers | KL | 10 s, floats | 10 s, 8-bit codes |\n|---|---:|---:|---:|---:|")
    for (name, numbers, kl), (floats, codes) in zip(rows, np.median(times, 2), strict=True):
        print(f"| {name} | {numbers} | {kl:.4f} | {1e3 * floats:.1f} ms | {1e3 * codes:.1f} ms |")


if __name__ == "__main__":
    main()
