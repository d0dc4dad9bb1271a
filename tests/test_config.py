# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The group file: what is understood, and that every mistake is named where it is."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from vhu_legacy import ConfigError, MemberConfig, OwnerConfig, check, load
from vhu_legacy.config import (
    MAX_FILE,
    CompatConfig,
    GroupConfig,
    VhostUserDeviceConfig,
    image_identity,
    parse_member,
    parse_size,
    resolve_image,
)
from vhu_legacy.errors import GroupError
from vhu_legacy.handover import group_data, group_of

MIB = 1 << 20


@pytest.fixture
def group_dir(tmp_path: Path) -> Path:
    for name in ("disk1.raw", "disk2.raw", "pf.raw"):
        (tmp_path / name).write_bytes(bytes(MIB))
    (tmp_path / "ram").mkdir()
    return tmp_path


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "group.toml"
    path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
    return path


def open_fds() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


GOOD = """
    [group]
    name = "demo"
    strict = true
    feature_management = true
    notify_region = false
    workers = 2

    [group.compat]
    lists_without_vfs = true
    pfn_zero_resets_device = true

    [owner]
    type = "blk"
    image = "pf.raw"
    admin_queues = 2
    queues = 3
    queue_size = 128
    packed = true
    in_order = true
    shared = true
    vectors = 4
    read_only = true
    blk_size = 512
    serial = "pf"
    vfio_user = true

    [[members]]
    count = 2
    type = "blk"
    image = "disk{n}.raw"
    serial = "disk-{n}"
    queues = 4
    vfio_user = true
    packed = true
    in_order = true
    vectors = 2048

    [[members]]
    type = "blk"
    image = "ram:64MiB"
    legacy = false
    queue_size = 1024
    blk_size = 4096
    shared = true
    poll_us = 1000

    [[members]]
    id = 10
    type = "blk"
    image = "null:1GiB"
    read_only = true

    [[vhost_user_devices]]
    name = "disk"

    [[vhost_user_devices]]
    name = "0.Net_1-b"
    max_queues = 126
    uuid = "6BA7B810-9dad-11d1-80b4-00c04fd430c8"
    shared_memory = "1TiB"
    vfio_user = true
    vectors = 2048
    ram_file = "ram/../ram.bin"
    ram_size = 4096
"""
UUID = bytes.fromhex("6ba7b8109dad11d180b400c04fd430c8")


def test_everything_that_can_be_said(group_dir: Path) -> None:
    config = load(write(group_dir, GOOD))
    assert (config.name, config.strict, config.feature_management, config.workers) == ("demo", True, True, 2)
    assert config.run_dir is None
    assert not config.notify_region
    assert config.switches == CompatConfig(True, False, False, True)
    assert config.owner == OwnerConfig(
        "blk",
        str(group_dir / "pf.raw"),
        admin_queues=2,
        vfio_user=True,
        read_only=True,
        queues=3,
        queue_size=128,
        packed=True,
        in_order=True,
        shared=True,
        vectors=4,
        blk_size=512,
        serial="pf",
    )
    function: dict[str, Any] = {"queues": 4, "packed": True, "in_order": True, "vectors": 2048, "vfio_user": True}
    assert config.members == (
        MemberConfig(1, "blk", str(group_dir / "disk1.raw"), serial="disk-1", **function),
        MemberConfig(2, "blk", str(group_dir / "disk2.raw"), serial="disk-2", **function),
        MemberConfig(
            3, "blk", f"ram:{64 * MIB}", queue_size=1024, legacy=False, blk_size=4096, shared=True, poll_us=1000
        ),
        MemberConfig(10, "blk", f"null:{1 << 30}", read_only=True),
    )
    ram_file = group_dir / "ram/../ram.bin"
    assert config.vhost_user_devices == (
        VhostUserDeviceConfig("disk", 8, bytes(16), 4 << 30, False, None, None, 0),
        VhostUserDeviceConfig("0.Net_1-b", 126, UUID, 1 << 40, True, 2048, ram_file, 4096),
    )


