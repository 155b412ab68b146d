"""`mxmoe.compile`: lift, observe, run the pipeline, compile, put the result in the block's place."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import nn

from mxmoe import settings
from mxmoe.calib import HessiansByBlock, Stats, observe, observe_weights, rereadable
from mxmoe.carried import carry as carry_kernels
from mxmoe.checkpoint import Origin
from mxmoe.compiled import Compilation, copy_modules, install, is_compiled, is_model, lifted_in, make_backend
from mxmoe.cost import block_launches, predict_block_us
from mxmoe.errors import BadArgument, CompiledAlready, InfeasibleBudget, MissingHessians, MissingInput
from mxmoe.frontend import Lifted, lift
from mxmoe.ir import ModuleOp, Plan, Scheme, apply_plan, banks, kept_experts, moe_ops, parse_ir, plan_of, rotations
from mxmoe.passes import (
    AllocateBits,
    AnnotateSensitivity,
    ApplyPlan,
    ChooseTiles,
    Environment,
    KeepStages,
    Observer,
    Pass,
    RotateDown,
    TimePasses,
    VerifyEach,
    find_cost_model,
    parse_passes,
    run_passes,
)
from mxmoe.quant import QUANTIZERS, Quantizer, Weights, needs_hessian, spell_quantizer
from mxmoe.report.compiled import CompileReport, PlanSummary
from mxmoe.target import Backend, Executable, Target, find_target
from mxmoe.tokens import USUAL, Tokens, token_counts, token_mix

if TYPE_CHECKING:
    from mxmoe.calib import Inputs

_UNFINISHED = "it does not lower the blocks; end it with allocate-bits,lower-to-group-gemm,choose-tiles"


def compile(
    block: nn.Module,
    target: str = "numba",
    *,
    inputs: Inputs | Stats | None = None,
    schemes: str | Scheme | Iterable[str | Scheme] | None = None,
    weight_bits: float | None = 5.0,
    latency_us: float | None = None,
    r: float = 0.75,
    sensitivity: str = "squared",
    tokens: Tokens | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    quantizer: str | Quantizer = "rtn",
    rotate_down: int | None = None,
    pipeline: str = "default",
    observers: Sequence[Observer] = (),
    carry: int | Sequence[int] | None = None,
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
        schemes: schemes to choose from; one means uniform; None takes the target's own. With `w0` among them whole
            experts may be dropped, see docs/sensitivities.md.
        weight_bits: budget on average effective bits per weight, None for no limit. One scheme needs no budget.
        latency_us: budget on the summed cost of all chosen schemes, in microseconds on the target's device.
        r: what is minimised is loss^r * time^(1-r).
        sensitivity: what a scheme costs in accuracy: a name in `SENSITIVITIES`, also with options, `pmq{gamma=1}`.
        tokens: tokens per call that costs are taken for; 512 if not given.
        plan: a plan, or the path of one, to apply in place of solving.
        quantizer: how weights are quantized: a name in `QUANTIZERS`, also with options, `gptq{damping=0.05}`, or such a
            function. One that needs Hessians has them collected from `inputs`, for the final weights; sensitivities
            are those of what it does without.
        rotate_down: channels that are rotated together on their way to down, see `RotateDown`; None rotates nothing.
        pipeline: name of a pipeline, or passes as `pass{option=value},...`; what it spells out wins over arguments.
        observers: called before and after every pass.
        carry: tokens per call whose kernels are compiled ahead and carried along, `compiled.kernels`; None takes those
            of `tokens` for triton-sm89 without a GPU, and else none; `()` takes none.
        quiet: no progress bars.

    Returns:
        For a block a `CompiledMoE` with the block's forward signature and `.plan`, `.ir(stage)`, `.report()`,
        `.save(folder)`; for a model the model, with the same four attributes.

    Raises:
        UnknownName, BadScheme, BadArgument, BadPipeline, BadOption, BadPlan: an argument that cannot be.
        NoKernels: the target cannot run here.
        CompiledAlready: the experts of `block` are compiled.
        NoMoeBlock and others of `lift`; EmptyCalibration and others of `observe`; InfeasibleBudget, PlanMismatch.
        All of them before weights are quantized.
    """
    goal, wanted = find_target(target), _read_plan(plan)
    backend = make_backend(goal)
    candidates = _candidates(schemes, wanted, goal, backend)
    steps = _steps(pipeline, wanted, _options(candidates, weight_bits, latency_us, r, sensitivity, tokens), rotate_down)
    watching, ahead = (*settings.observers(), *observers, VerifyEach()), token_counts(carry)
    _refuse_without_data(quantizer, inputs)
    if isinstance(block, nn.Module) and is_compiled(block):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CompiledAlready(cls=type(block).__name__)
    lifted = lift(block, candidates=candidates)
    kept, clock = KeepStages(), TimePasses()
    n_rotations = sum(isinstance(step, RotateDown) for step in steps)
    if n_rotations:  # what is observed is the rotated module
        run_passes(lifted.module, steps[:n_rotations], Environment(None, goal, wanted), (kept, clock, *watching))
    _refuse_hopeless(lifted.module, steps, wanted)
    inputs = rereadable(inputs) if needs_hessian(quantizer) else inputs  # Hessians take a second look
    stats = _statistics(lifted, inputs, candidates, quantizer, steps, has_plan=wanted is not None, quiet=quiet)
    run_passes(lifted.module, steps[n_rotations:], Environment(stats, goal, wanted), (kept, clock, *watching))
    if not {"allocated", "lowered"} <= kept.texts.keys():
        raise BadArgument(name="pipeline", value=pipeline, reason=_UNFINISHED)
    allocated = parse_ir(kept.texts["allocated"])
    executables = backend.compile(lifted.module, _weights(lifted, allocated, inputs, quantizer, quiet=quiet))
    named = spell_quantizer(quantizer)
    carried = carry_kernels(backend, goal, lifted.module, ahead, sorted(token_mix(tokens)), quiet=quiet)
    report = _report(lifted, allocated, stats, goal, executables, named, steps, clock.seconds, str(carried))
    made = Compilation(goal, plan_of(allocated), kept.texts, executables, report, Origin.of(block), carried)
    return install(lifted if is_model(lifted) else lifted_in(lifted, copy_modules(block)), made)


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
    budget_per: str = "model",
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
        budget_per: model for one budget over all blocks, layer for one in each.

    Raises:
        BadText: text that is no module.
        BadArgument: an r or a budget that cannot be.
        MissingInput, WrongStage: the module is not annotated.
        InfeasibleBudget: with the smallest feasible budget.
    """
    _check_goal(r, weight_bits=weight_bits, max_bytes=max_bytes, latency_us=latency_us)
    annotated = parse_ir(module) if isinstance(module, str) else module
    step = AllocateBits(weight_bits, max_bytes, latency_us, r, solver, granularity, tie_gate_up, budget_per)
    return step.solve(annotated)


def _read_plan(plan: Plan | str | os.PathLike[str] | None) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may not check
        raise BadArgument(name="plan", value=plan, reason="give a Plan, or the path of one")
    try:
        return Plan.load(plan)
    except OSError as error:
        raise BadArgument(name="plan", value=str(plan), reason=f"it cannot be read ({error.strerror})") from error


def _candidates(
    schemes: str | Scheme | Iterable[str | Scheme] | None, plan: Plan | None, target: Target, backend: Backend
) -> tuple[Scheme, ...]:
    """Parse the schemes to choose from: the caller's, those of the plan, or the target's own."""
    given: list[str | Scheme]
    if schemes is not None:
        given = [schemes] if isinstance(schemes, str | Scheme) else list(_each(schemes))
    else:
        given = list(target.candidates) if plan is None else sorted(set(plan.rows.values()))
    parsed = tuple(dict.fromkeys(Scheme.parse(str(one)) for one in given))
    if not parsed:
        raise BadArgument(name="schemes", value=given, reason="name at least one, or leave it out")
    if all(scheme.is_dropped for scheme in parsed):
        raise BadArgument(name="schemes", value="w0", reason="it drops experts; name a scheme for those that stay")
    for scheme in (scheme for scheme in parsed if not scheme.is_dropped):
        if not backend.supports(scheme):
            able = ", ".join(text for text in target.candidates if backend.supports(Scheme.parse(text)))
            raise BadArgument(name="schemes", value=str(scheme), reason=f"{target.name} cannot run it; it runs {able}")
    return parsed


def _each(schemes: Iterable[str | Scheme]) -> Iterable[str | Scheme]:
    if not isinstance(schemes, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may not check
        raise BadArgument(name="schemes", value=schemes, reason="name one scheme or several, e.g. 'w4a16_g128_asym'")
    return schemes


def _steps(
    pipeline: str, plan: Plan | None, options: Mapping[str, Mapping[str, Any]], rotate_down: int | None
) -> tuple[Pass, ...]:
    """Read the pipeline; a plan takes the place of solving, and a rotation comes before all."""
    if not isinstance(pipeline, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may not check
        raise BadArgument(name="pipeline", value=pipeline, reason="give the name of one, or passes as a string")
    steps = parse_passes("plan" if plan is not None and pipeline == "default" else pipeline, options)
    applies = any(isinstance(step, ApplyPlan) for step in steps)
    if plan is not None and not applies and any(isinstance(step, AllocateBits) for step in steps):
        reason = (
            "it solves with allocate-bits although a plan was given; put apply-plan in its place, or leave plan out"
        )
        raise BadArgument(name="pipeline", value=pipeline, reason=reason)
    if any(isinstance(after, RotateDown) > isinstance(before, RotateDown) for before, after in pairwise(steps)):
        reason = "rotate-down comes first, since what is observed is the rotated module"
        raise BadArgument(name="pipeline", value=pipeline, reason=reason)
    if rotate_down is None:
        return steps
    if type(rotate_down) is not int or rotate_down < 2:
        reason = "it is a number of channels, at least 2, or None"
        raise BadArgument(name="rotate_down", value=rotate_down, reason=reason)
    return (RotateDown(rotate_down), *steps)


def _refuse_hopeless(module: ModuleOp, steps: Sequence[Pass], plan: Plan | None) -> None:
    """Raise, before anything is observed, PlanMismatch or InfeasibleBudget if sizes alone say so."""
    if plan is not None:
        apply_plan(module.clone(), plan)
    weights = bits = 0.0
    for moe in moe_ops(module):
        for op in (op for bank in banks(moe).values() for op in bank.linears.values()):
            count = op.experts * op.n * op.k
            weights, bits = weights + count, bits + count * min(s.effective_bits(op.k) for s in moe.candidates)
    for step in (step for step in steps if isinstance(step, AllocateBits)):
        for limit, value, least in (
            ("weight_bits", step.weight_bits, bits / weights),
            ("bytes", step.max_bytes, bits / 8),
        ):
            if value is not None and least > value * (1 + 1e-12):
                raise InfeasibleBudget(limit=limit, value=value, smallest=least)


def _options(
    candidates: Sequence[Scheme],
    weight_bits: float | None,
    latency_us: float | None,
    r: float,
    sensitivity: str,
    tokens: Tokens | None,
) -> dict[str, dict[str, Any]]:
    """Check the numbers and hand each pass its own."""
    _check_goal(r, weight_bits=weight_bits, latency_us=latency_us)
    mix = token_mix(tokens)
    uniform = len(candidates) == 1
    return {
        "annotate-sensitivity": {"method": sensitivity},
        "annotate-cost": {"tokens": tuple(mix), "token_weights": tuple(float(w) for w in mix.values())},
        "allocate-bits": {
            "weight_bits": None if uniform or weight_bits is None else float(weight_bits),
            "latency_us": None if latency_us is None else float(latency_us),
            "r": float(r),
        },
        "choose-tiles": {"tokens": max(mix)},
    }


def _check_goal(r: float, **budgets: float | None) -> None:
    """Raise BadArgument unless r lies within 0 to 1 and every budget is a positive number or None."""
    if not _is_number(r) or not 0 <= r <= 1:
        raise BadArgument(name="r", value=r, reason="it weighs loss against time, from 0 to 1")
    for name, value in budgets.items():
        if value is not None and not (_is_number(value) and math.isfinite(value) and value > 0):
            raise BadArgument(name=name, value=value, reason="a budget is a positive number, or None")


def _is_number(value: object) -> bool:
    return isinstance(value, Real)


def _refuse_without_data(quantizer: str | Quantizer, inputs: Inputs | Stats | None) -> None:
    """Raise if there is no such quantizer, or if it needs Hessians and nothing to collect them from is given."""
    if needs_hessian(quantizer) and (inputs is None or isinstance(inputs, Stats)):
        free = ", ".join(name for name in sorted(QUANTIZERS) if not needs_hessian(name))
        raise MissingHessians(quantizer=spell_quantizer(quantizer), free=free)


def _weights(
    lifted: Lifted,
    allocated: ModuleOp,
    inputs: Inputs | Stats | None,
    quantizer: str | Quantizer,
    *,
    quiet: bool,
) -> Weights:
    """Give the weights as they are to be quantized, where Hessians are needed a bank at a time."""
    turned, weights, kept = rotations(lifted.module), lifted.weights, kept_experts(allocated)
    if not needs_hessian(quantizer) or inputs is None or isinstance(inputs, Stats):
        return weights.using(quantizer).rotated(turned).keeping(kept)
    schemes = {
        op.weight: [s for s in (moe.candidates[i] for i in op.choice.array.tolist()) if not s.is_dropped]
        for moe in moe_ops(allocated)
        for bank in banks(moe).values()
        for op in bank.linears.values()
        if op.choice is not None
    }
    hessians = HessiansByBlock(lifted, inputs, quiet=quiet)
    return weights.using(quantizer, hessians).rotated(turned).keeping(kept).planned(schemes)


def _statistics(
    lifted: Lifted,
    inputs: Inputs | Stats | None,
    candidates: Sequence[Scheme],
    quantizer: str | Quantizer,
    steps: Sequence[Pass],
    *,
    has_plan: bool,
    quiet: bool,
) -> Stats | None:
    """Observe what the passes need; with a plan there is nothing to weigh, and data serve only to say how to route."""
    if isinstance(inputs, Stats):
        return inputs
    candidates = [scheme for scheme in candidates if not scheme.is_dropped]
    methods = [step.sensitivity for step in steps if isinstance(step, AnnotateSensitivity)]
    facts = tuple(dict.fromkeys(fact for method in methods for fact in method.needs_facts))
    gradients = any(method.needs_gradients for method in methods)
    if inputs is None and gradients:
        way = "pass token ids as inputs, or take another sensitivity"
        raise MissingInput(name="annotate-sensitivity", what="data to differentiate a loss on", way=way)
    if inputs is None:
        return None if has_plan else observe_weights(lifted, candidates, facts=facts, quantizer=quantizer, quiet=quiet)
    return observe(
        lifted, inputs, schemes=candidates, gradients=gradients, facts=facts, quantizer=quantizer, quiet=quiet
    )


def _report(
    lifted: Lifted,
    allocated: ModuleOp,
    stats: Stats | None,
    target: Target,
    executables: Mapping[str, Executable],
    quantizer: str,
    steps: Sequence[Pass],
    seconds: Mapping[str, float],
    runs: str,
) -> CompileReport:
    """Collect what a user asks first."""
    model, found = find_cost_model("auto", target.device), lifted.report()
    tokens = next((step.tokens for step in steps if isinstance(step, ChooseTiles)), USUAL)
    return CompileReport(
        target=target.name,
        device=target.device,
        quantizer=quantizer,
        bytes_found=found.bytes_found,
        bytes_quantized=_bytes_quantized(allocated, lifted),
        found=str(found),
        plan=PlanSummary.of(allocated),
        held_bytes=sum(executable.nbytes for executable in executables.values()),
        tokens=tokens,
        predicted_us={moe.block: predict_block_us(model, block_launches(moe, tokens)) for moe in moe_ops(allocated)},
        calibration="a plan was given, nothing was observed" if stats is None else stats.report(),
        seconds=dict(seconds),
        runs=runs,
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
