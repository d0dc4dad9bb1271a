// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI functions of a group: its owner, and what members look like to a guest (design D7).
//!
//! A function is a configuration space ([`crate::pci`]) and BARs whose accesses go to the member's registers. It decides
//! nothing that a register does. Four kinds (virtio 1.4, 4.1.2):
//!
//! | kind         | ids                            | BAR0                   | BAR1  | BAR2              |
//! |--------------|--------------------------------|------------------------|-------|-------------------|
//! | owner        | 0x1040 + virtio id, revision 1 | none                   | MSI-X | virtio structures |
//! | modern       | 0x1040 + virtio id, revision 1 | none                   | MSI-X | virtio structures |
//! | legacy       | 0x1000 ..., revision 0         | I/O: legacy interface  | MSI-X | none              |
//! | transitional | 0x1000 ..., revision 0         | I/O: legacy interface  | MSI-X | virtio structures |
//!
//! A device with shared memory (virtio 1.4, 2.10) shows it as all of BAR4 where it shows its virtio structures: 64 bits wide
//! and prefetchable, as it may be larger than everything below 4 GiB.
//!
//! The other memory BARs are 32 bits wide: they are small, and firmware of old guests reaches them there (SeaBIOS and iPXE have
//! to go through the configuration space for a BAR above 4 GiB). BAR0 of owner and modern functions is hardwired to zero, as
//! LEGACY_NOTIFY_INFO demands of virtual functions. The I/O BAR belongs to somebody else, who turns accesses into
//! administration commands ([`IoPorts`]); everything else goes to the member at once.
//!
//! Whether BARs are decoded and DMA is allowed (the command register) is for the client to see to: it maps the BARs. Accesses
//! that come are answered.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::SharedMemory;
use crate::error::{Error, Fault, Result};
use crate::event::{Completion, Waker};
use crate::member::{Front, Member, Progress};
use crate::memory::Region;
use crate::owner::command as owner_command;
use crate::owner::forward::Forwarder;
use crate::owner::{DeviceGroup, TOTAL_VFS};
use crate::pci::{
    command, pending_bytes, Bar, BarKind, ConfigBuilder, ConfigSpace, Effect, ExpressType, Identity, SrIov, Structure,
    BARS, CONFIG_SIZE, MAX_VECTORS, MSIX_ENTRY,
};
use crate::vfio_user::function::{
    Access, IrqChange, Mappable, PciFunction, RegionInfo, CONFIG_REGION, IRQ_INTX, IRQ_MSIX,
};
use crate::worker::SourceHandle;

/// The vendor of virtio devices.
pub const VENDOR: u16 = 0x1af4;
/// BAR with the legacy interface.
pub const LEGACY_BAR: u8 = 0;
/// BAR with the MSI-X table and its pending bits.
pub const MSIX_BAR: u8 = 1;
/// BAR with the virtio structures.
pub const MODERN_BAR: u8 = 2;
/// BAR with shared memory, and the one above it.
pub const SHARED_MEMORY_BAR: u8 = 4;
/// The common configuration in its BAR.
pub const COMMON_OFFSET: u32 = 0;
/// The ISR status in its BAR.
pub const ISR_OFFSET: u32 = 0x1000;
/// The device configuration in its BAR.
pub const DEVICE_OFFSET: u32 = 0x2000;
/// The notification structure in its BAR. The value written is what counts (a 16-bit queue index), not the place.
pub const NOTIFY_OFFSET: u32 = 0x3000;
// LEGACY_NOTIFY_INFO says where it is, too.
const _: () = assert!(NOTIFY_OFFSET as u64 == owner_command::NOTIFY_OFFSET && MODERN_BAR == owner_command::NOTIFY_BAR);
/// Bytes from one queue's notification address to the next one's.
pub const NOTIFY_MULTIPLIER: u32 = 4;

/// Bytes of struct virtio_pci_common_cfg.
const COMMON_LENGTH: u32 = 64;
/// Most bytes of a device configuration: what lies between its structure and the next one.
const DEVICE_ROOM: u32 = NOTIFY_OFFSET - DEVICE_OFFSET;
/// Shared memory id of the one region that a device may have.
const SHARED_MEMORY_ID: u8 = 0;
/// Smallest memory BAR, so that each has a page for itself.
const PAGE: u64 = 4096;
/// Subsystem ID of devices that aren't transitional: anything from 0x40 on.
const MODERN_SUBSYSTEM: u16 = 0x1100;

/// Device ID of a virtio device without a legacy interface.
///
/// # Errors
/// [`Error::Invalid`]: PCI has room for virtio ids 1 to 63.
pub fn modern_device_id(virtio_id: u32) -> Result<u16> {
    match u16::try_from(virtio_id) {
        Ok(id @ 1..=0x3f) => Ok(0x1040 + id),
        _ => Err(Error::Invalid(format!(
            "virtio id {virtio_id} has no PCI device id; 1 to 63 do"
        ))),
    }
}

