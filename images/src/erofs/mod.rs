//! A writer of uncompressed EROFS images (4096-byte blocks, on-disk format of Linux
//! `fs/erofs/erofs_fs.h`, readable since Linux 5.4).
//!
//! Layout: block 0 holds the superblock (at byte 1024), then the data of files, then the blocks of
//! large directories and symlinks, then the inodes. Every inode has the 64-byte form, because the
//! short one has no mtime; small directories and symlinks follow their inode. The data of a regular
//! file is a run of whole blocks, so it can be written as it arrives and never held in memory.

#[cfg(any(test, feature = "fuzzing"))]
pub mod reader;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
const SLOT: u64 = 32;
const INODE: u64 = 64;
/// Longest content that follows its inode; more than half a block might fit at no slot.
const INLINE_MAX: u64 = BLOCK / 2;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_CHECKSUM_AND_MTIME: u32 = 3;

/// Index of a node in a [`Tree`].
pub type Id = usize;

/// What a directory has, by name.
pub type Entries = BTreeMap<Box<[u8]>, Entry>;

/// A name of a node.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Which node.
    pub id: Id,
    /// The layer which last brought this name, or one below it.
    pub layer: u32,
}

/// What a node is.
#[derive(Debug, Clone)]
pub enum Content {
    /// Its entries, without `.` and `..`.
    Directory(Entries),
    /// Bytes, and the first block of the data.
    File {
        /// Bytes.
        size: u64,
        /// First block.
        block: u32,
    },
    /// The target.
    Symlink(Box<[u8]>),
    /// Major and minor number.
    Char(u32, u32),
    /// Major and minor number.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// One extended attribute with its whole name (`user.x`).
pub type Xattr = (Box<[u8]>, Box<[u8]>);

/// An inode.
#[derive(Debug, Clone)]
pub struct Node {
    /// Type and data.
    pub content: Content,
    /// Permission bits, setuid, setgid and sticky (0o7777).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970, may be negative.
    pub mtime: i64,
    /// Nanoseconds, below 10^9.
    pub mtime_nsec: u32,
    /// Extended attributes.
    pub xattrs: Box<[Xattr]>,
    /// How many names lead here.
    pub links: u32,
}

/// All nodes; the root is number 0.
#[derive(Debug)]
pub struct Tree {
    /// The nodes; those without a name are left out of the image.
    pub nodes: Vec<Node>,
}

/// Writes file data, then the rest of the image.
#[derive(Debug)]
pub struct Writer {
    file: File,
    next: u64,
}

fn too_big() -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, "the image exceeds 16 TiB")
}

fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}

impl Writer {
    /// Starts an image in an empty file.
    pub fn new(file: File) -> Writer {
        Writer { file, next: 1 }
    }

    /// Copies `size` bytes from `data` into the image; the first block. Blocks of zeros become
    /// holes of the host's file. A shorter source is `UnexpectedEof`.
    pub fn data(&mut self, data: &mut dyn Read, size: u64) -> io::Result<u32> {
        let first = u32::try_from(self.next).map_err(|_| too_big())?;
        let mut buffer = vec![0u8; 64 * 1024];
        let (mut done, mut at) = (0u64, self.next.saturating_mul(BLOCK));
        while done < size {
            let want = (size - done).min(buffer.len() as u64) as usize;
            let chunk = buffer.get_mut(..want).ok_or_else(too_big)?;
            data.read_exact(chunk)?;
            if chunk.iter().any(|b| *b != 0) {
                self.file.write_all_at(chunk, at)?;
            }
            done += want as u64;
            at = at.checked_add(want as u64).ok_or_else(too_big)?;
        }
        self.next = self.next.checked_add(blocks(size)).ok_or_else(too_big)?;
        u32::try_from(self.next).map_err(|_| too_big())?;
        Ok(first)
    }

