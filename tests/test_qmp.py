# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The QMP server by itself: framing, negotiation, errors, events, clients that misbehave, stock clients."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio_asyncio  # type: ignore[import-untyped]
from qemu.qmp import ExecuteError, QMPClient

from vhu_legacy import _native, qmp
from vhu_legacy.client import connect
from vhu_legacy.config import VhostUserDeviceConfig
from vhu_legacy.group import GroupEvent
from vhu_legacy.group_qmp import VHOST_USER_DEVICE, kebab, make_registry, serve_qmp
from vhu_legacy.qmp import (
    ANY,
    BOOL,
    INT,
    NUMBER,
    STR,
    Array,
    CommandError,
    Enum,
    FramingError,
    JSONFramer,
    Object,
    QMPServer,
    Registry,
    Reply,
    Version,
    nullable,
    parse_json,
)
from vhu_legacy.vvu_view import describe, request_name

QMP_SHELL = Path(sys.executable).with_name("qmp-shell")


class Toy:
    """A server with one command of each kind."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.gate = trio.Event()
        self.quit = trio.Event()
        self.registry = Registry(Version(1, 2, 3, "toy 1.2.3"))
        arguments = Object(
            {
                "id": INT,
                "*name": STR,
                "*flag-it": BOOL,
                "*ratio": NUMBER,
                "*mode": Enum(("fast", "slow")),
                "*list": Array(INT),
                "*inner": Object({"x": INT, "*y": nullable(STR)}),
                "*maybe": nullable(INT),
            }
        )
        self.registry.add("echo", self.echo, arguments=arguments, returns=ANY)
        self.registry.add("blob", self.blob, arguments=Object({"size": INT}), returns=STR)
        self.registry.add("wait", self.wait)
        self.registry.add("fail", self.fail)
        self.registry.add("bug", self.bug)
        self.registry.add("stop", self.stop)
        self.registry.add_event("TICK", Object({"n": INT}))
        self.server = QMPServer(self.registry, path, **options)

    async def echo(self, **values: object) -> object:
        return values

    async def blob(self, size: int) -> object:
        return "x" * size

    async def wait(self) -> None:
        await self.gate.wait()

    async def fail(self) -> None:
        raise CommandError("it can't be done", "DeviceNotFound")

    async def bug(self) -> None:
        raise ZeroDivisionError("oops")

    async def stop(self) -> object:
        return Reply({}, self.quit.set)


@pytest.fixture
async def toy(tmp_path: Path) -> AsyncIterator[Toy]:
    async with serving(Toy(tmp_path / "qmp.sock")) as server:
        yield server


@asynccontextmanager
async def serving(toy: Toy) -> AsyncIterator[Toy]:
    async with trio.open_nursery() as nursery:
        await nursery.start(toy.server.run)
        yield toy
        nursery.cancel_scope.cancel()


class Raw:
    """A client that sends whatever bytes it is told to."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def read(self) -> dict[str, Any]:
        with trio.fail_after(10):
            while b"\n" not in self.buffer:
                data = await self.stream.receive_some(65536)
                if not data:
                    raise EOFError
                self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        value = json.loads(line)
        assert isinstance(value, dict)
        return value

    async def ask(self, data: bytes | dict[str, Any]) -> dict[str, Any]:
        await self.send(data if isinstance(data, bytes) else json.dumps(data).encode())
        return await self.read()

    async def at_end(self) -> bool:
        """Whether the server has closed the connection (waits for that)."""
        with trio.fail_after(10):
            try:
                while await self.stream.receive_some(65536):
                    pass
            except trio.BrokenResourceError:
                pass
        return True


@asynccontextmanager
async def raw(toy: Toy, *, negotiate: bool = True) -> AsyncIterator[Raw]:
    stream = await trio.open_unix_socket(toy.path)
    async with stream:
        client = Raw(stream)
        greeting = await client.read()
        assert greeting["QMP"]["capabilities"] == []
        assert greeting["QMP"]["version"]["qemu"] == {"major": 1, "minor": 2, "micro": 3}
        if negotiate:
            assert await client.ask(b'{"execute":"qmp_capabilities"}') == {"return": {}}
        yield client


