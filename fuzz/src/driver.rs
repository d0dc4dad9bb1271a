// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver of block devices with split rings in a memory file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use vhu_core::ring::split::{area_sizes, RingAddresses};

use crate::Number;

/// Bytes of a queue in the file: its ring, and its buffers.
pub const QUEUE: u64 = 0x4000;
const BUFFERS: u64 = 0x2000;
/// Queues that have a place.
pub const QUEUES: u8 = 4;
/// Bytes of the file.
pub const SIZE: u64 = QUEUE * QUEUES as u64;

/// A block request.
#[derive(Arbitrary, Debug)]
pub struct Blk {
    kind: u8,
    sector: Number,
    len: u8,
    status: bool,
}

/// Where a queue's ring is, as offsets in the file: as legacy drivers lay it out, which will do for all.
pub fn layout(queue: u8, size: u16) -> RingAddresses {
    let desc = QUEUE * u64::from(queue % QUEUES);
    let (table, available, _) = area_sizes(size);
    let driver = desc + table;
    RingAddresses {
        desc,
        driver,
        device: (driver + available).next_multiple_of(4096),
    }
}

pub fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn write(file: &File, offset: u64, bytes: &[u8]) {
    file.write_all_at(bytes, offset).expect("writing to a memfd");
}

/// An empty ring.
pub fn empty(file: &File, ring: &RingAddresses) {
    write(file, ring.driver, &[0; 4]);
    write(file, ring.device, &[0; 4]);
}

/// The three buffers of a request, after its header has been written: guest address, length, whether it is written.
fn buffers(file: &File, base: u64, queue: u8, n: u64, request: &Blk) -> [(u64, u32, bool); 3] {
    let at = QUEUE * u64::from(queue % QUEUES) + BUFFERS + n * 0x300;
    let mut header = words(&[u32::from(request.kind % 16), 0]);
    header.extend(longs(&[request.sector.get()]));
    write(file, at, &header);
    let len = u32::from(request.len % 8) * 128;
    [
        (base + at, 16, false),
        (base + at + 16, len.max(1), request.kind % 4 != 1),
        (base + at + 0x2f0, 1, request.status),
    ]
}

/// The same in a packed ring; `place` is the driver's, counted from the ring's first use.
pub fn offer_packed(file: &File, base: u64, queue: u8, size: u16, place: &mut u64, requests: &[Blk]) {
    let ring = layout(queue, size);
    for (n, request) in (0u64..).zip(requests.iter().take(usize::from(size / 3).min(10))) {
        let id = (*place % u64::from(size)) as u32;
        for (m, (addr, len, written)) in (0u32..).zip(buffers(file, base, queue, n, request)) {
            let lap = (*place / u64::from(size)) % 2;
            let flags = u32::from(m < 2) | if written { 2 } else { 0 } | if lap == 0 { 1 << 7 } else { 1 << 15 };
            let mut bytes = longs(&[addr]);
            bytes.extend(words(&[len, id | flags << 16]));
            write(file, ring.desc + 16 * (*place % u64::from(size)), &bytes);
            *place += 1;
        }
    }
}

/// Makes requests of three descriptors each available; the file's first byte is at guest address `base`.
pub fn offer(file: &File, base: u64, queue: u8, size: u16, requests: &[Blk]) {
    let ring = layout(queue, size);
    let mut index = [0; 2];
    // Beyond the end of a truncated file there is nothing.
    let _ = file.read_at(&mut index, ring.driver + 2);
    let mut index = u16::from_le_bytes(index);
    for (n, request) in (0u64..).zip(requests.iter().take(usize::from(size / 3).min(10))) {
        let head = n as u32 * 3;
        for (m, (addr, len, written)) in (0u32..).zip(buffers(file, base, queue, n, request)) {
            let next = if m < 2 { 1 | (head + m + 1) << 16 } else { 0 };
            let mut bytes = longs(&[addr]);
            bytes.extend(words(&[len, next | if written { 2 } else { 0 }]));
            write(file, ring.desc + 16 * u64::from(head + m), &bytes);
        }
        write(
            file,
            ring.driver + 4 + 2 * u64::from(index % size),
            &(head as u16).to_le_bytes(),
        );
        index = index.wrapping_add(1);
    }
    write(file, ring.driver + 2, &index.to_le_bytes());
}
