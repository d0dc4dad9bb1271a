// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The owner: administration commands through in-process queues, on members whose rings run.

#![allow(missing_docs, clippy::unwrap_used, unused, dead_code)]

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


use vhu_core::event::Event;
use vhu_core::function::Function;
use vhu_core::vfio_user::function::{IrqChange, PciFunction, IRQ_INTX, IRQ_MSIX};
use vhu_core::owner::trace::{Entry, Trace};

fn never() -> Waker {
    Box::new(|| {})
}

fn hanging() -> (Arc<Hanging>, File) {
    let (reader, writer) = pipe();
    (Arc::new(Hanging { reader, started: AtomicUsize::new(0) }), writer)
}

/// R1: a wake that finds the queue locked by `take`, `take_all` or `abandon` is lost.
#[test]
fn r1_wake_lost_to_take() {
    let bed = Bed::new();
    let (device, mut writer) = hanging();
    let member = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let queue = Arc::clone(bed.group.queue(0).unwrap());
    let hammer = {
        let (stop, queue) = (Arc::clone(&stop), Arc::clone(&queue));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = queue.take(Ticket::default(), &mut []);
            }
        })
    };
    let mut lost = None;
    for round in 0..200 {
        let clear = Ring::legacy(BASE, 64, 4096);
        guest.write(clear.addresses.driver, &[0; 4]);
        guest.write(clear.addresses.device, &[0; 4]);
        let mut ring = bed.drive(1);
        let before = device.started.load(Ordering::Relaxed);
        request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
        bed.write(1, 16, &[0, 0]);
        wait_until("in flight", || device.started.load(Ordering::Relaxed) == before + 1);
        let reset = bed.start_write(1, 18, &[0]);
        assert!(reset.ticket.is_some());
        writer.write_all(b"x").unwrap();
        let begun = Instant::now();
        while reset.woken.load(Ordering::Relaxed) == 0 && begun.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_micros(100));
        }
        if reset.woken.load(Ordering::Relaxed) == 0 {
            lost = Some(round);
            break;
        }
        bed.finish(reset);
    }
    stop.store(true, Ordering::Relaxed);
    hammer.join().unwrap();
    // Nobody touches the queue any more, and still nothing comes.
    std::thread::sleep(Duration::from_millis(700));
    println!("statistics {:?}", queue.statistics());
    assert_eq!(lost, None, "a command was never completed, though its rings had stopped");
}

/// R2: each status write is an event in an unbounded queue.
#[test]
fn r2_events_without_bound() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let function = Function::modern(Arc::clone(&member)).unwrap();
    function.attach(bed.line()).unwrap();
    bed.pool.events().take();
    let begun = Instant::now();
    for n in 0..100_000u32 {
        function.write(2, 20, &[1 + (n as u8 & 1) * 2], &never);
    }
    let elapsed = begun.elapsed();
    let events = bed.pool.events().take();
    println!("{} events in {elapsed:?}, {} bytes each", events.len(), size_of::<Event>());
    assert!(events.len() < 1000, "{}", events.len());
}

/// R3: masking and unmasking an idle INTx makes an interrupt.
#[test]
fn r3_intx_storm() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    let forwarder = Arc::new(Forwarder::new(Arc::clone(&bed.group), Arc::clone(&member)).unwrap());
    let function = Function::legacy(Arc::clone(&member), forwarder).unwrap();
    function.attach(bed.line()).unwrap();
    let fd = peer(&guest.file);
    function.dma_map(bed.pool.mappings().region(&fd, BASE, SIZE, BASE, 0).unwrap()).unwrap();
    let intx = Arc::new(sys::eventfd().unwrap());
    assert!(function.set_irqs(IrqChange::Assign { index: IRQ_INTX, start: 0, fds: vec![Some(Arc::clone(&intx))] }).is_ok());
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[1; 512]);
    function.write(0, 16, &[0, 0], &never);
    wait_until("used", || ring.used_idx(&guest) == 1);
    std::thread::sleep(Duration::from_millis(20));
    assert!(sys::eventfd_drain(intx.as_raw_fd()));
    let mut isr = [0];
    function.read(0, 19, &mut isr, &never);
    assert_eq!(isr, [1]);
    let mut rounds = 0;
    // As VFIO in a guest does: DisINTx in the interrupt, ISR read by the driver, DisINTx off again.
    for _ in 0..10 {
        function.write(7, 4, &[0x07, 0x04], &never);
        std::thread::sleep(Duration::from_millis(5));
        function.read(0, 19, &mut isr, &never);
        function.write(7, 4, &[0x07, 0x00], &never);
        std::thread::sleep(Duration::from_millis(5));
        if sys::eventfd_drain(intx.as_raw_fd()) {
            rounds += 1;
        }
    }
    assert_eq!(rounds, 0, "interrupts for nothing: each unmask makes the next one");
}

