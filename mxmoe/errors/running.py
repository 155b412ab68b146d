"""Running: backends, compiled modules on disk, evaluation, reports and the command line."""

from __future__ import annotations

from mxmoe.errors.base import MxmoeError


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


class WrongCapability(MxmoeError):
    """A GPU that lacks the instructions a target is compiled for."""

    message = "the target is for compute capability {wanted} and this GPU has {found}; here run {runnable}"


class BadTiles(MxmoeError):
    """Tiles that the kernels are not made for."""

    message = "no kernel for the tiles {tiles!r}: {reason}"


class BadDispatch(MxmoeError):
    """Classes of tiles that cannot be scheduled."""

    message = "cannot schedule tiles: {reason}; give every expert a group, and every group its heights, each once"


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
    """A backend whose library is not installed: plans can be made for it, and not run."""

    message = (
        "this installation has no {backend} kernels: pip install 'mxmoe[{backend}]', or compile it for {runnable}"
        " instead; plans for {backend} can be made and saved without them"
    )


class NoGpu(MxmoeError):
    """Something is to be measured where no CUDA device is."""

    message = "{what} is measured on a GPU, and torch sees none here; go where `torch.cuda.is_available()` is True"


class WrongTiles(MxmoeError):
    """A launch whose result depends on how it is cut into tiles."""

    message = "with the tiles {config} a launch of {scheme} differs from the rule's by {error}; leave them out"


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
        "{backend} holds {block} on {home} and was given tensors on {device}; move them, or compile for that device"
    )


class RaggedTable(MxmoeError):
    """A row with too few or too many cells."""

    message = "row {number} of the table has {cells} cells for {columns} columns; give one cell per column, or none"


class EmptyPicture(MxmoeError):
    """A picture of nothing, or of parts that do not belong together."""

    message = "cannot draw {what}: {reason}"


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


class BadSetting(MxmoeError):
    """An environment variable with a value that it cannot have."""

    message = "{variable}={value!r}: {reason}"


class BadUsage(MxmoeError):
    """A command line that does not follow its grammar."""

    message = "{reason}; see `{program} --help`"


class StructureMismatch(MxmoeError):
    """A module of another structure than the one that was compiled."""

    message = "the module does not have the structure that was compiled: {reason}; pass one made from the same config"


class SharedLeftOut(MxmoeError):
    """A call of a block that gave out its shared expert's result and never got to computing it."""

    message = (
        "the shared expert of {block} was to run with its routed experts, and {reason}; call both in one forward of "
        "the block and with the same tokens, as its first call did"
    )


class NotSavedHere(MxmoeError):
    """A compiled model asked to save itself by its library, which would leave its experts out."""

    message = "{cls}.save_pretrained cannot write compiled experts; use .save(folder), and mxmoe.load(folder)"
