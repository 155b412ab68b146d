"""A folder with a compiled module: written whole or not at all, and checked tensor by tensor when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mxmoe.errors import BrokenCheckpoint, FolderInUse, NoCheckpoint

FORMAT = "mxmoe-checkpoint-1"
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds."""

    about: Mapping[str, Any]
    """Plain values: target, class, config, report."""
    texts: Mapping[str, str]
    """File name -> text: the plan, and the module at every stage."""
    tensors: Mapping[str, Tensor]
    """Key -> tensor."""


def write_checkpoint(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """
    Write a folder; a checkpoint that stood there before is replaced only when the new one is complete.

    Raises:
        FolderInUse: the folder holds something that is not a checkpoint, or is a file.
    """
    target = Path(os.path.abspath(folder))
    part, old = _beside(target, "part"), _beside(target, "old")
    _recover(target)
    _refuse_foreign(target)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write_files(part, checkpoint)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(part, target)
    except OSError:
        _recover(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """
    Read a folder and compare every byte in it with the manifest.

    Raises:
        NoCheckpoint: there is no manifest.
        BrokenCheckpoint: a file or tensor that was cut short, changed or lost; the message names it.
    """
    source = Path(os.path.abspath(folder))
    _recover(source)
    if not (source / MANIFEST).is_file():
        raise NoCheckpoint(folder=folder)
    manifest = _read_manifest(source / MANIFEST)
    texts = {name: _read_text(source / name, digest) for name, digest in manifest["files"].items()}
    return Checkpoint(manifest["about"], texts, _read_tensors(source / WEIGHTS, manifest))


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _recover(target: Path) -> None:
    """Put the former checkpoint back, if a write was interrupted between moving it away and taking its place."""
    old = _beside(target, "old")
    if old.is_dir() and not target.exists():
        os.replace(old, target)


def _refuse_foreign(target: Path) -> None:
    """Raise FolderInUse if replacing the folder would delete anything that is no part of a checkpoint."""
    if not target.exists():
        return
    held = {entry.name for entry in target.iterdir()} if target.is_dir() else {target.name}
    known = {MANIFEST, WEIGHTS}
    if MANIFEST in held:
        try:
            known |= set(_parse_manifest(target / MANIFEST)["files"])
        except BrokenCheckpoint:
            known |= {name for name in held if name.endswith((".mlir", ".json"))}
    if held and (foreign := sorted(held - known if MANIFEST in held else held)):
        raise FolderInUse(folder=target, foreign=foreign[0])


def _write_files(part: Path, checkpoint: Checkpoint) -> None:
    # cloned: tensors may share storage, which the format refuses
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in checkpoint.tensors.items()}
    save_file(tensors, part / WEIGHTS)
    for name, text in checkpoint.texts.items():
        (part / name).write_bytes(text.encode())
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "about": dict(checkpoint.about),
        "files": {name: _digest(text.encode()) for name, text in checkpoint.texts.items()},
        "header": _digest(_header(part / WEIGHTS)),
        "tensors": {key: _tensor_digest(tensor) for key, tensor in sorted(tensors.items())},
    }
    manifest["sha256"] = _digest(_canonical(manifest))
    (part / MANIFEST).write_bytes(_canonical(manifest))


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _parse_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and check that it is, byte for byte, what was written."""
    content = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(content)
        # spelled again, since blanks between values are bytes too
        is_spelled_so = content == _canonical(manifest)
        stated = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BrokenCheckpoint(what=path, reason=f"it is no JSON manifest ({error})") from error
    if stated != _digest(_canonical(manifest)) or not is_spelled_so:
        raise BrokenCheckpoint(what=path, reason="its content does not match its own SHA-256")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _parse_manifest(path)
    if manifest["format"] != FORMAT:
        raise BrokenCheckpoint(what=path, reason=f"its format is {manifest['format']!r}, this version reads {FORMAT!r}")
    return manifest


def _read_text(path: Path, digest: str) -> str:
    if not path.is_file():
        raise BrokenCheckpoint(what=path, reason="it is missing")
    data = path.read_bytes()
    if _digest(data) != digest:
        raise BrokenCheckpoint(what=path, reason="its content does not match the SHA-256 in the manifest")
    return data.decode()


def _read_tensors(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise BrokenCheckpoint(what=path, reason="it is missing")
    if _digest(_header(path)) != manifest["header"]:
        raise BrokenCheckpoint(what=path, reason="its header does not match the SHA-256 in the manifest")
    try:
        with safe_open(path, framework="pt") as file:
            # cloned out of the mapped file: aligned as torch aligns, or its matrix products may differ in the last bit
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenCheckpoint(what=path, reason=f"it cannot be read ({error})") from error
    for key, digest in manifest["tensors"].items():
        if _tensor_digest(tensors[key]) != digest:
            raise BrokenCheckpoint(what=path, reason=f"tensor {key!r} does not match the SHA-256 in the manifest")
    return tensors


def _header(path: Path) -> bytes:
    """Read names, types and places of the tensors: 8 bytes of length (little-endian), then so many bytes of JSON."""
    with path.open("rb") as file:
        length = file.read(8)
        # a length that was changed must not make this read gigabytes; the digest finds it out
        return length + file.read(min(int.from_bytes(length, "little"), path.stat().st_size))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