def test_a_group_goes_to_a_successor_as_it_is(group_dir: Path) -> None:
    config = load(write(group_dir, GOOD))
    assert group_of(json.loads(json.dumps(group_data(config)))) == config
    # one that has none of it can go to a version that has never heard of it, and come from one
    plain = load(write(group_dir, '[group]\nname = "x"\nrun_dir = "run"\n'))
    assert "vhost_user_devices" not in group_data(plain)
    assert group_of(json.loads(json.dumps(group_data(plain)))) == plain
    data = json.loads(json.dumps(group_data(config)))
    data["vhost_user_devices"][0]["colour"] = "red"
    with pytest.raises(GroupError, match="colour, which isn't known here"):
        group_of(data)
    data["vhost_user_devices"][0] = {"name": "disk", "uuid": "xyz", "ram_file": None}
    with pytest.raises(GroupError, match="in an unknown way"):
        group_of(data)


def test_a_byte_order_mark_is_no_mistake(group_dir: Path) -> None:
    path = write(group_dir, b'\xef\xbb\xbf[group]\nname = "x"\n')
    assert load(path).name == "x"


def test_the_shortest_file_is_an_empty_group_with_a_warning(group_dir: Path) -> None:
    result = check(write(group_dir, '[group]\nname = "x"\n'))
    assert result.config is not None
    assert result.config.members == ()
    assert [warning.table for warning in result.warnings] == ["[[members]]"]


MEMBER = '[group]\nname = "x"\n[[members]]\n'
RAM = MEMBER + 'type = "blk"\nimage = "ram:1MiB"\n'
FIRST = "[[members]] #1"
DEVICE = '[group]\nname = "x"\n[[vhost_user_devices]]\n'
NAMED = DEVICE + 'name = "d"\n'
RAM_FILE = NAMED + 'vfio_user = true\nram_file = "ram.bin"\n'
FIRST_DEVICE = "[[vhost_user_devices]] #1"
OWNER = '[group]\nname = "x"\n[owner]\ntype = "blk"\nimage = "ram:1MiB"\n'
COMPAT = "[group.compat]"

