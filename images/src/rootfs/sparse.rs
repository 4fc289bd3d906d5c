//! Sparse files in GNU tar's PAX formats 0.0, 0.1 and 1.0 (GNU tar manual, "Storing Sparse Files").

use std::io::{self, ErrorKind, Read};

use super::pax::Extended;

const BLOCK: usize = 512;

/// Where a sparse file's bytes belong.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Map {
    /// Bytes of the whole file.
    pub(super) size: u64,
    /// Offset and length in bytes of each piece that the archive holds.
    pieces: Vec<(u64, u64)>,
}

/// What is wrong with a map, or the archive's own failure.
#[derive(Debug)]
pub(super) enum SparseError {
    Map(&'static str),
    Read(io::Error),
}

const BROKEN: SparseError = SparseError::Map("its sparse map is broken");

fn number(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

/// The map of a file that is sparse, read from its records or, in format 1.0, from the begin of its
/// `stored` bytes in the archive; at most `limit` bytes of it.
pub(super) fn map(
    extended: &Extended,
    stored: u64,
    limit: u64,
    data: &mut dyn Read,
) -> Result<Option<Map>, SparseError> {
    let size = extended.get(b"GNU.sparse.realsize").or(extended.get(b"GNU.sparse.size"));
    let Some(size) = size else {
        let stray = extended.records.iter().any(|(key, _)| key.starts_with(b"GNU.sparse."));
        return if stray { Err(BROKEN) } else { Ok(None) };
    };
    let size = number(size).ok_or(BROKEN)?;
    let (pieces, held) = if extended.get(b"GNU.sparse.major") == Some(b"1") {
        if extended.get(b"GNU.sparse.minor") != Some(b"0") {
            return Err(SparseError::Map("its sparse format is unknown"));
        }
        let (pieces, used) = leading(data, limit.min(stored))?;
        (pieces, stored - used)
    } else if let Some(text) = extended.get(b"GNU.sparse.map") {
        (pairs(text.split(|byte| *byte == b',').map(number)).ok_or(BROKEN)?, stored)
    } else {
        let keys: [&[u8]; 2] = [b"GNU.sparse.offset", b"GNU.sparse.numbytes"];
        let records = extended.records.iter().filter(|(key, _)| keys.contains(&key.as_slice()));
        // They take turns.
        let in_turn = records.clone().zip(keys.iter().cycle()).all(|((key, _), turn)| key == turn);
        let numbers = records.map(|(_, value)| number(value));
        (pairs(numbers).filter(|_| in_turn).ok_or(BROKEN)?, stored)
    };
    let mut end = 0;
    let mut total = 0u64;
    for (offset, length) in &pieces {
        let next = offset.checked_add(*length).filter(|next| *offset >= end && *next <= size);
        end = next.ok_or(SparseError::Map("its sparse map overlaps or exceeds the file"))?;
        total += length;
    }
    if total != held {
        return Err(SparseError::Map("its sparse map does not fit the bytes it has"));
    }
    Ok(Some(Map { size, pieces }))
}

fn pairs(numbers: impl Iterator<Item = Option<u64>>) -> Option<Vec<(u64, u64)>> {
    let numbers: Vec<u64> = numbers.collect::<Option<_>>()?;
    let (pairs, rest) = numbers.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[offset, length]| (*offset, *length)).collect())
}

/// Format 1.0: a count and so many pairs, a decimal number a line, filled up to whole blocks; with
/// the bytes that all of it took.
fn leading(data: &mut dyn Read, limit: u64) -> Result<(Vec<(u64, u64)>, u64), SparseError> {
    let mut text = Vec::new();
    let (mut found, mut wanted) = (0, 1);
    while found < wanted {
        if (text.len() + BLOCK) as u64 > limit {
            return Err(BROKEN);
        }
        let mut block = [0; BLOCK];
        data.read_exact(&mut block).map_err(SparseError::Read)?;
        text.extend_from_slice(&block);
        let first = found == 0;
        found += block.iter().filter(|byte| **byte == b'\n').count() as u64;
        if first {
            let count = text.split(|byte| *byte == b'\n').next().and_then(number).ok_or(BROKEN)?;
            // Each number has a digit and a line feed.
            wanted = count.checked_mul(2).filter(|lines| *lines < limit).ok_or(BROKEN)? + 1;
        }
    }
    let numbers = text.split(|byte| *byte == b'\n').skip(1).take(wanted as usize - 1);
    Ok((pairs(numbers.map(number)).ok_or(BROKEN)?, text.len() as u64))
}

