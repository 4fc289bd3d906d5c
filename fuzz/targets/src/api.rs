//! The machine's API: what stands between a client's bytes and the machine.

use api_server::machine::MachineRequest;
use api_server::machine::config_file::ConfigFile;
use api_server::machine::route::{Method, route};
use serde::Serialize;

/// A request: a byte for the method, the path, a line feed, the body. What is understood is
/// understood the same when it is written anew.
pub fn api_request(input: &[u8]) {
    let Some((method, rest)) = input.split_first() else { return };
    let method = [Method::Get, Method::Put, Method::Patch][usize::from(method % 3)];
    let mut parts = rest.splitn(2, |byte| *byte == b'\n');
    let Some(Ok(path)) = parts.next().map(str::from_utf8) else { return };
    let Ok(routed) = route(method, path, parts.next().unwrap_or_default()) else { return };
    let Some(body) = body(&routed.request) else { return };
    let again = route(method, path, &body);
    assert_eq!(again.as_ref(), Ok(&routed), "{}", String::from_utf8_lossy(&body));
}

/// A configuration file. What is understood is understood the same when it is written anew.
pub fn config_file(input: &[u8]) {
    let Ok(file) = ConfigFile::parse(input) else { return };
    let text = serde_json::to_vec(&file).unwrap();
    assert_eq!(ConfigFile::parse(&text).as_ref(), Ok(&file));
    assert!(file.into_requests().count() > 0);
}

/// The body of a request that has one, but for a document of the client's own.
fn body(request: &MachineRequest) -> Option<Vec<u8>> {
    use MachineRequest::*;
    fn json(object: &impl Serialize) -> Option<Vec<u8>> {
        Some(serde_json::to_vec(object).unwrap())
    }
    match request {
        PutMachineConfig(object) => json(object),
        PatchMachineConfig(object) => json(object),
        PutBootSource(object) => json(object),
        PutCpuConfig(object) => json(object),
        PutDrive(object) => json(object),
        PatchDrive(object) => json(object),
        PutNetworkInterface(object) => json(object),
        PatchNetworkInterface(object) => json(object),
        PutVsock(object) => json(object),
        PutEntropy(object) => json(object),
        PutSerial(object) => json(object),
        PutConsole(object) => json(object),
        PutBalloon(object) => json(object),
        PatchBalloon(object) => json(object),
        PatchBalloonStatistics(object) => json(object),
        StartBalloonHinting(object) => json(object),
        PutPmem(object) => json(object),
        PatchPmem(object) => json(object),
        PutMemoryHotplug(object) => json(object),
        PatchMemoryHotplug(object) => json(object),
        PutMmdsConfig(object) => json(object),
        PutLogger(object) => json(object),
        PutMetrics(object) => json(object),
        CreateSnapshot(object) => json(object),
        LoadSnapshot(object) => json(object),
        _ => None,
    }
}
