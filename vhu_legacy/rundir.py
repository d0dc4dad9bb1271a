# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Run directories and the Unix sockets in them: where they are, whose they are, and that none is left behind.

A run directory belongs to one process at a time. The lock on `group.lock` says to which: the kernel lets go
of it with the process, however that ends, so what a dead process left behind can be told from what is in use.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import GroupError, RunDirBusyError

__all__ = [
    "LOCK_FILE",
    "QMP_SOCKET",
    "SUN_PATH",
    "RunDir",
    "RunningGroup",
    "bind_unix",
    "default_run_dir",
    "device_socket_name",
    "function_socket_name",
    "is_stale_socket",
    "pid_of_lock",
    "run_base",
    "running_groups",
    "socket_name",
    "too_long",
    "unlink_bound",
]

log = logging.getLogger(__name__)

QMP_SOCKET: Final = "qmp.sock"
LOCK_FILE: Final = "group.lock"
SUN_PATH: Final = 108
"""`sizeof(sockaddr_un.sun_path)`, with the closing NUL."""
_OWN_SOCKETS = re.compile(
    r"qmp\.sock|owner\.vfio-user\.sock|member-\d+\.(vhost-user|(legacy|transitional|modern)\.vfio-user)\.sock"
    r"|device-[A-Za-z0-9._-]{1,64}\.(vhost-user|vfio-user|front)\.sock"
)


def run_base() -> Path:
    """Where run directories are by default: `$XDG_RUNTIME_DIR/vhu-legacy`, or `/tmp/vhu-legacy-UID` without
    it.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "vhu-legacy"
    return Path(f"/tmp/vhu-legacy-{os.getuid()}")


def default_run_dir(name: str) -> Path:
    """The run directory of a group of this name, unless another one is asked for."""
    return run_base() / name


def socket_name(member_id: int) -> str:
    """The name of a member's vhost-user socket within the run directory."""
    return f"member-{member_id}.vhost-user.sock"


def function_socket_name(member_id: int, kind: str) -> str:
    """The name of a PCI function's vfio-user socket within the run directory. Member 0 is the owner.

    `kind`: "owner", or a member's "legacy", "transitional" or "modern".
    """
    return f"{kind}.vfio-user.sock" if member_id == 0 else f"member-{member_id}.{kind}.vfio-user.sock"


def device_socket_name(name: str, kind: str) -> str:
    """The name of a virtio-vhost-user device's socket within the run directory.

    `kind`: "vhost-user" and "vfio-user" for the backend VM's QEMU, "front" for the master.
    """
    return f"device-{name}.{kind}.sock"


def too_long(path: Path) -> bool:
    """Whether this path doesn't fit into a Unix socket's address."""
    return len(os.fsencode(path.absolute())) >= SUN_PATH


@dataclass(frozen=True, slots=True)
class RunningGroup:
    """A group that a process of this user serves, found by its run directory."""

    name: str
    run_dir: Path
    pid: int | None


def running_groups() -> list[RunningGroup]:
    """The running groups with a run directory at the default place. Touches the file system."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in sorted(run_base().iterdir()):
            with suppress(OSError):
                running, pid = _lock_state(entry)
                if running:
                    found.append(RunningGroup(entry.name, entry, pid))
    return found


def pid_of_lock(run_dir: Path) -> int | None:
    """The process that serves this run directory; None when nobody does. Raises OSError."""
    return _lock_state(run_dir)[1]


def _lock_state(run_dir: Path) -> tuple[bool, int | None]:
    try:
        fd = os.open(run_dir / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False, None
    try:
        # asks without taking the lock: a process that is just starting must not find it taken by a look
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock_request(fcntl.F_WRLCK))
        held = _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK
        return held, _read_pid(fd) if held else None
    finally:
        os.close(fd)


_FLOCK: Final = struct.Struct("hhqqi0q")
"""`struct flock`: type, whence, start, length, pid, and the padding at its end."""


def _lock_request(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def bind_unix(path: Path, backlog: int = 128) -> socket.socket:
    """A listening Unix socket that only this user can connect to.

    A socket file that nobody listens on any more is replaced; anything else at that path is left alone and
    raises OSError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        try:
            sock.bind(os.fsencode(path))
        except OSError:
            if not is_stale_socket(path):
                raise
            path.unlink()
            sock.bind(os.fsencode(path))
        # nobody can connect before listen(), so there is no moment at which the wrong mode matters
        path.chmod(0o600)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def is_stale_socket(path: Path) -> bool:
    """Whether this is a socket of this user that nobody listens on."""
    try:
        status = path.lstat()
    except OSError:
        return False
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def unlink_bound(path: Path, identity: tuple[int, int]) -> None:
    """Remove a socket file if it is still the one with this device and inode. Never raises OSError."""
    try:
        status = path.lstat()
        if (status.st_dev, status.st_ino) == identity:
            path.unlink()
    except OSError:
        pass


