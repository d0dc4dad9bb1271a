# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The `vhu-legacy` command: arguments to calls, results to tables or JSON, errors to one line.

Exit status: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 130 interrupted. Results go to
stdout, everything else to stderr. With `--json`, stdout has JSON and nothing else.

Commands import what they need when they run: `validate` shall not wait for an event loop it never starts.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

import click

from . import qemu_args
from .errors import ClientError, ConfigError, GroupError, GuestError, VhuError, single

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .client import GroupClient
    from .config import GroupConfig, OwnerConfig
    from .upgrade import TakeOver

T = TypeVar("T")
Via = Literal["vhost-user", "vfio-user"]
F = TypeVar("F", bound=Callable[..., Any])

log = logging.getLogger("vhu_legacy")

ENGINES: Final = ("native", "rust-vmm")
DEBUG: Final = "VHU_LEGACY_DEBUG"
KEPT_EVENTS: Final = 12
TRACE_INTERVAL: Final = 0.2
"""Seconds between two looks at a trace that is followed."""
TRACE_PAGE: Final = 4096
OWNER: Final = 0
"""The owner's number among the devices of a group."""
ALL: Final = -1
LOG_QUEUE: Final = 1000
DEFAULT_MEMORY: Final = "1G"
"""Guest memory in what `qemu-args` prints."""
END_OF_LOG: Final = logging.makeLogRecord({})


class Failure(click.ClickException):
    """An error of ours, shown as one line."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        for line in self.message.splitlines() or [""]:
            click.echo(f"vhu-legacy: {line}", file=file or sys.stderr)


class Commands(click.Group):
    """Turns whatever a command raises into a line on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BaseException as raised:
            error = single(raised)
            if os.environ.get(DEBUG):
                import traceback

                traceback.print_exception(raised)
            raise _translate(error) from raised


def _translate(error: BaseException) -> BaseException:
    match error:
        case click.ClickException() | click.exceptions.Exit() | SystemExit() | GeneratorExit():
            return error
        case KeyboardInterrupt():
            return click.exceptions.Exit(130)
        case BrokenPipeError():
            # whoever read our output has enough; what Python still has buffered must not complain either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return click.exceptions.Exit(1)
        case VhuError():
            return Failure(str(error))
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return Failure(f"{where}{error.strerror or error}")
        case BaseExceptionGroup():
            lines = (str(_translate(single(inner))) for inner in error.exceptions)
            return Failure("\n".join(dict.fromkeys(lines)))
        case _:
            hint = f"set {DEBUG}=1 to see where"
            return Failure(f"internal error: {type(error).__name__}: {error} ({hint})")


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from . import __version__

    click.echo(f"vhu-legacy, version {__version__}")
    ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """A software virtio device group for stock QEMU, with members that legacy guests can drive."""


# --- options ------------------------------------------------------------------------------------------------


def json_option(function: F) -> F:
    """`--json`, on every command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")(function)


def group_options(function: F) -> F:
    """Which running group is meant."""
    function = click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        envvar="VHU_LEGACY_RUN_DIR",
        help="Run directory of the group.",
    )(function)
    return click.option("--group", "group_name", metavar="NAME", help="Name of the group, if several run.")(function)


class MemberId(click.ParamType[int]):
    """A member number; "member-3" is understood, too."""

    name = "member"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).removeprefix("member-")
        if not text.isdecimal() or not text.isascii():
            self.fail(f"{value!r} is not a member number", param, ctx)
        return int(text)


class DeviceId(MemberId):
    """A member number, or "owner"."""

    name = "member|owner"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return OWNER if value == "owner" else super().convert(value, param, ctx)


class TracedId(DeviceId):
    """A member number, "owner", or "all"."""

    name = "member|owner|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return ALL if value in ("all", ALL) else super().convert(value, param, ctx)


class Number(click.ParamType[int]):
    """A number that isn't negative, in decimal, or in hexadecimal with 0x."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(str(value), 0)
        except ValueError:
            number = -1
        if number < 0:
            self.fail(f"{value!r} is not a number such as 18 or 0x12", param, ctx)
        return number


class HexBytes(click.ParamType[bytes]):
    """Bytes as pairs of hexadecimal digits, in the order in which they lie in memory."""

    name = "hex"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        try:
            return bytes.fromhex(str(value).removeprefix("0x"))
        except ValueError:
            self.fail(f"{value!r} is not a row of bytes such as 0f00", param, ctx)


class OpcodeName(click.ParamType[int]):
    """An opcode by number or by name (LIST_QUERY, list-query)."""

    name = "opcode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from .admin import Opcode

        name = str(value).upper().replace("-", "_")
        if name in Opcode.__members__:
            return int(Opcode[name])
        return Number().convert(value, param, ctx)


class GroupTypeName(click.ParamType[int]):
    """A group type: self, sr-iov, or a number."""

    name = "self|sr-iov|number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        known = {"self": 0, "sr-iov": 1}
        return known[str(value)] if str(value) in known else Number().convert(value, param, ctx)


class QemuVersion(click.ParamType[str]):
    """A QEMU version such as 7.2, 10.0, 11.1."""

    name = "version"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            qemu_args.parse_version(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


member_argument = click.argument("member", type=MemberId())
device_argument = click.argument("member", type=DeviceId(), metavar="MEMBER|owner")


# --- output -------------------------------------------------------------------------------------------------


def print_json(value: object) -> None:
    """One JSON value on stdout."""
    click.echo(json.dumps(value, default=_plain))


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (Path, set, frozenset, tuple)):
        return str(value) if isinstance(value, Path) else list(value)
    return str(value)


def stdout_console() -> Console:
    from rich.console import Console

    # a pipe has no width: a table cut to 80 columns would be of no use to grep
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def new_table(*columns: str, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.removesuffix(">"), justify="right" if right else "left", overflow="fold")
    return table


