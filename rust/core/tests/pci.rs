// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration space, looked at and driven as a driver or firmware does it.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::Random;
use vhu_core::error::Error;
use vhu_core::pci::{
    Bar, BarKind, ConfigBuilder, ConfigSpace, Effect, ExpressType, Identity, SrIov, Structure, Window, CONFIG_SIZE,
};

const MEM32: BarKind = BarKind::Mem32 { prefetchable: false };
const MEM64: BarKind = BarKind::Mem64 { prefetchable: true };
const MODERN: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1042,
    revision: 1,
    class: 0x01_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};
const SR_IOV: usize = 0x100;

fn sr_iov() -> SrIov {
    let mut bars = [None; 6];
    bars[1] = Some(Bar {
        kind: MEM32,
        size: 0x1000,
    });
    bars[2] = Some(Bar {
        kind: BarKind::Mem64 { prefetchable: false },
        size: 0x4000,
    });
    SrIov {
        total_vfs: 65535,
        first_offset: 1,
        stride: 1,
        device: 0x1042,
        bars,
    }
}

/// Everything at once.
fn owner() -> ConfigSpace {
    ConfigBuilder::new(MODERN, 1)
        .bar(1, MEM32, 0x1000)
        .bar(2, MEM32, 0x4000)
        .bar(4, MEM64, 0x10_0000)
        .virtio(Structure::Common, 2, 0, 64)
        .virtio(Structure::Isr, 2, 0x1000, 1)
        .virtio(Structure::Device, 2, 0x2000, 96)
        .virtio(Structure::Notify { multiplier: 4 }, 2, 0x3000, 8)
        .virtio_pci_cfg()
        .msix(3, 1, 0, 0x800)
        .power()
        .express(ExpressType::Endpoint)
        .sr_iov(sr_iov())
        .build()
        .unwrap()
}

fn legacy() -> ConfigSpace {
    let identity = Identity {
        device: 0x1001,
        revision: 0,
        subsystem: 2,
        ..MODERN
    };
    ConfigBuilder::new(identity, 1)
        .bar(0, BarKind::Io, 128)
        .bar(1, MEM32, 0x1000)
        .msix(2, 1, 0, 0x800)
        .express(ExpressType::LegacyEndpoint)
        .build()
        .unwrap()
}

fn read(space: &ConfigSpace, at: usize, width: usize) -> u32 {
    let mut bytes = [0; 4];
    space.read(at, &mut bytes[..width]);
    u32::from_le_bytes(bytes)
}

fn write(space: &mut ConfigSpace, at: usize, width: usize, value: u32) -> Vec<Effect> {
    let mut effects = Vec::new();
    space.write(at, &value.to_le_bytes()[..width], &mut effects);
    effects
}

fn dump(space: &ConfigSpace) -> Vec<u8> {
    let mut bytes = vec![0xaa; CONFIG_SIZE];
    space.read(0, &mut bytes);
    bytes
}

/// Offsets of capabilities with an id, found by following the list.
fn find(space: &ConfigSpace, id: u32) -> Vec<usize> {
    assert_ne!(
        read(space, 6, 2) & 0x10,
        0,
        "the status register says that there is a list"
    );
    let mut found = Vec::new();
    let mut at = read(space, 0x34, 1) as usize;
    for _ in 0..48 {
        if at == 0 {
            return found;
        }
        assert!(at >= 0x40 && at.is_multiple_of(4), "capability at {at:#x}");
        if read(space, at, 1) == id {
            found.push(at);
        }
        at = read(space, at + 1, 1) as usize;
    }
    panic!("the capability list has a loop");
}

/// A virtio capability as a driver looks for it: its offset.
fn virtio(space: &ConfigSpace, cfg_type: u32) -> usize {
    *find(space, 9)
        .iter()
        .find(|&&at| read(space, at + 3, 1) == cfg_type)
        .unwrap()
}

