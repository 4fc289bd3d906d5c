//! The registers, read and written as a driver does, and as no driver should.

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::*;
use crate::virtio::ActivateError;

const MEMORY: u64 = 0x10000;
const MAX: u16 = 16;
const OFFERED: u64 = (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | 1;
const CONFIG: [u8; 6] = [1, 2, 3, 4, 5, 6];

/// Records what reaches a device.
struct Fake {
    events: [EventFd; 2],
    activations: Vec<Activation>,
    resets: u32,
    written: Vec<(u64, Vec<u8>)>,
    refuses: bool,
}

impl MutEventSubscriber for Fake {
    fn init(&mut self, _ops: &mut EventOps) {}
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {}
}

impl VirtioDevice for Fake {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[MAX, MAX]
    }
    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_bytes(&CONFIG, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.written.push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.refuses {
            let (device, reason) = ("fake".to_owned(), "told to".to_owned());
            return Err(ActivateError { device, reason });
        }
        self.activations.push(activation);
        Ok(())
    }
    fn reset(&mut self) {
        self.resets += 1;
    }
    fn queue_positions(&self) -> Vec<Option<QueuePosition>> {
        let Some(activation) = self.activations.last() else { return Vec::new() };
        let position = |queue: &Queue| QueuePosition {
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
        };
        activation.queues.iter().map(|queue| queue.as_ref().map(position)).collect()
    }
}

/// The registers of a fake device, and the device.
struct Guest {
    registers: MmioTransport,
    device: Arc<Mutex<Fake>>,
}

impl Guest {
    fn new() -> Guest {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let device = Arc::new(Mutex::new(Fake {
            events: [event(), event()],
            activations: Vec::new(),
            resets: 0,
            written: Vec::new(),
            refuses: false,
        }));
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let registers = MmioTransport::new(memory, device.clone()).unwrap();
        Guest { registers, device }
    }

    /// A driver that got as far as `FEATURES_OK`.
    fn with_features() -> Guest {
        let mut guest = Guest::new();
        guest.status(ACKNOWLEDGE);
        guest.status(ACKNOWLEDGE | DRIVER);
        guest.accept(OFFERED);
        assert_eq!(guest.status(FEATURES), FEATURES);
        guest
    }

    /// A driver that has set up both queues.
    fn with_queues() -> Guest {
        let mut guest = Guest::with_features();
        guest.set_up(0, &Registers::good(0));
        guest.set_up(1, &Registers::good(1));
        guest
    }

    fn get(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.registers.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u32, value: u32) {
        self.registers.write(offset.into(), &value.to_le_bytes());
    }

    /// Writes the status and returns what it became.
    fn status(&mut self, status: u32) -> u32 {
        self.set(VIRTIO_MMIO_STATUS, status);
        self.get(VIRTIO_MMIO_STATUS)
    }

    fn accept(&mut self, features: u64) {
        for (page, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
    }

    fn set_up(&mut self, queue: u32, registers: &Registers) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, queue);
        self.set(VIRTIO_MMIO_QUEUE_NUM, registers.size);
        for (low, high, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, registers.descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, registers.available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, registers.used),
        ] {
            self.set(low, address as u32);
            self.set(high, (address >> 32) as u32);
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn activations(&self) -> usize {
        self.device.lock().unwrap().activations.len()
    }

    /// Whether the line was raised since this was last asked.
    fn interrupted(&self) -> bool {
        self.registers.interrupt_event().read().is_ok()
    }
}

const FEATURES: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;
const RUNNING: u32 = FEATURES | DRIVER_OK;

