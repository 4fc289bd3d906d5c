use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::document::Compression;
use crate::testing::{Made, gzip, noise, shown, tar, tar_of, zstd};
use crate::{Error, Image, PullOptions, SaveFormat, Silent, Source, Store};

struct Place {
    folder: TempDir,
    store: Store,
}

fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    Place { folder, store }
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn pull(&self, source: &str) -> Result<Image, Error> {
        let source: Source = source.parse().unwrap();
        self.store.pull(&source, &PullOptions::default(), &Silent)
    }

    fn docker(&self, bytes: &[u8]) -> Result<Image, Error> {
        let path = self.file("archive.tar", bytes);
        self.pull(&format!("docker-archive:{}", path.display()))
    }

    /// The error of a spoilt archive; it names the file.
    fn refused(&self, bytes: &[u8]) -> String {
        let text = shown(self.docker(bytes));
        assert!(text.contains("archive.tar"), "{text}");
        assert_eq!(self.store.list().unwrap(), []);
        text
    }
}

fn names(image: &Image) -> Vec<String> {
    image.names.iter().map(ToString::to_string).collect()
}

#[test]
fn an_oci_layout_is_pulled_with_its_name() {
    let place = place();
    let made = Made::two();
    let layout = place.path("layout");
    made.layout(&layout, "example.org/app:1");
    let image = place.pull(&format!("oci:{}", layout.display())).unwrap();
    assert_eq!(names(&image), ["example.org/app:1"]);
    assert_eq!(image.id(), made.id());
    assert_eq!(image.layers.len(), 2);
    let device = place.store.root_device(&image, &Silent).unwrap();
    assert!(fs::metadata(&device).unwrap().permissions().readonly());
    // A mere tag gets a name from the folder's.
    Made::small("x").layout(&place.path("App.dir"), "v2");
    let image = place.pull(&format!("oci:{}:v2", place.path("App.dir").display())).unwrap();
    assert_eq!(names(&image), ["localhost/app:v2"]);
}

#[test]
fn several_images_need_a_choice() {
    let place = place();
    let layout = place.path("layout");
    Made::small("one").layout(&layout, "example.org/a:1");
    Made::small("two").layout(&layout, "example.org/b:1");
    let source = format!("oci:{}", layout.display());
    assert!(shown(place.pull(&source)).contains("example.org/a:1; example.org/b:1"));
    assert!(shown(place.pull(&format!("{source}:c"))).contains("no image c"));
    assert!(shown(place.pull(&format!("{source}:@2"))).contains("no image @2"));
    let chosen = [format!("{source}:example.org/b:1"), format!("{source}:@1")];
    for source in chosen {
        assert_eq!(place.pull(&source).unwrap().id(), Made::small("two").id());
    }
    let all = place.store.load(&layout, &Silent).unwrap();
    assert_eq!(all.len(), 2);
}

#[test]
fn an_index_in_a_layout_leads_to_this_platform() {
    let place = place();
    let layout = place.path("layout");
    let made = Made::small("amd64");
    made.layout(&layout, "unused:1");
    let manifest = made.manifest_bytes();
    let digest = crate::Digest::of(&manifest);
    let index = json!({"schemaVersion": 2, "manifests": [
        {"mediaType": crate::document::OCI_MANIFEST, "digest": crate::Digest::of(b"arm"), "size": 3,
         "platform": {"os": "linux", "architecture": "arm64"}},
        {"mediaType": crate::document::OCI_MANIFEST, "digest": digest, "size": manifest.len(),
         "platform": {"os": "linux", "architecture": "amd64"}},
    ]});
    let bytes = serde_json::to_vec(&index).unwrap();
    let digest = crate::Digest::of(&bytes);
    fs::write(layout.join("blobs/sha256").join(digest.hex()), &bytes).unwrap();
    let top = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": crate::document::OCI_INDEX, "digest": digest, "size": bytes.len(),
        "annotations": {"org.opencontainers.image.ref.name": "h.x/multi:1"}}]});
    fs::write(layout.join("index.json"), serde_json::to_vec(&top).unwrap()).unwrap();
    let image = place.pull(&format!("oci:{}", layout.display())).unwrap();
    assert_eq!((image.id(), names(&image)), (made.id(), vec!["h.x/multi:1".to_owned()]));
}

