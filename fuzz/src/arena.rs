// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory for the ring targets.
//!
//! Three regions: A holds the rings, B begins where A ends (but is elsewhere in the host), C lies apart. All are parts of one
//! file, and what lies between them there must never change. The same bytes are kept a second time, as memory of virtio-queue's:
//! whatever a target writes it writes to both, so at any time the two must agree, but for what the device does.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use vhu_core::memory::{Buffers, HostArea, MappingCache, MemoryMap};
use vhu_core::sys::PeerFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::host::memfd;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

struct Part {
    guest: u64,
    size: u64,
    /// In the file. Not all on page borders, so that the pages of B and C hold bytes that aren't theirs.
    offset: u64,
}

const PARTS: [Part; 3] = [
    Part {
        guest: 0x10_0000,
        size: 0x2000,
        offset: 0,
    },
    Part {
        guest: 0x10_2000,
        size: 0x1800,
        offset: 0x3000,
    },
    Part {
        guest: 0x20_0000,
        size: 0x1000,
        offset: 0x6800,
    },
];
const FILE_SIZE: u64 = 0x8000;
const BETWEEN: [(u64, usize); 3] = [(0x2000, 0x1000), (0x4800, 0x2000), (0x7800, 0x800)];
const CANARY: u8 = 0xc5;

/// Where the rings are: the start of A.
pub const RINGS: u64 = PARTS[0].guest;

/// An address as a driver may come to name it.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    /// In A; the first KiB is the rings.
    A(u16),
    /// So many bytes before the border of A and B.
    Border(u8),
    B(u16),
    /// So many bytes before the end of B.
    End(u8),
    C(u16),
    Any(u64),
}

impl Place {
    pub fn get(self) -> u64 {
        let inside = |part: usize, offset: u16| PARTS[part].guest + u64::from(offset) % PARTS[part].size;
        match self {
            Self::A(offset) => inside(0, offset),
            Self::Border(before) => PARTS[1].guest - u64::from(before),
            Self::B(offset) => inside(1, offset),
            Self::End(before) => PARTS[1].guest + PARTS[1].size - u64::from(before),
            Self::C(offset) => inside(2, offset),
            Self::Any(address) => address,
        }
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub addr: u64,
    pub len: u32,
    pub write: bool,
}

/// The buffers of a chain, with the rules for them.
#[derive(Debug, Default)]
pub struct Pieces {
    pub list: Vec<Piece>,
}

impl Pieces {
    pub fn total(&self, write: bool) -> u64 {
        let those = self.list.iter().filter(|piece| piece.write == write);
        those.map(|piece| u64::from(piece.len)).sum()
    }

    /// Adds one; the rule that it breaks.
    pub fn add(&mut self, piece: Piece) -> Result<(), &'static str> {
        if piece.len == 0 {
            return Err("ring.zero-length");
        }
        if !piece.write && self.total(true) > 0 {
            return Err("ring.buffer-order");
        }
        if !is_memory(piece.addr, piece.len.into()) {
            return Err("ring.buffer-address");
        }
        self.list.push(piece);
        if self.total(true) + self.total(false) >= 1 << 32 {
            return Err("ring.total-length");
        }
        Ok(())
    }
}

fn is_memory(addr: u64, len: u64) -> bool {
    let Some(end) = addr.checked_add(len) else { return false };
    let inside = |from: u64, to: u64| addr >= from && end <= to;
    // A and B are neighbours.
    inside(PARTS[0].guest, PARTS[1].guest + PARTS[1].size) || inside(PARTS[2].guest, PARTS[2].guest + PARTS[2].size)
}

/// Whether a range lies in one region as a whole, as ring areas and indirect tables must.
pub fn in_one_region(addr: u64, len: u64) -> bool {
    let Some(end) = addr.checked_add(len) else { return false };
    PARTS
        .iter()
        .any(|part| addr >= part.guest && end <= part.guest + part.size)
}

/// A descriptor's bytes; `third` and `fourth` are flags and next, or buffer ID and flags.
pub fn descriptor(addr: u64, len: u32, third: u16, fourth: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&third.to_le_bytes());
    bytes[14..].copy_from_slice(&fourth.to_le_bytes());
    bytes
}

pub struct Arena {
    pub map: Arc<MemoryMap>,
    /// What the bytes have to be.
    pub model: GuestMemoryMmap,
    file: File,
    areas: Vec<HostArea>,
    hosts: Vec<usize>,
}

impl Arena {
    pub fn new() -> Self {
        let file = memfd(FILE_SIZE);
        for (offset, len) in BETWEEN {
            file.write_all_at(&vec![CANARY; len], offset)
                .expect("writing to a memfd");
        }
        let fd = PeerFd::from(OwnedFd::from(file.try_clone().expect("an fd")));
        let cache = MappingCache::default();
        let mut map = MemoryMap::default();
        for part in &PARTS {
            let region = cache.region(&fd, part.guest, part.size, part.guest, part.offset);
            map = map.with(region.expect("a region")).expect("room for it");
        }
        let map = Arc::new(map);
        let areas: Vec<HostArea> = PARTS
            .iter()
            .map(|part| map.area_by_guest(part.guest, part.size).expect("a region is an area"))
            .collect();
        let hosts = PARTS
            .iter()
            .map(|part| {
                let mut buffers = Buffers::default();
                assert!(map.append(part.guest, part.size, &mut 0, &mut buffers));
                buffers.iovecs()[0].iov_base as usize
            })
            .collect();
        let ranges: Vec<_> = PARTS
            .iter()
            .map(|part| (GuestAddress(part.guest), part.size as usize))
            .collect();
        Self {
            map,
            model: GuestMemoryMmap::from_ranges(&ranges).expect("memory"),
            file,
            areas,
            hosts,
        }
    }

