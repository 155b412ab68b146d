"""What was observed, as plain numbers: routing counts, and the error of each linear under each scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mxmoe.calib.store import read_arrays, write_arrays
from mxmoe.errors import BadOption, BrokenStats, MxmoeError, NotInStats, StatsMismatch
from mxmoe.ir import Scheme

Floats = NDArray[np.float64]
Norm = Literal["squared", "unsquared"]
Routing = Literal["observed", "uniform"]
Measured = Literal["block", "bank"]

BANK_MEAN = "bank-mean"
"""
The fallback for an expert that got fewer than `min_tokens` tokens, whose own sums say little.

Its error is the mean error per token of the bank's well-observed experts, times its own token count (at least one). In
a bank without any well-observed expert the mean is taken over all of its tokens.
"""
_SUMS = ("tokens", "mass", "squared_output")


@dataclass(frozen=True, eq=False)
class BankStats:
    """Sums over all tokens that a bank saw; nothing is normalised, so that two runs add up."""

    n_tokens: int
    """Tokens that went through the block."""
    tokens: NDArray[np.int64]
    """[expert], assignments; `tokens / n_tokens` is the frequency."""
    mass: Floats
    """[expert], sum of router weights; `mass / n_tokens` is the mean weight per token."""
    squared_output: Floats
    """[expert], sum over tokens of the squared norm of its weighted full-precision output."""
    squared_error: Mapping[str, Floats]
    """Role -> [expert, scheme], sum over tokens of the squared change of the output when only that linear changes."""
    measured_at: Measured = "block"
    """block: the output is the block's; bank: the block does more than weigh and add the bank's output (a norm or a
    projection follows), so the output is the bank's own."""
    output_norm: Floats | None = None
    """[expert], sum over tokens of the norm of its weighted full-precision output; None in statistics of old."""
    fisher_error: Mapping[str, Floats] = field(default_factory=dict[str, Floats])
    """As `squared_error`, every channel of the change times the loss's gradient there, squared; empty if no loss was
    differentiated."""
    facts: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict[str, Mapping[str, Floats]])
    """Fact -> role -> [expert], what the weights say by themselves; `router` stands for the router's rows."""

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.tokens)

    def well_observed(self, min_tokens: int) -> NDArray[np.bool_]:
        """[expert], whether it got at least `min_tokens` tokens."""
        return self.tokens >= min_tokens

    def squared(self, role: str, min_tokens: int) -> Floats:
        """[expert, scheme], `squared_error` with the `BANK_MEAN` fallback for experts under `min_tokens`."""
        return self._filled(self.squared_error[role], min_tokens)

    def fisher(self, role: str, min_tokens: int) -> Floats:
        """[expert, scheme], `fisher_error` with the same fallback."""
        return self._filled(self.fisher_error[role], min_tokens)

    def output(self, min_tokens: int) -> Floats:
        """[expert], `squared_output` with the same fallback."""
        return self._filled(self.squared_output[:, None], min_tokens)[:, 0]

    def _filled(self, error: Floats, min_tokens: int) -> Floats:
        well = self.well_observed(min_tokens)
        base = well if well.any() else np.ones_like(well)
        per_token = error[base].sum(axis=0) / max(int(self.tokens[base].sum()), 1)
        return np.where(well[:, None], error, np.outer(np.maximum(self.tokens, 1), per_token))


@dataclass(frozen=True)
class Coverage:
    """How many tokens the experts of a bank saw."""

    least: int
    median: float
    most: int
    under: int
    """Experts below `min_tokens`."""
    none: int
    """Experts without any token."""
    imbalance: float
    """Standard deviation over the experts of their share of all assignments; 0 when all are used alike."""

    @classmethod
    def of(cls, tokens: NDArray[np.int64], min_tokens: int) -> Coverage:
        """Measure [expert] tokens."""
        share = tokens / max(int(tokens.sum()), 1)
        return cls(
            int(tokens.min()),
            float(np.median(tokens)),
            int(tokens.max()),
            int((tokens < min_tokens).sum()),
            int((tokens == 0).sum()),
            float(share.std()),
        )


