"""Run a plan on a model: check all of it first, then carry it out wave by wave, keeping every finished wave.

Calibration is block-sequential: a block is compressed with the inputs that it will really get, those that come out of
the compressed blocks before it. A wave is what is compressed between two measurements: the layers before a tower's
first block, each block, and last the layers after all towers (the head).
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packlight.codec import coded_bytes
from packlight.errors import PlanError
from packlight.families import Batch
from packlight.information import row_costs
from packlight.layers import Edit
from packlight.model import Model
from packlight.plan import Plan, Step, StepRecord, write_json
from packlight.quant import bound, distortion
from packlight.restructuring import check_restructuring, needing_samples, restructure_, turn_
from packlight.tables import TECHNIQUES
from packlight.techniques import Compressed, Technique
from packlight.techniques.audio_context import AUDIO_CONTEXT, check_context, shorten_
from packlight.techniques.distill import DISTILL, check_distill, distill_
from packlight.techniques.static_int8 import seen
from packlight.techniques.tune_scales import TUNE_SCALES, tune_
from packlight.token_pruning import without_rows_
from packlight.waves import Measure, silent, wave_names, waves
from packlight.windows import is_matrix

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
_SEEN = 640  # samples from which on a Gram matrix no longer changes by much: of lessons every so many batches

_IDLE = "Calibration has not exercised the %s tower: no error feedback there. Give samples for every tower."


@dataclass(frozen=True)
class Assignment:
    """What one layer gets: a technique with its settings."""

    technique: Technique
    config: Any

    @property
    def needs_gram(self) -> bool:
        """Whether this technique, with these settings, needs calibration data."""
        return "gram" in self.technique.needs and getattr(self.config, "feedback", True)


def check(plan: Plan, model: Model, calibration: str | None = None) -> dict[str, Assignment]:
    """Check a whole plan against a model before any work.

    Args:
        plan: the plan.
        model: the model that it is for, not yet edited.
        calibration: sha256 of the calibration samples at hand, None when there are none.

    Returns:
        path -> assignment, for every layer that a step takes.

    Raises:
        PlanError: unknown technique or setting, a value out of range, a scope that names no layer, a table and its
            tied head in different steps, another family, missing or other calibration samples.
    """
    if plan.family != model.family.name:
        raise PlanError(f"The plan was made for the family {plan.family}; this model is of {model.family.name}.")
    steps = [(step, *_technique(step.technique, step.config, i)) for i, step in enumerate(plan.steps, 1)]
    whole = [technique.name for _, technique, _ in steps if technique.layer is None]
    if len(whole) != len(set(whole)):
        raise PlanError(f"The plan has a technique of whole models twice ({', '.join(whole)}); once each.")
    layers = model.layers()
    found: dict[str, Assignment] = {}
    for path in layers:
        for step, technique, config in steps:
            if technique.layer is not None and step.takes(path):
                found[path] = Assignment(technique, config)
                break
    names = [*layers, *(name for name, _ in model.module.named_parameters())]
    for number, step in enumerate(plan.steps, 1):
        if not any(step.takes(name) for name in names):
            raise PlanError(
                f"Step {number} ({step.technique}) names {', '.join(step.scope)}, but no layer has such a path. "
                "`packlight inspect --layers` lists the paths."
            )
    for table, head in model.family.tied:
        if found.get(table) != found.get(head) and _is_tied(model.module, table, head):
            raise PlanError(f"{table} and {head} share their weights, so one step must take both.")
    for path, assignment in found.items():
        assignment.technique.matrix(layers[path])  # raises for kinds of layers that it can't take
        if getattr(assignment.config, "positions", 0) and model.family.sides is not None:
            raise PlanError(f"{path}: positions are weighed in models that write text only. Leave 'positions' out.")
    context = _config_of(plan, AUDIO_CONTEXT)
    if context is not None:
        check_context(model, context)
    check_restructuring(plan, model)
    distilling = _step_of(plan, DISTILL)
    if distilling is not None:
        check_distill(model, DISTILL.config(**distilling.config), distilling.scope)
    _check_calibration(plan, found, calibration)
    return found


def _technique(name: str, config: dict[str, Any], number: int) -> tuple[Technique, Any]:
    if name not in TECHNIQUES:
        raise PlanError(f"Step {number} names the technique {name!r}. Known: {', '.join(TECHNIQUES)}.")
    technique = TECHNIQUES[name]
    known = [f.name for f in fields(technique.config)]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise PlanError(
            f"Step {number}: {name} has no setting {', '.join(unknown)}. It has: {', '.join(known) or 'none'}."
        )
    try:
        return technique, technique.config(**config)
    except PlanError as error:
        raise PlanError(f"Step {number} ({name}): {error}") from None
    except TypeError as error:
        raise PlanError(f"Step {number} ({name}): a setting has the wrong type ({error}).") from None


def _check_calibration(plan: Plan, found: dict[str, Assignment], calibration: str | None) -> None:
    needing = sorted({a.technique.name for a in found.values() if a.needs_gram} | needing_samples(plan))
    if needing and calibration is None:
        raise PlanError(f"The plan uses {', '.join(needing)}, which needs calibration samples. Name them with --data.")
    wanted = plan.calibration.get("sha256")
    if needing and wanted and wanted != calibration:
        raise PlanError(
            f"The plan was made with the calibration samples {wanted[:12]}, those given are {calibration[:12]}: the "
            "result would differ. Name the same samples, or drop 'calibration' from the plan to go on with these."
        )


def _is_tied(module: nn.Module, table: str, head: str) -> bool:
    first, second = module.get_submodule(table), module.get_submodule(head)
    return getattr(first, "weight", None) is getattr(second, "weight", 0)


def compress_(
    model: Model,
    plan: Plan,
    batches: Sequence[Batch],
    work: Path,
    progress: Progress | None = None,
    shared: Path | None = None,
) -> list[StepRecord]:
    """Carry out a plan on a model, in place.

    Args:
        model: the original; it is changed.
        plan: checked by `check`.
        batches: calibration batches, in a fixed order.
        work: folder that keeps finished waves; a later call with the same plan goes on after them.
        progress: called with (what, done, total).
        shared: folder for what plans that quantize the same model from the same batches have in common, or None.

    Returns:
        a record per layer.
    """
    found = check(plan, model, plan.calibration.get("sha256") or ("given" if batches else None))
    work.mkdir(parents=True, exist_ok=True)
    batches = without_rows_(model, plan, batches)
    original = copy.deepcopy(model.module) if _step_of(plan, DISTILL) is not None else None
    context = _config_of(plan, AUDIO_CONTEXT)
    if context is not None:
        shorten_(model, context)
    restructure_(model, plan, batches, work)
    found = _moved(model, found)
    if original is not None:
        _distill(model, plan, original, batches, work / "distilling", progress)
        del original
    turn_(model, plan, batches, work, progress)
    tuning = _config_of(plan, TUNE_SCALES)
    teacher = copy.deepcopy(model.module) if tuning is not None else None
    total = sum(1 for _ in wave_names(model))
    records: list[StepRecord] = []
    torch.manual_seed(plan.seed)
    need = any(a.needs_gram for a in found.values())
    tied = {head: table for table, head in model.family.tied if _is_tied(model.module, table, head)}
    with torch.inference_mode(False), torch.no_grad():
        for tower in _unexercised(model, batches if need else []):
            log.warning(_IDLE, tower)
        ranged = {path for path, a in found.items() if "ranges" in a.technique.needs}
        seen_by = batches[:: max(1, len(batches) * model.family.group // _SEEN)] if need else []
        kept = all((work / f"wave_{i:03d}.json").is_file() for i in range(total))  # nothing is measured then
        costs, weights = ({}, {}) if kept else _costs(model, plan, found, (batches, seen_by), shared, progress)
        for number, (layers, sums) in enumerate(waves(model, seen_by, ranged=ranged, weights=weights)):
            measure = partial(_with_costs, costs, layers, sums)
            records += _wave(model, layers, measure, found, tied, work / f"wave_{number:03d}")
            if progress:
                progress("compressing", number + 1, total)
        if tuning is not None and teacher is not None:
            tune_(model, teacher, batches, tuning, work / "tuning", progress)
        _round_floats(model, plan)
    return records


def _unexercised(model: Model, batches: Sequence[Batch]) -> list[str]:
    """Names of the towers that no batch runs; the last one read is that with which all have been."""
    left = silent(model, batches[:1])
    for batch in batches[1:]:
        if not left:
            break
        still = silent(model, [batch])
        left = [name for name in left if name in still]
    return left


def _moved(model: Model, found: dict[str, Assignment]) -> dict[str, Assignment]:
    """The same for the layers that the model has now: a layer's factors get what it would have got, where they are matrices."""
    origins = {path: model.origin(path) for path in model.layers()}
    kept = {path: origin for path, origin in origins.items() if origin in found}
    return {
        path: found[origin]
        for path, origin in kept.items()
        if path == origin or "ranges" in found[origin].technique.needs or is_matrix(model.module.get_submodule(path))
    }


