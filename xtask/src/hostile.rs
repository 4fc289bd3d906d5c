//! Whether docs/hostile.md names the tests that there are.

use std::collections::{BTreeMap, BTreeSet};

use crate::sources::{files, read};

const TABLE: &str = "docs/hostile.md";
const LINES: u32 = 28;

/// Names in backquotes.
fn names(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The tests of each line.
fn table() -> BTreeMap<u32, BTreeSet<String>> {
    let mut lines = BTreeMap::new();
    for row in read(TABLE).lines().filter(|row| row.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let Ok(number) = cells[0].parse() else { continue };
        assert_eq!(cells.len(), 4, "{row}");
        assert!(!cells[1].is_empty());
        assert!(lines.insert(number, names(cells[2])).is_none(), "line {number} twice");
    }
    lines
}

/// All functions of the sources.
fn functions() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for file in files(".rs") {
        for line in read(&file).lines() {
            let Some((before, rest)) = line.split_once("fn ") else { continue };
            let is_item = before.split_whitespace().all(|word| ["pub", "async"].contains(&word));
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            if is_item && let Some(name) = rest.get(..end.unwrap_or(0)) {
                found.insert(name.to_owned());
            }
        }
    }
    found
}

#[test]
fn every_line_of_the_table_has_tests_and_they_are_there() {
    let (table, functions) = (table(), functions());
    assert_eq!(table.keys().copied().collect::<Vec<_>>(), (1..=LINES).collect::<Vec<_>>());
    for (line, tests) in &table {
        assert!(!tests.is_empty(), "line {line} has no test");
        let missing: Vec<_> = tests.difference(&functions).collect();
        assert!(missing.is_empty(), "line {line} names what is not there: {missing:?}");
    }
}

#[test]
fn every_test_of_a_line_is_in_the_table() {
    let table = table();
    for name in functions() {
        let Some(rest) = name.strip_prefix("hostile_") else { continue };
        let number = rest.split('_').next().and_then(|number| number.parse::<u32>().ok());
        let line = number.and_then(|number| table.get(&number));
        assert!(line.is_some(), "{name} does not say which line of {TABLE} it is of");
        let listed = line.is_some_and(|tests| tests.contains(&name));
        assert!(listed, "{TABLE} does not name {name}");
    }
}
