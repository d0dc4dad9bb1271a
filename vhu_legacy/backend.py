# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The vhost-user back end's sockets: one listener per member, one task per connection (design D2).

This module moves whole messages between a socket and a native session, and waits for what the session has to wait for.
It knows no message: what one means is decided in `rust/core/src/session.rs`.

Life of a connection: accept, attach to the member, messages, detach. Detaching stops the rings and waits until requests
in flight have ended, so the next front end (the same QEMU reconnecting, or a new one) finds guest memory and used
indices as they will stay. A second front end that comes meanwhile waits a moment: a QEMU that is restarted connects
before the old one's end has been noticed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from . import _native
from .channel import Channel, ConnectionEnd, Message, TornMessage
from .doorbells import EventHub

__all__ = ["ConnectionStatistics", "VhostUserServer"]

logger = logging.getLogger(__name__)

_BUSY_PATIENCE: Final = 2.0
"""Seconds a second front end waits for the first to be gone."""
_STOP_PATIENCE: Final = 60.0
"""Seconds that a front end's request may wait for its rings: I/O in flight on slow storage has to end first."""
_DRAIN_PATIENCE: Final = 10.0
"""Seconds that requests in flight may take, unless the server is told to end, to finish after a disconnect."""
_REFUSAL_LOG_INTERVAL: Final = 10.0
"""Seconds between log lines about refused front ends of one member."""
_MAX_WAITING: Final = 8
"""Connections that may wait for a member at once; more are closed."""


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """A member's connection at one moment."""

    connected: bool
    peer_pid: int | None
    messages: int
    """Messages received on the present connection."""
    connections: int
    """Front ends accepted so far."""
    refused: int
    """Front ends turned away because one was attached."""


class _Connection:
    """One attached front end."""

    def __init__(self, channel: Channel, session: _native.Session) -> None:
        self.channel: Final = channel
        self.session: Final = session
        self.scope: Final = trio.CancelScope()
        self.peer_pid: Final = channel.peer_pid()
        self.messages = 0
        self.reverse: Channel | None = None
        self.reason = "closed by the front end"


