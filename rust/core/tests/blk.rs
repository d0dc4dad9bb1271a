// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! virtio-blk through a runner: requests in guest memory, a real file behind.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use common::{Guest, Random, Ring, NEXT, WRITE};
use vhu_core::device::blk::{counter, feature, Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::device::Device;
use vhu_core::ring::split::AddressSpace;
use vhu_core::runner::{Call, QueueSetup, QueueStats, Runner};
use vhu_core::uring::Uring;

const BASE: u64 = 0x10_0000;
const DATA: u64 = BASE + 0x10_0000;
const WCE: u64 = feature::FLUSH | feature::CONFIG_WCE;

struct Disk {
    path: PathBuf,
}

impl Disk {
    fn new(name: &str, bytes: usize) -> Self {
        let path = std::env::temp_dir().join(format!("vhu-blk-{}-{name}.raw", std::process::id()));
        let mut file = File::create(&path).unwrap();
        let content: Vec<u8> = (0..bytes).map(|i| (i / 512) as u8 ^ i as u8).collect();
        file.write_all(&content).unwrap();
        Self { path }
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(&self.path)
            .unwrap()
            .read_exact_at(&mut bytes, offset)
            .unwrap();
        bytes
    }

    fn spec(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn options() -> BlkOptions {
    BlkOptions {
        queues: 1,
        queue_size: 64,
        blk_size: 512,
        serial: "serial-7".into(),
    }
}

struct Bench {
    guest: Guest,
    ring: Ring,
    runner: Runner,
    uring: Uring,
    blk: Arc<Blk>,
    stats: Arc<QueueStats>,
}

impl Bench {
    fn new(spec: &str, read_only: bool, features: u64) -> Self {
        let blk = Arc::new(Blk::new(Image::open(spec, read_only).unwrap(), options()).unwrap());
        let guest = Guest::new(BASE, 0x80_0000);
        let ring = Ring::legacy(BASE, 64, 4096);
        let stats = Arc::new(QueueStats::default());
        let setup = QueueSetup {
            index: 0,
            size: 64,
            addresses: ring.addresses,
            space: AddressSpace::Guest,
            position: 0,
            driver_features: features,
            inflight: None,
            ordered: false,
            log: None,
            call: Call::default(),
            stats: Arc::clone(&stats),
        };
        let device: Arc<dyn Device> = blk.clone();
        let runner = Runner::new(device, Arc::clone(&guest.map), setup).unwrap();
        Self {
            guest,
            ring,
            runner,
            uring: Uring::new(64).unwrap(),
            blk,
            stats,
        }
    }

    fn run(&mut self) {
        self.runner.take(&mut self.uring).unwrap();
        let mut done = Vec::new();
        while self.runner.in_flight() > 0 {
            self.uring.wait().unwrap();
            self.uring.reap(&mut done);
            for (user_data, result) in done.drain(..) {
                self.runner.complete(user_data, result, &mut self.uring);
            }
        }
        self.runner.publish_quietly();
    }

    /// Puts the buffers into the ring in pieces of `piece` bytes and runs the request: (status byte, used length).
    fn request_pieces(&mut self, kind: u32, sector: u64, out: &[u8], room: usize, piece: usize) -> (u8, u32) {
        let mut readable = kind.to_le_bytes().to_vec();
        readable.extend([0; 4]);
        readable.extend(sector.to_le_bytes());
        readable.extend(out);
        self.guest.write(DATA, &readable);
        let status = DATA + readable.len() as u64 + room as u64;
        self.guest.write(status, &[0xee]);
        let mut pieces = Vec::new();
        let mut cut = |start: u64, len: usize, flags: u16| {
            let mut at = 0;
            while at < len {
                let n = piece.min(len - at);
                pieces.push((start + at as u64, n as u32, flags));
                at += n;
            }
        };
        cut(DATA, readable.len(), 0);
        cut(DATA + readable.len() as u64, room + 1, WRITE);
        let last = pieces.len() - 1;
        for (index, (addr, len, flags)) in pieces.into_iter().enumerate() {
            let flags = flags | if index < last { NEXT } else { 0 };
            self.ring
                .descriptor(&self.guest, index as u16, addr, len, flags, index as u16 + 1);
        }
        self.ring.offer(&self.guest, 0);
        let before = self.ring.used_idx(&self.guest);
        self.run();
        assert_eq!(
            self.ring.used_idx(&self.guest),
            before.wrapping_add(1),
            "answered exactly once"
        );
        let (head, len) = self.ring.used(&self.guest, before);
        assert_eq!(head, 0);
        (self.guest.read(status, 1)[0], len)
    }

    fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> (u8, u32) {
        self.request_pieces(kind, sector, out, room, 4096)
    }

    /// What the device wrote before the status byte.
    fn answer(&self, out: usize, room: usize) -> Vec<u8> {
        self.guest.read(DATA + 16 + out as u64, room)
    }
}

#[test]
fn reads_and_writes_in_any_framing() {
    let disk = Disk::new("framing", 1 << 20);
    let mut bench = Bench::new(disk.spec(), false, WCE);
    // 1-byte descriptors would need more than 64 of them for a sector; 40 is about the smallest that fits.
    for piece in [40, 100, 511, 512, 528, 4096] {
        assert_eq!(bench.request_pieces(0, 3, &[], 512, piece), (0, 513), "piece {piece}");
        assert_eq!(bench.answer(0, 512), disk.read(3 * 512, 512));
        let data: Vec<u8> = (0..512).map(|i| (i * 7 + piece) as u8).collect();
        assert_eq!(bench.request_pieces(1, 9, &data, 0, piece), (0, 1), "piece {piece}");
        assert_eq!(disk.read(9 * 512, 512), data);
    }
    assert_eq!(bench.stats.counters.get(counter::IN), 6);
    assert_eq!(bench.stats.counters.get(counter::BYTES_WRITTEN), 6 * 512);
    assert_eq!(bench.stats.counters.get(counter::FAILED), 0);
}

#[test]
fn every_kind_of_storage_agrees_with_a_model() {
    let size = 256 * 512;
    let disk = Disk::new("model", size);
    std::fs::write(&disk.path, vec![0; size]).unwrap();
    for spec in [disk.spec().to_owned(), format!("ram:{size}")] {
        let mut bench = Bench::new(&spec, false, WCE);
        let mut model = vec![0u8; size];
        let mut random = Random::new(7);
        for round in 0..400u64 {
            let sector = random.below(256);
            let count = 1 + random.below((256 - sector).min(16));
            let (start, len) = (sector as usize * 512, count as usize * 512);
            match random.below(4) {
                0 => {
                    let data: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
                    assert_eq!(bench.request(1, sector, &data, 0), (0, 1));
                    model[start..start + len].copy_from_slice(&data);
                }
                1 => {
                    let mut segment = sector.to_le_bytes().to_vec();
                    segment.extend((count as u32).to_le_bytes());
                    segment.extend(((round % 2) as u32).to_le_bytes());
                    assert_eq!(bench.request(13, 0, &segment, 0), (0, 1));
                    model[start..start + len].fill(0);
                }
                _ => {
                    assert_eq!(bench.request(0, sector, &[], len), (0, len as u32 + 1));
                    assert!(
                        bench.answer(0, len) == model[start..start + len],
                        "{spec}: round {round}"
                    );
                }
            }
        }
        assert_eq!(bench.request(4, 0, &[], 0), (0, 1));
    }
}

#[test]
fn refusals() {
    let disk = Disk::new("refusals", 8 * 512);
    let mut bench = Bench::new(disk.spec(), false, WCE);
    let content = disk.read(0, 8 * 512);
    let sector = vec![1u8; 512];
    let segment = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    // A failed read with room for data wrote nothing from its start on.
    assert_eq!(bench.request(0, 8, &[], 512), (1, 0), "beyond the end");
    assert_eq!(bench.request(0, 7, &[], 1024), (1, 0), "across the end");
    assert_eq!(bench.request(0, u64::MAX, &[], 512), (1, 0), "wrapping");
    assert_eq!(bench.request(0, u64::MAX / 512, &[], 512), (1, 0), "wrapping in bytes");
    assert_eq!(bench.request(0, 0, &[], 100), (1, 0), "not whole sectors");
    assert_eq!(bench.request(1, 8, &sector, 0), (1, 1), "write beyond the end");
    assert_eq!(bench.request(1, 0, &sector[..511], 0), (1, 1), "write of 511 bytes");
    assert_eq!(
        bench.request(11, 0, &segment(7, 2, 0), 0),
        (1, 1),
        "discard across the end"
    );
    assert_eq!(
        bench.request(11, 0, &segment(0, 1, 1), 0),
        (2, 1),
        "discard with the unmap flag"
    );
    assert_eq!(bench.request(13, 0, &segment(0, 1, 2), 0), (2, 1), "reserved flag");
    assert_eq!(bench.request(13, 0, &segment(0, 1, 0)[..15], 0), (1, 1), "torn segment");
    assert_eq!(bench.request(13, 0, &[], 0), (1, 1), "no segment");
    assert_eq!(
        bench.request(13, 0, &segment(0, 1, 0).repeat(33), 0),
        (1, 1),
        "too many segments"
    );
    assert_eq!(bench.request(99, 0, &[], 0), (2, 1), "unknown type");
    assert_eq!(
        bench.request(0x8000_0001, 0, &sector, 0),
        (2, 1),
        "barrier, which was never offered"
    );
    assert_eq!(bench.request(8, 0, &[], 19), (1, 0), "too little room for the serial");
    assert_eq!(
        bench.request(1, 8, &sector, 3),
        (1, 0),
        "a write with room for an answer: its first byte is not written"
    );
    assert_eq!(disk.read(0, 8 * 512), content, "nothing of this may touch the disk");
    assert_eq!(bench.request(0, 0, &[], 0), (0, 1), "no sectors at all is fine");
}

#[test]
fn serial() {
    let mut bench = Bench::new("null:4096", false, WCE);
    assert_eq!(bench.request(8, 0, &[], 20), (0, 21));
    assert_eq!(&bench.answer(0, 20)[..9], b"serial-7\0");
}

#[test]
fn unanswerable_requests_are_faults() {
    let fault = |build: fn(&Guest, &mut Ring)| {
        let mut bench = Bench::new("null:4096", false, WCE);
        build(&bench.guest, &mut bench.ring);
        bench.runner.take(&mut bench.uring).unwrap_err().rule
    };
    let short = fault(|guest, ring| {
        ring.descriptor(guest, 0, DATA, 15, NEXT, 1);
        ring.descriptor(guest, 1, DATA + 64, 1, WRITE, 0);
        ring.offer(guest, 0);
    });
    assert_eq!(short, "blk.request-header");
    let mute = fault(|guest, ring| {
        ring.descriptor(guest, 0, DATA, 16, 0, 0);
        ring.offer(guest, 0);
    });
    assert_eq!(mute, "blk.request-status");
}

#[test]
fn read_only_is_enforced() {
    let disk = Disk::new("ro", 4096);
    let content = disk.read(0, 4096);
    let mut bench = Bench::new(disk.spec(), true, WCE);
    assert_ne!(bench.blk.features() & feature::RO, 0);
    assert_eq!(bench.blk.features() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_eq!(bench.request(1, 0, &[7; 512], 0), (1, 1));
    assert_eq!(bench.request(11, 0, &[0; 16], 0), (1, 1));
    assert_eq!(bench.request(4, 0, &[], 0), (0, 1), "a flush of nothing succeeds");
    assert_eq!(bench.request(0, 0, &[], 512), (0, 513));
    assert_eq!(disk.read(0, 4096), content);
    // Writable again at run time: the file has to be opened anew, under the same lock.
    assert!(bench.blk.modify(None, None, Some(false)).unwrap());
    assert_eq!(bench.request(1, 0, &[7; 512], 0), (0, 1));
    assert!(Image::open(disk.spec(), true).is_err(), "locked against everybody else");
}

#[test]
fn swap_and_resize() {
    let (first, second) = (Disk::new("first", 4096), Disk::new("second", 8192));
    let mut bench = Bench::new(first.spec(), false, WCE);
    let capacity = |blk: &Blk| {
        let mut bytes = [0; 8];
        blk.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(capacity(&bench.blk), 8);
    assert!(bench.blk.modify(Some(second.spec()), None, None).unwrap());
    assert_eq!(capacity(&bench.blk), 16);
    assert_eq!(bench.request(1, 15, &[9; 512], 0), (0, 1));
    assert_eq!(second.read(15 * 512, 512), [9; 512]);
    assert!(Image::open(first.spec(), false).is_ok(), "the old image is free again");
    assert!(bench.blk.modify(None, Some(16384), None).unwrap());
    assert_eq!(capacity(&bench.blk), 32);
    assert_eq!(second.read(8192, 8192), vec![0; 8192]);
    assert!(
        !bench.blk.modify(None, Some(16384), None).unwrap(),
        "no difference to be told"
    );
    for (image, size) in [
        (Some("/nonexistent"), None),
        (None, Some(1000)),
        (None, Some(0)),
        (Some("ram:100"), None),
    ] {
        assert!(bench.blk.modify(image, size, None).is_err(), "{image:?} {size:?}");
        assert_eq!(capacity(&bench.blk), 32, "a refused change changes nothing");
    }
}

#[test]
fn a_shrunken_file_is_an_io_error_and_no_more() {
    let disk = Disk::new("shrunken", 64 * 512);
    let mut bench = Bench::new(disk.spec(), false, WCE);
    File::options()
        .write(true)
        .open(&disk.path)
        .unwrap()
        .set_len(10 * 512)
        .unwrap();
    assert_eq!(bench.request(0, 8, &[], 4 * 512).0, 1);
    assert_eq!(bench.request(0, 20, &[], 512).0, 1);
    assert_eq!(bench.request(0, 8, &[], 1024), (0, 1025));
}

#[test]
fn configuration() {
    let disk = Disk::new("config", 1 << 20);
    let bench = Bench::new(disk.spec(), false, WCE);
    assert!(
        !bench.blk.writeback(),
        "whoever doesn't read the configuration may rely on what an earlier process said"
    );
    bench.blk.fresh();
    let mut config = [0xff; 128];
    bench.blk.read_config(0, &mut config);
    assert_eq!(&config[..8], &2048u64.to_le_bytes());
    assert_eq!(&config[12..16], &62u32.to_le_bytes(), "seg_max");
    assert_eq!(&config[20..24], &512u32.to_le_bytes());
    assert_eq!(&config[24..26], &[3, 0], "eight logical blocks to a physical one");
    assert_eq!(config[32], 1, "writeback");
    assert_eq!(&config[34..36], &1u16.to_le_bytes());
    assert_eq!(&config[57..], &[0; 71][..]);
    // Any width gives the same bytes.
    for (offset, &expected) in config.iter().enumerate().take(100) {
        let mut byte = [0xff];
        bench.blk.read_config(offset, &mut byte);
        assert_eq!(byte[0], expected);
    }
    assert!(bench.blk.write_config(32, &[0]).unwrap());
    assert!(!bench.blk.writeback());
    assert!(!bench.blk.write_config(32, &[0]).unwrap());
    assert_eq!(bench.blk.write_config(32, &[2]).unwrap_err().rule, "config.writeback");
    assert_eq!(bench.blk.write_config(0, &[1]).unwrap_err().rule, "config.read-only");
    // The whole structure with one byte changed, as QEMU's generic device sends it.
    let mut whole = [0; 96];
    bench.blk.read_config(0, &mut whole);
    whole[32] = 1;
    assert!(bench.blk.write_config(0, &whole).unwrap());
    assert!(bench.blk.writeback());
    assert!(bench.blk.write_config(32, &[0]).unwrap());
    bench.blk.fresh();
    assert!(bench.blk.writeback());
}

#[test]
fn options_out_of_range() {
    let refused = |change: fn(&mut BlkOptions)| {
        let mut options = options();
        change(&mut options);
        Blk::new(Image::open("null:4096", false).unwrap(), options).is_err()
    };
    assert!(!refused(|_| {}));
    assert!(refused(|o| o.queues = 0));
    assert!(refused(|o| o.queues = 257));
    assert!(refused(|o| o.queue_size = 0));
    assert!(refused(|o| o.queue_size = 100));
    assert!(refused(|o| o.queue_size = 2048));
    assert!(refused(|o| o.blk_size = 1000));
    assert!(refused(|o| o.serial = "x".repeat(21)));
    for spec in [
        "ram:",
        "ram:x",
        "ram:0",
        "null:511",
        "null:18446744073709551615",
        "/",
        "/dev/null",
    ] {
        assert!(Image::open(spec, false).is_err(), "{spec}");
    }
}

#[test]
fn long_copies_go_in_pieces() {
    let size = 4 << 20;
    let mut bench = Bench::new(&format!("ram:{size}"), false, WCE);
    let data: Vec<u8> = (0..3 << 20).map(|i: u32| (i >> 9) as u8 ^ i as u8).collect();
    assert_eq!(bench.request_pieces(1, 1, &data, 0, 100_000), (0, 1));
    assert_eq!(
        bench.request_pieces(0, 1, &[], data.len(), 65_536),
        (0, data.len() as u32 + 1)
    );
    assert!(bench.answer(0, data.len()) == data);
    let mut bench = Bench::new(&format!("null:{size}"), false, WCE);
    assert_eq!(bench.request_pieces(0, 0, &[], size, 100_000), (0, size as u32 + 1));
    assert!(bench.answer(0, size).iter().all(|byte| *byte == 0));
}

#[test]
fn a_refused_swap_leaves_everything_as_it_was() {
    let (first, second) = (Disk::new("kept", 65536), Disk::new("untouched", 65536));
    let options = BlkOptions {
        blk_size: 4096,
        ..options()
    };
    let blk = Blk::new(Image::open(first.spec(), false).unwrap(), options).unwrap();
    for image in [second.spec(), first.spec()] {
        for size in [512 * 3, 0] {
            assert!(blk.modify(Some(image), Some(size), None).is_err());
        }
        assert_eq!(std::fs::metadata(image).unwrap().len(), 65536, "not resized");
    }
    assert_eq!(blk.image().spec, first.spec());
    assert!(Image::open(first.spec(), false).is_err(), "still locked");
    assert!(Image::open(second.spec(), false).is_ok(), "never kept");
}

#[test]
fn what_a_driver_accepted_stays_acceptable() {
    let disk = Disk::new("accepted", 65536);
    let blk = Blk::new(Image::open(disk.spec(), false).unwrap(), options()).unwrap();
    let before = blk.features();
    blk.modify(None, None, Some(true)).unwrap();
    assert_ne!(blk.features(), before);
    assert_eq!(before & !blk.known_features(), 0);
    assert_eq!(blk.features() & !blk.known_features(), 0);
}
