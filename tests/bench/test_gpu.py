"""What `benchmarks/gpu.py` computes without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crisp_attention.bench.measure import Timing

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    specification = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_work_counts_products_and_tensors(gpu):
    """14 N^2 D of dense attention, 4 more for scores and their gradients computed twice, 2 a pass."""
    one = gpu.work((1, 1, 128, 64), passes=0)
    assert one.operations == 18 * 128**2 * 64
    assert gpu.work((1, 1, 128, 64), passes=1).operations == 20 * 128**2 * 64
    assert gpu.work((2, 3, 128, 64), passes=1).bytes == 6 * gpu.work((1, 1, 128, 64), passes=1).bytes
    assert gpu.work((1, 1, 128, 64), passes=0, kept=0.5).operations == one.operations / 2
    assert gpu.work((1, 1, 128, 64), passes=0, kept=0.5).bytes == one.bytes == 16 * 2 * 128 * 64 + 9 * 4 * 128


def test_the_roofline_is_the_slower_of_both_ceilings(gpu):
    work = gpu.Work(operations=100.0, bytes=30.0)
    assert work.least_seconds(gpu.Ceiling(operations=50.0, bytes=30.0)) == 2.0
    assert work.least_seconds(gpu.Ceiling(operations=50.0, bytes=10.0)) == 3.0


def test_the_table_says_what_was_not_measured(gpu):
    timing = Timing("triton topk", 128, (0.001,), (0.004, 0.002, 0.003), (1.5, 1.0, 1.2), 2**21)
    rows = gpu.summary([timing], (128,), gpu.Ceiling(1e14, 1e12))
    lines = {row["variant"]: gpu.line(row) for row in rows}
    assert lines["triton topk"].split()[:5] == ["triton", "topk", "128", "3.000", "ms"]
    assert "1.20x" in lines["triton topk"]
    assert lines["flex"].endswith("not measured")
    measured = next(row for row in rows if row["variant"] == "triton topk")
    least = gpu.work((256, 12, 128, 64), 1).least_seconds(gpu.Ceiling(1e14, 1e12))
    assert measured["roofline"] == pytest.approx(least / 0.003)


def test_the_check_fails_on_other_survivors_large_errors_and_nothing_served(gpu):
    good = {"refused": None, "same_survivors": True, "error": 0.5}
    assert gpu.passed([good, {"refused": "why"}])
    assert not gpu.passed([{"refused": "why"}])
    assert not gpu.passed([good, good | {"same_survivors": False}])
    assert not gpu.passed([good, good | {"error": float("inf")}])


def test_the_check_compares_with_the_reference(gpu):
    backend = pytest.importorskip("crisp_attention.backends.triton")
    call = gpu._call("topk", torch.float32, 20, False, torch.device("cpu"))
    found = gpu._compare(backend, call)
    assert found["same_survivors"]
    assert 0.0 < found["error"] <= 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No GPU is at hand" in done.stderr
