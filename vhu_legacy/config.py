# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The group file: TOML in, `GroupConfig` out, every mistake named.

`check` collects all problems of a file and never raises for what stands in it; `load` raises them as one
`ConfigError`. Both read the file and look at the images it names, so an async caller runs them in a thread.

TOML keys are checked strictly: `true` isn't a number, `1.0` isn't an integer, an unknown key is an error. A
key that is silently ignored is worse than one that is refused: the group would run differently from what was
written.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from .errors import ConfigError, Problem
from .rundir import SUN_PATH, default_run_dir, device_socket_name, function_socket_name, socket_name, too_long

__all__ = [
    "MAX_MEMBERS",
    "MAX_MEMBER_ID",
    "MEMBER_TYPES",
    "CheckResult",
    "CompatConfig",
    "GroupConfig",
    "MemberConfig",
    "OwnerConfig",
    "VhostUserDeviceConfig",
    "check",
    "image_identity",
    "is_serial",
    "load",
    "parse_member",
    "parse_size",
    "resolve_image",
]

SECTOR: Final = 512
MEMBER_TYPES: Final = ("blk",)
LATER_TYPES: Final = ("net", "rng", "console")
"""Types of the design that this version doesn't serve yet: refused by name, not as a typing mistake."""
MAX_MEMBER_ID: Final = 65535
"""A VF number has 16 bits."""
MAX_MEMBERS: Final = 65535
MAX_QUEUES: Final = 64
QUEUE_SIZES: Final = tuple(1 << n for n in range(2, 11))
LEGACY_QUEUE_SIZE: Final = 256
BLK_SIZES: Final = (512, 1024, 2048, 4096)
SERIAL_BYTES: Final = 20
MAX_WORKERS: Final = 64
MAX_ADMIN_QUEUES: Final = 64
MAX_VECTORS: Final = 2048
"""What the table size field of an MSI-X capability can say."""
MAX_POLL_US: Final = 1000
MAX_FILE: Final = 4 * 1024 * 1024
MAX_IMAGE: Final = 1 << 62
MAX_VHOST_QUEUES: Final = 126
"""QEMU names at most 256 virtqueues in its messages, and a device with N vhost-user queues has 2N + 3."""
MIN_SHARED_MEMORY: Final = 1 << 20
MAX_SHARED_MEMORY: Final = 1 << 40
"""The largest region that was tried behind QEMU."""
DEFAULT_SHARED_MEMORY: Final = 4 << 30
PAGE: Final = 4096
REPORTED_PER_TABLE: Final = 5
"""A wrong `image` pattern with `count = 1000` is one mistake, not a thousand lines."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIZE = re.compile(r"(\d{1,20}) ?(B|KiB|MiB|GiB|TiB|K|M|G|T)?")
_UNITS: Final = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UUID = re.compile("-".join(f"[0-9A-Fa-f]{{{digits}}}" for digits in (8, 4, 4, 4, 12)))
_NAME_ALLOWED: Final = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
_UUID_ALLOWED: Final = 'a UUID such as "6ba7b810-9dad-11d1-80b4-00c04fd430c8"'
_SHARED_MEMORY_ALLOWED: Final = 'a power of two from "1MiB" to "1TiB"'
_RAM_FILE_ALLOWED: Final = "a file, or where one can be made, in a directory that is there; relative to the group file"
_SIZE_ALLOWED: Final = 'a size such as "64MiB", "1GiB" or a number of bytes'
_SERIAL_ALLOWED: Final = f"up to {SERIAL_BYTES} printable ASCII characters"
_IMAGE_ALLOWED: Final = 'a path relative to the group file, "ram:SIZE" or "null:SIZE"'


@dataclass(frozen=True, slots=True)
class MemberConfig:
    """One member, as it shall be served. `image` is absolute, or "ram:BYTES" or "null:BYTES"."""

    id: int
    type: str = "blk"
    image: str = ""
    read_only: bool = False
    queues: int = 1
    queue_size: int = 256
    legacy: bool = True
    blk_size: int = SECTOR
    serial: str = ""
    packed: bool = False
    in_order: bool = False
    shared: bool = False
    """Other processes may have the image open for writing, too: the two ends of a live migration."""
    vectors: int | None = None
    """MSI-X vectors of its PCI functions, 0 for none; None for one a queue and one more."""
    vfio_user: bool = False
    """Serve it as PCI functions, too: legacy and transitional if `legacy`, and modern."""
    poll_us: int = 0
    """How long an empty queue may be polled, at most; 0: not at all."""

    @property
    def vector_count(self) -> int:
        """MSI-X vectors, the default worked out."""
        return self.queues + 1 if self.vectors is None else self.vectors


@dataclass(frozen=True, slots=True)
class OwnerConfig:
    """The owner (the PF): a device of its own, and the administration virtqueues. `image` as a member's."""

    type: str
    image: str
    admin_queues: int = 1
    vfio_user: bool = False
    """Serve it as a PCI function."""
    read_only: bool = False
    queues: int = 1
    queue_size: int = 256
    packed: bool = False
    in_order: bool = False
    shared: bool = False
    """Other processes may have the image open for writing, too: the two ends of a live migration."""
    vectors: int | None = None
    """MSI-X vectors of its PCI function, 0 for none; None for one a queue (administration, too) and one more."""
    blk_size: int = SECTOR
    serial: str = ""

    @property
    def vector_count(self) -> int:
        """MSI-X vectors, the default worked out."""
        return self.queues + self.admin_queues + 1 if self.vectors is None else self.vectors


