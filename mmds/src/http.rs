//! HTTP/1.0 and 1.1 (RFC 9112), as much of it as a metadata service needs: requests have no body,
//! and answers are short enough to be sent from memory.

use std::time::Duration;

use httparse::Status::{Complete, Partial};

use crate::Mmds;

/// Bytes of the longest request.
pub const MAX_REQUEST: usize = 8192;
/// Headers of a request, at most.
const MAX_HEADERS: usize = 64;

/// A request, as far as it matters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request<'a> {
    /// `GET`, `PUT`, ...
    pub method: &'a str,
    /// What is asked for, without scheme and host where these were given.
    pub path: &'a str,
    /// JSON is preferred to text.
    pub wants_json: bool,
    /// The session token.
    pub token: Option<&'a [u8]>,
    /// How long a new token is to live: by which name this was asked, and the number of seconds as
    /// it was written.
    pub token_ttl: Option<(&'static str, &'a [u8])>,
    /// As it was written, the name of a header that says the request was passed on by a proxy.
    pub forwarded: Option<&'a str>,
    /// Something follows that is none of the next request.
    pub has_body: bool,
    /// The client may send another request.
    pub keep_alive: bool,
}

/// The names of the header with a session token: ours, EC2's.
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
/// The names of the header with a new token's time to live.
const TOKEN_TTL: [&str; 2] =
    ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];

/// Reads the request at the beginning of `bytes` and says how long it is; `None` where it is not
/// complete.
pub fn parse(bytes: &[u8]) -> Result<Option<(Request<'_>, usize)>, httparse::Error> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let length = match parsed.parse(bytes)? {
        Complete(length) => length,
        Partial => return Ok(None),
    };
    let mut request = Request {
        method: parsed.method.unwrap_or_default(),
        path: without_authority(parsed.path.unwrap_or_default()),
        keep_alive: parsed.version == Some(1),
        ..Request::default()
    };
    for header in parsed.headers.iter() {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let value = header.value;
        if is("Accept") {
            request.wants_json = prefers_json(value);
        } else if is("Connection") {
            for option in elements(value) {
                if option.eq_ignore_ascii_case(b"close") {
                    request.keep_alive = false;
                } else if option.eq_ignore_ascii_case(b"keep-alive") && parsed.version == Some(0) {
                    request.keep_alive = true;
                }
            }
        } else if is("Content-Length") {
            request.has_body |= value.trim_ascii() != b"0";
        } else if is("Transfer-Encoding") {
            request.has_body = true;
        } else if is("X-Forwarded-For") {
            request.forwarded = Some(header.name);
        } else if TOKEN.into_iter().any(is) {
            request.token = Some(value);
        } else if let Some(name) = TOKEN_TTL.into_iter().find(|name| is(name)) {
            request.token_ttl = Some((name, value));
        }
    }
    Ok(Some((request, length)))
}

/// The path of a target in absolute form, `http://169.254.169.254/latest` (RFC 9112, 3.2.2), or in
/// the usual origin form.
fn without_authority(target: &str) -> &str {
    match target.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => {
            rest.find('/').map_or("/", |slash| &rest[slash..])
        }
        _ => target,
    }
}

/// The elements of a list in a header (RFC 9110, 5.6.1).
fn elements(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}

/// Whether of the media types we have JSON is named first. Weights are not looked at: clients write
/// what they prefer in front.
fn prefers_json(accept: &[u8]) -> bool {
    let types = elements(accept)
        .map(|element| element.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii());
    let is = |kind: &[u8], name: &str| kind.eq_ignore_ascii_case(name.as_bytes());
    // `plain/text` is what Firecracker's guide says.
    let text = ["*/*", "text/*", "text/plain", "plain/text"];
    types
        .filter_map(|kind| match () {
            () if is(kind, "application/json") => Some(true),
            () if text.iter().any(|name| is(kind, name)) => Some(false),
            () => None,
        })
        .next()
        .unwrap_or(false)
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// 200
    Ok,
    /// 400
    BadRequest,
    /// 401
    Unauthorized,
    /// 404
    NotFound,
    /// 405
    MethodNotAllowed,
    /// 500
    InternalServerError,
    /// 501
    NotImplemented,
}