class VhostUserServer:
    """Serves one member to front ends on a UNIX socket, one at a time."""

    def __init__(
        self,
        member: _native.Member,
        path: Path,
        hub: EventHub,
        on_event: Callable[[str, int, dict[str, Any]], None],
    ) -> None:
        """`on_event(kind, member, data)` is told "connected" {peer_pid} and "disconnected" {reason}."""
        self._member: Final = member
        self._path: Final = path
        self._hub: Final = hub
        self._on_event: Final = on_event
        self._connection: _Connection | None = None
        self._freed = trio.Event()
        self._waiting = 0
        self._accepted = 0
        self._refused = 0
        self._quiet_until = -math.inf

    def statistics(self) -> ConnectionStatistics:
        """Numbers of the moment."""
        connection = self._connection
        return ConnectionStatistics(
            connected=connection is not None,
            peer_pid=connection.peer_pid if connection else None,
            messages=connection.messages if connection else 0,
            connections=self._accepted,
            refused=self._refused,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Bind the socket, report `started`, and serve until cancelled; then detach, and unlink the socket.

        Raises:
            OSError: the socket can't be bound (a path in use, or too long).
        """
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await listener.bind(str(self._path))
            identity = self._path.lstat()
            try:
                self._path.chmod(0o600)
                listener.listen(_MAX_WAITING)
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    await self._accept(listener, nursery)
            finally:
                # Only what was bound here: somebody may have put another socket in its place.
                with contextlib.suppress(OSError):
                    now = self._path.lstat()
                    if (now.st_dev, now.st_ino) == (identity.st_dev, identity.st_ino):
                        self._path.unlink()
        finally:
            # As `Channel.close`: connections that wait to be accepted go with it, and what was sent on them.
            trio.lowlevel.notify_closing(listener)
            _native.discard([listener.detach()])

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            try:
                sock, _ = await listener.accept()
            except OSError as error:
                if error.errno not in (
                    errno.EMFILE,
                    errno.ENFILE,
                    errno.ENOBUFS,
                    errno.ENOMEM,
                    errno.ECONNABORTED,
                ):
                    raise
                # The connection stays in the backlog; others may free descriptors meanwhile.
                logger.error("member %d: accept: %s", self._member.id, error)
                await trio.sleep(0.2)
                continue
            if self._waiting >= _MAX_WAITING:
                self._refused += 1
                Channel(sock).close()
                continue
            nursery.start_soon(self._serve, Channel(sock))

    async def _attach(self, channel: Channel) -> _native.Session | None:
        """A session, when the member is or becomes free within a moment."""
        self._waiting += 1
        try:
            with trio.move_on_after(_BUSY_PATIENCE):
                while True:
                    freed = self._freed
                    try:
                        return _native.Session(self._member)
                    except _native.BusyError as error:
                        reason = str(error)
                    if self._member.attached:
                        await freed.wait()
                    else:
                        break
        finally:
            self._waiting -= 1
        self._refused += 1
        now = trio.current_time()
        if now < self._quiet_until:
            return None
        self._quiet_until = now + _REFUSAL_LOG_INTERVAL
        logger.warning("member %d: front end (pid %s) refused: %s", self._member.id, channel.peer_pid(), reason)
        return None

    async def _serve(self, channel: Channel) -> None:
        """One connection, from accept to detach. Never raises for anything a peer can do."""
        try:
            session = await self._attach(channel)
            if session is None:
                return
            connection = self._connection = _Connection(channel, session)
            self._accepted += 1
            try:
                self._on_event("connected", self._member.id, {"peer_pid": connection.peer_pid})
                with connection.scope:
                    async with trio.open_nursery() as nursery:
                        await self._messages(connection, nursery)
                        nursery.cancel_scope.cancel()
            finally:
                await self._detach(connection)
        finally:
            channel.close()

    async def _messages(self, connection: _Connection, nursery: trio.Nursery) -> None:
        """Receive, handle, answer, until the connection ends."""
        channel, session = connection.channel, connection.session
        try:
            while True:
                message = await channel.receive()
                connection.messages += 1
                if not await self._handle(connection, message, nursery):
                    return
        except ConnectionEnd:
            return
        except TornMessage as error:
            connection.reason = str(error)
            session.fail(error.rule, str(error))
        except _native.NativeError as error:
            connection.reason = str(error)
            # its text begins with the rule, which is told by itself
            session.fail(error.rule, str(error).removeprefix(f"{error.rule}: "))
        except (OSError, trio.ClosedResourceError) as error:
            connection.reason = f"connection broke: {error}"

    async def _handle(self, connection: _Connection, message: Message, nursery: trio.Nursery) -> bool:
        """One message; False when the connection is to be closed."""
        session = connection.session
        outcome = session.handle(message.header, message.payload, message.fds)
        while True:
            fd = outcome.take_backend_channel()
            if fd is not None:
                self._open_reverse(connection, fd, nursery)
            if outcome.reply is not None:
                reply_fd = outcome.take_reply_fd()
                try:
                    await connection.channel.send(outcome.reply, () if reply_fd is None else (reply_fd,))
                finally:
                    if reply_fd is not None:
                        os.close(reply_fd)
            if outcome.error is not None:
                connection.reason = outcome.error
                return False
            if outcome.config_changed:
                await self._send_config_change(connection)
            if outcome.pending is None:
                return True
            with trio.move_on_after(_STOP_PATIENCE) as scope:
                await self._hub.wait_done(outcome.pending)
            if scope.cancelled_caught:
                connection.reason = f"I/O in flight for {_STOP_PATIENCE:g} s"
                session.fail("drain.timeout", connection.reason)
                return False
            outcome = session.resume(outcome.pending)

    def _open_reverse(self, connection: _Connection, fd: int, nursery: trio.Nursery) -> None:
        if connection.reverse is not None:
            connection.reverse.shutdown()
        connection.reverse = reverse = Channel.from_fd(fd)
        nursery.start_soon(self._reverse, connection, reverse)

    async def _reverse(self, connection: _Connection, reverse: Channel) -> None:
        """Answers on the back-end channel. They are checked and otherwise of no consequence: waiting for one while the
        front end waits for us would block both (QEMU serves this channel only between its own requests)."""
        try:
            while True:
                message = await reverse.receive()
                if message.fds:
                    _native.discard(message.fds)
                    raise TornMessage("message.fds", "file descriptors with an answer on the back-end channel")
                connection.session.backend_reply(message.header, message.payload)
        except ConnectionEnd:
            pass
        except (TornMessage, _native.NativeError) as error:
            connection.reason = str(error)
            connection.session.fail(error.rule, str(error).removeprefix(f"{error.rule}: "))
            connection.channel.shutdown()
        except (OSError, trio.ClosedResourceError) as error:
            logger.info("member %d: back-end channel: %s", self._member.id, error)
        finally:
            reverse.close()
            if connection.reverse is reverse:
                connection.reverse = None

    async def _send_config_change(self, connection: _Connection) -> bool:
        reverse = connection.reverse
        if reverse is None:
            return False
        data = connection.session.config_change()
        if data is None:
            return False
        try:
            with trio.fail_after(2):
                await reverse.send(data)
        except (OSError, trio.TooSlowError, trio.ClosedResourceError) as error:
            # Part of it may be out: nothing more can be said there.
            logger.warning("member %d: CONFIG_CHANGE not sent, back-end channel closed: %s", self._member.id, error)
            reverse.shutdown()
            return False
        except BaseException:
            reverse.shutdown()
            raise
        return True

    async def _detach(self, connection: _Connection) -> None:
        """Stop the member's rings and wait for requests in flight, also when cancelled."""
        try:
            token = connection.session.detach()
            if token is not None:
                await self._drain(connection, token)
        finally:
            if self._connection is connection:
                self._connection = None
            self._freed.set()
            self._freed = trio.Event()
        self._on_event("disconnected", self._member.id, {"reason": connection.reason})

    async def _drain(self, connection: _Connection, token: int) -> None:
        """Wait until requests in flight have ended: for a while even when cancelled, then until cancelled."""
        session = connection.session
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _DRAIN_PATIENCE):
            await self._hub.wait_done(token)
            session.resume(token)
            return
        logger.error(
            "member %d: requests in flight for %g s after the front end left; the member stays busy",
            self._member.id,
            _DRAIN_PATIENCE,
        )
        session.fail("drain.timeout", f"I/O in flight for {_DRAIN_PATIENCE:g} s")
        await self._hub.wait_done(token)
        session.resume(token)

    async def config_changed(self) -> bool:
        """Tell an attached front end that the configuration changed. False when there is none that can take it now;
        one that can't yet is told when its device starts. Cancellation may leave the message half sent, which costs the
        channel."""
        connection = self._connection
        if connection is None:
            return False
        return await self._send_config_change(connection)

    async def disconnect(self, reason: str) -> None:
        """Drop the attached front end, if any, and return when its rings have drained. Cancelling the wait changes
        nothing about the disconnect."""
        connection = self._connection
        if connection is None:
            return
        connection.reason = reason
        connection.scope.cancel()
        while self._connection is connection:
            await self._freed.wait()
