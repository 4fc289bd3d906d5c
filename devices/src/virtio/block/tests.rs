//! A drive, driven.

use std::io::Write;
use std::time::Duration;

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::rate_limiter::TokenBucket;
use crate::virtio::test_driver;
use crate::virtio::testing::{Descriptor, Driver, INDIRECT, NEXT, WRITE, survives_broken_queues};

const SECTORS: usize = 64;

fn drive(read_only: bool) -> (Block, tempfile::NamedTempFile) {
    limited_drive(read_only, RateLimiter::default())
}

fn limited_drive(read_only: bool, rate_limiter: RateLimiter) -> (Block, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512) as u8).collect();
    file.write_all(&bytes).unwrap();
    let disk = Disk::open(file.path(), read_only).unwrap();
    let options = BlockOptions { id: "test".to_owned(), flush: true, rate_limiter };
    (Block::new(options, disk).unwrap(), file)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&sector.to_le_bytes());
    header
}

/// Sends a request; status, bytes written by the device, and the buffer.
fn ask(
    driver: &mut Driver<Block>,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: u32,
) -> (u32, u32, Vec<u8>) {
    driver.start_again();
    let head = header(kind, sector);
    let mut readable = vec![(driver.buffer(&head), 16)];
    if !data.is_empty() {
        readable.push((driver.buffer(data), data.len() as u32));
    }
    let into = driver.buffer(&vec![0xee; room as usize]);
    let status = driver.buffer(&[0xee]);
    let mut writable = vec![(status, 1)];
    if room > 0 {
        writable.insert(0, (into, room));
    }
    driver.send(0, &readable, &writable);
    driver.notify(0);
    let used = driver.used(0);
    assert_eq!(used.len(), 1);
    (driver.read(status, 1)[0].into(), used[0].1, driver.read(into, room as usize))
}

#[test]
fn what_is_written_is_read_back_and_in_the_file() {
    let (block, file) = drive(false);
    let mut driver = Driver::new(block);
    let (status, written, data) = ask(&mut driver, VIRTIO_BLK_T_IN, 3, &[], 1024);
    assert_eq!((status, written), (VIRTIO_BLK_S_OK, 1025));
    assert_eq!((data[0], data[511], data[512], data[1023]), (3, 3, 4, 4));
    let (status, written, _) = ask(&mut driver, VIRTIO_BLK_T_OUT, 63, &[7; 512], 0);
    assert_eq!((status, written), (VIRTIO_BLK_S_OK, 1));
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, VIRTIO_BLK_S_OK);
    let bytes = std::fs::read(file.path()).unwrap();
    assert_eq!(&bytes[63 * 512..], [7; 512]);
    let (status, _, id) = ask(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, &id[..5]), (VIRTIO_BLK_S_OK, &b"test\0"[..]));
}

