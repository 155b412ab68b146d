"""
Make docs/study-model.md of the training.json that `train_study_moe.py` wrote.

    python examples/study_moe_page.py study_moe/training.json docs/study-model.md
    python examples/study_moe_page.py study_moe/training.json docs/study-model.md --small study_moe_small/training.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mxmoe.files import write_whole

Record = Mapping[str, Any]

INTRODUCTION = """# The study model

What quantization loses cannot be judged on random weights. The study model is a language model with the architecture
of Qwen1.5-MoE, scaled down until one GPU trains it in minutes, and large enough to have what makes quantization hard.
It is too large to ship; its script is `examples/train_study_moe.py`, and one command trains it anew:

    {command}

Everything that a benchmark needs is in the folder it writes: a transformers folder with the tokenizer, and the token
files `calibration.bin`, `held_out.bin` and `out_of_domain.bin`. `mxmoe eval` and `mxmoe.compile` take the folder.
The weights depend on the machine and on how far the clock let training go, so a model trained again is a sibling of
this one, and not its twin; `training.json` holds the hashes.

A smaller one, for work without a GPU, is trained by the same script with `--small`. Tests that want it read its folder
from the environment variable `MXMOE_STUDY_MODEL`, and skip without it.
"""

ROUTING = """## Routing

Over held-out text. The load of an expert is its share of the assignments. The last three columns are the mutual
information of the chosen expert and, in turn, the class of the token (space, keyword, word, part of a word, number,
punctuation), the token itself, and whether the text is held-out Python or foreign headers (at most 1).

"""
ACTIVATIONS = """## Activations

Kurtosis of all entries / largest over median magnitude of all entries / the same ratio of the channels' largest
magnitudes, the mean over experts.

"""
TEXT = """## Text

The Python standard library and installed distributions whose metadata names permissive licences only, split by file by
the hash of its name. A file most of whose lines were seen before it is left out, held-out files being seen first, so
that near copies of held-out files are not trained on ({copies:,} files were left out). The out-of-domain part is
headers of C and C++. SHA-256 of the whole: `{sha256}`.

"""

SWIGLU_KURTOSIS = 20
"""Kurtosis of SiLU(g) * u, g and u independent and normal: 17 to 22 for a deviation of g from 0.5 to 4, by sampling."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def model_table(records: Sequence[Record]) -> str:
    """Say what each model is and how it was trained."""

    def row(title: str, *path: str, form: str = "{}") -> list[str]:
        cells = [title]
        for record in records:
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            cells.append("" if value is None else form.format(value))
        return cells

    return table(
        ["", *("small" if record["parameters"] < 100e6 else "study model" for record in records)],
        [
            row("weights", "parameters", form="{:,}"),
            row("layers", "shape", "layers"),
            row("routed experts", "shape", "experts"),
            row("per token", "shape", "top_k"),
            row("hidden size", "shape", "hidden"),
            row("expert width", "shape", "intermediate"),
            row("shared expert width", "shape", "shared"),
            row("vocabulary", "shape", "vocabulary"),
            row("window", "shape", "window"),
            row("training tokens in the text", "training", "corpus_tokens", form="{:,}"),
            row("tokens trained on", "training", "tokens", form="{:,}"),
            row("seconds", "training", "seconds", form="{:,.0f}"),
            row("tokens/s", "training", "tokens_per_second", form="{:,}"),
            row("device", "device"),
            row("torch", "versions", "torch"),
            row("transformers", "versions", "transformers"),
            row("seed", "seed"),
            row("held-out perplexity per token", "perplexity", "held_out", "per_token", form="{:.4f}"),
            row("held-out perplexity per byte", "perplexity", "held_out", "per_byte", form="{:.4f}"),
            row("out-of-domain perplexity per token", "perplexity", "out_of_domain", "per_token", form="{:.4f}"),
            row("out-of-domain perplexity per byte", "perplexity", "out_of_domain", "per_byte", form="{:.4f}"),
        ],
    )


def routing_table(record: Record) -> str:
    """Say per layer how evenly and how specially experts are used."""
    head = ["layer", "max/mean load", "min/mean load", "entropy, bits", "class of token, bits", "token, bits"]
    rows = [
        [
            number,
            f"{layer['max_over_mean']:.2f}",
            f"{layer['min_over_mean']:.2f}",
            f"{layer['entropy_bits']:.2f}",
            f"{layer['class_information_bits']:.3f}",
            f"{layer['token_information_bits']:.3f}",
            f"{layer['domain_information_bits']:.3f}",
        ]
        for number, layer in enumerate(record["routing"])
    ]
    return table([*head, "which text, bits"], rows)


def activation_table(record: Record) -> str:
    """Say per layer and role how heavy the tails of activations are."""
    roles = ("gate_up", "down", "shared_down")
    rows = [
        [
            number,
            *(
                f"{layer[role]['kurtosis']:.1f} / {layer[role]['max_over_median']:.0f}"
                f" / {layer[role]['channel_max_over_median']:.1f}"
                for role in roles
            ),
        ]
        for number, layer in enumerate(record["activations"])
    ]
    return table(["layer", "input of gate and up", "input of down", "input of the shared down"], rows)


def outlier_verdict(record: Record) -> str:
    """Say in words whether the model has outliers, by the kurtosis of the inputs of down."""
    kurtosis = sorted(layer["down"]["kurtosis"] for layer in record["activations"])
    middle = kurtosis[len(kurtosis) // 2]
    words = "has heavy tails there" if middle > 3 * SWIGLU_KURTOSIS else "has no outliers to speak of there"
    return (
        f"The median over layers of the kurtosis at the input of down is {middle:.1f}. The product of a normal\n"
        f"variable and the SiLU of another has about {SWIGLU_KURTOSIS}, so the model {words}."
    )


def render(records: Sequence[Record]) -> str:
    """Return the page for the study model, and for the small one if its record comes second."""
    first, text = records[0], records[0]["text"]
    parts = [[name, p["files"], f"{p['bytes']:,}", f"`{p['sha256'][:16]}`"] for name, p in text["parts"].items()]
    sources = [[s["name"], s["version"], s["licence"], s["files"], f"{s['bytes']:,}"] for s in text["sources"]]
    sections = [
        INTRODUCTION.format(command="\n    ".join(record["command"] for record in records)),
        "## What it is\n\n" + model_table(records),
        "Perplexities are those of the bf16 weights as they are written, over disjoint windows.",
        ROUTING + routing_table(first),
        ACTIVATIONS + activation_table(first) + "\n\n" + outlier_verdict(first),
        TEXT.format(copies=text["near_copies_left_out"], sha256=text["sha256"])
        + table(["part", "files", "bytes", "SHA-256 begins"], parts)
        + "\n\n"
        + table(["source", "version", "licence", "files", "bytes"], sources),
    ]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def main(arguments: list[str]) -> None:
    """Read the records and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="training.json of the study model")
    parser.add_argument("page", type=Path, help="where the page goes")
    parser.add_argument("--small", type=Path, help="training.json of the small model")
    options = parser.parse_args(arguments)
    paths = [options.record, *([options.small] if options.small else [])]
    write_whole(options.page, render([json.loads(path.read_text(encoding="utf-8")) for path in paths]))


if __name__ == "__main__":
    main(sys.argv[1:])
