// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vhu-bench-vvu`: both neighbours of a virtio-vhost-user device, without virtual machines.
//!
//! `latency` is the backend VM (its VMM and its driver, on either carrier) and the master in one, and times notifications
//! through the device against bare eventfds. `backend` is a backend VM whose driver hands everything to a vhost-user daemon on
//! the host, for a master that is timed elsewhere. benches/README.md says what is measured.

mod backend_vm;
mod latency;
mod pci_client;
// Shared with vhu-bench, which uses all of them.
#[allow(dead_code)]
mod ram;
mod vring;
#[allow(dead_code)]
mod wire;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use latency::{Carrier, Plan};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

const USAGE: &str = "usage: vhu-bench-vvu latency --carrier vhost-user|vfio-user --device PATH --front PATH
           [--rounds N] [--count N] [--cpus NEAR,FAR] [--blocking]
       vhu-bench-vvu backend --device PATH --daemon PATH";

enum Task {
    Latency(Plan),
    Backend { device: PathBuf, daemon: PathBuf },
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Task, String> {
    let task = args.next().ok_or("what to do is missing")?;
    let (mut device, mut front, mut daemon, mut carrier, mut cpus) = (None, None, None, None, None);
    let (mut rounds, mut count) = (5, 5000);
    let mut flags = EFD_NONBLOCK;
    while let Some(option) = args.next() {
        if option == "--blocking" {
            flags = 0;
            continue;
        }
        let value = args.next().ok_or_else(|| format!("{option} needs a value"))?;
        let wrong = || format!("{option} {value}: not understood");
        match option.as_str() {
            "--device" => device = Some(PathBuf::from(value)),
            "--front" => front = Some(PathBuf::from(value)),
            "--daemon" => daemon = Some(PathBuf::from(value)),
            "--carrier" => {
                carrier = Some(match value.as_str() {
                    "vhost-user" => Carrier::VhostUser,
                    "vfio-user" => Carrier::VfioUser,
                    _ => return Err(wrong()),
                });
            }
            "--rounds" => rounds = value.parse().map_err(|_| wrong())?,
            "--count" => count = value.parse().map_err(|_| wrong())?,
            "--cpus" => {
                let (near, far) = value.split_once(',').ok_or_else(wrong)?;
                cpus = Some((near.parse().map_err(|_| wrong())?, far.parse().map_err(|_| wrong())?));
            }
            _ => return Err(format!("unknown option {option}")),
        }
    }
    let device = device.ok_or("--device is missing")?;
    match task.as_str() {
        "latency" => {
            if !(1..=1000).contains(&rounds) || !(1..=10_000_000).contains(&count) {
                return Err("--rounds is 1 to 1000, --count 1 to 10000000".into());
            }
            Ok(Task::Latency(Plan {
                carrier: carrier.ok_or("--carrier is missing")?,
                device,
                front: front.ok_or("--front is missing")?,
                rounds,
                count,
                flags,
                cpus,
            }))
        }
        "backend" => Ok(Task::Backend {
            device,
            daemon: daemon.ok_or("--daemon is missing")?,
        }),
        other => Err(format!("{other}: latency or backend")),
    }
}

/// Ends the process when the other side doesn't answer any more: a lost notification leaves a read that never returns.
pub(crate) fn watch(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!("vhu-bench-vvu: no end after {} s", limit.as_secs());
        std::process::exit(3);
    });
}

fn main() -> ExitCode {
    let task = match parse(std::env::args().skip(1)) {
        Ok(task) => task,
        Err(reason) => {
            eprintln!("vhu-bench-vvu: {reason}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let done = match &task {
        Task::Latency(plan) => latency::run(plan),
        Task::Backend { device, daemon } => backend_vm::serve(device, daemon),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhu-bench-vvu: {error}");
            ExitCode::FAILURE
        }
    }
}
