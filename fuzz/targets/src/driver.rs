//! A device of each kind behind its registers, with guest memory, an event loop, and a driver that
//! knows how to set it up.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use devices::GuestMemory;
use devices::bus::BusDevice;
use devices::virtio::balloon::{Balloon, BalloonOptions};
use devices::virtio::block::{Block, BlockOptions, Disk, Engine};
use devices::virtio::console::Console;
use devices::virtio::mem::{Mem, MemOptions, SlotSink};
use devices::virtio::mmio::MmioTransport;
use devices::virtio::negotiation::NegotiationState;
use devices::virtio::net::{Backend, Net, NetOptions};
use devices::virtio::pmem::{Pmem, PmemFile};
use devices::virtio::rng::{Rng, RngOptions};
use devices::virtio::vsock::Vsock;
use devices::virtio::{DeviceState, VirtioDevice};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tempfile::TempDir;
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, FileOffset, GuestAddress};

use crate::{memory_file, path_of};

/// Bytes of guest memory at address 0.
pub const MEMORY: u64 = 1 << 20;
/// Where the rings of the first queue are; those of a queue take three pages of 4 KiB.
const RINGS: u64 = 0x1000;
const PAGE: u64 = 0x1000;
/// Where memory can be plugged, and how much.
const PLUGGED: u64 = 1 << 32;
const PLUGGABLE_MIB: u32 = 256;
/// Most descriptors of a queue, as far as rings fit into a page each.
const MAX_SIZE: u32 = 256;
/// Events after which a device must have come to rest.
const EVENTS: usize = 10_000;
/// A port of the host's on which a program listens.
const LISTENED: u32 = 1024;

/// What devices there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Block,
    /// By io_uring.
    BlockAsync,
    Rng,
    Balloon,
    Vsock,
    Console,
    Mem,
    Pmem,
    Net,
}

/// The device, and what the host has of it.
pub enum Device {
    Block(Arc<Mutex<Block>>),
    Balloon(Arc<Mutex<Balloon>>),
    Mem(Arc<Mutex<Mem>>),
    Vsock { device: Arc<Mutex<Vsock>>, folder: TempDir, listener: UnixListener },
    Net { device: Arc<Mutex<Net<Wire>>>, host: OwnedFd },
    Other(Arc<Mutex<dyn VirtioDevice>>),
}

/// A device with its driver.
pub struct Rig {
    pub memory: GuestMemory,
    pub transport: MmioTransport,
    pub device: Device,
    events: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>>,
    /// Index of each queue's available ring, and the queues' sizes.
    available: Vec<u16>,
    sizes: Vec<u16>,
    kind: Kind,
}