def size_text(size: int) -> str:
    """Bytes for people: 64 MiB, 1.5 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    value, unit = float(size), 0
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {units[unit]}" if value == int(value) else f"{value:.1f} {units[unit]}"


def run_async(function: Callable[..., Awaitable[T]], *args: object) -> T:
    """Run an async function to its end; groups with one exception in them are unwrapped."""
    from .running import run

    try:
        return run(function, *args)
    except BaseExceptionGroup as errors:
        error = single(errors)
        raise error from error.__cause__


def ask_group(group_name: str | None, run_dir: Path | None, function: Callable[[GroupClient], Awaitable[T]]) -> T:
    """Find the running group, connect, and call the function with the client."""

    async def ask() -> T:
        import trio

        from . import client

        directory = await trio.to_thread.run_sync(client.find_group, group_name, run_dir)
        async with client.connect(directory) as connected:
            return await function(connected)

    return run_async(ask)


# --- serve and validate -------------------------------------------------------------------------------------


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where sockets go (instead of the file's run_dir).")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="native",
    show_default=True,
    help="Who serves the sockets: our own loop, or the stock daemon of vhost-user-backend.",
)
@click.option(
    "--log-level", type=click.Choice(("debug", "info", "warning", "error")), default="info", show_default=True
)
@click.option(
    "--fresh", is_flag=True, help="Forget what was changed by commands since the group was first served (state.json)."
)
@click.option("--supervise", is_flag=True, help="Serve in a child process, and start another when it dies.")
@click.option("--predecessor", type=int, hidden=True, help="A socket to the process that hands its group over.")
@click.option("--supervisor", type=int, hidden=True, help="The process to end with, when the predecessor has gone.")
@json_option
def serve(
    file: Path,
    run_dir: Path | None,
    engine: str,
    log_level: str,
    fresh: bool,
    supervise: bool,
    predecessor: int | None,
    supervisor: int | None,
    as_json: bool,
) -> None:
    """Serve the group of FILE until SIGTERM or SIGINT.

    Prints one JSON line on stdout when all sockets are there (with or without --json), and logs to stderr.
    """

    def serve_once(how: Serving, died: str | None = None) -> None:
        with _log_to_stderr(log_level.upper()):
            if died is not None:
                log.error("%s: serving again", died)
            run_async(_serve, file, run_dir, engine, how)

    if not supervise:
        serve_once(Serving(fresh=fresh, announce=predecessor is None, predecessor=predecessor, supervisor=supervisor))
        return
    from .supervisor import Attempt
    from .supervisor import supervise as run_supervised

    _import_server()

    def again(attempt: Attempt) -> None:
        announce = not attempt.announced
        how = Serving(
            fresh=fresh and announce,
            announce=announce,
            ready=attempt.ready,
            supervisor=attempt.supervisor,
        )
        serve_once(how, attempt.died)

    raise click.exceptions.Exit(run_supervised(again))


@dataclass(frozen=True, slots=True)
class Serving:
    """What a serving process is to know of those before and around it."""

    fresh: bool = False
    announce: bool = True
    """Print the line for whoever waits."""
    ready: Callable[[], None] = lambda: None
    predecessor: int | None = None
    supervisor: int | None = None


def _import_server() -> None:
    """All that serving needs, so that a child finds it in memory."""
    from . import group, group_qmp, running  # noqa: F401


@contextmanager
def _log_to_stderr(level: str) -> Iterator[None]:
    """Log through a thread of its own: a pipe that nobody reads may stop that, but not the members.

    Lines beyond what the queue holds are lost; their number is said when it drains.
    """
    lines: Queue[logging.LogRecord] = Queue(LOG_QUEUE)
    target = logging.StreamHandler(sys.stderr)
    target.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    writer = threading.Thread(target=_write_log, args=(lines, target), name="log", daemon=True)
    handler = _LossyHandler(lines)
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(handler)
    writer.start()
    try:
        yield
    finally:
        root.removeHandler(handler)
        with suppress(Full):
            lines.put_nowait(END_OF_LOG)
        # Whoever reads may have stopped for good; a daemon thread doesn't keep the process.
        writer.join(1.0)


class _LossyHandler(logging.Handler):
    """Hands records to the thread that writes them. Drops what does not fit, and counts it."""

    def __init__(self, lines: Queue[logging.LogRecord]) -> None:
        super().__init__()
        self.queue = lines
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # what the arguments say now, not when it is written
            record.msg, record.args = record.getMessage(), None
        except (TypeError, ValueError):
            self.handleError(record)
            return
        if self.lost:
            note = logging.LogRecord(record.name, logging.WARNING, "", 0, "%d log lines lost", (self.lost,), None)
            try:
                self.queue.put_nowait(note)
            except Full:
                self.lost += 1
                return
            self.lost = 0
        try:
            self.queue.put_nowait(record)
        except Full:
            self.lost += 1


def _write_log(lines: Queue[logging.LogRecord], target: logging.Handler) -> None:
    while (record := lines.get()) is not END_OF_LOG:
        target.handle(record)


async def _serve(file: Path, run_dir: Path | None, engine: str, how: Serving) -> None:
    if how.predecessor is None:
        await _serve_group(file, run_dir, engine, how, None)
        return
    from .handover import Pipe
    from .upgrade import TakeOver

    take_over = TakeOver(Pipe.from_fd(how.predecessor))
    try:
        await _serve_group(file, run_dir, engine, how, take_over)
    except BaseException as raised:
        await take_over.refuse(str(single(raised)))
        raise


async def _serve_group(
    file: Path, run_dir: Path | None, engine: str, how: Serving, predecessor: TakeOver | None
) -> None:
    import trio

    from . import state
    from .config import check
    from .group import Engine, Group, open_group
    from .group_qmp import serve_qmp
    from .supervisor import HANDED_OVER

    damaged: list[GroupError] = []
    parent = os.getppid()
    left = False

    def unused_images(name: str, directory: Path) -> Collection[int]:
        # A look before the run directory is ours; it is read again then.
        try:
            kept = None if how.fresh else state.read(run_dir or directory, name)
        except GroupError as error:
            damaged.append(error)
            return ()
        return () if kept is None else kept.unused_images

    async def read() -> GroupConfig:
        result = await trio.to_thread.run_sync(check, file, unused_images)
        if result.config is None:
            if damaged:
                raise damaged[0]
            raise ConfigError(result.problems)
        for warning in result.warnings:
            log.warning("%s", warning)
        return result.config

    async def stop_on_signal(*, task_status: trio.TaskStatus[None]) -> None:
        # nohup has SIGHUP ignored; otherwise the end of a terminal is no reason to leave sockets behind
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, *hangup) as signals:
            task_status.started()
            async for number in signals:
                if not work.cancel_called:
                    log.info("%s: stopping", signal.Signals(number).name)
                work.cancel()

    async def until_asked(group: Group) -> None:
        async with trio.open_nursery() as inner:
            await inner.start(serve_qmp, group)
            if predecessor is not None:
                await predecessor.serving(group)
                log.info("%d members are taken over", len(group.member_ids))
                if how.supervisor is not None:
                    inner.start_soon(end_with, how.supervisor, group)
            elif how.announce:
                click.echo(json.dumps(ready_line(group)))
            else:
                log.info("%d members are served again", len(group.member_ids))
            group.supervisor_pid = how.supervisor
            how.ready()
            await group.stopping.wait()
            inner.cancel_scope.cancel()

    async def end_with(supervisor: int, group: Group) -> None:
        from .supervisor import die_with_parent

        # the predecessor goes next, and leaves us to the supervisor, unless that is gone
        while (now := os.getppid()) == parent:
            await trio.sleep(0.01)
        if now == supervisor:
            die_with_parent(supervisor)
        else:
            log.error("process %d, the supervisor, is gone: stopping", supervisor)
            group.request_stop()

    work = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        # first of all, and to the last: a signal during a long start ends it cleanly, too, and a second one during the
        # end changes nothing
        await nursery.start(stop_on_signal)
        with work:
            if predecessor is not None:
                # what the group file says by now is for the next start
                config = await predecessor.begin()
            else:
                config = await read()
            async with open_group(
                config, run_dir=run_dir, engine=cast(Engine, engine), fresh=how.fresh, predecessor=predecessor
            ) as group:
                try:
                    await until_asked(group)
                finally:
                    left = group.left
        nursery.cancel_scope.cancel()
    # also when told to stop: the supervisor has to tell the one that serves
    if left and how.supervisor is not None:
        raise SystemExit(HANDED_OVER)


def ready_line(group: Any) -> dict[str, Any]:
    """What `serve` prints when it is ready."""
    members = []
    for member in group.query_members():
        entry = {"id": member["id"], "type": member["type"], "vhost_user": member["vhost_user"]}
        if member["functions"]:
            entry["vfio_user"] = {function["function"]: function["socket"] for function in member["functions"]}
        members.append(entry)
    line: dict[str, Any] = {
        "event": "ready",
        "name": group.name,
        "run_dir": str(group.run_dir),
        "qmp": str(group.qmp_path),
        "members": members,
    }
    function = group.query_owner()["function"]
    if function is not None:
        line["owner"] = {"vfio_user": function["socket"]}
    if group.config.vhost_user_devices:
        devices = group.query_vhost_user_devices()
        line["vhost_user_devices"] = [{"name": device["name"], **device["sockets"]} for device in devices]
    return line


@main.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--python", help="The Python interpreter that has the new version [default: the one running this].")
@click.option(
    "--force",
    is_flag=True,
    help="Drop who can't be handed over: clients of PCI functions, and VMs on both sides of virtio-vhost-user devices.",
)
@json_option
def upgrade(run_dir: Path, python: str | None, force: bool, as_json: bool) -> None:
    """Replace the process that serves the group of RUN_DIR by a new one, while guests go on.

    Front ends on vhost-user sockets are handed over; they need no way to reconnect. The new process is started with the
    group file and the environment of the old one, and this command's version of the program.
    """

    async def ask(connected: GroupClient) -> Any:
        values = {"python": python or sys.executable, "force": force}
        return await connected.execute("upgrade", values)

    answer = ask_group(None, run_dir, ask)
    if as_json:
        print_json(answer)
        return
    pause = answer["longest-pause"] * 1000
    text = f"process {answer['pid']} serves {answer['members']} members; {answer['moved']} front ends were handed over"
    click.echo(f"{text}, the longest pause was {pause:.1f} ms" if answer["moved"] else text)
    if answer["reconnecting"]:
        which = ", ".join(str(member) for member in answer["reconnecting"])
        click.echo(f"disconnected, and free to connect again: the front ends of members {which}", err=True)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def validate(file: Path, as_json: bool) -> None:
    """Check the group FILE and name everything that is wrong with it."""
    from .config import check

    result = check(file)
    if as_json:
        print_json(
            {
                "file": str(file),
                "valid": result.config is not None,
                "problems": [problem.as_dict() for problem in result.problems],
                "warnings": [warning.as_dict() for warning in result.warnings],
                "group": None if result.config is None else config_values(result.config),
            }
        )
    else:
        for problem in result.problems:
            click.echo(f"error: {problem}", err=True)
        for warning in result.warnings:
            click.echo(f"warning: {warning}", err=True)
        if result.config is not None:
            config = result.config
            owner = "" if config.owner is None else f"{owner_text(config.owner)}, "
            count = len(config.vhost_user_devices)
            devices = f", {count} virtio-vhost-user device{'s' if count > 1 else ''}" if count else ""
            click.echo(f"{file}: group {config.name}, {owner}{len(config.members)} members{devices}: ok")
    if result.config is None:
        raise click.exceptions.Exit(1)


def config_values(config: GroupConfig) -> dict[str, Any]:
    """A group's configuration as JSON has it."""
    values = asdict(config)
    for entry, device in zip(values["vhost_user_devices"], config.vhost_user_devices, strict=True):
        entry["uuid"] = device.uuid_text
    return values


