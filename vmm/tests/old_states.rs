//! State files that earlier versions wrote are read by this one. A file in `data` is never written
//! anew: where the form of a state changes, another one is added beside it.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use vmm::snapshot::MachineState;
use vmm::snapshot::file;

#[test]
fn the_first_version_is_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/state-v1");
    let state: MachineState = file::read(&path).unwrap();
    assert_eq!(state.vcpus.len(), 1);
    let names: Vec<_> = state.devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["block", "net", "rng", "console", "balloon", "mem", "pmem"]);
    let source = state.description.boot_source.as_ref().unwrap();
    assert_eq!(source.kernel_image_path, Path::new("k"));
    // What is written today is read as well.
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("state");
    file::write(&copy, &state).unwrap();
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&path).unwrap());
    assert_eq!(file::version(&path).unwrap(), 1);
}
