//! For which name an image must have been signed (containers-policy.json(5), `signedIdentity`).

use serde::Deserialize;

use crate::reference::Reference;

/// For which name an image must have been signed.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", deny_unknown_fields)]
pub(super) enum SignedIdentity {
    /// The image's own.
    MatchExact {},
    /// The image's own; where it is asked for by digest, any of its repository.
    MatchRepoDigestOrExact {},
    /// Any of the image's repository.
    MatchRepository {},
    /// This one.
    #[serde(rename_all = "camelCase")]
    ExactReference { docker_reference: String },
    /// Any of this repository.
    #[serde(rename_all = "camelCase")]
    ExactRepository { docker_repository: String },
    /// The image's own, with the beginning replaced.
    #[serde(rename_all = "camelCase")]
    RemapIdentity { prefix: String, signed_prefix: String },
}

impl Default for SignedIdentity {
    fn default() -> SignedIdentity {
        SignedIdentity::MatchRepoDigestOrExact {}
    }
}

/// A name in a signature: with a tag or digest, or of a repository only.
struct Signed {
    reference: Reference,
    bare: bool,
}

fn signed(text: &str) -> Option<Signed> {
    let reference: Reference = text.parse().ok()?;
    // A tag that is not there was filled in.
    let tagged = reference.tag().is_some_and(|tag| text.ends_with(&format!(":{tag}")));
    Some(Signed { bare: reference.digest().is_none() && !tagged, reference })
}