#[test]
fn what_was_done_is_counted_and_reading_counts_nothing() {
    let (block, _file) = drive(false);
    let mut driver = Driver::new(block);
    ask(&mut driver, VIRTIO_BLK_T_IN, 3, &[], 1024);
    ask(&mut driver, VIRTIO_BLK_T_IN, 3, &[], 512);
    ask(&mut driver, VIRTIO_BLK_T_OUT, 63, &[7; 512], 0);
    ask(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    ask(&mut driver, VIRTIO_BLK_T_IN, 64, &[], 512);
    ask(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 511);
    ask(&mut driver, 77, 0, &[], 0);
    let device = driver.device.lock().unwrap();
    let expected = BlockMetrics {
        read_count: 2,
        read_bytes: 1536,
        write_count: 1,
        write_bytes: 512,
        flush_count: 1,
        execute_fails: 1,
        invalid_reqs_count: 2,
        // One for each request, and one for each start, which finds nothing.
        queue_event_count: 14,
        no_avail_buffer: 7,
        ..BlockMetrics::default()
    };
    assert_eq!(device.metrics, expected);
    let readings = VirtioDevice::metrics(&*device).unwrap();
    assert_eq!(VirtioDevice::metrics(&*device).unwrap(), readings);
    assert_eq!(readings.group, "block");
    let value = |name| readings.readings.iter().find(|one| one.name == name).unwrap().value;
    assert_eq!((value("read_bytes"), value("write_bytes")), (1536, 512));
}

#[test]
fn a_request_that_has_to_wait_is_counted_once_it_does_and_once_it_is_served() {
    let limiter = RateLimiter::new(TokenBucket::new(512, 0, 3_600_000), None).unwrap();
    let (block, _file) = limited_drive(false, limiter);
    let mut driver = Driver::new(block);
    let head = driver.buffer(&header(VIRTIO_BLK_T_IN, 0));
    let into = driver.buffer(&[0; 513]);
    for _ in 0..2 {
        driver.send(0, &[(head, 16)], &[(into, 513)]);
    }
    driver.notify(0);
    let metrics = driver.device.lock().unwrap().metrics;
    assert_eq!((metrics.rate_limiter_throttled_events, metrics.read_count), (1, 1));
    driver.device.lock().unwrap().options.rate_limiter.pass(Duration::from_secs(3600));
    driver.run();
    let metrics = driver.device.lock().unwrap().metrics;
    assert_eq!((metrics.rate_limiter_event_count, metrics.read_count), (1, 2));
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let (block, file) = drive(false);
    let mut driver = Driver::new(block);
    let range = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes
    };
    let two = [range(1, 1, 0), range(5, 2, 1)].concat();
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &two, 0).0, VIRTIO_BLK_S_OK);
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &range(9, 1, 0), 0).0, VIRTIO_BLK_S_OK);
    let bytes = std::fs::read(file.path()).unwrap();
    let zero: Vec<_> = (0..64).filter(|sector| bytes[sector * 512] == 0).collect();
    assert_eq!(zero, [0, 1, 5, 6, 9]);
    // HOSTILE.md 10: past the end, a flag that means nothing, too many, none.
    let bad = [
        (range(64, 1, 0), VIRTIO_BLK_S_IOERR),
        (range(u64::MAX, 1, 0), VIRTIO_BLK_S_IOERR),
        (range(0, u32::MAX, 0), VIRTIO_BLK_S_IOERR),
        (range(0, 1, 1), VIRTIO_BLK_S_UNSUPP),
        (range(0, 1, 0).repeat(17), VIRTIO_BLK_S_IOERR),
        (vec![0; 15], VIRTIO_BLK_S_IOERR),
        (vec![], VIRTIO_BLK_S_IOERR),
    ];
    for (data, expected) in bad {
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &data, 0).0, expected, "{data:?}");
    }
}

#[test]
fn hostile_10_requests_that_cannot_be_are_refused_with_a_status() {
    let (block, _file) = drive(false);
    let mut driver = Driver::new(block);
    for sector in [64, 63 + 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, sector, &[], 512).0, VIRTIO_BLK_S_IOERR);
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_OUT, sector, &[1; 512], 0).0, VIRTIO_BLK_S_IOERR);
    }
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 63, &[], 1024).0, VIRTIO_BLK_S_IOERR);
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 511).0, VIRTIO_BLK_S_IOERR);
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_OUT, 0, &[1; 100], 0).0, VIRTIO_BLK_S_IOERR);
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &[], 19).0, VIRTIO_BLK_S_IOERR);
    assert_eq!(ask(&mut driver, 77, 0, &[], 0).0, VIRTIO_BLK_S_UNSUPP);
    // A chain without a byte to write has no place for a status, and goes back untouched.
    driver.start_again();
    let head = driver.buffer(&header(VIRTIO_BLK_T_FLUSH, 0));
    driver.send(0, &[(head, 16)], &[]);
    let short = driver.buffer(&[0xee; 1]);
    driver.send(0, &[(head, 15)], &[(short, 1)]);
    driver.notify(0);
    assert_eq!(driver.used(0), [(0, 0), (1, 1)]);
    assert_eq!(u32::from(driver.read(short, 1)[0]), VIRTIO_BLK_S_IOERR);
}