@dataclass(frozen=True, slots=True)
class VhostUserDeviceConfig:
    """A virtio-vhost-user device: a backend VM's driver behind it is the slave of a vhost-user master."""

    name: str
    """Begins the names of its sockets (`rundir.device_socket_name`)."""
    max_queues: int = 8
    """max_vhost_queues: queues that the device in the front end's VM can have, 1 to 126."""
    uuid: bytes = bytes(16)
    """16 bytes, all 0 for none."""
    shared_memory: int = DEFAULT_SHARED_MEMORY
    """Bytes of its shared memory region, a power of two: all of the front end VM's memory, and a log, must fit."""
    vfio_user: bool = False
    """Serve it as a PCI function, too."""
    vectors: int | None = None
    """MSI-X vectors of its PCI function, 0 for none; None for one a queue and three more."""
    ram_file: Path | None = None
    """The PCI function's shared memory begins with this file, mapped: the front end VM's memory. None: every access to
    shared memory is trapped."""
    ram_size: int = 0
    """Bytes of that file."""

    @property
    def vector_count(self) -> int:
        """MSI-X vectors, the default worked out."""
        return self.max_queues + 3 if self.vectors is None else self.vectors

    @property
    def uuid_text(self) -> str | None:
        """The UUID as it is written; None for none."""
        if not any(self.uuid):
            return None
        digits = self.uuid.hex()
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


@dataclass(frozen=True, slots=True)
class CompatConfig:
    """Where Linux differs from the specification, or the specification from itself: one switch each (design D9)."""

    lists_without_vfs: bool = True
    """LIST_QUERY and LIST_USE of the SR-IOV group are answered while VF Enable is clear."""
    capabilities_in_sr_iov_list: bool = True
    """The capability commands stand in the SR-IOV group's list, too."""
    self_group_preset: bool = True
    """All commands of the self group can be sent without LIST_USE."""
    pfn_zero_resets_device: bool = False
    """A queue address of 0 resets the whole device, not just its queue."""

    @classmethod
    def default(cls, *, strict: bool) -> CompatConfig:
        """The letter of the specification, or what works with Linux."""
        return cls(not strict, not strict, not strict, False)

    def as_dict(self) -> dict[str, bool]:
        """By name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """A whole group file. `run_dir` is None when the default is meant (`default_run_dir`)."""

    name: str
    source: Path
    run_dir: Path | None = None
    strict: bool = False
    feature_management: bool = False
    workers: int | None = None
    owner: OwnerConfig | None = None
    members: tuple[MemberConfig, ...] = ()
    notify_region: bool = True
    """Members say where queue notifications can be written (LEGACY_NOTIFY_INFO)."""
    compat: CompatConfig | None = None
    """None for what `strict` says; see `switches`."""
    vhost_user_devices: tuple[VhostUserDeviceConfig, ...] = ()

    @property
    def admin_queues(self) -> int:
        """Administration virtqueues of the owner."""
        return 1 if self.owner is None else self.owner.admin_queues

    @property
    def switches(self) -> CompatConfig:
        """The compatibility switches, the default worked out."""
        return CompatConfig.default(strict=self.strict) if self.compat is None else self.compat


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What `check` found. `config` is None when there are problems; warnings alone don't stop a group."""

    config: GroupConfig | None
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


class _Wrong(Exception):
    """A value that can't be taken: what was found and what is allowed."""

    def __init__(self, found: str, allowed: str | None) -> None:
        super().__init__(found)
        self.found = found
        self.allowed = allowed


def parse_size(text: str) -> int:
    """Bytes from "64MiB", "1G", "512". Units are powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{_show(text)} is not a size")
    unit = (match[2] or "").removesuffix("iB")
    return int(match[1]) * _UNITS[unit]


def resolve_image(spec: str, base: Path, *, read_only: bool, blk_size: int = SECTOR) -> str:
    """Check an image and return it in the form that the native half takes: absolute path, "ram:BYTES",
    "null:BYTES".

    Raises ValueError with a message that names what is allowed. Touches the file system.
    """
    try:
        return _resolve_image(spec, base, read_only=read_only, blk_size=blk_size)
    except _Wrong as wrong:
        raise ValueError(wrong.found if wrong.allowed is None else f"{wrong.found}; allowed: {wrong.allowed}") from None


def is_serial(text: str) -> bool:
    """Whether this can be a blk device's serial."""
    return len(text) <= SERIAL_BYTES and text.isascii() and (text.isprintable() or not text)


