//! Trees of all kinds, written and read back entry by entry.

use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;

use super::reader::{self, Found};
use super::*;

/// What a node is to be; a number in it says of which length.
#[derive(Clone, Debug)]
enum Kind {
    Directory,
    File(usize),
    Symlink(usize),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    /// One more name of a thing that is there.
    Link(usize),
}

#[derive(Clone, Debug)]
struct Plant {
    /// Below which of the directories so far.
    parent: usize,
    name: Vec<u8>,
    kind: Kind,
    mode: u16,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattrs: Vec<(&'static str, Vec<u8>, usize)>,
}

fn kind() -> impl Strategy<Value = Kind> {
    // Around the lengths that follow an inode, and those of whole blocks.
    let length = prop_oneof![0usize..100, 2040usize..2060, 4090usize..4100, 0usize..20_000];
    prop_oneof![
        3 => Just(Kind::Directory),
        3 => length.clone().prop_map(Kind::File),
        2 => length.prop_map(|length| Kind::Symlink(length.clamp(1, 4095))),
        1 => (0u32..0x1000, 0u32..0x10_0000).prop_map(|(major, minor)| Kind::Char(major, minor)),
        1 => (0u32..0x1000, 0u32..0x10_0000).prop_map(|(major, minor)| Kind::Block(major, minor)),
        1 => Just(Kind::Fifo),
        2 => any::<usize>().prop_map(Kind::Link),
    ]
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_map(|byte| if matches!(byte, 0 | b'/') { b'x' } else { byte });
    let name = prop_oneof![3 => vec(byte.clone(), 1..12), 1 => vec(byte, 200..=255)];
    name.prop_filter("not a dot", |name| name != b"." && name != b"..")
}

fn xattr() -> impl Strategy<Value = (&'static str, Vec<u8>, usize)> {
    let prefix = prop::sample::select(vec!["user.", "trusted.", "security."]);
    (prefix, vec(any::<u8>(), 1..=255), prop_oneof![0usize..40, 0usize..5000])
}

fn plant() -> impl Strategy<Value = Plant> {
    let owner = (any::<u32>(), any::<u32>());
    let mtime = (any::<i64>(), 0u32..1_000_000_000);
    let xattrs = prop_oneof![3 => Just(Vec::new()), 1 => vec(xattr(), 1..4)];
    (any::<usize>(), name(), kind(), 0u16..0o10000, owner, mtime, xattrs).prop_map(
        |(parent, name, kind, mode, owner, mtime, xattrs)| Plant {
            parent,
            name,
            kind,
            mode,
            owner,
            mtime,
            xattrs,
        },
    )
}

/// Bytes of which each place has its own.
fn bytes(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| ((at * 31 + seed * 7) % 251) as u8 + 1).collect()
}

/// A tree and its image, and under each path what is to be found there (its inode being its number
/// in the tree).
fn grow(plants: &[Plant]) -> (Tree, File, BTreeMap<Vec<u8>, Found>) {
    let file = tempfile::tempfile().unwrap();
    let mut writer = Writer::new(file.try_clone().unwrap());
    let node = |content, plant: Option<&Plant>, seed: usize| Node {
        content,
        mode: plant.map_or(0o755, |plant| plant.mode),
        uid: plant.map_or(0, |plant| plant.owner.0),
        gid: plant.map_or(0, |plant| plant.owner.1),
        mtime: plant.map_or(0, |plant| plant.mtime.0),
        mtime_nsec: plant.map_or(0, |plant| plant.mtime.1),
        xattrs: plant.map_or(Box::default(), |plant| {
            let mut names = BTreeSet::new();
            let new = plant.xattrs.iter().filter(|(prefix, name, _)| names.insert((prefix, name)));
            new.map(|(prefix, name, length)| {
                let name = [prefix.as_bytes(), name].concat();
                (name.into(), bytes(seed, *length).into())
            })
            .collect()
        }),
        links: 1,
    };
    let mut tree = Tree { nodes: vec![node(Content::Directory(BTreeMap::new()), None, 0)] };
    // Directories with their paths, and everything with its path and data.
    let mut folders: Vec<(Id, Vec<u8>)> = vec![(0, Vec::new())];
    let mut named: Vec<(Vec<u8>, Id)> = vec![(Vec::new(), 0)];
    let mut contents: BTreeMap<Id, Vec<u8>> = BTreeMap::new();
    for (seed, plant) in plants.iter().enumerate() {
        let (parent, path) = folders[plant.parent % folders.len()].clone();
        let Content::Directory(entries) = &tree.nodes[parent].content else { unreachable!() };
        if entries.contains_key(plant.name.as_slice()) {
            continue;
        }
        let mut path = path;
        path.extend_from_slice(if path.is_empty() { b"" } else { b"/" });
        path.extend_from_slice(&plant.name);
        let id = tree.nodes.len();
        let content = match plant.kind {
            Kind::Link(which) => {
                let (_, id) = named[which % named.len()].clone();
                if matches!(tree.nodes[id].content, Content::Directory(_)) {
                    continue;
                }
                tree.nodes[id].links += 1;
                insert(&mut tree, parent, &plant.name, id);
                named.push((path, id));
                continue;
            }
            Kind::Directory => {
                folders.push((id, path.clone()));
                Content::Directory(BTreeMap::new())
            }
            Kind::File(length) => {
                let data = bytes(seed, length);
                let block = writer.data(&mut data.as_slice(), length as u64).unwrap();
                contents.insert(id, data);
                Content::File { size: length as u64, block }
            }
            Kind::Symlink(length) => {
                contents.insert(id, bytes(seed, length));
                Content::Symlink(bytes(seed, length).into())
            }
            Kind::Char(major, minor) => Content::Char(major, minor),
            Kind::Block(major, minor) => Content::Block(major, minor),
            Kind::Fifo => Content::Fifo,
        };
        tree.nodes.push(node(content, Some(plant), seed));
        insert(&mut tree, parent, &plant.name, id);
        named.push((path, id));
    }
    let meant = named.into_iter().map(|(path, id)| {
        let data = contents.get(&id).cloned().unwrap_or_default();
        (path, meant(&tree, id, data))
    });
    let meant = meant.collect();
    let size = writer.finish(&tree, [7; 16]).unwrap();
    assert_eq!(size, file.metadata().unwrap().len());
    (tree, file, meant)
}

