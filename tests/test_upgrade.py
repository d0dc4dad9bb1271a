# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""`vhu-legacy upgrade`: the process is replaced while front ends go on, and what happens when that fails.

Front ends here are scripted and under load all the time; what they write they read back, so a request that is lost,
carried out twice or out of its turn is seen. A real guest comes last.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import QmpClient, RunningGroup
from tests.frontend import (
    BLK_HEADER,
    BackendChannel,
    BlkDriver,
    Buffer,
    F,
    FrontEnd,
    PackedBlkDriver,
    R,
    T,
    bits,
    wait_until,
)
from tests.test_supervisor import Supervised, gone
from vhu_legacy import backend, config, guest, upgrade
from vhu_legacy.doorbells import EventHub
from vhu_legacy.errors import GroupError, MemberError
from vhu_legacy.group import Group, open_group
from vhu_legacy.group_qmp import SUCCESSOR, serve_qmp
from vhu_legacy.guest import Disk, MemberSpec, VmConfig
from vhu_legacy.vfio_client import VfioClient

MIB = 1 << 20
PAUSE = 0.1
"""Seconds that the median upgrade may cost a front end."""
OLDEST = bits(F.VERSION_1, F.SEG_MAX, F.BLK_SIZE, F.FLUSH)
"""A front end that knows neither protocol features nor SET_VRING_ENABLE."""