    /// Turns the data of a file that is no longer in the tree into a hole.
    pub fn forget(&mut self, block: u32, size: u64) -> io::Result<()> {
        use nix::fcntl::{FallocateFlags as F, fallocate};
        if size == 0 {
            return Ok(());
        }
        let (start, length) = (u64::from(block) * BLOCK, blocks(size) * BLOCK);
        // Bytes past the end need no hole; the length is set when the image is finished.
        let end = self.file.metadata()?.len();
        if start >= end {
            return Ok(());
        }
        let flags = F::FALLOC_FL_PUNCH_HOLE | F::FALLOC_FL_KEEP_SIZE;
        if fallocate(&self.file, flags, start as i64, length as i64).is_ok() {
            return Ok(());
        }
        // A host file system without holes: zeros, so that the result has the same bytes.
        let (zeros, mut at) = ([0u8; 4096], start);
        while at < (start + length).min(end) {
            self.file.write_all_at(&zeros, at)?;
            at += BLOCK;
        }
        Ok(())
    }

    /// Writes directories, inodes and the superblock; the image's size in bytes.
    pub fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> io::Result<u64> {
        let plan = self.plan(tree)?;
        let meta = self.next;
        let mut out = BufWriter::with_capacity(1 << 20, &self.file);
        out.seek(SeekFrom::Start(meta * BLOCK))?;
        let mut at = 0u64;
        for item in &plan.items {
            let start = item.nid * SLOT;
            pad(&mut out, start.saturating_sub(at))?;
            let node = tree.nodes.get(item.id).ok_or_else(broken)?;
            let xattrs = xattr_body(&node.xattrs)?;
            let mut bytes = inode(node, item, xattrs.len() as u64)?;
            bytes.extend_from_slice(&xattrs);
            let content = match &node.content {
                Content::Directory(entries) => {
                    directory(tree, &plan, item.id, item.parent, entries)?
                }
                Content::Symlink(target) => target.to_vec(),
                _ => Vec::new(),
            };
            if item.inline {
                bytes.extend_from_slice(&content);
            } else if let Some(block) = item.block {
                self.file.write_all_at(&content, u64::from(block) * BLOCK)?;
            }
            out.write_all(&bytes)?;
            at = start + bytes.len() as u64;
        }
        let total = meta + blocks(at);
        pad(&mut out, blocks(at) * BLOCK - at)?;
        out.flush()?;
        drop(out);
        self.file.set_len(total * BLOCK)?;
        self.superblock(&plan, meta, total, uuid)?;
        Ok(total * BLOCK)
    }

    fn plan(&mut self, tree: &Tree) -> io::Result<Plan> {
        let mut plan = Plan { items: Vec::new(), nids: vec![None; tree.nodes.len()] };
        let mut queue = std::collections::VecDeque::from([(0usize, 0usize)]);
        // Number 0 is taken by some programs for "no inode".
        let mut at = 2 * SLOT;
        while let Some((id, parent)) = queue.pop_front() {
            if plan.nids.get(id).ok_or_else(broken)?.is_some() {
                continue;
            }
            let node = tree.nodes.get(id).ok_or_else(broken)?;
            let mut nlink = node.links;
            let (size, loose) = match &node.content {
                Content::Directory(entries) => {
                    nlink = 2;
                    for child in entries.values() {
                        queue.push_back((child.id, id));
                        let child = tree.nodes.get(child.id).ok_or_else(broken)?;
                        nlink += u32::from(matches!(child.content, Content::Directory(_)));
                    }
                    (directory_size(entries), true)
                }
                Content::Symlink(target) => (target.len() as u64, true),
                Content::File { size, .. } => (*size, false),
                _ => (0, false),
            };
            let inline = loose && size > 0 && size <= INLINE_MAX;
            let block = if loose && size > INLINE_MAX {
                let block = u32::try_from(self.next).map_err(|_| too_big())?;
                self.next += blocks(size);
                Some(block)
            } else {
                None
            };
            let head = INODE + xattr_size(&node.xattrs);
            let tail = if inline { size } else { 0 };
            while at % BLOCK + INODE > BLOCK || (at + head) % BLOCK + tail > BLOCK {
                at += SLOT;
            }
            let nid = at / SLOT;
            *plan.nids.get_mut(id).ok_or_else(broken)? = Some(nid);
            plan.items.push(Item { id, parent, nid, nlink, size, inline, block });
            at = (at + head + tail).next_multiple_of(SLOT);
        }
        u32::try_from(self.next + blocks(at)).map_err(|_| too_big())?;
        Ok(plan)
    }

