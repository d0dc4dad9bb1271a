// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks and changes of messages: each rule, and each way to break it.

#![allow(clippy::unwrap_used)]

use vvu_bridge::message::{build, request::*, u64_at, HEADER, MAX_MESSAGE, NEED_REPLY, REPLY};
use vvu_bridge::proxy::{refusal, Fds, Proxy, Route, Violation, Window, MAX_OUTSTANDING};

const QUEUES: u16 = 4;
const WINDOW: Window = Window {
    offset: 0x20_0000,
    length: 0x10_0000,
};

fn proxy() -> Proxy {
    Proxy::new(QUEUES, WINDOW)
}

fn payload(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A table of (size, mmap_offset).
fn table(regions: &[(u64, u64)]) -> Vec<u8> {
    let mut words = vec![regions.len() as u64];
    for (at, &(size, mmap_offset)) in regions.iter().enumerate() {
        words.extend([0x1000_0000 * at as u64, size, 0x7f00_0000_0000, mmap_offset]);
    }
    build(SET_MEM_TABLE, 0, &payload(&words))
}

fn mmap_offset(table: &[u8], region: usize) -> u64 {
    u64_at(table, HEADER + 8 + 32 * region + 24).unwrap()
}

fn request(proxy: &mut Proxy, number: u32, flags: u32, words: &[u64]) -> Result<Route, Violation> {
    proxy.from_device(&mut build(number, flags, &payload(words)))
}

const fn plain(fds: Fds) -> Result<Route, Violation> {
    Ok(Route::Request(fds))
}

#[test]
fn regions_are_placed_one_after_the_other_in_the_bar() {
    let mut message = table(&[(0x1000, 0), (0x8000, 0), (0x2000, 0)]);
    assert_eq!(proxy().from_device(&mut message), plain(Fds::Memory(3)));
    assert_eq!(mmap_offset(&message, 0), 0x20_0000);
    assert_eq!(mmap_offset(&message, 1), 0x20_1000);
    assert_eq!(mmap_offset(&message, 2), 0x20_9000);
}

#[test]
fn an_mmap_offset_counts_as_it_arrives_for_its_region_and_all_after_it() {
    let mut message = table(&[(0x1000, 0x3000), (0x8000, 0), (0x2000, 0x5000)]);
    let before = message.clone();
    assert_eq!(proxy().from_device(&mut message), plain(Fds::Memory(3)));
    assert_eq!(mmap_offset(&message, 0), 0x20_3000);
    assert_eq!(mmap_offset(&message, 1), 0x20_4000);
    assert_eq!(mmap_offset(&message, 2), 0x20_c000 + 0x5000);
    // Nothing else is changed.
    for (region, at) in [0, 1, 2].map(|region| (region, HEADER + 8 + 32 * region + 24)) {
        message[at..at + 8].copy_from_slice(&before[at..at + 8]);
        assert_eq!(mmap_offset(&message, region), mmap_offset(&before, region));
    }
    assert_eq!(message, before);
}

#[test]
fn regions_must_be_inside_the_shared_memory() {
    let mut fits = table(&[(0x8_0000, 0), (0x7_0000, 0x1_0000)]);
    assert_eq!(
        proxy().from_device(&mut fits),
        plain(Fds::Memory(2)),
        "to the last byte"
    );
    for (regions, wrong) in [
        (vec![(0x8_0000, 0), (0x8_0001, 0)], 1),
        (vec![(0x10_0000, 1)], 0),
        (vec![(u64::MAX, 0)], 0),
        (vec![(0x1000, u64::MAX)], 0),
        (vec![(0x1000, u64::MAX - 0xfff)], 0),
        (vec![(0x1000, 0), (0x1000, u64::MAX - 0x1000)], 1),
        (vec![(0, 0)], 0),
    ] {
        let mut message = table(&regions);
        assert_eq!(
            proxy().from_device(&mut message),
            Err(Violation::Region(wrong)),
            "{regions:x?}"
        );
    }
    let end = Proxy::new(
        1,
        Window {
            offset: u64::MAX - 0xfff,
            length: 0x10_0000,
        },
    )
    .from_device(&mut table(&[(0x1000, 0), (0x1000, 0)]));
    assert_eq!(end, Err(Violation::Region(1)), "offsets in the file don't wrap either");
}

#[test]
fn a_region_may_not_wrap_around_in_either_address_space() {
    for at in [HEADER + 8, HEADER + 8 + 16] {
        let mut message = table(&[(0x1000, 0)]);
        message[at..at + 8].copy_from_slice(&(u64::MAX - 0xff).to_le_bytes());
        assert_eq!(proxy().from_device(&mut message), Err(Violation::Region(0)));
    }
}

#[test]
fn a_memory_table_has_at_most_eight_regions_and_the_size_of_as_many_as_it_says() {
    assert_eq!(
        proxy().from_device(&mut table(&[(0x1000, 0); 8])),
        plain(Fds::Memory(8))
    );
    assert_eq!(
        proxy().from_device(&mut table(&[(0x1000, 0); 9])),
        Err(Violation::Regions(9))
    );
    assert_eq!(proxy().from_device(&mut table(&[])), plain(Fds::Memory(0)));
    let mut lying = table(&[(0x1000, 0); 2]);
    lying[HEADER] = 3;
    assert_eq!(
        proxy().from_device(&mut lying),
        Err(Violation::PayloadSize(SET_MEM_TABLE, 72))
    );
    let mut huge = build(SET_MEM_TABLE, 0, &u32::MAX.to_le_bytes());
    assert_eq!(proxy().from_device(&mut huge), Err(Violation::Regions(u32::MAX)));
    let mut empty = build(SET_MEM_TABLE, 0, &[]);
    assert_eq!(
        proxy().from_device(&mut empty),
        Err(Violation::PayloadSize(SET_MEM_TABLE, 0))
    );
}

#[test]
fn the_log_follows_the_regions_of_the_last_table() {
    let mut proxy = proxy();
    for (regions, start) in [
        (vec![], 0),
        (vec![(0x1000, 0x2000), (0x4000, 0)], 0x7000),
        (vec![(0x3000, 0)], 0x3000),
    ] {
        proxy.from_device(&mut table(&regions)).unwrap();
        let mut log = build(SET_LOG_BASE, 0, &payload(&[0x800, 0x10]));
        assert_eq!(proxy.from_device(&mut log), plain(Fds::Memory(1)));
        assert_eq!(u64_at(&log, HEADER), Some(0x800));
        assert_eq!(u64_at(&log, HEADER + 8), Some(0x20_0010 + start));
    }
}

#[test]
fn the_log_must_be_inside_the_shared_memory() {
    let mut proxy = proxy();
    proxy.from_device(&mut table(&[(0xf_f000, 0)])).unwrap();
    assert_eq!(
        request(&mut proxy, SET_LOG_BASE, 0, &[0x1000, 0]),
        plain(Fds::Memory(1))
    );
    for (length, offset) in [(0x1001, 0), (0x1000, 1), (u64::MAX, 0), (1, u64::MAX), (0, 0)] {
        assert_eq!(
            request(&mut proxy, SET_LOG_BASE, 0, &[length, offset]),
            Err(Violation::Log)
        );
    }
    // Without LOG_SHMFD: an address of the master's.
    assert_eq!(
        request(&mut proxy, SET_LOG_BASE, 0, &[0x1000]),
        Err(Violation::PayloadSize(SET_LOG_BASE, 8))
    );
}

#[test]
fn kick_call_and_err_name_their_eventfd() {
    let mut proxy = proxy();
    assert_eq!(request(&mut proxy, SET_VRING_KICK, 0, &[3]), plain(Fds::Kick(3)));
    assert_eq!(request(&mut proxy, SET_VRING_KICK, 0, &[0x103]), plain(Fds::NoKick(3)));
    assert_eq!(request(&mut proxy, SET_VRING_CALL, 0, &[2]), plain(Fds::Call(2)));
    assert_eq!(request(&mut proxy, SET_VRING_CALL, 0, &[0x102]), plain(Fds::None));
    assert_eq!(request(&mut proxy, SET_VRING_ERR, 0, &[1]), plain(Fds::Err(1)));
    assert_eq!(request(&mut proxy, SET_VRING_ERR, 0, &[0x101]), plain(Fds::None));
    assert_eq!(request(&mut proxy, SET_LOG_FD, 0, &[]), plain(Fds::Log));
    assert_eq!(request(&mut proxy, SET_SLAVE_REQ_FD, 0, &[]), plain(Fds::SlaveChannel));
}

#[test]
fn queue_indices_are_below_the_devices_number_of_queues() {
    let state = [
        SET_VRING_NUM,
        SET_VRING_BASE,
        GET_VRING_BASE,
        SET_VRING_ENABLE,
        SET_VRING_ENDIAN,
        VRING_KICK,
    ];
    for number in state {
        assert_eq!(
            request(&mut proxy(), number, 0, &[3 | 7 << 32]),
            plain(Fds::None),
            "{number}"
        );
        for index in [4, 0x100, 0xffff_ffff] {
            assert_eq!(
                request(&mut proxy(), number, 0, &[index]),
                Err(Violation::Queue(number, index, QUEUES))
            );
        }
    }
    assert_eq!(
        request(&mut proxy(), SET_VRING_ADDR, 0, &[3, 0, 0, 0, 0]),
        plain(Fds::None)
    );
    assert_eq!(
        request(&mut proxy(), SET_VRING_ADDR, 0, &[4, 0, 0, 0, 0]),
        Err(Violation::Queue(SET_VRING_ADDR, 4, QUEUES))
    );
    for number in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        for value in [4, 0x104, 0xff, 0x200, 0x1_0000_0000, u64::MAX] {
            let index = value & !0x100;
            let expected = Err(Violation::Queue(number, index, QUEUES));
            assert_eq!(request(&mut proxy(), number, 0, &[value]), expected, "{value:#x}");
        }
    }
}

