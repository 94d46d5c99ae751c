"""`crisp tune` as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import optuna
import pytest
from typer.testing import CliRunner

from crisp_attention import cli
from crisp_attention.experiment.execution import worker
from crisp_attention.experiment.execution.local import LocalExecutor
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.training import timing, workbench
from small_models import sentence_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def reviews(tmp_path):
    """A file of reviews with some that are empty, and some that are too long."""
    rows = [*sentence_rows(120), ("", "positive"), (" ", "negative"), ("good " * 60, "positive")]
    lines = ["review,stars", *(f"{text},{label}" for text, label in rows)]
    file = tmp_path / "reviews.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to work in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(timing, "_pace", lambda *_: timing.Pace(0.01, 0.0))
    return folder


def refused(capsys, monkeypatch, *arguments):
    """What the command says when it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["crisp", "tune", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    return sentence


LINES = {
    "no label column": (["review,sars", "good,1", "bad,0"], r"has no label column 'stars'\. .*'sars'"),
    "a label that is no category": (
        [f"text {n},{n * 0.37:.2f}" for n in range(200)],
        r"200 different labels in 200 row",
    ),
    "one label": ([f"text {n},good" for n in range(40)], "classification needs two classes or more, got one: 'good'"),
    "ten thousand labels": (
        [f"text {n},class{n % 10_000}" for n in range(20_000)],
        "10000 different labels in 20000 r",
    ),
    "no text at all": ([f" ,{n % 2}" for n in range(9)], r"the training split is empty.*9 of 9 rows .* were dropped"),
    "not UTF-8": ([b"caf\xe9,1", b"good,0"], r"is not UTF-8: unexpected end of data at byte \d"),
    "rows with more fields than names": (["a,b,c,1", "d,e,f,0"], "cannot be read as .csv"),
}


@pytest.mark.parametrize("what", LINES)
def test_data_that_will_not_do_are_one_sentence(work, tmp_path, tiny_folders, capsys, monkeypatch, what):
    lines, message = LINES[what]
    header = [] if what == "no label column" else ["review,stars"]
    file = tmp_path / "bad.csv"
    file.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in [*header, *lines]) + b"\n"
    )
    columns = ["--text", "review", "--label", "stars", "--model", tiny_folders["bert"], "--budget", "1h"]
    sentence = refused(capsys, monkeypatch, file, *columns)
    assert re.search(message, sentence), sentence
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "--budget must be a duration such as 2h, 1h30m, 30m or 90s, got 'soon'."),
        (["--budget", "30s"], "A budget of 30s is too small: 10 trials and then 6 seeds of each arm take about "),
        (["--trials", "0"], "--trials must be at least 1, got 0."),
        (["--seeds-per-trial", "0"], "--seeds-per-trial must be at least 1, got 0."),
        (["--seeds-per-trial", "500"], "tune.seeds_per_trial: "),
        (["--epochs", "0"], "training.epochs: "),
        (["--storage", "x.db"], "The storage 'x.db' cannot be used: "),
        (["--model", "./nowhere"], "Model './nowhere' is not a folder with config.json"),
    ],
)
def test_wishes_that_will_not_do_are_one_sentence(work, reviews, tiny_folders, capsys, monkeypatch, arguments, message):
    assert message in refused(capsys, monkeypatch, reviews, "--model", tiny_folders["bert"], *arguments)
    assert list(work.iterdir()) == []


def test_a_storage_of_another_experiment_is_one_sentence(work, tmp_path, reviews, tiny_folders, capsys, monkeypatch):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    optuna.create_study(storage=url, study_name=f"tune-reviews-{tiny_folders['bert'].name}/dense")
    before = (tmp_path / "x.db").read_bytes()
    sentence = refused(capsys, monkeypatch, reviews, "--model", tiny_folders["bert"], "--storage", url)
    assert "of something else. Give another --storage" in sentence
    assert (tmp_path / "x.db").read_bytes() == before
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("width", [60, 120])
def test_a_dry_run_says_all_and_writes_nothing(work, reviews, tiny_folders, width):
    arguments = ["tune", str(reviews), "--label", "stars", "--model", str(tiny_folders["bert"]), "--budget", "30m"]
    arguments += ["--max-length", "32", "--seeds-per-trial", "2", "--dry-run"]
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": str(width)})
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= width
    said = " ".join(done.output.split())
    assert "30m are room for" in said
    assert "these numbers stand from now on" in said
    assert "a search, each with 2 seeds, about" in said
    assert "2 of 123 rows of reviews.csv were dropped: empty text or label." in said
    assert "1 of 121 texts are longer than 32 tokens: their ends are cut off." in said
    assert "layers all; layer 0; layer 1" in said
    assert list(work.iterdir()) == []


# The whole way


def here(executor, queue, store, checkpoint, data, division, on_event):
    """Do tasks in this process, as one worker does."""
    bench = workbench.Workbench(checkpoint, data)
    while queue:
        task = queue.popleft()
        on_event(task.run, worker.perform(task, store, bench, lambda event: None))


def test_killed_and_taken_up_it_ends_with_a_model_for_a_pipeline(work, reviews, tiny_folders, monkeypatch):
    arguments = ["tune", str(reviews), "--label", "stars", "--model", str(tiny_folders["bert"]), "--epochs", "1"]
    arguments += ["--trials", "2", "--seeds", "2", "--max-length", "32", "--jobs", "1", "--out", "out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "crisp_attention.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )
    folder = work / "out"
    deadline = time.monotonic() + 240
    while not list((folder / "tuning" / "records").glob("[!.]*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path: path.read_bytes() for path in (folder / "tuning" / "records").glob("[!.]*.json")}

    monkeypatch.setattr(LocalExecutor, "execute", here)
    # Neither trials nor seeds are named again: those that it was begun with stand.
    again = [item for item in arguments if item not in ("--trials", "--seeds", "2")]
    done = CliRunner().invoke(cli.app, [*again, "--budget", "1h"], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    assert "begun with 2 trials and 2 seeds of each arm" in " ".join(done.output.split())
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert "No verdict: 2 paired seeds are too few." in done.output
    assert "so this is the dense model" in " ".join(done.output.split())

    store = Store(folder)
    spec, runs, _ = store.study()
    assert (spec.tune.trials, spec.seeds, len(runs)) == (2, 2, 6)
    assert len(list((folder / "models").iterdir())) == 3
    record = store.load(next(run.config.run_id for run in runs if run.arm == "dense" and run.index == 0))
    logits = store.load_arrays(record)["test_logits"]
    texts = json.loads((folder / "examples.json").read_text(encoding="utf-8"))["texts"]
    from transformers import pipeline

    classify = pipeline("text-classification", str(folder / "model"), truncation=True)
    answers = [record.classes.index(answer["label"]) for answer in classify(texts)]
    assert answers == logits.argmax(axis=1).tolist()
    assert "No verdict" in (folder / "model" / "README.md").read_text(encoding="utf-8")
    # All is done: it only reports.
    before = (folder / "model" / "model.safetensors").read_bytes()
    done = CliRunner().invoke(cli.app, again, env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    assert "All of 6 runs are done" in done.output
    assert (folder / "model" / "model.safetensors").read_bytes() == before
