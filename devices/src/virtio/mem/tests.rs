//! Memory that can be plugged, driven.

use std::collections::BTreeSet;
use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::request::{Blocks, State};
use super::*;
use crate::GuestMemory;
use crate::virtio::test_driver::{self, BUFFERS, readable, writable};
use crate::virtio::testing::{Recorder, survives_broken_queues};

const START: u64 = 1 << 32;
const BLOCK_MIB: u32 = 16;
const BLOCK: u64 = (BLOCK_MIB as u64) << 20;
/// Blocks of a slot, and slots.
const IN_SLOT: usize = 8;
const SLOTS: usize = 3;
const ALL: usize = SLOTS * IN_SLOT;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

fn options() -> MemOptions {
    MemOptions { total_size_mib: 384, slot_size_mib: 128, block_size_mib: BLOCK_MIB }
}

/// Slots as the host has them.
#[derive(Clone, Default)]
struct Slots(Arc<Mutex<(BTreeSet<usize>, BTreeSet<usize>)>>);

impl Slots {
    fn present(&self) -> Vec<usize> {
        self.0.lock().unwrap().0.iter().copied().collect()
    }

    /// Has these neither added nor taken away.
    fn fail_at(&self, slots: &[usize]) {
        self.0.lock().unwrap().1 = slots.iter().copied().collect();
    }
}

impl SlotSink for Slots {
    fn set_slot(&mut self, index: usize, plugged: bool) -> io::Result<()> {
        let (present, failing) = &mut *self.0.lock().unwrap();
        if failing.contains(&index) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        assert!(index < SLOTS);
        assert!(if plugged { present.insert(index) } else { present.remove(&index) });
        Ok(())
    }
}

fn mem(slots: &Slots) -> Mem {
    Mem::new(options(), GuestAddress(START), Box::new(slots.clone())).unwrap()
}

type Driver = test_driver::Driver<Mem>;

/// A driver with this device and so many MiB requested.
fn drive(device: Mem, requested_mib: u32) -> Driver {
    let mut driver = Driver::new(device);
    let regions = [(GuestAddress(0), 4 << 20), (GuestAddress(START), ALL * BLOCK as usize)];
    driver.memory = GuestMemory::from_ranges(&regions).unwrap();
    driver.device().set_requested_mib(requested_mib).unwrap();
    let features = driver.device().features();
    driver.activate(features, 16);
    driver
}

fn driver(requested_mib: u32) -> (Driver, Slots) {
    let slots = Slots::default();
    (drive(mem(&slots), requested_mib), slots)
}

fn address(block: usize) -> u64 {
    START + block as u64 * BLOCK
}

fn write_request(driver: &Driver, kind: u16, address: u64, count: u16) {
    // What is no field of a request is not to be looked at.
    let mut request = [0xee; 24];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&address.to_le_bytes());
    request[16..18].copy_from_slice(&count.to_le_bytes());
    driver.write(BUFFERS, &request);
    driver.write(BUFFERS + 32, &[0xee; 10]);
}

fn read_answer(driver: &mut Driver) -> Answer {
    let used = driver.used(0);
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].1, 10);
    let bytes = driver.read(BUFFERS + 32, 10);
    let answers = [
        Answer::State(State::Plugged),
        Answer::State(State::Unplugged),
        Answer::State(State::Mixed),
        Answer::Nack,
        Answer::Busy,
        Answer::Error,
    ];
    answers.into_iter().find(|answer| answer.bytes()[..] == bytes).unwrap()
}

fn ask(driver: &mut Driver, kind: u16, address: u64, count: u16) -> Answer {
    write_request(driver, kind, address, count);
    driver.send(0, &[readable(BUFFERS, 24), writable(BUFFERS + 32, 10)]);
    match read_answer(driver) {
        // They are the same on the ring.
        Answer::State(State::Plugged) if kind != STATE => Answer::Ack,
        answer => answer,
    }
}

/// Block size, node, address, and the sizes of the region, of what is usable, plugged and requested.
fn config(device: &Mem) -> [u64; 7] {
    let mut bytes = [0xff; 56];
    device.read_config(0, &mut bytes);
    let mut words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
    std::array::from_fn(|_| words.next().unwrap())
}

