# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU command lines: what each version and driver mode needs, and that a QEMU takes them."""

from __future__ import annotations

import json
import os
import shlex
import socket
import struct
import subprocess
from pathlib import Path

import pytest
import trio

from vhu_legacy import images, qemu_args
from vhu_legacy.qemu_args import FRONT_DEVICES, BackendArgs, DiskArgs, FrontArgs, Mode, RamFile

DISK = DiskArgs(Path("/run/g/member-1.vhost-user.sock"), queues=4, queue_size=128, name="member-1")


@pytest.mark.parametrize(
    ("version", "reconnect"),
    [
        ((7, 2), "reconnect=1"),
        ((9, 1), "reconnect=1"),
        ((9, 2), "reconnect-ms=1000"),
        ((10, 0), "reconnect-ms=1000"),
        ((11, 1), "reconnect-ms=1000"),
    ],
)
def test_the_way_to_reconnect_depends_on_the_version(version: tuple[int, int], reconnect: str) -> None:
    path = "path=/run/g/member-1.vhost-user.sock"
    assert qemu_args.chardev(DISK, version) == ["-chardev", f"socket,id=member-1-chr,{path},{reconnect}"]
    assert qemu_args.chardev(DISK, version, reconnect=False) == ["-chardev", f"socket,id=member-1-chr,{path}"]


@pytest.mark.parametrize(
    ("mode", "disable"),
    [
        ("legacy", "disable-modern=on,disable-legacy=off"),
        ("transitional", "disable-modern=off,disable-legacy=off"),
        ("modern", "disable-modern=off,disable-legacy=on"),
    ],
)
def test_driver_modes_are_said_in_full(mode: Mode, disable: str) -> None:
    assert qemu_args.device(DISK, mode, extra=["bus=rp0"]) == [
        "-device",
        f"vhost-user-blk-pci,id=member-1,chardev=member-1-chr,num-queues=4,queue-size=128,{disable},bus=rp0",
    ]


@pytest.mark.parametrize("mode", qemu_args.MODES)
@pytest.mark.parametrize("version", [(7, 2), (10, 0), (11, 1)])
def test_a_whole_line(mode: Mode, version: tuple[int, int]) -> None:
    argv = qemu_args.command_line(DISK, mode, version, memory="512M")
    assert argv[0] == "qemu-system-x86_64"
    options = dict(zip(argv[1:-1:2], argv[2:-1:2], strict=True))
    # vhost-user needs guest memory that can be shared, all of it
    assert options["-object"] == "memory-backend-memfd,id=mem0,size=512M,share=on"
    assert options["-m"] == "512M"
    assert "memory-backend=mem0" in options["-machine"]
    assert "num-queues=4" in options["-device"]
    assert ("reconnect-ms=" in options["-chardev"]) is (version >= (9, 2))
    assert shlex.split(qemu_args.shell_line(argv).replace("\\\n", " ")) == argv


def test_commas_and_quotes_in_paths() -> None:
    disk = DiskArgs(Path("/tmp/a,b/it's a dir/x.sock"))
    argv = qemu_args.command_line(disk, "legacy")
    assert "socket,id=vhu1-chr,path=/tmp/a,,b/it's a dir/x.sock,reconnect-ms=1000" in argv
    assert shlex.split(qemu_args.shell_line(argv).replace("\\\n", " ")) == argv


@pytest.mark.parametrize(
    ("text", "version"), [("7.2", (7, 2)), ("7.2.22", (7, 2)), ("10.0", (10, 0)), (" 11.1.3 ", (11, 1))]
)
def test_versions(text: str, version: tuple[int, int]) -> None:
    assert qemu_args.parse_version(text) == version


@pytest.mark.parametrize("text", ["", "7", "x.y", "7.2-rc1", "-7.2", "99999.1", "7.2."])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(ValueError, match="is not a QEMU version such as"):
        qemu_args.parse_version(text)


@pytest.mark.parametrize("text", ["7.1", "2.0", "0.15"])
def test_versions_too_old(text: str) -> None:
    with pytest.raises(ValueError, match=r"too old; needed: 7\.2 or later"):
        qemu_args.parse_version(text)


def test_the_version_that_qemu_prints() -> None:
    assert qemu_args.version_of_output("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright") == (7, 2)
    with pytest.raises(ValueError, match="no version in"):
        qemu_args.version_of_output("bash: qemu: not found")


SOCKET = Path("/run/g/member-1.legacy.vfio-user.sock")


@pytest.mark.parametrize("boot", [True, False])
def test_a_whole_line_over_vfio_user(boot: bool) -> None:
    argv = qemu_args.command_line_vfio(SOCKET, (11, 1), memory="512M", name="member-1", boot=boot)
    options = dict(zip(argv[1:-1:2], argv[2:-1:2], strict=True))
    # else every access of ours to guest memory would go through the socket
    assert options["-object"] == "memory-backend-memfd,id=mem0,size=512M,share=on"
    assert "memory-backend=mem0" in options["-machine"]
    assert json.loads(options["-device"]) == {
        "driver": "vfio-user-pci",
        "id": "member-1",
        "socket": {"type": "unix", "path": str(SOCKET)},
        **({"bootindex": 1} if boot else {}),
    }
    assert shlex.split(qemu_args.shell_line(argv).replace("\\\n", " ")) == argv


