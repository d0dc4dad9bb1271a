// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Device parts (virtio 1.4, 2.13.6): what of a member's registers goes to another host.
//!
//! No part carries the position in a ring. A stopped device has used all buffers that it took, in a split ring that makes the
//! used index the position; a packed ring has nothing of the kind, so a queue with one can't be set.

use super::{feature, Member, Queue, Registers, NO_VECTOR};
use crate::ring::split::RingAddresses;
use crate::ring::MAX_QUEUE_SIZE;

/// Bytes before a part's value.
pub const HEADER: usize = 16;

const DEV_FEATURES: u16 = 0x100;
const DRV_FEATURES: u16 = 0x101;
const PCI_COMMON_CFG: u16 = 0x102;
const DEVICE_STATUS: u16 = 0x103;
const VQ_CFG: u16 = 0x104;
const VQ_NOTIFY_CFG: u16 = 0x105;
const OPTIONAL: u8 = 1;

/// Fields of struct virtio_pci_common_cfg that a driver writes and that belong to no queue: first byte, bytes.
const COMMON_STATE: [(u32, usize); 4] = [(0, 4), (8, 4), (16, 2), (22, 2)];

/// A part: what it is of, and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// DEV_FEATURES, ….
    pub part_type: u16,
    /// Bit 0: a device may ignore it.
    pub flags: u8,
    /// Which of several.
    pub selector: [u8; 8],
    /// Little-endian.
    pub value: Vec<u8>,
}

/// What selects a part: its type and its selector.
pub type Selector = (u16, [u8; 8]);

impl Part {
    fn new(part_type: u16, selector: u64, value: &[u8]) -> Self {
        Self {
            part_type,
            flags: if part_type == DEV_FEATURES { OPTIONAL } else { 0 },
            selector: selector.to_le_bytes(),
            value: value.to_vec(),
        }
    }

    /// Its header.
    pub fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..2].copy_from_slice(&self.part_type.to_le_bytes());
        header[2] = self.flags;
        header[4..12].copy_from_slice(&self.selector);
        // Values are a few dozen bytes.
        header[12..].copy_from_slice(&(self.value.len() as u32).to_le_bytes());
        header
    }

    /// The part at the start of `bytes`, and what is behind it. None: it isn't there as a whole.
    pub fn parse(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (header, rest) = bytes.split_at_checked(HEADER)?;
        let mut selector = [0; 8];
        selector.copy_from_slice(&header[4..12]);
        let len = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
        let (value, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
        let part = Self {
            part_type: u16::from_le_bytes([header[0], header[1]]),
            flags: header[2],
            selector,
            value: value.to_vec(),
        };
        Some((part, rest))
    }

    fn index(&self) -> u64 {
        u64::from_le_bytes(self.selector)
    }

    /// The value, when it has exactly this size.
    fn sized<const N: usize>(&self) -> Option<[u8; N]> {
        self.value.as_slice().try_into().ok()
    }
}

/// Queue registers to be set.
#[derive(Clone, Copy)]
struct VqCfg {
    size: u16,
    vector: u16,
    enabled: bool,
    addresses: RingAddresses,
}

impl VqCfg {
    fn value(queue: &Queue) -> [u8; 32] {
        let addresses = queue.addresses.unwrap_or_default();
        let mut value = [0; 32];
        value[..2].copy_from_slice(&queue.size.to_le_bytes());
        value[2..4].copy_from_slice(&queue.vector.to_le_bytes());
        value[4..6].copy_from_slice(&u16::from(queue.active).to_le_bytes());
        value[8..16].copy_from_slice(&addresses.desc.to_le_bytes());
        value[16..24].copy_from_slice(&addresses.driver.to_le_bytes());
        value[24..].copy_from_slice(&addresses.device.to_le_bytes());
        value
    }

