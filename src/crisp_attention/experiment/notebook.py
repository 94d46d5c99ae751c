"""Progress below a notebook's cell: one output that is written anew, and stays as it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from crisp_attention.experiment import progress
from crisp_attention.experiment.execution.worker import Event
from crisp_attention.experiment.progress import Line, Progress
from crisp_attention.experiment.specification.runs import PlannedRun
from crisp_attention.experiment.study import Plan
from crisp_attention.representation import bullets, card, meter

_PAUSE_SECONDS = 0.25
"""Between two writings, so that many short steps do not keep the browser busy."""

_LAST = 3
"""How many ended runs are told of at a time."""

_MOST_TROUBLE = 20
"""How many notes and runs in trouble stay to be read; the report has all."""


class NotebookDisplay:
    """Shows a study's progress in Jupyter and what is like it."""

    def announce(self, message: str) -> None:
        """Say what happens next."""
        print(message, flush=True)

    def present(self, plan: Plan) -> None:
        """Show what is about to be done."""
        from IPython.display import display

        display(plan)

    def tuning(self, plan: Plan) -> AbstractContextManager[Callable[[PlannedRun | None, Event], None]]:
        """Show the trials of a plan while they are trained."""
        return _show(progress.of_trials(plan))

    def training(self, plan: Plan) -> AbstractContextManager[Callable[[PlannedRun | None, Event], None]]:
        """Show the runs of a plan while they are trained."""
        return _show(progress.of_runs(plan))


@contextlib.contextmanager
def _show(board: Progress) -> Iterator[Callable[[PlannedRun | None, Event], None]]:
    from IPython.display import HTML, display

    lines: list[Line] = []
    view = display(HTML(render(board, lines)), display_id=True)
    written = time.monotonic()

    def receive(planned: PlannedRun | None, event: Event) -> None:
        nonlocal written
        line = board.receive(planned, event)
        if line is not None:
            lines.append(line)
        if time.monotonic() - written >= _PAUSE_SECONDS:
            view.update(HTML(render(board, lines)))
            written = time.monotonic()

    try:
        yield receive
    finally:
        view.update(HTML(render(board, lines)))


def render(board: Progress, lines: list[Line]) -> str:
    """Progress as HTML.

    Args:
        board: How far all is.
        lines: What was told so far.
    """
    bars = [meter(f"{board.ended} of {board.total}{f', {board.left}' * bool(board.left)}", board.done, board.total)]
    bars += [
        meter(f"{item.label}: step {item.step} of {item.steps}, loss {item.loss:.3f}", item.step, item.steps)
        for item in board.running
    ]
    ended = [str(line) for line in lines if line.kind == "ended"]
    others = [str(line) for line in lines if line.kind != "ended"]
    if len(others) > _MOST_TROUBLE:
        others = [f"{len(others) - _MOST_TROUBLE} more before these", *others[-_MOST_TROUBLE:]]
    return card(f"All {board.kind}", *bars, bullets(ended[-_LAST:]), bullets(others))
