"""Make a smaller model outright: a student cut out of a model by a description, taught by it, written as a folder.

The folder is an ordinary one of transformers, so `packlight fit` takes it like any other model.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch

from packlight import __version__
from packlight.applying import Options, calibration_batches, check_calibration, threads_of
from packlight.data import CALIBRATION_LIMIT, Dataset, prompted, read_dataset
from packlight.errors import DataError, PlanError
from packlight.families import Batch
from packlight.families.mobile_dual import MobileDual, write_module
from packlight.inheriting import student
from packlight.loading import load
from packlight.model import Model
from packlight.plan import write_json
from packlight.techniques.audio_context import AudioContextConfig, check_context, shorten_
from packlight.techniques.distill import DistillConfig, check_distill, distill_
from packlight.training import Progress, accelerator

DONE = "distilled.json"
_EXTRA = {"distill": DistillConfig, "audio_context": AudioContextConfig}
_NOT_COPIED = ("config.json", "generation_config.json", "model.safetensors.index.json")


def distill(
    model: str, description: Path, options: Options, out: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Cut a student out of a model, teach it, and write it as a folder of transformers.

    Args:
        model: folder or hub id; the teacher.
        description: JSON file: what `packlight.inheriting.student` reads, and 'distill', the settings of the technique,
            'scope', wildcards over the parameters that are trained, and 'audio_context', that of the student.
        options: with the calibration samples; no transcripts are read.
        out: empty folder, or one that a killed call with the same arguments left.
        progress: called with (what, done, total).

    Returns:
        what `OUT/distilled.json` holds: 'before' and 'after', the KL divergence on held-back samples; 'judged', by
        epoch; 'losses', by step; 'left_out'; 'parameters' of model and student; 'seconds' of this call.

    Raises:
        PlanError: a wrong description. DataError: wrong samples, or a folder that holds something else.
    """
    wanted = read_description(description)
    if options.calibration is None:
        raise DataError("distill needs calibration samples to teach with. Name them with --calibration.")
    dataset = prompted(read_dataset(options.calibration), options.templates)
    torch.set_num_threads(threads_of(options))
    teacher = load(model, trust_remote_code=options.trust_remote_code)
    check_calibration(teacher, dataset)
    small, how = _student(teacher, wanted, options.seed, [])
    key = _key(teacher, dataset, wanted, options)
    if (known := _known(out, key)) is not None:
        return known
    begun, work = time.monotonic(), out / "work" / key[:12]
    work.mkdir(parents=True, exist_ok=True)
    processes = accelerator()
    with processes.main_process_first():  # the others read what it wrote
        batches = calibration_batches(teacher, dataset, options, work, progress, CALIBRATION_LIMIT)
    if "vision" in wanted:  # among several designs the samples choose
        small, how = _student(teacher, wanted, options.seed, batches)
    found = distill_(small, teacher.module, batches, how, work / "training", progress, key)
    counts = [sum(p.numel() for p in m.module.parameters()) for m in (teacher, small)]
    result = {
        "model": teacher.source.name, "student": wanted, **found, "parameters": counts,
        "samples": {"sha256": dataset.sha256, "n": dataset.n}, "key": key,
        "seconds": round(time.monotonic() - begun, 1), "packlight": __version__,
    }  # fmt: skip
    if processes.is_main_process:
        _write(teacher, small, result, out)
    processes.wait_for_everyone()
    return result


def distill_text(result: dict[str, Any], out: Path) -> str:
    """What `distill` found, for people."""
    before, after = result["parameters"]
    left = sum(result["left_out"].values())
    return "\n".join(
        (
            f"parameters   {before / 1e6:.1f} M -> {after / 1e6:.1f} M",
            f"KL           {result['before']:.4g} -> {result['after']:.4g} per answer, on samples held back",
            f"by epoch     {', '.join(f'{v:.4g}' for v in result['judged'])}",
            f"samples      {result['samples']['n']}, of which {left} left out for bad words",
            f"model        {out}   packlight fit {out} --data DIR --max-size 12MB",
        )
    )


# Before work --------------------------------------------------------------------------------------------------------