fn insert(tree: &mut Tree, parent: Id, name: &[u8], id: Id) {
    let Content::Directory(entries) = &mut tree.nodes[parent].content else { unreachable!() };
    entries.insert(name.into(), Entry { id, layer: 1 });
}

fn meant(tree: &Tree, id: Id, data: Vec<u8>) -> Found {
    let node = &tree.nodes[id];
    let (kind, device, links) = match &node.content {
        Content::Directory(entries) => {
            let is_directory =
                |entry: &&Entry| matches!(tree.nodes[entry.id].content, Content::Directory(_));
            (4u16, None, 2 + entries.values().filter(is_directory).count() as u32)
        }
        Content::File { .. } => (8, None, node.links),
        Content::Symlink(_) => (10, None, node.links),
        Content::Char(major, minor) => (2, Some((*major, *minor)), node.links),
        Content::Block(major, minor) => (6, Some((*major, *minor)), node.links),
        Content::Fifo => (1, None, node.links),
    };
    let xattrs = node.xattrs.iter().map(|(name, value)| {
        let dot = name.iter().position(|byte| *byte == b'.').unwrap();
        let index = match &name[..dot] {
            b"user" => 1,
            b"trusted" => 4,
            _ => 6,
        };
        (index, name[dot + 1..].to_vec(), value.to_vec())
    });
    Found {
        inode: id as u64,
        mode: kind << 12 | node.mode,
        uid: node.uid,
        gid: node.gid,
        mtime: node.mtime,
        mtime_nsec: node.mtime_nsec,
        links,
        device,
        data,
        xattrs: xattrs.collect(),
    }
}

/// What was written is what was meant; the names of one thing share an inode, and no others.
fn compare(plants: &[Plant]) {
    let (_, file, meant) = grow(plants);
    let found = reader::read(&file).unwrap();
    assert_eq!(found.keys().collect::<Vec<_>>(), meant.keys().collect::<Vec<_>>());
    let mut numbers = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    for (path, meant) in &meant {
        let found = &found[path];
        assert_eq!(*numbers.entry(meant.inode).or_insert(found.inode), found.inode);
        assert_eq!(*inodes.entry(found.inode).or_insert(meant.inode), meant.inode);
        assert_eq!(Found { inode: 0, ..found.clone() }, Found { inode: 0, ..meant.clone() });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_is_read_back_as_it_was_written(plants in vec(plant(), 0..60)) {
        compare(&plants);
    }

    /// Directories of many blocks: names that fill a block to the last byte or nearly so.
    #[test]
    fn a_large_directory_is_read_back_as_it_was_written(
        lengths in vec(prop_oneof![1usize..30, 240usize..=255], 0..600)
    ) {
        let plants: Vec<Plant> = lengths.iter().enumerate().map(|(number, length)| Plant {
            parent: 0,
            name: format!("{number:0>length$}").into_bytes(),
            kind: Kind::Fifo,
            mode: 0o644,
            owner: (0, 0),
            mtime: (0, 0),
            xattrs: Vec::new(),
        }).collect();
        compare(&plants);
    }
}
