//! Packages, modules, the store and the initramfs, on small inputs made here.

use std::io::Write;
use std::path::Path;

use super::modules::{Tree, choose};
use super::*;

/// What guests need, as a distribution builds it.
const NEEDED: [&str; 6] =
    ["virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport", "erofs", "overlay", "ext4"];

/// An ELF file with a PVH note and a banner.
fn vmlinux(version: &str) -> Vec<u8> {
    let mut elf = b"\x7fELF".to_vec();
    elf.resize(64, 0);
    elf.extend_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    elf.extend_from_slice(b"Xen\0\0\0\x10\0");
    elf.extend_from_slice(format!("Linux version {version} (a@b) #1\0").as_bytes());
    elf
}

/// A relocatable ELF file with nothing but a `.modinfo` section.
fn module(depends: &str) -> Vec<u8> {
    let info = format!("license=GPL\0depends={depends}\0name=x\0");
    let names = b"\0.modinfo\0.shstrtab\0";
    let (info_at, names_at) = (64, 64 + info.len());
    let table_at = (names_at + names.len()).next_multiple_of(8);
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend_from_slice(&[1, 0, 62, 0, 1, 0, 0, 0]);
    elf.resize(40, 0);
    elf.extend_from_slice(&(table_at as u64).to_le_bytes());
    elf.extend_from_slice(&[0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 3, 0, 2, 0]);
    assert_eq!(elf.len(), 64);
    elf.extend_from_slice(info.as_bytes());
    elf.extend_from_slice(names);
    elf.resize(table_at, 0);
    for (name, kind, at, size) in
        [(0u32, 0u32, 0, 0), (1, 1, info_at, info.len()), (10, 3, names_at, names.len())]
    {
        elf.extend_from_slice(&name.to_le_bytes());
        elf.extend_from_slice(&kind.to_le_bytes());
        for value in [0, 0, at as u64, size as u64, 0, 1, 0] {
            elf.extend_from_slice(&value.to_le_bytes());
        }
        // Section headers are 64 bytes: sh_link and sh_info share one of the words above.
    }
    elf
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(bytes).unwrap();
    xz.finish().unwrap()
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A tree with everything needed as modules, some of them built in where asked.
fn tree(built_in: &[&str]) -> Tree {
    let mut tree = Tree::default();
    for name in NEEDED.iter().filter(|name| !built_in.contains(name)) {
        tree.add(&format!("{name}.ko"), module(""));
    }
    let list: Vec<_> = built_in.iter().map(|name| format!("kernel/x/{name}.ko\n")).collect();
    tree.add("modules.builtin", list.concat().into_bytes());
    tree
}

fn names(tree: &Tree) -> Vec<String> {
    choose(Path::new("k"), tree).unwrap().into_iter().map(|module| module.file).collect()
}

fn data_tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.into_inner().unwrap()
}

fn package(path: &Path, members: &[(&str, &[u8])]) {
    let mut ar = ar::Builder::new(File::create(path).unwrap());
    for (name, bytes) in members {
        ar.append(&ar::Header::new(name.as_bytes().to_vec(), bytes.len() as u64), *bytes).unwrap();
    }
}

fn left_over(kernels: &Kernels) -> Vec<String> {
    let names = fs::read_dir(&kernels.folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| name.starts_with('.') && name != ".lock");
    names
}

#[test]
fn modules_come_after_what_they_depend_on_and_without_what_is_built_in() {
    let mut with = tree(&["erofs", "overlay"]);
    with.add("virtio_blk.ko.xz", xz(&module("virtio,virtio-ring")));
    with.add("virtio-ring.ko.zst", zst(&module("virtio")));
    with.add("virtio.ko.gz", gzip(&module("")));
    with.add("unwanted.ko", module("virtio"));
    let order = names(&with);
    let at = |name: &str| order.iter().position(|file| file == name);
    assert!(at("virtio.ko") < at("virtio_ring.ko"), "{order:?}");
    assert!(at("virtio_ring.ko") < at("virtio_blk.ko"), "{order:?}");
    assert!(at("virtio.ko").is_some());
    for name in ["erofs.ko", "overlay.ko", "unwanted.ko"] {
        assert_eq!(at(name), None);
    }
    let chosen = choose(Path::new("k"), &with).unwrap();
    assert!(chosen.iter().all(|module| module.bytes.starts_with(b"\x7fELF")));
}

