// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The few system calls used directly, each behind a safe function.
//!
//! Raw fds are adopted (`OwnedFd`) in one place each: here for fds this process makes, in [`PeerFd::adopt`] for those
//! that arrive from Python.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Turns -1 into the OS error.
fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// An fd that came from a front end, before it has been looked at.
///
/// Even closing it can't be taken for granted: a TCP socket with SO_LINGER waits for its peer, a file on FUSE or a network
/// waits for its server, and a UNIX socket can hold any of these, sent and not received. Dropping this closes what is known to be harmless here and hands the rest to a thread of its own.
pub struct PeerFd(Option<OwnedFd>);

/// Takes ownership of an fd that the caller was given by somebody who can be trusted.
///
/// Returns None for a number that is not an open fd.
pub fn adopt(fd: RawFd) -> Option<OwnedFd> {
    PeerFd::adopt(fd).and_then(|mut fd| fd.0.take())
}

impl PeerFd {
    /// Takes ownership of a raw fd that the caller was given (SCM_RIGHTS, passed down by Python).
    ///
    /// Returns None for a number that is not an open fd, so that a stray -1 can't become an `OwnedFd`.
    pub fn adopt(fd: RawFd) -> Option<Self> {
        // SAFETY: F_GETFD only asks about the number; any value is allowed.
        if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return None;
        }
        // SAFETY: the fd is open, and by contract of the seam (docs/ARCHITECTURE.md, fd ownership) the caller keeps
        // no claim to it after passing it down.
        Some(Self(Some(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// The fd, when it is an eventfd.
    pub fn into_eventfd(mut self) -> Option<OwnedFd> {
        self.0.take_if(|fd| is_eventfd(fd))
    }

    /// The fd, when it is a stream socket of the UNIX family.
    pub fn into_unix_stream(mut self) -> Option<OwnedFd> {
        self.0.take_if(|fd| is_unix_stream(fd))
    }

    /// The fd, when it is open for reading and writing and names a file that can be mapped and whose server can't keep us
    /// waiting: a memfd, a file in tmpfs or hugetlbfs, or one on a local file system.
    ///
    /// # Errors
    /// Why not. Nothing is asked of the file itself before its kind is known.
    pub fn memory_file(&self) -> Result<&OwnedFd, &'static str> {
        self.mappable(true)
    }

    /// As `memory_file`, but it is enough that the fd is open for reading.
    ///
    /// # Errors
    /// Why not.
    pub fn readable_file(&self) -> Result<&OwnedFd, &'static str> {
        self.mappable(false)
    }

    fn mappable(&self, write: bool) -> Result<&OwnedFd, &'static str> {
        let fd = self.0.as_ref().ok_or("no fd")?;
        if !is_shared_memory(fd) && !is_on_local_disk(fd) {
            return Err("the fd is neither shared memory nor a file on a local file system");
        }
        // SAFETY: no pointers are involved.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        if write && seals > 0 && seals & (libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) != 0 {
            return Err("the fd is sealed against writing");
        }
        // SAFETY: no pointers are involved.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        match flags & (libc::O_ACCMODE | libc::O_PATH) {
            libc::O_RDWR => Ok(fd),
            libc::O_RDONLY if !write => Ok(fd),
            _ if write => Err("the fd is not open for reading and writing"),
            _ => Err("the fd is not open for reading"),
        }
    }
}

impl From<OwnedFd> for PeerFd {
    fn from(fd: OwnedFd) -> Self {
        Self(Some(fd))
    }
}

impl Drop for PeerFd {
    fn drop(&mut self) {
        let Some(fd) = self.0.take() else { return };
        // SAFETY: no pointers are involved.
        let is_pipe = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETPIPE_SZ) } >= 0;
        if is_pipe || is_eventfd(&fd) || is_shared_memory(&fd) || (!is_unix(&fd) && forget_linger(&fd)) {
            return;
        }
        drop_later(fd);
    }
}

