"""A planted regression for the training loop, also as a program: killed, resumed, and run by several processes.

python planted_training.py WORK SECONDS_PER_STEP [FAULT]: prints a line per step, last the sha256 of the tensors and the
losses. The loss has noise of its own, so a state that were not taken up exactly would show.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import torch

from packlight import training
from packlight.training import Curve, Task, Training, train

COUNT = 10
SETTINGS = Training(epochs=4, rate=0.05, least=0.1, warmup=0.2, accumulate=2, keep=3, seed=5)


def task(noise: float = 0.3) -> tuple[Task, dict[str, torch.Tensor]]:
    """y = x W + b of a planted W and b from pictures of ten samples; two of them judge."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 6, 5, generator=draw)
    aim = x @ torch.randn(5, 3, generator=draw) + 1
    tensors = {"W": torch.zeros(5, 3), "b": torch.zeros(3)}

    def error(i: int) -> torch.Tensor:
        return (x[i] @ tensors["W"] + tensors["b"] - aim[i]).square().mean()

    def loss(i: int, epoch: int) -> torch.Tensor:
        seen = x[i] + noise * torch.randn(x[i].shape)
        return (seen @ tensors["W"] + tensors["b"] - aim[i]).square().mean()

    return Task("planted", "learning", tensors, loss, error, range(8), (8, 9), "one"), tensors


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[n].numpy().tobytes() for n in sorted(tensors))).hexdigest()


def main(work: Path, pause: float, fault: str = "") -> None:
    if fault == "forget":  # a resume that loses Adam's moments
        training._MOMENTS = ()
    if fault == "repeat":  # a process that takes every sample
        take = training._gradient
        training._gradient = lambda t, s, picked, *more: take(t, s, [*picked, *picked], *more)
    made, tensors = task()

    def progress(what: str, done: int, total: int) -> None:
        print(f"step {done}", flush=True)
        time.sleep(pause)

    curve: Curve = train(made, SETTINGS, work, progress)
    if training.accelerator().is_main_process:
        print(json.dumps({"sha256": digest(tensors), "losses": curve.losses, "judged": curve.judged}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:])
