"""Profiles from measured launches: what is fitted predicts launches that it has not seen."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxmoe.cost import Gemm, Law, Measured, Observation, Profile, TileTime, fit_profile, predict_launch_us
from mxmoe.cost import measured as module
from mxmoe.cost.fit import rising
from mxmoe.device import DEVICES
from mxmoe.errors import BadWorkload
from mxmoe.ir import Scheme, Tile

H200 = DEVICES["h200"]
SCHEMES = [Scheme.parse(name) for name in ("w4a8_g128_sym", "w8a8_sym", "w4a16_g128_asym")]
HEIGHTS = (16, 32, 64, 128)
ALONE = dict(zip(SCHEMES, (0.7, 0.9, 1.4), strict=True))
LAW = Law(
    4.2, 3.0, ALONE,
    {SCHEMES[0]: (1.1, 1.3, 1.2, 1.5), SCHEMES[1]: (1.0, 1.05, 1.1, 1.0), SCHEMES[2]: (1.25, 1.0, 1.0, 1.4)},
)  # fmt: skip
STREAM = (5.0, 9.5, 6.0)
REUSE = ((2.0, 2.8, 4.6, 9.0), (2.2, 2.9, 4.5, 8.0), (4.0, 5.5, 9.0, 17.0))
SHAPES = ((2816, 2048, 60, 4), (4096, 14336, 8, 2), (4096, 7168, 256, 8))


def truth() -> Profile:
    rows = {
        scheme: {
            Tile(height, 128, 128): TileTime(max(stream, each), each)
            for height, each in zip(HEIGHTS, reuse, strict=True)
        }
        for scheme, stream, reuse in zip(SCHEMES, STREAM, REUSE, strict=True)
    }
    return Profile("h200", 2048, 0.4, rows, LAW)


def use(profile: Profile, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    folder.mkdir()
    (folder / "h200.json").write_text(profile.dumps(H200.sms))
    monkeypatch.setattr(module, "DATA", folder)
    return Measured(H200)


def gemm(seed: int, tokens: int, scheme: Scheme | None) -> Gemm:
    rng = np.random.default_rng(seed)
    n, k, experts, top_k = SHAPES[seed % len(SHAPES)]
    share = 1 / (rng.permutation(experts) + 3.0)
    rows = np.minimum(rng.multinomial(tokens * top_k, share / share.sum()), tokens)
    mix = rng.dirichlet(np.ones(len(SCHEMES)))
    drawn = rng.choice(len(SCHEMES), size=experts, p=mix)
    return Gemm(n, k, tuple(rows.tolist()), tuple(SCHEMES[i] if scheme is None else scheme for i in drawn))


def observe(one: Gemm, us: float) -> Observation:
    load: dict[Scheme, Counter[int]] = {}
    for rows, scheme in zip(one.rows, one.schemes, strict=True):
        if rows:
            load.setdefault(scheme, Counter())[rows] += 1
    return Observation(one.n, one.k, load, us)


TOKENS = (1, 16, 64, 512, 2048)


def test_a_known_law_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = use(truth(), tmp_path / "truth", monkeypatch)
    rng = np.random.default_rng(0)

    def launches(first: int, kinds: list[Scheme | None]) -> list[tuple[Gemm, float]]:
        made = [
            gemm(first + 97 * at + kind, tokens, scheme)
            for kind, scheme in enumerate(kinds)
            for at, tokens in enumerate(TOKENS * 3)
        ]
        return [(one, predict_launch_us(exact, [one])) for one in made]

    seen = launches(0, [*SCHEMES, None, None])
    noisy = [observe(one, us * float(rng.lognormal(0, 0.03))) for one, us in seen]
    found = use(fit_profile(noisy, H200, rounds=60, quiet=True), tmp_path / "found", monkeypatch)
    new = launches(10_000, [None, None])
    errors = [abs(predict_launch_us(found, [one]) / us - 1) for one, us in new]
    assert np.median(errors) < 0.03
    assert max(errors) < 0.25


def test_what_is_fitted_is_what_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search adds tiles up by itself; the profile that it gives must mean the same to the cost model."""
    exact = use(truth(), tmp_path / "truth", monkeypatch)
    made = [
        gemm(7 * at + kind, tokens, scheme)
        for kind, scheme in enumerate([*SCHEMES, None])
        for at, tokens in enumerate(TOKENS)
    ]
    seen = [observe(one, 1.5 * predict_launch_us(exact, [one]) + 3) for one in made]
    from mxmoe.cost.fit import _Fit, _profile, _short

    monkeypatch.setattr("mxmoe.cost.fit._short", float)
    state = _Fit(seen, H200)
    profile = _profile(state, H200)
    assert _short(1.23456) == 1.235
    model = use(profile, tmp_path / "first", monkeypatch)
    predicted = [predict_launch_us(model, [one]) for one in made]
    assert np.log(predicted) == pytest.approx(state.errors() + state.time, abs=1e-6)


def test_a_profile_with_a_law_survives_its_file(tmp_path: Path) -> None:
    text = truth().dumps(H200.sms)
    path = tmp_path / "h200.json"
    path.write_text(text)
    again = Profile.read(path)
    assert again == truth()
    assert again.dumps(H200.sms) == text
    assert json.loads(text)["slots"] == H200.sms


@pytest.mark.parametrize(("busy", "longest"), [(10.0, 2.0), (2.0, 10.0), (5.0, 5.0)])
def test_a_law_lies_between_the_larger_and_the_sum(busy: float, longest: float) -> None:
    us = LAW.launch(busy, longest) - LAW.launch_us
    assert max(busy, longest) <= us <= busy + longest


def test_company_costs_what_the_profile_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = use(truth(), tmp_path / "truth", monkeypatch)
    one = Gemm(2816, 2048, (300,) * 60, (SCHEMES[0],) * 60)
    mixed = Gemm(2816, 2048, (300,) * 60, (SCHEMES[0],) * 59 + (SCHEMES[1],))
    idle = Gemm(2816, 2048, (300,) * 60 + (0,), (SCHEMES[0],) * 60 + (SCHEMES[1],))
    assert predict_launch_us(model, [idle]) == predict_launch_us(model, [one])
    packed = Gemm(2816, 2048, (300,) * 60, (SCHEMES[0],) * 59 + (SCHEMES[2],))
    assert predict_launch_us(model, [mixed]) > 1.15 * predict_launch_us(model, [one])
    assert predict_launch_us(model, [packed]) > 1.1 * predict_launch_us(model, [mixed])
    assert predict_launch_us(model, []) == 0


@given(st.lists(st.floats(-5, 5), max_size=12))
def test_what_rises_is_the_nearest(values: list[float]) -> None:
    found = rising(values)
    assert all(a <= b + 1e-9 for a, b in pairwise(found))
    assert sum(found) == pytest.approx(sum(values), abs=1e-6)
    assert rising(sorted(values)) == pytest.approx(sorted(values))
    # no shift of the end by itself brings it nearer: the last pool is a mean of the last values, and none is lower
    assert not values or found[-1] == pytest.approx(max(np.mean(values[at:]) for at in range(len(values))))


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(BadWorkload, match="0 measured launches"):
        fit_profile([], H200)
    int4 = Observation(128, 128, {Scheme.parse("w4a4_sym"): {3: 1}}, 5.0)
    with pytest.raises(BadWorkload, match="cannot run"):
        fit_profile([int4], H200)
