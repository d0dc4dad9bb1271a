// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtio-vhost-user device as a PCI function over vfio-user: what its driver sees (v5; design D8), each rule by name.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/vfio.rs"]
mod vfio;
#[path = "common/vvu.rs"]
mod vvu;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::memfd;
use vfio::{access, dma_map, longs, until, words, GET_REGION_INFO, RESET, SET_IRQS, WRITE_MULTI};
use vhu_core::function::{DEVICE_OFFSET, NOTIFY_OFFSET};
use vhu_core::vvu::{Options, MASTER_UP, MAX_QUEUES, SLAVE_UP};
use vvu::*;

const EINVAL: u32 = libc::EINVAL as u32;
const LOG: u16 = 2 * N + 2;

fn call(queue: u16) -> u16 {
    2 * queue + 2
}

fn err(queue: u16) -> u16 {
    2 * queue + 3
}

/// The vector that [`Slave::start`] has mapped for an index.
fn vector(index: u16) -> usize {
    usize::from(index) + 1
}

// --- what is where

#[test]
fn identity_and_capabilities() {
    let bed = Bed::new();
    let mut slave = bed.slave();
    assert_eq!(slave.get(CONFIG, 0, 4), 0x1060_1af4);
    assert_eq!(slave.get(CONFIG, 8, 1), 1, "revision");
    let names = bed.function.info().capabilities;
    assert_eq!(
        names,
        [
            "virtio-common",
            "virtio-isr",
            "virtio-device",
            "virtio-notify",
            "virtio-pci-cfg",
            "virtio-shared-memory",
            "msix",
            "power",
            "express"
        ]
    );
    // All special indices have a notification address.
    let notify = slave.find(9, Some(2)).unwrap();
    assert_eq!(slave.get(CONFIG, notify + 12, 4), 4 * u32::from(2 * N + 3));
    assert_eq!(slave.get(CONFIG, notify + 16, 4), 4);
    let device = slave.find(9, Some(4)).unwrap();
    assert_eq!(slave.get(CONFIG, device + 12, 4), 24);
    assert_eq!(slave.find(9, Some(6)), None, "v4's doorbells");
    assert_eq!(slave.find(9, Some(7)), None, "v4's notifications");
    let config = slave.client.read(MODERN, DEVICE_OFFSET.into(), 24).unwrap();
    assert_eq!(config[..8], words(&[0, N.into()])[..]);
    assert_eq!(&config[8..], b"0123456789abcdef");
}

#[test]
fn shared_memory_is_one_region_in_a_64_bit_prefetchable_bar() {
    let size = 4 << 30;
    let bed = Bed::with(Options {
        shared_memory: size,
        ..options()
    });
    let mut slave = bed.slave();
    let at = slave.find(9, Some(8)).unwrap();
    let next = slave.get(CONFIG, at + 1, 1);
    let mut wanted = words(&[9 | next << 8 | 24 << 16 | 8 << 24, 4]);
    // Offset and length, lower halves first; padding and id are 0.
    wanted.extend(words(&[0, 0, 0, 1]));
    assert_eq!(slave.client.read(CONFIG, at, 24), Ok(wanted));
    let again = u64::from(next);
    assert_ne!(slave.get(CONFIG, again, 1), 9, "one region");
    let mut info = words(&[32, 3, 4, 0]);
    info.extend(longs(&[size, 0]));
    let asked = words(&[32, 0, 4, 0, 0, 0, 0, 0]);
    assert_eq!(slave.client.ask(GET_REGION_INFO, &asked), Ok(info));
    // As firmware asks for the size.
    assert_eq!(slave.get(CONFIG, 0x20, 4), 0xc);
    slave.put(CONFIG, 0x20, 4, u32::MAX);
    slave.put(CONFIG, 0x24, 4, u32::MAX);
    assert_eq!(
        (slave.get(CONFIG, 0x20, 4), slave.get(CONFIG, 0x24, 4)),
        (0xc, u32::MAX)
    );
}

#[test]
fn as_many_queues_as_possible() {
    let bed = Bed::with(Options {
        max_queues: MAX_QUEUES,
        ..options()
    });
    let mut slave = bed.slave();
    let notify = slave.find(9, Some(2)).unwrap();
    assert_eq!(slave.get(CONFIG, notify + 12, 4), 4 * 255);
    slave.select(2 * MAX_QUEUES + 2);
    assert_eq!(slave.common(30, 2), 254);
    slave.select(2 * MAX_QUEUES + 3);
    assert_eq!(slave.common(30, 2), 0);
}

