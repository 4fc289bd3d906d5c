//! Converts a real layer: `VMRUN_TEST_LAYER=minbase.tar cargo test -p images --test rootfs`.

use std::fs::File;
use std::process::Command;

use images::rootfs::{LayerStream, Limits, convert};

#[test]
fn a_real_layer_passes_fsck() {
    let Some(path) = std::env::var_os("VMRUN_TEST_LAYER") else {
        eprintln!("skipped: VMRUN_TEST_LAYER does not name an uncompressed tar");
        return;
    };
    let output = tempfile::NamedTempFile::new().unwrap();
    let reader = Box::new(File::open(path).unwrap());
    let mut layers = [LayerStream { digest: "sha256:test".into(), reader }];
    let summary = convert(&mut layers, output.reopen().unwrap(), &Limits::default()).unwrap();
    let run = Command::new("fsck.erofs").arg("--extract").arg(output.path()).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    if let Some(keep) = std::env::var_os("VMRUN_TEST_KEEP") {
        std::fs::copy(output.path(), keep).unwrap();
    }
    eprintln!("{summary:?}");
}
