//! Pulling from a registry (OCI distribution specification 1.1, "Pull").
//!
//! Everything a registry sends is hostile: sizes are bounded before they are read, digests checked
//! after, redirects and retries counted, and credentials go to nobody but the registry and the
//! token server it names.

mod auth;
/// What fuzz targets need of what is otherwise our own.
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    use super::auth::{Challenge, parse};

    /// The URLs of the token servers that a header names.
    pub fn realms(header: &str) -> impl Iterator<Item = String> {
        parse(header).into_iter().filter_map(|challenge| match challenge {
            Challenge::Bearer { realm, .. } => Some(realm),
            Challenge::Basic => None,
        })
    }
}
mod client;
mod credentials;
mod download;
mod error;
mod signatures;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};

pub use credentials::Login;
pub use error::RegistryError;

use self::client::{Client, Request};
use crate::digest::Digest;
use crate::document::{
    self, DOCKER_INDEX, DOCKER_MANIFEST, DOCUMENT_MAX, Document, OCI_INDEX, OCI_MANIFEST,
};
use crate::error::Error;
use crate::image::Image;
use crate::progress::Progress;
use crate::reference::{DEFAULT_TAG, Reference};
use crate::signature::{Evidence, Origin, Provenance};
use crate::store::{Arrival, Expected, Store, Work};

/// How to speak to registries.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Speak plain HTTP. Without it only registries on a loopback address may.
    pub plain_http: bool,
    /// Log in with these instead of what Docker's configuration has.
    pub login: Option<Login>,
    /// The folder of Docker's `config.json`; `$DOCKER_CONFIG` or `~/.docker` if not set.
    pub docker_config: Option<PathBuf>,
    /// The folder of further certificate authorities, `HOST[:PORT]/*.crt` in it.
    pub certificates: PathBuf,
    /// Layers that are downloaded at a time.
    pub parallel: usize,
    /// Patience.
    pub network: Network,
}

impl Default for RegistryOptions {
    fn default() -> RegistryOptions {
        RegistryOptions {
            plain_http: false,
            login: None,
            docker_config: None,
            certificates: PathBuf::from("/etc/docker/certs.d"),
            parallel: 4,
            network: Network::default(),
        }
    }
}

/// How long to wait, and how often to try again.
#[derive(Debug, Clone)]
pub struct Network {
    /// For a connection.
    pub connect: Duration,
    /// For the next bytes.
    pub read: Duration,
    /// For a whole answer that is not a layer.
    pub answer: Duration,
    /// A layer that gets slower than `slowest` bytes per `window` is asked for again.
    pub window: Duration,
    /// Bytes per window.
    pub slowest: u64,
    /// Further attempts after one that failed. A layer's are counted anew after each MiB.
    pub retries: u32,
    /// The wait before the first of them; doubled for each further one.
    pub backoff: Duration,
    /// The longest wait that a registry may ask for.
    pub longest: Duration,
}

impl Default for Network {
    fn default() -> Network {
        Network {
            connect: Duration::from_secs(20),
            read: Duration::from_secs(60),
            answer: Duration::from_secs(120),
            window: Duration::from_secs(60),
            slowest: 60 << 10,
            retries: 5,
            backoff: Duration::from_millis(500),
            longest: Duration::from_secs(60),
        }
    }
}

/// Pulls `reference` into the store.
pub(crate) fn pull(
    store: &Store,
    reference: &Reference,
    options: &RegistryOptions,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    // Before anybody is asked.
    store.wants_signature(&Origin::docker(reference))?;
    let work = Work::begin(store)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(RegistryError::Runtime)?;
    runtime.block_on(async {
        let client = Client::connect(reference, options, progress).await?;
        fetch(&work, &client, reference, options.parallel, progress).await
    })
}

