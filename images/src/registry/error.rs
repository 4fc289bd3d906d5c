//! What speaking to a registry fails with.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a registry's image could not be fetched. `what` names the manifest or layer, with its image.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The asynchronous runtime could not be started.
    #[error("cannot start the network runtime: {0}")]
    Runtime(#[source] io::Error),
    /// The HTTP client could not be made.
    #[error(
        "cannot set up HTTPS: {0}; are certificate authorities installed (package ca-certificates)?"
    )]
    Setup(String),
    /// A certificate file.
    #[error("cannot use the certificates in {}: {reason}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Docker's configuration.
    #[error("cannot read credentials from {}: {reason}", path.display())]
    Config {
        /// `config.json`.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A credential helper.
    #[error("credential helper {helper} failed for {registry}: {reason}")]
    Helper {
        /// The program.
        helper: String,
        /// For which registry.
        registry: String,
        /// What it said.
        reason: String,
    },
    /// No answer.
    #[error("{what}: no answer from {host}: {reason}")]
    Connect {
        /// What was asked for.
        what: String,
        /// Host and port.
        host: String,
        /// What the network said.
        reason: String,
    },
    /// The answer broke off, or took too long.
    #[error("{what}: the answer of {host} broke off: {reason}")]
    Broken {
        /// What was asked for.
        what: String,
        /// Host and port.
        host: String,
        /// How.
        reason: String,
    },
    /// The registry is not there, or there is no such image.
    #[error("{what} not found at {registry}: {reason}")]
    NotFound {
        /// What was asked for.
        what: String,
        /// The registry.
        registry: String,
        /// What it said.
        reason: String,
    },
    /// Access was refused.
    #[error("unauthorized: {registry} refuses {what}: {reason}; {hint}")]
    Unauthorized {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// What it said.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// An answer that asks for an unknown or unsafe way to log in.
    #[error("{registry} asks for a login that is not possible: {reason}")]
    Challenge {
        /// The registry.
        registry: String,
        /// Why not.
        reason: String,
    },
    /// Too many requests.
    #[error("{registry} has had too many requests: {what}: {reason}{}", after(.retry_after))]
    TooManyRequests {
        /// The registry.
        registry: String,
        /// What was asked for.
        what: String,
        /// What it said.
        reason: String,
        /// How long it wants us to wait.
        retry_after: Option<Duration>,
    },
    /// Another answer than expected.
    #[error("{what}: {host} answers {status}: {reason}")]
    Status {
        /// What was asked for.
        what: String,
        /// Who answered.
        host: String,
        /// The HTTP status.
        status: u16,
        /// What it said.
        reason: String,
        /// Wait this long before the next attempt, if it said so.
        retry_after: Option<Duration>,
    },
    /// A redirect that is not followed.
    #[error("{what}: {host} redirects {reason}")]
    Redirect {
        /// What was asked for.
        what: String,
        /// Who redirects.
        host: String,
        /// Where to, and why that is refused.
        reason: String,
    },
    /// An answer that announces another length than the manifest.
    #[error("{what}: {host} announces {announced} bytes, expected {expected}")]
    Length {
        /// What was asked for.
        what: String,
        /// Who answered.
        host: String,
        /// By the answer.
        announced: u64,
        /// By the manifest.
        expected: u64,
    },
    /// A document larger than allowed.
    #[error("{what}: {host} sends more than {limit} bytes")]
    TooLarge {
        /// What was asked for.
        what: String,
        /// Who answered.
        host: String,
        /// What is allowed.
        limit: u64,
    },
}

fn after(wait: &Option<Duration>) -> String {
    wait.map_or(String::new(), |wait| format!("; try again in {} s", wait.as_secs()))
}

impl RegistryError {
    /// Whether another attempt may succeed.
    pub(super) fn transient(&self) -> bool {
        match self {
            RegistryError::Connect { .. }
            | RegistryError::Broken { .. }
            | RegistryError::TooManyRequests { .. } => true,
            RegistryError::Status { status, .. } => {
                matches!(*status, 408 | 416 | 500 | 502 | 503 | 504)
            }
            _ => false,
        }
    }

    /// How long the registry asks to wait.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            RegistryError::TooManyRequests { retry_after, .. }
            | RegistryError::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
