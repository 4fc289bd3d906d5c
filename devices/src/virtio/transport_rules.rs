//! The rules that drivers keep and break, the same over every transport.

use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::negotiation::{
    ACKNOWLEDGE, CONFIG_CHANGED, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET,
    NegotiationState,
};
use super::{ActivateError, Activation, QueuePosition, RestoreError, VirtioDevice};
use crate::GuestMemory;

pub const MEMORY: u64 = 0x10000;
pub const MAX: u16 = 16;
pub const OFFERED: u64 = (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | 1;
pub const CONFIG: [u8; 6] = [1, 2, 3, 4, 5, 6];

/// Records what reaches a device.
pub struct Fake {
    pub events: [EventFd; 2],
    pub activations: Vec<Activation>,
    pub resets: u32,
    pub written: Vec<(u64, Vec<u8>)>,
    pub refuses: bool,
    pub config: [u8; 6],
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
        crate::virtio::read_bytes(&self.config, offset, data);
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

/// The registers of a transport, as a driver uses them.
pub trait Transport {
    /// Largest queue size that fits its register.
    const LARGEST_SIZE: u32;
    fn new(memory: GuestMemory, device: Arc<Mutex<Fake>>) -> Self;
    fn status(&mut self) -> u32;
    fn set_status(&mut self, status: u32);
    fn offered(&mut self, page: u32) -> u32;
    fn accept(&mut self, features: u64);
    /// Writes all registers of a queue, the one that makes it ready last.
    fn set_up(&mut self, queue: u32, registers: &Registers);
    fn max_size(&mut self, queue: u32) -> u32;
    fn is_ready(&mut self, queue: u32) -> bool;
    fn clear_ready(&mut self, queue: u32);
    fn notify(&mut self, queue: u32);
    fn queue_events(&self) -> Vec<EventFd>;
    /// Whether the guest was interrupted since this was last asked.
    fn interrupted(&self) -> bool;
    /// Reads the interrupt status and acknowledges all of it.
    fn take_causes(&mut self) -> u32;
    fn generation(&mut self) -> u32;
    fn read_config(&mut self, offset: u64, data: &mut [u8]);
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Goes by way of a snapshot into another transport of the same device.
    /// What the driver said may be spoiled on the way.
    fn save_and_restore(
        &mut self,
        memory: GuestMemory,
        device: Arc<Mutex<Fake>>,
        spoil: fn(&mut NegotiationState),
    ) -> Result<(), RestoreError>;
}

/// A transport of a fake device, and the device.
pub struct Guest<T> {
    pub transport: T,
    pub device: Arc<Mutex<Fake>>,
}

impl<T: Transport> Guest<T> {
    pub fn new() -> Guest<T> {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let device = Arc::new(Mutex::new(Fake {
            events: [event(), event()],
            activations: Vec::new(),
            resets: 0,
            written: Vec::new(),
            refuses: false,
            config: CONFIG,
        }));
        Guest { transport: T::new(memory(), device.clone()), device }
    }

    /// A driver that got as far as `FEATURES_OK`.
    pub fn with_features() -> Guest<T> {
        let mut guest = Guest::<T>::new();
        guest.status(ACKNOWLEDGE);
        guest.status(ACKNOWLEDGE | DRIVER);
        guest.transport.accept(OFFERED);
        assert_eq!(guest.status(FEATURES), FEATURES);
        guest
    }

    /// A driver that has set up both queues.
    pub fn with_queues() -> Guest<T> {
        let mut guest = Guest::<T>::with_features();
        guest.transport.set_up(0, &Registers::good(0));
        guest.transport.set_up(1, &Registers::good(1));
        guest
    }

    /// Writes the status and returns what it became.
    pub fn status(&mut self, status: u32) -> u32 {
        self.transport.set_status(status);
        self.transport.status()
    }

    pub fn activations(&self) -> usize {
        self.device.lock().unwrap().activations.len()
    }
}

pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap()
}

pub const FEATURES: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;
pub const RUNNING: u32 = FEATURES | DRIVER_OK;

/// What a driver says of one queue.
#[derive(Clone, Debug)]
pub struct Registers {
    pub size: u32,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl Registers {
    pub fn good(queue: u64) -> Registers {
        let base = 0x1000 + queue * 0x3000;
        Registers { size: 8, descriptors: base, available: base + 0x1000, used: base + 0x2000 }
    }
}

pub fn a_driver_that_keeps_the_order_starts_the_device_and_stops_it<T: Transport>() {
    let mut guest = Guest::<T>::with_queues();
    assert!(guest.transport.is_ready(0) && guest.transport.is_ready(1));
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
    assert_eq!(guest.transport.take_causes(), 0);
    interrupt.used_buffers(1);
    assert!(guest.transport.interrupted());
    interrupt.config_changed();
    assert!(guest.transport.interrupted());
    assert_eq!([3, 0], [guest.transport.take_causes(), guest.transport.take_causes()]);
    interrupt.needs_reset();
    assert!(guest.transport.interrupted());
    assert_eq!(guest.transport.status(), RUNNING | NEEDS_RESET);
    // A reset forgets all of it.
    assert_eq!(guest.status(0), 0);
    assert_eq!(guest.device.lock().unwrap().resets, 1);
    assert_eq!(guest.transport.take_causes(), 0);
    assert!(!guest.transport.is_ready(1));
}

pub fn a_driver_may_do_without_event_indices_and_without_a_queue<T: Transport>() {
    let mut guest = Guest::<T>::new();
    guest.status(ACKNOWLEDGE | DRIVER);
    guest.transport.accept(1 << VIRTIO_F_VERSION_1);
    guest.status(FEATURES);
    guest.transport.set_up(1, &Registers::good(1));
    assert_eq!(guest.status(RUNNING), RUNNING);
    let device = guest.device.lock().unwrap();
    let queues = &device.activations[0].queues;
    assert!(queues[0].is_none());
    assert!(!queues[1].as_ref().unwrap().event_idx_enabled());
}

pub fn features_are_agreed_on_only_within_the_offer_and_with_version_1<T: Transport>() {
    let version = 1 << VIRTIO_F_VERSION_1;
    for (features, agreed) in [
        (OFFERED, true),
        (version, true),
        (0, false),
        (OFFERED & !version, false),
        (OFFERED | 2, false),
        (OFFERED | 1 << 63, false),
    ] {
        let mut guest = Guest::<T>::new();
        guest.status(ACKNOWLEDGE | DRIVER);
        guest.transport.accept(features);
        let expected = if agreed { FEATURES } else { ACKNOWLEDGE | DRIVER };
        assert_eq!(guest.status(FEATURES), expected, "{features:#x}");
        // No way round it.
        guest.status(FEATURES | DRIVER_OK);
        assert_eq!(guest.activations(), usize::from(agreed), "{features:#x}");
    }
}

/// docs/hostile.md 5: a queue of such a size or in such a place starts no device.
pub fn hostile_5_queues_that_cannot_be_start_no_device<T: Transport>() {
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
        if registers.size > T::LARGEST_SIZE {
            continue;
        }
        let mut guest = Guest::<T>::with_features();
        guest.transport.set_up(0, &Registers::good(0));
        guest.transport.set_up(1, &registers);
        assert_eq!(guest.status(RUNNING), RUNNING | NEEDS_RESET, "{registers:x?}");
        assert_eq!(guest.activations(), 0, "{registers:x?}");
        assert!(guest.transport.interrupted());
        assert_eq!(guest.transport.take_causes(), CONFIG_CHANGED);
        // The next driver is none the worse.
        guest.status(0);
        guest.status(ACKNOWLEDGE | DRIVER);
        guest.transport.accept(OFFERED);
        guest.status(FEATURES);
        guest.transport.set_up(0, &Registers::good(0));
        guest.transport.set_up(1, &Registers::good(1));
        assert_eq!(guest.status(RUNNING), RUNNING);
        assert_eq!(guest.activations(), 1);
    }
}

/// A value that cannot be is not forgotten in favour of the one before.
pub fn hostile_5_a_bad_value_after_a_good_one_counts<T: Transport>() {
    let mut guest = Guest::<T>::with_queues();
    guest.transport.set_up(1, &Registers { size: 5, ..Registers::good(1) });
    guest.status(RUNNING);
    assert_eq!(guest.activations(), 0);
    let mut guest = Guest::<T>::with_queues();
    guest.transport.set_up(1, &Registers { used: 0x6001, ..Registers::good(1) });
    guest.status(RUNNING);
    assert_eq!(guest.activations(), 0);
}

/// docs/hostile.md 5 and 7, CVE-2026-5747: what a device was started with does not change under it.
pub fn hostile_7_queues_and_features_are_frozen_once_the_device_runs<T: Transport>() {
    let mut guest = Guest::<T>::with_queues();
    guest.status(RUNNING);
    guest
        .transport
        .set_up(0, &Registers { size: 16, descriptors: 0x8000, available: 0x9000, used: 0xa000 });
    guest.transport.clear_ready(0);
    assert!(guest.transport.is_ready(0));
    guest.transport.accept(1 << VIRTIO_F_VERSION_1);
    // Neither by another DRIVER_OK, nor by taking the first one back.
    for status in [RUNNING, FEATURES, ACKNOWLEDGE, RUNNING, FEATURES | NEEDS_RESET, RUNNING] {
        assert_eq!(guest.status(status), RUNNING);
    }
    assert_eq!(guest.activations(), 1);
    assert_eq!(guest.device.lock().unwrap().resets, 0);
    // Nor are registers that are set before features are agreed on.
    let mut guest = Guest::<T>::new();
    guest.status(ACKNOWLEDGE | DRIVER);
    guest.transport.set_up(0, &Registers::good(0));
    assert!(!guest.transport.is_ready(0));
    // Features not after FEATURES_OK.
    let mut guest = Guest::<T>::with_features();
    guest.transport.accept(0);
    guest.transport.set_up(0, &Registers::good(0));
    guest.status(RUNNING);
    assert_eq!(guest.device.lock().unwrap().activations[0].features, OFFERED);
}

pub fn hostile_7_a_driver_that_gave_up_can_only_reset<T: Transport>() {
    let mut guest = Guest::<T>::with_queues();
    assert_eq!(guest.status(FEATURES | FAILED), FEATURES | FAILED);
    guest.status(RUNNING | FAILED);
    assert_eq!(guest.activations(), 0);
    assert_eq!(guest.status(0), 0);
    // Giving up and starting in one breath.
    let mut guest = Guest::<T>::with_queues();
    guest.status(RUNNING | FAILED);
    assert_eq!(guest.activations(), 0);
}

pub fn hostile_7_a_device_that_cannot_start_says_so<T: Transport>() {
    let mut guest = Guest::<T>::with_queues();
    guest.device.lock().unwrap().refuses = true;
    assert_eq!(guest.status(RUNNING), RUNNING | NEEDS_RESET);
    guest.device.lock().unwrap().refuses = false;
    guest.status(RUNNING);
    assert_eq!(guest.activations(), 0);
}

/// docs/hostile.md 7: notifications at any time, of any queue.
pub fn hostile_7_notifications_reach_the_queue_they_name_and_no_other<T: Transport>() {
    let mut guest = Guest::<T>::new();
    let events = guest.transport.queue_events();
    for queue in [2, 0x3ff] {
        guest.transport.notify(queue);
    }
    assert!(events.iter().all(|event| event.read().is_err()));
    for _ in 0..1000 {
        guest.transport.notify(1);
    }
    assert!(events[0].read().is_err());
    assert_eq!(events[1].read().unwrap(), 1000);
    assert_eq!(guest.activations(), 0);
}

pub fn the_configuration_is_not_written_before_there_is_a_driver<T: Transport>() {
    let mut guest = Guest::<T>::new();
    guest.transport.write_config(0, &[1]);
    guest.status(ACKNOWLEDGE);
    guest.transport.write_config(0, &[1]);
    assert!(guest.device.lock().unwrap().written.is_empty());
    guest.status(ACKNOWLEDGE | DRIVER);
    guest.transport.write_config(2, &[7]);
    assert_eq!(guest.device.lock().unwrap().written, [(2, vec![7])]);
}

pub fn features_and_queue_sizes_can_be_read<T: Transport>() {
    let mut guest = Guest::<T>::new();
    for (page, half) in [(0, OFFERED as u32), (1, (OFFERED >> 32) as u32), (2, 0), (u32::MAX, 0)] {
        assert_eq!(guest.transport.offered(page), half);
    }
    for (queue, max) in [(0, MAX), (1, MAX), (2, 0), (0xffff, 0)] {
        assert_eq!(guest.transport.max_size(queue), u32::from(max));
    }
}

/// docs/hostile.md 9: the configuration has any size, and ends.
pub fn hostile_9_the_configuration_ends<T: Transport>() {
    let mut guest = Guest::<T>::with_features();
    let mut data = [0xee; 8];
    guest.transport.read_config(0, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 0, 0]);
    for offset in [5, 6, 0xeff] {
        let mut data = [0xee; 2];
        guest.transport.read_config(offset, &mut data);
        assert_eq!(data, if offset == 5 { [6, 0] } else { [0, 0] });
        guest.transport.write_config(offset, &data);
    }
    assert_eq!(guest.device.lock().unwrap().written.len(), 3);
}

