"""`mxmoe eval`: a model in a folder, as it came and with compiled experts, on one text."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mxmoe.compiled import Compilation, copy_modules
from mxmoe.compiler import compile
from mxmoe.errors import BadArgument, NoText
from mxmoe.evaluate.compare import Comparison, compare
from mxmoe.evaluate.folder import find_text, load_folder, read_ids, stored_dtype
from mxmoe.evaluate.perplexity import perplexity
from mxmoe.frontend import lift
from mxmoe.ir import Plan
from mxmoe.report import Column, text_table
from mxmoe.report.compiled import CompileReport

LONGEST_WINDOW = 2048
"""Of the window that is taken where none is given; no longer than the model's own either."""
COLUMNS = (
    Column("experts"),
    Column("bytes", ",d"),
    Column("payload\nbits", ".3f"),
    Column("effective\nbits", ".3f"),
    Column("\nperplexity", ".4f"),
)


@dataclass(frozen=True)
class Request:
    """How experts are compiled; the fields are arguments of `mxmoe.compile`."""

    target: str = "eager"
    schemes: Sequence[str] | None = None
    weight_bits: float | None = None
    """None: no budget, or as it came where no plan and no schemes are given either."""
    plan: Plan | str | os.PathLike[str] | None = None
    r: float = 0.75
    quantizer: str = "rtn"
    sensitivity: str = "squared"
    rotate_down: int | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing is to be compiled."""
        return self.plan is None and self.schemes is None and self.weight_bits is None


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    model: str
    """Class of the model."""
    folder: str
    device: str
    dtype: str
    """What unquantized weights were held in."""
    text: str
    """File that was measured on."""
    tokens: int
    """Tokens predicted."""
    window: int
    expert_bytes: int
    """Bytes of expert weights as they came: in the folder's dtype, which may be narrower than the one they ran in."""
    expert_bits: float
    """Bits per expert weight as they came."""
    perplexity: float
    """Per token, as it came."""
    comparison: Comparison | None
    """The compiled model beside it; None where nothing was compiled."""
    compiled: CompileReport | None
    request: Request
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """load, compile and measure -> seconds."""
    peak_bytes: int = 0
    """Largest memory in use: of the GPU, or resident of the process on a CPU."""

    def __str__(self) -> str:
        """Say it in a few lines and a table."""
        bits = self.expert_bits
        rows = [["as they came", self.expert_bytes, bits, bits, self.perplexity]]
        lines = [
            f"{self.model} from {self.folder}, {self.dtype} on {self.device}",
            f"{self.tokens:,} tokens of {self.text} in windows of {self.window}",
            "",
        ]
        if self.compiled is not None and self.comparison is not None:
            plan, found = self.compiled.plan, self.comparison
            row = [self.compiled.held_bytes, plan.payload_bits, plan.effective_bits, found.perplexity]
            rows.append(["compiled", *row])
            lines += [text_table(COLUMNS, rows), ""]
            lines.append(
                f"KL(as they came || compiled): mean {found.kl_mean:.6f} nats, 99 % of tokens below {found.kl_p99:.5f}"
            )
            lines.append(f"same likeliest token: {found.top1:.2%}; nats added per token: {found.nats_added:.6f}")
            counts = ", ".join(f"{scheme} x {count}" for scheme, count in plan.rows.items())
            lines += [f"{self.compiled.quantizer} for {self.compiled.target}: {counts}", self.compiled.calibration]
        else:
            lines += [text_table(COLUMNS, rows), ""]
        took = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return "\n".join([*lines, f"seconds: {took}; peak memory {self.peak_bytes / 2**30:.2f} GiB"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the plan as the name of its file."""
        found = asdict(self)
        plan = self.request.plan
        found["request"]["plan"] = None if plan is None else "given" if isinstance(plan, Plan) else str(plan)
        return found


def evaluate_folder(
    folder: str | os.PathLike[str],
    request: Request | None = None,
    *,
    text: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    tokens: int | None = None,
    calibration_tokens: int = 32_768,
    window: int | None = None,
    batch: int = 4,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
) -> Evaluation:
    """
    Load a language model, measure it, and measure it with compiled experts beside it.

    Both share every weight but the experts, and run window by window: beside the model there are its compiled experts
    and the logits of two batches.

    Args:
        folder: see `load_folder`.
        request: how to compile; None measures the model as it came.
        text: see `read_ids`; None takes held_out.bin or held_out.txt in the folder.
        calibration: what the experts are observed on; None takes calibration.bin or .txt in the folder, and where there
            is none, weights alone decide.
        tokens: tokens to measure on at most, from the start of the text.
        calibration_tokens: tokens to observe at most, in windows that lie evenly over the text.
        window: tokens per window; None takes what the model was made for, up to LONGEST_WINDOW.
        batch: windows per call.
        device: cpu, cuda or cuda:N; None takes a GPU if there is one.
        dtype: see `load_folder`.
        quiet: no progress bars.

    Raises:
        BadArgument: a device that is not there.
        NoModelFolder, NoText: of `load_folder` and `read_ids`, or no text was given and the folder has none.
        NoMoeBlock and others of `compile`; BadTokens, NonFiniteLogits of `compare`. All but the last before anything
            is measured.
    """
    request, where, seconds = request or Request(), _device(device), dict[str, float]()
    measured_on = _text(folder, text)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    with _timed(seconds, "load"):
        model = load_folder(folder, device=str(where), dtype=dtype, quiet=quiet)
        vocabulary, longest = _sizes(model)
        ids = read_ids(measured_on, folder, vocabulary)[:tokens]
        found = lift(model).report()
    size = window or min(LONGEST_WINDOW, longest or LONGEST_WINDOW)
    compiled: nn.Module | None = None
    if not request.is_empty:
        with _timed(seconds, "compile"):
            source = calibration or find_text(folder, "calibration")
            seen = None if source is None else read_ids(source, folder, vocabulary)
            inputs = None if seen is None else _windows(seen.to(where), size, calibration_tokens, batch)
            compiled = _compile(model, request, inputs, quiet)
    with _timed(seconds, "measure"):
        both = compare(compiled, model, ids, size, batch, progress=not quiet) if compiled is not None else None
        own = both.reference_perplexity if both else _perplexity(model, ids, size, batch, quiet)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    running, stored = min(dtypes, key=lambda one: one.itemsize), stored_dtype(folder)
    per_weight = (stored or running).itemsize
    return Evaluation(
        model=type(model).__name__,
        folder=str(folder),
        device=_device_name(where),
        dtype=str(running).removeprefix("torch."),
        text=str(measured_on),
        tokens=len(ids) - 1,
        window=size,
        expert_bytes=found.bytes_found // running.itemsize * per_weight,
        expert_bits=8.0 * per_weight,
        perplexity=own,
        comparison=both,
        compiled=None if compiled is None else cast("Compilation", compiled.compilation).report,
        request=request,
        seconds=seconds,
        peak_bytes=_peak_bytes(where),
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadArgument(name="device", value=name, reason="it is cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadArgument(name="device", value=name, reason=f"torch sees {torch.cuda.device_count()} GPUs")
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _text(folder: str | os.PathLike[str], text: str | os.PathLike[str] | None) -> Path:
    """Find what is measured on, before anything is loaded."""
    found = Path(text) if text is not None else find_text(folder, "held_out")
    if found is None and Path(folder).is_dir():
        raise NoText(folder=folder, reason="none was given, and it has no held_out.bin or held_out.txt")
    return found or Path(folder)


def _sizes(model: nn.Module) -> tuple[int, int | None]:
    """Vocabulary, and the longest window that the config speaks of."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(config.vocab_size), getattr(config, "max_position_embeddings", None)


def _windows(ids: Tensor, window: int, tokens: int, batch: int) -> list[Tensor]:
    """Take disjoint windows [batch, window] that lie evenly over a text, as many as `tokens` allow; at least one."""
    whole = ids[: len(ids) // window * window].view(-1, window) if len(ids) >= window else ids[None]
    count = min(len(whole), max(1, tokens // window))
    chosen = torch.linspace(0, len(whole) - 1, count).round().long()
    return list(whole[chosen.to(whole.device)].split(batch))


def _compile(model: nn.Module, request: Request, inputs: list[Tensor] | None, quiet: bool) -> nn.Module:
    """Compile a copy that shares every weight with the model."""
    return compile(
        copy_modules(model),
        request.target,
        inputs=inputs,
        schemes=request.schemes,
        weight_bits=request.weight_bits,
        plan=request.plan,
        r=request.r,
        quantizer=request.quantizer,
        sensitivity=request.sensitivity,
        rotate_down=request.rotate_down,
        quiet=quiet,
    )


def _perplexity(model: nn.Module, ids: Tensor, window: int, batch: int, quiet: bool) -> float:
    return perplexity(model, ids, window=window, batch=batch, progress=not quiet).perplexity


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Generator[None]:
    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - began


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # kilobytes, but on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
