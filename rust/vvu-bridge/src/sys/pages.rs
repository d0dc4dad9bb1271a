// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that a device reads and writes while this process does.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};

/// The huge pages asked for.
pub const HUGE_PAGE: usize = 2 << 20;

/// Bytes of a page.
pub fn page_size() -> usize {
    // SAFETY: no pointers are involved.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// Anonymous pages, present and locked. Everything in them is accessed by atomics, since the device may be at it, too.
///
/// The mapping is shared: a private page would be replaced by a copy when it is written to after a fork.
#[derive(Debug)]
pub struct DmaPages {
    mapping: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to this value until it is dropped; all accesses are atomic.
unsafe impl Send for DmaPages {}
// SAFETY: as above.
unsafe impl Sync for DmaPages {}

impl DmaPages {
    /// One huge page, zeroed.
    ///
    /// # Errors
    /// ENOMEM when there is no free one, EINVAL when this machine has none of this size.
    pub fn huge() -> io::Result<Self> {
        Self::map(HUGE_PAGE, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB)
    }

    /// Ordinary pages, zeroed and locked.
    ///
    /// # Errors
    /// What mmap and mlock say.
    pub fn small(length: usize) -> io::Result<Self> {
        let pages = Self::map(length.max(1).next_multiple_of(page_size()), 0)?;
        // A huge page made of these later on (khugepaged) would be elsewhere. Kernels without huge pages say EINVAL.
        // SAFETY: the range is the mapping.
        unsafe { libc::madvise(pages.mapping.as_ptr().cast(), pages.length, libc::MADV_NOHUGEPAGE) };
        // SAFETY: the range is the mapping.
        super::check(unsafe { libc::mlock(pages.mapping.as_ptr().cast(), pages.length) })?;
        Ok(pages)
    }

    fn map(length: usize, flags: libc::c_int) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | flags,
                -1,
                0,
            )
        };
        let mapping = NonNull::new(address.cast::<u8>()).filter(|_| address != libc::MAP_FAILED);
        let pages = Self {
            mapping: mapping.ok_or_else(io::Error::last_os_error)?,
            length,
        };
        // MAP_POPULATE doesn't report failure; a huge page was reserved by mmap, so this can't be SIGBUS.
        for at in (0..length).step_by(page_size()) {
            pages.byte(at).store(0, Ordering::Relaxed);
        }
        Ok(pages)
    }

    /// Bytes mapped.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The virtual address, to be looked up.
    pub fn address(&self) -> usize {
        self.mapping.as_ptr().addr()
    }

    /// Offsets are this program's own, so one that is outside is a bug here and stops.
    fn at<T>(&self, offset: usize) -> *mut T {
        let width = size_of::<T>();
        assert!(
            offset.checked_add(width).is_some_and(|end| end <= self.length) && offset.is_multiple_of(width),
            "offset {offset:#x} is not aligned or outside of the DMA memory"
        );
        self.mapping.as_ptr().wrapping_add(offset).cast()
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: inside the mapping and aligned (see `at`), which lives as long as self; all accesses are atomic.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }
    }

    fn word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as in `byte`.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }
    }

    /// Reads 16 bits.
    pub fn load16(&self, offset: usize, ordering: Ordering) -> u16 {
        self.word(offset).load(ordering)
    }

    /// Writes 16 bits.
    pub fn store16(&self, offset: usize, value: u16, ordering: Ordering) {
        self.word(offset).store(value, ordering);
    }

    /// Reads 32 bits.
    pub fn load32(&self, offset: usize) -> u32 {
        // SAFETY: as in `byte`.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }.load(Ordering::Relaxed)
    }

    /// Writes 32 bits.
    pub fn store32(&self, offset: usize, value: u32) {
        // SAFETY: as in `byte`.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }.store(value, Ordering::Relaxed);
    }

    /// Reads 64 bits.
    pub fn load64(&self, offset: usize) -> u64 {
        // SAFETY: as in `byte`.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }.load(Ordering::Relaxed)
    }

    /// Writes 64 bits.
    pub fn store64(&self, offset: usize, value: u64) {
        // SAFETY: as in `byte`.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }.store(value, Ordering::Relaxed);
    }

    /// Copies out.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = self.byte(offset + at).load(Ordering::Relaxed);
        }
    }

    /// Copies in.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        for (at, &byte) in bytes.iter().enumerate() {
            self.byte(offset + at).store(byte, Ordering::Relaxed);
        }
    }
}

impl Drop for DmaPages {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map` with this length, and no reference to it can be left.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.length) };
    }
}
