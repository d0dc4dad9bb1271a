# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a guest that is a back end is made of: archives laid over an initramfs, daemons and libraries, arguments."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tomllib
from pathlib import Path

import pytest
import trio

from vhu_legacy import backend_guest, guest, images, initramfs
from vhu_legacy.errors import GuestError, ImagesError
from vhu_legacy.guest import VhostUserDevice

from .test_images import module

IMAGES = Path(images.__file__).parent.parent / "images"
OLD = images.QemuCommand(["qemu"], {}, "7.2.22")
NEW = images.QemuCommand(["qemu"], {}, "11.1.3")


# --- archives


def sample() -> bytes:
    archive = initramfs.Archive()
    archive.file("deep/er/data", b"12345", executable=True)
    archive.file("deep/other", b"")
    archive.link("deep/link", "/elsewhere")
    archive.directory("deep")
    return archive.finish()


def test_an_archive_is_one_for_cpio(tmp_path: Path) -> None:
    assert sample() == sample()
    command = ["cpio", "-id", "--quiet", "--no-preserve-owner"]
    subprocess.run(command, input=sample(), cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "deep/er/data").read_bytes() == b"12345"
    assert (tmp_path / "deep/er/data").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "deep/other").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "deep/other").read_bytes() == b""
    assert str((tmp_path / "deep/link").readlink()) == "/elsewhere"


def test_directories_come_once_and_before_what_is_in_them() -> None:
    listing = subprocess.run(["cpio", "-t", "--quiet"], input=sample(), capture_output=True, check=True, timeout=60)
    assert listing.stdout.decode().split() == ["deep", "deep/er", "deep/er/data", "deep/other", "deep/link"]


@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_joined_archives_begin_where_the_kernel_looks(tmp_path: Path, odd: int) -> None:
    # A compressed one may end anywhere; zeros that follow are skipped.
    first = gzip.compress(sample(), mtime=0) + bytes(odd)
    (tmp_path / "first").write_bytes(first)
    target = io.BytesIO()
    initramfs.join(target, [tmp_path / "first", sample(), sample()])
    data = target.getvalue()
    assert data.startswith(first)
    start = data.index(b"070701", len(first))
    assert start % 4 == 0
    assert not any(data[len(first) : start])
    assert data[start:] == sample() + sample()


# --- the daemons' libraries


def root_with_loader(root: Path, output: str, status: int = 0) -> None:
    """A root whose loader says this of any program."""
    loader = root / initramfs.LIBRARIES / initramfs.LOADER
    loader.parent.mkdir(parents=True)
    loader.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
    loader.chmod(0o755)
    for program in initramfs.DAEMON_PROGRAMS:
        path = root / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"program")


def test_libraries_are_those_of_the_root(tmp_path: Path) -> None:
    inside = tmp_path / initramfs.LIBRARIES
    root_with_loader(
        tmp_path,
        f"\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => {inside}/libc.so.6 (0x2)\n"
        f"\t/lib64/ld-linux-x86-64.so.2 => {inside}/{initramfs.LOADER} (0x3)",
    )
    (inside / "libc.so.6").write_bytes(b"library")
    assert initramfs.library_closure(tmp_path, initramfs.DAEMON_PROGRAMS) == {"libc.so.6": inside / "libc.so.6"}
    initramfs.write_daemons(tmp_path, tmp_path / "archive")
    listing = subprocess.run(
        ["cpio", "-t", "--quiet"],
        input=(tmp_path / "archive").read_bytes(),
        capture_output=True,
        check=True,
        timeout=60,
    )
    wanted = {"bin/qemu-storage-daemon", "bin/virtiofsd", f"lib64/{initramfs.LOADER}", "lib64/libc.so.6"}
    assert wanted <= set(listing.stdout.decode().split())


@pytest.mark.parametrize(
    ("output", "status", "words"),
    [
        ("\tlibx.so.1 => not found", 0, r"needs libx\.so\.1, which the packages don't hold \(not found\)"),
        ("\tlibx.so.1 => /usr/lib/libx.so.1 (0x1)", 0, r"don't hold \(/usr/lib/libx\.so\.1\)"),
        ("broken", 1, r"cannot tell the libraries of usr/bin/qemu-storage-daemon: broken"),
    ],
)
def test_libraries_of_this_machine_do_not_count(tmp_path: Path, output: str, status: int, words: str) -> None:
    root_with_loader(tmp_path, output, status)
    with pytest.raises(ImagesError, match=words):
        initramfs.library_closure(tmp_path, initramfs.DAEMON_PROGRAMS)


