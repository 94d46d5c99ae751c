"""The median stopping rule gives up what Optuna's pruner does, and knows it beforehand."""

from __future__ import annotations

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crisp_attention.experiment.results.pruning import STARTUP_TRIALS, exceeded, limits

LOSS = st.floats(0.0, 4.0)
EPOCHS = 3


def trained(losses, state=optuna.trial.TrialState.COMPLETE):
    return optuna.trial.create_trial(
        state=state,
        value=losses[-1] if state.is_finished() else None,
        intermediate_values=dict(enumerate(losses, start=1)),
    )


@given(
    earlier=st.lists(st.lists(LOSS, min_size=EPOCHS, max_size=EPOCHS), max_size=9),
    losses=st.lists(LOSS, min_size=1, max_size=EPOCHS - 1),
)
def test_it_decides_as_optunas_median_pruner(earlier, losses):
    study = optuna.create_study()
    study.add_trials([trained(item) for item in earlier])
    pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
    theirs = pruner.prune(study, trained(losses, optuna.trial.TrialState.RUNNING))
    assert exceeded(losses, limits(earlier, EPOCHS)) == theirs


def test_after_the_last_epoch_nothing_is_given_up():
    earlier = [[0.1] * EPOCHS] * STARTUP_TRIALS
    assert limits(earlier, EPOCHS) == pytest.approx((0.1, 0.1))
    assert exceeded([9.0], limits(earlier, EPOCHS))
    assert not exceeded([9.0] * EPOCHS, limits(earlier, EPOCHS))
    assert limits([[0.1]] * STARTUP_TRIALS, 1) == ()
