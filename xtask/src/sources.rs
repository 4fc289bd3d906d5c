//! The project's files, for tests that look at them.

use std::collections::BTreeSet;
use std::path::Path;

use crate::command::root;

/// Files whose names end so, by their path from the project's root.
pub fn files(end: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            let is_built = name == "target" || path.join("CACHEDIR.TAG").exists();
            if entry.file_type().unwrap().is_dir() {
                if !name.starts_with('.') && !is_built {
                    folders.push(path);
                }
            } else if name.ends_with(end) {
                found.insert(relative(&path));
            }
        }
    }
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned()
}

/// What is in a file.
pub fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}
