// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The server's side of one vfio-user connection, without the socket.
//!
//! Whole commands with their fds go in; an [`Outcome`] says whether there is a reply to send. What a function can't do at
//! once is deferred: nothing else may be handed in before [`Session::resume`] or [`Session::expire`] has ended it.
//!
//! A command that makes no sense gets an errno and changes nothing; a client that breaks the protocol itself (no version
//! first) is a fault, and the end of its connection. Nothing that asks for no reply ever gets one.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use super::dma::DmaTable;
use super::function::{Access, IrqChange, PciFunction, RegionInfo, IRQS, IRQ_INTX, IRQ_MSIX, REGIONS};
use super::wire::{self, command, DmaMap, DmaUnmap, Header, IrqAction, IrqData, IrqSet, RegionAccess, Version};
use crate::error::Fault;
use crate::event::Waker;
use crate::memory::{MappingCache, Region, RemoteMemory};
use crate::sys::PeerFd;

/// Failed DMA_MAPs of a connection that are logged, with their reason: the client only sees an errno.
const COMPLAINTS: u32 = 4;

/// What is counted. Written by the connection's worker only, read by anybody.
#[derive(Default)]
pub struct Counters {
    /// Commands taken.
    pub messages: AtomicU64,
    /// Region reads.
    pub reads: AtomicU64,
    /// Region writes, each of WRITE_MULTI too.
    pub writes: AtomicU64,
    /// Commands that failed, and connections that broke the protocol.
    pub errors: AtomicU64,
}

/// Adds one. There is one writer, so this needs no atomic read-modify-write.
pub(super) fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// What a session needs to have lent to it.
pub struct Context<'a> {
    /// Guest memory mapped by this process.
    pub mappings: &'a MappingCache,
    /// How to reach memory that comes without an fd.
    pub remote: &'a Arc<dyn RemoteMemory>,
    /// Makes what calls us again when a deferred command can go on.
    pub wake: &'a dyn Fn() -> Waker,
}

/// What is to be done after a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Silent,
    /// Send [`Session::reply`].
    Reply,
    /// Send [`Session::reply`], if there is one, then close the connection.
    Last(Fault),
    /// Call [`Session::resume`] when the waker was called, or [`Session::expire`] when it takes too long.
    Deferred,
}

/// A change of the eventfd by which the client says that it wants INTx again.
pub enum UnmaskFd {
    /// This one, from now on.
    Set(OwnedFd),
    /// None any more.
    Clear,
}

/// A command in the middle.
struct Deferred {
    header: Header,
    work: Work,
}

enum Work {
    /// The reply is complete but for the data.
    Read,
    /// The reply is complete.
    Write,
    /// Writes from `next` on are still to be done; the one before is under way.
    Multi {
        entries: Vec<u8>,
        next: usize,
        failed: Option<i32>,
    },
    /// The range at `current` is under way.
    Unmap { current: u64, rest: Vec<(u64, u64)> },
    /// The reply is complete.
    Reset,
}

/// How far a command has come.
enum Progress {
    Done,
    Failed(i32),
    Later(Work),
}

impl From<Result<(), i32>> for Progress {
    fn from(result: Result<(), i32>) -> Self {
        match result {
            Ok(()) => Progress::Done,
            Err(errno) => Progress::Failed(errno),
        }
    }
}

/// The errno for what is wrong with a DMA_MAP.
fn errno(fault: &Fault) -> i32 {
    match fault.rule {
        "memory.overlap" => libc::EEXIST,
        "memory.slots" => libc::ENOSPC,
        "memory.unknown-region" => libc::ENOENT,
        "memory.map" => libc::ENOMEM,
        _ => libc::EINVAL,
    }
}

/// One connection.
pub struct Session {
    function: Arc<dyn PciFunction>,
    counters: Arc<Counters>,
    regions: [RegionInfo; REGIONS as usize],
    agreed: Option<wire::Agreed>,
    dma: DmaTable,
    deferred: Option<Deferred>,
    reply: Vec<u8>,
    reply_fd: Option<Arc<OwnedFd>>,
    unmask: Option<UnmaskFd>,
    complaints: u32,
}

impl Session {
    /// A connection that nothing was said on. The function must have been attached.
    pub fn new(function: Arc<dyn PciFunction>, counters: Arc<Counters>) -> Self {
        // Fewer than 2^32.
        let regions = std::array::from_fn(|index| function.region(index as u32));
        Self {
            function,
            counters,
            regions,
            agreed: None,
            dma: DmaTable::default(),
            deferred: None,
            reply: Vec::new(),
            reply_fd: None,
            unmask: None,
            complaints: 0,
        }
    }

