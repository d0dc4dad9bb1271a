# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A group's life: run directory, members that come and go, events, clean ends; and the group over QMP."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from vhu_legacy import (
    GroupConfig,
    GroupError,
    MemberConfig,
    MemberError,
    OwnerConfig,
    RunDirBusyError,
    group,
    qemu_args,
)
from vhu_legacy.client import GroupClient, connect
from vhu_legacy.config import VhostUserDeviceConfig
from vhu_legacy.errors import ClientError
from vhu_legacy.functions import MEMBER_FUNCTIONS, FunctionKind
from vhu_legacy.group import Group, GroupEvent, open_group
from vhu_legacy.group_qmp import EVENTS, make_registry, serve_qmp
from vhu_legacy.rundir import RunDir, pid_of_lock, running_groups
from vhu_legacy.vfio_client import VfioClient

MIB = 1 << 20
GET_FEATURES = struct.pack("<III", 1, 1, 0)
UNKNOWN_REQUEST = struct.pack("<III", 999, 1, 0)


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory with a short name: socket paths have 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vhu-"))
    for name in ("disk1.raw", "disk2.raw"):
        (path / name).write_bytes(bytes(MIB))
    yield path
    shutil.rmtree(path)


def config(work: Path, *members: MemberConfig, **options: Any) -> GroupConfig:
    return GroupConfig("test", work / "group.toml", work / "run", members=members, **options)


def ram(member_id: int, **options: Any) -> MemberConfig:
    return MemberConfig(member_id, "blk", f"ram:{MIB}", **options)


def disk(member_id: int, path: Path, **options: Any) -> MemberConfig:
    return MemberConfig(member_id, "blk", str(path), **options)


def open_fds() -> list[str]:
    # a closed pool keeps its eventfds until it is collected
    gc.collect()
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


