// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI configuration space: a builder for its layout, and its behaviour.
//!
//! Bytes go in, bytes and [`Effect`]s come out. Nothing here knows a socket, a member or a guest. The virtio capabilities are
//! those of the virtio specification, "PCI Device Layout"; the rest follows the PCI Express base specification (type 0
//! header, MSI-X, power management, PCI Express capability, SR-IOV extended capability).
//!
//! A register is three things: its value after reset, the bits a driver can write, and what is done when it has been written.
//! The first two are byte arrays, so accesses of any width and alignment need no further care. Bits that a driver clears by
//! writing ones (error bits of Status and Device Status) are never set by a device in software; they are read-only zeroes.

use crate::error::{Error, Result};

/// Bytes of the configuration space of a PCI Express function.
pub const CONFIG_SIZE: usize = 4096;
/// BARs of a function.
pub const BARS: usize = 6;
/// Largest number of MSI-X vectors.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of an MSI-X table entry.
pub const MSIX_ENTRY: u64 = 16;

/// Bits of the command register.
pub mod command {
    /// Answers I/O accesses.
    pub const IO: u16 = 1;
    /// Answers memory accesses.
    pub const MEMORY: u16 = 2;
    /// May do DMA.
    pub const BUS_MASTER: u16 = 4;
    /// May not assert INTx.
    pub const INTX_DISABLE: u16 = 0x400;
    /// All that a driver can write; parity and SERR# enable do nothing.
    pub(super) const WRITABLE: u16 = IO | MEMORY | BUS_MASTER | 0x140 | INTX_DISABLE;
}

/// Capability ids, `cfg_type`s and offsets of registers in the header.
mod register {
    pub const VENDOR: usize = 0x00;
    pub const DEVICE: usize = 0x02;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const CLASS: usize = 0x09;
    pub const CACHE_LINE: usize = 0x0c;
    pub const BAR0: usize = 0x10;
    pub const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub const SUBSYSTEM: usize = 0x2e;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
    pub const FIRST_CAPABILITY: usize = 0x40;
    pub const EXTENDED: usize = 0x100;

    pub const STATUS_INTERRUPT: u8 = 0x08;
    pub const STATUS_CAPABILITIES: u16 = 0x10;

    pub const ID_POWER: u8 = 0x01;
    pub const ID_VENDOR: u8 = 0x09;
    pub const ID_EXPRESS: u8 = 0x10;
    pub const ID_MSIX: u8 = 0x11;
    pub const ID_SR_IOV: u16 = 0x10;

    pub const CFG_PCI: u8 = 5;
    pub const CFG_SHARED_MEMORY: u8 = 8;

    pub const MSIX_CONTROL: usize = 2;
    pub const MSIX_ENABLE: u16 = 0x8000;
    pub const MSIX_FUNCTION_MASK: u16 = 0x4000;

    pub const EXPRESS_DEVICE_CONTROL: usize = 8;
    pub const EXPRESS_INITIATE_FLR: u16 = 0x8000;

    pub const WINDOW_BAR: usize = 4;
    pub const WINDOW_OFFSET: usize = 8;
    pub const WINDOW_LENGTH: usize = 12;
    pub const WINDOW_DATA: usize = 16;

    pub const VF_CONTROL: usize = 0x08;
    pub const VF_INITIAL: usize = 0x0c;
    pub const VF_TOTAL: usize = 0x0e;
    pub const VF_NUMBER: usize = 0x10;
    pub const VF_OFFSET: usize = 0x14;
    pub const VF_STRIDE: usize = 0x16;
    pub const VF_DEVICE: usize = 0x1a;
    pub const VF_PAGE_SIZES: usize = 0x1c;
    pub const VF_PAGE_SIZE: usize = 0x20;
    pub const VF_BAR0: usize = 0x24;
    pub const VF_LENGTH: usize = 0x40;
    pub const VF_ENABLE: u16 = 1;
    pub const VF_MEMORY: u16 = 8;
    pub const VF_ARI: u16 = 0x10;
}
use register as r;