class Load:
    """Keeps a queue busy: each block is written, read back and compared, again and again."""

    SIZE = 4096
    DEPTH = 4

    def __init__(self, driver: FrontEnd[Any], first_sector: int = 64, queue: int = 0) -> None:
        self.driver = driver
        self.ring = driver.rings[queue]
        self.done = 0
        self.gap = 0.0
        """The longest time between two completions since it was last set to 0."""
        self.error: BaseException | None = None
        self._first = first_sector
        self._rounds = [0] * self.DEPTH
        self._reading = [False] * self.DEPTH
        self._places = [driver.memory.allocate(16 + self.SIZE + 1, 16) for _ in range(self.DEPTH)]
        self._flying: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _block(self, slot: int) -> bytes:
        return (b"%8d%8d" % (slot, self._rounds[slot])) * (self.SIZE // 16)

    def _submit(self, slot: int) -> None:
        memory, at = self.driver.memory, self._places[slot]
        reading = self._reading[slot]
        sector = self._first + slot * self.SIZE // 512
        memory.write(at, BLK_HEADER.pack(T.IN if reading else T.OUT, 0, sector))
        memory.write(at + 16, b"\xa5" * self.SIZE if reading else self._block(slot))
        memory.write(at + 16 + self.SIZE, b"\xa5")
        data = Buffer(at + 16, self.SIZE, writable=reading)
        chain = [Buffer(at, 16), data, Buffer(at + 16 + self.SIZE, 1, writable=True)]
        self._flying[self.ring.add(chain)] = slot
        self.ring.publish()

    def _complete(self, head: int) -> int:
        slot = self._flying.pop(head)
        memory, at = self.driver.memory, self._places[slot]
        assert memory.read(at + 16 + self.SIZE, 1) == b"\0", f"request of slot {slot} failed"
        if self._reading[slot]:
            assert memory.read(at + 16, self.SIZE) == self._block(slot), f"slot {slot} reads something else"
            self._rounds[slot] += 1
        self._reading[slot] = not self._reading[slot]
        self.done += 1
        return slot

    def _run(self) -> None:
        last = time.monotonic()
        try:
            for slot in range(self.DEPTH):
                if slot not in self._flying.values():
                    self._submit(slot)
            while not self._stop.is_set():
                if not self.ring.event_idx:
                    found = self.ring.take_used()
                    if not found and not select.select([self.ring.call_fd], [], [], 0.5)[0]:
                        continue
                    self.ring.take_calls()
                else:
                    self.ring.ask_for_call()
                    found = self.ring.take_used()
                    if not found:
                        select.select([self.ring.call_fd], [], [], 0.5)
                        self.ring.take_calls()
                now = time.monotonic()
                for head, _ in found:
                    slot = self._complete(head)
                    self.gap, last = max(self.gap, now - last), now
                    self._submit(slot)
                # other loads have a turn, too
                time.sleep(0.0002)
        except BaseException as error:
            self.error = error

    def start(self) -> Load:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def stop(self) -> None:
        """What is in flight stays so."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.error is not None:
            raise self.error

    def goes_on(self) -> None:
        """Wait for completions that come after this moment."""
        before = self.done
        wait_until(lambda: self.error is not None or self.done > before + 2 * self.DEPTH, what="requests completed")
        if self.error is not None:
            raise self.error

    def connected(self) -> bool:
        """Whether the back end hasn't hung up."""
        poll = select.poll()
        poll.register(self.driver.connection.socket, select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    def reconnect(self) -> None:
        self.stop()
        self.driver.reconnect()
        self.start()


class Upgraded(RunningGroup):
    """A group whose process changes."""

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def now(self) -> int:
        """The process that serves."""
        return int((self.run_dir / "group.lock").read_text())

    def upgrade(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vhu_legacy", "upgrade", str(self.run_dir), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    def upgraded(self, **arguments: Any) -> dict[str, Any]:
        """Over QMP, which saves the start of another Python."""
        before = self.now
        answer = self.ask("upgrade", **arguments)
        SUCCESSOR.check(answer, "upgrade")
        assert self.now == answer["pid"] != before
        assert isinstance(answer, dict)
        return answer

    def refused(self, **arguments: Any) -> str:
        before = self.now
        with pytest.raises(AssertionError) as refusal:
            self.ask("upgrade", **arguments)
        assert self.now == before
        assert not gone(before)
        return str(refusal.value)

    def ask(self, command: str, **arguments: Any) -> Any:
        client = QmpClient(self.ready["qmp"], 60)
        try:
            return client.execute(command, **arguments)
        finally:
            client.close()

    def fds(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.now}/fd").iterdir())

    def end(self) -> None:
        """SIGTERM for the process of the day; nothing may be left."""
        pid = self.now
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: gone(pid) or self.process.poll() is not None, what="ended")
        wait_until(lambda: not list(self.run_dir.glob("*.sock")), what="sockets removed")

    def kill(self) -> None:
        with suppress(OSError, ValueError):
            os.kill(self.now, signal.SIGKILL)
        super().kill()


Serve = Callable[..., Upgraded]
DISK = """
    [[members]]
    type = "blk"
    image = "disk.raw"
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[Upgraded] = []
    (tmp_path / "disk.raw").write_bytes(bytes(4 * MIB))

    def begin(members: str = DISK, group: str = "") -> Upgraded:
        text = f'[group]\nname = "upgraded"\n{textwrap.dedent(group)}\n{textwrap.dedent(members)}'
        started.append(Upgraded(tmp_path, text))
        return started[-1]

    yield begin
    for group in started:
        group.kill()
        assert "Traceback" not in group.log(), group.log()


@pytest.fixture
def loads() -> Iterator[Callable[..., Load]]:
    started: list[Load] = []

    def begin(driver: FrontEnd[Any], **options: Any) -> Load:
        started.append(Load(driver, **options).start())
        return started[-1]

    yield begin
    for load in started:
        with suppress(BaseException):
            load.stop()
        load.driver.close()


def faulty(directory: Path, step: int, action: str) -> str:
    """A Python whose `vhu-legacy` does `action` before it sends or receives its frame number `step`."""
    path = directory / f"python-{action}-{step}"
    path.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import os, signal, sys
        from vhu_legacy import handover
        from vhu_legacy.errors import GroupError

        frames = 0

        def before(method):
            async def call(*args, **options):
                global frames
                frames += 1
                if frames == {step}:
                    match {action!r}:
                        case "kill":
                            os.kill(os.getpid(), signal.SIGKILL)
                        case "exit":
                            os._exit(0)
                        case "stop":
                            os.kill(os.getpid(), signal.SIGSTOP)
                        case "term":
                            os.kill(os.getpid(), signal.SIGTERM)
                        case "fds":
                            import resource
                            used = len(os.listdir("/proc/self/fd"))
                            resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))
                        case "fail":
                            raise GroupError("no more frames")
                        case "orphan":
                            os.kill(os.getppid(), signal.SIGKILL)
                return await method(*args, **options)
            return call

        handover.Pipe.send = before(handover.Pipe.send)
        handover.Pipe.receive = before(handover.Pipe.receive)
        if {action!r} == "format":
            from vhu_legacy import upgrade
            upgrade.FORMAT = 99
        if {action!r} == "image":
            from vhu_legacy.errors import MemberError
            from vhu_legacy.group import Group
            def refuse(self, config, image_fd=None):
                raise MemberError(config.id, "no such image")
            Group._open_member = refuse
        sys.argv = ["vhu-legacy", *sys.argv[3:]]
        from vhu_legacy.cli import main
        main()
        """)
    )
    path.chmod(0o755)
    return str(path)


