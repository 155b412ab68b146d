"""
What mixed precision is worth on a trained model: every allocator, with every quantizer, at every budget.

The model is a folder that `examples/train_study_moe.py` wrote. Every expert is quantized once in every scheme, for each
seed of calibration data and each quantizer; a plan is then a choice of codes that are there, and its measurement one
run over held-out text and one over text of another kind, beside the 16-bit model. The plans that the claims rest on
come first; what does not fit into --seconds is left out, and `--resume` adds it. Rows are appended to
`results/accuracy.csv` (beside it `accuracy.json`: machine, versions, command, phases), of which the page is made.

    python benchmarks/accuracy.py --folder study_moe --device cuda --seconds 440
    python benchmarks/accuracy.py --smoke              # the shipped tiny model, a minute on a CPU
    python benchmarks/accuracy.py --page               # docs/accuracy.md of what is in results/
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import io
import json
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_bank import Layout
from accuracy_plans import SETTINGS, Allocator, Job, jobs
from accuracy_subject import BEGAN, FOLDS, TEXTS, AlphaFacts, Phases, Subject, say, spoken
from common import RESULTS, circumstances
from torch import Tensor, nn

from mxmoe.calib import Stats
from mxmoe.errors import MxmoeError
from mxmoe.evaluate.folder import find_text, load_folder, read_ids
from mxmoe.evaluate.tiny import FOLDER
from mxmoe.files import write_whole
from mxmoe.ir import Scheme
from mxmoe.transform import activation_profile, plant_outliers

RESERVE = 5.0
"""Seconds before the end at which no plan is begun."""
RESERVE_TO_PREPARE = 25.0
"""The same for a plan whose model must be quantized or observed first."""
SMOKE_SETTINGS = ("2.25", "w5a5", "w4a4", "w8a8")
SMOKE_METHODS = ("squared", "fisher", "mxmoe", "squared, per expert", "random")


class Study:
    """The models, the texts, the clock and the table."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.settings = SMOKE_SETTINGS if options.smoke else tuple(SETTINGS)
        self.phases = Phases()
        with self.phases("load", self.device):
            model = load_folder(options.folder, device=options.device, quiet=True)
            if options.experts:
                model.set_experts_implementation(options.experts)
            self.vocabulary = model.config.vocab_size
            halves = {"held_out": options.tokens, "out_of_domain": options.tokens // 2}
            self.texts = {name: spread(ids, halves[name], options.window) for name, ids in self._texts(TEXTS)}
            self.data = dict(self._texts(["calibration"]))["calibration"]
        self.subjects: dict[tuple[str, str, int], Subject] = {}
        self.rows: list[dict[str, Any]] = []
        options.results.mkdir(parents=True, exist_ok=True)
        self.csv = options.results / f"{options.name}.csv"
        self.saved = time.monotonic()
        self._model: nn.Module = model
        self.notes: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        """Of the run that is resumed, its circumstances."""
        if options.resume and self.csv.exists():
            self._resume()
        self.failed: set[tuple[str, str]] = set()
        self.total = 0
        self.left_out = 0

    def _resume(self) -> None:
        """Take what an earlier run measured, if it measured this model in this way."""
        self.before = json.loads(self.csv.with_suffix(".json").read_text())
        for key, now in (("model", self._trained()), ("texts", self._counts()), ("arguments", self._arguments())):
            was = {name: value for name, value in self.before[key].items() if name != "batch"}
            if was != {name: value for name, value in now.items() if name != "batch"}:
                raise SystemExit(f"{self.csv} has another {key}, {was} and not {now}: leave --resume out")
        self.rows = list(csv.DictReader(io.StringIO(self.csv.read_text())))
        kept = [key for key in self.before if key == "drawn" or key.startswith("max over median")]
        self.notes = {key: self.before[key] for key in kept}

    def _texts(self, names: Sequence[str] | dict[str, str]) -> Generator[tuple[str, Tensor]]:
        for name in names:
            path = find_text(self.options.folder, name)
            if path is not None:
                yield name, read_ids(path, self.options.folder, self.vocabulary).to(self.device)

    def subject(self, name: str, quantizer: str = "", seed: int = 0) -> Subject:
        """Give a model of the study, with scales folded in where the quantizer folds."""
        key = _key(name, quantizer, seed)
        if key not in self.subjects:
            self.subjects[key] = self.subject(name).folded(quantizer, seed) if key[1] else self._plain(name)
        return self.subjects[key]

    def _plain(self, name: str) -> Subject:
        """Prepare a model; planting outliers changes nothing that it computes."""
        with self.phases(f"prepare {name}", self.device):
            model = self._model
            if name == "planted":
                model = copy.deepcopy(model)
                plant_outliers(model, channels=4, factor=32.0, roles=("down",), inputs=self.calibration(0)[:1])
            made = Subject(name, model, self)
            lines = activation_profile(model, self.calibration(0)[:4], quiet=True).lines
            self.notes[f"max over median, {name}"] = {
                role: float(np.median([line.peak for line in lines if line.role == role and line.bank == "routed"]))
                for role in ("gate_up", "down")
            }
        return made

    def calibration(self, seed: int) -> Tensor:
        """Draw windows of the calibration text, [windows, window]; a seed always draws the same."""
        window, count = self.options.window, self.options.calibration // self.options.window
        whole = self.data[: len(self.data) // window * window].view(-1, window)
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
        return whole[order[:count].to(whole.device)]

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.options.seconds - (time.monotonic() - BEGAN)

    def run(self) -> None:
        """Measure plan after plan while there is time."""
        smoke = self.options.smoke
        todo = jobs(range(self.options.seeds), self.settings, SMOKE_METHODS if smoke else ())
        if smoke:
            drawn = [job for job in todo if job.method.startswith("random ")]
            todo = [job for job in todo if job not in drawn[2:]]
        if self.options.quantizers:
            todo = [job for job in todo if job.quantizer in self.options.quantizers and job.model == "study"]
        done = {tuple(row[key] for key in ("model", "quantizer", "seed", "setting", "method")) for row in self.rows}
        todo = [job for job in todo if job.key not in done]
        self._floor()
        self.total = len(self.rows) + len(todo)
        alpha = None if smoke else AlphaFacts(self.subject("study").layouts[False], self.options.workers)
        later: list[Job] = []
        for job in todo:
            if job.method == "alphaq" and (alpha is None or not alpha.is_ready):
                later.append(job)
            else:
                self._try(job, alpha)
        while alpha is not None and later and not alpha.is_ready and self.left > RESERVE:
            time.sleep(0.2)
        for job in later if alpha is not None and alpha.is_ready else ():
            self._try(job, alpha)
        if alpha is not None:
            self.left_out += 0 if alpha.is_ready else len(later)
            alpha.pool.shutdown(wait=False, cancel_futures=True)
        self.save(force=True)

    def _floor(self) -> None:
        """Measure the model as it is through our own forward pass: what is below that cannot be seen."""
        subject = self.subject("study")
        with self.phases("evaluate", self.device, is_loud=False):
            found = subject.measure()
        say(f"unquantized experts in float32: {found}")
        first = {"model": "study", "quantizer": "none", "seed": 0, "setting": "bf16", "method": "all bf16"}
        if not any(row["setting"] == "bf16" for row in self.rows):
            self.rows.append({**first, "weight_bits": 16.0, "payload_bits": 16.0, "act_bits": 16.0, **found})

    def _try(self, job: Job, alpha: AlphaFacts | None) -> None:
        """Measure a plan if there is time; what fails is told, and nothing that rests on it is tried again."""
        rests_on = (job.model, job.quantizer)
        subject = self.subjects.get(_key(job.model, job.quantizer, job.seed))
        is_ready = subject is not None and (job.quantizer, job.seed) in subject.allocators
        if self.left < (RESERVE if is_ready else RESERVE_TO_PREPARE) or rests_on in self.failed:
            self.left_out += 1
            return
        try:
            self._one(job, alpha)
        except (RuntimeError, MxmoeError) as error:  # the plans that were measured are worth more than a clean end
            traceback.print_exc()
            say(f"{job}: {type(error).__name__}; no other plan of {' '.join(rests_on)} is tried")
            self.failed.add(rests_on)

    def _one(self, job: Job, alpha: AlphaFacts | None) -> None:
        """Prepare what a plan needs, solve it, measure it, and note it down."""
        subject = self.subject(job.model, job.quantizer, job.seed)
        shelf, quantize_s, peak = subject.shelf(job.quantizer, job.seed)
        allocator: Allocator | None = None
        observe_s = 0.0
        if not job.is_uniform or job.quantizer.startswith("gptq") or (job.quantizer, job.seed) in subject.allocators:
            allocator, observe_s, observe_peak = subject.allocator(job.quantizer, job.seed)
            peak = max(peak, observe_peak)
            if job.method == "alphaq" and alpha is not None:
                allocator.stats = alpha.into(allocator.stats)
        with self.phases("solve", self.device, is_loud=False):
            helper = allocator or Allocator(shelf.layout, Stats((), {}))
            helper.seconds = 0.0
            choice = helper.plan(job)
        with self.phases("evaluate", self.device, is_loud=False):
            subject.mixed.take(shelf, choice)
            found = subject.measure()
        predictions = {
            f"predicted_{name}": None if allocator is None else allocator.predicted(name, choice)
            for name in ("squared", "fisher")
        }
        self.rows.append(
            {
                **dataclasses.asdict(job),
                **_bits_of(shelf.layout, choice),
                **found,
                **predictions,
                "quantize_s": round(quantize_s, 2),
                "observe_s": round(observe_s, 2),
                "solve_s": round(helper.seconds, 4),
                "evaluate_s": round(self.phases.latest, 3),
                "prepare_peak_gb": round(peak, 2),
                "evaluate_peak_gb": round(self.phases.peak, 2),
            }
        )
        if job.key in {("study", "gptq", "0", setting, "fisher") for setting in ("2.25", "w5a5")}:
            self.notes.setdefault("drawn", {})[job.setting] = _drawn(shelf.layout, choice)
        self.save()

    def save(self, *, force: bool = False) -> None:
        """Write the table, at most every few seconds."""
        if force or time.monotonic() - self.saved > 4:
            columns = list(dict.fromkeys(key for row in self.rows for key in row))
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in self.rows)
            write_whole(self.csv, text.getvalue())
            write_whole(self.csv.with_suffix(".json"), json.dumps(self._about(), indent=1) + "\n")
            self.saved = time.monotonic()
            took = f"{self.phases.latest:.3f} s for the latest"
            say(f"{len(self.rows)} of {self.total} plans; {took}, {self.left:.0f} s are left")

    def _trained(self) -> dict[str, Any]:
        record = Path(self.options.folder) / "training.json"
        trained: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
        known = ("command", "parameters", "shape", "weights_sha256", "perplexity")
        return {key: trained[key] for key in known if key in trained}

    def _counts(self) -> dict[str, int]:
        return {name: len(ids) - 1 for name, ids in self.texts.items()}

    def _arguments(self) -> dict[str, Any]:
        return {key: getattr(self.options, key) for key in ("seeds", "tokens", "calibration", "window", "batch")}

    def _about(self) -> dict[str, Any]:
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else "none"
        command, phases = spoken("accuracy.py", self.options.command), dict[str, float](self.before.get("phases", {}))
        for name, seconds in self.phases.seconds.items():
            phases[name] = round(phases.get(name, 0.0) + seconds, 2)
        return {
            "benchmark": "accuracy",
            **circumstances(),
            "command": "\n    ".join(filter(None, (self.before.get("command"), command))),
            "gpu": gpu,
            "arguments": self._arguments(),
            "model": self._trained(),
            "quantizers": {"rtn": "rtn", "gptq": f"{self.options.gptq} for weights alone, gptq else"},
            "texts": self._counts(),
            "plans": len(self.rows),
            "plans_left_out": self.left_out,
            "wall_seconds": round(self.before.get("wall_seconds", 0.0) + time.monotonic() - BEGAN, 1),
            "phases": phases,
            **self.notes,
        }


def _key(model: str, quantizer: str, seed: int) -> tuple[str, str, int]:
    """Tell apart models whose weights differ."""
    return (model, quantizer, seed) if quantizer in FOLDS else (model, "", 0)


def spread(ids: Tensor, count: int, window: int) -> Tensor:
    """Take `count` tokens and one more in windows that lie evenly over a text: its first files are no sample of it."""
    windows = max(1, count // window)
    if len(ids) <= count + 1:
        return ids
    starts = [round(i * (len(ids) - window - 1) / max(1, windows - 1)) for i in range(windows)]
    return torch.cat([*(ids[start : start + window] for start in starts), ids[-1:]])


def _bits_of(layout: Layout, choice: Sequence[Scheme]) -> dict[str, float]:
    """Average over all weights."""
    distinct = list(dict.fromkeys(choice))
    columns = np.array([distinct.index(scheme) for scheme in choice])
    table, sizes = layout.bits(distinct), layout.sizes
    each = table[np.arange(len(columns)), columns]
    payload = np.array([scheme.payload_bits for scheme in distinct])[columns]
    acts = np.array([scheme.act_bits for scheme in distinct])[columns]
    names, values = ("weight_bits", "payload_bits", "act_bits"), (each, payload, acts)
    return {n: round(float((v * sizes).sum() / sizes.sum()), 5) for n, v in zip(names, values, strict=True)}


def _drawn(layout: Layout, choice: Sequence[Scheme]) -> dict[str, list[float]]:
    """`block bank role` -> bits of every expert, for the picture."""
    found: dict[str, list[float]] = {}
    for row, scheme in zip(layout.rows, choice, strict=True):
        k = layout.lifted.weights[f"{row.block}.{row.bank}.{row.role}"].shape[2]
        found.setdefault(f"{row.block} {row.bank} {row.role}", []).append(scheme.effective_bits(k))
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a transformers folder with its texts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=440.0, help="from the start of the script")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration data")
    parser.add_argument(
        "--tokens", type=int, default=32768, help="held-out tokens of a plan; half as many of the other"
    )
    parser.add_argument("--calibration", type=int, default=65536, help="tokens of calibration data")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32, help="windows at a time")
    parser.add_argument("--workers", type=int, default=14, help="threads for eigenvalues")
    parser.add_argument("--gptq", default="gptq{scales=rtn_mse}", help="the quantizer of weight-only schemes")
    parser.add_argument("--quantizers", nargs="+", help="only these, e.g. rtn; without the planted model")
    parser.add_argument("--name", default="accuracy", help="of the CSV and the JSON")
    parser.add_argument("--experts", help="how transformers runs the experts that are observed, e.g. eager")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="add to the rows that are there")
    parser.add_argument("--smoke", action="store_true", help="a short run of everything, on a CPU")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    options = parser.parse_args(arguments)
    options.folder, options.command = options.folder or FOLDER, list(arguments)
    if options.smoke:
        options.device, options.seeds, options.seconds = "cpu", 1, max(options.seconds, 600.0)
        options.tokens, options.calibration, options.window, options.batch = 256, 1024, 128, 4
        options.gptq = "gptq"
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure, write the table, and make the page of it."""
    options = parse(arguments)
    if not options.page:
        if options.device == "cuda":
            torch.set_num_threads(1)  # the eigenvalues have threads of their own
        study = Study(options)
        study.run()
        totals: dict[str, float] = defaultdict(float)
        for name, seconds in study.phases.seconds.items():
            totals[name.split()[0]] += seconds
        listed = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in totals.items())
        say(f"{len(study.rows)} plans, {study.left_out} left out; {listed}")
    if not (options.results / "accuracy.csv").exists():
        return  # a table of another name stands beside the main one
    try:
        from accuracy_page import write_page  # matplotlib; what was measured is there without it
    except ModuleNotFoundError as error:
        say(f"no page: {error}; write it elsewhere with --page")
        return
    write_page(options.results, options.docs)


if __name__ == "__main__":
    main(sys.argv[1:])
