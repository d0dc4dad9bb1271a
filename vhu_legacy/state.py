# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a group must remember when its process dies: `state.json` in the run directory.

The group file says what a group begins with. What was changed since then by commands (members added and deleted,
images swapped, provisioning) is known to nobody but the process, and a QEMU that reconnects after the process was
killed has to find the very device it was using. So the differences against the group file are kept beside the sockets,
and read back by whoever serves this run directory next. There is no file when there are no differences.

The file is replaced as a whole: a temporary one is written, synced and renamed over it, then the directory is synced. A
process that is killed, or a machine that loses power, leaves the old content or the new one. It carries a checksum, so
that anything else that happens to it is noticed; a file that can't be understood stops the start before an image is
opened, and is never overwritten.

It is this user's own file, which makes it honest but not right: values go through the same checks as those of a
group file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from .config import MAX_MEMBER_ID, SERIAL_BYTES, GroupConfig, MemberConfig, is_serial, parse_member, resolve_image
from .errors import ConfigError, StateError

__all__ = ["OLD_STATE_FILE", "STATE_FILE", "Kept", "State", "difference", "merge"]

STATE_FILE: Final = "state.json"
TEMPORARY: Final = "state.json.tmp"
OLD_STATE_FILE: Final = "state.json.old"
"""What `serve --fresh` makes of it; one that is there already is replaced."""
VERSION: Final = 1
MAX_STATE: Final = 64 * 1024 * 1024
CHANGEABLE: Final = ("image", "read_only", "legacy", "serial")
"""What `member-modify` can change, as it stands in a group file. The size of a RAM or null image is part of `image`."""
MEMBER_KEYS: Final = tuple(name for name in MemberConfig.__slots__ if name != "id")


@dataclass(frozen=True, slots=True)
class Kept:
    """A member as it shall be served, and the feature bits it was assigned; None for all it has."""

    config: MemberConfig
    features: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """Differences against a group file, by member id, as they stand in the file: nothing in here is checked."""

    added: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    deleted: frozenset[int] = frozenset()
    changed: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    features: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.deleted or self.changed or self.features)

    def __str__(self) -> str:
        counts = (
            (len(self.added), "added"),
            (len(self.deleted), "deleted"),
            (len(self.changed), "changed"),
            (len(self.features), "with assigned features"),
        )
        return "members: " + ", ".join(f"{number} {what}" for number, what in counts if number)

    @property
    def unused_images(self) -> frozenset[int]:
        """The members of the group file whose image there isn't served."""
        return self.deleted | {member_id for member_id, values in self.changed.items() if "image" in values}


# --- differences -------------------------------------------------------------------------------------------


def difference(members: Collection[MemberConfig], kept: Mapping[int, Kept]) -> State:
    """How what is served differs from what a group file says."""
    base = {member.id: member for member in members}
    added = {}
    changed = {}
    for member_id, entry in kept.items():
        origin = base.get(member_id)
        if entry.config is origin:
            continue
        if origin is None or not _provisioned(origin, entry.config):
            added[member_id] = _table(entry.config, MEMBER_KEYS)
        elif entry.config != origin:
            keys = [key for key in CHANGEABLE if getattr(entry.config, key) != getattr(origin, key)]
            changed[member_id] = _table(entry.config, keys)
    # a member that was deleted and made anew as something else is both: added, and none of the file's
    deleted = frozenset(base.keys() - kept.keys() | base.keys() & added.keys())
    features = {member_id: entry.features for member_id, entry in kept.items() if entry.features is not None}
    return State(added, deleted, changed, features)


def _provisioned(origin: MemberConfig, config: MemberConfig) -> bool:
    """Whether `member-modify` can make one of the other."""
    return config == replace(origin, **{key: getattr(config, key) for key in CHANGEABLE})


def _table(config: MemberConfig, keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key in keys if (value := getattr(config, key)) is not None}


