//! A drive, driven.

use std::io::Write;
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
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

/// The engines that there are on this host.
pub(super) fn engines() -> Vec<Engine> {
    let mut engines = vec![Engine::Sync];
    if has_uring() {
        engines.push(Engine::Async);
    }
    engines
}

/// Whether io_uring can be tested, which is said where it cannot.
pub(super) fn has_uring() -> bool {
    let probe: std::io::Result<io_uring::IoUring> =
        io_uring::IoUring::builder().setup_r_disabled().build(1);
    if let Err(error) = &probe {
        println!("skipped for want of io_uring: {error}");
    }
    probe.is_ok()
}

fn drive(engine: Engine, read_only: bool) -> (Block, tempfile::NamedTempFile) {
    limited_drive(engine, read_only, RateLimiter::default())
}

fn limited_drive(
    engine: Engine,
    read_only: bool,
    rate_limiter: RateLimiter,
) -> (Block, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512) as u8).collect();
    file.write_all(&bytes).unwrap();
    let disk = Disk::open(file.path(), read_only).unwrap();
    let options = BlockOptions { id: "test".to_owned(), flush: true, rate_limiter, engine };
    (Block::new(options, disk).unwrap(), file)
}

fn in_flight(block: &Block) -> usize {
    block.uring.as_ref().map_or(0, Uring::in_flight)
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
    for engine in engines() {
        let (block, file) = drive(engine, false);
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
}

#[test]
fn what_was_done_is_counted_and_reading_counts_nothing() {
    let (block, _file) = drive(Engine::Sync, false);
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
    let (block, _file) = limited_drive(Engine::Sync, false, limiter);
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
    for engine in engines() {
        let (block, file) = drive(engine, false);
        let mut driver = Driver::new(block);
        let range = |sector: u64, count: u32, flags: u32| {
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
            bytes
        };
        let two = [range(1, 1, 0), range(5, 2, 1)].concat();
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &two, 0).0, VIRTIO_BLK_S_OK);
        assert_eq!(
            ask(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &range(9, 1, 0), 0).0,
            VIRTIO_BLK_S_OK
        );
        let bytes = std::fs::read(file.path()).unwrap();
        let zero: Vec<_> = (0..64).filter(|sector| bytes[sector * 512] == 0).collect();
        assert_eq!(zero, [0, 1, 5, 6, 9]);
        // docs/hostile.md 10: past the end, a flag that means nothing, too many, none.
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
}

#[test]
fn hostile_10_requests_that_cannot_be_are_refused_with_a_status() {
    for engine in engines() {
        let (block, _file) = drive(engine, false);
        let mut driver = Driver::new(block);
        for sector in [64, 63 + 1, u64::MAX, u64::MAX / 512, 1 << 55] {
            assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, sector, &[], 512).0, VIRTIO_BLK_S_IOERR);
            assert_eq!(
                ask(&mut driver, VIRTIO_BLK_T_OUT, sector, &[1; 512], 0).0,
                VIRTIO_BLK_S_IOERR
            );
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
}

#[test]
fn hostile_10_a_read_only_disk_stays_as_it_is() {
    for engine in engines() {
        let (block, file) = drive(engine, true);
        let before = std::fs::read(file.path()).unwrap();
        let mut driver = Driver::new(block);
        let kinds = [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES];
        for kind in kinds {
            assert_eq!(ask(&mut driver, kind, 0, &[0; 512], 0).0, VIRTIO_BLK_S_IOERR);
        }
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, VIRTIO_BLK_S_OK);
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
    }
}

/// docs/hostile.md 26: the image is cut off under the machine.
#[test]
fn hostile_26_a_file_cut_off_is_an_error_of_the_request() {
    for engine in engines() {
        let (block, file) = drive(engine, false);
        let mut driver = Driver::new(block);
        file.as_file().set_len(512).unwrap();
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 1, &[], 512).0, VIRTIO_BLK_S_IOERR);
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 0, &[], 512).0, VIRTIO_BLK_S_OK);
    }
}

#[test]
fn hostile_1_broken_queues_are_survived() {
    for engine in engines() {
        survives_broken_queues(|| drive(engine, false).0);
    }
}

/// docs/hostile.md 23: what is no disk.
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
    for engine in engines() {
        let (block, file) = drive(engine, false);
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
        let mut used = driver.used(0);
        used.sort();
        assert_eq!(used, [(0, 1025), (1, 1)]);
        let mut read = driver.read(into, 700);
        read.extend(driver.read(rest, 325));
        assert_eq!((&read[..512], &read[512..1024]), (&[8; 512][..], &[9; 512][..]));
        assert_eq!(
            (u32::from(read[1024]), u32::from(driver.read(status, 1)[0])),
            (0, VIRTIO_BLK_S_OK)
        );
        assert_eq!(&std::fs::read(file.path()).unwrap()[20 * 512..21 * 512], [0x55; 512]);
    }
}