/// Device ID of a transitional virtio device. Those of types that never got one are taken from the same range: legacy drivers
/// go by the subsystem ID.
///
/// # Errors
/// As for [`modern_device_id`].
pub fn transitional_device_id(virtio_id: u32) -> Result<u16> {
    modern_device_id(virtio_id)?;
    Ok(match virtio_id {
        1 => 0x1000,
        2 => 0x1001,
        5 => 0x1002,
        3 => 0x1003,
        8 => 0x1004,
        4 => 0x1005,
        // Checked above: at most 63.
        id => 0x1000 + id as u16,
    })
}

/// Class code of a virtio device, as guests know it from QEMU.
pub fn class_code(virtio_id: u32) -> u32 {
    match virtio_id {
        // Ethernet controller.
        1 => 0x02_0000,
        // SCSI storage controller.
        2 | 8 => 0x01_0000,
        // Other communication controller.
        3 | 19 => 0x07_8000,
        // 9p: no class that anybody has defined.
        9 => 0x00_0200,
        // Other display controller.
        16 => 0x03_8000,
        // Other input controller.
        18 => 0x09_8000,
        // Other mass storage controller.
        26 => 0x01_8000,
        // Doesn't fit in any class.
        _ => 0xff_0000,
    }
}

/// The legacy interface of a member behind an I/O BAR.
pub trait IoPorts: Send + Sync {
    /// Reads registers.
    fn read(&self, offset: u64, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access;
    /// Writes registers.
    fn write(&self, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access;
    /// Goes on with the access that was [`Access::Later`]; `data` is that of a read.
    fn resume(&self, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access;
    /// Nobody waits any longer for the access that was [`Access::Later`].
    fn give_up(&self);
    /// The client is gone: what it has asked for and hasn't been begun must not happen any more.
    fn leave(&self) {
        self.give_up();
    }
}

impl IoPorts for Forwarder {
    fn read(&self, offset: u64, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        Self::read(self, offset, data, wake)
    }

    fn write(&self, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access {
        Self::write(self, offset, data, wake)
    }

    fn resume(&self, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        Self::resume(self, data, wake)
    }

    fn give_up(&self) {
        Self::give_up(self);
    }

    fn leave(&self) {
        Self::leave(self);
    }
}

/// What the owner's SR-IOV capability shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VfShape {
    /// TotalVFs.
    pub total_vfs: u16,
    /// Virtio id of the members, for VF Device ID; 0: there are none.
    pub virtio_id: u32,
    /// MSI-X vectors of a member; 0: none.
    pub vectors: u16,
    /// Queues of a member.
    pub queues: u16,
}

/// The group, as the owner's SR-IOV capability sees it.
pub trait VfControl: Send + Sync {
    /// Constants of the capability.
    fn shape(&self) -> VfShape;
    /// VF Enable and NumVFs as they are.
    fn vfs(&self) -> (bool, u16);
    /// The client has written VF Enable or NumVFs. What `vfs` says afterwards is what the client reads.
    fn vf_control(&self, enable: bool, num_vfs: u16);
    /// The function was reset, or the client has left, after such a write: as the host has set it up. (A function-level
    /// reset clears VF Enable, and a guest whose VMM hides SR-IOV could never set it again.)
    fn restore_vfs(&self);
}

impl VfControl for DeviceGroup {
    /// All virtual functions have one device ID and BARs of one size; members may be of several kinds. So it's the ID of the
    /// first, and the size of the largest.
    fn shape(&self) -> VfShape {
        let (_, num_vfs) = self.core().vfs();
        let mut shape = VfShape {
            total_vfs: TOTAL_VFS,
            virtio_id: 0,
            vectors: 0,
            queues: 0,
        };
        for member in (1..=num_vfs.into()).filter_map(|id| self.member(id)) {
            if shape.virtio_id == 0 {
                shape.virtio_id = member.device().device_id();
            }
            shape.vectors = shape.vectors.max(member.vectors());
            shape.queues = shape.queues.max(member.queue_count());
        }
        shape
    }

    fn vfs(&self) -> (bool, u16) {
        self.core().vfs()
    }

    fn vf_control(&self, enable: bool, num_vfs: u16) {
        self.core().set_vfs(enable, num_vfs);
    }

    fn restore_vfs(&self) {
        self.core().restore_vfs();
    }
}

/// A BAR of a function, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BarInfo {
    /// Which.
    pub index: u8,
    /// Bytes.
    pub size: u64,
    /// "io", "mem32" and so on.
    pub kind: &'static str,
}

/// Guest memory of a function, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaInfo {
    /// Address in the client's I/O address space.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
}

/// State of a function, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionInfo {
    /// "owner", "legacy", "transitional" or "modern".
    pub kind: &'static str,
    /// The member; 0 is the owner.
    pub member: u32,
    /// What it says it is.
    pub identity: Identity,
    /// BARs.
    pub bars: Vec<BarInfo>,
    /// Capabilities, in the order of their lists.
    pub capabilities: Vec<&'static str>,
    /// The command register.
    pub command: u16,
    /// MSI-X Enable.
    pub msix_enabled: bool,
    /// INTx has an eventfd.
    pub intx: bool,
    /// MSI-X vectors that have one.
    pub msix: Vec<u16>,
    /// Guest memory.
    pub dma: Vec<DmaInfo>,
}

