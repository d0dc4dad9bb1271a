// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thin layer over one io_uring: device operations and interrupts (writes to call eventfds) go through it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{cqueue, opcode, squeue, types, IoUring};

use crate::device::IoOp;

/// Bytes from which a transfer is large.
const LARGE: u64 = 1 << 20;
static ONE: u64 = 1;

/// Submission and completion of asynchronous operations on one thread.
pub struct Uring {
    ring: IoUring,
    /// What the submission queue had no room for.
    backlog: VecDeque<squeue::Entry>,
    /// An unexpected error has been logged.
    complained: bool,
}

impl Uring {
    /// A ring for `entries` submissions at a time (any number may be in flight).
    ///
    /// # Errors
    /// When the kernel has no io_uring or forbids it.
    pub fn new(entries: u32) -> io::Result<Self> {
        // COOP_TASKRUN (5.19) and SINGLE_ISSUER (6.0) save interrupts of this thread; older kernels go without.
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_single_issuer()
            .setup_cqsize(entries * 4)
            .build(entries)
            .or_else(|_| IoUring::builder().setup_cqsize(entries * 4).build(entries))?;
        Ok(Self {
            ring,
            backlog: VecDeque::new(),
            complained: false,
        })
    }

    /// The fd that is readable while completions wait.
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    fn push(&mut self, entry: squeue::Entry) {
        self.backlog.push_back(entry);
        self.fill();
        if !self.backlog.is_empty() {
            self.submit();
        }
    }

    /// Moves the backlog to the submission queue as far as there is room.
    fn fill(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: buffers and fds of an operation outlive it: a runner keeps requests with their buffers, images
            // and memory maps, and its call eventfd, until the completion has been reaped, and is itself kept until it
            // waits for none (Runner::idle).
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Queues an operation; `user_data` comes back with its result.
    ///
    /// Large transfers go to the kernel's worker threads at once: out of the page cache they would be copied here and
    /// now, and hold up everybody else this thread serves.
    pub fn queue(&mut self, op: &IoOp, user_data: u64) {
        let entry = match *op {
            IoOp::Readv {
                fd, iov, count, offset, ..
            } => opcode::Readv::new(types::Fd(fd), iov, count).offset(offset).build(),
            IoOp::Writev {
                fd,
                iov,
                count,
                offset,
                dsync,
                ..
            } => opcode::Writev::new(types::Fd(fd), iov, count)
                .offset(offset)
                .rw_flags(if dsync { libc::RWF_DSYNC } else { 0 })
                .build(),
            IoOp::Fdatasync { fd } => opcode::Fsync::new(types::Fd(fd))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            IoOp::Fallocate { fd, mode, offset, len } => opcode::Fallocate::new(types::Fd(fd), len)
                .offset(offset)
                .mode(mode)
                .build(),
            IoOp::Yield => opcode::Nop::new().build(),
        };
        let large = matches!(*op, IoOp::Readv { bytes, .. } | IoOp::Writev { bytes, .. } if bytes > LARGE);
        let flags = if large {
            squeue::Flags::ASYNC
        } else {
            squeue::Flags::empty()
        };
        self.push(entry.flags(flags).user_data(user_data));
    }

    /// Queues an interrupt: one is added to the call eventfd. The fd must stay open until `user_data` comes back.
    ///
    /// Why not a plain write: the eventfd is the front end's, which can clear O_NONBLOCK and fill the counter; a
    /// write would then block this worker and every member it serves. io_uring waits elsewhere.
    pub fn signal(&mut self, fd: RawFd, user_data: u64) {
        let entry = opcode::Write::new(types::Fd(fd), (&raw const ONE).cast(), 8).build();
        self.push(entry.user_data(user_data));
    }

    /// Asks the kernel to give up on the operation `target`; it then completes with an error. The request to do so
    /// completes as `user_data`.
    pub fn cancel(&mut self, target: u64, user_data: u64) {
        self.push(opcode::AsyncCancel::new(target).build().user_data(user_data));
    }

    /// Hands what is queued to the kernel. Operations that can end at once have ended when this returns. What the kernel
    /// doesn't take at the moment stays queued.
    pub fn submit(&mut self) {
        loop {
            self.fill();
            if self.ring.submission().is_empty() {
                return;
            }
            match self.ring.submit() {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The completion queue is full or memory is short: later.
                    Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => return,
                    _ => {
                        if !std::mem::replace(&mut self.complained, true) {
                            log::error!("io_uring_enter: {e}");
                        }
                        return;
                    }
                },
            }
        }
    }

    /// Submits and waits for one completion. For users without an event loop.
    ///
    /// # Errors
    /// What the kernel says, but for an interruption. A ring belongs to the thread that made it: elsewhere it fails.
    pub fn wait(&mut self) -> io::Result<()> {
        self.fill();
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => {
                // The kernel can't take more at the moment; what it has goes on.
                std::thread::sleep(std::time::Duration::from_millis(1));
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Whether something is queued that the kernel hasn't taken.
    pub fn has_queued(&mut self) -> bool {
        !self.backlog.is_empty() || !self.ring.submission().is_empty()
    }

    /// Moves what has completed to `done`, as (user data, result).
    pub fn reap(&mut self, done: &mut Vec<(u64, i32)>) {
        loop {
            let before = done.len();
            done.extend(
                self.ring
                    .completion()
                    .map(|entry: cqueue::Entry| (entry.user_data(), entry.result())),
            );
            // More completions than the queue has room for wait in the kernel, which hands them over only when it is
            // called for them.
            if !self.ring.submission().cq_overflow() {
                return;
            }
            if self.ring.submit().is_err() && done.len() == before {
                return;
            }
        }
    }
}
