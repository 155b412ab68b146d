"""`mxmoe.compile`: lift, observe, run the pipeline, compile, put the result in the block's place."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from mxmoe import settings
from mxmoe.calib import Stats, observe, observe_weights
from mxmoe.compiled import Compilation, install, is_model, make_backend
from mxmoe.cost import block_launches, predict_block_us
from mxmoe.errors import BadArgument, CompiledAlready
from mxmoe.frontend import Lifted, lift
from mxmoe.ir import ModuleOp, Plan, Scheme, banks, moe_ops, parse_ir, plan_of
from mxmoe.passes import (
    AllocateBits,
    Environment,
    KeepStages,
    Observer,
    TimePasses,
    VerifyEach,
    find_cost_model,
    parse_passes,
    run_passes,
)
from mxmoe.quant import QUANTIZERS
from mxmoe.report.compiled import CompileReport, PlanSummary
from mxmoe.target import Backend, Executable, Target, find_target

if TYPE_CHECKING:
    from mxmoe.calib import Inputs

Tokens = int | Sequence[int] | Mapping[int, float]
"""Tokens per call: one count, several alike, or count -> weight."""

_PREDICTED_TOKENS = 512


def compile(
    block: nn.Module,
    target: str = "numba",
    *,
    inputs: Inputs | Stats | None = None,
    schemes: str | Scheme | Iterable[str | Scheme] | None = None,
    weight_bits: float | None = 5.0,
    latency_us: float | None = None,
    r: float = 0.75,
    tokens: Tokens | None = None,
    plan: Plan | str | None = None,
    quantizer: str = "rtn",
    pipeline: str = "default",
    observers: Sequence[Observer] = (),
    quiet: bool = False,
) -> nn.Module:
    """
    Choose a scheme for every expert linear of a block or model and return it with compiled experts.

    Args:
        block: an MoE block, its experts module, or a whole model. A block is left as it was, and what is returned
            shares its router; in a model the MoE blocks are replaced in place, and the model is returned.
        target: where it runs: eager, numba, triton-sm89, triton-sm90.
        inputs: calibration data: hidden states [tokens, hidden] or an iterable of them for a block, token ids
            [sequences, tokens] for a model, or the `Stats` of an earlier `observe`. Without data sensitivity comes
            from the weights alone and routing is taken as uniform; the report says so.
        schemes: schemes to choose from; one means uniform; None takes the target's own.
        weight_bits: budget on average effective bits per weight, None for no limit. One scheme needs no budget.
        latency_us: budget on the summed cost of all chosen schemes, in microseconds on the target's device.
        r: what is minimised is loss^r * time^(1-r).
        tokens: tokens per call that costs are taken for; 512 if not given.
        plan: a plan, or the path of one, to apply in place of solving.
        quantizer: how weights are quantized, a name in `QUANTIZERS`.
        pipeline: name of a pipeline, or passes as `pass{option=value},...`; what it spells out wins over arguments.
        observers: called before and after every pass.
        quiet: no progress bars.

    Returns:
        For a block a `CompiledMoE` with the block's forward signature and `.plan`, `.ir(stage)`, `.report()`,
        `.save(folder)`; for a model the model, with the same four attributes.

    Raises:
        UnknownName: target, scheme, quantizer, pass or solver.
        BadArgument: an argument that cannot be, e.g. r outside 0 to 1.
        NoMoeBlock and others of `lift`, EmptyCalibration and others of `observe`, InfeasibleBudget of the solver,
        PlanMismatch of the plan; all before weights are quantized.
    """
    goal = find_target(target)
    backend = make_backend(goal)
    candidates = _candidates(schemes, plan, goal, backend)
    options = _options(candidates, weight_bits, latency_us, r, tokens)
    steps = parse_passes("plan" if plan is not None and pipeline == "default" else pipeline, options)
    watching = (*settings.observers(), *observers, VerifyEach())
    if quantizer not in QUANTIZERS:
        QUANTIZERS[quantizer]  # raises, with the near names
    _refuse_compiled(block)
    lifted = _lift_copy(block, candidates)
    stats = None if plan is not None else _statistics(lifted, inputs, candidates, quantizer, quiet)
    wanted = Plan.load(plan) if isinstance(plan, str) else plan
    kept, clock = KeepStages(), TimePasses()
    run_passes(lifted.module, steps, Environment(stats, goal, wanted), (kept, clock, *watching))
    executables = backend.compile(lifted.module, lifted.weights.using(quantizer))
    report = _report(lifted, kept.texts["allocated"], stats, goal, executables, quantizer, clock.seconds)
    made = Compilation(goal, plan_of(parse_ir(kept.texts["allocated"])), kept.texts, executables, report)
    return install(lifted, made)


def solve(
    module: ModuleOp | str,
    *,
    weight_bits: float | None = 5.0,
    max_bytes: float | None = None,
    latency_us: float | None = None,
    r: float = 0.75,
    solver: str = "lagrangian",
    granularity: str = "linear",
    tie_gate_up: bool = True,
) -> Plan:
    """
    Solve an annotated module for another budget; neither the model nor data is needed.

        plan = mxmoe.solve(compiled.ir("annotated"), weight_bits=3.25)

    Args:
        module: an annotated module or its whole text.
        weight_bits: as in `compile`.
        max_bytes: budget on bytes of codes, scales and zero points.
        latency_us: as in `compile`.
        r: as in `compile`.
        solver: name of a solver.
        granularity: what shares one choice, see `AllocateBits`.
        tie_gate_up: gate and up of an expert take the same scheme.

    Raises:
        BadText: text that is no module.
        MissingInput: the module is not annotated.
        InfeasibleBudget: with the smallest feasible budget.
    """
    annotated = parse_ir(module) if isinstance(module, str) else module
    step = AllocateBits(weight_bits, max_bytes, latency_us, r, solver, granularity, tie_gate_up)
    return step.solve(annotated)


def _candidates(
    schemes: str | Scheme | Iterable[str | Scheme] | None, plan: Plan | str | None, target: Target, backend: Backend
) -> tuple[Scheme, ...]:
    """Parse the schemes to choose from: the caller's, those of the plan, or the target's own."""
    if schemes is None and plan is not None:
        found = Plan.load(plan) if isinstance(plan, str) else plan
        return tuple(sorted(set(found.rows.values())))
    given = [schemes] if isinstance(schemes, str | Scheme) else list(target.candidates if schemes is None else schemes)
    parsed = tuple(dict.fromkeys(one if isinstance(one, Scheme) else Scheme.parse(one) for one in given))
    if not parsed:
        raise BadArgument(name="schemes", value=given, reason="name at least one, or leave it out")
    for scheme in parsed:
        if not backend.supports(scheme):
            able = ", ".join(text for text in target.candidates if backend.supports(Scheme.parse(text)))
            raise BadArgument(name="schemes", value=str(scheme), reason=f"{target.name} cannot run it; it runs {able}")
    return parsed


def _options(
    candidates: Sequence[Scheme],
    weight_bits: float | None,
    latency_us: float | None,
    r: float,
    tokens: Tokens | None,
) -> dict[str, dict[str, Any]]:
    """Check the numbers and hand each pass its own."""
    if not 0 <= r <= 1:
        raise BadArgument(name="r", value=r, reason="it weighs loss against time, from 0 to 1")
    for name, value in (("weight_bits", weight_bits), ("latency_us", latency_us)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadArgument(name=name, value=value, reason="a budget is a positive number, or None")
    mix = dict.fromkeys(tokens, 1.0) if isinstance(tokens, Sequence) else tokens
    mix = {512 if mix is None else mix: 1.0} if not isinstance(mix, Mapping) else mix
    if not mix or any(count < 1 or weight < 0 for count, weight in mix.items()):
        raise BadArgument(name="tokens", value=tokens, reason="counts are at least 1 and weights not negative")
    uniform = len(candidates) == 1
    return {
        "annotate-cost": {"tokens": tuple(mix), "token_weights": tuple(float(w) for w in mix.values())},
        "allocate-bits": {
            "weight_bits": None if uniform or weight_bits is None else float(weight_bits),
            "latency_us": None if latency_us is None else float(latency_us),
            "r": float(r),
        },
        "choose-tiles": {"tokens": max(mix)},
    }


def _refuse_compiled(block: nn.Module) -> None:
    parts = block.modules() if isinstance(block, nn.Module) else ()  # pyright: ignore[reportUnnecessaryIsInstance]
    if any(hasattr(part, "compilation") for part in parts):
        raise CompiledAlready(cls=type(block).__name__)


def _lift_copy(block: nn.Module, candidates: Sequence[Scheme]) -> Lifted:
    """Lift; a block is copied without its tensors first, since its experts are replaced and the caller keeps his."""
    lifted = lift(block, candidates=candidates)
    return lifted if is_model(lifted) else lift(copy_modules(block), candidates=candidates)


def copy_modules(module: nn.Module) -> nn.Module:
    """Copy a tree of modules that shares every parameter and buffer with the original."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _statistics(
    lifted: Lifted, inputs: Inputs | Stats | None, candidates: Sequence[Scheme], quantizer: str, quiet: bool
) -> Stats:
    if isinstance(inputs, Stats):
        return inputs
    if inputs is None:
        return observe_weights(lifted, candidates, quantizer=quantizer, quiet=quiet)
    return observe(lifted, inputs, schemes=candidates, quantizer=quantizer, quiet=quiet)


