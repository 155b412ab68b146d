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
        FolderInUse: the folder holds something that is not a checkpoint.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()) and not (target / MANIFEST).exists():
        raise FolderInUse(folder=target)
    part, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # cloned: tensors may share storage, which the format refuses
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in checkpoint.tensors.items()}
    save_file(tensors, part / WEIGHTS)
    for name, text in checkpoint.texts.items():
        (part / name).write_text(text, encoding="utf-8")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "about": dict(checkpoint.about),
        "files": {name: _digest(text.encode()) for name, text in checkpoint.texts.items()},
        "tensors": {key: _tensor_digest(tensor) for key, tensor in sorted(tensors.items())},
    }
    manifest["sha256"] = _digest(json.dumps(manifest, sort_keys=True).encode())
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(part, target)
    shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """
    Read a folder and compare everything in it with the manifest.

    Raises:
        NoCheckpoint: there is no manifest.
        BrokenCheckpoint: a file or tensor that was cut short, changed or lost; the message names it.
    """
    source = Path(folder)
    if not (source / MANIFEST).is_file():
        raise NoCheckpoint(folder=source)
    manifest = _read_manifest(source / MANIFEST)
    texts = {name: _read_text(source / name, digest) for name, digest in manifest["files"].items()}
    return Checkpoint(manifest["about"], texts, _read_tensors(source / WEIGHTS, manifest["tensors"]))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stated = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError) as error:
        raise BrokenCheckpoint(what=path, reason=f"it is no JSON manifest ({error})") from error
    if stated != _digest(json.dumps(manifest, sort_keys=True).encode()):
        raise BrokenCheckpoint(what=path, reason="its content does not match its own SHA-256")
    if manifest["format"] != FORMAT:
        raise BrokenCheckpoint(what=path, reason=f"its format is {manifest['format']!r}, this version reads {FORMAT!r}")
    return manifest


def _read_text(path: Path, digest: str) -> str:
    data = path.read_bytes() if path.is_file() else b""
    if _digest(data) != digest:
        raise BrokenCheckpoint(what=path, reason="its content does not match the SHA-256 in the manifest")
    return data.decode()


def _read_tensors(path: Path, digests: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise BrokenCheckpoint(what=path, reason=f"it cannot be read ({error})") from error
    for key, digest in digests.items():
        if key not in tensors:
            raise BrokenCheckpoint(what=path, reason=f"tensor {key!r} is missing")
        if _tensor_digest(tensors[key]) != digest:
            raise BrokenCheckpoint(what=path, reason=f"tensor {key!r} does not match the SHA-256 in the manifest")
    if extra := sorted(set(tensors) - set(digests)):
        raise BrokenCheckpoint(what=path, reason=f"tensor {extra[0]!r} is not in the manifest")
    return tensors


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    head = f"{tensor.dtype} {list(tensor.shape)}".encode()
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()
