// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a split ring with buffers of its own.
//!
//! A slot is a buffer and two descriptors, for a buffer may lie across two pages that aren't neighbours in physical memory. No
//! slot ever uses other descriptors, so there is no free list to get wrong.

use std::collections::VecDeque;
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use crate::memory::Dma;
use crate::message::MAX_MESSAGE;

/// Largest ring used.
pub const MAX_SIZE: u16 = 64;
/// Bytes from one buffer to the next: multiples of 64, such that none lies across three pages.
pub const STRIDE: usize = MAX_MESSAGE.next_multiple_of(64);
/// Descriptors of a slot.
const PER_SLOT: u16 = 2;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// What a device did that no device may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum RingError {
    #[error("used index {0} is ahead of what was made available")]
    UsedIndex(u16),
    #[error("used element names buffer {0}, which the device doesn't have")]
    UsedId(u32),
    #[error("used length {0} is larger than the buffer")]
    UsedLength(u32),
}

/// Offsets of a ring's parts in DMA memory.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// Descriptor table.
    pub desc: usize,
    /// Available ring.
    pub avail: usize,
    /// Used ring.
    pub used: usize,
}

impl Parts {
    /// A ring of `size` entries at the start of a page; with at most [`MAX_SIZE`] it ends within 4 KiB.
    pub fn new(page: usize, size: u16) -> Self {
        let size = usize::from(size);
        let avail = page + 16 * size;
        Self {
            desc: page,
            avail,
            used: (avail + 6 + 2 * size).next_multiple_of(4),
        }
    }
}

/// A ring and its buffers.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<Dma>,
    parts: Parts,
    size: u16,
    buffers: usize,
    /// Buffers are written by the device.
    receives: bool,
    avail: u16,
    used: u16,
    in_flight: Vec<bool>,
    free: VecDeque<u16>,
    /// avail index when the device was last told.
    told: u16,
}

impl Ring {
    /// A ring of `size` entries (a power of two of 2 to [`MAX_SIZE`]) in one page, with buffers from `buffers` on. Zeroes
    /// what a former ring has left there.
    pub fn new(memory: Arc<Dma>, page: usize, size: u16, buffers: usize, receives: bool, interrupts: bool) -> Self {
        let parts = Parts::new(page, size);
        let slots = size / PER_SLOT;
        memory.pages().write(page, &[0; 4096]);
        if !interrupts {
            memory
                .pages()
                .store16(parts.avail, AVAIL_NO_INTERRUPT, Ordering::Relaxed);
        }
        Self {
            memory,
            parts,
            size,
            buffers,
            receives,
            avail: 0,
            used: 0,
            in_flight: vec![false; slots.into()],
            free: (0..slots).collect(),
            told: 0,
        }
    }

    /// Where the parts are.
    pub fn parts(&self) -> Parts {
        self.parts
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether another buffer can be made available.
    pub fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether the device has no buffer.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.in_flight.len()
    }

    /// Makes an empty buffer available, if there is one.
    pub fn offer(&mut self) -> bool {
        self.publish(MAX_MESSAGE)
    }

    /// Makes a message available; false when there is no free buffer. At most [`MAX_MESSAGE`] bytes.
    pub fn send(&mut self, message: &[u8]) -> bool {
        let Some(&slot) = self.free.front() else { return false };
        self.memory.pages().write(self.buffer(slot), message);
        self.publish(message.len())
    }

    fn buffer(&self, slot: u16) -> usize {
        self.buffers + usize::from(slot) * STRIDE
    }

    fn publish(&mut self, length: usize) -> bool {
        let Some(slot) = self.free.pop_front() else {
            return false;
        };
        let pages = self.memory.pages();
        let head = slot * PER_SLOT;
        let (first, second) = self.memory.segments(self.buffer(slot), length);
        let write = if self.receives { DESC_WRITE } else { 0 };
        let next = if second.is_some() { DESC_NEXT } else { 0 };
        self.describe(head, first, write | next, head + 1);
        if let Some(second) = second {
            self.describe(head + 1, second, write, 0);
        }
        let entry = self.parts.avail + 4 + 2 * usize::from(self.avail % self.size);
        pages.store16(entry, head, Ordering::Relaxed);
        self.in_flight[usize::from(slot)] = true;
        self.avail = self.avail.wrapping_add(1);
        // Release: buffer, descriptors and entry are there before the device can read the index that covers them.
        pages.store16(self.parts.avail + 2, self.avail, Ordering::Release);
        true
    }

    fn describe(&self, index: u16, (address, length): (u64, usize), flags: u16, next: u16) {
        let pages = self.memory.pages();
        let at = self.parts.desc + 16 * usize::from(index);
        pages.store64(at, address);
        // At most MAX_MESSAGE.
        pages.store32(at + 8, length as u32);
        pages.store16(at + 12, flags, Ordering::Relaxed);
        pages.store16(at + 14, next, Ordering::Relaxed);
    }

    /// Whether the device has to be notified of what was made available since the last time it was.
    pub fn take_notification(&mut self) -> bool {
        if self.told == self.avail {
            return false;
        }
        self.told = self.avail;
        // The index has to be visible before the flag is read, or the device, which clears the flag and then reads the index,
        // could miss the buffer while we believe that it is awake. Pairs with the device's fence between these two.
        fence(Ordering::SeqCst);
        self.memory.pages().load16(self.parts.used, Ordering::Relaxed) & USED_NO_NOTIFY == 0
    }

    /// Takes back a buffer that the device is done with: its slot and the bytes it has written.
    ///
    /// # Errors
    /// [`RingError`]: the device must be reset.
    pub fn take_used(&mut self) -> Result<Option<(u16, usize)>, RingError> {
        let pages = self.memory.pages();
        // Acquire: the element and the buffer are read after the index that covers them.
        let index = pages.load16(self.parts.used + 2, Ordering::Acquire);
        let count = usize::from(index.wrapping_sub(self.used));
        if count == 0 {
            return Ok(None);
        }
        if count > self.in_flight.len() - self.free.len() {
            return Err(RingError::UsedIndex(index));
        }
        let at = self.parts.used + 4 + 8 * usize::from(self.used % self.size);
        let (id, length) = (pages.load32(at), pages.load32(at + 4));
        let slot = u16::try_from(id)
            .ok()
            .filter(|id| id % PER_SLOT == 0)
            .map(|id| id / PER_SLOT);
        let slot = slot
            .filter(|&slot| self.in_flight.get(usize::from(slot)).copied().unwrap_or(false))
            .ok_or(RingError::UsedId(id))?;
        let written = length as usize;
        if self.receives && written > MAX_MESSAGE {
            return Err(RingError::UsedLength(length));
        }
        self.used = self.used.wrapping_add(1);
        self.in_flight[usize::from(slot)] = false;
        self.free.push_back(slot);
        Ok(Some((slot, written)))
    }

    /// Copies what the device has written to a buffer that came back. Once: it may go on writing.
    pub fn copy(&self, slot: u16, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length.min(MAX_MESSAGE)];
        self.memory.pages().read(self.buffer(slot), &mut bytes);
        bytes
    }
}
