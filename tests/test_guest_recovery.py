# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`kill -9` of the process that serves a guest's disk, under load: the guest must not notice.

The load (images/load.c) checks every block it reads against what was acknowledged, and memory that only the device has
written; it ends with a check of everything, and the image must then read as the guest says. A few cells here; every
kernel on every QEMU is `vhu-legacy matrix`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from vhu_legacy import guest, images
from vhu_legacy.guest import Disk, MemberSpec, Mode, VmConfig

pytestmark = pytest.mark.guest

QEMU = "11.1"
RING_PACKED = 34
IN_ORDER = 35


@pytest.fixture(scope="session", autouse=True)
def _guest_images() -> None:
    # Nothing to do after `make test`'s set-up; builds them when pytest is run by hand.
    trio.run(images.ensure, ["5.10", "6.12", "7.2"], [QEMU])


@pytest.mark.parametrize(
    ("kernel", "qemu", "mode", "packed", "in_order", "queues"),
    [
        ("5.10", None, "legacy", False, False, 1),
        ("7.2", QEMU, "modern", True, False, 2),
        ("7.2", QEMU, "modern", True, True, 1),
    ],
)
async def test_killed_under_load(
    tmp_path: Path, kernel: str, qemu: str | None, mode: Mode, packed: bool, in_order: bool, queues: int
) -> None:
    image = tmp_path / "disk1.raw"
    guest.make_image(image)
    member = MemberSpec(image, packed=packed, in_order=in_order, queues=queues)
    result = await guest.load_under_kills(
        member, tmp_path, kernel=kernel, mode=mode, qemu=qemu, kills=5, log_dir=tmp_path / "vm"
    )
    assert result.problems == ()
    assert result.driver_mode == mode
    assert bool(result.features >> RING_PACKED & 1) is packed
    # The driver takes it since 6.19.
    assert bool(result.features >> IN_ORDER & 1) is in_order
    assert len(result.queue_requests) == queues
    assert all(result.queue_requests)
    assert min(result.done[key] for key in ("writes", "reads", "flushes", "kept", "checked")) > 0


@pytest.mark.parametrize(
    ("kernel", "mode", "packed", "panic"), [("6.12", "legacy", False, False), ("7.2", "modern", True, True)]
)
async def test_kills_around_stop_and_reset(tmp_path: Path, kernel: str, mode: Mode, packed: bool, panic: bool) -> None:
    """A stopped or resetting guest: QEMU's idea of where the rings stand, and its in-flight memory, change there."""
    image = tmp_path / "disk1.raw"
    guest.make_image(image)
    instants = random.Random(1)
    async with guest.serve_group([MemberSpec(image, packed=packed)], tmp_path) as group:

        async def kill_and_restart() -> None:
            await trio.sleep(instants.uniform(0, 0.3))
            await group.kill()
            await group.restart()

        disk = Disk(group.socket(1), mode, packed=packed)
        config = VmConfig(
            disks=(disk,), kernel=kernel, qemu=QEMU, task="load", guest_kib=8192, writers=8, log_dir=tmp_path / "vm"
        )
        async with guest.open_vm(config) as vm:
            await vm.load_goes_on()

            # Stopped and back: SET_VRING_BASE is what GET_VRING_BASE said, and soon stale.
            await vm.stop()
            await vm.cont()
            await vm.load_goes_on()
            await kill_and_restart()
            await vm.load_goes_on()

            # Killed while stopped: nothing is in flight, and the base is all there is to go by.
            await vm.stop()
            await kill_and_restart()
            await vm.cont()
            await vm.load_goes_on()

            # Stopped while it is dead.
            await group.kill()
            await vm.stop()
            await group.restart()
            await vm.cont()
            await vm.load_goes_on()
            assert await vm.complaints() == []

            # What was in flight at the reset is void, and so is its record.
            await kill_and_restart()
            seen = len(vm.messages)
            if panic:
                await vm.command("panic")
            else:
                await vm.system_reset()
            begins = await vm.wait_event("load-begins", start=seen)
            assert begins["found"] > 0
            await vm.load_goes_on()
            await kill_and_restart()
            await vm.load_goes_on()

            # Reset while it is dead: QEMU can't have it stop anything.
            await group.kill()
            seen = len(vm.messages)
            await vm.system_reset()
            # The firmware waits for the disk, so nothing tells how far it has come.
            await trio.sleep(1)
            await group.restart()
            await vm.wait_event("load-begins", start=seen)
            await vm.load_goes_on()

            _, area = await vm.end_load()
            assert await vm.complaints() == []
            assert await guest.load_problems(group, image, area) == []
            await vm.command("poweroff")
            assert await vm.wait_exit() == 0
