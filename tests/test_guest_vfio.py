# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Real guests on PCI functions over vfio-user: Debian's kernels 5.10, 6.1, 6.12 and 7.2 on QEMU 11.1, and SeaBIOS.

A few of each kind; every kernel with every function is `vhu-legacy matrix`. Whatever a guest does here, its kernel must
not complain: `complaints` are lines of level error or worse, and those of virtio that speak of admin commands or
errors.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from rich.console import Console

from vhu_legacy import guest, images, matrix, qemu_args
from vhu_legacy.errors import GuestError, ImagesError
from vhu_legacy.guest import Function, GuestResult, Kind, MemberSpec, OwnerSpec, ServedGroup, VmConfig

pytestmark = pytest.mark.guest

QEMU = "11.1"
LITTLE_KIB = 512
ADMIN_VQ = 41
RING_PACKED = 34
FORCE_LEGACY = matrix.FORCE_LEGACY
NO_MSI = "pci=nomsi"


@pytest.fixture(scope="session", autouse=True)
def _guest_images() -> None:
    # Nothing to do after `make test`'s set-up; builds them when pytest is run by hand.
    trio.run(images.ensure, ["5.10", "6.1", "6.12", "7.2"], [QEMU])


def make_image(directory: Path, number: int = 1) -> tuple[Path, str]:
    path = directory / f"disk{number}.raw"
    return path, guest.make_image(path, seed=number)


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


async def boot(socket: Path, directory: Path, **options: Any) -> GuestResult:
    """A guest of the usual QEMU; it writes little unless told otherwise."""
    options = {"guest_kib": LITTLE_KIB, **options}
    return await guest.boot(socket, qemu=QEMU, via="vfio-user", log_dir=directory / "vm", **options)


# --- the owner: Linux drives the administration virtqueue itself


@pytest.mark.parametrize(
    ("kernel", "owner", "interrupts", "vectors"),
    [
        # One vector for the disk's queue, one for the administration virtqueue, one for configuration changes.
        ("7.2", {}, "msix", 3),
        # The administration virtqueue shares the vector of configuration changes.
        ("6.12", {"vectors": 2, "packed": True}, "msix", 2),
        ("7.2", {"vectors": 0, "packed": True}, "intx", 0),
        ("6.12", {"vectors": 0}, "intx", 0),
    ],
)
async def test_owner(tmp_path: Path, kernel: str, owner: dict[str, Any], interrupts: str, vectors: int) -> None:
    image, host_sum = make_image(tmp_path)
    async with guest.serve_group([], tmp_path, owner=OwnerSpec(image, **owner)) as group:
        before = await group.owner()
        result = await boot(group.owner_socket(), tmp_path, kernel=kernel, cpus=2)
        after = await group.owner()
        assert await group.stop() == 0
    assert guest.owner_problems(before, after, kernel) == []
    assert result.complaints == ()
    assert list(guest.check_image(image, result, host_sum)) == []
    assert (result.driver_mode, result.interrupts, result.vectors) == ("modern", interrupts, vectors)
    # The driver had its answers by interrupt; the name is Linux's.
    if vectors == 3:
        assert result.interrupt_counts["virtio0-avq.1"] >= 1
    assert bool(result.features >> ADMIN_VQ & 1) is bool(guest.ADMIN_COMMANDS[kernel])
    assert bool(result.features >> RING_PACKED & 1) is owner.get("packed", False)


@pytest.mark.parametrize("kernel", ["7.2"])
async def test_owner_after_a_reboot(tmp_path: Path, kernel: str) -> None:
    image, host_sum = make_image(tmp_path)
    async with guest.serve_group([], tmp_path, owner=OwnerSpec(image)) as group:
        before = await group.owner()
        result = await boot(group.owner_socket(), tmp_path, kernel=kernel, task="reboot", port=True)
        after = await group.owner()
    assert result.boots == 2
    assert result.complaints == ()
    assert list(guest.check_image(image, result, host_sum)) == []
    assert guest.owner_problems(before, after, kernel, starts=2) == []


# --- functions of a member