/// R4: two members that don't drain make a third one's reads fail.
#[test]
fn r4_one_member_holds_up_another() {
    let bed = Bed::with(GroupOptions { admin_queues: 1, ..options() });
    let mut keep = Vec::new();
    for id in [1, 2] {
        let (device, writer) = hanging();
        let member = bed.add(id, Arc::clone(&device) as Arc<dyn Device>);
        let guest = Guest::new(BASE, SIZE);
        bed.attach(&member, &guest);
        let mut ring = bed.drive(id.into());
        request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
        bed.write(id.into(), 16, &[0, 0]);
        wait_until("in flight", || device.started.load(Ordering::Relaxed) == 1);
        let bar = Forwarder::new(Arc::clone(&bed.group), Arc::clone(&member)).unwrap();
        keep.push((device, writer, guest, bar));
    }
    let victim = bed.add(3, blk("ram:1048576"));
    let bar = Forwarder::new(Arc::clone(&bed.group), Arc::clone(&victim)).unwrap();
    for (_, _, _, hung) in &keep {
        assert_eq!(hung.write(18, &[0], &never), Access::Later);
    }
    let begun = Instant::now();
    let woken = Arc::new(AtomicUsize::new(0));
    let flag = Arc::clone(&woken);
    let wake = move || -> Waker {
        let flag = Arc::clone(&flag);
        Box::new(move || {
            flag.fetch_add(1, Ordering::Relaxed);
        })
    };
    let mut data = [0];
    let access = bar.read(18, &mut data, &wake);
    if access == Access::Later {
        wait_until("woken", || woken.load(Ordering::Relaxed) == 1);
        let _ = bar.resume(&mut data, &wake);
    }
    let elapsed = begun.elapsed();
    for (_, writer, _, _) in &mut keep {
        writer.write_all(b"x").unwrap();
    }
    println!("victim's read of its status took {elapsed:?}");
    assert!(elapsed < Duration::from_millis(50), "{elapsed:?}; the server gives up after 800 ms");
}

/// R5: DEV_MODE_SET(stop) answered with EBUSY leaves the device stopped for good.
#[test]
fn r5_busy_but_stopped() {
    let bed = Bed::new();
    let (device, mut writer) = hanging();
    let member = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("in flight", || device.started.load(Ordering::Relaxed) == 1);
    assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[1], 0).0, 16);
    writer.write_all(b"x").unwrap();
    wait_until("used", || ring.used_idx(&guest) == 1);
    request(&guest, &mut ring, 1, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    std::thread::sleep(Duration::from_millis(200));
    let goes_on = device.started.load(Ordering::Relaxed) == 2;
    let _ = writer.write_all(b"x");
    assert!(goes_on, "the command has failed, but the device is stopped: {}", member.stopped());
}

/// R6: what was written with nobody attached runs in the next client's memory.
#[test]
fn r6_ring_of_nobody_in_new_clients_memory() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    // With nobody attached (or: commands of a client that has left, which were behind another member's).
    bed.write(1, 8, &((BASE >> 12) as u32).to_le_bytes());
    bed.write(1, 18, &[7]);
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    std::thread::sleep(Duration::from_millis(20));
    let info = member.info();
    assert!(!info.queues[0].started, "status {}: a ring runs before the new client's driver did anything", info.status);
}

/// R7: commands of a client that has left are carried out on the next one's device.
#[test]
fn r7_commands_of_the_dead() {
    let bed = Bed::with(GroupOptions { admin_queues: 1, ..options() });
    let (device, mut writer) = hanging();
    let hung = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&hung, &guest);
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("in flight", || device.started.load(Ordering::Relaxed) == 1);
    let blocked = Forwarder::new(Arc::clone(&bed.group), hung).unwrap();
    let member = bed.add(2, blk("ram:1048576"));
    let forwarder = Arc::new(Forwarder::new(Arc::clone(&bed.group), Arc::clone(&member)).unwrap());
    let function = Function::legacy(Arc::clone(&member), forwarder).unwrap();
    function.attach(bed.line()).unwrap();
    assert_eq!(blocked.write(18, &[0], &never), Access::Later);
    // The first client resets its device, and is killed.
    assert_eq!(function.write(0, 18, &[0], &never), Access::Later);
    let gone = Arc::new(AtomicUsize::new(0));
    let flag = Arc::clone(&gone);
    function.detach(Completion::call(move || { flag.fetch_add(1, Ordering::Relaxed); }));
    wait_until("gone", || gone.load(Ordering::Relaxed) == 1);
    // Another one comes by the modern function and is up and running.
    let modern = Function::modern(Arc::clone(&member)).unwrap();
    modern.attach(bed.line()).unwrap();
    modern.write(2, 8, &1u32.to_le_bytes(), &never);
    modern.write(2, 12, &1u32.to_le_bytes(), &never);
    for status in [1, 3, 11, 15] {
        modern.write(2, 20, &[status], &never);
    }
    let mut status = [0];
    modern.read(2, 20, &mut status, &never);
    assert_eq!(status, [15]);
    writer.write_all(b"x").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    modern.read(2, 20, &mut status, &never);
    assert_eq!(status, [15], "the second client's device was reset by the first one's command");
}

