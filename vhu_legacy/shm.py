# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Shared memory, seen from Python: where a front end's guest memory is.

The mappings belong to Rust and are shared between members; here is only the table a front end sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _native

__all__ = ["MemoryRegion", "memory_map"]


@dataclass(frozen=True, slots=True, order=True)
class MemoryRegion:
    """A region of guest memory: addresses and sizes in bytes."""

    guest_address: int
    size: int
    user_address: int
    """Where it is in the front end's process."""
    mmap_offset: int
    """Where it starts in its file."""

    @property
    def guest_end(self) -> int:
        """The first guest address behind it."""
        return self.guest_address + self.size


def memory_map(member: _native.Member) -> tuple[MemoryRegion, ...]:
    """The member's memory map by guest address; empty while no front end has sent one. Never blocks."""
    return tuple(sorted(MemoryRegion(**region) for region in member.info()["memory"]))
