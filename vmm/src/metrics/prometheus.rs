//! Prometheus's text format (its documentation, "Exposition formats", version 0.0.4).
//!
//! The crate `prometheus-client` keeps counts itself and writes OpenMetrics; here the counts are
//! with what they are of, and a client gets plain text.

use std::collections::BTreeMap;
use std::fmt::Write;

use telemetry::Kind;

use super::Sample;

/// The series of one name.
struct Family {
    help: String,
    kind: &'static str,
    /// Labels and value of each.
    series: Vec<(String, String)>,
}

/// The label of a thing's name.
fn label(group: &str) -> &'static str {
    match group {
        "block" => "drive",
        "net" => "interface",
        "vcpu" => "vcpu",
        _ => "id",
    }
}

/// The name of a metric: base units, and `_total` for what only grows.
fn name(group: &str, reading: &str, kind: Kind) -> String {
    let group = group.strip_suffix("_us").unwrap_or(group);
    // Firecracker says it twice for some: `entropy.entropy_bytes`.
    let own = reading.strip_prefix(group).and_then(|rest| rest.strip_prefix('_'));
    let own = own.unwrap_or(reading);
    match kind {
        Kind::Counter => {
            format!("vmrun_{group}_{}_total", own.strip_suffix("_count").unwrap_or(own))
        }
        Kind::Microseconds => {
            format!("vmrun_{group}_{}_seconds", own.strip_suffix("_us").unwrap_or(own))
        }
    }
}

fn value(value: u64, kind: Kind) -> String {
    match kind {
        Kind::Counter => value.to_string(),
        Kind::Microseconds => format!("{}.{:06}", value / 1_000_000, value % 1_000_000),
    }
}

/// All samples, by name, as the format wants it.
pub fn text(samples: &[Sample]) -> String {
    let mut families = BTreeMap::<String, Family>::new();
    for Sample { name: thing, readings } in samples {
        let kind = readings.kind;
        let labels = thing.as_ref().map_or_else(String::new, |thing| {
            let thing = thing.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n");
            format!("{{{}=\"{thing}\"}}", label(readings.group))
        });
        for reading in &readings.readings {
            let family = families.entry(name(readings.group, reading.name, kind));
            let family = family.or_insert_with(|| Family {
                help: reading.help.trim().replace('\\', r"\\"),
                kind: if kind == Kind::Counter { "counter" } else { "gauge" },
                series: Vec::new(),
            });
            family.series.push((labels.clone(), value(reading.value, kind)));
        }
    }
    let mut text = String::new();
    for (name, Family { help, kind, series }) in families {
        // Writing to a string does not fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in series {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    }
    text
}
