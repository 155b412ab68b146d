"""
What README and docs show has been run: their Python blocks, in order and in one module, and their console blocks.

In a fenced block marked `console`, lines that begin with `$ mxmoe` are run through the command line's own `main`, in a
folder of the document's own; what follows is what they must print, where a line of three dots stands for any lines.
Blocks of other languages, and those with `not-run` after the language, are left alone.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from mxmoe.cli import main

_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    """Of the document where the text begins."""


def blocks(document: str) -> list[Block]:
    """The blocks of a document that are to be run."""
    found = [
        Block(match[1], match[3], document[: match.start(3)].count("\n") + 1)
        for match in _FENCE.finditer(document)
        if "not-run" not in match[2]
    ]
    return [block for block in found if block.language in ("python", "console")]


def run_document(path: Path, folder: Path) -> int:
    """Run all blocks of a document with `folder` as the current one, and return how many there were."""
    shown = blocks(path.read_text(encoding="utf-8"))
    with module_for(f"document_{path.stem.replace('-', '_')}") as module, contextlib.chdir(folder):
        for block in shown:
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
                exec(code, module.__dict__)
            else:
                run_console(block, path)
    return len(shown)


@contextlib.contextmanager
def module_for(name: str) -> Iterator[ModuleType]:
    """A module that is known by name, as long as the document runs: an entry point can find its classes."""
    module = ModuleType(name)
    sys.modules[name] = module
    try:
        yield module
    finally:
        for thing in vars(module).values():
            if isinstance(thing, contextlib.ExitStack):
                thing.close()
        del sys.modules[name]


def run_console(block: Block, path: Path) -> None:
    """Run the commands of a block and compare what they print."""
    commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    for command in commands[1:]:
        line, _, wanted = command.replace("\\\n", " ").partition("\n")
        words = shlex.split(line)
        assert words[0] == "mxmoe", f"{path}:{block.line}: only mxmoe is run, not {line}"
        printed = io.StringIO()
        both = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
        with both[0], both[1], contextlib.suppress(SystemExit):  # --help and --version exit
            main(words[1:])
        found = printed.getvalue().strip()
        if not matches(found, wanted.strip()):
            raise AssertionError(f"{path}:{block.line}: $ {line}\nprints\n{found}\nand not\n{wanted}")


def matches(found: str, wanted: str) -> bool:
    """Compare, where three dots alone on a line stand for any lines, and dots within one for any words."""
    pattern = "".join("*" if part == "..." else part.replace("[", "[[]") for part in re.split(r"(\.\.\.)", wanted))
    return fnmatch.fnmatchcase(found, pattern.replace("?", "[?]"))


ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if blocks(path.read_text()))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_runs(path: Path, tmp_path: Path) -> None:
    assert run_document(path, tmp_path) > 0


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n```python not-run\nx = 2\n```\n```toml\nx = 3\n```\n"
    text += "```console\n$ mxmoe\n```\n"
    assert blocks(text) == [Block("python", "x = 1\n", 4), Block("console", "$ mxmoe\n", 14)]


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("a\nb\nc", "a\n...\nc", True),
        ("a [1]?", "a [1]?", True),
        ("took 3.1 ms", "took ... ms", True),
        ("a\nb", "a", False),
        ("ab", "a?", False),
    ],
)
def test_output_is_compared(found: str, wanted: str, same: bool) -> None:
    assert matches(found, wanted) == same


def test_a_document_that_shows_what_is_not_printed_fails() -> None:
    with pytest.raises(AssertionError, match=r"prints\nmxmoe \d"):
        run_console(Block("console", "$ mxmoe --version\nmxmoe 17\n", 1), Path("x.md"))


def test_a_document_whose_code_fails_says_where(tmp_path: Path) -> None:
    (tmp_path / "bad.md").write_text("text\n\n```python\nx = 1\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_document(tmp_path / "bad.md", tmp_path)
    assert caught.traceback[-1].lineno == 4
