"""What is published is whole, holds nothing else, and says one version."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import crisp_attention
from clean_install import SMOKE

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(out: Path, *kinds: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *kinds, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The wheel made of the tree, the sdist, and the wheel made of the sdist."""
    pytest.importorskip("build")
    direct, both = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("both")
    build(direct, "--wheel")
    build(both)  # the sdist, and a wheel from it
    return next(direct.glob("*.whl")), next(both.glob("*.tar.gz")), next(both.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(published):
    wheel, *_ = published
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "crisp_attention").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = f"crisp_attention-{crisp_attention.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == source
    for kind in ("py.typed", ".toml", ".j2", ".js", ".css", ".json"):
        assert any(name.endswith(kind) for name in source), f"no {kind} in the package"
    assert f"{info}/licenses/LICENSE" in names


def test_the_source_archive_builds_the_same_wheel(published):
    direct, _, of_source = published
    assert direct.name == of_source.name
    assert direct.read_bytes() == of_source.read_bytes()


def test_the_source_archive_holds_what_builds_and_tests_it(published):
    with tarfile.open(published[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        "docs/index.md",
        "tests/test_wheel.py",
        "results/quick/study.json",
    }
    assert wanted <= names
    assert not {name for name in names if name.split("/")[0] in {"runs", ".venv", "build", "dist"}}


def test_the_metadata_say_what_the_project_says(published):
    with zipfile.ZipFile(published[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == crisp_attention.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata.get_payload().startswith("# Crisp attention")


def test_the_version_is_written_once():
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    version = f'"{crisp_attention.__version__}"'
    told = [path for path in (ROOT / "src").rglob("*.py") if version in path.read_text(encoding="utf-8")]
    assert told == [ROOT / "src" / "crisp_attention" / "__init__.py"]
    assert "version:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace("cff-version:", "")


def test_every_extra_is_tried_and_explained():
    extras = set(PROJECT["optional-dependencies"])
    assert extras == set(SMOKE) - {""}
    start = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    assert all(f"`{extra}`" in start for extra in extras - {"dev", "docs"})
