// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Accesses to a legacy I/O BAR over vfio-user, against a bare ping-pong of messages of the same size.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhu_core::event::Completion;
use vhu_core::function::Function;
use vhu_core::owner::forward::Forwarder;
use vhu_core::vfio_user::server::Server;

use crate::{group, percentile, spread, Failure};

const HEADER: usize = 16;
const VERSION: u16 = 1;
const REGION_READ: u16 = 9;
/// A read's request, and its reply with one byte of data.
const REQUEST: usize = HEADER + 16;
const REPLY: usize = REQUEST + 1;
const STATUS: u64 = 18;

fn message(id: u16, command: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend(id.to_le_bytes());
    bytes.extend(command.to_le_bytes());
    bytes.extend(((HEADER + payload.len()) as u32).to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(payload);
    bytes
}

fn negotiate(stream: &mut UnixStream) -> Result<(), Failure> {
    let mut payload = vec![0; 4];
    payload.extend(b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576}}\0");
    stream.write_all(&message(0, VERSION, &payload))?;
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let size = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    let mut rest = vec![0; size.saturating_sub(HEADER)];
    stream.read_exact(&mut rest)?;
    if header[8] & 0x20 != 0 {
        return Err("VERSION was refused".into());
    }
    Ok(())
}

/// Nanoseconds of each of `count` requests that are answered one by one. Both sides of the comparison are timed by this.
fn ping(stream: &mut UnixStream, count: usize) -> Result<Vec<u32>, Failure> {
    let mut payload = Vec::new();
    payload.extend(STATUS.to_le_bytes());
    payload.extend(0u32.to_le_bytes());
    payload.extend(1u32.to_le_bytes());
    let request = message(1, REGION_READ, &payload);
    let mut reply = [0; REPLY];
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let at = Instant::now();
        stream.write_all(&request)?;
        stream.read_exact(&mut reply)?;
        samples.push(u32::try_from(at.elapsed().as_nanos()).unwrap_or(u32::MAX));
        if reply[8] & 0x20 != 0 {
            return Err(format!("the read was refused: {reply:?}").into());
        }
    }
    Ok(samples)
}

/// Answers each request with a reply of the right size, and does nothing else: what two processes and a socket cost.
fn pong(mut stream: UnixStream) {
    let mut request = [0; REQUEST];
    let reply = [0; REPLY];
    while stream.read_exact(&mut request).is_ok() && stream.write_all(&reply).is_ok() {}
}

pub(crate) fn accesses(rounds: usize, count: usize) -> Result<(), Failure> {
    let (pool, group) = group(1, 1)?;
    let member = group.member(1).ok_or("no member")?;
    let ports = Arc::new(Forwarder::new(Arc::clone(&group), Arc::clone(&member))?);
    let function = Function::legacy(member, ports)?;
    let path = std::env::temp_dir().join(format!("vhu-bench-{}.sock", std::process::id()));
    let listener = UnixListener::bind(&path)?;
    let connected = UnixStream::connect(&path);
    std::fs::remove_file(&path)?;
    let server = Server::new(&pool, function, OwnedFd::from(listener))?;
    let mut ours = connected?;
    ours.set_read_timeout(Some(Duration::from_secs(5)))?;
    negotiate(&mut ours)?;
    let (mut bare, other) = UnixStream::pair()?;
    bare.set_read_timeout(Some(Duration::from_secs(5)))?;
    std::thread::spawn(move || pong(other));
    let (mut median, mut tail) = (Vec::new(), Vec::new());
    let (mut p50, mut p99) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for round in 0..rounds {
        let mut samples = [Vec::new(), Vec::new()];
        // In turn, so that neither always comes first.
        for which in [round % 2, 1 - round % 2] {
            let stream = if which == 0 { &mut ours } else { &mut bare };
            samples[which] = ping(stream, count)?;
        }
        for (which, samples) in samples.iter_mut().enumerate() {
            p50[which].push(f64::from(percentile(samples, 0.5)) / 1e3);
            p99[which].push(f64::from(percentile(samples, 0.99)) / 1e3);
        }
        median.push(p50[0][round] / p50[1][round]);
        tail.push(p99[0][round] / p99[1][round]);
    }
    println!("\nread of device_status through the I/O BAR of a legacy function, {count} accesses, {rounds} rounds");
    println!("  microseconds (medians)   p50     p99");
    for (which, name) in ["vfio-user", "bare ping-pong"].into_iter().enumerate() {
        let ((_, p50, _), (_, p99, _)) = (spread(p50[which].clone()), spread(p99[which].clone()));
        println!("  {name:21} {p50:6.2}  {p99:6.2}");
    }
    for (name, ratios) in [("p50", median), ("p99", tail)] {
        let (min, middle, max) = spread(ratios);
        println!("  ratio of {name}: min {min:.2}, median {middle:.2}, max {max:.2}");
    }
    let (sender, ended) = std::sync::mpsc::channel();
    server.close(Completion::call(move || {
        let _ = sender.send(());
    }));
    ended.recv_timeout(Duration::from_secs(5))?;
    Ok(())
}
