# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Real guests on real members: Debian's 6.12 cloud kernel, the machine's own QEMU, `vhu-legacy serve` in a
process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
from rich.console import Console

from vhu_legacy import demo, guest, images, matrix
from vhu_legacy.errors import GuestError
from vhu_legacy.guest import Disk, MemberSpec, Mode, ServedGroup, VmConfig

pytestmark = pytest.mark.guest

# Where the point is not the amount of data.
LITTLE_KIB = 512
EXPECTED_DRIVER: dict[Mode, str] = {"legacy": "legacy", "transitional": "modern", "modern": "modern"}


@pytest.fixture(scope="session", autouse=True)
def _guest_images() -> None:
    # Nothing to do after `make test`'s set-up; builds them when pytest is run by hand.
    trio.run(images.ensure, ["6.12"], [])


def member_images(directory: Path, count: int) -> tuple[list[Path], list[str]]:
    paths = [directory / f"disk{number}.raw" for number in range(1, count + 1)]
    return paths, [guest.make_image(path, seed=number) for number, path in enumerate(paths, 1)]


async def until(what: str, condition: Callable[[], Awaitable[tuple[bool, Any]]], timeout: float = 10) -> Any:
    with trio.move_on_after(timeout):
        while True:
            good, value = await condition()
            if good:
                return value
            await trio.sleep(0.05)
    raise AssertionError(f"not within {timeout} s: {what}")


async def member_state(group: ServedGroup, member: int, state: str) -> dict[str, Any]:
    async def look() -> tuple[bool, dict[str, Any]]:
        info = await group.member(member)
        return info["state"] == state, info

    result = await until(f"member {member} {state}", look)
    assert isinstance(result, dict)
    return result


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("mode", guest.MODES)
async def test_boot(tmp_path: Path, mode: Mode) -> None:
    (image,), (host_sum,) = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        result = await guest.boot(group.socket(1), mode=mode, log_dir=tmp_path / "vm")
        member = await member_state(group, 1, "detached")
        assert await group.stop() == 0
    assert result.driver_mode == EXPECTED_DRIVER[mode]
    assert bool(result.features >> 32 & 1) is (result.driver_mode == "modern")
    assert result.disk_bytes == image.stat().st_size
    assert list(guest.check_image(image, result, host_sum)) == []
    assert result.guest_sum is not None
    assert member["broken"] is None
    assert member["last-error"] is None
    assert member["requests"]["failed"] == 0
    assert member["requests"]["bytes-written"] >= result.guest_bytes
    assert member["requests"]["flush"] > 0
    assert not list((tmp_path / "run").glob("*.sock"))


async def test_member_state_while_the_guest_runs(tmp_path: Path) -> None:
    (image,), _ = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        config = VmConfig(disks=(Disk(group.socket(1), "legacy"),), log_dir=tmp_path / "vm")
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            before = (await group.member(1))["requests"]["out"]
            await vm.command("verify vda")
            member = await group.member(1)
            info = await vm.command("info vda")
        queue = member["queues"][0]
        assert member["state"] == "running"
        assert member["driver-mode"] == "legacy"
        assert queue["layout"] == "legacy"
        assert queue["avail-idx"] == queue["used-idx"]
        assert queue["in-flight"] == 0
        assert member["requests"]["out"] > before
        # What the guest's driver acknowledged is what the member was told (bit 30 is vhost-user's own).
        told = member["driver-features"]["value"] & ~(1 << 30)
        assert told == guest.feature_bits(info["features"]) & ~(1 << 30)


@pytest.mark.parametrize("mode", ["legacy", "modern"])
async def test_guest_reboot(tmp_path: Path, mode: Mode) -> None:
    (image,), (host_sum,) = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        result = await guest.boot(
            group.socket(1), mode=mode, task="reboot", guest_kib=LITTLE_KIB, log_dir=tmp_path / "vm"
        )
        member = await member_state(group, 1, "detached")
    assert result.boots == 2
    assert member["connections"] == 1
    assert member["last-error"] is None
    assert list(guest.check_image(image, result, host_sum)) == []


async def test_qemu_restart_on_the_same_socket(tmp_path: Path) -> None:
    (image,), (host_sum,) = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        # The first one is killed amid its work, another driver mode comes next.
        config = VmConfig(
            disks=(Disk(group.socket(1), "legacy"),), task="rw-loop", guest_kib=LITTLE_KIB, log_dir=tmp_path / "first"
        )
        async with guest.open_vm(config) as vm:
            await vm.wait_event("round")
            assert vm.pid is not None
            os.kill(vm.pid, 9)
            with pytest.raises(GuestError, match="QEMU ended"):
                await vm.wait_event("never")
        first = await member_state(group, 1, "detached")
        second = await guest.boot(group.socket(1), mode="modern", log_dir=tmp_path / "second")
        third = await guest.boot(group.socket(1), mode="legacy", log_dir=tmp_path / "third")
        member = await member_state(group, 1, "detached")
    assert first["connections"] == 1
    assert member["connections"] == 3
    assert member["broken"] is None
    assert second.driver_mode == "modern"
    assert list(guest.check_image(image, third, host_sum)) == []


