// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhu-bench-owner`: what administration commands and accesses to a legacy I/O BAR cost.
//!
//! Prints tables with minimum, median and maximum over several rounds; benches/README.md says what is measured.

mod function;

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhu_core::device::blk::{Blk, BlkOptions};
use vhu_core::device::image::Image;
use vhu_core::event::Waker;
use vhu_core::member::{Member, MemberOptions};
use vhu_core::owner::command::{self, RESULT_HEADER};
use vhu_core::owner::local::{header, LocalQueue, Submitted};
use vhu_core::owner::trace::{Begun, Origin};
use vhu_core::owner::{Compat, DeviceGroup, GroupOptions};
use vhu_core::worker::Pool;

const MEMBERS: u32 = 256;
const BATCH: usize = 32;

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// A group of null disks, its commands ready for use.
pub(crate) fn group(queues: u16, members: u32) -> Result<(Arc<Pool>, Arc<DeviceGroup>), Failure> {
    let pool = Arc::new(Pool::new(Some(2))?);
    let options = GroupOptions {
        compat: Compat::new(false),
        feature_management: false,
        notify_region: true,
        admin_queues: queues,
    };
    let group = DeviceGroup::new(Arc::clone(&pool), options)?;
    for id in 1..=members {
        let options = BlkOptions {
            queues: 1,
            queue_size: 256,
            blk_size: 512,
            serial: String::new(),
        };
        let blk = Blk::new(Image::open("null:1073741824", false)?, options)?;
        let options = MemberOptions {
            legacy: true,
            vectors: 2,
            ..MemberOptions::default()
        };
        group.add(Member::new(Arc::clone(&pool), id, Arc::new(blk), options))?;
    }
    let queue = group.queue(0).ok_or("no queue")?;
    let all = group.core().supported(command::SR_IOV).to_le_bytes();
    match queue.call(command::LIST_USE, command::SR_IOV, 0, &all, &mut []) {
        Ok(0) => Ok((pool, group)),
        other => Err(format!("LIST_USE: {other:?}").into()),
    }
}

/// Minimum, median and maximum.
pub(crate) fn spread(mut samples: Vec<f64>) -> (f64, f64, f64) {
    samples.sort_by(f64::total_cmp);
    let at = |index: usize| samples.get(index).copied().unwrap_or(f64::NAN);
    (at(0), at(samples.len() / 2), at(samples.len().saturating_sub(1)))
}

/// The value that a share of the samples doesn't exceed.
pub(crate) fn percentile(samples: &mut [u32], share: f64) -> u32 {
    samples.sort_unstable();
    let last = samples.len().saturating_sub(1);
    samples.get((last as f64 * share) as usize).copied().unwrap_or(0)
}

struct Rate {
    per_second: f64,
    p50: u32,
    p99: u32,
}

/// Legacy reads of the status register on one queue for a while: commands a second, and nanoseconds of one (of a batch, when
/// several are in flight).
fn reads(queue: &Arc<LocalQueue>, member: u64, depth: usize, time: Duration) -> Result<Rate, Failure> {
    let mut command = header(command::LEGACY_COMMON_CFG_READ, command::SR_IOV, member).to_vec();
    command.push(18);
    let parts = [command.as_slice(); BATCH];
    let mut out = [0; RESULT_HEADER + 1];
    let mut samples = Vec::with_capacity(1 << 22);
    let mut done = 0usize;
    let begin = Instant::now();
    while begin.elapsed() < time {
        for _ in 0..64 {
            let at = Instant::now();
            if depth == 1 {
                let submitted = queue
                    .submit(&[&command], &mut out, Origin::Admin, Begun::now(), || -> Waker {
                        Box::new(|| {})
                    })
                    .map_err(|full| format!("{full:?}"))?;
                if submitted != Submitted::Done(out.len()) || out[0] != 0 {
                    return Err(format!("a read ended with {submitted:?}, {out:?}").into());
                }
                done += 1;
            } else {
                let mut good = 0;
                queue
                    .submit_all(&parts[..depth], out.len(), |_, bytes| {
                        good += usize::from(bytes[0] == 0)
                    })
                    .map_err(|full| format!("{full:?}"))?;
                if good != depth {
                    return Err(format!("{good} of {depth} reads succeeded").into());
                }
                done += depth;
            }
            samples.push(u32::try_from(at.elapsed().as_nanos()).unwrap_or(u32::MAX));
        }
    }
    let per_second = done as f64 / begin.elapsed().as_secs_f64();
    Ok(Rate {
        per_second,
        p50: percentile(&mut samples, 0.5),
        p99: percentile(&mut samples, 0.99),
    })
}