#[test]
fn hostile_10_a_read_only_disk_stays_as_it_is() {
    let (block, file) = drive(true);
    let before = std::fs::read(file.path()).unwrap();
    let mut driver = Driver::new(block);
    let kinds = [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES];
    for kind in kinds {
        assert_eq!(ask(&mut driver, kind, 0, &[0; 512], 0).0, VIRTIO_BLK_S_IOERR);
    }
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, VIRTIO_BLK_S_OK);
    assert_eq!(std::fs::read(file.path()).unwrap(), before);
}

/// HOSTILE.md 26: the image is cut off under the machine.
#[test]
fn hostile_26_a_file_cut_off_is_an_error_of_the_request() {
    let (block, file) = drive(false);
    let mut driver = Driver::new(block);
    file.as_file().set_len(512).unwrap();
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 1, &[], 512).0, VIRTIO_BLK_S_IOERR);
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 512).0, VIRTIO_BLK_S_OK);
}

#[test]
fn hostile_1_broken_queues_are_survived() {
    survives_broken_queues(|| drive(false).0);
}

/// HOSTILE.md 23: what is no disk.
#[test]
fn hostile_23_fifos_folders_and_empty_files_are_no_disks() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(Disk::open(&fifo, true), Err(DiskError::Kind(_))));
    assert!(Disk::open(folder.path(), true).is_err());
    let file = folder.path().join("file");
    for (size, good) in [(0, false), (511, false), (513, true)] {
        std::fs::write(&file, vec![0; size]).unwrap();
        assert_eq!(Disk::open(&file, false).is_ok(), good, "{size}");
    }
}

/// Puts a chain into a table of its own and offers that: (address, length, for the device to write).
fn send_indirect(driver: &mut Driver<Block>, head: u16, parts: &[(u64, u32, bool)]) {
    let table = driver.buffer(&vec![0; 16 * parts.len()]);
    for (index, &(address, length, write)) in (0..).zip(parts) {
        let more = usize::from(index) + 1 < parts.len();
        let flags = if write { WRITE } else { 0 } | if more { NEXT } else { 0 };
        let entry = Descriptor { address, length, flags, next: index + 1 };
        driver.put_at(table + 16 * u64::from(index), entry);
    }
    let length = 16 * parts.len() as u32;
    driver.put(0, head, Descriptor { address: table, length, flags: INDIRECT, next: 0 });
    driver.offer(0, head);
}

/// Descriptors are no boundaries of what is in them (virtio 1.2, 2.7.4.1).
#[test]
fn a_request_may_be_cut_anywhere() {
    let (block, file) = drive(false);
    let mut driver = Driver::new(block);
    let bytes = header(VIRTIO_BLK_T_IN, 8);
    let (first, second) = (driver.buffer(&bytes[..5]), driver.buffer(&bytes[5..]));
    let into = driver.buffer(&[0xee; 700]);
    let rest = driver.buffer(&[0xee; 325]);
    let parts = [
        (first, 5, false),
        (second, 11, false),
        (into, 700, true),
        (rest, 0, true),
        (rest, 325, true),
    ];
    send_indirect(&mut driver, 0, &parts);
    // Header and data in one, and written from there.
    let mut bytes = header(VIRTIO_BLK_T_OUT, 20);
    bytes.extend_from_slice(&[0x55; 512]);
    let (all, status) = (driver.buffer(&bytes), driver.buffer(&[0xee]));
    send_indirect(&mut driver, 1, &[(all, 528, false), (status, 1, true)]);
    driver.notify(0);
    assert_eq!(driver.used(0), [(0, 1025), (1, 1)]);
    let mut read = driver.read(into, 700);
    read.extend(driver.read(rest, 325));
    assert_eq!((&read[..512], &read[512..1024]), (&[8; 512][..], &[9; 512][..]));
    assert_eq!((u32::from(read[1024]), u32::from(driver.read(status, 1)[0])), (0, VIRTIO_BLK_S_OK));
    assert_eq!(&std::fs::read(file.path()).unwrap()[20 * 512..21 * 512], [0x55; 512]);
}