#[test]
fn every_byte_of_a_legacy_function() {
    let mut expected = vec![0; CONFIG_SIZE];
    let mut put = |at: usize, bytes: &[u8]| expected[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0xf4, 0x1a, 0x01, 0x10]);
    put(0x06, &[0x10, 0x00]);
    put(0x08, &[0x00, 0x00, 0x00, 0x01]);
    put(0x10, &[0x01]);
    put(0x2c, &[0xf4, 0x1a, 0x02, 0x00]);
    put(0x34, &[0x40]);
    put(0x3d, &[0x01]);
    // MSI-X: two vectors, table at 0 and pending bits at 0x800 of BAR 1.
    put(0x40, &[0x11, 0x4c, 0x01, 0x00, 0x01, 0, 0, 0, 0x01, 0x08, 0, 0]);
    // PCI Express: version 2, legacy endpoint, function level reset.
    put(
        0x4c,
        &[0x10, 0x00, 0x12, 0x00, 0x00, 0x80, 0x00, 0x10, 0x10, 0x28, 0, 0],
    );
    put(0x58, &[0x11, 0, 0, 0, 0, 0, 0x11, 0]);
    put(0x78, &[0x02, 0, 0, 0, 0x01, 0]);
    assert_eq!(dump(&legacy()), expected);
}

#[test]
fn virtio_capabilities() {
    let space = owner();
    let fields = |at: usize| {
        (
            read(&space, at + 2, 1),
            read(&space, at + 4, 1),
            read(&space, at + 5, 1),
            read(&space, at + 6, 2),
            read(&space, at + 8, 4),
            read(&space, at + 12, 4),
        )
    };
    assert_eq!(fields(virtio(&space, 1)), (16, 2, 0, 0, 0, 64));
    assert_eq!(fields(virtio(&space, 3)), (16, 2, 0, 0, 0x1000, 1));
    assert_eq!(fields(virtio(&space, 4)), (16, 2, 0, 0, 0x2000, 96));
    let notify = virtio(&space, 2);
    assert_eq!(fields(notify), (20, 2, 0, 0, 0x3000, 8));
    assert_eq!(read(&space, notify + 16, 4), 4);
    let window = virtio(&space, 5);
    assert_eq!(fields(window), (20, 0, 0, 0, 0, 0));
    assert_eq!(find(&space, 9).len(), 5);

    let msix = find(&space, 0x11)[0];
    assert_eq!(read(&space, msix + 2, 2), 2);
    assert_eq!(read(&space, msix + 4, 4), 1);
    assert_eq!(read(&space, msix + 8, 4), 0x801);
    let power = find(&space, 1)[0];
    assert_eq!(read(&space, power + 2, 4), 0x0008_0003);
    let express = find(&space, 0x10)[0];
    assert_eq!(read(&space, express + 2, 2), 2);
    assert_ne!(read(&space, express + 4, 4) & 1 << 28, 0);

    let names: Vec<_> = space.capabilities().iter().map(|capability| capability.name).collect();
    let expected = [
        "virtio-common",
        "virtio-isr",
        "virtio-device",
        "virtio-notify",
        "virtio-pci-cfg",
        "msix",
        "power",
        "express",
        "sr-iov",
    ];
    assert_eq!(names, expected);
    assert_eq!(space.identity(), MODERN);
}

