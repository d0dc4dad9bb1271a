// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The log of pages that a device has written, for live migration (vhost-user, VHOST_USER_PROTOCOL_F_LOG_SHMFD).
//!
//! The front end shares a bitmap, one bit for each 4 KiB of guest physical memory, reads it while the guest goes on, and
//! copies again what is marked. So a page is marked after it was written and before the driver is told: marked earlier, the
//! bit may be read and the page copied before the write; marked later, the guest may be stopped in between.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::error::Fault;
use crate::memory::{HostArea, MappingCache, MemoryMap};
use crate::sys::PeerFd;

/// Bytes of guest memory for a bit.
const PAGE: u64 = 4096;

/// A log that is being kept.
pub struct DirtyLog {
    bits: HostArea,
}

impl DirtyLog {
    /// Maps the front end's bitmap.
    ///
    /// # Errors
    /// `log.*`, `memory.*`.
    pub fn map(mappings: &MappingCache, fd: &PeerFd, size: u64, offset: u64) -> Result<Self, Fault> {
        let mut map = MemoryMap::default();
        map = map.with(mappings.region(fd, 0, size, 0, offset)?)?;
        let bits = Arc::new(map)
            .area_by_guest(0, size)
            .ok_or_else(|| Fault::new("log.size", format!("a log of {size} bytes")))?;
        Ok(Self { bits })
    }

    /// Whether it has a bit for each page of this memory.
    ///
    /// # Errors
    /// `log.size`.
    pub fn covers(&self, map: &MemoryMap) -> Result<(), Fault> {
        let end = map.regions().iter().map(|region| region.guest + region.size).max();
        let needed = end.unwrap_or(0).div_ceil(PAGE).div_ceil(8);
        if self.bits.len() as u64 >= needed {
            return Ok(());
        }
        Err(Fault::new(
            "log.size",
            format!("a log of {} bytes; memory needs {needed}", self.bits.len()),
        ))
    }

    /// Marks what has been written. What is beyond the log's end has no bit: memory that came after it.
    pub fn mark(&self, guest: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|less| guest.checked_add(less)) else {
            return;
        };
        for page in guest / PAGE..=last / PAGE {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            if byte >= self.bits.len() {
                return;
            }
            // Release: whoever takes the bit and then copies the page finds what was written before.
            self.bits.u8(byte).fetch_or(1 << (page % 8), Ordering::Release);
        }
    }

    /// Marks several ranges.
    pub fn mark_all(&self, ranges: &[(u64, u64)]) {
        for &(guest, len) in ranges {
            self.mark(guest, len);
        }
    }

    /// Where it is.
    pub fn bits(&self) -> &HostArea {
        &self.bits
    }

    /// Whether the bitmap was taken away by the front end.
    pub fn lost(&self) -> bool {
        self.bits.lost()
    }
}
