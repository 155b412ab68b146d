"""
Train the small Mixture-of-Experts language model that ships with mxmoe, from nothing, on text every machine has.

The model is a transformers `Qwen2MoeForCausalLM` over bytes: 4 blocks of 16 experts (two per byte) beside a shared
expert, 3.7 million weights, 7.5 MB in bf16. The text is the Python standard library (licence PSF-2.0), split by
file: a file is in the training, the calibration or the held-out part by the hash of its path, never in two.

    python examples/train_tiny_moe.py --out tiny_moe --minutes 8 --compile          # one GPU
    python examples/train_tiny_moe.py --out toy --tiny --steps 20 --device cpu       # seconds, on any machine

Training keeps the learning rate until the held-out loss is flat (or the budget is nearly spent), lets it fall to zero,
and ships the weights of the best evaluation. It writes config.json, model.safetensors, training.json, calibration.txt,
held_out.txt and loss_curve.png, each whole or not at all, and resumes from checkpoint.pt when it was interrupted.
"""

from __future__ import annotations

import argparse
import platform
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_moe_record import SEQUENCE, evaluate, finish, print_record, write_atomically
from tiny_moe_text import Corpus, read_corpus
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

SHIPPED_TEXT_BYTES = 192 * 1024
WARM_UP_STEPS = 200
DECAY_SHARE = 0.3


# Model


def build_model(tiny: bool, balance: float) -> Qwen2MoeForCausalLM:
    """Build the untrained model, or a toy of the same form for tests; `balance` weighs the balance loss."""
    hidden, layers, experts, intermediate = (32, 2, 4, 32) if tiny else (128, 4, 16, 128)
    config = Qwen2MoeConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        moe_intermediate_size=intermediate,
        shared_expert_intermediate_size=2 * intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.06,
        router_aux_loss_coef=balance,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return Qwen2MoeForCausalLM(config)