async fn fetch(
    work: &Work<'_>,
    client: &Client<'_>,
    reference: &Reference,
    parallel: usize,
    progress: &dyn Progress,
) -> Result<Image, Error> {
    let top = match (reference.digest(), reference.tag()) {
        (Some(digest), _) => digest.to_string(),
        (None, tag) => tag.unwrap_or(DEFAULT_TAG).to_owned(),
    };
    let mut at = top;
    let mut expected: Option<Digest> = reference.digest().copied();
    let mut top_digest = None;
    let mut indexes = Vec::new();
    for _ in 0..3 {
        let what = match expected {
            Some(digest) => format!("manifest {digest} of {}", reference.familiar_name()),
            None => format!("manifest of {reference}"),
        };
        let (bytes, media_type) = manifest(client, &what, &at, expected).await?;
        let digest = Digest::of(&bytes);
        top_digest.get_or_insert(digest);
        let manifest = match document::parse(&what, &media_type, &bytes)? {
            Document::Manifest(manifest) => manifest,
            Document::Index(index) => {
                let chosen =
                    document::select(&format!("image index of {reference}"), &index.manifests)?;
                document::check_size(&what, chosen.size)?;
                at = chosen.digest.to_string();
                expected = Some(chosen.digest);
                // What is read as JSON is text.
                indexes.extend(String::from_utf8(bytes));
                continue;
            }
        };
        // Keep this before anything else that the manifest names.
        let origin = Origin::docker(reference);
        let evidence = match work.store().wants_signature(&origin)? {
            true => signatures::fetch(client, reference, digest, indexes).await?,
            false => Evidence::default(),
        };
        work.store().admit(&origin, digest, &evidence)?;
        let provenance = Provenance { origins: vec![origin], evidence };
        work.hold(&digest)?;
        let what = format!("configuration {} of {reference}", manifest.config.digest);
        let wanted = Expected { digest: manifest.config.digest, size: manifest.config.size };
        let config_bytes = if work.has(&wanted)? {
            work.read(&wanted.digest)?
        } else {
            client.small_blob(&what, &wanted).await?
        };
        document::parse_config(&what, &config_bytes, manifest.layers.len())?;
        let mut seen = BTreeSet::new();
        let layers = manifest.layers.iter().filter(|layer| seen.insert((layer.digest, layer.size)));
        let downloads: Vec<_> = layers
            .map(|layer| {
                let wanted = Expected { digest: layer.digest, size: layer.size };
                download::layer(work, client, reference, wanted, progress)
            })
            .collect();
        futures_util::stream::iter(downloads)
            .buffer_unordered(parallel.max(1))
            .try_collect::<()>()
            .await?;
        work.put(&config_bytes)?;
        let names = match reference.digest() {
            None => vec![reference.clone()],
            Some(_) => Vec::new(),
        };
        let repo_digest = reference.with_digest(top_digest.unwrap_or(digest));
        let media_type = manifest.media_type.clone().unwrap_or(media_type);
        let media_type = if media_type.is_empty() { OCI_MANIFEST } else { &media_type };
        let arrival = Arrival { names, repo_digests: vec![repo_digest], provenance };
        return work.commit(&bytes, media_type, &manifest, arrival);
    }
    let what = format!("image index of {reference}");
    Err(document::DocumentError::Nested { what }.into())
}

/// A manifest or index and its media type.
async fn manifest(
    client: &Client<'_>,
    what: &str,
    at: &str,
    expected: Option<Digest>,
) -> Result<(Vec<u8>, String), Error> {
    let accept = [OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST].join(", ");
    let path = format!("manifests/{at}");
    let request = Request { what, path: &path, accept: Some(&accept), from: None };
    let answer = client.document(&request, DOCUMENT_MAX).await?;
    let found = Digest::of(&answer.bytes);
    // What the registry says of itself must fit, too; it may use another algorithm.
    let said = answer.digest.as_deref().and_then(|text| text.parse::<Digest>().ok());
    if let Some(expected) = expected.or(said)
        && expected != found
    {
        return Err(Error::WrongDigest { what: client.name(what), found, expected });
    }
    Ok((answer.bytes, answer.media_type))
}
