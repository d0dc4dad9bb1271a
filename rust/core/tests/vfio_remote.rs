// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues in memory without an fd: a driver whose memory the device can only ask for.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/vfio.rs"]
mod vfio;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{memfd, peer, Random};
use vfio::{completion, until, Bed, Client};
use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::device::Device;
use vhu_core::error::Fault;
use vhu_core::event::{Completion, Events};
use vhu_core::memory::{MappingCache, MemoryMap, Region, RemoteMemory};
use vhu_core::remote::{RemoteRunner, RemoteStart};
use vhu_core::ring::any::{area_sizes, fresh_position};
use vhu_core::ring::feature;
use vhu_core::ring::split::{AddressSpace, RingAddresses};
use vhu_core::runner::{Call, QueueSetup, QueueStats};
use vhu_core::sys;
use vhu_core::worker::Owner;

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x40_0000;
const TABLES: u64 = BASE + 0x10_0000;
const DATA: u64 = BASE + 0x20_0000;
/// Room for each request: header, 16 KiB of data, status.
const ROOM: u64 = 0x8000;
const QUEUE: u16 = 16;

/// Memory that has to be asked for.
struct Far {
    file: File,
    /// Messages: written, address, length.
    log: Mutex<Vec<(bool, u64, usize)>>,
    /// Reads hang until this is false.
    hang: AtomicBool,
    hanging: AtomicBool,
    fail: Mutex<Option<&'static str>>,
    /// Time of a message.
    delay: AtomicU64,
}

impl Far {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            file: memfd(SIZE),
            log: Mutex::default(),
            hang: AtomicBool::new(false),
            hanging: AtomicBool::new(false),
            fail: Mutex::default(),
            delay: AtomicU64::new(0),
        })
    }

    fn note(&self, write: bool, iova: u64, len: usize) -> Result<(), Fault> {
        self.log.lock().unwrap().push((write, iova, len));
        if let Some(rule) = *self.fail.lock().unwrap() {
            return Err(Fault::new(rule, "as the test wants it"));
        }
        std::thread::sleep(Duration::from_micros(self.delay.load(Ordering::Relaxed)));
        assert!(iova >= BASE && iova + len as u64 <= BASE + SIZE);
        assert!(len > 0);
        Ok(())
    }
}

impl RemoteMemory for Far {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Fault> {
        self.read_unless(iova, data, &AtomicBool::new(false))
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Fault> {
        self.note(true, iova, data.len())?;
        self.file.write_all_at(data, iova - BASE).unwrap();
        Ok(())
    }