#[test]
fn checksums_are_there_before_what_asks_for_them() {
    let mut with = tree(&[]);
    with.add("erofs.ko", module("libcrc32c"));
    with.add("libcrc32c.ko", module(""));
    with.add("crc32c_generic.ko", module(""));
    let order = names(&with);
    let at = |name: &str| order.iter().position(|file| file == name).unwrap();
    assert!(at("crc32c_generic.ko") < at("libcrc32c.ko"), "{order:?}");
    assert!(at("libcrc32c.ko") < at("erofs.ko"), "{order:?}");
}

#[test]
fn a_kernel_that_lacks_what_guests_need_is_told_which() {
    for missing in NEEDED {
        let mut without = Tree::default();
        for name in NEEDED.iter().filter(|name| **name != missing) {
            without.add(&format!("{name}.ko"), module(""));
        }
        let error = choose(Path::new("k"), &without).err().unwrap();
        assert!(matches!(&error, KernelError::Lacks { what, .. } if what == missing), "{error}");
    }
}

/// docs/hostile.md 22: modules that need each other, are none, or unpack without end.
#[test]
fn hostile_22_module_trees_that_lie_end() {
    let mut round = tree(&[]);
    round.add("ext4.ko", module("a"));
    round.add("a.ko", module("b"));
    round.add("b.ko", module("a,ext4,b,../../etc/passwd,,nowhere"));
    assert_eq!(names(&round).iter().filter(|name| *name == "a.ko").count(), 1);
    let mut deep = tree(&[]);
    deep.add("ext4.ko", module("m0"));
    for number in 0..5000 {
        deep.add(&format!("m{number}.ko"), module(&format!("m{}", number + 1)));
    }
    assert!(names(&deep).len() < 5000);
    let bomb = zst(&vec![0; (64 << 20) + 1]);
    for bytes in [b"".to_vec(), b"not ELF".to_vec(), bomb, xz(&module("x"))[..40].to_vec()] {
        let mut broken = tree(&[]);
        broken.add("ext4.ko", bytes);
        let error = choose(Path::new("k"), &broken).err().unwrap();
        assert!(error.to_string().contains("module ext4"), "{error}");
    }
}

/// docs/hostile.md 22: many modules, each of which is small enough.
#[test]
fn hostile_22_modules_are_bounded_together() {
    let mut many = tree(&[]);
    many.add("ext4.ko", module("m0,m1,m2,m3,m4"));
    for number in 0..5 {
        let mut large = module("");
        large.resize(60 << 20, 0);
        many.add(&format!("m{number}.ko.zst"), zst(&large));
    }
    let error = choose(Path::new("k"), &many).err().unwrap().to_string();
    assert!(error.contains("module m4") && error.contains("more than 256 MiB"), "{error}");
}

#[test]
fn a_package_is_imported_with_its_modules_in_every_packing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.deb");
    let kernel = vmlinux("6.1.0-1-amd64");
    let ko = module("");
    let mut files = vec![("./boot/vmlinuz-6.1.0-1-amd64", kernel.as_slice())];
    let modules: Vec<String> = NEEDED
        .iter()
        .map(|name| format!("./usr/lib/modules/6.1.0-1-amd64/{}/{name}.ko", "d".repeat(120)))
        .collect();
    files.extend(modules.iter().map(|name| (name.as_str(), ko.as_slice())));
    let tar = data_tar(&files);
    for (member, bytes) in [
        ("data.tar", tar.clone()),
        ("data.tar.gz", gzip(&tar)),
        ("data.tar.xz", xz(&tar)),
        ("data.tar.zst", zst(&tar)),
    ] {
        package(&path, &[("debian-binary", b"2.0\n"), ("control.tar.xz", b""), (member, &bytes)]);
        let kernels = Kernels::open(&folder.path().join(member));
        let imported = kernels.import(&path).unwrap();
        assert_eq!(imported.name, "6.1.0-1-amd64");
        assert_eq!(fs::read(&imported.image).unwrap(), kernel);
        let load = fs::read_to_string(imported.modules.unwrap().join("load")).unwrap();
        assert_eq!(load.lines().count(), NEEDED.len());
        assert_eq!(kernels.default_name().as_deref(), Some("6.1.0-1-amd64"));
    }
}

