"""A race: a bundle against Hugging Face and the runtimes' own int8, in turn on every recording, in one process.

    python benchmarks/race.py MODEL BUNDLE --data DIR [--clips 20] [--threads 2]

Prints, for each runner, the mean seconds per recording, how many times faster than Hugging Face float32 and than the
fastest of the others that is, and the word error rate with its difference from Hugging Face's on the same recordings,
each with a 95 % interval of a paired bootstrap over recordings. benchmarks/requirements.txt installs the libraries, as
`make bakeoff` does.

Everyone gets the same audio in memory, two threads, greedy decoding and, but for Hugging Face, our spectrum and our
loop around the two graphs: a plain export of the model whose encoder gives the cross keys and values once. So the
others run faster here than what their users have. Each recording is answered by all in random order, with a pause before
each answer for threads that still spin.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packlight.audio import open_audio
from packlight.data import Dataset, read_dataset
from packlight.errors import DataError, PacklightError
from packlight.evaluate import quality, spread
from packlight.families import Graph
from packlight.loading import load
from packlight.measure import machine
from packlight.model import Model
from packlight.serve import open_served
from packlight.serving.whisper import Part, Settings, encoder_inputs, transcribe

PAUSE = 0.03
REFERENCE, OURS = "Hugging Face float32", "packlight"
Ask = Callable[[np.ndarray], list[int]]
"""Audio float32 [samples] at 16 kHz to the tokens of the text."""


@dataclass(frozen=True)
class Value:
    """An array, as `transcribe` takes what a graph returned."""

    array: np.ndarray

    def numpy(self) -> np.ndarray:
        """The array."""
        return self.array


def export(graph: Graph, folder: Path) -> Path:
    """A graph as PyTorch's exporter writes it, with its weights in one file."""
    file = folder / f"{graph.name}.onnx"
    axes = [dict.fromkeys(graph.dynamic.get(n, {}), torch.export.Dim.DYNAMIC) or None for n in graph.inputs]
    shapes: Any = (axes[0], tuple(axes[1:])) if len(axes) > 1 else tuple(axes)
    with torch.no_grad():
        made = torch.onnx.export(
            graph.module.eval(),
            graph.args,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=18,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
    assert made is not None
    made.save(file)
    return file


def onnx_runtime(file: Path, threads: int, quantized: bool = True) -> Part:
    """ONNX Runtime as it comes; `quantized` by its own `quantize_dynamic`: unsigned int8, per channel."""
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if quantized:
        small = file.with_name(f"{file.stem}-int8.onnx")
        quantize_dynamic(file, small, per_channel=True, weight_type=QuantType.QUInt8)
        file = small
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    outputs = [o.name for o in session.get_outputs()]

    def run(feed: Mapping[str, Any]) -> dict[str, Any]:
        given = {n: ort.OrtValue.ortvalue_from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in feed.items()}
        return dict(zip(outputs, session.run_with_ort_values(outputs, given), strict=True))

    return run


def openvino_int8(file: Path, threads: int) -> Part:
    """OpenVINO with NNCF's int8 weights, for the least latency."""
    import nncf
    import openvino

    model = nncf.compress_weights(openvino.convert_model(file))
    openvino.save_model(model, file.with_suffix(".xml"))
    compiled = openvino.Core().compile_model(
        file.with_suffix(".xml"), "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    )
    names = [o.any_name for o in compiled.outputs]

    def run(feed: Mapping[str, Any]) -> dict[str, Any]:
        given = {n: v if isinstance(v, np.ndarray) else v.numpy() for n, v in feed.items()}
        found = compiled(given, share_inputs=True)
        return {name: Value(found[i]) for i, name in enumerate(names)}

    return run


def by_graphs(open_part: Callable[[Path, int], Part], graphs: Mapping[str, Path], how: Settings, threads: int) -> Ask:
    """What answers with the two graphs in some runtime."""
    parts = {name: open_part(file, threads) for name, file in graphs.items()}
    return lambda audio: list(transcribe(parts, lambda ids: "", how, audio).tokens)


def ctranslate2_int8(folder: Path, how: Settings, threads: int) -> Ask:
    """CTranslate2, int8, from its own folder of the model."""
    import ctranslate2

    model = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type="int8", intra_threads=threads)
    opening = [how.start, *([how.language_ids["en"], how.task_ids["transcribe"]] if how.language_ids else [])]
    prompt = [*opening, *([] if how.no_timestamps is None else [how.no_timestamps])]

    def ask(audio: np.ndarray) -> list[int]:
        heard = ctranslate2.StorageView.from_array(encoder_inputs(how, audio)["input_features"])
        found = model.generate(heard, [prompt], beam_size=1, max_length=how.max_tokens)
        return [i for i in found[0].sequences_ids[0] if i < how.eos]

    return ask


def ctranslate2_folder(model: str, work: Path) -> Path:
    """The model as CTranslate2 takes it: as it is, or converted."""
    if (Path(model) / "model.bin").is_file():
        return Path(model)
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(model).convert(str(work / "ctranslate2"), quantization="int8", force=True)
    return work / "ctranslate2"


def runners(model: Model, name: str, bundle: Path, work: Path, threads: int) -> dict[str, Ask]:
    """Everyone who takes part, loaded, by name."""
    if model.family.name != "whisper":
        raise DataError(f"{name} is no Whisper model, and this race is for those.")
    family, module, settings = model.family, model.module, model.settings
    how = Settings.from_dict(family.serving(module, settings, None, "transcribe"))
    served = open_served(bundle, threads)
    graphs = {g.name: export(g, work) for g in family.graphs(module)}
    return {
        REFERENCE: lambda audio: family.answer(module, audio, settings, None, "transcribe"),
        "ONNX Runtime float32": by_graphs(partial(onnx_runtime, quantized=False), graphs, how, threads),
        "ONNX Runtime dynamic int8": by_graphs(onnx_runtime, graphs, how, threads),
        "OpenVINO int8 weights": by_graphs(openvino_int8, graphs, how, threads),
        "CTranslate2 int8": ctranslate2_int8(ctranslate2_folder(name, work), how, threads),
        OURS: lambda audio: served.reply(audio, None, None),
    }


def race(asked: Mapping[str, Ask], audios: list[np.ndarray]) -> tuple[np.ndarray, dict[str, list[list[int]]]]:
    """Seconds [recordings, runners], and what each said."""
    order, times = random.Random(0), np.zeros((len(audios), len(asked)))
    said: dict[str, list[list[int]]] = {name: [] for name in asked}
    for ask in asked.values():
        for audio in audios[:2]:
            ask(audio)
    for i, audio in enumerate(audios):
        for which in order.sample(range(len(asked)), len(asked)):
            name = list(asked)[which]
            time.sleep(PAUSE)
            start = time.perf_counter()
            said[name].append(asked[name](audio))
            times[i, which] = time.perf_counter() - start
        print(f"\r{i + 1}/{len(audios)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times, said


def ratio(slow: np.ndarray, fast: np.ndarray) -> str:
    """How many times faster, by sums, with its 95 % interval."""
    picks = np.random.default_rng(0).integers(0, len(slow), (10_000, len(slow)))
    low, high = np.percentile(slow[picks].sum(1) / fast[picks].sum(1), [2.5, 97.5])
    return f"{slow.sum() / fast.sum():.2f} [{low:.2f}, {high:.2f}]"


def markdown(times: np.ndarray, said: Mapping[str, list[list[int]]], dataset: Dataset, decode: Any) -> str:
    """The table."""
    names = list(said)
    others = [i for i, name in enumerate(names) if "int8" in name]
    best = min(others, key=lambda i: times[:, i].sum())
    lines = [f"| | s, mean of {dataset.n} | times Hugging Face | times {names[best]} | WER | difference |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for i, name in enumerate(names):
        found = quality(dataset, said[REFERENCE], said[name], decode, "en")[0]
        change = f"{100 * found.difference:+.2f} pp [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
        lines.append(
            f"| {name} | {times[:, i].mean():.3f} | {ratio(times[:, 0], times[:, i])} | "
            f"{ratio(times[:, best], times[:, i])} | {100 * found.after:.2f} % | {change if i else ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the race; returns the exit status."""
    parser = argparse.ArgumentParser(description="a bundle against others; see the top of this file")
    parser.add_argument("model", help="folder or hub id of a Whisper model")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of recordings with transcripts")
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        whole = read_dataset(args.data, need_text=True)
        dataset = replace(whole, samples=spread(whole, args.clips))
        model = load(args.model)
        with tempfile.TemporaryDirectory() as work:
            asked = runners(model, args.model, args.bundle, Path(work), args.threads)
            times, said = race(asked, [open_audio(s.path, s.texts) for s in dataset.samples])
    except PacklightError as error:
        print(error, file=sys.stderr)
        return 2
    from tokenizers import Tokenizer

    print(markdown(times, said, dataset, Tokenizer.from_str(model.tokenizer).decode), end="")
    print(f"{args.threads} threads, {machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
