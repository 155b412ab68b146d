"""The tokens of the study model: a byte-level BPE trained on the training part, and the parts as files of ids."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_moe_text import StudyText
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
"""Ends every file; its id is 0."""
TRAINER_BYTES = 48_000_000
"""Training text that the merges are learned from: more of it changes few of them."""
DOCUMENTS_PER_BATCH = 512


@dataclass(frozen=True)
class Part:
    """One part as ids."""

    ids: NDArray[np.int16]
    """[tokens]; vocabularies have at most 32,768 entries."""
    n_bytes: int
    """Bytes of the text that the ids stand for; the end marks stand for none."""


def train_tokenizer(text: StudyText, vocabulary: int) -> Tokenizer:
    """Learn a byte-level BPE of `vocabulary` entries from the training part alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    budget, chosen = TRAINER_BYTES, []
    for document in text.parts["train"]:
        if budget <= 0:
            break
        chosen.append(document.content.decode())
        budget -= len(document.content)
    tokenizer.train_from_iterator(chosen, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, contents: list[bytes], most: int | None = None) -> Part:
    """Encode whole files, each closed by END, until there are `most` tokens; the last file may be cut off whole."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    end, chunks, n_bytes, n_tokens = tokenizer.token_to_id(END), [], 0, 0
    for i in range(0, len(contents), DOCUMENTS_PER_BATCH):
        batch = contents[i : i + DOCUMENTS_PER_BATCH]
        for content, coded in zip(batch, run([one.decode() for one in batch]), strict=True):
            ids = np.array([*coded.ids, end], dtype=np.int16)
            if most is not None and n_tokens + len(ids) > most and chunks:
                continue
            chunks.append(ids)
            n_tokens += len(ids)
            n_bytes += len(content)
        if most is not None and n_tokens > 0.98 * most:
            break
    return Part(np.concatenate(chunks), n_bytes)


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json, and the line that tells transformers to take it as it is."""
    tokenizer.save(str(out / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def save_part(part: Part, path: Path) -> dict[str, Any]:
    """Write ids as little-endian uint16, and return what the record says of the file."""
    content = part.ids.astype("<u2").tobytes()
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return {"tokens": len(part.ids), "text_bytes": part.n_bytes, "sha256": digest}


def token_classes(tokenizer: Tokenizer) -> tuple[tuple[str, ...], list[int]]:
    """Return the names of the classes of tokens, and the class of every id: what a token is by its letters."""
    from keyword import iskeyword

    names = ("end", "space", "keyword", "word", "part of a word", "number", "punctuation")
    classes = []
    for number in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([number])
        bare = text.strip()
        if number == tokenizer.token_to_id(END):
            name = "end"
        elif not bare:
            name = "space"
        elif iskeyword(bare):
            name = "keyword"
        elif bare.isidentifier():
            name = "word" if text[0].isspace() else "part of a word"
        else:
            name = "number" if bare[0].isdigit() else "punctuation"
        classes.append(names.index(name))
    return names, classes
