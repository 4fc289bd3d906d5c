//! Requests to one repository of a registry: redirects, log-in, retries.

use std::cell::{OnceCell, RefCell};
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION, RANGE, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use reqwest::{Certificate, Method, Response, StatusCode, Url};
use serde::Deserialize;

use super::auth::{self, Challenge};
use super::credentials::{self, Login};
use super::error::RegistryError;
use super::{Network, RegistryOptions};
use crate::digest::Digest;
use crate::error::{Error, one_line};
use crate::progress::Progress;
use crate::reference::Reference;
use crate::store::Expected;

/// Redirects for one request.
const REDIRECTS_MAX: usize = 10;
/// Log-ins for one request: one when none is known, one when it has expired.
const LOGINS_MAX: usize = 2;
/// Bytes of an answer that is only shown.
const MESSAGE_MAX: usize = 8 << 10;
/// Bytes of a token server's answer.
const TOKEN_MAX: u64 = 1 << 20;

/// A request to the repository.
pub(super) struct Request<'r> {
    /// What is asked for, for messages.
    pub what: &'r str,
    /// Below the repository: `manifests/latest`.
    pub path: &'r str,
    pub accept: Option<&'r str>,
    /// The first byte that is asked for.
    pub from: Option<u64>,
}

/// A small answer.
pub(super) struct Answer {
    pub bytes: Vec<u8>,
    pub media_type: String,
    /// `Docker-Content-Digest`.
    pub digest: Option<String>,
}

/// Speaks to one repository.
pub(super) struct Client<'a> {
    http: reqwest::Client,
    /// `https://HOST/v2/REPOSITORY/`.
    base: Url,
    /// The image, for messages.
    title: String,
    registry: String,
    repository: String,
    options: &'a RegistryOptions,
    login: OnceCell<Option<Login>>,
    /// What the registry is shown.
    authorization: RefCell<Option<HeaderValue>>,
    progress: &'a dyn Progress,
}

impl<'a> Client<'a> {
    /// Finds out how to speak to the registry of `reference`.
    pub(super) async fn connect(
        reference: &Reference,
        options: &'a RegistryOptions,
        progress: &'a dyn Progress,
    ) -> Result<Client<'a>, RegistryError> {
        let registry = reference.registry();
        let host = match registry {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        let repository = reference.repository();
        let base = |scheme: &str| {
            let url = Url::parse(&format!("{scheme}://{host}/v2/{repository}/"));
            url.map_err(|error| RegistryError::Setup(format!("{host}: {error}")))
        };
        let secure = base("https")?;
        let local = is_loopback(&secure);
        let http = build(registry, local, options)?;
        let mut client = Client {
            http,
            base: secure,
            title: reference.to_string(),
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            options,
            login: OnceCell::new(),
            authorization: RefCell::default(),
            progress,
        };
        if options.plain_http || (local && client.speaks_plain(&base("http")?).await?) {
            client.base = base("http")?;
        }
        Ok(client)
    }

    /// A name for messages: `manifest of alpine at docker.io`.
    pub(super) fn name(&self, what: &str) -> String {
        format!("{what} at {}", self.registry)
    }

    pub(super) fn network(&self) -> &Network {
        &self.options.network
    }

    /// Whether a registry on a loopback address speaks plain HTTP. A server for HTTPS answers with
    /// status 400 (Go's) or hangs up.
    async fn speaks_plain(&self, base: &Url) -> Result<bool, RegistryError> {
        let url = base.join("/v2/").map_err(|e| RegistryError::Setup(e.to_string()))?;
        match self.timed(self.http.get(url.clone()).send()).await {
            Ok(Ok(answer)) => Ok(answer.status() != StatusCode::BAD_REQUEST),
            Ok(Err(error)) if error.is_connect() => {
                Err(self.connect_error(&self.title, &url, &error))
            }
            _ => Ok(false),
        }
    }

    async fn timed<T>(&self, future: impl Future<Output = T>) -> Result<T, RegistryError> {
        let limit = self.network().answer;
        tokio::time::timeout(limit, future).await.map_err(|_| RegistryError::Broken {
            what: self.title.clone(),
            host: self.registry.clone(),
            reason: format!("it took longer than {} s", limit.as_secs()),
        })
    }

