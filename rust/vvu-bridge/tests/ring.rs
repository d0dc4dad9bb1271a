// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of the ring against a device that the test plays, well-behaved and not.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::Ordering;
use std::sync::Arc;

use vvu_bridge::memory::Dma;
use vvu_bridge::message::MAX_MESSAGE;
use vvu_bridge::ring::{Ring, RingError, STRIDE};
use vvu_bridge::sys::DmaPages;

const SIZE: u16 = 8;
const BUFFERS: usize = 0x1000;
const AVAIL: usize = 16 * SIZE as usize;
const USED: usize = (AVAIL + 6 + 2 * SIZE as usize).next_multiple_of(4);

/// Pages `apart` bytes apart for the device.
fn memory(apart: u64) -> Arc<Dma> {
    let pages = DmaPages::small(0x10000).unwrap();
    let addresses = (0..16).map(|page| 0x5_0000_0000 + page * apart).collect();
    Arc::new(Dma::new(pages, addresses, 0x1000))
}

fn ring(memory: &Arc<Dma>, receives: bool) -> Ring {
    Ring::new(memory.clone(), 0, SIZE, BUFFERS, receives, true)
}

/// Address, length, flags, next.
fn descriptor(memory: &Dma, index: u16) -> (u64, u32, u16, u16) {
    let (pages, at) = (memory.pages(), 16 * usize::from(index));
    let relaxed = Ordering::Relaxed;
    (
        pages.load64(at),
        pages.load32(at + 8),
        pages.load16(at + 12, relaxed),
        pages.load16(at + 14, relaxed),
    )
}

fn avail_index(memory: &Dma) -> u16 {
    memory.pages().load16(AVAIL + 2, Ordering::Relaxed)
}

fn avail_entry(memory: &Dma, index: u16) -> u16 {
    memory
        .pages()
        .load16(AVAIL + 4 + 2 * usize::from(index % SIZE), Ordering::Relaxed)
}

fn use_buffer(memory: &Dma, index: u16, id: u32, length: u32) {
    let at = USED + 4 + 8 * usize::from(index % SIZE);
    memory.pages().store32(at, id);
    memory.pages().store32(at + 4, length);
    memory
        .pages()
        .store16(USED + 2, index.wrapping_add(1), Ordering::Release);
}

#[test]
fn parts_are_where_a_split_ring_of_that_size_has_them() {
    let memory = memory(0x1000);
    let parts = ring(&memory, true).parts();
    assert_eq!((parts.desc, parts.avail, parts.used), (0, AVAIL, USED));
}

#[test]
fn a_buffer_over_two_scattered_pages_is_a_chain_of_two() {
    let memory = memory(0x3000);
    let mut ring = ring(&memory, true);
    assert!(ring.offer() && ring.offer());
    // Slot 0 begins on a page, slot 1 STRIDE after it.
    assert_eq!(descriptor(&memory, 0), (0x5_0000_3000, 0x1000, 2 | 1, 1));
    assert_eq!(descriptor(&memory, 1), (0x5_0000_6000, 12, 2, 0));
    let first = 0x2000 - STRIDE as u32 % 0x1000 - 0x1000;
    assert_eq!(
        descriptor(&memory, 2),
        (0x5_0000_6000 + STRIDE as u64 % 0x1000, first, 2 | 1, 3)
    );
    assert_eq!(
        descriptor(&memory, 3),
        (0x5_0000_9000, MAX_MESSAGE as u32 - first, 2, 0)
    );
    assert_eq!(
        (avail_index(&memory), avail_entry(&memory, 0), avail_entry(&memory, 1)),
        (2, 0, 2)
    );
}

#[test]
fn a_buffer_in_one_piece_is_one_descriptor() {
    let memory = memory(0x1000);
    let mut ring = ring(&memory, true);
    assert!(ring.offer());
    assert_eq!(descriptor(&memory, 0), (0x5_0000_1000, MAX_MESSAGE as u32, 2, 1));
}

#[test]
fn every_slot_is_offered_once_and_comes_back() {
    let memory = memory(0x3000);
    let mut ring = ring(&memory, true);
    assert!(ring.is_idle());
    let offered = (0..10).filter(|_| ring.offer()).count();
    assert_eq!(offered, usize::from(SIZE / 2));
    assert!(!ring.has_free() && !ring.is_idle());
    use_buffer(&memory, 0, 6, 20);
    assert_eq!(ring.take_used(), Ok(Some((3, 20))), "in the order of the device");
    assert_eq!(ring.take_used(), Ok(None));
    assert!(ring.offer());
    assert_eq!(avail_entry(&memory, 4), 6);
}

