"""From a compressed model to a bundle, and the ladder of checks that says how far it is proven."""

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import packlight
from packlight.bundle import Bundle, open_bundle, verify, write_bundle
from packlight.byte_pairs import without_merges
from packlight.codec import write_weights
from packlight.families import Batch, Graph
from packlight.layers import CodeLinear
from packlight.model import Model
from packlight.plan import Plan, Step, StepRecord
from packlight.reloading import keep
from packlight.runtimes.onnx_export import export
from packlight.serve import TOKENIZER, WEIGHTS, Served

_NOISE = 3.0
_LONG = 400  # characters of a setting that the card shows


def deploy(
    model: Model, plan: Plan, records: Sequence[StepRecord], path: Path, language: str | None, task: str
) -> Bundle:
    """Write a compressed model as a bundle for ONNX Runtime.

    The bytes depend on the model, the plan and the calibration samples only: no times, no measurements, no paths.

    Args:
        model: after `compress_`.
        plan: what was done to it; goes into the bundle's history.
        records: a row per layer; go into the bundle's history.
        path: the bundle's folder.
        language: default language of a multilingual model, None to detect it.
        task: default task.

    Returns:
        the bundle.
    """
    graphs: dict[str, bytes] = {}
    weights: dict[str, np.ndarray] = {}
    users: dict[str, str] = {}  # what the same graphs use is decoded together
    for graph in model.family.graphs(model.module):
        graphs[graph.name], arrays = export(graph, model.module)
        weights.update(arrays)
        users.update((name, f"{users[name]}+{graph.name}" if name in users else graph.name) for name in arrays)
    described, more = keep(model, weights)
    weights.update(more)
    source = model.source
    manifest = {
        "packlight": packlight.__version__,
        "family": model.family.name,
        "task": model.family.task,
        "source": {k: getattr(source, k) for k in ("name", "architecture", "revision", "licence", "dtype", "sha256")},
        "runtime": plan_runtime(plan),
        "graphs": {name: f"{name}.onnx.gz" for name in graphs},
        "serving": model.family.serving(model.module, model.settings, language, task),
        "plan": plan.to_dict(),
        "records": [asdict(r) for r in records],
        "made_with": versions(),
        **described,
    }

    # What only writes text needs no merges, and they can be had back.
    tokenizer = model.tokenizer if model.family.words is None else without_merges(model.tokenizer)

    def fill(folder: Path) -> None:
        for name, data in graphs.items():
            (folder / f"{name}.onnx.gz").write_bytes(gzip.compress(data, 9, mtime=0))
        write_weights(folder / WEIGHTS, weights, users)
        (folder / TOKENIZER).write_bytes(gzip.compress(tokenizer.encode("utf-8"), 9, mtime=0))
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
    alike: dict[tuple[str, str], list[Step]] = {}
    for step in plan.steps:  # a part's layers with rates of their own have their reason in common
        alike.setdefault((step.technique, step.reason.split("; on average")[0]), []).append(step)
    steps = "\n".join(f"- `{name}` {_said(found)}: {reason}" for (name, reason), found in alike.items())
    return (
        f"---\nlicense: {model.source.licence}\nbase_model: {model.source.name}\n---\n\n"
        f"# {model.source.name}, compressed by packlight\n\nRun it: `pip install packlight`, then "
        f"`packlight run THIS_FOLDER {model.family.usage}`. Check it: `packlight verify THIS_FOLDER`.\n\n"
        f"## Plan\n\nThe whole of it is in `history.json.gz`.\n\n{steps}\n"
    )


def _said(steps: Sequence[Step]) -> str:
    """Settings and scope of a step as the card has them; of several only what differs little, long settings left out."""
    if len(steps) > 1:
        return f"on {sum(len(s.scope) for s in steps)} layers"
    config = {k: v for k, v in steps[0].config.items() if len(str(v)) <= _LONG}
    return f"{config or ''} on {', '.join(steps[0].scope)}"


# The ladder ---------------------------------------------------------------------------------------------------------


def parity(model: Model, served: Served, batches: Sequence[Batch]) -> dict[str, Any]:
    """Compare each exported graph with the compressed PyTorch model on real inputs.

    Rounding an activation to 8 bits is chaotic: a difference in the last float digit tips some values to the next
    step, and block after block the two runs drift apart like two samples of the same rounding noise. So the yardstick
    is that noise itself: the runtime may differ from torch by no more than `_NOISE` times what 8-bit activations move
    torch; two draws of one noise differ by about twice, a wrong graph by ten times and more.

    Returns:
        {'error': the largest relative difference of a graph's outputs, 'noise': its yardstick, 'graph': its name,
        'passed': whether every graph stayed within its allowance, or 0.1 %}.
    """
    found = [
        (graph.name, *_difference(model, graph, served, feed))
        for batch in batches
        for graph, feed in _feeds(model, batch)
    ]
    name, error, noise = max(found, key=lambda f: f[1] / max(f[2], 1e-3))
    passed = all(e <= max(_NOISE * n, 1e-3) for _, e, n in found)
    return {"error": error, "noise": noise, "graph": name, "passed": passed}


def _feeds(model: Model, batch: Batch) -> Iterator[tuple[Graph, list[torch.Tensor]]]:
    """The graphs with inputs: of the batch, what torch's graphs before gave, and else the example's shape at random."""
    values = dict(model.family.inputs(model.module, batch))
    draw = torch.Generator().manual_seed(0)
    for graph in model.family.graphs(model.module):
        feed = [
            values[name][: len(a)]  # a graph may take one sample at a time, a batch has several
            if name in values
            else torch.randn(a.shape, generator=draw)
            if a.is_floating_point()
            else a
            for name, a in zip(graph.inputs, graph.args, strict=True)
        ]
        with torch.no_grad():
            values.update(zip(graph.outputs, graph.module(*feed), strict=True))
        yield graph, feed


def _difference(model: Model, graph: Graph, served: Served, feed: list[torch.Tensor]) -> tuple[float, float]:
    """(runtime against torch, torch with against without 8-bit activations) of one graph, relative."""
    with torch.no_grad():
        theirs = _joined(graph.module(*feed))
        exact = _joined(_float_activations(model, graph.module, feed))
    out = served.parts[graph.name].run({n: t.numpy() for n, t in zip(graph.inputs, feed, strict=True)})
    ours = torch.cat([torch.from_numpy(out[o].numpy()).flatten() for o in graph.outputs])
    return float((ours - theirs).norm() / theirs.norm()), float((theirs - exact).norm() / exact.norm())


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _float_activations(model: Model, module: torch.nn.Module, feed: list[torch.Tensor]) -> Any:
    layers = [m for m in model.module.modules() if isinstance(m, CodeLinear)]
    before = [layer.activations for layer in layers]
    for layer in layers:
        layer.activations = "float"
    try:
        return module(*feed)
    finally:
        for layer, activations in zip(layers, before, strict=True):
            layer.activations = activations


def ladder(bundle_path: Path, check: dict[str, Any], agreement: str, metric: str, n: int) -> list[dict[str, Any]]:
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
            "detail": f"{check['graph']}: relative difference {check['error']:.2g}; 8-bit activations alone move torch by {check['noise']:.2g}",
        },
        {
            "rung": "the whole agrees",
            "passed": True,
            "detail": f"{agreement}, n = {n}",
        },
        {"rung": "task metric in the runtime", "passed": True, "detail": f"{metric} on {n} samples, paired"},
    ]