    /// The last reply, a whole message. The caller may swap it for another vector.
    pub fn reply(&mut self) -> &mut Vec<u8> {
        &mut self.reply
    }

    /// The fd that goes with the last reply, if one does.
    pub fn take_reply_fd(&mut self) -> Option<Arc<OwnedFd>> {
        self.reply_fd.take()
    }

    /// What was agreed, once it was.
    pub fn agreed(&self) -> Option<wire::Agreed> {
        self.agreed
    }

    /// Whether a command is in the middle.
    pub fn is_deferred(&self) -> bool {
        self.deferred.is_some()
    }

    /// A change of the eventfd that unmasks INTx, if the last command brought one.
    pub fn take_unmask(&mut self) -> Option<UnmaskFd> {
        self.unmask.take()
    }

    /// Takes one command, which must not be in the middle of another. The fds are consumed.
    pub fn handle(&mut self, header: &Header, body: &[u8], fds: Vec<PeerFd>, context: &Context<'_>) -> Outcome {
        count(&self.counters.messages);
        // Of a command whose reply nobody wanted.
        self.reply_fd = None;
        if self.agreed.is_none() && header.command != command::VERSION {
            let reason = format!("command {} before the version", header.command);
            self.reply.clear();
            return Outcome::Last(Fault::new("message.order", reason));
        }
        let takes_fds = matches!(header.command, command::DMA_MAP | command::DEVICE_SET_IRQS);
        if !fds.is_empty() && !takes_fds {
            return self.conclude(header, Progress::Failed(libc::EINVAL));
        }
        header.begin_reply(&mut self.reply);
        let progress = match header.command {
            command::REGION_READ => self.region_read(body, context),
            command::REGION_WRITE => self.region_write(body, context),
            command::REGION_WRITE_MULTI => self.write_multi(body, context),
            command::VERSION => return self.version(header, body),
            command::DMA_MAP => self.dma_map(body, fds, context).into(),
            command::DMA_UNMAP => self.dma_unmap(body, context),
            command::DEVICE_GET_INFO => self.device_info(body).into(),
            command::DEVICE_GET_REGION_INFO => self.region_info(body).into(),
            command::DEVICE_GET_REGION_IO_FDS => self.io_fds(body).into(),
            command::DEVICE_GET_IRQ_INFO => self.irq_info(body).into(),
            command::DEVICE_SET_IRQS => self.set_irqs(body, fds).into(),
            command::DEVICE_RESET => self.reset(body, context),
            _ => Progress::Failed(libc::ENOTSUP),
        };
        self.conclude(header, progress)
    }

    /// Goes on with the deferred command.
    pub fn resume(&mut self, context: &Context<'_>) -> Outcome {
        let Some(Deferred { header, work }) = self.deferred.take() else {
            return Outcome::Silent;
        };
        let data = match &work {
            Work::Read => self.reply.get_mut(READ_DATA..).unwrap_or_default(),
            _ => &mut [],
        };
        let access = self.function.resume(data, context.wake);
        let progress = self.proceed(work, access, context);
        self.conclude(&header, progress)
    }

    /// Answers the deferred command although it isn't done: the client would wait too long, and QEMU takes a late reply for
    /// a broken stream. A read has failed. What a write or a reset does will still come, so they have not. Memory that is
    /// still in use must not be reported as free.
    pub fn expire(&mut self, context: &Context<'_>) -> Outcome {
        let Some(Deferred { header, work }) = self.deferred.take() else {
            return Outcome::Silent;
        };
        self.function.give_up();
        let access = match work {
            Work::Read | Work::Unmap { .. } => Access::Refused(libc::ETIMEDOUT),
            Work::Write | Work::Multi { .. } | Work::Reset => Access::Done,
        };
        let progress = self.proceed(work, access, context);
        self.conclude(&header, progress)
    }

    /// The client is gone: nobody waits for the deferred command any more.
    pub fn abandon(&mut self) {
        if self.deferred.take().is_some() {
            self.function.give_up();
        }
    }

    /// Goes on with a command after its present step.
    fn proceed(&mut self, work: Work, access: Access, context: &Context<'_>) -> Progress {
        if access == Access::Later {
            return Progress::Later(work);
        }
        match work {
            Work::Multi { entries, next, failed } => {
                let failed = match access {
                    Access::Refused(errno) => failed.or(Some(errno)),
                    _ => failed,
                };
                self.write_rest(&entries, next, failed, context)
            }
            Work::Unmap { current, rest } => {
                // Also when it takes too long: the function will let go of it.
                self.dma.remove(current);
                match access {
                    Access::Refused(errno) => Progress::Failed(errno),
                    _ => self.unmap_rest(rest, context),
                }
            }
            Work::Read | Work::Write | Work::Reset => match access {
                Access::Refused(errno) => Progress::Failed(errno),
                _ => Progress::Done,
            },
        }
    }