@dataclass(frozen=True, eq=False)
class Stats:
    """
    Statistics of some blocks under some schemes: what an allocation is solved from.

    Raises:
        BadOption: `min_tokens` below 0.
        StatsMismatch: a bank whose sums do not have one row per expert and one column per scheme.
    """

    schemes: tuple[Scheme, ...]
    """The columns of every error table."""
    banks: Mapping[tuple[str, str], BankStats]
    """(block, bank) -> its sums."""
    min_tokens: int = 32
    """Experts with fewer tokens take the `BANK_MEAN` fallback."""
    data_free: bool = False
    """No data was seen: hidden states were standard normal."""
    routing: Routing = "observed"
    """uniform: there was no router to ask, so tokens were spread evenly over the experts."""
    macs: int = 0
    """Multiply-adds of all products that the reduction executed."""

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise BadOption(name="Stats", option=f"min_tokens={self.min_tokens}", reason="it counts from 0 on")
        for (block, bank), sums in self.banks.items():
            shapes = {array.shape for array in sums.squared_error.values()}
            rows = {getattr(sums, name).shape for name in _SUMS}
            shapes |= {array.shape for array in sums.fisher_error.values()}
            if shapes != {(sums.experts, len(self.schemes))} or rows != {(sums.experts,)}:
                raise StatsMismatch(reason=f"the sums of {block}.{bank} do not fit its experts and the schemes")

    def bank(self, block: str, bank: str) -> BankStats:
        """
        Return the sums of one bank.

        Raises:
            NotInStats: it was not observed.
        """
        if (block, bank) not in self.banks:
            known = ", ".join(".".join(key) for key in self.banks)
            raise NotInStats(what=f"bank {bank!r} of block {block!r}", known=known)
        return self.banks[block, bank]

    def columns(self, schemes: Sequence[Scheme | str] | None) -> list[int]:
        """
        Return the columns of some schemes, in their order; of all for None.

        Raises:
            NotInStats: one of them was not observed.
        """
        wanted = self.schemes if schemes is None else [Scheme.parse(str(scheme)) for scheme in schemes]
        missing = [str(scheme) for scheme in wanted if scheme not in self.schemes]
        if missing:
            raise NotInStats(what=f"scheme {', '.join(missing)}", known=", ".join(map(str, self.schemes)))
        return [self.schemes.index(scheme) for scheme in wanted]

    def sensitivity(
        self, block: str, bank: str, role: str, schemes: Sequence[Scheme | str] | None = None, *, norm: Norm = "squared"
    ) -> Floats:
        """
        [expert, scheme], change of the block's output over all tokens when only this linear is quantized.

        `squared` is the sum of squares, which adds up over independent errors; `unsquared` its root, the Frobenius
        norm that MxMoE sums (Duanmu et al., ICML 2025, section 3.1). Experts in `few_tokens` have the fallback's.

        Raises:
            NotInStats: the bank, the role or a scheme was not observed.
            BadOption: another norm.
        """
        if norm not in ("squared", "unsquared"):
            raise BadOption(name="sensitivity", option=f"norm={norm}", reason="it is squared or unsquared")
        sums = self.bank(block, bank)
        if role not in sums.squared_error:
            raise NotInStats(what=f"role {role!r} of {block}.{bank}", known=", ".join(sums.squared_error))
        squared = sums.squared(role, self.min_tokens)[:, self.columns(schemes)]
        return np.sqrt(squared) if norm == "unsquared" else squared

    def per_token(self, block: str, bank: str, role: str, schemes: Sequence[Scheme | str] | None = None) -> Floats:
        """[expert, scheme], squared change of the block's output per token that went through the block."""
        return self.sensitivity(block, bank, role, schemes) / self.bank(block, bank).n_tokens

    def relative(self, block: str, bank: str, role: str, schemes: Sequence[Scheme | str] | None = None) -> Floats:
        """[expert, scheme], squared change in parts of the summed squared output of the bank's experts; nan of zero."""
        total = self.bank(block, bank).squared_output.sum()
        return self.sensitivity(block, bank, role, schemes) / (total if total > 0 else np.nan)

    def coverage(self) -> dict[tuple[str, str], Coverage]:
        """(block, bank) -> how many tokens its experts saw, of banks with more than one."""
        return {key: Coverage.of(sums.tokens, self.min_tokens) for key, sums in self.banks.items() if sums.experts > 1}

    def few_tokens(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(block, bank) -> experts with fewer than `min_tokens` tokens; banks without such experts are left out."""
        few = {key: np.flatnonzero(~sums.well_observed(self.min_tokens)) for key, sums in self.banks.items()}
        return {key: tuple(experts.tolist()) for key, experts in few.items() if experts.size}

    def report(self) -> str:
        """Say in a few lines what was observed, and which experts have the fallback's figures."""
        roles = sum(len(sums.squared_error) * sums.experts for sums in self.banks.values())
        seen = max((sums.n_tokens for sums in self.banks.values()), default=0)
        source = "data-free (standard normal hidden states, uniform routing)" if self.data_free else f"{seen} tokens"
        lines = [f"banks: {len(self.banks)}, linears: {roles}, schemes: {len(self.schemes)}, from {source}"]
        per_token = [self.per_token(*key, role) for key, sums in self.banks.items() for role in sums.squared_error]
        if per_token:
            means = zip(self.schemes, np.concatenate(per_token).mean(axis=0).tolist(), strict=True)
            listed = ", ".join(f"{scheme} {mean:.3g}" for scheme, mean in means)
            lines.append(f"squared change of the output per token, mean of all linears: {listed}")
        if coverage := list(self.coverage().values()):
            least, most = min(c.least for c in coverage), max(c.most for c in coverage)
            median = float(np.median(np.concatenate([s.tokens for s in self.banks.values() if s.experts > 1])))
            under, none = (sum(getattr(c, name) for c in coverage) for name in ("under", "none"))
            lines.append(
                f"tokens per expert: {least} to {most}, median {median:g};"
                f" {under} experts under {self.min_tokens}, {none} without any"
            )
        if self.routing == "uniform" and not self.data_free:
            lines.append("no router was there: tokens were spread evenly over the experts")
        for (block, bank), sums in self.banks.items():
            if sums.measured_at == "bank":
                lines.append(f"{block}.{bank}: the block does more than add it up; errors are of the bank's own output")
        for (block, bank), few in self.few_tokens().items():
            listed = ", ".join(map(str, few))
            lines.append(f"{block}.{bank}: {BANK_MEAN} for experts under {self.min_tokens} tokens: {listed}")
        return "\n".join(lines)

    def merge(self, *others: Stats) -> Stats:
        """
        Add the sums of other runs over the same blocks with the same schemes; the rest is taken from this one.

        Raises:
            StatsMismatch: other schemes, blocks, sizes, or another kind of data.
        """
        merged = self
        for other in others:
            for name in ("schemes", "data_free", "routing"):
                if getattr(merged, name) != getattr(other, name):
                    reason = f"{name} is {getattr(merged, name)} in one and {getattr(other, name)} in the other"
                    raise StatsMismatch(reason=reason)
            if merged.banks.keys() != other.banks.keys():
                raise StatsMismatch(reason="they are of different blocks")
            banks = {key: _added(".".join(key), sums, other.banks[key]) for key, sums in merged.banks.items()}
            merged = replace(merged, banks=banks, macs=merged.macs + other.macs)
        return merged

    def save(self, path: str | Path) -> None:
        """Write one file, an uncompressed npz with a JSON header; the file appears whole or not at all."""
        header = {
            "schemes": [str(scheme) for scheme in self.schemes],
            "min_tokens": self.min_tokens,
            "data_free": self.data_free,
            "routing": self.routing,
            "macs": self.macs,
            "banks": [
                [block, bank, sums.n_tokens, sums.measured_at, list(sums.squared_error)]
                for (block, bank), sums in self.banks.items()
            ],
        }
        arrays: dict[str, NDArray[np.generic]] = {}
        for index, sums in enumerate(self.banks.values()):
            arrays |= {f"{index}.{name}": getattr(sums, name) for name in _SUMS}
            arrays |= {f"{index}.error.{role}": error for role, error in sums.squared_error.items()}
            arrays |= {f"{index}.fisher.{role}": error for role, error in sums.fisher_error.items()}
            arrays |= {f"{index}.fact.{n}.{role}": v for n, fact in sums.facts.items() for role, v in fact.items()}
            if sums.output_norm is not None:
                arrays[f"{index}.output_norm"] = sums.output_norm
        write_arrays(Path(path), header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """
        Read what `save` wrote.

        Raises:
            BrokenStats: the file is missing, cut short or damaged.
        """
        header, arrays = read_arrays(Path(path))
        try:
            banks = {
                (block, bank): BankStats(
                    n_tokens,
                    *(arrays[f"{index}.{name}"] for name in _SUMS),
                    squared_error={role: arrays[f"{index}.error.{role}"] for role in roles},
                    measured_at=measured_at,
                    output_norm=arrays.get(f"{index}.output_norm"),
                    fisher_error=_named(arrays, f"{index}.fisher."),
                    facts=_facts(arrays, f"{index}.fact."),
                )
                for index, (block, bank, n_tokens, measured_at, roles) in enumerate(header["banks"])
            }
            schemes = tuple(Scheme.parse(scheme) for scheme in header["schemes"])
            options = {name: header[name] for name in ("min_tokens", "data_free", "routing", "macs")}
            return cls(schemes, banks, **options)
        except (MxmoeError, KeyError, TypeError, ValueError) as error:
            raise BrokenStats(path=path, reason=f"{type(error).__name__}: {error}") from error


def _named(arrays: Mapping[str, Floats], prefix: str) -> dict[str, Floats]:
    """Pick the arrays whose names begin alike, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _facts(arrays: Mapping[str, Floats], prefix: str) -> dict[str, Mapping[str, Floats]]:
    found: dict[str, dict[str, Floats]] = {}
    for name, array in _named(arrays, prefix).items():
        fact, _, role = name.rpartition(".")
        found.setdefault(fact, {})[role] = array
    return dict(found)


def _added(name: str, one: BankStats, other: BankStats) -> BankStats:
    """Add two banks' sums."""
    roles = one.squared_error.keys()
    if one.experts != other.experts or roles != other.squared_error.keys() or one.measured_at != other.measured_at:
        raise StatsMismatch(reason=f"{name} has other experts or roles, or was measured at another place")
    if one.fisher_error.keys() != other.fisher_error.keys():
        raise StatsMismatch(reason=f"{name} was observed with gradients in one run and without in the other")
    norms = (one.output_norm, other.output_norm)
    return BankStats(
        one.n_tokens + other.n_tokens,
        *(getattr(one, name) + getattr(other, name) for name in _SUMS),
        squared_error={role: one.squared_error[role] + other.squared_error[role] for role in roles},
        measured_at=one.measured_at,
        output_norm=None if norms[0] is None or norms[1] is None else norms[0] + norms[1],
        fisher_error={role: one.fisher_error[role] + other.fisher_error[role] for role in one.fisher_error},
        facts=one.facts,
    )
