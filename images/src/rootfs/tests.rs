use super::*;
use crate::erofs::reader::{self, Found};
use std::io::Write as _;
use std::process::Command;

type Entry<'a> = (EntryType, &'a str, &'a str);

fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        let regular = *kind == EntryType::Regular;
        if !regular {
            header.set_link_name_literal(content).unwrap();
        }
        header.set_size(if regular { content.len() as u64 } else { 0 });
        header.set_cksum();
        let data = if regular { content.as_bytes() } else { b"" };
        builder.append(&header, data).unwrap();
    }
    builder.into_inner().unwrap()
}

fn convert_all(layers: &[Vec<u8>]) -> Result<tempfile::NamedTempFile, ConvertError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut streams: Vec<LayerStream> = layers
        .iter()
        .enumerate()
        .map(|(i, l)| LayerStream {
            digest: format!("l{i}"),
            reader: Box::new(io::Cursor::new(l.clone())),
        })
        .collect();
    convert(&mut streams, file.reopen().unwrap(), &Limits::default())?;
    Ok(file)
}

/// Every path below the root with a file's bytes or a symlink's target, by erofs-utils.
fn read_back(image: &tempfile::NamedTempFile) -> BTreeMap<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("x");
    let run = Command::new("fsck.erofs")
        .arg(format!("--extract={}", out.display()))
        .arg(image.path())
        .output()
        .expect("this test needs fsck.erofs of Debian's erofs-utils");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let (mut found, mut todo) = (BTreeMap::new(), vec![out.clone()]);
    while let Some(dir) = todo.pop() {
        for item in std::fs::read_dir(dir).unwrap() {
            let path = item.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let value = if meta.is_dir() {
                todo.push(path.clone());
                "DIR".into()
            } else if meta.is_symlink() {
                std::fs::read_link(&path).unwrap().display().to_string()
            } else {
                std::fs::read_to_string(&path).unwrap()
            };
            found.insert(path.strip_prefix(&out).unwrap().display().to_string(), value);
        }
    }
    found
}

fn refused(layers: &[&[Entry]]) -> String {
    let layers: Vec<_> = layers.iter().map(|l| tar(l)).collect();
    convert_all(&layers).unwrap_err().to_string()
}

fn accepted(layers: &[&[Entry]]) -> String {
    let layers: Vec<_> = layers.iter().map(|l| tar(l)).collect();
    let all = read_back(&convert_all(&layers).unwrap());
    all.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" ")
}

const F: EntryType = EntryType::Regular;
const D: EntryType = EntryType::Directory;
const L: EntryType = EntryType::Link;
const S: EntryType = EntryType::Symlink;

#[test]
fn hostile_16_names() {
    assert!(refused(&[&[(F, "a/../../b", "")]]).contains("\"a/../../b\": the name contains `..`"));
    assert!(refused(&[&[(F, "", "")]]).contains("empty"));
    assert_eq!(accepted(&[&[(F, "/etc/x", "1"), (F, "./y", "2")]]), "etc=DIR etc/x=1 y=2");
    // Through a symlink of an earlier layer: inside the root, never out of it.
    let lower: &[Entry] = &[(S, "up", "../../../tmp"), (S, "loop", "loop"), (F, "f", "")];
    assert_eq!(
        accepted(&[lower, &[(F, "up/x", "1")]]),
        "f= loop=loop tmp=DIR tmp/x=1 up=../../../tmp"
    );
    assert!(refused(&[lower, &[(F, "loop/x", "1")]]).contains("symlinks"));
    assert!(refused(&[lower, &[(F, "f/x", "1")]]).contains("not a directory"));
}

#[test]
fn hostile_16_links_and_replacements() {
    assert!(refused(&[&[(L, "a", "../x")]]).contains("`..`"));
    assert!(refused(&[&[(L, "a", "b"), (F, "b", "")]]).contains("no earlier entry"));
    assert!(refused(&[&[(D, "d", ""), (L, "a", "d")]]).contains("directory"));
    assert!(refused(&[&[(F, "a", ""), (L, "a", "a")]]).contains("itself"));
    assert_eq!(accepted(&[&[(F, "a", "1")], &[(L, "b", "a")]]), "a=1 b=1");
    assert_eq!(accepted(&[&[(F, "d/x", "1")], &[(S, "d", "/e")]]), "d=/e");
    assert_eq!(accepted(&[&[(S, "d", "/e")], &[(D, "d", "")]]), "d=DIR");
}

