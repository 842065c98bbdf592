"""The training loop: any tensors, any loss of one sample, one process or several, and a kill costs nothing but time.

It stands on `accelerate`, which finds the processes of `torchrun` or `accelerate launch` and the device of each. A
step takes `accumulate` samples in all: they are shared out among the processes, and their gradients are summed, so the
number of processes changes the time and nothing else. Nothing random has a state: the order of an epoch comes from the
seed and its number, and dropout from the seed, the epoch and the sample. So what a killed run resumes from is the
tensors, Adam's moments (Kingma and Ba 2015, arXiv 1412.6980) and the losses so far, and it ends with the same bits.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packlight.errors import PlanError
from packlight.plan import write_json

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
PRECISIONS = ("auto", "float32", "bfloat16")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Training:
    """Settings.

    Args:
        epochs: passes over the samples.
        max_steps: stop after so many steps; 0 for no limit.
        rate: learning rate, relative to the size (root mean square) of each tensor; falls to 0 along a cosine
            (Loshchilov and Hutter 2017, arXiv 1608.03983).
        least: size that a tensor of smaller numbers, such as a bias of zeros, counts as.
        warmup: share of the steps in which the rate rises.
        accumulate: samples whose gradients make a step, over all processes.
        clip: norm that a step's gradient is cut down to.
        patience: epochs in a row that may fail to better the held-back samples before it stops; 0 for any number.
        keep: steps between checkpoints within an epoch.
        seed: of the order and of dropout.
        precision: 'bfloat16' computes in it and keeps the tensors in float32 (Micikevicius et al. 2018,
            arXiv 1710.03740); 'auto' does where a GPU has it.
    """

    epochs: int = 5
    max_steps: int = 0
    rate: float = 1e-3
    least: float = 1e-8
    warmup: float = 0.0
    accumulate: int = 1
    clip: float = 1.0
    patience: int = 0
    keep: int = 100
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        if min(self.epochs, self.max_steps, self.patience) < 0:
            raise PlanError("epochs, max_steps and patience must not be below 0.")
        if min(self.accumulate, self.keep) < 1:
            raise PlanError("accumulate and keep must be 1 or more.")
        if not 0 < self.rate < 1 or not 0 <= self.warmup < 1 or self.clip <= 0 or self.least <= 0:
            raise PlanError("rate must lie between 0 and 1, warmup from 0 to below 1; clip and least must be above 0.")
        if self.precision not in PRECISIONS:
            raise PlanError(f"precision must be one of {', '.join(PRECISIONS)}.")


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Args:
        name: of its files in the work folder.
        title: what progress says.
        tensors: name -> float tensor to train, in place.
        loss: (sample, epoch) -> what its gradient is taken of.
        judge: sample -> what decides which epoch was best.
        learned, judged: samples that teach, and others that only judge.
        key: whatever else must be the same when a killed run goes on: the model, the samples.
    """

    name: str
    title: str
    tensors: dict[str, Tensor]
    loss: Callable[[int, int], Tensor]
    judge: Callable[[int], Tensor]
    learned: Sequence[int]
    judged: Sequence[int]
    key: str = ""


