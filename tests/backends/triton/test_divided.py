"""Launches that read rows sorted by expert: when they are chosen, what they are given, and how they are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from mxmoe.backends.triton import choose_ada, hopper, measure, tune, workloads
from mxmoe.backends.triton.choose import by_rule, mean_rows
from mxmoe.backends.triton.choose_ada import choose, config_for
from mxmoe.backends.triton.launch import Epilogue, reads_sorted, run_gemm
from mxmoe.backends.triton.measure import Clock, add_rows, read_rows
from mxmoe.backends.triton.profile import gain_of_mixes, launches, profile_jobs
from mxmoe.backends.triton.tiles import Config, Gemm, Shape
from mxmoe.backends.triton.tuned import DIVIDED, WHOLE, Entry, Tuned, current_hashes, kind_of, parse_config
from mxmoe.backends.triton.tuned import spell_config as spell
from mxmoe.backends.triton.workloads import FIELDS, Job, Workload
from mxmoe.errors import WrongTiles
from mxmoe.ir import Scheme

from .small_blocks import DEVICE, Pair, Small

W8, W4, WIDE = "w8a8_sym", "w4a8_g128_sym", "w4a16_g128_asym"
SMALL = Workload(256, 512, True, 8, 2)
FITTING = ("bf16", W8, "w8a8_e4m3", W4, f"{W4}_e4m3", f"{W4}_iscale")
ALL, LOW = hopper.HEIGHTS, (16,)
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run there; others stand in for them here")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no sm_90 device"
)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """What is chosen depends on what tests patch."""
    choose.cache_clear()
    yield
    choose.cache_clear()


def gemm_of(*names: str) -> Gemm:
    return Gemm(2048, 1408, tuple(Scheme.parse(names[i % len(names)]) for i in range(60)))


def divided_of(gemm: Gemm, heights: tuple[int, ...] = ALL) -> Config:
    found = hopper.config_for(gemm, heights)
    assert found is not None
    return found


def entry(config: Config, us: float, rows: float = 4.0, active: int = 60, gated: bool = False) -> Entry:
    scheme = "+".join(name for name, _ in config.shapes)
    return Entry(2048, 1408, gated, rows, active, scheme, config, us, 30.0)


def file_of(*entries: Entry, kinds: tuple[str, ...] = (WHOLE, DIVIDED), mixes: bool = True) -> Tuned:
    hashes = {kind: current_hashes()[kind] for kind in kinds}
    return Tuned("A GPU", "any", hashes, entries, mixes)


@given(st.integers(1, 8192), st.sampled_from((W8, WIDE)))
def test_where_nothing_was_measured_what_fits_is_divided(tokens: int, name: str) -> None:
    gemm = gemm_of(name)
    rule = hopper.by_rule(gemm, mean_rows(gemm, tokens, 4))
    assert (rule is not None) == (name == W8)
    assert choose(gemm, tokens, 4, 90, None, divides=True) == (rule or by_rule(gemm, tokens, 4))
    assert choose(gemm, tokens, 4, 90, None, divides=False) == by_rule(gemm, tokens, 4)


@pytest.mark.parametrize(("whole", "divided"), [(20.0, 25.0), (25.0, 20.0)])
def test_the_faster_kind_is_taken_where_both_were_measured(whole: float, divided: float) -> None:
    gemm = gemm_of(W8)
    ours, theirs = parse_config("w4g2 w8a8_sym=16x64k128s4"), divided_of(gemm, LOW)
    for rows in (4.0, 200.0):
        tuned, tokens = file_of(entry(ours, whole, rows), entry(theirs, divided, rows)), int(rows) * 15
        assert choose(gemm, tokens, 4, 90, tuned, divides=True) == (ours if whole < divided else theirs)
        assert choose(gemm, tokens, 4, 90, tuned, divides=False) == ours


def test_a_file_that_knows_no_divided_kernel_leaves_them_to_the_rule() -> None:
    gemm, ours = gemm_of(W8), parse_config("w8g2 w8a8_sym=64x64k128s4")
    tuned = file_of(entry(ours, 20.0, 200.0), kinds=(WHOLE,))
    assert choose(gemm, 3000, 4, 90, tuned, divides=True) == hopper.by_rule(gemm, 200.0)
    tuned = file_of(entry(ours, 20.0, 200.0))
    assert choose(gemm, 3000, 4, 90, tuned, divides=True) == ours


def test_a_class_far_from_all_measured_ones_is_left_to_the_rule() -> None:
    gemm = gemm_of(W8)
    tuned = file_of(entry(divided_of(gemm, LOW), 20.0))
    for tokens in (300, 3000):
        rule = hopper.by_rule(gemm, mean_rows(gemm, tokens, 4))
        assert choose(gemm, tokens, 4, 90, tuned, divides=True) == rule != divided_of(gemm, LOW)


def test_schemes_measured_apart_share_the_kind_and_heights_that_are_fastest_together() -> None:
    both, alone = gemm_of(W8, W4), (gemm_of(W8), gemm_of(W4))
    times = {ALL: (10.0, 30.0), LOW: (15.0, 18.0)}
    entries = [
        entry(divided_of(g, h), us) for h, both_us in times.items() for g, us in zip(alone, both_us, strict=True)
    ]
    whole = [entry(parse_config(f"w4g2 {name}=16x64k128s3"), 18.0) for name in (W8, W4)]
    found = choose(both, 60, 4, 90, file_of(*entries, *whole), divides=True)
    assert found == divided_of(both, LOW)
    assert kind_of(choose(both, 60, 4, 90, file_of(*entries, *whole), divides=False)) == WHOLE
    assert choose(both, 60, 4, 90, file_of(*entries, mixes=False), divides=True) == hopper.by_rule(both, 4.0)
    # one scheme has no divided kernel
    mixed = gemm_of(W8, WIDE)
    whole = [entry(parse_config(f"w4g2 {name}=16x64k128s3"), 18.0) for name in (W8, WIDE)]
    assert kind_of(choose(mixed, 60, 4, 90, file_of(*entries, *whole), divides=True)) == WHOLE


def test_launches_with_another_end_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "runs_on", lambda _device: True)
    monkeypatch.setattr(choose_ada, "tuned_for", lambda _device: None)
    monkeypatch.setattr(choose_ada, "arch_of", lambda _device: 90)
    gemm, device = gemm_of(W8), torch.device("cuda")
    assert reads_sorted(config_for(gemm, 4096, 4, device))
    assert not reads_sorted(config_for(gemm, 4096, 4, device, is_plain=True))
    assert not reads_sorted(config_for(gemm, 4096, 4, torch.device("cpu")))
    monkeypatch.setattr(choose_ada, "arch_of", lambda _device: 89)
    assert not reads_sorted(config_for(gemm, 4096, 4, device))


@given(st.sampled_from(tune.SCHEMES), st.sampled_from(tune.WORKLOADS), st.sampled_from(tune.TOKENS))
@settings(max_examples=40, deadline=None)
def test_divided_configs_are_measured_in_every_class_before_changes(scheme: str, one: Workload, tokens: int) -> None:
    jobs = tune.first_jobs([one], (tokens,), (scheme,), divides=True)
    kinds = [kind_of(parse_config(job.config)) for job in jobs]
    count = kinds.count(DIVIDED)
    fits = scheme in FITTING
    # fewer tiles than SMs, where parts of k would give more
    is_small = not one.gated and one.active(tokens) * -(-one.n // 128) < 132
    assert count >= 2 if fits and not is_small else count == 0
    assert kinds == [WHOLE, *[DIVIDED] * count, *[WHOLE] * (len(jobs) - 1 - count)]
    assert [job for job in jobs if kind_of(parse_config(job.config)) == WHOLE] == tune.first_jobs(
        [one], (tokens,), (scheme,)
    )
    rows = mean_rows(one.gemm(scheme), tokens, one.top_k)

    def suits(shape: Shape) -> bool:
        tall = shape.heights
        return min(tall) <= max(16, 2 * rows) and max(tall) >= min(rows, 128) / 2 and (rows >= 32 or not shape.together)

    assert all(suits(parse_config(job.config).shapes[0][1]) for job in jobs[1 : 1 + count])
    # and all that the kernel offers of such heights
    wanted = sum(suits(config.shapes[0][1]) for config in hopper.candidates(one.gemm(scheme)) if fits)
    assert count == (0 if is_small else wanted)


def measured(*jobs: Job, us: dict[str, float]) -> list[dict[str, str]]:
    """Rows of a file of measurements: of each kind so many microseconds, a little more for every job."""
    return [
        {**dict(zip(FIELDS, job.key, strict=False)), "status": "ok",
         "time_us": f"{us[kind_of(parse_config(job.config))] + 0.01 * at:.3f}"}
        for at, job in enumerate(jobs)
    ]  # fmt: skip


def test_the_fastest_of_either_kind_is_kept() -> None:
    jobs = tune.first_jobs([SMALL], (16, 2048), (W8, W4, WIDE), divides=True)
    rows = measured(*jobs, us={WHOLE: 100.0, DIVIDED: 10.0})
    found = tune.make_tuned(rows, "A GPU", mixes=True)
    assert set(found.kernels) == {WHOLE, DIVIDED}
    for tokens in (16, 2048):
        for name in (W8, W4):
            gemm = SMALL.gemm(name)
            assert reads_sorted(choose(gemm, tokens, 2, 90, found, divides=True))
            whole = choose(gemm, tokens, 2, 90, found, divides=False)
            assert whole == by_rule(gemm, tokens, 2), "the first of its kind is the fastest here"
    assert set(tune.make_tuned(rows[:1], "A GPU").kernels) == {WHOLE}
    assert all(kind_of(parse_config(job.config)) == WHOLE for job in tune.second_jobs(rows))


def test_sets_of_schemes_are_divided_too() -> None:
    sets = (f"{W4}+{W8}",)
    jobs = tune.set_jobs([], [SMALL], (16, 2048), sets, divides=True)
    kinds = {(job.tokens, kind_of(parse_config(job.config))) for job in jobs}
    assert kinds == {(16, WHOLE), (16, DIVIDED), (2048, WHOLE), (2048, DIVIDED)}
    assert {job.plan for job in jobs} == {f"{tune.SET_SEED}:{W4}+{W8}"}
    assert all(kind_of(parse_config(job.config)) == WHOLE for job in tune.set_jobs([], [SMALL], (16, 2048), sets))


def test_what_is_known_is_not_measured_again_but_for_the_rule(tmp_path: Path) -> None:
    jobs = tune.first_jobs([SMALL], (16, 512), (W8, W4), divides=True)
    jobs += tune.set_jobs([], [SMALL], (16,), (f"{W4}+{W8}",), divides=True)
    rows = measured(*jobs, us={WHOLE: 100.0, DIVIDED: 90.0})
    tuned = tune.make_tuned(rows, "A GPU")
    add_rows(tmp_path / "a.csv", tune.known_rows(tuned, [SMALL], (16, 512)))
    add_rows(tmp_path / "a.csv", tune.known_rows(tuned, [SMALL], (16, 512)))
    known = read_rows(tmp_path / "a.csv")
    rules = {job.key: by_rule(job.workload.gemm(job.plan), job.tokens, 2) for job in jobs}
    assert all(row in rows for row in known)
    assert not any(parse_config(Job.of_row(row).config) == rules[Job.of_row(row).key] for row in known)
    kept = [one for one in tuned.entries if one.config not in rules.values()]
    assert len(known) == len(kept) > 4
    again = tune.make_tuned([row for row in rows if parse_config(row["config"]) in rules.values()] + known, "A GPU")
    assert again.entries == tuned.entries


def test_a_profile_is_of_what_will_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "ENOUGH_ROWS", {"dense": 96.0, "nibbles": 96.0, "scaled": 96.0})
    jobs = tune.first_jobs([SMALL], (16, 2048), (W8, W4, f"{W4}_iscale"), divides=True)
    tuned = tune.make_tuned(measured(*jobs, us={WHOLE: 100.0, DIVIDED: 10.0}), "A GPU", mixes=True)
    (tmp_path / "tiles.json").write_text(tuned.dumps())
    asked = profile_jobs(tuned, [SMALL], (16, 2048), (W8, W4, WIDE), divides=True)
    alone = {(job.tokens, job.plan): job for job in asked if ":" not in job.plan}
    for (tokens, plan), job in alone.items():
        assert job.config == spell(choose(SMALL.gemm(plan), tokens, 2, 90, tuned, divides=True))
        assert reads_sorted(parse_config(job.config)) == (plan != WIDE)
    rows = measured(*asked, us={WHOLE: 100.0, DIVIDED: 10.0})
    add_rows(tmp_path / "found.csv", rows)
    times = [us for *_, us in launches(tmp_path / "found.csv", tmp_path / "tiles.json")]
    assert {us < 50 for us in times} == {True, False}
    # mixes of few rows are divided because they were measured, those of many by rule as well
    gain = gain_of_mixes(rows, tuned)
    assert gain is not None
    assert gain > 1.5


def whole_instead(matrices: Any, config: Config, *given: Any, **options: bool) -> None:  # noqa: ANN401
    """Stand in for `hopper.run_hopper`: the whole kernel, in the same tiles."""
    assert reads_sorted(config)
    run_gemm(matrices, replace(config, warps=8, per_sm=0), *given, gather=False, **options)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Divide whatever fits, by a kernel that can be interpreted; gives the configs of its launches."""
    ran: list[Config] = []

    def run(matrices: Any, config: Config, *given: Any, **options: bool) -> None:  # noqa: ANN401
        ran.append(config)
        whole_instead(matrices, config, *given, **options)

    monkeypatch.setattr(hopper, "run_hopper", run)
    monkeypatch.setattr(hopper, "ENOUGH_ROWS", {"dense": 0.0, "nibbles": 0.0, "scaled": 0.0})
    monkeypatch.setattr(choose_ada, "_divides", lambda _device: True)
    monkeypatch.setattr(choose_ada, "arch_of", lambda _device: 90)
    return ran


