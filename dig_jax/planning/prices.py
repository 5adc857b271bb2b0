"""List prices of chips, and what a number of steps costs at such a price."""

import dataclasses
from typing import Any

_SECONDS_PER_HOUR = 3600
STEPS = 100_000  # the number of steps that costs are given for


@dataclasses.dataclass(frozen=True)
class Price:
    """A price on demand, without commitment, disks and network.

    Attributes:
        dollars: US dollars per chip and hour.
        provider: the cloud and its region, or "config.plan.price".
        date: when `source` was read.
        source: address of the price list.
    """

    dollars: float
    provider: str
    date: str
    source: str


_GOOGLE = {
    "provider": "Google Cloud, us-central1",
    "date": "read on 2026-11-28",
    # A daily copy of Google's price list, which gives slices; the price of a slice / its number of chips.
    "source": "https://github.com/skypilot-org/skypilot-catalog/blob/006059e/catalogs/v8/gcp/vms.csv",
}
_NEBIUS = {
    "provider": "Nebius AI Cloud",
    "date": "read on 2026-11-28",
    "source": "https://github.com/skypilot-org/skypilot-catalog/blob/0082b04/catalogs/v8/nebius/vms.csv",
}
# By the name of the chip. v4 and TPU7x are missing: no list price was found.
PRICES = {
    "v5e": Price(1.20, **_GOOGLE),
    "v5p": Price(4.20, **_GOOGLE),
    "v6e": Price(2.70, **_GOOGLE),
    "h100": Price(2.95, **_NEBIUS),
    "h200": Price(3.50, **_NEBIUS),
}


def find_price(chip: str | None, dollars: float | None) -> Price | None:
    """Return the price that was given in dollars per chip and hour, or a chip's list price, or None."""
    if dollars is not None:
        return Price(dollars, "config.plan.price", "", "")
    return PRICES.get(chip or "")


def cost(step_seconds: float, chips: int, price: Price | None) -> dict[str, Any]:
    """Return hours and US dollars of 100,000 steps; without a price the dollars are None."""
    hours = STEPS * step_seconds / _SECONDS_PER_HOUR
    return {"steps": STEPS, "hours": hours, "dollars": price and hours * chips * price.dollars}
