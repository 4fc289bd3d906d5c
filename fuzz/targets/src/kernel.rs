//! Kernels that a user imports: bzImages and Debian packages.

use std::fs;
use std::io::Write;
use std::sync::Arc;

use arch::GuestMemory;
use arch::boot::load_kernel;
use engine::kernel::Kernels;
use tempfile::TempDir;
use vm_memory::{FileOffset, GuestAddress};

use crate::images::with_checksums;
use crate::memory_file;

const MEMORY: u64 = 8 << 20;

thread_local! {
    static FOLDER: TempDir = {
        let memory = std::path::Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        TempDir::new_in(place).unwrap()
    };
}

/// A byte for what the rest is: a file as it is, the payload of a bzImage, a package's `data.tar`
/// (checksums made to fit), or the same of a package in which the kernel is one. What is imported is
/// listed, boots or is refused, and has the modules that it says.
pub fn kernel_import(input: &[u8]) {
    let Some((kind, rest)) = input.split_first() else { return };
    let file = match kind % 4 {
        0 => rest.to_vec(),
        1 => bzimage(rest),
        _ => package(&with_checksums(rest)),
    };
    FOLDER.with(|folder| {
        let (path, root) = (folder.path().join("kernel"), folder.path().join("root"));
        fs::write(&path, file).unwrap();
        let _ = fs::remove_dir_all(&root);
        let kernels = Kernels::open(&root);
        let imported = kernels.import(&path);
        let Ok(kernel) = imported else {
            assert_eq!(kernels.list().unwrap(), [] as [String; 0]);
            return;
        };
        assert_eq!(kernels.list().unwrap(), std::slice::from_ref(&kernel.name));
        assert_eq!(kernels.get(&kernel.name).unwrap(), kernel);
        assert!(kernel.image.starts_with(root.join("kernels")));
        let modules = kernel.image.with_file_name("modules");
        let order = fs::read_to_string(modules.join("load")).unwrap_or_default();
        for module in order.lines() {
            assert!(modules.join(module).is_file(), "{module:?}");
        }
        let backing = Arc::new(memory_file());
        backing.set_len(MEMORY).unwrap();
        let region = (GuestAddress(0), MEMORY as usize, Some(FileOffset::from_arc(backing, 0)));
        let memory = GuestMemory::from_ranges_with_files([region]).unwrap();
        let mut image = memory_file();
        image.write_all(&fs::read(&kernel.image).unwrap()).unwrap();
        let _ = load_kernel(&memory, &mut image);
    });
}

/// A bzImage of version 6.1 with this payload, and the size at its end that a byte in front says is
/// right or not.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    image[0x300..0x304].copy_from_slice(b"6.1 ");
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image.extend_from_slice(payload);
    image
}

/// A Debian package with this `data.tar`.
fn package(data: &[u8]) -> Vec<u8> {
    let mut package = b"!<arch>\n".to_vec();
    for (name, content) in [("debian-binary", b"2.0\n".as_slice()), ("data.tar", data)] {
        let length = content.len();
        package.extend(
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{length:<10}`\n", 0, 0, 0, "100644").bytes(),
        );
        package.extend_from_slice(content);
        package.resize(package.len().next_multiple_of(2), b'\n');
    }
    package
}
