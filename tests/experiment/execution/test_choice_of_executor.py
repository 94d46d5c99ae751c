"""Who does the runs, chosen by name. Nothing here reaches a cluster."""

from __future__ import annotations

import socket
import sys

import pytest

import crisp_attention as crisp
from crisp_attention.experiment.execution.choice import choose
from crisp_attention.experiment.execution.local import LocalExecutor
from crisp_attention.experiment.specification.resources import ResourcesSpec

PLAIN = ResourcesSpec()


def test_an_executor_is_chosen_by_name():
    assert isinstance(choose("local", PLAIN), LocalExecutor)


@pytest.mark.parametrize("name", ["rey", "Ray", "slurm", "", "http://head:10001"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(
        crisp.ConfigurationError, match=f"Unknown executor --on '{name}'.*Valid: local, ray, ray://HOST"
    ):
        choose(name, PLAIN)


def test_ray_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(crisp.ConfigurationError, match=r"needs the package ray: pip install 'crisp-attention\[ray\]'"):
        choose("ray", PLAIN)


@pytest.fixture
def silent_port():
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


def test_a_cluster_that_does_not_answer_is_named(silent_port, monkeypatch):
    for executor in (choose(f"ray://127.0.0.1:{silent_port}", PLAIN), None):
        if executor is None:
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent_port}")
            executor = choose("ray", PLAIN)
        with pytest.raises(crisp.ConfigurationError, match=rf"No Ray cluster answers at .*127\.0\.0\.1:{silent_port} "):
            executor.divide(None, 3, 3)
        executor.close()


@pytest.mark.parametrize("address", ["ray://", "ray://head", "ray://head:port", "ray://:10001"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(crisp.ConfigurationError, match=f"HOST:PORT, as ray://head:10001; got '{address}'"):
        choose(address, PLAIN).divide(None, 3, 3)


def test_ray_is_not_reached_for_where_nothing_is_to_do(silent_port):
    division = choose(f"ray://127.0.0.1:{silent_port}", ResourcesSpec(cpus=3)).divide(None, 0, 0)
    assert division.threads == 3


def test_no_runs_side_by_side_are_refused_before_ray_is_reached_for(silent_port):
    with pytest.raises(crisp.ConfigurationError, match="--jobs must be at least 1, got 0"):
        choose(f"ray://127.0.0.1:{silent_port}", PLAIN).divide(0, 3, 3)