def test_a_function_on_a_bus_of_its_own() -> None:
    path = Path('/tmp/a,b/it\'s "a" dir/x.sock')
    (option, text) = qemu_args.function_device(path, (10, 1), name="vf", bus="rp0")
    assert option == "-device"
    # no doubled commas in JSON
    assert json.loads(text)["socket"]["path"] == str(path)
    assert json.loads(text)["bus"] == "rp0"


@pytest.mark.parametrize("version", [(7, 2), (9, 2), (10, 0)])
def test_versions_without_vfio_user(version: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"has no vfio-user-pci; needed: 10\.1 or later.*10\.2.*DMA_READ"):
        qemu_args.command_line_vfio(SOCKET, version)


# --- virtio-vhost-user --------------------------------------------------------------------------------------

BACKEND = BackendArgs(Path("/run/g/device-0d.vhost-user.sock"), 8, "0d")
FRONT = Path("/run/g/device-0d.front.sock")


def pairs(argv: list[str]) -> dict[str, str]:
    return dict(zip(argv[1:-1:2], argv[2:-1:2], strict=True))


def test_the_backend_vm_over_vhost_user() -> None:
    argv = qemu_args.command_line_backend(BACKEND, (11, 1), memory="512M")
    options = pairs(argv)
    # the device's rings are in the backend VM's memory
    assert options["-object"] == "memory-backend-memfd,id=mem0,size=512M,share=on"
    # an id must begin with a letter, and with reconnect-ms the device doesn't start
    assert options["-chardev"] == "socket,id=vvu-0d-chr,path=/run/g/device-0d.vhost-user.sock"
    assert options["-device"] == (
        "vhost-user-test-device-pci,id=vvu-0d,chardev=vvu-0d-chr,virtio-id=32,num_vqs=19,config_size=24,vq_size=64"
    )
    assert shlex.split(qemu_args.shell_line(argv).replace("\\\n", " ")) == argv
    most = qemu_args.backend_device(BackendArgs(BACKEND.socket, 126, "x"), (11, 1))
    # QEMU names queues by 8 bits
    assert "num_vqs=255," in most[-1]


@pytest.mark.parametrize("version", [(7, 2), (10, 2), (11, 0)])
def test_versions_without_shared_memory(version: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"no vhost-user device with shared memory; needed: 11\.1"):
        qemu_args.command_line_backend(BACKEND, version)


def test_the_backend_vm_over_vfio_user() -> None:
    options = pairs(qemu_args.command_line_backend(BACKEND, (11, 1), via="vfio-user"))
    assert json.loads(options["-device"]) == {
        "driver": "vfio-user-pci",
        "id": "vvu-0d",
        "socket": {"type": "unix", "path": str(BACKEND.socket)},
    }
    assert "-chardev" not in options
    with pytest.raises(ValueError, match="has no vfio-user-pci"):
        qemu_args.command_line_backend(BACKEND, (10, 0), via="vfio-user")


@pytest.mark.parametrize(
    ("kind", "queues", "vrings", "device"),
    [
        ("blk", 3, 3, "vhost-user-blk-pci,id=vvu-0d,chardev=vvu-0d-chr,num-queues=3,MODE"),
        ("scsi", 2, 4, "vhost-user-scsi-pci,id=vvu-0d,chardev=vvu-0d-chr,num_queues=2,MODE"),
        ("net", 1, 2, "virtio-net-pci,id=vvu-0d,netdev=vvu-0d-net,MODE"),
        ("net", 2, 4, "virtio-net-pci,id=vvu-0d,netdev=vvu-0d-net,mq=on,vectors=6,MODE"),
        ("fs", 2, 3, "vhost-user-fs-pci,id=vvu-0d,chardev=vvu-0d-chr,num-request-queues=2,tag=a,,b"),
        ("rng", 1, 1, "vhost-user-rng-pci,id=vvu-0d,chardev=vvu-0d-chr"),
        ("snd", 1, 4, "vhost-user-snd-pci,id=vvu-0d,chardev=vvu-0d-chr"),
    ],
)
def test_the_front_end_vm(kind: str, queues: int, vrings: int, device: str) -> None:
    front = FrontArgs(FRONT, kind, "0d", queues, "a,b")
    assert qemu_args.vrings_of(front) == vrings
    options = pairs(qemu_args.command_line_front(front, "transitional", (11, 1), memory="2G"))
    assert options["-object"] == "memory-backend-memfd,id=mem0,size=2G,share=on"
    assert options["-device"] == device.replace("MODE", "disable-modern=off,disable-legacy=off")
    # who doesn't wait for the connection doesn't start with it
    reconnects = ",reconnect-ms=1000" if kind in ("blk", "scsi", "net") else ""
    assert options["-chardev"] == f"socket,id=vvu-0d-chr,path={FRONT}{reconnects}"
    assert ("-netdev" in options) is (kind == "net")
    if kind == "net":
        assert options["-netdev"] == f"vhost-user,id=vvu-0d-net,chardev=vvu-0d-chr,queues={queues}"


