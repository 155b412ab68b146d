"""The trained study model, where there is one: whole, and as good as its record says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mxmoe.evaluate import perplexity
from mxmoe.evaluate.evaluation import Request, evaluate_folder
from mxmoe.evaluate.folder import load_folder, read_ids


@pytest.fixture(scope="module")
def record(study_model: Path) -> dict[str, Any]:
    return json.loads((study_model / "training.json").read_text())


def test_every_file_is_the_one_of_the_record(study_model: Path, record: dict[str, Any]) -> None:
    wanted = {name: about["sha256"] for name, about in record["token_files"].items()}
    wanted |= record["weights_sha256"] | {"tokenizer.json": record["tokenizer_sha256"]}
    for name, sha256 in wanted.items():
        assert hashlib.sha256((study_model / name).read_bytes()).hexdigest() == sha256, name


def test_it_is_as_good_as_the_record_says(study_model: Path, record: dict[str, Any]) -> None:
    window, spot = record["shape"]["window"], record["spot"]
    ids = read_ids(study_model / "held_out.bin", study_model, record["shape"]["vocabulary"])[: spot["tokens"] + 1]
    found = perplexity(load_folder(study_model, quiet=True), ids, window=window, batch=4)
    # the record is of bf16 activations, this is of float32
    assert found.nats_per_token == pytest.approx(spot["nats_per_token"], rel=0.01)
    assert found.nats_per_token < 3


def test_fewer_bits_are_farther_away(study_model: Path) -> None:
    found = []
    for scheme in ("w8a16_g128_sym", "w4a16_g128_sym", "w2a16_g128_sym"):
        request = Request(target="numba", schemes=[scheme])
        evaluation = evaluate_folder(study_model, request, tokens=2049, calibration_tokens=1024, quiet=True)
        assert evaluation.comparison is not None
        found.append(evaluation.comparison.kl_mean)
    assert 0 < 10 * found[0] < found[1] < found[2]
