# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""A QMP server on a Unix socket, on trio. It knows the protocol; the commands come from `group_qmp`.

Three things shape it:

* QEMU's own clients send no newline after a command and may send several in one packet or one in many, so
  input is cut into JSON values by `JSONFramer`, not into lines. Output is one line for each message, because
  that is what clients read.
* A client that doesn't read must not cost the others anything. Replies wait for their own client only (which
  then isn't read from any more either); an event that finds a client's outbox full drops that client.
* What a command takes and returns is declared once, with the types below. Arguments are checked against it,
  and `query-qmp-schema` shows it in the form that QEMU's introspection has.

Texts of errors follow QEMU's, so tools that know them from there find them here.
"""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from .errors import VhuError, single
from .rundir import bind_unix, unlink_bound

__all__ = [
    "ANY",
    "BOOL",
    "INT",
    "NULL",
    "NUMBER",
    "STR",
    "Alternate",
    "Array",
    "Builtin",
    "CommandError",
    "Enum",
    "FramingError",
    "JSONFramer",
    "Object",
    "QMPServer",
    "Registry",
    "Reply",
    "ServerStatistics",
    "Type",
    "Version",
    "nullable",
]

log = logging.getLogger(__name__)

MAX_MESSAGE: Final = 1024 * 1024
MAX_DEPTH: Final = 128
"""Nesting allowed in a message. Far below what would exhaust the interpreter's stack, far above any command.
"""
OUTBOX_MESSAGES: Final = 1024
OUTBOX_BYTES: Final = 4 * 1024 * 1024
MAX_CLIENTS: Final = 256
LAST_WORDS: Final = 2.0
"""Seconds that a client gets to read what is already in its outbox when the connection is about to be closed.
"""


class CommandError(VhuError):
    """Raised by a command: the client gets this error class and description."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


class FramingError(Exception):
    """The input can't be cut into JSON values any more; the connection has to be closed after telling why."""


# --- types -------------------------------------------------------------------------------------------------


class Type:
    """A QAPI type. Compared by identity: two objects with the same members are two types, as in QEMU's
    schema.
    """

    def check(self, value: object, name: str) -> None:
        """Raise CommandError unless `value` has this type; `name` says which parameter it is."""
        raise NotImplementedError

    def children(self) -> Sequence[Type]:
        """The types this one refers to."""
        return ()


