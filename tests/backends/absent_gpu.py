"""Compiles the Triton backend for a GPU that is not there: `python -m absent_gpu 90`, for compute capability 9.0.

Prints, for a call by row and one by matrix, the instructions with which each kernel multiplies matrices.
"""

from __future__ import annotations

import json
import re
import sys

import torch
import triton
from test_triton import made
from triton.backends.compiler import GPUTarget

from crisp_attention.backends import triton as backend
from crisp_attention.backends.triton import flash, threshold, tiles

PRODUCT = r"wgmma\.mma_async\S+|mma\.sync\.aligned\.m\S+"


class Driver:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """In place of a kernel: compiled for the arguments that it gets, and not launched."""

    def __init__(self, kernel, products):
        self.kernel, self.products = kernel, products

    def __getitem__(self, grid):
        def compile_it(*arguments, **options):
            code = self.kernel.warmup(*arguments, grid=grid, **options).asm["ptx"]
            self.products[self.kernel.__name__] = sorted(set(re.findall(PRODUCT, code)))

        return compile_it


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    tiles.INTERPRETED = True  # which the refusal asks before it looks for a GPU
    kernels = [(room, name, kernel) for room in (flash, threshold) for name, kernel in vars(room).items()]
    rows = []
    for rule, keys in (("topk", 512), ("percentile", 128)):
        rows.append({})
        for room, name, kernel in kernels:
            if name.endswith("_kernel"):
                # The one that finds a digit multiplies nothing.
                setattr(room, name, Compiled(kernel, rows[-1] if name != "_descend_kernel" else {}))
        call = made((1, 2, keys, keys), rule=rule, width=64, value_width=64, dtype=torch.bfloat16, dropout=0.1)
        call.query.requires_grad_()
        backend.attention(call).output.sum().backward()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