    fn superblock(&self, plan: &Plan, meta: u64, total: u64, uuid: [u8; 16]) -> io::Result<()> {
        let root = plan.nids.first().copied().flatten().ok_or_else(broken)?;
        let mut sb = Vec::with_capacity(3072);
        sb.extend_from_slice(&MAGIC.to_le_bytes());
        sb.extend_from_slice(&0u32.to_le_bytes()); // checksum, below
        sb.extend_from_slice(&COMPAT_CHECKSUM_AND_MTIME.to_le_bytes());
        sb.extend_from_slice(&[12, 0]);
        sb.extend_from_slice(&u16::try_from(root).map_err(|_| broken())?.to_le_bytes());
        sb.extend_from_slice(&(plan.items.len() as u64).to_le_bytes());
        sb.extend_from_slice(&[0; 12]); // build time: none, equal layers give equal images
        sb.extend_from_slice(&u32::try_from(total).map_err(|_| too_big())?.to_le_bytes());
        sb.extend_from_slice(&u32::try_from(meta).map_err(|_| too_big())?.to_le_bytes());
        sb.extend_from_slice(&[0; 4]); // no shared extended attributes
        sb.extend_from_slice(&uuid);
        sb.extend_from_slice(b"vmrun-root\0\0\0\0\0\0");
        sb.resize(3072, 0);
        let sum = crc32c(&sb).to_le_bytes();
        sb.splice(4..8, sum);
        self.file.write_all_at(&sb, 1024)?;
        self.file.sync_all()
    }
}

/// The cheap part of a check of an image that somebody else has made: that its superblock is one of
/// ours and whole, and that the file has the size that it says, at most `limit` bytes. The size, or
/// what is wrong.
pub fn check(file: &File, limit: u64) -> io::Result<Result<u64, &'static str>> {
    let length = file.metadata()?.len();
    if length > limit {
        return Ok(Err("the root device is larger than it may be"));
    }
    if length < BLOCK {
        return Ok(Err("the root device has no superblock"));
    }
    let mut sb = [0u8; 3072];
    file.read_exact_at(&mut sb, 1024)?;
    let field = |at: usize| {
        let bytes = sb.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    let (magic, sum, shift, total) = (field(0), field(4), field(12) & 0xff, field(36));
    sb[4..8].fill(0);
    Ok(if magic != MAGIC || shift != BLOCK.trailing_zeros() {
        Err("the root device is no EROFS")
    } else if crc32c(&sb) != sum {
        Err("the root device's superblock is damaged")
    } else if u64::from(total) * BLOCK != length {
        Err("the root device is not as long as its superblock says")
    } else {
        Ok(length)
    })
}

struct Item {
    id: Id,
    parent: Id,
    nid: u64,
    nlink: u32,
    size: u64,
    inline: bool,
    block: Option<u32>,
}

struct Plan {
    items: Vec<Item>,
    nids: Vec<Option<u64>>,
}

fn broken() -> io::Error {
    io::Error::other("the tree of the image is inconsistent")
}

fn pad(out: &mut dyn Write, bytes: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(bytes), out).map(|_| ())
}

/// CRC-32C without the final inversion, as the superblock has it.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    crc
}

/// EROFS's number for the prefix of a name, and the rest of the name; `None`: not representable.
pub fn xattr_index(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    let prefixes: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    prefixes
        .iter()
        .find_map(|(prefix, index)| Some((*index, name.strip_prefix(*prefix)?)))
        .filter(|(_, rest)| !rest.is_empty() && rest.len() <= 255)
}

/// Bytes that `xattrs` take behind the inode.
pub fn xattr_size(xattrs: &[Xattr]) -> u64 {
    let one = |(name, value): &Xattr| {
        let rest = xattr_index(name).map_or(0, |(_, rest)| rest.len());
        (4 + rest + value.len()).next_multiple_of(4) as u64
    };
    if xattrs.is_empty() { 0 } else { 12 + xattrs.iter().map(one).sum::<u64>() }
}

