"""`mxmoe demo`: the main job from end to end on the shipped model, as one table and one picture."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

from torch import nn
from tqdm import tqdm

from mxmoe.calib import Stats, byte_windows, observe
from mxmoe.compiled import Compilation
from mxmoe.compiler import compile
from mxmoe.device import device
from mxmoe.errors import BadArgument, BadDemoFolder
from mxmoe.evaluate.perplexity import perplexity
from mxmoe.evaluate.tiny import TinyMoe, load_tiny
from mxmoe.files import write_whole
from mxmoe.frontend import lift
from mxmoe.ir import parse_ir
from mxmoe.report import (
    BitMap,
    Cell,
    Column,
    Point,
    bit_map,
    csv_table,
    draw_overview,
    module_bits,
    save_figure,
    text_table,
    usage,
)
from mxmoe.target import find_target

UNIFORM = (
    "w8a8_sym",
    "w4a16_g32_asym",
    "w4a16_g128_asym",
    "w4a8_g128_sym",
    "w4a4_g128_sym",
    "w3a16_g32_asym",
    "w3a16_g128_asym",
    "w2a16_g32_asym",
    "w2a16_g128_asym",
)
"""Schemes that are shown alone."""
CANDIDATES = (*UNIFORM, "w1a16_g128_sym")
"""Schemes to mix; one bit serves no whole model, but an expert that is hardly ever used."""
FLOAT = "bf16"
BUDGETS = (5.0, 4.25, 3.25, 2.25)
"""Average effective bits per weight of the mixes."""
R = 0.9
"""Mixes minimise loss^R time^(1-R); chosen on calibration text, see `benchmarks/objective.py`."""
WINDOW = 512
CHUNK = 4096
TARGET = "numba"
PICTURE_TITLE = "A small mixture of experts: where the bits go, and what they buy"

Kind = Literal["float", "uniform", "mix"]


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    name: str
    kind: Kind
    payload_bits: float
    """Average bits per expert weight, codes alone."""
    effective_bits: float
    """The same with scales and zero points."""
    n_bytes: int
    """Bytes that the compiled experts hold."""
    perplexity: float
    """Per byte, on held-out text."""
    block_us: float
    """Microseconds per block, predicted for the target's device; mean over the blocks."""
    solve_s: float | None = None
    """Seconds to solve the allocation; None where there was nothing to choose."""
    gap: float | None = None
    """(objective - proved lower bound) / objective."""
    rows: Mapping[str, int] | None = None
    """Scheme -> rows that chose it, of a mix."""


@dataclass(frozen=True)
class Demo:
    """What the demo found, and where it wrote it."""

    entries: tuple[Entry, ...]
    about: str
    """What was measured on what, in a few lines."""
    folder: Path

    def table(self) -> str:
        """Return the table as text, the kinds set apart."""
        rows: list[list[Cell]] = []
        for i, entry in enumerate(self.entries):
            if i and entry.kind != self.entries[i - 1].kind:
                rows.append([])
            rows.append(_cells(entry))
        return text_table(COLUMNS, rows)


COLUMNS = (
    Column("experts in"),
    Column("payload\nbits", ".2f"),
    Column("effective\nbits", ".2f"),
    Column("\nbytes", ",d"),
    Column("held-out\nperplexity", ".4f"),
    Column("predicted us\nper block", ".2f"),
    Column("solved in\ns", ".3f"),
    Column("proved\ngap", ".1e"),
)


def run_demo(
    folder: str | os.PathLike[str] = "demo",
    *,
    held_out_kib: int = 32,
    calibration_windows: int = 32,
    tiny: TinyMoe | None = None,
    quiet: bool = False,
) -> Demo:
    """
    Quantize the shipped model in every way of the table, measure each, and write table and picture to a folder.

    The model is observed once; every allocation is solved from the same statistics. Writes table.txt, table.csv,
    table.json, picture.png and one plan per mix.

    Args:
        folder: made if it is not there; files of an earlier run are replaced.
        held_out_kib: KiB of held-out text, taken in chunks from all over it.
        calibration_windows: windows of 512 bytes of calibration text.
        tiny: another model of the same form than the shipped one.
        quiet: no progress bars.

    Raises:
        BadArgument, TextTooShort: less than 1 KiB to measure on, more windows than there are, or none.
        BadDemoFolder: the folder cannot be written. All of these are found before any work.
        MissingTinyModel, BrokenTinyModel: the shipped model is not whole.
    """
    if held_out_kib < 1:
        raise BadArgument(name="held_out_kib", value=held_out_kib, reason="there is nothing to measure on below 1")
    out = _writable(Path(folder))
    tiny = tiny or load_tiny()
    text = spread(tiny.held_out, 1024 * held_out_kib)
    windows = list(byte_windows(tiny.calibration, WINDOW, calibration_windows))
    stats = observe(lift(tiny.model), windows, schemes=(*CANDIDATES, FLOAT), quiet=quiet)
    entries: list[Entry] = []
    maps: list[BitMap] = []
    jobs = [FLOAT, *UNIFORM, *BUDGETS]
    for job in tqdm(jobs, desc="compiling and measuring", unit="model", disable=quiet):
        entry, made = _measure(tiny.model, job, stats, text)
        entries.append(entry)
        if entry.kind == "mix":
            allocated = parse_ir(made.ir("allocated"))
            title = f"{job:g} bits: perplexity {entry.perplexity:.3f}"
            maps.append(bit_map(module_bits(allocated), title, usage(allocated)))
            made.plan.save(out / f"plan-{job:g}.json")
    demo = Demo(tuple(entries), _about(tiny, len(text), len(windows)), out)
    _write(demo, maps)
    return demo