#[test]
fn a_device_with_all_256_queues_can_use_them() {
    let mut proxy = Proxy::new(256, WINDOW);
    assert_eq!(request(&mut proxy, SET_VRING_CALL, 0, &[255]), plain(Fds::Call(255)));
    assert_eq!(request(&mut proxy, SET_VRING_NUM, 0, &[255]), plain(Fds::None));
    assert_eq!(
        request(&mut proxy, SET_VRING_NUM, 0, &[256]),
        Err(Violation::Queue(SET_VRING_NUM, 256, 256))
    );
}

#[test]
fn payloads_have_their_size() {
    let none = [
        GET_FEATURES,
        SET_OWNER,
        RESET_OWNER,
        GET_PROTOCOL_FEATURES,
        GET_QUEUE_NUM,
        RESET_DEVICE,
        GET_MAX_MEM_SLOTS,
        GET_STATUS,
        CHECK_DEVICE_STATE,
        GET_SHMEM_CONFIG,
    ];
    let eight = [SET_FEATURES, SET_PROTOCOL_FEATURES, SEND_RARP, NET_SET_MTU, SET_STATUS];
    let queues = [
        SET_VRING_NUM,
        SET_VRING_BASE,
        GET_VRING_BASE,
        SET_VRING_ENABLE,
        SET_VRING_KICK,
        SET_VRING_CALL,
        SET_VRING_ERR,
    ];
    let all = none
        .iter()
        .map(|&number| (number, 0))
        .chain(eight.iter().chain(&queues).map(|&number| (number, 8)));
    for (number, size) in all.chain([(SET_VRING_ADDR, 40)]) {
        for wrong in [0, 1, 4, 7, 8, 9, 16, 39, 40, 41, 4096] {
            let result = proxy().from_device(&mut build(number, 0, &vec![0; wrong]));
            assert_eq!(
                result.is_ok(),
                wrong == size,
                "message {number}, {wrong} bytes: {result:?}"
            );
        }
    }
    for number in [GET_CONFIG, SET_CONFIG] {
        assert_eq!(
            proxy().from_device(&mut build(number, 0, &[0; 11])),
            Err(Violation::PayloadSize(number, 11))
        );
        assert_eq!(proxy().from_device(&mut build(number, 0, &[0; 268])), plain(Fds::None));
    }
}

