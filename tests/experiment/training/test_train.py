from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import crisp_attention as crisp
import tiny_study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.specification.sections import TrainingSpec
from crisp_attention.experiment.training import model, train
from crisp_attention.experiment.training.ranks import Ranks
from crisp_attention.experiment.training.workbench import preflight, silence_training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tiny_folders, csv_file):
    """Specification, bench and planned runs."""
    spec = tiny_study.spec(tiny_folders["bert"], csv_file)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    silence_training()
    return tiny_study.bench_of(checkpoint, loaded), list(expand(spec, tiny_study.prints_of(checkpoint, loaded)))


def find(runs, arm, index=0):
    return next(run for run in runs if run.arm == arm and run.index == index)


def run(bench, planned):
    progress = []
    record, outputs = train.run(planned, bench, progress.append)
    return record, outputs, progress


@pytest.mark.parametrize("arm", ["dense", "percentile-80", "random-50-train"])
def test_the_same_run_twice_gives_the_same_record(workplace, arm):
    bench, runs = workplace
    first, first_outputs, _ = run(bench, find(runs, arm))
    second, second_outputs, _ = run(bench, find(runs, arm))
    assert first.model_dump(exclude={"timing"}) == second.model_dump(exclude={"timing"})
    for name, array in first_outputs.items():
        np.testing.assert_array_equal(array, second_outputs[name])


def test_a_record_says_what_happened(workplace):
    bench, runs = workplace
    record, outputs, progress = run(bench, find(runs, "percentile-80"))
    assert record.status == "finished"
    assert [epoch.epoch for epoch in record.epochs] == [1, 2]
    final = record.final
    hits = outputs["test_logits"].argmax(1) == outputs["test_labels"]
    assert final.test.correct == hits.sum()
    assert final.test.total == 24
    assert final.train.total == 16
    np.testing.assert_array_equal(outputs["test_labels"], bench.data.test.labels)
    exponent = np.exp(outputs["test_logits"].astype(float))
    likelihood = (exponent / exponent.sum(1, keepdims=True))[np.arange(24), outputs["test_labels"]]
    assert final.test.loss == pytest.approx(-np.log(likelihood).mean(), rel=1e-9)
    for mode in (record.realised_sparsity.train, record.realised_sparsity.test):
        assert list(mode) == ["bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"]
        assert all(0.7 < share < 0.82 for share in mode.values())
    assert progress[-1].step == progress[-1].steps == 24
    assert record.provenance.weights_fingerprint == bench.checkpoint.fingerprint
    assert record.provenance.packages["torch"]
    assert record.timing.train_seconds < record.timing.seconds


def test_sparse_in_training_only_is_dense_in_evaluation(workplace):
    bench, runs = workplace
    record, _, _ = run(bench, find(runs, "random-50-train"))
    assert all(0.4 < share < 0.6 for share in record.realised_sparsity.train.values())
    assert all(share == 0 for share in record.realised_sparsity.test.values())


@pytest.mark.parametrize("arm", ["dense", "percentile-80"])
def test_fine_tuning_learns(tiny_folders, csv_file, arm):
    """The made-up classes follow from one word: a model that trains tells them apart."""
    spec = tiny_study.spec(tiny_folders["bert"], csv_file, epochs=12, learning_rate=2e-3)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    runs = list(expand(spec, tiny_study.prints_of(checkpoint, loaded)))
    record, _, _ = run(tiny_study.bench_of(checkpoint, loaded), find(runs, arm))
    assert record.epochs[-1].running_loss < 0.5 * record.epochs[0].running_loss
    assert record.final.train.accuracy == 1.0
    assert record.final.test.accuracy > 0.9


