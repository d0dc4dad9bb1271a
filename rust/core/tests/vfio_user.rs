// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vfio-user server, from the client's side: every message good and bad, torn streams, and clients that mean harm.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/vfio.rs"]
mod vfio;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{memfd, Random};
use vfio::*;
use vhu_core::event::{Completion, Event};
use vhu_core::memory::MAX_REGIONS;
use vhu_core::sys;
use vhu_core::vfio_user::function::{Mappable, PciFunction};
use vhu_core::vfio_user::server::{Server, GREETING};
use vhu_core::worker::Pool;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const EINVAL: u32 = libc::EINVAL as u32;

fn capabilities(reply: &Message) -> String {
    assert_eq!(reply.body[..4], [0; 4], "0.0 is spoken here");
    assert_eq!(reply.body.last(), Some(&0));
    String::from_utf8(reply.body[4..reply.body.len() - 1].to_vec()).unwrap()
}

// --- version

#[test]
fn version_as_qemu_asks() {
    let bed = Bed::new();
    let mut client = bed.raw();
    let reply = client.version(0, 0, CAPABILITIES);
    assert_eq!(
        capabilities(&reply),
        r#"{"capabilities":{"max_data_xfer_size":1048576,"max_dma_maps":509,"max_msg_fds":16,"pgsizes":4096,"write_multiple":true}}"#
    );
    assert_eq!(client.ask(VERSION, &[0; 4]), Err(EINVAL), "once only");
    assert!(client.read(7, 0, 4).is_ok());
}