#[test]
fn a_message_is_sent_with_its_length_and_received_as_written() {
    let memory = memory(0x3000);
    let mut ring = ring(&memory, false);
    let message: Vec<u8> = (0..MAX_MESSAGE).map(|at| at as u8).collect();
    assert!(ring.send(&message));
    assert_eq!(
        descriptor(&memory, 0),
        (0x5_0000_3000, 0x1000, 1, 1),
        "read by the device"
    );
    assert_eq!(descriptor(&memory, 1), (0x5_0000_6000, 12, 0, 0));
    assert!(ring.send(&message[..20]));
    assert_eq!(descriptor(&memory, 2).1, 20);
    assert_eq!(ring.copy(0, MAX_MESSAGE), message);
}

#[test]
fn indices_wrap_around() {
    let memory = memory(0x3000);
    let mut ring = ring(&memory, false);
    for index in 0..=u16::MAX {
        assert!(ring.send(&index.to_le_bytes()));
        use_buffer(&memory, index, avail_entry(&memory, index).into(), 0);
        assert!(matches!(ring.take_used(), Ok(Some(_))));
    }
    assert_eq!(avail_index(&memory), 0);
    assert!(ring.send(&[1; 20]));
    assert_eq!(ring.take_used(), Ok(None));
    assert!(!ring.is_idle());
}

#[test]
fn the_device_is_notified_once_unless_it_asks_not_to_be() {
    let memory = memory(0x3000);
    let mut ring = ring(&memory, true);
    assert!(!ring.take_notification(), "nothing is available");
    ring.offer();
    ring.offer();
    assert!(ring.take_notification());
    assert!(!ring.take_notification());
    memory.pages().store16(USED, 1, Ordering::Relaxed);
    ring.offer();
    assert!(!ring.take_notification());
}

#[test]
fn without_interrupts_the_device_is_told() {
    let memory = memory(0x3000);
    Ring::new(memory.clone(), 0, SIZE, BUFFERS, true, true);
    assert_eq!(memory.pages().load16(AVAIL, Ordering::Relaxed), 0);
    Ring::new(memory.clone(), 0, SIZE, BUFFERS, true, false);
    assert_eq!(memory.pages().load16(AVAIL, Ordering::Relaxed), 1);
}

#[test]
fn a_used_index_ahead_of_what_is_there_is_an_error() {
    for index in [2, 3, 0xffff] {
        let memory = memory(0x3000);
        let mut ring = ring(&memory, true);
        ring.offer();
        memory.pages().store16(USED + 2, index, Ordering::Release);
        assert_eq!(ring.take_used(), Err(RingError::UsedIndex(index)));
    }
}

#[test]
fn a_used_element_names_a_buffer_that_the_device_has() {
    // The second half of a slot, one that wasn't offered, ones that don't exist.
    for id in [1, 2, u32::from(SIZE), 0x1_0000, u32::MAX] {
        let memory = memory(0x3000);
        let mut ring = ring(&memory, true);
        ring.offer();
        use_buffer(&memory, 0, id, 20);
        assert_eq!(ring.take_used(), Err(RingError::UsedId(id)));
    }
}

#[test]
fn a_buffer_comes_back_once() {
    let memory = memory(0x3000);
    let mut ring = ring(&memory, true);
    ring.offer();
    ring.offer();
    use_buffer(&memory, 0, 0, 20);
    assert_eq!(ring.take_used(), Ok(Some((0, 20))));
    use_buffer(&memory, 1, 0, 20);
    assert_eq!(ring.take_used(), Err(RingError::UsedId(0)));
}

#[test]
fn a_device_cant_have_written_more_than_the_buffer() {
    let memory = memory(0x3000);
    let mut ring = ring(&memory, true);
    ring.offer();
    use_buffer(&memory, 0, 0, MAX_MESSAGE as u32 + 1);
    assert_eq!(ring.take_used(), Err(RingError::UsedLength(MAX_MESSAGE as u32 + 1)));
}
