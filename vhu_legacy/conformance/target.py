# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What is tested: an owner with its administration queue, and its members as far as they can be reached.

`Target` is all that checks know. `VfioTarget` drives the owner as a PCI function over vfio-user; the in-process one is
in `native`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from .. import pci
from ..admin import RESULT_HEADER_SIZE, Command, GroupType, Opcode, opcodes_in
from ..errors import VhuError
from ..vfio_client import Disconnected, VfioClient
from ..virtio_driver import (
    AdminQueue,
    BarRegisters,
    Completion,
    DriverError,
    Feature,
    Framing,
    GuestMemory,
    ModernDevice,
    PciFunction,
    Pending,
    RingFull,
    mask,
)

__all__ = ["CannotReach", "OwnerDriver", "Port", "Target", "VfioTarget", "connect"]

TIMEOUT: Final = 5.0
_PATIENCE: Final = 2.0
"""Seconds until a function that hangs up on us is said to be in use."""
_ADMIN_QUEUES: Final = 4
"""As many of the owner's are used at most."""
_QUEUE_SIZE: Final = 256


class CannotReach(VhuError):
    """The target has no such thing: no SR-IOV control, no function of that member, no queue of that number."""


def connect(path: Path, timeout: float = TIMEOUT) -> VfioClient:
    """A client of a function whose last client may still be on its way out. Raises VfioError, TimeoutError."""
    deadline = time.monotonic() + min(timeout, _PATIENCE)
    while True:
        try:
            return VfioClient(path, timeout=timeout)
        except Disconnected as error:
            # Nobody listens there: nothing to wait for.
            nobody = isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError | PermissionError)
            if nobody or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


class OwnerDriver:
    """The driver of the owner: a modern virtio PCI driver that uses its administration virtqueues only."""

    def __init__(
        self,
        function: PciFunction,
        *,
        interrupts: Literal["msix", "intx", "poll"] = "msix",
        packed: bool = False,
        framing: Framing | None = None,
        shared: bool = True,
        timeout: float = TIMEOUT,
    ) -> None:
        """`shared`: whether the device gets its memory's fd. Raises DriverError, VfioError."""
        self.function: Final = function
        self.device: Final = ModernDevice(function, timeout=timeout)
        self.queues: list[AdminQueue] = []
        self._interrupts: Final = interrupts
        self._packed: Final = packed
        self._framing: Final = framing or Framing.linux()
        self.memory: Final = GuestMemory(8 << 20, shared=shared)
        self.memory.attach(function.client)

    def start(self, *, driver_ok: bool = True) -> None:
        """From reset to DRIVER_OK, with rings for the administration queues; `driver_ok=False`: up to just before it.

        Raises DriverError for a device without ADMIN_VQ, and for what breaks the rules on the way.
        """
        function, device = self.function, self.device
        self.queues = []
        device.reset()
        function.disable_msix()
        function.disable_intx()
        self.memory.clear()
        function.enable()
        features = mask(Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.SR_IOV, Feature.ADMIN_VQ)
        if self._packed:
            features |= mask(Feature.RING_PACKED)
        device.negotiate(features)
        if not device.has(Feature.ADMIN_VQ):
            raise DriverError("the owner doesn't offer ADMIN_VQ")
        if self._packed and not device.has(Feature.RING_PACKED):
            raise DriverError("the owner doesn't offer RING_PACKED")
        indices = device.admin_queues
        if not indices:
            raise DriverError("the owner has no administration queue: admin_queue_num is 0")
        vectors = 0
        if self._interrupts == "msix" and function.msix is not None:
            vectors = function.enable_msix(1 + min(len(indices), _ADMIN_QUEUES))
        elif self._interrupts == "intx" and not function.enable_intx():
            raise DriverError("the owner has no INTx")
        for number, index in enumerate(indices[:_ADMIN_QUEUES]):
            # As Linux: one vector each as long as there are any; then all share the first.
            vector = None if vectors == 0 else number + 1 if number + 1 < vectors else 0
            size = min(device.select(index).size, _QUEUE_SIZE)
            self.queues.append(AdminQueue(device.setup_queue(index, self.memory, size, vector), self._framing))
        if driver_ok:
            device.driver_ok()

    def stop(self) -> None:
        """Reset the device and let go of its interrupts."""
        self.device.reset()
        self.queues = []
        self.function.disable_msix()
        self.function.disable_intx()

    def close(self) -> None:
        """Let go of everything of its own; the function stays open. Idempotent."""
        self.memory.close()


