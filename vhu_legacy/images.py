# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Guest kernels, their initramfs and other QEMU versions, kept in a cache outside the source tree.

Everything comes from the Debian mirror this machine's own apt is set up with, fetched by apt itself through
a private root in the cache: apt verifies the signed Release files and the hash of every package, resumes
what was interrupted and computes the packages a QEMU of another suite needs. Nothing is installed and no
privilege is needed.

Layout of the cache (``$VHU_LEGACY_CACHE``, else ``$XDG_CACHE_HOME/vhu-legacy``, else
``~/.cache/vhu-legacy``)::

    lock                      held (flock) by the one process that changes the cache
    apt/                      private apt root: lists, package archive, source lists, keyring
    kernels/6.12/             vmlinuz, initramfs.img, stamp.json
    qemu/11.1/                root/ (unpacked packages), stamp.json
    daemons/trixie/           initramfs.img (vhost-user daemons, to be laid over a kernel's), stamp.json

An artifact is built in a scratch directory beside its place and renamed into it; ``stamp.json`` records what
it was built from and the SHA-256 of each file, so an interrupted build leaves nothing and a damaged file
leads to a rebuild.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio
from rich.progress import Progress, TaskID

from . import initramfs
from .errors import ImagesError
from .running import run

KERNELS = ("5.10", "6.1", "6.12", "7.2")
QEMUS = ("7.2", "11.1")
FETCHABLE_QEMUS = ("7.2", "10.0", "11.1")
DAEMONS = ("trixie",)
"""Releases whose qemu-storage-daemon and virtiofsd a guest can have."""

# Bump to rebuild every artifact when the way of building them changes.
_FORMAT = 2
_IMAGES_DIR = Path(__file__).resolve().parent.parent / "images"
_APT_TIMEOUT = 1800.0
_TOOL_TIMEOUT = 120.0


@dataclass(frozen=True)
class GuestKernel:
    """One bootable guest: what QEMU's ``-kernel`` and ``-initrd`` take, and the kernel's release string."""

    vmlinuz: Path
    initramfs: Path
    release: str


@dataclass(frozen=True)
class QemuCommand:
    """How to start one QEMU: the leading arguments, additions to the environment, and its version
    (``"11.1.3"``).
    """

    argv: list[str]
    env: dict[str, str]
    version: str

    @property
    def series(self) -> tuple[int, int]:
        """Major and minor version, for choices that depend on it."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


@dataclass(frozen=True)
class ImageStatus:
    """State of one artifact: ``state`` is ``ready``, ``missing``, ``stale`` (inputs changed), ``damaged`` or
    ``system``.
    """

    kind: str
    name: str
    state: str
    version: str | None
    size: int | None
    path: Path | None


@dataclass(frozen=True)
class _SuiteSet:
    """Suites that are looked at together; packages of ``target`` are preferred (needed for backports)."""

    target: str
    suites: tuple[str, ...]

    @property
    def key(self) -> str:
        return "+".join(self.suites) or self.target


def _release(codename: str) -> tuple[str, ...]:
    return (codename, f"{codename}-updates", f"{codename}-security")


_TRIXIE_BACKPORTS = _SuiteSet("trixie-backports", (*_release("trixie"), "trixie-backports"))

# Tried in order; the newest package of the first set that has the series is taken.
_KERNEL_SUITES: Mapping[str, tuple[_SuiteSet, ...]] = {
    "5.10": (_SuiteSet("bullseye", _release("bullseye")),),
    "6.1": (_SuiteSet("bookworm", _release("bookworm")),),
    "6.12": (
        _SuiteSet("trixie", _release("trixie")),
        _SuiteSet("bookworm-backports", ("bookworm-backports",)),
    ),
    "7.2": (
        _SuiteSet("trixie-backports", ("trixie-backports",)),
        _SuiteSet("forky", ("forky",)),
        _SuiteSet("sid", ("sid",)),
    ),
}
_QEMU_SUITES: Mapping[str, tuple[_SuiteSet, ...]] = {
    "7.2": (_SuiteSet("bookworm", _release("bookworm")),),
    "10.0": (
        _SuiteSet("trixie", _release("trixie")),
        _SuiteSet("bookworm-backports", (*_release("bookworm"), "bookworm-backports")),
    ),
    "11.1": (_TRIXIE_BACKPORTS, _SuiteSet("forky", ("forky",)), _SuiteSet("sid", ("sid",))),
}

_DAEMON_SUITES: Mapping[str, _SuiteSet] = {"trixie": _SuiteSet("trixie", _release("trixie"))}
_DAEMON_PACKAGES = ("qemu-utils", "virtiofsd")

# Directories of an unpacked QEMU root that no emulator reads; dropping them keeps the cache small and its
# check quick.
_QEMU_PRUNE = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/share/perl5",
    "usr/share/perl",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "var",
)


def cache_dir() -> Path:
    """The cache directory (not necessarily existing yet)."""
    if explicit := os.environ.get("VHU_LEGACY_CACHE"):
        return Path(explicit).absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "vhu-legacy"
    return Path.home() / ".cache" / "vhu-legacy"


# --- what the machine's apt is set up with -----------------------------------------------------------------

_SUITE = re.compile(
    r"^(?P<name>[a-z]+)(?P<pocket>-updates|-backports|-backports-sloppy|-proposed-updates|-security|/updates)?$"
)
_SUITE_NAMES = {"buster", "bullseye", "bookworm", "trixie", "forky", "duke", "sid"} | {
    "stable",
    "oldstable",
    "oldoldstable",
    "testing",
    "unstable",
}


@dataclass(frozen=True)
class AptSource:
    """One ``deb`` entry of the machine's configuration, reduced to what matters for deriving others."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str | None

    @property
    def is_security(self) -> bool:
        """Whether the entry names a security suite (which many mirrors keep under another address)."""
        return self.suite.endswith(("-security", "/updates"))


def parse_one_line(text: str) -> Iterator[AptSource]:
    """Entries of a ``sources.list`` text; comments, ``deb-src`` and malformed lines are passed over."""
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        match = re.match(r"^deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<rest>\S.*)$", line)
        if match is None:
            continue
        options = dict(item.split("=", 1) for item in (match["options"] or "").split() if "=" in item)
        words = match["rest"].split()
        if len(words) >= 3:
            yield AptSource(words[0], words[1], tuple(words[2:]), options.get("signed-by"))


def parse_deb822(text: str) -> Iterator[AptSource]:
    """Entries of a ``.sources`` text (one per URI and suite); disabled stanzas and ``deb-src`` are passed
    over.
    """
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line.lstrip().startswith("#"):
                continue
            if line[:1] in (" ", "\t") and key:
                fields[key] += "\n" + line.strip()
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in (
            "no",
            "false",
        ):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield AptSource(uri, suite, tuple(fields.get("components", "").split()), fields.get("signed-by"))


def debian_sources(entries: Iterable[AptSource]) -> list[AptSource]:
    """The entries that are the Debian archive itself: a suite of Debian's, component main, no foreign key.

    Another vendor's repository may use the same suite names; if one slips through, apt refuses it later
    because the archive's keys did not sign it.
    """
    found = []
    for entry in entries:
        match = _SUITE.match(entry.suite)
        foreign_key = entry.signed_by is not None and not (
            "debian-archive" in entry.signed_by or "BEGIN PGP" in entry.signed_by
        )
        if match is not None and match["name"] in _SUITE_NAMES and "main" in entry.components and not foreign_key:
            found.append(entry)
    return found


def machine_sources() -> list[AptSource]:
    """The Debian archive entries of this machine's apt configuration.

    Raises :class:`ImagesError` when apt is missing or names no Debian archive.
    """
    try:
        shell = subprocess.run(
            ["apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"],
            capture_output=True,
            text=True,
            timeout=_TOOL_TIMEOUT,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ImagesError(
            f"cannot ask apt for its configuration ({error}); guest images need a Debian machine"
        ) from error
    names = dict(re.findall(r"^(LIST|PARTS)='([^']*)'$", shell, flags=re.MULTILINE))
    entries: list[AptSource] = []
    files = [Path(names.get("LIST", "/etc/apt/sources.list"))]
    parts = Path(names.get("PARTS", "/etc/apt/sources.list.d"))
    if parts.is_dir():
        files += sorted(parts.iterdir())
    for file in files:
        if not file.is_file():
            continue
        text = file.read_text(errors="replace")
        if file.suffix == ".sources":
            entries += parse_deb822(text)
        elif file.suffix == ".list":
            entries += parse_one_line(text)
    sources = debian_sources(entries)
    if not sources:
        raise ImagesError(f"no Debian archive among apt's sources ({', '.join(map(str, files))})")
    return sources


# --- progress ----------------------------------------------------------------------------------------------


class _Report:
    """Progress to a terminal through rich, otherwise one plain line per step on stderr."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress if progress is not None and progress.console.is_terminal else None
        self._task: TaskID | None = None
        self._title = ""

    def start(self, title: str) -> None:
        self._title = title
        if self._progress is not None:
            self._task = self._progress.add_task(title, total=None)

    def step(self, text: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"{self._title}: {text}", total=None, completed=0)
        else:
            print(f"images: {self._title}: {text}", file=sys.stderr, flush=True)

    def percent(self, value: float) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=100, completed=value)

    def done(self, text: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"{self._title}: {text}", total=100, completed=100)
        else:
            print(f"images: {self._title}: {text}", file=sys.stderr, flush=True)
        self._task = None


# --- subprocesses ------------------------------------------------------------------------------------------


async def _run(
    argv: Sequence[str | Path],
    *,
    timeout: float = _TOOL_TIMEOUT,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
) -> tuple[int, str]:
    """Run a program to its end; its output and errors as one text.

    Bounded by `timeout`; on that and on cancellation the program is killed and reaped. A failure is an
    :class:`ImagesError` with the last lines it printed, unless `check` is false.
    """
    words = [str(word) for word in argv]
    with trio.move_on_after(timeout) as scope:
        try:
            result = await trio.run_process(
                words,
                stdin=stdin if stdin is not None else b"",
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
                cwd=cwd,
                start_new_session=True,
                deliver_cancel=_end_process_group,
                env={**os.environ, "LC_ALL": "C", **(env or {})},
            )
        except OSError as error:
            raise ImagesError(f"cannot run {words[0]}: {error}") from error
    if scope.cancelled_caught:
        raise ImagesError(f"{words[0]} did not finish in {timeout:.0f} s")
    text = result.stdout.decode(errors="replace")
    if check and result.returncode != 0:
        tail = "\n".join(text.strip().splitlines()[-12:])
        raise ImagesError(f"{' '.join(words[:2])} failed with exit status {result.returncode}:\n{tail}")
    return result.returncode, text


async def _end_process_group(process: trio.Process) -> None:
    """End a program and its helpers: told to, apt's download methods leave partial files that can be resumed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with trio.move_on_after(5) as scope:
            await process.wait()
        if not scope.cancelled_caught:
            return


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the private apt root ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Package:
    """A package file as apt names it in its archive directory."""

    file: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.file.split("_", 1)[0]


class AptRoot:
    """A private apt in `directory`: own lists, archive, empty package status; the machine's mirror and proxy
    settings.

    Signatures are always verified, against the machine's Debian archive keyring; where that one is too old
    for a newer suite, against the newest ``debian-archive-keyring`` package of the suites the machine
    already trusts.
    """

    def __init__(
        self,
        directory: Path,
        *,
        sources: Sequence[AptSource] | None = None,
        keyring: Path | None = None,
    ) -> None:
        self._dir = directory
        self._sources = list(sources) if sources is not None else machine_sources()
        self._keyrings = [keyring if keyring is not None else _archive_keyring()]
        own = directory / "keyring" / "debian-archive-keyring.gpg"
        if own.is_file():
            self._keyrings.append(own)
        self._updated: dict[str, str] = {}
        for part in ("lists/partial", "archives/partial", "sources"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        (directory / "status").touch()
        self._conf = directory / "apt.conf"
        _write_atomically(self._conf, self._configuration().encode())

    @property
    def archives(self) -> Path:
        """Where downloaded packages are."""
        return self._dir / "archives"

    def _configuration(self) -> str:
        # The machine's own configuration (proxies, timeouts) is read before this file. Its hooks are
        # cleared: they tidy up the system's archive, which is none of our business. Pins and further sources
        # must not leak in either.
        user = _user_name()
        settings = {
            "Dir::State": self._dir,
            "Dir::State::lists": self._dir / "lists",
            "Dir::State::status": self._dir / "status",
            "Dir::State::extended_states": self._dir / "extended_states",
            "Dir::Cache": self._dir,
            "Dir::Cache::archives": self._dir / "archives",
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::Log": self._dir / "log",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": user,
            "APT::Install-Recommends": "false",
            "APT::Keep-Downloaded-Packages": "true",
            "APT::Get::AllowUnauthenticated": "false",
            "APT::Get::List-Cleanup": "false",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::AllowWeakRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false",
            # Locks of the cache as a whole are taken by the caller.
            "Debug::NoLocking": "true",
        }
        clear = ["APT::Update::Pre-Invoke", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success"]
        clear += ["DPkg::Pre-Invoke", "DPkg::Post-Invoke", "DPkg::Pre-Install-Pkgs", "APT::Architectures"]
        clear += ["APT::Default-Release", "Acquire::Languages"]
        lines = [f"#clear {name};" for name in clear]
        lines += [f'{name} "{value}";' for name, value in settings.items()]
        return "\n".join(lines) + "\n"

    def _source_list(self, suites: _SuiteSet, only: Sequence[AptSource] | None = None) -> str:
        signed = ",".join(str(path) for path in self._keyrings)
        archive = list(dict.fromkeys(entry.uri for entry in self._sources if not entry.is_security))
        security = list(dict.fromkeys(entry.uri for entry in self._sources if entry.is_security))
        lines = []
        if only is not None:
            lines = [f"deb [signed-by={signed}] {entry.uri} {entry.suite} main" for entry in only]
        else:
            for suite in suites.suites:
                uris = security if suite.endswith("-security") else archive
                lines += [f"deb [signed-by={signed}] {uri} {suite} main" for uri in uris]
        return "\n".join(lines) + "\n"

    def _apt(self, program: str, suites: _SuiteSet) -> list[str]:
        argv = [program, "-c", str(self._conf), "-o", f"Dir::Etc::sourcelist={self._list_file(suites)}"]
        if suites.target.endswith("-backports"):
            argv += ["-o", f"APT::Default-Release={suites.target}"]
        return argv

    def _list_file(self, suites: _SuiteSet) -> Path:
        return self._dir / "sources" / f"{suites.key}.list"

    async def update(self, suites: _SuiteSet, report: _Report) -> str:
        """Fetch the suites' indexes once per process; what apt complained about (empty when nothing).

        A suite the mirror lacks is no error here: whoever looks for a package and does not find it tells so.
        """
        if suites.key in self._updated:
            return self._updated[suites.key]
        report.step(f"package lists of {suites.target}")
        problems = await self._update(suites)
        if _missing_key(problems) and not (self._dir / "keyring" / "debian-archive-keyring.gpg").is_file():
            await self._fetch_keyring(report)
            problems = await self._update(suites)
        self._updated[suites.key] = problems
        return problems

    async def _update(self, suites: _SuiteSet, only: Sequence[AptSource] | None = None) -> str:
        _write_atomically(self._list_file(suites), self._source_list(suites, only).encode())
        _, text = await _run([*self._apt("apt-get", suites), "-q", "update"], timeout=_APT_TIMEOUT, check=False)
        return "\n".join(
            line for line in text.splitlines() if line.startswith(("E:", "W:", "Err:")) or "NO_PUBKEY" in line
        )

    async def _fetch_keyring(self, report: _Report) -> None:
        """The newest archive keyring of the suites this machine trusts already: that is how Debian hands on
        its keys.
        """
        report.step("the archive's newer signing keys")
        suites = _SuiteSet("machine", ())
        problems = await self._update(suites, self._sources)
        versions = await self.versions(["debian-archive-keyring"], suites)
        if not versions:
            raise ImagesError(f"no debian-archive-keyring in this machine's own suites\n{problems}")
        name, version = versions[-1]
        files = await self.download([f"{name}={version}"], suites, report)
        with _scratch(self._dir / "keyring") as scratch:
            for file in files:
                await _run(["dpkg-deb", "-x", file, scratch / "root"])
            found = sorted((scratch / "root").rglob("debian-archive-keyring.[gp]*p*"))
            binary = [path.resolve() for path in found if path.suffix in (".gpg", ".pgp")]
            if not binary:
                raise ImagesError(f"{name} {version} holds no archive keyring")
            target = self._dir / "keyring"
            target.mkdir(exist_ok=True)
            _write_atomically(target / "debian-archive-keyring.gpg", binary[0].read_bytes())
        self._keyrings.append(target / "debian-archive-keyring.gpg")

    async def versions(self, packages: Sequence[str], suites: _SuiteSet) -> list[tuple[str, str]]:
        """(package, version) pairs available in the suites, oldest version first."""
        if not packages:
            return []
        _, text = await _run([*self._apt("apt-cache", suites), "madison", *packages])
        pairs = set()
        for line in text.splitlines():
            fields = [field.strip() for field in line.split("|")]
            if len(fields) == 3 and "Packages" in fields[2]:
                pairs.add((fields[0], fields[1]))
        return await trio.to_thread.run_sync(_oldest_first, pairs)

    async def names(self, prefix: str, suites: _SuiteSet) -> list[str]:
        """Names of packages in the suites that start with `prefix`."""
        _, text = await _run([*self._apt("apt-cache", suites), "pkgnames", prefix])
        return sorted(text.split())

    async def depends(self, package: str, version: str, suites: _SuiteSet) -> str:
        """The Depends field of one package version."""
        _, text = await _run([*self._apt("apt-cache", suites), "show", f"{package}={version}"])
        match = re.search(r"^Depends:\s*(.*)$", text, flags=re.MULTILINE)
        return match[1] if match else ""

    async def closure(self, package: str, version: str, suites: _SuiteSet) -> list[str]:
        """``name=version`` of a package and everything it depends on, as if nothing were installed."""
        command = [*self._apt("apt-get", suites), "-q", "-y", "--no-install-recommends", "--simulate"]
        _, text = await _run([*command, "install", f"{package}={version}"])
        return [f"{match[1]}={match[2]}" for match in re.finditer(r"^Inst (\S+) \((\S+) ", text, flags=re.MULTILINE)]

    async def download(self, packages: Sequence[str], suites: _SuiteSet, report: _Report) -> list[Path]:
        """Download exactly these ``name=version`` packages; their files, each with the SHA-256 of the signed
        lists.
        """
        archives = self._dir / "archives"
        command = [*self._apt("apt-get", suites), "-q"]
        _, text = await _run([*command, "--print-uris", "download", *packages])
        wanted = _parse_uris(text)
        if len(wanted) != len(packages):
            raise ImagesError(
                f"apt knows {len(wanted)} of {len(packages)} packages of {suites.target}:\n{text[-2000:]}"
            )
        # What an earlier run left is used only if its hash is right. A file that is just too short was
        # interrupted: apt goes on with it, and has to start over if it turns out wrong.
        damaged = await trio.to_thread.run_sync(_damaged, archives, wanted)
        for attempt in ("resume", "anew"):
            if not damaged:
                break
            await trio.to_thread.run_sync(_remove_damaged, archives, damaged, attempt == "resume")
            report.step(f"downloading {_summary(damaged)}")
            # apt prints them in an order of its own; a file's name starts with the package's.
            names = {name.split("=", 1)[0]: name for name in packages}
            targets = [names[package.name] for package in damaged]
            async with self._watch(damaged, report):
                _, text = await _run([*command, "download", *targets], cwd=archives, timeout=_APT_TIMEOUT, check=False)
            damaged = await trio.to_thread.run_sync(_damaged, archives, damaged)
        if damaged:
            tail = "\n".join(text.strip().splitlines()[-12:])
            raise ImagesError(f"cannot download {', '.join(package.file for package in damaged)}:\n{tail}")
        return [archives / package.file for package in wanted]

    @contextlib.asynccontextmanager
    async def _watch(self, packages: Sequence[_Package], report: _Report) -> AsyncIterator[None]:
        """Show how much of `packages` has arrived, by the size of their (partial) files."""
        total = sum(package.size for package in packages)
        archives = self._dir / "archives"

        def arrived() -> int:
            amount = 0
            for package in packages:
                for path in (archives / package.file, archives / "partial" / package.file):
                    with contextlib.suppress(OSError):
                        amount += path.stat().st_size
                        break
            return amount

        async def look() -> None:
            while total:
                report.percent(100 * min(1.0, await trio.to_thread.run_sync(arrived) / total))
                await trio.sleep(0.3)

        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            try:
                yield
            except Exception as error:
                # Raised again below: the nursery would wrap it into an exception group.
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


def _archive_keyring() -> Path:
    for name in ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp"):
        path = Path("/usr/share/keyrings") / name
        if path.is_file():
            return path
    raise ImagesError("no Debian archive keyring on this machine: install the package debian-archive-keyring")


def _user_name() -> str:
    # apt as root drops to its own user for downloads, who cannot reach a cache in root's home.
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def _missing_key(problems: str) -> bool:
    return any(word in problems for word in ("NO_PUBKEY", "is not signed", "Missing key", "no valid signature"))


def _parse_uris(text: str) -> list[_Package]:
    pattern = r"^'[^']+' (\S+) (\d+) SHA256:([0-9a-f]{64})$"
    return [_Package(match[1], int(match[2]), match[3]) for match in re.finditer(pattern, text, flags=re.MULTILINE)]


def _damaged(archives: Path, packages: Sequence[_Package]) -> list[_Package]:
    """Those of `packages` whose file is absent or not what the signed lists say."""
    return [
        package
        for package in packages
        if not (archives / package.file).is_file()
        or (archives / package.file).stat().st_size != package.size
        or _sha256(archives / package.file) != package.sha256
    ]


def _remove_damaged(archives: Path, packages: Iterable[_Package], keep_short: bool) -> None:
    for package in packages:
        path = archives / package.file
        if path.is_file() and not (keep_short and path.stat().st_size < package.size):
            path.unlink()


def _summary(packages: Sequence[_Package]) -> str:
    megabytes = sum(package.size for package in packages) / 1e6
    first = packages[0].name if len(packages) == 1 else f"{len(packages)} packages"
    return f"{first} ({megabytes:.1f} MB)"


def compare_versions(left: str, right: str) -> int:
    """Order of two Debian package versions, as dpkg sees it: -1, 0 or 1."""
    if left == right:
        return 0
    result = subprocess.run(
        ["dpkg", "--compare-versions", left, "lt", right],
        check=False,
        capture_output=True,
        timeout=_TOOL_TIMEOUT,
    )
    return -1 if result.returncode == 0 else 1


def _oldest_first(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    def order(left: tuple[str, str], right: tuple[str, str]) -> int:
        return compare_versions(left[1], right[1])

    return sorted(pairs, key=functools.cmp_to_key(order))


# --- artifacts and stamps ----------------------------------------------------------------------------------


def _write_atomically(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(data)
    scratch.replace(path)


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """An empty directory beside `place` (same file system, so a rename is atomic); removed at the end."""
    scratch = place.with_name(f".{place.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tree_digest(root: Path) -> dict[str, str]:
    digests = {}
    for directory, folders, files in os.walk(root):
        folders.sort()
        for name in sorted([*files, *(f for f in folders if (Path(directory) / f).is_symlink())]):
            path = Path(directory) / name
            key = str(path.relative_to(root))
            if key == "stamp.json":
                continue
            digests[key] = f"link:{path.readlink()}" if path.is_symlink() else _sha256(path)
    return digests


def _finish(scratch: Path, place: Path, inputs: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Stamp what was built in `scratch` and put it in its place."""
    stamp = {"inputs": dict(inputs), "facts": dict(facts), "files": _tree_digest(scratch)}
    (scratch / "stamp.json").write_text(json.dumps(stamp, indent=1, sort_keys=True))
    if place.exists():
        old = place.with_name(f".{place.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
        scratch.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    else:
        scratch.rename(place)


def _read_stamp(place: Path) -> dict[str, Any] | None:
    try:
        stamp = json.loads((place / "stamp.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(stamp, dict) or not all(isinstance(stamp.get(key), dict) for key in ("inputs", "facts", "files")):
        return None
    return stamp


def _state(place: Path, inputs: Mapping[str, Any]) -> str:
    """``ready``, ``missing``, ``stale`` or ``damaged``; reads and hashes every file."""
    if not place.is_dir():
        return "missing"
    stamp = _read_stamp(place)
    if stamp is None:
        return "damaged"
    if stamp["inputs"] != dict(inputs):
        return "stale"
    return "ready" if _tree_digest(place) == stamp["files"] else "damaged"


def _tree_size(place: Path) -> int:
    return sum(path.lstat().st_size for path in place.rglob("*") if not path.is_symlink() and path.is_file())


@contextlib.asynccontextmanager
async def _locked(report: _Report) -> AsyncIterator[Path]:
    """The cache, locked against other processes; waiting is cancellable and said once."""
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ImagesError(f"cannot use the cache {cache}: {error.strerror}") from error
    try:
        said = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    report.step("waiting for another process that works on the cache")
                    said = True
                await trio.sleep(0.2)
        yield cache
    finally:
        os.close(descriptor)


# --- kernels -----------------------------------------------------------------------------------------------


def _busybox() -> Path:
    """The machine's statically linked busybox (package busybox-static)."""
    for directory in ("/usr/bin", "/bin"):
        path = Path(directory) / "busybox"
        if path.is_file():
            # A dynamic executable names its interpreter in the first page.
            if b"ld-linux" in path.read_bytes()[:4096]:
                raise ImagesError(f"{path} is dynamically linked: install the package busybox-static")
            return path
    raise ImagesError("no busybox on this machine: install the package busybox-static")


def _module_names() -> list[str]:
    """What modules.list names, marks included."""
    lines = (line.split("#", 1)[0].strip() for line in (_IMAGES_DIR / "modules.list").read_text().splitlines())
    return [line for line in lines if line]


def _kernel_inputs(version: str) -> dict[str, Any]:
    init = _IMAGES_DIR / "init"
    if not init.is_file():
        raise ImagesError(f"{init} is missing: guest images are built from a source checkout")
    return {
        "format": _FORMAT,
        "series": version,
        "init": _sha256(init),
        "common": _sha256(_IMAGES_DIR / "common"),
        "load": _sha256(_IMAGES_DIR / "load.c"),
        "modules": _sha256(_IMAGES_DIR / "modules.list"),
        "busybox": _sha256(_busybox()),
    }


def _series(version: str) -> re.Pattern[str]:
    return re.compile(rf"^linux-image-(?P<release>{re.escape(version)}(?:[.+~-][0-9a-z.+~-]*)?-cloud-amd64)$")


async def _find_kernel(apt: AptRoot, version: str, report: _Report) -> tuple[_SuiteSet, str, str, str]:
    """(suites, package, package version, kernel release) of the newest kernel of a series."""
    problems = []
    for suites in _KERNEL_SUITES[version]:
        problems.append(await apt.update(suites, report))
        pattern = _series(version)
        names = [name for name in await apt.names(f"linux-image-{version}", suites) if pattern.match(name)]
        # Leave out the meta-packages (linux-image-6.12-cloud-amd64): they hold no kernel.
        names = [name for name in names if name != f"linux-image-{version}-cloud-amd64"]
        found = await apt.versions(names, suites)
        if found:
            package, package_version = found[-1]
            match = pattern.match(package)
            assert match is not None
            return suites, package, package_version, match["release"]
    tried = ", ".join(suite for suites in _KERNEL_SUITES[version] for suite in suites.suites)
    raise ImagesError("\n".join([f"no linux {version} cloud kernel in {tried}", *filter(None, problems)]))


async def _fetch_kernel(apt: AptRoot, version: str, report: _Report) -> tuple[str, list[Path]]:
    """The newest kernel of a series: its release and package files."""
    suites, package, package_version, release = await _find_kernel(apt, version, report)
    # Newer packages split the kernel proper and its modules off.
    depends = await apt.depends(package, package_version, suites)
    part = rf"(linux-(?:base|binary|modules)-{re.escape(release)}) \(= {re.escape(package_version)}\)"
    names = [f"{name}={package_version}" for name in (package, *re.findall(part, depends))]
    return release, await apt.download(names, suites, report)


def _kept_packages(archives: Path, place: Path) -> tuple[str, list[Path]] | None:
    """What an artifact was built from, if all of it is still in the archive and unchanged."""
    stamp = _read_stamp(place)
    if stamp is None or not isinstance(stamp["facts"].get("packages"), dict):
        return None
    for name, digest in stamp["facts"]["packages"].items():
        if not (archives / name).is_file() or _sha256(archives / name) != digest:
            return None
    return stamp["facts"]["release"], [archives / name for name in stamp["facts"]["packages"]]


async def _build_kernel(apt: AptRoot, place: Path, version: str, refresh: bool, report: _Report) -> str:
    # A change of the init script alone needs no network: the packages were verified when they were
    # downloaded.
    kept = None if refresh else await trio.to_thread.run_sync(_kept_packages, apt.archives, place)
    release, files = kept if kept is not None else await _fetch_kernel(apt, version, report)
    report.step("unpacking the kernel and building its initramfs")
    place.parent.mkdir(parents=True, exist_ok=True)
    inputs = await trio.to_thread.run_sync(_kernel_inputs, version)
    with _scratch(place) as scratch, _scratch(place.with_name(f"{place.name}-unpacked")) as unpacked:
        for file in files:
            await _run(["dpkg-deb", "-x", file, unpacked])
        await trio.to_thread.run_sync(_take_vmlinuz, unpacked, release, scratch)
        names = await trio.to_thread.run_sync(_fill_initramfs, unpacked, release, unpacked / "initramfs")
        # Static: the guest has no libraries.
        load = unpacked / "initramfs" / "bin" / "load"
        await _run(["cc", "-static", "-Os", "-s", "-pthread", "-o", load, _IMAGES_DIR / "load.c"])
        listing = "\n".join(names).encode() + b"\n"
        archive = unpacked / "initramfs.cpio"
        await _run(
            ["cpio", "--quiet", "-o", "-H", "newc", "--owner=0:0", "--reproducible", "-O", archive],
            cwd=unpacked / "initramfs",
            stdin=listing,
        )
        await trio.to_thread.run_sync(_compress, archive, scratch / "initramfs.img")
        digests = await trio.to_thread.run_sync(_digests, files)
        await trio.to_thread.run_sync(_finish, scratch, place, inputs, {"release": release, "packages": digests})
    return release


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: _sha256(file) for file in files}


def _take_vmlinuz(unpacked: Path, release: str, scratch: Path) -> None:
    places = [unpacked / "boot" / f"vmlinuz-{release}", unpacked / "usr/lib/modules" / release / "vmlinuz"]
    source = next((path for path in places if path.is_file()), None)
    if source is None:
        raise ImagesError(f"the kernel packages hold no vmlinuz of {release}")
    shutil.copyfile(source, scratch / "vmlinuz")


def _fill_initramfs(unpacked: Path, release: str, tree: Path) -> list[str]:
    """Lay out the initramfs; names for cpio, parents before children."""
    (tree / "bin").mkdir(parents=True)
    (tree / "modules").mkdir()
    for name in ("proc", "sys", "dev", "tmp", "etc"):
        (tree / name).mkdir()
    shutil.copyfile(_busybox(), tree / "bin" / "busybox")
    (tree / "bin" / "busybox").chmod(0o755)
    shutil.copyfile(_IMAGES_DIR / "init", tree / "init")
    (tree / "init").chmod(0o755)
    shutil.copyfile(_IMAGES_DIR / "common", tree / "common")
    # Compiled into this place later.
    (tree / "bin" / "load").touch()
    directories = [unpacked / "usr/lib/modules" / release, unpacked / "lib/modules" / release]
    modules = next((path for path in directories if path.is_dir()), None)
    if modules is None:
        raise ImagesError(f"the kernel packages hold no modules of {release}")
    _add_wanted_modules(modules, _module_names(), tree / "modules")
    return sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))


def _add_wanted_modules(modules: Path, wanted: Iterable[str], target: Path) -> None:
    """The modules, with the list of those to load at the start, and one for each that is loaded on request."""
    at_start = []
    for name in wanted:
        if name[0] != "+":
            at_start.append(name)
            continue
        module = name.strip("+?")
        try:
            order = _add_modules(modules, [module], target)
        except ImagesError:
            if not name.endswith("?"):
                raise
            continue
        # Empty for one that is built in: the guest has to tell that from one that isn't there.
        (target / f"{_module_name(module)}.order").write_text(order)
    (target / "order").write_text(_add_modules(modules, at_start, target))


def _add_modules(modules: Path, wanted: Iterable[str], target: Path) -> str:
    """The list of what has to be loaded for these, in order."""
    resolved = resolve_modules(modules, wanted)
    for name, data in resolved:
        (target / f"{name}.ko").write_bytes(data)
    return "".join(f"{name}\n" for name, _ in resolved)


def resolve_modules(directory: Path, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """The named modules and all they depend on, uncompressed, in loading order; built-in ones are left out.

    Debian's packages come without ``modules.dep`` (depmod writes it on installation), so dependencies are
    read from each module's own information. A name that ends in ``?`` may be absent from this kernel. Raises
    :class:`ImagesError` for a module that is neither a file nor built in.
    """
    files = {}
    for path in (directory / "kernel").rglob("*.ko*"):
        files[_module_name(path.name.split(".ko", 1)[0])] = path
    builtin_list = directory / "modules.builtin"
    builtin = set()
    if builtin_list.is_file():
        builtin = {_module_name(Path(line).name.removesuffix(".ko")) for line in builtin_list.read_text().split()}
    ordered: dict[str, bytes] = {}
    visiting: list[str] = []

    def add(name: str, optional: bool) -> None:
        if name in ordered or name in builtin:
            return
        if name not in files:
            if optional:
                return
            raise ImagesError(f"the kernel has no module {name} ({' -> '.join(visiting) or 'wanted'})")
        if name in visiting:
            raise ImagesError(f"modules depend on each other: {' -> '.join([*visiting, name])}")
        data = _read_module(files[name])
        match = re.search(rb"\0depends=([^\0]*)\0", data)
        visiting.append(name)
        for dependency in (match[1].decode() if match else "").split(","):
            if dependency:
                add(_module_name(dependency), optional=False)
        visiting.pop()
        ordered[name] = data

    for entry in wanted:
        add(_module_name(entry.removesuffix("?")), entry.endswith("?"))
    return list(ordered.items())


def _module_name(name: str) -> str:
    return name.replace("-", "_")


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    match path.suffix:
        case ".ko":
            return data
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
        case ".zst":
            try:
                result = subprocess.run(
                    ["zstd", "-dcq"], input=data, capture_output=True, check=True, timeout=_TOOL_TIMEOUT
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise ImagesError(
                    f"cannot uncompress {path.name} with zstd ({error}): install the package zstd"
                ) from error
            return result.stdout
    raise ImagesError(f"unknown compression of {path.name}")


def _compress(source: Path, target: Path) -> None:
    # No name and no time in the header: the same inputs give the same file.
    with (
        source.open("rb") as plain,
        target.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
    ):
        shutil.copyfileobj(plain, packed, 1 << 20)


# --- a disk that a guest boots from ------------------------------------------------------------------------

# images/boot.S, assembled, up to its table of areas.
_BOOT_CODE = bytes.fromhex(
    "fa31c08ed88ec08ed0bc007cfbfc8816c47cc706ce7c0010e86400c706ce7c0018e85b00c706ce7c0020bf987d8b4d04e337"
    "8b05a3f27c8b4502a2f47c8826f77c51e83a00b487b90040bed87ccd1572468106f27c00808016f47c008016f77c0059e2dd"
    "83c706ebc4fab800108ed88ec08ee08ee88ed0bc00e0ea00002010bec87cb4428a16c47ccd13720b8306d07c408316d27c00"
    "c3beab7cac84c07409b40ebb0700cd10ebf2f4ebfd63616e6e6f74207265616420746865206b65726e656c0d0a00008d7400"
    "1000400000000000400000000000000000000000000000000000000000000000ffff000002930000ffff00000093"
)
_BOOT_AREAS = 408
_CHUNK = 32 * 1024
_REAL_MODE_ADDRESS = 0x10000
_COMMAND_LINE_OFFSET = 0xE000
_KERNEL_ADDRESS = 0x100000
_INITRAMFS_ADDRESS = 0x8000000


def boot_blocks(guest_kernel: GuestKernel, command_line: str) -> bytes:
    """The start of a disk that the firmware boots this guest from: boot sector, kernel, command line, initramfs.

    The guest needs 256 MiB of memory. Raises :class:`ImagesError` for a kernel that isn't a bzImage of boot protocol
    2.10 or later, and for a command line of more than 2047 bytes. Reads files: call it from a thread.
    """
    image = bytearray(guest_kernel.vmlinuz.read_bytes())
    initramfs = guest_kernel.initramfs.read_bytes()
    words = command_line.encode() + b"\0"
    if image[0x202:0x206] != b"HdrS" or int.from_bytes(image[0x206:0x208], "little") < 0x20A:
        raise ImagesError(f"{guest_kernel.vmlinuz} is no bzImage")
    setup = ((image[0x1F1] or 4) + 1) * 512
    if setup > _CHUNK or len(words) > 2048:
        raise ImagesError("the kernel's real-mode part or its command line is too long for the boot sector")
    # What a boot loader would fill in (linux, Documentation/arch/x86/boot.rst): its type (none that has a number), the
    # heap's end, the initramfs, the command line.
    image[0x210] = 0xFF
    image[0x211] |= 0x80
    struct.pack_into("<II", image, 0x218, _INITRAMFS_ADDRESS, len(initramfs))
    struct.pack_into("<H", image, 0x224, _COMMAND_LINE_OFFSET - 0x200)
    struct.pack_into("<I", image, 0x228, _REAL_MODE_ADDRESS + _COMMAND_LINE_OFFSET)
    real_mode = bytearray(2 * _CHUNK)
    real_mode[:setup] = image[:setup]
    real_mode[_COMMAND_LINE_OFFSET : _COMMAND_LINE_OFFSET + len(words)] = words
    areas = [(_KERNEL_ADDRESS, _padded(bytes(image[setup:]))), (_INITRAMFS_ADDRESS, _padded(initramfs))]
    sector = bytearray(_BOOT_CODE.ljust(512, b"\0"))
    for number, (address, data) in enumerate(areas):
        struct.pack_into("<IH", sector, _BOOT_AREAS + 6 * number, address, len(data) // _CHUNK)
    sector[510:512] = b"\x55\xaa"
    return b"".join([bytes(sector).ljust(_CHUNK, b"\0"), bytes(real_mode), *(data for _, data in areas)])


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // _CHUNK) * _CHUNK, b"\0")


# --- QEMU --------------------------------------------------------------------------------------------------


def _qemu_inputs(version: str) -> dict[str, Any]:
    return {"format": _FORMAT, "series": version}


async def _build_qemu(apt: AptRoot, place: Path, version: str, _refresh: bool, report: _Report) -> str:
    pattern = re.compile(rf"^(?:\d+:)?{re.escape(version)}(?:[.+~-]|$)")
    problems = []
    for suites in _QEMU_SUITES[version]:
        problems.append(await apt.update(suites, report))
        found = [pair for pair in await apt.versions(["qemu-system-x86"], suites) if pattern.match(pair[1])]
        if found:
            break
    else:
        tried = ", ".join(suite for suites in _QEMU_SUITES[version] for suite in suites.suites)
        raise ImagesError("\n".join([f"no QEMU {version} in {tried}", *filter(None, problems)]))
    package, package_version = found[-1]
    files = await apt.download(await apt.closure(package, package_version, suites), suites, report)
    report.step(f"unpacking {len(files)} packages")
    place.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(place) as scratch:
        root = scratch / "root"
        for number, file in enumerate(files, 1):
            await _run(["dpkg-deb", "-x", file, root])
            report.percent(100 * number / len(files))
        for name in _QEMU_PRUNE:
            await trio.to_thread.run_sync(functools.partial(shutil.rmtree, root / name, ignore_errors=True))
        command = _unpacked_command(root, version)
        reported = await _probe(command)
        if not reported.startswith(f"{version}."):
            raise ImagesError(f"the QEMU unpacked as {version} says it is {reported}")
        facts = {
            "version": reported,
            "package": package_version,
            "packages": await trio.to_thread.run_sync(_digests, files),
        }
        await trio.to_thread.run_sync(_finish, scratch, place, _qemu_inputs(version), facts)
    return reported


async def _probe(command: QemuCommand) -> str:
    """The version a QEMU reports; fails if it cannot serve us."""
    _, text = await _run([*command.argv, "--version"], env=command.env)
    match = re.search(r"QEMU emulator version (\d+\.\d+(?:\.\d+)?)", text)
    if match is None:
        raise ImagesError(f"QEMU does not tell its version: {text.strip()[:200]}")
    argv = [*command.argv, "-device", "vhost-user-blk-pci,help"]
    code, devices = await _run(argv, env=command.env, check=False)
    if code != 0 or "disable-legacy" not in devices:
        raise ImagesError(f"QEMU {match[1]} has no vhost-user-blk-pci")
    return match[1]


def _unpacked_command(root: Path, version: str) -> QemuCommand:
    """QEMU from an unpacked root with that root's own loader and libraries, whatever this machine has."""
    multiarch = "x86_64-linux-gnu"
    libraries = [root / "usr/lib" / multiarch, root / "lib" / multiarch]
    # Some libraries sit in private directories their users name by absolute run paths.
    libraries += [root / "usr/lib" / multiarch / "pulseaudio"]
    present = [path for path in libraries if path.is_dir()]
    loaders = [path / "ld-linux-x86-64.so.2" for path in present]
    loader = next((path for path in loaders if path.exists()), None)
    if loader is None:
        raise ImagesError(f"no dynamic loader in {root}")
    argv = [str(loader), "--library-path", ":".join(str(path) for path in present)]
    argv += [str(root / "usr/bin/qemu-system-x86_64")]
    argv += ["-L", str(root / "usr/share/qemu"), "-L", str(root / "usr/share/seabios")]
    argv += ["-L", str(root / "usr/lib/ipxe/qemu")]
    return QemuCommand(argv, {"QEMU_MODULE_DIR": str(root / "usr/lib" / multiarch / "qemu")}, version)


@functools.lru_cache(maxsize=4)
def _system_version(program: str, _mtime: int) -> str | None:
    try:
        text = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_TOOL_TIMEOUT, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"QEMU emulator version (\d+\.\d+(?:\.\d+)?)", text)
    return match[1] if match else None


def system_qemu() -> QemuCommand | None:
    """The machine's own QEMU, if it has one."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        return None
    version = _system_version(program, Path(program).stat().st_mtime_ns)
    return None if version is None else QemuCommand([program], {}, version)


def _is_series(version: str, series: str) -> bool:
    return version == series or version.startswith(f"{series}.")


# --- daemons -----------------------------------------------------------------------------------------------


def _daemon_inputs(release: str) -> dict[str, Any]:
    return {"format": _FORMAT, "release": release, "programs": list(initramfs.DAEMON_PROGRAMS)}


async def _build_daemons(apt: AptRoot, place: Path, release: str, _refresh: bool, report: _Report) -> str:
    suites = _DAEMON_SUITES[release]
    problems = await apt.update(suites, report)
    wanted: dict[str, str] = {}
    names: list[str] = []
    for package in _DAEMON_PACKAGES:
        found = await apt.versions([package], suites)
        if not found:
            missing = f"no package {package} in {', '.join(suites.suites)}"
            raise ImagesError("\n".join(filter(None, [missing, problems])))
        wanted[package] = found[-1][1]
        names += await apt.closure(package, wanted[package], suites)
    files = await apt.download(list(dict.fromkeys(names)), suites, report)
    report.step(f"unpacking {len(files)} packages")
    place.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(place) as scratch, _scratch(place.with_name(f"{place.name}-unpacked")) as root:
        for number, file in enumerate(files, 1):
            await _run(["dpkg-deb", "-x", file, root])
            report.percent(100 * number / len(files))
        await trio.to_thread.run_sync(initramfs.write_daemons, root, scratch / "initramfs.img")
        version = ", ".join(f"{package} {version}" for package, version in wanted.items())
        facts = {"version": version, "packages": await trio.to_thread.run_sync(_digests, files)}
        await trio.to_thread.run_sync(_finish, scratch, place, _daemon_inputs(release), facts)
    return version


# --- the module's interface --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """A kind of artifact: its directory in the cache, how messages call it, what it is built from and how."""

    directory: str
    title: str
    inputs: Callable[[str], dict[str, Any]]
    build: Callable[[AptRoot, Path, str, bool, _Report], Awaitable[str]]


_KINDS: Mapping[str, _Kind] = {
    "kernel": _Kind("kernels", "kernel", _kernel_inputs, _build_kernel),
    "qemu": _Kind("qemu", "QEMU", _qemu_inputs, _build_qemu),
    "daemons": _Kind("daemons", "daemons", _daemon_inputs, _build_daemons),
}


async def ensure(
    kernels: Iterable[str],
    qemus: Iterable[str],
    progress: Progress | None = None,
    *,
    daemons: Iterable[str] = (),
    refresh: bool = False,
) -> None:
    """Have these kernel and QEMU series, and daemons of these releases, ready in the cache; builds what is missing,
    stale or damaged.

    A QEMU series that the machine itself has is not fetched. Needs no network when everything is there. With
    `refresh`, what is there is rebuilt from the newest packages. Raises :class:`ImagesError`; a build that
    fails or is cancelled leaves what was there before and keeps finished downloads.
    """
    kernels, qemus, daemons = (list(dict.fromkeys(names)) for names in (kernels, qemus, daemons))
    for name in kernels:
        if name not in KERNELS:
            raise ImagesError(f"unknown kernel {name!r}; known: {', '.join(KERNELS)}")
    for name in qemus:
        if name not in FETCHABLE_QEMUS:
            raise ImagesError(f"unknown QEMU {name!r}; known: {', '.join(FETCHABLE_QEMUS)}")
    for name in daemons:
        if name not in DAEMONS:
            raise ImagesError(f"no daemons of {name!r}; known: {', '.join(DAEMONS)}")
    machine = await trio.to_thread.run_sync(system_qemu)
    wanted: list[tuple[str, str]] = [("kernel", name) for name in kernels]
    wanted += [("qemu", name) for name in qemus if machine is None or not _is_series(machine.version, name)]
    wanted += [("daemons", name) for name in daemons]
    report = _Report(progress)
    report.start("cache")
    async with _locked(report) as cache:
        report.done(str(cache))
        apt: AptRoot | None = None
        for kind, name in wanted:
            report.start(f"{_KINDS[kind].title} {name}")
            place = _place(cache, kind, name)
            inputs = await trio.to_thread.run_sync(_KINDS[kind].inputs, name)
            state = await trio.to_thread.run_sync(_state, place, inputs)
            if state == "ready" and not refresh:
                report.done("ready")
                continue
            if state != "missing":
                report.step(f"{state}, building again" if state != "ready" else "building again")
            if apt is None:
                apt = await trio.to_thread.run_sync(AptRoot, cache / "apt")
            report.done(f"ready ({await _KINDS[kind].build(apt, place, name, refresh, report)})")


def _place(cache: Path, kind: str, name: str) -> Path:
    return cache / _KINDS[kind].directory / name


def status() -> list[ImageStatus]:
    """State of every known artifact. Reads and hashes all of them: call it from a thread."""
    cache = cache_dir()
    machine = system_qemu()
    rows = []
    if machine is not None:
        rows.append(ImageStatus("qemu", "system", "system", machine.version, None, Path(machine.argv[0])))
    known = {"kernel": KERNELS, "qemu": FETCHABLE_QEMUS, "daemons": DAEMONS}
    for kind, name in [(kind, name) for kind, names in known.items() for name in names]:
        place = _place(cache, kind, name)
        state = _state(place, _KINDS[kind].inputs(name))
        stamp = _read_stamp(place)
        if state == "missing" and kind == "qemu" and machine is not None and _is_series(machine.version, name):
            rows.append(ImageStatus(kind, name, "system", machine.version, None, Path(machine.argv[0])))
            continue
        facts = stamp["facts"] if stamp is not None else {}
        version = facts.get("release") or facts.get("version")
        size = _tree_size(place) if state != "missing" else None
        rows.append(ImageStatus(kind, name, state, version, size, place if state != "missing" else None))
    return rows


def status_json() -> list[dict[str, Any]]:
    """:func:`status` as plain data for ``--json``."""
    return [{**asdict(row), "path": None if row.path is None else str(row.path)} for row in status()]


def qemu_command(version: str | None = None) -> QemuCommand:
    """How to start the machine's QEMU (`version` None) or one of a given series.

    The machine's own is used when it is of that series. Raises :class:`ImagesError` when there is none; see
    :func:`ensure`.
    """
    machine = system_qemu()
    if version is None:
        if machine is None:
            raise ImagesError("this machine has no qemu-system-x86_64: install the package qemu-system-x86")
        return machine
    if machine is not None and _is_series(machine.version, version):
        return machine
    place = _place(cache_dir(), "qemu", version)
    stamp = _read_stamp(place)
    if stamp is None:
        raise ImagesError(f"QEMU {version} is not in the cache: run `vhu-legacy images --qemu {version}`")
    return _unpacked_command(place / "root", stamp["facts"]["version"])


def kernel(version: str) -> GuestKernel:
    """The guest kernel of a series. Raises :class:`ImagesError` when it is not in the cache; see
    :func:`ensure`.
    """
    place = _place(cache_dir(), "kernel", version)
    stamp = _read_stamp(place)
    if stamp is None:
        raise ImagesError(f"kernel {version} is not in the cache: run `vhu-legacy images --kernel {version}`")
    return GuestKernel(place / "vmlinuz", place / "initramfs.img", stamp["facts"]["release"])


def daemons(release: str = DAEMONS[0]) -> Path:
    """The archive of vhost-user daemons that is laid over a guest's initramfs. Raises :class:`ImagesError` when it is
    not in the cache; see :func:`ensure`.
    """
    place = _place(cache_dir(), "daemons", release)
    if _read_stamp(place) is None:
        raise ImagesError(f"the daemons of {release} are not in the cache: run `make images`")
    return place / "initramfs.img"


def clean() -> int:
    """Remove downloaded packages and lists (not the artifacts); the number of bytes freed. Call it from a
    thread.
    """
    apt = cache_dir() / "apt"
    freed = _tree_size(apt) if apt.is_dir() else 0
    shutil.rmtree(apt, ignore_errors=True)
    return freed


async def main(argv: Sequence[str]) -> int:
    """``python -m vhu_legacy.images [kernel:SERIES|qemu:SERIES|daemons:RELEASE ...]``: used by the Makefile; everything
    when nothing is named.
    """
    kernels = [name.removeprefix("kernel:") for name in argv if name.startswith("kernel:")]
    qemus = [name.removeprefix("qemu:") for name in argv if name.startswith("qemu:")]
    daemons = [name.removeprefix("daemons:") for name in argv if name.startswith("daemons:")]
    if not argv:
        kernels, qemus, daemons = list(KERNELS), list(QEMUS), list(DAEMONS)
    if len(kernels) + len(qemus) + len(daemons) < len(argv):
        usage = "usage: python -m vhu_legacy.images [kernel:SERIES|qemu:SERIES|daemons:RELEASE ...]"
        print(usage, file=sys.stderr)
        return 2
    from rich.console import Console

    try:
        with Progress(console=Console(stderr=True), transient=False) as progress:
            await ensure(kernels, qemus, progress, daemons=daemons)
    except ImagesError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status_code = 130
    try:
        status_code = run(main, sys.argv[1:])
    except* KeyboardInterrupt:
        print("images: interrupted; what was downloaded is kept", file=sys.stderr)
    sys.exit(status_code)
