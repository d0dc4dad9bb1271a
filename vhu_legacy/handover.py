# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Handing a running group over to a new process: what the two say to each other.

They are connected by a socket pair and speak frames: lengths, a JSON object, and file descriptors. What a frame means
is the business of `upgrade`. A member travels with its listening socket, its image, and its front end's connection; the
state of the connection travels as the vhost-user messages that lead to it, so the format is the protocol's and stays
what it is from one version to the next. The group's configuration travels, too: what the group file says now is for the
next start.

Both processes belong to one user and one of them has started the other, so neither defends itself against the other;
but a version that sends nonsense must be an error, not an accident.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from .backend import Held, HeldConnection
from .channel import Message
from .config import CompatConfig, GroupConfig, MemberConfig, OwnerConfig, VhostUserDeviceConfig
from .errors import GroupError

__all__ = ["FORMAT", "Frame", "MemberParcel", "Pipe", "close_all", "group_data", "group_of", "held_frame", "held_of"]

T = TypeVar("T")

FORMAT: Final = 1
"""Of the frames. A successor that speaks another one is refused before anything has been changed."""
_HEADER: Final = struct.Struct("<II")
_MAX_FRAME: Final = 64 << 20
_MAX_FDS: Final = 8192
_BATCH: Final = 200
"""Descriptors with one sendmsg; the kernel takes 253."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. The descriptors belong to whoever holds this."""

    kind: str
    data: dict[str, Any]
    fds: list[int]


