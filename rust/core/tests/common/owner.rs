// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A group with an owner and members, for tests: commands by an in-process queue, a legacy driver made of commands, and a
//! device whose requests take as long as the test says.

#![allow(dead_code)]
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::device::{ConfigField, Device, IoOp, QueueContext, Request, Step};
use vhu_core::error::Fault;
use vhu_core::event::{Completion, Waker};
use vhu_core::member::{Front, Member, MemberOptions};
use vhu_core::memory::Region;
use vhu_core::owner::command;
use vhu_core::owner::local::{header, Submitted, Ticket};
use vhu_core::owner::trace::{Begun, Origin};
use vhu_core::owner::{Compat, DeviceGroup, GroupOptions};
use vhu_core::sys;
use vhu_core::worker::{Flow, Interest, Pool, Source, SourceHandle, SourceIo};

use crate::common::{peer, Guest, Ring, NEXT, WRITE};

pub const BASE: u64 = 0x10_0000;
pub const SIZE: u64 = 0x10_0000;
pub const DATA: u64 = BASE + 0x8_0000;
pub const PATIENCE: Duration = Duration::from_secs(10);
pub const OK: u16 = 0;

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not {what} within {PATIENCE:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A connection that nothing comes from.
pub struct Quiet(pub OwnedFd);

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

pub fn blk(image: &str) -> Arc<Blk> {
    let options = BlkOptions {
        queues: 2,
        queue_size: 64,
        blk_size: 512,
        serial: String::new(),
    };
    Arc::new(Blk::new(Image::open(image, false).unwrap(), options).unwrap())
}

/// A device whose requests end when a byte comes through a pipe.
pub struct Hanging {
    reader: File,
    started: AtomicUsize,
}

impl Hanging {
    /// The device, and the end of the pipe that its requests wait for.
    pub fn new() -> (Arc<Self>, File) {
        let (reader, writer) = pipe();
        let started = AtomicUsize::new(0);
        (Arc::new(Self { reader, started }), writer)
    }

    /// Requests begun so far.
    pub fn started(&self) -> usize {
        self.started.load(Ordering::Relaxed)
    }
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

pub fn pipe() -> (File, File) {
    let mut fds = [0; 2];
    // SAFETY: fds has room for two.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: two new fds.
    unsafe { (File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])) }
}

pub struct Bed {
    pub pool: Arc<Pool>,
    pub group: Arc<DeviceGroup>,
}

pub fn options() -> GroupOptions {
    GroupOptions {
        compat: Compat::new(false),
        feature_management: true,
        notify_region: true,
        admin_queues: 2,
    }
}

impl Bed {
    pub fn new() -> Self {
        Self::with(options())
    }

    pub fn with(options: GroupOptions) -> Self {
        let pool = Arc::new(Pool::new(Some(2)).unwrap());
        let group = DeviceGroup::new(Arc::clone(&pool), options).unwrap();
        let bed = Self { pool, group };
        bed.use_all();
        bed
    }

    pub fn use_all(&self) {
        for kind in [command::SELF, command::SR_IOV] {
            let all = self.group.core().supported(kind);
            let _ = self.call(command::LIST_USE, kind, 0, &all.to_le_bytes(), 0);
        }
    }

    pub fn add(&self, id: u32, device: Arc<dyn Device>) -> Arc<Member> {
        let options = MemberOptions {
            legacy: true,
            vectors: 3,
            ..MemberOptions::default()
        };
        let member = Member::new(Arc::clone(&self.pool), id, device, options);
        self.group.add(Arc::clone(&member)).unwrap();
        member
    }

    pub fn line(&self) -> SourceHandle {
        self.pool.add_source(|_| Box::new(Quiet(sys::eventfd().unwrap())))
    }

    /// All of the guest's memory, as a client hands it over.
    pub fn memory(&self, guest: &Guest) -> Region {
        let fd = peer(&guest.file);
        self.pool.mappings().region(&fd, BASE, SIZE, BASE, 0).unwrap()
    }

    /// A client of the member's function, with memory.
    pub fn attach(&self, member: &Arc<Member>, guest: &Guest) {
        member.attach_function(Front::Legacy, self.line()).unwrap();
        member.add_memory(self.memory(guest)).unwrap();
    }

    /// A member whose requests wait for the test, with a client and one request in flight.
    pub fn busy(&self, id: u32) -> Busy {
        self.busy_by(id, |member, guest| self.attach(member, guest))
    }

