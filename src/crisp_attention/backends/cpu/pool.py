"""Threads for the kernels, as many as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch

_executors: dict[tuple[int, int], Executor] = {}


def share(kernel: Callable[[Any, int, int], None], scratch: Callable[[], Any], tasks: int) -> None:
    """Run a kernel over tasks 0 to `tasks - 1` on torch's number of threads, this one among them.

    Args:
        kernel: Called with scratch of its own, a first task and a step; takes every `step`-th task, without
            Python's lock.
        scratch: Makes what one thread works in.
        tasks: How many there are.

    Raises:
        Exception: What a thread raised, once all have ended.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        kernel(scratch(), 0, 1)
        return
    others = [_executor(threads - 1).submit(kernel, scratch(), first, threads) for first in range(1, threads)]
    try:
        kernel(scratch(), 0, threads)
    finally:
        for other in others:
            other.exception()  # waits
    for other in others:
        other.result()


def _executor(threads: int) -> Executor:
    # Threads do not survive a fork, so a child makes its own.
    key = (os.getpid(), threads)
    if key not in _executors:
        _executors[key] = ThreadPoolExecutor(threads, thread_name_prefix="crisp-attention")
    return _executors[key]