BLOCKS = (
    Small(tuple(map(Scheme.parse, (W4, W8, "bf16"))), 128, 192, top_k=3),
    Small(tuple(map(Scheme.parse, ("w8a8_e4m3", "w4a8_g128_sym_e4m3"))), 192, 128, has_bias=True, turn=32),
    Small(tuple(map(Scheme.parse, (W8, W4))), 128, 128, is_tied=False),
    Small(tuple(map(Scheme.parse, (W8, "bf16"))), 128, 128, act="relu2", gated=False),
)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("small", BLOCKS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
def test_a_block_with_sorted_rows_equals_the_definition(small: Small, tokens: int, stand_in: list[Config]) -> None:
    pair = Pair.of(small)
    pair.check(small.tokens(tokens, 1), small.routing(tokens, 2), is_traced=small.has_bias and tokens == 5)
    # what ends in an activation that no gate precedes, and gate and up apart, are whole
    fused = small.gated and small.is_tied
    assert bool(tokens) == bool(stand_in)
    assert not tokens or len(stand_in) >= (2 if fused else 1)


def test_a_launch_that_reads_sorted_rows_gathers_none() -> None:
    gemm = gemm_of(W8)
    given: Any = (None,) * 5
    with pytest.raises(AssertionError, match="sorted by expert"):
        run_gemm(given[0], divided_of(gemm), given[1], given[2], 0, given[3], Epilogue(), gather=True)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("gated", [True, False])
def test_the_clock_charges_sorting_and_compares_results(
    gated: bool, stand_in: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def graph_us(calls: list[Any], **_: object) -> float:
        for call in calls:
            call()
        asked.append(len(calls))
        sorts = "begin" in str(calls[0].func) and calls[0].keywords["is_sorted"]
        return 7.0 if sorts else 4.0 if "begin" in str(calls[0].func) else 100.0

    monkeypatch.setattr(measure, "graph_us", graph_us)
    monkeypatch.setattr(workloads, "CACHE", 1.0)
    one = Workload(128, 256, gated, 4, 2)
    clock = Clock(torch.device("cpu"))
    gemm = one.gemm(W8)
    whole = Job(one, 6, W8, spell(by_rule(gemm, 6, 2)))
    divided = Job(one, 6, W8, spell(divided_of(gemm)))
    assert clock.time_us(whole) == 100.0
    assert not stand_in
    assert clock.time_us(divided) == (103.0 if gated else 100.0)
    assert clock.time_us(replace(divided, config=spell(divided_of(gemm, LOW)))) == (103.0 if gated else 100.0)
    assert len(stand_in) == 4
    assert len(asked) == (5 if gated else 3), "how long sorting takes is measured once"

    def wrong(*given: Any, **options: bool) -> None:  # noqa: ANN401
        whole_instead(*given, **options)
        given[5].mul_(1.1)

    monkeypatch.setattr(hopper, "run_hopper", wrong)
    with pytest.raises(WrongTiles):
        clock.time_us(divided)


MIXED = Small(tuple(map(Scheme.parse, (W4, W8, "bf16"))), 256, 384, 8, 2)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("small", [*BLOCKS, MIXED], ids=str)
def test_a_divided_block_equals_the_definition(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "ENOUGH_ROWS", {"dense": 0.0, "nibbles": 0.0, "scaled": 0.0})
    monkeypatch.setattr(choose_ada, "tuned_for", lambda _device: None)
    pair = Pair.of(small)
    bank: Any = pair.triton["mlp"]
    fused = small.gated and small.is_tied
    assert reads_sorted(bank.banks["routed"].configs(1, small.top_k)[0]) == fused
    assert reads_sorted(bank.banks["routed"].configs(1, small.top_k)[-1])
    for tokens in (0, 1, 3, 40, 70, 600, 2500):
        pair.check(small.tokens(tokens, tokens), small.routing(tokens, 2), is_traced=small.has_bias and tokens == 40)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("tokens", [1, 16, 1500])
def test_a_divided_graph_is_replayed_over_changing_routings(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "ENOUGH_ROWS", {"dense": 0.0, "nibbles": 0.0, "scaled": 0.0})
    monkeypatch.setattr(choose_ada, "tuned_for", lambda _device: None)
    run = Pair.of(MIXED).triton["mlp"]

    def given(seed: int) -> list[torch.Tensor]:
        routed = MIXED.routing(tokens, seed)
        index = routed.index.where(torch.rand(routed.index.shape) < 0.5, 8) if seed % 2 else routed.index
        return [tensor.cuda() for tensor in (MIXED.tokens(tokens, seed), index, routed.weights)]

    held = given(0)
    run("routed", *held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run("routed", *held)
    for seed in range(8):
        for place, tensor in zip(held, given(seed), strict=True):
            place.copy_(tensor)
        graph.replay()
        assert torch.equal(out.clone(), run("routed", *held)), f"routing {seed}"
