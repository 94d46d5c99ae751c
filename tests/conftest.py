"""Small random models on disk, a small tokenizer, and a machine without a hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton reads it when it is imported: its kernels run on the CPU. TRITON_INTERPRET=0 runs their tests on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from small_models import WORDS, sentence_rows, tiny_config

# Beside the source users have theirs.
os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "crisp-attention-kernels")

torch.set_num_threads(1)
# In CI the same examples each time, so that a failure is one of the change; elsewhere new ones, which explore.
settings.register_profile("default", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.register_profile("thorough", deadline=None, max_examples=1500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Path]:
    """Random BERT, DistilBERT and RoBERTa saved to disk with a tokenizer."""
    from transformers import AutoModelForSequenceClassification

    folders = {}
    for kind in ("bert", "distilbert", "roberta"):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind)
        AutoModelForSequenceClassification.from_config(tiny_config(kind)).save_pretrained(folder)
        for file in tokenizer_folder.iterdir():
            shutil.copy(file, folder / file.name)
        folders[kind] = folder
    return folders


@pytest.fixture(params=["bert", "distilbert", "roberta"])
def model(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]):
    """A tiny classifier in evaluation mode, of each kind in turn."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(tiny_folders[request.param]).eval()


@pytest.fixture
def bert(tiny_folders: dict[str, Path]):
    """A tiny BERT classifier in evaluation mode."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(tiny_folders["bert"]).eval()


@pytest.fixture(scope="session")
def csv_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set with columns text and label."""
    file = tmp_path_factory.mktemp("data") / "films.csv"
    lines = ["text,label", *(f"{text},{label}" for text, label in sentence_rows(160))]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow, which takes seconds to make: once for each version on a machine."""
    import mlflow

    file = Path(tempfile.gettempdir()) / f"crisp-attention-mlflow-{mlflow.__version__}.sqlite3"
    if not file.exists():
        scratch = tmp_path_factory.mktemp("mlflow") / "empty.sqlite3"
        mlflow.MlflowClient(f"sqlite:///{scratch}").search_experiments()
        os.replace(shutil.copy(scratch, f"{file}.{os.getpid()}"), file)
    return file
