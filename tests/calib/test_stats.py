"""Statistics as numbers: the fallback, norms, merging, and files that come back as they were."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe import calib
from mxmoe.calib import BANK_MEAN, BankStats, Stats
from mxmoe.errors import BadOption, BrokenStats, NotInStats, StatsMismatch
from mxmoe.ir import Scheme

SCHEMES = (Scheme.parse("w4a16_sym"), Scheme.parse("w8a8_sym"))
TOKENS = np.array([100, 3, 300, 0])
ERROR = np.array([[200.0, 20.0], [999.0, 999.0], [300.0, 60.0], [0.0, 0.0]])


def bank(tokens: np.ndarray = TOKENS, error: np.ndarray = ERROR) -> BankStats:
    half = tokens / 2
    facts = {"norm": {"up": half + 1, "down": half + 2, "router": half}, "alpha": {"up": half}}
    fisher = {"up": error * 5, "down": error * 6}
    return BankStats(200, tokens, half, half * 3, {"up": error, "down": 2 * error}, "block", half * 2, fisher, facts)


def make(min_tokens: int = 10) -> Stats:
    shared = BankStats(200, np.array([200]), np.ones(1), np.ones(1), {"up": np.array([[4.0, 1.0]])}, "bank")
    return Stats(SCHEMES, {("b", "routed"): bank(), ("b", "shared"): shared}, min_tokens, macs=7)


def equal(one: Stats, other: Stats) -> bool:
    fields = ("schemes", "min_tokens", "data_free", "routing", "macs")
    if any(getattr(one, f) != getattr(other, f) for f in fields) or one.banks.keys() != other.banks.keys():
        return False
    for key, sums in one.banks.items():
        there = other.banks[key]
        if (sums.n_tokens, sums.measured_at) != (there.n_tokens, there.measured_at):
            return False
        pairs = [(getattr(sums, f), getattr(there, f)) for f in ("tokens", "mass", "squared_output")]
        pairs += [(error, there.squared_error[role]) for role, error in sums.squared_error.items()]
        if sums.fisher_error.keys() != there.fisher_error.keys() or sums.facts.keys() != there.facts.keys():
            return False
        pairs += [(error, there.fisher_error[role]) for role, error in sums.fisher_error.items()]
        for fact, table in sums.facts.items():
            if table.keys() != there.facts[fact].keys():
                return False
            pairs += [(values, there.facts[fact][role]) for role, values in table.items()]
        if (sums.output_norm is None) != (there.output_norm is None):
            return False
        if sums.output_norm is not None:
            pairs.append((sums.output_norm, there.output_norm))
        if not all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs):
            return False
    return True


def test_experts_with_few_tokens_take_the_bank_mean() -> None:
    got = make().sensitivity("b", "routed", "up")
    # experts 0 and 2: 500 over 400 tokens and 80 over 400
    np.testing.assert_allclose(got, [[200, 20], [3 * 1.25, 3 * 0.2], [300, 60], [1.25, 0.2]])
    assert make().few_tokens() == {("b", "routed"): (1, 3)}
    assert BANK_MEAN in make().report()
    assert "1, 3" in make().report()


def test_the_report_says_how_many_tokens_experts_saw() -> None:
    assert "tokens per expert: 0 to 300, median 51.5; 2 experts under 10, 1 without any" in make().report()
    (coverage,) = make().coverage().values()
    share = TOKENS / TOKENS.sum()
    assert (coverage.least, coverage.median, coverage.most) == (0, 51.5, 300)
    assert (coverage.under, coverage.none) == (2, 1)
    assert coverage.imbalance == pytest.approx(share.std())
    assert Stats((), {}).coverage() == {}


def test_errors_as_the_loss_sees_them_have_the_same_fallback() -> None:
    np.testing.assert_allclose(bank().fisher("up", 10), 5 * bank().squared("up", 10))
    with pytest.raises(StatsMismatch):
        Stats(SCHEMES, {("b", "routed"): replace(bank(), fisher_error={"up": ERROR[:2]})})


def test_files_of_old_are_read(tmp_path: Path) -> None:
    """Without what was added since."""
    path = tmp_path / "stats.npz"
    make().save(path)
    with np.load(path) as archive:
        kept = {
            n: archive[n] for n in archive.files if not any(f".{new}" in n for new in ("fisher", "fact", "output_n"))
        }
    np.savez(path, **kept)
    old = Stats.load(path).bank("b", "routed")
    assert (old.output_norm, old.fisher_error, old.facts) == (None, {}, {})
    assert Stats.load(path).merge(Stats.load(path)).bank("b", "routed").output_norm is None


def test_the_report_says_the_error_per_token() -> None:
    stats = make()
    keys = [(*key, role) for key, sums in stats.banks.items() for role in sums.squared_error]
    mean = np.concatenate([stats.per_token(*key) for key in keys]).mean(axis=0)
    wanted = ", ".join(f"{scheme} {value:.3g}" for scheme, value in zip(SCHEMES, mean, strict=True))
    assert f"per token, mean of all linears: {wanted}" in stats.report()
    assert Stats((), {}).report().startswith("banks: 0")


def test_without_a_well_observed_expert_all_tokens_count() -> None:
    got = make(1000).sensitivity("b", "routed", "up")
    np.testing.assert_allclose(got[:, 0], np.array([100, 3, 300, 1]) * 1499 / 403)


def test_no_threshold_means_the_sums_themselves() -> None:
    np.testing.assert_array_equal(make(0).sensitivity("b", "routed", "up"), ERROR)
    assert make(0).few_tokens() == {}


def test_norms_and_normalised_figures() -> None:
    stats = make()
    squared = stats.sensitivity("b", "routed", "down")
    np.testing.assert_allclose(stats.sensitivity("b", "routed", "down", norm="unsquared") ** 2, squared)
    np.testing.assert_allclose(stats.per_token("b", "routed", "down") * 200, squared)
    np.testing.assert_allclose(stats.relative("b", "routed", "down") * TOKENS.sum() * 1.5, squared)
    np.testing.assert_array_equal(stats.sensitivity("b", "routed", "down", ["w8a8_sym"])[:, 0], squared[:, 1])
    reverse = stats.sensitivity("b", "routed", "down", SCHEMES[::-1])
    np.testing.assert_array_equal(reverse, squared[:, ::-1])


def test_what_was_not_observed_is_named() -> None:
    stats = make()
    with pytest.raises(NotInStats, match=r"w2a16_sym.*w4a16_sym, w8a8_sym"):
        stats.sensitivity("b", "routed", "up", ["w2a16_sym"])
    with pytest.raises(NotInStats, match=r"'gate' of b\.routed.*up, down"):
        stats.sensitivity("b", "routed", "gate")
    with pytest.raises(NotInStats, match=r"b\.routed, b\.shared"):
        stats.bank("c", "routed")
    with pytest.raises(BadOption, match="cubed"):
        stats.sensitivity("b", "routed", "up", norm="cubed")  # type: ignore[arg-type]


def test_shapes_must_fit() -> None:
    with pytest.raises(StatsMismatch, match=r"b\.routed"):
        Stats(SCHEMES[:1], {("b", "routed"): bank()})
    with pytest.raises(StatsMismatch, match=r"b\.routed"):
        Stats(SCHEMES, {("b", "routed"): bank(tokens=TOKENS[:3])})
    with pytest.raises(BadOption, match="min_tokens"):
        Stats((), {}, -1)


def test_merge_adds_sums() -> None:
    total = make().merge(make(), make(99))
    sums = total.bank("b", "routed")
    assert (sums.n_tokens, total.macs, total.min_tokens) == (600, 21, 10)
    np.testing.assert_array_equal(sums.squared_error["down"], 6 * ERROR)
    np.testing.assert_array_equal(sums.tokens, 3 * TOKENS)
    np.testing.assert_allclose(total.per_token("b", "routed", "up")[0], make().per_token("b", "routed", "up")[0])
    assert equal(make().merge(), make())


@pytest.mark.parametrize(
    "other",
    [
        Stats(SCHEMES[::-1], make().banks),
        Stats(SCHEMES, {("b", "routed"): bank()}),
        Stats(SCHEMES, make().banks, data_free=True),
        Stats(SCHEMES, make().banks, routing="uniform"),
        Stats(SCHEMES, {**make().banks, ("b", "routed"): bank(TOKENS[:2], ERROR[:2])}),
    ],
)
def test_merge_refuses_other_things(other: Stats) -> None:
    with pytest.raises(StatsMismatch):
        make().merge(other)


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "stats.npz"
    make().save(path)
    assert equal(Stats.load(path), make())
    make(99).save(path)
    assert Stats.load(path).min_tokens == 99
    assert [p.name for p in path.parent.iterdir()] == ["stats.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats.npz"
    make().save(path)

    def fail(*args: object, **named: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        make(99).save(path)
    monkeypatch.undo()
    assert equal(Stats.load(path), make())
    assert [p.name for p in tmp_path.iterdir()] == ["stats.npz"]


@functools.cache
def saved(folder: Path) -> bytes:
    make().save(folder / "good.npz")
    return (folder / "good.npz").read_bytes()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damage_is_found_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    good = saved(folder)
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.booleans())
    path = folder / "bad.npz"
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))] if cut else bytes(bad))
    try:
        found = Stats.load(path)
    except BrokenStats as error:
        assert str(path) in str(error)  # noqa: PT017  # a flipped byte in a time stamp is harmless, so no raises()
    else:
        assert not cut
        assert equal(found, make())


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stats.npz"
    with pytest.raises(BrokenStats, match="No such file"):
        Stats.load(path)
    path.write_bytes(content)
    with pytest.raises(BrokenStats, match=r"stats\.npz"):
        Stats.load(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, header=np.frombuffer(b'{"format": "other"}', np.uint8))
    with pytest.raises(BrokenStats, match="other"):
        Stats.load(path)
    np.savez(path, header=np.frombuffer(b'{"format": "mxmoe-stats-1"}', np.uint8))
    with pytest.raises(BrokenStats, match="banks"):
        Stats.load(path)


def test_statistics_need_no_torch() -> None:
    code = "import sys, mxmoe.calib as c; c.Stats((), {}); assert 'torch' not in sys.modules; c.observe; c.Reduction"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        _ = calib.nothing  # type: ignore[attr-defined]
