"""Who may import whom: the table, that the code keeps to it, and that the documents show it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from mxmoe.calib import FACTS
from mxmoe.cost import COST_MODELS
from mxmoe.ir import RULES
from mxmoe.passes import PASSES, SENSITIVITIES
from mxmoe.quant import QUANTIZERS
from mxmoe.solver import SOLVERS
from mxmoe.target import BACKENDS as BACKEND_TABLE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mxmoe"
BACKENDS = ("backends.eager", "backends.numba", "backends.triton")

MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "errors": (),
    "files": (),
    "registry": (),
    "ir": (),
    "solver": (),
    "device": ("ir",),
    "quant": ("ir",),
    "target": ("ir", "device"),
    "calib": ("ir", "quant"),
    "frontend": ("ir", "quant"),
    "transform": ("ir", "quant", "calib", "frontend", "solver"),
    "cost": ("ir", "target", "device"),
    "passes": ("ir", "quant", "calib", "cost", "solver", "target", "device"),
    "settings": ("passes",),
    "backends.routing": (),
    **dict.fromkeys(BACKENDS, ("ir", "quant", "target", "backends.routing")),
    "checkpoint": (),
    "report": ("ir", "cost", "passes", "checkpoint"),
    "tokens": (),
    "carried": ("ir", "quant", "target"),
    "compiled": ("ir", "frontend", "target", "checkpoint", "report", "carried"),
    "compiler": (
        "ir",
        "quant",
        "calib",
        "frontend",
        "cost",
        "passes",
        "target",
        "settings",
        "checkpoint",
        "report",
        "tokens",
        "carried",
        "compiled",
    ),
    "testing": ("ir", "quant", "passes", "target", *BACKENDS),
    "evaluate": ("ir", "calib", "frontend", "device", "target", "report", "compiled", "compiler"),
}
"""Unit -> units that it may import. `errors` and `registry` may be imported by all; `cli` may import everything."""

FREE = ("errors", "files", "registry")
EVERYTHING = ("cli", "__init__", "__main__")

HEAVY: Mapping[str, tuple[str, ...]] = {
    "torch": (
        "quant",
        "calib",
        "frontend",
        "transform",
        "backends",
        "checkpoint",
        "carried",
        "compiled",
        "compiler",
        "testing",
        "evaluate",
    ),
    "transformers": ("evaluate",),
    "safetensors": ("checkpoint", "evaluate", "calib/hessians.py"),
    "numba": ("backends/numba",),
    "triton": ("backends/triton",),
    "pulp": ("solver/pulp.py",),
    "highspy": ("solver/pulp.py",),
    "z3": ("solver/z3.py",),
    "xdsl": ("ir", "passes", "backends"),
    "networkx": ("ir/graph.py",),
    "hypothesis": ("testing",),
    "matplotlib": ("report",),
}
"""Library -> folders and files that may load it."""

SIDE_DOORS: Mapping[str, str] = {
    "mxmoe.report.compiled": "reads the IR; the door of `report` takes plain values and loads no IR",
    "mxmoe.report.schedule": "as above",
    "mxmoe.report.summary": "as above",
    "mxmoe.evaluate.demo": "loads the whole compiler; the door of `evaluate` is for those who only measure",
    "mxmoe.evaluate.evaluation": "as above",
}
"""Files that are imported past their package's front door, with the reason."""


@dataclass(frozen=True)
class Import:
    """One imported module of ours, or of a library."""

    file: Path
    line: int
    module: str
    """Dotted; for `from mxmoe.ir import table` it is mxmoe.ir.table if that is a file, else mxmoe.ir."""
    is_for_types: bool
    """Under `if TYPE_CHECKING`."""

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


@cache
def given_by(package: str) -> frozenset[str]:
    """Names that a package's front door gives."""
    path = ROOT.joinpath(*package.split("."), "__init__.py")
    if not path.is_file():
        return frozenset()
    lists = [node.value for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)]
    return frozenset(name for one in lists if isinstance(one, ast.List) for name in ast.literal_eval(one))


def is_file_of(package: str, name: str) -> bool:
    """Whether `from package import name` is a file: `matmul` of `quant` is one, and a function that its door gives."""
    path = ROOT.joinpath(*package.split("."), name)
    return name not in given_by(package) and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


