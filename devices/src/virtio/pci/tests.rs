//! The function, read and written as a driver does, and as no driver should.

use super::*;
use crate::pci::msix::tests::{Recorder, Sent};
use crate::virtio::negotiation::{ACKNOWLEDGE, DRIVER};
use crate::virtio::transport_rules::*;

/// A transport with what it sent.
struct Function {
    transport: PciTransport,
    sent: Arc<Recorder>,
}

impl Function {
    fn get(&mut self, offset: u64, size: usize) -> u32 {
        let mut data = [0; 4];
        self.transport.read_bar(BAR, offset, &mut data[..size]);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, size: usize, value: u32) {
        self.transport.write_bar(BAR, offset, &value.to_le_bytes()[..size]);
    }

    fn register(&mut self, offset: u16, size: usize) -> u32 {
        let mut data = [0; 4];
        self.transport.read_configuration(offset, &mut data[..size]);
        u32::from_le_bytes(data)
    }

    fn set_register(&mut self, offset: u16, size: usize, value: u32) {
        self.transport.write_configuration(offset, &value.to_le_bytes()[..size]);
    }

    /// Vector 0 is the configuration's, and each queue has one more.
    fn use_msix(&mut self) {
        let control = u16::from(self.transport.msix_capability) + 2;
        self.set_register(control, 2, 0xc000);
        for vector in 0..3 {
            let at = TABLE + msix::ENTRY_SIZE * u64::from(vector);
            for (register, value) in [0xfee0_0000, 0, 0x4020 + vector, 0].into_iter().enumerate() {
                self.set(at + 4 * register as u64, 4, value);
            }
        }
        self.set_register(control, 2, 0x8000);
        self.set(common::CONFIG_VECTOR, 2, 0);
        for queue in 0..2 {
            self.set(common::QUEUE_SELECT, 2, queue);
            self.set(common::QUEUE_VECTOR, 2, queue + 1);
        }
    }
}

impl Transport for Function {
    const LARGEST_SIZE: u32 = 0xffff;

    fn new(memory: GuestMemory, device: Arc<Mutex<Fake>>) -> Function {
        let sent = Arc::new(Recorder::default());
        let transport = PciTransport::new(memory, device, sent.clone()).unwrap();
        Function { transport, sent }
    }

    fn status(&mut self) -> u32 {
        self.get(common::STATUS, 1)
    }

    fn set_status(&mut self, status: u32) {
        self.set(common::STATUS, 1, status);
    }

    fn offered(&mut self, page: u32) -> u32 {
        self.set(common::DEVICE_FEATURES_PAGE, 4, page);
        self.get(common::DEVICE_FEATURES, 4)
    }

    fn accept(&mut self, features: u64) {
        for (page, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(common::DRIVER_FEATURES_PAGE, 4, page);
            self.set(common::DRIVER_FEATURES, 4, half);
        }
        self.use_msix();
    }

    fn set_up(&mut self, queue: u32, registers: &Registers) {
        self.set(common::QUEUE_SELECT, 2, queue);
        self.set(common::QUEUE_SIZE, 2, registers.size);
        for (register, address) in [
            (common::QUEUE_DESCRIPTORS, registers.descriptors),
            (common::QUEUE_AVAILABLE, registers.available),
            (common::QUEUE_USED, registers.used),
        ] {
            self.set(register, 4, address as u32);
            self.set(register + 4, 4, (address >> 32) as u32);
        }
        self.set(common::QUEUE_ENABLE, 2, 1);
    }

    fn max_size(&mut self, queue: u32) -> u32 {
        self.set(common::QUEUE_SELECT, 2, queue);
        self.get(common::QUEUE_SIZE, 2)
    }

    fn is_ready(&mut self, queue: u32) -> bool {
        self.set(common::QUEUE_SELECT, 2, queue);
        self.get(common::QUEUE_ENABLE, 2) == 1
    }

    fn clear_ready(&mut self, queue: u32) {
        self.set(common::QUEUE_SELECT, 2, queue);
        self.set(common::QUEUE_ENABLE, 2, 0);
    }

