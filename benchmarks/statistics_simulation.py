"""How often is the verdict wrong, and how often does it find what is there?

Experiments are simulated whose truth is known. Each run answers N examples; an example's margin is the sum of a mean,
the example's own difficulty, the seed's luck (partly shared by both arms of a pair, as in paired training) and what is
particular to the run and example; above 0 the answer is right. Seeds and examples are both drawn anew in every
experiment.

- `identical`: both arms follow one law. Any verdict but "inconclusive" or "equivalent" is an error.
- `equal on average`: each arm has examples that suit it, and over all examples that there could be neither is better.
  On any 872 of them one is: seeds alone make such a difference look certain.
- `effect`: the arm is better by as much as a paired t test over seeds detects with 80% power.
- `effect for a verdict`: the arm is better by as much as the report says that a verdict finds with 80% power.
- `margin`: the arm is better by exactly the margin of equivalence. "Equivalent" is an error.
- `alike`, `alike, margin`: the same where both arms of a pair answer nearly alike, so that "equivalent" is in reach.
- `looks`: identical arms, looked at after 5, 10 and 20 seeds, 5% shared equally; an error at any look counts.

    python benchmarks/statistics_simulation.py [--experiments 2000] [--examples 872] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import keep
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from crisp_attention.experiment.conclusions.verdict import judge
from crisp_attention.experiment.statistics import (
    ALPHA,
    EQUIVALENCE_MARGIN,
    Contrast,
    Pair,
    contrasts,
    detectable_effect,
    look_at,
)

ACCURACY = 0.88
SEEDS = (6, 10, 20)
LOOKS = (5, 10, 20)
_BATCH = 40

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Law:
    """Standard deviations of what margins consist of.

    Attributes:
        example: Difficulty, shared by all runs.
        suits: What suits one arm in an example, for each arm on its own.
        seed: Luck of a seed, shared by the pair.
        run: Luck of a run.
        pair: Particular to a seed and an example, shared by the pair.
        noise: Particular to a run and an example.
    """

    example: float = 1.0
    suits: float = 0.0
    seed: float = 0.02
    run: float = 0.02
    pair: float = 0.2
    noise: float = 0.25

    def draw(self, seeds: int, examples: int, gain: float, random: np.random.Generator) -> tuple[Array, Array]:
        """Who is right: the arm's and the baseline's `[S, N]`, the arm better by `gain` points in expectation."""
        shared = (
            self.example * random.normal(size=(1, examples))
            + self.seed * random.normal(size=(seeds, 1))
            + self.pair * random.normal(size=(seeds, examples))
        )
        parts = (self.example, self.suits, self.seed, self.run, self.pair, self.noise)
        total = float(np.sqrt(np.square(parts).sum()))
        arm, baseline = (
            total * stats.norm.ppf(ACCURACY + points / 100)
            + shared
            + self.suits * random.normal(size=(1, examples))
            + self.run * random.normal(size=(seeds, 1))
            + self.noise * random.normal(size=(seeds, examples))
            > 0
            for points in (gain, 0.0)
        )
        return arm, baseline

    def spread(self, examples: int, random: np.random.Generator) -> float:
        """Standard deviation of the paired differences on given examples, points; by simulation."""
        spreads = []
        for _ in range(50):
            arm, baseline = self.draw(100, examples, 0.0, random)
            spreads.append((arm.mean(axis=1) - baseline.mean(axis=1)).var(ddof=1))
        return float(100 * np.sqrt(np.mean(spreads)))


IDENTICAL = Law()
EQUAL_ON_AVERAGE = Law(suits=0.15)
ALIKE = Law(run=0.002, noise=0.03)


def simulated(
    law: Law,
    seeds: int,
    examples: int,
    gain: float,
    experiments: int,
    random: np.random.Generator,
    alpha: float = ALPHA,
) -> Iterator[Contrast]:
    """Contrasts of as many experiments. A few at a time share the draws of the bootstrap, to save time."""
    for start in range(0, experiments, _BATCH):
        count = min(_BATCH, experiments - start)
        pairs = [Pair("arm", "baseline", *law.draw(seeds, examples, gain, random)) for _ in range(count)]
        yield from contrasts(pairs, random, alpha)


def word(contrast: Contrast) -> str:
    """The verdict on a contrast."""
    return judge(contrast, contrast.arm, contrast.baseline, contrast.seeds).word


def rate(hits: int, of: int) -> dict[str, float]:
    """A share with its 95% Clopper-Pearson interval: what the number of experiments leaves open."""
    low, high = proportion_confint(hits, of, method="beta")
    return {"share": hits / of, "low": float(low), "high": float(high)}


def summary(found: list[Contrast]) -> dict[str, Any]:
    """How often each test spoke, and each verdict was given."""
    words = [word(item) for item in found]
    count = len(found)
    return {
        "experiments": count,
        "sign_flip": rate(sum(item.p_value < item.alpha for item in found), count),
        "bootstrap": rate(sum(item.interval.low > 0 or item.interval.high < 0 for item in found), count),
        "helps": rate(words.count("helps"), count),
        "hurts": rate(words.count("hurts"), count),
        "helps_or_hurts": rate(words.count("helps") + words.count("hurts"), count),
        "equivalent": rate(words.count("equivalent"), count),
        "mean_spread": float(np.mean([item.spread or 0.0 for item in found])),
        "mean_detectable": float(np.mean([item.detectable or 0.0 for item in found])),
        "mean_detectable_verdict": float(np.mean([item.detectable_verdict or 0.0 for item in found])),
    }


def covered(found: list[Contrast], truth: float) -> dict[str, float]:
    """How often the crossed bootstrap's interval holds the true difference."""
    return rate(sum(item.interval.low <= truth <= item.interval.high for item in found), len(found))


