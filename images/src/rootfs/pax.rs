//! Extended headers (POSIX pax), read from the bytes themselves.
//!
//! The tar crate cuts records at line feeds. A value may contain one (a file capability is binary),
//! and what follows it could then pass for a record of its own: two readers would see two archives
//! (CVE-2025-62518 was such a difference). So records are cut by their lengths here, and where the
//! crate would have seen others its answers are not used.

use tar::{EntryType, Header};

const BLOCK: usize = 512;

/// The extended header in front of an entry.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Extended {
    /// Keys and values in their order; a later one replaces an earlier one of the same key.
    pub(super) records: Vec<(Vec<u8>, Vec<u8>)>,
    /// There are long names in GNU's manner too.
    pub(super) gnu_names: bool,
}

impl Extended {
    /// Reads the header blocks in front of an entry, up to and including its own. An error says what
    /// is wrong with the records.
    pub(super) fn parse(mut blocks: &[u8]) -> Result<Extended, &'static str> {
        let mut extended = Extended::default();
        while let Some((block, rest)) = blocks.split_at_checked(BLOCK) {
            let header = Header::from_byte_slice(block);
            let kind = header.entry_type();
            let names = matches!(kind, EntryType::GNULongName | EntryType::GNULongLink);
            if !names && kind != EntryType::XHeader {
                break;
            }
            let broken = "its extended header is broken";
            let size = header.entry_size().ok().and_then(|size| usize::try_from(size).ok());
            let data = size.and_then(|size| rest.get(..size)).ok_or(broken)?;
            if names {
                extended.gnu_names = true;
            } else {
                extended.records = records(data).ok_or("its PAX records cannot be read")?;
            }
            blocks = rest.get(data.len().next_multiple_of(BLOCK)..).unwrap_or_default();
        }
        Ok(extended)
    }

    /// The last value of a key.
    pub(super) fn get(&self, key: &[u8]) -> Option<&[u8]> {
        let found = self.records.iter().rev().find(|(other, _)| other == key);
        found.map(|(_, value)| value.as_slice())
    }

    /// Whether the tar crate, which cuts at line feeds, sees other records.
    pub(super) fn misread_by_lines(&self) -> bool {
        self.records.iter().any(|(key, value)| key.contains(&b'\n') || value.contains(&b'\n'))
    }
}

/// Cuts `LENGTH KEY=VALUE\n` records; the length counts the whole record.
fn records(mut data: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut all = Vec::new();
    while !data.is_empty() {
        let space = data.iter().take(20).position(|byte| *byte == b' ')?;
        let digits = data.get(..space)?;
        if !digits.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let length: usize = std::str::from_utf8(digits).ok()?.parse().ok()?;
        let record = data.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        all.push((record.get(..equals)?.to_vec(), record.get(equals + 1..)?.to_vec()));
        data = data.get(length..)?;
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: EntryType, size: usize) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(size as u64);
        header.as_bytes().to_vec()
    }

    #[test]
    fn records_are_cut_by_length() {
        let data = b"19 a=one\n9 size=99\n6 b=c\n";
        let wanted: Vec<(Vec<u8>, Vec<u8>)> =
            vec![(b"a".to_vec(), b"one\n9 size=99".to_vec()), (b"b".to_vec(), b"c".to_vec())];
        assert_eq!(records(data), Some(wanted.clone()));
        let mut blocks = header(EntryType::GNULongName, 3);
        blocks.extend([0; BLOCK]);
        blocks.extend(header(EntryType::XHeader, data.len()));
        blocks.extend(data);
        blocks.resize(4 * BLOCK, 0);
        blocks.extend(header(EntryType::Regular, 7));
        let extended = Extended::parse(&blocks).unwrap();
        assert_eq!(extended, Extended { records: wanted, gnu_names: true });
        assert!(extended.misread_by_lines());
        assert_eq!((extended.get(b"b"), extended.get(b"size")), (Some(&b"c"[..]), None));
    }

    #[test]
    fn hostile_18_records_that_lie_are_refused() {
        for data in [
            &b"5 a=1"[..],
            b"7 a=1\n",
            b"4 a=1\n",
            b"0 a=1\n",
            b"-6 a=1\n",
            b"+6 a=1\n",
            b"6 a:1\n",
            b"a=1\n",
            b"99999999999999999999 a=1\n",
            b"6 a=1\n\0",
            b" ",
        ] {
            assert_eq!(records(data), None, "{:?}", String::from_utf8_lossy(data));
        }
        let mut blocks = header(EntryType::XHeader, 600);
        blocks.extend([0; BLOCK]);
        assert!(Extended::parse(&blocks).is_err());
        assert_eq!(Extended::parse(&[1, 2, 3]), Ok(Extended::default()));
    }
}
