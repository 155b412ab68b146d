"""Every mistake a user can make, one class each, with the way out in the message."""

from __future__ import annotations

from typing import ClassVar


class MxmoeError(Exception):
    """
    Base of all errors raised on purpose by this package.

    A subclass holds one sentence with blanks in `message`; raising fills the blanks by keyword, and every
    blank stays readable as an attribute in `blanks`:

        raise UnknownName(kind="pass", name="anotate-cost", near="annotate-cost")
    """

    message: ClassVar[str] = "{text}"

    def __init__(self, **blanks: object) -> None:
        self.blanks = blanks
        super().__init__(self.message.format(**blanks))


# Registries


class UnknownName(MxmoeError):
    """A name that no table and no entry point knows."""

    message = "no {kind} named {name!r}; {near}"


class BrokenEntry(MxmoeError):
    """A registered name whose module or attribute cannot be loaded."""

    message = "the {kind} {name!r} is registered as {path!r}, which cannot be loaded: {reason}"


# Schemes and values of the IR


class BadScheme(MxmoeError):
    """A scheme string outside the grammar, or a combination of fields that has no meaning."""

    message = "{text!r} is no scheme: {reason}; write w<bits>a<bits>[_g<group>][_sym|_asym][_e4m3|_fp16], bf16 or fp16"


class BadTable(MxmoeError):
    """A table whose axes, shape, dtype or text do not fit together."""

    message = "bad table: {reason}"


class BadTile(MxmoeError):
    """A tile with an extent that is not a positive number."""

    message = "{text!r} is not a tile: {reason}; write m<rows>n<columns>k<depth>, e.g. m64n128k64"


class ElidedTable(MxmoeError):
    """Text that was printed for reading is being parsed."""

    message = (
        "table<{axes}> was printed elided, its values are gone; print the module whole with"
        " `mxmoe opt --full` or mxmoe.ir.print_ir(module, elide=None)"
    )


class BadShape(MxmoeError):
    """A block or bank whose sizes or names do not fit together."""

    message = "{what} cannot be: {reason}"


class BadText(MxmoeError):
    """Text that is no module of this dialect, or a module that its stage forbids."""

    message = "{name} is not a valid module:\n{reason}"


# Devices and cost models


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


class BadPlan(MxmoeError):
    """A file that is no plan."""

    message = "{name} is not a plan: {reason}"


class PlanMismatch(MxmoeError):
    """A plan for another module."""

    message = "the plan does not fit the module: {reason}"


# Quantization (mxmoe/quant)


class BadWeight(MxmoeError):
    """A weight with a dtype or a shape that cannot be quantized."""

    message = (
        "{name} is {found}; a weight is a tensor [..., out channels, in channels] of float32, bfloat16, float16 or"
        " float64 with at least one input channel"
    )


class NonFiniteWeights(MxmoeError):
    """NaN or infinity among the weights."""

    message = "{name} holds {count} values that are not finite, the first at {index}; repair or reload the checkpoint"


class WeightsBeyondFormat(MxmoeError):
    """Weights too large for a 16-bit float format, which has no scale to bring them into range."""

    message = "{name} reaches {value:g}, beyond the {limit:g} that {scheme} holds; use bf16, or a scheme with a scale"


class BadQuantized(MxmoeError):
    """Codes, scales and zero points that do not fit their scheme or each other."""

    message = "bad quantized weight of {scheme}: {reason}"


class BadPacked(MxmoeError):
    """A packed payload whose size or type does not fit its scheme and shape."""

    message = "bad packed weight of {scheme}: {reason}; it may have been cut short or packed for another shape"


class BadActivation(MxmoeError):
    """Activations with a dtype or a number of channels that the weight does not take."""

    message = "activations are {found}; give a tensor [..., {channels}] of float32, bfloat16, float16 or float64"


class NotOneMatrix(MxmoeError):
    """A stack of quantized matrices where one is needed."""

    message = "matmul takes one matrix [n, k], this is {shape}; pick one with q[expert]"


class NoSuchExpert(MxmoeError):
    """An expert index outside the bank."""

    message = "{name} has experts 0 to {last}, not {expert}"


class PackedOnly(MxmoeError):
    """Dense values asked of weights that are kept packed."""

    message = "{name} is kept packed as {scheme}, its dense values are gone; use quantized() or lift the original model"


class PackedAs(MxmoeError):
    """A packed weight asked for in another scheme than the one it was packed in."""

    message = "expert {expert} of {name} is packed as {packed}, not as {asked}; compile the original model for {asked}"


# Passes


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


# Frontend: what can be lifted out of a torch module


class NotAModule(MxmoeError):
    """Something that is no torch module was given to be lifted."""

    message = "lift takes a torch.nn.Module (an MoE block, its experts, or a whole model), not {what}"


