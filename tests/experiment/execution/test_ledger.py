"""A storage that machines share, and one that will not do."""

from __future__ import annotations

import math
import sqlite3
import threading

import optuna
import pytest

from crisp_attention.errors import ConfigurationError, RecordError
from crisp_attention.experiment.data.dataset import carve
from crisp_attention.experiment.execution import ledger, tuning
from crisp_attention.experiment.results.store import Store
from made_up_search import CHECKPOINT, HERE, Killed, Machine, data, spec_of, tune

pytestmark = pytest.mark.slow


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(tuning, "_POLL_SECONDS", 0.05)
    return Machine(monkeypatch)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'shared.db'}"


def planned(folder, spec, url, dataset=None):
    return tuning.plan(spec, Store(folder), CHECKPOINT, carve(dataset or data(), 0.2), 1, HERE, url)


@pytest.mark.parametrize("seeds", [1, 3])
def test_two_machines_share_the_trials_and_find_the_same(tmp_path, machine, url, seeds):
    spec = spec_of(trials=6, epochs=2, seeds_per_trial=seeds)
    found = {}

    def work(name):
        found[name] = tune(tmp_path / name, spec, storage=url)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["one"] == found["other"]
    assert [len(outcome.trials) for outcome in found["one"].outcomes] == [6, 6]
    assert len(machine.trained) == 12 * seeds


def test_one_machine_finds_in_a_shared_storage_what_it_finds_in_its_own(tmp_path, machine, url):
    spec = spec_of(trials=5)
    machine.until = 4
    with pytest.raises(Killed):
        tune(tmp_path / "shared", spec, storage=url)
    machine.until = math.inf
    # The trial that was interrupted is its own: it is proposed again.
    assert tune(tmp_path / "shared", spec, storage=url) == tune(tmp_path / "own", spec)


def test_trials_of_a_machine_that_died_are_proposed_again(tmp_path, machine, url, monkeypatch):
    monkeypatch.setattr(ledger, "_HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(ledger, "_PATIENCE_SECONDS", 1)
    spec = spec_of(trials=3)
    machine.until = 2
    with pytest.raises(Killed):
        tune(tmp_path / "died", spec, storage=url)
    machine.until = math.inf
    alone = tune(tmp_path / "alone", spec)
    assert tune(tmp_path / "lives", spec, storage=url) == alone


def test_a_trial_given_up_late_is_proposed_again_in_its_own_place(tmp_path, machine, url, monkeypatch):
    spec = spec_of(trials=3)
    alone = tune(tmp_path / "alone", spec)
    machine.until = len(machine.trained) + 2
    with pytest.raises(Killed):
        tune(tmp_path / "died", spec, storage=url)
    machine.until = math.inf
    bury = ledger.Book.bury

    def unheard_of(book):
        if len(book.counted()) == 3:  # whoever lives has proposed all that are left
            book._storage.grace_period = -1
        bury(book)

    monkeypatch.setattr(ledger.Book, "bury", unheard_of)
    assert tune(tmp_path / "lives", spec, storage=url) == alone


def test_a_plan_writes_nothing_into_a_storage(tmp_path, machine, url):
    planned(tmp_path / "out", spec_of(), url)
    assert list(tmp_path.iterdir()) == []
    tune(tmp_path / "out", spec_of(), storage=url)
    before = (tmp_path / "shared.db").read_bytes()
    planned(tmp_path / "other", spec_of(), url)
    assert (tmp_path / "shared.db").read_bytes() == before


def test_how_many_trials_there_are_is_agreed_on(tmp_path, machine, url):
    todo = planned(tmp_path / "out", spec_of(trials=3), url)
    assert todo.ledger.agreed() is None
    tune(tmp_path / "out", spec_of(trials=3), storage=url)
    assert todo.ledger.agreed() == 3
    with pytest.raises(RecordError, match="holds a search of 3 trials, not 5: all who share it must ask for as many"):
        planned(tmp_path / "other", spec_of(trials=5), url)


def test_searches_of_other_experiments_are_refused(tmp_path, machine, url):
    tune(tmp_path / "out", spec_of(), storage=url)
    shorter = data()
    shorter = type(shorter)("x", shorter.classes, shorter.train.take(range(50)), shorter.test, ())
    for other in (
        lambda: planned(tmp_path / "new", spec_of(), url, shorter),
        lambda: planned(tmp_path / "new", spec_of(hidden_dropout=[0.1, 0.2]), url),
        lambda: planned(tmp_path / "new", spec_of(pruning=True), url),
        lambda: planned(tmp_path / "new", spec_of(seeds_per_trial=2), url),
    ):
        with pytest.raises(
            RecordError, match=r"holds a study 'made-up/dense' of other data, another model or other set"
        ):
            other()
    assert not (tmp_path / "new").exists()


def test_studies_of_somebody_else_are_refused_and_left_alone(tmp_path, machine, url):
    study = optuna.create_study(storage=url, study_name="made-up/dense", direction="maximize")
    before = (tmp_path / "shared.db").read_bytes()
    with pytest.raises(RecordError, match=r"holds a study 'made-up/dense' of something else\. Give another --storage"):
        planned(tmp_path / "out", spec_of(), url)
    assert (tmp_path / "shared.db").read_bytes() == before
    assert study.trials == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", r"The storage 'nonsense' cannot be used: Could not parse .* Expected a URL as sqlite:///"),
        ("nosuch://host/db", r"The storage nosuch://host/db cannot be used: Can't load plugin"),
        ("redis://host/0", r"The storage redis://host/0 cannot be used: Can't load plugin"),
        ("sqlite:////no/such/folder/x.db", "lies in a folder that does not exist"),
    ],
)
def test_urls_that_lead_nowhere_are_told(tmp_path, machine, url, message):
    with pytest.raises(ConfigurationError, match=message):
        planned(tmp_path / "out", spec_of(), url)
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_never_shown(tmp_path, machine):
    with pytest.raises(ConfigurationError) as error:
        planned(tmp_path / "out", spec_of(), "nosuch://me:secret@host/db")
    assert "secret" not in str(error.value)
    assert "me:***@host" in str(error.value)


def test_a_file_that_is_no_database_is_told(tmp_path, machine, url):
    (tmp_path / "shared.db").write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigurationError, match="cannot be used: file is not a database"):
        planned(tmp_path / "out", spec_of(), url)


def test_a_storage_of_another_version_of_optuna_is_told(tmp_path, machine, url):
    optuna.create_study(storage=url, study_name="x")
    with sqlite3.connect(tmp_path / "shared.db") as connection:
        connection.execute("update alembic_version set version_num = 'v9.0.0.a'")
        connection.execute("update version_info set schema_version = 99")
    with pytest.raises(ConfigurationError, match="cannot be used: The runtime optuna version"):
        planned(tmp_path / "out", spec_of(), url)
