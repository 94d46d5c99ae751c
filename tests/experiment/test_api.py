"""The experiment from Python: what it takes, what it returns, and how that shows itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import crisp_attention as crisp
import tiny_study
from crisp_attention.experiment import study
from crisp_attention.experiment.data import dataset
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.runs import expand
from crisp_attention.experiment.specification.spec import preset
from crisp_attention.experiment.training import model, workbench
from fragments import read, words
from record_builders import EXAMPLES, draws, fill, fill_in_full, finished, make_spec, planned

pytestmark = pytest.mark.slow

HELPS = draws({"dense": 0.5, "topk-50": 0.9})


@pytest.fixture
def spec(tiny_folders, csv_file):
    return tiny_study.spec(tiny_folders["bert"], csv_file)


@pytest.fixture
def done(spec, tmp_path):
    """A run directory in which all runs of the specification have a made-up record."""
    prints = tiny_study.prints_of(model.resolve(spec.model), dataset.load(spec.data))
    store = Store(tmp_path / "done")
    store.open(spec, prints)
    for run in expand(spec, prints):
        store.save(*finished(run, np.arange(EXAMPLES) % 3 != 0))
    return store.folder


def test_a_study_that_is_done_is_read_and_reported(spec, done, capsys, monkeypatch):
    monkeypatch.setattr(workbench, "preflight", lambda *_: pytest.fail("looked at the model"))
    found = crisp.experiment.run(spec, out=done)
    assert "All of 8 runs are done" in " ".join(capsys.readouterr().out.split())
    assert isinstance(found, crisp.experiment.Study)
    assert found.folder == done
    assert found.report == done / "report.html"
    assert found.report.exists()
    assert found.spec == spec
    assert found.verdict.word == "no verdict"
    assert found.verdict is found.analysis.verdict
    assert len(found.records) == 8
    quiet = crisp.experiment.run(spec, out=str(done), progress=False)
    assert capsys.readouterr().out == ""
    assert quiet.table.equals(found.table)


def test_runs_that_another_study_has_are_taken_over(spec, done, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workbench, "preflight", lambda *_: pytest.fail("looked at the model"))
    other = spec.model_copy(update={"name": "other", "arms": spec.arms[:3]})
    found = crisp.experiment.run(other, out=tmp_path / "other", source=done)
    said = " ".join(capsys.readouterr().out.split())
    assert "6 finished runs from" in said
    assert "are taken over." in said
    assert len(found.records) == 6
    given, own = Store(done), Store(tmp_path / "other")
    for record in found.records:
        original = given.load(record.run_id)
        assert record.model_dump(exclude={"arrays"}) == original.model_dump(exclude={"arrays"})
        for name, values in given.load_arrays(original).items():
            np.testing.assert_array_equal(own.load_arrays(record)[name], values)


def test_of_another_study_only_what_is_finished_and_missing_is_taken_over(spec, done, tmp_path):
    given, own = Store(done), Store(tmp_path / "own")
    first, second, *_ = crisp.experiment.plan(spec, out=done, progress=False).runs
    failed = given.load(first.config.run_id).model_copy(update={"status": "failed", "arrays": None})
    (given.records / f"{failed.run_id}.json").write_text(failed.model_dump_json(by_alias=True), encoding="utf-8")
    own.records.mkdir(parents=True)
    mine = own.save(*finished(second, np.arange(EXAMPLES) % 5 != 0))
    plan = crisp.experiment.plan(spec, out=tmp_path / "empty", source=done, progress=False)
    assert [task.run for task in plan.pending] == [first]
    assert len(plan.taken) == 7
    own.take_over([failed.run_id, *plan.taken], given)
    assert own.load(failed.run_id) == failed
    assert own.load(mine.run_id) == mine
    assert not (tmp_path / "empty").exists()


def test_a_folder_that_has_nothing_to_take_over_is_told(spec, done, tmp_path, capsys):
    crisp.experiment.run(spec, out=done, source=done)
    assert "done has no finished run that is missing here." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(crisp.RecordError, match="is not a run directory"):
        crisp.experiment.run(spec, out=tmp_path / "new", source=tmp_path / "mistyped")
    assert not (tmp_path / "new").exists()


def test_a_specification_comes_in_many_forms(tiny_folders, csv_file, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "prepare", lambda *arguments, executor, source: asked.append(arguments))
    monkeypatch.chdir(tmp_path)
    toml = tiny_study.toml(tiny_folders["bert"], csv_file)
    for name in ("tiny.toml", "tiny"):
        Path(name).write_text(toml, encoding="utf-8")
    parsed = tiny_study.spec(tiny_folders["bert"], csv_file)
    plain = study.ExperimentSpec.model_dump(parsed, exclude={"arms"}) | {
        "arms": [arm.to_toml_dict() for arm in parsed.arms]
    }
    for form in ("tiny.toml", "tiny", tmp_path / "tiny.toml", plain, parsed):
        crisp.experiment.plan(form)
    assert [arguments[0] for arguments in asked] == [parsed] * 5
    assert {arguments[1] for arguments in asked} == {Path("runs/tiny")}
    crisp.experiment.plan("quick", out="here", jobs=1, seeds=7, retry=True)
    assert asked[-1][0] == preset("quick").model_copy(update={"seeds": 7})
    assert asked[-1][1] == Path("here")
    assert asked[-1][3:] == (1, True)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("qick", "'qick' is neither a preset nor a file. Did you mean 'quick'?"),
        ("there.toml", "There is no specification there.toml"),
        (["quick"], "dict or an ExperimentSpec; got list"),
        ({"name": "x", "sedes": 3}, "Unknown key 'sedes'. Did you mean 'seeds'"),
    ],
)
def test_what_is_no_specification_is_refused(tmp_path, monkeypatch, form, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(crisp.ConfigurationError) as refused:
        crisp.experiment.run(form)
    assert expected in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_number_of_seeds_that_cannot_be_is_refused(spec, tmp_path):
    with pytest.raises(crisp.ConfigurationError, match=r"seeds = 0: seeds: .*got 0"):
        crisp.experiment.run(spec, out=tmp_path / "out", seeds=0)
    assert not (tmp_path / "out").exists()


def test_who_interrupts_is_told_how_to_go_on(spec, done, capsys, monkeypatch):
    def interrupt(plan, display):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "carry_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        crisp.experiment.run(spec, out=done)
    told = " ".join(capsys.readouterr().out.split())
    assert "Interrupted. Finished runs are kept in" in told
    assert "the same call goes on from there." in told
    assert study.interrupted(done / "new", "command").startswith("Interrupted before anything was written:")


def test_the_table_has_a_row_an_arm_with_the_figures_of_the_analysis(tmp_path):
    found = crisp.experiment.load(fill(tmp_path, make_spec(), HELPS).folder)
    table, primary = found.table, found.analysis.primary
    assert list(table.index) == ["dense", "topk-50", "percentile-80"]
    row = table.loc["topk-50"]
    assert row["accuracy"] == pytest.approx(100 * np.mean([HELPS("topk-50", seed).mean() for seed in range(8)]))
    assert row["difference"] == pytest.approx(row["accuracy"] - table.loc["dense", "accuracy"])
    assert (row["low"], row["high"]) == (primary.interval.low, primary.interval.high)
    assert (row["runs"], row["planned"]) == (8, 8)
    assert row["p"] == primary.p_value
    assert np.isnan(row["p_holm"])
    assert table.loc["percentile-80", "p_holm"] == found.analysis.secondary[0].p_holm
    assert table.loc["dense", ["difference", "low", "high", "p"]].isna().all()
    assert set(table.dtypes[["accuracy", "sd", "difference", "low", "p", "p_holm", "sparsity"]]) == {np.dtype(float)}
    assert found.table is table


def test_few_seeds_have_no_interval_and_none_no_accuracy(tmp_path):
    few = fill(tmp_path / "few", make_spec(seeds=3), HELPS)
    assert crisp.experiment.load(few.folder).table[["low", "high"]].isna().all(axis=None)
    none = fill(tmp_path / "none", make_spec(seeds=2), lambda arm, index: None)
    found = crisp.experiment.load(none.folder)
    assert found.table["accuracy"].isna().all()
    assert list(found.table["runs"]) == [0, 0, 0]
    assert found.records == ()
    assert "No verdict" in repr(found)


def test_where_data_vary_the_table_has_a_row_a_condition(tmp_path):
    spec = make_spec(seeds=6, vary={"train_examples": [20, 40]})
    found = crisp.experiment.load(fill_in_full(tmp_path, spec, HELPS).folder)
    assert list(found.table["condition"]) == ["train_examples=20"] * 3 + ["train_examples=40"] * 3
    assert found.table["p"].notna().sum() == 4
    assert len(found.records) == 2 * 3 * 6


def test_records_hold_the_runs_in_trouble_too(tmp_path):
    spec = make_spec(seeds=3)
    outcome = draws({})
    store = fill(tmp_path, spec, lambda arm, index: "failed" if index == 1 else outcome(arm, index))
    found = crisp.experiment.load(store.folder)
    assert [record.status for record in found.records] == ["finished", "failed", "finished"] * 3
    assert [record.run_id for record in found.records] == [
        planned(spec)[arm.name, seed].config.run_id for arm in spec.arms for seed in range(3)
    ]


def test_loading_writes_nothing_and_rebuilding_writes_the_report(tmp_path):
    store = fill(tmp_path, make_spec(), HELPS)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert crisp.experiment.load(tmp_path).report is None
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    rebuilt = crisp.experiment.rebuild(str(store.folder))
    assert rebuilt.report == tmp_path / "report.html"
    assert crisp.experiment.load(tmp_path).report == rebuilt.report
    with pytest.raises(crisp.RecordError, match="is not a run directory"):
        crisp.experiment.load(tmp_path / "elsewhere")


def test_a_study_is_told_in_a_terminal_and_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = fill(Path("runs") / "a study", make_spec(description="<script>alert(1)</script>"), HELPS)
    found = crisp.experiment.rebuild(store.folder)
    lines = repr(found).splitlines()
    assert lines[0] == "Study made-up"
    assert lines[1].split()[:3] == ["arm", "runs", "correct"]
    assert [line.split()[0] for line in lines[2:5]] == ["dense", "topk-50", "percentile-80"]
    assert lines[5] == found.verdict.headline == "topk-50 helps: better than dense."
    assert lines[-1] == str(found.report)
    shown = read(found._repr_html_())
    assert shown.links == ["runs/a%20study/report.html"]
    text = words(found._repr_html_())
    for told in (found.verdict.headline, *found.verdict.details, *found.analysis.cautions, "percentile-80"):
        assert told in text


def test_a_report_elsewhere_on_the_disk_is_named_and_not_linked(tmp_path):
    found = crisp.experiment.rebuild(fill(tmp_path, make_spec(), HELPS).folder)
    shown = read(found._repr_html_())
    assert shown.links == []
    assert str(found.report) in "".join(shown.texts)


def test_names_of_the_experiment_load_when_they_are_used():
    code = """
import sys, crisp_attention as crisp
assert "experiment" in dir(crisp) and "run" in dir(crisp.experiment)
heavy = {"torch", "transformers", "numpy", "pandas", "pydantic", "rich", "typer", "datasets", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
crisp.experiment.run
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        _ = crisp.experiment.rum


def test_without_the_extra_it_says_what_to_install():
    code = """
import sys
sys.modules["pydantic"] = None
import crisp_attention as crisp
try:
    crisp.experiment.run
except ModuleNotFoundError as missing:
    print(missing)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "crisp_attention.experiment.run needs the extra 'experiment'" in done.stdout
    assert "pip install 'crisp-attention[experiment]'" in done.stdout
