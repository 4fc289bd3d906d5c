//! Why a machine could not be started.

use std::path::{Path, PathBuf};

/// One line for a user: what failed, on what.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `/dev/kvm` is not there or may not be used.
    #[error("cannot open /dev/kvm: {0}; is KVM enabled, and may this user read and write it?")]
    OpenKvm(kvm_ioctls::Error),
    /// It is something else, or ancient.
    #[error("/dev/kvm is not a KVM of API version 12")]
    KvmVersion,
    /// A KVM call failed.
    #[error("KVM: {call}: {error}")]
    Kvm {
        /// The call's name in the KVM API.
        call: &'static str,
        /// The kernel's answer.
        error: kvm_ioctls::Error,
    },
    /// Guest memory could not be had.
    #[error("cannot get {mib} MiB of guest memory: {reason}")]
    Memory {
        /// Size asked for.
        mib: usize,
        /// Why not.
        reason: String,
    },
    /// No kernel was named.
    #[error("no boot source: name a kernel")]
    NoBootSource,
    /// A file that cannot be opened.
    #[error("cannot open {what} {path}: {error}")]
    Open {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host says.
        error: std::io::Error,
    },
    /// The kernel or initramfs is not bootable.
    #[error("{path}: {error}")]
    Boot {
        /// The kernel.
        path: PathBuf,
        /// Why not.
        error: arch::boot::BootError,
    },
    /// ACPI tables do not fit.
    #[error(transparent)]
    Acpi(#[from] arch::acpi::AcpiError),
    /// CPUID leaves do not fit.
    #[error(transparent)]
    Cpuid(#[from] arch::cpuid::CpuidError),
    /// Boot structures do not fit.
    #[error("cannot write boot structures: {0}")]
    GuestMemory(#[from] vm_memory::GuestMemoryError),
    /// A drive's file is unusable.
    #[error("drive {id}: {error}")]
    Drive {
        /// Its name.
        id: String,
        /// Why.
        error: devices::virtio::block::DiskError,
    },
    /// Any other device could not be made.
    #[error("{device}: {reason}")]
    Device {
        /// Which device.
        device: String,
        /// Why.
        reason: String,
    },
    /// More devices than interrupts.
    #[error("too many devices: there are interrupts for {0}")]
    TooManyDevices(usize),
    /// A descriptor, thread or event queue could not be had.
    #[error("{what}: {error}")]
    Host {
        /// What was wanted.
        what: &'static str,
        /// What the host says.
        error: std::io::Error,
    },
    /// A thread cannot be confined.
    #[error("{0}")]
    Seccomp(#[from] crate::seccomp::InstallError),
}

impl StartError {
    pub(crate) fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StartError {
        move |error| StartError::Kvm { call, error }
    }

    pub(crate) fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
        move |error| StartError::Host { what, error }
    }

    pub(crate) fn open(
        what: &'static str,
        path: &Path,
    ) -> impl FnOnce(std::io::Error) -> StartError {
        move |error| StartError::Open { what, path: path.to_owned(), error }
    }

    pub(crate) fn device<E: ToString>(device: impl Into<String>) -> impl FnOnce(E) -> StartError {
        let device = device.into();
        move |error| StartError::Device { device, reason: error.to_string() }
    }
}
