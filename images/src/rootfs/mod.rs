//! Merges the layers of an image into one EROFS file, straight from their tar streams.
//!
//! The tar crate parses, this module decides. Layers are applied lowest first; nothing is unpacked.
//! A file's data goes to the output as it is read and becomes a hole when a later entry hides it.
//!
//! Policy:
//! - Names: a leading `/` and `.` are dropped; `..`, NUL, components above 255 bytes and paths above
//!   [`Limits::path`] are refused. Missing parents are made as `root:root 0755`.
//! - A parent that is a symlink of the image is followed inside the image's root, as Docker and
//!   containerd do; a parent that is anything else but a directory is refused.
//! - The last of two entries with one name wins; directories merge.
//! - Hard links must name an existing thing that is not a directory, in this layer or a lower one.
//! - `.wh.NAME` and `.wh..wh..opq` hide what lower layers have, never what this layer brings,
//!   wherever in the layer they stand. Hiding what is not there is allowed.
//! - Device nodes, fifos, setuid and all owners are kept: they are the guest's own.
//! - `trusted.overlay.*` and `user.overlay.*` are left out, since they would steer the guest's
//!   overlayfs. Attributes which EROFS has no prefix for are refused.
//! - mtimes may be negative; one beyond 64 bits is refused.
//! - Sparse files, old GNU and PAX ones, have the size they unpack to; their holes are holes.
//! - A numeric field of a header that is empty is 0.

mod pax;
mod sparse;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tar::EntryType;

use crate::erofs::{self, Content, Entries, Entry, Id, Node, Tree, Writer, Xattr};

use pax::Extended;
use sparse::{Expanded, SparseError};

/// A layer, as an uncompressed tar stream.
pub struct LayerStream<'a> {
    /// The layer's digest, for messages and the volume's UUID.
    pub digest: String,
    /// The tar; read to its end.
    pub reader: Box<dyn Read + 'a>,
}

/// Bounds on what an image may ask for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    /// Entries of all layers together, and as many directories, those made for entries among them.
    pub entries: u64,
    /// Bytes of names, targets of symlinks and extended attributes of all layers together, which are
    /// kept in memory until the image is written.
    pub names: u64,
    /// Names looked at on the way to entries, and below what is hidden, of all layers together. A
    /// whiteout can hide as many as there are, again and again.
    pub steps: u64,
    /// Bytes of file data of all layers together.
    pub bytes: u64,
    /// Bytes of a path.
    pub path: usize,
    /// Components from the root to an entry.
    pub depth: usize,
    /// Bytes of all extended attributes of an entry.
    pub xattrs: u64,
    /// Bytes of the headers of one entry (long names, PAX records).
    pub headers: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            entries: 4_000_000,
            names: 1 << 30,
            steps: 500_000_000,
            bytes: 64 << 30,
            path: 4096,
            depth: 1024,
            xattrs: 128 << 10,
            headers: 1 << 20,
        }
    }
}

impl Limits {
    /// Bytes that the output may have: those of all files, each with a last block that is not full,
    /// and as many blocks for what else there is of the entries.
    pub fn output(&self) -> u64 {
        let blocks = self.entries.saturating_add(1).saturating_mul(2 * erofs::BLOCK);
        self.bytes.saturating_add(blocks)
    }
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of the image.
    pub size: u64,
    /// Entries read from the layers.
    pub entries: u64,
}