@dataclass
class Curve:
    """How it went.

    Args:
        losses: of each step, the mean of its samples.
        judged: of the held-back samples, before the first step and after each epoch.
    """

    losses: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The least judged loss."""
        return min(v for v in self.judged if math.isfinite(v))


def accelerator() -> Any:
    """The process that this is among those started together. Raises ModuleNotFoundError without `accelerate`."""
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())


def every(count: int, held: float) -> list[int]:
    """The samples that only judge: every 1/held-th, at least the last."""
    step = max(2, round(1 / held))
    return [i for i in range(count) if i % step == step - 1] or [count - 1]


def train(task: Task, settings: Training, work: Path, progress: Progress | None = None) -> Curve:
    """Train; the tensors end as they were when the held-back samples liked them best.

    Args:
        task: what is to be learned.
        settings: how.
        work: folder that keeps the state; a later call with the same task goes on after it.
        progress: called with (title, steps done, steps in all) by the first process.

    Returns:
        the losses, the same in every process and for every number of them up to the order of sums.

    Raises:
        PlanError: no samples, more processes than samples in a step, or a work folder of another task.
    """
    processes = accelerator()
    if not task.learned or not task.judged:
        raise PlanError("Training needs samples to learn from and others to judge by. Give it more.")
    if settings.accumulate < processes.num_processes:
        raise PlanError(
            f"A step takes {settings.accumulate} samples, which {processes.num_processes} processes can't share. "
            "Raise accumulate or start fewer processes."
        )
    work.mkdir(parents=True, exist_ok=True)
    sizes = {n: max(float(t.detach().square().mean().sqrt()), settings.least) for n, t in task.tensors.items()}
    optimizer = torch.optim.Adam([{"params": [t], "lr": settings.rate * sizes[n]} for n, t in task.tensors.items()])
    rates = [group["lr"] for group in optimizer.param_groups]
    devices = range(torch.cuda.device_count())
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices):
            curve = _resume(task, settings, optimizer, work)
            if not curve.judged:
                curve.judged.append(_judge(task, processes))
                _keep_best(task, work, processes)
            for tensor in task.tensors.values():
                tensor.requires_grad_(True)
            _run(task, settings, optimizer, rates, curve, (work, processes, progress))
    finally:
        for tensor in task.tensors.values():
            tensor.requires_grad_(False)
            tensor.grad = None
    processes.wait_for_everyone()
    _copy(task, _load(work / f"{task.name}.best.safetensors")[0])
    return curve


def steps_of(task: Task, settings: Training) -> tuple[int, int]:
    """(steps in an epoch, steps in all)."""
    per_epoch = -(-len(task.learned) // settings.accumulate)
    total = settings.epochs * per_epoch
    return per_epoch, min(total, settings.max_steps) if settings.max_steps else total


def _run(
    task: Task,
    settings: Training,
    optimizer: torch.optim.Optimizer,
    rates: Sequence[float],
    curve: Curve,
    around: tuple[Path, Any, Progress | None],
) -> None:
    work, processes, progress = around
    per_epoch, total = steps_of(task, settings)
    while (step := len(curve.losses)) < total and not _enough(curve, settings):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(task.learned), generator=torch.Generator().manual_seed(settings.seed + epoch))
        picked = order.tolist()[place * settings.accumulate : (place + 1) * settings.accumulate]
        loss = _gradient(task, settings, [task.learned[p] for p in picked], epoch, processes)
        torch.nn.utils.clip_grad_norm_(task.tensors.values(), settings.clip)
        share = factor(step, total, settings.warmup)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(loss)
        ends = place == per_epoch - 1 or step == total - 1
        if ends:
            curve.judged.append(_judge(task, processes))
            log.info("%s: epoch %d, judged %.6g", task.title, epoch + 1, curve.judged[-1])
            if curve.judged[-1] < min(curve.judged[:-1]):
                _keep_best(task, work, processes)
        if ends or (step + 1) % settings.keep == 0:
            _keep(task, settings, optimizer, curve, work, processes)
        if progress and processes.is_main_process:
            progress(task.title, step + 1, total)


def factor(step: int, total: int, warmup: float) -> float:
    """What the rate is multiplied by: up along a line, then down to 0 along a cosine."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _enough(curve: Curve, settings: Training) -> bool:
    """Whether the held-back samples say to stop: no gain for too long, or numbers that are none."""
    if not math.isfinite(curve.judged[-1]):
        log.warning("The judged loss is %s: training stops, and the best state is kept.", curve.judged[-1])
        return True
    behind = len(curve.judged) - 1 - curve.judged.index(curve.best)
    return 0 < settings.patience <= behind


