//! Pulling under a signature policy.

use std::sync::OnceLock;

use super::*;
use crate::signature::{SIGNATURE, SIGNATURE_TYPE, tag};
use crate::store::PullPolicy;
use crate::testing::{Signer, payload};
use crate::{Policy, SaveFormat};

/// A repository with an image and what is attached to it as signatures.
struct Signed {
    made: Made,
    signatures: Made,
    /// The digest that the signatures' tag is made of.
    of: Digest,
    index: Option<Vec<u8>>,
}

impl Signed {
    fn new() -> Signed {
        let made = Made::two();
        let of = Digest::of(&made.manifest_bytes());
        let mut signatures = Made::small("");
        signatures.manifest["layers"] = json!([]);
        Signed { made, signatures, of, index: None }
    }

    /// The same behind an index, which is what will be signed.
    fn indexed() -> Signed {
        let mut signed = Signed::new();
        let platform = json!({"os": "linux", "architecture": "amd64"});
        let size = signed.made.manifest_bytes().len();
        let entry = json!({"mediaType": OCI_MANIFEST, "digest": signed.of, "size": size,
            "platform": platform});
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]});
        let index = serde_json::to_vec(&index).unwrap();
        signed.of = Digest::of(&index);
        signed.index = Some(index);
        signed
    }

    fn attach(&mut self, signer: &Signer, digest: Digest, name: &str) {
        let payload = serde_json::to_vec(&payload(digest, name)).unwrap();
        let signature = signer.sign(&payload);
        let size = payload.len();
        let digest = self.signatures.add(payload);
        self.signatures.manifest["layers"].as_array_mut().unwrap().push(json!({
            "mediaType": SIGNATURE_TYPE, "digest": digest, "size": size,
            "annotations": {SIGNATURE: signature},
        }));
    }

    /// A registry with it, which is filled by `fill` when its name, a port in it, is known.
    fn serve(
        make: fn() -> Signed,
        fill: impl Fn(&mut Signed, &str) + Send + Sync + 'static,
    ) -> Mock {
        let signed = OnceLock::new();
        Mock::start(move |asked| {
            let signed = signed.get_or_init(|| {
                let mut signed = make();
                let host = asked.header("host").unwrap();
                fill(&mut signed, &format!("{host}/some/app"));
                signed
            });
            signed.answer(asked)
        })
    }

    fn answer(&self, asked: &Asked) -> Answer {
        match asked.path.rsplit_once("/manifests/").map(|(_, name)| name) {
            Some(name) if name == tag(&self.of) && !self.layers().is_empty() => {
                let bytes = self.signatures.manifest_bytes();
                return answer(200, &[("Content-Type", OCI_MANIFEST)], &bytes);
            }
            Some(name) if name.ends_with(".sig") => return not_found(),
            Some(name) => {
                let index = self.index.as_ref();
                let index = index.filter(|_| name == "v1" || name == self.of.to_string());
                if let Some(index) = index {
                    return answer(200, &[("Content-Type", OCI_INDEX)], index);
                }
            }
            None => {}
        }
        let last = asked.path.rsplit('/').next().unwrap_or_default();
        let digest = last.parse::<Digest>().ok();
        match digest.and_then(|digest| self.signatures.blobs.get(&digest)) {
            Some(blob) if asked.path.contains("/blobs/") => answer(200, &[], blob),
            _ => sound(&self.made, asked),
        }
    }

    fn layers(&self) -> &Vec<Value> {
        self.signatures.manifest["layers"].as_array().unwrap()
    }
}

fn policy(place: &Place, value: Value) -> Option<Policy> {
    let path = place.folder.path().join("policy.json");
    fs::write(&path, serde_json::to_vec(&value).unwrap()).unwrap();
    Some(Policy::read(&path).unwrap())
}

/// A policy that demands a signature of everything from `scope`, for any name of its repository.
fn demand(place: &Place, scope: &str, signer: &Signer) -> Option<Policy> {
    let key = place.folder.path().join("cosign.pub");
    fs::write(&key, signer.pem()).unwrap();
    let signed = json!({"type": "sigstoreSigned", "keyPath": key,
        "signedIdentity": {"type": "matchRepository"}});
    let accept = json!([{"type": "insecureAcceptAnything"}]);
    policy(place, json!({"default": accept, "transports": {"docker": {scope: [signed]}}}))
}

