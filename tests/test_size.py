"""Small stays small, and everything public says what it is for."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for folder in ("mxmoe", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)

LINES, LINES_OF_KERNELS, LINES_OF_FUNCTION = 400, 600, 60

LONGER: Mapping[str, str] = {}
"""File or file::function that may be longer, with the reason."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_kernels(path: Path) -> bool:
    """Kernels stand in files called kernels*.py, or in the folder of the GPU backend."""
    return path.name.startswith("kernels") or "backends/triton" in path.as_posix()


def functions(tree: ast.AST) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines of a function without its docstring, which is to be as long as it needs to be."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is None:
        return lines
    assert first.end_lineno is not None
    return lines - (first.end_lineno - first.lineno + 1)


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes, functions and methods; a property's setter has its getter's docstring."""
    for child in node.body:
        if not isinstance(child, ast.ClassDef | Function) or child.name.startswith("_"):
            continue
        if any(isinstance(one, ast.Attribute) and one.attr == "setter" for one in child.decorator_list):
            continue
        yield prefix + child.name, child
        if isinstance(child, ast.ClassDef):
            yield from public(child, f"{prefix}{child.name}.")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_short_and_documented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    limit = LINES_OF_KERNELS if is_kernels(path) else LINES
    lines = len(text.splitlines())
    assert name(path) in LONGER or lines <= limit, f"{lines} lines, at most {limit}: split it by what it is about"
    assert ast.get_docstring(tree), "say in a module docstring what this file is for"
    if not is_kernels(path):
        long = {f.name: body_lines(f) for f in functions(tree) if body_lines(f) > LINES_OF_FUNCTION}
        left = {function: size for function, size in long.items() if f"{name(path)}::{function}" not in LONGER}
        assert not left, f"at most {LINES_OF_FUNCTION} lines a function"
    if name(path).startswith("mxmoe/"):
        silent = [where for where, node in public(tree) if ast.get_docstring(node) is None]
        assert not silent, "public names have docstrings"


def test_every_exception_is_still_needed() -> None:
    for entry in LONGER:
        file, _, function = entry.partition("::")
        path = ROOT / file
        tree = ast.parse(path.read_text(encoding="utf-8"))
        sizes = [body_lines(one) for one in functions(tree) if one.name == function]
        limit = LINES_OF_FUNCTION if function else LINES_OF_KERNELS if is_kernels(path) else LINES
        size = max(sizes) if function else len(path.read_text(encoding="utf-8").splitlines())
        assert size > limit, f"{entry} fits by now: strike it off the list"


def test_the_library_prints_nothing() -> None:
    """Only the command line and the script behind `python -m` write to the terminal."""
    for path in FILES:
        if name(path).startswith("mxmoe/") and path.name not in ("cli.py", "__main__.py"):
            calls = [
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            ]
            printed = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
            assert not printed, f"{name(path)} prints at {printed}"


def test_packages_say_what_is_public() -> None:
    for path in sorted((ROOT / "mxmoe").rglob("__init__.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        modules = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        gives = any(module.startswith(f"{own}.") for module in modules)
        stated = any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree.body)
        assert stated or not gives, f"{name(path)} has no __all__"
