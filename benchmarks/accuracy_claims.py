"""The six claims of the accuracy study, each with its numbers and a verdict that the numbers decide."""

from __future__ import annotations

import math
from dataclasses import dataclass

from accuracy_plans import HEADLINE, MIXED, SETTINGS, WEIGHT_ONLY_SETTINGS, WITH_ACTIVATIONS
from accuracy_read import Line, Margin, Table, markdown, mean_of, spearman

GAP = 0.9
RANKS, PLANS = 0.9, 40
READING_OF_GRANULARITY = """Our reading of the study model: the tables promise less loss at every setting, since they
are what is minimised. Where activations are quantized it comes: down reads the outliers, most of the 8-bit linears are
downs (see the picture), and an expert with one scheme for all of its linears cannot give 8 bits to down alone. Where
only weights are, little of the promised quarter arrives, and with rounding to nearest it turns into its opposite at 2.5
and 3.25 bits: sensitivities are of one linear at a time, and those of one expert follow on each other, so that their
errors need not add up as independent ones do. At 4.25 bits the loss that is left to save is as small as the noise; the
divergence, which is steadier, shows it."""


@dataclass(frozen=True)
class Claim:
    """A claim, whether it holds, and the figures."""

    title: str
    holds: bool | None
    """None: not measured."""
    text: str

    @property
    def verdict(self) -> str:
        """In a word."""
        return "not measured" if self.holds is None else "holds" if self.holds else "does not hold"


def claims(table: Table) -> list[Claim]:
    """Judge all six."""
    return [mixed_low(table), mixed_w5a5(table), fisher_global(table), finer(table), hadamard(table), ranks(table)]


def added(line: Line) -> float:
    """Loss added, for use as a key."""
    return line.added


def _margin(table: Table, better: str, worse: str, setting: str, quantizer: str = "gptq") -> Margin:
    same = {"model": "study", "setting": setting, "quantizer": quantizer}
    return Margin.of(table.by_seed(added, method=better, **same), table.by_seed(added, method=worse, **same))


def mixed_low(table: Table) -> Claim:
    """(a): mixed 2.25 bits against uniform GPTQ."""
    base = f"all {SETTINGS['2.25'].uniform[0]}"
    same = {"model": "study", "quantizer": "gptq", "setting": "2.25"}
    uniform = mean_of(map(added, table.pick(method=base, **same)))
    rows = [["one scheme, w2a16_g128_asym", f"{uniform:.4f}", "", ""]]
    for method in ("fisher", "squared", "mxmoe", "fisher, per expert", "pmq", "frequency", "random"):
        margin = _margin(table, method, base, "2.25")
        outside = Margin.of(
            table.by_seed(lambda line: line.added_outside, method=method, **same),
            table.by_seed(lambda line: line.added_outside, method=base, **same),
        )
        if margin.seeds:
            loss = mean_of(map(added, table.pick(method=method, **same)))
            rows.append([method, f"{loss:.4f}", str(margin), str(outside)])
    margin = _margin(table, HEADLINE, base, "2.25")
    text = markdown(["plan at 2.25 bits", "loss added", "less than one scheme", "the same, out of domain"], rows)
    return Claim("Mixed 2.25 bits beats uniform GPTQ at 2.25 bits", margin.is_clear if margin.seeds else None, text)


def mixed_w5a5(table: Table) -> Claim:
    """(b): mixed w5a5 against uniform w5a5, and the part of the gap from w4a4 to w8a8 that it closes."""
    rows: list[list[str]] = []
    holds: bool | None = None
    for quantizer in ("gptq", "gptq+hadamard"):
        same = {"model": "study", "quantizer": quantizer}
        low, high = (
            mean_of(map(added, table.pick(setting=name, method=f"all {SETTINGS[name].uniform[0]}", **same)))
            for name in ("w4a4", "w8a8")
        )
        names = [f"all {scheme}" for scheme in SETTINGS["w5a5"].uniform]
        uniform = {name: mean_of(map(added, table.pick(setting="w5a5", method=name, **same))) for name in names}
        best = min(uniform, key=lambda name: (math.isnan(uniform[name]), uniform[name]))
        listed = [("w4a4", low), *((name.removeprefix("all "), loss) for name, loss in uniform.items()), ("w8a8", high)]
        for name, loss in listed:
            rows.append([quantizer, f"one scheme, {name}", f"{loss:.4f}", _gap(low, high, loss), ""])
        worse = table.by_seed(added, setting="w5a5", method=best, **same)
        mixes = [(m, "w5a5") for m in ("fisher", "squared", "mxmoe", "random")]
        for method, setting in (*mixes, *((m, "w5a5 and w4a8") for m in ("fisher", "squared", "mxmoe"))):
            better = table.by_seed(added, setting=setting, method=method, **same)
            margin, loss = Margin.of(better, worse), mean_of(better.values())
            if margin.seeds:
                name = f"{method}, mix of {' and '.join(_short(s) for s in SETTINGS[setting].candidates)}"
                rows.append([quantizer, name, f"{loss:.4f}", _gap(low, high, loss), str(margin)])
                if quantizer == "gptq" and method == HEADLINE and setting == "w5a5":
                    holds = margin.is_clear and (low - loss) / (low - high) >= GAP
    head = ["quantizer", "plan", "loss added", "gap from w4a4 to w8a8 closed", "less than the best uniform w5a5"]
    title = "Mixed w5a5 beats uniform w5a5 and closes at least 90 % of the gap from w4a4 to w8a8"
    text = (
        "Mixes have 5.125 effective bits per weight, as `w5a5_g128_sym` has. The verdict is on `fisher` with gptq and"
        " the two\nschemes of the paper's mix; the mix that may also take w4a8 stands beside it.\n\n"
    )
    return Claim(title, holds, text + markdown(head, rows))


