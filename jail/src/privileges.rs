//! What a confined process may still do: nothing that it does not have open already.

use std::path::Path;

use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid};

use crate::Root;
use crate::error::{JailError, Step};

/// The newest version of Landlock that is known; a kernel with an older one gives what it has.
const LANDLOCK: ABI = ABI::V6;

/// Makes this process the user's and the group's.
pub fn set_ids(uid: u32, gid: u32) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    nix::unistd::setresgid(gid, gid, gid)
        .and_then(|()| nix::unistd::setresuid(uid, uid, uid))
        .map_err(JailError::host(format!("becoming user {uid} and group {gid}")))
}

/// Root leaves its groups. Others cannot, and keep theirs.
pub fn drop_groups() -> Result<(), JailError> {
    if nix::unistd::geteuid().is_root() {
        nix::unistd::setgroups(&[]).map_err(JailError::host("setgroups"))?;
    }
    Ok(())
}

/// Sets limits, and forbids core dumps, which would hold the guest's memory. One that is tighter
/// already stays.
pub fn limit(limits: &[(Resource, u64)]) -> Result<(), JailError> {
    for (resource, value) in limits.iter().chain(&[(Resource::RLIMIT_CORE, 0)]) {
        let failed = || format!("{resource:?}={value}");
        let (_, most) = getrlimit(*resource).map_err(JailError::host(failed()))?;
        let value = *value.min(&most);
        setrlimit(*resource, value, value).map_err(JailError::host(failed()))?;
    }
    Ok(())
}

/// Gives up all capabilities, and all ways to new ones; others of the same user cannot look into
/// this process any more.
pub fn drop_all() -> Result<(), JailError> {
    let failed = |set: CapSet| {
        move |error: caps::errors::CapsError| JailError::Host {
            what: format!("capabilities ({set:?})"),
            error: std::io::Error::other(error.to_string()),
        }
    };
    let has_any = caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP);
    if has_any.map_err(failed(CapSet::Effective))? {
        caps::clear(None, CapSet::Bounding).map_err(failed(CapSet::Bounding))?;
    }
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(failed(set))?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(JailError::host("no_new_privs"))?;
    nix::sys::prctl::set_dumpable(false).map_err(JailError::host("dumpable"))
}

/// A Landlock domain: no file can be opened but in a root that is a folder, and there no program
/// run and no device made; no TCP; no abstract socket and no signal to anyone outside.
pub fn landlock(root: &Root, own_root: bool) -> Result<(), JailError> {
    let failed = |error: landlock::RulesetError| JailError::Step {
        step: Step::Landlock,
        what: "rules".to_owned(),
        error: std::io::Error::other(error.to_string()),
    };
    let all = AccessFs::from_all(LANDLOCK);
    let rules = Ruleset::default()
        .handle_access(all)
        .and_then(|rules| rules.handle_access(AccessNet::from_all(LANDLOCK)))
        .and_then(|rules| rules.scope(Scope::from_all(LANDLOCK)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    let forbidden = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock;
    let rules = match root {
        Root::Empty { .. } if own_root => rules,
        _ => {
            let path = Path::new("/");
            let everything = PathFd::new(path).map_err(|error| JailError::Step {
                step: Step::Landlock,
                what: "/".to_owned(),
                error: std::io::Error::other(error.to_string()),
            })?;
            rules.add_rule(PathBeneath::new(everything, all & !forbidden)).map_err(failed)?
        }
    };
    rules.restrict_self().map(drop).map_err(failed)
}