pub fn another_configuration_is_another_generation<T: Transport>() {
    let mut guest = Guest::<T>::with_features();
    let before = guest.transport.generation();
    assert_eq!(guest.transport.generation(), before);
    guest.device.lock().unwrap().config[5] = 9;
    assert_ne!(guest.transport.generation(), before);
}

pub fn a_snapshot_keeps_what_the_driver_said<T: Transport>() {
    let mut guest = Guest::<T>::with_queues();
    guest.status(RUNNING);
    let interrupt = guest.device.lock().unwrap().activations[0].interrupt.clone();
    interrupt.used_buffers(0);
    interrupt.needs_reset();
    let generation = guest.transport.generation();
    {
        let mut device = guest.device.lock().unwrap();
        let queue = device.activations[0].queues[1].as_mut().unwrap();
        queue.set_next_avail(700);
        queue.set_next_used(699);
    }
    guest.transport.save_and_restore(memory(), guest.device.clone(), |_| {}).unwrap();
    assert_eq!(guest.transport.status(), RUNNING | NEEDS_RESET);
    {
        // It goes on where the other stood.
        let device = guest.device.lock().unwrap();
        let queue = device.activations[1].queues[1].as_ref().unwrap();
        assert_eq!((queue.next_avail(), queue.next_used()), (700, 699));
        assert_eq!(device.activations[1].features, OFFERED);
    }
    assert!(guest.transport.is_ready(0) && guest.transport.is_ready(1));
    assert_ne!(guest.transport.generation(), generation);
    assert_eq!(guest.transport.take_causes(), 3);
    // What runs is not set up once more.
    guest.transport.accept(0);
    guest.transport.set_up(0, &Registers { size: 16, ..Registers::good(0) });
    assert_eq!(guest.status(RUNNING), RUNNING | NEEDS_RESET);
    assert_eq!(guest.activations(), 2);
}