/// R8: `lost` counts what was forgotten before `since`, too.
#[test]
fn r8_trace_lost() {
    let trace = Trace::default();
    let entry = Entry {
        at: std::time::SystemTime::now(), member: 1, origin: Origin::Admin, write: false, opcode: Some(3), offset: 0, width: 1,
        value: None, status: 0, qualifier: 0, nanoseconds: 0,
    };
    // Eight queues, evenly: twice the capacity.
    for n in 0..(1usize << 17) {
        trace.push(n % 8, entry);
    }
    // Numbers 0..65536 are forgotten. From 60000 on: 5536 of them.
    let (_, lost, entries) = trace.read(60_000, 10, None);
    assert_eq!(entries[0].0, 65536);
    assert_eq!(lost, 5536);
}

/// R9: limit = usize::MAX.
#[test]
fn r9_trace_limit() {
    let trace = Trace::default();
    trace.read(0, usize::MAX, None);
}

/// R10: a PFN write while the ring is still stopping is answered at once.
#[test]
fn r10_second_pfn_zero() {
    let bed = Bed::new();
    let (device, mut writer) = hanging();
    let member = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("in flight", || device.started.load(Ordering::Relaxed) == 1);
    assert_eq!(bed.write(1, 8, &[0; 4]), 16);
    let second = bed.write(1, 8, &[0; 4]);
    writer.write_all(b"x").unwrap();
    assert_ne!(second, OK, "the ring still holds its memory");
}

/// R11: a message that triggers all vectors holds its worker.
#[test]
fn r11_trigger_flood() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let options = MemberOptions { legacy: true, vectors: 2048, ..MemberOptions::default() };
    let member = Member::new(Arc::clone(&pool), 1, blk("ram:1048576"), options);
    let function = Function::modern(Arc::clone(&member)).unwrap();
    struct Flood { fd: OwnedFd, function: Arc<Function>, took: Arc<Mutex<Option<Duration>>> }
    impl Source for Flood {
        fn fd(&self) -> RawFd { self.fd.as_raw_fd() }
        fn interest(&self) -> Interest { Interest { read: true, write: false } }
        fn ready(&mut self, io: &mut SourceIo<'_>) -> Flow {
            let begun = Instant::now();
            // A visit of the server's: 32 messages, then the signals.
            for _ in 0..32 {
                let _ = self.function.set_irqs(IrqChange::Trigger { index: IRQ_MSIX, start: 0, count: 2048 });
            }
            let mut signals = Vec::new();
            self.function.take_signals(&mut signals);
            for fd in signals.drain(..) { io.signal(&fd); }
            self.took.lock().unwrap().get_or_insert(begun.elapsed());
            Flow::Wait
        }
        fn deadline(&self) -> Option<Instant> { None }
        fn end(&mut self) {}
    }
    let line = pool.add_source(|_| Box::new(Quiet(sys::eventfd().unwrap())));
    function.attach(line).unwrap();
    // SAFETY: plain numbers.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max.min(8192);
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
    }
    let fds: Vec<_> = (0..2048).map(|_| Some(Arc::new(sys::eventfd().unwrap()))).collect();
    assert!(function.set_irqs(IrqChange::Assign { index: IRQ_MSIX, start: 0, fds }).is_ok());
    let took = Arc::new(Mutex::new(None));
    pool.add_source(|_| Box::new(Flood { fd: sys::eventfd().unwrap(), function: Arc::clone(&function), took: Arc::clone(&took) }));
    wait_until("visited", || took.lock().unwrap().is_some());
    let took = took.lock().unwrap().unwrap();
    println!("one visit held the worker for {took:?}");
    assert!(took < Duration::from_millis(5), "{took:?}");
}

/// R12: the second completion of an old ring's end takes its successor for stopped.
#[test]
fn r12_ring_stopped_takes_the_successor() {
    for shift in 0..2 {
        let bed = Bed::new();
        let (device, mut writer) = hanging();
        let member = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
        let guest = Guest::new(BASE, SIZE);
        bed.attach(&member, &guest);
        let mut ring = bed.drive(1);
        request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
        bed.write(1, 16, &[0, 0]);
        wait_until("in flight", || device.started.load(Ordering::Relaxed) == 1);
        for _ in 0..shift {
            bed.line();
        }
        let reached = Arc::new(AtomicUsize::new(0));
        // What another thread may do at this moment: here the successor has begun, and is told to stop by a third reset.
        let third = {
            let (member, device, reached) = (Arc::clone(&member), Arc::clone(&device), Arc::clone(&reached));
            move || -> Waker {
                let (member, device, reached) = (Arc::clone(&member), Arc::clone(&device), Arc::clone(&reached));
                Box::new(move || {
                    let begun = Instant::now();
                    while device.started.load(Ordering::Relaxed) < 2 && begun.elapsed() < Duration::from_millis(300) {
                        std::thread::yield_now();
                    }
                    if device.started.load(Ordering::Relaxed) == 2 {
                        let progress = member.legacy_write(18, &[0], false, &never).unwrap();
                        reached.store(1 + usize::from(progress == vhu_core::member::Progress::Later), Ordering::Relaxed);
                    }
                })
            }
        };
        assert!(member.legacy_write(18, &[0], false, &third).is_ok());
        assert!(member.legacy_write(18, &[0], false, &never).is_ok());
        // The driver goes on with another ring.
        let at = BASE + 0x1_0000;
        let mut next = Ring::legacy(at, 64, 4096);
        request(&guest, &mut next, 1, 0, 0, &[0; 512]);
        bed.write(1, 8, &((at >> 12) as u32).to_le_bytes());
        bed.write(1, 18, &[7]);
        writer.write_all(b"x").unwrap();
        std::thread::sleep(Duration::from_millis(500));
        if reached.load(Ordering::Relaxed) != 2 {
            println!("shift {shift}: the successor was on the same worker");
            writer.write_all(b"xx").unwrap();
            continue;
        }
        let status = bed.read(1, 18, 1);
        let used = next.used_idx(&guest);
        writer.write_all(b"x").unwrap();
        std::thread::sleep(Duration::from_millis(100));
        println!("used index of the ring after the reset was over: {used}, then {}", next.used_idx(&guest));
        assert_ne!(status, 0, "the third reset is said to be over, but its ring still has a request in flight");
    }
}