@pytest.mark.parametrize(
    ("kernel", "vectors", "append", "port", "interrupts"),
    [
        ("5.10", None, [], False, "msix"),
        ("6.1", 0, [], True, "intx"),
        # It could have MSI-X: the device configuration stays where INTx has it.
        ("6.12", None, [NO_MSI], False, "intx"),
        ("7.2", None, [], True, "msix"),
    ],
)
async def test_legacy_function(
    tmp_path: Path, kernel: str, vectors: int | None, append: list[str], port: bool, interrupts: str
) -> None:
    image, host_sum = make_image(tmp_path)
    async with guest.serve_group([MemberSpec(image, vfio_user=True, vectors=vectors)], tmp_path) as group:
        result = await boot(
            group.function_socket(1, "legacy"),
            tmp_path,
            kernel=kernel,
            mode="legacy",
            append=append,
            port=port,
            guest_kib=guest.GUEST_KIB,
        )
        member = await member_state(group, 1, "detached")
        trace = await group.qmp("query-trace", {"id": 1})
        assert await group.stop() == 0
    assert result.complaints == ()
    assert list(guest.check_image(image, result, host_sum)) == []
    assert (result.driver_mode, result.interrupts, result.vectors) == (
        "legacy",
        interrupts,
        2 if interrupts == "msix" else 0,
    )
    assert result.features >> 32 == 0
    assert member["broken"] is None
    assert member["last-error"] is None
    assert member["requests"]["failed"] == 0
    assert member["requests"]["bytes-written"] >= result.guest_bytes
    assert guest.legacy_command_problems(member["admin-commands"]) == []
    assert any(entry["register"] == "device_status" and entry["write"] for entry in trace["entries"])


@pytest.mark.parametrize(
    ("kernel", "append", "vectors", "driver"),
    [
        ("6.12", [FORCE_LEGACY], None, "legacy"),
        ("7.2", [], 0, "modern"),
    ],
)
async def test_transitional_function(
    tmp_path: Path, kernel: str, append: list[str], vectors: int | None, driver: str
) -> None:
    image, host_sum = make_image(tmp_path)
    async with guest.serve_group([MemberSpec(image, vfio_user=True, vectors=vectors)], tmp_path) as group:
        socket = group.function_socket(1, "transitional")
        result = await boot(socket, tmp_path, kernel=kernel, mode="transitional", append=append)
        member = await member_state(group, 1, "detached")
    assert result.complaints == ()
    assert list(guest.check_image(image, result, host_sum)) == []
    assert result.driver_mode == driver
    assert result.interrupts == ("intx" if vectors == 0 else "msix")
    assert member["last-error"] is None


@pytest.mark.parametrize(("kernel", "packed"), [("6.1", True)])
async def test_modern_function(tmp_path: Path, kernel: str, packed: bool) -> None:
    image, host_sum = make_image(tmp_path)
    spec = MemberSpec(image, vfio_user=True, legacy=False, packed=packed)
    async with guest.serve_group([spec], tmp_path) as group:
        with pytest.raises(GuestError, match="serves no legacy function of member 1"):
            group.function_socket(1, "legacy")
        result = await boot(group.function_socket(1, "modern"), tmp_path, kernel=kernel)
        member = await member_state(group, 1, "detached")
    assert result.complaints == ()
    assert list(guest.check_image(image, result, host_sum)) == []
    assert (result.driver_mode, result.interrupts) == ("modern", "msix")
    assert bool(result.features >> RING_PACKED & 1) is packed
    assert member["last-error"] is None


async def test_two_queues_of_a_legacy_function(tmp_path: Path) -> None:
    image, host_sum = make_image(tmp_path)
    async with guest.serve_group([MemberSpec(image, vfio_user=True, queues=2)], tmp_path) as group:
        result = await boot(group.function_socket(1, "legacy"), tmp_path, mode="legacy", queues=2)
        member = await member_state(group, 1, "detached")
    assert list(guest.check_image(image, result, host_sum)) == []
    assert result.vectors == 3
    assert result.complaints == ()
    assert [queue["requests"] > 0 for queue in member["queues"]] == [True, True]