/// Threads that may be busy dropping things; beyond, things wait in line.
const MAX_DROPPERS: usize = 64;
/// How long the line may stand still before another thread is started for it.
const DROP_PATIENCE: Duration = Duration::from_millis(100);

#[derive(Default)]
struct Line {
    things: VecDeque<Box<dyn Send>>,
    threads: usize,
    waiting: usize,
    moved: Option<Instant>,
}

static LINE: Mutex<Line> = Mutex::new(Line {
    things: VecDeque::new(),
    threads: 0,
    waiting: 0,
    moved: None,
});
static COME: Condvar = Condvar::new();

/// Drops something on another thread, because that may take its time: a stranger's fd, or the last mapping of a large
/// guest. One thread does it as a rule; more when it is held up.
pub fn drop_later(thing: impl Send + 'static) {
    let mut line = LINE.lock().unwrap_or_else(PoisonError::into_inner);
    line.things.push_back(Box::new(thing));
    if line.waiting > 0 {
        COME.notify_one();
        return;
    }
    let stuck = line.moved.is_none_or(|moved| moved.elapsed() > DROP_PATIENCE);
    if line.threads == 0 || (stuck && line.threads < MAX_DROPPERS) {
        line.threads += 1;
        line.moved = Some(Instant::now());
        drop(line);
        if std::thread::Builder::new()
            .name("vhu-drop".into())
            .spawn(drop_things)
            .is_err()
        {
            // What is in line waits for the next one who comes.
            LINE.lock().unwrap_or_else(PoisonError::into_inner).threads -= 1;
        }
    }
}

fn drop_things() {
    let mut line = LINE.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(thing) = line.things.pop_front() {
            line.moved = Some(Instant::now());
            drop(line);
            drop(thing);
            line = LINE.lock().unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        line.waiting += 1;
        let (after, result) = COME
            .wait_timeout(line, Duration::from_secs(5))
            .unwrap_or_else(PoisonError::into_inner);
        line = after;
        line.waiting -= 1;
        if result.timed_out() && line.things.is_empty() {
            line.threads -= 1;
            return;
        }
    }
}

/// Whether a file is memory: only memfds and files in tmpfs and hugetlbfs have seals. Asks the kernel, not the file.
fn is_shared_memory(fd: &OwnedFd) -> bool {
    // SAFETY: no pointers are involved.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) >= 0 }
}

/// Whether a file is on one of the usual disk file systems. Looked up in /proc, since even `fstatfs` asks the server of a
/// FUSE or network file system.
fn is_on_local_disk(fd: &OwnedFd) -> bool {
    const LOCAL: [&str; 8] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs"];
    let fdinfo = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default();
    let Some(mount) = fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))
        .map(str::trim)
    else {
        return false;
    };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| {
        let mut words = line.split(' ');
        // The type of the file system is the first word behind the separator.
        words.next() == Some(mount)
            && words
                .skip_while(|word| *word != "-")
                .nth(1)
                .is_some_and(|fs| LOCAL.contains(&fs))
    })
}

/// For a socket: makes closing it immediate, and says true. Its peer could undo that only through another reference, and
/// then ours is not the last and closing it does nothing.
fn forget_linger(fd: &OwnedFd) -> bool {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: linger is a live local of the size given.
    let ret = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        )
    };
    ret == 0
}