def looks(law: Law, examples: int, experiments: int, random: np.random.Generator) -> dict[str, Any]:
    """Errors at any of the planned looks, with 5% shared and, for comparison, with 5% at each."""
    alpha = look_at(LOOKS, LOOKS[-1]).alpha
    shared = np.zeros(experiments, dtype=bool)
    unshared = np.zeros(experiments, dtype=bool)
    for start in range(0, experiments, _BATCH):
        count = min(_BATCH, experiments - start)
        drawn = [law.draw(LOOKS[-1], examples, 0.0, random) for _ in range(count)]
        for seeds in LOOKS:
            pairs = [Pair("arm", "baseline", arm[:seeds], baseline[:seeds]) for arm, baseline in drawn]
            for place, found in enumerate(contrasts(pairs, random, alpha)):
                shared[start + place] |= word(found) in ("helps", "hurts")
                unshared[start + place] |= found.p_value < ALPHA
    return {
        "experiments": experiments,
        "looks": LOOKS,
        "alpha_at_each": alpha,
        "helps_or_hurts_at_any": rate(int(shared.sum()), experiments),
        "sign_flip_at_5_percent_at_any": rate(int(unshared.sum()), experiments),
    }


def main() -> None:
    """Simulate, print as it goes, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=872)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures: dict[str, Any] = {}

    def generator(name: str) -> np.random.Generator:
        return np.random.default_rng([options.seed, *name.encode()])

    def tell(name: str, entry: dict[str, Any]) -> None:
        figures[name] = entry
        shares = {key: value for key, value in entry.items() if isinstance(value, dict)}
        told = ", ".join(
            f"{key} {100 * value['share']:.1f}% ({100 * value['low']:.1f}..{100 * value['high']:.1f})"
            for key, value in shares.items()
        )
        print(f"{name}: {told}", flush=True)

    def compare(name: str, law: Law, seeds: int, gain: float) -> dict[str, Any]:
        name = f"{name}, {seeds} seeds"
        found = list(simulated(law, seeds, options.examples, gain, options.experiments, generator(name)))
        tell(name, {"gain": gain, **summary(found), "covers": covered(found, gain)})
        return figures[name]

    spread = IDENTICAL.spread(options.examples, generator("spread"))
    print(f"spread of paired differences: {spread:.3f} points", flush=True)
    for seeds in SEEDS:
        compare("identical", IDENTICAL, seeds, 0.0)
        compare("equal on average", EQUAL_ON_AVERAGE, seeds, 0.0)
        effect = compare("effect", IDENTICAL, seeds, detectable_effect(spread, seeds))
        compare("effect for a verdict", IDENTICAL, seeds, effect["mean_detectable_verdict"])
        compare("margin", IDENTICAL, seeds, EQUIVALENCE_MARGIN)
        compare("alike", ALIKE, seeds, 0.0)
        compare("alike, margin", ALIKE, seeds, EQUIVALENCE_MARGIN)
    tell("looks", looks(IDENTICAL, options.examples, options.experiments, generator("looks")))
    keep(options, accuracy=ACCURACY, spread=spread, figures=figures)


if __name__ == "__main__":
    main()
