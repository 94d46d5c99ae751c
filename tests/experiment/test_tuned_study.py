"""A study that tunes, from the plan to the report."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from rich.console import Console
from typer.testing import CliRunner

import tiny_study
from crisp_attention.cli import app
from crisp_attention.errors import ConfigurationError
from crisp_attention.experiment import progress, study
from crisp_attention.experiment.display import TerminalDisplay, show_plan
from crisp_attention.experiment.execution import worker
from crisp_attention.experiment.execution.local import LocalExecutor
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.spec import parse
from crisp_attention.experiment.training import timing, workbench
from data_files import write
from record_builders import made_up_tuning
from small_models import sentence_rows

TUNE = """
[tune]
trials = 3
epochs = 1
learning_rate = { low = 1e-3, high = 3e-2 }
sparsity = [0.2, 0.5, 0.8]
"""


class Silent:
    """A display that shows nothing."""

    def announce(self, message):
        pass

    @contextlib.contextmanager
    def tuning(self, plan):
        yield lambda *_: None

    training = tuning


@pytest.fixture
def instant(monkeypatch):
    """No timing of real steps: a second an example."""
    monkeypatch.setattr(timing, "_pace", lambda *_: timing.Pace(1.0, 0.0))


@pytest.fixture
def toml(tiny_folders, csv_file):
    return tiny_study.toml(tiny_folders["bert"], csv_file) + TUNE


def read(toml):
    return parse(tomllib.loads(toml), "tiny")


def shown(plan, width=200):
    output = io.StringIO()
    show_plan(Console(file=output, width=width), plan)
    return output.getvalue()


def words(text):
    return " ".join(text.split())


def test_the_plan_says_what_is_to_be_tried_before_anything_is_written(toml, tmp_path, instant):
    plan = study.prepare(read(toml + '[[arms]]\nname = "as-written"\ntune = []\n'), tmp_path / "out", Silent(), jobs=1)
    assert not (tmp_path / "out").exists()
    carved = plan.tuning.data
    assert len(carved.train) + len(carved.test) == 96
    assert not {*carved.train.texts, *carved.test.texts} & {*plan.data.test.texts}
    # Arms that are the same until each has its own values are all to do.
    assert len(plan.pending) == 10
    assert plan.searching == 3 * 3 * 96  # one epoch, as long as a run of two takes for each
    text = words(shown(plan))
    assert f"Tuning first: 9 trials, 3 a search, about 14 min. Each trains on {len(carved.train)} training" in text
    assert f"judged by the loss on {len(carved.test)} held out from them; the evaluation split is not used" in text
    assert "dense and dense-other-seeds: learning_rate 0.001 to 0.03" in text
    assert "percentile-80: learning_rate 0.001 to 0.03; sparsity 0.2, 0.5, 0.8" in text
    assert "as-written: nothing to search" in text
    assert "10 runs to do" in text


@pytest.mark.parametrize("width", [60, 120])
def test_a_plan_that_tunes_fits_its_terminal(toml, tmp_path, instant, width):
    lines = shown(study.prepare(read(toml), tmp_path / "out", Silent(), jobs=1), width).splitlines()
    assert max(map(len, lines)) <= width


def test_a_plan_shows_what_was_found(toml, tmp_path, instant):
    spec = read(toml)
    first = study.prepare(spec, tmp_path, Silent(), jobs=1)
    store = Store(tmp_path)
    store.open(spec, first.prints)
    store.save_tuning(made_up_tuning(spec))
    plan = study.prepare(spec, tmp_path, Silent(), jobs=1)
    assert plan.tuning is None
    assert plan.searching == 0.0
    assert {task.run.config.training["learning_rate"] for task in plan.pending} == {0.03}
    text = words(shown(plan))
    assert "Tuned, with 3 trials a search" in text
    assert "percentile-80: learning_rate 0.03; sparsity 0.8" in text


def test_every_end_of_a_range_is_looked_at_before_anything_is_searched(toml, tmp_path, instant, monkeypatch):
    looked_at = []
    monkeypatch.setattr(workbench, "preflight", lambda checkpoint, data, spec: looked_at.append(spec))
    study.prepare(read(toml), tmp_path / "out", Silent())
    assert [probe.arm("percentile-80").attention.sparsity for probe in looked_at] == [0.2, 0.8]


def test_what_a_model_cannot_be_tuned_in_is_refused_first(toml, tmp_path, instant, monkeypatch):
    fields = {"attention_dropout": ("no_such_field",), "hidden_dropout": ()}
    monkeypatch.setattr(workbench, "_DROPOUT_FIELDS", fields)
    spec = read(toml.replace("[tune]", "[tune]\nattention_dropout = [0.1, 0.3]"))
    with pytest.raises(ConfigurationError, match=r"attention_dropout = 0\.1, but the configuration of .* has no such"):
        study.prepare(spec, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_a_study_that_does_not_tune_needs_no_optuna(tiny_folders, csv_file, tmp_path, instant, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    plan = study.prepare(tiny_study.spec(tiny_folders["bert"], csv_file), tmp_path / "out", Silent(), jobs=1)
    assert (plan.tuning, plan.tuned, plan.searching) == (None, None, 0.0)
    assert "uning" not in shown(plan)


def test_trials_are_shown_by_number(toml, tmp_path, instant):
    plan = study.prepare(read(toml), tmp_path / "out", Silent(), jobs=1)
    output = io.StringIO()
    with TerminalDisplay(Console(file=output, width=200)).tuning(plan) as receive:
        (run,) = plan.tuning.searches[0].trial(plan.spec, {"learning_rate": 0.01}, 2, plan.prints)
        receive(run, worker.Event("finished", run.config.run_id, result="3 of 4 correct"))
    assert output.getvalue().startswith("[1 of 9] dense, trial 3: finished, 3 of 4 correct; about")


def test_trials_of_several_seeds_are_shown_by_training(toml, tmp_path, instant):
    spec = read(toml.replace("[tune]", "[tune]\nseeds_per_trial = 3"))
    plan = study.prepare(spec, tmp_path / "out", Silent(), jobs=1)
    assert plan.searching == 3 * 3 * 3 * 96
    text = words(shown(plan))
    assert "Tuning first: 9 trials, 3 a search, each with 3 seeds, about 43 min." in text
    assert "judged by the mean loss of its 3 seeds on" in text
    board = progress.of_trials(plan)
    assert (board.kind, board.total) == ("trainings", 27)
    first, second, _ = plan.tuning.searches[0].trial(plan.spec, {"learning_rate": 0.01}, 1, plan.prints)
    told = board.receive(first, worker.Event("finished", first.config.run_id, result="3 of 4 correct"))
    assert str(told) == "[1 of 27] dense, trial 2, seed 100000: finished, 3 of 4 correct"
    # With it ends its trial: the third seed is not trained.
    told = board.receive(second, worker.Event("diverged", second.config.run_id, reason="the loss is not finite"))
    assert str(told) == "[2 of 26] dense, trial 2, seed 100001: diverged: the loss is not finite"
    assert (board.ended, board.total) == (2, 26)


# The whole way

SMALL = """\
name = "tuned"
model = "{model}"
seeds = 1