def _short(scheme: str) -> str:
    return scheme.removesuffix("_sym").removesuffix("_g128")


def _gap(low: float, high: float, loss: float) -> str:
    return f"{100 * (low - loss) / (low - high):.1f} %" if low > high else "–"


def fisher_global(table: Table) -> Claim:
    """(c): Fisher-weighted with one budget against per-layer mxmoe."""
    rows: list[list[str]] = []
    margins: list[Margin] = []
    for quantizer in ("gptq", "rtn", "gptq+hadamard"):
        found = [_margin(table, "fisher", "mxmoe", setting, quantizer) for setting in MIXED]
        if any(margin.seeds for margin in found):
            rows.append([quantizer, *map(str, found)])
            margins += [margin for margin in found if margin.seeds]
    text = (
        "Loss of `mxmoe` (a budget for each layer) less that of `fisher` (one budget), by seed. The verdict is that"
        " `fisher` is\nclearly worse nowhere: by no more than twice the deviation.\n\n"
    )
    holds = all(margin.is_no_loss for margin in margins) if margins else None
    title = "Fisher-weighted global allocation is at least as good as per-layer mxmoe"
    return Claim(title, holds, text + markdown(["quantizer", *MIXED], rows))


def finer(table: Table) -> Claim:
    """(d): one choice for each linear against one for each expert."""
    rows: list[list[str]] = []
    margins: list[Margin] = []
    for quantizer in ("gptq", "rtn", "gptq+hadamard"):
        for method in ("fisher", "squared"):
            found = [_margin(table, method, f"{method}, per expert", setting, quantizer) for setting in MIXED]
            if any(margin.seeds for margin in found):
                rows.append([f"{quantizer}, {method}", *map(str, found)])
                margins += [margin for margin in found if margin.seeds and method == HEADLINE and quantizer == "gptq"]
    for method in ("fisher", "squared"):
        rows.append([f"gptq, {method}, divergence", *_divergence(table, method)])
        rows.append([f"gptq, {method}, what its table promises", *_promised(table, method)])
    text = (
        "Loss (or divergence) with one scheme for each expert less that with one for each linear, by seed. The"
        "\nverdict is on the loss of `fisher` with gptq: no margin negative, and most of them clear. It is"
        f"\n{_where(table)}.\n\n{READING_OF_GRANULARITY}\n\n"
    )
    most = sum(margin.is_clear for margin in margins) > len(margins) / 2
    holds = most and all(margin.mean >= 0 for margin in margins) if margins else None
    title = "Linear-block granularity beats expert granularity"
    return Claim(title, holds, text + markdown(["quantizer, allocator", *MIXED], rows))


def _where(table: Table) -> str:
    """Say at which settings finer choices pay."""
    found = {setting: _margin(table, HEADLINE, f"{HEADLINE}, per expert", setting) for setting in MIXED}
    better = [name for name, margin in found.items() if margin.is_clear]
    worse = [name for name, margin in found.items() if margin.seeds and not margin.is_no_loss]
    open_ = [name for name, margin in found.items() if margin.seeds and name not in (*better, *worse)]
    names = {"clearly better at": better, "clearly worse at": worse, "no different beyond the noise at": open_}
    return "; ".join(f"{word} {' / '.join(settings)}" for word, settings in names.items() if settings)


