//! Credentials from Docker's `config.json` (Docker CLI reference, "Configuration files";
//! docker-credential-helpers protocol).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::error::RegistryError;

/// The largest configuration, and the largest answer of a helper.
const FILE_MAX: u64 = 4 << 20;
/// Docker Hub's key in the configuration.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// How to log in.
#[derive(Clone, PartialEq, Eq)]
pub enum Login {
    /// A name and a password (or access token in its place).
    Password {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// A refresh token, exchanged at the token server.
    IdentityToken(String),
}

impl std::fmt::Debug for Login {
    /// Without the secret, so that it gets into no log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Login::Password { user, .. } => write!(f, "Password({user:?})"),
            Login::IdentityToken(_) => f.write_str("IdentityToken"),
        }
    }
}

#[derive(Default, Deserialize)]
struct Config {
    #[serde(default)]
    auths: Option<BTreeMap<String, Auth>>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
    #[serde(default, rename = "credHelpers")]
    helpers: Option<BTreeMap<String, String>>,
}

#[derive(Default, Deserialize)]
struct Auth {
    #[serde(default)]
    auth: Option<String>,
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    password: Option<String>,
    #[serde(default)]
    identitytoken: Option<String>,
}

/// What a helper prints.
#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username", default)]
    user: String,
    #[serde(rename = "Secret", default)]
    secret: String,
}

/// The folder of `config.json`, if there is one.
fn folder(given: Option<&Path>) -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    given
        .map(Path::to_owned)
        .or_else(|| set("DOCKER_CONFIG").map(PathBuf::from))
        .or_else(|| set("HOME").map(|home| Path::new(&home).join(".docker")))
}

/// What Docker's configuration has for `registry`.
pub(super) fn find(given: Option<&Path>, registry: &str) -> Result<Option<Login>, RegistryError> {
    let Some(path) = folder(given).map(|folder| folder.join("config.json")) else {
        return Ok(None);
    };
    let bad = |reason: String| RegistryError::Config { path: path.clone(), reason };
    let mut text = Vec::new();
    match File::open(&path) {
        Ok(file) => {
            file.take(FILE_MAX).read_to_end(&mut text).map_err(|error| bad(error.to_string()))?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(error.to_string())),
    };
    let config: Config = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    lookup(&config, registry, &mut |helper, server| ask_helper(helper, server, registry)).map_err(
        |problem| match problem {
            Problem::Config(reason) => bad(reason),
            Problem::Helper(error) => error,
        },
    )
}

enum Problem {
    Config(String),
    Helper(RegistryError),
}

type Ask<'a> = &'a mut dyn FnMut(&str, &str) -> Result<Option<Login>, RegistryError>;

fn lookup(config: &Config, registry: &str, ask: Ask<'_>) -> Result<Option<Login>, Problem> {
    let hub = registry == "docker.io";
    let server = if hub { HUB_KEY } else { registry };
    let same = |key: &str| {
        key == server
            || host_of(key) == registry
            || (hub && matches!(host_of(key), "index.docker.io" | "registry-1.docker.io"))
    };
    let helper = config.helpers.iter().flatten().find(|(key, _)| same(key));
    let helper = helper.map(|(_, helper)| helper).or(config.store.as_ref());
    if let Some(helper) = helper.filter(|helper| !helper.is_empty())
        && let Some(login) = ask(helper, server).map_err(Problem::Helper)?
    {
        return Ok(Some(login));
    }
    // An exact key is better than one with a scheme or path.
    let mut found = config.auths.iter().flatten().filter(|(key, _)| same(key));
    let exact = found.clone().find(|(key, _)| key.as_str() == server);
    match exact.or_else(|| found.next()) {
        None => Ok(None),
        Some((key, auth)) => decode(key, auth).map_err(Problem::Config),
    }
}

/// The host of a key, which may be a URL.
fn host_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