def _gradient(task: Task, settings: Training, picked: Sequence[int], epoch: int, processes: Any) -> float:
    """Leave in the tensors the gradient of the mean loss of these samples, over all processes. Returns that mean."""
    tensors = list(task.tensors.values())
    device = tensors[0].device
    mean = torch.zeros(1, device=device)
    for sample in picked[processes.process_index :: processes.num_processes]:
        torch.manual_seed(_seed(settings.seed, epoch, sample))
        with torch.enable_grad(), _autocast(settings, device):
            loss = task.loss(sample, epoch) / len(picked)
        processes.backward(loss)
        mean += loss.detach()
    if processes.num_processes > 1:
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        flat = processes.reduce(torch.cat([*(g.reshape(-1) for g in grads), mean]), "sum")
        for tensor, grad in zip(tensors, flat[:-1].split([t.numel() for t in tensors]), strict=True):
            tensor.grad = grad.view_as(tensor).clone()
        mean = flat[-1:]
    return float(mean)


def _seed(seed: int, epoch: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch} {sample}".encode()).digest()[:7], "big")


def _autocast(settings: Training, device: torch.device) -> AbstractContextManager[Any]:
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if settings.precision == "bfloat16" or (settings.precision == "auto" and fast):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _judge(task: Task, processes: Any) -> float:
    device = next(iter(task.tensors.values())).device if task.tensors else torch.device("cpu")
    found = torch.zeros(len(task.judged), device=device)
    with torch.no_grad():
        for place in range(processes.process_index, len(task.judged), processes.num_processes):
            found[place] = task.judge(task.judged[place])
    return float((processes.reduce(found, "sum") if processes.num_processes > 1 else found).mean())


# State on disk ------------------------------------------------------------------------------------------------------


def _key(task: Task, settings: Training) -> str:
    chosen = {k: v for k, v in asdict(settings).items() if k not in ("keep", "patience")}
    shapes = {n: list(t.shape) for n, t in task.tensors.items()}
    base = [task.key, chosen, shapes, list(task.learned), list(task.judged)]
    return hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file so that no reader, and no later run, ever sees half of it."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, part, metadata)
    part.replace(path)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises PlanError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            return {n: opened.get_tensor(n) for n in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PlanError(f"{path} can't be read ({error}). Remove its folder to begin the training anew.") from None


def _keep_best(task: Task, work: Path, processes: Any) -> None:
    if processes.is_main_process:
        _save(task.tensors, work / f"{task.name}.best.safetensors")


def _keep(
    task: Task, settings: Training, optimizer: torch.optim.Optimizer, curve: Curve, work: Path, processes: Any
) -> None:
    """One file holds all that resuming needs, so no two can disagree; a second is for people to read."""
    if not processes.is_main_process:
        return
    values = dict(task.tensors)
    for name, tensor in task.tensors.items():
        state = optimizer.state.get(tensor, {})
        values |= {f"{name}#{key}": state[key] for key in _MOMENTS if key in state}
    state = json.dumps({"key": _key(task, settings), **asdict(curve)})
    _save(values, work / f"{task.name}.safetensors", {"state": state})
    write_json(work / f"{task.name}.json", asdict(curve))


def _resume(task: Task, settings: Training, optimizer: torch.optim.Optimizer, work: Path) -> Curve:
    """Take up the last state that was kept; an empty curve where there is none."""
    file = work / f"{task.name}.safetensors"
    if not file.is_file():
        return Curve()
    values, metadata = _load(file)
    state = json.loads(metadata["state"])
    if state.pop("key") != _key(task, settings):
        raise PlanError(f"{file} was kept by a training with other settings, model or samples. Choose another folder.")
    _copy(task, values)
    for name, tensor in task.tensors.items():
        found = {key: values[f"{name}#{key}"] for key in _MOMENTS if f"{name}#{key}" in values}
        if found:
            step = found.pop("step")  # stays on the CPU, as Adam has it
            optimizer.state[tensor] = {"step": step, **{k: v.to(tensor.device) for k, v in found.items()}}
    return Curve(**state)


def _copy(task: Task, values: dict[str, Tensor]) -> None:
    for name, tensor in task.tensors.items():
        tensor.data.copy_(values[name])