class FrontEnd:
    """As much of a front end as it takes to be attached."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def features(self) -> int:
        await self.stream.send_all(GET_FEATURES)
        answer = b""
        with trio.fail_after(10):
            while len(answer) < 20:
                data = await self.stream.receive_some(20 - len(answer))
                assert data, "the member hung up"
                answer += data
        return int.from_bytes(answer[12:], "little")

    async def hung_up(self) -> bool:
        with trio.fail_after(10):
            try:
                return await self.stream.receive_some(1) == b""
            except trio.BrokenResourceError:
                return True


@asynccontextmanager
async def attached(path: Path) -> AsyncIterator[FrontEnd]:
    async with await trio.open_unix_socket(path) as stream:
        front_end = FrontEnd(stream)
        await front_end.features()
        yield front_end


async def next_event(stream: group.EventStream, kind: str) -> GroupEvent:
    with trio.fail_after(10):
        async for event in stream:
            if event.kind == kind:
                return event
    raise AssertionError("unreachable")


# --- run directory ----------------------------------------------------------------------------------------


async def test_sockets_are_there_while_it_runs_and_nothing_is_afterwards(work: Path) -> None:
    async with open_group(config(work, ram(1), ram(7))) as served:
        assert served.member_ids == (1, 7)
        assert stat.S_IMODE(served.run_dir.stat().st_mode) == 0o700
        for member_id in served.member_ids:
            path = served.socket_path(member_id)
            assert path.name == f"member-{member_id}.vhost-user.sock"
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
            async with attached(path) as front_end:
                assert await front_end.features() & 1 << 30
        assert pid_of_lock(served.run_dir) == os.getpid()
    assert not (work / "run").exists()


async def test_a_directory_that_was_there_stays(work: Path) -> None:
    (work / "run").mkdir()
    (work / "run" / "notes.txt").touch()
    async with open_group(config(work, ram(1))):
        pass
    assert [entry.name for entry in (work / "run").iterdir()] == ["notes.txt"]


async def test_default_run_directories(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GroupConfig("test", work / "group.toml")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(work))
    async with open_group(plain) as served:
        assert served.run_dir == work / "vhu-legacy" / "test"
        assert [(g.name, g.run_dir, g.pid) for g in running_groups()] == [("test", served.run_dir, os.getpid())]
    assert running_groups() == []
    assert not (work / "vhu-legacy" / "test").exists()
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    async with open_group(GroupConfig("vhu-test-default", work / "group.toml")) as served:
        assert served.run_dir == Path(f"/tmp/vhu-legacy-{os.getuid()}/vhu-test-default")
        assert stat.S_IMODE(served.run_dir.parent.stat().st_mode) == 0o700


async def test_two_groups_cannot_share_a_run_directory(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served:
        with pytest.raises(RunDirBusyError, match=f"in use by process {os.getpid()}") as caught:
            async with open_group(config(work, ram(1))):
                pass
        assert caught.value.pid == os.getpid()
        # the loser has touched nothing
        async with attached(served.socket_path(1)):
            pass


async def test_what_a_killed_process_left_behind_is_cleared_away(work: Path) -> None:
    code = "import sys, os; from pathlib import Path; from vhu_legacy.rundir import *\n"
    code += (
        "d = Path(sys.argv[1]); RunDir.claim(d); bind_unix(d / 'qmp.sock'); bind_unix(d / 'member-1.vhost-user.sock')\n"
    )
    code += "os.kill(os.getpid(), 9)\n"
    done = await trio.run_process([sys.executable, "-c", code, str(work / "run")], check=False)
    assert done.returncode == -9
    assert {entry.name for entry in (work / "run").iterdir()} >= {"qmp.sock", "member-1.vhost-user.sock"}
    assert pid_of_lock(work / "run") is None
    async with open_group(config(work, ram(1))) as served, attached(served.socket_path(1)):
        assert not served.qmp_path.exists()


async def test_what_is_not_ours_is_not_removed(work: Path) -> None:
    run = work / "run"
    run.mkdir()
    (run / "member-1.vhost-user.sock").write_text("precious")
    with pytest.raises(GroupError, match="in the way and is not a socket"):
        async with open_group(config(work, ram(1))):
            pass
    assert (run / "member-1.vhost-user.sock").read_text() == "precious"
    (run / "member-1.vhost-user.sock").unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(run / "qmp.sock"))
        other.listen()
        with pytest.raises(GroupError, match="served by another process"):
            async with open_group(config(work, ram(1))):
                pass
        assert (run / "qmp.sock").exists()
    assert {entry.name for entry in run.iterdir()} == {"qmp.sock"}


async def test_run_directories_that_cannot_be(work: Path) -> None:
    (work / "file").touch()
    for path, reason in [
        (work / "file", "not a directory"),
        (work / "file" / "x", "ot a directory|exists"),
        (Path("/proc/none/x"), "No such file|Permission"),
    ]:
        with pytest.raises(GroupError, match=reason):
            async with open_group(config(work), run_dir=path):
                pass
    with pytest.raises(MemberError, match="too long for a Unix socket"):
        async with open_group(config(work, ram(1)), run_dir=work / ("d" * 90)):
            pass
    assert not (work / ("d" * 90)).exists()


def test_looking_at_a_lock_does_not_take_it(work: Path) -> None:
    claim = RunDir.claim(work / "run")
    claim.release()
    (work / "run").mkdir()
    for _ in range(3):
        assert pid_of_lock(work / "run") is None
        claim = RunDir.claim(work / "run")
        assert pid_of_lock(work / "run") == os.getpid()
        claim.release()


# --- members ----------------------------------------------------------------------------------------------


async def test_a_front_end_comes_and_goes(work: Path) -> None:
    async with open_group(config(work, ram(1), ram(2))) as served:
        with served.listen() as events:
            for number in (1, 2, 3):
                async with attached(served.socket_path(1)):
                    connected = await next_event(events, "connected")
                    assert (connected.member, connected.data["peer_pid"]) == (1, os.getpid())
                    info = served.query_member(1)
                    assert (info["state"], info["connections"], info["peer_pid"]) == ("attached", number, os.getpid())
                    assert served.query_group()["attached"] == 1
                assert (await next_event(events, "disconnected")).data["reason"]
            info = served.query_member(1)
            assert (info["state"], info["peer_pid"]) == ("detached", None)
            assert served.query_member(2)["connections"] == 0


async def test_members_come_and_go(work: Path) -> None:
    async with open_group(config(work, ram(1), ram(3))) as served:
        with served.listen() as events:
            assert served.free_id() == 2
            path = await served.member_add(disk(2, work / "disk1.raw", queues=4, serial="abc"))
            added = await next_event(events, "added")
            assert (added.member, dict(added.data)) == (2, {"type": "blk"})
            async with attached(path):
                assert served.query_member(2)["config"]["serial"] == "abc"
                assert len(served.query_member(2)["queues"]) == 4
            with pytest.raises(MemberError, match="member 2: there is already a member with this id"):
                await served.member_add(ram(2))
            await next_event(events, "disconnected")
            await served.member_del(2)
            assert (await next_event(events, "deleted")).member == 2
            assert not path.exists()
            assert served.member_ids == (1, 3)
            with pytest.raises(MemberError, match="member 2: there is no such member"):
                await served.member_del(2)
            with pytest.raises(MemberError, match="no such member"):
                served.query_member(2)
            # everything of it is free again
            await served.member_add(disk(2, work / "disk1.raw"))


async def test_an_attached_member_is_deleted_only_by_force(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served, attached(served.socket_path(1)) as front_end:
        with pytest.raises(MemberError, match=rf"attached to a front end \(pid {os.getpid()}\).*force"):
            await served.member_del(1)
        await front_end.features()
        await served.member_del(1, force=True)
        assert await front_end.hung_up()
        assert served.member_ids == ()


async def test_whoever_asks_may_go_the_deletion_is_done(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served, attached(served.socket_path(1)) as front_end:
        with served.listen() as events:
            with trio.CancelScope() as scope:
                scope.cancel()
                await served.member_del(1, force=True)
            assert scope.cancelled_caught
            await next_event(events, "deleted")
        assert await front_end.hung_up()
        assert served.member_ids == ()


async def test_one_deletion_wins(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served:
        results = []

        async def delete() -> None:
            try:
                await served.member_del(1, force=True)
                results.append("deleted")
            except MemberError as error:
                results.append(error.detail)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(delete)
        assert sorted(results) == ["deleted", "there is no such member", "there is no such member"]


async def test_a_member_that_cannot_be_added_leaves_no_trace(work: Path) -> None:
    async with open_group(config(work, disk(1, work / "disk1.raw"))) as served:
        before = open_fds()
        for member, reason in [
            (disk(2, work / "none.raw"), "none.raw"),
            (disk(2, work / "disk1.raw"), "is used by member 1"),
            (disk(2, work / "disk1.raw", read_only=True), "is used by member 1"),
            (ram(0), "out of range"),
            (ram(65536), "out of range"),
        ]:
            with pytest.raises(MemberError, match=reason):
                await served.member_add(member)
        (work / "run" / "member-2.vhost-user.sock").mkdir()
        with pytest.raises(MemberError, match="can't listen on"):
            await served.member_add(ram(2))
        (work / "run" / "member-2.vhost-user.sock").rmdir()
        assert served.member_ids == (1,)
        assert open_fds() == before
        await served.member_add(disk(2, work / "disk2.raw"))


async def test_a_group_that_cannot_start_leaves_no_trace(work: Path) -> None:
    async def attempt() -> None:
        with pytest.raises(MemberError, match="member 2"):
            async with open_group(config(work, ram(1), disk(2, work / "none.raw"))):
                pytest.fail("started")
        assert not (work / "run").exists()

    await attempt()
    before = open_fds()
    await attempt()
    assert open_fds() == before


async def test_two_readers_share_an_image(work: Path) -> None:
    image = work / "disk1.raw"
    async with open_group(config(work, disk(1, image, read_only=True), disk(2, image, read_only=True))) as served:
        assert all(member["image"]["read_only"] for member in served.query_members())
        with pytest.raises(MemberError, match="is used by member"):
            await served.member_modify(1, read_only=False)


async def test_modifying_a_member(work: Path) -> None:
    async with open_group(config(work, disk(1, work / "disk1.raw"), ram(2))) as served:
        with served.listen() as events:
            assert not await served.member_modify(1, size=4 * MIB)  # nobody attached to be told
            await next_event(events, "config")
            assert served.query_member(1)["config"]["capacity"] == 4 * MIB // 512
            assert (work / "disk1.raw").stat().st_size == 4 * MIB
            await served.member_modify(1, image="disk2.raw")
            assert served.query_member(1)["image"]["spec"] == str(work / "disk2.raw")
            assert served.query_member(1)["image"]["size"] == MIB
            # the old image is free, the new one isn't
            await served.member_add(disk(3, work / "disk1.raw"))
            with pytest.raises(MemberError, match="is used by member 1"):
                await served.member_modify(2, image="disk2.raw")
            await served.member_modify(1, read_only=True)
            assert served.query_member(1)["image"]["read_only"]
            assert served.query_member(1)["config"]["read_only"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "nothing to change"),
        ({"size": 0}, "size 0 can't be served"),
        ({"size": 1000}, "positive multiple of 512"),
        ({"size": -512}, "positive multiple of 512"),
        ({"image": "none.raw"}, "no such file"),
        ({"image": "ram:1"}, "multiple of 512"),
        ({"image": ""}, "ram:SIZE"),
    ],
)
async def test_changes_that_are_refused(work: Path, change: dict[str, Any], reason: str) -> None:
    async with open_group(config(work, disk(1, work / "disk1.raw"))) as served:
        before = served.query_member(1)
        with pytest.raises(MemberError, match=reason):
            await served.member_modify(1, **change)
        assert served.query_member(1) == before
    with pytest.raises(GroupError, match="stopping"):
        await served.member_modify(1, read_only=True)


async def test_members_are_limited_by_descriptors(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhu_legacy.group.resource.getrlimit", lambda what: (200, 200))
    async with open_group(config(work, ram(1))) as served:
        with pytest.raises(
            MemberError, match=r"need up to \d+ file descriptors, the limit is 200; raise the hard limit"
        ):
            await served.member_add(ram(2, queues=64))
        await served.member_add(ram(2))


async def test_three_hundred_members(work: Path) -> None:
    members = [MemberConfig(n, "blk", "null:1048576") for n in range(1, 301)]
    with trio.fail_after(60):
        async with open_group(config(work, *members)) as served:
            assert len(served.query_members()) == 300
            async with attached(served.socket_path(300)):
                assert served.query_group()["attached"] == 1
    assert not (work / "run").exists()


async def test_an_owner_with_a_device_of_its_own(work: Path) -> None:
    owner = OwnerConfig("blk", str(work / "disk1.raw"), 2, queues=3, queue_size=128, blk_size=4096, serial="pf")
    async with open_group(config(work, ram(1), owner=owner)) as served:
        answer = served.query_owner()
        assert (answer["admin_queues"], len(answer["queues"])) == (2, 2)
        assert (answer["num_vfs"], answer["vf_enable"]) == (1, True)
        device = answer["device"]
        assert (device["id"], device["legacy"], device["config"]["serial"]) == (0, False, "pf")
        assert device["config"]["blk_size"] == 4096
        assert device["image"]["spec"] == str(work / "disk1.raw")
        assert answer["function"] is None
        # it isn't one of the members, but its image is taken
        assert served.member_ids == (1,)
        with pytest.raises(MemberError, match=r"disk1\.raw is used by the owner; allowed: one writer"):
            await served.member_add(disk(2, work / "disk1.raw", read_only=True))
        with pytest.raises(GroupError, match="the owner isn't served over vfio-user"):
            served.function_path(0, "owner")
        with pytest.raises(MemberError, match="there is no legacy function"):
            served.function_path(1, "legacy")
    async with open_group(config(work)) as served:
        assert served.query_owner()["device"] is None


async def test_an_owner_that_cannot_be_leaves_no_trace(work: Path) -> None:
    async def attempt() -> None:
        with pytest.raises(GroupError, match=r"owner: .*none\.raw"):
            async with open_group(config(work, ram(1), owner=OwnerConfig("blk", str(work / "none.raw")))):
                pytest.fail("started")
        assert not (work / "run").exists()

    await attempt()
    before = open_fds()
    await attempt()
    assert open_fds() == before


# --- PCI functions ----------------------------------------------------------------------------------------


@asynccontextmanager
async def vfio_client(path: Path) -> AsyncIterator[VfioClient]:
    """A client of a PCI function, which has negotiated. It blocks, so its calls go to a thread."""

    client = await trio.to_thread.run_sync(VfioClient, path)
    try:
        yield client
    finally:
        client.close()


async def closed_at_once(path: Path) -> None:
    """A front end that comes while there is another one is turned away."""
    with trio.fail_after(10):
        async with await trio.open_unix_socket(path) as stream:
            with suppress(trio.BrokenResourceError):
                assert await stream.receive_some(1) == b""


async def until_free(served: Group, member_id: int) -> None:
    with trio.fail_after(10):
        while served.query_member(member_id)["state"] not in ("detached", "broken"):
            await trio.sleep(0.01)


FUNCTIONS = MEMBER_FUNCTIONS
PF = OwnerConfig("blk", f"ram:{MIB}", vfio_user=True)


async def test_each_function_has_its_socket(work: Path) -> None:
    members = (ram(1, vfio_user=True), ram(2, vfio_user=True, legacy=False), ram(3))
    async with open_group(config(work, *members, owner=PF)) as served:
        expected = {"owner.vfio-user.sock", *(f"member-{n}.vhost-user.sock" for n in (1, 2, 3))}
        expected |= {f"member-1.{kind}.vfio-user.sock" for kind in FUNCTIONS}
        expected |= {"member-2.modern.vfio-user.sock"}
        assert {path.name for path in served.run_dir.glob("*.sock")} == expected
        for path in served.run_dir.glob("*.sock"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        functions = [[entry["function"] for entry in member["functions"]] for member in served.query_members()]
        assert functions == [list(FUNCTIONS), ["modern"], []]
        assert served.function_path(1, "legacy") == served.run_dir / "member-1.legacy.vfio-user.sock"
        assert served.function_path(0, "owner") == served.run_dir / "owner.vfio-user.sock"
        for function in served.query_member(1)["functions"]:
            assert not function["connected"]
            assert function["pci"]["vendor_id"] == 0x1AF4
        assert served.query_owner()["function"]["socket"] == str(served.run_dir / "owner.vfio-user.sock")
    assert not (work / "run").exists()


@pytest.mark.parametrize("kind", FUNCTIONS)
async def test_a_member_is_used_through_one_socket_at_a_time(work: Path, kind: FunctionKind) -> None:
    async with open_group(config(work, ram(1, vfio_user=True), ram(2, vfio_user=True))) as served:
        with served.listen() as events:
            async with vfio_client(served.function_path(1, kind)):
                event = await next_event(events, "connected")
                assert (event.member, dict(event.data)) == (1, {"function": kind, "peer_pid": os.getpid()})
                info = served.query_member(1)
                assert (info["state"], info["front"], info["peer_pid"]) == ("attached", kind, os.getpid())
                assert [entry["connected"] for entry in info["functions"]] == [name == kind for name in FUNCTIONS]
                assert served.query_members()[0]["front"] == kind
                for other in FUNCTIONS:
                    await closed_at_once(served.function_path(1, other))
                async with await trio.open_unix_socket(served.socket_path(1)) as front_end:
                    await front_end.send_all(GET_FEATURES)
                    assert await FrontEnd(front_end).hung_up()
                # others aren't concerned
                async with vfio_client(served.function_path(2, kind)):
                    pass
            event = await next_event(events, "disconnected")
            assert event.data["reason"]
            await until_free(served, 1)
            assert served.query_member(1)["front"] is None
            async with attached(served.socket_path(1)):
                assert served.query_member(1)["front"] == "vhost-user"
                for other in FUNCTIONS:
                    await closed_at_once(served.function_path(1, other))
            await until_free(served, 1)
            async with vfio_client(served.function_path(1, kind)):
                pass


async def test_a_function_in_use_is_deleted_only_by_force(work: Path) -> None:
    async with open_group(config(work, ram(1, vfio_user=True))) as served:
        with served.listen() as events:
            async with vfio_client(served.function_path(1, "modern")) as client:
                with pytest.raises(MemberError, match=rf"attached to a front end \(pid {os.getpid()}\).*force"):
                    await served.member_del(1)
                await served.member_del(1, force=True)
                await trio.to_thread.run_sync(client.wait_closed)
            assert (await next_event(events, "disconnected")).data["reason"] == "the member is being deleted"
            await next_event(events, "deleted")
        assert list(served.run_dir.glob("*.sock")) == []
        await served.member_add(ram(1, vfio_user=True))
        async with vfio_client(served.function_path(1, "modern")):
            pass


async def test_the_owners_function(work: Path) -> None:
    async with open_group(config(work, ram(1), owner=PF)) as served, over_qmp(served) as client:
        schema = Schema(await client.execute("query-qmp-schema"))
        async with client.events() as feed:
            async with vfio_client(served.function_path(0, "owner")):
                await closed_at_once(served.function_path(0, "owner"))
                answer = await client.query_owner()
                schema.returns("query-owner", answer)
                assert (answer["peer-pid"], answer["device"]["front"]) == (os.getpid(), "owner")
                assert answer["function"]["connected"]
            seen = []
            with trio.fail_after(10):
                async for event in feed:
                    schema.event(event)
                    seen.append(event["event"])
                    if event["event"] == "OWNER_DISCONNECTED":
                        break
            assert seen[0] == "OWNER_CONNECTED"


async def test_answers_with_functions_are_what_the_schema_says(work: Path) -> None:
    async with open_group(config(work, ram(1, vfio_user=True))) as served, over_qmp(served) as client:
        schema = Schema(await client.execute("query-qmp-schema"))
        async with client.events() as feed:
            async with vfio_client(served.function_path(1, "transitional")):
                schema.returns("query-members", await client.query_members())
                schema.returns("query-member", await client.query_member(1))
            added = await client.member_add(type="blk", image="ram:1M", vfio_user=True)
            schema.returns("member-add", added)
            assert added["vfio-user"] == [str(served.function_path(2, kind)) for kind in FUNCTIONS]
            seen = []
            with trio.fail_after(10):
                async for event in feed:
                    schema.event(event)
                    seen.append((event["event"], event["data"].get("function")))
                    if event["event"] == "MEMBER_DISCONNECTED":
                        break
            assert seen[0] == ("MEMBER_CONNECTED", "transitional")
            assert seen[-1] == ("MEMBER_DISCONNECTED", "transitional")


async def test_a_function_that_cannot_listen(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served:
        before = open_fds()
        (served.run_dir / "member-2.modern.vfio-user.sock").mkdir()
        with pytest.raises(MemberError, match=r"can't listen on .*/member-2\.modern\.vfio-user\.sock: "):
            await served.member_add(ram(2, vfio_user=True))
        (served.run_dir / "member-2.modern.vfio-user.sock").rmdir()
        assert {path.name for path in served.run_dir.glob("*.sock")} == {"member-1.vhost-user.sock"}
        assert open_fds() == before
        assert served.query_owner()["num_vfs"] == 1
        await served.member_add(ram(2, vfio_user=True))


async def test_an_owner_that_cannot_listen(work: Path) -> None:
    (work / "run").mkdir()
    (work / "run" / "owner.vfio-user.sock").touch()
    with pytest.raises(GroupError, match="in the way and is not a socket"):
        async with open_group(config(work, owner=PF)):
            pass
    (work / "run" / "owner.vfio-user.sock").unlink()
    with pytest.raises(GroupError, match=r"owner: .*too long for a Unix socket"):
        async with open_group(config(work, owner=PF), run_dir=work / ("d" * 90)):
            pass


async def test_functions_leave_nothing_behind(work: Path) -> None:
    members = [ram(n, vfio_user=True) for n in range(1, 6)]

    async def once() -> None:
        with trio.fail_after(30), trio.CancelScope() as scope:
            async with (
                open_group(config(work, *members, owner=PF)) as served,
                vfio_client(served.function_path(0, "owner")),
                vfio_client(served.function_path(3, "transitional")),
            ):
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert not (work / "run").exists()

    await once()
    before = open_fds()
    for _ in range(5):
        await once()
    assert open_fds() == before


async def test_a_group_with_functions_that_is_cancelled_while_it_starts(work: Path) -> None:
    members = [ram(n, vfio_user=True) for n in range(1, 11)]

    async def once(checkpoints: int) -> None:
        with trio.CancelScope() as scope, trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def cancel() -> None:
                    for _ in range(checkpoints):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                nursery.start_soon(cancel)
                async with open_group(config(work, *members, owner=PF)):
                    await trio.sleep_forever()
        assert scope.cancelled_caught
        assert not (work / "run").exists()

    await once(10)
    before = open_fds()
    for checkpoints in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 300):
        await once(checkpoints)
    assert open_fds() == before


async def test_functions_beside_the_stock_daemon(work: Path) -> None:
    async with open_group(config(work, ram(1, vfio_user=True)), engine="rust-vmm") as served:
        async with vfio_client(served.function_path(1, "modern")):
            assert served.query_member(1)["front"] == "modern"
        await until_free(served, 1)
        async with attached(served.socket_path(1)):
            assert served.query_member(1)["front"] == "vhost-user"
            await closed_at_once(served.function_path(1, "modern"))


async def test_members_with_functions_come_and_go(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served:
        await served.member_add(ram(2, vfio_user=True))
        await served.member_del(2)
        before = open_fds()
        for kind in (*FUNCTIONS, *FUNCTIONS):
            await served.member_add(ram(2, vfio_user=True))
            async with vfio_client(served.function_path(2, kind)):
                await served.member_del(2, force=True)
        assert open_fds() == before


# --- events and ends --------------------------------------------------------------------------------------


async def test_a_stream_that_nobody_reads_stays_bounded(work: Path) -> None:
    async with open_group(config(work)) as served:
        with served.listen(limit=4) as events:
            for number in range(1, 7):
                await served.member_add(ram(number))
            assert events.lost == 2
            assert [(await anext(events)).member for _ in range(4)] == [3, 4, 5, 6]


async def test_a_listener_that_fails_harms_nobody(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_group(config(work)) as served:

        def bad(event: GroupEvent) -> None:
            raise RuntimeError("listener")

        end = served.subscribe(bad)
        with served.listen() as events:
            await served.member_add(ram(1))
            await next_event(events, "added")
        end()
    assert "an event listener failed" in caplog.text


async def test_a_broken_front_end_is_named_with_its_rule(work: Path) -> None:
    async with open_group(config(work, ram(1), ram(2))) as served:
        with served.listen() as events:
            async with attached(served.socket_path(1)) as front_end, attached(served.socket_path(2)) as other:
                await front_end.stream.send_all(UNKNOWN_REQUEST)
                broken = await next_event(events, "broken")
                assert broken.member == 1
                assert broken.data["rule"]
                assert await front_end.hung_up()
                await other.features()
            assert served.query_member(1)["last_error"]["rule"] == broken.data["rule"]


@pytest.mark.parametrize("engine", ["native", "rust-vmm"])
async def test_cancellation_leaves_nothing_behind(work: Path, engine: group.Engine) -> None:
    async def once() -> None:
        with trio.fail_after(30):
            with trio.CancelScope() as scope:
                async with (
                    open_group(config(work, ram(1), ram(2)), engine=engine) as served,
                    trio.open_nursery() as nursery,
                ):
                    await nursery.start(serve_qmp, served)
                    front_end = await trio.open_unix_socket(served.socket_path(1))
                    await FrontEnd(front_end).features()
                    client = await trio.open_unix_socket(served.qmp_path)
                    await client.receive_some(10)
                    scope.cancel()
                    await trio.sleep_forever()
            assert scope.cancelled_caught
            assert await FrontEnd(front_end).hung_up()
            await front_end.aclose()
            await client.aclose()
        assert not (work / "run").exists()

    await once()
    before = open_fds()
    for _ in range(3):
        await once()
    assert open_fds() == before


async def test_cancellation_while_it_starts(work: Path) -> None:
    members = [MemberConfig(n, "blk", "null:1048576") for n in range(1, 101)]

    async def once(checkpoints: int) -> None:
        with trio.CancelScope() as scope, trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def cancel() -> None:
                    for _ in range(checkpoints):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                nursery.start_soon(cancel)
                async with open_group(config(work, *members)):
                    await trio.sleep_forever()
        assert scope.cancelled_caught
        assert not (work / "run").exists()

    await once(10)
    before = open_fds()
    for checkpoints in (0, 1, 3, 10, 30, 100, 300, 1000):
        await once(checkpoints)
    assert open_fds() == before


async def test_an_error_of_the_user_comes_out_as_it_is(work: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_group(config(work, ram(1))):
            raise ZeroDivisionError
    assert not (work / "run").exists()


async def test_the_stock_daemon_serves_one_front_end_after_the_other(work: Path) -> None:
    async with open_group(config(work, ram(1), ram(2)), engine="rust-vmm") as served:
        assert served.query_group()["engine"] == "rust-vmm"
        for number in (1, 2, 3):
            async with attached(served.socket_path(1)) as front_end:
                assert await front_end.features() & 1 << 30
                assert served.query_member(1)["state"] == "attached"
                assert served.query_member(1)["connections"] == number
            with trio.fail_after(10):
                while served.query_member(1)["state"] != "detached":
                    await trio.sleep(0.01)
        async with attached(served.socket_path(2)):
            with pytest.raises(MemberError, match="attached"):
                await served.member_del(2)
            await served.member_del(2, force=True)
        assert not (work / "run" / "member-2.vhost-user.sock").exists()
        await served.member_add(ram(2))
    assert not (work / "run").exists()


# --- over QMP ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def over_qmp(served: Group) -> AsyncIterator[GroupClient]:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_qmp, served)
        async with connect(served.run_dir) as client:
            yield client
        nursery.cancel_scope.cancel()


class Schema:
    """Checks answers against what `query-qmp-schema` says they are."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.types = {entry["name"]: entry for entry in entries}
        self.checked: set[str] = set()

    def returns(self, command: str, value: object) -> None:
        assert self.types[command]["meta-type"] == "command"
        assert self.fits(self.types[command]["ret-type"], value), f"{command}: {value}"
        self.checked.add(command)

    def event(self, event: dict[str, Any]) -> None:
        assert self.types[event["event"]]["meta-type"] == "event"
        assert self.fits(self.types[event["event"]]["arg-type"], event["data"]), event
        self.checked.add(event["event"])

    def fits(self, name: str, value: object) -> bool:
        kind = self.types[name]
        match kind["meta-type"], value:
            case "builtin", _:
                wanted: tuple[type, ...] = {
                    "string": (str,),
                    "int": (int,),
                    "number": (int, float),
                    "boolean": (bool,),
                    "null": (type(None),),
                    "value": (object,),
                }[kind["json-type"]]
                return isinstance(value, wanted) and (
                    isinstance(value, bool) is (wanted == (bool,)) or object in wanted
                )
            case "enum", str():
                return value in kind["values"]
            case "array", list():
                return all(self.fits(kind["element-type"], item) for item in value)
            case "alternate", _:
                return any(self.fits(choice["type"], value) for choice in kind["members"])
            case "object", dict():
                members = {member["name"]: member for member in kind["members"]}
                required = {key for key, member in members.items() if "default" not in member}
                return required <= value.keys() <= members.keys() and all(
                    self.fits(members[key]["type"], item) for key, item in value.items()
                )
            case _:
                return False


