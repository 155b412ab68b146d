"""The study model untrained, and the loop that trains it by the clock."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field

import torch
from numpy.typing import NDArray
from study_moe_forward import StudyLoss
from study_moe_measure import held_out_loss
from tiny_moe_record import write_atomically
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

WARM_UP_STEPS = 150
PEAK_FLOPS = 790e12
"""Dense bf16 operations per second of an NVIDIA H200, for the share that is printed."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the shared expert is as wide as `shared` says, and every layer is a MoE layer."""

    hidden: int
    layers: int
    experts: int
    top_k: int
    intermediate: int
    shared: int
    heads: int
    kv_heads: int
    vocabulary: int
    window: int


SHAPES = {
    "full": Shape(512, 10, 40, 4, 256, 1024, 8, 8, 16384, 1024),
    "small": Shape(256, 8, 32, 4, 128, 128, 4, 2, 8192, 512),
    "smoke": Shape(64, 2, 4, 2, 32, 64, 2, 2, 512, 64),
}
"""192, 29.5 and 0.1 million weights."""


def build_model(shape: Shape, balance: float) -> Qwen2MoeForCausalLM:
    """Build the untrained model in the architecture of Qwen1.5-MoE; `balance` weighs the balance loss."""
    config = Qwen2MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.shared,
        moe_intermediate_size=shape.intermediate,
        shared_expert_intermediate_size=shape.shared,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=shape.window,
        tie_word_embeddings=True,
        initializer_range=0.02 * (512 / shape.hidden) ** 0.5,
        router_aux_loss_coef=balance,
        bos_token_id=None,
        eos_token_id=0,
        use_cache=False,
    )
    model = Qwen2MoeForCausalLM(config)
    # the sum over layers keeps the size of one: as in GPT-2, what is added to the residual starts smaller
    shrink = (2 * shape.layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                weight.mul_(shrink)
    return model


def flops_per_token(model: Qwen2MoeForCausalLM, shape: Shape) -> float:
    """Estimate the operations of a training step per token: six per active weight, and attention over half a window."""
    total = sum(weight.numel() for weight in model.parameters())
    idle = 3 * shape.hidden * shape.intermediate * (shape.experts - shape.top_k) * shape.layers
    return 6 * (total - idle) + 6 * shape.layers * shape.hidden * shape.window


@dataclass
class Progress:
    """What training has to remember."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)
    """(step, seconds, training loss, held-out loss) in nats per token, one per evaluation."""
    best: float = float("inf")
    """Lowest held-out loss so far; its weights are the ones that ship."""


class Trainer:
    """Weights in bf16, their float32 masters in the optimizer, and the loop around them."""

    def __init__(self, options: argparse.Namespace, shape: Shape, train: NDArray, held_out: NDArray) -> None:
        self.options, self.shape, self.checkpoint = options, shape, options.out / "checkpoint.pt"
        self.device, self.batch = options.device, options.batch
        self.is_gpu = options.device.startswith("cuda")
        torch.manual_seed(options.seed)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.model = build_model(shape, options.balance)
        self.masters = [p.detach().float().to(self.device).clone() for p in self.model.parameters()]
        # The weights are kept in bf16, so the GPU trains the rounded ones: the last rounding costs nothing.
        self.model.to(self.device, torch.bfloat16 if self.is_gpu else torch.float32)
        self.weights = list(self.model.parameters())
        matrices, others = ([m for m in self.masters if (m.dim() > 1) == matrix] for matrix in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=self.is_gpu)
        self.train_ids, self.held_out = (torch.from_numpy(ids).to(self.device) for ids in (train, held_out))
        self.held_out = self.held_out[: options.held_out_tokens]
        self.progress, self.best_weights = Progress(), [w.detach().clone() for w in self.weights]
        self.used = torch.zeros(shape.layers, shape.experts, device=self.device)
        self.losses, self.how = self.pick_losses()

    def pick_losses(self) -> tuple[StudyLoss, str]:
        """Choose the fastest way to compute the loss that this machine can run forward and backward, and say which."""
        grouped = [("grouped_mm", True)] * self.options.compile + [("grouped_mm", False)]
        attempts = [*grouped, ("eager", False)] if self.is_gpu else [("eager", False)]
        while self.batch:
            for experts, compiled in attempts:
                how = f"experts {experts}, compile {compiled}, batch {self.batch}"
                began = time.monotonic()
                try:
                    self.model.set_experts_implementation(experts)
                    run = StudyLoss(compiled)
                    for _ in range(2):
                        loss, balance, _ = run(self.model, self.windows())
                        (loss + self.options.balance * balance).backward()
                        if not torch.isfinite(loss):
                            raise RuntimeError(f"the loss is {loss.item()}")
                except Exception as error:  # whatever a compiler or a kernel raises, the next attempt needs neither
                    print(f"warning: {how}: not here ({type(error).__name__}: {error})"[:600], flush=True)
                    continue
                finally:
                    self.model.zero_grad(set_to_none=True)
                print(f"{how}: ready in {time.monotonic() - began:.1f} s", flush=True)
                return run, how
            self.batch //= 2
            torch.cuda.empty_cache()
        raise SystemExit("no implementation of the experts runs on this device")

    def windows(self) -> Tensor:
        """Draw a batch [batch, window + 1] int64 of random windows of the training text."""
        starts = torch.randint(
            len(self.train_ids) - self.shape.window - 1, (self.batch, 1), generator=self.generator, device=self.device
        )
        return self.train_ids[starts + torch.arange(self.shape.window + 1, device=self.device)].long()

    def learning_rate(self, share: float) -> float:
        """Return the rate at a share of the budget: linear up, flat, then linear down to a hundredth of the peak."""
        options = self.options
        warm_up = min(1.0, (self.progress.step + 1) / min(WARM_UP_STEPS, max(options.steps // 10, 1)))
        fall = max(0.0, (share - 1 + options.decay) / options.decay)
        return options.lr * warm_up * max(0.01, 1 - fall)

    def step(self, lr: float) -> Tensor:
        """Take one optimizer step; return the loss, still on the device."""
        loss, balance, self.used = self.losses(self.model, self.windows())
        (loss + self.options.balance * balance).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float() if weight.grad is not None else None
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=self.is_gpu)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        self.progress.step += 1
        self.progress.tokens += self.batch * self.shape.window
        return loss.detach()

    def evaluate(self, train_loss: float) -> None:
        """Add a point to the curve, keep the weights if they are the best, and say so."""
        progress = self.progress
        held_out = held_out_loss(self.model, self.held_out, self.shape.window, max(self.batch // 4, 1))
        progress.curve.append((progress.step, round(progress.seconds, 1), round(train_loss, 5), round(held_out, 5)))
        if held_out < progress.best:
            progress.best = held_out
            torch._foreach_copy_(self.best_weights, [w.detach() for w in self.weights])
        rate = progress.tokens / max(progress.seconds, 1e-9)
        share = rate * flops_per_token(self.model, self.shape) / PEAK_FLOPS
        line = f"step {progress.step} {progress.seconds:.0f} s {progress.tokens / 1e6:.1f} M tokens"
        line += (
            f" {rate / 1e3:.0f} k tokens/s train {train_loss:.4f} held-out {held_out:.4f} load max/mean {self.load()}"
        )
        print(line + (f" ({share:.0%} of the H200's bf16 rate)" if self.is_gpu else ""), flush=True)

    def load(self) -> str:
        """Return the busiest expert's load over the mean in the last batch, the least and the most of any layer."""
        worst = self.used.amax(1) * self.used.shape[1]
        return f"{worst.min().item():.2f} to {worst.max().item():.2f}"

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "progress": asdict(self.progress),
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
        with torch.no_grad():
            torch._foreach_copy_(self.best_weights, state["best_weights"])
            torch._foreach_copy_(self.masters, state["masters"])
            torch._foreach_copy_(self.weights, self.masters)
        print(f"resumed at step {self.progress.step}", flush=True)

    def run(self, seconds: float) -> None:
        """Train until `seconds` or the steps are spent; leave the best weights in the model."""
        options, progress = self.options, self.progress
        start, since, last = time.monotonic() - progress.seconds, torch.zeros((), device=self.device), progress.step
        saved = time.monotonic()
        while (share := max(progress.step / options.steps, progress.seconds / seconds)) < 1:
            since += self.step(self.learning_rate(share))
            if self.is_gpu and progress.step % 8 == 0:
                # without it the clock runs ahead of a device that is asked for more than it has done
                torch.cuda.synchronize()
            progress.seconds = time.monotonic() - start
            if progress.step % options.evaluate_every == 0:
                self.evaluate(since.item() / (progress.step - last))
                since.zero_()
                last = progress.step
                if time.monotonic() - saved > 60 * options.save_minutes:
                    self.save()
                    saved = time.monotonic()
                progress.seconds = time.monotonic() - start
        if progress.step != last or not progress.curve:
            self.evaluate(since.item() / max(progress.step - last, 1))
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.best_weights)