    fn parse(value: &[u8; 32]) -> Self {
        let half = |at: usize| u16::from_le_bytes([value[at], value[at + 1]]);
        let long = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&value[at..at + 8]);
            u64::from_le_bytes(word)
        };
        Self {
            size: half(0),
            vector: half(2),
            enabled: half(4) != 0,
            addresses: RingAddresses {
                desc: long(8),
                driver: long(16),
                device: long(24),
            },
        }
    }
}

/// Why parts can't be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetError {
    /// The device isn't stopped.
    Running,
    /// A part is wrong, or not for this device.
    Invalid(&'static str),
}

impl Member {
    /// All parts, in the order in which they have to be set.
    pub fn parts(&self) -> Vec<Part> {
        let mut registers = self.lock();
        let offered = if self.legacy() {
            self.function_features(&registers) | self.legacy_features(&registers)
        } else {
            self.function_features(&registers)
        };
        let common = self.common(&mut registers);
        let mut parts = vec![
            Part::new(DEV_FEATURES, 0, &offered.to_le_bytes()),
            Part::new(DRV_FEATURES, 0, &registers.driver_features.to_le_bytes()),
        ];
        for (offset, size) in COMMON_STATE {
            let start = offset as usize;
            parts.push(Part::new(
                PCI_COMMON_CFG,
                u64::from(offset),
                &common[start..start + size],
            ));
        }
        parts.push(Part::new(DEVICE_STATUS, 0, &[registers.status | self.broken_bit()]));
        for (index, queue) in registers.queues.iter().enumerate() {
            parts.push(Part::new(VQ_CFG, index as u64, &VqCfg::value(queue)));
        }
        for index in 0..registers.queues.len() {
            parts.push(Part::new(VQ_NOTIFY_CFG, index as u64, &notify_cfg(index)));
        }
        parts
    }

    /// Sets parts of a stopped device. All or none: nothing has changed after an error. The rings start with `resume_device`.
    ///
    /// # Errors
    /// [`SetError`].
    pub fn set_parts(&self, parts: &[Part]) -> std::result::Result<(), SetError> {
        let mut registers = self.lock();
        let stopping = registers
            .queues
            .iter()
            .any(|queue| !matches!(queue.run, super::Run::Stopped));
        if !registers.stopped || stopping || registers.resetting.is_some() {
            return Err(SetError::Running);
        }
        let changes = self.check_parts(&registers, parts)?;
        // Checked as a whole; from here on nothing fails.
        if let Some(features) = changes.features {
            registers.driver_features = features;
            registers.features_written = true;
        }
        for (offset, value) in changes.common {
            match offset {
                0 => registers.device_feature_select = value,
                8 => registers.driver_feature_select = value,
                16 => registers.config_vector = value as u16,
                _ => registers.queue_select = value as u16,
            }
        }
        let features = registers.driver_features;
        for (index, vq) in changes.queues {
            let Some(queue) = registers.queues.get_mut(index) else {
                continue;
            };
            queue.size = vq.size;
            queue.vector = vq.vector;
            queue.active = vq.enabled;
            queue.addresses = (vq.addresses != RingAddresses::default()).then_some(vq.addresses);
            queue.position = None;
            queue.from_used = vq.enabled;
            // A legacy driver may be using it without DRIVER_OK, which no part says.
            queue.notified = vq.enabled;
            queue.by_pfn = vq.enabled && features & feature::VERSION_1 == 0;
        }
        if let Some(status) = changes.status {
            self.set_status_register(&mut registers, status & !super::status::NEEDS_RESET);
        }
        Ok(())
    }

