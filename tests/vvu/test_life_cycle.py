# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Comings and goings: either side of a virtio-vhost-user device goes, crashes, pauses and comes again, in any order."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.conftest import RunningGroup
from tests.frontend import PAGE, SECTOR, STATE, BlkDriver, ConnectionLost, R, Region, wait_until
from tests.vvu.conftest import CONFIG, QUEUES, Device, Rig
from tests.vvu.peers import SLAVE_UP, BlkProgram, Master, QemuSlave, exchange, signals
from vhu_legacy.rundir import device_socket_name
from vhu_legacy.vfio_client import Disconnected

QUIET = 0.1


def show_memory(master: Master, device: Device, data: bytes = b"\x11" * PAGE, size: int = 4 * PAGE) -> int:
    """One region of memory, that the driver knows of; its fd."""
    fd = master.memfd(size, data)
    master.set_mem_table([Region(0, size, 0, 0, fd)])
    assert device.slave.receive().request == R.SET_MEM_TABLE
    return fd


# --- the backend VM ---------------------------------------------------------------------------------------------------


def test_a_device_reset_with_a_master_and_memory(device: Device) -> None:
    slave = device.boot()
    for _ in range(3):
        master = device.connect()
        show_memory(master, device)
        kick = master.vring_fd(R.SET_VRING_KICK, 0)
        slave.receive()
        slave.reset()
        master.wait_closed()
        os.eventfd_write(kick, 1)
        slave.start()
        assert slave.status == 0
        assert not slave.kicks(0, 0)
        assert slave.window_read(0, 4) == bytes(4)
        slave.up()


def test_a_reset_of_a_driver_that_was_never_up(device: Device) -> None:
    slave = device.power_on().start()
    for _ in range(3):
        slave.reset()
        slave.start()
    device.works()


