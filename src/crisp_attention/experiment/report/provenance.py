"""With what the runs were done, and what was asked for."""

from __future__ import annotations

from typing import Any

import tomlkit

from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.specification.spec import ExperimentSpec, to_plain


def spec_as_toml(spec: ExperimentSpec) -> str:
    """A specification as the TOML file that would ask for it."""
    content: dict[str, Any] = _told({key: value for key, value in to_plain(spec).items() if key != "arms"})
    content["arms"] = [arm.to_toml_dict() for arm in spec.arms]
    return tomlkit.dumps(content)


def provenance(analysis: Analysis) -> list[tuple[str, str]]:
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
        together = f", processes a run: {origin.processes}, examples a step: {record.effective_batch_size}"
        add(
            "device",
            f"{origin.device}, threads a run: {origin.threads}{together if origin.processes > 1 else ''}",
        )
        add("record schema", str(record.schema_version))
    return [(label, "; ".join(values)) for label, values in rows.items()]


def _told(content: Any) -> Any:
    """Plain data without what is None, which TOML cannot say."""
    if isinstance(content, dict):
        return {key: _told(value) for key, value in content.items() if value is not None}
    return [_told(value) for value in content] if isinstance(content, list) else content
