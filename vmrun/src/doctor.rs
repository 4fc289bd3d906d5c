//! `vmrun doctor`.

use std::path::Path;

use engine::confinement::Policy;
use engine::doctor::{self, Verdict, production};

use crate::command::Format;
use crate::{Failure, output};

/// Prints what this host has and lacks; the exit status says whether machines can run, or whether
/// those of strangers should.
pub fn doctor(
    root: Option<&Path>,
    policy: &Policy,
    format: Format,
    production: bool,
) -> Result<u8, Failure> {
    let findings = match production {
        true => production::examine(Path::new("/"), production::landlock_version()),
        false => doctor::examine(root, policy),
    };
    match format {
        Format::Json => findings.iter().try_for_each(output::json)?,
        Format::Table => {
            for finding in &findings {
                let mark = match finding.verdict {
                    Verdict::Good => "ok  ",
                    Verdict::Limited => "warn",
                    Verdict::Missing => "FAIL",
                };
                output::line(format!("{mark}  {:22} {}", finding.subject, finding.found));
                if let Some(fix) = &finding.fix {
                    output::line(format!("      {:22} fix: {fix}", ""));
                }
            }
        }
    }
    Ok(u8::from(findings.iter().any(|finding| finding.verdict == Verdict::Missing)))
}
