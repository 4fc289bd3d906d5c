//! The machine's API over HTTP/1.1 on a Unix socket. It knows connections and bytes; what requests
//! mean is [`route`](super::route)'s affair, and carrying them out the machine's.

use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, SERVER};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::AbortHandle;

use super::requests::RequestMetrics;
use super::route::{Method, Routed, route};
use super::{API_VERSION, MachineAnswer, MachineError, MachineRequest};

/// Clients connected at once. The next takes the place of the oldest that waits for no answer; where
/// all do, it waits too.
const MAX_CLIENTS: usize = 64;
/// How long nobody is let in after somebody could not be.
const NEXT_ATTEMPT: Duration = Duration::from_millis(50);
const JSON: &str = "application/json";
/// Says that a client uses what will go away.
const DEPRECATION: &str = "deprecation";
/// Prometheus's text format.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Most bytes of a body where nothing else is asked for, as Firecracker has it.
pub const DEFAULT_PAYLOAD_LIMIT: usize = 51_200;

/// A request on its way to the machine.
pub struct Call {
    /// What is asked for.
    pub request: MachineRequest,
    /// When it was understood.
    pub received: Instant,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<MachineAnswer, MachineError>>,
}

/// Serves clients on this thread, as long as the process lives, and counts what they ask. Each
/// request is given to `submit`, which must not block; a body has `payload_limit` bytes at most. `begin`
/// is called once nothing is in the way any more.
pub fn serve(
    listener: UnixListener,
    payload_limit: usize,
    metrics: Arc<Mutex<RequestMetrics>>,
    begin: impl FnOnce(),
    submit: impl Fn(Call) + 'static,
) -> io::Result<Infallible> {
    listener.set_nonblocking(true)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let server = Rc::new(Server { payload_limit, metrics, submit });
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        begin();
        let places = Arc::new(Semaphore::new(MAX_CLIENTS));
        let mut clients = VecDeque::<Client>::new();
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // No descriptor is left, say. Who is served may free one, or others of the
                    // process; the one who waits is still there then.
                    telemetry::limited_warning!(%error, "cannot accept a client of the API");
                    tokio::time::sleep(NEXT_ATTEMPT).await;
                    continue;
                }
            };
            // Clients that say nothing, or not all of it, must not keep others out.
            clients.retain(|client| !client.task.is_finished());
            if places.available_permits() == 0
                && let Some(oldest) = clients.iter().position(|client| !client.is_served.get())
                && let Some(client) = clients.remove(oldest)
            {
                telemetry::limited_warning!("the API has more than {MAX_CLIENTS} clients");
                client.task.abort();
            }
            let Ok(place) = places.clone().acquire_owned().await else {
                return Err(io::Error::other("no more clients can be served"));
            };
            let server = server.clone();
            let is_served = Rc::new(Cell::new(false));
            let is_asking = is_served.clone();
            let task = tokio::task::spawn_local(async move {
                let service = service_fn(|request| {
                    let (server, is_served) = (server.clone(), is_asking.clone());
                    async move { Ok::<_, Infallible>(server.answer(request, &is_served).await) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .half_close(true)
                    .serve_connection(TokioIo::new(stream), service);
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a client of the API");
                }
                drop(place);
            });
            clients.push_back(Client { task: task.abort_handle(), is_served });
        }
    })
}

/// A connection.
struct Client {
    task: AbortHandle,
    /// Whether the machine is at a request of its.
    is_served: Rc<Cell<bool>>,
}

/// What all connections share.
struct Server<F> {
    payload_limit: usize,
    metrics: Arc<Mutex<RequestMetrics>>,
    submit: F,
}

