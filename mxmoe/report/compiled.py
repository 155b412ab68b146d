"""What a compilation says of itself: bytes, bits, schemes, predicted time, and what to distrust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mxmoe.ir import ModuleOp, banks, moe_ops


@dataclass(frozen=True)
class PlanSummary:
    """The sums behind a plan; averages are over weights, not over rows."""

    n_weights: int
    """Numbers in all expert weights."""
    payload_bits: float
    """Average bits per weight of the codes."""
    effective_bits: float
    """Average bits per weight with scales and zero points."""
    n_bytes: float
    """Bytes of codes, scales and zero points."""
    rows: Mapping[str, int]
    """Scheme -> rows (expert x role) that chose it, most frequent first."""
    block_bits: Mapping[str, float]
    """Block -> average effective bits."""

    @classmethod
    def of(cls, module: ModuleOp) -> PlanSummary:
        """Add up an allocated module."""
        payload = effective = weights = 0.0
        rows: dict[str, int] = {}
        block_bits: dict[str, float] = {}
        for moe in moe_ops(module):
            bits, count = 0.0, 0
            for op in (op for bank in banks(moe).values() for op in bank.linears.values()):
                assert op.choice is not None, f"{moe.block} is allocated"
                for scheme in (moe.candidates[index] for index in op.choice.array.tolist()):
                    bits += scheme.effective_bits(op.k) * op.n * op.k
                    payload += scheme.payload_bits * op.n * op.k
                    count += op.n * op.k
                    rows[str(scheme)] = rows.get(str(scheme), 0) + 1
            block_bits[moe.block] = bits / count
            effective, weights = effective + bits, weights + count
        ordered = dict(sorted(rows.items(), key=lambda item: -item[1]))
        return cls(int(weights), payload / weights, effective / weights, effective / 8, ordered, block_bits)


@dataclass(frozen=True)
class CompileReport:
    """What `compile` did; `print(compiled.report())` is meant to be read."""

    target: str
    device: str
    """Device that costs were taken for."""
    quantizer: str
    bytes_found: int
    """Bytes of expert weights in the module that was compiled."""
    bytes_quantized: int
    """Bytes of those that are now quantized; 16-bit rows are not."""
    found: str
    """The lift's own account, bank by bank, with everything that was left and why."""
    plan: PlanSummary
    held_bytes: int
    """Bytes that the compiled experts hold: codes, scales, zero points and biases."""
    tokens: int
    """Tokens per call of `predicted_us`."""
    predicted_us: Mapping[str, float]
    """Block -> microseconds predicted for `device`; a prediction, not a measurement."""
    calibration: str
    """What sensitivity and routing rest on."""
    seconds: Mapping[str, float]
    """Pass -> seconds."""
    runs: str = ""
    """How it runs on this machine, where that is not as the target says, and the kernels that it carries."""

    def __str__(self) -> str:
        plan = self.plan
        schemes = ", ".join(f"{scheme} x {count}" for scheme, count in plan.rows.items())
        microseconds = sum(self.predicted_us.values()) / max(len(self.predicted_us), 1)
        share = self.bytes_quantized / self.bytes_found if self.bytes_found else 0.0
        return "\n".join(
            [
                f"quantized {self.bytes_quantized:,} of {self.bytes_found:,} bytes of expert weights ({share:.1%})"
                f" with {self.quantizer}; {self.held_bytes:,} bytes are held",
                f"average bits per weight: {plan.payload_bits:.3f} payload, {plan.effective_bits:.3f} effective",
                f"rows per scheme: {schemes}",
                f"predicted {microseconds:.1f} us per block of {self.tokens} tokens on {self.device}",
                *([f"{self.target} {self.runs}"] if self.runs else []),
                f"calibration: {self.calibration}",
                self.found,
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompileReport:
        """Read what `to_dict` wrote."""
        fields: dict[str, Any] = {**values, "plan": PlanSummary(**values["plan"])}
        return cls(**fields)
