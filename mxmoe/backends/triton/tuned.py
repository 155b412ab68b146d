"""
Tiles that were measured, by device, shape class and scheme: JSON files beside this one, one for each kind of GPU.

A file holds for the versions of Triton and of the kernels that it was measured with; of kernels that have changed its
entries are left alone. A shape class is (n, k, gated, rows of a mean active expert); the nearest measured one serves
within `NEAR`. What has none is cut by rule, and one line says so.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from mxmoe.backends.triton.layout import body_of
from mxmoe.backends.triton.tiles import ALWAYS, DIVIDED_WARPS, Config, Gemm, Shape
from mxmoe.errors import BadTiles
from mxmoe.ir import Scheme

DATA = Path(__file__).parent / "tuned"
"""Folder of shipped files, `<kind of GPU>.json`."""
WHOLE, DIVIDED = "whole", "divided"
KERNELS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    WHOLE: ("group_gemm", ("bodies", "decode", "kernels", "kernels_chain", "kernels_schedule", "schedule")),
    DIVIDED: (
        "divided_gemm",
        (
            "decode",
            "kernels",
            "kernels_hopper",
            "kernels_hopper_dense",
            "kernels_hopper_nibbles",
            "kernels_hopper_ring",
            "kernels_hopper_scaled",
        ),
    ),
}
"""Kind of kernel -> its function, and the modules whose functions become its machine code."""
NEAR = (1.0, 1.0, 1.0, 2.0)
"""How far off a measured class may be, in powers of two: n, k, rows of a mean active expert, active experts."""
_LOG = logging.getLogger("mxmoe")


def spell_config(config: Config) -> str:
    """
    Write a config as words, e.g. `w4g1r96 w8a8_sym=16,32x64k128s4`.

    w: warps, g: grouping, r: registers, p: programs for each SM, b: `back`; those that a config does not set are left
    out.
    """
    head = f"w{config.warps}g{config.grouping}"
    head += f"r{config.registers}" if config.registers is not None else ""
    head += f"p{config.per_sm}" if config.per_sm else ""
    head += f"b{config.back}" if config.back else ""
    return " ".join([head, *(f"{scheme}={shape}" for scheme, shape in config.shapes)])


def parse_config(text: str) -> Config:
    """
    Read what `spell_config` wrote.

    Raises:
        BadTiles: it is no config.
    """
    head, *shapes = text.split()
    try:
        numbers = {letter: int(number) for letter, number in _pairs(head)}
        pairs = tuple((scheme, Shape.parse(shape)) for scheme, _, shape in (word.partition("=") for word in shapes))
        optional = (numbers.get("r"), numbers.get("b", 0))
        return Config(numbers["w"], pairs, numbers.get("p", 0), numbers["g"], *optional)
    except (KeyError, ValueError) as error:
        raise BadTiles(tiles=text, reason="write w WARPS g GROUPING, then SCHEME=TILES") from error


def _pairs(head: str) -> list[tuple[str, str]]:
    starts = [at for at, letter in enumerate(head) if letter.isalpha()]
    return [(head[at], head[at + 1 : end]) for at, end in zip(starts, [*starts[1:], len(head)], strict=True)]


Run = tuple[int, int | None, tuple[int, ...], int, int]
"""
What all schemes of a launch share: warps, most registers, of the divided kernel the heights of its tiles and which
programs begin with low ones, and of the whole one the bytes of a row in a step: with the shared memory of one scheme's
deep steps, fewer programs of all run at once.
"""
STEP = 128
"""Bytes of a row in a step, at least: of packed weights, and of dense ones whose tiles are not deep."""


def kind_of(config: Config) -> str:
    """Name the kernel that runs a config: one of `KERNELS`."""
    return DIVIDED if config.warps == DIVIDED_WARPS else WHOLE


def run_of(config: Config) -> Run:
    """Give what the schemes of a launch with this config share."""
    if kind_of(config) == DIVIDED:
        return config.warps, config.registers, config.shapes[0][1].heights, config.back, STEP
    dense = [(Scheme.parse(name), shape) for name, shape in config.shapes if name != ALWAYS]
    steps = [shape.depth * max(1, one.act_bits // 8) for one, shape in dense if body_of(one) == "dense"]
    return config.warps, config.registers, (), config.back, max([STEP, *steps])


@dataclass(frozen=True)
class Entry:
    """The best config measured for one shape class, schemes, and what the schemes of a launch share."""

    n: int
    k: int
    gated: bool
    rows: float
    """Of a mean active expert."""
    active: int
    """Experts that have rows."""
    scheme: str
    """Or several, joined by +, for launches of just these."""
    config: Config
    time_us: float
    rule_us: float
    """What the rule's config took."""

    @property
    def run(self) -> Run:
        """What all schemes of a launch share."""
        return run_of(self.config)

    def distance(self, n: int, k: int, rows: float, active: float) -> float:
        """How far another class is, in powers of two; inf if too far."""
        steps = [abs(math.log2(a / b)) for a, b in ((self.n, n), (self.k, k), (self.rows, rows), (self.active, active))]
        if any(step > most for step, most in zip(steps, NEAR, strict=True)):
            return math.inf
        return steps[0] + steps[1] + 2 * steps[2] + 0.5 * steps[3]

    def to_json(self) -> dict[str, Any]:
        """Fields as they stand in a file."""
        fields = {name: getattr(self, name) for name in ("n", "k", "gated", "rows", "active", "scheme")}
        return {**fields, "config": spell_config(self.config), "time_us": self.time_us, "rule_us": self.rule_us}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Entry:
        """Read one back."""
        values: dict[str, Any] = {**fields, "config": parse_config(fields["config"])}
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Tuned:
    """The entries of one device; equal to itself only, so that look-ups are remembered cheaply."""

    device: str
    """As CUDA names it."""
    triton: str
    kernels: Mapping[str, str]
    """Kind of kernel that was measured -> its hash."""
    entries: tuple[Entry, ...]
    mixes: bool = False
    """Whether mixed launches were faster with entries put together than by rule."""

    def current(self) -> Tuned:
        """Keep what was measured with the kernels and the Triton that run here."""
        is_mine = self.triton == triton.__version__
        kinds = {kind: found for kind, found in self.kernels.items() if is_mine and found == current_hashes().get(kind)}
        entries = tuple(one for one in self.entries if kind_of(one.config) in kinds)
        return replace(self, kernels=kinds, entries=entries)

    def find(
        self, gemm: Gemm, scheme: str, rows: float, active: float, kinds: Collection[str] = (WHOLE,)
    ) -> dict[Run, Entry]:
        """
        Find the entries of a class, by what they share: of the nearest that has any.

        Args:
            gemm: its sizes.
            scheme: one, or several joined by +.
            rows: of a mean active expert.
            active: experts that have rows.
            kinds: of kernels, whose entries count.
        """
        mine = [one for one in self._by_scheme.get((scheme, gemm.gated), ()) if kind_of(one.config) in kinds]
        far = [(one.distance(gemm.n, gemm.k, rows, active), one) for one in mine]
        least = min((distance for distance, _ in far), default=math.inf)
        if math.isinf(least):
            return {}
        return {one.run: one for distance, one in far if distance == least}

    @property
    def _by_scheme(self) -> dict[tuple[str, bool], tuple[Entry, ...]]:
        return _index(self)

    def dumps(self) -> str:
        """Write as JSON, an entry a line."""
        head = {"device": self.device, "triton": self.triton, "kernels": dict(self.kernels), "mixes": self.mixes}
        lines = ",\n  ".join(json.dumps(one.to_json()) for one in self.entries)
        first = ",\n ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items())
        return f'{{{first},\n "entries": [\n  {lines}\n ]\n}}\n'

    @classmethod
    def loads(cls, text: str) -> Tuned:
        """Read what `dumps` wrote."""
        fields = json.loads(text)
        values: dict[str, Any] = {**fields, "entries": tuple(Entry.from_json(one) for one in fields["entries"])}
        return cls(**values)


