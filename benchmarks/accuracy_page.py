"""Writes docs/accuracy.md and its pictures from what the accuracy study measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accuracy_claims import added, claims, rank_plans
from accuracy_plans import (
    BESIDE,
    HEADLINE,
    METHODS,
    MIXED,
    QUANTIZERS,
    SETTINGS,
    WEIGHT_ONLY_SETTINGS,
    WITH_ACTIVATIONS,
)
from accuracy_read import Table, markdown, mean_of, with_spread
from matplotlib.figure import Figure

from mxmoe.files import write_whole
from mxmoe.report import BitMap, Point, draw_overview, save_figure
from mxmoe.report.figure import ACCENT, COOL, INK, SOFT, dress, new_figure

PICTURES = ("accuracy-bits.png", "accuracy-ranks.png")
INTRODUCTION = """# Accuracy

What quantizers and allocators are worth on a trained model: the [study model](study-model.md), a mixture of experts
with the architecture of Qwen1.5-MoE. This page is written by the command that measures, from
`benchmarks/results/accuracy.csv`; verdicts are decided by the figures.

    {command}

{circumstances}

Loss is in nats per token, and *loss added* is that of the quantized model less that of the bf16 model: 0.01 nats are
1 % of perplexity. Bits are effective bits per expert weight, scales and zero points included; routed and shared experts
are quantized, and nothing else is. Divergence is KL(bf16 || quantized). ± is the standard deviation over seeds of
calibration data, each a draw of windows of its own for Hessians and sensitivities alike; a margin is taken per seed,
and is called clear when it is more than twice its deviation. All plans of a setting have the same candidates, budget
and solver, and sensitivities are measured with the very codes of the quantizer.
"""
SETTINGS_TEXT = """## What is compared

- Weight-only, 2.25 to 4.25 bits: mixes of {weight_only}.
- w5a5: mixes of {mixed} at 5.125 bits of weights, against {w5a5}. A second mix may also take `w4a8_g128_sym`.
- w4a4, w4a8, w8a8, fp8: one scheme for all, since there is one candidate.
- `gptq` takes scales from `rtn_mse` in weight-only schemes; `+hadamard` rotates blocks of 128 channels of what goes to
  down while running, and down's weights and Hessians with it.
- Allocators are those of [sensitivities](sensitivities.md), by the options that their papers have. `uniform` and
  `random` are controls: they know nothing of experts. `all SCHEME` has one scheme everywhere.
"""
LIMITS = """## Limits

- One model of {parameters} weights that was trained for minutes. {outliers}
  What rotation does where outliers are stronger is judged on the planted variant, and outliers in the input of gate
  and up are not judged.
- The list is measured as far as the seconds reach. Where an allocator has no ±, one seed was reached; {missing}
- Weights and activations are quantized exactly as `mxmoe.quant` defines, but products run in TF32 on a GPU: the
  unquantized experts, run in the same way, differ from the bf16 model by a divergence of {floor}, below which nothing
  is seen.
- GPTQ's Hessians are of the unquantized model's inputs for every layer. Quantizing layer by layer behind quantized
  layers may be better, for the uniform plan as for the mixed ones.
- Sensitivities are of one linear at a time. At 2 bits errors are no longer small, and their sum is no longer the loss.
- Seeds are draws of calibration data. The held-out text and the model are the same for all, so the deviations say
  nothing of other models.
- Text is measured in windows of {window} tokens that lie evenly over it and are read as one, so that the last token of
  each predicts what does not follow: perplexities are comparable within this page only.
