"""Compressed layers compute what the dense layer with the dequantised weight computes."""

import pytest
import torch
from torch import Tensor, nn

from packlight.errors import PlanError
from packlight.layers import (
    CodeConv1d,
    CodeEmbedding,
    CodeLinear,
    Edit,
    GroupConv1d,
    GroupEmbedding,
    GroupLinear,
    build,
    fake_int8,
    replace_,
)
from packlight.packing import pack, unpack
from packlight.quant import LIMIT
from packlight.techniques.codes import CodesConfig, round_to_nearest
from packlight.techniques.groups import GroupsConfig, group_weights
from packlight.windows import matrix, matrix_inputs

CODES = CodesConfig(activations="float")
GROUPS = [GroupsConfig(bits=4, group=16), GroupsConfig(bits=8, group=32), GroupsConfig(bits=4, group=64)]


def seeded(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        p.data.normal_(generator=generator)
    return layer


def compressed(layer: nn.Module, config: CodesConfig | GroupsConfig) -> tuple[nn.Module, Tensor]:
    """The compressed form of a layer, and the matrix that it stands for."""
    technique = round_to_nearest if isinstance(config, CodesConfig) else group_weights
    made = technique(matrix(layer), None, config)  # type: ignore[arg-type]
    root = nn.Sequential(layer)
    new = replace_(root, Edit("0", made.kind, made.args))
    for name, buffer in new.named_buffers():
        assert buffer.shape == made.tensors[name].shape and buffer.dtype == made.tensors[name].dtype
        buffer.copy_(made.tensors[name])
    return new, made.approximation


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_unpack_undoes_pack(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, n), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, -(-n * bits // 8))
    assert torch.equal(unpack(packed, bits)[..., :n], codes)


def test_pack_puts_the_low_bits_first() -> None:
    assert pack(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("config", [CODES, *GROUPS])
@pytest.mark.parametrize("columns", [64, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_the_dense_layer(config: CodesConfig | GroupsConfig, columns: int, bias: bool) -> None:
    dense = seeded(nn.Linear(columns, 24, bias=bias))
    new, weight = compressed(dense, config)
    assert isinstance(new, CodeLinear | GroupLinear)
    x = noise(2, 5, columns)
    assert torch.allclose(new(x), nn.functional.linear(x, weight, dense.bias), atol=1e-4)


@pytest.mark.parametrize("config", [CODES, *GROUPS])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (3, 0)])
def test_convolution_equals_the_dense_layer(config: CodesConfig | GroupsConfig, stride: int, padding: int) -> None:
    dense = seeded(nn.Conv1d(12, 20, 3, stride=stride, padding=padding))
    new, weight = compressed(dense, config)
    assert isinstance(new, CodeConv1d | GroupConv1d)
    x = noise(2, 12, 31)
    kernel = weight.view(20, 3, 12).permute(0, 2, 1)
    expected = nn.functional.conv1d(x, kernel, dense.bias, stride=stride, padding=padding)
    assert new(x).shape == expected.shape
    assert torch.allclose(new(x), expected, atol=1e-4)


@pytest.mark.parametrize("config", [CODES, *GROUPS])
@pytest.mark.parametrize("width", [64, 40])
def test_embedding_equals_the_dense_table(config: CodesConfig | GroupsConfig, width: int) -> None:
    new, weight = compressed(seeded(nn.Embedding(30, width)), config)
    assert isinstance(new, CodeEmbedding | GroupEmbedding)
    ids = torch.tensor([[0, 29, 3], [3, 7, 11]])
    assert torch.allclose(new(ids), weight[ids], atol=1e-6)
    assert torch.equal(new(ids[:, :1], 5, position_ids=ids), new(ids))


@pytest.mark.parametrize("layer", [nn.Conv1d(6, 9, 3, stride=2, padding=1), nn.Linear(6, 9)])
def test_matrix_and_its_inputs_multiply_to_the_output(layer: nn.Module) -> None:
    seeded(layer)
    x = noise(2, 6, 11) if isinstance(layer, nn.Conv1d) else noise(2, 11, 6)
    y = matrix_inputs(layer, x) @ matrix(layer).T + layer.bias  # type: ignore[operator]
    expected = layer(x).transpose(1, 2) if isinstance(layer, nn.Conv1d) else layer(x)
    assert torch.allclose(y, expected.reshape(-1, 9), atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, dilation=2), nn.Conv1d(4, 4, 3, padding_mode="circular"),
     nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, dilation=2), nn.LayerNorm(4)],
)  # fmt: skip
def test_matrix_refuses_layers_that_it_would_get_wrong(layer: nn.Module) -> None:
    with pytest.raises(PlanError):
        matrix(layer)


