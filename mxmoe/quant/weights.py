"""Where the tensors are: canonical weight names to dense tensors, loaded when asked for, or to packed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mxmoe.errors import (
    BadWeight,
    NonFiniteWeights,
    NoSuchExpert,
    PackedAs,
    PackedOnly,
    UnknownName,
    WeightsBeyondFormat,
)
from mxmoe.ir import Scheme
from mxmoe.quant.hadamard import rotate
from mxmoe.quant.packing import pack, unpack
from mxmoe.quant.quantized import Packed, Quantized
from mxmoe.quant.quantizers import Quantizer, find_quantizer
from mxmoe.quant.rtn import checked_weight
from mxmoe.registry import near_names

Loader = Tensor | Callable[[], Tensor]
Hessians = Callable[[str, int], Tensor | None]
_BANKS_KEPT = 3


class Weights(Mapping[str, Tensor]):
    """
    The dense weights of a model by canonical name, `"<block>.<bank>.<role>"` -> tensor [experts, out, in].

    Biases, `"<block>.<bank>.<role>.bias"`, are [experts, out]; a shared expert is a bank of one. A value is a tensor or
    a function that loads one; the latest loaded tensor is kept until another name is asked for, so that going through
    the experts of one bank loads it once.

    Raises:
        UnknownName: a name that is not there.
    """

    def __init__(
        self,
        loaders: Mapping[str, Loader],
        quantizer: str | Quantizer = "rtn",
        hessians: Hessians | None = None,
        rotations: Mapping[str, int] | None = None,
    ) -> None:
        """
        Hold the loaders; nothing is loaded yet.

        Args:
            loaders: name -> tensor or function that returns it.
            quantizer: a name in `QUANTIZERS` or such a function.
            hessians: (name, expert) -> hessian [in, in] or None, for quantizers that use it; of inputs that are not
                rotated.
            rotations: see `rotated`.
        """
        self._loaders = dict(loaders)
        self._quantizer = find_quantizer(quantizer)
        self._hessians = hessians
        self._rotations = dict(rotations or {})
        self._latest: tuple[str, Tensor] | None = None
        self._planned: Mapping[str, Sequence[Scheme]] = {}
        self._banks: dict[str, list[Quantized]] = {}

    def using(self, quantizer: str | Quantizer, hessians: Hessians | None = None) -> Weights:
        """Return the same weights under another quantizer."""
        return Weights(self._loaders, quantizer, hessians, self._rotations)

    def rotated(self, rotations: Mapping[str, int]) -> Weights:
        """
        Return the same weights with some rotated along their input channels, as `mxmoe.ir.rotations` says of a module.

        It happens when a weight is asked for, in float32 (or float64) and before it is quantized; a Hessian H becomes
        R^T H R. The blocks take the place of those of an earlier call: {} gives the weights as they were.

        Args:
            rotations: name -> channels that are rotated together, see `rotate`.
        """
        return Weights(self._loaders, self._quantizer, self._hessians, rotations)

    def keeping(self, experts: Mapping[str, Sequence[int]]) -> Weights:
        """
        Return the same weights without some experts: name -> those that are kept, counted from 0 then.

        Names that are not there keep all. Hessians follow.
        """
        loaders = {
            name: self._some(name, experts[name]) if name in experts else one for name, one in self._loaders.items()
        }
        known = self._hessians
        moved = known and (lambda name, expert: known(name, experts[name][expert] if name in experts else expert))
        return Weights(loaders, self._quantizer, moved, self._rotations)

    def _some(self, name: str, experts: Sequence[int]) -> Loader:
        return lambda: self._loaded(name)[list(experts)]

    def __getitem__(self, name: str) -> Tensor:
        return self._turned(name, self._loaded(name))

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        block = self._rotations.get(name)
        return tensor if block is None else rotate(tensor, block)

    def _loaded(self, name: str) -> Tensor:
        latest = self._latest  # read once: another thread may replace it
        if latest is not None and latest[0] == name:
            return latest[1]
        if name not in self._loaders:
            raise UnknownName(kind="weight", name=name, near=near_names(name, self._loaders))
        loader = self._loaders[name]
        if isinstance(loader, Tensor):
            return loader
        tensor = loader()
        self._latest = (name, tensor)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._loaders

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def quantized(self, name: str, expert: int, scheme: Scheme) -> Quantized:
        """
        Quantize one expert's matrix [out, in]; computed at every call.

        Raises:
            UnknownName, NoSuchExpert: no such matrix.
            BadWeight: the name is a bias.
            NonFiniteWeights, WeightsBeyondFormat: from the quantizer, naming weight and expert.
        """
        stack = self._loaded(name)  # one expert is rotated at a time, not all of them for each
        if stack.dim() != 3:
            raise BadWeight(name=name, found=f"{stack.dtype} {list(stack.shape)}")
        check_expert(name, expert, len(stack))
        planned = self._planned.get(name)
        if planned is not None and planned[expert] == scheme:
            return self._bank(name, planned)[expert]
        weight = self._turned(name, stack[expert])
        return self._quantizer(weight, scheme, name=f"{name}[{expert}]", hessian=self._hessian(name, [expert]))

    def quantized_stack(self, name: str, schemes: Sequence[Scheme]) -> list[Quantized]:
        """
        Quantize every expert's matrix in a scheme of its own: the experts of one scheme as one stack, in one call.

        Hessians are stacked alike; an expert without one has zeros. A stack gives what its matrices give one by one,
        up to the rounding of a quantizer that multiplies matrices.

        Raises:
            BadWeight: the name is a bias, or there is not one scheme per expert.
            Others as `quantized`, which name the expert.
        """
        stack = self._loaded(name)
        if stack.dim() != 3 or len(stack) != len(schemes):
            raise BadWeight(name=f"{name}, in {len(schemes)} schemes,", found=f"{stack.dtype} {list(stack.shape)}")
        found: dict[int, Quantized] = {}
        for scheme in dict.fromkeys(schemes):
            experts = [expert for expert, own in enumerate(schemes) if own == scheme]
            part = self._turned(name, stack if len(experts) == len(stack) else stack[experts])
            try:
                quantized = self._quantizer(part, scheme, name=name, hessian=self._hessian(name, experts, stacked=True))
            except (NonFiniteWeights, WeightsBeyondFormat):
                for index, expert in enumerate(experts):
                    checked_weight(part[index], scheme, f"{name}[{expert}]")
                raise
            found |= {expert: quantized[index] for index, expert in enumerate(experts)}
        return [found[expert] for expert in range(len(schemes))]

    def planned(self, schemes: Mapping[str, Sequence[Scheme]]) -> Weights:
        """
        Return the same weights with the scheme of every expert known beforehand: name -> schemes.

        `quantized` then takes a bank at a time, with `quantized_stack`, when it is asked for an expert in its scheme.
        The last three banks' codes are kept: a backend may go through the experts first, or through the roles.
        """
        weights = Weights(self._loaders, self._quantizer, self._hessians, self._rotations)
        weights._planned = dict(schemes)
        return weights

    def _bank(self, name: str, schemes: Sequence[Scheme]) -> list[Quantized]:
        held = self._banks  # read once, as above
        if name not in held:
            latest = list(held.items())[1 - _BANKS_KEPT :]
            held = self._banks = {**dict(latest), name: self.quantized_stack(name, schemes)}
        return held[name]

    def _hessian(self, name: str, experts: Sequence[int], *, stacked: bool = False) -> Tensor | None:
        """Give the Hessian of one expert [in, in], or of several [experts, in, in]; None if there is none at all."""
        if self._hessians is None:
            return None
        each = [self._hessians(name, expert) for expert in experts]
        known = next((one for one in each if one is not None), None)
        if known is None:
            return None
        hessian = torch.stack([torch.zeros_like(known) if one is None else one for one in each]) if stacked else known
        return self._turned(name, self._turned(name, hessian).mT).mT if name in self._rotations else hessian

    def packed(self, name: str, expert: int, scheme: Scheme) -> Packed:
        """Quantize and pack one expert's matrix; raises what `quantized` raises."""
        return pack(self.quantized(name, expert, scheme))