// --- special indices (7.4)

#[test]
fn special_indices_are_no_queues() {
    let bed = Bed::new();
    let mut slave = bed.slave();
    assert_eq!(slave.common(18, 2), 2, "num_queues");
    for index in 2..2 * N + 3 {
        slave.select(index);
        assert_eq!(slave.common(24, 2), 0, "queue_size");
        slave.set_common(24, 2, 16);
        slave.set_common(28, 2, 1);
        slave.set_common(32, 4, 0x10_0000);
        slave.set_common(58, 2, 1);
        for (field, width) in [(24, 2), (28, 2), (32, 4), (36, 4), (40, 4), (48, 4), (58, 2)] {
            assert_eq!(slave.common(field, width), 0, "field {field} of {index}");
        }
        assert_eq!(slave.common(30, 2), u32::from(index), "queue_notify_off");
        assert_eq!(slave.common(56, 2), u32::from(index), "queue_notif_config_data");
    }
    for index in [2 * N + 3, 0x7fff, 0xffff] {
        slave.select(index);
        assert_eq!((slave.common(24, 2), slave.common(30, 2)), (0, 0));
        assert_eq!(slave.set_vector(index, 1), NO_VECTOR, "there is no {index}");
    }
}

#[test]
fn only_kick_notifications_take_vectors() {
    let bed = Bed::new();
    let mut slave = bed.slave();
    slave.enable_msix();
    for queue in 0..N {
        let index = call(queue);
        for wanted in [3, 0, u32::from(VECTORS) - 1] {
            assert_eq!(slave.set_vector(index, wanted), wanted);
        }
        assert_eq!(slave.set_vector(index, VECTORS.into()), NO_VECTOR, "beyond the table");
        assert_eq!(slave.set_vector(index, 1), 1);
        assert_eq!(slave.set_vector(index, NO_VECTOR), NO_VECTOR);
        assert_eq!(slave.set_vector(err(queue), 1), NO_VECTOR, "an err doorbell");
    }
    assert_eq!(slave.set_vector(LOG, 1), NO_VECTOR, "the log's doorbell");
}

#[test]
fn no_vectors_after_a_reset() {
    let bed = Bed::new();
    let mut slave = bed.slave();
    slave.enable_msix();
    let check = |slave: &mut Slave| {
        assert_eq!(slave.common(16, 2), NO_VECTOR);
        for index in 0..2 * N + 3 {
            slave.select(index);
            assert_eq!(slave.common(26, 2), NO_VECTOR, "index {index}");
        }
    };
    check(&mut slave);
    slave.start();
    slave.select(call(1));
    assert_eq!(slave.common(26, 2), call(1) as u32 + 1);
    slave.set_common(20, 1, 0);
    until("the reset", || slave.device_status() == 0);
    check(&mut slave);
    slave.start();
    slave.client.ask(RESET, &[]).unwrap();
    check(&mut slave);
}

// --- doorbells (7.4)

#[test]
fn a_doorbell_works_from_its_message_on() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    let cases = [
        (SET_VRING_CALL, 1, call(1)),
        (SET_VRING_ERR, 0, err(0)),
        (SET_VRING_ERR, 1, err(1)),
        (SET_VRING_CALL, 0, call(0)),
    ];
    for (request, queue, index) in cases {
        slave.notify(index);
        let (theirs, ours) = pair();
        master.number(request, queue, vec![theirs]);
        assert!(quiet(&ours), "rung before it was there");
        slave.notify(index);
        wait_signal("the doorbell", &ours);
        // 32 bits are as good, and so is any place in the structure: what is written counts.
        slave.put(MODERN, u64::from(NOTIFY_OFFSET), 4, index.into());
        wait_signal("the doorbell, by words", &ours);
        for other in (0..2 * N + 4).filter(|&other| other != index) {
            slave.notify(other % (2 * N + 3));
        }
        slave.notify(0);
        // Another descriptor, then none.
        let (theirs, other) = pair();
        master.number(request, queue, vec![theirs]);
        signalled(&ours);
        slave.notify(index);
        wait_signal("the new descriptor", &other);
        master.number(request, queue | 1 << 8, vec![]);
        slave.notify(index);
        assert!(quiet(&other) && quiet(&ours));
    }
}

