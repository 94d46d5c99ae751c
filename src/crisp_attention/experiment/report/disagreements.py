"""What flipped: the examples on which the two arms of the primary contrast disagree, and where each looked."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.report.sections import Section
from crisp_attention.experiment.report.tables import Table, p
from crisp_attention.experiment.results.examples import Examples
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.statistics import Array

_SHOWN = 20
_MAPS_BYTES = 1_500_000
"""Most bytes of attention maps in a page, so that it still opens on a phone."""


@dataclass(frozen=True)
class Maps:
    """Attention maps of both arms, for the page's script.

    Attributes:
        arms: The baseline and the arm.
        note: What is seen.
        examples: What the reader chooses from: `title`, `text`, `tokens` and `maps`, one base64 text of uint8
            `[L, T, T]` an arm.
        layers: L.
    """

    arms: tuple[str, str]
    note: str
    examples: tuple[dict[str, Any], ...]
    layers: int

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads."""
        return {"arms": self.arms, "layers": self.layers, "examples": self.examples}


def what_flipped(analysis: Analysis, examples: Examples | None) -> Section | None:
    """The most disputed examples of the primary contrast; None where there is none to be made."""
    primary = analysis.primary
    if primary is None:
        return None
    arm, baseline = primary.arm, primary.baseline
    notes = []
    if not analysis.flips:
        notes.append(f"There is no example on which {arm} and {baseline} disagree in most of the paired seeds.")
    elif examples is None:
        notes.append("The texts are not kept beside these records, so that examples are shown by number.")
    elif not examples.texts:
        notes.append("The examples are no texts, so that they are shown by number.")
    shown = analysis.flips[:_SHOWN]
    table = Table(
        "Disagreements",
        f"The {len(shown)} most disputed of {primary.examples} evaluation examples: exactly one of the two arms is "
        f"right in most of the {primary.seeds} paired seeds. Right: share of seeds; P: mean probability of the true "
        "class. Chosen for their disagreement: they say where the arms differ, not which is better.",
        (
            "example",
            "text",
            "class",
            f"{baseline} right",
            f"{arm} right",
            f"{baseline} P",
            f"{arm} P",
        ),
        tuple(
            (
                str(flip.row),
                _text(examples, flip.row),
                flip.label,
                f"{100 * flip.baseline_right:.0f}%",
                f"{100 * flip.arm_right:.0f}%",
                f"{flip.baseline_probability:.2f}",
                f"{flip.arm_probability:.2f}",
            )
            for flip in shown
        ),
        prose=("text", "class"),
    )
    checkpoints = Table(
        "Pairs of checkpoints",
        f"The two checkpoints of each seed: examples that only one of them classified correctly, of {primary.examples}"
        ". p: exact McNemar test, of these two checkpoints and not of the arms.",
        ("seed", f"only {arm}", f"only {baseline}", "p"),
        tuple(
            (_seeds(analysis, item.index), str(item.only_arm), str(item.only_baseline), p(item.p_value))
            for item in analysis.mcnemar
        ),
    )
    return Section("disagreements", "What flipped", tuple(notes), tables=((table,) if shown else ()) + (checkpoints,))


def attention_maps(analysis: Analysis, store: Store, examples: Examples | None) -> Maps | None:
    """The attention maps that the runs of both arms kept; None where they kept none.

    Raises:
        RecordError: If a file of outputs is missing or damaged.
    """
    if analysis.primary is None:
        return None
    pair = (analysis.primary.baseline, analysis.primary.arm)
    arms = [analysis.arm(name) for name in pair]
    seed = min(arms[0].records.keys() & arms[1].records.keys())
    arrays = [store.load_arrays(item.records[seed]) for item in arms]
    if any("maps" not in item for item in arrays):
        return None
    kept = [_by_row(item) for item in arrays]
    rows = [row for row in kept[0] if row in kept[1] and kept[0][row].shape == kept[1][row].shape]
    disputed = [flip.row for flip in analysis.flips]
    rows.sort(key=lambda row: disputed.index(row) if row in disputed else len(disputed))
    chosen: list[dict[str, Any]] = []
    room = _MAPS_BYTES
    for row in rows:
        room -= 2 * kept[0][row].size
        if room < 0:
            break
        text = _text(examples, row)
        chosen.append(
            {
                "title": f"{row}{' (disputed)' if row in disputed else ''}: {_shortened(text)}",
                "text": text,
                "tokens": _tokens(examples, row, kept[0][row].shape[1]),
                "maps": [base64.b64encode(own[row].tobytes()).decode() for own in kept],
            }
        )
    if not chosen:
        return None
    note = (
        f"Mean over heads, seed {arms[0].records[seed].config['seed']}, on {len(chosen)} of {len(rows)} examples whose "
        "maps were kept. The darker (in dark mode: the brighter), the more attention."
    )
    return Maps(pair, note, tuple(chosen), int(arrays[0]["map_layers"]))


def _seeds(analysis: Analysis, index: int) -> str:
    """The seed of a pair as the runs have it; both, the arm's first, where an offset sets them apart."""
    primary = analysis.spec.primary
    seeds = (str(analysis.arm(name).records[index].config["seed"]) for name in (primary.arm, primary.baseline))
    return " / ".join(dict.fromkeys(seeds))


def _by_row(arrays: dict[str, Array]) -> dict[int, Array]:
    """The maps of one run, uint8 `[L, T, T]` by example."""
    layers = int(arrays["map_layers"])
    found, start = {}, 0
    for row, length in zip(arrays["map_rows"].tolist(), arrays["map_lengths"].tolist(), strict=True):
        size = layers * length * length
        found[row] = arrays["maps"][start : start + size].reshape(layers, length, length)
        start += size
    return found


def _text(examples: Examples | None, row: int) -> str:
    if examples is None or row >= len(examples.texts):
        return f"example {row}"
    pair = f" / {examples.pairs[row]}" if row < len(examples.pairs) else ""
    return examples.texts[row] + pair


def _shortened(text: str) -> str:
    return text if len(text) < 60 else f"{text[:57]}..."


def _tokens(examples: Examples | None, row: int, count: int) -> tuple[str, ...]:
    tokens: tuple[str, ...] = ()
    if examples is not None and row in examples.map_rows:
        tokens = examples.map_tokens[examples.map_rows.index(row)]
    return tokens if len(tokens) == count else tuple(str(number) for number in range(1, count + 1))