    /// All zeroes again.
    pub fn clear(&self) {
        for (part, area) in PARTS.iter().zip(&self.areas) {
            let zeroes = vec![0; part.size as usize];
            area.write(0, &zeroes);
            self.note(part.guest, &zeroes);
        }
    }

    /// What the driver writes; what isn't memory is left out.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let Some(end) = addr.checked_add(bytes.len() as u64) else {
            return;
        };
        for (part, area) in PARTS.iter().zip(&self.areas) {
            let (from, to) = (addr.max(part.guest), end.min(part.guest + part.size));
            if from < to {
                let bytes = &bytes[(from - addr) as usize..(to - addr) as usize];
                area.write((from - part.guest) as usize, bytes);
                self.note(from, bytes);
            }
        }
    }

    /// What the device must have written.
    pub fn note(&self, addr: u64, bytes: &[u8]) {
        self.model
            .write_slice(bytes, GuestAddress(addr))
            .expect("memory of the model");
    }

    pub fn bytes<const N: usize>(&self, addr: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.model
            .read_slice(&mut bytes, GuestAddress(addr))
            .expect("memory of the model");
        bytes
    }

    pub fn u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.bytes(addr))
    }

    pub fn u32(&self, addr: u64) -> u32 {
        u32::from_le_bytes(self.bytes(addr))
    }

    pub fn u64(&self, addr: u64) -> u64 {
        u64::from_le_bytes(self.bytes(addr))
    }

    /// Checks that memory is as the model says.
    pub fn compare(&self) {
        for (part, area) in PARTS.iter().zip(&self.areas) {
            let (mut ours, mut model) = (vec![0; part.size as usize], vec![0; part.size as usize]);
            area.read(0, &mut ours);
            self.model
                .read_slice(&mut model, GuestAddress(part.guest))
                .expect("memory of the model");
            // As a whole first: this code is instrumented, too, and so each byte would be a call.
            if ours != model {
                let at = (0..ours.len()).find(|&at| ours[at] != model[at]).unwrap_or(0);
                let addr = part.guest + at as u64;
                panic!("at {addr:#x} there is {:#x}, not {:#x}", ours[at], model[at]);
            }
        }
    }

    /// Checks that nothing beside the regions was touched.
    pub fn check_borders(&self) {
        for (offset, len) in BETWEEN {
            let mut bytes = vec![0; len];
            self.file.read_exact_at(&mut bytes, offset).expect("reading a memfd");
            assert!(bytes == vec![CANARY; len], "bytes outside the regions were written");
        }
    }

    /// Checks that the buffers are just the pieces: their bytes, in their order, nothing else.
    pub fn check_buffers(&self, buffers: &Buffers, pieces: &[Piece], write: bool) {
        let mut found = Vec::new();
        for iovec in buffers.iovecs() {
            push_range(&mut found, iovec.iov_base as usize, iovec.iov_len);
        }
        let mut expected = Vec::new();
        for piece in pieces.iter().filter(|piece| piece.write == write) {
            let (mut addr, mut left) = (piece.addr, u64::from(piece.len));
            while left > 0 {
                let region = PARTS
                    .iter()
                    .position(|part| addr >= part.guest && addr - part.guest < part.size);
                let at = region.expect("a piece that is memory");
                let skip = addr - PARTS[at].guest;
                let take = left.min(PARTS[at].size - skip);
                push_range(&mut expected, self.hosts[at] + skip as usize, take as usize);
                (addr, left) = (addr + take, left - take);
            }
        }
        assert_eq!(found, expected, "buffers of {pieces:?}");
    }

    /// Writes to the device-writable part of a chain, as a device does, and notes it.
    pub fn fill(&self, buffers: &Buffers, pieces: &[Piece], value: u8) -> u32 {
        let n = buffers.len().min(64) as usize;
        assert_eq!(buffers.write(&vec![value; n]), n);
        let mut left = n as u64;
        for piece in pieces.iter().filter(|piece| piece.write) {
            let take = left.min(piece.len.into());
            for at in 0..take {
                self.note(piece.addr + at, &[value]);
            }
            left -= take;
        }
        n as u32
    }
}

impl Default for Arena {
    fn default() -> Self {
        Self::new()
    }
}

fn push_range(ranges: &mut Vec<(usize, usize)>, start: usize, len: usize) {
    match ranges.last_mut() {
        Some((last, size)) if *last + *size == start => *size += len,
        _ => ranges.push((start, len)),
    }
}