#[test]
fn the_logs_doorbell() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    slave.notify(LOG);
    let (theirs, ours) = pair();
    master.say(SET_LOG_FD, &[], vec![theirs]);
    slave.notify(call(0));
    slave.notify(err(N - 1));
    assert!(quiet(&ours));
    slave.notify(LOG);
    wait_signal("the log's doorbell", &ours);
    assert_eq!(bed.device.info().log_bell, (2, 1));
}

#[test]
fn unbacked_doorbells_are_ignored() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    for index in 2..2 * N + 3 {
        slave.notify(index);
    }
    let _master = bed.master();
    for index in 2..2 * N + 3 {
        slave.notify(index);
    }
    for index in [2 * N + 3, 0x100, 0xffff] {
        slave.put(MODERN, u64::from(NOTIFY_OFFSET), 2, index.into());
    }
    let info = bed.device.info();
    for queue in &info.queues {
        assert_eq!((queue.call, queue.err, queue.kick), ((2, 2), (2, 2), (0, 0)));
    }
    assert_eq!(info.log_bell, (2, 2));
    assert_eq!((slave.device_status(), bed.broken()), (0xf, None));
}

#[test]
fn no_doorbells_before_driver_ok() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    slave.prepare();
    slave.notify(call(0));
    slave.notify(LOG);
    let info = bed.device.info();
    assert_eq!((info.queues[0].call, info.log_bell), ((0, 0), (0, 0)));
}

/// A message of many writes is one visit, and its eventfds are signalled in it; there may be any number of visits.
#[test]
fn a_flood_of_doorbells() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    let (theirs, ours) = pair();
    master.number(SET_VRING_CALL, 1, vec![theirs]);
    let mut body = longs(&[1024]);
    for n in 0..1024u16 {
        let index = if n % 2 == 0 { call(1) } else { 2 + n % 600 };
        body.extend(longs(&[NOTIFY_OFFSET.into()]));
        body.extend(words(&[MODERN, 2, index.into(), 0]));
    }
    for _ in 0..50 {
        slave.client.send(WRITE_MULTI, vfio::NO_REPLY, &body);
    }
    wait_signal("the doorbell", &ours);
    let (rung, ignored) = {
        slave.device_status();
        bed.device.info().queues[1].call
    };
    assert!(rung >= 50 * 512, "{rung}");
    assert_eq!(ignored, 0);
    slave.notify(call(1));
    wait_signal("the doorbell, once more", &ours);
}

// --- kick notifications (7.4)

#[test]
fn a_kick_interrupts_through_the_vector_of_its_index() {
    let bed = Bed::new();
    let (mut slave, vectors) = bed.up();
    let master = bed.master();
    wait_signal("MASTER_UP", &vectors[0]);
    slave.isr();
    let kicks = [0, 1].map(|queue| {
        let (theirs, ours) = pair();
        master.number(SET_VRING_KICK, queue, vec![theirs]);
        ours
    });
    for queue in [1, 0] {
        vhu_core::sys::eventfd_signal(&kicks[usize::from(queue)]);
        wait_signal("the kick", &vectors[vector(call(queue))]);
        for (other, fd) in vectors.iter().enumerate() {
            assert!(!signalled(fd), "vector {other} for queue {queue}");
        }
    }
    assert_eq!(slave.isr(), 0, "MSI-X is enabled");
    // Another vector, while it runs.
    assert_eq!(slave.set_vector(call(0), 6), 6);
    vhu_core::sys::eventfd_signal(&kicks[0]);
    wait_signal("the new vector", &vectors[6]);
    slave.set_vector(call(0), NO_VECTOR);
    vhu_core::sys::eventfd_signal(&kicks[0]);
    until("counted", || bed.device.info().queues[0].kick == (3, 0));
    assert!(vectors.iter().all(|fd| !signalled(fd)));
    // It is kept for when there is a vector again.
    assert_eq!(slave.set_vector(call(0), 6), 6);
    wait_signal("the kick that was kept", &vectors[6]);
    // Without a descriptor there are no kicks any more.
    master.number(SET_VRING_KICK, 1 << 8 | 1, vec![]);
    vhu_core::sys::eventfd_signal(&kicks[1]);
    assert!(quiet(&vectors[vector(call(1))]));
}