def image_identity(image: str) -> tuple[int, int] | None:
    """What makes two images the same one: device and inode (links and spellings don't matter). None for RAM
    and null.
    """
    if image.startswith(("ram:", "null:")):
        return None
    try:
        status = Path(image).stat()
    except OSError:
        return None
    if stat.S_ISBLK(status.st_mode):
        return (-1, status.st_rdev)
    return (status.st_dev, status.st_ino)


def load(path: Path) -> GroupConfig:
    """Read a group file. Raises ConfigError with every problem it has."""
    result = check(path)
    if result.config is None:
        raise ConfigError(result.problems)
    return result.config


def check(path: Path, unused_images: Callable[[str, Path], Collection[int]] | None = None) -> CheckResult:
    """Read a group file and return it with all problems and warnings; nothing that stands in it makes this
    raise.

    `unused_images(name, run_dir)` says of which members the images that the file names aren't looked at, since these
    members are deleted, or have another one.
    """
    checker = _Checker(path, unused_images)
    config = checker.run()
    # in the order of the file as it is usually written; the tables aren't read in that order
    return CheckResult(
        None if checker.problems else config,
        tuple(sorted(checker.problems, key=_table_order)),
        tuple(sorted(checker.warnings, key=_table_order)),
    )


def _table_order(problem: Problem) -> int:
    tables = (None, "[group]", "[group.compat]", "[owner]")
    return tables.index(problem.table) if problem.table in tables else len(tables)


def parse_member(values: Mapping[str, Any], *, member_id: int, base: Path, label: str) -> MemberConfig:
    """One member from the keys of a `[[members]]` table, without `count` and `id` (`member-add` over QMP).

    Raises ConfigError. Touches the file system.
    """
    checker = _Checker(Path(label))
    table = _Table(checker, None, values, _MEMBER_KEYS[2:])
    members = list(checker.members_of(table, base, ids=range(member_id, member_id + 1)))
    if checker.problems:
        raise ConfigError(tuple(checker.problems))
    return members[0]


def _show(value: object) -> str:
    """A TOML value for a message: short, quoted as it was written."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            text = value if len(value) <= 60 else value[:57] + "..."
            return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'
        case int() | float():
            # Python refuses to print integers of thousands of digits
            return "a huge number" if isinstance(value, int) and value.bit_length() > 256 else str(value)
        case dict():
            return "a table"
        case list():
            return "an array"
        case _:
            return f"{value} (a {type(value).__name__})"


def _or_list(words: Sequence[object]) -> str:
    return ", ".join(str(word) for word in words)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_").lower(), known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


_GROUP_KEYS: Final = ("name", "run_dir", "strict", "feature_management", "notify_region", "workers", "compat")
_COMPAT_KEYS: Final = tuple(CompatConfig.__slots__)
_OWNER_KEYS: Final = (
    "type",
    "image",
    "read_only",
    "admin_queues",
    "queues",
    "queue_size",
    "packed",
    "in_order",
    "shared",
    "vectors",
    "blk_size",
    "serial",
    "vfio_user",
)
_MEMBER_KEYS: Final = (
    "count",
    "id",
    "type",
    "image",
    "read_only",
    "queues",
    "queue_size",
    "legacy",
    "packed",
    "in_order",
    "shared",
    "vectors",
    "blk_size",
    "serial",
    "vfio_user",
    "poll_us",
)
_DEVICE_KEYS: Final = (
    "name",
    "max_queues",
    "uuid",
    "shared_memory",
    "vfio_user",
    "vectors",
    "ram_file",
    "ram_size",
)
_TABLES: Final = ("group", "owner", "members", "vhost_user_devices")
_TABLES_ALLOWED: Final = "[group], [owner], [[members]], [[vhost_user_devices]]"


class _Table:
    """One TOML table being read: each taken key is checked, `finish` names those that nobody took."""

    def __init__(self, checker: _Checker, name: str | None, values: Mapping[str, Any], known: Sequence[str]) -> None:
        self.checker = checker
        self.name = name
        self.values = values
        self.known = known
        for key in values:
            if key not in known:
                self.problem(key, f"unknown key{_did_you_mean(key, known)}", _or_list(known))

    def problem(self, key: str | None, found: str, allowed: str | None) -> None:
        self.checker.problems.append(Problem(self.checker.path, self.name, key, found, allowed))

    def warning(self, key: str | None, found: str, allowed: str | None) -> None:
        self.checker.warnings.append(Problem(self.checker.path, self.name, key, found, allowed))

    def missing(self, key: str, allowed: str) -> None:
        self.problem(key, "missing", allowed)

    def string(self, key: str, allowed: str) -> str | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.problem(key, f"found {_show(value)}, not a string", allowed)
            return None
        if "\0" in value:
            self.problem(key, "has a NUL character", allowed)
            return None
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self.problem(key, f"found {_show(value)}", "true or false")
            return default
        return value

    def integer(self, key: str, default: int | None, low: int, high: int) -> int | None:
        value = self.values.get(key, default)
        if value is None:
            return None
        # bool is an int to Python, not to whoever writes `queues = true`
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.problem(key, f"found {_show(value)}", f"an integer from {low} to {high}")
            return default
        return value

    def size(self, key: str, allowed: str, fits: Callable[[int], bool]) -> int | None:
        """Bytes, as a size in words or as a number; None when there are none, or they don't fit."""
        value = self.values.get(key)
        if value is None:
            return None
        size = value if isinstance(value, int) and not isinstance(value, bool) else None
        if isinstance(value, str):
            with suppress(ValueError):
                size = parse_size(value)
        if size is None or not fits(size):
            self.problem(key, f"found {_show(value)}", allowed)
            return None
        return size

    def one_of(self, key: str, default: int, choices: Sequence[int]) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value not in choices:
            self.problem(key, f"found {_show(value)}", _or_list(choices))
            return default
        return value

    def name_of(self) -> str | None:
        """What becomes part of a socket's path."""
        name = self.string("name", _NAME_ALLOWED)
        if "name" not in self.values:
            self.missing("name", _NAME_ALLOWED)
        elif name is not None and _NAME.fullmatch(name) is None:
            self.problem("name", f"found {_show(name)}", _NAME_ALLOWED)
            return None
        return name

    def member_type(self) -> str | None:
        allowed = _or_list([f'"{name}"' for name in MEMBER_TYPES])
        value = self.string("type", allowed)
        if value is None:
            if "type" not in self.values:
                self.missing("type", allowed)
            return None
        if value in LATER_TYPES:
            self.problem("type", f'"{value}" members are not served by this version', allowed)
            return None
        if value not in MEMBER_TYPES:
            hint = _did_you_mean(value, (*MEMBER_TYPES, *LATER_TYPES))
            self.problem("type", f"found {_show(value)}{hint}", allowed)
            return None
        return value