/// Page sizes of 4 KiB, 8 KiB, 64 KiB, 256 KiB, 1 MiB and 4 MiB: those that every SR-IOV device has to support.
const VF_PAGE_SIZES: u32 = 0x553;

/// What a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code, 24 bits: base class, sub-class, interface.
    pub class: u32,
    /// Subsystem Vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mem32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; takes two BARs.
    Mem64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl BarKind {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            BarKind::Io => "io",
            BarKind::Mem32 { prefetchable: false } => "mem32",
            BarKind::Mem32 { prefetchable: true } => "mem32-prefetchable",
            BarKind::Mem64 { prefetchable: false } => "mem64",
            BarKind::Mem64 { prefetchable: true } => "mem64-prefetchable",
        }
    }

    /// The read-only low bits of the register.
    fn type_bits(self) -> u32 {
        match self {
            BarKind::Io => 1,
            BarKind::Mem32 { prefetchable } => u32::from(prefetchable) << 3,
            BarKind::Mem64 { prefetchable } => 4 | u32::from(prefetchable) << 3,
        }
    }

    fn registers(self) -> usize {
        if matches!(self, BarKind::Mem64 { .. }) {
            2
        } else {
            1
        }
    }
}

/// A BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes, a power of two.
    pub size: u64,
}

impl Bar {
    fn check(&self, what: &str, index: usize, taken: &[Option<Bar>; BARS], smallest: u64) -> Result<()> {
        let largest = match self.kind {
            BarKind::Io => 1 << 16,
            BarKind::Mem32 { .. } => 1 << 31,
            BarKind::Mem64 { .. } => 1 << 62,
        };
        if !self.size.is_power_of_two() || self.size < smallest || self.size > largest {
            return Err(Error::Invalid(format!(
                "{what} {index}: {:#x} bytes are not a power of two from {smallest:#x} to {largest:#x}",
                self.size
            )));
        }
        let end = index + self.kind.registers();
        if end > BARS {
            return Err(Error::Invalid(format!("{what} {index}: there are {BARS}")));
        }
        let free = |at: usize| {
            taken[at].is_none() && (at == 0 || !matches!(taken[at - 1], Some(bar) if bar.kind.registers() == 2))
        };
        // The upper half of a 64-bit BAR is looked at from its own side, too: its predecessor is the BAR being added.
        if !free(index) || (index + 1..end).any(|at| taken[at].is_some()) {
            return Err(Error::Invalid(format!("{what} {index}: it is in use")));
        }
        Ok(())
    }

    /// The bits of the register (pair) that a driver can write.
    fn mask(&self) -> u64 {
        !(self.size - 1)
    }
}

/// Which kind of PCI Express function it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpressType {
    /// An endpoint: memory BARs only.
    Endpoint,
    /// A legacy endpoint: may have I/O BARs.
    LegacyEndpoint,
}

/// A structure of a virtio function, found through a vendor capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Structure {
    /// VIRTIO_PCI_CAP_COMMON_CFG.
    Common,
    /// VIRTIO_PCI_CAP_NOTIFY_CFG.
    Notify {
        /// `notify_off_multiplier`, bytes.
        multiplier: u32,
    },
    /// VIRTIO_PCI_CAP_ISR_CFG.
    Isr,
    /// VIRTIO_PCI_CAP_DEVICE_CFG.
    Device,
}

impl Structure {
    fn cfg_type(self) -> u8 {
        match self {
            Structure::Common => 1,
            Structure::Notify { .. } => 2,
            Structure::Isr => 3,
            Structure::Device => 4,
        }
    }

    /// The alignment that its offset has to have.
    fn alignment(self) -> u32 {
        match self {
            Structure::Common | Structure::Device => 4,
            Structure::Notify { .. } => 2,
            Structure::Isr => 1,
        }
    }
}

/// What the SR-IOV capability of a physical function says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SrIov {
    /// TotalVFs and InitialVFs.
    pub total_vfs: u16,
    /// First VF Offset.
    pub first_offset: u16,
    /// VF Stride.
    pub stride: u16,
    /// VF Device ID.
    pub device: u16,
    /// VF BARs. BAR0 is hardwired to zero: LEGACY_NOTIFY_INFO asks for that.
    pub bars: [Option<Bar>; BARS],
}

