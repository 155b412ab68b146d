"""How tiles are searched for, and the clock that measures them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.triton import measure, tune, workloads
from mxmoe.backends.triton.choose import by_rule, mean_rows
from mxmoe.backends.triton.measure import random_arena, sweep
from mxmoe.backends.triton.profile import gain_of_mixes, launches, mixed_plan, profile_jobs
from mxmoe.backends.triton.tuned import (
    Tuned,
)
from mxmoe.backends.triton.workloads import Job, Workload, routing, rows_of, schemes_of, turns_of

W8, W4 = "w8a8_sym", "w4a8_g128_sym"
SMALL = Workload(256, 512, False, 8, 2)


@given(
    st.sampled_from(tune.SCHEMES),
    st.sampled_from(tune.WORKLOADS),
    st.sampled_from(tune.TOKENS),
)
@settings(max_examples=50, deadline=None)
def test_a_change_is_of_one_number_and_fits(scheme: str, one: Workload, tokens: int) -> None:
    gemm = one.gemm(scheme)
    rule = by_rule(gemm, tokens, one.top_k)
    own = rule.shapes[0][1]
    found = list(tune.changes(gemm, rule, mean_rows(gemm, tokens, one.top_k)))
    assert len(set(found)) > 3
    for config in found:
        shape = config.shapes[0][1]
        assert shape in tune.deeper(own) or len(tune._differences(rule, config)) <= 1
        fits = shape.width * max(shape.heights) * (1 + one.gated) <= tune.MOST_SUMS
        assert fits or max(shape.heights) * shape.width <= max(own.heights) * own.width
        assert shape.parts == 1 or not one.gated


@given(
    st.sampled_from(["w8a8_sym", "bf16", f"3:{W8}+{W4}"]), st.sampled_from(tune.WORKLOADS), st.sampled_from(tune.TOKENS)
)
@settings(max_examples=40, deadline=None)
def test_a_round_of_launches_outlasts_the_cache(plan: str, one: Workload, tokens: int) -> None:
    job = Job(one, tokens, plan, "")
    rows = sorted(rows_of(job))
    turns = turns_of(job)
    gemm = one.gemm(plan)
    active = np.flatnonzero(rows_of(job)).tolist()
    read = len(turns) * workloads.weight_bytes(gemm, active)
    assert read >= workloads.CACHE or len(turns) == workloads.MOST_TURNS
    for copy, ids in turns:
        assert sorted(np.bincount(ids.ravel(), minlength=one.experts).tolist()) == rows
        assert 0 <= copy < len(turns)
    weights = {(copy, expert) for copy, ids in turns for expert in np.unique(ids).tolist()}
    assert len(weights) == len(turns) * len(active), "no launch of a round finds another's weights"


def test_routings_and_mixes_are_the_same_in_every_run() -> None:
    assert routing(8, 2, 5).tolist() == routing.__wrapped__(8, 2, 5).tolist()
    assert all(len(set(row)) == 2 for row in routing(8, 2, 50).tolist())
    assert schemes_of(f"4:{W8}+{W4}", 60) == schemes_of(f"4:{W8}+{W4}", 60)
    assert {str(one) for one in schemes_of(f"4:{W8}+{W4}", 60)} == {W8, W4}
    assert mixed_plan(5, 0) == mixed_plan(5, 0)


@pytest.mark.parametrize("plan", [W8, "w8a8_e4m3", "bf16", "w4a16_g128_asym", f"2:w3a16_g128_asym+{W4}"])
def test_random_weights_are_finite(plan: str) -> None:
    arena = random_arena(SMALL.gemm(plan), torch.device("cpu"))
    for lane in range(SMALL.experts):
        q = arena.read(0, lane)
        assert q.codes.float().isfinite().all()
        assert q.scale is None or (q.scale.float() - 0.01).abs().max() < 1e-4


class AtOnce:
    """A pool that runs what it is given when it is given."""

    def __init__(self, *_: object, **__: object) -> None:
        self._processes: dict[int, object] = {}

    def submit(self, call: Callable[..., object], *args: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_result(call(*args))
        return future

    def shutdown(self, **_: object) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What would be measured; every config takes its own time, and five stages are one too many."""
    asked: list[Job] = []

    def time_us(_: object, job: Job) -> float:
        asked.append(job)
        if "s5" in job.config:
            raise RuntimeError("out of something")
        return 10.0 + sum(map(ord, job.config)) % 17

    monkeypatch.setattr(measure, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(measure, "compile_group", lambda group: "")
    monkeypatch.setattr(measure.Clock, "time_us", time_us)
    return asked


def test_a_sweep_goes_on_where_it_ended(tmp_path: Path, clock: list[Job]) -> None:
    jobs = tune.first_jobs([SMALL], (16,), [W8])
    path = tmp_path / "measured.csv"
    sweep(jobs[:3], path, seconds=60, workers=1, title="")
    assert sorted(job.config for job in clock) == sorted(job.config for job in jobs[:3])
    rows = sweep(jobs, path, seconds=60, workers=1, title="")
    assert sorted(job.config for job in clock) == sorted(job.config for job in jobs), "none twice"
    assert [Job.of_row(row) for row in rows] == clock
    assert {row["status"] for row in rows} == {"ok", "failed: RuntimeError: out of something"}
    assert sweep(jobs, path, seconds=0, workers=1, title="") == rows


def test_without_time_nothing_is_measured(tmp_path: Path, clock: list[Job]) -> None:
    assert sweep(tune.first_jobs([SMALL], (16,), [W8]), tmp_path / "a.csv", seconds=-1, workers=1, title="") == []
    assert clock == []


def test_what_was_fastest_is_kept(tmp_path: Path, clock: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
    out, measured = tmp_path / "gpu.json", tmp_path / "gpu.csv"
    words = {"workloads": [SMALL], "tokens": (16, 512), "schemes": (W8, W4)}
    found = tune.tune(out, measured, seconds=60, workers=1, **words)
    assert Tuned.loads(out.read_text()).entries == found.entries
    assert {one.scheme for one in found.entries} == {W8, W4, f"{W4}+{W8}"}
    times: dict[tuple[int, str], list[float]] = {}
    for row in measure.read_rows(measured):
        if row["status"] == "ok":
            times.setdefault((int(row["tokens"]), row["plan"].rpartition(":")[2]), []).append(float(row["time_us"]))
    best: dict[tuple[int, str], float] = {}
    for one in found.entries:
        key = (16 if one.rows == 4 else 512, one.scheme)
        best[key] = min(best.get(key, np.inf), one.time_us)
        assert one.time_us <= tune.SLOWEST * min(times[key])
    assert best == {key: min(some) for key, some in times.items()}


def test_launches_come_back_as_they_were_measured(tmp_path: Path, clock: list[Job]) -> None:
    measured, tiles = tmp_path / "p.csv", tmp_path / "t.json"
    rows = sweep(tune.first_jobs([SMALL], (16,), [W8, W4]), measured, seconds=60, workers=1, title="")
    together = tune.make_tuned(rows, "A GPU", mixes=True)
    tiles.write_text(together.dumps())
    jobs = profile_jobs(together, [SMALL], (16,), [W8, W4])
    rows = sweep(jobs, tmp_path / "q.csv", seconds=60, workers=1, title="")
    found = launches(tmp_path / "q.csv", tiles)
    assert 2 <= len(found) <= len(rows)
    for n, k, load, us in found:
        assert (n, k) == (256, 512)
        assert sum(rows * experts for counts in load.values() for rows, experts in counts.items()) == 32
        assert us > 0
    assert gain_of_mixes([], together) is None