@dataclass(slots=True)
class _Use:
    """Who uses an image file, to find the same one given to two writers."""

    owner: str
    table: _Table
    read_only: bool


@dataclass(slots=True)
class _Checker:
    """Collects what is wrong with one group file."""

    path: Path
    unused_images: Callable[[str, Path], Collection[int]] | None = None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    _unused: Collection[int] = ()
    _uses: dict[tuple[int, int], _Use] = field(default_factory=dict)
    _serials: dict[str, int] = field(default_factory=dict)
    _ids: dict[int, str] = field(default_factory=dict)

    def problem(self, table: str | None, key: str | None, found: str, allowed: str | None) -> None:
        self.problems.append(Problem(self.path, table, key, found, allowed))

    def run(self) -> GroupConfig | None:
        document = self._read()
        if document is None:
            return None
        base = self.path.absolute().parent
        for key in document:
            if key not in _TABLES:
                kind = f"[{key}]" if isinstance(document[key], (dict, list)) else key
                hint = _did_you_mean(key, _TABLES)
                self.problem(None, None, f"unknown table or key {kind}{hint}", _TABLES_ALLOWED)
        self._unused = self._ask_unused(document.get("group"), base)
        owner = self._owner(document.get("owner"), base)
        members = tuple(self._members(document.get("members"), base))
        devices = tuple(self._devices(document.get("vhost_user_devices"), base))
        return self._group(document.get("group"), base, owner, members, devices)

    def _ask_unused(self, group: object, base: Path) -> Collection[int]:
        """What `unused_images` says; nothing when the table is so wrong that it can't be asked."""
        if self.unused_images is None or not isinstance(group, dict):
            return ()
        name, run_dir = group.get("name"), group.get("run_dir", "")
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            return ()
        if not isinstance(run_dir, str) or "\0" in run_dir:
            return ()
        return self.unused_images(name, base / run_dir if run_dir else default_run_dir(name))

    def _read(self) -> dict[str, Any] | None:
        try:
            # O_NONBLOCK: a FIFO without a writer must not hang `validate`
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self.problem(None, None, f"can't be opened: {os.strerror(error.errno or 0)}", None)
            return None
        except ValueError as error:
            self.problem(None, None, f"can't be opened: {error}", None)
            return None
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(fd)
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            self.problem(None, None, f"is {kind}", "a TOML file")
            return None
        with os.fdopen(fd, "rb") as stream:
            try:
                data = stream.read(MAX_FILE + 1)
            except OSError as error:
                self.problem(None, None, f"can't be read: {os.strerror(error.errno or 0)}", None)
                return None
        if len(data) > MAX_FILE:
            self.problem(None, None, f"is larger than {MAX_FILE >> 20} MiB", "a TOML group file, not an image")
            return None
        try:
            return tomllib.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            where = f"byte 0x{data[error.start]:02x} at offset {error.start} (line {line})"
            self.problem(None, None, f"is not text: {where} is not UTF-8", "a TOML file in UTF-8")
        except tomllib.TOMLDecodeError as error:
            self.problem(None, None, f"TOML syntax: {error}", None)
        except RecursionError:
            self.problem(None, None, "TOML syntax: nested too deeply", None)
        except ValueError as error:
            # Python refuses to convert integers of thousands of digits
            self.problem(None, None, f"TOML value: {error}", None)
        return None

    def _group(
        self,
        values: object,
        base: Path,
        owner: OwnerConfig | None,
        members: tuple[MemberConfig, ...],
        devices: tuple[VhostUserDeviceConfig, ...],
    ) -> GroupConfig | None:
        if not isinstance(values, dict):
            found = "missing" if values is None else f"found {_show(values)}"
            self.problem("[group]", None, found, "one [group] table with at least a name")
            return None
        table = _Table(self, "[group]", values, _GROUP_KEYS)
        name = table.name_of()
        run_dir = table.string("run_dir", "a directory")
        if run_dir == "":
            table.problem("run_dir", 'found ""', "a directory")
            run_dir = None
        directory = None if run_dir is None else base / run_dir
        strict = table.boolean("strict", False)
        management = table.boolean("feature_management", False)
        notify_region = table.boolean("notify_region", True)
        workers = table.integer("workers", None, 1, MAX_WORKERS)
        compat = self._compat(table, strict)
        if name is None:
            return None
        where = default_run_dir(name) if directory is None else directory
        longest = max(
            (where / text for text in _socket_names(owner, members, devices, max(self._ids, default=1))),
            key=lambda path: len(os.fsencode(path)),
        )
        if too_long(longest):
            key = "name" if directory is None else "run_dir"
            table.problem(key, f"{longest} is too long for a Unix socket", f"paths of at most {SUN_PATH - 1} bytes")
        named = ("members", "vhost_user_devices")
        if not (members or devices) and not any(
            problem.table and any(text in problem.table for text in named) for problem in self.problems
        ):
            self.warnings.append(
                Problem(
                    self.path,
                    "[[members]]",
                    None,
                    "none: the group starts empty",
                    "member-add adds some over QMP",
                )
            )
        return GroupConfig(
            name,
            self.path,
            directory,
            strict,
            management,
            workers,
            owner,
            members,
            notify_region,
            compat,
            devices,
        )

    def _compat(self, group: _Table, strict: bool) -> CompatConfig:
        """`strict` decides about what isn't said."""
        default = CompatConfig.default(strict=strict)
        values = group.values.get("compat")
        if values is None:
            return default
        if not isinstance(values, dict):
            group.problem("compat", f"found {_show(values)}", "a table [group.compat] of " + _or_list(_COMPAT_KEYS))
            return default
        table = _Table(self, "[group.compat]", values, _COMPAT_KEYS)
        return CompatConfig(**{key: table.boolean(key, getattr(default, key)) for key in _COMPAT_KEYS})

    def _owner(self, values: object, base: Path) -> OwnerConfig | None:
        if values is None:
            return None
        if not isinstance(values, dict):
            self.problem("[owner]", None, f"found {_show(values)}", "one [owner] table")
            return None
        table = _Table(self, "[owner]", values, _OWNER_KEYS)
        kind = table.member_type()
        admin_queues = table.integer("admin_queues", 1, 1, MAX_ADMIN_QUEUES) or 1
        vfio_user = table.boolean("vfio_user", False)
        read_only = table.boolean("read_only", False)
        queues = table.integer("queues", 1, 1, MAX_QUEUES) or 1
        queue_size = table.one_of("queue_size", 256, QUEUE_SIZES)
        packed = table.boolean("packed", False)
        in_order = table.boolean("in_order", False)
        shared = table.boolean("shared", False)
        vectors = self._vectors(table, vfio_user)
        if vectors == 0 and queues > 1:
            table.warning(
                "queues",
                f"found {queues}: Linux 6.12 to 7.1 looks for the administration virtqueues in the wrong place when it "
                "has no MSI-X and fewer CPUs than there are queues",
                "1, or vectors",
            )
        blk_size = table.one_of("blk_size", SECTOR, BLK_SIZES)
        serial = self._serial_text(table, table.string("serial", _SERIAL_ALLOWED) or "")
        image = table.string("image", _IMAGE_ALLOWED)
        if "image" not in values:
            table.missing("image", _IMAGE_ALLOWED)
        resolved = ""
        if image is not None:
            try:
                resolved = _resolve_image(image, base, read_only=read_only, blk_size=blk_size)
                self._claim(resolved, "the owner", table, read_only=read_only)
            except _Wrong as wrong:
                table.problem("image", wrong.found, wrong.allowed)
        return OwnerConfig(
            kind or "",
            resolved,
            admin_queues,
            vfio_user,
            read_only,
            queues,
            queue_size,
            packed,
            in_order,
            shared,
            vectors,
            blk_size,
            serial,
        )

    def _vectors(self, table: _Table, vfio_user: bool) -> int | None:
        vectors = table.integer("vectors", None, 0, MAX_VECTORS)
        if vectors is not None and not vfio_user:
            table.warning("vectors", f"found {vectors}: only PCI functions have vectors", "with vfio_user = true")
        elif vectors == 0:
            table.warning("vectors", "found 0: there is no MSI-X, interrupts go by INTx", f"1 to {MAX_VECTORS}")
        elif vectors == 1:
            table.warning(
                "vectors", "found 1: drivers that want two at least, as Linux does, go by INTx", f"2 to {MAX_VECTORS}"
            )
        return vectors

    def _members(self, values: object, base: Path) -> Iterator[MemberConfig]:
        if values is None:
            return
        if isinstance(values, dict):
            self.problem("[members]", None, "found one table", "[[members]], with two brackets: a list of tables")
            return
        if not isinstance(values, list):
            self.problem("members", None, f"found {_show(values)}", "[[members]], a list of tables")
            return
        next_id = 1
        total = 0
        for number, entry in enumerate(values, 1):
            name = f"[[members]] #{number}"
            if not isinstance(entry, dict):
                self.problem(name, None, f"found {_show(entry)}", "a table")
                continue
            table = _Table(self, name, entry, _MEMBER_KEYS)
            count = table.integer("count", 1, 1, MAX_MEMBERS) or 1
            first = table.integer("id", next_id, 1, MAX_MEMBER_ID) or next_id
            last = first + count - 1
            total += count
            if last > MAX_MEMBER_ID or total > MAX_MEMBERS:
                key = "count" if "count" in entry else "id"
                table.problem(
                    key, f"member ids {first} to {last}, {total} members so far", f"ids up to {MAX_MEMBER_ID}"
                )
                continue
            taken = next((n for n in range(first, last + 1) if n in self._ids), None)
            if taken is not None:
                table.problem("id", f"member id {taken} is already taken by {self._ids[taken]}", "an id of its own")
            ids = range(first, last + 1)
            self._ids.update((n, name) for n in ids)
            next_id = max(self._ids) + 1
            yield from self.members_of(table, base, ids=ids)

    def members_of(self, table: _Table, base: Path, *, ids: range) -> Iterator[MemberConfig]:
        """The members of one table, `{n}` replaced. Problems go to the table; members are still produced."""
        kind = table.member_type()
        read_only = table.boolean("read_only", False)
        queues = table.integer("queues", 1, 1, MAX_QUEUES) or 1
        legacy = table.boolean("legacy", True)
        queue_size = table.one_of("queue_size", 256, QUEUE_SIZES)
        if legacy and queue_size > LEGACY_QUEUE_SIZE:
            table.warning(
                "queue_size",
                f"found {queue_size}: SeaBIOS and iPXE refuse a legacy device with a larger queue than "
                f"{LEGACY_QUEUE_SIZE}",
                f"up to {LEGACY_QUEUE_SIZE}, or legacy = false",
            )
        packed = table.boolean("packed", False)
        in_order = table.boolean("in_order", False)
        shared = table.boolean("shared", False)
        vfio_user = table.boolean("vfio_user", False)
        vectors = self._vectors(table, vfio_user)
        blk_size = table.one_of("blk_size", SECTOR, BLK_SIZES)
        serial = table.string("serial", _SERIAL_ALLOWED) or ""
        poll_us = table.integer("poll_us", 0, 0, MAX_POLL_US) or 0
        image = table.string("image", _IMAGE_ALLOWED)
        if "image" not in table.values and kind is not None:
            table.missing("image", _IMAGE_ALLOWED)
        template = MemberConfig(
            ids[0],
            kind or "",
            "",
            read_only,
            queues,
            queue_size,
            legacy,
            blk_size,
            "",
            packed,
            in_order,
            shared,
            vectors,
            vfio_user,
            poll_us,
        )
        failed = 0
        for member_id in ids:
            resolved = ""
            name = self._serial(table, serial, member_id) if serial else ""
            if image is not None:
                try:
                    text = _expand(image, member_id)
                    if member_id in self._unused and "\0" not in text and not text.startswith(("ram:", "null:")):
                        yield replace(template, id=member_id, image=str((base / text).absolute()), serial=name)
                        continue
                    resolved = _resolve_image(text, base, read_only=read_only, blk_size=blk_size)
                    self._claim(resolved, f"member {member_id}", table, read_only=read_only)
                except _Wrong as wrong:
                    failed += 1
                    if failed <= REPORTED_PER_TABLE:
                        table.problem("image", wrong.found, wrong.allowed)
            yield replace(template, id=member_id, image=resolved, serial=name)
        if failed > REPORTED_PER_TABLE:
            table.problem(
                "image", f"{failed - REPORTED_PER_TABLE} more members of this table have such a problem", None
            )

    def _devices(self, values: object, base: Path) -> Iterator[VhostUserDeviceConfig]:
        if values is None:
            return
        if isinstance(values, dict):
            wanted = "[[vhost_user_devices]], with two brackets: a list of tables"
            self.problem("[vhost_user_devices]", None, "found one table", wanted)
            return
        if not isinstance(values, list):
            wanted = "[[vhost_user_devices]], a list of tables"
            self.problem("vhost_user_devices", None, f"found {_show(values)}", wanted)
            return
        names: dict[str, str] = {}
        uuids: dict[bytes, str] = {}
        for number, entry in enumerate(values, 1):
            where = f"[[vhost_user_devices]] #{number}"
            if not isinstance(entry, dict):
                self.problem(where, None, f"found {_show(entry)}", "a table")
                continue
            table = _Table(self, where, entry, _DEVICE_KEYS)
            device = self._device(table, base)
            if device.name and names.setdefault(device.name, where) != where:
                table.problem(
                    "name", f"{_show(device.name)} is already taken by {names[device.name]}", "one of its own"
                )
            if any(device.uuid) and uuids.setdefault(device.uuid, where) != where:
                table.problem("uuid", f"{device.uuid_text} is already taken by {uuids[device.uuid]}", "one of its own")
            yield device

    def _device(self, table: _Table, base: Path) -> VhostUserDeviceConfig:
        """One virtio-vhost-user device. Problems go to the table; a device is still produced."""
        name = table.name_of()
        max_queues = table.integer("max_queues", 8, 1, MAX_VHOST_QUEUES) or 8
        uuid = table.string("uuid", _UUID_ALLOWED)
        if uuid is not None and _UUID.fullmatch(uuid) is None:
            table.problem("uuid", f"found {_show(uuid)}", _UUID_ALLOWED)
            uuid = None
        shared_memory = table.size(
            "shared_memory",
            _SHARED_MEMORY_ALLOWED,
            lambda size: MIN_SHARED_MEMORY <= size <= MAX_SHARED_MEMORY and size.bit_count() == 1,
        )
        if "shared_memory" not in table.values:
            shared_memory = DEFAULT_SHARED_MEMORY
        vfio_user = table.boolean("vfio_user", False)
        vectors = table.integer("vectors", None, 0, MAX_VECTORS)
        if vectors is not None and not vfio_user:
            table.warning("vectors", f"found {vectors}: only PCI functions have vectors", "with vfio_user = true")
        elif vectors == 0:
            table.warning("vectors", "found 0: there is no MSI-X, interrupts go by INTx", f"1 to {MAX_VECTORS}")
        ram_file, ram_size = self._ram_file(table, base, vfio_user, shared_memory)
        return VhostUserDeviceConfig(
            name or "",
            max_queues,
            bytes(16) if uuid is None else bytes.fromhex(uuid.replace("-", "")),
            shared_memory or DEFAULT_SHARED_MEMORY,
            vfio_user,
            vectors,
            ram_file,
            ram_size or 0,
        )

    def _ram_file(
        self, table: _Table, base: Path, vfio_user: bool, shared_memory: int | None
    ) -> tuple[Path | None, int | None]:
        """The file that is to be the front end VM's memory, and its size. One that isn't there is made at the start."""
        allowed = "whole pages of 4096 bytes, at most shared_memory"
        # what doesn't fit a region that isn't known isn't known either
        most = MAX_SHARED_MEMORY if shared_memory is None else shared_memory
        size = table.size("ram_size", allowed, lambda size: 0 < size <= most and size % PAGE == 0)
        if "ram_file" not in table.values:
            if "ram_size" in table.values:
                table.problem("ram_size", "there is no ram_file that it could be the size of", "with ram_file")
            return None, None
        text = table.string("ram_file", _RAM_FILE_ALLOWED)
        if "ram_size" not in table.values:
            table.missing("ram_size", allowed)
        # what is no boolean is a mistake by itself
        if not vfio_user and isinstance(table.values.get("vfio_user", False), bool):
            table.problem("ram_file", "only a PCI function can show a file", "with vfio_user = true")
        if text is None:
            return None, size
        try:
            return self._ram_path(base, text), size
        except _Wrong as wrong:
            table.problem("ram_file", wrong.found, wrong.allowed)
            return None, size

    def _ram_path(self, base: Path, text: str) -> Path:
        if text == "":
            raise _Wrong('found ""', _RAM_FILE_ALLOWED)
        try:
            path = (base / text).absolute()
            # the file itself is opened, not what it is a link to
            status = path.lstat() if os.path.lexists(path) else None
            if status is None and not path.parent.is_dir():
                raise _Wrong(f"{path.parent} is no directory", _RAM_FILE_ALLOWED)
        except UnicodeEncodeError:
            raise _Wrong(f"found {_show(text)}", _RAM_FILE_ALLOWED) from None
        except OSError as error:
            raise _Wrong(f"{base / text}: {os.strerror(error.errno or 0)}", _RAM_FILE_ALLOWED) from None
        if status is None:
            return path
        if not stat.S_ISREG(status.st_mode):
            raise _Wrong(f"{path} is not a regular file", _RAM_FILE_ALLOWED)
        # two devices of one VM have the same memory; a disk in its place would be overwritten
        image = self._uses.get((status.st_dev, status.st_ino))
        if image is not None:
            raise _Wrong(f"{path} is the image of {image.owner}", "a file that nothing else is in")
        return path

    def _serial(self, table: _Table, pattern: str, member_id: int) -> str:
        serial = self._serial_text(table, pattern.replace("{n}", str(member_id)))
        if not serial:
            return ""
        other = self._serials.setdefault(serial, member_id)
        if other != member_id:
            hint = "a serial of its own for each member; {n} is the member number"
            self._once(table, "serial", f"{_show(serial)} is given to members {other} and {member_id}", hint)
        return serial

    def _serial_text(self, table: _Table, serial: str) -> str:
        """The serial, if it is one."""
        if not is_serial(serial):
            self._once(table, "serial", f"found {_show(serial)}", _SERIAL_ALLOWED)
            return ""
        return serial

    def _once(self, table: _Table, key: str, found: str, allowed: str) -> None:
        if not any(problem.table == table.name and problem.key == key for problem in self.problems):
            table.problem(key, found, allowed)

    def _claim(self, image: str, owner: str, table: _Table, *, read_only: bool) -> None:
        identity = image_identity(image)
        if identity is None:
            return
        other = self._uses.setdefault(identity, _Use(owner, table, read_only))
        if other.owner != owner and not (other.read_only and read_only):
            raise _Wrong(
                f"{image} is used by {other.owner} and {owner}",
                "one writer for each image ({n} is the member number), or read_only = true for all",
            )


