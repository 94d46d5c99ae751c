"""How kernels are compiled, and what is kept of them."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import config, types

import crisp_attention as crisp
from cases import qkv
from crisp_attention.backends.cpu import compiling, kernels


def test_what_is_kept_of_a_kernel_knows_all_files_that_it_was_made_of():
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float32))
    crisp.attention(q, k, v, sparsity=0.5, backend="cpu").sum().backward()
    for kernel in (kernels.forward.dispatcher, kernels.backward.dispatcher):
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


def one(into):
    into[0] = 1.0


def test_where_nothing_can_be_written_kernels_are_compiled_all_the_same(monkeypatch):
    original = compiling.njit

    def njit(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'forward': no locator available")
        return original(**options)

    monkeypatch.setattr(compiling, "njit", njit)
    with pytest.warns(UserWarning, match="can be written to.*NUMBA_CACHE_DIR"):
        kernel = compiling.Kernel(one)
    into = np.zeros(1)
    kernel(into)
    assert into[0] == 1.0


@pytest.mark.parametrize("damage", ["full", "cut"])
def test_a_cache_that_fails_is_done_without(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    kernel = compiling.Kernel(one)
    if damage == "full":

        def no_space(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", no_space)
    else:
        kernel(np.zeros(1))
        for file in tmp_path.rglob("*.nb?"):
            file.write_bytes(b"")
        kernel = compiling.Kernel(one)
    into = np.zeros(1)
    with pytest.warns(UserWarning, match=f"cannot be kept: Numba's cache in {tmp_path}.*NUMBA_CACHE_DIR"):
        kernel(into)
    assert into[0] == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(np.zeros(1))