def spread(text: bytes, size: int) -> bytes:
    """
    Take `size` bytes of a text in chunks of 4 KiB that lie evenly over it; the whole text if it is not longer.

    A text is no sample of itself: the first files would decide.
    """
    count = max(1, size // CHUNK)
    if len(text) <= size:
        return text
    step = (len(text) - CHUNK) / max(1, count - 1)
    return b"".join(text[round(i * step) : round(i * step) + CHUNK] for i in range(count))[:size]


def _measure(model: nn.Module, job: str | float, stats: Stats, text: bytes) -> tuple[Entry, Compilation]:
    """Compile a copy of the model for one line of the table, and run it."""
    is_mix = not isinstance(job, str)
    compiled = compile(
        copy.deepcopy(model),
        TARGET,
        inputs=stats,
        schemes=CANDIDATES if is_mix else job,
        weight_bits=job if is_mix else None,
        r=R,
        quiet=True,
    )
    made = cast("Compilation", compiled.compilation)
    # unquantized experts run as they came, in torch: nothing of ours is in the figure that the others are held against
    measured = perplexity(model if job == FLOAT else compiled, text, window=WINDOW)
    report, allocation = made.report, made.plan.allocation
    entry = Entry(
        name=f"mix of {job:g} bits" if is_mix else job,
        kind="mix" if is_mix else "float" if job == FLOAT else "uniform",
        payload_bits=report.plan.payload_bits,
        effective_bits=report.plan.effective_bits,
        n_bytes=report.held_bytes,
        perplexity=measured.perplexity,
        block_us=sum(report.predicted_us.values()) / len(report.predicted_us),
        solve_s=report.seconds["allocate-bits"] if is_mix else None,
        gap=allocation.gap if is_mix and allocation else None,
        rows=report.plan.rows if is_mix else None,
    )
    return entry, made


def _cells(entry: Entry) -> list[Cell]:
    return [
        entry.name,
        entry.payload_bits,
        entry.effective_bits,
        entry.n_bytes,
        entry.perplexity,
        entry.block_us,
        entry.solve_s,
        entry.gap,
    ]


def _about(tiny: TinyMoe, n_bytes: int, n_windows: int) -> str:
    config = tiny.model.config
    title = device(find_target(TARGET).device).title
    return (
        f"A Qwen2-MoE of {config.num_hidden_layers} blocks x {config.num_experts} experts (top"
        f" {config.num_experts_per_tok}) and a shared expert, over bytes, trained on the Python standard library.\n"
        f"Perplexity per byte of {n_bytes:,} held-out bytes; observed on {n_windows * WINDOW:,} other bytes.\n"
        f"Bytes and bits are those of the experts. Time is predicted, not measured: 512 tokens per call on a {title}.\n"
        f"Mixes minimise loss^{R:g} x time^{1 - R:.2g} within their bits; the gap is to a proved lower bound."
    )


def _writable(folder: Path) -> Path:
    """Make the folder and try to write in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise BadDemoFolder(folder=folder, reason=error.strerror) from error


def _write(demo: Demo, maps: list[BitMap]) -> None:
    """Write the tables and the picture."""
    entries = demo.entries
    points = {
        kind: [Point(e.name, e.effective_bits, e.perplexity) for e in entries if e.kind == kind]
        for kind in ("float", "uniform", "mix")
    }
    baseline = points["float"][0].perplexity
    figure = draw_overview(maps, points["uniform"], points["mix"], baseline=baseline, title=PICTURE_TITLE)
    save_figure(figure, demo.folder / "picture.png")
    write_whole(demo.folder / "table.txt", f"{demo.table()}\n\n{demo.about}\n")
    write_whole(demo.folder / "table.csv", csv_table(COLUMNS, [_cells(entry) for entry in entries]))
    write_whole(demo.folder / "table.json", json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
