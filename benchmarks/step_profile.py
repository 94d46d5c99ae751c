"""Where does a fine-tuning step of MiniLM-L6 spend its time, dense and sparse?

Steps of the bare loop of `finetuning_throughput.py` on batches of real sentences under torch's profiler, arms
in turn. Each operator's own time goes to one part of the step; what the profiler itself takes is in it.

    python benchmarks/step_profile.py [--dataset movie-snippets] [--steps 6] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from pathlib import Path

import torch
from figures import keep
from finetuning_throughput import ARMS, BATCH, Loop
from torch.profiler import ProfilerActivity, profile

from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.specification.sections import DataSpec
from crisp_attention.experiment.training import model
from crisp_attention.experiment.training.workbench import Workbench, silence_training

COMPARED = {"torch's": None} | {arm: ARMS[arm] for arm in ("dense", "topk-80", "percentile-80")}
PARTS = {
    "linear layers": ("aten::mm", "addmm"),
    "attention": ("_Attention", "bmm", "softmax", "bitwise", "shift"),
    "optimiser": ("adamw", "AdamW", "foreach", "vector_norm"),
    "GELU and layer norm": ("gelu", "layer_norm"),
    "dropout by torch": ("bernoulli", "native_dropout"),
}
"""Part of a step -> what its operators' names contain; the first that fits."""
REST = "all else: copies, sums, products"


def part(name: str) -> str:
    """To which part of a step an operator belongs."""
    return next((part for part, names in PARTS.items() if any(each in name for each in names)), REST)


def measure(loop: Loop, steps: int) -> tuple[dict[str, float], Counter[str]]:
    """Milliseconds a step by part, and by operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            loop.step()
    operators: Counter[str] = Counter()
    for event in profiled.key_averages():
        operators[event.key] += event.self_cpu_time_total / 1000 / steps
    parts = dict.fromkeys((*PARTS, REST), 0.0)
    for name, milliseconds in operators.items():
        parts[part(name)] += milliseconds
    return parts, operators


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="movie-snippets")
    parser.add_argument("--steps", type=int, default=6, help="of an arm in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--operators", type=int, default=0, metavar="N", help="name the N that take longest, too")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    silence_training()
    count = options.steps * BATCH
    loaded = dataset.load(DataSpec(source=options.dataset, train_examples=count, test_examples=32), print)
    bench = Workbench(model.resolve("minilm-l6", print), dataset.ExperimentData({"": loaded}))
    loops = {arm: Loop(bench, config) for arm, config in COMPARED.items()}
    for loop in loops.values():
        loop.step()  # warm-up, not counted
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in COMPARED}
    for _ in range(options.rounds):
        for arm, loop in loops.items():
            parts, operators = measure(loop, options.steps)
            found[arm].append(parts)
            for name, milliseconds in operators.most_common(options.operators):
                print(f"{arm:16}{milliseconds:9.2f} ms  {name}")
    medians = {
        arm: {name: statistics.median(each[name] for each in rounds) for name in (*PARTS, REST)}
        for arm, rounds in found.items()
    }
    print(f"\n{'ms a step':38}" + "".join(f"{arm:>16}" for arm in COMPARED))
    for name in (*PARTS, REST):
        print(f"{name:38}" + "".join(f"{medians[arm][name]:16.1f}" for arm in COMPARED))
    print(f"{'sum':38}" + "".join(f"{sum(medians[arm].values()):16.1f}" for arm in COMPARED))
    print(f"medians of {options.rounds} rounds")
    keep(options, milliseconds=found)


if __name__ == "__main__":
    main()
