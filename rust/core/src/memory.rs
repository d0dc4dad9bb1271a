// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory: mappings shared between members, the immutable map of one front end, and checked views into it.
//!
//! Everything that touches guest memory goes through the types of this file; it is one of the few places with
//! `unsafe`. The invariants:
//!
//! - a [`Mapping`] is alive as long as any [`MemoryMap`] names it;
//! - a [`HostArea`] holds the map it was cut from; [`Buffers`] don't (they are made per request), so whoever keeps
//!   buffers keeps the map: the queue's runner holds it until no request is in flight;
//! - the guest writes to this memory at any time. Nothing is ever borrowed as `&[u8]`: ring fields are read through
//!   atomics, bulk data is copied by the pointer, and what was checked is the copy.

use std::any::Any;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::error::Fault;
use crate::sigbus::Guard;
use crate::sys::{self, PeerFd};

/// Regions a front end may have at once (GET_MAX_MEM_SLOTS). 509 is what the kernel's vhost and other back ends
/// answer; QEMU takes the minimum over all devices.
pub const MAX_REGIONS: usize = 509;

/// Shadows of remote memory that one connection may have, in bytes. They are address space until they are used.
pub const MAX_SHADOW: u64 = 1 << 40;

/// Memory that is read and written by asking its owner (vfio-user memory that comes without an fd).
///
/// Calls block, but not for ever; they can be made from several threads at once.
pub trait RemoteMemory: Send + Sync {
    /// Reads from guest address `iova`.
    ///
    /// # Errors
    /// `dma.*`: refused, not answered in time, or the owner is gone.
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Fault>;

    /// Writes to guest address `iova`; what was written is there when this returns.
    ///
    /// # Errors
    /// As `read`.
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Fault>;

    /// As `read`, but gives up soon after `cancelled` was set.
    ///
    /// # Errors
    /// As `read`, and `dma.cancelled`.
    fn read_unless(&self, iova: u64, data: &mut [u8], cancelled: &AtomicBool) -> Result<(), Fault> {
        if cancelled.load(Ordering::Relaxed) {
            return Err(Fault::new("dma.cancelled", "nobody waits for it any more"));
        }
        self.read(iova, data)
    }
}

/// What makes two mappings the same one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct MapKey {
    dev: u64,
    ino: u64,
    offset: u64,
    len: u64,
}

/// A shared mapping of part of a front end's memory file.
pub struct Mapping {
    addr: NonNull<u8>,
    len: usize,
    /// The file, for a successor of this process to map it as well.
    file: Option<Kept>,
    /// None for memory that has no file, and while dropping.
    guard: Option<Guard>,
    /// What is written is in the file, for everybody.
    shared: bool,
}

/// An fd that counts against [`MAX_KEPT`].
struct Kept(OwnedFd);

static KEPT: AtomicUsize = AtomicUsize::new(0);
/// Files that are kept open: regions are the front ends' to make, descriptors are everybody's. A front end whose files aren't
/// kept has to connect again when the process is replaced.
const MAX_KEPT: usize = 8192;

impl Kept {
    fn dup(fd: &OwnedFd) -> Option<Self> {
        if KEPT.fetch_add(1, Ordering::Relaxed) < MAX_KEPT {
            if let Ok(fd) = fd.try_clone() {
                return Some(Self(fd));
            }
        }
        KEPT.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        KEPT.fetch_sub(1, Ordering::Relaxed);
    }
}

// SAFETY: the pointer names memory that is shared with another process anyway; all access is by atomics or raw
// copies, and the mapping itself is immutable until drop.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps part of a file. Not `shared`: what is written here stays here, and reading the fd is enough.
    fn new(fd: &OwnedFd, offset: u64, len: u64, page: u64, shared: bool) -> Result<Self, Fault> {
        let kind = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let file_offset =
            libc::off_t::try_from(offset).map_err(|_| refuse(format!("offset {offset} can't be mapped")))?;
        let mut mapping = Self::map(len, kind, fd.as_raw_fd(), file_offset)?;
        mapping.file = Kept::dup(fd);
        let page = usize::try_from(page).unwrap_or(4096);
        mapping.guard = Guard::register(mapping.addr.as_ptr() as usize, mapping.len, page);
        if mapping.guard.is_none() {
            return Err(refuse("too many mappings in this process".into()));
        }
        Ok(mapping)
    }

    /// Memory of our own, all zeroes.
    fn anonymous(len: u64) -> Result<Self, Fault> {
        Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    fn map(len: u64, kind: libc::c_int, fd: RawFd, offset: libc::off_t) -> Result<Self, Fault> {
        let size = usize::try_from(len).map_err(|_| refuse(format!("{len} bytes can't be mapped")))?;
        // SAFETY: a new mapping at an address the kernel chooses; length and offset were checked against the file, if
        // there is one.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                kind | libc::MAP_NORESERVE,
                fd,
                offset,
            )
        };
        let Some(addr) = (addr != libc::MAP_FAILED)
            .then(|| NonNull::new(addr.cast::<u8>()))
            .flatten()
        else {
            return Err(refuse(format!(
                "mapping {len} bytes: {}",
                std::io::Error::last_os_error()
            )));
        };
        Ok(Self {
            addr,
            len: size,
            file: None,
            guard: None,
            shared: kind & libc::MAP_SHARED != 0,
        })
    }
}