impl SignedIdentity {
    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), String> {
        match self {
            SignedIdentity::ExactReference { docker_reference } => match signed(docker_reference) {
                Some(signed) if !signed.bare => Ok(()),
                _ => Err(format!("dockerReference {docker_reference:?} is no name with a tag")),
            },
            SignedIdentity::ExactRepository { docker_repository } => {
                match signed(docker_repository) {
                    Some(signed) if signed.bare => Ok(()),
                    _ => Err(format!("dockerRepository {docker_repository:?} is no repository")),
                }
            }
            SignedIdentity::RemapIdentity { prefix, signed_prefix } => {
                for prefix in [prefix, signed_prefix] {
                    let below = format!("{prefix}/x");
                    let whole = below.parse::<Reference>().is_ok_and(|r| r.name() == below);
                    if !whole {
                        return Err(format!(
                            "{prefix:?} is neither a host nor a fully expanded repository"
                        ));
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Whether a signature for `text` is one for `image`, which is none for what has no name.
    pub fn accepts(&self, image: Option<&Reference>, text: &str) -> bool {
        let Some(signed) = signed(text) else { return false };
        match self {
            SignedIdentity::ExactReference { docker_reference } => docker_reference
                .parse::<Reference>()
                .is_ok_and(|wanted| !signed.bare && wanted == signed.reference),
            SignedIdentity::ExactRepository { docker_repository } => docker_repository
                .parse::<Reference>()
                .is_ok_and(|wanted| wanted.name() == signed.reference.name()),
            own => image.is_some_and(|image| own.accepts_own(image, &signed)),
        }
    }

    fn accepts_own(&self, image: &Reference, signed: &Signed) -> bool {
        let exact = |image: &Reference| !signed.bare && *image == signed.reference;
        let digest_or_exact = |image: &Reference| match image.digest() {
            Some(_) => !signed.bare && image.name() == signed.reference.name(),
            None => exact(image),
        };
        match self {
            SignedIdentity::MatchExact {} => exact(image),
            SignedIdentity::MatchRepository {} => image.name() == signed.reference.name(),
            SignedIdentity::RemapIdentity { prefix, signed_prefix } => {
                let name = image.name();
                let rest = name.strip_prefix(prefix.as_str());
                let below = rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
                if !below {
                    return digest_or_exact(image);
                }
                let canonical = image.canonical();
                let rest = canonical.strip_prefix(prefix.as_str()).unwrap_or_default();
                format!("{signed_prefix}{rest}").parse().is_ok_and(|image| digest_or_exact(&image))
            }
            _ => digest_or_exact(image),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepts(identity: &str, image: &str, signed: &str) -> bool {
        let identity: SignedIdentity = serde_json::from_str(identity).unwrap();
        identity.check().unwrap();
        identity.accepts(Some(&image.parse().unwrap()), signed)
    }

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_signature_is_for_a_name() {
        let by_digest = format!("h.x/a@{DIGEST}");
        for (identity, image, signed, yes) in [
            ("matchRepoDigestOrExact", "h.x/a:1", "h.x/a:1", true),
            ("matchRepoDigestOrExact", "h.x/a:1", "h.x/a:2", false),
            ("matchRepoDigestOrExact", "h.x/a:1", "h.x/a", false),
            ("matchRepoDigestOrExact", "h.x/a:latest", "h.x/a", false),
            ("matchRepoDigestOrExact", "alpine", "alpine:latest", true),
            ("matchRepoDigestOrExact", &by_digest, "h.x/a:2", true),
            ("matchRepoDigestOrExact", &by_digest, "h.x/b:2", false),
            ("matchExact", &by_digest, "h.x/a:2", false),
            ("matchExact", "h.x/a:1", "h.x/a:1", true),
            ("matchRepository", "h.x/a:1", "h.x/a", true),
            ("matchRepository", "h.x/a:1", "h.x/a:9", true),
            ("matchRepository", "h.x/a:1", "h.x/a/b:1", false),
            ("matchRepository", "h.x/a:1", "Not A Name", false),
        ] {
            let text = format!("{{\"type\":\"{identity}\"}}");
            assert_eq!(accepts(&text, image, signed), yes, "{identity} {image} {signed}");
        }
    }

    #[test]
    fn a_name_may_be_given() {
        let exact = r#"{"type":"exactReference","dockerReference":"h.x/a:1"}"#;
        assert!(accepts(exact, "mirror/b:2", "h.x/a:1") && !accepts(exact, "h.x/a:2", "h.x/a:2"));
        let any = r#"{"type":"exactRepository","dockerRepository":"h.x/a"}"#;
        assert!(accepts(any, "mirror/b:2", "h.x/a:1") && !accepts(any, "h.x/b:2", "h.x/b:2"));
        let given: SignedIdentity = serde_json::from_str(any).unwrap();
        assert!(given.accepts(None, "h.x/a"));
        assert!(!SignedIdentity::default().accepts(None, "h.x/a:1"));
    }

    #[test]
    fn a_mirrors_name_stands_for_the_originals() {
        let remap = r#"{"type":"remapIdentity","prefix":"mirror:5/v","signedPrefix":"h.x"}"#;
        assert!(accepts(remap, "mirror:5/v/a/b:1", "h.x/a/b:1"));
        assert!(!accepts(remap, "mirror:5/v/a/b:1", "h.x/a/b:2"));
        assert!(!accepts(remap, "mirror:5/v/a/b:1", "mirror:5/v/a/b:1"));
        assert!(accepts(remap, "mirror:5/vw/a:1", "mirror:5/vw/a:1"));
    }

    #[test]
    fn what_is_no_identity_is_refused() {
        for bad in [
            r#"{"type":"exactReference","dockerReference":"h.x/a"}"#,
            r#"{"type":"exactRepository","dockerRepository":"h.x/a:1"}"#,
            r#"{"type":"remapIdentity","prefix":"busybox","signedPrefix":"h.x"}"#,
            r#"{"type":"remapIdentity","prefix":"h.x","signedPrefix":""}"#,
            r#"{"type":"remapIdentity","prefix":"h.x/a:1","signedPrefix":"h.x"}"#,
        ] {
            assert!(serde_json::from_str::<SignedIdentity>(bad).unwrap().check().is_err(), "{bad}");
        }
        for bad in [
            r#"{"type":"matchExact","more":1}"#,
            r#"{"type":"exactReference"}"#,
            r#"{"type":"remapIdentity","prefix":"h.x"}"#,
            r#"{"type":"other"}"#,
            "{}",
        ] {
            assert!(serde_json::from_str::<SignedIdentity>(bad).is_err(), "{bad}");
        }
    }
}
