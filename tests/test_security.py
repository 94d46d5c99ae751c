"""What SECURITY.md promises: nothing that is read runs code, and nothing is written where it does not belong."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import crisp_attention
import tiny_study
from crisp_attention.errors import ConfigurationError, CrispError, RecordError, UnsupportedModelError
from crisp_attention.experiment import study
from crisp_attention.experiment.data.sources import read
from crisp_attention.experiment.results.examples import Examples
from crisp_attention.experiment.results.store import Store
from crisp_attention.experiment.specification.sections import DataSpec
from crisp_attention.experiment.specification.spec import parse
from crisp_attention.experiment.training.checkpoint import Checkpoints
from crisp_attention.experiment.training.model import load, resolve
from record_builders import PRINTS, content, draws, fill, make_spec, planned, provenance

SOURCES = sorted(Path(crisp_attention.__file__).parent.rglob("*.py"))
FORBIDDEN = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "yaml"}
NAMES = ["../x", "..", ".", "", "a/b", "/etc/x", "a\\b", "C:x", "x\n", "x\0", "x y", ".hidden", "-x", "x" * 61]


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def calls(tree: ast.AST):
    """Every call, by the name that is called and its keywords that are plain values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {item.arg: getattr(item.value, "value", ...) for item in node.keywords}
            yield ast.unparse(node.func), keywords


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_no_source_runs_what_it_reads(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & FORBIDDEN
    for name, keywords in calls(tree):
        assert name not in {"eval", "exec", "compile", "os.system"}
        assert "shell" not in keywords
        assert keywords.get("trust_remote_code", False) is False
        if name == "torch.load":
            assert keywords.get("weights_only") is True
        if name == "np.load":
            assert keywords.get("allow_pickle") is False


@pytest.mark.parametrize("path", [path for path in SOURCES if {"experiment", "cli"} & set(path.parts)], ids=str)
def test_what_a_command_loads_brings_no_code(path):
    """Transformers would ask, on a terminal, whether to run it; here nobody is asked."""
    for name, keywords in calls(ast.parse(path.read_text(encoding="utf-8"))):
        if name.endswith(".from_pretrained"):
            assert keywords.get("trust_remote_code") is False


def test_these_tests_see_what_they_look_for():
    found = dict(calls(ast.parse("torch.load(f, weights_only=False); auto.from_pretrained(f)")))
    assert found == {"torch.load": {"weights_only": False}, "auto.from_pretrained": {}}
    sources = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert all(f"{name}(" in sources for name in ("torch.load", "np.load", ".from_pretrained"))


@pytest.fixture
def foreign(tmp_path, tiny_folders):
    """A model whose configuration asks for code that comes with it, and that would leave a trace."""
    folder = shutil.copytree(tiny_folders["bert"], tmp_path / "foreign")
    trace = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nfrom transformers import BertConfig\nclass Own(BertConfig): pass\n",
        encoding="utf-8",
    )

    def as_kind(kind: str) -> Path:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {"model_type": kind, "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return as_kind, trace


def test_code_that_comes_with_a_model_is_refused(foreign):
    as_kind, trace = foreign
    with pytest.raises(UnsupportedModelError, match=r"code of its own .* never run, and model_type 'own-kind'"):
        resolve(str(as_kind("own-kind")))
    assert not trace.exists()


def test_code_beside_a_known_architecture_is_left_alone(foreign):
    from transformers import AutoModel

    as_kind, trace = foreign
    assert type(load(resolve(str(as_kind("bert"))), AutoModel)).__name__ == "BertModel"
    assert not trace.exists()


def test_pickled_weights_are_not_read(tmp_path, tiny_folders):
    from transformers import AutoModel

    folder = shutil.copytree(tiny_folders["bert"], tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(Payload(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"cannot be loaded: .*safetensors"):
        load(resolve(str(folder)), AutoModel, use_safetensors=True)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_a_run_runs_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", "run")
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    checkpoints.complete(1, {"books": Payload(tmp_path / "ran")})
    with pytest.raises(Exception, match="weights_only"):
        checkpoints.take_up()
    assert not (tmp_path / "ran").exists()


def test_transformers_resumes_without_unpickling():
    """Optimizer, schedule and random state are files that torch reads; the Trainer's arguments, a pickle, are not."""
    from transformers import Trainer

    loads = [keywords for name, keywords in calls(ast.parse(inspect.getsource(inspect.getmodule(Trainer))))
             if name == "torch.load"]  # fmt: skip
    assert loads
    assert all(keywords.get("weights_only") is True for keywords in loads)


def test_outputs_of_a_run_are_not_unpickled(tmp_path):
    spec = make_spec(seeds=1)
    store = fill(tmp_path / "run", spec, draws({}))
    run = planned(spec)["dense", 0]
    record = store.load(run.config.run_id)
    target = store.records / record.arrays.file
    np.savez(target, test_logits=np.array([Payload(tmp_path / "ran")], dtype=object))
    sha256 = hashlib.sha256(target.read_bytes()).hexdigest()
    forged = record.model_copy(update={"arrays": record.arrays.model_copy(update={"sha256": sha256})})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        store.load_arrays(forged)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["name", "arm", "evaluation"])
def test_names_that_become_paths_are_plain(name, place):
    changes = {"name": {"name": name}, "evaluation": {"evaluations": [{"name": name, "typos": 0.1}]}}
    changes["arm"] = {"arms": [*content()["arms"], {"name": name, "sparsity": 0.3}]}
    with pytest.raises(ConfigurationError, match="name: "):
        parse(content(**changes[place]), "hostile")


@pytest.mark.parametrize("name", ["../x", "..", "/", "/etc/passwd/", "a\0b", "$(touch x)", "~", "x" * 200])
def test_a_data_set_names_a_directory_within_runs(name, monkeypatch):
    """`crisp reproduce` calls the study by its data set."""
    from typer.testing import CliRunner

    from crisp_attention.cli import studies
    from crisp_attention.cli.application import app
    from crisp_attention.experiment.data import dataset

    named = []
    monkeypatch.setattr(dataset, "fit_limits", lambda spec, announce: spec)
    monkeypatch.setattr(studies, "_run", lambda spec, *_: named.append(spec.name))
    CliRunner().invoke(app, ["reproduce", "--dataset", name], catch_exceptions=False)
    assert re.fullmatch(r"quick-[A-Za-z0-9._-]*", named[0])
    assert len(named[0]) <= 60


@pytest.mark.parametrize(
    "source", ["a\0b", "../nothing", "~nobody-of-that-name", "~nobody-of-that-name/x.csv", "/x/y.csv"]
)
def test_hostile_sources_are_a_sentence(source, tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("text,label\na,b\n", encoding="utf-8")
    with pytest.raises(CrispError):
        read(DataSpec(source=source), lambda _: None)
    with pytest.raises(CrispError):
        read(DataSpec(source=str(file), test=source), lambda _: None)
    with pytest.raises(CrispError):
        resolve(source)


def test_a_record_cannot_name_a_file_elsewhere(tmp_path):
    spec = make_spec(seeds=1)
    store = fill(tmp_path / "run", spec, draws({}))
    record = store.load(planned(spec)["dense", 0].config.run_id)
    for file in ("../../secret.npz", "/etc/passwd", str(store.records / record.arrays.file), "other.npz"):
        forged = record.model_copy(update={"arrays": record.arrays.model_copy(update={"file": file})})
        with pytest.raises(RecordError, match=re.escape(repr(file))):
            store.load_arrays(forged)


@pytest.mark.slow
def test_links_in_a_run_directory_are_replaced_not_followed(tmp_path):
    """Of every file that opening, saving and reporting write."""
    spec = make_spec(seeds=1)
    store = fill(tmp_path / "run", spec, draws({}))
    study.rebuild(store.folder)
    run = planned(spec)["dense", 0]
    record, arrays = store.load(run.config.run_id), store.load_arrays(store.load(run.config.run_id))
    outside = tmp_path / "outside"
    outside.mkdir()
    written = [path for path in store.folder.rglob("*") if path.is_file() and path.parent.name != "locks"]
    written += [store.folder / "examples.json"]
    own = [path for path in written if path.parent.name != "records" or path.stem == run.config.run_id]
    for place, path in enumerate(own):
        secret = outside / str(place)
        secret.write_bytes(path.read_bytes() if path.exists() else b"secret")
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in outside.iterdir()}
    store.open(spec, PRINTS)
    store.save(record.model_copy(update={"reason": "again"}), arrays, before=record)
    store.save_examples(Examples((), (), (), ()))
    (store.folder / "examples.json").unlink()  # one without texts is no page's business
    study.rebuild(store.folder)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in outside.iterdir()} == before
    # Outputs that are there already, to the last byte, are read and left alone.
    assert not any(path.is_symlink() for path in own if path.suffix != ".npz")


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="the system cannot refuse links")
def test_a_lock_does_not_touch_what_a_link_points_to(tmp_path):
    store = Store(tmp_path / "run")
    (store.folder / "locks").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("kept", encoding="utf-8")
    (store.folder / "locks" / "abc.lock").symlink_to(secret)
    with pytest.raises(CrispError):
        store.lock("abc")
    assert secret.read_text(encoding="utf-8") == "kept"


