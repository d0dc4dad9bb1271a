# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Live migration of a stock guest, under a verified load, from one group's process to another's.

Both groups have the same image open (`shared = true`). While QEMU copies the guest's memory the device goes on writing
to it, and only the device's own log says which pages it wrote: the load keeps 8 MiB that no CPU ever writes, reads into
them all the time, and checks each page before it is read into again and at the end. Pages that the log forgets arrive
as they were when QEMU copied them first.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from vhu_legacy import guest, images
from vhu_legacy.guest import Disk, MemberSpec, Mode, ServedGroup, Vm, VmConfig

pytestmark = pytest.mark.guest

QEMU = "11.1"


@pytest.fixture(scope="session", autouse=True)
def _guest_images() -> None:
    # Nothing to do after `make test`'s set-up; builds them when pytest is run by hand.
    trio.run(images.ensure, ["6.12", "7.2"], [QEMU])


@contextlib.asynccontextmanager
async def two_groups(directory: Path, spec: MemberSpec) -> AsyncIterator[tuple[ServedGroup, ServedGroup]]:
    for name in ("a", "b"):
        await trio.Path(directory / name).mkdir()
    async with (
        guest.serve_group([spec], directory / "a", name="a") as first,
        guest.serve_group([spec], directory / "b", name="b") as second,
    ):
        yield first, second


async def migration_status(vm: Vm) -> dict[str, Any]:
    answer = await vm.qmp("query-migrate")
    assert isinstance(answer, dict)
    return answer


async def migration_ends(vm: Vm, wanted: str, timeout: float = 90) -> dict[str, Any]:
    with trio.move_on_after(timeout):
        while True:
            answer = await migration_status(vm)
            if answer.get("status") in ("completed", "failed", "cancelled"):
                assert answer["status"] == wanted, answer
                return answer
            await trio.sleep(0.05)
    raise AssertionError(f"not within {timeout} s: migration {wanted}; it is {await migration_status(vm)}")


async def migrate(source: Vm, target: Vm, socket: Path) -> None:
    """From start to end, with time enough to stop for."""
    await target.qmp("migrate-incoming", {"uri": f"unix:{socket}"})
    await source.qmp("migrate-set-parameters", {"max-bandwidth": 1 << 30, "downtime-limit": 10000})
    await source.qmp("migrate", {"uri": f"unix:{socket}"})
    await migration_ends(source, "completed")


async def copy_once(source: Vm, target: Vm, socket: Path) -> None:
    """Begin a migration, and let the device write some megabytes after QEMU has been over the guest's memory once. The
    second pass is slowed down so much that it surely isn't over then: it would take longer than a test may.
    """
    await target.qmp("migrate-incoming", {"uri": f"unix:{socket}"})
    await source.qmp("migrate-set-parameters", {"max-bandwidth": 16 << 20, "downtime-limit": 0})
    await source.qmp("migrate", {"uri": f"unix:{socket}"})
    with trio.fail_after(60):
        while (await migration_status(source)).get("ram", {}).get("dirty-sync-count", 0) < 2:
            await trio.sleep(0.02)
    await source.qmp("migrate-set-parameters", {"max-bandwidth": 1 << 16})
    await source.load_goes_on(2000)
    assert (await migration_status(source))["status"] == "active"


async def runs(vm: Vm, timeout: float = 30) -> None:
    with trio.fail_after(timeout):
        while not (await vm.qmp("query-status"))["running"]:
            await trio.sleep(0.05)


