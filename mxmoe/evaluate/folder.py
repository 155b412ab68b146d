"""Language models in transformers folders, and texts as their token ids."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mxmoe.errors import NoModelFolder, NoText

if TYPE_CHECKING:  # importing transformers takes seconds; only a caller who loads a model pays for it
    from transformers import PreTrainedModel

_WEIGHTS = (".safetensors", ".bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_TOKENS = ".bin"
_BYTES = 256


def load_folder(
    folder: str | os.PathLike[str], *, device: str = "cpu", dtype: torch.dtype | None = None, quiet: bool = False
) -> PreTrainedModel:
    """
    Load a causal language model of any architecture that transformers has, in evaluation mode; nothing is downloaded.

    Args:
        folder: config.json and weights, as `save_pretrained` writes them.
        device: where it goes.
        dtype: what weights are converted to; None keeps them on a GPU, and gives float32 on a CPU, where it is faster.
        quiet: no progress bar.

    Raises:
        NoModelFolder: no such folder, no config, no weights, weights missing, or what transformers says of it.
    """
    path = Path(folder)
    for is_there, reason in (
        (path.is_dir(), "there is no such folder"),
        ((path / "config.json").is_file(), "it has no config.json"),
        (path.is_dir() and any(_is_weights(file) for file in path.iterdir()), "it has no *.safetensors"),
    ):
        if not is_there:
            raise NoModelFolder(path=path, reason=reason)
    wanted: Any = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    model, missing = _from_pretrained(path, wanted, quiet)
    if missing:
        raise NoModelFolder(path=path, reason=f"its files lack {len(missing)} weights, {missing[0]} first")
    return model.to(device).eval()  # pyright: ignore[reportArgumentType, reportReturnType]  # nn.Module's, wrapped


def _is_weights(file: Path) -> bool:
    # token files end in .bin too
    return file.suffix == ".safetensors" or (file.suffix in _WEIGHTS and file.name.startswith("pytorch_model"))


def _from_pretrained(path: Path, dtype: Any, quiet: bool) -> tuple[PreTrainedModel, list[str]]:  # noqa: ANN401  # "auto" too
    """Load, and name the weights that transformers would make up."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise NoModelFolder(path=path, reason=f"{type(error).__name__}: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    model, info = loaded
    return model, sorted(info["missing_keys"])


def stored_dtype(folder: str | os.PathLike[str]) -> torch.dtype | None:
    """Return the dtype that config.json gives to the weights; None where it says nothing that torch knows."""
    config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    found = getattr(torch, named, None) if isinstance(named, str) else None
    return found if isinstance(found, torch.dtype) else None


def read_ids(file: str | os.PathLike[str], folder: str | os.PathLike[str], vocabulary: int) -> Tensor:
    """
    Read a text as the token ids of a model, [tokens] int64.

    A file that ends in .bin holds ids as little-endian uint16, or uint32 where the vocabulary needs it. Any other is
    UTF-8 text for the tokenizer in `folder`, special tokens as the tokenizer puts them; where there is none and the
    vocabulary has 256 entries, every byte is a token.

    Raises:
        NoText: no such file, no tokenizer for it, no UTF-8, half a token, an id beyond the vocabulary.
    """
    path = Path(file)
    if not path.is_file():
        raise NoText(folder=folder, reason=f"there is no file {path}")
    content = path.read_bytes()
    if path.suffix == _TOKENS:
        return _stored_ids(content, path, folder, vocabulary)
    if not has_tokenizer(folder):
        if vocabulary == _BYTES:
            return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
        raise NoText(folder=folder, reason=f"{path.name} is text, and the folder has no tokenizer for it")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NoText(folder=folder, reason=f"{path.name} is no UTF-8 ({error.reason} at {error.start})") from error
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise NoText(folder=folder, reason=f"its tokenizer fails: {type(error).__name__}: {error}") from error
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _stored_ids(content: bytes, path: Path, folder: str | os.PathLike[str], vocabulary: int) -> Tensor:
    dtype = torch.uint16 if vocabulary <= 1 << 16 else torch.uint32
    if not content or len(content) % dtype.itemsize:
        reason = f"{path.name} has {len(content)} bytes, which are no ids of {dtype.itemsize} bytes each"
        raise NoText(folder=folder, reason=reason)
    ids = torch.frombuffer(bytearray(content), dtype=dtype).long()
    if (largest := int(ids.max())) >= vocabulary:
        raise NoText(folder=folder, reason=f"{path.name} holds id {largest}, and the model knows {vocabulary} tokens")
    return ids


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Say whether a folder holds a tokenizer."""
    return any((Path(folder) / name).is_file() for name in _TOKENIZERS)


def find_text(folder: str | os.PathLike[str], name: str) -> Path | None:
    """Find NAME.bin or NAME.txt in a model's folder, as the training scripts write them."""
    files = (Path(folder) / f"{name}{suffix}" for suffix in (_TOKENS, ".txt"))
    return next((file for file in files if file.is_file()), None)
