// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory: checks, sharing, buffers over region borders, and truncation under our feet.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use common::{memfd, peer, Guest, USER};
use vhu_core::memory::{Buffers, MappingCache, MemoryMap};
use vhu_core::sys::PeerFd;

#[test]
fn regions_are_checked() {
    let cache = MappingCache::default();
    let fd = peer(&memfd(0x10000));
    let rule = |guest, size, user, offset| {
        cache
            .region(&fd, guest, size, user, offset)
            .err()
            .map(|fault| fault.rule)
    };
    assert_eq!(rule(0, 0x10000, 0, 0), None);
    assert_eq!(rule(0, 0, 0, 0), Some("memory.region-size"));
    assert_eq!(rule(u64::MAX - 0xfff, 0x1000, 0, 0), Some("memory.region-wrap"));
    assert_eq!(rule(0, 0x1000, u64::MAX, 0), Some("memory.region-wrap"));
    assert_eq!(rule(0, 0x1000, 0, u64::MAX - 5), Some("memory.region-wrap"));
    assert_eq!(rule(0, 0x10001, 0, 0), Some("memory.fd-short"));
    assert_eq!(rule(0, 0x1000, 0, 0xf001), Some("memory.fd-short"));
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = PeerFd::from(OwnedFd::from(reader));
    assert_eq!(
        cache.region(&pipe, 0, 4096, 0, 0).err().map(|f| f.rule),
        Some("memory.fd-kind")
    );
}

#[test]
fn overlaps_and_removal() {
    let cache = MappingCache::default();
    let fd = peer(&memfd(0x10000));
    let region = |guest, size, user| cache.region(&fd, guest, size, user, 0).unwrap();
    let map = MemoryMap::default().with(region(0x1000, 0x1000, USER)).unwrap();
    let rule = |guest, size, user| map.with(region(guest, size, user)).err().map(|fault| fault.rule);
    assert_eq!(rule(0x1fff, 0x10, USER + 0x10000), Some("memory.overlap"));
    assert_eq!(rule(0x8000, 0x10, USER + 0xfff), Some("memory.overlap"));
    assert_eq!(rule(0x2000, 0x1000, USER + 0x1000), None);
    assert_eq!(
        map.without(0x1000, 0x800, USER).err().map(|f| f.rule),
        Some("memory.unknown-region")
    );
    assert!(map.without(0x1000, 0x1000, USER).unwrap().is_empty());
}

#[test]
fn one_file_is_mapped_once() {
    let cache = MappingCache::default();
    let fd = peer(&memfd(0x4000));
    let other = fd.memory_file().unwrap().try_clone().unwrap().into();
    let a = cache.region(&fd, 0, 0x4000, 0, 0).unwrap();
    let b = cache.region(&other, 0x10_0000, 0x4000, USER, 0).unwrap();
    assert_eq!(cache.len(), 1);
    let c = cache.region(&fd, 0, 0x1000, 0, 0x2000).unwrap();
    assert_eq!(cache.len(), 2);
    drop((a, b, c));
    assert!(cache.is_empty());
}

#[test]
fn a_buffer_may_cross_regions() {
    let cache = MappingCache::default();
    let (low, high) = (peer(&memfd(0x1000)), peer(&memfd(0x2000)));
    let map = MemoryMap::default()
        .with(cache.region(&low, 0x1000, 0x1000, 0, 0).unwrap())
        .unwrap()
        .with(cache.region(&high, 0x2000, 0x2000, USER, 0).unwrap())
        .unwrap();
    let mut buffers = Buffers::default();
    assert!(map.append(0x1f00, 0x200, &mut 0, &mut buffers));
    assert_eq!((buffers.len(), buffers.iovecs().len()), (0x200, 2));
    let pattern: Vec<u8> = (0..0x200u32).map(|i| i as u8).collect();
    assert_eq!(buffers.write(&pattern), 0x200);
    let mut back = vec![0; 0x200];
    assert_eq!(buffers.read(&mut back), 0x200);
    assert_eq!(back, pattern);
    assert!(
        !map.append(0x3f00, 0x200, &mut 0, &mut Buffers::default()),
        "ends outside"
    );
    assert!(!map.append(0xfff, 2, &mut 0, &mut Buffers::default()), "begins outside");
}