class NoMoeBlock(MxmoeError):
    """A module without anything that the frontend recognises as a bank of experts."""

    message = (
        "{cls} holds no MoE block. Looked for 3-D parameters gate_up_proj (or up_proj) with down_proj in one module,"
        " and for lists of expert MLPs in an attribute whose name contains 'expert'. {found}"
    )


class RefusedFamily(MxmoeError):
    """A family of models that is known and not supported."""

    message = "{cls} at {path!r} cannot be lifted: {reason} (see docs/families.md)"


class BadExperts(MxmoeError):
    """Experts were found and their storage contradicts what the frontend knows how to read."""

    message = "the experts {cls} at {path!r} cannot be lifted: {reason}"


class UnknownGate(MxmoeError):
    """Experts with a gate of their own that no row of the family table describes."""

    message = (
        "{cls} at {path!r} overrides _apply_gate and no row says what it computes; add"
        ' Family("{cls}", act=..., params=...) to mxmoe/frontend/families.py (kinds: {known})'
    )


class UnknownActivation(MxmoeError):
    """An activation that equals none of the known kinds."""

    message = (
        "{cls} at {path!r} has the activation {act}, which equals none of {known}; add it to mxmoe/quant/acts.py,"
        ' or a row Family("{cls}", act=..., params=...) to mxmoe/frontend/families.py'
    )


class LiftMismatch(MxmoeError):
    """A module that computes something else than what was read off its structure."""

    message = (
        "{cls} at {path!r} was read as {described}, and its own {what} disagrees by {error:.1e} relative (allowed"
        " {allowed:.0e}); it needs a row in mxmoe/frontend/families.py that says what it computes"
    )


class UnknownTopK(MxmoeError):
    """Neither the block, nor its router, nor a config says how many experts a token takes."""

    message = "cannot see how many experts a token takes in {path!r}; pass lift(..., top_k=<experts per token>)"


class MetaWeights(MxmoeError):
    """Weights were asked for that were never loaded."""

    message = "{name} is on the meta device and has no values; load the model with weights before using them"


# Allocation (solver)


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


# Evaluation


class BadTokens(MxmoeError):
    """A text that a language model cannot be measured on."""

    message = "cannot measure perplexity: {reason}; pass bytes, or token ids [tokens] of an integer dtype, two or more"


class NonFiniteLogits(MxmoeError):
    """A model that answers with NaN or rules out what happened."""

    message = "the loss of token {position} is {value}; find the first block with such an output and give it more bits"


class MissingTinyModel(MxmoeError):
    """A file of the shipped model is not where the package keeps it."""

    message = "{path} is missing; reinstall the package, or write it with examples/train_tiny_moe.py"


class BrokenTinyModel(MxmoeError):
    """A file of the shipped model is damaged, or belongs to another training run."""

    message = "{path} is broken: {reason}; reinstall the package, or train anew with examples/train_tiny_moe.py"


class BadDemoFolder(MxmoeError):
    """The demo has nowhere to write."""

    message = "cannot write to {folder}: {reason}; name another folder"


# Backends


class NotLowered(MxmoeError):
    """A backend that runs group GEMMs is given a block that has none yet."""

    message = (
        "{backend} compiles lowered blocks, {block} is {stage}; run the passes {missing} first,"
        " or the eager backend, which runs every stage"
    )


class UnsupportedScheme(MxmoeError):
    """A linear was given a scheme that the backend has no kernel for."""

    message = "{backend} cannot run {scheme}, which {block} chose for expert {expert} of {weight}; it runs {known}"


class BadRouting(MxmoeError):
    """Router output that does not fit the block."""

    message = "{block}: {what} is {found}, it must be {wanted}"


class BadHidden(MxmoeError):
    """Tokens of another shape or dtype than the block takes."""

    message = "{block}: hidden states are {found}, they must be [tokens, {hidden}] of a float type"


class NoSuchBank(MxmoeError):
    """A bank that the compiled block does not have."""

    message = "{block} has no bank {bank!r}; it has {known}"


class BadWeightShape(MxmoeError):
    """A weight whose shape is not what the module says."""

    message = "weight {name!r} is {found}, the module wants {wanted}; lift the module again or name the right weights"


class NoKernels(MxmoeError):
    """A backend that plans can be made for, but that this build cannot run."""

    message = (
        "this build has no {backend} kernels, so a plan for {backend} can be made and saved but not run here;"
        " compile it for {runnable} instead"
    )


class HypothesisMissing(MxmoeError):
    """The strategies of mxmoe.testing are asked for where hypothesis is not installed."""

    message = "mxmoe.testing needs hypothesis; install the test extra: pip install 'mxmoe[test]'"


class BackendsDisagree(MxmoeError):
    """Two backends gave outputs further apart than the scheme allows."""

    message = (
        "{block} bank {bank}: {left} and {right} differ by {error:.3g}, more than {allowed:.3g}, relative to the"
        " output; first at {where}"
    )


