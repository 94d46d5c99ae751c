"""Training that is resumed from a checkpoint."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import TrainerCallback

import crisp_attention as crisp
from small_trainings import CUBIC, logged, rows, shared, trainer

pytestmark = pytest.mark.slow

STUDIES = {
    "cubic": {"sparsity": 0.8, "schedule": CUBIC},
    "stochastic, random": {"sparsity": 0.8, "rule": "random", "schedule": {"kind": "stochastic", "low": 0.2}},
}


def test_resuming_with_other_settings_warns(bert, tmp_path):
    def start(sparsity):
        model = crisp.sparsify(copy.deepcopy(bert), sparsity=sparsity)
        how = {"steps": 4, "examples": rows(24), "save_steps": 2, "save_strategy": "steps"}
        return trainer(model, tmp_path, callbacks=[crisp.SparsityCallback(tolerance=None)], **how)

    start(0.8).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match=r"resumed at step 2 with other sparsity settings.*0\.8.*then.*0\.2.*now"):
        start(0.2).train(resume_from_checkpoint=checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other sparsity settings")
        start(0.8).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("study", STUDIES)
def test_a_resumed_training_is_the_uninterrupted_one(bert, tmp_path, study):
    """Eight steps, or four, a checkpoint, and four in a new process's place: weights equal to the last bit."""
    ended = {}
    fresh = copy.deepcopy(bert)

    class Interrupted(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def start(folder, *others):
        torch.manual_seed(0)
        model = crisp.sparsify(copy.deepcopy(fresh), **STUDIES[study])
        return trainer(
            model, folder, steps=8, callbacks=[crisp.SparsityCallback(), *others], examples=rows(48), save_steps=4,
            save_strategy="steps", gradient_accumulation_steps=2, learning_rate=1e-3,
        )  # fmt: skip

    whole = start(tmp_path / "whole")
    whole.train()
    start(tmp_path / "parts", Interrupted()).train()
    resumed = start(tmp_path / "parts")
    torch.rand(7)  # a new process stands elsewhere in the global stream
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    for key in ("loss", "requested_sparsity", "realised_sparsity", "attention_entropy"):
        assert logged(resumed, key) == logged(whole, key)
        assert len(logged(whole, key)) == 8
    ended = [run.model.state_dict() for run in (whole, resumed)]
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])
    assert shared(resumed.model).forward_index == shared(whole.model).forward_index
