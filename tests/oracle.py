"""The operator once more, in loops and plain numpy, written from the contract and not from the code."""

from __future__ import annotations

import math

import numpy as np


def kept_of(count: int, sparsity: float) -> int:
    """Survivors of `count` pairs: the number whose removed share is nearest, half-way keeping more."""
    best = min(range(count + 1), key=lambda keep: (round(abs((count - keep) - sparsity * count), 9), -keep))
    return best


def scores_of(q, k, bias, scale):
    queries, keys = len(q), len(k)
    scores = np.empty((queries, keys))
    for i in range(queries):
        for j in range(keys):
            scores[i, j] = float(np.dot(q[i], k[j])) * scale + (bias[i, j] if bias is not None else 0.0)
    return scores


def percentile_mask(scores, valid, query_valid, sparsity, min_keep, count_padding=False):
    """Which pairs of one head survive one threshold over the whole matrix."""
    queries, keys = scores.shape
    if count_padding:
        pool = [scores[i, j] if valid[i, j] else -math.inf for i in range(queries) for j in range(keys)]
    else:
        pool = [scores[i, j] for i in range(queries) for j in range(keys) if valid[i, j] and query_valid[i]]
    keep = kept_of(len(pool), sparsity)
    tau = sorted(pool, reverse=True)[keep - 1] if keep else math.inf
    mask = np.zeros_like(valid)
    for i in range(queries):
        row = sorted((scores[i, j] for j in range(keys) if valid[i, j]), reverse=True)
        if not row:
            continue
        needed = row[min(min_keep, len(row)) - 1]
        for j in range(keys):
            mask[i, j] = valid[i, j] and scores[i, j] >= min(tau, needed)
    return mask


def topk_mask(scores, valid, sparsity, min_keep, count_padding=False):
    """Which pairs of one head survive a threshold per query."""
    queries, keys = scores.shape
    mask = np.zeros_like(valid)
    for i in range(queries):
        row = sorted((scores[i, j] for j in range(keys) if valid[i, j]), reverse=True)
        if not row:
            continue
        keep = kept_of(keys if count_padding else len(row), sparsity)
        tau = row[min(max(keep, min(min_keep, len(row))), len(row)) - 1]
        for j in range(keys):
            mask[i, j] = valid[i, j] and scores[i, j] >= tau
    return mask


def attend(scores, mask, v):
    """Softmax over the surviving scores of each row, then the weighted sum; empty rows give zeros."""
    out = np.zeros((scores.shape[0], v.shape[1]))
    for i in range(scores.shape[0]):
        alive = [j for j in range(scores.shape[1]) if mask[i, j]]
        if not alive:
            continue
        top = max(scores[i, j] for j in alive)
        weights = [math.exp(scores[i, j] - top) for j in alive]
        for weight, j in zip(weights, alive, strict=True):
            out[i] += weight / sum(weights) * v[j]
    return out
