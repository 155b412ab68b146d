"""What quantizers do with a Hessian: check it, order its channels, and factor it into the feedback of errors."""

from __future__ import annotations

import torch
from torch import Tensor

from mxmoe.errors import BadHessian
from mxmoe.quant.quantized import Quantized
from mxmoe.quant.rtn import dequantize

HESSIAN_DTYPES = (torch.float32, torch.float64)
# a feedback that brings a weight beyond this is numerical noise of a singular Hessian
_LARGEST = 2.0**100
_FIRST_RETRY, _LAST_RETRY = 1e-4, 10.0


def checked_hessian(hessian: Tensor, weight: Tensor, name: str) -> Tensor:
    """
    Return the Hessians as [batch, k, k], one for each matrix of a weight [..., n, k], without copying.

    A single [k, k] serves a whole stack.

    Raises:
        BadHessian: another shape or dtype, or NaN or infinity.
    """
    k = weight.shape[-1]
    wanted = (*weight.shape[:-2], k, k)
    if hessian.shape not in (wanted, (k, k)) or hessian.dtype not in HESSIAN_DTYPES:
        found = f"{hessian.dtype} {list(hessian.shape)}"
        raise BadHessian(name=name, found=found, wanted=f"float32 or float64 {list(wanted)}")
    # one by one: a mask of the whole stack is a quarter of its size
    for index, matrix in enumerate(hessian.reshape(-1, k, k)):
        if not bool(matrix.isfinite().all()):
            raise BadHessian(name=name, found=f"not finite in matrix {index}", wanted="finite")
    return hessian.expand(wanted).reshape(-1, k, k)


def activation_order(diagonal: Tensor, group_size: int | None) -> Tensor:
    """
    Order the channels of each matrix by descending mean square of their input, int64 [batch, k].

    Args:
        diagonal: [batch, k], of the Hessians.
        group_size: None orders channels freely. A number keeps each group of so many channels together: groups go by
            their mean, channels within a group by their own; a short last group stays last.
    """
    free = diagonal.argsort(dim=-1, descending=True, stable=True)
    if group_size is None:
        return free
    k = diagonal.shape[-1]
    whole = k // group_size
    score = diagonal[:, : whole * group_size].unflatten(-1, (whole, group_size)).sum(-1)
    rank = torch.arange(whole + 1, device=diagonal.device).repeat(len(diagonal), 1)
    rank[:, :whole] = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return free.gather(-1, rank.gather(-1, free // group_size).argsort(dim=-1, stable=True))


def feedback(hessian: Tensor, order: Tensor, damping: float, weight: Tensor) -> Tensor:
    """
    Factor Hessians into the strictly upper F [batch, k, k], float32: channel i is rounded at w_i + sum_j<i e_j F[j, i].

    With H + damping * mean(diag H) I = R R^T, R upper triangular, the loss e H e^T of a row's errors e is
    sum_i R_ii^2 (e_i + sum_j<i e_j R_ji / R_ii)^2, so F[j, i] = R_ji / R_ii makes every term as small as rounding can.
    These are GPTQ's updates (Frantar et al., ICLR 2023, eq. 2 and 3) without its inverse: LDLQ, whose equality with
    them is theorem 6 of QuIP (Chee et al., NeurIPS 2023). The factor is computed in float64, matrix by matrix.

    The mean is over channels with an input; a channel without one (H_ii = 0) neither gives nor takes feedback, so that
    it is rounded to nearest. Where a factor does not exist the damping is raised tenfold, from 1e-4 at least to 10 at
    most, and then F = 0, which is rounding to nearest; so it is for a Hessian of zeros.

    Args:
        hessian: [batch, k, k], on any device.
        order: int64 [batch, k], the channels in the order in which they are rounded; F is in this order.
        damping: part of the mean diagonal.
        weight: float32 [batch, n, k], whose device the result is on; its magnitude says which F would overflow.
    """
    k = weight.shape[-1]
    factors = torch.empty((len(weight), k, k), device=weight.device)
    largest = weight.abs().amax((-2, -1))
    bounds: list[Tensor] = []
    for index, (matrix, channels) in enumerate(zip(hessian, order, strict=True)):
        factors[index], bound = _factor(_ordered(matrix, channels), damping)
        bounds.append(bound * largest[index])
    # asked for all at once: every question waits for the device
    for index in (torch.stack(bounds) < _LARGEST).logical_not().nonzero().flatten().tolist():
        raised = max(10 * damping, _FIRST_RETRY)
        while raised <= _LAST_RETRY:
            factors[index], bound = _factor(_ordered(hessian[index], order[index]), raised)
            if bool(bound * largest[index] < _LARGEST):
                break
            raised *= 10
        else:
            factors[index] = 0
    return factors


def hessian_error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> Tensor:
    """
    Return the loss tr(E H E^T) of each matrix, E = weight - decoded: float64 [...].

    With H = sum of x x^T it is the squared change of the linear's output, summed over the tokens.
    """
    error = weight.double() - dequantize(quantized).double()
    return ((error @ hessian.double()) * error).sum((-2, -1))


def _ordered(hessian: Tensor, channels: Tensor) -> Tensor:
    """Give a Hessian in the reverse of an order, float64 [k, k], on the order's device."""
    reverse = channels.flip(0)
    return hessian.to(channels.device)[reverse[:, None], reverse[None, :]].double()


def _factor(reverse: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Give F of a Hessian in reverse order, and its largest magnitude: inf if there is no factor."""
    diagonal = reverse.diagonal()
    live = diagonal > 0
    mean = torch.where(live, diagonal, 0.0).sum() / live.sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    damped = reverse + torch.diag(torch.where(live, damping * mean, mean))
    lower, failed = torch.linalg.cholesky_ex(damped)
    # the lower factor of the reversed matrix, reversed, is the upper factor R
    upper = lower.flip(0, 1)
    factor = (upper / upper.diagonal()).triu(1).float()
    bound = torch.where(failed == 0, factor.abs().amax(), torch.inf)
    return factor, bound.nan_to_num(nan=torch.inf)
