"""The bake-off's competitors: what each library makes of a model's weights.

A row changes a fresh model in place and leaves its files in a folder: `layers` for the linear layers and
convolutions, `table` for the vocabulary table that is also the head. The files are the library's own, in its own
format; what a library can't quantize lies beside them as float16, as it would ship. The weights that go back into the
model are what the library says its codes stand for, never a second implementation of ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from packlight.compress import compress_
from packlight.families import Batch
from packlight.model import Model
from packlight.plan import Plan, Step
from packlight.tables import TECHNIQUES
from packlight.techniques import Compressed, Stage, Technique

Layers = Mapping[str, nn.Module]
Quantize = Callable[[Layers, Path], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """What a row works on.

    Args:
        model: a fresh copy of the original, to be changed.
        batches: calibration samples, the same for every row.
        folder: an empty folder for the row's files.
    """

    model: Model
    batches: Sequence[Batch]
    folder: Path


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        method: library and method; the rows of one method are one line of the picture.
        setting: bits and group.
        package: what must be installed.
        make: changes the case's model and writes its files.
        headline: whether `--wer` measures it.
        ours: whether it is packlight's.
    """

    method: str
    setting: str
    package: str
    make: Callable[[Case], None]
    headline: bool = False
    ours: bool = False

    @property
    def name(self) -> str:
        """Method and setting."""
        return f"{self.method}, {self.setting}"


def compressible(model: Model) -> dict[str, dict[str, nn.Module]]:
    """'layers' and 'table': path -> layer, for everything whose bits are counted. A tied head is its table."""
    heads = {head for _, head in model.family.tied}
    tables = {table for table, _ in model.family.tied}
    layers = {p: x for p, x in model.layers().items() if p not in heads}
    return {
        "layers": {p: x for p, x in layers.items() if not isinstance(x, nn.Embedding)},
        "table": {p: x for p, x in layers.items() if p in tables},
    }


def by_library(quantize: Quantize, case: Case) -> None:
    """Let a library quantize what it can; the rest of the weights ships as float16."""
    for name, layers in compressible(case.model).items():
        folder = case.folder / name
        folder.mkdir(parents=True)
        made = quantize(layers, folder)
        left = {p: x.weight.detach().half() for p, x in layers.items() if p not in made}
        _save(folder / "float16.safetensors", left)
        with torch.no_grad():
            for path, weight in {**made, **left}.items():
                layers[path].weight.copy_(weight.reshape(layers[path].weight.shape))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _matrices(layers: Layers) -> dict[str, Tensor]:
    """The weights that are matrices: all but convolutions."""
    return {p: x.weight.detach() for p, x in layers.items() if isinstance(x, nn.Linear | nn.Embedding)}


# ONNX Runtime -------------------------------------------------------------------------------------------------------


def onnx_int8(layers: Layers, folder: Path) -> dict[str, Tensor]:
    """`quantize_dynamic`, int8 per channel. The table is quantized as the head, per token: kinder than its Gather."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    matrices = _matrices(layers)
    source = _onnx_graph(matrices, folder)
    quantize_dynamic(source, folder / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
    source.unlink()
    return _onnx_weights(matrices, folder)


def onnx_int4(block: int, layers: Layers, folder: Path) -> dict[str, Tensor]:
    """`MatMulNBitsQuantizer`, 4 bits, asymmetric, on a float16 model, whose scales take half the bytes."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    matrices = {p: w.half() for p, w in _matrices(layers).items()}
    source = _onnx_graph(matrices, folder)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=block, is_symmetric=False)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "model.onnx"))
    source.unlink()
    return _onnx_weights(matrices, folder)


def _onnx_graph(matrices: Mapping[str, Tensor], folder: Path) -> Path:
    """A graph with a MatMul for each matrix."""
    from onnx import TensorProto, helper, numpy_helper, save

    inputs, outputs, nodes, weights = [], [], [], []
    for path, weight in matrices.items():
        rows, columns = weight.shape
        kind = TensorProto.FLOAT16 if weight.dtype == torch.float16 else TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(f"{path}.x", kind, [None, columns]))
        outputs.append(helper.make_tensor_value_info(f"{path}.y", kind, [None, rows]))
        nodes.append(helper.make_node("MatMul", [f"{path}.x", f"{path}.weight"], [f"{path}.y"], name=path))
        weights.append(numpy_helper.from_array(weight.T.contiguous().numpy(), f"{path}.weight"))
    graph = helper.make_graph(nodes, "weights", inputs, outputs, weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "float.onnx")
    return folder / "float.onnx"