/// A close-on-exec, non-blocking eventfd of our own.
pub fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are involved.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: a new fd that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds one to an eventfd of our own. It can't block (ours are non-blocking) and saturation is as good as a wake.
pub fn eventfd_signal(fd: &OwnedFd) {
    let one = 1u64;
    // SAFETY: writes eight bytes from a live local.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}

/// Drains an eventfd without ever blocking, whatever its O_NONBLOCK flag says; true when there was something.
///
/// The flag belongs to the open file description, which a front end shares with us and can change at any time, so
/// it can't be relied on: RWF_NOWAIT asks per call.
pub fn eventfd_drain(fd: RawFd) -> bool {
    let mut value = 0u64;
    let iov = libc::iovec {
        iov_base: (&raw mut value).cast(),
        iov_len: 8,
    };
    // SAFETY: one iovec over a live local of eight bytes.
    unsafe { libc::preadv2(fd, &raw const iov, 1, -1, libc::RWF_NOWAIT) == 8 }
}

/// Whether the fd is an eventfd. The kernel names anonymous inodes in /proc.
pub fn is_eventfd(fd: &OwnedFd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|link| link.as_os_str() == "anon_inode:[eventfd]")
}

/// A socket option, when the fd is a socket.
fn socket_option(fd: &OwnedFd, option: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and len are live locals and len says how large value is.
    let ret = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    (ret == 0).then_some(value)
}

/// Whether the fd is a socket of the UNIX family.
fn is_unix(fd: &OwnedFd) -> bool {
    socket_option(fd, libc::SO_DOMAIN) == Some(libc::AF_UNIX)
}

/// Whether the fd is a stream socket of the UNIX family.
pub fn is_unix_stream(fd: &OwnedFd) -> bool {
    is_unix(fd) && socket_option(fd, libc::SO_TYPE) == Some(libc::SOCK_STREAM)
}

/// What a file is and how large.
pub struct FileInfo {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Whether it is a regular file (memfd and hugetlbfs files are).
    pub regular: bool,
    /// Whether it is a block device.
    pub block: bool,
}

/// `fstat`.
pub fn file_info(fd: BorrowedFd<'_>) -> io::Result<FileInfo> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the kernel fills the whole struct on success.
    check(unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: filled, as fstat said.
    let stat = unsafe { stat.assume_init() };
    Ok(FileInfo {
        dev: stat.st_dev,
        ino: stat.st_ino,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        regular: stat.st_mode & libc::S_IFMT == libc::S_IFREG,
        block: stat.st_mode & libc::S_IFMT == libc::S_IFBLK,
    })
}

/// Page size of the file system behind a file: 4 KiB, or the huge page size on hugetlbfs.
pub fn backing_page_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills the whole struct on success.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: filled, as fstatfs said.
    let stat = unsafe { stat.assume_init() };
    if stat.f_type == HUGETLBFS_MAGIC {
        Ok(u64::try_from(stat.f_bsize).unwrap_or(4096))
    } else {
        Ok(4096)
    }
}

