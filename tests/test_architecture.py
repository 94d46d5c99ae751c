"""The rules of the house, read from the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import crisp_attention

ROOT = Path(crisp_attention.__file__).parent
PACKAGE = "crisp_attention"
MODULES = {
    ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# Lower rooms never import higher ones; modules of one room stand on one line.
FLOORS = [
    ["eager", "errors", "noise", "representation"],
    ["settings"],
    ["schedule", "traits"],
    ["config"],
    ["rules"],
    ["backends"],
    ["masks"],
    ["operator"],
    ["monitoring"],
    ["state"],
    ["checking"],
    ["huggingface", "modules"],
    ["verbs"],
    ["bench", "experiment"],
    ["cli"],
]
# The way through the experiment, from the specification to what people read.
EXPERIMENT_FLOORS = [
    ["specification"],
    ["data", "results", "statistics"],
    ["conclusions", "export"],
    ["report"],
    ["training"],
    ["execution", "inspection"],
    ["budget", "model_card", "outline", "outlook", "search_space", "study", "workload"],
    ["progress"],
    ["display", "notebook", "recommendation"],
    ["api"],
]
# The modules of the experiment that need torch when they are loaded.
TORCH_BOUND = {
    "data.batching",
    "inspection",
    *(
        f"training.{room}"
        for room in (
            "checkpoint",
            "evaluation",
            "journal",
            "keeping",
            "ranks",
            "timing",
            "tracking",
            "train",
            "workbench",
        )
    ),
}
TORCH_FREE = [
    "config",
    "errors",
    "representation",
    "schedule",
    "settings",
    "traits",
    # Of the experiment all that reads, plans, concludes and reports; what trains defers its imports.
    *(
        module.removeprefix(f"{PACKAGE}.")
        for module in MODULES
        if module.startswith(f"{PACKAGE}.experiment.")
        and module.removeprefix(f"{PACKAGE}.experiment.") not in TORCH_BOUND
    ),
]


def imports(module: str, *, top_level: bool = False) -> set[str]:
    """Names of the modules that one imports, `from x import y` as both x and x.y."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    nodes = _without_deferred(tree) if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _without_deferred(tree: ast.AST):
    """All nodes but those in functions and under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _without_deferred(node)


def local(names: set[str]) -> set[str]:
    """Our own modules among imported names."""
    return {name for name in names if name in MODULES}


def floor_of(module: str, floors: list[list[str]], prefix: str) -> int | None:
    room = module.removeprefix(f"{prefix}.").split(".")[0]
    return next((level for level, rooms in enumerate(floors) if room in rooms), None)


def test_every_room_has_a_floor():
    for module in MODULES:
        if module in (PACKAGE, f"{PACKAGE}.experiment"):
            continue
        inside = module.startswith(f"{PACKAGE}.experiment.")
        floors, prefix = (EXPERIMENT_FLOORS, f"{PACKAGE}.experiment") if inside else (FLOORS, PACKAGE)
        assert floor_of(module, floors, prefix) is not None, f"{module} is new: say where it stands"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {PACKAGE}))
def test_nothing_flows_back(module):
    for other in local(imports(module)):
        if other == PACKAGE:
            continue
        here, there = floor_of(module, FLOORS, PACKAGE), floor_of(other, FLOORS, PACKAGE)
        assert there <= here, f"{module} imports {other}, which stands above it"
        prefix = f"{PACKAGE}.experiment"
        if module.startswith(f"{prefix}.") and other.startswith(f"{prefix}."):
            here, there = (floor_of(name, EXPERIMENT_FLOORS, prefix) for name in (module, other))
            assert there <= here, f"{module} imports {other}, which stands above it"


def test_the_core_needs_only_torch_and_transformers():
    allowed = {"torch", "transformers", PACKAGE, *sys.stdlib_module_names}
    for module in MODULES:
        if module.startswith(tuple(f"{PACKAGE}.{room}" for room in ("experiment", "bench", "cli"))):
            continue
        roots = {name.split(".")[0] for name in imports(module)}
        extras = {"entmax"} if module == f"{PACKAGE}.rules.normalizers" else set()
        if module.startswith(f"{PACKAGE}.backends.cpu"):
            extras = {"llvmlite", "numba", "numpy"}
        if module.startswith(f"{PACKAGE}.backends.triton"):
            extras = {"triton"}
        assert roots <= allowed | extras, f"{module} imports {sorted(roots - allowed)}"


def test_backends_do_not_import_each_other():
    backends = {module for module in MODULES if module.startswith(f"{PACKAGE}.backends.")}
    assert backends
    shared = {f"{PACKAGE}.backends.{name}" for name in ("call", "choice")}
    for module in backends - {f"{PACKAGE}.backends.choice"}:
        own = {other for other in backends if other.split(".")[2] == module.split(".")[2]}
        assert not local(imports(module)) & (backends - shared - own), module


@pytest.mark.parametrize("room", TORCH_FREE)
def test_published_numbers_rebuild_without_torch(room):
    """Not a module of these, nor any that they import on the way, needs torch when it is loaded."""
    seen, queue = set(), [f"{PACKAGE}.{room}"]
    while queue:
        module = queue.pop()
        if module in seen:
            continue
        seen.add(module)
        names = imports(module, top_level=True)
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"torch", "transformers", "accelerate"}, f"{room} needs torch through {module}"
        queue += local(names)


def test_optuna_is_imported_by_the_search_alone_and_only_when_it_searches():
    searching = {f"{PACKAGE}.experiment.execution.{room}" for room in ("ledger", "tuning")}
    for module in MODULES:
        assert ("optuna" in imports(module)) == (module in searching), module
        assert not {"optuna", "sqlalchemy"} & {name.split(".")[0] for name in imports(module, top_level=True)}, module


def test_ray_is_imported_by_its_executor_alone_and_only_when_it_is_reached_for():
    engine = {f"{PACKAGE}.experiment.execution.{name}" for name in ("ray_cluster", "ray_task")}
    for module in MODULES:
        assert ("ray" in imports(module)) == (module in engine), module
        assert "ray" not in {name.split(".")[0] for name in imports(module, top_level=True)}, module


def test_importing_the_package_loads_nothing_heavy():
    code = f"""