@pytest.mark.parametrize(
    ("machine", "mode"), [("q35", "legacy"), ("q35", "modern"), ("pc", "legacy"), ("pc", "transitional")]
)
async def test_hot_plug_and_unplug(tmp_path: Path, machine: Literal["q35", "pc"], mode: Mode) -> None:
    paths, sums = member_images(tmp_path, 2)
    async with guest.serve_group([MemberSpec(path) for path in paths], tmp_path) as group:
        config = VmConfig(
            disks=(Disk(group.socket(1), "legacy"),),
            machine=machine,
            hotplug_ports=1,
            guest_kib=LITTLE_KIB,
            log_dir=tmp_path / "vm",
        )
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            for connection in (1, 2):
                await vm.hot_plug(Disk(group.socket(2), mode, id="hot"))
                info = await vm.command("wait vdb 10")
                assert info["mode"] == EXPECTED_DRIVER[mode]
                report = await vm.command("verify vdb")
                assert report["host_sum"] == sums[1]
                member = await group.member(2)
                assert member["state"] == "running"
                assert member["connections"] == connection
                await vm.unplug("hot")
                await vm.command("gone vdb 10")
                await member_state(group, 2, "detached")
                written = guest.area_sum(paths[1], report["guest_offset"], report["guest_bytes"])
                assert written == report["guest_sum"]
            # The other disk did not notice.
            await vm.command("verify vda")
            await vm.command("poweroff")
            assert await vm.wait_exit() == 0
        assert (await group.member(2))["last-error"] is None


async def test_pause_and_reset(tmp_path: Path) -> None:
    (image,), _ = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        config = VmConfig(
            disks=(Disk(group.socket(1), "legacy"),), task="rw-loop", guest_kib=LITTLE_KIB, log_dir=tmp_path / "vm"
        )
        async with guest.open_vm(config) as vm:
            # Amid I/O: what is in flight when the rings stop must be neither lost nor done twice.
            await vm.wait_event("disk")
            for _ in range(5):
                await trio.sleep(0.2)
                await vm.stop()
                member = await group.member(1)
                assert member["queues"][0]["in-flight"] == 0
                await vm.cont()
            await vm.wait_event("round")
            seen = len(vm.messages)
            await vm.system_reset()
            await vm.wait_event("round", start=seen)
            await vm.command("stop")
            member = await group.member(1)
            assert member["connections"] == 1
            assert member["last-error"] is None


async def test_modern_only_member_refuses_a_legacy_driver(tmp_path: Path) -> None:
    paths, sums = member_images(tmp_path, 2)
    members = [MemberSpec(paths[0], legacy=False), MemberSpec(paths[1])]
    async with guest.serve_group(members, tmp_path) as group:

        async def refused() -> tuple[bool, Any]:
            info = await group.member(1)
            return info["broken"] is not None or info["last-error"] is not None, info

        config = VmConfig(disks=(Disk(group.socket(1), "legacy"),), log_dir=tmp_path / "refused")
        async with guest.open_vm(config):
            info = await until("the member refuses", refused, 30)
        assert "legacy" in (info["broken"] or info["last-error"])["reason"]
        assert info["requests"]["in"] == 0
        # Its neighbour works, and so does the member itself with a driver it can take.
        other = await guest.boot(group.socket(2), mode="legacy", log_dir=tmp_path / "other")
        assert list(guest.check_image(paths[1], other, sums[1])) == []
        again = await guest.boot(group.socket(1), mode="modern", log_dir=tmp_path / "again")
        assert list(guest.check_image(paths[0], again, sums[0])) == []


async def test_read_only_member(tmp_path: Path) -> None:
    (image,), (host_sum,) = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image, read_only=True)], tmp_path) as group:
        result = await guest.boot(group.socket(1), mode="legacy", log_dir=tmp_path / "vm")
        member = await group.member(1)
    assert result.read_only
    assert result.guest_sum is None
    assert list(guest.check_image(image, result, host_sum)) == []
    assert member["requests"]["out"] == 0


async def test_two_queues(tmp_path: Path) -> None:
    (image,), (host_sum,) = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image, queues=2)], tmp_path) as group:
        result = await guest.boot(group.socket(1), mode="legacy", queues=2, log_dir=tmp_path / "vm")
        member = await member_state(group, 1, "detached")
    assert list(guest.check_image(image, result, host_sum)) == []
    assert [queue["requests"] > 0 for queue in member["queues"]] == [True, True]


async def test_resize_is_seen_by_the_running_guest(tmp_path: Path) -> None:
    (image,), _ = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        config = VmConfig(disks=(Disk(group.socket(1), "legacy"),), log_dir=tmp_path / "vm")
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            size = image.stat().st_size * 2
            await group.qmp("member-modify", {"id": 1, "size": size})
            info = await vm.command(f"size vda {size} 10")
            assert info["size"] == size
            await vm.command("verify vda")
        assert image.stat().st_size == size


