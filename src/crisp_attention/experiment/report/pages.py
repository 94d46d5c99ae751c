"""Markdown and HTML from one set of tables, drawings and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tomlkit
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crisp_attention.experiment.analysis import Analysis
from crisp_attention.experiment.report import tables
from crisp_attention.experiment.report.plots import Drawing
from crisp_attention.experiment.spec import ExperimentSpec, to_plain


def render_markdown(analysis: Analysis, drawings: Sequence[Drawing]) -> str:
    """The report as Markdown; pictures are files in `figures/`."""
    return _environment(autoescape=False).get_template("report.md.j2").render(_context(analysis, drawings))


def render_html(analysis: Analysis, drawings: Sequence[Drawing]) -> str:
    """The report as one HTML page that needs nothing else; all text from data is escaped."""
    return _environment(autoescape=True).get_template("report.html.j2").render(_context(analysis, drawings))


def spec_as_toml(spec: ExperimentSpec) -> str:
    """A specification as the TOML file that would ask for it."""
    content = _told({key: value for key, value in to_plain(spec).items() if key != "arms"})
    content["arms"] = [arm.to_toml_dict() for arm in spec.arms]
    return tomlkit.dumps(content)


def _told(content: dict[str, Any]) -> dict[str, Any]:
    """A mapping without what is None, which TOML cannot say."""
    return {
        key: _told(value) if isinstance(value, dict) else value for key, value in content.items() if value is not None
    }


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("crisp_attention.experiment.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    environment.filters["trusted_svg"] = Markup
    return environment


def _context(analysis: Analysis, drawings: Sequence[Drawing]) -> dict[str, Any]:
    return {
        "analysis": analysis,
        "spec": analysis.spec,
        "verdict": analysis.verdict,
        "drawings": drawings,
        "arms": tables.arms(analysis),
        "contrasts": tables.contrasts(analysis),
        "runs": tables.runs(analysis),
        "toml": spec_as_toml(analysis.spec),
        "provenance": _provenance(analysis),
        "notes": analysis.records[0].provenance.data_notes if analysis.records else (),
    }


def _provenance(analysis: Analysis) -> list[tuple[str, str]]:
    """Label and value pairs; values that differ between runs are all listed."""
    rows: dict[str, dict[str, None]] = {}

    def add(label: str, value: str) -> None:
        rows.setdefault(label, {})[value] = None

    for record in analysis.records:
        origin = record.provenance
        add("model", f"{origin.model} ({record.parameters:,} trained parameters)")
        add("weights sha256", origin.weights_fingerprint)
        add("data", origin.data)
        add("data sha256", origin.data_fingerprint)
        add("classes", ", ".join(record.classes))
        for name, version in origin.packages.items():
            add(name, version)
        add(
            "code",
            f"{origin.git['commit'][:12]}{' (modified)' if origin.git['dirty'] else ''}"
            if origin.git
            else "no checkout",
        )
        add("platform", ", ".join(origin.platform[key] for key in ("system", "machine", "python")))
        add("device", f"{origin.device}, threads a run: {origin.threads}")
    return [(label, "; ".join(values)) for label, values in rows.items()]