async def test_two_members_in_one_guest(tmp_path: Path) -> None:
    """Two functions of one process in one QEMU, each with a driver of its own; here on a PCI bus without Express."""
    paths, sums = zip(*(make_image(tmp_path, number) for number in (1, 2)), strict=True)
    specs = [MemberSpec(paths[0], vfio_user=True), MemberSpec(paths[1], vfio_user=True, vectors=0)]
    async with guest.serve_group(specs, tmp_path) as group:
        config = VmConfig(
            disks=(
                Function(group.function_socket(1, "legacy"), "one"),
                Function(group.function_socket(2, "transitional"), "two"),
            ),
            qemu=QEMU,
            machine="pc",
            guest_kib=LITTLE_KIB,
            log_dir=tmp_path / "vm",
        )
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            for disk, path, host_sum, mode in zip(("vda", "vdb"), paths, sums, ("legacy", "modern"), strict=True):
                info = await vm.command(f"info {disk}")
                assert info["mode"] == mode
                report = await vm.command(f"verify {disk}")
                assert report["host_sum"] == host_sum
                assert report["guest_sum"] == guest.area_sum(path, report["guest_offset"], report["guest_bytes"])
            assert await vm.complaints() == []


async def test_owner_and_member_in_one_guest(tmp_path: Path) -> None:
    """The PF beside one of its members: both disks work, and so does the administration virtqueue that both use."""
    (owner_image, owner_sum), (image, host_sum) = make_image(tmp_path, 1), make_image(tmp_path, 2)
    async with guest.serve_group([MemberSpec(image, vfio_user=True)], tmp_path, owner=OwnerSpec(owner_image)) as group:
        config = VmConfig(
            disks=(Function(group.owner_socket(), "pf"), Function(group.function_socket(1, "legacy"), "vf")),
            kernel="7.2",
            qemu=QEMU,
            guest_kib=LITTLE_KIB,
            log_dir=tmp_path / "vm",
        )
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            expected = [("vda", "modern", owner_image, owner_sum), ("vdb", "legacy", image, host_sum)]
            for disk, mode, path, wanted in expected:
                assert (await vm.command(f"info {disk}"))["mode"] == mode
                report = await vm.command(f"verify {disk}")
                assert report["host_sum"] == wanted
                assert report["guest_sum"] == guest.area_sum(path, report["guest_offset"], report["guest_bytes"])
            assert await vm.complaints() == []
        commands = (await group.owner())["commands"]
        assert set(guest.ADMIN_COMMANDS["7.2"]) <= {name for name, count in commands.items() if count}
        assert (await group.owner())["failed"] == 0
        assert guest.legacy_command_problems((await member_state(group, 1, "detached"))["admin-commands"]) == []


@pytest.mark.parametrize(("kind", "kernel", "packed"), [("legacy", "6.12", False), ("owner", "7.2", True)])
async def test_memory_that_is_not_shared(tmp_path: Path, kind: Kind, kernel: str, packed: bool) -> None:
    """Guest memory without an fd: rings and buffers are read and written by DMA_READ and DMA_WRITE."""
    image, host_sum = make_image(tmp_path)
    owner = OwnerSpec(image, packed=packed) if kind == "owner" else None
    members = [] if kind == "owner" else [MemberSpec(image, vfio_user=True, packed=packed)]
    async with guest.serve_group(members, tmp_path, owner=owner) as group:
        number = 0 if kind == "owner" else 1
        config = VmConfig(
            disks=(Function(group.function_socket(number, kind)),),
            kernel=kernel,
            qemu=QEMU,
            shared_memory=False,
            guest_kib=LITTLE_KIB,
            log_dir=tmp_path / "vm",
        )
        before = await group.owner()
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            report = await vm.command("verify vda")
            assert report["host_sum"] == host_sum
            assert report["guest_sum"] == guest.area_sum(image, report["guest_offset"], report["guest_bytes"])
            seen = len(vm.messages)
            await vm.system_reset()
            await vm.wait_event("ready", start=seen)
            await vm.command("verify vda")
            assert await vm.complaints() == []
        if kind == "owner":
            assert guest.owner_problems(before, await group.owner(), kernel, starts=2) == []
        assert (await group.device(number))["last-error"] is None


# --- firmware


