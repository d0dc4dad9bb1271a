// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The owner: administration commands through in-process queues, on members whose rings run.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/owner.rs"]
mod fixture;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Guest, Ring, NEXT, WRITE};
use fixture::{blk, never, options, request, wait_until, Bed, Hanging, BASE, DATA, OK, SIZE};
use vhu_core::device::Device;
use vhu_core::event::{Completion, Waker};
use vhu_core::member::{Front, Member, MemberOptions};
use vhu_core::owner::command;
use vhu_core::owner::forward::Forwarder;
use vhu_core::owner::local::{header, Submitted};
use vhu_core::owner::trace::{Begun, Origin};
use vhu_core::owner::GroupOptions;
use vhu_core::vfio_user::function::Access;

#[test]
fn a_legacy_driver_by_commands_alone() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 1, 3, &[7; 512]);
    assert_eq!(bed.write(1, 16, &[0, 0]), OK);
    wait_until("written", || ring.used_idx(&guest) == 1);
    request(&guest, &mut ring, 1, 0, 3, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("read", || ring.used_idx(&guest) == 2);
    assert_eq!(guest.read(DATA + 0x1000 + 512, 512), vec![7; 512]);
    assert_eq!(guest.read(DATA + 0x1000 + 2048, 1), vec![0]);
    // Without MSI-X the interrupt is seen in the ISR status, once.
    assert_eq!(bed.read(1, 19, 1), 1);
    assert_eq!(bed.read(1, 19, 1), 0);
    // Capacity, as two halves and byte-wise.
    let config = |offset: u8, len: usize| bed.call(command::LEGACY_DEV_CFG_READ, command::SR_IOV, 1, &[offset], len);
    assert_eq!(config(0, 8).2, 2048u64.to_le_bytes());
    assert_eq!(config(4, 4).2, [0; 4]);
    assert_eq!(config(4, 8).0, 22, "two fields");
    assert_eq!(config(60, 1).0, 22, "beyond the end");
    // Reset: the ring is left alone afterwards.
    assert_eq!(bed.write(1, 18, &[0]), OK);
    assert_eq!(bed.read(1, 18, 1), 0);
    assert_eq!(bed.read(1, 8, 4), 0);
    request(&guest, &mut ring, 2, 0, 3, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_idx(&guest), 2);
}

#[test]
fn rings_run_before_driver_ok_and_features_may_come_late() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    bed.write(1, 8, &((BASE >> 12) as u32).to_le_bytes());
    let mut ring = Ring::legacy(BASE, 64, 4096);
    request(&guest, &mut ring, 0, 0, 0, &[1; 512]);
    assert_eq!(ring.used_idx(&guest), 0);
    bed.write(1, 16, &[0, 0]);
    wait_until("used", || ring.used_idx(&guest) == 1);
    // EVENT_IDX, with the ring running: the device's wishes are found in avail_event from now on.
    bed.write(1, 4, &(1u32 << 29).to_le_bytes());
    request(&guest, &mut ring, 1, 0, 0, &[1; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("used", || ring.used_idx(&guest) == 2);
    wait_until("asking for the next", || ring.avail_event(&guest) == 2);
}

#[test]
fn registers_written_in_pieces() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let pfn = (BASE >> 12) as u32;
    for (at, byte) in pfn.to_le_bytes().iter().enumerate() {
        assert_eq!(bed.read(1, 8, 4), 0, "nothing happens before the last byte");
        assert_eq!(bed.write(1, 8 + at as u8, &[*byte]), OK);
    }
    assert_eq!(bed.read(1, 8, 4), pfn);
    assert_eq!(bed.read(1, 9, 1), (pfn >> 8) & 0xff);
    // Outside one register, or of the region.
    for (offset, len) in [(18, 2), (10, 4), (20, 2), (24, 1), (0, 8), (0, 0)] {
        let (status, qualifier, result) = bed.call(command::LEGACY_COMMON_CFG_READ, command::SR_IOV, 1, &[offset], len);
        assert_eq!((status, qualifier, result.len()), (22, 3, 0), "({offset}, {len})");
    }
    member.set_msix_enabled(true);
    assert_eq!(bed.read(1, 20, 2), 0xffff);
    bed.write(1, 20, &[2, 0]);
    assert_eq!(bed.read(1, 20, 2), 2);
    bed.write(1, 22, &[3, 0]);
    assert_eq!(bed.read(1, 22, 2), 0xffff, "there are three vectors");
    bed.write(1, 18, &[0]);
    assert_eq!(bed.read(1, 20, 2), 0xffff, "unmapped by the reset");
}

