# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What is laid over a guest's initramfs: archives that the kernel unpacks one after the other, later files in the place
of earlier ones.

A guest that is another guest's back end has three. The kernel's own is in the cache, as are the daemons
(:func:`write_daemons`, from unpacked Debian packages); what changes with every build, our own programs, is packed when
the guest is started (:func:`backend_archive`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from .errors import ImagesError

_SOURCE_ROOT: Final = Path(__file__).resolve().parent.parent
_IMAGES_DIR: Final = _SOURCE_ROOT / "images"
_TARGET: Final = "x86_64-unknown-linux-gnu"
_TOOL_TIMEOUT = 60.0

LOADER: Final = "ld-linux-x86-64.so.2"
LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
DAEMON_PROGRAMS: Final = ("usr/bin/qemu-storage-daemon", "usr/libexec/virtiofsd")


class Archive:
    """A cpio archive of the kind the kernel unpacks ("newc"). The same entries give the same bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._directories: set[str] = set()
        self._count = 0

    def directory(self, name: str) -> None:
        """A directory, and those it is in, if they aren't there yet."""
        self._parents(name)
        if name not in self._directories:
            self._directories.add(name)
            self._entry(name, 0o040755, b"")

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        """A file, and the directories it is in."""
        self._parents(name)
        self._entry(name, 0o100755 if executable else 0o100644, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link, and the directories it is in."""
        self._parents(name)
        self._entry(name, 0o120777, target.encode())

    def finish(self) -> bytes:
        """The whole archive."""
        self._entry("TRAILER!!!", 0, b"")
        # What follows has to begin at a multiple of 4; cpio's own block is a habit.
        return _padded(b"".join(self._parts), 512)

    def _parents(self, name: str) -> None:
        parent, _, _ = name.rpartition("/")
        if parent:
            self.directory(parent)

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        self._count += 1
        words = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device (2), special file's device (2), name's length, checksum
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(words), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += [_padded(header + words, 4), _padded(data, 4)]


def _padded(data: bytes, unit: int) -> bytes:
    return data.ljust(-(-len(data) // unit) * unit, b"\0")


def join(target: BinaryIO, parts: Iterable[Path | bytes]) -> None:
    """Write archives, compressed or not, one after the other, as the kernel takes them."""
    for part in parts:
        if isinstance(part, bytes):
            target.write(part)
        else:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
        # The kernel skips zeros between archives, and wants a plain one at a multiple of 4.
        target.write(bytes(-target.tell() % 4))


# --- the daemons -------------------------------------------------------------------------------------------


def library_closure(root: Path, programs: Sequence[str]) -> dict[str, Path]:
    """The libraries that dynamically linked programs of an unpacked root need: their names, and the files in the root.

    The root's own loader says it. Raises :class:`ImagesError` for a program that isn't there, or that needs something
    the root doesn't have (whatever this machine has).
    """
    directories = [path for path in (root / LIBRARIES, root / "lib/x86_64-linux-gnu") if path.is_dir()]
    loader = next((path / LOADER for path in directories if (path / LOADER).exists()), None)
    if loader is None:
        raise ImagesError(f"no dynamic loader in {root}")
    # inhibit-cache: nothing of what this machine's ldconfig knows.
    command = [str(loader), "--inhibit-cache", "--library-path", ":".join(map(str, directories)), "--list"]
    found: dict[str, Path] = {}
    for program in programs:
        path = root / program
        if not path.is_file():
            raise ImagesError(f"the packages hold no {program}")
        try:
            result = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=_TOOL_TIMEOUT)
        except (OSError, subprocess.SubprocessError) as error:
            raise ImagesError(f"cannot ask for the libraries of {program}: {error}") from error
        if result.returncode != 0:
            raise ImagesError(f"cannot tell the libraries of {program}: {(result.stdout + result.stderr).strip()}")
        found |= _parse_libraries(result.stdout, root, program)
    return found


def _parse_libraries(text: str, root: Path, program: str) -> dict[str, Path]:
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*(?P<name>\S+) => (?P<path>/\S+|not found)", line)
        # Without an arrow: the kernel's own, and the loader.
        if match is None:
            continue
        path = Path(match["path"])
        if not path.is_relative_to(root):
            raise ImagesError(f"{program} needs {match['name']}, which the packages don't hold ({match['path']})")
        if path.name != LOADER:
            found[match["name"]] = path
    return found


def write_daemons(root: Path, target: Path) -> None:
    """Write an archive with the daemons of an unpacked root, their libraries and the loader. Raises
    :class:`ImagesError`.
    """
    libraries = library_closure(root, DAEMON_PROGRAMS)
    archive = Archive()
    for program in DAEMON_PROGRAMS:
        archive.file(f"bin/{Path(program).name}", (root / program).read_bytes(), executable=True)
    # The name that is in the programs; the libraries are in one of the loader's own directories.
    loader = next(path for path in (root / LIBRARIES / LOADER, root / "lib/x86_64-linux-gnu" / LOADER) if path.exists())
    archive.file(f"lib64/{LOADER}", loader.read_bytes(), executable=True)
    for name, path in sorted(libraries.items()):
        archive.file(f"lib64/{name}", path.read_bytes())
    # Debian's loader looks into /lib64, too, but the multiarch directory is what it is built for.
    archive.link(LIBRARIES, "/lib64")
    archive.link("lib/x86_64-linux-gnu", "/lib64")
    target.write_bytes(archive.finish())


# --- a guest that is a back end ----------------------------------------------------------------------------


def built_programs() -> dict[str, Path]:
    """The programs that `make vvu-bridge` makes for such a guest, by the names they have in it. Raises
    :class:`ImagesError` for one that isn't there, or isn't static.
    """
    directory = Path(os.environ.get("CARGO_TARGET_DIR") or _SOURCE_ROOT / "target") / _TARGET / "guest"
    programs = {"vvu-bridge": directory / "vvu-bridge", "vhu-blk": directory / "examples" / "vhu-blk"}
    for path in programs.values():
        if not path.is_file():
            raise ImagesError(f"{path} is missing: run `make vvu-bridge`")
        with path.open("rb") as file:
            # A dynamic executable names its interpreter in the first page.
            if b"ld-linux" in file.read(4096):
                raise ImagesError(f"{path} is dynamically linked: run `make vvu-bridge`")
    return programs


def backend_archive(programs: Mapping[str, Path]) -> bytes:
    """The archive with the first program of a guest that is a back end, and further ones by name. Raises
    :class:`ImagesError`.
    """
    archive = Archive()
    try:
        archive.file("init-backend", (_IMAGES_DIR / "init-backend").read_bytes(), executable=True)
        for name, path in sorted(programs.items()):
            archive.file(f"bin/{name}", path.read_bytes(), executable=True)
    except OSError as error:
        raise ImagesError(f"{error}: guest images are built from a source checkout") from error
    return archive.finish()
