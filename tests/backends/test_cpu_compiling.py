"""How kernels are compiled, and what is kept of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from numba import types

import crisp_attention as crisp
from cases import qkv
from crisp_attention.backends.cpu import compiling, kernels


def test_what_is_kept_of_a_kernel_knows_all_files_that_it_was_made_of():
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float32))
    crisp.attention(q, k, v, sparsity=0.5, backend="cpu").sum().backward()
    for kernel in (kernels.forward, kernels.backward):
        (signature,) = kernel.signatures
        assert signature[-1] == types.Omitted(compiling.SOURCES)
        kept = {file.name.split("-")[0] for file in Path(kernel.stats.cache_path).glob("*.nbi")}
        assert kept == {"kernels.forward", "kernels.backward"}


def test_the_fingerprint_tells_any_change_of_any_file(tmp_path, monkeypatch):
    room = tmp_path / "cpu"
    room.mkdir()
    sources = [tmp_path / "noise.py", room / "kernels.py", room / "scoring.py"]
    monkeypatch.setattr(compiling, "files", lambda package: room if package.endswith("cpu") else tmp_path)
    found = []
    for changed in (None, *sources):
        for source in sources:
            source.write_text("2" if source == changed else "1", encoding="utf-8")
        found.append(compiling._fingerprint())
    assert len(set(found)) == len(found)
    assert all(0 <= fingerprint < 2**63 for fingerprint in found)


def test_where_nothing_can_be_written_kernels_are_compiled_all_the_same(monkeypatch):
    original = compiling.njit

    def njit(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'forward': no locator available")
        return original(**options)

    monkeypatch.setattr(compiling, "njit", njit)
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        kernel = compiling.kernel(lambda x: x + 1)
    assert kernel(1) == 2
