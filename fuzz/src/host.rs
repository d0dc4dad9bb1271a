// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A worker pool that all runs share, things to make fds of, and what must hold after each run.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::event::{Completion, Event, Waker};
use vhu_core::sys;
use vhu_core::worker::{Flow, Interest, Pool, Source, SourceHandle, SourceIo};

/// Nothing takes as long as this; what does is a hang.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The pool. Its threads live as long as the process, as in a real one.
pub fn pool() -> &'static Arc<Pool> {
    static POOL: OnceLock<Arc<Pool>> = OnceLock::new();
    POOL.get_or_init(|| Arc::new(Pool::new(Some(2)).expect("a pool: io_uring and eventfds are needed")))
}

pub fn memfd(size: u64) -> File {
    // SAFETY: a literal name; the fd is new and nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        File::from_raw_fd(fd)
    };
    file.set_len(size).expect("the size of a memfd");
    file
}

pub fn blk(image: &str, queues: u16, queue_size: u16, read_only: bool) -> Arc<Blk> {
    let options = BlkOptions {
        queues,
        queue_size,
        blk_size: 512,
        serial: "fuzz".into(),
    };
    let image = Image::open(image, read_only).expect("an image");
    Arc::new(Blk::new(image, options).expect("a block device"))
}

/// Anything a peer may send.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Fd {
    /// The guest's memory.
    Guest,
    /// Some other memory, of so many pages.
    Memory(u8),
    /// A memory file that can only be read.
    ReadOnly,
    Event,
    /// An eventfd whose count never drains.
    Semaphore,
    /// An eventfd that can't be written without blocking.
    FullEvent,
    Pipe,
    Stream,
    /// A stream socket with an fd in its queue.
    Loaded,
    Null,
}

impl Fd {
    pub fn make(self, guest: &File) -> OwnedFd {
        let own = |file: File| OwnedFd::from(file);
        let eventfd = |count: u64, flags: i32| {
            // SAFETY: no pointers; the fd is new and nobody else's.
            let fd = unsafe { OwnedFd::from_raw_fd(checked(libc::eventfd(0, flags | libc::EFD_CLOEXEC))) };
            if count > 0 {
                // SAFETY: eight bytes of a local.
                unsafe { libc::write(fd.as_raw_fd(), (&raw const count).cast(), 8) };
            }
            fd
        };
        match self {
            Self::Guest => own(guest.try_clone().expect("an fd")),
            Self::Memory(pages) => own(memfd(u64::from(pages) << 12)),
            Self::ReadOnly => {
                let path = format!("/proc/self/fd/{}", guest.as_raw_fd());
                own(File::open(path).expect("another opening of a memfd"))
            }
            Self::Event => eventfd(0, 0),
            Self::Semaphore => eventfd(1 << 20, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK),
            Self::FullEvent => eventfd(u64::MAX - 1, 0),
            Self::Pipe => {
                let (reader, _) = std::io::pipe().expect("a pipe");
                reader.into()
            }
            Self::Stream => UnixStream::pair().expect("sockets").0.into(),
            Self::Loaded => {
                let (here, there) = UnixStream::pair().expect("sockets");
                send(here.as_raw_fd(), b"x", &[here.as_raw_fd()]);
                there.into()
            }
            Self::Null => own(File::open("/dev/null").expect("/dev/null")),
        }
    }
}

fn checked(result: i32) -> i32 {
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
    result
}

/// Sends bytes with fds; how many bytes went.
pub fn send(socket: RawFd, bytes: &[u8], fds: &[RawFd]) -> usize {
    #[repr(align(8))]
    struct Control([u8; 256]);
    let mut control = Control([0; 256]);
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all zeroes is a valid msghdr; the pointers set below are to locals that outlive the call, and the control
    // buffer is aligned and larger than CMSG_SPACE of the at most 32 fds.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        if !fds.is_empty() {
            let len = size_of_val(fds) as u32;
            assert!(libc::CMSG_SPACE(len) as usize <= control.0.len());
            message.msg_control = control.0.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as usize;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(header), len as usize);
        }
        let sent = libc::sendmsg(socket, &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL);
        usize::try_from(sent).unwrap_or(0)
    }
}

/// Waits for the completion `token`, throwing other events away.
///
/// # Panics
/// When it doesn't come.
pub fn wait_for(token: u64) {
    let events = pool().events();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let done = |event: &Event| matches!(event, Event::Done { token: this } if *this == token);
        if events.take().iter().any(done) {
            return;
        }
        assert!(Instant::now() < deadline, "completion {token} doesn't end");
        sys::wait_readable_for(&[events.fd()], Some(Duration::from_millis(100)));
    }
}

/// Counts calls of wakers and ends of completions.
#[derive(Clone, Default)]
pub struct Calls(Arc<AtomicUsize>);

impl Calls {
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }

    pub fn waker(&self) -> Waker {
        let calls = Arc::clone(&self.0);
        Box::new(move || {
            calls.fetch_add(1, Ordering::Release);
        })
    }

    pub fn completion(&self) -> Completion {
        Completion::call(self.waker())
    }

    /// Waits until there were more than `before`, doing `meanwhile` again and again.
    ///
    /// # Panics
    /// When there are none.
    pub fn wait(&self, before: usize, what: &str, mut meanwhile: impl FnMut()) {
        let deadline = Instant::now() + PATIENCE;
        let mut rounds = 0u32;
        while self.count() <= before {
            assert!(Instant::now() < deadline, "{what} doesn't end");
            meanwhile();
            rounds += 1;
            if rounds < 100 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }
}

/// A connection that nothing comes from.
struct Quiet(OwnedFd);

impl Source for Quiet {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
    fn interest(&self) -> Interest {
        Interest {
            read: true,
            write: false,
        }
    }
    fn ready(&mut self, _io: &mut SourceIo<'_>) -> Flow {
        Flow::Wait
    }
    fn deadline(&self) -> Option<Instant> {
        None
    }
    fn end(&mut self) {}
}

/// Stands for a client's connection: functions wake it.
pub fn line() -> &'static SourceHandle {
    static LINE: OnceLock<SourceHandle> = OnceLock::new();
    LINE.get_or_init(|| pool().add_source(|_| Box::new(Quiet(sys::eventfd().expect("an eventfd")))))
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Checks from time to time that no fd and no mapping stays behind. What is dropped on other threads gets time for it.
///
/// # Panics
/// When something does.
pub fn check_leaks() {
    const EVERY: usize = 16;
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    static BASE: OnceLock<usize> = OnceLock::new();
    let runs = RUNS.fetch_add(1, Ordering::Relaxed);
    // The first runs open what stays.
    line();
    if runs < EVERY || !runs.is_multiple_of(EVERY) {
        return;
    }
    let deadline = Instant::now() + PATIENCE;
    let mut fds = open_fds();
    let base = *BASE.get_or_init(|| {
        std::thread::sleep(Duration::from_millis(200));
        open_fds()
    });
    while fds > base || !pool().mappings().is_empty() {
        assert!(
            Instant::now() < deadline,
            "one of the last {EVERY} runs has left something behind: {fds} fds instead of {base}, {} mappings",
            pool().mappings().len()
        );
        std::thread::sleep(Duration::from_micros(200));
        fds = open_fds();
    }
}