    fn check_parts(&self, registers: &Registers, parts: &[Part]) -> std::result::Result<Changes, SetError> {
        use SetError::Invalid;
        let mut changes = Changes::default();
        let mut offered = self.function_features(registers);
        if self.legacy() {
            offered |= self.legacy_features(registers);
        }
        for part in parts {
            match part.part_type {
                DEV_FEATURES => {
                    let value = part
                        .sized()
                        .map(u64::from_le_bytes)
                        .ok_or(Invalid("DEV_FEATURES size"))?;
                    if value & !offered != 0 {
                        return Err(Invalid("DEV_FEATURES: not all of them are offered here"));
                    }
                }
                DRV_FEATURES => {
                    let value = part
                        .sized()
                        .map(u64::from_le_bytes)
                        .ok_or(Invalid("DRV_FEATURES size"))?;
                    if value & !offered != 0 {
                        return Err(Invalid("DRV_FEATURES: not all of them are offered here"));
                    }
                    changes.features = Some(value);
                }
                PCI_COMMON_CFG => {
                    let known = COMMON_STATE
                        .iter()
                        .find(|(offset, _)| u64::from(*offset) == part.index())
                        .ok_or(Invalid("PCI_COMMON_CFG: no such field"))?;
                    if part.value.len() != known.1 {
                        return Err(Invalid("PCI_COMMON_CFG size"));
                    }
                    let mut word = [0; 4];
                    word[..known.1].copy_from_slice(&part.value);
                    let value = u32::from_le_bytes(word);
                    if known.0 == 16 && !self.can_map(value as u16) {
                        return Err(Invalid("PCI_COMMON_CFG: no such MSI-X vector"));
                    }
                    changes.common.push((known.0, value));
                }
                DEVICE_STATUS => changes.status = Some(part.sized::<1>().ok_or(Invalid("DEVICE_STATUS size"))?[0]),
                VQ_CFG => {
                    let index = queue_index(registers, part)?;
                    let value = part.sized().ok_or(Invalid("VQ_CFG size"))?;
                    let vq = VqCfg::parse(&value);
                    if !(1..=MAX_QUEUE_SIZE).contains(&vq.size) || !vq.size.is_power_of_two() {
                        return Err(Invalid("VQ_CFG: queue_size"));
                    }
                    if !self.can_map(vq.vector) {
                        return Err(Invalid("VQ_CFG: no such MSI-X vector"));
                    }
                    changes.queues.push((index, vq));
                }
                VQ_NOTIFY_CFG => {
                    let index = queue_index(registers, part)?;
                    if part.value != notify_cfg(index) {
                        return Err(Invalid("VQ_NOTIFY_CFG: queues are notified in another way here"));
                    }
                }
                _ if part.flags & OPTIONAL != 0 => {}
                _ => return Err(Invalid("a part of unknown type")),
            }
        }
        let features = changes.features.unwrap_or(registers.driver_features);
        let set = |index: usize| changes.queues.iter().rev().find(|(other, _)| *other == index);
        let enabled = registers
            .queues
            .iter()
            .enumerate()
            .any(|(index, queue)| match set(index) {
                Some((_, vq)) => vq.enabled,
                None => queue.active && queue.from_used,
            });
        if features & feature::RING_PACKED != 0 && enabled {
            return Err(Invalid("VQ_CFG: no part carries the position of a packed ring"));
        }
        Ok(changes)
    }

    fn can_map(&self, vector: u16) -> bool {
        vector == NO_VECTOR || vector < self.vectors
    }
}

/// What a set of parts changes.
#[derive(Default)]
struct Changes {
    features: Option<u64>,
    common: Vec<(u32, u32)>,
    status: Option<u8>,
    queues: Vec<(usize, VqCfg)>,
}

fn notify_cfg(index: usize) -> [u8; 8] {
    let mut value = [0; 8];
    // Queues are at most a few dozen. queue_notify_off and queue_notif_config_data are both the index.
    value[..2].copy_from_slice(&(index as u16).to_le_bytes());
    value[2..4].copy_from_slice(&(index as u16).to_le_bytes());
    value
}

fn queue_index(registers: &Registers, part: &Part) -> std::result::Result<usize, SetError> {
    usize::try_from(part.index())
        .ok()
        .filter(|&index| index < registers.queues.len())
        .ok_or(SetError::Invalid("no such queue"))
}
