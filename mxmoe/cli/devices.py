"""`mxmoe bench` and `mxmoe profile`: what is measured on the GPU of this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mxmoe.errors import BadUsage
from mxmoe.files import write_whole


def add_bench(commands: Any) -> None:  # noqa: ANN401  # argparse names the type nowhere
    """Add `mxmoe bench`."""
    parser = commands.add_parser("bench", help="measure tiles on this GPU, and write the fastest of every shape class")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON to write")
    parser.add_argument(
        "--known", metavar="FILE", help="such a JSON, not measured again where kernels are as they were"
    )
    _add_common(parser)
    parser.set_defaults(run=_bench)


def add_profile(commands: Any) -> None:  # noqa: ANN401  # as above
    """Add `mxmoe profile`."""
    parser = commands.add_parser("profile", help="measure launches on this GPU, and write a profile for the cost model")
    parser.add_argument("--target", default="triton-sm90", metavar="NAME", help="(default: triton-sm90)")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON to write")
    parser.add_argument("--tuned", metavar="FILE", help="tiles of `mxmoe bench` (default: those that are shipped)")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--fit-only", action="store_true", help="measure nothing; fit what was measured before")
    steps.add_argument("--measure-only", action="store_true", help="leave the fit for later")
    _add_common(parser)
    parser.set_defaults(run=_profile)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--measured", metavar="FILE", help="CSV of all measurements, to go on from (default: OUT.csv)")
    parser.add_argument("--seconds", type=float, default=600, metavar="N", help="start none later (default: 600)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that compile (default: cores - 1)")
    parser.add_argument("--schemes", metavar="NAMES", help="only these, with commas")
    parser.add_argument("--tokens", metavar="NUMBERS", help="only these, with commas")


def _words(arguments: argparse.Namespace, program: str) -> dict[str, Any]:
    words: dict[str, Any] = {"seconds": arguments.seconds, "workers": arguments.workers}
    if arguments.schemes:
        words["schemes"] = tuple(arguments.schemes.split(","))
    if arguments.tokens:
        try:
            words["tokens"] = tuple(map(int, arguments.tokens.split(",")))
        except ValueError:
            raise BadUsage(reason=f"--tokens {arguments.tokens} are no numbers", program=program) from None
    return words


def _measured(arguments: argparse.Namespace, program: str) -> Path:
    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise BadUsage(reason=f"there is no folder {out.parent} to write {out.name} to", program=program)
    return Path(arguments.measured) if arguments.measured else out.with_suffix(".csv")


def _bench(arguments: argparse.Namespace) -> int:
    program = "mxmoe bench"
    measured, words = _measured(arguments, program), _words(arguments, program)
    if arguments.known:
        words["known"] = Path(arguments.known)
    from mxmoe.backends.triton import bench_tiles

    sys.stdout.write(f"{bench_tiles(Path(arguments.out), measured, **words)} written to {arguments.out}\n")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    program = "mxmoe profile"
    measured, words = _measured(arguments, program), _words(arguments, program)
    from mxmoe.target import find_target

    target = find_target(arguments.target)
    if target.backend != "triton":
        raise BadUsage(reason=f"target {target.name} has no kernels on a GPU to measure", program=program)
    if not arguments.fit_only:
        from mxmoe.backends.triton import profile_launches

        tuned = Path(arguments.tuned) if arguments.tuned else None
        sys.stdout.write(profile_launches(measured, tuned, **words) + "\n")
    if not arguments.measure_only:
        sys.stdout.write(_fit(arguments, measured, target.device) + "\n")
    return 0


def _fit(arguments: argparse.Namespace, measured: Path, device_name: str) -> str:
    from mxmoe.backends.triton import profiled_launches
    from mxmoe.cost import Observation, fit_profile
    from mxmoe.device import device

    row = device(device_name)
    tuned = Path(arguments.tuned) if arguments.tuned else None
    observed = [Observation(*one) for one in profiled_launches(measured, tuned)]
    write_whole(arguments.out, fit_profile(observed, row).dumps(row.sms))
    return f"{len(observed)} launches fitted, written to {arguments.out}"
