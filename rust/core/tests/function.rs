// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI functions of a real member, driven by hand as a client and its guest's drivers do it.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Mutex};
use std::time::{Duration, Instant};

use common::{peer, Guest, Random, Ring, NEXT, WRITE};
use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::error::Error;
use vhu_core::event::{Completion, Waker};
use vhu_core::function::{
    class_code, modern_device_id, transitional_device_id, Function, IoPorts, VfControl, VfShape, COMMON_OFFSET,
    DEVICE_OFFSET, ISR_OFFSET, NOTIFY_OFFSET,
};
use vhu_core::member::{Member, MemberOptions, Progress};
use vhu_core::owner::forward::Forwarder;
use vhu_core::owner::{Compat, DeviceGroup, GroupOptions};
use vhu_core::sys;
use vhu_core::vfio_user::function::{Access, IrqChange, PciFunction, RegionInfo, CONFIG_REGION, IRQ_INTX, IRQ_MSIX};
use vhu_core::worker::{Flow, Interest, Pool, Source, SourceHandle, SourceIo};

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x10_0000;
const DATA: u64 = BASE + 0x8_0000;
const PATIENCE: Duration = Duration::from_secs(10);
const MODERN: u32 = 2;
const MSIX: u32 = 1;
const NO_VECTOR: u32 = 0xffff;

/// The I/O BAR without the administration queue in between.
struct Direct(Arc<Member>);

impl Direct {
    /// Offset in the device configuration, when it is there.
    fn config(&self, offset: u64) -> Option<usize> {
        let split = if self.0.msix_enabled() { 24 } else { 20 };
        (offset as usize).checked_sub(split)
    }
}

impl IoPorts for Direct {
    fn read(&self, offset: u64, data: &mut [u8], _: &dyn Fn() -> Waker) -> Access {
        let result = match self.config(offset) {
            Some(at) => self.0.legacy_config_read(at, data),
            None => self.0.legacy_read(offset as usize, data),
        };
        result.map_or(Access::Refused(libc::EINVAL), |()| Access::Done)
    }

    fn write(&self, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access {
        let result = match self.config(offset) {
            Some(at) => self.0.legacy_config_write(at, data).map(|()| Progress::Done),
            None => self.0.legacy_write(offset as usize, data, false, wake),
        };
        match result {
            Ok(Progress::Done) => Access::Done,
            Ok(Progress::Later) => Access::Later,
            Err(_) => Access::Refused(libc::EINVAL),
        }
    }

    fn resume(&self, _: &mut [u8], _: &dyn Fn() -> Waker) -> Access {
        Access::Done
    }

    fn give_up(&self) {}
}

/// An I/O BAR that always takes its time; what is read is the offset.
#[derive(Default)]
struct Slow {
    waker: Mutex<Option<Waker>>,
    offset: Mutex<u64>,
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
    given_up: AtomicUsize,
}

impl Slow {
    fn finish(&self) {
        self.waker.lock().unwrap().take().unwrap()();
    }
}

impl IoPorts for Slow {
    fn read(&self, offset: u64, _: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        *self.waker.lock().unwrap() = Some(wake());
        *self.offset.lock().unwrap() = offset;
        Access::Later
    }

    fn write(&self, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access {
        self.writes.lock().unwrap().push((offset, data.to_vec()));
        self.read(offset, &mut [], wake)
    }

    fn resume(&self, data: &mut [u8], _: &dyn Fn() -> Waker) -> Access {
        data.fill(*self.offset.lock().unwrap() as u8);
        Access::Done
    }

    fn give_up(&self) {
        self.given_up.fetch_add(1, Ordering::Relaxed);
    }
}

/// The client's connection: sends interrupts when it is woken.
struct Client {
    fd: OwnedFd,
    function: Arc<Function>,
}

impl Source for Client {
    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn interest(&self) -> Interest {
        Interest {
            read: true,
            write: false,
        }
    }

    fn ready(&mut self, io: &mut SourceIo<'_>) -> Flow {
        let mut signals = Vec::new();
        self.function.take_signals(&mut signals);
        for fd in &signals {
            io.signal(fd);
        }
        Flow::Wait
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn end(&mut self) {}
}

struct Bed {
    pool: Arc<Pool>,
    member: Arc<Member>,
    function: Arc<Function>,
    line: SourceHandle,
}

fn member(pool: &Arc<Pool>, id: u32, vectors: u16, legacy: bool) -> Arc<Member> {
    let options = BlkOptions {
        queues: 2,
        queue_size: 64,
        blk_size: 512,
        serial: "function".into(),
    };
    let blk = Blk::new(Image::open("ram:1048576", false).unwrap(), options).unwrap();
    let options = MemberOptions {
        legacy,
        vectors,
        ..MemberOptions::default()
    };
    Member::new(Arc::clone(pool), id, Arc::new(blk), options)
}

fn connect(pool: &Arc<Pool>, function: &Arc<Function>) -> (SourceHandle, Result<(), Error>) {
    let line = pool.add_source(|_| {
        Box::new(Client {
            fd: sys::eventfd().unwrap(),
            function: Arc::clone(function),
        })
    });
    let attached = function.attach(line.clone());
    (line, attached)
}

impl Bed {
    fn new(vectors: u16, make: impl FnOnce(&Arc<Member>) -> Arc<Function>) -> Self {
        let pool = Arc::new(Pool::new(Some(2)).unwrap());
        let member = member(&pool, 3, vectors, true);
        let function = make(&member);
        let (line, attached) = connect(&pool, &function);
        attached.unwrap();
        Self {
            pool,
            member,
            function,
            line,
        }
    }

    fn modern() -> Self {
        Self::new(3, |member| Function::modern(Arc::clone(member)).unwrap())
    }

    fn legacy(vectors: u16) -> Self {
        Self::new(vectors, |member| {
            Function::legacy(Arc::clone(member), Arc::new(Direct(Arc::clone(member)))).unwrap()
        })
    }

    fn transitional() -> Self {
        Self::new(3, |member| {
            Function::transitional(Arc::clone(member), Arc::new(Direct(Arc::clone(member)))).unwrap()
        })
    }