    fn notify(&mut self, queue: u32) {
        self.set(NOTIFY + NOTIFY_MULTIPLIER * u64::from(queue), 2, queue);
    }

    fn queue_events(&self) -> Vec<EventFd> {
        let notifications = self.transport.queue_notifications().unwrap();
        notifications.into_iter().map(|(event, _)| event).collect()
    }

    fn interrupted(&self) -> bool {
        self.sent.take().iter().any(|sent| matches!(sent, Sent::Message(_)))
    }

    fn take_causes(&mut self) -> u32 {
        self.get(ISR, 1)
    }

    fn generation(&mut self) -> u32 {
        self.get(common::CONFIG_GENERATION, 1)
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.transport.read_bar(BAR, DEVICE + offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.transport.write_bar(BAR, DEVICE + offset, data);
    }

    fn save_and_restore(
        &mut self,
        memory: GuestMemory,
        device: Arc<Mutex<Fake>>,
        spoil: fn(&mut NegotiationState),
    ) -> Result<(), RestoreError> {
        let mut state = self.transport.save();
        spoil(&mut state.negotiation);
        let state = serde_json::to_string(&state).unwrap();
        let mut other = Function::new(memory, device);
        other.transport.restore(&serde_json::from_str(&state).unwrap())?;
        *self = other;
        Ok(())
    }
}

transport_rules!(Function);

fn running() -> Guest<Function> {
    let mut guest = Guest::<Function>::with_queues();
    guest.status(RUNNING);
    guest.transport.sent.take();
    guest
}

#[test]
fn capabilities_lead_to_every_structure() {
    let mut function = Guest::<Function>::new().transport;
    assert_eq!(function.register(0, 4), 0x106a_1af4);
    assert_eq!(function.register(8, 4), 0xff00_0001);
    let mut found = Vec::new();
    let mut at = function.register(0x34, 1) as u16;
    while at != 0 {
        assert_eq!(at % 4, 0);
        if function.register(at, 1) == u32::from(VENDOR_CAPABILITY) {
            let [length, kind, bar] = [2, 3, 4].map(|byte| function.register(at + byte, 1));
            assert_eq!(bar, 0);
            let (offset, size) = (function.register(at + 8, 4), function.register(at + 12, 4));
            found.push((kind, length, offset, size));
            if kind == u32::from(kind::NOTIFY) {
                assert_eq!(function.register(at + 16, 4), 4);
            }
        } else {
            assert_eq!(function.register(at, 1), u32::from(msix::CAPABILITY));
            // Three vectors.
            assert_eq!(function.register(at + 2, 2), 2);
            assert_eq!(
                (function.register(at + 4, 4), function.register(at + 8, 4)),
                (0x4000, 0x5000)
            );
        }
        at = function.register(at + 1, 1) as u16;
    }
    let expected = [
        (1, 16, 0, 0x38),
        (3, 16, 0x1000, 1),
        (4, 16, 0x2000, 0x1000),
        (2, 20, 0x3000, 0x1000),
        (5, 20, 0, 0),
    ];
    assert_eq!(found, expected);
    assert_eq!(function.get(common::QUEUES, 2), 2);
    for queue in 0..2 {
        function.set(common::QUEUE_SELECT, 2, queue);
        assert_eq!(function.get(common::QUEUE_NOTIFY_OFFSET, 2), queue);
    }
    let offsets = function.transport.queue_notifications().unwrap();
    let offsets: Vec<u64> = offsets.into_iter().map(|(_, offset)| offset).collect();
    assert_eq!(offsets, [0x3000, 0x3004]);
}

#[test]
fn each_queue_and_the_configuration_have_a_vector() {
    let guest = running();
    let interrupt = guest.device.lock().unwrap().activations[0].interrupt.clone();
    interrupt.used_buffers(1);
    interrupt.used_buffers(0);
    interrupt.config_changed();
    interrupt.used_buffers(7);
    assert_eq!(guest.transport.sent.take(), [2, 1, 0].map(Sent::Message));
}

#[test]
fn a_vector_that_is_not_there_is_none_and_a_reset_forgets_vectors() {
    let mut guest = running();
    let interrupt = guest.device.lock().unwrap().activations[0].interrupt.clone();
    let function = &mut guest.transport;
    for vector in [3, 0x7ff, 0xfffe, 0xffff] {
        for register in [common::CONFIG_VECTOR, common::QUEUE_VECTOR] {
            function.set(register, 2, vector);
            assert_eq!(function.get(register, 2), u32::from(NO_VECTOR));
        }
    }
    interrupt.used_buffers(1);
    interrupt.config_changed();
    assert_eq!(function.sent.take(), []);
    function.set(common::QUEUE_SELECT, 2, 0);
    assert_eq!(function.get(common::QUEUE_VECTOR, 2), 1);
    function.set_status(0);
    assert_eq!(function.get(common::QUEUE_VECTOR, 2), u32::from(NO_VECTOR));
    // Of a queue that is not there.
    function.set(common::QUEUE_SELECT, 2, 2);
    function.set(common::QUEUE_VECTOR, 2, 1);
    assert_eq!(function.get(common::QUEUE_VECTOR, 2), u32::from(NO_VECTOR));
}

#[test]
fn a_snapshot_keeps_messages_and_their_routes() {
    let mut guest = running();
    let control = u16::from(guest.transport.transport.msix_capability) + 2;
    guest.transport.set_register(4, 2, 6);
    guest.transport.set_register(control, 2, 0xc000);
    let interrupt = guest.device.lock().unwrap().activations[0].interrupt.clone();
    interrupt.used_buffers(0);
    guest.transport.save_and_restore(memory(), guest.device.clone(), |_| {}).unwrap();
    let function = &mut guest.transport;
    assert_eq!(function.register(4, 2), 6);
    assert_eq!(function.get(PENDING, 4), 0b010);
    assert_eq!(function.sent.take(), []);
    function.set_register(control, 2, 0x8000);
    let expected = [
        Sent::Route(0, 0xfee0_0000, 0x4020),
        Sent::Route(1, 0xfee0_0000, 0x4021),
        Sent::Message(1),
        Sent::Route(2, 0xfee0_0000, 0x4022),
    ];
    assert_eq!(function.sent.take(), expected);
    let mut state = function.transport.save();
    state.vectors.pop();
    assert!(function.transport.restore(&state).is_err());
    state.queue_vectors.pop();
    assert!(function.transport.restore(&state).is_err());
}

#[test]
fn the_bar_can_be_reached_through_the_configuration() {
    let mut guest = Guest::<Function>::with_features();
    let function = &mut guest.transport;
    let access = function.transport.access_capability;
    let aim = |function: &mut Function, bar, offset, length| {
        function.set_register(access + CAPABILITY_BAR, 1, bar);
        function.set_register(access + CAPABILITY_OFFSET, 4, offset);
        function.set_register(access + CAPABILITY_LENGTH, 4, length);
    };
    aim(function, 0, common::STATUS as u32, 1);
    assert_eq!(function.register(access + CAPABILITY_DATA, 4), FEATURES);
    aim(function, 0, DEVICE as u32, 2);
    function.set_register(access + CAPABILITY_DATA, 4, 0x0807);
    assert_eq!(guest.device.lock().unwrap().written, [(0, vec![7, 8])]);
    // Nothing that is not a part of the BAR.
    let function = &mut guest.transport;
    for (bar, offset, length) in [
        (1, 0, 4),
        (0, 0, 0),
        (0, 0, 3),
        (0, 0, 8),
        (0, 2, 4),
        (0, 0x8000, 4),
        (0, 0xffff_fffc, 4),
        (0, 0, u32::MAX),
    ] {
        aim(function, bar, offset, length);
        function.set_register(access + CAPABILITY_DATA, 4, 0);
        assert_eq!(function.register(access + CAPABILITY_DATA, 4), 0);
    }
    assert_eq!(function.status(), FEATURES);
}

/// From enumeration to removal, by addresses only, in the order of Linux.
#[test]
fn a_hot_plugged_device_is_found_moved_started_and_ejected() {
    use crate::bus::{Bus, BusDevice};
    use crate::pci::hotplug::HotPlug;
    use crate::pci::{BarSink, Ecam, MemoryWindow, PciBus};

    #[derive(Default)]
    struct Places(Mutex<Vec<u64>>);
    impl BarSink for Places {
        fn mapped(&self, _slot: u8, _bar: u8, address: u64) {
            self.0.lock().unwrap().push(address);
        }
        fn unmapped(&self, _slot: u8, _bar: u8, address: u64) {
            self.0.lock().unwrap().retain(|mapped| *mapped != address);
        }
    }

    const LOW: u64 = 0xe100_0000;
    const HIGH: u64 = 1 << 38;
    let places = Arc::new(Places::default());
    let bus = PciBus::new(vec![LOW..LOW + (1 << 20), HIGH..HIGH + (1 << 20)], places.clone());
    let bus = Arc::new(Mutex::new(bus));
    let mut mmio = Bus::default();
    mmio.insert(0, Ecam::SIZE, Arc::new(Mutex::new(Ecam(bus.clone())))).unwrap();
    for start in [LOW, HIGH] {
        let window = MemoryWindow { bus: bus.clone(), start };
        mmio.insert(start, 1 << 20, Arc::new(Mutex::new(window))).unwrap();
    }
    let get = |address: u64, size: usize| {
        let mut data = [0; 4];
        mmio.read(address, &mut data[..size]);
        u32::from_le_bytes(data)
    };
    let set = |address: u64, size: usize, value: u32| {
        mmio.write(address, &value.to_le_bytes()[..size]);
    };

    let mut hot_plug = HotPlug::new(bus.clone()).unwrap();
    let Guest { transport: Function { transport, sent }, device } = Guest::<Function>::new();
    let slot = bus.lock().unwrap().insert(None, Arc::new(Mutex::new(transport))).unwrap();
    hot_plug.plugged(slot);
    let mut slots = [0; 4];
    hot_plug.read(0, &mut slots);
    assert_eq!(u32::from_le_bytes(slots), 1 << slot);

    // It is there; its BAR goes above 4 GiB.
    let header = u64::from(slot) << 15;
    assert_eq!(get(header, 4), 0x106a_1af4);
    assert_eq!(get(header + 0x10, 4), LOW as u32 | 4);
    set(header + 0x10, 4, u32::MAX);
    assert_eq!(get(header + 0x10, 4), !(BAR_SIZE as u32 - 1) | 4);
    let bar = HIGH + 0x1_0000;
    set(header + 0x10, 4, bar as u32);
    set(header + 0x14, 4, (bar >> 32) as u32);
    set(header + 4, 2, 6);
    assert_eq!(*places.0.lock().unwrap(), [bar]);
    // One vector for all, of the first queue only.
    let mut msix = u64::from(get(header + 0x34, 1) as u8);
    while get(header + msix, 1) != u32::from(msix::CAPABILITY) {
        msix = get(header + msix + 1, 1).into();
    }
    set(header + msix + 2, 2, 0x8000);
    set(bar + TABLE, 4, 0xfee0_0000);
    set(bar + TABLE + 8, 4, 0x41);
    set(bar + TABLE + 12, 4, 0);
    for status in [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER] {
        set(bar + common::STATUS, 1, status);
    }
    for (page, half) in [(0, OFFERED as u32), (1, (OFFERED >> 32) as u32)] {
        set(bar + common::DRIVER_FEATURES_PAGE, 4, page);
        set(bar + common::DRIVER_FEATURES, 4, half);
    }
    set(bar + common::STATUS, 1, FEATURES);
    set(bar + common::QUEUE_SELECT, 2, 0);
    set(bar + common::QUEUE_VECTOR, 2, 0);
    let rings = Registers::good(0);
    set(bar + common::QUEUE_DESCRIPTORS, 4, rings.descriptors as u32);
    set(bar + common::QUEUE_AVAILABLE, 4, rings.available as u32);
    set(bar + common::QUEUE_USED, 4, rings.used as u32);
    set(bar + common::QUEUE_ENABLE, 2, 1);
    set(bar + common::STATUS, 1, RUNNING);
    assert_eq!(get(bar + common::STATUS, 1), RUNNING);
    set(bar + NOTIFY, 2, 0);
    {
        let device = device.lock().unwrap();
        assert_eq!(device.events[0].read().unwrap(), 1);
        device.activations[0].interrupt.used_buffers(0);
    }
    assert_eq!(sent.take(), [Sent::Route(0, 0xfee0_0000, 0x41), Sent::Message(0)]);

    hot_plug.request_eject(slot);
    hot_plug.write(8, &(1u32 << slot).to_le_bytes());
    assert_eq!(hot_plug.take_ejected(), [slot]);
    assert_eq!(device.lock().unwrap().resets, 1);
    assert_eq!((get(header, 4), get(bar, 4)), (u32::MAX, u32::MAX));
    assert!(places.0.lock().unwrap().is_empty());
}

#[test]
fn an_unplugged_device_is_reset() {
    let mut guest = running();
    guest.transport.transport.unplugged();
    assert_eq!(guest.device.lock().unwrap().resets, 1);
    assert_eq!(guest.transport.status(), 0);
}

/// docs/hostile.md 9: every register in every size, aligned or not.
#[test]
fn hostile_9_every_offset_and_size_of_the_bar_is_answered() {
    let mut guest = Guest::<Function>::with_features();
    let function = &mut guest.transport;
    let natural = |offset: u64, size: u64| match offset {
        0..0x10 => size == 4,
        0x14..0x16 => size == 1,
        0x10..0x20 => size == 2,
        _ => size == 4 || size == 8,
    } && offset.is_multiple_of(size.max(1));
    for offset in (0..common::QUEUE_USED + 8).chain([0xffe, 0xfff]) {
        for size in 0..=9 {
            // A write that is no register access must not be one: not a reset, above all.
            if !natural(offset, size as u64) {
                let mut data = vec![0xee; size];
                function.transport.write_bar(BAR, offset, &vec![0; size]);
                function.transport.read_bar(BAR, offset, &mut data);
                assert_eq!(data, vec![0; size], "{offset:#x}, {size} bytes");
            }
        }
    }
    assert_eq!(function.status(), FEATURES);
    // And now anything, anywhere.
    for offset in 0..BAR_SIZE {
        for size in 0..=9 {
            for value in [0, 1, 0xff] {
                function.transport.write_bar(BAR, offset, &vec![value; size]);
                function.transport.read_bar(BAR, offset, &mut vec![0; size]);
            }
        }
    }
    for offset in 0..0x1000 {
        for size in 0..=9 {
            for value in [0, 1, 0xff] {
                function.transport.write_configuration(offset, &vec![value; size]);
                function.transport.read_configuration(offset, &mut vec![0; size]);
            }
        }
    }
    function.set_status(0);
    assert_eq!(function.status(), 0);
}

#[test]
fn registers_of_64_bits_take_one_write_or_two() {
    let mut guest = Guest::<Function>::with_features();
    let function = &mut guest.transport;
    let address = 0x1122_3344_5566_7788u64;
    function.transport.write_bar(BAR, common::QUEUE_USED, &address.to_le_bytes());
    assert_eq!(function.get(common::QUEUE_USED, 4), 0x5566_7788);
    assert_eq!(function.get(common::QUEUE_USED + 4, 4), 0x1122_3344);
    let mut data = [0; 8];
    function.transport.read_bar(BAR, common::QUEUE_USED, &mut data);
    assert_eq!(u64::from_le_bytes(data), address);
}