def open_fds() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def error(answer: dict[str, Any], error_class: str = "GenericError") -> str:
    """The description of an error of that class."""
    assert answer["error"]["class"] == error_class
    desc = answer["error"]["desc"]
    assert isinstance(desc, str)
    return desc


# --- framing ----------------------------------------------------------------------------------------------


def cut(chunks: Iterator[bytes] | list[bytes], **limits: int) -> list[bytes]:
    framer = JSONFramer(**limits)
    return [value for chunk in chunks for value in framer.feed(chunk)]


STREAM = (
    b'{"a":"x\\"}","b":[1,{"c":"\\\\"}]} 3 [] "s\\"x" foo bar\n}{"torn":"x\ny"}\n{"z":"\xc3\xa9\xff"\n{"execute":"q"}'
)
VALUES = [
    b'{"a":"x\\"}","b":[1,{"c":"\\\\"}]}',
    b"3",
    b"[]",
    b'"s\\"x"',
    b"foo",
    b"bar",
    b"}",
    b'{"torn":"x\n',
    b"y",
    b'"}\n',
    b'{"z":"\xc3\xa9\xff',
    b'"\n',
    b'{"execute":"q"}',
]


def test_values_are_found_however_the_bytes_arrive() -> None:
    assert cut([STREAM]) == VALUES
    assert cut([STREAM[i : i + 1] for i in range(len(STREAM))]) == VALUES
    choose = random.Random(1)
    for _ in range(500):
        chunks, start = [], 0
        while start < len(STREAM):
            size = choose.choice((1, 2, 3, 7, 40))
            chunks.append(STREAM[start : start + size])
            start += size
        assert cut(chunks) == VALUES


def test_what_is_too_large_or_too_deep_ends_it() -> None:
    with pytest.raises(FramingError, match="size limit"):
        cut([b'{"a":"', b"x" * 100], max_message=64)
    with pytest.raises(FramingError, match="size limit"):
        cut([b'{"a":"' + b"x" * 100 + b'"}'], max_message=64)
    with pytest.raises(FramingError, match="nesting depth"):
        cut([b"["] * 9, max_depth=8)
    assert cut([b"[" * 8 + b"]" * 8], max_depth=8) == [b"[" * 8 + b"]" * 8]
    assert cut([b" \n" * 100_000], max_message=64) == []


def test_many_bytes_in_small_pieces_take_linear_time() -> None:
    started = time.perf_counter()
    chunks = [b'{"a":"'] + [b"x" * 100] * 10_000 + [b'"}']
    assert len(cut(chunks)) == 1
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("data", "desc"),
    [
        (b"foo", "expecting value"),
        (b'{"a":1,"a":2}', "duplicate key"),
        (b'{"a":NaN}', "invalid keyword 'NaN'"),
        (b'{"a":-Infinity}', "invalid keyword '-Infinity'"),
        (b'{"a":1e999}', "out of range"),
        (b'{"a":"\xff"}', "invalid UTF-8"),
        (b"{'a':1}", "double quotes"),
        (b'{"a":1,}', "character"),
        (b"9" * 5000, "JSON parse error"),
    ],
)
def test_what_is_no_json(data: bytes, desc: str) -> None:
    with pytest.raises(CommandError, match=f"JSON parse error, .*{desc}|{desc}"):
        parse_json(data)


# --- protocol ---------------------------------------------------------------------------------------------