def test_the_front_end_vm_of_older_versions() -> None:
    def chardev(kind: str, version: tuple[int, int]) -> str:
        return qemu_args.front_device(FrontArgs(FRONT, kind, "0d"), "legacy", version)[1]

    assert chardev("blk", (7, 2)).endswith(",reconnect=1")
    assert chardev("scsi", (7, 2)).endswith(".sock")
    assert chardev("scsi", (10, 0)).endswith(",reconnect-ms=1000")


def test_what_a_front_end_vm_cannot_have() -> None:
    with pytest.raises(ValueError, match="vhost-user-fs-pci is modern only"):
        qemu_args.front_device(FrontArgs(FRONT, "fs", "0d"), "legacy", (11, 1))
    with pytest.raises(ValueError, match="vhost-user-rng-pci has no choice of queues"):
        qemu_args.front_device(FrontArgs(FRONT, "rng", "0d", 2), "modern", (11, 1))
    # it passes a socket on, which the slave can't have
    assert "gpu" not in FRONT_DEVICES


@pytest.mark.parametrize(
    ("size", "text"), [(3 << 30, "3G"), (1 << 40, "1024G"), (1536 << 20, "1536M"), (1 << 20, "1M"), (4096, "4K")]
)
def test_the_front_end_vms_memory_is_the_ram_file(size: int, text: str) -> None:
    ram = RamFile(Path("/dev/shm/a,b"), size)
    argv = qemu_args.command_line_front(FrontArgs(FRONT, "blk", "0d"), ram=ram, memory="64M")
    options = pairs(argv)
    assert options["-m"] == text
    assert options["-object"] == f"memory-backend-file,id=mem0,size={text},mem-path=/dev/shm/a,,b,share=on"
    assert "memory-backend=mem0" in options["-machine"]


def first_message(argv: list[str], env: dict[str, str], path: Path) -> tuple[bytes, str]:
    """What a QEMU says first to who listens at `path`, and what it complains of."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(30)
        with subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
        ) as process:
            try:
                with listener.accept()[0] as connection:
                    connection.settimeout(30)
                    message = connection.recv(12)
            finally:
                process.kill()
            assert process.stderr is not None
            return message, process.stderr.read()


@pytest.mark.guest
@pytest.mark.parametrize("kind", FRONT_DEVICES)
async def test_qemu_is_a_master(tmp_path: Path, kind: str) -> None:
    """It has understood the options, waits for its back end, and begins to ask."""
    await images.ensure([], ["11.1"])
    qemu = images.qemu_command("11.1")
    path = tmp_path / "front.sock"
    front = FrontArgs(path, kind, "0d", 2 if FRONT_DEVICES[kind].queues else 1, "a,b")
    ram = RamFile(tmp_path / "ram", 64 << 20)
    argv = qemu_args.command_line_front(front, "transitional", qemu.series, ram=ram, binary=qemu.argv)
    environment = {**os.environ, **qemu.env}
    message, complaint = await trio.to_thread.run_sync(first_message, [*argv, "-S"], environment, path)
    assert len(message) == 12, complaint
    # GET_FEATURES
    assert struct.unpack("<III", message) == (1, 1, 0)
    # a netdev is there before the machine's memory
    assert kind == "net" or ram.path.stat().st_size == ram.size


@pytest.mark.guest
async def test_qemu_takes_the_line_over_vfio_user(tmp_path: Path) -> None:
    """As below, on a QEMU that has it."""
    await images.ensure([], ["11.1"])
    qemu = images.qemu_command("11.1")
    argv = qemu_args.command_line_vfio(tmp_path / "none.sock", qemu.series, memory="64M", binary=qemu.argv)
    done = await trio.to_thread.run_sync(
        lambda: subprocess.run(
            argv, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, env={**os.environ, **qemu.env}
        )
    )
    assert done.returncode == 1
    assert "none.sock" in done.stderr
    assert "No such file or directory" in done.stderr


@pytest.mark.qemu
@pytest.mark.parametrize("mode", qemu_args.MODES)
def test_the_installed_qemu_takes_the_options(tmp_path: Path, mode: Mode) -> None:
    """It gets as far as connecting to a socket that isn't there: everything before that was understood."""
    output = subprocess.run([qemu_args.BINARY, "--version"], capture_output=True, text=True, timeout=30, check=True)
    version = qemu_args.version_of_output(output.stdout)
    argv = qemu_args.command_line(DiskArgs(tmp_path / "none.sock"), mode, version, memory="64M")
    argv = [text.replace(",reconnect=1", "").replace(",reconnect-ms=1000", "") for text in argv]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert "none.sock" in done.stderr
    assert "No such file or directory" in done.stderr
