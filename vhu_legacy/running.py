# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Running an async function as a whole program."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import TypeVar

import trio

__all__ = ["run"]

T = TypeVar("T")


def run(function: Callable[..., Awaitable[T]], *args: object) -> T:
    """`trio.run`, but SIGTERM ends the program as SIGINT does: by KeyboardInterrupt, through all clean-up.

    Python's own answer to SIGTERM is to be gone at once, and a QEMU that was started would go on without us. To be
    called in the main thread. Code inside may receive the signal itself (`trio.open_signal_receiver`).
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return trio.run(function, *args)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # By way of SIGINT, for which trio knows where an exception may be raised and where it has to wait.
    signal.raise_signal(signal.SIGINT)
