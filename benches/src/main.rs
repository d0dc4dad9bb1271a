// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhu-bench`: a vhost-user-blk front end that times whatever back end listens on a socket.
//!
//! One line of JSON on stdout is the result; see benches/README.md for what the numbers mean.

mod driver;
mod ram;
mod ring;
mod wire;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use driver::{Driver, Job, Op, Outcome, Wait};

const USAGE: &str = "usage: vhu-bench --socket PATH [--pid N] [--mode eventfd|polled] [--op read|write] [--depth N]
    [--block BYTES] [--seconds S] [--warmup S] [--queue-size N] [--seed N] [--no-event-idx] [--no-indirect]
    [--no-version-1] [--no-inflight] [--packed] [--in-order] [--verify]
    [--reconnect-ms N]";

struct Options {
    socket: PathBuf,
    pid: Option<u32>,
    job: Job,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut job = Job {
        wait: Wait::Eventfd,
        op: Op::In,
        depth: 1,
        block: 4096,
        warmup: Duration::from_millis(200),
        time: Duration::from_secs(1),
        verify: false,
        queue_size: 256,
        event_idx: true,
        indirect: true,
        version_1: true,
        inflight: true,
        packed: false,
        in_order: false,
        reconnect: None,
        seed: 0x9e37_79b9_7f4a_7c15,
    };
    let (mut socket, mut pid) = (None, None);
    while let Some(option) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{option} needs a value"));
        match option.as_str() {
            "--socket" => socket = Some(PathBuf::from(value()?)),
            "--pid" => pid = Some(number(&option, &value()?)?),
            "--mode" => {
                job.wait = match value()?.as_str() {
                    "eventfd" => Wait::Eventfd,
                    "polled" => Wait::Polled,
                    other => return Err(format!("--mode {other}: eventfd or polled")),
                }
            }
            "--op" => {
                job.op = match value()?.as_str() {
                    "read" => Op::In,
                    "write" => Op::Out,
                    other => return Err(format!("--op {other}: read or write")),
                }
            }
            "--depth" => job.depth = number(&option, &value()?)?,
            "--block" => job.block = number(&option, &value()?)?,
            "--seconds" => job.time = seconds(&option, &value()?)?,
            "--warmup" => job.warmup = seconds(&option, &value()?)?,
            "--queue-size" => job.queue_size = number(&option, &value()?)?,
            "--seed" => job.seed = number(&option, &value()?)?,
            "--no-event-idx" => job.event_idx = false,
            "--no-indirect" => job.indirect = false,
            "--no-version-1" => job.version_1 = false,
            "--no-inflight" => job.inflight = false,
            "--packed" => job.packed = true,
            "--in-order" => job.in_order = true,
            "--reconnect-ms" => job.reconnect = Some(Duration::from_millis(number(&option, &value()?)?)),
            "--verify" => job.verify = true,
            _ => return Err(format!("unknown option {option}")),
        }
    }
    if job.block == 0 || !job.block.is_multiple_of(512) || job.block > 1 << 20 {
        return Err(format!("--block {}: a multiple of 512 up to 1 MiB", job.block));
    }
    if !job.queue_size.is_power_of_two() || job.queue_size > 1024 {
        return Err(format!("--queue-size {}: a power of two up to 1024", job.queue_size));
    }
    if job.reconnect.is_some() && job.wait == Wait::Polled {
        return Err("--reconnect-ms: who polls the ring doesn't see a connection end; --mode eventfd".into());
    }
    let socket = socket.ok_or("--socket is missing")?;
    Ok(Options { socket, pid, job })
}

fn number<T: std::str::FromStr>(option: &str, text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{option} {text}: not a number that fits"))
}

fn seconds(option: &str, text: &str) -> Result<Duration, String> {
    let value: f64 = number(option, text)?;
    if (0.0..=3600.0).contains(&value) {
        Ok(Duration::from_secs_f64(value))
    } else {
        Err(format!("{option} {text}: 0 to 3600"))
    }
}

/// CPU time that a process has used so far, all its threads (also those that have ended), user and system.
fn cpu_seconds(pid: u32) -> io::Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command name may hold anything but ends at the last parenthesis.
    let fields: Vec<&str> = text
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    // Fields 14 and 15 of proc(5), counted from 3 after the name.
    let (Some(user), Some(system)) = (ticks(11), ticks(12)) else {
        return Err(io::Error::other(format!("/proc/{pid}/stat can't be read")));
    };
    // SAFETY: no memory is involved.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok((user + system) as f64 / per_second.max(1) as f64)
}

/// Ends the process when the job hangs: a back end that dies leaves an eventfd nobody writes to.
fn watch(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!(
            "vhu-bench: no end after {} s; the back end has stopped answering",
            limit.as_secs()
        );
        std::process::exit(3);
    });
}

fn report(driver: &Driver, job: &Job, mut outcome: Outcome, cpu: Option<f64>) -> String {
    let latencies = &mut outcome.latencies;
    latencies.sort_unstable();
    let at = |share: f64| {
        let last = latencies.len().saturating_sub(1);
        latencies.get((last as f64 * share) as usize).copied().unwrap_or(0)
    };
    let mode = if job.wait == Wait::Polled { "polled" } else { "eventfd" };
    let op = if job.op == Op::In { "read" } else { "write" };
    let elapsed = outcome.elapsed.as_secs_f64();
    let iops = if elapsed > 0.0 {
        outcome.requests as f64 / elapsed
    } else {
        0.0
    };
    let per_million = match cpu {
        Some(used) if outcome.requests > 0 => format!("{:.4}", used * 1e6 / outcome.requests as f64),
        _ => "null".into(),
    };
    format!(
        "{{\"mode\":\"{mode}\",\"op\":\"{op}\",\"depth\":{},\"block\":{},\"verified\":{},\"inflight\":{},\"features\":{},\
         \"protocol_features\":{},\"capacity\":{},\"requests\":{},\"seconds\":{elapsed:.6},\"iops\":{iops:.1},\
         \"latency_ns\":{{\"min\":{},\"median\":{},\"p99\":{},\"max\":{}}},\"kicks\":{},\"calls\":{},\
         \"cpu_seconds_per_million\":{per_million}}}",
        job.depth,
        job.block,
        job.verify,
        driver.tracks_inflight(),
        driver.features,
        driver.protocol,
        driver.capacity,
        outcome.requests,
        at(0.0),
        at(0.5),
        at(0.99),
        at(1.0),
        outcome.kicks,
        outcome.calls,
    )
}

fn run(options: &Options) -> io::Result<String> {
    watch(options.job.warmup + options.job.time + Duration::from_secs(15));
    let mut driver = Driver::start(&options.socket, options.job.clone())?;
    let cpu = |what: &str| match options.pid {
        Some(pid) => cpu_seconds(pid)
            .map(Some)
            .map_err(|e| io::Error::other(format!("{what}: {e}"))),
        None => Ok(None),
    };
    let (outcome, used) = driver.run(&options.socket, || cpu("CPU time"))?;
    Ok(report(&driver, &options.job, outcome, used))
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(reason) => {
            eprintln!("vhu-bench: {reason}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(line) => match writeln!(io::stdout(), "{line}") {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            eprintln!("vhu-bench: {}: {error}", options.socket.display());
            ExitCode::FAILURE
        }
    }
}
