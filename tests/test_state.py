# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""What a group remembers beyond its process: every change is there again, and nothing that is damaged is guessed at."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from vhu_legacy import GroupConfig, GroupError, MemberConfig, MemberError, OwnerConfig, StateError, group, state
from vhu_legacy.admin import Command, GroupType, ManagementOperation, ManagementResource, Opcode, management_data
from vhu_legacy.config import check
from vhu_legacy.group import open_group
from vhu_legacy.rundir import LOCK_FILE
from vhu_legacy.state import OLD_STATE_FILE, STATE_FILE, TEMPORARY, Kept, State

from .conftest import GroupFactory, QmpClient

MIB = 1 << 20
FLUSH = 1 << 9
VERSION_1 = 1 << 32


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory with a short name: socket paths have 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vhu-"))
    for name in ("disk1.raw", "disk2.raw"):
        (path / name).write_bytes(bytes(MIB))
    yield path
    shutil.rmtree(path)


def config(work: Path, *members: MemberConfig, **options: Any) -> GroupConfig:
    options = {"feature_management": True, **options}
    return GroupConfig("test", work / "group.toml", work / "run", members=members, **options)


def null(member_id: int, **options: Any) -> MemberConfig:
    return MemberConfig(member_id, "blk", f"null:{MIB}", **options)


def disk(member_id: int, path: Path, **options: Any) -> MemberConfig:
    return MemberConfig(member_id, "blk", str(path), **options)


def kept(work: Path) -> dict[str, Any]:
    value = json.loads((work / "run" / STATE_FILE).read_text())
    assert isinstance(value, dict)
    return value


def sign(body: dict[str, Any]) -> str:
    """A state file's text with a checksum that is right, worked out here a second time."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest})


def document(**parts: Any) -> dict[str, Any]:
    return {"version": 1, "group": "test", "added": [], "deleted": [], "changed": [], "features": [], **parts}


def leave(work: Path, content: str | bytes) -> Path:
    """A state file that somebody left."""
    (work / "run").mkdir(mode=0o700, exist_ok=True)
    path = work / "run" / STATE_FILE
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- what is kept -----------------------------------------------------------------------------------------


async def test_a_group_that_nobody_changed_leaves_nothing(work: Path) -> None:
    async with open_group(config(work, null(1))) as served:
        await served.member_add(null(2))
        assert kept(work)["added"][0]["id"] == 2
        await served.member_del(2)
        # the difference is gone again, and its file
        assert not (work / "run" / STATE_FILE).exists()
    assert not (work / "run").exists()


async def test_everything_that_was_changed_is_there_again(work: Path) -> None:
    base = config(work, null(1), null(2), disk(3, work / "disk1.raw", serial="old"), null(4))
    async with open_group(base) as served:
        await served.member_add(null(9, queues=4, queue_size=64, blk_size=512, legacy=False, packed=True, serial="{n}"))
        await served.member_del(2)
        await served.member_modify(3, serial="new", legacy=False, read_only=True, image=str(work / "disk2.raw"))
        await served.member_modify(4, size=4 * MIB)
        await served.member_modify(1, features=VERSION_1 | FLUSH)
        before = [served.query_member(member_id) for member_id in served.member_ids]
    async with open_group(base) as served:
        assert served.member_ids == (1, 3, 4, 9)
        after = [served.query_member(member_id) for member_id in served.member_ids]
        for old, new in zip(before, after, strict=True):
            for key in ("device_features", "config", "legacy", "assigned_features", "type", "vhost_user"):
                assert new[key] == old[key], (old["id"], key)
            for key in ("kind", "size", "read_only"):
                assert new["image"][key] == old["image"][key], (old["id"], key)
            assert len(new["queues"]) == len(old["queues"])
        # and what is kept is still the same
        content = kept(work)
        await served.member_add(null(10))
        await served.member_del(10)
        assert kept(work) == content


async def test_deleted_and_made_anew_as_another_one(work: Path) -> None:
    base = config(work, disk(1, work / "disk1.raw"))
    async with open_group(base) as served:
        await served.member_del(1)
        await served.member_add(disk(1, work / "disk2.raw", queues=2))
    assert (kept(work)["deleted"], [entry["id"] for entry in kept(work)["added"]]) == ([1], [1])
    async with open_group(base) as served:
        info = served.query_member(1)
        assert (info["image"]["spec"], len(info["queues"])) == (str(work / "disk2.raw"), 2)
        await served.member_del(1)
        await served.member_add(disk(1, work / "disk1.raw"))
        assert not (work / "run" / STATE_FILE).exists()


async def test_names_that_look_like_patterns(work: Path) -> None:
    directory = work / "{n}{x}"
    directory.mkdir()
    shutil.copy(work / "disk1.raw", directory / "d")
    async with open_group(config(work)) as served:
        await served.member_add(disk(5, directory / "d"))
    async with open_group(config(work)) as served:
        assert served.query_member(5)["image"]["spec"] == str(directory / "d")


async def assign_by_driver(served: group.Group) -> None:
    async with served.owner_driver() as owner:
        await owner.assign_features(1, VERSION_1 | FLUSH)


async def assign_by_raw_command(served: group.Group) -> None:
    data = management_data(ManagementOperation.ASSIGN, ManagementResource.FEATURES_63_0, VERSION_1 | FLUSH)
    async with served.owner_driver() as owner:
        await owner.execute(Command(Opcode.DEVICE_MGMT, GroupType.SR_IOV, 1, data), 16)


@pytest.mark.parametrize("assign", [assign_by_driver, assign_by_raw_command])
async def test_features_assigned_by_commands(work: Path, assign: Callable[[group.Group], Any]) -> None:
    async with open_group(config(work, null(1), null(2))) as served:
        await assign(served)
        # on disk when the command is answered
        assert kept(work)["features"] == [{"id": 1, "value": VERSION_1 | FLUSH}]
    async with open_group(config(work, null(1), null(2))) as served:
        assert served.query_member(1)["assigned_features"] == VERSION_1 | FLUSH
        assert served.query_member(2)["assigned_features"] is None


async def test_features_assigned_by_a_guest_that_drives_the_owner(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands don't pass through Python: they are noticed a moment later."""
    monkeypatch.setattr(group, "ASSIGNMENT_INTERVAL", 0.05)
    owner = OwnerConfig("blk", f"null:{MIB}", vfio_user=True)
    async with open_group(config(work, null(1), owner=owner)) as served:
        async with served.owner_driver() as driver:
            # so that the group doesn't hear of it, as of a guest's
            served._link._done = None
            await driver.assign_features(1, VERSION_1)
        with trio.fail_after(5):
            while not (work / "run" / STATE_FILE).exists():
                await trio.sleep(0.01)
        assert kept(work)["features"] == [{"id": 1, "value": VERSION_1}]


