use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use tempfile::TempDir;

use super::{PruneOptions, Removed, Store};
use crate::document::Compression;
use crate::layer::UnpackLimits;
use crate::testing::{Made, gzip, noise, shown, tar, zstd};
use crate::{Digest, Error, Image, PullOptions, PullPolicy, Reference, Silent, Source, rootfs};

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
    fn add(&self, made: &Made, name: &str) -> Image {
        add(&self.store, self.folder.path(), made, name)
    }

    fn blobs(&self) -> usize {
        fs::read_dir(self.store.root().join("blobs/sha256")).unwrap().count()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            self.store.list().unwrap().into_iter().flat_map(|line| line.repo_tags).collect();
        names.sort();
        names
    }
}

fn add(store: &Store, folder: &Path, made: &Made, name: &str) -> Image {
    let layout = tempfile::tempdir_in(folder).unwrap();
    // A name without a slash would be a mere tag.
    made.layout(layout.path(), &name.parse::<Reference>().unwrap().canonical());
    let source: Source = format!("oci:{}", layout.path().display()).parse().unwrap();
    store.pull(&source, &PullOptions::default(), &Silent).unwrap()
}

fn untagged(names: &[&str]) -> Vec<Removed> {
    names.iter().map(|name| Removed::Untagged((*name).to_owned())).collect()
}

#[test]
fn an_image_is_found_by_name_and_id() {
    let place = place();
    let image = place.add(&Made::two(), "h.x/app:1");
    let id = image.id();
    let digest = format!("h.x/app@{}", image.manifest_digest);
    for text in ["h.x/app:1", &id.to_string(), &id.hex(), &id.short(), &digest] {
        assert_eq!(place.store.get(text).unwrap().id(), id, "{text}");
    }
    let prefix = format!("sha256:{}", id.short());
    assert_eq!(place.store.get(&prefix).unwrap().id(), id);
    for text in ["h.x/app", "app:1", "h.x/app:2", &Digest::of(b"").hex()] {
        assert!(place.store.find(text).unwrap().is_none(), "{text}");
        assert!(matches!(place.store.get(text), Err(Error::NoSuchImage(_))));
    }
    assert!(matches!(place.store.find("Not A Name"), Err(Error::Reference(_))));
}

#[test]
fn an_ambiguous_prefix_is_told() {
    let place = place();
    // Sixteen first digits and seventeen images: two begin alike.
    for text in 0..17 {
        place.add(&Made::small(&text.to_string()), &format!("app:{text}"));
    }
    let ids: Vec<String> = place.store.list().unwrap().iter().map(|l| l.id.hex()).collect();
    let several = |digit: &&str| ids.iter().filter(|id| id.starts_with(*digit)).count() > 1;
    let digits = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "a", "b", "c", "d", "e", "f"];
    let digit = digits.into_iter().find(several).unwrap();
    assert!(matches!(place.store.find(digit), Err(Error::Ambiguous { .. })));
}

#[test]
fn inspect_has_dockers_names() {
    let place = place();
    place.add(&Made::two(), "app:1");
    place.store.tag("app:1", "h.x/other").unwrap();
    let value = serde_json::to_value(place.store.inspect("app:1").unwrap()).unwrap();
    assert_eq!(value["RepoTags"], json!(["app:1", "h.x/other:latest"]));
    assert_eq!(value["Id"], json!(Made::two().id()));
    assert_eq!(value["Config"]["Cmd"], json!(["/bin/sh"]));
    // What oci-spec does not know stays.
    assert_eq!(value["Config"]["Healthcheck"]["Test"], json!(["NONE"]));
    assert_eq!((&value["Os"], &value["Architecture"]), (&json!("linux"), &json!("amd64")));
    assert_eq!(value["RootFS"]["Layers"].as_array().unwrap().len(), 2);
    assert_eq!(value["Created"], json!("2026-01-02T03:04:05Z"));
    assert!(value["Metadata"]["LastTagTime"].is_string());
}

