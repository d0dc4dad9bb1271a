# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The command line, as a user runs it: real processes, real sockets, real signals."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.test_upgrade import faulty
from vhu_legacy import images
from vhu_legacy.cli import event_text, size_text, vvu_facts, vvu_state

MIB = 1 << 20
VHU = [sys.executable, "-m", "vhu_legacy"]
GROUP = """
    [group]
    name = "demo"

    [[members]]
    count = 2
    type = "blk"
    image = "disk{n}.raw"

    [[members]]
    type = "blk"
    image = "null:1GiB"
    legacy = false
    queues = 2
"""


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a short name, where groups run by default."""
    path = Path(tempfile.mkdtemp(prefix="vhu-"))
    for name in ("disk1.raw", "disk2.raw", "disk3.raw"):
        (path / name).write_bytes(bytes(MIB))
    write(path, GROUP)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path / "xdg"))
    monkeypatch.delenv("VHU_LEGACY_RUN_DIR", raising=False)
    monkeypatch.setenv("HOME", str(path))
    yield path
    shutil.rmtree(path)


def write(work: Path, text: str, name: str = "group.toml") -> Path:
    (work / name).write_text(textwrap.dedent(text))
    return work / name


def run(*args: object, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*VHU, *map(str, args)], capture_output=True, text=True, timeout=60, input=stdin)
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr
    return done


def run_json(*args: object, status: int = 0) -> Any:
    return json.loads(run(*args, "--json", status=status).stdout)


def error_line(*args: object, status: int = 1) -> str:
    """The one line that says why it failed."""
    done = run(*args, status=status)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("vhu-legacy: ")
    return lines[0]


class Served:
    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any]) -> None:
        self.process = process
        self.ready = ready
        self.log = ""

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End it by a signal; what else it has printed on stdout."""
        self.process.send_signal(number)
        out, self.log = self.process.communicate(timeout=20)
        return out

    def socket(self, member_id: int) -> str:
        path = next(member["vhost_user"] for member in self.ready["members"] if member["id"] == member_id)
        assert isinstance(path, str)
        return path


@contextmanager
def serving(file: Path, *args: object) -> Iterator[Served]:
    command = [*VHU, "serve", str(file), *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                pytest.fail(f"serve ended: {process.communicate(timeout=10)}")
            yield Served(process, json.loads(line))
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=20)