/// A network interface whose other end is a socket.
pub struct Wire(OwnedFd);

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backend for Wire {
    fn set_offloads(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Slots of memory, of which the device must not add one twice.
struct Slots(BTreeSet<usize>);

impl SlotSink for Slots {
    fn set_slot(&mut self, index: usize, plugged: bool) -> io::Result<()> {
        assert!(index < (PLUGGABLE_MIB / 128) as usize);
        assert!(if plugged { self.0.insert(index) } else { self.0.remove(&index) });
        Ok(())
    }
}

impl Device {
    /// A device of this kind.
    pub fn new(kind: Kind) -> Device {
        let shared = |device| Device::Other(device);
        match kind {
            Kind::Block | Kind::BlockAsync => {
                let engine = if kind == Kind::Block { Engine::Sync } else { Engine::Async };
                let file = memory_file();
                file.set_len(64 << 10).unwrap();
                let disk = Disk::open(&path_of(&file), false).unwrap();
                let options =
                    BlockOptions { id: "fuzz".into(), flush: true, engine, ..Default::default() };
                Device::Block(Arc::new(Mutex::new(Block::new(options, disk).unwrap())))
            }
            Kind::Rng => shared(Arc::new(Mutex::new(Rng::new(RngOptions::default()).unwrap()))),
            Kind::Balloon => {
                let options = BalloonOptions {
                    amount_mib: 1,
                    deflate_on_oom: true,
                    stats_polling_interval_s: 1,
                    free_page_hinting: true,
                    free_page_reporting: true,
                };
                Device::Balloon(Arc::new(Mutex::new(Balloon::new(options).unwrap())))
            }
            Kind::Vsock => {
                let folder = TempDir::new().unwrap();
                let path = folder.path().join("v");
                let listener = folder.path().join(format!("v_{LISTENED}"));
                let listener = UnixListener::bind(listener).unwrap();
                listener.set_nonblocking(true).unwrap();
                let device = Arc::new(Mutex::new(Vsock::new(3, &path).unwrap()));
                Device::Vsock { device, folder, listener }
            }
            Kind::Console => {
                let console = Console::new(Box::new(io::sink()), 1 << 16).unwrap();
                shared(Arc::new(Mutex::new(console)))
            }
            Kind::Mem => {
                let options = MemOptions {
                    total_size_mib: PLUGGABLE_MIB,
                    slot_size_mib: 128,
                    block_size_mib: 2,
                };
                let sink = Box::new(Slots(BTreeSet::new()));
                let mem = Mem::new(options, GuestAddress(PLUGGED), sink).unwrap();
                Device::Mem(Arc::new(Mutex::new(mem)))
            }
            Kind::Pmem => {
                let file = memory_file();
                file.set_len(64 << 10).unwrap();
                let file = PmemFile::open(&path_of(&file), false).unwrap();
                let pmem = Pmem::new("fuzz", file, GuestAddress(PLUGGED)).unwrap();
                shared(Arc::new(Mutex::new(pmem)))
            }
            Kind::Net => {
                let (host, ours) = socketpair(
                    AddressFamily::Unix,
                    SockType::SeqPacket,
                    None,
                    SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
                )
                .unwrap();
                let options = NetOptions {
                    id: "fuzz".into(),
                    mac: Some([2, 0, 0, 0, 0, 1]),
                    mtu: Some(1500),
                    ..NetOptions::default()
                };
                let device = Arc::new(Mutex::new(Net::new(options, Wire(ours)).unwrap()));
                Device::Net { device, host }
            }
        }
    }

    /// As the transport knows it.
    pub fn shared(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        match self {
            Device::Block(device) => device.clone(),
            Device::Balloon(device) => device.clone(),
            Device::Mem(device) => device.clone(),
            Device::Vsock { device, .. } => device.clone(),
            Device::Net { device, .. } => device.clone(),
            Device::Other(device) => device.clone(),
        }
    }

    /// As the event loop knows it.
    pub fn subscriber(&self) -> Arc<Mutex<dyn MutEventSubscriber + Send>> {
        match self {
            Device::Block(device) => device.clone(),
            Device::Balloon(device) => device.clone(),
            Device::Mem(device) => device.clone(),
            Device::Vsock { device, .. } => device.clone(),
            Device::Net { device, .. } => device.clone(),
            Device::Other(device) => device.clone(),
        }
    }

    /// Where a vsock device listens.
    pub fn path(folder: &TempDir) -> PathBuf {
        folder.path().join("v")
    }
}

impl Rig {
    /// A device that its driver has not found yet.
    pub fn new(kind: Kind) -> Rig {
        let backing = Arc::new(memory_file());
        let mut regions = vec![(GuestAddress(0), MEMORY as usize)];
        if kind == Kind::Mem {
            regions.push((GuestAddress(PLUGGED), (PLUGGABLE_MIB as usize) << 20));
        }
        let mut end = 0;
        let regions = regions.into_iter().map(|(start, size)| {
            end += size as u64;
            (start, size, Some(FileOffset::from_arc(backing.clone(), end - size as u64)))
        });
        let regions: Vec<_> = regions.collect();
        backing.set_len(end).unwrap();
        let memory = GuestMemory::from_ranges_with_files(regions).unwrap();
        Rig::with_memory(kind, memory)
    }

    fn with_memory(kind: Kind, memory: GuestMemory) -> Rig {
        let device = Device::new(kind);
        let transport = MmioTransport::new(memory.clone(), device.shared()).unwrap();
        let mut events = EventManager::<Arc<Mutex<dyn MutEventSubscriber + Send>>>::new().unwrap();
        events.add_subscriber(device.subscriber());
        let queues = device.shared().lock().unwrap().queue_max_sizes().len();
        let (available, sizes) = (vec![0; queues], vec![1; queues]);
        Rig { memory, transport, device, events, available, sizes, kind }
    }

    /// Puts another device in its place, which takes up what this one knew, as after a snapshot.
    pub fn restore_elsewhere(&mut self) {
        let (registers, state): (NegotiationState, DeviceState) = {
            let registers = self.transport.save();
            // Nothing is in flight in a snapshot.
            self.device.shared().lock().unwrap().drain();
            let state = self.device.shared().lock().unwrap().save();
            // By way of a file.
            let bytes = rmp_serde::to_vec_named(&(registers, state)).unwrap();
            rmp_serde::from_slice(&bytes).unwrap()
        };
        let mut heir = Rig::with_memory(self.kind, self.memory.clone());
        heir.device.shared().lock().unwrap().restore(state).unwrap();
        heir.transport.restore(&registers).unwrap();
        heir.available.clone_from(&self.available);
        heir.sizes.clone_from(&self.sizes);
        *self = heir;
        self.settle();
    }

    /// Lets the event loop run until nothing is left to do.
    pub fn settle(&mut self) {
        for _ in 0..EVENTS {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    /// Reads a register.
    pub fn register(&mut self, offset: u32) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset.into(), &mut word);
        u32::from_le_bytes(word)
    }

    /// Writes a register.
    pub fn set_register(&mut self, offset: u32, value: u32) {
        self.transport.write(offset.into(), &value.to_le_bytes());
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        self.available.len()
    }

    /// Where a queue's descriptors, available and used ring are.
    pub fn rings(queue: usize) -> [u64; 3] {
        let base = RINGS + queue as u64 * 3 * PAGE;
        [base, base + PAGE, base + 2 * PAGE]
    }

    /// A driver's way from a reset to `DRIVER_OK` with those features that are offered, and queues
    /// of this size, where that is not too much.
    pub fn set_up(&mut self, features: u64, size: u16) {
        self.set_register(VIRTIO_MMIO_STATUS, 0);
        for queue in 0..self.queues() {
            self.memory
                .write_slice(&[0; 3 * PAGE as usize], GuestAddress(Self::rings(queue)[0]))
                .unwrap();
            self.available[queue] = 0;
        }
        for status in [1, 3] {
            self.set_register(VIRTIO_MMIO_STATUS, status);
        }
        for page in 0..2 {
            self.set_register(VIRTIO_MMIO_DEVICE_FEATURES_SEL, page);
            let offered = self.register(VIRTIO_MMIO_DEVICE_FEATURES);
            self.set_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
            let wanted = (features >> (32 * page)) as u32;
            self.set_register(VIRTIO_MMIO_DRIVER_FEATURES, offered & wanted);
        }
        self.set_register(VIRTIO_MMIO_STATUS, 11);
        for queue in 0..self.queues() {
            self.set_register(VIRTIO_MMIO_QUEUE_SEL, queue as u32);
            let max = self.register(VIRTIO_MMIO_QUEUE_NUM_MAX).min(MAX_SIZE);
            let size = u32::from(size).min(max);
            self.set_register(VIRTIO_MMIO_QUEUE_NUM, size);
            self.sizes[queue] = (size as u16).max(1);
            let registers = [
                VIRTIO_MMIO_QUEUE_DESC_LOW,
                VIRTIO_MMIO_QUEUE_AVAIL_LOW,
                VIRTIO_MMIO_QUEUE_USED_LOW,
            ];
            for (register, ring) in registers.into_iter().zip(Self::rings(queue)) {
                self.set_register(register, ring as u32);
            }
            self.set_register(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.set_register(VIRTIO_MMIO_STATUS, 15);
        self.settle();
    }

    /// A device works again after a reset, whatever was before.
    pub fn check_reset(&mut self) {
        self.set_up(u64::MAX, 16);
        let status = self.register(VIRTIO_MMIO_STATUS);
        assert_eq!(status & VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_DRIVER_OK);
        assert_eq!(status & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    }

    /// Writes to guest memory, as far as there is some.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(address));
    }

    /// Writes a descriptor of a queue's table.
    pub fn put(&self, queue: usize, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = Self::rings(queue)[0] + 16 * u64::from(index % MAX_SIZE as u16);
        let rest = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &rest.to_le_bytes());
    }

    /// Makes a head available, and says so.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let slot = self.available[queue] % self.sizes[queue];
        let slot = Self::rings(queue)[1] + 4 + 2 * u64::from(slot);
        self.write(slot, &head.to_le_bytes());
        self.set_available(queue, self.available[queue].wrapping_add(1));
    }

    /// Sets the index of an available ring.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        self.available[queue] = index;
        self.write(Self::rings(queue)[1] + 2, &index.to_le_bytes());
        self.set_register(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
    }
}
