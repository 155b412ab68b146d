"""`annotate-cost`: what each scheme of each linear costs in time on the planned device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mxmoe.cost import COST_MODELS, CostModel, linear_cost_us
from mxmoe.device import device
from mxmoe.errors import BadOption, NoProfile
from mxmoe.ir import ModuleOp, Table, banks
from mxmoe.passes.base import EARLIER, Environment, Pass, advance
from mxmoe.passes.dropping import with_dropped


@dataclass(frozen=True)
class AnnotateCost(Pass):
    """
    Write `cost[expert, scheme]` on every linear, in microseconds; inf where a scheme cannot run on the device.

    Rows per expert are frequency x tokens. Several token counts are weighed together: `tokens=1,2048
    token-weights=0.9,0.1` plans for a server that mostly decodes.
    """

    name = "annotate-cost"
    model: str = "auto"
    """Name of a cost model; auto takes `measured` where the device has a profile, `roofline` elsewhere."""
    device: str | None = None
    """Name of a device; None takes the target's."""
    tokens: tuple[int, ...] = (512,)
    """Tokens per call, one count or several."""
    token_weights: tuple[float, ...] | None = None
    """Weight of each count; None weighs them alike."""

    def run(self, module: ModuleOp, environment: Environment) -> None:
        """Annotate every linear; the blocks become annotated."""
        model = find_cost_model(self.model, self.device or environment.target.device)
        tokens = self.token_mix()
        for moe in self.blocks(module, "lifted", "annotated", "allocated", way=EARLIER):
            for bank in banks(moe).values():
                known = bank.route.frequency
                frequency = np.full(bank.experts, bank.top_k / bank.experts) if known is None else known.array
                for op in bank.linears.values():
                    runs = [scheme for scheme in moe.candidates if not scheme.is_dropped]
                    cost = linear_cost_us(model, runs, n=op.n, k=op.k, frequency=frequency, tokens=tokens)
                    whole = with_dropped(cost, moe.candidates, np.zeros(op.experts))
                    op.set_table("cost", Table(("expert", "scheme"), whole))
            advance(moe, "annotated")

    def token_mix(self) -> list[tuple[int, float]]:
        """
        Pair the token counts with their weights.

        Raises:
            BadOption: as many weights as counts are needed.
        """
        counts = self.tokens
        weights = (1.0,) * len(counts) if self.token_weights is None else self.token_weights
        if len(weights) != len(counts):
            reason = f"{len(counts)} token counts have {len(weights)} weights"
            raise BadOption(name=self.name, option="token-weights", reason=reason)
        return list(zip(counts, weights, strict=True))


def find_cost_model(name: str, device_name: str) -> CostModel:
    """Make a cost model by name; `auto` is the measured one where the device has a profile, else the roofline."""
    row = device(device_name)
    if name != "auto":
        return COST_MODELS[name](row)
    try:
        return COST_MODELS["measured"](row)
    except NoProfile:
        return COST_MODELS["roofline"](row)
