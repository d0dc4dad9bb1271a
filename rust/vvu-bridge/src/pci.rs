// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space: where the virtio structures are. Bytes in, places out.

use crate::error::{Error, Result};
use crate::proxy::Window;
use crate::registers::{common, config};

const STATUS: usize = 6;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES: usize = 0x34;
const CAP_VENDOR: u8 = 9;
/// Id of the MSI-X capability.
pub const CAP_MSIX: u8 = 0x11;
/// As many as fit in 192 bytes.
const MAX_CAPABILITIES: usize = 48;
const MAX_BAR: u8 = 5;
/// Far more than 65536 queues with a page each would be of use to; a bound for the mapping.
const MAX_NOTIFY: u64 = 512 << 20;

const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_SHARED_MEMORY: u8 = 8;

/// A structure in a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the BAR.
    pub bar: u8,
    /// Where it begins.
    pub offset: u64,
    /// Its size.
    pub length: u64,
}

/// The structures of a virtio-vhost-user function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Common configuration.
    pub common: Place,
    /// Notifications.
    pub notify: Place,
    /// What queue_notify_off is multiplied by.
    pub notify_multiplier: u32,
    /// ISR status.
    pub isr: Place,
    /// Device configuration.
    pub device: Place,
    /// Shared memory 0.
    pub shared_memory: Place,
}

impl Layout {
    /// The shared memory as part of its BAR's file.
    pub const fn window(&self) -> Window {
        Window {
            offset: self.shared_memory.offset,
            length: self.shared_memory.length,
        }
    }
}

/// Offsets and ids of the capabilities.
pub fn capabilities(space: &[u8]) -> Vec<(usize, u8)> {
    let mut found = Vec::new();
    if space.get(STATUS).is_none_or(|status| status & STATUS_CAPABILITIES == 0) {
        return found;
    }
    let mut next = space.get(CAPABILITIES).copied().unwrap_or(0);
    // A list may be a loop.
    while next >= 0x40 && found.len() < MAX_CAPABILITIES {
        let at = usize::from(next & !3);
        let Some(&[id, after]) = space.get(at..at + 2).and_then(|bytes| <&[u8; 2]>::try_from(bytes).ok()) else {
            break;
        };
        found.push((at, id));
        next = after;
    }
    found
}

/// Finds the structures. `bar_length` gives the size of a memory BAR, None for one that isn't there.
///
/// # Errors
/// What is missing or impossible.
pub fn layout(space: &[u8], bar_length: impl Fn(u8) -> Option<u64>) -> Result<Layout> {
    let (mut common, mut notify, mut isr, mut device, mut shared_memory) = (None, None, None, None, None);
    let mut multiplier = 0;
    for (at, id) in capabilities(space) {
        if id != CAP_VENDOR {
            continue;
        }
        let byte = |field: usize| space.get(at + field).copied().unwrap_or(0);
        let word = |field: usize| crate::message::u32_at(space, at + field).unwrap_or(0);
        let (size, kind, bar, shmid) = (byte(2), byte(3), byte(4), byte(5));
        if size < 16 || bar > MAX_BAR {
            // Reserved numbers of BARs are to be ignored.
            continue;
        }
        let mut place = Place {
            bar,
            offset: word(8).into(),
            length: word(12).into(),
        };
        // The first of each type is the device's favourite.
        match kind {
            TYPE_COMMON if common.is_none() => common = Some(place),
            TYPE_NOTIFY if notify.is_none() && size >= 20 => {
                multiplier = word(16);
                notify = Some(place);
            }
            TYPE_ISR if isr.is_none() => isr = Some(place),
            TYPE_DEVICE if device.is_none() => device = Some(place),
            TYPE_SHARED_MEMORY if shmid == 0 && shared_memory.is_none() && size >= 24 => {
                place.offset |= u64::from(word(16)) << 32;
                place.length |= u64::from(word(20)) << 32;
                shared_memory = Some(place);
            }
            _ => {}
        }
    }
    let check = |name: &str, place: Option<Place>, least: u64, align: u64| {
        let place = place.ok_or_else(|| Error::Setup(format!("the function has no {name}")))?;
        let bar = bar_length(place.bar)
            .ok_or_else(|| Error::Setup(format!("{name}: BAR {} is no memory of this function", place.bar)))?;
        let fits = place.offset.checked_add(place.length).is_some_and(|end| end <= bar);
        if fits && place.length >= least && place.offset % align == 0 {
            Ok(place)
        } else {
            Err(Error::Setup(format!(
                "{name}: offset {:#x}, length {:#x} in BAR {} of {bar:#x} bytes is not possible",
                place.offset, place.length, place.bar
            )))
        }
    };
    let page = 4096;
    let layout = Layout {
        common: check("common configuration", common, common::LENGTH as u64, 4)?,
        notify: check("notification structure", notify, 2, 2)?,
        notify_multiplier: multiplier,
        isr: check("ISR status", isr, 1, 1)?,
        device: check("device configuration", device, config::LENGTH as u64, 4)?,
        shared_memory: check("shared memory region 0", shared_memory, page, page)?,
    };
    if layout.notify.length > MAX_NOTIFY {
        return Err(Error::Setup("notification structure: too large".into()));
    }
    // Either all queues share an address, or each has one that a 16-bit store can go to.
    if multiplier % 2 != 0 {
        return Err(Error::Setup(format!(
            "notification structure: multiplier {multiplier} is odd"
        )));
    }
    Ok(layout)
}