#[test]
fn a_kick_sets_bit_2_of_the_isr_without_msix() {
    let bed = Bed::new();
    let mut slave = bed.slave();
    let intx = slave.assign(0, 1).remove(0);
    slave.start();
    slave.set_status(1);
    let master = bed.master();
    wait_signal("MASTER_UP", &intx);
    assert_eq!(slave.isr(), 2);
    let (theirs, kick) = pair();
    master.number(SET_VRING_KICK, 1, vec![theirs]);
    slave.receive();
    wait_signal("rxq", &intx);
    assert_eq!(slave.isr(), 1, "rxq is a queue");
    vhu_core::sys::eventfd_signal(&kick);
    wait_signal("the kick", &intx);
    assert_ne!(slave.get(CONFIG, 6, 2) & 8, 0, "Interrupt Status");
    assert_eq!(slave.isr(), 4);
    assert_eq!(slave.isr(), 0, "cleared by reading");
    assert_eq!(slave.get(CONFIG, 6, 2) & 8, 0);
    // Disabled by the driver: it is still there when INTx is enabled again.
    slave.put(CONFIG, 4, 2, 0x406);
    vhu_core::sys::eventfd_signal(&kick);
    assert!(quiet(&intx));
    slave.put(CONFIG, 4, 2, 6);
    wait_signal("after INTx Disable", &intx);
    // The client masks by itself, and unmasks when the driver has handled it.
    slave.client.ask(SET_IRQS, &words(&[20, 0x21, 0, 0, 1])).unwrap();
    signalled(&intx);
    slave.client.ask(SET_IRQS, &words(&[20, 0x11, 0, 0, 1])).unwrap();
    wait_signal("still asserted", &intx);
    assert_eq!(slave.isr(), 4);
}

#[test]
fn kicks_before_driver_ok_are_ignored() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    let (theirs, kick) = pair();
    master.number(SET_VRING_KICK, 0, vec![theirs]);
    slave.set_common(20, 1, 0);
    until("the reset", || slave.device_status() == 0);
    vhu_core::sys::eventfd_signal(&kick);
    let intx = slave.assign(0, 1).remove(0);
    assert!(quiet(&intx));
    assert_eq!(slave.isr(), 0);
}

// --- configuration (7.1)

#[test]
fn master_up_and_down_are_told() {
    let bed = Bed::new();
    let (mut slave, vectors) = bed.up();
    assert_eq!(slave.status(), SLAVE_UP);
    assert!(quiet(&vectors[0]), "the driver's own writes");
    let before = slave.common(21, 1);
    let master = bed.master();
    wait_signal("MASTER_UP", &vectors[0]);
    assert_eq!(slave.isr(), 2, "with MSI-X, too");
    assert_eq!(slave.status(), SLAVE_UP | MASTER_UP);
    assert_ne!(slave.common(21, 1), before, "config_generation");
    assert!(master.leave());
    wait_signal("the master's end", &vectors[0]);
    assert_eq!(slave.status(), 0);
    assert!(!master.leave(), "once only");
    slave.set_status(1);
    bed.master();
    wait_signal("the next master", &vectors[0]);
}

#[test]
fn the_driver_sends_the_master_away_without_notification() {
    let bed = Bed::new();
    let (mut slave, vectors) = bed.up();
    let master = bed.master();
    wait_signal("MASTER_UP", &vectors[0]);
    slave.isr();
    bed.relay_events();
    slave.set_status(0);
    assert_eq!((slave.status(), bed.device.session()), (0, None));
    assert!(bed.relay_events() > 0);
    assert!(quiet(&vectors[0]));
    assert_eq!(slave.isr(), 0);
    assert!(!master.leave());
    assert_eq!(master.send(SET_OWNER, &[], vec![]).err().unwrap().rule, "message.order");
}