/// docs/hostile.md 3: one event moves so much and no more, and what is left is not forgotten.
#[test]
fn hostile_3_large_requests_leave_other_devices_their_turn() {
    const PIECE: u32 = 512 << 10;
    for engine in engines() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(14 * u64::from(PIECE)).unwrap();
        let options = BlockOptions { id: "test".to_owned(), engine, ..BlockOptions::default() };
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
        let in_flight = in_flight(&driver.device.lock().unwrap());
        assert_eq!(driver.used(0).len() + in_flight, 3);
        driver.run();
        assert_eq!(driver.used(0).len(), 4);
        assert_eq!(driver.read(into, 512), [0; 512]);
    }
}

#[test]
fn the_configuration_space_tells_sizes_and_limits() {
    let read = |block: &Block, offset, length| {
        let mut data = vec![0xee; length];
        block.read_config(offset, &mut data);
        data.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (mut block, _file) = drive(Engine::Sync, false);
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
    let (block, _file) = drive(Engine::Sync, true);
    assert_ne!(block.features() & bit(VIRTIO_BLK_F_RO), 0);
    assert_eq!(block.features() & (bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES)), 0);
}

/// A read-only drive cannot be written through its descriptor either, whatever the device does.
#[test]
fn hostile_10_a_read_only_disk_is_read_only_on_the_host() {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    for engine in engines() {
        for (read_only, mode) in [(true, OFlag::O_RDONLY), (false, OFlag::O_RDWR)] {
            let (block, _file) = drive(engine, read_only);
            let flags =
                OFlag::from_bits_retain(fcntl(block.disk.file(), FcntlArg::F_GETFL).unwrap());
            assert_eq!(flags & OFlag::O_ACCMODE, mode);
        }
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
    for engine in engines() {
        let limiter = RateLimiter::new(None, hourly(2)).unwrap();
        let mut driver = Driver::new(limited_drive(engine, false, limiter).0);
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
}

#[test]
fn the_queue_is_not_looked_at_while_requests_wait() {
    for engine in engines() {
        let limiter = RateLimiter::new(None, hourly(1)).unwrap();
        let mut driver = Driver::new(limited_drive(engine, false, limiter).0);
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
}

#[test]
fn only_what_is_moved_counts_as_bytes() {
    for engine in engines() {
        let limiter = RateLimiter::new(hourly(1024), None).unwrap();
        let mut driver = Driver::new(limited_drive(engine, false, limiter).0);
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
}

/// Three sectors of zeroes, asked for with 16 bytes, are more than the bucket holds.
#[test]
fn zeroes_count_as_if_they_had_been_written() {
    for engine in engines() {
        let limiter = RateLimiter::new(hourly(1024), None).unwrap();
        let mut driver = Driver::new(limited_drive(engine, false, limiter).0);
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
}

#[test]
fn a_limit_may_come_and_go_while_the_guest_runs() {
    for engine in engines() {
        let (block, _file) = drive(engine, false);
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
}

#[test]
fn a_reset_lifts_no_limit() {
    for engine in engines() {
        let limiter = RateLimiter::new(None, hourly(1)).unwrap();
        let mut driver = Driver::new(limited_drive(engine, false, limiter).0);
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
}

#[test]
fn a_restored_limiter_goes_on_where_it_was() {
    for engine in engines() {
        let limiter = RateLimiter::new(None, hourly(2)).unwrap();
        let mut driver = Driver::new(limited_drive(engine, false, limiter).0);
        for _ in 0..3 {
            offer(&mut driver, VIRTIO_BLK_T_FLUSH);
        }
        driver.notify(0);
        pass(&mut driver, 15);
        let now = std::time::Instant::now();
        let state = driver.device.lock().unwrap().rate_limiter().save(now);
        let limiter = RateLimiter::restore(&state, now).unwrap();
        let mut driver = Driver::new(limited_drive(engine, false, limiter).0);
        offer(&mut driver, VIRTIO_BLK_T_FLUSH);
        driver.notify(0);
        pass(&mut driver, 14);
        assert_eq!(served(&driver), 0);
        pass(&mut driver, 1);
        assert_eq!(served(&driver), 1);
    }
}

#[test]
fn hostile_1_broken_queues_are_survived_with_limits_too() {
    for engine in engines() {
        survives_broken_queues(|| {
            let limiter = RateLimiter::new(hourly(1), hourly(1)).unwrap();
            limited_drive(engine, false, limiter).0
        });
    }
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
    /// Whatever the limits are and become, every request is served once, and one after the other in its turn.
    #[test]
    fn no_request_is_lost_or_served_twice(
        engine in prop::sample::select(engines()),
        event_idx: bool,
        events in prop::collection::vec(prop_oneof![
            4 => Just(Event::Request),
            1 => Just(Event::Notification),
            2 => (0..90u32).prop_map(Event::Minutes),
            1 => (prop::option::of(1..2000u64), prop::option::of(1..4u64))
                .prop_map(|(bytes, ops)| Event::Limits(bytes, ops)),
        ], 1..100),
    ) {
        let (block, _file) = drive(engine, true);
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
        if engine == Engine::Async {
            came.sort();
            sent.sort();
        }
        prop_assert_eq!(came, sent.into_iter().map(|head| (head, 513)).collect::<Vec<_>>());
    }
}

/// A write-zeroes request of as many ranges as there may be, a sector each: it needs so many
/// completions, one after the other.
fn ranges() -> Vec<u8> {
    let range = |sector: u64| [sector.to_le_bytes(), 1u64.to_le_bytes()].concat();
    (0..MAX_RANGES.into()).flat_map(range).collect()
}

/// Offers [`ranges`], and then the read of a sector: the address of its data.
fn offer_slow_and_fast(driver: &mut Driver<Block>) -> u64 {
    let head = driver.buffer(&header(VIRTIO_BLK_T_WRITE_ZEROES, 0));
    let ranges = ranges();
    let (data, status) = (driver.buffer(&ranges), driver.buffer(&[0xee]));
    driver.send(0, &[(head, 16), (data, ranges.len() as u32)], &[(status, 1)]);
    let head = driver.buffer(&header(VIRTIO_BLK_T_IN, 40));
    let into = driver.buffer(&[0xee; 513]);
    driver.send(0, &[(head, 16)], &[(into, 513)]);
    into
}

fn process(driver: &Driver<Block>) {
    Block::process(&mut driver.device.lock().unwrap()).unwrap();
}

#[test]
fn many_requests_are_in_flight_at_once() {
    if !has_uring() {
        return;
    }
    const MANY: usize = 80;
    let (block, _file) = drive(Engine::Async, false);
    let mut driver = test_driver::Driver::new(block);
    driver.activate(1 << VIRTIO_RING_F_EVENT_IDX, 256);
    let place = |index: usize| test_driver::BUFFERS + 1024 * index as u64;
    for index in 0..MANY {
        driver.write(place(index), &header(VIRTIO_BLK_T_IN, (index % SECTORS) as u64));
        let at = place(index);
        driver.add(0, &[test_driver::readable(at, 16), test_driver::writable(at + 64, 513)]);
    }
    Block::process(&mut driver.device()).unwrap();
    assert_eq!(in_flight(&driver.device()), MANY);
    assert!(driver.used(0).is_empty());
    // Nothing else than their completion wakes the event loop.
    let mut came = driver.wait(0, MANY);
    assert_eq!(in_flight(&driver.device()), 0);
    assert!(driver.interrupts() > 0);
    came.sort();
    let all: Vec<_> = (0..MANY).map(|index| (2 * index as u16, 513)).collect();
    assert_eq!(came, all);
    for index in 0..MANY {
        let mut expected = vec![(index % SECTORS) as u8; 512];
        expected.push(VIRTIO_BLK_S_OK as u8);
        assert_eq!(driver.read(place(index) + 64, 513), expected, "{index}");
    }
}

#[test]
fn requests_complete_in_any_order() {
    if !has_uring() {
        return;
    }
    let (block, file) = drive(Engine::Async, false);
    let mut driver = Driver::new(block);
    let into = offer_slow_and_fast(&mut driver);
    driver.notify(0);
    assert_eq!(driver.used(0), [(3, 513), (0, 1)]);
    assert_eq!(driver.read(into, 512), [40; 512]);
    let bytes = std::fs::read(file.path()).unwrap();
    assert_eq!((&bytes[..16 * 512], bytes[16 * 512]), (&[0; 16 * 512][..], 16));
}

/// docs/hostile.md 7: the driver resets the device while the host is at its requests.
#[test]
fn hostile_7_a_reset_leaves_nothing_in_flight() {
    if !has_uring() {
        return;
    }
    let (block, _file) = drive(Engine::Async, false);
    let mut driver = Driver::new(block);
    for _ in 0..20 {
        driver.start_again();
        offer_slow_and_fast(&mut driver);
        process(&driver);
        assert_eq!(in_flight(&driver.device.lock().unwrap()), 2);
        // As a processor's thread does, and the event loop's has made the requests.
        let device = driver.device.clone();
        std::thread::spawn(move || device.lock().unwrap().reset()).join().unwrap();
        assert_eq!(in_flight(&driver.device.lock().unwrap()), 0);
        driver.run();
        assert!(driver.used(0).is_empty());
    }
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 40, &[], 512).2, [40; 512]);
}

#[test]
fn a_drive_that_is_dropped_waits_for_the_host() {
    if !has_uring() {
        return;
    }
    for _ in 0..20 {
        let (block, file) = drive(Engine::Async, false);
        let mut driver = test_driver::Driver::new(block);
        driver.activate(0, 256);
        for sector in 0..SECTORS as u64 {
            let at = test_driver::BUFFERS + 64 * sector;
            driver.write(at, &header(VIRTIO_BLK_T_WRITE_ZEROES, 0));
            // One sector, and it may be given back: every file system can do that.
            let count_and_flags = 1u64 | 1 << 32;
            driver.write(at + 16, &[sector.to_le_bytes(), count_and_flags.to_le_bytes()].concat());
            driver.add(0, &[test_driver::readable(at, 32), test_driver::writable(at + 32, 1)]);
        }
        Block::process(&mut driver.device()).unwrap();
        assert_eq!(in_flight(&driver.device()), SECTORS);
        drop(driver);
        // It holds memory until then: what was begun is done, not called off.
        assert!(std::fs::read(file.path()).unwrap() == [0; SECTORS * 512]);
    }
}

#[test]
fn a_drained_queue_is_where_its_requests_are() {
    for engine in engines() {
        let limiter = RateLimiter::new(None, hourly(3)).unwrap();
        let mut driver = Driver::new(limited_drive(engine, false, limiter).0);
        driver.run();
        offer_slow_and_fast(&mut driver);
        for _ in 0..2 {
            offer(&mut driver, VIRTIO_BLK_T_FLUSH);
        }
        process(&driver);
        driver.interrupt.used.store(0, std::sync::atomic::Ordering::SeqCst);
        let mut device = driver.device.lock().unwrap();
        device.drain();
        assert_eq!(in_flight(&device), 0);
        let position = QueuePosition { next_available: 3, next_used: 3 };
        assert_eq!(device.queue_positions(), [Some(position)]);
        drop(device);
        assert_eq!(served(&driver), 3);
        let interrupts = driver.interrupt.used.load(std::sync::atomic::Ordering::SeqCst);
        assert_eq!(interrupts, u32::from(engine == Engine::Async));
        // The last of them goes on as if nothing had happened.
        pass(&mut driver, 60);
        assert_eq!(served(&driver), 4);
    }
}

/// docs/hostile.md 3: a driver offers chains again that it has not got back.
#[test]
fn hostile_3_no_more_is_in_flight_than_the_queue_is_long() {
    if !has_uring() {
        return;
    }
    let (block, _file) = drive(Engine::Async, false);
    let mut driver = test_driver::Driver::new(block);
    driver.activate(0, QUEUE_SIZE);
    let at = test_driver::BUFFERS;
    driver.write(at, &header(VIRTIO_BLK_T_FLUSH, 0));
    let parts = [test_driver::readable(at, 16), test_driver::writable(at + 64, 1)];
    for _ in 0..QUEUE_SIZE {
        driver.add(0, &parts);
    }
    Block::process(&mut driver.device()).unwrap();
    assert_eq!(in_flight(&driver.device()), usize::from(QUEUE_SIZE));
    for _ in 0..100 {
        driver.add(0, &parts);
    }
    // Not for want of a completion, which would make room.
    driver.device().take().unwrap();
    assert_eq!(in_flight(&driver.device()), usize::from(QUEUE_SIZE));
    assert_eq!(driver.wait(0, 356).len(), 356);
    assert!(!driver.is_broken());
}

/// docs/hostile.md 1: what is in flight when the driver breaks a rule comes back to nobody.
#[test]
fn hostile_1_a_queue_breaks_while_requests_are_in_flight() {
    if !has_uring() {
        return;
    }
    let (block, _file) = drive(Engine::Async, false);
    let mut driver = Driver::new(block);
    driver.run();
    offer_slow_and_fast(&mut driver);
    process(&driver);
    driver.set_available(0, u16::MAX);
    driver.notify(0);
    assert!(driver.wants_reset());
    assert_eq!(in_flight(&driver.device.lock().unwrap()), 0);
    // The write of zeroes.
    assert!(driver.used(0).iter().all(|(head, _)| *head != 0));
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 40, &[], 512).2, [40; 512]);
}

#[test]
fn another_disk_takes_over_from_the_next_request_on() {
    for engine in engines() {
        let (block, before) = drive(engine, false);
        let mut driver = Driver::new(block);
        driver.run();
        let into = offer_slow_and_fast(&mut driver);
        process(&driver);
        let after = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(after.path(), [0xaa; 1024]).unwrap();
        let disk = Disk::open(after.path(), false).unwrap();
        driver.device.lock().unwrap().replace_disk(disk).unwrap();
        assert_eq!(driver.interrupt.configured.load(std::sync::atomic::Ordering::SeqCst), 1);
        assert_eq!((served(&driver), driver.read(into, 1)), (2, vec![40]));
        assert_eq!(std::fs::read(before.path()).unwrap()[..16 * 512], [0; 16 * 512]);
        let (status, _, data) = ask(&mut driver, VIRTIO_BLK_T_IN, 1, &[], 512);
        assert_eq!((status, data), (VIRTIO_BLK_S_OK, vec![0xaa; 512]));
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 2, &[], 512).0, VIRTIO_BLK_S_IOERR);
        assert_eq!(ask(&mut driver, VIRTIO_BLK_T_OUT, 0, &[7; 512], 0).0, VIRTIO_BLK_S_OK);
        assert_eq!(std::fs::read(after.path()).unwrap()[..512], [7; 512]);
    }
}

#[test]
fn a_request_of_many_bytes_arrives_whole() {
    const LENGTH: usize = 3 << 20;
    for engine in engines() {
        let bytes: Vec<u8> = (0..LENGTH).map(|at| (at / 512 % 251) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        // Out of the page cache, so that the host's disk has to be waited for.
        file.as_file().sync_all().unwrap();
        let forget = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        posix_fadvise(file.as_file(), 0, 0, forget).unwrap();
        let options = BlockOptions { engine, ..BlockOptions::default() };
        let block = Block::new(options, Disk::open(file.path(), false).unwrap()).unwrap();
        let mut driver = test_driver::Driver::new(block);
        driver.activate(0, 256);
        let at = 0xf0000;
        driver.write(at, &header(VIRTIO_BLK_T_IN, 0));
        let into = test_driver::BUFFERS;
        let length = LENGTH as u32 - 512;
        let parts = [
            test_driver::readable(at, 16),
            test_driver::writable(into, length),
            test_driver::writable(at + 64, 1),
        ];
        driver.send(0, &parts);
        assert_eq!(driver.used(0), [(0, length + 1)]);
        assert!(driver.read(into, LENGTH - 512) == bytes[..LENGTH - 512], "{engine:?}");
        assert_eq!(driver.read(at + 64, 1), [VIRTIO_BLK_S_OK as u8]);
    }
}

#[test]
fn what_a_drive_reads_is_recorded_as_written_memory() {
    use crate::GuestRegion;
    use arch::memory::DirtyBitmap;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
    for engine in engines() {
        let (block, _file) = drive(engine, false);
        let mut driver = test_driver::Driver::new(block);
        let length = test_driver::MEMORY as usize;
        let builder = MmapRegionBuilder::new_with_bitmap(length, DirtyBitmap::tracking(length));
        let mapping = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let mapping = mapping.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let region = GuestRegion::new(mapping.build().unwrap(), GuestAddress(0)).unwrap();
        driver.memory = GuestMemory::from_regions(vec![region]).unwrap();
        driver.activate(0, 256);
        let at = test_driver::BUFFERS;
        driver.write(at - 16, &header(VIRTIO_BLK_T_IN, 0));
        let parts = [
            test_driver::readable(at - 16, 16),
            // From the middle of a page to the middle of the next but one.
            test_driver::writable(at + 0x1800, 0x2000),
            test_driver::writable(at + 0x8000, 1),
        ];
        driver.send(0, &parts);
        assert_eq!(driver.used(0), [(0, 0x2001)]);
        let region = driver.memory.find_region(GuestAddress(at)).unwrap();
        let dirty = |page: &u64| region.bitmap().dirty_at((at + page * 0x1000) as usize);
        assert_eq!((0..16).filter(dirty).collect::<Vec<_>>(), [1, 2, 3, 8], "{engine:?}");
    }
}
