"""What a process settles before it trains."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_FAULTS = """\
import resource
from crisp_attention.experiment.execution.worker import keep_memory
{before}
import torch

def step():
    for size in (1, 2, 5, 12):
        torch.ones(size * 2**18) * 2

for _ in range(10):  # until the heap has grown to what a step needs
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(before, **variables):
    """Pages that the system cleared in twenty steps over the same tensors of 40 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS.format(before=before)],
        capture_output=True,
        text=True,
        check=True,
        env={"OMP_NUM_THREADS": "1", **variables},
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_is_kept_from_step_to_step():
    pages = 20 * 2**20 // 4096  # of one step, a tensor and its double
    # Without it, whether the heap's end is given back hangs on what happens to lie there.
    assert faults("keep_memory()") < pages
    # Whoever has chosen is left alone.
    assert faults("keep_memory()", MALLOC_MMAP_THRESHOLD_="131072") > 4 * pages


def test_no_environment_has_runs_trained_in_another_way():
    """A training in half precision leaves this behind for whatever the session does next."""
    code = """\
import os
from crisp_attention.experiment.execution import worker
from crisp_attention.experiment.training import workbench

workbench.Workbench = lambda *given: given
worker.set_up("checkpoint", "data", 1)
print(os.environ.get("ACCELERATE_MIXED_PRECISION"))
"""
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "None"