def test_no_pair_of_products_saturates_sixteen_bits() -> None:
    assert 255 * LIMIT * 2 < 2**15
    assert 255 * (LIMIT + 2) * 2 >= 2**15
    made = round_to_nearest(noise(50, 70) * 1e3, None, CodesConfig())
    codes = made.tensors["codes"].int()
    assert int(codes.abs().max()) == LIMIT
    pairs = 255 * (codes[0::2].abs() + codes[1::2].abs())
    assert int(pairs.max()) < 2**15


def test_fake_int8_is_integer_arithmetic_per_sample() -> None:
    x = noise(3, 4, 50) * torch.tensor([1.0, 10.0, 0.01])[:, None, None]
    y = fake_int8(x)
    for one, rounded in zip(x, y, strict=True):
        step = float(one.max().clamp(min=0) - one.min().clamp(max=0)) / 255
        assert float((one - rounded).abs().max()) <= 0.51 * step
        assert len(rounded.unique()) <= 256
        assert torch.allclose(rounded / step, (rounded / step).round(), atol=1e-2)
    assert torch.equal(fake_int8(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(fake_int8(x)[1:2], fake_int8(x[1:2]))


def test_int8_activations_change_the_output_as_rounding_the_input_does() -> None:
    dense = seeded(nn.Linear(40, 24))
    new, weight = compressed(dense, CodesConfig(activations="int8"))
    x = noise(2, 5, 40)
    assert torch.allclose(new(x), nn.functional.linear(fake_int8(x), weight, dense.bias), atol=1e-4)
    assert not torch.allclose(new(x), nn.functional.linear(x, weight, dense.bias), atol=1e-4)


def test_build_refuses_pairs_that_do_not_exist() -> None:
    for layer, kind in ((nn.LayerNorm(4), "codes"), (nn.Linear(4, 4), "ternary"), (nn.Conv3d(1, 1, 1), "codes")):
        with pytest.raises(PlanError, match=r"decoder\.x"):
            build(layer, Edit("decoder.x", kind))


class Tied(nn.Module):
    """A table, a hidden layer and a head that shares the table's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids to logits."""
        return self.head(self.body(self.table(ids)))


@pytest.mark.parametrize("config", [CODES, GROUPS[0]])
def test_replaying_edits_and_tensors_gives_the_same_model(config: CodesConfig | GroupsConfig) -> None:
    model = seeded(Tied())
    technique = round_to_nearest if isinstance(config, CodesConfig) else group_weights
    edits = []
    for path in ("table", "body"):
        made = technique(matrix(model.get_submodule(path)), None, config)  # type: ignore[arg-type]
        edits.append(Edit(path, made.kind, made.args))
        layer = replace_(model, edits[-1])
        for name, buffer in layer.named_buffers():
            buffer.copy_(made.tensors[name])
    edits.append(Edit("head", edits[0].kind, {**edits[0].args, "tied": "table"}))
    replace_(model, edits[-1])
    names = {name for name, _ in model.table.named_buffers()}
    assert all(model.head.get_buffer(n).data_ptr() == model.table.get_buffer(n).data_ptr() for n in names)

    again = Tied()
    for edit in edits:
        replace_(again, edit)
    again.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 2, 29]])
    assert torch.equal(model(ids), again(ids))
    table = model.table(torch.arange(30))
    assert torch.allclose(model(ids), model.body(model.table(ids)) @ table.T, atol=1e-4)
