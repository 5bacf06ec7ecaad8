"""Bit planes: codes of 1, 2, 4 or 8 bits in bytes, lowest bits first, along the last axis.

A row of K codes becomes ceil(K * bits / 8) bytes; the codes beyond K in the last byte are 0.
"""

from __future__ import annotations

import torch


def packed_width(k: int, bits: int) -> int:
    """Return the bytes that a row of k codes takes."""
    return -(-k * bits // 8)


def pack(codes_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [N, K], each below 2**bits, into uint8 [N, ceil(K * bits / 8)]."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes_NK.contiguous()
    n, k = codes_NK.shape
    width = packed_width(k, bits)
    padded = torch.nn.functional.pad(codes_NK, (0, width * per_byte - k))
    out = torch.zeros((n, width), dtype=torch.uint8)
    for slot in range(per_byte):
        out |= padded[:, slot::per_byte] << (slot * bits)
    return out


def unpack(bytes_NB: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Return the k uint8 codes of each row of uint8 [N, ceil(k * bits / 8)]: the inverse of pack."""
    per_byte = 8 // bits
    if per_byte == 1:
        return bytes_NB
    n = bytes_NB.shape[0]
    out = torch.empty((n, bytes_NB.shape[1] * per_byte), dtype=torch.uint8, device=bytes_NB.device)
    for slot in range(per_byte):
        out[:, slot::per_byte] = (bytes_NB >> (slot * bits)) & ((1 << bits) - 1)
    return out[:, :k]


def split_planes(codes_NK: torch.Tensor, planes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return one packed plane per width in `planes`, the low bits of each code first."""
    packed, shift = [], 0
    for bits in planes:
        packed.append(pack((codes_NK >> shift) & ((1 << bits) - 1), bits))
        shift += bits
    return packed


def join_planes(packed: list[torch.Tensor], planes: tuple[int, ...], k: int) -> torch.Tensor:
    """Return the uint8 codes [N, k] of packed planes: the inverse of split_planes."""
    codes, shift = None, 0
    for plane, bits in zip(packed, planes, strict=True):
        part = unpack(plane, bits, k) << shift
        codes = part if codes is None else codes | part
        shift += bits
    assert codes is not None  # every grouped format has at least one plane
    return codes
