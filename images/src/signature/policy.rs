//! The signature policy: containers-policy.json(5).

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::identity::SignedIdentity;
use super::origin::Origin;
use super::scope::Scopes;
use super::sigstore::{self, Key};
use super::{Evidence, PolicyError};
use crate::digest::Digest;
use crate::error::one_line;

/// Which images are accepted, and who must have signed them.
#[derive(Debug)]
pub struct Policy {
    path: PathBuf,
    document: Document,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    default: Vec<Requirement>,
    #[serde(default)]
    transports: Scopes<Scopes<Vec<Requirement>>>,
}

/// What an image must satisfy. Of a list, all.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", deny_unknown_fields)]
enum Requirement {
    InsecureAcceptAnything {},
    Reject {},
    /// GPG. It is read, since other images of the same file do without, but nothing satisfies it.
    #[serde(rename_all = "camelCase")]
    SignedBy {
        #[serde(rename = "keyType")]
        _key_type: String,
        key_path: Option<PathBuf>,
        key_paths: Option<Vec<PathBuf>>,
        key_data: Option<String>,
        #[serde(default)]
        signed_identity: SignedIdentity,
    },
    SigstoreSigned(Box<SigstoreSigned>),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SigstoreSigned {
    key_path: Option<PathBuf>,
    key_paths: Option<Vec<PathBuf>>,
    key_data: Option<String>,
    key_datas: Option<Vec<String>>,
    fulcio: Option<IgnoredAny>,
    pki: Option<IgnoredAny>,
    rekor_public_key_path: Option<IgnoredAny>,
    rekor_public_key_paths: Option<IgnoredAny>,
    rekor_public_key_data: Option<IgnoredAny>,
    rekor_public_key_datas: Option<IgnoredAny>,
    #[serde(default)]
    signed_identity: SignedIdentity,
}

/// The requirements that match an origin.
struct Demand<'p> {
    requirements: &'p [Requirement],
    /// For messages.
    scope: String,
}

impl Policy {
    /// Reads a policy.
    ///
    /// # Errors
    /// A file that cannot be read, or is not a policy: as with other programs that use it, anything
    /// unknown in it makes all of it invalid.
    pub fn read(path: &Path) -> Result<Policy, PolicyError> {
        let bytes = std::fs::read(path)
            .map_err(|error| PolicyError::Read { path: path.to_owned(), error })?;
        Policy::parse(path, &bytes).map_err(|reason| PolicyError::Invalid {
            path: path.to_owned(),
            reason: one_line(&reason),
        })
    }

    /// The first of the files that is there; none if none is.
    ///
    /// # Errors
    /// See [`Policy::read`]. A file that is there and cannot be read is not passed over.
    pub fn find(files: &[PathBuf]) -> Result<Option<Policy>, PolicyError> {
        for path in files {
            match Policy::read(path) {
                Err(PolicyError::Read { error, .. })
                    if error.kind() == std::io::ErrorKind::NotFound => {}
                other => return other.map(Some),
            }
        }
        Ok(None)
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Policy, String> {
        let document: Document = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        check("default", &document.default)?;
        for (transport, scopes) in &document.transports.0 {
            for (scope, requirements) in &scopes.0 {
                check(&place(transport, scope), requirements)?;
            }
        }
        Ok(Policy { path: path.to_owned(), document })
    }

    fn demand(&self, origin: &Origin) -> Demand<'_> {
        let transport = origin.transport();
        if let Some(Scopes(scopes)) = self.document.transports.0.get(transport) {
            for scope in origin.scopes().into_iter().chain([String::new()]) {
                if let Some(requirements) = scopes.get(&scope) {
                    return Demand { requirements, scope: place(transport, &scope) };
                }
            }
        }
        Demand { requirements: &self.document.default, scope: "default".to_owned() }
    }

    /// Whether images from there are accepted with a signature only. Whether they are rejected
    /// anyhow, or the policy demands what cannot be verified, shows here before anything is fetched.
    pub(crate) fn wants_signature(&self, origin: &Origin) -> Result<bool, PolicyError> {
        let demand = self.demand(origin);
        let mut wanted = false;
        for requirement in demand.requirements {
            let (image, path, scope) =
                (origin.to_string(), self.path.clone(), demand.scope.clone());
            let unsupported = |demand| PolicyError::Unsupported { image, path, scope, demand };
            match requirement {
                Requirement::InsecureAcceptAnything {} => {}
                Requirement::Reject {} => {
                    let (image, path) = (origin.to_string(), self.path.clone());
                    return Err(PolicyError::Rejected { image, path, scope: demand.scope });
                }
                Requirement::SignedBy { .. } => return Err(unsupported("signedBy")),
                Requirement::SigstoreSigned(signed) => {
                    if let Some(field) = signed.unsupported() {
                        return Err(unsupported(field));
                    }
                    self.keys(signed)?;
                    wanted = true;
                }
            }
        }
        Ok(wanted)
    }