"""


def write_page(results: Path, docs: Path) -> None:
    """Write the page and its pictures; of a table without held-out figures nothing."""
    table = Table.read(results / "accuracy.csv")
    about: dict[str, Any] = json.loads((results / "accuracy.json").read_text(encoding="utf-8"))
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    overview = draw_bits(table, about)
    drawn = {PICTURES[1]: draw_ranks(table)} | ({PICTURES[0]: overview} if overview is not None else {})
    for name, figure in drawn.items():
        save_figure(figure, images / name)
    timed = results / "accuracy_speed.json"
    speed = json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else None
    other = results / "accuracy_small.csv"
    small = (Table.read(other), json.loads(other.with_suffix(".json").read_text())) if other.exists() else None
    write_whole(docs / "accuracy.md", render(table, about, sorted(drawn), speed, small))


def render(
    table: Table,
    about: Mapping[str, Any],
    pictures: Sequence[str],
    speed: Mapping[str, Any] | None = None,
    small: tuple[Table, Mapping[str, Any]] | None = None,
) -> str:
    """Put the page together; `small` is the same study of the smaller model, on a CPU."""
    judged = claims(table)
    summary = markdown(
        ["", "claim", "verdict"], [[f"({x})", one.title, one.verdict] for x, one in zip("abcdef", judged, strict=True)]
    )
    parts = [INTRODUCTION.format(command=about["command"], circumstances=_circumstances(about)), "## Claims", summary]
    if PICTURES[0] in pictures:
        parts.append(f"![Bits of experts, and perplexity against bits](images/{PICTURES[0]})")
    for x, one in zip("abcdef", judged, strict=True):
        parts += [f"### ({x}) {one.title}: {one.verdict}", one.text]
    parts.append(f"![Predicted against measured loss](images/{PICTURES[1]})")
    parts.append(
        SETTINGS_TEXT.format(
            weight_only=", ".join(f"`{s}`" for s in SETTINGS["2.25"].candidates),
            mixed=" and ".join(f"`{s}`" for s in SETTINGS["w5a5"].candidates),
            w5a5=" and ".join(f"`{s}`" for s in SETTINGS["w5a5"].uniform),
        )
    )
    parts += ["## One scheme for all", uniform_table(table)]
    beside = beside_table(table)
    if beside:
        parts += ["## Quantizers", beside]
    for quantizer in ("gptq", "rtn", "gptq+hadamard"):
        found = methods_table(table, quantizer)
        if found:
            parts += [f"## Allocators, {quantizer}", "Held-out perplexity.", found]
    if small is not None:
        parts += ["## Allocators, rtn, on the smaller study model", small_text(*small)]
    for setting in ("2.25", "w5a5"):
        parts += [f"## Every measure, {setting}, gptq", measures_table(table, setting)]
    parts += ["## Time and memory", cost_table(table), _phases(about)]
    if speed is not None:
        parts += ["## A whole layer of Qwen1.5-MoE's shape", speed_text(speed)]
    parts.append(_limits(table, about, has_small=small is not None))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _circumstances(about: Mapping[str, Any]) -> str:
    versions = about["versions"]
    texts = ", ".join(f"{count:,} tokens {name.replace('_', '-')}" for name, count in about["texts"].items())
    return (
        f"{about['machine']}; GPU {about['gpu']}; Python {versions['python']}, torch {versions.get('torch', '?')},"
        f" transformers {versions.get('transformers', '?')}.\n{about['plans']} plans in {about['wall_seconds']:.0f} s"
        f" ({about.get('plans_left_out', 0)} of the list were left out for want of time), each over {texts};"
        f" {int(about['arguments']['calibration']):,} tokens of calibration data a seed."
    )


def uniform_table(table: Table) -> str:
    """One line per quantizer and scheme."""
    rows: list[list[str]] = []
    floor = table.pick(setting="bf16")
    for line in floor:
        rows.append(["study", "none, float32 products", "bf16", "16", *_measures([line])])
    for model in ("study", "planted"):
        for setting in SETTINGS:
            for scheme in SETTINGS[setting].uniform:
                for quantizer in QUANTIZERS:
                    lines = table.pick(model=model, quantizer=quantizer, method=f"all {scheme}")
                    if lines:
                        bits = f"{lines[0].number('weight_bits'):.3f}"
                        rows.append([model, quantizer, f"`{scheme}`", bits, *_measures(lines)])
    return markdown(["model", "quantizer", "scheme", "bits", *MEASURES], rows)


MEASURES = ("perplexity", "divergence", "its 99 %", "same top 1", "out of domain", "divergence there")
_COLUMNS = (
    ("held_ppl", ".3f"),
    ("held_kl", ".4f"),
    ("held_kl_p99", ".3f"),
    ("held_top1", ".4f"),
    ("ood_ppl", ".3f"),
    ("ood_kl", ".4f"),
)


def _measures(lines: Sequence[Any]) -> list[str]:
    return [with_spread([line.number(name) for line in lines], form) for name, form in _COLUMNS]


def beside_table(table: Table) -> str:
    """A line per quantizer, a column per setting: one scheme for all, then the headline's mix; empty without any."""
    rows: list[list[str]] = []
    for title, settings in (("one scheme", tuple(SETTINGS)), (HEADLINE, MIXED)):
        for quantizer in ("rtn", *BESIDE, "gptq", "gptq+hadamard"):
            cells: list[str] = []
            for setting in SETTINGS:
                schemes = SETTINGS[setting].uniform
                method = HEADLINE if title == HEADLINE else f"all {schemes[0]}" if schemes else ""
                lines = table.pick(model="study", quantizer=quantizer, setting=setting, method=method)
                cells.append(with_spread([line.added for line in lines], ".4f") if setting in settings else "–")
            if any(cell != "–" for cell in cells):
                rows.append([f"{quantizer}, {title}", *cells])
    if not table.pick(quantizer=BESIDE):
        return ""
    return (
        "Loss added. `awq` and `smoothquant` fold their scales into the 16-bit model, each by the calibration data of"
        " its seed, and\nround to nearest then: AWQ's are chosen for the four schemes that stand alone, SmoothQuant's"
        " are powers of two (alpha 0.5).\nScales fold into the norm in front of a block, and into up for what down"
        " reads; `hqq` needs no data.\n\n" + markdown(["", *SETTINGS], rows)
    )