/// An access that waits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pending {
    /// The member's: when it is woken it is done.
    Member,
    /// The I/O BAR's.
    Ports,
    /// A read of the configuration space, from this offset on, for which so many bytes of the I/O BAR are being read.
    Window(usize, u8),
}

struct State {
    config: ConfigSpace,
    pending: Option<Pending>,
    /// The MSI-X table, from the first write to it on. Clients of our own keep theirs here; QEMU keeps it to itself.
    table: Vec<u8>,
    vectors: Vec<Option<Arc<OwnedFd>>>,
    intx: Option<Arc<OwnedFd>>,
    /// The client has masked INTx.
    intx_masked: bool,
    /// Interrupts to be sent for a client that has asked for them (a test of the way).
    signals: Vec<Arc<OwnedFd>>,
    line: Option<SourceHandle>,
    /// The client has written VF Enable or NumVFs since the last reset.
    vfs_written: bool,
}

/// A PCI function of the owner or of a member.
pub struct Function {
    front: Front,
    member: Arc<Member>,
    ports: Option<Arc<dyn IoPorts>>,
    vfs: Option<Arc<dyn VfControl>>,
    vectors: u16,
    state: Mutex<State>,
}

const MEM32: BarKind = BarKind::Mem32 { prefetchable: false };

/// Where the pending bits are: where QEMU has them for few vectors, else right behind the table.
fn pending_offset(vectors: u16) -> u32 {
    (MSIX_ENTRY as u32 * u32::from(vectors)).max(0x800)
}

fn msix_bar(vectors: u16) -> Option<Bar> {
    let size = u64::from(pending_offset(vectors)) + pending_bytes(vectors);
    (vectors != 0).then(|| Bar {
        kind: MEM32,
        size: size.next_power_of_two().max(PAGE),
    })
}

fn notify_length(queues: u16) -> u32 {
    NOTIFY_MULTIPLIER * u32::from(queues.max(1))
}

fn modern_bar_size(queues: u16) -> u64 {
    u64::from(NOTIFY_OFFSET + notify_length(queues)).next_power_of_two()
}

impl SrIov {
    /// Virtual functions as [`Function::modern`] makes them. Their virtio structures are in a 64-bit BAR, as there may be
    /// many.
    fn of(shape: VfShape) -> Result<Self> {
        let mut bars = [None; BARS];
        bars[usize::from(MSIX_BAR)] = msix_bar(shape.vectors);
        bars[usize::from(MODERN_BAR)] = Some(Bar {
            kind: BarKind::Mem64 { prefetchable: false },
            size: modern_bar_size(shape.queues),
        });
        Ok(Self {
            total_vfs: shape.total_vfs,
            first_offset: 1,
            stride: 1,
            device: match shape.virtio_id {
                0 => 0,
                id => modern_device_id(id)?,
            },
            bars,
        })
    }
}

impl Function {
    /// The owner, with the SR-IOV capability.
    ///
    /// # Errors
    /// [`Error::Invalid`] when PCI can't express what the device is.
    pub fn owner(member: Arc<Member>, vfs: Arc<dyn VfControl>) -> Result<Arc<Self>> {
        Self::new(Front::Owner, member, None, Some(vfs))
    }

    /// A member, as a whole.
    ///
    /// # Errors
    /// As for `owner`.
    pub fn modern(member: Arc<Member>) -> Result<Arc<Self>> {
        Self::new(Front::Modern, member, None, None)
    }

    /// A device of the time before virtio 1.0.
    ///
    /// # Errors
    /// As for `owner`; and when the member can't be driven by legacy drivers.
    pub fn legacy(member: Arc<Member>, ports: Arc<dyn IoPorts>) -> Result<Arc<Self>> {
        Self::new(Front::Legacy, member, Some(ports), None)
    }

    /// A device for drivers of both times.
    ///
    /// # Errors
    /// As for `legacy`.
    pub fn transitional(member: Arc<Member>, ports: Arc<dyn IoPorts>) -> Result<Arc<Self>> {
        Self::new(Front::Transitional, member, Some(ports), None)
    }

