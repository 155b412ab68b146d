"""Observers: what is printed, timed, kept, dumped and logged."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from hypothesis import given, settings

from mxmoe.ir import ModuleOp, Table, linears, moe_ops, parse_ir, plan_of, print_ir
from mxmoe.passes import (
    Dump,
    Environment,
    KeepStages,
    Log,
    LogTables,
    LowerToGroupGemm,
    Observer,
    PrintAfterAll,
    TimePasses,
    histogram,
    parse_passes,
    run_passes,
)
from mxmoe.testing import modules

from .modules import small, small_bank, small_stats


def watched(observer: Observer, text: str = "default", module: ModuleOp | None = None) -> ModuleOp:
    done = small() if module is None else module
    return run_passes(done, parse_passes(text), Environment(small_stats(done)), [observer])


def test_every_pass_is_printed_with_its_options_and_its_module() -> None:
    stream = io.StringIO()
    watched(PrintAfterAll(stream), "annotate-routing,annotate-cost{tokens=4}")
    first, second = stream.getvalue().split("// ---- after ")[1:]
    assert first.startswith("annotate-routing\nbuiltin.module")
    assert second.startswith("annotate-cost{tokens=4}\nbuiltin.module")
    assert "cost=" in second


def test_long_tables_are_elided_unless_told_otherwise() -> None:
    short, whole = io.StringIO(), io.StringIO()
    for observer in (PrintAfterAll(short), PrintAfterAll(whole, elide=None)):
        watched(observer, "annotate-cost", small(small_bank(experts=20)))
    assert "elided" in short.getvalue()
    assert "elided" not in whole.getvalue()


def test_times_are_summed_by_pass() -> None:
    clock = TimePasses()
    watched(clock, "annotate-cost,annotate-routing,annotate-cost")
    assert list(clock.seconds) == ["annotate-cost", "annotate-routing"]
    assert all(seconds > 0 for seconds in clock.seconds.values())
    *rows, total = clock.table().splitlines()
    assert len(rows) == 2
    assert re.fullmatch(r" *[\d.]+ ms  total", total)


def test_stages_are_kept_whole_as_the_last_pass_left_them() -> None:
    kept = KeepStages()
    before = print_ir(small(), elide=None)
    module = watched(kept)
    assert list(kept.texts) == ["lifted", "annotated", "allocated", "lowered"]
    assert kept.texts["lifted"] == before
    assert kept.texts["lowered"] == print_ir(module, elide=None)
    annotated = parse_ir(kept.texts["annotated"])
    assert all(op.sensitivity and op.cost for op in linears(annotated))


def test_a_dump_is_numbered_and_every_file_parses(tmp_path: Path) -> None:
    module = watched(Dump(tmp_path / "deep" / "dump"), "annotate-routing,annotate-cost", small(small_bank(experts=20)))
    files = sorted((tmp_path / "deep" / "dump").iterdir())
    assert [file.name for file in files] == ["00-input.mlir", "01-annotate-routing.mlir", "02-annotate-cost.mlir"]
    assert [moe_ops(parse_ir(file.read_text()))[0].stage for file in files] == ["lifted", "annotated", "annotated"]
    assert files[-1].read_text() == print_ir(module, elide=None)


def test_the_log_has_a_line_a_pass_and_one_for_the_allocation() -> None:
    stream = io.StringIO()
    watched(Log(stream), "default")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 7
    assert re.fullmatch(r"mxmoe: annotate-routing  [\d.]+ ms", lines[0])
    assert re.fullmatch(r"mxmoe: weight_bits <= 5: [\d.]+ bits, loss .*, .* us, gap .* by lagrangian", lines[4])


def test_the_tables_log_says_what_is_new_and_nothing_twice() -> None:
    stream = io.StringIO()
    module = small(small_bank(gated=False))
    text = "annotate-routing,annotate-cost,annotate-cost,annotate-sensitivity,allocate-bits"
    watched(LogTables(stream), text, module)
    lines = stream.getvalue().splitlines()
    counts = ", ".join(f"{scheme} x {n}" for scheme, n in plan_of(module).histogram().items())
    assert lines[0] == "mxmoe:   layers.0.mlp routed frequency: expert=3, f32 0.33 .. 1"
    assert [line.split(":")[1].split()[-1] for line in lines[:-1]] == [
        "frequency", "mass", "cost", "cost", "sensitivity", "sensitivity", "choice", "choice",
    ]  # fmt: skip
    assert lines[-1] == f"mxmoe:   {counts}"


def test_impossible_entries_are_counted() -> None:
    stream = io.StringIO()
    module = small(small_bank(gated=False))
    log = LogTables(stream)
    (step,) = parse_passes("annotate-cost")
    log.before(step, module)
    linears(module)[0].set_table("cost", Table(("expert", "scheme"), np.array([[1.0, 2.5, np.inf]] * 3)))
    linears(module)[1].set_table("cost", Table(("expert", "scheme"), np.full((3, 3), np.inf)))
    log.after(step, module)
    first, second = stream.getvalue().splitlines()
    assert first.endswith("1 .. 2.5, 3 not finite")
    assert second.endswith("nothing finite, 9 not finite")


@given(modules("allocated"))
@settings(max_examples=25, deadline=None)
def test_lowering_leaves_the_histogram_alone(module: ModuleOp) -> None:
    counts = histogram(module)
    assert counts == plan_of(module).histogram()
    assert histogram(run_passes(module, [LowerToGroupGemm()], Environment())) == counts