/// HOSTILE.md 3: one event moves so much and no more, and what is left is not forgotten.
#[test]
fn hostile_3_large_requests_leave_other_devices_their_turn() {
    const PIECE: u32 = 512 << 10;
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(14 * u64::from(PIECE)).unwrap();
    let options = BlockOptions { id: "test".to_owned(), flush: false, ..BlockOptions::default() };
    let block = Block::new(options, Disk::open(file.path(), true).unwrap()).unwrap();
    let mut driver = Driver::new(block);
    driver.run();
    let head = driver.buffer(&header(VIRTIO_BLK_T_IN, 0));
    let status = driver.buffer(&[0xee]);
    // Every piece in the same place: guest memory need not be as large as a request.
    let into = driver.buffer(&vec![0xee; PIECE as usize]);
    let mut parts = vec![(head, 16, false)];
    parts.extend([(into, PIECE, true); 14]);
    parts.push((status, 1, true));
    for index in 0..4 {
        send_indirect(&mut driver, index, &parts);
    }
    Block::process(&mut driver.device.lock().unwrap()).unwrap();
    // 7 MiB each: the third goes past the limit.
    assert_eq!(driver.used(0).len(), 3);
    driver.run();
    assert_eq!(driver.used(0).len(), 4);
    assert_eq!(driver.read(into, 512), [0; 512]);
}

#[test]
fn the_configuration_space_tells_sizes_and_limits() {
    let read = |block: &Block, offset, length| {
        let mut data = vec![0xee; length];
        block.read_config(offset, &mut data);
        data.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (mut block, _file) = drive(false);
    block.write_config(0, &[0xff; 60]);
    assert_eq!(read(&block, 0, 8), SECTORS as u64);
    assert_eq!(read(&block, 12, 4), u64::from(QUEUE_SIZE) - 2);
    assert_eq!(read(&block, 20, 4), 512);
    assert_eq!((read(&block, 36, 4), read(&block, 40, 4)), (1 << 21, 16));
    assert_eq!((read(&block, 48, 4), read(&block, 52, 4), read(&block, 56, 1)), (1 << 21, 16, 1));
    // Across the end, behind it, and far behind it.
    assert_eq!((read(&block, 56, 8), read(&block, 60, 4), read(&block, u64::MAX, 4)), (1, 0, 0));
    let bit = |feature: u32| 1u64 << feature;
    assert_ne!(block.features() & bit(VIRTIO_BLK_F_FLUSH), 0);
    assert_ne!(block.features() & bit(VIRTIO_BLK_F_DISCARD), 0);
    let (block, _file) = drive(true);
    assert_ne!(block.features() & bit(VIRTIO_BLK_F_RO), 0);
    assert_eq!(block.features() & (bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES)), 0);
}

/// A read-only drive cannot be written through its descriptor either, whatever the device does.
#[test]
fn hostile_10_a_read_only_disk_is_read_only_on_the_host() {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    for (read_only, mode) in [(true, OFlag::O_RDONLY), (false, OFlag::O_RDWR)] {
        let (block, _file) = drive(read_only);
        let flags = OFlag::from_bits_retain(fcntl(block.disk.file(), FcntlArg::F_GETFL).unwrap());
        assert_eq!(flags & OFlag::O_ACCMODE, mode);
    }
}

/// So many tokens in an hour, beside which the duration of a test is nothing.
fn hourly(tokens: u64) -> Option<TokenBucket> {
    TokenBucket::new(tokens, 0, 3_600_000)
}

const MINUTE: Duration = Duration::from_secs(60);

/// As if so much time had passed.
fn pass(driver: &mut Driver<Block>, minutes: u32) {
    driver.device.lock().unwrap().options.rate_limiter.pass(minutes * MINUTE);
    driver.run();
}

/// Offers a request without data, or one that reads a sector.
fn offer(driver: &mut Driver<Block>, kind: u32) {
    let head = driver.buffer(&header(kind, 5));
    let into = driver.buffer(&[0xee; 513]);
    let room = if kind == VIRTIO_BLK_T_IN { 513 } else { 1 };
    driver.send(0, &[(head, 16)], &[(into, room)]);
}