async def test_every_answer_and_event_is_what_the_schema_says(work: Path) -> None:
    owner = OwnerConfig("blk", f"ram:{MIB}")
    devices = (VhostUserDeviceConfig("d", 2),)
    with_owner = config(
        work, disk(1, work / "disk1.raw"), ram(2), owner=owner, feature_management=True, vhost_user_devices=devices
    )
    async with open_group(with_owner) as served, over_qmp(served) as client:
        schema = Schema(await client.execute("query-qmp-schema"))

        async def ask(command: str, **arguments: object) -> Any:
            answer = await client.execute(command, {key.replace("_", "-"): arguments[key] for key in arguments})
            schema.returns(command, answer)
            return answer

        async with client.events() as feed:
            for command in ("query-version", "query-commands", "query-qmp-schema", "query-group", "query-members"):
                await ask(command)
            assert (await ask("query-statistics"))["members"] == 2
            assert [device["name"] for device in await ask("query-vhost-user-devices")] == ["d"]
            assert (await ask("query-member", id=1))["image"]["spec"] == str(work / "disk1.raw")
            added = await ask("member-add", type="blk", image="ram:1MiB", queues=2)
            assert added == {"id": 3, "vhost-user": str(served.socket_path(3))}
            async with attached(served.socket_path(3)) as front_end:
                await ask("query-member", id=3)
                await ask("query-members")
                await front_end.stream.send_all(UNKNOWN_REQUEST)
                await front_end.hung_up()
            assert await ask("member-modify", id=1, size=2 * MIB) == {"driver-told": False}
            assert await ask("member-del", id=3, force=True) == {}
            await ask("trace-events", enable=True)
            await ask_all_of_the_owner(ask)
            await trio.sleep(0.2)
            await ask("trace-events", enable=False)
            await ask("quit")
            assert served.stopping.is_set()
            seen = []
            with trio.fail_after(10):
                async for event in feed:
                    schema.event(event)
                    seen.append((event["event"], event["data"].get("id")))
                    if event["event"] == "REGISTER_ACCESS":
                        break
        for expected in (
            ("MEMBER_ADDED", 3),
            ("MEMBER_CONNECTED", 3),
            ("MEMBER_BROKEN", 3),
            ("MEMBER_DISCONNECTED", 3),
            ("MEMBER_CONFIG_CHANGE", 1),
            ("MEMBER_DELETED", 3),
            ("REGISTER_ACCESS", None),
        ):
            assert expected in seen
        commands = {name for name, entry in schema.types.items() if entry["meta-type"] == "command"}
        # `upgrade` needs a process that can go: tests/test_upgrade.py
        assert commands - {"upgrade"} == schema.checked & commands


