# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Guests that are back ends, as far as one guest alone can show it: its daemons and what its host can tell them, with a
script in vvu-bridge's place. And what the guest on the other side does, on the same daemons run by the host: its file
system, its legacy driver.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from vhu_legacy import backend_guest, guest, images, initramfs
from vhu_legacy.errors import GuestError
from vhu_legacy.guest import FileSystem, VmConfig

pytestmark = pytest.mark.guest

IMAGE_BYTES = 16 << 20
BRIDGE = """#!/bin/busybox sh
trap 'echo told to end; exit 0' TERM
echo "slave up with $*" >&2
while :; do usleep 20000; done
"""


@pytest.fixture(scope="session", autouse=True)
def _guest_images() -> None:
    async def fetch() -> None:
        await images.ensure(["5.10", "6.12"], [backend_guest.QEMU], daemons=images.DAEMONS)

    trio.run(fetch)


@pytest.fixture
def bridge(tmp_path: Path) -> dict[str, Path]:
    """A program in vvu-bridge's place that says what it was started with."""
    path = tmp_path / "bridge"
    path.write_text(BRIDGE)
    return {"vvu-bridge": path}


async def test_daemons_in_a_guest(tmp_path: Path, bridge: dict[str, Path]) -> None:
    image = tmp_path / "disk.raw"
    host_sum = guest.make_image(image, IMAGE_BYTES)
    config = backend_guest.backend_config(None, image=image, programs=bridge, log_dir=tmp_path / "vm")
    async with backend_guest.open_backend(config) as back:
        for program, name in (("qemu-storage-daemon", "qemu-storage-daemon version"), ("virtiofsd", "virtiofsd 1.")):
            status, lines = await back.run(program, "--version")
            assert status == 0
            assert lines[0].startswith(name)
        await back.start_daemon("blk")
        first = await back.pids()
        assert first["daemon"] is not None
        assert first["bridge"] is None
        with pytest.raises(GuestError, match="a daemon runs already"):
            await back.start_daemon("fs")
        assert await back.area_sum(0, guest.HOST_KIB * 1024) == host_sum
        await back.kill("daemon", "TERM")
        assert await back.wait_ended("daemon") == 0
        with pytest.raises(GuestError, match="no daemon runs"):
            await back.kill("daemon")
        await back.restart("daemon")
        assert (await back.pids())["daemon"] not in (None, first["daemon"])
        await back.kill("daemon")
        assert await back.wait_ended("daemon") == 128 + 9
        await back.start_daemon("fs")
        files = await back.file_sums()
        assert files["empty"] == hashlib.sha256(b"").hexdigest()
        assert {"text", "deep/page", "deep/deeper/odd"} < set(files)
        await back.kill("daemon")
        with pytest.raises(GuestError, match="no daemon floppy"):
            await back.start_daemon("floppy")  # type: ignore[arg-type]
        assert await back.vm.complaints() == []
        await back.vm.command("poweroff")
        assert await back.vm.wait_exit() == 0
    assert not (tmp_path / "vm/initrd").exists()


async def test_a_back_end_comes_back(tmp_path: Path, bridge: dict[str, Path]) -> None:
    config = backend_guest.backend_config(
        None, store_mib=8, start="blk", programs=bridge, bridge_arguments=("--poll-us=50",), log_dir=tmp_path / "vm"
    )
    async with backend_guest.open_backend(config) as back:
        words = "slave up with --socket /tmp/daemon.sock --poll-us=50"
        assert await back.wait_line("bridge", "slave up") == words
        await back.kill("bridge", "TERM")
        await back.wait_line("bridge", "told to end")
        assert await back.wait_ended("bridge") == 0
        await back.start_bridge("--once")
        assert await back.wait_line("bridge", "slave up") == f"{words} --once"
        await back.restart("bridge")
        assert await back.wait_ended("bridge") == 128 + 9
        assert await back.wait_line("bridge", "slave up") == f"{words} --once"
        for way in ("reboot", "panic"):
            await back.vm.command(way)
            # Without a word from here.
            await back.ready()
            assert await back.wait_line("bridge", "slave up") == words
            assert None not in (await back.pids()).values()


