//! What is answered to which request.

use std::net::Ipv4Addr;
use std::str;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::http::{Request, Response, Status};
use crate::metrics::MmdsMetrics;
use crate::store::{Format, Store, StoreError};
use crate::token::{TokenAuthority, TokenError};

/// Where the guest finds the service if nothing else is configured.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Where a token is asked for.
const TOKEN_PATH: &str = "/latest/api/token";

/// How the guest is to ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// With or without a session token, even an invalid one.
    #[default]
    V1,
    /// With a session token only.
    V2,
}

/// What of the service is kept in a snapshot. Contents and keys are not, as they belong to one
/// machine, of which a snapshot can make many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MmdsState {
    /// How the guest is to ask.
    pub version: MmdsVersion,
    /// Where it is to ask.
    pub ipv4_address: Ipv4Addr,
    /// Answers are text, as EC2's are, whatever the guest says it accepts.
    pub imds_compat: bool,
}

impl Default for MmdsState {
    fn default() -> MmdsState {
        MmdsState {
            version: MmdsVersion::default(),
            ipv4_address: DEFAULT_ADDRESS,
            imds_compat: false,
        }
    }
}

/// An address at which the service cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a link-local address of 169.254.1.0 to 169.254.254.255")]
pub struct AddressError(pub Ipv4Addr);

/// Whether the service can be at this address: a link-local one that is not reserved (RFC 3927,
/// 2.1).
pub fn check_address(address: Ipv4Addr) -> Result<(), AddressError> {
    match address.octets() {
        [169, 254, 1..=254, _] => Ok(()),
        _ => Err(AddressError(address)),
    }
}

/// The service: what it has to tell, to whom, and in what form. All interfaces of a machine share
/// one.
pub struct Mmds {
    state: MmdsState,
    store: Store,
    tokens: TokenAuthority,
    pub(crate) metrics: MmdsMetrics,
}

impl Mmds {
    /// A service without contents, for so many bytes of JSON. Also after a snapshot was restored:
    /// there are no contents then, and tokens from before are void.
    pub fn new(state: MmdsState, size_limit: usize) -> Result<Mmds, TokenError> {
        let (store, tokens) = (Store::new(size_limit), TokenAuthority::new()?);
        Ok(Mmds { state, store, tokens, metrics: MmdsMetrics::default() })
    }

    /// Changes version, address and format; contents and tokens stay. Interfaces have an address of
    /// their own, that does not follow.
    pub fn configure(&mut self, state: MmdsState) -> Result<(), AddressError> {
        check_address(state.ipv4_address)?;
        self.state = state;
        Ok(())
    }

    /// What is kept in a snapshot.
    pub fn state(&self) -> MmdsState {
        self.state
    }

    /// Replaces the contents (`PUT /mmds`). On an error they stay as they were.
    pub fn put(&mut self, contents: Value) -> Result<(), StoreError> {
        self.store.put(contents)
    }

    /// Merges a patch into the contents (`PATCH /mmds`, RFC 7396). On an error they stay as they
    /// were.
    pub fn patch(&mut self, patch: &Value) -> Result<(), StoreError> {
        self.store.patch(patch)
    }

    /// The contents (`GET /mmds`); an empty object where nothing was put.
    pub fn get(&self) -> Value {
        self.store.get()
    }

    /// What was done, on all interfaces.
    pub fn metrics(&self) -> MmdsMetrics {
        self.metrics
    }

    /// Answers a request of the guest.
    pub(crate) fn respond(&mut self, request: &Request<'_>, now: Duration) -> Response {
        self.metrics.rx_count += 1;
        let is_get = request.method == "GET";
        if !is_get && request.method != "PUT" {
            return Response::text(Status::MethodNotAllowed, "Not allowed HTTP method.")
                .with_header("Allow", "GET, PUT");
        }
        if request.has_body {
            // Nothing here needs one. To read it would leave a client hanging that announces more than
            // it sends.
            return Response::text(Status::BadRequest, "Invalid request: it has a body.");
        }
        if is_get { self.read(request, now) } else { self.new_token(request, now) }
    }