fn refuse(reason: String) -> Fault {
    Fault::new("memory.map", reason)
}

impl Mapping {
    fn lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::lost)
    }

    /// Takes the pages out of our page tables; the next access finds them again in the file.
    fn rest(&self) {
        if self.shared {
            // SAFETY: the whole of a mapping that is ours. A shared one of a file has its contents in the file, so this
            // changes nothing that can be read. (Pages the guard has put in place of lost ones read as zeroes, as they may:
            // they are lost.) An error is as good as doing nothing.
            unsafe { libc::madvise(self.addr.as_ptr().cast(), self.len, libc::MADV_DONTNEED) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First the guard: once unmapped, the addresses may be another mapping's.
        self.guard = None;
        // SAFETY: the last reference is gone, so no region, area or request points here.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.len) };
    }
}

/// The process's mappings of guest memory, shared between all members that get the same file (one VM with many
/// disks sends the same memory to each).
#[derive(Default)]
pub struct MappingCache {
    mappings: Mutex<HashMap<MapKey, Weak<Mapping>>>,
}

impl MappingCache {
    /// Number of mappings alive.
    pub fn len(&self) -> usize {
        let mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        mappings.values().filter(|weak| weak.strong_count() > 0).count()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Maps one region of a front end. The fd is no longer needed afterwards.
    ///
    /// # Errors
    /// `memory.region-size`, `memory.region-wrap`, `memory.fd-kind`, `memory.fd-short`, `memory.map`.
    pub fn region(&self, fd: &PeerFd, guest: u64, size: u64, user: u64, mmap_offset: u64) -> Result<Region, Fault> {
        check_place(guest, size, user, mmap_offset)?;
        let fd = fd.memory_file().map_err(|why| Fault::new("memory.fd-kind", why))?;
        let part = Part::of(fd, mmap_offset, size)?;
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        // A mapping that has lost pages stays shared by those who have it, but a newcomer gets a fresh one: its file
        // has the right size now.
        let known = mappings
            .get(&part.key)
            .and_then(Weak::upgrade)
            .filter(|mapping| !mapping.lost());
        let mapping = match known {
            Some(mapping) => mapping,
            None => {
                let mapping = Arc::new(part.map(fd, true)?);
                mappings.retain(|_, weak| weak.strong_count() > 0);
                mappings.insert(part.key, Arc::downgrade(&mapping));
                mapping
            }
        };
        Ok(part.region(mapping, [guest, size, user, mmap_offset], true))
    }

    /// Maps one region that its owner doesn't allow to be written, from an fd that need not be writable. What a device
    /// writes there all the same reaches a copy of our own, as a write to ROM reaches nothing.
    ///
    /// # Errors
    /// As `region`.
    pub fn read_only_region(&self, fd: &PeerFd, guest: u64, size: u64, mmap_offset: u64) -> Result<Region, Fault> {
        check_place(guest, size, guest, mmap_offset)?;
        let fd = fd.readable_file().map_err(|why| Fault::new("memory.fd-kind", why))?;
        let part = Part::of(fd, mmap_offset, size)?;
        let mapping = Arc::new(part.map(fd, false)?);
        Ok(part.region(mapping, [guest, size, guest, mmap_offset], false))
    }
}

/// Whether a region's place makes sense.
fn check_place(guest: u64, size: u64, user: u64, mmap_offset: u64) -> Result<(), Fault> {
    if size == 0 {
        return Err(Fault::new("memory.region-size", "a region of 0 bytes"));
    }
    let wraps = |start: u64| start.checked_add(size).is_none();
    if wraps(guest) || wraps(user) || wraps(mmap_offset) {
        return Err(Fault::new(
            "memory.region-wrap",
            format!(
                "region of {size:#x} bytes at guest {guest:#x}, user {user:#x}, offset {mmap_offset:#x} wraps \
                 around 64 bits"
            ),
        ));
    }
    Ok(())
}

/// The pages of a file that a region needs.
struct Part {
    key: MapKey,
    page: u64,
    /// Bytes of the first page that aren't the region's.
    skip: usize,
}

impl Part {
    fn of(fd: &OwnedFd, mmap_offset: u64, size: u64) -> Result<Self, Fault> {
        let info = sys::file_info(fd.as_fd())
            .map_err(|e| Fault::new("memory.fd-kind", format!("the region's fd can't be examined: {e}")))?;
        if !info.regular {
            return Err(Fault::new(
                "memory.fd-kind",
                "the region's fd is not a file that can be shared",
            ));
        }
        // No overflow: check_place was here before.
        let end = mmap_offset + size;
        if end > info.size {
            return Err(Fault::new(
                "memory.fd-short",
                format!("region ends at byte {end:#x} of a file of {:#x} bytes", info.size),
            ));
        }
        let page = sys::backing_page_size(fd.as_fd()).unwrap_or(4096);
        let offset = mmap_offset - mmap_offset % page;
        Ok(Self {
            key: MapKey {
                dev: info.dev,
                ino: info.ino,
                offset,
                // Page granular on both sides. `end` is at most the file size (an i64), so rounding up can't wrap.
                len: (end - offset).next_multiple_of(page),
            },
            page,
            skip: usize::try_from(mmap_offset - offset)
                .map_err(|_| Fault::new("memory.map", "offset can't be mapped"))?,
        })
    }

    fn map(&self, fd: &OwnedFd, shared: bool) -> Result<Mapping, Fault> {
        Mapping::new(fd, self.key.offset, self.key.len, self.page, shared)
    }

    fn region(&self, mapping: Arc<Mapping>, place: [u64; 4], writable: bool) -> Region {
        let [guest, size, user, mmap_offset] = place;
        // SAFETY: skip + size <= len, so the result stays inside the mapping.
        let host = unsafe { mapping.addr.add(self.skip) };
        Region {
            guest,
            size,
            user,
            mmap_offset,
            host,
            backing: Backing::Mapped(mapping),
            writable,
            remote: None,
        }
    }
}

/// Memory of the process's own.
struct Own {
    addr: NonNull<u8>,
    len: usize,
}

// SAFETY: as for Mapping; nobody borrows the memory as a slice.
unsafe impl Send for Own {}
// SAFETY: as above.
unsafe impl Sync for Own {}

impl Drop for Own {
    fn drop(&mut self) {
        // SAFETY: the last reference is gone, so no region or area points here.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.len) };
    }
}

#[derive(Clone)]
enum Backing {
    Mapped(Arc<Mapping>),
    /// Memory that somebody else mapped and keeps alive (the vhost-user-backend crate's snapshot).
    Foreign(#[allow(dead_code)] Arc<dyn Any + Send + Sync>),
}

/// One region of guest memory.
#[derive(Clone)]
pub struct Region {
    /// Guest physical address.
    pub guest: u64,
    /// Size in bytes.
    pub size: u64,
    /// Address in the front end's process; ring addresses come in these.
    pub user: u64,
    /// Where the region starts in its file.
    pub mmap_offset: u64,
    host: NonNull<u8>,
    backing: Backing,
    writable: bool,
    remote: Option<Arc<dyn RemoteMemory>>,
}

// SAFETY: as for Mapping; foreign memory is kept alive by `backing` and shared with another process as well.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// A region in memory that somebody else has mapped.
    ///
    /// # Safety
    /// `host` must be the start of `size` readable and writable bytes that stay mapped as long as `keep` lives.
    pub unsafe fn foreign(guest: u64, size: u64, host: NonNull<u8>, keep: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            guest,
            size,
            user: guest,
            mmap_offset: 0,
            host,
            backing: Backing::Foreign(keep),
            writable: true,
            remote: None,
        }
    }

    /// A region that its owner gave no file for: a shadow of our own of the same size, all zeroes, which is kept up to
    /// date by whoever uses it. Guest and user address are the same.
    ///
    /// # Errors
    /// `memory.region-size`, `memory.region-wrap`, `memory.map`.
    pub fn shadow(guest: u64, size: u64, writable: bool, remote: Arc<dyn RemoteMemory>) -> Result<Self, Fault> {
        check_place(guest, size, guest, 0)?;
        if size > MAX_SHADOW {
            return Err(refuse(format!(
                "{size} bytes of memory without an fd, more than {MAX_SHADOW}"
            )));
        }
        let mapping = Arc::new(Mapping::anonymous(size)?);
        Ok(Self {
            guest,
            size,
            user: guest,
            mmap_offset: 0,
            host: mapping.addr,
            backing: Backing::Mapped(mapping),
            writable,
            remote: Some(remote),
        })
    }

    /// Whether its owner allows it to be written.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The region's file, if it is kept open.
    pub fn file(&self) -> Option<&OwnedFd> {
        match &self.backing {
            Backing::Mapped(mapping) => mapping.file.as_ref().map(|kept| &kept.0),
            Backing::Foreign(_) => None,
        }
    }

    /// How to reach the memory, when what is mapped is only a shadow of it.
    pub fn remote(&self) -> Option<&Arc<dyn RemoteMemory>> {
        self.remote.as_ref()
    }

    /// A region of zeroed memory of the process's own. Pages that nobody touches cost nothing.
    ///
    /// # Errors
    /// `memory.region-size`, `memory.map`.
    pub fn local(guest: u64, size: u64) -> Result<Self, Fault> {
        let len = usize::try_from(size).unwrap_or(0);
        if len == 0 || guest.checked_add(size).is_none() {
            return Err(Fault::new("memory.region-size", format!("a region of {size} bytes")));
        }
        // SAFETY: a new mapping at an address the kernel chooses.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let Some(addr) = (addr != libc::MAP_FAILED)
            .then(|| NonNull::new(addr.cast::<u8>()))
            .flatten()
        else {
            let error = std::io::Error::last_os_error();
            return Err(Fault::new("memory.map", format!("{size} bytes of memory: {error}")));
        };
        let own = Arc::new(Own { addr, len });
        // SAFETY: `own` keeps the bytes mapped.
        Ok(unsafe { Self::foreign(guest, size, addr, own) })
    }

    fn lost(&self) -> bool {
        match &self.backing {
            Backing::Mapped(mapping) => mapping.lost(),
            Backing::Foreign(_) => false,
        }
    }
}

/// The guest memory of one front end: an immutable snapshot, replaced as a whole when it changes.
#[derive(Clone, Default)]
pub struct MemoryMap {
    /// Sorted by guest address, without overlap.
    regions: Vec<Region>,
    /// Shadows of remote memory count as memory.
    remote: bool,
}

impl MemoryMap {
    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes of all regions.
    pub fn size(&self) -> u64 {
        self.regions
            .iter()
            .fold(0, |sum, region| sum.saturating_add(region.size))
    }

    /// Whether there is no memory at all.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// This map for somebody who keeps shadows of remote memory up to date. For everybody else there is no memory where
    /// they are: what they would find there is old, and what they would leave there is lost.
    #[must_use]
    pub fn with_shadows(&self) -> Self {
        Self {
            regions: self.regions.clone(),
            remote: true,
        }
    }

    /// Whether a driver may have put its rings or buffers into remote memory. ROM doesn't count: no driver has either there.
    pub fn needs_remote(&self) -> bool {
        self.regions
            .iter()
            .any(|region| region.remote.is_some() && region.writable)
    }

    /// This map with one more region.
    ///
    /// # Errors
    /// `memory.slots`, `memory.overlap`.
    pub fn with(&self, region: Region) -> Result<Self, Fault> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(Fault::new("memory.slots", format!("more than {MAX_REGIONS} regions")));
        }
        // Sizes and sums were checked when the regions were made; none wraps.
        let overlap = |a: u64, b: u64, a_size: u64, b_size: u64| a < b + b_size && b < a + a_size;
        for other in &self.regions {
            if overlap(region.guest, other.guest, region.size, other.size)
                || overlap(region.user, other.user, region.size, other.size)
            {
                return Err(Fault::new(
                    "memory.overlap",
                    format!(
                        "region at guest {:#x} user {:#x} size {:#x} overlaps the one at guest {:#x} user {:#x} \
                         size {:#x}",
                        region.guest, region.user, region.size, other.guest, other.user, other.size
                    ),
                ));
            }
        }
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|other| other.guest < region.guest);
        regions.insert(at, region);
        Ok(Self {
            regions,
            remote: self.remote,
        })
    }

    /// This map without the region that has exactly this place.
    ///
    /// # Errors
    /// `memory.unknown-region`.
    pub fn without(&self, guest: u64, size: u64, user: u64) -> Result<Self, Fault> {
        let at = self
            .regions
            .iter()
            .position(|region| region.guest == guest && region.size == size && region.user == user)
            .ok_or_else(|| {
                Fault::new(
                    "memory.unknown-region",
                    format!("no region at guest {guest:#x} user {user:#x} size {size:#x}"),
                )
            })?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self {
            regions,
            remote: self.remote,
        })
    }

    /// Whether any of the memory was taken away by its owner since it was mapped.
    pub fn lost(&self) -> bool {
        self.regions.iter().any(Region::lost)
    }

    #[inline]
    fn shows(&self, region: &Region) -> bool {
        self.remote || region.remote.is_none()
    }

    /// How to reach the memory of a guest address, when only a shadow of it is mapped.
    pub fn remote_at(&self, guest: u64) -> Option<&Arc<dyn RemoteMemory>> {
        self.find(guest, &mut 0)?.remote.as_ref()
    }

    /// The parts of some buffers of this map that lie in shadows, none longer than [`SHADOW_PIECE`].
    pub fn shadows(&self, buffers: &Buffers) -> Vec<ShadowPiece> {
        let mut pieces = Vec::new();
        let mut behind = 0;
        for iov in &buffers.iov {
            let start = behind;
            behind += iov.iov_len as u64;
            let address = iov.iov_base as u64;
            // Buffers are cut at the ends of regions, so the start says where all of it is.
            let found = self.regions.iter().find_map(|region| {
                let skip = address.checked_sub(region.host.as_ptr() as u64)?;
                let remote = region.remote.as_ref()?;
                (skip < region.size).then_some((region, remote, skip))
            });
            let Some((region, remote, skip)) = found else {
                continue;
            };
            let mut done = 0;
            while done < iov.iov_len {
                let len = (iov.iov_len - done).min(SHADOW_PIECE);
                let mut piece = Buffers::default();
                // SAFETY: done < iov_len, so this stays inside the buffer.
                if let Some(host) = NonNull::new(unsafe { iov.iov_base.cast::<u8>().add(done) }) {
                    piece.push(host, len);
                }
                pieces.push(ShadowPiece {
                    remote: Arc::clone(remote),
                    guest: region.guest + skip + done as u64,
                    writable: region.writable,
                    start: start + done as u64,
                    buffers: piece,
                });
                done += len;
            }
        }
        pieces
    }

    /// The guest addresses of some buffers of this map, as (first, bytes). For dirty logging.
    pub fn guest_ranges(&self, buffers: &Buffers, ranges: &mut Vec<(u64, u64)>) {
        for iov in &buffers.iov {
            self.guest_range(iov.iov_base as u64, iov.iov_len as u64, ranges);
        }
    }

    /// The guest address of one byte, as a range.
    pub fn guest_byte(&self, byte: &LastByte, ranges: &mut Vec<(u64, u64)>) {
        self.guest_range(byte.0.as_ptr() as u64, 1, ranges);
    }

    fn guest_range(&self, host: u64, len: u64, ranges: &mut Vec<(u64, u64)>) {
        // Buffers are cut at the ends of regions, so the start says where all of it is. Where two regions map the same
        // part of a file through one mapping (a guest's aliases of its low memory), it is dirty in both.
        for region in &self.regions {
            if let Some(skip) = host.checked_sub(region.host.as_ptr() as u64) {
                if skip < region.size {
                    ranges.push((region.guest + skip, len.min(region.size - skip)));
                }
            }
        }
    }

    /// The region that holds a guest address. `hint` remembers the last one: descriptors of a batch mostly lie close
    /// together.
    #[inline]
    fn find(&self, guest: u64, hint: &mut usize) -> Option<&Region> {
        if let Some(region) = self.regions.get(*hint) {
            if guest.wrapping_sub(region.guest) < region.size && self.shows(region) {
                return Some(region);
            }
        }
        let at = self
            .regions
            .partition_point(|region| region.guest <= guest)
            .checked_sub(1)?;
        let region = &self.regions[at];
        if guest - region.guest < region.size && self.shows(region) {
            *hint = at;
            Some(region)
        } else {
            None
        }
    }

    /// Appends the host memory of guest range `[guest, guest + len)` to `buffers`; false when part of it is not
    /// memory. A buffer may cross from one region into the next.
    #[inline]
    pub fn append(&self, guest: u64, len: u64, hint: &mut usize, buffers: &mut Buffers) -> bool {
        // Nearly every buffer lies in the region of the one before, as a whole.
        if let Some(region) = self.regions.get(*hint) {
            let skip = guest.wrapping_sub(region.guest);
            if skip < region.size && len.wrapping_sub(1) < region.size - skip && self.shows(region) {
                // SAFETY: skip < region.size, and the region is mapped as a whole.
                let host = unsafe { region.host.add(skip as usize) };
                buffers.push(host, len as usize);
                return true;
            }
        }
        self.append_across(guest, len, hint, buffers)
    }

    #[inline(never)]
    fn append_across(&self, mut guest: u64, mut len: u64, hint: &mut usize, buffers: &mut Buffers) -> bool {
        while len > 0 {
            let Some(region) = self.find(guest, hint) else {
                return false;
            };
            let skip = guest - region.guest;
            let take = len.min(region.size - skip);
            // SAFETY: skip < region.size, and the region is mapped as a whole.
            let host = unsafe { region.host.add(skip as usize) };
            buffers.push(host, take as usize);
            len -= take;
            if len > 0 {
                let Some(next) = guest.checked_add(take) else {
                    return false;
                };
                guest = next;
            }
        }
        true
    }

    /// The host memory of `[user, user + len)` in the front end's addresses, when it lies in one region.
    pub fn area_by_user(self: &Arc<Self>, user: u64, len: u64) -> Option<HostArea> {
        self.regions
            .iter()
            .find(|region| user.checked_sub(region.user).is_some_and(|skip| skip < region.size))
            .filter(|region| self.shows(region))
            .and_then(|region| self.area(region, user - region.user, len))
    }

    /// The host memory of guest range `[guest, guest + len)`, when it lies in one region.
    pub fn area_by_guest(self: &Arc<Self>, guest: u64, len: u64) -> Option<HostArea> {
        let region = self.find(guest, &mut 0)?;
        self.area(region, guest - region.guest, len)
    }

    /// As `area_by_guest`, without a share in the map: an indirect table is looked at for a moment only, and to count
    /// references would cost each request two locked operations on a line that all workers share.
    #[inline]
    pub fn table_by_guest(&self, guest: u64, len: u64, hint: &mut usize) -> Option<Table<'_>> {
        let region = self.find(guest, hint)?;
        let skip = guest - region.guest;
        if len > region.size - skip {
            return None;
        }
        // SAFETY: skip + len <= region.size.
        let ptr = unsafe { region.host.add(usize::try_from(skip).ok()?) };
        Some(Table {
            ptr,
            len: usize::try_from(len).ok()?,
            _map: PhantomData,
        })
    }

    /// Asks the CPU to fetch what a guest address names, because it will be read soon. Nothing happens when it isn't memory.
    #[inline]
    pub fn prefetch(&self, guest: u64, hint: &mut usize) {
        if let Some(region) = self.find(guest, hint) {
            // SAFETY: inside the region, as `find` says.
            let ptr = unsafe { region.host.add((guest - region.guest) as usize) };
            #[cfg(target_arch = "x86_64")]
            // SAFETY: every x86-64 CPU has the instruction, and it never faults.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(ptr.as_ptr().cast());
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = ptr;
        }
    }

    fn area(self: &Arc<Self>, region: &Region, skip: u64, len: u64) -> Option<HostArea> {
        // skip < region.size is the callers' find; the subtraction can't wrap.
        if len > region.size - skip {
            return None;
        }
        // SAFETY: skip + len <= region.size.
        let ptr = unsafe { region.host.add(usize::try_from(skip).ok()?) };
        Some(HostArea {
            ptr,
            len: usize::try_from(len).ok()?,
            keep: Arc::clone(self),
        })
    }
}

