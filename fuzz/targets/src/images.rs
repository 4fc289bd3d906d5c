//! Layers of images, which come from anybody.

use std::io::Cursor;

use images::erofs::reader;
use images::rootfs::{LayerStream, Limits, convert};

use crate::memory_file;

const BLOCK: usize = 512;
/// A header's checksum, which is summed up as if it were spaces.
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// One or two layers: a byte that says how many blocks the first has, and their blocks. Headers
/// get the right checksums. What is made is an EROFS image of the size that is said, in which all
/// that leads somewhere leads to something, and nothing lies upon another.
pub fn image_tar(input: &[u8]) {
    let Some((first, blocks)) = input.split_first() else { return };
    let (first, second) = blocks.split_at(blocks.len().min(usize::from(*first) * BLOCK));
    let limits = Limits { entries: 1000, bytes: 4 << 20, headers: 1 << 16, ..Limits::default() };
    let stream = |blocks: &[u8]| LayerStream {
        digest: "sha256:fuzz".to_owned(),
        reader: Box::new(Cursor::new(with_checksums(blocks))),
    };
    let output = memory_file();
    let mut layers = vec![stream(first), stream(second)];
    let Ok(summary) = convert(&mut layers, output.try_clone().unwrap(), &limits) else { return };
    assert_eq!(summary.size, output.metadata().unwrap().len());
    let found = reader::read(&output).expect("what was written is read");
    // Parents that the layers leave out are made, so there may be more than entries.
    assert!(found.values().map(|found| found.data.len() as u64).sum::<u64>() <= summary.size);
}

/// The blocks with checksums in what seem to be headers.
pub fn with_checksums(blocks: &[u8]) -> Vec<u8> {
    let mut blocks = blocks.to_vec();
    let mut at = 0;
    while let Some(header) = blocks.get_mut(at..at + BLOCK) {
        at += BLOCK;
        if header.iter().all(|byte| *byte == 0) {
            continue;
        }
        header[CHECKSUM].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let digits = header[124..136].iter().take_while(|byte| (b'0'..=b'7').contains(*byte));
        let size = digits.fold(0, |size, digit| size << 3 | usize::from(digit - b'0'));
        at = at.saturating_add(size.next_multiple_of(BLOCK));
    }
    blocks
}
