//! A balloon, driven.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::test_driver::{self, BUFFERS, readable, writable};
use crate::virtio::testing::{Driver, Recorder, survives_broken_queues};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
// Where all features are offered.
const STATISTICS: usize = 2;
const HINTING: usize = 3;
const REPORTING: usize = 4;
/// The first page that tests give away, behind the buffers of `testing::Driver`.
const FIRST: u32 = 0x80;

fn all() -> BalloonOptions {
    BalloonOptions {
        amount_mib: 3,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    }
}

fn balloon() -> Balloon {
    Balloon::new(all()).unwrap()
}

/// A driver whose pages from [`FIRST`] on begin with a one.
fn driver() -> Driver<Balloon> {
    let driver = Driver::new(balloon());
    for page in FIRST..FIRST + 0x40 {
        driver.memory.write_obj(1u8, address(page)).unwrap();
    }
    driver
}

fn address(page: u32) -> GuestAddress {
    GuestAddress(u64::from(page) * PAGE)
}

/// The pages among the first so many from [`FIRST`] on that were given back.
fn gone(driver: &Driver<Balloon>, count: u32) -> Vec<u32> {
    let kept = |page| driver.memory.read_obj::<u8>(address(page)).unwrap();
    (0..count).filter(|page| kept(FIRST + page) == 0).collect()
}

/// Sends a list of pages, counted from [`FIRST`].
fn send_pages(driver: &mut Driver<Balloon>, queue: usize, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| (FIRST + page).to_le_bytes()).collect();
    let buffer = driver.buffer(&bytes);
    driver.send(queue, &[(buffer, bytes.len() as u32)], &[]);
    driver.notify(queue);
}

/// A range of pages, counted from [`FIRST`], as a buffer.
fn range(first: u32, pages: u32) -> (u64, u32) {
    (address(FIRST + first).0, pages * PAGE as u32)
}

fn config(device: &Balloon) -> [u32; 4] {
    let mut bytes = [0xff; 16];
    device.read_config(0, &mut bytes);
    let mut words = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
    std::array::from_fn(|_| words.next().unwrap())
}

