use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Login, Network, RegistryOptions};
use crate::document::{Compression, OCI_INDEX, OCI_MANIFEST};
use crate::testing::{Made, noise, shown, tar};
use crate::{Digest, Error, Image, PullOptions, Silent, Source, Store};

mod signed;

/// A request as the mock saw it.
#[derive(Debug, Clone)]
struct Asked {
    method: String,
    path: String,
    headers: HashMap<String, String>,
    body: String,
}

impl Asked {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What the mock answers: it writes what it likes, and the connection is closed.
type Answer = Box<dyn FnOnce(&mut TcpStream) + Send>;
type Handler = dyn Fn(&Asked) -> Answer + Send + Sync;

/// A registry on loopback that does as a test wants.
struct Mock {
    address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Mock {
    fn start(handler: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Mock {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let (log, handler): (_, Arc<Handler>) = (asked.clone(), Arc::new(handler));
        // It lives as long as the test's process; nobody connects any more when the test is over.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (log, handler) = (log.clone(), handler.clone());
                std::thread::spawn(move || serve(stream, &log, &*handler));
            }
        });
        Mock { address, asked }
    }

    /// Requests whose path contains `part`.
    fn asked(&self, part: &str) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|asked| asked.path.contains(part)).cloned().collect()
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<Asked>>, handler: &Handler) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    if reader.read_line(&mut line).is_err() || line.is_empty() {
        return;
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap_or_default());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    std::io::Read::read_exact(&mut reader, &mut body).unwrap();
    let body = String::from_utf8(body).unwrap();
    let asked = Asked { method, path, headers, body };
    log.lock().unwrap().push(asked.clone());
    handler(&asked)(&mut stream);
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

