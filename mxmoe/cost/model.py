"""What a cost model is, and the table of those there are."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from mxmoe.device import Device, device
from mxmoe.ir import Scheme, Tile
from mxmoe.registry import Registry


@runtime_checkable
class CostModel(Protocol):
    """
    Time of one tile on one SM while every SM of the device is busy; all else (launches, blocks) is built on it.

    A model is made from a `Device` alone: `COST_MODELS["roofline"](device("rtx4090"))`.
    """

    @property
    def name(self) -> str:
        """Key in `COST_MODELS`."""
        ...

    @property
    def device(self) -> Device:
        """The device whose time it predicts."""
        ...

    def tiles(self, scheme: Scheme) -> tuple[Tile, ...]:
        """Tiles to choose from for a scheme, the preferred first among equals; empty where the scheme cannot run."""
        ...

    def tile_us(self, scheme: Scheme, tile: Tile, k: int, rows: float | None = None) -> float:
        """
        Microseconds for one output tile over the full depth of `k` input channels; `inf` where it cannot run.

        `rows` are the rows of the expert that the tile belongs to (None: one tile's). An expert's weights come from
        memory once and from the cache for its further row tiles, so the time returned is the mean over its
        ceil(rows / tile.m) row tiles. The whole product of rows and `n` columns takes
        ceil(rows / tile.m) * ceil(n / tile.n) * tile_us / device.sms.
        """
        ...

    def provenance(self, scheme: Scheme, k: int | None = None) -> str:
        """
        Say what the figures of a scheme rest on: "measured", "scaled from w4a16_asym" or "roofline".

        With `k`, an extrapolation to a depth that nobody measured is added in brackets.
        """
        ...


COST_MODELS = Registry(
    "cost model",
    "mxmoe.cost_models",
    {
        "measured": "mxmoe.cost.measured:Measured",
        "roofline": "mxmoe.cost.roofline:Roofline",
    },
)
"""Name -> class, called with a `Device`."""


def cost_model(name: str, device_name: str) -> CostModel:
    """
    Make a cost model for a device by their names, e.g. `cost_model("roofline", "h200")`.

    Raises:
        UnknownName: no such model or device.
        NoProfile: "measured" for a device without a profile.
    """
    return COST_MODELS[name](device(device_name))