/// Why layers could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The stream is not a tar, or could not be read.
    #[error("layer {layer}: cannot read the tar after {after:?}: {error}")]
    Read {
        /// The layer's digest.
        layer: String,
        /// The entry before.
        after: String,
        /// What the reader or the tar crate said.
        error: io::Error,
    },
    /// An entry is against the policy.
    #[error("layer {layer}: entry {entry:?}: {reason}")]
    Entry {
        /// The layer's digest.
        layer: String,
        /// The entry's name.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The image has more than the limits allow.
    #[error("layer {layer}: entry {entry:?}: the image has more than {limit} {what}")]
    Limit {
        /// The layer's digest.
        layer: String,
        /// The entry's name.
        entry: String,
        /// What is counted.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// The output could not be written.
    #[error("cannot write the root file system: {0}")]
    Write(#[source] io::Error),
    /// Any of these, in the words of the process that found it.
    #[error("{0}")]
    Reported(String),
}

/// Converts `layers`, lowest first, into one EROFS image in `output`, which must be empty.
/// No layers give an empty root.
pub fn convert(
    layers: &mut [LayerStream<'_>],
    output: File,
    limits: &Limits,
) -> Result<Summary, ConvertError> {
    let mut merge = Merge {
        tree: Tree { nodes: vec![directory()] },
        writer: Writer::new(output),
        limits,
        layer: 0,
        entries: 0,
        bytes: 0,
        names: 0,
        steps: 0,
    };
    let mut uuid = Sha256::new();
    for layer in layers.iter_mut() {
        merge.layer += 1;
        uuid.update(layer.digest.as_bytes());
        uuid.update(b"\n");
        merge.layer(&layer.digest, &mut layer.reader)?;
    }
    let mut id = [0u8; 16];
    id.iter_mut().zip(uuid.finalize()).for_each(|(to, from)| *to = from);
    let size = merge.writer.finish(&merge.tree, id).map_err(ConvertError::Write)?;
    Ok(Summary { size, entries: merge.entries })
}

fn directory() -> Node {
    Node {
        content: Content::Directory(BTreeMap::new()),
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: 0,
        mtime_nsec: 0,
        xattrs: Box::default(),
        links: 1,
    }
}

/// Bounds what the tar crate reads while it looks for the next entry, which it keeps in memory (long
/// names, PAX records), and keeps it too.
struct Metered<'a> {
    inner: &'a mut dyn Read,
    headers: Rc<RefCell<Headers>>,
}

#[derive(Default)]
struct Headers {
    /// Bytes that may still be read before the next entry; no bound within one.
    budget: Option<u64>,
    /// Bytes read of the whole stream.
    position: u64,
    /// The blocks in front of the entry, and its own.
    blocks: Vec<u8>,
    /// Bytes that still belong to the entry before.
    padding: usize,
}

impl Headers {
    /// The next bytes are headers, at most so many.
    fn begin(&mut self, limit: u64) {
        self.budget = Some(limit);
        self.blocks.clear();
        self.padding = (self.position.next_multiple_of(512) - self.position) as usize;
    }

    fn end(&mut self) {
        self.budget = None;
    }
}

impl Read for Metered<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        let headers = &mut *self.headers.borrow_mut();
        headers.position += read as u64;
        if let Some(left) = headers.budget {
            let left = left.checked_sub(read as u64);
            let left = left.ok_or_else(|| io::Error::other("the headers of an entry are too long"));
            headers.budget = Some(left?);
            let skipped = headers.padding.min(read);
            headers.padding -= skipped;
            headers.blocks.extend_from_slice(buf.get(skipped..read).unwrap_or_default());
        }
        Ok(read)
    }
}

/// Why an entry is refused, before it is known which.
enum Refused {
    Policy(String),
    Limit(&'static str, u64),
    Read(io::Error),
    Write(io::Error),
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, Refused> {
    Err(Refused::Policy(reason.into()))
}

/// Directories on the way from the root, each with its name in the one before.
type Walked = Vec<(Id, Box<[u8]>)>;

struct Merge<'a> {
    tree: Tree,
    writer: Writer,
    limits: &'a Limits,
    layer: u32,
    entries: u64,
    bytes: u64,
    names: u64,
    steps: u64,
}

impl Merge<'_> {
    fn layer(&mut self, digest: &str, reader: &mut dyn Read) -> Result<(), ConvertError> {
        let headers = Rc::new(RefCell::new(Headers::default()));
        let layer = digest.to_owned();
        let mut archive = tar::Archive::new(Metered { inner: reader, headers: headers.clone() });
        let mut after = String::from("the start");
        let read = |after: &str, error| ConvertError::Read {
            layer: layer.clone(),
            after: after.to_owned(),
            error,
        };
        let mut entries = archive.entries().map_err(|e| read(&after, e))?;
        loop {
            headers.borrow_mut().begin(self.limits.headers);
            let Some(entry) = entries.next() else { break };
            let mut entry = entry.map_err(|e| read(&after, e))?;
            headers.borrow_mut().end();
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let extended =
                Extended::parse(&headers.borrow().blocks).map_err(|m| Refused::Policy(m.into()));
            match extended.and_then(|extended| self.entry(&mut entry, &extended)) {
                Ok(()) => {}
                Err(Refused::Policy(reason)) => {
                    return Err(ConvertError::Entry { layer, entry: name, reason });
                }
                Err(Refused::Limit(what, limit)) => {
                    return Err(ConvertError::Limit { layer, entry: name, what, limit });
                }
                Err(Refused::Read(error)) => return Err(read(&name, error)),
                Err(Refused::Write(error)) => return Err(ConvertError::Write(error)),
            }
            // So that only headers count against the budget of the next one.
            io::copy(&mut entry, &mut io::sink()).map_err(|e| read(&name, e))?;
            after = name;
        }
        headers.borrow_mut().end();
        // The caller's check of the digest needs every byte.
        io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(|e| read(&after, e))?;
        Ok(())
    }