# text of the file; table, key, part of what was found, part of what is allowed
MISTAKES: list[tuple[str, str | None, str | None, str, str | None]] = [
    ("", "[group]", None, "missing", "name"),
    ("group = 3", "[group]", None, "found 3", "name"),
    ("[group]\n", "[group]", "name", "missing", "letters"),
    ('[group]\nname = ""', "[group]", "name", 'found ""', "letters"),
    ('[group]\nname = "../x"', "[group]", "name", 'found "../x"', "letters"),
    ("[group]\nname = 1", "[group]", "name", "found 1, not a string", None),
    ('[group]\nname = "x"\nstrict = 1', "[group]", "strict", "found 1", "true or false"),
    ('[group]\nname = "x"\nworkers = 0', "[group]", "workers", "found 0", "1 to 64"),
    ('[group]\nname = "x"\nworkers = true', "[group]", "workers", "found true", "integer"),
    ('[group]\nname = "x"\nworker = 1', "[group]", "worker", "unknown key (did you mean workers?)", "run_dir"),
    ('[group]\nname = "x"\nrun_dir = ""', "[group]", "run_dir", 'found ""', "a directory"),
    (f'[group]\nname = "x"\nrun_dir = "/{"d" * 100}"', "[group]", "run_dir", "too long", "107 bytes"),
    ('[group]\nname = "x"\n[member]', None, None, "[member] (did you mean members?)", "[[members]]"),
    ('x = 1\n[group]\nname = "x"', None, None, "unknown table or key x", "[owner]"),
    ('[group]\nname = "x"\n[members]', "[members]", None, "found one table", "two brackets"),
    ('members = [1]\n[group]\nname = "x"', FIRST, None, "found 1", "a table"),
    ('[group]\nname = "x"\n[owner]\ntype = "blk"', "[owner]", "image", "missing", "ram:SIZE"),
    ('owner = 1\n[group]\nname = "x"', "[owner]", None, "found 1", "table"),
    (MEMBER + 'image = "ram:1MiB"', FIRST, "type", "missing", '"blk"'),
    (MEMBER + 'type = "blk"', FIRST, "image", "missing", "null:SIZE"),
    (MEMBER + 'type = "net"', FIRST, "type", "not served by this version", '"blk"'),
    (MEMBER + 'type = "rng"', FIRST, "type", "not served by this version", '"blk"'),
    (MEMBER + 'type = "console"', FIRST, "type", "not served by this version", '"blk"'),
    (MEMBER + 'type = "bkl"', FIRST, "type", 'found "bkl" (did you mean blk?)', '"blk"'),
    (MEMBER + 'type = ["blk"]', FIRST, "type", "found an array, not a string", '"blk"'),
    (MEMBER + 'type = "blk"\nimage = "nothing.raw"', FIRST, "image", "nothing.raw: no such file", None),
    (MEMBER + 'type = "blk"\nimage = "qcow2:x"', FIRST, "image", "no such file", 'no image type "qcow2:"'),
    (MEMBER + 'type = "blk"\nimage = "."', FIRST, "image", "is a directory", "raw image file"),
    (MEMBER + 'type = "blk"\nimage = "/dev/null"', FIRST, "image", "neither a file", "block device"),
    (MEMBER + 'type = "blk"\nimage = "odd.raw"', FIRST, "image", "1000 bytes", "multiple of 512"),
    (MEMBER + 'type = "blk"\nimage = "empty.raw"', FIRST, "image", "is empty", "at least 512"),
    (MEMBER + 'type = "blk"\nimage = "ram:64MB"', FIRST, "image", 'found "ram:64MB"', "64MiB"),
    (MEMBER + 'type = "blk"\nimage = "ram:"', FIRST, "image", 'found "ram:"', "64MiB"),
    (MEMBER + 'type = "blk"\nimage = "ram:100"', FIRST, "image", "is 100 bytes", "multiple of 512"),
    (MEMBER + 'type = "blk"\nimage = "null:0"', FIRST, "image", "empty", "at least 512"),
    (MEMBER + 'type = "blk"\nimage = "null:9999999TiB"', FIRST, "image", "bytes", "at most"),
    (MEMBER + 'type = "blk"\nimage = "disk{m}.raw"', FIRST, "image", "placeholder {m}", "{n}"),
    (MEMBER + 'type = "blk"\nimage = "a\\u0000b"', FIRST, "image", "NUL", None),
    (MEMBER + 'type = "blk"\nimage = 3', FIRST, "image", "found 3, not a string", "ram:SIZE"),
    (MEMBER + 'type = "blk"\nimage = "ram:4608"\nblk_size = 4096', FIRST, "image", "4608", "4096"),
    ('[group]\nname = "x"\nnotify_region = 1', "[group]", "notify_region", "found 1", "true or false"),
    ('[group]\nname = "x"\ncompat = true', "[group]", "compat", "found true", "lists_without_vfs"),
    ('[group]\nname = "x"\n[group.compat]\nlists_without_vfs = 1', COMPAT, "lists_without_vfs", "found 1", "true"),
    ('[group]\nname = "x"\n[group.compat]\npreset = true', COMPAT, "preset", "unknown key", "self_group_preset"),
    (OWNER + 'admin_queues = 0', "[owner]", "admin_queues", "found 0", "1 to 64"),
    (OWNER + 'admin_queues = 65', "[owner]", "admin_queues", "found 65", "1 to 64"),
    (OWNER + 'queues = 65', "[owner]", "queues", "found 65", "1 to 64"),
    (OWNER + 'queue_size = 100', "[owner]", "queue_size", "found 100", "128"),
    (OWNER + 'vfio_user = "yes"', "[owner]", "vfio_user", 'found "yes"', "true or false"),
    (OWNER + 'vfio_user = true\nvectors = 2049', "[owner]", "vectors", "found 2049", "0 to 2048"),
    (OWNER + 'packed = 1', "[owner]", "packed", "found 1", "true or false"),
    (OWNER + 'read_only = 1', "[owner]", "read_only", "found 1", "true or false"),
    (OWNER + 'blk_size = 1000', "[owner]", "blk_size", "found 1000", "4096"),
    (OWNER + 'serial = "' + "s" * 21 + '"', "[owner]", "serial", "sss", "20"),
    (OWNER + 'legacy = true', "[owner]", "legacy", "unknown key", "image"),
    (RAM + 'vectors = -1\nvfio_user = true', FIRST, "vectors", "found -1", "0 to 2048"),
    (RAM + 'vectors = true\nvfio_user = true', FIRST, "vectors", "found true", "integer"),
    (RAM + 'poll_us = 1001', FIRST, "poll_us", "found 1001", "0 to 1000"),
    (RAM + 'poll_us = -1', FIRST, "poll_us", "found -1", "0 to 1000"),
    (RAM + 'poll_us = 0.5', FIRST, "poll_us", "found 0.5", "integer"),
    (RAM + 'poll_us = true', FIRST, "poll_us", "found true", "integer"),
    (OWNER + 'poll_us = 50', "[owner]", "poll_us", "unknown key", "queues"),
    (RAM + 'packed = "no"', FIRST, "packed", 'found "no"', "true or false"),
    (RAM + 'vfio_user = 0', FIRST, "vfio_user", "found 0", "true or false"),
    (RAM + 'vfio-user = true', FIRST, "vfio-user", "mean vfio_user", None),
    (RAM + 'queues = 0', FIRST, "queues", "found 0", "1 to 64"),
    (RAM + 'queues = 65', FIRST, "queues", "found 65", "1 to 64"),
    (RAM + 'queues = 1.0', FIRST, "queues", "found 1.0", "integer"),
    (RAM + 'queues = true', FIRST, "queues", "found true", "integer"),
    (RAM + 'queue_size = 300', FIRST, "queue_size", "300", "256, 512"),
    (RAM + 'queue_size = 2048', FIRST, "queue_size", "2048", "1024"),
    (RAM + 'blk_size = 513', FIRST, "blk_size", "found 513", "4096"),
    (RAM + 'read_only = "no"', FIRST, "read_only", 'found "no"', "true"),
    (RAM + 'legacy = 2024-01-01', FIRST, "legacy", "(a date)", "true"),
    (RAM + 'read-only = true', FIRST, "read-only", "mean read_only", None),
    (RAM + 'count = 0', FIRST, "count", "found 0", "1 to 65535"),
    (RAM + 'id = 65535\ncount = 2', FIRST, "count", "65536", "65535"),
    (RAM + 'serial = "' + "s" * 21 + '"', FIRST, "serial", "sss", "20"),
    (RAM + 'serial = "é"', FIRST, "serial", "é", "ASCII"),
    (RAM + 'count = 2\nserial = "s"', FIRST, "serial", "1 and 2", "{n}"),
    (MEMBER + 'type = "blk"\nimage = "disk1.raw"\ncount = 2', FIRST, "image", "member 1 and member 2", "{n}"),
    ('[group]\nname = "x"\n[vhost_user_devices]', "[vhost_user_devices]", None, "found one table", "two brackets"),
    ('[group]\nname = "x"\n[[vhost-user-device]]', None, None, "(did you mean vhost_user_devices?)", "[[vhost_user"),
    ('vhost_user_devices = 1\n[group]\nname = "x"', "vhost_user_devices", None, "found 1", "a list of tables"),
    ('vhost_user_devices = [1]\n[group]\nname = "x"', FIRST_DEVICE, None, "found 1", "a table"),
    (DEVICE, FIRST_DEVICE, "name", "missing", "letters"),
    (DEVICE + 'name = 1', FIRST_DEVICE, "name", "found 1, not a string", "letters"),
    (DEVICE + 'name = "a/b"', FIRST_DEVICE, "name", 'found "a/b"', "letters"),
    (DEVICE + 'name = ".."', FIRST_DEVICE, "name", 'found ".."', "letters"),
    (DEVICE + f'name = "{"d" * 65}"', FIRST_DEVICE, "name", "found", "1 to 64"),
    (NAMED + 'queues = 1', FIRST_DEVICE, "queues", "(did you mean max_queues?)", "shared_memory"),
    (NAMED + 'max_queues = 0', FIRST_DEVICE, "max_queues", "found 0", "1 to 126"),
    (NAMED + 'max_queues = 127', FIRST_DEVICE, "max_queues", "found 127", "1 to 126"),
    (NAMED + 'max_queues = true', FIRST_DEVICE, "max_queues", "found true", "1 to 126"),
    (NAMED + 'uuid = "x"', FIRST_DEVICE, "uuid", 'found "x"', "6ba7b810-9dad"),
    (NAMED + f'uuid = "{UUID.hex()}"', FIRST_DEVICE, "uuid", "found", "6ba7b810-9dad"),
    (NAMED + 'uuid = 1', FIRST_DEVICE, "uuid", "found 1, not a string", "6ba7b810-9dad"),
    (NAMED + 'shared_memory = "3GiB"', FIRST_DEVICE, "shared_memory", 'found "3GiB"', "power of two"),
    (NAMED + 'shared_memory = "512KiB"', FIRST_DEVICE, "shared_memory", 'found "512KiB"', "1MiB"),
    (NAMED + 'shared_memory = "2TiB"', FIRST_DEVICE, "shared_memory", 'found "2TiB"', "1TiB"),
    (NAMED + 'shared_memory = 0', FIRST_DEVICE, "shared_memory", "found 0", "1MiB"),
    (NAMED + 'shared_memory = -1048576', FIRST_DEVICE, "shared_memory", "found -1048576", "1MiB"),
    (NAMED + 'shared_memory = 1048576.0', FIRST_DEVICE, "shared_memory", "found 1048576.0", "1MiB"),
    (NAMED + 'shared_memory = true', FIRST_DEVICE, "shared_memory", "found true", "1MiB"),
    (NAMED + 'shared_memory = "lots"', FIRST_DEVICE, "shared_memory", 'found "lots"', "1MiB"),
    (NAMED + 'vfio_user = 1', FIRST_DEVICE, "vfio_user", "found 1", "true or false"),
    (NAMED + 'vfio_user = true\nvectors = 2049', FIRST_DEVICE, "vectors", "found 2049", "0 to 2048"),
    (NAMED + 'ram_size = 4096', FIRST_DEVICE, "ram_size", "no ram_file", "with ram_file"),
    (RAM_FILE, FIRST_DEVICE, "ram_size", "missing", "whole pages"),
    (RAM_FILE + 'ram_size = 0', FIRST_DEVICE, "ram_size", "found 0", "whole pages"),
    (RAM_FILE + 'ram_size = 4097', FIRST_DEVICE, "ram_size", "found 4097", "whole pages"),
    (RAM_FILE + 'ram_size = "8GiB"', FIRST_DEVICE, "ram_size", 'found "8GiB"', "at most shared_memory"),
    (RAM_FILE.replace("true", "false") + 'ram_size = 4096', FIRST_DEVICE, "ram_file", "PCI function", "vfio_user"),
    (RAM_FILE.replace("ram.bin", "") + 'ram_size = 4096', FIRST_DEVICE, "ram_file", 'found ""', "relative"),
    (RAM_FILE.replace("ram.bin", "ram") + 'ram_size = 4096', FIRST_DEVICE, "ram_file", "not a regular file", "a file"),
    (RAM_FILE.replace("ram.bin", "no/x") + 'ram_size = 4096', FIRST_DEVICE, "ram_file", "is no directory", "file"),
    (RAM_FILE.replace("ram.bin", "pf.raw/x") + 'ram_size = 4096', FIRST_DEVICE, "ram_file", "no directory", "a file"),
    (RAM_FILE.replace("ram.bin", "/dev/zero") + 'ram_size = 4096', FIRST_DEVICE, "ram_file", "not a regular", "a file"),
    (RAM_FILE.replace("ram.bin", "a\\u0000b") + 'ram_size = 4096', FIRST_DEVICE, "ram_file", "NUL", "a file"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "table", "key", "found", "allowed"), MISTAKES)
