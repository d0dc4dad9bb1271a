// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest RAM: a memfd that is mapped here and sent to the back end.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8};

/// Shared memory, accessed by offset. The back end reads and writes it at any time, so every access is atomic (ring
/// fields) or goes word by word through atomics (data): nothing is ever borrowed.
pub struct Ram {
    fd: OwnedFd,
    base: NonNull<c_void>,
    len: usize,
}

impl Ram {
    /// A new memory of `len` bytes, a multiple of the page size.
    ///
    /// # Errors
    /// What memfd_create, ftruncate or mmap says.
    pub fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a C string literal, and a new fd that nobody else owns.
        let fd = unsafe { libc::memfd_create(c"vhu-bench".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above returned a fresh fd.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let size = libc::off_t::try_from(len).map_err(io::Error::other)?;
        // SAFETY: no memory is involved.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_POPULATE,
        );
        // SAFETY: a new mapping at an address the kernel chooses, as long as the file.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base).ok_or_else(|| io::Error::other("mmap at address 0"))?;
        Ok(Self { fd, base, len })
    }

    /// The memory's fd, to be sent to the back end.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Address in this process; vhost-user calls it the user address.
    pub fn user_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// The place of a field. Panics on an offset that isn't aligned or not in the memory: all offsets are our own.
    fn at(&self, offset: usize, size: usize) -> *mut c_void {
        assert!(
            offset.is_multiple_of(size) && offset + size <= self.len,
            "offset {offset:#x} of {size} bytes"
        );
        // SAFETY: offset + size lies in the mapping.
        unsafe { self.base.as_ptr().byte_add(offset) }
    }

    /// A byte.
    pub fn u8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: `at` checked the place; it lives as long as self and is accessed through atomics only.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1).cast()) }
    }

    /// A 16-bit field.
    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as in `u8`; aligned, as `at` checked against the page-aligned base.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    /// A 32-bit field.
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `u16`.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    /// A 64-bit field.
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `u16`.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length; references into it can't outlive self.
        unsafe { libc::munmap(self.base.as_ptr(), self.len) };
    }
}