#[test]
fn undefined_status_bits_need_a_reset() {
    for (offset, data) in [(0, vec![5, 0, 0, 0]), (0, vec![4]), (3, vec![0x80]), (1, vec![1, 0])] {
        let bed = Bed::new();
        let (mut slave, _) = bed.up();
        let address = u64::from(DEVICE_OFFSET) + offset;
        slave.client.write_region(MODERN, address, &data).unwrap();
        assert_eq!(bed.broken(), Some("config.status"));
        assert_eq!(slave.device_status(), 0x4f);
        assert!(!bed.device.slave_up(), "no master gets a broken slave");
        assert!(bed.device.connect_master().is_err());
        slave.start();
        slave.set_status(1);
        assert_eq!((bed.broken(), slave.status()), (None, SLAVE_UP));
        bed.master();
    }
}

#[test]
fn read_only_configuration() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    bed.master();
    let before = slave.client.read(MODERN, DEVICE_OFFSET.into(), 24).unwrap();
    // What was read and SLAVE_UP, as drivers that know only 32-bit accesses write it.
    slave
        .client
        .write_region(MODERN, DEVICE_OFFSET.into(), &before)
        .unwrap();
    let address = u64::from(DEVICE_OFFSET) + 4;
    slave.client.write_region(MODERN, address, &[0xff; 20]).unwrap();
    assert_eq!(slave.client.read(MODERN, DEVICE_OFFSET.into(), 24), Ok(before));
    assert_eq!(bed.broken(), None);
}

#[test]
fn a_master_waits_for_the_rings() {
    let bed = Bed::new();
    let mut slave = bed.slave();
    slave.prepare();
    slave.set_status(1);
    assert!(!bed.device.slave_up(), "no DRIVER_OK");
    assert!(bed.device.connect_master().is_err());
    bed.relay_events();
    slave.set_common(20, 1, 0xf);
    assert!(bed.device.slave_up());
    assert!(bed.relay_events() > 0, "the relay hears of it");
    bed.master();
}

// --- shared memory (7.5)

#[test]
fn trapped_accesses_reach_the_masters_memory() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let all = vec![0; REGION as usize];
    assert_eq!(slave.client.read(SHARED, 0, REGION as u32), Ok(all), "no master yet");
    slave.client.write_region(SHARED, 0, &[1; 64]).unwrap();
    let master = bed.master();
    let files = [memfd(0x3000), memfd(0x10_0000)];
    files[0].write_all_at(b"first", 0x1000).unwrap();
    files[1].write_all_at(b"second", 0x8_0000).unwrap();
    let taken = master.memory(&[(0x10_0000, 0x2000, 0x1000, &files[0]), (0, 0x1000, 0x8_0000, &files[1])]);
    assert!(taken.unwrap().operations.is_empty());
    assert_eq!(slave.client.read(SHARED, 0, 5), Ok(b"first".to_vec()));
    assert_eq!(slave.client.read(SHARED, 0x2000, 6), Ok(b"second".to_vec()));
    // Every width, on both sides of and across the edge between the regions, and across the last one's end.
    for width in [1, 2, 4, 8, 3, 16] {
        for start in [0x1ff0, 0x2000 - width / 2, 0x2000, 0x3000 - width / 2, 0x3000 - width] {
            let data: Vec<u8> = (0..width).map(|n| (n * 7 + start) as u8 | 1).collect();
            slave.client.write_region(SHARED, start, &data).unwrap();
            let inside = (0x3000 - start).min(width) as usize;
            let mut read = data[..inside].to_vec();
            read.resize(width as usize, 0);
            assert_eq!(slave.client.read(SHARED, start, width as u32), Ok(read));
            for (at, byte) in (start..).zip(&data[..inside]) {
                let (file, offset) = match at {
                    0..0x2000 => (&files[0], 0x1000 + at),
                    _ => (&files[1], 0x8_0000 + at - 0x2000),
                };
                let mut found = [0];
                file.read_exact_at(&mut found, offset).unwrap();
                assert_eq!(found[0], *byte, "{width} bytes at {start:#x}");
            }
        }
    }
    // All of it at once.
    let mut wanted = vec![0; REGION as usize];
    files[0].read_exact_at(&mut wanted[..0x2000], 0x1000).unwrap();
    files[1].read_exact_at(&mut wanted[0x2000..0x3000], 0x8_0000).unwrap();
    assert_eq!(slave.client.read(SHARED, 0, REGION as u32), Ok(wanted));
    slave
        .client
        .write_region(SHARED, 0, &vec![0x55; REGION as usize])
        .unwrap();
    let mut byte = [0; 2];
    files[1].read_exact_at(&mut byte, 0x8_0fff).unwrap();
    assert_eq!(byte, [0x55, 0], "nothing behind the region was written");
    files[1].read_exact_at(&mut byte, 0x7_ffff).unwrap();
    assert_eq!(byte, [0, 0x55], "nor before it");
}