#[test]
fn a_modern_and_a_legacy_view_of_one_state() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    bed.write(1, 18, &[3]);
    let mut byte = [0];
    member.modern_read(20, &mut byte);
    assert_eq!(byte, [3]);
    bed.write(1, 14, &[1, 0]);
    let mut word = [0; 2];
    member.modern_read(22, &mut word);
    assert_eq!(word, [1, 0]);
    member.modern_write(20, &[0], &never);
    assert_eq!(bed.read(1, 18, 1), 0);
    // A driver without VERSION_1 has no business in the modern view.
    member.modern_write(20, &[11], &never);
    member.modern_read(20, &mut byte);
    assert_eq!(byte, [3]);
    member.modern_write(8, &1u32.to_le_bytes(), &never);
    member.modern_write(12, &1u32.to_le_bytes(), &never);
    member.modern_write(20, &[11], &never);
    member.modern_read(20, &mut byte);
    assert_eq!(byte, [11]);
    // Sub-field and several fields at once.
    member.modern_write(32, &0x1122_3344_5566_7788u64.to_le_bytes(), &never);
    member.modern_write(34, &[0xaa, 0xbb], &never);
    let mut long = [0; 8];
    member.modern_read(32, &mut long);
    assert_eq!(u64::from_le_bytes(long), 0x1122_3344_bbaa_7788);
    let mut all = [0xff; 80];
    member.modern_read(0, &mut all);
    assert_eq!(all[64..], [0; 16]);
}