fn served(driver: &Driver<Block>) -> usize {
    driver.used(0).len()
}

#[test]
fn requests_beyond_the_limit_wait_for_the_timer() {
    let limiter = RateLimiter::new(None, hourly(2)).unwrap();
    let mut driver = Driver::new(limited_drive(false, limiter).0);
    for _ in 0..4 {
        offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    }
    driver.notify(0);
    assert_eq!(served(&driver), 2);
    pass(&mut driver, 29);
    assert_eq!(served(&driver), 2);
    pass(&mut driver, 1);
    assert_eq!(served(&driver), 3);
    pass(&mut driver, 30);
    assert_eq!(served(&driver), 4);
    // Nobody waits, and nothing is collected that goes beyond the bucket.
    pass(&mut driver, 600);
    for _ in 0..3 {
        offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    }
    driver.notify(0);
    assert_eq!(served(&driver), 6);
    assert!(!driver.wants_reset());
}

#[test]
fn the_queue_is_not_looked_at_while_requests_wait() {
    let limiter = RateLimiter::new(None, hourly(1)).unwrap();
    let mut driver = Driver::new(limited_drive(false, limiter).0);
    offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    driver.notify(0);
    assert_eq!(served(&driver), 1);
    // An index that is an error when it is seen.
    driver.set_available(0, u16::MAX);
    driver.notify(0);
    assert!(!driver.wants_reset());
    pass(&mut driver, 60);
    assert!(driver.wants_reset());
}

#[test]
fn only_what_is_moved_counts_as_bytes() {
    let limiter = RateLimiter::new(hourly(1024), None).unwrap();
    let mut driver = Driver::new(limited_drive(false, limiter).0);
    let kinds = [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH, 77];
    for kind in kinds {
        offer(&mut driver, kind);
    }
    offer(&mut driver, VIRTIO_BLK_T_IN);
    offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    driver.notify(0);
    assert_eq!(served(&driver), 5);
    pass(&mut driver, 30);
    assert_eq!(served(&driver), 7);
}

/// Three sectors of zeroes, asked for with 16 bytes, are more than the bucket holds.
#[test]
fn zeroes_count_as_if_they_had_been_written() {
    let limiter = RateLimiter::new(hourly(1024), None).unwrap();
    let mut driver = Driver::new(limited_drive(false, limiter).0);
    for (kind, count) in [(VIRTIO_BLK_T_DISCARD, 60), (VIRTIO_BLK_T_WRITE_ZEROES, 3u8)] {
        let head = driver.buffer(&header(kind, 0));
        let mut range = [0; 16];
        range[8] = count;
        let (range, status) = (driver.buffer(&range), driver.buffer(&[0xee]));
        driver.send(0, &[(head, 16), (range, 16)], &[(status, 1)]);
    }
    offer(&mut driver, VIRTIO_BLK_T_IN);
    driver.notify(0);
    assert_eq!(served(&driver), 2);
    pass(&mut driver, 59);
    assert_eq!(served(&driver), 2);
    pass(&mut driver, 1);
    assert_eq!(served(&driver), 3);
}

#[test]
fn a_limit_may_come_and_go_while_the_guest_runs() {
    let (block, _file) = drive(false);
    let mut driver = Driver::new(block);
    driver.run();
    let update = |driver: &mut Driver<Block>, bandwidth, ops| {
        driver.device.lock().unwrap().update_rate_limiter(bandwidth, ops).unwrap();
        driver.run();
    };
    let one = || BucketUpdate::Set(hourly(1).unwrap());
    update(&mut driver, BucketUpdate::None, one());
    for _ in 0..3 {
        offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    }
    driver.notify(0);
    assert_eq!(served(&driver), 1);
    // The timer was not there when the event loop began.
    pass(&mut driver, 60);
    assert_eq!(served(&driver), 2);
    // Blocked still by what did not change, and served by a new bucket.
    update(&mut driver, one(), BucketUpdate::None);
    assert_eq!(served(&driver), 2);
    update(&mut driver, BucketUpdate::None, one());
    assert_eq!(served(&driver), 3);
    offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    driver.notify(0);
    assert_eq!(served(&driver), 3);
    update(&mut driver, BucketUpdate::None, BucketUpdate::Disabled);
    assert_eq!(served(&driver), 4);
}