#[test]
fn accesses_beyond_the_shared_memory_are_refused() {
    let bed = Bed::new();
    let mut slave = bed.slave();
    for (offset, count) in [(REGION, 1), (REGION - 3, 4), (u64::MAX - 3, 4), (u64::MAX, 1)] {
        assert_eq!(slave.client.read(SHARED, offset, count), Err(EINVAL));
        let data = vec![0; count as usize];
        assert_eq!(slave.client.write_region(SHARED, offset, &data), Err(EINVAL));
    }
    assert_eq!(slave.client.read(SHARED, REGION - 4, 4), Ok(vec![0; 4]));
    assert_eq!(slave.client.read(5, 0, 1), Err(EINVAL), "the upper half is no BAR");
}

#[test]
fn shared_memory_through_the_configuration_space() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    let file = memfd(0x1000);
    master.memory(&[(0, 0x1000, 0, &file)]).unwrap();
    let window = slave.find(9, Some(5)).unwrap();
    slave.put(CONFIG, window + 4, 1, SHARED);
    slave.put(CONFIG, window + 8, 4, 0x10);
    slave.put(CONFIG, window + 12, 4, 4);
    slave.put(CONFIG, window + 16, 4, 0x1234_5678);
    assert_eq!(slave.get(SHARED, 0x10, 4), 0x1234_5678);
    assert_eq!(slave.get(CONFIG, window + 16, 4), 0x1234_5678);
    // The last word, and the one behind it.
    slave.put(CONFIG, window + 8, 4, REGION as u32 - 4);
    assert_eq!(slave.get(CONFIG, window + 16, 4), 0);
    slave.put(CONFIG, window + 8, 4, REGION as u32);
    slave.put(CONFIG, window + 16, 4, 7);
    assert_eq!(slave.get(SHARED, 0x10, 4), 0x1234_5678);
}

#[test]
fn memory_stays_after_the_master_until_the_next_one() {
    let bed = Bed::new();
    let (mut slave, _) = bed.up();
    let master = bed.master();
    let file = memfd(0x1000);
    file.write_all_at(b"there", 0).unwrap();
    master.memory(&[(0, 0x1000, 0, &file)]).unwrap();
    master.leave();
    assert_eq!(
        slave.client.read(SHARED, 0, 5),
        Ok(b"there".to_vec()),
        "the driver may be looking"
    );
    slave.set_status(1);
    assert!(bed.device.leftovers().is_empty(), "nobody else has to unmap it");
    assert_eq!(slave.client.read(SHARED, 0, 5), Ok(vec![0; 5]));
}

fn ram() -> File {
    let file = memfd(0x4_0000);
    for page in 0..0x40u64 {
        file.write_all_at(&longs(&[page]), page * 0x1000).unwrap();
    }
    file
}