/// R13: commands of the owner's guest that are carried out after its reset.
#[test]
fn r13_lists_survive_a_reset() {
    let bed = Bed::new();
    bed.add(1, blk("ram:1048576"));
    let options = MemberOptions {
        vectors: 4,
        admin: Some(vhu_core::member::AdminQueues { device: bed.group.function_device(), count: 1 }),
        ..MemberOptions::default()
    };
    let owner = Member::new(Arc::clone(&bed.pool), 0, blk("ram:1048576"), options);
    let group = Arc::downgrade(&bed.group);
    owner.set_on_reset(move || {
        if let Some(group) = group.upgrade() {
            group.function_reset();
        }
    });
    let guest = Guest::new(BASE, SIZE);
    owner.attach_function(Front::Owner, bed.line()).unwrap();
    let fd = peer(&guest.file);
    owner.add_memory(bed.pool.mappings().region(&fd, BASE, SIZE, BASE, 0).unwrap()).unwrap();
    let put = |offset: usize, data: &[u8]| { owner.modern_write(offset, data, &never); };
    let begun = Instant::now();
    let mut round = 0u64;
    while begun.elapsed() < Duration::from_secs(20) {
        round += 1;
        let mut ring = Ring::legacy(BASE, 128, 4096);
        guest.write(ring.addresses.driver, &[0; 4]);
        guest.write(ring.addresses.device, &[0; 4]);
        put(20, &[3]);
        put(8, &1u32.to_le_bytes());
        put(12, &(1u32 | 1 << 9).to_le_bytes());
        put(20, &[11]);
        put(22, &[2, 0]);
        put(32, &ring.addresses.desc.to_le_bytes());
        put(40, &ring.addresses.driver.to_le_bytes());
        put(48, &ring.addresses.device.to_le_bytes());
        put(28, &[1, 0]);
        put(20, &[15]);
        let mut data = header(command::LIST_USE, command::SR_IOV, 0).to_vec();
        data.extend(command::LEGACY.to_le_bytes());
        data[0] = 1;
        guest.write(DATA, &data);
        // LIST_USE drops itself from the list, so the lists are kept: bits 0 and 1 too.
        guest.write(DATA + 24, &(command::LEGACY | 3).to_le_bytes());
        for n in 0..60u16 {
            ring.descriptor(&guest, n * 2, DATA, 32, NEXT, n * 2 + 1);
            ring.descriptor(&guest, n * 2 + 1, DATA + 64, 8, WRITE, 0);
            ring.offer(&guest, n * 2);
        }
        owner.notify(2);
        let spin = Instant::now();
        while spin.elapsed() < Duration::from_nanos(500 * (round % 200)) {
            std::hint::spin_loop();
        }
        put(20, &[0]);
        let mut status = [1];
        while status != [0] {
            owner.modern_read(20, &mut status);
        }
        let used = bed.group.info().used[1][1];
        assert_eq!(used, 3, "round {round}: the list of before the reset is in force after it");
    }
    println!("{round} rounds");
}

