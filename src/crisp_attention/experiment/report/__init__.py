"""What people read: tables, plots, Markdown and one self-contained HTML page. Made from an `Analysis` alone."""

from __future__ import annotations

from pathlib import Path

from crisp_attention.experiment.analysis import Analysis
from crisp_attention.experiment.report.pages import render_html, render_markdown
from crisp_attention.experiment.report.plots import figures
from crisp_attention.experiment.store import write_atomically

__all__ = ["write"]


def write(analysis: Analysis, folder: Path) -> Path:
    """Write `report.md`, `report.html` and `figures/*.svg` into a run directory.

    The same records give the same bytes.

    Args:
        analysis: What to report.
        folder: The run directory.

    Returns:
        The HTML page.
    """
    drawings = figures(analysis)
    (folder / "figures").mkdir(exist_ok=True)
    for drawing in drawings:
        write_atomically(folder / "figures" / f"{drawing.name}.svg", drawing.svg.encode())
    write_atomically(folder / "report.md", render_markdown(analysis, drawings).encode())
    page = folder / "report.html"
    write_atomically(page, render_html(analysis, drawings).encode())
    return page
