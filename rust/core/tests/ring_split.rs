// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The split ring: rules one by one, and against virtio-queue as the oracle.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{descriptor, Guest, Random, Ring, INDIRECT, NEXT, USER, WRITE};
use vhu_core::error::Fault;
use vhu_core::ring::split::{AddressSpace, RingAddresses, SplitRing};
use vhu_core::ring::{Chain, RingFeatures};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const BASE: u64 = 0x10_0000;
const SIZE: u64 = 0x10_0000;
const DATA: u64 = BASE + 0x8_0000;
const TABLE: u64 = BASE + 0x4_0000;

const ALL: RingFeatures = RingFeatures {
    event_idx: false,
    indirect: true,
    notify_on_empty: false,
    packed: false,
};

fn open(guest: &Guest, ring: &Ring, features: RingFeatures, max: u16) -> SplitRing {
    SplitRing::new(
        &guest.map,
        AddressSpace::Guest,
        ring.addresses,
        ring.size,
        max,
        features,
        0,
    )
    .unwrap()
}

fn take(guest: &Guest, ring: &Ring, features: RingFeatures) -> Result<Chain, Fault> {
    let mut device = open(guest, ring, features, ring.size);
    device.available()?;
    let mut chain = Chain::default();
    assert!(device.pop(&guest.map, &mut chain)?);
    Ok(chain)
}

fn rule(result: Result<Chain, Fault>) -> &'static str {
    result.err().map_or("accepted", |fault| fault.rule)
}

#[test]
fn one_chain_goes_round() {
    let guest = Guest::new(BASE, SIZE);
    let mut ring = Ring::legacy(BASE, 8, 4096);
    guest.write(DATA, b"hello");
    ring.descriptor(&guest, 3, DATA, 5, NEXT, 1);
    ring.descriptor(&guest, 1, DATA + 100, 10, WRITE, 0);
    ring.offer(&guest, 3);
    let mut device = open(&guest, &ring, ALL, 8);
    assert_eq!(device.available().unwrap(), 1);
    let mut chain = Chain::default();
    assert!(device.pop(&guest.map, &mut chain).unwrap());
    let mut bytes = [0; 8];
    assert_eq!(chain.readable.read(&mut bytes), 5);
    assert_eq!(&bytes[..5], b"hello");
    assert_eq!(chain.writable.write(b"world"), 5);
    assert!(!device.publish(), "nothing to publish yet");
    device.push_used(chain.head, 5);
    assert_eq!(ring.used_idx(&guest), 0, "invisible until published");
    assert!(device.publish());
    assert_eq!(ring.used_idx(&guest), 1);
    assert_eq!(ring.used(&guest, 0), (3, 5));
    assert_eq!(guest.read(DATA + 100, 5), b"world");
    assert!(device.should_signal(0));
    chain.clear();
    assert!(!device.pop(&guest.map, &mut chain).unwrap());
}

#[test]
fn any_used_ring_alignment() {
    // Legacy PCI aligns the used ring to 4096, legacy MMIO to what the driver says; 4 is the least the format needs.
    for align in [4, 64, 256, 4096, 65536] {
        let guest = Guest::new(BASE, SIZE);
        let mut ring = Ring::legacy(BASE, 16, align);
        ring.descriptor(&guest, 0, DATA, 4, 0, 0);
        ring.offer(&guest, 0);
        let mut device = open(&guest, &ring, ALL, 16);
        device.available().unwrap();
        let mut chain = Chain::default();
        assert!(device.pop(&guest.map, &mut chain).unwrap(), "align {align}");
        device.push_used(0, 0);
        device.publish();
        assert_eq!(ring.used_idx(&guest), 1, "align {align}");
    }
}

#[test]
fn addresses_are_checked_as_a_whole() {
    let guest = Guest::new(BASE, SIZE);
    let good = Ring::legacy(BASE, 256, 4096);
    let try_it = |addresses: RingAddresses, space, size| {
        SplitRing::new(&guest.map, space, addresses, size, 256, ALL, 0)
            .map_err(|fault| fault.rule)
            .err()
    };
    let end = BASE + SIZE;
    let a = good.addresses;
    assert_eq!(try_it(a, AddressSpace::Guest, 256), None);
    let user = RingAddresses {
        desc: a.desc + USER,
        driver: a.driver + USER,
        device: a.device + USER,
    };
    assert_eq!(try_it(user, AddressSpace::User, 256), None);
    assert_eq!(try_it(user, AddressSpace::Guest, 256), Some("ring.address"));
    assert_eq!(
        try_it(RingAddresses { desc: end - 16, ..a }, AddressSpace::Guest, 256),
        Some("ring.address")
    );
    assert_eq!(
        try_it(RingAddresses { driver: end - 500, ..a }, AddressSpace::Guest, 256),
        Some("ring.address")
    );
    assert_eq!(
        try_it(
            RingAddresses {
                device: u64::MAX - 3,
                ..a
            },
            AddressSpace::Guest,
            256
        ),
        Some("ring.address")
    );
    assert_eq!(
        try_it(RingAddresses { desc: a.desc + 8, ..a }, AddressSpace::Guest, 256),
        Some("ring.alignment")
    );
    assert_eq!(
        try_it(
            RingAddresses {
                driver: a.driver + 1,
                ..a
            },
            AddressSpace::Guest,
            256
        ),
        Some("ring.alignment")
    );
    assert_eq!(
        try_it(
            RingAddresses {
                device: a.device + 2,
                ..a
            },
            AddressSpace::Guest,
            256
        ),
        Some("ring.alignment")
    );
    for size in [0, 3, 100, 512] {
        assert_eq!(try_it(a, AddressSpace::Guest, size), Some("ring.size"), "{size}");
    }
}

