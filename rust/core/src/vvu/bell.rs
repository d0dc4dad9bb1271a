// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Notifications from one virtual machine to another: an eventfd, or an access to a register, on one side, and an eventfd on
//! the other. A worker forwards; nothing is kept but that there was one, as with eventfds themselves.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::event::Completion;
use crate::runner::Call;
use crate::sys;
use crate::worker::{Flow, Interest, Pool, Source, SourceHandle, SourceIo};

/// A way for notifications, in one direction.
#[derive(Default)]
pub struct Bell {
    to: Mutex<Option<Call>>,
    from: Mutex<Option<SourceHandle>>,
    rung: AtomicU64,
    ignored: AtomicU64,
    /// What comes while notifications go nowhere is kept for when they go somewhere again.
    patient: bool,
    /// Something is kept.
    waiting: AtomicBool,
}

impl Bell {
    /// One whose other side may be away for a while (a paused guest): what comes meanwhile is not lost.
    pub fn patient() -> Self {
        Self {
            patient: true,
            ..Self::default()
        }
    }

    /// Where notifications go from now on; None: nowhere.
    pub fn set_to(&self, to: Option<Call>) {
        let somewhere = to.as_ref().is_some_and(|call| self.reaches(call));
        *self.to.lock().unwrap_or_else(PoisonError::into_inner) = to;
        // In this order: who rings at the same time either finds the new place, or has left its word before this.
        if somewhere && self.waiting.load(Ordering::SeqCst) {
            if let Some(from) = &*self.from.lock().unwrap_or_else(PoisonError::into_inner) {
                from.wake();
            }
        }
    }

    /// Whether there is somebody on the other side. Interrupts that are being set up again have no eventfd for a moment.
    fn reaches(&self, call: &Call) -> bool {
        !self.patient || call.fd.is_some() || call.isr.is_some()
    }

    /// Whether notifications go anywhere.
    pub fn is_connected(&self) -> bool {
        self.to.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Takes notifications from an eventfd from now on, or no more.
    pub fn set_from(self: &Arc<Self>, pool: &Pool, fd: Option<Arc<OwnedFd>>) {
        let mut from = self.from.lock().unwrap_or_else(PoisonError::into_inner);
        // First: an epoll takes an eventfd once, and it may be the same one again.
        if let Some(before) = from.take() {
            before.remove(Completion::call(|| {}));
        }
        // Before the new eventfd can be heard: a word that it has left must not be lost. One that the old one leaves late is a
        // notification too many, which is harmless.
        self.waiting.store(false, Ordering::SeqCst);
        *from = fd.map(|fd| {
            let bell = Arc::clone(self);
            pool.add_source(|_| Box::new(Ringer { fd, bell }))
        });
    }

    /// A notification: the eventfd to signal, if it is to be seen on the other side.
    pub fn ring(&self) -> Option<Arc<OwnedFd>> {
        self.rung.fetch_add(1, Ordering::Relaxed);
        self.pass_on(true)
    }

    /// What was kept, if there is somebody for it now.
    fn kept(&self) -> Option<Arc<OwnedFd>> {
        if self.waiting.load(Ordering::SeqCst) {
            self.pass_on(false)
        } else {
            None
        }
    }

    fn pass_on(&self, new: bool) -> Option<Arc<OwnedFd>> {
        let to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Call { fd, isr }) = to.as_ref().filter(|call| self.reaches(call)) else {
            if self.patient {
                self.waiting.store(true, Ordering::SeqCst);
            } else if new {
                self.ignored.fetch_add(1, Ordering::Relaxed);
            }
            return None;
        };
        self.waiting.store(false, Ordering::SeqCst);
        if let Some((isr, bits)) = isr {
            // Before the signal: the interrupt's handler looks there.
            isr.fetch_or(*bits, Ordering::Release);
        }
        if fd.is_none() && isr.is_none() {
            self.ignored.fetch_add(1, Ordering::Relaxed);
        }
        fd.clone()
    }

    /// Notifications, and how many of them nobody was there for.
    pub fn counts(&self) -> (u64, u64) {
        (self.rung.load(Ordering::Relaxed), self.ignored.load(Ordering::Relaxed))
    }
}

/// An eventfd that rings a bell.
struct Ringer {
    fd: Arc<OwnedFd>,
    bell: Arc<Bell>,
}

impl Source for Ringer {
    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    fn edge(&self) -> bool {
        true
    }

    fn interest(&self) -> Interest {
        Interest {
            read: true,
            write: false,
        }
    }

    fn ready(&mut self, io: &mut SourceIo<'_>) -> Flow {
        let fd = if sys::eventfd_drain(self.fd.as_raw_fd()) {
            self.bell.ring()
        } else {
            self.bell.kept()
        };
        if let Some(fd) = fd {
            io.signal(&fd);
        }
        Flow::Wait
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn end(&mut self) {}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::FromRawFd;
    use std::time::Duration;

    use super::*;

    /// Rings and waits for the other end, `count` times.
    fn ring_through(to: OwnedFd, count: u32) {
        let pool = Pool::new(Some(1)).unwrap();
        let from = sys::eventfd().unwrap();
        let bell = Arc::new(Bell::default());
        bell.set_to(Some(Call::eventfd(Some(to.try_clone().unwrap()))));
        bell.set_from(&pool, Some(Arc::new(from.try_clone().unwrap())));
        for n in 0..count {
            sys::eventfd_signal(&from);
            sys::wait_readable_for(&[to.as_raw_fd()], Some(Duration::from_secs(5)));
            assert!(
                sys::eventfd_drain(to.as_raw_fd()),
                "notification {n} of {count} is lost"
            );
        }
        assert_eq!(bell.counts(), (u64::from(count), 0));
    }

    /// A front end that enables a ring twice.
    #[test]
    fn the_same_eventfd_can_be_set_again() {
        let pool = Pool::new(Some(1)).unwrap();
        let (from, to) = (Arc::new(sys::eventfd().unwrap()), sys::eventfd().unwrap());
        let bell = Arc::new(Bell::default());
        bell.set_to(Some(Call::eventfd(Some(to.try_clone().unwrap()))));
        for _ in 0..2 {
            bell.set_from(&pool, Some(Arc::clone(&from)));
        }
        sys::eventfd_signal(&from);
        sys::wait_readable_for(&[to.as_raw_fd()], Some(Duration::from_secs(5)));
        assert!(sys::eventfd_drain(to.as_raw_fd()));
    }

    #[test]
    fn every_notification_arrives() {
        ring_through(sys::eventfd().unwrap(), 2000);
    }

    /// io_uring writes these from another thread: the peer has seen one, and causes the next, before we know.
    #[test]
    fn every_notification_arrives_at_a_blocking_eventfd() {
        // SAFETY: a new eventfd that nobody else knows.
        let to = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        ring_through(to, 2000);
    }
}
