"""The native half: worker pool, members and vhost-user sessions (Rust, `rust/core` through `rust/py`).

Every call here is short and never waits for a worker, a socket or a guest; what may take time reports its end
through the pool's eventfd (`Pool.event_fd`, `Pool.take_events`). The exceptions are `Member.blk`, `Member.modify`
and `Pool.close`, which touch files or join threads: call them with `trio.to_thread.run_sync`.
"""

from typing import Any, Final, final

__all__ = [
    "BusyError",
    "DeviceGroup",
    "Function",
    "ImageError",
    "MasterOutcome",
    "Member",
    "NativeError",
    "Outcome",
    "Pool",
    "ProtocolError",
    "Session",
    "SharedMemoryOperation",
    "VfioUserServer",
    "VhostUserDaemon",
    "VhostUserDevice",
    "discard",
]

class NativeError(Exception):
    """Root of the errors raised here. `rule` names the check that failed, in dotted lower case."""

    rule: str

class ProtocolError(NativeError):
    """The front end broke the vhost-user protocol; the connection is to be closed."""

class BusyError(NativeError):
    """The member is attached to another front end, or still draining."""

class ImageError(NativeError):
    """An image can't be opened, locked, sized or is not usable as asked."""

@final
class Pool:
    """A fixed set of worker threads, each with one epoll and one io_uring (design D4)."""

    def __new__(cls, workers: int | None = None) -> Pool: ...
    def event_fd(self) -> int:
        """The eventfd that is readable while `take_events` has something. Borrowed: the pool closes it."""
    def take_events(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Drain the eventfd and return the events so far: (kind, member id, data).

        kinds: "done" {token}: a pending `Outcome` can be resumed, or a detach has drained;
        "status" {old, new}: the device status register changed;
        "broken" {rule, reason, queue|None}: the member was marked broken;
        "config" {}: the driver changed the device configuration;
        "function-connected" {function, peer_pid}, "function-disconnected" {function, reason}: a client of a PCI
        function (member 0 is the owner).
        """
    def statistics(self) -> dict[str, Any]:
        """Workers, their queues, wake-ups, requests; shared mappings."""
    def close(self) -> None:
        """Stop the workers and join them. Idempotent, bounded. Members must be closed first."""

@final
class Member:
    """One member of the group: register file, queues, device model (design D1)."""

    @staticmethod
    def blk(
        pool: Pool,
        id: int,
        image: str,
        *,
        read_only: bool = False,
        queues: int = 1,
        queue_size: int = 256,
        legacy: bool = True,
        blk_size: int = 512,
        serial: str = "",
        packed: bool = False,
        in_order: bool = False,
        shared: bool = False,
        vectors: int | None = None,
        image_fd: int | None = None,
        poll_us: int = 0,
    ) -> Member:
        """A virtio-blk member. `image` is a path of a raw file, "ram:SIZE" or "null:SIZE" with SIZE in bytes.

        packed: packed rings are offered; in_order: IN_ORDER is;
        shared: other processes may have the image open for writing;
        image_fd: the image, which a predecessor has open, taken over with its lock;
        vectors: their MSI-X table size (default queues + 1, 0: no MSI-X);
        poll_us: how long an empty queue may be polled, at most (0 to 1000, 0: not at all).
        Raises ImageError, ValueError.
        """
    @staticmethod
    def owner(
        pool: Pool,
        group: DeviceGroup,
        image: str,
        *,
        read_only: bool = False,
        queues: int = 1,
        queue_size: int = 256,
        blk_size: int = 512,
        serial: str = "",
        packed: bool = False,
        in_order: bool = False,
        shared: bool = False,
        vectors: int | None = None,
        image_fd: int | None = None,
        poll_us: int = 0,
    ) -> Member:
        """The owner itself as a virtio-blk device: member 0, with the group's administration virtqueues behind its own.

        Not to be added to the group. vectors: default queues + admin_queues + 1. Raises ImageError, ValueError.
        """
    def image_fd(self) -> int | None:
        """A duplicate of the image's fd (of a RAM image: of its memory), for a successor; None for a null image."""
    def set_writeback(self, on: bool) -> None:
        """Set the writeback field of the configuration, as a predecessor has left it."""
    @property
    def id(self) -> int: ...
    @property
    def attached(self) -> bool:
        """Whether a front end is attached or its queues still drain."""
    def info(self) -> dict[str, Any]:
        """Everything there is to know, as plain values; see docs/QMP.md, `query-member`.

        What PCI functions add: "front" (None, "vhost-user", "legacy", "transitional", "modern", "owner"), "stopped",
        "isr", "msix" {enabled, vectors}, "poll_us", "assigned_features", "config_generation". Administration commands
        are counted by the group: `DeviceGroup.member_commands`.
        """
    def modify(
        self,
        *,
        image: str | None = None,
        size: int | None = None,
        read_only: bool | None = None,
        legacy: bool | None = None,
        serial: str | None = None,
    ) -> bool:
        """Swap the image, resize it (bytes), change read-only, whether legacy drivers are welcome, or the serial
        number. True when the driver should be told.

        Raises ImageError (the image is as before then), ValueError, and BusyError for `legacy` and `serial` while a
        front end is attached.
        """
    def config_changed(self) -> bool:
        """Tell the driver of an attached PCI function that the configuration changed. False when there is none, or it
        can't be told at the moment."""
    def close(self) -> None:
        """Let go of the image. Idempotent. Raises BusyError while attached."""

@final
class DeviceGroup:
    """The owner: its members, the execution of administration commands, in-process administration virtqueues (design
    D6)."""

    def __new__(
        cls,
        pool: Pool,
        *,
        strict: bool = False,
        feature_management: bool = False,
        admin_queues: int = 1,
        notify_region: bool = True,
        compat: dict[str, bool] | None = None,
    ) -> DeviceGroup:
        """compat: switches by name; those not named follow `strict`. Raises ValueError."""
    def add(self, member: Member) -> None:
        """Add a member; NumVFs and VF Enable follow. Raises ValueError: the id is taken."""
    def remove(self, member_id: int) -> None:
        """Remove a member; NumVFs and VF Enable follow. Raises KeyError."""
    def set_vfs(self, *, enable: bool | None = None, num_vfs: int | None = None) -> None:
        """VF Enable and NumVFs, as a write to the SR-IOV capability sets them."""
    def reset(self) -> None:
        """What a reset of the owner is to the in-process driver: lists, capabilities and objects as after power-up."""
    def info(self) -> dict[str, Any]:
        """vf_enable, num_vfs, total_vfs, strict, feature_management, notify_region, admin_queues, compat {}, supported
        and used_lists {self, sr_iov: [opcode]}, device_capabilities and capabilities {get_limit, set_limit}, objects
        [{type, id, member, operation}], function {used_lists, capabilities, objects} of the PCI function's driver,
        commands {name: count}, failed, queues [{index, submitted, completed}], forwarded (commands of the
        legacy functions)."""
    def submit(self, queue: int, readable: bytes, writable: int) -> tuple[int, bytes | None]:
        """Put one command into an in-process queue: its device-readable part, and how many bytes the device may write.

        (token, bytes written) when it has completed; (token, None): wait for the event "done" with that token, then
        `result`. Raises ValueError (no such queue, more than 1 MiB), BusyError (the queue is full).
        """
    def result(self, token: int) -> bytes:
        """The bytes written by a command that was waited for. Once. Raises KeyError."""
    def abandon(self, token: int) -> None:
        """Nobody will ask for that result; the command is carried out nevertheless."""
    def trace(
        self, since: int = 0, limit: int = 1000, member: int | None = None
    ) -> tuple[int, int, list[dict[str, Any]]]:
        """Accesses from number `since` on: (number to go on with, how many were forgotten before, accesses).

        Each: seq, at (seconds since 1970), member, origin ("bar0" or "admin"), write, register, offset, width (bytes),
        value, opcode (None: notify region), opcode_name, status, qualifier, microseconds.
        """
    def member_commands(self, member_id: int) -> dict[str, int]:
        """Administration commands that the member has had, by name of the opcode."""
    def close(self) -> None:
        """Let go of results that nobody has asked for. Idempotent."""

@final
class Function:
    """A PCI function of a member, or of the owner; served by a `VfioUserServer` (design D7)."""

    @staticmethod
    def owner(group: DeviceGroup, member: Member) -> Function:
        """The owner itself: `member` is what `Member.owner` made."""
    @staticmethod
    def legacy(group: DeviceGroup, member: Member) -> Function:
        """An I/O BAR whose accesses become administration commands, for legacy drivers. Raises ValueError."""
    @staticmethod
    def transitional(group: DeviceGroup, member: Member) -> Function:
        """The same I/O BAR, and the modern structures beside it. Raises ValueError."""
    @staticmethod
    def modern(group: DeviceGroup, member: Member) -> Function:
        """The member itself, as a virtual function is. Raises ValueError."""
    def info(self) -> dict[str, Any]:
        """kind, member, vendor_id, device_id, revision, class_code, subsystem_vendor_id, subsystem_id, bars [{index,
        size, kind}], capabilities [name], command, msix_enabled, irqs {intx, msix [vectors with an eventfd]}, dma
        [{iova, size}]."""

@final
class VfioUserServer:
    """Serves one function to one vfio-user client after the other."""

    def __new__(cls, pool: Pool, function: Function, listener: int) -> VfioUserServer:
        """Serve on a listening UNIX stream socket. The fd is the server's from here on, whatever happens.

        Raises ValueError when it is something else, OSError.
        """
    def statistics(self) -> dict[str, Any]:
        """connected, peer_pid, connections, refused, messages, reads, writes, errors."""
    def disconnect(self, reason: str) -> None:
        """Send the client away, if there is one; the next may come. Returns at once."""
    def close(self) -> int | None:
        """Stop listening and send the client away. A token to wait for. Idempotent."""

def discard(fds: list[int]) -> None:
    """Close fds that came from a front end. Never waits for it, whatever they are."""

@final
class Outcome:
    """What a session wants done after a message."""

    @property
    def reply(self) -> bytes | None:
        """Bytes to send on the connection, now."""
    @property
    def pending(self) -> int | None:
        """Wait for the event "done" with this token, then call `Session.resume(token)` before the next message."""
    def take_reply_fd(self) -> int | None:
        """The fd to send with `reply`; whoever takes it closes it."""
    def take_backend_channel(self) -> int | None:
        """The socket fd for back-end requests, if this message brought one: now the caller's to close. Once."""
    @property
    def config_changed(self) -> bool:
        """A configuration change held back until now may be told: call `Session.config_change`."""
    @property
    def error(self) -> str | None:
        """Set when the connection must be closed after sending `reply`."""

@final
class Session:
    """The back-end side of one vhost-user connection, without the socket (design D2)."""

    HEADER_SIZE: Final[int]
    MAX_FDS: Final[int]

    def __new__(cls, member: Member) -> Session:
        """Attach to the member. Raises BusyError."""
    @staticmethod
    def payload_size(header: bytes) -> int:
        """Length of the payload that follows this 12-byte header. Raises ProtocolError."""
    def handle(self, header: bytes, payload: bytes, fds: list[int]) -> Outcome:
        """Take one whole message. The fds are the session's from here on, whatever happens."""
    def resume(self, token: int) -> Outcome:
        """Finish the message that was pending on `token`."""
    def fail(self, rule: str, reason: str) -> None:
        """Mark the member broken for something seen outside (a torn message, a silent peer)."""
    def config_change(self) -> bytes | None:
        """The CONFIG_CHANGE message for the back-end channel, or None when the front end can't take it now."""
    def shared_memory(self, map: bool, offset: int, size: int, fd_offset: int) -> bytes | None:
        """The message that has the front end map `size` bytes of a file, from `fd_offset` on, at `offset` of the
        device's shared memory region (or unmap them), for the back-end channel; None: not now. The file's fd goes with
        a map. It must be sent before another message of the front end is handled, and answered before the next one is
        asked for."""
    @property
    def has_shared_memory(self) -> bool:
        """Whether the front end has accepted what `shared_memory` needs."""
    def backend_reply(self, header: bytes, payload: bytes) -> bool | None:
        """Check a reply on the back-end channel. The one to `shared_memory` says whether it was done; None for others.

        Raises ProtocolError.
        """
    def freeze(self) -> int | None:
        """Stop the rings, so that a successor can go on. Wait for the token, if there is one, and `resume` it; then
        `snapshot`, and then either `detach` or the ring messages of the snapshot, which start the rings again."""
    def snapshot(self) -> tuple[list[tuple[bytes, bytes, list[int]]], list[tuple[bytes, bytes, list[int]]]]:
        """The messages that make another session what this one is, as (header, payload, fds): everything but the rings,
        and the rings. The fds are duplicates, the caller's to close.

        Raises NativeError when a region's file isn't kept open.
        """
    @property
    def config_read(self) -> bool:
        """Whether the front end has read the configuration."""
    @property
    def config_pending(self) -> bool:
        """Whether it is still to be told of a change."""
    def take_over(self, config_read: bool) -> None:
        """A predecessor's snapshot comes next. config_read: the front end had read the configuration from it."""
    def taken_over(self) -> None:
        """The snapshot is complete: from here on it is the front end that speaks."""
    def detach(self) -> int | None:
        """Let go of the member: stop its rings. A token to wait for, or None when nothing was running. Idempotent."""

@final
class SharedMemoryOperation:
    """Something to be mapped into, or unmapped from, a device's shared memory region by its front end."""

    @property
    def map(self) -> bool: ...
    @property
    def offset(self) -> int:
        """In the region, bytes."""
    @property
    def size(self) -> int: ...
    @property
    def fd_offset(self) -> int:
        """In the file, bytes."""
    def fileno(self) -> int:
        """The file's descriptor, which stays this object's."""

@final
class MasterOutcome:
    """What a message of the master leaves to do."""

    @property
    def operations(self) -> list[SharedMemoryOperation]:
        """To be carried out by the device's front end one by one, `VhostUserDevice.carried_out` after each, then
        `commit`. If there are none the message is on its way to the driver."""
    def take_channel(self) -> int | None:
        """The socket for requests of the slave, from then on the caller's."""

@final
class VhostUserDevice:
    """A virtio-vhost-user device (v5), with the member that has its registers.

    A "relay" event (`Pool.take_events`) says that something has changed: the slave went up or down, a message was taken
    (`waiting`) or sent (`take`).
    """

    MAX_QUEUES: Final[int]
    QUEUE_SIZE: Final[int]

    def __new__(
        cls,
        pool: Pool,
        id: int,
        *,
        max_queues: int,
        uuid: bytes,
        shared_memory: int,
        vectors: int,
        ram_file: tuple[int, int] | None = None,
    ) -> VhostUserDevice:
        """`uuid`: 16 bytes, all 0 for none. `shared_memory`: bytes of the region, a power of two. `ram_file`: (fd,
        bytes) of the file that the region's first bytes show for good when the device is a PCI function; the fd is the
        device's.

        Raises NativeError.
        """
    @property
    def member(self) -> Member:
        """For a vhost-user session."""
    def function(self) -> Function:
        """The device as a PCI function. Raises NativeError."""
    @property
    def slave_up(self) -> bool:
        """The driver has set SLAVE_UP, and can be reached: a master may connect."""
    @property
    def ready(self) -> bool:
        """All rings run: the driver and the front end can be sent something."""
    @property
    def session(self) -> int | None:
        """The number of the connected master's session. It ends when the slave goes down, is reset, or is gone."""
    @property
    def waiting(self) -> int:
        """Messages that the driver hasn't taken yet. No other of the master's is to be read before there are none."""
    def leftovers(self) -> list[SharedMemoryOperation]:
        """What an earlier master has left in the region, to be unmapped before the next one connects."""
    def connect_master(self) -> int:
        """A master has connected: MASTER_UP. Returns the number of the session.

        A driver behind a vhost-user front end has to be told (`VhostUserServer.config_changed`). Raises BusyError.
        """
    def disconnect_master(self, session: int, rule: str | None = None, reason: str | None = None) -> bool:
        """The master has gone: SLAVE_UP and MASTER_UP are cleared. With a rule: it is sent away for that.

        False when the session had ended before. The driver is told as by `connect_master`.
        """
    def handle(self, session: int, header: bytes, payload: bytes, fds: list[int]) -> MasterOutcome:
        """Take a whole message of the master's. The fds are consumed, whatever happens.

        Raises ProtocolError: the session has ended because of that.
        """
    def carried_out(self, operation: SharedMemoryOperation) -> None:
        """The front end has done this."""
    def commit(self, session: int) -> None:
        """All operations of the last message were carried out: the driver may see it."""
    def handle_channel(self, session: int, header: bytes, payload: bytes) -> None:
        """Take an answer of the master's to a request of the slave's. Raises ProtocolError, as `handle`."""
    def take(self) -> list[tuple[bool, bytes]]:
        """What the slave has sent: whether it goes to the channel for its requests, and header and payload."""
    def info(self) -> dict[str, Any]:
        """Everything about the device; see docs/QMP.md."""

@final
class VhostUserDaemon:
    """The same member behind the stock `VhostUserDaemon` of the crate vhost-user-backend, for comparison."""

    def __new__(cls, member: Member, path: str) -> VhostUserDaemon:
        """Raises ValueError for a member with more queues than the crate serves (64)."""
    def run(self) -> None:
        """Bind `path` and serve one front end after the other until `close`.

        Blocks: call it in a thread. Raises OSError when the socket can't be bound.
        """
    def close(self) -> None:
        """Make `run` return, and wait until it has. Idempotent. Blocks: call it in a thread."""
