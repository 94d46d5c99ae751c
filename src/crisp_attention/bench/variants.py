"""What can be timed: dense attention, this package's backends, and what others offer.

Every variant is a function of queries, keys and values `[B, H, N, D]` to the output, built for a sparsity. One that
cannot run here says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import crisp_attention
from crisp_attention.errors import ConfigurationError, nearest
from crisp_attention.rules import keep_count

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

BASELINE = "sdpa"
"""What all others are compared with: dense, in torch's fused kernel."""


@dataclass(frozen=True)
class Variant:
    """An attention to be timed.

    Attributes:
        name: Its name in tables.
        what: What it computes, in a few words.
        build: Device and sparsity to the function.
        needs: Packages that it needs beside torch.
        devices: Types of device that it runs on.
        trains: Whether it has a backward pass there.
    """

    name: str
    what: str
    build: Callable[[torch.device, float], Attention]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    trains: bool = True

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot run on a device; None if it can."""
        if device.type not in self.devices:
            return f"does not run on {device.type}"
        missing = [package for package in self.needs if find_spec(package) is None]
        return f"not installed: {', '.join(missing)}" if missing else None


def _ours(backend: str, rule: str, **settings: Any) -> Callable[[torch.device, float], Attention]:
    def build(device: torch.device, sparsity: float) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = crisp_attention.attention(q, k, v, sparsity=sparsity, rule=rule, backend=backend, **settings)
            assert isinstance(out, Tensor)
            return out

        return attend

    return build


def _sdpa(device: torch.device, sparsity: float) -> Attention:
    return F.scaled_dot_product_attention


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))


def _eager(device: torch.device, sparsity: float) -> Attention:
    return lambda q, k, v: torch.matmul(_scores(q, k).softmax(-1), v)


def _masked(device: torch.device, sparsity: float) -> Attention:
    """The usual way to write top-k attention: sort out, fill with -inf, softmax."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = _scores(q, k)
        kept = max(1, int(keep_count(torch.tensor(k.shape[2]), sparsity)))
        lowest = scores.topk(kept, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < lowest, -torch.inf).softmax(-1) @ v

    return attend


def _entmax(device: torch.device, sparsity: float) -> Attention:
    from entmax import entmax15

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = entmax15(_scores(q, k), dim=-1) @ v
        return output

    return attend


def _x_transformers(device: torch.device, sparsity: float) -> Attention:
    from x_transformers.attend import Attend

    attends: dict[int, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = max(1, int(keep_count(torch.tensor(k.shape[2]), sparsity)))
        if kept not in attends:
            attends[kept] = Attend(sparse_topk=kept, heads=q.shape[1])
        output: Tensor = attends[kept](q, k, v)[0]
        return output

    return attend


def _adasplash(device: torch.device, sparsity: float) -> Attention:
    from adasplash import adasplash

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = adasplash(q, k, v, alpha=1.5)
        return output

    return attend


def _flex(device: torch.device, sparsity: float) -> Attention:
    """FlexAttention over the scores that reach a threshold, which is found once for each length and not timed."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    thresholds: dict[torch.Size, Tensor] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape not in thresholds:
            with torch.no_grad():
                kept = max(1, int(keep_count(torch.tensor(k.shape[2]), sparsity)))
                # Head by head: all scores at once may not fit.
                found = [
                    _scores(q[:, head].float(), k[:, head].float()).topk(kept, dim=-1).values[..., -1]
                    for head in range(q.shape[1])
                ]
                thresholds[q.shape] = torch.stack(found, dim=1)
        tau = thresholds[q.shape]

        def survive(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(score >= tau[b, h, i], score, -torch.inf)

        output: Tensor = compiled(q, k, v, score_mod=survive)
        return output

    return attend


VARIANTS = (
    Variant("sdpa", "dense, torch's fused kernel", _sdpa),
    Variant("eager", "dense, scores stored", _eager),
    Variant("cpu topk", "this package, compiled", _ours("cpu", "topk"), ("numba",), ("cpu",)),
    Variant("cpu percentile", "this package, compiled", _ours("cpu", "percentile"), ("numba",), ("cpu",)),
    Variant("triton topk", "this package, compiled", _ours("triton", "topk"), ("triton",), ("cuda",)),
    Variant("triton percentile", "this package, compiled", _ours("triton", "percentile"), ("triton",), ("cuda",)),
    Variant(
        "triton block_topk",
        "this package, compiled, blocks of 64",
        _ours("triton", "block_topk", query_block=64, key_block=64),
        ("triton",),
        ("cuda",),
    ),
    Variant("reference topk", "this package, scores stored", _ours("reference", "topk")),
    Variant("reference percentile", "this package, scores stored", _ours("reference", "percentile")),
    Variant("masked topk", "topk, fill with -inf, softmax", _masked),
    Variant("entmax", "entmax with alpha 1.5 (package entmax)", _entmax, ("entmax",)),
    Variant("x-transformers", "sparse_topk of package x-transformers", _x_transformers, ("x_transformers",)),
    Variant("flex", "FlexAttention, threshold known beforehand", _flex, ("triton",), ("cuda",)),
    Variant("adasplash", "entmax in Triton kernels (package adasplash)", _adasplash, ("adasplash",), ("cuda",)),
)


def chosen(names: list[str] | None) -> tuple[Variant, ...]:
    """Variants by name, the baseline always among them; all for None.

    Raises:
        ConfigurationError: If a name is unknown.
    """
    by_name = {variant.name: variant for variant in VARIANTS}
    for name in names or ():
        if name not in by_name:
            raise ConfigurationError(f"Unknown variant {name!r}. {nearest(name, by_name)}")
    return tuple(variant for variant in VARIANTS if names is None or variant.name in {BASELINE, *names})
