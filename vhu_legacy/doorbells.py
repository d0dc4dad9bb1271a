# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Eventfds, seen from trio: the group's event hub.

Kick and call eventfds of rings never come here: they belong to Rust (design D3). What Python waits for is one eventfd
per group, through which the native side reports that something ended or happened. An eventfd rather than
`TrioToken.run_sync_soon`: the writer needs no interpreter lock, many writes coalesce into one wake-up, and an exception
in a callback can't take the whole run down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import trio

if TYPE_CHECKING:
    from . import _native

__all__ = ["EventCallback", "EventHub"]

EventCallback = Callable[[str, int, dict[str, Any]], None]

logger = logging.getLogger(__name__)


class EventHub:
    """Hands the native side's events to those who wait for them.

    One task runs `run`; any number may `subscribe` or `wait_done`.
    """

    def __init__(self, pool: _native.Pool) -> None:
        self._pool: Final = pool
        self._subscribers: list[EventCallback] = []
        # A completion may end before anybody waits for it: worker threads don't know our schedule. So tokens that
        # have ended are kept until they are asked for; each is asked for exactly once.
        self._ended: set[int] = set()
        self._waiting: dict[int, trio.Event] = {}
        self._running = False

    def subscribe(self, callback: EventCallback) -> None:
        """Call `callback(kind, member, data)` for every event but "done", in the trio thread, without awaiting."""
        self._subscribers.append(callback)

    def dispatch(self) -> None:
        """Take all events of the moment. `run` does this; a caller that closes down may do it once more."""
        for kind, member, data in self._pool.take_events():
            if kind == "done":
                token: int = data["token"]
                event = self._waiting.pop(token, None)
                if event is None:
                    self._ended.add(token)
                else:
                    event.set()
                continue
            for callback in self._subscribers:
                try:
                    callback(kind, member, data)
                except Exception:
                    # One listener's bug must not stop the events of all members.
                    logger.exception("member %d: event %s", member, kind)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Dispatch events until cancelled."""
        fd = self._pool.event_fd()
        self._running = True
        task_status.started()
        try:
            while True:
                await trio.lowlevel.wait_readable(fd)
                self.dispatch()
        finally:
            self._running = False

    async def wait_done(self, token: int) -> None:
        """Wait for a completion.

        Works, by looking from time to time, even when `run` has ended: closing down cancels everything at once, and a
        connection still has to see its rings stop.

        On cancellation the completion goes on, and can be waited for again.
        """
        if token in self._ended:
            await trio.lowlevel.checkpoint()
            self._ended.discard(token)
            return
        event = self._waiting[token] = trio.Event()
        try:
            while not event.is_set():
                with trio.move_on_after(0.01 if not self._running else 1):
                    await event.wait()
                if not self._running:
                    self.dispatch()
        except trio.Cancelled:
            # It may be asked for again. If it has ended in this very moment, that must not be lost.
            if event.is_set():
                self._ended.add(token)
            else:
                self._waiting.pop(token, None)
            raise