    fn entry<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        extended: &Extended,
    ) -> Result<(), Refused> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(Refused::Limit("entries", self.limits.entries));
        }
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        let names = Names::of(entry, extended)?;
        let path = self.components(&names.path)?;
        let Some((name, parents)) = path.split_last() else {
            if kind != EntryType::Directory {
                return refuse("the root must be a directory");
            }
            let node = self.node(entry, extended, &names)?;
            return self.place(None, node);
        };
        if name.as_slice() == b".wh..wh..opq" {
            let directory = self.parent(parents)?;
            return self.hide_below(directory);
        }
        if name.starts_with(b".wh..wh.") {
            return Ok(()); // AUFS's own files
        }
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            if matches!(hidden, b"" | b"." | b"..") {
                return refuse("a whiteout must name an entry");
            }
            let directory = self.parent(parents)?;
            return self.hide(directory, hidden);
        }
        let directory = self.parent(parents)?;
        if kind == EntryType::Link {
            return self.link(directory, name, &names.target);
        }
        let node = self.node(entry, extended, &names)?;
        self.place(Some((directory, name)), node)
    }

    fn components(&self, path: &[u8]) -> Result<Vec<Vec<u8>>, Refused> {
        if path.is_empty() {
            return refuse("the name is empty");
        }
        if path.contains(&0) {
            return refuse("the name contains NUL");
        }
        if path.len() > self.limits.path {
            return Err(Refused::Limit("bytes in a path", self.limits.path as u64));
        }
        let mut components = Vec::new();
        for part in path.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".") {
            if part == b".." {
                return refuse("the name contains `..`");
            }
            if part.len() > 255 {
                return refuse("a component of the name is longer than 255 bytes");
            }
            components.push(part.to_vec());
        }
        Ok(components)
    }

    fn children(&mut self, id: Id) -> Option<&mut Entries> {
        match self.tree.nodes.get_mut(id).map(|n| &mut n.content) {
            Some(Content::Directory(entries)) => Some(entries),
            _ => None,
        }
    }

    fn child(&mut self, dir: Id, name: &[u8]) -> Option<Entry> {
        self.children(dir).and_then(|entries| entries.get(name).copied())
    }

    fn add(&mut self, node: Node) -> Result<Id, Refused> {
        if self.tree.nodes.len() as u64 > self.limits.entries.saturating_mul(2) {
            return Err(Refused::Limit("entries", self.limits.entries));
        }
        self.tree.nodes.push(node);
        Ok(self.tree.nodes.len() - 1)
    }

    /// So many more bytes of names are kept.
    fn keep(&mut self, bytes: u64) -> Result<(), Refused> {
        self.names = self.names.saturating_add(bytes);
        match self.names > self.limits.names {
            true => Err(Refused::Limit("bytes of names and attributes", self.limits.names)),
            false => Ok(()),
        }
    }

    /// So many more names are looked at.
    fn step(&mut self, count: usize) -> Result<(), Refused> {
        self.steps = self.steps.saturating_add(count as u64);
        match self.steps > self.limits.steps {
            true => Err(Refused::Limit("steps to find its names", self.limits.steps)),
            false => Ok(()),
        }
    }

    /// The directory that `parents` lead to inside the root, made where missing; its names on the way
    /// are this layer's from now on.
    fn parent(&mut self, parents: &[Vec<u8>]) -> Result<Id, Refused> {
        let walked = self.walk(parents)?;
        let layer = self.layer;
        let mut above = 0;
        for (id, name) in walked {
            if let Some(entry) = self.children(above).and_then(|entries| entries.get_mut(&name)) {
                entry.layer = layer;
            }
            above = id;
        }
        Ok(above)
    }

    /// The directories, with their names, that `parents` lead through from the root.
    fn walk(&mut self, parents: &[Vec<u8>]) -> Result<Walked, Refused> {
        let mut todo: Vec<Vec<u8>> = parents.iter().rev().cloned().collect();
        let mut walked = Walked::new();
        let mut symlinks = 0;
        while let Some(name) = todo.pop() {
            self.step(1)?;
            if name == b".." {
                walked.pop();
                continue;
            }
            let here = walked.last().map_or(0, |(id, _)| *id);
            let next = match self.child(here, &name) {
                Some(entry) => entry.id,
                None => {
                    self.keep(name.len() as u64)?;
                    let (id, layer) = (self.add(directory())?, self.layer);
                    if let Some(entries) = self.children(here) {
                        entries.insert(name.as_slice().into(), Entry { id, layer });
                    }
                    id
                }
            };
            match self.tree.nodes.get(next).map(|n| &n.content) {
                Some(Content::Directory(_)) => walked.push((next, name.into())),
                Some(Content::Symlink(target)) => {
                    symlinks += 1;
                    if symlinks > 40 {
                        return refuse("its parent leads through more than 40 symlinks");
                    }
                    if target.starts_with(b"/") {
                        walked.clear();
                    }
                    let parts = target.split(|b| *b == b'/');
                    let parts = parts.filter(|p| !p.is_empty() && *p != b".").map(<[u8]>::to_vec);
                    todo.extend(parts.rev());
                    if todo.iter().any(|p| p.len() > 255) {
                        return refuse("its parent is a symlink with a name above 255 bytes");
                    }
                }
                _ => return refuse("its parent is not a directory"),
            }
            if walked.len() >= self.limits.depth {
                return Err(Refused::Limit("levels of directories", self.limits.depth as u64));
            }
        }
        Ok(walked)
    }

    fn place(&mut self, at: Option<(Id, &[u8])>, node: Node) -> Result<(), Refused> {
        let existing = match at {
            None => Some(0),
            Some((dir, name)) => self.child(dir, name).map(|entry| entry.id),
        };
        if let Some(id) = existing
            && let Some(old) = self.tree.nodes.get_mut(id)
            && matches!(
                (&old.content, &node.content),
                (Content::Directory(_), Content::Directory(_))
            )
        {
            let content = std::mem::replace(&mut old.content, Content::Fifo);
            *old = Node { content, ..node };
            let layer = self.layer;
            if let Some((dir, name)) = at
                && let Some(entry) = self.children(dir).and_then(|entries| entries.get_mut(name))
            {
                entry.layer = layer;
            }
            return Ok(());
        }
        let Some((dir, name)) = at else { return refuse("the root must be a directory") };
        let id = self.add(node)?;
        self.enter(dir, name, id)
    }

    fn enter(&mut self, dir: Id, name: &[u8], id: Id) -> Result<(), Refused> {
        self.keep(name.len() as u64)?;
        let entry = Entry { id, layer: self.layer };
        let old = self.children(dir).and_then(|entries| entries.insert(name.into(), entry));
        old.map_or(Ok(()), |old| self.unlink(old.id))
    }

    fn link(&mut self, dir: Id, name: &[u8], target: &[u8]) -> Result<(), Refused> {
        let path = self.components(target).map_err(|e| match e {
            Refused::Policy(reason) => {
                Refused::Policy(format!("target of the hard link: {reason}"))
            }
            other => other,
        })?;
        let Some((last, parents)) = path.split_last() else {
            return refuse("a hard link to a directory");
        };
        let from = self.walk(parents)?.last().map_or(0, |(id, _)| *id);
        if from == dir && last.as_slice() == name {
            return refuse("a hard link to itself");
        }
        let Some(Entry { id, .. }) = self.child(from, last) else {
            return refuse(format!(
                "a hard link to {:?}, which no earlier entry brought",
                String::from_utf8_lossy(target)
            ));
        };
        match self.tree.nodes.get_mut(id) {
            Some(node) if !matches!(node.content, Content::Directory(_)) => node.links += 1,
            _ => return refuse("a hard link to a directory"),
        }
        self.enter(dir, name, id)
    }

    /// Takes one name away from a node; below a directory without names, everything.
    fn unlink(&mut self, id: Id) -> Result<(), Refused> {
        let mut todo = vec![id];
        while let Some(id) = todo.pop() {
            let Some(node) = self.tree.nodes.get_mut(id) else { continue };
            node.links = node.links.saturating_sub(1);
            if node.links > 0 {
                continue;
            }
            match std::mem::replace(&mut node.content, Content::Fifo) {
                Content::Directory(entries) => {
                    todo.extend(entries.into_values().map(|entry| entry.id))
                }
                Content::File { size, block } => {
                    self.writer.forget(block, size).map_err(Refused::Write)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn hide(&mut self, dir: Id, name: &[u8]) -> Result<(), Refused> {
        let Some(entry) = self.child(dir, name) else { return Ok(()) };
        if entry.layer == self.layer {
            return self.hide_below(entry.id);
        }
        if let Some(entries) = self.children(dir) {
            entries.remove(name);
        }
        self.unlink(entry.id)
    }

    /// Removes from `dir` what only lower layers brought. Not recursive: depth is the image's.
    fn hide_below(&mut self, dir: Id) -> Result<(), Refused> {
        let (layer, mut todo) = (self.layer, vec![dir]);
        while let Some(dir) = todo.pop() {
            let count = self.children(dir).map_or(0, |entries| entries.len());
            self.step(count)?;
            let Some(entries) = self.children(dir) else { continue };
            let mut hidden = Vec::new();
            entries.retain(|_, entry| {
                let kept = entry.layer == layer;
                if kept {
                    todo.push(entry.id)
                } else {
                    hidden.push(entry.id)
                }
                kept
            });
            for id in hidden {
                self.unlink(id)?;
            }
        }
        Ok(())
    }

    fn node<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        extended: &Extended,
        names: &Names,
    ) -> Result<Node, Refused> {
        let pax = self.pax(extended, entry.size())?;
        self.keep(erofs::xattr_size(&pax.xattrs))?;
        let header = entry.header().clone();
        let bad = |what: &str| Refused::Policy(format!("its {what} is not a valid number"));
        let id = |pax: Option<u64>, value: io::Result<u64>, field: &[u8], what: &str| {
            let value = pax.or_else(|| value.ok()).or_else(|| empty(field));
            value.and_then(|value| u32::try_from(value).ok()).ok_or_else(|| bad(what))
        };
        let fields = header.as_old();
        let (mtime, mtime_nsec) = match pax.mtime {
            Some(mtime) => mtime,
            None => (header_mtime(&header).ok_or_else(|| bad("mtime"))?, 0),
        };
        let device = || -> Result<(u32, u32), Refused> {
            let major = header.device_major().ok().flatten().ok_or_else(|| bad("device number"))?;
            let minor = header.device_minor().ok().flatten().ok_or_else(|| bad("device number"))?;
            if major > 0xfff || minor > 0xf_ffff {
                return refuse("its device number is larger than Linux allows");
            }
            Ok((major, minor))
        };
        let mut node = Node {
            content: Content::Fifo,
            mode: (id(None, header.mode().map(u64::from), &fields.mode, "mode")? & 0o7777) as u16,
            uid: id(pax.uid, header.uid(), &fields.uid, "uid")?,
            gid: id(pax.gid, header.gid(), &fields.gid, "gid")?,
            mtime,
            mtime_nsec,
            xattrs: pax.xattrs,
            links: 1,
        };
        node.content = match header.entry_type() {
            EntryType::Directory => Content::Directory(BTreeMap::new()),
            EntryType::Fifo => Content::Fifo,
            EntryType::Char => device().map(|(a, b)| Content::Char(a, b))?,
            EntryType::Block => device().map(|(a, b)| Content::Block(a, b))?,
            EntryType::Symlink => {
                let target = names.target.as_slice();
                if target.is_empty() || target.contains(&0) || target.len() >= 4096 {
                    return refuse("the target of the symlink is empty, has a NUL or is too long");
                }
                self.keep(target.len() as u64)?;
                Content::Symlink(target.into())
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let map = sparse::map(extended, entry.size(), self.limits.headers, entry);
                let map = map.map_err(|error| match error {
                    SparseError::Map(reason) => Refused::Policy(reason.to_owned()),
                    SparseError::Read(error) => Refused::Read(error),
                })?;
                let size = map.as_ref().map_or(entry.size(), |map| map.size);
                self.bytes = self.bytes.saturating_add(size);
                if self.bytes > self.limits.bytes {
                    return Err(Refused::Limit("bytes of file data", self.limits.bytes));
                }
                let mut source = Source { inner: entry, failed: false };
                let written = match map {
                    Some(map) => self.writer.data(&mut Expanded::new(&mut source, map), size),
                    None => self.writer.data(&mut source, size),
                };
                let failed = source.failed;
                let block = written.map_err(|e| {
                    match failed || e.kind() == io::ErrorKind::UnexpectedEof {
                        true => Refused::Read(e),
                        false => Refused::Write(e),
                    }
                })?;
                Content::File { size, block }
            }
            other => return refuse(format!("entries of type {:?} are unknown", other.as_byte())),
        };
        Ok(node)
    }

    /// What the records say of an entry that holds `stored` bytes.
    fn pax(&self, extended: &Extended, stored: u64) -> Result<Pax, Refused> {
        let mut pax = Pax { mtime: None, uid: None, gid: None, xattrs: Box::default() };
        let mut xattrs: BTreeMap<Box<[u8]>, Box<[u8]>> = BTreeMap::new();
        for (key, value) in &extended.records {
            let number = || {
                let number = std::str::from_utf8(value).ok().and_then(|v| v.parse::<u64>().ok());
                number.ok_or(Refused::Policy("its PAX size, uid or gid is not a number".into()))
            };
            match key.as_slice() {
                // Where the next header is depends on it: no two views of it are allowed.
                b"size" if number()? != stored => {
                    return refuse("its PAX size is not the one that it has");
                }
                b"uid" => pax.uid = Some(number()?),
                b"gid" => pax.gid = Some(number()?),
                b"mtime" => match pax_time(value) {
                    Some(time) => pax.mtime = Some(time),
                    None => return refuse("its PAX mtime is not a valid time"),
                },
                key => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        if name.starts_with(b"trusted.overlay.")
                            || name.starts_with(b"user.overlay.")
                        {
                            continue;
                        }
                        if erofs::xattr_index(name).is_none() || name.contains(&0) {
                            return refuse(format!(
                                "extended attribute {:?} cannot be kept",
                                String::from_utf8_lossy(name)
                            ));
                        }
                        if value.len() > usize::from(u16::MAX) {
                            return refuse("an extended attribute is longer than 65535 bytes");
                        }
                        xattrs.insert(name.into(), value.as_slice().into());
                    }
                }
            }
        }
        let xattrs: Vec<Xattr> = xattrs.into_iter().collect();
        let limit = self.limits.xattrs.min(4 * u64::from(u16::MAX));
        if erofs::xattr_size(&xattrs) > limit {
            return Err(Refused::Limit("bytes of extended attributes", limit));
        }
        pax.xattrs = xattrs.into();
        Ok(pax)
    }
}