def methods_table(table: Table, quantizer: str) -> str:
    """A line per allocator, a column per setting; empty if nothing was measured."""
    rows: list[list[str]] = []
    for method in ("one scheme", "one scheme, per channel", *METHODS, "random"):
        cells: list[str] = []
        for setting in MIXED:
            schemes = SETTINGS[setting].uniform
            which = 1 if method.endswith("per channel") else 0
            name = f"all {schemes[which]}" if method.startswith("one scheme") and which < len(schemes) else method
            lines = table.pick(model="study", quantizer=quantizer, setting=setting, method=name)
            cells.append(with_spread([line.number("held_ppl") for line in lines], ".3f"))
        if any(cell != "–" for cell in cells):
            rows.append([method, *cells])
    return markdown(["", *MIXED], rows) if len(rows) > 2 else ""  # more than schemes alone


def measures_table(table: Table, setting: str) -> str:
    """A line per allocator with all measures."""
    rows: list[list[str]] = []
    for method in (*(f"all {scheme}" for scheme in SETTINGS[setting].uniform), *METHODS, "random"):
        lines = table.pick(model="study", quantizer="gptq", setting=setting, method=method)
        if lines:
            rows.append([method, f"{mean_of(line.number('weight_bits') for line in lines):.4f}", *_measures(lines)])
    return markdown(["", "bits", *MEASURES], rows)


def cost_table(table: Table) -> str:
    """Seconds and memory by model and quantizer."""
    names = ("quantize_s", "observe_s", "solve_s", "evaluate_s", "prepare_peak_gb", "evaluate_peak_gb")
    rows: list[list[str]] = []
    for model in ("study", "planted"):
        for quantizer in QUANTIZERS:
            lines = [line for line in table.pick(model=model, quantizer=quantizer) if line.cells.get("solve_s")]
            if lines:
                values = [[x for x in (line.number(name) for line in lines) if x > 0] for name in names]
                cells = [f"{mean_of(each):.3g}" if each else "–" for each in values]
                rows.append([model, quantizer, str(len(lines)), *cells])
    head = ["model", "quantizer", "plans", "quantize, all schemes, s", "observe, s", "solve, s", "measure, s"]
    text = "Quantizing includes collecting Hessians; a shelf of codes and an observation serve all plans of a seed.\n\n"
    return text + markdown([*head, "peak GB, prepare", "peak GB, measure"], rows)


def small_text(table: Table, about: Mapping[str, Any]) -> str:
    """Say what allocators do for round to nearest, on the model that a CPU can study."""
    texts = about["texts"]["held_out"]
    floor = mean_of(line.number("held_ppl_bf16") for line in table.lines)
    return (
        f"{about['model'].get('parameters', 0):,} weights, {texts:,} held-out tokens, a perplexity of {floor:.3f} in"
        f" 16 bits;\n{about['machine']}, by `{about['command']}`.\n\n" + methods_table(table, "rtn")
    )


def speed_text(speed: Mapping[str, Any]) -> str:
    """Say how long the accuracy path takes on one large layer."""
    figures = speed["figures"]
    shape, seconds, peaks = figures["shape"], figures["seconds"], figures["peak_gb"]
    rows = [[name, f"{value:.2f}", f"{peaks[name]:.1f}"] for name, value in seconds.items()]
    sampled = [
        [f"{x['role']}, {x['scheme']}", f"{x['seconds']:.3f}", f"{x['squared_change']:.5g}", f"{x['observed']:.5g}"]
        for x in figures["sampled"]
    ]
    return (
        f"{shape['num_experts']} experts of {shape['hidden_size']} x {shape['moe_intermediate_size']} and a shared one"
        f" of {shape['shared_expert_intermediate_size']}, {figures['tokens']:,} tokens,"
        f" {len(figures['schemes'])} schemes; {figures['gpu']}, by\n`{speed['command']}`.\n\n"
        + markdown(["", "seconds", "peak GB"], rows)
        + f"\n\nBy the definition, a full pass of the block for every (expert, role, scheme) takes"
        f" {figures['full passes of the definition']:,} passes of\n{figures['seconds of one, median']:.3f} s,"
        f" {figures['seconds of all, extrapolated']:.0f} s in all: {figures['times less time']:.0f} times the"
        " observation. Passes that were run, and what the\nobservation says of the same linear; the passes run in bf16,"
        " whose rounding adds to what they change:\n\n"
        + markdown(["pass", "seconds", "squared change of the output", "observed"], sampled)
    )


