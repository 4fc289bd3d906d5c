//! The rules of `deny.toml` (cargo-deny's format, of which anything else is refused), and of the files
//! in `resources/supply`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use cargo_metadata::Package;
use semver::{Version, VersionReq};
use serde::Deserialize;
use spdx::{Expression, Licensee, ParseMode};

use super::graph::Linked;
use crate::build::TRIPLE;

/// `deny.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deny {
    graph: Graph,
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Graph {
    targets: Vec<String>,
    all_features: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Bans {
    multiple_versions: OnlyDeny,
    wildcards: OnlyDeny,
    allow_wildcard_paths: bool,
    skip: Vec<Skip>,
}

/// What is not forbidden need not be in the file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OnlyDeny {
    Deny,
}

/// A crate in a version that may be there beside another.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Skip {
    /// `NAME@VERSION`.
    #[serde(rename = "crate")]
    spec: String,
    reason: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Sources {
    unknown_registry: OnlyDeny,
    unknown_git: OnlyDeny,
    allow_registry: Vec<String>,
}

/// What the rules look at in a package.
struct Crate<'p> {
    name: &'p str,
    version: &'p Version,
    license: Option<&'p str>,
    source: Option<&'p str>,
    /// Dependencies in any version, that are not paths.
    wildcards: Vec<&'p str>,
}

impl<'p> Crate<'p> {
    fn new(package: &'p Package) -> Crate<'p> {
        let any = |d: &&cargo_metadata::Dependency| d.req == VersionReq::STAR && d.path.is_none();
        Crate {
            name: package.name.as_str(),
            version: &package.version,
            license: package.license.as_deref(),
            source: package.source.as_ref().map(|source| source.repr.as_str()),
            wildcards: package.dependencies.iter().filter(any).map(|d| d.name.as_str()).collect(),
        }
    }
}

impl Deny {
    /// What is wrong with these packages, a line each.
    ///
    /// # Errors
    /// The rules themselves are wrong.
    pub fn check(&self, packages: &[Package]) -> Result<Vec<String>> {
        let crates: Vec<Crate<'_>> = packages.iter().map(Crate::new).collect();
        let mut wrong = self.licenses(&crates)?;
        let Bans { multiple_versions, wildcards, allow_wildcard_paths, skip } = &self.bans;
        // Each of them can say one thing only, which is what is done here.
        let (OnlyDeny::Deny, OnlyDeny::Deny) = (multiple_versions, wildcards);
        wrong.extend(duplicates(&crates, skip));
        if !allow_wildcard_paths || self.graph.all_features || self.graph.targets != [TRIPLE] {
            wrong.push(format!(
                "deny.toml: what is checked is allow-wildcard-paths, without all-features, for {TRIPLE}"
            ));
        }
        for package in &crates {
            // The registry takes no crates that have them.
            wrong.extend(package.wildcards.iter().filter(|_| package.source.is_none()).map(
                |dependency| format!("{} depends on any version of {dependency}", package.name),
            ));
        }
        let Sources { unknown_registry, unknown_git, allow_registry } = &self.sources;
        let (OnlyDeny::Deny, OnlyDeny::Deny) = (unknown_registry, unknown_git);
        wrong.extend(sources(&crates, allow_registry));
        Ok(wrong)
    }