def merge(state: State, config: GroupConfig, path: Path) -> tuple[tuple[Kept, ...], tuple[str, ...]]:
    """What is to be served by a group file and the differences to it; and notes on what no longer applies.

    Raises StateError when the two contradict each other, or a member that the state names can't be served. Touches the
    file system.
    """
    base = config.source.absolute().parent
    notes = []
    members = {member.id: member for member in config.members if member.id not in state.deleted}
    for member_id, values in state.changed.items():
        origin = members.get(member_id)
        if origin is None:
            notes.append(f"member {member_id} was changed and is gone from {config.source}: forgotten")
            continue
        members[member_id] = _member(path, base, member_id, {**_table(origin, MEMBER_KEYS), **values})
    for member_id, values in state.added.items():
        wanted = _member(path, base, member_id, values)
        found = members.setdefault(member_id, wanted)
        if found is not wanted and found != wanted:
            raise StateError(
                path,
                f"member {member_id} was added ({wanted.image}) and is now in {config.source}, too, as another one",
                "give the one in the group file another id",
            )
        if found is not wanted:
            notes.append(f"member {member_id} was added and is now in {config.source}")
    features = {}
    for member_id, value in state.features.items():
        if member_id not in members:
            notes.append(f"member {member_id} was assigned features and is gone from {config.source}: forgotten")
        elif not config.feature_management:
            problem = f"member {member_id} was assigned features 0x{value:x}, and {config.source} no longer allows that"
            raise StateError(path, problem, "set feature_management = true")
        else:
            features[member_id] = value
    return tuple(Kept(member, features.get(member_id)) for member_id, member in members.items()), tuple(notes)


def _member(path: Path, base: Path, member_id: int, values: Mapping[str, Any]) -> MemberConfig:
    """A member, checked as one of a group file."""
    label = f"member {member_id}"
    image, serial = values.get("image"), values.get("serial", "")
    if not isinstance(image, str):
        raise StateError(path, f"{label}: image {image!r} is not text")
    if not isinstance(serial, str) or not is_serial(serial):
        raise StateError(path, f"{label}: serial {serial!r}; allowed: up to {SERIAL_BYTES} printable ASCII characters")
    # both have been through the replacement of {n}, and what looks like it now is part of a name
    table = {key: value for key, value in values.items() if key != "serial"}
    try:
        config = parse_member({**table, "image": "null:4096"}, member_id=member_id, base=base, label=label)
    except ConfigError as error:
        found = "; ".join(str(problem) for problem in error.problems)
        raise StateError(path, found) from None
    try:
        resolved = resolve_image(image, base, read_only=config.read_only, blk_size=config.blk_size)
    except ValueError as error:
        raise StateError(path, f"{label}: image: {error}", "put the image back") from None
    return replace(config, image=resolved, serial=serial)


# --- the file ----------------------------------------------------------------------------------------------


def encode(state: State, group: str) -> bytes:
    """The file's content."""
    body: dict[str, Any] = {
        "version": VERSION,
        "group": group,
        "added": [{"id": member_id, **values} for member_id, values in sorted(state.added.items())],
        "deleted": sorted(state.deleted),
        "changed": [{"id": member_id, **values} for member_id, values in sorted(state.changed.items())],
        "features": [{"id": member_id, "value": value} for member_id, value in sorted(state.features.items())],
    }
    text = _canonical(body)
    return f'{text[:-1]},"sha256":"{_checksum(text)}"}}\n'.encode("ascii")


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _checksum(canonical: str) -> str:
    # only groups that have a state pay for it
    from hashlib import sha256

    return sha256(canonical.encode("ascii")).hexdigest()


