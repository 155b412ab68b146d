"""
Train the language model that the accuracy study measures on, from nothing, on text that the machine has installed.

The model is a transformers `Qwen2MoeForCausalLM`, Qwen1.5-MoE's architecture scaled down: 10 layers of 40 experts (four
per token) beside a gated shared expert, hidden size 512, a BPE of 16,384 tokens; 192 million weights. With --small it
has 8 layers of 32 experts, hidden size 256, 8,192 tokens; 29 million weights, 59 MB in bf16, for work on a CPU.

    python examples/train_study_moe.py --out study_moe --minutes 8                # one H200
    python examples/train_study_moe.py --out study_moe_small --small --minutes 4
    python examples/train_study_moe.py --out toy --smoke --device cpu             # seconds, on any machine

The text is the standard library and the installed distributions with permissive licences, without near copies, split
by file; headers of C and C++ are the text of another kind. It writes config.json, model.safetensors (or shards of
--max-shard), tokenizer.json, tokenizer_config.json, training.json, and the token files calibration.bin, held_out.bin
and out_of_domain.bin (little-endian uint16); with --pack also the folder as parts of one tar archive, which
`cat FOLDER.tar.* | tar x` unpacks. An interrupted run resumes from checkpoint.pt. `study_moe_page.py` makes
docs/study-model.md of training.json.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from study_moe_measure import count_routing, describe_routing, profile_activations
from study_moe_text import PARTS, StudyText, read_text
from study_moe_tokens import Part, encode, save_part, save_tokenizer, token_classes, train_tokenizer
from study_moe_trainer import SHAPES, Shape, Trainer, flops_per_token
from tiny_moe_record import write_atomically
from torch import Tensor

from mxmoe.evaluate import perplexity

WRITTEN = ("calibration", "held_out", "out_of_domain")
RESERVE_SECONDS = 60.0
"""Of --total-minutes, for what comes after training."""
SPOT_TOKENS = 8192
"""Held-out tokens from the start that are measured alone: another machine can check its copy in seconds."""
PACK_BYTES = 15 * 1024 * 1024


def prepare(options: argparse.Namespace, shape: Shape) -> tuple[StudyText, tokenizers.Tokenizer, dict[str, Part]]:
    """Read the text, learn its tokens, and encode it: all of the training part, as much of the others as is asked."""
    began = time.monotonic()
    text = read_text(options.source, options.corpus_mb * 1_000_000)
    sizes = {part: f"{text.record['parts'][part]['bytes'] / 1e6:.1f} MB" for part in PARTS}
    print(f"text {sizes} of {len(text.record['sources'])} sources in {time.monotonic() - began:.1f} s", flush=True)
    tokenizer = train_tokenizer(text, shape.vocabulary)
    print(f"{tokenizer.get_vocab_size()} tokens learned after {time.monotonic() - began:.1f} s", flush=True)
    parts = {
        part: encode(
            tokenizer, [one.content for one in text.parts[part]], None if part == "train" else options.set_tokens
        )
        for part in PARTS
    }
    counts = {part: f"{len(parts[part].ids):,}" for part in PARTS}
    print(f"tokens {counts} after {time.monotonic() - began:.1f} s", flush=True)
    return text, tokenizer, parts


def training_seconds(options: argparse.Namespace, began: float) -> float:
    """Return the seconds that training may take: --minutes, or less where --total-minutes leaves less."""
    left = 60 * options.total_minutes - (time.monotonic() - began) - RESERVE_SECONDS
    seconds = min(60 * options.minutes, max(left, 1.0))
    if seconds < 60 * options.minutes:
        print(f"warning: {seconds:.0f} s are left for training, not {60 * options.minutes:.0f}", flush=True)
    return seconds


# What is measured and written


def measure(trainer: Trainer, parts: dict[str, Part], classes: tuple[tuple[str, ...], list[int]]) -> dict[str, Any]:
    """Measure the final weights as they are written: perplexities, routing, activations."""
    model, window = trainer.model, trainer.shape.window
    batch = max(trainer.batch // 4, 1)
    ids = {part: torch.from_numpy(parts[part].ids).to(trainer.device) for part in WRITTEN}
    found: dict[str, Any] = {"perplexity": {}}
    for part in ("held_out", "out_of_domain"):
        seen = perplexity(model, ids[part], window=window, batch=batch)
        per_byte = seen.nats_per_token * seen.tokens / parts[part].n_bytes
        found["perplexity"][part] = {
            "tokens": seen.tokens,
            "bytes": parts[part].n_bytes,
            "nats_per_token": seen.nats_per_token,
            "per_token": seen.perplexity,
            "per_byte": math.exp(per_byte),
            "bits_per_byte": per_byte / math.log(2),
        }
    start = perplexity(model, ids["held_out"][: SPOT_TOKENS + 1], window=window, batch=batch)
    found["spot"] = {"tokens": start.tokens, "nats_per_token": start.nats_per_token}
    try:
        found["token_classes"] = list(classes[0])
        inside, outside = (
            count_routing(model, some(ids[part]), window, batch) for part in ("held_out", "out_of_domain")
        )
        found["routing"] = describe_routing(inside, outside, classes[1])
        found["activations"] = profile_activations(model, ids["held_out"], window)
    except (RuntimeError, ValueError, AttributeError) as error:  # the trained weights are worth more than their picture
        print(f"warning: no profile ({type(error).__name__}: {error})", flush=True)
    return found


def some(ids: Tensor) -> Tensor:
    """Return as many ids as the routing is counted on."""
    return ids[: 1 << 19]


def save_model(trainer: Trainer, out: Path, max_shard: str) -> dict[str, str]:
    """Write config.json and the weights (bf16, transformers' own layout); return the hash of every weight file."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        trainer.model.save_pretrained(folder, max_shard_size=max_shard)
        for path in sorted(Path(folder).iterdir()):
            if path.name.startswith(("config", "model")):
                os.replace(path, out / path.name)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))}