/// docs/hostile.md 22, for packages.
#[test]
fn hostile_22_packages_that_hold_no_kernel_are_refused_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.deb");
    let kernels = Kernels::open(folder.path());
    let good = data_tar(&[("./boot/vmlinuz-6.1", &vmlinux("6.1"))]);
    let mut link = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    link.append_link(&mut header, "boot/vmlinuz-6.1", "/etc/passwd").unwrap();
    let link = link.into_inner().unwrap();
    let mut lies = good.clone();
    lies[124..136].copy_from_slice(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff");
    let nothing = data_tar(&[("./usr/share/doc/x", b"x"), ("./boot/config-6.1", b"x")]);
    let members: [(&str, &[u8]); 8] = [
        ("control.tar", &good),
        ("data.tar", b""),
        ("data.tar", b"garbage"),
        ("data.tar", &good[..700]),
        ("data.tar", &link),
        ("data.tar", &lies),
        ("data.tar.xz", &nothing),
        ("data.tar.zst", &zst(&nothing)),
    ];
    for member in members {
        package(&path, &[member]);
        assert!(kernels.import(&path).is_err(), "{}", member.0);
    }
    for bytes in [&b"!<arch>\n"[..], b"!<arch>\ngarbage garbage garbage", b"", b"x"] {
        fs::write(&path, bytes).unwrap();
        assert!(kernels.import(&path).is_err());
    }
    // Its modules are missing.
    package(&path, &[("data.tar", &good)]);
    assert!(matches!(kernels.import(&path), Err(KernelError::Lacks { .. })));
    assert_eq!(kernels.list().unwrap(), [] as [String; 0]);
    assert!(kernels.default_name().is_none());
}

#[test]
fn an_installed_kernel_brings_its_modules() {
    let host = tempfile::tempdir().unwrap();
    let at = |path: &str| host.path().join(path);
    fs::create_dir_all(at("boot")).unwrap();
    fs::create_dir_all(at("lib/modules/6.1.0-9/kernel/fs")).unwrap();
    fs::write(at("boot/vmlinuz-6.1.0-9"), vmlinux("6.1.0-9")).unwrap();
    fs::write(at("lib/modules/6.1.0-9/modules.builtin"), "kernel/fs/erofs/erofs.ko\n").unwrap();
    for name in NEEDED.iter().filter(|name| **name != "erofs") {
        fs::write(at(&format!("lib/modules/6.1.0-9/kernel/fs/{name}.ko")), module("")).unwrap();
    }
    fs::copy(at("boot/vmlinuz-6.1.0-9"), at("lib/modules/6.1.0-9/vmlinuz")).unwrap();
    std::os::unix::fs::symlink("vmlinuz-6.1.0-9", at("boot/vmlinuz")).unwrap();
    for path in ["boot/vmlinuz-6.1.0-9", "boot/vmlinuz", "lib/modules/6.1.0-9/vmlinuz"] {
        let folder = tempfile::tempdir().unwrap();
        let kernel = Kernels::open(folder.path()).import(&at(path)).unwrap();
        let load = fs::read_to_string(kernel.modules.unwrap().join("load")).unwrap();
        assert_eq!(load.lines().count(), NEEDED.len() - 1, "{path}");
    }
    // It is known to lack one.
    fs::remove_file(at("lib/modules/6.1.0-9/kernel/fs/ext4.ko")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = Kernels::open(folder.path()).import(&at("boot/vmlinuz-6.1.0-9")).unwrap_err();
    assert!(matches!(&error, KernelError::Lacks { what, .. } if what == "ext4"), "{error}");
    // A kernel from elsewhere may have everything built in.
    fs::write(at("vmlinux"), vmlinux("9.9")).unwrap();
    assert!(Kernels::open(folder.path()).import(&at("vmlinux")).unwrap().modules.is_none());
}

#[test]
fn kernels_are_listed_chosen_and_forgotten_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let kernels = Kernels::open(folder.path());
    assert_eq!(kernels.list().unwrap(), [] as [String; 0]);
    let file = folder.path().join("k");
    for version in ["6.2", "6.1"] {
        fs::write(&file, vmlinux(version)).unwrap();
        kernels.import(&file).unwrap();
    }
    assert_eq!(kernels.list().unwrap(), ["6.1", "6.2"]);
    assert_eq!(kernels.default_name().as_deref(), Some("6.2"));
    kernels.set_default("6.1").unwrap();
    assert_eq!(kernels.resolve(Some("6.2")).unwrap().name, "6.2");
    for name in ["", ".", "..", ".lock", "../kernels/6.1", "/etc", "6.3", "6.1/../6.1", "default"] {
        assert!(matches!(kernels.get(name), Err(KernelError::Unknown(_))), "{name}");
        assert!(kernels.set_default(name).is_err() && kernels.remove(name).is_err(), "{name}");
    }
    kernels.remove("6.1").unwrap();
    assert_eq!(kernels.list().unwrap(), ["6.2"]);
    assert_eq!(kernels.default_name(), None);
}

