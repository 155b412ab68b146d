"""Torch modules and their weights: lifting, quantizing, packing."""

from __future__ import annotations

from mxmoe.errors.base import MxmoeError


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

    message = (
        "cannot see how many experts a token takes in {path!r}; set an attribute top_k on the module, or pass"
        " lift(..., top_k=<experts per token>)"
    )


class MetaWeights(MxmoeError):
    """Weights were asked for that were never loaded."""

    message = "{name} is on the meta device and has no values; load the model with weights before using them"


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


class NoRouter(MxmoeError):
    """A block whose router is to be repaired and cannot be told from the rest, or is the reference's own."""

    message = (
        "no router of {block!r} to repair: it must be the only weight [experts, hidden] outside the experts, and the"
        " quantized model must be another object than the reference; copy a model before you compile it"
    )