    fn conclude(&mut self, header: &Header, progress: Progress) -> Outcome {
        match progress {
            Progress::Done => wire::finish(&mut self.reply),
            Progress::Failed(errno) => {
                count(&self.counters.errors);
                header.error_reply(errno, &mut self.reply);
            }
            Progress::Later(work) => {
                let header = *header;
                self.deferred = Some(Deferred { header, work });
                return Outcome::Deferred;
            }
        }
        if header.no_reply() {
            Outcome::Silent
        } else {
            Outcome::Reply
        }
    }

    fn version(&mut self, header: &Header, body: &[u8]) -> Outcome {
        if self.agreed.is_some() {
            return self.conclude(header, Progress::Failed(libc::EINVAL));
        }
        let agreed = Version::parse(body).and_then(|version| version.answer(&mut self.reply));
        match agreed {
            Ok(agreed) => {
                self.agreed = Some(agreed);
                self.conclude(header, Progress::Done)
            }
            Err(reason) => {
                self.conclude(header, Progress::Failed(libc::EINVAL));
                if header.no_reply() {
                    self.reply.clear();
                }
                Outcome::Last(Fault::new("message.version", reason))
            }
        }
    }

    /// Checks an access against its region.
    #[inline]
    fn check(&self, access: &RegionAccess, write: bool) -> Result<(), i32> {
        let region = self.regions.get(access.region as usize).ok_or(libc::EINVAL)?;
        if access.count as usize > wire::MAX_DATA {
            return Err(libc::E2BIG);
        }
        let end = access.offset.checked_add(u64::from(access.count));
        if end.is_none_or(|end| end > region.size) {
            return Err(libc::EINVAL);
        }
        if (write && !region.writable) || (!write && !region.readable) {
            return Err(libc::EPERM);
        }
        Ok(())
    }

    #[inline]
    fn region_read(&mut self, body: &[u8], context: &Context<'_>) -> Progress {
        let Some((access, [])) = RegionAccess::parse(body) else {
            return Progress::Failed(libc::EINVAL);
        };
        if let Err(errno) = self.check(&access, false) {
            return Progress::Failed(errno);
        }
        count(&self.counters.reads);
        access.encode(&mut self.reply);
        self.reply.resize(READ_DATA + access.count as usize, 0);
        if access.count == 0 {
            return Progress::Done;
        }
        let data = &mut self.reply[READ_DATA..];
        let done = self.function.read(access.region, access.offset, data, context.wake);
        self.proceed(Work::Read, done, context)
    }

    #[inline]
    fn region_write(&mut self, body: &[u8], context: &Context<'_>) -> Progress {
        let Some((access, data)) = RegionAccess::parse(body) else {
            return Progress::Failed(libc::EINVAL);
        };
        if data.len() != access.count as usize {
            return Progress::Failed(libc::EINVAL);
        }
        access.encode(&mut self.reply);
        let done = self.write(&access, data, context);
        self.proceed(Work::Write, done, context)
    }

    #[inline]
    fn write(&self, access: &RegionAccess, data: &[u8], context: &Context<'_>) -> Access {
        if let Err(errno) = self.check(access, true) {
            return Access::Refused(errno);
        }
        count(&self.counters.writes);
        if data.is_empty() {
            return Access::Done;
        }
        self.function.write(access.region, access.offset, data, context.wake)
    }

    fn write_multi(&mut self, body: &[u8], context: &Context<'_>) -> Progress {
        if !self.agreed.is_some_and(|agreed| agreed.write_multiple) {
            return Progress::Failed(libc::ENOTSUP);
        }
        let Some(entries) = wire::multi_entries(body) else {
            return Progress::Failed(libc::EINVAL);
        };
        let total = entries.len() / wire::MULTI_ENTRY;
        if total > wire::MAX_WRITES {
            return Progress::Failed(libc::E2BIG);
        }
        wire::multi_reply(&mut self.reply, total as u64);
        self.write_rest(entries, 0, None, context)
    }