#[test]
fn a_reset_lifts_no_limit() {
    let limiter = RateLimiter::new(None, hourly(1)).unwrap();
    let mut driver = Driver::new(limited_drive(false, limiter).0);
    for _ in 0..3 {
        offer(&mut driver, VIRTIO_BLK_T_FLUSH);
        driver.notify(0);
        driver.start_again();
    }
    offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    driver.notify(0);
    assert_eq!(served(&driver), 0);
    pass(&mut driver, 60);
    assert_eq!(served(&driver), 1);
}

#[test]
fn a_restored_limiter_goes_on_where_it_was() {
    let limiter = RateLimiter::new(None, hourly(2)).unwrap();
    let mut driver = Driver::new(limited_drive(false, limiter).0);
    for _ in 0..3 {
        offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    }
    driver.notify(0);
    pass(&mut driver, 15);
    let now = std::time::Instant::now();
    let state = driver.device.lock().unwrap().rate_limiter().save(now);
    let limiter = RateLimiter::restore(&state, now).unwrap();
    let mut driver = Driver::new(limited_drive(false, limiter).0);
    offer(&mut driver, VIRTIO_BLK_T_FLUSH);
    driver.notify(0);
    pass(&mut driver, 14);
    assert_eq!(served(&driver), 0);
    pass(&mut driver, 1);
    assert_eq!(served(&driver), 1);
}

#[test]
fn hostile_1_broken_queues_are_survived_with_limits_too() {
    survives_broken_queues(|| {
        let limiter = RateLimiter::new(hourly(1), hourly(1)).unwrap();
        limited_drive(false, limiter).0
    });
}

/// What happens to a drive with limits.
#[derive(Clone, Debug)]
enum Event {
    Request,
    Notification,
    Minutes(u32),
    Limits(Option<u64>, Option<u64>),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever the limits are and become, every request is served once, in its turn.
    #[test]
    fn no_request_is_lost_or_served_twice(
        event_idx: bool,
        events in prop::collection::vec(prop_oneof![
            4 => Just(Event::Request),
            1 => Just(Event::Notification),
            2 => (0..90u32).prop_map(Event::Minutes),
            1 => (prop::option::of(1..2000u64), prop::option::of(1..4u64))
                .prop_map(|(bytes, ops)| Event::Limits(bytes, ops)),
        ], 1..100),
    ) {
        let (block, _file) = drive(true);
        let mut driver = test_driver::Driver::new(block);
        driver.activate(u64::from(event_idx) << VIRTIO_RING_F_EVENT_IDX, 256);
        let at = test_driver::BUFFERS;
        driver.write(at, &header(VIRTIO_BLK_T_IN, 7));
        let parts = [test_driver::readable(at, 16), test_driver::writable(at + 512, 513)];
        let update = |bucket: Option<u64>| {
            bucket.and_then(hourly).map_or(BucketUpdate::Disabled, BucketUpdate::Set)
        };
        let (mut sent, mut came) = (Vec::new(), Vec::new());
        for event in events.into_iter().chain([Event::Limits(None, None)]) {
            match event {
                Event::Request => sent.push(driver.send(0, &parts)),
                Event::Notification => driver.device().event[0].write(1).unwrap(),
                Event::Minutes(minutes) => {
                    driver.device().options.rate_limiter.pass(minutes * MINUTE);
                }
                Event::Limits(bytes, ops) => {
                    driver.device().update_rate_limiter(update(bytes), update(ops)).unwrap();
                }
            }
            driver.run();
            came.extend(driver.used(0));
        }
        prop_assert!(!driver.is_broken());
        prop_assert_eq!(came, sent.into_iter().map(|head| (head, 513)).collect::<Vec<_>>());
    }
}
