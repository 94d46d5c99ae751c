"""Whole studies of every kind of data: pairs of texts, images, conditions with further evaluations."""

from __future__ import annotations

import contextlib
import random
import tomllib

import numpy as np
import pytest

import tiny_study
from crisp_attention.experiment import study
from crisp_attention.experiment.data import dataset, images
from crisp_attention.experiment.execution import local
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import Fingerprints, expand
from crisp_attention.experiment.specification.spec import parse
from crisp_attention.experiment.training import model, train
from crisp_attention.experiment.training.workbench import Workbench, preflight, silence_training
from data_files import write
from record_builders import make_spec
from small_models import WORDS

pytestmark = pytest.mark.slow


def trained(spec, *arms):
    """Record and outputs of the first seed of some arms."""
    silence_training()
    checkpoint, found = model.resolve(spec.model), dataset.load_experiment(spec)
    preflight(checkpoint, found, spec)
    bench = Workbench(checkpoint, found)
    runs = {run.arm: run for run in expand(spec, Fingerprints(checkpoint.fingerprint, *found.prints()))}
    return {arm: train.run(runs[arm], bench, lambda _: None) for arm in arms}


def test_pairs_of_texts_whose_class_the_second_text_decides(tiny_folders, tmp_path):
    """As in MRPC: two columns. The first text is noise, so that only a model that reads both can learn."""
    draw = random.Random(0)
    rows = []
    for number in range(200):
        first, second = (draw.choices(WORDS[:8], k=draw.randint(3, 9)) for _ in range(2))
        second.insert(draw.randrange(len(second)), draw.choice(WORDS[8:10] if number % 2 else WORDS[10:13]))
        first.insert(0, draw.choice(WORDS[8:13]))
        rows.append((" ".join(first), " ".join(second), number % 2))
    file = write(tmp_path, "pairs.csv", rows, ("sentence1", "sentence2", "label"))
    spec = make_spec(
        model=str(tiny_folders["bert"]),
        data={"source": file},
        seeds=1,
        training={"epochs": 14, "batch_size": 8, "learning_rate": 3e-3},
        evaluations=[{"name": "typos", "typos": 0.3}],
    )
    record, outputs = trained(spec, "topk-50")["topk-50"]
    assert record.final.test.accuracy > 0.85
    assert record.final.train.accuracy > 0.95
    assert record.evaluations["typos"].accuracy < record.final.test.accuracy
    assert all(0.4 < share < 0.6 for share in record.realised_sparsity.test.values())
    assert {"maps", "typos_logits"} <= set(outputs)


def test_a_folder_of_images_and_a_model_from_scratch(tmp_path):
    contents, labels = images.digits()
    chosen = [(content, label) for content, label in zip(contents, labels, strict=True) if label in "01"]
    for number, (content, label) in enumerate(chosen[:200]):
        place = tmp_path / ("test" if number % 4 == 0 else "train") / label
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.ppm").write_bytes(content)
    spec = make_spec(
        model="tiny-vit",
        data={"source": str(tmp_path)},
        seeds=1,
        training={"epochs": 4, "batch_size": 16, "learning_rate": 2e-3},
    )
    runs = trained(spec, "dense", "topk-50")
    for record, outputs in runs.values():
        assert record.status == "finished"
        assert record.final.test.accuracy > 0.9
        assert record.final.test.total == 50
        assert set(outputs) == {"test_logits", "test_labels", "test_lengths", "train_logits", "train_labels"}
    # 17 tokens, 16 patches and the classifier's, of which topk keeps 9.
    sparse = runs["topk-50"][0].realised_sparsity
    assert list(sparse.test.values()) == pytest.approx([8 / 17] * 3)
    assert set(runs["dense"][0].realised_sparsity.train.values()) == {0.0}


class Silent:
    """A display that shows nothing."""

    def announce(self, message):
        pass

    @contextlib.contextmanager
    def training(self, plan):
        yield lambda planned, event: None


def test_workers_train_each_condition_on_its_own_data(tiny_folders, csv_file, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "available_cores", lambda: 1)  # one thread: tiny models gain nothing from more
    text = tiny_study.toml(tiny_folders["bert"], csv_file, seeds=1, epochs=1).replace("train_examples = 96\n", "")
    text += '[[evaluations]]\nname = "typos"\ntypos = 0.1\n[vary]\nlabel_noise = [0.0, 0.4]\n'
    text = text.replace('arm = "percentile-80"', 'arm = "percentile-80"\ncondition = "label_noise=0"')
    spec = parse(tomllib.loads(text), "tiny")
    folder = tmp_path / "out"
    plan = study.prepare(spec, folder, Silent())
    study.carry_out(plan, Silent())
    store = Store(folder)
    again, runs, _ = store.study()
    assert again == spec
    labels = {}
    for run in runs:
        record = store.load(run.config.run_id)
        arrays = store.load_arrays(record)
        assert record.status == "finished"
        assert record.provenance.data_fingerprint == plan.prints.data[run.condition] == run.config.data
        assert ("replaced by another class on purpose" in " ".join(record.provenance.data_notes)) == (
            run.condition == "label_noise=0.4"
        )
        assert record.evaluations["typos"].total == 24
        labels.setdefault(run.condition, arrays["train_labels"])
        assert np.array_equal(labels[run.condition], arrays["train_labels"])
        assert np.array_equal(arrays["test_labels"], plan.data.test.labels)
    assert len(runs) == 2 * 4
    assert not np.array_equal(labels["label_noise=0"], labels["label_noise=0.4"])
    assert study.prepare(spec, folder, Silent()).pending == ()
