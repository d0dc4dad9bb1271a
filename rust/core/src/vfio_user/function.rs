// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a PCI function is to the vfio-user server, and the server to a function.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::{Error, Fault};
use crate::event::{Completion, Waker};
use crate::memory::Region;
use crate::worker::SourceHandle;

/// Index of the configuration space among the regions.
pub const CONFIG_REGION: u32 = 7;
/// Regions a PCI function has: six BARs, ROM, configuration space, VGA.
pub const REGIONS: u32 = 9;
/// Interrupt kinds: INTx, MSI, MSI-X, error, request.
pub const IRQS: u32 = 5;
/// Index of INTx among the interrupt kinds.
pub const IRQ_INTX: u32 = 0;
/// Index of MSI-X among the interrupt kinds.
pub const IRQ_MSIX: u32 = 2;

/// A region of a function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes; 0: there is none.
    pub size: u64,
    /// It can be read.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// The part of it that a client may map instead.
    pub mappable: Option<Mappable>,
}

/// The beginning of a region that is the beginning of a file, too.
#[derive(Clone, Debug)]
pub struct Mappable {
    /// The file.
    pub file: Arc<OwnedFd>,
    /// Bytes, whole pages of the file's.
    pub length: u64,
}

impl PartialEq for Mappable {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.file, &other.file) && self.length == other.length
    }
}

impl Eq for Mappable {}

/// What becomes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Done; data that was asked for is there.
    Done,
    /// Refused, with an errno.
    Refused(i32),
    /// The waker will be called; then go on with `resume`.
    Later,
}

/// A change of interrupts (VFIO_USER_DEVICE_SET_IRQS).
pub enum IrqChange {
    /// Vectors from `start` on get these eventfds; None: that one is not signalled.
    Assign {
        /// Kind of interrupt.
        index: u32,
        /// First vector.
        start: u32,
        /// One for each vector.
        fds: Vec<Option<Arc<OwnedFd>>>,
    },
    /// All vectors of the kind are let go of.
    Disable {
        /// Kind of interrupt.
        index: u32,
    },
    /// The client doesn't want these for a while.
    Mask {
        /// Kind of interrupt.
        index: u32,
        /// First vector.
        start: u32,
        /// How many.
        count: u32,
    },
    /// It wants them again: what is pending is to be signalled once more.
    Unmask {
        /// Kind of interrupt.
        index: u32,
        /// First vector.
        start: u32,
        /// How many.
        count: u32,
    },
    /// Signal them, for a test of the way.
    Trigger {
        /// Kind of interrupt.
        index: u32,
        /// First vector.
        start: u32,
        /// How many.
        count: u32,
    },
}

/// A PCI function, as a transport sees it. One client at a time: between `attach` and `detach` one thread makes all calls.
///
/// Calls never block. What can't be done at once returns [`Access::Later`]: `wake` is asked for a waker, which is called
/// when it is time to go on with `resume`. No other access is made meanwhile.
pub trait PciFunction: Send + Sync {
    /// For logs: "member 3, legacy function".
    fn label(&self) -> String;
    /// "owner", "legacy", "transitional" or "modern".
    fn kind(&self) -> &'static str;
    /// Its member's number; 0 is the owner.
    fn member_id(&self) -> u32;
    /// What a region is; indices 0 to 8, others are empty.
    fn region(&self, index: u32) -> RegionInfo;
    /// Vectors of an interrupt kind.
    fn irq_count(&self, index: u32) -> u32;
    /// A client is there. Waking `line` makes its worker call `take_signals` and send them.
    ///
    /// # Errors
    /// [`Error::Busy`] while the member is attached to another front end.
    fn attach(&self, line: SourceHandle) -> Result<(), Error>;
    /// The client is gone: rings stop, memory and eventfds are let go of. `done` is dropped when nothing is used any more.
    fn detach(&self, done: Completion);
    /// Reads a region. Offset and length have been checked against its size.
    fn read(&self, region: u32, offset: u64, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access;
    /// Writes a region. Offset and length have been checked against its size.
    fn write(&self, region: u32, offset: u64, data: &[u8], wake: &dyn Fn() -> Waker) -> Access;
    /// Goes on with the access that was [`Access::Later`]; `data` is that of a read.
    fn resume(&self, data: &mut [u8], wake: &dyn Fn() -> Waker) -> Access;
    /// The access that was [`Access::Later`] has been answered without waiting any longer; what it does may still come.
    fn give_up(&self);
    /// Guest memory that the function may use; guest address and user address are both the IOVA.
    ///
    /// # Errors
    /// `memory.*`.
    fn dma_map(&self, region: Region) -> Result<(), Fault>;
    /// Memory that it may not use any more. When the access is done no worker looks there.
    ///
    /// # Errors
    /// `memory.unknown-region`.
    fn dma_unmap(&self, iova: u64, size: u64, wake: &dyn Fn() -> Waker) -> Result<Access, Fault>;
    /// Interrupts.
    ///
    /// # Errors
    /// An errno.
    fn set_irqs(&self, change: IrqChange) -> Result<(), i32>;
    /// Function reset.
    fn reset(&self, wake: &dyn Fn() -> Waker) -> Access;
    /// Interrupts to be sent on behalf of the control side: configuration changes, INTx that is still pending after unmask.
    fn take_signals(&self, to: &mut Vec<Arc<OwnedFd>>);
}
