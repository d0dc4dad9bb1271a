# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The in-process target: a device group of this process, its commands through its in-process administration queues."""

from __future__ import annotations

import os
import select
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from .. import _native
from ..errors import VhuError
from ..vfio_client import VfioClient
from ..virtio_driver import Completion, Framing, PciFunction
from .target import CannotReach, OwnerDriver, Port, Target

__all__ = ["InProcessTarget"]

FunctionKind = Literal["legacy", "transitional", "modern"]

_DISK_SIZE: Final = 1 << 20
_TIMEOUT: Final = 5.0


class InProcessTarget(Target):
    """A group that is made anew for each check, with block members whose functions are served on sockets of its own.

    Commands go through `_native.DeviceGroup.submit`. The owner's PCI function is served, too, for the checks of its
    registers; its driver is another one than the in-process one, with lists and objects of its own.
    """

    def __init__(
        self,
        *,
        strict: bool = True,
        compat: Mapping[str, bool] | None = None,
        members: Sequence[FunctionKind] = ("modern", "transitional"),
        admin_queues: int = 2,
        timeout: float = _TIMEOUT,
    ) -> None:
        """`members`: of which kind the function is that each of members 1, 2... is reached through."""
        self.name = f"in-process group, {'strict' if strict else 'Linux-compatible'}"
        self.owner = None
        self.driver = None
        self._ports: dict[int, Port] = {}
        self.ports = self._ports
        self._strict: Final = strict
        self._compat: Final = dict(compat) if compat else None
        self._kinds: Final = tuple(members)
        self._admin_queues: Final = admin_queues
        self._timeout: Final = timeout
        self._directory: Final = tempfile.TemporaryDirectory(prefix="vhu-conformance-")
        self._pool: Final = _native.Pool(workers=2)
        self._group: _native.DeviceGroup | None = None
        self._members: list[_native.Member] = []
        self._servers: list[_native.VfioUserServer] = []
        self._ended: set[int] = set()
        self._sockets = 0
        self._closed = False
        # Something that isn't the same everywhere, and the same each time.
        self._disk: Final = Path(self._directory.name) / "disk.raw"
        pattern = bytes(i * 167 + (i >> 8) & 0xFF for i in range(1 << 16))
        self._disk.write_bytes(pattern * (_DISK_SIZE // len(pattern)))

    # --- life ---------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        self._tear_down()
        group = self._group = _native.DeviceGroup(
            self._pool, strict=self._strict, admin_queues=self._admin_queues, compat=self._compat
        )
        try:
            owner = _native.Member.owner(
                self._pool,
                group,
                f"ram:{_DISK_SIZE}",
                read_only=False,
                queues=1,
                queue_size=64,
                blk_size=512,
                serial="owner",
                packed=False,
                vectors=None,
            )
            self._members.append(owner)
            kinds = {
                "legacy": _native.Function.legacy,
                "transitional": _native.Function.transitional,
                "modern": _native.Function.modern,
            }
            for number, kind in enumerate(self._kinds, 1):
                # The first is on a file, so that requests take their time; a file has one user.
                image = str(self._disk) if number == 1 else f"ram:{_DISK_SIZE}"
                member = self._blk(number, image)
                self._members.append(member)
                group.add(member)
                self._ports[number] = Port(number, self._serve(kinds[kind](group, member)), self._timeout)
            self.owner = PciFunction(
                VfioClient(self._serve(_native.Function.owner(group, owner)), timeout=self._timeout)
            )
            self.owner.place_bars()
            self.driver = OwnerDriver(self.owner, timeout=self._timeout)
        except ValueError as error:
            raise VhuError(str(error)) from error

    def _blk(self, number: int, image: str) -> _native.Member:
        """A member, once requests of the last one have let go of the image."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return _native.Member.blk(self._pool, number, image, queues=2, queue_size=64)
            except _native.ImageError as error:
                if time.monotonic() > deadline:
                    raise VhuError(str(error)) from error
                self._events(0.005)

    def _serve(self, function: _native.Function) -> Path:
        self._sockets += 1
        path = Path(self._directory.name) / f"{self._sockets}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(path))
        listener.listen()
        self._servers.append(_native.VfioUserServer(self._pool, function, listener.detach()))
        return path

    def _tear_down(self) -> None:
        if self.driver is not None:
            self.driver.close()
        if self.owner is not None:
            self.owner.close()
        for port in self._ports.values():
            port.close()
        self._ports.clear()
        self.owner = None
        self.driver = None
        for token in [server.close() for server in self._servers]:
            if token is not None:
                self._wait(token)
        self._servers.clear()
        if self._group is not None:
            self._group.close()
            self._group = None
        deadline = time.monotonic() + self._timeout
        while self._members:
            try:
                self._members[-1].close()
            except _native.BusyError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"member {self._members[-1].id} doesn't come to rest") from None
                self._events(0.01)
                continue
            self._members.pop()

    def lost(self) -> None:
        """Nothing: `restore` makes everything anew in any case."""

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(VhuError, OSError):
            self._tear_down()
        self._pool.close()
        self._directory.cleanup()

    # --- events -------------------------------------------------------------------------------------------------

    def _events(self, timeout: float) -> None:
        select.select([self._pool.event_fd()], [], [], timeout)
        for kind, _member, data in self._pool.take_events():
            if kind == "done":
                self._ended.add(data["token"])

    def _wait(self, token: int) -> None:
        """Until a token's work has ended. Raises TimeoutError."""
        deadline = time.monotonic() + self._timeout
        while token not in self._ended:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"token {token} hasn't ended within {self._timeout} s")
            self._events(left)
        self._ended.discard(token)

    # --- commands -----------------------------------------------------------------------------------------------

    @property
    def group(self) -> _native.DeviceGroup:
        """The group of the moment. Raises CannotReach before the first `restore`."""
        if self._group is None:
            raise CannotReach("there is no group yet")
        return self._group

    @property
    def queues(self) -> int:
        return self._admin_queues

    def raw_many(
        self, commands: Sequence[tuple[bytes, int]], *, queues: Sequence[int] = (0,), framing: Framing | None = None
    ) -> list[Completion]:
        """`framing` has no effect: the in-process driver's descriptors are its own business."""
        started = [
            self.group.submit(queues[i % len(queues)], readable, writable)
            for i, (readable, writable) in enumerate(commands)
        ]
        done: list[Completion] = []
        for token, written in started:
            if written is None:
                self._wait(token)
                written = self.group.result(token)
            done.append(Completion(len(written), written, whole=False))
        return done

    def reset_owner(self) -> None:
        self.group.reset()

    def vfs(self) -> tuple[bool, int]:
        info = self.group.info()
        return bool(info["vf_enable"]), int(info["num_vfs"])

    def set_vfs(self, *, enable: bool | None = None, number: int | None = None) -> None:
        self.group.set_vfs(enable=enable, num_vfs=number)