async def ask_all_of_the_owner(ask: Callable[..., Awaitable[Any]]) -> None:
    """Every command that goes through the owner; member 1 is as before afterwards."""
    assert (await ask("query-owner"))["num-vfs"] == 2
    await ask("owner-set-vfs", num_vfs=2, enable=True)
    assert await ask("member-legacy-write", id=1, space="common", offset=18, data="03") == {}
    read = await ask("member-legacy-read", id=1, space="common", offset=18, length=1)
    assert read == {"data": "03", "value": 3}
    read = await ask("member-legacy-read", id=1, space="device", offset=0, length=8)
    assert read["value"] == 2 * MIB // 512
    assert await ask("member-stop", id=1) == {}
    parts = await ask("member-parts-get", id=1)
    assert {"DEVICE_STATUS": 3}.items() <= {part["name"]: part["value"] for part in parts["parts"]}.items()
    queue = next(part for part in parts["parts"] if part["name"] == "VQ_CFG")
    assert (queue["index"], queue["value"]["size"]) == (0, 256)
    assert await ask("member-parts-set", id=1, data=parts["data"]) == {}
    assert await ask("member-resume", id=1) == {}
    await ask("member-legacy-write", id=1, space="common", offset=18, data="00")
    assigned = await ask("member-assign-features", id=1, features=1 << 9)
    assert assigned["features"] == 1 << 9
    assert assigned["assignable"] & 1 << 9
    assert (await ask("query-member", id=1))["assigned-features"] == 1 << 9
    assert await ask("member-notify-info", id=1) == [{"place": "member", "bar": 2, "offset": 0x3000}]
    listed = await ask("owner-command", opcode=0, result_size=8)
    assert listed["status"] == {"value": 0, "name": "OK"}
    assert int.from_bytes(bytes.fromhex(listed["result"]), "little") & 0x7C == 0x7C
    assert listed["written"] == 16
    refused = await ask("owner-command", opcode=3, member=77, data="12", result_size=1)
    assert (refused["status"]["name"], refused["qualifier"]["name"]) == ("EINVAL", "INVALID_MEMBER")
    trace = await ask("query-trace", id=1, limit=5)
    assert [entry["register"] for entry in trace["entries"][:2]] == ["device_status", "device_status"]
    totals = (await ask("query-statistics"))["admin"]
    assert totals["commands"]["DEV_PARTS_SET"] == 1
    assert totals["failed"] == 1


