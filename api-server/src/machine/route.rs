//! From a method, a path and a body to a [`MachineRequest`]. Nothing here does I/O: this is what
//! stands between a client's bytes and the machine.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{MachineError, MachineRequest, Vm, VmState};

/// Methods that the API has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are HTTP's")]
pub enum Method {
    Get,
    Put,
    Patch,
    Delete,
}

impl Method {
    pub(super) fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Delete => "DELETE",
        }
    }
}

/// A request with what its client should know beside the answer.
#[derive(Debug, PartialEq)]
pub struct Routed {
    /// What to do.
    pub request: MachineRequest,
    /// A field was used that will go away (`Deprecation: true`).
    pub deprecated: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

/// The request that a path, without its query, stands for.
pub fn route(method: Method, path: &str, body: &[u8]) -> Result<Routed, MachineError> {
    use Method::{Delete, Get, Patch, Put};
    let unknown = || {
        let method = method.name();
        MachineError::new(&format!("Invalid request method and/or path: {method} {path}."))
    };
    let mut segments = [""; 3];
    let mut count = 0;
    for segment in path.strip_prefix('/').ok_or_else(unknown)?.split('/') {
        *segments.get_mut(count).ok_or_else(unknown)? = segment;
        count += 1;
    }
    let segments = &segments[..count];
    if matches!(method, Get | Delete) && !body.is_empty() {
        let method = method.name();
        return Err(MachineError::new(&format!("{method} request cannot have a body.")));
    }
    let mut deprecated = false;
    let request = match (method, segments) {
        (Get, [""]) => MachineRequest::GetInstance,
        (Get, ["version"]) => MachineRequest::GetVersion,
        (Get, ["vm", "config"]) => MachineRequest::GetVmConfig,
        (Get, ["machine-config"]) => MachineRequest::GetMachineConfig,
        (Get, ["balloon"]) => MachineRequest::GetBalloon,
        (Get, ["balloon", "statistics"]) => MachineRequest::GetBalloonStatistics,
        (Get, ["balloon", "hinting", "status"]) => MachineRequest::GetBalloonHinting,
        (Get, ["hotplug", "memory"]) => MachineRequest::GetMemoryHotplug,
        (Get, ["metrics"]) => MachineRequest::GetMetrics,
        (Get, ["mmds"]) => MachineRequest::GetMmds,
        (Get, _) => return Err(unknown()),

        (Put, ["actions"]) => match parse::<Action>(method, body)?.action_type {
            ActionType::FlushMetrics => MachineRequest::FlushMetrics,
            ActionType::InstanceStart => MachineRequest::StartInstance,
            ActionType::SendCtrlAltDel => MachineRequest::SendCtrlAltDel,
        },
        (Put, ["balloon"]) => MachineRequest::PutBalloon(parse(method, body)?),
        (Put, ["boot-source"]) => MachineRequest::PutBootSource(parse(method, body)?),
        (Put, ["cpu-config"]) => MachineRequest::PutCpuConfig(parse(method, body)?),
        (Put, ["drives", id]) => {
            MachineRequest::PutDrive(parse_named(method, body, "drive_id", id)?)
        }
        (Put, ["entropy"]) => MachineRequest::PutEntropy(parse(method, body)?),
        (Put, ["hotplug", "memory"]) => MachineRequest::PutMemoryHotplug(parse(method, body)?),
        (Put, ["logger"]) => MachineRequest::PutLogger(parse(method, body)?),
        (Put, ["machine-config"]) => {
            let config: super::MachineConfig = parse(method, body)?;
            deprecated = config.cpu_template.is_some();
            MachineRequest::PutMachineConfig(config)
        }
        (Put, ["metrics"]) => MachineRequest::PutMetrics(parse(method, body)?),
        (Put, ["mmds"]) => MachineRequest::PutMmds(parse_object(method, body)?),
        (Put, ["mmds", "config"]) => {
            let config: super::MmdsConfig = parse(method, body)?;
            deprecated = config.version == super::MmdsVersion::V1;
            MachineRequest::PutMmdsConfig(config)
        }
        (Put, ["network-interfaces", id]) => {
            MachineRequest::PutNetworkInterface(parse_named(method, body, "iface_id", id)?)
        }
        (Put, ["pmem", id]) => MachineRequest::PutPmem(parse_named(method, body, "id", id)?),
        (Put, ["serial"]) => MachineRequest::PutSerial(parse(method, body)?),
        (Put, ["snapshot", "create"]) => MachineRequest::CreateSnapshot(parse(method, body)?),
        (Put, ["snapshot", "load"]) => {
            let load: super::SnapshotLoad = parse(method, body)?;
            load.memory()?;
            deprecated = load.mem_file_path.is_some() || load.enable_diff_snapshots;
            MachineRequest::LoadSnapshot(load)
        }
        (Put, ["vsock"]) => {
            let vsock: super::Vsock = parse(method, body)?;
            deprecated = vsock.vsock_id.is_some();
            MachineRequest::PutVsock(vsock)
        }
        (Put, _) => return Err(unknown()),

        (Patch, ["balloon"]) => MachineRequest::PatchBalloon(parse(method, body)?),
        (Patch, ["balloon", "statistics"]) => {
            MachineRequest::PatchBalloonStatistics(parse(method, body)?)
        }
        (Patch, ["balloon", "hinting", "start"]) => MachineRequest::StartBalloonHinting(
            // The one body that may be left out.
            if body.is_empty() { Default::default() } else { parse(method, body)? },
        ),
        (Patch, ["balloon", "hinting", "stop"]) => MachineRequest::StopBalloonHinting,
        (Patch, ["drives", id]) => {
            let drive: super::PartialDrive = parse_named(method, body, "drive_id", id)?;
            drive.check()?;
            MachineRequest::PatchDrive(drive)
        }
        (Patch, ["hotplug", "memory"]) => MachineRequest::PatchMemoryHotplug(parse(method, body)?),
        (Patch, ["machine-config"]) => {
            let update: super::MachineConfigUpdate = parse(method, body)?;
            deprecated = update.cpu_template.is_some();
            MachineRequest::PatchMachineConfig(update)
        }
        (Patch, ["mmds"]) => MachineRequest::PatchMmds(parse_object(method, body)?),
        (Patch, ["network-interfaces", id]) => {
            MachineRequest::PatchNetworkInterface(parse_named(method, body, "iface_id", id)?)
        }
        (Patch, ["pmem", id]) => MachineRequest::PatchPmem(parse_named(method, body, "id", id)?),
        (Patch, ["vm"]) => match parse::<Vm>(method, body)?.state {
            VmState::Paused => MachineRequest::Pause,
            VmState::Resumed => MachineRequest::Resume,
        },
        (Patch, _) => return Err(unknown()),

        (Delete, ["drives", id]) => MachineRequest::DeleteDrive(named("drive_id", id)?),
        (Delete, ["network-interfaces", id]) => {
            MachineRequest::DeleteNetworkInterface(named("iface_id", id)?)
        }
        (Delete, ["pmem", id]) => MachineRequest::DeletePmem(named("id", id)?),
        (Delete, _) => return Err(unknown()),
    };
    Ok(Routed { request, deprecated })
}

/// A name that only the path says.
fn named(field: &str, id: &str) -> Result<String, MachineError> {
    super::model::check_id(field, id)?;
    Ok(id.to_owned())
}

fn parse<T: DeserializeOwned>(method: Method, body: &[u8]) -> Result<T, MachineError> {
    if body.is_empty() {
        return Err(MachineError::new(&format!("Empty {} request.", method.name())));
    }
    serde_json::from_slice(body).map_err(|error| {
        let text = "An error occurred when deserializing the json body of a request:";
        MachineError::new(&format!("{text} {error}."))
    })
}

/// An object that says its own name, which the path says too.
fn parse_named<T: DeserializeOwned>(
    method: Method,
    body: &[u8],
    field: &str,
    id: &str,
) -> Result<T, MachineError> {
    super::model::check_id(field, id)?;
    let object: Value = parse(method, body)?;
    // Where it is not text, the object's own type says so.
    if let Some(own) = object.get(field).and_then(Value::as_str)
        && own != id
    {
        return Err(MachineError::new(&format!(
            "The id from the path [{id}] does not match the id from the body [{own}]!"
        )));
    }
    // Once more from the bytes: a field that comes twice is lost in a Value.
    parse(method, body)
}

fn parse_object(method: Method, body: &[u8]) -> Result<Value, MachineError> {
    match parse(method, body)? {
        object @ Value::Object(_) => Ok(object),
        _ => Err(MachineError::new(
            "An error occurred when deserializing the json body of a request: not an object.",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(method: Method, path: &str, body: &str) -> String {
        route(method, path, body.as_bytes()).unwrap_err().message
    }

    #[test]
    fn paths_that_are_not_there_are_named() {
        for path in ["", "x", "/x", "//", "/drives", "/drives/", "/drives/a/b", "/vm/config/x/y"] {
            let said = message(Method::Patch, path, "{}");
            if path != "/drives/" {
                assert_eq!(said, format!("Invalid request method and/or path: PATCH {path}."));
            }
        }
        assert!(route(Method::Get, "/vm/config", b"").is_ok());
        assert_eq!(
            message(Method::Put, "/vm/config", "{}"),
            "Invalid request method and/or path: PUT /vm/config."
        );
    }

    #[test]
    fn a_body_must_be_there_and_be_known() {
        assert_eq!(message(Method::Put, "/vsock", ""), "Empty PUT request.");
        assert_eq!(message(Method::Patch, "/vm", ""), "Empty PATCH request.");
        assert_eq!(message(Method::Get, "/", "{}"), "GET request cannot have a body.");
        let said = message(Method::Patch, "/vm", r#"{"state": "Paused", "more": 1}"#);
        assert!(said.contains("unknown field `more`"), "{said}");
        let said = message(Method::Put, "/actions", r#"{"action_type": "Explode"}"#);
        assert!(said.contains("unknown variant `Explode`"), "{said}");
    }

    #[test]
    fn a_name_is_the_same_in_path_and_body() {
        let said = message(Method::Put, "/drives/a", r#"{"drive_id": "b"}"#);
        assert_eq!(said, "The id from the path [a] does not match the id from the body [b]!");
        let said = message(Method::Put, "/drives/a-b", r#"{"drive_id": "a-b"}"#);
        assert!(said.contains("only have letters"), "{said}");
        let twice = r#"{"iface_id": "b", "iface_id": "a", "host_dev_name": "t"}"#;
        let said = message(Method::Put, "/network-interfaces/a", twice);
        assert!(said.contains("duplicate field"), "{said}");
    }

    #[test]
    fn what_is_deleted_is_named_by_its_path() {
        let request = |path| route(Method::Delete, path, b"").unwrap().request;
        assert_eq!(request("/drives/a"), MachineRequest::DeleteDrive("a".to_owned()));
        let interface = MachineRequest::DeleteNetworkInterface("a".to_owned());
        assert_eq!(request("/network-interfaces/a"), interface);
        assert_eq!(request("/pmem/a_1"), MachineRequest::DeletePmem("a_1".to_owned()));
        assert!(message(Method::Delete, "/drives/a-b", "").contains("only have letters"));
        let said = message(Method::Delete, "/drives/a", "{}");
        assert_eq!(said, "DELETE request cannot have a body.");
        let said = message(Method::Delete, "/vsock", "");
        assert_eq!(said, "Invalid request method and/or path: DELETE /vsock.");
    }

    #[test]
    fn deprecated_fields_are_told() {
        let put = |path, body: &str| route(Method::Put, path, body.as_bytes()).unwrap().deprecated;
        assert!(put("/vsock", r#"{"guest_cid": 3, "uds_path": "v", "vsock_id": "x"}"#));
        assert!(!put("/vsock", r#"{"guest_cid": 3, "uds_path": "v"}"#));
        assert!(put("/snapshot/load", r#"{"snapshot_path": "s", "mem_file_path": "m"}"#));
    }

    #[test]
    fn memory_comes_from_one_place() {
        let said = message(Method::Put, "/snapshot/load", r#"{"snapshot_path": "s"}"#);
        assert!(said.starts_with("missing field: either `mem_backend`"), "{said}");
    }
}
