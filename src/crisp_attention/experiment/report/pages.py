"""Markdown and HTML from one set of sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.report.disagreements import Maps
from crisp_attention.experiment.report.drawing import Drawing
from crisp_attention.experiment.report.provenance import provenance, spec_as_toml
from crisp_attention.experiment.report.sections import Section
from crisp_attention.experiment.report.templating import environment


@dataclass(frozen=True)
class Content:
    """What both pages say.

    Attributes:
        findings: Sections of results.
        disagreements: What flipped; None without a primary contrast.
        maps: Attention maps for it; None where none were kept.
        closing: Sections after it.
    """

    findings: tuple[Section, ...]
    disagreements: Section | None
    maps: Maps | None
    closing: tuple[Section, ...]

    @property
    def drawings(self) -> list[Drawing]:
        """All pictures."""
        return [drawing for section in (*self.findings, *self.closing) for drawing in section.drawings]


def render_markdown(analysis: Analysis, content: Content) -> str:
    """The report as Markdown; pictures are files in `figures/`."""
    return environment(autoescape=False).get_template("report.md.j2").render(_context(analysis, content))


def render_html(analysis: Analysis, content: Content) -> str:
    """The report as one HTML page that needs nothing else; all text from data is escaped."""
    return environment(autoescape=True).get_template("report.html.j2").render(_context(analysis, content))


def _context(analysis: Analysis, content: Content) -> dict[str, Any]:
    return {
        "analysis": analysis,
        "spec": analysis.spec,
        "verdict": analysis.verdict,
        "sections": content.findings,
        "disagreements": content.disagreements,
        "maps": content.maps,
        "closing": content.closing,
        "toml": spec_as_toml(analysis.spec),
        "provenance": provenance(analysis),
        "notes": _data_notes(analysis),
    }


def _data_notes(analysis: Analysis) -> list[str]:
    """What there is to know of the data; what holds in some conditions alone is told with their names."""
    by_condition = {
        condition: next((record.provenance.data_notes for arm in arms for record in arm.records.values()), ())
        for condition, arms in analysis.by_condition.items()
    }
    done = {condition: own for condition, own in by_condition.items() if own}
    told = []
    for note in dict.fromkeys(note for own in done.values() for note in own):
        of = [condition for condition, own in done.items() if note in own]
        told += [note] if len(of) == len(done) else [f"{condition}: {note}" for condition in of]
    return told