/// A whole answer.
fn answer(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let mut head = format!("HTTP/1.1 {status} x\r\nConnection: close\r\n");
    let lengthless = headers.iter().all(|(name, _)| *name != "Content-Length");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if lengthless {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    let bytes = [head.as_bytes(), b"\r\n", body].concat();
    Box::new(move |stream| {
        let _ = stream.write_all(&bytes);
    })
}

fn not_found() -> Answer {
    answer(404, &[], br#"{"errors":[{"code":"X_UNKNOWN","message":"not known here"}]}"#)
}

/// What a sound registry answers for `made`, under any tag and repository.
fn sound(made: &Made, asked: &Asked) -> Answer {
    let manifest = made.manifest_bytes();
    let last = asked.path.rsplit('/').next().unwrap_or_default();
    if asked.path == "/v2/" {
        return answer(200, &[], b"{}");
    }
    if asked.path.contains("/manifests/") {
        return answer(200, &[("Content-Type", OCI_MANIFEST)], &manifest);
    }
    let Some(blob) = last.parse::<Digest>().ok().and_then(|digest| made.blobs.get(&digest)) else {
        return not_found();
    };
    let from = asked
        .header("range")
        .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match from {
        Some(from) => {
            let range = format!("bytes {from}-{}/{}", blob.len() - 1, blob.len());
            answer(206, &[("Content-Range", &range)], &blob[from..])
        }
        None => answer(200, &[], blob),
    }
}

struct Place {
    folder: TempDir,
    store: Store,
    options: PullOptions,
}

fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    let network = Network {
        read: Duration::from_secs(5),
        answer: Duration::from_secs(10),
        backoff: Duration::from_millis(1),
        ..Network::default()
    };
    let config = folder.path().join("docker");
    fs::create_dir(&config).unwrap();
    let certificates = folder.path().join("certs.d");
    let docker_config = Some(config);
    let registry = RegistryOptions { docker_config, certificates, network, ..Default::default() };
    Place { folder, store, options: PullOptions { registry, ..Default::default() } }
}

impl Place {
    fn pull(&self, mock: &Mock) -> Result<Image, Error> {
        self.pull_name(&format!("{}/some/app:v1", mock.address))
    }

    fn pull_name(&self, name: &str) -> Result<Image, Error> {
        self.store.pull(&name.parse::<Source>().unwrap(), &self.options, &Silent)
    }

    /// The error of a pull; nothing got into the list.
    fn refused(&self, mock: &Mock) -> String {
        let text = shown(self.pull(mock));
        assert_eq!(self.store.list().unwrap(), []);
        text
    }
}

/// The error of pulling from a registry that is sound but for what `spoil` answers.
fn spoilt(made: Made, spoil: impl Fn(&Asked) -> Option<Answer> + Send + Sync + 'static) -> String {
    let mock = Mock::start(move |asked| spoil(asked).unwrap_or_else(|| sound(&made, asked)));
    place().refused(&mock)
}

/// The error of pulling `made` from a sound registry.
fn told(made: Made) -> String {
    spoilt(made, |_| None)
}

#[test]
fn an_image_is_pulled_and_not_twice() {
    let (place, made) = (place(), Made::two());
    let mock = Mock::start({
        let made = made.clone();
        move |asked| sound(&made, asked)
    });
    let image = place.pull(&mock).unwrap();
    assert_eq!(image.id(), made.id());
    assert_eq!(image.names[0].canonical(), format!("{}/some/app:v1", mock.address));
    let digest = format!("{}/some/app@{}", mock.address, Digest::of(&made.manifest_bytes()));
    assert_eq!(image.repo_digests[0].canonical(), digest);
    place.store.root_device(&image, &Silent).unwrap();
    assert_eq!(mock.asked("/blobs/").len(), 3);
    place.pull(&mock).unwrap();
    assert_eq!(mock.asked("/blobs/").len(), 3);
    // By digest, it gets no further tag.
    assert_eq!(place.pull_name(&digest).unwrap().names.len(), 1);
    assert_eq!(place.store.get(&digest).unwrap().id(), made.id());
    assert_eq!(fs::read_dir(place.store.root().join("partial")).unwrap().count(), 0);
}

#[test]
fn an_index_leads_to_this_platform() {
    let made = Made::two();
    let manifest = made.manifest_bytes();
    let platform = |os: &str, architecture: &str, variant: Option<&str>, bytes: &[u8]| {
        json!({"mediaType": OCI_MANIFEST, "digest": Digest::of(bytes), "size": bytes.len(),
            "platform": {"os": os, "architecture": architecture, "variant": variant}})
    };
    let index = move |entries: Vec<Value>| {
        serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": entries})).unwrap()
    };
    let others = vec![
        platform("linux", "arm64", None, b"arm"),
        platform("unknown", "unknown", None, b"attestation"),
        platform("linux", "amd64", Some("v3"), b"newer"),
    ];
    let with = index([others.clone(), vec![platform("linux", "amd64", None, &manifest)]].concat());
    let serve = |top: Vec<u8>| {
        let made = made.clone();
        Mock::start(move |asked| match asked.path.ends_with("/manifests/v1") {
            true => answer(200, &[("Content-Type", OCI_INDEX)], &top),
            false => sound(&made, asked),
        })
    };
    let image = place().pull(&serve(with.clone())).unwrap();
    assert_eq!(image.id(), made.id());
    assert_eq!(image.repo_digests[0].digest(), Some(&Digest::of(&with)));
    let text = place().refused(&serve(index(others[..2].to_vec())));
    assert!(text.contains("no linux/amd64 in image index of 127.0.0.1"), "{text}");
    assert!(text.ends_with("it has: linux/arm64"), "{text}");
}

#[test]
fn hostile_20_manifests_are_bounded() {
    let huge = |headers: &'static [(&'static str, &'static str)]| {
        spoilt(Made::two(), move |asked| {
            asked.path.contains("/manifests/").then(|| answer(200, headers, &[b' '; 1000]))
        })
    };
    let text = huge(&[("Content-Length", "1073741824")]);
    assert!(text.contains("manifest of") && text.contains("more than 4194304"), "{text}");
    // Without a length, for ever.
    let text = spoilt(Made::two(), |asked| {
        asked.path.contains("/manifests/").then(|| -> Answer {
            Box::new(|stream| {
                let _ = stream.write_all(b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n");
                let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
                while stream.write_all(&chunk).is_ok() {}
            })
        })
    });
    assert!(text.contains("more than 4194304"), "{text}");
    let deep = "[".repeat(100_000);
    let text = spoilt(Made::two(), move |asked| {
        let is = asked.path.contains("/manifests/");
        is.then(|| answer(200, &[("Content-Type", OCI_MANIFEST)], deep.as_bytes()))
    });
    assert!(text.contains("recursion limit"), "{text}");
    let mut many = Made::small("x");
    let layer = many.manifest["layers"][0].clone();
    many.manifest["layers"] = json!(vec![layer; 10_000]);
    assert!(told(many).contains("10000 layers; more than 256 are refused"));
    let mut config = Made::small("x");
    config.manifest["config"]["size"] = json!(1u64 << 30);
    assert!(told(config).contains("more than 4194304"));
}

#[test]
fn hostile_20_an_index_that_leads_nowhere_ends() {
    let index = |digest: Digest, size: usize| {
        let entry = json!({"mediaType": OCI_INDEX, "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": "amd64"}});
        serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [entry]})).unwrap()
    };
    // It answers every question with one index, which names itself as well as it can.
    let own = index(Digest::of(b"itself"), 100);
    let text = spoilt(Made::two(), move |asked| {
        asked
            .path
            .contains("/manifests/")
            .then(|| answer(200, &[("Content-Type", OCI_INDEX)], &own))
    });
    assert!(text.contains("expected"), "{text}");
    let mut chain = vec![index(Digest::of(b"end"), 1)];
    for _ in 0..5 {
        let last = chain.last().unwrap();
        chain.push(index(Digest::of(last), last.len()));
    }
    let text = spoilt(Made::two(), move |asked| {
        let name = asked.path.split_once("/manifests/")?.1;
        let found = chain.iter().find(|bytes| Digest::of(bytes).to_string() == name);
        let bytes = found.or(chain.last()).unwrap();
        Some(answer(200, &[("Content-Type", OCI_INDEX)], bytes))
    });
    assert!(text.contains("index in an index"), "{text}");
}

