//! Compiles the policies of system calls that this crate's processes have.

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::path::Path;

/// Where they are, from this crate's folder.
const POLICY: &str = "../resources/seccomp/converter.json";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={POLICY}");
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let programs = seccompiler::compile_from_json(File::open(POLICY)?, arch.as_str().try_into()?)?;
    for (name, program) in programs {
        // As the kernel has a `sock_filter`.
        let bytes: Vec<u8> = program
            .iter()
            .flat_map(|step| {
                let [code0, code1] = step.code.to_ne_bytes();
                let [k0, k1, k2, k3] = step.k.to_ne_bytes();
                [code0, code1, step.jt, step.jf, k0, k1, k2, k3]
            })
            .collect();
        fs::write(Path::new(&env::var("OUT_DIR")?).join(format!("{name}.bpf")), bytes)?;
    }
    Ok(())
}