fn commands(rounds: usize, time: Duration) -> Result<(), Failure> {
    let (_pool, group) = group(2, 2)?;
    println!("administration commands, in-process (LEGACY_COMMON_CFG_READ of device_status), {rounds} rounds");
    println!("  queues  in flight   million/s min  median     max    p50 ns   p99 ns (of a doorbell)");
    for queues in [1usize, 2] {
        for depth in [1, BATCH] {
            let mut rates = Vec::new();
            let (mut p50, mut p99) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                let results: Vec<Result<Rate, Failure>> = std::thread::scope(|scope| {
                    let threads: Vec<_> = (0..queues)
                        .filter_map(|index| group.queue(index))
                        .enumerate()
                        .map(|(index, queue)| scope.spawn(move || reads(queue, index as u64 + 1, depth, time)))
                        .collect();
                    threads
                        .into_iter()
                        .map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into())))
                        .collect()
                });
                let mut sum = 0.0;
                for rate in results {
                    let rate = rate?;
                    sum += rate.per_second;
                    p50.push(f64::from(rate.p50));
                    p99.push(f64::from(rate.p99));
                }
                rates.push(sum / 1e6);
            }
            let (min, median, max) = spread(rates);
            let ((_, p50, _), (_, p99, _)) = (spread(p50), spread(p99));
            println!("  {queues:6}  {depth:9}   {min:13.2} {median:7.2} {max:7.2} {p50:9.0} {p99:8.0}");
        }
    }
    Ok(())
}

/// What a legacy Linux driver does from reset to DRIVER_OK, as commands.
fn initialise(queue: &Arc<LocalQueue>, member: u64) -> Result<u32, Failure> {
    let mut count = 0;
    let mut call = |opcode: u16, data: &[u8], result: &mut [u8]| -> Result<(), Failure> {
        count += 1;
        match queue.call(opcode, command::SR_IOV, member, data, result) {
            Ok(0) => Ok(()),
            other => Err(format!("member {member}: opcode {opcode:#x}: {other:?}").into()),
        }
    };
    let mut byte = [0];
    let mut half = [0; 2];
    let mut word = [0; 4];
    let write = |offset: u8, value: &[u8]| {
        let mut data = vec![offset, 0, 0, 0, 0, 0, 0, 0];
        data.extend_from_slice(value);
        data
    };
    const READ: u16 = command::LEGACY_COMMON_CFG_READ;
    const WRITE: u16 = command::LEGACY_COMMON_CFG_WRITE;
    call(WRITE, &write(18, &[0]), &mut [])?;
    call(READ, &[18], &mut byte)?;
    call(READ, &[18], &mut byte)?;
    call(WRITE, &write(18, &[1]), &mut [])?;
    call(READ, &[18], &mut byte)?;
    call(WRITE, &write(18, &[3]), &mut [])?;
    call(READ, &[0], &mut word)?;
    call(WRITE, &write(4, &[0x44, 0x0e, 0, 0x30]), &mut [])?;
    // Capacity, geometry and so on, byte by byte.
    for offset in 0..48 {
        call(command::LEGACY_DEV_CFG_READ, &[offset], &mut byte)?;
    }
    call(WRITE, &write(14, &[0, 0]), &mut [])?;
    call(READ, &[12], &mut half)?;
    call(WRITE, &write(14, &[0, 0]), &mut [])?;
    call(READ, &[8], &mut word)?;
    call(WRITE, &write(14, &[0, 0]), &mut [])?;
    call(WRITE, &write(8, &[0x34, 0x12, 0, 0]), &mut [])?;
    call(READ, &[18], &mut byte)?;
    call(WRITE, &write(18, &[7]), &mut [])?;
    Ok(count)
}

fn initialisation(rounds: usize) -> Result<(), Failure> {
    let (_pool, group) = group(1, MEMBERS)?;
    let queue = group.queue(0).ok_or("no queue")?;
    let mut times = Vec::new();
    let mut count = 0;
    for _ in 0..rounds {
        let begin = Instant::now();
        count = 0;
        for member in 1..=u64::from(MEMBERS) {
            count += initialise(queue, member)?;
        }
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let (min, median, max) = spread(times);
    println!("\na legacy driver's initialisation of {MEMBERS} members, {count} commands, {rounds} rounds");
    println!("  milliseconds: min {min:.2}, median {median:.2}, max {max:.2}");
    Ok(())
}

fn run(quick: bool) -> Result<(), Failure> {
    let rounds = if quick { 2 } else { 7 };
    let time = Duration::from_millis(if quick { 100 } else { 1000 });
    commands(rounds, time)?;
    initialisation(rounds)?;
    function::accesses(rounds, if quick { 2_000 } else { 50_000 })
}

fn main() -> ExitCode {
    let mut quick = false;
    for argument in std::env::args().skip(1) {
        if argument == "--quick" {
            quick = true;
        } else {
            eprintln!("usage: vhu-bench-owner [--quick]");
            return ExitCode::from(2);
        }
    }
    match run(quick) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhu-bench-owner: {error}");
            ExitCode::FAILURE
        }
    }
}
