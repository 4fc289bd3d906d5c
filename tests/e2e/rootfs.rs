//! The root device beside the same image unpacked by umoci, entry by entry, as the kernel shows both.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::{Running, Session, run};

/// All that a tree has, a line for each entry.
fn entries(root: &Path) -> BTreeMap<PathBuf, String> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(path) = todo.pop() {
        let meta = path.symlink_metadata().unwrap();
        let mut line = format!(
            "{:o} {}:{} {}.{:09}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec()
        );
        let kind = meta.file_type();
        if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            line += &format!(" links {} size {}", meta.nlink(), meta.len());
        }
        if kind.is_symlink() {
            line += &format!(" -> {:?}", fs::read_link(&path).unwrap());
        } else if kind.is_file() {
            line += &format!(" content {:x}", content(&path));
        } else if !kind.is_dir() {
            line += &format!(" device {:x}", meta.rdev());
        }
        line += &attributes(&path);
        found.insert(path.strip_prefix(root).unwrap().to_owned(), line);
    }
    // The time of the root itself is nobody's: few layers have an entry for it.
    let top = found.get_mut(Path::new("")).unwrap();
    *top = top.split(' ').take(2).collect::<Vec<_>>().join(" ");
    found
}

fn content(path: &Path) -> u64 {
    let (mut file, mut hasher) = (File::open(path).unwrap(), DefaultHasher::new());
    let mut buffer = vec![0; 1 << 20];
    while let count @ 1.. = file.read(&mut buffer).unwrap() {
        hasher.write(&buffer[..count]);
    }
    hasher.finish()
}

fn attributes(path: &Path) -> String {
    let mut names = vec![0; 64 << 10];
    let count = rustix::fs::llistxattr(path, &mut names).unwrap();
    let mut names: Vec<_> = names[..count].split(|byte| *byte == 0).collect();
    names.sort_unstable();
    let mut text = String::new();
    for name in names.into_iter().filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let count = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        text += &format!(" {}={:?}", String::from_utf8_lossy(name), &value[..count]);
    }
    text
}

/// Unpacks an image of an OCI layout with umoci, pulls it with vmrun, mounts vmrun's device, and
/// compares; the number of entries.
fn compare(layout: &Path, tag: &str) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let source = format!("{}:{tag}", layout.display());
    run("umoci", &["unpack", "--image", &source, &path("bundle")]);
    let session = Session::empty();
    session.vmrun(["image", "pull", "-q", &format!("oci:{source}")]).exits(0);
    let devices = fs::read_dir(session.root().join("images/erofs")).unwrap();
    let devices: Vec<_> = devices.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(devices.len(), 1, "{devices:?}");
    run("fsck.erofs", &[devices[0].to_str().unwrap()]);
    fs::create_dir(path("mounted")).unwrap();
    let device = devices[0].to_str().unwrap();
    run("mount", &["-t", "erofs", "-o", "loop,ro", device, &path("mounted")]);
    let ours = entries(&folder.path().join("mounted"));
    run("umount", &[&path("mounted")]);
    let umocis = entries(&folder.path().join("bundle/rootfs"));
    for (name, entry) in &umocis {
        assert_eq!(ours.get(name), Some(entry), "{}", name.display());
    }
    let more: Vec<_> = ours.keys().filter(|name| !umocis.contains_key(*name)).collect();
    assert!(more.is_empty(), "umoci has not: {more:?}");
    ours.len()
}

fn compare_archive(image: &str) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let layout = folder.path().join("layout");
    let policy = e2e::images::assets().join("policy.json");
    let from = format!("oci-archive:{}", e2e::images::archive(image).display());
    let to = format!("oci:{}:x", layout.display());
    run("skopeo", &["--policy", policy.to_str().unwrap(), "copy", "--quiet", &from, &to]);
    compare(&layout, "x")
}

#[test]
fn a_distribution_is_what_umoci_unpacks() {
    let count = compare_archive("debian");
    assert!(count > 3000, "{count}");
}

#[test]
fn layers_on_layers_are_what_umoci_unpacks() {
    compare_archive("layers");
}

