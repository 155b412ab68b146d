"""The demo's logic on a small untrained model; its figures are tested where they are made."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from mxmoe.errors import BadArgument, BadDemoFolder, TextTooShort
from mxmoe.evaluate import TinyMoe, demo, perplexity
from mxmoe.evaluate.demo import BUDGETS, CANDIDATES, CHUNK, UNIFORM, Demo, run_demo, spread
from mxmoe.ir import Plan

TEXT = bytes(range(32, 127)) * 60
FILES = {"table.txt", "table.csv", "table.json", "picture.png", *(f"plan-{bits:g}.json" for bits in BUDGETS)}


def untrained() -> TinyMoe:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=256, hidden_size=128, moe_intermediate_size=128, shared_expert_intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        initializer_range=0.2, use_cache=False,
    )  # fmt: skip
    return TinyMoe(Qwen2MoeForCausalLM(config).eval(), {}, TEXT, TEXT[::-1])


@pytest.fixture(scope="module")
def model() -> TinyMoe:
    return untrained()


@pytest.fixture(scope="module")
def made(model: TinyMoe, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "TARGET", "eager")  # nothing to compile: seconds less
    folder = tmp_path_factory.mktemp("demo") / "deep" / "out"
    found = run_demo(folder, held_out_kib=1, calibration_windows=2, tiny=model, quiet=True)
    patch.undo()
    return found


def test_every_line_of_the_table_is_there(made: Demo) -> None:
    kinds = [entry.kind for entry in made.entries]
    assert kinds == ["float", *["uniform"] * len(UNIFORM), *["mix"] * len(BUDGETS)]
    assert [entry.name for entry in made.entries][1 : 1 + len(UNIFORM)] == list(UNIFORM)


def test_mixes_keep_their_budget_and_prove_their_gap(made: Demo) -> None:
    mixes = [entry for entry in made.entries if entry.kind == "mix"]
    for bits, entry in zip(BUDGETS, mixes, strict=True):
        assert 0 < entry.payload_bits < entry.effective_bits <= bits + 1e-9
        assert entry.gap is not None
        assert 0 <= entry.gap < 0.1
        assert entry.solve_s is not None
        assert entry.rows is not None
        assert set(entry.rows) <= set(CANDIDATES)
        assert sum(entry.rows.values()) == 2 * (4 + 1) * 3


def test_float_is_the_model_as_it_came(made: Demo, model: TinyMoe) -> None:
    first = made.entries[0]
    assert (first.payload_bits, first.effective_bits, first.gap) == (16, 16, None)
    assert first.n_bytes == 2 * 2 * (4 + 1) * 3 * 128 * 128
    assert first.perplexity == perplexity(model.model, spread(model.held_out, 1024)).perplexity


def test_the_model_is_left_alone(made: Demo, model: TinyMoe) -> None:
    fresh = untrained().model.state_dict()
    assert fresh.keys() == model.model.state_dict().keys()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.model.state_dict().items())


def test_files_hold_what_was_returned(made: Demo) -> None:
    assert {path.name for path in made.folder.iterdir()} == FILES
    text = (made.folder / "table.txt").read_text()
    assert text.startswith(made.table())
    assert made.about in text
    rows = list(csv.reader((made.folder / "table.csv").read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == [entry.name for entry in made.entries]
    assert [float(row[4]) for row in rows[1:]] == [entry.perplexity for entry in made.entries]
    assert json.loads((made.folder / "table.json").read_text())[-1]["name"] == "mix of 2.25 bits"
    assert (made.folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    for bits in BUDGETS:
        plan = Plan.load(made.folder / f"plan-{bits:g}.json")
        assert plan.allocation is not None
        assert plan.allocation.budget == {"weight_bits": bits}


def test_the_table_sets_the_kinds_apart(made: Demo) -> None:
    lines = made.table().split("\n")
    blank = [i for i, line in enumerate(lines) if not line]
    assert len(blank) == 2
    assert lines[blank[0] - 1].startswith("bf16")
    assert lines[blank[1] + 1].startswith("mix of 5 bits")
    only = replace(made, entries=made.entries[:1])
    assert "" not in only.table().split("\n")


def test_a_folder_that_is_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(BadDemoFolder, match=r"cannot write to .*taken: File exists"):
        run_demo(tmp_path / "taken")


def test_nothing_to_measure_on_is_refused_at_once(model: TinyMoe, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="held_out_kib"):
        run_demo(tmp_path, held_out_kib=0)
    with pytest.raises(TextTooShort):
        run_demo(tmp_path, calibration_windows=10**6, tiny=model)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20 * CHUNK), st.integers(1, 6))
def test_spread_takes_chunks_in_order_from_start_to_end(length: int, chunks: int) -> None:
    text = b"".join(i.to_bytes(4, "big") for i in range(length // 4 + 1))
    taken = spread(text, chunks * CHUNK)
    assert len(taken) == min(len(text), chunks * CHUNK)
    assert taken[:CHUNK] == text[:CHUNK]
    parts = [taken[i : i + CHUNK] for i in range(0, len(taken), CHUNK)]
    assert all(part in text for part in parts)
    if chunks > 1:
        assert taken[-CHUNK // 2 :] == text[-CHUNK // 2 :]


def test_spread_of_less_than_a_chunk() -> None:
    assert spread(TEXT, 100) == TEXT[:100]
