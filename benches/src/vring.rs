// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a split ring whose descriptors are one buffer each: enough for rxq and txq.

use std::io;
use std::sync::atomic::{fence, Ordering};

use crate::ram::Ram;

const DEVICE_WRITES: u16 = 2;
/// Entries of a ring here.
pub const SIZE: u16 = 16;
/// Header and largest payload of a vhost-user message.
pub const BUFFER: usize = 12 + 4096;
/// From one buffer to the next.
const STRIDE: usize = 8192;
const PAGE: usize = 4096;

/// Bytes of RAM that a ring takes, with its buffers.
pub const ROOM: usize = PAGE + SIZE as usize * STRIDE;

/// A ring in RAM. Descriptor n always means buffer n.
pub struct Vring {
    base: usize,
    guest_base: u64,
    available: u16,
    used: u16,
    free: Vec<u16>,
}

impl Vring {
    /// A ring of zeroes at `base`, in RAM that the device finds at `guest_base`.
    pub fn new(base: usize, guest_base: u64) -> Self {
        Self {
            base,
            guest_base,
            available: 0,
            used: 0,
            free: (0..SIZE).collect(),
        }
    }

    /// Where descriptors, driver area and device area are in the RAM.
    pub fn areas(&self) -> [usize; 3] {
        let table = 16 * usize::from(SIZE);
        [self.base, self.base + table, self.base + PAGE / 2]
    }

    fn buffer(&self, id: u16) -> usize {
        self.base + PAGE + usize::from(id) * STRIDE
    }

    fn offer(&mut self, ram: &Ram, id: u16, len: usize, flags: u16) {
        let [table, driver, _] = self.areas();
        let entry = table + 16 * usize::from(id);
        let address = self.guest_base + self.buffer(id) as u64;
        ram.u64(entry).store(address, Ordering::Relaxed);
        ram.u32(entry + 8).store(len as u32, Ordering::Relaxed);
        ram.u16(entry + 12).store(flags, Ordering::Relaxed);
        let place = driver + 4 + 2 * usize::from(self.available % SIZE);
        ram.u16(place).store(id, Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
        ram.u16(driver + 2).store(self.available, Ordering::Release);
        // The caller notifies the device in any case, so there is no flag to be read behind this.
        fence(Ordering::SeqCst);
    }

    /// Makes all buffers that are free available to be written by the device. Notify it then.
    pub fn fill(&mut self, ram: &Ram) {
        while let Some(id) = self.free.pop() {
            self.offer(ram, id, BUFFER, DEVICE_WRITES);
        }
    }

    /// Makes a message available to be read by the device; false when no buffer is free. Notify it then.
    pub fn send(&mut self, ram: &Ram, bytes: &[u8]) -> bool {
        let Some(id) = self.free.pop() else { return false };
        let at = self.buffer(id);
        for (place, byte) in (at..).zip(bytes) {
            ram.u8(place).store(*byte, Ordering::Relaxed);
        }
        self.offer(ram, id, bytes.len(), 0);
        true
    }

    /// The next buffer that the device has used, and how many bytes it has written.
    ///
    /// # Errors
    /// A used element that makes no sense.
    pub fn take(&mut self, ram: &Ram) -> io::Result<Option<Vec<u8>>> {
        let [_, _, device] = self.areas();
        if ram.u16(device + 2).load(Ordering::Acquire) == self.used {
            return Ok(None);
        }
        let element = device + 4 + 8 * usize::from(self.used % SIZE);
        let id = ram.u32(element).load(Ordering::Relaxed);
        let len = ram.u32(element + 4).load(Ordering::Relaxed) as usize;
        self.used = self.used.wrapping_add(1);
        let id = u16::try_from(id)
            .ok()
            .filter(|id| *id < SIZE && !self.free.contains(id));
        let (Some(id), true) = (id, len <= BUFFER) else {
            return Err(io::Error::other("a used element of nothing that was made available"));
        };
        self.free.push(id);
        let at = self.buffer(id);
        Ok(Some(
            (at..at + len)
                .map(|place| ram.u8(place).load(Ordering::Relaxed))
                .collect(),
        ))
    }
}