#[test]
fn trimming() {
    let guest = Guest::new(0, 0x10000);
    let mut buffers = Buffers::default();
    for (addr, len) in [(0, 10), (100, 20), (200, 30)] {
        assert!(guest.map.append(addr, len, &mut 0, &mut buffers));
    }
    buffers.trim_front(15);
    buffers.trim_back(31);
    assert_eq!((buffers.len(), buffers.iovecs().len()), (14, 1));
    guest.write(105, b"abcdefghijklmnopq");
    let mut bytes = [0; 14];
    buffers.read(&mut bytes);
    assert_eq!(&bytes, b"abcdefghijklmn");
    buffers.pop_last_byte().unwrap().set(b'!');
    assert_eq!(guest.read(105, 15), b"abcdefghijklm!o");
    buffers.trim_front(100);
    assert!(buffers.is_empty() && buffers.pop_last_byte().is_none());
}

#[test]
fn a_truncated_file_is_survived_and_noticed() {
    let guest = Guest::new(0, 0x10000);
    let other = Guest::new(0, 0x10000);
    let mut buffers = Buffers::default();
    assert!(guest.map.append(0x8000, 16, &mut 0, &mut buffers));
    buffers.write(b"before");
    assert!(!guest.map.lost());
    guest.file.set_len(0x1000).unwrap();
    // SIGBUS without the guard.
    let mut bytes = [1; 16];
    buffers.read(&mut bytes);
    assert_eq!(bytes, [0; 16]);
    buffers.write(b"after");
    assert!(guest.map.lost());
    assert!(!other.map.lost(), "another file's mapping is not concerned");
    // The same file, whole again, is mapped afresh: the lost mapping isn't handed out any more.
    guest.file.set_len(0x10000).unwrap();
    let fd = peer(&guest.file);
    let region = guest.cache.region(&fd, 0, 0x10000, 0, 0).unwrap();
    let map = Arc::new(MemoryMap::default().with(region).unwrap());
    assert!(!map.lost() && guest.map.lost());
}

#[test]
fn only_files_that_can_be_memory_are_memory() {
    let cache = MappingCache::default();
    let rule = |fd: PeerFd| cache.region(&fd, 0, 4096, 0, 0).err().map(|fault| fault.rule);
    assert_eq!(
        rule(peer(&File::open("/proc/self/maps").unwrap())),
        Some("memory.fd-kind")
    );
    assert_eq!(
        rule(OwnedFd::from(std::os::unix::net::UnixStream::pair().unwrap().0).into()),
        Some("memory.fd-kind")
    );
    // A read-only fd gets no mapping, not even one that is there already.
    let file = memfd(0x1000);
    let _mapped = cache.region(&peer(&file), 0, 0x1000, 0, 0).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    assert_eq!(rule(peer(&File::open(path).unwrap())), Some("memory.fd-kind"));
}

#[test]
fn closing_a_strange_fd_does_not_wait() {
    // A TCP socket with data nobody takes and SO_LINGER set would keep us here for its ten seconds.
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let _peer = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 65536]).is_ok() {}
    stream.set_nonblocking(false).unwrap();
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 10,
    };
    let size = size_of::<libc::linger>() as libc::socklen_t;
    let value = (&raw const linger).cast();
    // SAFETY: linger is a live local of the size given.
    let ret = unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, size) };
    assert_eq!(ret, 0);
    let begin = std::time::Instant::now();
    drop(PeerFd::from(OwnedFd::from(stream)));
    assert!(begin.elapsed().as_secs() < 5);
}
