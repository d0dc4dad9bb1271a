# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Rings, seen from Python: numbers only.

The rings themselves run in Rust workers (design D3, D5); nothing here touches a descriptor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import _native

__all__ = ["RingStatistics", "statistics"]


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """One queue of a member at one moment. Counters run from the member's creation, indices are those of the ring."""

    index: int
    size: int
    running: bool
    layout: str | None
    """"legacy" or "modern" while the ring has one: whether its driver accepted VERSION_1."""
    worker: int | None
    avail_idx: int | None
    """The driver's available index when last seen, modulo 2^16."""
    used_idx: int | None
    """The used index as the driver sees it, modulo 2^16."""
    last_avail_idx: int
    """The next available entry to be taken, modulo 2^16."""
    in_flight: int
    kicks: int
    """Notifications received."""
    calls: int
    """Interrupts sent."""
    requests: int
    errors: int
    last_error: str | None
    """Why the member broke the last time, when this queue was to blame: "rule: reason"."""


def statistics(member: _native.Member) -> tuple[RingStatistics, ...]:
    """The member's queues, by index. Never blocks: the numbers are read as the worker leaves them."""
    info = member.info()
    fault: dict[str, Any] | None = info["last_error"]
    fields = RingStatistics.__slots__

    def one(queue: dict[str, Any]) -> RingStatistics:
        mine = fault is not None and fault["queue"] == queue["index"]
        error = f"{fault['rule']}: {fault['reason']}" if fault is not None and mine else None
        return RingStatistics(last_error=error, **{key: queue[key] for key in fields if key != "last_error"})

    return tuple(one(queue) for queue in info["queues"])
