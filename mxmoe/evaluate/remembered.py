"""The answers of a model to one text, kept, so that many others are compared with them while it runs once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from mxmoe.errors import BadTokens
from mxmoe.evaluate.windows import LanguageModel, batches, logits_of, measuring, token_ids

_Key = tuple[torch.Size, bytes]


class Remembered:
    """Called like the model; knows the batches of one text only. `remember` makes it."""

    def __init__(self, answers: Mapping[_Key, Tensor]) -> None:
        """Take (shape, ids as bytes) of inputs -> logits [batch, window, vocabulary]."""
        self._answers = answers

    @property
    def nbytes(self) -> int:
        """Bytes of the logits that are kept."""
        return sum(logits.nbytes for logits in self._answers.values())

    def __call__(self, input_ids: Tensor) -> Tensor:
        """
        Give the logits [batch, window, vocabulary] for inputs of the text, where the inputs are.

        Raises:
            BadTokens: they are none; text, window and batch must be those that were remembered.
        """
        found = self._answers.get(_key(input_ids))
        if found is None:
            shape = list(input_ids.shape)
            raise BadTokens(reason=f"inputs of shape {shape} are no batch of the text, window and batch remembered")
        return found.to(input_ids.device)


def remember(
    model: LanguageModel,
    tokens: bytes | Tensor,
    window: int = 512,
    batch: int = 16,
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Remembered:
    """
    Run a model over a text and keep its logits, in the model's own dtype.

        reference = remember(model, tokens, window, batch)
        for quantized in models:
            compare(quantized, reference, tokens, window, batch)

    They take tokens x vocabulary numbers: 131,072 tokens of a vocabulary of 16,384 in bf16 are 4 GiB.

    Args:
        model, tokens, window, batch, progress: as in `compare`.
        device: where logits are kept; None for where the model gives them.

    Raises:
        BadTokens: as in `perplexity`.
    """
    ids = token_ids(tokens, window, batch)
    answers: dict[_Key, Tensor] = {}
    with measuring(ids, model) as ids, tqdm(total=len(ids) - 1, unit="token", disable=not progress, leave=False) as bar:
        for part in batches(ids, window, batch):
            logits = logits_of(model, part).view(*part.inputs.shape, -1)
            answers[_key(part.inputs)] = logits if device is None else logits.to(device)
            bar.update(part.targets.numel())
    return Remembered(answers)


def _key(inputs: Tensor) -> _Key:
    return inputs.shape, inputs.cpu().numpy().tobytes()
