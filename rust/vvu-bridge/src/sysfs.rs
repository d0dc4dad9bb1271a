// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI function as Linux shows it: sysfs, and uio_pci_generic for interrupts.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::driver;
use crate::error::{Context, Error, Result};
use crate::interrupts::Line;
use crate::log;
use crate::options::{Address, Interrupts, Uuid, Which};
use crate::pci::{self, Layout, Place};
use crate::proxy::Window;
use crate::registers::{Registers, Structure};
use crate::sys::{lock_exclusively, make_character_device, Mmio};

const DEVICES: &str = "/sys/bus/pci/devices";
const DRIVERS: &str = "/sys/bus/pci/drivers";
const UIO: &str = "uio_pci_generic";
const VENDOR: u64 = 0x1af4;
/// 0x1040 + 32, virtio-vhost-user.
const DEVICE: u64 = 0x1060;

const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Message control of MSI-X.
/// Configuration space: the interrupt pin, 0 for none.
const INTERRUPT_PIN: u64 = 0x3d;
const MSIX_CONTROL: u64 = 2;
const MSIX_ENABLE: u16 = 1 << 15;
const RESOURCE_MEMORY: u64 = 0x200;
/// How long the kernel may take to bind a driver and to make its device node.
const PATIENCE: Duration = Duration::from_secs(5);

/// A virtio-vhost-user function that this process has for itself.
pub struct Function {
    address: String,
    directory: PathBuf,
    /// Configuration space; also holds the lock against a second bridge.
    config: File,
}

/// Its mapped registers.
pub struct Mapped {
    common: Mmio,
    notify: Mmio,
    isr: Mmio,
    device: Mmio,
    multiplier: u32,
}

impl Function {
    /// Finds the function and takes it from its driver.
    ///
    /// # Errors
    /// There is none, more than one, or another bridge has it.
    pub fn find(which: &Which) -> Result<Self> {
        let function = match which {
            Which::Address(Address(address)) => Self::open(address)?,
            Which::Only => match Self::candidates()?.as_slice() {
                [] => return Err(Error::Setup("no device 1af4:1060 on the PCI bus".into())),
                [address] => Self::open(address)?,
                several => {
                    let names = several.join(", ");
                    return Err(Error::Setup(format!(
                        "several devices, choose with --device or --uuid: {names}"
                    )));
                }
            },
            Which::Uuid(uuid) => Self::find_by_uuid(*uuid)?,
        };
        if !lock_exclusively(&function.config).context(|| format!("lock of {}", function.address))? {
            return Err(Error::Setup(format!(
                "device {} is used by another vvu-bridge",
                function.address
            )));
        }
        log::line(format_args!("device {}", function.address));
        Ok(function)
    }

    fn open(address: &str) -> Result<Self> {
        let directory = Path::new(DEVICES).join(address);
        let path = directory.join("config");
        let config = OpenOptions::new().read(true).write(true).open(&path);
        Ok(Self {
            address: address.to_owned(),
            config: config.context(|| format!("device {address}: {}", path.display()))?,
            directory,
        })
    }

