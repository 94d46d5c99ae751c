"""The display of notebooks, with IPython's output caught."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from crisp_attention.experiment import notebook
from crisp_attention.experiment.execution.worker import Event
from crisp_attention.experiment.notebook import NotebookDisplay
from crisp_attention.experiment.progress import Progress
from fragments import words
from record_builders import make_spec, planned

DENSE = planned(make_spec(seeds=1))["dense", 0]


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, and how often each output is written anew."""
    outputs = []

    class Handle:
        def __init__(self):
            outputs.append([])

        def update(self, content):
            outputs[-1].append(content)

    def display(content, display_id=False):
        handle = Handle()
        handle.update(content)
        return handle if display_id else None

    monkeypatch.setattr("IPython.display.display", display)
    return outputs


def test_one_output_is_written_anew_and_stays_as_it_ended(shown, monkeypatch):
    monkeypatch.setattr(notebook, "_PAUSE_SECONDS", 0.0)
    board = Progress("runs", {"dense, seed 0": None}, 1, lambda run: f"{run.arm}, seed {run.config.seed}")
    with notebook._show(board) as receive:
        receive(DENSE, Event("progress", DENSE.config.run_id, 3, 12, 0.5))
        receive(DENSE, Event("finished", DENSE.config.run_id, result="20 of 24 correct, 3 s"))
    (output,) = shown
    texts = [words(content.data) for content in output]
    assert texts[0] == "All runs 0 of 1"
    assert texts[1].endswith("dense, seed 0: step 3 of 12, loss 0.500")
    assert texts[-1] == "All runs 1 of 1 [1 of 1] dense, seed 0: finished, 20 of 24 correct, 3 s"


def test_short_steps_do_not_keep_the_browser_busy(shown, monkeypatch):
    monkeypatch.setattr(notebook, "_PAUSE_SECONDS", 3600.0)
    board = Progress("runs", {"dense, seed 0": None}, 1, lambda run: f"{run.arm}, seed {run.config.seed}")
    with contextlib.suppress(KeyboardInterrupt), notebook._show(board) as receive:
        for step in range(1000):
            receive(DENSE, Event("progress", DENSE.config.run_id, step, 1000, 0.5))
        raise KeyboardInterrupt
    (output,) = shown
    assert len(output) == 2
    assert "step 999 of 1000" in words(output[-1].data)


def test_a_plan_and_announcements_are_shown(shown, capsys):
    plan = SimpleNamespace(name="made up")
    NotebookDisplay().present(plan)
    assert shown == [[plan]]
    NotebookDisplay().announce("Checking [all]")
    assert capsys.readouterr().out == "Checking [all]\n"
