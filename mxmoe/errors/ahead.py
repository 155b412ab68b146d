"""Kernels: compiling them ahead of time, reading what came out, and packing weights for them."""

from __future__ import annotations

from mxmoe.errors.base import MxmoeError


class AheadFailed(MxmoeError):
    """A kernel that the Triton compiler refuses."""

    message = "{kernel} does not compile for sm_{arch}: {reason}"


class BadInt4(MxmoeError):
    """Weights or activations that the INT4 kernel cannot take."""

    message = "the INT4 kernel cannot run this: {reason}"


class BrokenCubin(MxmoeError):
    """Bytes that the disassembler cannot read."""

    message = "the cubin of {size} bytes cannot be read: {reason}; clear Triton's cache and compile the kernel again"


class MissingTool(MxmoeError):
    """A CUDA tool that is in every Triton wheel and not in this one."""

    message = "{tool} is not in this build of Triton; install Triton's wheel, or name the CUDA toolkit's in {variable}"