    fn candidates() -> Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(DEVICES).context(|| DEVICES.into())? {
            let directory = entry.context(|| DEVICES.into())?.path();
            let is = |file: &str, wanted: u64| read_hex(&directory.join(file)).is_ok_and(|value| value == wanted);
            // Revision 0 is a transitional device: 1060 would be something else.
            if is("vendor", VENDOR) && is("device", DEVICE) && !is("revision", 0) {
                found.extend(directory.file_name().and_then(OsStr::to_str).map(str::to_owned));
            }
        }
        found.sort();
        Ok(found)
    }

    /// A uuid can be read while another driver has the device; only a device whose memory isn't decoded is enabled for it.
    fn find_by_uuid(uuid: Uuid) -> Result<Self> {
        let mut seen = Vec::new();
        for address in Self::candidates()? {
            let function = Self::open(&address)?;
            let found = function.enable_memory().and_then(|()| function.map());
            match found.map(|(registers, _)| Uuid(driver::uuid(&registers))) {
                Ok(found) if found == uuid => return Ok(function),
                Ok(found) => seen.push(format!("{address} is {found}")),
                Err(error) => seen.push(format!("{address}: {error}")),
            }
        }
        Err(Error::Setup(format!(
            "no device with uuid {uuid} ({})",
            seen.join(", ")
        )))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.file(name);
        fs::write(&path, text).context(|| format!("{} to {}", text.trim(), path.display()))
    }

    /// Name of the driver that has the function.
    fn driver(&self) -> Option<String> {
        let target = fs::read_link(self.file("driver")).ok()?;
        target.file_name().and_then(OsStr::to_str).map(str::to_owned)
    }

    fn unbind(&self) -> Result<()> {
        let Some(driver) = self.driver() else { return Ok(()) };
        self.write("driver/unbind", &self.address)?;
        log::line(format_args!("device {} taken from {driver}", self.address));
        Ok(())
    }

    fn read_config8(&self, offset: u64) -> Result<u8> {
        let mut bytes = [0];
        self.config
            .read_exact_at(&mut bytes, offset)
            .context(|| format!("config of {}", self.address))?;
        Ok(bytes[0])
    }

    fn read_config16(&self, offset: u64) -> Result<u16> {
        let mut value = [0; 2];
        self.config
            .read_exact_at(&mut value, offset)
            .context(|| format!("config of {}", self.address))?;
        Ok(u16::from_le_bytes(value))
    }

    fn write_config16(&self, offset: u64, value: u16) -> Result<()> {
        self.config
            .write_all_at(&value.to_le_bytes(), offset)
            .context(|| format!("config of {}", self.address))
    }

    fn change_command(&self, set: u16, clear: u16) -> Result<()> {
        let command = self.read_config16(COMMAND)?;
        self.write_config16(COMMAND, (command | set) & !clear)
    }

    fn enable_memory(&self) -> Result<()> {
        if self.driver().is_none() && read_hex(&self.file("enable")).is_ok_and(|count| count == 0) {
            // Also powers it up.
            self.write("enable", "1")?;
        }
        self.change_command(COMMAND_MEMORY, 0)
    }

    /// Lets the device read and write memory. After a reset: a bridge that was killed may have left buffers with it.
    ///
    /// # Errors
    /// Configuration space can't be written.
    pub fn enable_bus_master(&self) -> Result<()> {
        self.change_command(COMMAND_MEMORY | COMMAND_MASTER, 0)
    }

    /// Ends all that [`Function::enable_bus_master`] has allowed.
    ///
    /// # Errors
    /// Configuration space can't be written.
    pub fn disable_bus_master(&self) -> Result<()> {
        self.change_command(0, COMMAND_MASTER)
    }

    /// Takes the function from its driver, sets up interrupts, and enables its registers. None: polling.
    ///
    /// # Errors
    /// The function can't be had, or not with the interrupts asked for.
    pub fn take(&self, how: Interrupts) -> Result<Option<Uio<'_>>> {
        if self.driver().is_some_and(|driver| driver != UIO) {
            self.unbind()?;
        }
        let open = || match self.read_config8(INTERRUPT_PIN)? {
            // The kernel's driver would take it all the same, and never bring any.
            0 => Err(Error::Setup("the function has no interrupt pin".into())),
            _ => Uio::open(self),
        };
        let uio = match how {
            Interrupts::Poll => None,
            Interrupts::Intx => Some(open()?),
            Interrupts::Auto => match open() {
                Ok(uio) => Some(uio),
                Err(error) => {
                    log::line(format_args!("no intx: {error}"));
                    None
                }
            },
        };
        self.enable_memory()?;
        // A driver before us may have left MSI-X on, and then there are neither INTx nor ISR bits.
        let mut space = [0; 256];
        self.config
            .read_exact_at(&mut space, 0)
            .context(|| format!("config of {}", self.address))?;
        for (at, _) in pci::capabilities(&space)
            .into_iter()
            .filter(|&(_, id)| id == pci::CAP_MSIX)
        {
            let control = at as u64 + MSIX_CONTROL;
            let value = self.read_config16(control)?;
            self.write_config16(control, value & !MSIX_ENABLE)?;
        }
        if uio.is_none() {
            // Nobody would take the line back.
            self.change_command(COMMAND_INTX_DISABLE, 0)?;
        }
        log::line(format_args!(
            "interrupts: {}",
            if uio.is_some() { "intx" } else { "poll" }
        ));
        Ok(uio)
    }

    /// Finds and maps the structures.
    ///
    /// # Errors
    /// One is missing, or not where it could be.
    pub fn map(&self) -> Result<(Mapped, Layout)> {
        let mut space = [0; 256];
        self.config
            .read_exact_at(&mut space, 0)
            .context(|| format!("config of {}", self.address))?;
        let resources =
            fs::read_to_string(self.file("resource")).context(|| self.file("resource").display().to_string())?;
        let layout = pci::layout(&space, |bar| bar_length(&resources, bar))?;
        let map = |place: Place| {
            let path = self.file(&format!("resource{}", place.bar));
            let file = OpenOptions::new().read(true).write(true).open(&path);
            file.and_then(|file| Mmio::map(&file, place.offset, place.length))
                .context(|| format!("mapping {:#x} of {}", place.offset, path.display()))
        };
        let registers = Mapped {
            common: map(layout.common)?,
            notify: map(layout.notify)?,
            isr: map(layout.isr)?,
            device: map(layout.device)?,
            multiplier: layout.notify_multiplier,
        };
        Ok((registers, layout))
    }

    /// The file with the shared memory.
    ///
    /// On x86 the plain resource file: what it is mapped with (uncached) is overruled by the hypervisor's view of its own
    /// RAM. On aarch64 that would be device memory, which faults on the unaligned accesses of any memcpy.
    ///
    /// # Errors
    /// The file can't be opened.
    pub fn shared_memory(&self, layout: &Layout) -> Result<(File, Window)> {
        let plain = self.file(&format!("resource{}", layout.shared_memory.bar));
        let combining = self.file(&format!("resource{}_wc", layout.shared_memory.bar));
        let path = if cfg!(target_arch = "aarch64") && combining.exists() {
            combining
        } else {
            plain
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .context(|| path.display().to_string())?;
        log::line(format_args!(
            "shared memory: {} bytes at {:#x} of {}",
            layout.shared_memory.length,
            layout.shared_memory.offset,
            path.display()
        ));
        Ok((file, layout.window()))
    }
}

