"""
One model of the accuracy study with all that is prepared for it: codes by quantizer and seed, and what was observed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accuracy_bank import Layout, Mixed, Shelf, fill_shelf
from accuracy_plans import SETTINGS, WEIGHT_ONLY_SETTINGS, Allocator, schemes_for
from torch import Tensor, nn

from mxmoe.calib import FACTS, HessianOptions, Hessians, Stats, collect_hessians, observe
from mxmoe.evaluate import Remembered, compare, remember
from mxmoe.frontend import lift
from mxmoe.passes import Environment, parse_passes, run_passes
from mxmoe.transform import TransformReport, awq, smooth

BEGAN = time.monotonic()
ROTATE = 128
TEXTS = {"held_out": "held", "out_of_domain": "ood"}
"""Name of a text -> beginning of its columns."""


class Setup(Protocol):
    """What a subject wants to know of the study."""

    options: argparse.Namespace
    device: torch.device
    settings: tuple[str, ...]
    texts: dict[str, Tensor]
    phases: Phases

    def calibration(self, seed: int) -> Tensor:
        """Draw calibration data, [windows, window]."""
        ...


class Phases:
    """Seconds by phase, printed as they pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.latest = 0.0
        self.peak = 0.0
        """10^9 bytes that the GPU held at most in the latest phase; 0 on a CPU."""

    @contextmanager
    def __call__(self, name: str, device: torch.device, *, is_loud: bool = True) -> Generator[None]:
        """Time what runs within, the device's work included."""
        began, is_gpu = time.perf_counter(), device.type == "cuda"
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if is_gpu:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() / 1e9
        self.latest = time.perf_counter() - began
        self.seconds[name] += self.latest
        if is_loud:
            say(f"{name}: {self.latest:.1f} s")


def say(line: str) -> None:
    """Print a line with the time since the start."""
    print(f"[{time.monotonic() - BEGAN:6.1f}] {line}", flush=True)


def spoken(script: str, arguments: Sequence[str]) -> str:
    """Write a command without the places of one machine: where results went, and the folders above what was read."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--results", "--docs"):
            next(words, None)
        else:
            kept.append(Path(word).name if "/" in word else word)
    return " ".join(["python", f"benchmarks/{script}", *kept])


class AlphaFacts:
    """AlphaQ's exponents, found by threads on the CPU while the GPU measures: eigenvalues of many small matrices."""

    def __init__(self, layout: Layout, workers: int) -> None:
        """Begin."""
        alpha = FACTS["alpha"]
        self.pool = ThreadPoolExecutor(workers)
        self.found: dict[tuple[str, str, str], list[Future[Tensor]]] = {}
        for block in layout.lifted.blocks:
            for name, bank in block.banks.items():
                for role, weight in bank.shape.weights.items():
                    dense = layout.lifted.weights[weight].detach().float().cpu()
                    self.found[block.name, name, role] = [self.pool.submit(alpha, matrix) for matrix in dense]

    @property
    def is_ready(self) -> bool:
        """Whether nothing is left to wait for."""
        return all(one.done() for futures in self.found.values() for one in futures)

    def into(self, stats: Stats) -> Stats:
        """Add the facts to statistics; waits for them."""
        found = {key: np.array([float(one.result()) for one in futures]) for key, futures in self.found.items()}
        made = {
            key: dataclasses.replace(
                sums, facts={**sums.facts, "alpha": {role: found[(*key, role)] for role in sums.squared_error}}
            )
            for key, sums in stats.banks.items()
        }
        return dataclasses.replace(stats, banks=made)


def fold_awq(model: nn.Module, data: Tensor) -> TransformReport:
    """Fold AWQ's scales, chosen for the schemes that stand alone at the weight-only settings."""
    return awq(model, data, [scheme for name in WEIGHT_ONLY_SETTINGS for scheme in SETTINGS[name].uniform], quiet=True)


def fold_smoothquant(model: nn.Module, data: Tensor) -> TransformReport:
    """Fold SmoothQuant's scales; powers of two, since rounding a 16-bit model would be seen beside 8-bit codes."""
    return smooth(model, data, exact=True, quiet=True)


FOLDS: Mapping[str, Callable[[nn.Module, Tensor], TransformReport]] = {"awq": fold_awq, "smoothquant": fold_smoothquant}
"""Quantizer -> what is done to a model, in place, before it rounds to nearest."""