/// A piece of guest memory to be read as long as its map is at hand. Accesses are checked against its length.
pub struct Table<'a> {
    ptr: NonNull<u8>,
    len: usize,
    _map: PhantomData<&'a MemoryMap>,
}

impl Table<'_> {
    /// As [`HostArea::is_aligned`].
    #[inline]
    pub fn is_aligned(&self, align: usize) -> bool {
        (self.ptr.as_ptr() as usize).is_multiple_of(align)
    }

    /// The 64-bit little-endian value at `offset`, read once. The table must be 8-aligned.
    #[inline]
    pub fn load_u64(&self, offset: usize) -> u64 {
        assert!(
            offset + size_of::<u64>() <= self.len && self.is_aligned(size_of::<u64>()),
            "access at {offset} of a table of {}",
            self.len
        );
        // SAFETY: inside the table and aligned, just checked; the map that keeps the memory is borrowed.
        let field = unsafe { AtomicU64::from_ptr(self.ptr.as_ptr().add(offset).cast()) };
        u64::from_le(field.load(Ordering::Relaxed))
    }
}

/// A piece of guest memory with a fixed place, for ring areas. Accesses are checked against its length.
pub struct HostArea {
    ptr: NonNull<u8>,
    len: usize,
    keep: Arc<MemoryMap>,
}