    fn licenses(&self, crates: &[Crate<'_>]) -> Result<Vec<String>> {
        let allow = self.licenses.allow.iter().map(|name| {
            Licensee::parse(name).with_context(|| format!("deny.toml: licence {name:?}"))
        });
        let allow = allow.collect::<Result<Vec<_>>>()?;
        let mut wrong = Vec::new();
        let mut used = BTreeSet::new();
        for Crate { name, version, license, .. } in crates {
            let Some(text) = license else {
                wrong.push(format!("{name} {version} has no licence in its manifest"));
                continue;
            };
            // Old manifests have a slash for OR.
            let Ok(expression) = Expression::parse_mode(text, ParseMode::LAX) else {
                wrong.push(format!("{name} {version}: {text:?} is no SPDX expression"));
                continue;
            };
            let allowed = expression.evaluate(|wanted| {
                let found = allow.iter().position(|licensee| licensee.satisfies(wanted));
                used.extend(found);
                found.is_some()
            });
            if !allowed {
                wrong.push(format!("{name} {version}: the licence {text} is not in deny.toml"));
            }
        }
        let idle = (0..allow.len()).filter(|at| !used.contains(at));
        let names = idle.filter_map(|at| self.licenses.allow.get(at));
        wrong.extend(names.map(|name| format!("deny.toml: nothing has the licence {name}")));
        Ok(wrong)
    }
}

fn duplicates(crates: &[Crate<'_>], skip: &[Skip]) -> Vec<String> {
    let mut versions: BTreeMap<&str, BTreeSet<&Version>> = BTreeMap::new();
    for package in crates {
        versions.entry(package.name).or_default().insert(package.version);
    }
    let mut wrong = Vec::new();
    let mut idle: BTreeSet<&str> = skip.iter().map(|skip| skip.spec.as_str()).collect();
    for (name, versions) in versions.iter().filter(|(_, versions)| versions.len() > 1) {
        let left: Vec<String> = versions
            .iter()
            .filter(|version| !idle.remove(format!("{name}@{version}").as_str()))
            .map(ToString::to_string)
            .collect();
        if left.len() > 1 {
            wrong.push(format!(
                "{name} is there {} times: {}; unify them, or put all but one into skip of deny.toml \
                 with the reason",
                left.len(),
                left.join(", ")
            ));
        }
    }
    wrong
        .extend(idle.into_iter().map(|spec| format!("deny.toml: skip {spec} has nothing to skip")));
    let unreasoned = skip.iter().filter(|skip| skip.reason.trim().is_empty());
    wrong.extend(unreasoned.map(|skip| format!("deny.toml: skip {} has no reason", skip.spec)));
    wrong
}

fn sources(crates: &[Crate<'_>], allowed: &[String]) -> Vec<String> {
    let known = |source: &str| match source.split_once('+') {
        Some(("registry" | "sparse", url)) => allowed.iter().any(|allowed| allowed == url),
        _ => false,
    };
    crates
        .iter()
        .filter_map(|package| Some((package, package.source?)))
        .filter(|(_, source)| !known(source))
        .map(|(package, source)| format!("{} {} is from {source}", package.name, package.version))
        .collect()
}

/// `resources/supply/advisories.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Advisories {
    /// The day they were looked up.
    pub as_of: String,
    advisory: Vec<Advisory>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Advisory {
    id: String,
    #[serde(rename = "crate")]
    name: String,
    patched: Vec<VersionReq>,
    #[serde(default)]
    unaffected: Vec<VersionReq>,
}

impl Advisories {
    /// A line for each package that an advisory is about.
    pub fn check(&self, packages: &[Package]) -> Vec<String> {
        let crates: Vec<Crate<'_>> = packages.iter().map(Crate::new).collect();
        self.about(&crates)
    }

    fn about(&self, crates: &[Crate<'_>]) -> Vec<String> {
        let pairs = self.advisory.iter().flat_map(|a| crates.iter().map(move |c| (a, c)));
        pairs
            .filter(|(advisory, package)| {
                let sound = |req: &VersionReq| req.matches(package.version);
                advisory.name == package.name
                    && !advisory.patched.iter().chain(&advisory.unaffected).any(sound)
            })
            .map(|(advisory, package)| {
                let Advisory { id, patched, .. } = advisory;
                let patched: Vec<String> = patched.iter().map(VersionReq::to_string).collect();
                format!(
                    "{} {}: https://rustsec.org/advisories/{id}, fixed in {}",
                    package.name,
                    package.version,
                    patched.join(" or ")
                )
            })
            .collect()
    }
}

/// A line for each crate that a program links and must not.
pub fn banned(program: &str, banned: &[String], linked: &BTreeSet<Linked>) -> Vec<String> {
    linked
        .iter()
        .filter(|linked| banned.contains(&linked.name))
        .map(|linked| {
            format!("{program} links {} {}, which it must not", linked.name, linked.version)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

    fn deny(skip: &str) -> Deny {
        toml::from_str(&format!(
            "[graph]\ntargets = [{TRIPLE:?}]\nall-features = false\n\
             [licenses]\nallow = [\"MIT\", \"Apache-2.0\"]\n\
             [bans]\nmultiple-versions = \"deny\"\nwildcards = \"deny\"\n\
             allow-wildcard-paths = true\nskip = [{skip}]\n\
             [sources]\nunknown-registry = \"deny\"\nunknown-git = \"deny\"\n\
             allow-registry = [\"https://github.com/rust-lang/crates.io-index\"]\n"
        ))
        .unwrap()
    }

    fn versions(texts: &[&str]) -> Vec<Version> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn named<'p>(name: &'p str, version: &'p Version) -> Crate<'p> {
        let wildcards = Vec::new();
        Crate { name, version, license: Some("MIT"), source: Some(REGISTRY), wildcards }
    }

    #[test]
    fn a_licence_must_be_in_the_list() {
        let version = &versions(&["1.0.0"])[0];
        let check = |license| {
            let own = Crate { license: Some("Apache-2.0 AND MIT"), ..named("own", version) };
            deny("").licenses(&[own, Crate { license, ..named("a", version) }]).unwrap()
        };
        for good in ["MIT", "MIT OR GPL-3.0-only", "MIT/Apache-2.0", "(MIT OR ISC) AND Apache-2.0"]
        {
            assert_eq!(check(Some(good)), [] as [&str; 0], "{good}");
        }
        for bad in ["GPL-3.0-only", "MIT AND ISC", "Apache-2.0 WITH LLVM-exception"] {
            assert_eq!(
                check(Some(bad)),
                [format!("a 1.0.0: the licence {bad} is not in deny.toml")]
            );
        }
        assert!(check(None)[0].contains("no licence"));
        assert!(check(Some("whatever I like"))[0].contains("no SPDX expression"));
        let idle = deny("").licenses(&[named("a", version)]).unwrap();
        assert_eq!(idle, ["deny.toml: nothing has the licence Apache-2.0"]);
    }

    #[test]
    fn a_second_version_needs_a_reason() {
        let versions = versions(&["1.0.0", "2.0.0", "3.0.0"]);
        let crates: Vec<_> = versions.iter().map(|version| named("a", version)).collect();
        let check = |skip: &str| duplicates(&crates, &deny(skip).bans.skip);
        let skip = |version: &str| format!("{{ crate = \"a@{version}\", reason = \"b\" }},");
        assert!(check("")[0].starts_with("a is there 3 times: 1.0.0, 2.0.0, 3.0.0"));
        assert!(check(&skip("1.0.0"))[0].starts_with("a is there 2 times"));
        assert_eq!(check(&(skip("1.0.0") + &skip("3.0.0"))), [] as [&str; 0]);
        let idle = check(&(skip("1.0.0") + &skip("3.0.0") + &skip("4.0.0")));
        assert_eq!(idle, ["deny.toml: skip a@4.0.0 has nothing to skip"]);
        let silent =
            "{ crate = \"a@1.0.0\", reason = \" \" }, { crate = \"a@2.0.0\", reason = \"b\" }";
        assert_eq!(check(silent), ["deny.toml: skip a@1.0.0 has no reason"]);
    }

    #[test]
    fn crates_come_from_the_registry() {
        let version = &versions(&["1.0.0"])[0];
        let allowed = deny("").sources.allow_registry;
        for (source, good) in [
            (Some(REGISTRY), true),
            (None, true),
            (Some("registry+https://example.com/index"), false),
            (Some("git+https://github.com/rust-lang/crates.io-index"), false),
        ] {
            let crates = [Crate { source, ..named("a", version) }];
            assert_eq!(sources(&crates, &allowed).is_empty(), good, "{source:?}");
        }
    }

    #[test]
    fn an_advisory_is_about_versions() {
        let advisories: Advisories = toml::from_str(
            "as-of = \"2026-01-01\"\n[[advisory]]\nid = \"RUSTSEC-1\"\ncrate = \"a\"\n\
             patched = [\">=1.4.2\", \">=1.3.5, <1.4.0\"]\nunaffected = [\"<1.1.0\"]\n",
        )
        .unwrap();
        for (version, sound) in [
            ("1.0.9", true),
            ("1.1.0", false),
            ("1.3.4", false),
            ("1.3.5", true),
            ("1.4.0", false),
            ("1.4.2", true),
            ("2.0.0", true),
        ] {
            let version = version.parse().unwrap();
            assert_eq!(advisories.about(&[named("a", &version)]).is_empty(), sound, "{version}");
            assert!(advisories.about(&[named("b", &version)]).is_empty());
        }
    }

    #[test]
    fn a_program_must_not_link_what_is_banned() {
        let version = versions(&["1.0.0"]).remove(0);
        let linked = BTreeSet::from([Linked { name: "rustls".into(), version }]);
        assert_eq!(
            banned("vmm", &["rustls".into()], &linked),
            ["vmm links rustls 1.0.0, which it must not"]
        );
        assert!(banned("vmm", &["rustls-webpki".into()], &linked).is_empty());
    }

    #[test]
    fn rules_that_are_not_checked_are_refused() {
        assert!(toml::from_str::<Deny>("[advisories]\nversion = 2\n").is_err());
        let text = fs_text("deny.toml");
        toml::from_str::<Deny>(&text).unwrap();
        assert!(toml::from_str::<Deny>(&text.replace("= \"deny\"", "= \"warn\"")).is_err());
    }

    fn fs_text(name: &str) -> String {
        std::fs::read_to_string(crate::command::root().join(name)).unwrap()
    }
}
