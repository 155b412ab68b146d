"""Evaluating: folders with models, and the texts that they are measured on."""

from __future__ import annotations

from mxmoe.errors.base import MxmoeError


class NoModelFolder(MxmoeError):
    """A folder that no language model can be loaded from."""

    message = (
        "cannot load a language model from {path}: {reason}; pass a folder that `save_pretrained` of transformers"
        " wrote, with config.json and all weights"
    )


class NoText(MxmoeError):
    """Nothing to measure a model on, or to observe it with."""

    message = (
        "no text for {folder}: {reason}; pass a UTF-8 text, for which the folder needs its tokenizer, or a .bin file of"
        " token ids"
    )
