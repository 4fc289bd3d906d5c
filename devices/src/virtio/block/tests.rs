//! A drive, driven.

use std::io::Write;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::virtio::testing::{Driver, survives_broken_queues};

const SECTORS: usize = 64;

fn drive(read_only: bool) -> (Block, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512) as u8).collect();
    file.write_all(&bytes).unwrap();
    let disk = Disk::open(file.path(), read_only).unwrap();
    let options = BlockOptions { id: "test".to_owned(), flush: true };
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
