"""What makes two studies the same, and where they differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from crisp_attention.experiment.results.record import SCHEMA
from crisp_attention.experiment.specification.runs import Fingerprints
from crisp_attention.experiment.specification.spec import INCIDENTAL, ExperimentSpec, to_plain


def describe(spec: ExperimentSpec, prints: Fingerprints) -> dict[str, Any]:
    """A study as `study.json` holds it."""
    # One fingerprint where nothing varies, as the first release wrote it.
    data = prints.data[""] if spec.vary is None else dict(prints.data)
    study = {
        "schema": SCHEMA,
        "spec": to_plain(spec),
        "model": prints.model,
        "data": data,
        "identity": _identity(spec, prints.model, data, prints.evaluations),
        "seeds_asked": [spec.seeds],
    }
    return study | ({"evaluations": dict(prints.evaluations)} if prints.evaluations else {})


def _identity(spec: ExperimentSpec, model: str, data: str | dict[str, str], evaluations: Mapping[str, str]) -> str:
    content = spec.identity()
    # Content counts, not the place it was read from.
    del content["model"], content["data"]["source"], content["data"]["test"]
    for item in content.get("evaluations", []):
        item["source"] = evaluations[item["name"]]
    canonical = json.dumps([content, model, data], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first places where two studies differ, for an error message."""
    places = [key for key in ("model", "data") if old[key] != new[key]]
    ignored = {*INCIDENTAL, "model"}
    before, after = old["spec"], new["spec"]
    places += [key for key in sorted({*before, *after} - ignored) if before.get(key) != after.get(key)]
    return "different " + ", ".join(dict.fromkeys(places)) if places else "different specification"