FRAMES = ("hello", "group", "member 1", "member 2", "ready", "move 1", "taken 1", "move 2", "taken 2", "end", "serving")
"""What a new process sends and receives, in this order, for two members."""
FIRST_MOVED = FRAMES.index("taken 1") + 1

TWO = """
    [[members]]
    type = "blk"
    image = "disk.raw"
    [[members]]
    type = "blk"
    image = "ram:1MiB"
"""


# --- under load ---------------------------------------------------------------------------------------------


def test_twenty_upgrades_under_load(serve: Serve, loads: Callable[..., Load]) -> None:
    """Split with what is in flight tracked, packed, and the oldest kind of front end; the descriptors don't grow."""
    group = serve(
        TWO.replace('image = "ram:1MiB"', 'image = "ram:1MiB"\n    packed = true')
        + '    [[members]]\n    type = "blk"\n    image = "ram:2MiB"\n'
    )
    front_ends = [
        loads(BlkDriver(group.socket(1), queue_size=16).start()),
        loads(PackedBlkDriver(group.socket(2), queue_size=16).start()),
        loads(BlkDriver(group.socket(3), features=OLDEST, track=False).start()),
    ]
    (busy, *_) = front_ends
    reported, seen, fds = [], [], []
    for _ in range(20):
        for load in front_ends:
            load.gap = 0.0
        answer = group.upgraded()
        assert (answer["members"], answer["moved"], answer["reconnecting"]) == (3, 3, [])
        reported.append(answer["longest-pause"])
        for load in front_ends:
            load.goes_on()
            assert load.connected()
        seen.append(busy.gap)
        fds.append(group.fds())
    for load in front_ends:
        load.stop()
    print(f"reported {statistics.median(reported) * 1e3:.1f} ms (longest {max(reported) * 1e3:.1f})")
    print(f"seen by the driver {statistics.median(seen) * 1e3:.1f} ms (longest {max(seen) * 1e3:.1f})")
    assert statistics.median(reported) <= PAUSE
    assert statistics.median(seen) <= PAUSE
    assert len(set(fds[1:])) == 1, fds
    assert sum(load.done for load in front_ends) > 1000
    assert group.ask("query-statistics")["requests"]["failed"] == 0
    group.end()


# --- what comes with a member -------------------------------------------------------------------------------


def test_all_of_a_member_goes_along(serve: Serve) -> None:
    """Configuration, assigned features, contents in memory, the cache mode, and who may use the image."""
    group = serve(
        """
        [owner]
        type = "blk"
        image = "ram:1MiB"
        [[members]]
        type = "blk"
        image = "ram:1MiB"
        serial = "in memory"
        queues = 2
        [[members]]
        type = "blk"
        image = "disk.raw"
        read_only = true
        [[members]]
        type = "blk"
        image = "null:1GiB"
        """,
        group="feature_management = true",
    )
    group.ask("member-add", id=9, type="blk", image="ram:2MiB", serial="added")
    group.ask("member-modify", id=1, image="ram:2MiB")
    offered = group.ask("query-member", id=9)["device-features"]["value"]
    group.ask("member-modify", id=9, features=offered & ~bits(F.DISCARD) & ((1 << 24) - 1) | bits(F.VERSION_1))
    with BlkDriver(group.socket(1), queues=2) as driver, BlkDriver(group.socket(3)) as null:
        driver.start()
        null.start()
        driver.write(4095, b"kept in memory".ljust(512, b"."))
        # writeback is the byte at 32 of the configuration
        driver.connection.set_config(32, b"\0")
        driver.connection.barrier()
        stable = ("assigned-features", "device-features", "driver-features", "config", "image", "status", "memory")
        before = {member: group.ask("query-member", id=member) for member in (1, 2, 3, 9)}
        assert before[1]["config"]["writeback"] is False
        assert before[9]["assigned-features"] is not None
        answer = group.upgraded()
        assert (answer["members"], answer["moved"]) == (4, 2)
        for member, was in before.items():
            now = group.ask("query-member", id=member)
            for key in (*stable, "state", "driver-mode", "protocol-features", "legacy"):
                assert now[key] == was[key], (member, key)
            assert [queue["size"] for queue in now["queues"]] == [queue["size"] for queue in was["queues"]]
        assert driver.read(4095, 512).startswith(b"kept in memory")
        assert driver.read(4095, 512, queue=1).startswith(b"kept in memory")
        null.write(0, b"x" * 512)
        # the state on disk is that of the old one, and goes on from there
        group.ask("member-del", id=9)
        assert group.ask("query-owner")["device"] is not None
    # the image's lock is held without a break
    (group.directory / "other").mkdir()
    text = f'[group]\nname = "o"\n[[members]]\ntype = "blk"\nimage = "{group.directory}/disk.raw"\n'
    with pytest.raises(RuntimeError, match="in use"):
        RunningGroup(group.directory / "other", text)
    group.end()
    # what the lock was for is free again
    (group.directory / "again").mkdir()
    again = RunningGroup(group.directory / "again", text)
    assert again.stop() == 0