def test_incomplete_packages(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="no dynamic loader"):
        initramfs.library_closure(tmp_path, initramfs.DAEMON_PROGRAMS)
    root_with_loader(tmp_path, "")
    (tmp_path / "usr/libexec/virtiofsd").unlink()
    with pytest.raises(ImagesError, match="the packages hold no usr/libexec/virtiofsd"):
        initramfs.library_closure(tmp_path, initramfs.DAEMON_PROGRAMS)


def test_daemons_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VHU_LEGACY_CACHE", str(tmp_path))
    with pytest.raises(ImagesError, match="the daemons of trixie are not in the cache"):
        images.daemons()
    with pytest.raises(ImagesError, match="no daemons of 'etch'; known: trixie"):
        trio.run(lambda: images.ensure([], [], daemons=["etch"]))
    place = tmp_path / "daemons" / "trixie"
    place.mkdir(parents=True)
    (place / "initramfs.img").write_bytes(sample())
    stamp = {"inputs": images._daemon_inputs("trixie"), "facts": {"version": "1", "packages": {}}}
    stamp["files"] = images._tree_digest(place)
    (place / "stamp.json").write_text(json.dumps(stamp))

    def state() -> str:
        return next(row.state for row in images.status() if row.kind == "daemons")

    assert state() == "ready"
    assert images.daemons() == place / "initramfs.img"
    (place / "initramfs.img").write_bytes(b"")
    assert state() == "damaged"


# --- modules on request


def test_modules_that_are_loaded_on_request(tmp_path: Path) -> None:
    module(tmp_path, "virtio")
    module(tmp_path, "virtio_blk", "virtio")
    module(tmp_path, "fuse")
    module(tmp_path, "virtiofs", "fuse,virtio")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/uio/uio_pci_generic.ko\n")
    target = tmp_path / "target"
    target.mkdir()
    images._add_wanted_modules(tmp_path, ["virtio_blk", "+virtiofs", "+uio_pci_generic", "+not_in_this_one?"], target)
    assert (target / "order").read_text().split() == ["virtio", "virtio_blk"]
    assert (target / "virtiofs.order").read_text().split() == ["fuse", "virtio", "virtiofs"]
    # Built in: there is nothing to load. Absent: the guest must be able to tell.
    assert (target / "uio_pci_generic.order").read_text() == ""
    assert not (target / "not_in_this_one.order").exists()
    assert {path.name for path in target.glob("*.ko")} == {
        "virtio.ko",
        "virtio_blk.ko",
        "fuse.ko",
        "virtiofs.ko",
    }


@pytest.mark.parametrize("script", ["common", "init", "init-backend"])
def test_the_guests_shell_can_read_its_scripts(script: str) -> None:
    subprocess.run([images._busybox(), "sh", "-n", IMAGES / script], check=True, timeout=60)


# --- programs and arguments


def test_programs_must_be_there_and_static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARGO_TARGET_DIR", str(tmp_path))
    with pytest.raises(ImagesError, match="vvu-bridge is missing: run `make vvu-bridge`"):
        initramfs.built_programs()
    directory = tmp_path / "x86_64-unknown-linux-gnu/guest"
    (directory / "examples").mkdir(parents=True)
    (directory / "vvu-bridge").write_bytes(b"\x7fELF static")
    (directory / "examples/vhu-blk").write_bytes(b"\x7fELF /lib64/ld-linux-x86-64.so.2")
    with pytest.raises(ImagesError, match="vhu-blk is dynamically linked"):
        initramfs.built_programs()
    (directory / "examples/vhu-blk").write_bytes(b"\x7fELF static")
    assert set(initramfs.built_programs()) == {"vvu-bridge", "vhu-blk"}