    fn new(
        front: Front,
        member: Arc<Member>,
        ports: Option<Arc<dyn IoPorts>>,
        vfs: Option<Arc<dyn VfControl>>,
    ) -> Result<Arc<Self>> {
        if ports.is_some() && !member.legacy() {
            return Err(Error::Invalid(format!(
                "member {} has legacy = false: it has no legacy or transitional function",
                member.id()
            )));
        }
        let config = layout(front, &member, vfs.as_deref())?;
        let vectors = member.vectors();
        Ok(Arc::new(Self {
            front,
            member,
            ports,
            vfs,
            vectors,
            state: Mutex::new(State {
                config,
                pending: None,
                table: Vec::new(),
                vectors: Vec::new(),
                intx: None,
                intx_masked: false,
                signals: Vec::new(),
                line: None,
                vfs_written: false,
            }),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The member whose registers these are.
    pub fn member(&self) -> &Arc<Member> {
        &self.member
    }

    /// Everything about the function, for people.
    pub fn info(&self) -> FunctionInfo {
        let memory = match self.member.info() {
            info if info.front == Some(self.front) => info.memory,
            _ => Vec::new(),
        };
        let state = self.lock();
        let bars = (0..BARS as u8).filter_map(|index| {
            state.config.bar(index.into()).map(|bar| BarInfo {
                index,
                size: bar.size,
                kind: bar.kind.name(),
            })
        });
        let given = (0..).zip(&state.vectors).filter(|(_, fd)| fd.is_some());
        FunctionInfo {
            kind: self.front.name(),
            member: self.member.id(),
            identity: state.config.identity(),
            bars: bars.collect(),
            capabilities: state
                .config
                .capabilities()
                .iter()
                .map(|capability| capability.name)
                .collect(),
            command: state.config.command(),
            msix_enabled: state.config.msix_enabled(),
            intx: state.intx.is_some(),
            msix: given.map(|(vector, _)| vector).collect(),
            dma: memory
                .into_iter()
                .map(|region| DmaInfo {
                    iova: region.guest,
                    size: region.size,
                })
                .collect(),
        }
    }

    // --- configuration space ------------------------------------------------------------------------------

    /// Takes over what others can change: VF Enable and NumVFs, and whether INTx is asserted.
    fn refresh(&self, state: &mut State) {
        if let Some(vfs) = &self.vfs {
            let (enable, num_vfs) = vfs.vfs();
            state.config.set_vfs(enable, num_vfs);
        }
        state.config.set_interrupt_status(self.member.intx_pending());
    }

    fn config_read(&self, offset: usize, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        let window = self.lock().config.window(offset, data.len());
        if let Some(window) = window {
            let mut bytes = [0; 4];
            let bytes = &mut bytes[..usize::from(window.length)];
            match self.bar_read(window.bar.into(), window.offset.into(), bytes, wake) {
                Access::Done => self.lock().config.fill_window(bytes),
                // The configuration space itself can be read all the same.
                Access::Refused(_) => self.lock().config.fill_window(&[0xff; 4][..bytes.len()]),
                Access::Later => {
                    self.lock().pending = Some(Pending::Window(offset, window.length));
                    return Access::Later;
                }
            }
        }
        self.config_copy(offset, data);
        Access::Done
    }

    fn config_copy(&self, offset: usize, data: &mut [u8]) {
        let mut state = self.lock();
        self.refresh(&mut state);
        state.config.read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8], wake: &dyn Fn() -> Waker) -> Access {
        let mut effects = Vec::new();
        {
            let mut state = self.lock();
            self.refresh(&mut state);
            state.config.write(offset, data, &mut effects);
        }
        // One of them at most takes time: a reset, or an access through the window, and there is never both. The reset goes
        // first: after it no ring runs that could interrupt another way.
        let mut access = Access::Done;
        let reset = effects.contains(&Effect::FunctionReset);
        if reset {
            access = self.reset_rest(wake);
            effects.retain(|effect| !matches!(effect, Effect::FunctionReset | Effect::VfEnable { .. }));
        }
        for effect in effects {
            if self.apply(effect, wake) == Access::Later {
                access = Access::Later;
            }
        }
        match access {
            Access::Later => Access::Later,
            // A write through the window that came to nothing is no error of the configuration space.
            Access::Done | Access::Refused(_) => Access::Done,
        }
    }

    fn apply(&self, effect: Effect, wake: &dyn Fn() -> Waker) -> Access {
        match effect {
            Effect::MsixEnable(on) => self.member.set_msix_enabled(on),
            Effect::IntxDisable(_) => self.wire_intx(),
            Effect::VfEnable { enable, num_vfs } => {
                if let Some(vfs) = &self.vfs {
                    self.lock().vfs_written = true;
                    vfs.vf_control(enable, num_vfs);
                }
            }
            Effect::PciCfgAccess { window, data } => {
                let data = &data[..usize::from(window.length)];
                return self.bar_write(window.bar.into(), window.offset.into(), data, wake);
            }
            // The caller has done the reset; the others are for the client to see to.
            Effect::FunctionReset
            | Effect::IoEnable(_)
            | Effect::MemoryEnable(_)
            | Effect::BusMaster(_)
            | Effect::MsixMask(_) => {}
        }
        Access::Done
    }

    /// Resets what is not configuration space. Interrupts stay assigned: they are the client's, not the guest's.
    fn reset_rest(&self, wake: &dyn Fn() -> Waker) -> Access {
        self.lock().table.clear();
        self.restore_vfs();
        match self.member.reset_now(wake) {
            Progress::Done => Access::Done,
            Progress::Later => self.wait(Pending::Member),
        }
    }

    fn restore_vfs(&self) {
        let written = std::mem::take(&mut self.lock().vfs_written);
        if let (Some(vfs), true) = (&self.vfs, written) {
            vfs.restore_vfs();
        }
    }

    /// QEMU offers a BAR that it has mapped for DMA, too (seen with 11.1.3), and has no fd for it. We do: without one, the
    /// driver might have put a ring there, and each would be given a thread of its own.
    fn own_memory(&self, region: &Region) -> std::result::Result<Option<Region>, Fault> {
        let Some((file, length)) = shared_memory(self.front, &self.member).and_then(SharedMemory::file) else {
            return Ok(None);
        };
        let start = {
            let config = &self.lock().config;
            let decoded = config.command() & command::MEMORY != 0;
            config.bar_address(SHARED_MEMORY_BAR.into()).filter(|_| decoded)
        };
        // One that its driver has put over RAM hides the RAM from nobody but the device.
        let offset = start.and_then(|start| region.guest.checked_sub(start));
        let inside = offset
            .and_then(|offset| offset.checked_add(region.size))
            .is_some_and(|end| end <= length);
        let (Some(offset), true, true) = (offset, inside, region.remote().is_some() && region.writable()) else {
            return Ok(None);
        };
        let fd = file
            .try_clone()
            .map_err(|e| Fault::new("memory.map", format!("duplicating the shared memory's fd: {e}")))?;
        let mappings = self.member.pool().mappings();
        mappings
            .region(&fd.into(), region.guest, region.size, region.guest, offset)
            .map(Some)
    }

    fn wait(&self, pending: Pending) -> Access {
        self.lock().pending = Some(pending);
        Access::Later
    }

    // --- BARs ---------------------------------------------------------------------------------------------

    fn bar_read(&self, bar: u32, offset: u64, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        data.fill(0);
        match (u8::try_from(bar), &self.ports) {
            (Ok(LEGACY_BAR), Some(ports)) => {
                let access = ports.read(offset, data, wake);
                if access == Access::Later {
                    return self.wait(Pending::Ports);
                }
                return access;
            }
            (Ok(MSIX_BAR), _) if self.vectors != 0 => self.table_read(offset, data),
            (Ok(MODERN_BAR), _) if self.front != Front::Legacy => self.modern_read(offset, data),
            (Ok(SHARED_MEMORY_BAR), _) => {
                if let Some(memory) = shared_memory(self.front, &self.member) {
                    memory.read(offset, data);
                }
            }
            _ => {}
        }
        Access::Done
    }

    fn bar_write(&self, bar: u32, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access {
        match (u8::try_from(bar), &self.ports) {
            (Ok(LEGACY_BAR), Some(ports)) => {
                let access = ports.write(offset, data, wake);
                if access == Access::Later {
                    return self.wait(Pending::Ports);
                }
                access
            }
            (Ok(MSIX_BAR), _) if self.vectors != 0 => {
                self.table_write(offset, data);
                Access::Done
            }
            (Ok(MODERN_BAR), _) if self.front != Front::Legacy => self.modern_write(offset, data, wake),
            (Ok(SHARED_MEMORY_BAR), _) => {
                if let Some(memory) = shared_memory(self.front, &self.member) {
                    memory.write(offset, data);
                }
                Access::Done
            }
            _ => Access::Done,
        }
    }

    /// The virtio structure at an offset of the BAR, and the place in it.
    fn structure(offset: u64) -> Option<(Structure, usize)> {
        let offset = u32::try_from(offset).ok()?;
        let (structure, start) = match offset {
            0..ISR_OFFSET => (Structure::Common, COMMON_OFFSET),
            ISR_OFFSET..DEVICE_OFFSET => (Structure::Isr, ISR_OFFSET),
            DEVICE_OFFSET..NOTIFY_OFFSET => (Structure::Device, DEVICE_OFFSET),
            _ => {
                let multiplier = NOTIFY_MULTIPLIER;
                (Structure::Notify { multiplier }, NOTIFY_OFFSET)
            }
        };
        Some((structure, (offset - start) as usize))
    }

    fn modern_read(&self, offset: u64, data: &mut [u8]) {
        let Some((structure, at)) = Self::structure(offset) else {
            return;
        };
        // What goes on beyond the structure that it begins in reads 0.
        match structure {
            Structure::Common => self.member.modern_read(at, data),
            Structure::Device => self.member.config_read(at, data),
            Structure::Isr if at == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.member.isr_read();
                }
            }
            Structure::Isr | Structure::Notify { .. } => {}
        }
    }

    fn modern_write(&self, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access {
        let Some((structure, at)) = Self::structure(offset) else {
            return Access::Done;
        };
        match structure {
            Structure::Common => {
                if self.member.modern_write(at, data, wake) == Progress::Later {
                    return self.wait(Pending::Member);
                }
            }
            Structure::Device => self.member.config_write(at, data),
            // 32 bits are what a driver writes that was offered NOTIFICATION_DATA, or that writes words; the index is in
            // their lower half either way.
            Structure::Notify { .. } if at < notify_length(self.member.queue_count()) as usize => {
                if let [low, high] | [low, high, _, _] = *data {
                    self.member.notify(u16::from_le_bytes([low, high]));
                }
            }
            Structure::Isr | Structure::Notify { .. } => {}
        }
        Access::Done
    }

    fn table_size(&self) -> usize {
        MSIX_ENTRY as usize * usize::from(self.vectors)
    }

    /// The MSI-X table is memory; pending bits are never set, as nothing is held back here.
    fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = match usize::try_from(at) {
                Ok(at) if at < self.table_size() => state.table.get(at).copied().unwrap_or(initial_table(at)),
                _ => 0,
            };
        }
    }

    fn table_write(&self, offset: u64, data: &[u8]) {
        let size = self.table_size();
        let mut state = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let Ok(at) = usize::try_from(at) else { break };
            if at >= size {
                break;
            }
            if state.table.is_empty() {
                state.table = (0..size).map(initial_table).collect();
            }
            state.table[at] = *byte;
        }
    }