class PackedWeights(Weights):
    """
    Weights as a checkpoint holds them: every expert's matrix packed in the scheme that was chosen for it.

    Only biases and other tensors that were never packed can be had dense.
    """

    def __init__(self, packed: Mapping[str, Sequence[Packed]], dense: Mapping[str, Loader] | None = None) -> None:
        """
        Hold packed matrices.

        Args:
            packed: canonical name -> one matrix per expert.
            dense: what is not packed, e.g. biases.
        """
        super().__init__(dense or {})
        self._packed = {name: tuple(experts) for name, experts in packed.items()}

    def using(self, quantizer: str | Quantizer, hessians: Hessians | None = None) -> Weights:
        """Raise: codes that are chosen stay chosen."""
        raise PackedOnly(name=next(iter(self._packed), "this"), scheme=self._schemes(next(iter(self._packed), "")))

    def rotated(self, rotations: Mapping[str, int]) -> Weights:
        """Raise: codes that are chosen stay chosen, rotated or not."""
        return self.using("rtn")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._packed:
            raise PackedOnly(name=name, scheme=self._schemes(name))
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        return name in self._packed or super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._packed
        yield from super().__iter__()

    def __len__(self) -> int:
        return len(self._packed) + super().__len__()

    def planned(self, schemes: Mapping[str, Sequence[Scheme]]) -> Weights:
        """Return these weights: nothing is quantized."""
        return self

    def quantized(self, name: str, expert: int, scheme: Scheme) -> Quantized:
        """Unpack one expert's matrix; raises what `packed` raises."""
        return unpack(self.packed(name, expert, scheme))

    def quantized_stack(self, name: str, schemes: Sequence[Scheme]) -> list[Quantized]:
        """Unpack every expert's matrix; raises what `packed` raises."""
        return [self.quantized(name, expert, scheme) for expert, scheme in enumerate(schemes)]

    def packed(self, name: str, expert: int, scheme: Scheme) -> Packed:
        """
        Return one expert's matrix as it is held.

        Raises:
            UnknownName, NoSuchExpert: no such matrix.
            PackedAs: it is packed in another scheme.
        """
        if name not in self._packed:
            raise UnknownName(kind="packed weight", name=name, near=near_names(name, self._packed))
        check_expert(name, expert, len(self._packed[name]))
        held = self._packed[name][expert]
        if held.scheme != scheme:
            raise PackedAs(name=name, expert=expert, packed=held.scheme, asked=scheme)
        return held

    def _schemes(self, name: str) -> str:
        return ", ".join(sorted({str(packed.scheme) for packed in self._packed.get(name, ())}))


def check_expert(name: str, expert: int, experts: int) -> None:
    """Raise NoSuchExpert unless 0 <= expert < experts."""
    if not 0 <= expert < experts:
        raise NoSuchExpert(name=name, last=experts - 1, expert=expert)