#[test]
fn a_command_that_waits_keeps_its_queue_in_order_and_others_free() {
    let bed = Bed::new();
    let (device, mut writer) = Hanging::new();
    let member = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
    bed.add(2, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("in flight", || device.started() == 1);
    let reset = bed.start_write(1, 18, &[0]);
    assert!(reset.ticket.is_some(), "the request is in flight");
    let behind = bed.start(command::LEGACY_COMMON_CFG_READ, command::SR_IOV, 2, &[18], 1);
    assert!(behind.ticket.is_some(), "in order");
    // Another queue isn't held up; the status still reads as before.
    let head = header(command::LEGACY_COMMON_CFG_READ, command::SR_IOV, 1);
    let mut out = [0; 9];
    let other = bed.group.queue(1).unwrap();
    let submitted = other
        .submit(&[&head, &[18]], &mut out, Origin::Admin, Begun::now(), never)
        .unwrap();
    assert_eq!(submitted, Submitted::Done(9));
    assert_eq!(out[8], 7);
    writer.write_all(b"x").unwrap();
    assert_eq!(bed.finish(reset).0, OK);
    assert_eq!(bed.finish(behind), (OK, 0, vec![0]));
    assert_eq!(bed.read(1, 18, 1), 0);
    assert_eq!(ring.used_idx(&guest), 1, "what was in flight was used");
}

#[test]
fn a_member_that_never_drains_costs_its_owner_half_a_second() {
    let bed = Bed::new();
    let (device, mut writer) = Hanging::new();
    let member = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("in flight", || device.started() == 1);
    let begun = Instant::now();
    assert_eq!(bed.write(1, 18, &[0]), 16);
    assert!((400..2000).contains(&begun.elapsed().as_millis()));
    assert_ne!(bed.read(1, 18, 1), 0, "the reset isn't over");
    // A driver that doesn't look goes on; its ring starts when the old one has ended.
    for byte in [1, 3] {
        bed.write(1, 18, &[byte]);
    }
    bed.write(1, 8, &((BASE >> 12) as u32).to_le_bytes());
    bed.write(1, 18, &[7]);
    guest.write(ring.addresses.driver, &[0; 4]);
    guest.write(ring.addresses.device, &[0; 4]);
    writer.write_all(b"x").unwrap();
    wait_until("reset", || bed.read(1, 18, 1) == 7);
    let mut ring = Ring::legacy(BASE, 64, 4096);
    guest.write(ring.addresses.device, &[0; 4]);
    request(&guest, &mut ring, 1, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("in flight again", || device.started() == 2);
    writer.write_all(b"x").unwrap();
}

fn objects(bed: &Bed) {
    assert_eq!(
        bed.call(0x9, command::SELF, 0, &[0, 0, 0, 0, 0, 0, 0, 0, 4, 4], 0).0,
        OK
    );
    for (id, member, operation) in [(0u8, 1, 0u8), (1, 2, 1)] {
        let mut data = vec![0, 0, 0, 0, id, 0, 0, 0];
        data.extend([0; 8]);
        data.extend([operation, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bed.call(0xa, command::SR_IOV, member, &data, 0).0, OK);
    }
}

/// The way a modern driver takes to DRIVER_OK, with the ring where a legacy one has it.
fn drive_modern(member: &Arc<Member>) -> Ring {
    let wake = || -> Waker { Box::new(|| {}) };
    let put = |offset: usize, data: &[u8]| {
        member.modern_write(offset, data, &wake);
    };
    let ring = Ring::legacy(BASE, 64, 4096);
    put(20, &[3]);
    put(8, &1u32.to_le_bytes());
    put(12, &1u32.to_le_bytes());
    put(20, &[11]);
    put(22, &[0, 0]);
    put(32, &ring.addresses.desc.to_le_bytes());
    put(40, &ring.addresses.driver.to_le_bytes());
    put(48, &ring.addresses.device.to_le_bytes());
    put(28, &[1, 0]);
    put(20, &[15]);
    ring
}

#[test]
fn a_driven_device_moves_by_its_parts() {
    moves(false);
    moves(true);
}

fn moves(modern: bool) {
    let bed = Bed::new();
    let disk = blk("ram:1048576");
    // Two members on one disk: what would be two hosts with one image.
    let here = bed.add(1, Arc::clone(&disk) as Arc<dyn Device>);
    let there = bed.add(2, Arc::clone(&disk) as Arc<dyn Device>);
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&here, &guest);
    bed.attach(&there, &guest);
    let mut ring = if modern { drive_modern(&here) } else { bed.drive(1) };
    let driven = if modern { 15 } else { 7 };
    for n in 0..5 {
        request(&guest, &mut ring, n, 1, u64::from(n), &[n as u8 + 1; 512]);
        bed.write(1, 16, &[0, 0]);
    }
    assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[1], 0).0, OK);
    // Some of them may not have been seen yet: those are served there.
    let used = ring.used_idx(&guest);
    // What comes while it is stopped waits.
    request(&guest, &mut ring, 5, 0, 2, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_idx(&guest), used);
    assert_eq!(bed.read(1, 18, 1), driven, "registers can be read");
    assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[1], 0).0, OK, "again");
    objects(&bed);
    let (status, _, size) = bed.call(0xe, command::SR_IOV, 1, &[0; 16], 8);
    assert_eq!(status, OK);
    let size = u32::from_le_bytes(size[..4].try_into().unwrap()) as usize;
    let mut all = [0; 16];
    all[8] = 1;
    let (status, _, parts) = bed.call(0xf, command::SR_IOV, 1, &all, size);
    assert_eq!((status, parts.len()), (OK, size));
    let mut data = vec![0, 0, 0, 0, 1, 0, 0, 0];
    data.extend(&parts);
    assert_eq!(bed.call(0x10, command::SR_IOV, 2, &data, 0).0, 16, "it isn't stopped");
    assert_eq!(bed.call(0x11, command::SR_IOV, 2, &[1], 0).0, OK);
    assert_eq!(bed.call(0x10, command::SR_IOV, 2, &data[..data.len() - 1], 0).0, 22);
    assert_eq!(bed.read(2, 18, 1), 0, "nothing was set");
    assert_eq!(bed.call(0x10, command::SR_IOV, 2, &data, 0).0, OK);
    assert_eq!(bed.read(2, 18, 1), driven);
    assert_eq!(bed.read(2, 8, 4), (BASE >> 12) as u32);
    assert_eq!(bed.call(0x11, command::SR_IOV, 2, &[0], 0).0, OK);
    wait_until("the requests that waited are done there", || ring.used_idx(&guest) == 6);
    assert_eq!(guest.read(DATA + 5 * 0x1000 + 512, 512), vec![3; 512]);
    for n in 6..12 {
        request(&guest, &mut ring, n, 0, u64::from(n % 5), &[0; 512]);
        bed.write(2, 16, &[0, 0]);
        wait_until("served there", || ring.used_idx(&guest) == n + 1);
        assert_eq!(
            guest.read(DATA + u64::from(n) * 0x1000 + 512, 512),
            vec![n as u8 % 5 + 1; 512]
        );
    }
    bed.call(0x11, command::SR_IOV, 1, &[0], 0);
}

