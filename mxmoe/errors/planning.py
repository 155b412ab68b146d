"""Deciding: statistics, devices and costs, allocation problems, passes and pipelines."""

from __future__ import annotations

from mxmoe.errors.base import MxmoeError


class EmptyCalibration(MxmoeError):
    """Calibration data without a single token."""

    message = "{what} holds no calibration data; pass at least one token, or leave inputs out for a data-free estimate"


class NonFiniteCalibration(MxmoeError):
    """NaN or infinity in calibration data."""

    message = "calibration batch {batch} holds NaN or infinity, the first at {index}; leave such batches out"


class BadCalibration(MxmoeError):
    """A calibration batch that the module cannot take."""

    message = "calibration batch {batch} is {found}; {wanted}"


class NothingObserved(MxmoeError):
    """A bank that no calibration token reached."""

    message = (
        "no token reached bank {bank!r} of block {block!r} while the data ran through the module; check that"
        " `run` calls the module that was lifted, and that the data is what it expects"
    )


class NonFiniteObservation(MxmoeError):
    """Activations within the model that are NaN or infinite although the data is finite."""

    message = (
        "expert {expert} of {block}.{bank} gives NaN or infinity on the calibration data; run the model in a wider"
        " element type, or look for broken weights"
    )


class NotInStats(MxmoeError):
    """A bank, role or scheme that was not observed."""

    message = "the statistics have no {what}; they have {known}. Observe with it, or choose among these"


class StatsMismatch(MxmoeError):
    """Statistics that cannot be added up."""

    message = "these statistics cannot be merged: {reason}; merge runs over one model with the same schemes"


class BrokenStats(MxmoeError):
    """A statistics file that is missing, cut short or damaged."""

    message = "{path} is not a readable statistics file ({reason}); write it again with Stats.save"


class StatsDoNotFit(MxmoeError):
    """Statistics of another model."""

    message = "the statistics do not fit the module: {reason}; observe this model"


class TextTooShort(MxmoeError):
    """A text with fewer windows than were asked for."""

    message = "{source} has {size} bytes: {available} windows of {length}, not {count}; ask for fewer or shorter ones"


class BadDevice(MxmoeError):
    """A device row with a figure that cannot be, or that has no source."""

    message = "the device row {device!r} cannot be: {reason}"


class BadWorkload(MxmoeError):
    """Token counts, frequencies or sizes that no launch can have."""

    message = "cannot cost this workload: {reason}"


class BadProfile(MxmoeError):
    """A measured profile whose fields or figures do not fit together."""

    message = "the profile {path} is not valid: {reason}; mxmoe/cost/data/README.md says what each field holds"


class NoProfile(MxmoeError):
    """A measured cost model was asked for a device that nobody measured."""

    message = "no measured profile for {device!r} (there is one for {known}); use the roofline cost model there"


class SchemeCannotRun(MxmoeError):
    """A plan that chooses a scheme which the planned device cannot run."""

    message = "{scheme} cannot run on {device}: no tile of it is known there; choose another scheme or device"


class BadProblem(MxmoeError):
    """Arrays of an allocation problem that do not fit together, or hold a value without a meaning."""

    message = "bad allocation problem: {reason}"


class BadBudget(MxmoeError):
    """A budget that no plan could be measured against."""

    message = "bad budget: {reason}; write Budget(weight_bits=4.25, bytes=None, latency_us=None)"


class BadObjective(MxmoeError):
    """An objective that is neither a name nor an exponent."""

    message = "{value!r} is no objective; write 'loss', 'time', or r between 0 and 1 for loss^r * time^(1-r)"


class MissingCost(MxmoeError):
    """Time is to be minimised or limited, and the problem does not say what anything costs."""

    message = "{what} needs Problem(..., cost=...), microseconds per row and scheme, and this problem has none"


class NoPossibleScheme(MxmoeError):
    """A row, or rows tied into one choice, for which every scheme is impossible."""

    message = "no scheme is possible for {rows}: loss or cost is inf in every column; add a scheme or loosen the tie"


class InfeasibleBudget(MxmoeError):
    """One limit that no plan meets, even with every other limit lifted."""

    message = "no plan has {limit} <= {value:.12g}; the smallest feasible {limit} is {smallest:.12g}"


class InfeasibleTogether(MxmoeError):
    """Limits that can be met one at a time and not at once."""

    message = (
        "found no plan with {first} <= {first_value:.12g} and {second} <= {second_value:.12g} at once; at this {first}"
        " the smallest {second} is {second_smallest:.12g}, at this {second} the smallest {first} is"
        " {first_smallest:.12g}"
    )


class InstanceTooLarge(MxmoeError):
    """An instance above what a solver says it can do."""

    message = "solver {solver!r} takes at most {limit:,} {what} and this instance has {size}; use solver='lagrangian'"


class SolverFailed(MxmoeError):
    """A solver library that stopped without a plan and without a proof that there is none."""

    message = "solver {solver!r} stopped with status {status!r} and no plan; {way_out}"


class BadSolverOption(MxmoeError):
    """An option that a solver does not have, or a value that it cannot take."""

    message = "solver {solver!r}: {reason}"


class MissingInput(MxmoeError):
    """A pass that needs what nobody gave it."""

    message = "{name} needs {what}; {way}"


class BadOption(MxmoeError):
    """An option that a pass does not have, or a value of another type."""

    message = "{name} cannot take {option}: {reason}"


class BadPipeline(MxmoeError):
    """A pipeline string that does not parse."""

    message = "{text!r} is not a pipeline: {reason}; write pass{{option=value}},pass,..."


class PassFailed(MxmoeError):
    """A module that does not verify after a pass: a mistake in that pass."""

    message = "after {name} the module does not verify: {reason}"


class WrongStage(MxmoeError):
    """A pass is given a block that has not come far enough for it, or too far."""

    message = "{name} takes {wanted} blocks, {block} is {stage}; {way}"


class NotAPass(MxmoeError):
    """Something is registered as a pass that is none."""

    message = "the pass {name!r} is registered and cannot be used: {reason} (see docs/write-a-pass.md)"


class NotASensitivity(MxmoeError):
    """Something is registered as a sensitivity that is none."""

    message = "the sensitivity {name!r} is registered and cannot be used: {reason} (see docs/sensitivities.md)"


class PassDisagrees(MxmoeError):
    """A pass changed what a module computes, or what its text holds."""

    message = "{name} {what}"


class NothingChosen(MxmoeError):
    """A picture of choices is wanted of a module that has none."""

    message = "{block} is {stage}, no scheme is chosen there yet; run allocate-bits or apply-plan first"
