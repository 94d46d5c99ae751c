"""What every backend is asked and what it answers.

Letters: B batch, H heads, Hkv key/value heads, N tokens (Q queries, K keys), D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from crisp_attention import noise
from crisp_attention.errors import ConfigurationError
from crisp_attention.rules.selection import Pairs, Selection


class Detail(IntEnum):
    """How much of an attention call somebody wants to see; each level holds the ones before."""

    OUTPUT = 0
    """The output alone."""
    SUMMARY = 1
    """How many pairs survived in each head, and the entropy of each query's attention."""
    WEIGHTS = 2
    """The matrix of attention weights and the survivors: whoever computes it must store it."""


@dataclass(frozen=True)
class Dropout:
    """Dropout on attention weights, the same in every backend: a pure function of a seed and the place of the pair.

    The pair (b, h, i, j) of a call is dropped where `noise.pairwise` of it lies below `p`, in units of
    1 / `noise.LEVELS`; the others are divided by 1 - p.

    Attributes:
        p: Probability, in (0, 1).
        seed: Int64 scalar on the device of the call, drawn from torch's global stream there, so that nobody
            waits for the device and arms that are compared stay paired.
    """

    p: float
    seed: Tensor

    @property
    def lowest(self) -> int:
        """Pairs whose level is below this are dropped."""
        return round(self.p * noise.LEVELS)

    @property
    def factor(self) -> float:
        """What remaining weights are multiplied by."""
        return 1.0 / (1.0 - self.p)

    def survivors(self, shape: tuple[int, int, int, int]) -> Tensor:
        """The pairs that are not dropped: bool `[B, H, Q, K]`."""
        batch, heads, queries, keys = shape
        device = self.seed.device
        matrix = torch.arange(batch * heads, dtype=torch.int32, device=device).view(batch, heads, 1, 1)
        query = torch.arange(queries, dtype=torch.int32, device=device).view(queries, 1)
        key = torch.arange(keys, dtype=torch.int32, device=device)
        return noise.pairwise(noise.mix(noise.fold(self.seed) ^ matrix), query, key) >= self.lowest


def draw_dropout(p: float, device: torch.device) -> Dropout | None:
    """Dropout with a seed from torch's global stream of a device; None if nothing is dropped.

    Args:
        p: Probability, in [0, 1).
        device: Where the call runs.
    """
    return Dropout(p, torch.randint(2**62, (), device=device)) if p > 0.0 else None


@dataclass(frozen=True)
class Call:
    """One attention call.

    Attributes:
        query: `[B, H, Q, D]`.
        key: `[B, Hkv, K, D]`; H is a multiple of Hkv (grouped-query attention).
        value: `[B, Hkv, K, Dv]`.
        pairs: The valid pairs.
        selection: Which of them survive; None keeps all (dense attention).
        bias: Added to the scaled scores before they are ranked, finite, broadcastable to `[B, H, Q, K]`.
        scale: Factor on q.k; a tensor, broadcastable to `[B, H, Q, 1]`, may want a gradient.
        softcap: Bounds the scaled scores to (-softcap, softcap) by tanh, before the bias.
        sinks: One logit a head, broadcastable to `[B, H, Q, 1]`.
        dropout: Dropout on the attention weights after the softmax; None in evaluation.
        detail: What is wanted beside the output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    pairs: Pairs
    selection: Selection | None
    bias: Tensor | None
    scale: float | Tensor
    softcap: float | None
    sinks: Tensor | None
    dropout: Dropout | None
    detail: Detail


class Computed(NamedTuple):
    """What a backend computed: the output, and at least what the call's detail asks for.

    Attributes:
        output: `[B, H, Q, Dv]`, in the values' dtype.
        kept: Int64 `[B, H]`, surviving pairs of queries that count; None where the survivors say it.
        entropy: Float `[B, H, Q]`, of each query's attention before dropout, in nats; None where the
            probabilities say it. Of queries that do not count it may hold anything.
        weights: After dropout, `[B, H, Q, K]`.
        probabilities: The same before dropout.
        keep: Bool `[B, H, Q, K]`, the survivors; None if every pair survives.
    """

    output: Tensor
    kept: Tensor | None = None
    entropy: Tensor | None = None
    weights: Tensor | None = None
    probabilities: Tensor | None = None
    keep: Tensor | None = None


def refuse_second_derivatives(backend: str) -> None:
    """Raise `ConfigurationError` in a backward pass whose own gradients are wanted, which a kernel would drop."""
    if torch.is_grad_enabled():
        raise ConfigurationError(
            f"create_graph=True asks for second derivatives, which backend={backend!r} does not compute. Use "
            "backend='reference'."
        )
