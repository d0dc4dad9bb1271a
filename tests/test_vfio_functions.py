# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The PCI functions of a group, driven as guests do: every kind, ring format and interrupt, with checked I/O."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import pytest

from tests.conftest import GroupFactory, RunningGroup
from vhu_legacy import pci
from vhu_legacy.vfio_client import Disconnected, IrqIndex, RegionIndex, VfioClient
from vhu_legacy.virtio_driver import (
    PAGE,
    BarRegisters,
    BlkDriver,
    BlkType,
    Common,
    Feature,
    GuestMemory,
    Legacy,
    LegacyDevice,
    ModernDevice,
    PciFunction,
    Status,
    mask,
    take_events,
)

Kind = Literal["owner", "legacy", "transitional", "modern"]
Interrupts = Literal["msix", "shared", "intx", "poll"]

CONFIG: Final = """
    [group]
    name = "functions"

    [owner]
    type = "blk"
    image = "ram:1MiB"
    queues = 2
    vfio_user = true
    packed = true
    serial = "the owner"

    [[members]]
    count = 2
    type = "blk"
    image = "ram:1MiB"
    queues = 2
    queue_size = 128
    vfio_user = true
    packed = true
    serial = "member {n}"

    [[members]]
    type = "blk"
    image = "ram:1MiB"
    vfio_user = true
    vectors = 0
"""

WITHOUT_MSIX: Final = 3


@pytest.fixture(scope="module")
def group(start_module_group: GroupFactory) -> RunningGroup:
    return start_module_group(CONFIG)


def path_of(group: RunningGroup, kind: Kind, member: int = 1) -> Path:
    name = "owner" if kind == "owner" else f"member-{member}.{kind}"
    return group.directory / "run" / f"{name}.vfio-user.sock"


@contextmanager
def function_of(
    group: RunningGroup, kind: Kind, member: int = 1, *, shared: bool = True
) -> Iterator[tuple[PciFunction, GuestMemory]]:
    """A function with memory, enabled; its last client may still be on its way out."""
    deadline = time.monotonic() + 5
    while True:
        try:
            client = VfioClient(path_of(group, kind, member))
            break
        except Disconnected:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    memory = GuestMemory(shared=shared)
    with PciFunction(client) as function:
        function.place_bars()
        function.enable()
        memory.attach(client)
        yield function, memory
    memory.close()


def arrange(function: PciFunction, interrupts: Interrupts, queues: int) -> list[int | None]:
    """Enable interrupts; the vector of each queue."""
    if interrupts == "msix":
        assert function.enable_msix(queues + 1) == queues + 1
        return [1 + i for i in range(queues)]
    if interrupts == "shared":
        assert function.enable_msix(2) == 2
        return [1] * queues
    if interrupts == "intx":
        assert function.enable_intx()
    return [None] * queues


def modern_disks(
    function: PciFunction, memory: GuestMemory, interrupts: Interrupts, features: int | None = None, queues: int = 2
) -> tuple[ModernDevice, list[BlkDriver]]:
    device = ModernDevice(function)
    device.negotiate(features)
    vectors = arrange(function, interrupts, queues)
    disks = [BlkDriver(device.setup_queue(i, memory, vector=vectors[i])) for i in range(queues)]
    device.driver_ok()
    return device, disks


def legacy_disks(
    function: PciFunction, memory: GuestMemory, interrupts: Interrupts, features: int = 0, queues: int = 2
) -> tuple[LegacyDevice, list[BlkDriver]]:
    device = LegacyDevice(BarRegisters(function), function)
    accepted = device.negotiate(features)
    vectors = arrange(function, interrupts, queues)
    disks = [
        BlkDriver(device.setup_queue(i, memory, vectors[i], event_idx=bool(accepted >> Feature.EVENT_IDX & 1)))
        for i in range(queues)
    ]
    device.driver_ok()
    return device, disks


FORMATS: Final = {
    "split": 0,
    "split, event idx": mask(Feature.EVENT_IDX),
    "split, indirect": mask(Feature.INDIRECT_DESC),
    "packed": mask(Feature.RING_PACKED),
    "packed, event idx": mask(Feature.RING_PACKED, Feature.EVENT_IDX),
    "packed, indirect": mask(Feature.RING_PACKED, Feature.INDIRECT_DESC),
}


