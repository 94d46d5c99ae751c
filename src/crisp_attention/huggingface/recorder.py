"""What training asked of each attention layer and what it did, and why the two may differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crisp_attention.backends import Detail
from crisp_attention.config import SparsityConfig
from crisp_attention.monitoring import accumulate
from crisp_attention.operator import AttentionOutput
from crisp_attention.state import LayerState


@dataclass(frozen=True)
class Tally:
    """One layer's sums over some training steps, over the heads that its settings make sparse.

    Attributes:
        layer: Name of the attention module.
        config: Its settings.
        pairs: Valid pairs.
        kept: Pairs that survived.
        asked: Pairs that were to be removed; None for a rule that is not told how many.
        queries: Queries that are not padding.
        entropy: Sum of the entropy of their attention in nats, and over how many it was taken.
    """

    layer: str
    config: SparsityConfig
    pairs: float
    kept: float
    asked: float | None
    queries: float
    entropy: tuple[float, float] = (0.0, 0.0)

    @property
    def realised(self) -> float:
        """Share of valid pairs removed."""
        return 1.0 - self.kept / self.pairs

    @property
    def requested(self) -> float | None:
        """Share of valid pairs that was to be removed, each step weighted by its pairs as `realised` is."""
        return None if self.asked is None else self.asked / self.pairs


class StepRecorder:
    """A monitor of training calls that knows what each layer was asked for at the time of the call.

    Only the layers and heads that the settings make sparse are counted, so that requested and
    realised sparsity speak of the same pairs. Sums stay on the device until they are read.

    Attributes:
        watch_entropy: Whether entropy is summed at present; it takes another pass over the weights.
    """

    detail = Detail.SUMMARY

    def __init__(self, layers: Mapping[str, LayerState]) -> None:
        self.watch_entropy = False
        self._layers = dict(layers)
        self._sums: dict[str, Tensor] = {}
        self._entropies: dict[str, Tensor] = {}

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        """Add one attention call."""
        state = self._layers.get(layer)
        if not training or state is None or state.config is None:
            return
        heads = state.heads
        counts = out.counts
        kept, pairs = (count[:, heads].sum().double() for count in counts)
        batch, queries = counts.kept.shape[0], out.pairs.shape[2]
        query_valid = out.pairs.query_valid
        rows = pairs.new_tensor(batch * queries) if query_valid is None else query_valid.sum().double()
        rows = rows * counts.kept[:, heads].shape[1]
        asked = _request(state)
        accumulate(self._sums, layer, torch.stack((pairs, kept, pairs * (0.0 if asked is None else asked), rows)))
        if self.watch_entropy:
            entropy = out.entropy[:, heads].double()
            accumulate(self._entropies, layer, torch.stack((entropy.nansum(), (~entropy.isnan()).sum())))

    def read(self) -> list[Tally]:
        """The sums since the last reset, by layer as they first ran."""
        tallies = []
        for layer, sums in self._sums.items():
            config = self._layers[layer].config
            pairs, kept, asked, queries = sums.tolist()
            if config is None or not pairs:
                continue
            entropy = self._entropies[layer].tolist() if layer in self._entropies else (0.0, 0.0)
            told = _request(self._layers[layer]) is not None
            tallies.append(Tally(layer, config, pairs, kept, asked if told else None, queries, tuple(entropy)))
        return tallies

    def reset(self) -> None:
        """Forget all sums."""
        self._sums.clear()
        self._entropies.clear()


def summary(tallies: Iterable[Tally]) -> dict[str, float]:
    """What a training log says: means over all pairs (entropy: over all queries) of all layers."""
    tallies = list(tallies)
    pairs = sum(tally.pairs for tally in tallies)
    if not pairs:
        return {}
    values = {"realised_sparsity": 1.0 - sum(tally.kept for tally in tallies) / pairs}
    asked = [tally.asked for tally in tallies if tally.asked is not None]
    if len(asked) == len(tallies):
        values["requested_sparsity"] = sum(asked) / pairs
    rows = sum(tally.entropy[1] for tally in tallies)
    if rows:
        values["attention_entropy"] = sum(tally.entropy[0] for tally in tallies) / rows
    return values


def explain(tally: Tally) -> tuple[str, str]:
    """The likeliest reason why a layer realised another sparsity than requested: its name and a sentence."""
    config, requested = tally.config, tally.requested or 0.0
    keys = tally.pairs / max(tally.queries, 1.0)
    left = keys * (1.0 - requested)
    forced = (config.keep_first or 0) + bool(config.keep_self)
    if config.count_padding:
        return "padding", (
            "count_padding=True counts padding among the removed pairs, which realised sparsity leaves out. Take "
            "count_padding=False, or put sentences of like length in a batch."
        )
    if config.rule == "nm":
        reachable = ", ".join(f"{part / (config.m or 1):.2f}" for part in range(config.m or 1))
        return "groups", f"Rule 'nm' with m={config.m} can remove {reachable} of each full group. Request one of those."
    if config.rule == "block_topk":
        return "blocks", (
            f"Rule 'block_topk' removes whole blocks of {config.key_block} keys, and queries had {keys:.1f} valid keys "
            "on average. Choose smaller blocks, or rule='topk'."
        )
    if forced > left:
        return "forced", (
            f"Queries had {keys:.1f} valid keys on average, of which {left:.1f} were to survive, and keep_first and "
            f"keep_self alone keep {forced}. Request less, or force fewer keys."
        )
    if config.scope == "pair" and left >= (config.min_keep or 1) + 0.5:
        return "chance", (
            "scope='pair' removes each pair with that probability, so that the share of few pairs is left to chance. "
            "Take scope='row' for the exact share."
        )
    if left < (config.min_keep or 1) + 0.5 or tally.realised > requested:
        return "length", (
            f"Queries had {keys:.1f} valid keys on average, of which {left:.1f} were to survive: whole keys do, at "
            f"least min_keep={config.min_keep}. Request a sparsity that leaves such short sequences some keys, or take "
            "the realised one for what is trained."
        )
    if config.rule == "percentile" or config.scope == "matrix":
        return "empty rows", (
            f"One threshold for a whole head leaves some queries nothing; each keeps min_keep={config.min_keep} keys. "
            "Request less, or take rule='topk' (scope='row'), which asks as much of each query."
        )
    return "ties", (
        "Scores that tie at the threshold all survive. Many do where attention has collapsed to equal scores, or in "
        "half precision; train in float32 to tell the two apart."
    )


def _request(state: LayerState) -> float | Tensor | None:
    """The share of pairs that a layer is to remove in training at this moment; None if the rule is not told."""
    if state.config is None or state.request(state.config, training=True) is None:
        return None
    active = state.active(training=True)
    return 0.0 if active is None else state.request(active, training=True)