/// Usable, plugged and requested blocks.
fn sizes(driver: &Driver) -> [usize; 3] {
    let [.., usable, plugged, requested] = config(&driver.device());
    [usable, plugged, requested].map(|bytes| {
        assert!(bytes.is_multiple_of(BLOCK));
        (bytes / BLOCK) as usize
    })
}

fn touch(driver: &Driver, block: usize) {
    driver.memory.write_obj(1u8, GuestAddress(address(block))).unwrap();
}

/// Whether what was written into a block is still there.
fn kept(driver: &Driver, block: usize) -> bool {
    driver.memory.read_obj::<u8>(GuestAddress(address(block))).unwrap() == 1
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let make = |total_size_mib, slot_size_mib, block_size_mib, address| {
        let options = MemOptions { total_size_mib, slot_size_mib, block_size_mib };
        Mem::new(options, GuestAddress(address), Box::new(Slots::default())).err()
    };
    for block in [0, 1, 3, 6, u32::MAX] {
        assert!(matches!(make(1024, 128, block, START), Some(MemError::BlockSize(_))));
    }
    for slot in [0, 2, 64, 127, 129, 192 + 64 + 1] {
        assert!(matches!(make(1024, slot, 2, START), Some(MemError::SlotSize(_))));
    }
    assert!(matches!(make(1024, 128, 256, START), Some(MemError::SlotSize(_))));
    for total in [0, 1, 127, 1025, u32::MAX] {
        assert!(matches!(make(total, 128, 2, START), Some(MemError::TotalSize(_))));
    }
    for address in [1, START + (1 << 20), u64::MAX, u64::MAX - (2 << 20) + 1] {
        assert!(matches!(make(1024, 128, 2, address), Some(MemError::Address(_))));
    }
    assert!(make(384, 192, 2, START).is_none());
    assert!(make(1 << 31, 1 << 31, 1 << 31, 0).is_none());
    assert!(make(128, 128, 2, 0).is_none());
}

#[test]
fn slots_are_where_their_index_says() {
    let options = options();
    assert_eq!(options.region_size(), 384 << 20);
    let slot = |index| options.slot(GuestAddress(START), index);
    assert_eq!(slot(0), Some((GuestAddress(START), 128 << 20)));
    assert_eq!(slot(2), Some((GuestAddress(START + (256 << 20)), 128 << 20)));
    assert_eq!((slot(3), slot(usize::MAX)), (None, None));
}

#[test]
fn the_host_says_how_much_it_wants() {
    let recorder = Arc::new(Recorder::default());
    let changes = || recorder.configured.load(std::sync::atomic::Ordering::SeqCst);
    let mut device = mem(&Slots::default());
    assert_eq!(config(&device), [BLOCK, 0, START, 384 << 20, 0, 0, 0]);
    device.interrupt = Some(recorder.clone());
    device.set_requested_mib(144).unwrap();
    assert_eq!(changes(), 1);
    assert_eq!(config(&device)[4..], [256 << 20, 0, 144 << 20]);
    // What the guest may choose from does not shrink under it.
    device.set_requested_mib(16).unwrap();
    assert_eq!(config(&device)[4..], [256 << 20, 0, 16 << 20]);
    device.set_requested_mib(384).unwrap();
    assert_eq!((changes(), config(&device)[4]), (3, 384 << 20));
    for (requested, aligned) in [(385, false), (400, false), (u32::MAX, false), (17, true)] {
        let error = device.set_requested_mib(requested).unwrap_err();
        assert_eq!(matches!(error, MemError::Unaligned { .. }), aligned);
    }
    assert_eq!(changes(), 3);
    let status = serde_json::json!({
        "total_size_mib": 384, "slot_size_mib": 128, "block_size_mib": 16,
        "plugged_size_mib": 0, "requested_size_mib": 384,
    });
    assert_eq!(serde_json::to_value(device.status()).unwrap(), status);
    device.write_config(0, &[0; 56]);
    assert_eq!(config(&device), [BLOCK, 0, START, 384 << 20, 384 << 20, 0, 384 << 20]);
}

