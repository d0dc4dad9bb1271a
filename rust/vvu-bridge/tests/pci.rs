// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Capabilities: a good function, and each way to be a bad one.

#![allow(clippy::unwrap_used)]

use vvu_bridge::pci::{capabilities, layout, Layout, Place};

const BAR2: u64 = 0x4000;
const BAR4: u64 = 16 << 30;

fn bars(bar: u8) -> Option<u64> {
    match bar {
        2 => Some(BAR2),
        4 => Some(BAR4),
        _ => None,
    }
}

/// A capability: type, BAR, id, offset, length, then more words.
#[derive(Clone)]
struct Cap(u8, u8, u8, u32, u32, Vec<u32>);

fn good() -> Vec<Cap> {
    vec![
        Cap(1, 2, 0, 0, 0x1000, vec![]),
        Cap(3, 2, 0, 0x1000, 0x1000, vec![]),
        Cap(4, 2, 0, 0x2000, 0x1000, vec![]),
        Cap(2, 2, 0, 0x3000, 0x1000, vec![4]),
        Cap(5, 0, 0, 0, 0, vec![0]),
        Cap(8, 4, 0, 0x1000, 0, vec![1, 1]),
    ]
}

fn space(caps: &[Cap]) -> Vec<u8> {
    let mut space = vec![0; 256];
    space[6] = 0x10;
    space[0x34] = 0x40;
    let mut at = 0x40;
    for (number, cap) in caps.iter().enumerate() {
        let length = 16 + 4 * cap.5.len();
        space[at] = 9;
        space[at + 1] = if number + 1 < caps.len() {
            (at + length) as u8
        } else {
            0
        };
        space[at + 2] = length as u8;
        space[at + 3] = cap.0;
        space[at + 4] = cap.1;
        space[at + 5] = cap.2;
        for (field, word) in [cap.3, cap.4].iter().chain(&cap.5).enumerate() {
            space[at + 8 + 4 * field..at + 12 + 4 * field].copy_from_slice(&word.to_le_bytes());
        }
        at += length;
    }
    space
}

fn reason(caps: &[Cap]) -> String {
    layout(&space(caps), bars).unwrap_err().to_string()
}

#[test]
fn structures_are_found() {
    let place = |bar, offset, length| Place { bar, offset, length };
    let expected = Layout {
        common: place(2, 0, 0x1000),
        notify: place(2, 0x3000, 0x1000),
        notify_multiplier: 4,
        isr: place(2, 0x1000, 0x1000),
        device: place(2, 0x2000, 0x1000),
        shared_memory: place(4, 0x1_0000_1000, 0x1_0000_0000),
    };
    assert_eq!(layout(&space(&good()), bars).unwrap(), expected);
    let window = expected.window();
    assert_eq!((window.offset, window.length), (0x1_0000_1000, 0x1_0000_0000));
}

#[test]
fn the_first_structure_of_a_type_that_can_be_used_is_taken() {
    let mut caps = good();
    caps.insert(0, Cap(1, 7, 0, 0x80, 0x1000, vec![]));
    caps.push(Cap(1, 2, 0, 0x800, 0x100, vec![]));
    assert_eq!(layout(&space(&caps), bars).unwrap().common.offset, 0);
}

#[test]
fn other_shared_memory_regions_are_not_ours() {
    let mut caps = good();
    caps.insert(0, Cap(8, 4, 1, 0x5000, 0x1000, vec![0, 0]));
    assert_eq!(layout(&space(&caps), bars).unwrap().shared_memory.offset, 0x1_0000_1000);
}

#[test]
fn each_structure_is_needed() {
    for (at, name) in [
        (0, "common configuration"),
        (1, "ISR status"),
        (2, "device configuration"),
        (3, "notification structure"),
        (5, "shared memory region 0"),
    ] {
        let mut caps = good();
        caps.remove(at);
        assert_eq!(reason(&caps), format!("the function has no {name}"));
    }
}

#[test]
fn structures_are_inside_their_bar_large_enough_and_aligned() {
    for (at, change, wrong) in [
        (0, (0x3800, 0x801), "common configuration: offset 0x3800"),
        (0, (0, 55), "common configuration: offset 0x0, length 0x37"),
        (0, (2, 0x100), "common configuration: offset 0x2"),
        (1, (0x4000, 1), "ISR status: offset 0x4000"),
        (2, (0x2000, 23), "device configuration: offset 0x2000, length 0x17"),
        (3, (0x3001, 0x100), "notification structure: offset 0x3001"),
        (3, (u32::MAX - 1, u32::MAX), "notification structure: offset 0xfffffffe"),
        (5, (0x800, 0), "shared memory region 0: offset 0x100000800"),
    ] {
        let mut caps = good();
        (caps[at].3, caps[at].4) = change;
        assert!(reason(&caps).starts_with(wrong), "{}", reason(&caps));
    }
    let mut caps = good();
    caps[5].5 = vec![u32::MAX, u32::MAX];
    (caps[5].3, caps[5].4) = (0xffff_f000, 0x2000);
    assert!(
        reason(&caps).starts_with("shared memory region 0"),
        "64 bits don't wrap"
    );
    caps[5].5 = vec![1, 2];
    assert!(
        reason(&caps).starts_with("shared memory region 0"),
        "larger than its BAR"
    );
}

#[test]
fn a_bar_that_is_no_memory_is_refused() {
    let mut caps = good();
    caps[0].1 = 0;
    assert_eq!(
        reason(&caps),
        "common configuration: BAR 0 is no memory of this function"
    );
}

#[test]
fn doorbells_are_on_even_addresses() {
    let mut caps = good();
    caps[3].5 = vec![3];
    assert_eq!(reason(&caps), "notification structure: multiplier 3 is odd");
    caps[3].5 = vec![0];
    assert_eq!(layout(&space(&caps), bars).unwrap().notify_multiplier, 0);
}

#[test]
fn a_list_that_is_a_loop_or_leaves_the_space_ends() {
    let mut looping = space(&good());
    looping[0x41] = 0x40;
    assert!(capabilities(&looping).len() <= 48);
    let mut outside = space(&good());
    outside.truncate(0x80);
    assert!(!capabilities(&outside).is_empty());
    assert!(layout(&outside, bars).is_err());
    let mut none = space(&good());
    none[6] = 0;
    assert!(capabilities(&none).is_empty());
    assert!(capabilities(&[]).is_empty());
}
