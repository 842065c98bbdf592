"""A plan is data: which technique, with which settings, on which parts, and why. No torch here.

`apply` runs a plan and decides nothing. The file is JSON, so a person can write one by hand; its keys are
documented in docs/reference/plan.md.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from packlight.errors import PlanError

VERSION = 1


@dataclass(frozen=True)
class Step:
    """One technique on some parts.

    Args:
        technique: its name in `packlight.tables.TECHNIQUES`.
        config: the technique's settings, the fields of its config dataclass.
        scope: Unix wildcards (not regular expressions) over the paths of layers, e.g. 'model.encoder.*'.
            A layer is taken by the first step of the plan whose scope names it.
        reason: why the planner, or a person, chose this.
    """

    technique: str
    config: dict[str, Any] = field(default_factory=dict)
    scope: tuple[str, ...] = ("*",)
    reason: str = ""

    def takes(self, path: str) -> bool:
        """Whether the scope names that path."""
        return any(fnmatchcase(path, pattern) for pattern in self.scope)


@dataclass(frozen=True)
class Plan:
    """The steps, and what they were made for.

    Args:
        steps: run in the order of their stages, then as written.
        family: the family of model it was made for.
        calibration: {'sha256', 'n', 'seconds'} of the calibration samples it needs; empty when it needs none.
        seed: the one seed of everything random.
        name: a short name, e.g. 'p07'.
        expected: what the planner predicted: {'bytes', 'kl'}; never used when applying.
    """

    steps: tuple[Step, ...]
    family: str = "whisper"
    calibration: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    name: str = ""
    expected: dict[str, float] = field(default_factory=dict)
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def key(self) -> str:
        """Sha256 of what applying depends on: steps (without their reasons), family, calibration and seed."""
        steps = [{k: v for k, v in s.items() if k != "reason"} for s in self.to_dict()["steps"]]
        base = {"steps": steps, "family": self.family, "seed": self.seed, "calibration": self.calibration}
        return hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class StepRecord:
    """What a step did to one layer, for the report and the bundle's manifest."""

    path: str
    part: str
    technique: str
    parameters: int
    rate: float  # bits per weight, measured rate of the codes or width of the format
    distortion: float  # E|(W - Ŵ)x|² / E|Wx|² on calibration data; |W - Ŵ|² / |W|² where no Gram matrix exists
    bound: float | None = None  # bits per weight below which no code reaches that distortion; needs a Gram matrix


def plan_from_dict(values: dict[str, Any], where: str = "the plan") -> Plan:
    """Read what `Plan.to_dict` wrote, or a person did. Raises PlanError naming the key that is wrong."""
    if not isinstance(values, dict):
        raise PlanError(f"{where}: a plan is a JSON object with the key 'steps'.")
    unknown = sorted(set(values) - set(Plan.__dataclass_fields__))
    if unknown:
        raise PlanError(f"{where}: unknown keys {', '.join(unknown)}. See docs/reference/plan.md.")
    version = values.get("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise PlanError(f"{where}: version {version} is newer than this packlight reads ({VERSION}). Update packlight.")
    steps = values.get("steps")
    if not isinstance(steps, list) or not steps:
        raise PlanError(f"{where}: 'steps' must be a list with at least one step.")
    rest = {k: v for k, v in values.items() if k != "steps"}
    for key, kind in (("calibration", dict), ("expected", dict), ("seed", int), ("family", str), ("name", str)):
        if key in rest and not isinstance(rest[key], kind):
            raise PlanError(f"{where}: {key!r} must be of type {kind.__name__}. See docs/reference/plan.md.")
    return Plan(steps=tuple(_step(s, f"{where}: step {i + 1}") for i, s in enumerate(steps)), **rest)


def _step(values: Any, where: str) -> Step:
    if not isinstance(values, dict) or not isinstance(values.get("technique"), str):
        raise PlanError(f"{where} needs 'technique', the name of a technique.")
    unknown = sorted(set(values) - set(Step.__dataclass_fields__))
    if unknown:
        raise PlanError(f"{where}: unknown keys {', '.join(unknown)}.")
    scope = values.get("scope", ["*"])
    if not isinstance(scope, list | tuple) or not all(isinstance(s, str) for s in scope) or not scope:
        raise PlanError(f"{where}: 'scope' must be a list of wildcards, e.g. [\"model.encoder.*\"].")
    config = values.get("config", {})
    if not isinstance(config, dict):
        raise PlanError(f"{where}: 'config' must be an object.")
    return Step(values["technique"], config, tuple(scope), str(values.get("reason", "")))


def read_plan(path: Path) -> Plan:
    """Read a plan file. Raises PlanError."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"There is no plan file {path}. `packlight fit` writes one as OUT/plan.json.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"{path} is no readable JSON ({error}).") from None
    return plan_from_dict(values, str(path))


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that a reader never sees half of it: a temporary file beside it, then a rename."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False, sort_keys=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line that a kill cut short is dropped."""
    if not path.is_file():
        return []
    values = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return values


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one value to a JSON-lines file, mending a line that a kill cut short."""
    whole = read_lines(path)
    text = "".join(json.dumps(v) + "\n" for v in [*whole, value])
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
