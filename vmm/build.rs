//! Compiles the policy of system calls (docs/seccomp.md).

use std::error::Error;
use std::fmt::Write;
use std::path::Path;

#[path = "src/seccomp/policy.rs"]
mod policy;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=src/seccomp/policy.rs");
    let root = std::env::var("CARGO_MANIFEST_DIR")?;
    let path = Path::new(&root).join("../resources/seccomp/x86_64.json");
    println!("cargo::rerun-if-changed={}", path.display());
    let text = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let programs =
        policy::compile(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut code = String::new();
    for name in policy::NAMES {
        let program = programs.get(name).ok_or("a filter is missing")?;
        writeln!(code, "const {}: &[(u16, u8, u8, u32)] = &[", name.to_uppercase())?;
        for step in program {
            writeln!(code, "    ({}, {}, {}, {}),", step.code, step.jt, step.jf, step.k)?;
        }
        writeln!(code, "];")?;
    }
    std::fs::write(Path::new(&std::env::var("OUT_DIR")?).join("seccomp.rs"), code)?;
    Ok(())
}