def test_every_command_and_event_is_described(work: Path) -> None:
    described = (Path(__file__).parent.parent / "docs" / "QMP.md").read_text()
    for name, event in EVENTS.values():
        assert f"`{name}`" in described
        assert all(f"`{key}`" in described or f"`*{key}`" in described for key in event.fields())
    registry = make_registry(None)  # type: ignore[arg-type]
    for name, command in registry.commands.items():
        assert f"`{name}`" in described
        line = next(line for line in described.splitlines() if line.startswith("| `") and f"`{name}`" in line)
        for key, (_, optional) in command.arguments.fields().items():
            assert f"`{'*' if optional else ''}{key}`" in line, (name, key)


@pytest.mark.parametrize(
    ("command", "arguments", "error_class", "reason"),
    [
        ("query-member", {}, "GenericError", "Parameter 'id' is missing"),
        ("query-member", {"id": "1"}, "GenericError", "Invalid parameter type for 'id', expected: integer"),
        ("query-member", {"id": 9}, "DeviceNotFound", "Member 9 not found"),
        ("query-member", {"id": 1, "qom-path": "/x"}, "GenericError", "'qom-path' needs 'qemu-qmp'"),
        ("query-member", {"id": 1, "qemu-qmp": "/none"}, "GenericError", "QEMU at /none: No such file"),
        ("member-del", {"id": 9}, "DeviceNotFound", "Member 9 not found"),
        ("member-modify", {"id": 9, "size": 512}, "DeviceNotFound", "Member 9 not found"),
        ("member-modify", {"id": 1}, "GenericError", "nothing to change"),
        ("member-modify", {"id": 1, "features": 1}, "GenericError", "INVALID_OPCODE"),
        ("member-modify", {"id": 1, "serial": "s" * 21}, "GenericError", "serial .* can't be served"),
        ("owner-set-vfs", {}, "GenericError", "nothing to set; allowed: enable, num-vfs"),
        ("owner-set-vfs", {"num-vfs": 65536}, "GenericError", "allowed: 0 to 65535"),
        ("owner-command", {"opcode": 65536}, "GenericError", "administration command"),
        ("owner-command", {"opcode": 0, "data": "0"}, "GenericError", "'data' expects pairs of hexadecimal digits"),
        ("owner-command", {"opcode": 0, "result-size": 1 << 30}, "GenericError", "'result-size' expects a number from"),
        ("owner-command", {"opcode": 0, "queue": 1}, "GenericError", "queue 1 isn't there; allowed: 0 to 0"),
        ("member-stop", {"id": 9}, "DeviceNotFound", "Member 9 not found"),
        ("member-parts-get", {"id": 0}, "DeviceNotFound", "Member 0 not found"),
        ("member-parts-set", {"id": 1, "data": "?"}, "GenericError", "'data' expects base64 text"),
        ("member-parts-set", {"id": 1, "data": "AAAA"}, "GenericError", "device part: 3 bytes; it has 16"),
        ("member-assign-features", {"id": 1, "features": 0}, "GenericError", "member 1: DEVICE_MGMT.*INVALID_OPCODE"),
        ("member-assign-features", {"id": 1, "features": -1}, "GenericError", "64 bits"),
        (
            "member-legacy-read",
            {"id": 1, "space": "common", "offset": 18, "length": 2},
            "GenericError",
            "member 1: LEGACY_COMMON_CFG_READ: EINVAL / INVALID_FIELD",
        ),
        ("member-legacy-read", {"id": 1, "space": "x", "offset": 0, "length": 1}, "GenericError", "accept value 'x'"),
        (
            "member-legacy-read",
            {"id": 1, "space": "common", "offset": 256, "length": 1},
            "GenericError",
            "offset 256 doesn't fit",
        ),
        ("member-legacy-write", {"id": 1, "space": "device", "offset": 0, "data": "zz"}, "GenericError", "hexadecimal"),
        ("query-trace", {"id": 9}, "DeviceNotFound", "Member 9 not found"),
        ("query-trace", {"limit": 0}, "GenericError", "limit 0 is out of range; allowed: 1 to 4096"),
        ("query-trace", {"since": -1}, "GenericError", "since -1 is out of range"),
        ("trace-events", {"id": 9, "enable": True}, "DeviceNotFound", "Member 9 not found"),
        ("member-add", {"type": "blk", "image": "ram:1M", "vectors": 4096}, "GenericError", "vectors: .*0 to 2048"),
        ("member-add", {"type": "blk"}, "GenericError", "Parameter 'image' is missing"),
        ("member-add", {"type": "net", "image": "ram:1M"}, "GenericError", "type: .*not served by this version"),
        ("member-add", {"type": "blk", "image": "none"}, "GenericError", "image: .*no such file"),
        ("member-add", {"type": "blk", "image": "ram:1M", "queue-size": 3}, "GenericError", "queue-size: found 3"),
        ("member-add", {"type": "blk", "image": "ram:1M", "count": 3}, "GenericError", "'count' is unexpected"),
        ("member-add", {"type": "blk", "image": "ram:1M", "id": 1}, "GenericError", "already a member"),
        ("member-add", {"type": "blk", "image": "ram:1M", "id": -1}, "GenericError", "out of range"),
        ("member-add", {"type": "blk", "image": "ram:1", "queues": 0}, "GenericError", "queues: .*; image: "),
    ],
)
async def test_refusals(work: Path, command: str, arguments: dict[str, object], error_class: str, reason: str) -> None:
    async with open_group(config(work, ram(1))) as served, over_qmp(served) as client:
        with pytest.raises(ClientError, match=reason) as caught:
            await client.execute(command, arguments)
        assert caught.value.error_class == error_class
        assert served.member_ids == (1,)


