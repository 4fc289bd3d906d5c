//! The registers, read and written as a driver does, and as no driver should.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::*;
use crate::virtio::transport_rules::*;

const OUTSIDE: [u64; 3] = [0x106, 0xfff, u64::MAX];

fn get(registers: &mut MmioTransport, offset: u32) -> u32 {
    let mut data = [0; 4];
    registers.read(offset.into(), &mut data);
    u32::from_le_bytes(data)
}

fn set(registers: &mut MmioTransport, offset: u32, value: u32) {
    registers.write(offset.into(), &value.to_le_bytes());
}

impl Transport for MmioTransport {
    const LARGEST_SIZE: u32 = u32::MAX;

    fn new(memory: GuestMemory, device: Arc<Mutex<Fake>>) -> MmioTransport {
        MmioTransport::new(memory, device).unwrap()
    }

    fn status(&mut self) -> u32 {
        get(self, VIRTIO_MMIO_STATUS)
    }

    fn set_status(&mut self, status: u32) {
        set(self, VIRTIO_MMIO_STATUS, status);
    }

    fn offered(&mut self, page: u32) -> u32 {
        set(self, VIRTIO_MMIO_DEVICE_FEATURES_SEL, page);
        get(self, VIRTIO_MMIO_DEVICE_FEATURES)
    }

