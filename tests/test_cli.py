"""The command line: what each command prints, writes and answers to a mistake."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mxmoe
from mxmoe.checkpoint import Checkpoint, write_checkpoint
from mxmoe.cli import main
from mxmoe.ir import BankShape, BlockShape, ModuleOp, Plan, Scheme, moe_ops, parse_ir, plan_of, print_ir
from mxmoe.passes import PASSES, Environment, parse_passes, run_passes
from mxmoe.testing import at_stage

SCHEMES = [Scheme.parse(name) for name in ("w8a8_sym", "w4a16_g32_asym", "w2a16_g32_asym")]
PNG = b"\x89PNG\r\n"


def example(stage: str, experts: int = 8) -> ModuleOp:
    weights = {role: f"mlp.routed.{role}" for role in ("gate", "up", "down")}
    shape = BlockShape("mlp", 64, (BankShape("routed", experts, 2, 32, "silu", True, weights),))
    return at_stage([shape], stage, SCHEMES)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    path = tmp_path / "annotated.mlir"
    path.write_text(print_ir(example("annotated"), elide=None))
    return path


@pytest.fixture
def plan(tmp_path: Path, annotated: Path) -> Path:
    assert main(["solve", str(annotated), "-o", str(tmp_path / "plan.json")]) == 0
    return tmp_path / "plan.json"


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that a user got wrong, and return the one line that it prints."""
    capsys.readouterr()
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mxmoe: error: ")
    assert "Traceback" not in printed.err
    return printed.err.removeprefix("mxmoe: error: ").rstrip("\n")


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mxmoe", *words]
    return subprocess.run(command, text=True, capture_output=True, timeout=120, env={**os.environ, **variables})


class TestTheWhole:
    def test_version_and_help_load_nothing_heavy(self) -> None:
        code = "import sys; from mxmoe.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        code += "heavy = {'torch', 'numba', 'xdsl', 'numpy', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
        printed = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
        assert all(f"    {command}" in printed for command in ("demo", "opt", "solve", "show", "verify"))
        assert run("--version").stdout == f"mxmoe {mxmoe.__version__}\n"

    def test_an_unknown_command_answers_with_near_names(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert complaint(capsys, "slove") == "no command named 'slove'; did you mean solve?"

    def test_a_command_is_needed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        assert "usage: mxmoe" in capsys.readouterr().err

    def test_an_unknown_option_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--fast; see `mxmoe --help`" in complaint(capsys, "opt", "x", "--fast")
        assert "'x' is neither a number nor none" in complaint(capsys, "solve", "a", "--weight-bits", "x")

    def test_a_missing_file_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert complaint(capsys, "show", "no/such.mlir") == "no/such.mlir: No such file or directory"

    def test_a_file_that_is_no_text_is_named(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"\xff\xfe")
        assert "it is no UTF-8 text" in complaint(capsys, "opt", str(tmp_path / "x"))

    def test_a_reader_that_leaves_early_is_no_error(self, annotated: Path) -> None:
        shell = f"{sys.executable} -m mxmoe opt --full {annotated} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", shell], text=True, capture_output=True, timeout=120)
        assert done.stdout.strip() in ("0", "141")
        assert done.stderr == ""


