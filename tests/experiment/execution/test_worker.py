"""What a process settles before it trains."""

from __future__ import annotations

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
    assert faults("pass") > 5 * pages
    assert faults("keep_memory()") < pages
    # Whoever has chosen is left alone.
    assert faults("keep_memory()", MALLOC_MMAP_THRESHOLD_="131072") > 5 * pages