#[test]
fn strange_files_are_what_umoci_unpacks() {
    let folder = tempfile::tempdir().unwrap();
    let (layout, tree) = (folder.path().join("layout"), folder.path().join("tree"));
    let text = |path: &Path| path.display().to_string();
    let image = format!("{}:x", layout.display());
    run("umoci", &["init", "--layout", &text(&layout)]);
    run("umoci", &["new", "--image", &image]);
    let add = |format: &[&str]| {
        let tar = folder.path().join("layer.tar");
        let mut command = Command::new("tar");
        command.arg("--numeric-owner");
        command.args(format).arg("-cf").arg(&tar).arg("-C").arg(&tree).arg(".");
        Running::start(&mut command).finish().exits(0);
        run("umoci", &["raw", "add-layer", "--image", &image, &text(&tar)]);
        fs::remove_dir_all(&tree).unwrap();
    };

    strange_tree(&tree);
    add(&["--format=pax", "--sparse", "--xattrs", "--xattrs-include=*"]);
    // Over it: whiteouts, an opaque directory, and kinds that change.
    for name in ["d/.wh.gone", "opaque/.wh..wh..opq", "opaque/new", ".wh.hard-a", "becomes-file"] {
        let path = tree.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
    fs::create_dir_all(tree.join("becomes-dir/in")).unwrap();
    symlink("d", tree.join("fifo")).unwrap();
    add(&["--format=gnu"]);
    // The same as GNU's own format has it; its sparse files umoci does not know.
    strange_tree(&tree);
    fs::rename(&tree, folder.path().join("again")).unwrap();
    fs::create_dir(&tree).unwrap();
    fs::rename(folder.path().join("again"), tree.join("again")).unwrap();
    add(&["--format=gnu"]);
    let count = compare(&layout, "x");
    assert!(count > 600, "{count}");
}

fn strange_tree(tree: &Path) {
    let at = |name: &str| tree.join(name);
    let touch = |name: &str, time: &str| {
        run("touch", &["-h", "-d", time, at(name).to_str().unwrap()]);
    };
    for name in ["d", "opaque", "becomes-file", "many"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    fs::set_permissions(at("d"), fs::Permissions::from_mode(0o2775)).unwrap();
    for name in
        ["d/gone", "opaque/old", "becomes-dir", "becomes-file/below", "empty", "cap", "hard-a"]
    {
        fs::write(at(name), name).unwrap();
    }
    fs::write(at("empty"), "").unwrap();
    for index in 0..300 {
        fs::write(at(&format!("many/{index}-{}", "n".repeat(index % 240))), [index as u8]).unwrap();
    }
    fs::hard_link(at("hard-a"), at("d/hard-b")).unwrap();
    symlink("hard-a", at("link")).unwrap();
    symlink(format!("/{}", "t/".repeat(1500)), at("long-link")).unwrap();
    let deep = format!("{}{}", "level/".repeat(40), "x".repeat(255));
    fs::create_dir_all(at(&deep).parent().unwrap()).unwrap();
    fs::write(at(&deep), "deep").unwrap();
    fs::write(at("name with spaces\nand a line \u{e9}\u{7f}"), "odd").unwrap();
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    sparse.write_all_at(b"middle", 1 << 20).unwrap();
    File::create(at("hole")).unwrap().set_len(1 << 20).unwrap();
    let path = |name: &str| at(name).display().to_string();
    run("mkfifo", &["-m", "640", &path("fifo")]);
    run("mknod", &["-m", "666", &path("char"), "c", "1", "3"]);
    run("mknod", &["-m", "600", &path("block"), "b", "259", "70000"]);
    fs::set_permissions(at("cap"), fs::Permissions::from_mode(0o4755)).unwrap();
    std::os::unix::fs::lchown(at("cap"), Some(70_000), Some(u32::MAX - 1)).unwrap();
    // The value has a line feed: bits 1 and 3.
    run("setcap", &["cap_dac_override,cap_fowner=ep", &path("cap")]);
    let none = rustix::fs::XattrFlags::empty();
    rustix::fs::lsetxattr(at("d"), "trusted.note", b"\n15 path=forged\n", none).unwrap();
    touch("empty", "1950-01-02 03:04:05.6 UTC");
    touch("hard-a", "2100-01-01 00:00:00.123456789 UTC");
    touch("link", "2001-02-03 04:05:06 UTC");
}