/// Takes an advisory whole-file lock that lives with the open file; false when another process holds it.
pub fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let op = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: no pointers are involved.
    match check(unsafe { libc::flock(file.as_raw_fd(), op | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives up the lock of [`try_lock`].
pub fn unlock(file: &File) {
    // SAFETY: no pointers are involved.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}

/// Waits, without bound, until one of the fds is readable.
pub fn wait_readable(fds: &[RawFd]) {
    wait_readable_for(fds, None);
}

/// Waits until one of the fds is readable, or a time has passed.
pub fn wait_readable_for(fds: &[RawFd], time: Option<Duration>) {
    let milliseconds = time.map_or(-1, |time| {
        i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    });
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: polled is a live array of that many entries.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, milliseconds) };
}

/// Most fds that the kernel carries with one piece of data (SCM_MAX_FD).
const MAX_CARRIED: usize = 253;
/// Room for their control message, in words: its header is two of them.
const CONTROL_WORDS: usize = 2 + (MAX_CARRIED * size_of::<RawFd>()).div_ceil(8);

/// Reads what a stream socket has, up to the size of `buffer` and to the next piece that fds come with, without waiting.
/// The fds are appended to `fds`. 0 bytes: the peer sends no more.
///
/// There is room for every fd that can come. What doesn't fit would be closed by the kernel at once, and that can be made
/// to take its time ([`PeerFd`]).
///
/// # Errors
/// `WouldBlock` when there is nothing, and whatever else the kernel says.
pub fn receive(socket: RawFd, buffer: &mut [u8], fds: &mut Vec<PeerFd>) -> io::Result<usize> {
    let mut control = [MaybeUninit::<u64>::uninit(); CONTROL_WORDS];
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a msghdr of zeroes is valid: no name, no data, no control.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the message describes a live buffer and live room for control messages.
    let ret = unsafe { libc::recvmsg(socket, &raw mut message, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) };
    let bytes = usize::try_from(ret).map_err(|_| io::Error::last_os_error())?;
    if message.msg_controllen > 0 {
        take_fds(&message, fds);
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::other("control data was cut off"));
    }
    Ok(bytes)
}

/// Adopts the fds of a message that was received.
fn take_fds(message: &libc::msghdr, fds: &mut Vec<PeerFd>) {
    // SAFETY: the kernel has filled the control buffer up to msg_controllen.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return headers that lie in the buffer as a whole.
        let (level, kind, len) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: only computes the size of a header.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = len.saturating_sub(head) / size_of::<RawFd>();
            // SAFETY: the data follows its header.
            let data = unsafe { libc::CMSG_DATA(header) };
            for index in 0..count {
                // SAFETY: `count` fds lie there; as bytes they need no alignment.
                let bytes = unsafe { data.add(index * size_of::<RawFd>()).cast::<[u8; 4]>().read() };
                // SAFETY: the kernel has made this fd for us just now.
                let fd = unsafe { OwnedFd::from_raw_fd(RawFd::from_ne_bytes(bytes)) };
                fds.push(PeerFd(Some(fd)));
            }
        }
        // SAFETY: header is one of this message's.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
}

/// Sends what a stream socket has room for, without waiting; a peer that is gone is an error, not a signal.
///
/// # Errors
/// `WouldBlock` when there is no room at all, and whatever else the kernel says.
pub fn send(socket: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the slice is live.
    let ret = unsafe {
        libc::send(
            socket,
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(ret).map_err(|_| io::Error::last_os_error())
}

/// As `send`, with an fd that goes with the first byte. When anything was sent, so was the fd.
///
/// # Errors
/// As for `send`.
pub fn send_with_fd(socket: RawFd, bytes: &[u8], fd: &OwnedFd) -> io::Result<usize> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a msghdr of zeroes is valid: no name, no data, no control.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: only computes the size of a header with one fd; there is room for many.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;
    // SAFETY: the control buffer is live, aligned, and has room for a header with one fd, which is written before it is used.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd.as_raw_fd());
    }
    // SAFETY: the message describes live buffers, which the kernel only reads.
    let ret = unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    usize::try_from(ret).map_err(|_| io::Error::last_os_error())
}

/// Takes the next connection of a listening socket.
///
/// # Errors
/// What `accept4` says.
pub fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: the peer's address is not asked for.
    let fd = check(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        )
    })?;
    // SAFETY: a new fd that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Shared memory without a name, all zeroes. Nobody can change its size.
///
/// # Errors
/// What the kernel says.
pub fn shared_memory(name: &str, size: u64) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: the name is a live string.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) })?;
    // SAFETY: a new fd that nobody else knows.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no pointers are involved.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file.into())
}

/// Whether a file's size can't be changed: memory made by [`shared_memory`].
pub fn is_sealed(file: &File) -> bool {
    let wanted = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    // SAFETY: no pointers are involved.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals > 0 && seals & wanted == wanted
}

/// Whether connections can be accepted from a stream socket of the UNIX family.
pub fn is_unix_listener(fd: &OwnedFd) -> bool {
    is_unix_stream(fd) && socket_option(fd, libc::SO_ACCEPTCONN) == Some(1)
}

/// Makes a file non-blocking, for everybody who has it open.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: no pointers are involved.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: no pointers are involved.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })?;
    Ok(())
}

