"""`crisp bench`: that it measures what it says, not how fast anything is."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import crisp_attention as crisp
from crisp_attention.bench import measure, results, variants
from crisp_attention.bench.measure import Plan, Timing
from crisp_attention.cli import app

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = Plan(CPU, lengths=(8, 16), tokens=32, heads=2, width=8, rounds=2)
BY_NAME = {variant.name: variant for variant in variants.VARIANTS}


def test_variants_compute_what_they_say():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 20, 16, generator=draw) for _ in range(3))
    outputs = {
        name: variant.build(CPU, 0.8)(q, k, v) for name, variant in BY_NAME.items() if variant.obstacle(CPU) is None
    }
    for name, expected in (
        ("eager", "sdpa"),
        ("cpu topk", "reference topk"),
        ("cpu percentile", "reference percentile"),
        ("masked topk", "reference topk"),
        *((("x-transformers", "reference topk"),) if "x-transformers" in outputs else ()),
    ):
        torch.testing.assert_close(outputs[name], outputs[expected])
    assert not torch.allclose(outputs["entmax"], outputs["sdpa"], atol=1e-3)


def test_what_cannot_run_says_why():
    assert BY_NAME["adasplash"].obstacle(CPU) == "does not run on cpu"
    missing = variants.Variant("x", "", BY_NAME["sdpa"].build, ("no_such_package",))
    assert missing.obstacle(CPU) == "not installed: no_such_package"


def test_ratios_are_formed_within_rounds_and_memory_is_measured():
    told = []
    timings = list(measure.measure(TINY, variants.chosen(["cpu topk", "adasplash"]), told.append))
    assert told == [
        "adasplash: does not run on cpu", "N = 8: B, H, N, D = 4, 2, 8, 8", "N = 16: B, H, N, D = 2, 2, 16, 8",
    ]  # fmt: skip
    assert [(timing.variant, timing.length) for timing in timings] == [
        ("sdpa", 8), ("cpu topk", 8), ("sdpa", 16), ("cpu topk", 16),
    ]  # fmt: skip
    for dense, ours in (timings[:2], timings[2:]):
        assert dense.ratios == (1.0, 1.0)
        assert ours.ratios == tuple(one / other for one, other in zip(ours.training, dense.training, strict=True))
        assert all(0 < ahead < whole for ahead, whole in zip(ours.forward, ours.training, strict=True))
        assert isinstance(ours.peak, int)


def test_the_peak_holds_what_is_stored():
    """Eager attention stores several matrices of scores, here 4 MiB each."""
    plan = Plan(CPU, tokens=512, heads=4, width=8)
    eager, dense = (measure.peak_bytes(plan, BY_NAME[name], 512) for name in ("eager", "sdpa"))
    assert eager > 2 * 4 * 2**20
    assert dense < eager - 4 * 2**20


def test_the_least_possible_is_counted():
    assert measure.limit(0.8) == pytest.approx(4 / 14)
    assert measure.limit(0.0) == pytest.approx(12 / 14)


@pytest.mark.parametrize("width", [60, 120])
def test_the_table_is_whole_in_a_narrow_terminal(width):
    lengths = (128, 256, 1024)
    timings = [
        Timing(name, n, (0.1,), (0.2345e-6 * n * n,), (9.12, 10.25, 12.5), 1234 * 2**20)
        for name in ("sdpa", "reference percentile", "x-transformers")
        for n in lengths
    ]
    console = Console(width=width, file=io.StringIO())
    console.print(results.table(replace(TINY, lengths=lengths), timings))
    printed = console.file.getvalue()
    assert "…" not in printed
    assert printed.count("9.12..12.50") == 9
    assert " ".join(printed.split()).count("reference percentile N^2.00") == 1
    assert re.search(r"N = 256\s+sdpa +10\.25 +9\.12\.\.12\.50 +15\.4 +1234", printed)


def test_growth_is_the_exponent():
    timings = [Timing("x", n, (1.0,), (3e-6 * n**1.7,), (1.0,), None) for n in (128, 256, 512)]
    assert measure.growth(timings) == pytest.approx(1.7)
    assert measure.growth(timings[:2]) is None


def test_the_command_prints_a_table_and_writes_what_it_measured(tmp_path):
    done = CliRunner().invoke(
        app,
        ["bench", "--length", "8", "--variant", "cpu topk", "--tokens", "32", "--heads", "2",
         "--width", "8", "--rounds", "2", "--threads", "1", "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert kept["plan"] == {
        "dtype": "float32", "heads": 2, "lengths": [8], "rounds": 2, "sparsity": 0.8, "tokens": 32, "width": 8,
    }  # fmt: skip
    assert [timing["variant"] for timing in kept["timings"]] == ["sdpa", "cpu topk"]
    assert (tmp_path / "out" / "bench.svg").read_text().lstrip().startswith("<?xml")
    assert "cpu topk" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "cpu topkk"], "Unknown variant 'cpu topkk'"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--sparsity", "1.5"], r"sparsity must be in \(0, 1\), got 1.5"),
        (["--length", "0"], r"lengths\[0\] must be at least 1, got 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--threads", "0"], r"--threads must be at least 1 and at most \d+, got 0"),
        (["--threads", "99999999999999"], r"at most \d+, got 99999999999999"),
        (["--length", "99999999999999"], "No inputs of 99999999999999 tokens can be made: .*memory"),
    ],
)
def test_bad_options_are_one_sentence(arguments, message):
    done = CliRunner().invoke(app, ["bench", *arguments])
    with pytest.raises(crisp.ConfigurationError, match=message):
        raise done.exception


def test_what_fails_at_a_length_is_left_out_there_and_loses_nothing_else(monkeypatch):
    def forgetful(device, sparsity):
        def attend(q, k, v):
            if q.shape[2] > 8:
                raise RuntimeError("out of memory\nCUDA kernel errors might be ...")
            return q * k * v

        return attend

    monkeypatch.setattr(measure, "peak_bytes", lambda *arguments: None)
    named = replace(BY_NAME["eager"], build=forgetful)
    told = []
    chosen = (BY_NAME["sdpa"], BY_NAME["cpu topk"], named)
    timings = list(measure.measure(replace(TINY, width=129), chosen, told.append))
    assert [(timing.variant, timing.length) for timing in timings] == [("sdpa", 8), ("eager", 8), ("sdpa", 16)]
    assert "eager at N = 16: out of memory" in told
    assert sum("cpu topk at N = " in line and "heads are wider than 128" in line for line in told) == 2
    with pytest.raises(crisp.ConfigurationError, match="Dense attention cannot be measured at N = 16: out of memory"):
        list(measure.measure(TINY, (replace(named, name="sdpa"),), told.append))


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    done = CliRunner().invoke(app, ["bench", "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(crisp.StorageError, match=r"could not be written: Not a directory\. Choose another --out"):
        raise done.exception
    assert "Measuring" not in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said():
    done = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert "torch sees no GPU here" in str(done.exception)


def test_records_tell_the_kind_of_machine_and_the_versions():
    told = results.machine(CPU)
    assert set(told) >= {"device", "system", "python", "torch", "numba"}
    assert "thread" in told["device"]