import sys, {PACKAGE}
heavy = {{"torch", "transformers", "numpy", "pandas", "pydantic", "rich", "typer", "datasets", "matplotlib"}}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_using_the_operator_loads_no_optional_dependency():
    code = f"""
import sys, torch, {PACKAGE} as crisp
q = torch.randn(1, 1, 4, 4)
crisp.attention(q, q, q, sparsity=0.5)
optional = {{"pandas", "pydantic", "rich", "typer", "datasets", "matplotlib", "statsmodels", "entmax", "triton"}}
sys.exit(", ".join(sorted(optional & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_sorted_there_and_no_modules():
    assert crisp_attention.__all__ == sorted(crisp_attention.__all__)
    for name in crisp_attention.__all__:
        assert f"{PACKAGE}.{name}" not in MODULES, f"{name} would be shadowed by the module of that name"
        assert getattr(crisp_attention, name).__doc__, f"{name} is not documented"
    with pytest.raises(AttributeError, match="no attribute 'sparsfy'"):
        _ = crisp_attention.sparsfy


def test_rooms_stay_small():
    """About 400 lines is where a module starts to be two."""
    for module, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 450, f"{module} has {lines} lines"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["huggingface.interface", "huggingface.persistence", "modules.model", "verbs"])
def test_every_room_can_be_entered_first(module):
    """Importing Transformers registers us, so that a room which imports it may meet itself half-made."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {PACKAGE}.{module}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_ships_its_types():
    assert (ROOT / "py.typed").is_file()