class Pipe:
    """One end of the connection between a process and its successor."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket: Final = trio.socket.from_stdlib_socket(sock)
        self.torn = False
        """Part of a frame was sent or received, and the rest never will be: nothing more can be said."""

    @classmethod
    def from_fd(cls, fd: int) -> Pipe:
        """The end that this process was started with. Raises GroupError when it is none."""
        try:
            return cls(socket.socket(fileno=fd))
        except OSError as error:
            raise GroupError(f"there is no predecessor at descriptor {fd}: {error.strerror or error}") from error

    async def send(self, kind: str, data: dict[str, Any] | None = None, fds: Sequence[int] = ()) -> None:
        """Send a frame; the descriptors stay the caller's. Raises GroupError when the other side is gone."""
        payload = json.dumps({"kind": kind, **(data or {})}).encode()
        self._begin()
        try:
            await self._send_all(_HEADER.pack(len(payload), len(fds)) + payload)
            for first in range(0, len(fds), _BATCH):
                rights = array.array("i", fds[first : first + _BATCH])
                # a byte to carry them; a stream socket sends it as a whole or not at all
                await self._socket.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            self.torn = False
        except OSError as error:
            raise GroupError(f"the other process is gone: {error.strerror or error}") from error

    def _begin(self) -> None:
        if self.torn:
            raise GroupError("the other process was left in the middle of a frame")
        self.torn = True

    async def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self._socket.send(view) :]

    async def receive(self, *kinds: str) -> Frame:
        """The next frame, which must be of one of these kinds. "error" may always come, and is raised if not asked for.

        Raises GroupError, also when the other side is gone or sends nonsense. When cancelled, descriptors received so
        far are closed; in the middle of a frame the pipe is `torn` then.
        """
        fds: list[int] = []
        # waiting for a frame tears nothing
        await trio.lowlevel.wait_readable(self._socket)
        self._begin()
        try:
            size, count = _HEADER.unpack(await self._receive_all(_HEADER.size))
            if size > _MAX_FRAME or count > _MAX_FDS:
                raise GroupError(f"the other process sends a frame of {size} bytes and {count} descriptors")
            data = json.loads(await self._receive_all(size))
            for first in range(0, count, _BATCH):
                await self._receive_fds(min(_BATCH, count - first), fds)
        except (OSError, ValueError) as error:
            close_all(fds)
            gone = isinstance(error, ConnectionError)
            raise GroupError("the other process is gone" if gone else f"the other process: {error}") from error
        except BaseException:
            close_all(fds)
            raise
        self.torn = False
        kind = data.pop("kind", None) if isinstance(data, dict) else None
        if kind == "error" and kind not in kinds:
            close_all(fds)
            raise GroupError(str(data.get("reason")))
        if kind not in kinds:
            close_all(fds)
            raise GroupError(f"the other process sends {kind!r}; expected: {', '.join(kinds)}")
        return Frame(kind, data, fds)

    async def _receive_all(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = await self._socket.recv(min(size - len(data), 1 << 20))
            if not chunk:
                raise GroupError("the other process is gone")
            data += chunk
        return bytes(data)

    async def _receive_fds(self, count: int, fds: list[int]) -> None:
        space = socket.CMSG_SPACE(count * array.array("i").itemsize)
        data, ancillary, flags, _ = await self._socket.recvmsg(1, space, socket.MSG_CMSG_CLOEXEC)
        before = len(fds)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                fds.extend(numbers)
        if not data:
            raise GroupError("the other process is gone")
        if flags & socket.MSG_CTRUNC or len(fds) - before != count:
            raise GroupError(f"{count} descriptors were sent, {len(fds) - before} came: too many open files?")

    def close(self) -> None:
        """Close this end. Idempotent."""
        self._socket.close()


def group_data(config: GroupConfig) -> dict[str, Any]:
    """A group's configuration as data of a frame: what JSON has."""
    data = {**asdict(config), "source": str(config.source), "run_dir": str(config.run_dir) if config.run_dir else None}
    if not config.vhost_user_devices:
        # a version that has never heard of them takes over a group that has none
        del data["vhost_user_devices"]
        return data
    for device in data["vhost_user_devices"]:
        device["uuid"] = device["uuid"].hex()
        device["ram_file"] = str(device["ram_file"]) if device["ram_file"] else None
    return data


def group_of(data: Any) -> GroupConfig:
    """The opposite. Raises GroupError."""
    try:
        run_dir, owner, compat = data["run_dir"], data["owner"], data["compat"]
        converted = {
            "source": Path(data["source"]),
            "run_dir": None if run_dir is None else Path(run_dir),
            "owner": None if owner is None else _made(OwnerConfig, owner),
            "compat": None if compat is None else _made(CompatConfig, compat),
            "members": tuple(_made(MemberConfig, member) for member in data["members"]),
            "vhost_user_devices": tuple(_device_of(device) for device in data.get("vhost_user_devices", ())),
        }
        return _made(GroupConfig, {**data, **converted})
    except (KeyError, TypeError, ValueError) as error:
        raise GroupError(f"the other process describes its group in an unknown way: {error!r}") from error


def _device_of(data: dict[str, Any]) -> VhostUserDeviceConfig:
    ram_file = data["ram_file"]
    converted = {"uuid": bytes.fromhex(data["uuid"]), "ram_file": None if ram_file is None else Path(ram_file)}
    return _made(VhostUserDeviceConfig, {**data, **converted})


def _made(kind: type[T], values: dict[str, Any]) -> T:
    unknown = set(values) - {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        # written by a newer version: what it means is not ours to guess
        raise GroupError(f"the other process has {', '.join(sorted(unknown))}, which isn't known here")
    return kind(**values)


@dataclass(slots=True)
class MemberParcel:
    """A member on its way: what doesn't change while it runs."""

    config: MemberConfig
    features: int | None
    """Feature bits assigned to it; None for all."""
    listener: int
    image: int | None

    def frame(self) -> tuple[dict[str, Any], list[int]]:
        """As data and descriptors of a frame."""
        data = {"config": asdict(self.config), "features": self.features, "image": self.image is not None}
        return data, [self.listener, *([] if self.image is None else [self.image])]

    @classmethod
    def of(cls, frame: Frame) -> MemberParcel:
        """From a frame, whose descriptors it takes over. Raises GroupError; they are closed then."""
        try:
            config = _made(MemberConfig, frame.data["config"])
            listener, *rest = frame.fds
            (image,) = rest if frame.data["image"] else (None,)
            return cls(config, frame.data["features"], listener, image)
        except (KeyError, TypeError, ValueError) as error:
            close_all(frame.fds)
            raise GroupError(f"the other process describes a member in an unknown way: {error!r}") from error
        except BaseException:
            close_all(frame.fds)
            raise


def held_frame(held: Held) -> tuple[dict[str, Any], list[int]]:
    """A member's sockets as data and descriptors of a frame."""
    connection = held.connection
    if connection is None:
        return {"connection": None}, list(held.unattached)
    fds = [connection.connection, *([] if connection.reverse is None else [connection.reverse])]
    parts = []
    for messages in (connection.state, connection.rings):
        parts.append([(message.header.hex(), message.payload.hex(), len(message.fds)) for message in messages])
        for message in messages:
            fds += message.fds
    described = {
        "reverse": connection.reverse is not None,
        "config_read": connection.config_read,
        "config_pending": connection.config_pending,
        "state": parts[0],
        "rings": parts[1],
    }
    return {"connection": described}, [*fds, *held.unattached]


def held_of(frame: Frame) -> Held:
    """From a frame, whose descriptors it takes over. Raises GroupError; they are closed then."""
    try:
        rest = iter(frame.fds)
        data = frame.data["connection"]
        if data is None:
            return Held(None, list(rest))
        connection = next(rest)
        reverse = next(rest) if data["reverse"] else None
        parts = [
            [
                Message(bytes.fromhex(header), bytes.fromhex(payload), [next(rest) for _ in range(count)])
                for header, payload, count in data[name]
            ]
            for name in ("state", "rings")
        ]
        held = HeldConnection(connection, reverse, bool(data["config_read"]), bool(data["config_pending"]), *parts)
        return Held(held, list(rest))
    except (KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        close_all(frame.fds)
        raise GroupError(f"the other process describes a connection in an unknown way: {error!r}") from error


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors of our own side."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