def test_each_mistake_is_named(
    group_dir: Path, text: str, table: str | None, key: str | None, found: str, allowed: str | None
) -> None:
    (group_dir / "odd.raw").write_bytes(bytes(1000))
    (group_dir / "empty.raw").touch()
    path = write(group_dir, text)
    result = check(path)
    assert result.config is None
    assert len(result.problems) == 1, result.problems
    problem = result.problems[0]
    assert (problem.file, problem.table, problem.key) == (path, table, key)
    assert found in problem.found
    assert "\n" not in str(problem)
    if allowed is not None:
        assert problem.allowed is not None
        assert allowed in problem.allowed


def test_all_mistakes_are_reported_at_once(group_dir: Path) -> None:
    path = write(
        group_dir,
        """
        [groups]
        [group]
        strict = "yes"
        [owner]
        type = "blk"
        image = "disk1.raw"
        [[members]]
        type = "bkl"
        image = "disk1.raw"
        queues = 100
        [[members]]
        id = 1
        type = "blk"
        image = "ram:1GB"
        """,
    )
    with pytest.raises(ConfigError) as caught:
        load(path)
    places = [(problem.table, problem.key) for problem in caught.value.problems]
    assert places == [
        (None, None),
        ("[group]", "name"),
        ("[group]", "strict"),
        (FIRST, "type"),
        (FIRST, "queues"),
        (FIRST, "image"),
        ("[[members]] #2", "id"),
        ("[[members]] #2", "image"),
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == len(places)
    assert all(line.startswith(str(path)) for line in lines)


def test_all_mistakes_of_devices_are_reported_at_once(group_dir: Path) -> None:
    path = write(
        group_dir,
        f"""
        [group]
        name = "x"
        workers = 0
        [[vhost_user_devices]]
        name = "d"
        uuid = "{VhostUserDeviceConfig("", uuid=UUID).uuid_text}"
        max_queue = 3
        shared_memory = "3GiB"
        # what is too much for a region of unknown size isn't known
        vfio_user = true
        ram_file = "pf.raw"
        ram_size = "8GiB"
        [[vhost_user_devices]]
        name = "d"
        uuid = "{VhostUserDeviceConfig("", uuid=UUID).uuid_text}"
        max_queues = 127
        ram_file = "missing/ram"
        [owner]
        type = "blk"
        image = "pf.raw"
        """,
    )
    second = "[[vhost_user_devices]] #2"
    problems = check(path).problems
    assert [(problem.table, problem.key) for problem in problems] == [
        ("[group]", "workers"),
        (FIRST_DEVICE, "max_queue"),
        (FIRST_DEVICE, "shared_memory"),
        (FIRST_DEVICE, "ram_file"),
        (second, "max_queues"),
        (second, "ram_size"),
        (second, "ram_file"),
        (second, "ram_file"),
        (second, "name"),
        (second, "uuid"),
    ]
    assert "pf.raw is the image of the owner" in problems[3].found
    assert FIRST_DEVICE in problems[-2].found
    assert FIRST_DEVICE in problems[-1].found


def test_devices_alone_are_a_group(group_dir: Path) -> None:
    result = check(write(group_dir, NAMED))
    assert (result.problems, result.warnings) == ((), ())
    assert result.config is not None
    assert result.config.members == ()


def test_two_devices_of_one_vm_show_the_same_memory(group_dir: Path) -> None:
    text = RAM_FILE + "ram_size = '1MiB'\n"
    (group_dir / "ram.bin").write_bytes(bytes(MIB))
    other = text.removeprefix('[group]\nname = "x"\n').replace('"d"', '"e"')
    config = load(write(group_dir, text + other))
    assert [device.ram_file for device in config.vhost_user_devices] == [group_dir / "ram.bin"] * 2
    # what is opened is the file of that name
    (group_dir / "ram.bin").unlink()
    (group_dir / "ram.bin").symlink_to("disk1.raw")
    assert "not a regular file" in check(write(group_dir, text)).problems[0].found


def test_uuids_as_text() -> None:
    assert VhostUserDeviceConfig("x").uuid_text is None
    assert VhostUserDeviceConfig("x", uuid=UUID).uuid_text == "6ba7b810-9dad-11d1-80b4-00c04fd430c8"


def test_a_wrong_pattern_for_many_members_is_a_few_lines(group_dir: Path) -> None:
    result = check(write(group_dir, MEMBER + 'type = "blk"\ncount = 1000\nimage = "none{n}.raw"'))
    assert len(result.problems) == 6
    assert "995 more" in result.problems[-1].found


@pytest.mark.parametrize("link", ["symlink", "hard link", "other spelling"])
def test_one_image_has_one_writer_whatever_it_is_called(group_dir: Path, link: str) -> None:
    other = group_dir / "other.raw"
    name = "other.raw"
    if link == "symlink":
        other.symlink_to("disk1.raw")
    elif link == "hard link":
        other.hardlink_to(group_dir / "disk1.raw")
    else:
        name = f"../{group_dir.name}/disk1.raw"
    text = f"""
        [group]
        name = "x"
        [[members]]
        type = "blk"
        image = "disk1.raw"
        READ_ONLY
        [[members]]
        type = "blk"
        image = "{name}"
        read_only = true
    """
    result = check(write(group_dir, text.replace("READ_ONLY", "")))
    assert [problem.table for problem in result.problems] == ["[[members]] #2"]
    assert "used by member 1 and member 2" in result.problems[0].found
    assert check(write(group_dir, text.replace("READ_ONLY", "read_only = true"))).problems == ()


def test_large_legacy_queues_are_warned_about(group_dir: Path) -> None:
    member = RAM + "queue_size = 512\n"
    warnings = check(write(group_dir, member)).warnings
    assert [(warning.table, warning.key) for warning in warnings] == [(FIRST, "queue_size")]
    assert "SeaBIOS" in warnings[0].found
    assert check(write(group_dir, member + "legacy = false")).warnings == ()


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (OWNER + "vfio_user = true", []),
        (OWNER + "vfio_user = true\nvectors = 2", []),
        (OWNER + "vfio_user = true\nvectors = 0", [("[owner]", "vectors", "INTx")]),
        (OWNER + "vfio_user = true\nvectors = 1", [("[owner]", "vectors", "INTx")]),
        (OWNER + "vectors = 2", [("[owner]", "vectors", "only PCI functions")]),
        (
            OWNER + "vfio_user = true\nvectors = 0\nqueues = 2",
            [("[owner]", "vectors", "INTx"), ("[owner]", "queues", "Linux 6.12 to 7.1")],
        ),
        (RAM + "vfio_user = true", []),
        (RAM + "vfio_user = true\nvectors = 0\ncount = 3", [(FIRST, "vectors", "INTx")]),
        (RAM + "vectors = 3", [(FIRST, "vectors", "only PCI functions")]),
        (NAMED + "vfio_user = true", []),
        (NAMED + "vfio_user = true\nvectors = 1", []),
        (NAMED + "vfio_user = true\nvectors = 0", [(FIRST_DEVICE, "vectors", "INTx")]),
        (NAMED + "vectors = 3", [(FIRST_DEVICE, "vectors", "only PCI functions")]),
    ],
)
def test_what_is_warned_about(group_dir: Path, text: str, places: list[tuple[str, str, str]]) -> None:
    result = check(write(group_dir, text))
    assert result.problems == ()
    warnings = [warning for warning in result.warnings if warning.table != "[[members]]"]
    assert [(warning.table, warning.key) for warning in warnings] == [place[:2] for place in places]
    for warning, place in zip(warnings, places, strict=True):
        assert place[2] in warning.found


