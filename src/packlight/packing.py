"""Codes of 4 or 8 bits in bytes, as MatMulNBits of ONNX Runtime reads them."""

import torch
from torch import Tensor, nn


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] of 0 .. 2^bits - 1 to bytes [..., ceil(n * bits / 8)], low bits first. Bits is 4 or 8."""
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    codes = nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack`; with 4 bits the result has an even length."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def unpack_groups(packed: Tensor, scale: Tensor, zeros: Tensor, bits: int, group: int) -> Tensor:
    """The float32 weight [out, groups * group] of a grouped layer."""
    rows, groups = packed.shape[:2]
    codes = unpack(packed, bits).float()
    zero = unpack(zeros, bits)[:, :groups].float()
    return ((codes - zero[..., None]) * scale.view(rows, groups, 1)).reshape(rows, groups * group)
