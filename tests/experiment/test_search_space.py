"""What is searched for a model and data."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, GPT2ForSequenceClassification

from crisp_attention.errors import ConfigurationError, DataError
from crisp_attention.experiment import search_space
from crisp_attention.experiment.specification.tuned import searches
from crisp_attention.experiment.training import timing
from data_files import write
from small_models import WORDS, sentence_rows


def ask(model, data, **changes):
    return search_space.ask({"source": str(data), "max_length": 64, **changes}, str(model), {"epochs": 2})


def test_both_arms_are_tuned_alike_and_the_sparse_one_in_its_attention_too(tiny_folders, csv_file):
    question = ask(tiny_folders["bert"], csv_file)
    spec = question.spec
    assert [arm.name for arm in spec.arms] == ["dense", "dense-other-seeds", "sparse"]
    assert (spec.primary.arm, spec.primary.baseline, spec.training.epochs) == ("sparse", "dense", 2)
    dense, sparse = searches(spec)
    assert dense.arms == ("dense", "dense-other-seeds")
    common = ["learning_rate", "attention_dropout", "hidden_dropout"]
    assert list(dense.ranges) == common
    assert list(sparse.ranges) == [*common, "sparsity", "rule", "layers", "schedule"]
    assert sparse.ranges["layers"].samples == ("all", (0,), (1,))
    # The sentences are too short for blocks.
    assert sparse.ranges["rule"].samples == question.rules == ("topk", "percentile")
    assert spec.tune.pruning
    assert question.notes == ()


def test_layers_that_a_plain_load_could_not_tell_are_left_out_and_named(tiny_folders, csv_file):
    question = ask(tiny_folders["distilbert"], csv_file)
    assert "layers" not in searches(question.spec)[1].ranges
    (note,) = question.notes
    assert note.startswith("The choice of layers is not searched: the attention layers of this architecture do not")


def test_long_texts_are_searched_in_blocks_too(tiny_folders, tmp_path):
    rows = [(" ".join([text] * 20), label) for text, label in sentence_rows(60)]
    question = ask(tiny_folders["bert"], write(tmp_path, "long.csv", rows), max_length=80)
    assert question.rules == ("topk", "percentile", "block_topk")


def test_rules_that_would_show_a_causal_model_its_future_are_left_out_and_named(tokenizer_folder, csv_file, tmp_path):
    import shutil

    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=5 + len(WORDS), pad_token_id=0, num_labels=2
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path / "gpt2" / file.name)
    question = ask(tmp_path / "gpt2", csv_file, max_length=128)
    assert question.rules == ("topk",)
    assert "rule" not in searches(question.spec)[1].ranges
    assert any(note.startswith("The rule percentile is not searched: ") for note in question.notes)
    assert question.spec.data.max_length == 64  # the model has no more positions


def test_the_slowest_rule_counts(tiny_folders, csv_file, monkeypatch):
    speed = {"dense": 1.0, "topk": 2.0, "percentile": 3.0}
    monkeypatch.setattr(timing, "_pace", lambda run, _: timing.Pace(speed[run.arm], 0.0))
    question = ask(tiny_folders["bert"], csv_file)
    cost = search_space.cost(question, 1)
    examples = 2 * len(question.data.conditions[""].train)
    assert cost.trial == pytest.approx((examples, 3 * examples), rel=0.05)
    assert cost.run == pytest.approx((examples, examples, 3 * examples), rel=0.05)
    assert (cost.searching, cost.running) == (1, 1)
    several = search_space.ask(
        question.spec.data.model_dump(), str(tiny_folders["bert"]), {"epochs": 2}, seeds_per_trial=4
    )
    assert several.spec.tune.seeds_per_trial == 4
    assert search_space.cost(several, 1).trial == pytest.approx([4 * seconds for seconds in cost.trial], rel=0.05)


def test_what_cannot_be_asked_is_told(tiny_folders, csv_file):
    with pytest.raises(DataError, match=r"has no label column 'stars'\."):
        ask(tiny_folders["bert"], csv_file, label="stars")
    with pytest.raises(ConfigurationError, match=r"data\.max_length: .* greater than or equal to 4, got 1"):
        ask(tiny_folders["bert"], csv_file, max_length=1)


@pytest.mark.parametrize(
    ("source", "model", "name"),
    [
        ("a/reviews.csv", "b/bert", "tune-reviews-bert"),
        ("été ü.csv", "x/y z", "tune-t-y-z"),
        ("x" * 80, "m", f"tune-{'x' * 55}"),
    ],
)
def test_names_are_made_of_data_and_model(source, model, name):
    assert search_space.name_of(source, model) == name