#[test]
fn a_device_goes_on_where_it_was_stopped() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let mut ring = bed.drive(1);
    let mut n = 0;
    for round in 0..20u16 {
        for _ in 0..3 {
            request(&guest, &mut ring, n % 20, 1, 0, &[1; 512]);
            n += 1;
        }
        bed.write(1, 16, &[0, 0]);
        if round % 2 == 0 {
            assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[1], 0).0, OK);
            assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[0], 0).0, OK);
        }
        wait_until("used", || ring.used_idx(&guest) == n);
    }
}

#[test]
fn the_bar_of_a_legacy_function_is_commands() {
    for notify_region in [true, false] {
        let bed = Bed::with(GroupOptions {
            notify_region,
            ..options()
        });
        let member = bed.add(1, blk("ram:1048576"));
        let guest = Guest::new(BASE, SIZE);
        bed.attach(&member, &guest);
        let bar = Forwarder::new(Arc::clone(&bed.group), Arc::clone(&member)).unwrap();
        let read = |offset: u64, len: usize| {
            let mut data = vec![0; len];
            (bar.read(offset, &mut data, &never), data)
        };
        assert_eq!(bar.write(18, &[0], &never), Access::Done);
        assert_eq!(read(18, 1), (Access::Done, vec![0]));
        // The configuration moves with MSI-X.
        assert_eq!(read(20, 8).1, 2048u64.to_le_bytes());
        member.set_msix_enabled(true);
        assert_eq!(read(20, 2).1, [0xff, 0xff]);
        assert_eq!(read(24, 8).1, 2048u64.to_le_bytes());
        member.set_msix_enabled(false);
        // Several fields at once work here, if not as a command: capacity's end and size_max.
        assert_eq!(read(24, 8), (Access::Done, vec![0; 8]));
        assert_eq!(read(18, 2).0, Access::Refused(22));
        assert_eq!(read(79, 1).0, Access::Done);
        assert_eq!(read(84, 4).0, Access::Refused(22));
        bar.write(8, &((BASE >> 12) as u32).to_le_bytes(), &never);
        bar.write(18, &[7], &never);
        let mut ring = Ring::legacy(BASE, 64, 4096);
        request(&guest, &mut ring, 0, 1, 0, &[1; 512]);
        assert_eq!(bar.write(16, &[0, 0], &never), Access::Done);
        wait_until("used", || ring.used_idx(&guest) == 1);
        let (_, _, trace) = bed.group.core().trace.read(0, 1000, Some(1));
        let notify = trace
            .iter()
            .rev()
            .find(|(_, entry)| entry.origin == Origin::Bar0(16))
            .unwrap();
        let opcode = (!notify_region).then_some(command::LEGACY_COMMON_CFG_WRITE);
        assert_eq!(notify.1.opcode, opcode);
    }
}

