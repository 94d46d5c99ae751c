from __future__ import annotations

import gc
import json
import warnings

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

import crisp_attention as crisp
from crisp_attention.huggingface import callback as callback_module
from small_trainings import CUBIC, Spy, logged, now, rows, shared, trainer


def test_logs_requested_and_realised_sparsity_and_entropy(bert, tmp_path):
    run = trainer(crisp.sparsify(bert, sparsity=0.5), tmp_path, gradient_accumulation_steps=2)
    run.train()
    assert logged(run, "requested_sparsity") == pytest.approx([0.5] * 4)
    assert logged(run, "realised_sparsity") == pytest.approx([0.5] * 4, abs=0.01)
    # Six of twelve keys survive: less than log(6), more than a single key.
    assert all(1.0 < entropy < 1.7918 for entropy in logged(run, "attention_entropy"))


def test_what_is_logged_reaches_the_callbacks_that_report(bert, tmp_path):
    """Those come before the user's own in the Trainer's list, as the one given first does here."""
    spy = Spy()
    run = trainer(crisp.sparsify(bert, sparsity=0.5), tmp_path, callbacks=[spy, crisp.SparsityCallback()])
    run.train()
    for log in spy.logs[:-1]:
        assert {"loss", "requested_sparsity", "realised_sparsity", "attention_entropy"} <= log.keys()
    assert "realised_sparsity" not in spy.logs[-1]  # the Trainer's summary
    assert len(spy.logs) == 5
    assert len(run.callback_handler.callbacks) == len(set(map(id, run.callback_handler.callbacks)))


def test_requested_and_realised_speak_of_the_same_pairs(bert, tmp_path):
    """Dense layers and heads count in neither, so that both are what the settings say."""
    crisp.sparsify(bert, sparsity=0.5, layers=[1], heads=[0, 3])
    run = trainer(bert, tmp_path)
    with crisp.monitor(bert) as watcher:
        run.train()
    assert logged(run, "requested_sparsity") == pytest.approx([0.5] * 4)
    assert logged(run, "realised_sparsity") == pytest.approx([0.5] * 4, abs=0.01)
    assert watcher.mean(training=True) == pytest.approx(0.5 / 4, abs=0.01)  # over all pairs of the model


def test_realised_sparsity_is_weighted_by_pairs_over_accumulated_batches(bert, tmp_path):
    """A step of one batch of long and one of short sentences is one share over all of its pairs."""
    crisp.sparsify(bert, sparsity=0.9, min_keep=2)
    examples = rows(4, 40) + rows(4, 4)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    run = trainer(
        bert, tmp_path, steps=1, examples=examples, kind=InOrder, gradient_accumulation_steps=2,
        callbacks=[crisp.SparsityCallback(tolerance=None)],
    )  # fmt: skip
    run.train()
    kept = 4 * 40 * 4 + 4 * 4 * 2  # of forty keys four survive, of four keys min_keep=2
    assert logged(run, "realised_sparsity") == pytest.approx([1 - kept / (4 * 40**2 + 4 * 4**2)], abs=1e-6)
    assert logged(run, "requested_sparsity") == pytest.approx([0.9])


@pytest.mark.parametrize(
    ("settings", "requested", "realised"),
    [
        ({"rule": "top_p", "p": 0.5}, None, (0.3, 0.8)),
        ({"rule": "entmax15"}, None, (0.0, 0.9)),
        ({"rule": "window", "window": 2}, None, (0.5, 0.7)),
        ({"rule": "temperature", "sparsity": 0.5}, None, (0.0, 1e-9)),
        ({"sparsity": 0.0}, 0.0, (0.0, 0.0)),
        ({"sparsity": 0.5, "apply": "eval"}, 0.0, (0.0, 0.0)),
    ],
)
def test_only_what_was_requested_is_compared(bert, tmp_path, settings, requested, realised):
    run = trainer(crisp.sparsify(bert, **settings), tmp_path, steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Up to step")
        run.train()
    assert logged(run, "requested_sparsity") == ([] if requested is None else [requested] * 2)
    assert all(realised[0] <= share <= realised[1] for share in logged(run, "realised_sparsity"))
    assert len(logged(run, "realised_sparsity")) == len(logged(run, "attention_entropy")) == 2


def test_the_schedule_follows_the_global_step(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.8, schedule=CUBIC)
    run = trainer(bert, tmp_path, steps=8, examples=rows(64, 40), gradient_accumulation_steps=2)
    run.train()
    expected = [crisp.Schedule(**CUBIC).sparsity(0.8, step / 8) for step in range(8)]
    assert logged(run, "requested_sparsity") == pytest.approx(expected)
    assert logged(run, "realised_sparsity") == pytest.approx(expected, abs=0.013)  # half a key of forty
    assert shared(bert).progress == 1.0
    assert bert.config.crisp_attention["progress"] == 1.0


def test_evaluation_within_a_step_is_not_counted(bert, tmp_path):
    """As of a teacher that shares the model: another length, another sparsity."""

    class Teaching(Trainer):
        def compute_loss(self, model, *arguments, **keywords):
            with torch.no_grad():
                model.eval()(input_ids=torch.full((4, 3), 7))
            return super().compute_loss(model.train(), *arguments, **keywords)

    run = trainer(crisp.sparsify(bert, sparsity=0.5), tmp_path, steps=2, kind=Teaching)
    run.train()
    assert logged(run, "realised_sparsity") == [0.5, 0.5]


def test_one_sparsity_per_optimizer_step(bert, tmp_path):
    """All forwards of a step see the same sparsity, that of the step: gradient accumulation changes nothing."""
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "stochastic"})
    seen = []

    class Noting(Trainer):
        def compute_loss(self, model, *arguments, **keywords):
            seen.append((self.state.global_step, now(model)[0]))
            return super().compute_loss(model, *arguments, **keywords)

    # Two and a half accumulated steps an epoch: the last one is short.
    trainer(bert, tmp_path, steps=6, examples=rows(20), kind=Noting, gradient_accumulation_steps=2).train()
    assert len(seen) == 10
    drawn = {step: crisp.Schedule("stochastic").sparsity(0.8, step / 6) for step in range(6)}
    assert seen == [(step, drawn[step]) for step, _ in seen]
    assert len(set(drawn.values())) == 6