#[test]
fn docker_archives_are_pulled_packed_or_not() {
    let made = Made::two();
    let archive = tar_of(&made.docker(&["app:1", "h.x/app:2"]));
    for bytes in [archive.clone(), gzip(&archive), zstd(&archive)] {
        let place = place();
        let image = place.docker(&bytes).unwrap();
        assert_eq!(
            (image.id(), names(&image)),
            (made.id(), vec!["app:1".into(), "h.x/app:2".into()])
        );
        place.store.root_device(&image, &Silent).unwrap();
        assert_eq!(fs::read_dir(place.store.root().join("tmp")).unwrap().count(), 0);
    }
    let place = place();
    let path = place.file("a.tar", &archive);
    let source = format!("docker-archive:{}", path.display());
    let image = place.pull(&format!("{source}:h.x/app:2")).unwrap();
    assert_eq!(names(&image), ["h.x/app:2"]);
    assert!(shown(place.pull(&format!("{source}:app:3"))).contains("it has: app:1, h.x/app:2"));
    let mut stream = archive.as_slice();
    assert_eq!(place.store.load_stream(&mut stream, &Silent).unwrap().len(), 1);
}

#[test]
fn links_in_old_docker_archives_are_followed() {
    let made = Made::small("x");
    let mut files = made.docker(&["app:1"]);
    let (_, layer) = files.pop().unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files.iter().chain([&("other/layer.tar".to_owned(), layer)]) {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, name, content.as_slice()).unwrap();
    }
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    tar.append_link(&mut header, "0/layer.tar", "../other/layer.tar").unwrap();
    let place = place();
    assert_eq!(place.docker(&tar.into_inner().unwrap()).unwrap().id(), made.id());
}

#[test]
fn what_is_saved_can_be_loaded() {
    let from = place();
    from.docker(&tar_of(&Made::two().docker(&["app:1", "h.x/app:2"]))).unwrap();
    from.docker(&tar_of(&Made::small("s").docker(&["small"]))).unwrap();
    for format in [SaveFormat::DockerArchive, SaveFormat::OciArchive] {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        from.store.save(&["app:1", "h.x/app:2", "small"], format, &mut first).unwrap();
        from.store.save(&["app:1", "h.x/app:2", "small"], format, &mut second).unwrap();
        assert_eq!(first, second);
        let to = place();
        let path = to.file("saved.tar", &first);
        to.store.load(&path, &Silent).unwrap();
        assert_eq!(to.store.list().unwrap(), from.store.list().unwrap());
        let oci = to.pull(&format!("oci-archive:{}:h.x/app:2", path.display()));
        assert_eq!(oci.unwrap().id(), Made::two().id());
        let docker = to.pull(&format!("docker-archive:{}:small", path.display()));
        assert_eq!(docker.is_ok(), format == SaveFormat::DockerArchive);
    }
    assert!(
        shown(from.store.save(&["none"], SaveFormat::default(), &mut Vec::new())).contains("none")
    );
}

