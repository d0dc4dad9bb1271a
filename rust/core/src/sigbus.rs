// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Surviving a front end that truncates its memory file.
//!
//! Guest memory is a file that belongs to somebody else. Its size is checked when it is mapped, but the owner may
//! shrink it at any later moment, and the next access to the lost pages raises SIGBUS, which would end the process
//! and every other member with it. There is no way to forbid the shrinking (seals are the owner's to set) and no way
//! to check before each access without a race. So the signal is handled: a fault inside a registered mapping
//! replaces the lost part by anonymous zero pages, and marks the mapping as lost. The faulting instruction is then
//! restarted and finds zeroes; the worker sees the mark after its batch and breaks that member alone. A fault
//! anywhere else goes to whoever handled SIGBUS before.
//!
//! The handler runs in the middle of anything, so it uses only atomics, `mmap` (a plain system call) and a fixed
//! table. Entries are claimed and released by ordinary code under a lock; the handler never takes it.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// As many mappings as `vm.max_map_count` allows by default; the table is bss, untouched entries cost nothing.
const ENTRIES: usize = 1 << 16;

struct Entry {
    /// First address; 0 while the entry is free. Written last when claimed, first when released.
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    lost: AtomicBool,
}

#[allow(clippy::declare_interior_mutable_const)]
const FREE: Entry = Entry {
    start: AtomicUsize::new(0),
    end: AtomicUsize::new(0),
    page: AtomicUsize::new(0),
    lost: AtomicBool::new(false),
};

static TABLE: [Entry; ENTRIES] = [FREE; ENTRIES];
/// Entries at or above this one were never used: bounds the handler's search.
static HIGH: AtomicUsize = AtomicUsize::new(0);
static FREE_LIST: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// Who handled SIGBUS before us, for faults that aren't ours. Two words, written before the handler is installed.
static PREVIOUS_HANDLER: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
static PREVIOUS_SIGINFO: AtomicBool = AtomicBool::new(false);

/// A mapping's place in the table; released on drop.
pub(crate) struct Guard(usize);

impl Guard {
    /// Registers `[start, start + len)`, whose file has pages of `page` bytes. None when the table is full.
    pub(crate) fn register(start: usize, len: usize, page: usize) -> Option<Guard> {
        let mut free = lock();
        install();
        let index = free.pop().or_else(|| {
            let next = HIGH.load(Ordering::Relaxed);
            (next < ENTRIES).then(|| {
                HIGH.store(next + 1, Ordering::Release);
                next
            })
        })?;
        let entry = &TABLE[index];
        entry.lost.store(false, Ordering::Relaxed);
        entry.page.store(page, Ordering::Relaxed);
        entry.end.store(start + len, Ordering::Relaxed);
        entry.start.store(start, Ordering::Release);
        Some(Guard(index))
    }

    /// Whether part of the mapping was lost since it was registered.
    pub(crate) fn lost(&self) -> bool {
        TABLE[self.0].lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut free = lock();
        TABLE[self.0].start.store(0, Ordering::Release);
        free.push(self.0);
    }
}

fn lock() -> MutexGuard<'static, Vec<usize>> {
    FREE_LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Installs the handler if it isn't the current one. Called for each new mapping, because others (Python's
/// faulthandler for one) may install theirs after us; the newest comer before us becomes the fallback.
fn install() {
    let mut current = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asks for the current action, which the kernel writes into `current`.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), current.as_mut_ptr()) } != 0 {
        return;
    }
    // SAFETY: zeroed is a valid sigaction, and the kernel has written it.
    let current = unsafe { current.assume_init() };
    let ours = on_sigbus as *const () as usize;
    if current.sa_sigaction == ours {
        return;
    }
    PREVIOUS_SIGINFO.store(current.sa_flags & libc::SA_SIGINFO != 0, Ordering::Relaxed);
    PREVIOUS_HANDLER.store(current.sa_sigaction, Ordering::Release);
    // SAFETY: all-zero is a valid sigaction (empty mask); the fields that matter are set below.
    let mut action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    action.sa_sigaction = ours;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler has the SA_SIGINFO signature and is async-signal-safe (module comment).
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    // Sent by a process, not raised by an access: then there is no address.
    if code <= 0 {
        return fall_back(signal, info, context);
    }
    let high = HIGH.load(Ordering::Acquire).min(ENTRIES);
    for entry in &TABLE[..high] {
        let start = entry.start.load(Ordering::Acquire);
        let end = entry.end.load(Ordering::Relaxed);
        if start == 0 || address < start || address >= end {
            continue;
        }
        // Everything from the faulting page on is gone (a file is cut at its end), so replace it in one go.
        let page = entry.page.load(Ordering::Relaxed).max(4096);
        let from = address - (address - start) % page;
        // SAFETY: [from, end) lies inside a mapping of guest memory that is alive (its guard is registered), and
        // nothing but raw accesses goes there, for which zero pages are as good as any other content.
        let replaced = unsafe {
            libc::mmap(
                from as *mut libc::c_void,
                end - from,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if replaced != libc::MAP_FAILED {
            entry.lost.store(true, Ordering::Relaxed);
            return;
        }
    }
    fall_back(signal, info, context);
}

/// Not our fault: the previous handler's, or death as without us.
fn fall_back(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // Once only: a previous handler may itself fall back to what it found, which can be this one (Python's faulthandler,
    // enabled after the first mapping), and the two would pass a real fault back and forth for ever.
    let previous = PREVIOUS_HANDLER.swap(libc::SIG_DFL, Ordering::AcqRel);
    if previous == libc::SIG_DFL || previous == libc::SIG_IGN {
        // SAFETY: restores the default action and asks for it: the process dies of the signal, whether it came from a
        // fault or from kill(2).
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    } else if PREVIOUS_SIGINFO.load(Ordering::Relaxed) {
        // SAFETY: the value came from sigaction with SA_SIGINFO set, so it is a function of this type.
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute::<usize, _>(previous) };
        handler(signal, info, context);
    } else {
        // SAFETY: the value came from sigaction without SA_SIGINFO, so it is a function of this type.
        let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute::<usize, _>(previous) };
        handler(signal);
    }
}