#[test]
fn blocks_are_plugged_up_to_what_is_requested() {
    let (mut driver, slots) = driver(3 * BLOCK_MIB);
    assert_eq!(ask(&mut driver, STATE, address(0), 8), Answer::State(State::Unplugged));
    assert_eq!(ask(&mut driver, PLUG, address(1), 2), Answer::Ack);
    assert_eq!((sizes(&driver), slots.present()), ([8, 2, 3], vec![0]));
    assert_eq!(ask(&mut driver, STATE, address(1), 2), Answer::State(State::Plugged));
    assert_eq!(ask(&mut driver, STATE, address(0), 2), Answer::State(State::Mixed));
    assert_eq!(ask(&mut driver, PLUG, address(3), 2), Answer::Nack);
    assert_eq!(ask(&mut driver, PLUG, address(3), 1), Answer::Ack);
    assert_eq!(ask(&mut driver, PLUG, address(4), 1), Answer::Nack);
    // Not more than requested, but plugged already.
    assert_eq!(ask(&mut driver, PLUG, address(0), 2), Answer::Error);
    driver.device().set_requested_mib(384).unwrap();
    assert_eq!(ask(&mut driver, PLUG, address(7), 2), Answer::Ack);
    assert_eq!((sizes(&driver), slots.present()), ([24, 5, 24], vec![0, 1]));
    assert_eq!(driver.device().status().plugged_size_mib, 80);
    assert!(!driver.is_broken());
    let metrics = driver.device().metrics;
    assert_eq!((metrics.plug_count, metrics.plug_fails), (6, 3));
    assert_eq!((metrics.plug_bytes, metrics.state_count), (80 << 20, 3));
}

#[test]
fn unplugged_blocks_leave_memory_and_empty_slots_the_guest() {
    let (mut driver, slots) = driver(384);
    assert_eq!(ask(&mut driver, PLUG, address(6), 4), Answer::Ack);
    // The guest may touch what lies in a slot, plugged or not.
    (4..12).for_each(|block| touch(&driver, block));
    assert_eq!(ask(&mut driver, UNPLUG, address(7), 1), Answer::Ack);
    assert_eq!((sizes(&driver), slots.present()), ([24, 3, 24], vec![0, 1]));
    let left = |driver: &Driver| (4..12).filter(|block| kept(driver, *block)).collect::<Vec<_>>();
    assert_eq!(left(&driver), [4, 5, 6, 8, 9, 10, 11]);
    assert_eq!(ask(&mut driver, UNPLUG, address(7), 2), Answer::Error);
    assert_eq!(ask(&mut driver, UNPLUG, address(8), 2), Answer::Ack);
    assert_eq!((sizes(&driver), slots.present()), ([24, 1, 24], vec![0]));
    assert_eq!(left(&driver), [4, 5, 6]);
    driver.device().set_requested_mib(BLOCK_MIB).unwrap();
    assert_eq!(ask(&mut driver, UNPLUG_ALL, u64::MAX, 0), Answer::Ack);
    // Only this lets the usable region shrink.
    assert_eq!((sizes(&driver), slots.present()), ([8, 0, 1], vec![]));
    assert!(left(&driver).is_empty());
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), Answer::Ack);
}

#[test]
fn hostile_13_blocks_out_of_range_are_refused() {
    let (mut driver, slots) = driver(9 * BLOCK_MIB);
    assert_eq!(ask(&mut driver, PLUG, address(15), 1), Answer::Ack);
    for (at, count) in [
        (address(0), 0),
        (address(0) + 1, 1),
        (address(0) + BLOCK / 2, 1),
        (address(0) - BLOCK, 1),
        (address(0) - BLOCK, 2),
        (0, 1),
        (address(15), 2),
        // Inside the region, but not usable.
        (address(16), 1),
        (address(ALL), 1),
        (address(0), u16::MAX),
        (u64::MAX - BLOCK + 1, 1),
        (u64::MAX - BLOCK + 1, u16::MAX),
        (u64::MAX, 1),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(ask(&mut driver, kind, at, count), Answer::Error, "{kind} {at:#x} {count}");
        }
    }
    for kind in [4, 0x100, u16::MAX] {
        assert_eq!(ask(&mut driver, kind, address(0), 1), Answer::Error);
    }
    assert_eq!((sizes(&driver), slots.present()), ([16, 1, 9], vec![1]));
    assert!(!driver.is_broken());
}