# A boot sector that says so and idles: what SeaBIOS runs when it could read it. Interrupts stay on, or the last
# characters would never come out of SeaBIOS's serial console.
BOOT_TEXT = b"member booted\r\n"
BOOT_CODE = b"\xfb\xfc\x31\xc0\x8e\xd8\xbe\x1a\x7c\xac\x84\xc0\x74\x09\xb4\x0e\xbb\x07\x00\xcd\x10\xeb\xf2\xf4\xeb\xfd"


def read_until(fd: int, text: bytes, timeout: float = 30) -> bytes:
    seen = b""
    deadline = time.monotonic() + timeout
    while text not in seen:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise AssertionError(f"no {text!r} within {timeout} s: {seen[-2000:]!r}")
        try:
            data = os.read(fd, 4096)
        except OSError:
            data = b""
        if not data:
            raise AssertionError(f"the end before {text!r}: {seen[-2000:]!r}")
        seen += data
    return seen


@pytest.mark.parametrize(
    ("kind", "vectors"), [("legacy", None), ("legacy", 0), ("transitional", None), ("modern", None), ("owner", None)]
)
async def test_firmware_boots_from_a_function(tmp_path: Path, kind: Kind, vectors: int | None) -> None:
    image = tmp_path / "boot.raw"
    sector = (BOOT_CODE + BOOT_TEXT + b"\0").ljust(510, b"\0") + b"\x55\xaa"
    image.write_bytes(sector.ljust(1 << 20, b"\0"))
    members = [] if kind == "owner" else [MemberSpec(image, vfio_user=True, vectors=vectors)]
    owner = OwnerSpec(image, vectors=vectors) if kind == "owner" else None
    qemu = images.qemu_command(QEMU)
    async with guest.serve_group(members, tmp_path, owner=owner) as group:
        argv = qemu_args.command_line_vfio(
            group.function_socket(0 if kind == "owner" else 1, kind), qemu.series, memory="256M", binary=qemu.argv
        )

        def run() -> None:
            ours, theirs = pty.openpty()
            with subprocess.Popen(
                argv, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **qemu.env}
            ) as process:
                os.close(theirs)
                try:
                    read_until(ours, BOOT_TEXT.strip())
                finally:
                    process.kill()
                    os.close(ours)

        await trio.to_thread.run_sync(run)
        if kind != "owner":
            member = await member_state(group, 1, "detached")
            assert member["requests"]["in"] >= 1
            assert member["last-error"] is None


# --- what happens to running guests


async def test_reset_and_kill_amid_io(tmp_path: Path) -> None:
    image, host_sum = make_image(tmp_path)
    async with guest.serve_group([MemberSpec(image, vfio_user=True)], tmp_path) as group:
        socket = group.function_socket(1, "legacy")
        config = VmConfig(
            disks=(Function(socket),), qemu=QEMU, task="rw-loop", guest_kib=LITTLE_KIB, log_dir=tmp_path / "first"
        )
        async with guest.open_vm(config) as vm:
            await vm.wait_event("round")
            await vm.stop()
            await vm.cont()
            seen = len(vm.messages)
            await vm.system_reset()
            await vm.wait_event("round", start=seen)
            assert vm.pid is not None
            os.kill(vm.pid, signal.SIGKILL)
            with pytest.raises(GuestError, match="QEMU ended"):
                await vm.wait_event("never")
        member = await member_state(group, 1, "detached")
        assert member["last-error"] is None
        # The next client finds everything as the first one did.
        result = await boot(socket, tmp_path, kernel="5.10", mode="legacy", task="reboot")
    assert result.complaints == ()
    assert list(guest.check_image(image, result, host_sum)) == []


@pytest.mark.parametrize(("kind", "vectors"), [("legacy", None), ("legacy", 0), ("modern", None)])
async def test_resize_is_seen_by_the_running_guest(tmp_path: Path, kind: Kind, vectors: int | None) -> None:
    image, _ = make_image(tmp_path)
    async with guest.serve_group([MemberSpec(image, vfio_user=True, vectors=vectors)], tmp_path) as group:
        config = VmConfig(disks=(Function(group.function_socket(1, kind)),), qemu=QEMU, log_dir=tmp_path / "vm")
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            size = image.stat().st_size * 2
            await group.qmp("member-modify", {"id": 1, "size": size})
            assert (await vm.command(f"size vda {size} 10"))["size"] == size
            await vm.command("verify vda")
            assert await vm.complaints() == []


