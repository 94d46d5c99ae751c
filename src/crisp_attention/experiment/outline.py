"""A plan in words and rows: the same in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crisp_attention.experiment.outlook import duration
from crisp_attention.experiment.report.tables import Table
from crisp_attention.experiment.results.tuning import Trial
from crisp_attention.experiment.specification.sections import ArmSpec
from crisp_attention.experiment.specification.tune import told
from crisp_attention.experiment.specification.tuned import Search
from crisp_attention.schedule import KINDS

if TYPE_CHECKING:
    from crisp_attention.experiment.study import Plan

SETTINGS = "what it is"
"""The column that a narrow terminal does without."""


@dataclass(frozen=True)
class Outline:
    """What a plan says.

    Attributes:
        name: Of the experiment.
        size: Of what it consists.
        notes: What there is to know of its data.
        arms: One row an arm: what of it is done and to do.
        trouble: How many runs diverged or failed, where none of them is done again; else empty.
        tuning: What is searched before the runs, or what was found.
        todo: What is to do, how, and how long it takes.
        done: Whether nothing is.
    """

    name: str
    size: str
    notes: tuple[str, ...]
    arms: Table
    trouble: str
    tuning: tuple[str, ...]
    todo: str
    done: bool


def outline(plan: Plan) -> Outline:
    """Put a plan into words."""
    troubled = sum(record.status != "finished" for record in plan.records.values())
    again = any(task.before for task in plan.pending)
    first, *others = plan.data.conditions.values()
    return Outline(
        name=plan.spec.name,
        size=_size(plan),
        notes=(
            *(note for note in first.notes if all(note in other.notes for other in others)),
            *([] if plan.cut is None else [plan.cut]),
            *([] if plan.source is None else [_taken(len(plan.taken), plan.source.folder)]),
        ),
        arms=_arms(plan, troubled=bool(troubled)),
        trouble=f"{count(troubled, 'run')} diverged or failed" if troubled and not again else "",
        tuning=tuple(_tuning(plan)),
        todo=_todo(plan),
        done=not plan.pending,
    )


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(plan: Plan) -> str:
    spec = plan.spec
    conditions = "" if spec.vary is None else f" x {len(spec.conditions())} conditions ({', '.join(spec.conditions())})"
    sizes = [len(dataset.train) for dataset in plan.data.conditions.values()]
    epochs = [spec.epochs_in(condition) for condition in spec.conditions()]
    return (
        f"{len(spec.arms)} arms x {count(spec.seeds, 'seed')}{conditions} of {spec.model} on {spec.data.source}, "
        f"{' to '.join(map(str, sorted({min(sizes), max(sizes)})))} training and {len(plan.data.test)} test examples, "
        f"{', '.join(map(str, epochs)) + ' epochs' if len(set(epochs)) > 1 else count(epochs[0], 'epoch')}."
    )


def _taken(runs: int, source: Path) -> str:
    """What comes from another run directory."""
    if not runs:
        return f"{source} has no finished run that is missing here."
    return f"{count(runs, 'finished run')} from {source} {'is' if runs == 1 else 'are'} taken over."


def _arms(plan: Plan, *, troubled: bool) -> Table:
    rows = []
    for arm in plan.spec.arms:
        records = [plan.records.get(run.config.run_id) for run in plan.runs if run.arm == arm.name]
        done, trouble = (
            sum(record is not None and (record.status == "finished") == well for record in records)
            for well in (True, False)
        )
        pending = sum(task.run.arm == arm.name for task in plan.pending)
        seconds = [plan.seconds[cell] for cell in plan.seconds if cell[0] == arm.name]
        rows.append(
            (
                arm.name,
                _settings(arm),
                f"{done}/{len(records)}",
                *([str(trouble)] if troubled else []),
                str(pending),
                duration(min(seconds), max(seconds)) if seconds else "",
            )
        )
    header = ("arm", SETTINGS, "done", *(["trouble"] if troubled else []), "to do", "a run")
    return Table("Plan", "Runs of each arm, and how long one takes.", header, tuple(rows), prose=(SETTINGS,))


def _todo(plan: Plan) -> str:
    part = "" if plan.shard is None else f" in shard {plan.shard}"
    if not plan.pending:
        whole = f"of {count(len(plan.runs), 'run')}" if plan.shard is None else "runs"
        return f"All {whole}{part} are done."
    division = plan.division
    side = f"{division.jobs} at a time" if division.jobs > 1 else "one after another"
    side = " ".join(filter(None, (side, division.place)))
    about = "nobody knows how long" if plan.remaining is None else f"about {duration(plan.remaining)}"
    states = [f"{plan.elsewhere} in training in another process"] * bool(plan.elsewhere)
    states += [f"{plan.begun} begun: from the last checkpoint"] * bool(plan.begun)
    begun = f" ({'; '.join(states)})" if states else ""
    todo = f"{count(len(plan.pending), 'run')} to do{part}{begun}"
    by = f"{division.processes} processes with " if division.processes > 1 else ""
    return f"{todo}, {side}, {by}{count(division.threads, 'thread')} each: {about}."


def _tuning(plan: Plan) -> list[str]:
    """What is searched before the runs, or what was found."""
    lines = []
    if (todo := plan.tuning) is not None:
        trials, done = len(todo.searches) * todo.trials, len(todo.searches) * todo.trials - todo.left
        about = "" if plan.searching is None else f", about {duration(plan.searching)}"
        seeds = f", each with {todo.seeds} seeds" if todo.seeds > 1 else ""
        judged = f"the mean loss of its {todo.seeds} seeds" if todo.seeds > 1 else "the loss"
        lines.append(
            f"Tuning first: {count(trials, 'trial')}, {todo.trials} a search{seeds}"
            f"{f', {done} of them done' if done else ''}{about}. Each trains on {len(todo.data.train)} training "
            f"examples and is judged by {judged} on {len(todo.data.test)} held out from them; the evaluation split is "
            "not used."
        )
        lines += [f"{_together(search.arms)}: {_ranges(search)}" for search in todo.searches]
        idle = [arm.name for arm in plan.spec.arms if not plan.spec.searched(arm)]
        lines += [f"{_together(idle)}: nothing to search"] if idle else []
        lines += ["Whichever shard begins first searches; the others wait for what it finds."] if plan.shard else []
    elif plan.tuned is not None:
        lines.append(f"Tuned, with {count(plan.tuned.trials, 'trial')} a search:")
        lines += [f"{_together(item.arms)}: {_values(item.best)}" for item in plan.tuned.outcomes]
    return lines


def _ranges(search: Search) -> str:
    return "; ".join(f"{name} {found}" for name, found in search.ranges.items())


def _values(trial: Trial) -> str:
    return "; ".join(f"{name} {told(value)}" for name, value in trial.values.items())


def _together(arms: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(arms[:-1]), arms[-1])))


def _schedule(settings: Mapping[str, Any]) -> str:
    """A schedule by its kind, and by what is not the default of that."""
    kind = settings["kind"]
    changed = [f"{key}={value}" for key, value in settings.items() if key != "kind" and value != KINDS[kind][key]]
    return f"{kind}({', '.join(changed)})" if changed else kind


def _settings(arm: ArmSpec) -> str:
    """An arm's settings in a line, with the keys of the specification's TOML."""

    def told(content: Mapping[str, Any]) -> list[str]:
        return [f"{key}={_schedule(value) if key == 'schedule' else value}" for key, value in content.items()]

    content = arm.to_toml_dict()
    evaluate, training = content.pop("evaluate", None), content.pop("training", {})
    del content["name"]
    for told_elsewhere in ("rule", "tune"):
        content.pop(told_elsewhere, None)
    line = " ".join((arm.attention.rule if arm.attention.removes else "dense", *told(content), *told(training)))
    return line if evaluate is None else f"{line}; evaluated {' '.join(told(evaluate)) or 'dense'}"
