# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Images: deriving sources from apt's configuration, choosing modules, the cache's stamps and lock, refusing
unsigned archives.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import lzma
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from vhu_legacy import images
from vhu_legacy.errors import ImagesError
from vhu_legacy.images import AptRoot, AptSource

# --- apt's configuration


def test_one_line_sources() -> None:
    text = """
# deb http://commented.example/debian bookworm main
deb http://mirror.example/debian bookworm main contrib  # with a remark
deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian trixie main
deb-src http://mirror.example/debian bookworm main
deb   http://mirror.example/security   bookworm-security main
deb http://broken.example/
"""
    found = list(images.parse_one_line(text))
    assert [(entry.uri, entry.suite) for entry in found] == [
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "trixie"),
        ("http://mirror.example/security", "bookworm-security"),
    ]
    assert found[0].components == ("main", "contrib")
    assert found[1].signed_by == "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert [entry.is_security for entry in found] == [False, False, True]


def test_deb822_sources() -> None:
    text = """\
# the archive
Types: deb deb-src
URIs: http://one.example/debian http://two.example/debian
Suites: bookworm
 bookworm-updates
# a comment amid a stanza
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://inline.example/debian
Suites: sid
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abcd
"""
    found = list(images.parse_deb822(text))
    assert [(entry.uri.split("/")[2], entry.suite) for entry in found] == [
        ("one.example", "bookworm"),
        ("one.example", "bookworm-updates"),
        ("two.example", "bookworm"),
        ("two.example", "bookworm-updates"),
        ("inline.example", "sid"),
    ]
    assert "BEGIN PGP" in (found[-1].signed_by or "")


def test_only_the_debian_archive_is_derived_from() -> None:
    entries = [
        AptSource("http://a.example", "bookworm", ("main",), None),
        AptSource("http://a.example", "bookworm/updates", ("main",), None),
        AptSource("http://b.example", "bookworm", ("stable",), None),
        AptSource("http://c.example", "bookworm", ("main",), "/etc/apt/keyrings/vendor.gpg"),
        AptSource("http://d.example", "bookworm-pgdg", ("main",), None),
        AptSource("http://e.example", "noble", ("main",), None),
    ]
    assert images.debian_sources(entries) == entries[:2]


def test_this_machine_has_sources() -> None:
    assert images.machine_sources()


@pytest.mark.parametrize(
    ("left", "right", "order"),
    [
        ("6.12.9-1", "6.12.117-1", -1),
        ("1:11.1.3+ds-1~bpo13+1", "1:11.1.3+ds-1", -1),
        ("5.10.262-1", "5.10.223-1", 1),
        ("1-1", "1-1", 0),
    ],
)
def test_version_order(left: str, right: str, order: int) -> None:
    assert images.compare_versions(left, right) == order


# --- an archive without a valid signature


def unsigned_archive(directory: Path) -> list[AptSource]:
    """A complete archive but for the signature: what a hostile mirror could serve."""
    index = directory / "dists/bookworm/main/binary-amd64"
    index.mkdir(parents=True)
    packages = (
        "Package: linux-image-6.1.0-99-cloud-amd64\nVersion: 6.1.999-1\nArchitecture: amd64\n"
        f"Filename: pool/evil.deb\nSize: 4\nSHA256: {hashlib.sha256(b'evil').hexdigest()}\n\n"
    ).encode()
    (index / "Packages").write_bytes(packages)
    release = "Origin: Debian\nSuite: oldstable\nCodename: bookworm\nArchitectures: amd64\nComponents: main\n"
    release += "Date: Sat, 01 Jan 2028 00:00:00 UTC\nSHA256:\n"
    release += f" {hashlib.sha256(packages).hexdigest()} {len(packages)} main/binary-amd64/Packages\n"
    (directory / "dists/bookworm/Release").write_text(release)
    return [AptSource(f"file:{directory}", "bookworm", ("main",), None)]


