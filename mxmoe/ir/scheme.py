"""The scheme: how one linear stores its weights and reads its activations. The only place that splits its string."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mxmoe.errors import BadScheme

ActFormat = Literal["bf16", "fp16", "int", "e4m3"]
WeightFormat = Literal["bf16", "fp16", "int", "e4m3"]

WEIGHT_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
ACT_BITS = (4, 5, 6, 7, 8, 16)
_PATTERN = re.compile(r"w(\d+)a(\d+)(?:_g(\d+))?(?:_(sym|asym))?(?:_(e4m3|fp16))?(_iscale)?")
_PLAIN = {"bf16": "bf16", "fp16": "fp16"}
_DROPPED = "w0"


@dataclass(frozen=True, slots=True)
class Scheme:
    """
    A quantization scheme, `w{bits}a{bits}[_g{group}][_sym|_asym][_e4m3|_fp16][_iscale]`, or `bf16` / `fp16`.

    `Scheme.parse(str(s)) == s` for every scheme. Absent `_g` means one scale per output channel, absent symmetry
    means symmetric, `a16` without a suffix means bf16 activations. `_e4m3` makes 8-bit activations (and 8-bit
    weights) OCP e4m3 floats. `_iscale` makes the scales of the groups of a channel whole multiples of one number. `w0`
    is no linear at all: the expert is dropped. Examples: w4a16_g128_asym, w8a8_sym, w4a4_g128_sym, w8a8_e4m3,
    w4a8_g128_sym_e4m3, w4a8_g128_sym_iscale.

    Raises:
        BadScheme: a field, or a combination of fields, that has no meaning.
    """

    weight_bits: int
    """Bits per stored weight: 1 to 8, 16 for a float weight, or 0 for an expert that is dropped."""
    act_bits: int = 16
    """Bits per activation element at the matrix unit: 4 to 8, or 16."""
    group_size: int | None = None
    """Input channels that share one weight scale; None means the whole row (per-channel)."""
    symmetric: bool = True
    """Without a zero point."""
    act_format: ActFormat = "bf16"
    """Element type of the activations: bf16 or fp16 at 16 bits, int or e4m3 below."""
    integer_scales: bool = False
    """The scales of a channel's groups are 1 to 16 times one scale of the channel, so that codes times multipliers fit
    int8 and a whole row is summed in one int32 (QServe, Lin et al. 2024; Integer Scale, Li et al. 2024)."""

    def __post_init__(self) -> None:
        reason = _fault(self)
        if reason:
            raise BadScheme(text=_spell(self), reason=reason)

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme from its string form; the inverse of `str`."""
        if text == _DROPPED:
            return cls(0)
        if text in _PLAIN:
            return cls(16, act_format=_PLAIN[text])  # pyright: ignore[reportArgumentType]  # a Literal by the table
        match = _PATTERN.fullmatch(text)
        if not match:
            raise BadScheme(text=text, reason="it does not follow the grammar")
        weight_bits, act_bits, group, symmetry, suffix, multiples = match.groups()
        if not int(weight_bits):
            raise BadScheme(text=text, reason=f"weights have 1 to 8 or 16 bits, not 0; {_DROPPED} drops an expert")
        default = "bf16" if act_bits == "16" else "int"
        try:
            return cls(
                int(weight_bits),
                int(act_bits),
                int(group) if group else None,
                symmetry != "asym",
                suffix or default,  # pyright: ignore[reportArgumentType]  # a Literal by the pattern
                multiples is not None,
            )
        except BadScheme as error:  # it was spelled from its fields, which may not be what was written
            raise BadScheme(**{**error.blanks, "text": text}) from None

    def __str__(self) -> str:
        return _spell(self)

    def __lt__(self, other: Scheme) -> bool:
        """Sort by weight bits, then activation bits, then by text."""
        return (self.weight_bits, self.act_bits, str(self)) < (other.weight_bits, other.act_bits, str(other))

    @property
    def weight_format(self) -> WeightFormat:
        """Element type of the stored weights."""
        if self.weight_bits == 16:
            return "fp16" if self.act_format == "fp16" else "bf16"
        return "e4m3" if self.act_format == "e4m3" and self.weight_bits == 8 else "int"

    @property
    def is_float(self) -> bool:
        """Weights are stored as they are, in 16 bits: nothing is quantized."""
        return self.weight_bits == 16

    @property
    def is_dropped(self) -> bool:
        """Nothing is stored and nothing runs: the expert adds nothing to its tokens."""
        return self.weight_bits == 0

    @property
    def is_weight_only(self) -> bool:
        """Weights are quantized and activations are not."""
        return self.act_bits == 16 and not self.is_float and not self.is_dropped

    @property
    def act_group_size(self) -> int | None:
        """
        Channels that share one activation scale; None means one scale per token.

        4-bit activations follow the weight's groups (a token's outliers then spoil one group only, as in Atom and
        MxMoE); wider ones have one scale per token.
        """
        return self.group_size if self.act_bits == 4 else None

    @property
    def scale_bits(self) -> int:
        """
        Bits of one stored scale: bf16 in groups, where they count, float32 per channel, where they do not.

        Integer scales: a byte, the multiplier of a group; `channel_bits` has what it multiplies.
        """
        if self.integer_scales:
            return 8
        return 0 if self.is_float or self.is_dropped else 32 if self.group_size is None else 16

    @property
    def zero_bits(self) -> int:
        """Bits of one stored zero point; as wide as the scale, so that a real zero point fits as well."""
        return 0 if self.symmetric else self.scale_bits

    @property
    def channel_bits(self) -> int:
        """Bits stored once for each output channel, beside those of its groups: the float32 scale of integer scales."""
        return 32 if self.integer_scales else 0

    @property
    def payload_bits(self) -> float:
        """Bits per weight of the codes alone."""
        return float(self.weight_bits)

    def n_groups(self, k: int) -> int:
        """Scales per output channel for `k` input channels; a short last group counts as one."""
        return 1 if self.group_size is None else -(-k // self.group_size)

    def meta_bits(self, k: int) -> float:
        """Bits per weight of scales and zero points for `k` input channels."""
        return ((self.scale_bits + self.zero_bits) * self.n_groups(k) + self.channel_bits) / k

    def effective_bits(self, k: int) -> float:
        """Payload and meta bits per weight for `k` input channels: what the file and the memory bus carry."""
        return self.payload_bits + self.meta_bits(k)


def _fault(s: Scheme) -> str | None:
    """Say what is wrong with the combination of fields, or None."""
    return _fault_of_elements(s) or (_fault_of_multiples(s) if s.integer_scales else None)


def _fault_of_multiples(s: Scheme) -> str | None:
    """Say what of a scheme does not go with integer scales, or None."""
    if s.weight_format != "int" or s.weight_bits not in (2, 3, 4):  # wider codes times 16 leave int8
        return f"integer scales take integer weights of 2 to 4 bits, not {s.weight_bits}"
    if s.group_size is None:
        return "integer scales are of groups, and there are none: add _g128, for example"
    if not s.symmetric:
        return "integer scales take no zero point"
    if s.act_format != "int" or s.act_group_size is not None:
        found = f"{s.act_bits} bits" if s.act_format == "int" else s.act_format
        return f"integer scales take integer activations of 5 to 8 bits with one scale per token, not {found}"
    return None


def _fault_of_elements(s: Scheme) -> str | None:
    """Say what is wrong with the fields but `integer_scales`, or None."""
    if s.is_float:
        plain = s.act_bits == 16 and s.group_size is None and s.symmetric and s.act_format in _PLAIN
        return None if plain else "16-bit weights take no group, no zero point and 16-bit activations"
    if s.is_dropped:
        alone = s.act_bits == 16 and s.group_size is None and s.symmetric and s.act_format == "bf16"
        return None if alone else "what has no weights has neither groups nor activations: write w0"
    if s.weight_bits not in WEIGHT_BITS:
        return f"weights have 1 to 8 or 16 bits, not {s.weight_bits}"
    if s.act_bits not in ACT_BITS:
        return f"activations have 4 to 8 or 16 bits, not {s.act_bits}"
    if s.group_size is not None and s.group_size < 1:
        return f"a group holds at least one channel, not {s.group_size}"
    wide = s.act_bits == 16
    if wide != (s.act_format in ("bf16", "fp16")):
        return f"{s.act_bits}-bit activations cannot be {s.act_format}"
    if s.act_format == "e4m3" and s.act_bits != 8:
        return "e4m3 is an 8-bit format"
    if s.weight_format == "e4m3" and not s.symmetric:
        return "e4m3 weights have no zero point"
    return None


def _spell(s: Scheme) -> str:
    multiples = "_iscale" if s.integer_scales else ""
    if s.is_dropped:
        return _DROPPED + multiples
    if s.is_float:
        return s.act_format + multiples
    group = "" if s.group_size is None else f"_g{s.group_size}"
    symmetry = "" if s.weight_format == "e4m3" else "_sym" if s.symmetric else "_asym"
    suffix = f"_{s.act_format}" if s.act_format in ("e4m3", "fp16") else ""
    return f"w{s.weight_bits}a{s.act_bits}{group}{symmetry}{suffix}{multiples}"
