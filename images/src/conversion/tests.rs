use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::testing::{Made, gzip, shown, tar, tar_of};
use crate::{Error, Image, PullOptions, Silent, Source, Store};

/// Converts at the other end of pipes, as another process does.
#[derive(Debug)]
struct Served;

impl Converter for Served {
    fn run(
        &self,
        task: &Task,
        inputs: Vec<File>,
        output: &File,
        tell: &mut dyn FnMut(Message),
    ) -> Result<(), ConversionError> {
        let ((mut takes, tasks), (mut said, mut says)) = (io::pipe().unwrap(), io::pipe().unwrap());
        let output = output.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || serve(&mut takes, &mut says, inputs, output).unwrap());
            ask(tasks, &mut said, task, tell).map_err(|error| error.unwrap())
        })
    }
}

/// A converter that a layer has taken over: says and writes what this does.
struct Liar<F>(F);

impl<F> fmt::Debug for Liar<F> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Liar")
    }
}

impl<F> Converter for Liar<F>
where
    F: Fn(&Task, Vec<File>, &File, &mut dyn FnMut(Message)) + Send + Sync,
{
    fn run(
        &self,
        task: &Task,
        inputs: Vec<File>,
        output: &File,
        tell: &mut dyn FnMut(Message),
    ) -> Result<(), ConversionError> {
        (self.0)(task, inputs, output, tell);
        Ok(())
    }
}

fn store(folder: &Path, name: &str, converter: impl Converter + 'static) -> Store {
    Store::open(&folder.join(name)).unwrap().with_converter(Arc::new(converter))
}

fn add(store: &Store, made: &Made, name: &str) -> Image {
    let layout = tempfile::tempdir().unwrap();
    made.layout(layout.path(), name);
    let source: Source = format!("oci:{}", layout.path().display()).parse().unwrap();
    store.pull(&source, &PullOptions::default(), &Silent).unwrap()
}

fn device(store: &Store, made: &Made) -> Result<PathBuf, Error> {
    store.root_device(&add(store, made, "h.x/app"), &Silent)
}

#[test]
fn another_process_makes_the_same_bytes_and_the_same_errors() {
    let folder = tempfile::tempdir().unwrap();
    let here = store(folder.path(), "here", InProcess);
    let there = store(folder.path(), "there", Served);
    let bytes = |store: &Store| fs::read(device(store, &Made::two()).unwrap()).unwrap();
    assert_eq!(bytes(&here), bytes(&there));

    let good = tar(&[("a", b"one")]);
    let refused = tar(&[("a", b"one"), (&"n".repeat(300), b"")]);
    let cut = gzip(&good)[..30].to_vec();
    for made in [
        Made::new(&[(cut, good.clone(), Compression::Gzip)]),
        Made::new(&[(refused.clone(), refused, Compression::None)]),
        Made::new(&[(good.clone(), b"other".to_vec(), Compression::None)]),
        Made::new(&[(good.clone(), good, Compression::Zstd)]),
    ] {
        assert_eq!(shown(device(&here, &made)), shown(device(&there, &made)));
    }
}

#[test]
fn another_process_finds_the_same_in_archives() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("archive");
    let archive = tar_of(&Made::two().docker(&["h.x/app:1"]));
    let here = store(folder.path(), "here", InProcess);
    let there = store(folder.path(), "there", Served);
    let load = |store: &Store| store.load(&path, &Silent);
    for bytes in [archive.clone(), gzip(&archive)] {
        fs::write(&path, bytes).unwrap();
        let [a, b] = [&here, &there].map(|store| load(store).unwrap()[0].id());
        assert_eq!(a, b);
    }
    for bytes in
        [b"no tar".repeat(200), tar(&[("x", b""), ("x", b"")]), gzip(&archive)[..999].to_vec()]
    {
        fs::write(&path, bytes).unwrap();
        assert_eq!(shown(load(&here)), shown(load(&there)));
    }
}