#[test]
fn version_without_capabilities() {
    for (body, wanted) in [
        (vec![0; 4], r#"{"capabilities":{}}"#),
        (b"\0\0\0\0{}\0".to_vec(), r#"{"capabilities":{}}"#),
        (
            b"\0\0\x09\0{\"capabilities\":{\"write_multiple\":false,\"other\":[1]}}\0".to_vec(),
            r#"{"capabilities":{"write_multiple":false}}"#,
        ),
        (
            b"\0\0\0\0{\"capabilities\":{\"max_dma_maps\":7,\"pgsizes\":2097152}}\0".to_vec(),
            r#"{"capabilities":{"max_dma_maps":7,"pgsizes":2097152}}"#,
        ),
    ] {
        let bed = Bed::new();
        let mut client = bed.raw();
        client.send(VERSION, 0, &body);
        let reply = client.receive().unwrap();
        assert_eq!(capabilities(&reply), wanted);
        assert_eq!(client.ask(WRITE_MULTI, &longs(&[0])), Err(libc::ENOTSUP as u32));
    }
}

#[test]
fn versions_refused() {
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let long = format!("{{\"capabilities\":{{\"x\":\"{}\"}}}}", "x".repeat(20_000));
    let cases: Vec<Vec<u8>> = vec![
        vec![],
        vec![0; 3],
        b"\x01\0\0\0".to_vec(),
        b"\0\0\0\0{}".to_vec(),
        b"\0\0\0\0{\0".to_vec(),
        b"\0\0\0\0\xff\xfe\0".to_vec(),
        b"\0\0\0\0[]\0".to_vec(),
        b"\0\0\0\0{\"capabilities\":1}\0".to_vec(),
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":-1}}\0".to_vec(),
        b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":0}}\0".to_vec(),
        b"\0\0\0\0{\"capabilities\":{\"pgsizes\":0}}\0".to_vec(),
        b"\0\0\0\0{\"capabilities\":{\"write_multiple\":1}}\0".to_vec(),
        [b"\0\0\0\0".to_vec(), deep.into_bytes(), vec![0]].concat(),
        [b"\0\0\0\0".to_vec(), long.into_bytes(), vec![0]].concat(),
    ];
    let bed = Bed::new();
    for body in cases {
        let mut client = bed.raw();
        assert_eq!(client.ask(VERSION, &body), Err(EINVAL), "{body:?}");
        assert!(client.is_closed());
        bed.free();
    }
    // Nobody waits for an answer: the connection is closed without one.
    let mut client = bed.raw();
    client.send(VERSION, NO_REPLY, b"\x01\0\0\0");
    assert!(client.is_closed());
    bed.free();
    let mut client = bed.raw();
    client.send(GET_INFO, 0, &words(&[16, 0, 0, 0]));
    assert!(client.is_closed(), "the version comes first");
}

// --- what the device is

#[test]
fn information() {
    let bed = Bed::new();
    let mut client = bed.client();
    assert_eq!(client.ask(GET_INFO, &words(&[16, 0, 0, 0])), Ok(words(&[16, 3, 9, 5])));
    for (index, flags, size) in [
        (0, 3, 256),
        (1, 0, 0),
        (2, 1, 2 << 20),
        (4, 2, 2 << 20),
        (7, 3, 4096),
        (8, 0, 0),
    ] {
        let mut wanted = words(&[32, flags, index, 0]);
        wanted.extend(longs(&[size, 0]));
        let reply = client.ask(GET_REGION_INFO, &words(&[4096, 0, index, 0, 0, 0, 0, 0]));
        assert_eq!(reply, Ok(wanted));
    }
    for (index, flags, count) in [(0, 7, 1), (1, 1, 0), (2, 1, 64), (4, 1, 1)] {
        let reply = client.ask(GET_IRQ_INFO, &words(&[16, 0, index, 0]));
        assert_eq!(reply, Ok(words(&[16, flags, index, count])));
    }
    // Error interrupts, of which there are none: QEMU asks, and takes this for an answer.
    assert_eq!(client.ask(GET_IRQ_INFO, &words(&[16, 0, 3, 0])), Err(EINVAL));
    assert_eq!(
        client.ask(GET_REGION_IO_FDS, &words(&[4096, 0, 2, 0])),
        Ok(words(&[16, 0, 2, 0]))
    );
}

/// What QEMU asks, and what it makes of the answer: flags READ, MMAP and CAPS, one area from the beginning.
#[test]
fn a_region_that_can_be_mapped() {
    let bed = Bed::new();
    let file = memfd(0x8000);
    file.write_all_at(b"hello", 0x1000).unwrap();
    let mappable = Mappable {
        file: Arc::new(file.try_clone().unwrap().into()),
        length: 0x3000,
    };
    bed.fake.mappable.set(mappable).unwrap();
    let before = fds_of(&file);
    let mut client = bed.client();
    let ask = |room: u32, index: u32| words(&[room, 0, index, 0, 0, 0, 0, 0]);
    let mut fixed = words(&[64, 1 | 4 | 8, 2, 32]);
    fixed.extend(longs(&[2 << 20, 0]));
    // No room for the capability: how much it takes, where it will be, and no fd yet.
    for room in [32, 48, 63] {
        let (body, fds) = client.ask_with_fds(GET_REGION_INFO, &ask(room, 2));
        assert_eq!(body, fixed, "argsz {room}");
        assert!(fds.is_empty());
    }
    let mut whole = fixed.clone();
    whole.extend([1, 0, 1, 0]);
    whole.extend(words(&[0, 1, 0]));
    whole.extend(longs(&[0, 0x3000]));
    for room in [64, 4096] {
        let (body, fds) = client.ask_with_fds(GET_REGION_INFO, &ask(room, 2));
        assert_eq!(body, whole, "argsz {room}");
        assert_eq!(fds.len(), 1);
        let mut bytes = [0; 5];
        fds[0].read_exact_at(&mut bytes, 0x1000).unwrap();
        assert_eq!(&bytes, b"hello");
    }
    // Other regions have none, and nobody gets that of an answer that wasn't wanted.
    client.send(GET_REGION_INFO, NO_REPLY, &ask(64, 2));
    let (body, fds) = client.ask_with_fds(GET_REGION_INFO, &ask(64, 0));
    assert_eq!(body[..16], words(&[32, 3, 0, 0])[..]);
    assert!(fds.is_empty());
    // Mapped or not, it can be read.
    assert_eq!(client.read(2, 0x1000, 4), Ok(vec![0x77; 4]));
    drop(client);
    bed.free();
    until("no fd is left", || fds_of(&file) == before);
}

/// Each answer has its own fd, also when the client doesn't read them until the socket is full.
#[test]
fn many_regions_that_can_be_mapped() {
    const COUNT: usize = 400;
    let bed = Bed::new();
    let mappable = Mappable {
        file: Arc::new(memfd(0x1000).into()),
        length: 0x1000,
    };
    bed.fake.mappable.set(mappable).unwrap();
    let mut client = bed.client();
    let asked: Vec<(u16, u32)> = (0..COUNT)
        .map(|n| {
            let room = [32, 64][n % 2];
            (
                client.send(GET_REGION_INFO, 0, &words(&[room, 0, 2, 0, 0, 0, 0, 0])),
                room,
            )
        })
        .collect();
    std::thread::sleep(Duration::from_millis(20));
    for (id, room) in asked {
        let mut header = [0; 16];
        let (count, fd) = client.socket.recv_with_fd(&mut header).unwrap();
        assert_eq!(count, 16);
        assert_eq!(header[..2], id.to_ne_bytes());
        assert_eq!(fd.is_some(), room == 64);
        let mut body = vec![0; room as usize];
        client.socket.read_exact(&mut body).unwrap();
    }
    assert!(client.quiet());
}

#[test]
fn information_asked_wrongly() {
    let bed = Bed::new();
    let mut client = bed.client();
    for (command, body) in [
        (GET_INFO, words(&[15, 0, 0, 0])),
        (GET_INFO, words(&[16, 0, 0])),
        (GET_INFO, words(&[16, 0, 0, 0, 0])),
        (GET_INFO, vec![]),
        (GET_REGION_INFO, words(&[31, 0, 0, 0, 0, 0, 0, 0])),
        (GET_REGION_INFO, words(&[32, 0, 9, 0, 0, 0, 0, 0])),
        (GET_REGION_INFO, words(&[32, 0, u32::MAX, 0, 0, 0, 0, 0])),
        (GET_REGION_INFO, words(&[32, 0, 0, 0])),
        (GET_IRQ_INFO, words(&[16, 0, 5, 0])),
        (GET_IRQ_INFO, words(&[0, 0, 0, 0])),
        (GET_REGION_IO_FDS, words(&[16, 1, 0, 0])),
        (GET_REGION_IO_FDS, words(&[16, 0, 9, 0])),
        (GET_REGION_IO_FDS, words(&[8, 0, 0, 0])),
        (RESET, vec![0]),
        (REGION_READ, vec![0; 15]),
        (REGION_READ, vec![0; 17]),
        (REGION_WRITE, vec![0; 15]),
        (DMA_UNMAP, vec![0; 23]),
        (DMA_MAP, vec![0; 31]),
        (SET_IRQS, vec![0; 19]),
    ] {
        assert_eq!(client.ask(command, &body), Err(EINVAL), "{command} {body:?}");
    }
    for command in [0, 11, 12, 14, 16, 17, 18, 99, u16::MAX] {
        assert_eq!(client.ask(command, &[]), Err(libc::ENOTSUP as u32));
    }
    assert_eq!(bed.server.statistics().errors, 20 + 9);
}

// --- regions

#[test]
fn region_accesses() {
    let bed = Bed::new();
    let mut client = bed.client();
    for width in [1, 2, 4, 8, 3, 256] {
        let wanted: Vec<u8> = (0..width).map(|n| n as u8).collect();
        assert_eq!(client.read(0, 0, width), Ok(wanted));
    }
    assert_eq!(client.read(0, 255, 1), Ok(vec![255]));
    assert_eq!(client.read(0, 256, 0), Ok(vec![]), "nothing, at the end");
    assert_eq!(client.read(7, 0, 4096), Ok(vec![0x5a; 4096]));
    assert_eq!(client.read(2, 0, 1 << 20), Ok(vec![0x77; 1 << 20]));
    client.write_region(0, 16, &[1, 2, 3, 4]).unwrap();
    client.write_region(4, 0, &vec![1; 1 << 20]).unwrap();
    assert_eq!(client.read(0, 15, 4), Ok(vec![15, 1, 2, 3]));
    for (region, offset, count, errno) in [
        (0, 256, 1, libc::EINVAL),
        (0, 255, 2, libc::EINVAL),
        (0, u64::MAX, 1, libc::EINVAL),
        (0, u64::MAX - 3, 8, libc::EINVAL),
        (1, 0, 1, libc::EINVAL),
        (9, 0, 1, libc::EINVAL),
        (u32::MAX, 0, 1, libc::EINVAL),
        (4, 0, 1, libc::EPERM),
        (2, 0, (1 << 20) + 1, libc::E2BIG),
        (0, 0, u32::MAX, libc::E2BIG),
        (0, BAD, 1, libc::EBUSY),
    ] {
        assert_eq!(client.read(region, offset, count), Err(errno as u32));
    }
    for (region, offset, errno) in [(0, 256, libc::EINVAL), (2, 0, libc::EPERM), (0, BAD, libc::EBUSY)] {
        assert_eq!(client.write_region(region, offset, &[0]), Err(errno as u32));
    }
    // More or less data than announced.
    let mut body = access(0, 0, &[1, 2]);
    body[12] = 1;
    assert_eq!(client.ask(REGION_WRITE, &body), Err(EINVAL));
    body[12] = 3;
    assert_eq!(client.ask(REGION_WRITE, &body), Err(EINVAL));
    assert_eq!(bed.fake.deeds().writes.len(), 1);
}

#[test]
fn posted_writes_come_in_order_and_are_not_answered() {
    let bed = Bed::new();
    let mut client = bed.client();
    for n in 0..2000u32 {
        client.post(0, 0, &n.to_ne_bytes());
        if n % 3 == 0 {
            client.post(0, 300, &[0]);
            client.send(99, NO_REPLY, &[]);
            client.send(GET_INFO, NO_REPLY, &words(&[16, 0, 0, 0]));
            client.send(REGION_READ, NO_REPLY, &access(0, 0, &[])[..16]);
        }
    }
    assert_eq!(
        client.read(0, 0, 4),
        Ok(1999u32.to_ne_bytes().to_vec()),
        "the only answer"
    );
    let deeds = bed.fake.deeds();
    assert_eq!(deeds.writes.len(), 2000);
    for (n, (_, data)) in deeds.writes.iter().enumerate() {
        assert_eq!(data, &(n as u32).to_ne_bytes());
    }
}

fn multi(entries: &[(u64, u32, u32, u64)]) -> Vec<u8> {
    let mut body = longs(&[entries.len() as u64]);
    for &(offset, region, count, data) in entries {
        body.extend(longs(&[offset]));
        body.extend(words(&[region, count]));
        body.extend(longs(&[data]));
    }
    body
}

#[test]
fn write_multi() {
    let bed = Bed::new();
    let mut client = bed.client();
    let many: Vec<_> = (0..200).map(|n| (n % 100, 0, 1 + (n % 8) as u32, n)).collect();
    assert_eq!(client.ask(WRITE_MULTI, &multi(&many)), Ok(longs(&[200])));
    assert_eq!(bed.fake.deeds().writes.len(), 200);
    assert_eq!(bed.fake.deeds().writes[7], (7, 7u64.to_ne_bytes().to_vec()));
    assert_eq!(client.ask(WRITE_MULTI, &multi(&[])), Ok(longs(&[0])));
    // One that is wrong doesn't keep the others from being done.
    bed.fake.deeds().writes.clear();
    let entries = [(0, 0, 1, 1), (300, 0, 1, 2), (0, 0, 9, 3), (BAD, 0, 1, 4), (1, 0, 1, 5)];
    assert_eq!(client.ask(WRITE_MULTI, &multi(&entries)), Err(EINVAL));
    assert_eq!(bed.fake.deeds().writes, [(0, vec![1]), (1, vec![5])]);
    client.send(WRITE_MULTI, NO_REPLY, &multi(&entries));
    // Contradictions.
    let mut body = multi(&entries);
    body[0] = 4;
    assert_eq!(client.ask(WRITE_MULTI, &body), Err(EINVAL));
    assert_eq!(client.ask(WRITE_MULTI, &body[..body.len() - 1]), Err(EINVAL));
    assert_eq!(client.ask(WRITE_MULTI, &[0; 7]), Err(EINVAL));
    assert_eq!(client.ask(WRITE_MULTI, &longs(&[u64::MAX])), Err(EINVAL));
    let too_many: Vec<_> = (0..1025).map(|_| (0, 0, 1, 1)).collect();
    assert_eq!(client.ask(WRITE_MULTI, &multi(&too_many)), Err(libc::E2BIG as u32));
    assert_eq!(bed.fake.deeds().writes.len(), 4);
}

// --- memory

#[test]
fn memory_by_fd() {
    let bed = Bed::new();
    let mut client = bed.client();
    let file = memfd(0x10000);
    file.write_all_at(b"hello", 0x3000).unwrap();
    let fd = [file.as_raw_fd()];
    assert_eq!(
        client.ask_fds(DMA_MAP, &dma_map(3, 0x2000, 0x8000_0000, 0x4000), &fd),
        Ok(vec![])
    );
    {
        let deeds = bed.fake.deeds();
        let region = &deeds.map.regions()[0];
        assert_eq!(
            (region.guest, region.user, region.size),
            (0x8000_0000, 0x8000_0000, 0x4000)
        );
        assert!(region.writable() && region.remote().is_none());
        let mut buffers = Default::default();
        assert!(deeds.map.append(0x8000_1000, 5, &mut 0, &mut buffers));
        let mut seen = [0; 5];
        buffers.read(&mut seen);
        assert_eq!(&seen, b"hello");
        buffers.write(b"world");
    }
    let mut seen = [0; 5];
    file.read_exact_at(&mut seen, 0x3000).unwrap();
    assert_eq!(&seen, b"world");
    // Overlap, from both sides and within.
    for (iova, size) in [
        (0x8000_0000, 0x4000),
        (0x8000_3fff, 1),
        (0x7fff_f000, 0x1001),
        (0x8000_1000, 0x1000),
        (0x7000_0000, 0x2000_0000),
    ] {
        let reply = client.ask_fds(DMA_MAP, &dma_map(3, 0, iova, size), &fd);
        assert_eq!(reply, Err(libc::EEXIST as u32));
    }
    let map = |flags, offset, iova, size| dma_map(flags, offset, iova, size);
    for body in [
        map(0, 0, 0, 0x1000),
        map(4, 0, 0, 0x1000),
        map(7, 0, 0, 0x1000),
        map(3, 0, 0, 0),
        map(3, 0, u64::MAX - 0xfff, 0x1000),
        map(3, 0, u64::MAX, 2),
        map(3, 0xf000, 0, 0x1001),
        map(3, u64::MAX, 0, 0x1000),
        map(3, u64::MAX - 0xfff, 0, 0x1000),
    ] {
        assert_eq!(client.ask_fds(DMA_MAP, &body, &fd), Err(EINVAL), "{body:?}");
    }
    assert_eq!(
        client.ask_fds(DMA_MAP, &dma_map(3, 0, 0, 0x1000), &[fd[0], fd[0]]),
        Err(EINVAL)
    );
    // Unmapped in whole only, and answered with what was said.
    for (iova, size, errno) in [
        (0x8000_0000, 0x1000, libc::EINVAL),
        (0x8000_1000, 0x3000, libc::EINVAL),
        (0x8000_4000, 0x1000, libc::ENOENT),
        (0x8000_0000, 0, libc::EINVAL),
        (u64::MAX, 2, libc::EINVAL),
    ] {
        assert_eq!(client.ask(DMA_UNMAP, &dma_unmap(0, iova, size)), Err(errno as u32));
    }
    let unmap = dma_unmap(0, 0x8000_0000, 0x4000);
    assert_eq!(
        client.ask(DMA_UNMAP, &dma_unmap(1, 0x8000_0000, 0x4000)),
        Err(libc::ENOTSUP as u32)
    );
    assert_eq!(client.ask(DMA_UNMAP, &dma_unmap(4, 0x8000_0000, 0x4000)), Err(EINVAL));
    assert_eq!(client.ask(DMA_UNMAP, &unmap), Ok(unmap.clone()));
    assert!(bed.fake.deeds().map.is_empty());
    assert_eq!(client.ask(DMA_UNMAP, &unmap), Err(libc::ENOENT as u32));
    assert!(bed.pool.mappings().is_empty());
}

#[test]
fn several_ranges_at_once() {
    let bed = Bed::new();
    let mut client = bed.client();
    let file = memfd(0x10000);
    let fd = [file.as_raw_fd()];
    for n in 0..8 {
        client
            .ask_fds(DMA_MAP, &dma_map(3, n * 0x1000, n * 0x2000, 0x1000), &fd)
            .unwrap();
    }
    assert_eq!(
        client.ask(DMA_UNMAP, &dma_unmap(0, 0x1000, 0x5800)),
        Err(EINVAL),
        "half of one"
    );
    assert_eq!(bed.fake.deeds().map.regions().len(), 8);
    bed.fake.slow_unmap.store(true, Ordering::Relaxed);
    // 1, 2 and 3, one after the other.
    let id = client.send(DMA_UNMAP, 0, &dma_unmap(0, 0x1000, 0x7000));
    for left in [7, 6, 5] {
        bed.fake.deferred();
        assert_eq!(bed.fake.deeds().map.regions().len(), left);
        bed.fake.wake();
    }
    client.answer(id, DMA_UNMAP).unwrap();
    bed.fake.slow_unmap.store(false, Ordering::Relaxed);
    assert_eq!(client.ask(DMA_UNMAP, &dma_unmap(2, 0, 0x1000)), Err(EINVAL));
    assert_eq!(client.ask(DMA_UNMAP, &dma_unmap(2, 0, 0)), Ok(dma_unmap(2, 0, 0)));
    assert!(bed.fake.deeds().map.is_empty());
    assert_eq!(
        client.ask(DMA_UNMAP, &dma_unmap(2, 0, 0)),
        Ok(dma_unmap(2, 0, 0)),
        "nothing is no error here"
    );
}

#[test]
fn read_only_memory() {
    let bed = Bed::new();
    let mut client = bed.client();
    let path = format!("/dev/shm/vhu-test-{}", std::process::id());
    std::fs::write(&path, [7; 4096]).unwrap();
    let file = File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let fd = [file.as_raw_fd()];
    assert_eq!(
        client.ask_fds(DMA_MAP, &dma_map(3, 0, 0, 4096), &fd),
        Err(EINVAL),
        "not open for writing"
    );
    client.ask_fds(DMA_MAP, &dma_map(1, 0, 0, 4096), &fd).unwrap();
    let memory = memfd(4096);
    client
        .ask_fds(DMA_MAP, &dma_map(1, 0, 4096, 4096), &[memory.as_raw_fd()])
        .unwrap();
    memory.write_all_at(&[9], 0).unwrap();
    let deeds = bed.fake.deeds();
    assert!(deeds.map.regions().iter().all(|region| !region.writable()));
    let mut buffers = Default::default();
    assert!(deeds.map.append(4095, 2, &mut 0, &mut buffers));
    let mut seen = [0; 2];
    buffers.read(&mut seen);
    assert_eq!(seen, [7, 9]);
    buffers.write(&[1, 1]);
    let mut seen = [0; 1];
    memory.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, [9], "a device's write doesn't arrive");
}

#[test]
fn strange_fds_as_memory() {
    let bed = Bed::new();
    let mut client = bed.client();
    let before = open_fds();
    let (socket, _other) = UnixStream::pair().unwrap();
    let eventfd = sys::eventfd().unwrap();
    let null = File::open("/dev/null").unwrap();
    let directory = File::open("/").unwrap();
    for fd in [
        socket.as_raw_fd(),
        eventfd.as_raw_fd(),
        null.as_raw_fd(),
        directory.as_raw_fd(),
    ] {
        for flags in [1, 3] {
            assert_eq!(client.ask_fds(DMA_MAP, &dma_map(flags, 0, 0, 4096), &[fd]), Err(EINVAL));
        }
    }
    drop((socket, _other, eventfd, null, directory));
    until("fds closed", || open_fds() <= before);
    assert!(bed.fake.deeds().map.is_empty());
}

#[test]
fn as_many_ranges_as_there_is_room_for() {
    let bed = Bed::new();
    let mut client = bed.client();
    let file = memfd(4096);
    for n in 0..MAX_REGIONS as u64 {
        client
            .ask_fds(DMA_MAP, &dma_map(3, 0, n << 12, 4096), &[file.as_raw_fd()])
            .unwrap();
    }
    let one_more = dma_map(3, 0, 1 << 40, 4096);
    assert_eq!(
        client.ask_fds(DMA_MAP, &one_more, &[file.as_raw_fd()]),
        Err(libc::ENOSPC as u32)
    );
    assert_eq!(client.ask(DMA_MAP, &one_more), Err(libc::ENOSPC as u32));
    assert_eq!(bed.pool.mappings().len(), 1);
    client.ask(DMA_UNMAP, &dma_unmap(0, 0, 4096)).unwrap();
    client.ask_fds(DMA_MAP, &one_more, &[file.as_raw_fd()]).unwrap();
}

// --- interrupts

fn irqs(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    words(&[20, flags, index, start, count])
}

#[test]
fn interrupts() {
    let bed = Bed::new();
    let mut client = bed.client();
    let fds: Vec<OwnedFd> = (0..16).map(|_| sys::eventfd().unwrap()).collect();
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let log = |client: &mut Client, body: Vec<u8>, fds: &[i32]| {
        bed.fake.deeds().irqs.clear();
        let result = if fds.is_empty() {
            client.ask(SET_IRQS, &body)
        } else {
            client.ask_fds(SET_IRQS, &body, fds)
        };
        assert_eq!(result, Ok(vec![]));
        bed.fake.deeds().irqs.join(", ")
    };
    // As QEMU does: INTx; MSI-X in chunks, with runs that have no eventfd; single vectors; disable.
    assert_eq!(log(&mut client, irqs(0x24, 0, 0, 1), &raw[..1]), "assign 0 0 x");
    assert_eq!(log(&mut client, irqs(0x10 | 1, 0, 0, 1), &[]), "unmask 0 0 1");
    assert_eq!(log(&mut client, irqs(0x08 | 1, 0, 0, 1), &[]), "mask 0 0 1");
    assert_eq!(log(&mut client, irqs(0x21, 0, 0, 0), &[]), "disable 0");
    assert_eq!(
        log(&mut client, irqs(0x24, 2, 0, 16), &raw),
        "assign 2 0 xxxxxxxxxxxxxxxx"
    );
    assert_eq!(log(&mut client, irqs(0x24, 2, 16, 3), &[]), "assign 2 16 ---");
    assert_eq!(log(&mut client, irqs(0x24, 2, 20, 3), &raw[..2]), "assign 2 20 xx-");
    assert_eq!(log(&mut client, irqs(0x24, 2, 63, 1), &raw[..1]), "assign 2 63 x");
    assert_eq!(log(&mut client, irqs(0x21, 2, 3, 2), &[]), "trigger 2 3 2");
    assert_eq!(log(&mut client, irqs(0x21, 2, 0, 0), &[]), "disable 2");
    assert_eq!(
        log(&mut client, irqs(0x21, 1, 0, 0), &[]),
        "disable 1",
        "also when there are none"
    );
    let bools = |flags, values: &[u8]| {
        let mut body = irqs(flags, 2, 5, values.len() as u32);
        body.extend(values);
        body
    };
    assert_eq!(
        log(&mut client, bools(0x22, &[0, 1, 7, 0, 255]), &[]),
        "trigger 2 6 2, trigger 2 9 1"
    );
    assert_eq!(log(&mut client, bools(0x0a, &[1, 1]), &[]), "mask 2 5 2");
    assert_eq!(log(&mut client, bools(0x12, &[0]), &[]), "");
    for body in [
        irqs(0x24, 5, 0, 1),
        irqs(0x24, 2, 64, 1),
        irqs(0x24, 2, 60, 5),
        irqs(0x24, 2, u32::MAX, 1),
        irqs(0x24, 2, 1, u32::MAX),
        irqs(0x24, 2, 0, 0),
        irqs(0x21, 2, 1, 0),
        irqs(0x09, 2, 0, 0),
        irqs(0x25, 2, 0, 1),
        irqs(0x20, 2, 0, 1),
        irqs(0x04, 2, 0, 1),
        irqs(0x31, 2, 0, 1),
        irqs(0x41, 2, 0, 1),
        irqs(0x22, 2, 0, 2),
        [irqs(0x21, 2, 0, 1), vec![1]].concat(),
        words(&[19, 0x21, 2, 0, 1]),
    ] {
        assert_eq!(client.ask(SET_IRQS, &body), Err(EINVAL), "{body:?}");
    }
    // Fds that don't fit.
    assert_eq!(client.ask_fds(SET_IRQS, &irqs(0x24, 2, 0, 1), &raw[..2]), Err(EINVAL));
    assert_eq!(client.ask_fds(SET_IRQS, &irqs(0x21, 2, 0, 1), &raw[..1]), Err(EINVAL));
    let (socket, _other) = UnixStream::pair().unwrap();
    let mixed = [raw[0], socket.as_raw_fd()];
    assert_eq!(client.ask_fds(SET_IRQS, &irqs(0x24, 2, 0, 2), &mixed), Err(EINVAL));
    for flags in [0x0c, 0x14] {
        let reply = client.ask_fds(SET_IRQS, &irqs(flags, 2, 0, 1), &raw[..1]);
        assert_eq!(reply, Err(libc::ENOTSUP as u32));
    }
}

#[test]
fn the_function_raises_interrupts() {
    let bed = Bed::new();
    let mut client = bed.client();
    let fd = sys::eventfd().unwrap();
    client
        .ask_fds(SET_IRQS, &irqs(0x24, 2, 0, 1), &[fd.as_raw_fd()])
        .unwrap();
    for _ in 0..100 {
        let line = {
            let mut deeds = bed.fake.deeds();
            let vector = deeds.vectors[0].clone().unwrap();
            deeds.signals.push(vector);
            deeds.line.clone().unwrap()
        };
        line.wake();
        until("interrupt", || sys::eventfd_drain(fd.as_raw_fd()));
    }
}

#[test]
fn an_eventfd_unmasks_intx() {
    let bed = Bed::new();
    let mut client = bed.client();
    let fd = sys::eventfd().unwrap();
    let before = open_fds();
    client
        .ask_fds(SET_IRQS, &irqs(0x14, 0, 0, 1), &[fd.as_raw_fd()])
        .unwrap();
    for n in 1..=3 {
        sys::eventfd_signal(&fd);
        until("unmask", || bed.fake.deeds().irqs.len() == n);
    }
    assert_eq!(bed.fake.deeds().irqs[2], "unmask 0 0 1");
    // Another takes its place; disabling takes it away.
    client
        .ask_fds(SET_IRQS, &irqs(0x14, 0, 0, 1), &[fd.as_raw_fd()])
        .unwrap();
    client.ask(SET_IRQS, &irqs(0x21, 0, 0, 0)).unwrap();
    until("let go of", || open_fds() == before);
    // One that never runs dry costs turns, no more.
    // SAFETY: no pointers are involved.
    let endless = unsafe { libc::eventfd(u32::MAX, libc::EFD_SEMAPHORE | libc::EFD_CLOEXEC) };
    client.ask_fds(SET_IRQS, &irqs(0x14, 0, 0, 1), &[endless]).unwrap();
    for _ in 0..100 {
        client.read(0, 0, 1).unwrap();
    }
    // SAFETY: it was made above and is used by nobody else.
    unsafe { libc::close(endless) };
    drop(client);
    bed.free();
    until("closed", || open_fds() < before);
}

// --- what takes its time

#[test]
fn a_deferred_read() {
    let bed = Bed::new();
    let mut client = bed.client();
    bed.fake.deeds().again = 2;
    let id = client.send(REGION_READ, 0, &access(SLOW, 0, &[0; 4])[..16]);
    // These wait behind it.
    client.post(0, 0, &[1]);
    let next = client.send(REGION_READ, 0, &access(0, 0, &[0; 1])[..16]);
    for _ in 0..3 {
        bed.fake.deferred();
        assert!(client.quiet());
        assert!(bed.fake.deeds().writes.is_empty());
        bed.fake.wake();
    }
    assert_eq!(client.answer(id, REGION_READ).unwrap()[16..], [0x99; 4]);
    assert_eq!(client.answer(next, REGION_READ).unwrap()[16..], [1]);
    let deeds = bed.fake.deeds();
    assert_eq!((deeds.resumed, deeds.given_up), (3, 0));
}

#[test]
fn nobody_waits_for_a_second() {
    let bed = Bed::new();
    let mut client = bed.client();
    let begin = Instant::now();
    client.send(REGION_READ, 0, &access(SLOW, 0, &[0; 4])[..16]);
    let reply = client.receive().unwrap();
    assert_eq!((reply.flags, reply.error), (0x21, libc::ETIMEDOUT as u32));
    let waited = begin.elapsed();
    assert!(
        waited > Duration::from_millis(700) && waited < Duration::from_millis(1500),
        "{waited:?}"
    );
    assert_eq!(bed.fake.deeds().given_up, 1);
    // Its waker comes too late, and must not be taken for that of the next one.
    let late = bed.fake.deeds().wakers.pop().unwrap();
    let begin = Instant::now();
    let id = client.send(REGION_WRITE, 0, &access(SLOW, 0, &[5]));
    bed.fake.deferred();
    late();
    assert!(client.answer(id, REGION_WRITE).is_ok(), "the write will still happen");
    assert!(begin.elapsed() > Duration::from_millis(700));
    let (given_up, resumed) = {
        let deeds = bed.fake.deeds();
        (deeds.given_up, deeds.resumed)
    };
    assert_eq!((given_up, resumed), (2, 0));
    bed.fake.slow_reset.store(true, Ordering::Relaxed);
    assert!(client.ask(RESET, &[]).is_ok());
    bed.fake.slow_unmap.store(true, Ordering::Relaxed);
    let file = memfd(4096);
    client
        .ask_fds(DMA_MAP, &dma_map(3, 0, 0, 4096), &[file.as_raw_fd()])
        .unwrap();
    let reply = client.ask(DMA_UNMAP, &dma_unmap(0, 0, 4096));
    assert_eq!(
        reply,
        Err(libc::ETIMEDOUT as u32),
        "memory in use is not reported as free"
    );
    assert_eq!(bed.fake.deeds().given_up, 4);
}

#[test]
fn those_who_wait_behind_wait_no_longer() {
    let bed = Bed::new();
    let mut client = bed.client();
    let begin = Instant::now();
    for n in 0..100 {
        client.post(0, SLOW, &[n]);
    }
    let id = client.send(REGION_READ, 0, &access(SLOW, 0, &[0; 1])[..16]);
    assert_eq!(client.answer(id, REGION_READ), Err(libc::ETIMEDOUT as u32));
    assert!(begin.elapsed() < Duration::from_millis(1500), "{:?}", begin.elapsed());
    let deeds = bed.fake.deeds();
    assert_eq!((deeds.writes.len(), deeds.given_up), (100, 101));
}

#[test]
fn deferred_in_the_middle_of_several_writes() {
    let bed = Bed::new();
    let mut client = bed.client();
    let id = client.send(
        WRITE_MULTI,
        0,
        &multi(&[
            (0, 0, 1, 1),
            (SLOW, 0, 1, 2),
            (1, 0, 1, 3),
            (SLOW, 0, 1, 4),
            (2, 0, 1, 5),
        ]),
    );
    bed.fake.deferred();
    assert_eq!(bed.fake.deeds().writes.len(), 2);
    bed.fake.wake();
    bed.fake.deferred();
    assert_eq!(bed.fake.deeds().writes.len(), 4);
    bed.fake.wake();
    assert_eq!(client.answer(id, WRITE_MULTI), Ok(longs(&[5])));
    assert_eq!(bed.fake.deeds().writes.len(), 5);
}

#[test]
fn a_client_leaves_while_it_waits() {
    let bed = Bed::new();
    for command in [REGION_READ, REGION_WRITE, RESET] {
        bed.fake.slow_reset.store(true, Ordering::Relaxed);
        let mut client = bed.client();
        match command {
            REGION_READ => client.send(command, 0, &access(SLOW, 0, &[0; 4])[..16]),
            REGION_WRITE => client.send(command, 0, &access(SLOW, 0, &[0; 4])),
            _ => client.send(command, 0, &[]),
        };
        bed.fake.deferred();
        let begin = Instant::now();
        drop(client);
        bed.free();
        assert!(begin.elapsed() < Duration::from_millis(750), "at once");
        // The waker of somebody who is gone.
        bed.fake.wake();
    }
    assert_eq!(bed.fake.deeds().given_up, 3);
    assert!(bed.client().read(0, 0, 1).is_ok());
}

// --- the stream

#[test]
fn messages_in_pieces_and_in_heaps() {
    let bed = Bed::new();
    let mut client = bed.client();
    let bytes = [
        message(1, REGION_WRITE, NO_REPLY, &access(0, 0, &[42; 8])),
        message(2, REGION_READ, 0, &access(0, 0, &[0; 8])[..16]),
    ]
    .concat();
    for byte in &bytes {
        client.write(std::slice::from_ref(byte));
        std::thread::sleep(Duration::from_micros(300));
    }
    assert_eq!(client.answer(2, REGION_READ).unwrap()[16..], [42; 8]);
    // Cut at odd places.
    let mut heap = Vec::new();
    for n in 0..1000u16 {
        heap.extend(message(n, REGION_READ, 0, &access(0, 0, &[0; 8])[..16]));
    }
    let (mut reader, mut random) = (client.socket.try_clone().unwrap(), Random::new(7));
    let writer = std::thread::spawn(move || {
        use std::io::Write;
        let mut rest = &heap[..];
        while !rest.is_empty() {
            let n = (1 + random.below(200) as usize).min(rest.len());
            reader.write_all(&rest[..n]).unwrap();
            rest = &rest[n..];
        }
    });
    for n in 0..1000 {
        assert_eq!(client.answer(n, REGION_READ).unwrap()[16..], [42; 8]);
    }
    writer.join().unwrap();
}

#[test]
fn fds_find_their_message() {
    let bed = Bed::new();
    let mut client = bed.client();
    let files: Vec<File> = (0..4).map(|_| memfd(4096)).collect();
    for (n, file) in files.iter().enumerate() {
        file.write_all_at(&[n as u8 + 1], 0).unwrap();
    }
    // All at once: posted writes, a map with an fd, more writes, the next map.
    let mut ids = Vec::new();
    for (n, file) in files.iter().enumerate() {
        client.post(0, 0, &[1]);
        client.post(0, 0, &[1]);
        ids.push(client.send_fds(DMA_MAP, &dma_map(3, 0, n as u64 * 4096, 4096), &[file.as_raw_fd()]));
        client.post(0, 0, &[1]);
    }
    for id in ids {
        client.answer(id, DMA_MAP).unwrap();
    }
    // In pieces: the fd comes with any of them.
    for (n, at) in [(4u64, 16usize), (5, 1), (6, 47)] {
        let bytes = message(9, DMA_MAP, 0, &dma_map(3, 0, n * 4096, 4096));
        client.write(&bytes[..at]);
        std::thread::sleep(Duration::from_millis(5));
        let fd = [files[n as usize - 4].as_raw_fd()];
        client.socket.send_with_fds(&[&bytes[at..]], &fd).unwrap();
        client.answer(9, DMA_MAP).unwrap();
    }
    let deeds = bed.fake.deeds();
    for (n, wanted) in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 1), (5, 2), (6, 3)] {
        let mut buffers = Default::default();
        assert!(deeds.map.append(n * 4096, 1, &mut 0, &mut buffers));
        let mut seen = [0];
        buffers.read(&mut seen);
        assert_eq!(seen, [wanted], "{n}");
    }
}