def _wrong_type(name: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{name}', expected: {expected}")


@dataclass(frozen=True, eq=False, slots=True)
class Builtin(Type):
    """A type that JSON has."""

    name: str
    json_type: str
    expected: str
    accepts: Callable[[object], bool]

    def check(self, value: object, name: str) -> None:
        if not self.accepts(value):
            raise _wrong_type(name, self.expected)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _is_text(value: object) -> bool:
    # a lone surrogate or a NUL is JSON, but nothing that a path or a name could be
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


INT: Final = Builtin("int", "int", "integer", _is_int)
NUMBER: Final = Builtin(
    "number",
    "number",
    "number",
    lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
)
STR: Final = Builtin("str", "string", "string", _is_text)
BOOL: Final = Builtin("bool", "boolean", "boolean", lambda value: isinstance(value, bool))
NULL: Final = Builtin("null", "null", "null", lambda value: value is None)
ANY: Final = Builtin("any", "value", "value", lambda value: True)


@dataclass(frozen=True, eq=False, slots=True)
class Enum(Type):
    """One of some strings."""

    values: tuple[str, ...]

    def check(self, value: object, name: str) -> None:
        if not isinstance(value, str):
            raise _wrong_type(name, "string")
        if value not in self.values:
            raise CommandError(f"Parameter '{name}' does not accept value '{value}'")


@dataclass(frozen=True, eq=False, slots=True)
class Array(Type):
    """A list of one type."""

    element: Type

    def check(self, value: object, name: str) -> None:
        if not isinstance(value, list):
            raise _wrong_type(name, "array")
        for index, item in enumerate(value):
            self.element.check(item, f"{name}[{index}]")

    def children(self) -> Sequence[Type]:
        return (self.element,)


@dataclass(frozen=True, eq=False, slots=True)
class Alternate(Type):
    """One of several types that JSON can tell apart."""

    choices: tuple[Type, ...]

    def check(self, value: object, name: str) -> None:
        for choice in self.choices:
            try:
                choice.check(value, name)
            except CommandError:
                continue
            return
        raise _wrong_type(name, " or ".join(getattr(choice, "expected", "object") for choice in self.choices))

    def children(self) -> Sequence[Type]:
        return self.choices


def nullable(choice: Type) -> Alternate:
    """That type or null."""
    return Alternate((choice, NULL))


@dataclass(frozen=True, eq=False, slots=True)
class Object(Type):
    """Named members. A name that begins with `*` is optional, as in QAPI source."""

    members: Mapping[str, Type] = field(default_factory=dict)

    def check(self, value: object, name: str) -> None:
        if not isinstance(value, dict):
            raise _wrong_type(name, "object")
        prefix = f"{name}." if name else ""
        for key, (kind, optional) in self.fields().items():
            if key in value:
                kind.check(value[key], prefix + key)
            elif not optional:
                raise CommandError(f"Parameter '{prefix}{key}' is missing")
        for key in value:
            if key not in self.members and f"*{key}" not in self.members:
                raise CommandError(f"Parameter '{prefix}{key}' is unexpected")

    def fields(self) -> dict[str, tuple[Type, bool]]:
        """Members by plain name: type, and whether it may be absent."""
        return {key.removeprefix("*"): (kind, key.startswith("*")) for key, kind in self.members.items()}

    def children(self) -> Sequence[Type]:
        return tuple(self.members.values())


EMPTY: Final = Object()


# --- commands and events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Version:
    """What the greeting and `query-version` say. QEMU's clients expect the numbers under "qemu"."""

    major: int
    minor: int
    micro: int
    package: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "qemu": {"micro": self.micro, "minor": self.minor, "major": self.major},
            "package": self.package,
        }


@dataclass(frozen=True, slots=True)
class Reply:
    """A command's result together with something to do once the client has it (`quit` stops the server then)."""

    value: object
    after: Callable[[], None]


Handler = Callable[..., Awaitable[object]]


@dataclass(frozen=True, slots=True)
class _Command:
    name: str
    arguments: Object
    returns: Type
    handler: Handler
    before_negotiation: bool


class Registry:
    """The commands and events of a server, with their types."""

    def __init__(self, version: Version | Callable[[], Version]) -> None:
        """A version that takes time to find out can be given as a function; it is called when it is asked for."""
        self._version = version
        self._commands: dict[str, _Command] = {}
        self._events: dict[str, Object] = {}
        version_type = Object({"qemu": Object({"major": INT, "minor": INT, "micro": INT}), "package": STR})
        self.add("query-version", self._query_version, returns=version_type)
        self.add("query-commands", self._query_commands, returns=Array(Object({"name": STR})))
        # as in QEMU, the answer's own type is left open: the meta-types are a union that few clients read
        self.add("query-qmp-schema", self._query_schema, returns=Array(ANY))

    def add(
        self,
        name: str,
        handler: Handler,
        *,
        arguments: Object = EMPTY,
        returns: Type = EMPTY,
        before_negotiation: bool = False,
    ) -> None:
        """Add a command. The handler gets its arguments by keyword, with '_' for '-'; absent ones aren't
        passed.

        It may raise CommandError; any other exception is logged and answered as an internal error.
        """
        if name in self._commands:
            raise ValueError(f"command {name} is there already")
        self._commands[name] = _Command(name, arguments, returns, handler, before_negotiation)

    def add_event(self, name: str, data: Object = EMPTY) -> None:
        """Declare an event. Only declared events can be emitted."""
        if name in self._events:
            raise ValueError(f"event {name} is there already")
        self._events[name] = data

    @property
    def commands(self) -> Mapping[str, _Command]:
        return self._commands

    @property
    def events(self) -> Mapping[str, Object]:
        return self._events

    def schema(self) -> list[dict[str, Any]]:
        """QEMU's SchemaInfoList: commands and events by name, all types but the built-in ones by number.

        The numbers mean nothing and may change with any version; that is why QEMU masks its type names, too.
        """
        return _Schema().build(self._commands, self._events)

    @property
    def version(self) -> Version:
        if not isinstance(self._version, Version):
            self._version = self._version()
        return self._version

    async def _query_version(self) -> object:
        return self.version.as_dict()

    async def _query_commands(self) -> object:
        return [{"name": name} for name in self._commands]

    async def _query_schema(self) -> object:
        return self.schema()


