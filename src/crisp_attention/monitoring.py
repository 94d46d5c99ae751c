"""What attention really did: realised sparsity per layer, counted over valid pairs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from crisp_attention.operator import AttentionOutput


class Monitor(Protocol):
    """Anything that wants to see every attention call of a model."""

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        """See one call of the module named `layer`, in training or evaluation mode."""


class SparsityMonitor:
    """Accumulates kept and valid pairs per layer, training and evaluation apart.

    Counts stay on the device until they are read, so that watching does not wait for it.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[bool, str], Tensor] = {}

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        """Add one attention call.

        Args:
            layer: Name of the attention module.
            training: The module's mode.
            out: What the operator returned.
        """
        both = torch.stack((out.counts.kept.sum(), out.counts.valid.sum()))
        seen = self._counts.get((training, layer))
        self._counts[training, layer] = both if seen is None else seen + both

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._counts.clear()

    def realised(self, training: bool) -> dict[str, float]:
        """Realised sparsity by layer name, in the order the layers ran.

        Args:
            training: Which mode's counts to read.

        Returns:
            Share of valid pairs removed, in [0, 1], for each layer that ran in that mode.
        """
        shares = {}
        for (mode, layer), counts in self._counts.items():
            kept, valid = counts.tolist()
            if mode == training and valid:
                shares[layer] = 1.0 - kept / valid
        return shares

    def mean(self, training: bool) -> float | None:
        """Realised sparsity over all layers' pairs together; None if nothing ran in that mode."""
        counts = [both for (mode, _), both in self._counts.items() if mode == training]
        kept, valid = torch.stack(counts).sum(dim=0).tolist() if counts else (0, 0)
        return 1.0 - kept / valid if valid else None
