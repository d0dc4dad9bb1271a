// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the master's memory appears in the shared memory region (virtio-vhost-user v5, "Shared Memory layout").
//!
//! The text puts region k at SIZE0 + ... + SIZE(k-1), the implementations there were put its bytes a further `mmap_offset`
//! behind that, and count that into SIZE. Both agree where `mmap_offset` is 0, so the offset in the message is rewritten to
//! 0, and every driver finds the region. Only memory that can't be moved (a RAM file that the BAR shows as it is) keeps an
//! offset: the distance from where the text would have the region.

use crate::error::Fault;

/// Most regions of a memory table (the baseline of the vhost-user protocol; more come by ADD_MEM_REG, which isn't there).
pub const MAX_REGIONS: usize = 8;
/// Regions begin and end at pages: what maps them maps pages.
pub const PAGE: u64 = 4096;

/// A file, whatever its name or descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

/// Memory as the master describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its guest's physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
    /// Its file.
    pub file: FileId,
}

/// The file that the first bytes of the region always show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// The file.
    pub file: FileId,
    /// Bytes of it.
    pub len: u64,
}

/// The shared memory region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Bytes.
    pub size: u64,
    /// What can't be moved.
    pub direct: Option<Direct>,
}

/// Where something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// In the shared memory region.
    pub offset: u64,
    /// Behind the end of what comes before: the `mmap_offset` that the driver is told.
    pub gap: u64,
}

impl Place {
    /// Where the next one may begin. No overflow: [`Window::place`] has compared it with the region's size.
    fn end(&self, size: u64) -> u64 {
        self.offset + size
    }
}

impl Window {
    /// Places memory at `cursor` or behind it. `last`: nothing comes after it, so it may end anywhere.
    fn place(&self, cursor: u64, wanted: &Wanted, last: bool) -> Result<Place, Fault> {
        let Wanted { size, mmap_offset, .. } = *wanted;
        let too_large = || {
            Fault::new(
                "shared-memory.size",
                format!(
                    "{size:#x} bytes behind {cursor:#x} don't fit into a shared memory region of {:#x} bytes",
                    self.size
                ),
            )
        };
        if size == 0 {
            return Err(Fault::new("memory.region-size", "a region of 0 bytes"));
        }
        if mmap_offset % PAGE != 0 || (size % PAGE != 0 && !last) {
            return Err(Fault::new(
                "shared-memory.alignment",
                format!("{size:#x} bytes at offset {mmap_offset:#x} of their file are no whole pages"),
            ));
        }
        let offset = match &self.direct {
            Some(direct) if direct.file == wanted.file => {
                let inside = mmap_offset.checked_add(size).is_some_and(|end| end <= direct.len);
                if !inside || mmap_offset < cursor {
                    return Err(Fault::new(
                        "shared-memory.order",
                        format!(
                            "{size:#x} bytes at offset {mmap_offset:#x} of the RAM file can't be shown behind \
                             {cursor:#x}, nor anywhere else"
                        ),
                    ));
                }
                mmap_offset
            }
            Some(direct) => cursor.max(direct.len.next_multiple_of(PAGE)),
            None => cursor,
        };
        match offset.checked_add(size) {
            Some(end) if end <= self.size => Ok(Place {
                offset,
                gap: offset - cursor,
            }),
            _ => Err(too_large()),
        }
    }

    /// Places the regions of a memory table, in its order.
    ///
    /// # Errors
    /// `memory.slots`, `memory.region-size`, `memory.region-wrap`, `memory.overlap`, `shared-memory.alignment`,
    /// `shared-memory.order`, `shared-memory.size`.
    pub fn table(&self, regions: &[Wanted]) -> Result<Vec<Place>, Fault> {
        if regions.len() > MAX_REGIONS {
            return Err(Fault::new(
                "memory.slots",
                format!("{} regions; {MAX_REGIONS} are possible", regions.len()),
            ));
        }
        let mut places = Vec::with_capacity(regions.len());
        let mut cursor = 0;
        for (index, region) in regions.iter().enumerate() {
            let Some(end) = region.guest.checked_add(region.size) else {
                return Err(Fault::new(
                    "memory.region-wrap",
                    format!("{:#x} bytes at {:#x} wrap around 64 bits", region.size, region.guest),
                ));
            };
            // Those before have been checked: no sum wraps.
            let other = regions[..index]
                .iter()
                .find(|other| region.guest < other.guest + other.size && other.guest < end);
            if let Some(other) = other {
                return Err(Fault::new(
                    "memory.overlap",
                    format!(
                        "region at {:#x} of {:#x} bytes overlaps the one at {:#x} of {:#x} bytes",
                        region.guest, region.size, other.guest, other.size
                    ),
                ));
            }
            let place = self.place(cursor, region, false)?;
            cursor = place.end(region.size);
            places.push(place);
        }
        Ok(places)
    }

