"""How long does a report of a thousand runs take, and how much memory?

Makes run directories of made-up records, as training would leave them, and has them analysed and reported by a
process of its own, whose peak memory is measured. Processor seconds stand beside those on the clock, since the
machine may be busy with other work; the load average says how busy it was.

    python benchmarks/report_at_scale.py [--examples 872] [--shapes 50x20 10x100] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

REPORT = """
import json, resource, sys, time
from pathlib import Path
started = time.perf_counter()
from crisp_attention.experiment import report
from crisp_attention.experiment.conclusions.analysis import analyse
from crisp_attention.experiment.results.store import Store
folder = Path(sys.argv[1])
imported = time.perf_counter()
analysis = analyse(Store(folder))
analysed = time.perf_counter()
page = report.write(analysis, folder)
print(json.dumps({
    "import_seconds": round(imported - started, 2),
    "analysis_seconds": round(analysed - imported, 2),
    "report_seconds": round(time.perf_counter() - analysed, 2),
    "cpu_seconds": round(time.process_time(), 2),
    "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    "page_mib": round(page.stat().st_size / 2**20, 2),
    "records": len(analysis.records),
}))
"""


def make(folder: Path, arms: int, seeds: int, examples: int) -> None:
    """A run directory of `arms` x `seeds` finished runs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from record_builders import draws, fill_in_full, make_spec

    names = [{"name": "dense"}]
    names += [{"name": f"topk-{number}", "sparsity": number / arms} for number in range(1, arms)]
    spec = make_spec(seeds=seeds, arms=names, primary={"arm": names[-1]["name"]})
    accuracy = {item["name"]: 0.9 - 0.1 * number / arms for number, item in enumerate(names)}
    fill_in_full(folder, spec, draws(accuracy, examples))


def measure(arms: int, seeds: int, examples: int) -> dict[str, float]:
    """Seconds and memory of one report, in a process that may use two cores."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "runs"
        make(folder, arms, seeds, examples)
        environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, "-c", REPORT, str(folder)], env=environment, check=True, capture_output=True, text=True
        )
    found = json.loads(done.stdout)
    found["seconds"] = round(sum(found[f"{part}_seconds"] for part in ("import", "analysis", "report")), 2)
    return {"arms": arms, "seeds": seeds, "examples": examples, **found}


def main() -> None:
    """Measure each shape and print, or write, what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=872)
    parser.add_argument("--shapes", nargs="+", default=["50x20", "10x100"], help="arms x seeds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [measure(*map(int, shape.split("x")), options.examples) for shape in options.shapes]
    content = json.dumps(
        {
            "benchmark": "report_at_scale",
            "machine": {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()},
            "load_average_before": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
            "results": results,
        },
        indent=1,
    )
    print(content)
    if options.json:
        options.json.write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