// SAFETY: the memory is kept by `keep` and accessed by atomics or raw copies, never borrowed as a slice; another process
// accesses it at the same time anyway.
unsafe impl Send for HostArea {}
// SAFETY: as above.
unsafe impl Sync for HostArea {}

impl HostArea {
    /// Whether the area starts at a multiple of `align` in this process (and so on every host with pages >= align).
    pub fn is_aligned(&self, align: usize) -> bool {
        (self.ptr.as_ptr() as usize).is_multiple_of(align)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the area is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Checks place and alignment of an access. A failure here is a bug of ours (offsets are computed from the queue
    /// size), caught at the worker's boundary.
    #[inline]
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(
            offset + size_of::<T>() <= self.len,
            "access at {offset} of a ring area of {}",
            self.len
        );
        // SAFETY: inside the area, just checked.
        let ptr = unsafe { self.ptr.as_ptr().add(offset) };
        debug_assert!((ptr as usize).is_multiple_of(size_of::<T>()));
        ptr.cast()
    }

    /// The byte at `offset`.
    #[inline]
    pub fn u8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: `at` checked the place; bytes have no alignment. The memory lives as long as self.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }
    }

    /// The 64-bit field at `offset`, a multiple of 8 in an area that is 8-aligned.
    #[inline]
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        assert!(
            (self.ptr.as_ptr() as usize + offset).is_multiple_of(8),
            "unaligned access"
        );
        // SAFETY: `at` checked the place, the line above the alignment. The memory lives as long as self.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }
    }

    /// A part of this area. None when it isn't inside.
    pub fn part(&self, offset: usize, len: usize) -> Option<HostArea> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| HostArea {
            // SAFETY: offset <= end <= len.
            ptr: unsafe { self.ptr.add(offset) },
            len,
            keep: Arc::clone(&self.keep),
        })
    }

    /// Has the pages count as ours no more, until they are used again. All of the memory map that this is part of: not
    /// for guest memory.
    pub fn rest(&self) {
        for region in &self.keep.regions {
            if let Backing::Mapped(mapping) = &region.backing {
                mapping.rest();
            }
        }
    }

    /// Whether the memory was taken away by its owner.
    pub fn lost(&self) -> bool {
        self.keep.lost()
    }

    /// Its guest addresses, in the map that it was found in. For dirty logging.
    pub fn guest_ranges(&self, ranges: &mut Vec<(u64, u64)>) {
        self.keep.guest_range(self.ptr.as_ptr() as u64, self.len as u64, ranges);
    }

    /// The map that it was cut from.
    pub fn map(&self) -> &Arc<MemoryMap> {
        &self.keep
    }

    /// The 16-bit field at `offset`.
    #[inline]
    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `at` checked the place; ring areas are checked for alignment when a ring is made, offsets of 16-bit
        // fields are even. The memory lives as long as self.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }
    }

    /// The 32-bit field at `offset`.
    #[inline]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as for u16, with areas that are at least 4-aligned.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }
    }

    /// Copies `src` to `offset`. For areas that nobody else writes at the time (buffers of our own driver).
    #[inline]
    pub fn write(&self, offset: usize, src: &[u8]) {
        assert!(
            offset.checked_add(src.len()).is_some_and(|end| end <= self.len),
            "copy of {} to {offset} of {}",
            src.len(),
            self.len
        );
        // SAFETY: inside the area, just checked; src is a borrow of other memory.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), self.ptr.as_ptr().add(offset), src.len()) };
    }

    /// Copies from `offset` to `dst`.
    #[inline]
    pub fn read(&self, offset: usize, dst: &mut [u8]) {
        assert!(
            offset.checked_add(dst.len()).is_some_and(|end| end <= self.len),
            "copy of {} from {offset} of {}",
            dst.len(),
            self.len
        );
        // SAFETY: as in write.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr.as_ptr().add(offset), dst.as_mut_ptr(), dst.len()) };
    }

    /// The 64-bit little-endian value at `offset`, read once.
    #[inline]
    pub fn load_u64(&self, offset: usize) -> u64 {
        // SAFETY: as for u16, with areas that are 16-aligned (descriptor tables).
        let field = unsafe { AtomicU64::from_ptr(self.at(offset)) };
        u64::from_le(field.load(Ordering::Relaxed))
    }
}