def test_switches_follow_strict_unless_said_otherwise(group_dir: Path) -> None:
    def switches(text: str) -> CompatConfig:
        return load(write(group_dir, '[group]\nname = "x"\n' + text)).switches

    assert switches("") == CompatConfig(True, True, True, False) == CompatConfig.default(strict=False)
    assert switches("strict = true") == CompatConfig(False, False, False, False) == CompatConfig.default(strict=True)
    assert switches("strict = true\n[group.compat]\nself_group_preset = true").as_dict() == {
        "lists_without_vfs": False,
        "capabilities_in_sr_iov_list": False,
        "self_group_preset": True,
        "pfn_zero_resets_device": False,
    }
    assert not switches("[group.compat]\nlists_without_vfs = false").lists_without_vfs
    # a group that was never in a file
    assert GroupConfig("x", Path("x"), strict=True).switches == CompatConfig.default(strict=True)


def test_vectors_and_queues_by_default() -> None:
    assert MemberConfig(1, queues=4).vector_count == 5
    assert MemberConfig(1, queues=4, vectors=0).vector_count == 0
    assert OwnerConfig("blk", "", admin_queues=2, queues=3).vector_count == 6
    assert VhostUserDeviceConfig("x", 4).vector_count == 7
    assert VhostUserDeviceConfig("x", 4, vectors=0).vector_count == 0
    assert GroupConfig("x", Path("x")).admin_queues == 1
    assert GroupConfig("x", Path("x"), owner=OwnerConfig("blk", "", 5)).admin_queues == 5


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (OWNER, ""),
        (OWNER + "vfio_user = true", "owner.vfio-user.sock"),
        (RAM + "id = 65535\nvfio_user = true", "member-65535.transitional.vfio-user.sock"),
        (NAMED, ""),
        (NAMED.replace('"d"', f'"{"d" * 20}"'), f"device-{'d' * 20}.vhost-user.sock"),
    ],
)
def test_the_longest_socket_must_fit(group_dir: Path, text: str, name: str) -> None:
    run_dir = "/" + "d" * (107 - len("/member-65535.vhost-user.sock/"))
    result = check(write(group_dir, text.replace("[group]\n", f'[group]\nrun_dir = "{run_dir}"\n')))
    too_long = len(run_dir) + 1 + len(name) > 107
    assert [problem.key for problem in result.problems] == ["run_dir"] * too_long
    if too_long:
        assert name in result.problems[0].found


