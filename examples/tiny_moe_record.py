"""What is written down about the trained model: its loss, its routing, the curve, and the files that ship."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from tiny_moe_text import KINDS, LICENCE, Corpus, byte_kinds
from torch import Tensor
from transformers import Qwen2MoeForCausalLM

from mxmoe.report import draw_loss_curve, save_figure

if TYPE_CHECKING:
    from train_tiny_moe import Trainer

SEQUENCE = 512


@torch.no_grad()
def evaluate(model: Qwen2MoeForCausalLM, text: Tensor, batch: int) -> float:
    """Return the loss in nats per byte over the disjoint windows of `text`, summed in double precision."""
    model.eval()
    n = (len(text) - 1) // SEQUENCE
    inputs, targets = text[: n * SEQUENCE].view(n, -1), text[1 : n * SEQUENCE + 1].view(n, -1)
    total = 0.0
    for i in range(0, n, batch):
        logits = model(input_ids=inputs[i : i + batch].long(), use_cache=False).logits.float().flatten(0, 1)
        total += (
            F.cross_entropy(logits, targets[i : i + batch].long().flatten(), reduction="none").double().sum().item()
        )
    model.train()
    return total / (n * SEQUENCE)


@torch.no_grad()
def routing_report(model: Qwen2MoeForCausalLM, text: bytes, device: str, batch: int) -> list[dict[str, Any]]:
    """
    Say per layer how the held-out bytes are routed.

    `frequency` is each expert's share of the assignments (sums to 1), `kind_information_bits` the mutual information of
    expert and kind of byte (0: experts do not care; at most the entropy of the kinds), `top_bytes` what each expert
    sees most.
    """
    model.eval()
    n = len(text) // SEQUENCE
    data = torch.frombuffer(bytearray(text[: n * SEQUENCE]), dtype=torch.uint8).view(n, SEQUENCE)
    kinds = byte_kinds(text)[: n * SEQUENCE]
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts, 256, len(KINDS), dtype=torch.float64)
    for i in range(0, n, batch):
        rows = data[i : i + batch]
        out = model(input_ids=rows.long().to(device), output_router_logits=True, use_cache=False)
        label = rows.flatten().long() * len(KINDS) + kinds[i * SEQUENCE : (i + len(rows)) * SEQUENCE]
        for layer, logits in enumerate(out.router_logits):
            for chosen in logits.float().topk(config.num_experts_per_tok, -1).indices.cpu().T:
                cells = chosen * 256 * len(KINDS) + label
                counts[layer].view(-1).index_add_(0, cells, torch.ones(len(cells), dtype=torch.float64))
    model.train()
    return [describe_layer(layer / layer.sum()) for layer in counts]


def describe_layer(joint: Tensor) -> dict[str, Any]:
    """Summarise the joint distribution [expert, byte, kind] of one layer's assignments."""
    frequency, by_kind = joint.sum((1, 2)), joint.sum(1)
    independent = frequency[:, None] * by_kind.sum(0)
    information = torch.where(by_kind > 0, by_kind * torch.log2(by_kind / independent), 0.0).sum()
    top = [row.topk(6).indices[row.topk(6).values > 0].tolist() for row in joint.sum(2)]
    return {
        "frequency": [round(f, 5) for f in frequency.tolist()],
        "kind_information_bits": round(information.item(), 4),
        "top_bytes": [[repr(chr(b)) if b < 128 else hex(b) for b in row] for row in top],
    }


def write_atomically(path: Path, write: Any) -> None:  # noqa: ANN401  # any callable of a path
    """Call `write(temporary)` and rename the result to `path`, so that a reader sees all of it or the old one."""
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    os.replace(temporary, path)


def save_model(model: Qwen2MoeForCausalLM, out: Path) -> None:
    """Write config.json and model.safetensors (bf16, in transformers' own layout)."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        for name in ("config.json", "model.safetensors"):
            os.replace(Path(folder) / name, out / name)


def finish(trainer: Trainer, corpus: Corpus, out: Path) -> dict[str, Any]:
    """Evaluate the final weights as they ship, write every file but the checkpoint, and return the record."""
    options, progress, model = trainer.options, trainer.progress, trainer.model
    model.to(torch.bfloat16)
    texts: dict[str, Any] = {}
    for part in corpus.parts:
        whole = corpus.text(part)
        files = len(corpus.parts[part])
        texts[part] = {"files": files, "bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    for part in ("calibration", "held_out"):
        sample, names = corpus.sample(part, options.text_bytes)
        write_atomically(out / f"{part}.txt", lambda path, sample=sample: path.write_bytes(sample))
        texts[f"{part}.txt"] = {"bytes": len(sample), "sha256": hashlib.sha256(sample).hexdigest(), "files": names}
    held_out = corpus.text("held_out")
    loss = evaluate(model, torch.frombuffer(bytearray(held_out), dtype=torch.uint8).to(options.device), options.batch)
    layers = routing_report(model, held_out[: options.held_out_bytes], options.device, options.batch)
    save_model(model, out)
    weights = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    record: dict[str, Any] = {
        "command": shlex.join(["python", "examples/train_tiny_moe.py", *options.command]),
        "seed": options.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "cpu",
        "model_sha256": weights,
        "parameters": sum(weight.numel() for weight in trainer.weights),
        "text": {"source": options.text_source, "licence": LICENCE, "parts": texts},
        "batch": options.batch,
        "sequence": SEQUENCE,
        "learning_rate": options.lr,
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "decay_from_share_of_budget": progress.decay_from,
        "held_out_nats_per_byte": loss,
        "held_out_perplexity": math.exp(loss),
        "routing": layers,
        "curve": progress.curve,
    }
    write_atomically(out / "training.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    figure = draw_loss_curve(progress.curve, title="Tiny MoE on the Python standard library, per byte")
    save_figure(figure, out / "loss_curve.png")
    trainer.checkpoint.unlink(missing_ok=True)
    return record


def print_record(record: dict[str, Any]) -> None:
    """Print the perplexity and how each layer routes the held-out bytes."""
    print(f"{record['steps']} steps in {record['seconds']} s, {record['parameters']:,} weights")
    print(f"held-out perplexity {record['held_out_perplexity']:.4f} per byte")
    for number, layer in enumerate(record["routing"]):
        shares = " ".join(f"{100 * f:4.1f}" for f in layer["frequency"])
        print(f"layer {number}: share of assignments, %: {shares}")
        print(f"  expert and kind of byte share {layer['kind_information_bits']:.3f} bits; most seen bytes per expert:")
        for expert, top in enumerate(layer["top_bytes"]):
            print(f"  {expert:3d}  {' '.join(top)}")
