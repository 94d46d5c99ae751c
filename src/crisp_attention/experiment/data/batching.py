"""Examples to what a model takes, and batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from crisp_attention.experiment.data import images
from crisp_attention.experiment.data.dataset import Split


class EncodedSplit(TorchDataset[dict[str, Any]]):
    """A split as a model takes it, unpadded; what a collator makes batches of.

    Attributes:
        labels: Int64 `[N]`.
        lengths: Int64 `[N]`, tokens of each text, or patches of each image.
    """

    labels: np.ndarray[Any, np.dtype[np.int64]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.labels)


class EncodedTexts(EncodedSplit):
    """A tokenised split.

    Args:
        split: Texts and labels.
        tokenizer: Of the model.
        max_length: Tokens after which a text is cut.
    """

    def __init__(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        pairs = None if split.pairs is None else list(split.pairs)
        self._columns = dict(tokenizer(list(split.texts), pairs, truncation=True, max_length=max_length))
        self.labels = split.labels
        self.lengths = np.fromiter((len(ids) for ids in self._columns["input_ids"]), dtype=np.int64)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row] for name, column in self._columns.items()} | {"labels": int(self.labels[row])}


class EncodedImages(EncodedSplit):
    """Images, resized and normalised row by row when they are asked for.

    Args:
        split: Images and labels.
        processor: Of the model.
        channels: Colours that the model takes, 1 or 3.
        patches: Into how many the model cuts an image; the same for all.
    """

    def __init__(self, split: Split, processor: Any, channels: int, patches: int) -> None:
        self._images = split.images or ()
        self._processor = processor
        self._channels = channels
        self.labels = split.labels
        self.lengths = np.full(len(split), patches, dtype=np.int64)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = images.decode(self._images[row], self._channels)
        pixels: torch.Tensor = self._processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": int(self.labels[row])}


class LengthGroupedBatches:
    """Batches of similar length in random order, a pure function of seed and epoch.

    Rows are shuffled, sorted by length within chunks of many batches, cut into batches, and the
    batches shuffled. Padding stays small, yet no epoch runs from long texts to short ones, and the
    order depends on nothing that an arm could change.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a batch; the last one may be smaller.
        seed: Of the order.
        chunk: Batches within which rows are sorted.
    """

    def __init__(self, lengths: np.ndarray[Any, Any], batch_size: int, seed: int, chunk: int = 50) -> None:
        self._lengths = lengths
        self._seed = seed
        self._chunk = chunk * batch_size
        self._epoch = 0
        self.batch_size = batch_size
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.of_epoch(self._epoch)

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """The rows of each batch of an epoch, in order."""
        random = np.random.default_rng([self._seed, epoch])
        rows = random.permutation(len(self._lengths))
        # A data set of few batches is cut into chunks too, so that batches differ between epochs.
        size = min(self._chunk, max(self.batch_size, -(-len(rows) // 4)))
        size = -(-size // self.batch_size) * self.batch_size
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        ordered = np.concatenate([chunk[np.argsort(self._lengths[chunk], kind="stable")] for chunk in chunks])
        batches = [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        return [batches[number].tolist() for number in random.permutation(len(batches))]


class RankBatches:
    """One rank's part of each batch: a batch sampler for processes that train together.

    Parts put one after another by rank are the batch. They differ by one row at most, smaller ones first, so that
    masks which are drawn by a row's place among `rank` times the rows of a part never meet. A rank without a row
    gets one of the batch's to go through the motions with; it must not count.

    Args:
        batches: Of all ranks together.
        rank: This one.
        size: How many there are.
    """

    def __init__(self, batches: LengthGroupedBatches, rank: int = 0, size: int = 1) -> None:
        self._batches = batches
        self._rank, self._size = rank, size
        self._rows: dict[int, list[int]] = {}
        self.batch_size = batches.batch_size // size
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield batch[self._part(len(batch))] or batch[:1]

    def rows(self, step: int) -> tuple[int, int]:
        """Rows that count in a training step: this rank's, and those of all ranks.

        Args:
            step: From 0, through all epochs.
        """
        epoch, place = divmod(step, len(self))
        if epoch not in self._rows:
            self._rows = {epoch: [len(batch) for batch in self._batches.of_epoch(epoch)]}
        whole = self._rows[epoch][place]
        part = self._part(whole)
        return part.stop - part.start, whole

    def _part(self, rows: int) -> slice:
        least, more = divmod(rows, self._size)
        first = [rank * least + max(0, rank - (self._size - more)) for rank in (self._rank, self._rank + 1)]
        return slice(*first)


def by_length(lengths: np.ndarray[Any, Any], batch_size: int) -> Iterator[Sequence[int]]:
    """All rows in batches of similar length, longest first: the order for evaluation."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size].tolist()