@pytest.mark.parametrize("kind", ["legacy", "owner"])
async def test_driver_taken_away_and_function_reset(tmp_path: Path, kind: Kind) -> None:
    """The guest unbinds its driver and binds it again, with and without a function-level reset in between."""
    image, host_sum = make_image(tmp_path)
    members = [] if kind == "owner" else [MemberSpec(image, vfio_user=True)]
    owner = OwnerSpec(image) if kind == "owner" else None
    async with guest.serve_group(members, tmp_path, owner=owner) as group:
        number = 0 if kind == "owner" else 1
        config = VmConfig(
            # Behind a port: on pcie.0 QEMU hides a legacy endpoint's PCI Express capability, and with it the reset.
            disks=(Function(group.function_socket(number, kind), port=True),),
            kernel="7.2",
            qemu=QEMU,
            guest_kib=LITTLE_KIB,
            log_dir=tmp_path / "vm",
        )
        before = await group.owner()
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            mode = (await vm.command("info vda"))["mode"]
            for command in ("rebind vda", "rebind vda flr", "rebind vda flr"):
                info = await vm.command(command)
                assert (info["mode"], info["interrupts"], info["vectors"]) == (mode, "msix", 2)
                report = await vm.command("verify vda")
                assert report["host_sum"] == host_sum
                assert report["guest_sum"] == guest.area_sum(image, report["guest_offset"], report["guest_bytes"])
            assert await vm.complaints() == []
        if kind == "owner":
            assert guest.owner_problems(before, await group.owner(), "7.2", starts=4) == []
        assert (await group.device(number))["last-error"] is None


@pytest.mark.parametrize("kind", ["legacy", "modern"])
async def test_stopped_and_resumed_amid_io(tmp_path: Path, kind: Kind) -> None:
    """DEV_MODE_SET under a guest at work: nothing moves while the member is stopped, and nothing is lost."""
    image, _ = make_image(tmp_path)
    async with guest.serve_group([MemberSpec(image, vfio_user=True)], tmp_path) as group:
        config = VmConfig(
            disks=(Function(group.function_socket(1, kind)),),
            qemu=QEMU,
            task="rw-loop",
            guest_kib=LITTLE_KIB,
            log_dir=tmp_path / "vm",
        )
        async with guest.open_vm(config) as vm:
            await vm.wait_event("round")
            for _ in range(5):
                await trio.sleep(0.2)
                await group.qmp("member-stop", {"id": 1})
                stopped = await group.member(1)
                await group.qmp("member-parts-get", {"id": 1})
                await trio.sleep(0.2)
                assert (await group.member(1))["requests"] == stopped["requests"]
                assert [queue["in-flight"] for queue in stopped["queues"]] == [0]
                await group.qmp("member-resume", {"id": 1})
            await vm.wait_event("round", start=len(vm.messages))
            await vm.command("stop")
            assert await vm.complaints() == []
        assert (await group.owner())["failed"] == 0


async def test_front_ends_take_turns(tmp_path: Path) -> None:
    """One member by vhost-user and by its functions, one after the other, and then deleted under a guest."""
    image, host_sum = make_image(tmp_path)
    async with guest.serve_group([MemberSpec(image, vfio_user=True)], tmp_path) as group:
        first = await guest.boot(group.socket(1), mode="legacy", guest_kib=LITTLE_KIB, log_dir=tmp_path / "first")
        assert list(guest.check_image(image, first, host_sum)) == []
        socket = group.function_socket(1, "legacy")
        second = await boot(socket, tmp_path, mode="legacy")
        assert list(guest.check_image(image, second, host_sum)) == []
        assert second.complaints == ()
        config = VmConfig(
            disks=(Function(group.function_socket(1, "modern")),),
            qemu=QEMU,
            task="rw-loop",
            guest_kib=LITTLE_KIB,
            log_dir=tmp_path / "third",
        )
        async with guest.open_vm(config) as vm:
            await vm.wait_event("round")
            await group.qmp("member-del", {"id": 1, "force": True}, 40)
            assert (await vm.qmp("query-status"))["running"]
        assert not socket.exists()