def test_the_group_file_of_the_moment_is_for_the_next_start(serve: Serve) -> None:
    group = serve()
    (group.directory / "group.toml").write_text("[broken")
    group.upgraded()
    (group.directory / "group.toml").unlink()
    group.upgraded()
    assert len(group.ask("query-members")) == 1
    group.end()


@pytest.mark.parametrize("packed", [False, True])
def test_dirty_logging_goes_on(serve: Serve, packed: bool) -> None:
    group = serve(DISK + "    packed = true\n")
    kind: type[FrontEnd[Any]] = PackedBlkDriver if packed else BlkDriver
    with kind(group.socket(1)) as driver:
        driver.start()
        log = driver.start_log()
        log.take()
        group.upgraded()
        assert driver.read(0, 512) == bytes(512)
        assert log.take()
        driver.switch_log(on=False)
        driver.read(0, 512)
        driver.switch_log(on=True)
        log.take()
        driver.read(0, 512)
        assert log.take()


def test_a_change_of_the_configuration_is_told_by_the_successor(serve: Serve) -> None:
    group = serve(TWO)
    with BlkDriver(group.socket(2)) as driver:
        driver.negotiate()
        channel = BackendChannel(driver.connection)
        try:
            driver.connection.get_config(0, 8)
            assert group.ask("member-modify", id=2, image="ram:2MiB") == {"driver-told": False}
            group.upgraded()
            driver.start()
            assert channel.receive().request == BackendChannel.CONFIG_CHANGE
        finally:
            channel.close()


# --- any moment ---------------------------------------------------------------------------------------------