def test_arms_share_weights_order_and_dropout_per_seed(workplace, monkeypatch):
    """Recorded at the first attention call: initial weights, batch and dropout state are the same in every arm."""
    import torch

    from crisp_attention import state

    bench, runs = workplace
    seen = {}
    original = state.attend

    for planned in (find(runs, "dense"), find(runs, "percentile-80"), find(runs, "random-50-train")):
        calls = seen.setdefault(planned.arm, [])

        def spy(q, k, v, calls=calls, **arguments):
            if arguments["training"] and len(calls) < 40:
                calls.append((q.shape, torch.random.get_rng_state().sum().item()))
            if len(calls) == 1:
                calls.append(q.sum().item())
            return original(q, k, v, **arguments)

        monkeypatch.setattr(state, "attend", spy)
        run(bench, planned)
    dense = seen.pop("dense")
    assert len(dense) > 30
    for calls in seen.values():
        assert calls == dense


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_checkpoint_of_another_kind_of_task_is_trained_for_this_one(tiny_folders, csv_file, tmp_path, kind):
    folder = shutil.copytree(tiny_folders["bert"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": kind}), encoding="utf-8")
    spec = tiny_study.spec(folder, csv_file, seeds=1)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    bench = tiny_study.bench_of(checkpoint, loaded)
    record, _, _ = run(bench, find(list(expand(spec, tiny_study.prints_of(checkpoint, loaded))), "dense"))
    assert record.status == "finished"


def test_a_run_takes_one_device_whatever_the_machine_has(tmp_path, monkeypatch):
    """The Trainer would spread a batch over several GPUs, or choose a device that lacks float64."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    found = train._arguments(TrainingSpec(), 0, str(tmp_path), {}, Ranks())
    assert found.__dict__["_n_gpu"] == 1
    assert found.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_another_seed_is_another_run(workplace):
    bench, runs = workplace
    first, second = (run(bench, find(runs, "dense", index))[1] for index in (0, 1))
    assert not np.array_equal(first["test_logits"], second["test_logits"])


def test_divergence_is_recorded_not_raised(tiny_folders, csv_file):
    spec = tiny_study.spec(tiny_folders["bert"], csv_file, learning_rate=1e30)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    planned = next(expand(spec, tiny_study.prints_of(checkpoint, loaded)))
    record, outputs, _ = run(tiny_study.bench_of(checkpoint, loaded), planned)
    assert record.status == "diverged"
    assert "not finite at step" in record.reason
    assert outputs is None


def test_preflight_refuses_a_model_that_would_not_be_touched(tmp_path, tokenizer_folder, csv_file):
    import shutil

    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=30
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path)
    spec = tiny_study.spec(tmp_path, csv_file)
    with pytest.raises(crisp.UnsupportedModelError, match="never calls"):
        preflight(model.resolve(str(tmp_path)), dataset.load_experiment(spec), spec)


def test_a_trial_is_given_up_after_the_epoch_whose_limit_it_exceeds(workplace):
    bench, runs = workplace
    planned = find(runs, "percentile-80")
    whole, _, _ = run(bench, planned)
    first = whole.epochs[0].test.loss
    record, outputs = train.run(planned, bench, lambda _: None, limits=(first - 1e-6,))
    assert (record.status, outputs) == ("pruned", None)
    assert record.epochs == whole.epochs[:1]
    assert record.reason.startswith(f"after epoch 1 its loss was {first:.4f} at best, the median of the trials before")
    # What does not exceed it is trained to its end, to the same.
    record, _ = train.run(planned, bench, lambda _: None, limits=(first,))
    assert record.model_dump(exclude={"timing"}) == whole.model_dump(exclude={"timing"})


def test_a_model_that_is_kept_is_the_one_that_was_evaluated(workplace, tmp_path):
    bench, runs = workplace
    planned = find(runs, "percentile-80")
    record, outputs = train.run(planned, bench, lambda _: None, keep=tmp_path / "models" / "kept")
    kept = crisp.load(AutoModelForSequenceClassification, tmp_path / "models" / "kept").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models" / "kept")
    assert record.config["attention"]["rule"] == kept.config.crisp_attention["rule"] == "percentile"
    assert list(kept.config.id2label.values()) == list(record.classes)
    texts = list(bench.data.test.texts)
    with torch.no_grad():
        logits = kept(**tokenizer(texts, return_tensors="pt", padding=True, truncation=True)).logits
    np.testing.assert_allclose(logits.numpy(), outputs["test_logits"], atol=1e-5)


def test_texts_that_are_cut_are_counted(workplace):
    bench, _ = workplace
    split = bench.data.test
    tokens = [len(ids) for ids in bench.processor(list(split.texts))["input_ids"]]
    for most in (5, 12, 100):
        assert bench.cut(split, most) == sum(count > most for count in tokens)
