"""Every example, run in small: other weights and fewer epochs, the same code."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "csv_to_verdict.ipynb"


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """Runs a script in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_trainer(example, tiny_folders):
    printed = example("trainer.py", "--model", tiny_folders["bert"], "--epochs", 0.2)
    assert "BertForSequenceClassification: ok" in printed
    assert "the same weights, dense: {'eval_loss'" in printed
    assert "loaded again: {'sparsity': 0.8" in printed


@pytest.mark.slow
def test_pytorch_loop(example):
    printed = example("pytorch_loop.py", "--epochs", 2, "--examples", 128)
    assert "Classifier: ok" in printed
    assert "epoch 2: accuracy" in printed
    assert "50% of all pairs removed" in printed.splitlines()[-1]


@pytest.mark.slow
def test_vit_timm(example):
    pytest.importorskip("timm")
    printed = example("vit_timm.py", "--epochs", 1, "--examples", 64)
    assert "VisionTransformer: ok" in printed
    assert "epoch 1: accuracy" in printed


@pytest.mark.slow
def test_lora_peft(example, tiny_folders):
    pytest.importorskip("peft")
    printed = example("lora_peft.py", "--model", tiny_folders["bert"], "--epochs", 1)
    assert "BertForSequenceClassification: ok" in printed
    assert "epoch 1: accuracy" in printed
    assert "loaded again: {'sparsity': 0.5" in printed


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_outputs():
    cells = code_cells()
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
def test_csv_to_verdict(tmp_path, tiny_folders, monkeypatch):
    """In a kernel, which has no main module that a worker could import."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("MODEL", str(tiny_folders["bert"]))
    monkeypatch.setenv("SEEDS", "1")
    shutil.copy(EXAMPLES / "reviews.csv", tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    shown = ["".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
             for cell in notebook.cells if cell.cell_type == "code"]  # fmt: skip
    assert "3 runs to do" in shown[1]
    study = shown[2]
    assert "All runs" in study
    assert "3 of 3" in study
    assert "<progress" in study
    assert "No verdict: 1 paired seed is too few." in study
    assert 'href="runs/reviews/report.html"' in study
    assert "dense-again" in shown[3]
    assert len(list((tmp_path / "runs" / "reviews" / "records").glob("*.json"))) == 3


def test_every_example_is_explained_and_run():
    told = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tested = Path(__file__).read_text(encoding="utf-8")
    for file in EXAMPLES.iterdir():
        if file.suffix in (".py", ".ipynb"):
            assert f"[{file.name}]({file.name})" in told
            assert f"def test_{file.stem}(" in tested