fn entry(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

/// Lets the event loop run until something holds.
fn wait_for(
    driver: &mut test_driver::Driver<Balloon>,
    mut holds: impl FnMut(&mut test_driver::Driver<Balloon>) -> bool,
) {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds(driver) {
        assert!(Instant::now() < end, "nothing happened");
        driver.run();
    }
}

#[test]
fn what_goes_in_and_out_is_counted() {
    let mut driver = driver();
    send_pages(&mut driver, INFLATE, &[0, 1, 2]);
    send_pages(&mut driver, INFLATE, &[3]);
    send_pages(&mut driver, DEFLATE, &[0]);
    driver.send(REPORTING, &[], &[range(8, 2), range(12, 1)]);
    driver.notify(REPORTING);
    let statistics = driver.buffer(&entry(4, 7));
    driver.send(STATISTICS, &[(statistics, 10)], &[]);
    driver.notify(STATISTICS);
    let metrics = driver.device.lock().unwrap().metrics;
    let expected = BalloonMetrics {
        inflate_count: 2,
        deflate_count: 1,
        free_page_report_count: 2,
        free_page_report_freed: 3 * PAGE,
        stats_updates_count: 1,
        ..BalloonMetrics::default()
    };
    assert_eq!(metrics, expected);
    driver.set_available(INFLATE, 100);
    driver.notify(INFLATE);
    let metrics = driver.device.lock().unwrap().metrics;
    assert_eq!((metrics.event_fails, metrics.stats_update_fails), (1, 0));
}

#[test]
fn queues_and_features_are_those_that_were_asked_for() {
    for choice in 0..16u64 {
        let [deflate_on_oom, statistics, hinting, reporting] =
            std::array::from_fn(|bit| choice & 1 << bit != 0);
        let balloon = Balloon::new(BalloonOptions {
            amount_mib: 0,
            deflate_on_oom,
            stats_polling_interval_s: statistics.into(),
            free_page_hinting: hinting,
            free_page_reporting: reporting,
        })
        .unwrap();
        let mut roles = vec![Role::Inflate, Role::Deflate];
        roles.extend(statistics.then_some(Role::Statistics));
        roles.extend(hinting.then_some(Role::Hinting));
        roles.extend(reporting.then_some(Role::Reporting));
        assert_eq!(balloon.roles, roles);
        assert_eq!(balloon.queue_max_sizes().len(), roles.len());
        assert_eq!(balloon.queue_events().len(), roles.len());
        let offered = [false, statistics, deflate_on_oom, hinting, false, reporting];
        for (bit, offered) in offered.into_iter().enumerate() {
            assert_eq!(balloon.features() & 1 << bit != 0, offered, "{choice}: {bit}");
        }
        assert_eq!(balloon.statistics().is_some(), statistics);
        assert_eq!(balloon.hinting_status().is_some(), hinting);
    }
}

#[test]
fn pages_in_the_balloon_leave_memory() {
    let mut driver = driver();
    // Neighbours in either order, one for itself, one twice.
    send_pages(&mut driver, INFLATE, &[5, 4, 3, 9, 11, 12, 12, 13]);
    assert_eq!(gone(&driver, 20), [3, 4, 5, 9, 11, 12, 13]);
    assert_eq!(driver.used(INFLATE), [(0, 0)]);
    assert_eq!(driver.interrupt.used.load(Ordering::SeqCst), 1);
    driver.memory.write_obj(1u8, address(FIRST + 4)).unwrap();
    send_pages(&mut driver, DEFLATE, &[4]);
    assert_eq!(driver.used(DEFLATE), [(0, 0)]);
    assert_eq!(gone(&driver, 6), [3, 5]);
}

#[test]
fn both_sides_say_how_large_the_balloon_is() {
    let mut driver = driver();
    let device = driver.device.clone();
    let mut device = device.lock().unwrap();
    let changes = || driver.interrupt.configured.load(Ordering::SeqCst);
    assert_eq!(config(&device), [3 * 256, 0, 0, 0]);
    device.set_target_mib(5);
    assert_eq!((config(&device)[0], changes()), (5 * 256, 1));
    // To try once more.
    device.set_target_mib(5);
    assert_eq!(changes(), 2);
    device.write_config(4, &700u32.to_le_bytes());
    let statistics = device.statistics().unwrap();
    assert_eq!((statistics.target_pages, statistics.target_mib), (5 * 256, 5));
    assert_eq!((statistics.actual_pages, statistics.actual_mib), (700, 2));
    assert_eq!(changes(), 2);
    assert_eq!(device.options(), &BalloonOptions { amount_mib: 5, ..all() });
    // More than page numbers can say.
    device.set_target_mib(u32::MAX);
    assert_eq!(config(&device)[0], u32::MAX);
    drop(device);
    // A new driver finds the wish, and an empty balloon.
    driver.start_again();
    assert_eq!(config(&driver.device.lock().unwrap())[..2], [u32::MAX, 0]);
}

#[test]
fn hostile_13_pages_outside_memory_are_ignored_and_the_others_are_not() {
    let mut driver = driver();
    let last = (1 << 20) / PAGE as u32 - 1;
    driver.memory.write_obj(1u8, address(last)).unwrap();
    let outside = [last + 1, last + 2, u32::MAX, u32::MAX - 1].map(|page| page - FIRST);
    let pages = [&outside[..], &[last - FIRST, 7], &outside[..]].concat();
    send_pages(&mut driver, INFLATE, &pages);
    assert_eq!(driver.memory.read_obj::<u8>(address(last)).unwrap(), 0);
    assert_eq!(gone(&driver, 10), [7]);
    assert!(!driver.wants_reset());
    assert_eq!(driver.used(INFLATE).len(), 1);
}

/// docs/hostile.md 13: a page twice, and those that the queues are in.
#[test]
fn hostile_13_pages_given_twice_and_the_devices_own_are_survived() {
    let mut driver = driver();
    send_pages(&mut driver, INFLATE, &[3, 3, 4, 3]);
    assert_eq!(gone(&driver, 10), [3, 4]);
    assert_eq!(driver.used(INFLATE).len(), 1);
    // All of memory, in the middle of which the list itself is.
    let bytes: Vec<u8> = (0..256u32).flat_map(u32::to_le_bytes).collect();
    let buffer = driver.buffer(&bytes);
    driver.send(INFLATE, &[(buffer, bytes.len() as u32)], &[]);
    driver.notify(INFLATE);
    assert!(gone(&driver, 10).len() >= 2);
    // The rings went with it, but the next driver has its own.
    driver.start_again();
    assert!(!driver.wants_reset());
    driver.memory.write_obj(1u8, address(FIRST + 7)).unwrap();
    send_pages(&mut driver, INFLATE, &[7]);
    assert_eq!(driver.memory.read_obj::<u8>(address(FIRST + 7)).unwrap(), 0);
}

#[test]
fn hostile_13_a_list_of_pages_may_be_split_anywhere_and_end_anywhere() {
    let mut driver = driver();
    let bytes: Vec<u8> = (0..4).flat_map(|page: u32| (FIRST + page).to_le_bytes()).collect();
    let buffer = driver.buffer(&bytes);
    // The last number lacks a byte.
    driver.send(INFLATE, &[(buffer, 3), (buffer + 3, 7), (buffer + 10, 5)], &[]);
    // Nothing to read, and something that is not for us.
    driver.send(INFLATE, &[], &[range(8, 1)]);
    driver.notify(INFLATE);
    assert_eq!(gone(&driver, 10), [0, 1, 2]);
    assert_eq!(driver.used(INFLATE).len(), 2);
}

#[test]
fn reported_ranges_leave_memory() {
    let mut driver = driver();
    // What is to be read is no report.
    driver.send(REPORTING, &[range(1, 1)], &[range(3, 2), range(8, 1)]);
    // Part of a page is kept.
    driver.send(REPORTING, &[], &[(address(FIRST + 12).0 + 1, 2 * PAGE as u32)]);
    driver.notify(REPORTING);
    assert_eq!(gone(&driver, 20), [3, 4, 8, 13]);
    assert_eq!(driver.used(REPORTING), [(0, 0), (3, 0)]);
}

/// Sends a hinting command.
fn command(driver: &mut Driver<Balloon>, command: u32) {
    let buffer = driver.buffer(&command.to_le_bytes());
    driver.send(HINTING, &[(buffer, 4)], &[]);
    driver.notify(HINTING);
}

fn hint(driver: &mut Driver<Balloon>, first: u32) {
    driver.send(HINTING, &[], &[range(first, 1)]);
    driver.notify(HINTING);
}

#[test]
fn hints_of_the_current_command_leave_memory() {
    let mut driver = driver();
    let device = driver.device.clone();
    let status = || {
        let status = device.lock().unwrap().hinting_status().unwrap();
        (status.host_cmd, status.guest_cmd)
    };
    assert_eq!(status(), (0, None));
    // Before any command.
    hint(&mut driver, 0);
    device.lock().unwrap().start_hinting(true).unwrap();
    assert_eq!(driver.interrupt.configured.load(Ordering::SeqCst), 1);
    assert_eq!(config(&device.lock().unwrap())[2], 2);
    // Before the guest has taken it up.
    hint(&mut driver, 1);
    command(&mut driver, 2);
    assert_eq!(status(), (2, Some(2)));
    hint(&mut driver, 2);
    hint(&mut driver, 3);
    command(&mut driver, 0);
    assert_eq!(status(), (1, Some(0)));
    assert_eq!(config(&device.lock().unwrap())[2], 1);
    assert_eq!(driver.interrupt.configured.load(Ordering::SeqCst), 2);
    hint(&mut driver, 4);
    assert_eq!(gone(&driver, 10), [2, 3]);
    assert_eq!(driver.used(HINTING).len(), 7);
}

#[test]
fn without_acknowledgement_the_host_ends_hinting() {
    let mut driver = driver();
    let device = driver.device.clone();
    device.lock().unwrap().start_hinting(false).unwrap();
    command(&mut driver, 2);
    command(&mut driver, 0);
    hint(&mut driver, 0);
    assert_eq!(config(&device.lock().unwrap())[2], 2);
    device.lock().unwrap().stop_hinting().unwrap();
    assert_eq!(config(&device.lock().unwrap())[2], 1);
    // Stopped while the guest is at it.
    device.lock().unwrap().start_hinting(true).unwrap();
    command(&mut driver, 3);
    hint(&mut driver, 1);
    device.lock().unwrap().stop_hinting().unwrap();
    hint(&mut driver, 2);
    command(&mut driver, 0);
    assert_eq!(gone(&driver, 10), [1]);
    assert_eq!(driver.interrupt.configured.load(Ordering::SeqCst), 4);
}

#[test]
fn a_driver_is_told_of_a_command_that_was_there_before_it() {
    let mut driver = driver();
    driver.device.lock().unwrap().start_hinting(true).unwrap();
    command(&mut driver, 2);
    driver.start_again();
    assert_eq!(driver.interrupt.configured.load(Ordering::SeqCst), 2);
    let status = driver.device.lock().unwrap().hinting_status();
    assert_eq!(status, Some(HintingStatus { host_cmd: 2, guest_cmd: None }));
}

#[test]
fn hostile_13_hinting_commands_of_any_length_are_survived() {
    let mut driver = driver();
    let device = driver.device.clone();
    device.lock().unwrap().start_hinting(true).unwrap();
    let buffer = driver.buffer(&[&2u32.to_le_bytes()[..], &[0xff; 60]].concat());
    driver.send(HINTING, &[(buffer, 3)], &[range(0, 1)]);
    driver.notify(HINTING);
    assert_eq!(device.lock().unwrap().hinting_status().unwrap().guest_cmd, None);
    // A command and ranges in one chain.
    driver.send(HINTING, &[(buffer, 2), (buffer + 2, 62)], &[range(1, 1)]);
    driver.notify(HINTING);
    assert_eq!(gone(&driver, 4), [1]);
    assert_eq!(driver.used(HINTING).len(), 2);
}

#[test]
fn statistics_are_kept_and_asked_for_again_and_again() {
    for event_idx in [false, true] {
        let mut driver = test_driver::Driver::new(balloon());
        let mut features = driver.device().features();
        if !event_idx {
            features &= !(1 << VIRTIO_RING_F_EVENT_IDX);
        }
        driver.activate(features, 4);
        for round in 1..20 {
            let bytes = [entry(4, round), entry(0xffff, 1), entry(15, round + 1)].concat();
            driver.write(BUFFERS, &bytes);
            let head = driver.send(STATISTICS, &[readable(BUFFERS, bytes.len() as u32)]);
            let statistics = driver.device().statistics().unwrap();
            assert_eq!(statistics.free_memory, Some(round));
            assert_eq!(statistics.direct_reclaim, Some(round + 1));
            assert_eq!(statistics.total_memory, None);
            assert!(driver.used(STATISTICS).is_empty());
            assert_eq!(driver.interrupts(), 0);
            // The first update after a change is at once.
            driver.device().set_stats_interval(1000 + round as u16).unwrap();
            let mut used = Vec::new();
            wait_for(&mut driver, |driver| {
                used = driver.used(STATISTICS);
                !used.is_empty()
            });
            assert_eq!(used, [(head, 0)]);
            assert_eq!(driver.interrupts(), 1);
        }
        assert_eq!(driver.device().options().stats_polling_interval_s, 1019);
    }
}

#[test]
fn statistics_are_asked_for_at_their_interval() {
    let mut driver = test_driver::Driver::new(balloon());
    let features = driver.device().features();
    driver.activate(features, 4);
    let begin = Instant::now();
    let head = driver.send(STATISTICS, &[readable(BUFFERS, 10)]);
    wait_for(&mut driver, |driver| driver.used(STATISTICS) == [(head, 0)]);
    assert!(begin.elapsed() > Duration::from_millis(500));
}

#[test]
fn every_tag_has_its_name() {
    let mut driver = driver();
    let bytes: Vec<u8> = (0..16).flat_map(|tag| entry(tag, 100 + u64::from(tag))).collect();
    let buffer = driver.buffer(&bytes);
    driver.send(STATISTICS, &[(buffer, bytes.len() as u32)], &[]);
    driver.notify(STATISTICS);
    let statistics = driver.device.lock().unwrap().statistics();
    let expected = serde_json::json!({
        "target_pages": 768, "actual_pages": 0, "target_mib": 3, "actual_mib": 0,
        "swap_in": 100, "swap_out": 101, "major_faults": 102, "minor_faults": 103,
        "free_memory": 104, "total_memory": 105, "available_memory": 106, "disk_caches": 107,
        "hugetlb_allocations": 108, "hugetlb_failures": 109, "oom_kill": 110, "alloc_stall": 111,
        "async_scan": 112, "direct_scan": 113, "async_reclaim": 114, "direct_reclaim": 115,
    });
    assert_eq!(serde_json::to_value(statistics).unwrap(), expected);
    driver.start_again();
    let statistics = driver.device.lock().unwrap().statistics();
    let nothing = serde_json::json!({
        "target_pages": 768, "actual_pages": 0, "target_mib": 3, "actual_mib": 0,
    });
    assert_eq!(serde_json::to_value(statistics).unwrap(), nothing);
}

#[test]
fn statistics_cannot_be_enabled_or_disabled() {
    let mut without = Balloon::new(BalloonOptions::default()).unwrap();
    assert_eq!(without.set_stats_interval(0), Ok(()));
    assert_eq!(without.set_stats_interval(1), Err(BalloonError::NoStatistics));
    let mut with = balloon();
    assert_eq!(with.set_stats_interval(0), Err(BalloonError::StatisticsStay));
    assert_eq!(with.set_stats_interval(7), Ok(()));
    assert_eq!(with.options().stats_polling_interval_s, 7);
    assert_eq!(without.start_hinting(true), Err(BalloonError::NoHinting));
    assert_eq!(without.stop_hinting(), Err(BalloonError::NoHinting));
}

#[test]
fn hostile_13_more_than_one_buffer_of_statistics_waits() {
    let mut driver = driver();
    let huge = driver.buffer(&vec![0xff; 0x8000]);
    let odd = driver.buffer(&entry(4, 1)[..9]);
    driver.send(STATISTICS, &[(huge, 0x8000)], &[]);
    driver.send(STATISTICS, &[(odd, 9)], &[]);
    driver.send(STATISTICS, &[], &[(odd, 9)]);
    for round in 0..3 {
        driver.notify(STATISTICS);
        assert_eq!(driver.used(STATISTICS).len(), round);
        driver.device.lock().unwrap().request_statistics().unwrap();
    }
    assert_eq!(driver.used(STATISTICS), [(0, 0), (1, 0), (2, 0)]);
    driver.device.lock().unwrap().request_statistics().unwrap();
    assert_eq!(driver.used(STATISTICS).len(), 3);
    let statistics = driver.device.lock().unwrap().statistics().unwrap();
    assert_eq!(statistics.free_memory, None);
}

#[test]
fn a_saved_balloon_goes_on_where_it_was() {
    let mut driver = driver();
    let bytes = entry(5, 77);
    let buffer = driver.buffer(&bytes);
    let unused = driver.buffer(&[0]);
    driver.send(STATISTICS, &[(unused, 1)], &[]);
    driver.notify(STATISTICS);
    driver.device.lock().unwrap().request_statistics().unwrap();
    let head = driver.send(STATISTICS, &[(buffer, 10)], &[]);
    driver.notify(STATISTICS);
    assert_eq!(head, 1);
    let saved = {
        let mut device = driver.device.lock().unwrap();
        device.set_target_mib(9);
        device.set_stats_interval(500).unwrap();
        device.write_config(4, &256u32.to_le_bytes());
        device.start_hinting(true).unwrap();
        device.save()
    };
    let text = serde_json::to_string(&saved).unwrap();
    let state: BalloonState = serde_json::from_str(&text).unwrap();
    assert_eq!(state, saved);

    let mut device = Balloon::new(state.options.clone()).unwrap();
    device.restore(state).unwrap();
    assert_eq!(device.save(), saved);
    assert_eq!(config(&device), [9 * 256, 256, 2, 0]);
    assert_eq!(device.statistics().unwrap().total_memory, Some(77));
    let mut driver = Driver::new(device);
    driver.device.lock().unwrap().request_statistics().unwrap();
    assert_eq!(driver.used(STATISTICS), [(1, 0)]);
    command(&mut driver, 2);
    command(&mut driver, 0);
    assert_eq!(config(&driver.device.lock().unwrap())[2], 1);
}

#[test]
fn a_state_of_other_features_is_refused() {
    let state = balloon().save();
    for options in [
        BalloonOptions { deflate_on_oom: false, ..all() },
        BalloonOptions { stats_polling_interval_s: 0, ..all() },
        BalloonOptions { free_page_hinting: false, ..all() },
        BalloonOptions { free_page_reporting: false, ..all() },
    ] {
        let mut balloon = Balloon::new(options.clone()).unwrap();
        assert_eq!(balloon.restore(state.clone()), Err(BalloonError::OtherFeatures));
        assert_eq!(balloon.options(), &options);
    }
    let other = BalloonOptions { amount_mib: 8, stats_polling_interval_s: 9, ..all() };
    assert_eq!(Balloon::new(other).unwrap().restore(state), Ok(()));
}

#[test]
fn queues_of_features_the_driver_did_not_take_are_left_alone() {
    let mut driver = test_driver::Driver::new(balloon());
    driver.activate(1 << VIRTIO_F_VERSION_1, 4);
    driver.device().start_hinting(true).unwrap();
    driver.write(BUFFERS, &[1; 8192]);
    for queue in [STATISTICS, HINTING, REPORTING] {
        driver.send(queue, &[writable(BUFFERS, 8192)]);
        assert!(driver.used(queue).is_empty());
    }
    driver.device().set_stats_interval(2).unwrap();
    driver.run();
    assert_eq!(driver.read(BUFFERS, 8192), [1; 8192]);
    driver.write(BUFFERS, &[0; 4]);
    let head = driver.send(INFLATE, &[readable(BUFFERS, 4)]);
    assert_eq!(driver.used(INFLATE), [(head, 0)]);
}

#[test]
fn a_balloon_starts_without_optional_queues_only() {
    for (missing, starts) in [(INFLATE, false), (DEFLATE, false), (STATISTICS, true)] {
        let mut balloon = balloon();
        let memory = GuestMemory::from_ranges(&[(address(0), 1 << 20)]).unwrap();
        let queue = |index| {
            (index != missing).then(|| {
                let mut queue = Queue::new(16).unwrap();
                queue.set_ready(true);
                queue
            })
        };
        let queues = (0..5).map(queue).collect();
        let (features, interrupt) = (balloon.features(), Arc::new(Recorder::default()));
        let activation = Activation { memory, queues, features, interrupt };
        assert_eq!(balloon.activate(activation).is_ok(), starts);
        assert!(balloon.request_statistics().is_ok());
    }
}

#[test]
fn hostile_13_a_chain_worth_many_events_lets_others_have_their_turn() {
    let mut driver = test_driver::Driver::new(balloon());
    let features = driver.device().features();
    driver.activate(features, 256);
    // Half a gigabyte, though all of the same memory.
    let parts = [writable(BUFFERS, 2 << 20); 255];
    driver.write(BUFFERS, &[1; 4096]);
    driver.add(REPORTING, &parts);
    driver.device().process_queue(REPORTING).unwrap();
    assert!(driver.used(REPORTING).is_empty());
    driver.notify(REPORTING);
    assert_eq!(driver.used(REPORTING), [(0, 0)]);
    assert_eq!(driver.read(BUFFERS, 4096), [0; 4096]);
    // Half a million pages, none of which is memory.
    driver.write(BUFFERS, &[0xff; 0x8_0000]);
    driver.add(INFLATE, &[readable(BUFFERS, 0x8_0000); 4]);
    driver.device().process_queue(INFLATE).unwrap();
    assert!(driver.used(INFLATE).is_empty());
    driver.notify(INFLATE);
    assert_eq!(driver.used(INFLATE), [(0, 0)]);
    // The next chain is not begun in its middle.
    let page = (BUFFERS >> 12) as u32 + 16;
    driver.write(BUFFERS + (16 << 12), &[1]);
    driver.write(BUFFERS, &page.to_le_bytes());
    driver.send(INFLATE, &[readable(BUFFERS, 4)]);
    assert_eq!(driver.read(BUFFERS + (16 << 12), 1), [0]);
    assert!(!driver.is_broken());
}

#[test]
fn hostile_6_a_chain_that_is_replaced_half_way_harms_nobody() {
    let mut driver = test_driver::Driver::new(balloon());
    let features = driver.device().features();
    driver.activate(features, 256);
    let parts = [writable(BUFFERS, 2 << 20); 128];
    driver.add(REPORTING, &parts);
    driver.device().process_queue(REPORTING).unwrap();
    // The first descriptor now ends the chain.
    let descriptor = 0x1_0000 * (REPORTING as u64 + 1);
    driver.write(descriptor + 12, &2u16.to_le_bytes());
    driver.notify(REPORTING);
    assert_eq!(driver.used(REPORTING), [(0, 0)]);
    assert!(!driver.is_broken());
}

#[test]
fn hostile_9_only_the_actual_size_is_the_guests_to_write() {
    let mut balloon = balloon();
    for (offset, data) in [
        (0, &[0xff; 4][..]),
        (8, &[0xff; 8]),
        (12, &[0xff]),
        (u64::MAX, &[0xff; 8]),
        (u64::MAX - 3, &[0xff; 8]),
        (4, &[]),
    ] {
        balloon.write_config(offset, data);
    }
    assert_eq!(config(&balloon), [768, 0, 0, 0]);
    balloon.write_config(3, &[9, 1, 2]);
    balloon.write_config(6, &[3, 4, 9, 9]);
    assert_eq!(config(&balloon), [768, 0x0403_0201, 0, 0]);
    balloon.write_config(0, &[0xff; 16]);
    assert_eq!(config(&balloon), [768, u32::MAX, 0, 0]);
    let mut byte = [1];
    balloon.read_config(u64::MAX, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn hostile_1_broken_queues_are_survived() {
    survives_broken_queues(|| {
        let mut balloon = balloon();
        balloon.start_hinting(true).unwrap();
        balloon
    });
    survives_broken_queues(|| Balloon::new(BalloonOptions::default()).unwrap());
}
