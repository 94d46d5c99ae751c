"""The command line as a user types it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import crisp_attention
import tiny_study
from commands import CRISP, ENVIRONMENT, crisp, here


@pytest.fixture
def spec_file(tmp_path, tiny_folders, csv_file):
    file = tmp_path / "spec.toml"
    file.write_text(tiny_study.toml(tiny_folders["bert"], csv_file), encoding="utf-8")
    return file


def records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "records").glob("*.json"))}


def results(folder: Path) -> dict[str, object]:
    """Records without what may differ between two machines or hours."""
    contents = {name: json.loads(content) for name, content in records(folder).items()}
    for content in contents.values():
        del content["timing"], content["resumed"]
        content["provenance"].pop("git")
    return contents


@pytest.mark.parametrize(
    "command",
    [[], ["reproduce"], ["run"], ["report"], ["export"], ["tune"], ["check"], ["inspect"], ["data"]],
    ids=str,
)
def test_help_loads_nothing_heavy_fits_a_narrow_terminal_and_shows_an_example_a_line(command):
    code = f"""
import sys
sys.argv = ["crisp", *{command!r}, "--help"]
from crisp_attention.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "transformers", "numpy", "pandas", "matplotlib", "datasets", "scipy"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    environment = ENVIRONMENT | {"COLUMNS": "60"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "Usage" in done.stdout
    assert max(map(len, lines)) <= 60
    assert "<bool>" not in done.stdout
    examples = [line.strip() for line in done.stdout.partition("Examples:")[2].partition("╭")[0].splitlines()]
    assert all(line.startswith(f"crisp {command[0]}") for line in filter(None, examples))
    assert any(examples) == bool(command)


def test_data_lists_and_shows(csv_file):
    listing = here("data").stdout
    for name in ("movie-snippets", "trec", "sms-spam"):
        assert name in listing
    shown = here("data", csv_file)
    assert shown.returncode == 0, shown.stderr
    assert "positive" in shown.stdout
    assert "negative" in shown.stdout


def test_data_takes_what_a_source_needs_beside_its_name(tmp_path):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("one,other,verdict\n" + "a film,the plot,same\na plot,a film,other\n" * 20, encoding="utf-8")
    named = ["--text", "one", "--text-pair", "other", "--label", "verdict", "--test", pairs]
    shown = here("data", pairs, *named)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"same +20 +20", shown.stdout)
    refused = here("data", pairs, "--text", "one", "--text-pair", "othre", "--label", "verdict")
    assert refused.returncode == 2
    assert "no text_pair column 'othre'" in refused.stderr


def test_the_version_is_told():
    assert crisp("--version").stdout.split() == ["crisp-attention", crisp_attention.__version__]


