//! A drive, driven.

use std::io::Write;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::virtio::testing::{Descriptor, Driver, INDIRECT, NEXT, WRITE, survives_broken_queues};

const SECTORS: usize = 64;

fn drive(read_only: bool) -> (Block, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512) as u8).collect();
    file.write_all(&bytes).unwrap();
    let disk = Disk::open(file.path(), read_only).unwrap();
    let options = BlockOptions { id: "test".to_owned(), flush: true, ..BlockOptions::default() };
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