#[test]
fn tags_move_and_removal_deletes_what_has_none() {
    let place = place();
    let first = place.add(&Made::small("1"), "app:1");
    let second = place.add(&Made::small("2"), "app:2");
    place.store.tag("app:1", "app:3").unwrap();
    place.store.tag(&second.id().short(), "app:3").unwrap();
    assert_eq!(place.store.get("app:3").unwrap().id(), second.id());
    assert_eq!(place.names(), ["app:1", "app:2", "app:3"]);
    assert!(matches!(place.store.tag("none", "app:4"), Err(Error::NoSuchImage(_))));
    let digest = format!("app@{}", first.manifest_digest);
    assert!(matches!(place.store.tag("app:1", &digest), Err(Error::TagWithDigest(_))));

    assert_eq!(place.store.remove("app:3", false).unwrap(), untagged(&["app:3"]));
    assert_eq!(place.blobs(), 6);
    let removed = place.store.remove("app:2", false).unwrap();
    assert!(removed.contains(&Removed::Deleted(second.id())), "{removed:?}");
    assert_eq!(place.blobs(), 3);
    assert!(matches!(place.store.remove("app:2", false), Err(Error::NoSuchImage(_))));
    place.store.tag("app:1", "other").unwrap();
    let id = first.id().short();
    assert!(matches!(place.store.remove(&id, false), Err(Error::SeveralNames { .. })));
    place.store.remove(&id, true).unwrap();
    assert_eq!((place.blobs(), place.names().len()), (0, 0));
}

#[test]
fn a_digest_is_a_name_or_an_id() {
    let place = place();
    let image = place.add(&Made::small("1"), "app:1");
    place.store.tag("app:1", "app:2").unwrap();
    let digest = format!("app@{}", image.manifest_digest);
    // No registry gave this digest, so it is the image that is meant.
    assert!(matches!(place.store.remove(&digest, false), Err(Error::SeveralNames { .. })));
    place.store.remove("app:2", false).unwrap();
    place.store.remove(&digest, false).unwrap();
    assert_eq!(place.blobs(), 0);
}

#[test]
fn a_name_that_moves_leaves_an_image_without_one() {
    let place = place();
    let old = place.add(&Made::small("1"), "app");
    place.add(&Made::small("2"), "app");
    assert_eq!(place.store.get(&old.id().hex()).unwrap().names, []);
    assert_eq!(place.names(), ["app:latest"]);
    let report = place.store.prune(&PruneOptions::default()).unwrap();
    assert!(report.images_deleted.contains(&Removed::Deleted(old.id())));
    assert!(report.space_reclaimed > 0);
    assert_eq!(place.names(), ["app:latest"]);
    let keep = vec![place.store.get("app").unwrap().id()];
    place.store.prune(&PruneOptions { all: true, keep }).unwrap();
    assert_eq!(place.names(), ["app:latest"]);
    place.store.prune(&PruneOptions { all: true, keep: Vec::new() }).unwrap();
    assert_eq!(place.blobs(), 0);
}

#[test]
fn an_image_in_use_stays() {
    let place = place();
    let image = place.add(&Made::small("1"), "app");
    let lease = place.store.hold(&image).unwrap();
    let device = place.store.root_device(&image, &Silent).unwrap();
    assert!(matches!(place.store.remove("app", false), Err(Error::InUse { .. })));
    place.store.prune(&PruneOptions { all: true, keep: Vec::new() }).unwrap();
    assert_eq!(place.names(), ["app:latest"]);
    // By force it loses its name, not its content.
    assert_eq!(place.store.remove("app", true).unwrap(), untagged(&["app:latest"]));
    place.store.prune(&PruneOptions::default()).unwrap();
    assert!(place.store.get(&image.id().hex()).is_ok() && device.exists());
    drop(lease);
    place.store.prune(&PruneOptions::default()).unwrap();
    assert!(!device.exists());
    assert!(matches!(place.store.hold(&image), Err(Error::Gone(_))));
    assert!(matches!(place.store.root_device(&image, &Silent), Err(Error::Gone(_))));
}

#[test]
fn images_share_layers_and_root_devices() {
    let place = place();
    let made = Made::small("1");
    let mut other = made.clone();
    other.config["config"]["Cmd"] = json!(["other"]);
    other.describe_config();
    let (a, b) = (place.add(&made, "a"), place.add(&other, "b"));
    assert_ne!(a.id(), b.id());
    assert_eq!(place.blobs(), 5);
    let device = place.store.root_device(&a, &Silent).unwrap();
    assert_eq!(place.store.root_device(&b, &Silent).unwrap(), device);
    place.store.remove("a", false).unwrap();
    assert!(device.exists());
    place.store.remove("b", false).unwrap();
    assert!(!device.exists());
    assert_eq!(place.blobs(), 0);
}

