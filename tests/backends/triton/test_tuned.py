"""Measured tiles: found by shape class, left alone where they do not hold."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.backends.triton import tuned
from mxmoe.backends.triton.choose import by_rule
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
from mxmoe.errors import BadTiles
from mxmoe.ir import Scheme

W8, W4 = "w8a8_sym", "w4a8_g128_sym"


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