impl Status {
    /// The number and its usual explanation.
    fn line(self) -> &'static str {
        match self {
            Status::Ok => "200 OK",
            Status::BadRequest => "400 Bad Request",
            Status::Unauthorized => "401 Unauthorized",
            Status::NotFound => "404 Not Found",
            Status::MethodNotAllowed => "405 Method Not Allowed",
            Status::InternalServerError => "500 Internal Server Error",
            Status::NotImplemented => "501 Not Implemented",
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// What became of the request.
    pub status: Status,
    /// The body is JSON, not text.
    pub is_json: bool,
    /// One more header.
    pub header: Option<(&'static str, String)>,
    /// What was asked for, or why there is none.
    pub body: String,
}

impl Response {
    /// An answer of text.
    pub fn text(status: Status, body: impl Into<String>) -> Response {
        Response { status, is_json: false, header: None, body: body.into() }
    }

    /// The same with one more header.
    pub fn with_header(self, name: &'static str, value: impl Into<String>) -> Response {
        Response { header: Some((name, value.into())), ..self }
    }

    /// The answer as it is sent. The answer to `HEAD` has no body (RFC 9110, 9.3.2).
    fn into_bytes(self, keep_alive: bool, is_head: bool) -> Vec<u8> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let kind = if self.is_json { "application/json" } else { "text/plain" };
        let mut text = format!(
            "HTTP/1.1 {}\r\nConnection: {connection}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n",
            self.status.line(),
            self.body.len(),
        );
        if let Some((name, value)) = &self.header {
            text += &format!("{name}: {value}\r\n");
        }
        text += "\r\n";
        if !is_head {
            text += &self.body;
        }
        text.into_bytes()
    }
}

/// The HTTP side of one connection. It holds one request and one answer: no further request is
/// looked at before the answer is sent, so that a client that does not read is not worked for.
#[derive(Debug, Default)]
pub struct Connection {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// How much of `outgoing` is sent.
    sent: usize,
    /// No further request is answered.
    closing: bool,
}

impl Connection {
    /// Takes bytes from the client, and says how many.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        if self.closing {
            // Read nonetheless, for else the client's end would not be seen behind it.
            return bytes.len();
        }
        let taken = bytes.len().min(MAX_REQUEST - self.incoming.len());
        self.incoming.extend_from_slice(&bytes[..taken]);
        taken
    }

    /// Answers the next request, if it is there and its turn.
    pub fn advance(&mut self, mmds: &mut Mmds, now: Duration) {
        if self.closing || !self.outgoing.is_empty() {
            return;
        }
        match parse(&self.incoming) {
            Ok(Some((request, length))) => {
                let response = mmds.respond(&request, now);
                // Where the next request begins is only known behind a request that we understand.
                self.closing = !request.keep_alive
                    || matches!(response.status, Status::BadRequest | Status::MethodNotAllowed);
                self.outgoing = response.into_bytes(!self.closing, request.method == "HEAD");
                self.incoming.drain(..length);
            }
            Ok(None) if self.incoming.len() < MAX_REQUEST => {}
            Ok(None) => self.refuse("Invalid request: it is too long."),
            Err(error) => self.refuse(&format!("Invalid request: {error}.")),
        }
    }

    fn refuse(&mut self, reason: &str) {
        self.closing = true;
        self.outgoing = Response::text(Status::BadRequest, reason).into_bytes(false, false);
    }

    /// What is to be sent.
    pub fn pending(&self) -> &[u8] {
        &self.outgoing[self.sent..]
    }

    /// So many bytes of it were.
    pub fn sent(&mut self, count: usize) {
        self.sent += count;
        if self.sent >= self.outgoing.len() {
            self.sent = 0;
            // The memory as well: it may have been a long answer on a connection that stays open.
            self.outgoing = Vec::new();
        }
    }

    /// All is sent that ever will be.
    pub fn is_done(&self) -> bool {
        self.closing && self.outgoing.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::{DEFAULT_SIZE_LIMIT, MmdsState};

    const NOW: Duration = Duration::from_secs(5);

    fn mmds() -> Mmds {
        let mut mmds = Mmds::new(MmdsState::default(), DEFAULT_SIZE_LIMIT).unwrap();
        mmds.put(json!({"a": "b", "o": {"n": 1}})).unwrap();
        mmds
    }

    /// All answers to these bytes, and whether the connection is then closed.
    fn exchange(mmds: &mut Mmds, mut bytes: &[u8]) -> (String, bool) {
        let mut connection = Connection::default();
        let mut answers = Vec::new();
        loop {
            let taken = connection.receive(bytes);
            bytes = &bytes[taken..];
            connection.advance(mmds, NOW);
            let pending = connection.pending().len();
            answers.extend_from_slice(connection.pending());
            connection.sent(pending);
            if taken == 0 && pending == 0 {
                break;
            }
        }
        (String::from_utf8(answers).unwrap(), connection.is_done())
    }

    fn parsed(text: &str) -> Request<'_> {
        let (request, length) = parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!(length, text.len());
        request
    }

    #[test]
    fn an_answer_has_a_length_and_a_type() {
        let (answer, closed) = exchange(&mut mmds(), b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n");
        assert_eq!(
            answer,
            "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Type: text/plain\r\n\
             Content-Length: 1\r\n\r\nb"
        );
        assert!(!closed);
    }

    #[test]
    fn a_connection_is_kept_or_closed_as_version_and_header_say() {
        for (head, kept) in [
            ("GET / HTTP/1.1\r\n", true),
            ("GET / HTTP/1.1\r\nconnection: foo, Close\r\n", false),
            ("GET / HTTP/1.0\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: close, keep-alive\r\n", false),
        ] {
            let (answer, closed) = exchange(&mut mmds(), format!("{head}\r\n").as_bytes());
            assert_eq!(closed, !kept, "{head}");
            let header = if kept { "Connection: keep-alive\r\n" } else { "Connection: close\r\n" };
            assert!(answer.contains(header), "{answer}");
        }
    }

    #[test]
    fn requests_sent_at_once_are_answered_in_their_order() {
        let text = b"GET /a HTTP/1.1\r\n\r\nGET /x HTTP/1.1\r\n\r\nGET /o HTTP/1.0\r\n\r\nGET /a";
        let (answers, closed) = exchange(&mut mmds(), text);
        let lines: Vec<_> = answers.lines().filter(|line| line.starts_with("HTTP/")).collect();
        let expected = ["HTTP/1.1 200 OK", "HTTP/1.1 404 Not Found", "HTTP/1.1 200 OK"];
        // The body of the answer before has no end of line.
        assert_eq!(answers.matches("HTTP/1.1").count(), 3, "{answers}");
        assert_eq!(lines[0], expected[0]);
        assert!(answers.find(expected[1]) < answers.rfind(expected[2]));
        assert!(answers.ends_with('n') && closed);
    }

    #[test]
    fn a_request_may_come_byte_by_byte() {
        let mut mmds = mmds();
        let mut connection = Connection::default();
        for byte in b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n" {
            assert!(connection.pending().is_empty());
            assert_eq!(connection.receive(&[*byte]), 1);
            connection.advance(&mut mmds, NOW);
        }
        assert!(connection.pending().ends_with(b"\r\n\r\nb"));
    }

    #[test]
    fn no_request_is_answered_while_an_answer_is_unsent() {
        let mut mmds = mmds();
        let mut connection = Connection::default();
        connection.receive(b"GET /a HTTP/1.1\r\n\r\nGET /nope HTTP/1.1\r\n\r\n");
        connection.advance(&mut mmds, NOW);
        let first = connection.pending().to_vec();
        connection.sent(10);
        connection.advance(&mut mmds, NOW);
        assert_eq!(connection.pending(), &first[10..]);
        connection.sent(first.len() - 10);
        connection.advance(&mut mmds, NOW);
        assert!(connection.pending().starts_with(b"HTTP/1.1 404"));
    }

    #[test]
    fn what_is_no_request_gets_400_and_the_connection_is_closed() {
        let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(MAX_REQUEST));
        let headers = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        for bad in [
            "\x01\x02\x03\r\n\r\n",
            "GET\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "GET / HTTP/1.1\r\nno colon\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: 100\r\n\r\nsome body",
            "PUT / HTTP/1.1\r\nContent-Length: 100\r\n\r\nsome body",
            "GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            &long,
            &headers,
        ] {
            let (answer, closed) = exchange(&mut mmds(), bad.as_bytes());
            assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{bad:?} {answer}");
            assert!(answer.contains("Invalid request"), "{answer}");
            assert_eq!(answer.matches("HTTP/1.1").count(), 1);
            assert!(closed);
        }
    }

    #[test]
    fn a_body_of_no_bytes_is_none() {
        let (answer, _) = exchange(&mut mmds(), b"GET /a HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[test]
    fn other_methods_are_told_which_there_are() {
        for method in ["POST", "PATCH", "DELETE", "OPTIONS", "HEAD", "CONNECT", "get"] {
            let text = format!("{method} /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc");
            let (answer, closed) = exchange(&mut mmds(), text.as_bytes());
            assert!(answer.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"), "{answer}");
            assert!(answer.contains("\r\nAllow: GET, PUT\r\n"), "{answer}");
            assert_eq!(answer.ends_with("\r\n\r\n"), method == "HEAD", "{answer}");
            assert!(closed);
        }
    }

    #[test]
    fn a_target_may_name_scheme_and_host() {
        for (target, path) in [
            ("/a/b", "/a/b"),
            ("http://169.254.169.254/a/b", "/a/b"),
            ("HTTP://169.254.169.254:80/", "/"),
            ("http://169.254.169.254", "/"),
            ("/a?b=http://c/d", "/a?b=http://c/d"),
        ] {
            assert_eq!(parsed(&format!("GET {target} HTTP/1.1\r\n\r\n")).path, path);
        }
    }

    #[test]
    fn the_media_type_named_first_is_chosen() {
        for (accept, json) in [
            ("application/json", true),
            ("Application/JSON; q=1", true),
            ("text/html, application/json, */*", true),
            ("*/*", false),
            ("text/plain, application/json", false),
            ("plain/text", false),
            ("image/png", false),
            ("", false),
        ] {
            let text = format!("GET / HTTP/1.1\r\nAccept: {accept}\r\n\r\n");
            assert_eq!(parsed(&text).wants_json, json, "{accept}");
        }
    }

    #[test]
    fn headers_are_known_by_both_names_in_any_case() {
        let request = parsed("GET / HTTP/1.1\r\nx-METADATA-token: t\r\n\r\n");
        assert_eq!(request.token, Some(b"t".as_slice()));
        let request = parsed("GET / HTTP/1.1\r\nX-aws-ec2-metadata-token: t\r\n\r\n");
        assert_eq!(request.token, Some(b"t".as_slice()));
        let request = parsed("GET / HTTP/1.1\r\nx-metadata-token-ttl-seconds: 6\r\n\r\n");
        assert_eq!(request.token_ttl, Some((TOKEN_TTL[0], b"6".as_slice())));
        let request = parsed("GET / HTTP/1.1\r\nX-AWS-EC2-metadata-token-ttl-seconds: 6\r\n\r\n");
        assert_eq!(request.token_ttl, Some((TOKEN_TTL[1], b"6".as_slice())));
        let request = parsed("GET / HTTP/1.1\r\nx-forwarded-for: p\r\n\r\n");
        assert_eq!(request.forwarded, Some("x-forwarded-for"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_or_waited_for(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            exchange(&mut mmds(), &bytes);
        }

        #[test]
        fn any_headers_are_answered_or_waited_for(
            head in "(GET|PUT) [ -~]{0,40} HTTP/1\\.[01]\r\n",
            name in "(Accept|Connection|Content-Length|X-metadata-token(-ttl-seconds)?)",
            value in "\\PC{0,60}",
        ) {
            exchange(&mut mmds(), format!("{head}{name}: {value}\r\n\r\n").as_bytes());
        }
    }
}
