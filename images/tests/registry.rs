//! Real tools at the other end: `docker-registry`, `skopeo`, `htpasswd`, `openssl`. A test whose
//! tools are not installed says so and does nothing.

// Helpers of tests are not tests to the lint.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use images::{Image, Policy, PullOptions, PullPolicy, SaveFormat, Silent, Store};
use tempfile::TempDir;

/// Whether all `tools` are installed; says which is not.
fn have(tools: &[&str]) -> bool {
    let missing = tools.iter().find(|tool| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        !std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
    });
    if let Some(tool) = missing {
        eprintln!("skipped: {tool} is not installed");
    }
    missing.is_none()
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// `docker-registry` on loopback, ended with the test.
struct Registry {
    child: Child,
    address: String,
    folder: TempDir,
}

impl Registry {
    fn start(more: impl FnOnce(&Path) -> (String, String)) -> Registry {
        let folder = tempfile::tempdir().unwrap();
        let (root, http) = more(folder.path());
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let data = folder.path().join("data");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '{free}'{http}}}\n{root}",
            data.display()
        );
        let file = folder.path().join("config.yml");
        fs::write(&file, config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let registry = Registry { child, address: free.to_string(), folder };
        let socket: SocketAddr = registry.address.parse().unwrap();
        let mut tries = 0;
        while TcpStream::connect(socket).is_err() {
            tries += 1;
            assert!(tries < 600, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(100));
        }
        registry
    }

    fn plain() -> Registry {
        Registry::start(|_| Default::default())
    }

    fn push(&self, layout: &Path, name: &str, arguments: &[&str]) {
        run(skopeo(self.folder.path())
            .args(["copy", "--quiet", "--dest-tls-verify=false"])
            .args(arguments)
            .arg(format!("oci:{}:v1", layout.display()))
            .arg(format!("docker://{}/{name}", self.address)));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn skopeo(folder: &Path) -> Command {
    let policy = folder.join("policy.json");
    fs::write(&policy, r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).unwrap();
    let mut command = Command::new("skopeo");
    command.arg("--policy").arg(policy);
    command
}

/// An OCI layout with the tag `v1` and layers of these many bytes, by hand.
fn layout(sizes: &[usize]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let blobs = folder.path().join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let add = |bytes: &[u8]| {
        let digest = images_digest(bytes);
        fs::write(blobs.join(digest.split_once(':').unwrap().1), bytes).unwrap();
        (digest, bytes.len())
    };
    let mut layers = Vec::new();
    for (at, size) in sizes.iter().enumerate() {
        let mut state = at as u64 + 88172645463325252;
        let content: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .take(*size)
        .collect();
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        tar.append_data(&mut header, format!("file{at}"), content.as_slice()).unwrap();
        layers.push(add(&tar.into_inner().unwrap()));
    }
    let diff_ids: Vec<&String> = layers.iter().map(|(digest, _)| digest).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/true"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let describe = |kind: &str, (digest, size): &(String, usize)| {
        let media_type = format!("application/vnd.oci.image.{kind}");
        serde_json::json!({"mediaType": media_type, "digest": digest, "size": size})
    };
    let config = add(&serde_json::to_vec(&config).unwrap());
    let layers: Vec<_> = layers.iter().map(|l| describe("layer.v1.tar", l)).collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": describe("config.v1+json", &config), "layers": layers,
    });
    let mut entry = describe("manifest.v1+json", &add(&serde_json::to_vec(&manifest).unwrap()));
    entry["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "v1"});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]});
    fs::write(folder.path().join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    let version = r#"{"imageLayoutVersion":"1.0.0"}"#;
    fs::write(folder.path().join("oci-layout"), version).unwrap();
    folder
}

fn images_digest(bytes: &[u8]) -> String {
    images::Digest::of(bytes).to_string()
}

struct Place {
    folder: TempDir,
    store: Store,
    options: PullOptions,
}

fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store")).unwrap();
    let mut options = PullOptions::default();
    options.registry.docker_config = Some(folder.path().join("docker"));
    options.registry.certificates = folder.path().join("certs.d");
    fs::create_dir(folder.path().join("docker")).unwrap();
    Place { folder, store, options }
}

impl Place {
    fn pull(&self, name: &str) -> Result<Image, images::Error> {
        self.store.obtain(name, PullPolicy::Always, &self.options, &Silent)
    }
}

