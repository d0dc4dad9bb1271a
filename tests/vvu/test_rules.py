# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Every rule of virtio-vhost-user v5, by name, with a scripted master and a scripted driver on both carriers."""

from __future__ import annotations

import os
import struct

import pytest

from tests.frontend import (
    HEADER,
    LOG,
    NEED_REPLY,
    NO_FD,
    PAGE,
    REPLY,
    STATE,
    U64,
    VERSION,
    ConnectionLost,
    F,
    P,
    R,
    Region,
    bits,
)
from tests.vvu.conftest import QUEUES, RAM_SIZE, SHARED, UUID, Device
from tests.vvu.peers import (
    CONFIG_SIZE,
    MASTER_UP,
    RX_SIZE,
    SHARED_MEMORY_BAR,
    SLAVE_UP,
    Master,
    PciSlave,
    QemuSlave,
    exchange,
    signals,
)
from vhu_legacy import pci
from vhu_legacy.virtio_driver import NO_VECTOR, Common, Status

QUIET = 0.1
"""Seconds in which nothing may come."""
BOTH = SLAVE_UP | MASTER_UP


# --- identity, configuration, status ----------------------------------------------------------------------------------


def test_the_configuration_is_status_max_vhost_queues_and_uuid(device: Device) -> None:
    slave = device.power_on()
    assert slave.config() == struct.pack("<II", 0, QUEUES) + UUID.bytes


def test_no_feature_of_the_device_type_is_offered(device: Device) -> None:
    slave = device.power_on().start()
    offered = slave.offered
    assert offered >> F.VERSION_1 & 1
    assert offered & ((1 << 24) - 1) == 0


def test_slave_up_lets_a_master_connect_and_isnt_notified(device: Device) -> None:
    slave = device.power_on().start()
    slave.status = SLAVE_UP
    assert slave.status == SLAVE_UP
    assert not slave.config_changes(QUIET)
    device.connect()


def test_a_master_waits_until_the_slave_is_up(device: Device) -> None:
    """One that was there before its predecessor's session ended, and so has been let in already."""
    slave = device.boot()
    first = device.connect()
    master = device.master()
    first.close()
    assert slave.config_changes() == 1
    master.send(R.GET_FEATURES)
    assert slave.nothing_comes()
    assert slave.status == 0
    assert master.is_open()
    slave.up()
    assert slave.receive().request == R.GET_FEATURES
    slave.reply(R.GET_FEATURES, 1 << F.VERSION_1)
    assert master.receive().u64() == 1 << F.VERSION_1


def test_a_connected_master_sets_master_up_with_a_notification(device: Device) -> None:
    slave = device.boot()
    assert slave.status == SLAVE_UP
    device.master()
    assert slave.config_changes() == 1
    assert slave.status == BOTH


def test_master_disconnect_clears_both_bits_with_notification(device: Device) -> None:
    slave = device.boot()
    device.connect().close()
    assert slave.config_changes() == 1
    assert slave.status == 0
    assert device.last_rule is None


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        pytest.param(Master.encode(R.GET_FEATURES, flags=2), "message.version", id="header"),
        pytest.param(Master.encode(R.SET_FEATURES, bytes(4)), "message.size", id="payload"),
        pytest.param(Master.encode(R.SET_VRING_CALL, U64.pack(NO_FD | QUEUES)), "vring.index", id="meaning"),
    ],
)
def test_a_protocol_error_clears_both_bits_with_notification(device: Device, data: bytes, rule: str) -> None:
    slave = device.boot()
    master = device.connect()
    master.send_raw(data)
    assert slave.config_changes() == 1
    assert slave.status == 0
    master.wait_closed()
    assert device.last_rule == rule
    assert not slave.config_changes(QUIET)


def test_the_slave_comes_up_again_after_the_master_has_gone(device: Device) -> None:
    slave = device.boot()
    for _ in range(3):
        master = device.connect()
        exchange(master, slave, R.GET_FEATURES, b"", 0)
        master.close()
        assert slave.config_changes() == 1
        assert slave.status == 0
        slave.up()


def test_a_master_that_comes_before_slave_up_is_set_again_is_refused(device: Device) -> None:
    """A QEMU that waits for an answer does so with all its processors stopped."""
    slave = device.boot()
    device.connect().close()
    assert slave.config_changes() == 1
    with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
        Master(device.rig.path(device.name, "front"))
    slave.up()
    second = device.master()
    second.send(R.SET_OWNER)
    assert slave.receive().request == R.SET_OWNER


