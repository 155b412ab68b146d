"""
What weights say by themselves: one number for a matrix, and the table of such functions.

Statistics hold them so that sensitivities which read weights need neither the weights nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mxmoe.calib.like import BlockLike, LiftedLike
from mxmoe.calib.router import find_router
from mxmoe.registry import Registry

Fact = Callable[[Tensor], Tensor]
"""A float32 matrix [n, k] -> a number, as a tensor without axes on the same device."""

FACTS = Registry(
    "weight fact",
    "mxmoe.weight_facts",
    {
        "norm": "mxmoe.calib.facts:norm",
        "variance": "mxmoe.calib.facts:variance",
        "spread": "mxmoe.calib.facts:spread",
        "alpha": "mxmoe.calib.facts:alpha",
        "trace": "mxmoe.calib.facts:trace",
    },
)
"""name -> `Fact`."""

CHEAP = ("norm", "variance", "spread")
"""Facts that take one look at the weights; `observe` finds them unasked."""

_BLOCK, _BLOCKS, _TOP = 128, 256, 0.1


def norm(weight: Tensor) -> Tensor:
    """Frobenius norm."""
    return torch.linalg.vector_norm(weight, dtype=torch.float64)


def variance(weight: Tensor) -> Tensor:
    """Variance over all elements, around their mean."""
    return weight.double().var(correction=0)


def spread(weight: Tensor) -> Tensor:
    """Largest variance within the inputs of one neuron, a row (router-norm paper, arXiv 2604.06515)."""
    return weight.double().var(dim=-1, correction=0).max()


def alpha(weight: Tensor) -> Tensor:
    """
    Exponent of the power law that the largest eigenvalues of W W^T follow, by Hill's estimator (AlphaQ, 2606.04980).

    Eigenvalues l_1 >= l_2 >= ... are pooled from at most 256 blocks of 128 x 128 at places drawn with a fixed seed;
    alpha = 1 + k / sum_{i<=k} ln(l_i / l_{k+1}) with k a tenth of them, 10 at least. A small alpha says heavy tails:
    much of the matrix is in few directions. Blocks of one shape make matrices of different shapes comparable.
    """
    n, k = weight.shape
    high, wide = min(n, _BLOCK), min(k, _BLOCK)
    there = (n - high + 1) * (k - wide + 1)
    count = min(_BLOCKS, there)
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(there, (count,), generator=generator).tolist() if there > 1 else [0]
    corners = [divmod(place, k - wide + 1) for place in places]
    blocks = torch.stack([weight[i : i + high, j : j + wide] for i, j in corners])
    blocks = blocks if high <= wide else blocks.mT
    values = torch.linalg.eigvalsh((blocks @ blocks.mT).double()).clamp(min=0).flatten().sort(descending=True).values
    top = min(max(10, math.floor(_TOP * len(values))), len(values) - 1)
    if top < 1 or float(values[top]) <= 0:
        return torch.full((), torch.nan, dtype=torch.float64, device=weight.device)
    return 1 + top / (values[:top] / values[top]).log().sum()


def trace(weight: Tensor, probes: int = 100, seed: int = 0) -> Tensor:
    """
    Mean of v^T H v over random unit vectors v, H the Hessian of ||W||_F by W (MoPEQ, arXiv 2509.02512).

    Its expectation is trace(H) / N = (N - 1) / (N ||W||_F) for N elements, so nearly 1 / ||W||_F: `norm` says the same
    without sampling, and this exists to show it. H v comes from differentiating twice, as the authors do.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for _ in range(probes):
        probe = torch.randn(weight.shape, generator=generator).to(weight)
        probe = probe / probe.norm()
        with torch.enable_grad():
            point = weight.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(point.norm(), point, create_graph=True)
            (product,) = torch.autograd.grad((slope * probe).sum(), point)
        total += (product * probe).double().sum()
    return total / probes


def facts_of(
    lifted: LiftedLike, names: Sequence[str], after: Callable[[], object] = lambda: None
) -> dict[tuple[str, str], dict[str, dict[str, NDArray[np.float64]]]]:
    """
    Find facts of all experts' weights: (block, bank) -> fact -> role -> [expert].

    The rows of the router, one for each expert, stand beside the roles as `router`, with their norm only: they are no
    matrices. A block whose router is not found goes without. `after` is called after each expert of a role.

    Raises:
        UnknownName: no such fact.
    """
    functions: Mapping[str, Fact] = {name: FACTS[name] for name in names}
    found: dict[tuple[str, str], dict[str, dict[str, NDArray[np.float64]]]] = {}
    for block in lifted.blocks:
        for bank_name, bank in block.banks.items():
            table: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in functions}
            for role, weight in bank.shape.weights.items() if functions else ():
                values: list[Tensor] = []
                for matrix in lifted.weights[weight]:
                    dense = matrix.detach().float()
                    values.append(torch.stack([function(dense).double() for function in functions.values()]))
                    after()
                for name, column in zip(functions, torch.stack(values, dim=1).cpu().numpy(), strict=True):
                    table[name][role] = column
            if bank_name == "routed" and "norm" in table:
                table["norm"] |= _router_norms(block)
            found[block.name, bank_name] = table
    return found


def _router_norms(block: BlockLike) -> dict[str, NDArray[np.float64]]:
    router = find_router(block)
    if router is None:
        return {}
    return {"router": router.weight.detach().double().norm(dim=1).cpu().numpy()}