#[test]
fn avail_index_too_far_ahead() {
    let guest = Guest::new(BASE, SIZE);
    let ring = Ring::legacy(BASE, 8, 4096);
    let mut device = open(&guest, &ring, ALL, 8);
    guest.write(ring.addresses.driver + 2, &8u16.to_le_bytes());
    assert_eq!(device.available().unwrap(), 8);
    guest.write(ring.addresses.driver + 2, &9u16.to_le_bytes());
    assert_eq!(device.available().unwrap_err().rule, "ring.avail-index");
    guest.write(ring.addresses.driver + 2, &0xffffu16.to_le_bytes());
    assert_eq!(device.available().unwrap_err().rule, "ring.avail-index");
}

#[test]
fn broken_chains_are_named() {
    type Case = (&'static str, fn(&Guest, &mut Ring));
    let cases: [Case; 16] = [
        ("ring.head-index", |g, r| r.offer(g, 8)),
        ("ring.next-index", |g, r| {
            r.descriptor(g, 0, DATA, 4, NEXT, 8);
            r.offer(g, 0);
        }),
        ("ring.chain-length", |g, r| {
            r.descriptor(g, 0, DATA, 4, NEXT, 1);
            r.descriptor(g, 1, DATA, 4, NEXT, 0);
            r.offer(g, 0);
        }),
        ("ring.chain-length", |g, r| {
            r.descriptor(g, 5, DATA, 4, NEXT, 5);
            r.offer(g, 5);
        }),
        ("ring.zero-length", |g, r| {
            r.descriptor(g, 0, DATA, 0, 0, 0);
            r.offer(g, 0);
        }),
        ("ring.buffer-address", |g, r| {
            r.descriptor(g, 0, BASE + SIZE - 3, 4, 0, 0);
            r.offer(g, 0);
        }),
        ("ring.buffer-address", |g, r| {
            r.descriptor(g, 0, u64::MAX - 1, 4, 0, 0);
            r.offer(g, 0);
        }),
        ("ring.buffer-address", |g, r| {
            r.descriptor(g, 0, BASE, u32::MAX, 0, 0);
            r.offer(g, 0);
        }),
        ("ring.buffer-order", |g, r| {
            r.descriptor(g, 0, DATA, 4, NEXT | WRITE, 1);
            r.descriptor(g, 1, DATA, 4, 0, 0);
            r.offer(g, 0);
        }),
        ("ring.indirect-next", |g, r| {
            r.descriptor(g, 0, TABLE, 16, INDIRECT | NEXT, 1);
            r.offer(g, 0);
        }),
        ("ring.indirect-length", |g, r| {
            r.descriptor(g, 0, TABLE, 24, INDIRECT, 0);
            r.offer(g, 0);
        }),
        ("ring.indirect-length", |g, r| {
            r.descriptor(g, 0, TABLE, 16 * 9, INDIRECT, 0);
            r.offer(g, 0);
        }),
        ("ring.indirect-length", |g, r| {
            r.descriptor(g, 0, TABLE, 0, INDIRECT, 0);
            r.offer(g, 0);
        }),
        ("ring.indirect-address", |g, r| {
            r.descriptor(g, 0, BASE + SIZE - 16, 32, INDIRECT, 0);
            r.offer(g, 0);
        }),
        ("ring.indirect-nested", |g, r| {
            g.write(TABLE, &descriptor(TABLE, 16, INDIRECT, 0));
            r.descriptor(g, 0, TABLE, 16, INDIRECT, 0);
            r.offer(g, 0);
        }),
        ("ring.chain-length", |g, r| {
            g.write(TABLE, &descriptor(DATA, 4, NEXT, 1));
            g.write(TABLE + 16, &descriptor(DATA, 4, NEXT, 0));
            r.descriptor(g, 0, TABLE, 32, INDIRECT, 0);
            r.offer(g, 0);
        }),
    ];
    for (number, (expected, build)) in cases.into_iter().enumerate() {
        let guest = Guest::new(BASE, SIZE);
        let mut ring = Ring::legacy(BASE, 8, 4096);
        build(&guest, &mut ring);
        assert_eq!(rule(take(&guest, &ring, ALL)), expected, "case {number}");
    }
    let guest = Guest::new(BASE, SIZE);
    let mut ring = Ring::legacy(BASE, 8, 4096);
    guest.write(TABLE, &descriptor(DATA, 4, 0, 0));
    ring.descriptor(&guest, 0, TABLE, 16, INDIRECT, 0);
    ring.offer(&guest, 0);
    assert_eq!(rule(take(&guest, &ring, ALL)), "accepted");
    assert_eq!(
        rule(take(&guest, &ring, RingFeatures::default())),
        "ring.indirect-not-negotiated"
    );
}

#[test]
fn four_gigabytes_are_too_many() {
    // Descriptors may overlap in memory, so a small guest can describe a huge request.
    let guest = Guest::new(BASE, 64 << 20);
    let mut ring = Ring::legacy(BASE, 256, 4096);
    for index in 0..130u16 {
        ring.descriptor(
            &guest,
            index,
            BASE + 0x10_0000,
            32 << 20,
            if index < 129 { NEXT } else { 0 },
            index + 1,
        );
    }
    ring.offer(&guest, 0);
    assert_eq!(rule(take(&guest, &ring, ALL)), "ring.total-length");
}

#[test]
fn indirect_table_at_any_place() {
    for shift in [0, 1, 2, 8, 13] {
        let guest = Guest::new(BASE, SIZE);
        let mut ring = Ring::legacy(BASE, 8, 4096);
        guest.write(TABLE + shift, &descriptor(DATA, 16, NEXT, 2));
        guest.write(TABLE + shift + 32, &descriptor(DATA + 64, 7, WRITE, 0));
        ring.descriptor(&guest, 0, TABLE + shift, 48, INDIRECT, 0);
        ring.offer(&guest, 0);
        let chain = take(&guest, &ring, ALL).unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (16, 7), "shift {shift}");
    }
}

