# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A vhost-user connection as a trio object: whole messages with their file descriptors.

Messages are read in two steps, header and payload, each to its exact length. Reading on beyond a message would save a
system call, but file descriptors travel with the byte they were sent at: whoever reads two messages at a time can't
tell whose descriptors came along.
"""

from __future__ import annotations

import array
import contextlib
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

    def __init__(self, sock: trio.socket.SocketType, *, patience: float = 5.0) -> None:
        self._socket: Final = sock
        self._patience: Final = patience
        self._send_lock: Final = trio.Lock()

    @classmethod
    def from_fd(cls, fd: int, *, patience: float = 5.0) -> Self:
        """Take over the fd of a connected socket. Raises OSError; the fd is closed then."""
        try:
            sock = socket.socket(fileno=fd)
        except BaseException:
            os.close(fd)
            raise
        sock.setblocking(False)
        return cls(trio.socket.from_stdlib_socket(sock), patience=patience)

    def peer_pid(self) -> int | None:
        """Process id of the peer at connection time, None when the kernel doesn't say."""
        with contextlib.suppress(OSError):
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int.from_bytes(credentials[:4], "little", signed=True) or None
        return None

    async def _receive(self, size: int, fds: list[int]) -> bytes:
        """Exactly `size` bytes, fewer only at the end of the stream. Descriptors are appended to `fds` at once."""
        data = b""
        while len(data) < size:
            chunk, ancillary, flags, _ = await self._socket.recvmsg(
                size - len(data), _ANCILLARY, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    numbers = array.array("i")
                    numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                    fds.extend(numbers)
            if flags & socket.MSG_CTRUNC or len(fds) > _MAX_FDS:
                raise TornMessage("message.fds", f"more than {_MAX_FDS} file descriptors with one message")
            if not chunk:
                break
            data += chunk
        return data

    async def readable(self) -> None:
        """Wait until there is something to receive, the end included. Nothing is taken.

        Raises trio.ClosedResourceError.
        """
        await trio.lowlevel.wait_readable(self._socket)

    def fileno(self) -> int:
        """The socket's descriptor; it stays ours."""
        return self._socket.fileno()

    async def receive(self) -> Message:
        """The next message.

        Raises:
            ConnectionEnd: the peer closed the connection.
            TornMessage: half a message, then the end or silence.
            _native.ProtocolError: the header makes no sense.
            OSError: the connection broke.

        When cancelled, or when it raises, descriptors received so far are closed and the stream is of no more use.
        """
        fds: list[int] = []
        try:
            # The bound starts with the first byte, so wait for that without one.
            first = await self._receive(1, fds)
            if not first:
                raise ConnectionEnd
            with trio.move_on_after(self._patience) as scope:
                header = first + await self._receive(_HEADER - 1, fds)
                if len(header) < _HEADER:
                    raise TornMessage("message.torn", f"connection ended after {len(header)} bytes of a header")
                size = _native.Session.payload_size(header)
                payload = await self._receive(size, fds)
                if len(payload) < size:
                    raise TornMessage(
                        "message.torn", f"connection ended after {len(payload)} of {size} bytes of payload"
                    )
            if scope.cancelled_caught:
                raise TornMessage("message.silence", f"half a message, then {self._patience:g} s of silence")
        except BaseException:
            _native.discard(fds)
            raise
        return Message(header, payload, fds)

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of `data`, with these descriptors, which stay the caller's. Raises OSError. After cancellation the
        stream is of no more use."""
        async with self._send_lock:
            view = memoryview(data)
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                view = view[await self._socket.sendmsg([view], rights, socket.MSG_DONTWAIT) :]
            while view:
                view = view[await self._socket.send(view, socket.MSG_DONTWAIT) :]

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