#[test]
fn requests_whose_fds_cant_cross_and_unknown_ones_are_refused() {
    for number in [
        POSTCOPY_ADVISE,
        POSTCOPY_LISTEN,
        POSTCOPY_END,
        GET_INFLIGHT_FD,
        SET_INFLIGHT_FD,
        GPU_SET_SOCKET,
        ADD_MEM_REG,
        REM_MEM_REG,
        GET_SHARED_OBJECT,
        SET_DEVICE_STATE_FD,
    ] {
        assert_eq!(request(&mut proxy(), number, 0, &[0]), Err(Violation::NeedsFd(number)));
    }
    for number in [0, 45, 1000, u32::MAX] {
        assert_eq!(request(&mut proxy(), number, 0, &[0]), Err(Violation::Unknown(number)));
    }
}

#[test]
fn headers_are_checked_on_all_three_ways() {
    let mut short = vec![1; HEADER - 1];
    let mut version = build(GET_FEATURES, REPLY, &[]);
    version[4] = 2 | REPLY as u8;
    let mut long = build(GET_FEATURES, REPLY, &[0; 8]);
    long[8] = 9;
    let mut oversize = build(GET_FEATURES, REPLY, &vec![0; 4097]);
    assert!(oversize.len() > MAX_MESSAGE);
    for (message, expected) in [
        (&mut short, Violation::NoHeader),
        (&mut version, Violation::Version(GET_FEATURES)),
        (&mut long, Violation::Length(GET_FEATURES, 9, 8)),
        (&mut oversize, Violation::Length(GET_FEATURES, 4097, 4097)),
    ] {
        assert_eq!(proxy().from_device(message), Err(expected));
        assert_eq!(proxy().from_daemon(message), Err(expected));
        assert_eq!(proxy().from_slave(message), Err(expected));
    }
}