    fn read(&mut self, request: &Request<'_>, now: Duration) -> Response {
        if self.state.version == MmdsVersion::V2 {
            match request.token {
                Some(token) if self.tokens.is_valid(token, now) => {}
                Some(_) => {
                    self.metrics.rx_invalid_token += 1;
                    return Response::text(Status::Unauthorized, "MMDS token not valid.");
                }
                None => {
                    self.metrics.rx_no_token += 1;
                    let reason = "No MMDS token provided. Use `X-metadata-token` or \
                                  `X-aws-ec2-metadata-token` header to specify the session token.";
                    return Response::text(Status::Unauthorized, reason);
                }
            }
        }
        let is_json = request.wants_json && !self.state.imds_compat;
        let format = if is_json { Format::Json } else { Format::Imds };
        match self.store.lookup(request.path, format) {
            Ok(body) => Response { is_json, ..Response::text(Status::Ok, body) },
            Err(error @ StoreError::NotFound(_)) => {
                Response::text(Status::NotFound, error.to_string())
            }
            Err(error) => Response::text(Status::NotImplemented, error.to_string()),
        }
    }

    fn new_token(&mut self, request: &Request<'_>, now: Duration) -> Response {
        let bad = |reason: String| Response::text(Status::BadRequest, reason);
        // A proxy that passes on what it is asked to is not to get a token for whoever asked it.
        if let Some(name) = request.forwarded {
            return bad(format!("Invalid header. Reason: Unsupported header name. Key: {name}"));
        }
        if request.path != TOKEN_PATH {
            let error = StoreError::NotFound(request.path.to_owned());
            return Response::text(Status::NotFound, error.to_string());
        }
        let Some((name, value)) = request.token_ttl else {
            return bad(
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                        `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's \
                        lifetime."
                    .to_owned(),
            );
        };
        let Some(ttl) = str::from_utf8(value).ok().and_then(|text| text.parse().ok()) else {
            let value = String::from_utf8_lossy(value);
            return bad(format!(
                "Invalid header. Reason: Invalid value. Key: {name}; Value: {value}"
            ));
        };
        match self.tokens.issue(ttl, now) {
            // EC2 repeats how long the token lives, and its SDKs look for it.
            Ok(token) => Response::text(Status::Ok, token).with_header(name, ttl.to_string()),
            Err(error @ TokenError::Ttl(_)) => bad(error.to_string()),
            Err(error) => Response::text(Status::InternalServerError, error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::DEFAULT_SIZE_LIMIT;

    const NOW: Duration = Duration::from_secs(77);
    const TTL: &str = "X-metadata-token-ttl-seconds";

    fn service(version: MmdsVersion, imds_compat: bool) -> Mmds {
        let state = MmdsState { version, imds_compat, ..MmdsState::default() };
        let mut mmds = Mmds::new(state, DEFAULT_SIZE_LIMIT).unwrap();
        mmds.put(json!({"text": "value", "object": {"number": 5}})).unwrap();
        mmds
    }

    fn get(path: &str) -> Request<'_> {
        Request { method: "GET", path, ..Request::default() }
    }

    fn put_token(ttl: &'static str) -> Request<'static> {
        let token_ttl = Some((TTL, ttl.as_bytes()));
        Request { method: "PUT", path: TOKEN_PATH, token_ttl, ..Request::default() }
    }

    fn assert_answer(response: Response, status: Status, body: &str) {
        assert_eq!((response.status, response.body.as_str()), (status, body));
    }

    #[test]
    fn version_1_answers_with_any_token_or_none() {
        let mut mmds = service(MmdsVersion::V1, false);
        assert_answer(mmds.respond(&get("/text"), NOW), Status::Ok, "value");
        let request = Request { token: Some(b"invalid"), ..get("/text") };
        assert_answer(mmds.respond(&request, NOW), Status::Ok, "value");
        let token = mmds.respond(&put_token("60"), NOW);
        assert_eq!(token.status, Status::Ok);
        let request = Request { token: Some(token.body.as_bytes()), ..get("/text") };
        assert_answer(mmds.respond(&request, NOW), Status::Ok, "value");
    }

    #[test]
    fn version_2_answers_with_a_valid_token_only() {
        let mut mmds = service(MmdsVersion::V2, false);
        assert_answer(
            mmds.respond(&get("/text"), NOW),
            Status::Unauthorized,
            "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header \
             to specify the session token.",
        );
        let request = Request { token: Some(b"invalid"), ..get("/text") };
        let invalid = "MMDS token not valid.";
        assert_answer(mmds.respond(&request, NOW), Status::Unauthorized, invalid);
        let token = mmds.respond(&put_token("60"), NOW);
        assert_eq!(token.status, Status::Ok);
        assert_eq!(token.header, Some((TTL, "60".into())));
        let request = Request { token: Some(token.body.as_bytes()), ..get("/text") };
        assert_answer(mmds.respond(&request, NOW), Status::Ok, "value");
        let late = NOW + Duration::from_secs(60);
        assert_answer(mmds.respond(&request, late), Status::Unauthorized, invalid);
    }

    #[test]
    fn a_restored_service_has_its_configuration_and_neither_contents_nor_tokens() {
        let mut mmds = service(MmdsVersion::V2, true);
        let token = mmds.respond(&put_token("60"), NOW).body;
        let saved = serde_json::to_string(&mmds.state()).unwrap();
        assert!(!saved.contains("value"), "{saved}");
        let state = serde_json::from_str(&saved).unwrap();
        let mut restored = Mmds::new(state, DEFAULT_SIZE_LIMIT).unwrap();
        assert_eq!(restored.state(), mmds.state());
        assert_eq!(restored.get(), json!({}));
        let request = Request { token: Some(token.as_bytes()), ..get("/") };
        assert_eq!(restored.respond(&request, NOW).status, Status::Unauthorized);
        assert_eq!(mmds.respond(&request, NOW).status, Status::Ok);
        let token = restored.respond(&put_token("60"), NOW).body;
        let request = Request { token: Some(token.as_bytes()), ..get("/") };
        assert_answer(
            restored.respond(&request, NOW),
            Status::NotImplemented,
            "Cannot retrieve value. The value has an unsupported type.",
        );
    }

    #[test]
    fn json_is_given_to_who_wants_it_unless_answers_are_as_ec2s() {
        for (imds_compat, body) in [(false, "{\"number\":5}"), (true, "number")] {
            let mut mmds = service(MmdsVersion::V1, imds_compat);
            let response = mmds.respond(&Request { wants_json: true, ..get("/object") }, NOW);
            assert_eq!(response.is_json, !imds_compat);
            assert_answer(response, Status::Ok, body);
        }
    }

    #[test]
    fn what_is_not_there_or_has_no_text_is_refused_in_text() {
        let mut mmds = service(MmdsVersion::V1, false);
        let response = mmds.respond(&Request { wants_json: true, ..get("/nope") }, NOW);
        assert!(!response.is_json);
        assert_answer(response, Status::NotFound, "Resource not found: /nope.");
        assert_answer(
            mmds.respond(&get("/object/number"), NOW),
            Status::NotImplemented,
            "Cannot retrieve value. The value has an unsupported type.",
        );
    }

    #[test]
    fn a_token_is_given_only_where_all_is_right() {
        for version in [MmdsVersion::V1, MmdsVersion::V2] {
            let mut mmds = service(version, false);
            let mut refused = |request: Request<'_>, status, body: &str| {
                assert_answer(mmds.respond(&request, NOW), status, body);
            };
            let bad = Status::BadRequest;
            for ttl in ["0", "21601"] {
                let body = format!(
                    "Invalid time to live value provided for token: {ttl}. \
                     Please provide a value between 1 and 21600."
                );
                refused(put_token(ttl), bad, &body);
            }
            for ttl in ["", "-1", "1.5", "application/json", "99999999999"] {
                let body = format!(
                    "Invalid header. Reason: Invalid value. \
                     Key: X-metadata-token-ttl-seconds; Value: {ttl}"
                );
                refused(put_token(ttl), bad, &body);
            }
            refused(
                Request { token_ttl: None, ..put_token("1") },
                bad,
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                 `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
            );
            refused(
                Request { forwarded: Some("X-Forwarded-For"), ..put_token("1") },
                bad,
                "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For",
            );
            refused(
                Request { path: "/latest/api/toke", ..put_token("1") },
                Status::NotFound,
                "Resource not found: /latest/api/toke.",
            );
        }
    }

    #[test]
    fn the_service_has_a_link_local_address() {
        let mut mmds = service(MmdsVersion::V1, false);
        for good in [[169, 254, 1, 0], [169, 254, 254, 255], [169, 254, 170, 2]] {
            let state = MmdsState { ipv4_address: good.into(), ..mmds.state() };
            assert_eq!(mmds.configure(state), Ok(()));
            assert_eq!(mmds.state().ipv4_address, Ipv4Addr::from(good));
        }
        for bad in [[1, 1, 1, 1], [169, 254, 0, 1], [169, 254, 255, 1], [0, 0, 0, 0]] {
            let state = MmdsState { ipv4_address: bad.into(), ..mmds.state() };
            assert_eq!(mmds.configure(state), Err(AddressError(bad.into())));
        }
        assert_eq!(mmds.state().ipv4_address, Ipv4Addr::new(169, 254, 170, 2));
    }

    #[test]
    fn what_a_snapshot_does_not_say_is_the_default() {
        assert_eq!(serde_json::from_str::<MmdsState>("{}").unwrap(), MmdsState::default());
        let state: MmdsState = serde_json::from_str("{\"version\":\"V2\"}").unwrap();
        assert_eq!(state.version, MmdsVersion::V2);
    }
}
