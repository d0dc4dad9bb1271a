# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The vhost-user back end's sockets: one listener per member, one connection at a time (design D2).

This module moves whole messages between a socket and a native session, and waits for what the session has to wait for.
It knows no message: what one means is decided in `rust/core/src/session.rs`.

Life of a connection: accept, attach to the member, messages, detach. Detaching stops the rings and waits until requests
in flight have ended, so the next front end (the same QEMU reconnecting, or a new one) finds guest memory and used
indices as they will stay. A second front end that comes meanwhile waits a moment: a QEMU that is restarted connects
before the old one's end has been noticed.

Nothing here has a task while nothing happens: listener, connection and back-end channel wait in the group's `Reactor`.
A message starts one, which takes what there is, and is gone again.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from . import _native
from .channel import Channel, ConnectionEnd, Message, TornMessage
from .doorbells import EventHub
from .errors import MemberError
from .reactor import Reactor
from .rundir import bind_unix, socket_name, unlink_bound

__all__ = ["ConnectionStatistics", "Held", "HeldConnection", "Host", "VhostUserServer"]

logger = logging.getLogger(__name__)

_BUSY_PATIENCE: Final = 2.0
"""Seconds a second front end waits for the first to be gone."""
_STOP_PATIENCE: Final = 60.0
"""Seconds that a front end's request may wait for its rings: I/O in flight on slow storage has to end first."""
_DRAIN_PATIENCE: Final = 10.0
"""Seconds that requests in flight may take, unless the server is told to end, to finish after a disconnect."""
_REFUSAL_LOG_INTERVAL: Final = 10.0
"""Seconds between log lines about refused front ends of one member."""
_SHARE_PATIENCE: Final = 30.0
"""Seconds that a front end may take to map shared memory."""
_HOLD_PATIENCE: Final = 5.0
"""Seconds that a connection's last message and its rings may take when it is handed over."""
_SET_BACKEND_REQ_FD: Final = struct.pack("<III", 21, 1, 0)
"""Header of the message that brings the back-end channel (request, version, no payload)."""
_ACCEPT_INTERVAL: Final = 0.2
"""Seconds until another attempt to accept, when there are no descriptors left."""
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


@dataclass(frozen=True, slots=True)
class Host:
    """What all servers of a group share."""

    directory: Path
    """Where their sockets are."""
    hub: EventHub
    reactor: Reactor
    spawn: Callable[[Callable[[], Awaitable[None]]], None]
    """Starts a task, which is cancelled when the group ends."""
    on_event: Callable[[str, int, dict[str, Any]], None]
    """`on_event(kind, member, data)` is told "connected" {peer_pid} and "disconnected" {reason}."""
    on_failure: Callable[[int, Exception], None]
    """`on_failure(member, error)`: its server can't go on. It is to be closed."""


class _Connection:
    """One attached front end."""

    __slots__ = (
        "answered",
        "cancelled",
        "channel",
        "ended",
        "freezing",
        "frozen",
        "held",
        "left",
        "messages",
        "peer_pid",
        "reason",
        "rested",
        "reverse",
        "session",
        "thawed",
        "working",
    )

    def __init__(self, channel: Channel, session: _native.Session) -> None:
        self.channel: Final = channel
        self.session: Final = session
        self.peer_pid: Final = channel.peer_pid()
        self.messages = 0
        self.reverse: Channel | None = None
        self.reason = "closed by the front end"
        self.working = 0
        """Tasks that receive or answer messages, one for each of both channels."""
        self.held = False
        """While a successor is taking over: no message is begun."""
        self.rested: trio.Event | None = None
        self.cancelled = False
        """It is to end, wherever it is."""
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
        self.answered: Callable[[bool], None] | None = None
        """Told the answer to the request about shared memory that is under way."""

    async def hold(self) -> None:
        """Let no message begin, and wait for those that have."""
        self.held = True
        if self.working:
            self.rested = trio.Event()
            await self.rested.wait()

    def rest(self) -> None:
        """A task has nothing more to receive."""
        self.working -= 1
        if self.rested is not None and not self.working:
            self.rested.set()
            self.rested = None


