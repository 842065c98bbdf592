"""What it costs to show Whisper's encoder less of the padding: KL to the original, on the original's own words.

python benchmarks/context.py MODEL RECORDINGS
"""

import argparse
from pathlib import Path

import torch

from packlight.applying import Options, calibration_batches, divide
from packlight.context import AudioContext, places
from packlight.data import read_dataset
from packlight.families import Batch
from packlight.families.whisper_graphs import hear
from packlight.loading import load

ROWS: tuple[tuple[str, AudioContext | None, bool], ...] = (
    ("nothing", None, True),
    ("near 64", AudioContext(64, 0, 0), True),
    ("near 64, far 32", AudioContext(64, 0, 32), True),
    ("near 64, middle 16, far 32, each as one position", AudioContext(64, 16, 32), False),
    ("near 64, middle 16, far 32, weighted", AudioContext(64, 16, 32), True),
    ("near 128, middle 32, far 64, weighted", AudioContext(128, 32, 64), True),
)


def shortened(module: torch.nn.Module, batch: Batch, context: AudioContext | None, weighted: bool) -> Batch:
    """The batch with the states of an encoder that saw part of its window."""
    kept, sizes = places(int(batch["spoken"]), module.config.max_source_positions, context or AudioContext(0, 0, 0))
    features = batch["input_features"][..., : 2 * len(kept)]
    states = hear(module.model.encoder, features, torch.from_numpy(kept), torch.from_numpy(sizes) * weighted)
    return {**batch, "states": states}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--work", type=Path, default=Path("work"), help="keeps what the original said")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = load(options.model)
    _, judged = divide(calibration_batches(model, read_dataset(options.recordings), Options(), options.work, None))
    family, module = model.family, model.module
    print("| kept beside the speech | KL | top tokens changed |\n|---|---:|---:|")
    with torch.inference_mode():
        whole = [torch.log_softmax(family.run(module, b), -1) for b in judged]
        count = sum(map(len, whole))
        for name, context, weighted in ROWS:
            now = [torch.log_softmax(family.run(module, shortened(module, b, context, weighted)), -1) for b in judged]
            kl = sum(float((w.exp() * (w - n)).sum()) for w, n in zip(whole, now, strict=True)) / count
            flips = sum(int((w.argmax(-1) != n.argmax(-1)).sum()) for w, n in zip(whole, now, strict=True)) / count
            print(f"| {name} | {kl:.4f} | {flips:.1%} |", flush=True)


if __name__ == "__main__":
    main()
