//! The signature policy as a user meets it, and the checklist; neither needs a machine.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use images::Digest;
use serde_json::{Value, json};

/// An OCI layout of an image with one empty layer.
fn layout(folder: &Path) {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let add = |kind: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.to_string().rsplit(':').next().unwrap()), bytes).unwrap();
        let kind = format!("application/vnd.oci.image.{kind}");
        json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
    };
    let layer = add("layer.v1.tar", &[0; 1024]);
    let config = json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}});
    let config = add("config.v1+json", config.to_string().as_bytes());
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer],
        "mediaType": "application/vnd.oci.image.manifest.v1+json"});
    let manifest = add("manifest.v1+json", manifest.to_string().as_bytes());
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_policy_is_found_where_it_should_be() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    layout(&path("image"));
    let write = |name: &str, requirement: Value| {
        let policy = json!({"default": [requirement]});
        fs::create_dir_all(path(name).parent().unwrap()).unwrap();
        fs::write(path(name), policy.to_string()).unwrap();
    };
    let accept = || json!({"type": "insecureAcceptAnything"});
    let reject = || json!({"type": "reject"});
    let vmrun = |arguments: &[&str], named: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmrun"));
        command.env("HOME", path("home")).env("XDG_CONFIG_HOME", path("config"));
        command.env("VMRUN_ROOT", path("state")).env_remove("VMRUN_SIGNATURE_POLICY");
        if let Some(name) = named {
            command.env("VMRUN_SIGNATURE_POLICY", path(name));
        }
        command.args(arguments).output().unwrap()
    };
    let source = format!("oci:{}", path("image").display());
    let pull = |more: &[&str], named| vmrun(&[more, &["image", "pull", &source]].concat(), named);
    let list = || String::from_utf8(vmrun(&["image", "ls", "-q"], None).stdout).unwrap();

    write("config/vmrun/policy.json", reject());
    let output = pull(&[], None);
    assert_eq!(output.status.code(), Some(125));
    let text = said(&output);
    assert!(text.contains("is rejected by the signature policy"), "{text}");
    assert!(text.contains("config/vmrun/policy.json (default)"), "{text}");
    assert_eq!(list(), "");
    // What the user names goes before; a flag before the environment.
    write("accept.json", accept());
    write("reject.json", reject());
    let [accepting, rejecting] =
        ["accept.json", "reject.json"].map(|name| path(name).display().to_string());
    assert!(!pull(&["--signature-policy", &rejecting], Some("accept.json")).status.success());
    let output = pull(&["--signature-policy", &accepting], Some("reject.json"));
    assert!(output.status.success(), "{}", said(&output));
    assert_ne!(list(), "");
    assert!(pull(&[], Some("accept.json")).status.success());
    // One that is not there, or wrong, is not passed over, and in nobody's way who takes nothing in.
    assert!(said(&pull(&[], Some("none.json"))).contains("none.json: No such file"));
    fs::write(path("config/vmrun/policy.json"), "{").unwrap();
    let text = said(&pull(&[], None));
    assert!(text.contains("policy.json is invalid") && text.lines().count() == 1, "{text}");
    assert_ne!(list(), "");
    fs::remove_file(path("config/vmrun/policy.json")).unwrap();
    // The other tools' own.
    write("home/.config/containers/policy.json", reject());
    assert!(said(&pull(&[], None)).contains("containers/policy.json (default)"));
}

#[test]
fn the_checklist_is_printed_and_its_failures_show_in_the_status() {
    let output = Command::new(env!("CARGO_BIN_EXE_vmrun"))
        .args(["doctor", "--production", "--format", "json"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["Subject"] == "KSM"), "{text}");
    let failed = lines.iter().any(|line| line["Verdict"] == "missing");
    assert_eq!(output.status.code(), Some(i32::from(failed)), "{text}");
}