pub fn a_device_that_did_not_run_does_not_run_when_restored<T: Transport>() {
    let mut guest = Guest::<T>::with_queues();
    guest.transport.save_and_restore(memory(), guest.device.clone(), |_| {}).unwrap();
    assert_eq!((guest.transport.status(), guest.activations()), (FEATURES, 0));
    // Its driver goes on.
    assert_eq!(guest.status(RUNNING), RUNNING);
    assert_eq!(guest.activations(), 1);
}

/// docs/hostile.md 25: a state that no driver can have made.
pub fn hostile_25_states_that_cannot_be_are_refused<T: Transport>() {
    let spoilers: [fn(&mut NegotiationState); 6] = [
        |state| state.registers.queues[0].max_size = 32768,
        |state| state.registers.queues.truncate(1),
        |state| state.registers.driver_features = u64::MAX,
        |state| state.registers.queues[0].used = u64::MAX - 3,
        |state| state.registers.queues[1].ready = false,
        |state| state.positions.truncate(1),
    ];
    for (number, spoil) in spoilers.into_iter().enumerate() {
        let mut guest = Guest::<T>::with_queues();
        guest.status(RUNNING);
        let restored = guest.transport.save_and_restore(memory(), guest.device.clone(), spoil);
        assert!(restored.is_err(), "{number}");
        assert_eq!(guest.activations(), 1, "{number}");
    }
}