async def test_a_back_end_that_cannot_start(tmp_path: Path, bridge: dict[str, Path]) -> None:
    config = backend_guest.backend_config(None, start="blk", programs=bridge, append=("vhu.store=/dev/vdx",))
    with pytest.raises(GuestError, match="the daemon ended at once"):
        async with backend_guest.open_backend(config):
            pass


@contextlib.asynccontextmanager
async def daemon(argv: list[str], socket: Path) -> AsyncIterator[None]:
    """A vhost-user daemon on this machine; ended with the context."""
    process = await trio.lowlevel.open_process(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with trio.fail_after(20):
            while not await trio.Path(socket).is_socket():
                assert process.poll() is None
                await trio.sleep(0.02)
        yield
    finally:
        with trio.CancelScope(shield=True):
            process.terminate()
            await process.wait()


@pytest.fixture
def virtiofsd(tmp_path: Path) -> list[str]:
    """The guests' virtiofsd, on this machine."""
    root = tmp_path / "daemons"
    root.mkdir()
    with images.daemons().open("rb") as archive:
        subprocess.run(
            ["cpio", "-id", "--quiet", "--no-preserve-owner"], stdin=archive, cwd=root, check=True, timeout=60
        )
    return [f"{root}/lib64/{initramfs.LOADER}", "--library-path", f"{root}/lib64", f"{root}/bin/virtiofsd"]


@pytest.mark.parametrize("kernel", ["5.10", "6.12"])
async def test_file_system(tmp_path: Path, virtiofsd: list[str], kernel: str) -> None:
    # A module in 5.10, built into 6.12.
    share = tmp_path / "share"
    (share / "deep").mkdir(parents=True)
    (share / "deep/odd name").write_bytes(os.urandom(300001))
    socket = tmp_path / "fs.sock"
    argv = [*virtiofsd, f"--socket-path={socket}", f"--shared-dir={share}", "--sandbox=none", "--seccomp=none"]
    async with daemon(argv, socket):
        config = VmConfig(devices=(FileSystem(socket, "share"),), kernel=kernel, log_dir=tmp_path / "vm")
        async with guest.open_vm(config) as vm:
            await vm.wait_event("ready")
            with pytest.raises(GuestError, match="mount of other"):
                await vm.command("fs other")
            for _ in range(2):
                before = {str(p.relative_to(share)): p for p in share.rglob("*") if p.is_file()}
                wanted = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in before.items()}
                report = await vm.command("fs share")
                assert report["files"] == wanted
                written = share / report["file"]
                assert written.stat().st_size == report["guest_bytes"] == config.guest_kib * 1024
                assert hashlib.sha256(written.read_bytes()).hexdigest() == report["guest_sum"]
            assert {path.name for path in share.iterdir()} == {"deep", "from-guest"}
            assert await vm.complaints() == []
            await vm.command("poweroff")
            await vm.wait_exit()


async def test_file_system_by_itself(tmp_path: Path, virtiofsd: list[str]) -> None:
    share = tmp_path / "share"
    share.mkdir()
    socket = tmp_path / "fs.sock"
    argv = [*virtiofsd, f"--socket-path={socket}", f"--shared-dir={share}", "--sandbox=none", "--seccomp=none"]
    memory = tmp_path / "memory"
    async with daemon(argv, socket):
        config = VmConfig(
            devices=(FileSystem(socket, "share"),), task="fs", append=("vhu.tag=share",), memory_file=memory
        )
        async with guest.open_vm(config) as vm:
            report = await vm.wait_event("checked")
            await vm.wait_event("done")
            assert await vm.wait_exit() == 0
    assert memory.stat().st_size == config.memory_mib << 20
    assert report["files"] == {}
    assert hashlib.sha256((share / "from-guest").read_bytes()).hexdigest() == report["guest_sum"]


@pytest.mark.parametrize("mode", ["legacy", "modern"])
async def test_our_daemon_takes_any_driver(tmp_path: Path, mode: guest.Mode) -> None:
    image, socket = tmp_path / "disk.raw", tmp_path / "blk.sock"
    host_sum = guest.make_image(image, IMAGE_BYTES)
    async with daemon([str(initramfs.built_programs()["vhu-blk"]), str(socket), str(image)], socket):
        result = await guest.boot(socket, mode=mode, log_dir=tmp_path / "vm")
    assert result.driver_mode == mode
    assert list(guest.check_image(image, result, host_sum)) == []
    assert result.complaints == ()