async def test_features_are_there_before_a_front_end_can_be(work: Path) -> None:
    """A QEMU that reconnects at once, and finds another device, gives it up."""
    async with open_group(config(work, null(1))) as served:
        await served.member_modify(1, features=VERSION_1 | FLUSH)
        path = served.socket_path(1)
    offered: list[int] = []
    stop = threading.Event()

    def reconnect() -> None:
        while not stop.is_set() and not offered:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                try:
                    client.connect(str(path))
                    client.sendall(struct.pack("<III", 1, 1, 0))
                    answer = client.recv(20, socket.MSG_WAITALL)
                except OSError:
                    continue
                if len(answer) == 20:
                    offered.append(int.from_bytes(answer[12:], "little"))

    client = threading.Thread(target=reconnect)
    client.start()
    try:
        async with open_group(config(work, null(1))):
            with trio.fail_after(10):
                while not offered:
                    await trio.sleep(0.01)
    finally:
        stop.set()
        client.join()
    assert offered[0] & FLUSH
    assert not offered[0] & 1 << 2


async def test_commands_at_the_same_time_share_writes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = []
    write = state.write

    def counted(directory: Path, differences: State, name: str) -> None:
        writes.append(len(differences.added))
        write(directory, differences, name)

    monkeypatch.setattr(state, "write", counted)
    async with open_group(config(work)) as served:
        async with trio.open_nursery() as nursery:
            for member_id in range(1, 41):
                nursery.start_soon(served.member_add, null(member_id))
        assert len(kept(work)["added"]) == 40
    assert writes[-1] == 40
    assert writes == sorted(writes)
    assert len(writes) < 40


# --- the disk fails ---------------------------------------------------------------------------------------


