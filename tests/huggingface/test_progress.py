"""Schedules of a model in a training loop of one's own, and what a model in mid-schedule carries along."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import crisp_attention as crisp
from crisp_attention.backends import Detail
from crisp_attention.state import layers

LINEAR = {"kind": "linear"}


def batch(count=4, length=20):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 20, (count, length), generator=draw)
    return {"input_ids": ids, "labels": torch.arange(count) % 2}


def realised(model):
    """Share of pairs that a forward pass in the model's own mode removes."""
    with crisp.monitor(model) as watcher, torch.no_grad():
        model(**batch())
    return watcher.mean(training=model.training)


def test_a_schedule_that_nobody_drives_is_refused_in_training(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)
    bert.train()
    with pytest.raises(crisp.ConfigurationError, match=r"SparsityCallback\(\).*or call crisp_attention.set_progress"):
        bert(**batch())
    with crisp.dense(bert):
        bert(**batch())  # no sparsity, no question
    bert.eval()
    assert realised(bert) == pytest.approx(0.8)  # before training, evaluation stands at the end
    crisp.set_progress(bert.train(), 0.0)
    bert(**batch())


def test_a_schedule_of_evaluation_alone_needs_no_driver(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR, apply="eval")
    bert.train()(**batch())
    assert realised(bert.eval()) == pytest.approx(0.8)


def test_a_training_loop_of_ones_own(bert):
    """As the README has it."""
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear", "end": 0.5})
    optimizer = torch.optim.SGD(bert.parameters(), lr=0.1)
    bert.train()
    steps, seen = 8, []
    for step in range(steps):
        crisp.set_progress(bert, step / steps)
        with crisp.monitor(bert) as watcher:
            bert(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(watcher.mean(training=True))
    crisp.set_progress(bert, 1.0)
    assert seen == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    assert realised(bert.eval()) == pytest.approx(0.8)


def test_progress_is_set_from_outside_alone(bert):
    """However many forwards run, in whatever order shares come: sparsity is that of the share."""
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)
    bert.train()
    for progress, expected in ((0.5, 0.4), (0.25, 0.2), (1.0, 0.8), (0.5, 0.4)):
        crisp.set_progress(bert, progress)
        assert [realised(bert), realised(bert)] == pytest.approx([expected] * 2)


@pytest.mark.parametrize("progress", [7, -0.01, "half"])
def test_a_progress_that_is_no_share_changes_nothing(bert, progress):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)
    crisp.set_progress(bert, 0.5)
    with pytest.raises(crisp.ConfigurationError, match="progress"):
        crisp.set_progress(bert, progress)
    assert realised(bert) == pytest.approx(0.4)


def test_layers_ramp_one_after_the_other(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear", "end": 0.5, "stagger": 0.5})
    for progress, expected in ((0.25, [0.4, 0.0]), (0.5, [0.8, 0.0]), (0.75, [0.8, 0.4]), (1.0, [0.8, 0.8])):
        crisp.set_progress(bert, progress)
        with crisp.monitor(bert) as watcher, torch.no_grad():
            bert(**batch())
        assert list(watcher.realised(training=False).values()) == pytest.approx(expected)


def test_each_layer_ramps_to_a_sparsity_of_its_own(bert):
    crisp.sparsify(bert, layer_sparsity=[0.4, 0.8], schedule=LINEAR)
    crisp.set_progress(bert, 0.5)
    with crisp.monitor(bert) as watcher, torch.no_grad():
        bert(**batch())
    assert list(watcher.realised(training=False).values()) == pytest.approx([0.2, 0.4])


@pytest.mark.parametrize(
    "rule", ["topk", "percentile", "random", "window", "nm", "block_topk", "bottomk", "temperature"]
)
def test_at_sparsity_zero_every_rule_is_dense(bert, rule):
    expected = bert(**batch()).logits
    crisp.sparsify(bert, sparsity=0.5, rule=rule, schedule=LINEAR)
    crisp.set_progress(bert, 0.0)
    torch.testing.assert_close(bert(**batch()).logits, expected, atol=1e-5, rtol=0)
    crisp.set_progress(bert, 1.0)
    assert not torch.allclose(bert(**batch()).logits, expected, atol=1e-5)


def test_anneal_ends_exactly_dense(bert):
    expected = bert(**batch()).logits
    crisp.sparsify(bert, sparsity=0.5, schedule={"kind": "anneal"})
    crisp.set_progress(bert, 1.0)
    assert realised(bert) == 0.0
    torch.testing.assert_close(bert(**batch()).logits, expected, atol=1e-5, rtol=0)


def test_stochastic_draws_in_training_and_stands_at_its_target_in_evaluation(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "stochastic", "low": 0.1})
    drawn = set()
    for step in range(4):
        crisp.set_progress(bert, step / 4)
        assert realised(bert.eval()) == pytest.approx(0.8)
        drawn.add(realised(bert.train()))
    assert len(drawn) > 2
    assert all(0.1 <= share <= 0.8 for share in drawn)


