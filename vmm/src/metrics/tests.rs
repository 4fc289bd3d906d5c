//! Lines and text, from counts that are made up.

use std::io::Read;
use std::time::{SystemTime, UNIX_EPOCH};

use devices::virtio::block::BlockMetrics;
use devices::virtio::net::NetMetrics;
use nix::sys::stat::Mode;
use serde_json::Value;

use super::*;

fn drive(name: &str, read_bytes: u64) -> Sample {
    let metrics = BlockMetrics { read_bytes, read_count: 1, ..BlockMetrics::default() };
    Sample { name: Some(name.to_owned()), readings: metrics.readings() }
}

fn config(path: &std::path::Path) -> Metrics {
    Metrics { metrics_path: path.to_owned(), emit_id: false, properties: BTreeMap::new() }
}

/// A collector that writes to a file.
fn collector() -> (Collector, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut collector = Collector::new("machine");
    collector.configure(&config(file.path())).unwrap();
    (collector, file)
}

fn lines(text: &str) -> Vec<Value> {
    assert!(text.is_empty() || text.ends_with('\n'), "the last line is not whole");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn written(file: &tempfile::NamedTempFile) -> Vec<Value> {
    lines(&std::fs::read_to_string(file.path()).unwrap())
}

#[test]
fn a_line_has_what_was_added_since_the_line_before() {
    let (mut collector, file) = collector();
    collector.write(vec![drive("rootfs", 1000), drive("data", 10)], None).unwrap();
    collector.served_events(3);
    collector.write(vec![drive("rootfs", 1500), drive("data", 10)], None).unwrap();
    let lines = written(&file);
    let read = |line: usize, group: &str| lines[line][group]["read_bytes"].as_u64().unwrap();
    assert_eq!(
        [read(0, "block_rootfs"), read(0, "block_data"), read(0, "block")],
        [1000, 10, 1010]
    );
    assert_eq!([read(1, "block_rootfs"), read(1, "block_data"), read(1, "block")], [500, 0, 500]);
    assert_eq!(lines[0]["block"]["read_count"], 2);
    assert_eq!(lines[1]["block"]["read_count"], 0);
    assert_eq!(
        (&lines[0]["vmm"]["device_events"], &lines[1]["vmm"]["device_events"]),
        (&0.into(), &3.into())
    );
}

#[test]
fn a_device_that_takes_the_place_of_another_counts_from_zero() {
    let (mut collector, file) = collector();
    collector.write(vec![drive("data", 1000)], None).unwrap();
    collector.write(vec![drive("data", 10)], None).unwrap();
    collector.write(vec![], None).unwrap();
    collector.write(vec![drive("data", 20)], None).unwrap();
    let read: Vec<_> =
        written(&file).iter().map(|line| line["block"]["read_bytes"].clone()).collect();
    assert_eq!(read, [1000, 10, 0, 20]);
}

#[test]
fn a_line_begins_with_the_time_and_has_what_its_owner_wants() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut collector = Collector::new("machine");
    let properties = BTreeMap::from([("zone".to_owned(), "a".to_owned())]);
    let config = Metrics { emit_id: true, properties, ..config(file.path()) };
    collector.configure(&config).unwrap();
    collector.write(vec![], None).unwrap();
    let text = std::fs::read_to_string(file.path()).unwrap();
    assert!(text.starts_with(r#"{"utc_timestamp_ms":"#), "{text}");
    let line = &lines(&text)[0];
    assert_eq!((&line["id"], &line["properties"]["zone"]), (&"machine".into(), &"a".into()));
    let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
        - line["utc_timestamp_ms"].as_u64().unwrap();
    assert!(age < 60_000, "{age}");
    // Groups of devices that are not there are there, as Firecracker has it.
    for group in [
        "balloon",
        "block",
        "entropy",
        "i8042",
        "latencies_us",
        "logger",
        "memory_hotplug",
        "net",
        "pmem",
        "put_api_requests",
        "uart",
        "vcpu",
        "vmm",
        "vsock",
        "api_server",
    ] {
        assert!(line[group].is_object(), "{group}");
    }
    assert_eq!(line.get("block_"), None);
}

#[test]
fn measurements_are_repeated_and_not_added_up() {
    let (mut collector, file) = collector();
    let request = MachineRequest::Pause;
    let received = Instant::now() - Duration::from_millis(5);
    let timing = collector.begin(&request, received).unwrap();
    collector.end(&timing);
    assert!(collector.begin(&MachineRequest::GetVersion, received).is_none());
    for _ in 0..2 {
        collector.write(vec![], None).unwrap();
    }
    let lines = written(&file);
    assert!(lines[0]["latencies_us"]["pause_vm"].as_u64().unwrap() >= 5000);
    assert!(lines[0]["latencies_us"]["vmm_pause_vm"].as_u64().unwrap() < 5000);
    assert_eq!(lines[0]["latencies_us"], lines[1]["latencies_us"]);
    assert_eq!(lines[0]["latencies_us"]["resume_vm"], 0);
}

#[test]
fn metrics_go_to_one_place_for_ever() {
    let (mut collector, file) = collector();
    let error = collector.configure(&config(file.path())).unwrap_err();
    assert!(error.to_string().contains("Reinitialization of metrics not allowed."), "{error}");
    let mut other = Collector::new("other");
    assert!(other.configure(&config("/does/not/exist".as_ref())).is_err());
    // Nowhere is a place too.
    other.write(vec![], None).unwrap();
    other.flush(vec![], None).unwrap();
}

#[test]
fn a_fifo_without_a_reader_loses_lines_and_no_counts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
    let mut collector = Collector::new("machine");
    collector.configure(&config(&path)).unwrap();
    let mut fifo = output_file::open(&path).unwrap();
    let mut text = String::new();
    let (mut bytes, mut missed) = (0, 0);
    for round in 0..3 {
        for _ in 0..200 {
            bytes += 7;
            missed += u64::from(collector.flush(vec![drive("rootfs", bytes)], None).is_err());
        }
        assert!(missed > 0, "{round}");
        // A reader comes, at last; it gets what there is room for.
        let mut part = Vec::new();
        assert!(fifo.read_to_end(&mut part).is_err());
        text += std::str::from_utf8(&part).unwrap();
    }
    collector.flush(vec![drive("rootfs", bytes)], None).unwrap();
    let mut part = Vec::new();
    assert!(fifo.read_to_end(&mut part).is_err());
    text += std::str::from_utf8(&part).unwrap();
    let lines = lines(&text);
    let sum = |group: &str, name: &str| -> u64 {
        lines.iter().map(|line| line[group][name].as_u64().unwrap()).sum()
    };
    assert_eq!(sum("block_rootfs", "read_bytes"), bytes);
    assert_eq!(sum("logger", "missed_metrics_count"), missed);
    assert_eq!(sum("logger", "metrics_fails"), missed);
    assert_eq!(lines.len() as u64 + missed, 601);
}

/// The series of a text, checked against the format: each family's HELP, TYPE and series together,
/// once.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let is_name = |name: &str| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':';
        !name.is_empty() && name.bytes().all(known) && !name.as_bytes()[0].is_ascii_digit()
    };
    let mut families = std::collections::BTreeSet::new();
    let mut series = BTreeMap::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let (name, help) = line.strip_prefix("# HELP ").unwrap().split_once(' ').unwrap();
        assert!(is_name(name) && help.len() > 5 && help.trim() == help, "{line}");
        assert!(families.insert(name.to_owned()), "{name} comes twice");
        let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {name} ")).unwrap();
        assert!(["counter", "gauge"].contains(&kind), "{kind}");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
        let mut own = 0;
        while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
            let (id, value) = line.rsplit_once(' ').unwrap();
            let labels = id.strip_prefix(name).unwrap();
            if !labels.is_empty() {
                let inner = labels.strip_prefix('{').unwrap().strip_suffix('}').unwrap();
                let (label, quoted) = inner.split_once('=').unwrap();
                assert!(is_name(label), "{line}");
                assert!(
                    quoted.len() > 2 && quoted.starts_with('"') && quoted.ends_with('"'),
                    "{line}"
                );
            }
            assert_eq!(series.insert(id.to_owned(), value.parse().unwrap()), None, "{line}");
            own += 1;
        }
        assert!(own > 0, "{name} has no series");
    }
    series
}

