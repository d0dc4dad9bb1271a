// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// What `--help` prints.
pub const HELP: &str = "\
Usage: vvu-bridge --socket PATH [OPTIONS]

Connects a virtio-vhost-user device of this machine to the vhost-user daemon that listens on PATH.

  --socket PATH         the daemon's UNIX socket; waited for when it isn't there
  --device ADDRESS      PCI function, as 0000:00:05.0 or 00:05.0 (default: the only one there is)
  --uuid UUID           the device with this uuid
  --interrupts HOW      auto (default), intx: by uio_pci_generic, poll
  --poll-us MICROSECONDS
                        longest pause when polling, 1 to 1000000 (default 1000)
  --wait SECONDS        give up when the daemon isn't there for so long (default: wait for ever)
  --once                end after the first session with a master
  --help, --version
";

/// Longest pause that can be asked for.
const MAX_POLL_US: u64 = 1_000_000;

/// A uuid as it is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Uuid {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let digits: Vec<u8> = text.bytes().filter(|&byte| byte != b'-').collect();
        let mut uuid = [0; 16];
        if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(());
        }
        for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| ())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| ())?;
        }
        Ok(Self(uuid))
    }
}

/// A PCI address with its domain, as sysfs spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(pub String);

impl FromStr for Address {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (rest, function) = text.rsplit_once('.').ok_or(())?;
        let mut parts: Vec<&str> = rest.split(':').collect();
        if parts.len() == 2 {
            parts.insert(0, "0");
        }
        let &[domain, bus, device] = parts.as_slice() else {
            return Err(());
        };
        let number = |text: &str, limit: u32| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            u32::from_str_radix(text, 16)
                .ok()
                .filter(|&number| digits && number <= limit)
                .ok_or(())
        };
        Ok(Self(format!(
            "{:04x}:{:02x}:{:02x}.{}",
            // Domains of some hypervisors have more digits.
            number(domain, u32::MAX)?,
            number(bus, 0xff)?,
            number(device, 0x1f)?,
            number(function, 7)?
        )))
    }
}

/// Which device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// The only one.
    Only,
    /// By PCI address.
    Address(Address),
    /// By uuid.
    Uuid(Uuid),
}

/// How the device's interrupts are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// INTx when possible, or else polling.
    Auto,
    /// INTx, or nothing.
    Intx,
    /// Polling.
    Poll,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// The device.
    pub which: Which,
    /// Its interrupts.
    pub interrupts: Interrupts,
    /// Longest pause when polling.
    pub poll: Duration,
    /// How long to wait for the daemon.
    pub wait: Option<Duration>,
    /// One session only.
    pub once: bool,
}

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve.
    Run(Options),
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
}

/// Reads the arguments after the program's name. Values may follow as the next argument or after `=`.
///
/// # Errors
/// What is wrong with them.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut arguments = arguments.into_iter();
    let mut socket = None;
    let mut options = Options {
        socket: PathBuf::new(),
        which: Which::Only,
        interrupts: Interrupts::Auto,
        poll: Duration::from_millis(1),
        wait: None,
        once: false,
    };
    while let Some(argument) = arguments.next() {
        let text = argument
            .to_str()
            .ok_or_else(|| format!("unknown argument {}", argument.display()))?;
        let (name, inline) = match text.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (text, None),
        };
        let flag = matches!(name, "--once" | "--help" | "-h" | "--version");
        if flag && inline.is_some() {
            return Err(format!("{name} has no value"));
        }
        match name {
            "--once" => options.once = true,
            "--help" | "-h" => return Ok(Command::Help),
            "--version" => return Ok(Command::Version),
            "--socket" | "--device" | "--uuid" | "--interrupts" | "--poll-us" | "--wait" => {
                let value = inline
                    .or_else(|| arguments.next())
                    .ok_or_else(|| format!("{name} needs a value"))?;
                if name == "--socket" {
                    socket = Some(PathBuf::from(value));
                    continue;
                }
                let value = value.to_str().ok_or_else(|| format!("{name}: not text"))?;
                set(&mut options, name, value).ok_or_else(|| format!("{name}: {value} is not possible"))?;
            }
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    options.socket = socket
        .filter(|path| !path.as_os_str().is_empty())
        .ok_or("--socket is needed")?;
    Ok(Command::Run(options))
}

fn set(options: &mut Options, name: &str, value: &str) -> Option<()> {
    match name {
        "--device" => options.which = Which::Address(value.parse().ok()?),
        "--uuid" => options.which = Which::Uuid(value.parse().ok()?),
        "--interrupts" => {
            options.interrupts = match value {
                "auto" => Interrupts::Auto,
                "intx" => Interrupts::Intx,
                "poll" => Interrupts::Poll,
                _ => return None,
            }
        }
        "--poll-us" => {
            let pause = value.parse().ok().filter(|pause| (1..=MAX_POLL_US).contains(pause))?;
            options.poll = Duration::from_micros(pause);
        }
        "--wait" => options.wait = Some(Duration::try_from_secs_f64(value.parse().ok()?).ok()?),
        _ => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    fn options(line: &str) -> Options {
        match parsed(line) {
            Ok(Command::Run(options)) => options,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn defaults() {
        let options = options("--socket /run/s");
        assert_eq!(options.socket, PathBuf::from("/run/s"));
        assert_eq!(options.which, Which::Only);
        assert_eq!(options.interrupts, Interrupts::Auto);
        assert_eq!(options.poll, Duration::from_micros(1000));
        assert_eq!((options.wait, options.once), (None, false));
    }

    #[test]
    fn all_options_with_both_kinds_of_values() {
        let options = options("--socket=/s --device 1:0a.3 --interrupts=poll --poll-us 50 --wait 1.5 --once");
        assert_eq!(options.which, Which::Address(Address("0000:01:0a.3".into())));
        assert_eq!(options.interrupts, Interrupts::Poll);
        assert_eq!(options.poll, Duration::from_micros(50));
        assert_eq!((options.wait, options.once), (Some(Duration::from_millis(1500)), true));
    }

    #[test]
    fn a_uuid_is_read_and_printed_the_same() {
        let text = "01234567-89ab-cdef-0123-456789abcdef";
        let Which::Uuid(uuid) = options(&format!("--socket s --uuid {text}")).which else {
            panic!("no uuid")
        };
        assert_eq!(uuid.0[..4], [1, 0x23, 0x45, 0x67]);
        assert_eq!(uuid.to_string(), text);
    }

    #[test]
    fn wrong_command_lines_are_refused_by_name() {
        for (line, reason) in [
            ("", "--socket is needed"),
            ("--socket=", "--socket is needed"),
            ("--socket", "--socket needs a value"),
            ("--socket s --once=1", "--once has no value"),
            ("--socket s --frob", "unknown argument --frob"),
            ("--socket s --device ../..", "--device: ../.. is not possible"),
            ("--socket s --device 0:+1:2.0", "--device: 0:+1:2.0 is not possible"),
            ("--socket s --device 0:0:20.0", "--device: 0:0:20.0 is not possible"),
            ("--socket s --uuid 0123", "--uuid: 0123 is not possible"),
            ("--socket s --interrupts msi", "--interrupts: msi is not possible"),
            ("--socket s --poll-us 0", "--poll-us: 0 is not possible"),
            ("--socket s --poll-us 1000001", "--poll-us: 1000001 is not possible"),
            ("--socket s --wait -1", "--wait: -1 is not possible"),
            ("--socket s --wait nan", "--wait: nan is not possible"),
        ] {
            assert_eq!(parsed(line), Err(reason.to_owned()), "{line}");
        }
    }
}