#[test]
fn a_reply_of_the_master_belongs_to_a_slave_request_that_wants_one() {
    const CONFIG_CHANGE: u32 = 2;
    const IOTLB: u32 = 1;
    let mut proxy = proxy();
    let mut reply = build(CONFIG_CHANGE, REPLY, &payload(&[0]));
    assert_eq!(
        proxy.from_device(&mut reply),
        Err(Violation::Reply(CONFIG_CHANGE)),
        "nothing was asked"
    );
    request(&mut proxy, SET_SLAVE_REQ_FD, 0, &[]).unwrap();
    proxy.from_slave(&build(CONFIG_CHANGE, 0, &[])).unwrap();
    assert_eq!(
        proxy.from_device(&mut reply),
        Err(Violation::Reply(CONFIG_CHANGE)),
        "no reply was wanted"
    );
    proxy.from_slave(&build(CONFIG_CHANGE, NEED_REPLY, &[])).unwrap();
    let mut other = build(IOTLB, REPLY, &payload(&[0]));
    assert_eq!(
        proxy.from_device(&mut other),
        Err(Violation::Reply(IOTLB)),
        "something else was asked"
    );
    assert_eq!(proxy.from_device(&mut reply), Ok(Route::SlaveReply));
    assert_eq!(
        proxy.from_device(&mut reply),
        Err(Violation::Reply(CONFIG_CHANGE)),
        "it has been answered"
    );
}

#[test]
fn slave_requests_without_reply_are_bounded() {
    let mut proxy = proxy();
    for _ in 0..MAX_OUTSTANDING {
        proxy.from_slave(&build(2, NEED_REPLY, &[])).unwrap();
    }
    assert_eq!(
        proxy.from_slave(&build(2, NEED_REPLY, &[])),
        Err(Violation::Outstanding)
    );
    assert_eq!(
        proxy.from_slave(&build(2, REPLY, &[])),
        Err(Violation::Reply(2)),
        "the slave asks, it doesn't answer"
    );
}

#[test]
fn the_daemon_answers_what_it_was_asked() {
    let mut proxy = proxy();
    let mut reply = build(GET_FEATURES, REPLY, &payload(&[1 << 32]));
    assert_eq!(proxy.from_daemon(&mut reply), Err(Violation::Reply(GET_FEATURES)));
    request(&mut proxy, GET_FEATURES, 0, &[]).unwrap();
    let mut request_back = build(GET_FEATURES, 0, &[]);
    assert_eq!(
        proxy.from_daemon(&mut request_back),
        Err(Violation::NotAReply(GET_FEATURES))
    );
    assert_eq!(proxy.from_daemon(&mut reply), Ok(()));
    assert_eq!(
        proxy.from_daemon(&mut reply),
        Err(Violation::Reply(GET_FEATURES)),
        "once"
    );
    for number in [0, 45, u32::MAX] {
        assert_eq!(
            proxy.from_daemon(&mut build(number, REPLY, &[])),
            Err(Violation::Reply(number))
        );
    }
}

#[test]
fn the_daemon_has_no_more_queues_than_the_device() {
    for (says, passes) in [(1, 1), (4, 4), (5, 4), (u64::MAX, 4)] {
        let mut proxy = proxy();
        request(&mut proxy, GET_QUEUE_NUM, 0, &[]).unwrap();
        let mut reply = build(GET_QUEUE_NUM, REPLY, &payload(&[says]));
        proxy.from_daemon(&mut reply).unwrap();
        assert_eq!(u64_at(&reply, HEADER), Some(passes));
    }
}

#[test]
fn a_refused_slave_request_gets_a_failure_if_it_wants_an_answer() {
    assert_eq!(
        refusal(&build(9, NEED_REPLY, &[0; 40])),
        Some(build(9, REPLY, &payload(&[1])))
    );
    assert_eq!(refusal(&build(9, 0, &[0; 40])), None);
    assert_eq!(refusal(&build(9, NEED_REPLY | REPLY, &[])), None);
    assert_eq!(refusal(&[0; 3]), None);
}