/// The whole file, with zeroes where the archive has nothing.
pub(super) struct Expanded<R> {
    inner: R,
    map: Map,
    piece: usize,
    position: u64,
}

impl<R: Read> Expanded<R> {
    pub(super) fn new(inner: R, map: Map) -> Expanded<R> {
        Expanded { inner, map, piece: 0, position: 0 }
    }
}

impl<R: Read> Read for Expanded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = loop {
            match self.map.pieces.get(self.piece) {
                Some((offset, length)) if offset + length <= self.position => self.piece += 1,
                other => break other,
            }
        };
        let (hole_end, end) = piece
            .map_or((self.map.size, self.map.size), |(offset, length)| (*offset, offset + length));
        let stop = if self.position < hole_end { hole_end } else { end };
        let room = (stop - self.position).min(buffer.len() as u64) as usize;
        let part = buffer.get_mut(..room).unwrap_or_default();
        let count = if self.position < hole_end {
            part.fill(0);
            room
        } else {
            self.inner.read(part)?
        };
        if count == 0 && room > 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.position += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extended(records: &[(&str, &str)]) -> Extended {
        let own =
            |(key, value): &(&str, &str)| (key.as_bytes().to_vec(), value.as_bytes().to_vec());
        Extended { records: records.iter().map(own).collect(), gnu_names: false }
    }

    fn expand(records: &[(&str, &str)], data: &[u8]) -> Result<Vec<u8>, SparseError> {
        let (mut source, stored) = (data, data.len() as u64);
        let map = map(&extended(records), stored, 1 << 20, &mut source)?.expect("not sparse");
        let mut all = Vec::new();
        Expanded::new(source, map).read_to_end(&mut all).map_err(SparseError::Read)?;
        Ok(all)
    }

    #[test]
    fn the_three_formats_say_the_same() {
        let wanted = b"\0\0ab\0\0\0c\0";
        let old = [
            ("GNU.sparse.size", "9"),
            ("GNU.sparse.numblocks", "2"),
            ("GNU.sparse.offset", "2"),
            ("GNU.sparse.numbytes", "2"),
            ("GNU.sparse.offset", "7"),
            ("GNU.sparse.numbytes", "1"),
        ];
        assert_eq!(expand(&old, b"abc").unwrap(), wanted);
        let middle = [("GNU.sparse.size", "9"), ("GNU.sparse.map", "2,2,7,1,9,0")];
        assert_eq!(expand(&middle, b"abc").unwrap(), wanted);
        let new =
            [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")];
        let mut data = b"3\n2\n2\n7\n1\n9\n0\n".to_vec();
        data.resize(512, 0);
        data.extend(b"abc");
        assert_eq!(expand(&new, &data).unwrap(), wanted);
        // A map of two blocks, and a file that is one hole.
        let mut data = b"200\n".to_vec();
        (0..200).for_each(|_| data.extend(b"9\n0\n"));
        data.resize(1024, 0);
        assert_eq!(expand(&new, &data).unwrap(), [0; 9]);
        assert_eq!(map(&extended(&[("path", "x")]), 1, 1, &mut io::empty()).unwrap(), None);
    }

    #[test]
    fn hostile_18_maps_that_lie_are_refused() {
        for text in
            ["2,2,3,1", "7,1,2,2", "8,3", "2,2", "2", "a,b", "", "-1,3", "2,18446744073709551615"]
        {
            let records = [("GNU.sparse.size", "9"), ("GNU.sparse.map", text)];
            assert!(expand(&records, b"abc").is_err(), "{text}");
        }
        let new =
            [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")];
        for text in
            ["", "x\n", "99999999999999999999\n", "9223372036854775807\n", "400000\n1\n", "2\n1\n"]
        {
            let mut data = text.as_bytes().to_vec();
            data.resize(512, 0);
            assert!(expand(&new, &data).is_err(), "{text}");
            data.resize(4 << 20, 0);
            assert!(expand(&new, &data).is_err(), "{text} and zeroes");
        }
        let stray = [("GNU.sparse.map", "0,3")];
        assert!(matches!(expand(&stray, b"abc"), Err(SparseError::Map(_))));
        let turns =
            [("GNU.sparse.size", "9"), ("GNU.sparse.numbytes", "2"), ("GNU.sparse.offset", "3")];
        assert!(expand(&turns, b"abc").is_err());
    }
}