    /// Does an access to its end, however long that takes.
    fn finish(&self, start: impl FnOnce(&dyn Fn() -> Waker) -> Access, data: &mut [u8]) -> Access {
        let (sender, woken) = mpsc::channel();
        let wake = || -> Waker {
            let sender = sender.clone();
            Box::new(move || sender.send(()).unwrap())
        };
        let mut access = start(&wake);
        while access == Access::Later {
            woken.recv_timeout(PATIENCE).unwrap();
            access = self.function.resume(data, &wake);
        }
        assert!(woken.try_recv().is_err(), "woken though nobody waited");
        access
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        // `data` is lent twice, one after the other.
        let mut first = data.to_vec();
        let mut rest = data.to_vec();
        let mut later = false;
        let access = self.finish(
            |wake| {
                let access = self.function.read(region, offset, &mut first, wake);
                later = access == Access::Later;
                access
            },
            &mut rest,
        );
        assert_eq!(access, Access::Done);
        data.copy_from_slice(if later { &rest } else { &first });
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        let access = self.finish(|wake| self.function.write(region, offset, data, wake), &mut []);
        assert_eq!(access, Access::Done);
    }

    fn get(&self, region: u32, offset: u64, width: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(region, offset, &mut bytes[..width]);
        u32::from_le_bytes(bytes)
    }

    fn put(&self, region: u32, offset: u64, width: usize, value: u32) {
        self.write(region, offset, &value.to_le_bytes()[..width]);
    }

    fn config(&self, offset: usize, width: usize) -> u32 {
        self.get(CONFIG_REGION, offset as u64, width)
    }

    fn set_config(&self, offset: usize, width: usize, value: u32) {
        self.put(CONFIG_REGION, offset as u64, width, value);
    }

    /// Offset of a capability with this id, and this `cfg_type` if it is virtio's.
    fn find(&self, id: u32, cfg_type: Option<u32>) -> Option<usize> {
        let mut at = self.config(0x34, 1) as usize;
        while at != 0 {
            if self.config(at, 1) == id && cfg_type.is_none_or(|wanted| self.config(at + 3, 1) == wanted) {
                return Some(at);
            }
            at = self.config(at + 1, 1) as usize;
        }
        None
    }

    fn assign(&self, index: u32, start: u32, count: usize) -> Vec<Arc<OwnedFd>> {
        let fds: Vec<_> = (0..count).map(|_| Arc::new(sys::eventfd().unwrap())).collect();
        let change = IrqChange::Assign {
            index,
            start,
            fds: fds.iter().cloned().map(Some).collect(),
        };
        self.function.set_irqs(change).unwrap();
        fds
    }

    fn map(&self, guest: &Guest) {
        let fd = peer(&guest.file);
        let region = self
            .pool
            .mappings()
            .region(&fd, guest.base, guest.size, guest.base, 0)
            .unwrap();
        self.function.dma_map(region).unwrap();
    }

    fn disconnect(&self) {
        let (sender, done) = mpsc::channel();
        self.function.detach(Completion::call(move || sender.send(()).unwrap()));
        done.recv_timeout(PATIENCE).unwrap();
        self.line.remove(Completion::call(|| {}));
    }

    /// A driver of virtio 1.0 as far as its rings: features, vector for each queue if there are vectors, DRIVER_OK.
    fn start_modern(&self, ring: &Ring, vectors: bool) {
        let common = u64::from(COMMON_OFFSET);
        let get = |offset: u64, width| self.get(MODERN, common + offset, width);
        let put = |offset: u64, width, value| self.put(MODERN, common + offset, width, value);
        put(20, 1, 0);
        assert_eq!(get(20, 1), 0);
        put(20, 1, 1);
        put(20, 1, 3);
        put(0, 4, 1);
        assert_ne!(get(4, 4) & 1, 0, "VERSION_1");
        put(8, 4, 1);
        put(12, 4, 1);
        put(8, 4, 0);
        put(12, 4, 0);
        put(20, 1, 0xb);
        assert_eq!(get(20, 1), 0xb);
        if vectors {
            put(16, 2, 0);
            assert_eq!(get(16, 2), 0);
        }
        assert_eq!(get(18, 2), 2);
        put(22, 2, 0);
        assert_eq!(get(24, 2), 64);
        if vectors {
            put(26, 2, 1);
            assert_eq!(get(26, 2), 1);
        }
        assert_eq!(get(30, 2), 0);
        for (at, address) in [
            (32, ring.addresses.desc),
            (40, ring.addresses.driver),
            (48, ring.addresses.device),
        ] {
            put(at, 4, address as u32);
            put(at + 4, 4, 0);
        }
        put(28, 2, 1);
        put(20, 1, 0xf);
        assert_eq!(get(20, 1), 0xf);
    }