    fn connect_error(&self, what: &str, url: &Url, error: &reqwest::Error) -> RegistryError {
        let (what, host, reason) = (what.to_owned(), authority(url), causes(error));
        if error.is_connect() || error.is_request() {
            return RegistryError::Connect { what, host, reason };
        }
        RegistryError::Broken { what, host, reason }
    }

    /// A document of at most `limit` bytes, tried again where that may help.
    pub(super) async fn document(
        &self,
        request: &Request<'_>,
        limit: u64,
    ) -> Result<Answer, RegistryError> {
        self.retrying(async || {
            self.timed(async {
                let response = self.get(request).await?;
                let text = |name: &str| {
                    let value = response.headers().get(name)?.to_str().ok()?;
                    Some(value.to_owned())
                };
                let media_type = text(CONTENT_TYPE.as_str()).unwrap_or_default();
                let digest = text("docker-content-digest");
                let bytes = self.body(request.what, response, limit).await?;
                Ok(Answer { bytes, media_type, digest })
            })
            .await?
        })
        .await
    }

    /// A small blob, checked.
    pub(super) async fn small_blob(&self, what: &str, wanted: &Expected) -> Result<Vec<u8>, Error> {
        let path = format!("blobs/{}", wanted.digest);
        let request = Request { what, path: &path, accept: None, from: None };
        let bytes = self.document(&request, wanted.size).await?.bytes;
        if bytes.len() as u64 != wanted.size {
            let (found, expected) = (bytes.len() as u64, wanted.size);
            return Err(Error::WrongSize { what: self.name(what), found, expected });
        }
        let found = Digest::of(&bytes);
        if found != wanted.digest {
            let expected = wanted.digest;
            return Err(Error::WrongDigest { what: self.name(what), found, expected });
        }
        Ok(bytes)
    }

    /// Runs `attempt` until it succeeds, fails for good, or has failed too often.
    async fn retrying<T>(
        &self,
        attempt: impl AsyncFn() -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let mut failures = 0;
        loop {
            match attempt().await {
                Ok(done) => return Ok(done),
                Err(error) => {
                    failures += 1;
                    self.pause(error, failures).await?;
                }
            }
        }
    }

