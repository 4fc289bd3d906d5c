//! Guests of a few instructions, which even a host whose KVM emulates most of a kernel can run.

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;

use api_server::machine::config_file::ConfigFile;
use api_server::machine::{Machine, MachineAnswer, exit_status};
use vmm::controller::Controller;
use vmm::seccomp::Seccomp;
use vmm::{Handed, event_loop};

/// An ELF kernel of this code at 1 MiB, entered by PVH.
fn kernel(code: &[u8]) -> tempfile::NamedTempFile {
    const ADDRESS: u64 = 0x10_0000;
    let mut bytes = vec![0; 0x240];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    bytes[16..20].copy_from_slice(&[2, 0, 62, 0]);
    bytes[24..32].copy_from_slice(&ADDRESS.to_le_bytes());
    bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
    bytes[52..58].copy_from_slice(&[64, 0, 56, 0, 2, 0]);
    let mut header = |at: usize, kind: u32, words: [u64; 5]| {
        bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (index, word) in words.iter().enumerate() {
            let at = at + 8 + index * 8;
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
    };
    header(64, 1, [0x200, ADDRESS, ADDRESS, 64, 64]);
    header(120, 4, [0x100, 0, 0, 20, 20]);
    // XEN_ELFNOTE_PHYS32_ENTRY.
    for (index, word) in
        [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), ADDRESS as u32].iter().enumerate()
    {
        bytes[0x100 + index * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
    bytes[0x200..0x200 + code.len()].copy_from_slice(code);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

/// Runs the code on a machine without a single virtio device; `None` where there is no KVM.
fn run(code: &[u8]) -> Option<i32> {
    run_with(code, "")
}

/// The same, with more in the configuration file.
fn run_with(code: &[u8], more: &str) -> Option<i32> {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("skipped: no /dev/kvm");
        return None;
    }
    let kernel = kernel(code);
    let config = format!(
        r#"{{"boot-source": {{"kernel_image_path": {:?}}}, "console": {{"serial": false}} {more}}}"#,
        kernel.path()
    );
    let mut machine = Controller::new("test".to_owned(), Handed::default(), 1024);
    for request in ConfigFile::parse(config.as_bytes()).unwrap().into_requests() {
        assert_eq!(machine.handle(request).unwrap(), MachineAnswer::Done);
    }
    Some(event_loop::run(machine, None, &Seccomp::default()).unwrap())
}

#[test]
fn the_keyboard_controllers_reset_ends_a_machine_without_devices() {
    // mov al, 0xfe; out 0x64, al; hlt; jmp to hlt
    let status = run(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd]);
    assert!(status.is_none_or(|status| status == exit_status::REBOOT), "{status:?}");
}

#[test]
fn hostile_14_a_triple_fault_is_a_crash() {
    // lidt [0x100010] (limit 0, base 0); ud2
    let status = run(&[0x0f, 0x01, 0x1d, 0x10, 0, 0x10, 0, 0x0f, 0x0b]);
    assert!(status.is_none_or(|status| status == exit_status::GUEST_CRASH), "{status:?}");
}

#[test]
fn hostile_14_ports_that_nobody_owns_read_as_ones() {
    // mov dx, 0x1234; in al, dx; cmp al, 0xff; jne +4; mov al, 0xfe; out 0x64, al; ud2
    let code = [
        0x66, 0xba, 0x34, 0x12, 0xec, 0x3c, 0xff, 0x75, 0x04, 0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb,
        0xfd,
    ];
    let status = run(&code);
    assert!(status.is_none_or(|status| status == exit_status::REBOOT), "{status:?}");
}

#[test]
fn a_machine_that_ends_leaves_a_line_of_what_it_did() {
    let metrics = tempfile::NamedTempFile::new().unwrap();
    let more = format!(r#", "metrics": {{"metrics_path": {:?}}}"#, metrics.path());
    // in al, 0x64; mov al, 0xfe; out 0x64, al; hlt; jmp to hlt
    let code = [0xe4, 0x64, 0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
    let Some(status) = run_with(&code, &more) else { return };
    assert_eq!(status, exit_status::REBOOT);
    let text = std::fs::read_to_string(metrics.path()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (group, name) in [
        ("vcpu", "exit_io_in"),
        ("vcpu", "exit_io_out"),
        ("i8042", "read_count"),
        ("i8042", "write_count"),
        ("i8042", "reset_count"),
    ] {
        assert_eq!(line[group][name], 1, "{group}.{name}");
    }
    assert_eq!(line["vcpu"]["failures"], 0);
    assert!(line["vmm"]["device_events"].as_u64().unwrap() > 0);
}
