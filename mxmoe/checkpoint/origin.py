"""How to build a module again that was made by a class of transformers from a config: without its weights."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mxmoe.errors import NeedsBlock

_LIBRARY = "transformers."


@dataclass(frozen=True)
class Origin:
    """What a module was made from."""

    cls: str
    """`module:name` of its class."""
    config_cls: str
    """`module:name` of the class of its config."""
    config: dict[str, Any]
    """The config, plain values."""
    attention: str | None
    """Which implementation of attention the config asks for; configs leave it out of their plain values."""

    @classmethod
    def of(cls, module: nn.Module) -> Origin | None:
        """Describe a module of transformers; None for any other, and for one without a config."""
        holders = (part.config for part in module.modules() if hasattr(part, "config"))  # a block's parts keep it
        config: Any = next(holders, None)
        kind = type(module)
        if config is None or not kind.__module__.startswith(_LIBRARY) or not hasattr(config, "to_json_string"):
            return None
        return cls(
            cls=f"{kind.__module__}:{kind.__qualname__}",
            config_cls=f"{type(config).__module__}:{type(config).__qualname__}",
            config=_plain(json.loads(config.to_json_string(use_diff=False))),
            attention=getattr(config, "_attn_implementation", None),
        )

    def build(self) -> nn.Module:
        """
        Build the module on the meta device: its weights take no memory and have no values yet.

        Only classes of transformers are looked up: a checkpoint is data, and may not name code to run.

        Raises:
            NeedsBlock: the class is not there, or cannot be built from a config alone.
        """
        try:
            kind, config_kind = _find(self.cls), _find(self.config_cls)
            config = config_kind.from_dict(dict(self.config))
            if self.attention is not None:
                config._attn_implementation = self.attention
            with torch.device("meta"):
                return kind(config)
        except Exception as error:  # classes of another library may raise anything; we say what to do instead
            raise NeedsBlock(cls=self.cls, reason=f"{type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:  # noqa: ANN401  # any value of JSON
    """Undo how transformers writes floats that JSON lacks, {"__float__": "Infinity"}: `from_dict` does not."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: _plain(one) for key, one in value.items()}


def _find(path: str) -> Any:  # noqa: ANN401  # a class
    module, _, name = path.partition(":")
    if not module.startswith(_LIBRARY):
        raise ImportError(f"{module} is not part of transformers")
    return getattr(importlib.import_module(module), name)