/// R14: memory is reported as free while a ring that was told to stop still uses it.
#[test]
fn r14_unmapped_but_written() {
    let bed = Bed::new();
    let (device, mut writer) = hanging();
    let member = bed.add(1, Arc::clone(&device) as Arc<dyn Device>);
    let guest = Guest::new(BASE, SIZE);
    let forwarder = Arc::new(Forwarder::new(Arc::clone(&bed.group), Arc::clone(&member)).unwrap());
    let function = Function::legacy(Arc::clone(&member), forwarder).unwrap();
    function.attach(bed.line()).unwrap();
    let fd = peer(&guest.file);
    function.dma_map(bed.pool.mappings().region(&fd, BASE, SIZE, BASE, 0).unwrap()).unwrap();
    let mut ring = bed.drive(1);
    request(&guest, &mut ring, 0, 0, 0, &[0; 512]);
    bed.write(1, 16, &[0, 0]);
    wait_until("in flight", || device.started.load(Ordering::Relaxed) == 1);
    assert_eq!(function.reset(&never), Access::Later);
    function.give_up();
    let unmap = function.dma_unmap(BASE, SIZE, &never);
    assert!(matches!(unmap, Ok(Access::Done)), "{unmap:?}");
    let before = guest.read(BASE, SIZE as usize);
    writer.write_all(b"x").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let after = guest.read(BASE, SIZE as usize);
    let changed: Vec<_> = (0..SIZE as usize).filter(|&i| before[i] != after[i]).map(|i| format!("{:#x}", BASE + i as u64)).collect();
    assert!(changed.is_empty(), "written after DMA_UNMAP had been answered with success: {changed:?}");
}

use common::Random;
use vhu_core::member::AdminQueues;
use vhu_core::function::VfControl;

fn fire(bed: &Bed, opcode: u16, kind: u16, member: u64, data: &[u8], room: usize) {
    let head = header(opcode, kind, member);
    let mut out = vec![0; 8 + room];
    let queue = bed.group.queue(0).unwrap();
    if let Ok(Submitted::Later(ticket)) = queue.submit(&[&head, data], &mut out, Origin::Admin, Begun::now(), never) {
        queue.abandon(ticket);
    }
}

