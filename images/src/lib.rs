//! See the workspace's ARCHITECTURE.md.

pub mod erofs;
pub mod rootfs;