#[test]
fn hostile_13_requests_that_are_too_short_change_nothing() {
    let (mut driver, _) = driver(384);
    write_request(&driver, PLUG, address(0), 1);
    driver.send(0, &[readable(BUFFERS, 23), writable(BUFFERS + 32, 10)]);
    assert_eq!(read_answer(&mut driver), Answer::Error);
    driver.send(0, &[writable(BUFFERS + 32, 10)]);
    assert_eq!(read_answer(&mut driver), Answer::Error);
    // No room for an answer.
    driver.send(0, &[readable(BUFFERS, 24), writable(BUFFERS + 32, 9)]);
    driver.send(0, &[readable(BUFFERS, 24)]);
    assert_eq!(driver.used(0).iter().map(|used| used.1).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(sizes(&driver)[1], 0);
    // In pieces.
    let answer = [writable(BUFFERS + 32, 3), writable(BUFFERS + 35, 20)];
    let request = [readable(BUFFERS, 9), readable(BUFFERS + 9, 20)];
    driver.send(0, &[request, answer].concat());
    assert_eq!(read_answer(&mut driver), Answer::State(State::Plugged));
    assert_eq!(sizes(&driver)[1], 1);
}

#[test]
fn a_slot_that_cannot_be_added_is_tried_again_later() {
    let (mut driver, slots) = driver(384);
    slots.fail_at(&[1]);
    assert_eq!(ask(&mut driver, PLUG, address(6), 12), Answer::Busy);
    assert_eq!((sizes(&driver), slots.present()), ([24, 0, 24], vec![]));
    // A slot that was in use stays.
    assert_eq!(ask(&mut driver, PLUG, address(0), 1), Answer::Ack);
    assert_eq!(ask(&mut driver, PLUG, address(6), 3), Answer::Busy);
    assert_eq!((sizes(&driver), slots.present()), ([24, 1, 24], vec![0]));
    slots.fail_at(&[]);
    assert_eq!(ask(&mut driver, PLUG, address(6), 12), Answer::Ack);
    assert_eq!((sizes(&driver), slots.present()), ([24, 13, 24], vec![0, 1, 2]));
}

#[test]
fn a_slot_that_cannot_be_taken_away_stays_and_its_blocks_do_not() {
    let (mut driver, slots) = driver(384);
    assert_eq!(ask(&mut driver, PLUG, address(0), 2), Answer::Ack);
    touch(&driver, 0);
    slots.fail_at(&[0]);
    assert_eq!(ask(&mut driver, UNPLUG, address(0), 2), Answer::Ack);
    assert_eq!((sizes(&driver), slots.present()), ([24, 0, 24], vec![0]));
    assert!(!kept(&driver, 0));
    // It is there: nobody asks for it, which would fail.
    assert_eq!(ask(&mut driver, PLUG, address(0), 1), Answer::Ack);
    slots.fail_at(&[]);
    assert_eq!(ask(&mut driver, UNPLUG, address(0), 1), Answer::Ack);
    assert!(slots.present().is_empty());
}

#[test]
fn a_reset_leaves_what_is_plugged() {
    let (mut driver, slots) = driver(384);
    assert_eq!(ask(&mut driver, PLUG, address(0), 3), Answer::Ack);
    touch(&driver, 0);
    driver.device().reset();
    let features = driver.device().features();
    driver.activate(features, 16);
    assert_eq!((sizes(&driver), slots.present()), ([24, 3, 24], vec![0]));
    assert!(kept(&driver, 0));
    assert_eq!(ask(&mut driver, STATE, address(0), 3), Answer::State(State::Plugged));
}

#[test]
fn a_driver_that_would_read_unplugged_memory_does_not_start() {
    let mut device = mem(&Slots::default());
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let activation = Activation {
        memory,
        queues: vec![None],
        features: 1 << VIRTIO_F_VERSION_1,
        interrupt: Arc::new(Recorder::default()),
    };
    assert!(device.activate(activation).unwrap_err().reason.contains("unplugged"));
}

#[test]
fn hostile_13_much_to_unplug_lets_others_have_their_turn() {
    for (kind, at) in [(UNPLUG, address(0)), (UNPLUG_ALL, 0)] {
        let (mut driver, slots) = driver(384);
        assert_eq!(ask(&mut driver, PLUG, address(0), 24), Answer::Ack);
        (0..ALL).for_each(|block| touch(&driver, block));
        write_request(&driver, kind, at, 24);
        driver.add(0, &[readable(BUFFERS, 24), writable(BUFFERS + 32, 10)]);
        driver.device().process().unwrap();
        assert!(driver.used(0).is_empty());
        assert_eq!((sizes(&driver), slots.present()), ([24, 16, 24], vec![1, 2]));
        assert!(!kept(&driver, 7) && kept(&driver, 8));
        driver.run();
        assert_eq!(read_answer(&mut driver), Answer::State(State::Plugged));
        assert_eq!((sizes(&driver), slots.present()), ([24, 0, 24], vec![]));
        assert!((0..ALL).all(|block| !kept(&driver, block)));
    }
}

/// Unplugs everything, as far as one event goes.
fn half_way() -> (Driver, Slots) {
    let (mut driver, slots) = driver(384);
    assert_eq!(ask(&mut driver, PLUG, address(0), 24), Answer::Ack);
    write_request(&driver, UNPLUG, address(0), 24);
    driver.add(0, &[readable(BUFFERS, 24), writable(BUFFERS + 32, 10)]);
    driver.device().process().unwrap();
    (driver, slots)
}

#[test]
fn hostile_6_a_request_that_is_replaced_half_way_is_checked_like_any_other() {
    let (mut driver, slots) = half_way();
    // Some of these are not plugged any more.
    write_request(&driver, UNPLUG, address(0), 23);
    driver.run();
    assert_eq!(read_answer(&mut driver), Answer::Error);
    assert_eq!((sizes(&driver), slots.present()), ([24, 16, 24], vec![1, 2]));
    // Nor does the first one go on, once there was another.
    assert_eq!(ask(&mut driver, UNPLUG, address(0), 24), Answer::Error);
    assert_eq!(ask(&mut driver, UNPLUG, address(8), 16), Answer::Ack);

    // Nor after a reset.
    let (mut driver, _) = half_way();
    driver.device().reset();
    let features = driver.device().features();
    driver.activate(features, 16);
    assert_eq!(ask(&mut driver, UNPLUG, address(0), 24), Answer::Error);
}

#[test]
fn saved_memory_goes_on_where_it_was() {
    let (before, _) = half_way();
    before.device().set_requested_mib(160).unwrap();
    let saved = before.device().save();
    let text = serde_json::to_string(&saved).unwrap();
    let state: MemState = serde_json::from_str(&text).unwrap();
    assert_eq!(state, saved);

    let slots = Slots::default();
    let start = GuestAddress(state.guest_address);
    let mut device = Mem::new(state.options.clone(), start, Box::new(slots.clone())).unwrap();
    device.restore(state).unwrap();
    assert_eq!(device.save(), saved);
    assert_eq!(slots.present(), [1, 2]);
    assert_eq!(config(&device), config(&before.device()));
    let mut driver = drive(device, 160);
    // The request that was not finished is found in the queue again.
    assert_eq!(ask(&mut driver, UNPLUG, address(0), 24), Answer::Ack);
    assert_eq!((sizes(&driver), slots.present()), ([24, 0, 10], vec![]));
}

#[test]
fn a_state_of_other_memory_or_none_at_all_is_refused() {
    let slots = Slots::default();
    let (source, _) = half_way();
    let good = source.device().save();
    let refusal = |state: MemState| mem(&slots).restore(state).unwrap_err();
    let other = MemOptions { total_size_mib: 256, ..options() };
    let state = MemState { options: other, ..good.clone() };
    assert!(matches!(refusal(state), MemError::OtherMemory));
    let state = MemState { guest_address: START + BLOCK, ..good.clone() };
    assert!(matches!(refusal(state), MemError::OtherMemory));
    let pending = Pending::clone(source.device().region.pending().unwrap());
    let beyond = serde_json::to_string(&pending).unwrap().replace("24}}", "25}}");
    let beyond = serde_json::from_str(&beyond).unwrap();
    assert_ne!(pending, beyond);
    for state in [
        MemState { usable_blocks: 25, ..good.clone() },
        MemState { usable_blocks: 32, ..good.clone() },
        MemState { requested_blocks: 25, ..good.clone() },
        MemState { usable_blocks: 16, ..good.clone() },
        MemState { plugged: vec![1..2, 20..25], ..good.clone() },
        MemState { plugged: vec![Range { start: 5, end: 4 }, 5..6], ..good.clone() },
        MemState { plugged: vec![1..2, usize::MAX..usize::MAX], ..good.clone() },
        MemState { pending: Some(beyond), ..good.clone() },
    ] {
        assert!(matches!(refusal(state), MemError::Unsound));
    }
    assert!(slots.present().is_empty());
    slots.fail_at(&[2]);
    assert!(matches!(refusal(good), MemError::Slot { slot: 2, .. }));
}

#[test]
fn hostile_1_broken_queues_are_survived() {
    survives_broken_queues(|| {
        let mut device = mem(&Slots::default());
        device.set_requested_mib(384).unwrap();
        device
    });
}

/// What a test does to the device.
#[derive(Clone, Debug)]
enum Step {
    Request(u32),
    Ask { kind: u16, address: u64, count: u16 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let aligned = (0..ALL as u64 + 1).prop_map(|block| START + block * BLOCK);
    let address = prop_oneof![9 => aligned, 1 => any::<u64>()];
    let count = prop_oneof![9 => 0..12u16, 1 => any::<u16>()];
    let kind = prop_oneof![5 => Just(PLUG), 3 => Just(UNPLUG), 3 => Just(STATE), 1 => 2..5u16];
    let ask = (kind, address, count).prop_map(|(kind, address, count)| Step::Ask {
        kind,
        address,
        count,
    });
    let request = (0..ALL as u32 + 1).prop_map(|blocks| Step::Request(blocks * BLOCK_MIB));
    prop::collection::vec(prop_oneof![1 => request, 8 => ask], 1..60)
}

/// The specification, block for block.
#[derive(Default)]
struct Model {
    plugged: BTreeSet<usize>,
    requested: usize,
    usable: usize,
}

impl Model {
    fn in_slots(&self) -> usize {
        self.requested.div_ceil(IN_SLOT) * IN_SLOT
    }

    fn answer(&mut self, kind: u16, blocks: Blocks) -> Answer {
        if kind == UNPLUG_ALL {
            self.plugged.clear();
            self.usable = self.in_slots();
            return Answer::Ack;
        }
        let first = blocks.address.wrapping_sub(START) / BLOCK;
        let end = first.saturating_add(blocks.count.into());
        let aligned = blocks.address.is_multiple_of(BLOCK);
        let usable = blocks.address >= START && end <= self.usable as u64;
        if kind > STATE || !aligned || blocks.count == 0 || !usable {
            return Answer::Error;
        }
        let range: BTreeSet<usize> = (first as usize..end as usize).collect();
        let (all, none) = (range.is_subset(&self.plugged), range.is_disjoint(&self.plugged));
        match kind {
            PLUG if !none => Answer::Error,
            PLUG if self.plugged.len() + range.len() > self.requested => Answer::Nack,
            PLUG => {
                self.plugged.extend(range);
                Answer::Ack
            }
            UNPLUG if !all => Answer::Error,
            UNPLUG => {
                self.plugged.retain(|block| !range.contains(block));
                Answer::Ack
            }
            _ if all => Answer::State(State::Plugged),
            _ if none => Answer::State(State::Unplugged),
            _ => Answer::State(State::Mixed),
        }
    }
}

proptest! {
    #[test]
    fn hostile_13_any_requests_are_answered_as_the_specification_says(steps in steps()) {
        let (mut driver, slots) = driver(0);
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Request(mib) => {
                    driver.device().set_requested_mib(mib).unwrap();
                    model.requested = (mib / BLOCK_MIB) as usize;
                    model.usable = model.usable.max(model.in_slots());
                }
                Step::Ask { kind, address, count } => {
                    let before = model.plugged.len();
                    let answer = ask(&mut driver, kind, address, count);
                    prop_assert_eq!(answer, model.answer(kind, Blocks { address, count }));
                    let now = sizes(&driver)[1];
                    // It may have been more before less was requested.
                    prop_assert!(now <= before || now <= model.requested);
                }
            }
            prop_assert_eq!(sizes(&driver), [model.usable, model.plugged.len(), model.requested]);
            let needed: BTreeSet<usize> =
                model.plugged.iter().map(|block| block / IN_SLOT).collect();
            prop_assert!(slots.present().into_iter().eq(needed));
            let plugged = driver.device().region.plugged_ranges().into_iter().flatten();
            prop_assert!(plugged.eq(model.plugged.iter().copied()));
        }
        prop_assert!(!driver.is_broken());
        let saved = driver.device().save();
        let again = Slots::default();
        let mut device = mem(&again);
        device.restore(saved.clone()).unwrap();
        prop_assert_eq!(device.save(), saved);
        prop_assert_eq!(again.present(), slots.present());
    }
}