def test_owner_and_members_share_no_image_for_writing(group_dir: Path) -> None:
    text = '[group]\nname = "x"\n[owner]\ntype = "blk"\nimage = "pf.raw"\nOPTION\n'
    text += '[[members]]\ntype = "blk"\nimage = "pf.raw"\nread_only = true\n'
    assert "used by the owner and member 1" in check(write(group_dir, text.replace("OPTION", ""))).problems[0].found
    assert check(write(group_dir, text.replace("OPTION", "read_only = true"))).problems == ()


def test_an_image_that_may_not_be_written(group_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: str | Path, flags: int, *args: int) -> int:
        # the tests may run as root, who may write anything
        if Path(path).name == "disk1.raw" and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    member = MEMBER + 'type = "blk"\nimage = "disk1.raw"\n'
    problems = check(write(group_dir, member)).problems
    assert "permission denied" in problems[0].found
    assert "read_only" in problems[0].found
    assert check(write(group_dir, member + "read_only = true")).problems == ()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"[group\n", "TOML syntax: Expected ']' at the end of a table declaration (at line 1"),
        (b'[group]\nname = "x"\nname = "y"\n', "line 3"),
        (b"\x7fELF\x02\x01\x01\x00", "TOML syntax"),
        (b'[group]\nname = "\xff"\n', "byte 0xff at offset 16 (line 2) is not UTF-8"),
        (os.urandom(4096) + b"\xff\xfe", "is not text"),
        (b"x = " + b"[" * 100_000, "nested too deeply"),
        (b"x = " + b"9" * 5000, "TOML"),
        (bytes(MAX_FILE + 1), "larger than 4 MiB"),
    ],
)
def test_files_that_are_no_toml(tmp_path: Path, data: bytes, found: str) -> None:
    result = check(write(tmp_path, data))
    assert result.config is None
    assert len(result.problems) == 1
    assert found in str(result.problems[0])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, found in [
        (tmp_path / "none.toml", "No such file"),
        (tmp_path, "is a directory"),
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / ("n" * 300), "File name too long"),
        (Path("a\0b"), "can't be opened"),
    ]:
        problems = check(path).problems
        assert len(problems) == 1
        assert found in problems[0].found
        assert problems[0].file == path


