//! Images: from archives and registries, in the store, and out again.

use std::fs;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::{Running, Session};

/// `docker-registry` on loopback, ended with the test.
struct Registry {
    child: Child,
    address: String,
    _folder: tempfile::TempDir,
}

impl Registry {
    fn start(port: u16, user: Option<(&str, &str)>) -> Registry {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let address = format!("127.0.0.1:{port}");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '{address}'}}\n",
            data.display()
        );
        if let Some((name, password)) = user {
            let hash = Command::new("htpasswd").args(["-Bbn", name, password]).output().unwrap();
            let passwords = folder.path().join("htpasswd");
            fs::write(&passwords, hash.stdout).unwrap();
            config +=
                &format!("auth: {{htpasswd: {{realm: e2e, path: {}}}}}\n", passwords.display());
        }
        let file = folder.path().join("config.yml");
        fs::write(&file, config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let since = Instant::now();
        let socket: SocketAddr = address.parse().unwrap();
        while TcpStream::connect(socket).is_err() {
            assert!(since.elapsed() < Duration::from_secs(60), "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Registry { child, address, _folder: folder }
    }

    fn push(&self, archive: &Path, name: &str, credentials: Option<&str>) {
        let policy = e2e::images::assets().join("policy.json");
        let mut skopeo = Command::new("skopeo");
        skopeo.arg("--policy").arg(policy).args(["copy", "--quiet", "--dest-tls-verify=false"]);
        if let Some(credentials) = credentials {
            skopeo.args(["--dest-creds", credentials]);
        }
        skopeo.arg(format!("oci-archive:{}", archive.display()));
        skopeo.arg(format!("docker://{}/{name}", self.address));
        let done = Running::start(&mut skopeo).finish();
        done.exits(0);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_is_pulled_from_a_registry_and_run() {
    let registry = Registry::start(5055, None);
    registry.push(&e2e::images::archive("args"), "some/args:v1", None);
    let session = Session::prepared();
    let name = format!("{}/some/args:v1", registry.address);
    // `run` pulls what is missing, and keeps standard output to the program.
    let done = session.run([name.as_str()]).exits(0).prints("entry from-cmd\n");
    assert!(done.err().contains("args"), "nothing was said of the pull: {}", done.err());
    session.run(["--pull", "never", name.as_str()]).exits(0);
    session.vmrun(["image", "rm", &name]).exits(0);
    session.run(["--pull", "never", &name]).exits(125).complains(&["some/args"]);
    let missing = format!("{}/some/other", registry.address);
    session.vmrun(["image", "pull", &missing]).exits(125).complains(&["some/other"]);
}

#[test]
fn a_registry_that_asks_for_a_password_gets_it_from_dockers_configuration() {
    let registry = Registry::start(5056, Some(("ada", "secret word")));
    registry.push(&e2e::images::archive("base"), "private:latest", Some("ada:secret word"));
    let session = Session::empty();
    let name = format!("{}/private", registry.address);
    let folder = tempfile::tempdir().unwrap();
    let pull = || {
        let mut command = session.command(["image", "pull", "-q", &name]);
        Running::start(command.env("DOCKER_CONFIG", folder.path())).finish()
    };
    pull().exits(125).complains(&["private"]);
    // "ada:secret word" in base64.
    let config =
        format!(r#"{{"auths":{{"{}":{{"auth":"YWRhOnNlY3JldCB3b3Jk"}}}}}}"#, registry.address);
    fs::write(folder.path().join("config.json"), config).unwrap();
    pull().exits(0);
}

#[test]
fn one_image_pulled_by_many_at_once_arrives_once() {
    let registry = Registry::start(5057, None);
    registry.push(&e2e::images::archive("layers"), "many:latest", None);
    let session = Session::empty();
    let name = format!("{}/many", registry.address);
    let pulls: Vec<_> = (0..6)
        .map(|_| Running::start(&mut session.command(["image", "pull", "-q", &name])))
        .collect();
    for pull in pulls {
        pull.finish().exits(0);
    }
    let list = session.vmrun(["image", "ls", "--format", "json"]).exits(0).out();
    assert_eq!(list.matches("\"sha256:").count().min(1), 1, "{list}");
    assert_eq!(list.lines().filter(|line| line.contains("many")).count(), 1, "{list}");
}

#[test]
fn a_pull_killed_at_any_moment_is_taken_up_by_the_next() {
    let registry = Registry::start(5058, None);
    registry.push(&e2e::images::archive("debian"), "big:latest", None);
    let session = Session::empty();
    let name = format!("{}/big", registry.address);
    for moment in [5, 50, 200, 800] {
        let running = Running::start(&mut session.command(["image", "pull", "-q", &name]));
        std::thread::sleep(Duration::from_millis(moment));
        running.signal(nix::sys::signal::Signal::SIGKILL);
        running.finish();
    }
    session.vmrun(["image", "pull", "-q", &name]).exits(0);
    session.vmrun(["image", "inspect", &name]).exits(0);
}

#[test]
fn what_is_saved_can_be_loaded_and_read_by_others() {
    let session = Session::prepared();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("saved.tar");
    let path = file.to_str().unwrap();
    session.vmrun(["image", "save", "-o", path, "localhost/layers"]).exits(0);
    let inspect = |source: String| {
        let policy = e2e::images::assets().join("policy.json");
        let mut skopeo = Command::new("skopeo");
        skopeo.arg("--policy").arg(policy).args(["inspect", "--config", &source]);
        Running::start(&mut skopeo).finish().exits(0).out()
    };
    assert!(inspect(format!("docker-archive:{path}")).contains("diff_ids"));
    let other = Session::empty();
    other.vmrun(["image", "load", "-i", path]).exits(0);
    let id = |session: &Session| {
        let text = session.vmrun(["image", "inspect", "localhost/layers"]).exits(0).out();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        value[0]["Id"].as_str().unwrap().to_owned()
    };
    assert_eq!(id(&session), id(&other));
}

#[test]
fn tags_are_names_and_removal_frees_what_nothing_uses() {
    let session = Session::empty();
    let archive = format!("oci-archive:{}", e2e::images::archive("base").display());
    session.vmrun(["image", "pull", "-q", &archive]).exits(0);
    session.vmrun(["image", "tag", "localhost/base", "localhost/other:1"]).exits(0);
    session.vmrun(["image", "rm", "localhost/base"]).exits(0);
    session.vmrun(["image", "inspect", "localhost/other:1"]).exits(0);
    session.vmrun(["image", "inspect", "localhost/base"]).exits(125).complains(&["localhost/base"]);
    session.vmrun(["image", "rm", "localhost/other:1"]).exits(0);
    session.vmrun(["image", "prune", "-f"]).exits(0);
    let blobs = |folder: &Path| fs::read_dir(folder).map_or(0, |entries| entries.count());
    assert_eq!(blobs(&session.root().join("images/blobs/sha256")), 0);
}

/// docs/hostile.md 20: a working directory that is not there is made, as Docker does; one that cannot be
/// is named.
#[test]
fn hostile_20_a_working_directory_that_is_not_there_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let layout = folder.path().join("layout");
    let policy = e2e::images::assets().join("policy.json");
    let from = format!("oci-archive:{}", e2e::images::archive("base").display());
    let image = format!("oci:{}:x", layout.display());
    let mut skopeo = Command::new("skopeo");
    skopeo.arg("--policy").arg(policy).args(["copy", "--quiet", &from, &image]);
    Running::start(&mut skopeo).finish().exits(0);
    let set = |cwd: &str| {
        let mut umoci = Command::new("umoci");
        umoci.args(["config", "--image", image.strip_prefix("oci:").unwrap()]);
        Running::start(umoci.args(["--config.workingdir", cwd])).finish().exits(0);
    };
    let session = Session::prepared();
    let run = |options: &[&str], script: &str| {
        let program = ["--pull", "always", "--network", "none", &image, "sh", "-c", script];
        session.run(options.iter().chain(&program))
    };
    set("/not/there/yet");
    run(&[], "pwd; echo made >file; cat file").exits(0).prints("/not/there/yet\nmade\n");
    run(&["--read-only"], "pwd").exits(0).prints("/not/there/yet\n");
    // A file is in the way of one; another is nowhere.
    for (cwd, why) in [("/etc/passwd/below", "directory"), ("not/absolute", "absolute path")] {
        set(cwd);
        // Beside what is said of the pull.
        let said = run(&[], "true").exits(125).err();
        assert!(said.contains(cwd) && said.contains(why), "{said}");
    }
}

#[test]
fn what_is_not_an_image_is_refused_by_name() {
    let session = Session::empty();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"this is not a tar archive, whatever its name").unwrap();
    let path = file.path().to_str().unwrap();
    for scheme in ["docker-archive", "oci-archive"] {
        let source = format!("{scheme}:{path}");
        session.vmrun(["image", "pull", &source]).exits(125).complains(&[path]);
        session
            .vmrun(["image", "pull", &format!("{scheme}:/no/such/file")])
            .exits(125)
            .complains(&["/no/such/file"]);
    }
    session.vmrun(["image", "pull", "oci:/etc"]).exits(125).complains(&["/etc"]);
    session.vmrun(["image", "pull", "Not A Name"]).exits(125).complains(&["Not A Name"]);
    // Nobody listens there.
    session.vmrun(["image", "pull", "127.0.0.1:1/x/y"]).exits(125).complains(&["127.0.0.1:1"]);
}
