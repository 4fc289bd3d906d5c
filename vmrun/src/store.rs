//! The image store, under the signature policy in force.

use std::path::{Path, PathBuf};

use engine::confinement::Step;
use engine::converter;
use engine::paths::Paths;
use images::{Policy, Store};

use crate::Failure;

/// Opens the store. `policy` is the file that the user names; without it the first of vmrun's own and
/// those of other container tools counts, and without any of those everything is accepted.
/// What parses an image's bytes is confined but for `unconfined`.
pub fn open(paths: &Paths, policy: Option<&Path>, unconfined: &[Step]) -> Result<Store, Failure> {
    let policy = match policy {
        Some(path) => Some(Policy::read(path)?),
        None => {
            let of = |name: &str| std::env::var_os(name).map(PathBuf::from);
            Policy::find(&files(of("XDG_CONFIG_HOME"), of("HOME")))?
        }
    };
    Ok(converter::store(paths, unconfined)?.with_policy(policy))
}

/// Where a policy is sought, in this order.
fn files(config: Option<PathBuf>, home: Option<PathBuf>) -> Vec<PathBuf> {
    let absolute = |path: &PathBuf| path.is_absolute();
    let home = home.filter(absolute).map(|home| home.join(".config"));
    let own = config.filter(absolute).or_else(|| home.clone());
    // The other tools do not look at XDG_CONFIG_HOME.
    [
        own.map(|folder| folder.join("vmrun/policy.json")),
        Some("/etc/vmrun/policy.json".into()),
        home.map(|folder| folder.join("containers/policy.json")),
        Some("/etc/containers/policy.json".into()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_place_comes_first() {
        let shown = |config: Option<&str>, home: Option<&str>| {
            let files = files(config.map(PathBuf::from), home.map(PathBuf::from));
            files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(" ")
        };
        let system = "/etc/vmrun/policy.json";
        let others = "/etc/containers/policy.json";
        assert_eq!(
            shown(Some("/c"), Some("/h")),
            format!("/c/vmrun/policy.json {system} /h/.config/containers/policy.json {others}")
        );
        assert_eq!(
            shown(None, Some("/h")),
            format!(
                "/h/.config/vmrun/policy.json {system} /h/.config/containers/policy.json {others}"
            )
        );
        assert_eq!(shown(Some("relative"), None), format!("{system} {others}"));
    }
}
