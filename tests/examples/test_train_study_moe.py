"""The study model's script, run as a user runs it, on a toy model; and the laws of its text and its measures."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

EXAMPLES = Path(__file__).parents[2] / "examples"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
TOKEN_FILES = {"calibration.bin", "held_out.bin", "out_of_domain.bin"}
RESULTS = TOKEN_FILES | {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}

HEADER = """#pragma once
// The {number}th of a row of headers.
struct Header{number} {{
  int first_{number} = {number};
  template <typename T> T twice_{number}(T value) const {{ return value + value * {number}; }}
  static constexpr bool is_number_{number} = true;
}};
"""


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def module(name: str) -> ModuleType:
    return importlib.import_module(f"study_moe_{name}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for package in ("asyncio", "email", "http", "json", "logging", "unittest"):
        for file in sorted((STDLIB / package).glob("*.py")):
            (folder / f"{package}_{file.name}").write_bytes(file.read_bytes())
    for number in range(24):
        (folder / f"header{number}.h").write_text(HEADER.format(number=number))
    return folder


def train(out: Path, source: Path, *arguments: str | Path) -> str:
    """Run the script on the toy model and return what it prints."""
    command = [sys.executable, EXAMPLES / "train_study_moe.py", "--out", out, "--source", source, "--smoke"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--device", "cpu", *arguments], text=True, capture_output=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_trains_writes_a_folder_that_loads_and_says_so(tmp_path: Path, source: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "study"
    printed = train(out, source, "--pack", tmp_path / "packed")
    assert {file.name for file in out.iterdir()} == RESULTS
    record = json.loads((out / "training.json").read_text())
    assert record["training"]["steps"] == 24
    assert record["curve"][-1][3] < record["curve"][0][3]
    assert str(tmp_path) not in record["command"]
    assert "held_out: perplexity" in printed
    for name, digest in record["weights_sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    model = AutoModelForCausalLM.from_pretrained(out)
    assert sum(weight.numel() for weight in model.parameters()) == record["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    for name in TOKEN_FILES:
        content = (out / name).read_bytes()
        about = record["token_files"][name]
        assert hashlib.sha256(content).hexdigest() == about["sha256"]
        assert len(content) == 2 * about["tokens"]
    ids = torch.frombuffer(bytearray((out / "held_out.bin").read_bytes()), dtype=torch.uint16).long()
    files = tokenizer.decode(ids).split("<|endoftext|>")[:-1]
    assert sum(len(file.encode()) for file in files) == record["token_files"]["held_out.bin"]["text_bytes"]
    assert {file.encode() for file in files} <= {file.read_bytes() for file in source.glob("*.py")}
    assert tokenizer(files[0])["input_ids"] == ids.tolist()[: len(tokenizer(files[0])["input_ids"])]
    packed = b"".join(file.read_bytes() for file in sorted((tmp_path / "packed").glob("study.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert {Path(name).name for name in archive.getnames()} == RESULTS | {"study"}
    page = module("page").render([record, record])
    assert f"{record['perplexity']['held_out']['per_byte']:.4f}" in page
    assert page.count(record["command"]) == 2


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, source: Path) -> None:
    script = (
        "import sys, study_moe_trainer as s, train_study_moe as t\n"
        "write = s.Trainer.evaluate\n"
        "def stop(self, loss):\n"
        "    write(self, loss)\n"
        "    if self.progress.step == 8: self.save(); sys.exit(7)\n"
        "s.Trainer.evaluate = stop\n"
        "t.main(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, "--out", out, "--source", source, "--smoke", "--device", "cpu"]
    assert subprocess.run(command, capture_output=True, timeout=300, env=environment).returncode == 7
    assert {file.name for file in out.iterdir()} == {"checkpoint.pt"}
    assert "resumed at step 8" in train(out, source)
    train(tmp_path / "whole", source)
    resumed, straight = (
        json.loads((folder / "training.json").read_text())["curve"] for folder in (out, tmp_path / "whole")
    )
    assert [point[2:] for point in resumed] == [point[2:] for point in straight]


def test_the_loss_is_the_models_own() -> None:
    trainer, forward = module("trainer"), module("forward")
    torch.manual_seed(1)
    model = trainer.build_model(trainer.SHAPES["smoke"], 0.001)
    windows = torch.randint(0, 512, (2, 33))
    loss, _, used = forward.StudyLoss(compiled=False)(model, windows)
    own = model(input_ids=windows[:, :-1], output_router_logits=True)
    expected = torch.nn.functional.cross_entropy(own.logits.flatten(0, 1), windows[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for share, logits in zip(used, own.router_logits, strict=True):
        counts = torch.bincount(logits.topk(2, -1).indices.flatten(), minlength=4)
        torch.testing.assert_close(share, counts / counts.sum())


@pytest.mark.parametrize(
    ("text", "permissive"),
    [
        ("MIT", True),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("(MIT OR Apache-2.0) AND BSD-2-Clause", True),
        ("ISC License (ISCL)", True),
        ("Apache Software License", True),
        ("MPL-2.0 AND MIT", False),
        ("GPL-3.0-or-later", False),
        ("LicenseRef-NVIDIA-Proprietary", False),
        ("Other/Proprietary License", False),
        ("", False),
    ],
)
def test_licences(text: str, permissive: bool) -> None:
    assert module("text").is_permissive(text) is permissive


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"value = compute(first, second)\n" * 20, True),
        (b"x", False),
        (b"\xff\xfe" * 400, False),
        (b"\0" * 400, False),
        (b"0123456789, " * 40, False),
        (b"word " * 1000, False),
    ],
)
def test_what_counts_as_text(content: bytes, kept: bool) -> None:
    assert module("text").is_text(content) is kept


def test_parts_share_no_file_and_few_lines(source: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "twice"
    shutil.copytree(source, folder)
    for file in sorted(source.glob("*.py")):
        (folder / f"copy_of_{file.name}").write_bytes(file.read_bytes() + b"# a line that makes the copy differ\n")
    text = module("text").read_text(folder, 10**9)
    kept = [document for documents in text.parts.values() for document in documents]
    assert text.record["near_copies_left_out"] >= len(list(source.glob("*.py"))) / 2
    lines = [{line.strip() for line in one.content.split(b"\n") if len(line.strip()) >= 16} for one in kept]
    for i, first in enumerate(lines):
        for second in lines[:i]:
            assert len(first & second) <= 0.61 * max(len(first), 8)
    assert text.record["parts"]["train"]["bytes"] == sum(len(one.content) for one in text.parts["train"])


@settings(max_examples=50, deadline=None)
@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_mutual_information_is_within_its_bounds(data: st.DataObject, rows: int, columns: int) -> None:
    cells = data.draw(st.lists(st.integers(0, 20), min_size=rows * columns, max_size=rows * columns).filter(any))
    joint = torch.tensor(cells, dtype=torch.float64).view(rows, columns)
    found = module("measure").information_bits(joint)
    assert -1e-9 <= found <= torch.tensor(float(min(rows, columns))).log2().item() + 1e-9
    outer = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert module("measure").information_bits(outer) == pytest.approx(0, abs=1e-9)


def test_one_large_entry_shows() -> None:
    describe = module("measure").describe_values
    torch.manual_seed(0)
    plain = torch.randn(256, 64)
    spoiled = plain.clone()
    spoiled[:, 3] *= 50
    normal, heavy = describe([plain]), describe([spoiled])
    assert normal["kurtosis"] == pytest.approx(3, abs=0.3)
    assert heavy["kurtosis"] > 30
    assert heavy["channel_max_over_median"] > 10 * normal["channel_max_over_median"]
