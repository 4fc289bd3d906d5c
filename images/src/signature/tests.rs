use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde_json::{Value, json};

use super::*;
use crate::testing::{Signer, payload};

fn policy(value: &Value) -> Policy {
    read(&serde_json::to_string(value).unwrap()).unwrap()
}

fn read(text: &str) -> Result<Policy, PolicyError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("policy.json");
    fs::write(&path, text).unwrap();
    Policy::read(&path)
}

fn origin(text: &str) -> Origin {
    text.parse().unwrap()
}

fn encoded(signer: &Signer) -> String {
    base64::engine::general_purpose::STANDARD.encode(signer.pem())
}

fn signed_by(signer: &Signer) -> Value {
    json!({"type": "sigstoreSigned", "keyData": encoded(signer)})
}

fn signature(signer: &Signer, payload: &Value) -> Signature {
    let payload = serde_json::to_string(payload).unwrap();
    Signature { signature: signer.sign(payload.as_bytes()), payload }
}

fn shown(result: Result<(), PolicyError>) -> String {
    let text = result.unwrap_err().to_string();
    assert!(!text.contains(char::is_control), "{text:?}");
    text
}

#[test]
fn the_narrowest_scope_decides() {
    let accept = json!([{"type": "insecureAcceptAnything"}]);
    let reject = json!([{"type": "reject"}]);
    let policy = policy(&json!({
        "default": reject,
        "transports": {
            "docker": {
                "h.x": accept, "h.x/bad": reject, "h.x/bad/good": accept,
                "h.x/bad/good:evil": reject, "*.example.com": accept, "c.example.com:5": reject,
            },
            "docker-archive": {"": accept},
            "oci-archive": {"/trusted": accept},
            "docker-daemon": {"anything": accept},
        },
    }));
    for (text, accepted) in [
        ("docker:h.x/a:1", true),
        ("docker:h.x/bad:1", false),
        ("docker:h.x/bad/b:1", false),
        ("docker:h.x/badly:1", true),
        ("docker:h.x/bad/good:1", true),
        ("docker:h.x/bad/good:evil", false),
        ("docker:h.x:5/a:1", false),
        ("docker:a.b.example.com:5/x:1", true),
        ("docker:example.com/x:1", false),
        ("docker:c.example.com:5/x:1", false),
        ("docker:alpine:latest", false),
        ("docker-archive:", true),
        ("oci-archive:/trusted/a.tar", true),
        ("oci-archive:/trustedly/a.tar", false),
        ("oci-archive:", false),
        ("oci:/trusted/a", false),
    ] {
        let result = policy.check(&origin(text), Digest::of(b""), &Evidence::default(), "");
        assert_eq!(result.is_ok(), accepted, "{text}");
    }
    let text = shown(policy.wants_signature(&origin("docker:h.x/bad:1")).map(|_| ()));
    assert!(text.contains("docker:h.x/bad:1") && text.contains("scope h.x/bad"), "{text}");
}

#[test]
fn a_signature_must_be_by_the_key_for_the_image_and_its_name() {
    let (digest, name) = (Digest::of(b"manifest"), "h.x/a:1");
    for (signer, other) in
        [(Signer::p256(), Signer::p256()), (Signer::ed25519(), Signer::ed25519())]
    {
        let policy = policy(&json!({"default": [signed_by(&signer)]}));
        let check = |signatures: Vec<Signature>| {
            let evidence = Evidence { indexes: Vec::new(), signatures };
            policy.check(&origin("docker:h.x/a:1"), digest, &evidence, "; sign it")
        };
        let good = payload(digest, name);
        check(vec![signature(&signer, &good)]).unwrap();
        // One of several is enough.
        check(vec![signature(&other, &good), signature(&signer, &good)]).unwrap();
        let mut changed = signature(&signer, &good);
        changed.payload.push(' ');
        let mut other_type = good.clone();
        other_type["critical"]["type"] = "atomic container signature".into();
        let mut more = good.clone();
        more["critical"]["more"] = 1.into();
        let mut outside = good.clone();
        outside["more"] = 1.into();
        let mut half = good.clone();
        half["critical"]["image"] = json!({});
        for (spoilt, said) in [
            (vec![], "has no signature"),
            (vec![], "; sign it"),
            (vec![signature(&other, &good)], "not made with the policy's key"),
            (vec![changed], "not made with the policy's key"),
            (vec![Signature { signature: "?".into(), payload: "{}".into() }], "not base64"),
            (vec![signature(&signer, &payload(Digest::of(b"other"), name))], "another image"),
            (vec![signature(&signer, &payload(digest, "h.x/b:1"))], "for the name \"h.x/b:1\""),
            (vec![signature(&signer, &payload(digest, "h.x/a:2"))], "for the name"),
            (vec![signature(&signer, &payload(digest, "h.x/a"))], "for the name"),
            (vec![signature(&signer, &other_type)], "atomic container signature"),
            (vec![signature(&signer, &more)], "unknown field"),
            (vec![signature(&signer, &outside)], "unknown field"),
            (vec![signature(&signer, &half)], "missing field"),
            (vec![signature(&signer, &json!([]))], "its payload"),
        ] {
            let text = shown(check(spoilt));
            assert!(text.contains(said), "{text}");
        }
    }
}