impl<F: Fn(Call)> Server<F> {
    async fn answer(
        &self,
        request: Request<Incoming>,
        is_served: &Cell<bool>,
    ) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        let method = match head.method {
            hyper::Method::GET => Method::Get,
            hyper::Method::PUT => Method::Put,
            hyper::Method::PATCH => Method::Patch,
            hyper::Method::DELETE => Method::Delete,
            other => {
                let mut response = fault(
                    StatusCode::BAD_REQUEST,
                    &format!("Invalid request method and/or path: {other} {path}."),
                );
                let allowed = hyper::header::HeaderValue::from_static("GET, PUT, PATCH, DELETE");
                response.headers_mut().insert(ALLOW, allowed);
                return response;
            }
        };
        let response = self.carry_out(method, path, body, is_served).await;
        let refused = !response.status().is_success();
        let mut metrics = self.metrics.lock().unwrap_or_else(PoisonError::into_inner);
        metrics.count(method, path, refused);
        metrics.deprecated.deprecated_http_api_calls +=
            u64::from(response.headers().contains_key(DEPRECATION));
        response
    }

    async fn carry_out(
        &self,
        method: Method,
        path: &str,
        body: Incoming,
        is_served: &Cell<bool>,
    ) -> Response<Full<Bytes>> {
        let limit = self.payload_limit;
        let body = match Limited::new(body, limit).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => {
                let text = format!(
                    "Request payload is larger than the limit of {limit} allowed by server."
                );
                return fault(StatusCode::PAYLOAD_TOO_LARGE, &text);
            }
            Err(error) => return fault(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let Routed { request, deprecated } = match route(method, path, &body) {
            Ok(routed) => routed,
            Err(error) => return refusal(&error),
        };
        tracing::debug!("API: {} {path}", method.name());
        let (reply, answered) = oneshot::channel();
        (self.submit)(Call { request, received: Instant::now(), reply });
        is_served.set(true);
        let answer = answered.await;
        is_served.set(false);
        let mut response = match answer {
            Ok(Ok(answer)) => success(answer),
            Ok(Err(error)) => {
                telemetry::limited_warning!("API: {} {path}: {error}", method.name());
                refusal(&error)
            }
            Err(_) => fault(StatusCode::INTERNAL_SERVER_ERROR, "the machine has ended"),
        };
        if deprecated {
            let value = hyper::header::HeaderValue::from_static("true");
            response.headers_mut().insert(DEPRECATION, value);
        }
        response
    }
}

fn success(answer: MachineAnswer) -> Response<Full<Bytes>> {
    let object = match answer {
        MachineAnswer::Done => return respond(StatusCode::NO_CONTENT, JSON, String::new()),
        MachineAnswer::Version => json!({ "firecracker_version": API_VERSION }),
        MachineAnswer::Instance(info) => json!(info),
        MachineAnswer::Object(object) => object,
        MachineAnswer::Text(text) => return respond(StatusCode::OK, EXPOSITION, text),
    };
    respond(StatusCode::OK, JSON, object.to_string())
}

fn refusal(error: &MachineError) -> Response<Full<Bytes>> {
    let status = if error.not_found { StatusCode::NOT_FOUND } else { StatusCode::BAD_REQUEST };
    fault(status, &error.message)
}