class Port:
    """A member's own PCI function: its memory, its interrupts, and whatever registers it has."""

    def __init__(self, number: int, path: Path, timeout: float = TIMEOUT, *, shared: bool = True) -> None:
        """`shared`: whether the device gets its memory's fd.

        Raises DriverError, VfioError, TimeoutError.
        """
        self.number: Final = number
        self.function: Final = PciFunction(connect(path, timeout))
        try:
            self.function.place_bars()
            self.function.enable()
            self.memory: Final = GuestMemory(8 << 20, shared=shared)
            self.memory.attach(self.function.client)
            self.modern: Final = ModernDevice(self.function, timeout=timeout) if self.function.virtio else None
            bar = self.function.bars.get(0)
            self.bar0: Final = BarRegisters(self.function) if bar is not None and bar.kind == "io" else None
        except BaseException:
            self.close()
            raise

    @property
    def virtio_id(self) -> int | None:
        return self.function.identity.virtio_id

    def reset(self) -> None:
        """As after a function level reset: registers at their defaults, MSI-X off, memory empty."""
        self.function.disable_msix()
        self.function.disable_intx()
        self.function.client.reset()
        self.function.place_bars()
        self.function.enable()
        self.memory.clear()

    def close(self) -> None:
        """Idempotent."""
        self.function.close()
        if hasattr(self, "memory"):
            self.memory.close()