#[test]
fn bars_are_sized_by_writing_ones() {
    let mut space = legacy();
    assert_eq!(read(&space, 0x10, 4), 1);
    assert!(write(&mut space, 0x10, 4, !0).is_empty());
    assert_eq!(read(&space, 0x10, 4), 0xffff_ff81);
    write(&mut space, 0x10, 4, 0xc0ff);
    assert_eq!(read(&space, 0x10, 4), 0xc081);
    assert_eq!(space.bar_address(0), Some(0xc080));
    write(&mut space, 0x14, 4, !0);
    assert_eq!(read(&space, 0x14, 4), 0xffff_f000);
    // There is no BAR 2, and no ROM.
    for at in [0x18, 0x30] {
        write(&mut space, at, 4, !0);
        assert_eq!(read(&space, at, 4), 0);
    }

    let mut space = owner();
    write(&mut space, 0x10, 4, !0);
    assert_eq!(read(&space, 0x10, 4), 0, "BAR 0 is hardwired to zero");
    write(&mut space, 0x20, 4, !0);
    write(&mut space, 0x24, 4, !0);
    assert_eq!(read(&space, 0x20, 4), 0xfff0_000c);
    assert_eq!(read(&space, 0x24, 4), 0xffff_ffff);
    write(&mut space, 0x20, 4, 0xfe12_3456);
    write(&mut space, 0x24, 4, 0x12);
    assert_eq!(space.bar_address(4), Some(0x12_fe10_0000));
    assert_eq!(space.bar_address(5), None);
    // Byte by byte it is the same.
    for (at, byte) in (0x20..).zip([0xff, 0xff, 0x20, 0xfd]) {
        write(&mut space, at, 1, byte);
    }
    assert_eq!(read(&space, 0x20, 4), 0xfd20_000c);
}

#[test]
fn command_and_interrupt_line() {
    let mut space = owner();
    assert_eq!(write(&mut space, 4, 2, 1), [Effect::IoEnable(true)]);
    assert_eq!(
        write(&mut space, 4, 2, 0xffff),
        [
            Effect::MemoryEnable(true),
            Effect::BusMaster(true),
            Effect::IntxDisable(true)
        ]
    );
    assert_eq!(read(&space, 4, 2), 0x547);
    assert_eq!(space.command(), 0x547);
    assert!(write(&mut space, 4, 2, 0xffff).is_empty(), "nothing has changed");
    // Status: read-only, or ones that clear what is never set.
    assert!(write(&mut space, 6, 2, 0xffff).is_empty());
    assert_eq!(read(&space, 6, 2), 0x10);
    space.set_interrupt_status(true);
    assert_eq!(read(&space, 6, 2), 0x18);
    write(&mut space, 6, 2, 0xffff);
    assert_eq!(read(&space, 6, 2), 0x18);
    space.set_interrupt_status(false);
    assert_eq!(read(&space, 6, 2), 0x10);

    write(&mut space, 0x3c, 4, 0xffff_ff0b);
    assert_eq!(read(&space, 0x3c, 4), 0x010b);
    assert_eq!(write(&mut space, 5, 1, 0), [Effect::IntxDisable(false)]);
}

#[test]
fn msix_control() {
    let mut space = owner();
    let msix = find(&space, 0x11)[0];
    assert_eq!(
        write(&mut space, msix + 2, 2, 0xffff),
        [Effect::MsixEnable(true), Effect::MsixMask(true)]
    );
    assert_eq!(read(&space, msix + 2, 2), 0xc002);
    assert!(space.msix_enabled());
    // As Linux does it: mask, set up, unmask.
    assert_eq!(write(&mut space, msix + 2, 2, 0x8002), [Effect::MsixMask(false)]);
    // The dword that begins with id and link does it as well.
    assert_eq!(write(&mut space, msix, 4, 0), [Effect::MsixEnable(false)]);
    assert_eq!(read(&space, msix, 1), 0x11);
    assert!(!space.msix_enabled());
}

#[test]
fn function_level_reset() {
    let mut space = owner();
    let after_reset = dump(&space);
    let express = find(&space, 0x10)[0];
    let msix = find(&space, 0x11)[0];
    // Without the bit it's just a register.
    assert!(write(&mut space, express + 8, 2, 0x7fff).is_empty());
    assert_eq!(read(&space, express + 8, 2), 0x78ff);
    write(&mut space, 4, 2, 7);
    write(&mut space, 0x14, 4, 0xfebf_0000);
    write(&mut space, msix + 2, 2, 0x8000);
    let effects = write(&mut space, express + 8, 2, 0xa810);
    assert_eq!(
        effects,
        [
            Effect::IoEnable(false),
            Effect::MemoryEnable(false),
            Effect::BusMaster(false),
            Effect::MsixEnable(false),
            Effect::FunctionReset
        ]
    );
    assert_eq!(dump(&space), after_reset);
    // The upper byte alone, too; the lower one alone does not.
    assert_eq!(write(&mut space, express + 9, 1, 0x80), [Effect::FunctionReset]);
    assert!(write(&mut space, express + 8, 1, 0x80).is_empty());

    // A reset that came another way.
    write(&mut space, 4, 2, 0x400);
    let mut effects = Vec::new();
    space.reset(&mut effects);
    assert_eq!(effects, [Effect::IntxDisable(false)]);
    assert_eq!(dump(&space), after_reset);
}