def attach(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    sock.sendall(b"\1\0\0\0\1\0\0\0\0\0\0\0")
    assert len(sock.recv(20)) == 20
    return sock


def read_until(fd: int, text: bytes, timeout: float = 40) -> None:
    """Read a terminal until this text has appeared on it."""
    seen = b""
    deadline = time.monotonic() + timeout
    while text not in seen:
        if not select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
            pytest.fail(f"no {text!r} within {timeout} s in {seen!r}")
        seen += os.read(fd, 65536)


# --- serve ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("engine", ["native", "rust-vmm"])
def test_serve_says_when_it_is_ready_and_ends_cleanly(work: Path, number: int, engine: str) -> None:
    with serving(work / "group.toml", "--engine", engine) as served:
        run_dir = work / "xdg" / "vhu-legacy" / "demo"
        members = [
            {"id": n, "type": "blk", "vhost_user": str(run_dir / f"member-{n}.vhost-user.sock")} for n in (1, 2, 3)
        ]
        assert served.ready == {
            "event": "ready",
            "name": "demo",
            "run_dir": str(run_dir),
            "qmp": str(run_dir / "qmp.sock"),
            "members": members,
        }
        with attach(served.socket(1)) as front_end:
            assert served.stop(number) == ""
            assert served.process.returncode == 0
            assert front_end.recv(1) == b""
        assert not run_dir.exists()
        assert f"{signal.Signals(number).name}: stopping" in served.log
        assert "Traceback" not in served.log


def test_serve_ends_by_quit(work: Path) -> None:
    with serving(work / "group.toml", "--run-dir", work / "run") as served:
        assert served.ready["run_dir"] == str(work / "run")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(served.ready["qmp"])
            client.sendall(b'{"execute":"qmp_capabilities"}{"execute":"quit","id":"last"}')
            answers = b""
            while data := client.recv(4096):
                answers += data
        assert json.loads(answers.splitlines()[-1]) == {"return": {}, "id": "last"}
        out, log = served.process.communicate(timeout=20)
        assert (out, served.process.returncode) == ("", 0)
        assert "Traceback" not in log
    assert not (work / "run").exists()


def test_serve_after_a_kill(work: Path) -> None:
    with serving(work / "group.toml") as served:
        served.process.kill()
        served.process.wait()
        assert Path(served.socket(1)).exists()
    with serving(work / "group.toml") as served, attach(served.socket(1)):
        pass


def test_serve_twice_is_refused_with_the_others_pid(work: Path) -> None:
    with serving(work / "group.toml") as served:
        done = run("serve", work / "group.toml", status=1)
        assert f"in use by process {served.process.pid}" in done.stderr
        assert done.stdout == ""
        with attach(served.socket(1)):
            pass


def test_serve_refuses_a_bad_file_with_all_problems(work: Path) -> None:
    file = write(work, '[group]\nname = "a b"\n[[members]]\ntype = "net"\n[[member]]\n')
    done = run("serve", file, status=1)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 3


def test_a_stopped_start_is_a_clean_end(work: Path) -> None:
    file = write(work, '[group]\nname = "big"\n[[members]]\ncount = 3000\ntype = "blk"\nimage = "null:1MiB"\n')
    command = [*VHU, "serve", str(file), "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        run_dir = work / "xdg" / "vhu-legacy" / "big"
        deadline = time.monotonic() + 20
        while not (run_dir / "member-5.vhost-user.sock").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        process.terminate()
        out, log = process.communicate(timeout=20)
        assert process.returncode == 0, log
        assert out == "" or json.loads(out)["event"] == "ready"
        assert not run_dir.exists()


# --- validate ---------------------------------------------------------------------------------------------


def test_validate(work: Path) -> None:
    done = run("validate", work / "group.toml")
    assert done.stdout == f"{work / 'group.toml'}: group demo, 3 members: ok\n"
    answer = run_json("validate", work / "group.toml")
    assert answer["valid"]
    assert answer["problems"] == []
    assert [member["id"] for member in answer["group"]["members"]] == [1, 2, 3]

    file = write(work, OWNER, "owner.toml")
    assert f"group pf, owner blk ram:{MIB} with 2 admin queues, 2 members: ok" in run("validate", file).stdout
    assert run_json("validate", file)["group"]["owner"]["admin_queues"] == 2

    file = write(
        work, '[group]\nname = 3\n[[members]]\ntype = "blk"\nimage = "none.raw"\nqueue_size = 512\n', "bad.toml"
    )
    done = run("validate", file, status=1)
    assert done.stdout == ""
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["error", "error", "warning"]
    answer = run_json("validate", file, status=1)
    assert not answer["valid"]
    assert [(p["table"], p["key"]) for p in answer["problems"]] == [("[group]", "name"), ("[[members]] #1", "image")]
    assert [p["key"] for p in answer["warnings"]] == ["queue_size"]
    assert all(p["file"] == str(file) for p in answer["problems"])


@pytest.mark.parametrize("file", ["none.toml", ".", "/dev/zero", sys.executable])
def test_validate_what_is_no_group_file(work: Path, file: str) -> None:
    done = run("validate", work / file, status=1)
    assert len(done.stderr.splitlines()) == 1


# --- a running group --------------------------------------------------------------------------------------


def test_list_and_show(work: Path) -> None:
    with serving(work / "group.toml") as served, attach(served.socket(2)):
        done = run("list")
        assert done.stderr == ""
        assert "demo: 3 members, 1 attached" in done.stdout
        rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d", line)]
        assert [row[:4] for row in rows] == [
            ["1", "blk", "detached", "-"],
            ["2", "blk", "attached", "-"],
            ["3", "blk", "detached", "-"],
        ]
        assert served.socket(3) in done.stdout
        answer = run_json("list")
        assert answer["group"]["name"] == "demo"
        assert [member["state"] for member in answer["members"]] == ["detached", "attached", "detached"]

        done = run("show", "member-2")
        for text in ("attached", served.socket(2), str(work / "disk2.raw"), f"pid {os.getpid()}", "EVENT_IDX"):
            assert text in done.stdout
        assert run_json("show", 3)["image"]["size"] == 1 << 30
        assert "Member 9 not found" in error_line("show", 9)
        run("show", "first", status=2)
        assert "QEMU at /none" in error_line("show", 1, "--qemu-qmp", "/none")


def test_which_group_is_meant(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write(work, '[group]\nname = "other"\n', "other.toml")
    assert "no group is running in" in error_line("list")
    with serving(work / "group.toml"):
        assert run_json("list", "--group", "demo")["group"]["name"] == "demo"
        assert "no group 'x' is running in" in error_line("list", "--group", "x")
        assert "running: demo" in error_line("list", "--group", "x")
        with serving(other):
            assert "several groups are running: demo, other; choose one with --group" in error_line("list")
            assert run_json("list", "--group", "other")["group"]["members"] == 0
        with serving(other, "--run-dir", work / "run"):
            assert run_json("list")["group"]["name"] == "demo"
            assert run_json("list", "--run-dir", work / "run")["group"]["name"] == "other"
            monkeypatch.setenv("VHU_LEGACY_RUN_DIR", str(work / "run"))
            assert run_json("list")["group"]["name"] == "other"
    assert "no group is running in" in error_line("list", "--run-dir", work / "none")


def test_watch_prints_events_as_lines(work: Path) -> None:
    with (
        serving(work / "group.toml") as served,
        subprocess.Popen(
            [*VHU, "watch", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as machine,
        subprocess.Popen([*VHU, "watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as human,
    ):
        deadline = time.monotonic() + 20
        while (
            json.loads(run("shell", stdin="query-statistics\n").stdout.split("(QEMU) ")[1])["return"]["qmp"]["clients"]
            < 3
        ):
            assert time.monotonic() < deadline
        with attach(served.socket(1)):
            pass
        assert machine.stdout is not None
        event = json.loads(machine.stdout.readline())
        assert (event["event"], event["data"]) == ("MEMBER_CONNECTED", {"id": 1, "peer-pid": os.getpid()})
        assert json.loads(machine.stdout.readline())["event"] == "MEMBER_DISCONNECTED"
        assert human.stdout is not None
        line = human.stdout.readline()
        assert re.fullmatch(rf"\d\d:\d\d:\d\d\.\d{{3}} member 1: MEMBER_CONNECTED peer-pid={os.getpid()}\n", line)
        # one by the user, one by the end of the group
        human.send_signal(signal.SIGINT)
        assert human.wait(20) == 0
        served.stop()
        assert machine.wait(20) == 0
        assert machine.stderr is not None
        assert human.stderr is not None
        assert machine.stderr.read() == human.stderr.read() == ""


def test_watch_on_a_terminal_shows_the_table(work: Path) -> None:
    with serving(work / "group.toml") as served:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
        with subprocess.Popen([*VHU, "watch"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            read_until(ours, b"disk2.raw")
            with attach(served.socket(1)):
                read_until(ours, b"MEMBER_CONNECTED")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        os.close(ours)


def test_shell_is_stock_qmp_shell(work: Path) -> None:
    with serving(work / "group.toml"):
        done = run("shell", "--", "-p", stdin="query-group\nmember-del id=3\nquery-members\nno-such-command\n")
        assert "Welcome to the QMP low-level shell!" in done.stdout
        assert '"name": "demo"' in done.stdout
        assert '"desc": "The command no-such-command has not been found"' in done.stdout
        assert run_json("list")["group"]["members"] == 2
        argv = run_json("shell")["argv"]
        assert (Path(argv[0]).name, Path(argv[-1]).name) == ("qmp-shell", "qmp.sock")


def test_qemu_args(work: Path) -> None:
    with serving(work / "group.toml") as served:
        old = run("qemu-args", 1, "--legacy", "--qemu", "7.2").stdout
        new = run("qemu-args", 1, "--legacy", "--qemu", "11.1").stdout
        assert "disable-modern=on" in old
        assert ",reconnect=1 " in old
        assert ",reconnect-ms=1000 " in new
        assert f"path={served.socket(1)}," in old
        answer = run_json("qemu-args", 3, "--modern", "--qemu", "10.0", "--memory", "2G")
        assert "num-queues=2" in " ".join(answer["argv"])
        assert (answer["qemu"], answer["mode"], answer["member"]) == ("10.0", "modern", 3)
        assert "disable-legacy=off" in run("qemu-args", 1).stdout
        assert "modern only" in error_line("qemu-args", 3, "--legacy")
        assert "modern only" in error_line("qemu-args", 3)
        assert "member 1 isn't served over vfio-user" in error_line("qemu-args", 1, "--via", "vfio-user")
        assert "the owner isn't served over vfio-user" in error_line("qemu-args", "owner")
        assert "too old" in run("qemu-args", 1, "--qemu", "6.0", status=2).stderr


@pytest.mark.qemu
@pytest.mark.parametrize("mode", ["legacy", "transitional", "modern"])
def test_the_printed_line_works_when_pasted(work: Path, mode: str) -> None:
    # a boot sector that says so and idles: what SeaBIOS runs when it could read it from the member. Interrupts stay on,
    # or the last characters would never come out of SeaBIOS's serial console
    text = b"member booted\r\n"
    code = b"\xfb\xfc\x31\xc0\x8e\xd8\xbe\x1a\x7c\xac\x84\xc0\x74\x09\xb4\x0e\xbb\x07\x00\xcd\x10\xeb\xf2\xf4\xeb\xfd"
    assert len(code) == 0x1A
    sector = (code + text + b"\0").ljust(510, b"\0") + b"\x55\xaa"
    (work / "disk1.raw").write_bytes(sector + bytes(MIB - 512))
    with serving(work / "group.toml"):
        line = run("qemu-args", 1, f"--{mode}", "--memory", "256M").stdout
        monitor = work / "q.sock"
        extra = f" -qmp unix:{shlex.quote(str(monitor))},server=on,wait=off"
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            ["/bin/sh", "-c", "exec " + line.rstrip() + extra], stdin=theirs, stdout=theirs, stderr=theirs
        ) as process:
            os.close(theirs)
            try:
                read_until(ours, b"member booted")
                answer = run_json("show", 1, "--qemu-qmp", monitor)
                assert answer["driver-mode"] == ("modern" if mode == "modern" else answer["driver-mode"])
                assert answer["driver-mode"] == ("legacy" if mode == "legacy" else answer["driver-mode"])
                assert answer["state"] == "running"
                assert answer["requests"]["in"] >= 1
                assert answer["qemu"]["queues"][0]["used-idx"] == answer["queues"][0]["used-idx"] >= 1
                assert "/machine/peripheral/member-1" in run("show", 1, "--qemu-qmp", monitor).stdout
                assert "attached" in error_line("boot", 1) or "running" in error_line("boot", 1)
            finally:
                process.kill()
        os.close(ours)


# --- administration commands and the trace ----------------------------------------------------------------

ADMIN_COMMANDS = (
    "status",
    "features",
    "config",
    "read",
    "write",
    "stop",
    "resume",
    "parts-get",
    "parts-set",
    "assign-features",
    "notify-info",
    "raw",
)
OWNER = """
    [group]
    name = "pf"
    feature_management = true

    [owner]
    type = "blk"
    image = "ram:1MiB"
    admin_queues = 2

    [[members]]
    count = 2
    type = "blk"
    image = "ram:1MiB"
"""


@pytest.fixture
def owned(work: Path) -> Iterator[Served]:
    """A group with an owner."""
    with serving(write(work, OWNER, "owner.toml")) as served:
        yield served


def test_admin_registers(owned: Served) -> None:
    assert run("admin", 1, "status").stdout == "0x00\n"
    assert run("admin", "member-1", "write", "common", 18, "03").stdout == "member 1: 1 bytes written\n"
    assert run("admin", 1, "status").stdout == "0x03 ACKNOWLEDGE DRIVER\n"
    assert run_json("admin", 1, "status") == {"member": 1, "status": {"value": 3, "names": ["ACKNOWLEDGE", "DRIVER"]}}
    assert run_json("admin", 1, "write", "common", 4, "00020000") == {"member": 1, "written": 4}
    device, driver = run("admin", 1, "features").stdout.splitlines()
    assert device.startswith("device 0x")
    assert "ANY_LAYOUT" in device
    assert driver == "driver 0x200 FLUSH"
    assert run_json("admin", 1, "features")["driver"] == {"value": 0x200, "names": ["FLUSH"]}
    assert run("admin", 1, "read", "common", 12, 2).stdout == "0001  (0x100)\n"
    assert run_json("admin", 1, "read", "common", "0xc", 2) == {"member": 1, "data": "0001", "value": 256}
    config = run("admin", 1, "config").stdout.splitlines()
    assert config[0].startswith("  0  00 08 00 00 00 00 00 00 ")
    assert bytes.fromhex(run_json("admin", 1, "config")["config"])[:8] == (2048).to_bytes(8, "little")
    assert run_json("admin", 2, "status")["status"]["value"] == 0
    assert "BAR" in run("admin", 1, "notify-info").stdout
    assert run_json("admin", 1, "notify-info")["regions"] == [{"place": "member", "bar": 2, "offset": 0x3000}]


def test_admin_refusals_are_one_line(owned: Served) -> None:
    assert "member 1: LEGACY_COMMON_CFG_READ: EINVAL / INVALID_FIELD" in error_line("admin", 1, "read", "common", 18, 2)
    assert "Member 9 not found" in error_line("admin", 9, "status")
    assert "Member 9 not found" in error_line("admin", 9, "config")
    assert "no group 'x' is running" in error_line("admin", 1, "status", "--group", "x")
    assert "no group 'x' is running" in error_line("admin", "--group", "x", 1, "status")


def test_admin_provisioning(owned: Served, work: Path) -> None:
    assert "member 1: features 0x200 of 0x" in run("admin", 1, "assign-features", "0x200").stdout
    assert run_json("admin", 1, "assign-features", 512)["features"] == 512
    run("admin", 1, "write", "common", 18, "01")
    assert "DEVICE_MGMT: EBUSY" in error_line("admin", 1, "assign-features", 0)
    assert run("admin", 1, "stop").stdout == "member 1: stopped\n"
    assert "stopped" in run("list").stdout
    assert run_json("show", 1)["stopped"]
    table = run("admin", 1, "parts-get").stdout
    assert re.search(r"DEVICE_STATUS +- +0x1 *\n", table)
    assert re.search(r"VQ_CFG +0 +size=256 .*desc=0x0", table)
    file = work / "parts"
    assert f"bytes in {file}" in run("admin", 1, "parts-get", file).stdout
    answer = run_json("admin", 1, "parts-get", work / "parts2")
    assert (answer["size"], answer["file"]) == (file.stat().st_size, str(work / "parts2"))
    assert file.read_bytes() == (work / "parts2").read_bytes()
    assert "EBUSY" in error_line("admin", 2, "parts-set", file) or "EINVAL" in error_line("admin", 2, "parts-set", file)
    assert run_json("admin", 1, "parts-set", file) == {"member": 1, "size": file.stat().st_size}
    assert run_json("admin", 1, "resume") == {"member": 1, "stopped": False}
    assert "No such file" in error_line("admin", 1, "parts-set", work / "none")
    file.write_bytes(b"torn")
    assert "device part: 4 bytes" in error_line("admin", 1, "parts-set", file)


def test_admin_raw(owned: Served) -> None:
    answer = run_json("admin", "owner", "raw", "CAP_ID_LIST_QUERY")
    assert (answer["status"]["name"], answer["result"]) == ("OK", "0100000000000000")
    assert run("admin", 1, "raw", "legacy-common-cfg-read", 12, "--result-size", 1).stdout == "OK (0) / OK (0)\n00\n"
    refused = run("admin", 1, "raw", "0x20", status=1)
    assert refused.stdout == "EINVAL (22) / INVALID_OPCODE (2)\n"
    assert run_json("admin", 1, "raw", 3, "--group-type", 7, status=1)["qualifier"]["name"] == "INVALID_GROUP"
    assert run_json("admin", 1, "raw", 0, "--group-type", "self", "--queue", 1)["status"]["value"] == 0
    assert "allowed: 0 to 1" in error_line("admin", 1, "raw", 0, "--queue", 2)


def test_show_the_owner(owned: Served) -> None:
    text = run("show", "owner").stdout
    for part in (
        "NumVFs",
        "2 of 65535",
        "LIST_QUERY LIST_USE",
        "admin queue",
        "its own device",
        "feature-management",
    ):
        assert part in text
    answer = run_json("show", "owner")
    assert (answer["device"]["config"]["capacity"], answer["function"]) == (2048, None)


def test_trace(owned: Served) -> None:
    run("admin", 1, "status")
    run("admin", 1, "write", "common", 4, "00020000")
    run("admin", 2, "status")
    run("admin", 1, "read", "common", 18, 2, status=1)
    lines = run("trace", 1).stdout.splitlines()
    assert lines[0].split() == ["time", "origin", "access", "register", "bytes", "value", "command", "status", "us"]
    assert [line.split()[1:-1] for line in lines[1:]] == [
        ["admin", "read", "device_status", "1", "0x00", "LEGACY_COMMON_CFG_READ", "OK"],
        ["admin", "write", "driver_features", "4", "0x00000200", "LEGACY_COMMON_CFG_WRITE", "OK"],
        ["admin", "read", "device_status", "2", "-", "LEGACY_COMMON_CFG_READ", "EINVAL/INVALID_FIELD"],
    ]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d\.\d{6}", line.split()[0]) for line in lines[1:])
    answer = run_json("trace", 1)
    assert (len(answer["entries"]), answer["lost"]) == (3, 0)
    assert answer["entries"][1]["value"] == 0x200
    assert [entry["seq"] for entry in run_json("trace", 1, "--limit", 1)["entries"]] == [answer["entries"][-1]["seq"]]
    assert {entry["member"] for entry in run_json("trace", "all")["entries"]} >= {1, 2}
    assert "member 2" in run("trace", "all").stdout
    assert "Member 9 not found" in error_line("trace", 9)


def test_trace_follows_until_the_group_ends(owned: Served) -> None:
    with (
        subprocess.Popen(
            [*VHU, "trace", "1", "--follow", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as machine,
        subprocess.Popen(
            [*VHU, "trace", "1", "--follow"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as human,
    ):
        assert human.stdout is not None
        assert human.stdout.readline().startswith("time")
        run("admin", 1, "status")
        assert "device_status" in human.stdout.readline()
        assert machine.stdout is not None
        assert json.loads(machine.stdout.readline())["register"] == "device_status"
        human.send_signal(signal.SIGINT)
        assert human.wait(20) == 0
        owned.stop()
        assert machine.wait(20) == 0
        assert machine.stderr is not None
        assert human.stderr is not None
        assert machine.stderr.read() == human.stderr.read() == ""


def test_functions_of_members_and_owner(work: Path) -> None:
    text = OWNER.replace("admin_queues = 2", "vfio_user = true") + "    vfio_user = true\n"
    with serving(write(work, text, "owner.toml")) as served:
        run_dir = Path(served.ready["run_dir"])
        assert served.ready["owner"] == {"vfio_user": str(run_dir / "owner.vfio-user.sock")}
        kinds = ("legacy", "transitional", "modern")
        sockets = {kind: str(run_dir / f"member-1.{kind}.vfio-user.sock") for kind in kinds}
        assert served.ready["members"][0]["vfio_user"] == sockets
        assert "legacy transitional modern" in run("list").stdout
        shown = run("show", 1).stdout
        assert all(socket in shown for socket in sockets.values())
        assert str(run_dir / "owner.vfio-user.sock") in run("show", "owner").stdout
        assert run_json("show", "owner")["function"]["pci"]["vendor-id"] == 0x1AF4
        for kind, path in sockets.items():
            answer = run_json("qemu-args", 1, f"--{kind}", "--via", "vfio-user", "--qemu", "11.1")
            assert path in " ".join(answer["argv"])
            assert (answer["member"], answer["mode"], answer["via"]) == (1, kind, "vfio-user")
        assert "vfio-user-pci" in run("qemu-args", 1, "--via", "vfio-user", "--qemu", "11.1").stdout
        answer = run_json("qemu-args", "owner", "--qemu", "11.1")
        assert "owner.vfio-user.sock" in " ".join(answer["argv"])
        assert (answer["member"], answer["mode"]) == ("owner", "modern")
        assert "has no vfio-user-pci" in error_line("qemu-args", 1, "--via", "vfio-user", "--qemu", "10.0")


def test_conformance_of_the_owner(work: Path) -> None:
    text = OWNER.replace("admin_queues = 2", "vfio_user = true") + "    vfio_user = true\n"
    with serving(write(work, text.replace('name = "pf"', 'name = "pf"\nstrict = true'), "owner.toml")) as served:
        owner = served.ready["owner"]["vfio_user"]
        member = f"1={served.ready['members'][0]['vfio_user']['modern']}"
        done = run("conformance", "--owner", owner, "--member", member, "--only", "ADM-01", "--only", "MOD")
        assert "ADM-01" in done.stdout
        assert "MOD-01" in done.stdout
        answer = run_json("conformance", "--owner", owner, "--only", "LST-01")
        assert answer["ok"]
        assert [check["id"] for check in answer["checks"]] == ["LST-01"]
    # what Linux needs isn't what the specification says
    with serving(write(work, text, "owner.toml")) as served:
        done = run("conformance", "--owner", served.ready["owner"]["vfio_user"], "--only", "LST-01", status=1)
        assert "does not conform" in done.stdout


def test_conformance_of_nobody(work: Path) -> None:
    assert "No such file" in error_line("conformance", "--owner", work / "none.sock")
    assert "NO-SUCH" in error_line("conformance", "--owner", work / "none.sock", "--only", "NO-SUCH")


# --- virtio-vhost-user devices ------------------------------------------------------------------------------

DEVICES = """
    [group]
    name = "vvu"

    [[vhost_user_devices]]
    name = "disk"
    max_queues = 3

    [[vhost_user_devices]]
    name = "net"
    uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    shared_memory = "1GiB"
    vfio_user = true
    ram_file = "ram"
    ram_size = "64MiB"
"""


@pytest.fixture
def devices(work: Path) -> Iterator[Served]:
    """A group of virtio-vhost-user devices."""
    with serving(write(work, DEVICES, "devices.toml")) as served:
        yield served


def device_socket(served: Served, name: str, kind: str) -> Path:
    return Path(served.ready["run_dir"]) / f"device-{name}.{kind}.sock"


def wait_device(name: str, key: str, value: object) -> dict[str, Any]:
    """Ask until a value of a device is this one."""
    deadline = time.monotonic() + 20
    while (device := run_json("devices", name))[key] != value:
        assert time.monotonic() < deadline, device
    assert isinstance(device, dict)
    return device


def end_of_the_day(run_dir: str) -> None:
    """End whichever process serves there by now; nothing of it may be left."""
    os.kill(int((Path(run_dir) / "group.lock").read_text()), signal.SIGTERM)
    deadline = time.monotonic() + 20
    while Path(run_dir).exists():
        assert time.monotonic() < deadline, list(Path(run_dir).iterdir())
        time.sleep(0.01)


def test_validate_devices(work: Path) -> None:
    file = write(work, DEVICES, "devices.toml")
    assert "group vvu, 0 members, 2 virtio-vhost-user devices: ok" in run("validate", file).stdout
    disk, net = run_json("validate", file)["group"]["vhost_user_devices"]
    assert (disk["uuid"], disk["shared_memory"], disk["ram_file"]) == (None, 4 << 30, None)
    assert (net["uuid"], net["ram_file"]) == ("6ba7b810-9dad-11d1-80b4-00c04fd430c8", str(work / "ram"))


def test_devices(devices: Served) -> None:
    kinds = ("vhost_user", "vfio_user", "front")
    disk, net = devices.ready["vhost_user_devices"]
    paths = {kind: str(device_socket(devices, "net", kind.replace("_", "-"))) for kind in kinds}
    assert net == {"name": "net", **paths}
    assert (disk["name"], disk["vfio_user"]) == ("disk", None)
    for path in (*paths.values(), disk["vhost_user"], disk["front"]):
        assert Path(path).is_socket()
    rows = [line.split() for line in run("devices").stdout.splitlines() if "waiting" in line]
    assert [row[:6] for row in rows] == [
        ["disk", "waiting", "-", "-", "-", "3"],
        ["net", "waiting", "-", "-", "-", "8"],
    ]
    answer = run_json("devices")
    assert [device["name"] for device in answer] == ["disk", "net"]
    assert run_json("devices", "net") == answer[1]
    text = run("devices", "net").stdout
    for part in (*paths.values(), "6ba7b810-9dad-11d1-80b4-00c04fd430c8", "1 GiB", "ram, 64 MiB"):
        assert part in text
    bells = [line.split() for line in run("devices", "disk").stdout.splitlines() if re.match(r" +(\d|log)", line)]
    assert bells[0] == ["0", "2", "0", "0", "0", "0", "3", "0", "0"]
    assert bells[3] == ["log", "8", "0", "0"]
    line = error_line("devices", "dusk")
    assert line == "vhu-legacy: there is no virtio-vhost-user device 'dusk'; there is: disk, net"


def test_no_devices(work: Path) -> None:
    with serving(work / "group.toml") as served:
        assert "vhost_user_devices" not in served.ready
        assert run_json("devices") == []
        assert "there is none" in error_line("devices", "disk")


def test_qemu_args_of_both_sides(devices: Served) -> None:
    answer = run_json("qemu-args", "--backend", "disk", "--qemu", "11.1", "--memory", "2G")
    assert {key: answer[key] for key in ("device", "side", "via", "qemu")} == {
        "device": "disk",
        "side": "backend",
        "via": "vhost-user",
        "qemu": "11.1",
    }
    argv = answer["argv"]
    assert f"socket,id=vvu-disk-chr,path={device_socket(devices, 'disk', 'vhost-user')}" in argv
    assert "num_vqs=9," in argv[argv.index("-device") + 1]
    assert argv[argv.index("-m") + 1] == "2G"
    answer = run_json("qemu-args", "--backend", "net", "--via", "vfio-user", "--qemu", "11.1")
    assert str(device_socket(devices, "net", "vfio-user")) in " ".join(answer["argv"])
    assert answer["via"] == "vfio-user"

    answer = run_json("qemu-args", "--front", "disk", "--qemu", "10.0", "--legacy", "--queues", 3)
    assert (answer["device"], answer["side"], answer["via"]) == ("disk", "front", "vhost-user")
    text = " ".join(answer["argv"])
    assert f"path={device_socket(devices, 'disk', 'front')},reconnect-ms=1000" in text
    assert "num-queues=3,disable-modern=on" in text
    assert "memory-backend-memfd,id=mem0,size=1G" in text
    assert "tag=disk" in run("qemu-args", "--front", "disk", "--device", "fs", "--qemu", "11.1").stdout
    assert "tag=x,,y" in run("qemu-args", "--front", "disk", "--device", "fs", "--tag", "x,y", "--qemu", "11.1").stdout
    text = run("qemu-args", "--front", "net", "--device", "net", "--queues", 4, "--qemu", "11.1").stdout
    # all of its memory is what the backend VM sees
    assert f"memory-backend-file,id=mem0,size=64M,mem-path={devices.ready['run_dir'].partition('/xdg')[0]}/ram," in text
    assert "-m 64M" in text
    assert "vectors=10" in text

    assert "isn't served over vfio-user" in error_line("qemu-args", "--backend", "disk", "--via", "vfio-user")
    assert "needed: 11.1" in error_line("qemu-args", "--backend", "disk", "--qemu", "10.0")
    assert "no virtio-vhost-user device 'x'" in error_line("qemu-args", "--front", "x")
    assert "modern only" in error_line("qemu-args", "--front", "disk", "--device", "fs", "--legacy")
    assert "no choice of queues" in error_line("qemu-args", "--front", "disk", "--device", "i2c", "--queues", 2)
    refusal = error_line("qemu-args", "--front", "disk", "--device", "net", "--queues", 2)
    assert "needs 4 of device disk, which has max_queues = 3" in refusal
    assert "has a RAM file" in error_line("qemu-args", "--front", "net", "--memory", "1G")


def test_events_of_devices_on_one_line() -> None:
    stamp = {"seconds": 0, "microseconds": 5000}
    data = {"name": "disk", "reason": "closed by the master"}
    line = event_text({"event": "MASTER_DOWN", "data": data, "timestamp": stamp})
    assert line.endswith(".005 device disk: MASTER_DOWN reason=closed by the master")


def test_a_device_that_broke_a_rule(devices: Served) -> None:
    device = run_json("devices", "disk")
    device["broken"] = {"rule": "rxq.size", "reason": "a buffer of 1 bytes", "queue": 0}
    device["last-message"] = {
        "from": "master", "request": 99, "name": None, "reply": False, "flags": 1, "size": 8,
    }  # fmt: skip
    assert vvu_state(device) == "broken: rxq.size"
    facts = dict(vvu_facts(device))
    assert facts["broken"] == "rxq.size: a buffer of 1 bytes"
    assert facts["last message"] == "request 99 of the master, 8 bytes"
    device["last-message"] |= {"request": 24, "name": "GET_CONFIG", "reply": True, "from": "slave"}
    assert dict(vvu_facts(device))["last message"] == "reply to GET_CONFIG of the slave, 8 bytes"


def test_upgrade_serves_devices_anew(devices: Served) -> None:
    run_dir = devices.ready["run_dir"]
    # a new file may well have the old one's number
    before = {name: device_socket(devices, name, "vhost-user").stat().st_ctime_ns for name in ("disk", "net")}
    try:
        answer = run_json("upgrade", run_dir)
        assert answer["pid"] != devices.process.pid
        assert devices.process.wait(20) == 0
        assert [device["state"] for device in run_json("devices")] == ["waiting", "waiting"]
        assert run_json("devices", "net")["uuid"] == "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
        for name, made in before.items():
            assert device_socket(devices, name, "vhost-user").stat().st_ctime_ns > made
        with attach(str(device_socket(devices, "disk", "vhost-user"))):
            wait_device("disk", "carrier", "vhost-user")
    finally:
        end_of_the_day(run_dir)


def test_upgrade_is_refused_while_a_device_is_in_use(devices: Served, work: Path) -> None:
    run_dir = devices.ready["run_dir"]
    with attach(str(device_socket(devices, "disk", "vhost-user"))) as backend:
        wait_device("disk", "carrier", "vhost-user")
        refusal = error_line("upgrade", run_dir)
        assert "virtio-vhost-user device disk: a backend VM or a master is connected" in refusal
        assert "use force" in refusal
        assert run_json("list")["group"]["pid"] == devices.process.pid
        # it is still connected, and served
        backend.sendall(b"\1\0\0\0\1\0\0\0\0\0\0\0")
        assert len(backend.recv(20)) == 20
        # hello, group, ready, end, serving: the devices have been closed by then, and are in the new process's hands
        assert "is gone" in error_line("upgrade", run_dir, "--force", "--python", faulty(work, 5, "kill"))
        assert backend.recv(1) == b""
    assert run_json("list")["group"]["pid"] == devices.process.pid
    for name in ("disk", "net"):
        with attach(str(device_socket(devices, name, "vhost-user"))):
            wait_device(name, "carrier", "vhost-user")
            assert error_line("upgrade", run_dir)
        wait_device(name, "carrier", None)
    with attach(str(device_socket(devices, "net", "vhost-user"))) as backend:
        wait_device("net", "carrier", "vhost-user")
        try:
            assert run_json("upgrade", run_dir, "--force")["pid"] != devices.process.pid
            assert backend.recv(1) == b""
            assert wait_device("net", "carrier", None)["state"] == "waiting"
        finally:
            end_of_the_day(run_dir)


@pytest.fixture(scope="module")
def qemu() -> images.QemuCommand:
    """QEMU 11.1. Found before `work` has another home directory, in which there is no cache."""
    trio.run(images.ensure, [], ["11.1"])
    return images.qemu_command("11.1")


@pytest.mark.guest
@pytest.mark.parametrize(("name", "via"), [("disk", "vhost-user"), ("net", "vhost-user"), ("net", "vfio-user")])
def test_qemu_has_the_device(qemu: images.QemuCommand, devices: Served, name: str, via: str) -> None:
    """QEMU 11.1 takes the printed options and connects; the other end goes with it."""
    answer = run_json("qemu-args", "--backend", name, "--via", via, "--qemu", "11.1", "--memory", "64M")
    with subprocess.Popen(
        [*qemu.argv, *answer["argv"][1:], "-S"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **qemu.env},
    ) as process:
        try:
            device = wait_device(name, "carrier", via)
            assert device["peer-pid"] == process.pid
            assert device["state"] == "waiting"
            assert via in run("devices", name).stdout
            # past its realization
            time.sleep(0.5)
            assert process.poll() is None
        finally:
            process.kill()
    wait_device(name, "carrier", None)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["no-such-command"],
        ["serve"],
        ["show"],
        ["list", "--nope"],
        ["qemu-args", "1", "--via", "usb"],
        ["show", "-1"],
        ["admin"],
        ["admin", "1"],
        ["admin", "1", "no-such-command"],
        ["admin", "x", "status"],
        ["admin", "owner", "status"],
        ["admin", "1", "read", "common", "18"],
        ["admin", "1", "read", "common", "-1", "1"],
        ["admin", "1", "write", "common", "18", "xyz"],
        ["admin", "1", "raw", "NO_SUCH_OPCODE"],
        ["trace"],
        ["trace", "everything"],
        ["conformance"],
        ["conformance", "--owner", "x", "--member", "1"],
        ["show", "owner", "--qom-path", "/x"],
        ["qemu-args"],
        ["qemu-args", "1", "--backend", "disk"],
        ["qemu-args", "--backend", "disk", "--front", "disk"],
        ["qemu-args", "1", "--device", "blk"],
        ["qemu-args", "--backend", "disk", "--queues", "2"],
        ["qemu-args", "--front", "disk", "--device", "gpu"],
        ["qemu-args", "--front", "disk", "--tag", "x"],
        ["qemu-args", "--front", "disk", "--via", "vfio-user"],
        ["qemu-args", "--front", "disk", "--queues", "0"],
    ],
)
def test_wrong_usage(args: list[str]) -> None:
    done = run(*args, status=2)
    assert done.stdout == ""
    assert "Usage:" in done.stderr


def test_every_command_has_help_and_json() -> None:
    commands = re.findall(r"^  ([a-z-]+) +[A-Z]", run("--help").stdout, re.MULTILINE)
    expected = {"serve", "validate", "list", "show", "watch", "qemu-args", "shell", "boot", "matrix", "images"}
    expected |= {"admin", "trace", "conformance", "devices"}
    assert expected <= set(commands)
    for command in expected:
        assert "--json" in run(command, "--help").stdout
    for command in ADMIN_COMMANDS:
        assert "--json" in run("admin", 1, command, "--help").stdout


def test_a_group_that_hangs_is_reported(work: Path) -> None:
    (work / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(work / "run" / "qmp.sock"))
        silent.listen()
        assert "gave no answer within 5 s" in error_line("list", "--run-dir", work / "run")


def test_output_into_a_closed_pipe(work: Path) -> None:
    with serving(work / "group.toml"):
        command = f"{shlex.join(VHU)} list | true; {shlex.join(VHU)} list --json | true"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.stderr == ""


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (512, "512 B"), (MIB, "1 MiB"), (3 * MIB // 2, "1.5 MiB"), (1 << 62, "4 EiB")]
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert size_text(size) == text