def owner_text(owner: OwnerConfig) -> str:
    """What `validate` says of the owner."""
    queues = f"{owner.admin_queues} admin queue{'s' if owner.admin_queues > 1 else ''}"
    return f"owner {owner.type} {owner.image} with {queues}{' over vfio-user' if owner.vfio_user else ''}"


# --- list, show, watch --------------------------------------------------------------------------------------


@main.command(name="list")
@group_options
@json_option
def list_members(group_name: str | None, run_dir: Path | None, as_json: bool) -> None:
    """List the members of a running group."""

    async def ask(client: GroupClient) -> dict[str, Any]:
        return {"group": await client.query_group(), "members": await client.query_members()}

    answer = ask_group(group_name, run_dir, ask)
    if as_json:
        print_json(answer)
    else:
        group = answer["group"]
        title = f"{group['name']}: {group['members']} members, {group['attached']} attached, pid {group['pid']}"
        stdout_console().print(members_table(answer["members"], title))


def members_table(members: list[dict[str, Any]], title: str | None = None) -> Table:
    """What `list` and `watch` show."""
    table = new_table(
        "id>",
        "type",
        "state",
        "driver",
        "front",
        "queues>",
        "requests>",
        "errors>",
        "size>",
        "image",
        "functions",
        "socket",
        title=title,
    )
    for member in members:
        image = member["image"]
        table.add_row(
            str(member["id"]),
            member["type"],
            state_text(member),
            member["driver-mode"] or "-",
            member["front"] or "-",
            f"{member['running-queues']}/{member['queues']}",
            str(member["served"]),
            str(member["errors"]),
            size_text(image["size"]),
            image["spec"] + (" (read-only)" if image["read-only"] else ""),
            " ".join(function["function"] for function in member["functions"]) or "-",
            member["vhost-user"],
        )
    return table


def state_text(member: dict[str, Any]) -> str:
    broken = member["broken"]
    if broken is not None:
        return f"broken: {broken['rule']}"
    return f"{member['state']}, stopped" if member["stopped"] else str(member["state"])


@main.command()
@device_argument
@group_options
@click.option("--qemu-qmp", metavar="SOCKET", help="QEMU's own QMP socket: shows its side of the queues, too.")
@click.option("--qom-path", metavar="PATH", help="The device within QEMU, if it can't be found by its socket.")
@json_option
def show(
    member: int,
    group_name: str | None,
    run_dir: Path | None,
    qemu_qmp: str | None,
    qom_path: str | None,
    as_json: bool,
) -> None:
    """Show everything about one MEMBER of a running group, or about its owner."""
    if member == OWNER:
        if qemu_qmp is not None or qom_path is not None:
            raise click.UsageError("--qemu-qmp and --qom-path are for members")
        _show_owner(ask_group(group_name, run_dir, lambda client: client.query_owner()), as_json)
        return
    if qemu_qmp is not None:
        # it is the group that connects, and it may have been started elsewhere
        qemu_qmp = str(Path(qemu_qmp).absolute())
    answer = ask_group(
        group_name,
        run_dir,
        lambda client: client.query_member(member, qemu_qmp=qemu_qmp, qom_path=qom_path),
    )
    if as_json:
        print_json(answer)
        return
    console = stdout_console()
    facts = new_table("member", str(answer["id"]))
    for name, value in member_facts(answer):
        facts.add_row(name, value)
    console.print(facts)
    console.print(queues_table(answer["queues"]))
    if answer["functions"]:
        console.print(functions_table(answer["functions"]))
    if "qemu" in answer:
        console.print(qemu_table(answer))