#[test]
fn what_is_not_an_image_is_told() {
    let place = place();
    for (bytes, part) in [
        (b"this is not a tar".as_slice(), "not a tar archive"),
        (b"\x1b[2J\nno tar, but a terminal's codes".as_slice(), "not a tar archive"),
        (&[b"x\x1b[2J\n".repeat(100).as_slice(), &[7; 2000]].concat(), "not a tar archive"),
        (b"", "has no manifest.json"),
        (&tar(&[("index.json", b"{}")]), "use oci-archive:FILE"),
        (&tar(&[("manifest.json", b"{")]), "manifest.json cannot be read"),
        (&tar(&[("manifest.json", b"[]")]), "has no image in it"),
    ] {
        let text = place.refused(bytes);
        assert!(text.contains(part), "{text}");
    }
    let path = place.file("f.tar", &tar(&[("manifest.json", b"[]")]));
    let text = shown(place.pull(&format!("oci-archive:{}", path.display())));
    assert!(text.contains("use docker-archive:FILE") && text.contains("f.tar"), "{text}");
    for source in ["docker-archive:/no/such", "oci-archive:/no/such", "oci:/no/such"] {
        assert!(shown(place.pull(source)).contains("/no/such: No such file"));
    }
    assert!(
        shown(place.pull("oci:/etc")).contains("/etc is not an OCI layout: it has no oci-layout")
    );
    assert!(shown(place.pull("docker-archive:/etc")).contains("/etc is not a regular file"));
    // A FIFO must not be waited for.
    let fifo = place.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(shown(place.pull(&format!("oci-archive:{}", fifo.display()))).contains("regular file"));
}

#[test]
fn hostile_16_names_in_archives_stay_inside() {
    let place = place();
    let raw = |name: &[u8], kind, link: &[u8]| {
        let mut header = tar::Header::new_old();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link);
        header.set_size(0);
        header.set_entry_type(kind);
        header.set_cksum();
        [header.as_bytes().as_slice(), &[0; 1024]].concat()
    };
    let file = tar::EntryType::Regular;
    for (bytes, part) in [
        (raw(b"../etc/passwd", file, b""), "leads out"),
        (raw(b"a/../../b", file, b""), "leads out"),
        (raw(b"a", tar::EntryType::Symlink, b"../x"), "link leads out"),
        (raw(b"a/b", tar::EntryType::Link, b"../x"), "link leads out"),
        (raw(b"a", tar::EntryType::Char, b""), "only files"),
        (raw(b"a", tar::EntryType::Fifo, b""), "only files"),
    ] {
        let text = place.refused(&bytes);
        assert!(text.contains(part), "{text}");
    }
    // What manifest.json names is looked for in the archive only.
    for name in ["/etc/passwd", "../../etc/passwd", "a\0b", "", ".", "loop"] {
        let list = json!([{"Config": name, "RepoTags": null, "Layers": null}]);
        let list = serde_json::to_vec(&list).unwrap();
        let mut tar = tar::Builder::new(tar(&[("manifest.json", &list)])[..].to_vec());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.get_mut().truncate(1024);
        tar.append_link(&mut header, "loop", "loop").unwrap();
        let text = place.refused(&tar.into_inner().unwrap());
        assert!(
            text.contains("which manifest.json names") || text.contains("too many links"),
            "{text}"
        );
    }
}

#[test]
fn hostile_18_sizes_and_counts_in_archives_are_bounded() {
    let place = place();
    let whole = tar_of(&Made::two().docker(&["a"]));
    for length in [100, 700, 1500, whole.len() / 2] {
        place.refused(&whole[..length]);
    }
    let twice = tar(&[("manifest.json", b"[]"), ("./manifest.json", b"[]")]);
    assert!(place.refused(&twice).contains("two entries"));
    // A size that runs past the end of the file, and one that overflows.
    for size in [1u64 << 40, u64::MAX - 600] {
        let mut header = tar::Header::new_gnu();
        header.set_path("manifest.json").unwrap();
        header.set_size(size);
        header.set_cksum();
        let bytes = [header.as_bytes().as_slice(), &[0; 2048]].concat();
        place.refused(&bytes);
    }
    // A long name of 8 MiB would be kept in memory.
    let mut header = tar::Header::new_gnu();
    header.set_path("././@LongLink").unwrap();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(8 << 20);
    header.set_cksum();
    let bytes = [header.as_bytes().as_slice(), &vec![b'a'; 8 << 20], &[0; 1024]].concat();
    assert!(place.refused(&bytes).contains("too long"));
    // Documents larger than allowed.
    let large = vec![b' '; (4 << 20) + 1];
    assert!(place.refused(&tar(&[("manifest.json", &large)])).contains("more than 4194304"));
}