def test_the_backend_vm_is_killed_and_boots_again(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    show_memory(master, device)
    slave.close()
    master.wait_closed()
    device.boot()
    second = device.connect()
    show_memory(second, device, b"\x22" * PAGE)
    assert device.slave.window_read(0, 2) == b"\x22\x22"
    device.works(second)


def test_the_backend_vm_is_killed_with_messages_under_way(device: Device) -> None:
    slave = device.power_on().start(rx=2).up()
    master = device.connect()
    for number in range(50):
        master.send(R.SET_VRING_NUM, STATE.pack(number, 0))
    slave.close()
    master.wait_closed()
    device.boot()
    device.works(device.connect())


def test_slave_down_and_up_again_and_again(device: Device) -> None:
    slave = device.boot()
    for number in range(10):
        master = device.master()
        exchange(master, slave, R.GET_FEATURES, b"", number)
        slave.status = 0
        master.wait_closed()
        slave.up()
    assert device.query()["messages"]["masters"] >= 10


def test_masters_are_refused_when_the_slave_stays_down(device: Device) -> None:
    """A QEMU that waits for an answer does so with all its processors stopped: better none at all."""
    slave = device.boot()
    slave.status = 0
    path = device.rig.path(device.name, "front")
    wait_until(lambda: not path.exists(), 5, "the end of the listener")
    with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
        Master(path)
    slave.up()
    wait_until(path.exists, 5, "the listener")
    device.works(device.connect())


# --- carrier (a): pauses and resets look alike ------------------------------------------------------------------------


def busy_slave(device: Device) -> tuple[QemuSlave, Master]:
    """Past the beginning of its rings."""
    slave = device.boot()
    assert isinstance(slave, QemuSlave)
    master = device.connect()
    for _ in range(3):
        exchange(master, slave, R.GET_FEATURES, b"", 1)
    return slave, master


def test_a_pause_keeps_the_session(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    kick = master.vring_fd(R.SET_VRING_KICK, 1)
    call = master.vring_fd(R.SET_VRING_CALL, 1)
    slave.receive()
    slave.receive()
    show_memory(master, qemu_device)
    slave.pause()
    master.send(R.SET_VRING_NUM, STATE.pack(1, 2))
    os.eventfd_write(kick, 1)
    time.sleep(QUIET)
    assert qemu_device.query()["state"] == "paused"
    assert not slave.kicks(1, 0)
    assert master.is_open()
    slave.resume()
    assert slave.receive().payload == STATE.pack(1, 2)
    assert slave.kicks(1), "the kick of the pause is not lost"
    slave.call(1)
    assert signals(call)
    assert slave.window_read(0, 2) == b"\x11\x11"
    assert slave.status == 3
    exchange(master, slave, R.GET_FEATURES, b"", 1)


def test_memory_that_is_announced_in_a_pause_is_mapped_after_it(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    slave.pause()
    fd = master.memfd(PAGE, b"late")
    master.set_mem_table([Region(0, PAGE, 0, 0, fd)])
    time.sleep(QUIET)
    assert not slave.maps
    slave.resume()
    assert slave.receive().request == R.SET_MEM_TABLE
    assert slave.window_read(0, 4) == b"late"


def test_a_master_that_leaves_in_a_pause_is_told_of_after_it(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    show_memory(master, qemu_device)
    slave.pause()
    master.close()
    time.sleep(QUIET)
    slave.resume()
    assert slave.config_changes()
    assert slave.status == 0
    assert slave.maps
    slave.up()
    exchange(qemu_device.connect(), slave, R.GET_FEATURES, b"", 1)
    assert not slave.maps


def test_a_start_at_base_0_is_a_reset(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    show_memory(master, qemu_device)
    slave.stop_for_reset()
    slave.set_up(range(2 * QUEUES + 3))
    master.wait_closed()
    assert slave.status == 0
    slave.post(8)
    qemu_device.works()


def test_a_config_read_after_a_stop_is_a_reset(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    slave.stop_for_reset()
    assert slave.status == 0
    master.wait_closed()
    slave.start()
    qemu_device.works()


def test_two_pauses_in_a_row(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    for _ in range(2):
        slave.pause()
        slave.resume()
    exchange(master, slave, R.GET_FEATURES, b"", 1)
    assert slave.status == 3


def test_the_backend_vm_is_killed_in_a_pause(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    slave.pause()
    slave.close()
    master.wait_closed()
    qemu_device.boot()
    qemu_device.works(qemu_device.connect())


def test_a_map_that_is_refused_ends_the_session(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    slave.refuse_maps = True
    fd = master.memfd(PAGE)
    master.set_mem_table([Region(0, PAGE, 0, 0, fd)])
    qemu_device.wait_rule("shared-memory.refused")
    master.wait_closed()
    assert slave.config_changes()
    assert slave.status == 0
    slave.refuse_maps = False
    slave.up()
    show_memory(qemu_device.connect(), qemu_device)


def test_a_front_end_that_cannot_map_memory_ends_the_session(qemu_device: Device) -> None:
    slave = qemu_device.power_on(protocol=QemuSlave.PROTOCOL & ~(1 << 22)).start().up()
    master = qemu_device.connect()
    exchange(master, slave, R.GET_FEATURES, b"", 1)
    fd = master.memfd(PAGE)
    master.set_mem_table([Region(0, PAGE, 0, 0, fd)])
    qemu_device.wait_rule("shared-memory.not-negotiated")
    master.wait_closed()


def test_the_master_leaves_while_the_backend_vm_maps(qemu_device: Device) -> None:
    """The answer may still come, and the map be there: it is taken down before the next master's."""
    slave, master = busy_slave(qemu_device)
    slave.hold_answers()
    fd = master.memfd(PAGE, b"first")
    master.set_mem_table([Region(0, PAGE, 0, 0, fd)])
    wait_until(lambda: slave.maps, what="the map")
    master.close()
    time.sleep(QUIET)
    slave.let_answers_go()
    assert slave.config_changes()
    slave.wait_status(0)
    slave.forget()
    slave.up()
    second = qemu_device.connect()
    show_memory(second, qemu_device, b"other")
    assert slave.window_read(0, 5) == b"other"


def test_the_backend_vm_is_killed_while_it_maps(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    slave.hold_answers()
    fd = master.memfd(PAGE)
    master.set_mem_table([Region(0, PAGE, 0, 0, fd)])
    wait_until(lambda: slave.maps, what="the map")
    slave.close()
    master.wait_closed()
    qemu_device.boot()
    show_memory(qemu_device.connect(), qemu_device)


def test_the_backend_vm_is_killed_while_it_unmaps_what_was_left(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    show_memory(master, qemu_device)
    master.close()
    assert slave.config_changes()
    slave.hold_answers()
    slave.up()
    wait_until(lambda: ("unmap", 0, 4 * PAGE) in slave.operations, what="the unmap")
    slave.close()
    qemu_device.boot()
    show_memory(qemu_device.connect(), qemu_device)


def test_a_reset_while_the_backend_vm_maps(qemu_device: Device) -> None:
    slave, master = busy_slave(qemu_device)
    slave.hold_answers()
    fd = master.memfd(PAGE, b"first")
    master.set_mem_table([Region(0, PAGE, 0, 0, fd)])
    wait_until(lambda: slave.maps, what="the map")
    slave.let_answers_go(later=True)
    slave.reset()
    master.wait_closed()
    slave.start().up()
    show_memory(qemu_device.connect(), qemu_device, b"again")
    assert slave.window_read(0, 5) == b"again"


# --- the master -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 11, 12, 15])
def test_the_master_is_killed_in_the_middle_of_a_message(device: Device, cut: int) -> None:
    slave = device.boot()
    master = device.connect()
    master.send_raw(master.encode(R.SET_VRING_NUM, STATE.pack(1, 2))[:cut])
    master.close()
    assert slave.config_changes()
    assert slave.status == 0
    device.wait_rule("message.torn")
    assert slave.nothing_comes(0.01)
    slave.up()
    device.works(device.connect())


def test_a_master_that_reconnects_until_the_driver_is_ready(device: Device) -> None:
    slave = device.boot()
    for _ in range(5):
        first = device.connect()
        first.close()
        assert slave.config_changes()
        slave.wait_status(0)
        slave.up()
        second = device.master()
        exchange(second, slave, R.GET_FEATURES, b"", 1)
        second.close()
        assert slave.config_changes()
        slave.wait_status(0)
        slave.up()


def test_a_master_that_comes_and_goes_before_the_slave_is_up(new_device: Device) -> None:
    device = new_device
    slave = device.power_on().start()
    for _ in range(5):
        master = device.master()
        master.send(R.GET_FEATURES)
        master.close()
    last = device.master()
    last.send(R.SET_OWNER)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        # each of them may be the master for a moment
        if slave.status == 0:
            slave.status = SLAVE_UP
        with suppress(TimeoutError):
            if slave.receive(0.05).request == R.SET_OWNER:
                return
    raise TimeoutError("the last master's turn never came")


# --- our process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", ["vhost-user", "vfio-user"])
def test_the_group_is_killed_and_another_one_serves_again(tmp_path: Path, carrier: str) -> None:
    with ExitStack() as stack:
        rig = Rig(RunningGroup(tmp_path, CONFIG))
        stack.callback(rig.group.kill)
        device = stack.enter_context(Device(rig, "tested", carrier))
        device.boot()
        master = device.connect()
        show_memory(master, device)
        rig.group.process.send_signal(signal.SIGKILL)
        master.wait_closed()
        with pytest.raises((ConnectionLost, Disconnected)):
            device.slave.config()
        rig.group.kill()
        rig = Rig(RunningGroup(tmp_path, CONFIG))
        stack.callback(rig.group.kill)
        again = stack.enter_context(Device(rig, "tested", carrier))
        again.boot()
        again.works(again.connect())
        assert rig.group.stop() == 0


@pytest.mark.parametrize("carrier", ["vhost-user", "vfio-user"])
def test_the_group_ends_in_order_with_both_sides_connected(tmp_path: Path, carrier: str) -> None:
    with ExitStack() as stack:
        rig = Rig(RunningGroup(tmp_path, CONFIG))
        stack.callback(rig.group.kill)
        device = stack.enter_context(Device(rig, "tested", carrier))
        device.boot()
        master = device.connect()
        show_memory(master, device)
        master.send(R.SET_VRING_NUM, STATE.pack(0, 0))
        assert rig.group.stop() == 0
        master.wait_closed()
        for kind in ("front", "vhost-user", "vfio-user"):
            assert not rig.path("tested", kind).exists()
        assert "Traceback" not in rig.group.log()


# --- all together -----------------------------------------------------------------------------------------------------


def test_a_block_driver_works_through_the_slave(device: Device) -> None:
    """A front end's whole life, with a driver's rings served in its own memory."""
    slave = device.boot()
    wait_until(device.rig.path(device.name, "front").exists, what="the listener")
    with BlkProgram(slave) as program:
        with BlkDriver(device.rig.path(device.name, "front"), queues=2, regions=2, memory_size=2 << 20) as driver:
            driver.start()
            assert driver.capacity() == program.SECTORS
            for sector in range(4):
                driver.write(sector, bytes([sector + 1]) * SECTOR, queue=sector % 2)
            driver.flush()
            for sector in range(4):
                assert driver.read(sector, SECTOR, queue=sector % 2) == bytes([sector + 1]) * SECTOR
            driver.stop()
        assert program.error is None
    slave.wait_status(0)
    slave.up()
    device.works(device.connect())


def test_comings_and_goings_are_told_over_qmp(device: Device) -> None:
    assert device.rig.group.qmp is not None
    events = device.rig.group.qmp.events
    device.query()
    events.clear()
    slave = device.boot()
    master = device.connect()
    master.send(R.GET_FEATURES, flags=2)
    assert slave.config_changes()
    wanted = ["SLAVE_UP", "MASTER_UP", "MASTER_DOWN", "SLAVE_DOWN"]

    def told() -> list[str]:
        device.query()
        return [one["event"] for one in events if one["data"].get("name") == device.name]

    wait_until(lambda: len(told()) >= len(wanted), what=str(wanted))
    assert told() == wanted
    (down,) = [one for one in events if one["event"] == "MASTER_DOWN"]
    assert "version" in down["data"]["reason"]


def test_the_state_is_told_over_qmp(device: Device) -> None:
    assert device.query()["state"] == "waiting"
    slave = device.boot()
    query = device.query()
    assert (query["state"], query["carrier"], query["peer-pid"]) == ("slave-up", device.carrier, os.getpid())
    master = device.connect()
    show_memory(master, device)
    kick = master.vring_fd(R.SET_VRING_KICK, 1)
    slave.receive()
    before = device.query()["queues"][1]["kicks"]
    os.eventfd_write(kick, 1)
    assert slave.kicks(1)
    query = device.query()
    assert (query["state"], query["master-pid"]) == ("connected", os.getpid())
    assert query["status"] == {"value": 3, "names": ["SLAVE_UP", "MASTER_UP"]}
    assert [(one["offset"], one["size"]) for one in query["memory"]] == [(0, 4 * PAGE)]
    assert query["queues"][1]["kicks"] == before + 1
    assert query["last-message"]["name"] == "SET_VRING_KICK"


def test_sockets_are_named_after_the_device(rig: Rig) -> None:
    query = rig.query("tested")
    for kind in ("vhost-user", "vfio-user", "front"):
        assert query["sockets"][kind] == str(rig.path("tested", kind))
        assert Path(query["sockets"][kind]).name == device_socket_name("tested", kind)