class _Schema:
    def __init__(self) -> None:
        self._names: dict[Type, str] = {}
        self._types: list[dict[str, Any]] = []

    def build(self, commands: Mapping[str, _Command], events: Mapping[str, Object]) -> list[dict[str, Any]]:
        entities: list[dict[str, Any]] = []
        for command in commands.values():
            entities.append(
                {
                    "name": command.name,
                    "meta-type": "command",
                    "arg-type": self._name(command.arguments),
                    "ret-type": self._name(command.returns),
                }
            )
        for name, data in events.items():
            entities.append({"name": name, "meta-type": "event", "arg-type": self._name(data)})
        return entities + self._types

    def _name(self, kind: Type) -> str:
        if kind in self._names:
            return self._names[kind]
        match kind:
            case Builtin():
                self._names[kind] = kind.name
                self._types.append({"name": kind.name, "meta-type": "builtin", "json-type": kind.json_type})
            case Array():
                element = self._name(kind.element)
                self._names[kind] = f"[{element}]"
                entry = {"name": f"[{element}]", "meta-type": "array", "element-type": element}
                if entry not in self._types:
                    self._types.append(entry)
            case _:
                self._names[kind] = str(sum(1 for name in self._names.values() if name.isdigit()))
                self._types.append({"name": self._names[kind], **self._describe(kind)})
        return self._names[kind]

    def _describe(self, kind: Type) -> dict[str, Any]:
        match kind:
            case Enum():
                members = [{"name": value} for value in kind.values]
                return {"meta-type": "enum", "members": members, "values": list(kind.values)}
            case Alternate():
                return {"meta-type": "alternate", "members": [{"type": self._name(c)} for c in kind.choices]}
            case Object():
                described = []
                for name, (member, optional) in kind.fields().items():
                    entry: dict[str, Any] = {"name": name, "type": self._name(member)}
                    if optional:
                        entry["default"] = None
                    described.append(entry)
                return {"meta-type": "object", "members": described}
            case _:
                raise TypeError(f"not a QAPI type: {kind!r}")


# --- input -------------------------------------------------------------------------------------------------

_BLANK = re.compile(rb"[ \t\r\n]*")
_STRUCTURE = re.compile(rb'["{}\[\]\xff]')
_STRING_END = re.compile(rb'["\\\x00-\x1f\xff]')
_WORD_END = re.compile(rb'[ \t\r\n"{}\[\]\xff]')


