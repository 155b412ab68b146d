"""Every line of every table loads; names that are not there say which are; installed packages add their own."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest

import mxmoe
from mxmoe.device import device
from mxmoe.errors import BrokenEntry, UnknownName
from mxmoe.ir import Scheme
from mxmoe.passes import PASSES, PIPELINES, parse_passes
from mxmoe.registry import Registry, near_names
from mxmoe.target import BACKENDS, TARGETS, find_target


def registries() -> dict[str, Registry]:
    """Every registry of the package, by kind."""
    names = [module.name for module in pkgutil.walk_packages(mxmoe.__path__, "mxmoe.") if "__main__" not in module.name]
    held = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return {value.kind: value for value in held if isinstance(value, Registry)}


REGISTRIES = registries()
ENTRIES = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry.table]

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package on the path with a module `guest_of_mxmoe` and the given entry_points.txt."""

    def put(entry_points: str) -> None:
        info = tmp_path / "guest_of_mxmoe-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: guest-of-mxmoe\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        (tmp_path / "guest_of_mxmoe.py").write_text("class Guest:\n    pass\n")
        (tmp_path / "guest_that_fails.py").write_text("import a_library_that_nobody_has\n")
        monkeypatch.syspath_prepend(tmp_path)

    return put


def test_the_registries_are_found() -> None:
    assert set(REGISTRIES) >= {"backend", "pass", "quantizer", "solver", "cost model"}
    assert len({registry.group for registry in REGISTRIES.values()}) == len(REGISTRIES)
    assert all(registry.group.startswith("mxmoe.") for registry in REGISTRIES.values())


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=lambda value: str(value))
def test_every_entry_loads(kind: str, name: str) -> None:
    entry = REGISTRIES[kind][name]
    assert callable(entry)
    assert entry.__doc__
    if isinstance(entry, type) and hasattr(entry, "name"):
        assert entry.name == name  # one name: in the table, in the class, in messages


@pytest.mark.parametrize("kind", sorted(REGISTRIES))
def test_unknown_names_answer_with_near_ones(kind: str) -> None:
    registry = REGISTRIES[kind]
    for name in registry.table:
        with pytest.raises(UnknownName, match=f"no {kind} named '{name}x'; did you mean .*{name}"):
            registry[f"{name}x"]
    assert "nothing like it" not in registry


@pytest.mark.parametrize("kind", sorted(REGISTRIES))
def test_installed_packages_add_entries(kind: str, install: Install) -> None:
    registry = REGISTRIES[kind]
    before = len(registry)
    install(f"[{registry.group}]\nguest = guest_of_mxmoe:Guest\n")
    assert registry["guest"].__name__ == "Guest"
    assert "guest" in registry
    assert "guest" in list(registry)
    assert len(registry) == before + 1


def test_ours_win_on_a_clash(install: Install) -> None:
    ours = PASSES["annotate-cost"]
    install("[mxmoe.passes]\nannotate-cost = guest_of_mxmoe:Guest\n")
    assert PASSES["annotate-cost"] is ours


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("guest_of_mxmoe:Gast", "has no attribute 'Gast'"),
        ("guest_of_nobody:Guest", "No module named 'guest_of_nobody'"),
        ("guest_that_fails:Guest", "a_library_that_nobody_has"),
    ],
)
def test_an_entry_that_cannot_be_loaded_says_why(path: str, reason: str, install: Install) -> None:
    install(f"[mxmoe.backends]\nguest = {path}\n")
    assert "guest" in BACKENDS
    with pytest.raises(BrokenEntry, match=reason) as caught:
        BACKENDS["guest"]
    assert "the backend 'guest' is registered as" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_near_names() -> None:
    assert near_names("lagrangain", ("lagrangian", "pulp")) == "did you mean lagrangian?"
    assert near_names("x", ("b", "a")) == "known: a, b"
    assert near_names("x", ()) == "none is registered"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_is_whole(name: str) -> None:
    target = find_target(name)
    assert target.name == name
    backend = BACKENDS[target.backend](**target.options)
    assert backend.name == target.backend
    assert device(target.device)
    schemes = [Scheme.parse(text) for text in target.candidates]
    assert [str(scheme) for scheme in schemes] == list(target.candidates)
    assert all(backend.supports(scheme) for scheme in schemes)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_every_pipeline_reads(name: str) -> None:
    assert tuple(step.name for step in parse_passes(name)) == PIPELINES[name]