#[test]
fn sr_iov_control() {
    let mut space = owner();
    assert_eq!(read(&space, SR_IOV, 4), 0x0001_0010);
    assert_eq!(read(&space, SR_IOV + 0x0c, 4), 0xffff_ffff, "InitialVFs, TotalVFs");
    assert_eq!(read(&space, SR_IOV + 0x14, 4), 0x0001_0001);
    assert_eq!(read(&space, SR_IOV + 0x18, 4), 0x1042_0000);
    assert_eq!(read(&space, SR_IOV + 0x1c, 4), 0x553);
    assert_eq!(read(&space, SR_IOV + 0x20, 4), 1);

    assert_eq!(
        write(&mut space, SR_IOV + 0x10, 2, 4),
        [Effect::VfEnable {
            enable: false,
            num_vfs: 4
        }]
    );
    assert_eq!(
        write(&mut space, SR_IOV + 8, 2, 0xffff),
        [Effect::VfEnable {
            enable: true,
            num_vfs: 4
        }]
    );
    assert_eq!(read(&space, SR_IOV + 8, 2), 0x19);
    // While there are VFs, neither their number nor the page size changes.
    assert!(write(&mut space, SR_IOV + 0x10, 2, 9).is_empty());
    write(&mut space, SR_IOV + 0x20, 4, 0x10);
    assert_eq!(space.vfs(), (true, 4));
    assert_eq!(read(&space, SR_IOV + 0x20, 4), 1);
    assert_eq!(
        write(&mut space, SR_IOV + 8, 2, 0),
        [Effect::VfEnable {
            enable: false,
            num_vfs: 4
        }]
    );
    // The operator has a say, too.
    space.set_vfs(true, 17);
    assert_eq!(read(&space, SR_IOV + 8, 2), 1);
    assert_eq!(read(&space, SR_IOV + 0x10, 4), 17);
    assert!(legacy().vfs() == (false, 0));
    // Both in one write.
    space.set_vfs(false, 0);
    let mut effects = Vec::new();
    space.write(SR_IOV + 8, &[1, 0, 0, 0, 0, 0, 0, 0, 3, 0], &mut effects);
    assert_eq!(
        effects,
        [Effect::VfEnable {
            enable: true,
            num_vfs: 3
        }]
    );
    assert_eq!(read(&space, SR_IOV + 0x0c, 4), 0xffff_ffff);
}

#[test]
fn vf_bars_are_sized_and_follow_the_page_size() {
    let mut space = owner();
    let bars = SR_IOV + 0x24;
    for index in 0..6 {
        write(&mut space, bars + 4 * index, 4, !0);
    }
    let sizes = |space: &ConfigSpace| (0..6).map(|index| read(space, bars + 4 * index, 4)).collect::<Vec<_>>();
    assert_eq!(sizes(&space), [0, 0xffff_f000, 0xffff_c004, 0xffff_ffff, 0, 0]);
    // 64 KiB pages.
    write(&mut space, SR_IOV + 0x20, 4, 0x10);
    assert_eq!(sizes(&space), [0, 0xffff_0000, 0xffff_0004, 0xffff_ffff, 0, 0]);
    // Two sizes at once, none, or one that isn't supported: no change.
    for wrong in [0x11, 0, 4, 0x8000_0000] {
        write(&mut space, SR_IOV + 0x20, 4, wrong);
        assert_eq!(read(&space, SR_IOV + 0x20, 4), 0x10, "{wrong:#x}");
    }
    let mut effects = Vec::new();
    space.reset(&mut effects);
    assert_eq!(sizes(&space), [0, 0, 4, 0, 0, 0]);
    write(&mut space, bars + 4, 4, !0);
    assert_eq!(sizes(&space)[1], 0xffff_f000);
}