def _config_of(plan: Plan, technique: Technique) -> Any:
    """The settings of the plan's step of a technique of whole models, or None."""
    step = _step_of(plan, technique)
    return None if step is None else technique.config(**step.config)


def _step_of(plan: Plan, technique: Technique) -> Step | None:
    return next((s for s in plan.steps if s.technique == technique.name), None)


def _distill(
    model: Model, plan: Plan, teacher: nn.Module, batches: Sequence[Batch], work: Path, progress: Progress | None
) -> None:
    """Let the original teach what earlier steps left of it."""
    step = _step_of(plan, DISTILL)
    assert step is not None
    how = (DISTILL.config(**step.config), step.scope, plan.seed)
    distill_(model, teacher, batches, how, work, progress, plan.key)


def _costs(
    model: Model,
    plan: Plan,
    found: dict[str, Assignment],
    batches: tuple[Sequence[Batch], Sequence[Batch]],
    shared: Path | None,
    progress: Progress | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What errors cost where a layer's settings ask for it, and what positions count in Gram matrices.

    `batches` are all, and those that Gram matrices are taken of.
    """
    from safetensors.torch import load_file, save_file

    asking = {path: a.config for path, a in found.items() if "use" in a.technique.needs}
    paths = {path for path, config in asking.items() if config.use or config.positions}
    every = any(config.positions for config in asking.values())
    if not paths or not batches[0]:
        return {}, {}
    some = batches[1 if every else 0]
    kept = None if shared is None else shared / f"{_same(model, plan, some, (sorted(paths), every))}.safetensors"
    if kept is not None and kept.is_file():
        costs = load_file(kept, str(next(model.module.parameters()).device))
    else:
        costs = row_costs(model, some, paths, plan.seed, progress, every)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file(costs, kept.with_suffix(".part"))
            kept.with_suffix(".part").rename(kept)
    shares = {path: config.positions for path, config in asking.items() if f"{path}.positions" in costs}
    weights = {p: 1 - share + share * costs.pop(f"{p}.positions") for p, share in shares.items()}
    return costs, {path: w for path, w in weights.items() if shares[path]}


def _same(model: Model, plan: Plan, batches: Sequence[Batch], asked: tuple[list[str], bool]) -> str:
    """Sha256 of all that costs depend on: the model as it is to be quantized, what it reads, what is asked for."""
    whole = [s for s in plan.steps if TECHNIQUES[s.technique].layer is None and s.technique != TUNE_SCALES.name]
    steps = [[s.technique, s.config, s.scope] for s in whole]
    digest = hashlib.sha256(json.dumps([steps, plan.seed, *asked], sort_keys=True).encode())
    for tensors in (model.module.state_dict(), *batches):
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _with_costs(costs: dict[str, Tensor], paths: list[str], measure: Measure) -> dict[str, Tensor]:
    """What a wave measures, and what is known of its layers from before: all of it was one pass of the original."""
    return {k: v for k, v in costs.items() if k.removesuffix(".use") in paths} | measure()


def _wave(
    model: Model,
    paths: list[str],
    measure: Measure,
    found: dict[str, Assignment],
    tied: dict[str, str],
    kept: Path,
) -> list[StepRecord]:
    """Compress the layers of one wave, or take what an earlier run kept of it."""
    from safetensors.torch import load_file, save_file

    done = kept.with_suffix(".json")
    if done.is_file():
        values = json.loads(done.read_text())
        tensors = load_file(kept.with_suffix(".safetensors"))
        for entry in values["edits"]:
            _fill_(model, Edit(**entry), tensors)
        return [StepRecord(**r) for r in values["records"]]
    needed = [p for p in paths if p in found and found[p].needs_gram]
    sums = measure() if needed else {}
    for head, table in tied.items():  # rows of the table are the outputs of its head
        if head in sums:
            sums[table] = sums[head]
    edits: list[Edit] = []
    tensors = {}
    records = []
    for path in sorted(paths, key=lambda p: p in tied):  # a table before the head that shares it
        if path not in found:
            continue
        edit, made, record = _layer(model, path, found[path], sums, tied)
        if edit is None:  # it shares the buffers of its table
            table = next(e for e in edits if e.path == tied[path])
            edit = Edit(path, table.kind, {**table.args, "tied": table.path})
        edits.append(edit)
        tensors.update({f"{path}.{name}": tensor for name, tensor in made.items()})
        records.append(record)
    for edit in edits:
        _fill_(model, edit, tensors)
    save_file(tensors, kept.with_suffix(".safetensors"))
    write_json(done, {"edits": [asdict(e) for e in edits], "records": [asdict(r) for r in records]})
    return records


def _layer(
    model: Model, path: str, assignment: Assignment, sums: dict[str, Tensor], tied: dict[str, str]
) -> tuple[Edit | None, dict[str, Tensor], StepRecord]:
    layer = model.module.get_submodule(path)
    weight = assignment.technique.matrix(layer)
    part = model.family.part_of(model.origin(path))
    name = part.name if part else "other"
    if path in tied:
        return None, {}, StepRecord(path, name, assignment.technique.name, 0, 0.0, 0.0)
    gram, use = sums.get(path), sums.get(f"{path}.use")
    more: dict[str, Any] = {"use": use} if use is not None and "use" in assignment.technique.needs else {}
    if "ranges" in assignment.technique.needs:
        more = seen(path, layer, sums)
    assert assignment.technique.layer is not None  # check() assigns no other
    made: Compressed = assignment.technique.layer(weight, gram, assignment.config, **more)
    weight, close = (_as_counted(w, use, assignment.config) for w in (weight, made.approximation))
    loss = distortion(weight, close, gram)
    side = sum(
        8 * coded_bytes(made.tensors[key].cpu().numpy())
        for key in ("scale", "columns")
        if key in made.tensors and made.kind in ("codes", "static")
    )
    rate = made.rate + side / weight.numel()
    limit = None if gram is None or not 0 < loss < 1 else round(bound(weight, gram, loss), 4)
    record = StepRecord(
        path, name, assignment.technique.name, weight.numel(), round(rate, 4), float(f"{loss:.4g}"), limit
    )
    return Edit(path, made.kind, made.args), made.tensors, record


def _as_counted(weight: Tensor, use: Tensor | None, config: Any) -> Tensor:
    """Rows by the square root of what an error in them counts, the measure by which unequal steps are best."""
    if use is None or not getattr(config, "use", 0):
        return weight
    return weight * (use / use.mean()).float().pow(config.use).to(weight.device)[:, None]


def _fill_(model: Model, edit: Edit, tensors: dict[str, Tensor]) -> None:
    if edit.kind == "float":
        if "tied" not in edit.args:
            weight = model.module.get_submodule(edit.path).weight
            weight.data.copy_(tensors[f"{edit.path}.weight"].reshape(weight.shape))
        return
    layer = model.edit_(edit)
    if "tied" not in edit.args:
        for name, buffer in layer.named_buffers():
            buffer.copy_(tensors[f"{edit.path}.{name}"])


def _round_floats(model: Model, plan: Plan) -> None:
    """Round norms and biases to float16 where a float16 step takes them, so that the file holds them exactly."""
    steps = [s for s in plan.steps if s.technique == "float16"]
    for name, parameter in model.module.named_parameters():
        if any(step.takes(name) for step in steps):
            limit = torch.finfo(torch.float16).max
            parameter.data.copy_(parameter.data.clamp(-limit, limit).half().float())
