"""The operator once more, in loops and plain numpy, written from the contracts and not from the code.

One example of a batch at a time: scores and valid pairs are `[H, Q, K]`, padding of queries `[Q]`.
A rule is a function of one head. Letters: H heads, Q queries, K keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

BEFORE_ALL = math.inf


@dataclass
class Head:
    """One head's scores and what is known of its tokens.

    `valid` are the pairs that may be attended to, `forced` those of them that always survive.
    Places count the keys that some query may attend to; padding has that of the last one before it.
    """

    scores: np.ndarray
    valid: np.ndarray
    query_valid: np.ndarray
    forced: np.ndarray
    key_place: list
    query_place: list

    def keys_of(self, query):
        return [key for key in range(self.scores.shape[1]) if self.valid[query, key]]

    def rank(self, query, key, value):
        return BEFORE_ALL if self.forced[query, key] else value


def kept_of(count, sparsity):
    """Survivors of `count` pairs: the number whose removed share is nearest, half-way keeping more."""
    wanted = Fraction(count * sparsity)  # of the float64 product, exactly
    return min(range(count + 1), key=lambda keep: (abs(count - keep - wanted), -keep))


def best(ranks, keep):
    """The keys of the `keep` largest ranks and all that tie with the last of them."""
    if keep < 1:
        return set()
    last = sorted(ranks.values(), reverse=True)[min(keep, len(ranks)) - 1]
    return {key for key, value in ranks.items() if value >= last}


def best_of_each_row(head, ranks_of, keep_of):
    """A mask from one ranking and one count for each query."""
    mask = np.zeros_like(head.valid)
    for query in range(len(mask)):
        ranks = {key: head.rank(query, key, value) for key, value in ranks_of(query).items()}
        for key in best(ranks, keep_of(query, len(ranks))) if ranks else ():
            mask[query, key] = True
    return mask


def add_the_best_where_too_few(head, mask, ranks_of, min_keep):
    for query in range(len(mask)):
        if mask[query].sum() < min_keep:
            ranks = {key: head.rank(query, key, value) for key, value in ranks_of(query).items()}
            for key in best(ranks, min_keep) if ranks else ():
                mask[query, key] = True
    return mask


def by_score(head):
    return lambda query: {key: head.scores[query, key] for key in head.keys_of(query)}


# The rules, each from its docstring


def topk(head, sparsity, min_keep=1, count_padding=False):
    def keep(_, keys):
        return max(kept_of(head.scores.shape[1] if count_padding else keys, sparsity), min(min_keep, keys))

    return best_of_each_row(head, by_score(head), keep)


def bottomk(head, sparsity, min_keep=1):
    def lowest(query):
        return {key: -head.scores[query, key] for key in head.keys_of(query)}

    return best_of_each_row(head, lowest, lambda _, keys: max(kept_of(keys, sparsity), min(min_keep, keys)))


def drop_topk(head, drop, min_keep=1):
    def lowest(query):
        return {key: -head.scores[query, key] for key in head.keys_of(query)}

    return best_of_each_row(head, lowest, lambda _, keys: max(keys - drop, min(min_keep, keys)))


def percentile(head, sparsity, min_keep=1, count_padding=False):
    pool = {}
    for query, key in np.ndindex(*head.scores.shape):
        if head.valid[query, key] and (head.query_valid[query] or count_padding):
            pool[query, key] = head.rank(query, key, head.scores[query, key])
    pairs = head.scores.size if count_padding else len(pool)
    keep = kept_of(pairs, sparsity)
    if keep == 0:
        tau = BEFORE_ALL
    elif keep > len(pool):
        tau = -math.inf
    else:
        tau = sorted(pool.values(), reverse=True)[keep - 1]
    mask = np.zeros_like(head.valid)
    for query in range(len(mask)):
        for key in head.keys_of(query):
            mask[query, key] = head.rank(query, key, head.scores[query, key]) >= tau
    return add_the_best_where_too_few(head, mask, by_score(head), min_keep)


def drawn(head, sparsity, min_keep=1, count_padding=False, scope="row"):
    """The rule `random`, of a head whose scores are the noise."""
    if scope == "pair":
        mask = head.valid & (head.forced | (head.scores >= sparsity * 2**24))
        return add_the_best_where_too_few(head, mask, by_score(head), min_keep)
    return (topk if scope == "row" else percentile)(head, sparsity, min_keep, count_padding)


def top_p(head, p, min_keep=1):
    mask = np.zeros_like(head.valid)
    for query in range(len(mask)):
        keys = head.keys_of(query)
        if not keys:
            continue
        ranks = {key: head.rank(query, key, head.scores[query, key]) for key in keys}
        share = dict(zip(keys, softmax([head.scores[query, key] for key in keys]), strict=True))
        held, tau = 0.0, -math.inf
        for key in sorted(keys, key=lambda key: -ranks[key]):
            held += share[key]
            tau = ranks[key]
            if held >= p:
                break
        for key in keys:
            mask[query, key] = ranks[key] >= tau
    return add_the_best_where_too_few(head, mask, by_score(head), min_keep)


def nm(head, sparsity, m, min_keep=1):
    mask = np.zeros_like(head.valid)
    for query in range(len(mask)):
        groups = {}
        for key in head.keys_of(query):
            rank = head.rank(query, key, head.scores[query, key])
            groups.setdefault(head.key_place[key] // m, {})[key] = rank
        for ranks in groups.values():
            for key in best(ranks, max(kept_of(len(ranks), sparsity), 1)):
                mask[query, key] = True
    return add_the_best_where_too_few(head, mask, by_score(head), min_keep)


def block_topk(head, sparsity, query_block, key_block, min_keep=1):
    mask = np.zeros_like(head.valid)
    blocks = {}
    for query in range(len(mask)):
        if head.query_valid[query]:
            own = query if query_block == 1 else max(0, head.query_place[query])
            blocks.setdefault(own // query_block, []).append(query)
    for queries in blocks.values():
        scores, first = {}, set()
        for query in queries:
            for key in head.keys_of(query):
                place = head.key_place[key] // key_block
                scores.setdefault(place, []).append(head.scores[query, key])
                if head.forced[query, key]:
                    first.add(place)
        ranks = {place: BEFORE_ALL if place in first else math.fsum(s) / len(s) for place, s in scores.items()}
        kept = best(ranks, max(kept_of(len(ranks), sparsity), 1)) if ranks else ()
        for query in queries:
            for key in head.keys_of(query):
                mask[query, key] = head.key_place[key] // key_block in kept
    return add_the_best_where_too_few(head, mask, by_score(head), min_keep)


def window(head, sparsity=None, window=None, stride=None, min_keep=1):
    def nearest(query):
        """Closeness; of two keys equally far away the earlier is closer."""
        here = head.query_place[query]
        places = {key: head.key_place[key] for key in head.keys_of(query)}
        return {key: -abs(place - here) - (0.5 if place > here else 0.0) for key, place in places.items()}

    if sparsity is not None:
        return best_of_each_row(head, nearest, lambda _, keys: max(kept_of(keys, sparsity), min(min_keep, keys)))
    mask = head.forced.copy()
    for query in range(len(mask)):
        for key in head.keys_of(query):
            distance = abs(head.query_place[query] - head.key_place[key])
            mask[query, key] |= distance <= window or (stride is not None and distance % stride == 0)
        others = sorted((key for key in head.keys_of(query) if not mask[query, key]), key=nearest(query).get)
        while mask[query].sum() < min_keep and others:
            mask[query, others.pop()] = True
    return mask


RULES = {
    "block_topk": block_topk,
    "bottomk": bottomk,
    "drop_topk": drop_topk,
    "nm": nm,
    "percentile": percentile,
    "random": drawn,
    "top_p": top_p,
    "topk": topk,
    "window": window,
}


def survivors(
    rule, scores, valid, query_valid, *, heads=None, keep_first=0, keep_self=False, gradient="selected", **settings
):
    """The keep mask `[H, Q, K]` of one example; `random` needs its noise for scores."""
    assert gradient in ("selected", "straight_through")  # says nothing about who survives
    count, queries, keys = scores.shape
    reachable = [bool(valid[:, :, key].any()) for key in range(keys)]
    key_place = [sum(reachable[: key + 1]) - 1 for key in range(keys)]
    own_key = list(range(queries))
    if queries != keys:  # a cache of earlier keys: each query is the last key that it may attend to
        seen = [[key for key in range(keys) if valid[:, query, key].any()] for query in range(queries)]
        own_key = [allowed[-1] if allowed else -1 for allowed in seen]
    query_place = [key_place[key] if key >= 0 else -1 for key in own_key]
    mask = valid.copy()
    for head in range(count):
        if heads is not None and head not in heads:
            continue
        forced = np.zeros((queries, keys), dtype=bool)
        for query, key in np.ndindex(queries, keys):
            if valid[head, query, key]:
                first = key_place[key] < keep_first
                forced[query, key] = first or (keep_self and key == own_key[query])
        mask[head] = RULES[rule](
            Head(scores[head], valid[head], query_valid, forced, key_place, query_place), **settings
        )
    return mask


# From scores to outputs


def scores_of(q, k, bias=None, scale=None, softcap=None):
    """Final scores `[H, Q, K]` of `[H, Q, D]` queries and `[Hkv, K, D]` keys."""
    count, queries, width = q.shape
    keys = k.shape[1]
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    scores = np.empty((count, queries, keys))
    for head, query, key in np.ndindex(count, queries, keys):
        value = float(np.dot(q[head, query], k[head * len(k) // count, key])) * scale
        if softcap is not None:
            value = softcap * math.tanh(value / softcap)
        scores[head, query, key] = value + (0.0 if bias is None else bias[head, query, key])
    return scores


def softmax(scores, sink=None):
    top = max([*scores] if sink is None else [*scores, sink])
    total = sum(math.exp(score - top) for score in scores) + (0.0 if sink is None else math.exp(sink - top))
    return [math.exp(score - top) / total for score in scores]


def entropy_of(weights):
    return -sum(weight * math.log(weight) for weight in weights if weight > 0.0)


def tempered(scores, target):
    """The softmax of beta * scores with the entropy wanted, by bisection over log beta."""
    low, high = 0.0, 20 * math.log(2)

    def weights(exponent):
        return softmax([math.exp(exponent) * (score - max(scores)) for score in scores])

    if entropy_of(weights(low)) <= target:
        return weights(low)
    if entropy_of(weights(high)) >= target:
        return weights(high)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_of(weights(middle)) > target else (low, middle)
    return weights((low + high) / 2)


def simplex_projection(scores, alpha):
    """Alpha-entmax (2: sparsemax): max(0, (alpha - 1) * s - t) ** (1 / (alpha - 1)), t so that it sums to one."""
    scaled = [(alpha - 1) * score for score in scores]
    low, high = max(scaled) - 1.0, max(scaled)
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(max(0.0, value - middle) ** (1 / (alpha - 1)) for value in scaled)
        low, high = (middle, high) if total > 1.0 else (low, middle)
    return [max(0.0, value - low) ** (1 / (alpha - 1)) for value in scaled]


def weights_of(scores, mask, sinks=None, normalize=None):
    """Attention weights `[H, Q, K]` over the surviving scores of each row; empty rows are zero."""
    weights = np.zeros(scores.shape)
    for head, query in np.ndindex(*scores.shape[:2]):
        alive = [key for key in range(scores.shape[2]) if mask[head, query, key]]
        if not alive:
            continue
        row = [scores[head, query, key] for key in alive]
        if normalize is not None:
            weights[head, query, alive] = normalize(row)
        else:
            weights[head, query, alive] = softmax(row, None if sinks is None else sinks[head])
    return weights


def normalizer(rule, *, sparsity=None, entropy=None):
    """The function of one row's valid scores that takes the place of the softmax."""
    if rule != "temperature":
        return lambda row: simplex_projection(row, 2.0 if rule == "sparsemax" else 1.5)

    def temper(row):
        target = entropy
        if target is None:
            keys = dict(enumerate(row))
            kept = best(keys, max(kept_of(len(row), sparsity), 1))
            target = entropy_of(softmax([keys[key] for key in sorted(kept)]))
        return tempered(row, target)

    return temper


def outputs_of(weights, v):
    """`[H, Q, Dv]` from weights and `[Hkv, K, Dv]` values."""
    count, queries, keys = weights.shape
    out = np.zeros((count, queries, v.shape[2]))
    for head, query, key in np.ndindex(count, queries, keys):
        out[head, query] += weights[head, query, key] * v[head * len(v) // count, key]
    return out
