//! `cargo xtask sbom`: what each program is made of, as CycloneDX 1.5 JSON (ECMA-424's predecessor,
//! <https://cyclonedx.org/docs/1.5/json/>).
//!
//! Neither time nor a random number is in it: the same sources give the same file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result};
use cargo_metadata::{DependencyKind, Metadata, Package};
use serde::Deserialize;
use serde_json::{Value, json};

use super::graph::{self, Linked};
use super::{Program, Programs, read, resource};
use crate::build;
use crate::command::{output, root};

/// `Cargo.lock`, as far as it is of use.
#[derive(Deserialize)]
struct Lock {
    package: Vec<Locked>,
}

#[derive(Deserialize)]
struct Locked {
    name: String,
    version: String,
    /// SHA-256 of the package's file; none for ours.
    checksum: Option<String>,
}

/// What is linked beside crates: name, version, licence.
type Runtime = [(&'static str, String, &'static str); 2];

/// Writes `PROGRAM.cdx.json` for each program, beside the programs.
pub fn write() -> Result<()> {
    let metadata = graph::metadata()?;
    let lock: Lock = read(&root().join("Cargo.lock"))?;
    let programs: Programs = read(&resource("programs.toml"))?;
    let runtime = runtime()?;
    let folder = build::dist();
    fs::create_dir_all(&folder)?;
    for program in &programs.program {
        let linked = graph::linked(&program.package)?;
        let document = document(program, &linked, &metadata, &lock, &runtime)?;
        let path = folder.join(format!("{}.cdx.json", program.name));
        fs::write(&path, serde_json::to_string_pretty(&document)? + "\n")
            .with_context(|| path.display().to_string())?;
        println!("{}", path.display());
    }
    Ok(())
}

/// The standard library and the C library, which are in every program.
fn runtime() -> Result<Runtime> {
    let text = |program: &str, argument: &str| {
        let text = output(std::process::Command::new(program).arg(argument))?;
        let version = text.split_whitespace().nth(1).map(str::to_owned);
        version.with_context(|| format!("{program} {argument} printed {text:?}"))
    };
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    Ok([
        ("rust-std", text(&rustc, "--version")?, "MIT OR Apache-2.0"),
        // Linked statically, so it is part of what is shipped.
        ("glibc", text("getconf", "GNU_LIBC_VERSION")?, "LGPL-2.1-or-later"),
    ])
}

fn document(
    program: &Program,
    linked: &BTreeSet<Linked>,
    metadata: &Metadata,
    lock: &Lock,
    runtime: &Runtime,
) -> Result<Value> {
    let checksums: BTreeMap<(&str, &str), &str> = lock
        .package
        .iter()
        .filter_map(|p| Some(((p.name.as_str(), p.version.as_str()), p.checksum.as_deref()?)))
        .collect();
    let is_linked = |package: &Package| {
        let Package { name, version, .. } = package;
        linked.contains(&Linked { name: name.to_string(), version: version.clone() })
    };
    let packages: Vec<&Package> = metadata.packages.iter().filter(|p| is_linked(p)).collect();
    let top = packages.iter().find(|package| *package.name == *program.package);
    let top = top.with_context(|| format!("there is no package {}", program.package))?;
    let mut components: Vec<Value> = packages
        .iter()
        .filter(|package| package.id != top.id)
        .map(|package| component(package, "library", &checksums))
        .collect();
    for (name, version, license) in runtime {
        let purl = format!("pkg:generic/{name}@{version}");
        components.push(json!({
            "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
            "licenses": [{"expression": license}],
        }));
    }
    let mut main = component(top, "application", &checksums);
    main["name"] = program.name.as_str().into();
    Ok(json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": main},
        "components": components,
        "dependencies": dependencies(&packages, top, metadata, runtime)?,
    }))
}

fn purl(package: &Package) -> String {
    // A version may have a `+`, which stands for a space in a URL.
    let version = package.version.to_string().replace('+', "%2B");
    format!("pkg:cargo/{}@{version}", package.name)
}

