// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Storage behind a block device: a raw file, memory, or nothing at all.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::sys;

/// Bytes of a sector, the unit of virtio-blk.
pub const SECTOR: u64 = 512;

/// Memory as storage: pages without a name, which a successor of this process can take over, given to requests of several workers at once like a disk, without any order
/// between overlapping ones.
pub struct RamDisk {
    ptr: NonNull<u8>,
    len: u64,
    file: OwnedFd,
}

// SAFETY: accessed by raw copies only; two requests that overlap in time and place get a mix of both, as on a disk.
unsafe impl Send for RamDisk {}
// SAFETY: as above.
unsafe impl Sync for RamDisk {}

impl RamDisk {
    fn new(len: u64) -> std::io::Result<Self> {
        Self::map(sys::shared_memory("vhu-ram-disk", len)?, len)
    }

    fn map(file: OwnedFd, len: u64) -> std::io::Result<Self> {
        let size = usize::try_from(len).map_err(|_| std::io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new mapping at an address the kernel chooses, of a file that can't shrink: it is sealed.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(ptr.cast::<u8>()) {
            Some(ptr) if ptr.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { ptr, len, file }),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// The storage at `offset`, valid for `len` bytes; None when that goes beyond the end.
    #[inline]
    pub fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // SAFETY: offset <= end <= self.len, so the result is inside the mapping (or one past it).
        (end <= self.len).then(|| unsafe { self.ptr.as_ptr().add(offset as usize) })
    }

    /// Zeroes a range; whole pages are given back to the system.
    pub fn zero(&self, offset: u64, len: u64) {
        let Some(ptr) = self.at(offset, len) else { return };
        let start = offset.next_multiple_of(4096).min(offset + len);
        let end = ((offset + len) / 4096 * 4096).max(start);
        // SAFETY: [offset, offset + len) is inside the mapping (at), and start and end lie in that range. REMOVE frees
        // the pages of the memory file, which then read as zero.
        unsafe {
            std::ptr::write_bytes(ptr, 0, (start - offset) as usize);
            if end > start {
                libc::madvise(
                    self.ptr.as_ptr().add(start as usize).cast(),
                    (end - start) as usize,
                    libc::MADV_REMOVE,
                );
            }
            std::ptr::write_bytes(self.ptr.as_ptr().add(end as usize), 0, (offset + len - end) as usize);
        }
    }
}

impl Drop for RamDisk {
    fn drop(&mut self) {
        // SAFETY: nobody holds a pointer: requests keep the image alive.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len as usize) };
    }
}

/// Where the bytes are.
pub enum Storage {
    /// A raw image file or block device, through the page cache.
    File(File),
    /// Memory of this process; lost at its end.
    Ram(RamDisk),
    /// Reads zeroes, forgets writes.
    Null,
}

/// An open image.
pub struct Image {
    /// As the operator named it.
    pub spec: String,
    /// Where the bytes are.
    pub storage: Storage,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether others may have it open for writing, too.
    pub shared: bool,
    /// Size in bytes, a multiple of [`SECTOR`]. Changes on resize.
    size: AtomicU64,
}

