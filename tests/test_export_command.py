"""`crisp export` as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commands import here
from record_builders import draws, fill, make_spec

pytestmark = pytest.mark.slow


def test_an_export_needs_no_torch_and_bad_input_exits_with_2(tmp_path):
    fill(tmp_path / "run", make_spec(seeds=1), draws({}))
    code = f"""
import sys
sys.argv = ["crisp", "export", {str(tmp_path / "run")!r}, "--to", "csv"]
from crisp_attention.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
assert not {{"torch", "transformers", "mlflow"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name for path in written] == ["runs.csv", "predictions.csv"]
    assert all(path.stat().st_size for path in written)
    refused = here("export", tmp_path / "absent", "--to", "csv")
    assert refused.returncode == 2
    assert "is not a run directory: it has no study.json" in refused.stderr
    assert here("export", tmp_path / "run", "--to", "xlsx").returncode == 2
    nowhere = here("export", tmp_path / "run", "--to", "study")
    assert (nowhere.returncode, "--to study needs --out" in nowhere.stderr) == (2, True)
    published = here("export", tmp_path / "run", "--to", "study", "--out", tmp_path / "published")
    assert published.returncode == 0, published.stderr
    assert (tmp_path / "published" / "report.html").exists()
    assert f"{len(list((tmp_path / 'published' / 'records').glob('*.json')))} records in" in published.stdout
