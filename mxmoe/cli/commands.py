"""
The commands of the command line: `mxmoe demo | eval | opt | solve | show | verify | bench | profile`.

Every command imports what it needs when it runs, so that `mxmoe --help` answers at once. A mistake of the user prints
one sentence to standard error and exits with 2; `mxmoe verify` exits with 1 when a checkpoint is broken.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mxmoe.cli.devices import add_bench, add_profile
from mxmoe.errors import BadPlan, BadText, BadUsage, BrokenCheckpoint, MxmoeError, UnknownName
from mxmoe.files import write_whole
from mxmoe.registry import near_names

if TYPE_CHECKING:  # torch, xDSL and matplotlib are for the commands that want them
    from mxmoe.ir import Plan
    from mxmoe.passes import Environment, Observer


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    # torch's and numba's threads would spin against each other for the cores; read once, when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parser, commands = _parsers()
        command = next((word for word in words if not word.startswith("-")), None)
        if command is not None and command not in commands:
            raise UnknownName(kind="command", name=command, near=near_names(command, commands))
        arguments = parser.parse_args(words)
        if command is None:
            parser.print_help(sys.stderr)
            return 2
        return arguments.run(arguments)
    except MxmoeError as error:
        return _say(str(error))
    except BrokenPipeError:  # the reader of `mxmoe ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors of ours: one line, and where the help is."""

    def error(self, message: str) -> NoReturn:
        raise BadUsage(reason=message, program=self.prog)


