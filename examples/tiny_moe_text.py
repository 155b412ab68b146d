"""The text that the small model learns: the Python standard library, split by file and labelled byte by byte."""

from __future__ import annotations

import hashlib
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path

import torch
from torch import Tensor

LICENCE = "PSF-2.0"
NOTICE = (
    b"# Files of the Python standard library, unchanged and joined. Copyright (c) 2001 Python Software Foundation;\n"
    b"# All Rights Reserved. Licensed under the Python Software Foundation License Version 2 (PSF-2.0).\n"
)
# Generated tables teach a model nothing but tables; installed packages have licences of their own.
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings", "cjkencodings", "lib-dynload"}
LARGEST_FILE = 800_000
CALIBRATION_SHARE, HELD_OUT_SHARE = 0.04, 0.06
SMALLEST_PART = 4096

# One lexeme per match; the name of the group that matched is the kind of all its bytes.
LEXEME = re.compile(
    rb"""(?P<string>[rbfuRBFU]{0,2}(?:\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))"""
    rb"""|(?P<comment>\#[^\n]*)|(?P<name>[A-Za-z_]\w*)|(?P<number>\d[\w.]*)|(?P<space>\s+)|(?P<punctuation>.)""",
    re.DOTALL,
)
KINDS = ("string", "comment", "name", "keyword", "number", "space", "punctuation")


@dataclass(frozen=True)
class Corpus:
    """The text, split by file: part -> [(relative path, content)], in the order of the hashes of the paths."""

    parts: dict[str, list[tuple[str, bytes]]]

    def text(self, part: str) -> bytes:
        """Return all files of one part, joined by an empty line."""
        return b"\n".join(content for _, content in self.parts[part])

    def sample(self, part: str, size: int) -> tuple[bytes, list[str]]:
        """Return about `size` bytes of whole files of one part under the licence notice, and the files' names."""
        chosen: list[tuple[str, bytes]] = []
        total = 0
        for path, content in self.parts[part]:
            if total + len(content) <= size and len(content) <= max(size // 4, 1):
                chosen.append((path, content))
                total += len(content)
        return NOTICE + b"\n".join(content for _, content in chosen), [path for path, _ in chosen]


def read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (relative path, content) of every Python source in a folder or a tar archive."""
    if source.is_dir():
        for path in sorted(source.rglob("*.py")):
            if path.is_file():
                yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    with tarfile.open(source) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.name.endswith(".py") else None
            if stream is not None:
                yield member.name.removeprefix("./"), stream.read()


def is_prose_or_code(path: str, content: bytes) -> bool:
    """Tell text worth learning from generated tables, foreign packages and undecodable test data."""
    if SKIPPED_FOLDERS.intersection(path.split("/")) or not 64 <= len(content) <= LARGEST_FILE:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def part_of(path: str) -> str:
    """Return the part that a file belongs to; it depends on nothing but its path."""
    share = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") / 2**32
    if share < CALIBRATION_SHARE:
        return "calibration"
    return "held_out" if share < CALIBRATION_SHARE + HELD_OUT_SHARE else "train"


def read_corpus(source: Path) -> Corpus:
    """Read and split the text; a second file with the same content is dropped, whatever its part."""
    parts: dict[str, list[tuple[str, bytes]]] = {"train": [], "calibration": [], "held_out": []}
    seen: set[bytes] = set()
    by_hash = sorted(read_files(source), key=lambda item: hashlib.sha256(item[0].encode()).digest()[::-1])
    for path, content in by_hash:
        digest = hashlib.sha256(content).digest()
        if digest not in seen and is_prose_or_code(path, content):
            seen.add(digest)
            parts[part_of(path)].append((path, content))
    for part, files in parts.items():
        if sum(len(content) for _, content in files) < SMALLEST_PART:
            sys.exit(f"{source}: too few Python sources for the {part} part; pass a larger folder with --text")
    return Corpus(parts)


def byte_kinds(text: bytes) -> Tensor:
    """Return the kind of every byte, [len(text)] int64, an index into KINDS."""
    kinds = torch.empty(len(text), dtype=torch.int64)
    for match in LEXEME.finditer(text):
        kind = match.lastgroup or "punctuation"
        if kind == "name" and iskeyword(match.group().decode()):
            kind = "keyword"
        kinds[match.start() : match.end()] = KINDS.index(kind)
    return kinds