#[test]
fn an_image_goes_from_a_registry_to_other_tools() {
    if !have(&["docker-registry", "skopeo"]) {
        return;
    }
    let registry = Registry::plain();
    let layout = layout(&[1000, 200_000]);
    let name = |name: &str| format!("{}/{name}", registry.address);
    registry.push(layout.path(), "some/app:v1", &[]);
    registry.push(layout.path(), "app:gzip", &["--dest-compress", "--format", "v2s2"]);
    registry.push(layout.path(), "app:zstd", &["--dest-compress-format", "zstd"]);
    let place = place();
    for tag in ["some/app:v1", "app:gzip", "app:zstd"] {
        let image = place.pull(&name(tag)).unwrap();
        place.store.root_device(&image, &Silent).unwrap();
    }
    // The store is a layout that skopeo reads, and so are archives made from it.
    let inspect =
        |source: String| run(skopeo(place.folder.path()).args(["inspect", "--config", &source]));
    let root = place.store.root().display();
    assert!(inspect(format!("oci:{root}:{}", name("some/app:v1"))).contains("/bin/true"));
    let file = place.folder.path().join("saved.tar");
    let path = file.display();
    for (image, format, source) in [
        ("app:gzip", SaveFormat::DockerArchive, format!("docker-archive:{path}")),
        ("some/app:v1", SaveFormat::DockerArchive, format!("oci-archive:{path}:v1")),
        ("app:zstd", SaveFormat::OciArchive, format!("oci-archive:{path}:zstd")),
    ] {
        let mut output = fs::File::create(&file).unwrap();
        place.store.save(&[&name(image)], format, &mut output).unwrap();
        assert!(inspect(source).contains("/bin/true"));
    }
    // And what skopeo writes is read.
    let archive = place.folder.path().join("skopeo.tar");
    for (target, source) in [
        (format!("docker-archive:{}:h.x/app:1", archive.display()), "docker-archive"),
        (format!("oci-archive:{}:h.x/app:2", archive.display()), "oci-archive"),
    ] {
        let _ = fs::remove_file(&archive);
        let from = format!("oci:{}:v1", layout.path().display());
        run(skopeo(place.folder.path()).args(["copy", "--quiet", &from, &target]));
        let image = place.pull(&format!("{source}:{}", archive.display())).unwrap();
        assert!(image.names.iter().any(|n| n.to_string().starts_with("h.x/app:")), "{image:?}");
        place.store.root_device(&image, &Silent).unwrap();
    }
    let missing = place.pull(&name("none:v9")).unwrap_err().to_string();
    assert!(missing.contains("none:v9"), "{missing}");
}

#[test]
fn a_password_is_found_where_docker_keeps_it() {
    if !have(&["docker-registry", "skopeo", "htpasswd"]) {
        return;
    }
    let registry = Registry::start(|folder| {
        let hash = run(Command::new("htpasswd").args(["-Bbn", "ada", "secret word"]));
        let file = folder.join("htpasswd");
        fs::write(&file, hash).unwrap();
        (format!("auth: {{htpasswd: {{realm: x, path: {}}}}}\n", file.display()), String::new())
    });
    let layout = layout(&[1000]);
    registry.push(layout.path(), "private:v1", &["--dest-creds", "ada:secret word"]);
    let place = place();
    let name = format!("{}/private:v1", registry.address);
    let refused = place.pull(&name).unwrap_err().to_string();
    assert!(refused.contains("unauthorized") && refused.contains("docker login"), "{refused}");
    let config = |value: serde_json::Value| {
        let file = place.folder.path().join("docker/config.json");
        fs::write(file, serde_json::to_vec(&value).unwrap()).unwrap();
    };
    let address = registry.address.clone();
    // "ada:wrong" and "ada:secret word" in base64.
    config(serde_json::json!({"auths": {&address: {"auth": "YWRhOndyb25n"}}}));
    let refused = place.pull(&name).unwrap_err().to_string();
    assert!(refused.contains("do not give access"), "{refused}");
    config(serde_json::json!({"auths": {&address: {"auth": "YWRhOnNlY3JldCB3b3Jk"}}}));
    place.pull(&name).unwrap();
    // A helper on PATH, which only a process of its own can change.
    config(serde_json::json!({"credHelpers": {&address: "vmrun-test"}}));
    let helper = place.folder.path().join("docker-credential-vmrun-test");
    let script = format!(
        "#!/bin/sh\nread -r server\n[ \"$1 $server\" = 'get {address}' ] || exit 1\n\
         echo '{{\"ServerURL\":\"x\",\"Username\":\"ada\",\"Secret\":\"secret word\"}}'\n"
    );
    executable(&helper, &script);
    let pull = |root: &str| {
        let mut child = child(&place.folder.path().join(root), &name);
        child.env("DOCKER_CONFIG", place.folder.path().join("docker"));
        let path = std::env::var("PATH").unwrap();
        child.env("PATH", format!("{}:{path}", place.folder.path().display()));
        child.output().unwrap()
    };
    let output = pull("other");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    executable(&helper, "#!/bin/sh\necho 'the keychain is locked'\nexit 1\n");
    let output = pull("third");
    let text = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("the keychain is locked"), "{text}");
}

