//! A reader of EROFS images that takes nothing from the writer but the form of the disk, so that what
//! was written can be compared with what was meant: for tests and fuzzing.
//!
//! It is stricter than the kernel: whatever Linux would pass over is an error here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const BLOCK: u64 = 4096;
const SUPERBLOCK: usize = 1024;

/// What a path of an image leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Number of the inode: the same for the names of one file.
    pub inode: u64,
    /// Type and permissions, as `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds.
    pub mtime_nsec: u32,
    /// Number of links.
    pub links: u32,
    /// Major and minor number of a device node.
    pub device: Option<(u32, u32)>,
    /// Bytes of a file, target of a symlink; empty for others.
    pub data: Vec<u8>,
    /// Extended attributes, in the image's order.
    pub xattrs: Vec<Attribute>,
}

/// An extended attribute: number of the prefix, the rest of the name, value.
pub type Attribute = (u8, Vec<u8>, Vec<u8>);

/// Everything in an image by its path from the root, which is the empty path; or what is wrong.
pub fn read(file: &File) -> io::Result<BTreeMap<Vec<u8>, Found>> {
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    Image::new(&bytes).and_then(|mut image| image.walk()).map_err(io::Error::other)
}

type Checked<T> = Result<T, String>;

fn check(holds: bool, what: &str) -> Checked<()> {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

fn number(bytes: &[u8], at: usize, size: usize) -> Checked<u64> {
    let field = at.checked_add(size).and_then(|end| bytes.get(at..end)).ok_or("past the end")?;
    Ok(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

struct Image<'a> {
    bytes: &'a [u8],
    root: u64,
    inodes: u64,
    meta: u64,
    /// First byte and end of every run of data blocks.
    runs: BTreeMap<u64, u64>,
}

/// A directory's entries: name, inode, type.
type Names = Vec<(Vec<u8>, u64, u8)>;

impl<'a> Image<'a> {
    fn new(bytes: &'a [u8]) -> Checked<Image<'a>> {
        let block = bytes.get(SUPERBLOCK..BLOCK as usize).ok_or("no superblock")?;
        let field = |at, size| number(block, at, size);
        check(field(0, 4)? == 0xe0f5_e1e2, "magic")?;
        let mut summed = block.to_vec();
        summed.splice(4..8, [0; 4]);
        check(field(4, 4)? == u64::from(checksum(&summed)), "checksum")?;
        check(field(12, 1)? == 12, "size of a block")?;
        check(field(36, 4)? * BLOCK == bytes.len() as u64, "number of blocks")?;
        check(field(80, 4)? == 0, "features that old kernels lack")?;
        let meta = field(40, 4)? * BLOCK;
        check(meta >= BLOCK && meta < bytes.len() as u64, "place of the inodes")?;
        let runs = BTreeMap::from([(0, BLOCK)]);
        Ok(Image { bytes, root: field(14, 2)?, inodes: field(16, 8)?, meta, runs })
    }

    fn slice(&self, at: u64, size: u64) -> Checked<&'a [u8]> {
        let range = usize::try_from(at).ok().zip(usize::try_from(size).ok());
        let (at, size) = range.ok_or("past the end")?;
        at.checked_add(size)
            .and_then(|end| self.bytes.get(at..end))
            .ok_or_else(|| "past the end".to_owned())
    }

    /// Every directory from the root down, each once.
    fn walk(&mut self) -> Checked<BTreeMap<Vec<u8>, Found>> {
        let mut all = BTreeMap::new();
        let mut known = BTreeMap::new();
        let mut names_of = BTreeMap::<u64, u32>::new();
        let root = self.inode(self.root)?;
        known.insert(self.root, root.clone());
        let mut todo = VecDeque::from([(Vec::new(), root, self.root)]);
        while let Some((path, directory, parent)) = todo.pop_front() {
            check(directory.mode >> 12 == 4, "a directory")?;
            let names = entries(&directory.data)?;
            let mut below = 0;
            for (name, inode, kind) in names {
                let wanted = match name.as_slice() {
                    b"." => Some(directory.inode),
                    b".." => Some(parent),
                    _ => None,
                };
                if let Some(wanted) = wanted {
                    check(inode == wanted && kind == 2, "`.` or `..`")?;
                    continue;
                }
                let found = match known.get(&inode) {
                    Some(found) => found,
                    None => known.entry(inode).or_insert(self.inode(inode)?),
                }
                .clone();
                let kinds = [(4, 2), (8, 1), (2, 3), (6, 4), (1, 5), (10, 7)];
                check(kinds.contains(&(found.mode >> 12, kind)), "type of an entry")?;
                let mut path = path.clone();
                path.extend_from_slice(if path.is_empty() { b"" } else { b"/" });
                path.extend_from_slice(&name);
                if kind == 2 {
                    below += 1;
                    let is_new = names_of.insert(inode, found.links).is_none();
                    check(is_new && inode != self.root, "a directory with two names")?;
                    todo.push_back((path.clone(), found.clone(), directory.inode));
                } else {
                    *names_of.entry(inode).or_default() += 1;
                }
                all.insert(path, found);
            }
            check(directory.links == 2 + below, "links of a directory")?;
            all.insert(path, directory);
        }
        check(known.len() as u64 == self.inodes, "number of inodes")?;
        for (inode, count) in names_of {
            check(known.get(&inode).is_some_and(|found| found.links == count), "links")?;
        }
        // What a directory's blocks hold is not its data for a user.
        for found in all.values_mut().filter(|found| found.mode >> 12 == 4) {
            found.data.clear();
        }
        Ok(all)
    }

    fn inode(&mut self, inode: u64) -> Checked<Found> {
        let at = inode.checked_mul(32).and_then(|at| at.checked_add(self.meta));
        let at = at.ok_or("past the end")?;
        check(at % BLOCK <= BLOCK - 64, "an inode across blocks")?;
        let bytes = self.slice(at, 64)?;
        let field = |at, size| number(bytes, at, size);
        let format = field(0, 2)?;
        check(format == 1 || format == 1 | 2 << 1, "form of an inode")?;
        let (xattrs, size) = (field(2, 2)?, field(8, 8)?);
        let xattr_bytes = if xattrs == 0 { 0 } else { 12 + (xattrs - 1) * 4 };
        let mode = field(4, 2)? as u16;
        let place = field(16, 4)?;
        check(field(20, 4)? == inode, "number of an inode")?;
        let is_device = matches!(mode >> 12, 2 | 6);
        let tail = at + 64 + xattr_bytes;
        let data = if format != 1 {
            check(size > 0 && tail % BLOCK + size <= BLOCK, "a tail across blocks")?;
            self.slice(tail, size)?
        } else if is_device || size == 0 {
            check(size == 0, "a device with a size")?;
            &[]
        } else {
            let (start, end) = (place * BLOCK, (place * BLOCK + size).next_multiple_of(BLOCK));
            check(end <= self.meta, "data among the inodes")?;
            let before = self.runs.range(..end).next_back();
            check(before.is_none_or(|(_, end)| *end <= start), "data of two files in one block")?;
            self.runs.insert(start, end);
            self.slice(start, size)?
        };
        Ok(Found {
            inode,
            mode,
            uid: field(24, 4)? as u32,
            gid: field(28, 4)? as u32,
            mtime: field(32, 8)? as i64,
            mtime_nsec: field(40, 4)? as u32,
            links: field(44, 4)? as u32,
            device: is_device.then(|| {
                let place = place as u32;
                (place >> 8 & 0xfff, place & 0xff | place >> 12 & 0xf_ff00)
            }),
            data: data.to_vec(),
            xattrs: attributes(self.slice(at + 64, xattr_bytes)?)?,
        })
    }
}

/// A directory's blocks: names in order, each between others' ends.
fn entries(bytes: &[u8]) -> Checked<Names> {
    let mut all: Names = Vec::new();
    for block in bytes.chunks(BLOCK as usize) {
        let first = number(block, 8, 2)? as usize;
        check(first.is_multiple_of(12) && first > 0, "number of a block's entries")?;
        let count = first / 12;
        for index in 0..count {
            let start = number(block, 12 * index + 8, 2)? as usize;
            let end = match index + 1 < count {
                true => number(block, 12 * index + 20, 2)? as usize,
                false => block.len(),
            };
            let name = block.get(start..end).ok_or("a name outside its block")?;
            // The last one of a block that is not the last ends with zeros.
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let good = (1..=255).contains(&name.len()) && !name.contains(&b'/');
            check(good && start + name.len() <= end, "a name")?;
            check(index + 1 == count || start + name.len() == end, "a name with a zero")?;
            check(all.last().is_none_or(|(before, ..)| before.as_slice() < name), "order")?;
            let entry = 12 * index;
            all.push((
                name.to_vec(),
                number(block, entry, 8)?,
                number(block, entry + 10, 1)? as u8,
            ));
        }
    }
    let dots = all.iter().filter(|(name, ..)| name == b"." || name == b"..").count();
    check(dots == 2, "`.` and `..`")?;
    Ok(all)
}

fn attributes(bytes: &[u8]) -> Checked<Vec<Attribute>> {
    let mut all = Vec::new();
    let mut names = BTreeSet::new();
    if bytes.is_empty() {
        return Ok(all);
    }
    check(number(bytes, 0, 8)? == 0 && number(bytes, 8, 4)? == 0, "shared attributes")?;
    let mut at = 12;
    while at < bytes.len() {
        let (length, size) = (number(bytes, at, 1)? as usize, number(bytes, at + 2, 2)? as usize);
        let index = number(bytes, at + 1, 1)? as u8;
        let value = at + 4 + length;
        let part = |from: usize, to: usize| bytes.get(from..to).ok_or("an attribute past the end");
        let (name, value) = (part(at + 4, value)?.to_vec(), part(value, value + size)?.to_vec());
        check(names.insert((index, name.clone())), "an attribute twice")?;
        at = (at + 4 + length + size).next_multiple_of(4);
        check(at <= bytes.len(), "an attribute past the end")?;
        all.push((index, name, value));
    }
    Ok(all)
}

/// CRC-32C by a table of the remainders of each byte, not inverted at the end.
fn checksum(bytes: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256)
        .map(|byte| {
            let step =
                |rest: u32, _| if rest & 1 == 1 { rest >> 1 ^ 0x82f6_3b78 } else { rest >> 1 };
            (0..8).fold(byte, step)
        })
        .collect();
    bytes.iter().fold(u32::MAX, |sum, byte| {
        let rest = table.get(((sum ^ u32::from(*byte)) & 0xff) as usize);
        sum >> 8 ^ rest.copied().unwrap_or_default()
    })
}