class Subject:
    """One model of the study, with all that was prepared for it."""

    def __init__(self, name: str, model: nn.Module, study: Setup, like: Subject | None = None) -> None:
        """Prepare a model; `like` is one that computes the same, whose answers are the reference."""
        self.name, self.model, self.study = name, model, study
        self.layouts = {False: Layout.of(lift(model)), True: Layout.of(lift(model))}
        run_passes(self.layouts[True].lifted.module, parse_passes(f"rotate-down{{block={ROTATE}}}"), Environment())
        self.references: dict[str, Remembered] = {} if like is None else like.references
        for text, ids in study.texts.items() if like is None else ():
            self.references[text] = remember(model, ids, study.options.window, study.options.batch)
        self.hessians: dict[int, tuple[Hessians, float]] = {}
        self.shelves: dict[tuple[str, int], tuple[Shelf, float, float]] = {}
        self.allocators: dict[tuple[str, int], tuple[Allocator, float, float]] = {}
        self.mixed = Mixed(self.layouts[False])

    def folded(self, quantizer: str, seed: int) -> Subject:
        """Copy the model and fold the scales of a quantizer into it; its reference stays the model as it was."""
        study, model = self.study, copy.deepcopy(self.model)
        with study.phases(f"fold {self.name} {quantizer} seed {seed}", study.device):
            report = FOLDS[quantizer](model, study.calibration(seed))
        say(f"{len(report.folded)} kinds of inputs folded, {len(report.skipped)} left")
        return Subject(self.name, model, study, like=self)

    def shelf(self, quantizer: str, seed: int) -> tuple[Shelf, float, float]:
        """Give the codes of a quantizer, the seconds that they took with their Hessians, and the peak in 10^9 bytes."""
        base, _, turned = quantizer.partition("+")
        base = "rtn" if base in FOLDS else base
        key = (quantizer, seed if base == "gptq" else -1)
        if key not in self.shelves:
            like = self.shelf(base, seed) if turned else None
            hessians, seconds = self._hessians(seed) if base == "gptq" else (None, 0.0)
            layout, study = self.layouts[bool(turned)], self.study
            with study.phases(f"quantize {self.name} {quantizer} seed {seed}", study.device):
                made = fill_shelf(
                    layout,
                    schemes_for(self.name, study.settings, quantizer),
                    {"a16": study.options.gptq, "": "gptq"} if base == "gptq" else base,
                    hessians,
                    ROTATE if turned else None,
                    like[0] if like else None,
                )
            self.shelves[key] = (made, seconds + study.phases.latest, study.phases.peak)
        return self.shelves[key]

    def allocator(self, quantizer: str, seed: int) -> tuple[Allocator, float, float]:
        """Observe the model with the very codes of the quantizer; seconds and peak memory."""
        key = (quantizer, seed)
        if key not in self.allocators:
            shelf, study = self.shelf(quantizer, seed)[0], self.study
            layout = self.layouts["+" in quantizer]
            with study.phases(f"observe {self.name} {quantizer} seed {seed}", study.device):
                data, looked_up = study.calibration(seed), shelf.quantizer()
                stats = observe(
                    layout.lifted, data, schemes=shelf.schemes, gradients=True, quantizer=looked_up, quiet=True
                )
            if not self.allocators:
                say(stats.report())
            self.allocators[key] = (Allocator(layout, stats), study.phases.latest, study.phases.peak)
        return self.allocators[key]

    def _hessians(self, seed: int) -> tuple[Hessians, float]:
        if seed not in self.hessians:
            study = self.study
            with study.phases(f"collect Hessians {self.name} seed {seed}", study.device):
                options = HessianOptions(max_buffer_mb=8000 if study.device.type == "cuda" else 256, max_rows=32768)
                data = study.calibration(seed)
                found = collect_hessians(self.layouts[False].lifted, data, options=options, quiet=True)
            self.hessians = {seed: (found, study.phases.latest)}
        return self.hessians[seed]

    def measure(self) -> dict[str, float | None]:
        """Compare what stands in the mixed model with the reference, on every text."""
        found: dict[str, float | None] = {}
        study = self.study
        for text, short in TEXTS.items():
            seen = None
            if text in self.references:
                ids, window, batch = study.texts[text], study.options.window, study.options.batch
                seen = compare(self.mixed.model, self.references[text], ids, window, batch)
            for ours, theirs in (
                ("ppl", "perplexity"),
                ("ppl_bf16", "reference_perplexity"),
                ("kl", "kl_mean"),
                ("kl_p99", "kl_p99"),
                ("top1", "top1"),
            ):
                found[f"{short}_{ours}"] = None if seen is None else getattr(seen, theirs)
        return found