@lru_cache(maxsize=8)
def _index(tuned: Tuned) -> dict[tuple[str, bool], tuple[Entry, ...]]:
    found: dict[tuple[str, bool], list[Entry]] = {}
    for one in tuned.entries:
        found.setdefault((one.scheme, one.gated), []).append(one)
    return {key: tuple(entries) for key, entries in found.items()}


@lru_cache(maxsize=1)
def current_hashes() -> Mapping[str, str]:
    """Hash what each kind of kernel is compiled from, as it is now."""
    folder = Path(__file__).parent
    return {
        kind: hash_functions([(folder / f"{name}.py").read_text() for name in modules], root)
        for kind, (root, modules) in KERNELS.items()
    }


def hash_functions(modules: Sequence[str], root: str) -> str:
    """
    Hash a kernel and all that it names, directly or not, among functions and constants of some modules' texts.

    Comments, docstrings, annotations and the version of Python do not count. What bears one name in two modules counts
    as one.
    """
    known: dict[str, list[ast.stmt]] = {root: []}
    for node in (node for text in modules for node in ast.parse(text).body):
        for name in _named(node):
            known.setdefault(name, []).append(node)
    assert known[root], f"no function {root}"
    found: dict[str, str] = {}
    left = [root]
    while left:
        name = left.pop()
        if name in known and name not in found:
            found[name] = "".join(ast.unparse(_Bare().visit(node)) for node in known[name])
            left += [one.id for node in known[name] for one in ast.walk(node) if isinstance(one, ast.Name)]
    return hashlib.sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()[:16]