/// What a driver says of one queue.
#[derive(Clone, Debug)]
struct Registers {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl Registers {
    fn good(queue: u64) -> Registers {
        let base = 0x1000 + queue * 0x3000;
        Registers { size: 8, descriptors: base, available: base + 0x1000, used: base + 0x2000 }
    }
}

#[test]
fn a_driver_that_keeps_the_order_starts_the_device_and_stops_it() {
    let mut guest = Guest::with_queues();
    assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 1);
    assert_eq!(guest.status(RUNNING), RUNNING);
    {
        let device = guest.device.lock().unwrap();
        let [activation] = device.activations.as_slice() else { panic!("not activated once") };
        assert_eq!(activation.features, OFFERED);
        for (index, queue) in (0..).zip(&activation.queues) {
            let (queue, good) = (queue.as_ref().unwrap(), Registers::good(index));
            assert_eq!(u32::from(queue.size()), good.size);
            let rings = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
            assert_eq!(rings, (good.descriptors, good.available, good.used));
            assert!(queue.event_idx_enabled());
        }
    }
    // Interrupts: raised by the device, seen and acknowledged by the driver.
    let interrupt = guest.device.lock().unwrap().activations[0].interrupt.clone();
    assert_eq!(guest.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    interrupt.used_buffers(1);
    interrupt.config_changed();
    assert!(guest.interrupted());
    assert_eq!(guest.get(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    guest.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(guest.get(VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    interrupt.needs_reset();
    assert!(guest.interrupted());
    assert_eq!(guest.get(VIRTIO_MMIO_STATUS), RUNNING | NEEDS_RESET);
    // A reset forgets all of it.
    assert_eq!(guest.status(0), 0);
    assert_eq!(guest.device.lock().unwrap().resets, 1);
    assert_eq!(guest.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    guest.set(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn a_driver_may_do_without_event_indices_and_without_a_queue() {
    let mut guest = Guest::new();
    guest.status(ACKNOWLEDGE | DRIVER);
    guest.accept(1 << VIRTIO_F_VERSION_1);
    guest.status(FEATURES);
    guest.set_up(1, &Registers::good(1));
    assert_eq!(guest.status(RUNNING), RUNNING);
    let device = guest.device.lock().unwrap();
    let queues = &device.activations[0].queues;
    assert!(queues[0].is_none());
    assert!(!queues[1].as_ref().unwrap().event_idx_enabled());
}

#[test]
fn features_are_agreed_on_only_within_the_offer_and_with_version_1() {
    let version = 1 << VIRTIO_F_VERSION_1;
    for (features, agreed) in [
        (OFFERED, true),
        (version, true),
        (0, false),
        (OFFERED & !version, false),
        (OFFERED | 2, false),
        (OFFERED | 1 << 63, false),
    ] {
        let mut guest = Guest::new();
        guest.status(ACKNOWLEDGE | DRIVER);
        guest.accept(features);
        let expected = if agreed { FEATURES } else { ACKNOWLEDGE | DRIVER };
        assert_eq!(guest.status(FEATURES), expected, "{features:#x}");
        // No way round it.
        guest.status(FEATURES | DRIVER_OK);
        assert_eq!(guest.activations(), usize::from(agreed), "{features:#x}");
    }
}

/// HOSTILE.md 5: a queue of such a size or in such a place starts no device.
#[test]
fn hostile_5_queues_that_cannot_be_start_no_device() {
    let good = Registers::good(1);
    let with = |change: fn(&mut Registers)| {
        let mut registers = good.clone();
        change(&mut registers);
        registers
    };
    let bad = [
        with(|queue| queue.size = 0),
        with(|queue| queue.size = 7),
        with(|queue| queue.size = 32),
        with(|queue| queue.size = 0x1_0008),
        with(|queue| queue.size = u32::MAX),
        with(|queue| queue.descriptors += 8),
        with(|queue| queue.available += 1),
        with(|queue| queue.used += 2),
        with(|queue| queue.descriptors = MEMORY),
        with(|queue| queue.descriptors = MEMORY - 16),
        with(|queue| queue.available = MEMORY - 4),
        with(|queue| queue.used = MEMORY - 8),
        with(|queue| queue.used = 1 << 40),
        with(|queue| queue.descriptors = !15),
        with(|queue| queue.used = !3),
        with(|queue| queue.used = queue.available),
        with(|queue| queue.available = queue.descriptors + 126),
        with(|queue| queue.used = queue.available + 20),
        with(|queue| queue.descriptors = queue.used),
    ];
    for registers in bad {
        let mut guest = Guest::with_features();
        guest.set_up(0, &Registers::good(0));
        guest.set_up(1, &registers);
        assert_eq!(guest.status(RUNNING), RUNNING | NEEDS_RESET, "{registers:x?}");
        assert_eq!(guest.activations(), 0, "{registers:x?}");
        assert!(guest.interrupted());
        assert_eq!(guest.get(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
        // The next driver is none the worse.
        guest.status(0);
        guest.status(ACKNOWLEDGE | DRIVER);
        guest.accept(OFFERED);
        guest.status(FEATURES);
        guest.set_up(0, &Registers::good(0));
        guest.set_up(1, &Registers::good(1));
        assert_eq!(guest.status(RUNNING), RUNNING);
        assert_eq!(guest.activations(), 1);
    }
}

/// A value that cannot be is not forgotten in favour of the one before.
#[test]
fn hostile_5_a_bad_value_after_a_good_one_counts() {
    let mut guest = Guest::with_queues();
    guest.set(VIRTIO_MMIO_QUEUE_NUM, 5);
    guest.status(RUNNING);
    assert_eq!(guest.activations(), 0);
    let mut guest = Guest::with_queues();
    guest.set(VIRTIO_MMIO_QUEUE_USED_LOW, 0x6001);
    guest.status(RUNNING);
    assert_eq!(guest.activations(), 0);
}

/// HOSTILE.md 5 and 7, CVE-2026-5747: what a device was started with does not change under it.
#[test]
fn hostile_7_queues_and_features_are_frozen_once_the_device_runs() {
    let mut guest = Guest::with_queues();
    guest.status(RUNNING);
    guest.set_up(0, &Registers { size: 16, descriptors: 0x8000, available: 0x9000, used: 0xa000 });
    guest.set(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 1);
    guest.accept(1 << VIRTIO_F_VERSION_1);
    // Neither by another DRIVER_OK, nor by taking the first one back.
    for status in [RUNNING, FEATURES, ACKNOWLEDGE, RUNNING, FEATURES | NEEDS_RESET, RUNNING] {
        assert_eq!(guest.status(status), RUNNING);
    }
    assert_eq!(guest.activations(), 1);
    assert_eq!(guest.device.lock().unwrap().resets, 0);
    // Nor are registers that are set before features are agreed on.
    let mut guest = Guest::new();
    guest.status(ACKNOWLEDGE | DRIVER);
    guest.set_up(0, &Registers::good(0));
    assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 0);
    // Features not after FEATURES_OK.
    let mut guest = Guest::with_features();
    guest.accept(0);
    guest.set_up(0, &Registers::good(0));
    guest.status(RUNNING);
    assert_eq!(guest.device.lock().unwrap().activations[0].features, OFFERED);
}

#[test]
fn hostile_7_a_driver_that_gave_up_can_only_reset() {
    let mut guest = Guest::with_queues();
    assert_eq!(guest.status(FEATURES | FAILED), FEATURES | FAILED);
    guest.status(RUNNING | FAILED);
    assert_eq!(guest.activations(), 0);
    assert_eq!(guest.status(0), 0);
    // Giving up and starting in one breath.
    let mut guest = Guest::with_queues();
    guest.status(RUNNING | FAILED);
    assert_eq!(guest.activations(), 0);
}

#[test]
fn hostile_7_a_device_that_cannot_start_says_so() {
    let mut guest = Guest::with_queues();
    guest.device.lock().unwrap().refuses = true;
    assert_eq!(guest.status(RUNNING), RUNNING | NEEDS_RESET);
    guest.device.lock().unwrap().refuses = false;
    guest.status(RUNNING);
    assert_eq!(guest.activations(), 0);
}

/// HOSTILE.md 7: notifications at any time, of any queue.
#[test]
fn hostile_7_notifications_reach_the_queue_they_name_and_no_other() {
    let mut guest = Guest::new();
    let events = guest.registers.queue_events().unwrap();
    for queue in [2, 0xffff, 0x1_0000, u32::MAX] {
        guest.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }
    assert!(events.iter().all(|event| event.read().is_err()));
    for _ in 0..1000 {
        guest.set(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    }
    assert!(events[0].read().is_err());
    assert_eq!(events[1].read().unwrap(), 1000);
    assert_eq!(guest.activations(), 0);
}

#[test]
fn registers_tell_what_the_device_is() {
    let mut guest = Guest::new();
    assert_eq!(guest.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(guest.get(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(guest.get(VIRTIO_MMIO_DEVICE_ID), 42);
    assert_ne!(guest.get(VIRTIO_MMIO_VENDOR_ID), 0);
    for (page, half) in [(0, OFFERED as u32), (1, (OFFERED >> 32) as u32), (2, 0), (u32::MAX, 0)] {
        guest.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, page);
        assert_eq!(guest.get(VIRTIO_MMIO_DEVICE_FEATURES), half);
    }
    for (queue, max) in [(0, MAX), (1, MAX), (2, 0), (u32::MAX, 0)] {
        guest.set(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(max));
    }
    // No shared memory (virtio 1.2, 4.2.2.2): length and base are all ones.
    for offset in (0xb0..=0xbc).step_by(4) {
        assert_eq!(guest.get(offset), u32::MAX);
    }
}

/// HOSTILE.md 9: every register in every size, aligned or not; the configuration past its end.
#[test]
fn hostile_9_every_offset_and_size_is_answered() {
    let mut guest = Guest::with_features();
    for offset in 0..0x100u64 {
        for size in 0..=9 {
            let mut data = vec![0xee; size];
            guest.registers.read(offset, &mut data);
            if size != 4 || offset % 4 != 0 {
                assert_eq!(data, vec![0; size], "{offset:#x}, {size} bytes");
            }
            // A write that is no register access must not be one: not a reset, above all.
            if size != 4 || offset % 4 != 0 {
                guest.registers.write(offset, &data);
            }
        }
    }
    assert_eq!(guest.get(VIRTIO_MMIO_STATUS), FEATURES);
    // Read-only ones.
    for offset in [VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_QUEUE_NUM_MAX] {
        let before = guest.get(offset);
        guest.set(offset, !before);
        assert_eq!(guest.get(offset), before);
    }
    // Registers of queues that are not there.
    guest.set_up(2, &Registers::good(0));
    guest.set_up(u32::MAX, &Registers::good(0));
    assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 0);
    // The configuration has any size, and ends.
    let mut data = [0xee; 8];
    guest.registers.read(0x100, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 0, 0]);
    for offset in [0x105, 0x106, 0xfff, u64::MAX] {
        let mut data = [0xee; 2];
        guest.registers.read(offset, &mut data);
        assert_eq!(data, if offset == 0x105 { [6, 0] } else { [0, 0] });
        guest.registers.write(offset, &data);
    }
    assert_eq!(guest.device.lock().unwrap().written.len(), 4);
}

#[test]
fn the_configuration_is_not_written_before_there_is_a_driver() {
    let mut guest = Guest::new();
    guest.registers.write(0x100, &[1]);
    guest.status(ACKNOWLEDGE);
    guest.registers.write(0x100, &[1]);
    assert!(guest.device.lock().unwrap().written.is_empty());
    guest.status(ACKNOWLEDGE | DRIVER);
    guest.registers.write(0x102, &[7]);
    assert_eq!(guest.device.lock().unwrap().written, [(2, vec![7])]);
}

#[test]
fn a_restored_device_goes_on_where_the_other_stood() {
    let mut guest = Guest::with_queues();
    assert_eq!(guest.status(RUNNING), RUNNING);
    {
        let mut device = guest.device.lock().unwrap();
        let queue = device.activations[0].queues[1].as_mut().unwrap();
        queue.set_next_avail(700);
        queue.set_next_used(699);
    }
    let state = guest.registers.save();
    let bytes = serde_json::to_vec(&state).unwrap();
    let mut other = Guest::new();
    other.registers.restore(serde_json::from_slice(&bytes).unwrap()).unwrap();
    assert_eq!(other.registers.save(), state);
    assert_eq!(other.get(VIRTIO_MMIO_STATUS), RUNNING);
    let device = other.device.lock().unwrap();
    let queue = device.activations[0].queues[1].as_ref().unwrap();
    assert_eq!((queue.next_avail(), queue.next_used()), (700, 699));
    assert_eq!(device.activations[0].features, OFFERED);
}

/// It may be in no processor's state yet.
#[test]
fn an_interrupt_that_was_not_acknowledged_comes_again_when_restored() {
    let mut guest = Guest::with_queues();
    guest.status(RUNNING);
    let quiet = guest.registers.save();
    guest.registers.line.used_buffers(0);
    let interrupted = guest.registers.save();
    for (state, cause) in [(quiet, 0), (interrupted, VIRTIO_MMIO_INT_VRING)] {
        let mut other = Guest::new();
        other.registers.restore(state).unwrap();
        assert_eq!(other.get(VIRTIO_MMIO_INTERRUPT_STATUS), cause);
        assert_eq!(other.registers.interrupt_event().read().is_ok(), cause != 0);
    }
}

#[test]
fn a_device_that_did_not_run_does_not_run_when_restored() {
    let state = Guest::with_queues().registers.save();
    let mut other = Guest::new();
    other.registers.restore(state).unwrap();
    assert_eq!((other.get(VIRTIO_MMIO_STATUS), other.activations()), (FEATURES, 0));
    // Its driver goes on.
    assert_eq!(other.status(RUNNING), RUNNING);
    assert_eq!(other.activations(), 1);
}

/// HOSTILE.md 25: a state that no driver can have made.
#[test]
fn hostile_25_states_that_cannot_be_are_refused() {
    let good = || {
        let mut guest = Guest::with_queues();
        guest.status(RUNNING);
        guest.registers.save()
    };
    let spoilers: [fn(&mut MmioState); 6] = [
        |state| state.queues[0].max_size = 32768,
        |state| state.queues.truncate(1),
        |state| state.driver_features = u64::MAX,
        |state| state.queues[0].used = u64::MAX - 3,
        |state| state.queues[1].ready = false,
        |state| state.positions.truncate(1),
    ];
    for (number, spoil) in spoilers.into_iter().enumerate() {
        let mut state = good();
        spoil(&mut state);
        let mut guest = Guest::new();
        assert!(guest.registers.restore(state).is_err(), "{number}");
        assert_eq!(guest.activations(), 0, "{number}");
    }
}
