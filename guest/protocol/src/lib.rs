//! The agent protocol: what the host's engine and the guest's init say to each other over vsock.
//! This crate is its one definition; both ends link it.
//!
//! # Connections
//!
//! The guest's init listens on vsock port [`AGENT_PORT`]. When it does, it opens one connection to
//! the host (CID 2) on port [`READY_PORT`] and sends nothing: that is the host's notice that the agent
//! may be called (a missing listener on the host is not an error). The host keeps it as long as a
//! snapshot may be taken.
//!
//! The host opens every other connection. Each begins with a [`Hello`] frame from the host and a
//! [`HelloReply`] frame from the guest. After an accepted hello the connection is one of:
//!
//! - [`Purpose::Control`]: frames both ways, [`Request`] from the host, [`Message`] from the guest.
//!   The newest control connection wins; an older one is closed by the guest.
//! - [`Purpose::Stream`]: raw bytes of one standard stream of one process until either end
//!   half-closes. Standard input flows to the guest, the others to the host. With a terminal there
//!   are two streams only: [`Stream::Stdin`] and [`Stream::Stdout`]. Flow control is vsock's own
//!   credit: a host that does not read stops the process, not the agent.
//! - [`Purpose::Snapshot`]: before the guest accepts it, its processes stand still and its file
//!   systems are written. They go on when the host hangs up.
//!
//! Streams of a process are opened *before* its [`Request::Start`] and named in it, so that no
//! byte is lost and end-of-file means what it says.
//!
//! # Restored machines
//!
//! All connections are reset in a machine restored from a snapshot, which is how its agent knows. It
//! gives notice again; a call before that would be reset with the others. Processes that stood still
//! go on only after a [`Request::Identity`], for which the host attaches streams as for a start.
//!
//! # Frames
//!
//! A frame is a 32-bit little-endian length followed by that many bytes of postcard. A length above
//! [`MAX_FRAME`] or a body that does not decode ends the connection: the peer is hostile or broken.

#![forbid(unsafe_code)]

mod frame;

pub use frame::{FrameError, MAX_FRAME, read_frame, write_frame};

use serde::{Deserialize, Serialize};

/// Version of this protocol. Both ends must speak the same one.
pub const VERSION: u32 = 2;
/// vsock port on which the guest's agent listens.
pub const AGENT_PORT: u32 = 1024;
/// vsock port on the host that the agent calls when it listens.
pub const READY_PORT: u32 = 1024;

/// First frame of every connection, from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`] of the host.
    pub version: u32,
    /// What this connection is for.
    pub purpose: Purpose,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Requests and messages.
    Control,
    /// One standard stream of the process that a later [`Request::Start`] names by `process`.
    Stream {
        /// Chosen by the host, unique within the VM.
        process: u32,
        /// Which of its streams.
        stream: Stream,
    },
    /// Hold still for a snapshot, as long as the connection lasts.
    Snapshot,
}

/// A standard stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stream {
    /// Host to guest.
    Stdin,
    /// Guest to host; a terminal's output too.
    Stdout,
    /// Guest to host; absent with a terminal.
    Stderr,
}

/// Answer to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HelloReply {
    /// Go on.
    Accepted,
    /// The guest speaks this version and closes.
    WrongVersion(u32),
    /// The stream named is attached already, or too many are open; the guest closes.
    Refused(String),
}

/// Host to guest on a control connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Set the machine up (once) and start its main process. Answered by [`Message::Started`] or
    /// [`Message::StartFailed`].
    Start(Box<Start>),
    /// Send a signal to a process. `group` sends it to the process group, as a terminal would.
    Signal {
        /// The process, as named by the host.
        process: u32,
        /// Linux signal number.
        signal: i32,
        /// To its process group.
        group: bool,
    },
    /// The terminal's size changed.
    Resize {
        /// The process, as named by the host.
        process: u32,
        /// The new size.
        size: WindowSize,
    },
    /// Stop every process, sync, unmount and power off. Answered by the VM's end.
    PowerOff,
    /// Become a machine of its own after a restore. Answered by [`Message::Identified`] or
    /// [`Message::StartFailed`].
    Identity(Box<Identity>),
}

/// Guest to host on a control connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The main process runs.
    Started {
        /// The process, as named by the host.
        process: u32,
    },
    /// It could not be started; the guest powers off after this message was read or 1 s passed.
    StartFailed {
        /// What kind of failure: decides the exit status of `vmrun run` (125, 126 or 127).
        kind: StartFailure,
        /// One line for a user.
        message: String,
    },
    /// A process ended. For the main process this comes after its output was handed to the streams
    /// and file systems were synced; the guest then powers off.
    Exited {
        /// The process, as named by the host.
        process: u32,
        /// Exit status as a shell tells it: the process's own, or 128 + signal.
        status: u8,
        /// Whether the guest's kernel killed it for want of memory.
        out_of_memory: bool,
    },
    /// The machine has its identity, and its processes go on.
    Identified {
        /// The main process, or none where the machine still waits for its start.
        process: Option<u32>,
    },
}

