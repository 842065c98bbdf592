"""Fit a multimodal model to the device it must run on: size, speed and quality, measured in the runtime that ships."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Options", "Plan", "Step", "SweepOptions", "Target", "apply", "fit", "load", "open_served", "sweep"]

if TYPE_CHECKING:
    from packlight.applying import Options, apply
    from packlight.fitting import fit
    from packlight.plan import Plan, Step
    from packlight.reloading import load
    from packlight.serve import open_served
    from packlight.sweeping import SweepOptions, sweep
    from packlight.target import Target

_HOMES = {
    "Options": "packlight.applying",
    "apply": "packlight.applying",
    "Plan": "packlight.plan",
    "Step": "packlight.plan",
    "Target": "packlight.target",
    "fit": "packlight.fitting",
    "load": "packlight.reloading",
    "open_served": "packlight.serve",
    "SweepOptions": "packlight.sweeping",
    "sweep": "packlight.sweeping",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import packlight` stays light on the device."""
    if name not in _HOMES:
        raise AttributeError(f"module 'packlight' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