fn fault(status: StatusCode, message: &str) -> Response<Full<Bytes>> {
    respond(status, JSON, json!({ "fault_message": message }).to_string())
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    use hyper::header::HeaderValue;
    let typed = !body.is_empty();
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("vmrun"));
    if typed {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Serves on a thread of its own, bodies of 100 bytes at most.
    fn start(
        listener: UnixListener,
        metrics: Arc<Mutex<RequestMetrics>>,
        submit: impl Fn(Call) + Send + 'static,
    ) {
        std::thread::spawn(move || serve(listener, 100, metrics, || {}, submit));
    }

    /// What a client gets that sends this and then ends its side.
    fn exchange(path: &std::path::Path, text: &str) -> String {
        let mut client = UnixStream::connect(path).unwrap();
        client.write_all(text.as_bytes()).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    }

    fn server() -> (tempfile::TempDir, std::path::PathBuf) {
        counting_server(Arc::default())
    }

    fn counting_server(
        metrics: Arc<Mutex<RequestMetrics>>,
    ) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        start(listener, metrics, |call| {
            let answer = match call.request {
                MachineRequest::GetVersion => Ok(MachineAnswer::Version),
                MachineRequest::Pause => Ok(MachineAnswer::Done),
                MachineRequest::GetMetrics => Ok(MachineAnswer::Text("a 1\n".to_owned())),
                MachineRequest::GetMmds => Err(MachineError::not_found("nothing there")),
                // Its answer never comes.
                MachineRequest::Resume => return,
                _ => Err(MachineError::new("refused")),
            };
            let _ = call.reply.send(answer);
        });
        (folder, path)
    }

    #[test]
    fn answers_have_firecrackers_status_codes() {
        let (_folder, path) = server();
        let head = "Host: localhost\r\nAccept: application/json\r\n";
        let get = |what: &str| exchange(&path, &format!("GET {what} HTTP/1.1\r\n{head}\r\n"));
        let answer = get("/version");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.ends_with(r#"{"firecracker_version":"1.17.0"}"#), "{answer}");
        let answer = get("/mmds");
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        assert!(answer.ends_with(r#"{"fault_message":"nothing there"}"#), "{answer}");
        assert!(get("/nothing").starts_with("HTTP/1.1 400"));
        let send = |method: &str, length: usize, body: &str| {
            let length = format!("Content-Length: {length}\r\n");
            exchange(&path, &format!("{method} /vm HTTP/1.1\r\n{head}{length}\r\n{body}"))
        };
        let pause = r#"{"state": "Paused"}"#;
        assert!(send("PATCH", pause.len(), pause).starts_with("HTTP/1.1 204 No Content\r\n"));
        assert!(send("DELETE", 0, "").starts_with("HTTP/1.1 400"));
        assert!(send("PATCH", 200, &" ".repeat(200)).starts_with("HTTP/1.1 413"));
        let resume = r#"{"state": "Resumed"}"#;
        assert!(send("PATCH", resume.len(), resume).starts_with("HTTP/1.1 500"));
    }

    #[test]
    fn metrics_are_text_and_requests_are_counted() {
        let metrics = Arc::<Mutex<RequestMetrics>>::default();
        let (_folder, path) = counting_server(metrics.clone());
        let answer = exchange(&path, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
        assert!(answer.ends_with("\r\n\r\na 1\n"), "{answer}");
        let put = |path: &std::path::Path, body: &str| {
            let length = body.len();
            let head = "PUT /vsock HTTP/1.1\r\nHost: localhost\r\nContent-Length:";
            exchange(path, &format!("{head} {length}\r\n\r\n{body}"))
        };
        // One that makes no sense, and one that is refused and out of date.
        assert!(put(&path, "{").starts_with("HTTP/1.1 400"));
        let old = r#"{"guest_cid": 3, "uds_path": "v", "vsock_id": "x"}"#;
        assert!(put(&path, old).starts_with("HTTP/1.1 400"));
        let counted = *metrics.lock().unwrap();
        assert_eq!(counted.get.metrics_count, 1);
        assert_eq!((counted.put.vsock_count, counted.put.vsock_fails), (2, 2));
        assert_eq!(counted.deprecated.deprecated_http_api_calls, 1);
    }

    #[test]
    fn one_connection_carries_many_requests() {
        let (_folder, path) = server();
        let answer = exchange(&path, &VERSION.repeat(3));
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 3, "{answer}");
    }

    const VERSION: &str = "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n";

    /// docs/hostile.md 24: more clients than are served at once, silent or in the middle of a request.
    #[test]
    fn hostile_24_a_crowd_of_silent_clients_keeps_nobody_out() {
        let (_folder, path) = server();
        let pause = r#"{"state": "Paused"}"#;
        let head = format!("PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n", pause.len());
        let mut crowd = Vec::new();
        for number in 0..4 * MAX_CLIENTS {
            let mut client = UnixStream::connect(&path).unwrap();
            // A client that was sent away cannot be written to.
            let _ = client.write_all(["", "GET /ver", &head][number % 3].as_bytes());
            crowd.push(client);
        }
        let answer = exchange(&path, VERSION);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // The newest of them were kept, and go on where they were.
        let mut last = crowd.pop().unwrap();
        last.write_all(VERSION.as_bytes()).unwrap();
        let mut start = [0; 12];
        last.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
        let mut first = crowd.swap_remove(0);
        assert_eq!(first.read(&mut start).unwrap_or(0), 0);
    }

    /// docs/hostile.md 24: a header without end, and bodies of other lengths than announced.
    #[test]
    fn hostile_24_requests_that_do_not_end_where_they_say_are_not_carried_out() {
        let (folder, path) = (tempfile::tempdir().unwrap(), std::path::PathBuf::from("api"));
        let path = folder.path().join(path);
        let listener = UnixListener::bind(&path).unwrap();
        let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = asked.clone();
        start(listener, Arc::default(), move |call| {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let _ = call.reply.send(Ok(MachineAnswer::Done));
        });
        let asked = || asked.load(std::sync::atomic::Ordering::SeqCst);
        let pause = r#"{"state": "Paused"}"#;
        let patch = |length: usize| {
            format!("PATCH /vm HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{pause}")
        };
        // Shorter than announced.
        exchange(&path, &patch(pause.len() + 1));
        // Twice announced, and not the same.
        let twice = patch(pause.len()).replace("Host: x", "Content-Length: 3");
        let answer = exchange(&path, &twice);
        assert!(!answer.contains("204"), "{answer}");
        // A length, and chunks as well: what is behind the last chunk must be no request of its own.
        let both = patch(pause.len()).replace("Host: x", "Transfer-Encoding: chunked");
        let answer = exchange(&path, &both);
        assert!(!answer.contains("204"), "{answer}");
        assert_eq!(asked(), 0);
        // Longer than announced: the rest is a request, and none.
        let answer = exchange(&path, &format!("{}{{}}\r\n\r\n", patch(pause.len())));
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 2, "{answer}");
        assert!(answer.starts_with("HTTP/1.1 204") && answer.contains("HTTP/1.1 400"), "{answer}");
        assert_eq!(asked(), 1);
        let mut client = UnixStream::connect(&path).unwrap();
        let _ = client.write_all(b"GET /version HTTP/1.1\r\n");
        let line = format!("X: {}\r\n", "y".repeat(1000));
        // It is cut off long before this has an end.
        let sent = (0..100_000).take_while(|_| client.write_all(line.as_bytes()).is_ok()).count();
        assert!(sent < 100_000);
        assert!(exchange(&path, VERSION).starts_with("HTTP/1.1 204"));
        assert_eq!(asked(), 2);
    }

    /// docs/hostile.md 24: two at once, one of whom has to wait for its answer.
    #[test]
    fn hostile_24_a_request_that_takes_long_is_alone_in_that() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        let waiting = Arc::new(Mutex::new(None));
        let slow = waiting.clone();
        start(listener, Arc::default(), move |call| match call.request {
            MachineRequest::Pause => *slow.lock().unwrap() = Some(call.reply),
            _ => drop(call.reply.send(Ok(MachineAnswer::Version))),
        });
        let body = r#"{"state": "Paused"}"#;
        let mut client = UnixStream::connect(&path).unwrap();
        let head = format!("PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        client.write_all(format!("{head}{body}").as_bytes()).unwrap();
        // Neither another request nor a crowd takes its place.
        let crowd: Vec<_> =
            (0..2 * MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        assert!(exchange(&path, VERSION).starts_with("HTTP/1.1 200"));
        let reply = loop {
            if let Some(reply) = waiting.lock().unwrap().take() {
                break reply;
            }
            std::thread::yield_now();
        };
        let _ = reply.send(Ok(MachineAnswer::Done));
        let mut start = [0; 12];
        client.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"HTTP/1.1 204");
        drop(crowd);
    }

    /// docs/hostile.md 24: what is no HTTP, or never ends, hurts nobody else.
    #[test]
    fn hostile_24_garbage_is_survived() {
        let (_folder, path) = server();
        let _silent: Vec<_> = (0..20).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
        for garbage in
            ["", "\0\0\0\0", "GET", "PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", &long]
        {
            let mut client = UnixStream::connect(&path).unwrap();
            let _ = client.write_all(garbage.as_bytes());
            let _ = client.shutdown(std::net::Shutdown::Write);
            let _ = client.read_to_end(&mut Vec::new());
        }
        let answer = exchange(&path, "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}