/// R20: everything at random: functions, administration commands, memory, interrupts. Looks for panics and what never ends.
#[test]
fn r20_at_random() {
    let seconds: u64 = std::env::var("FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(10);
    let seed0: u64 = std::env::var("FUZZ_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let panics = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&panics);
    std::panic::set_hook(Box::new(move |info| {
        let text = format!("{info} {:?}", std::thread::current().name());
        eprintln!("{text}\n{}", std::backtrace::Backtrace::force_capture());
        seen.lock().unwrap().push(text);
    }));
    let bed = Bed::with(GroupOptions { admin_queues: 2, ..options() });
    let mut functions: Vec<Arc<Function>> = Vec::new();
    let mut members = Vec::new();
    for id in 1..=3u32 {
        let options = MemberOptions { legacy: true, packed: id != 1, vectors: 3, ..MemberOptions::default() };
        let member = Member::new(Arc::clone(&bed.pool), id, blk("ram:1048576"), options);
        bed.group.add(Arc::clone(&member)).unwrap();
        let ports = Arc::new(Forwarder::new(Arc::clone(&bed.group), Arc::clone(&member)).unwrap());
        functions.push(match id {
            1 => Function::legacy(Arc::clone(&member), ports).unwrap(),
            2 => Function::transitional(Arc::clone(&member), ports).unwrap(),
            _ => Function::modern(Arc::clone(&member)).unwrap(),
        });
        members.push(member);
    }
    let options = MemberOptions {
        packed: true, vectors: 4,
        admin: Some(AdminQueues { device: bed.group.function_device(), count: 2 }),
        ..MemberOptions::default()
    };
    let owner = Member::new(Arc::clone(&bed.pool), 0, blk("ram:1048576"), options);
    let group = Arc::downgrade(&bed.group);
    owner.set_on_reset(move || if let Some(group) = group.upgrade() { group.function_reset(); });
    functions.push(Function::owner(Arc::clone(&owner), Arc::clone(&bed.group) as Arc<dyn VfControl>).unwrap());
    members.push(owner);
    let end = Instant::now() + Duration::from_secs(seconds);
    let ops = Arc::new(AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for (index, function) in functions.iter().enumerate() {
            let (bed, member, ops) = (&bed, &members[index], Arc::clone(&ops));
            scope.spawn(move || {
                let mut random = Random::new(seed0 * 100 + index as u64);
                let guest = Guest::new(BASE, SIZE);
                let woken = Arc::new(AtomicUsize::new(0));
                let line = bed.line();
                let mut attached = false;
                let mut mapped: Vec<(u64, u64)> = Vec::new();
                while Instant::now() < end {
                    ops.fetch_add(1, Ordering::Relaxed);
                    if !attached {
                        if function.attach(line.clone()).is_err() { std::thread::sleep(Duration::from_millis(1)); continue; }
                        attached = true;
                        mapped.clear();
                    }
                    let before = woken.load(Ordering::Relaxed);
                    let flag = Arc::clone(&woken);
                    let wake = move || -> Waker { let flag = Arc::clone(&flag); Box::new(move || { flag.fetch_add(1, Ordering::Relaxed); }) };
                    let mut data = [0u8; 8];
                    let width = [1usize, 2, 4, 8][random.below(4) as usize];
                    let value = match random.below(6) {
                        0 => random.next(), 1 => 0, 2 => 1 << random.below(64), 3 => BASE >> 12, 4 => BASE + random.below(16) * 0x1000, _ => random.below(32),
                    };
                    let access = match random.below(100) {
                        0 => {
                            let gone = Arc::new(AtomicUsize::new(0));
                            let flag = Arc::clone(&gone);
                            function.detach(Completion::call(move || { flag.fetch_add(1, Ordering::Relaxed); }));
                            wait_until("detached", || gone.load(Ordering::Relaxed) == 1);
                            attached = false;
                            continue;
                        }
                        1..=3 => {
                            let at = BASE + random.below(8) * 0x2_0000;
                            let size = 0x2_0000 * (1 + random.below(3));
                            if at + size <= BASE + SIZE {
                                let fd = peer(&guest.file);
                                let region = bed.pool.mappings().region(&fd, at, size, at, at - BASE).unwrap();
                                if function.dma_map(region).is_ok() { mapped.push((at, size)); }
                            }
                            Access::Done
                        }
                        4 => match mapped.pop() {
                            Some((at, size)) => function.dma_unmap(at, size, &wake).unwrap(),
                            None => Access::Done,
                        },
                        5 => function.reset(&wake),
                        6..=9 => {
                            let index = [IRQ_INTX, IRQ_MSIX, 1][random.below(3) as usize];
                            let (start, count) = (random.below(4) as u32, random.below(4) as u32);
                            let change = match random.below(5) {
                                0 => IrqChange::Assign { index, start, fds: (0..count).map(|_| Some(Arc::new(sys::eventfd().unwrap()))).collect() },
                                1 => IrqChange::Disable { index },
                                2 => IrqChange::Mask { index, start, count },
                                3 => IrqChange::Unmask { index, start, count },
                                _ => IrqChange::Trigger { index, start, count },
                            };
                            let _ = function.set_irqs(change);
                            Access::Done
                        }
                        10..=19 => {
                            // Ring contents.
                            let at = BASE + random.below(8) * 0x1000 + random.below(0x1000 - 16);
                            let mut bytes = random.next().to_le_bytes().to_vec();
                            bytes.extend(random.next().to_le_bytes());
                            if random.chance(50) { bytes = vec![0; 16]; }
                            guest.write(at, &bytes);
                            Access::Done
                        }
                        20..=29 => {
                            // A command of the in-process driver.
                            let opcode = if random.chance(90) { random.below(0x12) as u16 } else { 0x3e + random.below(3) as u16 };
                            let kind = u16::from(random.chance(85));
                            let id = if random.chance(10) { 0 } else { random.below(5) };
                            let id = if index < 3 && random.chance(50) { index as u64 + 1 } else { id };
                            let mut body = vec![0u8; random.below(80) as usize];
                            for byte in &mut body { if random.chance(30) { *byte = random.below(4) as u8 * random.below(30) as u8; } }
                            if let Some(first) = body.first_mut() { if opcode < 6 { *first = random.below(26) as u8; } }
                            if opcode == 1 { body = (u64::MAX & bed.group.core().supported(kind)).to_le_bytes().to_vec(); }
                            let room = random.below(700) as usize;
                            let head = header(opcode, kind, id);
                            let mut out = vec![0xaa; room];
                            let queue = bed.group.queue(random.below(2) as usize).unwrap();
                            let done = Arc::new(AtomicUsize::new(0));
                            let flag = Arc::clone(&done);
                            let begun = Instant::now();
                            match queue.submit(&[&head, &body], &mut out, Origin::Admin, Begun::now(), move || Box::new(move || { flag.fetch_add(1, Ordering::Relaxed); })) {
                                Ok(Submitted::Done(n)) => assert!(n <= room),
                                Ok(Submitted::Later(ticket)) => {
                                    while done.load(Ordering::Relaxed) == 0 {
                                        assert!(begun.elapsed() < Duration::from_secs(5), "command {opcode:#x} on {id} never ends");
                                        std::thread::sleep(Duration::from_micros(50));
                                    }
                                    assert!(queue.take_all(ticket).is_some());
                                    assert!(done.load(Ordering::Relaxed) == 1);
                                }
                                Err(_) => {}
                            }
                            Access::Done
                        }
                        30..=39 => {
                            // Parts from a member to a member, changed a bit.
                            let id = 1 + random.below(3);
                            let from = bed.group.member(id as u32).unwrap();
                            let mut data = vec![0, 0, 0, 0, 1, 0, 0, 0];
                            for part in from.parts() {
                                if random.chance(80) { data.extend(part.header()); data.extend(&part.value); }
                            }
                            if random.chance(50) { let at = random.below(data.len() as u64) as usize; data[at] = random.next() as u8; }
                            fire(bed, 0x9, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 0, 4, 4], 0);
                            let to = 1 + random.below(3);
                            let mut create = vec![0, 0, 0, 0, 1, 0, 0, 0]; create.extend([0; 8]); create.extend([1, 0, 0, 0, 0, 0, 0, 0]);
                            fire(bed, 0xa, 1, to, &create, 0);
                            fire(bed, 0x11, 1, to, &[u8::from(random.chance(70))], 0);
                            fire(bed, 0x10, 1, to, &data, 0);
                            fire(bed, 0x11, 1, to, &[0], 0);
                            Access::Done
                        }
                        40..=54 => {
                            let offset = if random.chance(60) { random.below(0x110) } else { [4u64, 0x40, 0x60, 0x108, 0x110][random.below(5) as usize] + random.below(64) };
                            let width = width.min(4);
                            data[..width].copy_from_slice(&value.to_le_bytes()[..width]);
                            if random.chance(50) { function.read(7, offset, &mut data[..width], &wake) } else { function.write(7, offset, &data[..width], &wake) }
                        }
                        n => {
                            let bar = if n < 75 { 2 } else { 0 };
                            let size = function.region(bar).size;
                            if size == 0 { continue; }
                            let offset = if bar == 2 { [0u64, 0, 0, 0x1000, 0x2000, 0x3000][random.below(6) as usize] + random.below(64) } else { random.below(84) };
                            let (offset, width) = if random.chance(70) {
                                let fields: &[(u64, usize)] = if bar == 2 { &[(0,4),(4,4),(8,4),(12,4),(16,2),(20,1),(20,1),(20,1),(22,2),(24,2),(26,2),(28,2),(28,2),(32,8),(40,8),(48,8),(58,2),(0x3000,2)] }
                                    else { &[(4,4),(8,4),(8,4),(14,2),(16,2),(16,2),(18,1),(18,1),(18,1),(19,1),(20,2),(22,2)] };
                                fields[random.below(fields.len() as u64) as usize]
                            } else { (offset, width) };
                            if offset + width as u64 > size { continue; }
                            let value = match offset { 0x3000 | 16 | 14 | 22 => random.below(5), 20 | 18 if random.chance(80) => [0u64, 1, 3, 7, 11, 15][random.below(6) as usize], 28 | 58 => 1, 24 => 1 << random.below(11), _ => value };
                            data[..width].copy_from_slice(&value.to_le_bytes()[..width]);
                            if random.chance(25) { function.read(bar, offset, &mut data[..width], &wake) } else { function.write(bar, offset, &data[..width], &wake) }
                        }
                    };
                    if access == Access::Later {
                        let begun = Instant::now();
                        let mut target = before + 1;
                        loop {
                            if woken.load(Ordering::Relaxed) >= target {
                                target = woken.load(Ordering::Relaxed) + 1;
                                if function.resume(&mut data[..width], &wake) != Access::Later { break; }
                            }
                            if random.chance(1) && random.chance(1) { function.give_up(); break; }
                            assert!(begun.elapsed() < Duration::from_secs(5), "an access to {} never ends; {:?}", function.kind(), member.info().state);
                            std::thread::sleep(Duration::from_micros(20));
                        }
                    }
                    let mut signals = Vec::new();
                    function.take_signals(&mut signals);
                    bed.pool.events().take();
                }
                if attached { function.detach(Completion::call(|| {})); }
            });
        }
    });
    let _ = std::panic::take_hook();
    println!("{} operations; {:?}", ops.load(Ordering::Relaxed), bed.group.info().commands);
    for member in &members { println!("{:?} {:?}", member.info().state, member.info().last_error); }
    let panics = panics.lock().unwrap();
    assert!(panics.is_empty(), "{panics:?}");
}