/// An access that a driver makes through VIRTIO_PCI_CAP_PCI_CFG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Which BAR.
    pub bar: u8,
    /// Where in it; a multiple of the length, and all of the access lies inside the BAR.
    pub offset: u32,
    /// 1, 2 or 4 bytes.
    pub length: u8,
}

/// What a write to the configuration space brings about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// I/O accesses are answered, or no longer.
    IoEnable(bool),
    /// Memory accesses are answered, or no longer.
    MemoryEnable(bool),
    /// DMA is allowed, or no longer.
    BusMaster(bool),
    /// INTx may not be asserted, or may again.
    IntxDisable(bool),
    /// MSI-X Enable has changed.
    MsixEnable(bool),
    /// MSI-X Function Mask has changed.
    MsixMask(bool),
    /// VF Enable or NumVFs has changed.
    VfEnable {
        /// VF Enable.
        enable: bool,
        /// NumVFs.
        num_vfs: u16,
    },
    /// Initiate Function Level Reset: the configuration space has been reset, the rest is to be.
    FunctionReset,
    /// A write through VIRTIO_PCI_CAP_PCI_CFG is to be done.
    PciCfgAccess {
        /// Where.
        window: Window,
        /// Its first `length` bytes.
        data: [u8; 4],
    },
}

/// A capability, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Where it is.
    pub offset: u16,
    /// Its id.
    pub id: u16,
    /// "msix", "virtio-common", "sr-iov" and so on.
    pub name: &'static str,
}

/// Lays out a configuration space. Mistakes are reported by `build`.
pub struct ConfigBuilder {
    data: Vec<u8>,
    mask: Vec<u8>,
    bars: [Option<Bar>; BARS],
    /// Where the next capability goes.
    next: usize,
    /// Where the link to it is.
    link: usize,
    capabilities: Vec<Capability>,
    msix: Option<usize>,
    express: Option<usize>,
    window: Option<usize>,
    sr_iov: Option<(usize, SrIov)>,
    /// Structures that have to lie inside their BARs: BAR, end.
    inside: Vec<(u8, u64)>,
    error: Option<Error>,
}