async def test_nothing_goes_before_negotiation(toy: Toy) -> None:
    async with raw(toy, negotiate=False) as client:
        for command in ("echo", "query-commands", "no-such-command"):
            answer = await client.ask({"execute": command, "id": 7})
            assert answer["id"] == 7
            assert "qmp_capabilities" in error(answer, "CommandNotFound")
        toy.server.emit("TICK", {"n": 1})  # not for this client yet
        answer = await client.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
        assert error(answer) == "Capability 'oob' is not available"
        assert await client.ask({"execute": "qmp_capabilities", "arguments": {"enable": []}}) == {"return": {}}
        assert "already complete" in error(await client.ask({"execute": "qmp_capabilities"}), "CommandNotFound")
        assert await client.ask({"execute": "echo", "arguments": {"id": 1}}) == {"return": {"id": 1}}


@pytest.mark.parametrize("value", [0, -1.5, "x", "\ud800", "é", None, True, [1, {"a": []}], {"b": {"c": None}}, 2**70])
async def test_any_id_comes_back(toy: Toy, value: object) -> None:
    async with raw(toy) as client:
        assert await client.ask({"execute": "wait-not", "id": value}) == {
            "id": value,
            "error": {"class": "CommandNotFound", "desc": "The command wait-not has not been found"},
        }
        assert (await client.ask({"execute": "query-version", "id": value}))["id"] == value
    async with raw(toy) as client:
        assert "id" not in await client.ask({"execute": "query-version"})


@pytest.mark.parametrize(
    ("request_", "desc"),
    [
        (b"[]", "QMP input must be a JSON object"),
        (b"3 ", "QMP input must be a JSON object"),
        (b'"execute"', "QMP input must be a JSON object"),
        (b"null\n", "QMP input must be a JSON object"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b'{"execute":1}', "QMP input member 'execute' must be a string"),
        (b'{"execute":"echo","arguments":[]}', "QMP input member 'arguments' must be an object"),
        (b'{"execute":"echo","x":1}', "QMP input member 'x' is unexpected"),
        (b'{"exec-oob":"echo"}', "QMP input member 'exec-oob' is unexpected"),
        (b'{"execute":"echo"}', "Parameter 'id' is missing"),
        (b'{"execute":"echo","arguments":{"id":1,"x":2}}', "Parameter 'x' is unexpected"),
        (b'{"execute":"query-version","arguments":{"x":2}}', "Parameter 'x' is unexpected"),
        (b'{"execute":"echo","arguments":{"id":"1"}}', "Invalid parameter type for 'id', expected: integer"),
        (b'{"execute":"echo","arguments":{"id":true}}', "Invalid parameter type for 'id', expected: integer"),
        (b'{"execute":"echo","arguments":{"id":1.0}}', "Invalid parameter type for 'id', expected: integer"),
        (b'{"execute":"echo","arguments":{"id":null}}', "Invalid parameter type for 'id', expected: integer"),
        (
            b'{"execute":"echo","arguments":{"id":99999999999999999999}}',
            "Invalid parameter type for 'id', expected: integer",
        ),
        (b'{"execute":"echo","arguments":{"id":1,"name":2}}', "Invalid parameter type for 'name', expected: string"),
        (
            b'{"execute":"echo","arguments":{"id":1,"name":"a\\u0000"}}',
            "Invalid parameter type for 'name', expected: string",
        ),
        (
            b'{"execute":"echo","arguments":{"id":1,"flag-it":0}}',
            "Invalid parameter type for 'flag-it', expected: boolean",
        ),
        (b'{"execute":"echo","arguments":{"id":1,"mode":"x"}}', "Parameter 'mode' does not accept value 'x'"),
        (
            b'{"execute":"echo","arguments":{"id":1,"list":[1,"x"]}}',
            "Invalid parameter type for 'list[1]', expected: integer",
        ),
        (b'{"execute":"echo","arguments":{"id":1,"inner":{}}}', "Parameter 'inner.x' is missing"),
        (b'{"execute":"echo","arguments":{"id":1,"inner":{"x":1,"z":1}}}', "Parameter 'inner.z' is unexpected"),
        (
            b'{"execute":"echo","arguments":{"id":1,"maybe":"x"}}',
            "Invalid parameter type for 'maybe', expected: integer or null",
        ),
    ],
)
async def test_requests_that_are_refused(toy: Toy, request_: bytes, desc: str) -> None:
    async with raw(toy) as client:
        assert error(await client.ask(request_)) == desc
        # and the connection is as good as before
        assert "return" in await client.ask({"execute": "query-version"})