#[test]
fn a_signed_index_vouches_for_what_it_names() {
    let signer = Signer::p256();
    let policy = policy(&json!({"default": [signed_by(&signer)]}));
    let manifest = Digest::of(b"manifest");
    let index = |digest: Digest| json!({"manifests": [{"digest": digest}]}).to_string();
    let inner = index(manifest);
    let outer = index(Digest::of(inner.as_bytes()));
    let signed = vec![signature(&signer, &payload(Digest::of(outer.as_bytes()), "h.x/a:1"))];
    let check = |indexes: Vec<String>| {
        let evidence = Evidence { indexes, signatures: signed.clone() };
        policy.check(&origin("docker:h.x/a:1"), manifest, &evidence, "")
    };
    check(vec![outer.clone(), inner.clone()]).unwrap();
    check(vec![inner.clone(), outer.clone()]).unwrap();
    for wrong in [vec![], vec![outer.clone()], vec![inner], vec![outer, index(Digest::of(b"x"))]] {
        assert!(shown(check(wrong)).contains("another image"));
    }
}

#[test]
fn all_requirements_must_be_satisfied() {
    let (vendor, reviewer) = (Signer::p256(), Signer::ed25519());
    let both = policy(&json!({"default": [signed_by(&vendor), signed_by(&reviewer)]}));
    let pair = json!([encoded(&vendor), encoded(&reviewer)]);
    let either = policy(&json!({"default": [{"type": "sigstoreSigned", "keyDatas": pair}]}));
    let digest = Digest::of(b"manifest");
    let good = payload(digest, "h.x/a:1");
    let (first, second) = (signature(&vendor, &good), signature(&reviewer, &good));
    for (signatures, of_both) in
        [(vec![first.clone()], false), (vec![second.clone()], false), (vec![first, second], true)]
    {
        let evidence = Evidence { indexes: Vec::new(), signatures };
        let check =
            |policy: &Policy| policy.check(&origin("docker:h.x/a:1"), digest, &evidence, "");
        assert_eq!(check(&both).is_ok(), of_both);
        check(&either).unwrap();
    }
}

#[test]
fn keys_are_files_too() {
    let folder = tempfile::tempdir().unwrap();
    let signer = Signer::p256();
    let path = folder.path().join("cosign.pub");
    let policy = |path: &Path| {
        policy(&json!({"default": [{"type": "sigstoreSigned", "keyPath": path}]}))
            .wants_signature(&origin("docker:h.x/a:1"))
    };
    assert!(shown(policy(&path).map(|_| ())).contains("cosign.pub: No such file"));
    fs::write(&path, "no key").unwrap();
    assert!(shown(policy(&path).map(|_| ())).contains("no public key in PEM"));
    fs::write(&path, "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n").unwrap();
    assert!(shown(policy(&path).map(|_| ())).contains("no public key"));
    fs::write(&path, signer.pem()).unwrap();
    assert!(policy(&path).unwrap());
}

#[test]
fn what_is_not_verified_is_refused_where_it_is_demanded() {
    let key = encoded(&Signer::p256());
    for (requirement, said) in [
        (json!({"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/x"}), "signedBy"),
        (json!({"type": "sigstoreSigned", "fulcio": {"caPath": "/x"}}), "fulcio"),
        (json!({"type": "sigstoreSigned", "pki": {}}), "pki"),
        (json!({"type": "sigstoreSigned", "keyData": key, "rekorPublicKeyPath": "/x"}), "rekor"),
    ] {
        let policy = policy(&json!({
            "default": [{"type": "insecureAcceptAnything"}],
            "transports": {"docker": {"h.x": [requirement]}},
        }));
        assert!(!policy.wants_signature(&origin("docker:i.x/a:1")).unwrap());
        let text = shown(policy.wants_signature(&origin("docker:h.x/a:1")).map(|_| ()));
        assert!(text.contains(said) && text.contains("with a key only"), "{text}");
    }
}