def _parsers() -> tuple[_Parser, list[str]]:
    """Make the parser, and list its commands."""
    from mxmoe import __version__

    parser = _Parser(prog="mxmoe", description="A mixed-precision compiler for Mixture-of-Experts blocks.")
    parser.add_argument("--version", action="version", version=f"mxmoe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (_add_demo, _add_eval, _add_opt, _add_solve, _add_show, _add_verify, add_bench, add_profile):
        add(commands)
    return parser, list(commands.choices)


_Commands = argparse._SubParsersAction  # pyright: ignore[reportPrivateUsage]  # argparse names the type nowhere else


def _add_demo(commands: _Commands) -> None:
    parser = commands.add_parser("demo", help="quantize the shipped model in many ways: one table and one picture")
    parser.add_argument("--out", metavar="DIR", default="demo", help="where files go (default: demo)")
    parser.add_argument("--held-out-kib", type=int, default=32, metavar="N", help="KiB of text to measure on")
    parser.add_argument("--calibration-windows", type=int, default=32, metavar="N", help="windows of 512 bytes")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from mxmoe.evaluate.demo import run_demo

    demo = run_demo(
        arguments.out,
        held_out_kib=arguments.held_out_kib,
        calibration_windows=arguments.calibration_windows,
        quiet=arguments.quiet,
    )
    _print(f"{demo.about}\n\n{demo.table()}\n\nwritten to {demo.folder}: {', '.join(sorted(os.listdir(demo.folder)))}")
    return 0


def _add_eval(commands: _Commands) -> None:
    parser = commands.add_parser("eval", help="measure a language model as it came, and with compiled experts")
    parser.add_argument("folder", metavar="DIR", help="transformers folder: config.json, weights, and a tokenizer")
    parser.add_argument("--plan", metavar="FILE", help="compile by this plan")
    parser.add_argument("--schemes", metavar="NAMES", help="schemes to choose from, with commas; one means uniform")
    parser.add_argument("--weight-bits", type=_limit, metavar="BITS", help="average effective bits per weight")
    parser.add_argument("--r", type=float, default=0.75, help="minimise loss^r * time^(1-r) (default: 0.75)")
    parser.add_argument("--quantizer", default="rtn", metavar="NAME", help="(default: rtn)")
    parser.add_argument("--sensitivity", default="squared", metavar="NAME", help="(default: squared)")
    parser.add_argument("--rotate-down", type=int, metavar="N", help="rotate N channels together on their way to down")
    parser.add_argument("--target", default="eager", metavar="NAME", help="(default: eager)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8, or token ids in a .bin (default: DIR/held_out.bin)")
    parser.add_argument("--calibration", metavar="FILE", help="likewise (default: DIR/calibration.bin, else none)")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens to measure on at most")
    parser.add_argument("--calibration-tokens", type=int, default=32768, metavar="N", help="(default: 32768)")
    parser.add_argument("--window", type=int, metavar="N", help="tokens per window (default: the model's, up to 2048)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="windows per call (default: 4)")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    import json

    _check_folder(arguments.json, "mxmoe eval")
    if arguments.plan and (arguments.schemes or arguments.weight_bits):
        raise BadUsage(reason="--plan says every scheme; leave --schemes and --weight-bits out", program="mxmoe eval")
    from mxmoe.evaluate.evaluation import Request, evaluate_folder

    names = ("target", "weight_bits", "plan", "r", "quantizer", "sensitivity", "rotate_down")
    schemes = arguments.schemes.split(",") if arguments.schemes else None
    request = Request(schemes=schemes, **{name: getattr(arguments, name) for name in names})
    names = ("text", "calibration", "tokens", "calibration_tokens", "window", "batch", "device", "quiet")
    found = evaluate_folder(arguments.folder, request, **{name: getattr(arguments, name) for name in names})
    _print(str(found))
    if arguments.json:
        write_whole(arguments.json, json.dumps(found.to_dict(), indent=1) + "\n")
    return 0


def _add_opt(commands: _Commands) -> None:
    parser = commands.add_parser("opt", help="run passes over a module and print it")
    parser.add_argument("file", nargs="?", metavar="FILE", help="text of a module; - is standard input")
    parser.add_argument(
        "-p", "--passes", action="append", default=[], metavar="PASSES",
        help='"pass{option=value option=value},pass,..."; the name of a pipeline stands for its passes',
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="write there, whole, in place of standard output")
    parser.add_argument("--full", action="store_true", help="print long tables whole; what is printed parses again")
    parser.add_argument("--stats", metavar="FILE", help="statistics that `Stats.save` wrote, for annotate- passes")
    parser.add_argument("--plan", metavar="FILE", help="plan for apply-plan")
    parser.add_argument("--target", default="numba", metavar="NAME", help="target to plan for (default: numba)")
    parser.add_argument("--print-ir-after-all", action="store_true", help="print the module after every pass (stderr)")
    parser.add_argument("--time-passes", action="store_true", help="print what each pass took (stderr)")
    parser.add_argument("--verify-each", action="store_true", help="verify after every pass, not at the end only")
    parser.add_argument("--dump", metavar="DIR", help="write the module as it came in and after each pass to files")
    parser.add_argument("--list-passes", action="store_true", help="list passes with their options, and pipelines")
    parser.set_defaults(run=_opt)


def _opt(arguments: argparse.Namespace) -> int:
    if arguments.list_passes:
        _print(_list_passes())
        return 0
    if arguments.file is None:
        raise BadUsage(reason="give the FILE to read, or - for standard input", program="mxmoe opt")
    from mxmoe.ir import Table, parse_ir, print_ir
    from mxmoe.passes import TimePasses, parse_passes, run_passes

    _check_folder(arguments.output, "mxmoe opt")
    steps = parse_passes(",".join(arguments.passes))
    environment = _environment(arguments)
    clock = TimePasses()
    module = parse_ir(_read(arguments.file), name=_shown(arguments.file))
    run_passes(module, steps, environment, (clock, *_observers(arguments)))
    if arguments.time_passes:
        sys.stderr.write(clock.table() + "\n")
    if arguments.output:
        write_whole(arguments.output, print_ir(module, elide=None))
    else:
        sys.stdout.write(print_ir(module, elide=None if arguments.full else Table.ELIDE_ABOVE))
        sys.stdout.flush()
    return 0


def _environment(arguments: argparse.Namespace) -> Environment:
    from mxmoe.calib import Stats
    from mxmoe.ir import Plan
    from mxmoe.passes import Environment
    from mxmoe.target import find_target

    return Environment(
        Stats.load(arguments.stats) if arguments.stats else None,
        find_target(arguments.target),
        Plan.load(arguments.plan) if arguments.plan else None,
    )


def _observers(arguments: argparse.Namespace) -> list[Observer]:
    """Make what watches the passes; the verifier comes last, so that a module that it refuses has been printed."""
    from mxmoe import settings
    from mxmoe.ir import Table
    from mxmoe.passes import Dump, PrintAfterAll, VerifyEach

    found: list[Observer] = [*settings.observers()]
    if arguments.print_ir_after_all:
        found.append(PrintAfterAll(elide=None if arguments.full else Table.ELIDE_ABOVE))
    if arguments.dump:
        found.append(Dump(Path(arguments.dump)))
    return [*found, VerifyEach()] if arguments.verify_each else found


def _list_passes() -> str:
    """Name every pass with the first line of its docstring and its options, then the pipelines."""
    import inspect

    from mxmoe.passes import PASSES, PIPELINES, parse_passes

    lines: list[str] = []
    for name in PASSES:
        try:
            (step,) = parse_passes(name)
            about = (inspect.getdoc(type(step)) or "").partition("\n")[0]
            options = "  ".join(option if "=" in option else f"{option} (unset)" for option in step.spelled_options())
        except MxmoeError as error:  # a broken package of somebody else must not hide the others
            about, options = str(error), ""
        lines += [f"{name:24}{about}".rstrip(), *([f"{'':24}{options}"] if options else [])]
    pipelines = [f"{name:24}{','.join(passes)}" for name, passes in PIPELINES.items()]
    return "\n".join([*lines, "", "pipelines", *pipelines])


def _add_solve(commands: _Commands) -> None:
    parser = commands.add_parser("solve", help="solve an annotated module for a budget; needs no model and no data")
    parser.add_argument("file", metavar="ANNOTATED", help="text of an annotated module; - is standard input")
    parser.add_argument(
        "--weight-bits", type=_limit, default=5.0, metavar="BITS",
        help="average effective bits per weight, or none (default: 5)",
    )  # fmt: skip
    parser.add_argument("--max-bytes", type=_limit, metavar="N", help="bytes of codes, scales and zero points")
    parser.add_argument("--latency-us", type=_limit, metavar="US", help="sum of the costs in microseconds")
    parser.add_argument("--r", type=float, default=0.75, help="minimise loss^r * time^(1-r) (default: 0.75)")
    parser.add_argument("--solver", default="lagrangian", metavar="NAME", help="(default: lagrangian)")
    parser.add_argument(
        "--granularity", default="linear", metavar="NAME",
        help="what shares a choice: model, layer, role, expert, linear (default: linear)",
    )  # fmt: skip
    parser.add_argument("--no-tie-gate-up", action="store_true", help="let gate and up of an expert differ")
    parser.add_argument("-o", "--output", metavar="PLAN", help="write the plan there")
    parser.set_defaults(run=_solve)


def _solve(arguments: argparse.Namespace) -> int:
    from mxmoe.ir import parse_ir
    from mxmoe.passes import AllocateBits
    from mxmoe.report.summary import describe_plan

    _check_folder(arguments.output, "mxmoe solve")
    step = AllocateBits(
        arguments.weight_bits,
        arguments.max_bytes,
        arguments.latency_us,
        arguments.r,
        arguments.solver,
        arguments.granularity,
        not arguments.no_tie_gate_up,
    )
    plan = step.solve(parse_ir(_read(arguments.file), name=_shown(arguments.file)))
    _print(describe_plan(plan))
    if arguments.output:
        plan.save(arguments.output)
        _print(f"written to {arguments.output}")
    return 0


def _add_show(commands: _Commands) -> None:
    parser = commands.add_parser("show", help="say what is in a module or plan; draw its bits, or its schedule")
    parser.add_argument(
        "file", metavar="FILE", help="text of a module, a plan, or what `save` wrote; - is standard input"
    )
    parser.add_argument("-o", "--output", metavar="PNG", help="draw block x expert with the bits as colour")
    parser.add_argument("--schedule", metavar="PNG", help="draw which SM runs which tile, and when, as predicted")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="of a scheduled call (default: 512)")
    parser.add_argument("--device", default="rtx4090", metavar="NAME", help="to schedule for (default: rtx4090)")
    parser.add_argument("--block", metavar="NAME", help="to schedule (default: the first)")
    parser.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> int:
    from mxmoe.ir import parse_ir
    from mxmoe.report import module_bits, plan_bits, save_figure
    from mxmoe.report.summary import describe_module, describe_plan, draw_bits

    for picture in (arguments.output, arguments.schedule):
        _check_folder(picture, "mxmoe show")
    file = str(Path(arguments.file) / "lowered.mlir") if Path(arguments.file).is_dir() else arguments.file
    text, name = _read(file), _shown(file)
    if text.lstrip().startswith("{"):
        if arguments.schedule:
            raise BadUsage(reason="a plan has no sizes to schedule; give the module", program="mxmoe show")
        plan = _plan(text, name)
        _print(describe_plan(plan))
        bits, unit = plan_bits(plan), "payload bits per weight"
    else:
        module = parse_ir(text, name=name)
        _print(describe_module(module))
        if arguments.schedule:
            from mxmoe.report.schedule import draw_schedule

            words = {"device": arguments.device, "tokens": arguments.tokens, "block": arguments.block}
            save_figure(draw_schedule(module, **words), arguments.schedule)
            _print(f"schedule drawn to {arguments.schedule}")
        if not arguments.output:
            return 0
        bits, unit = module_bits(module), "effective bits per weight"
    if arguments.output:
        save_figure(draw_bits(bits, title=Path(name).name, unit=unit), arguments.output)
        _print(f"drawn to {arguments.output}")
    return 0


def _plan(text: str, name: str) -> Plan:
    from mxmoe.ir import Plan

    return Plan.from_json(text, name=name)


def _add_verify(commands: _Commands) -> None:
    parser = commands.add_parser("verify", help="check every file and tensor of a saved module")
    parser.add_argument("folder", metavar="FOLDER", help="what `save` wrote")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from mxmoe.checkpoint import read_checkpoint
    from mxmoe.ir import parse_ir
    from mxmoe.report.summary import describe_checkpoint

    try:
        found = read_checkpoint(arguments.folder)
        for file, text in found.texts.items():
            name = str(Path(arguments.folder) / file)
            if file.endswith(".mlir"):
                parse_ir(text, name=name)
            elif file == "plan.json":
                _plan(text, name)
    except (BrokenCheckpoint, BadText, BadPlan) as error:
        _say(str(error))
        return 1
    _print(f"{arguments.folder} is whole\n{describe_checkpoint(found)}")
    return 0


def _limit(text: str) -> float | None:
    """Read a budget from the command line."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from None


def _read(file: str) -> str:
    """
    Read a text file, or standard input for `-`.

    Raises:
        BadText: it is not UTF-8.
    """
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        reason = f"it is no UTF-8 text ({error.reason} at byte {error.start})"
        raise BadText(name=_shown(file), reason=reason) from error


def _check_folder(file: str | None, program: str) -> None:
    """Refuse to work for a file that cannot be written afterwards."""
    if file is not None and not Path(file).parent.is_dir():
        raise BadUsage(reason=f"there is no folder {Path(file).parent} to write {Path(file).name} to", program=program)


def _shown(file: str) -> str:
    return "<stdin>" if file == "-" else file


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _say(complaint: str) -> int:
    """Write a complaint to standard error; 2 is the status of a user's mistake."""
    sys.stderr.write(f"mxmoe: error: {complaint}\n")
    return 2
