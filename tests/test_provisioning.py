# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Members are made what they shall be before and between uses, over QMP and by the owner; never under a front end."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from vhu_legacy import GroupConfig, MemberConfig, MemberError
from vhu_legacy.client import GroupClient, connect
from vhu_legacy.errors import ClientError
from vhu_legacy.group import Group, open_group
from vhu_legacy.group_qmp import serve_qmp

from .conftest import GroupFactory

MIB = 1 << 20
FLUSH = 1 << 9
SEG_MAX = 1 << 2
ANY_LAYOUT = 1 << 27
VERSION_1 = 1 << 32


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory with a short name: socket paths have 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vhu-"))
    yield path
    shutil.rmtree(path)


def config(work: Path, *members: MemberConfig, **options: Any) -> GroupConfig:
    options = {"feature_management": True, **options}
    return GroupConfig("test", work / "group.toml", work / "run", members=members, **options)


def ram(member_id: int, **options: Any) -> MemberConfig:
    return MemberConfig(member_id, "blk", f"ram:{MIB}", **options)


@asynccontextmanager
async def over_qmp(served: Group) -> AsyncIterator[GroupClient]:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_qmp, served)
        async with connect(served.run_dir) as client:
            yield client
        nursery.cancel_scope.cancel()


async def offered(path: Path) -> int:
    """The features that a vhost-user front end is offered."""
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(struct.pack("<III", 1, 1, 0))
        answer = b""
        with trio.fail_after(10):
            while len(answer) < 20:
                answer += await stream.receive_some(20 - len(answer))
        return int.from_bytes(answer[12:], "little")


async def until_detached(served: Group, member_id: int) -> None:
    with trio.fail_after(10):
        while served.query_member(member_id)["state"] != "detached":
            await trio.sleep(0.01)


@asynccontextmanager
async def attached(served: Group, member_id: int) -> AsyncIterator[None]:
    async with await trio.open_unix_socket(served.socket_path(member_id)) as stream:
        await stream.send_all(struct.pack("<III", 1, 1, 0))
        await stream.receive_some(100)
        yield
    await until_detached(served, member_id)