def _phases(about: Mapping[str, Any]) -> str:
    totals: dict[str, float] = {}
    for name, seconds in about["phases"].items():
        totals[name.split()[0]] = totals.get(name.split()[0], 0.0) + seconds
    return "Whole run: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in totals.items()) + "."


def _limits(table: Table, about: Mapping[str, Any], *, has_small: bool) -> str:
    peaks = about.get("max over median, study", {})
    planted = about.get("max over median, planted", {})
    words = ", ".join(f"{value:.0f} at {role.replace('_', ' and ')}" for role, value in peaks.items())
    after = f"; {planted['down']:.0f} at down where planted" if planted else ""
    floor = table.pick(setting="bf16")
    return LIMITS.format(
        parameters=f"{about['model'].get('parameters', 0):,}",
        outliers=f"Largest over median channel:\n  {words}{after} (median over experts).",
        missing=_missing(table, has_small=has_small),
        floor=f"{floor[0].number('held_kl'):.2g}" if floor else "unknown size",
        window=about["arguments"]["window"],
    )


def _missing(table: Table, *, has_small: bool) -> str:
    """Say which quantizers were not reached with allocators."""
    names = [q for q in ("gptq", "rtn", "gptq+hadamard") if not table.pick(model="study", quantizer=q, method="fisher")]
    where = "\n  The smaller model, on little text and one seed, stands in for it." if has_small else ""
    return f"with {', '.join(names)} none was.{where}" if names else "all quantizers were."


def draw_bits(table: Table, about: Mapping[str, Any]) -> Figure | None:
    """Draw perplexity against bits, and where the bits went; None without a plan to draw."""
    maps: list[BitMap] = []
    for setting, plan in about.get("drawn", {}).items():
        routed = {name: bits for name, bits in plan.items() if " routed " in name}
        shared = [plan.get(name.replace(" routed ", " shared "), [None])[0] for name in routed]
        blocks = list(dict.fromkeys(name.split()[0] for name in routed))
        labels = tuple(f"{blocks.index(name.split()[0])} {name.split()[2]}" for name in routed)
        maps.append(BitMap(f"fisher, {setting}", labels, tuple(map(tuple, routed.values())), tuple(shared)))
    same = {"model": "study", "quantizer": "gptq"}
    uniform = [
        Point(scheme, line.number("weight_bits"), line.number("held_ppl"))
        for setting in WEIGHT_ONLY_SETTINGS
        for scheme in SETTINGS[setting].uniform
        for line in table.pick(setting=setting, method=f"all {scheme}", seed=0, **same)
    ]
    mixes = [
        Point(f"fisher, {setting}", line.number("weight_bits"), line.number("held_ppl"))
        for setting in WEIGHT_ONLY_SETTINGS
        for line in table.pick(setting=setting, method="fisher", seed=0, **same)
    ]
    if not maps or not (uniform or mixes):
        return None
    floor = mean_of(line.number("held_ppl_bf16") for line in table.lines)
    return draw_overview(maps, uniform, mixes, baseline=floor, title="GPTQ on the study model, one seed")


def draw_ranks(table: Table) -> Figure:
    """Draw predicted against measured loss of one seed's plans."""
    lines = rank_plans(table, 0)
    figure = new_figure(10, 4.6)
    for number, name in enumerate(("squared", "fisher")):
        axes = figure.add_subplot(1, 2, number + 1)
        for colour, settings, label in (
            (COOL, WEIGHT_ONLY_SETTINGS, "weight-only"),
            (ACCENT, WITH_ACTIVATIONS, "with activations"),
        ):
            inside = [line for line in lines if line.setting in settings and added(line) > 0]
            predicted = [line.number(f"predicted_{name}") for line in inside]
            axes.scatter(predicted, [added(line) for line in inside], s=16, color=colour, label=label, alpha=0.8)
        if any(added(line) > 0 for line in lines):
            axes.set_xscale("log")
            axes.set_yscale("log")
        what = "block errors" if name == "squared" else "Fisher-weighted block errors"
        dress(axes, title=f"{what}, predicted", x="sum over linears", y="loss added, nats per token")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, edgecolor=SOFT)
    return figure
