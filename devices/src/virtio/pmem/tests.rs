//! Persistent memory, driven.

use std::os::unix::fs::FileExt;

use super::*;
use crate::virtio::test_driver::{self, BUFFERS, readable, writable};
use crate::virtio::testing::{Driver, SIZE, survives_broken_queues};

const START: u64 = 1 << 32;

fn pmem(read_only: bool) -> (Pmem, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(3 << 20).unwrap();
    let pmem = PmemFile::open(file.path(), read_only).unwrap();
    (Pmem::new("test", pmem, GuestAddress(START)).unwrap(), file)
}

/// Sends a request; what was written, and the answer.
fn ask(driver: &mut Driver<Pmem>, request: &[u8]) -> (u32, i32) {
    driver.start_again();
    let buffer = driver.buffer(request);
    let answer = driver.buffer(&[0xee; 4]);
    driver.send(0, &[(buffer, request.len() as u32)], &[(answer, 4)]);
    driver.notify(0);
    let used = driver.used(0);
    assert_eq!(used.len(), 1);
    (used[0].1, i32::from_le_bytes(driver.read(answer, 4).try_into().unwrap()))
}

#[test]
fn the_configuration_says_where_it_is_and_how_large() {
    let (mut pmem, _file) = pmem(false);
    assert_eq!((pmem.guest_address().0, pmem.file().size()), (START, 4 << 20));
    let mut config = [0xff; 20];
    pmem.read_config(0, &mut config);
    assert_eq!(config[..8], START.to_le_bytes());
    assert_eq!(config[8..16], (4u64 << 20).to_le_bytes());
    assert_eq!(config[16..], [0; 4]);
    pmem.write_config(0, &[1; 16]);
    let mut again = [0xff; 20];
    pmem.read_config(0, &mut again);
    assert_eq!(config, again);
    // Addresses are in the configuration, not in a shared memory region.
    assert_eq!(pmem.features() & 1, 0);
}

#[test]
fn a_flush_is_answered() {
    for read_only in [false, true] {
        let (pmem, _file) = pmem(read_only);
        let mut driver = Driver::new(pmem);
        assert_eq!(ask(&mut driver, &FLUSH.to_le_bytes()), (4, OK));
        // What follows the type means nothing.
        assert_eq!(ask(&mut driver, &[0; 100]), (4, OK));
        let metrics = driver.device.lock().unwrap().metrics;
        assert_eq!((metrics.flush_count, metrics.flush_fails), (2, 0));
    }
}

#[test]
fn a_flush_of_a_file_that_was_cut_off_fails() {
    let (pmem, file) = pmem(false);
    let mut driver = Driver::new(pmem);
    file.as_file().set_len(4096).unwrap();
    assert_eq!(ask(&mut driver, &FLUSH.to_le_bytes()), (4, FAILED));
    assert!(!driver.wants_reset());
    file.as_file().set_len(3 << 20).unwrap();
    file.as_file().write_all_at(&[1], 0).unwrap();
    assert_eq!(ask(&mut driver, &FLUSH.to_le_bytes()), (4, OK));
}

#[test]
fn hostile_13_what_is_no_flush_fails() {
    let (pmem, _file) = pmem(false);
    let mut driver = Driver::new(pmem);
    for request in [&1u32.to_le_bytes()[..], &[0xff; 4], &[0; 3], &[0, 0, 0, 1, 0]] {
        assert_eq!(ask(&mut driver, request), (4, FAILED));
    }
    assert!(!driver.wants_reset());
}

#[test]
fn hostile_13_an_answer_may_be_split_or_have_no_room() {
    let (pmem, _file) = pmem(false);
    let mut driver = Driver::new(pmem);
    let request = driver.buffer(&[0; 4]);
    let answer = driver.buffer(&[0xee; 6]);
    driver.send(0, &[(request, 1), (request, 3)], &[(answer, 3), (answer + 3, 3)]);
    driver.send(0, &[(request, 4)], &[(request, 3)]);
    driver.send(0, &[(request, 4)], &[]);
    driver.send(0, &[], &[(answer + 5, 1)]);
    driver.notify(0);
    let lengths: Vec<_> = driver.used(0).iter().map(|(_, length)| *length).collect();
    assert_eq!(lengths, [4, 0, 0, 0]);
    assert_eq!(driver.read(answer, 6), [0, 0, 0, 0, 0xee, 0xee]);
    assert_eq!(driver.read(request, 4), [0; 4]);
}

#[test]
fn hostile_7_a_storm_of_flushes_is_one() {
    let (pmem, _file) = pmem(false);
    let mut driver = Driver::new(pmem);
    let request = driver.buffer(&[0; 4]);
    let unknown = driver.buffer(&[1; 4]);
    let answers = driver.buffer(&[0xee; 4 * SIZE as usize]);
    // No more descriptors than there are, two for each request.
    for index in 0..SIZE / 2 {
        let request = if index == 2 { unknown } else { request };
        driver.send(0, &[(request, 4)], &[(answers + 4 * u64::from(index), 4)]);
    }
    let device = driver.device.clone();
    let mut device = device.lock().unwrap();
    let device = &mut *device;
    let queue = device.queue.as_mut().unwrap();
    let mut flushes = 0;
    // All that were there when it was made share it; those that came later do not.
    for taken in [5, 64] {
        let more = serve("test", queue, &mut device.chains[..taken], || {
            flushes += 1;
            -flushes
        });
        assert_eq!(more.unwrap(), taken == 5);
    }
    assert_eq!(flushes, 2);
    let answers = driver.read(answers, 4 * SIZE as usize / 2);
    let answers: Vec<_> = answers.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
    assert_eq!(answers, [-1, -1, FAILED, -1, -1, -2, -2, -2]);
    // Nothing to do: nothing to flush.
    assert!(!serve("test", queue, &mut device.chains, || unreachable!()).unwrap());
}

#[test]
fn more_requests_than_one_event_takes_are_all_answered() {
    for event_idx in [false, true] {
        let (pmem, _file) = pmem(false);
        let mut driver = test_driver::Driver::new(pmem);
        let mut features = driver.device().features();
        if !event_idx {
            features &= !(1 << VIRTIO_RING_F_EVENT_IDX);
        }
        driver.activate(features, QUEUE_SIZE);
        driver.write(BUFFERS, &[0; 4]);
        for round in 0..10 {
            // One descriptor for each: there is no answer.
            for _ in 0..QUEUE_SIZE {
                driver.add(0, &[readable(BUFFERS, 4)]);
            }
            driver.device().event[0].write(1).unwrap();
            driver.run();
            assert_eq!(driver.used(0).len(), usize::from(QUEUE_SIZE), "{round}");
            driver.send(0, &[readable(BUFFERS, 4), writable(BUFFERS + 8, 4)]);
            assert_eq!(driver.used(0).len(), 1);
            assert_eq!(driver.read(BUFFERS + 8, 4), [0; 4]);
        }
        assert!(!driver.is_broken());
    }
}

#[test]
fn hostile_1_broken_queues_are_survived() {
    survives_broken_queues(|| pmem(false).0);
    survives_broken_queues(|| pmem(true).0);
}