class TestOpt:
    def test_passes_run_in_order_and_long_tables_are_elided(
        self, capsys: pytest.CaptureFixture[str], annotated: Path
    ) -> None:
        words = ["opt", str(annotated), "-p", "allocate-bits{weight-bits=6}", "-p", "lower-to-group-gemm,choose-tiles"]
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert 'stage="lowered"' in printed
        assert "tiles=[" in printed
        assert main(["opt", str(annotated)]) == 0
        assert "elided" in capsys.readouterr().out

    def test_full_text_parses_and_equals_python(self, capsys: pytest.CaptureFixture[str], annotated: Path) -> None:
        assert main(["opt", str(annotated), "-p", "allocate-bits{weight-bits=6}", "--full"]) == 0
        module = parse_ir(annotated.read_text())
        run_passes(module, parse_passes("allocate-bits{weight-bits=6}"), Environment())
        assert capsys.readouterr().out == print_ir(module, elide=None)

    def test_a_file_is_written_whole_with_nothing_beside_it(self, annotated: Path) -> None:
        out = annotated.with_name("out.mlir")
        out.write_text("old")
        assert main(["opt", str(annotated), "-o", str(out)]) == 0
        assert out.read_text() == annotated.read_text()
        assert {path.name for path in out.parent.iterdir()} == {"annotated.mlir", "out.mlir"}

    def test_a_failed_run_leaves_the_file_as_it_was(self, annotated: Path) -> None:
        before = annotated.read_text()
        assert main(["opt", str(annotated), "-p", "allocate-bits{weight-bits=1}", "-o", str(annotated)]) == 2
        assert annotated.read_text() == before

    def test_standard_input(
        self, capsys: pytest.CaptureFixture[str], annotated: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(annotated.read_text()))
        assert main(["opt", "-", "--full"]) == 0
        assert capsys.readouterr().out == annotated.read_text()
        monkeypatch.setattr(sys, "stdin", io.StringIO("nonsense"))
        assert "<stdin>" in complaint(capsys, "opt", "-")

    def test_mistakes_answer_with_near_names(self, capsys: pytest.CaptureFixture[str], annotated: Path) -> None:
        file = str(annotated)
        assert "did you mean allocate-bits" in complaint(capsys, "opt", file, "-p", "alocate-bits")
        assert "did you mean weight-bits" in complaint(capsys, "opt", file, "-p", "allocate-bits{weight-bit=4}")
        assert "did you mean numba" in complaint(capsys, "opt", file, "--target", "numb")
        assert "give the FILE" in complaint(capsys, "opt", "-p", "default")
        assert "annotate-sensitivity needs statistics" in complaint(capsys, "opt", file, "-p", "default")

    def test_elided_text_is_refused_with_the_way_out(self, capsys: pytest.CaptureFixture[str], annotated: Path) -> None:
        assert main(["opt", str(annotated)]) == 0
        annotated.write_text(capsys.readouterr().out)
        assert "mxmoe opt --full" in complaint(capsys, "opt", str(annotated))

    def test_watching_goes_to_standard_error(
        self, capsys: pytest.CaptureFixture[str], annotated: Path, tmp_path: Path
    ) -> None:
        passes = "allocate-bits{weight-bits=6},lower-to-group-gemm"
        words = ["opt", str(annotated), "-p", passes, "--print-ir-after-all", "--time-passes", "--verify-each"]
        assert main([*words, "--dump", str(tmp_path / "dump")]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("// ---- after ") == 2
        assert "ms  total" in printed.err
        assert "after" not in printed.out
        assert len(list((tmp_path / "dump").iterdir())) == 3

    def test_verify_each_names_the_pass_that_broke_the_module(
        self, capsys: pytest.CaptureFixture[str], annotated: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def spoil(self: object, module: ModuleOp, environment: Environment) -> None:
            moe_ops(module)[0].stage = "lowered"

        monkeypatch.setattr(PASSES["annotate-cost"], "run", spoil)
        words = ["opt", str(annotated), "-p", "annotate-cost,annotate-cost{tokens=1}"]
        assert "after annotate-cost,annotate-cost{tokens=1} the" in complaint(capsys, *words)
        assert "after annotate-cost the" in complaint(capsys, *words, "--verify-each")

    def test_a_folder_that_is_not_there_is_told_before_the_work(
        self, capsys: pytest.CaptureFixture[str], annotated: Path
    ) -> None:
        for command in ("opt", "solve", "show"):
            told = complaint(capsys, command, str(annotated), "-o", str(annotated.with_name("none") / "out"))
            assert "there is no folder" in told

    def test_the_environment_watches_too(
        self, capsys: pytest.CaptureFixture[str], annotated: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MXMOE_DEBUG", "1")
        assert main(["opt", str(annotated), "-p", "allocate-bits{weight-bits=6}"]) == 0
        assert "mxmoe: weight_bits <= 6: " in capsys.readouterr().err

    def test_a_plan_and_a_target_are_read(self, annotated: Path, plan: Path) -> None:
        out = annotated.with_name("out.mlir")
        words = ["opt", str(annotated), "-p", "apply-plan", "--plan", str(plan), "-o", str(out)]
        assert main([*words, "--target", "triton-sm90"]) == 0
        assert plan_of(parse_ir(out.read_text())) == Plan.load(plan)

    def test_passes_are_listed_with_their_options(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(PASSES.table, "gone", "mxmoe.nowhere:Gone")  # pyright: ignore[reportArgumentType]
        assert main(["opt", "--list-passes"]) == 0
        printed = capsys.readouterr().out
        assert "allocate-bits           Choose a scheme" in printed
        assert "weight-bits=5.0  max-bytes (unset)" in printed
        assert "tie-gate-up=true" in printed
        assert "device (unset)  tokens=512  token-weights (unset)" in printed
        assert "default                 annotate-routing," in printed
        assert "the pass 'gone' is registered as" in printed


class TestSolve:
    def test_what_was_reached_is_printed_and_the_plan_written(
        self, capsys: pytest.CaptureFixture[str], annotated: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "plan.json"
        assert main(["solve", str(annotated), "--weight-bits", "6", "--r", "1", "-o", str(out)]) == 0
        printed, plan = capsys.readouterr().out, Plan.load(out)
        assert plan == mxmoe.solve(annotated.read_text(), weight_bits=6.0, r=1.0)
        assert plan.allocation is not None
        for word in ("budget     weight_bits <= 6", "objective", "bound", "gap", "bits", "w8a8_sym x"):
            assert word in printed
        assert f"{plan.allocation.weight_bits:.4f} effective" in printed

    def test_every_option_reaches_the_solver(self, annotated: Path, tmp_path: Path) -> None:
        out = tmp_path / "plan.json"
        words = ["--weight-bits", "none", "--latency-us", "10", "--max-bytes", "1e6", "--solver", "pulp"]
        more = ["--granularity", "expert", "--no-tie-gate-up", "-o", str(out)]
        assert main(["solve", str(annotated), *words, *more]) == 0
        found = Plan.load(out).allocation
        assert found is not None
        assert found.budget == {"bytes": 1e6, "latency_us": 10.0}
        assert found.objective == {"r": 0.75, "granularity": "expert", "tie_gate_up": "false"}
        assert found.solver == "pulp"

    def test_an_infeasible_budget_says_the_smallest(self, capsys: pytest.CaptureFixture[str], annotated: Path) -> None:
        words = ["solve", str(annotated), "--weight-bits", "1"]
        assert "the smallest feasible weight_bits is" in complaint(capsys, *words)

    def test_torch_is_not_loaded(self, annotated: Path) -> None:
        code = f"import sys; from mxmoe.cli import main; main(['solve', {str(annotated)!r}])"
        code += "; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class TestShow:
    @pytest.mark.parametrize("stage", ["lifted", "annotated", "allocated", "lowered"])
    def test_a_module_at_any_stage(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, stage: str) -> None:
        (tmp_path / "x.mlir").write_text(print_ir(example(stage), elide=None))
        assert main(["show", str(tmp_path / "x.mlir")]) == 0
        printed = capsys.readouterr().out
        assert f"mlp    {stage}" in printed
        assert "candidates: w8a8_sym, w4a16_g32_asym, w2a16_g32_asym" in printed
        assert ("rows per scheme" in printed) == (stage in ("allocated", "lowered"))

    @pytest.mark.parametrize("stage", ["allocated", "lowered"])
    def test_a_picture_of_a_module(self, tmp_path: Path, stage: str) -> None:
        (tmp_path / "x.mlir").write_text(print_ir(example(stage), elide=None))
        assert main(["show", str(tmp_path / "x.mlir"), "-o", str(tmp_path / "x.png")]) == 0
        assert (tmp_path / "x.png").read_bytes().startswith(PNG)

    @pytest.mark.parametrize("device", ["rtx4090", "h200"])
    def test_a_schedule_of_a_module_and_of_a_folder(self, tmp_path: Path, device: str) -> None:
        (tmp_path / "lowered.mlir").write_text(print_ir(example("lowered"), elide=None))
        for at, file in enumerate((tmp_path / "lowered.mlir", tmp_path)):
            picture = tmp_path / f"{at}.png"
            assert main(["show", str(file), "--schedule", str(picture), "--device", device, "--tokens", "64"]) == 0
            assert picture.read_bytes().startswith(PNG)
        assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()

    def test_a_schedule_that_cannot_be_drawn(
        self, capsys: pytest.CaptureFixture[str], plan: Path, annotated: Path
    ) -> None:
        words = ["--schedule", str(plan.with_suffix(".png"))]
        assert "a plan has no sizes" in complaint(capsys, "show", str(plan), *words)
        assert main(["show", str(annotated), *words]) == 2
        assert "no scheme is chosen" in capsys.readouterr().err
        assert main(["show", str(annotated), *words, "--block", "mlq"]) == 2
        assert "it has mlp" in capsys.readouterr().err
        assert not plan.with_suffix(".png").exists()

    def test_a_plan_and_its_picture(self, capsys: pytest.CaptureFixture[str], plan: Path) -> None:
        capsys.readouterr()
        assert main(["show", str(plan), "-o", str(plan.with_suffix(".png"))]) == 0
        assert "24 rows in 1 block:" in capsys.readouterr().out
        assert plan.with_suffix(".png").read_bytes().startswith(PNG)

    def test_no_picture_without_choices(self, capsys: pytest.CaptureFixture[str], annotated: Path) -> None:
        assert main(["show", str(annotated), "-o", str(annotated.with_suffix(".png"))]) == 2
        assert "mlp is annotated, no scheme is chosen there yet; run allocate-bits" in capsys.readouterr().err
        assert not annotated.with_suffix(".png").exists()

    def test_a_broken_plan_is_named(self, capsys: pytest.CaptureFixture[str], plan: Path) -> None:
        plan.write_text(plan.read_text()[:-20])
        assert f"{plan} is not a plan" in complaint(capsys, "show", str(plan))


class TestVerify:
    @pytest.fixture
    def folder(self, tmp_path: Path, plan: Path, annotated: Path) -> Path:
        texts = {"plan.json": plan.read_text(), "annotated.mlir": annotated.read_text()}
        tensors = {"packed/a/0/payload": torch.arange(8, dtype=torch.uint8), "rest/router": torch.ones(3)}
        write_checkpoint(tmp_path / "saved", Checkpoint({"target": "numba", "class": None}, texts, tensors))
        return tmp_path / "saved"

    def test_a_whole_one_says_what_is_in_it(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        capsys.readouterr()
        assert main(["verify", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"{folder} is whole\n")
        assert "compiled for numba" in printed
        assert "2 tensors, 20 bytes, of which 8 are packed experts" in printed

    @pytest.mark.parametrize("file", ["plan.json", "annotated.mlir", "manifest.json", "weights.safetensors"])
    def test_a_flipped_byte_names_the_file(self, capsys: pytest.CaptureFixture[str], folder: Path, file: str) -> None:
        data = bytearray((folder / file).read_bytes())
        data[-3] ^= 1
        (folder / file).write_bytes(data)
        assert main(["verify", str(folder)]) == 1
        broken = capsys.readouterr().err
        assert broken.startswith("mxmoe: error: ")
        assert file in broken
        assert file != "weights.safetensors" or "rest/router" in broken or "packed/a/0/payload" in broken

    def test_text_that_no_longer_parses_is_broken_too(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "saved", Checkpoint({"target": "numba"}, {"x.mlir": "nonsense"}, {}))
        assert main(["verify", str(tmp_path / "saved")]) == 1
        assert "x.mlir" in capsys.readouterr().err

    def test_another_folder_is_a_mistake(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "holds no checkpoint" in complaint(capsys, "verify", str(tmp_path))


class TestDemo:
    def test_options_reach_the_demo_and_its_table_is_printed(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        asked: dict[str, object] = {}

        def stand_in(folder: str, **options: object) -> SimpleNamespace:
            asked.update(options, folder=folder)
            (tmp_path / "table.txt").write_text("")
            return SimpleNamespace(about="about", table=lambda: "table", folder=tmp_path)

        monkeypatch.setattr(importlib.import_module("mxmoe.evaluate.demo"), "run_demo", stand_in)
        assert main(["demo", "--out", "d", "--held-out-kib", "2", "--calibration-windows", "3", "--quiet"]) == 0
        assert asked == {"folder": "d", "held_out_kib": 2, "calibration_windows": 3, "quiet": True}
        assert capsys.readouterr().out == f"about\n\ntable\n\nwritten to {tmp_path}: table.txt\n"


def test_plans_are_json(plan: Path) -> None:
    assert json.loads(plan.read_text())["format"] == "mxmoe-plan-1"
