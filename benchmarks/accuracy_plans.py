"""
What the accuracy study compares: settings, allocators, and the list of plans in the order in which they matter.

Every plan is solved for the least loss alone (r = 1), by the same solver, from statistics of the same data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from accuracy_bank import Layout
from numpy.typing import NDArray

from mxmoe.calib import Stats
from mxmoe.ir import Scheme, banks, moe_ops
from mxmoe.passes import SeenBank, parse_sensitivity
from mxmoe.solver import Problem, Solution, solve, solve_parts, tie

Floats = NDArray[np.float64]

WEIGHT_ONLY = ("w1a16_g128_sym", "w2a16_g128_asym", "w3a16_g128_asym", "w4a16_g128_asym", "w8a16_g128_asym")
FOUR_AND_EIGHT = ("w4a4_g128_sym", "w8a8_sym")


@dataclass(frozen=True)
class Setting:
    """A budget, what may be mixed within it, and the schemes that stand for it alone."""

    bits: float | None
    """Average effective bits per weight; None where there is nothing to mix."""
    candidates: tuple[str, ...]
    uniform: tuple[str, ...]


# the mixes with quantized activations have as many bits as the uniform scheme w5a5_g128_sym
SETTINGS = {
    "2.25": Setting(2.25, WEIGHT_ONLY, ("w2a16_g128_asym",)),
    "2.5": Setting(2.5, WEIGHT_ONLY, ("w2a16_g64_asym",)),
    "3.25": Setting(3.25, WEIGHT_ONLY, ("w3a16_g128_asym",)),
    "4.25": Setting(4.25, WEIGHT_ONLY, ("w4a16_g128_asym",)),
    "w5a5": Setting(5.125, FOUR_AND_EIGHT, ("w5a5_g128_sym", "w5a5_sym")),
    "w5a5 and w4a8": Setting(5.125, (*FOUR_AND_EIGHT, "w4a8_g128_sym"), ()),
    "w4a4": Setting(None, (), ("w4a4_g128_sym",)),
    "w4a8": Setting(None, (), ("w4a8_g128_sym",)),
    "w8a8": Setting(None, (), ("w8a8_sym",)),
    "fp8": Setting(None, (), ("w8a8_e4m3",)),
}
MIXED = tuple(name for name, setting in SETTINGS.items() if setting.bits is not None)
WITH_ACTIVATIONS = ("w5a5", "w5a5 and w4a8", "w4a4", "w4a8", "w8a8", "fp8")
WEIGHT_ONLY_SETTINGS = tuple(name for name in MIXED if name not in WITH_ACTIVATIONS)


@dataclass(frozen=True)
class Method:
    """An allocator: a sensitivity, and how its table is solved."""

    sensitivity: str
    granularity: str = "linear"
    budget_per: str = "model"
    tie_gate_up: bool = True


METHODS = {
    "squared": Method("squared"),
    "fisher": Method("fisher"),
    "mxmoe": Method("mxmoe", budget_per="layer"),
    "squared, per expert": Method("squared", granularity="expert"),
    "fisher, per expert": Method("fisher", granularity="expert"),
    "squared, per layer": Method("squared", budget_per="layer"),
    "fisher, per layer": Method("fisher", budget_per="layer"),
    "mxmoe, one budget": Method("mxmoe{scale=relative}"),
    "pmq": Method("pmq", granularity="expert", budget_per="layer"),
    "mopeq": Method("mopeq", granularity="expert"),
    "alphaq": Method("alphaq", tie_gate_up=False),
    "router-norm": Method("router-norm"),
    "frequency": Method("frequency"),
    "uniform": Method("uniform"),
}
"""Name -> method; `random` is drawn anew for every seed and stands beside them."""
FIRST = ("squared", "fisher", "mxmoe", "squared, per expert", "fisher, per expert", "random")
QUANTIZERS = ("rtn", "rtn+hadamard", "gptq", "gptq+hadamard", "hqq", "awq", "smoothquant")
"""hqq is a quantizer of its own; awq and smoothquant fold scales into the model and round to nearest."""
BESIDE = ("hqq", "awq", "smoothquant")
"""Studied with one scheme for all, and with the headline allocator."""
HEADLINE = "fisher"
"""The allocator that claims are made for: chosen for what it measures, before anything was measured."""
RANK_BITS = (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.75, 4.25)
RANK_BITS_WITH_ACTIVATIONS = (4.4, 5.0, 6.0, 7.0)


@dataclass(frozen=True)
class Job:
    """One plan to be measured."""

    model: str
    """study, or planted."""
    quantizer: str
    """A name in QUANTIZERS."""
    seed: int
    """Of the calibration data."""
    setting: str
    method: str
    """A name in METHODS, `random`, `random N at B bits`, or `all SCHEME`."""

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have one scheme, so that nothing is solved."""
        return self.method.startswith("all ")

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from others in a table."""
        return (self.model, self.quantizer, str(self.seed), self.setting, self.method)


def jobs(seeds: Sequence[int], settings: Sequence[str] = tuple(SETTINGS), methods: Sequence[str] = ()) -> list[Job]:
    """List all plans once, those that the claims rest on first."""
    known = [*methods] if methods else [*METHODS, "random"]
    listed = [job for job in (*_first(seeds), *_others(seeds)) if job.setting in settings]
    wanted = [job for job in listed if job.is_uniform or job.method in known or job.method.startswith("random ")]
    return list(dict.fromkeys(wanted))


def settings_of(quantizer: str) -> tuple[str, ...]:
    """List the settings that a quantizer is for: AWQ and HQQ have weights alone, SmoothQuant has activations."""
    only = {"awq": WEIGHT_ONLY_SETTINGS, "hqq": WEIGHT_ONLY_SETTINGS, "smoothquant": WITH_ACTIVATIONS}
    return only.get(quantizer, tuple(SETTINGS))


def _first(seeds: Sequence[int]) -> Iterator[Job]:
    """List what the claims rest on, and the quantizers beside, of one seed."""
    for seed in seeds:
        yield from _uniform("study", "gptq", seed, tuple(SETTINGS))
        for setting in ("2.25", "w5a5", "2.5", "3.25"):
            yield from (Job("study", "gptq", seed, setting, method) for method in FIRST)
        yield from _uniform("study", "gptq+hadamard", seed, WITH_ACTIVATIONS)
        for quantizer in ("gptq", "gptq+hadamard"):
            for setting in ("w5a5", "w5a5 and w4a8"):
                yield from (Job("study", quantizer, seed, setting, method) for method in ("squared", "fisher", "mxmoe"))
    for quantizer in ("rtn", "rtn+hadamard"):
        yield from _uniform("study", quantizer, seeds[0], tuple(SETTINGS) if quantizer == "rtn" else WITH_ACTIVATIONS)
    for number in range(3):
        yield from (_random(seeds[0], "2.5", number, bits) for bits in RANK_BITS)
    for number in range(3):
        yield from (_random(seeds[0], "w5a5", number, bits) for bits in RANK_BITS_WITH_ACTIVATIONS)
    for quantizer in ("rtn", "rtn+hadamard", "gptq", "gptq+hadamard", "smoothquant"):
        yield from _uniform("planted", quantizer, seeds[0], WITH_ACTIVATIONS)
    for quantizer in ("gptq", "gptq+hadamard"):
        yield from (Job("planted", quantizer, seeds[0], "w5a5", method) for method in ("squared", "fisher"))
        yield Job("planted", quantizer, seeds[0], "w5a5 and w4a8", "fisher")
    yield from _beside(seeds[0], is_first=True)


def _others(seeds: Sequence[int]) -> Iterator[Job]:
    """
    List the whole grid: gptq, then what seeds 0 have not shown of rtn and the rotation, then their other seeds.

    What rests on one observation is together, since a shelf and an observation take longer than the plans on them.
    """
    order = ("2.25", "w5a5", "2.5", "3.25", "4.25", "w5a5 and w4a8")
    blocks = [("gptq", seed) for seed in seeds]
    blocks += [(quantizer, seed) for seed in seeds for quantizer in ("rtn", "gptq+hadamard")]
    for quantizer, seed in blocks:
        for setting in order:
            yield from (Job("study", quantizer, seed, setting, method) for method in (*METHODS, "random"))
        if quantizer != "rtn":  # whose codes no data changes
            yield from _uniform("study", quantizer, seed, tuple(SETTINGS))
    for seed in seeds[1:]:
        yield from _beside(seed, is_first=False)


def _beside(seed: int, *, is_first: bool) -> Iterator[Job]:
    for quantizer in BESIDE:
        names = settings_of(quantizer)
        if quantizer != "hqq" or is_first:  # no data changes its codes
            yield from _uniform("study", quantizer, seed, names)
        yield from (Job("study", quantizer, seed, name, HEADLINE) for name in names if name in MIXED)


def _uniform(model: str, quantizer: str, seed: int, settings: Sequence[str]) -> Iterator[Job]:
    for setting in settings:
        yield from (Job(model, quantizer, seed, setting, f"all {scheme}") for scheme in SETTINGS[setting].uniform)


def _random(seed: int, setting: str, number: int, bits: float) -> Job:
    return Job("study", "gptq", seed, setting, f"random {number} at {bits:g} bits")


def schemes_for(model: str, settings: Sequence[str], quantizer: str = "rtn") -> tuple[Scheme, ...]:
    """List the schemes that the plans on a model can choose from."""
    able = set(settings_of(quantizer)) & set(tuple(SETTINGS) if model == "study" else WITH_ACTIVATIONS)
    wanted = [name for name in settings if name in able]
    found = dict.fromkeys(s for name in wanted for s in (*SETTINGS[name].candidates, *SETTINGS[name].uniform))
    return tuple(Scheme.parse(scheme) for scheme in found)


@dataclass(eq=False)
class Allocator:
    """Solves plans from one observation."""

    layout: Layout
    stats: Stats
    """Of the layout's model, rotated or not."""
    seconds: float = 0.0
    """Spent in the latest solution."""
    _tables: dict[tuple[str, tuple[Scheme, ...]], Floats] = field(
        default_factory=dict[tuple[str, tuple[Scheme, ...]], Floats]
    )

    def losses(self, sensitivity: str, schemes: Sequence[Scheme]) -> Floats:
        """Give the table of a sensitivity, [rows, schemes]."""
        key = (sensitivity, tuple(schemes))
        if key not in self._tables:
            seen = [
                SeenBank(
                    block=moe.block,
                    name=bank.name,
                    sizes={role: (op.n, op.k) for role, op in bank.linears.items()},
                    schemes=tuple(schemes),
                    stats=self.stats,
                    sums=self.stats.bank(moe.block, bank.name),
                )
                for moe in moe_ops(self.layout.lifted.module)
                for bank in banks(moe).values()
            ]
            found = parse_sensitivity(sensitivity).losses(seen)
            parts = [losses[role] for bank, losses in zip(seen, found, strict=True) for role in bank.roles]
            self._tables[key] = np.concatenate(parts)
        return self._tables[key]

    def predicted(self, sensitivity: str, choice: Sequence[Scheme]) -> float:
        """Sum the losses of what a plan chooses."""
        table = self.losses(sensitivity, self.stats.schemes)
        columns = np.array([self.stats.schemes.index(scheme) for scheme in choice])
        return float(table[np.arange(len(columns)), columns].sum())

    def plan(self, job: Job) -> list[Scheme]:
        """Give the scheme of every row of the layout."""
        setting = SETTINGS[job.setting]
        if job.is_uniform:
            return [Scheme.parse(job.method.removeprefix("all "))] * len(self.layout.rows)
        candidates = tuple(Scheme.parse(scheme) for scheme in setting.candidates)
        bits, method = setting.bits, METHODS.get(job.method)
        if method is None:
            words = job.method.split()
            number = job.seed if len(words) == 1 else 100 + int(words[1])
            bits = bits if len(words) == 1 else float(words[3])
            method = Method(f"random{{seed={number}}}")
        solution = self._solve(method, candidates, bits)
        return [candidates[index] for index in solution.choice.tolist()]

    def _solve(self, method: Method, candidates: tuple[Scheme, ...], bits: float | None) -> Solution:
        began = time.perf_counter()
        rows = self.layout.rows
        problem = Problem(
            self.losses(method.sensitivity, candidates),
            self.layout.bits(candidates),
            numel=self.layout.sizes.astype(np.float64),
            groups=tie(rows, method.granularity, gate_up=method.tie_gate_up),
        )
        if method.budget_per == "model":
            solution = solve(problem, bits)
        else:
            _, parts = np.unique([row.block for row in rows], return_inverse=True)
            solution = solve_parts(problem, parts, bits)
        self.seconds = time.perf_counter() - began
        return solution