async def test_one_front_end_at_a_time(tmp_path: Path) -> None:
    """Whoever comes second is turned away at once, and the first doesn't notice."""
    image, _ = make_image(tmp_path)
    async with guest.serve_group([MemberSpec(image, vfio_user=True)], tmp_path) as group:
        config = VmConfig(
            disks=(Function(group.function_socket(1, "legacy")),),
            qemu=QEMU,
            guest_kib=LITTLE_KIB,
            log_dir=tmp_path / "first",
        )
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            for second in (
                Function(group.function_socket(1, "modern")),
                Function(group.function_socket(1, "legacy")),
                guest.Disk(group.socket(1), reconnect=False),
            ):
                with pytest.raises(GuestError, match="QEMU ended with status 1"):
                    async with guest.open_vm(VmConfig(disks=(second,), qemu=QEMU, log_dir=tmp_path / "second")):
                        pass
            await vm.command("verify vda")
            assert await vm.complaints() == []


async def test_hot_plug(tmp_path: Path) -> None:
    """A legacy function comes into a running guest, and goes again if it has no MSI-X (with it QEMU 11.1 aborts)."""
    paths, sums = zip(*(make_image(tmp_path, number) for number in (1, 2)), strict=True)
    specs = [MemberSpec(paths[0], vfio_user=True), MemberSpec(paths[1], vfio_user=True, vectors=0)]
    async with guest.serve_group(specs, tmp_path) as group:
        config = VmConfig(
            disks=(Function(group.function_socket(1, "modern")),),
            qemu=QEMU,
            hotplug_ports=1,
            guest_kib=LITTLE_KIB,
            log_dir=tmp_path / "vm",
        )
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            wanted: tuple[tuple[Kind, str], ...] = (("legacy", "legacy"), ("transitional", "modern"))
            for kind, mode in wanted:
                await vm.hot_plug(Function(group.function_socket(2, kind), "hot"))
                assert (await vm.command("wait vdb 10"))["mode"] == mode
                report = await vm.command("verify vdb")
                assert report["host_sum"] == sums[1]
                await vm.unplug("hot")
                await vm.command("gone vdb 10")
                await member_state(group, 2, "detached")
            await vm.command("verify vda")
            assert await vm.complaints() == []


async def test_the_group_goes_away_under_a_guest(tmp_path: Path) -> None:
    """QEMU has nobody to talk to any more: the guest's disk fails, the guest and its other disks don't."""
    image, _ = make_image(tmp_path)
    async with guest.serve_group([MemberSpec(image, vfio_user=True)], tmp_path) as group:
        config = VmConfig(disks=(Function(group.function_socket(1, "legacy")),), qemu=QEMU, log_dir=tmp_path / "vm")
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            assert await group.stop() == 0
            # Answered by the guest without its disk.
            with pytest.raises(GuestError, match="unknown command hello"):
                await vm.command("hello", 10)


# --- what needs no guest


@pytest.mark.parametrize("version", ["7.2.22", "10.0.13"])
def test_older_qemus_have_no_vfio_user(version: str) -> None:
    qemu = images.QemuCommand(["qemu-system-x86_64"], {}, version)
    with pytest.raises(GuestError, match=r"has no vfio-user-pci; needed: 10\.1 or later"):
        guest.device_arguments(Function(Path("/run/x.sock")), qemu)


def test_machine_pc_has_no_root_ports(tmp_path: Path) -> None:
    config = VmConfig(disks=(Function(Path("/run/x.sock"), port=True),), machine="pc")
    with pytest.raises(GuestError, match="machine pc has no PCIe root ports"):
        guest.vm_arguments(
            config, images.QemuCommand(["q"], {}, "11.1.3"), images.GuestKernel(Path("k"), Path("i"), "6"), tmp_path
        )


