"""The two scopes of a rank threshold: a head's whole matrix (`percentile`) and a query's row (`topk`).

They share everything but the scope in which survivors are counted.
"""

from __future__ import annotations

from torch import Tensor

from crisp_attention.rules.selection import Pairs, Threshold, keep_bound, keep_count


def percentile(
    pairs: Pairs,
    *,
    sparsity: float | Tensor,
    min_keep: int,
    forced: Tensor | None = None,
    count_padding: bool = False,
    ranking: Tensor | None = None,
) -> Threshold:
    """One threshold per head and example over all valid pairs: the paper's rule.

    With n valid pairs in head h of example b and `keep = n - ceil(n * sparsity - 1/2)`, tau[b, h] is
    the keep-th largest score and S_ij survives iff S_ij >= tau[b, h]. Rows that this would leave with
    fewer than `min_keep` keys keep their best ones, so realised sparsity may be lower than requested.
    Monotone: a higher sparsity keeps a subset.

    Source: Crisp Attention, arXiv 2508.06016 ("per head and batch", "s-th percentile").

    Args:
        pairs: What there is to choose from.
        sparsity: Share of pairs to remove, in [0, 1).
        min_keep: Keys that each query keeps at least.
        forced: Bool `[B, 1, Q, K]`, pairs that rank before all others.
        count_padding: Count every pair of the Q x K matrix, invalid ones as lowest scores, and the
            rows of padded queries: what a percentile over a padded matrix does. Depends on padding.
        ranking: Ranked in place of the scores, `[B, H, Q, K]`.
    """
    _, _, queries, keys = pairs.shape
    bound = keep_bound(queries * keys, sparsity)
    counted = pairs.counted_per_head
    if count_padding:
        keep = keep_count(counted.new_full((pairs.shape[0], 1, 1, 1), queries * keys), sparsity)
        return Threshold("matrix", keep, bound, pairs.valid, min_keep, ranking, forced=forced)
    return Threshold("matrix", keep_count(counted, sparsity), bound, pairs.counted, min_keep, ranking, forced=forced)


def topk(
    pairs: Pairs,
    *,
    sparsity: float | Tensor,
    min_keep: int,
    forced: Tensor | None = None,
    count_padding: bool = False,
    ranking: Tensor | None = None,
    largest: bool = True,
) -> Threshold:
    """The best keys of each query.

    With n valid keys in a row and `keep = max(n - ceil(n * sparsity - 1/2), min(min_keep, n))`, tau is
    the row's keep-th largest score and S_ij survives iff S_ij >= tau. A row never looks at another,
    so causal models stay causal and a KV cache changes nothing. Monotone: a higher sparsity keeps a
    subset.

    Source: Explicit Sparse Transformer, arXiv 1912.11637.

    Args:
        pairs: What there is to choose from.
        sparsity: Share of each row's keys to remove, in [0, 1).
        min_keep: Keys that each query keeps at least.
        forced: Bool `[B, 1, Q, K]`, pairs that rank before all others.
        count_padding: Count every key of the row, invalid ones as lowest scores. Depends on padding.
        ranking: Ranked in place of the scores, `[B, 1 | H, Q, K]`.
        largest: Keep the lowest ranking instead if False.
    """
    keys = pairs.shape[3]
    bound = keep_bound(keys, sparsity)
    valid = pairs.valid_per_row
    counted = valid.new_full((pairs.shape[0], 1, 1, 1), keys) if count_padding else valid
    keep = keep_count(counted, sparsity).maximum(counted.clamp(max=min_keep))
    return Threshold(
        "row",
        keep,
        None if bound is None else min(max(bound, min_keep), keys),
        pairs.valid,
        min_keep,
        ranking,
        largest=largest,
        forced=forced,
    )