    /// The writes of WRITE_MULTI from `next` on. Each stands for a message of its own that nobody waits for, so one that
    /// fails doesn't keep the others from being done; the first failure is reported.
    fn write_rest(
        &mut self,
        entries: &[u8],
        mut next: usize,
        mut failed: Option<i32>,
        context: &Context<'_>,
    ) -> Progress {
        while let Some((access, data)) = wire::multi_entry(entries, next) {
            next += 1;
            let done = if data.len() == access.count as usize {
                self.write(&access, data, context)
            } else {
                Access::Refused(libc::EINVAL)
            };
            match done {
                Access::Done => {}
                Access::Refused(errno) => failed = failed.or(Some(errno)),
                Access::Later => {
                    return Progress::Later(Work::Multi {
                        entries: entries.to_vec(),
                        next,
                        failed,
                    })
                }
            }
        }
        failed.map_or(Progress::Done, Progress::Failed)
    }

    fn dma_map(&mut self, body: &[u8], mut fds: Vec<PeerFd>, context: &Context<'_>) -> Result<(), i32> {
        let map = DmaMap::parse(body)
            .filter(|map| map.argsz as usize >= DmaMap::SIZE)
            .ok_or(libc::EINVAL)?;
        let known = wire::DMA_READABLE | wire::DMA_WRITABLE;
        if map.flags == 0 || map.flags & !known != 0 || fds.len() > 1 {
            return Err(libc::EINVAL);
        }
        let fd = fds.pop();
        let remote = fd.is_none();
        self.dma.check(map.iova, map.size, remote)?;
        let writable = map.flags & wire::DMA_WRITABLE != 0;
        let region = match &fd {
            Some(fd) if writable => context.mappings.region(fd, map.iova, map.size, map.iova, map.offset),
            Some(fd) => context.mappings.read_only_region(fd, map.iova, map.size, map.offset),
            None => Region::shadow(map.iova, map.size, writable, Arc::clone(context.remote)),
        };
        if let Err(fault) = region.and_then(|region| self.function.dma_map(region)) {
            if self.complaints < COMPLAINTS {
                self.complaints += 1;
                log::warn!("{}: DMA_MAP refused: {fault}", self.function.label());
            }
            return Err(errno(&fault));
        }
        self.dma.insert(map.iova, map.size, remote);
        Ok(())
    }

    fn dma_unmap(&mut self, body: &[u8], context: &Context<'_>) -> Progress {
        let unmap = DmaUnmap::parse(body).filter(|unmap| unmap.argsz as usize >= DmaUnmap::SIZE);
        let Some(unmap) = unmap else {
            return Progress::Failed(libc::EINVAL);
        };
        let ranges = match unmap.flags {
            0 => self.dma.inside(unmap.iova, unmap.size),
            wire::UNMAP_ALL if unmap.iova == 0 && unmap.size == 0 => Ok(self.dma.all()),
            flags if flags & wire::UNMAP_GET_DIRTY != 0 => Err(libc::ENOTSUP),
            _ => Err(libc::EINVAL),
        };
        match ranges {
            Ok(ranges) => {
                // The reply says again what was unmapped.
                self.reply.extend_from_slice(body);
                self.unmap_rest(ranges, context)
            }
            Err(errno) => Progress::Failed(errno),
        }
    }

    fn unmap_rest(&mut self, mut rest: Vec<(u64, u64)>, context: &Context<'_>) -> Progress {
        while let Some((iova, size)) = rest.pop() {
            match self.function.dma_unmap(iova, size, context.wake) {
                Ok(Access::Done) => self.dma.remove(iova),
                Ok(Access::Later) => return Progress::Later(Work::Unmap { current: iova, rest }),
                Ok(Access::Refused(errno)) => return Progress::Failed(errno),
                Err(fault) => {
                    self.dma.remove(iova);
                    return Progress::Failed(errno(&fault));
                }
            }
        }
        Progress::Done
    }

    fn device_info(&mut self, body: &[u8]) -> Result<(), i32> {
        wire::argsz(body, wire::DEVICE_INFO_SIZE).ok_or(libc::EINVAL)?;
        wire::device_info(&mut self.reply, REGIONS, IRQS);
        Ok(())
    }

    /// The index that a body of `size` bytes asks about.
    fn index(body: &[u8], size: usize, below: u32) -> Result<u32, i32> {
        wire::argsz(body, size)
            .and_then(|_| wire::index(body))
            .filter(|&index| index < below)
            .ok_or(libc::EINVAL)
    }

    fn region_info(&mut self, body: &[u8]) -> Result<(), i32> {
        let index = Self::index(body, wire::REGION_INFO_SIZE, REGIONS)?;
        let room = wire::argsz(body, wire::REGION_INFO_SIZE).ok_or(libc::EINVAL)?;
        let region = &self.regions[index as usize];
        // Only with the whole answer: a client that has to ask again would get the fd twice, and QEMU closes the first.
        if wire::region_info(&mut self.reply, index, room, region) {
            self.reply_fd = region.mappable.as_ref().map(|mappable| Arc::clone(&mappable.file));
        }
        Ok(())
    }