fn under(policy: impl FnOnce(&Place) -> Option<Policy>) -> Place {
    let mut place = self::place();
    let policy = policy(&place);
    place.store = place.store.with_policy(policy);
    place
}

/// The same store under another policy.
fn again(place: &Place, policy: Option<Policy>) -> Store {
    Store::open(place.store.root()).unwrap().with_policy(policy)
}

#[test]
fn a_signed_image_is_pulled() {
    for make in [Signed::new, Signed::indexed] {
        let signer = Arc::new(Signer::p256());
        let by = signer.clone();
        let mock = Signed::serve(make, move |signed, name| signed.attach(&by, signed.of, name));
        let place = under(|place| demand(place, &mock.address, &signer));
        let image = place.pull(&mock).unwrap();
        place.store.root_device(&image, &Silent).unwrap();
        // By digest, too.
        let name = format!("{}/some/app@{}", mock.address, image.repo_digests[0].digest().unwrap());
        place.pull_name(&name).unwrap();
    }
}

#[test]
fn an_image_without_a_good_signature_is_not_pulled() {
    type Fill = fn(&Signer, &mut Signed, &str);
    let cases: [(Fill, &str); 7] = [
        (|_, _, _| {}, "has no signature"),
        (|_, signed, name| signed.attach(&Signer::p256(), signed.of, name), "the policy's key"),
        (|by, signed, name| signed.attach(by, Digest::of(b"x"), name), "another image"),
        (|by, signed, name| signed.attach(by, signed.of, &format!("{name}/other")), "for the name"),
        (
            |by, signed, name| {
                signed.attach(by, signed.of, name);
                signed.signatures.manifest["layers"][0]["annotations"] = json!({});
            },
            "has no signature",
        ),
        (
            |by, signed, name| {
                signed.attach(by, signed.of, name);
                signed.signatures.manifest["layers"][0]["size"] = json!(1u64 << 40);
            },
            "bytes; more than",
        ),
        (
            |by, signed, name| {
                signed.attach(by, signed.of, name);
                let layer = signed.signatures.manifest["layers"][0].clone();
                signed.signatures.manifest["layers"] = vec![layer; 101].into();
            },
            "101 signatures",
        ),
    ];
    for (fill, said) in cases {
        let signer = Arc::new(Signer::p256());
        let by = signer.clone();
        let mock = Signed::serve(Signed::new, move |signed, name| fill(&by, signed, name));
        let place = under(|place| demand(place, &mock.address, &signer));
        let text = place.refused(&mock);
        assert!(text.contains(said), "{text}");
        // Nothing of the image itself was read.
        let config = Signed::new().made.id();
        assert_eq!(mock.asked(&config.to_string()).len(), 0);
    }
}

#[test]
fn what_the_policy_accepts_or_rejects_needs_no_signature() {
    let mock = Signed::serve(Signed::new, |_, _| {});
    let place = under(|place| policy(place, json!({"default": [{"type": "reject"}]})));
    let text = place.refused(&mock);
    assert!(text.contains("rejected by the signature policy"), "{text}");
    // The registry was not even asked.
    assert_eq!(mock.asked("").len(), 0);
    let signer = Signer::p256();
    let place = under(|place| demand(place, &format!("{}/other", mock.address), &signer));
    let image = place.pull(&mock).unwrap();
    place.store.root_device(&image, &Silent).unwrap();
    assert_eq!(mock.asked(".sig").len(), 0);
}

#[test]
fn a_registry_that_fails_to_say_is_not_one_without_signatures() {
    let signer = Signer::p256();
    let made = Made::two();
    let mock = Mock::start(move |asked| match asked.path.contains(".sig") {
        true => answer(403, &[], b"no"),
        false => sound(&made, asked),
    });
    let place = under(|place| demand(place, &mock.address, &signer));
    assert!(place.refused(&mock).contains("signatures sha256:"));
}