#[test]
fn hostile_20_what_is_no_image_is_named() {
    let with = |change: &dyn Fn(&mut Made)| {
        let mut made = Made::small("x");
        change(&mut made);
        made.describe_config();
        told(made)
    };
    let text = with(&|made| made.config["architecture"] = json!("arm64"));
    assert!(text.contains("linux/arm64, not for linux/amd64"), "{text}");
    let text = with(&|made| made.manifest["layers"][0]["mediaType"] = json!("application/x-thing"));
    assert!(text.contains(r#"unsupported media type "application/x-thing""#), "{text}");
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let text = with(&|made| made.manifest["layers"][0]["mediaType"] = json!(foreign));
    assert!(text.contains("foreign layer"), "{text}");
    let text = with(&|made| made.config["rootfs"]["diff_ids"] = json!([]));
    assert!(text.contains("names 0 layers"), "{text}");
    let text = with(&|made| made.config["rootfs"]["diff_ids"] = json!(["sha512:00"]));
    assert!(text.contains("only sha256"), "{text}");
    let text = with(&|made| made.manifest["layers"][0]["digest"] = json!("../../etc/passwd"));
    assert!(text.contains("is not a digest"), "{text}");
    let text = with(&|made| made.manifest["manifests"] = json!([]));
    assert!(text.contains("neither clearly"), "{text}");
    let text = with(&|made| made.manifest["mediaType"] = json!(OCI_INDEX));
    assert!(text.contains("neither clearly"), "{text}");
    let mut chart = Made::small("x");
    chart.manifest["config"]["mediaType"] = json!("application/vnd.cncf.helm.config.v1+json");
    assert!(told(chart).contains("not a container image"));
    for old in ["application/vnd.docker.distribution.manifest.v1+prettyjws", "text/html"] {
        let text = spoilt(Made::two(), move |asked| {
            asked.path.contains("/manifests/").then(|| answer(200, &[("Content-Type", old)], b"{}"))
        });
        assert!(text.contains(old), "{text}");
    }
}

/// An image with one layer of 3 MiB, and the layer's path.
fn large() -> (Made, String) {
    let layer = tar(&[("large", &noise(11, 3 << 20))]);
    let made = Made::new(&[(layer.clone(), layer, Compression::None)]);
    let path = format!("/v2/some/app/blobs/{}", made.layer(0).0);
    (made, path)
}

#[test]
fn hostile_21_a_layer_that_breaks_off_is_resumed() {
    let (made, path) = large();
    let mock = Mock::start({
        let (made, path) = (made.clone(), path.clone());
        let times = AtomicUsize::new(0);
        move |asked| {
            let whole = sound(&made, asked);
            if asked.path != path || times.fetch_add(1, Ordering::Relaxed) >= 3 {
                return whole;
            }
            // The whole answer's beginning.
            let cut: Answer = Box::new(move |stream| {
                let (inner, mut outer) = pair();
                let copy = std::thread::spawn(move || {
                    let mut inner = inner;
                    whole(&mut inner);
                });
                let mut bytes = vec![0; 600_000];
                std::io::Read::read_exact(&mut outer, &mut bytes).unwrap();
                let _ = stream.write_all(&bytes);
                drop(outer);
                copy.join().unwrap();
            });
            cut
        }
    });
    let place = place();
    let image = place.pull(&mock).unwrap();
    place.store.root_device(&image, &Silent).unwrap();
    let asked = mock.asked("/blobs/");
    let ranges: Vec<_> =
        asked.iter().filter(|a| a.path == path).map(|a| a.header("range").is_some()).collect();
    assert_eq!(ranges, [false, true, true, true]);
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

#[test]
fn hostile_21_what_an_earlier_pull_left_is_used_or_thrown_away() {
    let (made, path) = large();
    let (digest, bytes) = made.layer(0);
    for (left, range) in [
        (bytes[..1 << 20].to_vec(), Some("bytes=1048576-")),
        // Damaged: found out at the end, then fetched from the beginning.
        (vec![7; 1 << 20], Some("bytes=1048576-")),
        // More than the layer has.
        (vec![7; bytes.len() + 1], None),
    ] {
        let mock = Mock::start({
            let made = made.clone();
            move |asked| sound(&made, asked)
        });
        let place = place();
        fs::write(place.store.root().join("partial").join(digest.hex()), left).unwrap();
        place.pull(&mock).unwrap();
        assert_eq!(mock.asked(&path)[0].header("range"), range);
    }
}

#[test]
fn hostile_21_a_registry_that_ignores_ranges_starts_again() {
    let (made, path) = large();
    let (digest, bytes) = made.layer(0);
    for status in [200, 206, 416] {
        let mock = Mock::start({
            let (made, path) = (made.clone(), path.clone());
            move |asked| {
                if asked.path != path || asked.header("range").is_none() {
                    return sound(&made, asked);
                }
                let bytes = &made.layer(0).1;
                match status {
                    200 => answer(200, &[], bytes),
                    206 => answer(206, &[("Content-Range", "bytes 5-9/10")], &bytes[5..10]),
                    _ => answer(416, &[], b""),
                }
            }
        });
        let place = place();
        let partial = place.store.root().join("partial").join(digest.hex());
        fs::write(partial, &bytes[..1000]).unwrap();
        place.pull(&mock).unwrap();
    }
}

#[test]
fn hostile_21_lengths_and_digests_are_checked() {
    let (made, path) = large();
    let (digest, bytes) = made.layer(0);
    let size = bytes.len();
    for announced in [size - 1, size + 1, 1 << 40] {
        let (path, bytes) = (path.clone(), bytes.clone());
        let text = spoilt(made.clone(), move |asked| {
            let length = announced.to_string();
            (asked.path == path).then(|| answer(200, &[("Content-Length", &length)], &bytes))
        });
        assert!(text.contains(&format!("announces {announced} bytes, expected {size}")), "{text}");
        assert!(text.contains(&digest.to_string()), "{text}");
    }
    // Without a length: more than announced by the manifest, or less.
    let chunked = |bytes: Vec<u8>| -> Answer {
        Box::new(move |stream| {
            let _ = stream.write_all(b"HTTP/1.1 200 x\r\nConnection: close\r\n\r\n");
            let _ = stream.write_all(&bytes);
        })
    };
    let (more, at) = ([bytes.clone(), vec![0; 100]].concat(), path.clone());
    let text = spoilt(made.clone(), move |asked| (asked.path == at).then(|| chunked(more.clone())));
    assert!(text.contains(&format!("sends more than {size} bytes")), "{text}");
    let (less, at) = (bytes[..10].to_vec(), path.clone());
    let text = spoilt(made.clone(), move |asked| (asked.path == at).then(|| chunked(less.clone())));
    assert!(text.contains(&format!("of {size} bytes")), "{text}");
    let (other, at) = (vec![1; size], path.clone());
    let text =
        spoilt(made.clone(), move |asked| (asked.path == at).then(|| answer(200, &[], &other)));
    assert!(text.contains(&format!("expected {digest}")), "{text}");
    let text = spoilt(made.clone(), move |asked| {
        let is = asked.path.ends_with("/manifests/v1");
        let said = Digest::of(b"other").to_string();
        is.then(|| answer(200, &[("Docker-Content-Digest", &said)], &Made::two().manifest_bytes()))
    });
    assert!(text.contains("expected sha256:"), "{text}");
    let text = spoilt(made.clone(), move |asked| {
        let is = asked.path.ends_with(&made.id().to_string());
        is.then(|| answer(200, &[], b"{}"))
    });
    assert!(text.contains("configuration sha256:") && text.contains("2 bytes"), "{text}");
}

#[test]
fn hostile_21_redirects_are_bounded() {
    let text = spoilt(Made::two(), |asked| {
        asked.path.contains("/blobs/").then(|| answer(307, &[("Location", &asked.path)], b""))
    });
    assert!(text.contains("redirects more than 10 times"), "{text}");
    for target in ["file:///etc/passwd", "ftp://h/x", "http://", ""] {
        let text = spoilt(Made::two(), move |asked| {
            asked.path.contains("/manifests/").then(|| answer(302, &[("Location", target)], b""))
        });
        assert!(text.contains("redirects") || text.contains("answers"), "{target}: {text}");
    }
}

#[test]
fn hostile_21_credentials_do_not_follow_a_redirect() {
    let made = Made::two();
    let elsewhere = Mock::start({
        let made = made.clone();
        move |asked| sound(&made, asked)
    });
    let target = elsewhere.address.clone();
    let mock = Mock::start(move |asked| {
        if asked.header("authorization") != Some("Basic YWRhOnB3") {
            return answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b"");
        }
        match asked.path.contains("/blobs/") {
            true => {
                let url = format!("http://{target}{}", asked.path);
                answer(307, &[("Location", &url)], b"")
            }
            false => sound(&made, asked),
        }
    });
    let mut place = place();
    place.options.registry.login =
        Some(Login::Password { user: "ada".into(), password: "pw".into() });
    place.pull(&mock).unwrap();
    let asked = elsewhere.asked("/blobs/");
    assert_eq!(asked.len(), 3);
    assert!(asked.iter().all(|asked| asked.header("authorization").is_none()));
}

#[test]
fn hostile_21_a_401_for_ever_is_an_error() {
    for challenge in ["Basic realm=\"x\"", "Bearer realm=\"http://REALM/token\"", "Digest x", ""] {
        let realm = Mock::start(|_| answer(200, &[], br#"{"token":"t"}"#));
        let challenge = challenge.replace("REALM", &realm.address);
        let mock = Mock::start(move |_| {
            answer(401, &[("WWW-Authenticate", &challenge)], br#"{"errors":[{"code":"DENIED"}]}"#)
        });
        for login in [None, Some(Login::Password { user: "u".into(), password: "p".into() })] {
            let mut place = place();
            place.options.registry.login = login;
            let text = place.refused(&mock);
            assert!(text.contains("unauthorized") || text.contains("login"), "{text}");
            assert!(text.contains(&mock.address), "{text}");
        }
        assert!(mock.asked("").len() < 12);
    }
}

#[test]
fn a_token_is_fetched_with_the_credentials_and_shown() {
    let made = Made::two();
    for login in [
        None,
        Some(Login::Password { user: "ada".into(), password: "pw".into() }),
        Some(Login::IdentityToken("refresh me".into())),
    ] {
        let realm = Mock::start(|_| answer(200, &[], br#"{"access_token":"secret"}"#));
        let mock = Mock::start({
            let (made, realm) = (made.clone(), realm.address.clone());
            move |asked| match asked.header("authorization") {
                Some("Bearer secret") => sound(&made, asked),
                _ => {
                    let challenge = format!(
                        "Bearer realm=\"http://{realm}/token?x=1\",service=\"s p\",\
                         scope=\"repository:some/app:pull\""
                    );
                    answer(401, &[("WWW-Authenticate", &challenge)], b"")
                }
            }
        });
        let mut place = place();
        place.options.registry.login = login.clone();
        place.pull(&mock).unwrap();
        let asked = realm.asked("/token");
        assert_eq!(asked.len(), 1, "one token serves for all requests");
        let asked = &asked[0];
        match login {
            None => {
                assert_eq!(
                    asked.path,
                    "/token?x=1&service=s+p&scope=repository%3Asome%2Fapp%3Apull"
                );
                assert_eq!(asked.header("authorization"), None);
            }
            Some(Login::Password { .. }) => {
                assert_eq!(asked.header("authorization"), Some("Basic YWRhOnB3"));
            }
            Some(Login::IdentityToken(_)) => {
                assert_eq!(asked.method, "POST");
                assert!(asked.body.contains("refresh_token=refresh+me"), "{}", asked.body);
            }
        }
        // The password is for the token server only.
        assert!(mock.asked("").iter().all(|a| a.header("authorization") != Some("Basic YWRhOnB3")));
    }
}

#[test]
fn an_expired_token_is_renewed() {
    let made = Made::two();
    let count = Arc::new(AtomicUsize::new(0));
    let realm = Mock::start({
        let count = count.clone();
        move |_| {
            let token = format!(r#"{{"token":"t{}"}}"#, count.fetch_add(1, Ordering::SeqCst) + 1);
            answer(200, &[], token.as_bytes())
        }
    });
    let address = realm.address.clone();
    let mock = Mock::start(move |asked| {
        // The first token is good for the manifest only.
        let wanted = if asked.path.contains("/blobs/") { "Bearer t2" } else { "Bearer t1" };
        match asked.header("authorization") {
            Some(shown) if shown == wanted => sound(&made, asked),
            _ => {
                let challenge = format!("Bearer realm=\"http://{address}/\"");
                answer(401, &[("WWW-Authenticate", &challenge)], b"")
            }
        }
    });
    place().pull(&mock).unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[test]
fn docker_configuration_has_the_credentials() {
    let made = Made::small("x");
    let mock = Mock::start(move |asked| match asked.header("authorization") {
        Some("Basic YWRhOnNlY3JldCB3b3Jk") => sound(&made, asked),
        _ => answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""),
    });
    let place = place();
    let text = place.refused(&mock);
    assert!(text.contains(&format!("log in: `docker login {}`", mock.address)), "{text}");
    let auths = json!({"auths": {mock.address.clone(): {"auth": "YWRhOnNlY3JldCB3b3Jk"}}});
    let file = place.folder.path().join("docker/config.json");
    fs::write(file, serde_json::to_vec(&auths).unwrap()).unwrap();
    place.pull(&mock).unwrap();
}

#[test]
fn hostile_21_a_busy_registry_is_waited_for_but_not_for_ever() {
    for (status, header) in [(429, Some("0")), (503, None), (500, Some("nonsense"))] {
        let made = Made::two();
        let times = AtomicUsize::new(0);
        let mock = Mock::start(move |asked| {
            if asked.path != "/v2/" && times.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                let headers: Vec<_> =
                    header.map(|value| ("Retry-After", value)).into_iter().collect();
                return answer(status, &headers, b"");
            }
            sound(&made, asked)
        });
        place().pull(&mock).unwrap();
    }
    // Always: an error after a bounded number of attempts.
    let mock = Mock::start(|_| answer(429, &[("Retry-After", "0")], b""));
    let text = place().refused(&mock);
    assert!(text.contains("too many requests"), "{text}");
    assert!((2..12).contains(&mock.asked("/manifests/").len()));
    // Longer than anybody waits: told at once.
    let mock = Mock::start(|_| answer(429, &[("Retry-After", "86400")], b""));
    let text = place().refused(&mock);
    assert!(text.ends_with("try again in 86400 s"), "{text}");
    assert_eq!(mock.asked("/manifests/").len(), 1);
}

/// An answer that goes on byte by byte until the client hangs up or `stop`.
fn drip(head: String, stop: Arc<AtomicBool>) -> Answer {
    Box::new(move |stream| {
        let _ = stream.write_all(head.as_bytes());
        while !stop.load(Ordering::Relaxed) && stream.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
    })
}

#[test]
fn hostile_21_a_registry_that_drips_is_given_up() {
    let (made, path) = large();
    let stop = Arc::new(AtomicBool::new(false));
    let mut place = place();
    place.options.registry.network.window = Duration::from_millis(50);
    place.options.registry.network.answer = Duration::from_millis(500);
    place.options.registry.network.retries = 2;
    let size = made.layer(0).1.len();
    let head = format!("HTTP/1.1 200 x\r\nContent-Length: {size}\r\n\r\n");
    let mock = Mock::start({
        let stop = stop.clone();
        move |asked| match asked.path == path {
            true => drip(head.clone(), stop.clone()),
            false => sound(&made, asked),
        }
    });
    let text = place.refused(&mock);
    assert!(text.contains("too slow"), "{text}");
    // The same with a manifest, and with headers that never end.
    for head in ["HTTP/1.1 200 x\r\nContent-Length: 90000\r\n\r\n", "HTTP/1.1 200 x\r\nX: "] {
        let stop = stop.clone();
        let mock = Mock::start(move |asked| match asked.path.as_str() {
            "/v2/" => answer(200, &[], b""),
            _ => drip(head.to_owned(), stop.clone()),
        });
        let text = place.refused(&mock);
        assert!(text.contains("took longer"), "{text}");
    }
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn what_is_not_there_is_named() {
    let place = place();
    let mock = Mock::start(|asked| match asked.path.as_str() {
        "/v2/" => answer(200, &[], b""),
        _ => not_found(),
    });
    let text = place.refused(&mock);
    assert!(text.contains("some/app:v1") && text.contains("not known here"), "{text}");
    let text = shown(place.pull_name("127.0.0.1:1/x/y"));
    assert!(text.contains("127.0.0.1:1") && text.contains("refused"), "{text}");
    // Neither HTTP nor TLS.
    let mock =
        Mock::start(|_| Box::new(|stream: &mut TcpStream| drop(stream.write_all(b"SSH-2.0\r\n"))));
    assert!(place.refused(&mock).contains("127.0.0.1"));
    // A message cannot steer the terminal.
    let mock = Mock::start(|asked| match asked.path.as_str() {
        "/v2/" => answer(200, &[], b""),
        _ => answer(404, &[], b"{\"errors\":[{\"message\":\"a\\u001b[2Jb\\nc\"}]}"),
    });
    assert!(place.refused(&mock).contains("a[2Jbc"));
}

#[test]
fn hostile_28_one_layer_is_downloaded_once() {
    let (made, path) = large();
    let mock = Mock::start({
        let made = made.clone();
        move |asked| sound(&made, asked)
    });
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let place = place();
                let store = Store::open(folder.path()).unwrap();
                let source: Source = format!("{}/some/app:v1", mock.address).parse().unwrap();
                store.pull(&source, &place.options, &Silent).unwrap();
            });
        }
    });
    assert_eq!(mock.asked(&path).len(), 1);
}
