"""
The text that the study model learns: what the machine has of permissively licensed Python, split by file.

Sources are the standard library and every installed distribution whose metadata names permissive licences only. Files
are taken as their authors wrote them; generated tables, files in other encodings and near copies are left out. C and
C++ headers of the same distributions are a set of another kind, which training never sees.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

IN_DOMAIN, OUT_OF_DOMAIN = (".py", ".md", ".rst"), (".h", ".hpp", ".hh", ".cuh")
PARTS = ("held_out", "calibration", "train", "out_of_domain")
PERMISSIVE = {
    "0bsd", "apache-2.0", "apache", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "isc",
    "llvm-exception", "mit", "mit-cmu", "mit-0", "hpnd", "ncsa", "psf-2.0", "python-2.0", "psf", "unlicense", "zlib",
}  # fmt: skip
SPOKEN = {
    "apache 2": "apache-2.0",
    "apache 2.0": "apache-2.0",
    "apache 2.0 license": "apache-2.0",
    "apache-2": "apache-2.0",
    "apache license": "apache-2.0",
    "apache license 2.0": "apache-2.0",
    "apache license, version 2.0": "apache-2.0",
    "apache license version 2.0": "apache-2.0",
    "apache license v2.0": "apache-2.0",
    "apache license v2.0 with llvm exceptions": "apache-2.0",
    "apache software license": "apache-2.0",
    "3-clause bsd": "bsd-3-clause",
    "3-clause bsd license": "bsd-3-clause",
    "bsd-3": "bsd-3-clause",
    "bsd 3 clause": "bsd-3-clause",
    "bsd-3-clause license": "bsd-3-clause",
    "modified bsd": "bsd-3-clause",
    "new bsd": "bsd-3-clause",
    "the mit license": "mit",
    "bsd 3-clause": "bsd-3-clause",
    "bsd 3-clause license": "bsd-3-clause",
    "bsd license": "bsd",
    "isc license (iscl)": "isc",
    "mit license": "mit",
    "python software foundation license": "psf-2.0",
    "the unlicense (unlicense)": "unlicense",
}
"""How authors write a licence, in lower case -> its short name."""
SMALLEST_FILE, LARGEST_FILE, LONGEST_LINE = 200, 300_000, 1000
CALIBRATION_SHARE, HELD_OUT_SHARE = 0.03, 0.03
COPIED_SHARE = 0.6
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload", "ensurepip", "_vendor"}


@dataclass(frozen=True)
class Source:
    """Where files come from."""

    name: str
    version: str
    licence: str
    files: tuple[tuple[str, Path], ...]
    """(name in the record, place on this machine)."""


@dataclass(frozen=True)
class Document:
    """One file."""

    source: str
    path: str
    content: bytes


@dataclass(frozen=True)
class StudyText:
    """The text by part, and what the record says about it."""

    parts: dict[str, list[Document]]
    """One of PARTS -> its files, in the order of the hashes of their paths."""
    record: dict[str, Any]


# Licences


def licence_of(distribution: Distribution) -> str | None:
    """Return the licence that the metadata of a distribution names if all it names is permissive, else None."""
    metadata = distribution.metadata
    expression = metadata.get("License-Expression")
    classified = [line.split("::")[-1].strip() for line in metadata.get_all("Classifier") or () if "License ::" in line]
    spoken = (metadata.get("License") or "").strip().split("\n")[0]
    for text in (expression, " AND ".join(one for one in classified if one != "OSI Approved"), spoken):
        if text:
            return text if is_permissive(text) else None
    return None


def is_permissive(text: str) -> bool:
    """Tell whether every licence in an expression is permissive; a name that is not known is not."""
    names = [name.strip() for name in re.split(r"\bAND\b|\bOR\b|\bWITH\b|[()]", text) if name.strip()]
    # "ISC License (ISCL)" and the like hold the brackets that expressions group with
    whole = text.strip().lower()
    if whole in SPOKEN or whole in PERMISSIVE:
        return True
    return bool(names) and all(SPOKEN.get(name.lower(), name.lower()) in PERMISSIVE for name in names)


# Files


def standard_library() -> Source:
    """Return the files of the standard library of the Python that runs this."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = tuple((f"stdlib/{path.relative_to(root).as_posix()}", path) for path in sorted(root.rglob("*.py")))
    return Source("Python standard library", platform.python_version(), "PSF-2.0", files)