impl Registers for Mapped {
    fn read8(&self, structure: Structure, offset: usize) -> u8 {
        self.of(structure).read8(offset)
    }

    fn read16(&self, structure: Structure, offset: usize) -> u16 {
        self.of(structure).read16(offset)
    }

    fn read32(&self, structure: Structure, offset: usize) -> u32 {
        self.of(structure).read32(offset)
    }

    fn write8(&self, structure: Structure, offset: usize, value: u8) {
        self.of(structure).write8(offset, value);
    }

    fn write16(&self, structure: Structure, offset: usize, value: u16) {
        self.of(structure).write16(offset, value);
    }

    fn write32(&self, structure: Structure, offset: usize, value: u32) {
        self.of(structure).write32(offset, value);
    }

    fn notify_length(&self) -> u64 {
        self.notify.length() as u64
    }

    fn notify_multiplier(&self) -> u32 {
        self.multiplier
    }
}

impl Mapped {
    fn of(&self, structure: Structure) -> &Mmio {
        match structure {
            Structure::Common => &self.common,
            Structure::Notify => &self.notify,
            Structure::Isr => &self.isr,
            Structure::Device => &self.device,
        }
    }
}

/// INTx by uio_pci_generic: the kernel masks the line when it fires, by the function's own bit.
pub struct Uio<'a> {
    function: &'a Function,
    file: File,
}