    /// MSI-X enable bit and eventfds, as a client does it when its guest enables.
    fn enable_msix(&self) -> Vec<Arc<OwnedFd>> {
        let msix = self.find(0x11, None).unwrap();
        let count = (self.config(msix + 2, 2) & 0x7ff) + 1;
        self.set_config(msix + 2, 2, 0x8000);
        self.assign(IRQ_MSIX, 0, count as usize)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.line.remove(Completion::call(|| {}));
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn signalled(fd: &OwnedFd) -> bool {
    sys::eventfd_drain(fd.as_raw_fd())
}

/// Not signalled, also not a little later.
fn quiet(fd: &OwnedFd) -> bool {
    std::thread::sleep(Duration::from_millis(30));
    !signalled(fd)
}

fn guest() -> (Guest, Ring) {
    let guest = Guest::new(BASE, SIZE);
    (guest, Ring::legacy(BASE, 64, 4096))
}

/// Offers a request of one sector; its data is at DATA + 0x1000, its status behind.
fn request(guest: &Guest, ring: &mut Ring, write: bool, sector: u64) {
    let mut header = u32::from(write).to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    guest.write(DATA, &header);
    guest.write(DATA + 0x2000, &[0xff]);
    ring.descriptor(guest, 0, DATA, 16, NEXT, 1);
    let direction = if write { 0 } else { WRITE };
    ring.descriptor(guest, 1, DATA + 0x1000, 512, NEXT | direction, 2);
    ring.descriptor(guest, 2, DATA + 0x2000, 1, WRITE, 0);
    ring.offer(guest, 0);
}

/// A sector written and read again.
fn checked_io(guest: &Guest, ring: &mut Ring, notify: impl Fn(), interrupt: &OwnedFd, mut acknowledge: impl FnMut()) {
    let pattern: Vec<u8> = (0..512u32).map(|i| (i * 7 + u32::from(ring.avail_idx)) as u8).collect();
    for write in [true, false] {
        let content = if write { pattern.clone() } else { vec![0; 512] };
        guest.write(DATA + 0x1000, &content);
        request(guest, ring, write, 5);
        notify();
        until("the request's end", || ring.used_idx(guest) == ring.avail_idx);
        until("the interrupt", || signalled(interrupt));
        acknowledge();
        assert_eq!(guest.read(DATA + 0x2000, 1), [0]);
        assert_eq!(guest.read(DATA + 0x1000, 512), pattern);
    }
}

#[test]
fn ids() {
    for (virtio, transitional, modern, class) in [
        (1, 0x1000, 0x1041, 0x02_0000),
        (2, 0x1001, 0x1042, 0x01_0000),
        (3, 0x1003, 0x1043, 0x07_8000),
        (4, 0x1005, 0x1044, 0xff_0000),
        (5, 0x1002, 0x1045, 0xff_0000),
        (8, 0x1004, 0x1048, 0x01_0000),
        (9, 0x1009, 0x1049, 0x00_0200),
        (26, 0x101a, 0x105a, 0x01_8000),
        (63, 0x103f, 0x107f, 0xff_0000),
    ] {
        assert_eq!(transitional_device_id(virtio).unwrap(), transitional);
        assert_eq!(modern_device_id(virtio).unwrap(), modern);
        assert_eq!(class_code(virtio), class);
    }
    for virtio in [0, 64, 65535, u32::MAX] {
        assert!(matches!(modern_device_id(virtio), Err(Error::Invalid(_))));
        assert!(matches!(transitional_device_id(virtio), Err(Error::Invalid(_))));
    }
}

#[test]
fn what_the_kinds_look_like() {
    let size = |function: &Function, index| function.region(index).size;

    let bed = Bed::modern();
    let info = bed.function.info();
    assert_eq!((info.kind, info.member), ("modern", 3));
    assert_eq!(bed.function.label(), "member 3, modern function");
    assert_eq!(bed.config(0, 4), 0x1042_1af4);
    assert_eq!(bed.config(8, 4), 0x0100_0001);
    assert_eq!(bed.config(0x2c, 4), 0x1100_1af4);
    assert_eq!(bed.config(0x3d, 1), 1);
    let bars: Vec<_> = info.bars.iter().map(|bar| (bar.index, bar.size, bar.kind)).collect();
    assert_eq!(bars, [(1, 0x1000, "mem32"), (2, 0x4000, "mem32")]);
    assert_eq!(
        [0, 1, 2, 3, 6, 7, 8, 9].map(|index| size(&bed.function, index)),
        [0, 0x1000, 0x4000, 0, 0, 4096, 0, 0]
    );
    assert_eq!(
        [0, 1, 2, 3, 4].map(|index| bed.function.irq_count(index)),
        [1, 0, 3, 0, 0]
    );
    let common = bed.find(9, Some(1)).unwrap();
    assert_eq!(bed.config(common + 12, 4), 64);
    let notify = bed.find(9, Some(2)).unwrap();
    assert_eq!(bed.config(notify + 12, 4), 8);
    assert_eq!(bed.config(notify + 16, 4), 4);
    let device = bed.find(9, Some(4)).unwrap();
    assert_eq!(bed.config(device + 12, 4) as usize, bed.member.config_size());

    let bed = Bed::legacy(0);
    assert_eq!(bed.config(0, 4), 0x1001_1af4);
    assert_eq!(bed.config(8, 4), 0x0100_0000);
    assert_eq!(bed.config(0x2c, 4), 0x0002_1af4);
    assert_eq!(bed.config(0x10, 4), 1);
    let wanted = (24 + bed.member.legacy_config_size() as u64).next_power_of_two();
    assert_eq!(size(&bed.function, 0), wanted);
    assert_eq!(bed.find(0x11, None), None, "no vectors, no MSI-X");
    assert_eq!(bed.find(9, None), None, "no modern driver finds anything");
    assert_eq!(bed.function.irq_count(2), 0);
    assert_eq!(bed.function.info().capabilities, ["power", "express"]);

    let bed = Bed::transitional();
    assert_eq!(bed.config(0, 4), 0x1001_1af4);
    assert_eq!(bed.config(8, 4), 0x0100_0000);
    assert_eq!(bed.config(0x2c, 4), 0x0002_1af4);
    assert_eq!(bed.function.info().bars.len(), 3);
    for cfg_type in 1..=5 {
        assert!(bed.find(9, Some(cfg_type)).is_some());
    }
}

#[test]
fn many_vectors() {
    let bed = Bed::new(2048, |member| Function::modern(Arc::clone(member)).unwrap());
    let msix = bed.find(0x11, None).unwrap();
    assert_eq!(bed.config(msix + 2, 2), 0x7ff);
    assert_eq!(bed.config(msix + 4, 4), 1);
    assert_eq!(bed.config(msix + 8, 4), 0x8001);
    assert_eq!(bed.function.region(MSIX).size, 0x1_0000);
    let fds = bed.assign(IRQ_MSIX, 2000, 48);
    assert_eq!(fds.len(), 48);
    assert_eq!(bed.function.info().msix, (2000..2048).collect::<Vec<_>>());
    let refused = |start, count| {
        bed.function.set_irqs(IrqChange::Assign {
            index: IRQ_MSIX,
            start,
            fds: vec![None; count],
        })
    };
    assert_eq!(refused(2048, 1), Err(libc::EINVAL));
    assert_eq!(refused(2047, 2), Err(libc::EINVAL));
    assert_eq!(refused(u32::MAX, 2), Err(libc::EINVAL));
    assert_eq!(refused(2048, 0), Ok(()));
    bed.function.set_irqs(IrqChange::Disable { index: IRQ_MSIX }).unwrap();
    assert!(bed.function.info().msix.is_empty());
}

#[test]
fn a_modern_driver_with_msix() {
    let bed = Bed::modern();
    let (guest, mut ring) = guest();
    bed.map(&guest);
    let fds = bed.enable_msix();
    assert!(bed.function.info().msix_enabled);
    bed.start_modern(&ring, true);
    assert_eq!(bed.get(MODERN, u64::from(DEVICE_OFFSET), 4), 2048, "capacity");
    let notify = || bed.put(MODERN, u64::from(NOTIFY_OFFSET), 2, 0);
    checked_io(&guest, &mut ring, notify, &fds[1], || ());
    assert_eq!(bed.get(MODERN, u64::from(ISR_OFFSET), 1), 0);
    assert!(quiet(&fds[0]) && quiet(&fds[2]));
    // 32 bits, and at another queue's place: the value says which queue.
    let wide = || bed.put(MODERN, u64::from(NOTIFY_OFFSET) + 4, 4, 0xabcd_0000);
    checked_io(&guest, &mut ring, wide, &fds[1], || ());

    // A configuration change goes to its vector, through the client's connection.
    assert!(bed.member.config_changed());
    until("the configuration interrupt", || signalled(&fds[0]));

    // Another vector for the running queue, and none.
    bed.put(MODERN, 26, 2, 2);
    checked_io(&guest, &mut ring, notify, &fds[2], || ());
    bed.put(MODERN, 26, 2, 7);
    assert_eq!(bed.get(MODERN, 26, 2), NO_VECTOR);

    // Reset: the status is 0 at once, the ring is left alone.
    bed.put(MODERN, 20, 1, 0);
    assert_eq!(bed.get(MODERN, 20, 1), 0);
    assert_eq!(bed.get(MODERN, 28, 2), 0);
    let used = ring.used_idx(&guest);
    request(&guest, &mut ring, true, 1);
    notify();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(ring.used_idx(&guest), used);
}

/// The group of a member, with the forwarder of its I/O BAR.
fn group(member: &Arc<Member>, notify_region: bool) -> (Arc<DeviceGroup>, Arc<dyn IoPorts>) {
    let options = GroupOptions {
        compat: Compat::new(false),
        feature_management: false,
        notify_region,
        admin_queues: 1,
    };
    let group = DeviceGroup::new(Arc::clone(member.pool()), options).unwrap();
    group.add(Arc::clone(member)).unwrap();
    let ports = Arc::new(Forwarder::new(Arc::clone(&group), Arc::clone(member)).unwrap());
    (group, ports)
}

#[test]
fn a_legacy_driver() {
    legacy_driver(&Bed::legacy(3));
}

#[test]
fn a_legacy_driver_through_the_owner() {
    for notify_region in [false, true] {
        let mut owner = None;
        let bed = Bed::new(3, |member| {
            let (group, ports) = group(member, notify_region);
            owner = Some(group);
            Function::legacy(Arc::clone(member), ports).unwrap()
        });
        legacy_driver(&bed);
        let commands = owner.unwrap().member_commands(3);
        for opcode in [2, 3, 5] {
            let count = commands
                .iter()
                .find(|(of, _)| *of == opcode)
                .map_or(0, |(_, count)| *count);
            assert!(count > 10, "opcode {opcode}: {count}");
        }
        // What no command can do is refused, and nothing is the worse for it.
        let wake = || -> Waker { Box::new(|| ()) };
        let refused = Access::Refused(libc::EINVAL);
        assert_eq!(bed.function.read(0, 18, &mut [0; 2], &wake), refused);
        assert_eq!(bed.function.write(0, 127, &[0], &wake), refused);
        assert_eq!(bed.get(0, 18, 1), 3);
    }
}

#[test]
fn a_transitional_function_through_the_owner() {
    let bed = Bed::new(3, |member| {
        let (_, ports) = group(member, true);
        Function::transitional(Arc::clone(member), ports).unwrap()
    });
    both_faces(&bed);
    // The window reaches the I/O BAR, too.
    let cap = bed.find(9, Some(5)).unwrap();
    bed.set_config(cap + 4, 1, 0);
    bed.set_config(cap + 8, 4, 18);
    bed.set_config(cap + 12, 4, 1);
    assert_eq!(bed.config(cap + 16, 1), 0xf);
    // A reset there waits for rings to stop.
    bed.set_config(cap + 16, 1, 0);
    assert_eq!(bed.get(MODERN, 20, 1), 0);
    // Two registers at once: the configuration space is read, but not the BAR.
    bed.set_config(cap + 12, 4, 2);
    assert_eq!(bed.config(cap + 16, 2), 0xffff);
    bed.set_config(cap + 16, 2, 0x0303);
    assert_eq!(bed.get(MODERN, 20, 1), 0);
}

#[test]
fn the_capability_of_a_group() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let first = member(&pool, 3, 5, true);
    let (group, _) = group(&first, true);
    let wake = || -> Waker { Box::new(|| ()) };
    let owner = Function::owner(member(&pool, 0, 3, false), Arc::clone(&group) as Arc<dyn VfControl>).unwrap();
    let get = |at, width: usize| {
        let mut bytes = [0; 4];
        assert_eq!(owner.read(CONFIG_REGION, at, &mut bytes[..width], &wake), Access::Done);
        u32::from_le_bytes(bytes)
    };
    let put = |at, width: usize, value: u32| {
        let bytes = value.to_le_bytes();
        assert_eq!(owner.write(CONFIG_REGION, at, &bytes[..width], &wake), Access::Done);
    };
    assert_eq!(get(0x10e, 2), 65535);
    assert_eq!(get(0x11a, 2), 0x1042);
    assert_eq!((get(0x108, 2), get(0x110, 2)), (1, 3), "there is a member 3");
    put(0x108, 2, 0);
    assert_eq!(group.core().vfs(), (false, 3));
    put(0x110, 2, 1);
    put(0x108, 2, 1);
    assert_eq!(group.core().vfs(), (true, 1));
    assert_eq!(owner.reset(&wake), Access::Done);
    assert_eq!(group.core().vfs(), (true, 3));
    // Without members there is a capability all the same.
    let removed = group.remove(3);
    assert!(removed);
    let (line, attached) = connect(&pool, &owner);
    attached.unwrap();
    assert_eq!(get(0x11a, 2), 0);
    assert_eq!((get(0x108, 2), get(0x110, 2)), (0, 0));
    line.remove(Completion::call(|| {}));
}

fn legacy_driver(bed: &Bed) {
    let (guest, mut ring) = guest();
    bed.map(&guest);
    let get = |offset, width| bed.get(0, offset, width);
    let put = |offset, width, value| bed.put(0, offset, width, value);
    put(18, 1, 0);
    assert_eq!(get(18, 1), 0);
    put(18, 1, 1);
    put(18, 1, 3);
    let offered = get(0, 4);
    assert_ne!(offered & 1 << 27, 0);
    put(4, 4, offered & !(1 << 29 | 1 << 28));
    // The configuration moves when MSI-X is enabled.
    let capacity: Vec<_> = (20..28).map(|at| get(at, 1)).collect();
    assert_eq!(capacity, [0, 8, 0, 0, 0, 0, 0, 0]);
    let fds = bed.enable_msix();
    let capacity: Vec<_> = (24..32).map(|at| get(at, 1)).collect();
    assert_eq!(capacity, [0, 8, 0, 0, 0, 0, 0, 0]);
    put(20, 2, 0);
    assert_eq!(get(20, 2), 0);
    put(14, 2, 0);
    assert_eq!(get(12, 2), 64);
    assert_eq!(get(8, 4), 0);
    put(8, 4, (BASE >> 12) as u32);
    put(22, 2, 1);
    assert_eq!(get(22, 2), 1);
    put(18, 1, 7);
    let notify = || bed.put(0, 16, 2, 0);
    checked_io(&guest, &mut ring, notify, &fds[1], || ());
    put(18, 1, 0);
    assert_eq!(get(18, 1), 0);
    assert_eq!(get(8, 4), 0);

    // And with INTx, without ever writing features, before DRIVER_OK: SeaBIOS.
    let msix = bed.find(0x11, None).unwrap();
    bed.set_config(msix + 2, 2, 0);
    bed.function.set_irqs(IrqChange::Disable { index: IRQ_MSIX }).unwrap();
    let intx = bed.assign(IRQ_INTX, 0, 1).remove(0);
    ring = Ring::legacy(BASE, 64, 4096);
    guest.write(BASE, &vec![0; 0x4000]);
    put(18, 1, 3);
    put(14, 2, 0);
    put(8, 4, (BASE >> 12) as u32);
    let acknowledge = || assert_eq!(bed.get(0, 19, 1), 1);
    checked_io(&guest, &mut ring, notify, &intx, acknowledge);
    assert_eq!(get(19, 1), 0);
    assert_eq!(get(20, 1), 0, "the configuration is back at 20");
    assert_eq!(get(21, 1), 8);
}

#[test]
fn a_transitional_function_has_both_faces() {
    both_faces(&Bed::transitional());
}

fn both_faces(bed: &Bed) {
    let (guest, mut ring) = guest();
    bed.map(&guest);
    // Status is one register.
    bed.put(0, 18, 1, 1);
    assert_eq!(bed.get(MODERN, 20, 1), 1);
    bed.put(MODERN, 20, 1, 3);
    assert_eq!(bed.get(0, 18, 1), 3);
    let fds = bed.enable_msix();
    bed.start_modern(&ring, true);
    let notify = || bed.put(MODERN, u64::from(NOTIFY_OFFSET), 2, 0);
    checked_io(&guest, &mut ring, notify, &fds[1], || ());
}

#[test]
fn intx() {
    let bed = Bed::modern();
    let (guest, mut ring) = guest();
    bed.map(&guest);
    let intx = bed.assign(IRQ_INTX, 0, 1).remove(0);
    assert!(bed.function.info().intx);
    bed.start_modern(&ring, false);
    let notify = || bed.put(MODERN, u64::from(NOTIFY_OFFSET), 2, 0);
    let isr = || bed.get(MODERN, u64::from(ISR_OFFSET), 1);
    checked_io(&guest, &mut ring, notify, &intx, || assert_eq!(isr(), 1));

    // Unmasked while it is still asserted: once more. QEMU does that after each access to a BAR.
    let unmask = || {
        bed.function
            .set_irqs(IrqChange::Unmask {
                index: IRQ_INTX,
                start: 0,
                count: 1,
            })
            .unwrap();
    };
    unmask();
    assert!(quiet(&intx), "nothing is pending");
    assert_eq!(bed.config(6, 2) & 8, 0);
    request(&guest, &mut ring, false, 0);
    notify();
    until("the interrupt", || signalled(&intx));
    assert_eq!(bed.config(6, 2) & 8, 8, "the status register says so");
    for _ in 0..3 {
        unmask();
        until("the interrupt again", || signalled(&intx));
    }
    assert_eq!(isr(), 1);
    unmask();
    assert!(quiet(&intx), "an interrupt was handled");

    // Masked by the client.
    bed.function
        .set_irqs(IrqChange::Mask {
            index: IRQ_INTX,
            start: 0,
            count: 1,
        })
        .unwrap();
    request(&guest, &mut ring, false, 0);
    notify();
    until("the request", || ring.used_idx(&guest) == ring.avail_idx);
    assert!(quiet(&intx), "it is masked");
    unmask();
    until("the interrupt that was held back", || signalled(&intx));
    // A ring that is given another way to interrupt does so once, to be on the safe side.
    let settle = || {
        std::thread::sleep(Duration::from_millis(30));
        signalled(&intx);
        isr()
    };
    assert_eq!(settle(), 1);

    // Disabled by the driver.
    bed.set_config(4, 2, 0x400);
    request(&guest, &mut ring, false, 0);
    notify();
    until("the request", || ring.used_idx(&guest) == ring.avail_idx);
    assert!(quiet(&intx), "INTx is disabled");
    assert_eq!(bed.config(6, 2) & 8, 8);
    bed.set_config(4, 2, 0);
    until("the interrupt that was held back", || signalled(&intx));
    assert_eq!(settle(), 1);

    // A configuration change.
    bed.member.config_changed();
    until("the configuration interrupt", || signalled(&intx));
    assert_eq!(isr(), 2);
    assert_eq!(isr(), 0);

    // A client's test of the way.
    let trigger = |index, start, count| bed.function.set_irqs(IrqChange::Trigger { index, start, count });
    trigger(IRQ_INTX, 0, 1).unwrap();
    until("the test", || signalled(&intx));
    assert_eq!(trigger(IRQ_INTX, 1, 1), Err(libc::EINVAL));
    assert_eq!(trigger(1, 0, 1), Err(libc::EINVAL));
    let fds = bed.assign(IRQ_MSIX, 0, 3);
    trigger(IRQ_MSIX, 1, 2).unwrap();
    until("the test", || signalled(&fds[1]));
    until("the test", || signalled(&fds[2]));
    assert!(quiet(&fds[0]));
    // None for MSI: there is none to be let go of, either.
    bed.function.set_irqs(IrqChange::Disable { index: 1 }).unwrap();
    let change = IrqChange::Assign {
        index: 1,
        start: 0,
        fds: vec![None],
    };
    assert_eq!(bed.function.set_irqs(change), Err(libc::EINVAL));
}

#[test]
fn resets() {
    let bed = Bed::modern();
    let (guest, _) = guest();
    bed.map(&guest);
    let mut initial = vec![0; 4096];
    bed.read(CONFIG_REGION, 0, &mut initial);
    let flr = || {
        let express = bed.find(0x10, None).unwrap();
        let control = bed.config(express + 8, 2);
        bed.set_config(express + 8, 2, control | 0x8000);
    };
    let device_reset = || {
        let access = bed.finish(|wake| bed.function.reset(wake), &mut []);
        assert_eq!(access, Access::Done);
    };
    for reset in [&flr as &dyn Fn(), &device_reset, &flr] {
        let fds = bed.enable_msix();
        bed.set_config(4, 2, 7);
        bed.set_config(0x14, 4, 0xfeb0_0000);
        bed.put(MSIX, 0, 4, 0xfee0_0000);
        guest.write(BASE, &vec![0; 0x4000]);
        let mut ring = Ring {
            avail_idx: 0,
            ..Ring::legacy(BASE, 64, 4096)
        };
        bed.start_modern(&ring, true);
        let notify = || bed.put(MODERN, u64::from(NOTIFY_OFFSET), 2, 0);
        checked_io(&guest, &mut ring, notify, &fds[1], || ());
        reset();
        let mut after = vec![0; 4096];
        bed.read(CONFIG_REGION, 0, &mut after);
        assert_eq!(after, initial);
        assert!(!bed.member.msix_enabled());
        assert_eq!(bed.get(MODERN, 20, 1), 0);
        assert_eq!(bed.get(MODERN, 28, 2), 0);
        assert_eq!(bed.get(MODERN, 16, 2), NO_VECTOR);
        assert_eq!(bed.get(MSIX, 0, 4), 0);
        assert_eq!(bed.get(MODERN, u64::from(ISR_OFFSET), 1), 0);
        // The client's eventfds and memory stay.
        assert_eq!(bed.function.info().msix, [0, 1, 2]);
        assert_eq!(bed.function.info().dma.len(), 1);
    }
}

#[test]
fn through_the_window() {
    let bed = Bed::modern();
    let cap = bed.find(9, Some(5)).unwrap();
    let aim = |bar, offset, length| {
        bed.set_config(cap + 4, 1, bar);
        bed.set_config(cap + 8, 4, offset);
        bed.set_config(cap + 12, 4, length);
    };
    aim(MODERN, COMMON_OFFSET + 18, 2);
    assert_eq!(bed.config(cap + 16, 2), 2, "num_queues");
    assert_eq!(bed.config(cap + 16, 4), 2);
    aim(MODERN, COMMON_OFFSET + 20, 1);
    bed.set_config(cap + 16, 1, 3);
    assert_eq!(bed.get(MODERN, 20, 1), 3);
    assert_eq!(bed.config(cap + 16, 1), 3);
    // A reset takes its time, also this way.
    bed.set_config(cap + 16, 1, 0);
    assert_eq!(bed.get(MODERN, 20, 1), 0);
    aim(MODERN, DEVICE_OFFSET, 4);
    assert_eq!(bed.config(cap + 16, 4), 2048);
    // Nothing happens with a length that makes no sense, or outside of the BAR.
    for (bar, offset, length) in [(MODERN, 20, 3), (MODERN, 0x4000, 4), (0, 18, 1), (9, 0, 4)] {
        aim(bar, offset, length);
        bed.set_config(cap + 16, 4, 0xf);
        assert_eq!(bed.config(cap + 16, 4), 0xf);
        assert_eq!(bed.get(MODERN, 20, 1), 0);
    }
    // A copy of the configuration space reads no registers.
    bed.assign(IRQ_INTX, 0, 1);
    bed.put(MODERN, 20, 1, 0xf);
    assert!(bed.member.config_changed());
    aim(MODERN, ISR_OFFSET, 1);
    bed.read(CONFIG_REGION, 0, &mut vec![0; 4096]);
    assert_eq!(bed.config(cap + 16, 1), 2);
    assert_eq!(bed.config(cap + 16, 1), 0);
}

#[test]
fn an_io_bar_that_takes_its_time() {
    let slow = Arc::new(Slow::default());
    let ports = Arc::clone(&slow);
    let bed = Bed::new(0, |member| {
        Function::transitional(Arc::clone(member), ports as Arc<dyn IoPorts>).unwrap()
    });
    let woken = Arc::new(AtomicUsize::new(0));
    let wake = || -> Waker {
        let woken = Arc::clone(&woken);
        Box::new(move || {
            woken.fetch_add(1, Ordering::Relaxed);
        })
    };
    let mut data = [0; 2];
    assert_eq!(bed.function.read(0, 18, &mut data, &wake), Access::Later);
    slow.finish();
    assert_eq!(woken.load(Ordering::Relaxed), 1);
    assert_eq!(bed.function.resume(&mut data, &wake), Access::Done);
    assert_eq!(data, [18, 18]);
    assert_eq!(bed.function.write(0, 16, &[1, 0], &wake), Access::Later);
    slow.finish();
    assert_eq!(bed.function.resume(&mut [], &wake), Access::Done);
    assert_eq!(*slow.writes.lock().unwrap(), [(16, vec![1, 0])]);

    // The same through the window.
    let cap = bed.find(9, Some(5)).unwrap() as u64;
    bed.put(CONFIG_REGION, cap + 8, 4, 8);
    bed.put(CONFIG_REGION, cap + 12, 4, 4);
    let mut data = [0; 4];
    assert_eq!(
        bed.function.read(CONFIG_REGION, cap + 16, &mut data, &wake),
        Access::Later
    );
    slow.finish();
    assert_eq!(bed.function.resume(&mut data, &wake), Access::Done);
    assert_eq!(data, [8; 4]);
    assert_eq!(
        bed.function.write(CONFIG_REGION, cap + 16, &[1, 2, 3, 4], &wake),
        Access::Later
    );
    slow.finish();
    assert_eq!(bed.function.resume(&mut [], &wake), Access::Done);
    assert_eq!(slow.writes.lock().unwrap()[1], (8, vec![1, 2, 3, 4]));

    // Nobody waits any longer.
    assert_eq!(bed.function.read(0, 0, &mut data, &wake), Access::Later);
    bed.function.give_up();
    assert_eq!(slow.given_up.load(Ordering::Relaxed), 1);
    bed.function.give_up();
    assert_eq!(slow.given_up.load(Ordering::Relaxed), 1, "once is enough");
    assert_eq!(bed.config(0, 2), 0x1af4);
}

#[test]
fn the_msix_table_is_memory() {
    let bed = Bed::modern();
    let mut table = [0xaa; 64];
    bed.read(MSIX, 0, &mut table);
    let mut expected = [0; 64];
    for entry in 0..3 {
        expected[16 * entry + 12] = 1;
    }
    assert_eq!(table, expected, "all masked, and nothing behind the third");
    bed.write(MSIX, 16, &0xfee0_1234_5678_9abc_u64.to_le_bytes());
    bed.put(MSIX, 24, 4, 0x41);
    bed.put(MSIX, 28, 4, 0);
    expected[16..24].copy_from_slice(&0xfee0_1234_5678_9abc_u64.to_le_bytes());
    expected[24] = 0x41;
    expected[28] = 0;
    // Across the end, and what is no table.
    bed.write(MSIX, 40, &[0x11; 16]);
    expected[40..48].fill(0x11);
    bed.write(MSIX, 0x800, &[0xff; 8]);
    bed.write(MSIX, 0xff8, &[0xff; 8]);
    bed.read(MSIX, 0, &mut table);
    assert_eq!(table, expected);
    let mut rest = vec![0xaa; 0x1000 - 48];
    bed.read(MSIX, 48, &mut rest);
    assert!(rest.iter().all(|&byte| byte == 0));
}

#[test]
fn odd_accesses() {
    let bed = Bed::modern();
    // Any width of the common configuration.
    bed.put(MODERN, 20, 1, 1);
    let mut eight = [0; 8];
    bed.read(MODERN, 16, &mut eight);
    assert_eq!(eight, [0xff, 0xff, 2, 0, 1, eight[5], 0, 0]);
    bed.write(MODERN, 32, &0x1234_5678_9abc_def0_u64.to_le_bytes());
    bed.read(MODERN, 32, &mut eight);
    assert_eq!(u64::from_le_bytes(eight), 0x1234_5678_9abc_def0);
    // The device configuration, one byte at a time and all of it.
    let mut whole = vec![0; 96];
    bed.read(MODERN, u64::from(DEVICE_OFFSET), &mut whole);
    for (at, byte) in (0..).zip(&whole) {
        assert_eq!(bed.get(MODERN, u64::from(DEVICE_OFFSET) + at, 1), u32::from(*byte));
    }
    // The ISR status is one byte; beside it there is nothing to be cleared.
    bed.put(MODERN, 20, 1, 0xf);
    bed.member.config_changed();
    let isr = u64::from(ISR_OFFSET);
    assert_eq!(bed.get(MODERN, isr + 1, 2), 0);
    bed.put(MODERN, isr, 1, 0xff);
    assert_eq!(bed.get(MODERN, isr, 4), 2);
    assert_eq!(bed.get(MODERN, isr, 4), 0);
    // An access that begins in one structure ends there.
    bed.member.config_changed();
    let mut across = [0xaa; 16];
    bed.read(MODERN, isr - 8, &mut across);
    assert_eq!(across, [0; 16]);
    bed.write(MODERN, isr - 1, &[0xff; 8]);
    assert_eq!(bed.get(MODERN, isr, 1), 2);
    // The whole BAR at once.
    let mut all = vec![0xaa; 0x4000];
    bed.read(MODERN, 0, &mut all);
    assert_eq!(all[18], 2);
    assert!(all[64..].iter().all(|&byte| byte == 0));
    // BARs that aren't there.
    for region in [0, 3, 5, 6, 8] {
        assert_eq!(bed.function.region(region), RegionInfo::default());
        assert_eq!(bed.get(region, 0, 4), 0);
        bed.put(region, 0, 4, 1);
    }
    // Notifications of queues that aren't there, too narrow ones, too wide ones, and ones outside of the structure.
    let notify = u64::from(NOTIFY_OFFSET);
    bed.put(MODERN, notify, 2, 0xffff);
    bed.put(MODERN, notify, 1, 0);
    bed.write(MODERN, notify, &[0; 8]);
    bed.put(MODERN, 0x3ffe, 2, 0);
    assert_eq!(bed.get(MODERN, notify, 4), 0);
}

#[test]
fn one_client_at_a_time() {
    let bed = Bed::legacy(3);
    let (guest, mut ring) = guest();
    bed.map(&guest);
    let other = Function::modern(Arc::clone(&bed.member)).unwrap();
    let (line, refused) = connect(&bed.pool, &other);
    assert!(matches!(refused, Err(Error::Busy(3, _))));
    line.remove(Completion::call(|| {}));
    assert!(
        matches!(bed.member.attach(), Err(Error::Busy(..))),
        "vhost-user is refused, too"
    );
    assert!(other.info().dma.is_empty(), "the other function's memory is its own");
    assert_eq!(bed.function.info().dma.len(), 1);
    other.detach(Completion::call(|| {}));
    assert!(bed.member.attached(), "it can't let go of what it doesn't have");

    // A client that leaves in the middle.
    let fds = bed.enable_msix();
    bed.set_config(4, 2, 7);
    bed.put(0, 18, 1, 3);
    bed.put(0, 8, 4, (BASE >> 12) as u32);
    bed.put(0, 22, 2, 1);
    bed.put(0, 18, 1, 7);
    checked_io(&guest, &mut ring, || bed.put(0, 16, 2, 0), &fds[1], || ());
    bed.disconnect();
    assert!(!bed.member.attached());
    assert_eq!(Arc::strong_count(&fds[1]), 1, "its eventfds are let go of");
    let info = bed.function.info();
    assert_eq!((info.command, info.msix_enabled, info.intx), (0, false, false));
    assert!(info.msix.is_empty() && info.dma.is_empty());

    // The next one finds everything as after power-up.
    let (line, attached) = connect(&bed.pool, &other);
    attached.unwrap();
    assert_eq!(other.info().kind, "modern");
    let mut status = [0xff];
    let wake = || -> Waker { Box::new(|| ()) };
    assert_eq!(other.read(MODERN, 20, &mut status, &wake), Access::Done);
    assert_eq!(status, [0]);
    let (sender, done) = mpsc::channel();
    other.detach(Completion::call(move || sender.send(()).unwrap()));
    done.recv_timeout(PATIENCE).unwrap();
    line.remove(Completion::call(|| {}));
}

#[test]
fn memory_is_let_go_of() {
    let bed = Bed::modern();
    let (guest, mut ring) = guest();
    let second = Guest::new(BASE + SIZE, SIZE);
    bed.map(&guest);
    bed.map(&second);
    let overlap = bed
        .pool
        .mappings()
        .region(&peer(&guest.file), BASE, SIZE, BASE, 0)
        .unwrap();
    assert_eq!(bed.function.dma_map(overlap).unwrap_err().rule, "memory.overlap");
    let fds = bed.enable_msix();
    bed.start_modern(&ring, true);
    let notify = || bed.put(MODERN, u64::from(NOTIFY_OFFSET), 2, 0);
    checked_io(&guest, &mut ring, notify, &fds[1], || ());
    let unmap = |iova, size| bed.finish(|wake| bed.function.dma_unmap(iova, size, wake).unwrap(), &mut []);
    assert_eq!(unmap(BASE + SIZE, SIZE), Access::Done);
    let left = bed.function.info().dma;
    assert_eq!(left.len(), 1);
    assert_eq!((left[0].iova, left[0].size), (BASE, SIZE));
    let wake = || -> Waker { Box::new(|| ()) };
    for (iova, size) in [(BASE + SIZE, SIZE), (BASE, SIZE / 2), (0, 0)] {
        let fault = bed.function.dma_unmap(iova, size, &wake).unwrap_err();
        assert_eq!(fault.rule, "memory.unknown-region");
    }
    // The ring goes on in what is left.
    checked_io(&guest, &mut ring, notify, &fds[1], || ());
    bed.put(MODERN, 20, 1, 0);
    // With no ring running there is nothing to wait for.
    let access = bed
        .function
        .dma_unmap(BASE, SIZE, &|| Box::new(|| panic!("nobody waits")))
        .unwrap();
    assert_eq!(access, Access::Done);
}

#[derive(Default)]
struct Vfs {
    state: Mutex<(bool, u16)>,
    restored: AtomicUsize,
}

impl VfControl for Vfs {
    fn shape(&self) -> VfShape {
        VfShape {
            total_vfs: 64,
            virtio_id: 1,
            vectors: 4,
            queues: 3,
        }
    }

