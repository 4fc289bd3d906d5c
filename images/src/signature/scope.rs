//! JSON objects whose keys are free, read as strictly as the rest of a policy: no key twice.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

/// An object whose keys are free and different.
#[derive(Debug)]
pub(super) struct Scopes<T>(pub BTreeMap<String, T>);

impl<T> Default for Scopes<T> {
    fn default() -> Scopes<T> {
        Scopes(BTreeMap::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Scopes<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Scopes<T>, D::Error> {
        struct Reader<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Reader<T> {
            type Value = Scopes<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Scopes<T>, A::Error> {
                let mut scopes = BTreeMap::new();
                while let Some((key, value)) = from.next_entry::<String, T>()? {
                    if scopes.contains_key(&key) {
                        return Err(A::Error::custom(format!("{key:?} is there twice")));
                    }
                    scopes.insert(key, value);
                }
                Ok(Scopes(scopes))
            }
        }
        from.deserialize_map(Reader(PhantomData))
    }
}
