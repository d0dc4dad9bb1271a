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
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from . import _native
from .channel import Channel, ConnectionEnd, Message, TornMessage
from .doorbells import EventHub
from .errors import MemberError

__all__ = ["ConnectionStatistics", "Held", "HeldConnection", "VhostUserServer"]

logger = logging.getLogger(__name__)

_BUSY_PATIENCE: Final = 2.0
"""Seconds a second front end waits for the first to be gone."""
_STOP_PATIENCE: Final = 60.0
"""Seconds that a front end's request may wait for its rings: I/O in flight on slow storage has to end first."""
_DRAIN_PATIENCE: Final = 10.0
"""Seconds that requests in flight may take, unless the server is told to end, to finish after a disconnect."""
_REFUSAL_LOG_INTERVAL: Final = 10.0
"""Seconds between log lines about refused front ends of one member."""
_HOLD_PATIENCE: Final = 5.0
"""Seconds that a connection's last message and its rings may take when it is handed over."""
_SET_BACKEND_REQ_FD: Final = struct.pack("<III", 21, 1, 0)
"""Header of the message that brings the back-end channel (request, version, no payload)."""
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


@dataclass(frozen=True, slots=True)
class HeldConnection:
    """A front end's connection on its way to a successor: what the other side has to do to go on with it."""

    connection: int
    """The socket."""
    reverse: int | None
    """The back-end channel's."""
    config_read: bool
    """Whether the front end has read the configuration."""
    config_pending: bool
    """Whether it is still to be told of a change."""
    state: list[Message]
    """What the front end has said, but for its rings, as the messages it would say it in. Their descriptors are the
    holder's to close."""
    rings: list[Message]
    """Its rings, likewise."""

    def close(self) -> None:
        """Close the descriptors of the messages."""
        for message in (*self.state, *self.rings):
            _native.discard(_fds_of(message))