def test_checking_leaves_no_descriptor_open(group_dir: Path) -> None:
    path = write(group_dir, GOOD)
    check(path)
    before = open_fds()
    for _ in range(10):
        check(path)
        check(group_dir)
    assert open_fds() == before


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("512B", 512),
        ("1K", 1024),
        ("1KiB", 1024),
        ("64 MiB", 64 * MIB),
        ("2G", 2 << 30),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "1MB", "1mib", "MiB", "0x10", "1 2", "9" * 30])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_images_are_relative_to_their_base(group_dir: Path) -> None:
    assert resolve_image("disk1.raw", group_dir, read_only=False) == str(group_dir / "disk1.raw")
    assert resolve_image("ram:1M", group_dir, read_only=False) == f"ram:{MIB}"
    with pytest.raises(ValueError, match=r"no such file; allowed: .*ram:SIZE"):
        resolve_image("none.raw", group_dir, read_only=True)
    assert image_identity(str(group_dir / "disk1.raw")) == image_identity(str(group_dir / "." / "disk1.raw"))
    assert image_identity("ram:512") is None
    assert image_identity(str(group_dir / "none.raw")) is None


def test_a_member_by_itself(group_dir: Path) -> None:
    member = parse_member(
        {"type": "blk", "image": "disk{n}.raw", "queues": 2}, member_id=2, base=group_dir, label="member-add"
    )
    assert member == MemberConfig(2, "blk", str(group_dir / "disk2.raw"), queues=2)
    with pytest.raises(ConfigError) as caught:
        parse_member({"type": "blk", "image": "x", "count": 3}, member_id=1, base=group_dir, label="member-add")
    assert [problem.key for problem in caught.value.problems] == ["count", "image"]