fn set_window(space: &mut ConfigSpace, bar: u32, offset: u32, length: u32) -> usize {
    let at = virtio(space, 5);
    assert!(write(space, at + 4, 1, bar).is_empty());
    assert!(write(space, at + 8, 4, offset).is_empty());
    assert!(write(space, at + 12, 4, length).is_empty());
    at
}

#[test]
fn accesses_through_the_window() {
    let mut space = owner();
    let at = set_window(&mut space, 2, 0x14, 1);
    assert_eq!(read(&space, at + 4, 1), 2);
    assert_eq!(read(&space, at + 8, 4), 0x14);
    let window = Window {
        bar: 2,
        offset: 0x14,
        length: 1,
    };
    assert_eq!(space.window(at + 16, 4), Some(window));
    assert_eq!(space.window(at + 16, 1), Some(window));
    assert_eq!(space.window(at + 19, 1), Some(window));
    assert_eq!(space.window(at + 12, 4), None, "beside it");
    assert_eq!(space.window(at + 20, 4), None, "behind it");
    assert_eq!(space.window(0, CONFIG_SIZE), None, "a copy of the whole");
    space.fill_window(&[0x0f]);
    assert_eq!(read(&space, at + 16, 4), 0x0f);
    assert_eq!(
        write(&mut space, at + 16, 1, 0x80),
        [Effect::PciCfgAccess {
            window,
            data: [0x80, 0, 0, 0]
        }]
    );

    set_window(&mut space, 2, 0x3ffc, 4);
    let effects = write(&mut space, at + 16, 4, 0x1234_5678);
    let window = Window {
        bar: 2,
        offset: 0x3ffc,
        length: 4,
    };
    assert_eq!(
        effects,
        [Effect::PciCfgAccess {
            window,
            data: [0x78, 0x56, 0x34, 0x12]
        }]
    );

    for (bar, offset, length) in [
        (2, 0, 0),
        (2, 0, 3),
        (2, 0, 8),
        (2, 0, 0x8000_0001),
        (2, 1, 2),
        (2, 2, 4),
        (2, 0x4000, 1),
        (2, 0xffff_fffc, 4),
        (0, 0, 1),
        (3, 0, 1),
        (5, 0, 1),
        (6, 0, 1),
        (0xff, 0, 1),
    ] {
        set_window(&mut space, bar, offset, length);
        assert_eq!(space.window(at + 16, 4), None, "{bar} {offset:#x} {length:#x}");
        assert!(
            write(&mut space, at + 16, 4, 1).is_empty(),
            "{bar} {offset:#x} {length:#x}"
        );
    }
    assert_eq!(legacy().window(0x50, 4), None);
}

#[test]
fn any_width_and_place() {
    let space = owner();
    let all = dump(&space);
    for at in 0..CONFIG_SIZE {
        for width in 1..=8 {
            let mut bytes = [0x55; 8];
            space.read(at, &mut bytes[..width]);
            for (index, byte) in bytes[..width].iter().enumerate() {
                assert_eq!(*byte, all.get(at + index).copied().unwrap_or(0), "{at:#x}+{index}");
            }
        }
    }
    let mut bytes = [1; 4];
    space.read(usize::MAX, &mut bytes);
    assert_eq!(bytes, [0; 4]);
    let mut space = owner();
    let mut effects = Vec::new();
    space.write(usize::MAX, &[0xff; 8], &mut effects);
    space.write(CONFIG_SIZE - 2, &[0xff; 8], &mut effects);
    space.write(0, &[], &mut effects);
    assert!(effects.is_empty());
    assert_eq!(dump(&space), all);
}

