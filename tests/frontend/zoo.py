"""Every model family of the installed transformers that has decorated experts, at tiny sizes, with random weights."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

MODELS = Path(transformers.__file__).parent / "models"
DECORATOR = "use_experts_implementation"

TINY: Mapping[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "hidden_size": 32,
    "moe_hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 20,
    "shared_intermediate_size": 20,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "vocab_size": 64,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "d_model": 32,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_nextn_predict_layers": 0,
    "use_cache": False,
    "index_topk": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
}
"""Given to every config that has such a field."""

_HALF_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}

FURTHER: Mapping[str, Mapping[str, Any]] = {
    "BeamExperts": _HALF_SPARSE,
    "Cohere2MoeExperts": {"num_shared_experts": 2},
    "DeepseekOcr2TextExperts": _HALF_SPARSE,
    "Dots1Experts": {"n_shared_experts": 1},
    "Dots3NoteExperts": _HALF_SPARSE,
    "Ernie4_5_VLMoeMoeExperts": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "FlintExperts": {"mlp_only_layers": [0]},
    "Gemma4TextExperts": {"enable_moe_block": True, "vocab_size_per_layer_input": 64},
    "Glm4vMoeTextExperts": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
    },
    "Glm5NextTextExperts": {**_HALF_SPARSE, "qk_rope_head_dim": 0},
    "HYV4VLExperts": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "Lfm2MoeExperts": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MiMoV2FlashExperts": {"num_key_value_heads": 2},
    "NemotronHExperts": {"layers_block_type": ["moe", "mlp"]},
    "Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 20},
    "ZayaExperts": {"num_experts_per_tok": 1},
    "NllbMoeExperts": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "Step3p7Experts": {
        **_HALF_SPARSE,
        "sliding_window": 8,
        "share_expert_dim": 20,
        "swiglu_limits": [None, 7.0],
        "swiglu_limits_shared": [None, 16.0],
    },
    "SwitchTransformersExperts": {
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
}
"""Class of experts -> fields that this family needs besides."""


@dataclass(frozen=True)
class Family:
    """One class of experts, and a model that holds it."""

    module: str
    experts: str

    @property
    def name(self) -> str:
        return self.module.rpartition("modeling_")[2]

    def __str__(self) -> str:
        return f"{self.name}-{self.experts}"

    @property
    def cls(self) -> type[nn.Module]:
        return getattr(importlib.import_module(self.module), self.experts)


UNDECORATED = tuple(
    Family(f"transformers.models.{name}.modeling_{name}", experts)
    for name, experts in (
        ("nllb_moe", "NllbMoeExperts"),
        ("step3p7", "Step3p7Experts"),
        ("switch_transformers", "SwitchTransformersExperts"),
    )
)
"""Families that lift although their experts are not decorated."""


@cache
def families() -> tuple[Family, ...]:
    """Read off the sources, so that a new family is tested as soon as it is installed."""
    found: list[Family] = []
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text()
        if f"@{DECORATOR}" in text:
            module = f"transformers.models.{file.parent.name}.{file.stem}"
            found += [Family(module, node.name) for node in ast.parse(text).body if _is_decorated(node)]
    return tuple(found)


def _is_decorated(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any(DECORATOR in ast.unparse(d) for d in node.decorator_list)


def tiny_config(cls: type[PretrainedConfig], **further: Any) -> PretrainedConfig:  # noqa: ANN401  # any field
    """Build a config of a class with every field of TINY that it has."""
    names = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)
    given = {name: value for name, value in TINY.items() if name in names} | further
    config = cls(**given)
    config._experts_implementation = "eager"
    return config


def models(family: Family) -> Iterator[type[PreTrainedModel]]:
    """Models of the family's file, those of text first, small names first."""
    module = importlib.import_module(family.module)
    held = [m for m in vars(module).values() if inspect.isclass(m) and m.__module__ == module.__name__]
    named = [m for m in held if issubclass(m, PreTrainedModel) and re.search("(?<!PreTrained)Model$", m.__name__)]
    yield from sorted(named, key=lambda m: ("Text" not in m.__name__, len(m.__name__)))


def tiny_model(family: Family, **further: Any) -> PreTrainedModel:  # noqa: ANN401  # any field
    """Build the first model of a family that holds its experts, for evaluation, weights normal with deviation 0.2."""
    for model in models(family):
        config = tiny_config(model.config_class, **{**FURTHER.get(family.experts, {}), **further})
        with torch.device("meta"):
            shell = model(config)
        if any(isinstance(part, family.cls) for part in shell.modules()):
            size = sum(parameter.numel() for parameter in shell.parameters())
            assert size < 5_000_000, f"{model.__name__} is not tiny: {size:,} parameters"
            return randomized(model(config)).eval()
    raise AssertionError(f"no model of {family.module} holds {family.experts}: say in FURTHER how to build one")


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with normal numbers of deviation 0.2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return module
