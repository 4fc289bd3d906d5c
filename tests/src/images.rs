//! The images that `prepare` makes and the tests run.

use std::path::{Path, PathBuf};

/// Where `prepare` put its results: `VMRUN_E2E_ASSETS`, which `cargo xtask test` sets.
pub fn assets() -> PathBuf {
    match std::env::var_os("VMRUN_E2E_ASSETS") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/e2e/assets"),
    }
}

/// The guest kernel that `prepare` imported last, as a file to import again.
pub fn kernel() -> PathBuf {
    kernel_in(&assets())
}

/// The same in a folder that is being prepared.
pub fn kernel_in(folder: &Path) -> PathBuf {
    folder.join("kernel")
}

/// The OCI archive of an image, for example `base`.
pub fn archive(image: &str) -> PathBuf {
    archive_in(&assets(), image)
}

/// The same in a folder that is being prepared.
pub fn archive_in(folder: &Path, image: &str) -> PathBuf {
    folder.join(format!("{image}.oci.tar"))
}

/// The images built from `tests/images/NAME/Dockerfile`, in the order in which they are built.
pub const BUILT: [&str; 4] = ["base", "args", "user", "layers"];
