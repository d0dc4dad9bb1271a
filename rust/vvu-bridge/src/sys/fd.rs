// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Eventfds, epoll, timers, signals, UNIX sockets with fds.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use super::check;

/// Fds that one message can carry here: the regions of a memory table. Also the room for those that arrive.
const MAX_FDS: usize = 16;
/// Bytes of control data for them; CMSG_SPACE on 64-bit machines is 16 bytes of header and 8-byte rounding.
const CONTROL_BYTES: usize = 16 + MAX_FDS * size_of::<RawFd>();

/// Adopts an fd that a system call has just returned.
fn adopt(ret: libc::c_int) -> io::Result<OwnedFd> {
    let fd = check(ret)?;
    // SAFETY: the fd is new and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A non-blocking eventfd with a count.
///
/// # Errors
/// What eventfd(2) says: too many fds.
pub fn eventfd(count: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are involved.
    adopt(unsafe { libc::eventfd(count, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
}

/// Signals an eventfd. A full one is signalled already; there is nothing else that could fail.
pub fn eventfd_add(fd: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: the buffer has the 8 bytes.
    unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// Resets an eventfd (or reads a timer): whether it was signalled.
pub fn eventfd_take(fd: &OwnedFd) -> bool {
    let mut count = [0u8; 8];
    // SAFETY: the buffer has the 8 bytes.
    let read = unsafe { libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    read == 8
}

/// A one-shot timer with a resolution finer than epoll's milliseconds.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// A timer that isn't running.
    ///
    /// # Errors
    /// What timerfd_create(2) says.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        adopt(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) }).map(Self)
    }

    /// Lets it fire once after a while, at least a nanosecond.
    ///
    /// # Errors
    /// What timerfd_settime(2) says.
    pub fn start(&self, after: Duration) -> io::Result<()> {
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let value = libc::timespec {
            tv_sec: libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: after.subsec_nanos().max(1).into(),
        };
        let spec = libc::itimerspec {
            it_interval: none,
            it_value: value,
        };
        // SAFETY: the struct lives over the call; the old value isn't asked for.
        check(unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &spec, std::ptr::null_mut()) })?;
        Ok(())
    }

    /// Forgets that it fired.
    pub fn take(&self) {
        eventfd_take(&self.0);
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Blocks SIGTERM, SIGINT and SIGHUP in this thread and makes them readable.
///
/// # Errors
/// What the system calls say.
pub fn block_signals() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set before anything reads it, the other calls only take pointers to it.
    unsafe {
        check(libc::sigemptyset(set.as_mut_ptr()))?;
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            check(libc::sigaddset(set.as_mut_ptr(), signal))?;
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()))?;
        adopt(libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))
    }
}

/// Takes the lock of a file; false when another process has it.
///
/// # Errors
/// What flock(2) says.
pub fn lock_exclusively(fd: impl AsFd) -> io::Result<bool> {
    // SAFETY: no pointers are involved.
    match check(unsafe { libc::flock(fd.as_fd().as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes a device node, readable and writable by its owner.
///
/// # Errors
/// What mknod(2) says.
pub fn make_character_device(path: &Path, major: u32, minor: u32) -> io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is a C string that lives over the call.
    check(unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(major, minor)) })?;
    Ok(())
}

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Something to read.
    pub read: bool,
    /// Room to write.
    pub write: bool,
}

impl Interest {
    /// Something to read.
    pub const READ: Self = Self {
        read: true,
        write: false,
    };

    fn bits(self) -> u32 {
        // Bits of an i32 constant, none of them the sign.
        (if self.read { libc::EPOLLIN as u32 } else { 0 }) | (if self.write { libc::EPOLLOUT as u32 } else { 0 })
    }
}

/// What an fd has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The number given to [`Epoll::add`].
    pub token: u64,
    /// Readable or writable as asked for.
    pub ready: bool,
    /// Hung up or broken, which is reported without being asked for.
    pub gone: bool,
}

