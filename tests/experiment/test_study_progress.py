"""What a display shows of a study's progress, on made-up events."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from crisp_attention.experiment import display
from crisp_attention.experiment.display import TerminalDisplay
from crisp_attention.experiment.execution.worker import Event
from crisp_attention.experiment.notebook import render
from crisp_attention.experiment.progress import Progress
from fragments import read, words
from record_builders import make_spec, planned

RUNS = planned(make_spec(seeds=2))
DENSE, SPARSE = RUNS["dense", 0], RUNS["topk-50", 0]


@pytest.fixture
def board():
    """Three runs, of which nobody knows how long they take."""
    expected = dict.fromkeys(["dense, seed 0", "topk-50, seed 0", "dense, seed 1"])
    return Progress("runs", expected, 2, lambda run: f"{run.arm}, seed {run.config.seed}")


def event(kind, run, **more):
    return Event(kind, run.config.run_id, **more)


def test_runs_begin_and_end(board):
    assert board.receive(None, Event("ready")) is None
    assert board.receive(DENSE, event("progress", DENSE, step=3, steps=12, loss=0.5)) is None
    assert board.receive(SPARSE, event("progress", SPARSE, step=6, steps=12, loss=0.25)) is None
    assert [(item.label, item.step) for item in board.running] == [("dense, seed 0", 3), ("topk-50, seed 0", 6)]
    assert (board.ended, board.total, board.done) == (0, 3, 0.75)
    told = board.receive(DENSE, event("finished", DENSE, result="20 of 24 correct, 3 s"))
    assert (str(told), told.kind) == ("[1 of 3] dense, seed 0: finished, 20 of 24 correct, 3 s", "ended")
    assert [item.label for item in board.running] == ["topk-50, seed 0"]
    assert board.done == 1.5


def test_trouble_and_notes_are_told_with_their_reason(board):
    note = board.receive(DENSE, event("note", DENSE, reason="a checkpoint is damaged"))
    assert (str(note), note.kind) == ("dense, seed 0: a checkpoint is damaged", "note")
    failed = board.receive(DENSE, event("failed", DENSE, reason="IndexError"))
    assert (str(failed), failed.kind) == ("[1 of 3] dense, seed 0: failed: IndexError", "trouble")
    elsewhere = board.receive(SPARSE, event("elsewhere", SPARSE))
    assert str(elsewhere) == "[2 of 3] topk-50, seed 0: is being trained by another process"


def test_what_was_not_planned_and_what_ends_all_are_left_to_others(board):
    other = RUNS["percentile-80", 0]
    assert board.receive(other, event("finished", other)) is None
    assert board.receive(DENSE, event("unsaved", DENSE, reason="the disk is full")) is None
    assert board.ended == 0


@pytest.mark.parametrize("width", [60, 120])
def test_bars_fit_their_terminal(board, width):
    board.receive(DENSE, event("progress", DENSE, step=3, steps=12, loss=0.5))
    output = io.StringIO()
    Console(file=output, width=width).print(display._bars(board))
    whole, run = output.getvalue().splitlines()
    assert whole.split()[:2] == ["all", "runs"]
    assert whole.split()[-3:] == ["0", "of", "3"]
    assert "step 3 of 12 loss 0.500" in run
    assert run.startswith("dense, seed 0")
    assert max(len(whole), len(run)) <= width


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_keeps_a_line_an_ended_run(board, terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100, color_system=None)
    with TerminalDisplay(console)._show(board) as receive:
        receive(None, Event("ready"))
        receive(DENSE, event("progress", DENSE, step=12, steps=12, loss=0.5))
        receive(DENSE, event("finished", DENSE, result="20 of 24 correct, 3 s"))
        receive(SPARSE, event("failed", SPARSE, reason="out of [memory]"))
    shown = output.getvalue()
    assert "[1 of 3] dense, seed 0: finished, 20 of 24 correct, 3 s" in shown
    assert "failed: out of [memory]" in shown.replace("; about 1 s left", "")
    assert ("all runs" in shown) == terminal


def test_a_notebook_shows_bars_the_last_ends_and_all_trouble(board):
    lines = [board.receive(SPARSE, event("failed", SPARSE, reason="<b>out of memory</b>"))]
    board.receive(DENSE, event("progress", DENSE, step=3, steps=12, loss=0.5))
    shown = words(render(board, lines))
    assert shown.startswith("All runs 1 of 3")
    assert "dense, seed 0: step 3 of 12, loss 0.500" in shown
    assert "failed: <b>out of memory</b>" in shown
    many = [board.receive(DENSE, event("note", DENSE, reason=f"note {number};")) for number in range(30)]
    shown = words(render(board, many))
    assert "10 more before these" in shown
    assert "note 9;" not in shown
    assert "note 10;" in shown
    assert read(render(board, [])).texts


def test_what_has_ended_does_not_flood_a_notebook():
    runs = {f"dense, seed {seed}": 1.0 for seed in range(40)}
    board = Progress("runs", runs, 1, lambda run: f"dense, seed {run.config.seed}")
    every = planned(make_spec(seeds=40))
    lines = [board.receive(run, event("finished", run)) for (arm, _), run in every.items() if arm == "dense"]
    shown = words(render(board, lines))
    assert "All runs 40 of 40" in shown
    assert shown.count("finished") == 3
    assert "[40 of 40] dense, seed 39: finished" in shown
