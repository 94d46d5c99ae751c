"""Random numbers that are a pure function of where they are used: a hash instead of a generator.

Equal on every device and in every backend, whatever the order in which they are computed: a kernel that
never stores a matrix of attention weights drops the same ones as one that does.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 2**24
"""How many equally likely values there are; float32 holds each exactly."""

MULTIPLIER = 0x45D9F3B


def fold(stream: Tensor) -> Tensor:
    """The state that an int64 stream starts from: its upper half folded into its lower, int32, mixed."""
    return mix(((stream ^ (stream >> 32)) & 0xFFFFFFFF).to(torch.int32))


def mix(state: Tensor) -> Tensor:
    """A bijective hash of 32 bits, held in int32 tensors of any shape.

    Two rounds of xor-shift-multiply with the well-known multiplier 0x45d9f3b, and a last xor-shift.
    """
    for _ in range(2):
        # Shifts of signed numbers copy the sign, hence the mask; products wrap around.
        state = (state ^ ((state >> 16) & 0xFFFF)) * MULTIPLIER
    return state ^ ((state >> 16) & 0xFFFF)


def level(state: Tensor) -> Tensor:
    """The upper 24 bits of a mixed state: a whole number in [0, `LEVELS`), int32."""
    return (state >> 8) & (LEVELS - 1)


def pairwise(state: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Levels of all pairs of a query and a key.

    Args:
        state: Int32, broadcastable to `[B, H, Q, K]`: the state of each matrix of pairs.
        queries: Integers `[..., Q, 1]`, as `state`: what tells queries apart.
        keys: Integers `[..., 1, K]`: what tells keys apart.

    Returns:
        Int32 `[..., Q, K]` in [0, `LEVELS`).
    """
    return level(mix(mix(state ^ queries.to(torch.int32)) ^ keys.to(torch.int32)))