#[test]
fn the_owners_own_queues_are_served_by_workers() {
    let bed = Bed::new();
    bed.add(1, blk("ram:1048576"));
    let options = MemberOptions {
        vectors: 4,
        admin: Some(vhu_core::member::AdminQueues {
            device: bed.group.function_device(),
            count: 1,
        }),
        ..MemberOptions::default()
    };
    let owner = Member::new(Arc::clone(&bed.pool), 0, blk("ram:1048576"), options);
    let guest = Guest::new(BASE, SIZE);
    owner.attach_function(Front::Owner, bed.line()).unwrap();
    owner.add_memory(bed.memory(&guest)).unwrap();
    let put = |offset: usize, data: &[u8]| {
        owner.modern_write(offset, data, &never);
    };
    put(20, &[3]);
    put(8, &1u32.to_le_bytes());
    put(12, &(1u32 | 1 << 9).to_le_bytes());
    put(20, &[11]);
    let mut words = [0; 4];
    owner.modern_read(60, &mut words);
    assert_eq!(words, [2, 0, 1, 0], "behind the two queues of the disk");
    put(22, &[2, 0]);
    let mut ring = Ring::legacy(BASE, 128, 4096);
    put(32, &ring.addresses.desc.to_le_bytes());
    put(40, &ring.addresses.driver.to_le_bytes());
    put(48, &ring.addresses.device.to_le_bytes());
    put(28, &[1, 0]);
    let command = |ring: &mut Ring, n: u16| {
        // LIST_QUERY, framed in four pieces.
        let at = DATA + u64::from(n) * 0x100;
        guest.write(at, &header(command::LIST_QUERY, command::SR_IOV, 0));
        let head = n * 4;
        ring.descriptor(&guest, head, at, 10, NEXT, head + 1);
        ring.descriptor(&guest, head + 1, at + 10, 14, NEXT, head + 2);
        ring.descriptor(&guest, head + 2, at + 64, 3, NEXT | WRITE, head + 3);
        ring.descriptor(&guest, head + 3, at + 67, 13, WRITE, 0);
        ring.offer(&guest, head);
    };
    command(&mut ring, 0);
    owner.notify(2);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_idx(&guest), 0, "not before DRIVER_OK");
    put(20, &[15]);
    wait_until("used", || ring.used_idx(&guest) == 1);
    assert_eq!(ring.used(&guest, 0), (0, 16));
    assert_eq!(guest.read(DATA + 64, 4), [0; 4]);
    let list = u64::from_le_bytes(guest.read(DATA + 72, 8).try_into().unwrap());
    assert_eq!(list, bed.group.core().supported(command::SR_IOV));
    for n in 1..30 {
        command(&mut ring, n);
    }
    owner.notify(2);
    wait_until("used", || ring.used_idx(&guest) == 30);
    for n in 0..30 {
        assert_eq!(ring.used(&guest, n).0, u32::from(n) * 4, "in order");
    }
    let done = Arc::new(Mutex::new(false));
    let flag = Arc::clone(&done);
    owner.detach_function(Completion::call(move || *flag.lock().unwrap() = true));
    wait_until("detached", || *done.lock().unwrap());
}

#[test]
fn many_threads_share_a_queue() {
    let bed = Bed::new();
    for id in 1..=8 {
        bed.add(id, blk("null:1048576"));
    }
    std::thread::scope(|scope| {
        for id in 1..=8u64 {
            let bed = &bed;
            scope.spawn(move || {
                for n in 0..2000u32 {
                    bed.write(id, 4, &(n & 0x1e44).to_le_bytes());
                    assert_eq!(bed.read(id, 4, 4), n & 0x1e44);
                }
            });
        }
    });
    let (submitted, completed) = bed.group.queue(0).unwrap().statistics();
    assert_eq!(submitted, completed);
}