@pytest.mark.parametrize(
    ("kernel", "mode", "packed", "queues"), [("6.12", "legacy", False, 1), ("7.2", "modern", True, 2)]
)
async def test_migration_under_load(tmp_path: Path, kernel: str, mode: Mode, packed: bool, queues: int) -> None:
    image = tmp_path / "disk1.raw"
    guest.make_image(image)
    spec = MemberSpec(image, packed=packed, queues=queues, shared=True)
    async with two_groups(tmp_path, spec) as (first, second):
        disk = Disk(first.socket(1), mode, packed=packed, queues=queues)
        config = VmConfig(
            disks=(disk,),
            kernel=kernel,
            qemu=QEMU,
            task="load",
            cpus=queues,
            guest_kib=8192,
            writers=8,
            log_dir=tmp_path / "source",
        )
        target_config = replace(
            config,
            disks=(replace(disk, socket=second.socket(1)),),
            log_dir=tmp_path / "target",
            extra=("-incoming", "defer"),
        )
        async with guest.open_vm(config) as source:
            await source.load_goes_on(500)

            # One that is called off.
            async with guest.open_vm(target_config) as target:
                await target.qmp("migrate-incoming", {"uri": f"unix:{tmp_path / 'first'}"})
                await source.qmp("migrate-set-parameters", {"max-bandwidth": 1 << 20})
                await source.qmp("migrate", {"uri": f"unix:{tmp_path / 'first'}"})
                await source.load_goes_on(200)
                await source.qmp("migrate_cancel")
                await migration_ends(source, "cancelled")
            await source.load_goes_on()

            # And one that isn't.
            async with guest.open_vm(target_config) as target:
                await copy_once(source, target, tmp_path / "second")
                await source.qmp("migrate-set-parameters", {"max-bandwidth": 1 << 30, "downtime-limit": 10000})
                answer = await migration_ends(source, "completed")
                assert answer["ram"]["dirty-sync-count"] > 2
                assert (await source.qmp("query-status"))["status"] == "postmigrate"
                assert (await first.member(1))["queues"][0]["in-flight"] == 0
                await runs(target)
                await target.wait_event("load")
                await target.load_goes_on(500)
                _, area = await target.end_load()
                assert await target.complaints() == []
                assert await guest.load_problems(second, image, area) == []
                assert await guest.load_problems(first, image, area) == []
                await target.command("poweroff")
                assert await target.wait_exit() == 0
        assert await first.stop() == 0
        assert await second.stop() == 0


async def test_kills_around_a_migration(tmp_path: Path) -> None:
    """The source's group is killed while QEMU copies memory, and the target's afterwards: the log goes on in the next
    process, and what is in flight never moves.
    """
    image = tmp_path / "disk1.raw"
    guest.make_image(image)
    async with two_groups(tmp_path, MemberSpec(image, packed=True, shared=True)) as (first, second):
        disk = Disk(first.socket(1), packed=True)
        config = VmConfig(
            disks=(disk,), kernel="7.2", qemu=QEMU, task="load", guest_kib=8192, writers=8, log_dir=tmp_path / "source"
        )
        there = replace(
            config,
            disks=(replace(disk, socket=second.socket(1)),),
            log_dir=tmp_path / "target",
            extra=("-incoming", "defer"),
        )
        async with guest.open_vm(config) as source, guest.open_vm(there) as target:
            await source.load_goes_on()
            await copy_once(source, target, tmp_path / "s")
            await first.kill()
            await first.restart()
            await source.load_goes_on(2000)
            await source.qmp("migrate-set-parameters", {"max-bandwidth": 1 << 30, "downtime-limit": 10000})
            await migration_ends(source, "completed")
            await target.wait_event("load")
            await target.load_goes_on(500)
            await second.kill()
            await second.restart()
            await target.load_goes_on(500)
            _, area = await target.end_load()
            assert await target.complaints() == []
            for group in (first, second):
                assert await guest.load_problems(group, image, area) == []


async def test_migration_of_a_stopped_guest_and_back(tmp_path: Path) -> None:
    """To the other group and back again, so each of them is source and target once; the first time while the guest is
    stopped: then nothing goes on, and the rings' state is all that moves.
    """
    image = tmp_path / "disk1.raw"
    guest.make_image(image)
    async with two_groups(tmp_path, MemberSpec(image, shared=True)) as (first, second):
        config = VmConfig(
            disks=(Disk(first.socket(1), "legacy"),), qemu=QEMU, task="load", guest_kib=8192, log_dir=tmp_path / "vm0"
        )
        there = replace(
            config,
            disks=(Disk(second.socket(1), "legacy"),),
            log_dir=tmp_path / "vm1",
            extra=("-incoming", "defer"),
        )
        back = replace(there, disks=config.disks, log_dir=tmp_path / "vm2")
        async with guest.open_vm(there) as other:
            async with guest.open_vm(config) as vm:
                await vm.load_goes_on()
                await vm.stop()
                await migrate(vm, other, tmp_path / "there")
            assert not (await other.qmp("query-status"))["running"]
            await other.cont()
            await other.wait_event("load")
            await other.load_goes_on()
            # The member has one front end at a time: the VM that came first is gone.
            async with guest.open_vm(back) as vm:
                await migrate(other, vm, tmp_path / "back")
                await runs(vm)
                await vm.wait_event("load")
                await vm.load_goes_on()
                _, area = await vm.end_load()
                assert await vm.complaints() == []
                for group in (first, second):
                    assert await guest.load_problems(group, image, area) == []