async def test_arguments_arrive_in_python_spelling(toy: Toy) -> None:
    async with raw(toy) as client:
        arguments = {"id": 1, "flag-it": True, "ratio": 1, "mode": "fast", "inner": {"x": 1, "y": None}, "maybe": None}
        answer = await client.ask({"execute": "echo", "arguments": arguments})
        del arguments["flag-it"]
        assert answer["return"] == {**arguments, "flag_it": True}


@pytest.mark.parametrize("garbage", [b"foo\n", b"}", b'{"a":"\xff"}\n', b'{"a":"x\n', b'{"a":1,"a":2}', b"{]", b"\xff"])
async def test_garbage_is_an_error_and_then_it_goes_on(toy: Toy, garbage: bytes) -> None:
    async with raw(toy) as client:
        assert "JSON parse error" in error(await client.ask(garbage))
        await client.send(b'\n{"execute":"query-version","id":"after"}\n')
        while (answer := await client.read()).get("id") != "after":
            assert "JSON parse error" in error(answer)
        assert "return" in answer


async def test_commands_glued_together_and_torn_apart(toy: Toy) -> None:
    async with raw(toy) as client:
        commands = b"".join(b'{"execute":"echo","arguments":{"id":%d},"id":%d}' % (n, n) for n in range(500))
        await client.send(commands)
        for number in range(500):
            assert await client.read() == {"return": {"id": number}, "id": number}
        for byte in b'{"execute":"echo","arguments":{"id":5,"name":"a\\"}{\\\\"}}':
            await client.send(bytes([byte]))
            await trio.lowlevel.checkpoint()
        assert await client.read() == {"return": {"id": 5, "name": 'a"}{\\'}}


@pytest.mark.parametrize(
    ("data", "desc"),
    [(b"[" * 5000, "nesting depth"), (b'{"execute":"' + b"x" * (qmp.MAX_MESSAGE + 100), "size limit")],
)
async def test_limits_end_the_connection_and_only_that(toy: Toy, data: bytes, desc: str) -> None:
    async with raw(toy) as other, raw(toy) as client:
        await client.send(data)
        assert desc in error(await client.read())
        assert await client.at_end()
        assert "return" in await other.ask({"execute": "query-version"})
    assert toy.server.statistics().clients <= 1