#[test]
fn fds_that_nobody_wants() {
    let bed = Bed::new();
    let before = open_fds();
    let mut client = bed.client();
    let fds: Vec<OwnedFd> = (0..200).map(|_| sys::eventfd().unwrap()).collect();
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    for command in [
        GET_INFO,
        REGION_READ,
        REGION_WRITE,
        RESET,
        DMA_UNMAP,
        WRITE_MULTI,
        VERSION,
        99,
    ] {
        assert_eq!(client.ask_fds(command, &[], &raw[..16]), Err(EINVAL));
    }
    assert_eq!(bed.fake.deeds().resets, 0);
    // More than were agreed, at once and one by one.
    client.send_fds(SET_IRQS, &irqs(0x24, 2, 0, 17), &raw[..17]);
    assert!(client.is_closed());
    bed.free();
    client = bed.client();
    client.send_fds(GET_INFO, &[], &raw);
    assert!(client.is_closed());
    bed.free();
    client = bed.client();
    let bytes = message(1, SET_IRQS, 0, &irqs(0x24, 2, 0, 17));
    let mut pieces = bytes.chunks(2).collect::<Vec<_>>();
    let last = pieces.pop().unwrap();
    for (piece, fd) in pieces.iter().zip(&raw) {
        client.socket.send_with_fds(&[*piece], &[*fd]).unwrap();
    }
    let _ = client.socket.send_with_fds(&[last], &raw[..1]);
    assert!(client.is_closed());
    bed.free();
    // A message that never gets whole.
    client = bed.client();
    client.socket.send_with_fds(&[&bytes[..20]], &raw[..16]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    drop(client);
    bed.free();
    drop(fds);
    until("fds closed", || open_fds() <= before);
}

#[test]
fn streams_that_make_no_sense() {
    let bed = Bed::new();
    let sized = |size: u32| {
        let mut bytes = message(1, REGION_READ, 0, &[]);
        bytes[4..8].copy_from_slice(&size.to_ne_bytes());
        bytes
    };
    for bytes in [
        sized(0),
        sized(15),
        sized((1 << 20) + 4097),
        sized(u32::MAX),
        message(1, REGION_READ, 2, &[0; 16]),
        message(1, REGION_READ, 0xf, &[0; 16]),
        message(1, DMA_READ, 1, &[0; 16]),
    ] {
        let mut client = bed.client();
        client.write(&bytes);
        assert!(client.is_closed());
        bed.free();
    }
    // Gone at every point of a message.
    let bytes = message(1, REGION_WRITE, 0, &access(0, 0, &[1; 8]));
    for at in 0..bytes.len() {
        let mut client = bed.client();
        client.write(&bytes[..at]);
        drop(client);
        bed.free();
    }
    assert!(bed.fake.deeds().writes.is_empty());
    // Says that it is done, and still gets its answers.
    let mut client = bed.client();
    for n in 0..100 {
        client.write(&message(n, REGION_READ, 0, &access(0, 0, &[0; 1])[..16]));
    }
    client.socket.shutdown(std::net::Shutdown::Write).unwrap();
    for n in 0..100 {
        client.answer(n, REGION_READ).unwrap();
    }
    assert!(client.is_closed());
    bed.free();
    let statistics = bed.server.statistics();
    assert_eq!((statistics.connections, statistics.refused), (7 + 40 + 1, 0));
}

#[test]
fn a_client_that_does_not_read() {
    let bed = Bed::new();
    let other = Bed::on(&bed.pool, 2);
    let mut slow = bed.client();
    let mut good = other.client();
    slow.socket.set_nonblocking(true).unwrap();
    // Asks for more than there is room for, until nobody takes it any more.
    let ask = message(1, REGION_READ, 0, &access(0, 2, &[0; 65536])[..16]);
    let mut asked = 0;
    let mut stuck = 0;
    while stuck < 50 {
        use std::io::Write;
        match slow.socket.write(&ask) {
            Ok(n) => {
                assert_eq!(n, ask.len());
                asked += 1;
            }
            Err(_) => {
                stuck += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(asked < 1_000_000);
    }
    // The others don't notice, and the workers sleep.
    for _ in 0..100 {
        good.read(0, 0, 4).unwrap();
    }
    let turns = |bed: &Bed| bed.pool.statistics().iter().map(|worker| worker.turns).sum::<u64>();
    std::thread::sleep(Duration::from_millis(20));
    let before = turns(&bed);
    std::thread::sleep(Duration::from_millis(200));
    assert!(turns(&bed) - before < 10, "it costs nothing");
    // It comes to its senses.
    slow.socket.set_nonblocking(false).unwrap();
    for _ in 0..asked {
        assert_eq!(slow.answer(1, REGION_READ).unwrap().len(), 16 + 65536);
    }
    slow.post(0, 0, &[1]);
    slow.read(0, 0, 1).unwrap();
    // And another leaves instead.
    slow.socket.set_nonblocking(true).unwrap();
    for _ in 0..100 {
        use std::io::Write;
        let _ = slow.socket.write(&ask);
    }
    std::thread::sleep(Duration::from_millis(20));
    drop(slow);
    bed.free();
}

#[test]
fn a_flood_does_not_drown_others() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let (bed, other) = (Bed::on(&pool, 1), Bed::on(&pool, 2));
    let mut flood = bed.client();
    let mut good = other.client();
    let heap = message(1, REGION_WRITE, NO_REPLY, &access(0, 1, &[0; 4])).repeat(1000);
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let flooder = std::thread::spawn(move || {
        while stopped.try_recv().is_err() {
            flood.write(&heap);
        }
    });
    until("flooded", || bed.server.statistics().messages > 10_000);
    // The middle one: a machine that is busy with other things may hold up any single one.
    let mut times: Vec<Duration> = (0..200)
        .map(|_| {
            let begin = Instant::now();
            good.read(0, 0, 4).unwrap();
            begin.elapsed()
        })
        .collect();
    times.sort();
    assert!(times[100] < Duration::from_millis(50), "{times:?}");
    stop.send(()).unwrap();
    flooder.join().unwrap();
}

// --- who may come

#[test]
fn one_client_at_a_time() {
    let bed = Bed::new();
    let mut first = bed.client();
    for n in 1..=3 {
        let mut second = bed.raw();
        assert!(second.is_closed());
        assert_eq!(bed.server.statistics().refused, n);
    }
    assert!(first.read(0, 0, 1).is_ok());
    let statistics = bed.server.statistics();
    assert!(statistics.connected);
    assert_eq!(statistics.peer_pid, Some(std::process::id() as i32));
    // Who comes while the first one's things are still being let go of waits, and isn't turned away.
    bed.fake.hold_detach.store(true, Ordering::Relaxed);
    drop(first);
    let mut next = bed.raw();
    let id = next.send(VERSION, 0, &[0; 4]);
    assert!(next.quiet());
    assert!(!bed.server.statistics().connected);
    bed.fake.hold_detach.store(false, Ordering::Relaxed);
    let leaving = std::mem::take(&mut bed.fake.deeds().leaving);
    assert_eq!(leaving.len(), 1);
    drop(leaving);
    next.answer(id, VERSION).unwrap();
    let statistics = bed.server.statistics();
    assert_eq!((statistics.connections, statistics.refused), (2, 3));
    // One after the other, as fast as they come.
    drop(next);
    for _ in 0..50 {
        drop(bed.client());
    }
    assert_eq!(bed.server.statistics().refused, 3);
}

#[test]
fn a_function_that_is_attached_elsewhere() {
    let bed = Bed::new();
    bed.fake.busy.store(true, Ordering::Relaxed);
    for n in 1..=3 {
        assert!(bed.raw().is_closed());
        until("counted", || bed.server.statistics().refused == n);
    }
    bed.fake.busy.store(false, Ordering::Relaxed);
    let mut client = bed.client();
    assert!(client.read(0, 0, 1).is_ok());
    assert_eq!(bed.fake.deeds().detached, 0, "what wasn't attached isn't detached");
}

#[test]
fn a_client_that_says_nothing() {
    let bed = Bed::new();
    let begin = Instant::now();
    let mut silent = bed.raw();
    silent.write(&message(1, VERSION, 0, &[0; 4])[..10]);
    until("attached", || bed.server.statistics().connected);
    let mut other = bed.raw();
    assert!(other.is_closed());
    assert!(silent.is_closed());
    let waited = begin.elapsed();
    assert!(
        waited > GREETING && waited < GREETING + Duration::from_secs(1),
        "{waited:?}"
    );
    bed.free();
    // One that has greeted may be silent for as long as it likes.
    let mut client = bed.client();
    std::thread::sleep(GREETING + Duration::from_millis(100));
    client.read(0, 0, 1).unwrap();
}

fn events(bed: &Bed, count: usize) -> Vec<String> {
    let mut seen = Vec::new();
    until("events", || {
        seen.extend(bed.pool.events().take().into_iter().map(|event| match event {
            Event::FunctionConnected {
                member,
                function,
                peer_pid,
            } => {
                assert_eq!(peer_pid, Some(std::process::id() as i32));
                format!("+{member} {function}")
            }
            Event::FunctionDisconnected {
                member,
                function,
                reason,
            } => format!("-{member} {function}: {reason}"),
            other => panic!("{other:?}"),
        }));
        seen.len() >= count
    });
    seen
}

#[test]
fn comings_and_goings_are_told() {
    let bed = Bed::new();
    let mut client = bed.client();
    assert_eq!(events(&bed, 1), ["+1 modern"]);
    let _ = bed.raw().is_closed();
    bed.server.disconnect("the operator said so");
    assert!(client.is_closed());
    assert_eq!(events(&bed, 1), ["-1 modern: the operator said so"]);
    bed.server.disconnect("nobody is there");
    let mut client = bed.client();
    client.write(&[0xff; 16]);
    assert!(client.is_closed());
    let seen = events(&bed, 2);
    assert_eq!(seen[0], "+1 modern");
    assert!(seen[1].starts_with("-1 modern: message.size"), "{seen:?}");
    drop(bed.client());
    assert_eq!(events(&bed, 2)[1], "-1 modern: the client has left");
    let mut client = bed.client();
    client.write(&[0; 3]);
    drop(client);
    assert_eq!(
        events(&bed, 2)[1],
        "-1 modern: the client has left in the middle of a message"
    );
}

#[test]
fn closing() {
    let before = open_fds();
    let bed = Bed::new();
    let mut client = bed.client();
    bed.fake.hold_detach.store(true, Ordering::Relaxed);
    let (done, closed) = completion();
    bed.server.close(done);
    assert!(client.is_closed());
    until("listener closed", || UnixStream::connect_addr(&bed.address).is_err());
    assert!(!closed.load(Ordering::Acquire), "its things are still in use");
    let (done, again) = completion();
    bed.server.close(done);
    until("detached", || !bed.fake.deeds().leaving.is_empty());
    let leaving = std::mem::take(&mut bed.fake.deeds().leaving);
    drop(leaving);
    until("closed", || {
        closed.load(Ordering::Acquire) && again.load(Ordering::Acquire)
    });
    let (done, third) = completion();
    bed.server.close(done);
    until("closed", || third.load(Ordering::Acquire));
    assert_eq!(events(&bed, 2)[1], "-1 modern: the server was closed");
    // A server that is dropped lets go as well, and a pool that is closed takes everybody along.
    let second = Bed::on(&bed.pool, 2);
    client = second.client();
    drop(second.server);
    assert!(client.is_closed());
    let third = Bed::on(&bed.pool, 3);
    client = third.client();
    bed.pool.close();
    assert!(client.is_closed());
    third.free();
    let (listener, _) = listener();
    let function = Arc::clone(&third.fake) as Arc<dyn PciFunction>;
    let late = Server::new(&bed.pool, function, listener.into()).unwrap();
    late.close(Completion::call(|| ()));
    drop((bed, client, third, late, second.pool));
    until("fds closed", || open_fds() <= before);
}

#[test]
fn only_a_listening_socket_will_do() {
    let pool = Arc::new(Pool::new(Some(1)).unwrap());
    let (stream, _other) = UnixStream::pair().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for fd in [
        OwnedFd::from(stream),
        tcp.into(),
        memfd(1).into(),
        sys::eventfd().unwrap(),
    ] {
        let function = Fake::new(1) as Arc<dyn PciFunction>;
        assert!(Server::new(&pool, function, fd).is_err());
    }
}

#[test]
fn fifty_functions() {
    let pool = Arc::new(Pool::new(Some(2)).unwrap());
    let beds: Vec<Bed> = (0..50).map(|id| Bed::on(&pool, id)).collect();
    let mut clients: Vec<Client> = beds.iter().map(Bed::client).collect();
    for round in 0..20u32 {
        for client in &mut clients {
            client.post(0, 0, &round.to_ne_bytes());
            client.send(REGION_READ, 0, &access(0, 0, &[0; 4])[..16]);
        }
        for client in &mut clients {
            let reply = client.receive().unwrap();
            assert_eq!(reply.body[16..], round.to_ne_bytes());
        }
    }
    // Half of them go; the others stay.
    clients.truncate(25);
    for bed in &beds[25..] {
        bed.free();
    }
    for client in &mut clients {
        client.read(0, 0, 4).unwrap();
    }
    let all: u64 = beds.iter().map(|bed| bed.server.statistics().reads).sum();
    assert_eq!(all, 50 * 20 + 25);
}

// --- anything at all

#[test]
fn random_bytes() {
    let bed = Bed::new();
    let mut random = Random::new(1);
    for _ in 0..300 {
        let mut client = bed.raw();
        if random.chance(50) {
            client.version(0, 0, CAPABILITIES);
        }
        let bytes: Vec<u8> = (0..random.below(300)).map(|_| random.next() as u8).collect();
        client.write(&bytes);
        drop(client);
        bed.free();
    }
    assert!(bed.client().read(0, 0, 1).is_ok());
}

#[test]
fn random_messages() {
    let bed = Bed::new();
    let mut random = Random::new(2);
    let file = memfd(1 << 20);
    let eventfd = sys::eventfd().unwrap();
    let (pipe, _other) = UnixStream::pair().unwrap();
    let before = open_fds();
    for _ in 0..200 {
        let mut client = bed.client();
        let mut posted = 0;
        for _ in 0..random.below(40) {
            let command = random.below(20) as u16;
            let flags = if random.chance(30) { NO_REPLY } else { 0 };
            let interesting = [0u32, 1, 2, 3, 4, 7, 8, 16, 20, 24, 32, 0x24, 0x1000, 0xffff_ffff];
            let count = random.below(12) as usize;
            let mut body: Vec<u8> = (0..count)
                .flat_map(|_| interesting[random.below(14) as usize].to_ne_bytes())
                .collect();
            body.truncate(body.len() - (random.below(4) as usize).min(body.len()));
            if command == REGION_READ && body.len() >= 16 && body[..8] == SLOW.to_ne_bytes() {
                continue;
            }
            let fds: Vec<i32> = (0..random.below(3))
                .map(|_| [file.as_raw_fd(), eventfd.as_raw_fd(), pipe.as_raw_fd()][random.below(3) as usize])
                .collect();
            let bytes = message(posted, command, flags, &body);
            if random.chance(20) {
                client.socket.send_with_fds(&[&bytes[..]], &fds).unwrap();
            } else {
                client.write(&bytes);
            }
            if flags == 0 {
                let reply = client.receive().unwrap();
                assert_eq!((reply.id, reply.command), (posted, command));
            }
            posted += 1;
        }
        drop(client);
        bed.free();
    }
    until("fds closed", || open_fds() <= before);
    let _: UnixListener = listener().0;
}