    fn vfs(&self) -> (bool, u16) {
        *self.state.lock().unwrap()
    }

    fn vf_control(&self, enable: bool, num_vfs: u16) {
        // More than there are can't be enabled.
        *self.state.lock().unwrap() = (enable && num_vfs <= 64, num_vfs);
    }

    fn restore_vfs(&self) {
        self.restored.fetch_add(1, Ordering::Relaxed);
        *self.state.lock().unwrap() = (true, 2);
    }
}

#[test]
fn an_owner_controls_its_vfs() {
    let vfs = Arc::new(Vfs::default());
    let control = Arc::clone(&vfs);
    let bed = Bed::new(3, |member| {
        Function::owner(Arc::clone(member), control as Arc<dyn VfControl>).unwrap()
    });
    assert_eq!(bed.function.label(), "owner");
    assert_eq!(bed.function.info().capabilities.last(), Some(&"sr-iov"));
    let sr_iov = 0x100;
    assert_eq!(bed.config(sr_iov, 4), 0x0001_0010);
    assert_eq!(bed.config(sr_iov + 0xe, 2), 64);
    assert_eq!(bed.config(sr_iov + 0x1a, 2), 0x1041);
    for bar in 0..6 {
        bed.set_config(sr_iov + 0x24 + 4 * bar, 4, !0);
    }
    let bars: Vec<_> = (0..6).map(|bar| bed.config(sr_iov + 0x24 + 4 * bar, 4)).collect();
    assert_eq!(bars, [0, 0xffff_f000, 0xffff_c004, 0xffff_ffff, 0, 0]);

    // The operator's doing is seen.
    *vfs.state.lock().unwrap() = (true, 3);
    assert_eq!(bed.config(sr_iov + 8, 2), 1);
    assert_eq!(bed.config(sr_iov + 0x10, 2), 3);
    // Nothing has been written yet, so a reset leaves it alone.
    assert_eq!(bed.finish(|wake| bed.function.reset(wake), &mut []), Access::Done);
    assert_eq!(vfs.vfs(), (true, 3));
    assert_eq!(vfs.restored.load(Ordering::Relaxed), 0);
    // The client's is done.
    bed.set_config(sr_iov + 0x10, 2, 7);
    assert_eq!(vfs.vfs(), (true, 3), "fixed while VF Enable is set");
    bed.set_config(sr_iov + 8, 2, 0);
    bed.set_config(sr_iov + 0x10, 2, 65);
    bed.set_config(sr_iov + 8, 2, 9);
    assert_eq!(vfs.vfs(), (false, 65));
    assert_eq!(bed.config(sr_iov + 8, 2), 8, "what the group says is read");
    bed.set_config(sr_iov + 0x10, 2, 7);
    bed.set_config(sr_iov + 8, 2, 9);
    assert_eq!(vfs.vfs(), (true, 7));
    // A function level reset takes it back.
    let express = bed.find(0x10, None).unwrap();
    bed.set_config(express + 8, 2, 0x8000);
    assert_eq!(vfs.vfs(), (true, 2));
    assert_eq!(vfs.restored.load(Ordering::Relaxed), 1);
    // And so does leaving.
    bed.set_config(sr_iov + 8, 2, 0);
    assert_eq!(vfs.vfs(), (false, 2));
    bed.disconnect();
    assert_eq!(vfs.vfs(), (true, 2));
    assert_eq!(vfs.restored.load(Ordering::Relaxed), 2);
}

#[test]
fn what_can_not_be_a_function() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let modern = member(&pool, 1, 3, false);
    let ports = || Arc::new(Direct(Arc::clone(&modern))) as Arc<dyn IoPorts>;
    for refused in [
        Function::legacy(Arc::clone(&modern), ports()),
        Function::transitional(Arc::clone(&modern), ports()),
    ] {
        assert!(matches!(refused, Err(Error::Invalid(reason)) if reason.contains("legacy = false")));
    }
    Function::modern(Arc::clone(&modern)).unwrap();
    let vectors = member(&pool, 2, 2049, false);
    assert!(matches!(Function::modern(vectors), Err(Error::Invalid(reason)) if reason.contains("2049")));
}

#[test]
fn random_accesses() {
    for (seed, bed) in [(1, Bed::modern()), (2, Bed::legacy(3)), (3, Bed::transitional())] {
        let mut random = Random::new(seed);
        let regions: Vec<_> = (0..9).filter(|&index| bed.function.region(index).size != 0).collect();
        let (guest, _ring) = guest();
        bed.map(&guest);
        bed.assign(IRQ_INTX, 0, 1);
        bed.assign(IRQ_MSIX, 0, 3);
        let sizes: Vec<_> = (0..9).map(|index| bed.function.region(index)).collect();
        let mut identity = [0; 0x40];
        for _ in 0..3000 {
            let region = regions[random.below(regions.len() as u64) as usize];
            let size = bed.function.region(region).size;
            let near = if random.chance(70) { size.min(256) } else { size };
            let offset = random.below(near);
            let width = match random.below(8) {
                0 => random.below(size - offset) as usize + 1,
                n => 1 << (n % 4),
            };
            let width = width.min((size - offset) as usize);
            let mut bytes: Vec<u8> = (0..width).map(|_| random.next() as u8 & random.next() as u8).collect();
            // Refused is fine, waiting for ever is not.
            if random.chance(60) {
                bed.finish(|wake| bed.function.write(region, offset, &bytes, wake), &mut []);
            } else {
                let mut rest = bytes.clone();
                bed.finish(|wake| bed.function.read(region, offset, &mut bytes, wake), &mut rest);
            }
        }
        bed.read(CONFIG_REGION, 0, &mut identity);
        assert_eq!(
            identity[..4],
            if seed == 1 {
                [0xf4, 0x1a, 0x42, 0x10]
            } else {
                [0xf4, 0x1a, 0x01, 0x10]
            }
        );
        assert_eq!(
            (0..9).map(|index| bed.function.region(index)).collect::<Vec<_>>(),
            sizes
        );
        bed.disconnect();
        assert!(!bed.member.attached());
    }
}
