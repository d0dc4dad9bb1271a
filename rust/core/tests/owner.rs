// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The owner: administration commands through in-process queues, on members whose rings run.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{peer, Guest, Ring, NEXT, WRITE};
use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::device::{ConfigField, Device, IoOp, QueueContext, Request, Step};
use vhu_core::error::Fault;
use vhu_core::event::{Completion, Waker};
use vhu_core::member::{Front, Member, MemberOptions};
use vhu_core::owner::command;
use vhu_core::owner::forward::Forwarder;
use vhu_core::owner::local::{header, Submitted, Ticket};
use vhu_core::owner::trace::{Begun, Origin};
use vhu_core::owner::{Compat, DeviceGroup, GroupOptions};
use vhu_core::sys;
use vhu_core::vfio_user::function::Access;
use vhu_core::worker::{Flow, Interest, Pool, Source, SourceHandle, SourceIo};

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x10_0000;
const DATA: u64 = BASE + 0x8_0000;
const PATIENCE: Duration = Duration::from_secs(10);
const OK: u16 = 0;

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not {what} within {PATIENCE:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A connection that nothing comes from.
struct Quiet(OwnedFd);

impl Source for Quiet {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
    fn interest(&self) -> Interest {
        Interest {
            read: true,
            write: false,
        }
    }
    fn ready(&mut self, _io: &mut SourceIo<'_>) -> Flow {
        Flow::Wait
    }
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn end(&mut self) {}
}

fn blk(image: &str) -> Arc<Blk> {
    let options = BlkOptions {
        queues: 2,
        queue_size: 64,
        blk_size: 512,
        serial: String::new(),
    };
    Arc::new(Blk::new(Image::open(image, false).unwrap(), options).unwrap())
}

/// A device whose requests end when a byte comes through a pipe.
struct Hanging {
    reader: File,
    started: AtomicUsize,
}

impl Device for Hanging {
    fn type_name(&self) -> &'static str {
        "hanging"
    }
    fn device_id(&self) -> u32 {
        2
    }
    fn features(&self) -> u64 {
        0
    }
    fn known_features(&self) -> u64 {
        0
    }
    fn queues(&self) -> u16 {
        1
    }
    fn queue_size(&self) -> u16 {
        64
    }
    fn config_fields(&self) -> &'static [ConfigField] {
        &[]
    }
    fn config_size(&self) -> usize {
        0
    }
    fn legacy_config_size(&self) -> usize {
        0
    }
    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }
    fn write_config(&self, _offset: usize, _data: &[u8]) -> Result<bool, Fault> {
        Ok(false)
    }
    fn fresh(&self) {}
    fn start(&self, request: &mut Request, _context: &QueueContext<'_>) -> Result<Step, Fault> {
        self.started.fetch_add(1, Ordering::Relaxed);
        Ok(Step::Io(IoOp::Readv {
            fd: self.reader.as_raw_fd(),
            iov: request.chain.writable.iovecs().as_ptr(),
            count: 1,
            offset: u64::MAX,
            bytes: 1,
        }))
    }
    fn resume(&self, _request: &mut Request, _context: &QueueContext<'_>, result: i32) -> Step {
        Step::Done(u32::try_from(result).unwrap_or(0))
    }
    fn counter_names(&self) -> &'static [&'static str] {
        &["failed"]
    }
    fn failed_counter(&self) -> usize {
        0
    }
}

fn pipe() -> (File, File) {
    let mut fds = [0; 2];
    // SAFETY: fds has room for two.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: two new fds.
    unsafe { (File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])) }
}

struct Bed {
    pool: Arc<Pool>,
    group: Arc<DeviceGroup>,
}

fn options() -> GroupOptions {
    GroupOptions {
        compat: Compat::new(false),
        feature_management: true,
        notify_region: true,
        admin_queues: 2,
    }
}

impl Bed {
    fn new() -> Self {
        Self::with(options())
    }

    fn with(options: GroupOptions) -> Self {
        let pool = Arc::new(Pool::new(Some(2)).unwrap());
        let group = DeviceGroup::new(Arc::clone(&pool), options).unwrap();
        let bed = Self { pool, group };
        bed.use_all();
        bed
    }