fn decode(key: &str, auth: &Auth) -> Result<Option<Login>, String> {
    if let Some(token) = auth.identitytoken.as_ref().filter(|token| !token.is_empty()) {
        return Ok(Some(Login::IdentityToken(token.clone())));
    }
    if let Some(encoded) = auth.auth.as_ref().filter(|auth| !auth.is_empty()) {
        let text = STANDARD.decode(encoded).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let Some((user, password)) = text.as_deref().and_then(|text| text.split_once(':')) else {
            return Err(format!("\"auth\" of {key:?} is not USER:PASSWORD in base64"));
        };
        // Docker pads passwords with NULs.
        let password = password.trim_end_matches('\0').to_owned();
        return Ok(Some(Login::Password { user: user.to_owned(), password }));
    }
    match (&auth.username, &auth.password) {
        (Some(user), Some(password)) => {
            Ok(Some(Login::Password { user: user.clone(), password: password.clone() }))
        }
        // `docker login` with a credential store leaves an empty entry.
        _ => Ok(None),
    }
}

/// Asks `docker-credential-HELPER get`.
fn ask_helper(helper: &str, server: &str, registry: &str) -> Result<Option<Login>, RegistryError> {
    let program = format!("docker-credential-{helper}");
    let bad = |reason: String| RegistryError::Helper {
        helper: program.clone(),
        registry: registry.to_owned(),
        reason,
    };
    if !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(bad("it has no valid name".into()));
    }
    let spawned = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = spawned.map_err(|error| bad(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that ends without reading is told by its status.
        let _ = stdin.write_all(server.as_bytes());
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(FILE_MAX).read_to_end(&mut output).map_err(|error| bad(error.to_string()))?;
    }
    let status = child.wait().map_err(|error| bad(error.to_string()))?;
    if !status.success() {
        let text = String::from_utf8_lossy(&output);
        // The protocol's way to say that there are none.
        if text.contains("credentials not found") {
            return Ok(None);
        }
        let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        return Err(bad(format!("{status}: {text}")));
    }
    let answer: Answer =
        serde_json::from_slice(&output).map_err(|_| bad("its answer is not JSON".into()))?;
    Ok(Some(match answer.user.as_str() {
        "<token>" => Login::IdentityToken(answer.secret),
        _ => Login::Password { user: answer.user, password: answer.secret },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(config: &str, registry: &str) -> Option<Login> {
        let config = serde_json::from_str(config).unwrap();
        let mut ask = |helper: &str, server: &str| {
            let known = (helper, server) == ("good", "h:5") || server == HUB_KEY;
            Ok(known.then(|| Login::IdentityToken(format!("{helper} {server}"))))
        };
        lookup(&config, registry, &mut ask).ok().unwrap()
    }

    fn password(user: &str, password: &str) -> Option<Login> {
        Some(Login::Password { user: user.into(), password: password.into() })
    }

    #[test]
    fn every_form_of_credentials_is_found() {
        // "ada:secret word" in base64.
        let auths = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"YWRhOnNlY3JldCB3b3Jk"},
            "https://a.b/v2/":{"username":"u","password":"p"},"c.d":{"identitytoken":"t"},"e.f":{}}}"#;
        assert_eq!(look(auths, "docker.io"), password("ada", "secret word"));
        assert_eq!(look(auths, "a.b"), password("u", "p"));
        assert_eq!(look(auths, "c.d"), Some(Login::IdentityToken("t".into())));
        assert_eq!(look(auths, "e.f"), None);
        assert_eq!(look(auths, "x.y"), None);
        assert_eq!(look("{}", "x.y"), None);
        let helpers = r#"{"credHelpers":{"h:5":"good","i:5":"bad"},"credsStore":"all",
            "auths":{"i:5":{"username":"u","password":"p"}}}"#;
        assert_eq!(look(helpers, "h:5"), Some(Login::IdentityToken("good h:5".into())));
        assert_eq!(look(helpers, "i:5"), password("u", "p"));
        let hub = Some(Login::IdentityToken(format!("all {HUB_KEY}")));
        assert_eq!(look(helpers, "docker.io"), hub);
        // Another registry on the same host is another registry.
        assert_eq!(look(helpers, "h:6"), None);
    }

    #[test]
    fn damaged_configurations_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        assert_eq!(find(Some(folder.path()), "a.b").unwrap(), None);
        for bad in ["", "[1]", r#"{"auths":{"a.b":{"auth":"!"}}}"#, r#"{"credsStore":"../../x"}"#] {
            std::fs::write(&path, bad).unwrap();
            assert!(find(Some(folder.path()), "a.b").is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let login = Login::Password { user: "ada".into(), password: "hidden".into() };
        assert!(!format!("{login:?}").contains("hidden"));
    }
}