#[test]
fn hostile_17_whiteouts() {
    assert_eq!(accepted(&[&[(F, "a", "1")], &[(F, ".wh.b", ""), (F, ".wh.a", "")]]), "");
    assert!(refused(&[&[(F, ".wh.", "")]]).contains("whiteout"));
    assert!(refused(&[&[(F, ".wh...", "")]]).contains("whiteout"));
    assert_eq!(accepted(&[&[(F, "a", "1")], &[(F, "b", "2"), (F, ".wh..wh..opq", "")]]), "b=2");
    assert_eq!(accepted(&[&[(F, "a", "1")], &[(F, "a", "2"), (F, ".wh.a", "")]]), "a=2");
    assert_eq!(accepted(&[&[(F, "a", "1")], &[(F, ".wh.a", ""), (F, "a", "2")]]), "a=2");
}

#[test]
fn hostile_17_a_whiteout_hides_a_name_and_not_what_it_leads_to() {
    // The lower layer's name goes, the link to the same file that this layer brings stays.
    let lower: &[Entry] = &[(F, "d/a", "1"), (F, "d/c", "2")];
    assert_eq!(accepted(&[lower, &[(L, "b", "d/a"), (F, "d/.wh.a", "")]]), "b=1 d=DIR d/c=2");
    // A link's target is no name of this layer, and neither are the directories above it.
    assert_eq!(accepted(&[lower, &[(L, "b", "d/a"), (F, ".wh.d", "")]]), "b=1");
    assert_eq!(accepted(&[lower, &[(L, "b", "d/a"), (F, ".wh..wh..opq", "")]]), "b=1");
    // What was a link below is a name like any other.
    let linked: &[Entry] = &[(F, "a", "1"), (L, "b", "a")];
    assert_eq!(accepted(&[linked, &[(F, ".wh.a", ""), (F, ".wh.b", "")]]), "");
    // A directory that this layer mentions stays, and loses what the lower one had in it.
    assert_eq!(accepted(&[lower, &[(D, "d", ""), (F, ".wh.d", "")]]), "d=DIR");
    assert_eq!(accepted(&[lower, &[(F, "d/n", "3"), (F, ".wh.d", "")]]), "d=DIR d/n=3");
}

/// One file with PAX records in front of it.
fn with_records(records: &[(&str, &[u8])], name: &str, data: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        write!(body, "{length} {key}=").unwrap();
        body.extend_from_slice(value);
        body.push(b'\n');
    }
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, data) in [(EntryType::XHeader, "x", body.as_slice()), (F, name, data)] {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn hostile_18_values_may_contain_what_looks_like_records() {
    // The empty numeric fields of these headers are zeroes.
    let forged = b"\x01\n16 path=forged\n9 size=0\n";
    let layer = with_records(&[("SCHILY.xattr.user.x", forged)], "real", b"data");
    let image = convert_all(&[layer]).unwrap();
    assert_eq!(read_back(&image), BTreeMap::from([("real".to_owned(), "data".to_owned())]));
    let bytes = std::fs::read(image.path()).unwrap();
    assert!(bytes.windows(forged.len()).any(|window| window == forged), "the value is lost");
    let layer = with_records(&[("SCHILY.xattr.user.x", forged), ("path", b"long")], "s", b"data");
    assert_eq!(read_back(&convert_all(&[layer]).unwrap()).keys().next().unwrap(), "long");
    // The crate misses a size behind such a value.
    let layer = with_records(&[("SCHILY.xattr.user.x", b"\n"), ("size", b"2")], "a", b"data");
    assert!(convert_all(&[layer]).unwrap_err().to_string().contains("\"a\": its PAX size"));
}

#[test]
fn sparse_files_are_read_as_gnu_tar_writes_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = File::create(folder.path().join("holes")).unwrap();
    file.set_len(8 << 20).unwrap();
    for at in (0..8u64 << 20).step_by(1 << 20) {
        std::os::unix::fs::FileExt::write_all_at(&file, at.to_string().as_bytes(), at + 4096)
            .unwrap();
    }
    let wanted = std::fs::read_to_string(folder.path().join("holes")).unwrap();
    for format in ["gnu", "0.0", "0.1", "1.0"] {
        let mut command = Command::new("tar");
        command.arg("-C").arg(folder.path()).args(["--sparse", "-cf", "-"]);
        match format {
            "gnu" => command.arg("--format=gnu"),
            version => command.args(["--format=pax", &format!("--sparse-version={version}")]),
        };
        let layer = command.arg("holes").output().unwrap().stdout;
        assert!(layer.len() < 1 << 20, "{format}: not sparse");
        let image = convert_all(&[layer]).unwrap();
        let found = read_back(&image);
        assert!(found.len() == 1 && found["holes"] == wanted, "{format}");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&image.path().metadata().unwrap());
        assert!(blocks * 512 < 2 << 20, "{format}: {blocks} blocks");
    }
    let lying =
        with_records(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,5")], "a", b"1234");
    assert!(convert_all(&[lying]).unwrap_err().to_string().contains("\"a\": its sparse map"));
}