#[test]
fn a_signature_by_openssl_in_a_registry_is_verified() {
    if !have(&["docker-registry", "skopeo", "openssl"]) {
        return;
    }
    let registry = Registry::plain();
    let layout = layout(&[1000]);
    let folder = registry.folder.path();
    let index = fs::read(layout.path().join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let digest = index["manifests"][0]["digest"].as_str().unwrap();
    let kinds = [
        ("ec", ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]),
        ("rsa", ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
    ];
    for (kind, algorithm) in kinds {
        let name = format!("{}/{kind}/app", registry.address);
        let [key, public, other] =
            ["key", "pub", "other"].map(|name| folder.join(format!("{kind}.{name}")));
        let openssl = || Command::new("openssl");
        for key in [&other, &key] {
            run(openssl().arg("genpkey").args(algorithm).arg("-out").arg(key));
        }
        let publish = |key: &Path| {
            run(openssl().args(["pkey", "-pubout", "-in"]).arg(key).arg("-out").arg(&public));
        };
        publish(&key);
        let payload = serde_json::json!({
            "critical": {
                "identity": {"docker-reference": name},
                "image": {"docker-manifest-digest": digest},
                "type": "cosign container image signature",
            },
            "optional": null,
        });
        let payload = serde_json::to_vec(&payload).unwrap();
        let [text, signature] = ["payload", "signature"].map(|name| folder.join(name));
        fs::write(&text, &payload).unwrap();
        let dgst = ["dgst", "-sha256", "-sign"];
        run(openssl().args(dgst).arg(&key).arg("-out").arg(&signature).arg(&text));
        let signature = run(openssl().args(["base64", "-A", "-in"]).arg(&signature));
        registry.push(layout.path(), &format!("{kind}/app:v1"), &["--preserve-digests"]);
        attach(&registry, kind, digest, &payload, &signature);

        let policy = folder.join(format!("{kind}.json"));
        let signed = serde_json::json!({"type": "sigstoreSigned", "keyPath": public,
            "signedIdentity": {"type": "matchRepository"}});
        fs::write(&policy, serde_json::json!({"default": [signed]}).to_string()).unwrap();
        let pull = || {
            let mut place = place();
            place.store = place.store.with_policy(Some(Policy::read(&policy).unwrap()));
            let image = place.pull(&format!("{name}:v1"))?;
            place.store.root_device(&image, &Silent).map(|_| ())
        };
        pull().unwrap();
        // Another key of the same kind.
        publish(&other);
        let refused = pull().unwrap_err().to_string();
        assert!(refused.contains("not made with the policy's key"), "{refused}");
    }
}

/// Puts a signature where cosign does, by way of an image that skopeo pushes.
fn attach(registry: &Registry, kind: &str, digest: &str, payload: &[u8], signature: &str) {
    let folder = tempfile::tempdir().unwrap();
    let add = |bytes: &[u8]| {
        let digest = images_digest(bytes);
        fs::write(folder.path().join(digest.split_once(':').unwrap().1), bytes).unwrap();
        serde_json::json!({"digest": digest, "size": bytes.len()})
    };
    let config = serde_json::json!({"architecture": "", "os": "", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [images_digest(payload)]}});
    let mut config = add(&serde_json::to_vec(&config).unwrap());
    config["mediaType"] = "application/vnd.oci.image.config.v1+json".into();
    let mut layer = add(payload);
    layer["mediaType"] = "application/vnd.dev.cosign.simplesigning.v1+json".into();
    layer["annotations"] = serde_json::json!({"dev.cosignproject.cosign/signature": signature});
    let manifest = serde_json::json!({"schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [layer]});
    fs::write(folder.path().join("manifest.json"), manifest.to_string()).unwrap();
    fs::write(folder.path().join("version"), "Directory Transport Version: 1.1\n").unwrap();
    let tag = format!("{}.sig", digest.replace(':', "-"));
    run(skopeo(registry.folder.path())
        .args(["copy", "--quiet", "--dest-tls-verify=false"])
        .arg(format!("dir:{}", folder.path().display()))
        .arg(format!("docker://{}/{kind}/app:{tag}", registry.address)));
}

fn executable(path: &Path, script: &str) {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = fs::File::options();
    let mut file = options.write(true).create(true).truncate(true).mode(0o755).open(path).unwrap();
    file.write_all(script.as_bytes()).unwrap();
}

#[test]
fn a_registry_with_its_own_authority_is_trusted_when_told_so() {
    if !have(&["docker-registry", "skopeo", "openssl"]) {
        return;
    }
    let registry = Registry::start(|folder| {
        // An authority, and a certificate that it signed.
        let [authority, authority_key, certificate, key] =
            ["ca.pem", "ca.key", "certificate.pem", "key.pem"].map(|name| folder.join(name));
        let request = || {
            let mut openssl = Command::new("openssl");
            openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]);
            openssl
        };
        run(request()
            .args(["-subj", "/CN=authority", "-keyout"])
            .arg(&authority_key)
            .arg("-out")
            .arg(&authority));
        run(request()
            .args(["-subj", "/CN=registry", "-addext", "subjectAltName=IP:127.0.0.1"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE", "-CA"])
            .arg(&authority)
            .arg("-CAkey")
            .arg(&authority_key)
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate));
        let (certificate, key) = (certificate.display(), key.display());
        (String::new(), format!(", tls: {{certificate: {certificate}, key: {key}}}"))
    });
    let layout = layout(&[1000]);
    registry.push(layout.path(), "app:v1", &[]);
    let mut place = place();
    let name = format!("{}/app:v1", registry.address);
    let refused = place.pull(&name).unwrap_err().to_string();
    assert!(refused.contains("certificate") && !refused.contains('\n'), "{refused}");
    let folder = place.folder.path().join("certs.d").join(&registry.address);
    fs::create_dir_all(&folder).unwrap();
    fs::copy(registry.folder.path().join("ca.pem"), folder.join("ca.crt")).unwrap();
    place.pull(&name).unwrap();
    place.options.registry.plain_http = true;
    assert!(place.pull(&name).is_err());
}

/// Pulls in a process of its own, which can be killed: this program with one test.
fn child(root: &Path, source: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "pull_in_a_process_of_its_own", "--nocapture"]);
    command.env("IMAGES_TEST_ROOT", root).env("IMAGES_TEST_SOURCE", source);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
