# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The vfio-user sockets of a group: one listener per PCI function (design D7).

Python binds a socket, listens, and hands it over; accepting, messages, registers and guest memory are Rust's. What is
left to do here is the path: who bound it removes it, and only what it bound.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import trio

from . import _native
from .doorbells import EventHub
from .rundir import bind_unix, unlink_bound

__all__ = ["MEMBER_FUNCTIONS", "FunctionKind", "FunctionServer", "FunctionStatistics", "function_kinds"]

log = logging.getLogger(__name__)

FunctionKind = Literal["owner", "legacy", "transitional", "modern"]
MEMBER_FUNCTIONS: Final[tuple[FunctionKind, ...]] = ("legacy", "transitional", "modern")
DRAIN_TIMEOUT: Final = 10.0
"""Seconds that a client's requests in flight may take to finish when its socket is closed."""


def function_kinds(*, legacy: bool) -> tuple[FunctionKind, ...]:
    """The functions of a member: a modern-only one has nothing to offer to a legacy driver."""
    return MEMBER_FUNCTIONS if legacy else ("modern",)


@dataclass(frozen=True, slots=True)
class FunctionStatistics:
    """A function's socket at one moment. Counters run from its creation."""

    connected: bool
    peer_pid: int | None
    connections: int
    """Clients accepted so far."""
    refused: int
    """Clients turned away because the device was in use."""
    messages: int
    reads: int
    """Region reads."""
    writes: int
    errors: int
    """Messages answered with an error."""


class FunctionServer:
    """One PCI function on a UNIX socket. Made listening, until `aclose`."""

    def __init__(
        self, pool: _native.Pool, function: _native.Function, kind: FunctionKind, path: Path, hub: EventHub
    ) -> None:
        """Bind and listen.

        A socket file that nobody listens on is replaced. Raises OSError, with the path in it, when the path can't be
        bound, and NativeError.
        """
        self.kind: Final = kind
        self.path: Final = path
        self.function: Final = function
        self._hub: Final = hub
        self._closed = False
        try:
            listener = bind_unix(path)
            status = path.lstat()
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        self._identity: Final = (status.st_dev, status.st_ino)
        try:
            # from here on the descriptor is Rust's, whatever comes of it
            self._server: Final = _native.VfioUserServer(pool, function, listener.detach())
        except BaseException:
            unlink_bound(path, self._identity)
            raise

    def statistics(self) -> FunctionStatistics:
        """Numbers of the moment."""
        return FunctionStatistics(**self._server.statistics())

    def disconnect(self, reason: str) -> None:
        """Drop the client, if there is one. Returns at once; the event "function-disconnected" tells of the end."""
        self._server.disconnect(reason)

    async def aclose(self) -> None:
        """Remove the socket, drop the client, and wait until its requests in flight have ended.

        Takes 10 seconds at most; the wait isn't cancelled. Idempotent.
        """
        if self._closed:
            return
        self._closed = True
        unlink_bound(self.path, self._identity)
        token = self._server.close()
        if token is None:
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + DRAIN_TIMEOUT) as scope:
            await self._hub.wait_done(token)
        if scope.cancelled_caught:
            log.error("%s: requests in flight for %.0f s after its socket was closed", self.path.name, DRAIN_TIMEOUT)