class VhostUserServer:
    """Serves one member to front ends on a UNIX socket, one at a time."""

    __slots__ = (
        "_accepted",
        "_closed",
        "_connection",
        "_freed",
        "_held",
        "_host",
        "_identity",
        "_idle",
        "_left",
        "_listener",
        "_member",
        "_quiet_until",
        "_refused",
        "_scopes",
        "_taken_over",
        "_taken_unattached",
        "_tasks",
        "_tell_config",
        "_unattached",
        "untouched",
    )

    def __init__(self, member: _native.Member, host: Host) -> None:
        self._member: Final = member
        self._host: Final = host
        self._connection: _Connection | None = None
        self._freed: trio.Event | None = None
        self._accepted = 0
        self._refused = 0
        self._quiet_until = -math.inf
        self._listener: socket.socket | None = None
        self._identity = (0, 0)
        self._closed = False
        self._tasks = 0
        self._scopes: tuple[trio.CancelScope, ...] = ()
        """Those of the tasks that have begun."""
        self._idle: trio.Event | None = None
        self._held: trio.Event | None = None
        """While a successor is taking over: nothing is accepted or attached until this is set."""
        self._left = False
        """The sockets are another process's: nothing is to be removed, or said to a front end."""
        self._unattached: dict[Channel, trio.CancelScope] | None = None
        """Front ends that wait for the member."""
        self._tell_config = False
        self._taken_over: tuple[Channel, _native.Session, Channel | None] | None = None
        self._taken_unattached: list[Channel] | None = None
        self.untouched = False
        """After a failed `take_over`: no ring was started."""

    @property
    def path(self) -> Path:
        """The socket's; not kept, since a path takes more memory than a server."""
        return self._host.directory / socket_name(self._member.id)

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

    # --- tasks, while there is something to do ------------------------------------------------------------

    def start(self, fd: int | None = None) -> None:
        """Bind the socket and serve from now on, until `aclose`.

        `fd`: the listening socket of a predecessor instead, which is ours from then on.

        Raises:
            OSError: the socket can't be bound (a path in use, or too long).
        """
        listener = bind_unix(self.path, _MAX_WAITING) if fd is None else socket.socket(fileno=fd)
        bound = False
        try:
            listener.setblocking(False)
            status = self.path.lstat()
            self._identity = (status.st_dev, status.st_ino)
            bound = fd is None
            if fd is not None:
                self.path.chmod(0o600)
                listener.listen(_MAX_WAITING)
            if self._held is None:
                self._host.reactor.arm(listener.fileno(), self)
        except BaseException:
            if bound:
                unlink_bound(self.path, self._identity)
            listener.close()
            raise
        self._listener = listener
        self._start_taken_over()

    async def aclose(self) -> None:
        """Accept nothing more, detach, and remove the socket. Takes 10 seconds at most; the wait isn't cancelled.
        Idempotent."""
        self._closed = True
        listener, self._listener = self._listener, None
        if listener is not None:
            self._host.reactor.forget(listener.fileno())
            # only what was bound here: somebody may have put another socket in its place
            if not self._left:
                unlink_bound(self.path, self._identity)
            # As `Channel.close`: connections that wait to be accepted go with it, and what was sent on them.
            _native.discard([listener.detach()])
        for scope in self._scopes:
            scope.cancel()
        with trio.CancelScope(shield=True):
            connection = self._connection
            if connection is not None and not connection.channel.serving:
                connection.cancelled = connection.channel.serving = True
                self._tasks += 1
                await self._task(self._finish, connection)
            while self._tasks:
                if self._idle is None or self._idle.is_set():
                    self._idle = trio.Event()
                await self._idle.wait()

    def _spawn(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Start a task of this server: its end is that of the server at the latest."""
        self._tasks += 1
        self._host.spawn(partial(self._task, work, *arguments))

    async def _task(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        scope = trio.CancelScope()
        self._scopes += (scope,)
        if self._closed:
            # what has to be done in any case is shielded
            scope.cancel()
        try:
            with scope:
                await work(*arguments)
        except Exception as error:
            self._host.on_failure(self._member.id, error)
        finally:
            self._scopes = tuple(other for other in self._scopes if other is not scope)
            self._tasks -= 1
            if self._idle is not None and not self._tasks:
                self._idle.set()

    def readable(self, fd: int) -> None:
        """The reactor's: a front end connects, or says something."""
        connection = self._connection
        try:
            if self._listener is not None and self._listener.fileno() == fd:
                self._accept(self._listener)
            # one that is held is armed by whoever lets it go on
            elif connection is not None and not connection.held:
                self._receive(connection, fd)
        except Exception as error:
            self._host.on_failure(self._member.id, error)

    def _receive(self, connection: _Connection, fd: int) -> None:
        reverse = connection.reverse
        if connection.channel.fileno() == fd and not connection.channel.serving:
            connection.channel.serving = True
            self._spawn(self._serve_connection, connection)
        elif reverse is not None and reverse.fileno() == fd and not reverse.serving:
            reverse.serving = True
            self._spawn(self._serve_reverse, connection, reverse)

    def _park(self, connection: _Connection, channel: Channel) -> None:
        """It has no task any more: the next message starts one."""
        channel.serving = False
        if connection.held or connection.cancelled or connection.ended:
            return
        try:
            self._host.reactor.arm(channel.fileno(), self)
        except OSError as error:
            connection.reason = f"connection broke: {error}"
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        """Have the connection end."""
        connection.cancelled = True
        channel = connection.channel
        if channel.scope is not None:
            channel.scope.cancel()
        elif not channel.serving and self._connection is connection:
            channel.serving = True
            self._spawn(self._finish, connection)

    async def _until_freed(self) -> None:
        """Wait for the end of the present connection."""
        if self._freed is None:
            self._freed = trio.Event()
        await self._freed.wait()

    # --- connections --------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        if self._held is not None:
            # who connects meanwhile waits for the successor, or for us
            return
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                raise
            # The connection stays in the backlog; others may free descriptors meanwhile.
            logger.error("member %d: accept: %s", self._member.id, error)
            self._spawn(self._accept_later)
            return
        else:
            channel = Channel(sock)
            if self._unattached is not None and len(self._unattached) >= _MAX_WAITING:
                self._refused += 1
                channel.close()
            else:
                self._start_serving(channel)
        self._accept_again()

    async def _accept_later(self) -> None:
        await trio.sleep(_ACCEPT_INTERVAL)
        self._accept_again()

    def _accept_again(self) -> None:
        if self._listener is not None and self._held is None:
            self._host.reactor.arm(self._listener.fileno(), self)

    def _start_serving(self, channel: Channel) -> None:
        session = None
        if self._held is None and not self._closed:
            with suppress(_native.BusyError):
                session = _native.Session(self._member)
        if session is not None:
            self._begin(channel, session, None)
            return
        scope = trio.CancelScope()
        if self._unattached is None:
            self._unattached = {}
        self._unattached[channel] = scope
        self._spawn(self._wait, channel, scope)

    async def _attach(self, channel: Channel) -> _native.Session | None:
        """A session, when the member is or becomes free within a moment."""
        with trio.move_on_after(_BUSY_PATIENCE) as scope:
            while True:
                while self._held is not None:
                    # whoever serves the member in the end starts with it anew
                    scope.deadline = math.inf
                    await self._held.wait()
                    scope.deadline = trio.current_time() + _BUSY_PATIENCE
                try:
                    return _native.Session(self._member)
                except _native.BusyError as error:
                    reason = str(error)
                if self._member.attached:
                    await self._until_freed()
                else:
                    break
        self._refused += 1
        now = trio.current_time()
        if now < self._quiet_until:
            return None
        self._quiet_until = now + _REFUSAL_LOG_INTERVAL
        logger.warning("member %d: front end (pid %s) refused: %s", self._member.id, channel.peer_pid(), reason)
        return None

    async def _wait(self, channel: Channel, scope: trio.CancelScope) -> None:
        """A connection that finds the member in use."""
        session = None
        try:
            with scope:
                session = await self._attach(channel)
        finally:
            if self._unattached is not None:
                self._unattached.pop(channel, None)
                self._unattached = self._unattached or None
            if session is None:
                if self._left or scope.cancel_called:
                    channel.leave()
                channel.close()
        if session is not None:
            self._begin(channel, session, None)

    def _begin(self, channel: Channel, session: _native.Session, reverse: Channel | None) -> None:
        """A front end is attached."""
        connection = self._connection = _Connection(channel, session)
        self._accepted += 1
        self._host.on_event("connected", self._member.id, {"peer_pid": connection.peer_pid})
        if reverse is not None:
            connection.reverse = reverse
            self._park(connection, reverse)
        if self._tell_config or self._closed:
            channel.serving = True
            self._spawn(self._serve_connection, connection)
        else:
            self._park(connection, channel)

    async def _serve_connection(self, connection: _Connection) -> None:
        """Everything that the front end has said so far. Never raises for anything a peer can do."""
        more = False
        channel = connection.channel
        try:
            with trio.CancelScope() as channel.scope:
                if connection.cancelled:
                    channel.scope.cancel()
                if self._tell_config:
                    self._tell_config = False
                    await self._send_config_change(connection)
                more = await self._messages(connection)
        finally:
            channel.scope = None
            if not more or connection.cancelled:
                await self._finish(connection)
        self._park(connection, channel)

    async def _finish(self, connection: _Connection) -> None:
        """The end of a connection."""
        connection.ended = True
        channel, reverse = connection.channel, connection.reverse
        self._host.reactor.forget(channel.fileno())
        if reverse is not None:
            connection.reverse = None
            self._end_reverse(connection, reverse)
        try:
            await self._detach(connection)
        finally:
            self._let_go(connection, channel)

    def _let_go(self, connection: _Connection, channel: Channel) -> None:
        if channel.fileno() >= 0:
            self._host.reactor.forget(channel.fileno())
        if connection.left or self._left:
            channel.leave()
        channel.close()

    async def _messages(self, connection: _Connection) -> bool:
        """Receive, handle, answer, until there is nothing to receive, or no leave to. False: the connection ends."""
        channel, session = connection.channel, connection.session
        more = False
        connection.working += 1
        try:
            while not connection.held:
                message = await channel.receive()
                if message is None:
                    break
                connection.messages += 1
                if not await self._handle(connection, message):
                    return False
                # a front end can say more and more: the others have their turn
                await trio.lowlevel.checkpoint()
            more = True
        except ConnectionEnd:
            pass
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
            connection.ended = not more
            connection.rest()
        return more

    async def _handle(self, connection: _Connection, message: Message) -> bool:
        """One message; False when the connection is to be closed."""
        session = connection.session
        outcome = session.handle(message.header, message.payload, message.fds)
        while True:
            fd = outcome.take_backend_channel()
            if fd is not None:
                self._open_reverse(connection, fd)
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
                await self._host.hub.wait_done(outcome.pending)
            if scope.cancelled_caught:
                connection.reason = f"I/O in flight for {_STOP_PATIENCE:g} s"
                session.fail("drain.timeout", connection.reason)
                return False
            outcome = session.resume(outcome.pending)

    def _open_reverse(self, connection: _Connection, fd: int) -> None:
        before, connection.reverse = connection.reverse, None
        if before is not None:
            self._end_reverse(connection, before)
        connection.reverse = reverse = Channel.from_fd(fd)
        self._park(connection, reverse)

    def _end_reverse(self, connection: _Connection, reverse: Channel) -> None:
        """Close a back-end channel that isn't the connection's any more."""
        if reverse.scope is not None:
            reverse.scope.cancel()
        elif not reverse.serving:
            self._let_go(connection, reverse)

    async def _serve_reverse(self, connection: _Connection, reverse: Channel) -> None:
        """All answers so far on the back-end channel."""
        more = False
        try:
            with trio.CancelScope() as reverse.scope:
                if connection.reverse is reverse:
                    more = await self._answers(connection, reverse)
        finally:
            reverse.scope = None
            if more and connection.reverse is reverse:
                self._park(connection, reverse)
            else:
                self._let_go(connection, reverse)
                if connection.reverse is reverse:
                    connection.reverse = None

    async def _answers(self, connection: _Connection, reverse: Channel) -> bool:
        """Answers on the back-end channel; False at its end. They are checked and otherwise of no consequence: waiting
        for one while the front end waits for us would block both (QEMU serves this channel only between its own
        requests)."""
        connection.working += 1
        try:
            while not connection.held:
                message = await reverse.receive()
                if message is None:
                    break
                if message.fds:
                    _native.discard(message.fds)
                    raise TornMessage("message.fds", "file descriptors with an answer on the back-end channel")
                done = connection.session.backend_reply(message.header, message.payload)
                if done is not None and connection.answered is not None:
                    connection.answered(done)
                await trio.lowlevel.checkpoint()
            return True
        except ConnectionEnd:
            pass
        except (TornMessage, _native.NativeError) as error:
            connection.reason = str(error)
            connection.session.fail(error.rule, str(error).removeprefix(f"{error.rule}: "))
            connection.channel.shutdown()
        except (OSError, trio.ClosedResourceError) as error:
            logger.info("member %d: back-end channel: %s", self._member.id, error)
        finally:
            connection.rest()
        return False

    async def _send_config_change(self, connection: _Connection) -> bool:
        reverse = connection.reverse
        if reverse is None:
            return False
        data = connection.session.config_change()
        if data is None:
            return False
        try:
            # At once if possible: QEMU's front end for any device dies of one that it gets when stopped.
            if not reverse.send_now(data):
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
            if connection.answered is not None:
                # nobody will
                connection.answered(False)
            if self._connection is connection:
                self._connection = None
            if self._freed is not None:
                self._freed.set()
                self._freed = None
        if not (connection.left or self._left):
            self._host.on_event("disconnected", self._member.id, {"reason": connection.reason})

    async def _drain(self, connection: _Connection, token: int) -> None:
        """Wait until requests in flight have ended: for a while even when cancelled, then until cancelled."""
        session = connection.session
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _DRAIN_PATIENCE):
            await self._host.hub.wait_done(token)
            session.resume(token)
            return
        logger.error(
            "member %d: requests in flight for %g s after the front end left; the member stays busy",
            self._member.id,
            _DRAIN_PATIENCE,
        )
        session.fail("drain.timeout", f"I/O in flight for {_DRAIN_PATIENCE:g} s")
        await self._host.hub.wait_done(token)
        session.resume(token)

    async def config_changed(self) -> bool:
        """Tell an attached front end that the configuration changed. False when there is none that can take it now;
        one that can't yet is told when its device starts. Cancellation may leave the message half sent, which costs the
        channel."""
        connection = self._connection
        if connection is None:
            return False
        return await self._send_config_change(connection)

    @property
    def maps_memory(self) -> bool:
        """Whether a front end is attached that has agreed to `share_memory`."""
        return self._connection is not None and self._connection.session.has_shared_memory

    @property
    def is_sharing(self) -> bool:
        """Whether an answer to `share_memory` is still to come."""
        return self._connection is not None and self._connection.answered is not None

    async def share_memory(
        self, operation: _native.SharedMemoryOperation, carried_out: Callable[[], None]
    ) -> bool | None:
        """Have the attached front end map something into the device's shared memory region, or unmap it.

        True when that is done, False when the front end refuses, or doesn't answer in time. None when it can't be
        asked now: nobody is attached, the device isn't started, or an answer is still to come. After a cancellation, or
        when it took too long, the answer may still come; until then it can't be asked again. `carried_out` is called
        when it is done, also that late.
        """
        connection = self._connection
        reverse = None if connection is None else connection.reverse
        if connection is None or reverse is None or connection.ended or connection.answered is not None or reverse.busy:
            return None
        request = connection.session.shared_memory(operation.map, operation.offset, operation.size, operation.fd_offset)
        if request is None:
            return None
        # No checkpoint between the session's word that the device runs and the message: QEMU dies of one that it gets
        # when it has stopped its device.
        try:
            sent = reverse.send_now(request, [operation.fileno()] if operation.map else ())
        except OSError as error:
            logger.warning("member %d: the back-end channel broke: %s", self._member.id, error)
            sent = False
        if not sent:
            # the session waits for an answer, and none will come
            reverse.shutdown()
            connection.channel.shutdown()
            return False
        answer: list[bool] = []
        answered = trio.Event()

        def take(done: bool) -> None:
            answer.append(done)
            answered.set()
            connection.answered = None
            if done:
                carried_out()

        connection.answered = take
        with trio.move_on_after(_SHARE_PATIENCE):
            await answered.wait()
        return bool(answer and answer[0])

    # --- a successor takes over ---------------------------------------------------------------------------

    async def hold(self, *, force: bool = False) -> Held:
        """Accept no more connections, and stop the attached front end's rings at a message boundary, to hand it over.

        Raises MemberError when the front end can't be handed over, or its requests in flight take too long; everything
        goes on then, as it does after a cancellation. With `force` one of the first kind is disconnected. Otherwise one
        of `go_on`, `lose`, `take_back` and `leave` has to follow.
        """
        self._held = trio.Event()
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
        return Held(connection, [channel.fileno() for channel in self._unattached or ()])

    async def _hold_connection(self, force: bool) -> HeldConnection | None:
        while (connection := self._connection) is not None:
            if connection.thawed is not None:
                await connection.thawed.wait()
            if not (connection.ended or connection.cancelled):
                await connection.hold()
            if connection.ended or connection.cancelled:
                # what its rings have in flight ends here, before anybody else uses the image
                await self._until_freed()
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
            await self._host.hub.wait_done(connection.freezing)
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
                self._receive_again(connection)
            elif self._closed:
                self._drop(connection)
            else:
                connection.thawed = trio.Event()
                # not here: requests in flight may take long, and nobody but this front end has to wait for them
                self._spawn(self._thaw, connection, rings)
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
            self._drop(connection)
        finally:
            for message in rings or ():
                _native.discard(_fds_of(message))
            connection.frozen = False
            self._receive_again(connection)
            if connection.thawed is not None:
                connection.thawed.set()
                connection.thawed = None

    def _receive_again(self, connection: _Connection) -> None:
        """The end of `_Connection.hold`."""
        connection.held = False
        for channel in (connection.channel, connection.reverse):
            # one that has a task goes on by itself
            if channel is not None and not channel.serving:
                self._park(connection, channel)

    async def lose(self) -> None:
        """The end of `hold`: the successor had begun to serve, and is gone. How far it got only the front end can tell,
        so it is disconnected, and can connect again."""
        await self.disconnect("the process that was to replace this one has failed")
        self._release()

    async def take_back(self, held: Held) -> None:
        """The end of `hold`: the successor returns what was handed over. The descriptors are ours.

        Raises NativeError: as `lose`.
        """
        for scope in (self._unattached or {}).values():
            scope.cancel()
        connection = self._connection
        if connection is not None:
            connection.left = True
            self._drop(connection)
            while self._connection is connection:
                await self._until_freed()
        try:
            await self.take_over(held, ours=True)
        finally:
            if not self._closed:
                self._start_taken_over()
            self._release()

    def _release(self) -> None:
        if self._held is not None:
            self._held.set()
            self._held = None
            self._accept_again()

    def leave(self) -> None:
        """A successor has listener and connections: let go of them without a word to anybody. `aclose` is to be
        called next."""
        self._left = True
        connection = self._connection
        if connection is not None:
            self._drop(connection)

    def own(self) -> None:
        """The predecessor has left: listener and connections are ours alone."""
        self._left = False

    def listener_fd(self) -> int | None:
        """The listening socket's descriptor, which stays ours; None before there is one, and after it has failed."""
        return None if self._listener is None else self._listener.fileno()

    async def take_over(self, held: Held, *, ours: bool = False) -> None:
        """Go on with a predecessor's connections from `start` on. The descriptors are ours, whatever happens.

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
            session.take_over(held.config_read)
            for number, message in enumerate(messages):
                if number == len(messages) - len(held.rings):
                    # rings run from some message on
                    self.untouched = False
                await self._replay(session, message)
            session.taken_over()
        except BaseException:
            for message in messages:
                _native.discard(_fds_of(message))
            if session is not None:
                token = session.detach()
                if token is not None:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + _DRAIN_PATIENCE):
                        await self._host.hub.wait_done(token)
                        session.resume(token)
            channel.leave()
            if reverse is not None:
                reverse.leave()
            raise
        self._taken_over = (channel, session, reverse)
        self._tell_config = held.config_pending

    def _start_taken_over(self) -> None:
        if self._taken_over is not None:
            taken, self._taken_over = self._taken_over, None
            self._begin(*taken)
        unattached, self._taken_unattached = self._taken_unattached, None
        for channel in unattached or ():
            self._start_serving(channel)

    async def _replay(self, session: _native.Session, message: Message) -> None:
        outcome = session.handle(message.header, message.payload, _fds_of(message))
        while outcome.pending is not None:
            await self._host.hub.wait_done(outcome.pending)
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
        self._drop(connection)
        while self._connection is connection:
            await self._until_freed()


def _fds_of(message: Message) -> list[int]:
    """Take the descriptors out of a message."""
    fds = list(message.fds)
    message.fds.clear()
    return fds
