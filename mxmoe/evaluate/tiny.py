"""The small trained model that ships with the package, its record, and its two texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from mxmoe.errors import BrokenTinyModel, MissingTinyModel

if TYPE_CHECKING:  # importing transformers takes seconds; only a caller who loads the model pays for it
    from transformers import Qwen2MoeForCausalLM

FOLDER = Path(__file__).parent.parent / "data" / "tiny_moe"
FILES = ("config.json", "model.safetensors", "training.json", "calibration.txt", "held_out.txt")


@dataclass(frozen=True)
class TinyMoe:
    """The shipped model with everything that an experiment on it needs."""

    model: Qwen2MoeForCausalLM
    """4 blocks of 16 experts, two per byte, and a shared expert; reads bytes; in evaluation mode."""
    record: Mapping[str, Any]
    """training.json: command, versions, device, corpora, loss curve, routing, held-out perplexity."""
    calibration: bytes
    """Text to observe the model on."""
    held_out: bytes
    """Text to measure it on; of other files than the training and the calibration text."""


def load_tiny(folder: Path | None = None, *, dtype: torch.dtype = torch.float32) -> TinyMoe:
    """
    Load the shipped model, or one that `examples/train_tiny_moe.py` wrote to `folder`.

    Every file is checked against the SHA-256 in training.json before anything is built.

    Args:
        folder: None for the one in the package.
        dtype: what the bf16 weights are converted to; float32 holds them exactly and is the fastest on a CPU.

    Raises:
        MissingTinyModel: a file is not there.
        BrokenTinyModel: a file is not the one that the record describes, or cannot be read.
    """
    folder = folder or FOLDER
    for name in FILES:
        if not (folder / name).is_file():
            raise MissingTinyModel(path=folder / name)
    record = _record(folder)
    texts = {name: _verified(folder, name, record["text"]["parts"][name]["sha256"]) for name in FILES[3:]}
    _verified(folder, "model.safetensors", record["model_sha256"])
    return TinyMoe(_model(folder, dtype), record, texts["calibration.txt"], texts["held_out.txt"])


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        _ = record["model_sha256"], [record["text"]["parts"][name]["sha256"] for name in FILES[3:]]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenTinyModel(path=folder / "training.json", reason=f"{type(error).__name__}: {error}") from error
    return record


def _verified(folder: Path, name: str, sha256: str) -> bytes:
    content = (folder / name).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise BrokenTinyModel(path=folder / name, reason=f"its SHA-256 is {found}, training.json says {sha256}")
    return content


def _model(folder: Path, dtype: torch.dtype) -> Qwen2MoeForCausalLM:
    from transformers import Qwen2MoeForCausalLM
    from transformers.utils import logging

    # the bar over four tensors says nothing; it comes back as it was for the caller's own loading
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = Qwen2MoeForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BrokenTinyModel(path=folder, reason=f"{type(error).__name__}: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval()
