"""What models make of training examples that are labelled wrongly on purpose: do they learn the label or the class?"""

from __future__ import annotations

import numpy as np
from published import analysis_of
from tables import RESULTS, markdown

from crisp_attention.experiment import statistics
from crisp_attention.experiment.conclusions.analysis import Analysis, ArmResult
from crisp_attention.experiment.report.tables import p, signed
from crisp_attention.experiment.results.store import Store


def wrong_labels(study: str) -> str:
    """A row an arm: how it classifies the wrongly labelled examples of the training probe, in the primary condition.

    As they are labelled, or as they truly are; p by the sign-flip test over seeds.
    """
    analysis = analysis_of(study)
    store = Store(RESULTS / study)
    true = _true_labels(analysis, store)
    baseline = analysis.spec.primary.baseline
    found = {arm.name: _shares(arm, store, true) for arm in analysis.arms}
    wrong, expected = found[baseline]
    rows = []
    for name, (_, shares) in found.items():
        cells = [name, str(len(shares[0]))]
        for own, other in zip(shares, expected, strict=True):
            cells.append(f"{own.mean():.1f}")
            if name == baseline:
                cells += ["", ""]
                continue
            difference = own - other
            p_value = statistics.sign_flip_p(difference[None], np.random.default_rng(0))[0]
            cells += [signed(float(difference.mean())), p(float(p_value))]
        rows.append(cells)
    header = ["arm", "seeds"]
    for share in ("as labelled, %", "as they are, %"):
        header += [share, "difference, points", "p"]
    return f"{markdown(header, rows)}\n\nOf the {len(true)} examples of the probe {wrong} are labelled wrongly."


def _true_labels(analysis: Analysis, store: Store) -> statistics.Array:
    """Of the probe's examples, which are the same in all conditions: as the condition without noise has them."""
    assert analysis.spec.vary is not None
    clean = dict(zip(analysis.spec.vary.values, analysis.by_condition.values(), strict=True))[0.0]
    return store.load_arrays(next(iter(clean[0].records.values())))["train_labels"]


def _shares(arm: ArmResult, store: Store, true: statistics.Array) -> tuple[int, list[statistics.Array]]:
    """How many labels are wrong; and of these, by seed, how many are predicted, how many true classes are, %."""
    shares = []
    for index in arm.indexes:
        arrays = store.load_arrays(arm.records[index])
        labels, predicted = arrays["train_labels"], arrays["train_logits"].argmax(axis=1)
        wrong = labels != true
        shares.append([100 * (predicted == asked)[wrong].mean() for asked in (labels, true)])
    return int(wrong.sum()), list(np.array(shares).T)