def _named(node: ast.stmt) -> Sequence[str]:
    """Names that a statement of a module gives to a function that is compiled, or to constants."""
    if isinstance(node, ast.FunctionDef):
        return (node.name,) if node.decorator_list else ()
    targets = node.targets if isinstance(node, ast.Assign) else ()
    return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]


class _Bare(ast.NodeTransformer):
    """Leaves out docstrings and annotations, but `tl.constexpr`, which decides what is compiled in."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        is_constant = node.annotation is not None and ast.unparse(node.annotation).endswith("constexpr")
        node.annotation = node.annotation if is_constant else None
        return node


@lru_cache(maxsize=8)
def for_device(name: str, folder: Path = DATA) -> Tuned | None:
    """Find the file of a device, as CUDA names it; what is of other kernels or Triton is not used, in one line."""
    for path in sorted(folder.glob("*.json")):
        found = Tuned.loads(path.read_text())
        if found.device != name:
            continue
        usable = found.current()
        stale = {kind: made for kind, made in found.kernels.items() if kind not in usable.kernels}
        if stale:
            now = {kind: current_hashes().get(kind) for kind in stale}
            _LOG.warning(
                "tiles tuned for %s with triton %s and kernels %s are not used with triton %s and kernels %s; "
                "`mxmoe bench` measures anew",
                *(name, found.triton, _spell(stale), triton.__version__, _spell(now)),
            )
        if usable.kernels:
            return usable
    return None


def _spell(hashes: Mapping[str, str | None]) -> str:
    return ", ".join(f"{kind} {found}" for kind, found in hashes.items())


@lru_cache(maxsize=4096)
def tuned_config(
    tuned: Tuned, gemm: Gemm, tokens: int, top_k: int, rule: Config, divided: Config | None = None
) -> Config | None:
    """
    Choose the measured config of a launch, or None where nothing near was measured.

    A launch of several schemes takes the config that was measured for just these. Where there is none, each scheme
    keeps the tiles that were its fastest with the `Run` with which the experts take the least time together.

    Args:
        tuned: what was measured.
        gemm: the GEMM.
        tokens, top_k: of the call.
        rule: the rule's config of the whole kernel; k has as many parts in a launch of several schemes.
        divided: a config of the divided kernel, None where it does not compute the launch.
    """
    assignments = max(1, tokens * top_k)
    active = min(len(gemm.schemes), assignments)
    kinds = (WHOLE,) if divided is None else (WHOLE, DIVIDED)

    def near(scheme: str) -> Mapping[Run, Entry]:
        return tuned.find(gemm, scheme, assignments / active, active, kinds)

    exact = near("+".join(map(str, gemm.distinct)))
    if exact:
        return min(exact.values(), key=lambda one: one.time_us).config
    found = {scheme: near(str(scheme)) for scheme in gemm.distinct}
    if not all(found.values()):
        _say_unlisted(gemm.n, gemm.k, gemm.gated, " ".join(map(str, gemm.distinct)), tuned.device)
        return None
    return _together(gemm, found, rule, divided) if tuned.mixes else None


def _together(
    gemm: Gemm, found: Mapping[Scheme, Mapping[Run, Entry]], rule: Config, divided: Config | None
) -> Config | None:
    common = set.intersection(*(set(by_run) for by_run in found.values()))
    if not common:
        return None
    share = {scheme: gemm.schemes.count(scheme) for scheme in found}

    def total(run: Run) -> tuple[float, str]:
        return sum(share[scheme] * by_run[run].time_us for scheme, by_run in found.items()), str(run)

    run = min(common, key=total)
    if divided is not None and run[0] == divided.warps:
        shapes = tuple((str(one), by[run].config.shape(one)) for one, by in found.items())
        return replace(divided, shapes=shapes, back=run[3])
    shapes = tuple(
        (str(scheme), replace(by_run[run].config.shape(scheme), parts=rule.shape(scheme).parts))
        for scheme, by_run in found.items()
    )
    return Config(run[0], shapes, rule.per_sm, rule.grouping, run[1])


@lru_cache(maxsize=1024)
def _say_unlisted(n: int, k: int, gated: bool, schemes: str, device: str) -> None:
    """Once for each product and schemes."""
    kind, text = (
        "gated " if gated else "",
        "no tiles are tuned near the %sproduct n=%d k=%d in %s on %s; a rule chooses them",
    )
    _LOG.warning(text, kind, n, k, schemes, device)


@lru_cache(maxsize=16)
def tuned_for(device: torch.device) -> Tuned | None:
    """Find what was tuned for a device; nothing for what is no GPU."""
    is_here = device.type == "cuda" and torch.cuda.is_available()
    return for_device(torch.cuda.get_device_name(device)) if is_here else None
