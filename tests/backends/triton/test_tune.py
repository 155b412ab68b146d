"""Measured tiles: found by shape class, left alone where they do not hold, and how they are searched for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.triton import measure, tune, tuned, workloads
from mxmoe.backends.triton.choose import by_rule, mean_rows
from mxmoe.backends.triton.measure import random_arena, sweep
from mxmoe.backends.triton.profile import gain_of_mixes, launches, mixed_plan, profile_jobs
from mxmoe.backends.triton.tiles import DIVIDED_WARPS, HEIGHTS, WIDTHS, Config, Gemm, Shape
from mxmoe.backends.triton.tuned import (
    DIVIDED,
    WHOLE,
    Entry,
    Tuned,
    current_hashes,
    for_device,
    hash_functions,
    tuned_config,
)
from mxmoe.backends.triton.workloads import Job, Workload, routing, rows_of, schemes_of, turns_of
from mxmoe.errors import BadTiles
from mxmoe.ir import Scheme

W8, W4 = "w8a8_sym", "w4a8_g128_sym"
SMALL = Workload(256, 512, False, 8, 2)


def config_of(text: str) -> Config:
    return tuned.parse_config(text)


TALL, LOW = "w12g8p1 w8a8_sym=16,32,64,128x256k128s4", "w12g8p1 w8a8_sym=16x256k128s4"


def entry(text: str, us: float, **other: object) -> Entry:
    config = config_of(text)
    fields = {"n": 2048, "k": 1408, "gated": False, "rows": 4.0, "active": 60, "rule_us": 30.0}
    return Entry(**(fields | {"scheme": config.shapes[0][0], "config": config, "time_us": us} | other))


def file_of(
    *entries: Entry, kernels: dict[str, str] | None = None, triton: str | None = None, mixes: bool = True
) -> Tuned:
    import triton as installed

    return Tuned("A GPU", triton or installed.__version__, kernels or dict(current_hashes()), entries, mixes)


def gemm_of(*names: str, n: int = 2048, k: int = 1408) -> Gemm:
    return Gemm(n, k, tuple(Scheme.parse(names[i % len(names)]) for i in range(60)))


SHAPES = st.builds(
    Shape,
    st.sets(st.sampled_from(HEIGHTS), min_size=1).map(lambda some: tuple(sorted(some))),
    *(st.sampled_from(WIDTHS), st.sampled_from((64, 128)), st.integers(1, 8), st.integers(1, 8)),
    *(st.booleans(), st.booleans()),
)
CONFIGS = st.builds(
    Config,
    st.sampled_from((4, 8, 12)),
    st.dictionaries(st.sampled_from((W8, W4, "bf16")), SHAPES, min_size=1).map(lambda some: tuple(some.items())),
    *(st.integers(0, 4), st.sampled_from((1, 8)), st.none() | st.integers(32, 255), st.integers(0, 4)),
)


@given(CONFIGS)
@settings(max_examples=50, deadline=None)
def test_configs_survive_their_spelling(config: Config) -> None:
    assert config_of(tuned.spell_config(config)) == config


@pytest.mark.parametrize("text", ["w4 w8a8_sym=16x64k128s4", "g2 w8a8_sym=16x64k128s4", "w4g2 w8a8_sym=16x64"])
def test_what_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(BadTiles):
        config_of(text)


def test_a_file_survives_its_text() -> None:
    made = file_of(entry("w4g2r96 w8a8_sym=16,32x128k128s4/2", 21.5), entry("w8g2 w8a8_sym=16x128k128s4", 25.0))
    again = Tuned.loads(made.dumps())
    assert (again.entries, again.device, again.mixes) == (made.entries, made.device, made.mixes)
    assert again.kernels == made.kernels == current_hashes()
    assert made.dumps().count("\n") < 10, "an entry is a line"


def test_the_nearest_class_decides_and_its_fastest_run() -> None:
    fast = entry("w4g2 w8a8_sym=16x64k128s4", 20.0)
    slow = entry("w8g2 w8a8_sym=16x128k128s4", 25.0)
    other = entry("w4g2 w8a8_sym=32x128k128s4", 5.0, rows=7.0)
    gemm = gemm_of(W8)
    rule = by_rule(gemm, 60, 4)
    assert tuned_config(file_of(slow, fast, other), gemm, 60, 4, rule) == fast.config
    assert tuned_config(file_of(slow, fast, other), gemm, 100, 4, rule) == other.config


@pytest.mark.parametrize("far", [{"n": 8192}, {"k": 64}, {"rows": 64.0}, {"gated": True}, {"scheme": W4}])
def test_an_unlisted_shape_is_cut_by_rule_and_says_so_once(far: dict, caplog: pytest.LogCaptureFixture) -> None:
    tuned._say_unlisted.cache_clear()
    found = file_of(entry("w4g2 w8a8_sym=16x64k128s4", 20.0, **far))
    gemm = gemm_of(W8)
    with caplog.at_level(logging.WARNING, "mxmoe"):
        for tokens in (60, 61):
            assert tuned_config(found, gemm, tokens, 4, by_rule(gemm, tokens, 4)) is None
    (line,) = caplog.messages
    assert "n=2048 k=1408" in line
    assert "a rule chooses" in line


def test_a_call_without_tokens_is_cut_like_one_with_one() -> None:
    gemm = gemm_of(W8)
    one = entry("w4g2 w8a8_sym=16x64k128s4", 20.0, rows=1.0, active=1)
    assert tuned_config(file_of(one), gemm, 0, 4, by_rule(gemm, 0, 4)) == one.config


@pytest.mark.parametrize(
    ("other", "said"), [({"kernels": {WHOLE: "0123", DIVIDED: "4567"}}, "divided 4567"), ({"triton": "1.0"}, "1.0")]
)
def test_a_file_of_other_kernels_or_triton_is_left_alone_in_one_line(
    other: dict, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gpu.json").write_text(file_of(entry("w4g2 w8a8_sym=16x64k128s4", 20.0), **other).dumps())
    with caplog.at_level(logging.WARNING, "mxmoe"):
        assert for_device("A GPU", tmp_path) is None
        assert for_device("A GPU", tmp_path) is None
        assert for_device("Another", tmp_path) is None
    (line,) = caplog.messages
    assert "are not used" in line
    assert said in line


@pytest.mark.parametrize("stale", [WHOLE, DIVIDED])
def test_entries_of_kernels_that_have_not_changed_stay(
    stale: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = {WHOLE: entry("w4g2 w8a8_sym=16x64k128s4", 20.0), DIVIDED: entry(TALL, 25.0)}
    kernels = dict(current_hashes()) | {stale: "0123"}
    (tmp_path / "gpu.json").write_text(file_of(*entries.values(), kernels=kernels).dumps())
    with caplog.at_level(logging.WARNING, "mxmoe"):
        found = for_device("A GPU", tmp_path)
    (kept,) = {WHOLE, DIVIDED} - {stale}
    assert found is not None
    assert found.entries == (entries[kept],)
    assert set(found.kernels) == {kept}
    (line,) = caplog.messages
    assert f"{stale} 0123 are not used" in line
    assert current_hashes()[stale] in line


def test_a_current_file_is_used_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gpu.json").write_text(file_of(entry("w4g2 w8a8_sym=16x64k128s4", 20.0)).dumps())
    found = for_device("A GPU", tmp_path)
    assert found is not None
    assert len(found.entries) == 1
    assert not caplog.messages


def test_nothing_is_tuned_for_what_is_no_gpu() -> None:
    assert tuned.tuned_for(torch.device("cpu")) is None


def test_shipped_files_can_be_read() -> None:
    for path in tuned.DATA.glob("*.json"):
        for one in Tuned.loads(path.read_text()).entries:
            assert "+".join(name for name, _ in one.config.shapes) == one.scheme
            assert one.config.warps in (4, 8, DIVIDED_WARPS)
            assert one.time_us > 0


CODE = """
STEP, OTHER = 1, 5
"What it adds."

