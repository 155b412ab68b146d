"""A compiled block: sizes, determinism, turns, threads, refusals, and giving weights back."""

from concurrent.futures import ThreadPoolExecutor

import numba
import pytest
import torch

from mxmoe.backends.numba import NumbaBackend, NumbaExecutable, executable
from mxmoe.errors import BadHidden, BadRouting, NoSuchBank, WrongDevice
from mxmoe.ir import BankShape, BlockShape, Scheme
from mxmoe.quant import pack
from mxmoe.testing import at_stage, random_weights

WEIGHTS = {role: f"mlp.routed.{role}" for role in ("gate", "up", "down")}
BIASES = {role: f"{name}.bias" for role, name in WEIGHTS.items()}
SHAPE = BlockShape("mlp", 96, (BankShape("routed", 4, 2, 128, "silu", True, WEIGHTS, BIASES),))
MIX = [Scheme.parse(name) for name in ("w4a16_g32_asym", "w8a8_sym", "w4a4_g32_sym", "w8a8_e4m3", "fp16")]
GENERATOR = torch.Generator().manual_seed(1)
HIDDEN = torch.randn((37, 96), generator=GENERATOR)
INDEX = torch.rand((37, 4), generator=GENERATOR).argsort(-1)[:, :2].contiguous()
ROUTER = torch.rand((37, 2), generator=GENERATOR)


@pytest.fixture(scope="module")
def compiled() -> NumbaExecutable:
    return NumbaBackend().compile(at_stage([SHAPE], "lowered", MIX, seed=4), random_weights([SHAPE]))["mlp"]


def test_nbytes_is_the_packed_size(compiled: NumbaExecutable) -> None:
    names = {**WEIGHTS}.values()
    packed = sum(compiled.packed(name, expert).nbytes for name in names for expert in range(4))
    biases = sum(random_weights([SHAPE])[name].nbytes for name in BIASES.values())
    assert compiled.nbytes == packed + biases


def test_weights_can_be_had_back(compiled: NumbaExecutable) -> None:
    weights = random_weights([SHAPE])
    for name in WEIGHTS.values():
        for expert in range(4):
            got = compiled.packed(name, expert)
            wanted = pack(weights.quantized(name, expert, got.scheme))
            assert torch.equal(got.payload, wanted.payload)
    for name in BIASES.values():
        assert torch.equal(compiled.bias(name), weights[name])


def test_threads_change_no_bit(compiled: NumbaExecutable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executable, "ALONE", 0)
    wanted = compiled("routed", HIDDEN, INDEX, ROUTER)
    for threads in range(1, numba.get_num_threads() + 1):
        monkeypatch.setattr(numba, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(compiled("routed", HIDDEN, INDEX, ROUTER), wanted)


def test_many_tokens_are_run_in_turns(compiled: NumbaExecutable, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = compiled("routed", HIDDEN, INDEX, ROUTER)
    monkeypatch.setattr(executable, "MAX_ROWS", 20)
    torch.testing.assert_close(compiled("routed", HIDDEN, INDEX, ROUTER), wanted, rtol=1e-3, atol=1e-3)


def test_python_threads_may_call_at_once(compiled: NumbaExecutable) -> None:
    wanted = compiled("routed", HIDDEN, INDEX, ROUTER)
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: compiled("routed", HIDDEN, INDEX, ROUTER), range(16)))
    assert all(torch.equal(out, wanted) for out in outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_result_has_the_dtype_of_the_tokens(compiled: NumbaExecutable, dtype: torch.dtype) -> None:
    out = compiled("routed", HIDDEN.to(dtype), INDEX.int(), ROUTER.to(dtype))
    assert out.dtype == dtype
    assert out.shape == HIDDEN.shape


def test_strided_and_differentiable_tokens(compiled: NumbaExecutable) -> None:
    wanted = compiled("routed", HIDDEN, INDEX, ROUTER)
    strided = HIDDEN.T.contiguous().T.requires_grad_()
    out = compiled("routed", strided, INDEX.T.contiguous().T, ROUTER.T.contiguous().T)
    assert torch.equal(out, wanted)
    assert not out.requires_grad


def test_no_tokens_and_only_padding(compiled: NumbaExecutable) -> None:
    assert compiled("routed", HIDDEN[:0], INDEX[:0], ROUTER[:0]).shape == (0, 96)
    assert not compiled("routed", HIDDEN, torch.full_like(INDEX, 4), ROUTER).any()


def test_a_bad_call_is_refused(compiled: NumbaExecutable) -> None:
    with pytest.raises(NoSuchBank, match="mlp has no bank 'shared'; it has routed"):
        compiled("shared", HIDDEN, INDEX, ROUTER)
    with pytest.raises(BadHidden):
        compiled("routed", HIDDEN[:, 1:], INDEX, ROUTER)
    with pytest.raises(BadRouting):
        compiled("routed", HIDDEN, INDEX + 2, ROUTER)
    with pytest.raises(WrongDevice, match="numba holds mlp on cpu and was given tensors on meta"):
        compiled("routed", HIDDEN.to("meta"), INDEX, ROUTER)
    with pytest.raises(WrongDevice):
        compiled("routed", HIDDEN.to("meta"), INDEX.to("meta"), ROUTER.to("meta"))
