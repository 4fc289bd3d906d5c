//! `cargo xtask miri`: unit tests under Miri, which sees undefined behaviour, of what can run there: no
//! system call that it does not know, and no code in another language.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command::{output, root, run, target};

/// The crates whose tests run there.
const CRATES: [&str; 2] = ["agent-protocol", "telemetry"];

/// Runs the tests, a crate at a time.
pub fn miri() -> Result<()> {
    let components =
        output(Command::new("rustup").args(["component", "list", "--toolchain", "nightly"]))
            .context("Miri needs a nightly compiler, and rustup to choose it")?;
    let has = |name: &str| {
        components.lines().any(|line| line.starts_with(name) && line.contains("(installed)"))
    };
    ensure!(
        has("miri") && has("rust-src"),
        "Miri is missing: run  rustup component add --toolchain nightly miri rust-src"
    );
    for package in CRATES {
        eprintln!("xtask: {package} under Miri");
        let mut cargo = Command::new("rustup");
        cargo.args(["run", "nightly", "cargo", "miri", "test", "-p", package, "--lib"]);
        cargo.current_dir(root()).env("CARGO_TARGET_DIR", target().join("miri"));
        // Tests look at the clock.
        cargo.env("MIRIFLAGS", "-Zmiri-disable-isolation");
        run(&mut cargo)?;
    }
    Ok(())
}