@dataclass(frozen=True, slots=True)
class Held:
    """A member's sockets on their way to a successor, but for the listener. They stay the holder's."""

    connection: HeldConnection | None
    """The attached front end's."""
    unattached: list[int]
    """Of front ends that were accepted and not attached yet. Nothing has been read from them."""


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
        self.working = 0
        """Messages that are being received or answered, on both channels."""
        self.held: trio.Event | None = None
        """While a successor is taking over: no message is begun until this is set."""
        self.rested: trio.Event | None = None
        self.ended = False
        """No more messages are handled; it detaches, or has done so."""
        self.frozen = False
        """Its rings are stopped for a hand-over."""
        self.freezing: int | None = None
        """The completion that they have, while that is still to come."""
        self.thawed: trio.Event | None = None
        """While its rings are about to be started again, after a hand-over that came to nothing."""
        self.left = False
        """A successor has it."""

    @contextlib.asynccontextmanager
    async def message(self, channel: Channel) -> AsyncIterator[Message]:
        """The next message, until it is answered. Raises as `Channel.receive`."""
        while True:
            await channel.readable()
            if self.held is None:
                break
            await self.held.wait()
        self.working += 1
        try:
            yield await channel.receive()
        finally:
            self.working -= 1
            if self.rested is not None and not self.working:
                self.rested.set()

    async def hold(self) -> None:
        """Let no message begin, and wait for those that have."""
        if self.held is None:
            self.held = trio.Event()
        self.rested = trio.Event()
        if self.working:
            await self.rested.wait()

    def go_on(self) -> None:
        """The end of `hold`."""
        if self.held is not None:
            self.held.set()
            self.held = None


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
        self._listener: trio.socket.SocketType | None = None
        self._accepting: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._held: trio.Event | None = None
        """While a successor is taking over: nothing is accepted or attached until this is set."""
        self._left = False
        """The sockets are another process's: nothing is to be removed, or said to a front end."""
        self._unattached: dict[Channel, trio.CancelScope] = {}
        self._tell_config = False
        self._taken_over: tuple[Channel, _native.Session, Channel | None] | None = None
        self._taken_unattached: list[Channel] = []
        self.untouched = False
        """After a failed `take_over`: no ring was started."""

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

    async def run(
        self, fd: int | None = None, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Bind the socket, report `started`, and serve until cancelled; then detach, and unlink the socket.

        `fd`: the listening socket of a predecessor instead, which is ours from then on.

        Raises:
            OSError: the socket can't be bound (a path in use, or too long).
        """
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) if fd is None else _from_fd(fd)
        try:
            if fd is None:
                await listener.bind(str(self._path))
            identity = self._path.lstat()
            try:
                self._path.chmod(0o600)
                listener.listen(_MAX_WAITING)
                async with trio.open_nursery() as nursery:
                    self._listener = listener
                    self._nursery = nursery
                    task_status.started()
                    self._start_taken_over(nursery)
                    while True:
                        while self._held is not None:
                            # who connects meanwhile waits for the successor, or for us
                            await self._held.wait()
                        with trio.CancelScope() as self._accepting:
                            await self._accept(listener, nursery)
                        self._accepting = None
            finally:
                self._listener = self._nursery = None
                # Only what was bound here: somebody may have put another socket in its place.
                with contextlib.suppress(OSError):
                    now = self._path.lstat()
                    if not self._left and (now.st_dev, now.st_ino) == (identity.st_dev, identity.st_ino):
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
            self._start_serving(Channel(sock), nursery)

    def _start_serving(self, channel: Channel, nursery: trio.Nursery) -> None:
        scope = self._unattached[channel] = trio.CancelScope()
        nursery.start_soon(self._serve, channel, scope)

    async def _attach(self, channel: Channel) -> _native.Session | None:
        """A session, when the member is or becomes free within a moment."""
        self._waiting += 1
        try:
            with trio.move_on_after(_BUSY_PATIENCE) as scope:
                while True:
                    while self._held is not None:
                        # whoever serves the member in the end starts with it anew
                        scope.deadline = math.inf
                        await self._held.wait()
                        scope.deadline = trio.current_time() + _BUSY_PATIENCE
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

    async def _serve(self, channel: Channel, scope: trio.CancelScope) -> None:
        """One connection, from accept to detach. Never raises for anything a peer can do."""
        session = None
        try:
            with scope:
                session = await self._attach(channel)
        finally:
            del self._unattached[channel]
            if session is None:
                if self._left or scope.cancel_called:
                    channel.leave()
                channel.close()
        if session is not None:
            await self._serve_session(channel, session, None)

    async def _serve_session(self, channel: Channel, session: _native.Session, reverse: Channel | None) -> None:
        connection = self._connection = _Connection(channel, session)
        self._accepted += 1
        try:
            self._on_event("connected", self._member.id, {"peer_pid": connection.peer_pid})
            with connection.scope:
                async with trio.open_nursery() as nursery:
                    if reverse is not None:
                        connection.reverse = reverse
                        nursery.start_soon(self._reverse, connection, reverse)
                    if self._tell_config:
                        self._tell_config = False
                        await self._send_config_change(connection)
                    await self._messages(connection, nursery)
                    nursery.cancel_scope.cancel()
        finally:
            try:
                await self._detach(connection)
            finally:
                if connection.left or self._left:
                    channel.leave()
                channel.close()

    async def _messages(self, connection: _Connection, nursery: trio.Nursery) -> None:
        """Receive, handle, answer, until the connection ends."""
        channel, session = connection.channel, connection.session
        try:
            while True:
                async with connection.message(channel) as message:
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
        finally:
            connection.ended = True

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
                async with connection.message(reverse) as message:
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
            if connection.left or self._left:
                reverse.leave()
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
        if not (connection.left or self._left):
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

    # --- a successor takes over ---------------------------------------------------------------------------

    async def hold(self, *, force: bool = False) -> Held:
        """Accept no more connections, and stop the attached front end's rings at a message boundary, to hand it over.

        Raises MemberError when the front end can't be handed over, or its requests in flight take too long; everything
        goes on then, as it does after a cancellation. With `force` one of the first kind is disconnected. Otherwise one
        of `go_on`, `lose`, `take_back` and `leave` has to follow.
        """
        self._held = trio.Event()
        if self._accepting is not None:
            self._accepting.cancel()
        try:
            with trio.fail_after(_HOLD_PATIENCE):
                connection = await self._hold_connection(force)
        except trio.TooSlowError:
            talking = self._connection is not None and self._connection.working
            what = "a message of its front end isn't finished" if talking else "requests of its front end are in flight"
            self.go_on(None)
            reason = f"can't be handed over: {what} after {_HOLD_PATIENCE:g} s"
            raise MemberError(self._member.id, reason) from None
        except BaseException:
            self.go_on(None)
            raise
        return Held(connection, [channel.fileno() for channel in self._unattached])

    async def _hold_connection(self, force: bool) -> HeldConnection | None:
        while (connection := self._connection) is not None:
            if connection.thawed is not None:
                await connection.thawed.wait()
            if not (connection.ended or connection.scope.cancel_called):
                await connection.hold()
            if connection.ended or connection.scope.cancel_called:
                # what its rings have in flight ends here, before anybody else uses the image
                await self._freed.wait()
                continue
            try:
                return await self._freeze(connection)
            except (_native.NativeError, OSError) as error:
                reason = str(error)
            if not force:
                raise MemberError(self._member.id, f"its front end can't be handed over: {reason}; or use force")
            logger.warning("member %d: its front end is disconnected, not handed over: %s", self._member.id, reason)
            await self.disconnect("the process is being replaced")
        return None

    async def _freeze(self, connection: _Connection) -> HeldConnection:
        session = connection.session
        if not connection.frozen:
            connection.freezing = session.freeze()
            connection.frozen = True
        if connection.freezing is not None:
            await self._hub.wait_done(connection.freezing)
            session.resume(connection.freezing)
            connection.freezing = None
        state, rings = session.snapshot()
        return HeldConnection(
            connection.channel.fileno(),
            None if connection.reverse is None else connection.reverse.fileno(),
            session.config_read,
            session.config_pending,
            [Message(*message) for message in state],
            [Message(*message) for message in rings],
        )

    def go_on(self, held: Held | None) -> None:
        """The end of `hold`: there is no successor, and there was none. Returns at once."""
        connection = self._connection
        if connection is not None and connection.thawed is None:
            rings = None
            if held is not None and held.connection is not None:
                rings = held.connection.rings[:]
                held.connection.rings.clear()
            if not connection.frozen or connection.ended:
                connection.go_on()
            elif self._nursery is None:
                connection.scope.cancel()
            else:
                connection.thawed = trio.Event()
                # not here: requests in flight may take long, and nobody but this front end has to wait for them
                self._nursery.start_soon(self._thaw, connection, rings)
        self._release()

    async def _thaw(self, connection: _Connection, rings: list[Message] | None) -> None:
        """Start the rings again, and receive messages."""
        try:
            if rings is None:
                held = await self._freeze(connection)
                rings = held.rings[:]
                held.rings.clear()
                held.close()
            for message in rings:
                await self._replay(connection.session, message)
        except (_native.NativeError, OSError) as error:
            logger.warning("member %d: its rings can't be started again: %s", self._member.id, error)
            connection.reason = str(error)
            connection.scope.cancel()
        finally:
            for message in rings or ():
                _native.discard(_fds_of(message))
            connection.frozen = False
            connection.go_on()
            if connection.thawed is not None:
                connection.thawed.set()
                connection.thawed = None

    async def lose(self) -> None:
        """The end of `hold`: the successor had begun to serve, and is gone. How far it got only the front end can tell,
        so it is disconnected, and can connect again."""
        await self.disconnect("the process that was to replace this one has failed")
        self._release()

    async def take_back(self, held: Held) -> None:
        """The end of `hold`: the successor returns what was handed over. The descriptors are ours.

        Raises NativeError: as `lose`.
        """
        for scope in self._unattached.values():
            scope.cancel()
        connection = self._connection
        if connection is not None:
            connection.left = True
            connection.scope.cancel()
            while self._connection is connection:
                await self._freed.wait()
        try:
            await self.take_over(held, ours=True)
        finally:
            if self._nursery is not None:
                self._start_taken_over(self._nursery)
            self._release()

    def _release(self) -> None:
        if self._held is not None:
            self._held.set()
            self._held = None

    def leave(self) -> None:
        """A successor has listener and connections: let go of them without a word to anybody. The task that runs `run`
        is to be cancelled next."""
        self._left = True
        connection = self._connection
        if connection is not None:
            connection.scope.cancel()

    def own(self) -> None:
        """The predecessor has left: listener and connections are ours alone."""
        self._left = False

    def listener_fd(self) -> int | None:
        """The listening socket's descriptor, which stays ours; None before there is one, and after it has failed."""
        return None if self._listener is None else self._listener.fileno()

    async def take_over(self, held: Held, *, ours: bool = False) -> None:
        """Go on with a predecessor's connections as soon as `run` runs. The descriptors are ours, whatever happens.

        Until `own` the sockets are the predecessor's, too, unless they are `ours`. Raises NativeError when the state of
        the connection makes no sense here; nothing was said to the front end then, and if `untouched` says so, nothing
        was done for it.
        """
        self.untouched = True
        self._left = not ours
        self._taken_unattached = [Channel.from_fd(fd) for fd in held.unattached]
        if held.connection is not None:
            await self._take_over_connection(held.connection)

    async def _take_over_connection(self, held: HeldConnection) -> None:
        channel = Channel.from_fd(held.connection)
        reverse = None if held.reverse is None else Channel.from_fd(held.reverse)
        session = None
        messages = [*held.state, *held.rings]
        if reverse is not None:
            # what it is for the session; the channel itself is here already
            message = Message(_SET_BACKEND_REQ_FD, b"", [os.dup(reverse.fileno())])
            # after the protocol features
            messages.insert(1, message)
        try:
            session = _native.Session(self._member)
            if held.config_read:
                session.set_config_read()
            for number, message in enumerate(messages):
                if number == len(messages) - len(held.rings):
                    # rings run from some message on
                    self.untouched = False
                await self._replay(session, message)
        except BaseException:
            for message in messages:
                _native.discard(_fds_of(message))
            if session is not None:
                token = session.detach()
                if token is not None:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + _DRAIN_PATIENCE):
                        await self._hub.wait_done(token)
                        session.resume(token)
            channel.leave()
            if reverse is not None:
                reverse.leave()
            raise
        self._taken_over = (channel, session, reverse)
        self._tell_config = held.config_pending

    def _start_taken_over(self, nursery: trio.Nursery) -> None:
        if self._taken_over is not None:
            nursery.start_soon(self._serve_session, *self._taken_over)
            self._taken_over = None
        for channel in self._taken_unattached:
            self._start_serving(channel, nursery)
        self._taken_unattached = []

    async def _replay(self, session: _native.Session, message: Message) -> None:
        outcome = session.handle(message.header, message.payload, _fds_of(message))
        while outcome.pending is not None:
            await self._hub.wait_done(outcome.pending)
            outcome = session.resume(outcome.pending)
        channel = outcome.take_backend_channel()
        if channel is not None:
            os.close(channel)
        if outcome.error is not None:
            raise _native.ProtocolError(outcome.error)

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


def _from_fd(fd: int) -> trio.socket.SocketType:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return trio.socket.from_stdlib_socket(sock)


def _fds_of(message: Message) -> list[int]:
    """Take the descriptors out of a message."""
    fds = list(message.fds)
    message.fds.clear()
    return fds