fn within(layers: &[Vec<u8>], limits: &Limits) -> Result<BTreeMap<Vec<u8>, Found>, String> {
    let file = tempfile::tempfile().unwrap();
    let stream = |layer: &Vec<u8>| LayerStream {
        digest: "l".to_owned(),
        reader: Box::new(io::Cursor::new(layer.clone())),
    };
    let mut streams: Vec<LayerStream> = layers.iter().map(stream).collect();
    convert(&mut streams, file.try_clone().unwrap(), limits).map_err(|error| error.to_string())?;
    Ok(reader::read(&file).unwrap())
}

/// docs/hostile.md 18: everything that an image may have much of has a bound, and below it is kept.
#[test]
fn hostile_18_names_depths_and_counts_are_bounded() {
    let limits = Limits::default();
    let file = |name: &str| with_records(&[("path", name.as_bytes())], "x", b"");
    let name = "n".repeat(255);
    assert!(within(&[file(&name)], &limits).unwrap().contains_key(name.as_bytes()));
    let error = within(&[file(&"n".repeat(256))], &limits).unwrap_err();
    assert!(error.contains("longer than 255 bytes"), "{error}");
    // A tree of 300 levels, a path of 4096 bytes, and one more of each.
    assert_eq!(within(&[file(&"d/".repeat(299))], &limits).unwrap().len(), 300);
    let path = [name.as_str(); 16].join("/");
    assert_eq!(within(&[file(&format!("{path}/"))], &limits).unwrap().len(), 17);
    let error = within(&[file(&format!("{path}/n"))], &limits).unwrap_err();
    assert!(error.contains("more than 4096 bytes in a path"), "{error}");
    let error = within(&[file(&"d/".repeat(1030))], &limits).unwrap_err();
    assert!(error.contains("more than 1024 levels"), "{error}");

    let many = |count: usize| {
        let names: Vec<String> = (0..count).map(|number| format!("{number}")).collect();
        tar(&names.iter().map(|name| (F, name.as_str(), "x")).collect::<Vec<_>>())
    };
    let few = Limits { entries: 20, ..Limits::default() };
    assert_eq!(within(&[many(20)], &few).unwrap().len(), 21);
    // All layers count, and what a layer hides.
    for layers in [vec![many(21)], vec![many(11), many(10)]] {
        let error = within(&layers, &few).unwrap_err();
        assert!(error.contains("more than 20 entries"), "{error}");
    }
    let little = Limits { bytes: 19, ..Limits::default() };
    let error = within(&[many(20)], &little).unwrap_err();
    assert!(error.contains("more than 19 bytes of file data"), "{error}");
}

/// docs/hostile.md 18, 19: a small layer that makes much of itself: directories that no entry names,
/// names and attributes that are kept in memory, whiteouts that look at everything again.
#[test]
fn hostile_18_what_entries_cost_is_bounded() {
    let limits = Limits { entries: 20, ..Limits::default() };
    let path = |top: usize| format!("{top}/{}", "d/".repeat(30));
    let deep = |count: usize| {
        let paths: Vec<String> = (0..count).map(path).collect();
        tar(&paths.iter().map(|path| (D, path.as_str(), "")).collect::<Vec<_>>())
    };
    assert_eq!(within(&[deep(1)], &limits).unwrap().len(), 32);
    assert!(within(&[deep(2)], &limits).unwrap_err().contains("more than 20 entries"));

    let limits = Limits { names: 1000, ..Limits::default() };
    let long = "t".repeat(90);
    let links: Vec<String> = (0..12).map(|number| format!("s{number}")).collect();
    let links: Vec<Entry> = links.iter().map(|name| (S, name.as_str(), long.as_str())).collect();
    assert!(within(&[tar(&links[..10])], &limits).is_ok());
    assert!(within(&[tar(&links)], &limits).unwrap_err().contains("bytes of names"));
    let value = vec![b'v'; 900];
    let attribute = |name| with_records(&[("SCHILY.xattr.user.a", &value)], name, b"");
    assert!(within(&[attribute("a")], &limits).is_ok());
    let error = within(&[attribute("a"), attribute("a")], &limits).unwrap_err();
    assert!(error.contains("bytes of names and attributes"), "{error}");

    let limits = Limits { steps: 1000, ..Limits::default() };
    let mut entries: Vec<Entry> = vec![(F, "a", ""); 50];
    entries.extend(vec![(F, ".wh..wh..opq", ""); 50]);
    assert!(within(&[tar(&entries)], &limits).is_ok());
    let names: Vec<String> = (0..50).map(|number| format!("{number}")).collect();
    let mut entries: Vec<Entry> = names.iter().map(|name| (F, name.as_str(), "")).collect();
    entries.extend(vec![(F, ".wh..wh..opq", ""); 50]);
    assert!(within(&[tar(&entries)], &limits).unwrap_err().contains("more than 1000 steps"));
}