@pytest.mark.parametrize("interrupts", ["msix", "shared", "intx", "poll"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["owner", "transitional", "modern"])
def test_modern_io(group: RunningGroup, kind: Kind, form: str, interrupts: Interrupts) -> None:
    with function_of(group, kind) as (function, memory):
        device, disks = modern_disks(function, memory, interrupts, FORMATS[form])
        assert device.accepted & ~mask(Feature.VERSION_1) == FORMATS[form]
        for number, disk in enumerate(disks):
            disk.check(range(number, 40, 3), seed=number)
            name = disk.request(BlkType.GET_ID, size=20).data.rstrip(b"\0").decode()
            assert name == ("the owner" if kind == "owner" else "member 1")
        # Several at once, in tables of their own if that was agreed.
        disk = disks[0]
        indirect = device.has(Feature.INDIRECT_DESC)
        pending = [disk.start(BlkType.IN, 0, size=512, indirect=indirect, kick=False) for _ in range(20)]
        disk.queue.kick()
        results = [disk.finish(one) for one in pending]
        assert len({one.data for one in results}) == 1
        assert all((one.status, one.used) == (0, 513) for one in results)
        device.reset()


@pytest.mark.parametrize("interrupts", ["msix", "shared", "intx", "poll"])
@pytest.mark.parametrize("features", [0, mask(Feature.EVENT_IDX, Feature.INDIRECT_DESC)], ids=["plain", "event idx"])
@pytest.mark.parametrize("kind", ["legacy", "transitional"])
def test_legacy_io(group: RunningGroup, kind: Kind, features: int, interrupts: Interrupts) -> None:
    with function_of(group, kind) as (function, memory):
        device, disks = legacy_disks(function, memory, interrupts, features)
        for number, disk in enumerate(disks):
            disk.check(range(number, 40, 3), seed=number)
        config = device.registers.config_read(0, 8)
        assert int.from_bytes(config, "little") == 2048
        device.reset()


@pytest.mark.parametrize("kind", ["legacy", "transitional", "modern"])
def test_without_msix(group: RunningGroup, kind: Kind) -> None:
    """vectors = 0: no capability, INTx."""
    with function_of(group, kind, WITHOUT_MSIX) as (function, memory):
        assert function.msix is None
        assert function.client.irq_info(IrqIndex.MSIX).count == 0
        if kind == "legacy":
            _, disks = legacy_disks(function, memory, "intx", queues=1)
        else:
            _, disks = modern_disks(function, memory, "intx", queues=1)
        disks[0].check()
        assert disks[0].queue.interrupts >= 0


@pytest.mark.parametrize("kind", ["owner", "legacy", "transitional", "modern"])
def test_memory_without_fd(group: RunningGroup, kind: Kind) -> None:
    """Rings and buffers that the server can only ask the client for."""
    with function_of(group, kind, shared=False) as (function, memory):
        if kind == "legacy":
            _, disks = legacy_disks(function, memory, "msix", queues=1)
        else:
            _, disks = modern_disks(function, memory, "msix", queues=1)
        disks[0].check()
        assert function.client.counters.dma_reads
        assert function.client.counters.dma_writes
        assert not function.client.counters.dma_refused


IDENTITIES: Final = {
    "owner": (0x1042, 1, 0x40),
    "modern": (0x1042, 1, 0x40),
    "legacy": (0x1001, 0, 2),
    "transitional": (0x1001, 0, 2),
}


@pytest.mark.parametrize("kind", IDENTITIES)
def test_configuration_space(group: RunningGroup, kind: Kind) -> None:
    with function_of(group, kind) as (function, _):
        identity = function.identity
        device, revision, subsystem = IDENTITIES[kind]
        assert (identity.vendor, identity.subsystem_vendor, identity.device) == (0x1AF4, 0x1AF4, device)
        assert identity.revision == 0 if revision == 0 else identity.revision >= 1
        assert identity.subsystem == subsystem if subsystem < 0x40 else identity.subsystem >= 0x40
        assert identity.virtio_id == 2
        assert len(function.config) == 4096
        # What sizing says is what the client is told.
        for index in range(6):
            size = function.client.region_info(index).size
            assert size == (function.bars[index].size if index in function.bars else 0)
        kinds = {index: bar.kind for index, bar in function.bars.items()}
        assert (kinds.get(0) == "io") == (kind in ("legacy", "transitional"))
        if kind in ("legacy", "transitional"):
            assert function.bars[0].size >= 24 + 60
        present = {one.type for one in function.virtio}
        assert present == (set() if kind == "legacy" else {1, 2, 3, 4, 5})
        ids = {one.id for one in function.capabilities}
        assert {pci.CapabilityId.MSIX, pci.CapabilityId.EXPRESS} <= ids
        assert (function.sriov is not None) == (kind == "owner")
        msix = function.msix
        assert msix is not None
        assert msix.vectors == function.client.irq_info(IrqIndex.MSIX).count
        assert msix.vectors == (4 if kind == "owner" else 3)
        table = function.bars[msix.table_bar]
        assert msix.table_offset + 16 * msix.vectors <= table.size


def test_the_window_in_configuration_space(group: RunningGroup) -> None:
    """VIRTIO_PCI_CAP_PCI_CFG: registers for those who can't reach BARs, as SeaBIOS with a BAR above 4 GiB."""
    with function_of(group, "modern") as (function, _):
        device = ModernDevice(function)
        device.reset()
        bar, at = device.common.bar, device.common.structure_offset
        function.window_write(bar, at + Common.STATUS, 1, 1)
        assert device.status == 1
        assert function.window_read(bar, at + Common.STATUS, 1) == 1
        function.window_write(bar, at + Common.QUEUE_SELECT, 2, 1)
        assert device.read(Common.QUEUE_SELECT, 2) == 1
        assert function.window_read(bar, at + Common.QUEUE_SIZE, 2) == 128
        function.window_write(bar, at + Common.DEVICE_FEATURE_SELECT, 4, 1)
        assert function.window_read(bar, at + Common.DEVICE_FEATURE, 4) & 1
        assert device.device_cap is not None
        capacity = function.window_read(device.device_cap.bar, device.device_cap.structure_offset, 4)
        assert capacity == 2048
        # Outside of the BAR, or of no width there is: no effect.
        for place, width in ((function.bars[bar].size, 4), (0xFFFF_FFFC, 4), (at, 3), (at + 1, 2), (at, 0)):
            function.config_write(next(one.offset for one in function.virtio if one.type == 5) + 8, 4, place)
            function.config_write(next(one.offset for one in function.virtio if one.type == 5) + 12, 4, width)
            function.config_read(next(one.offset for one in function.virtio if one.type == 5) + 16, 4)
        assert device.status == 1


@pytest.mark.parametrize("how", ["flr", "message"])
@pytest.mark.parametrize("kind", ["owner", "legacy", "transitional", "modern"])
def test_function_reset(group: RunningGroup, kind: Kind, how: str) -> None:
    """In the middle of I/O: everything at its default, memory untouched afterwards, and then as new."""
    with function_of(group, kind) as (function, memory):
        for _ in range(5):
            memory.clear()
            if kind == "legacy":
                _, disks = legacy_disks(function, memory, "msix", queues=1)
            else:
                _, disks = modern_disks(function, memory, "msix", queues=1)
            disks[0].check()
            for _ in range(20):
                disks[0].start(BlkType.IN, 0, size=4096, kick=False)
            disks[0].queue.kick(always=True)
            if how == "flr":
                function.function_reset()
            else:
                function.client.reset()
            function.config_read(0, 4)
            before = memory.read(memory.base, memory.size)
            time.sleep(0.01)
            assert memory.read(memory.base, memory.size) == before
            assert function.config_read(pci.Register.COMMAND, 2) & 7 == 0
            assert function.msix is not None
            assert not function.msix.enabled
            function.disable_msix()
            function.place_bars()
            function.enable()
            if kind == "legacy":
                assert LegacyDevice(BarRegisters(function)).status == 0
            else:
                assert ModernDevice(function).status == 0


def test_a_reset_is_synchronous_on_legacy(group: RunningGroup) -> None:
    """One write, one read, and the memory is the driver's."""
    with function_of(group, "legacy") as (function, memory):
        for _ in range(30):
            memory.clear()
            device, disks = legacy_disks(function, memory, "poll", queues=1)
            for _ in range(20):
                disks[0].start(BlkType.IN, 0, size=4096, kick=False)
            disks[0].queue.kick(always=True)
            device.status = 0
            assert device.status == 0
            memory.clear()
            time.sleep(0.002)
            assert memory.read(memory.base, memory.size) == bytes(memory.size)


def test_posted_writes_keep_their_order(group: RunningGroup) -> None:
    """Several in one message, some posted, some not."""
    with function_of(group, "modern") as (function, _):
        device = ModernDevice(function)
        device.reset()
        bar, at = device.common.bar, device.common.structure_offset
        for value in range(50):
            writes = [(bar, at + Common.QUEUE_SELECT, struct.pack("<H", one)) for one in range(value, value + 7)]
            function.client.write_multi(writes)
            function.write(bar, at + Common.CONFIG_VECTOR, 2, value % 3, posted=True)
            function.client.write_multi([(bar, at + Common.STATUS, b"\1")], posted=False)
            assert device.read(Common.QUEUE_SELECT, 2) == value + 6
            assert device.status == 1


def test_intx_is_a_level(group: RunningGroup) -> None:
    """Signalled once; again after an unmask while ISR hasn't been read; not after it has."""
    with function_of(group, "legacy") as (function, memory):
        device, disks = legacy_disks(function, memory, "intx", queues=1)
        fd = function.intx
        assert fd is not None
        disk = disks[0]
        pending = disk.start(BlkType.IN, 0, size=512)
        assert function.client.wait_readable([fd], 2) == [fd]
        take_events(fd)
        function.client.unmask(IrqIndex.INTX)
        assert function.client.wait_readable([fd], 2) == [fd], "not signalled again though ISR wasn't read"
        take_events(fd)
        assert device.isr() == 1
        function.client.unmask(IrqIndex.INTX)
        assert function.client.wait_readable([fd], 0.05) == []
        assert disk.finish(pending).status == 0


def test_config_interrupt(group: RunningGroup) -> None:
    """A resize tells the driver through the config vector, on either interface."""
    for kind in ("legacy", "modern"):
        with function_of(group, "legacy" if kind == "legacy" else "modern", 2) as (function, memory):
            device: LegacyDevice | ModernDevice
            if kind == "legacy":
                device, _ = legacy_disks(function, memory, "msix", queues=1)
                device.registers.write(Legacy.CONFIG_VECTOR, 2, 0)
            else:
                device, _ = modern_disks(function, memory, "msix", queues=1)
                device.write(Common.CONFIG_VECTOR, 2, 0)
            size = 2 << 20 if kind == "legacy" else 1 << 20
            generation = device.read(Common.CONFIG_GENERATION, 1) if isinstance(device, ModernDevice) else 0
            answer = group.execute("member-modify", id=2, image=f"ram:{size >> 20}MiB")
            assert answer["driver-told"] is True
            assert function.client.wait_readable([function.vectors[0]], 2)
            if isinstance(device, ModernDevice):
                assert device.read(Common.CONFIG_GENERATION, 1) != generation
                assert int.from_bytes(device.config(0, 8), "little") == size // 512
            else:
                assert int.from_bytes(device.registers.config_read(0, 8), "little") == size // 512


def test_queue_reset(group: RunningGroup) -> None:
    """RING_RESET: one queue as new, the other goes on."""
    with function_of(group, "modern") as (function, memory):
        device, disks = modern_disks(function, memory, "poll", mask(Feature.RING_RESET))
        if not device.has(Feature.RING_RESET):
            raise AssertionError("RING_RESET isn't offered")
        for disk in disks:
            disk.check()
        for _ in range(20):
            disks[0].start(BlkType.IN, 0, size=4096, kick=False)
        disks[0].queue.kick(always=True)
        device.select(0)
        device.write(Common.QUEUE_RESET, 2, 1)
        deadline = time.monotonic() + 2
        while device.read(Common.QUEUE_RESET, 2):
            assert time.monotonic() < deadline
        assert device.read(Common.QUEUE_ENABLE, 2) == 0
        disks[1].check()
        again = BlkDriver(device.setup_queue(0, memory))
        again.check(seed=2)
        disks[1].check(seed=3)


def test_a_new_driver_after_an_old_one_left(group: RunningGroup) -> None:
    """The second client finds a fresh device, whatever the first left behind."""
    for kind in ("owner", "transitional", "modern"):
        for _ in range(3):
            with function_of(group, "owner" if kind == "owner" else "transitional") as (function, memory):
                device, disks = modern_disks(function, memory, "msix")
                disks[0].check()
            with function_of(group, "owner" if kind == "owner" else "transitional") as (function, memory):
                device = ModernDevice(function)
                assert device.status == 0
                assert device.driver_features() == 0
                device.select(0)
                assert device.read(Common.QUEUE_ENABLE, 2) == 0
                assert function.msix is not None
                assert not function.msix.enabled


def test_bits_that_no_driver_may_set(group: RunningGroup) -> None:
    """FEATURES_OK isn't taken for what wasn't offered, nor without VERSION_1."""
    with function_of(group, "modern") as (function, _):
        device = ModernDevice(function)
        for features in (0, mask(0, Feature.VERSION_1), mask(Feature.VERSION_1, 63), mask(Feature.ADMIN_VQ, 32)):
            device.reset()
            device.status = Status.ACKNOWLEDGE | Status.DRIVER
            for word in range(2):
                device.write(Common.DRIVER_FEATURE_SELECT, 4, word)
                device.write(Common.DRIVER_FEATURE, 4, features >> 32 * word & 0xFFFFFFFF)
            device.status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
            assert not device.status & Status.FEATURES_OK
        assert function.client.region_read(RegionIndex.CONFIG, 0, 2) == b"\xf4\x1a"


def test_rings_anywhere(group: RunningGroup) -> None:
    """Several pieces of memory, one of them above 4 GiB, taken away and given back while the other is in use."""
    with function_of(group, "modern") as (function, memory):
        _, disks = modern_disks(function, memory, "poll", queues=1)
        high = GuestMemory(16 * PAGE, 0x12_0000_0000)
        function.client.dma_map(high.base, high.size, fd=high.fd)
        for number in range(10):
            disks[0].check(seed=number)
            high.detach(function.client)
            function.client.dma_map(high.base, high.size, fd=high.fd)
        high.close()
