"""`mxmoe eval` on tiny random folders of the families that it is for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mxmoe.cli import main
from mxmoe.errors import BadArgument, NoModelFolder, NoMoeBlock, NoText
from mxmoe.evaluate.evaluation import Request, evaluate_folder

COMMON: Mapping[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 48,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Qwen2Moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 6,
    },
    "Mixtral": {"intermediate_size": 32, "num_local_experts": 6},
    "DeepseekV2": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "Olmoe": {"intermediate_size": 32, "num_experts": 6},
    "Qwen3Moe": {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 6, "head_dim": 16},
}
BLOCKS = {"DeepseekV2": 1}


def write_folder(folder: Path, family: str, **changes: Any) -> Path:  # noqa: ANN401  # any field of a config
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)  # far enough from uniform logits that a difference shows
    model.to(torch.bfloat16).save_pretrained(folder)
    random = torch.Generator().manual_seed(1)
    for name, count in (("held_out", 200), ("calibration", 400)):
        ids = torch.randint(97, (count,), generator=random).to(torch.uint16)
        (folder / f"{name}.bin").write_bytes(ids.numpy().tobytes())
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("qwen"), "Qwen2Moe")


evaluate = partial(evaluate_folder, device="cpu", quiet=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_as_it_came_and_compiled(tmp_path: Path, family: str) -> None:
    folder = write_folder(tmp_path, family)
    fine = evaluate(folder, Request(schemes=["w8a16_g32_sym"]))
    coarse = evaluate(folder, Request(schemes=["w2a16_g32_asym"]))
    assert fine.tokens == 199
    assert fine.window == 48
    assert fine.comparison is not None
    assert coarse.comparison is not None
    assert fine.perplexity == coarse.perplexity == fine.comparison.reference_perplexity
    assert 0 < fine.comparison.kl_mean < 0.1 * coarse.comparison.kl_mean
    assert fine.comparison.top1 >= coarse.comparison.top1
    assert fine.expert_bits == 16
    assert fine.compiled is not None
    assert len(fine.compiled.plan.block_bits) == BLOCKS.get(family, 2)
    assert fine.compiled.plan.effective_bits == pytest.approx(8.5)
    assert fine.expert_bytes * 8.5 / 16 == fine.compiled.held_bytes
    assert fine.peak_bytes > fine.compiled.held_bytes
    assert set(fine.seconds) == {"load", "compile", "measure"}


def test_without_a_request_nothing_is_compiled(qwen: Path) -> None:
    alone = evaluate(qwen)
    assert alone.comparison is None
    assert alone.compiled is None
    assert alone.perplexity == evaluate(qwen, Request(schemes=["w8a16_g32_sym"])).perplexity
    assert "compiled" not in str(alone)


def test_the_unquantized_scheme_changes_next_to_nothing(qwen: Path) -> None:
    found = evaluate(qwen, Request(schemes=["bf16"])).comparison
    assert found is not None
    assert found.kl_mean < 1e-4
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-3)


def test_fewer_tokens_and_other_windows(qwen: Path) -> None:
    few = evaluate(qwen, tokens=100, window=16, batch=2)
    assert (few.tokens, few.window) == (99, 16)
    assert few.perplexity != evaluate(qwen, tokens=100).perplexity


def test_without_calibration_weights_alone_decide(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "Qwen2Moe")
    request = Request(schemes=["w8a16_g32_sym", "w2a16_g32_asym"], weight_bits=5.0)
    seen = evaluate(folder, request, calibration_tokens=96)
    (folder / "calibration.bin").unlink()
    blind = evaluate(folder, request)
    assert seen.compiled is not None
    assert blind.compiled is not None
    assert "96 tokens" in seen.compiled.calibration
    assert "tokens" not in blind.compiled.calibration.splitlines()[0]


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "Qwen2", intermediate_size=64)
    with pytest.raises(NoMoeBlock):
        evaluate(folder)


def test_there_must_be_a_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "Mixtral")
    (folder / "held_out.bin").unlink()
    with pytest.raises(NoText, match=r"none was given, and it has no held_out.bin"):
        evaluate(folder)
    (tmp_path / "words.txt").write_text("words")
    with pytest.raises(NoText, match="no tokenizer"):
        evaluate(folder, text=tmp_path / "words.txt")


def test_there_must_be_a_folder_and_a_device(tmp_path: Path, qwen: Path) -> None:
    with pytest.raises(NoModelFolder, match="no such folder"):
        evaluate(tmp_path / "gone")
    for device in ("cuda:99", "nothing"):
        with pytest.raises(BadArgument, match=device):
            evaluate_folder(qwen, device=device)


def test_the_command(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(qwen), "--device", "cpu", "--quiet", "--json", str(tmp_path / "figures.json")]
    assert main([*words, "--schemes", "w8a16_g32_sym,w4a16_g32_asym", "--weight-bits", "6"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"{figures['comparison']['perplexity']:.4f}" in printed
    assert f"{figures['compiled']['plan']['effective_bits']:.3f}" in printed
    assert figures["request"]["weight_bits"] == 6
    assert figures["compiled"]["plan"]["effective_bits"] <= 6


def test_a_sensitivity_by_name_and_experts_that_go(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(qwen), "--device", "cpu", "--quiet", "--weight-bits", "4", "--schemes", "w0,w4a16_g32_asym"]
    assert main([*words, "--sensitivity", "fisher", "--r", "1"]) == 0
    assert "w0 x " in capsys.readouterr().out
    assert main([*words, "--sensitivity", "fishr"]) == 2
    assert "did you mean fisher?" in capsys.readouterr().err


def test_a_plan_is_applied(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mxmoe
    from mxmoe.evaluate.folder import load_folder

    compiled: Any = mxmoe.compile(load_folder(qwen, quiet=True), "eager", schemes="w4a16_g32_asym", quiet=True)
    compiled.plan.save(tmp_path / "plan.json")
    words = ["eval", str(qwen), "--device", "cpu", "--quiet", "--plan", str(tmp_path / "plan.json")]
    assert main(words) == 0
    assert "w4a16_g32_asym x 42" in capsys.readouterr().out
    assert main([*words, "--weight-bits", "4"]) == 2
    assert "--plan says every scheme" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path / "gone")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mxmoe: error: cannot load a language model from")
    assert printed.err.count("\n") == 1