async def test_errors_of_commands(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    async with raw(toy) as client:
        assert error(await client.ask({"execute": "fail"}), "DeviceNotFound") == "it can't be done"
        assert error(await client.ask({"execute": "bug"})) == "internal error: ZeroDivisionError: oops"
        assert "command bug failed" in caplog.text
        assert "return" in await client.ask({"execute": "query-version"})


async def test_who_ends_its_input_still_gets_its_answers(toy: Toy) -> None:
    async with raw(toy) as client:
        await client.send(b'{"execute":"query-version","id":1}{"execute":"blob","arguments":{"size":3000000}}')
        await client.stream.send_eof()
        assert (await client.read())["id"] == 1
        assert len((await client.read())["return"]) == 3_000_000
        assert await client.at_end()


async def test_quit_is_answered_before_it_is_done(toy: Toy) -> None:
    async with raw(toy) as client:
        assert await client.ask({"execute": "stop"}) == {"return": {}}
        with trio.fail_after(5):
            await toy.quit.wait()


async def test_events_reach_all_who_negotiated(toy: Toy) -> None:
    async with raw(toy) as one, raw(toy) as two, raw(toy, negotiate=False) as early:
        before = time.time()
        toy.server.emit("TICK", {"n": 1})
        for client in (one, two):
            event = await client.read()
            assert (event["event"], event["data"]) == ("TICK", {"n": 1})
            stamp = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
            assert abs(stamp - before) < 5
        assert await early.ask(b'{"execute":"qmp_capabilities"}') == {"return": {}}
    with pytest.raises(ValueError, match="never declared"):
        toy.server.emit("TOCK", {})


async def test_a_client_that_does_not_read_is_dropped_and_holds_up_nobody(toy: Toy) -> None:
    async with raw(toy) as lazy, raw(toy) as eager:
        # fill the socket's own buffers, then the outbox
        await lazy.send(b'{"execute":"blob","arguments":{"size":3000000}}' * 3)
        for number in range(20 * qmp.OUTBOX_MESSAGES):
            toy.server.emit("TICK", {"n": number})
            assert (await eager.read())["data"] == {"n": number}
            if toy.server.statistics().dropped:
                break
        assert toy.server.statistics().dropped == 1
        assert "return" in await eager.ask({"execute": "query-version"})
        assert await lazy.at_end()


async def test_a_command_that_takes_long_holds_up_only_its_client(toy: Toy) -> None:
    async with raw(toy) as slow, raw(toy) as other:
        await slow.send(b'{"execute":"wait","id":1}{"execute":"query-version","id":2}')
        assert "return" in await other.ask({"execute": "query-version"})
        toy.gate.set()
        assert await slow.read() == {"return": {}, "id": 1}
        assert (await slow.read())["id"] == 2


async def test_many_clients_and_one_too_many(tmp_path: Path) -> None:
    async with serving(Toy(tmp_path / "qmp.sock", max_clients=40)) as toy, trio.open_nursery() as nursery:
        ready, done = trio.open_memory_channel[int](100)
        leave = trio.Event()

        async def client(number: int) -> None:
            async with raw(toy) as connection:
                answer = await connection.ask({"execute": "echo", "arguments": {"id": number}, "id": number})
                assert answer == {"return": {"id": number}, "id": number}
                await ready.send(number)
                await leave.wait()

        for number in range(40):
            nursery.start_soon(client, number)
        with trio.fail_after(20):
            assert {await done.receive() for _ in range(40)} == set(range(40))
        assert toy.server.statistics().clients == 40
        stream = await trio.open_unix_socket(toy.path)
        async with stream:
            assert await Raw(stream).at_end()
        assert toy.server.statistics().refused == 1
        leave.set()


# --- the socket -------------------------------------------------------------------------------------------


async def test_the_socket_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    async with serving(Toy(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(OSError, match="in use"):
            await Toy(path).server.run()
        assert path.exists()
    assert not path.exists()


async def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(Toy(path)) as toy, raw(toy):
        pass
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        await Toy(path).server.run()
    assert path.read_text() == "precious"


async def test_somebody_elses_socket_is_left_alone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    async with serving(Toy(path)):
        path.unlink()
        path.write_text("new")
    assert path.read_text() == "new"


async def test_cancellation_in_every_state_leaves_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    before: list[str] = []
    for _ in range(3):
        async with serving(Toy(path)) as toy:
            idle = await trio.open_unix_socket(path)
            busy = await trio.open_unix_socket(path)
            await busy.send_all(b'{"execute":"qmp_capabilities"}{"execute":"wait"}')
            deaf = await trio.open_unix_socket(path)
            await deaf.send_all(
                b'{"execute":"qmp_capabilities"}' + b'{"execute":"blob","arguments":{"size":900000}}' * 9
            )
            torn = await trio.open_unix_socket(path)
            await torn.send_all(b'{"execute":"qmp_cap')
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert toy.server.statistics().clients == 4
        for stream in (idle, busy, deaf, torn):
            await stream.aclose()
        after = open_fds()
        assert after == (before or after)
        before = after


# --- introspection ----------------------------------------------------------------------------------------


async def test_the_schema_is_complete_and_in_qemus_form(toy: Toy) -> None:
    async with raw(toy) as client:
        schema = (await client.ask({"execute": "query-qmp-schema"}))["return"]
        commands = (await client.ask({"execute": "query-commands"}))["return"]
    by_name = {entry["name"]: entry for entry in schema}
    assert len(by_name) == len(schema)
    for entry in schema:
        match entry["meta-type"]:
            case "builtin":
                assert entry["json-type"] in {"string", "int", "number", "boolean", "null", "value"}
            case "enum":
                assert [member["name"] for member in entry["members"]] == entry["values"]
            case "array":
                assert entry["name"] == f"[{entry['element-type']}]"
                assert entry["element-type"] in by_name
            case "object":
                assert entry["name"].isdigit()
                assert all(member["type"] in by_name for member in entry["members"])
            case "alternate":
                assert all(member["type"] in by_name for member in entry["members"])
            case "command":
                assert by_name[entry["arg-type"]]["meta-type"] == "object"
                assert entry["ret-type"] in by_name
            case "event":
                assert by_name[entry["arg-type"]]["meta-type"] == "object"
            case other:
                pytest.fail(f"meta-type {other}")
    assert {entry["name"] for entry in schema if entry["meta-type"] == "command"} == {c["name"] for c in commands}
    echo = {member["name"]: member for member in by_name[by_name["echo"]["arg-type"]]["members"]}
    assert echo["id"] == {"name": "id", "type": "int"}
    assert echo["name"] == {"name": "name", "type": "str", "default": None}
    assert by_name["TICK"]["meta-type"] == "event"


def test_names_are_unique() -> None:
    registry = Registry(Version(1, 0, 0, ""))

    async def nothing() -> None: ...

    registry.add("x", nothing)
    registry.add_event("X")
    with pytest.raises(ValueError, match="there already"):
        registry.add("x", nothing)
    with pytest.raises(ValueError, match="there already"):
        registry.add_event("X")


# --- stock clients ----------------------------------------------------------------------------------------


async def test_stock_qmp_client(toy: Toy) -> None:
    async with trio_asyncio.open_loop():
        client = QMPClient("test")
        await trio_asyncio.aio_as_trio(client.connect)(str(toy.path))
        try:
            execute = trio_asyncio.aio_as_trio(client.execute)
            assert await execute("query-version") == toy.registry.version.as_dict()
            assert await execute("echo", {"id": 3, "name": "ü"}) == {"id": 3, "name": "ü"}
            assert len(await execute("blob", {"size": 2_000_000})) == 2_000_000
            with pytest.raises(ExecuteError, match="it can't be done") as caught:
                await execute("fail")
            assert caught.value.error_class == "DeviceNotFound"
            toy.server.emit("TICK", {"n": 5})
            event = await trio_asyncio.aio_as_trio(client.events.get)()
            assert (event["event"], event["data"]) == ("TICK", {"n": 5})
        finally:
            await trio_asyncio.aio_as_trio(client.disconnect)()


async def test_stock_qmp_shell(toy: Toy, tmp_path: Path) -> None:
    lines = b"echo id=5 name=abc\nquery-version\nfail\necho id=oops\n"
    with trio.fail_after(60):
        done = await trio.run_process(
            [str(QMP_SHELL), str(toy.path)],
            stdin=lines,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(tmp_path)},
        )
    output = done.stdout.decode()
    assert "Connected to QEMU 1.2.3" in output
    assert '{"return": {"id": 5, "name": "abc"}}' in output
    assert '"package": "toy 1.2.3"' in output
    assert "it can't be done" in output
    assert "Invalid parameter type for 'id', expected: integer" in output


# --- virtio-vhost-user devices ------------------------------------------------------------------------------

UUID = bytes(range(16))
NOWHERE = {
    "sockets": {"vhost_user": "/run/a.sock", "vfio_user": None, "front": "/run/f.sock"},
    "state": "waiting",
    "carrier": None,
    "peer_pid": None,
    "master_pid": None,
    "broken": None,
}
CONNECTED = {
    "sockets": {"vhost_user": "/run/a.sock", "vfio_user": "/run/b.sock", "front": "/run/f.sock"},
    "state": "connected",
    "carrier": "vfio-user",
    "peer_pid": 1,
    "master_pid": 2,
    "broken": {"rule": "config.status", "reason": "status 0x4", "queue": None},
}


@pytest.fixture
def pool() -> Iterator[_native.Pool]:
    pool = _native.Pool(1)
    yield pool
    pool.close()


def native_info(pool: _native.Pool, max_queues: int) -> dict[str, Any]:
    """What the native half says of a device that nobody drives."""
    device = _native.VhostUserDevice(
        pool, 1 << 20, max_queues=max_queues, uuid=bytes(16), shared_memory=1 << 20, vectors=0
    )
    info = device.info()
    device.member.close()
    return info


def busy_info(pool: _native.Pool) -> dict[str, Any]:
    """The same of one in the middle of a session: every value that can be null is none."""
    info = native_info(pool, 2)
    bits = {"value": 1 << 30, "names": ["BIT_30"]}
    region = {"guest_address": 0, "size": 4096, "mmap_offset": 8192, "offset": 0, "log": False}
    changes = {
        "status": 3,
        "ready": True,
        "resets": 1,
        "features_offered": bits,
        "features_accepted": bits,
        "protocol_slave": {"value": 0x3, "names": ["MQ", "LOG_SHMFD"]},
        "protocol_offered": {"value": 0x2, "names": ["LOG_SHMFD"]},
        "protocol_accepted": {"value": 0x0, "names": []},
        "has_channel": True,
        "memory": [region, {**region, "log": True, "offset": 4096}],
        "waiting": 1,
        "last_message": {"from": "slave", "request": 24, "flags": 5, "size": 72},
        "last_error": {"rule": "vring.index", "reason": "queue 9", "queue": 9},
        "log_rings": 3,
        "log_rings_ignored": 2,
    }
    # a key that the native half doesn't have would say nothing
    assert changes.keys() <= info.keys()
    info |= changes
    info["queues"][1]["calls"] = 7
    return info


def test_a_device_is_described_as_its_type_has_it(pool: _native.Pool, tmp_path: Path) -> None:
    idle = describe(VhostUserDeviceConfig("d", 3), native_info(pool, 3), NOWHERE)
    VHOST_USER_DEVICE.check(kebab(idle), "idle")
    assert (idle["uuid"], idle["ram_file"], idle["ram_size"], idle["last_message"]) == (None, None, None, None)
    assert idle["slave"] == idle["master"] == {"features": None, "protocol_features": None}
    assert [queue["call_doorbell"] for queue in idle["queues"]] == [2, 4, 6]
    assert [queue["err_doorbell"] for queue in idle["queues"]] == [3, 5, 7]
    assert idle["log"] == {"doorbell": 8, "rings": 0, "rings_ignored": 0}

    ram = tmp_path / "ram"
    config = VhostUserDeviceConfig("e", 2, UUID, 1 << 30, True, ram_file=ram, ram_size=4096)
    busy = describe(config, busy_info(pool), CONNECTED)
    VHOST_USER_DEVICE.check(kebab(busy), "busy")
    json.dumps(busy)
    assert busy["uuid"] == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert (busy["ram_file"], busy["ram_size"]) == (str(ram), 4096)
    assert busy["status"] == {"value": 3, "names": ["SLAVE_UP", "MASTER_UP"]}
    assert busy["slave"]["protocol_features"]["names"] == ["MQ", "LOG_SHMFD"]
    assert busy["passed_on"]["names"] == ["LOG_SHMFD"]
    assert busy["master"]["protocol_features"]["names"] == []
    assert busy["last_message"] == {
        "from": "slave",
        "request": 24,
        "name": "GET_CONFIG",
        "reply": True,
        "flags": 5,
        "size": 72,
    }
    assert busy["queues"][1]["calls"] == 7


@pytest.mark.parametrize(
    ("sender", "request_", "flags", "name"),
    [
        ("master", 1, 1, "GET_FEATURES"),
        ("slave", 1, 5, "GET_FEATURES"),
        ("slave", 2, 1, "CONFIG_CHANGE_MSG"),
        ("slave", 2, 9, "CONFIG_CHANGE_MSG"),
        ("master", 2, 5, "CONFIG_CHANGE_MSG"),
        ("master", 44, 1, "GET_SHMEM_CONFIG"),
        ("master", 45, 1, None),
        ("slave", 0xFFFFFFFF, 1, None),
        ("slave", 0xFFFFFFFF, 0xFFFFFFFF, None),
    ],
)
def test_requests_have_names_by_who_asked(sender: str, request_: int, flags: int, name: str | None) -> None:
    assert request_name(sender, request_, flags) == name


def test_every_rule_of_devices_is_described() -> None:
    root = Path(__file__).parent.parent
    described = (root / "docs" / "VIRTIO-VHOST-USER.md").read_text()
    sources = list((root / "rust" / "core" / "src" / "vvu").glob("*.rs"))
    rules = {rule for source in sources for rule in re.findall(r'Fault::new\(\s*"([a-z.-]+)"', source.read_text())}
    assert {"config.status", "rxq.size", "vring.index", "shared-memory.order"} <= rules
    assert [rule for rule in sorted(rules) if f"`{rule}`" not in described] == []


class Devices:
    """A group of nothing but virtio-vhost-user devices."""

    qmp: QMPServer | None = None
    qmp_fd: int | None = None
    left = False

    def __init__(self, directory: Path, devices: list[dict[str, Any]]) -> None:
        self.qmp_path = directory / "qmp.sock"
        self.devices = devices
        self.tell: Callable[[GroupEvent], None] = lambda event: None

    def subscribe(self, tell: Callable[[GroupEvent], None]) -> Callable[[], None]:
        self.tell = tell
        return lambda: None

    def query_vhost_user_devices(self) -> list[dict[str, Any]]:
        return self.devices


async def test_devices_and_their_events_over_qmp(tmp_path: Path, pool: _native.Pool) -> None:
    devices = [
        describe(VhostUserDeviceConfig("d", 3), native_info(pool, 3), NOWHERE),
        describe(VhostUserDeviceConfig("e", 2, UUID), busy_info(pool), CONNECTED),
    ]
    group = Devices(tmp_path, devices)
    sent: list[tuple[str, dict[str, Any], str]] = [
        ("slave-up", {}, "SLAVE_UP"),
        ("master-up", {"peer_pid": 4711}, "MASTER_UP"),
        ("master-up", {"peer_pid": None}, "MASTER_UP"),
        ("master-down", {"reason": "closed by the master"}, "MASTER_DOWN"),
        ("slave-down", {"reason": "its driver said so"}, "SLAVE_DOWN"),
        ("device-broken", {"rule": "rxq.size", "reason": "too small", "queue": 0}, "VHOST_USER_DEVICE_BROKEN"),
        ("device-broken", {"rule": "config.status", "reason": "0x4", "queue": None}, "VHOST_USER_DEVICE_BROKEN"),
    ]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_qmp, group)
            async with connect(tmp_path) as client, client.events() as feed:
                assert await client.query_vhost_user_devices() == kebab(devices)
                for kind, data, _ in sent:
                    # the number is that of native events, and nobody's business
                    group.tell(GroupEvent(kind, 1 << 20, {"name": "d", **data}))
                types = make_registry(None).events  # type: ignore[arg-type]
                for _, data, name in sent:
                    event = await anext(feed)
                    assert (event["event"], event["data"]) == (name, {"name": "d", **kebab(data)})
                    types[name].check(event["data"], name)
            nursery.cancel_scope.cancel()