#[test]
fn hostile_19_spoilt_archives_name_the_blob() {
    let place = place();
    let made = Made::small("x");
    let good = made.docker(&["app"]);
    let without = tar_of(&good[..2]);
    assert!(place.refused(&without).contains(r#"no "0/layer.tar", which manifest.json names"#));
    let mut wrong = good.clone();
    wrong[2].1 = tar(&[("other", b"")]);
    let text = place.refused(&tar_of(&wrong));
    assert!(text.contains("0/layer.tar") && text.contains("expected sha256:"), "{text}");
    let mut config = good.clone();
    config[1].1.push(b' ');
    assert!(place.refused(&tar_of(&config)).contains("expected sha256:"));
    let mut count = made.clone();
    count.config["rootfs"]["diff_ids"] = json!([]);
    assert!(place.refused(&tar_of(&count.docker(&["app"]))).contains("names 0 layers"));
    // A compressed archive that unpacks to far more than it is.
    let zeros = zstd::encode_all(std::io::repeat(0).take(2 << 30), 1).unwrap();
    assert!(place.refused(&zeros).contains("bomb"));
    let mut cut = gzip(&tar_of(&good));
    cut.truncate(cut.len() / 2);
    place.refused(&cut);
}

fn spoilt_layout(spoil: impl FnOnce(&Path)) -> String {
    let place = place();
    let layout = place.path("layout");
    Made::small("x").layout(&layout, "app:1");
    spoil(&layout);
    let text = shown(place.pull(&format!("oci:{}", layout.display())));
    assert!(text.contains("layout"), "{text}");
    assert_eq!(place.store.list().unwrap(), []);
    text
}

#[test]
fn hostile_19_spoilt_layouts_name_the_blob() {
    let made = Made::small("x");
    let blob =
        |layout: &Path, digest: crate::Digest| layout.join("blobs/sha256").join(digest.hex());
    let (layer, bytes) = made.layer(0);
    let manifest = crate::Digest::of(&made.manifest_bytes());
    let text = spoilt_layout(|layout| fs::remove_file(blob(layout, layer)).unwrap());
    assert!(
        text.contains(&layer.hex()) && text.contains(&format!("which manifest {manifest} names"))
    );
    let text = spoilt_layout(|layout| {
        let mut file = fs::File::options().append(true).open(blob(layout, layer)).unwrap();
        file.write_all(b"more").unwrap();
    });
    assert!(text.contains(&format!("has {} bytes, expected {}", bytes.len() + 4, bytes.len())));
    let text = spoilt_layout(|layout| {
        let other = vec![1; bytes.len()];
        fs::write(blob(layout, layer), other).unwrap();
    });
    assert!(text.contains(&layer.to_string()), "{text}");
    spoilt_layout(|layout| fs::write(blob(layout, made.id()), "{}").unwrap());
    spoilt_layout(|layout| fs::write(blob(layout, manifest), "{}").unwrap());
    spoilt_layout(|layout| fs::write(layout.join("index.json"), "[").unwrap());
    let text = spoilt_layout(|layout| {
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"9"}"#).unwrap();
    });
    assert!(text.contains("version"), "{text}");
    // A FIFO or a device in place of a blob is not opened for good.
    let text = spoilt_layout(|layout| {
        fs::remove_file(blob(layout, layer)).unwrap();
        nix::unistd::mkfifo(&blob(layout, layer), nix::sys::stat::Mode::S_IRWXU).unwrap();
    });
    assert!(text.contains("not a regular file"), "{text}");
}

#[test]
fn a_large_layer_goes_through() {
    let place = place();
    let layer = tar(&[("large", &noise(3, 20 << 20))]);
    let made = Made::new(&[(layer.clone(), layer, Compression::None)]);
    place.docker(&tar_of(&made.docker(&["large"]))).unwrap();
}