class JSONFramer:
    """Cuts bytes into JSON values, however they arrive.

    A value's end is found by counting brackets outside of strings; whether it is valid JSON is for the parser
    to say. A control character within a string and the byte 0xFF (which is in no UTF-8 text; QEMU's clients
    use it to get a parser out of the middle of something) end the value there, so one torn command doesn't
    swallow all that follow.
    """

    def __init__(self, max_message: int = MAX_MESSAGE, max_depth: int = MAX_DEPTH) -> None:
        self._max_message = max_message
        self._max_depth = max_depth
        self._buffer = bytearray()
        self._position = 0
        self._depth = 0
        self._in_string = False
        self._in_word = False
        self._escape = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what was received and yield the values that are complete. Raises FramingError over the limits."""
        self._buffer += data
        while True:
            end = self._find_end()
            if end is None:
                if len(self._buffer) > self._max_message:
                    raise FramingError("JSON token size limit exceeded")
                return
            value = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._position = self._depth = 0
            self._in_string = self._in_word = self._escape = False
            if len(value) > self._max_message:
                raise FramingError("JSON token size limit exceeded")
            yield value

    def _find_end(self) -> int | None:
        buffer = self._buffer
        if self._position == 0:
            blank = _BLANK.match(buffer)
            if blank is not None and blank.end():
                del buffer[: blank.end()]
        while self._position < len(buffer):
            if self._in_word:
                end = _WORD_END.search(buffer, self._position)
                if end is None:
                    self._position = len(buffer)
                    return None
                return end.start()
            if self._in_string:
                if self._scan_string():
                    return self._position
                continue
            found = _STRUCTURE.search(buffer, self._position)
            if self._depth == 0 and (found is None or found.start() > self._position):
                self._in_word = True
                continue
            if found is None:
                self._position = len(buffer)
                return None
            self._position = found.end()
            if self._scan_structure(found[0]):
                return self._position
        return None

    def _scan_string(self) -> bool:
        """Go on within a string. True when the whole value ends here."""
        if self._escape:
            self._position += 1
            self._escape = False
            return False
        found = _STRING_END.search(self._buffer, self._position)
        if found is None:
            self._position = len(self._buffer)
            return False
        self._position = found.end()
        if found[0] == b"\\":
            self._escape = True
            return False
        if found[0] == b'"':
            self._in_string = False
            return self._depth == 0
        return True

    def _scan_structure(self, byte: bytes) -> bool:
        """Take a bracket or quote outside of a string. True when the whole value ends here."""
        if byte == b'"':
            self._in_string = True
            return False
        if byte in b"{[":
            self._depth += 1
            if self._depth > self._max_depth:
                raise FramingError("JSON nesting depth limit exceeded")
            return False
        self._depth -= 1
        return byte == b"\xff" or self._depth <= 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number out of range '{text}'")
    return value


def _no_constant(text: str) -> object:
    raise ValueError(f"invalid keyword '{text}'")


def parse_json(data: bytes) -> object:
    """JSON as RFC 8259 has it: no NaN, no duplicate keys, nothing that couldn't be sent back. Raises
    CommandError.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise CommandError("JSON parse error, invalid UTF-8 sequence") from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise CommandError(f"JSON parse error, {error.msg.lower()} at character {error.pos + 1}") from None
    except ValueError as error:
        raise CommandError(f"JSON parse error, {str(error).splitlines()[0]}") from None


# --- server ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Numbers of a QMPServer since its start."""

    clients: int
    accepted: int
    refused: int
    dropped: int
    commands: int
    errors: int
    events: int


class _Outbox:
    """Messages on their way to one client, bounded."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._size = 0
        self._sending = False
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    @property
    def full(self) -> bool:
        return len(self._messages) >= OUTBOX_MESSAGES or self._size >= OUTBOX_BYTES

    def put_nowait(self, message: bytes) -> None:
        if self.full:
            raise trio.WouldBlock
        self._messages.append(message)
        self._size += len(message)
        self._readers.unpark()

    async def put(self, message: bytes) -> None:
        while self.full:
            await self._writers.park()
        self.put_nowait(message)

    async def send_to(self, stream: trio.SocketStream) -> None:
        """Send all that comes, until cancelled or the peer is gone."""
        while True:
            while not self._messages:
                await self._readers.park()
            batch = b"".join(self._messages)
            self._messages.clear()
            self._sending = True
            await stream.send_all(batch)
            self._sending = False
            self._size = 0 if not self._messages else sum(map(len, self._messages))
            self._writers.unpark_all()

    async def flushed(self) -> None:
        while self._messages or self._sending:
            await self._writers.park()


class _Listener(trio.abc.Listener[trio.SocketStream]):
    """A listening socket that can be told to accept nobody for a while."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        self._held: trio.Event | None = None
        self._accepting: trio.CancelScope | None = None

    def fileno(self) -> int:
        return self._listener.socket.fileno()

    def hold(self) -> None:
        if self._held is None:
            self._held = trio.Event()
        if self._accepting is not None:
            self._accepting.cancel()

    def release(self) -> None:
        if self._held is not None:
            self._held.set()
            self._held = None

    async def accept(self) -> trio.SocketStream:
        while True:
            while self._held is not None:
                await self._held.wait()
            with trio.CancelScope() as self._accepting:
                return await self._listener.accept()

    async def aclose(self) -> None:
        await self._listener.aclose()


