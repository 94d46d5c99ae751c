"""Timing attention: all variants in turn, round after round, so that a machine's drift meets all alike.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crisp_attention.bench.variants import BASELINE, VARIANTS, Attention, Variant
from crisp_attention.errors import ConfigurationError


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    Attributes:
        device: Where.
        dtype: Of queries, keys and values.
        lengths: Numbers of tokens N.
        tokens: Tokens in a batch: B = max(1, tokens // N).
        heads: H.
        width: D.
        sparsity: Share of scores to remove.
        rounds: How often each variant is timed at each length.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    tokens: int = 4096
    heads: int = 12
    width: int = 64
    sparsity: float = 0.8
    rounds: int = 7

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name in ("tokens", "heads", "width", "rounds", *(f"lengths[{at}]" for at in range(len(self.lengths)))):
            value = self.lengths[int(name[8:-1])] if name.startswith("lengths") else getattr(self, name)
            if value < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {value}.")
        if not self.lengths:
            raise ConfigurationError("lengths must name at least one number of tokens.")
        if not 0.0 < self.sparsity < 1.0:
            raise ConfigurationError(f"sparsity must be in (0, 1), got {self.sparsity}.")

    def shape(self, length: int) -> tuple[int, int, int, int]:
        """(B, H, N, D) at a length."""
        return max(1, self.tokens // length), self.heads, length, self.width


@dataclass(frozen=True)
class Timing:
    """One variant at one length.

    Attributes:
        variant: Its name.
        length: N.
        forward: Seconds of each round's forward pass.
        training: Seconds of each round's forward and backward pass; empty where it has none.
        ratios: Of each round's training (else forward) time to the baseline's in the same round.
        peak: Bytes beyond inputs that a training step took at most; None where it was not measured.
    """

    variant: str
    length: int
    forward: tuple[float, ...]
    training: tuple[float, ...]
    ratios: tuple[float, ...]
    peak: int | None

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)


def device_of(name: str) -> torch.device:
    """A device that exists.

    Raises:
        ConfigurationError: If it is neither a processor nor a GPU that torch sees.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device must be cpu or cuda, got {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch sees no GPU here.")
    return device


def limit(sparsity: float) -> float:
    """The least share of dense attention's arithmetic that exact selection leaves in a training step.

    Of its 14 N^2 D operations (4 forward, 10 in a backward pass that computes scores anew) the 2 of q.k remain, and
    of the 2 of the weighted sum and the 8 of a backward pass that stored probabilities those of survivors.
    """
    return (2.0 + (1.0 - sparsity) * (2.0 + 8.0)) / 14.0


def growth(timings: list[Timing], least: int = 128) -> float | None:
    """The exponent b of time = a N^b per token, fitted to medians from a length on; None for fewer than 3 lengths."""
    import numpy as np

    points = [
        (timing.length, statistics.median(timing.training or timing.forward))
        for timing in timings
        if timing.length >= least
    ]
    if len(points) < 3:
        return None
    lengths, seconds = np.log(np.array(points, dtype=np.float64)).T
    return float(np.polyfit(lengths, seconds, 1)[0])


def measure(plan: Plan, variants: tuple[Variant, ...], tell: Callable[[str], None]) -> Iterator[Timing]:
    """Time every variant that can run, length by length.

    Args:
        plan: What to measure.
        variants: Which variants.
        tell: Takes a line for each length and each variant that is left out, there or everywhere.

    Raises:
        ConfigurationError: If the baseline cannot be measured at a length.
    """
    runnable = []
    for variant in variants:
        obstacle = variant.obstacle(plan.device)
        if obstacle is None:
            runnable.append((variant, variant.build(plan.device, plan.sparsity)))
        else:
            tell(f"{variant.name}: {obstacle}")
    for length in plan.lengths:
        shape = plan.shape(length)
        tell(f"N = {length}: B, H, N, D = {', '.join(map(str, shape))}")
        yield from _at_length(plan, length, runnable, tell)


def _at_length(
    plan: Plan, length: int, variants: list[tuple[Variant, Attention]], tell: Callable[[str], None]
) -> Iterator[Timing]:
    try:
        inputs, gradient = _inputs(plan, length)
    except RuntimeError as error:
        raise ConfigurationError(f"No inputs of {length} tokens can be made: {_first_line(error)}") from error
    runnable = []
    for variant, attend in variants:
        # The first step compiles, allocates and warms up, and shows who cannot serve this: too wide, out of memory.
        try:
            _step(plan.device, attend, inputs, gradient if variant.trains else None)
        except (ConfigurationError, RuntimeError) as error:
            if variant.name == BASELINE:
                raise ConfigurationError(
                    f"Dense attention cannot be measured at N = {length}: {_first_line(error)}"
                ) from error
            tell(f"{variant.name} at N = {length}: {_first_line(error)}")
        else:
            runnable.append((variant, attend))
    forward: dict[str, list[float]] = {variant.name: [] for variant, _ in runnable}
    training: dict[str, list[float]] = {variant.name: [] for variant, _ in runnable}
    for _ in range(plan.rounds):
        for variant, attend in runnable:
            ahead, whole = _step(plan.device, attend, inputs, gradient if variant.trains else None)
            forward[variant.name].append(ahead)
            if variant.trains:
                training[variant.name].append(whole)
    for variant, _ in runnable:
        ours = training[variant.name] or forward[variant.name]
        dense = training[BASELINE] if training[variant.name] else forward[BASELINE]
        yield Timing(
            variant.name,
            length,
            tuple(forward[variant.name]),
            tuple(training[variant.name]),
            tuple(one / other for one, other in zip(ours, dense, strict=True)),
            peak_bytes(plan, variant, length),
        )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _inputs(plan: Plan, length: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values as a model's projections leave them, and a gradient of the output."""
    batch, heads, _, width = plan.shape(length)
    draw = torch.Generator(plan.device).manual_seed(0)

    def tokens() -> Tensor:
        drawn = torch.randn(batch, length, heads, width, generator=draw, device=plan.device)
        return drawn.to(plan.dtype).transpose(1, 2)

    return [tokens().requires_grad_() for _ in range(3)], tokens()


def _step(
    device: torch.device, attend: Attention, inputs: list[Tensor], gradient: Tensor | None
) -> tuple[float, float]:
    """Seconds of a forward pass, and of it with its backward pass."""
    if device.type == "cuda":
        marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        output = attend(*inputs)
        marks[1].record()
        if gradient is not None:
            torch.autograd.grad(output, inputs, gradient)
        marks[2].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3, marks[0].elapsed_time(marks[2]) / 1e3
    started = time.perf_counter()
    output = attend(*inputs)
    between = time.perf_counter()
    if gradient is not None:
        torch.autograd.grad(output, inputs, gradient)
    return between - started, time.perf_counter() - started


def peak_bytes(plan: Plan, variant: Variant, length: int) -> int | None:
    """Bytes that a training step takes at most beyond its inputs; None where it cannot be measured.

    On a processor in a process of its own, since memory that was freed is not given back.
    """
    if plan.device.type == "cuda":
        inputs, gradient = _inputs(plan, length)
        attend = variant.build(plan.device, plan.sparsity)
        _step(plan.device, attend, inputs, gradient if variant.trains else None)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(plan.device, attend, inputs, gradient if variant.trains else None)
        return int(torch.cuda.max_memory_allocated() - before)
    if not sys.platform.startswith("linux"):
        return None
    arguments = [variant.name, length, plan.tokens, plan.heads, plan.width, plan.sparsity, torch.get_num_threads()]
    done = subprocess.run(
        [sys.executable, "-m", "crisp_attention.bench.measure", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(done.stdout) if done.returncode == 0 else None


def _resident(line: str) -> int:
    """A figure of this process's memory in bytes: VmRSS, or VmHWM, the most there was."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(text.split()[1]) * 1024 for text in status if text.startswith(line))


def _measure_peak(name: str, length: int, tokens: int, heads: int, width: int, sparsity: float, threads: int) -> int:
    torch.set_num_threads(threads)
    variant = next(variant for variant in VARIANTS if variant.name == name)
    device = torch.device("cpu")
    attend = variant.build(device, sparsity)

    def run(plan: Plan, length: int) -> int:
        inputs, gradient = _inputs(plan, length)
        before = _resident("VmRSS")
        _step(device, attend, inputs, gradient if variant.trains else None)
        return _resident("VmHWM") - before

    run(Plan(device, tokens=1, heads=heads, width=width, sparsity=sparsity), 16)  # loads and compiles
    with open("/proc/self/clear_refs", "w", encoding="ascii") as reset:
        reset.write("5")  # the most there was begins anew
    return run(Plan(device, tokens=tokens, heads=heads, width=width, sparsity=sparsity), length)


if __name__ == "__main__":
    asked = sys.argv[1:]
    counts = [int(count) for count in asked[1:5]]
    print(_measure_peak(asked[0], counts[0], counts[1], counts[2], counts[3], float(asked[5]), int(asked[6])))
