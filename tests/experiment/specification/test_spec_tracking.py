from __future__ import annotations

import pytest

from crisp_attention.errors import ConfigurationError
from crisp_attention.experiment.results.identity import describe, difference
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.specification.spec import parse, to_plain
from record_builders import PRINTS, content, make_spec

TRACKED = {"report_to": ["tensorboard", "mlflow"]}


def test_trackers_are_kept_and_decide_nothing(tmp_path):
    plain, tracked = make_spec(), make_spec(tracking=TRACKED)
    assert tracked.tracking.report_to == ("tensorboard", "mlflow")
    assert parse(to_plain(tracked), "again") == tracked
    assert "tracking" not in to_plain(plain)
    assert describe(plain, PRINTS)["identity"] == describe(tracked, PRINTS)["identity"]
    assert list(expand(plain, PRINTS)) == list(expand(tracked, PRINTS))
    store = Store(tmp_path)
    for spec in (plain, tracked, plain):
        store.open(spec, PRINTS)
        assert store.study()[0] == spec


def test_what_differs_is_named_without_trackers():
    other = make_spec(tracking=TRACKED, training={"epochs": 9})
    assert difference(describe(make_spec(), PRINTS), describe(other, PRINTS)) == "different training"


def test_a_wrong_key_is_named():
    with pytest.raises(ConfigurationError, match=r"Unknown key 'tracking.report'. Did you mean 'report_to'"):
        parse(content(tracking={"report": []}), "test")