    // --- interrupts ---------------------------------------------------------------------------------------

    /// Tells the member where INTx goes: nowhere while the driver or the client has masked it. What came meanwhile is in the
    /// ISR status, and signalled once more.
    fn wire_intx(&self) {
        let intx = {
            let state = self.lock();
            let disabled = state.config.command() & command::INTX_DISABLE != 0;
            state.intx.clone().filter(|_| !state.intx_masked && !disabled)
        };
        let wired = intx.is_some();
        self.member.set_intx(intx);
        if wired {
            self.intx_again();
        }
    }

    fn intx_again(&self) {
        if self.member.intx_pending() {
            self.member.intx_again();
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(line) = &self.lock().line {
            line.wake();
        }
    }

    fn assign(&self, index: u32, start: u32, fds: Vec<Option<Arc<OwnedFd>>>) {
        if index == IRQ_INTX {
            if let Some(fd) = fds.into_iter().next() {
                {
                    let mut state = self.lock();
                    state.intx = fd;
                    state.intx_masked = false;
                }
                self.wire_intx();
            }
            return;
        }
        for (vector, fd) in (start..).zip(fds) {
            // Checked by the caller: at most 2048.
            let vector = vector as u16;
            if let Some(slot) = self.lock().vectors.get_mut(usize::from(vector)) {
                slot.clone_from(&fd);
            }
            self.member.set_msix_vector(vector, fd);
        }
    }

    fn trigger(&self, index: u32, start: u32, count: u32) {
        {
            let mut state = self.lock();
            let State {
                vectors, intx, signals, ..
            } = &mut *state;
            if index == IRQ_INTX {
                let new = |fd: &Arc<OwnedFd>| count != 0 && !signals.iter().any(|other| Arc::ptr_eq(other, fd));
                let fd = intx.clone().filter(new);
                signals.extend(fd);
            } else {
                let range = vectors.iter().skip(start as usize).take(count as usize);
                // What hasn't been sent yet needn't be sent twice; and a client could have it grow.
                let known: HashSet<_> = signals.iter().map(Arc::as_ptr).collect();
                let new: Vec<_> = range
                    .flatten()
                    .filter(|fd| !known.contains(&Arc::as_ptr(fd)))
                    .cloned()
                    .collect();
                signals.extend(new);
            }
        }
        self.wake();
    }
}

/// A byte of the MSI-X table after reset: all vectors masked.
fn initial_table(at: usize) -> u8 {
    u8::from(at % MSIX_ENTRY as usize == 12)
}

/// What BAR4 shows.
fn shared_memory(front: Front, member: &Member) -> Option<&dyn SharedMemory> {
    member.device().shared_memory().filter(|_| front != Front::Legacy)
}

/// Whether the function has an interrupt pin. After each INTx QEMU takes a function's mappings away for a second or so, to see
/// the access by which the driver ends it; with shared memory that is mapped every access in that time is a message. A driver
/// without MSI-X does better to poll.
fn has_intx(member: &Member) -> bool {
    let mapped = member
        .device()
        .shared_memory()
        .is_some_and(|memory| memory.file().is_some());
    !mapped || member.vectors() == 0
}

/// The configuration space of a function.
fn layout(front: Front, member: &Member, vfs: Option<&dyn VfControl>) -> Result<ConfigSpace> {
    let (id, vectors, queues) = (member.device().device_id(), member.vectors(), member.queue_count());
    let modern = front != Front::Legacy;
    let ports = matches!(front, Front::Legacy | Front::Transitional);
    let invalid = |reason: String| Error::Invalid(format!("member {}: {reason}", member.id()));
    if vectors > MAX_VECTORS {
        return Err(invalid(format!(
            "{vectors} MSI-X vectors; at most {MAX_VECTORS} are possible"
        )));
    }
    let identity = if ports {
        Identity {
            vendor: VENDOR,
            device: transitional_device_id(id)?,
            revision: 0,
            class: class_code(id),
            subsystem_vendor: VENDOR,
            // A virtio id that has a device id fits.
            subsystem: id as u16,
        }
    } else {
        Identity {
            vendor: VENDOR,
            device: modern_device_id(id)?,
            revision: 1,
            class: class_code(id),
            subsystem_vendor: VENDOR,
            subsystem: MODERN_SUBSYSTEM,
        }
    };
    let pin = u8::from(has_intx(member));
    let mut builder = ConfigBuilder::new(identity, pin);
    if ports {
        let size = (24 + member.legacy_config_size()) as u64;
        builder = builder.bar(LEGACY_BAR.into(), BarKind::Io, size.next_power_of_two());
    }
    if modern {
        let config = u32::try_from(member.config_size()).unwrap_or(u32::MAX);
        if config > DEVICE_ROOM {
            return Err(invalid(format!(
                "a device configuration of {config} bytes; there is room for {DEVICE_ROOM}"
            )));
        }
        let multiplier = NOTIFY_MULTIPLIER;
        builder = builder
            .bar(MODERN_BAR.into(), MEM32, modern_bar_size(queues))
            .virtio(Structure::Common, MODERN_BAR, COMMON_OFFSET, COMMON_LENGTH)
            .virtio(Structure::Isr, MODERN_BAR, ISR_OFFSET, 1);
        if config != 0 {
            builder = builder.virtio(Structure::Device, MODERN_BAR, DEVICE_OFFSET, config);
        }
        builder = builder
            .virtio(
                Structure::Notify { multiplier },
                MODERN_BAR,
                NOTIFY_OFFSET,
                notify_length(queues),
            )
            .virtio_pci_cfg();
    }
    if let Some(memory) = shared_memory(front, member) {
        let kind = BarKind::Mem64 { prefetchable: true };
        builder = builder
            .bar(SHARED_MEMORY_BAR.into(), kind, memory.size())
            .virtio_shared_memory(SHARED_MEMORY_ID, SHARED_MEMORY_BAR, 0, memory.size());
    }
    if let Some(bar) = msix_bar(vectors) {
        builder = builder
            .bar(MSIX_BAR.into(), bar.kind, bar.size)
            .msix(vectors, MSIX_BAR, 0, pending_offset(vectors));
    }
    // Endpoints proper have no I/O BARs.
    let express = if ports {
        ExpressType::LegacyEndpoint
    } else {
        ExpressType::Endpoint
    };
    builder = builder.power().express(express);
    if let Some(vfs) = vfs {
        builder = builder.sr_iov(SrIov::of(vfs.shape())?);
    }
    builder.build()
}

impl PciFunction for Function {
    fn label(&self) -> String {
        match self.front {
            Front::Owner => "owner".into(),
            _ => format!("member {}, {} function", self.member.id(), self.front.name()),
        }
    }