def _promised(table: Table, method: str) -> list[str]:
    """Part of the predicted loss that finer choices save, a cell for each setting."""
    cells: list[str] = []
    for setting in MIXED:
        same = {"model": "study", "quantizer": "gptq", "setting": setting}
        fine, coarse = (
            mean_of(line.number(f"predicted_{method}") for line in table.pick(method=name, **same))
            for name in (method, f"{method}, per expert")
        )
        cells.append("–" if math.isnan(fine / coarse) else f"{100 * (1 - fine / coarse):.0f} %")
    return cells


def _divergence(table: Table, method: str) -> list[str]:
    """Divergence with one scheme for each expert less that with one for each linear, a cell for each setting."""
    cells: list[str] = []
    for setting in MIXED:
        same = {"model": "study", "quantizer": "gptq", "setting": setting}
        fine, coarse = (
            table.by_seed(lambda line: line.number("held_kl"), method=name, **same)
            for name in (method, f"{method}, per expert")
        )
        cells.append(str(Margin.of(fine, coarse)))
    return cells


def hadamard(table: Table) -> Claim:
    """(e): the rotation in front of down, at 4-bit activations."""
    rows: list[list[str]] = []
    holds: list[bool] = []
    for model in ("study", "planted"):
        for base in ("gptq", "rtn"):
            for setting in ("w4a4", "w5a5", "w4a8", "w8a8"):
                same = {"model": model, "setting": setting, "method": f"all {SETTINGS[setting].uniform[0]}"}
                without, turned = (
                    mean_of(map(added, table.pick(quantizer=name, **same))) for name in (base, f"{base}+hadamard")
                )
                if math.isnan(without) or math.isnan(turned):
                    continue
                less = 1 - turned / without if without > 0.001 else math.nan
                shown = "–" if math.isnan(less) else f"{100 * less:.1f} %"
                rows.append([model, base, setting, f"{without:.4f}", f"{turned:.4f}", shown])
                if setting == "w4a4" and base == "gptq":
                    holds.append(less >= 0.5)
    head = ["model", "quantizer", "scheme", "loss added", "with the rotation", "less by"]
    text = (
        "Loss added with one scheme for all; to repair is taken to mean that at least half of what w4a4 adds with"
        "\ngptq goes, on both models. `planted` computes what the study model does, with four channels of every"
        "\ndown's input 32 times as large, and their weights as much smaller. Rotated, every weight of down meets"
        "\nthese channels: GPTQ knows of it by its Hessian, and rounding to nearest does not, which costs it at four"
        "\nbits of weights.\n\n"
    )
    title = "An online Hadamard rotation in front of down repairs w4a4"
    return Claim(title, all(holds) if holds else None, text + markdown(head, rows))


def rank_plans(table: Table, seed: int) -> list[Line]:
    """List the plans of one observation: the same codes, data and tables."""
    return [line for line in table.pick(model="study", quantizer="gptq", seed=seed) if line.cells["predicted_squared"]]


def ranks(table: Table) -> Claim:
    """(f): predicted block errors against measured loss."""
    rows: list[list[str]] = []
    holds: bool | None = None
    groups = {"all": tuple(SETTINGS), "weight-only": WEIGHT_ONLY_SETTINGS, "with activations": WITH_ACTIVATIONS}
    groups |= {f"{name} alone": (name,) for name in MIXED}
    for seed in sorted({line.seed for line in table.lines}):
        lines = rank_plans(table, seed)
        for title, settings in groups.items():
            inside = [line for line in lines if line.setting in settings]
            if len(inside) < 3:
                continue
            measured = [line.added for line in inside]
            found = [
                spearman([line.number(f"predicted_{name}") for line in inside], measured)
                for name in ("squared", "fisher")
            ]
            divergence = [line.number("held_kl") for line in inside]
            kl = spearman([line.number("predicted_fisher") for line in inside], divergence)
            rows.append([f"{seed}, {title}", str(len(inside)), *(f"{one:.3f}" for one in (*found, kl))])
            if title == "all" and len(inside) >= PLANS:
                holds = (holds is None or holds) and found[0] >= RANKS
    head = ["seed, settings", "plans", "block errors, loss", "Fisher-weighted, loss", "Fisher-weighted, divergence"]
    text = (
        "Spearman's rank correlation of what the tables predict, summed over the linears, and what was measured"
        "\non held-out text. The verdict is on the plain block errors (`squared`) over all settings of every seed.\n\n"
    )
    title = "Predicted block errors rank plans as measured perplexity does (Spearman ≥ 0.9, 40 plans or more)"
    return Claim(title, holds, text + markdown(head, rows))
