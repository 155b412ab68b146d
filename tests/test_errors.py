"""Every mistake has a class, a sentence whose blanks are filled where it is raised, and a place that raises it."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxmoe import errors
from mxmoe.errors import MxmoeError

PACKAGE = Path(errors.__file__).parent.parent
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, MxmoeError) and value is not MxmoeError
}


def blanks(message: str) -> dict[str, tuple[str, str]]:
    """Blank -> conversion and format, as `str.format` reads them."""
    parts = string.Formatter().parse(message)
    return {field: (conversion or "", spec or "") for _, field, spec, conversion in parts if field is not None}


def uses() -> Iterator[tuple[str, str, set[str] | None]]:
    """(class, place, keywords) of every error made in the package; None where keywords are spread with **."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node.exc.id in CLASSES:
                yield node.exc.id, f"{file.name}:{node.lineno}", set()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                keywords = {keyword.arg for keyword in node.keywords}
                assert not node.args, f"{file.name}:{node.lineno}: blanks are filled by keyword"
                named = {keyword for keyword in keywords if keyword is not None}
                yield node.func.id, f"{file.name}:{node.lineno}", None if None in keywords else named


USES = list(uses())


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_class_a_mistake(name: str) -> None:
    kind = CLASSES[name]
    assert kind.__doc__
    assert kind.__doc__ != MxmoeError.__doc__, "say which mistake it is"
    assert "message" in vars(kind), "a message of its own"
    values = {blank: 1.5 if spec[1] else "value" for blank, spec in blanks(kind.message).items()}
    text = str(kind(**values))
    assert not any(f"{{{blank}" in text for blank in values)
    assert kind(**values).blanks == values


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_it_is_raised_somewhere_with_every_blank(name: str) -> None:
    places = [(place, keywords) for used, place, keywords in USES if used == name]
    assert places, "nothing raises it: strike it off"
    wanted = set(blanks(CLASSES[name].message))
    for place, keywords in places:
        assert keywords is None or keywords == wanted, f"{place} fills {keywords}, the message has {wanted}"


def test_messages_are_told_apart() -> None:
    messages = [kind.message for kind in CLASSES.values()]
    assert len(set(messages)) == len(messages)


def test_a_forgotten_blank_is_loud() -> None:
    with pytest.raises(KeyError, match="near"):
        errors.UnknownName(kind="pass", name="x")