def _read_pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _write_pid(fd: int) -> None:
    # always as long, in one piece: who reads it while it changes hands sees one process or the other
    os.pwrite(fd, f"{os.getpid():<10}\n".encode(), 0)


class RunDir:
    """A run directory that is ours: its lock, and what has to be removed at the end."""

    def __init__(self, path: Path, fd: int, created: bool, left_behind: bool = False) -> None:
        self.path = path
        self.fd = fd
        self.created = created
        self.left_behind = left_behind
        """Whether the last process that served here was killed."""

    @classmethod
    def claim(cls, path: Path) -> RunDir:
        """Make the directory if need be, lock it, clear it of sockets that a dead process left behind."""
        try:
            claim = cls._lock(path)
        except OSError as error:
            raise GroupError(f"run directory {path}: {error.strerror or error}") from error
        try:
            claim._remove_stale()
        except BaseException:
            claim.release()
            raise
        return claim

    @classmethod
    def adopt(cls, path: Path, fd: int) -> RunDir:
        """Take over a directory from another process, whose descriptor of the lock file this is: the lock is that of
        all who have it. Until `own` it is the other one's, too."""
        return cls(path, fd, path.parent == run_base())

    def own(self) -> None:
        """Say in the lock file that the directory is this process's."""
        try:
            _write_pid(self.fd)
        except OSError as error:
            # who looks there finds the one that served before; everything else works
            log.error("run directory %s: %s", self.path, error.strerror or error)

    def leave(self) -> None:
        """Close our descriptor of the lock file; another process goes on."""
        os.close(self.fd)

    @classmethod
    def _lock(cls, path: Path) -> RunDir:
        # who leaves removes the lock file and perhaps the directory: again, until what we locked is there
        while True:
            created = _make_private(path)
            try:
                fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                continue
            try:
                try:
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock_request(fcntl.F_WRLCK))
                except (BlockingIOError, PermissionError):
                    raise RunDirBusyError(path, _read_pid(fd)) from None
                with suppress(FileNotFoundError):
                    there = (path / LOCK_FILE).stat()
                    if os.path.samestat(there, os.fstat(fd)):
                        # an ordered end removes the file
                        left_behind = there.st_size > 0
                        _write_pid(fd)
                        return cls(path, os.dup(fd), created, left_behind)
            finally:
                os.close(fd)

    def _remove_stale(self) -> None:
        for entry in self.path.iterdir():
            if _OWN_SOCKETS.fullmatch(entry.name) is None:
                continue
            if is_stale_socket(entry):
                log.info("removing %s, left behind by a process that is gone", entry)
                entry.unlink(missing_ok=True)
            elif entry.is_socket():
                raise GroupError(f"{entry} is served by another process, or belongs to another user")
            else:
                raise GroupError(f"{entry} is in the way and is not a socket; remove it")

    def release(self) -> None:
        """Remove the lock file, let go of the lock, remove the directory if it was made here and is empty."""
        status = os.fstat(self.fd)
        unlink_bound(self.path / LOCK_FILE, (status.st_dev, status.st_ino))
        if self.created:
            with suppress(OSError):
                self.path.rmdir()
        os.close(self.fd)


def _make_private(path: Path) -> bool:
    """Make sure that the directory exists. Returns whether it shall be removed at the end."""
    default_place = path.parent == run_base()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if default_place:
        # anybody can make /tmp/vhu-legacy-UID first; what is in somebody else's could be swapped under us
        status = path.parent.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise GroupError(f"{path.parent} belongs to another user (uid {status.st_uid}); use --run-dir")
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise GroupError(f"run directory {path} is in the way: it is not a directory") from None
        return default_place
    return True
