"""Folders with models and texts: what is read, and what is said of those that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from mxmoe.errors import NoModelFolder, NoText
from mxmoe.evaluate.folder import find_text, has_tokenizer, load_folder, read_ids, stored_dtype


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "to": 1, "be": 2, "or": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def test_a_model_comes_back_in_the_dtype_asked_for(saved: Path) -> None:
    assert {p.dtype for p in load_folder(saved, quiet=True).parameters()} == {torch.float32}
    model = load_folder(saved, dtype=torch.bfloat16, quiet=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert stored_dtype(saved) == torch.bfloat16


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is no such folder"),
        ({}, "it has no config.json"),
        ({"config.json": "{}"}, "it has no \\*.safetensors"),
        ({"config.json": "{}", "held_out.bin": "ab"}, "it has no \\*.safetensors"),
        ({"config.json": "{}", "model.safetensors": "none"}, "ValueError"),
        ({"config.json": "{", "model.safetensors": "none"}, "OSError"),
    ],
)
def test_a_folder_without_a_model(tmp_path: Path, content: dict[str, str] | None, reason: str) -> None:
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(NoModelFolder, match=reason):
        load_folder(folder, quiet=True)


def test_weights_that_are_not_there_are_not_made_up(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(NoModelFolder, match=r"lack 1 weights, model.layers.0.self_attn.k_proj.weight first"):
        load_folder(tmp_path, quiet=True)


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 199), min_size=1, max_size=30), wide=st.booleans())
def test_stored_ids_come_back(tmp_path_factory: pytest.TempPathFactory, ids: list[int], wide: bool) -> None:
    folder = tmp_path_factory.mktemp("ids")
    stored = torch.tensor(ids).to(torch.uint32 if wide else torch.uint16).numpy()
    (folder / "text.bin").write_bytes(stored.tobytes())
    assert read_ids(folder / "text.bin", folder, 200_000 if wide else 200).tolist() == ids


def test_text_goes_through_the_tokenizer_of_the_folder(with_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be")
    assert read_ids(tmp_path / "text.txt", with_tokenizer, 4).tolist() == [1, 2, 3, 0, 1, 2]
    assert has_tokenizer(with_tokenizer)


def test_bytes_are_tokens_where_256_are_known(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"a\xff\x00")
    assert read_ids(tmp_path / "text.txt", tmp_path, 256).tolist() == [97, 255, 0]


@pytest.mark.parametrize(
    ("name", "content", "vocabulary", "reason"),
    [
        ("gone.txt", None, 256, "there is no file"),
        ("text.txt", b"abc", 1000, "no tokenizer for it"),
        ("text.bin", b"abc", 1000, "3 bytes, which are no ids of 2 bytes each"),
        ("text.bin", b"abcdef", 70_000, "6 bytes, which are no ids of 4 bytes each"),
        ("text.bin", b"", 1000, "0 bytes"),
        ("text.bin", b"\x01\x00\x09\x00", 9, "holds id 9, and the model knows 9 tokens"),
    ],
)
def test_no_text(tmp_path: Path, name: str, content: bytes | None, vocabulary: int, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(NoText, match=reason):
        read_ids(tmp_path / name, tmp_path, vocabulary)


def test_what_is_no_text_for_a_tokenizer(with_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(NoText, match=r"text.txt is no UTF-8"):
        read_ids(tmp_path / "text.txt", with_tokenizer, 4)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "fine.txt").write_text("fine")
    with pytest.raises(NoText, match="its tokenizer fails"):
        read_ids(tmp_path / "fine.txt", tmp_path, 4)


def test_texts_are_found_by_name(tmp_path: Path) -> None:
    assert find_text(tmp_path, "held_out") is None
    (tmp_path / "held_out.txt").write_text("a")
    assert find_text(tmp_path, "held_out") == tmp_path / "held_out.txt"
    (tmp_path / "held_out.bin").write_text("ab")
    assert find_text(tmp_path, "held_out") == tmp_path / "held_out.bin"