impl<'a> Uio<'a> {
    fn open(function: &'a Function) -> Result<Self> {
        let driver = Path::new(DRIVERS).join(UIO);
        if !driver.exists() {
            // In machines without modprobe somebody else has to load it.
            let _ = Command::new("modprobe")
                .arg(UIO)
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
        if !driver.exists() {
            return Err(Error::Setup(format!("the kernel module {UIO} is not loaded")));
        }
        if function.driver().is_none() {
            function.write("driver_override", UIO)?;
            let bound = fs::write(driver.join("bind"), &function.address)
                .context(|| format!("binding {} to {UIO}", function.address));
            // Left set it would keep virtio-pci away when the device is to be had again.
            function.write("driver_override", "\n")?;
            bound?;
        }
        let path = Self::node(function)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .context(|| path.display().to_string())?;
        // EIO: the function has no interrupt line.
        match (&file).read(&mut [0; 4]) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                return Err(Error::Io(format!("{}: no interrupt line", path.display()), error))
            }
            _ => {}
        }
        Ok(Self { function, file })
    }

    /// The device node, made here when nobody else does.
    fn node(function: &Function) -> Result<PathBuf> {
        let directory = function.file("uio");
        let start = Instant::now();
        let name = loop {
            let entry = fs::read_dir(&directory)
                .ok()
                .and_then(|mut entries| entries.next()?.ok());
            match entry {
                Some(entry) => break entry.file_name(),
                None if start.elapsed() > PATIENCE => {
                    return Err(Error::Setup(format!(
                        "{UIO} makes no device in {}",
                        directory.display()
                    )))
                }
                None => sleep(Duration::from_millis(10)),
            }
        };
        let path = Path::new("/dev").join(&name);
        if !path.exists() {
            let numbers = directory.join(&name).join("dev");
            let text = fs::read_to_string(&numbers).context(|| numbers.display().to_string())?;
            let pair = text
                .trim()
                .split_once(':')
                .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
            let (major, minor) = pair.ok_or_else(|| Error::Setup(format!("{}: {text}", numbers.display())))?;
            make_character_device(&path, major, minor).context(|| path.display().to_string())?;
        }
        Ok(path)
    }
}

impl Line for Uio<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn take(&self) -> Result<()> {
        match (&self.file).read(&mut [0; 4]) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(Error::Io("uio".into(), error)),
            _ => Ok(()),
        }
    }

    fn rearm(&self) -> Result<()> {
        self.function.change_command(0, COMMAND_INTX_DISABLE)
    }
}

fn read_hex(path: &Path) -> Result<u64> {
    let text = fs::read_to_string(path).context(|| path.display().to_string())?;
    let text = text.trim();
    u64::from_str_radix(text.trim_start_matches("0x"), 16)
        .map_err(|_| Error::Setup(format!("{}: {text}", path.display())))
}

/// Size of a memory BAR by the file `resource`: a line "start end flags" for each.
fn bar_length(resources: &str, bar: u8) -> Option<u64> {
    let line = resources.lines().nth(bar.into())?;
    let mut numbers = line
        .split_whitespace()
        .map(|text| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok());
    let (start, end, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
    if flags & RESOURCE_MEMORY == 0 {
        return None;
    }
    end.checked_sub(start)?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_measured_by_the_resource_file() {
        let text = "0x00000000febd4000 0x00000000febd4fff 0x0000000000040200\n\
                    0x000000000000c000 0x000000000000c07f 0x0000000000040101\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000000800000000 0x00000008ffffffff 0x000000000014220c\n";
        assert_eq!(bar_length(text, 0), Some(0x1000));
        assert_eq!(bar_length(text, 1), None, "I/O ports");
        assert_eq!(bar_length(text, 2), None, "not there");
        assert_eq!(bar_length(text, 3), Some(1 << 32));
        assert_eq!(bar_length(text, 4), None, "no line");
        assert_eq!(bar_length("x y z\n", 0), None, "no numbers");
    }
}