def decode(data: bytes, path: Path, group: str) -> State:
    """The state in a file's content. Raises StateError: damaged, or not of this group."""
    try:
        # numbers of thousands of digits are refused by Python; nothing that we write has fractions
        body = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        text = f"{type(error).__name__}: {error}"
        raise StateError(path, f"damaged: not JSON ({text[:200]})") from None
    if not isinstance(body, dict):
        raise StateError(path, "damaged: not a JSON object")
    version = body.get("version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise StateError(path, "damaged: no version")
    if version != VERSION:
        raise StateError(
            path,
            f"has version {version}, this program knows version {VERSION}",
            "serve the group with the program that wrote it",
        )
    checksum = body.pop("sha256", None)
    try:
        right = checksum == _checksum(_canonical(body))
    except (ValueError, RecursionError):
        right = False
    if not right:
        raise StateError(path, "damaged: its checksum is wrong")
    owner = body.get("group")
    if owner != group:
        raise StateError(path, f"is of group {str(owner)!r}, not {group!r}", "give this group another --run-dir")
    return _Reader(path).state(body)


class _Reader:
    """The types of what is in a file. A checksum that is right says nothing about who made it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def state(self, body: Mapping[str, Any]) -> State:
        unknown = body.keys() - {"version", "group", "added", "deleted", "changed", "features"}
        if unknown:
            raise StateError(self._path, f"damaged: unknown key {min(unknown)!r}")
        deleted = [self._id("deleted", member_id) for member_id in self._list(body, "deleted")]
        return State(
            self._tables(body, "added", MEMBER_KEYS),
            frozenset(deleted),
            self._tables(body, "changed", CHANGEABLE),
            {
                member_id: self._features(member_id, values)
                for member_id, values in self._tables(body, "features", ("value",)).items()
            },
        )

    def _list(self, body: Mapping[str, Any], key: str) -> list[Any]:
        values = body.get(key)
        if not isinstance(values, list):
            raise StateError(self._path, f"damaged: {key} is not a list")
        return values

    def _id(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_MEMBER_ID:
            raise StateError(self._path, f"damaged: {key}: member id {str(value)[:40]} is out of range")
        return value

    def _tables(self, body: Mapping[str, Any], key: str, allowed: Collection[str]) -> dict[int, dict[str, Any]]:
        tables: dict[int, dict[str, Any]] = {}
        for values in self._list(body, key):
            if not isinstance(values, dict):
                raise StateError(self._path, f"damaged: {key}: {str(values)[:40]} is not an object")
            member_id = self._id(key, values.pop("id", None))
            unknown = values.keys() - allowed
            if unknown:
                raise StateError(self._path, f"damaged: {key}: member {member_id}: unknown key {min(unknown)!r}")
            if member_id in tables:
                raise StateError(self._path, f"damaged: {key}: member {member_id} is there twice")
            tables[member_id] = values
        return tables

    def _features(self, member_id: int, values: Mapping[str, Any]) -> int:
        value = values.get("value")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise StateError(self._path, f"damaged: features: member {member_id}: not 64 bits")
        return value


def read(directory: Path, group: str) -> State | None:
    """The state that was left in a run directory, None when there is none. Raises StateError. Blocks."""
    path = directory / STATE_FILE
    try:
        # O_NONBLOCK: a FIFO without a writer must not hang the start
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        is_link = path.is_symlink()
        reason = "is a symbolic link" if is_link else f"can't be opened: {error.strerror or error}"
        raise StateError(path, reason) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StateError(path, "is not a regular file")
        if status.st_uid != os.geteuid():
            raise StateError(path, f"belongs to another user (uid {status.st_uid})")
        with os.fdopen(fd, "rb", closefd=False) as stream:
            data = stream.read(MAX_STATE + 1)
    except OSError as error:
        raise StateError(path, f"can't be read: {error.strerror or error}") from None
    finally:
        os.close(fd)
    if len(data) > MAX_STATE:
        raise StateError(path, f"is larger than {MAX_STATE >> 20} MiB")
    return decode(data, path, group)


def write(directory: Path, state: State, group: str) -> None:
    """Replace the state in a run directory; without differences there is no file. On the disk when it returns.

    Raises OSError; the file is as it was then. Blocks.
    """
    path = directory / STATE_FILE
    if not state:
        try:
            path.unlink()
        except FileNotFoundError:
            return
        _sync_directory(directory)
        return
    data = encode(state, group)
    if len(data) > MAX_STATE:
        raise OSError(errno.EFBIG, f"it would be larger than {MAX_STATE >> 20} MiB")
    temporary = directory / TEMPORARY
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(directory)


def set_aside(directory: Path) -> bool:
    """Have the state forgotten: it is renamed. False when there is none. Raises OSError. Blocks."""
    try:
        (directory / STATE_FILE).rename(directory / OLD_STATE_FILE)
    except FileNotFoundError:
        return False
    _sync_directory(directory)
    return True


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