async def test_unsigned_archive_is_refused(tmp_path: Path) -> None:
    # Neither a machine-wide permission nor an option of the source entry may let it through.
    apt = AptRoot(tmp_path / "apt", sources=unsigned_archive(tmp_path / "archive"))
    with pytest.raises(ImagesError, match=r"(?s)no debian-archive-keyring in this machine's own suites.*not signed"):
        await images._find_kernel(apt, "6.1", images._Report(None))


async def test_downloads_must_have_the_listed_hash(tmp_path: Path) -> None:
    wanted = images._Package("x_1_amd64.deb", 4, hashlib.sha256(b"good").hexdigest())
    assert images._damaged(tmp_path, [wanted]) == [wanted]
    (tmp_path / wanted.file).write_bytes(b"evil")
    assert images._damaged(tmp_path, [wanted]) == [wanted]
    (tmp_path / wanted.file).write_bytes(b"good")
    assert images._damaged(tmp_path, [wanted]) == []


# --- modules


def module(directory: Path, name: str, depends: str = "", suffix: str = ".ko") -> None:
    data = b"\x7fELF rest\0license=GPL\0depends=" + depends.encode() + b"\0name=" + name.encode() + b"\0"
    path = directory / "kernel/drivers" / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {".ko": data, ".ko.xz": lzma.compress(data), ".ko.gz": gzip.compress(data)}[suffix]
    path.write_bytes(packed)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    module(tmp_path, "virtio_blk", "virtio,virtio_ring", ".ko.xz")
    module(tmp_path, "virtio-ring", "virtio", ".ko.gz")
    module(tmp_path, "virtio")
    module(tmp_path, "unrelated")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    found = images.resolve_modules(tmp_path, ["virtio_pci", "virtio_blk", "virtio_only_in_others?"])
    assert [name for name, _ in found] == ["virtio", "virtio_ring", "virtio_blk"]
    assert all(data.startswith(b"\x7fELF") for _, data in found)


def test_missing_module_is_named(tmp_path: Path) -> None:
    module(tmp_path, "virtio_blk", "virtio_ring")
    with pytest.raises(ImagesError, match=r"no module virtio_ring \(virtio_blk\)"):
        images.resolve_modules(tmp_path, ["virtio_blk"])


def test_modules_that_need_each_other(tmp_path: Path) -> None:
    module(tmp_path, "a", "b")
    module(tmp_path, "b", "a")
    with pytest.raises(ImagesError, match="depend on each other: a -> b -> a"):
        images.resolve_modules(tmp_path, ["a"])


# --- the cache


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("VHU_LEGACY_CACHE", str(cache))
    return cache


