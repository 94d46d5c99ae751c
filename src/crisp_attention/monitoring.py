"""What attention really did: realised sparsity and entropy per layer, counted over valid pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from crisp_attention.backends import Detail
from crisp_attention.operator import AttentionOutput

Key = TypeVar("Key")


class Monitor(Protocol):
    """Anything that wants to see every attention call of a model.

    Attributes:
        detail: What it looks at. Weights and survivors are stored only where somebody does.
    """

    detail: Detail

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        """See one call of the module named `layer`, in training or evaluation mode."""


class SparsityMonitor:
    """Accumulates kept and valid pairs, and attention entropy, per layer; training and evaluation apart.

    Sums stay on the device until they are read, so that watching does not wait for it.

    Attributes:
        watch_entropy: Whether entropy is summed too. It takes another pass over the weights, so that
            one may want it for some steps only.
    """

    detail = Detail.SUMMARY

    def __init__(self, watch_entropy: bool = True) -> None:
        self.watch_entropy = watch_entropy
        self._counts: dict[tuple[bool, str], Tensor] = {}
        self._entropies: dict[tuple[bool, str], Tensor] = {}

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        """Add one attention call.

        Args:
            layer: Name of the attention module.
            training: The module's mode.
            out: What the operator returned.
        """
        kept, valid = out.counts
        accumulate(self._counts, (training, layer), torch.stack((kept.sum(), valid.sum())))
        if self.watch_entropy:
            entropy = out.entropy.double()
            accumulate(self._entropies, (training, layer), torch.stack((entropy.nansum(), (~entropy.isnan()).sum())))

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._counts.clear()
        self._entropies.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that was counted so far, for a checkpoint: tensors in containers of plain types."""
        return {"counts": dict(self._counts), "entropies": dict(self._entropies)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._counts, self._entropies = dict(state["counts"]), dict(state["entropies"])

    def add(self, state: Mapping[str, Any]) -> None:
        """Count also what another monitor counted, perhaps in another process: its `state_dict`."""
        for mine, theirs in ((self._counts, state["counts"]), (self._entropies, state["entropies"])):
            for key, value in theirs.items():
                accumulate(mine, key, value)

    def realised(self, training: bool) -> dict[str, float]:
        """Realised sparsity by layer name, in the order the layers ran.

        Args:
            training: Which mode's counts to read.

        Returns:
            Share of valid pairs removed, in [0, 1], for each layer that ran in that mode.
        """
        return {layer: 1.0 - kept / valid for layer, (kept, valid) in _read(self._counts, training).items()}

    def mean(self, training: bool) -> float | None:
        """Realised sparsity over all layers' pairs together; None if nothing ran in that mode."""
        read = _read(self._counts, training).values()
        valid = sum(whole for _, whole in read)
        return 1.0 - sum(kept for kept, _ in read) / valid if valid else None

    def entropy(self, training: bool) -> dict[str, float]:
        """Mean entropy of a query's attention in nats, before dropout, by layer name.

        Args:
            training: Which mode's sums to read.
        """
        return {layer: total / rows for layer, (total, rows) in _read(self._entropies, training).items()}


def accumulate(sums: dict[Key, Tensor], key: Key, value: Tensor) -> None:
    """Add to one of several sums, which begin with their first value."""
    seen = sums.get(key)
    # Replicas of a model on several devices share what they count in.
    sums[key] = value if seen is None else seen + value.to(seen.device)


def _read(sums: dict[tuple[bool, str], Tensor], training: bool) -> dict[str, tuple[float, float]]:
    """Numerator and denominator of each layer that counted anything in that mode."""
    read = {layer: both.tolist() for (mode, layer), both in sums.items() if mode == training}
    return {layer: (part, whole) for layer, (part, whole) in read.items() if whole}
