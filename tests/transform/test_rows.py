"""What experts are given, and keeping an even part of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxmoe.errors import BadCalibration
from mxmoe.frontend import expert_views, lift
from mxmoe.transform.rows import Thinned, agreement, hidden_rows, run_rows

from .models import FORMS, TOP_K, ids_of, own_model


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_rows_are_thinned_evenly_whatever_the_batches(sizes: list[int], limit: int) -> None:
    rows = torch.arange(sum(sizes), dtype=torch.float32)[:, None]
    batches, whole = Thinned(limit), Thinned(limit)
    for part in rows.split(sizes):
        batches.add(part)
    whole.add(rows)
    kept = batches.rows()
    if not sizes or not sum(sizes):
        assert kept is None
        return
    assert kept is not None
    assert torch.equal(kept, whole.rows())
    assert len(kept) <= limit
    assert batches.count == len(rows)
    assert torch.equal(kept, rows[:: batches.stride])
    assert len(kept) > limit / 2 or len(kept) == len(rows)


@pytest.mark.parametrize("form", FORMS)
def test_experts_get_their_rows_and_the_routing_is_seen(form: str) -> None:
    model = own_model(form, n_layers=1)
    seen: dict[tuple[str, int], int] = {}

    def receive(block: object, bank: str, expert: int, rows: torch.Tensor) -> None:
        seen[bank, expert] = seen.get((bank, expert), 0) + len(rows)

    ids = ids_of(0, 200)
    routing = run_rows(lift(model), [ids[:1], ids[1:]], receive, title="", quiet=True)
    assert sum(count for (bank, _), count in seen.items() if bank == "routed") == 200 * TOP_K
    assert seen["shared", 0] == 200
    if "list" in form:
        assert not routing
        return
    chosen = torch.cat(routing["layers.0.mlp"])
    assert chosen.shape == (200, 4)
    assert [seen.get(("routed", expert), 0) for expert in range(4)] == chosen.sum(0).tolist()
    assert agreement(routing, routing) == {"layers.0.mlp": 1.0}
    flipped = {"layers.0.mlp": [~chosen]}
    assert agreement(routing, flipped) == {"layers.0.mlp": 0.0}


@pytest.mark.parametrize("form", FORMS)
def test_hidden_rows_are_what_down_reads(form: str) -> None:
    model = own_model(form, n_layers=1)
    lifted = lift(model)
    bank = lifted.blocks[0].banks["routed"]
    x = torch.randn(7, 16).double()
    views = expert_views(bank)[2]
    inner = hidden_rows(bank.shape, views, x)
    out = inner.double() @ views.weights["down"].T + views.biases.get("down", 0)
    index = torch.full((7, 1), 2)
    wanted = bank.entries[2](x) if "list" in form else bank.module(x, index, torch.ones(7, 1).double())
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_data_is_checked() -> None:
    with pytest.raises(BadCalibration):
        run_rows(lift(own_model("stack")), torch.randn(3, 4), lambda *_: None, title="", quiet=True)