@pytest.fixture
def copied_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own with the 6.12 kernel in it."""
    trio.run(images.ensure, ["6.12"], [])
    source = images.cache_dir() / "kernels" / "6.12"
    place = tmp_path / "cache" / "kernels" / "6.12"
    shutil.copytree(source, place)
    monkeypatch.setenv("VHU_LEGACY_CACHE", str(tmp_path / "cache"))
    return place


async def refuse_to_run(*argv: Any, **_: Any) -> tuple[int, str]:
    raise AssertionError(f"{argv[0]} is not needed")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VHU_LEGACY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert images.cache_dir() == Path("/home/someone/.cache/vhu-legacy")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert images.cache_dir() == Path("/xdg/vhu-legacy")
    monkeypatch.setenv("VHU_LEGACY_CACHE", "/explicit")
    assert images.cache_dir() == Path("/explicit")


def test_what_is_missing_says_how_to_get_it(empty_cache: Path) -> None:
    with pytest.raises(ImagesError, match=r"kernel 6\.12 is not in the cache: run `vhu-legacy images --kernel 6\.12`"):
        images.kernel("6.12")
    with pytest.raises(ImagesError, match=r"run `vhu-legacy images --qemu 99\.9`"):
        images.qemu_command("99.9")
    assert {row.state for row in images.status()} <= {"missing", "system"}
    assert not empty_cache.exists()


async def test_unknown_names(empty_cache: Path) -> None:
    with pytest.raises(ImagesError, match=r"unknown kernel '4\.19'; known: 5\.10, 6\.1, 6\.12, 7\.2"):
        await images.ensure(["4.19"], [])
    with pytest.raises(ImagesError, match=r"unknown QEMU '1\.0'"):
        await images.ensure([], ["1.0"])


def test_a_ready_kernel_needs_nothing(
    copied_kernel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "_run", refuse_to_run)
    trio.run(images.ensure, ["6.12"], [])
    assert "images: kernel 6.12: ready" in capsys.readouterr().err
    kernel = images.kernel("6.12")
    assert kernel.release.startswith("6.12.")
    assert kernel.vmlinuz.parent == copied_kernel


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "add", "stamp"])
def test_damage_is_noticed(copied_kernel: Path, damage: str) -> None:
    file = copied_kernel / "initramfs.img"
    match damage:
        case "flip":
            # Same size and time: only the content tells.
            before = file.stat()
            with file.open("r+b") as stream:
                stream.seek(1000)
                byte = stream.read(1)
                stream.seek(1000)
                stream.write(bytes([byte[0] ^ 1]))
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "cut":
            os.truncate(file, 1000)
        case "remove":
            file.unlink()
        case "add":
            (copied_kernel / "more").write_text("")
        case "stamp":
            (copied_kernel / "stamp.json").write_text("{")
    assert next(row.state for row in images.status() if row.name == "6.12") == "damaged"


def test_changed_init_makes_it_stale(copied_kernel: Path) -> None:
    stamp = json.loads((copied_kernel / "stamp.json").read_text())
    stamp["inputs"]["init"] = "0" * 64
    (copied_kernel / "stamp.json").write_text(json.dumps(stamp))
    assert next(row.state for row in images.status() if row.name == "6.12") == "stale"


def test_a_failed_rebuild_keeps_what_was_there(copied_kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = json.loads((copied_kernel / "stamp.json").read_text())
    stamp["inputs"]["init"] = "0" * 64
    (copied_kernel / "stamp.json").write_text(json.dumps(stamp))

    async def fail(*_: Any, **__: Any) -> tuple[int, str]:
        raise ImagesError("the network is down")

    monkeypatch.setattr(images, "_run", fail)
    with pytest.raises(ImagesError, match="the network is down"):
        trio.run(images.ensure, ["6.12"], [])
    assert sorted(path.name for path in copied_kernel.iterdir()) == ["initramfs.img", "stamp.json", "vmlinuz"]
    assert [path.name for path in copied_kernel.parent.iterdir()] == ["6.12"]


async def test_the_cache_is_worked_on_by_one_process_at_a_time(
    copied_kernel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = os.open(copied_kernel.parent.parent / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with trio.move_on_after(1) as scope:
            await images.ensure(["6.12"], [])
        assert scope.cancelled_caught
        assert "waiting for another process" in capsys.readouterr().err
        fcntl.flock(lock, fcntl.LOCK_UN)
        with trio.fail_after(30):
            await images.ensure(["6.12"], [])
    finally:
        os.close(lock)


def test_what_is_in_the_initramfs(copied_kernel: Path) -> None:
    archive = gzip.decompress((copied_kernel / "initramfs.img").read_bytes())
    listing = subprocess.run(
        ["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True, timeout=60
    ).stdout.decode()
    names = set(listing.split())
    assert {"init", "common", "bin/busybox", "bin/load", "modules/order", "modules/virtio_blk.ko"} <= names
    assert {"modules/virtiofs.order", "modules/uio_pci_generic.order", "modules/uio.ko", "proc", "sys", "dev"} <= names
    assert all(name.startswith("modules/") for name in names if name.endswith(".ko"))


def test_the_cache_holds_no_scratch(copied_kernel: Path) -> None:
    assert copied_kernel.is_dir()
    assert not list(images.cache_dir().rglob(".*.new"))


def test_no_mirror_is_named_in_the_sources() -> None:
    root = Path(images.__file__).parent.parent
    hosts = {entry.uri.split("/")[2] for entry in images.machine_sources() if "//" in entry.uri}
    for path in [*root.glob("vhu_legacy/*.py"), *root.glob("images/*"), root / "Makefile", root / ".ci/run"]:
        text = path.read_text()
        assert not [host for host in hosts if host in text], path