def describe_run(trainer: Trainer, corpus_tokens: int) -> dict[str, Any]:
    """Say what was run, where, and how fast it went."""
    options, progress = trainer.options, trainer.progress
    return {
        "command": shlex.join(["python", "examples/train_study_moe.py", *map(str, options.command)]),
        "seed": options.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "device": torch.cuda.get_device_name() if trainer.is_gpu else platform.processor() or "cpu",
        "cpu_cores": os.cpu_count(),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if trainer.is_gpu else None,
        "shape": asdict(trainer.shape),
        "parameters": sum(weight.numel() for weight in trainer.weights),
        "step_flops_per_token": flops_per_token(trainer.model, trainer.shape),
        "training": {
            "how": trainer.how,
            "batch": trainer.batch,
            "window": trainer.shape.window,
            "learning_rate": options.lr,
            "balance": options.balance,
            "decay_share": options.decay,
            "steps": progress.step,
            "tokens": progress.tokens,
            "corpus_tokens": corpus_tokens,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9)),
        },
    }


def finish(
    trainer: Trainer, text: StudyText, tokenizer: tokenizers.Tokenizer, parts: dict[str, Part], began: float
) -> dict[str, Any]:
    """Write every file, measure the weights, and return the record."""
    options, out = trainer.options, trainer.options.out
    trainer.model.to(torch.bfloat16)
    hashes = save_model(trainer, out, options.max_shard)
    save_tokenizer(tokenizer, out)
    files = {f"{part}.bin": save_part(parts[part], out / f"{part}.bin") for part in WRITTEN}
    record = describe_run(trainer, len(parts["train"].ids))
    record["weights_sha256"] = hashes
    record["tokenizer_sha256"] = hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest()
    record["token_files"] = files
    record["text"], record["curve"] = text.record, trainer.progress.curve
    write_record(record, out)
    record.update(measure(trainer, parts, token_classes(tokenizer)))
    record["total_seconds"] = round(time.monotonic() - began, 1)
    write_record(record, out)
    trainer.checkpoint.unlink(missing_ok=True)
    return record