    fn kind(&self) -> &'static str {
        self.front.name()
    }

    fn member_id(&self) -> u32 {
        self.member.id()
    }

    fn region(&self, index: u32) -> RegionInfo {
        let size = match index {
            CONFIG_REGION => CONFIG_SIZE as u64,
            _ => self.lock().config.bar(index as usize).map_or(0, |bar| bar.size),
        };
        let memory = shared_memory(self.front, &self.member).filter(|_| index == u32::from(SHARED_MEMORY_BAR));
        RegionInfo {
            size,
            readable: size != 0,
            writable: size != 0,
            mappable: memory
                .and_then(SharedMemory::file)
                .map(|(file, length)| Mappable { file, length }),
        }
    }

    fn irq_count(&self, index: u32) -> u32 {
        match index {
            IRQ_INTX => u32::from(has_intx(&self.member)),
            IRQ_MSIX => self.vectors.into(),
            _ => 0,
        }
    }

    fn attach(&self, line: SourceHandle) -> Result<()> {
        // Made anew: the device's configuration may have grown since, and the group has other members.
        let config = layout(self.front, &self.member, self.vfs.as_deref())?;
        self.member.attach_function(self.front, line.clone())?;
        let mut state = self.lock();
        state.config = config;
        state.line = Some(line);
        state.vectors = vec![None; usize::from(self.vectors)];
        Ok(())
    }