@jit
def root(x: tl.tensor, N: tl.constexpr) -> None:
    "Says something."
    leaf(x + STEP, N)  # a comment

# another module
@jit
def leaf(x, N: tl.constexpr):
    return x

@jit
def third(x):
    return x
"""


def hashed(text: str) -> str:
    return hash_functions(text.split("# another module"), "root")


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("Says something.", "Says more.", True),
        ("  # a comment", "", True),
        ("x: tl.tensor", "x", True),
        ("x + STEP", "x + 2", False),
        ("STEP, OTHER = 1", "STEP, OTHER = 2", False),
        ("What it adds", "What is added", True),
        ("tl.constexpr):\n    return x", "tl.constexpr):\n    return -x", False),
        ("(x, N: tl.constexpr):", "(x, N):", False),
        ("def third(x):\n    return x", "def third(x):\n    return -x", True),
    ],
)
def test_the_hash_follows_what_is_compiled(before: str, after: str, same: bool) -> None:
    assert (hashed(CODE) == hashed(CODE.replace(before, after))) is same


def test_mixes_keep_their_tiles_and_share_a_run() -> None:
    entries = (
        entry("w4g2 w8a8_sym=16x64k128s4", 20.0),
        entry("w8g2 w8a8_sym=32x64k128s4/2", 22.0),
        entry("w4g2 w4a8_g128_sym=16x64k128s3", 30.0),
        entry("w8g2 w4a8_g128_sym=32x64k128s3", 12.0),
        entry("w8g2r96 w4a8_g128_sym=64x64k128s3", 2.0),
    )
    gemm = gemm_of(W8, W4)
    rule = by_rule(gemm, 60, 4)
    found = tuned_config(file_of(*entries), gemm, 60, 4, rule)
    parts = rule.shapes[0][1].parts
    assert (found.warps, found.registers, found.grouping) == (8, None, rule.grouping)
    assert {name: replace(shape, parts=1) for name, shape in found.shapes} == {
        W8: Shape.parse("32x64k128s4"),
        W4: Shape.parse("32x64k128s3"),
    }
    assert {shape.parts for _, shape in found.shapes} == {parts}
    assert tuned_config(file_of(*entries, mixes=False), gemm, 60, 4, rule) is None
    # nothing in common
    assert tuned_config(file_of(entries[0], entries[4]), gemm, 60, 4, rule) is None


def test_deep_steps_of_one_scheme_do_not_take_the_memory_of_all() -> None:
    entries = (
        entry("w4g2 w8a8_sym=16x64k256s3", 10.0),
        entry("w4g2 w8a8_sym=16x64k128s4", 12.0),
        entry("w4g2 w4a8_g128_sym=16x64k128s3", 30.0),
    )
    alone, both = gemm_of(W8), gemm_of(W8, W4)
    found = tuned_config(file_of(*entries), alone, 60, 4, by_rule(alone, 60, 4))
    assert found.shape(alone.distinct[0]).depth == 256
    found = tuned_config(file_of(*entries), both, 60, 4, by_rule(both, 60, 4))
    assert {shape.depth for _, shape in found.shapes} == {128}


def test_a_set_that_was_measured_comes_first() -> None:
    both = entry(f"w4g2 {W4}=16x64k128s3 {W8}=16x64k128s4", 50.0, scheme=f"{W4}+{W8}")
    alone = [entry(f"w8g2 {name}=32x64k128s3", 1.0) for name in (W4, W8)]
    gemm = gemm_of(W8, W4)
    assert tuned_config(file_of(*alone, both, mixes=False), gemm, 60, 4, by_rule(gemm, 60, 4)) == both.config


def test_the_kernel_names_what_is_hashed() -> None:
    assert set(current_hashes()) == {WHOLE, DIVIDED}
    with pytest.raises(AssertionError, match="no function another"):
        hash_functions([CODE], "another")


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