/// R15: a client that masks and unmasks INTx all the time, with many rings: commands pile up at the workers.
#[test]
fn r15_command_flood() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let make = |id: u32, queues: u16| {
        let options = BlkOptions { queues, queue_size: 16, blk_size: 512, serial: String::new() };
        let device = Arc::new(Blk::new(Image::open("ram:1048576", false).unwrap(), options).unwrap());
        let options = MemberOptions { legacy: true, vectors: 0, ..MemberOptions::default() };
        let member = Member::new(Arc::clone(&pool), id, device, options);
        let guest = Guest::new(BASE, SIZE);
        member.attach_function(Front::Legacy, pool.add_source(|_| Box::new(Quiet(sys::eventfd().unwrap())))).unwrap();
        let fd = peer(&guest.file);
        member.add_memory(pool.mappings().region(&fd, BASE, SIZE, BASE, 0).unwrap()).unwrap();
        for queue in 0..queues {
            let at = BASE + u64::from(queue) * 0x2000;
            member.legacy_write(14, &queue.to_le_bytes(), false, &never).unwrap();
            member.legacy_write(8, &((at >> 12) as u32).to_le_bytes(), false, &never).unwrap();
        }
        member.legacy_write(18, &[7], false, &never).unwrap();
        (member, guest)
    };
    let (hostile, _memory) = make(1, 32);
    let (victim, guest) = make(2, 1);
    let mut ring = Ring::legacy(BASE, 16, 4096);
    let intx = Arc::new(sys::eventfd().unwrap());
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flood = {
        let (stop, hostile, intx) = (Arc::clone(&stop), Arc::clone(&hostile), Arc::clone(&intx));
        std::thread::spawn(move || {
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                hostile.set_intx(None);
                hostile.set_intx(Some(Arc::clone(&intx)));
                n += 2;
            }
            n
        })
    };
    let mut worst = Duration::ZERO;
    let begun = Instant::now();
    let mut count = 0u16;
    while begun.elapsed() < Duration::from_secs(3) {
        request(&guest, &mut ring, count % 5, 0, 0, &[0; 512]);
        count = count.wrapping_add(1);
        let sent = Instant::now();
        victim.notify(0);
        while ring.used_idx(&guest) != count && sent.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_micros(50));
        }
        worst = worst.max(sent.elapsed());
    }
    stop.store(true, Ordering::Relaxed);
    let changes = flood.join().unwrap();
    let rss = std::fs::read_to_string("/proc/self/status").unwrap();
    let rss = rss.lines().find(|line| line.starts_with("VmHWM")).unwrap().to_owned();
    println!("{changes} changes of 32 rings; the other member's requests: {count}, the slowest took {worst:?}; {rss}");
    assert!(worst < Duration::from_millis(100), "{worst:?}");
}