/// Why a start failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartFailure {
    /// The machine could not be set up (mount, network, user not found, ...): 125.
    Setup,
    /// The program is there and cannot be run (permission, format, directory): 126.
    CannotExecute,
    /// There is no such program: 127.
    NotFound,
}

/// All that a machine needs to know to run an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The root file system.
    pub root: Root,
    /// Mounted over the root, in order, after /proc, /sys, /dev and the like.
    pub mounts: Vec<Mount>,
    /// Host name; also added to /etc/hosts.
    pub hostname: String,
    /// The interface and name resolution. `None` leaves loopback only.
    pub network: Option<Network>,
    /// Wall clock at the time of the request, nanoseconds since 1970; the guest's clock is set to it.
    pub time_ns: u64,
    /// Bytes of entropy for the guest's pool; may be empty.
    pub entropy: Vec<u8>,
    /// What an image that has /etc/machine-id finds there, 32 hexadecimal digits; empty for the
    /// image's own.
    pub machine_id: String,
    /// The main process.
    pub process: Process,
}

/// What tells a restored machine from others of the same snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Host name.
    pub hostname: String,
    /// The interface, its MAC address being a new one, and name resolution. `None` leaves them.
    pub network: Option<Network>,
    /// Wall clock at the time of the request, nanoseconds since 1970.
    pub time_ns: u64,
    /// Bytes of entropy for the guest's pool.
    pub entropy: Vec<u8>,
    /// For /etc/machine-id where there is one: 32 hexadecimal digits.
    pub machine_id: String,
    /// Which streams of the main process the host has attached anew. Input that is not has ended;
    /// other output is dropped.
    pub streams: Vec<Stream>,
}

/// The root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The image: a read-only EROFS device, for example `/dev/vda`.
    pub device: String,
    /// What is laid over it.
    pub writable: Writable,
}

/// What is laid over the read-only image with overlayfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Writable {
    /// Nothing: the root is read-only (`--read-only`).
    No,
    /// A tmpfs of at most so many bytes.
    Tmpfs {
        /// Upper bound in bytes; 0: half the memory.
        size: u64,
    },
    /// An ext4 file system on a block device, for example `/dev/vdb`.
    Device(String),
}

/// One mount in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What is mounted.
    pub source: MountSource,
    /// Absolute path below the new root; made when missing.
    pub target: String,
    /// Read-only.
    pub read_only: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A fresh tmpfs.
    Tmpfs {
        /// Upper bound in bytes; 0: half the memory.
        size: u64,
        /// Permission bits of its root, for example 0o1777.
        mode: u32,
        /// noexec
        no_exec: bool,
    },
    /// A block device with the file system named: a volume kept in a file of the host.
    Device {
        /// For example `/dev/vdc`.
        device: String,
        /// For example `ext4`.
        fs_type: String,
        /// Fill an empty volume from what the image has at the target, as named volumes do.
        copy_up: bool,
    },
}

/// The interface `eth0` and name resolution.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The interface's MAC address; the interface is found by it.
    pub mac: [u8; 6],
    /// IPv4 address and prefix length.
    pub address: ([u8; 4], u8),
    /// IPv4 default gateway.
    pub gateway: Option<[u8; 4]>,
    /// MTU in bytes; 0 leaves the driver's.
    pub mtu: u16,
    /// Name servers for /etc/resolv.conf.
    pub dns: Vec<String>,
    /// Search domains.
    pub dns_search: Vec<String>,
    /// Options of resolv.conf.
    pub dns_options: Vec<String>,
    /// Further lines of /etc/hosts: name and address.
    pub extra_hosts: Vec<(String, String)>,
}

/// A process to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The host's name for it; 0 is the main process.
    pub id: u32,
    /// Program and arguments; not empty. A program without `/` is sought in the environment's PATH.
    pub argv: Vec<String>,
    /// `NAME=value`. HOME is added from the image's passwd where it is missing.
    pub env: Vec<String>,
    /// Absolute working directory; made when missing.
    pub cwd: String,
    /// `USER[:GROUP]`, by name (in the image's passwd and group) or number; empty is root.
    pub user: String,
    /// Supplementary groups, by name or number, beside those of the image's group file.
    pub groups: Vec<String>,
    /// A controlling terminal of this size.
    pub terminal: Option<WindowSize>,
    /// Which streams the host has attached. A stream that is not is /dev/null.
    pub streams: Vec<Stream>,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// A resource limit, by `RLIMIT_*` number of Linux on x86_64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// For example 7, `RLIMIT_NOFILE`.
    pub resource: u32,
    /// Soft limit; `u64::MAX` is none.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}
