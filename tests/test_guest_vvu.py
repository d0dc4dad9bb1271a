# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Two virtual machines: guest B, with the virtio-vhost-user device, vvu-bridge and a vhost-user daemon, is the back end
of guest A, under a QEMU that knows nothing of it. On both carriers: what works, and who may die.

The load in guest A (images/load.c) checks every block that it reads against what was acknowledged. In guest B it is
served by `vhu-blk`, which completes requests in order: so the used index says what is done, and A's QEMU, which has no
other record (a back end in another guest can't give it memory for one), can go on with any back end that comes up
again.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from vhu_legacy import backend_guest, guest, images
from vhu_legacy.backend_guest import BackendGuest, Daemon
from vhu_legacy.guest import Disk, ServedGroup, VhostUserDeviceSpec, Via, Vm, VmConfig

pytestmark = pytest.mark.guest

NAME = "vvu"
QUEUES = 2
MEMORY_MIB = 192
IMAGE_BYTES = 32 << 20
CARRIERS: tuple[Via, ...] = ("vhost-user", "vfio-user")


@pytest.fixture(scope="session", autouse=True)
def _guest_images() -> None:
    async def fetch() -> None:
        await images.ensure(["6.12"], [backend_guest.QEMU], daemons=images.DAEMONS)

    trio.run(fetch)


@dataclass
class Pair:
    """The group, and what both guests are started with."""

    group: ServedGroup
    image: Path
    backend: VmConfig
    front: VmConfig

    async def device(self) -> dict[str, Any]:
        """`query-vhost-user-devices`."""
        (device,) = await self.group.qmp("query-vhost-user-devices")
        assert isinstance(device, dict)
        return device

    async def until(self, state: str, patience: float = 30) -> None:
        """Wait for a state of the device."""
        with trio.move_on_after(patience):
            while (await self.device())["state"] != state:
                await trio.sleep(0.05)
            return
        raise AssertionError(f"not {state} after {patience} s: {await self.device()}")

    async def masters(self) -> int:
        """How many there have been."""
        return int((await self.device())["messages"]["masters"])

    async def reconnected(self, before: int, patience: float = 60) -> None:
        """Wait until there is another master than there were."""
        with trio.move_on_after(patience):
            while await self.masters() <= before:
                await trio.sleep(0.05)
            return
        raise AssertionError(f"nobody came back within {patience} s: {await self.device()}")

    @contextlib.asynccontextmanager
    async def guest_b(self) -> AsyncIterator[BackendGuest]:
        """Guest B, with its slave up."""
        async with backend_guest.open_backend(self.backend) as back:
            await back.wait_line("bridge", "slave up")
            yield back


@contextlib.asynccontextmanager
async def pair(directory: Path, via: Via, daemon: Daemon, *, trapped: bool = False) -> AsyncIterator[Pair]:
    """A group with a device. `trapped`: over vfio-user without a RAM file."""
    image = directory / "disk.raw"
    guest.make_image(image, IMAGE_BYTES)
    ram = None
    if via == "vfio-user" and not trapped:
        # memory in earnest; the group makes it
        ram = Path("/dev/shm") / f"vhu-test-{os.getpid()}-{directory.name}"
    spec = VhostUserDeviceSpec(NAME, QUEUES, vfio_user=via == "vfio-user", ram_file=ram, ram_mib=MEMORY_MIB)
    try:
        async with guest.serve_group([], directory, vhost_user_devices=[spec]) as group:
            device = guest.VhostUserDevice(group.vhost_user_device_socket(NAME, via), QUEUES, via)
            backend = await trio.to_thread.run_sync(
                functools.partial(
                    backend_guest.backend_config, device, image=image, start=daemon, log_dir=directory / "b"
                )
            )
            disk = Disk(group.front_end_socket(NAME), "modern")
            front = VmConfig(
                disks=(disk,), memory_mib=MEMORY_MIB, memory_file=ram, log_dir=directory / "a", guest_kib=2048
            )
            yield Pair(group, image, backend, front)
    finally:
        if ram is not None:
            ram.unlink(missing_ok=True)


async def power_off(vm: Vm) -> None:
    """Guest A ends, with nothing to complain of."""
    assert await vm.complaints() == []
    await vm.command("poweroff")
    assert await vm.wait_exit() == 0


async def check_load(both: Pair, vm: Vm) -> None:
    """The end of the load: everything that was acknowledged is there, and nobody complains."""
    _, area = await vm.end_load()
    assert await vm.complaints() == []
    seen = await trio.to_thread.run_sync(guest.area_sum, both.image, area["guest_offset"], area["guest_bytes"])
    assert seen == area["guest_sum"]


@pytest.mark.parametrize("via", CARRIERS)
async def test_stock_daemon(tmp_path: Path, via: Via) -> None:
    """qemu-storage-daemon in guest B, unmodified: what A writes is what B and the host have. Guest A comes first, and
    waits; it reboots; another one comes after it."""
    async with pair(tmp_path, via, "blk") as both:
        assert (await both.device())["state"] == "waiting"
        async with trio.open_nursery() as nursery:
            started = trio.Event()
            reports: list[dict[str, Any]] = []

            async def guest_a() -> None:
                # Its QEMU waits for an answer, and so does everything in it.
                async with guest.open_vm(both.front) as vm:
                    started.set()
                    await vm.wait_event("ready", 120)
                    reports.append(await vm.command("verify vda"))
                    device = await both.device()
                    assert (device["state"], device["carrier"]) == ("connected", via)
                    assert device["queues"][0]["kicks"] > 0
                    before = len(vm.messages)
                    await vm.system_reset()
                    await vm.wait_event("ready", start=before)
                    reports.append(await vm.command("verify vda"))
                    await power_off(vm)

            nursery.start_soon(guest_a)
            async with both.guest_b() as back:
                await back.wait_line("bridge", "master gone")
                assert started.is_set()
                assert len(reports) == 2
                for what in ("host", "guest"):
                    report = reports[-1]
                    seen = await back.area_sum(report[f"{what}_offset"], report[f"{what}_bytes"])
                    assert seen == report[f"{what}_sum"]
                await back.wait_line("bridge", "slave up")
                async with guest.open_vm(both.front) as vm:
                    await vm.wait_event("ready")
                    await vm.command("verify vda")
                    await power_off(vm)
                assert await back.vm.complaints() == []


async def test_every_access_trapped(tmp_path: Path) -> None:
    """Over vfio-user without a RAM file every access to A's memory is a message: slow, and right."""
    async with (
        pair(tmp_path, "vfio-user", "own-blk", trapped=True) as both,
        both.guest_b(),
        guest.open_vm(both.front) as vm,
    ):
        await vm.wait_event("ready", 120)
        assert (await vm.command("info vda"))["size"] == IMAGE_BYTES
        await power_off(vm)


@pytest.mark.parametrize("via", CARRIERS)
async def test_who_may_die(tmp_path: Path, via: Via) -> None:
    """Under a verified load in guest A: B's daemon, its bridge, all of B; and A."""
    async with pair(tmp_path, via, "own-blk") as both, both.guest_b() as back:
        async with guest.open_vm(replace(both.front, task="load")) as vm:
            await vm.load_goes_on()

            # The daemon: the bridge takes the slave down, and up again with the next one.
            masters = await both.masters()
            await back.restart("daemon")
            await both.reconnected(masters)
            await vm.load_goes_on()

            # The bridge, which has no time to say anything. The next one begins with a reset.
            masters = await both.masters()
            await back.restart("bridge")
            await both.reconnected(masters)
            await vm.load_goes_on()

            # Either guest is paused, and goes on: nobody reconnects.
            masters = await both.masters()
            await back.vm.stop()
            await trio.sleep(0.3)
            assert (await both.device())["state"] == ("paused" if via == "vhost-user" else "connected")
            await back.vm.cont()
            await vm.load_goes_on()
            await vm.stop()
            await vm.cont()
            await vm.load_goes_on()
            assert await both.masters() == masters

            # All of guest B, without warning.
            await back.vm.system_reset()
            await both.reconnected(masters)
            await vm.load_goes_on()
            masters = await both.masters()
            await back.ready()
            await back.vm.command("panic")
            await both.reconnected(masters)
            await vm.load_goes_on()

            await check_load(both, vm)
            await vm.kill()
        await both.until("slave-up")
        async with guest.open_vm(both.front) as vm:
            await vm.wait_event("ready")
            await vm.command("verify vda")
            await power_off(vm)


@pytest.mark.parametrize("via", CARRIERS)
async def test_who_has_to_be_started_again(tmp_path: Path, via: Via) -> None:
    """B's QEMU is killed, and then our process, after which B's device is dead: QEMU can't give it to another one.
    Guest A goes on as soon as there is a B again."""
    async with pair(tmp_path, via, "own-blk") as both, trio.open_nursery() as nursery:
        vms: list[Vm] = []
        over = trio.Event()

        async def guest_a() -> None:
            async with guest.open_vm(replace(both.front, task="load")) as vm:
                vms.append(vm)
                await over.wait()

        nursery.start_soon(guest_a)
        async with both.guest_b() as back:
            await both.until("connected")
            (vm,) = vms
            await vm.load_goes_on()
            await back.vm.kill()
        await both.until("waiting")
        async with both.guest_b() as back:
            await vm.load_goes_on()
            await both.group.kill()
            await both.group.restart()
            # B doesn't come back by itself, and A is refused, not left waiting: it still answers.
            await trio.sleep(1)
            assert (await both.device())["state"] == "waiting"
            assert (await vm.qmp("query-status", timeout=5))["running"]
            await back.vm.kill()
        async with both.guest_b():
            await vm.load_goes_on()
            await check_load(both, vm)
            await power_off(vm)
            over.set()
