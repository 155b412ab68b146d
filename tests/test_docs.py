"""What README and docs show has been run."""

from __future__ import annotations

from pathlib import Path

import pytest

from .docs import Block, blocks, matches, run_console, run_document

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