#[test]
fn what_is_in_the_store_is_verified_again() {
    let signer = Arc::new(Signer::p256());
    let by = signer.clone();
    let mock = Signed::serve(Signed::new, move |signed, name| signed.attach(&by, signed.of, name));
    // Pulled when nothing was demanded, and made into a root device.
    let place = self::place();
    let image = place.pull(&mock).unwrap();
    place.store.root_device(&image, &Silent).unwrap();
    let name = format!("{}/some/app:v1", mock.address);
    let store = again(&place, demand(&place, &mock.address, &signer));
    let text = shown(store.root_device(&image, &Silent));
    assert!(text.contains("has no signature") && text.contains("pull it again"), "{text}");
    // Another name does not change where it came from, nor does its id.
    place.store.tag(&name, "harmless").unwrap();
    for name in ["harmless", &image.id().hex()] {
        let image = store.obtain(name, PullPolicy::Missing, &place.options, &Silent).unwrap();
        assert!(shown(store.root_device(&image, &Silent)).contains("has no signature"));
    }
    // Pulled again it brings its signatures, which stay.
    let options = &place.options;
    let image = store.obtain(&name, PullPolicy::Always, options, &Silent).unwrap();
    store.root_device(&image, &Silent).unwrap();
    let asked = mock.asked("").len();
    let store = again(&place, demand(&place, &mock.address, &signer));
    store.root_device(&image, &Silent).unwrap();
    // A key that was replaced counts at once.
    let store = again(&place, demand(&place, &mock.address, &Signer::p256()));
    assert!(shown(store.root_device(&image, &Silent)).contains("the policy's key"));
    let store = again(&place, policy(&place, json!({"default": [{"type": "reject"}]})));
    assert!(shown(store.root_device(&image, &Silent)).contains("rejected"));
    assert_eq!(mock.asked("").len(), asked);
    // What was known goes with the image.
    let origins = || fs::read_dir(place.store.root().join("origins")).unwrap().count();
    assert_eq!(origins(), 1);
    place.store.remove(&image.id().to_string(), true).unwrap();
    assert_eq!(origins(), 0);
}

#[test]
fn an_image_whose_origin_was_not_written_down_goes_by_its_names() {
    let signer = Signer::p256();
    let mock = Signed::serve(Signed::new, |_, _| {});
    let place = self::place();
    let image = place.pull(&mock).unwrap();
    fs::remove_dir_all(place.store.root().join("origins")).unwrap();
    let store = again(&place, demand(&place, &mock.address, &signer));
    assert!(shown(store.root_device(&image, &Silent)).contains("has no signature"));
    let store = again(&place, demand(&place, "elsewhere.example", &signer));
    store.root_device(&image, &Silent).unwrap();
}

#[test]
fn archives_have_transports_of_their_own() {
    let made = Made::two();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("saved.tar");
    let layout = folder.path().join("layout");
    made.layout(&layout, "h.x/app:v1");
    let source = |place: &Place| {
        place.store.pull(
            &Source::OciLayout { path: layout.clone(), select: Default::default() },
            &place.options,
            &Silent,
        )
    };
    let first = self::place();
    source(&first).unwrap();
    let mut output = fs::File::create(&file).unwrap();
    first.store.save(&["h.x/app:v1"], SaveFormat::DockerArchive, &mut output).unwrap();
    let reject = json!([{"type": "reject"}]);
    let accept = json!([{"type": "insecureAcceptAnything"}]);
    let real = layout.canonicalize().unwrap();
    let real = real.to_str().unwrap();
    for (transports, of_layout, of_archive) in [
        (json!({}), false, false),
        (json!({"docker": {"": accept}}), false, false),
        (json!({"docker-archive": {"": accept}}), false, true),
        (json!({"oci": {"": accept, real: reject}, "oci-archive": {"": accept}}), false, false),
        (json!({"oci": {real: accept}}), true, false),
    ] {
        let document = json!({"default": reject, "transports": transports});
        let place = under(|place| policy(place, document.clone()));
        assert_eq!(source(&place).is_ok(), of_layout, "{document}");
        let loaded = place.store.load(&file, &Silent);
        assert_eq!(loaded.is_ok(), of_archive, "{document}");
        let listed = place.store.list().unwrap();
        assert_eq!(listed.is_empty(), !of_layout && !of_archive);
        // The name in an archive is no registry's.
        for image in loaded.into_iter().flatten() {
            place.store.root_device(&image, &Silent).unwrap();
        }
    }
    // Nobody signs an archive.
    let signed = json!({"type": "sigstoreSigned", "keyData":
        "LS0tLS1CRUdJTiBQVUJMSUMgS0VZLS0tLS0KTUNvd0JRWURLMlZ3QXlFQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE9Ci0tLS0tRU5EIFBVQkxJQyBLRVktLS0tLQo="});
    let place = under(|place| policy(place, json!({"default": [signed]})));
    let text = shown(place.store.load(&file, &Silent));
    assert!(text.contains("archives and layouts have none"), "{text}");
}
