"""One process that loads one thing, answers a few recordings, and says what that took: `python -m packlight.measure`.

Peak memory can only be had from a process of its own. For a bundle nothing but the device side is imported.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packlight.errors import PacklightError

_RAPL = Path("/sys/class/powercap")
_PATIENCE = 1800  # seconds after which the process is given up


def measure(
    kind: str,
    name: str,
    recordings: Sequence[str | tuple[str, Sequence[str]]],
    threads: int,
    language: str | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Start that process and read what it says.

    Args:
        kind: 'bundle' or 'model'.
        name: its folder.
        recordings: files, or (file, its texts).
        threads: 0 for all cores.
        language: of a multilingual model; None is the bundle's own, else it is detected.
        task: None is the bundle's own, and 'transcribe' for a model.
        trust_remote_code: see `packlight.load`.

    Returns:
        'load' seconds, 'memory' bytes at the peak, 'latency' seconds per recording (median), 'energy' joules per
        recording or None where the machine reports none.

    Raises:
        PacklightError: the process failed or took too long; the message holds its last line.
    """
    how = {"threads": threads, "language": language, "task": task, "trust_remote_code": trust_remote_code}
    command = [sys.executable, "-m", "packlight.measure", kind, name, json.dumps(how)]
    command += [json.dumps([r, []] if isinstance(r, str) else [r[0], list(r[1])]) for r in recordings]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise PacklightError(f"Measuring {name} took more than {_PATIENCE} s. Use shorter recordings.") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it was killed, perhaps for lack of memory"]
        last = lines[-1]
        if last.startswith("packlight.errors."):
            raise PacklightError(last.partition(": ")[2])
        raise PacklightError(f"The measuring process for {name} ended with status {done.returncode}: {last}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def joules() -> float | None:
    """Energy that the processor packages have used so far, where Linux reports it (RAPL); None otherwise."""
    files = sorted(_RAPL.glob("*-rapl:?/energy_uj")) if _RAPL.is_dir() else []
    try:
        return sum(int(f.read_text()) for f in files) / 1e6 if files else None
    except (OSError, ValueError):
        return None


def peak_memory() -> int:
    """Peak resident bytes of this process so far.

    On Linux from the kernel's high-water mark of this program: `getrusage` also counts the process that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> str:
    """The processor and number of cores, as people name them."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def _answerer(kind: str, name: str, how: dict[str, Any]) -> tuple[Any, Any]:
    """(what answers, what opens an input)."""
    language, task, threads = how["language"], how["task"], how["threads"]
    if kind == "bundle":
        from packlight.serve import open_served

        served = open_served(Path(name), threads)
        return (lambda content: served.answer(content, language, task)), served.open_input
    import torch

    from packlight.loading import load

    torch.set_num_threads(threads or (os.cpu_count() or 1))
    model = load(name, trust_remote_code=how["trust_remote_code"])
    family, settings = model.family, model.settings
    family.prompt(settings, language, task or "transcribe")  # raises for a language or task that it does not know
    asked = (language, task or "transcribe")
    return (lambda content: family.answer(model.module, content, settings, *asked)), family.open_input


def _main(arguments: list[str]) -> None:
    kind, name, how, *recordings = arguments
    start = time.perf_counter()
    answer, open_input = _answerer(kind, name, json.loads(how))
    load = time.perf_counter() - start
    audios = [open_input(Path(path), texts) for path, texts in map(json.loads, recordings)]
    if audios:
        answer(audios[0])  # warm-up
    before, seconds = joules(), []
    for audio in audios:
        start = time.perf_counter()
        answer(audio)
        seconds.append(time.perf_counter() - start)
    after = joules()
    energy = (after - before) / len(audios) if audios and before is not None and after is not None else None
    latency = sorted(seconds)[len(seconds) // 2] if seconds else None
    print(json.dumps({"load": load, "memory": peak_memory(), "latency": latency, "energy": energy}))


if __name__ == "__main__":
    _main(sys.argv[1:])