def write_record(record: dict[str, Any], out: Path) -> None:
    """Write training.json."""
    write_atomically(out / "training.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))


def pack(out: Path, where: Path) -> None:
    """Write the folder as FOLDER.tar.00, .01, ... of at most PACK_BYTES, for ways that carry only small files."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        archive.add(out, out.name)
    where.mkdir(parents=True, exist_ok=True)
    content = whole.getbuffer()
    for number, start in enumerate(range(0, len(content), PACK_BYTES)):
        (where / f"{out.name}.tar.{number:02}").write_bytes(content[start : start + PACK_BYTES])
    shutil.copy(out / "training.json", where / f"{out.name}.json")


def print_record(record: dict[str, Any]) -> None:
    """Print what was reached."""
    training = record["training"]
    print(f"{record['parameters']:,} weights; {training['steps']} steps, {training['tokens']:,} tokens in", end=" ")
    print(
        f"{training['seconds']} s, {training['tokens_per_second']:,} tokens/s; text sha256 {record['text']['sha256']}"
    )
    for part, found in record["perplexity"].items():
        print(f"{part}: perplexity {found['per_token']:.4f} per token, {found['per_byte']:.4f} per byte")
    for number, layer in enumerate(record.get("routing", ())):
        print(
            f"layer {number}: load max/mean {layer['max_over_mean']:.2f}, entropy {layer['entropy_bits']:.2f} bits,",
            end=" ",
        )
        print(f"expert and class of token share {layer['class_information_bits']:.3f} bits,", end=" ")
        print(f"and text {layer['domain_information_bits']:.3f}")
    for number, layer in enumerate(record.get("activations", ())):
        roles = (
            f"{role} kurtosis {one['kurtosis']:.1f} max/median {one['max_over_median']:.0f}"
            f" (channels {one['channel_max_over_median']:.1f})"
            for role, one in layer.items()
        )
        print(f"layer {number}: {'; '.join(roles)}")


# Command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results and the checkpoint")
    parser.add_argument("--source", type=Path, help="folder of text, in place of what is installed")
    parser.add_argument("--small", action="store_true", help="the model for work on a CPU")
    parser.add_argument("--smoke", action="store_true", help="a toy model and few steps, for tests")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="time to train")
    parser.add_argument("--total-minutes", type=float, default=math.inf, help="time for everything; shortens --minutes")
    parser.add_argument("--steps", type=int, help="step budget; whichever ends first")
    parser.add_argument("--batch", type=int, help="windows per step")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.35, help="share of the budget in which the rate falls")
    parser.add_argument("--balance", type=float, default=0.001, help="weight of the balance loss: less, more skew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus-mb", type=int, default=300, help="training text at most, in megabytes")
    parser.add_argument("--set-tokens", type=int, help="tokens in each of the files written, at most")
    parser.add_argument("--evaluate-every", type=int, help="steps between evaluations")
    parser.add_argument("--held-out-tokens", type=int, default=1 << 18, help="held-out tokens per evaluation")
    parser.add_argument("--save-minutes", type=float, default=4.0, help="minutes between checkpoints")
    parser.add_argument("--max-shard", default="5GB", help="size of a weight file at most, as transformers spells it")
    parser.add_argument("--pack", type=Path, help="folder for the result as parts of an archive, 15 MiB each")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not compile the loss")
    options = parser.parse_args(arguments)
    options.command = [Path(word).name if "/" in word else word for word in arguments]
    options.preset = "smoke" if options.smoke else "small" if options.small else "full"
    defaults = {
        "full": {"steps": 10**9, "batch": 64, "lr": 1.2e-3, "set_tokens": 1 << 20, "evaluate_every": 200},
        "small": {"steps": 10**9, "batch": 128, "lr": 2e-3, "set_tokens": 1 << 18, "evaluate_every": 250},
        "smoke": {"steps": 24, "batch": 8, "lr": 3e-3, "set_tokens": 4096, "evaluate_every": 8},
    }
    for name, value in defaults[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: list[str]) -> None:
    """Train, write and report."""
    began = time.monotonic()
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    shape = SHAPES[options.preset]
    text, tokenizer, parts = prepare(options, shape)
    trainer = Trainer(options, shape, parts["train"].ids, parts["held_out"].ids)
    print(f"{sum(weight.numel() for weight in trainer.weights):,} weights", end=", ")
    print(f"{flops_per_token(trainer.model, shape) / 1e9:.2f} GFLOP per trained token", flush=True)
    trainer.resume()
    trainer.run(training_seconds(options, began))
    record = finish(trainer, text, tokenizer, parts, began)
    print_record(record)
    if options.pack is not None:
        pack(options.out, options.pack)


if __name__ == "__main__":
    main(sys.argv[1:])
