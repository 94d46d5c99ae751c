"""A trained model on a split: logits, scores, realised sparsity by length, attention maps."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from crisp_attention.backends import Detail
from crisp_attention.experiment.data.batching import EncodedSplit, by_length
from crisp_attention.experiment.results.record import LengthBin, Score
from crisp_attention.experiment.training.ranks import Ranks
from crisp_attention.operator import AttentionOutput

Array = np.ndarray[Any, Any]
Outputs = dict[str, Array]

EVALUATION_BATCH = 64
_LENGTH_BINS = 4
_MOST_MAPS = 48
_LONGEST_MAP = 32
"""Tokens. Maps are looked at by people, and grow with the square."""


class PairsByExample:
    """A monitor that counts kept and valid pairs of each example, all layers and heads together.

    Attributes:
        pairs: Int64 `[N, 2]` in the split's order, kept and valid; None where a layer's batch is not
            the examples (windows of images), so that its pairs belong to none of them.
    """

    detail = Detail.SUMMARY

    def __init__(self) -> None:
        self.pairs: Array | None = None
        self._batch: Tensor | None = None
        self._mixed = False

    def record(self, layer: str, training: bool, out: AttentionOutput) -> None:
        """Add one attention call in evaluation mode."""
        if training:
            return
        both = torch.stack([count.sum(dim=1) for count in out.counts], dim=1)
        if self._batch is None:
            self._batch = both
        elif self._batch.shape == both.shape:
            self._batch = self._batch + both
        else:
            self._mixed = True

    def assign(self, rows: list[int], total: int) -> None:
        """Give what was counted since the last call to the examples that were evaluated.

        Args:
            rows: Their places in the split.
            total: Examples of the split.
        """
        batch, self._batch = self._batch, None
        self._mixed = self._mixed or batch is None or len(batch) != len(rows)
        if self._mixed or batch is None:
            self.pairs = None
            return
        if self.pairs is None:
            self.pairs = np.zeros((total, 2), dtype=np.int64)
        self.pairs[rows] = batch.long().cpu().numpy()

    def pool(self, ranks: Ranks) -> None:
        """Take over what the monitors of other processes counted; each of them calls this.

        Args:
            ranks: The processes, each of which saw other examples.
        """
        parts = ranks.gather((self._mixed, self.pairs))
        self._mixed = any(mixed for mixed, _ in parts)
        found = [pairs for _, pairs in parts if pairs is not None]
        self.pairs = np.sum(found, axis=0) if found and not self._mixed else None


def evaluate(
    trainer: Trainer, split: EncodedSplit, count: PairsByExample | None = None, ranks: Ranks | None = None
) -> Array:
    """Logits of a split in its own order, float32 `[N, C]`, in evaluation mode.

    Batches are grouped by length; results do not depend on that. Draws no random numbers.
    Processes that train together share the batches, and each gets all logits.

    Args:
        trainer: With the model and the collator.
        split: The examples.
        count: A monitor that is watching the model; told which examples it saw.
        ranks: The processes that evaluate together, each of which calls this; None for this one alone.
    """
    ranks = ranks or Ranks()
    model, collate = trainer.model, trainer.data_collator
    assert isinstance(model, PreTrainedModel)
    assert collate is not None
    # Zeros, so that the sum over processes, of which one has each row, is that row.
    logits = np.zeros((len(split), cast(int, model.config.num_labels)), dtype=np.float32)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for rows in ranks.own(list(by_length(split.lengths, EVALUATION_BATCH))):
            logits[rows] = model(**_inputs(trainer, split, rows)).logits.float().cpu().numpy()
            if count is not None:
                count.assign(list(rows), len(split))
    model.train(was_training)
    if count is not None:
        count.pool(ranks)
    return ranks.sum(torch.from_numpy(logits)).numpy()


def score(logits: Array, labels: Array) -> Score:
    """Mean cross-entropy in nats and the number of correct rows, in float64."""
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    loss = -log_probabilities[np.arange(len(labels)), labels].mean()
    return Score(loss=float(loss), correct=int((logits.argmax(axis=1) == labels).sum()), total=len(labels))


def length_bins(lengths: Array, pairs: Array) -> tuple[LengthBin, ...]:
    """Realised sparsity in up to four bins of like many examples, shortest first.

    Examples of equal length share a bin, so that bins are fewer where lengths repeat.

    Args:
        lengths: Tokens, int64 `[N]`.
        pairs: Kept and valid pairs, int64 `[N, 2]`.
    """
    edges = np.quantile(lengths, np.arange(1, _LENGTH_BINS) / _LENGTH_BINS)
    places = np.searchsorted(edges, lengths)
    found = []
    for place in np.unique(places):
        kept, valid = pairs[places == place].sum(axis=0)
        own = lengths[places == place]
        if valid:
            found.append(
                LengthBin(
                    shortest=int(own.min()), longest=int(own.max()), examples=len(own), realised=float(1 - kept / valid)
                )
            )
    return tuple(found)


def map_rows(lengths: Array) -> Array:
    """The examples whose attention maps are kept: short ones, evenly spread, the same for every run.

    Args:
        lengths: Tokens, int64 `[N]`.

    Returns:
        Int64 `[M]`, rising.
    """
    short = np.flatnonzero(lengths <= _LONGEST_MAP)
    places = np.linspace(0, max(len(short) - 1, 0), min(_MOST_MAPS, len(short)))
    return short[np.unique(places.astype(np.int64))]


def attention_maps(trainer: Trainer, split: EncodedSplit) -> Outputs:
    """Attention of a few examples in evaluation mode, as `record.Arrays` describes it.

    Empty for what is no text, and for architectures that return no maps of tokens.
    """
    rows = map_rows(split.lengths)
    model = trainer.model
    assert isinstance(model, PreTrainedModel)
    if not len(rows) or "input_ids" not in split[0]:
        return {}
    maps: dict[int, Array] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in by_length(split.lengths[rows], EVALUATION_BATCH):
            inputs = _inputs(trainer, split, rows[batch].tolist())
            try:
                # As an argument: set on the configuration, it would choose another attention implementation.
                attentions = model(**inputs, output_attentions=True).attentions
            except (TypeError, ValueError, AttributeError):
                attentions = None
            shape = inputs["input_ids"].shape
            if not attentions or any(
                item is None or item.shape[::2] != shape or item.shape[2] != item.shape[3] for item in attentions
            ):
                maps.clear()
                break
            layers = torch.stack([item.float().mean(dim=1) for item in attentions], dim=1).cpu()
            for place, layer_maps, mask in zip(batch, layers, inputs["attention_mask"].bool().cpu(), strict=True):
                whole = layer_maps[:, mask][:, :, mask]
                maps[place] = (whole * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    model.train(was_training)
    if not maps:
        return {}
    ordered = [maps[place] for place in range(len(rows))]
    return {
        "map_rows": rows,
        "map_lengths": np.array([item.shape[1] for item in ordered], dtype=np.int64),
        "map_layers": np.array(ordered[0].shape[0], dtype=np.int64),
        "maps": np.concatenate([item.reshape(-1) for item in ordered]),
    }


def _inputs(trainer: Trainer, split: EncodedSplit, rows: Any) -> dict[str, Tensor]:
    """A batch as the model takes it, without labels."""
    collate = trainer.data_collator
    assert collate is not None
    batch = collate([split[row] for row in rows])
    return {name: tensor.to(trainer.args.device) for name, tensor in batch.items() if name != "labels"}