    /// The same, with a client of the caller's.
    pub fn busy_by(&self, id: u32, attach: impl FnOnce(&Arc<Member>, &Guest)) -> Busy {
        let (device, storage) = Hanging::new();
        let member = self.add(id, Arc::clone(&device) as Arc<dyn Device>);
        let guest = Guest::new(BASE, SIZE);
        attach(&member, &guest);
        let ring = self.drive(id.into());
        let mut busy = Busy {
            device,
            member,
            guest,
            ring,
            storage,
        };
        busy.request(self, 0);
        wait_until("in flight", || busy.device.started() == 1);
        busy
    }

    pub fn start(&self, opcode: u16, kind: u16, member: u64, data: &[u8], room: usize) -> Pending {
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

    pub fn finish(&self, mut pending: Pending) -> (u16, u16, Vec<u8>) {
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

    pub fn call(&self, opcode: u16, kind: u16, member: u64, data: &[u8], room: usize) -> (u16, u16, Vec<u8>) {
        self.finish(self.start(opcode, kind, member, data, room))
    }

    pub fn read(&self, member: u64, offset: u8, len: usize) -> u32 {
        let (status, qualifier, result) =
            self.call(command::LEGACY_COMMON_CFG_READ, command::SR_IOV, member, &[offset], len);
        assert_eq!((status, qualifier, result.len()), (OK, 0, len));
        let mut word = [0; 4];
        word[..len].copy_from_slice(&result);
        u32::from_le_bytes(word)
    }

    pub fn write(&self, member: u64, offset: u8, data: &[u8]) -> u16 {
        self.finish(self.start_write(member, offset, data)).0
    }

    pub fn start_write(&self, member: u64, offset: u8, data: &[u8]) -> Pending {
        let mut all = vec![offset, 0, 0, 0, 0, 0, 0, 0];
        all.extend(data);
        self.start(command::LEGACY_COMMON_CFG_WRITE, command::SR_IOV, member, &all, 0)
    }

    /// The way a legacy driver takes to DRIVER_OK; its ring is at BASE.
    pub fn drive(&self, member: u64) -> Ring {
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

/// A member with a request that waits for the test.
pub struct Busy {
    pub device: Arc<Hanging>,
    pub member: Arc<Member>,
    pub guest: Guest,
    pub ring: Ring,
    storage: File,
}

impl Busy {
    /// Offers request `n` and notifies.
    pub fn request(&mut self, bed: &Bed, n: u16) {
        request(&self.guest, &mut self.ring, n, 0, 0, &[0; 512]);
        assert_eq!(bed.write(self.member.id().into(), 16, &[0, 0]), OK);
    }

    /// The storage answers as many requests.
    pub fn answer(&mut self, requests: usize) {
        self.storage.write_all(&vec![b'x'; requests]).unwrap();
    }

    /// The driver begins its ring anew: empty, at the same place.
    pub fn empty_ring(&mut self) {
        self.guest.write(self.ring.addresses.driver, &[0; 4]);
        self.guest.write(self.ring.addresses.device, &[0; 4]);
        self.ring.avail_idx = 0;
    }
}

/// A command that was submitted, completed or not.
pub struct Pending {
    pub ticket: Option<Ticket>,
    out: Vec<u8>,
    woken: Arc<AtomicUsize>,
}

impl Pending {
    /// Whether it can be finished without waiting.
    pub fn ready(&self) -> bool {
        self.ticket.is_none() || self.woken.load(Ordering::Relaxed) != 0
    }
}

/// For accesses whose end nobody waits for.
pub fn never() -> Waker {
    Box::new(|| {})
}

/// Counts calls, from any thread.
#[derive(Clone, Default)]
pub struct Calls(Arc<AtomicUsize>);

impl Calls {
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    pub fn waker(&self) -> Waker {
        let calls = self.clone();
        Box::new(move || {
            calls.0.fetch_add(1, Ordering::Relaxed);
        })
    }

    pub fn completion(&self) -> Completion {
        Completion::call(self.waker())
    }
}

/// Puts one block request into the ring; the buffers of request `n` are at DATA + n * 0x1000.
pub fn request(guest: &Guest, ring: &mut Ring, n: u16, kind: u32, sector: u64, data: &[u8]) {
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
