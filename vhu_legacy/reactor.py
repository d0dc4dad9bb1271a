# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Waiting for thousands of descriptors on which nothing happens.

A task that waits costs more than two kilobytes, a descriptor in an epoll a tenth of one. So listeners, idle connections
and their back-end channels have no task: one waits for all of them. Whoever is told that a descriptor has become
readable starts a task if there is something to wait for.
"""

from __future__ import annotations

import logging
import select
from contextlib import suppress
from typing import Final, Protocol

import trio

__all__ = ["Reactor", "Waiter"]

logger = logging.getLogger(__name__)

_EVENTS: Final = select.EPOLLIN | select.EPOLLONESHOT
_BATCH: Final = 64
"""Descriptors that are told of before all other tasks have their turn."""


class Waiter(Protocol):
    """Who waits for descriptors."""

    def readable(self, fd: int) -> None:
        """There is something to receive or to accept, an end or an error included; or there was: look without waiting.

        In the trio thread, and not to block. Nothing more is told of this descriptor until it is armed again.
        """


class Reactor:
    """Tells waiters of their descriptors, as long as one task runs `run`. Methods are for the trio thread."""

    __slots__ = ("_epoll", "_waiters")

    def __init__(self) -> None:
        """Raises OSError."""
        self._epoll: Final = select.epoll()
        self._waiters: Final[dict[int, Waiter]] = {}

    def arm(self, fd: int, waiter: Waiter) -> None:
        """Tell `waiter` once, as soon as `fd` is readable. Arming twice is as good as once. Raises OSError."""
        known = fd in self._waiters
        if known:
            # It goes as one that was closed behind our back goes: with its registration.
            with suppress(FileNotFoundError):
                self._epoll.modify(fd, _EVENTS)
                self._waiters[fd] = waiter
                return
        self._epoll.register(fd, _EVENTS)
        self._waiters[fd] = waiter

    def forget(self, fd: int) -> None:
        """Tell nobody any more. To be called before `fd` is closed: where another process has the same socket, closing
        ours doesn't end the registration, and nothing could any more."""
        if self._waiters.pop(fd, None) is not None:
            with suppress(OSError):
                self._epoll.unregister(fd)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell waiters, until cancelled."""
        task_status.started()
        while True:
            # with more than a batch there are, this returns at once, but after everybody else has had a turn
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            self._tell()

    def _tell(self) -> None:
        for fd, _ in self._epoll.poll(0, _BATCH):
            # one told before may have closed it
            waiter = self._waiters.get(fd)
            if waiter is None:
                continue
            try:
                waiter.readable(fd)
            except Exception:
                # one waiter's bug must not stop all others
                logger.exception("descriptor %d", fd)

    def close(self) -> None:
        """Forget all. Idempotent."""
        self._waiters.clear()
        self._epoll.close()