async def test_deleting_over_qmp_is_refused_with_a_reason_while_attached(work: Path) -> None:
    async with open_group(config(work, ram(1))) as served, over_qmp(served) as client:
        async with attached(served.socket_path(1)):
            with pytest.raises(ClientError, match="attached to a front end"):
                await client.member_del(1)
            await client.member_del(1, force=True)
        assert await client.query_members() == []


async def test_a_client_learns_of_the_groups_end(work: Path) -> None:
    async with open_group(config(work)) as served, trio.open_nursery() as nursery:
        server = trio.CancelScope()

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            with server:
                await serve_qmp(served, task_status=task_status)

        await nursery.start(serve)
        async with connect(served.run_dir) as client, client.events() as feed:
            server.cancel()
            with trio.fail_after(10):
                assert [event async for event in feed] == []
                with pytest.raises(ClientError, match="lost the connection"):
                    await client.query_group()


async def test_connecting_to_nobody(work: Path) -> None:
    with pytest.raises(ClientError, match=r"can't connect to the group at .*No such file"):
        async with connect(work):
            pass
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(work / "qmp.sock"))
        with pytest.raises(ClientError, match="refused"):
            async with connect(work):
                pass


async def test_qemu_that_is_not_there_or_busy(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vhu_legacy.qemu_view.QEMU_TIMEOUT", 0.2)
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(work / "q.sock"))
        busy.listen()
        async with open_group(config(work, ram(1))) as served, over_qmp(served) as client:
            with pytest.raises(ClientError, match=r"no greeting within.*one more -qmp"):
                await client.query_member(1, qemu_qmp=str(work / "q.sock"))


