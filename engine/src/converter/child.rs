//! The life of a converter.

#![allow(unsafe_code, reason = "takes over descriptors named by the parent")]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use images::conversion;
use jail::{Jail, JailError, Parent, Resource, Root, Step};
use nix::sys::signal::{SigHandler, Signal};
use seccompiler::{BpfProgram, sock_filter};

use super::{Cell, NAME};

/// Descriptors that entering the jail takes for a moment, at most.
const FOR_THE_JAIL: u64 = 16;
/// Made of `resources/seccomp/converter.json`.
const FILTER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/converter.bpf"));

/// Becomes a confined process, does the task that comes, and says how it went; the status to end
/// with.
pub fn live(cell: Option<OsString>) -> i32 {
    let said = match confine(cell) {
        Ok((inputs, output)) => {
            conversion::serve(&mut io::stdin().lock(), &mut io::stdout().lock(), inputs, output)
        }
        Err(reason) => {
            let _ = conversion::refuse(&mut io::stdout().lock(), reason);
            return 1;
        }
    };
    i32::from(said.is_err())
}

fn confine(cell: Option<OsString>) -> Result<(Vec<File>, File), String> {
    let text = cell.and_then(|cell| cell.into_string().ok()).ok_or("it was told nothing")?;
    let cell: Cell = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let kept = [cell.output, cell.pid_pipe];
    let mut kept: Vec<RawFd> = cell.inputs.iter().copied().chain(kept).collect();
    kept.sort_unstable();
    let last = kept.last().copied().unwrap_or_default();
    if kept.first().is_some_and(|first| *first < 3) || kept.windows(2).any(|two| two[0] == two[1]) {
        return Err("its descriptors are not its own".to_owned());
    }
    // SAFETY: nothing in this process has opened a descriptor yet; those that are open were
    // inherited by number.
    unsafe { jail::close_others(kept) }.map_err(|error| format!("closing descriptors: {error}"))?;
    let [output, pid_pipe] = [cell.output, cell.pid_pipe].map(inherited);
    let inputs: Vec<File> = cell.inputs.iter().map(|input| inherited(*input).into()).collect();
    // A file that would become too large is an error of the write.
    // SAFETY: no handler is set, and none of this program's waits for the signal.
    unsafe { nix::sys::signal::signal(Signal::SIGXFSZ, SigHandler::SigIgn) }
        .map_err(|error| format!("signals: {error}"))?;
    let _ = nix::sys::prctl::set_name(c"vmrun-converter");
    let without: Vec<Step> =
        cell.without.iter().map(|name| name.parse()).collect::<Result<_, _>>()?;
    let filtered = !without.contains(&Step::Seccomp);
    let jail = Jail {
        id: NAME.to_owned(),
        uid: cell.uid,
        gid: cell.gid,
        root: Root::Empty { visible: Vec::new() },
        network: None,
        cgroup: None,
        limits: vec![
            (Resource::RLIMIT_NOFILE, u64::try_from(last).unwrap_or(0) + FOR_THE_JAIL),
            (Resource::RLIMIT_FSIZE, cell.file_size),
            (Resource::RLIMIT_AS, cell.memory),
        ],
        parent: Parent::Leave { pid: pid_pipe },
        without,
    };
    jail.enter().map_err(|error| error.to_string())?;
    if filtered {
        seccompiler::apply_filter(&filter()).map_err(|error| {
            let error = io::Error::other(error.to_string());
            JailError::Step { step: Step::Seccomp, what: "filter".to_owned(), error }.to_string()
        })?;
    }
    Ok((inputs, output.into()))
}

/// The filter as it was compiled.
fn filter() -> BpfProgram {
    let (steps, _) = FILTER.as_chunks::<8>();
    let step = |bytes: &[u8; 8]| {
        let [code0, code1, jt, jf, k0, k1, k2, k3] = *bytes;
        let code = u16::from_ne_bytes([code0, code1]);
        sock_filter { code, jt, jf, k: u32::from_ne_bytes([k0, k1, k2, k3]) }
    };
    steps.iter().map(step).collect()
}

/// Takes over a descriptor that was inherited.
fn inherited(number: RawFd) -> OwnedFd {
    // SAFETY: `confine` has seen that these numbers are all different and none is a standard
    // stream's; nothing in this process has opened anything yet, so no object owns them. One that is
    // not open makes its uses fail.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_is_whole() {
        assert_eq!(FILTER.len() % 8, 0);
        // At least the check of the architecture and one rule.
        assert!(filter().len() > 8);
    }

    #[test]
    fn nonsense_is_refused_before_anything_is_closed() {
        for cell in [
            "",
            "{}",
            r#"{"uid":0,"gid":0,"file_size":0,"memory":0,"inputs":[1],"output":5,"pid_pipe":6,
                "without":[]}"#,
            r#"{"uid":0,"gid":0,"file_size":0,"memory":0,"inputs":[5],"output":5,"pid_pipe":6,
                "without":[]}"#,
        ] {
            assert!(confine(Some(cell.into())).is_err(), "{cell}");
        }
        assert!(confine(None).is_err());
    }
}