class Target(ABC):
    """An owner and its members, and what can be done to them."""

    name: str
    ports: Mapping[int, Port]
    """Members' own functions, by member number."""
    owner: PciFunction | None
    """The owner's PCI function."""
    driver: OwnerDriver | None
    """The owner's driver, which may not have been started."""

    @abstractmethod
    def restore(self) -> None:
        """Bring everything into the state that a check starts from: owner and members just reset, VFs enabled.

        Raises VhuError, OSError.
        """

    @abstractmethod
    def lost(self) -> None:
        """What was open is of no more use: `restore` has to begin anew."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""

    @property
    @abstractmethod
    def queues(self) -> int:
        """How many administration queues can be used."""

    @abstractmethod
    def raw_many(
        self, commands: Sequence[tuple[bytes, int]], *, queues: Sequence[int] = (0,), framing: Framing | None = None
    ) -> list[Completion]:
        """Put commands (readable part, bytes of the writable part) on administration queues, all before the first is
        waited for; the i-th on queue `queues[i % len(queues)]`. Completions in the order of the commands.

        Raises TimeoutError when one doesn't come back.
        """

    def raw(self, readable: bytes, writable: int, *, framing: Framing | None = None) -> Completion:
        """One command, its parts as they are."""
        return self.raw_many([(readable, writable)], framing=framing)[0]

    def admin(
        self,
        opcode: int,
        group: int,
        member: int = 0,
        data: bytes = b"",
        result_size: int = 0,
        *,
        framing: Framing | None = None,
    ) -> Completion:
        """One command, with room for so many bytes of command_specific_result."""
        return self.raw(Command(opcode, group, member, data).pack(), RESULT_HEADER_SIZE + result_size, framing=framing)

    @abstractmethod
    def reset_owner(self) -> None:
        """A virtio reset of the owner; its administration queues can be used afterwards.

        Raises CannotReach where there is none.
        """

    @abstractmethod
    def vfs(self) -> tuple[bool, int]:
        """VF Enable and NumVFs. Raises CannotReach."""

    @abstractmethod
    def set_vfs(self, *, enable: bool | None = None, number: int | None = None) -> None:
        """As a write to the SR-IOV capability; NumVFs first. Raises CannotReach."""

    def settle(self) -> None:
        """Let members go on that are stopped, and reset the first of them and those with a port of their own.

        Modes survive resets, so this takes commands. What the device refuses is left alone: the checks will tell.
        """
        listed = self.admin(Opcode.LIST_QUERY, GroupType.SR_IOV, result_size=8)
        if listed.status:
            return
        opcodes = opcodes_in(listed.result)
        self.admin(Opcode.LIST_USE, GroupType.SR_IOV, data=listed.result)
        for member in {1, *self.ports}:
            if Opcode.DEV_MODE_SET in opcodes:
                self.admin(Opcode.DEV_MODE_SET, GroupType.SR_IOV, member, b"\0")
            if Opcode.LEGACY_COMMON_CFG_WRITE in opcodes:
                self.admin(Opcode.LEGACY_COMMON_CFG_WRITE, GroupType.SR_IOV, member, b"\x12" + bytes(8))


class VfioTarget(Target):
    """An owner behind a vfio-user socket, and members behind theirs."""

    def __init__(
        self,
        owner: Path,
        members: Mapping[int, Path] | None = None,
        *,
        interrupts: Literal["msix", "intx", "poll"] = "msix",
        packed: bool = False,
        framing: Framing | None = None,
        shared: bool = True,
        timeout: float = TIMEOUT,
    ) -> None:
        """Connects to nothing yet: `restore` does.

        `shared`: whether the devices get the fd of guest memory; otherwise they have to ask for each access.
        """
        self.name = f"vfio-user owner {owner}"
        self.owner = None
        self.driver = None
        self._ports: dict[int, Port] = {}
        self.ports = self._ports
        self._path: Final = owner
        self._member_paths: Final = dict(members or {})
        self._interrupts: Final = interrupts
        self._packed: Final = packed
        self._framing: Final = framing
        self._shared: Final = shared
        self._timeout: Final = timeout
        self._vfs_before: tuple[int, int] | None = None

    def _open(self) -> None:
        if self.owner is None:
            self.owner = PciFunction(connect(self._path, self._timeout))
            self.owner.place_bars()
            if self.owner.sriov is not None and self._vfs_before is None:
                self._vfs_before = (self.owner.sriov.control, self.owner.sriov.num_vfs)
            self.driver = OwnerDriver(
                self.owner,
                interrupts=self._interrupts,
                packed=self._packed,
                framing=self._framing,
                shared=self._shared,
                timeout=self._timeout,
            )
        for number, path in self._member_paths.items():
            if number not in self._ports:
                self._ports[number] = Port(number, path, self._timeout, shared=self._shared)

    @property
    def _driver(self) -> OwnerDriver:
        if self.driver is None:
            raise CannotReach("the owner isn't connected")
        return self.driver

    def restore(self) -> None:
        self._open()
        driver = self._driver
        driver.start()
        if self.owner is not None and self.owner.sriov is not None and self._vfs_before is not None:
            # As many VFs as there were; all that there can be if there were none.
            number = self._vfs_before[1] or self.owner.sriov.total_vfs
            if self.vfs() != (True, number):
                self.set_vfs(enable=True, number=number)
        self.settle()
        for port in self._ports.values():
            port.reset()
        driver.start()

    def lost(self) -> None:
        """Hang up everywhere."""
        if self.driver is not None:
            self.driver.close()
        if self.owner is not None:
            self.owner.close()
        for port in self._ports.values():
            port.close()
        self._ports.clear()
        self.owner = None
        self.driver = None

    def close(self) -> None:
        with suppress(VhuError, OSError):
            if self.driver is not None:
                self.driver.stop()
            if self.owner is not None and self.owner.sriov is not None and self._vfs_before is not None:
                control, number = self._vfs_before
                if self.vfs() != (bool(control & pci.SRIOV_VF_ENABLE), number):
                    self.set_vfs(enable=bool(control & pci.SRIOV_VF_ENABLE), number=number)
        self.lost()

    @property
    def queues(self) -> int:
        return len(self._driver.queues)

    def raw_many(
        self, commands: Sequence[tuple[bytes, int]], *, queues: Sequence[int] = (0,), framing: Framing | None = None
    ) -> list[Completion]:
        driver = self._driver
        if any(number >= len(driver.queues) for number in queues):
            raise CannotReach(f"the owner's driver has {len(driver.queues)} administration queues")
        with driver.memory.borrowed():
            used = [driver.queues[queues[i % len(queues)]] for i in range(len(commands))]
            started: list[Pending] = []
            done: list[Completion] = []

            def start(queue: AdminQueue, readable: bytes, writable: int) -> Pending:
                while True:
                    try:
                        return queue.start(readable, writable, framing, kick=False)
                    except RingFull:
                        # As any driver: what is there goes off, and the first of it comes back.
                        for number in set(queues):
                            driver.queues[number].queue.kick()
                        if len(done) == len(started):
                            raise
                        done.append(used[len(done)].finish(started[len(done)]))

            for queue, (readable, writable) in zip(used, commands, strict=True):
                started.append(start(queue, readable, writable))
            for number in sorted(set(queues)):
                driver.queues[number].queue.kick()
            rest = zip(used[len(done) :], started[len(done) :], strict=True)
            return done + [queue.finish(pending) for queue, pending in rest]

    def reset_owner(self) -> None:
        self._driver.start()

    def _sriov(self) -> tuple[PciFunction, pci.SrIov]:
        if self.owner is None or self.owner.sriov is None:
            raise CannotReach("the owner has no SR-IOV capability")
        return self.owner, self.owner.sriov

    def vfs(self) -> tuple[bool, int]:
        owner, sriov = self._sriov()
        control = owner.config_read(sriov.offset + pci.SrIovRegister.CONTROL, 2)
        return bool(control & pci.SRIOV_VF_ENABLE), owner.config_read(sriov.offset + pci.SrIovRegister.NUM_VFS, 2)

    def set_vfs(self, *, enable: bool | None = None, number: int | None = None) -> None:
        owner, sriov = self._sriov()
        at = sriov.offset + pci.SrIovRegister.CONTROL
        enabled, current = self.vfs()
        if number is not None and number != current:
            # NumVFs may only change while VF Enable is clear.
            owner.config_write(at, 2, 0)
            owner.config_write(sriov.offset + pci.SrIovRegister.NUM_VFS, 2, number)
        wanted = enabled if enable is None else enable
        owner.config_write(at, 2, pci.SRIOV_VF_ENABLE | pci.SRIOV_VF_MEMORY if wanted else 0)
        if self.vfs() != (wanted, current if number is None else number):
            raise DriverError(f"VF Enable and NumVFs read {self.vfs()} after being set")
