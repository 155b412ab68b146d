"""The norm before a block and its readers are found by running, and a reader that cannot be scaled is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mxmoe.errors import MetaWeights, NotTraceable
from mxmoe.frontend import lift
from mxmoe.transform.edges import find_edges

from .models import FORMS, HIDDEN, TRANSFORMERS, Block, Layer, Model, RmsNorm, ids_of, own_model

NORMS: dict[str, Callable[[], nn.Module]] = {
    "rms": RmsNorm,
    "gemma": lambda: RmsNorm(offset=1.0),
    "rms with bias": lambda: RmsNorm(bias=True),
    "layer norm": lambda: nn.LayerNorm(HIDDEN),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_norm_and_all_readers_are_found_and_nothing_changes(form: str, norm: str) -> None:
    model = own_model(form, NORMS[norm])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for index, edge in enumerate(find_edges(lift(model))):
        assert edge.gain is not None, edge.problem
        assert edge.gain.path == f"layers.{index}.post_attention_layernorm"
        assert edge.gain.offset == (norm == "gemma")
        assert set(edge.readers or {}) == {f"layers.{index}.mlp.{name}" for name in ("gate", "shared_expert_gate")}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_of_transformers_are_understood(name: str, dtype: torch.dtype) -> None:
    model = TRANSFORMERS[name](dtype).train()  # dropout and jitter are switched off while tracing, and on again
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for index, edge in enumerate(find_edges(lift(model))):
        assert edge.gain is not None, edge.problem
        assert edge.gain.path == f"model.layers.{index}.post_attention_layernorm"
        routers = {"qwen": {"gate", "shared_expert_gate"}, "mixtral": {"gate"}}[name]
        assert set(edge.readers or {}) == {f"model.layers.{index}.mlp.{router}" for router in routers}
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_linear_beside_the_block_is_a_reader() -> None:
    torch.manual_seed(0)
    model = Model([Layer(Block("stack"), parallel=nn.Linear(HIDDEN, HIDDEN))])
    (edge,) = find_edges(lift(model))
    assert set(edge.readers or {}) == {"layers.0.mlp.gate", "layers.0.mlp.shared_expert_gate", "layers.0.parallel"}


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def test_what_is_no_linear_beside_the_block_is_noticed_for_that_block_alone() -> None:
    torch.manual_seed(0)
    model = Model([Layer(Block("stack"), parallel=Square()), Layer(Block("stack"))])
    bad, good = find_edges(lift(model))
    assert bad.gain is None
    assert "layers.0.post_attention_layernorm" in bad.problem
    assert good.gain is not None


def test_a_block_without_a_norm_before_it_says_so() -> None:
    (edge,) = find_edges(lift(Block("stack")))
    assert edge.gain is None
    assert "alone" in edge.problem
    (edge,) = find_edges(lift(Model([Layer(Block("stack"), norm=nn.Identity())])))
    assert edge.problem == "no norm makes its input"


def test_a_block_that_no_token_reaches_is_left() -> None:
    model = own_model("stack")
    model.layers[1].forward = lambda x: x  # type: ignore[method-assign]
    assert [edge.problem for edge in find_edges(lift(model))][1].endswith("not reached by the tokens that were traced")


def test_a_layer_needs_data() -> None:
    layer = Layer(Block("stack"))
    with pytest.raises(NotTraceable, match="Layer takes more than token ids"):
        find_edges(lift(layer))
    (edge,) = find_edges(lift(layer), {"hidden_states": torch.randn(1, 8, HIDDEN)})
    assert edge.gain is not None


def test_weights_that_were_never_loaded_are_named() -> None:
    with torch.device("meta"):
        model = Model([Layer(Block("stack"))])
    with pytest.raises(MetaWeights, match=r"layers\.0\.mlp\.experts"):
        find_edges(lift(model))


def test_data_is_cut_to_a_few_tokens() -> None:
    model = own_model("stack")
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    find_edges(lift(model), ids_of(0, 5000))
    assert seen
    assert max(seen) <= 32
