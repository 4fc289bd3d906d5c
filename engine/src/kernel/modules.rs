//! Which of a distribution kernel's modules a guest needs, and in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use object::{Object, ObjectSection};

use super::KernelError;

/// Without these no image runs.
const REQUIRED: [&str; 6] =
    ["virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport", "erofs", "overlay", "ext4"];
/// With these it runs better.
const WELCOME: [&str; 5] = ["virtio_net", "virtio_console", "virtio_rng", "af_packet", "ipv6"];
/// What others ask the kernel for when they start, without naming it among what they depend on:
/// libcrc32c, and with it erofs, fails where none of these is there yet.
const FIRST: [&str; 2] = ["crc32c_generic", "crc32c_intel"];
/// Most bytes that one module unpacks to.
const MAX_MODULE: u64 = 64 << 20;
/// Most bytes that all that a guest needs unpack to: they are in its memory before it does anything.
const MAX_TOTAL: u64 = 256 << 20;

/// A kernel's modules by name, and the names of those built in.
#[derive(Default)]
pub struct Tree {
    modules: BTreeMap<String, Vec<u8>>,
    built_in: BTreeSet<String>,
}

/// A module as the guest loads it.
pub struct Module {
    /// File name.
    pub file: String,
    /// The ELF file, not compressed.
    pub bytes: Vec<u8>,
}

impl Tree {
    /// Whether a file of the module tree says anything to us.
    pub fn wants(file: &str) -> bool {
        file == "modules.builtin" || name_of(file).is_some()
    }

    /// Adds a file of the tree, by its base name.
    pub fn add(&mut self, file: &str, bytes: Vec<u8>) {
        if file == "modules.builtin" {
            let text = String::from_utf8_lossy(&bytes);
            let bases = text.lines().filter_map(|line| line.rsplit('/').next());
            self.built_in.extend(bases.filter_map(name_of));
        } else if let Some(name) = name_of(file) {
            self.modules.insert(name, bytes);
        }
    }
}

/// A module's name: that of its file, with underscores.
fn name_of(file: &str) -> Option<String> {
    let stem =
        [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|end| file.strip_suffix(end))?;
    Some(stem.replace('-', "_"))
}

/// The modules a guest needs and those they depend on, each after what it depends on.
pub fn choose(path: &Path, tree: &Tree) -> Result<Vec<Module>, KernelError> {
    for name in REQUIRED {
        if !tree.built_in.contains(name) && !tree.modules.contains_key(name) {
            return Err(KernelError::Lacks { path: path.to_owned(), what: name.to_owned() });
        }
    }
    let mut choice =
        Choice { path, tree, done: BTreeSet::new(), left: MAX_TOTAL, chosen: Vec::new() };
    for name in FIRST.iter().chain(&REQUIRED).chain(&WELCOME) {
        choice.add(name, 0)?;
    }
    Ok(choice.chosen)
}

/// What was chosen so far.
struct Choice<'a> {
    path: &'a Path,
    tree: &'a Tree,
    done: BTreeSet<String>,
    /// Bytes that more modules may unpack to.
    left: u64,
    chosen: Vec<Module>,
}

impl Choice<'_> {
    fn add(&mut self, name: &str, depth: usize) -> Result<(), KernelError> {
        let Some(packed) = self.tree.modules.get(name) else { return Ok(()) };
        // A module that needs itself, however far round, is only taken once.
        if depth > 64 || !self.done.insert(name.to_owned()) {
            return Ok(());
        }
        let malformed = |reason: &str| KernelError::Malformed {
            path: self.path.to_owned(),
            reason: format!("module {name}: {reason}"),
        };
        let bytes = unpack(packed, self.left).map_err(|error| malformed(&error.to_string()))?;
        let needs = dependencies(&bytes).ok_or_else(|| malformed("not an ELF file"))?;
        self.left = self.left.saturating_sub(bytes.len() as u64);
        for need in needs {
            self.add(&need, depth + 1)?;
        }
        self.chosen.push(Module { file: format!("{name}.ko"), bytes });
        Ok(())
    }
}

/// Unpacks a module that there are so many bytes left for.
fn unpack(packed: &[u8], left: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut reader: Box<dyn Read + '_> = match packed {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Box::new(xz2::read::XzDecoder::new(packed)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::new(packed)?),
        [0x1f, 0x8b, ..] => Box::new(flate2::read::GzDecoder::new(packed)),
        _ => Box::new(packed),
    };
    reader.by_ref().take(MAX_MODULE.min(left) + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 {
        size if size > MAX_MODULE => Err(std::io::Error::other("it unpacks to more than 64 MiB")),
        size if size > left => Err(std::io::Error::other(
            "with the modules that it needs, it unpacks to more than 256 MiB",
        )),
        _ => Ok(bytes),
    }
}

/// Names that a module's `depends=` lists, in its `.modinfo` section.
fn dependencies(elf: &[u8]) -> Option<Vec<String>> {
    let file = object::File::parse(elf).ok()?;
    let Some(section) = file.section_by_name(".modinfo") else { return Some(Vec::new()) };
    let data = section.data().ok()?;
    let entries = data.split(|byte| *byte == 0);
    let depends =
        entries.filter_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix("depends="));
    let names = depends.flat_map(|list| list.split(',')).filter(|name| !name.is_empty());
    Some(names.map(|name| name.replace('-', "_")).collect())
}
