"""What `compile` returns: saved, loaded, run elsewhere; every byte of a checkpoint is watched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeSparseMoeBlock

import mxmoe
from mxmoe.backends.numba import NumbaBackend
from mxmoe.checkpoint import read_checkpoint
from mxmoe.compiled import CompiledMoE, copy_modules
from mxmoe.errors import (
    BrokenCheckpoint,
    MxmoeError,
    NeedsBlock,
    NoCheckpoint,
    NoKernels,
    NoSuchStage,
    NotAModule,
    NotCompiled,
    NotSavedHere,
    StructureMismatch,
    UnknownName,
    UnsupportedScheme,
)
from mxmoe.ir import Plan
from mxmoe.quant import tolerance

from .blocks import CONFIG, qwen_block, qwen_model, seeded

SCHEMES = ("w3a16_g32_asym", "w4a8_g16_sym_iscale", "w8a8_sym", "bf16")
IDS = torch.arange(12).reshape(2, 6)


def mixed(module: nn.Module, target: str = "eager") -> Any:  # noqa: ANN401  # as above
    return mxmoe.compile(module, target, schemes=SCHEMES, weight_bits=9, quiet=True)


def call(module: Any) -> Tensor:  # noqa: ANN401  # as above
    """Run a block on some tokens, or a model on some ids."""
    with torch.inference_mode():
        if hasattr(module, "lm_head"):
            return module(IDS).logits
        return module(torch.randn((1, 9, 32), generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A compiled block and the folder that it was saved to; nobody changes them."""
    folder = tmp_path_factory.mktemp("checkpoint") / "block"
    made = mixed(qwen_block())
    made.save(folder)
    return folder, made


# There and back


@pytest.mark.parametrize("target", ["eager", "numba"])
@pytest.mark.parametrize("make", [qwen_block, qwen_model])
@pytest.mark.parametrize("is_given", [False, True])
def test_what_was_saved_comes_back_bit_by_bit(
    target: str, make: Callable[[], nn.Module], is_given: bool, tmp_path: Path
) -> None:
    made = mixed(make(), target)
    wanted = call(made)
    made.save(tmp_path / "saved")
    other = None
    if is_given:
        other = make()
        for parameter in other.parameters():
            nn.init.constant_(parameter, float("nan"))  # its own weights do not matter
    back: Any = mxmoe.load(tmp_path / "saved", other)
    assert type(back) is type(made)
    assert torch.equal(call(back), wanted)
    assert back.plan == made.plan
    assert back.report() == made.report()
    assert all(back.ir(stage) == made.ir(stage) for stage in ("lifted", "annotated", "allocated", "lowered"))
    assert not back.training
    assert not any(tensor.is_meta for tensor in (*back.parameters(), *back.buffers()))
    back.save(tmp_path / "again")
    assert torch.equal(call(mxmoe.load(tmp_path / "again")), wanted)


def test_a_model_that_came_back_generates(tmp_path: Path) -> None:
    made = mixed(qwen_model(tie_word_embeddings=True), "numba")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = made.generate(IDS, **options)
    made.save(tmp_path / "saved")
    back: Any = mxmoe.load(tmp_path / "saved")
    assert torch.equal(back.generate(IDS, **options), wanted)
    assert back.lm_head.weight is back.model.embed_tokens.weight


@pytest.mark.parametrize(("first", "second"), [("eager", "numba"), ("numba", "eager")])
def test_a_checkpoint_runs_on_another_target(first: str, second: str, tmp_path: Path) -> None:
    made = mixed(qwen_block(), first)
    made.save(tmp_path / "saved")
    back: Any = mxmoe.load(tmp_path / "saved", target=second)
    assert back.compilation.target.name == back.report().target == second
    wanted = call(made)
    assert (call(back) - wanted).norm() <= 3 * max(map(tolerance, made.plan.histogram())) * wanted.norm()
    direct = mixed(qwen_block(), second)
    assert back.report().held_bytes == direct.report().held_bytes
    assert torch.equal(call(back), call(direct))