#[test]
fn a_ram_file_can_be_mapped() {
    let file = ram();
    let bed = Bed::with_ram(&file, 0x4_0000);
    let mut slave = bed.slave();
    let ask = |room: u32| words(&[room, 0, SHARED, 0, 0, 0, 0, 0]);
    let mut wanted = words(&[64, 0xf, SHARED, 32]);
    wanted.extend(longs(&[REGION, 0]));
    let (body, fds) = slave.client.ask_with_fds(GET_REGION_INFO, &ask(32));
    assert_eq!((body, fds.len()), (wanted.clone(), 0));
    wanted.extend([1, 0, 1, 0]);
    wanted.extend(words(&[0, 1, 0]));
    wanted.extend(longs(&[0, 0x4_0000]));
    let (body, fds) = slave.client.ask_with_fds(GET_REGION_INFO, &ask(64));
    assert_eq!(body, wanted);
    fds[0].write_all_at(b"mapped", 0x123).unwrap();
    // The same bytes, mapped or not, with a master or without.
    assert_eq!(slave.client.read(SHARED, 0x123, 6), Ok(b"mapped".to_vec()));
    assert_eq!(slave.get(SHARED, 0x3_f000, 4), 0x3f);
    assert_eq!(slave.get(SHARED, 0x4_0000, 4), 0);
    slave.put(SHARED, 0x2000, 4, 0xcafe);
    let mut word = [0; 4];
    file.read_exact_at(&mut word, 0x2000).unwrap();
    assert_eq!(u32::from_le_bytes(word), 0xcafe);
    slave.start();
    slave.set_status(1);
    let master = bed.master();
    // Regions in the file are where they are; the log comes behind it.
    let log = memfd(0x1000);
    log.write_all_at(b"log", 0).unwrap();
    master
        .memory(&[(0, 0xa000, 0, &file), (0x10_0000, 0x8000, 0x1_0000, &file)])
        .unwrap();
    master.log(0x800, 0, &log).unwrap();
    let table = slave.receive();
    let offset = |row: usize| u64::from_le_bytes(table[20 + 32 * row + 24..][..8].try_into().unwrap());
    assert_eq!((offset(0), offset(1)), (0, 0x6000));
    let base = slave.receive();
    assert_eq!(base[20..28], longs(&[0x4_0000 - 0x1_8000]));
    assert_eq!(slave.get(SHARED, 0x1_0000, 4), 0x10);
    assert_eq!(slave.client.read(SHARED, 0x4_0000, 3), Ok(b"log".to_vec()));
    drop(slave);
    bed.free();
    let mut slave = bed.slave();
    assert_eq!(
        (slave.get(SHARED, 0x1_0000, 4), slave.get(SHARED, 0x4_0000, 4)),
        (0x10, 0)
    );
}

/// QEMU lets the device do DMA to the BAR that it has mapped, and has no fd for that.
#[test]
fn a_mapped_bar_is_dma_memory_like_any_other() {
    let file = ram();
    let bed = Bed::with_ram(&file, 0x4_0000);
    let mut slave = bed.slave();
    let bar = 0x80_0000_0000;
    slave.put(CONFIG, 0x20, 4, bar as u32);
    slave.put(CONFIG, 0x24, 4, (bar >> 32) as u32);
    slave.put(CONFIG, 4, 2, 6);
    slave.client.ask(vfio::DMA_MAP, &dma_map(3, 0, bar, 0x4_0000)).unwrap();
    slave.start();
    let info = bed.member.info();
    assert!(
        info.queues[..2].iter().all(|queue| queue.worker.is_some()),
        "no threads"
    );
    // A ring's buffer there.
    slave.set_status(1);
    let master = bed.master();
    master.say(SET_OWNER, &[], vec![]);
    slave
        .rx
        .descriptor(&slave.guest, 0, bar + 0x3000, RX_SIZE, common::WRITE, 0);
    slave.rx.offer(&slave.guest, 0);
    slave.notify(0);
    until("the message", || slave.has_message());
    let mut bytes = [0; 12];
    file.read_exact_at(&mut bytes, 0x3000).unwrap();
    assert_eq!(bytes, head(SET_OWNER, VERSION, 0));
    slave
        .client
        .ask(vfio::DMA_UNMAP, &vfio::dma_unmap(0, bar, 0x4_0000))
        .unwrap();
    // Elsewhere, and larger than what is mapped, it is memory that only the client has.
    for (iova, size) in [
        (bar + 0x8_0000, 0x1000),
        (bar + 0x3_f000, 0x2000),
        (0x9000_0000, 0x1000),
    ] {
        slave.client.ask(vfio::DMA_MAP, &dma_map(3, 0, iova, size)).unwrap();
        let info = bed.member.info();
        assert!(info.memory.iter().any(|region| region.guest == iova));
        slave.start();
        let info = bed.member.info();
        assert!(info.queues[..2].iter().all(|queue| queue.worker.is_none()), "threads");
        slave
            .client
            .ask(vfio::DMA_UNMAP, &vfio::dma_unmap(0, iova, size))
            .unwrap();
    }
}

// --- resets

fn check_everything_is_gone(bed: &Bed, slave: &mut Slave, master: &Master, what: &str) {
    assert_eq!(bed.device.session(), None, "{what}");
    let info = bed.device.info();
    assert_eq!(info.status, 0, "{what}");
    assert!(info.memory.is_empty(), "{what}");
    assert!(
        info.queues.iter().all(|queue| queue.connected == (false, false)),
        "{what}"
    );
    assert!(bed.relay_events() > 0, "{what}");
    assert!(!master.leave(), "{what}");
    slave.start();
    assert_eq!(slave.status(), 0, "{what}");
    assert_eq!(slave.get(SHARED, 0, 4), 0, "{what}");
}