def test_sweeping_does_not_leave_the_directory(tmp_path):
    """What killed processes left behind is removed; what a link of that name points to is not."""
    spec = make_spec(seeds=1)
    store = fill(tmp_path / "run", spec, draws({}))
    run_id = planned(spec)["dense", 0].config.run_id
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    store.checkpoints(run_id).parent.mkdir()
    store.checkpoints(run_id).symlink_to(outside, target_is_directory=True)
    (store.records / f".{run_id}.json.half").symlink_to(outside / "kept")
    store.open(spec, PRINTS)
    assert (outside / "kept").exists()
    assert not (store.records / f".{run_id}.json.half").exists()


def test_text_from_data_and_records_is_no_markup(tmp_path):
    """Texts, classes, reasons, notes and names of models and data, in every page."""
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    spec = make_spec(seeds=2, description=attack, choices=[attack], model=attack, data={"source": attack})
    changes = {"provenance": provenance(model=attack, data=attack, data_notes=(attack,)), "classes": (attack, "b")}
    changes["arm"] = "dense"
    outcome = draws({})
    store = fill(
        tmp_path / "run", spec, lambda arm, index: "failed" if (arm, index) == ("topk-50", 1) else outcome(arm, index),
        **changes,
    )  # fmt: skip
    for path in store.records.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["status"] == "failed":
            path.write_text(json.dumps(record | {"reason": attack}), encoding="utf-8")
    store.save_examples(Examples((attack,) * 24, (), (0,), ((attack,),)))
    _, page = study.rebuild(store.folder)
    html = page.read_text(encoding="utf-8")
    assert html.count("alert(1)") > 3
    assert "<script>alert(1)" not in html
    assert "<img src=x" not in html
    markdown = (store.folder / "report.md").read_text(encoding="utf-8")
    assert "alert(1)" in markdown
    for line in markdown.splitlines():  # in a table of its own a cell stays a cell; prose is the author's
        if line.startswith("|"):
            assert "<script>" not in line


def test_a_specification_holds_data_only(tmp_path, csv_file, tiny_folders):
    """TOML, read by the standard library: no tags, no references to other files, no code."""
    text = tiny_study.toml(tiny_folders["bert"], csv_file)
    assert parse(tomllib.loads(text), "tiny").name == "tiny"
    with pytest.raises(ConfigurationError):
        parse({**tomllib.loads(text), "description": {"!!python/object": "os.system"}}, "tiny")