    /// Waits before the next attempt after the given number of failures; the error if there is to
    /// be none.
    pub(super) async fn pause(
        &self,
        error: RegistryError,
        failures: u32,
    ) -> Result<(), RegistryError> {
        let network = self.network();
        // Nobody listens there; waiting seldom helps, and a wrong name should be told at once.
        let refused = matches!(&error, RegistryError::Connect { .. }) && failures > 2;
        if !error.transient() || failures > network.retries || refused {
            return Err(error);
        }
        let doubled = network.backoff.saturating_mul(1 << (failures - 1).min(16));
        let wait = match error.retry_after() {
            Some(asked) if asked > network.longest => return Err(error),
            Some(asked) => asked.max(doubled),
            None => doubled,
        };
        let wait = wait.min(network.longest);
        self.progress.message(&format!("{error}; trying again in {:.1} s", wait.as_secs_f32()));
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// Sends a request, follows its redirects and logs in where that is asked for. The answer is a
    /// success.
    pub(super) async fn get(&self, request: &Request<'_>) -> Result<Response, RegistryError> {
        let url = self.base.join(request.path);
        let url = url.map_err(|error| RegistryError::Setup(error.to_string()))?;
        let mut headers = HeaderMap::new();
        if let Some(accept) = request.accept.and_then(|a| HeaderValue::from_str(a).ok()) {
            headers.insert(ACCEPT, accept);
        }
        if let Some(from) = request.from
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={from}-"))
        {
            headers.insert(RANGE, range);
        }
        let mut logins = 0;
        loop {
            let authorization = self.authorization.borrow().clone();
            let sent = Sent {
                what: request.what,
                method: Method::GET,
                url: url.clone(),
                headers: headers.clone(),
                body: None,
                authorization: authorization.clone(),
            };
            let response = self.send(sent).await?;
            let ours = same_origin(response.url(), &self.base);
            if response.status() == StatusCode::UNAUTHORIZED && ours && logins < LOGINS_MAX {
                logins += 1;
                // Another download may have logged in meanwhile.
                if *self.authorization.borrow() == authorization {
                    self.log_in(request.what, &response).await?;
                }
                continue;
            }
            return self.checked(request.what, response).await;
        }
    }

    /// The answer if it is a success, else the error it tells.
    async fn checked(&self, what: &str, response: Response) -> Result<Response, RegistryError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let (what, host) = (what.to_owned(), authority(response.url()));
        let registry = self.registry.clone();
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok());
        // A date instead of seconds is not looked at; the usual wait is taken.
        let retry_after = retry_after.and_then(|v| v.trim().parse().ok()).map(Duration::from_secs);
        let reason = self.message(response).await;
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let known = matches!(self.login.get(), Some(Some(_)));
                let hint = if known {
                    format!("the credentials for {registry} do not give access")
                } else {
                    format!("if it exists, log in: `docker login {registry}`")
                };
                RegistryError::Unauthorized { registry, what, reason, hint }
            }
            StatusCode::NOT_FOUND => RegistryError::NotFound { what, registry, reason },
            StatusCode::TOO_MANY_REQUESTS => {
                RegistryError::TooManyRequests { registry, what, reason, retry_after }
            }
            status => {
                let status = status.as_u16();
                RegistryError::Status { what, host, status, reason, retry_after }
            }
        })
    }

    /// What an answer that is an error says (OCI distribution specification, "Error Codes").
    async fn message(&self, mut response: Response) -> String {
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<Item>,
        }
        #[derive(Deserialize)]
        struct Item {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        let status = response.status();
        let mut bytes = Vec::new();
        let read = async {
            while let Ok(Some(chunk)) = response.chunk().await {
                bytes.extend_from_slice(&chunk);
                if bytes.len() > MESSAGE_MAX {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(self.network().read, read).await;
        let text = match serde_json::from_slice::<Errors>(&bytes) {
            Ok(errors) => {
                let first = errors.errors.into_iter().next();
                first.map(|e| if e.message.is_empty() { e.code } else { e.message })
            }
            Err(_) => None,
        };
        let text = text.unwrap_or_default();
        // It goes to a terminal: no control characters, not too long.
        let text: String = text.chars().filter(|c| !c.is_control()).take(300).collect();
        match text.is_empty() {
            false => text,
            true => status.canonical_reason().unwrap_or("no reason given").to_lowercase(),
        }
    }

    /// The body of an answer, of at most `limit` bytes.
    async fn body(
        &self,
        what: &str,
        mut response: Response,
        limit: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let host = authority(response.url());
        let url = response.url().clone();
        let too_large =
            || RegistryError::TooLarge { what: what.to_owned(), host: host.clone(), limit };
        if response.content_length().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        loop {
            match response.chunk().await {
                Ok(None) => return Ok(bytes),
                Ok(Some(chunk)) => {
                    bytes.extend_from_slice(&chunk);
                    if bytes.len() as u64 > limit {
                        return Err(too_large());
                    }
                }
                Err(error) => return Err(self.connect_error(what, &url, &error)),
            }
        }
    }

    /// Sends a request and follows redirects. The credentials stay with the first server.
    async fn send(&self, sent: Sent<'_>) -> Result<Response, RegistryError> {
        let Sent { what, method, mut url, headers, body, authorization } = sent;
        let first = url.clone();
        for _ in 0..=REDIRECTS_MAX {
            let mut request =
                self.http.request(method.clone(), url.clone()).headers(headers.clone());
            if let Some(authorization) = &authorization
                && same_origin(&url, &first)
            {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            if let Some(body) = &body {
                request = request
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(body.clone());
            }
            let response = request.send().await.map_err(|e| self.connect_error(what, &url, &e))?;
            // The body of another kind of redirect is not to be sent again, or is not a redirect.
            let moved = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            if !moved {
                return Ok(response);
            }
            let refuse = |reason: String| RegistryError::Redirect {
                what: what.to_owned(),
                host: authority(response.url()),
                reason,
            };
            if method != Method::GET {
                return Err(refuse("a log-in, which is not followed".into()));
            }
            let target = response.headers().get(LOCATION).and_then(|v| v.to_str().ok());
            let target = target.and_then(|target| url.join(target).ok());
            let target = target.ok_or_else(|| refuse("to nowhere".into()))?;
            let safe = match target.scheme() {
                "https" => true,
                // Not from a safe place to an unsafe one.
                "http" => url.scheme() == "http",
                _ => false,
            };
            if !safe || target.host().is_none() {
                let (scheme, host) = (target.scheme(), authority(&target));
                return Err(refuse(format!("to {scheme}://{host}, which is not safe")));
            }
            url = target;
        }
        Err(RegistryError::Redirect {
            what: what.to_owned(),
            host: authority(&first),
            reason: format!("more than {REDIRECTS_MAX} times"),
        })
    }

    /// Answers the challenge of a 401.
    async fn log_in(&self, what: &str, response: &Response) -> Result<(), RegistryError> {
        let headers = response.headers().get_all(WWW_AUTHENTICATE).iter();
        let challenges: Vec<Challenge> =
            headers.filter_map(|v| v.to_str().ok()).flat_map(auth::parse).collect();
        let login = self.login()?;
        let bearer = challenges.iter().find_map(|challenge| match challenge {
            Challenge::Bearer { realm, service, scope } => Some((realm, service, scope)),
            Challenge::Basic => None,
        });
        let header = if let Some((realm, service, scope)) = bearer {
            format!("Bearer {}", self.token(what, realm, service, scope, login).await?)
        } else if challenges.contains(&Challenge::Basic) {
            match login {
                Some(Login::Password { user, password }) => basic(user, password),
                // The second 401 becomes the error.
                _ => return Ok(()),
            }
        } else {
            return Err(RegistryError::Challenge {
                registry: self.registry.clone(),
                reason: "it names neither Basic nor Bearer".into(),
            });
        };
        *self.authorization.borrow_mut() = Some(self.secret(&header)?);
        Ok(())
    }

    fn secret(&self, text: &str) -> Result<HeaderValue, RegistryError> {
        let mut value = HeaderValue::from_str(text).map_err(|_| RegistryError::Challenge {
            registry: self.registry.clone(),
            reason: "the credentials or token have characters that no header may have".into(),
        })?;
        value.set_sensitive(true);
        Ok(value)
    }

    fn login(&self) -> Result<&Option<Login>, RegistryError> {
        if let Some(login) = self.login.get() {
            return Ok(login);
        }
        let found = match &self.options.login {
            Some(login) => Some(login.clone()),
            None => credentials::find(self.options.docker_config.as_deref(), &self.registry)?,
        };
        Ok(self.login.get_or_init(|| found))
    }

    /// A token to pull with (distribution project: "Token Authentication Specification", "OAuth2").
    async fn token(
        &self,
        what: &str,
        realm: &str,
        service: &Option<String>,
        scope: &Option<String>,
        login: &Option<Login>,
    ) -> Result<String, RegistryError> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let bad =
            |reason: String| RegistryError::Challenge { registry: self.registry.clone(), reason };
        let mut url = Url::parse(realm).map_err(|error| bad(format!("{realm:?}: {error}")))?;
        let safe =
            url.scheme() == "https" || (url.scheme() == "http" && self.base.scheme() == "http");
        if !safe {
            return Err(bad(format!("its token server {realm:?} is not reached by HTTPS")));
        }
        let own = format!("repository:{}:pull", self.repository);
        let scope = scope.as_deref().unwrap_or(&own);
        let mut sent = Sent {
            what,
            method: Method::GET,
            url: url.clone(),
            headers: HeaderMap::new(),
            body: None,
            authorization: None,
        };
        if let Some(Login::IdentityToken(token)) = login {
            let mut form = Url::parse("http://form").map_err(|error| bad(error.to_string()))?;
            form.query_pairs_mut()
                .append_pair("grant_type", "refresh_token")
                .append_pair("service", service.as_deref().unwrap_or_default())
                .append_pair("scope", scope)
                .append_pair("client_id", "vmrun")
                .append_pair("refresh_token", token);
            sent.method = Method::POST;
            sent.body = form.query().map(str::to_owned);
        } else {
            {
                let mut query = url.query_pairs_mut();
                if let Some(service) = service {
                    query.append_pair("service", service);
                }
                query.append_pair("scope", scope);
            }
            sent.url = url;
            if let Some(Login::Password { user, password }) = login {
                sent.authorization = Some(self.secret(&basic(user, password))?);
            }
        }
        let response = self.checked(what, self.send(sent).await?).await?;
        let bytes = self.body(what, response, TOKEN_MAX).await?;
        let token: Token = serde_json::from_slice(&bytes)
            .map_err(|_| bad(format!("the answer of {realm:?} is not a token")))?;
        let token = token.token.or(token.access_token).filter(|token| !token.is_empty());
        token.ok_or_else(|| bad(format!("the answer of {realm:?} has no token")))
    }
}

/// What goes out.
struct Sent<'s> {
    what: &'s str,
    method: Method,
    url: Url,
    headers: HeaderMap,
    body: Option<String>,
    authorization: Option<HeaderValue>,
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

fn same_origin(a: &Url, b: &Url) -> bool {
    (a.scheme(), a.host(), a.port_or_known_default())
        == (b.scheme(), b.host(), b.port_or_known_default())
}

/// Host and port, for messages.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or(host.to_owned(), |port| format!("{host}:{port}"))
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// An error with what caused it, without the URL, whose query may hold a secret.
fn causes(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut resolved = true;
    let mut next: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = next {
        let part = error.to_string();
        resolved &= part != "dns error";
        // Hyper's own frame around the cause says nothing to a user.
        if !part.starts_with("client error") && !text.ends_with(&part) {
            let colon = if text.is_empty() { "" } else { ": " };
            text.push_str(colon);
            text.push_str(&part);
        }
        next = error.source();
    }
    if !resolved {
        return "its name cannot be resolved; check it, and the network".to_owned();
    }
    if text.is_empty() && error.is_timeout() {
        text.push_str("it takes too long");
    }
    if text.is_empty() {
        text.push_str("the connection failed");
    }
    one_line(&text)
}

fn build(
    registry: &str,
    local: bool,
    options: &RegistryOptions,
) -> Result<reqwest::Client, RegistryError> {
    // Somebody else in this process may have chosen one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = || {
        let builder = reqwest::Client::builder()
            .user_agent(concat!("vmrun/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .connect_timeout(options.network.connect)
            .read_timeout(options.network.read)
            .referer(false)
            .http1_only();
        // A proxy cannot reach this machine's loopback.
        if local { builder.no_proxy() } else { builder }
    };
    let extra = certificates(&options.certificates.join(registry))?;
    let merged =
        if extra.is_empty() { builder() } else { builder().tls_certs_merge(extra.clone()) };
    match merged.build() {
        Ok(client) => Ok(client),
        // Without any certificate authority on this machine plain HTTP still works.
        Err(_) if local || options.plain_http => {
            builder().tls_certs_only(extra).build().map_err(|e| RegistryError::Setup(causes(&e)))
        }
        Err(error) => Err(RegistryError::Setup(causes(&error))),
    }
}

/// The certificate authorities in `folder/*.crt`, as Docker has them per registry.
fn certificates(folder: &Path) -> Result<Vec<Certificate>, RegistryError> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.extension().is_some_and(|extension| extension == "crt") {
            let bad = |reason: String| RegistryError::Certificates { path: path.clone(), reason };
            let bytes = std::fs::read(&path).map_err(|error| bad(error.to_string()))?;
            let bundle = Certificate::from_pem_bundle(&bytes).map_err(|e| bad(causes(&e)))?;
            found.extend(bundle);
        }
    }
    Ok(found)
}