    fn detach(&self, done: Completion) {
        {
            let mut state = self.lock();
            if state.line.take().is_none() {
                // Not attached: the member may be somebody else's.
                return;
            }
            state.config.reset(&mut Vec::new());
            state.pending = None;
            state.table = Vec::new();
            state.vectors = Vec::new();
            state.intx = None;
            state.intx_masked = false;
            state.signals = Vec::new();
        }
        if let Some(ports) = &self.ports {
            ports.leave();
        }
        self.restore_vfs();
        self.member.detach_function(done);
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        match region {
            CONFIG_REGION => self.config_read(usize::try_from(offset).unwrap_or(usize::MAX), data, wake),
            _ => self.bar_read(region, offset, data, wake),
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access {
        match region {
            CONFIG_REGION => self.config_write(usize::try_from(offset).unwrap_or(usize::MAX), data, wake),
            _ => self.bar_write(region, offset, data, wake),
        }
    }

    fn resume(&self, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access {
        let Some(pending) = self.lock().pending.take() else {
            return Access::Done;
        };
        match (pending, &self.ports) {
            (Pending::Ports, Some(ports)) => {
                let access = ports.resume(data, wake);
                if access == Access::Later {
                    return self.wait(pending);
                }
                access
            }
            (Pending::Window(offset, length), Some(ports)) => {
                let mut bytes = [0; 4];
                let bytes = &mut bytes[..usize::from(length)];
                match ports.resume(bytes, wake) {
                    Access::Later => return self.wait(pending),
                    Access::Done => self.lock().config.fill_window(bytes),
                    Access::Refused(_) => self.lock().config.fill_window(&[0xff; 4][..bytes.len()]),
                }
                self.config_copy(offset, data);
                Access::Done
            }
            _ => Access::Done,
        }
    }

    fn give_up(&self) {
        let pending = self.lock().pending.take();
        if let (Some(Pending::Ports | Pending::Window(..)), Some(ports)) = (pending, &self.ports) {
            ports.give_up();
        }
    }

    fn dma_map(&self, region: Region) -> std::result::Result<(), Fault> {
        let ours = self.own_memory(&region)?;
        self.member.add_function_memory(ours.unwrap_or(region))
    }

    fn dma_unmap(&self, iova: u64, size: u64, wake: &dyn Fn() -> Waker) -> std::result::Result<Access, Fault> {
        // Either the end of the completion wakes the client, or it has come before that is known to be necessary.
        let waker = Arc::new(Mutex::new(Unmapping::Begun(wake())));
        let ended = Arc::clone(&waker);
        let done = Completion::call(move || {
            let mut unmapping = ended.lock().unwrap_or_else(PoisonError::into_inner);
            let before = std::mem::replace(&mut *unmapping, Unmapping::Ended);
            drop(unmapping);
            if let Unmapping::Awaited(wake) = before {
                wake();
            }
        });
        self.member.remove_memory_then(iova, size, iova, done)?;
        let mut unmapping = waker.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *unmapping, Unmapping::Ended);
        if let Unmapping::Begun(wake) = before {
            *unmapping = Unmapping::Awaited(wake);
            drop(unmapping);
            return Ok(self.wait(Pending::Member));
        }
        Ok(Access::Done)
    }

    fn set_irqs(&self, change: IrqChange) -> std::result::Result<(), i32> {
        let fits = |index: u32, start: u32, count: u32| {
            let end = start.checked_add(count).ok_or(libc::EINVAL)?;
            if end > self.irq_count(index) {
                return Err(libc::EINVAL);
            }
            Ok(())
        };
        match change {
            IrqChange::Assign { index, start, fds } => {
                fits(index, start, u32::try_from(fds.len()).map_err(|_| libc::EINVAL)?)?;
                self.assign(index, start, fds);
            }
            IrqChange::Disable { index } => {
                self.assign(index, 0, vec![None; self.irq_count(index) as usize]);
            }
            IrqChange::Mask { index, start, count } => {
                fits(index, start, count)?;
                if index == IRQ_INTX && count != 0 && !std::mem::replace(&mut self.lock().intx_masked, true) {
                    self.wire_intx();
                }
            }
            IrqChange::Unmask { index, start, count } => {
                fits(index, start, count)?;
                if index == IRQ_INTX && count != 0 {
                    if std::mem::replace(&mut self.lock().intx_masked, false) {
                        self.wire_intx();
                    } else {
                        // The client masks by itself when it has got one, and says when the guest has handled it. Wiring
                        // again would interrupt each time.
                        self.intx_again();
                    }
                }
            }
            IrqChange::Trigger { index, start, count } => {
                fits(index, start, count)?;
                self.trigger(index, start, count);
            }
        }
        Ok(())
    }

    fn reset(&self, wake: &dyn Fn() -> Waker) -> Access {
        let mut effects = Vec::new();
        self.lock().config.reset(&mut effects);
        let access = self.reset_rest(wake);
        for effect in effects {
            if !matches!(effect, Effect::VfEnable { .. }) {
                self.apply(effect, wake);
            }
        }
        access
    }

    fn take_signals(&self, to: &mut Vec<Arc<OwnedFd>>) {
        to.append(&mut self.lock().signals);
        self.member.take_signals(to);
    }
}

/// How far letting go of memory has come.
enum Unmapping {
    /// It may be done before anybody has to wait.
    Begun(Waker),
    /// Somebody waits.
    Awaited(Waker),
    /// Nothing of it is used any more.
    Ended,
}
