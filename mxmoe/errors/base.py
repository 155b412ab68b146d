"""The base of all errors: a sentence with blanks."""

from __future__ import annotations

from typing import ClassVar


class MxmoeError(Exception):
    """
    Base of all errors raised on purpose by this package.

    A subclass holds one sentence with blanks in `message`; raising fills the blanks by keyword, and every
    blank stays readable as an attribute in `blanks`:

        raise UnknownName(kind="pass", name="anotate-cost", near="annotate-cost")
    """

    message: ClassVar[str] = "{text}"

    def __init__(self, **blanks: object) -> None:
        self.blanks = blanks
        super().__init__(self.message.format(**blanks))