async def until_booted(served: Group, *member_ids: int) -> None:
    """SeaBIOS starts all disks and reads the boot sector of the first; then it is done with them."""
    with trio.fail_after(30):
        while served.query_member(member_ids[0])["requests"]["in"] == 0 or any(
            served.query_member(member_id)["state"] != "running" for member_id in member_ids
        ):
            await trio.sleep(0.05)


@asynccontextmanager
async def qemu(argv: list[str]) -> AsyncIterator[trio.Process]:
    process = await trio.lowlevel.open_process(argv, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@pytest.mark.qemu
async def test_both_sides_of_a_queue_in_one_answer(work: Path) -> None:
    output = (await trio.run_process([qemu_args.BINARY, "--version"], capture_stdout=True)).stdout.decode()
    version = qemu_args.version_of_output(output)
    monitor = str(work / "q.sock")
    async with open_group(config(work, ram(1), ram(2))) as served, over_qmp(served) as client:
        argv = [qemu_args.BINARY, *qemu_args.machine("256M", accel="tcg")]
        for member_id in (1, 2):
            disk_args = qemu_args.DiskArgs(served.socket_path(member_id), name=f"m{member_id}")
            argv += [*qemu_args.chardev(disk_args, version), *qemu_args.device(disk_args, "legacy")]
        argv += ["-display", "none", "-nic", "none", "-qmp", f"unix:{monitor},server=on,wait=off"]
        async with qemu(argv):
            await until_booted(served, 1, 2)
            for member_id in (1, 2):
                answer = await client.query_member(member_id, qemu_qmp=monitor)
                assert answer["qemu"]["qom-path"] == f"/machine/peripheral/m{member_id}/virtio-backend"
                assert answer["qemu"]["version"].startswith("{}.{}.".format(*version))
                assert answer["qemu"]["started"]
                ours, theirs = answer["queues"][0], answer["qemu"]["queues"][0]
                assert theirs["problem"] is None
                assert ours["avail-idx"] == theirs["avail-idx"] == ours["requests"] == 2 - member_id
                assert ours["used-idx"] == theirs["used-idx"] == ours["requests"]
                assert ours["size"] == theirs["num"]
            with pytest.raises(ClientError, match=r"no realized virtio device at /x; it has /machine"):
                await client.query_member(1, qemu_qmp=monitor, qom_path="/x")
            named = await client.query_member(1, qemu_qmp=monitor, qom_path="/machine/peripheral/m2")
            assert named["qemu"]["qom-path"] == "/machine/peripheral/m2/virtio-backend"
            # asking has stopped no ring
            assert all(served.query_member(member_id)["queues"][0]["running"] for member_id in (1, 2))
            with pytest.raises(ClientError, match=r"attached to a front end \(pid"):
                await client.member_del(1)
