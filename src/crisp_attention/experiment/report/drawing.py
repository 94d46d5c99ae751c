"""How a picture is drawn: matplotlib's SVG, its colours left to the page that shows it."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from crisp_attention.experiment.report.theme import LIGHT, SERIES, picture_css

WIDTH = 5.2
"""Inches: at this width the type can still be read when a phone shows the whole."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
MANY = len(SERIES)
"""More lines than this are no longer told apart by colour: all but the ones that matter turn grey."""

# Matplotlib knows no CSS: each colour is drawn as a stand-in that occurs nowhere else, then replaced.
_STAND_INS = {name: f"#0000{number:02x}" for number, name in enumerate(LIGHT, start=0xA0)}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "crisp-attention",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.edgecolor": _STAND_INS["soft"],
    "axes.labelcolor": _STAND_INS["ink"],
    "axes.titlecolor": _STAND_INS["ink"],
    "axes.titlesize": 10,
    "text.color": _STAND_INS["ink"],
    "xtick.color": _STAND_INS["soft"],
    "ytick.color": _STAND_INS["soft"],
    "xtick.labelcolor": _STAND_INS["ink"],
    "ytick.labelcolor": _STAND_INS["ink"],
    "grid.color": _STAND_INS["line"],
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Drawing:
    """One picture.

    Attributes:
        name: File name without suffix.
        title: For the heading.
        description: What is seen, for the caption.
        values: The figures in it, for those who can't see it; tables have them for all others.
        svg: The drawing; its colours are custom properties of the page around it.
    """

    name: str
    title: str
    description: str
    values: str
    svg: str

    @property
    def file(self) -> str:
        """The drawing as a file that stands alone, on a light or a dark ground as the reader's system is."""
        start = self.svg.index(">") + 1
        return f"{self.svg[:start]}<style>{picture_css()}</style>{self.svg[start:]}"


def colour(name: str) -> str:
    """A colour of the theme, for matplotlib."""
    return _STAND_INS[name]


def series(number: int) -> str:
    """The colour of the number-th of several series, from 0."""
    return _STAND_INS[SERIES[number % len(SERIES)]]


@contextlib.contextmanager
def canvas(height: float, columns: int = 1, *, width: float = WIDTH, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure in the house style, and its axes.

    Args:
        height: Inches.
        columns: Axes side by side.
        width: Inches.
        **options: For `Figure.subplots`.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(1, columns, **options)


def rows(axes: Any, labels: Sequence[str]) -> None:
    """Let the vertical axis name one row a label, the first on top."""
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, 26) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def row_height(count: int) -> float:
    """Inches that a picture of so many rows needs."""
    return 0.9 + (0.42 if count <= 16 else 0.3) * count


def finish(figure: Figure, name: str, title: str, description: str, values: str) -> Drawing:
    """The figure as a `Drawing`, whose other attributes are given."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # Without the XML prologue and the metadata that name documents on the web, so that it can stand inside a page.
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several pictures stand in one page: ids must differ.
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for item, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{item})")
    return Drawing(name, title, description, values, svg)