fn xattr_body(xattrs: &[Xattr]) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if xattrs.is_empty() {
        return Ok(body);
    }
    body.resize(12, 0);
    for (name, value) in xattrs {
        let (index, rest) = xattr_index(name).ok_or_else(broken)?;
        body.push(u8::try_from(rest.len()).map_err(|_| broken())?);
        body.push(index);
        body.extend_from_slice(&u16::try_from(value.len()).map_err(|_| broken())?.to_le_bytes());
        body.extend_from_slice(rest);
        body.extend_from_slice(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    Ok(body)
}

fn inode(node: &Node, item: &Item, xattrs: u64) -> io::Result<Vec<u8>> {
    let device = |major: u32, minor: u32| {
        (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
    };
    let (kind, union) = match &node.content {
        Content::Directory(_) => (0o040_000, item.block.unwrap_or(0)),
        Content::Symlink(_) => (0o120_000, item.block.unwrap_or(0)),
        Content::File { block, .. } => (0o100_000, *block),
        Content::Char(major, minor) => (0o020_000, device(*major, *minor)),
        Content::Block(major, minor) => (0o060_000, device(*major, *minor)),
        Content::Fifo => (0o010_000, 0),
    };
    let icount = if xattrs == 0 { 0 } else { (xattrs - 12) / 4 + 1 };
    let format: u16 = if item.inline { 1 | 2 << 1 } else { 1 };
    let mut out = Vec::with_capacity(INODE as usize);
    out.extend_from_slice(&format.to_le_bytes());
    out.extend_from_slice(&u16::try_from(icount).map_err(|_| broken())?.to_le_bytes());
    out.extend_from_slice(&(kind | node.mode & 0o7777).to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&item.size.to_le_bytes());
    out.extend_from_slice(&union.to_le_bytes());
    out.extend_from_slice(&(item.nid as u32).to_le_bytes());
    out.extend_from_slice(&node.uid.to_le_bytes());
    out.extend_from_slice(&node.gid.to_le_bytes());
    out.extend_from_slice(&node.mtime.to_le_bytes());
    out.extend_from_slice(&node.mtime_nsec.to_le_bytes());
    out.extend_from_slice(&item.nlink.to_le_bytes());
    out.resize(INODE as usize, 0);
    Ok(out)
}

/// The names of a directory in EROFS's order, cut into blocks.
fn directory_blocks<'a>(entries: &'a Entries) -> Vec<Vec<&'a [u8]>> {
    let mut names: Vec<&'a [u8]> = entries.keys().map(|n| &**n).collect();
    names.extend([b".".as_slice(), b"..".as_slice()]);
    names.sort_unstable();
    let (mut all, mut block, mut used) = (Vec::new(), Vec::new(), 0u64);
    for name in names {
        let size = 12 + name.len() as u64;
        if used + size > BLOCK {
            all.push(std::mem::take(&mut block));
            used = 0;
        }
        used += size;
        block.push(name);
    }
    all.push(block);
    all
}

fn directory_size(entries: &Entries) -> u64 {
    let all = directory_blocks(entries);
    let last: u64 = all.last().map_or(0, |b| b.iter().map(|n| 12 + n.len() as u64).sum());
    (all.len() as u64).saturating_sub(1) * BLOCK + last
}

fn directory(
    tree: &Tree,
    plan: &Plan,
    id: Id,
    parent: Id,
    entries: &Entries,
) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    for block in directory_blocks(entries) {
        out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
        let mut offset = block.len() * 12;
        for name in &block {
            let child = match *name {
                b"." => id,
                b".." => parent,
                name => entries.get(name).ok_or_else(broken)?.id,
            };
            let nid = plan.nids.get(child).copied().flatten().ok_or_else(broken)?;
            let kind = match tree.nodes.get(child).ok_or_else(broken)?.content {
                Content::File { .. } => 1u8,
                Content::Directory(_) => 2,
                Content::Char(..) => 3,
                Content::Block(..) => 4,
                Content::Fifo => 5,
                Content::Symlink(_) => 7,
            };
            out.extend_from_slice(&nid.to_le_bytes());
            out.extend_from_slice(&u16::try_from(offset).map_err(|_| broken())?.to_le_bytes());
            out.extend_from_slice(&[kind, 0]);
            offset += name.len();
        }
        for name in &block {
            out.extend_from_slice(name);
        }
    }
    Ok(out)
}