    /// Places the log behind memory that ends at `cursor`.
    ///
    /// # Errors
    /// As for `table`.
    pub fn log(&self, cursor: u64, log: &Wanted) -> Result<Place, Fault> {
        self.place(cursor, log, true)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const FILE: FileId = FileId { dev: 1, ino: 2 };
    const OTHER: FileId = FileId { dev: 1, ino: 3 };

    fn wanted(guest: u64, size: u64, mmap_offset: u64) -> Wanted {
        Wanted {
            guest,
            size,
            mmap_offset,
            file: FILE,
        }
    }

    #[test]
    fn regions_follow_each_other_in_the_order_of_the_table() {
        let window = Window {
            size: 1 << 20,
            direct: None,
        };
        let table = [wanted(0x10_0000, 0x3000, 0x10_0000), wanted(0, 0x1000, 0)];
        let places = window.table(&table).unwrap();
        assert_eq!(places, [Place { offset: 0, gap: 0 }, Place { offset: 0x3000, gap: 0 }]);
        let log = window.log(0x4000, &wanted(0, 100, 0)).unwrap();
        assert_eq!(log, Place { offset: 0x4000, gap: 0 });
    }

    #[test]
    fn a_ram_file_stays_where_it_is() {
        let direct = Some(Direct {
            file: FILE,
            len: 0x10_0000,
        });
        let window = Window { size: 1 << 21, direct };
        // The hole below 1 MiB that every PC has.
        let table = [wanted(0, 0xa_0000, 0), wanted(0xc_0000, 0x4_0000, 0xc_0000)];
        let places = window.table(&table).unwrap();
        assert_eq!(
            places[1],
            Place {
                offset: 0xc_0000,
                gap: 0x2_0000
            }
        );
        let log = Wanted {
            file: OTHER,
            ..wanted(0, 8, 0)
        };
        assert_eq!(
            window.log(0x10_0000, &log).unwrap(),
            Place {
                offset: 0x10_0000,
                gap: 0
            }
        );
        assert_eq!(
            window.log(0xb_0000, &log).unwrap(),
            Place {
                offset: 0x10_0000,
                gap: 0x5_0000
            }
        );
        let backwards = [table[1], table[0]];
        assert_eq!(window.table(&backwards).unwrap_err().rule, "shared-memory.order");
        let beyond = [wanted(0, 0x2000, 0xf_f000)];
        assert_eq!(window.table(&beyond).unwrap_err().rule, "shared-memory.order");
    }

    #[test]
    fn what_cannot_be_placed_has_a_rule() {
        let window = Window {
            size: 0x4000,
            direct: None,
        };
        let rule = |table: &[Wanted]| window.table(table).unwrap_err().rule;
        assert_eq!(rule(&[wanted(0, 0, 0)]), "memory.region-size");
        assert_eq!(rule(&[wanted(0, 0x1001, 0)]), "shared-memory.alignment");
        assert_eq!(rule(&[wanted(0, 0x1000, 0x10)]), "shared-memory.alignment");
        assert_eq!(rule(&[wanted(0, 0x5000, 0)]), "shared-memory.size");
        assert_eq!(rule(&[wanted(u64::MAX - 0xfff, 0x2000, 0)]), "memory.region-wrap");
        assert_eq!(rule(&[wanted(0, u64::MAX - 0xfff, 0)]), "shared-memory.size");
        let pair = [wanted(0, 0x2000, 0), wanted(0x1000, 0x2000, 0)];
        assert_eq!(rule(&pair), "memory.overlap");
        assert_eq!(rule(&[wanted(0, 0x1000, 0); 9]), "memory.slots");
    }
}
