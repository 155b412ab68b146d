"""Tables of names: `name -> "module:attribute"`, loaded when asked for, open to third parties through entry points."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mxmoe.errors import BrokenEntry, UnknownName


def near_names(name: str, known: Iterable[str]) -> str:
    """Say which known names are close to `name`, or list them all: "did you mean a or b?" / "known: a, b"."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known)}" if known else "none is registered"


@dataclass(frozen=True)
class Registry(Mapping[str, Any]):
    """
    A read-only table of lazily loaded objects of one kind.

    `Registry("pass", "mxmoe.passes", {"annotate-cost": "mxmoe.passes.annotate_cost:AnnotateCost"})["annotate-cost"]`
    imports that module and returns the class. Installed packages add names with an entry point of the given group;
    ours win over theirs on a clash of names.

    Raises:
        UnknownName: the name is not in the table; the message has the nearest names.
        BrokenEntry: the name is in the table, its module or attribute is not there.
    """

    kind: str
    """What the entries are, in the singular, for messages."""
    group: str
    """Entry point group that third parties use."""
    table: Mapping[str, str]
    """name -> "module:attribute"."""

    def _paths(self) -> dict[str, str]:
        theirs = {e.name: e.value for e in importlib.metadata.entry_points(group=self.group)}
        return {**theirs, **self.table}

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401  # a registry of passes holds classes, one of cost models functions
        # the installed packages are asked only about names that are not ours: reading their metadata takes milliseconds
        paths = self.table if name in self.table else self._paths()
        if name not in paths:
            raise UnknownName(kind=self.kind, name=name, near=near_names(str(name), paths))
        module, _, attribute = paths[name].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise BrokenEntry(kind=self.kind, name=name, path=paths[name], reason=error) from error

    def __contains__(self, name: object) -> bool:
        return name in self.table or name in self._paths()

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths())

    def __len__(self) -> int:
        return len(self._paths())