impl Image {
    /// Opens `spec`: "ram:BYTES", "null:BYTES", or the path of a raw file or block device.
    ///
    /// A file is locked (flock, shared when read-only) so that two members, or two processes, can't write the same
    /// image; the lock goes with the image.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub fn open(spec: &str, read_only: bool) -> Result<Self> {
        Self::open_after(spec, read_only, false, None)
    }

    /// As `open`, but the lock is a shared one: all who open it like that can write it, and have to see to it that one at a
    /// time does (the two ends of a live migration).
    ///
    /// # Errors
    /// [`Error::Image`].
    pub fn open_shared(spec: &str, read_only: bool) -> Result<Self> {
        Self::open_after(spec, read_only, true, None)
    }

    /// Opens `spec` in place of `old`, which may be an opening of the same file: its lock is then handed on, and
    /// taken back if the new opening fails.
    ///
    /// # Errors
    /// [`Error::Image`]; `old` is as before.
    pub fn open_after(spec: &str, read_only: bool, shared: bool, old: Option<&Image>) -> Result<Self> {
        let fail = |reason: String| Error::Image {
            spec: spec.to_owned(),
            reason,
        };
        let sized = |text: &str| -> Result<u64> {
            let size: u64 = text
                .parse()
                .map_err(|_| fail(format!("size {text:?} is not a number of bytes")))?;
            check_size(size).map_err(fail)?;
            Ok(size)
        };
        let (storage, size) = if let Some(text) = spec.strip_prefix("ram:") {
            let size = sized(text)?;
            (Storage::Ram(RamDisk::new(size).map_err(|e| fail(e.to_string()))?), size)
        } else if let Some(text) = spec.strip_prefix("null:") {
            (Storage::Null, sized(text)?)
        } else {
            // Before opening: opening a FIFO would wait for its other end.
            let kind = std::fs::metadata(spec).map_err(|e| fail(e.to_string()))?.file_type();
            if !kind.is_file() && !kind.is_block_device() {
                return Err(fail("neither a regular file nor a block device".into()));
            }
            let file = OpenOptions::new()
                .read(true)
                .write(!read_only)
                .open(spec)
                .map_err(|e| fail(e.to_string()))?;
            let size = file_size(&file).map_err(&fail)?;
            check_size(size).map_err(&fail)?;
            let before = old.and_then(|image| image.same_file(&file).map(|old_file| (old_file, image.exclusive())));
            if let Some((old_file, _)) = before {
                sys::unlock(old_file);
            }
            let locked = sys::try_lock(&file, !read_only && !shared);
            if !matches!(locked, Ok(true)) {
                if let Some((old_file, exclusive)) = before {
                    let _ = sys::try_lock(old_file, exclusive);
                }
            }
            if !locked.map_err(|e| fail(format!("locking: {e}")))? {
                return Err(fail("in use by another member or process".into()));
            }
            (Storage::File(file), size)
        };
        Ok(Self {
            spec: spec.to_owned(),
            storage,
            read_only,
            shared,
            size: AtomicU64::new(size),
        })
    }

    /// An image that another process has open and hands over, with its lock: the fd is that of a file image, or of the memory
    /// of a RAM image. `spec` and the rest as for `open`.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub fn adopt(spec: &str, read_only: bool, shared: bool, fd: OwnedFd) -> Result<Self> {
        let fail = |reason: String| Error::Image {
            spec: spec.to_owned(),
            reason,
        };
        let file = File::from(fd);
        let size = file_size(&file).map_err(&fail)?;
        check_size(size).map_err(&fail)?;
        let storage = if spec.starts_with("ram:") {
            if !sys::is_sealed(&file) {
                return Err(fail("not the memory of a RAM image".into()));
            }
            Storage::Ram(RamDisk::map(file.into(), size).map_err(|e| fail(e.to_string()))?)
        } else {
            Storage::File(file)
        };
        Ok(Self {
            spec: spec.to_owned(),
            storage,
            read_only,
            shared,
            size: AtomicU64::new(size),
        })
    }

    /// The fd to hand over to a successor; None for an image that has none.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        match &self.storage {
            Storage::File(file) => Some(file.as_fd()),
            Storage::Ram(ram) => Some(ram.file.as_fd()),
            Storage::Null => None,
        }
    }

    /// Our open file, when `file` is another opening of it.
    fn same_file(&self, file: &File) -> Option<&File> {
        let Storage::File(ours) = &self.storage else {
            return None;
        };
        let (a, b) = (sys::file_info(ours.as_fd()).ok()?, sys::file_info(file.as_fd()).ok()?);
        (a.dev == b.dev && a.ino == b.ino).then_some(ours)
    }

    fn exclusive(&self) -> bool {
        !self.read_only && !self.shared
    }

    /// Takes the lock again that a failed replacement may have taken over.
    pub fn lock_again(&self) {
        if let Storage::File(file) = &self.storage {
            if !matches!(sys::try_lock(file, self.exclusive()), Ok(true)) {
                log::error!("image {}: its lock was lost to somebody else", self.spec);
            }
        }
    }

    /// Size in bytes.
    #[inline]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// "file", "ram" or "null".
    pub fn kind(&self) -> &'static str {
        match self.storage {
            Storage::File(_) => "file",
            Storage::Ram(_) => "ram",
            Storage::Null => "null",
        }
    }

    /// The fd of a file image.
    #[inline]
    pub fn fd(&self) -> Option<RawFd> {
        match &self.storage {
            Storage::File(file) => Some(file.as_raw_fd()),
            _ => None,
        }
    }

    /// Changes the size of a file or null image. A block device can't be resized from here; memory can't either,
    /// since requests in flight point into it.
    ///
    /// # Errors
    /// [`Error::Image`]; nothing has changed then.
    pub fn resize(&self, size: u64) -> Result<()> {
        let fail = |reason: String| Error::Image {
            spec: self.spec.clone(),
            reason,
        };
        check_size(size).map_err(fail)?;
        match &self.storage {
            Storage::Null => {}
            Storage::Ram(_) => return Err(fail("a ram image can't be resized, only swapped".into())),
            Storage::File(_) if self.read_only => return Err(fail("a read-only image can't be resized".into())),
            Storage::File(file) => {
                let info = sys::file_info(file.as_fd()).map_err(|e| fail(e.to_string()))?;
                if !info.regular {
                    return Err(fail("only a regular file can be resized".into()));
                }
                if size < self.size() {
                    // The driver must stop using the tail before it is gone.
                    self.size.store(size, Ordering::Relaxed);
                }
                file.set_len(size)
                    .map_err(|e| fail(format!("resizing to {size} bytes: {e}")))?;
            }
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }

    /// Puts everything written so far on stable storage. Blocks.
    ///
    /// # Errors
    /// [`Error::Image`].
    pub fn sync(&self) -> Result<()> {
        match &self.storage {
            Storage::File(file) if !self.read_only => file.sync_data().map_err(|e| Error::Image {
                spec: self.spec.clone(),
                reason: format!("fdatasync: {e}"),
            }),
            _ => Ok(()),
        }
    }
}

fn check_size(size: u64) -> std::result::Result<(), String> {
    if size == 0 || !size.is_multiple_of(SECTOR) || size > i64::MAX as u64 {
        Err(format!(
            "size of {size} bytes; a positive multiple of {SECTOR} is needed"
        ))
    } else {
        Ok(())
    }
}

fn file_size(file: &File) -> std::result::Result<u64, String> {
    let info = sys::file_info(file.as_fd()).map_err(|e| e.to_string())?;
    if info.regular {
        return Ok(info.size);
    }
    if !info.block {
        return Err("neither a regular file nor a block device".into());
    }
    // A block device's size isn't in its inode; the end is where reading stops.
    use std::io::{Seek, SeekFrom};
    let mut end = file.try_clone().map_err(|e| e.to_string())?;
    let size = end.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    let mut probe = [0u8; 1];
    file.read_at(&mut probe, 0).map_err(|e| e.to_string())?;
    Ok(size)
}