/// The rules as tests of a transport.
macro_rules! transport_rules {
    ($transport:ty: $($rule:ident),+ $(,)?) => {
        $(
            #[test]
            fn $rule() {
                $crate::virtio::transport_rules::$rule::<$transport>();
            }
        )+
    };
    ($transport:ty) => {
        transport_rules! { $transport:
            a_driver_that_keeps_the_order_starts_the_device_and_stops_it,
            a_driver_may_do_without_event_indices_and_without_a_queue,
            features_are_agreed_on_only_within_the_offer_and_with_version_1,
            hostile_5_queues_that_cannot_be_start_no_device,
            hostile_5_a_bad_value_after_a_good_one_counts,
            hostile_7_queues_and_features_are_frozen_once_the_device_runs,
            hostile_7_a_driver_that_gave_up_can_only_reset,
            hostile_7_a_device_that_cannot_start_says_so,
            hostile_7_notifications_reach_the_queue_they_name_and_no_other,
            the_configuration_is_not_written_before_there_is_a_driver,
            features_and_queue_sizes_can_be_read,
            hostile_9_the_configuration_ends,
            another_configuration_is_another_generation,
            a_snapshot_keeps_what_the_driver_said,
            a_device_that_did_not_run_does_not_run_when_restored,
            hostile_25_states_that_cannot_be_are_refused,
        }
    };
}
pub(super) use transport_rules;