def test_experts_alone_with_biases(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    experts = seeded(GptOssExperts(GptOssConfig(**sizes)))
    made: Any = mixed(experts)
    made.save(tmp_path / "saved")
    rows, index, weights = torch.randn(5, 32), torch.tensor([[0, 3]] * 5), torch.full((5, 2), 0.5)
    wanted = made(rows, index, weights)
    assert (wanted - experts(rows, index, weights)).norm() < 0.5 * wanted.norm()
    back: Any = mxmoe.load(tmp_path / "saved")
    assert torch.equal(back(rows, index, weights), wanted)


def test_a_class_of_ones_own_needs_the_block(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MixtralSparseMoeBlock(MixtralConfig(**CONFIG, num_local_experts=4))
            self.register_buffer("offset", torch.zeros(32), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + self.offset)

    module = seeded(Wrapped())
    module.offset.fill_(0.5)
    made = mixed(module)
    wanted = call(made)
    mxmoe.save(made, tmp_path / "saved")
    with pytest.raises(NeedsBlock, match=r"pass mxmoe.load\(folder, block=...\)"):
        mxmoe.load(tmp_path / "saved")
    back = mxmoe.load(tmp_path / "saved", Wrapped())
    assert torch.equal(call(back), wanted)  # buffers that a state dict leaves out are there too


def test_attention_is_the_one_that_was_compiled(tmp_path: Path) -> None:
    model = seeded(Qwen2MoeForCausalLM._from_config(Qwen2MoeConfig(**CONFIG), attn_implementation="eager"))
    made = mixed(model)
    made.save(tmp_path / "saved")
    assert mxmoe.load(tmp_path / "saved").config._attn_implementation == "eager"


def test_element_types_and_training_mode_come_back(tmp_path: Path) -> None:
    made = mixed(qwen_block().to(torch.bfloat16).train())
    made.save(tmp_path / "saved")
    back = mxmoe.load(tmp_path / "saved")
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}
    assert back.training
    assert back.get_submodule("block").training


def test_no_dense_experts_on_disk(tmp_path: Path) -> None:
    sizes = {**CONFIG, "hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    block = seeded(Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**sizes)))
    made = mxmoe.compile(block, "numba", schemes="w4a16_g128_asym", quiet=True)
    made.save(tmp_path / "saved")
    weights = 15 * 128 * 128
    router = 5 * 128 * 4
    size = (tmp_path / "saved" / "weights.safetensors").stat().st_size
    assert size < weights * (4 + 32 / 128) / 8 + router + 10_000  # the last is names and places
    assert not any("expert" in key for key in made.state_dict() if "shared_expert_gate" not in key)
    assert made.report().held_bytes == weights * (4 + 32 / 128) / 8


# What is in the folder


def test_the_folder_holds_the_plan_and_the_text_of_every_stage(saved: tuple[Path, Any]) -> None:
    folder, made = saved
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "weights.safetensors",
        "plan.json",
        *(f"{stage}.mlir" for stage in ("lifted", "annotated", "allocated", "lowered")),
    }
    assert Plan.load(folder / "plan.json") == made.plan
    assert mxmoe.parse_ir((folder / "lowered.mlir").read_text())
    assert read_checkpoint(folder).about["target"] == "eager"


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_is_found_and_named(data: st.DataObject, saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flip = data.draw(st.integers(1, 255))
    path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
    try:
        with pytest.raises(BrokenCheckpoint, match=path.name):
            mxmoe.load(folder)
    finally:
        path.write_bytes(content)


def test_a_flipped_byte_of_a_weight_is_named_by_its_tensor(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        with pytest.raises(BrokenCheckpoint, match=r"weights\.safetensors is broken: tensor '.+' does not match"):
            mxmoe.load(folder)
    finally:
        path.write_bytes(whole)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_short_is_named(data: st.DataObject, saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        with pytest.raises(BrokenCheckpoint, match=path.name):
            mxmoe.load(folder)
    finally:
        path.write_bytes(content)


def test_a_missing_file_is_named(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = saved
    for path in sorted(folder.iterdir()):
        aside = path.rename(tmp_path / path.name)
        try:
            with pytest.raises((BrokenCheckpoint, NoCheckpoint), match=path.name):
                mxmoe.load(folder)
        finally:
            aside.rename(path)
    with pytest.raises(NoCheckpoint, match="nowhere"):
        mxmoe.load(tmp_path / "nowhere")


# Mistakes


def test_modules_of_another_structure(saved: tuple[Path, Any]) -> None:
    folder, _ = saved
    others: list[tuple[dict[str, Any], str]] = [
        ({"num_experts": 8}, "8 experts"),
        ({"moe_intermediate_size": 64}, "gate 64 x 32"),
        ({"hidden_size": 64}, "gate 32 x 64"),
        ({"hidden_act": "gelu"}, "gelu"),
    ]
    for change, message in others:
        block = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**{**CONFIG, **change}))
        with pytest.raises(StructureMismatch, match=message):
            mxmoe.load(folder, block)
    for module in (qwen_model(), Qwen2MoeExperts(Qwen2MoeConfig(**CONFIG))):
        with pytest.raises(MxmoeError, match=r"structure that was compiled|how many experts"):
            mxmoe.load(folder, module)
    with pytest.raises(NotAModule, match="not str"):
        mxmoe.load(folder, "Qwen/Qwen1.5-MoE-A2.7B")
    odd = qwen_block()
    odd.extra = nn.Linear(2, 2)
    with pytest.raises(StructureMismatch, match=r"extra\."):
        mxmoe.load(folder, odd)


def test_targets_that_are_not_there(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved
    monkeypatch.setattr("mxmoe.backends.triton.has_triton", lambda: False)
    with pytest.raises(UnknownName, match="did you mean eager"):
        mxmoe.load(folder, target="eagr")
    with pytest.raises(NoKernels):
        mxmoe.load(folder, target="triton-sm90")


def test_a_target_that_cannot_run_what_was_chosen(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved
    monkeypatch.setattr(NumbaBackend, "supports", lambda _, scheme: scheme.act_bits == 16)
    message = r"numba cannot run w8a8_sym, which moe chose for expert \d of moe\..*it runs w2a16_g128_asym"
    with pytest.raises(UnsupportedScheme, match=message):
        mxmoe.load(folder, target="numba")


def test_only_what_was_compiled_is_saved(tmp_path: Path) -> None:
    with pytest.raises(NotCompiled, match="Linear is not compiled"):
        mxmoe.save(nn.Linear(2, 2), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_librarys_own_way_to_save_is_closed(tmp_path: Path) -> None:
    made = mixed(qwen_model())
    with pytest.raises(NotSavedHere, match=r"use .save\(folder\)"):
        made.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_stages_that_are_not_there(saved: tuple[Path, Any]) -> None:
    _, made = saved
    with pytest.raises(NoSuchStage, match="did you mean lowered"):
        made.ir("lowerd")


def test_copies_of_models_save_themselves(tmp_path: Path) -> None:
    made = mixed(qwen_model())
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    twin.save(tmp_path / "twin")
    assert not call(mxmoe.load(tmp_path / "twin")).any()
    assert call(made).any()


def test_copied_modules_share_their_tensors() -> None:
    block = qwen_block()
    twin, empty = copy_modules(block), copy_modules(block, is_meta=True)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in block.parameters()]
    assert not set(twin.modules()) & set(block.modules())
    assert all(p.is_meta for p in empty.parameters())
    assert [p.shape for p in empty.parameters()] == [p.shape for p in block.parameters()]
    assert isinstance(mixed(block), CompiledMoE)