def test_evaluation_and_checkpoints_stand_at_what_is_done(bert, tmp_path):
    spy = Spy()
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    run = trainer(
        bert, tmp_path, steps=4, callbacks=[crisp.SparsityCallback(), spy], eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    run.train()
    assert spy.seen["begin"] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert spy.seen["evaluate"] == spy.seen["save"] == [(2, 0.5), (4, 1.0)]
    for step, progress in ((2, 0.5), (4, 1.0)):
        saved = json.loads((tmp_path / f"checkpoint-{step}" / "config.json").read_text())["crisp_attention"]
        assert saved["progress"] == progress
        loaded = crisp.load(AutoModelForSequenceClassification, tmp_path / f"checkpoint-{step}")
        assert now(loaded, training=False) == [0.8 * progress] * 2
    # What was counted in training is not mixed with the evaluation.
    assert logged(run, "requested_sparsity") == pytest.approx([0.0, 0.2, 0.4, 0.6])


def test_epochs_give_the_number_of_steps(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    run = trainer(bert, tmp_path, steps=-1, examples=rows(12), num_train_epochs=2, logging_strategy="epoch")
    run.train()
    assert run.state.global_step == 6
    # Each log is the mean over its epoch; entropy is that of the epoch's last step alone.
    assert logged(run, "requested_sparsity") == pytest.approx([0.8 * 1 / 6, 0.8 * 4 / 6])
    assert len(logged(run, "attention_entropy")) == 2


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
        ({"logging_strategy": "epoch"}, [2, 4, 6]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_entropy_is_measured_in_the_step_before_a_log_alone(bert, tmp_path, monkeypatch, changes, steps):
    from crisp_attention.operator import AttentionOutput

    crisp.sparsify(bert, sparsity=0.5)
    measured = []

    class Noting(Trainer):
        def compute_loss(self, *arguments, **keywords):
            measured.append(0)
            return super().compute_loss(*arguments, **keywords)

    entropy = AttentionOutput.entropy.fget
    monkeypatch.setattr(
        AttentionOutput, "entropy", property(lambda out: (measured.__setitem__(-1, measured[-1] + 1), entropy(out))[1])
    )
    run = trainer(bert, tmp_path, steps=6, examples=rows(8), kind=Noting, **changes)
    run.train()
    assert measured == [2 if step in steps else 0 for step in range(1, 7)]  # two layers
    assert len(logged(run, "attention_entropy")) == len(steps)


def test_entropy_can_be_left_out(bert, tmp_path):
    run = trainer(crisp.sparsify(bert, sparsity=0.5), tmp_path, callbacks=[crisp.SparsityCallback(watch_entropy=False)])
    run.train()
    assert logged(run, "attention_entropy") == []
    assert len(logged(run, "realised_sparsity")) == 4


def test_stopping_early_stays_where_training_stopped(bert, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    trainer(bert, tmp_path, steps=10, callbacks=[crisp.SparsityCallback(), Stop()]).train()
    assert shared(bert).progress == 0.3
    assert now(bert, training=False) == pytest.approx([0.24] * 2)


def test_the_best_checkpoint_comes_back_as_sparse_as_it_was(bert, tmp_path):
    """Its weights were trained, and its score measured, at an earlier place of the schedule."""
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    scores = iter([0.5, 0.9, 0.1, 0.2])
    run = trainer(
        bert, tmp_path, steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    run.compute_metrics = lambda _: {"score": next(scores)}
    run.train()
    assert run.state.best_global_step == 2
    assert shared(bert).progress == 0.5


def test_ties_random_draws_to_the_global_step(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.5, rule="random")
    bert(input_ids=torch.arange(5, 15)[None])  # forwards outside of training count for nothing
    trainer(bert, tmp_path, steps=3, gradient_accumulation_steps=2).train()
    assert shared(bert).forward_index == 6  # two forwards a step


def test_nothing_goes_on_watching_after_training(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.5)
    run = trainer(bert, tmp_path)
    run.train()
    assert shared(bert).monitors == []
    run.evaluate()
    assert shared(bert).monitors == []


class Failing(Trainer):
    """Breaks off in the midst of its third step."""

    def training_step(self, *arguments, **keywords):
        loss = super().training_step(*arguments, **keywords)
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return loss


def interrupted(model, folder, callback):
    with pytest.raises(KeyboardInterrupt):
        trainer(model, folder, callbacks=[callback], kind=Failing, logging_steps=4).train()


def test_an_interrupted_training_leaves_no_monitor(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.5)
    interrupted(bert, tmp_path, crisp.SparsityCallback())
    gc.collect()
    assert shared(bert).monitors == []


def test_training_again_starts_afresh(bert, tmp_path):
    """With the same callback or another, whether the first training ended or was interrupted."""
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    kept, other = crisp.SparsityCallback(), crisp.SparsityCallback()
    with crisp.monitor(bert) as watcher:  # the user's own stays
        for callback in (kept, other, kept):
            interrupted(bert, tmp_path, callback)
            assert len(shared(bert).monitors) == 2
            run = trainer(bert, tmp_path, callbacks=[callback])
            run.train()
            assert logged(run, "requested_sparsity") == pytest.approx([0.0, 0.2, 0.4, 0.6])
            assert shared(bert).monitors == [watcher]


def test_two_callbacks_agree(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    run = trainer(bert, tmp_path, callbacks=[crisp.SparsityCallback(), crisp.SparsityCallback()])
    run.train()
    assert logged(run, "requested_sparsity") == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert shared(bert).monitors == []


def test_a_dense_model_is_refused_when_training_begins(bert, tmp_path):
    with pytest.raises(crisp.ConfigurationError, match=r"BertForSequenceClassification is not sparsified\. Call"):
        trainer(bert, tmp_path).train()


class Wrapped(torch.nn.Module):
    """What DDP, a compiler or PEFT do: hold the model as a submodule."""

    def __init__(self, *inside):
        super().__init__()
        self.inside = torch.nn.ModuleList(inside)

    def forward(self, **inputs):
        return self.inside[0](**inputs)


def test_models_within_others_are_found(bert, tiny_folders, tmp_path):
    second = AutoModelForSequenceClassification.from_pretrained(tiny_folders["distilbert"])
    for model in (bert, second):
        crisp.sparsify(model, sparsity=0.8, schedule={"kind": "linear"})
    wrapped = Wrapped(bert, torch.nn.Linear(2, 2), second)
    crisp.set_progress(wrapped, 0.25)
    assert now(bert) == now(second) == [0.2, 0.2]
    run = trainer(wrapped, tmp_path, remove_unused_columns=False)
    run.train()
    assert logged(run, "requested_sparsity") == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert now(bert, training=False) == now(second, training=False) == [0.8, 0.8]
    with pytest.raises(crisp.ConfigurationError, match="This Linear is not sparsified"):
        crisp.set_progress(torch.nn.Linear(2, 2), 0.25)


def test_without_a_handler_later_callbacks_and_the_history_still_get_the_values(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(callback_module.inspect, "currentframe", lambda: None)
    early, late = Spy(), Spy()
    run = trainer(crisp.sparsify(bert, sparsity=0.5), tmp_path, callbacks=[early, crisp.SparsityCallback(), late])
    run.train()
    assert "realised_sparsity" not in early.logs[0]
    assert "realised_sparsity" in late.logs[0]
    assert len(logged(run, "realised_sparsity")) == 4


def test_after_a_training_the_next_one_drives_the_schedule_or_is_refused(bert, tmp_path):
    """What has annealed to dense would train on dense in silence."""
    crisp.sparsify(bert, sparsity=0.5, schedule={"kind": "anneal"})
    trainer(bert, tmp_path).train()
    with pytest.raises(crisp.ConfigurationError, match="nothing tells it how far training has come"):
        bert.train()(torch.tensor([[5, 6, 7]]))
    bert.eval()(torch.tensor([[5, 6, 7]]))
    trainer(bert, tmp_path).train()