async def test_features_before_and_between_uses(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served, over_qmp(served) as client:
        before = await offered(served.socket_path(1))
        assert before & SEG_MAX
        assert before & FLUSH
        await until_detached(served, 1)
        assert not await client.member_modify(1, features=before & (FLUSH | VERSION_1))
        after = await offered(served.socket_path(1))
        assert after & FLUSH
        assert not after & SEG_MAX
        await until_detached(served, 1)
        async with served.owner_driver() as owner:
            assert (await owner.member_features(1)).device & (FLUSH | SEG_MAX | ANY_LAYOUT) == FLUSH | ANY_LAYOUT
            # its driver has begun: too late
            await owner.legacy_common_write(1, 18, b"\1")
            with pytest.raises(ClientError, match=r"features 0x0 can't be assigned: DEVICE_MGMT: EBUSY"):
                await client.member_modify(1, features=0)
            await owner.legacy_common_write(1, 18, b"\0")
            await client.member_modify(1, features=before & VERSION_1)
            assert not (await owner.member_features(1)).device & FLUSH
        with pytest.raises(ClientError, match=r"features 0x[0-9a-f]+ can't be assigned: .*INVALID_FIELD"):
            await client.member_modify(1, features=1 << 62)


@pytest.mark.parametrize("change", [{"features": 0}, {"legacy": False}, {"serial": "new"}])
async def test_not_while_a_front_end_is_attached(work: Path, change: dict[str, Any]) -> None:
    async with open_group(config(work, ram(1, serial="old"))) as served:
        before = served.query_member(1)
        async with attached(served, 1):
            with pytest.raises(
                MemberError, match="attached to a front end; legacy, serial and features are set before"
            ):
                await served.member_modify(1, **change)
        after = served.query_member(1)
        for key in ("assigned_features", "legacy", "config"):
            assert after[key] == before[key]
        await served.member_modify(1, **change)
        assert served.query_member(1) != after


async def test_the_serial_before_and_between_uses(work: Path) -> None:
    async with open_group(config(work, ram(1, serial="old"))) as served, over_qmp(served) as client:
        await client.member_modify(1, serial="new")
        assert served.query_member(1)["config"]["serial"] == "new"
        for wrong in ("s" * 21, "é", "\n"):
            with pytest.raises(ClientError, match="up to 20 printable ASCII characters"):
                await client.member_modify(1, serial=wrong)
        assert served.query_member(1)["config"]["serial"] == "new"


async def test_transitional_or_not(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served, over_qmp(served) as client:
        assert await offered(served.socket_path(1)) & ANY_LAYOUT
        await until_detached(served, 1)
        await client.member_modify(1, legacy=False)
        assert not (await client.query_member(1))["legacy"]
        assert not await offered(served.socket_path(1)) & ANY_LAYOUT
        await until_detached(served, 1)
        await client.member_modify(1, legacy=True)
        assert await offered(served.socket_path(1)) & ANY_LAYOUT


async def test_several_at_once_or_none(work: Path) -> None:
    async with open_group(config(work, ram(1, serial="old"))) as served:
        before = served.query_member(1)
        with pytest.raises(MemberError, match="can't be served"):
            await served.member_modify(1, features=FLUSH, size=1000)
        async with served.owner_driver() as owner:
            assert served.query_member(1)["config"] == before["config"]
            bits = await owner.assigned_features(1)
            # refused by the native half, after everything has been checked and the features been assigned
            with pytest.raises(MemberError, match="can't be resized"):
                await served.member_modify(1, features=FLUSH, size=2 * MIB)
            assert await owner.assigned_features(1) == bits
            await served.member_modify(1, features=FLUSH | VERSION_1, image=f"ram:{2 * MIB}")
            assert await owner.assigned_features(1) == FLUSH | VERSION_1
        assert served.query_member(1)["config"]["capacity"] == 2 * MIB // 512


async def test_a_new_member_is_as_configured(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served, over_qmp(served) as client:
        await client.member_modify(1, features=VERSION_1)
        await client.member_del(1)
        await client.member_add(type="blk", image="ram:1MiB", id=1, packed=True, vectors=4, poll_us=50)
        info = await client.query_member(1)
        assert info["assigned-features"] is None
        assert info["msix"] == {"enabled": False, "vectors": 4}
        assert info["poll-us"] == 50
        assert await offered(served.socket_path(1)) & FLUSH


def test_provisioning_a_served_group(start_group: GroupFactory) -> None:
    """The whole way, in a process of its own: add, provision, use by commands, take away; the owner follows."""
    group = start_group(
        """
        [group]
        name = "provisioning"
        feature_management = true
        [owner]
        type = "blk"
        image = "ram:1MiB"
        [[members]]
        type = "blk"
        image = "ram:1MiB"
        """
    )
    (group.directory / "disk.raw").write_bytes(bytes(MIB))
    added = group.execute("member-add", type="blk", image="disk.raw", id=4, serial="four")
    assert added["id"] == 4
    assert group.execute("query-owner")["num-vfs"] == 4
    assigned = group.execute("member-assign-features", id=4, features=FLUSH)
    assert assigned["features"] == FLUSH
    group.execute("member-modify", id=4, size=2 * MIB)
    read = group.execute("member-legacy-read", id=4, space="device", offset=0, length=8)
    assert read["value"] == 2 * MIB // 512
    group.execute("member-legacy-write", id=4, space="common", offset=18, data="03")
    assert group.member(4)["status"]["names"] == ["ACKNOWLEDGE", "DRIVER"]
    trace = group.execute("query-trace", id=4)
    assert [entry["register"] for entry in trace["entries"] if entry["register"]][-2:] == ["capacity", "device_status"]
    fds = group.open_fds()
    for _ in range(20):
        group.execute("member-del", id=4)
        assert group.execute("query-owner")["num-vfs"] == 1
        group.execute("member-add", type="blk", image="disk.raw", id=4)
    assert group.open_fds() == fds
    assert json.dumps(group.execute("query-owner"))
