"""The shipped model: what it is, that its record is true, and what a damaged copy says."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mxmoe.errors import BrokenTinyModel, MissingTinyModel
from mxmoe.evaluate import TinyMoe, load_tiny, perplexity
from mxmoe.evaluate.tiny import FILES, FOLDER


@pytest.fixture(scope="module")
def tiny() -> TinyMoe:
    return load_tiny()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "tiny")


def test_it_is_what_the_documents_say(tiny: TinyMoe) -> None:
    config = tiny.model.config
    assert config.vocab_size == 256
    assert config.num_hidden_layers >= 4
    assert config.num_experts >= 16
    assert config.num_experts_per_tok >= 2
    assert config.shared_expert_intermediate_size > 0
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert not tiny.model.training
    assert all(p.dtype == torch.float32 for p in tiny.model.parameters())


def test_float32_holds_the_weights_exactly(tiny: TinyMoe) -> None:
    assert all(torch.equal(p, p.bfloat16().float()) for p in tiny.model.parameters())


def test_texts_are_large_enough_and_disjoint(tiny: TinyMoe) -> None:
    parts = tiny.record["text"]["parts"]
    calibration, held_out = (set(parts[f"{name}.txt"]["files"]) for name in ("calibration", "held_out"))
    assert not calibration & held_out
    for text in (tiny.calibration, tiny.held_out):
        assert 128 * 1024 <= len(text) <= 256 * 1024
        assert b"PSF-2.0" in text[:400]
    assert (FOLDER / "LICENSE-PSF.txt").is_file()


def test_the_recorded_loss_was_flat_and_is_what_the_model_gives(tiny: TinyMoe) -> None:
    curve = [point[2] for point in tiny.record["curve"]]
    assert min(curve) < 0.6 * curve[0]
    last = curve[-3:]
    assert max(last) - min(last) < 0.01 * min(last)
    assert tiny.record["held_out_perplexity"] == pytest.approx(math.exp(tiny.record["held_out_nats_per_byte"]))
    # other files than the record's, and fewer: near, not equal
    found = perplexity(tiny.model, tiny.held_out[: 64 * 1024])
    assert found.nats_per_token == pytest.approx(tiny.record["held_out_nats_per_byte"], rel=0.2)


def test_experts_are_skewed_specialised_and_alive(tiny: TinyMoe) -> None:
    layers = tiny.record["routing"]
    for layer in layers:
        frequency = layer["frequency"]
        assert sum(frequency) == pytest.approx(1, abs=1e-3)
        assert min(frequency) > 0.01
        assert layer["kind_information_bits"] > 0.1
    assert max(max(layer["frequency"]) / min(layer["frequency"]) for layer in layers) > 5


def test_the_curve_goes_forward(tiny: TinyMoe) -> None:
    steps = [point[0] for point in tiny.record["curve"]]
    assert all(a < b for a, b in pairwise(steps))
    assert steps[-1] == tiny.record["steps"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(MissingTinyModel, match=name):
        load_tiny(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "calibration.txt", "held_out.txt"])
def test_a_flipped_byte_is_named(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BrokenTinyModel, match=rf"{name} is broken: its SHA-256"):
        load_tiny(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_sha256": 1, "text": {"parts": {}}}'])
def test_a_record_without_checksums_is_named(copy: Path, text: str) -> None:
    (copy / "training.json").write_text(text)
    with pytest.raises(BrokenTinyModel, match=r"training\.json is broken"):
        load_tiny(copy)


def test_a_config_that_does_not_fit_the_weights_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(BrokenTinyModel, match="is broken"):
        load_tiny(copy)
