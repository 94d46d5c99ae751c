"""What is published rebuilds from what is committed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from crisp_attention.experiment import study
from crisp_attention.experiment.specification.spec import read

ROOT = Path(__file__).parent.parent
QUICK = ROOT / "results" / "quick"
STUDIES = sorted((ROOT / "studies").glob("*.toml"))


def test_the_quick_study_rebuilds_from_its_records(tmp_path):
    folder = tmp_path / "quick"
    shutil.copytree(QUICK, folder)
    (folder / "report.md").unlink()
    study.rebuild(folder)
    assert (folder / "report.md").read_text(encoding="utf-8") == (QUICK / "report.md").read_text(encoding="utf-8")


def test_the_readme_says_what_the_records_say():
    analysis = study.analyse(study.Store(QUICK))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for arm in analysis.arms:
        assert f"| {arm.accuracies.mean():.2f} ± {arm.accuracies.std(ddof=1):.2f} |" in readme
    for contrast in analysis.contrasts:
        assert ", ".join(f"{points:+.2f}" for points in contrast.differences) in readme


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_what_is_published_is_what_was_specified(path):
    spec = read(path)
    assert spec.name == path.stem
    published = ROOT / "results" / spec.name
    if published.exists():
        asked, _, seeds = study.Store(published).study()
        assert asked == spec
        assert seeds == [spec.seeds]


def test_a_reader_finds_the_same_contrast_without_us(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "results" / "README.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(ROOT)
    found: dict = {}
    exec(code, found)
    analysis = study.analyse(study.Store(Path(found["study"])))
    contrast = analysis.primary
    np.testing.assert_allclose(found["difference"], contrast.differences)
    assert found["p_value"] == contrast.p_value
