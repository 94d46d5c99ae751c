from __future__ import annotations

import tomllib

import pytest

from crisp_attention import ConfigurationError, SparsityConfig
from crisp_attention.experiment.specification.sections import TrainingSpec
from crisp_attention.experiment.specification.spec import parse, read
from record_builders import ids_of, make_spec

GOOD = """
name = "mine"
model = "minilm-l6"
seeds = 3

[primary]
arm = "topk"

[data]
source = "films.csv"

[training]
epochs = 2

[[arms]]
name = "dense"

[[arms]]
name = "topk"
sparsity = 0.5
"""


def read_text(folder, text):
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return read(file)


# A specification file


def test_reads_what_a_file_says_and_leaves_the_rest_to_the_defaults(tmp_path):
    spec = read_text(tmp_path, GOOD)
    assert (spec.name, spec.model, spec.seeds, spec.data.source) == ("mine", "minilm-l6", 3, "films.csv")
    assert spec.training == TrainingSpec(epochs=2)
    assert (spec.primary.arm, spec.primary.baseline) == ("topk", "dense")
    assert [arm.attention for arm in spec.arms] == [SparsityConfig(sparsity=0.0), SparsityConfig(sparsity=0.5)]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    assert read_text(tmp_path, f"\ufeff{GOOD}") == read_text(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = 3", "seed = 3", "Unknown key 'seed'. Did you mean 'seeds'"),
        ("[training]", "[trainning]", "Unknown key 'trainning'. Did you mean 'training'"),
        ("epochs = 2", "epoch = 2", "Unknown key 'training.epoch'. Did you mean 'epochs'"),
        ("epochs = 2", "epochs = 0", r"training\.epochs: .*greater than or equal to 1, got 0"),
        ("epochs = 2", "epochs = 2.5", r"training\.epochs: .*got 2\.5"),
        ("epochs = 2", "learning_rate = 0", r"training\.learning_rate: .*greater than 0, got 0"),
        ("epochs = 2", "learning_rate = nan", r"training\.learning_rate: .*got nan"),
        ("epochs = 2", "warmup_share = 1.0", r"training\.warmup_share: .*less than 1, got 1\.0"),
        ("epochs = 2", "lr_schedule = 'linaer'", r"training\.lr_schedule: .*'linear'.*got 'linaer'"),
        ('source = "films.csv"', 'sorce = "films.csv"', "Unknown key 'data.sorce'. Did you mean 'source'"),
        ('source = "films.csv"', "", r"Missing key 'data\.source'"),
        ("[data]", "[data]\npadding = 'longst'", r"data\.padding: .*'longest'.*got 'longst'"),
        ("[data]", "[data]\nmax_length = 3", r"data\.max_length: .*got 3"),
        ("[data]", "[data]\ntest_share = 1.0", r"data\.test_share: .*got 1\.0"),
        ("[data]", "[data]\nvalidation_share = 0", r"data\.validation_share: .*got 0"),
        ("[data]", "[data]\ntrain_examples = 0", r"data\.train_examples: .*got 0"),
        ('arm = "topk"', 'arm = "topc"', r"primary\.arm = 'topc' is not an arm\. Did you mean 'topk'"),
        ('arm = "topk"', 'arm = "topk"\nbaseline = "dens"', r"primary\.baseline = 'dens'.*Did you mean 'dense'"),
        ('arm = "topk"', 'arm = "dense"', r"primary\.arm and primary\.baseline must differ"),
        ('arm = "topk"', 'arms = "topk"', "Unknown key 'primary.arms'. Did you mean 'arm'"),
        ('arm = "topk"', "", r"Missing key 'primary\.arm'"),
        ("sparsity = 0.5", "sparcity = 0.5", r"key 'sparcity' of arm 'topk'\. Did you mean 'sparsity'\? Valid: [^:]*$"),
        ("sparsity = 0.5", "sparsity = 1.0", r"arm 'topk': sparsity must be in \[0, 1\)"),
        ("sparsity = 0.5", "sparsity = '0.5'", r"sparsity must be a finite number, got '0\.5'"),
        ("sparsity = 0.5", "sparsity = 0.5\nrule = 'percentil'", "Unknown rule 'percentil'. Did you mean 'percentile'"),
        ("sparsity = 0.5", "sparsity = 0.5\nscope = 'row'", "'topk' would ignore scope='row'"),
        ("sparsity = 0.5", "sparsity = 0.5\nseed_offset = -1", r"arm 'topk', seed_offset: .*got -1"),
        ("sparsity = 0.5", "sparsity = 0.5\npadding = 'max'", r"arm 'topk', padding: .*'max_length'.*got 'max'"),
        ('name = "topk"', 'name = "dense"', "arm names must differ; repeated: dense"),
        ('name = "topk"', 'name = "../topk"', r"arm '\.\./topk', name: .*got '\.\./topk'"),
        ('name = "topk"', "", r"Missing key 'arms\.1\.name'"),
        ('name = "mine"', 'name = "a/b"', r"name: .*got 'a/b'"),
        ('name = "mine"', "", "Missing key 'name'"),
        ('model = "minilm-l6"', "model = 6", r"model: .*string, got 6"),
        ("seeds = 3", "seeds = 1001", r"seeds: .*less than or equal to 1000, got 1001"),
        ("seeds = 3", "choices = 'ours'", r"choices: .*got 'ours'"),
        ("seeds = 3", "seeds = ", "is not valid TOML"),
        ("seeds = 3", "seeds = 3\nseeds = 4", "is not valid TOML"),
        ("[data]", "[[data]]", r"data: .*dictionary"),
    ],
)
def test_each_mistake_is_named_with_the_nearest_valid_name(tmp_path, old, new, message):
    assert GOOD.count(old) == 1
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_text(tmp_path, GOOD.replace(old, new))
    assert "mine.toml" in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("seeds = 3", "seeds = true", "seeds"),
        ("seeds = 3", 'seeds = "3"', "seeds"),
        ("epochs = 2", "epochs = true", "training.epochs"),
        ("epochs = 2", 'learning_rate = "5e-5"', "training.learning_rate"),
        ("epochs = 2", "learning_rate = true", "training.learning_rate"),
        ("epochs = 2", "learning_rate = inf", "training.learning_rate"),
        ("epochs = 2", "weight_decay = inf", "training.weight_decay"),
        ("sparsity = 0.5", "attention = 0", "attention"),
        ("sparsity = 0.5", "attention = []", "attention"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_rather_than_reinterpreted(tmp_path, old, new, key):
    with pytest.raises(ConfigurationError, match=key.replace(".", r"\.")):
        read_text(tmp_path, GOOD.replace(old, new))


def test_a_whole_number_serves_where_any_number_does(tmp_path):
    whole, broken = (
        read_text(
            tmp_path,
            GOOD.replace("epochs = 2", f"learning_rate = {rate}").replace(
                "sparsity = 0.5", f"{offset}sparsity = {share}"
            ),
        )
        for rate, share, offset in (("1", "0", "seed_offset = 9\n"), ("1.0", "0.0", "seed_offset = 9\n"))
    )
    assert whole == broken
    assert whole.training.learning_rate == 1.0
    assert ids_of(whole) == ids_of(broken)


def test_several_mistakes_are_told_at_once(tmp_path):
    text = GOOD.replace("epochs = 2", "epoch = 2").replace('source = "films.csv"', "")
    with pytest.raises(ConfigurationError, match=r"Missing key 'data\.source'.*Unknown key 'training\.epoch'"):
        read_text(tmp_path, text)


def test_one_arm_is_no_experiment():
    with pytest.raises(ConfigurationError, match=r"arms: .*at least 2"):
        make_spec(arms=[{"name": "dense"}])


@pytest.mark.parametrize("make", ["missing", "folder", "bytes"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, make):
    told = {
        "missing": r"^There is no specification .*mine\.toml\.$",
        "folder": r"^The specification .*mine\.toml cannot be read: Is a directory\.$",
        "bytes": r"^The specification .*mine\.toml is not UTF-8: .* at byte \d+\.$",
    }
    file = tmp_path / "mine.toml"
    if make == "folder":
        file.mkdir()
    if make == "bytes":
        file.write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigurationError, match=told[make]):
        read(file)


def test_a_toml_file_and_its_content_say_the_same(tmp_path):
    assert read_text(tmp_path, GOOD) == parse(tomllib.loads(GOOD), "x")
