"""The training loop: it learns, it stops where it should, a kill changes nothing, nor does the number of processes."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from packlight.errors import PlanError
from packlight.training import Task, Training, every, factor, train
from planted_training import SETTINGS, digest, task

PROGRAM = Path(__file__).with_name("planted_training.py")


def command(*arguments: str, processes: int = 1) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *start, str(PROGRAM), *arguments]


def environment() -> dict[str, str]:
    import packlight

    source = str(Path(packlight.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def finished(*arguments: str, processes: int = 1) -> dict[str, Any]:
    done = subprocess.run(
        command(*arguments, processes=processes), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def killed(work: Path, after: int) -> None:
    """Run until that step was reported, then SIGKILL."""
    with subprocess.Popen(command(str(work), "0.2"), env=environment(), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.strip() == f"step {after}":
                running.send_signal(signal.SIGKILL)
                break
        assert running.wait(60) == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return finished(str(tmp_path_factory.mktemp("whole")), "0")


def test_it_learns_what_was_planted(tmp_path: Path) -> None:
    made, tensors = task(noise=0.0)
    curve = train(made, Training(epochs=60, rate=0.2, least=0.5), tmp_path)
    assert curve.judged[-1] < 1e-3 * curve.judged[0]
    assert tensors["b"] == pytest.approx(torch.ones(3), abs=0.1)
    assert not any(t.requires_grad or t.grad is not None for t in tensors.values())


def test_after_sigkill_it_goes_on_to_the_same_bits_and_curve(tmp_path: Path, whole: dict[str, Any]) -> None:
    killed(tmp_path, after=2)  # before the first checkpoint
    killed(tmp_path, after=8)  # between the end of an epoch and the next checkpoint
    state = tmp_path / "planted.safetensors"
    assert state.is_file() and not list(tmp_path.glob("*.part"))
    assert finished(str(tmp_path), "0") == whole


def test_a_resume_that_forgets_the_moments_is_caught(tmp_path: Path, whole: dict[str, Any]) -> None:
    killed(tmp_path, after=8)
    assert finished(str(tmp_path), "0", "forget")["sha256"] != whole["sha256"]


def test_a_finished_training_is_not_run_again(tmp_path: Path) -> None:
    made, first = task()
    curve = train(made, SETTINGS, tmp_path)
    made, again = task()
    steps: list[int] = []
    assert train(made, SETTINGS, tmp_path, lambda what, done, total: steps.append(done)) == curve
    assert digest(again) == digest(first) and not steps


@pytest.mark.parametrize("processes", [2])
def test_processes_share_the_samples_of_a_step_and_change_nothing(
    tmp_path: Path, whole: dict[str, Any], processes: int
) -> None:
    shared = finished(str(tmp_path / "a"), "0", processes=processes)
    assert shared["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert shared["judged"] == pytest.approx(whole["judged"], rel=1e-5)


def test_a_gradient_accumulated_over_samples_is_that_of_their_mean(tmp_path: Path) -> None:
    made, tensors = task(noise=0.0)
    one = replace(made, loss=lambda i, e: torch.stack([made.judge(k) for k in range(8)]).mean(), learned=[0])
    settings = Training(epochs=3, rate=0.05, least=0.1, accumulate=8)
    losses = train(made, settings, tmp_path / "many").losses
    after = digest(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert train(one, replace(settings, accumulate=1), tmp_path / "one").losses == pytest.approx(losses, rel=1e-5)
    assert after != digest(task()[1])


def planted(judged: list[float], work: Path, **changes: Any) -> tuple[Any, torch.Tensor]:
    """A tensor that grows by about one in each epoch of one step, judged as planted."""
    tensor = torch.zeros(1)
    verdicts = iter(judged)
    made = Task(
        "t", "t", {"x": tensor}, lambda i, e: -100 * tensor.sum(), lambda i: torch.tensor(next(verdicts)), [0], [1]
    )
    settings = Training(**{"epochs": len(judged) - 1, "rate": 0.99, "least": 1.0, **changes})
    return train(made, settings, work), tensor


def test_the_state_that_was_judged_best_comes_back(tmp_path: Path) -> None:
    curve, tensor = planted([5.0, 4.0, 2.0, 3.0, 6.0], tmp_path)
    assert curve.judged == [5.0, 4.0, 2.0, 3.0, 6.0]
    _, second = planted([5.0, 4.0, 2.0, 2.5, 2.5], tmp_path / "again", max_steps=4)
    assert torch.equal(tensor, second)
    assert 1 < float(tensor) < 2  # two steps, the second at a lower rate


def test_the_start_comes_back_where_nothing_was_better(tmp_path: Path) -> None:
    assert float(planted([1.0, 2.0, 3.0], tmp_path)[1]) == 0


def test_it_stops_after_epochs_without_gain(tmp_path: Path) -> None:
    assert planted([5.0, 4.0, 4.5, 4.2, 1.0], tmp_path, patience=2)[0].judged == pytest.approx([5.0, 4.0, 4.5, 4.2])


def test_numbers_that_are_none_end_it(tmp_path: Path) -> None:
    curve, tensor = planted([5.0, 4.0, float("nan"), 1.0], tmp_path)
    assert len(curve.judged) == 3 and curve.best == 4.0 and 0 < float(tensor) < 1


def test_max_steps_ends_within_an_epoch_and_judges(tmp_path: Path) -> None:
    curve = train(task()[0], replace(SETTINGS, max_steps=6), tmp_path)
    assert (len(curve.losses), len(curve.judged)) == (6, 3)


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine() -> None:
    assert [factor(s, 10, 0.2) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert factor(6, 10, 0.2) == pytest.approx(0.5)
    assert factor(0, 10, 0.0) == 1.0 and factor(10, 10, 0.0) == pytest.approx(0.0)


def test_a_gradient_is_cut_down_to_the_norm(tmp_path: Path) -> None:
    """Adam hides the size of one step, so a huge gradient after small ones shows: cut down it is one among them."""
    moved = []
    for clip in (1.0, 1e9):
        tensor = torch.zeros(1)
        weight = iter([1.0, 1.0, 1.0, 1e6])
        made = Task(
            "t",
            "t",
            {"x": tensor},
            lambda i, e, t=tensor, w=weight: -next(w) * t.sum(),  # type: ignore[misc]
            lambda i, t=tensor: -t.sum(),
            [0],
            [1],
        )  # type: ignore[misc]
        train(made, Training(epochs=4, rate=0.1, least=1.0, clip=clip), tmp_path / str(clip))
        state = load_file(tmp_path / str(clip) / "t.safetensors")
        moved.append(float(state["x#exp_avg_sq"]))
    assert moved[0] == pytest.approx(1 - 0.999**4, rel=1e-3) and moved[1] > 1e8


def test_half_precision_keeps_the_tensors_in_full(tmp_path: Path) -> None:
    made, tensors = task(noise=0.0)
    exact = train(made, replace(SETTINGS, epochs=1), tmp_path / "full").losses
    made, tensors = task(noise=0.0)
    rough = train(made, replace(SETTINGS, epochs=1, precision="bfloat16"), tmp_path / "half").losses
    assert tensors["W"].dtype == torch.float32
    assert rough == pytest.approx(exact, rel=0.05) and rough != exact


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    train(task()[0], SETTINGS, tmp_path)
    with pytest.raises(PlanError, match="other settings, model or samples"):
        train(task()[0], replace(SETTINGS, rate=0.06), tmp_path)
    with pytest.raises(PlanError, match="other settings, model or samples"):
        train(replace(task()[0], key="two"), SETTINGS, tmp_path)
    (tmp_path / "planted.safetensors").write_bytes(b"damaged")
    with pytest.raises(PlanError, match="can't be read"):
        train(task()[0], SETTINGS, tmp_path)


def test_a_file_that_a_kill_cut_short_is_not_taken_up(tmp_path: Path) -> None:
    (tmp_path / "planted.safetensors.part").write_bytes(b"half a fi")
    save_file({"W": torch.ones(5, 3), "b": torch.ones(3)}, tmp_path / "planted.best.safetensors")  # of an older life
    made, tensors = task()
    assert len(train(made, SETTINGS, tmp_path).judged) == 5
    assert digest(tensors) == finished(str(tmp_path / "b"), "0")["sha256"]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for wrong in ({"epochs": -1}, {"rate": 0}, {"warmup": 1}, {"accumulate": 0}, {"clip": 0}, {"precision": "int8"}):
        with pytest.raises(PlanError):
            Training(**wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="others to judge by"):
        train(replace(task()[0], judged=()), SETTINGS, tmp_path)
    done = subprocess.run(
        [*command(str(tmp_path), "0", processes=3)], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0 and "3 processes can't share" in done.stderr


def test_every_fifth_judges() -> None:
    assert every(10, 0.2) == [4, 9] and every(3, 0.2) == [2] and every(4, 0.5) == [1, 3]