/// docs/hostile.md 18: what only the guest's own kernel makes something of.
#[test]
fn hostile_18_what_is_the_guests_own_is_kept_as_it_is() {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, mode) in [
        (EntryType::Char, "char", 0o666),
        (EntryType::Block, "block", 0o7777),
        (EntryType::Fifo, "fifo", 0o600),
        (F, "setuid", 0o6755),
    ] {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(0);
        header.set_device_major(0xfff).unwrap();
        header.set_device_minor(0xf_ffff).unwrap();
        header.set_cksum();
        builder.append(&header, io::empty()).unwrap();
    }
    let layer = builder.into_inner().unwrap();
    let found = within(&[layer], &Limits::default()).unwrap();
    let get = |name: &str| &found[name.as_bytes()];
    assert_eq!((get("char").mode, get("char").device), (0o020_666, Some((0xfff, 0xf_ffff))));
    assert_eq!((get("block").mode, get("block").device), (0o067_777, Some((0xfff, 0xf_ffff))));
    assert_eq!(get("fifo").mode, 0o010_600);
    assert_eq!(get("setuid").mode, 0o106_755);

    let records = [
        ("uid", b"4294967295".as_slice()),
        ("gid", b"4294967295"),
        ("mtime", b"-9223372036854775807.5"),
        ("SCHILY.xattr.user.a", &[b'v'; 65_535]),
    ];
    let found = within(&[with_records(&records, "a", b"")], &Limits::default()).unwrap();
    let a = &found[b"a".as_slice()];
    assert_eq!((a.uid, a.gid, a.mtime, a.mtime_nsec), (u32::MAX, u32::MAX, i64::MIN, 500_000_000));
    assert_eq!(a.xattrs, [(1, b"a".to_vec(), vec![b'v'; 65_535])]);
    for (key, value) in [
        ("uid", b"4294967296".as_slice()),
        ("uid", b"-1"),
        ("gid", b"x"),
        ("mtime", b"9223372036854775808"),
        ("SCHILY.xattr.user.a", &[b'v'; 65_536]),
        ("SCHILY.xattr.other.a", b"v"),
    ] {
        let result = within(&[with_records(&[(key, value)], "a", b"")], &Limits::default());
        assert!(result.is_err(), "{key}");
    }
    let attributes: Vec<String> = (0..3).map(|n| format!("SCHILY.xattr.user.{n}")).collect();
    let records: Vec<(&str, &[u8])> =
        attributes.iter().map(|key| (key.as_str(), [b'v'; 60_000].as_slice())).collect();
    let error = within(&[with_records(&records, "a", b"")], &Limits::default()).unwrap_err();
    assert!(error.contains("bytes of extended attributes"), "{error}");
}

#[test]
fn hostile_18_times() {
    assert_eq!(pax_time(b"-1.5"), Some((-2, 500_000_000)));
    assert_eq!(pax_time(b"1.0000000019"), Some((1, 1)));
    assert_eq!(pax_time(b"99999999999999999999"), None);
    assert_eq!(pax_time(b""), None);
}

#[test]
fn hostile_19_truncated_and_trailing() {
    let mut layer = tar(&[(F, "a", "123")]);
    let short = layer[..514].to_vec();
    assert!(convert_all(&[short]).unwrap_err().to_string().contains("\"a\""));
    layer.write_all(b"trailing garbage").unwrap();
    assert_eq!(read_back(&convert_all(&[layer]).unwrap()).len(), 1);
}

#[test]
fn equal_layers_give_equal_bytes() {
    let layer = tar(&[(F, "d/a", "1"), (S, "s", "t")]);
    let read = || std::fs::read(convert_all(std::slice::from_ref(&layer)).unwrap().path()).unwrap();
    assert_eq!(read(), read());
}

#[test]
fn a_directory_of_many_blocks() {
    let names: Vec<String> =
        (0..3000).map(|i| format!("name-{i}-{}", "x".repeat(i % 60))).collect();
    let entries: Vec<Entry> = names.iter().map(|n| (F, n.as_str(), "")).collect();
    assert_eq!(read_back(&convert_all(&[tar(&entries)]).unwrap()).len(), 3000);
}
