"""The check of a pass: it verifies, its text parses back, and it changes no number that it has no business with."""

from __future__ import annotations

from hypothesis import given, settings

from mxmoe.backends.eager import EagerBackend
from mxmoe.errors import MxmoeError, PassDisagrees
from mxmoe.ir import ModuleOp, Stage, banks, moe_ops, parse_ir, print_ir
from mxmoe.passes import Environment, Pass, VerifyEach, run_passes
from mxmoe.testing.agree import relative_error, schemes_of
from mxmoe.testing.strategies import Case, cases


def check_pass(step: Pass, stage: Stage, environment: Environment | None = None, *, examples: int = 30) -> None:
    """
    Draw modules of a stage and hold the pass to what `check_pass_on` says of each.

    Args:
        step: the pass with its options.
        stage: of the modules that it takes.
        environment: what it reads besides.
        examples: how many modules to draw.

    Raises:
        what `check_pass_on` raises, for the smallest module found; and what the pass itself does.
    """

    @given(cases(stage))
    @settings(max_examples=examples, deadline=None)
    def holds(case: Case) -> None:
        check_pass_on(step, case, environment)

    holds()


def check_pass_on(step: Pass, case: Case, environment: Environment | None = None) -> ModuleOp:
    """
    Run a pass over a copy of a case's module and check what holds for every pass; returns the copy.

    The result verifies; its whole text parses back to the same text; and as long as the pass leaves choices and
    rotations as they are, the eager backend computes bit for bit what it did. A pass that chooses or rotates is held to
    the first two only.

    Raises:
        PassFailed: the module does not verify afterwards.
        PassDisagrees: the text does not parse back, or the block does not run or computes something else.
    """
    text = print_ir(case.module, elide=None)
    module = run_passes(parse_ir(text), (step,), environment or Environment(), (VerifyEach(),))
    after = print_ir(module, elide=None)
    if print_ir(parse_ir(after), elide=None) != after:
        raise PassDisagrees(name=step, what="leaves a module whose text parses back to another one")
    if _choices(case.module) == _choices(module):
        _compare(step, case, module)
    return module


def _choices(module: ModuleOp) -> dict[tuple[str, str], object]:
    return {
        (moe.block, name): (schemes_of(moe, bank), bank.act.hadamard)
        for moe in moe_ops(module)
        for name, bank in banks(moe).items()
    }


def _compare(step: Pass, case: Case, module: ModuleOp) -> None:
    before = EagerBackend().compile(case.module, case.weights)
    try:
        after = EagerBackend().compile(module, case.weights)
    except MxmoeError as error:
        raise PassDisagrees(name=step, what=f"leaves a module that no longer runs: {error}") from error
    for block, bank in _choices(module):
        routed = case.routings[bank]
        args = (bank, case.hidden, routed.index, routed.weights)
        error = relative_error(before[block](*args), after[block](*args))
        if error > 0:
            raise PassDisagrees(name=step, what=f"changes what bank {bank} of {block} computes, by {error:.3g} of it")