def _report(
    lifted: Lifted,
    allocated: str,
    stats: Stats | None,
    target: Target,
    executables: Mapping[str, Executable],
    quantizer: str,
    seconds: Mapping[str, float],
) -> CompileReport:
    """Collect what a user asks first."""
    module, model = parse_ir(allocated), find_cost_model("auto", target.device)
    found = lifted.report()
    return CompileReport(
        target=target.name,
        device=target.device,
        quantizer=quantizer,
        bytes_found=found.bytes_found,
        bytes_quantized=_bytes_quantized(module, lifted),
        found=str(found),
        plan=PlanSummary.of(module),
        held_bytes=sum(executable.nbytes for executable in executables.values()),
        tokens=_PREDICTED_TOKENS,
        predicted_us={
            moe.block: predict_block_us(model, block_launches(moe, _PREDICTED_TOKENS)) for moe in moe_ops(module)
        },
        calibration="a plan was given, nothing was observed" if stats is None else stats.report(),
        seconds=dict(seconds),
    )


def _bytes_quantized(module: ModuleOp, lifted: Lifted) -> int:
    """Bytes, in their own element type, of the weights whose row is not a 16-bit scheme."""
    total = 0
    for moe in moe_ops(module):
        for op in (op for bank in banks(moe).values() for op in bank.linears.values()):
            assert op.choice is not None, f"{moe.block} is allocated"
            rows = sum(not moe.candidates[index].is_float for index in op.choice.array.tolist())
            total += rows * op.n * op.k * lifted.weights[op.weight].element_size()
    return total
