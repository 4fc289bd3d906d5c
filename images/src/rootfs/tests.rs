use super::*;
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