    fn use_all(&self) {
        for kind in [command::SELF, command::SR_IOV] {
            let all = self.group.core().supported(kind);
            let _ = self.call(command::LIST_USE, kind, 0, &all.to_le_bytes(), 0);
        }
    }

    fn add(&self, id: u32, device: Arc<dyn Device>) -> Arc<Member> {
        let options = MemberOptions {
            legacy: true,
            vectors: 3,
            ..MemberOptions::default()
        };
        let member = Member::new(Arc::clone(&self.pool), id, device, options);
        self.group.add(Arc::clone(&member)).unwrap();
        member
    }

    fn line(&self) -> SourceHandle {
        self.pool.add_source(|_| Box::new(Quiet(sys::eventfd().unwrap())))
    }

    /// A client of the member's function, with memory.
    fn attach(&self, member: &Arc<Member>, guest: &Guest) {
        member.attach_function(Front::Legacy, self.line()).unwrap();
        let fd = peer(&guest.file);
        let region = self.pool.mappings().region(&fd, BASE, SIZE, BASE, 0).unwrap();
        member.add_memory(region).unwrap();
    }

    fn start(&self, opcode: u16, kind: u16, member: u64, data: &[u8], room: usize) -> Pending {
        let head = header(opcode, kind, member);
        let mut out = vec![0xaa; 8 + room];
        let woken = Arc::new(AtomicUsize::new(0));
        let flag = Arc::clone(&woken);
        let submitted = self
            .group
            .queue(0)
            .unwrap()
            .submit(&[&head, data], &mut out, Origin::Admin, Begun::now(), move || {
                Box::new(move || {
                    flag.fetch_add(1, Ordering::Relaxed);
                }) as Waker
            })
            .unwrap();
        match submitted {
            Submitted::Done(written) => {
                out.truncate(written);
                Pending {
                    ticket: None,
                    out,
                    woken,
                }
            }
            Submitted::Later(ticket) => Pending {
                ticket: Some(ticket),
                out,
                woken,
            },
        }
    }

    fn finish(&self, mut pending: Pending) -> (u16, u16, Vec<u8>) {
        if let Some(ticket) = pending.ticket {
            wait_until("woken", || pending.woken.load(Ordering::Relaxed) == 1);
            let written = self.group.queue(0).unwrap().take(ticket, &mut pending.out).unwrap();
            pending.out.truncate(written);
        }
        let out = pending.out;
        assert!(out.len() >= 8, "{out:?}");
        let half = |at: usize| u16::from_le_bytes([out[at], out[at + 1]]);
        (half(0), half(2), out[8..].to_vec())
    }

    fn call(&self, opcode: u16, kind: u16, member: u64, data: &[u8], room: usize) -> (u16, u16, Vec<u8>) {
        self.finish(self.start(opcode, kind, member, data, room))
    }

    fn read(&self, member: u64, offset: u8, len: usize) -> u32 {
        let (status, qualifier, result) =
            self.call(command::LEGACY_COMMON_CFG_READ, command::SR_IOV, member, &[offset], len);
        assert_eq!((status, qualifier, result.len()), (OK, 0, len));
        let mut word = [0; 4];
        word[..len].copy_from_slice(&result);
        u32::from_le_bytes(word)
    }

    fn write(&self, member: u64, offset: u8, data: &[u8]) -> u16 {
        self.finish(self.start_write(member, offset, data)).0
    }

    fn start_write(&self, member: u64, offset: u8, data: &[u8]) -> Pending {
        let mut all = vec![offset, 0, 0, 0, 0, 0, 0, 0];
        all.extend(data);
        self.start(command::LEGACY_COMMON_CFG_WRITE, command::SR_IOV, member, &all, 0)
    }