/// Bits that may ever differ from their value after reset, from the specifications.
fn variable_bits(space: &ConfigSpace) -> Vec<u8> {
    let mut bits = vec![0; CONFIG_SIZE];
    let mut allow = |at: usize, mask: &[u8]| bits[at..at + mask.len()].copy_from_slice(mask);
    allow(4, &[0x47, 0x05]);
    allow(0x0c, &[0xff]);
    allow(0x3c, &[0xff]);
    for index in 0..6 {
        if let Some(bar) = space.bar(index) {
            let wide = matches!(bar.kind, BarKind::Mem64 { .. });
            let mask = (!(bar.size - 1)).to_le_bytes();
            allow(0x10 + 4 * index, &mask[..if wide { 8 } else { 4 }]);
        }
    }
    for at in find(space, 0x11) {
        allow(at + 3, &[0xc0]);
    }
    for at in find(space, 0x10) {
        allow(at + 8, &[0xff, 0x78]);
        allow(at + 0x10, &[0xc8]);
    }
    for at in find(space, 1) {
        allow(at + 4, &[3]);
    }
    for at in find(space, 9) {
        if read(space, at + 3, 1) == 5 {
            allow(at + 4, &[0xff]);
            allow(at + 8, &[0xff; 12]);
        }
    }
    if space
        .capabilities()
        .iter()
        .any(|capability| capability.name == "sr-iov")
    {
        allow(SR_IOV + 8, &[0x19]);
        allow(SR_IOV + 0x10, &[0xff; 2]);
        allow(SR_IOV + 0x20, &[0x53, 0x05]);
        allow(
            SR_IOV + 0x28,
            &[0, 0xf0, 0xff, 0xff, 0, 0xc0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        );
    }
    bits
}

#[test]
fn random_accesses_never_change_what_is_read_only() {
    for (seed, build) in [(1, owner as fn() -> ConfigSpace), (2, legacy)] {
        let mut random = Random::new(seed);
        let mut space = build();
        let initial = dump(&space);
        let variable = variable_bits(&space);
        let mut effects = Vec::new();
        for round in 0..5_000 {
            let near = if random.chance(80) {
                0x160
            } else {
                CONFIG_SIZE as u64 + 16
            };
            let at = random.below(near) as usize;
            let width = match random.below(10) {
                0 => random.below(64) as usize,
                1 => CONFIG_SIZE,
                n => 1 << (n % 3),
            };
            let bytes: Vec<u8> = (0..width).map(|_| random.next() as u8).collect();
            effects.clear();
            let before = (space.command(), space.msix_enabled(), space.vfs());
            space.write(at, &bytes, &mut effects);
            // What has changed was told, and only that.
            let after = (space.command(), space.msix_enabled(), space.vfs());
            let told = |wanted: fn(&Effect) -> bool| effects.iter().any(wanted);
            assert_eq!(
                before.1 != after.1,
                told(|effect| matches!(effect, Effect::MsixEnable(_)))
            );
            assert_eq!(
                before.2 != after.2,
                told(|effect| matches!(effect, Effect::VfEnable { .. }))
            );
            assert_eq!(
                (before.0 ^ after.0) & 4 != 0,
                told(|effect| matches!(effect, Effect::BusMaster(_)))
            );
            for effect in &effects {
                if let Effect::PciCfgAccess { window, .. } = effect {
                    let bar = space.bar(window.bar.into()).unwrap();
                    assert!(matches!(window.length, 1 | 2 | 4));
                    assert!(u64::from(window.offset) + u64::from(window.length) <= bar.size);
                    assert_eq!(window.offset % u32::from(window.length), 0);
                }
            }
            let mut some = vec![0; width];
            space.read(at, &mut some);
            let _ = space.window(at, width);
            space.fill_window(&bytes);
            for (index, (now, first)) in dump(&space).iter().zip(&initial).enumerate() {
                assert_eq!(
                    now & !variable[index],
                    first & !variable[index],
                    "round {round}: byte {index:#x}"
                );
            }
        }
    }
}

#[test]
fn mistakes_of_the_layout_are_refused() {
    let new = || ConfigBuilder::new(MODERN, 1);
    let refused = |builder: ConfigBuilder, part: &str| match builder.build() {
        Err(Error::Invalid(reason)) => assert!(reason.contains(part), "{reason}"),
        _ => panic!("{part} was accepted"),
    };
    refused(new().bar(0, MEM32, 0x1001), "power of two");
    refused(new().bar(0, MEM32, 8), "power of two");
    refused(new().bar(0, MEM32, 1 << 32), "power of two");
    refused(new().bar(0, BarKind::Io, 1 << 20), "power of two");
    refused(new().bar(0, MEM32, 0), "power of two");
    refused(new().bar(6, MEM32, 0x1000), "there are 6");
    refused(new().bar(5, MEM64, 0x1000), "there are 6");
    refused(new().bar(1, MEM64, 0x1000).bar(2, MEM32, 0x1000), "in use");
    refused(new().bar(2, MEM32, 0x1000).bar(1, MEM64, 0x1000), "in use");
    refused(new().bar(2, MEM32, 0x1000).bar(2, MEM32, 0x1000), "in use");
    refused(new().virtio(Structure::Common, 2, 0, 64), "ends at 0x40");
    refused(
        new().bar(2, MEM32, 0x1000).virtio(Structure::Common, 2, 0xfe0, 64),
        "ends at 0x1020",
    );
    refused(new().bar(2, MEM32, 0x1000).virtio(Structure::Device, 2, 2, 64), "0x2");
    refused(new().virtio(Structure::Isr, 9, 0, 1), "BAR 9");
    refused(new().bar(1, MEM32, 0x1000).msix(0, 1, 0, 0x800), "0 vectors");
    refused(new().bar(1, MEM32, 0x1000).msix(2049, 1, 0, 0x800), "2049 vectors");
    refused(new().bar(1, MEM32, 0x1000).msix(257, 1, 0, 0x800), "ends at 0x1010");
    refused(new().bar(1, MEM32, 0x1000).msix(1, 1, 4, 0x800), "at 0x4");
    let mut bad = sr_iov();
    bad.bars[0] = bad.bars[1];
    refused(new().sr_iov(bad), "hardwired");
    let mut bad = sr_iov();
    bad.bars[1] = Some(Bar {
        kind: BarKind::Io,
        size: 64,
    });
    refused(new().sr_iov(bad), "I/O");
    let mut bad = sr_iov();
    bad.bars[3] = bad.bars[1];
    refused(new().sr_iov(bad), "in use");
    let full = (0..20).fold(new(), |builder, _| builder.power());
    full.build().unwrap();
    refused((0..25).fold(new(), |builder, _| builder.power()), "no room");
    refused(ConfigBuilder::new(MODERN, 5), "pin 5");
    // Twice the window: the last one counts, and nothing breaks.
    new().virtio_pci_cfg().virtio_pci_cfg().build().unwrap();
}

#[test]
fn shared_memory() {
    let build = |offset, length| {
        ConfigBuilder::new(MODERN, 1)
            .bar(4, MEM64, 1 << 40)
            .virtio_shared_memory(5, 4, offset, length)
            .build()
    };
    let space = build(0x12_3456_7000, 0x1_0000_2000).unwrap();
    let capability = space.capabilities()[0];
    assert_eq!((capability.id, capability.name), (9, "virtio-shared-memory"));
    let mut bytes = [0; 24];
    space.read(capability.offset.into(), &mut bytes);
    assert_eq!(bytes[..8], [9, 0, 24, 8, 4, 5, 0, 0]);
    let words: Vec<_> = bytes[8..]
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(words, [0x3456_7000, 0x2000, 0x12, 1]);
    assert!(build(0, 1 << 40).is_ok());
    for (offset, length) in [(0, 0), (1, 1 << 40), (1 << 40, 1), (u64::MAX, 2), (2, u64::MAX)] {
        assert!(build(offset, length).is_err(), "{length:#x} bytes at {offset:#x}");
    }
}