#[ignore = "started by other tests"]
fn pull_in_a_process_of_its_own() {
    let root = PathBuf::from(std::env::var_os("IMAGES_TEST_ROOT").unwrap());
    let source = std::env::var("IMAGES_TEST_SOURCE").unwrap();
    let store = Store::open(&root).unwrap();
    let options = PullOptions::default();
    match store.obtain(&source, PullPolicy::Always, &options, &Silent) {
        Ok(image) => drop(store.root_device(&image, &Silent).unwrap()),
        Err(error) => panic!("{error}"),
    }
}

fn count(folder: &Path) -> usize {
    fs::read_dir(folder).map_or(0, Iterator::count)
}

#[test]
fn hostile_28_processes_pull_one_image_at_once() {
    if !have(&["docker-registry", "skopeo"]) {
        return;
    }
    let registry = Registry::plain();
    let layout = layout(&[4 << 20, 100, 2 << 20]);
    registry.push(layout.path(), "app:v1", &[]);
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let name = format!("{}/app:v1", registry.address);
    let children: Vec<Child> = (0..5).map(|_| child(&root, &name).spawn().unwrap()).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let store = Store::open(&root).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
    for (name, files) in [("blobs/sha256", 5), ("erofs", 1), ("tmp", 0), ("partial", 0)] {
        assert_eq!(count(&root.join(name)), files, "{name}");
    }
}

#[test]
fn hostile_27_a_pull_killed_anywhere_is_taken_up_by_the_next() {
    if !have(&["docker-registry", "skopeo"]) {
        return;
    }
    let registry = Registry::plain();
    let layout = layout(&[24 << 20, 100, 8 << 20]);
    registry.push(layout.path(), "app:v1", &[]);
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("store");
    let name = format!("{}/app:v1", registry.address);
    // Moments that come one after the other, by what there is to see from outside.
    let size = |folder: &str| -> u64 {
        let entries = fs::read_dir(root.join(folder)).into_iter().flatten();
        entries.filter_map(|e| Some(e.ok()?.metadata().ok()?.len())).sum()
    };
    let moments: [(&str, &dyn Fn() -> bool); 6] = [
        ("the store is made", &|| root.join("locks").exists()),
        ("the first bytes are there", &|| size("partial") > 0),
        ("some MiB are there", &|| size("partial") + size("blobs/sha256") > 6 << 20),
        ("a blob is there", &|| count(&root.join("blobs/sha256")) > 0),
        ("the root device is being made", &|| size("tmp") > 0),
        ("all is done", &|| count(&root.join("erofs")) > 0),
    ];
    for (what, reached) in moments {
        let mut child = child(&root, &name).spawn().unwrap();
        while !reached() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // Whatever is in the list is whole.
        let store = Store::open(&root).unwrap();
        for line in store.list().unwrap_or_else(|error| panic!("after {what}: {error}")) {
            let image = store.get(&line.id.hex()).unwrap();
            store.root_device(&image, &Silent).unwrap();
        }
    }
    let output = child(&root, &name).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let store = Store::open(&root).unwrap();
    store.prune(&images::PruneOptions::default()).unwrap();
    for (name, files) in [("blobs/sha256", 5), ("erofs", 1), ("tmp", 0), ("partial", 0)] {
        assert_eq!(count(&root.join(name)), files, "{name}");
    }
}