class _Client:
    def __init__(self, number: int, stream: trio.SocketStream) -> None:
        self.number = number
        self.stream = stream
        self.outbox = _Outbox()
        self.scope = trio.CancelScope()
        self.negotiated = False
        self.dropped = False


class QMPServer:
    """Serves a registry's commands to any number of clients of one Unix socket."""

    def __init__(self, registry: Registry, path: Path, *, max_clients: int = MAX_CLIENTS) -> None:
        self.registry = registry
        self.path = path
        self.keep_path: Callable[[], bool] = lambda: False
        """Asked at the end: whether another process serves the socket, so that it isn't to be removed."""
        self._listener: _Listener | None = None
        self._max_clients = max_clients
        self._clients: dict[int, _Client] = {}
        self._accepted = self._refused = self._dropped = 0
        self._commands = self._errors = self._events = 0

    def statistics(self) -> ServerStatistics:
        """Clients now, and counts since the start."""
        return ServerStatistics(
            len(self._clients),
            self._accepted,
            self._refused,
            self._dropped,
            self._commands,
            self._errors,
            self._events,
        )

    def listener_fd(self) -> int:
        """The listening socket's descriptor, which stays ours; -1 before there is one."""
        return -1 if self._listener is None else self._listener.fileno()

    def hold(self) -> None:
        """Accept no more clients, until `release`: another process may."""
        if self._listener is not None:
            self._listener.hold()

    def release(self) -> None:
        """The end of `hold`."""
        if self._listener is not None:
            self._listener.release()

    async def run(
        self, fd: int | None = None, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Bind, report `started()` once clients can connect, serve until cancelled, unlink the socket.

        `fd`: a listening socket to take over instead of binding one.

        Raises OSError when the path can't be bound. Cancellation closes all clients at once.
        """
        sock = bind_unix(self.path) if fd is None else socket.socket(fileno=fd)
        sock.setblocking(False)
        try:
            identity = (0, 0)
            # a path that a predecessor's user has removed is nothing to fail for now
            with suppress(FileNotFoundError):
                status = self.path.lstat()
                identity = (status.st_dev, status.st_ino)
            try:
                listener = self._listener = _Listener(sock)
                async with trio.open_nursery() as nursery:
                    await nursery.start(trio.serve_listeners, self._serve, [listener])
                    task_status.started()
            finally:
                if not self.keep_path():
                    unlink_bound(self.path, identity)
        finally:
            sock.close()

    def emit(self, event: str, data: Mapping[str, Any]) -> None:
        """Send an event to every client that has negotiated. Never blocks: who can't keep up is dropped."""
        if event not in self.registry.events:
            raise ValueError(f"event {event} was never declared")
        now = time.time_ns() // 1000
        message = {
            "event": event,
            "data": data,
            "timestamp": {"seconds": now // 1_000_000, "microseconds": now % 1_000_000},
        }
        self._events += 1
        line = _encode(message)
        for client in list(self._clients.values()):
            if client.negotiated and not client.dropped:
                try:
                    client.outbox.put_nowait(line)
                except trio.WouldBlock:
                    client.dropped = True
                    self._dropped += 1
                    log.warning("qmp client %d: dropped, it doesn't read its events", client.number)
                    client.scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        self._accepted += 1
        async with stream:
            if len(self._clients) >= self._max_clients:
                self._refused += 1
                log.warning("qmp: connection refused, there are %d clients already", len(self._clients))
                return
            client = _Client(self._accepted, stream)
            self._clients[client.number] = client
            try:
                with client.scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._send, client)
                        await self._receive(client)
                        with trio.move_on_after(LAST_WORDS):
                            await client.outbox.flushed()
                        nursery.cancel_scope.cancel()
            except Exception:
                # a bug in one client's handling ends that client, not the server
                log.exception("qmp client %d: closed", client.number)
            finally:
                del self._clients[client.number]

    async def _send(self, client: _Client) -> None:
        try:
            await client.outbox.send_to(client.stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            client.scope.cancel()

    async def _receive(self, client: _Client) -> None:
        greeting = {"QMP": {"version": self.registry.version.as_dict(), "capabilities": []}}
        await client.outbox.put(_encode(greeting))
        framer = JSONFramer()
        while True:
            try:
                data = await client.stream.receive_some(65536)
            except trio.BrokenResourceError:
                return
            if not data:
                return
            try:
                for value in framer.feed(data):
                    await self._handle(client, value)
                    # a packet of a thousand tiny commands shall not hold up everybody else
                    await trio.lowlevel.checkpoint()
            except FramingError as error:
                self._errors += 1
                await client.outbox.put(_encode(_error("GenericError", str(error), {})))
                log.warning("qmp client %d: closed: %s", client.number, error)
                return

    async def _handle(self, client: _Client, value: bytes) -> None:
        """Run one command and queue its reply."""
        self._commands += 1
        echo: dict[str, Any] = {}
        after: Callable[[], None] | None = None
        try:
            request = parse_json(value)
            if not isinstance(request, dict):
                raise CommandError("QMP input must be a JSON object")
            if "id" in request:
                echo["id"] = request["id"]
            result = await self._execute(client, request)
            if isinstance(result, Reply):
                after = result.after
                result = result.value
            message = {"return": result, **echo}
        except CommandError as error:
            self._errors += 1
            message = _error(error.error_class, error.desc, echo)
        await client.outbox.put(_encode(message))
        if after is not None:
            with trio.move_on_after(LAST_WORDS):
                await client.outbox.flushed()
            after()

    async def _execute(self, client: _Client, request: dict[str, Any]) -> object:
        name, arguments = _check_request(request)
        if not client.negotiated:
            if name != "qmp_capabilities":
                raise CommandError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
            _CAPABILITIES.check(arguments, "")
            # no capability is offered, so none can be enabled
            for capability in arguments.get("enable", []):
                raise CommandError(f"Capability '{capability}' is not available")
            client.negotiated = True
            return {}
        if name == "qmp_capabilities":
            raise CommandError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        command = self.registry.commands.get(name)
        if command is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        command.arguments.check(arguments, "")
        try:
            result = await command.handler(**{key.replace("-", "_"): arg for key, arg in arguments.items()})
        except CommandError:
            raise
        except Exception as raised:
            error = single(raised)
            if isinstance(error, CommandError):
                raise error from raised
            log.exception("qmp client %d: command %s failed", client.number, name)
            raise CommandError(f"internal error: {type(error).__name__}: {error}") from error
        return {} if result is None else result


_CAPABILITIES: Final = Object({"*enable": Array(STR)})


def _check_request(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for key, value in request.items():
        match key:
            case "execute":
                if not isinstance(value, str):
                    raise CommandError("QMP input member 'execute' must be a string")
            case "arguments":
                if not isinstance(value, dict):
                    raise CommandError("QMP input member 'arguments' must be an object")
            case "id":
                pass
            case _:
                # exec-oob too: out-of-band execution is a capability that isn't offered
                raise CommandError(f"QMP input member '{key}' is unexpected")
    if "execute" not in request:
        raise CommandError("QMP input lacks member 'execute'")
    return request["execute"], request.get("arguments", {})


def _error(error_class: str, desc: str, echo: Mapping[str, Any]) -> dict[str, Any]:
    return {"error": {"class": error_class, "desc": desc}, **echo}


def _encode(message: Mapping[str, Any]) -> bytes:
    # ASCII only: a lone surrogate in an echoed id stays the escape that it came as
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\r\n"