#[test]
fn policies_decide_when_to_pull() {
    let place = place();
    place.add(&Made::small("1"), "h.invalid/app");
    let obtain =
        |text: &str, policy| place.store.obtain(text, policy, &PullOptions::default(), &Silent);
    let id = obtain("h.invalid/app", PullPolicy::Missing).unwrap().id();
    assert_eq!(obtain("docker://h.invalid/app", PullPolicy::Never).unwrap().id(), id);
    assert_eq!(obtain(&id.hex(), PullPolicy::Missing).unwrap().id(), id);
    assert!(shown(obtain("h.invalid/none", PullPolicy::Never)).contains("h.invalid/none"));
    assert!(matches!(obtain("Not A Name", PullPolicy::Missing), Err(Error::Source(_))));
}

fn device(blob: Vec<u8>, tar: Vec<u8>, compression: Compression) -> Result<PathBuf, String> {
    let place = place();
    let limits = UnpackLimits { bytes: 8 << 20, ratio: 1100, ratio_from: 1 << 20 };
    let store = place.store.clone().with_limits(limits, rootfs::Limits::default());
    let image = place.add(&Made::new(&[(blob, tar, compression)]), "app");
    let made = store.root_device(&image, &Silent);
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
    if let Err(error) = &made {
        let text = error.to_string();
        assert!(text.contains(&image.layers[0].digest.to_string()), "{text}");
        assert_eq!(fs::read_dir(store.root().join("erofs")).unwrap().count(), 0);
    }
    made.map_err(|error| error.to_string())
}

#[test]
fn layers_are_unpacked_whatever_they_are_packed_with() {
    let tar = tar(&[("a", b"one"), ("b", &noise(1, 100_000))]);
    let (head, tail) = tar.split_at(4096);
    let members = [gzip(head), gzip(tail)].concat();
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &zstd(&tar)].concat();
    let frames = [zstd(head), zstd(tail)].concat();
    device(tar.clone(), tar.clone(), Compression::None).unwrap();
    for blob in [gzip(&tar), members] {
        device(blob, tar.clone(), Compression::Gzip).unwrap();
    }
    for blob in [zstd(&tar), frames, skippable] {
        device(blob, tar.clone(), Compression::Zstd).unwrap();
    }
}

#[test]
fn an_image_without_layers_is_an_empty_root() {
    let place = place();
    let mut made = Made::new(&[]);
    // As Go writes it.
    made.config["rootfs"]["diff_ids"] = json!(null);
    made.describe_config();
    let image = place.add(&made, "empty");
    let device = place.store.root_device(&image, &Silent).unwrap();
    assert!(fs::metadata(device).unwrap().len() >= 4096);
}

#[test]
fn hostile_19_damaged_layers_are_refused() {
    let tar = tar(&[("a", b"one"), ("b", &noise(1, 100_000))]);
    let cut = |blob: Vec<u8>| blob[..blob.len() - 20].to_vec();
    let garbage = |blob: Vec<u8>| [blob, b"garbage".to_vec()].concat();
    for (blob, compression) in [
        (cut(gzip(&tar)), Compression::Gzip),
        (cut(zstd(&tar)), Compression::Zstd),
        (garbage(gzip(&tar)), Compression::Gzip),
        (garbage(zstd(&tar)), Compression::Zstd),
    ] {
        let text = device(blob, tar.clone(), compression).unwrap_err();
        assert!(text.contains("damaged or cut off"), "{text}");
    }
    let other = crate::testing::tar(&[("other", b"")]);
    for blob in [gzip(&other), gzip(&[tar.clone(), vec![0; 512]].concat())] {
        let text = device(blob, tar.clone(), Compression::Gzip).unwrap_err();
        assert!(text.contains("configuration says"), "{text}");
    }
    let text = device(zstd(&tar), tar.clone(), Compression::Gzip).unwrap_err();
    assert!(text.contains("packed as Zstd"), "{text}");
}

#[test]
fn hostile_19_bombs_are_refused() {
    let zeros = vec![0u8; 16 << 20];
    for (blob, compression) in
        [(gzip(&zeros), Compression::Gzip), (zstd(&zeros), Compression::Zstd)]
    {
        let text = device(blob, zeros.clone(), compression).unwrap_err();
        assert!(text.contains("bomb"), "{text}");
    }
}

#[test]
fn hostile_27_leftovers_of_killed_commands_are_removed() {
    let place = place();
    for name in ["tmp/.tmpXYZ", "partial/0000", "index.json.new", "locks/x.use"] {
        fs::write(place.store.root().join(name), "left").unwrap();
    }
    let digest = Digest::of(b"never finished");
    fs::write(place.store.partial(&digest), "never").unwrap();
    // A blob without an image: a pull killed before its last step.
    fs::write(place.store.blob(&digest), "never finished").unwrap();
    place.add(&Made::small("1"), "app");
    assert_eq!(fs::read_dir(place.store.root().join("tmp")).unwrap().count(), 0);
    place.store.prune(&PruneOptions::default()).unwrap();
    assert!(!place.store.partial(&digest).exists());
    assert!(!place.store.blob(&digest).exists());
    assert_eq!(place.names(), ["app:latest"]);
}

