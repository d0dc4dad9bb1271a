// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A mapped piece of a BAR.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{fence, Ordering};

use super::page_size;

/// Device registers. Each access is one load or store of its width: hypervisors decode the trapping instruction, and a
/// virtio field may only be accessed whole.
#[derive(Debug)]
pub struct Mmio {
    mapping: NonNull<u8>,
    mapped: usize,
    /// Where the registers begin in the mapping.
    skip: usize,
    length: usize,
}

// SAFETY: the mapping belongs to this value until it is dropped, and volatile accesses to device registers may come from
// any thread.
unsafe impl Send for Mmio {}
// SAFETY: as above; there is no state besides the device's own.
unsafe impl Sync for Mmio {}

impl Mmio {
    /// Maps `length` bytes at `offset` of a BAR's resource file.
    ///
    /// # Errors
    /// What mmap says, EINVAL for an empty or impossible range.
    pub fn map(file: &File, offset: u64, length: u64) -> io::Result<Self> {
        let page = page_size() as u64;
        let skip = offset % page;
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let mapped = length
            .checked_add(skip)
            .and_then(|l| l.checked_next_multiple_of(page))
            .ok_or_else(invalid)?;
        let mapped = usize::try_from(mapped).map_err(|_| invalid())?;
        let start = libc::off_t::try_from(offset - skip).map_err(|_| invalid())?;
        if length == 0 {
            return Err(invalid());
        }
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                start,
            )
        };
        let mapping = NonNull::new(address.cast::<u8>()).filter(|_| address != libc::MAP_FAILED);
        Ok(Self {
            mapping: mapping.ok_or_else(io::Error::last_os_error)?,
            mapped,
            // Below a page's size; and below `mapped`, as is the length.
            skip: skip as usize,
            length: length as usize,
        })
    }

    /// Bytes of registers.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The address of a naturally aligned register. All offsets come from code that has checked them against the
    /// structure's length, so anything else is a bug here and stops.
    fn at<T>(&self, offset: usize) -> *mut T {
        let width = size_of::<T>();
        assert!(
            offset.checked_add(width).is_some_and(|end| end <= self.length),
            "register {offset:#x} is outside of its structure"
        );
        let address = self.mapping.as_ptr().wrapping_add(self.skip + offset);
        assert!(
            address.addr().is_multiple_of(width),
            "register {offset:#x} is not aligned"
        );
        address.cast()
    }

    /// Reads a byte.
    pub fn read8(&self, offset: usize) -> u8 {
        // SAFETY: `at` only returns aligned addresses inside the mapping, which lives as long as self.
        unsafe { self.at::<u8>(offset).read_volatile() }
    }

    /// Reads 16 bits.
    pub fn read16(&self, offset: usize) -> u16 {
        // SAFETY: as in `read8`.
        unsafe { self.at::<u16>(offset).read_volatile() }
    }

    /// Reads 32 bits.
    pub fn read32(&self, offset: usize) -> u32 {
        // SAFETY: as in `read8`.
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    // Stores to registers make the device look at memory, so whatever was written before has to be visible: on x86 a full
    // fence also keeps a later load of the ring from being done before the store; on aarch64 it is a DMB over the inner
    // shareable domain, to which the CPUs that play the device belong.

    /// Writes a byte.
    pub fn write8(&self, offset: usize, value: u8) {
        fence(Ordering::SeqCst);
        // SAFETY: as in `read8`.
        unsafe { self.at::<u8>(offset).write_volatile(value) }
    }

    /// Writes 16 bits.
    pub fn write16(&self, offset: usize, value: u16) {
        fence(Ordering::SeqCst);
        // SAFETY: as in `read8`.
        unsafe { self.at::<u16>(offset).write_volatile(value) }
    }

    /// Writes 32 bits.
    pub fn write32(&self, offset: usize, value: u32) {
        fence(Ordering::SeqCst);
        // SAFETY: as in `read8`.
        unsafe { self.at::<u32>(offset).write_volatile(value) }
    }
}

impl Drop for Mmio {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map` with this length, and no reference to it can be left.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}
