//! The REST APIs, free of KVM and of whatever answers them.
//!
//! [`machine`] is the API of one micro-VM: Firecracker's objects, the requests made of them, and
//! the trait of what answers.

#![forbid(unsafe_code)]

pub mod machine;
