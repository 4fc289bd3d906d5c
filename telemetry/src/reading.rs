//! Numbers with their names, so that whoever collects them need not know what they are of.

/// How a number behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only ever grows.
    Counter,
    /// It is the latest of several measurements, in microseconds.
    Microseconds,
}

/// One number at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Its name, Firecracker's where Firecracker has it.
    pub name: &'static str,
    /// What it is, in one line.
    pub help: &'static str,
    /// Its value.
    pub value: u64,
}

/// The numbers of one thing at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Readings {
    /// The kind of thing, as Firecracker calls it in its lines: `block`, `net`, `vcpu`.
    pub group: &'static str,
    /// What its numbers are.
    pub kind: Kind,
    /// Its numbers, always the same ones for one group.
    pub readings: Vec<Reading>,
}

/// Declares a structure of numbers, `u64` each and zero at first, and how they are read:
///
/// ```
/// telemetry::metrics! {
///     /// What a toaster has done.
///     pub struct ToasterMetrics("toaster", Counter) {
///         /// Slices put in.
///         slices_count,
///     }
/// }
/// let metrics = ToasterMetrics { slices_count: 2 };
/// assert_eq!(metrics.readings().readings[0].help, " Slices put in.");
/// ```
///
/// Whoever has it adds to the fields. What is read is a copy: reading changes nothing.
#[macro_export]
macro_rules! metrics {
    (
        $(#[$about:meta])*
        $visibility:vis struct $name:ident($group:literal, $kind:ident) {
            $($(#[doc = $help:literal])+ $field:ident,)+
        }
    ) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        $visibility struct $name {
            $($(#[doc = $help])+ pub $field: u64,)+
        }

        impl $name {
            /// Adds the numbers of another.
            #[allow(dead_code, reason = "not all are added up")]
            $visibility fn add(&mut self, other: &$name) {
                $(self.$field += other.$field;)+
            }

            /// The numbers as they are now, with their names.
            $visibility fn readings(&self) -> $crate::Readings {
                $crate::Readings {
                    group: $group,
                    kind: $crate::Kind::$kind,
                    readings: vec![$($crate::Reading {
                        name: stringify!($field),
                        help: concat!($($help),+),
                        value: self.$field,
                    }),+],
                }
            }
        }
    };
}