#[test]
fn every_reset_ends_the_session() {
    let bed = Bed::new();
    let (mut slave, vectors) = bed.up();
    let file = memfd(0x1000);
    file.write_all_at(b"gone", 0).unwrap();
    for what in ["device status 0", "DEVICE_RESET", "function level reset"] {
        slave.set_status(1);
        let master = bed.master();
        let (theirs, kick) = pair();
        let (theirs_too, bell) = pair();
        master.number(SET_VRING_KICK, 0, vec![theirs]);
        master.number(SET_VRING_CALL, 0, vec![theirs_too]);
        master.memory(&[(0, 0x1000, 0, &file)]).unwrap();
        bed.relay_events();
        match what {
            "device status 0" => slave.set_common(20, 1, 0),
            "DEVICE_RESET" => assert_eq!(slave.client.ask(RESET, &[]), Ok(vec![])),
            _ => {
                let express = slave.find(0x10, None).unwrap();
                slave.put(CONFIG, express + 8, 2, 0x8000);
            }
        }
        let msix = slave.find(0x11, None).unwrap();
        slave.put(CONFIG, msix + 2, 2, 0x8000);
        check_everything_is_gone(&bed, &mut slave, &master, what);
        for fd in &vectors {
            signalled(fd);
        }
        vhu_core::sys::eventfd_signal(&kick);
        slave.notify(call(0));
        assert!(quiet(&bell), "{what}");
        assert!(vectors.iter().all(|fd| !signalled(fd)), "{what}");
    }
    assert_eq!(bed.device.info().resets, 3);
}

#[test]
fn the_end_of_the_client_ends_the_session() {
    let bed = Bed::new();
    let (slave, _) = bed.up();
    let master = bed.master();
    master.say(SET_OWNER, &[], vec![]);
    bed.relay_events();
    drop(slave);
    bed.free();
    assert!(!bed.device.slave_up());
    let mut slave = bed.slave();
    check_everything_is_gone(&bed, &mut slave, &master, "client");
    slave.set_status(1);
    bed.master();
    slave.post(RX_SIZE);
    assert!(!slave.has_message(), "the old master's message");
}

/// Whatever a client does, the next driver finds a device that works.
#[test]
fn random_accesses() {
    let file = ram();
    for seed in 0..8 {
        let bed = Bed::with_ram(&file, 0x4_0000);
        let mut random = common::Random::new(seed);
        let (mut slave, _) = bed.up();
        let master = bed.master();
        master.number(SET_VRING_CALL, 0, vec![eventfd()]);
        master.number(SET_VRING_KICK, 1, vec![eventfd()]);
        master.memory(&[(0, 0x1000, 0, &memfd(0x1000))]).unwrap();
        for _ in 0..2000 {
            let width = [1, 2, 4, 8][random.below(4) as usize];
            let (region, offset) = match random.below(8) {
                0 => (CONFIG, random.below(0x108)),
                1 => (SHARED, random.below(REGION)),
                2 | 3 => (MODERN, u64::from(NOTIFY_OFFSET) + random.below(64)),
                4 => (MODERN, u64::from(DEVICE_OFFSET) + random.below(28)),
                _ => (MODERN, random.below(64)),
            };
            let value = match random.below(3) {
                0 => random.next(),
                1 => random.below(16),
                _ => random.below(2),
            };
            if random.chance(30) {
                let _ = slave.client.read(region, offset, width);
            } else {
                let data = &value.to_le_bytes()[..width as usize];
                slave
                    .client
                    .send(vfio::REGION_WRITE, vfio::NO_REPLY, &access(offset, region, data));
            }
        }
        assert_eq!(slave.client.ask(RESET, &[]), Ok(vec![]));
        let vectors = slave.enable_msix();
        slave.start();
        slave.set_status(1);
        let master = bed.master();
        wait_signal("MASTER_UP", &vectors[0]);
        master.say(SET_OWNER, &[], vec![]);
        assert_eq!(slave.receive(), head(SET_OWNER, VERSION, 0));
    }
}
