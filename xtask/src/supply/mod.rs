//! What is linked into vmrun, and whether it may be: `deny.toml`, `resources/supply`.
//!
//! cargo-deny does the same and more, with a network and after minutes of building it. Here nothing is
//! fetched, so that it is one of the lints.

mod graph;
mod rules;
mod sbom;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::command::root;
pub use sbom::write as write_sbom;

/// The programs that are shipped.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Programs {
    program: Vec<Program>,
}

/// A program that is shipped.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Program {
    name: String,
    /// The package it is built from.
    package: String,
    /// Crates that must not be linked into it.
    #[serde(default)]
    banned: Vec<String>,
}

/// A file of rules.
fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    toml::from_str(&text).with_context(|| path.display().to_string())
}

fn resource(name: &str) -> PathBuf {
    root().join("resources/supply").join(name)
}

/// Checks licences, duplicates, sources, advisories, and what each program must not link.
pub fn check() -> Result<()> {
    let packages = graph::packages()?;
    let deny: rules::Deny = read(&root().join("deny.toml"))?;
    let advisories: rules::Advisories = read(&resource("advisories.toml"))?;
    let mut wrong = deny.check(&packages)?;
    wrong.extend(advisories.check(&packages));
    let programs: Programs = read(&resource("programs.toml"))?;
    for program in &programs.program {
        let linked = graph::linked(&program.package)?;
        eprintln!("xtask: {} links {} crates", program.name, linked.len());
        wrong.extend(rules::banned(&program.name, &program.banned, &linked));
    }
    if wrong.is_empty() {
        eprintln!(
            "xtask: {} crates are as deny.toml has it; advisories as of {}",
            packages.len(),
            advisories.as_of
        );
        return Ok(());
    }
    bail!("{}", wrong.join("\n"))
}
