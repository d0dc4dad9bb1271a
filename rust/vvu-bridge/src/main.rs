// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `vvu-bridge`: see [`vvu_bridge`].

#![deny(unsafe_code)]

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use vvu_bridge::bridge::{self, Resources, Settings};
use vvu_bridge::driver;
use vvu_bridge::error::{Context, Result};
use vvu_bridge::interrupts::Line;
use vvu_bridge::log;
use vvu_bridge::memory::Dma;
use vvu_bridge::options::{self, Command, Options};
use vvu_bridge::sys;
use vvu_bridge::sysfs::Function;

fn main() -> ExitCode {
    let options = match options::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(options)) => options,
        Ok(Command::Help) => {
            print!("{}", options::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Command::Version) => {
            println!("vvu-bridge {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Err(reason) => {
            log::line(format_args!("{reason} (see --help)"));
            return ExitCode::from(2);
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::line(format_args!("failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let stop = sys::block_signals().context(|| "signals".into())?;
    let function = Function::find(&options.which)?;
    let uio = function.take(options.interrupts)?;
    let (registers, layout) = function.map()?;
    let (file, window) = function.shared_memory(&layout)?;
    let memory = Arc::new(Dma::allocate(driver::DMA_LENGTH)?);
    driver::reset(&registers)?;
    function.enable_bus_master()?;
    let resources = Resources {
        registers: &registers,
        memory,
        file: file.as_fd(),
        window,
        line: uio.as_ref().map(|uio| uio as &dyn Line),
        stop: stop.as_fd(),
    };
    let settings = Settings {
        socket: options.socket.clone(),
        wait: options.wait,
        once: options.once,
        poll: options.poll,
    };
    let served = bridge::run(&resources, &settings);
    let ended = function.disable_bus_master();
    log::line("stopped");
    served.and(ended)
}