def folder_source(folder: Path) -> Source:
    """Return the files of a folder, whose licence is for the caller to know."""
    files = tuple(
        (path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in IN_DOMAIN + OUT_OF_DOMAIN
    )
    return Source(folder.name, "", "as the folder's", files)


def installed() -> tuple[list[Source], list[tuple[str, str]]]:
    """Return the sources this machine has, and the distributions left out with the licence that they name."""
    sources, left_out = [standard_library()], []
    seen: set[str] = set()
    # a folder that looks like a distribution and holds no metadata has no name
    named = {id(one): (one, ((one.metadata or {}).get("Name") or "").lower()) for one in distributions()}
    for distribution, name in sorted(named.values(), key=lambda pair: pair[1]):
        if not name or name in seen:
            continue
        seen.add(name)
        licence = licence_of(distribution)
        if licence is None:
            metadata = distribution.metadata
            spoken = metadata.get("License-Expression") or (metadata.get("License") or "unknown").split("\n")[0]
            left_out.append((name, spoken[:80]))
            continue
        files = tuple(
            (file.as_posix(), Path(str(distribution.locate_file(file))))
            for file in distribution.files or ()
            if file.suffix in IN_DOMAIN + OUT_OF_DOMAIN and ".." not in file.parts
        )
        sources.append(Source(name, distribution.version, licence, files))
    return sources, left_out


def read_source(source: Source, pool: ThreadPoolExecutor) -> Iterator[Document]:
    """Yield the files of a source that are text worth learning."""
    kept = [(name, path) for name, path in source.files if not SKIPPED_FOLDERS.intersection(name.split("/")[:-1])]
    for (name, _), content in zip(kept, pool.map(lambda item: _read(item[1]), kept), strict=True):
        if content is not None and is_text(content):
            yield Document(source.name, name, content)


def _read(path: Path) -> bytes | None:
    """Read a file that may have gone since it was listed."""
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= LARGEST_FILE else None
    except OSError:
        return None


def is_text(content: bytes) -> bool:
    """Tell text from tables, generated code and other encodings."""
    if not SMALLEST_FILE <= len(content) <= LARGEST_FILE or b"\0" in content:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    digits = len(content) - len(content.translate(None, b"0123456789"))
    return digits < 0.25 * len(content) and max(map(len, content.split(b"\n"))) <= LONGEST_LINE


# Splitting


def part_of(path: str) -> str:
    """Return the part that a file belongs to; it depends on nothing but its name."""
    if path.endswith(OUT_OF_DOMAIN):
        return "out_of_domain"
    share = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") / 2**32
    if share < CALIBRATION_SHARE:
        return "calibration"
    return "held_out" if share < CALIBRATION_SHARE + HELD_OUT_SHARE else "train"


def is_copy(content: bytes, seen: set[bytes]) -> bool:
    """
    Tell whether most of a file's telling lines were seen in files before it, and remember them.

    Packages copy from each other and generate files from one another; without this, files that are held out would be
    in the training text under another name. A file that is a copy leaves nothing to remember.
    """
    lines = {line.strip() for line in content.split(b"\n")}
    lines = {line for line in lines if len(line) >= 16}
    if len(lines) >= 8 and sum(line in seen for line in lines) > COPIED_SHARE * len(lines):
        return True
    seen |= lines
    return False


def read_text(folder: Path | None, largest: int) -> StudyText:
    """
    Read, filter, de-duplicate and split the text.

    Args:
        folder: None for what this machine has installed.
        largest: bytes of training text at most; files are kept in the order of the hashes of their names.
    """
    sources, left_out = installed() if folder is None else ([folder_source(folder)], [])
    with ThreadPoolExecutor(32) as pool:
        found = [document for source in sources for document in read_source(source, pool)]
    found.sort(
        key=lambda document: (PARTS.index(part_of(document.path)), hashlib.sha256(document.path.encode()).digest())
    )
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    seen: set[bytes] = set()
    size = copies = 0
    for document in found:
        part = part_of(document.path)
        if part == "train" and size + len(document.content) > largest:
            continue
        if is_copy(document.content, seen):
            copies += 1
            continue
        size += len(document.content) * (part == "train")
        parts[part].append(document)
    for part, documents in parts.items():
        if not documents:
            sys.exit(f"{folder or 'this machine'}: no text for the {part} part")
    return StudyText(parts, _record(sources, left_out, parts, copies))


def _record(
    sources: list[Source], left_out: list[tuple[str, str]], parts: dict[str, list[Document]], copies: int
) -> dict[str, Any]:
    """Say what the text is: sources with licences, and a hash per part that any other machine can compare."""
    kept = [document for documents in parts.values() for document in documents]
    sizes: dict[str, list[int]] = {source.name: [0, 0] for source in sources}
    for document in kept:
        sizes[document.source][0] += 1
        sizes[document.source][1] += len(document.content)
    used = [
        {
            "name": s.name,
            "version": s.version,
            "licence": s.licence,
            "files": sizes[s.name][0],
            "bytes": sizes[s.name][1],
        }
        for s in sources
        if sizes[s.name][0]
    ]
    about = {
        part: {
            "files": len(documents),
            "bytes": sum(len(document.content) for document in documents),
            "sha256": hashlib.sha256(b"".join(document.content for document in documents)).hexdigest(),
        }
        for part, documents in parts.items()
    }
    whole = hashlib.sha256("".join(about[part]["sha256"] for part in PARTS).encode()).hexdigest()
    return {
        "sha256": whole,
        "parts": about,
        "near_copies_left_out": copies,
        "sources": sorted(used, key=lambda row: -row["bytes"]),
        "left_out_by_licence": [f"{name}: {licence}" for name, licence in left_out],
    }
