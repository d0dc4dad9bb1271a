// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side, for tests: guest memory in a memfd, and a split ring laid out in it.

#![allow(dead_code)]
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vhu_core::memory::{MappingCache, MemoryMap};
use vhu_core::ring::split::RingAddresses;
use vhu_core::sys::PeerFd;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Small, seeded, good enough to shuffle test cases.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// 0..n
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Guest memory from guest address `base`, at user address `base + USER`.
pub struct Guest {
    pub file: File,
    pub base: u64,
    pub size: u64,
    pub map: Arc<MemoryMap>,
    pub cache: MappingCache,
}

pub const USER: u64 = 0x7f00_0000_0000;

/// A file as a front end hands it over.
pub fn peer(file: &File) -> PeerFd {
    OwnedFd::from(file.try_clone().unwrap()).into()
}

pub fn memfd(size: u64) -> File {
    // SAFETY: a literal name; the fd is new and nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

impl Guest {
    pub fn new(base: u64, size: u64) -> Self {
        let file = memfd(size);
        let cache = MappingCache::default();
        let fd = peer(&file);
        let region = cache.region(&fd, base, size, base + USER, 0).unwrap();
        let map = Arc::new(MemoryMap::default().with(region).unwrap());
        Self {
            file,
            base,
            size,
            map,
            cache,
        }
    }

    pub fn write(&self, guest: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, guest - self.base).unwrap();
    }

    pub fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, guest - self.base).unwrap();
        bytes
    }

    pub fn u16(&self, guest: u64) -> u16 {
        u16::from_le_bytes(self.read(guest, 2).try_into().unwrap())
    }

    pub fn u32(&self, guest: u64) -> u32 {
        u32::from_le_bytes(self.read(guest, 4).try_into().unwrap())
    }
}

/// A split ring in guest memory, driver's side.
pub struct Ring {
    pub size: u16,
    pub addresses: RingAddresses,
    pub avail_idx: u16,
}

impl Ring {
    /// Legacy layout at `base`: table, available ring, and the used ring at the next multiple of `align`.
    pub fn legacy(base: u64, size: u16, align: u64) -> Self {
        let n = u64::from(size);
        let driver = base + 16 * n;
        let device = (driver + 6 + 2 * n).next_multiple_of(align);
        Self {
            size,
            addresses: RingAddresses {
                desc: base,
                driver,
                device,
            },
            avail_idx: 0,
        }
    }

    pub fn descriptor(&self, guest: &Guest, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        guest.write(
            self.addresses.desc + 16 * u64::from(index),
            &descriptor(addr, len, flags, next),
        );
    }

    pub fn offer(&mut self, guest: &Guest, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        guest.write(self.addresses.driver + 4 + 2 * slot, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        guest.write(self.addresses.driver + 2, &self.avail_idx.to_le_bytes());
    }

    pub fn set_avail_flags(&self, guest: &Guest, flags: u16) {
        guest.write(self.addresses.driver, &flags.to_le_bytes());
    }

    pub fn set_used_event(&self, guest: &Guest, event: u16) {
        guest.write(
            self.addresses.driver + 4 + 2 * u64::from(self.size),
            &event.to_le_bytes(),
        );
    }

    pub fn avail_event(&self, guest: &Guest) -> u16 {
        guest.u16(self.addresses.device + 4 + 8 * u64::from(self.size))
    }

    pub fn used_flags(&self, guest: &Guest) -> u16 {
        guest.u16(self.addresses.device)
    }

    pub fn used_idx(&self, guest: &Guest) -> u16 {
        guest.u16(self.addresses.device + 2)
    }

    pub fn used(&self, guest: &Guest, index: u16) -> (u32, u32) {
        let at = self.addresses.device + 4 + 8 * u64::from(index % self.size);
        (guest.u32(at), guest.u32(at + 4))
    }
}

pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = addr.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}