#[test]
fn a_file_that_is_no_policy_is_refused_as_a_whole() {
    for (bad, said) in [
        ("", "EOF"),
        ("[]", "invalid"),
        ("{}", "missing field `default`"),
        (r#"{"default":[]}"#, "no requirements"),
        (r#"{"default":[{"type":"insecureAcceptAnything"}],"more":1}"#, "unknown field `more`"),
        (r#"{"default":[{"type":"insecureAcceptAnything","more":1}]}"#, "unknown field `more`"),
        (r#"{"default":[{"type":"reject"}],"default":[{"type":"reject"}]}"#, "duplicate field"),
        (r#"{"default":[{"type":"reject","type":"reject"}]}"#, "duplicate field"),
        (r#"{"default":[{"type":"acceptAnything"}]}"#, "unknown variant"),
        (r#"{"default":[{}]}"#, "missing field `type`"),
        (
            r#"{"default":[{"type":"reject"}],"transports":{"docker":{"a":[{"type":"reject"}],"a":[{"type":"reject"}]}}}"#,
            "\"a\" is there twice",
        ),
        (r#"{"default":[{"type":"reject"}],"transports":{"docker":{},"docker":{}}}"#, "twice"),
        (
            r#"{"default":[{"type":"reject"}],"transports":{"docker":{"h.x":[]}}}"#,
            "scope h.x has no requirements",
        ),
        (r#"{"default":[{"type":"sigstoreSigned"}]}"#, "exactly one source"),
        (r#"{"default":[{"type":"sigstoreSigned","keyPaths":[]}]}"#, "empty"),
        (
            r#"{"default":[{"type":"sigstoreSigned","keyPath":"/x","keyData":"x"}]}"#,
            "exactly one source",
        ),
        (r#"{"default":[{"type":"sigstoreSigned","keyPath":"/x","more":1}]}"#, "unknown field"),
        (
            r#"{"default":[{"type":"sigstoreSigned","keyPath":"/x","signedIdentity":{"type":"matchExact","x":1}}]}"#,
            "unknown field",
        ),
        (
            r#"{"default":[{"type":"sigstoreSigned","keyPath":"/x","signedIdentity":{"type":"exactRepository","dockerRepository":"a:1"}}]}"#,
            "no repository",
        ),
    ] {
        let text = shown(read(bad).map(|_| ()));
        assert!(text.contains("policy.json is invalid") && text.contains(said), "{bad}: {text}");
    }
    // Data that is no key shows when it is needed.
    let policy = policy(&json!({"default": [{"type": "sigstoreSigned", "keyData": "?"}]}));
    assert!(shown(policy.wants_signature(&origin("oci:/x")).map(|_| ())).contains("keyData"));
}

#[test]
fn the_first_file_that_is_there_counts() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<PathBuf> = ["a", "b", "c"].map(|name| folder.path().join(name)).into();
    assert!(Policy::find(&files).unwrap().is_none());
    fs::write(&files[2], r#"{"default":[{"type":"reject"}]}"#).unwrap();
    let found = Policy::find(&files).unwrap().unwrap();
    assert!(found.wants_signature(&Origin::DockerArchive).is_err());
    fs::write(&files[1], "?").unwrap();
    assert!(Policy::find(&files).is_err());
    fs::create_dir(&files[0]).unwrap();
    assert!(matches!(Policy::find(&files), Err(PolicyError::Read { .. })));
}

#[test]
fn what_is_known_of_an_image_adds_up_and_is_bounded() {
    let one = |at: usize| Provenance {
        origins: vec![Origin::DockerArchive],
        evidence: Evidence {
            indexes: Vec::new(),
            signatures: vec![Signature { payload: at.to_string(), signature: String::new() }],
        },
    };
    let mut all = Provenance::default();
    (0..2 * SIGNATURES_MAX).for_each(|at| all.add(one(at)));
    all.add(one(2 * SIGNATURES_MAX - 1));
    assert_eq!(all.origins.len(), 1);
    assert_eq!(all.evidence.signatures.len(), SIGNATURES_MAX);
    assert_eq!(all.evidence.signatures[0].payload, SIGNATURES_MAX.to_string());
    let text = serde_json::to_string(&all).unwrap();
    assert_eq!(serde_json::from_str::<Provenance>(&text).unwrap(), all);
}
