# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Fixtures: a group with virtio-vhost-user devices, and both sides of each."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest

from tests.conftest import GroupFactory, RunningGroup
from tests.frontend import TIMEOUT, Connection, ConnectionLost, R, wait_until
from tests.vvu.peers import Master, PciSlave, QemuSlave, Slave, exchange
from vhu_legacy.rundir import device_socket_name
from vhu_legacy.vfio_client import Disconnected

QUEUES: Final = 4
SHARED: Final = 16 << 20
UUID: Final = uuid.UUID("6e2f1d3a-5b84-4c07-9a51-0f3c7d9e8b21")
RAM_SIZE: Final = 4 << 20


CONFIG: Final = f"""
    [group]
    name = "vvu"

    [[members]]
    type = "blk"
    image = "null:1MiB"

    [[vhost_user_devices]]
    name = "tested"
    max_queues = {QUEUES}
    shared_memory = "{SHARED >> 20}MiB"
    uuid = "{UUID}"
    vfio_user = true

    [[vhost_user_devices]]
    name = "new-vhost-user"
    max_queues = {QUEUES}
    shared_memory = "{SHARED >> 20}MiB"

    [[vhost_user_devices]]
    name = "new-vfio-user"
    max_queues = {QUEUES}
    shared_memory = "{SHARED >> 20}MiB"
    vfio_user = true

    [[vhost_user_devices]]
    name = "beside"
    max_queues = {QUEUES}
    shared_memory = "{SHARED >> 20}MiB"
    vfio_user = true

    [[vhost_user_devices]]
    name = "ram"
    max_queues = {QUEUES}
    shared_memory = "{SHARED >> 20}MiB"
    vfio_user = true
    ram_file = "ram"
    ram_size = "{RAM_SIZE >> 20}MiB"
"""


class Rig:
    """A group with a device to be tested, one that works beside it, and one with a RAM file."""

    def __init__(self, group: RunningGroup) -> None:
        self.group: Final = group
        self.ram: Final = group.directory / "ram"

    def query(self, name: str) -> dict[str, Any]:
        """`query-vhost-user-devices`, of one device."""
        for device in self.group.execute("query-vhost-user-devices"):
            if device["name"] == name:
                assert isinstance(device, dict)
                return device
        raise KeyError(name)

    def descriptors(self) -> int:
        """Open descriptors of the process, but for the listeners for masters: those come and go with the slaves."""
        return self.group.open_fds() - sum(self.path(name, "front").exists() for name in ("tested", "beside", "ram"))

    def path(self, name: str, kind: str) -> Path:
        """Of "vhost-user", "vfio-user" or "front"."""
        return self.group.directory / "run" / device_socket_name(name, kind)


class Device:
    """A device of the group, with those who were connected to it in a test."""

    def __init__(self, rig: Rig, name: str, carrier: str) -> None:
        self.rig: Final = rig
        self.name: Final = name
        self.carrier: Final = carrier
        self._stack: Final = ExitStack()
        self.slave: Slave

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def query(self) -> dict[str, Any]:
        return self.rig.query(self.name)

    def power_on(self, **options: Any) -> Slave:
        """A backend VM with a driver that has done nothing yet."""
        path = self.rig.path(self.name, self.carrier)
        kind: Callable[..., Slave] = QemuSlave if self.carrier == "vhost-user" else PciSlave
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self.slave = self._stack.enter_context(kind(path, QUEUES, **options))
            except (Disconnected, ConnectionLost):
                # its predecessor's end isn't noticed yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return self.slave

    def boot(self, **options: Any) -> Slave:
        """A backend VM that is ready for a master."""
        return self.power_on(**options).start().up()

    def master(self) -> Master:
        """One that comes again until there is a listener, as QEMU does with `reconnect-ms`."""
        path = self.rig.path(self.name, "front")
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                return self._stack.enter_context(Master(path))
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise AssertionError(f"no listener for {TIMEOUT} s: {self.query()}") from None
                time.sleep(0.005)

    def connect(self) -> Master:
        """A master whose connection the driver knows of."""
        self.slave.config_changes(0)
        master = self.master()
        assert self.slave.config_changes()
        self.slave.wait_status(3)
        return master

    @property
    def last_rule(self) -> str | None:
        """What the last session ended for."""
        error = self.query()["last-error"]
        return None if error is None else str(error["rule"])

    @property
    def broken_rule(self) -> str | None:
        """What the driver has broken."""
        error = self.query()["broken"]
        return None if error is None else str(error["rule"])

    def wait_rule(self, rule: str) -> None:
        wait_until(lambda: self.last_rule is not None, what=f"{rule} of {self.name}")
        assert self.last_rule == rule, self.query()["last-error"]

    def wait_broken(self, rule: str) -> None:
        wait_until(lambda: self.broken_rule is not None, what=f"{rule} of {self.name}")
        assert self.broken_rule == rule, self.query()["broken"]

    def works(self, master: Connection | None = None) -> None:
        """Both directions, whatever was before."""
        if master is None:
            self.slave.wait_status(0)
            self.slave.up()
            master = self.master()
        exchange(master, self.slave, R.GET_FEATURES, b"", 0x1_4000_0000)


@pytest.fixture(scope="module")
def rig(start_module_group: GroupFactory) -> Rig:
    return Rig(start_module_group(CONFIG))


@pytest.fixture(params=["vhost-user", "vfio-user"])
def device(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Device]:
    """A device on either carrier."""
    with Device(rig, "tested", request.param) as device:
        yield device


@pytest.fixture(params=["vhost-user", "vfio-user"])
def new_device(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Device]:
    """One whose slave has never been up: for a single test of each module."""
    with Device(rig, f"new-{request.param}", request.param) as device:
        yield device


@pytest.fixture
def qemu_device(rig: Rig) -> Iterator[Device]:
    """On carrier (a) only."""
    with Device(rig, "tested", "vhost-user") as device:
        yield device


@pytest.fixture
def pci_device(rig: Rig) -> Iterator[Device]:
    """On carrier (b) only."""
    with Device(rig, "tested", "vfio-user") as device:
        yield device


@pytest.fixture
def ram_device(rig: Rig) -> Iterator[Device]:
    """On carrier (b), with the master's memory known from the start."""
    with Device(rig, "ram", "vfio-user") as device:
        yield device