#[test]
fn notifications_without_event_idx() {
    let guest = Guest::new(BASE, SIZE);
    let mut ring = Ring::legacy(BASE, 8, 4096);
    let mut device = open(&guest, &ring, ALL, 8);
    device.disable_notification();
    assert_eq!(ring.used_flags(&guest), 1);
    assert!(!device.enable_notification());
    assert_eq!(ring.used_flags(&guest), 0);
    ring.descriptor(&guest, 0, DATA, 4, 0, 0);
    ring.offer(&guest, 0);
    assert!(device.enable_notification(), "something came in meanwhile");
    device.push_used(0, 0);
    device.publish();
    ring.set_avail_flags(&guest, 1);
    assert!(!device.should_signal(0));
    ring.set_avail_flags(&guest, 0);
    device.push_used(0, 0);
    device.publish();
    assert!(device.should_signal(0));
}

#[test]
fn notify_on_empty_overrides_suppression() {
    let guest = Guest::new(BASE, SIZE);
    let mut ring = Ring::legacy(BASE, 8, 4096);
    let features = RingFeatures {
        notify_on_empty: true,
        ..ALL
    };
    let mut device = open(&guest, &ring, features, 8);
    ring.set_avail_flags(&guest, 1);
    for head in 0..2 {
        ring.descriptor(&guest, head, DATA, 4, 0, 0);
        ring.offer(&guest, head);
    }
    device.available().unwrap();
    let mut chain = Chain::default();
    assert!(device.pop(&guest.map, &mut chain).unwrap());
    device.push_used(0, 0);
    device.publish();
    assert!(!device.should_signal(0), "one more is available");
    chain.clear();
    assert!(device.pop(&guest.map, &mut chain).unwrap());
    device.push_used(1, 0);
    device.publish();
    assert!(!device.should_signal(1), "one is in flight");
    assert!(device.should_signal(0));
}

