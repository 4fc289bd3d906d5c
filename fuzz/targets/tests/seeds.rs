//! Every target with its seeds and some mutations of each, the same each time. So a short pass needs
//! no nightly compiler.

#![allow(clippy::panic, clippy::unwrap_used, reason = "tests assert by them")]

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fuzz_targets::TARGETS;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Mutations of all seeds of a target together, and how long they may take.
const MUTATIONS: usize = 2000;
const TIME: Duration = Duration::from_secs(20);

fn fuzz() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Names in a folder, without what is behind the dot.
fn names(folder: PathBuf) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    entries.map(|entry| stem(entry.unwrap().path())).collect()
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(fuzz().join("seeds").join(target)).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Calls a target. An input that it does not survive is kept.
fn survives(name: &str, target: fn(&[u8]), input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.crash"));
        fs::write(&path, input).unwrap();
        panic!(
            "{name} fails; see it again with  cargo xtask fuzz {name} --input {}",
            path.display()
        );
    }
}

fn mutate(random: &mut StdRng, seed: &[u8], other: &[u8]) -> Vec<u8> {
    const EDGES: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
    let mut bytes = seed.to_vec();
    for _ in 0..random.random_range(1..=4) {
        let at = random.random_range(0..=bytes.len());
        match random.random_range(0..6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.random()),
            2 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            3 if at < bytes.len() => bytes[at] = *EDGES.choose(random).unwrap(),
            4 => {
                let end = random.random_range(at..=bytes.len().min(at + 64));
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => {
                let from = random.random_range(0..=other.len());
                let end = other.len().min(from + 64);
                let until = bytes.len().min(at + random.random_range(0..64));
                bytes.splice(at..until, other[from..end].iter().copied());
            }
        }
    }
    bytes
}

/// Targets have a program and seeds, and there are no others.
#[test]
fn all_targets_are_there() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(fuzz().join("fuzz_targets")), targets);
    assert_eq!(names(fuzz().join("seeds")), targets);
}

fn try_target(name: &str) {
    let (_, target) = *TARGETS.iter().find(|(other, _)| *other == name).unwrap();
    let seeds = seeds(name);
    assert!(!seeds.is_empty());
    survives(name, target, b"");
    for seed in &seeds {
        survives(name, target, seed);
    }
    let mut random = StdRng::seed_from_u64(1);
    let started = Instant::now();
    for number in 0..MUTATIONS {
        if started.elapsed() > TIME {
            eprintln!("{name}: {number} mutations");
            break;
        }
        let other = seeds.choose(&mut random).unwrap();
        let input = mutate(&mut random, &seeds[number % seeds.len()], other);
        survives(name, target, &input);
    }
}

macro_rules! targets {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            try_target(stringify!($name));
        }
    )*};
}

targets! {
    agent_conversation agent_frames api_request config_file elf_kernel image_documents
    image_references image_tar kernel_import legacy_ports mmds pci_bus snapshot_state tap_frames
    virtio_queues vsock_packets
}
