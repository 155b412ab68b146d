"""The compiler as a list: the tables of passes and pipelines, their string form, and the driver."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from xdsl.utils.arg_spec import ArgSpec, parse_pipeline
from xdsl.utils.exceptions import ArgSpecParseError, VerifyException

from mxmoe.errors import BadOption, BadPipeline, PassFailed
from mxmoe.ir import ModuleOp
from mxmoe.passes.base import Environment, Pass
from mxmoe.registry import Registry, near_names

PASSES = Registry(
    kind="pass",
    group="mxmoe.passes",
    table={
        "annotate-routing": "mxmoe.passes.annotate_routing:AnnotateRouting",
        "annotate-sensitivity": "mxmoe.passes.annotate_sensitivity:AnnotateSensitivity",
        "annotate-cost": "mxmoe.passes.annotate_cost:AnnotateCost",
        "allocate-bits": "mxmoe.passes.allocate_bits:AllocateBits",
        "apply-plan": "mxmoe.passes.apply_plan:ApplyPlan",
        "lower-to-group-gemm": "mxmoe.passes.lower_to_group_gemm:LowerToGroupGemm",
        "choose-tiles": "mxmoe.passes.choose_tiles:ChooseTiles",
    },
)

PIPELINES: Mapping[str, tuple[str, ...]] = {
    "default": (
        "annotate-routing",  # costs are per expert, and an expert's rows come from its frequency
        "annotate-sensitivity",  # what each choice loses
        "annotate-cost",  # what each choice takes
        "allocate-bits",  # weighs the two; needs both
        "lower-to-group-gemm",  # fuses gate and up, now that their choices are known
        "choose-tiles",  # a tile depends on the scheme chosen and on the rows expected
    ),
    "plan": (
        "annotate-routing",  # choose-tiles wants the rows expected
        "apply-plan",  # the decision was made before
        "lower-to-group-gemm",
        "choose-tiles",
    ),
}


class Observer(Protocol):
    """Sees every pass go by: printing, timing and verifying are observers, the driver knows none of them."""

    def before(self, step: Pass, module: ModuleOp) -> None:
        """Called before a pass runs."""
        ...

    def after(self, step: Pass, module: ModuleOp) -> None:
        """Called after a pass ran."""
        ...


def parse_passes(text: str) -> tuple[Pass, ...]:
    """
    Read passes from the name of a pipeline or from `pass{option=value},...`; the inverse of `spell_passes`.

    Raises:
        BadPipeline: the text does not parse.
        UnknownName: a pass that is not registered.
        BadOption: an option that the pass does not have, or of another type.
    """
    try:
        specs = tuple(parse_pipeline(",".join(PIPELINES.get(text, (text,)))))
    except ArgSpecParseError as error:
        raise BadPipeline(text=text, reason=str(error).strip().splitlines()[-1]) from error
    return tuple(_build(spec) for spec in specs)


def spell_passes(passes: Sequence[Pass]) -> str:
    """Write passes as a pipeline string."""
    return ",".join(str(step.spec()) for step in passes)


def with_options(passes: Sequence[Pass], options: Mapping[str, Mapping[str, Any]]) -> tuple[Pass, ...]:
    """Replace options of the passes named, where a pass still has its default there: what a pipeline spells wins."""

    def configured(step: Pass) -> Pass:
        defaults = {field.name: field.default for field in dataclasses.fields(step)}
        given = options.get(step.name, {})
        return dataclasses.replace(step, **{k: v for k, v in given.items() if getattr(step, k) == defaults[k]})

    return tuple(configured(step) for step in passes)


def run_passes(
    module: ModuleOp, passes: Sequence[Pass], environment: Environment, observers: Sequence[Observer] = ()
) -> ModuleOp:
    """
    Run passes over a module, in place, and verify it after each.

    Raises:
        PassFailed: the module does not verify after a pass.
    """
    for step in passes:
        for observer in observers:
            observer.before(step, module)
        step.run(module, environment)
        try:
            module.verify()
        except VerifyException as error:
            raise PassFailed(name=step.name, reason=error) from error
        for observer in observers:
            observer.after(step, module)
    return module


def _build(spec: ArgSpec) -> Pass:
    """Make a pass from its parsed spec, with near names for an option that it lacks."""
    kind: type[Pass] = PASSES[spec.name]
    hints = typing.get_type_hints(kind)
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for option, given in spec.parameters.items():
        if option.replace("_", "-") not in fields:
            raise BadOption(name=spec.name, option=repr(option), reason=near_names(option.replace("_", "-"), fields))
        floats = "float" in str(hints[option.replace("-", "_")])
        values[option] = tuple(float(v) if floats and type(v) is int else v for v in given)
    try:
        return kind.from_spec(ArgSpec(spec.name, values))
    except ValueError as error:
        raise BadOption(name=spec.name, option=str(spec), reason=error) from error