[primary]
arm = "topk"

[data]
source = "{data}"
test = "{test}"
train_examples = 64

[training]
epochs = 2
batch_size = 8
train_probe = 8

[[arms]]
name = "dense"

[[arms]]
name = "topk"
sparsity = 0.5
"""


def here(queue, store, checkpoint, data, division, on_event):
    """Do tasks in this process, as one worker does."""
    bench = workbench.Workbench(checkpoint, data)
    while queue:
        task = queue.popleft()
        on_event(task.run, worker.perform(task, store, bench, lambda event: None))


def crisp(file, folder):
    """The command on one core: one worker with one thread, so that it computes what this process does."""

    def prepare():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    return subprocess.Popen(
        [sys.executable, "-m", "crisp_attention.cli", "run", str(file), "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        preexec_fn=prepare,
    )


@pytest.mark.slow
def test_killed_while_it_tunes_it_finds_the_same_whatever_the_evaluation_split(
    tiny_folders, csv_file, tmp_path, instant, monkeypatch
):
    others = [("a film", "negative"), *((f"{text} not", "positive") for text, _ in sentence_rows(30, seed=2))]
    rows = {"one": sentence_rows(20, seed=1), "other": others}
    files = {}
    for name, test in rows.items():
        held_out = write(tmp_path, f"{name}.csv", test)
        files[name] = SMALL.format(model=tiny_folders["bert"], data=csv_file, test=held_out) + TUNE
    monkeypatch.setattr(LocalExecutor, "execute", staticmethod(here))
    study.carry_out(study.prepare(read(files["other"]), tmp_path / "other", Silent(), jobs=1), Silent())

    file, folder = tmp_path / "spec.toml", tmp_path / "one"
    file.write_text(files["one"], encoding="utf-8")
    process = crisp(file, folder)
    deadline = time.monotonic() + 240
    while len(list((folder / "tuning" / "records").glob("[!.]*.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "tuning.json").exists()
    kept = {path: path.read_bytes() for path in (folder / "tuning" / "records").glob("[!.]*.json")}

    # The same command, its workers' work done in this process.
    done = CliRunner().invoke(app, ["run", str(file), "--out", str(folder)], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    assert "Tuning first: 6 trials, 3 a search, " in done.output
    assert "of them done" in done.output
    assert "[2 of 2] topk, seed 0: finished" in done.output
    assert all(path.read_bytes() == content for path, content in kept.items())
    found, other = (json.loads((tmp_path / name / "tuning.json").read_text(encoding="utf-8")) for name in rows)
    assert found == other
    assert [len(outcome["trials"]) for outcome in found["outcomes"]] == [3, 3]
    store = Store(folder)
    spec, runs, _ = store.study()
    values = store.tuning(spec).values
    for record in store.load_all(runs).values():
        assert record.config["training"]["learning_rate"] == values[record.arm]["learning_rate"]
        assert record.config["training"]["epochs"] == 2
        assert record.final.test.total == 20
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "## Tuning" in report
    assert "The evaluation split was not used." in report
    assert "[tune]" in report
