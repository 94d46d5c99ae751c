"""`[resources]` says how runs are done, and changes none of them."""

from __future__ import annotations

import pytest

import crisp_attention as crisp
from crisp_attention.experiment.report.provenance import spec_as_toml
from crisp_attention.experiment.results.identity import describe, difference
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.specification.spec import parse, to_plain
from record_builders import PRINTS, make_spec


def with_resources(**resources):
    return parse(to_plain(make_spec()) | {"resources": resources}, "test")


def test_resources_change_neither_an_experiment_nor_its_runs():
    plain, other = make_spec(), with_resources(cpus=4, gpus=0.25)
    assert "resources" not in to_plain(plain)
    assert plain.identity() == other.identity()
    before, after = describe(plain, PRINTS), describe(other, PRINTS)
    assert before["identity"] == after["identity"]
    assert difference(before, after) == "different specification"
    assert [run.config.run_id for run in expand(plain, PRINTS)] == [run.config.run_id for run in expand(other, PRINTS)]


def test_resources_are_kept_with_the_study_and_shown_by_its_report():
    spec = with_resources(cpus=4, gpus=0.25)
    assert parse(to_plain(spec), "test") == spec
    assert "[resources]\ncpus = 4\ngpus = 0.25\n" in spec_as_toml(spec)
    assert "[resources]" not in spec_as_toml(make_spec())


@pytest.mark.parametrize(
    ("resources", "why"),
    [
        ({"cpus": 0}, "resources.cpus: .* greater than or equal to 1"),
        ({"cpus": 1.5}, "resources.cpus: .* valid integer"),
        ({"gpus": 2}, "resources.gpus: .* less than or equal to 1"),
        ({"gpus": -0.5}, "resources.gpus: .* greater than or equal to 0"),
        ({"cpu": 2}, "Unknown key 'resources.cpu'. Did you mean 'cpus'"),
    ],
)
def test_resources_that_make_no_sense_are_refused(resources, why):
    with pytest.raises(crisp.ConfigurationError, match=why):
        with_resources(**resources)