def test_device_over_vhost_user() -> None:
    device = VhostUserDevice(Path("/run/a,b.sock"), 4)
    chardev, text = guest.other_device_arguments(device, NEW)[1::2]
    assert chardev == "socket,id=char-vvu0,path=/run/a,,b.sock"
    # Two queues, a call and an err doorbell for each of four, and the log's.
    assert text == (
        "vhost-user-test-device-pci,id=vvu0,chardev=char-vvu0,virtio-id=32,num_vqs=11,config_size=24,vq_size=64"
    )
    with pytest.raises(GuestError, match=r"QEMU 7\.2\.22 has no vhost-user device with shared memory; needed: 11\.1"):
        guest.other_device_arguments(device, OLD)


def test_device_over_vfio_user() -> None:
    device = VhostUserDevice(Path("/run/vvu.sock"), 4, "vfio-user")
    _, text = guest.other_device_arguments(device, NEW)
    assert json.loads(text)["socket"] == {"type": "unix", "path": "/run/vvu.sock"}
    with pytest.raises(GuestError, match="no vfio-user-pci"):
        guest.other_device_arguments(device, OLD)


def test_other_devices() -> None:
    assert guest.other_device_arguments(guest.FileSystem(Path("/run/fs"), "a,b"), OLD)[3] == (
        "vhost-user-fs-pci,id=fs0,chardev=char-fs0,tag=a,,b,num-request-queues=1"
    )
    assert guest.other_device_arguments(guest.Drive(Path("/d,1")), OLD)[1].endswith("file.filename=/d,,1")


@pytest.fixture
def daemons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    archive = tmp_path / "daemons.img"
    archive.write_bytes(sample())
    monkeypatch.setattr(images, "daemons", lambda: archive)
    return archive


def test_what_a_back_end_is_told(tmp_path: Path, daemons: Path) -> None:
    device = VhostUserDevice(tmp_path / "socket", 2)
    config = backend_guest.backend_config(
        device,
        image=tmp_path / "disk",
        start="fs",
        queues=2,
        programs={},
        bridge_arguments=("--interrupts=poll", "--poll-us=50"),
    )
    words = guest.kernel_arguments(config).split()
    assert {"rdinit=/init-backend", "vhu.disks=1", "vhu.store=/dev/vda", "vhu.queues=2", "vhu.start=fs"} <= set(words)
    assert "vhu.bridge=--interrupts=poll,--poll-us=50" in words
    assert config.devices == (guest.Drive(tmp_path / "disk"), device)
    assert config.overlays[0] == daemons
    argv = guest.vm_arguments(config, NEW, images.GuestKernel(Path("k"), Path("i"), "6.12"), tmp_path)
    assert argv[argv.index("-initrd") + 1] == str(tmp_path / "initrd")


def test_a_back_end_without_a_disk_of_its_own(daemons: Path) -> None:
    config = backend_guest.backend_config(None, store_mib=32)
    assert config.memory_mib == backend_guest.MEMORY_MIB + 32
    assert {"vhu.disks=0", "vhu.store=32"} <= set(guest.kernel_arguments(config).split())


@pytest.mark.parametrize("word", ["a b", "a,b", "", 'a"b'])
@pytest.mark.usefixtures("daemons")
def test_arguments_that_a_command_line_cannot_carry(word: str) -> None:
    with pytest.raises(GuestError, match="can't have commas, spaces or quotes"):
        backend_guest.backend_config(None, bridge_arguments=(word,))


def test_memory_in_a_file(tmp_path: Path) -> None:
    config = guest.VmConfig(memory_file=tmp_path / "a,b")
    argv = guest.vm_arguments(config, NEW, images.GuestKernel(Path("k"), Path("i"), "6.12"), tmp_path)
    wanted = f"memory-backend-file,share=on,mem-path={tmp_path}/a,,b,id=ram,size=256M"
    assert argv[argv.index("-object") + 1] == wanted


def test_devices_in_a_group_file() -> None:
    one = guest.VhostUserDeviceSpec("one")
    two = guest.VhostUserDeviceSpec("two", 4, "1GiB", vfio_user=True, ram_file=Path('/dev/shm/a"b'), ram_mib=256)
    text = guest.group_file([], "name", vhost_user_devices=[one, two])
    assert tomllib.loads(text)["vhost_user_devices"] == [
        {"name": "one", "max_queues": 1, "shared_memory": "4GiB"},
        {
            "name": "two",
            "max_queues": 4,
            "shared_memory": "1GiB",
            "vfio_user": True,
            "ram_file": '/dev/shm/a"b',
            "ram_size": "256MiB",
        },
    ]