    /// Applies the policy to an image that comes from `origin` and has this manifest. `hint` is for
    /// one that should be signed and is not.
    pub(crate) fn check(
        &self,
        origin: &Origin,
        manifest: Digest,
        evidence: &Evidence,
        hint: &'static str,
    ) -> Result<(), PolicyError> {
        if !self.wants_signature(origin)? {
            return Ok(());
        }
        let Demand { requirements, scope } = self.demand(origin);
        let (image, path) = (origin.to_string(), self.path.clone());
        if evidence.signatures.is_empty() {
            return Err(PolicyError::Unsigned { image, path, scope, hint });
        }
        let digests = evidence.digests(manifest);
        for requirement in requirements {
            let Requirement::SigstoreSigned(signed) = requirement else { continue };
            let keys = self.keys(signed)?;
            let accepts = |name: &str| signed.signed_identity.accepts(origin.reference(), name);
            let mut reasons = Vec::new();
            for signature in &evidence.signatures {
                match sigstore::verify(signature, &keys, &digests, accepts) {
                    Ok(()) => {
                        reasons.clear();
                        break;
                    }
                    Err(reason) => reasons.push(reason),
                }
            }
            if !reasons.is_empty() {
                reasons.dedup();
                let reasons = one_line(&reasons.join("; "));
                return Err(PolicyError::Refused { image, path, scope, reasons });
            }
        }
        Ok(())
    }

    /// The keys are read when they are needed: a missing one concerns no other image.
    fn keys(&self, signed: &SigstoreSigned) -> Result<Vec<Key>, PolicyError> {
        let bad = |what: String| {
            move |reason: String| PolicyError::Key {
                path: self.path.clone(),
                reason: format!("{what}: {reason}"),
            }
        };
        let mut keys = Vec::new();
        for path in signed.key_path.iter().chain(signed.key_paths.iter().flatten()) {
            let what = || format!("the key {}", path.display());
            let pem = std::fs::read(path).map_err(|error| bad(what())(error.to_string()))?;
            keys.push(Key::parse(&pem).map_err(bad(what()))?);
        }
        for data in signed.key_data.iter().chain(signed.key_datas.iter().flatten()) {
            let pem = STANDARD.decode(data).map_err(|error| error.to_string());
            let key = pem.and_then(|pem| Key::parse(&pem));
            keys.push(key.map_err(bad("keyData".to_owned()))?);
        }
        Ok(keys)
    }
}

impl SigstoreSigned {
    /// A field that demands what is not verified here.
    fn unsupported(&self) -> Option<&'static str> {
        [
            ("sigstoreSigned with fulcio", self.fulcio.is_some()),
            ("sigstoreSigned with pki", self.pki.is_some()),
            (
                "sigstoreSigned with a rekor public key",
                self.rekor_public_key_path.is_some()
                    || self.rekor_public_key_paths.is_some()
                    || self.rekor_public_key_data.is_some()
                    || self.rekor_public_key_datas.is_some(),
            ),
        ]
        .into_iter()
        .find_map(|(name, there)| there.then_some(name))
    }
}

/// What is wrong with a list of requirements, if anything.
fn check(scope: &str, requirements: &[Requirement]) -> Result<(), String> {
    if requirements.is_empty() {
        return Err(format!("{scope} has no requirements; say insecureAcceptAnything or reject"));
    }
    for requirement in requirements {
        let (sources, identity) = match requirement {
            Requirement::InsecureAcceptAnything {} | Requirement::Reject {} => continue,
            Requirement::SignedBy { key_path, key_paths, key_data, signed_identity, .. } => (
                [key_path.is_some(), key_paths.is_some(), key_data.is_some()].to_vec(),
                signed_identity,
            ),
            Requirement::SigstoreSigned(s) => {
                let lists =
                    [s.key_paths.as_ref().map(Vec::len), s.key_datas.as_ref().map(Vec::len)];
                if lists.contains(&Some(0)) {
                    return Err(format!("{scope}: a list of keys is empty"));
                }
                let sources = [
                    s.key_path.is_some(),
                    s.key_paths.is_some(),
                    s.key_data.is_some(),
                    s.key_datas.is_some(),
                    s.fulcio.is_some(),
                    s.pki.is_some(),
                ];
                (sources.to_vec(), &s.signed_identity)
            }
        };
        if sources.iter().filter(|there| **there).count() != 1 {
            return Err(format!(
                "{scope}: a signature's requirement has exactly one source of keys"
            ));
        }
        identity.check().map_err(|reason| format!("{scope}: {reason}"))?;
    }
    Ok(())
}

/// A part of the file, for messages.
fn place(transport: &str, scope: &str) -> String {
    match scope {
        "" => format!("transport {transport}"),
        scope => format!("transport {transport}, scope {scope}"),
    }
}
