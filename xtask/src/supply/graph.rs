//! What cargo says is built.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use cargo_metadata::{Metadata, Package};
use semver::Version;

use crate::build::TRIPLE;
use crate::command::{cargo, output};

/// A crate in one version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Linked {
    pub name: String,
    pub version: Version,
}

/// What cargo knows of the workspace as a whole.
pub fn metadata() -> Result<Metadata> {
    let json = output(
        cargo()
            .args(["metadata", "--format-version=1", "--locked"])
            .args(["--filter-platform", TRIPLE]),
    )?;
    serde_json::from_str(&json).context("cargo metadata")
}

/// All packages that anything of the workspace is made of, tests and build scripts among it.
pub fn packages() -> Result<Vec<Package>> {
    let metadata = metadata()?;
    let resolve = metadata.resolve.context("cargo metadata names no packages")?;
    let used: BTreeSet<_> = resolve.nodes.into_iter().map(|node| node.id).collect();
    // It lists also what other platforms need.
    Ok(metadata.packages.into_iter().filter(|package| used.contains(&package.id)).collect())
}

/// What is linked into the program of a package: not what only builds it. Cargo's metadata knows the
/// workspace as a whole, with the features of all its members; its tree knows one package.
pub fn linked(package: &str) -> Result<BTreeSet<Linked>> {
    let tree =
        output(cargo().args(["tree", "--locked", "--target", TRIPLE, "-p", package]).args([
            "--edges",
            "normal,no-proc-macro",
            "--prefix",
            "none",
            "--no-dedupe",
            "--format",
            "{p}",
        ]))?;
    tree.lines().map(parse).collect()
}

/// `NAME vVERSION [(PATH)]`.
fn parse(line: &str) -> Result<Linked> {
    let mut words = line.split_whitespace();
    let wrong = || format!("cargo tree printed {line:?}");
    let name = words.next().with_context(wrong)?.to_owned();
    let version = words.next().and_then(|word| word.strip_prefix('v')).with_context(wrong)?;
    Ok(Linked { name, version: version.parse().with_context(wrong)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_tree_are_crates() {
        let found = parse("toml v1.2.1+spec-1.1.0").unwrap();
        assert_eq!((found.name.as_str(), found.version.minor), ("toml", 2));
        assert_eq!(parse("vmm v0.1.0 (/some/where)").unwrap().name, "vmm");
        for bad in ["", "a", "a 1.0.0", "a vx"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_program_is_smaller_than_the_workspace() {
        let linked = linked("guest").unwrap();
        assert!(linked.iter().any(|linked| linked.name == "agent-protocol"));
        assert!(!linked.iter().any(|linked| linked.name == "syn" || linked.name == "proptest"));
        assert!(linked.len() < packages().unwrap().len());
    }
}