    fn accept(&mut self, features: u64) {
        for (page, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            set(self, VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
            set(self, VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
    }

    fn set_up(&mut self, queue: u32, registers: &Registers) {
        set(self, VIRTIO_MMIO_QUEUE_SEL, queue);
        set(self, VIRTIO_MMIO_QUEUE_NUM, registers.size);
        for (low, high, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, registers.descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, registers.available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, registers.used),
        ] {
            set(self, low, address as u32);
            set(self, high, (address >> 32) as u32);
        }
        set(self, VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn max_size(&mut self, queue: u32) -> u32 {
        set(self, VIRTIO_MMIO_QUEUE_SEL, queue);
        get(self, VIRTIO_MMIO_QUEUE_NUM_MAX)
    }

    fn is_ready(&mut self, queue: u32) -> bool {
        set(self, VIRTIO_MMIO_QUEUE_SEL, queue);
        get(self, VIRTIO_MMIO_QUEUE_READY) == 1
    }

    fn clear_ready(&mut self, queue: u32) {
        set(self, VIRTIO_MMIO_QUEUE_SEL, queue);
        set(self, VIRTIO_MMIO_QUEUE_READY, 0);
    }

    fn notify(&mut self, queue: u32) {
        set(self, VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }

    fn queue_events(&self) -> Vec<EventFd> {
        self.queue_events().unwrap()
    }

    fn interrupted(&self) -> bool {
        self.interrupt_event().read().is_ok()
    }

    fn take_causes(&mut self) -> u32 {
        let causes = get(self, VIRTIO_MMIO_INTERRUPT_STATUS);
        set(self, VIRTIO_MMIO_INTERRUPT_ACK, causes);
        causes
    }

    fn generation(&mut self) -> u32 {
        get(self, VIRTIO_MMIO_CONFIG_GENERATION)
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.read(0x100 + offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.write(0x100 + offset, data);
    }

    fn save_and_restore(
        &mut self,
        memory: GuestMemory,
        device: Arc<Mutex<Fake>>,
        spoil: fn(&mut NegotiationState),
    ) -> Result<(), RestoreError> {
        let mut state = self.save();
        spoil(&mut state);
        let state = serde_json::to_string(&state).unwrap();
        let mut other = MmioTransport::new(memory, device).unwrap();
        other.restore(&serde_json::from_str(&state).unwrap())?;
        *self = other;
        Ok(())
    }
}

transport_rules!(MmioTransport);

#[test]
fn registers_tell_what_the_device_is() {
    let mut registers = Guest::<MmioTransport>::new().transport;
    assert_eq!(get(&mut registers, VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(get(&mut registers, VIRTIO_MMIO_VERSION), 2);
    assert_eq!(get(&mut registers, VIRTIO_MMIO_DEVICE_ID), 42);
    assert_ne!(get(&mut registers, VIRTIO_MMIO_VENDOR_ID), 0);
    // No shared memory (virtio 1.2, 4.2.2.2): length and base are all ones.
    for offset in (0xb0..=0xbc).step_by(4) {
        assert_eq!(get(&mut registers, offset), u32::MAX);
    }
}

#[test]
fn causes_are_acknowledged_one_by_one() {
    let mut guest = Guest::<MmioTransport>::with_queues();
    guest.status(RUNNING);
    let interrupt = guest.device.lock().unwrap().activations[0].interrupt.clone();
    interrupt.used_buffers(1);
    interrupt.config_changed();
    let registers = &mut guest.transport;
    assert_eq!(get(registers, VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    set(registers, VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(get(registers, VIRTIO_MMIO_INTERRUPT_STATUS), 2);
}

/// docs/hostile.md 7: notifications of queues that no other transport can name.
#[test]
fn hostile_7_notifications_of_queues_that_cannot_be_are_none() {
    let mut registers = Guest::<MmioTransport>::new().transport;
    for queue in [0xffff, 0x1_0000, u32::MAX] {
        registers.notify(queue);
    }
    assert!(registers.queue_events().unwrap().iter().all(|event| event.read().is_err()));
}

/// docs/hostile.md 9: every register in every size, aligned or not; the configuration past its end.
#[test]
fn hostile_9_every_offset_and_size_is_answered() {
    let mut guest = Guest::<MmioTransport>::with_features();
    let registers = &mut guest.transport;
    for offset in 0..0x100u64 {
        for size in 0..=9 {
            let mut data = vec![0xee; size];
            registers.read(offset, &mut data);
            if size != 4 || offset % 4 != 0 {
                assert_eq!(data, vec![0; size], "{offset:#x}, {size} bytes");
            }
            // A write that is no register access must not be one: not a reset, above all.
            if size != 4 || offset % 4 != 0 {
                registers.write(offset, &data);
            }
        }
    }
    assert_eq!(registers.status(), FEATURES);
    // Read-only ones.
    for offset in [VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_QUEUE_NUM_MAX] {
        let before = get(registers, offset);
        set(registers, offset, !before);
        assert_eq!(get(registers, offset), before);
    }
    // Registers of queues that are not there.
    registers.set_up(2, &Registers::good(0));
    registers.set_up(u32::MAX, &Registers::good(0));
    assert_eq!(get(registers, VIRTIO_MMIO_QUEUE_READY), 0);
    for offset in OUTSIDE {
        let mut data = [0xee; 2];
        registers.read(offset, &mut data);
        assert_eq!(data, [0, 0]);
        registers.write(offset, &data);
    }
}

#[test]
fn a_snapshot_of_another_device_is_refused() {
    let mut registers = Guest::<MmioTransport>::new().transport;
    let mut state = registers.save();
    state.registers.queues.pop();
    assert!(registers.restore(&state).is_err());
    assert_eq!(registers.offered(1), 1 << (VIRTIO_F_VERSION_1 - 32));
}

/// It may be in no processor's state yet.
#[test]
fn an_interrupt_that_was_not_acknowledged_comes_again_when_restored() {
    let mut guest = Guest::<MmioTransport>::with_queues();
    guest.status(RUNNING);
    let quiet = guest.transport.save();
    guest.device.lock().unwrap().activations[0].interrupt.used_buffers(0);
    let interrupted = guest.transport.save();
    for (state, cause) in [(quiet, 0), (interrupted, VIRTIO_MMIO_INT_VRING)] {
        let mut other = Guest::<MmioTransport>::new().transport;
        other.restore(&state).unwrap();
        assert_eq!(get(&mut other, VIRTIO_MMIO_INTERRUPT_STATUS), cause);
        assert_eq!(other.interrupt_event().read().is_ok(), cause != 0);
    }
}
