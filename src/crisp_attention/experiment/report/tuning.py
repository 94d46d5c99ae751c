"""How settings were chosen before the seeds ran: on what data, with what budget, and what was found."""

from __future__ import annotations

from statistics import median

from crisp_attention.experiment.conclusions.analysis import Analysis
from crisp_attention.experiment.report.tables import MISSING, Table, where
from crisp_attention.experiment.results.pruning import STARTUP_TRIALS
from crisp_attention.experiment.results.tuning import Tuning
from crisp_attention.experiment.specification import tuned
from crisp_attention.experiment.specification.spec import ExperimentSpec
from crisp_attention.experiment.specification.tune import told


def notes(analysis: Analysis) -> tuple[str, ...]:
    """What a reader must know of it; empty where nothing was to be tuned."""
    spec, found = analysis.spec, analysis.tuning
    if spec.tune is None:
        return ()
    if found is None:
        return ("The settings are not found yet: no run is done.",)
    epochs, seeds = spec.epochs_of_trials, spec.tune.seeds
    many = len(seeds) > 1
    sentences = [
        f"Before any seed ran, settings were searched{where(analysis)} with {spec.tune.trials} trials a search, each "
        f"of {epochs} epoch{'s' if epochs > 1 else ''} with "
        f"{f'each of the seeds {seeds[0]} to {seeds[-1]}' if many else f'seed {seeds[0]}'}. A trial trained on "
        f"{found.train_examples} examples of the training split and was judged by its loss after the last epoch on the "
        f"other {found.validation_examples}, held out by document, text or image"
        f"{', in the mean over its seeds' * many}.",
        "The evaluation split was not used. Arms that are trained alike share a search; all runs then trained on the "
        f"whole training split{' of their condition' if spec.vary else ''}. Optuna {found.optuna} proposed the trials "
        "(TPE).",
    ]
    if spec.tune.pruning:
        sentences.append(
            f"A trial was given up after an epoch{' of its first seed' * many} if its lowest loss so far was above the "
            f"median of the trials before it after that epoch, once {STARTUP_TRIALS} had been trained to their end: it "
            "counts as a trial, and is never chosen. The rule was the same for every arm."
        )
    return (*sentences, *_budgets(spec, found))


def searches(analysis: Analysis) -> Table | None:
    """One row a search and setting: where it was searched and what was found."""
    if analysis.tuning is None:
        return None
    own = zip(tuned.searches(analysis.spec), analysis.tuning.outcomes, strict=True)
    many = any(outcome.deviation is not None for outcome in analysis.tuning.outcomes)
    return Table(
        "Tuning",
        "What was searched and found, by search and setting. Losses are cross-entropy on the validation part, in nats, "
        "of the best trial and of the median one of those trained to their end: how much there was to gain."
        + " The seed SD is how far losses of one trial lie apart, pooled over trials."
        * many,
        ("arms", "setting", "searched", "found", "trials", "pruned", "diverged", "loss", "median loss")
        + ("seed SD",) * many,
        tuple(
            (
                ", ".join(outcome.arms),
                name,
                str(found),
                told(outcome.best.values[name]),
                str(len(outcome.trials)),
                str(outcome.pruned),
                str(outcome.diverged),
                f"{outcome.losses[0]:.4f}",
                f"{median(outcome.losses):.4f}",
                *([MISSING if outcome.deviation is None else f"{outcome.deviation:.4f}"] * many),
            )
            for search, outcome in own
            for name, found in search.ranges.items()
        ),
        prose=("setting", "searched", "found"),
    )


def _budgets(spec: ExperimentSpec, found: Tuning) -> list[str]:
    idle = [arm.name for arm in spec.arms if arm.name not in found.values]
    return [f"Nothing was searched for {', '.join(idle)}."] if idle else []
