"""Perplexity against its formula, written out slowly."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from mxmoe.errors import BadTokens, NonFiniteLogits
from mxmoe.evaluate import Perplexity, perplexity

VOCABULARY = 7
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))


def bigram(input_ids: Tensor) -> Tensor:
    """Answer with a fixed row of logits per token: the window cannot show."""
    return TABLE[input_ids]


def running_sum(input_ids: Tensor) -> Tensor:
    """Answer with logits that depend on the whole window so far."""
    return TABLE[input_ids.cumsum(-1) % VOCABULARY]


texts = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=60)


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(1, 70), st.integers(1, 5))
def test_equals_the_mean_over_all_predictions(text: list[int], window: int, batch: int) -> None:
    log_p = TABLE.double().log_softmax(-1)
    expected = -sum(log_p[a, b].item() for a, b in itertools.pairwise(text)) / (len(text) - 1)
    found = perplexity(bigram, torch.tensor(text), window=window, batch=batch)
    assert found.tokens == len(text) - 1
    assert found.nats_per_token == pytest.approx(expected, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert found.bits_per_token == pytest.approx(expected / math.log(2), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(1, 20), st.integers(1, 5))
def test_windows_are_disjoint_and_the_batch_does_not_show(text: list[int], window: int, batch: int) -> None:
    log_p = TABLE.double().log_softmax(-1)
    expected = 0.0
    for i in range(len(text) - 1):
        seen = sum(text[i - i % window : i + 1]) % VOCABULARY
        expected -= log_p[seen, text[i + 1]].item()
    found = perplexity(running_sum, torch.tensor(text, dtype=torch.int16), window=window, batch=batch)
    assert found.nats_per_token == pytest.approx(expected / (len(text) - 1), rel=1e-6)


def test_uniform_logits_over_bytes_give_256() -> None:
    answer = SimpleNamespace(logits=torch.zeros(1, 4, 256))
    found = perplexity(lambda input_ids: SimpleNamespace(logits=answer.logits[:, : input_ids.shape[1]]), b"abcd")
    assert found == Perplexity(pytest.approx(math.log(256)), 3)  # pyright: ignore[reportArgumentType]


def test_a_module_is_evaluated_and_put_back() -> None:
    class Noisy(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.nn.functional.dropout(TABLE[input_ids], 0.9, self.training)

    model = Noisy().train()
    text = torch.arange(40) % VOCABULARY
    assert perplexity(model, text) == perplexity(bigram, text)
    assert model.training


def test_a_loss_above_every_float_is_infinite() -> None:
    assert Perplexity(1e4, 1).perplexity == math.inf


def test_half_precision_logits_are_summed_in_full() -> None:
    text = torch.zeros(20_001, dtype=torch.long)
    found = perplexity(lambda input_ids: torch.zeros(*input_ids.shape, 3).bfloat16(), text)
    assert found.nats_per_token == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "the text is empty"),
        (b"a", "nothing to predict"),
        (torch.zeros(5), "dtype torch.float32"),
        (torch.zeros(5, dtype=torch.bool), "dtype torch.bool"),
        (torch.zeros(2, 5, dtype=torch.long), "shape [2, 5]"),
        (torch.tensor([0, 1, -1]), "from -1 to 1"),
        (torch.tensor([0, 1, VOCABULARY]), f"the model knows {VOCABULARY} tokens"),
    ],
)
def test_texts_that_cannot_be_measured(text: bytes | Tensor, words: str) -> None:
    padded = torch.cat([TABLE, TABLE[:1]])
    with pytest.raises(BadTokens) as caught:
        perplexity(lambda input_ids: padded[input_ids], text)
    assert words in str(caught.value)


def test_an_unknown_id_is_named_before_the_model_runs() -> None:
    model = torch.nn.Embedding(VOCABULARY, VOCABULARY)
    model.config = SimpleNamespace(vocab_size=VOCABULARY)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(BadTokens, match=f"knows {VOCABULARY} tokens"):
        perplexity(model, torch.tensor([0, 1, VOCABULARY]))


@pytest.mark.parametrize(("window", "batch"), [(0, 1), (1, 0)])
def test_sizes_start_at_one(window: int, batch: int) -> None:
    with pytest.raises(BadTokens, match="both start at 1"):
        perplexity(bigram, torch.tensor([0, 1]), window=window, batch=batch)


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "nan"), (-math.inf, "inf")])
def test_logits_without_a_loss_are_placed(value: float, shown: str) -> None:
    broken = TABLE.clone()
    broken[2, 3] = value
    with pytest.raises(NonFiniteLogits, match=f"token 3 is {shown}"):
        perplexity(lambda input_ids: broken[input_ids], torch.tensor([0, 1, 2, 3, 4]), window=2)