/// The buffers of one request in one direction: a scatter list in host memory, with its total length.
#[derive(Default)]
pub struct Buffers {
    iov: Vec<libc::iovec>,
    len: u64,
}

// SAFETY: iovecs are plain pairs of pointer and length; what they point to is shared memory accessed by raw copies.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Forgets the buffers, keeps the allocation.
    #[inline]
    pub fn clear(&mut self) {
        self.iov.clear();
        self.len = 0;
    }

    #[inline]
    fn push(&mut self, ptr: NonNull<u8>, len: usize) {
        self.iov.push(libc::iovec {
            iov_base: ptr.as_ptr().cast(),
            iov_len: len,
        });
        self.len += len as u64;
    }

    /// Total length in bytes.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The scatter list, for readv and writev. The pointers are valid while the memory map is.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iov
    }

    /// Cuts the first `n` bytes off.
    pub fn trim_front(&mut self, n: u64) {
        let mut left = n.min(self.len);
        self.len -= left;
        let mut gone = 0;
        for iov in &mut self.iov {
            if (iov.iov_len as u64) > left {
                // SAFETY: left < iov_len, so the pointer stays inside the same buffer.
                iov.iov_base = unsafe { iov.iov_base.cast::<u8>().add(left as usize).cast() };
                iov.iov_len -= left as usize;
                break;
            }
            left -= iov.iov_len as u64;
            gone += 1;
        }
        if gone > 0 {
            self.iov.drain(..gone);
        }
    }

    /// Cuts the last `n` bytes off.
    pub fn trim_back(&mut self, n: u64) {
        let mut left = n.min(self.len);
        self.len -= left;
        while let Some(iov) = self.iov.last_mut() {
            if (iov.iov_len as u64) > left {
                iov.iov_len -= left as usize;
                break;
            }
            left -= iov.iov_len as u64;
            self.iov.pop();
        }
    }

    /// Copies from the start of the buffers; the number of bytes copied (less than asked when they are shorter).
    #[inline]
    pub fn read(&self, dst: &mut [u8]) -> usize {
        let mut done = 0;
        for iov in &self.iov {
            if done == dst.len() {
                break;
            }
            let n = iov.iov_len.min(dst.len() - done);
            // SAFETY: both ranges are valid for n bytes; dst is ours alone, so they can't overlap. The guest may
            // write the source meanwhile: any mix of old and new bytes is a valid u8 content.
            unsafe {
                std::ptr::copy_nonoverlapping(iov.iov_base.cast::<u8>(), dst[done..].as_mut_ptr(), n);
            }
            done += n;
        }
        done
    }

    /// Copies to the start of the buffers; the number of bytes copied.
    #[inline]
    pub fn write(&self, src: &[u8]) -> usize {
        let mut done = 0;
        for iov in &self.iov {
            if done == src.len() {
                break;
            }
            let n = iov.iov_len.min(src.len() - done);
            // SAFETY: as in read, in the other direction.
            unsafe {
                std::ptr::copy_nonoverlapping(src[done..].as_ptr(), iov.iov_base.cast::<u8>(), n);
            }
            done += n;
        }
        done
    }

    /// The last byte: its address, and the buffers without it. None when there is none.
    #[inline]
    pub fn pop_last_byte(&mut self) -> Option<LastByte> {
        let last = self.iov.last()?;
        // Buffers of length 0 are never pushed, so the last one has a last byte.
        // SAFETY: iov_len >= 1, so this stays inside the buffer.
        let ptr = unsafe { last.iov_base.cast::<u8>().add(last.iov_len - 1) };
        self.trim_back(1);
        NonNull::new(ptr).map(LastByte)
    }

    /// The first `limit` bytes of the buffers, piece by piece: (start, length).
    fn pieces(&self, limit: u64) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        let mut left = limit;
        self.iov.iter().map_while(move |iov| {
            let n = left.min(iov.iov_len as u64);
            left -= n;
            (n > 0).then_some((iov.iov_base.cast(), n as usize))
        })
    }

    /// Copies up to `limit` bytes from raw storage at `src` to the start of the buffers.
    ///
    /// # Safety
    /// `src` must be valid for reading as many bytes as `limit` and the buffers have.
    pub unsafe fn copy_in(&self, mut src: *const u8, limit: u64) {
        for (dst, n) in self.pieces(limit) {
            // SAFETY: the caller vouches for src, the map for the buffer. They may overlap only if a front end
            // shares its memory with our storage, which it can't name.
            unsafe {
                std::ptr::copy_nonoverlapping(src, dst, n);
                src = src.add(n);
            }
        }
    }

    /// Copies up to `limit` bytes from the start of the buffers to raw storage at `dst`.
    ///
    /// # Safety
    /// `dst` must be valid for writing as many bytes as `limit` and the buffers have.
    pub unsafe fn copy_out(&self, mut dst: *mut u8, limit: u64) {
        for (src, n) in self.pieces(limit) {
            // SAFETY: as in copy_in.
            unsafe {
                std::ptr::copy_nonoverlapping(src.cast_const(), dst, n);
                dst = dst.add(n);
            }
        }
    }

    /// Fills up to `limit` bytes from the start of the buffers with zeroes.
    pub fn zero(&self, limit: u64) {
        for (dst, n) in self.pieces(limit) {
            // SAFETY: the map keeps the buffer valid for its length.
            unsafe { std::ptr::write_bytes(dst, 0, n) };
        }
    }
}