def test_the_boot_sector_is_its_source(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "images" / "boot.S"
    code, linked = tmp_path / "boot.o", tmp_path / "boot.bin"
    subprocess.run(["as", "--32", "-o", code, source], check=True, timeout=30)
    options = ["-m", "elf_i386", "-Ttext", "0x7c00", "-e", "start", "--oformat", "binary"]
    subprocess.run(["ld", *options, "-o", linked, code], check=True, timeout=30)
    assembled = linked.read_bytes()
    assert len(assembled) == 512
    built = images.boot_blocks(images.kernel("6.12"), "")[:512]
    # All but the table of areas, which is the disk's.
    assert built[:408] == assembled[:408]
    assert built[438:] == assembled[438:]


def test_what_no_boot_sector_can_boot(tmp_path: Path) -> None:
    kernel = images.kernel("6.12")
    with pytest.raises(ImagesError, match="command line is too long"):
        images.boot_blocks(kernel, "x" * 2048)
    none = tmp_path / "none"
    none.write_bytes(bytes(4096))
    with pytest.raises(ImagesError, match="is no bzImage"):
        images.boot_blocks(images.GuestKernel(none, kernel.initramfs, "0"), "")
    with pytest.raises(GuestError, match="too few for a kernel"):
        guest.make_boot_image(tmp_path / "disk.raw", VmConfig(), 1 << 20)


def test_what_is_wrong_with_admin_commands() -> None:
    before = {"commands": {"LIST_QUERY": 1, "LIST_USE": 1, "DEV_MODE_SET": 0}, "failed": 0}
    good = {"commands": {"LIST_QUERY": 3, "LIST_USE": 3, "DEV_MODE_SET": 0}, "failed": 0}
    assert guest.owner_problems(before, good, "6.12", starts=2) == []
    assert guest.owner_problems(before, before, "6.1") == []
    # One too many, one of another kernel, one that failed.
    assert len(guest.owner_problems(before, good, "6.12")) == 1
    assert len(guest.owner_problems(before, good, "7.2", starts=2)) == 1
    assert guest.owner_problems(before, {**good, "failed": 1}, "6.12", starts=2) == ["1 administration commands failed"]
    assert guest.legacy_command_problems({"LEGACY_COMMON_CFG_READ": 4, "LEGACY_COMMON_CFG_WRITE": 5}) == [
        "no LEGACY_DEV_CFG_READ command"
    ]


def test_plan_of_the_matrix() -> None:
    cells = matrix.plan(["5.10", "6.12"], guest.MODES, ["10.0", "11.1"])
    assert len(cells) == len(set(cells)) == len({cell.name for cell in cells})
    # An older QEMU has nothing to do with functions.
    assert {cell.qemu for cell in cells if cell.via == "vfio-user"} == {"11.1"}
    rows = {cell.row for cell in cells if cell.via == "vfio-user"}
    assert rows == {
        "vfio legacy",
        "vfio legacy INTx",
        "vfio transitional",
        "vfio transitional legacy driver",
        "vfio modern",
        "owner",
        "owner 2 vectors",
        "owner INTx",
        "owner packed",
    }
    assert all(cell.via == "vhost-user" for cell in matrix.plan(["6.12"], guest.MODES, ["11.1"], ["vhost-user"]))
    assert {cell.row for cell in matrix.plan(["6.12"], ["legacy"], ["11.1"], ["vfio-user"])} == {
        "vfio legacy",
        "vfio legacy INTx",
    }


async def test_matrix_without_cells(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        with pytest.raises(GuestError, match=r"vfio-user needs QEMU 10\.1 or later"):
            await matrix.run_matrix(["6.12"], ["legacy"], ["7.2"], via=["vfio-user"], console=Console(file=out))
        with pytest.raises(GuestError, match="unknown way 'usb'"):
            await matrix.run_matrix(["6.12"], ["legacy"], ["7.2"], via=["usb"], console=Console(file=out))


async def test_matrix_cells(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        result = await matrix.run_matrix(
            # Knows nothing of administration virtqueues.
            ["5.10"],
            ["modern"],
            [QEMU],
            via=["vfio-user"],
            console=Console(file=out),
            log_dir=tmp_path / "logs",
        )
    assert result.ok, (tmp_path / "out").read_text()
    assert [cell.cell.row for cell in result.cells] == [
        "vfio modern",
        "owner",
        "owner 2 vectors",
        "owner INTx",
        "owner packed",
    ]
