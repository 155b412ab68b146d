"""
Two banks that a block calls one after the other, run together.

A block's own forward calls its routed experts, which know the routing, and its shared expert, which does not. Whichever
comes first decides how both can run at once:

    routed first    both run; what the shared expert made is kept for its call
    shared first    its call gives a tensor without values, which the routed call fills

The second is right only if nobody reads the tensor in between, and both only if the two calls get the same tokens. So
the first call of a block runs them one by one and looks at the order; then it is rehearsed once, with NaN for values
that are not there yet and each bank run by itself, and must give the very same output. A block that does not keeps its
banks apart.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree  # pyright: ignore[reportPrivateUsage]  # as torch's own hooks walk over outputs

from mxmoe.errors import SharedLeftOut
from mxmoe.frontend.lifted import Lifted

Order = Literal["unknown", "routed", "shared", "apart"]
"""Which bank a block calls first; `apart`: they cannot run together."""


class RunsBlock(Protocol):
    """An executable that may run both banks at once."""

    def __call__(self, bank: str, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `mxmoe.target.Executable`."""
        ...

    def joins(self, tokens: int) -> bool:
        """Say whether it gains by running both banks of so many tokens at once."""
        ...

    def run_block(
        self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, shared: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Run the routed bank and the shared one: `routed` and `shared` -> [tokens, hidden]; the latter in `shared`."""
        ...


@dataclass(frozen=True)
class _Seen:
    """Tokens of a call, held so that their memory is not given to others, and how often they had been written."""

    rows: Tensor
    version: int | None

    @classmethod
    def of(cls, rows: Tensor) -> _Seen:
        return cls(rows, None if rows.is_inference() else rows._version)  # pyright: ignore[reportPrivateUsage]

    def is_same(self, other: _Seen) -> bool:
        """Whether both are the same memory, unchanged."""
        return self._place() == other._place()

    def _place(self) -> tuple[object, ...]:
        rows = self.rows
        return rows.data_ptr(), rows.shape, rows.stride(), rows.dtype, rows.device, self.version


@dataclass
class _Frame:
    """One call of a block."""

    order: Order
    is_rehearsal: bool = False
    calls: list[tuple[str, _Seen]] = field(default_factory=list)
    """Of the banks, in order; kept while the order is unknown."""
    args: tuple[Tensor, Tensor, Tensor] | None = None
    """Of the routed call; kept while the order is unknown."""
    seen: _Seen | None = None
    shared: Tensor | None = None
    """What the shared expert makes of `seen`: not there yet where its call comes first."""


class JoinedCalls:
    """What two banks of one block know of each other while the block runs; nothing outlives a call of the block."""

    def __init__(self, name: str, block: nn.Module, executable: RunsBlock) -> None:
        """Begin without knowing the order; every call of `block` is seen to begin and to end."""
        self.name, self.executable = name, executable
        self.order: Order = "unknown"
        self._local = threading.local()
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        block.register_forward_hook(self._leave, with_kwargs=True, always_call=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Give itself: a copy of a block calls its banks in the same order."""
        return self

    def shared(self, hidden: Tensor, *, is_watched: bool) -> Tensor | None:
        """
        Answer the call of the shared expert.

        Args:
            hidden: [tokens, hidden].
            is_watched: somebody looks at what the shared expert gives, as soon as it is given.

        Returns:
            [tokens, hidden], maybe without values yet; None where the expert is to run by itself.
        """
        if torch.compiler.is_dynamo_compiling() or (frame := self._frame()) is None:
            return None
        seen = _Seen.of(hidden)
        if frame.order == "unknown":
            frame.calls.append(("shared", seen))
        elif frame.order == "routed" and frame.seen is not None and frame.seen.is_same(seen):
            out, frame.seen, frame.shared = frame.shared, None, None
            return out
        elif frame.order == "shared" and frame.shared is None and self.executable.joins(len(hidden)):
            everywhere = nn.modules.module._global_forward_hooks  # pyright: ignore[reportPrivateUsage]
            if is_watched or everywhere:
                return None
            frame.seen, frame.shared = seen, torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
            return frame.shared.fill_(float("nan")) if frame.is_rehearsal else frame.shared
        return None

    def routed(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Answer the call of the routed experts.

        Raises:
            SharedLeftOut: the tokens that the shared expert was called with have changed since.
        """
        frame, args = self._frame(), (hidden, top_k_index, top_k_weights)
        if frame is None:
            return self.executable("routed", *args)
        seen = _Seen.of(hidden)
        if frame.order == "unknown":
            frame.calls.append(("routed", seen))
            frame.args = args
        elif frame.order == "routed" and self.executable.joins(len(hidden)):
            both = self._one_by_one(*args) if frame.is_rehearsal else self.executable.run_block(*args)
            frame.seen, frame.shared = seen, both["shared"]
            return both["routed"]
        elif frame.order == "shared" and frame.seen is not None and frame.shared is not None:
            waiting, out = frame.seen, frame.shared
            frame.seen, frame.shared = None, None
            if waiting.is_same(seen) and not frame.is_rehearsal:
                return self.executable.run_block(*args, out)["routed"]
            if not waiting.is_same(_Seen.of(waiting.rows)):
                raise SharedLeftOut(block=self.name, reason="its tokens were changed before the routed experts ran")
            out.copy_(self._alone(waiting.rows))
        return self.executable("routed", *args)

    def _one_by_one(self, hidden: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
        return {"shared": self._alone(hidden), "routed": self.executable("routed", hidden, index, weights)}

    def _alone(self, hidden: Tensor) -> Tensor:
        """Run the shared expert by itself."""
        index = torch.zeros((len(hidden), 1), dtype=torch.int64, device=hidden.device)
        return self.executable("shared", hidden, index, torch.ones_like(index, dtype=hidden.dtype))

    def _frame(self) -> _Frame | None:
        frames: list[_Frame] = getattr(self._local, "frames", [])
        return frames[-1] if frames else None

    def _push(self, frame: _Frame) -> None:
        if not hasattr(self._local, "frames"):
            self._local.frames = []
        self._local.frames.append(frame)

    def _enter(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self._push(_Frame(self.order))

    def _leave(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: object) -> None:
        """End a call, which may have failed: `output` is then None."""
        if torch.compiler.is_dynamo_compiling() or self._frame() is None:
            return
        frame: _Frame = self._local.frames.pop()
        if output is None:
            return
        if frame.order == "shared" and frame.shared is not None:
            raise SharedLeftOut(block=self.name, reason="the routed experts were not called after it")
        if frame.order == "unknown" and self.order == "unknown":
            self.order = self._decide(block, args, named, output, frame)

    def _decide(
        self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: object, frame: _Frame
    ) -> Order:
        """Find the order from one call, and rehearse it; `unknown` where this call cannot tell."""
        if not frame.calls or not self.executable.joins(len(frame.calls[0][1].rows)) or _is_captured():
            return "unknown"
        (first, one), (second, two) = frame.calls[0], frame.calls[-1]
        if len(frame.calls) != 2 or first == second or not one.is_same(two) or not _is_plain((args, named)):
            return "apart"
        expected = _tensors(output)
        if any(bool(tensor.isnan().any()) for tensor in expected):
            return "unknown"
        order: Order = "routed" if first == "routed" else "shared"
        if frame.args is None or not self._rehearse(block, args, named, expected, order):
            return "apart"
        # what is made at a first call, such as kernels, is there before a graph records the next
        self.executable.run_block(*frame.args)
        return order

    def _rehearse(
        self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any], expected: list[Tensor], order: Order
    ) -> bool:
        """Run the block again, banks answered as they would be together; the block's state stays as it is."""
        state = [(buffer, buffer.clone()) for buffer in block.buffers()]
        devices = {tensor.device for tensor in expected if tensor.is_cuda}
        self._push(_Frame(order, is_rehearsal=True))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                again = _tensors(block.forward(*args, **named))
        except Exception:  # whatever it is: the block runs as it did before
            return False
        finally:
            self._local.frames.pop()
            for buffer, before in state:
                if not torch.equal(buffer, before):
                    with torch.no_grad():
                        buffer.copy_(before)
        return len(again) == len(expected) and all(map(torch.equal, again, expected))


def _tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _is_plain(arguments: object) -> bool:
    """Whether a call takes tensors and constants alone: what else, such as a cache, would see a rehearsal."""
    return all(isinstance(leaf, Tensor | int | float | str | None) for leaf in _pytree.tree_leaves(arguments))


def _is_captured() -> bool:
    """Whether a CUDA graph is recording: then nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def join_calls(lifted: Lifted, executables: Mapping[str, Any]) -> dict[str, JoinedCalls]:
    """Give block name -> what its banks share, where they are called as banks and its executable can join them."""
    found: dict[str, JoinedCalls] = {}
    for block in lifted.blocks:
        executable = executables[block.name]
        kinds = {name: bank.kind for name, bank in block.banks.items()}
        if kinds == {"routed": "routed", "shared": "shared"} and hasattr(executable, "joins") and executable.joins(1):
            found[block.name] = JoinedCalls(block.name, block.block, executable)
    return found