def test_text_and_label_name_columns_of_a_data_set(tmp_path):
    done = here("reproduce", "--text", "review", cwd=tmp_path)
    assert done.returncode == 2
    assert "--text must go with --dataset, which is missing" in done.stderr
    (tmp_path / "films.csv").write_text("review,stars\ngood,1\nbad,0\n", encoding="utf-8")
    done = here("reproduce", "--dataset", "films.csv", "--text", "revew", cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean 'review'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["films.csv"]


def test_check_prints_each_layer(tiny_folders):
    done = here("check", tiny_folders["distilbert"], "--sparsity", 0.5, "--rule", "percentile")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 0.500 requested") == 2
    assert "with rule topk whichever rule is asked for" in done.stdout
    assert re.search(r"restore +ok +largest difference after densify: 0\.0e\+00", done.stdout)


@pytest.fixture(scope="module")
def audited(tiny_folders):
    """The audit of a model."""
    from transformers import AutoModel

    return crisp_attention.audit(AutoModel.from_pretrained(tiny_folders["bert"]))


@pytest.mark.parametrize("columns", [40, 100, 200])
def test_an_audit_is_shown_at_any_width(audited, columns):
    from rich.console import Console

    from crisp_attention.experiment.display import show_audit

    shown = io.StringIO()
    show_audit(Console(file=shown, width=columns), audited)
    assert "BertModel: served" in shown.getvalue()
    assert max(len(line) for line in shown.getvalue().partition("outcome")[2].splitlines()) <= columns
    words = " ".join(shown.getvalue().split())
    for check in ("restore", "padding", "not applicable" if columns > 40 else "applicable"):
        assert check in words


def test_check_exits_with_1_when_the_audit_finds_something_wrong(tiny_folders, monkeypatch):
    from crisp_attention import operator

    stock = operator.select
    monkeypatch.setattr(
        operator,
        "select",
        lambda config, pairs, **more: stock(config.replace(rule="percentile", count_padding=True), pairs, **more),
    )
    done = here("check", tiny_folders["bert"])
    assert done.returncode == 1, done.stderr
    assert "BertModel: refused" in done.stdout
    assert "padding invariance" in done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folders, csv_file):
    """A specification, the directory of its finished study, and what the command printed."""
    folder = tmp_path_factory.mktemp("whole")
    file = folder / "spec.toml"
    file.write_text(tiny_study.toml(tiny_folders["bert"], csv_file, epochs=3), encoding="utf-8")
    done = crisp("run", file, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return file, folder / "out", done.stdout


@pytest.mark.slow
def test_a_study_from_question_to_verdict(whole, tmp_path):
    spec_file, original, printed = whole
    assert "8 runs to do" in printed
    assert "8 of 8" in printed
    assert "No verdict" in printed
    assert "too few" in printed
    assert "percentile-80" in printed
    folder = tmp_path / "out"
    shutil.copytree(original, folder)
    before = records(folder)
    assert len(before) == 8
    for name in ("report.html", "report.md", "figures/accuracy.svg"):
        assert (folder / name).stat().st_size > 500
    assert len(json.loads((folder / "examples.json").read_text(encoding="utf-8"))["texts"]) == 24
    assert not list((folder / "checkpoints").iterdir())

    page = (folder / "report.html").read_bytes()
    maps = json.loads(re.search(rb'id="maps-data">(.*?)</script>', page).group(1))
    assert (maps["arms"], maps["layers"]) == (["dense", "percentile-80"], 2)
    assert all(item["tokens"][0] == "[CLS]" and len(item["tokens"]) > 2 for item in maps["examples"])
    again = crisp("run", spec_file, "--out", folder)
    assert again.returncode == 0, again.stderr
    assert "All of 8 runs are done" in again.stdout
    assert "finished" not in again.stdout.split("verdict")[0]
    assert records(folder) == before
    assert (folder / "report.html").read_bytes() == page

    (folder / "report.html").unlink()
    report = crisp("report", folder)
    assert report.returncode == 0, report.stderr
    assert (folder / "report.html").read_bytes() == page


def begin(spec_file: Path, folder: Path, *, core: int | None = None) -> subprocess.Popen[str]:
    """The command in a process group of its own, on one core if it is said which."""

    def prepare():
        # Tests that run in the background are started with Ctrl-C ignored, and would hand that on.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if core is not None:
            os.sched_setaffinity(0, {core})

    return subprocess.Popen(
        [*CRISP, "run", str(spec_file), "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT,
        preexec_fn=prepare,
    )


def wait_for(count: int, folder: Path, process: subprocess.Popen[str]) -> dict[str, bytes]:
    """Records as soon as there are so many."""
    deadline = time.monotonic() + 240
    while not (folder / "records").exists() or len(records(folder)) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    return records(folder)


@pytest.mark.slow
def test_killed_and_interrupted_it_goes_on_to_the_same_results(whole, tmp_path):
    """Ended by kill -9, then by Ctrl-C, which says how to go on; then two processes at once do the rest."""
    spec_file, original, _ = whole
    folder = tmp_path / "out"
    process = begin(spec_file, folder)
    kept = wait_for(1, folder, process)
    process.kill()
    process.communicate()
    time.sleep(1.0)  # an orphaned worker would go on writing
    after = records(folder)
    assert kept.items() <= after.items()
    assert len(after) <= len(kept) + 2  # what two workers had just ended

    process = begin(spec_file, folder)
    kept = wait_for(len(after) + 1, folder, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in " ".join(output.split())
    assert kept.items() <= records(folder).items()

    cores = sorted(os.sched_getaffinity(0))
    both = [begin(spec_file, folder, core=core) for core in (cores[0], cores[-1])]
    printed = [process.communicate()[0] for process in both]
    # One that ends while the other is still training finds runs missing: that is exit code 1.
    assert {process.returncode for process in both} <= {0, 1}, printed
    assert kept.items() <= records(folder).items()
    assert results(folder) == results(original)
    logs = "".join(path.read_text(encoding="utf-8") for path in (folder / "logs").iterdir())
    trained = {name: logs.count(f"Training run {name.removesuffix('.json')}\n") for name in records(folder)}
    # Once, and once more for each of the two workers that each interruption took.
    assert min(trained.values()) == 1
    assert sum(trained.values()) <= len(trained) + 4
    assert not [path for path in (folder / "records").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_runs_that_raise_leave_a_record_with_the_reason_and_are_left_alone(tmp_path, tokenizer_folder):
    """Sentence pairs on a model with one token type: it loads, and fails in the first step."""
    from transformers import BertConfig, BertForSequenceClassification

    model, data, file = tmp_path / "model", tmp_path / "pairs.csv", tmp_path / "spec.toml"
    shutil.copytree(tokenizer_folder, model)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(**sizes, vocab_size=30, type_vocab_size=1)).save_pretrained(model)
    rows = [f"film {number},movie {number},{number % 2}" for number in range(160)]
    data.write_text("\n".join(["sentence1,sentence2,label", *rows]), encoding="utf-8")
    file.write_text(tiny_study.toml(model, data, seeds=1), encoding="utf-8")
    folder = tmp_path / "out"
    first = crisp("run", file, "--out", folder, "--jobs", 1)
    assert first.returncode == 1, first.stderr
    assert "nobody knows how long" in " ".join(first.stdout.split())
    assert "failed: IndexError: index out of range in self" in first.stdout
    assert "4 runs diverged or failed" in " ".join(first.stdout.split())
    contents = [json.loads(content) for content in records(folder).values()]
    assert [content["status"] for content in contents] == ["failed"] * 4
    assert {content["reason"] for content in contents} == {"IndexError: index out of range in self"}
    assert "IndexError: index out of range in self" in (folder / "report.html").read_text(encoding="utf-8")

    before = records(folder)
    again = crisp("run", file, "--out", folder)
    assert again.returncode == 1
    assert "4 runs diverged or failed; --retry does them again" in " ".join(again.stdout.split())
    assert records(folder) == before


@pytest.mark.parametrize("columns", ["60", "200"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(spec_file, tmp_path, monkeypatch, columns):
    from typer.testing import CliRunner

    from crisp_attention.cli import app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", str(spec_file), "--dry-run"], env={"COLUMNS": columns})
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "4 arms x 2 seeds" in words
    assert "8 runs to do" in words
    assert ("sparsity=0.8" in words) == (columns == "200")
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def mistakes():
    """What a user gets wrong, and what the answer must name."""
    return {
        "sparsity": (("sparsity = 0.8", "sparsity = 1.2"), ["sparsity must be in [0, 1)", "1.2"]),
        "rule": (('rule = "percentile"', 'rule = "percentil"'), ["'percentil'", "Did you mean 'percentile'"]),
        "key": (("epochs =", "epocs ="), ["'training.epocs'", "Did you mean 'epochs'"]),
        "arm": (('arm = "percentile-80"', 'arm = "percentil-80"'), ["Did you mean 'percentile-80'"]),
        "toml": (("[training]", "[training"), ["not valid TOML"]),
        "column": (("train_examples", 'text = "sentence"\ntrain_examples'), ["no text column 'sentence'", "text"]),
        "too many": (("test_examples = 24", "test_examples = 5000"), ["5000 evaluation examples"]),
        "seeds": (("seeds = 2", "seeds = 0"), ["seeds", "got 0"]),
    }


@pytest.mark.parametrize("mistake", sorted(mistakes()))
def test_bad_specifications_exit_with_2_and_write_nothing(spec_file, tmp_path, mistake):
    (old, new), expected = mistakes()[mistake]
    text = spec_file.read_text(encoding="utf-8")
    assert old in text
    spec_file.write_text(text.replace(old, new), encoding="utf-8")
    folder = tmp_path / "out"
    done = here("run", spec_file, "--out", folder)
    assert done.returncode == 2
    assert done.stderr.startswith("Error:")
    assert "Traceback" not in done.stderr
    for part in expected:
        assert part in done.stderr
    assert not folder.exists()


@pytest.mark.parametrize("problem", ["one class", "empty", "not utf-8", "missing"])
def test_bad_data_exits_with_2_and_writes_nothing(spec_file, csv_file, tmp_path, problem):
    file = tmp_path / "bad.csv"
    if problem == "one class":
        file.write_text("text,label\n" + "good film,1\n" * 50, encoding="utf-8")
    elif problem == "empty":
        file.write_text("text,label\n", encoding="utf-8")
    elif problem == "not utf-8":
        file.write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    spec_file.write_text(spec_file.read_text().replace(str(csv_file), str(file)), encoding="utf-8")
    done = here("run", spec_file, "--out", tmp_path / "out")
    wanted = {"one class": "got one: '1'", "empty": "empty", "not utf-8": "not UTF-8"}
    assert done.returncode == 2
    assert wanted.get(problem, "No such data file") in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_would_not_be_touched_exits_with_2(spec_file, tmp_path, tiny_folders, tokenizer_folder):
    from transformers import MPNetConfig, MPNetForSequenceClassification

    config = MPNetConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=30
    )
    folder = tmp_path / "mpnet"
    MPNetForSequenceClassification(config).save_pretrained(folder)
    for item in tokenizer_folder.iterdir():
        shutil.copy(item, folder)
    spec_file.write_text(spec_file.read_text().replace(str(tiny_folders["bert"]), str(folder)), encoding="utf-8")
    for command in (["run", spec_file, "--out", tmp_path / "out"], ["check", folder]):
        done = here(*command)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "would change nothing" in done.stderr
    assert not (tmp_path / "out").exists()


def test_foreign_and_damaged_directories_exit_with_2(spec_file, tmp_path):
    from crisp_attention.experiment.data import dataset
    from crisp_attention.experiment.results.store import Store
    from crisp_attention.experiment.specification.runs import expand
    from crisp_attention.experiment.specification.spec import read
    from crisp_attention.experiment.training import model

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    done = here("run", spec_file, "--out", foreign)
    assert done.returncode == 2
    assert "is not a run directory" in done.stderr
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]

    spec = read(spec_file)
    checkpoint, loaded = model.resolve(spec.model), dataset.load(spec.data)
    folder = tmp_path / "out"
    Store(folder).open(spec, tiny_study.prints_of(checkpoint, loaded))
    other = tmp_path / "other.toml"
    other.write_text(spec_file.read_text().replace("sparsity = 0.8", "sparsity = 0.7"), encoding="utf-8")
    study = (folder / "study.json").read_bytes()
    done = here("run", other, "--out", folder)
    assert done.returncode == 2
    assert "holds another experiment (different arms)" in done.stderr
    assert (folder / "study.json").read_bytes() == study

    first = next(expand(spec, tiny_study.prints_of(checkpoint, loaded))).config.run_id
    (folder / "records" / f"{first}.json").write_text('{"schema": 1, "run_id"', encoding="utf-8")
    for command in (["run", spec_file, "--out", folder], ["report", folder]):
        done = here(*command)
        assert done.returncode == 2
        assert f"{first}.json is damaged" in done.stderr
        assert "Delete it to have that run done again" in done.stderr
    assert not (folder / "report.html").exists()


def test_the_paper_preset_without_a_hub_fails_at_once_and_names_the_alternative(tmp_path):
    done = here("reproduce", "--preset", "paper", cwd=tmp_path)
    assert done.returncode == 2
    assert "distilbert-base-uncased" in done.stderr
    assert "--model minilm-l6" in done.stderr
    assert not list(tmp_path.iterdir())


def test_unknown_presets_and_jobs_are_named(tmp_path, spec_file):
    done = here("reproduce", "--preset", "papre", cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean 'paper'" in done.stderr
    done = here("run", spec_file, "--jobs", 4096, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "4096" in done.stderr
    assert not (tmp_path / "out").exists()