/// docs/hostile.md 23: what is no file is not read.
#[test]
fn hostile_23_devices_pipes_and_folders_are_no_kernels() {
    let folder = tempfile::tempdir().unwrap();
    let kernels = Kernels::open(folder.path());
    let pipe = folder.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [pipe.as_path(), folder.path(), Path::new("/dev/zero")] {
        assert!(matches!(kernels.import(path), Err(KernelError::NotAKernel(_))));
        let path = path.to_str().unwrap();
        assert!(matches!(kernels.resolve(Some(path)), Err(KernelError::NotAKernel(_))), "{path}");
    }
    assert!(matches!(kernels.import(&folder.path().join("no")), Err(KernelError::File { .. })));
}

/// docs/hostile.md 27 and 28.
#[test]
fn hostile_28_imports_at_once_all_succeed_and_leave_one_whole_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("k");
    let kernel = vmlinux("6.1");
    fs::write(&file, &kernel).unwrap();
    let kernels = Kernels::open(folder.path());
    kernels.import(&file).unwrap();
    // One that was killed has left this.
    fs::create_dir(kernels.folder.join(".import-dead")).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    kernels.import(&file).unwrap();
                    // At no time is there none.
                    assert_eq!(kernels.list().unwrap(), ["6.1"]);
                }
            });
        }
    });
    assert_eq!(fs::read(kernels.get("6.1").unwrap().image).unwrap(), kernel);
    assert_eq!(left_over(&kernels), [] as [String; 0]);
}

/// Names, modes and contents in a newc archive.
fn entries(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        let field = |number: usize| {
            let from = at + 6 + number * 8;
            u32::from_str_radix(std::str::from_utf8(&archive[from..from + 8]).unwrap(), 16).unwrap()
        };
        assert_eq!(&archive[at..at + 6], b"070701");
        let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
        let name = std::str::from_utf8(&archive[at + 110..at + 110 + name_size - 1]).unwrap();
        let data = (at + 110 + name_size).next_multiple_of(4);
        if name == "TRAILER!!!" {
            return found;
        }
        found.push((name.to_owned(), mode, archive[data..data + size].to_vec()));
        at = (data + size).next_multiple_of(4);
    }
}

#[test]
fn the_initramfs_holds_init_and_modules_and_is_made_anew_for_another_init() {
    let folder = tempfile::tempdir().unwrap();
    let modules = folder.path().join("modules");
    fs::create_dir(&modules).unwrap();
    fs::write(modules.join("b.ko"), b"bb").unwrap();
    fs::write(modules.join("a.ko"), b"a").unwrap();
    fs::write(modules.join("load"), "b.ko\na.ko\n").unwrap();
    let init = folder.path().join("init");
    fs::write(&init, module("")).unwrap();
    let kernel = Kernel {
        name: "k".to_owned(),
        image: folder.path().join("vmlinux"),
        modules: Some(modules),
        cache: folder.path().join("cache"),
    };
    let path = kernel.initrd(&init).unwrap();
    let found = entries(&fs::read(&path).unwrap());
    let files: Vec<_> = found.iter().map(|(name, mode, _)| (name.as_str(), *mode)).collect();
    assert_eq!(
        files,
        [
            ("dev", 0o40755),
            ("dev/console", 0o20600),
            ("dev/null", 0o20666),
            ("init", 0o100755),
            ("modules", 0o40755),
            ("modules/load", 0o100644),
            ("modules/b.ko", 0o100644),
            ("modules/a.ko", 0o100644)
        ]
    );
    assert_eq!(found[3].2, module(""));
    assert_eq!(found[6].2, b"bb");
    assert_eq!(kernel.initrd(&init).unwrap(), path);
    // Installed by a package: as long as the one before, at a whole second.
    let opened = File::options().write(true).open(&init).unwrap();
    for seconds in [1000, 2000] {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        opened.set_modified(time).unwrap();
        let made = kernel.initrd(&init).unwrap();
        assert!(made.to_str().unwrap().contains(&format!("-{seconds:x}.0.cpio")), "{made:?}");
        // Equal programs make equal archives.
        assert_eq!(fs::read(&made).unwrap(), fs::read(&path).unwrap());
    }
    fs::write(&init, "#!/bin/sh").unwrap();
    assert!(matches!(kernel.initrd(&init), Err(KernelError::Init { .. })));
}