def test_between_any_two_messages(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade amid the handshake, then amid the stop; each time somewhere else."""
    group = serve()
    sent: list[int] = []
    at = {2, 5, 8, 11, 14, 17, 19}
    driver = BlkDriver(group.socket(1))
    original = driver.connection.send

    def send(request: int, *arguments: Any, **options: Any) -> None:
        if len(sent) in at:
            assert group.upgraded()["moved"] == 1
        sent.append(request)
        original(request, *arguments, **options)

    monkeypatch.setattr(driver.connection, "send", send)
    with driver:
        driver.start()
        driver.write(8, b"a" * 512)
        at.add(len(sent))
        driver.stop()
        at.add(len(sent) + 1)
        driver.connection.get_config(0, 8)
        for index in range(driver.queues):
            driver.start_ring(index, driver.rings[index].stopped_at)
        assert driver.read(8, 512) == b"a" * 512
    assert len(sent) > max(at)
    group.end()


def test_front_ends_that_come_meanwhile(serve: Serve) -> None:
    """Connections pour in during upgrades: each is served, by one process or the other."""
    group = serve()
    stop = threading.Event()
    served, failed = [0], []

    def connect() -> None:
        try:
            while not stop.is_set():
                with BlkDriver(group.socket(1)) as driver:
                    driver.start()
                    assert driver.read(0, 512) == bytes(512)
                served[0] += 1
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        for _ in range(4):
            group.upgraded()
    finally:
        stop.set()
        thread.join()
    assert not failed, failed
    assert served[0] > 4
    group.end()


def test_a_front_end_that_waits_for_another_one(serve: Serve, loads: Callable[..., Load]) -> None:
    """It was accepted, and not attached: it goes along, and has its turn when the first one leaves."""
    group = serve()
    first = loads(BlkDriver(group.socket(1)).start())
    process = subprocess.Popen(
        [sys.executable, "-m", "vhu_legacy", "upgrade", str(group.run_dir)], stdout=subprocess.PIPE, text=True
    )
    # it may wait two seconds: connect when the new process is about to take over
    wait_until(lambda: list_children(group.pid), what="the new process has been started")
    with BlkDriver(group.socket(1)) as second:
        second.connection.send(R.GET_FEATURES)
        out, _ = process.communicate(timeout=60)
        assert "1 front ends" in out
        first.goes_on()
        first.stop()
        first.driver.close()
        assert second.connection.receive().request == R.GET_FEATURES
    group.end()


def list_children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def test_a_broken_member_is_handed_over(serve: Serve) -> None:
    group = serve()
    with BlkDriver(group.socket(1)) as driver:
        driver.start()
        ring = driver.rings[0]
        ring.put_available(ring.size + 5)
        ring.publish(kick=True)
        group.wait_member(1, lambda state: state["state"] == "broken", "broken")
        group.upgraded()
        # it is found out again, or still known; nobody else suffers
        wait_until(lambda: group.ask("query-member", id=1)["state"] == "broken", what="broken again")
        assert driver.connection.get_vring_base(0) >= 0
    group.end()


# --- commands meanwhile -------------------------------------------------------------------------------------


def test_two_at_once(serve: Serve, loads: Callable[..., Load]) -> None:
    group = serve()
    load = loads(BlkDriver(group.socket(1)).start())
    command = [sys.executable, "-m", "vhu_legacy", "upgrade", str(group.run_dir)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(process.communicate(timeout=60), process.returncode) for process in started]
    codes = sorted(code for _, code in ended)
    # the second one may come so late that it finds the new process
    assert codes in ([0, 1], [0, 0]), ended
    load.goes_on()
    assert load.connected()
    load.stop()
    group.end()


def test_members_change_meanwhile(serve: Serve, loads: Callable[..., Load]) -> None:
    """What was answered holds; what couldn't be done now said so."""
    group = serve()
    load = loads(BlkDriver(group.socket(1)).start())
    stop = threading.Event()
    there: set[int] = set()
    refusals: list[str] = []

    def change() -> None:
        number = 10
        while not stop.is_set():
            try:
                client = QmpClient(group.ready["qmp"])
            except (OSError, EOFError, AssertionError, ValueError):
                continue
            try:
                while not stop.is_set():
                    client.execute("member-add", id=number, type="blk", image="ram:1MiB")
                    there.add(number)
                    number += 1
            except AssertionError as error:
                # nothing has been done, unless it was by a process that had no time to say so
                refusals.append(str(error))
                number += 1
            except (OSError, EOFError, ValueError):
                # its process has gone, perhaps after it had done it
                pass
            finally:
                client.close()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(3):
            time.sleep(0.05)
            group.upgraded()
    finally:
        stop.set()
        thread.join()
    served = {member["id"] for member in group.ask("query-members")}
    assert there <= served
    assert there
    known = ("a new process is taking over", "the group is stopping", "already a member")
    assert all(any(reason in refusal for reason in known) for refusal in refusals), refusals
    load.goes_on()
    load.stop()
    group.end()


def test_the_client_hangs_up(serve: Serve, loads: Callable[..., Load]) -> None:
    """Whoever asks for an upgrade needn't wait for it."""
    group = serve()
    load = loads(BlkDriver(group.socket(1)).start())
    before = group.now
    client = QmpClient(group.ready["qmp"])
    client._socket.sendall(b'{"execute": "upgrade"}')
    time.sleep(0.1)
    client.close()
    wait_until(lambda: group.now != before, what="another process serves", timeout=20)
    wait_until(lambda: group.process.poll() is not None, what="the old process has gone", timeout=20)
    load.goes_on()
    assert load.connected()
    load.stop()
    group.end()


def test_sigterm_in_the_middle(serve: Serve, tmp_path: Path) -> None:
    """The group ends, and the new process with it."""
    group = serve()
    python = faulty(tmp_path, 5, "stop")
    asked = subprocess.Popen(
        [sys.executable, "-m", "vhu_legacy", "upgrade", str(group.run_dir), "--python", python], stderr=subprocess.PIPE
    )
    wait_until(lambda: list_children(group.pid), what="the new process has been started")
    time.sleep(0.3)
    (child,) = list_children(group.pid)
    os.kill(group.pid, signal.SIGTERM)
    assert group.process.wait(10) == 0
    assert gone(child)
    asked.communicate(timeout=30)
    assert asked.returncode == 1
    assert not group.run_dir.exists() or not list(group.run_dir.glob("*.sock"))


# --- refused ------------------------------------------------------------------------------------------------


def test_what_cannot_be_handed_over_is_refused(serve: Serve, loads: Callable[..., Load]) -> None:
    group = serve(DISK + "    vfio_user = true\n" + '    [[members]]\n    type = "blk"\n    image = "ram:1MiB"\n')
    load = loads(BlkDriver(group.socket(2)).start())
    function = Path(group.ask("query-member", id=1)["functions"][0]["socket"])
    with VfioClient(function):
        wait_until(lambda: group.ask("query-member", id=1)["functions"][0]["connected"], what="connected")
        assert "member 1 has a client that can't be handed over; use force" in group.refused()
        load.goes_on()
        assert group.upgraded(force=True)["moved"] == 1
    # it is there again, under the same name
    with VfioClient(function):
        pass
    # a member that is driven through its registers, and one that was stopped there
    group.ask("member-legacy-write", id=1, space="common", offset=18, data="03")
    assert "member 1 has a client" in group.refused()
    group.ask("member-stop", id=1)
    assert "member 1 is stopped by an administration command" in group.refused(force=True)
    group.ask("member-resume", id=1)
    load.goes_on()
    assert load.connected()
    load.stop()
    group.end()


def test_the_stock_daemon_cannot(start_group: Any) -> None:
    group = start_group('[group]\nname = "d"\n[[members]]\ntype = "blk"\nimage = "ram:1MiB"\n', engine="rust-vmm")
    with pytest.raises(AssertionError, match="only the native engine"):
        group.execute("upgrade")


# --- it fails -----------------------------------------------------------------------------------------------


def test_it_does_not_start(serve: Serve, loads: Callable[..., Load], tmp_path: Path) -> None:
    group = serve()
    load = loads(BlkDriver(group.socket(1)).start())
    fds = group.fds()
    assert "can't be started" in group.refused(python=str(tmp_path / "nothing"))
    assert "is gone" in group.refused(python="/bin/true")
    assert "is gone" in group.refused(python=faulty(tmp_path, 1, "exit"))
    assert "another format" in group.refused(python=faulty(tmp_path, 0, "format"))
    assert "member 1: no such image" in group.refused(python=faulty(tmp_path, 0, "image"))
    assert "too many open files" in group.refused(python=faulty(tmp_path, 3, "fds")).lower()
    load.goes_on()
    assert load.connected()
    assert group.fds() == fds
    group.upgraded(python=sys.executable)
    load.goes_on()
    assert load.connected()
    load.stop()
    group.end()


@pytest.mark.parametrize("action", ["fail", "term"])
def test_it_fails_at_any_frame_and_returns_what_it_has(
    serve: Serve, loads: Callable[..., Load], tmp_path: Path, action: str
) -> None:
    """The old process goes on, and no front end notices anything."""
    group = serve(TWO)
    both = [loads(BlkDriver(group.socket(1)).start()), loads(BlkDriver(group.socket(2)).start())]
    counts = []
    # as soon as it has been given everything, "serving" needn't be said
    steps = range(1, len(FRAMES)) if action == "fail" else (1, 3, 5)
    for step in steps:
        group.refused(python=faulty(tmp_path, step, action))
        for load in both:
            load.goes_on()
            assert load.connected(), (FRAMES[step - 1], group.log())
        counts.append(group.fds())
    assert max(counts[-3:]) <= counts[0] + 1, counts
    assert group.upgraded()["moved"] == 2
    for load in both:
        load.goes_on()
        load.stop()
    group.end()


def test_it_is_killed_at_any_frame(serve: Serve, loads: Callable[..., Load], tmp_path: Path) -> None:
    """Front ends that had moved are disconnected, and go on with the old process; the others notice nothing."""
    group = serve(TWO)
    both = [loads(BlkDriver(group.socket(1)).start()), loads(BlkDriver(group.socket(2)).start())]
    for step in range(1, len(FRAMES) + 1):
        group.refused(python=faulty(tmp_path, step, "kill"))
        for load in both:
            if step >= FIRST_MOVED - 1 and not load.connected():
                load.reconnect()
            load.goes_on()
            assert load.connected(), (FRAMES[step - 1], group.log())
    assert group.upgraded()["moved"] == 2
    for load in both:
        load.goes_on()
        load.stop()
    group.end()


@pytest.mark.parametrize("frame", ["group", "ready", "move 1", "taken 2", "end", "serving"])
def test_the_old_one_is_killed_at_any_frame(
    serve: Serve, loads: Callable[..., Load], tmp_path: Path, frame: str
) -> None:
    """Either the new one has got everything, and serves, or nobody does, and a start goes on."""
    group = serve(TWO)
    load = loads(BlkDriver(group.socket(1)).start())
    group.upgrade("--python", faulty(tmp_path, FRAMES.index(frame) + 1, "orphan"))
    assert group.process.wait(10) == -signal.SIGKILL
    # "end" may be on its way already
    everything = frame == "serving" or (frame == "end" and not gone(group.now))
    if everything:
        load.goes_on()
        assert load.connected()
        assert len(group.ask("query-members")) == 2
        group.end()
    else:
        wait_until(lambda: not load.connected(), what="disconnected", timeout=20)
        deadline = time.monotonic() + 10
        while True:
            try:
                again = Upgraded(tmp_path, (tmp_path / "group.toml").read_text())
                break
            except RuntimeError:
                # the new one is about to end
                assert time.monotonic() < deadline
        try:
            load.reconnect()
            load.goes_on()
            load.stop()
        finally:
            assert again.stop() == 0
    load.driver.close()


# --- patience -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def served_here(tmp_path: Path) -> AsyncIterator[Group]:
    """Two members in this very process, and a QMP server."""
    (tmp_path / "disk.raw").write_bytes(bytes(4 * MIB))
    file = tmp_path / "group.toml"
    file.write_text('[group]\nname = "here"\n' + textwrap.dedent(TWO))
    async with open_group(config.load(file), run_dir=tmp_path / "run") as group, trio.open_nursery() as nursery:
        await nursery.start(serve_qmp, group)
        yield group
        nursery.cancel_scope.cancel()


async def started(group: Group, member: int) -> BlkDriver:
    driver = await trio.to_thread.run_sync(BlkDriver, group.socket_path(member))
    return await trio.to_thread.run_sync(driver.start)


async def reads(driver: BlkDriver) -> bytes:
    return await trio.to_thread.run_sync(driver.read, 0, 512)


async def test_requests_that_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The member waits for them, and goes on; so does everybody else at once."""
    monkeypatch.setattr(backend, "_HOLD_PATIENCE", 0.2)
    gate = trio.Event()
    original = EventHub.wait_done

    async def slow(self: EventHub, token: int) -> None:
        await gate.wait()
        await original(self, token)

    async with served_here(tmp_path) as group:
        server = group.slot(1).server
        assert server is not None
        driver = await started(group, 1)
        try:
            with monkeypatch.context() as patched:
                patched.setattr(EventHub, "wait_done", slow)
                for _ in range(2):
                    with pytest.raises(MemberError, match=r"requests of its front end are in flight after 0\.2 s"):
                        await server.hold()
                gate.set()
                assert await reads(driver) == bytes(512)
            # cancelled at any point it is as if nothing had been
            for deadline in (0, 0.0005, 0.001, 0.002, 0.004):
                with trio.move_on_after(deadline):
                    held = await server.hold()
                    assert held.connection is not None
                    server.go_on(held)
                assert await reads(driver) == bytes(512)
            await trio.to_thread.run_sync(driver.connection.send_raw, bytes(4))
            await trio.sleep(0.05)
            with pytest.raises(MemberError, match="a message of its front end isn't finished"):
                await server.hold()
        finally:
            driver.close()


@pytest.mark.parametrize("frame", ["group", "taken 1", "move 2", "serving"])
async def test_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frame: str) -> None:
    """It is given up and killed; the old process goes on, with the front ends that hadn't moved."""
    monkeypatch.setattr(upgrade, "START_PATIENCE", 1.0 if frame == "group" else 20.0)
    monkeypatch.setattr(upgrade, "MOVE_PATIENCE", 1.0)
    monkeypatch.setattr(upgrade, "RETURN_PATIENCE", 0.5)
    python = faulty(tmp_path, FRAMES.index(frame) + 1, "stop")
    async with served_here(tmp_path) as group:
        drivers = [await started(group, 2)]
        try:
            with pytest.raises(GroupError, match=r"the new process (wasn't ready|didn't)"):
                await upgrade.hand_over(group, python=python)
            if frame in ("group", "taken 1"):
                assert await reads(drivers[0]) == bytes(512)
            else:
                await trio.to_thread.run_sync(drivers[0].connection.wait_closed)
            for member in (1, 2):
                if member == 2 and frame in ("group", "taken 1"):
                    continue
                drivers.append(await started(group, member))
                assert await reads(drivers[-1]) == bytes(512)
            assert int((tmp_path / "run" / "group.lock").read_text()) == os.getpid()
            assert not list_children(os.getpid())
        finally:
            for driver in drivers:
                driver.close()


# --- supervised ---------------------------------------------------------------------------------------------


def test_supervised(tmp_path: Path) -> None:
    """The successor's successor is watched as the first one was, and killed it is followed by another."""
    (tmp_path / "disk.raw").write_bytes(bytes(4 * MIB))
    supervised = Supervised(tmp_path)
    load = None
    try:
        supervised.wait_ready()
        load = Load(BlkDriver(supervised.socket(1)).start()).start()
        command = [sys.executable, "-m", "vhu_legacy", "upgrade", str(supervised.run_dir)]
        # an attempt that fails leaves nothing that could be taken for a successor
        failing = [*command, "--python", faulty(tmp_path, 3, "kill")]
        assert subprocess.run(failing, capture_output=True, timeout=60, check=False).returncode == 1
        for _ in range(2):
            before = supervised.child()
            subprocess.run(command, capture_output=True, timeout=60, check=True)
            assert supervised.child() != before
            load.goes_on()
            assert load.connected()
            wait_until(lambda: supervised.children() == [supervised.child()], what="adopted")
        killed = supervised.child()
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: "starting anew" in supervised.log(), what="started anew")

        def served() -> bool:
            with suppress(OSError, ValueError):
                return supervised.child() != killed and not gone(supervised.child())
            return False

        wait_until(served, what="served again")
        wait_until(lambda: not load.connected(), what="disconnected")
        load.stop()
        wait_until(lambda: supervised.socket(1).exists(), what="a socket")
        deadline = time.monotonic() + 10
        while True:
            try:
                load.reconnect()
                break
            except OSError:
                assert time.monotonic() < deadline
        load.goes_on()
        subprocess.run(command, capture_output=True, timeout=60, check=True)
        load.goes_on()
        last = supervised.child()
        supervised.process.send_signal(signal.SIGTERM)
        assert supervised.process.wait(10) == 0
        assert gone(last)
        assert not list(supervised.run_dir.glob("*.sock"))
    finally:
        if load is not None:
            with suppress(BaseException):
                load.stop()
            load.driver.close()
        supervised.kill()
    assert "Traceback" not in supervised.log(), supervised.log()


# --- a real guest -------------------------------------------------------------------------------------------


@pytest.mark.guest
async def test_a_guest_notices_nothing(tmp_path: Path) -> None:
    """The machine's own QEMU, which has no way to reconnect here; the guest writes and verifies all the time."""
    image = tmp_path / "disk1.raw"
    guest.make_image(image, seed=1)
    async with guest.serve_group([MemberSpec(image)], tmp_path) as group:
        vm_config = VmConfig(
            disks=(Disk(group.socket(1), reconnect=False),), task="rw-loop", guest_kib=512, log_dir=tmp_path / "vm"
        )
        command = [sys.executable, "-m", "vhu_legacy", "upgrade", str(group.run_dir), "--json"]
        async with guest.open_vm(vm_config) as vm:
            await vm.wait_event("round")
            for _ in range(3):
                done = await trio.run_process(command, capture_stdout=True)
                assert json.loads(done.stdout)["moved"] == 1
                for _ in range(2):
                    await vm.wait_event("round", start=len(vm.messages))
            assert not await vm.complaints()
        os.kill(int((group.run_dir / "group.lock").read_text()), signal.SIGTERM)