class WrongDevice(MxmoeError):
    """Tensors on a device that the backend cannot read."""

    message = (
        "{backend} runs on the CPU and {block} was given tensors on {device}; move them, or compile for that device"
    )


# Calibration


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


class NotInStats(MxmoeError):
    """A bank, role or scheme that was not observed."""

    message = "the statistics have no {what}; they have {known}. Observe with it, or choose among these"


class StatsMismatch(MxmoeError):
    """Statistics that cannot be added up."""

    message = "these statistics cannot be merged: {reason}; merge runs over one model with the same schemes"


class BrokenStats(MxmoeError):
    """A statistics file that is missing, cut short or damaged."""

    message = "{path} is not a readable statistics file ({reason}); write it again with Stats.save"


class TextTooShort(MxmoeError):
    """A text with fewer windows than were asked for."""

    message = "{source} has {size} bytes: {available} windows of {length}, not {count}; ask for fewer or shorter ones"


# Reports


class RaggedTable(MxmoeError):
    """A row with too few or too many cells."""

    message = "row {number} of the table has {cells} cells for {columns} columns; give one cell per column, or none"


class EmptyPicture(MxmoeError):
    """A picture of nothing, or of parts that do not belong together."""

    message = "cannot draw {what}: {reason}"


class SchemeCannotRun(MxmoeError):
    """A plan that chooses a scheme which the planned device cannot run."""

    message = "{scheme} cannot run on {device}: no tile of it is known there; choose another scheme or device"


class NonFiniteObservation(MxmoeError):
    """Activations within the model that are NaN or infinite although the data is finite."""

    message = (
        "expert {expert} of {block}.{bank} gives NaN or infinity on the calibration data; run the model in a wider"
        " element type, or look for broken weights"
    )


# Compiling, saving and loading


class BadArgument(MxmoeError):
    """An argument of `compile` or `solve` that cannot be."""

    message = "{name}={value!r}: {reason}"


class CompiledAlready(MxmoeError):
    """A module whose experts are compiled already."""

    message = "{cls} holds compiled experts already; compile the original module, its dense weights are needed"


class NotCompiled(MxmoeError):
    """A module that did not come from `compile`."""

    message = "{cls} is not compiled; pass what mxmoe.compile or mxmoe.load returned"


class NoSuchStage(MxmoeError):
    """A stage that the module did not pass through."""

    message = "there is no text of a stage {stage!r}; {near}"


class FolderInUse(MxmoeError):
    """A folder that holds something else."""

    message = "{folder} holds {foreign}, which is no part of a checkpoint; choose an empty or new folder"


class NoCheckpoint(MxmoeError):
    """A folder without a checkpoint."""

    message = "{folder} holds no checkpoint (no manifest.json); pass a folder that CompiledMoE.save wrote"


class BrokenCheckpoint(MxmoeError):
    """A checkpoint that was changed, cut short or lost a part."""

    message = "{what} is broken: {reason}; copy or save the checkpoint again"


class NeedsBlock(MxmoeError):
    """A checkpoint whose module cannot be built from what was saved."""

    message = "{cls} cannot be built from the checkpoint ({reason}); pass mxmoe.load(folder, block=...)"


# Passes and the command line


class WrongStage(MxmoeError):
    """A pass is given a block that has not come far enough for it, or too far."""

    message = "{name} takes {wanted} blocks, {block} is {stage}; {way}"


class StatsDoNotFit(MxmoeError):
    """Statistics of another model."""

    message = "the statistics do not fit the module: {reason}; observe this model"


class NotAPass(MxmoeError):
    """Something is registered as a pass that is none."""

    message = "the pass {name!r} is registered and cannot be used: {reason} (see docs/write-a-pass.md)"


class BadSetting(MxmoeError):
    """An environment variable with a value that it cannot have."""

    message = "{variable}={value!r}: {reason}"


class BadUsage(MxmoeError):
    """A command line that does not follow its grammar."""

    message = "{reason}; see `{program} --help`"


class NothingChosen(MxmoeError):
    """A picture of choices is wanted of a module that has none."""

    message = "{block} is {stage}, no scheme is chosen there yet; run allocate-bits or apply-plan first"


class PassDisagrees(MxmoeError):
    """A pass changed what a module computes, or what its text holds."""

    message = "{name} {what}"


class StructureMismatch(MxmoeError):
    """A module of another structure than the one that was compiled."""

    message = "the module does not have the structure that was compiled: {reason}; pass one made from the same config"


class NotSavedHere(MxmoeError):
    """A compiled model asked to save itself by its library, which would leave its experts out."""

    message = "{cls}.save_pretrained cannot write compiled experts; use .save(folder), and mxmoe.load(folder)"