impl ConfigBuilder {
    /// An empty type 0 header; `interrupt_pin` 1 is INTA, 0 none.
    pub fn new(identity: Identity, interrupt_pin: u8) -> Self {
        let mut builder = Self {
            data: vec![0; r::EXTENDED],
            mask: vec![0; r::EXTENDED],
            bars: [None; BARS],
            next: r::FIRST_CAPABILITY,
            link: r::CAPABILITIES,
            capabilities: Vec::new(),
            msix: None,
            express: None,
            window: None,
            sr_iov: None,
            inside: Vec::new(),
            error: None,
        };
        builder.put(r::VENDOR, &identity.vendor.to_le_bytes());
        builder.put(r::DEVICE, &identity.device.to_le_bytes());
        builder.put(r::REVISION, &[identity.revision]);
        builder.put(r::CLASS, &identity.class.to_le_bytes()[..3]);
        builder.put(r::SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        builder.put(r::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        builder.put(r::INTERRUPT_PIN, &[interrupt_pin]);
        builder.allow(r::COMMAND, &command::WRITABLE.to_le_bytes());
        // Without a meaning for PCI Express, but software keeps numbers there.
        builder.allow(r::CACHE_LINE, &[0xff]);
        builder.allow(r::INTERRUPT_LINE, &[0xff]);
        if identity.class > 0xff_ffff || interrupt_pin > 4 {
            builder.fail(format!("class {:#x} or interrupt pin {interrupt_pin}", identity.class));
        }
        builder
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.mask[at..at + bits.len()].copy_from_slice(bits);
    }

    fn fail(&mut self, reason: String) {
        self.error.get_or_insert(Error::Invalid(reason));
    }

    /// A BAR.
    #[must_use]
    pub fn bar(mut self, index: usize, kind: BarKind, size: u64) -> Self {
        let bar = Bar { kind, size };
        let smallest = if kind == BarKind::Io { 4 } else { 16 };
        if let Err(error) = bar.check("BAR", index, &self.bars, smallest) {
            self.error.get_or_insert(error);
            return self;
        }
        self.bars[index] = Some(bar);
        let at = r::BAR0 + 4 * index;
        self.put(at, &kind.type_bits().to_le_bytes());
        self.allow(at, &bar.mask().to_le_bytes()[..4 * kind.registers()]);
        self
    }

    /// Adds a capability: its bytes after the link, and which of their bits can be written. Where it is.
    fn capability(&mut self, id: u8, name: &'static str, bytes: &[u8], writable: &[(usize, &[u8])]) -> Option<usize> {
        let at = self.next;
        let end = at + 2 + bytes.len();
        if end > r::EXTENDED {
            self.fail(format!("no room for capability {name}"));
            return None;
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, bytes);
        for (offset, bits) in writable {
            self.allow(at + offset, bits);
        }
        // at < 0x100.
        self.put(self.link, &[at as u8]);
        self.put(r::STATUS, &r::STATUS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        self.next = end.next_multiple_of(4);
        self.capabilities.push(Capability {
            offset: at as u16,
            id: id.into(),
            name,
        });
        Some(at)
    }

    /// A virtio structure in a BAR.
    #[must_use]
    pub fn virtio(mut self, structure: Structure, bar: u8, offset: u32, length: u32) -> Self {
        if !offset.is_multiple_of(structure.alignment()) || length == 0 {
            self.fail(format!("{structure:?} of {length} bytes at {offset:#x}"));
            return self;
        }
        let mut bytes = vec![16, structure.cfg_type(), bar, 0, 0, 0];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        let name = match structure {
            Structure::Common => "virtio-common",
            Structure::Notify { multiplier } => {
                bytes[0] = 20;
                bytes.extend(multiplier.to_le_bytes());
                "virtio-notify"
            }
            Structure::Isr => "virtio-isr",
            Structure::Device => "virtio-device",
        };
        self.inside.push((bar, u64::from(offset) + u64::from(length)));
        self.capability(r::ID_VENDOR, name, &bytes, &[]);
        self
    }

    /// VIRTIO_PCI_CAP_SHARED_MEMORY_CFG: a shared memory region in a BAR (struct virtio_pci_cap64).
    #[must_use]
    pub fn virtio_shared_memory(mut self, id: u8, bar: u8, offset: u64, length: u64) -> Self {
        let Some(end) = offset.checked_add(length).filter(|_| length != 0) else {
            self.fail(format!("shared memory of {length:#x} bytes at {offset:#x}"));
            return self;
        };
        let mut bytes = vec![24, r::CFG_SHARED_MEMORY, bar, id, 0, 0];
        // All lower halves, then all upper ones.
        for shift in [0, 32] {
            bytes.extend(((offset >> shift) as u32).to_le_bytes());
            bytes.extend(((length >> shift) as u32).to_le_bytes());
        }
        self.inside.push((bar, end));
        self.capability(r::ID_VENDOR, "virtio-shared-memory", &bytes, &[]);
        self
    }

    /// VIRTIO_PCI_CAP_PCI_CFG: BAR accesses through the configuration space.
    #[must_use]
    pub fn virtio_pci_cfg(mut self) -> Self {
        let mut bytes = [0; 18];
        bytes[0] = 20;
        bytes[1] = r::CFG_PCI;
        self.window = self.capability(
            r::ID_VENDOR,
            "virtio-pci-cfg",
            &bytes,
            &[(r::WINDOW_BAR, &[0xff]), (r::WINDOW_OFFSET, &[0xff; 12])],
        );
        self
    }

    /// MSI-X, with its table and pending bits in a BAR.
    #[must_use]
    pub fn msix(mut self, vectors: u16, bar: u8, table: u32, pending: u32) -> Self {
        if vectors == 0 || vectors > MAX_VECTORS || !table.is_multiple_of(8) || !pending.is_multiple_of(8) || bar > 5 {
            self.fail(format!(
                "MSI-X with {vectors} vectors at {table:#x} and {pending:#x} of BAR {bar}"
            ));
            return self;
        }
        let mut bytes = (vectors - 1).to_le_bytes().to_vec();
        bytes.extend((table | u32::from(bar)).to_le_bytes());
        bytes.extend((pending | u32::from(bar)).to_le_bytes());
        self.inside
            .push((bar, u64::from(table) + MSIX_ENTRY * u64::from(vectors)));
        self.inside.push((bar, u64::from(pending) + pending_bytes(vectors)));
        let writable = (r::MSIX_ENABLE | r::MSIX_FUNCTION_MASK).to_le_bytes();
        self.msix = self.capability(r::ID_MSIX, "msix", &bytes, &[(r::MSIX_CONTROL, &writable)]);
        self
    }

    /// Power management, version 3. Going to D3hot and back loses nothing.
    #[must_use]
    pub fn power(mut self) -> Self {
        // PMC: version 3; PMCSR: No_Soft_Reset, power state writable.
        self.capability(r::ID_POWER, "power", &[3, 0, 8, 0, 0, 0], &[(4, &[3])]);
        self
    }

    /// PCI Express, version 2, with Function Level Reset.
    #[must_use]
    pub fn express(mut self, kind: ExpressType) -> Self {
        let port: u16 = match kind {
            ExpressType::Endpoint => 0,
            ExpressType::LegacyEndpoint => 1,
        };
        let mut bytes = [0; 58];
        let mut put = |at: usize, value: &[u8]| bytes[at - 2..at - 2 + value.len()].copy_from_slice(value);
        put(2, &(2 | port << 4).to_le_bytes());
        // Device Capabilities: Role-Based Error Reporting, Function Level Reset.
        put(4, &(1u32 << 28 | 1 << 15).to_le_bytes());
        // Device Control: relaxed ordering, no snoop, reads of 512 bytes; the values after reset.
        put(8, &0x2810u16.to_le_bytes());
        // Link Capabilities and Status: 2.5 GT/s, one lane.
        put(0x0c, &0x11u32.to_le_bytes());
        put(0x12, &0x11u16.to_le_bytes());
        // Link Capabilities 2: 2.5 GT/s; Link Control 2: that is the target.
        put(0x2c, &2u32.to_le_bytes());
        put(0x30, &1u16.to_le_bytes());
        // Device Control: all but phantom functions, auxiliary power and extended tags, which aren't there. Initiate FLR
        // is not among them: it reads 0.
        self.express = self.capability(
            r::ID_EXPRESS,
            "express",
            &bytes,
            &[(r::EXPRESS_DEVICE_CONTROL, &0x78ff_u16.to_le_bytes()), (0x10, &[0xc8])],
        );
        self
    }

    /// The SR-IOV extended capability, at the start of the extended configuration space.
    #[must_use]
    pub fn sr_iov(mut self, sr_iov: SrIov) -> Self {
        if sr_iov.bars[0].is_some() {
            self.fail("VF BAR 0 has to be hardwired to zero".into());
            return self;
        }
        let at = r::EXTENDED;
        self.data.resize(at + r::VF_LENGTH, 0);
        self.mask.resize(at + r::VF_LENGTH, 0);
        // Id, version 1, no next one.
        self.put(at, &(u32::from(r::ID_SR_IOV) | 1 << 16).to_le_bytes());
        self.put(at + r::VF_INITIAL, &sr_iov.total_vfs.to_le_bytes());
        self.put(at + r::VF_TOTAL, &sr_iov.total_vfs.to_le_bytes());
        self.put(at + r::VF_OFFSET, &sr_iov.first_offset.to_le_bytes());
        self.put(at + r::VF_STRIDE, &sr_iov.stride.to_le_bytes());
        self.put(at + r::VF_DEVICE, &sr_iov.device.to_le_bytes());
        self.put(at + r::VF_PAGE_SIZES, &VF_PAGE_SIZES.to_le_bytes());
        self.put(at + r::VF_PAGE_SIZE, &1u32.to_le_bytes());
        let control = r::VF_ENABLE | r::VF_MEMORY | r::VF_ARI;
        self.allow(at + r::VF_CONTROL, &control.to_le_bytes());
        self.allow(at + r::VF_NUMBER, &[0xff; 2]);
        self.allow(at + r::VF_PAGE_SIZE, &VF_PAGE_SIZES.to_le_bytes());
        let mut taken = [None; BARS];
        for (index, bar) in sr_iov.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let checked = match bar.kind {
                BarKind::Io => Err(Error::Invalid(format!("VF BAR {index}: VFs have no I/O ports"))),
                _ => bar.check("VF BAR", index, &taken, 4096),
            };
            if let Err(error) = checked {
                self.error.get_or_insert(error);
                return self;
            }
            taken[index] = Some(*bar);
            self.put(at + r::VF_BAR0 + 4 * index, &bar.kind.type_bits().to_le_bytes());
        }
        self.sr_iov = Some((at, sr_iov));
        self.capabilities.push(Capability {
            offset: at as u16,
            id: r::ID_SR_IOV,
            name: "sr-iov",
        });
        self
    }

    /// The configuration space after reset.
    ///
    /// # Errors
    /// [`Error::Invalid`] when BARs clash or have no possible size, and when a structure lies outside its BAR.
    pub fn build(mut self) -> Result<ConfigSpace> {
        for (bar, end) in std::mem::take(&mut self.inside) {
            let size = self
                .bars
                .get(usize::from(bar))
                .copied()
                .flatten()
                .map_or(0, |bar| bar.size);
            if end > size {
                self.fail(format!(
                    "a structure ends at {end:#x} of BAR {bar}, which has {size:#x} bytes"
                ));
            }
        }
        if let Some(error) = self.error {
            return Err(error);
        }
        let mut space = ConfigSpace {
            initial: self.data.clone().into(),
            data: self.data.into(),
            mask: self.mask.into(),
            bars: self.bars,
            capabilities: self.capabilities,
            msix: self.msix,
            express: self.express,
            window: self.window,
            sr_iov: self.sr_iov,
        };
        space.size_vf_bars();
        Ok(space)
    }
}

/// Bytes of the MSI-X pending bit array.
pub fn pending_bytes(vectors: u16) -> u64 {
    8 * u64::from(vectors).div_ceil(64)
}

/// A PCI configuration space. What no capability occupies reads 0 and can't be written.
pub struct ConfigSpace {
    /// The bytes that can be other than 0; [`CONFIG_SIZE`] says how many there are.
    data: Box<[u8]>,
    initial: Box<[u8]>,
    /// Bits a driver can write.
    mask: Box<[u8]>,
    bars: [Option<Bar>; BARS],
    capabilities: Vec<Capability>,
    msix: Option<usize>,
    express: Option<usize>,
    window: Option<usize>,
    sr_iov: Option<(usize, SrIov)>,
}

/// Registers whose changes are reported.
#[derive(Clone, Copy)]
struct Watched {
    command: u16,
    msix: u16,
    vfs: (bool, u16),
}

impl ConfigSpace {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.data[at], self.data[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// What the function says it is.
    pub fn identity(&self) -> Identity {
        Identity {
            vendor: self.u16(r::VENDOR),
            device: self.u16(r::DEVICE),
            revision: self.data[r::REVISION],
            class: self.u32(r::REVISION) >> 8,
            subsystem_vendor: self.u16(r::SUBSYSTEM_VENDOR),
            subsystem: self.u16(r::SUBSYSTEM),
        }
    }

    /// A BAR. None: there is none, or it is the upper half of the one before.
    pub fn bar(&self, index: usize) -> Option<Bar> {
        self.bars.get(index).copied().flatten()
    }

    /// Where the driver has put a BAR.
    pub fn bar_address(&self, index: usize) -> Option<u64> {
        let bar = self.bar(index)?;
        let at = r::BAR0 + 4 * index;
        let high = if bar.kind.registers() == 2 { self.u32(at + 4) } else { 0 };
        Some((u64::from(self.u32(at)) | u64::from(high) << 32) & bar.mask())
    }

    /// The capabilities, in the order of their lists.
    pub fn capabilities(&self) -> &[Capability] {
        &self.capabilities
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16(r::COMMAND)
    }

    /// MSI-X Enable.
    pub fn msix_enabled(&self) -> bool {
        self.msix
            .is_some_and(|at| self.u16(at + r::MSIX_CONTROL) & r::MSIX_ENABLE != 0)
    }

    /// VF Enable and NumVFs; (false, 0) without the capability.
    pub fn vfs(&self) -> (bool, u16) {
        self.sr_iov.map_or((false, 0), |(at, _)| {
            let enable = self.u16(at + r::VF_CONTROL) & r::VF_ENABLE != 0;
            (enable, self.u16(at + r::VF_NUMBER))
        })
    }

    /// Somebody else has set VF Enable or NumVFs.
    pub fn set_vfs(&mut self, enable: bool, num_vfs: u16) {
        if let Some((at, _)) = self.sr_iov {
            let control = &mut self.data[at + r::VF_CONTROL];
            *control = *control & !(r::VF_ENABLE as u8) | u8::from(enable);
            self.data[at + r::VF_NUMBER..at + r::VF_NUMBER + 2].copy_from_slice(&num_vfs.to_le_bytes());
        }
    }

    /// Whether an INTx interrupt is pending: the Interrupt Status bit.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = &mut self.data[r::STATUS];
        *status = *status & !r::STATUS_INTERRUPT | if pending { r::STATUS_INTERRUPT } else { 0 };
    }

    /// Reads. Bytes beyond the end read 0.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let from = offset.min(self.data.len());
        let count = data.len().min(self.data.len() - from);
        data[..count].copy_from_slice(&self.data[from..from + count]);
    }

    /// The access to a BAR that a read of these bytes asks for: one of `pci_cfg_data` in VIRTIO_PCI_CAP_PCI_CFG. Do it, give
    /// the result to `fill_window`, and then read. Reads of more than four bytes are no driver's, but copies of the whole;
    /// they must not have side effects.
    pub fn window(&self, offset: usize, length: usize) -> Option<Window> {
        let at = self.window?;
        let data = at + r::WINDOW_DATA;
        if length > 4 || offset >= data + 4 || offset + length <= data {
            return None;
        }
        let window = Window {
            bar: self.data[at + r::WINDOW_BAR],
            offset: self.u32(at + r::WINDOW_OFFSET),
            length: match self.u32(at + r::WINDOW_LENGTH) {
                1 => 1,
                2 => 2,
                4 => 4,
                _ => return None,
            },
        };
        let bar = self.bar(window.bar.into())?;
        let end = u64::from(window.offset) + u64::from(window.length);
        (window.offset.is_multiple_of(u32::from(window.length)) && end <= bar.size).then_some(window)
    }

    /// What the access through the window has read; at most four bytes count.
    pub fn fill_window(&mut self, data: &[u8]) {
        if let Some(at) = self.window {
            let count = data.len().min(4);
            let at = at + r::WINDOW_DATA;
            self.data[at..at + count].copy_from_slice(&data[..count]);
        }
    }

    /// Writes, and appends what comes of it. Bytes beyond the end are ignored.
    pub fn write(&mut self, offset: usize, data: &[u8], effects: &mut Vec<Effect>) {
        let before = self.watched();
        let mut reset = false;
        let old_page_size = self.sr_iov.map(|(at, _)| self.u32(at + r::VF_PAGE_SIZE));
        for (at, &byte) in (offset..self.data.len()).zip(data) {
            let mask = if before.vfs.0 && self.fixed_with_vfs(at) {
                0
            } else {
                self.mask[at]
            };
            self.data[at] = self.data[at] & !mask | byte & mask;
            let flr_byte = self.express.map(|express| express + r::EXPRESS_DEVICE_CONTROL + 1);
            reset |= flr_byte == Some(at) && byte & (r::EXPRESS_INITIATE_FLR >> 8) as u8 != 0;
        }
        if let (Some((at, _)), Some(old)) = (self.sr_iov, old_page_size) {
            // The mask has left only page sizes that are supported; it has to be one of them.
            if !self.u32(at + r::VF_PAGE_SIZE).is_power_of_two() {
                self.data[at + r::VF_PAGE_SIZE..at + r::VF_PAGE_SIZE + 4].copy_from_slice(&old.to_le_bytes());
            }
            self.size_vf_bars();
        }
        if reset {
            self.restore();
        }
        self.report(before, effects);
        if reset {
            effects.push(Effect::FunctionReset);
        } else if let Some(window) = self.window(offset, data.len()) {
            let mut bytes = [0; 4];
            if let Some(at) = self.window {
                bytes.copy_from_slice(&self.data[at + r::WINDOW_DATA..at + r::WINDOW_DATA + 4]);
            }
            effects.push(Effect::PciCfgAccess { window, data: bytes });
        }
    }

    /// As after a function level reset that came another way; appends what has changed.
    pub fn reset(&mut self, effects: &mut Vec<Effect>) {
        let before = self.watched();
        self.restore();
        self.report(before, effects);
    }

    fn restore(&mut self) {
        self.data.copy_from_slice(&self.initial);
        self.size_vf_bars();
    }

    fn watched(&self) -> Watched {
        Watched {
            command: self.command(),
            msix: self.msix.map_or(0, |at| self.u16(at + r::MSIX_CONTROL)),
            vfs: self.vfs(),
        }
    }

    fn report(&self, before: Watched, effects: &mut Vec<Effect>) {
        let now = self.watched();
        let mut changed = |old: u16, new: u16, bit: u16, effect: fn(bool) -> Effect| {
            if (old ^ new) & bit != 0 {
                effects.push(effect(new & bit != 0));
            }
        };
        changed(before.command, now.command, command::IO, Effect::IoEnable);
        changed(before.command, now.command, command::MEMORY, Effect::MemoryEnable);
        changed(before.command, now.command, command::BUS_MASTER, Effect::BusMaster);
        changed(before.command, now.command, command::INTX_DISABLE, Effect::IntxDisable);
        changed(before.msix, now.msix, r::MSIX_ENABLE, Effect::MsixEnable);
        changed(before.msix, now.msix, r::MSIX_FUNCTION_MASK, Effect::MsixMask);
        if before.vfs != now.vfs {
            let (enable, num_vfs) = now.vfs;
            effects.push(Effect::VfEnable { enable, num_vfs });
        }
    }

    /// Registers that can't be written while VF Enable is set: NumVFs and the page size.
    fn fixed_with_vfs(&self, at: usize) -> bool {
        self.sr_iov.is_some_and(|(sr_iov, _)| {
            let at = at.wrapping_sub(sr_iov);
            (r::VF_NUMBER..r::VF_NUMBER + 2).contains(&at) || (r::VF_PAGE_SIZE..r::VF_PAGE_SIZE + 4).contains(&at)
        })
    }

    /// VF BARs are at least a system page each, so their masks follow that register.
    fn size_vf_bars(&mut self) {
        let Some((at, sr_iov)) = self.sr_iov else { return };
        let page = u64::from(self.u32(at + r::VF_PAGE_SIZE)) << 12;
        for (index, bar) in sr_iov.bars.iter().enumerate() {
            let Some(bar) = bar else { continue };
            let size = bar.size.max(page);
            let mask = (!(size - 1)).to_le_bytes();
            let register = at + r::VF_BAR0 + 4 * index;
            for (byte, bits) in (register..).zip(&mask[..4 * bar.kind.registers()]) {
                self.mask[byte] = *bits;
                // What can no longer be written is no longer there; type bits stay.
                self.data[byte] = self.data[byte] & bits | self.initial[byte];
            }
        }
    }
}