def _socket_names(
    owner: OwnerConfig | None,
    members: Sequence[MemberConfig],
    devices: Sequence[VhostUserDeviceConfig],
    last_id: int,
) -> Iterator[str]:
    """The longest names of sockets that this group has, of each kind."""
    yield socket_name(last_id)
    if owner is not None and owner.vfio_user:
        yield function_socket_name(0, "owner")
    if any(member.vfio_user for member in members):
        yield function_socket_name(max(member.id for member in members if member.vfio_user), "transitional")
    if devices:
        yield device_socket_name(max((device.name for device in devices), key=len), "vhost-user")


def _expand(image: str, member_id: int) -> str:
    text = image.replace("{n}", str(member_id))
    # only the braces that look meant: a real file may have any name
    unknown = re.search(r"\{[A-Za-z0-9_:]{0,16}\}", text)
    if unknown is not None and not image.startswith(("ram:", "null:")):
        raise _Wrong(f"{_show(image)} has an unknown placeholder {unknown[0]}", "{n}, the member number")
    return text


def _resolve_image(spec: str, base: Path, *, read_only: bool, blk_size: int = SECTOR) -> str:
    kind, separator, rest = spec.partition(":")
    if separator and kind in ("ram", "null"):
        try:
            size = parse_size(rest)
        except ValueError:
            raise _Wrong(f"found {_show(spec)}", f'"{kind}:SIZE" with {_SIZE_ALLOWED}') from None
        _check_size(size, _show(spec), blk_size)
        return f"{kind}:{size}"
    if spec == "":
        raise _Wrong('found ""', _IMAGE_ALLOWED)
    if "\0" in spec:
        raise _Wrong("has a NUL character", _IMAGE_ALLOWED)
    try:
        path = base / spec
        size = _file_size(path, read_only=read_only)
    except OSError as error:
        hint = None
        if error.errno == errno.ENOENT:
            hint = _IMAGE_ALLOWED
            if separator and not os.path.lexists(base / spec):
                hint = f'{_IMAGE_ALLOWED} (there is no image type "{kind}:")'
        reason = {errno.ENOENT: "no such file", errno.EACCES: "permission denied"}.get(
            error.errno or 0, os.strerror(error.errno or 0)
        )
        what = "" if read_only or error.errno != errno.EACCES else " (opened for writing; read_only = true reads only)"
        raise _Wrong(f"{base / spec}: {reason}{what}", hint) from None
    except UnicodeEncodeError:
        raise _Wrong(f"found {_show(spec)}", _IMAGE_ALLOWED) from None
    _check_size(size, str(path), blk_size)
    return str(path.absolute())


def _file_size(path: Path, *, read_only: bool) -> int:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise _Wrong(f"{path} is a directory", "a raw image file or a block device")
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise _Wrong(f"{path} is neither a file nor a block device", "a raw image file or a block device")
    # opening is the only honest test: access() doesn't see read-only file systems of the effective user
    fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _check_size(size: int, what: str, blk_size: int) -> None:
    unit = max(SECTOR, blk_size)
    if size == 0:
        raise _Wrong(f"{what} is empty", f"at least {unit} bytes")
    if size % unit:
        raise _Wrong(f"the size of {what} is {size} bytes", f"a multiple of {unit} bytes")
    if size > MAX_IMAGE:
        raise _Wrong(f"the size of {what} is {size} bytes", f"at most {MAX_IMAGE} bytes")