def read_imports(file: Path) -> Iterator[Import]:
    """Every import of a file: at its top, in functions, and for types only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{file}:{node.lineno}: write imports of ours in full"
            names = [alias.name for alias in node.names]
            modules = {f"{node.module}.{one}" if is_file_of(node.module, one) else node.module for one in names}
        else:
            continue
        for module in modules:
            yield Import(file, node.lineno, module, id(node) in for_types)


IMPORTS = [found for file in sorted(PACKAGE.rglob("*.py")) for found in read_imports(file)]
OURS = [found for found in IMPORTS if found.module.split(".")[0] == "mxmoe"]


def unit_of(dotted: str) -> str:
    """`mxmoe.ir.table` -> ir, `mxmoe.backends.numba.tiles` -> backends.numba, `mxmoe` -> __init__."""
    parts = dotted.split(".")[1:]
    if not parts:
        return "__init__"
    return ".".join(parts[:2]) if parts[0] == "backends" else parts[0]


def dotted_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_table_names_every_unit() -> None:
    units = {unit_of(dotted_of(file)) for file in PACKAGE.rglob("*.py")}
    assert units - {"backends"} == set(MAY_IMPORT) | set(EVERYTHING)


def test_nobody_imports_what_the_table_forbids() -> None:
    wrong: list[str] = []
    for found in OURS:
        own, other = unit_of(dotted_of(found.file)), unit_of(found.module)
        if own in EVERYTHING or own == other or (other in FREE and own != "errors"):
            continue
        if other not in MAY_IMPORT[own]:
            wrong.append(f"{found}; {own} may import {', '.join(MAY_IMPORT[own]) or 'nothing'}")
    assert not wrong


def test_the_table_has_no_cycle_and_neither_has_the_code() -> None:
    table = nx.DiGraph([(unit, other) for unit, others in MAY_IMPORT.items() for other in others])
    assert nx.is_directed_acyclic_graph(table), nx.find_cycle(table)
    pairs = {(unit_of(dotted_of(found.file)), unit_of(found.module)) for found in OURS}
    # the package's own door loads lazily, so what it names for types is no edge that Python walks
    code = nx.DiGraph([(own, other) for own, other in pairs if own != other and own not in EVERYTHING])
    assert nx.is_directed_acyclic_graph(code), nx.find_cycle(code)


def test_files_are_free_of_cycles_too() -> None:
    edges = {(dotted_of(found.file), found.module) for found in OURS if not found.is_for_types}
    files = nx.DiGraph([edge for edge in edges if edge[0] != edge[1]])
    assert nx.is_directed_acyclic_graph(files), nx.find_cycle(files)


def test_other_packages_are_entered_by_the_front_door() -> None:
    wrong: list[str] = []
    for found in OURS:
        own, other = unit_of(dotted_of(found.file)), unit_of(found.module)
        door = f"mxmoe.{other}" if other != "__init__" else "mxmoe"
        if own != other and own != "__init__" and found.module != door and found.module not in SIDE_DOORS:
            wrong.append(f"{found}; import it from {door}")
    assert not wrong


def test_every_side_door_is_used() -> None:
    assert {found.module for found in OURS if unit_of(dotted_of(found.file)) != unit_of(found.module)} >= set(
        SIDE_DOORS
    )


def test_heavy_libraries_are_loaded_at_the_leaf() -> None:
    wrong: list[str] = []
    for found in IMPORTS:
        library = found.module.split(".")[0]
        where = found.file.relative_to(PACKAGE).as_posix()
        places = HEAVY.get(library)
        if places is None or found.is_for_types:
            continue
        if not any(where in (place, f"{place}.py") or where.startswith(f"{place}/") for place in places):
            wrong.append(f"{found}; only {', '.join(places)} may")
    assert not wrong


def loaded_by(statement: str) -> tuple[set[str], float]:
    """Run a statement in a fresh interpreter: top-level modules that it loads, and seconds of CPU."""
    code = f"""
import json, sys, time
began = time.process_time()
{statement}
seconds = time.process_time() - began
print(json.dumps([sorted({{name.partition(".")[0] for name in sys.modules}}), seconds]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules, seconds = json.loads(done.stdout)
    return set(modules), seconds


def test_importing_the_package_loads_nothing_heavy_and_is_quick() -> None:
    modules, seconds = loaded_by("import mxmoe")
    assert not modules & (set(HEAVY) | {"numpy"})
    assert seconds < 0.2


@pytest.mark.parametrize(
    "statement",
    [
        "import mxmoe.ir, mxmoe.solver, mxmoe.device, mxmoe.target, mxmoe.cost, mxmoe.passes, mxmoe.report, mxmoe.cli",
        "from mxmoe import Plan, Scheme, Table, parse_ir, print_ir",
        "from mxmoe.solver import SOLVERS; SOLVERS['lagrangian']",
        "from mxmoe.passes import PASSES, parse_passes; parse_passes('default')",
        "from mxmoe.calib import Stats",
    ],
)
def test_planning_needs_neither_torch_nor_a_backend(statement: str) -> None:
    modules, _ = loaded_by(statement)
    assert not modules & {"torch", "transformers", "numba", "triton", "pulp", "highspy", "z3", "hypothesis"}


def test_lazy_names_are_all_there() -> None:
    import mxmoe

    assert set(mxmoe.__all__) <= set(dir(mxmoe))
    for name in mxmoe.__all__:
        assert getattr(mxmoe, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        mxmoe.compil  # noqa: B018  # the access is what is tested


def rows_of_document() -> dict[str, tuple[str, ...]]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Who may import whom")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|$", section, flags=re.MULTILINE)
    return {
        unit: tuple(re.findall(r"`([^`]+)`", right)) for left, right in rows for unit in re.findall(r"`([^`]+)`", left)
    }


def test_the_document_shows_this_table() -> None:
    shown = rows_of_document()
    assert shown == {unit: others for unit, others in MAY_IMPORT.items() if unit not in FREE}


def test_the_document_shows_the_stages() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*?) ?\| (.*?) ?\|$", text, flags=re.MULTILINE)
    shown = {
        stage: (gemm, set(re.findall(r"\w+", may)), set(re.findall(r"\w+", must))) for stage, gemm, may, must in rows
    }
    assert shown == {
        stage: (rule.gemm, set(rule.may), set().union(*rule.must.values())) for stage, rule in RULES.items()
    }


REGISTRIES = (PASSES, SENSITIVITIES, FACTS, BACKEND_TABLE, QUANTIZERS, SOLVERS, COST_MODELS)


def test_the_document_shows_the_entry_points() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"`(mxmoe\.\w+)` \|$", text, flags=re.MULTILINE))
    assert shown == {registry.group for registry in REGISTRIES}


def test_the_document_shows_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("## The tree")[1].split("\n## ")[0]
    shown = set(re.findall(r"^ {6,8}(\w+(?:/|\.py))(?= )", tree, flags=re.MULTILINE))
    there = {
        path.name + ("/" if path.is_dir() else "")
        for path in (*PACKAGE.iterdir(), *(PACKAGE / "backends").iterdir())
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    assert shown == there - {"__init__.py", "__main__.py"}
