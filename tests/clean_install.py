"""A wheel as a user meets it: installed into an empty environment, with one extra at a time, and tried.

    python tests/clean_install.py dist/crisp_attention-VERSION-py3-none-any.whl              no extra, and `experiment`
    python tests/clean_install.py WHEEL --extra cpu --extra tune                             these
    python tests/clean_install.py WHEEL --all                                                every one (half an hour)

Options after `--` go to pip, as `-- --extra-index-url ...`. Needs a package index.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent

_OPERATOR = """
import torch, crisp_attention as crisp
from transformers import BertConfig, BertModel
q = torch.randn(1, 2, 8, 16, requires_grad=True)
crisp.attention(q, q, q, sparsity=0.5).sum().backward()
model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
crisp.sparsify(model, sparsity=0.5)
assert crisp.check(model).ok
crisp.densify(model)
"""

# What is tried with each extra: Python, then commands with what they must print.
SMOKE: dict[str, tuple[str, list[tuple[list[str], str]]]] = {
    "": (_OPERATOR, [(["crisp", "data"], "needs the extra 'experiment'")]),
    "bench": ("import entmax, x_transformers", []),
    "cpu": ("import torch, crisp_attention as c\nq = torch.randn(1, 2, 8, 16)\n"
            "c.attention(q, q, q, sparsity=0.5, backend='cpu')", []),
    "dev": ("import hypothesis, pytest, ruff", []),
    "docs": ("import mkdocs, mkdocstrings, material", []),
    "entmax": ("import torch, crisp_attention as c\nq = torch.randn(1, 2, 8, 16)\n"
               "c.attention(q, q, q, rule='entmax15')", []),
    "experiment": (_OPERATOR, [
        (["crisp", "--version"], "crisp-attention "),
        (["crisp", "data"], "movie-snippets"),
        (["crisp", "report", "REPORT"], "No verdict"),
        (["crisp", "reproduce", "--model", "tiny-vit", "--dataset", "digits", "--seeds", "1", "--dry-run"], "dense"),
    ]),
    "gpu": ("import triton", []),
    "mlflow": ("import mlflow", [(["crisp", "export", "REPORT", "--to", "mlflow"], "12 runs written to MLflow")]),
    "ray": ("import contextlib, crisp_attention.experiment.execution.choice as e\n"
            "from crisp_attention.experiment.specification.resources import ResourcesSpec\n"
            "with contextlib.closing(e.choose('ray', ResourcesSpec())) as ray:\n"
            "    assert ray.divide(None, 1, 1).place == 'on Ray (1 node)'", []),
    "timm": ("import timm, torch, crisp_attention as c\nm = timm.create_model('vit_tiny_patch16_224')\n"
             "c.sparsify(m, sparsity=0.5)\nassert c.check(m, inputs={'x': torch.randn(1, 3, 224, 224)}).ok", []),
    "tune": ("import optuna", [
        (["crisp", "tune", "digits", "--model", "tiny-vit", "--trials", "1", "--dry-run"], "Tuning first: 2 trials"),
    ]),
}  # fmt: skip


def main() -> None:
    """Try the wheel, extra by extra; exits with 1 if one fails."""
    own, _, of_pip = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--extra", action="append", choices=[name for name in SMOKE if name], default=[])
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args(own.split())
    extras = list(SMOKE) if options.all else options.extra or ["", "experiment"]
    failed = [extra for extra in extras if not tried(options.wheel.resolve(), extra, of_pip.split())]
    sys.exit(f"failed: {', '.join(name or '(no extra)' for name in failed)}" if failed else 0)


def tried(wheel: Path, extra: str, pip_arguments: list[str]) -> bool:
    """Whether a fresh environment takes the wheel and does what it should; says so."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crisp-install-") as folder:
        home = Path(folder)
        venv.create(home / "env", with_pip=True)
        bin_folder = home / "env" / ("Scripts" if sys.platform == "win32" else "bin")
        required = f"{wheel}[{extra}]" if extra else str(wheel)
        code, commands = SMOKE[extra]
        install = ["python", "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *pip_arguments]
        steps = [([*install, required], ""), (["python", "-m", "pip", "check"], ""), (["python", "-c", code], "")]
        for command, wanted in [*steps, *commands]:
            if "REPORT" in command:
                shutil.copytree(ROOT / "results" / "quick", home / "REPORT")
            program, *arguments = command
            done = subprocess.run(
                [str(bin_folder / program), *arguments], cwd=home, capture_output=True, text=True, check=False
            )
            said = done.stdout + done.stderr
            refused = done.returncode != 0 and "needs the extra" not in wanted
            if refused or wanted not in said:
                print(f"{extra or '(no extra)'}: {' '.join(command[:6])} failed\n{said[-3000:]}")
                return False
    print(f"{extra or '(no extra)'}: ok, {time.monotonic() - began:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    main()