#[test]
fn prometheus_gets_totals_with_labels_whatever_lines_were_written() {
    let (mut collector, _file) = collector();
    let interface = NetMetrics { rx_bytes_count: 5, ..NetMetrics::default() };
    let machine = vec![
        drive("rootfs", 1000),
        Sample { name: Some("eth0".to_owned()), readings: interface.readings() },
        drive("da\"ta\\", 10),
    ];
    collector.started(Instant::now() - Duration::from_millis(1500));
    let before = collector.text(machine.clone(), None);
    collector.write(machine.clone(), None).unwrap();
    assert_eq!(collector.text(machine.clone(), None), before);
    let series = parse(&before);
    assert_eq!(series[r#"vmrun_block_read_bytes_total{drive="rootfs"}"#], 1000.0);
    assert_eq!(series[r#"vmrun_block_read_bytes_total{drive="da\"ta\\"}"#], 10.0);
    assert_eq!(series[r#"vmrun_net_rx_bytes_total{interface="eth0"}"#], 5.0);
    assert!(series["vmrun_api_server_process_startup_time_seconds"] >= 1.5);
    assert_eq!(series["vmrun_put_api_requests_drive_total"], 0.0);
    // What is not there has no series.
    assert!(!before.contains("vmrun_vsock"));
}

#[test]
fn no_two_numbers_have_one_name() {
    let readings = line::always();
    let samples: Vec<_> = readings.into_iter().map(Sample::from).collect();
    let numbers: usize = samples.iter().map(|sample| sample.readings.readings.len()).sum();
    assert_eq!(parse(&prometheus::text(&samples)).len(), numbers);
}

#[test]
fn the_documentation_has_every_number() {
    let text = include_str!("../../../docs/metrics.md");
    let own = Collector::new("machine").own(None);
    let all = line::always().into_iter().chain(own.into_iter().map(|sample| sample.readings));
    let mut count = 0;
    for Readings { group, readings, .. } in all {
        for reading in readings {
            let row = format!("| `{group}.{}` | ", reading.name);
            assert!(text.contains(&row), "{row}");
            count += 1;
        }
    }
    let rows = text.lines().filter(|line| line.contains(" | yes |") || line.contains(" | no |"));
    assert_eq!(rows.count() + text.matches(" | older versions |").count(), count);
}