struct Pax {
    mtime: Option<(i64, u32)>,
    uid: Option<u64>,
    gid: Option<u64>,
    xattrs: Box<[Xattr]>,
}

/// Tells a layer that cannot be read from an output that cannot be written.
struct Source<'a, R> {
    inner: &'a mut R,
    failed: bool,
}

impl<R: Read> Read for Source<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let result = self.inner.read(buf);
        self.failed |= result.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::Interrupted);
        result
    }
}

/// The names that an entry has and links to.
struct Names {
    path: Vec<u8>,
    target: Vec<u8>,
}

impl Names {
    fn of<R: Read>(entry: &tar::Entry<'_, R>, extended: &Extended) -> Result<Names, Refused> {
        let get = |key: &[u8]| extended.get(key).map(<[u8]>::to_vec);
        let header = entry.header();
        let (path, target) = if !extended.misread_by_lines() {
            (entry.path_bytes(), entry.link_name_bytes())
        } else if extended.gnu_names {
            return refuse("it has PAX records beside GNU's long names");
        } else {
            (header.path_bytes(), header.link_name_bytes())
        };
        Ok(Names {
            path: get(b"GNU.sparse.name").or(get(b"path")).unwrap_or_else(|| path.into_owned()),
            target: get(b"linkpath")
                .unwrap_or_else(|| target.map(|target| target.into_owned()).unwrap_or_default()),
        })
    }
}

/// Zero for a numeric field that nobody filled in.
fn empty(field: &[u8]) -> Option<u64> {
    field.iter().all(|byte| matches!(byte, 0 | b' ')).then_some(0)
}

/// The header's mtime; GNU tar writes negative ones in base 256.
fn header_mtime(header: &tar::Header) -> Option<i64> {
    let field = header.as_old().mtime;
    if field[0] == 0xff {
        let low: [u8; 8] = field.get(4..12)?.try_into().ok()?;
        return Some(i64::from_be_bytes(low));
    }
    i64::try_from(header.mtime().ok().or_else(|| empty(&field))?).ok()
}

/// Seconds and nanoseconds of a PAX time, a decimal number; digits past the ninth are dropped.
fn pax_time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (negative, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0u32, |n, d| n * 10 + u32::from(d - b'0'));
    match (negative, nanoseconds) {
        (false, n) => Some((seconds, n)),
        (true, 0) => Some((-seconds, 0)),
        (true, n) => Some((-seconds - 1, 1_000_000_000 - n)),
    }
}