#[test]
fn event_idx_over_the_wrap() {
    let guest = Guest::new(BASE, SIZE);
    let ring = Ring::legacy(BASE, 8, 4096);
    // The driver's memory says 65530 were used; positions go on from there.
    guest.write(ring.addresses.device + 2, &65530u16.to_le_bytes());
    guest.write(ring.addresses.driver + 2, &65530u16.to_le_bytes());
    let features = RingFeatures { event_idx: true, ..ALL };
    let mut device = SplitRing::new(&guest.map, AddressSpace::Guest, ring.addresses, 8, 8, features, 65530).unwrap();
    ring.set_used_event(&guest, 100);
    device.push_used(0, 0);
    device.publish();
    assert!(
        device.should_signal(0),
        "the first time there is no old index to compare with"
    );
    let mut signals = Vec::new();
    ring.set_used_event(&guest, 2);
    for _ in 0..12 {
        device.push_used(0, 0);
        device.publish();
        if device.should_signal(0) {
            signals.push(ring.used_idx(&guest));
        }
    }
    // Exactly once: when the element at index 2 (the event) was published, after the wrap.
    assert_eq!(signals, [3]);
    assert_eq!(device.next_avail(), 65530);
    assert!(!device.enable_notification());
    assert_eq!(ring.avail_event(&guest), 65530);
    assert_eq!(ring.used_flags(&guest), 0);
}

/// What a chain amounts to: head, then (address range, writable) with neighbouring pieces kept apart.
type Shape = (u16, Vec<(u64, u32, bool)>);

/// Random descriptor tables, sane and insane, through both engines. Whatever ours accepts, virtio-queue must see the
/// same way; whatever ours refuses must be something virtio-queue refuses, cuts short, or tolerates by design.
#[test]
fn agrees_with_virtio_queue() {
    const N: u16 = 16;
    let mut random = Random::new(42);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..4000 {
        let guest = Guest::new(BASE, SIZE);
        let mut ring = Ring::legacy(BASE, N, 4096);
        let wild = random.chance(40);
        let mut raw = Vec::new();
        for index in 0..N {
            let sane_next = (index + 1) % N;
            let next = if wild && random.chance(20) {
                random.below(20) as u16
            } else {
                sane_next
            };
            let mut flags = 0;
            if random.chance(55) {
                flags |= NEXT;
            }
            if random.chance(if wild { 50 } else { u64::from(index) * 6 }) {
                flags |= WRITE;
            }
            let mut addr = DATA + random.below(0x1000) * 16;
            let mut len = 1 + random.below(4096) as u32;
            if random.chance(15) {
                flags = (flags & !WRITE & !NEXT) | INDIRECT;
                addr = TABLE + random.below(64) * 256;
                len = 16 * (1 + random.below(6) as u32);
                for entry in 0..u64::from(len / 16) {
                    let last = entry + 1 == u64::from(len / 16);
                    let entry_flags = if last { WRITE } else { NEXT };
                    let next = (entry + 1) as u16;
                    guest.write(
                        addr + 16 * entry,
                        &descriptor(DATA + entry * 4096, 64, entry_flags, next),
                    );
                }
            }
            if wild && random.chance(4) {
                addr = random.next();
            }
            if wild && random.chance(3) {
                len = 0;
            }
            ring.descriptor(&guest, index, addr, len, flags, next);
            raw.push(flags);
        }
        for _ in 0..=random.below(4) {
            ring.offer(&guest, random.below(u64::from(N)) as u16);
        }

        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), SIZE as usize)]).unwrap();
        memory
            .write_slice(&guest.read(BASE, SIZE as usize), GuestAddress(BASE))
            .unwrap();
        let mut oracle = Queue::new(N).unwrap();
        oracle.try_set_size(N).unwrap();
        oracle
            .try_set_desc_table_address(GuestAddress(ring.addresses.desc))
            .unwrap();
        oracle
            .try_set_avail_ring_address(GuestAddress(ring.addresses.driver))
            .unwrap();
        oracle
            .try_set_used_ring_address(GuestAddress(ring.addresses.device))
            .unwrap();
        oracle.set_ready(true);
        let theirs: Vec<Shape> = oracle
            .iter(&memory)
            .unwrap()
            .map(|chain| {
                let head = chain.head_index();
                (head, chain.map(|d| (d.addr().0, d.len(), d.is_write_only())).collect())
            })
            .collect();

        let mut device = open(&guest, &ring, ALL, N);
        let count = usize::from(device.available().unwrap());
        assert_eq!(count, theirs.len());
        for (head, pieces) in &theirs {
            let mut chain = Chain::default();
            match device.pop(&guest.map, &mut chain) {
                Ok(true) => {
                    accepted += 1;
                    assert_eq!(chain.head, *head);
                    let sum =
                        |write: bool| -> u64 { pieces.iter().filter(|p| p.2 == write).map(|p| u64::from(p.1)).sum() };
                    assert_eq!(chain.readable.len(), sum(false));
                    assert_eq!(chain.writable.len(), sum(true));
                    let count = chain.readable.iovecs().len() + chain.writable.iovecs().len();
                    assert_eq!(count, pieces.len());
                }
                Ok(false) => panic!("the oracle has more chains"),
                Err(_) => {
                    refused += 1;
                    break;
                }
            }
        }
    }
    assert!(
        accepted > 2000 && refused > 500,
        "accepted {accepted}, refused {refused}: the mix is off"
    );
}
