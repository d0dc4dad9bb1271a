// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtio structures of a PCI function, as registers.

/// A virtio structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Structure {
    /// Common configuration.
    Common,
    /// Notifications.
    Notify,
    /// ISR status.
    Isr,
    /// Device-specific configuration.
    Device,
}

/// Accesses to registers. Implementations may stop the program on accesses outside of a structure: the driver checks first
/// (see [`Registers::notify_length`]; the others have the sizes of their fields).
pub trait Registers {
    /// Reads a byte.
    fn read8(&self, structure: Structure, offset: usize) -> u8;
    /// Reads 16 bits.
    fn read16(&self, structure: Structure, offset: usize) -> u16;
    /// Reads 32 bits.
    fn read32(&self, structure: Structure, offset: usize) -> u32;
    /// Writes a byte.
    fn write8(&self, structure: Structure, offset: usize, value: u8);
    /// Writes 16 bits.
    fn write16(&self, structure: Structure, offset: usize, value: u16);
    /// Writes 32 bits.
    fn write32(&self, structure: Structure, offset: usize, value: u32);
    /// Bytes of the notification structure.
    fn notify_length(&self) -> u64;
    /// What queue_notify_off is multiplied by.
    fn notify_multiplier(&self) -> u32;
}

/// Fields of the common configuration.
#[allow(missing_docs)]
pub mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const CONFIG_MSIX_VECTOR: usize = 16;
    pub const NUM_QUEUES: usize = 18;
    pub const DEVICE_STATUS: usize = 20;
    pub const CONFIG_GENERATION: usize = 21;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_MSIX_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY_OFF: usize = 30;
    pub const QUEUE_DESC: usize = 32;
    pub const QUEUE_DRIVER: usize = 40;
    pub const QUEUE_DEVICE: usize = 48;
    /// Bytes that every device has.
    pub const LENGTH: usize = 56;
}

/// Fields of virtio-vhost-user's configuration.
#[allow(missing_docs)]
pub mod config {
    pub const STATUS: usize = 0;
    pub const MAX_VHOST_QUEUES: usize = 4;
    pub const UUID: usize = 8;
    pub const LENGTH: usize = 24;

    pub const SLAVE_UP: u32 = 1;
    pub const MASTER_UP: u32 = 2;
}

/// Bits of the device status.
#[allow(missing_docs)]
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 0x40;
    pub const FAILED: u8 = 0x80;
}

/// Bits of the ISR status.
#[allow(missing_docs)]
pub mod isr {
    pub const QUEUE: u8 = 1;
    pub const CONFIG: u8 = 2;
    /// A kick notification, on devices whose special indices are no queues.
    pub const KICK: u8 = 4;
}