async def test_what_the_kernel_complains_about(tmp_path: Path) -> None:
    (image,), _ = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        config = VmConfig(disks=(Disk(group.socket(1), "legacy"),), log_dir=tmp_path / "vm")
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            assert await vm.complaints() == []
            # The guest doesn't know: what it writes comes back as failed.
            await group.qmp("member-modify", {"id": 1, "read-only": True})
            with pytest.raises(GuestError, match="vda: "):
                await vm.command("verify vda")
            complaints = await vm.complaints()
    assert any("I/O error, dev vda" in line for line in complaints)


# --- what goes wrong on our side of the VM


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"nobody listens on .*nowhere\.sock"):
        await guest.boot(tmp_path / "nowhere.sock", log_dir=tmp_path / "vm", timeout=20)


async def test_qemu_refuses_its_command_line(tmp_path: Path) -> None:
    config = VmConfig(extra=("-device", "no-such-device"), log_dir=tmp_path / "vm")
    with pytest.raises(GuestError, match=r"(?s)QEMU ended with status 1.*no-such-device"):
        async with guest.open_vm(config):
            pass


async def test_guest_failure_has_the_reason(tmp_path: Path) -> None:
    image = tmp_path / "small.raw"
    image.write_bytes(bytes(1 << 20))
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        with pytest.raises(GuestError, match=r"vda is smaller than \d+ KiB") as caught:
            await guest.boot(group.socket(1), mode="legacy", log_dir=tmp_path / "vm")
    assert caught.value.log == tmp_path / "vm" / "console.log"


async def test_no_progress_within_the_bound(tmp_path: Path) -> None:
    (image,), _ = member_images(tmp_path, 1)
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        with pytest.raises(guest.GuestWedgedError, match="within 0 s"):
            await guest.boot(group.socket(1), mode="legacy", timeout=0.2, log_dir=tmp_path / "vm")
        await member_state(group, 1, "detached")


async def test_unknown_command_and_task(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="unknown task"):
        await guest.boot(tmp_path / "x", task="nonsense")
    async with guest.open_vm(VmConfig(log_dir=tmp_path / "vm")) as vm:
        await vm.wait_event("ready")
        with pytest.raises(GuestError, match="unknown command nonsense"):
            await vm.command("nonsense")
        with pytest.raises(GuestError, match="no free root port"):
            await vm.hot_plug(Disk(tmp_path / "x"))
        with pytest.raises(GuestError, match="QMP nonsense"):
            await vm.qmp("nonsense")


async def test_cancellation_ends_qemu_and_closes_every_fd(tmp_path: Path) -> None:
    async def once() -> None:
        pid = None
        with trio.move_on_after(30) as scope:
            async with guest.open_vm(VmConfig(log_dir=tmp_path / "vm")) as vm:
                pid = vm.pid
                await vm.wait_event("boot")
                scope.cancel()
                await trio.sleep_forever()
        assert pid is not None
        assert not process_exists(pid)

    await once()
    before = open_fds()
    await once()
    assert open_fds() == before


# --- the commands built on it


async def test_matrix_cells(tmp_path: Path) -> None:
    report = tmp_path / "matrix.xml"
    version = images.qemu_command().series
    with (tmp_path / "out").open("w") as out:
        result = await matrix.run_matrix(
            ["6.12"],
            ["legacy"],
            [f"{version[0]}.{version[1]}"],
            junit=report,
            console=Console(file=out),
            log_dir=tmp_path / "logs",
        )
    assert [(cell.cell.row, cell.outcome) for cell in result.cells] == [
        ("legacy", matrix.Outcome.PASS),
        ("legacy device, legacy = false", matrix.Outcome.REJECT),
        ("legacy 4 kills", matrix.Outcome.PASS),
    ]
    assert result.ok
    assert 'tests="3"' in report.read_text()
    assert "3 of 3 cells as expected" in (tmp_path / "out").read_text()


async def test_demo(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        assert await demo.run_demo(Console(file=out)) == 0
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[-1] == "demo: PASS"


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_sigterm_ends_the_guest_of_boot(tmp_path: Path) -> None:
    """`timeout 60 vhu-legacy boot …`: the QEMU it has started must not be left behind."""
    image = tmp_path / "disk1.raw"
    await trio.to_thread.run_sync(guest.make_image, image)
    async with guest.serve_group([guest.MemberSpec(image)], tmp_path) as group:
        argv = [sys.executable, "-m", "vhu_legacy", "boot", "1", "--run-dir", str(group.run_dir), "--task", "rw-loop"]
        process = await trio.lowlevel.open_process(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with trio.fail_after(40):
                while (await group.member(1))["state"] != "running":
                    await trio.sleep(0.1)
            qemu = (await group.member(1))["peer-pid"]
            assert _runs(qemu)
            process.terminate()
            with trio.fail_after(20):
                assert await process.wait() not in (0, -signal.SIGTERM)
            assert not _runs(qemu)
        finally:
            process.kill()
