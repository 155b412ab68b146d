"""The training script, run as a user runs it, on a toy model; and the laws of its text."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[2] / "examples"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
RESULTS = {"config.json", "model.safetensors", "training.json", "calibration.txt", "held_out.txt", "loss_curve.png"}


@pytest.fixture(scope="module")
def text() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("tiny_moe_text")
    sys.path.remove(str(EXAMPLES))


def train(out: Path, folder: Path, *arguments: str) -> str:
    """Run the script on the toy model and return what it prints."""
    command = [sys.executable, EXAMPLES / "train_tiny_moe.py", "--out", out, "--text", folder, "--device", "cpu"]
    toy = ["--tiny", "--batch", "8", "--evaluate-every", "5", "--held-out-bytes", "8192", "--text-bytes", "16384"]
    return subprocess.run([*command, *toy, *arguments], check=True, text=True, capture_output=True, timeout=300).stdout


def test_it_trains_writes_every_file_and_says_so(tmp_path: Path) -> None:
    printed = train(tmp_path / "out", STDLIB / "email", "--steps", "20")
    assert {path.name for path in (tmp_path / "out").iterdir()} == RESULTS
    record = json.loads((tmp_path / "out/training.json").read_text())
    losses = [point[1] for point in record["curve"]]
    assert losses[-1] < losses[0]
    assert record["steps"] == 20
    assert "held-out perplexity" in printed
    assert str(tmp_path) not in record["command"]
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["model_sha256"]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118  # not a mapping
    parts = record["text"]["parts"]
    for name in ("calibration.txt", "held_out.txt"):
        content = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == parts[name]["sha256"]
        for path in parts[name]["files"]:
            assert (STDLIB / "email" / path).read_bytes() in content
    for layer in record["routing"]:
        assert sum(layer["frequency"]) == pytest.approx(1, abs=1e-3)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    import torch

    out = tmp_path / "out"
    script = (
        "import sys, train_tiny_moe as t\n"
        "write = t.Trainer.evaluate\n"
        "def stop(self, loss):\n"
        "    write(self, loss)\n"
        "    if self.progress.step == 10: sys.exit(7)\n"
        "t.Trainer.evaluate = stop\n"
        "t.main(sys.argv[1:])\n"
    )
    common = ["--text", STDLIB / "email", "--device", "cpu", "--tiny", "--batch", "8", "--evaluate-every", "5"]
    small = ["--held-out-bytes", "8192", "--text-bytes", "16384", "--steps", "20"]
    command = [sys.executable, "-c", script, "--out", out, *common, *small]
    assert subprocess.run(command, cwd=EXAMPLES, capture_output=True, timeout=300).returncode == 7
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt"}
    assert torch.load(out / "checkpoint.pt")["progress"]["step"] == 10
    assert "resumed at step 10" in train(out, STDLIB / "email", "--steps", "20")
    whole = tmp_path / "whole"
    train(whole, STDLIB / "email", "--steps", "20")
    resumed, straight = (json.loads((path / "training.json").read_text())["curve"] for path in (out, whole))
    assert resumed == straight


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * 100)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        train(tmp_path / "out", tmp_path)
    assert "too few Python sources" in caught.value.stderr


def test_parts_share_no_file_and_no_content(text: ModuleType) -> None:
    parts = text.read_corpus(STDLIB / "email").parts
    paths = [path for files in parts.values() for path, _ in files]
    contents = [content for files in parts.values() for _, content in files]
    assert len(set(paths)) == len(paths) > 20
    assert len(set(contents)) == len(contents)
    assert all(text.part_of(path) == part for part, files in parts.items() for path, _ in files)


def test_an_archive_and_a_folder_are_the_same_text(text: ModuleType, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "text.tar.xz", "w:xz") as archive:
        archive.add(STDLIB / "email", ".")
    assert text.read_corpus(tmp_path / "text.tar.xz") == text.read_corpus(STDLIB / "email")


@pytest.mark.parametrize(
    ("path", "content", "kept"),
    [
        ("a/b.py", b"x = 1\n" * 20, True),
        ("encodings/cp037.py", b"x = 1\n" * 20, False),
        ("site-packages/x.py", b"x = 1\n" * 20, False),
        ("a.py", b"\xff\xfe" * 60, False),
        ("a.py", b"\0" * 100, False),
        ("a.py", b"x", False),
        ("a.py", b"x" * 1_000_000, False),
    ],
)
def test_what_counts_as_text(text: ModuleType, path: str, content: bytes, kept: bool) -> None:
    assert text.is_prose_or_code(path, content) is kept


def test_kinds_of_bytes(text: ModuleType) -> None:
    source = b"if x1 == 'a b': # no\n  y = 12"
    letters = dict(zip(text.KINDS, "scnk0_.", strict=True))
    found = "".join(letters[text.KINDS[kind]] for kind in text.byte_kinds(source).tolist())
    assert found == "kk_nn_.._sssss._cccc___n_._00"


@settings(max_examples=100, deadline=None)
@given(source=st.binary(max_size=80))
def test_every_byte_has_a_kind(text: ModuleType, source: bytes) -> None:
    kinds = text.byte_kinds(source)
    assert len(kinds) == len(source)
    assert all(0 <= kind < len(text.KINDS) for kind in kinds.tolist())