async def test_what_cant_be_kept_isnt_promised(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = config(work, null(1), null(2))
    async with open_group(base) as served:
        await served.member_add(null(3))
        content = (work / "run" / STATE_FILE).read_bytes()

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                MemberError, match=r"member 4: not added: .*state\.json can't be written: No space left"
            ):
                await served.member_add(null(4))
            assert list(served.member_ids) == [1, 2, 3]
            with pytest.raises(
                MemberError, match=r"member 1: modified, but it is as before after a restart: .*No space"
            ):
                await served.member_modify(1, serial="new")
            with pytest.raises(MemberError, match=r"member 2: deleted, but it comes again after a restart: .*No space"):
                await served.member_del(2)
            assert list(served.member_ids) == [1, 3]
            # what is on disk is what was there, whole
            assert (work / "run" / STATE_FILE).read_bytes() == content
            assert not (work / "run" / TEMPORARY).exists()
        # with the next change all is kept
        await served.member_add(null(4))
        assert kept(work)["deleted"] == [2]
        assert kept(work)["changed"] == [{"id": 1, "serial": "new"}]
        assert [entry["id"] for entry in kept(work)["added"]] == [3, 4]


# --- damage -----------------------------------------------------------------------------------------------

GOOD = sign(document(added=[{"id": 7, "type": "blk", "image": "null:1048576"}]))
DAMAGED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "damaged: not JSON"),
    "truncated": (GOOD[: len(GOOD) // 2], "damaged: not JSON"),
    "garbage": (bytes(range(256)), "damaged: not JSON"),
    "deep": ("[" * 100_000, "damaged: not JSON"),
    "a huge number": ("1" * 10_000, "damaged: not JSON"),
    "another kind": ("[]", "damaged: not a JSON object"),
    "no version": (sign({"group": "test"}), "damaged: no version"),
    "a version that is true": (sign(document(version=True)), "damaged: no version"),
    "a later version": (sign(document(version=2)), "has version 2, this program knows version 1"),
    "one bit": (GOOD.replace("1048576", "1048577"), "damaged: its checksum is wrong"),
    "no checksum": (json.dumps(document()), "damaged: its checksum is wrong"),
    "a checksum of another type": (json.dumps({**document(), "sha256": 1}), "damaged: its checksum is wrong"),
    "another group": (
        sign(document(group="other")),
        "is of group 'other', not 'test'; give this group another --run-dir",
    ),
    "a group without a name": (sign(document(group=None)), "is of group 'None'"),
    "an unknown key": (sign(document(more=1)), "damaged: unknown key 'more'"),
    "no list": (sign(document(deleted={})), "damaged: deleted is not a list"),
    "an id of text": (sign(document(deleted=["1"])), "damaged: deleted: member id 1 is out of range"),
    "an id too large": (sign(document(deleted=[65536])), "damaged: deleted: member id 65536 is out of range"),
    "an id too small": (sign(document(added=[{"id": 0}])), "damaged: added: member id 0 is out of range"),
    "no id": (sign(document(added=[{}])), "damaged: added: member id None is out of range"),
    "no table": (sign(document(added=[7])), "damaged: added: 7 is not an object"),
    "twice": (sign(document(changed=[{"id": 1}, {"id": 1}])), "damaged: changed: member 1 is there twice"),
    "what can't change": (sign(document(changed=[{"id": 1, "queues": 2}])), "member 1: unknown key 'queues'"),
    "an unknown member key": (sign(document(added=[{"id": 7, "color": 1}])), "member 7: unknown key 'color'"),
    "features of text": (sign(document(features=[{"id": 1, "value": "1"}])), "features: member 1: not 64 bits"),
    "features too large": (sign(document(features=[{"id": 1, "value": 1 << 64}])), "features: member 1: not 64 bits"),
    "an unknown type": (
        sign(document(added=[{"id": 7, "type": "disk", "image": "null:4096"}])),
        "member 7 type: found",
    ),
    "too many queues": (
        sign(document(added=[{"id": 7, "type": "blk", "image": "null:4096", "queues": 65}])),
        "member 7 queues: found 65",
    ),
    "queues of text": (
        sign(document(added=[{"id": 7, "type": "blk", "image": "null:4096", "queues": "1"}])),
        'member 7 queues: found "1"',
    ),
    "no image": (sign(document(added=[{"id": 7, "type": "blk"}])), "member 7: image None is not text"),
    "an image of no size": (sign(document(changed=[{"id": 1, "image": "null:0"}])), "member 1: image:"),
    "an image with a NUL": (sign(document(changed=[{"id": 1, "image": "a\0"}])), "member 1: image: has a NUL"),
    "a serial too long": (sign(document(changed=[{"id": 1, "serial": "x" * 21}])), "member 1: serial 'xxx"),
    "a serial of bytes": (sign(document(changed=[{"id": 1, "serial": [1]}])), r"member 1: serial [1]"),
    "features that there aren't": (
        sign(document(features=[{"id": 9, "value": 1}], added=[{"id": 9, "type": "blk", "image": "gone"}])),
        "member 9: image:",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
async def test_a_damaged_file_stops_the_start_and_nothing_else(work: Path, name: str) -> None:
    content, problem = DAMAGED[name]
    path = leave(work, content)
    before = path.read_bytes()
    image = (work / "disk1.raw").stat()
    with pytest.raises(StateError) as caught:
        async with open_group(config(work, disk(1, work / "disk1.raw"))):
            pass
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert problem in text
    assert "start with --fresh" in text
    assert len(text) < 600
    assert "\n" not in text
    assert path.read_bytes() == before
    now = (work / "disk1.raw").stat()
    assert (now.st_mtime_ns, now.st_size) == (image.st_mtime_ns, image.st_size)
    assert sorted(entry.name for entry in (work / "run").iterdir()) == [STATE_FILE]
    # and the way out works; nothing is thrown away
    async with open_group(config(work, disk(1, work / "disk1.raw")), fresh=True) as served:
        assert served.member_ids == (1,)
    assert (work / "run" / OLD_STATE_FILE).read_bytes() == before


async def test_what_isnt_a_file_of_ours(work: Path) -> None:
    path = leave(work, GOOD)
    path.rename(work / "elsewhere")
    path.symlink_to(work / "elsewhere")
    with pytest.raises(StateError, match="is a symbolic link"):
        async with open_group(config(work)):
            pass
    path.unlink()
    path.mkdir()
    with pytest.raises(StateError, match="is not a regular file"):
        async with open_group(config(work)):
            pass
    path.rmdir()
    os.mkfifo(path)
    with trio.fail_after(5), pytest.raises(StateError, match="is not a regular file"):
        async with open_group(config(work)):
            pass
    path.unlink()
    with path.open("wb") as stream:
        stream.truncate(state.MAX_STATE + 1)
    with pytest.raises(StateError, match="is larger than 64 MiB"):
        async with open_group(config(work)):
            pass


async def test_a_file_of_another_user(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(work, GOOD)
    # only root can give a file away; so it is we who are another one
    monkeypatch.setattr("vhu_legacy.state.os.geteuid", lambda: 12345)
    with pytest.raises(StateError, match=rf"belongs to another user \(uid {os.getuid()}\)"):
        state.read(work / "run", "kept")


async def test_a_file_that_cant_be_read(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(work, GOOD)

    def refuse(*_: object, **__: object) -> int:
        # what everybody but root gets for a file of mode 0
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("vhu_legacy.state.os.open", refuse)
    with pytest.raises(StateError, match="can't be opened: Permission denied"):
        state.read(work / "run", "kept")


@pytest.mark.parametrize("kind", ["file", "link"])
async def test_a_temporary_file_that_was_left(work: Path, kind: str) -> None:
    leave(work, GOOD)
    temporary = work / "run" / TEMPORARY
    victim = work / "victim"
    victim.write_text("mine")
    if kind == "file":
        temporary.write_text("half")
    else:
        temporary.symlink_to(victim)
    async with open_group(config(work)) as served:
        assert served.member_ids == (7,)
        await served.member_add(null(8))
    assert victim.read_text() == "mine"
    assert not temporary.exists()
    assert [entry["id"] for entry in kept(work)["added"]] == [7, 8]


# --- the group file has changed ---------------------------------------------------------------------------


async def added(work: Path, *members: MemberConfig) -> None:
    async with open_group(config(work)) as served:
        for member in members:
            await served.member_add(member)


async def test_an_added_member_is_now_in_the_group_file(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    await added(work, disk(1, work / "disk1.raw"))
    async with open_group(config(work, disk(1, work / "disk1.raw"))) as served:
        assert served.member_ids == (1,)
    assert "member 1 was added and is now in" in caplog.text
    # the group file says it all
    assert not (work / "run").exists() or not (work / "run" / STATE_FILE).exists()


async def test_another_member_has_the_added_ones_number(work: Path) -> None:
    await added(work, disk(1, work / "disk1.raw"))
    content = (work / "run" / STATE_FILE).read_bytes()
    with pytest.raises(StateError) as caught:
        async with open_group(config(work, disk(1, work / "disk2.raw"))):
            pass
    for part in (STATE_FILE, "member 1 was added", "disk1.raw", "group.toml", "another id", "--fresh"):
        assert part in str(caught.value)
    assert (work / "run" / STATE_FILE).read_bytes() == content


async def test_changed_members_are_gone_from_the_group_file(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_group(config(work, null(1), null(2), null(3))) as served:
        await served.member_modify(1, serial="new")
        await served.member_modify(2, features=VERSION_1)
        await served.member_del(3)
    async with open_group(config(work)) as served:
        assert served.member_ids == ()
    assert "member 1 was changed and is gone from" in caplog.text
    assert "member 2 was assigned features and is gone from" in caplog.text
    assert not (work / "run" / STATE_FILE).exists()


async def test_what_the_file_says_now_and_what_was_changed_go_together(work: Path) -> None:
    async with open_group(config(work, null(1, queues=1, serial="old"))) as served:
        await served.member_modify(1, serial="new")
    async with open_group(config(work, null(1, queues=2, serial="other"))) as served:
        info = served.query_member(1)
        assert (len(info["queues"]), info["config"]["serial"]) == (2, "new")


async def test_features_are_no_longer_allowed(work: Path) -> None:
    async with open_group(config(work, null(1))) as served:
        await served.member_modify(1, features=VERSION_1)
    with pytest.raises(
        StateError, match=r"state\.json: member 1 was assigned features 0x100000000.*feature_management = true"
    ):
        async with open_group(config(work, null(1), feature_management=False)):
            pass


async def test_the_image_of_an_added_member_is_gone(work: Path) -> None:
    await added(work, disk(5, work / "disk1.raw"))
    (work / "disk1.raw").rename(work / "away")
    with pytest.raises(
        StateError, match=r"state\.json: member 5: image: .*disk1\.raw: no such file.*put the image back"
    ):
        async with open_group(config(work)):
            pass
    (work / "away").rename(work / "disk1.raw")
    async with open_group(config(work)) as served:
        assert served.member_ids == (5,)


async def test_the_image_of_an_added_member_is_used_by_another_one(work: Path) -> None:
    await added(work, disk(5, work / "disk1.raw"))
    with pytest.raises(StateError, match=r"state\.json: member 5: image .* is used by member 1.*--fresh"):
        async with open_group(config(work, disk(1, work / "disk1.raw"))):
            pass


def test_images_that_arent_served_neednt_be_there(work: Path) -> None:
    file = work / "group.toml"
    file.write_text('[group]\nname = "test"\n[[members]]\ncount = 3\ntype = "blk"\nimage = "disk{n}.raw"\n')
    assert len(check(file).problems) == 1
    result = check(file, lambda name, directory: {3})
    assert result.config is not None
    assert result.config.members[2].image == str(work / "disk3.raw")
    assert check(file, lambda name, directory: {1}).config is None


def test_differences_and_back(work: Path) -> None:
    base = config(work, null(1), null(2), null(3))
    found = {
        1: Kept(null(1)),
        2: Kept(null(2, serial="x"), 5),
        # as another one: nothing that member-modify could make of it
        3: Kept(null(3, queues=2)),
        4: Kept(null(4), 7),
    }
    differences = state.difference(base.members, found)
    assert (set(differences.added), differences.deleted, set(differences.changed)) == ({3, 4}, frozenset({3}), {2})
    path = work / STATE_FILE
    again = state.decode(state.encode(differences, "test"), path, "test")
    assert again == differences
    members, notes = state.merge(again, base, path)
    assert {entry.config.id: entry for entry in members} == found
    assert not notes
    assert not state.difference(base.members, {1: Kept(null(1)), 2: Kept(null(2)), 3: Kept(null(3))})


# --- whole processes --------------------------------------------------------------------------------------

FILE = """
    [group]
    name = "kept"
    feature_management = true
    [[members]]
    count = 2
    type = "blk"
    image = "disk{n}.raw"
"""


@pytest.mark.parametrize("end", ["kill", "term"])
def test_after_the_end_of_the_process(start_group: GroupFactory, end: str) -> None:
    directory = start_group.directory
    for number in (1, 2, 3):
        (directory / f"disk{number}.raw").write_bytes(bytes([number]) * MIB)
    served = start_group(FILE)
    try:
        served.execute("member-add", type="blk", image="disk{n}.raw", id=3)
        served.execute("member-del", id=2)
        served.execute("member-modify", id=1, serial="kept")
        served.execute("member-assign-features", id=1, features=VERSION_1)
        # deleted, it isn't needed any more
        (directory / "disk2.raw").unlink()
    finally:
        if end == "kill":
            served.kill()
        else:
            assert served.stop() == 0
        start_group.started.remove(served)  # type: ignore[attr-defined]
    assert (directory / "run" / STATE_FILE).exists()
    command = [sys.executable, "-m", "vhu_legacy", "serve", str(directory / "group.toml"), "--run-dir"]
    again = subprocess.Popen([*command, str(directory / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert again.stdout is not None
        assert again.stderr is not None
        ready = json.loads(again.stdout.readline())
        assert [member["id"] for member in ready["members"]] == [1, 3]
        client = QmpClient(ready["qmp"])
        info = client.execute("query-member", id=1)
        assert (info["config"]["serial"], info["assigned-features"]) == ("kept", VERSION_1)
        client.close()
    finally:
        again.send_signal(signal.SIGTERM)
        _, log = again.communicate(timeout=20)
    assert again.returncode == 0
    expected = b"state.json: members: 1 added, 1 deleted, 1 changed, 1 with assigned features"
    assert log.count(expected) == 1
    assert (directory / "disk1.raw").read_bytes() == b"\1" * MIB
    # without the state the file's own members have to be there
    fresh = subprocess.run([*command, str(directory / "run"), "--fresh"], capture_output=True, timeout=30, check=False)
    assert fresh.returncode == 1
    assert b"disk2.raw: no such file" in fresh.stderr


def test_a_kill_at_any_moment_leaves_a_whole_file(start_group: GroupFactory) -> None:
    directory = start_group.directory
    served = start_group('[group]\nname = "kept"\n')
    answered = 0
    try:
        served.qmp._socket.settimeout(5)  # type: ignore[union-attr]
        killer = threading.Timer(0.3, served.process.kill)
        killer.start()
        with suppress(EOFError, OSError):
            for number in range(1, 60000):
                served.execute("member-add", type="blk", image="null:1MiB", id=number)
                answered = number
        killer.join()
        assert served.process.wait(5) == -signal.SIGKILL
    finally:
        served.kill()
        start_group.started.remove(served)  # type: ignore[attr-defined]
    found = state.read(directory / "run", "kept")
    assert found is not None
    # what was answered is there; what was under way may be
    assert answered > 0
    assert len(found.added) in (answered, answered + 1)


def test_the_error_at_the_terminal(work: Path) -> None:
    path = leave(work, "{")
    (work / "group.toml").write_text('[group]\nname = "test"\n[[members]]\ntype = "blk"\nimage = "null:1MiB"\n')
    command = [sys.executable, "-m", "vhu_legacy", "serve", str(work / "group.toml"), "--run-dir", str(work / "run")]
    ended = subprocess.run(command, capture_output=True, timeout=30, check=False, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"vhu-legacy: {path}: damaged: not JSON")
    assert "--fresh" in ended.stderr


async def test_what_a_killed_process_has_under_way_is_waited_for(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests go on in the kernel, with the image's lock: what they write must not come last."""
    base = config(work, null(1), disk(2, work / "disk1.raw"))
    with (work / "disk1.raw").open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        # in use by somebody else, that is told at once
        with trio.fail_after(2), pytest.raises(MemberError, match=r"member 2: .*in use by another member or process"):
            async with open_group(base):
                pass
        (work / "run").mkdir(mode=0o700)
        (work / "run" / LOCK_FILE).write_text("4194304\n")
        opened = trio.Event()

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            async with open_group(base) as served:
                assert served.member_ids == (1, 2)
                opened.set()

        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            with trio.move_on_after(0.3):
                await opened.wait()
            assert not opened.is_set()
            fcntl.flock(stream, fcntl.LOCK_UN)
            with trio.fail_after(2):
                await opened.wait()
        # but not for ever
        fcntl.flock(stream, fcntl.LOCK_EX)
        monkeypatch.setattr(group, "LOCK_PATIENCE", 0.1)
        (work / "run").mkdir(mode=0o700, exist_ok=True)
        (work / "run" / LOCK_FILE).write_text("4194304\n")
        with trio.fail_after(2), pytest.raises(MemberError, match="in use by another member or process"):
            async with open_group(base):
                pass


async def test_a_group_that_is_served_keeps_its_state_from_others(work: Path) -> None:
    async with open_group(config(work)) as served:
        await served.member_add(null(1))
        with pytest.raises(GroupError, match="in use by process"):
            async with open_group(config(work), fresh=True):
                pass
        assert (work / "run" / STATE_FILE).exists()