/// An epoll instance, level-triggered.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// An empty one.
    ///
    /// # Errors
    /// What epoll_create1(2) says.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        adopt(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }).map(Self)
    }

    fn control(&self, operation: libc::c_int, fd: BorrowedFd<'_>, interest: Interest, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: interest.bits(),
            u64: token,
        };
        // SAFETY: the event lives over the call.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), operation, fd.as_raw_fd(), &mut event) })?;
        Ok(())
    }

    /// Watches an fd.
    ///
    /// # Errors
    /// What epoll_ctl(2) says.
    pub fn add(&self, fd: impl AsFd, interest: Interest, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd.as_fd(), interest, token)
    }

    /// Changes what is waited for.
    ///
    /// # Errors
    /// What epoll_ctl(2) says.
    pub fn modify(&self, fd: impl AsFd, interest: Interest, token: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd.as_fd(), interest, token)
    }

    /// Stops watching an fd. Needed before closing whenever somebody else has a copy: the kernel would go on reporting it.
    pub fn remove(&self, fd: impl AsFd) {
        let _ = self.control(libc::EPOLL_CTL_DEL, fd.as_fd(), Interest::READ, 0);
    }

    /// Waits; `events` is replaced. A timeout is rounded up to milliseconds.
    ///
    /// # Errors
    /// What epoll_wait(2) says, but for EINTR, which is an empty result.
    pub fn wait(&self, events: &mut Vec<Event>, timeout: Duration) -> io::Result<()> {
        let mut ready = [libc::epoll_event { events: 0, u64: 0 }; 64];
        let timeout = i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
        events.clear();
        // SAFETY: the array has room for the 64 events.
        let count = check(unsafe { libc::epoll_wait(self.0.as_raw_fd(), ready.as_mut_ptr(), 64, timeout) });
        let count = match count {
            Ok(count) => usize::try_from(count).unwrap_or(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        events.extend(ready.iter().take(count).map(|event| {
            let bits = event.events;
            Event {
                token: event.u64,
                ready: bits & (libc::EPOLLIN | libc::EPOLLOUT) as u32 != 0,
                gone: bits & (libc::EPOLLHUP | libc::EPOLLERR) as u32 != 0,
            }
        }));
        Ok(())
    }
}

/// Connects to a stream socket, without waiting for a listener whose backlog is full.
///
/// # Errors
/// What socket(2) and connect(2) say.
pub fn connect_unix(path: &Path) -> io::Result<OwnedFd> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: a plain struct for which zeros are valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // The last byte stays 0.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, &from) in address.sun_path.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers are involved.
    let fd = adopt(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address lives over the call and has this length.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(fd)
}

/// A connected pair of stream sockets. The second is for the daemon and blocks, as one made by another front end would.
///
/// # Errors
/// What socketpair(2) says.
pub fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the array has room for the two fds.
    check(unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    })?;
    Ok((adopt(fds[0])?, adopt(fds[1])?))
}

/// What one read brought.
#[derive(Debug)]
pub struct Received {
    /// Bytes read; 0 is the end.
    pub bytes: usize,
    /// Fds that came along. They are closed already.
    pub fds: usize,
}

/// Control data has to be aligned like its header.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// Reads what is there, without waiting. Fds that come along are closed: the bridge has no use for any.
///
/// # Errors
/// What recvmsg(2) says: EAGAIN when there is nothing.
pub fn receive(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a plain struct for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: all buffers live over the call and have the lengths given.
    let read = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut message, flags) };
    let bytes = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    // What doesn't fit is closed by the kernel, and still counts.
    let mut fds = usize::from(message.msg_flags & libc::MSG_CTRUNC != 0);
    // SAFETY: the kernel has filled in the control data, the macros walk it within msg_controllen, and each SCM_RIGHTS holds
    // as many fds as its length says, which are ours now.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(header).cast::<u8>();
                let length = ((*header).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                for at in 0..length / size_of::<RawFd>() {
                    let mut raw = [0; size_of::<RawFd>()];
                    std::ptr::copy_nonoverlapping(data.add(at * raw.len()), raw.as_mut_ptr(), raw.len());
                    drop(OwnedFd::from_raw_fd(RawFd::from_ne_bytes(raw)));
                    fds += 1;
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    Ok(Received { bytes, fds })
}

/// Writes what there is room for, without waiting; `fds` go with the first byte.
///
/// # Errors
/// What sendmsg(2) says: EAGAIN when there is no room.
pub fn send(fd: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a plain struct for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        if fds.len() > MAX_FDS {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let length = (size_of::<RawFd>() * fds.len()) as libc::c_uint;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: pure arithmetic; at most CONTROL_BYTES, see there.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(length) } as _;
        // SAFETY: the control buffer is aligned and has room for one header and these fds.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as _;
            let data = libc::CMSG_DATA(header).cast::<u8>();
            for (at, fd) in fds.iter().enumerate() {
                let raw = fd.as_raw_fd().to_ne_bytes();
                std::ptr::copy_nonoverlapping(raw.as_ptr(), data.add(at * raw.len()), raw.len());
            }
        }
    }
    // SAFETY: all buffers live over the call, have the lengths given, and sendmsg only reads them.
    let sent = unsafe {
        libc::sendmsg(
            fd.as_fd().as_raw_fd(),
            &message,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