def test_a_model_saved_in_mid_training_comes_back_as_sparse_as_it_was(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)
    crisp.set_progress(bert, 0.5)
    expected = bert(**batch()).logits
    bert.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["crisp_attention"]
    assert saved["progress"] == 0.5
    assert saved["schedule"] == {"kind": "linear", "begin": 0.0, "end": 1.0, "initial": 0.0, "stagger": 0.0}
    loaded = crisp.load(AutoModelForSequenceClassification, tmp_path)
    assert realised(loaded) == pytest.approx(0.4)
    assert torch.equal(loaded(**batch()).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["crisp_attention"] == saved


def test_a_model_saved_before_training_has_no_progress(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR).save_pretrained(tmp_path)
    assert "progress" not in json.loads((tmp_path / "config.json").read_text())["crisp_attention"]
    loaded = crisp.load(AutoModelForSequenceClassification, tmp_path).train()
    with pytest.raises(crisp.ConfigurationError, match="nothing tells it how far training has come"):
        loaded(**batch())


def test_plain_from_pretrained_of_a_schedule_says_how_to_load_it(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)
    crisp.set_progress(bert, 0.5)
    bert.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(crisp.ConfigurationError, match=r"follow training, which .* only after crisp_attention.load"):
        loaded(**batch())
    # A verb that needs the layers attaches them where they stood, as `load` does.
    assert realised(loaded) == pytest.approx(0.4)
    torch.testing.assert_close(loaded(**batch()).logits, bert(**batch()).logits)


def test_a_damaged_progress_is_refused(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    content["crisp_attention"]["progress"] = 30
    file.write_text(json.dumps(content))
    with pytest.raises(crisp.ConfigurationError, match="progress must be a share"):
        crisp.load(AutoModelForSequenceClassification, tmp_path)


def test_sparsify_again_begins_another_schedule(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)
    crisp.set_progress(bert, 0.5)
    crisp.sparsify(bert, sparsity=0.6, schedule=LINEAR)
    assert "progress" not in bert.config.crisp_attention
    with pytest.raises(crisp.ConfigurationError, match="nothing tells it"):
        bert.train()(**batch())
    crisp.sparsify(bert, sparsity=0.6)
    crisp.set_progress(bert, 0.5)  # nothing to follow
    assert realised(bert) == pytest.approx(0.6)
    assert "progress" not in bert.config.crisp_attention


def test_a_failed_sparsify_leaves_the_schedule_where_it_stood(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)
    crisp.set_progress(bert, 0.5)
    with pytest.raises(crisp.ConfigurationError, match="2 attention layers"):
        crisp.sparsify(bert, sparsity=0.5, layers=[7])
    assert realised(bert) == pytest.approx(0.4)
    assert bert.config.crisp_attention["progress"] == 0.5


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_in_mid_schedule_stand_where_the_original_does_and_go_their_own_way(bert, how):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)
    crisp.set_progress(bert, 0.5)
    twin = how(bert)
    assert realised(twin) == realised(bert) == pytest.approx(0.4)
    crisp.set_progress(twin, 1.0)
    assert realised(bert) == pytest.approx(0.4)
    assert realised(twin) == pytest.approx(0.8)
    assert bert.config.crisp_attention["progress"] == 0.5


def test_dense_within_a_schedule(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)
    with crisp.dense(bert):
        crisp.set_progress(bert, 0.5)
        assert realised(bert) == 0.0
    assert realised(bert) == pytest.approx(0.4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"schedule": LINEAR}, {"rule": "random", "schedule": {"kind": "stochastic"}}],
    ids=["linear", "stochastic random"],
)
def test_gradient_checkpointing_recomputes_at_the_same_sparsity(bert, settings, reentrant):
    """Several steps of a schedule: gradients are those without checkpointing."""
    initial = copy.deepcopy(bert.state_dict())
    runs = []
    for checkpointing in (False, True):
        bert.load_state_dict(initial)
        crisp.sparsify(bert, sparsity=0.8, **settings)
        if checkpointing:
            bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(bert.parameters(), lr=0.1)
        bert.train()
        torch.manual_seed(1)
        seen, gradients = [], []
        for step in range(3):
            crisp.set_progress(bert, step / 3)
            with crisp.monitor(bert) as watcher:
                bert(**batch()).loss.backward()
            seen.append(watcher.mean(training=True))
            gradients.append(bert.bert.encoder.layer[0].attention.self.query.weight.grad.clone())
            optimizer.step()
            optimizer.zero_grad()
        runs.append((seen, gradients))
    assert runs[0][0] == runs[1][0]
    assert len(set(runs[0][0])) > 1
    for plain, recomputed in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(recomputed, plain)
        assert plain.abs().max() > 0


def test_realised_sparsity_counts_a_checkpointed_forward_and_its_recomputation_alike(bert):
    layer = next(iter(layers(crisp.sparsify(bert, sparsity=0.8, schedule=LINEAR)).values()))
    seen = []

    class Watcher:
        detail = Detail.OUTPUT

        def record(self, name, training, out):
            seen.append((name, float(layer.sparsity(layer.active(True), True))))

    layer.model.monitors.append(Watcher())
    bert.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    crisp.set_progress(bert.train(), 0.5)
    bert(**batch()).loss.backward()
    assert len(seen) == 4  # two layers, each run twice
    assert {share for _, share in seen} == {0.4}


def test_a_checkpoint_remembers_its_progress_but_does_not_train_on_alone(bert, tmp_path):
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    crisp.set_progress(bert, 0.5)
    bert.save_pretrained(tmp_path)
    loaded = crisp.load(type(bert), tmp_path)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad(), crisp.monitor(loaded) as monitor:
        loaded.eval()(input_ids=ids)
    assert monitor.mean(training=False) == pytest.approx(0.4, abs=0.05)
    with pytest.raises(crisp.ConfigurationError, match="nothing tells it how far training has come"):
        loaded.train()(input_ids=ids)
    crisp.set_progress(loaded, 0.5)
    loaded(input_ids=ids)


def test_a_copy_waits_for_a_driver_of_its_own(bert):
    crisp.sparsify(bert, sparsity=0.8, schedule={"kind": "linear"})
    crisp.set_progress(bert, 0.5)
    twin = copy.deepcopy(bert).train()
    with pytest.raises(crisp.ConfigurationError, match="nothing tells it how far training has come"):
        twin(input_ids=torch.arange(5, 15)[None])
