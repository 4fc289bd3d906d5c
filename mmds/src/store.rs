//! The data store: one JSON object, that the host writes and the guest reads.

use serde_json::{Map, Value};

/// Bytes of JSON a store holds where nothing else is asked for (Firecracker's
/// `--http-api-max-payload-size`, which its `--mmds-size-limit` defaults to).
pub const DEFAULT_SIZE_LIMIT: usize = 51200;

/// Why the store refuses. The texts are Firecracker's, which clients match on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// What would be stored is larger than the limit. (HTTP 413 at the host's API.)
    #[error("The MMDS patch request doesn't fit.")]
    LimitExceeded,
    /// A patch before anything was put.
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
    /// Put or patched with something other than an object.
    #[error("The MMDS data store must be a JSON object.")]
    NotAnObject,
    /// Nothing is at this path.
    #[error("Resource not found: {0}.")]
    NotFound(String),
    /// A value that is neither text nor an object has no IMDS form.
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    UnsupportedType,
}

/// How a value is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As JSON.
    Json,
    /// As EC2's instance metadata service shows it: a string is its text, an object the list of its
    /// keys.
    Imds,
}

/// The data store.
#[derive(Clone, Debug)]
pub struct Store {
    /// `None` until something is put.
    contents: Option<Value>,
    size_limit: usize,
}

impl Store {
    /// A store without contents, for so many bytes of JSON.
    pub fn new(size_limit: usize) -> Store {
        Store { contents: None, size_limit }
    }

    /// Replaces the contents. On an error they stay as they were.
    pub fn put(&mut self, contents: Value) -> Result<(), StoreError> {
        if !contents.is_object() {
            return Err(StoreError::NotAnObject);
        }
        if contents.to_string().len() > self.size_limit {
            return Err(StoreError::LimitExceeded);
        }
        self.contents = Some(contents);
        Ok(())
    }

    /// Merges a patch into the contents (RFC 7396). On an error they stay as they were.
    pub fn patch(&mut self, patch: &Value) -> Result<(), StoreError> {
        let mut contents = self.contents.clone().ok_or(StoreError::NotInitialized)?;
        json_patch::merge(&mut contents, patch);
        self.put(contents)
    }

    /// The contents; an empty object where nothing was put.
    pub fn get(&self) -> Value {
        self.contents.clone().unwrap_or_else(|| Value::Object(Map::new()))
    }

    /// What is at a path, as `/latest/meta-data`: a JSON pointer (RFC 6901) in which slashes too
    /// many, at the end or elsewhere, do not count. So array elements go by their index.
    ///
    /// A store that nothing was put into is `null`, as Firecracker's is.
    pub fn lookup(&self, path: &str, format: Format) -> Result<String, StoreError> {
        let keys = path.split('/').filter(|key| !key.is_empty());
        let pointer: String = keys.flat_map(|key| ["/", key]).collect();
        let value = match &self.contents {
            Some(contents) => contents.pointer(&pointer),
            None => Value::Null.pointer(&pointer).map(|_| &Value::Null),
        };
        let value = value.ok_or_else(|| StoreError::NotFound(path.to_owned()))?;
        match (format, value) {
            (Format::Json, value) => Ok(value.to_string()),
            (Format::Imds, Value::String(text)) => Ok(text.clone()),
            (Format::Imds, Value::Object(object)) => Ok(keys_of(object)),
            (Format::Imds, _) => Err(StoreError::UnsupportedType),
        }
    }
}

