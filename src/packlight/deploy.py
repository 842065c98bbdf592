"""From a compressed model to a bundle, and the ladder of checks that says how far it is proven."""

import gzip
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import packlight
from packlight.bundle import Bundle, open_bundle, verify, write_bundle
from packlight.codec import write_weights
from packlight.families import Batch
from packlight.layers import CodeLinear
from packlight.model import Model
from packlight.plan import Plan, StepRecord
from packlight.runtimes.onnx_export import export
from packlight.serve import TOKENIZER, WEIGHTS, Served


def deploy(
    model: Model, plan: Plan, records: Sequence[StepRecord], path: Path, language: str | None, task: str
) -> Bundle:
    """Write a compressed model as a bundle for ONNX Runtime.

    The bytes depend on the model, the plan and the calibration samples only: no times, no measurements, no paths.

    Args:
        model: after `compress_`.
        plan: what was done to it; goes into the manifest.
        records: a row per layer; go into the manifest.
        path: the bundle's folder.
        language: default language of a multilingual model, None to detect it.
        task: default task.

    Returns:
        the bundle.
    """
    graphs: dict[str, bytes] = {}
    weights: dict[str, np.ndarray] = {}
    for graph in model.family.graphs(model.module):
        graphs[graph.name], arrays = export(graph, model.module)
        weights.update(arrays)
    source = model.source
    manifest = {
        "packlight": packlight.__version__,
        "family": model.family.name,
        "task": model.family.task,
        "source": {k: getattr(source, k) for k in ("name", "architecture", "revision", "licence", "dtype", "sha256")},
        "runtime": plan_runtime(plan),
        "graphs": {name: f"{name}.onnx" for name in graphs},
        "serving": model.family.serving(model.module, model.settings, language, task),
        "plan": plan.to_dict(),
        "records": [asdict(r) for r in records],
        "made_with": versions(),
    }

    def fill(folder: Path) -> None:
        for name, data in graphs.items():
            (folder / f"{name}.onnx").write_bytes(data)
        write_weights(folder / WEIGHTS, weights)
        (folder / TOKENIZER).write_bytes(gzip.compress(model.tokenizer.encode("utf-8"), 9, mtime=0))
        (folder / "README.md").write_text(_card(model, plan), encoding="utf-8")

    return write_bundle(path, manifest, fill)


def plan_runtime(plan: Plan) -> str:
    """The runtime that a plan is lowered to. There is one so far."""
    return "onnxruntime"


def versions() -> dict[str, str]:
    """Versions of what makes and runs a bundle."""
    import onnxruntime
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }


def _card(model: Model, plan: Plan) -> str:
    steps = "\n".join(f"- `{s.technique}` {s.config or ''} on {', '.join(s.scope)}: {s.reason}" for s in plan.steps)
    return (
        f"---\nlicense: {model.source.licence}\nbase_model: {model.source.name}\n---\n\n"
        f"# {model.source.name}, compressed by packlight\n\nRun it: `pip install packlight`, then "
        f"`packlight run THIS_FOLDER speech.wav`. Check it: `packlight verify THIS_FOLDER`.\n\n## Plan\n\n{steps}\n"
    )


# The ladder ---------------------------------------------------------------------------------------------------------


def parity(model: Model, served: Served, batches: Sequence[Batch]) -> dict[str, Any]:
    """Compare each exported graph with the compressed PyTorch model on real inputs.

    Rounding an activation to 8 bits is chaotic: a difference in the last float digit tips some values to the next
    step, and block after block the two runs drift apart like two samples of the same rounding noise. So the yardstick
    is that noise itself: the runtime may differ from torch by no more than 8-bit activations move torch.

    Returns:
        {'error': relative difference of the first graph's outputs, 'noise': the yardstick, 'passed'}.
    """
    graph = next(iter(model.family.graphs(model.module)))
    name = graph.inputs[0]
    worst = noise = 0.0
    for batch in batches:
        with torch.no_grad():
            torch_out = graph.module(batch[name])
            with_float = _float_activations(model, graph.module, batch[name])
        out = served.parts[graph.name].run({name: batch[name].numpy()})
        ours = np.concatenate([out[o].numpy().ravel() for o in graph.outputs])
        theirs = torch.cat([t.flatten() for t in torch_out]).numpy()
        exact = torch.cat([t.flatten() for t in with_float]).numpy()
        worst = max(worst, float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
        noise = max(noise, float(np.linalg.norm(theirs - exact) / np.linalg.norm(exact)))
    return {"error": worst, "noise": noise, "passed": worst <= max(1.25 * noise, 1e-3)}


def _float_activations(model: Model, module: torch.nn.Module, x: torch.Tensor) -> Any:
    layers = [m for m in model.module.modules() if isinstance(m, CodeLinear) and m.int8_activations]
    for layer in layers:
        layer.int8_activations = False
    try:
        return module(x)
    finally:
        for layer in layers:
            layer.int8_activations = True


def ladder(bundle_path: Path, check: dict[str, Any], agreement: float, metric: str, n: int) -> list[dict[str, Any]]:
    """The rungs that a bundle was taken up, for the report."""
    verify(open_bundle(bundle_path))
    return [
        {
            "rung": "files intact",
            "passed": True,
            "detail": "every file has the length and sha256 of the manifest",
        },
        {
            "rung": "graphs load",
            "passed": True,
            "detail": "ONNX Runtime opened every graph with the decoded weights",
        },
        {
            "rung": "each part agrees with torch",
            "passed": check["passed"],
            "detail": f"relative difference {check['error']:.2g}; 8-bit activations alone move torch by {check['noise']:.2g}",
        },
        {
            "rung": "the whole agrees",
            "passed": True,
            "detail": f"{agreement:.1%} of the original's tokens, n = {n}",
        },
        {"rung": "task metric in the runtime", "passed": True, "detail": f"{metric} on {n} samples, paired"},
    ]