/// Most bytes of a [`ShadowPiece`].
pub const SHADOW_PIECE: usize = 128 << 10;

/// A part of a request's buffers that lies in the shadow of remote memory. Like the buffers, it is of use only as long as
/// the map that it was cut from.
pub struct ShadowPiece {
    remote: Arc<dyn RemoteMemory>,
    guest: u64,
    writable: bool,
    /// Bytes of the buffers before this piece.
    start: u64,
    buffers: Buffers,
}

impl ShadowPiece {
    /// Makes the shadow what the memory is.
    ///
    /// # Errors
    /// `dma.*`.
    pub fn fetch(&self, cancelled: &AtomicBool) -> Result<(), Fault> {
        let mut bytes = vec![0; self.buffers.len() as usize];
        self.remote.read_unless(self.guest, &mut bytes, cancelled)?;
        self.buffers.write(&bytes);
        Ok(())
    }

    /// Makes the memory what the shadow is in the bytes from `from` up to `to` of the buffers that this is a piece of,
    /// unless it is read-only.
    ///
    /// # Errors
    /// `dma.*`.
    pub fn store(&self, from: u64, to: u64) -> Result<(), Fault> {
        let end = self.start + self.buffers.len();
        let (from, to) = (from.max(self.start), to.min(end));
        if !self.writable || from >= to {
            return Ok(());
        }
        let skip = (from - self.start) as usize;
        let mut bytes = vec![0; (to - self.start) as usize];
        self.buffers.read(&mut bytes);
        self.remote.write(self.guest + skip as u64, &bytes[skip..])
    }

    /// Forgets what the shadow holds.
    pub fn clear(&self) {
        self.buffers.zero(self.buffers.len());
    }
}

/// One byte of guest memory: where a device puts its status.
pub struct LastByte(NonNull<u8>);

// SAFETY: as for Buffers.
unsafe impl Send for LastByte {}

impl LastByte {
    /// Writes it.
    #[inline]
    pub fn set(&self, value: u8) {
        // SAFETY: made by pop_last_byte from a valid buffer; the runner keeps the map while the request is in
        // flight.
        unsafe { self.0.as_ptr().write_volatile(value) }
    }
}