/// The process that connected a UNIX socket, when it can be seen from here.
pub fn peer_pid(socket: &OwnedFd) -> Option<i32> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: credentials and len are live locals and len says how large credentials is.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    (ret == 0 && credentials.pid > 0).then_some(credentials.pid)
}

/// Ends a connection for both sides; the fd stays open.
pub fn shut_down(socket: &OwnedFd) {
    // SAFETY: no pointers are involved.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// What can be said of a socket without waiting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There is something to read, the end included.
    pub readable: bool,
    /// The peer is gone.
    pub hung_up: bool,
}

/// Looks at a socket.
pub fn look(socket: RawFd) -> Readiness {
    let mut polled = libc::pollfd {
        fd: socket,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one live entry.
    unsafe { libc::poll(&raw mut polled, 1, 0) };
    Readiness {
        readable: polled.revents & libc::POLLIN != 0,
        hung_up: polled.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0,
    }
}

fn interest(read: bool, write: bool) -> libc::c_int {
    (if read { libc::EPOLLIN } else { 0 }) | if write { libc::EPOLLOUT } else { 0 }
}

/// An epoll instance with 64-bit tokens.
pub struct Epoll {
    fd: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Epoll {
    /// A new instance that reports up to 128 events a call.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: a new fd that nobody else knows.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            fd,
            events: vec![libc::epoll_event { events: 0, u64: 0 }; 128],
        })
    }

    /// Watches `fd` for reading, level triggered.
    ///
    /// # Errors
    /// What `epoll_ctl` says.
    pub fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        self.add_with(fd, token, libc::EPOLLIN)
    }

    /// Watches an eventfd of a front end, edge triggered: every write to it is reported, but what is left in it is
    /// not. A front end can hand over a semaphore eventfd with a count that takes for ever to drain; level triggered,
    /// it would keep the worker awake.
    ///
    /// # Errors
    /// What `epoll_ctl` says.
    pub fn add_edge(&self, fd: RawFd, token: u64) -> io::Result<()> {
        self.add_with(fd, token, libc::EPOLLIN | libc::EPOLLET)
    }

    /// Watches `fd` for reading, writing, both or neither, level triggered.
    ///
    /// # Errors
    /// What `epoll_ctl` says.
    pub fn add_for(&self, fd: RawFd, token: u64, read: bool, write: bool) -> io::Result<()> {
        self.add_with(fd, token, interest(read, write))
    }

    /// Watches an fd that is watched already for something else.
    pub fn change(&self, fd: RawFd, token: u64, read: bool, write: bool) {
        let mut event = libc::epoll_event {
            events: interest(read, write) as u32,
            u64: token,
        };
        // SAFETY: event is a live local.
        unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), libc::EPOLL_CTL_MOD, fd, &raw mut event) };
    }

    fn add_with(&self, fd: RawFd, token: u64, events: libc::c_int) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: events as u32,
            u64: token,
        };
        // SAFETY: event is a live local.
        check(unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) })?;
        Ok(())
    }

    /// Stops watching `fd`. To be called before the fd is closed: a front end holds another fd of the same file, so
    /// closing ours does not end the registration.
    pub fn remove(&self, fd: RawFd) {
        // SAFETY: a null event is allowed for EPOLL_CTL_DEL.
        unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// Waits up to `timeout_ms` (-1: for ever) and hands over the tokens of what is readable.
    pub fn wait(&mut self, timeout_ms: i32, tokens: &mut Vec<u64>) {
        tokens.clear();
        let capacity = self.events.len() as libc::c_int;
        // SAFETY: events has room for `capacity` entries.
        let n = unsafe { libc::epoll_wait(self.fd.as_raw_fd(), self.events.as_mut_ptr(), capacity, timeout_ms) };
        // EINTR (a signal, a debugger) is an empty result.
        let n = usize::try_from(n).unwrap_or(0);
        tokens.extend(self.events[..n].iter().map(|event| event.u64));
    }
}