/// R16: a source that is removed by somebody who got its handle in `make` lives on: the removal comes before it does.
#[test]
fn r16_removed_before_it_was_added() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    struct Alive(OwnedFd, Arc<AtomicUsize>);
    impl Source for Alive {
        fn fd(&self) -> RawFd { self.0.as_raw_fd() }
        fn interest(&self) -> Interest { Interest { read: true, write: false } }
        fn ready(&mut self, _io: &mut SourceIo<'_>) -> Flow { self.1.fetch_add(1, Ordering::Relaxed); Flow::Wait }
        fn deadline(&self) -> Option<Instant> { None }
        fn end(&mut self) {}
    }
    let visits = Arc::new(AtomicUsize::new(0));
    let removed = Arc::new(AtomicUsize::new(0));
    let (seen, flag) = (Arc::clone(&visits), Arc::clone(&removed));
    let handle = pool.add_source(move |handle| {
        // As Server::close on another thread, between Listener::admit's publishing the line and the end of add_source.
        handle.remove(Completion::call(move || { flag.fetch_add(1, Ordering::Relaxed); }));
        Box::new(Alive(sys::eventfd().unwrap(), seen))
    });
    wait_until("removed", || removed.load(Ordering::Relaxed) == 1);
    std::thread::sleep(Duration::from_millis(50));
    let before = visits.load(Ordering::Relaxed);
    handle.wake();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(visits.load(Ordering::Relaxed), before, "it was removed, and is still visited");
}

/// R17: a configuration change of a stopped device is never told.
#[test]
fn r17_config_change_while_stopped() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let guest = Guest::new(BASE, SIZE);
    bed.attach(&member, &guest);
    let _ring = bed.drive(1);
    assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[1], 0).0, OK);
    member.config_changed();
    assert_eq!(bed.call(0x11, command::SR_IOV, 1, &[0], 0).0, OK);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(bed.read(1, 19, 1) & 2, 2, "the driver never hears of it");
}

/// R18: LEGACY_NOTIFY_INFO asked for while VF Enable is 0 is remembered as "there is none" for ever.
#[test]
fn r18_notify_region_forgotten() {
    let bed = Bed::new();
    let member = bed.add(1, blk("ram:1048576"));
    let bar = Forwarder::new(Arc::clone(&bed.group), Arc::clone(&member)).unwrap();
    bed.group.core().set_vfs(false, 1);
    bar.write(16, &[0, 0], &never);
    bed.group.core().set_vfs(true, 1);
    bar.write(16, &[0, 0], &never);
    let (_, _, trace) = bed.group.core().trace.read(0, 1000, Some(1));
    assert_eq!(trace.last().unwrap().1.opcode, None, "through the notify region");
}

/// R19: parts can be set in two pieces that can't be set in one.
#[test]
fn r19_packed_by_parts() {
    let bed = Bed::new();
    let options = MemberOptions { legacy: true, packed: true, vectors: 3, ..MemberOptions::default() };
    let member = Member::new(Arc::clone(&bed.pool), 1, blk("ram:1048576"), options);
    bed.group.add(Arc::clone(&member)).unwrap();
    use vhu_core::member::parts::Part;
    let part = |part_type: u16, selector: u64, value: Vec<u8>| Part { part_type, flags: 0, selector: selector.to_le_bytes(), value };
    member.stop_device(&never);
    let mut vq = vec![0u8; 32];
    vq[0] = 64; vq[2] = 0xff; vq[3] = 0xff; vq[4] = 1;
    vq[8..16].copy_from_slice(&BASE.to_le_bytes());
    vq[16..24].copy_from_slice(&(BASE + 0x1000).to_le_bytes());
    vq[24..32].copy_from_slice(&(BASE + 0x2000).to_le_bytes());
    let features = part(0x101, 0, ((1u64 << 32) | (1 << 34)).to_le_bytes().to_vec());
    assert!(member.set_parts(&[features.clone(), part(0x104, 0, vq.clone())]).is_err());
    assert!(member.set_parts(&[part(0x104, 0, vq)]).is_ok());
    assert!(member.set_parts(&[features]).is_err(), "an enabled queue gets a packed ring without a position");
}
