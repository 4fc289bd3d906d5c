//! A client of the VMM's API: HTTP/1.1 over its Unix socket.

use std::io;
use std::path::{Path, PathBuf};

use api_server::machine::{SnapshotCreate, SnapshotLoad, SnapshotType, Vm, VmState};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;

/// Name of the socket in a container's folder of sockets.
pub const SOCKET: &str = "api";
/// Most bytes of an answer.
const MAX_ANSWER: usize = 1 << 20;

/// Why a machine does not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Its socket.
    #[error("{path}: {error}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
    /// The VMM said no.
    #[error("{0}")]
    Refused(String),
    /// What came is not the API's.
    #[error("the VMM's answer makes no sense: {0}")]
    Senseless(String),
}

fn senseless(error: impl ToString) -> ApiError {
    ApiError::Senseless(error.to_string())
}

/// A machine's API.
pub struct MachineApi {
    socket: PathBuf,
}

impl MachineApi {
    /// That of the container with this folder of sockets.
    pub fn of(run: &Path) -> MachineApi {
        MachineApi { socket: run.join(SOCKET) }
    }

    /// Where the VMM listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Has the machine stand still.
    pub fn pause(&self) -> Result<(), ApiError> {
        self.call(Method::PATCH, "/vm", &Vm { state: VmState::Paused })
    }

    /// Lets it run.
    pub fn resume(&self) -> Result<(), ApiError> {
        self.call(Method::PATCH, "/vm", &Vm { state: VmState::Resumed })
    }

    /// Writes the state and the memory of a machine that stands still.
    pub fn create_snapshot(&self, state: &Path, memory: &Path) -> Result<(), ApiError> {
        let create = SnapshotCreate {
            snapshot_type: SnapshotType::Full,
            snapshot_path: state.to_owned(),
            mem_file_path: memory.to_owned(),
        };
        self.call(Method::PUT, "/snapshot/create", &create)
    }

    /// Makes the machine one of a snapshot.
    pub fn load_snapshot(&self, load: &SnapshotLoad) -> Result<(), ApiError> {
        self.call(Method::PUT, "/snapshot/load", load)
    }

    fn call(&self, method: Method, path: &str, body: &impl Serialize) -> Result<(), ApiError> {
        let failed = |error| ApiError::Socket { path: self.socket.clone(), error };
        let body = serde_json::to_vec(body).map_err(senseless)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "localhost")
            .body(Full::new(Bytes::from(body)))
            .map_err(senseless)?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
        let (status, answer) = runtime.block_on(async {
            let stream = tokio::net::UnixStream::connect(&self.socket).await.map_err(failed)?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream))
                    .await
                    .map_err(senseless)?;
            tokio::spawn(connection);
            let response = sender.send_request(request).await.map_err(senseless)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            Ok((status, body.map_err(senseless)?.to_bytes()))
        })?;
        if status == StatusCode::NO_CONTENT {
            return Ok(());
        }
        let fault: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let said = fault.get("fault_message").and_then(Value::as_str);
        Err(said.map_or_else(
            || senseless(status),
            |text| ApiError::Refused(crate::agent::printable(text)),
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn answered(answer: &'static str) -> (Result<(), ApiError>, String) {
        let folder = tempfile::tempdir().unwrap();
        let api = MachineApi::of(folder.path());
        let listener = UnixListener::bind(api.socket()).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let count = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        let result = api.pause();
        (result, server.join().unwrap())
    }

    #[test]
    fn requests_are_the_apis_and_refusals_are_told() {
        let (result, request) = answered("HTTP/1.1 204 No Content\r\n\r\n");
        result.unwrap();
        assert!(request.starts_with("PATCH /vm HTTP/1.1\r\n"), "{request}");
        assert!(request.ends_with("{\"state\":\"Paused\"}"), "{request}");
        let refusal = "HTTP/1.1 400 Bad Request\r\ncontent-length: 27\r\n\r\n{\"fault_message\":\"no\\nway\"}";
        let error = answered(refusal).0.unwrap_err();
        assert_eq!(error.to_string(), "no?way");
        for garbage in ["HTTP/1.1 400 Bad Request\r\n\r\n", "x", "HTTP/1.1 200 OK\r\n\r\nx"] {
            assert!(matches!(answered(garbage).0, Err(ApiError::Senseless(_))), "{garbage}");
        }
    }

    #[test]
    fn a_vmm_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = MachineApi::of(folder.path()).pause().unwrap_err();
        assert!(matches!(error, ApiError::Socket { .. }), "{error}");
    }
}