#[test]
fn a_root_device_is_what_it_is_and_not_what_is_said_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let honest = store(folder.path(), "honest", InProcess);
    let made = Made::small("1");
    let good = fs::read(device(&honest, &made).unwrap()).unwrap();
    let size = good.len() as u64;
    let mut damaged = good.clone();
    damaged[1024 + 30] ^= 1;
    for (name, bytes, said) in [
        ("nothing", Vec::new(), size),
        ("noise", vec![7; good.len()], size),
        ("damaged", damaged, size),
        ("cut", good[..good.len() - 4096].to_vec(), size - 4096),
        ("longer", [good.clone(), vec![0; 4096]].concat(), size + 4096),
        ("other", good.clone(), size + 4096),
    ] {
        let liar = Liar(move |_: &Task, _, mut output: &File, tell: &mut dyn FnMut(Message)| {
            output.write_all(&bytes).unwrap();
            tell(Message::Progress { layer: 77, done: u64::MAX });
            tell(Message::Progress { layer: 0, done: u64::MAX });
            tell(Message::RootDevice(said));
        });
        let store = store(folder.path(), name, liar);
        assert!(shown(device(&store, &made)).contains("h.x/app"), "{name}");
        for folder in ["erofs", "tmp"] {
            assert_eq!(fs::read_dir(store.root().join(folder)).unwrap().count(), 0, "{name}");
        }
    }
    // Larger than any image may be; sparse, so that it costs nothing.
    let tree = rootfs::Limits { bytes: 1 << 20, entries: 10, ..rootfs::Limits::default() };
    let liar = Liar(|task: &Task, _, output: &File, tell: &mut dyn FnMut(Message)| {
        output.set_len(task.output_limit() + 1).unwrap();
        tell(Message::RootDevice(task.output_limit() + 1));
    });
    let store = store(folder.path(), "large", liar).with_limits(UnpackLimits::default(), tree);
    assert!(shown(device(&store, &made)).contains("larger"));
}

#[test]
fn who_takes_a_converter_over_gets_no_other_image() {
    // An image that claims the layers of another, with layers of its own.
    let folder = tempfile::tempdir().unwrap();
    let victim = Made::small("the victim's");
    let mut attacker = Made::small("the attacker's");
    attacker.config["rootfs"] = victim.config["rootfs"].clone();
    attacker.config["config"]["Cmd"] = json!(["attack"]);
    attacker.describe_config();
    // Its layer has the converter believe that.
    let liar =
        Liar(|task: &Task, inputs: Vec<File>, output: &File, tell: &mut dyn FnMut(Message)| {
            let mut task = task.clone();
            let Task::RootDevice { layers, .. } = &mut task else { panic!() };
            layers.iter_mut().for_each(|layer| layer.diff_id = layer.digest);
            InProcess.run(&task, inputs, output, tell).unwrap();
        });
    let taken = store(folder.path(), "store", liar);
    let image = add(&taken, &attacker, "h.x/attacker");
    let theirs = taken.root_device(&image, &Silent).unwrap();
    let store = Store::open(taken.root()).unwrap();
    let image = add(&store, &victim, "h.x/victim");
    let own = store.root_device(&image, &Silent).unwrap();
    assert_ne!(own, theirs);
    let has = |path: &Path, text: &[u8]| {
        let bytes = fs::read(path).unwrap();
        bytes.windows(text.len()).any(|part| part == text)
    };
    assert!(has(&own, b"the victim's") && !has(&own, b"the attacker's"));
    assert!(has(&theirs, b"the attacker's"));
}

#[test]
fn hostile_16_places_in_an_archive_are_within_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("archive");
    let mut file = File::create(&path).unwrap();
    file.write_all(&tar(&[("manifest.json", b"[]")])).unwrap();
    let place = |offset, size| Place::File { offset, size };
    for (number, entries) in [
        vec![("manifest.json", place(u64::MAX, 2))],
        vec![("manifest.json", place(512, 1 << 40))],
        vec![("../manifest.json", place(0, 2))],
        vec![("manifest.json", Place::Link("/../../etc/shadow".into()))],
        vec![("a", place(0, 1)), ("a", place(0, 2))],
    ]
    .into_iter()
    .enumerate()
    {
        let liar = Liar(move |_: &Task, _, _: &File, tell: &mut dyn FnMut(Message)| {
            for (name, place) in entries.clone() {
                tell(Message::Entry(name.into(), place));
            }
        });
        let store = store(folder.path(), &number.to_string(), liar);
        let text = shown(store.load(&path, &Silent));
        assert!(text.contains("what was told of it has"), "{number}: {text}");
    }
    // As many as there like: memory is bounded.
    let liar = Liar(|_: &Task, _, _: &File, tell: &mut dyn FnMut(Message)| {
        (0..200_000).for_each(|n| tell(Message::Entry(format!("{n}"), Place::Link("x".into()))));
    });
    let store = store(folder.path(), "many", liar);
    assert!(shown(store.load(&path, &Silent)).contains("too many entries"));
}

#[test]
fn a_superblock_is_checked_wherever_it_was_made() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path(), "store", InProcess);
    let path = device(&store, &Made::two()).unwrap();
    let length = path.metadata().unwrap().len();
    let copy = folder.path().join("copy");
    fs::write(&copy, fs::read(&path).unwrap()).unwrap();
    let file = File::options().read(true).write(true).open(&copy).unwrap();
    assert_eq!(crate::erofs::check(&file, length).unwrap(), Ok(length));
    assert!(crate::erofs::check(&file, length - 1).unwrap().is_err());
    file.write_all_at(&[0], 1024).unwrap();
    assert!(crate::erofs::check(&file, length).unwrap().is_err());
}
