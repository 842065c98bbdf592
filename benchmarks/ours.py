"""Packlight's own rows of the bake-off."""

from collections.abc import Callable
from functools import partial

from competitors import COMPETITORS, Case, Row, compressible

from packlight.codec import write_weights
from packlight.compress import compress_
from packlight.plan import Plan, Step


def by_plan(plan: Plan, case: Case) -> None:
    """Run a packlight plan; its files are written by packlight's own coder."""
    paths = {name: set(layers) for name, layers in compressible(case.model).items()}
    compress_(case.model, plan, case.batches, case.folder / "work")
    for name, wanted in paths.items():
        (case.folder / name).mkdir()
        arrays = {}
        for path in wanted:
            layer = case.model.module.get_submodule(path)
            if "weight" in dict(layer.named_parameters(recurse=False)):  # a compressed layer computes its own
                arrays[f"{path}.weight"] = layer.weight.detach().half().float().numpy()
            arrays.update({f"{path}.{key}": value.numpy() for key, value in layer.named_buffers()})
        write_weights(case.folder / name / "weights.safetensors", arrays)


_TABLE = ("model.decoder.embed_tokens", "proj_out")
_HALVES = Step("float16", {}, ("*",))  # norms and biases
_POSITIONS = Step("float16", {}, ("*embed_positions*",))


def _codes(rate: float, scope: tuple[str, ...], **config: object) -> Step:
    return Step("error_feedback", {"rate": rate, "activations": "float", **config}, scope)


def per_row(rate: float) -> Plan:
    """Error feedback with a step per output channel, the same rate everywhere."""
    return Plan((_POSITIONS, _codes(rate, ("*",)), _HALVES))


def per_column(rate: float, trellis: bool = False) -> Plan:
    """Error feedback with a step per input channel too, the same rate everywhere."""
    table = _codes(rate, _TABLE, columns=True, use=0.25, trellis=trellis)
    encoder = _codes(rate, ("model.encoder.*",), columns=True, damp=0.002, trellis=trellis)
    return Plan((_POSITIONS, table, encoder, _codes(rate, ("*",), columns=True, trellis=trellis), _HALVES))


def along_trellis(rate: float) -> Plan:
    """The same along a trellis, as the planner sets it."""
    return per_column(rate, trellis=True)


# One line here adds a technique: (line of the picture, plan at a rate, rates). `--wer` measures the one at 3 bits.
OURS: tuple[tuple[str, Callable[[float], Plan], tuple[float, ...]], ...] = (
    ("packlight, along a trellis", along_trellis, (4, 3.5, 3, 2.5, 2.25, 2, 1.75, 1.5)),
    ("packlight, steps per column", per_column, (4, 3, 2.5)),
    ("packlight, steps per row", per_row, (4, 3, 2.5)),
)


def rows() -> tuple[Row, ...]:
    """The whole table: the competitors, then ours."""
    ours = (
        Row(method, f"{rate:g} bits", "packlight", partial(by_plan, plan(rate)), rate == 3, True)
        for method, plan, rates in OURS
        for rate in rates
    )
    return (*COMPETITORS, *ours)