fn component(package: &Package, kind: &str, checksums: &BTreeMap<(&str, &str), &str>) -> Value {
    let version = package.version.to_string();
    let purl = purl(package);
    let mut component = json!({
        "type": kind, "bom-ref": purl, "name": package.name, "version": version, "purl": purl,
        // Old manifests have a slash for OR, which is no SPDX.
        "licenses": [{"expression": package.license.as_deref().unwrap_or("NOASSERTION")
            .replace(" / ", " OR ").replace('/', " OR ")}],
    });
    if let Some(checksum) = checksums.get(&(package.name.as_str(), version.as_str())) {
        component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
    }
    if let Some(repository) = &package.repository {
        component["externalReferences"] = json!([{"type": "vcs", "url": repository}]);
    }
    component
}

/// Who uses whom, of what is linked.
fn dependencies(
    packages: &[&Package],
    top: &Package,
    metadata: &Metadata,
    runtime: &Runtime,
) -> Result<Vec<Value>> {
    let known: BTreeMap<_, String> = packages.iter().map(|p| (&p.id, purl(p))).collect();
    let resolve = metadata.resolve.as_ref().context("cargo metadata names no packages")?;
    let normal = |dependency: &&cargo_metadata::NodeDep| {
        dependency.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal)
    };
    Ok(resolve
        .nodes
        .iter()
        .filter_map(|node| {
            let own = known.get(&node.id)?;
            let uses = node.deps.iter().filter(normal).filter_map(|d| known.get(&d.pkg));
            let mut uses: Vec<String> = uses.cloned().collect();
            if node.id == top.id {
                let runtime = runtime.iter();
                uses.extend(
                    runtime.map(|(name, version, _)| format!("pkg:generic/{name}@{version}")),
                );
            }
            Some(json!({"ref": own, "dependsOn": uses}))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_cyclonedx_and_says_what_is_linked() {
        let metadata = graph::metadata().unwrap();
        let lock: Lock = read(&root().join("Cargo.lock")).unwrap();
        let programs: Programs = read(&resource("programs.toml")).unwrap();
        assert_eq!(programs.program.len(), 3);
        for program in &programs.program {
            let linked = graph::linked(&program.package).unwrap();
            let make =
                || document(program, &linked, &metadata, &lock, &runtime().unwrap()).unwrap();
            let document = make();
            assert_eq!(document, make());
            assert_eq!(
                (&document["bomFormat"], &document["specVersion"]),
                (&json!("CycloneDX"), &json!("1.5"))
            );
            let main = &document["metadata"]["component"];
            assert_eq!(main["type"], "application");
            assert_eq!(main["name"], program.name.as_str());
            let components = document["components"].as_array().unwrap();
            // All that is linked but itself, the standard library and the C library.
            assert_eq!(components.len(), linked.len() + 1);
            let mut refs = BTreeSet::from([main["bom-ref"].as_str().unwrap()]);
            for component in components {
                let text =
                    |key: &str| component[key].as_str().unwrap_or_else(|| panic!("{component}"));
                assert_eq!(text("type"), "library");
                assert!(refs.insert(text("bom-ref")), "{component} is there twice");
                assert!(text("purl").starts_with("pkg:") && !text("version").is_empty());
                let license = component["licenses"][0]["expression"].as_str().unwrap();
                spdx::Expression::parse(license)
                    .unwrap_or_else(|error| panic!("{component}: {error}"));
                // What the registry gave has a hash.
                let hash = component["hashes"][0]["content"].as_str();
                let ours = text("purl").starts_with("pkg:generic/")
                    || text("version") == "0.1.0" && hash.is_none();
                assert!(ours || hash.is_some_and(|hash| hash.len() == 64), "{component}");
            }
            let dependencies = document["dependencies"].as_array().unwrap();
            let mut named = BTreeSet::new();
            for dependency in dependencies {
                assert!(refs.contains(dependency["ref"].as_str().unwrap()), "{dependency}");
                for used in dependency["dependsOn"].as_array().unwrap() {
                    assert!(refs.contains(used.as_str().unwrap()), "{dependency}");
                    named.insert(used.as_str().unwrap());
                }
            }
            // All but the program itself is used by something.
            assert_eq!(named.len(), refs.len() - 1, "{}", program.name);
        }
    }
}
