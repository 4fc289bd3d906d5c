//! State files that earlier versions wrote are read by this one. A file in `data` is never written
//! anew: where the form of a state changes, another one is added beside it.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use devices::bus::BusDevice;
use devices::legacy::i8042::I8042;
use devices::legacy::power::PowerSwitch;
use vmm::snapshot::MachineState;
use vmm::snapshot::file;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Reads a file, and what is written of it today.
fn read(name: &str) -> MachineState {
    let path = path(name);
    let state: MachineState = file::read(&path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("state");
    file::write(&copy, &state).unwrap();
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&path).unwrap());
    assert_eq!(file::version(&path).unwrap(), 1);
    state
}

#[test]
fn the_first_version_is_read() {
    let state = read("state-v1");
    assert_eq!(state.vcpus.len(), 1);
    let names: Vec<_> = state.devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["block", "net", "rng", "console", "balloon", "mem", "pmem"]);
    let source = state.description.boot_source.as_ref().unwrap();
    assert_eq!(source.kernel_image_path, Path::new("k"));
    assert_eq!(state.keyboard, None);
}

#[test]
fn a_keyboard_with_keys_pressed_is_read() {
    let state = read("state-v1-keyboard");
    let mut keyboard = I8042::new(PowerSwitch::new().unwrap()).unwrap();
    keyboard.restore(state.keyboard.as_ref().unwrap()).unwrap();
    let mut first = [0];
    keyboard.read(0, &mut first);
    assert_eq!(first, [0x1d]);
}