def losses(model: Qwen2MoeForCausalLM, windows: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return the mean loss in nats per byte, and the balance loss, of windows [batch, n + 1] of bytes.

    The balance loss is E * sum_e f_e P_e of the Switch Transformer (equation 4), averaged over the layers. The one in
    transformers sums the layers before it multiplies, and so lets a layer starve an expert that another overworks.
    """
    out = model(input_ids=windows[:, :-1], output_router_logits=True, use_cache=False)
    loss = F.cross_entropy(out.logits.float().flatten(0, 1), windows[:, 1:].flatten())
    balance = loss.new_zeros(())
    for logits in out.router_logits:
        probability = logits.float().softmax(-1)
        experts = probability.shape[-1]
        chosen = probability.topk(model.config.num_experts_per_tok, -1).indices
        used = F.one_hot(chosen, experts).float().mean((0, 1))
        balance = balance + experts * (used * probability.mean(0)).sum()
    return loss, balance / len(out.router_logits)


# Training


@dataclass
class Progress:
    """What training has to remember; all of it is in the checkpoint and in training.json."""

    step: int = 0
    seconds: float = 0.0
    decay_from: float | None = None
    """Share of the budget (0 to 1) at which the learning rate began to fall; None before."""
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, training loss, held-out loss) in nats per byte, one per evaluation."""
    best: float = float("inf")
    """Lowest held-out loss so far; its weights are the ones that ship."""


def learning_rate(options: argparse.Namespace, progress: Progress, share: float) -> float:
    """Return the warm-up, stable, decay schedule at a step: linear up, flat, then linear to zero over DECAY_SHARE."""
    warm_up = min(1.0, (progress.step + 1) / min(WARM_UP_STEPS, max(options.steps // 10, 1)))
    if progress.decay_from is None:
        return options.lr * warm_up
    return options.lr * warm_up * max(0.0, 1 - (share - progress.decay_from) / DECAY_SHARE)


def is_flat(curve: list[tuple[int, float, float]], evaluations: int, gain: float) -> bool:
    """Tell whether the best held-out loss of the last `evaluations` improves on what was before by less than `gain`."""
    if len(curve) <= 2 * evaluations:
        return False
    held_out = [point[2] for point in curve]
    return min(held_out[-evaluations:]) > min(held_out[:-evaluations]) * (1 - gain)


class Trainer:
    """Weights in the model's own type, their float32 masters in the optimizer, and the loop around them."""

    def __init__(self, options: argparse.Namespace, corpus: Corpus, out: Path) -> None:
        self.options, self.checkpoint = options, out / "checkpoint.pt"
        self.device = options.device
        torch.manual_seed(options.seed)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.model = build_model(options.tiny, options.balance)
        self.masters = [p.detach().float().to(self.device).clone() for p in self.model.parameters()]
        # The shipped weights are bf16, so the GPU trains the rounded ones: the last rounding costs nothing.
        self.model.to(self.device, torch.bfloat16 if self.device.startswith("cuda") else torch.float32)
        self.weights = list(self.model.parameters())
        matrices, others = ([m for m in self.masters if (m.dim() > 1) == matrix] for matrix in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=options.lr, betas=(0.9, 0.95), fused=self.device.startswith("cuda")
        )
        self.train_bytes, self.held_out = (
            torch.frombuffer(bytearray(corpus.text(part)), dtype=torch.uint8).to(self.device)
            for part in ("train", "held_out")
        )
        self.held_out = self.held_out[: options.held_out_bytes]
        self.progress, self.best_weights = Progress(), [w.detach().clone() for w in self.weights]
        self.losses = self.pick_losses()

    def pick_losses(self) -> Any:  # noqa: ANN401  # torch.compile returns a callable it does not type
        """Choose the fastest way to compute the loss that this machine can run forward and backward."""
        attempts = [("grouped_mm", True)] * self.options.compile + [("grouped_mm", False), ("eager", False)]
        for experts, compiled in attempts:
            self.model.set_experts_implementation(experts)
            run = torch.compile(losses) if compiled else losses
            try:
                sum(run(self.model, self.windows())).backward()
            except Exception as error:  # whatever a compiler or a kernel raises, the next attempt needs neither
                print(f"experts {experts}, compile {compiled}: not here ({type(error).__name__}: {error})"[:400])
                continue
            finally:
                self.model.zero_grad(set_to_none=True)
            print(f"experts {experts}, compile {compiled}", flush=True)
            return run
        sys.exit("no implementation of the experts runs on this device")

    def windows(self) -> Tensor:
        """Draw a batch [batch, SEQUENCE + 1] int64 of random windows of the training text."""
        starts = torch.randint(
            len(self.train_bytes) - SEQUENCE, (self.options.batch, 1), generator=self.generator, device=self.device
        )
        return self.train_bytes[starts + torch.arange(SEQUENCE + 1, device=self.device)].long()

    def step(self, lr: float) -> Tensor:
        """Take one optimizer step; return the loss, still on the device."""
        loss, balance = self.losses(self.model, self.windows())
        (loss + self.model.config.router_aux_loss_coef * balance).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float() if weight.grad is not None else None
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()

    def evaluate(self, train_loss: float) -> None:
        """Add a point to the curve, keep the weights if they are the best, and write the checkpoint."""
        progress = self.progress
        held_out = evaluate(self.model, self.held_out, self.options.batch)
        progress.curve.append((progress.step, round(train_loss, 5), round(held_out, 5)))
        if held_out < progress.best:
            progress.best = held_out
            self.best_weights = [w.detach().clone() for w in self.weights]
        state = {
            "progress": asdict(progress),
            "masters": self.masters,
            "best_weights": self.best_weights,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.device)
        self.progress = Progress(**state["progress"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.best_weights = state["best_weights"]
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.weights, self.masters)
        print(f"resumed at step {self.progress.step}")

    def run(self) -> None:
        """Train until the schedule has ended; leave the best weights in the model."""
        options, progress = self.options, self.progress
        start, since = time.monotonic() - progress.seconds, torch.zeros((), device=self.device)
        bar = tqdm(total=1.0, bar_format="{l_bar}{bar}| {elapsed} {postfix}", mininterval=5, file=sys.stdout)
        while True:
            progress.seconds = time.monotonic() - start
            share = max(progress.step / options.steps, progress.seconds / (60 * options.minutes))
            if progress.decay_from is None and share >= 1 - DECAY_SHARE:
                progress.decay_from = 1 - DECAY_SHARE
            end = 1.0 if progress.decay_from is None else progress.decay_from + DECAY_SHARE
            if share >= end:
                break
            since += self.step(learning_rate(options, progress, share))
            progress.step += 1
            if progress.step % options.evaluate_every == 0:
                self.evaluate(since.item() / options.evaluate_every)
                since.zero_()
                if progress.decay_from is None and is_flat(progress.curve, options.patience, options.gain):
                    progress.decay_from = share
                step, train, held_out = progress.curve[-1]
                rate = step * options.batch * SEQUENCE / progress.seconds / 1e6
                bar.set_postfix_str(
                    f"step {step} train {train:.4f} held-out {held_out:.4f} {rate:.2f} MB/s"
                    + (" decay" if progress.decay_from is not None else "")
                )
                bar.update(share - bar.n)
        if not progress.curve or progress.curve[-1][0] != progress.step:
            self.evaluate(since.item() / max(progress.step % options.evaluate_every, 1))
        bar.close()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.best_weights)


# Command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results and the checkpoint")
    parser.add_argument("--text", type=Path, default=stdlib, help="folder or tar archive of Python sources")
    source = f"Python {platform.python_version()} standard library, all *.py"
    parser.add_argument("--text-source", default=source, help="what the record says about --text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget")
    parser.add_argument("--steps", type=int, default=100_000, help="step budget; whichever ends first")
    parser.add_argument("--batch", type=int, default=256, help="windows of 512 bytes per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--balance", type=float, default=0.0005, help="weight of the balance loss: less, more skew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps between evaluations")
    parser.add_argument("--patience", type=int, default=4, help="evaluations without --gain that end the flat phase")
    parser.add_argument("--gain", type=float, default=0.002, help="relative improvement that counts")
    parser.add_argument("--held-out-bytes", type=int, default=1 << 20, help="held-out bytes per evaluation")
    parser.add_argument("--text-bytes", type=int, default=SHIPPED_TEXT_BYTES, help="size of the two texts written")
    parser.add_argument("--compile", action="store_true", help="compile the loss, if that works here")
    parser.add_argument("--tiny", action="store_true", help="a toy model, for tests")
    options = parser.parse_args(arguments)
    options.command = [Path(word).name if "/" in word else word for word in arguments]
    return options


def main(arguments: list[str]) -> None:
    """Train, write and report."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    corpus = read_corpus(options.text)
    sizes = {part: f"{sum(len(c) for _, c in files):,}" for part, files in corpus.parts.items()}
    print(f"bytes of text from {options.text}: {sizes}")
    trainer = Trainer(options, corpus, options.out)
    trainer.resume()
    trainer.run()
    print_record(finish(trainer, corpus, options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