#[test]
fn hostile_27_damage_is_told_and_can_be_repaired() {
    let place = place();
    let made = Made::small("1");
    let image = place.add(&made, "app");
    let path = place.store.blob(&image.config_digest);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "x").unwrap();
    assert!(shown(place.store.find("app")).contains("is damaged"));
    // Pulling again puts it right, since the size is wrong.
    place.add(&made, "app");
    assert_eq!(place.store.get("app").unwrap().id(), image.id());
    fs::remove_file(place.store.blob(&image.layers[0].digest)).unwrap();
    let text = shown(place.store.root_device(&image, &Silent));
    assert!(text.contains(&image.layers[0].digest.hex()), "{text}");
    fs::write(place.store.index(), "[").unwrap();
    assert!(shown(place.store.list()).contains("index.json is damaged"));
}

#[test]
fn hostile_28_opening_and_pulling_at_once_is_one_image() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let store = Store::open(&root).unwrap();
                let image = add(&store, folder.path(), &Made::two(), "app");
                store.root_device(&image, &Silent).unwrap();
            });
        }
    });
    let store = Store::open(&root).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(fs::read_dir(root.join("blobs/sha256")).unwrap().count(), 4);
    assert_eq!(fs::read_dir(root.join("erofs")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(root.join("tmp")).unwrap().count(), 0);
}

/// Readers, pullers and removers at once: whoever gets an image gets a whole one.
#[test]
fn hostile_28_a_reader_during_a_prune_sees_all_or_nothing() {
    let place = place();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = || {
            while !stop.load(Ordering::Relaxed) {
                let image = match place.store.find("app") {
                    Ok(Some(image)) => image,
                    Ok(None) | Err(Error::Gone(_)) => continue,
                    Err(error) => panic!("find: {error}"),
                };
                place.store.list().unwrap();
                let lease = match place.store.hold(&image) {
                    Ok(lease) => lease,
                    Err(Error::Gone(_)) => continue,
                    Err(error) => panic!("hold: {error}"),
                };
                let device = place.store.root_device(&image, &Silent).unwrap();
                File::open(&device).unwrap();
                drop(lease);
            }
        };
        let readers = [scope.spawn(reader), scope.spawn(reader)];
        let remover = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let all = PruneOptions { all: true, keep: Vec::new() };
                place.store.prune(&all).unwrap();
                match place.store.remove("app", false) {
                    Ok(_) | Err(Error::NoSuchImage(_) | Error::InUse { .. }) => {}
                    Err(error) => panic!("remove: {error}"),
                }
            }
        });
        for round in 0..60 {
            place.add(&Made::small(&format!("{}", round % 3)), "app");
        }
        stop.store(true, Ordering::Relaxed);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        remover.join().unwrap();
    });
}

/// A progress that writes down what it is told.
#[derive(Default)]
struct Told(std::sync::Mutex<Vec<(crate::Step, u64)>>);

impl crate::Progress for Told {
    fn begin(&self, step: crate::Step, _: &str, total: u64) {
        self.0.lock().unwrap().push((step, total));
    }
    fn advance(&self, _: crate::Step, _: &str, _: u64) {}
    fn finish(&self, step: crate::Step, _: &str) {
        self.0.lock().unwrap().push((step, 0));
    }
    fn message(&self, _: &str) {}
}

#[test]
fn progress_is_told_of_every_layer() {
    let place = place();
    let made = Made::two();
    let layout = place.folder.path().join("layout");
    made.layout(&layout, "h.x/app");
    let told = Told::default();
    let image = place.store.load(&layout, &told).unwrap().remove(0);
    place.store.root_device(&image, &told).unwrap();
    let told = told.0.into_inner().unwrap();
    for step in [crate::Step::Load, crate::Step::Convert] {
        let of: Vec<u64> = told.iter().filter(|(s, _)| *s == step).map(|(_, n)| *n).collect();
        assert_eq!(of.iter().filter(|n| **n == 0).count(), 2);
        assert_eq!(of.iter().sum::<u64>(), image.layers.iter().map(|l| l.size).sum::<u64>());
    }
}