/// One key a line, those of objects with a slash behind.
fn keys_of(object: &Map<String, Value>) -> String {
    let line = |(key, value): (&String, &Value)| {
        if value.is_object() { format!("{key}/") } else { key.clone() }
    };
    object.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn store(contents: Value) -> Store {
        let mut store = Store::new(DEFAULT_SIZE_LIMIT);
        store.put(contents).unwrap();
        store
    }

    fn instance() -> Store {
        store(json!({"latest": {
            "meta-data": {
                "ami-id": "ami-12345678", "network": {"mac": "02:29"}, "list": ["a", {"b": "c"}],
                "empty": "", "with/slash": "1", "nothing": {},
            },
            "limits": {"cpu": 512, "usage": 12.5, "on": true, "off": null},
        }}))
    }

    #[test]
    fn a_path_leads_to_text_in_imds_format_and_to_json_in_json_format() {
        let store = instance();
        let imds = |path: &str| store.lookup(path, Format::Imds);
        let json = |path: &str| store.lookup(path, Format::Json);
        assert_eq!(imds("/latest/meta-data/ami-id"), Ok("ami-12345678".into()));
        assert_eq!(json("/latest/meta-data/ami-id"), Ok("\"ami-12345678\"".into()));
        assert_eq!(imds("/latest/meta-data/empty"), Ok(String::new()));
        assert_eq!(imds("/latest"), Ok("limits/\nmeta-data/".into()));
        let keys = "ami-id\nempty\nlist\nnetwork/\nnothing/\nwith/slash";
        assert_eq!(imds("/latest/meta-data"), Ok(keys.into()));
        assert_eq!(imds("/latest/meta-data/nothing"), Ok(String::new()));
        assert_eq!(json("/latest/limits/cpu"), Ok("512".into()));
        assert_eq!(json("/latest/limits/off"), Ok("null".into()));
        assert_eq!(imds("/"), Ok("latest/".into()));
        assert_eq!(imds(""), Ok("latest/".into()));
    }

    #[test]
    fn slashes_too_many_do_not_count() {
        let store = instance();
        for path in [
            "/latest/meta-data/ami-id/",
            "//latest///meta-data/ami-id//",
            "latest/meta-data/ami-id",
        ] {
            assert_eq!(store.lookup(path, Format::Imds), Ok("ami-12345678".into()), "{path}");
        }
    }

    #[test]
    fn a_path_is_a_json_pointer() {
        let store = instance();
        let imds = |path: &str| store.lookup(path, Format::Imds);
        assert_eq!(imds("/latest/meta-data/list/0"), Ok("a".into()));
        assert_eq!(imds("/latest/meta-data/list/1/b"), Ok("c".into()));
        assert!(matches!(imds("/latest/meta-data/list/2"), Err(StoreError::NotFound(_))));
        assert_eq!(imds("/latest/meta-data/with~1slash"), Ok("1".into()));
    }

    #[test]
    fn only_strings_and_objects_have_an_imds_form() {
        let store = instance();
        for path in ["cpu", "usage", "on", "off"] {
            let path = format!("/latest/limits/{path}");
            assert_eq!(store.lookup(&path, Format::Imds), Err(StoreError::UnsupportedType));
        }
        let list = store.lookup("/latest/meta-data/list", Format::Imds);
        assert_eq!(list, Err(StoreError::UnsupportedType));
    }

    #[test]
    fn an_unknown_path_is_named_as_it_was_asked_for() {
        let error = instance().lookup("/latest/nope/", Format::Json).unwrap_err();
        assert_eq!(error.to_string(), "Resource not found: /latest/nope/.");
    }

    #[test]
    fn a_store_is_empty_until_something_is_put() {
        let mut store = Store::new(DEFAULT_SIZE_LIMIT);
        assert_eq!(store.get(), json!({}));
        assert_eq!(store.lookup("/", Format::Json), Ok("null".into()));
        assert_eq!(store.lookup("/", Format::Imds), Err(StoreError::UnsupportedType));
        assert!(matches!(store.lookup("/a", Format::Json), Err(StoreError::NotFound(_))));
        assert_eq!(store.patch(&json!({"a": "b"})), Err(StoreError::NotInitialized));
        store.put(json!({})).unwrap();
        store.patch(&json!({"a": "b"})).unwrap();
        assert_eq!(store.get(), json!({"a": "b"}));
    }

    #[test]
    fn a_patch_adds_replaces_and_removes() {
        let mut store = store(json!({"a": {"b": "1", "c": [1, 2]}, "d": "2"}));
        let patch = json!({"a": {"b": null, "c": [3], "e": {"f": null, "g": "4"}}, "h": {}});
        store.patch(&patch).unwrap();
        assert_eq!(store.get(), json!({"a": {"c": [3], "e": {"g": "4"}}, "d": "2", "h": {}}));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        let mut store = store(json!({"a": "b"}));
        for value in [json!(null), json!("text"), json!([1]), json!(5)] {
            assert_eq!(store.put(value.clone()), Err(StoreError::NotAnObject));
            assert_eq!(store.patch(&value), Err(StoreError::NotAnObject));
        }
        assert_eq!(store.get(), json!({"a": "b"}));
    }

    #[test]
    fn what_is_larger_than_the_limit_changes_nothing() {
        // {"k":"..."} has 8 bytes beside its text.
        let of_size = |size: usize| json!({"k": "a".repeat(size - 8)});
        let mut store = Store::new(100);
        store.put(of_size(100)).unwrap();
        assert_eq!(store.put(of_size(101)), Err(StoreError::LimitExceeded));
        assert_eq!(store.patch(&json!({"l": ""})), Err(StoreError::LimitExceeded));
        assert_eq!(store.get(), of_size(100));
        store.patch(&json!({"k": "b"})).unwrap();
        store.patch(&json!({"l": ""})).unwrap();
        let text = StoreError::LimitExceeded.to_string();
        assert_eq!(text, "The MMDS patch request doesn't fit.");
    }
}
