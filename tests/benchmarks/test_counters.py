"""Counters: which cells are run, what ncu is told, and how its table becomes rows."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counters
import pytest
from counters import LOG, RANGES, Profiler, Wanted, main, names_of, run_all, wanted
from counters_read import METRICS, known_metrics, markdown, parse_ncu, rows_of, split_ranges, top_stalls
from group_gemm import STUB
from moe_contender import Contender, Prepared, Unsupported
from moe_workloads import MODELS, Cell

CELL = Cell(MODELS["tiny"], 16, "gate_up")
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NCU = f"""==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 7 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"gpu__time_duration.sum","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",\
"{STALL.format("gmma")}","{STALL.format("barrier")}","{STALL.format("selected")}"
"","","","","","","","","","","","nsecond","%","inst","inst","inst"
"0","4711","python3.12","127.0.0.1","spin_kernel(long)","1","7","(1, 1, 1)","(1, 1, 1)","0","9.0",\
"2,112","0","0","0","1"
"1","4711","python3.12","127.0.0.1","_index","1","7","(128, 1, 1)","(4, 1, 1)","0","9.0","3,040","0","n/a","0.5","1"
"2","4711","python3.12","127.0.0.1","_product","1","7","(384, 1, 1)","(132, 1, 1)","0","9.0",\
"1,303,840","61.25","4.125","0.75","1"
"3","4711","python3.12","127.0.0.1","spin_kernel(long)","1","7","(1, 1, 1)","(1, 1, 1)","0","9.0",\
"2,080","0","0","0","1"
"4","4711","python3.12","127.0.0.1","_other","1","7","(256, 1, 1)","(64, 1, 1)","0","9.0","90,000","40","0.1","2.5","1"
"5","4711","python3.12","127.0.0.1","spin_kernel(long)","1","7","(1, 1, 1)","(1, 1, 1)","0","9.0",\
"2,080","0","0","0","1"
"""


def about(place: int, contender: str) -> dict[str, Any]:
    names = {"model": "mixtral", "tokens": 512, "part": "down", "weight_class": "8bit"}
    return {"place": place, **names, "contender": contender}


RUN = [about(2, "b"), about(0, "a"), about(1, "c")]


def test_ncu_s_table_is_read_without_messages_and_units() -> None:
    found = parse_ncu(NCU)
    assert [one.name for one in found] == [
        "spin_kernel(long)", "_index", "_product", "spin_kernel(long)", "_other", "spin_kernel(long)",
    ]  # fmt: skip
    assert found[2].values["gpu__time_duration.sum"] == 1303840
    assert found[1].values[STALL.format("gmma")] != found[1].values[STALL.format("gmma")]
    assert found[2].grid == "(132, 1, 1)"
    assert parse_ncu("==ERROR== No kernels were profiled.\n") == []


def test_a_range_is_what_follows_its_marker_and_its_longest_kernel_counts() -> None:
    kernels = parse_ncu(NCU)
    assert [[one.name for one in part] for part in split_ranges(kernels[1:])] == [["_other"], []]
    rows, missing = rows_of(RUN, kernels)
    # in the order in which they were asked for
    assert [(row["contender"], row["kernel"], row["kernels"]) for row in rows] == [
        ("a", "_other", 1),
        ("b", "_product", 2),
    ]
    assert rows[1]["time_us"] == "1303.84"
    assert rows[1]["tensor_pct"] == "61.25"
    assert rows[1]["dram_pct"] == ""
    assert missing == ["mixtral 512 down c: no kernel was measured"]
    with pytest.raises(ValueError, match="3 markers"):
        rows_of(RUN[:2], kernels)


def test_the_page_names_why_warps_wait() -> None:
    rows, _ = rows_of(RUN, parse_ncu(NCU))
    assert top_stalls(rows[1]) == "gmma 4.1, barrier 0.75"
    lines = markdown(rows).splitlines()
    assert lines[2].startswith("| mixtral 512 down | a | 90.0 | - | 40 |")
    assert lines[3].startswith("|  | b | 1303.8 |")
    assert len({line.count("|") for line in lines}) == 1


def test_metrics_that_ncu_does_not_know_are_dropped() -> None:
    listing = "Chip GH100\n-----\ngpu__time_duration   Counter  nsecond  duration\ndram__throughput  Throughput  %\n"
    known, dropped = known_metrics(listing)
    assert [one.column for one in known] == ["time_us", "dram_pct"]
    assert len(known) + len(dropped) == len(METRICS)
    assert known_metrics("==ERROR== unknown chip\n") == (list(METRICS), [])
    assert len({one.column for one in METRICS}) == len(METRICS)


def test_a_class_stands_for_the_fastest_of_both_sides(tmp_path: Path) -> None:
    results = tmp_path / "found.csv"
    names = ("model", "tokens", "routing", "part", "contender", "weight_class", "format", "time_us", "status")
    times = {"ours_w8a8_sym": 9, "ours_w8a8_e4m3": 8, "tk_fp8": 7, "vllm_fp8": 6}
    with results.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(("mixtral", 512, "skew", "down", name, "8bit", name, us, "ok") for name, us in times.items())
    _, found = names_of("mixtral/512/down/8bit,4bit,ours_bf16,vllm_fp8", results)
    assert found == ["ours_w8a8_e4m3", "vllm_fp8", "ours_bf16"]
    ranges = wanted(["mixtral/512/down/8bit", "qwen15_moe/1/down/vllm_fp8", "mixtral/512/gate_up/vllm_fp8"], results)
    assert [one.place for one in ranges] == [2, 0, 1, 3]
    with pytest.raises(SystemExit, match="models are"):
        names_of("gpt/512/down/8bit", results)


class Counting(Profiler):
    """Counts launches in place of measuring them."""

    def __init__(self) -> None:
        self.measured = 0

    def measure(self, launch: Callable[[], Any]) -> None:
        launch()
        self.measured += 1


def test_what_breaks_is_noted_and_the_rest_runs() -> None:
    def make(cell: Cell, device: str) -> Prepared:
        raise Unsupported("no package")

    broken = Contender("broken", "8bit", "fp8", lambda _: 8.0, 1.0, "fp8", make)
    lines: list[dict[str, Any]] = []
    profiler = Counting()
    run_all([Wanted(1, CELL, broken), Wanted(0, CELL, STUB)], 60, "cpu", profiler, lines.append)
    assert [line.get("skipped") for line in lines] == ["no package", None]
    assert profiler.measured == 1
    run_all([Wanted(0, CELL, STUB)], -1, "cpu", profiler, lines.append)
    assert lines[-1]["skipped"] == "the time was up"
    assert profiler.measured == 1


def test_a_dry_run_shows_cells_and_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert "mixtral 512 down ours_hot025 mixed" in lines
    assert lines[-1].startswith("ncu --profile-from-start off --clock-control none")
    assert lines[-1].endswith("--folder FOLDER --child")


def test_a_folder_is_read_into_three_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    lines = [*RUN, {**about(3, "d"), "skipped": "no package"}]
    (tmp_path / LOG).write_text(NCU)
    (tmp_path / RANGES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / counters.FACTS).write_text('{"gpu": "a GPU"}')
    out = tmp_path / "out" / "counters.csv"
    main(["--folder", str(tmp_path), "--read", "--out", str(out)])
    with out.open(newline="") as file:
        assert [row["kernel"] for row in csv.DictReader(file)] == ["_other", "_product"]
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["gpu"] == "a GPU"
    assert [line.split(": ")[1] for line in facts["skipped"]] == ["no package", "no kernel was measured"]
    assert "_product" not in out.with_suffix(".md").read_text()
    assert "gmma 4.1" in out.with_suffix(".md").read_text()