    /// The way a legacy driver takes to DRIVER_OK; its ring is at BASE.
    fn drive(&self, member: u64) -> Ring {
        assert_eq!(self.write(member, 18, &[0]), OK);
        assert_eq!(self.read(member, 18, 1), 0);
        self.write(member, 18, &[1]);
        self.write(member, 18, &[3]);
        let features = self.read(member, 0, 4) & 0x1fff;
        self.write(member, 4, &features.to_le_bytes());
        self.write(member, 14, &[0, 0]);
        let size = self.read(member, 12, 2) as u16;
        assert_eq!(self.read(member, 8, 4), 0, "PFN before set-up");
        self.write(member, 8, &((BASE >> 12) as u32).to_le_bytes());
        assert_eq!(self.read(member, 8, 4), (BASE >> 12) as u32);
        self.write(member, 18, &[7]);
        assert_eq!(self.read(member, 18, 1), 7);
        Ring::legacy(BASE, size, 4096)
    }
}

struct Pending {
    ticket: Option<Ticket>,
    out: Vec<u8>,
    woken: Arc<AtomicUsize>,
}

/// Puts one block request into the ring; the buffers of request `n` are at DATA + n * 0x1000.
fn request(guest: &Guest, ring: &mut Ring, n: u16, kind: u32, sector: u64, data: &[u8]) {
    let at = DATA + u64::from(n) * 0x1000;
    guest.write(at, &kind.to_le_bytes());
    guest.write(at + 8, &sector.to_le_bytes());
    guest.write(at + 512, data);
    guest.write(at + 2048, &[0xff]);
    let head = n * 3;
    let flags = if kind == 0 { WRITE } else { 0 };
    ring.descriptor(guest, head, at, 16, NEXT, head + 1);
    ring.descriptor(guest, head + 1, at + 512, data.len() as u32, NEXT | flags, head + 2);
    ring.descriptor(guest, head + 2, at + 2048, 1, WRITE, 0);
    ring.offer(guest, head);
}

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
    let never = || -> Waker { Box::new(|| {}) };
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
    let (reader, mut writer) = pipe();
    let device = Arc::new(Hanging {
        reader,
        started: AtomicUsize::new(0),
    });
    let member = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
    bed.add(2, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("in flight", || device.started.load(Ordering::Relaxed) == 1);
    let reset = bed.start_write(1, 18, &[0]);
    assert!(reset.ticket.is_some(), "the request is in flight");
    let behind = bed.start(command::LEGACY_COMMON_CFG_READ, command::SR_IOV, 2, &[18], 1);
    assert!(behind.ticket.is_some(), "in order");
    // Another queue isn't held up; the status still reads as before.
    let head = header(command::LEGACY_COMMON_CFG_READ, command::SR_IOV, 1);
    let mut out = [0; 9];
    let other = bed.group.queue(1).unwrap();
    let submitted = other
        .submit(&[&head, &[18]], &mut out, Origin::Admin, Begun::now(), || {
            Box::new(|| {})
        })
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
    let (reader, mut writer) = pipe();
    let device = Arc::new(Hanging {
        reader,
        started: AtomicUsize::new(0),
    });
    let member = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("in flight", || device.started.load(Ordering::Relaxed) == 1);
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
    wait_until("in flight again", || device.started.load(Ordering::Relaxed) == 2);
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

#[test]
fn a_driven_device_moves_by_its_parts() {
    let bed = Bed::new();
    let disk = blk("ram:1048576");
    // Two members on one disk: what would be two hosts with one image.
    let here = bed.add(1, Arc::clone(&disk) as Arc<dyn Device>);
    let there = bed.add(2, Arc::clone(&disk) as Arc<dyn Device>);
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&here, &guest);
    bed.attach(&there, &guest);
    let mut ring = bed.drive(1);
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
    assert_eq!(bed.read(1, 18, 1), 7, "registers can be read");
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
    assert_eq!(bed.read(2, 18, 1), 7);
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
        let never = || -> Waker { Box::new(|| {}) };
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
    let fd = peer(&guest.file);
    owner
        .add_memory(bed.pool.mappings().region(&fd, BASE, SIZE, BASE, 0).unwrap())
        .unwrap();
    let never = || -> Waker { Box::new(|| {}) };
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
