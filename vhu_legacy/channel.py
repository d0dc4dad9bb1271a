# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A vhost-user connection: whole messages with their file descriptors.

There can be thousands on which nothing happens, so nobody waits in here for a message to begin: that is the reactor's.

Messages are read in two steps, header and payload, each to its exact length. Reading on beyond a message would save a
system call, but file descriptors travel with the byte they were sent at: whoever reads two messages at a time can't
tell whose descriptors came along.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple, Self

import trio

from . import _native

__all__ = ["Channel", "ConnectionEnd", "Message", "TornMessage"]

_HEADER: Final = _native.Session.HEADER_SIZE
_MAX_FDS: Final = _native.Session.MAX_FDS
# What the kernel lets one message carry (SCM_MAX_FD), so that it never has to drop any: it would do that here and now.
_ANCILLARY: Final = socket.CMSG_SPACE(253 * array.array("i").itemsize)


class ConnectionEnd(Exception):
    """The peer closed the connection between two messages."""


class TornMessage(Exception):
    """The connection ended, or went silent, in the middle of a message; or its file descriptors were cut off.

    `rule` is the name of the check, as for `_native.NativeError`.
    """

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule


class Message(NamedTuple):
    """One message as it came. The descriptors belong to whoever holds this."""

    header: bytes
    payload: bytes
    fds: list[int]


class Channel:
    """A connected UNIX stream socket that carries vhost-user messages.

    Every call says MSG_DONTWAIT: a back-end channel is a socket that the front end has made and shares with us, so it
    can clear O_NONBLOCK at any time, and a blocking call would stop all members.

    `patience` bounds the time, in seconds, between the first byte of a message and its last. Between messages there is
    no bound.
    """

    __slots__ = ("_patience", "_sending", "_socket", "scope", "serving")

    def __init__(self, sock: socket.socket, *, patience: float = 5.0) -> None:
        sock.setblocking(False)
        self._socket: Final = sock
        self._patience: Final = patience
        self._sending: trio.Lock | None = None
        """While somebody sends: thousands of channels don't."""
        self.serving = False
        """Whether a task sees to it; for the use of who starts it."""
        self.scope: trio.CancelScope | None = None
        """That task's, likewise."""

    @classmethod
    def from_fd(cls, fd: int, *, patience: float = 5.0) -> Self:
        """Take over the fd of a connected socket. Raises OSError; the fd is closed then."""
        try:
            sock = socket.socket(fileno=fd)
        except BaseException:
            os.close(fd)
            raise
        return cls(sock, patience=patience)

    def peer_pid(self) -> int | None:
        """Process id of the peer at connection time, None when the kernel doesn't say."""
        with contextlib.suppress(OSError):
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int.from_bytes(credentials[:4], "little", signed=True) or None
        return None

    def _take(self, size: int, fds: list[int]) -> bytes:
        """Up to `size` bytes, none at the end of the stream. Descriptors are appended to `fds` at once.

        Raises BlockingIOError when there is nothing.
        """
        chunk, ancillary, flags, _ = self._socket.recvmsg(
            size, _ANCILLARY, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                fds.extend(numbers)
        if flags & socket.MSG_CTRUNC or len(fds) > _MAX_FDS:
            raise TornMessage("message.fds", f"more than {_MAX_FDS} file descriptors with one message")
        return chunk

    async def _rest(self, data: bytes, size: int, fds: list[int], deadline: float) -> bytes:
        """`data` and what follows it, `size` bytes together; fewer only at the end of the stream."""
        while len(data) < size:
            try:
                chunk = self._take(size - len(data), fds)
            except BlockingIOError:
                with trio.move_on_at(deadline) as scope:
                    await trio.lowlevel.wait_readable(self._socket)
                if scope.cancelled_caught:
                    silence = f"half a message, then {self._patience:g} s of silence"
                    raise TornMessage("message.silence", silence) from None
                continue
            if not chunk:
                break
            data += chunk
        return data

    def fileno(self) -> int:
        """The socket's descriptor; it stays ours. Negative when it is closed."""
        return self._socket.fileno()

    async def receive(self) -> Message | None:
        """The next message; None when none has begun. Waits only for the rest of one that has.

        Raises:
            ConnectionEnd: the peer closed the connection.
            TornMessage: half a message, then the end or silence.
            _native.ProtocolError: the header makes no sense.
            OSError: the connection broke.
            trio.ClosedResourceError: we closed it meanwhile.

        When cancelled, or when it raises, descriptors received so far are closed and the stream is of no more use.
        """
        fds: list[int] = []
        try:
            try:
                header = self._take(_HEADER, fds)
            except BlockingIOError:
                return None
            if not header:
                raise ConnectionEnd
            # the bound starts with the first byte
            deadline = trio.current_time() + self._patience
            header = await self._rest(header, _HEADER, fds, deadline)
            if len(header) < _HEADER:
                raise TornMessage("message.torn", f"connection ended after {len(header)} bytes of a header")
            size = _native.Session.payload_size(header)
            payload = await self._rest(b"", size, fds, deadline)
            if len(payload) < size:
                raise TornMessage("message.torn", f"connection ended after {len(payload)} of {size} bytes of payload")
        except BaseException:
            _native.discard(fds)
            raise
        return Message(header, payload, fds)

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of `data`, with these descriptors, which stay the caller's. After cancellation the stream is of no
        more use. Raises OSError, trio.ClosedResourceError."""
        lock = self._sending = self._sending or trio.Lock()
        try:
            async with lock:
                view = memoryview(data)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                while view:
                    if self._socket.fileno() < 0:
                        raise trio.ClosedResourceError("the channel was closed")
                    try:
                        view = view[self._socket.sendmsg([view], rights, socket.MSG_DONTWAIT) :]
                        # they have gone with the first byte
                        rights = []
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self._socket)
        finally:
            if not lock.locked() and self._sending is lock:
                self._sending = None

    def send_now(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """As `send`, but at once and without a checkpoint; False when that isn't possible, and nothing was sent.

        For what must not be overtaken by a message that is received meanwhile. Raises OSError: the stream is of no more
        use (a part of `data` may have been sent).
        """
        if self._sending is not None or self._socket.fileno() < 0:
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], rights, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if sent < len(data):
            raise OSError(errno.EMSGSIZE, "only part of a message fits into the socket")
        return True

    @property
    def busy(self) -> bool:
        """Whether somebody is in the middle of `send`."""
        return self._sending is not None

    def hung_up(self) -> bool:
        """Whether the peer has closed the connection and everything it said has been received."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def shutdown(self) -> None:
        """End the connection in both directions: whoever waits in `receive` or `send` is woken."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        """Close our descriptor of the socket; whoever has another one goes on with the connection. Idempotent."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            os.close(self._socket.detach())

    def close(self) -> None:
        """Close the socket. Idempotent.

        Descriptors that the peer sent and nobody has received go with it, and closing those can take as long as the
        peer has arranged; so the native side does it, elsewhere.
        """
        if self._socket.fileno() < 0:
            return
        trio.lowlevel.notify_closing(self._socket)
        self.shutdown()
        _native.discard([self._socket.detach()])