def _onnx_weights(matrices: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights as the runtime's kernels see them: what they make of the identity matrix.

    One column of ones at a time is quantized exactly (1 is 255 steps of 1/255), so the kernels' own 8-bit activations
    add nothing.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {f"{p}.x": torch.eye(w.shape[1], dtype=w.dtype).numpy() for p, w in matrices.items()}
    found = session.run([f"{p}.y" for p in matrices], feed)
    return {p: torch.from_numpy(y.T.astype(np.float32)) for p, y in zip(matrices, found, strict=True)}


# NNCF on OpenVINO ---------------------------------------------------------------------------------------------------


def nncf_weights(mode: str, group: int | None, layers: Layers, folder: Path) -> dict[str, Tensor]:
    """`nncf.compress_weights` on every layer. In 4-bit modes NNCF keeps convolutions at 8 bits."""
    import nncf
    import openvino

    options = {"group_size": group, "all_layers": True} if group else {}
    model = nncf.compress_weights(_openvino_graph(layers), mode=nncf.CompressWeightsMode[mode], **options)
    openvino.save_model(model, folder / "model.xml")
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    ends = [nodes[p].input_value(0 if isinstance(x, nn.Embedding) else 1) for p, x in layers.items()]
    decoded = openvino.Model([openvino.opset13.result(end) for end in ends], [], "weights")
    found = openvino.Core().compile_model(decoded, "CPU")([])
    (folder / "model.xml").unlink()  # the graph, which no other row counts; the weights are in model.bin
    return {p: torch.from_numpy(np.array(found[i], dtype=np.float32)) for i, p in enumerate(layers)}


def _openvino_graph(layers: Layers) -> object:
    """A graph with an operator for each layer."""
    import openvino
    from openvino import opset13 as ops

    parameters, results = [], []
    for path, layer in layers.items():
        weight = ops.constant(layer.weight.detach().numpy())
        if isinstance(layer, nn.Embedding):
            x = ops.parameter([-1], np.int64)
            y = ops.gather(weight, x, ops.constant(np.int64(0)))
        elif isinstance(layer, nn.Conv1d):
            x = ops.parameter([1, layer.in_channels, -1], np.float32)
            y = ops.convolution(x, weight, list(layer.stride), list(layer.padding), list(layer.padding), [1])
        else:
            x = ops.parameter([-1, layer.in_features], np.float32)
            y = ops.matmul(x, weight, False, True)
        y.set_friendly_name(path)
        parameters.append(x)
        results.append(ops.result(y))
    return openvino.Model(results, parameters, "weights")


# HQQ, CTranslate2, GGUF ---------------------------------------------------------------------------------------------


def hqq_weights(bits: int, group: int, layers: Layers, folder: Path) -> dict[str, Tensor]:
    """`hqq.core.quantize.Quantizer`, groups along the input, scales and zero points in float16."""
    from hqq.core.quantize import Quantizer

    made, files = {}, {}
    for path, weight in _matrices(layers).items():
        codes, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        scale, zero = meta["scale"].half(), meta["zero"].half()
        files |= {f"{path}.W_q": codes, f"{path}.scale": scale, f"{path}.zero": zero}
        meta |= {"scale": scale.float(), "zero": zero.float(), "compute_dtype": torch.float32}
        made[path] = Quantizer.dequantize(codes, meta)
    _save(folder / "hqq.safetensors", files)
    return made


def ctranslate2_int8(layers: Layers, folder: Path) -> dict[str, Tensor]:
    """The quantization of CTranslate2's converters, `int8_float16`."""
    from ctranslate2.specs import common_spec, model_spec

    kinds = {
        nn.Linear: common_spec.LinearSpec,
        nn.Conv1d: common_spec.Conv1DSpec,
        nn.Embedding: common_spec.EmbeddingsSpec,
    }

    class Weights(model_spec.ModelSpec):
        name = "Weights"

        def __init__(self) -> None:
            super().__init__()
            self.layers = [kinds[type(x)]() for x in layers.values()]

    spec = Weights()
    for inner, layer in zip(spec.layers, layers.values(), strict=True):
        inner.weight = layer.weight.detach().numpy().copy()
    spec.validate()
    spec.optimize(quantization="int8_float16")
    spec.save(str(folder))
    made = {}
    for path, inner in zip(layers, spec.layers, strict=True):
        codes, scale = (torch.from_numpy(v.numpy()).float() for v in (inner.weight, inner.weight_scale))
        made[path] = codes / scale.reshape(-1, *[1] * (codes.dim() - 1))
    return made


def gguf_weights(kind: str, layers: Layers, folder: Path) -> dict[str, Tensor]:
    """The block formats of ggml, by the reference quantizer in the package `gguf`."""
    import gguf

    kind_number = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(folder / "model.gguf", "whisper")
    made = {}
    for path, weight in _matrices(layers).items():
        blocks = gguf.quants.quantize(weight.numpy(), kind_number)
        writer.add_tensor(path, blocks, raw_dtype=kind_number)
        made[path] = torch.from_numpy(gguf.quants.dequantize(blocks, kind_number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


# GPTQ ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NoSettings:
    pass


def gptq(bits: int, group: int, case: Case) -> None:
    """GPTQ of llm-compressor: its `quantize_weight`, its best scales (least squares), zero points, static order.

    Its inputs are measured block by block on the model as compressed so far, as for packlight's own techniques, so
    both have the same samples and the same correction of earlier errors. It takes no convolutions.
    """
    table = next(iter(compressible(case.model)["table"].values())).weight.shape
    files: dict[str, dict[str, Tensor]] = {"layers": {}, "table": {}}

    def layer(weight: Tensor, gram: Tensor | None, _: _NoSettings) -> Compressed:
        approximation, tensors = _gptq_layer(weight, gram, bits, group)
        kept = files["table" if weight.shape == table else "layers"]
        kept.update({f"{len(kept)}.{name}": tensor for name, tensor in tensors.items()})
        return Compressed("float", {}, {"weight": approximation}, approximation, float(bits))

    float16 = [
        p
        for p, x in case.model.layers().items()
        if not isinstance(x, nn.Linear) and p not in compressible(case.model)["table"]
    ]
    plan = Plan((Step("float16", {}, tuple(float16)), Step("gptq", {}, ("*",))), case.model.family.name)
    TECHNIQUES["gptq"] = Technique("gptq", _NoSettings, layer, Stage.QUANTIZE, needs=("gram",))
    try:
        compress_(case.model, plan, case.batches, case.folder / "work")
    finally:
        del TECHNIQUES["gptq"]
    for name, layers in compressible(case.model).items():
        (case.folder / name).mkdir()
        _save(case.folder / name / "gptq.safetensors", files[name])
        left = {p: x.weight.detach().half() for p, x in layers.items() if p in float16}
        _save(case.folder / name / "float16.safetensors", left)


def _gptq_layer(weight: Tensor, gram: Tensor | None, bits: int, group: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(what the codes stand for, what the file holds)."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    options = {"num_bits": bits, "strategy": "group", "group_size": group, "symmetric": False, "actorder": "static"}
    args = QuantizationArgs(**options)
    observer = Observer.load_from_registry("memoryless_mse", base_name="weight", args=args)
    found = observer(weight).get_qparams()
    scale, zero = found["scale"].half().float(), found["zero_point"]
    hessian = (torch.eye(weight.shape[1]) if gram is None else gram / gram.diagonal().mean()).float()
    made = quantize_weight(weight[None].clone(), hessian[None], scale[None], zero[None], None, args)[0][0]
    wide = [t.repeat_interleave(group, 1)[:, : weight.shape[1]] for t in (scale, zero)]
    codes = torch.round(made / wide[0] + wide[1]).to(torch.int8)
    tensors = {"weight_packed": pack_to_int32(codes, bits), "weight_scale": scale.half()}
    return made, {**tensors, "weight_zero_point": pack_to_int32(zero.to(torch.int8), bits, packed_dim=0)}


# The table ----------------------------------------------------------------------------------------------------------


def _library(method: str, setting: str, package: str, quantize: Quantize, headline: bool = False) -> Row:
    return Row(method, setting, package, partial(by_library, quantize), headline)


COMPETITORS: tuple[Row, ...] = (
    _library("ONNX Runtime", "dynamic int8", "onnxruntime", onnx_int8),
    _library("ONNX Runtime", "MatMulNBits 4 bit, block 32", "onnxruntime", partial(onnx_int4, 32), True),
    _library("ONNX Runtime", "MatMulNBits 4 bit, block 128", "onnxruntime", partial(onnx_int4, 128)),
    _library("NNCF", "int8", "nncf", partial(nncf_weights, "INT8_ASYM", None)),
    _library("NNCF", "int4, group 32", "nncf", partial(nncf_weights, "INT4_ASYM", 32), True),
    _library("NNCF", "int4, group 128", "nncf", partial(nncf_weights, "INT4_ASYM", 128)),
    _library("HQQ", "4 bit, group 64", "hqq", partial(hqq_weights, 4, 64), True),
    _library("HQQ", "3 bit, group 64", "hqq", partial(hqq_weights, 3, 64)),
    _library("HQQ", "2 bit, group 32", "hqq", partial(hqq_weights, 2, 32)),
    Row("GPTQ", "int4, group 32", "llmcompressor", partial(gptq, 4, 32), True),
    Row("GPTQ", "int4, group 128", "llmcompressor", partial(gptq, 4, 128)),
    Row("GPTQ", "int3, group 128", "llmcompressor", partial(gptq, 3, 128)),
    _library("CTranslate2", "int8", "ctranslate2", ctranslate2_int8, True),
    _library("GGUF", "Q8_0", "gguf", partial(gguf_weights, "Q8_0")),
    _library("GGUF", "Q5_0", "gguf", partial(gguf_weights, "Q5_0"), True),
    _library("GGUF", "Q4_0", "gguf", partial(gguf_weights, "Q4_0")),
)
