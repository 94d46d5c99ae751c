"""Two processes that train together (gloo, on the CPU) against one process with the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import two_processes
from crisp_attention import Schedule

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tiny_folders, tmp_path_factory):
    """What each process found, and the folder in which the Trainer saved."""
    out = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(Path(two_processes.__file__)), str(tiny_folders["bert"]), str(out)]
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=240)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [torch.load(out / f"rank-{rank}.pt") for rank in (0, 1)], out


@pytest.fixture(scope="module")
def alone(tiny_folders, tmp_path_factory):
    """What one process finds with the whole batch."""
    folder = str(tiny_folders["bert"])
    found = {
        name: two_processes.gradients(folder, settings, slice(None), lambda model: model)
        for name, settings in two_processes.SETTINGS.items()
    }
    return {**found, "trained": two_processes.train(folder, tmp_path_factory.mktemp("alone"), batch_size=8)}


@pytest.mark.parametrize("name", two_processes.SETTINGS)
def test_gradients_are_those_of_one_process(ranks, alone, name):
    """No threshold looks across processes: each example's masks are what they are anywhere, random ones too."""
    for rank in ranks[0]:
        for mine, expected in zip(rank[name]["gradients"], alone[name]["gradients"], strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
        assert rank[name]["sparsities"] == alone[name]["sparsities"]
    for halves in zip(*(rank[name]["masks"] for rank in ranks[0]), alone[name]["masks"], strict=True):
        assert torch.equal(torch.cat(halves[:2]), halves[2])


@pytest.mark.parametrize("name", ["random", "random matrix"])
def test_processes_do_not_share_their_random_masks(ranks, name):
    first, second = (rank[name]["masks"][0] for rank in ranks[0])
    valid = two_processes.batch()["attention_mask"][:4].bool()  # of rank 0, whose sentences are the shorter ones
    for example, mine, other in zip(valid, first, second, strict=True):
        pairs = example[:, None] & example[None, :]
        assert 0.2 < (mine ^ other)[:, pairs].float().mean() < 0.8


def test_the_trainer_drives_one_schedule_on_every_rank(ranks, alone):
    cubic = Schedule("cubic", end=0.5)
    for trained in (*(rank["trained"] for rank in ranks[0]), alone["trained"]):
        assert trained["steps"] == [(step, [cubic.sparsity(0.8, step / 6)] * 2) for step in range(6)]
        assert trained["progress"] == 1.0
        assert trained["monitors"] == 0
    assert [rank["trained"]["processes"] for rank in ranks[0]] == [2, 2]
    saved = json.loads((ranks[1] / "trainer" / "checkpoint-3" / "config.json").read_text())
    assert saved["crisp_attention"]["progress"] == 0.5


def test_the_trainer_logs_the_same_share_everywhere(ranks, alone):
    for mine, other, single in zip(
        *(rank["trained"]["logs"] for rank in ranks[0]), alone["trained"]["logs"], strict=True
    ):
        assert mine["requested_sparsity"] == other["requested_sparsity"] == pytest.approx(single["requested_sparsity"])
        assert mine["loss"] == pytest.approx(single["loss"], abs=1e-4)
        for log in (mine, other, single):
            assert log["realised_sparsity"] == pytest.approx(log["requested_sparsity"], abs=0.04)  # whole keys of 16
            assert 0.0 < log["attention_entropy"] <= torch.tensor(16.0).log()


def test_training_together_gives_the_weights_of_one_process(ranks, alone):
    """Batches of four by two processes are batches of eight by one, in rule 'random' too."""
    first, second = (rank["trained"]["weights"] for rank in ranks[0])
    for name, expected in alone["trained"]["weights"].items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, atol=1e-4, rtol=1e-3)
