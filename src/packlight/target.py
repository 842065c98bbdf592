"""What the user needs: size, latency, memory, allowed drop, runtime, device, in the units people write."""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packlight.errors import TargetError

Runtime = Literal["onnxruntime"]

_BYTES = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_NUMBER = re.compile(r"^\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-zµ%]*)\s*$")


@dataclass(frozen=True)
class Device:
    """A device people name. Memory and threads become part of the target; speed is measured, never assumed."""

    name: str
    threads: int
    memory: int  # bytes that one process may use in practice
    note: str


DEVICES: tuple[Device, ...] = (
    Device("local", 0, 0, "this machine: all its cores, no memory limit of its own"),
    Device("two-core", 2, 0, "any two-core box"),
    Device("pi4", 4, 1_500_000_000, "Raspberry Pi 4, 2 GB: Cortex-A72, no dot-product instructions"),
    Device("pi5", 4, 3_000_000_000, "Raspberry Pi 5, 4 GB: Cortex-A76 with dot-product instructions"),
    Device("phone", 4, 1_000_000_000, "a mid-range phone: four fast cores"),
)


@dataclass(frozen=True)
class Target:
    """What the deployed bundle must meet. None means: not asked for.

    Args:
        size: bytes of the whole bundle folder.
        latency: seconds per sample, median over the evaluation samples.
        memory: bytes, peak resident memory of a process that serves the bundle.
        drop: allowed loss of the task's metric, absolute, 0..1 (0.5pp is 0.005).
        drop_relative: allowed loss of the task's metric relative to the original's (2 % is 0.02).
        runtime: the runtime that will be deployed.
        device: name of a device in `DEVICES`.
        strict: the upper end of the 95 % interval must meet the allowed drop too, not only the estimate.
    """

    size: int | None = None
    latency: float | None = None
    memory: int | None = None
    drop: float | None = None
    drop_relative: float | None = None
    runtime: Runtime = "onnxruntime"
    device: str = "local"
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "latency", "memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TargetError(f"The target {name} is {value}; it must be above zero.")
        for name in ("drop", "drop_relative"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise TargetError(f"The allowed {name.replace('_', ' ')} is {value}; it must be from 0 to below 1.")
        if self.drop is not None and self.drop_relative is not None:
            raise TargetError("The target names an absolute and a relative drop. Keep one: 0.5pp or 2%.")
        if self.runtime != "onnxruntime":
            raise TargetError(f"Unknown runtime {self.runtime!r}. Known: onnxruntime.")
        find_device(self.device)
        limit = find_device(self.device).memory
        if limit and self.memory is not None and self.memory > limit:
            raise TargetError(
                f"--max-memory {format_bytes(self.memory)} is above what the device {self.device} has for one "
                f"process ({format_bytes(limit)}). Lower it, or name another device."
            )

    @property
    def empty(self) -> bool:
        """True when nothing is asked for."""
        return all(getattr(self, n) is None for n in ("size", "latency", "memory", "drop", "drop_relative"))

    @property
    def memory_limit(self) -> int | None:
        """Bytes: the memory asked for, else what the named device has, else None."""
        return self.memory if self.memory is not None else (find_device(self.device).memory or None)

    def allowed_drop(self, original: float) -> float | None:
        """The allowed drop as an absolute number 0..1, given the original's metric (also 0..1)."""
        if self.drop_relative is not None:
            return self.drop_relative * original
        return self.drop

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Target":
        """Read what `to_dict` wrote. Raises TargetError on unknown keys."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise TargetError(f"The target has unknown keys: {', '.join(unknown)}.")
        return cls(**values)


def find_device(name: str) -> Device:
    """The device of that name. Raises TargetError with the known names."""
    for device in DEVICES:
        if device.name == name:
            return device
    raise TargetError(f"Unknown device {name!r}. Known: {', '.join(d.name for d in DEVICES)}.")


def _parse(text: str, units: dict[str, Any], what: str, example: str) -> tuple[float, str]:
    match = _NUMBER.match(text)
    if not match:
        raise TargetError(f"Can't read the {what} {text!r}. Write it like {example}.")
    number, unit = float(match[1]), match[2]
    if number > 1e12:
        raise TargetError(f"The {what} {text[:20]!r} is out of all proportion. Write it like {example}.")
    if not unit:
        raise TargetError(f"The {what} {text!r} has no unit. Write it like {example}.")
    if unit not in units:
        raise TargetError(f"The {what} {text!r} has an unknown unit {unit!r}. Known: {', '.join(units)}.")
    return number, unit


def parse_bytes(text: str, what: str = "size") -> int:
    """'12MB' (10^6) or '12MiB' (2^20) to bytes. Raises TargetError."""
    number, unit = _parse(text, _BYTES, what, "12MB or 12MiB")
    return int(number * _BYTES[unit])


def parse_seconds(text: str) -> float:
    """'300ms' or '1.5s' to seconds. Raises TargetError."""
    number, unit = _parse(text, _SECONDS, "latency", "300ms or 1.5s")
    return number * _SECONDS[unit]


def parse_drop(text: str) -> tuple[float | None, float | None]:
    """'0.5pp' to (0.005, None), '2%' (relative) to (None, 0.02). Raises TargetError."""
    number, unit = _parse(text, {"pp": 1, "%": 1}, "drop", "0.5pp (percentage points) or 2% (relative)")
    return (number / 100, None) if unit == "pp" else (None, number / 100)


def format_bytes(value: float) -> str:
    """Bytes as people read them: 151.1 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def format_seconds(value: float) -> str:
    """Seconds as people read them: 240 ms, 1.93 s, 12 min."""
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if value < 120 else f"{value / 60:.0f} min"