def test_slave_down_disconnects_the_master_without_notification(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    slave.status = 0
    assert slave.status == 0
    master.wait_closed()
    assert not slave.config_changes(QUIET)
    assert slave.status == 0
    assert device.last_rule is None


def test_a_device_reset_clears_both_bits_and_disconnects_the_master(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    slave.reset()
    assert slave.status == 0
    master.wait_closed()
    slave.start()
    assert slave.status == 0
    slave.up()
    device.connect()


def test_status_undefined_bit_needs_reset(device: Device) -> None:
    slave = device.boot()
    if isinstance(slave, QemuSlave):
        slave.connection.reply_ack = False
    slave.status = SLAVE_UP | 1 << 2
    device.wait_broken("config.status")
    if slave.needs_reset is not None:
        assert slave.needs_reset


def test_only_one_master_at_a_time(device: Device) -> None:
    slave = device.boot()
    first = device.connect()
    second = device.master()
    second.send(R.SET_OWNER)
    assert slave.nothing_comes()
    exchange(first, slave, R.GET_FEATURES, b"", 0)
    first.close()
    assert slave.config_changes()
    slave.up()
    # who had to wait is next, or has been told to come again
    try:
        assert slave.receive(0.5).request == R.SET_OWNER
    except TimeoutError:
        with pytest.raises(ConnectionLost):
            second.receive()


def test_the_driver_writes_nothing_but_slave_up(device: Device) -> None:
    slave = device.boot()
    before = slave.config()
    slave.write_config(4, b"\xff" * (CONFIG_SIZE - 4))
    assert slave.config() == before
    slave.status = BOTH
    assert slave.status == SLAVE_UP, "MASTER_UP is the device's"
    master = device.connect()
    slave.status = SLAVE_UP
    assert slave.status == BOTH, "and stays it"
    exchange(master, slave, R.GET_FEATURES, b"", 0)


def test_status_before_the_driver_is_ready_lets_nobody_connect(new_device: Device) -> None:
    slave = new_device.power_on()
    slave.status = SLAVE_UP
    master = new_device.master()
    master.send(R.SET_OWNER)
    assert not slave.status & MASTER_UP
    slave.start().up()
    assert slave.receive().request == R.SET_OWNER


# --- rxq and txq ------------------------------------------------------------------------------------------------------


def test_messages_arrive_whole_and_in_order(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    for size in (0, 1, 8, 12, 13, 255, 4095, 4096):
        exchange(master, slave, R.SET_CONFIG, os.urandom(size))
    for number in range(50):
        master.send(R.SET_VRING_NUM, STATE.pack(number, number))
    for number in range(50):
        assert STATE.unpack(slave.receive().payload) == (number, number)


def test_answers_reach_the_master_whole_and_in_order(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    payloads = [os.urandom(size) for size in (0, 1, 8, 13, 4095, 4096)]
    for _ in payloads:
        master.send(R.GET_CONFIG, bytes(12))
        assert slave.receive().request == R.GET_CONFIG
    for payload in payloads:
        slave.reply(R.GET_CONFIG, payload)
    for payload in payloads:
        answer = master.receive()
        assert (answer.request, answer.flags, answer.payload) == (R.GET_CONFIG, VERSION | REPLY, payload)


def test_a_message_is_spread_over_the_descriptors_of_its_buffer(device: Device) -> None:
    slave = device.power_on().start(rx=0).up()
    slave.post(2, RX_SIZE, pieces=7)
    master = device.connect()
    payload = os.urandom(4000)
    exchange(master, slave, R.SET_CONFIG, payload)
    answer = os.urandom(3000)
    master.send(R.GET_CONFIG, bytes(12))
    slave.receive()
    slave.transmit(HEADER.pack(R.GET_CONFIG, VERSION | REPLY, len(answer)) + answer, pieces=5)
    assert master.receive().payload == answer


def test_a_message_in_pieces_on_the_socket_is_one_in_rxq(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    data = Master.encode(R.SET_VRING_NUM, STATE.pack(1, 2))
    for byte in data:
        assert slave.nothing_comes(0.002)
        master.send_raw(bytes([byte]))
    assert slave.receive().payload == STATE.pack(1, 2)


def test_need_reply_is_passed_on_and_answered(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    master.send(R.SET_OWNER, need_reply=True)
    message = slave.receive()
    assert message.flags == VERSION | NEED_REPLY
    slave.reply(R.SET_OWNER)
    master.acknowledged(R.SET_OWNER)


def test_an_empty_rxq_makes_messages_wait(device: Device) -> None:
    slave = device.power_on().start(rx=0).up()
    master = device.connect()
    for number in range(20):
        master.send(R.SET_VRING_NUM, STATE.pack(number, 0))
    assert slave.nothing_comes()
    assert slave.status == BOTH
    slave.post(1)
    for number in range(20):
        assert STATE.unpack(slave.receive().payload) == (number, 0)


def test_messages_may_be_there_before_the_driver_has_seen_master_up(device: Device) -> None:
    slave = device.boot()
    device.master().send(R.SET_OWNER)
    assert slave.receive().request == R.SET_OWNER
    assert slave.config_changes()
    assert slave.status == BOTH


def test_rx_buffer_too_small_needs_reset(device: Device) -> None:
    slave = device.power_on().start(rx=1, rx_size=64).up()
    master = device.connect()
    exchange(master, slave, R.SET_CONFIG, bytes(64 - HEADER.size))
    master.send(R.SET_CONFIG, bytes(64 - HEADER.size + 1))
    device.wait_broken("rxq.size")
    if slave.needs_reset is not None:
        assert slave.needs_reset
    master.wait_closed()
    slave.reset()
    device.slave = slave.start()
    device.works()


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        pytest.param(HEADER.pack(R.GET_FEATURES, VERSION | REPLY, 8) + bytes(7), "message.size", id="a byte less"),
        pytest.param(HEADER.pack(R.GET_FEATURES, VERSION | REPLY, 8) + bytes(9), "message.size", id="a byte more"),
        pytest.param(HEADER.pack(R.GET_FEATURES, VERSION | REPLY, 8)[:11], "message.size", id="no header"),
        pytest.param(HEADER.pack(R.GET_FEATURES, VERSION | REPLY, 4097) + bytes(4097), "message.size", id="too large"),
        pytest.param(HEADER.pack(R.GET_FEATURES, 2 | REPLY, 8) + bytes(8), "message.version", id="version"),
        pytest.param(HEADER.pack(R.GET_FEATURES, VERSION | REPLY, 1 << 31), "message.size", id="huge"),
    ],
)
def test_a_txq_buffer_must_be_one_message(device: Device, data: bytes, rule: str) -> None:
    slave = device.boot()
    master = device.connect()
    master.send(R.GET_FEATURES)
    slave.receive()
    slave.transmit(data, wait=False)
    device.wait_broken(rule)
    if slave.needs_reset is not None:
        assert slave.needs_reset
    master.wait_closed()
    slave.reset()
    device.slave = slave.start()
    device.works()


def test_slave_request_before_set_slave_req_fd_is_dropped(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    slave.send(2)
    slave.send(2)
    exchange(master, slave, R.GET_FEATURES, b"", 5)
    assert master.is_open()
    master.open_channel()
    assert slave.receive().request == R.SET_BACKEND_REQ_FD
    slave.send(2, flags=VERSION)
    request = master.receive_channel()
    assert (request.request, request.flags, request.payload) == (2, VERSION, b"")
    assert device.query()["messages"]["discarded"] >= 2


def test_answers_pass_before_set_slave_req_fd(device: Device) -> None:
    slave = device.boot()
    exchange(device.connect(), slave, R.GET_FEATURES, b"", 1 << 32)


def test_the_masters_answer_to_the_slave_comes_in_rxq(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    master.open_channel()
    assert slave.receive().request == R.SET_BACKEND_REQ_FD
    slave.send(2, flags=VERSION | NEED_REPLY)
    assert master.receive_channel().flags == VERSION | NEED_REPLY
    # both at once, to be told apart by REPLY
    master.send(R.GET_FEATURES)
    master.answer_channel(2, 7)
    got = sorted((slave.receive(), slave.receive()), key=lambda message: message.flags)
    assert [(one.request, one.flags) for one in got] == [(R.GET_FEATURES, VERSION), (2, VERSION | REPLY)]
    assert got[1].u64() == 7


@pytest.mark.parametrize("request_number", [3, 6, 7, 8, 9, 10])
def test_slave_requests_that_pass_fds_are_dropped(device: Device, request_number: int) -> None:
    slave = device.boot()
    master = device.connect()
    master.open_channel()
    slave.receive()
    slave.send(request_number, bytes(40))
    slave.send(2)
    assert master.receive_channel().request == 2


def test_slave_requests_of_an_earlier_master_do_not_reach_the_next_one(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    master.open_channel()
    slave.receive()
    master.close()
    assert slave.config_changes()
    slave.send(2)
    slave.up()
    second = device.connect()
    slave.send(2)
    exchange(second, slave, R.GET_FEATURES, b"", 1)
    second.open_channel()
    slave.receive()
    slave.send(2, struct.pack("<Q", 42))
    assert second.receive_channel().u64() == 42


PASSES_FDS = bits(8, 10, 11, 12, 18, 19, 21, 22)


def test_protocol_features_that_pass_fds_are_taken_out(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    master.send(R.GET_PROTOCOL_FEATURES)
    slave.receive()
    slave.reply(R.GET_PROTOCOL_FEATURES, (1 << 64) - 1)
    offered = master.receive().u64()
    assert offered & PASSES_FDS == 0
    wanted = bits(P.MQ, P.LOG_SHMFD, P.REPLY_ACK, P.BACKEND_REQ, P.CONFIG)
    assert offered & wanted == wanted
    assert offered >> 32 == 0, "what nobody knows may pass fds"
    exchange(master, slave, R.SET_PROTOCOL_FEATURES, U64.pack(offered))


def test_no_protocol_feature_is_added_to_the_slaves(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    master.send(R.GET_PROTOCOL_FEATURES)
    slave.receive()
    slave.reply(R.GET_PROTOCOL_FEATURES, bits(P.CONFIG, P.INFLIGHT))
    assert master.receive().u64() == bits(P.CONFIG)


@pytest.mark.parametrize("asked", [True, False])
def test_a_master_accepts_only_protocol_features_it_was_offered(device: Device, asked: bool) -> None:
    slave = device.boot()
    master = device.connect()
    if asked:
        exchange(master, slave, R.GET_PROTOCOL_FEATURES, b"", bits(P.MQ))
    master.send(R.SET_PROTOCOL_FEATURES, U64.pack(bits(P.MQ, P.CONFIG)))
    device.wait_rule("protocol-features.not-offered")
    master.wait_closed()


def test_messages_that_nobody_knows_are_passed_on(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    exchange(master, slave, 1000, os.urandom(100), os.urandom(50))
    exchange(master, slave, 0xFFFF_FFFF, b"", b"")


# --- messages and what they make available ----------------------------------------------------------------------------


def test_kick_notification_follows_set_vring_kick(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    for queue in range(QUEUES):
        kick = master.vring_fd(R.SET_VRING_KICK, queue)
        assert slave.receive().payload == U64.pack(queue)
        for _ in range(3):
            os.eventfd_write(kick, 1)
            assert slave.kicks(queue)
        assert not any(slave.kicks(other, 0) for other in range(QUEUES))


def test_kick_notification_may_come_before_the_driver_has_the_message(device: Device) -> None:
    slave = device.power_on().start(rx=0).up()
    master = device.connect()
    kick = master.vring_fd(R.SET_VRING_KICK, 2)
    os.eventfd_write(kick, 1)
    assert slave.kicks(2)
    assert slave.nothing_comes(0.01)


def test_kick_that_was_signalled_before_is_notified(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    kick = master.eventfd()
    os.eventfd_write(kick, 1)
    master.send(R.SET_VRING_KICK, U64.pack(1), [kick])
    assert slave.kicks(1)


def test_kick_before_set_vring_call_is_ignored(device: Device) -> None:
    """The call doorbell, that is: a write before there is an eventfd for it has no effect later on."""
    slave = device.boot()
    master = device.connect()
    slave.call(1)
    slave.barrier()
    call = master.vring_fd(R.SET_VRING_CALL, 1)
    assert slave.receive().request == R.SET_VRING_CALL
    assert not signals(call, QUIET)
    slave.call(1)
    assert signals(call)


def test_err_before_set_vring_err_is_ignored(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    slave.err(1)
    slave.barrier()
    err = master.vring_fd(R.SET_VRING_ERR, 1)
    assert slave.receive().request == R.SET_VRING_ERR
    assert not signals(err, QUIET)
    slave.err(1)
    assert signals(err)


def test_log_doorbell_before_set_log_fd_is_ignored(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    slave.log()
    slave.barrier()
    fd = master.eventfd()
    master.send(R.SET_LOG_FD, b"", [fd])
    assert slave.receive().request == R.SET_LOG_FD
    assert not signals(fd, QUIET)
    slave.log()
    assert signals(fd)


@pytest.mark.parametrize("request_", [R.SET_VRING_CALL, R.SET_VRING_ERR, R.SET_VRING_KICK])
def test_a_message_without_fd_takes_the_resource_away(device: Device, request_: R) -> None:
    slave = device.boot()
    master = device.connect()
    fd = master.vring_fd(request_, 1)
    assert slave.receive().payload == U64.pack(1)

    def works(timeout: float) -> bool:
        if request_ == R.SET_VRING_KICK:
            os.eventfd_write(fd, 1)
            return bool(slave.kicks(1, timeout))
        (slave.call if request_ == R.SET_VRING_CALL else slave.err)(1)
        return bool(signals(fd, timeout))

    assert works(5)
    master.vring_fd(request_, 1, none=True)
    assert slave.receive().payload == U64.pack(1 | NO_FD)
    assert not works(QUIET)


def test_kick_call_and_err_end_at_once_with_the_master(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    fds = [master.vring_fd(request, 0) for request in (R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR)]
    for _ in fds:
        slave.receive()
    kept = [os.dup(fd) for fd in fds]
    try:
        master.close()
        assert slave.config_changes()
        os.eventfd_write(kept[0], 1)
        slave.call()
        slave.err()
        assert not slave.kicks(0, QUIET)
        assert not signals(kept[1], 0)
        assert not signals(kept[2], 0)
        # nor are they the next master's
        slave.up()
        device.connect()
        slave.call()
        assert not signals(kept[1], QUIET)
    finally:
        for fd in kept:
            os.close(fd)


# --- doorbells and notifications --------------------------------------------------------------------------------------


def test_each_doorbell_has_its_index(device: Device) -> None:
    """Call of queue i at 2i + 2, err at 2i + 3, the log's at 2(N + 1)."""
    slave = device.boot()
    master = device.connect()
    bells: dict[int, int] = {}
    for queue in range(QUEUES):
        bells[2 * queue + 2] = master.vring_fd(R.SET_VRING_CALL, queue)
        bells[2 * queue + 3] = master.vring_fd(R.SET_VRING_ERR, queue)
    bells[2 * QUEUES + 2] = master.eventfd()
    master.send(R.SET_LOG_FD, b"", [bells[2 * QUEUES + 2]])
    for _ in bells:
        slave.receive()
    for index, fd in bells.items():
        slave.notify(index)
        assert signals(fd) == 1
        assert not any(signals(other, 0) for other in bells.values())


def test_doorbells_are_counted(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    before = device.query()["queues"][3]
    call = master.vring_fd(R.SET_VRING_CALL, 3)
    slave.receive()
    for _ in range(3):
        slave.call(3)
        assert signals(call)
    slave.err(3)
    slave.barrier()
    exchange(master, slave, R.GET_FEATURES, b"", 0)
    after = device.query()["queues"][3]
    assert after["calls"] - before["calls"] == 3
    assert after["call-connected"]
    assert not after["err-connected"]


def test_all_indices_are_queues_over_vhost_user(qemu_device: Device) -> None:
    slave = qemu_device.power_on()
    assert isinstance(slave, QemuSlave)
    assert slave.num_queues == 2 * QUEUES + 3


def test_a_pci_function_has_two_queues_and_special_indices(pci_device: Device) -> None:
    slave = pci_device.power_on()
    assert isinstance(slave, PciSlave)
    device = slave.device
    assert device.num_queues == 2
    for index in (0, 1):
        assert device.select(index).size == 64
    addresses = {device.notify_address(device.select(index)) for index in range(2 * QUEUES + 3)}
    assert len(addresses) == 2 * QUEUES + 3
    for index in range(2, 2 * QUEUES + 3):
        assert device.select(index).size == 0
        device.write(Common.QUEUE_SIZE, 2, 16)
        device.write(Common.QUEUE_ENABLE, 2, 1)
        device.write(Common.QUEUE_DESC, 4, 0x1000)
        for register in (Common.QUEUE_SIZE, Common.QUEUE_ENABLE, Common.QUEUE_DESC):
            assert device.read(register, 2) == 0
    assert device.select(2 * QUEUES + 3).size == 0
    assert slave.function.identity.device == 0x1060
    assert slave.function.identity.revision >= 1


def test_only_kick_notifications_take_a_vector(pci_device: Device) -> None:
    slave = pci_device.power_on()
    assert isinstance(slave, PciSlave)
    device = slave.device
    for index in range(2, 2 * QUEUES + 3):
        kick = index % 2 == 0 and index != 2 * QUEUES + 2
        assert slave.has_no_vector(index)
        device.select(index)
        device.write(Common.QUEUE_VECTOR, 2, 4)
        assert slave.vector_of(index) == (4 if kick else NO_VECTOR)
        device.write(Common.QUEUE_VECTOR, 2, 999)
        assert slave.has_no_vector(index)
        device.write(Common.QUEUE_VECTOR, 2, 3)
    device.reset()
    assert all(slave.has_no_vector(index) for index in range(2 * QUEUES + 3))


def test_kick_notification_uses_the_vector_of_its_index(pci_device: Device) -> None:
    slave = pci_device.boot()
    assert isinstance(slave, PciSlave)
    master = pci_device.connect()
    kick = master.vring_fd(R.SET_VRING_KICK, 1)
    slave.receive()
    slave.device.select(4)
    slave.device.write(Common.QUEUE_VECTOR, 2, 6)
    os.eventfd_write(kick, 1)
    assert slave.kicks(3), "vector 6 is that of queue 3 otherwise"
    assert not slave.kicks(1, 0)
    slave.device.select(4)
    slave.device.write(Common.QUEUE_VECTOR, 2, NO_VECTOR)
    os.eventfd_write(kick, 1)
    assert not slave.kicks(3, QUIET)


def test_kick_notification_sets_isr_bit_2_without_msix(pci_device: Device) -> None:
    slave = pci_device.power_on(intx=True)
    assert isinstance(slave, PciSlave)
    slave.start()
    slave.device.isr()
    slave.up()
    master = pci_device.master()
    assert slave.interrupt() == 2
    kick = master.vring_fd(R.SET_VRING_KICK, 0)
    assert slave.interrupt() == 1
    assert slave.receive().request == R.SET_VRING_KICK
    os.eventfd_write(kick, 1)
    assert slave.interrupt() == 4
    assert slave.device.isr() == 0


def test_unbacked_indices_are_ignored(pci_device: Device) -> None:
    slave = pci_device.boot()
    assert isinstance(slave, PciSlave)
    master = pci_device.connect()
    bar, at = slave.device.notify_address(slave.device.select(0))
    for value in (2 * QUEUES + 3, 0x7FFF, 0xFFFF):
        slave.function.write(bar, at, 2, value, posted=True)
    exchange(master, slave, R.GET_FEATURES, b"", 0)
    assert not slave.needs_reset


# --- shared memory ----------------------------------------------------------------------------------------------------


def test_there_is_one_shared_memory_region_of_id_0(device: Device) -> None:
    slave = device.power_on()
    if isinstance(slave, QemuSlave):
        assert slave.shared_memory == [SHARED]
    else:
        assert isinstance(slave, PciSlave)
        found = [one for one in slave.function.virtio if one.type == pci.VirtioCapabilityType.SHARED_MEMORY]
        assert [one.bar for one in found] == [SHARED_MEMORY_BAR]
        bar = slave.function.bars[SHARED_MEMORY_BAR]
        assert (bar.kind, bar.size, bar.prefetchable) == ("memory64", SHARED, True)


def table_of(master: Master) -> list[Region]:
    """Three regions, neither in the order of addresses nor of file offsets."""
    fd, other = master.memfd(16 * PAGE), master.memfd(8 * PAGE)
    regions = [
        Region(0x8000_0000, 4 * PAGE, 0x7000_0000_0000, 8 * PAGE, fd),
        Region(0x1000, 8 * PAGE, 0x6000_0000_0000, 0, other),
        Region(0x4000_0000, 2 * PAGE, 0x7800_0000_0000, 4 * PAGE, fd),
    ]
    for number, region in enumerate(regions):
        os.pwrite(region.fd, bytes([number + 1]) * region.size, region.offset)
    return regions


def places(payload: bytes) -> list[int]:
    """Where a driver finds the regions of SET_MEM_TABLE."""
    (count,) = struct.unpack_from("<I", payload)
    cursor, found = 0, []
    for index in range(count):
        _guest, size, _user, gap = struct.unpack_from("<QQQQ", payload, 8 + 32 * index)
        found.append(cursor + gap)
        cursor += gap + size
    return found


def test_regions_in_the_masters_order_then_the_log(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    regions = table_of(master)
    master.set_mem_table(regions)
    message = slave.receive()
    assert places(message.payload) == [0, 4 * PAGE, 12 * PAGE]
    for number, (region, at) in enumerate(zip(regions, places(message.payload), strict=True)):
        assert slave.window_read(at, region.size) == bytes([number + 1]) * region.size
        slave.window_write(at + 100, b"from the slave")
        assert os.pread(region.fd, 14, region.offset + 100) == b"from the slave"
        os.pwrite(region.fd, b"from the master", region.offset + 200)
        assert slave.window_read(at + 200, 15) == b"from the master"
    log = master.memfd(3 * PAGE)
    master.send(R.SET_LOG_BASE, LOG.pack(1000, PAGE), [log])
    message = slave.receive()
    size, gap = LOG.unpack(message.payload)
    assert (size, gap) == (1000, 0)
    slave.reply(R.SET_LOG_BASE, 0)
    assert master.receive().u64() == 0
    slave.window_write(14 * PAGE + 10, b"\x55")
    assert os.pread(log, 1, PAGE + 10) == b"\x55"
    memory = device.query()["memory"]
    assert [(one["offset"], one["size"], one["log"]) for one in memory] == [
        (0, 4 * PAGE, False),
        (4 * PAGE, 8 * PAGE, False),
        (12 * PAGE, 2 * PAGE, False),
        (14 * PAGE, 1000, True),
    ]


def test_all_but_mmap_offset_of_a_table_is_as_the_master_said(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    regions = table_of(master)
    master.set_mem_table(regions)
    payload = slave.receive().payload
    assert struct.unpack_from("<I", payload) == (len(regions),)
    for index, region in enumerate(regions):
        guest, size, user, offset = struct.unpack_from("<QQQQ", payload, 8 + 32 * index)
        assert (guest, size, user, offset) == (region.guest, region.size, region.user, 0)


def test_an_empty_place_of_the_window_reads_0(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    regions = table_of(master)
    master.set_mem_table(regions)
    slave.receive()
    assert slave.window_read(14 * PAGE - 4, 8) == b"\3\3\3\3\0\0\0\0"
    assert slave.window_read(SHARED - 8, 8) == bytes(8)
    slave.window_write(SHARED - 8, b"nothing!")
    assert slave.window_read(SHARED - 8, 8) == bytes(8)


def test_a_table_replaces_the_one_before(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    first, second, third = table_of(master)
    master.set_mem_table([first, second])
    slave.receive()
    if isinstance(slave, QemuSlave):
        slave.operations.clear()
    master.set_mem_table([first, third])
    assert places(slave.receive().payload) == [0, 4 * PAGE]
    assert slave.window_read(0, PAGE) == b"\1" * PAGE
    assert slave.window_read(4 * PAGE, 2 * PAGE) == b"\3" * 2 * PAGE
    assert slave.window_read(6 * PAGE, PAGE) == bytes(PAGE)
    if isinstance(slave, QemuSlave):
        assert slave.operations == [("unmap", 4 * PAGE, 8 * PAGE), ("map", 4 * PAGE, 2 * PAGE)], "the first one stays"
    master.set_mem_table([])
    assert slave.receive().request == R.SET_MEM_TABLE
    assert slave.window_read(0, 7 * PAGE) == bytes(7 * PAGE)


def test_the_driver_sees_the_message_when_the_memory_is_there(device: Device) -> None:
    """And not a moment before: its answer to the message may be to look."""
    slave = device.boot()
    master = device.connect()
    for number in range(20):
        fd = master.memfd(PAGE, bytes([number + 1]) * PAGE)
        master.set_mem_table([Region(0, PAGE, 0, 0, fd)])
        slave.receive()
        assert slave.window_read(0, 4) == bytes([number + 1]) * 4


def test_the_log_may_be_replaced_and_memory_stay(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    regions = table_of(master)[:1]
    master.set_mem_table(regions)
    slave.receive()
    for number in range(3):
        log = master.memfd(2 * PAGE, bytes([number + 9]) * PAGE, PAGE)
        master.send(R.SET_LOG_BASE, LOG.pack(PAGE, PAGE), [log])
        slave.receive()
        slave.reply(R.SET_LOG_BASE, 0)
        master.receive()
        assert slave.window_read(4 * PAGE, 2) == bytes([number + 9]) * 2
        assert slave.window_read(0, 2) == b"\1\1"


def test_memory_stays_until_slave_up_then_goes(device: Device) -> None:
    slave = device.boot()
    master = device.connect()
    master.set_mem_table(table_of(master))
    slave.receive()
    master.close()
    assert slave.config_changes()
    assert slave.status == 0
    assert slave.window_read(0, 4) == b"\1\1\1\1", "a processor of the driver's may still look there"
    slave.window_write(0, b"still")
    assert slave.window_read(0, 5) == b"still"
    slave.up()
    second = device.connect()
    exchange(second, slave, R.GET_FEATURES, b"", 0)
    assert slave.window_read(0, 4) == bytes(4)
    if isinstance(slave, QemuSlave):
        assert not slave.maps
    assert device.query()["memory"] == []


@pytest.mark.parametrize("mapped", [False, True])
def test_a_ram_file_is_shown_where_it_is(ram_device: Device, mapped: bool) -> None:
    """The window's start shows the file for good, so a region's place is its place in the file."""
    slave = ram_device.boot(mapped=mapped)
    assert isinstance(slave, PciSlave)
    assert {offset: len(area) for offset, area in slave.areas.items()} == ({0: RAM_SIZE} if mapped else {})
    master = ram_device.connect()
    fd = os.open(ram_device.rig.ram, os.O_RDWR)
    try:
        os.pwrite(fd, b"low", 0)
        os.pwrite(fd, b"high", 0xC_0000)
        # the hole of a PC below 1 MiB
        regions = [Region(0, 0xA_0000, 0, 0, fd), Region(0xC_0000, 0x4_0000, 0xC_0000, 0xC_0000, fd)]
        master.set_mem_table(regions)
        message = slave.receive()
        assert places(message.payload) == [0, 0xC_0000]
        assert slave.window_read(0, 3) == b"low"
        assert slave.window_read(0xC_0000, 4) == b"high"
        slave.window_write(0xC_0004, b"er")
        assert os.pread(fd, 6, 0xC_0000) == b"higher"
        log = master.memfd(PAGE)
        master.send(R.SET_LOG_BASE, LOG.pack(PAGE, 0), [log])
        size, gap = LOG.unpack(slave.receive().payload)
        assert (size, 0x10_0000 + gap) == (PAGE, RAM_SIZE), "behind the file, not over it"
        slave.window_write(RAM_SIZE, b"log")
        assert os.pread(log, 3, 0) == b"log"
    finally:
        os.close(fd)


def test_a_ram_files_regions_cannot_change_places(ram_device: Device) -> None:
    ram_device.boot()
    master = ram_device.connect()
    fd = os.open(ram_device.rig.ram, os.O_RDWR)
    try:
        master.set_mem_table([Region(PAGE, PAGE, 0, PAGE, fd), Region(0, PAGE, PAGE, 0, fd)])
        ram_device.wait_rule("shared-memory.order")
    finally:
        os.close(fd)


def test_needs_reset_is_shown_and_a_reset_ends_it(pci_device: Device) -> None:
    slave = pci_device.boot()
    assert isinstance(slave, PciSlave)
    slave.transmit(b"short", wait=False)
    pci_device.wait_broken("message.size")
    assert slave.device.status & Status.NEEDS_RESET
    slave.reset()
    assert not slave.device.status
    pci_device.slave = slave.start()
    pci_device.works()