def read_description(path: Path) -> dict[str, Any]:
    """The description of a student. Raises PlanError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"There is no file {path} that describes the student. See docs/howto/distill.md.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"{path} is no readable JSON ({error}).") from None
    if not isinstance(found, dict):
        raise PlanError(f"{path} must hold a JSON object. See docs/howto/distill.md.")
    scope = found.get("scope", ["*"])
    if not isinstance(scope, list) or not scope or not all(isinstance(s, str) for s in scope):
        raise PlanError(f"{path}: 'scope' must be a list of wildcards, e.g. [\"model.encoder.*\"].")
    return found


def _settings(wanted: dict[str, Any], name: str) -> Any:
    """The settings that a description has under a name. Raises PlanError."""
    values, kind = wanted.get(name, {}), _EXTRA[name]
    if not isinstance(values, dict) or (unknown := sorted(set(values) - {f.name for f in fields(kind)})):
        wrong = f"no setting {', '.join(unknown)}" if isinstance(values, dict) else "to be an object"
        raise PlanError(f"The description's {name!r} has {wrong}. It may have: "
                        f"{', '.join(f.name for f in fields(kind))}.")  # fmt: skip
    try:
        return kind(**values)
    except TypeError as error:
        raise PlanError(f"The description's {name!r} has a setting of the wrong type ({error}).") from None


def _student(
    teacher: Model, wanted: dict[str, Any], seed: int, batches: Sequence[Batch]
) -> tuple[Model, tuple[Any, list[str], int]]:
    """The student before its lessons, and how it is taught. Raises PlanError."""
    config, scope = _settings(wanted, "distill"), wanted.get("scope", ["*"])
    small = student(teacher, {k: v for k, v in wanted.items() if k not in (*_EXTRA, "scope")}, batches)
    check_distill(small, config, scope)
    if "audio_context" in wanted:
        context = _settings(wanted, "audio_context")
        check_context(small, context)
        shorten_(small, context)
    return small, (config, scope, seed)


def _key(teacher: Model, dataset: Dataset, wanted: dict[str, Any], options: Options) -> str:
    asked = {k: v for k, v in asdict(options).items() if k in ("language", "task", "seed", "templates")}
    base = [teacher.source.sha256, dataset.sha256, wanted, asked]
    return hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()


def _known(out: Path, key: str) -> dict[str, Any] | None:
    """What an earlier call that came to its end found, or None. Raises DataError for a folder of something else."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file. Name a folder for the student.")
    present = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if DONE in present:
        found = json.loads((out / DONE).read_text(encoding="utf-8"))
        if found["key"] == key:
            return dict(found)
        raise DataError(f"{out} holds another student. Choose an empty folder.")
    if present and "work" not in present:
        raise DataError(f"{out} holds {min(present)!r}, which is not ours, so nothing was written. Choose another.")
    return None


# The folder ---------------------------------------------------------------------------------------------------------


def _write(teacher: Model, small: Model, result: dict[str, Any], out: Path) -> None:
    """Write the student with all that its original has; `distilled.json` last."""
    draft, module = out / "work" / "model", cast(Any, small.module)
    shutil.rmtree(draft, ignore_errors=True)
    if hasattr(module.config, "audio_context"):  # fit decides that anew
        del module.config.audio_context
    if isinstance(module, MobileDual):
        write_module(draft, module, module.config.to_dict())
        small.settings["processor"].original.save_pretrained(draft)
    else:
        module.save_pretrained(draft)
    source = Path(teacher.source.path)
    if teacher.source.kind == "huggingface":
        for file in [f for pattern in ("*.json", "*.txt", "*.model", "LICENSE*") for f in source.glob(pattern)]:
            if file.name not in _NOT_COPIED and file.name != DONE and not (draft / file.name).exists():
                shutil.copy(file, draft / file.name)
    else:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

        tokenizer = Tokenizer.from_str(teacher.tokenizer)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(draft)
        WhisperFeatureExtractor(feature_size=module.config.num_mel_bins).save_pretrained(draft)
    (draft / "tokenizer.json").write_text(teacher.tokenizer, encoding="utf-8")
    (draft / "README.md").write_text(
        f"---\nlicense: {teacher.source.licence}\n---\n\nA student of {result['model']}, made by `packlight distill`; "
        f"{DONE} says how.\n",
        encoding="utf-8",
    )
    for file in sorted(draft.iterdir()):
        file.replace(out / file.name)
    write_json(out / DONE, result)
    shutil.rmtree(out / "work")