def _show_owner(owner: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(owner)
        return
    console = stdout_console()
    facts = new_table("owner", "")
    for name, value in owner_facts(owner):
        facts.add_row(name, value)
    console.print(facts)
    queues = new_table("admin queue>", "submitted>", "completed>")
    for queue in owner["queues"]:
        queues.add_row(*(str(queue[key]) for key in ("index", "submitted", "completed")))
    console.print(queues)
    if owner["device"] is not None:
        device = new_table("its own device", owner["device"]["type"])
        for name, value in device_facts(owner["device"]):
            device.add_row(name, value)
        console.print(device)
        console.print(queues_table(owner["device"]["queues"]))
    if owner["function"] is not None:
        console.print(functions_table([owner["function"]]))


def owner_facts(owner: dict[str, Any]) -> list[tuple[str, str]]:
    """The single values of the group that `show owner` prints."""
    from .admin import opcode_name

    def names(opcodes: list[int]) -> str:
        return " ".join(opcode_name(opcode) for opcode in opcodes) or "-"

    enabled = [key for key in ("strict", "feature-management", "notify-region") if owner[key]]
    enabled += [key for key, on in owner["compat"].items() if on]
    objects = [f"{item['operation']} {item['id']} (member {item['member']})" for item in owner["objects"]]
    function = owner["function"]
    theirs = (
        []
        if function is None
        else [
            ("its client's self group", names(function["used-lists"]["self"])),
            ("its client's SR-IOV group", names(function["used-lists"]["sr-iov"])),
        ]
    )
    return [
        ("VF Enable", "yes" if owner["vf-enable"] else "no"),
        ("NumVFs", f"{owner['num-vfs']} of {owner['total-vfs']}"),
        ("switches", " ".join(enabled) or "-"),
        ("front end", "-" if owner["peer-pid"] is None else f"pid {owner['peer-pid']}"),
        ("our self group", names(owner["used-lists"]["self"])),
        ("our SR-IOV group", names(owner["used-lists"]["sr-iov"])),
        *theirs,
        ("capabilities", pairs_text(owner["capabilities"])),
        ("objects", ", ".join(objects) or "-"),
        ("commands", pairs_text(owner["commands"]) or "-"),
        ("failed", str(owner["failed"])),
    ]


def functions_table(functions: list[dict[str, Any]]) -> Table:
    """PCI functions over vfio-user, a row each."""
    table = new_table("function", "client", "connections>", "refused>", "messages>", "reads>", "writes>", "socket")
    for function in functions:
        client = f"pid {function['peer-pid']}" if function["peer-pid"] is not None else "connected"
        table.add_row(
            function["function"],
            client if function["connected"] else "-",
            *(str(function[key]) for key in ("connections", "refused", "messages", "reads", "writes")),
            function["socket"],
        )
    return table


def member_facts(member: dict[str, Any]) -> list[tuple[str, str]]:
    """The single values that `show` prints of a member."""
    peer = "-" if member["peer-pid"] is None else f"pid {member['peer-pid']}"
    return [("socket", member["vhost-user"]), ("front end", peer), *device_facts(member)]


def device_facts(member: dict[str, Any]) -> list[tuple[str, str]]:
    """The single values that members and the owner's own device have in common."""
    image = member["image"]
    facts = [
        ("type", member["type"] + (", transitional-capable" if member["legacy"] else ", modern only")),
        ("state", state_text(member)),
        ("driven through", member["front"] or "-"),
        ("connections", str(member["connections"])),
        ("driver", member["driver-mode"] or "-"),
        ("status", bits_text(member["status"])),
        ("device features", bits_text(member["device-features"])),
        ("driver features", bits_text(member["driver-features"])),
        ("assigned features", "-" if member["assigned-features"] is None else f"0x{member['assigned-features']:x}"),
        ("protocol features", bits_text(member["protocol-features"])),
        ("interrupts", _interrupts_text(member)),
        ("admin commands", pairs_text(member["admin-commands"]) or "-"),
        (
            "image",
            f"{image['spec']}, {size_text(image['size'])}" + (", read-only" if image["read-only"] else ""),
        ),
        ("config", pairs_text(member["config"])),
        ("requests", pairs_text(member["requests"])),
        ("memory regions", str(len(member["memory"]))),
    ]
    for key in ("broken", "last-error"):
        if member[key] is not None:
            problem = member[key]
            queue = "" if problem["queue"] is None else f" (queue {problem['queue']})"
            facts.append((key.replace("-", " "), f"{problem['rule']}: {problem['reason']}{queue}"))
    return facts


def _interrupts_text(member: dict[str, Any]) -> str:
    msix = member["msix"]
    how = f"MSI-X, {msix['vectors']} vectors" if msix["enabled"] else "not MSI-X"
    return f"{how}, ISR 0x{member['isr']:x}"


def bits_text(bits: dict[str, Any]) -> str:
    return f"0x{bits['value']:x} {' '.join(bits['names'])}".rstrip()


def pairs_text(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def queues_table(queues: list[dict[str, Any]]) -> Table:
    table = new_table(
        "queue>", "state", "layout", "size>", "avail>", "used>", "next>", "in flight>", "kicks>", "calls>",
        "requests>", "errors>", "options",
    )  # fmt: skip
    for queue in queues:
        state = "running" if queue["running"] else "started" if queue["started"] else "stopped"
        options = [name for name in ("event-idx", "indirect") if queue[name]]
        table.add_row(
            str(queue["index"]),
            state,
            queue["layout"] or "-",
            str(queue["size"]),
            index_text(queue["avail-idx"]),
            index_text(queue["used-idx"]),
            str(queue["last-avail-idx"]),
            *(str(queue[key]) for key in ("in-flight", "kicks", "calls", "requests", "errors")),
            " ".join(options) or "-",
        )
    return table


def index_text(value: int | None) -> str:
    return "-" if value is None else str(value)


def qemu_table(member: dict[str, Any]) -> Table:
    """Both sides of each queue: ours, and what QEMU reads in the same guest memory."""
    qemu = member["qemu"]
    title = f"QEMU {qemu['version']} {qemu['qom-path']}"
    table = new_table("queue>", "size>", "its size>", "avail>", "its avail>", "used>", "its used>", "note", title=title)
    for ours, theirs in zip(member["queues"], qemu["queues"], strict=False):
        table.add_row(
            str(ours["index"]),
            str(ours["size"]),
            index_text(theirs["num"]),
            index_text(ours["avail-idx"]),
            index_text(theirs["avail-idx"]),
            index_text(ours["used-idx"]),
            index_text(theirs["used-idx"]),
            theirs["problem"] or "",
        )
    return table


@main.command()
@click.argument("name", required=False)
@group_options
@json_option
def devices(name: str | None, group_name: str | None, run_dir: Path | None, as_json: bool) -> None:
    """List the virtio-vhost-user devices of a running group, or show everything about the one of this NAME."""
    answer = ask_group(group_name, run_dir, lambda client: client.query_vhost_user_devices())
    if name is not None:
        answer = [find_device(answer, name)]
    if as_json:
        print_json(answer if name is None else answer[0])
        return
    console = stdout_console()
    if name is None:
        console.print(devices_table(answer))
        return
    (device,) = answer
    facts = new_table("device", device["name"])
    for key, value in vvu_facts(device):
        facts.add_row(key, value)
    console.print(facts)
    console.print(bells_table(device))
    if device["memory"]:
        console.print(memory_table(device["memory"]))


def find_device(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The virtio-vhost-user device of this name. Raises GroupError, which says what there is."""
    for device in found:
        if device["name"] == name:
            return device
    names = ", ".join(device["name"] for device in found)
    raise GroupError(
        f"there is no virtio-vhost-user device {name!r}; {f'there is: {names}' if names else 'there is none'}"
    )


def devices_table(found: list[dict[str, Any]]) -> Table:
    """Virtio-vhost-user devices, a row each."""
    table = new_table(
        "device",
        "state",
        "carrier",
        "backend",
        "master",
        "queues>",
        "regions>",
        "from master>",
        "from slave>",
        "socket",
    )
    for device in found:
        messages = device["messages"]
        table.add_row(
            device["name"],
            vvu_state(device),
            device["carrier"] or "-",
            _pid_text(device["peer-pid"]),
            _pid_text(device["master-pid"]),
            str(device["max-queues"]),
            str(len(device["memory"])),
            str(messages["from-master"]),
            str(messages["from-slave"]),
            device["sockets"]["front"],
        )
    return table


def vvu_state(device: dict[str, Any]) -> str:
    return str(device["state"]) if device["broken"] is None else f"broken: {device['broken']['rule']}"


def _pid_text(pid: int | None) -> str:
    return "-" if pid is None else f"pid {pid}"


def vvu_facts(device: dict[str, Any]) -> list[tuple[str, str]]:
    """The single values that `devices NAME` prints."""
    last = device["last-message"]
    if last is not None:
        what = last["name"] or f"request {last['request']}"
        reply = "reply to " if last["reply"] else ""
        last = f"{reply}{what} of the {last['from']}, {last['size']} bytes"
    ram = device["ram-file"]
    facts = [
        ("state", vvu_state(device)),
        ("status", bits_text(device["status"])),
        ("carrier", device["carrier"] or "-"),
        ("backend VM", _pid_text(device["peer-pid"])),
        ("master", _pid_text(device["master-pid"])),
        *((f"{kind} socket", path or "-") for kind, path in device["sockets"].items()),
        ("uuid", device["uuid"] or "-"),
        ("queues", str(device["max-queues"])),
        ("shared memory", size_text(device["shared-memory"])),
        ("RAM file", "-" if ram is None else f"{ram}, {size_text(device['ram-size'])}"),
        ("slave's features", known_bits(device["slave"]["features"])),
        ("master's features", known_bits(device["master"]["features"])),
        ("slave's protocol features", known_bits(device["slave"]["protocol-features"])),
        ("of these passed on", known_bits(device["passed-on"])),
        ("master's protocol features", known_bits(device["master"]["protocol-features"])),
        ("requests of the slave", "possible" if device["slave-channel"] else "discarded"),
        ("messages", pairs_text(device["messages"])),
        ("waiting for the slave", str(device["waiting"])),
        ("last message", last or "-"),
        ("resets", str(device["resets"])),
    ]
    for key in ("broken", "last-error"):
        if device[key] is not None:
            facts.append((key.replace("-", " "), f"{device[key]['rule']}: {device[key]['reason']}"))
    return facts


def known_bits(bits: dict[str, Any] | None) -> str:
    return "-" if bits is None else bits_text(bits)


BELL_KEYS: Final = (
    "index",
    "call-doorbell",
    "kicks",
    "kicks-ignored",
    "calls",
    "calls-ignored",
    "err-doorbell",
    "errs",
    "errs-ignored",
)


def bells_table(device: dict[str, Any]) -> Table:
    """Notifications between the two virtual machines; "ignored" are those that nobody was there for."""
    table = new_table("queue>", "index>", "kicks>", "ignored>", "calls>", "ignored>", "index>", "errs>", "ignored>")
    for queue in device["queues"]:
        table.add_row(*(str(queue[key]) for key in BELL_KEYS))
    log_bell = device["log"]
    table.add_row("log", str(log_bell["doorbell"]), "", "", str(log_bell["rings"]), str(log_bell["rings-ignored"]))
    return table


def memory_table(regions: list[dict[str, Any]]) -> Table:
    """What shared memory shows."""
    table = new_table("memory", "offset>", "size>", "guest address>", "in its file>")
    for region in regions:
        guest = "-" if region["log"] else f"0x{region['guest-address']:x}"
        numbers = (f"0x{region['offset']:x}", f"0x{region['size']:x}", guest, f"0x{region['mmap-offset']:x}")
        table.add_row("log" if region["log"] else "region", *numbers)
    return table


@main.command()
@group_options
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds.")
@json_option
def watch(group_name: str | None, run_dir: Path | None, interval: float, as_json: bool) -> None:
    """Watch a running group: its members as a live table, and what happens to them.

    With --json, or when stdout is no terminal, each event is one line. Ends with the group, or with Ctrl-C.
    """

    async def follow(client: GroupClient) -> None:
        if as_json or not sys.stdout.isatty():
            await _watch_lines(client, as_json)
        else:
            await _watch_table(client, interval)

    try:
        ask_group(group_name, run_dir, follow)
    except KeyboardInterrupt:
        # the usual way to end it, so no failure
        return


async def _watch_lines(client: GroupClient, as_json: bool) -> None:
    async with client.events() as feed:
        async for event in feed:
            click.echo(json.dumps(event) if as_json else event_text(event))


async def _watch_table(client: GroupClient, interval: float) -> None:
    from collections import deque

    import trio
    from rich.console import Group as Stack
    from rich.live import Live
    from rich.text import Text

    recent: deque[str] = deque(maxlen=KEPT_EVENTS)
    changed = trio.Event()
    ended = False

    async def collect() -> None:
        nonlocal changed, ended
        async for event in feed:
            recent.append(event_text(event))
            changed.set()
        ended = True
        changed.set()

    group = await client.query_group()
    with Live(console=stdout_console(), auto_refresh=False, screen=False) as live:
        async with client.events() as feed, trio.open_nursery() as nursery:
            nursery.start_soon(collect)
            while not ended:
                members = await client.query_members()
                title = f"{group['name']}: {len(members)} members"
                live.update(Stack(members_table(members, title), Text("\n".join(recent))), refresh=True)
                with trio.move_on_after(interval):
                    await changed.wait()
                changed = trio.Event()
            nursery.cancel_scope.cancel()


def event_text(event: dict[str, Any]) -> str:
    """One event on one line."""
    import time

    stamp = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
    clock = time.strftime("%H:%M:%S", time.localtime(stamp)) + f".{event['timestamp']['microseconds'] // 1000:03}"
    data = dict(event.get("data", {}))
    if event["event"] == "REGISTER_ACCESS":
        # `trace --follow` shows them one by one
        data["entries"] = len(data["entries"])
    member, device = data.pop("id", None), data.pop("name", None)
    who = f"member {member}: " if member is not None else f"device {device}: " if device is not None else ""
    return f"{clock} {who}{event['event']} {pairs_text(data)}".rstrip()


# --- administration commands and the register trace ------------------------------------------------------------


@dataclass(slots=True)
class AdminTarget:
    """What `admin` itself was told; each of its commands understands the same options."""

    member: int
    group_name: str | None
    run_dir: Path | None
    as_json: bool


@main.group(subcommand_metavar="COMMAND [ARGS]...")
@click.argument("member", type=DeviceId(), metavar="MEMBER|owner")
@group_options
@json_option
@click.pass_context
def admin(ctx: click.Context, member: int, group_name: str | None, run_dir: Path | None, as_json: bool) -> None:
    """Send administration commands for MEMBER through the owner's administration virtqueue.

    Numbers may be decimal or begin with 0x; data are bytes in hexadecimal digits, as they lie in memory (so a 16-bit 1
    is 0100). MEMBER may be "owner" for `raw`.
    """
    ctx.obj = AdminTarget(member, group_name, run_dir, as_json)


def admin_command(name: str, *parameters: Callable[[F], F]) -> Callable[[Callable[..., None]], click.Command]:
    """One command of `admin`: a function that gets a connection to the group, the target, and its parameters."""

    def decorate(function: Callable[..., None]) -> click.Command:
        def invoke(group_name: str | None, run_dir: Path | None, as_json: bool, **values: Any) -> None:
            target: AdminTarget = click.get_current_context().obj
            target.group_name = group_name or target.group_name
            target.run_dir = run_dir or target.run_dir
            target.as_json = as_json or target.as_json
            if target.member == OWNER and name != "raw":
                raise click.UsageError(f"`{name}` is for members; the owner takes `raw`")
            function(target, **values)

        invoke.__doc__ = function.__doc__
        command: Callable[..., None] = json_option(group_options(invoke))
        for parameter in reversed(parameters):
            command = parameter(command)
        return admin.command(name)(command)

    return decorate


def ask_target(target: AdminTarget, function: Callable[[GroupClient], Awaitable[T]]) -> T:
    """`ask_group` for the group that `admin` is meant for."""
    return ask_group(target.group_name, target.run_dir, function)


def done(target: AdminTarget, text: str, **values: object) -> None:
    """What a command of `admin` prints when there is nothing to tell but that it has been done."""
    if target.as_json:
        print_json({"member": target.member, **values})
    else:
        click.echo(f"member {target.member}: {text}")


space_argument = click.argument("space", type=click.Choice(("common", "device")))
offset_argument = click.argument("offset", type=Number())
Space = Literal["common", "device"]


@admin_command("status")
def admin_status(target: AdminTarget) -> None:
    """Read the device status register."""

    async def ask(client: GroupClient) -> int:
        return (await client.legacy_read(target.member, 18, 1))[0]

    status = ask_target(target, ask)
    names = [name for bit, name in STATUS_BITS.items() if status & bit]
    if target.as_json:
        print_json({"member": target.member, "status": {"value": status, "names": names}})
    else:
        click.echo(f"0x{status:02x} {' '.join(names)}".rstrip())


STATUS_BITS: Final = {
    1: "ACKNOWLEDGE",
    2: "DRIVER",
    4: "DRIVER_OK",
    8: "FEATURES_OK",
    64: "DEVICE_NEEDS_RESET",
    128: "FAILED",
}


@admin_command("features")
def admin_features(target: AdminTarget) -> None:
    """Read the feature words of the legacy interface: what the device offers, what the driver has accepted."""

    async def ask(client: GroupClient) -> tuple[int, int, dict[str, Any]]:
        device = int.from_bytes(await client.legacy_read(target.member, 0, 4), "little")
        driver = int.from_bytes(await client.legacy_read(target.member, 4, 4), "little")
        return device, driver, await client.query_member(target.member)

    device, driver, member = ask_target(target, ask)
    known = {**bit_names(member["driver-features"]), **bit_names(member["device-features"])}
    words = {
        key: {"value": value, "names": [known.get(bit, f"BIT_{bit}") for bit in range(32) if value >> bit & 1]}
        for key, value in (("device", device), ("driver", driver))
    }
    if target.as_json:
        print_json({"member": target.member, **words})
    else:
        for key, word in words.items():
            click.echo(f"{key} {bits_text(word)}")


def bit_names(bits: dict[str, Any]) -> dict[int, str]:
    """Names by bit number; the group gives them in the order of the bits."""
    set_bits = (bit for bit in range(64) if bits["value"] >> bit & 1)
    return dict(zip(set_bits, bits["names"], strict=True))


@admin_command("config")
def admin_config(target: AdminTarget) -> None:
    """Read the device configuration byte by byte, as legacy drivers do, up to its end."""

    async def ask(client: GroupClient) -> bytes:
        data = bytearray()
        try:
            while len(data) < 256:
                data += await client.legacy_read(target.member, len(data), 1, space="device")
        except ClientError as error:
            # beyond the end; at its beginning it is something else
            if not data or "INVALID_FIELD" not in str(error):
                raise
        return bytes(data)

    data = ask_target(target, ask)
    if target.as_json:
        print_json({"member": target.member, "config": data.hex()})
    else:
        for start in range(0, len(data), 16):
            click.echo(f"{start:3d}  {data[start : start + 16].hex(' ')}")


@admin_command("read", space_argument, offset_argument, click.argument("length", type=Number()))
def admin_read(target: AdminTarget, space: Space, offset: int, length: int) -> None:
    """Read LENGTH bytes at OFFSET of the common or the device configuration: one register, or a part of one."""
    data = ask_target(target, lambda client: client.legacy_read(target.member, offset, length, space=space))
    if target.as_json:
        print_json({"member": target.member, "data": data.hex(), "value": int.from_bytes(data, "little")})
    else:
        click.echo(f"{data.hex()}  (0x{int.from_bytes(data, 'little'):x})")


@admin_command("write", space_argument, offset_argument, click.argument("data", type=HexBytes()))
def admin_write(target: AdminTarget, space: Space, offset: int, data: bytes) -> None:
    """Write DATA at OFFSET of the common or the device configuration: one register, or a part of one."""
    ask_target(target, lambda client: client.legacy_write(target.member, offset, data, space=space))
    done(target, f"{len(data)} bytes written", written=len(data))


@admin_command("stop")
def admin_stop(target: AdminTarget) -> None:
    """Stop the member: requests under way are finished, then nothing moves."""
    ask_target(target, lambda client: client.member_stop(target.member))
    done(target, "stopped", stopped=True)


@admin_command("resume")
def admin_resume(target: AdminTarget) -> None:
    """Let a stopped member go on."""
    ask_target(target, lambda client: client.member_resume(target.member))
    done(target, "resumed", stopped=False)


@admin_command("parts-get", click.argument("file", type=click.Path(path_type=Path), required=False))
def admin_parts_get(target: AdminTarget, file: Path | None) -> None:
    """Save the member's device parts to FILE, or show them."""
    data, parts = ask_target(target, lambda client: client.parts_get(target.member))
    if file is not None:
        file.write_bytes(data)
    if target.as_json:
        print_json({"member": target.member, "file": file, "size": len(data), "parts": parts})
    elif file is not None:
        click.echo(f"member {target.member}: {len(parts)} device parts, {len(data)} bytes in {file}")
    else:
        stdout_console().print(parts_table(parts))


def parts_table(parts: list[dict[str, Any]]) -> Table:
    """Device parts, a row each."""
    table = new_table("part", "index>", "value")
    for part in parts:
        value = part["value"]
        match value:
            case dict():
                text = " ".join(f"{key}={f'0x{item:x}' if key in ADDRESSES else item}" for key, item in value.items())
            case None:
                text = part["data"]
            case _:
                text = f"0x{value:x}"
        table.add_row(part["name"], index_text(part["index"]), text)
    return table


ADDRESSES: Final = ("desc", "driver", "device")


@admin_command("parts-set", click.argument("file", type=click.Path(path_type=Path)))
def admin_parts_set(target: AdminTarget, file: Path) -> None:
    """Set the device parts saved in FILE on the member, which has to be stopped; `resume` makes them take effect."""
    data = file.read_bytes()
    ask_target(target, lambda client: client.parts_set(target.member, data))
    done(target, f"{len(data)} bytes of device parts set", size=len(data))


@admin_command("assign-features", click.argument("features", type=Number()))
def admin_assign_features(target: AdminTarget, features: int) -> None:
    """Choose the FEATURES (a 64-bit mask) that the member offers to its driver."""
    answer = ask_target(target, lambda client: client.assign_features(target.member, features))
    if target.as_json:
        print_json({"member": target.member, **answer})
    else:
        possible = "" if answer["assignable"] is None else f" of 0x{answer['assignable']:x}"
        click.echo(f"member {target.member}: features 0x{answer['features']:x}{possible}")


@admin_command("notify-info")
def admin_notify_info(target: AdminTarget) -> None:
    """Show where queue notifications of the member may be written."""
    regions = ask_target(target, lambda client: client.notify_info(target.member))
    if target.as_json:
        print_json({"member": target.member, "regions": regions})
        return
    table = new_table("device", "BAR>", "offset>")
    for region in regions:
        table.add_row(region["place"], str(region["bar"]), f"0x{region['offset']:x}")
    stdout_console().print(table)


@admin_command(
    "raw",
    click.argument("opcode", type=OpcodeName()),
    click.argument("data", type=HexBytes(), default=b""),
    click.option("--group-type", type=GroupTypeName(), help="self, sr-iov or a number  [default: by MEMBER]."),
    click.option("--result-size", type=Number(), default="64", show_default=True, help="Room for the result, bytes."),
    click.option("--queue", type=Number(), default="0", show_default=True, help="Administration queue."),
)
def admin_raw(
    target: AdminTarget, opcode: int, data: bytes, group_type: int | None, result_size: int, queue: int
) -> None:
    """Send any command: OPCODE by name or number, DATA as command_specific_data. Exit status 1 unless it succeeds."""
    chosen = (0 if target.member == OWNER else 1) if group_type is None else group_type
    answer = ask_target(
        target,
        lambda client: client.owner_command(
            opcode, group_type=chosen, member=target.member, data=data, result_size=result_size, queue=queue
        ),
    )
    if target.as_json:
        print_json(answer)
    else:
        status, qualifier = answer["status"], answer["qualifier"]
        click.echo(f"{status['name']} ({status['value']}) / {qualifier['name']} ({qualifier['value']})")
        if answer["result"]:
            click.echo(answer["result"])
    if answer["status"]["value"] != 0:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("member", type=TracedId(), metavar="MEMBER|owner|all")
@group_options
@click.option("--follow", is_flag=True, help="Go on with what happens, until the group ends or Ctrl-C.")
@click.option("--limit", type=click.IntRange(0), default=1000, show_default=True, help="At most the last so many.")
@json_option
def trace(member: int, group_name: str | None, run_dir: Path | None, follow: bool, limit: int, as_json: bool) -> None:
    """Show the register accesses of MEMBER, and the administration commands they became.

    A line each: time, where it came from (the I/O BAR or an administration queue), the register, bytes, value, command,
    its status, and how long it took. With --json an object; while following, one for each line.
    """
    who = None if member == ALL else member

    async def ask(client: GroupClient) -> None:
        await _trace(client, who, limit, follow=follow, as_json=as_json)

    try:
        ask_group(group_name, run_dir, ask)
    except KeyboardInterrupt:
        if not follow:
            raise


async def _trace(client: GroupClient, member: int | None, limit: int, *, follow: bool, as_json: bool) -> None:
    from collections import deque

    import trio

    entries: deque[dict[str, Any]] = deque(maxlen=limit)
    since = lost = 0
    while True:
        page = await client.query_trace(member, since=since, limit=TRACE_PAGE)
        entries += page["entries"]
        lost += page["lost"]
        since = page["next"]
        if not page["entries"]:
            break
    if as_json and not follow:
        print_json({"next": since, "lost": lost, "entries": list(entries)})
        return
    if not as_json:
        click.echo(TRACE_HEADER)
    while True:
        for entry in entries:
            click.echo(json.dumps(entry) if as_json else trace_line(entry, with_member=member is None))
        sys.stdout.flush()
        if not follow:
            return
        await trio.sleep(TRACE_INTERVAL)
        try:
            page = await client.query_trace(member, since=since, limit=TRACE_PAGE)
        except ClientError as error:
            # the group's end is the end of what there is to follow; a refusal has a class
            if error.error_class is not None:
                raise
            return
        since, entries = page["next"], deque(page["entries"])
        if page["lost"]:
            click.echo(f"vhu-legacy: {page['lost']} accesses lost, they come too fast", err=True)


TRACE_HEADER: Final = (
    "time            origin  access register               bytes value      command                    status     us"
)


def trace_line(entry: dict[str, Any], *, with_member: bool = False) -> str:
    """One register access."""
    import time

    from .admin import Qualifier, Status

    whole = int(entry["at"])
    clock = time.strftime("%H:%M:%S", time.localtime(whole)) + f".{int((entry['at'] - whole) * 1e6):06}"
    value = "-" if entry["value"] is None else f"0x{entry['value']:0{max(1, entry['width']) * 2}x}"
    status = Status(entry["status"]).name
    if entry["qualifier"]:
        status += f"/{Qualifier(entry['qualifier']).name}"
    access = ("write" if entry["write"] else "read") if entry["register"] else "-"
    line = (
        f"{clock} {entry['origin']:<7} {access:<6} {entry['register'] or '-':<22} {entry['width']:>5} {value:<10} "
        f"{entry['opcode-name']:<26} {status:<8} {entry['microseconds']:>5.1f}"
    )
    return f"{line}  member {entry['member']}" if with_member else line


class MemberSocket(click.ParamType[tuple[int, Path]]):
    """N=SOCKET: a member's number and its modern function's socket."""

    name = "n=socket"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, Path]:
        if isinstance(value, tuple):
            return value
        number, separator, path = str(value).partition("=")
        if not separator or not path:
            self.fail(f"{value!r} is not N=SOCKET", param, ctx)
        return MemberId().convert(number, param, ctx), Path(path)


@main.command()
@click.option("--owner", required=True, type=click.Path(path_type=Path), help="vfio-user socket of the owner.")
@click.option("--member", "members", multiple=True, type=MemberSocket(), help="A member's function (repeatable).")
@click.option("--only", multiple=True, metavar="ID", help="Just these checks: ADM-01, ADM (repeatable).")
@json_option
def conformance(owner: Path, members: tuple[tuple[int, Path], ...], only: tuple[str, ...], as_json: bool) -> None:
    """Check an owner of any make, served over vfio-user, against the specification's rules for administration commands.

    What can be checked of members needs a function of theirs, too: modern, or transitional, which has an I/O BAR to be
    checked as well. Checks only read from disks, but reset everything they are given. Exit status 1 when a MUST is
    broken; a group of ours with Linux's defaults breaks six on purpose, one with strict = true none.
    """
    from .conformance import main_run, render

    async def check() -> Any:
        import trio

        # it drives the device by blocking calls, each with a time limit of its own
        return await trio.to_thread.run_sync(lambda: main_run(owner, dict(members), only), abandon_on_cancel=True)

    report = run_async(check)
    if as_json:
        print_json(report.as_dict())
    else:
        render(report, stdout_console())
    if not report.ok:
        raise click.exceptions.Exit(1)


# --- QEMU and guests ----------------------------------------------------------------------------------------


@main.command(name="qemu-args")
@click.argument("member", type=DeviceId(), metavar="[MEMBER|owner]", required=False)
@group_options
@click.option("--backend", metavar="NAME", help="The backend VM of this virtio-vhost-user device, instead of a MEMBER.")
@click.option("--front", metavar="NAME", help="The front end VM of this virtio-vhost-user device, instead of a MEMBER.")
@click.option(
    "--device", "kind", type=click.Choice(tuple(qemu_args.FRONT_DEVICES)), help="With --front  [default: blk]."
)
@click.option("--queues", type=click.IntRange(1, 126), help="With --front  [default: 1].")
@click.option("--tag", help="With --device fs: what the guest mounts  [default: NAME].")
@click.option("--legacy", "mode", flag_value="legacy", help="Legacy only: what an old guest needs.")
@click.option("--transitional", "mode", flag_value="transitional", default="transitional", help="Both (default).")
@click.option("--modern", "mode", flag_value="modern", help="Modern only.")
@click.option("--via", type=click.Choice(("vhost-user", "vfio-user")), default="vhost-user", show_default=True)
@click.option("--qemu", "version", type=QemuVersion(), help="QEMU's version  [default: the installed one's].")
@click.option("--memory", help="Guest memory  [default: 1G; with --front, the device's RAM file, if it has one].")
@json_option
def qemu_args_command(
    member: int | None,
    group_name: str | None,
    run_dir: Path | None,
    backend: str | None,
    front: str | None,
    kind: str | None,
    queues: int | None,
    tag: str | None,
    mode: qemu_args.Mode,
    via: Via,
    version: str | None,
    memory: str | None,
    as_json: bool,
) -> None:
    """Print a QEMU command line that boots from MEMBER of a running group, for pasting.

    Over vfio-user the guest gets a whole PCI function of the member: the legacy, transitional or modern one. The owner
    has one, too, with its administration virtqueues.

    With --backend or --front it is that of the VM on this side of a virtio-vhost-user device, without anything to boot
    from: --backend is the VM that serves (QEMU 11.1; over vhost-user or vfio-user), --front the one that is served.
    """
    if [member, backend, front].count(None) != 2:
        raise click.UsageError("one of MEMBER, --backend NAME and --front NAME is needed")
    if front is None and (kind, queues, tag) != (None, None, None):
        raise click.UsageError("--device, --queues and --tag are for --front")
    if tag is not None and kind != "fs":
        raise click.UsageError("--tag is for --device fs")
    if front is not None and via == "vfio-user":
        raise click.UsageError("--via is for the other side: a front end VM's device is always a vhost-user one")
    chosen = qemu_args.parse_version(version) if version is not None else installed_version()
    if member is None:
        name = backend or front or ""
        device = find_device(ask_group(group_name, run_dir, lambda client: client.query_vhost_user_devices()), name)
        try:
            if backend is not None:
                argv = _backend_line(device, via, chosen, memory)
            else:
                argv = _front_line(device, kind or "blk", queues or 1, tag or name, mode, chosen, memory)
        except ValueError as error:
            raise GroupError(str(error)) from None
        if as_json:
            side = "front" if backend is None else "backend"
            print_json({"argv": argv, "device": name, "side": side, "via": via, "qemu": "{}.{}".format(*chosen)})
        else:
            click.echo(qemu_args.shell_line(argv))
        return
    memory = memory or DEFAULT_MEMORY
    if member == OWNER:
        owner = ask_group(group_name, run_dir, lambda client: client.query_owner())
        if owner["function"] is None:
            raise GroupError(
                "the owner isn't served over vfio-user; its table in the group file needs vfio_user = true"
            )
        mode, via = "modern", "vfio-user"
        argv = _vfio_line(owner["function"]["socket"], chosen, memory, "owner")
    else:
        info = ask_group(group_name, run_dir, lambda client: client.query_member(member))
        if mode != "modern" and not info["legacy"]:
            raise GroupError(f"member {member} is modern only (legacy = false in the group file); use --modern")
        if via == "vfio-user":
            argv = _vfio_line(_function_socket(info, mode), chosen, memory, f"member-{member}")
        else:
            rings = info["queues"]
            disk = qemu_args.DiskArgs(Path(info["vhost-user"]), len(rings), rings[0]["max-size"], f"member-{member}")
            argv = qemu_args.command_line(disk, mode, chosen, memory=memory)
    if as_json:
        who = "owner" if member == OWNER else member
        print_json({"argv": argv, "member": who, "mode": mode, "via": via, "qemu": "{}.{}".format(*chosen)})
    else:
        click.echo(qemu_args.shell_line(argv))


def _backend_line(device: dict[str, Any], via: Via, version: tuple[int, int], memory: str | None) -> list[str]:
    path = device["sockets"][via]
    if path is None:
        hint = "its table in the group file needs vfio_user = true, or use --via vhost-user"
        raise GroupError(f"device {device['name']} isn't served over vfio-user; {hint}")
    args = qemu_args.BackendArgs(Path(path), device["max-queues"], device["name"])
    return qemu_args.command_line_backend(args, version, via=via, memory=memory or DEFAULT_MEMORY)


def _front_line(
    device: dict[str, Any],
    kind: str,
    queues: int,
    tag: str,
    mode: qemu_args.Mode,
    version: tuple[int, int],
    memory: str | None,
) -> list[str]:
    args = qemu_args.FrontArgs(Path(device["sockets"]["front"]), kind, device["name"], queues, tag)
    needed = qemu_args.vrings_of(args)
    if needed > device["max-queues"]:
        raise GroupError(
            f"a {kind} device with these queues needs {needed} of device {device['name']}, which has "
            f"max_queues = {device['max-queues']}"
        )
    ram = None
    if device["ram-file"] is not None:
        if memory is not None:
            raise GroupError(f"device {device['name']} has a RAM file, which is all of the memory; leave out --memory")
        ram = qemu_args.RamFile(Path(device["ram-file"]), device["ram-size"])
    return qemu_args.command_line_front(args, mode, version, memory=memory or DEFAULT_MEMORY, ram=ram)


def _function_socket(member: dict[str, Any], mode: qemu_args.Mode) -> str:
    sockets: dict[str, str] = {function["function"]: function["socket"] for function in member["functions"]}
    if mode not in sockets:
        hint = "its table in the group file needs vfio_user = true, or use --via vhost-user"
        raise GroupError(f"member {member['id']} isn't served over vfio-user; {hint}")
    return sockets[mode]


def _vfio_line(socket: str, version: tuple[int, int], memory: str, name: str) -> list[str]:
    try:
        return qemu_args.command_line_vfio(Path(socket), version, memory=memory, name=name)
    except ValueError as error:
        raise GroupError(str(error)) from None


def installed_version() -> tuple[int, int]:
    """The version of the QEMU that the command line is going to start; the newest known one when there is
    none.
    """
    import subprocess

    try:
        done = subprocess.run([qemu_args.BINARY, "--version"], capture_output=True, text=True, timeout=20, check=True)
        return qemu_args.version_of_output(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return qemu_args.DEFAULT_VERSION


@main.command()
@group_options
@click.argument("args", nargs=-1)
@json_option
def shell(group_name: str | None, run_dir: Path | None, args: tuple[str, ...], as_json: bool) -> None:
    """Open the stock qmp-shell on a running group's QMP socket. ARGS are passed on to it.

    With --json, nothing is started: the command that would be is printed.
    """
    from . import client
    from .rundir import QMP_SOCKET

    path = client.find_group(group_name, run_dir) / QMP_SOCKET
    import shutil

    beside = Path(sys.executable).with_name("qmp-shell")
    program = str(beside) if beside.exists() else shutil.which("qmp-shell")
    if program is None:
        raise ClientError("qmp-shell is not installed; it comes with the Python package qemu.qmp")
    argv = [program, *args, str(path)]
    if as_json:
        print_json({"argv": argv})
        return
    sys.stdout.flush()
    os.execv(program, argv)


@main.command()
@member_argument
@group_options
@click.option("--kernel", default="6.12", show_default=True, help="Guest kernel series; see `images --list`.")
@click.option("--mode", type=click.Choice(qemu_args.MODES), default="legacy", show_default=True)
@click.option("--via", type=click.Choice(("vhost-user", "vfio-user")), default="vhost-user", show_default=True)
@click.option("--qemu", "version", help="QEMU series  [default: the installed one].")
@click.option("--task", default="verify", show_default=True, help="What the guest does: verify, reboot, rw-loop.")
@click.option("--timeout", type=click.FloatRange(1, 3600), default=60.0, show_default=True, help="Seconds a step.")
@json_option
def boot(
    member: int,
    group_name: str | None,
    run_dir: Path | None,
    kernel: str,
    mode: qemu_args.Mode,
    via: Via,
    version: str | None,
    task: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Boot a stock guest on MEMBER of a running group, have it use its disk, and compare checksums.

    The guest writes to the disk: its content is not kept.
    """
    info = ask_group(group_name, run_dir, lambda client: client.query_member(member))
    if mode != "modern" and not info["legacy"]:
        raise GroupError(f"member {member} is modern only (legacy = false in the group file); use --mode modern")
    if info["state"] not in ("detached", "broken"):
        raise GroupError(f"member {member} is {info['state']}; a guest needs it for itself")
    socket = Path(info["vhost-user"] if via == "vhost-user" else _function_socket(info, mode))
    result, problems = run_async(_boot, info, socket, kernel, mode, via, version, task, timeout, as_json)
    if as_json:
        print_json({"result": result, "problems": problems})
    else:
        table = new_table("guest", f"member {member}")
        for name, value in asdict(result).items():
            table.add_row(name.replace("_", " "), str(value))
        stdout_console().print(table)
    if problems:
        raise GuestError("; ".join(problems))


async def _boot(
    info: dict[str, Any],
    socket: Path,
    kernel: str,
    mode: qemu_args.Mode,
    via: Via,
    version: str | None,
    task: str,
    timeout: float,
    as_json: bool,
) -> tuple[Any, list[str]]:
    import trio

    from . import guest, images

    await _ensure_images([kernel], [version] if version is not None else [], quiet=as_json, images=images)
    result = await guest.boot(
        socket,
        kernel=kernel,
        mode=mode,
        via=via,
        qemu=version,
        task=task,
        queues=len(info["queues"]),
        timeout=timeout,
        on_message=None if as_json else lambda message: click.echo(f"guest: {json.dumps(message)}", err=True),
    )
    if info["image"]["kind"] != "file":
        return result, []
    image = Path(info["image"]["spec"])
    return result, await trio.to_thread.run_sync(lambda: list(guest.check_image(image, result)))


async def _ensure_images(kernels: list[str], qemus: list[str], *, quiet: bool, images: Any) -> None:
    from rich.progress import Progress

    if quiet:
        await images.ensure(kernels, qemus, None)
        return
    console = stderr_console()
    # off a terminal there is nothing to redraw, and its end would print an empty line
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        await images.ensure(kernels, qemus, progress)


@main.command()
@click.option("--list", "only_list", is_flag=True, help="Say what is there, fetch nothing.")
@click.option("--kernel", "kernels", multiple=True, help="A guest kernel series (may be repeated).")
@click.option("--qemu", "qemus", multiple=True, help="A QEMU series (may be repeated).")
@json_option
def images(only_list: bool, kernels: tuple[str, ...], qemus: tuple[str, ...], as_json: bool) -> None:
    """Fetch and build guest kernels and QEMU versions into the cache: those named, or all."""
    from . import images as module

    if not only_list:
        everything = not kernels and not qemus
        wanted_kernels = list(module.KERNELS if everything else kernels)
        wanted_qemus = list(module.QEMUS if everything else qemus)

        async def fetch() -> None:
            await _ensure_images(wanted_kernels, wanted_qemus, quiet=as_json, images=module)

        run_async(fetch)
    rows = module.status()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = new_table("kind", "series", "state", "version", "size>", "path")
    for row in rows:
        size = "-" if row.size is None else size_text(row.size)
        table.add_row(row.kind, row.name, row.state, row.version or "-", size, str(row.path or "-"))
    stdout_console().print(table)


@main.command()
@click.option("--kernel", "kernels", multiple=True, help="A guest kernel series (may be repeated; default all).")
@click.option("--mode", "modes", multiple=True, type=click.Choice(qemu_args.MODES), help="Driver mode (default all).")
@click.option("--qemu", "qemus", multiple=True, help="A QEMU series (may be repeated; default all).")
@click.option(
    "--via",
    "vias",
    multiple=True,
    type=click.Choice(("vhost-user", "vfio-user")),
    help="How a guest gets at its member (may be repeated; default both).",
)
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Guests at a time.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write a JUnit XML report here.")
@json_option
def matrix(
    kernels: tuple[str, ...],
    modes: tuple[qemu_args.Mode, ...],
    qemus: tuple[str, ...],
    vias: tuple[Via, ...],
    jobs: int,
    junit: Path | None,
    as_json: bool,
) -> None:
    """Boot every kernel in every driver mode on every QEMU, one guest a cell; over vfio-user as PCI functions, and the
    owner's with them.
    """
    from . import images as module
    from . import matrix as matrix_module

    async def run() -> Any:
        return await matrix_module.run_matrix(
            kernels or module.KERNELS,
            modes or qemu_args.MODES,
            qemus or module.QEMUS,
            jobs=jobs,
            junit=junit,
            console=stderr_console() if as_json else stdout_console(),
            via=vias or matrix_module.VIAS,
        )

    result = run_async(run)
    if as_json:
        print_json(result.as_json())
    if not result.ok:
        raise click.exceptions.Exit(1)