    fn io_fds(&mut self, body: &[u8]) -> Result<(), i32> {
        let index = Self::index(body, wire::IO_FDS_SIZE, REGIONS)?;
        if wire::io_fds_flags(body) != Some(0) {
            return Err(libc::EINVAL);
        }
        wire::io_fds(&mut self.reply, index);
        Ok(())
    }

    fn irq_info(&mut self, body: &[u8]) -> Result<(), i32> {
        let index = Self::index(body, wire::IRQ_INFO_SIZE, IRQS)?;
        // Never NORESIZE: QEMU would take all vectors down and up again for each one that a driver adds.
        let flags = match index {
            IRQ_INTX => wire::IRQ_EVENTFD | wire::IRQ_MASKABLE | wire::IRQ_AUTOMASKED,
            _ => wire::IRQ_EVENTFD,
        };
        let count = self.function.irq_count(index);
        if count == 0 && index > IRQ_MSIX {
            // What came to PCI later is refused where it isn't there, as a kernel does: QEMU warns its user about a device
            // that has error interrupts, but none of them.
            return Err(libc::EINVAL);
        }
        wire::irq_info(&mut self.reply, index, flags, count);
        Ok(())
    }

    fn set_irqs(&mut self, body: &[u8], fds: Vec<PeerFd>) -> Result<(), i32> {
        let set = IrqSet::parse(body).ok_or(libc::EINVAL)?;
        let IrqSet {
            index, start, count, ..
        } = set;
        if index >= IRQS || (set.data != IrqData::Eventfd && !fds.is_empty()) || fds.len() > count as usize {
            return Err(libc::EINVAL);
        }
        if count == 0 {
            // The one meaning that nothing can have.
            if set.data != IrqData::None || set.action != IrqAction::Trigger || start != 0 {
                return Err(libc::EINVAL);
            }
            if index == IRQ_INTX {
                self.unmask = Some(UnmaskFd::Clear);
            }
            return self.function.set_irqs(IrqChange::Disable { index });
        }
        let end = start.checked_add(count).ok_or(libc::EINVAL)?;
        if end > self.function.irq_count(index) {
            return Err(libc::EINVAL);
        }
        match set.data {
            IrqData::None => self.function.set_irqs(act(set.action, index, start, count)),
            IrqData::Bool => {
                // One change for each run of those that are meant.
                let mut at = 0;
                for run in set.bools.chunk_by(|a, b| (*a != 0) == (*b != 0)) {
                    let length = run.len() as u32;
                    if run[0] != 0 {
                        self.function.set_irqs(act(set.action, index, start + at, length))?;
                    }
                    at += length;
                }
                Ok(())
            }
            IrqData::Eventfd => {
                let mut eventfds = Vec::with_capacity(fds.len());
                for fd in fds {
                    eventfds.push(fd.into_eventfd().ok_or(libc::EINVAL)?);
                }
                match set.action {
                    IrqAction::Trigger => {
                        // Those beyond the fds have none.
                        let mut fds: Vec<_> = eventfds.into_iter().map(|fd| Some(Arc::new(fd))).collect();
                        fds.resize(count as usize, None);
                        self.function.set_irqs(IrqChange::Assign { index, start, fds })
                    }
                    IrqAction::Unmask if index == IRQ_INTX => {
                        self.unmask = Some(eventfds.pop().map_or(UnmaskFd::Clear, UnmaskFd::Set));
                        Ok(())
                    }
                    IrqAction::Unmask | IrqAction::Mask => Err(libc::ENOTSUP),
                }
            }
        }
    }

    fn reset(&mut self, body: &[u8], context: &Context<'_>) -> Progress {
        if !body.is_empty() {
            return Progress::Failed(libc::EINVAL);
        }
        let done = self.function.reset(context.wake);
        self.proceed(Work::Reset, done, context)
    }
}

/// Where the data of a read's reply starts.
const READ_DATA: usize = wire::HEADER_SIZE + RegionAccess::SIZE;

fn act(action: IrqAction, index: u32, start: u32, count: u32) -> IrqChange {
    match action {
        IrqAction::Mask => IrqChange::Mask { index, start, count },
        IrqAction::Unmask => IrqChange::Unmask { index, start, count },
        IrqAction::Trigger => IrqChange::Trigger { index, start, count },
    }
}
