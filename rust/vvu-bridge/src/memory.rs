// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA memory of a process: pages whose physical addresses are known.
//!
//! The device works with guest-physical addresses, and /proc/self/pagemap tells a process with CAP_SYS_ADMIN what they are.
//! Nothing promises that they stay. A page of hugetlbfs is only moved by memory hot-unplug and by large contiguous
//! allocations (CMA) that want its place. A locked 4 KiB page is also moved by compaction, unless
//! vm.compact_unevictable_allowed is 0, which is therefore set when there is no huge page; by automatic NUMA balancing; and by
//! khugepaged, which is told not to. [`Dma::has_moved`] finds out, after the fact: the bridge asks once a second and resets the
//! device when it happens.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock};

use crate::error::{Context, Error, Result};
use crate::log;
use crate::sys::{page_size, DmaPages, HUGE_PAGE};

const PAGEMAP: &str = "/proc/self/pagemap";
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
const COMPACT_UNEVICTABLE: &str = "/proc/sys/vm/compact_unevictable_allowed";
const HUGE_POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Pages and their physical addresses.
#[derive(Debug)]
pub struct Dma {
    pages: DmaPages,
    /// Of each page.
    addresses: RwLock<Vec<u64>>,
    page: usize,
    /// The kernel is asked where the pages are. Not: somebody said so, and they stay.
    asked: bool,
}

impl Dma {
    /// Pages of a known place: `addresses[i]` is where bytes `i * page` to `(i + 1) * page` are.
    pub fn new(pages: DmaPages, addresses: Vec<u64>, page: usize) -> Self {
        Self {
            pages,
            addresses: RwLock::new(addresses),
            page,
            asked: false,
        }
    }

    /// A huge page if there can be one, otherwise locked small pages.
    ///
    /// # Errors
    /// No memory, or no right to know where it is.
    pub fn allocate(length: usize) -> Result<Self> {
        let pages = match huge_page() {
            Ok(pages) if length <= HUGE_PAGE => pages,
            other => {
                if let Err(error) = other {
                    log::line(format_args!(
                        "dma: no huge page ({error}), using locked pages of {} bytes",
                        page_size()
                    ));
                }
                hold_still();
                DmaPages::small(length).context(|| format!("{length} bytes of locked memory"))?
            }
        };
        let addresses = physical_addresses(&pages)?;
        let first = addresses.first().copied().unwrap_or(0);
        let dma = Self {
            asked: true,
            ..Self::new(pages, addresses, page_size())
        };
        let size = if dma.is_huge() { HUGE_PAGE } else { page_size() };
        log::line(format_args!(
            "dma: {} bytes in pages of {size} from {first:#x}",
            dma.pages.length()
        ));
        Ok(dma)
    }

    /// The memory itself.
    pub fn pages(&self) -> &DmaPages {
        &self.pages
    }

    fn is_huge(&self) -> bool {
        self.pages.length() >= HUGE_PAGE
    }

    /// Where an offset is for the device.
    pub fn physical(&self, offset: usize) -> u64 {
        let addresses = self.addresses.read().unwrap_or_else(PoisonError::into_inner);
        addresses[offset / self.page] + (offset % self.page) as u64
    }

    /// Address and length of the one or two pieces of physical memory that a buffer is made of; none may touch three pages.
    pub fn segments(&self, offset: usize, length: usize) -> ((u64, usize), Option<(u64, usize)>) {
        let start = self.physical(offset);
        let here = (self.page - offset % self.page).min(length);
        if here == length {
            return ((start, length), None);
        }
        let rest = self.physical(offset + here);
        if rest == start + here as u64 {
            ((start, length), None)
        } else {
            ((start, here), Some((rest, length - here)))
        }
    }

    /// Whether a page isn't where it was. Should never be; see the head of this file.
    pub fn has_moved(&self) -> bool {
        let known = self.addresses.read().unwrap_or_else(PoisonError::into_inner);
        self.asked && physical_addresses(&self.pages).is_ok_and(|addresses| addresses != *known)
    }

    /// Looks up again where the pages are. Only while the device is reset.
    ///
    /// # Errors
    /// As for [`Dma::allocate`].
    pub fn look_up(&self) -> Result<()> {
        if self.asked {
            *self.addresses.write().unwrap_or_else(PoisonError::into_inner) = physical_addresses(&self.pages)?;
        }
        Ok(())
    }
}

/// A huge page from the pool, to which one is added when none is free. It stays in the pool for the next start.
fn huge_page() -> io::Result<DmaPages> {
    DmaPages::huge().or_else(|error| {
        let count = read_number(&format!("{HUGE_POOL}/nr_hugepages")).map_err(|_| error)?;
        fs::write(format!("{HUGE_POOL}/nr_hugepages"), (count + 1).to_string())?;
        DmaPages::huge()
    })
}

fn read_number(path: &str) -> io::Result<u64> {
    fs::read_to_string(path)?
        .trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Asks the kernel to leave locked pages where they are.
fn hold_still() {
    if read_number(COMPACT_UNEVICTABLE).is_ok_and(|allowed| allowed == 0) {
        return;
    }
    // Kernels without compaction don't have the file.
    match fs::write(COMPACT_UNEVICTABLE, "0") {
        Ok(()) => log::line("dma: vm.compact_unevictable_allowed is 0 from now on"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => log::line(format_args!(
            "dma: {COMPACT_UNEVICTABLE}: {error}; compaction could move pages in use"
        )),
    }
}

fn physical_addresses(pages: &DmaPages) -> Result<Vec<u64>> {
    let page = page_size();
    let file = File::open(PAGEMAP).context(|| PAGEMAP.into())?;
    let mut entries = vec![0; pages.length() / page * 8];
    file.read_exact_at(&mut entries, (pages.address() / page * 8) as u64)
        .context(|| PAGEMAP.into())?;
    entries
        .chunks_exact(8)
        .map(|entry| {
            let entry = crate::message::u64_at(entry, 0).unwrap_or(0);
            // Without the capability frames read as 0, which isn't an error for the kernel.
            match entry & FRAME {
                _ if entry & PRESENT == 0 => Err(Error::Setup(format!("{PAGEMAP}: a locked page is not there"))),
                0 => Err(Error::Setup(format!(
                    "{PAGEMAP} shows no page frames: this needs root (CAP_SYS_ADMIN)"
                ))),
                frame => Ok(frame * page as u64),
            }
        })
        .collect()
}