    fn read_unless(&self, iova: u64, data: &mut [u8], cancelled: &AtomicBool) -> Result<(), Fault> {
        self.note(false, iova, data.len())?;
        while self.hang.load(Ordering::Relaxed) {
            self.hanging.store(true, Ordering::Relaxed);
            if cancelled.load(Ordering::Relaxed) {
                return Err(Fault::new("dma.cancelled", "as it says"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.file.read_exact_at(data, iova - BASE).unwrap();
        Ok(())
    }
}

/// Where a driver's memory is.
trait Place {
    fn get(&self, address: u64, bytes: &mut [u8]);
    fn put(&self, address: u64, bytes: &[u8]);

    fn u16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.get(address, &mut bytes);
        u16::from_le_bytes(bytes)
    }
}

impl Place for File {
    fn get(&self, address: u64, bytes: &mut [u8]) {
        self.read_exact_at(bytes, address - BASE).unwrap();
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.write_all_at(bytes, address - BASE).unwrap();
    }
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A driver of either ring format. Places are counted without end.
struct Driver {
    memory: File,
    packed: bool,
    features: u64,
    at: RingAddresses,
    avail: u64,
    used: u64,
    ids: Vec<u16>,
    /// Descriptors in the ring, by number.
    sent: HashMap<u16, u16>,
}

type Piece = (u64, u32, bool);

impl Driver {
    fn new(memory: &File, features: u64) -> Self {
        let packed = features & feature::RING_PACKED != 0;
        let (desc, driver, _) = area_sizes(QUEUE, packed);
        Self {
            memory: memory.try_clone().unwrap(),
            packed,
            features,
            at: RingAddresses {
                desc: BASE,
                driver: BASE + desc,
                device: (BASE + desc + driver).next_multiple_of(4096),
            },
            avail: 0,
            used: 0,
            // Each chain has at most four descriptors.
            ids: (0..QUEUE / 4).collect(),
            sent: HashMap::new(),
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn wrap(place: u64) -> bool {
        (place / u64::from(QUEUE)).is_multiple_of(2)
    }

    fn descriptor(&self, piece: Piece, flags: u16, other: u16) -> Vec<u8> {
        let (address, len, write) = piece;
        let flags = flags | if write { WRITE } else { 0 };
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        // Packed: buffer ID, flags. Split: flags, next.
        let (first, second) = if self.packed { (other, flags) } else { (flags, other) };
        bytes.extend(first.to_le_bytes());
        bytes.extend(second.to_le_bytes());
        bytes
    }

    fn offer(&mut self, id: u16, pieces: &[Piece], indirect: bool) {
        let table = TABLES + u64::from(id) * 256;
        let mut own = pieces.to_vec();
        let mut flags = 0;
        if indirect {
            for (n, piece) in pieces.iter().enumerate() {
                let last = n + 1 == pieces.len();
                let next = if last || self.packed { 0 } else { NEXT };
                self.memory
                    .put(table + 16 * n as u64, &self.descriptor(*piece, next, n as u16 + 1));
            }
            own = vec![(table, 16 * pieces.len() as u32, false)];
            flags = INDIRECT;
        }
        let count = own.len() as u16;
        if self.packed {
            // Backwards: the first descriptor's flags come last.
            for (n, piece) in own.iter().enumerate().rev() {
                let place = self.avail + n as u64;
                let wrap = if Self::wrap(place) { AVAIL } else { USED };
                let next = if n + 1 == own.len() { 0 } else { NEXT };
                let bytes = self.descriptor(*piece, flags | next | wrap, id);
                let at = self.at.desc + 16 * (place % u64::from(QUEUE));
                self.memory.put(at, &bytes[..14]);
                self.memory.put(at + 14, &bytes[14..]);
            }
            self.avail += u64::from(count);
        } else {
            for (n, piece) in own.iter().enumerate() {
                let index = 4 * id + n as u16;
                let next = if n + 1 == own.len() { 0 } else { NEXT };
                let bytes = self.descriptor(*piece, flags | next, index + 1);
                self.memory.put(self.at.desc + 16 * u64::from(index), &bytes);
            }
            let slot = self.avail % u64::from(QUEUE);
            self.memory.put(self.at.driver + 4 + 2 * slot, &(4 * id).to_le_bytes());
            self.avail += 1;
            self.memory.put(self.at.driver + 2, &(self.avail as u16).to_le_bytes());
        }
        self.sent.insert(id, count);
    }

    /// The next used element: number, length.
    fn poll(&mut self) -> Option<(u16, u32)> {
        let mut word = [0; 4];
        let (id, len) = if self.packed {
            let at = self.at.desc + 16 * (self.used % u64::from(QUEUE));
            let flags = self.memory.u16(at + 14);
            let wanted = if Self::wrap(self.used) { AVAIL | USED } else { 0 };
            if flags & (AVAIL | USED) != wanted {
                return None;
            }
            self.memory.get(at + 8, &mut word);
            (self.memory.u16(at + 12), u32::from_le_bytes(word))
        } else {
            if self.memory.u16(self.at.device + 2) == self.used as u16 {
                return None;
            }
            let at = self.at.device + 4 + 8 * (self.used % u64::from(QUEUE));
            self.memory.get(at + 4, &mut word);
            (self.memory.u16(at) / 4, u32::from_le_bytes(word))
        };
        let count = self.sent.remove(&id).expect("used once");
        self.used += if self.packed { u64::from(count) } else { 1 };
        Some((id, len))
    }

    /// Asks for an interrupt with the next used element, or for none.
    fn ask(&self, interrupt: bool) {
        let event = self.has(feature::EVENT_IDX);
        if self.packed {
            let place = (self.used % u64::from(QUEUE)) as u16 | u16::from(Self::wrap(self.used)) << 15;
            self.memory.put(self.at.driver, &place.to_le_bytes());
            let flags: u16 = match (interrupt, event) {
                (false, _) => 1,
                (true, true) => 2,
                (true, false) => 0,
            };
            self.memory.put(self.at.driver + 2, &flags.to_le_bytes());
        } else if event {
            let wanted = if interrupt { self.used } else { self.used + 0x8000 };
            self.memory.put(
                self.at.driver + 4 + 2 * u64::from(QUEUE),
                &(wanted as u16).to_le_bytes(),
            );
        } else {
            self.memory.put(self.at.driver, &u16::from(!interrupt).to_le_bytes());
        }
    }

    /// A block request in the place of its number.
    fn request(&mut self, id: u16, write: bool, sector: u64, data: &[u8], indirect: bool) {
        let at = DATA + u64::from(id) * ROOM;
        let mut header = u32::from(write).to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory.put(at, &header);
        self.memory.put(at + 0x6000, &[0xff]);
        self.memory.put(at + 0x200, data);
        let half = (data.len() / 2) as u32;
        let pieces = [
            (at, 16, false),
            (at + 0x200, half, !write),
            (at + 0x200 + u64::from(half), data.len() as u32 - half, !write),
            (at + 0x6000, 1, true),
        ];
        self.offer(id, &pieces, indirect);
    }

    fn status(&self, id: u16) -> u8 {
        let mut byte = [0];
        self.memory.get(DATA + u64::from(id) * ROOM + 0x6000, &mut byte);
        byte[0]
    }

    fn data(&self, id: u16, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.get(DATA + u64::from(id) * ROOM + 0x200, &mut data);
        data
    }
}

fn blk(image: &str) -> Arc<dyn Device> {
    let options = BlkOptions {
        queues: 1,
        queue_size: QUEUE,
        blk_size: 512,
        serial: "far".into(),
    };
    Arc::new(Blk::new(Image::open(image, false).unwrap(), options).unwrap())
}

/// A queue, its driver, and what both need.
struct Table {
    far: Arc<Far>,
    driver: Driver,
    owner: Arc<Owner>,
    stats: Arc<QueueStats>,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    isr: Arc<AtomicU8>,
    map: Arc<MemoryMap>,
    device: Arc<dyn Device>,
    runner: Option<RemoteRunner>,
}

impl Table {
    fn new(features: u64, image: &str) -> Self {
        let far = Far::new();
        let region = Region::shadow(BASE, SIZE, true, Arc::clone(&far) as Arc<dyn RemoteMemory>).unwrap();
        let map = MemoryMap::default().with(region).unwrap();
        Self::with(features, image, far, map)
    }

    fn with(features: u64, image: &str, far: Arc<Far>, map: MemoryMap) -> Self {
        let features = features | feature::VERSION_1;
        let packed = features & feature::RING_PACKED != 0;
        let stats = Arc::new(QueueStats::default());
        stats.position.store(fresh_position(packed), Ordering::Relaxed);
        Self {
            driver: Driver::new(&far.file, features),
            owner: Arc::new(Owner::new(1, Arc::new(Events::new().unwrap()))),
            stats,
            kick: Arc::new(sys::eventfd().unwrap()),
            call: Arc::new(sys::eventfd().unwrap()),
            isr: Arc::default(),
            map: Arc::new(map),
            device: blk(image),
            runner: None,
            far,
        }
    }

    fn start(&mut self) {
        let setup = QueueSetup {
            index: 0,
            size: QUEUE,
            addresses: self.driver.at,
            space: AddressSpace::Guest,
            position: self.stats.position.load(Ordering::Relaxed),
            driver_features: self.driver.features,
            inflight: None,
            ordered: false,
            log: None,
            call: Call {
                fd: Some(Arc::clone(&self.call)),
                isr: Some((Arc::clone(&self.isr), 1)),
            },
            stats: Arc::clone(&self.stats),
        };
        let start = RemoteStart {
            owner: Arc::clone(&self.owner),
            device: Arc::clone(&self.device),
            map: Arc::clone(&self.map),
            setup,
            kick: Arc::clone(&self.kick),
            enabled: true,
        };
        self.runner = Some(RemoteRunner::start(start).unwrap());
    }

    fn runner(&self) -> &RemoteRunner {
        self.runner.as_ref().unwrap()
    }

    fn stop(&mut self) {
        let (done, ended) = completion();
        self.runner().stop(done);
        until("stopped", || ended.load(Ordering::Acquire));
        self.runner = None;
    }

    fn kick(&self) {
        sys::eventfd_signal(&self.kick);
    }

    fn used(&mut self) -> (u16, u32) {
        let mut found = None;
        let owner = Arc::clone(&self.owner);
        until("used", || {
            assert_eq!(owner.fault(), None);
            found = self.driver.poll();
            found.is_some()
        });
        found.unwrap()
    }

    fn interrupted(&self) {
        until("interrupt", || sys::eventfd_drain(self.call.as_raw_fd()));
    }

    /// One read of a sector, waited for by its interrupt.
    fn read(&mut self, sector: u64) -> Vec<u8> {
        self.driver.request(0, false, sector, &[0xee; 512], false);
        self.driver.ask(true);
        self.kick();
        self.interrupted();
        assert_eq!(self.used(), (0, 513));
        assert_eq!(self.driver.status(0), 0);
        self.driver.data(0, 512)
    }
}

/// Random requests, several at a time, against a model of the disk.
fn exercise(table: &mut Table, rounds: usize) {
    let mut random = Random::new(11);
    // Sectors 64n to 64n + 63 are those of number n.
    let mut disk = vec![0u8; 1 << 20];
    let all = [feature::INDIRECT_DESC];
    table.start();
    for round in 0..rounds {
        let mut sent = HashMap::new();
        let count = 1 + random.below(4) as u16;
        let by_interrupt = random.chance(50);
        table.driver.ask(by_interrupt);
        let _ = sys::eventfd_drain(table.call.as_raw_fd());
        for id in table.driver.ids.clone().into_iter().take(usize::from(count)) {
            let sectors = 1 + random.below(32);
            let sector = u64::from(id) * 64 + random.below(32);
            let write = random.chance(50);
            let data: Vec<u8> = (0..sectors * 512).map(|_| random.next() as u8).collect();
            let indirect = table.driver.has(all[0]) && random.chance(50);
            table.driver.request(id, write, sector, &data, indirect);
            sent.insert(id, (write, sector as usize * 512, data));
            if random.chance(30) {
                table.kick();
            }
        }
        table.kick();
        if by_interrupt {
            table.interrupted();
            assert_eq!(table.isr.swap(0, Ordering::Relaxed), 1);
        }
        for _ in 0..count {
            let (id, len) = table.used();
            let (write, at, data) = sent.remove(&id).unwrap();
            assert_eq!(table.driver.status(id), 0, "round {round}");
            if write {
                disk[at..at + data.len()].copy_from_slice(&data);
                assert_eq!(len, 1);
                assert_eq!(
                    table.driver.data(id, data.len()),
                    data,
                    "what was only read is as it was"
                );
            } else {
                assert_eq!(len as usize, data.len() + 1);
                assert_eq!(table.driver.data(id, data.len()), disk[at..at + data.len()]);
            }
        }
        if random.chance(5) {
            // Somewhere else it goes on where it was.
            table.stop();
            table.start();
        }
    }
    table.stop();
    assert_eq!(table.owner.fault(), None);
    let requests = table.stats.requests.load(Ordering::Relaxed);
    assert!(requests >= rounds as u64);
}

fn disk() -> (tempfile::Path, String) {
    tempfile::Path::new(1 << 20)
}

/// A file that goes away with its name.
mod tempfile {
    use std::sync::atomic::{AtomicU64, Ordering};

    pub struct Path(String);

    static COUNT: AtomicU64 = AtomicU64::new(0);

    impl Path {
        pub fn new(size: u64) -> (Self, String) {
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("vhu-remote-{}-{number}", std::process::id()));
            let path = path.to_str().unwrap().to_owned();
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            (Self(path.clone()), path)
        }
    }

    impl Drop for Path {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

const PLAIN: u64 = 0;
const EVENT: u64 = feature::EVENT_IDX;
const TABLE: u64 = feature::INDIRECT_DESC;
const PACKED: u64 = feature::RING_PACKED;

#[test]
fn split_rings() {
    for features in [PLAIN, EVENT, TABLE, EVENT | TABLE] {
        exercise(&mut Table::new(features, "ram:1048576"), 100);
    }
}

#[test]
fn packed_rings() {
    for features in [PACKED, PACKED | EVENT, PACKED | TABLE, PACKED | EVENT | TABLE] {
        exercise(&mut Table::new(features, "ram:1048576"), 100);
    }
}

#[test]
fn a_disk_in_a_file() {
    for features in [EVENT | TABLE, PACKED | TABLE] {
        let (_keep, path) = disk();
        exercise(&mut Table::new(features, &path), 100);
    }
}

#[test]
fn part_of_the_memory_is_here() {
    for features in [EVENT | TABLE, PACKED | EVENT | TABLE] {
        for ring_is_far in [false, true] {
            // One half comes with an fd, the other without.
            let far = Far::new();
            let half = SIZE / 2;
            let remote = Arc::clone(&far) as Arc<dyn RemoteMemory>;
            let (here, there) = if ring_is_far {
                (BASE + half, BASE)
            } else {
                (BASE, BASE + half)
            };
            let cache = MappingCache::default();
            let local = cache.region(&peer(&far.file), here, half, here, here - BASE).unwrap();
            let shadow = Region::shadow(there, half, true, remote).unwrap();
            let map = MemoryMap::default().with(local).unwrap().with(shadow).unwrap();
            assert!(map.needs_remote());
            let mut table = Table::with(features, "ram:1048576", Arc::clone(&far), map);
            exercise(&mut table, 60);
            for &(_, address, len) in &*far.log.lock().unwrap() {
                assert!(
                    address >= there && address + len as u64 <= there + half,
                    "only what is far is asked for"
                );
            }
        }
    }
}

#[test]
fn what_a_request_brings_comes_before_its_notice() {
    for features in [PLAIN, EVENT, PACKED, PACKED | EVENT] {
        let mut table = Table::new(features, "ram:1048576");
        table.start();
        table.read(1);
        let ring = if features & PACKED == 0 {
            table.driver.at.device
        } else {
            table.driver.at.desc
        };
        let log = table.far.log.lock().unwrap().clone();
        let position = |address: u64, len: usize| {
            let found = log.iter().position(|entry| *entry == (true, address, len));
            found.unwrap_or_else(|| panic!("no write of {len} bytes at {address:#x}: {log:x?}"))
        };
        let data = position(DATA + 0x200, 256);
        let rest = position(DATA + 0x300, 256);
        let status = position(DATA + 0x6000, 1);
        let (element, notice) = if features & PACKED == 0 {
            // The whole element, though a head of 0 is no change.
            (position(ring + 4, 8), position(ring, 4))
        } else {
            (position(ring + 8, 4), position(ring + 12, 4))
        };
        assert!(
            data < element && rest < element && status < element && element < notice,
            "{log:x?}"
        );
        table.stop();
    }
}

#[test]
fn interrupts_only_when_wanted() {
    for features in [PLAIN, EVENT, PACKED, PACKED | EVENT] {
        let mut table = Table::new(features, "ram:1048576");
        table.start();
        // With EVENT_IDX the first one comes in any case.
        table.read(0);
        let calls = table.stats.calls.load(Ordering::Relaxed);
        for _ in 0..5 {
            table.driver.request(1, false, 0, &[0; 512], false);
            table.driver.ask(false);
            table.kick();
            table.used();
        }
        table.stop();
        assert_eq!(table.stats.calls.load(Ordering::Relaxed), calls);
        assert!(!sys::eventfd_drain(table.call.as_raw_fd()));
    }
}

#[test]
fn a_queue_that_waits_for_memory_can_be_stopped() {
    let mut table = Table::new(PLAIN, "ram:1048576");
    table.start();
    table.read(0);
    table.far.hang.store(true, Ordering::Relaxed);
    table.driver.request(0, false, 1, &[0; 512], false);
    table.kick();
    until("it hangs", || table.far.hanging.load(Ordering::Relaxed));
    // Other commands are carried out, too.
    let (done, ended) = completion();
    table.runner().enable(true, done);
    until("enabled", || ended.load(Ordering::Acquire));
    let begin = Instant::now();
    table.stop();
    assert!(begin.elapsed() < Duration::from_millis(500));
    assert_eq!(table.stats.position.load(Ordering::Relaxed), 1, "nothing was taken");
    table.far.hang.store(false, Ordering::Relaxed);
    table.start();
    assert_eq!(table.used(), (0, 513));
    table.stop();
}

#[test]
fn disabled_and_enabled() {
    let mut table = Table::new(EVENT, "ram:1048576");
    table.start();
    table.read(0);
    table.runner().enable(false, Completion::call(|| ()));
    table.driver.request(0, false, 1, &[0; 512], false);
    table.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert!(table.driver.poll().is_none());
    table.runner().enable(true, Completion::call(|| ()));
    table.used();
    // Other eventfds; a call that was missed is made up for.
    table.call = Arc::new(sys::eventfd().unwrap());
    let call = Call {
        fd: Some(Arc::clone(&table.call)),
        isr: None,
    };
    table.runner().set_call(call, Completion::call(|| ()));
    table.interrupted();
    table.kick = Arc::new(sys::eventfd().unwrap());
    table
        .runner()
        .set_kick(Arc::clone(&table.kick), Completion::call(|| ()));
    table.read(3);
    table.stop();
}

#[test]
fn memory_taken_away_and_given_back() {
    for features in [EVENT | TABLE, PACKED | TABLE] {
        let mut table = Table::new(features, "ram:1048576");
        table.start();
        for n in 0..20 {
            table.read(n);
            let (done, ended) = completion();
            table.runner().set_memory(Arc::default(), done);
            until("taken away", || ended.load(Ordering::Acquire));
            table.driver.request(0, false, n, &[1; 512], false);
            table.driver.ask(true);
            table.kick();
            std::thread::sleep(Duration::from_millis(2));
            assert!(table.driver.poll().is_none());
            // The new shadow knows nothing of the old one.
            let remote = Arc::clone(&table.far) as Arc<dyn RemoteMemory>;
            let region = Region::shadow(BASE, SIZE, true, remote).unwrap();
            let map = Arc::new(MemoryMap::default().with(region).unwrap());
            table.runner().set_memory(map, Completion::call(|| ()));
            table.interrupted();
            assert_eq!(table.used(), (0, 513));
        }
        table.stop();
        assert_eq!(table.owner.fault(), None);
    }
}

#[test]
fn read_only_memory_is_not_written() {
    let far = Far::new();
    let remote = || Arc::clone(&far) as Arc<dyn RemoteMemory>;
    let rom = DATA + ROOM;
    let map = MemoryMap::default()
        .with(Region::shadow(BASE, rom - BASE, true, remote()).unwrap())
        .unwrap()
        .with(Region::shadow(rom, SIZE - (rom - BASE), false, remote()).unwrap())
        .unwrap();
    let mut table = Table::with(PLAIN, "ram:1048576", Arc::clone(&far), map);
    table.start();
    // Its header is fetched from ROM; its data and status go nowhere.
    table.driver.request(1, false, 0, &[7; 512], false);
    table.kick();
    assert_eq!(table.used(), (1, 513));
    assert_eq!(table.driver.data(1, 512), [7; 512]);
    table.stop();
    assert!(far
        .log
        .lock()
        .unwrap()
        .iter()
        .all(|(write, address, _)| !write || *address < rom));
}

#[test]
fn shadows_are_no_memory_to_others() {
    let far = Far::new() as Arc<dyn RemoteMemory>;
    let map = MemoryMap::default().with(Region::shadow(BASE, 4096, true, Arc::clone(&far)).unwrap());
    let map = Arc::new(map.unwrap());
    let mut buffers = Default::default();
    assert!(!map.append(BASE, 1, &mut 0, &mut buffers));
    assert!(map.area_by_guest(BASE, 1).is_none() && map.area_by_user(BASE, 1).is_none());
    let known = Arc::new(map.with_shadows());
    assert!(known.append(BASE, 1, &mut 0, &mut buffers));
    assert!(known.area_by_guest(BASE, 1).is_some() && known.area_by_user(BASE, 1).is_some());
    let more = known
        .with(Region::shadow(0, 4096, true, Arc::clone(&far)).unwrap())
        .unwrap();
    assert!(more.append(0, 1, &mut 0, &mut buffers), "it stays so");
    assert!(more.without(0, 4096, 0).unwrap().append(BASE, 1, &mut 0, &mut buffers));
    let rom = MemoryMap::default().with(Region::shadow(0, 4096, false, Arc::clone(&far)).unwrap());
    assert!(map.needs_remote() && !rom.unwrap().needs_remote());
    for size in [0, u64::MAX, (1 << 40) + 1] {
        assert!(Region::shadow(4096, size, true, Arc::clone(&far)).is_err());
    }
    // A terabyte costs nothing until it is touched.
    assert!(Region::shadow(0, 1 << 40, true, far).is_ok());
}

#[test]
fn a_hostile_driver() {
    type Act = fn(&mut Driver);
    let cases: [(&str, u64, Act); 6] = [
        ("ring.head-index", PLAIN, |driver| {
            driver.memory.put(driver.at.driver + 4, &999u16.to_le_bytes());
            driver.memory.put(driver.at.driver + 2, &1u16.to_le_bytes());
        }),
        ("ring.avail-index", PLAIN, |driver| {
            driver.memory.put(driver.at.driver + 2, &900u16.to_le_bytes());
        }),
        ("ring.chain-length", PLAIN, |driver| {
            driver.offer(0, &[(DATA, 16, false)], false);
            let bytes = driver.descriptor((DATA, 16, false), NEXT, 0);
            driver.memory.put(driver.at.desc, &bytes);
        }),
        ("ring.buffer-address", PLAIN, |driver| {
            driver.offer(0, &[(BASE + SIZE, 16, false)], false)
        }),
        ("ring.indirect-length", TABLE, |driver| {
            let bytes = driver.descriptor((DATA, u32::MAX, false), INDIRECT, 0);
            driver.offer(0, &[(DATA, 16, false)], false);
            driver.memory.put(driver.at.desc, &bytes);
        }),
        ("ring.indirect-address", TABLE | PACKED, |driver| {
            let bytes = driver.descriptor((BASE + SIZE, 32, false), INDIRECT | AVAIL, 0);
            driver.memory.put(driver.at.desc, &bytes);
        }),
    ];
    for (rule, features, act) in cases {
        let mut table = Table::new(features, "ram:1048576");
        act(&mut table.driver);
        table.start();
        let owner = Arc::clone(&table.owner);
        until(rule, || owner.fault().is_some());
        assert_eq!(owner.fault().unwrap().rule, rule);
        assert_eq!(owner.fault().unwrap().queue, Some(0));
        table.stop();
    }
    // What can be seen at once is said at once.
    let mut table = Table::new(PLAIN, "ram:1048576");
    table.driver.at.desc = BASE + SIZE;
    let setup = QueueSetup {
        index: 3,
        size: QUEUE,
        addresses: table.driver.at,
        space: AddressSpace::Guest,
        position: 0,
        driver_features: 0,
        inflight: None,
        ordered: false,
        log: None,
        call: Call::default(),
        stats: Arc::clone(&table.stats),
    };
    let start = RemoteStart {
        owner: Arc::clone(&table.owner),
        device: Arc::clone(&table.device),
        map: Arc::clone(&table.map),
        setup,
        kick: Arc::clone(&table.kick),
        enabled: true,
    };
    let error = RemoteRunner::start(start).err().unwrap();
    assert_eq!(error.rule(), "ring.address");
}

#[test]
fn random_rings() {
    let mut random = Random::new(5);
    for round in 0..200 {
        let features = [PLAIN, EVENT, TABLE, PACKED, PACKED | TABLE, PACKED | EVENT | TABLE][round % 6];
        let mut table = Table::new(features, "ram:1048576");
        table.start();
        for _ in 0..5 {
            let at = table.driver.at;
            // Mostly small numbers and addresses that exist: they get further.
            for address in (at.desc..at.desc + 16 * u64::from(QUEUE)).step_by(16) {
                let mut bytes = (BASE + random.below(SIZE)).to_le_bytes().to_vec();
                bytes.extend((random.below(2000) as u32 * random.below(2) as u32).to_le_bytes());
                bytes.extend((random.below(20) as u16).to_le_bytes());
                bytes.extend((random.next() as u16 & 0x8087).to_le_bytes());
                table.driver.memory.put(address, &bytes);
            }
            for address in (at.driver..at.driver + 4 + 2 * u64::from(QUEUE)).step_by(2) {
                table
                    .driver
                    .memory
                    .put(address, &(random.below(20) as u16).to_le_bytes());
            }
            table.kick();
            std::thread::sleep(Duration::from_micros(500));
        }
        table.stop();
        if let Some(fault) = table.owner.fault() {
            assert_ne!(fault.rule, "internal.panic", "{fault}");
        }
    }
}

#[test]
fn memory_that_is_refused_breaks_and_memory_that_is_gone_does_not() {
    for (rule, broken) in [
        ("dma.refused", true),
        ("dma.timeout", true),
        ("dma.disconnected", false),
    ] {
        for write in [false, true] {
            let mut table = Table::new(PLAIN, "ram:1048576");
            table.start();
            table.read(0);
            if write {
                // Fails when the result is stored.
                table.far.delay.store(2000, Ordering::Relaxed);
                table.driver.request(0, false, 0, &[0; 512], false);
                let log = || table.far.log.lock().unwrap().len();
                let before = log();
                table.kick();
                until("under way", || log() > before + 2);
            } else {
                table.driver.request(0, false, 0, &[0; 512], false);
            }
            *table.far.fail.lock().unwrap() = Some(rule);
            table.kick();
            let owner = Arc::clone(&table.owner);
            if broken {
                until("broken", || owner.fault().is_some());
                assert_eq!(owner.fault().unwrap().rule, rule);
            } else {
                std::thread::sleep(Duration::from_millis(20));
                assert_eq!(owner.fault(), None);
            }
            table.stop();
        }
    }
}

// --- over a connection

/// A client that answers for its memory, on a thread of its own, until the connection ends.
fn answer(client: &Client, memory: File, delay: Duration) -> std::thread::JoinHandle<u64> {
    let mut client = Client {
        socket: client.socket.try_clone().unwrap(),
        next: 0,
    };
    std::thread::spawn(move || {
        let mut count = 0;
        while let Some(request) = client.receive() {
            assert_eq!(request.flags, 0, "a command");
            std::thread::sleep(delay);
            let address = u64::from_ne_bytes(request.body[..8].try_into().unwrap());
            let len = u64::from_ne_bytes(request.body[8..16].try_into().unwrap()) as usize;
            let mut body = request.body[..16].to_vec();
            if request.command == vfio::DMA_READ {
                assert_eq!(request.body.len(), 16);
                body.resize(16 + len, 0);
                memory.get(address, &mut body[16..]);
            } else {
                assert_eq!(request.command, vfio::DMA_WRITE);
                assert_eq!(request.body.len(), 16 + len);
                memory.put(address, &request.body[16..]);
            }
            client.write(&vfio::message(request.id, request.command, 1, &body));
            count += 1;
        }
        count
    })
}

fn link(bed: &Bed) -> Arc<dyn RemoteMemory> {
    let deeds = bed.fake.deeds();
    Arc::clone(deeds.map.regions()[0].remote().unwrap())
}

#[test]
fn a_queue_over_a_connection() {
    for features in [EVENT | TABLE, PACKED | EVENT | TABLE] {
        let bed = Bed::new();
        let mut client = bed.client();
        client.ask(vfio::DMA_MAP, &vfio::dma_map(3, 0, BASE, SIZE)).unwrap();
        let far = Far::new();
        let answers = answer(&client, far.file.try_clone().unwrap(), Duration::ZERO);
        let map = MemoryMap::clone(&bed.fake.deeds().map);
        let mut table = Table::with(features, "ram:1048576", far, map);
        exercise(&mut table, 50);
        bed.server.disconnect("it was enough");
        assert!(answers.join().unwrap() > 500);
    }
}

#[test]
fn memory_over_a_connection() {
    let bed = Bed::new();
    let mut client = bed.client();
    client.ask(vfio::DMA_MAP, &vfio::dma_map(3, 0, BASE, SIZE)).unwrap();
    assert_eq!(
        client.ask(vfio::DMA_MAP, &vfio::dma_map(1, 0, BASE + SIZE, SIZE)),
        Ok(vec![])
    );
    assert!(!bed.fake.deeds().map.regions()[1].writable());
    // More than there may be shadows of.
    let huge = vfio::dma_map(3, 0, 1 << 41, 1 << 40);
    assert_eq!(client.ask(vfio::DMA_MAP, &huge), Err(libc::ENOMEM as u32));
    let memory = memfd(SIZE);
    let answers = answer(&client, memory.try_clone().unwrap(), Duration::ZERO);
    // Several threads, long and short, with accesses of the guest's in between.
    let threads: Vec<_> = (0..4u64)
        .map(|n| {
            let remote = link(&bed);
            std::thread::spawn(move || {
                let mut random = Random::new(n + 1);
                for _ in 0..50 {
                    let len = 1 + random.below(400_000) as usize;
                    let address = BASE + n * (SIZE / 4) + random.below(1000);
                    let data: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
                    remote.write(address, &data).unwrap();
                    let mut seen = vec![0; len];
                    remote.read(address, &mut seen).unwrap();
                    assert!(seen == data);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(bed.fake.deeds().writes.is_empty());
    let remote = link(&bed);
    drop(client);
    bed.server.disconnect("enough");
    answers.join().unwrap();
    bed.free();
    assert_eq!(remote.read(BASE, &mut [0; 4]).unwrap_err().rule, "dma.disconnected");
    assert_eq!(remote.write(BASE, &[0; 4]).unwrap_err().rule, "dma.disconnected");
}

/// What a client does with requests for its memory, seen one by one.
struct Asked {
    bed: Bed,
    client: Client,
}

impl Asked {
    fn new() -> Self {
        let bed = Bed::new();
        let mut client = bed.client();
        client.ask(vfio::DMA_MAP, &vfio::dma_map(3, 0, BASE, SIZE)).unwrap();
        Self { bed, client }
    }

    /// Reads eight bytes on another thread.
    fn read(&self) -> std::thread::JoinHandle<Result<[u8; 8], &'static str>> {
        let remote = link(&self.bed);
        std::thread::spawn(move || {
            let mut seen = [0; 8];
            remote.read(BASE, &mut seen).map_err(|fault| fault.rule)?;
            Ok(seen)
        })
    }

    fn request(&mut self) -> u16 {
        let request = self.client.receive().unwrap();
        assert_eq!((request.command, request.flags), (vfio::DMA_READ, 0));
        assert_eq!(request.body, vfio::longs(&[BASE, 8]));
        request.id
    }

    fn reply(&mut self, id: u16, command: u16, flags: u32, body: &[u8]) {
        self.client.write(&vfio::message(id, command, flags, body));
    }
}

fn right() -> Vec<u8> {
    [vfio::longs(&[BASE, 8]), vec![1, 2, 3, 4, 5, 6, 7, 8]].concat()
}

#[test]
fn answers_good_and_bad() {
    let mut asked = Asked::new();
    let reader = asked.read();
    let id = asked.request();
    asked.reply(id, vfio::DMA_READ, 1, &right());
    assert_eq!(reader.join().unwrap(), Ok([1, 2, 3, 4, 5, 6, 7, 8]));
    for (command, flags, body, rule) in [
        (vfio::DMA_READ, 0x21, vec![], "dma.refused"),
        (vfio::DMA_READ, 0x21, right(), "dma.refused"),
        (vfio::DMA_WRITE, 1, right(), "dma.reply"),
        (vfio::DMA_READ, 1, vec![], "dma.reply"),
        (vfio::DMA_READ, 1, right()[..23].to_vec(), "dma.reply"),
        (vfio::DMA_READ, 1, [right(), vec![0]].concat(), "dma.reply"),
        (
            vfio::DMA_READ,
            1,
            [vfio::longs(&[BASE + 8, 8]), vec![0; 8]].concat(),
            "dma.reply",
        ),
        (
            vfio::DMA_READ,
            1,
            [vfio::longs(&[BASE, 7]), vec![0; 8]].concat(),
            "dma.reply",
        ),
    ] {
        let reader = asked.read();
        let id = asked.request();
        asked.reply(id, command, flags, &body);
        assert_eq!(reader.join().unwrap(), Err(rule), "{body:?}");
    }
    // QEMU repeats address and count, others only acknowledge.
    for body in [vec![], vfio::longs(&[BASE, 2]), vec![0; 12]] {
        let remote = link(&asked.bed);
        let writer = std::thread::spawn(move || remote.write(BASE, &[1, 2]));
        let request = asked.client.receive().unwrap();
        assert_eq!(request.body, [vfio::longs(&[BASE, 2]), vec![1, 2]].concat());
        asked.reply(request.id, vfio::DMA_WRITE, 1, &body);
        assert!(writer.join().unwrap().is_ok());
    }
    // The connection is as good as before, and ends with an answer that nobody asked for.
    assert!(asked.client.read(0, 0, 1).is_ok());
    asked.reply(999, vfio::DMA_READ, 1, &right());
    assert!(asked.client.is_closed());
}

#[test]
fn the_same_answer_twice() {
    let mut asked = Asked::new();
    let reader = asked.read();
    let id = asked.request();
    let twice = vfio::message(id, vfio::DMA_READ, 1, &right()).repeat(2);
    asked.client.write(&twice);
    assert!(asked.client.is_closed());
    // Which of the two was seen first by whom doesn't matter.
    let _ = reader.join().unwrap();
}

#[test]
fn no_answer_and_a_late_one() {
    let mut asked = Asked::new();
    let begin = Instant::now();
    let reader = asked.read();
    let id = asked.request();
    assert!(asked.client.read(0, 0, 1).is_ok(), "others don't wait");
    assert_eq!(reader.join().unwrap(), Err("dma.timeout"));
    assert!(begin.elapsed() < Duration::from_secs(3));
    // Now nobody wants it; and it isn't taken for another's.
    let reader = asked.read();
    let other = asked.request();
    assert_ne!(id, other);
    asked.reply(id, vfio::DMA_READ, 1, &[0; 24]);
    asked.reply(other, vfio::DMA_READ, 1, &right());
    assert!(reader.join().unwrap().is_ok());
    // Somebody who doesn't wait any more is gone soon.
    let (remote, cancelled) = (link(&asked.bed), Arc::new(AtomicBool::new(false)));
    let flag = Arc::clone(&cancelled);
    let reader = std::thread::spawn(move || remote.read_unless(BASE, &mut [0; 8], &flag).unwrap_err().rule);
    let id = asked.request();
    let begin = Instant::now();
    cancelled.store(true, Ordering::Relaxed);
    assert_eq!(reader.join().unwrap(), "dma.cancelled");
    assert!(begin.elapsed() < Duration::from_millis(500));
    asked.reply(id, vfio::DMA_READ, 1, &right());
    assert!(asked.client.read(0, 0, 1).is_ok());
    // A client that leaves leaves nobody waiting.
    let reader = asked.read();
    asked.request();
    drop(asked.client);
    assert_eq!(reader.join().unwrap(), Err("dma.disconnected"));
}

#[test]
fn answers_come_through_while_a_command_is_deferred() {
    let mut asked = Asked::new();
    let id = asked
        .client
        .send(vfio::REGION_READ, 0, &vfio::access(vfio::SLOW, 0, &[0; 4])[..16]);
    asked.bed.fake.deferred();
    // Commands behind it wait, answers don't: what it waits for may need them.
    asked.client.post(0, 0, &[1]);
    for _ in 0..3 {
        let reader = asked.read();
        let request = asked.request();
        asked.client.post(0, 0, &[2]);
        asked.reply(request, vfio::DMA_READ, 1, &right());
        asked.client.post(0, 0, &[3]);
        assert!(reader.join().unwrap().is_ok());
    }
    assert!(asked.bed.fake.deeds().writes.is_empty());
    asked.bed.fake.wake();
    asked.client.answer(id, vfio::REGION_READ).unwrap();
    asked.client.read(0, 0, 1).unwrap();
    assert_eq!(asked.bed.fake.deeds().writes.len(), 7);
    let values: Vec<u8> = asked.bed.fake.deeds().writes.iter().map(|(_, data)| data[0]).collect();
    assert_eq!(values, [1, 2, 3, 2, 3, 2, 3]);
}

#[test]
fn before_the_version_nothing_is_asked() {
    let bed = Bed::new();
    let _client = bed.raw();
    until("attached", || bed.server.statistics().connected);
    // Nobody can have memory of it yet, so this is about what a client agreed to.
    let mut small = {
        drop(_client);
        bed.free();
        bed.raw()
    };
    small.version(0, 0, r#"{"capabilities":{"max_data_xfer_size":1000}}"#);
    small.ask(vfio::DMA_MAP, &vfio::dma_map(3, 0, BASE, SIZE)).unwrap();
    let remote = link(&bed);
    let writer = std::thread::spawn(move || remote.write(BASE, &[7; 2500]));
    for (at, len) in [(0, 1000), (1000, 1000), (2000, 500)] {
        let request = small.receive().unwrap();
        assert_eq!(request.body[..16], vfio::longs(&[BASE + at, len]));
        small.write(&vfio::message(request.id, vfio::DMA_WRITE, 1, &[]));
    }
    assert!(writer.join().unwrap().is_ok());
}
