# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""QEMU command lines: what each version and driver mode needs, and that a QEMU takes them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import trio

from vhu_legacy import images, qemu_args
from vhu_legacy.qemu_args import DiskArgs, Mode

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
