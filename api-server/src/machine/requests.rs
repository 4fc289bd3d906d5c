//! How often each part of the API was used, and how often in vain.

use telemetry::Readings;

use super::route::Method;

telemetry::metrics! {
    /// `GET` requests, by the first part of their path.
    pub struct GetMetrics("get_api_requests", Counter) {
        /// Requests GET /.
        instance_info_count,
        /// Requests GET /version.
        vmm_version_count,
        /// Requests GET /vm/config.
        vm_config_count,
        /// Requests GET /machine-config.
        machine_cfg_count,
        /// Requests GET /mmds.
        mmds_count,
        /// Requests GET /balloon.
        balloon_count,
        /// Requests GET /hotplug/memory.
        hotplug_memory_count,
        /// Requests GET /metrics.
        metrics_count,
    }
}

telemetry::metrics! {
    /// `PUT` requests, by the first part of their path.
    pub struct PutMetrics("put_api_requests", Counter) {
        /// Requests PUT /actions.
        actions_count,
        /// Requests PUT /actions that were refused.
        actions_fails,
        /// Requests PUT /balloon.
        balloon_count,
        /// Requests PUT /balloon that were refused.
        balloon_fails,
        /// Requests PUT /boot-source.
        boot_source_count,
        /// Requests PUT /boot-source that were refused.
        boot_source_fails,
        /// Requests PUT /cpu-config.
        cpu_cfg_count,
        /// Requests PUT /cpu-config that were refused.
        cpu_cfg_fails,
        /// Requests PUT /drives.
        drive_count,
        /// Requests PUT /drives that were refused.
        drive_fails,
        /// Requests PUT /entropy.
        entropy_count,
        /// Requests PUT /entropy that were refused.
        entropy_fails,
        /// Requests PUT /hotplug/memory.
        hotplug_memory_count,
        /// Requests PUT /hotplug/memory that were refused.
        hotplug_memory_fails,
        /// Requests PUT /logger.
        logger_count,
        /// Requests PUT /logger that were refused.
        logger_fails,
        /// Requests PUT /machine-config.
        machine_cfg_count,
        /// Requests PUT /machine-config that were refused.
        machine_cfg_fails,
        /// Requests PUT /metrics.
        metrics_count,
        /// Requests PUT /metrics that were refused.
        metrics_fails,
        /// Requests PUT /mmds.
        mmds_count,
        /// Requests PUT /mmds that were refused.
        mmds_fails,
        /// Requests PUT /network-interfaces.
        network_count,
        /// Requests PUT /network-interfaces that were refused.
        network_fails,
        /// Requests PUT /pmem.
        pmem_count,
        /// Requests PUT /pmem that were refused.
        pmem_fails,
        /// Requests PUT /serial.
        serial_count,
        /// Requests PUT /serial that were refused.
        serial_fails,
        /// Requests PUT /snapshot.
        snapshot_count,
        /// Requests PUT /snapshot that were refused.
        snapshot_fails,
        /// Requests PUT /vsock.
        vsock_count,
        /// Requests PUT /vsock that were refused.
        vsock_fails,
    }
}

telemetry::metrics! {
    /// `PATCH` requests, by the first part of their path.
    pub struct PatchMetrics("patch_api_requests", Counter) {
        /// Requests PATCH /balloon.
        balloon_count,
        /// Requests PATCH /balloon that were refused.
        balloon_fails,
        /// Requests PATCH /drives.
        drive_count,
        /// Requests PATCH /drives that were refused.
        drive_fails,
        /// Requests PATCH /hotplug/memory.
        hotplug_memory_count,
        /// Requests PATCH /hotplug/memory that were refused.
        hotplug_memory_fails,
        /// Requests PATCH /machine-config.
        machine_cfg_count,
        /// Requests PATCH /machine-config that were refused.
        machine_cfg_fails,
        /// Requests PATCH /mmds.
        mmds_count,
        /// Requests PATCH /mmds that were refused.
        mmds_fails,
        /// Requests PATCH /network-interfaces.
        network_count,
        /// Requests PATCH /network-interfaces that were refused.
        network_fails,
        /// Requests PATCH /pmem.
        pmem_count,
        /// Requests PATCH /pmem that were refused.
        pmem_fails,
        /// Requests PATCH /vm.
        vm_count,
        /// Requests PATCH /vm that were refused.
        vm_fails,
    }
}

telemetry::metrics! {
    /// Uses of what will go away.
    pub struct DeprecatedMetrics("deprecated_api", Counter) {
        /// Requests that use a field that will go away.
        deprecated_http_api_calls,
    }
}

/// All requests to a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestMetrics {
    /// `GET`
    pub get: GetMetrics,
    /// `PUT`
    pub put: PutMetrics,
    /// `PATCH`
    pub patch: PatchMetrics,
    /// Of all of them, those that are out of date.
    pub deprecated: DeprecatedMetrics,
}

impl RequestMetrics {
    /// Counts a request that was answered. One for a path that there is not is nothing to be
    /// counted.
    pub fn count(&mut self, method: Method, path: &str, refused: bool) {
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        let RequestMetrics { get, put, patch, .. } = self;
        let mut unused = 0;
        let (count, fails) = match (method, first) {
            (Method::Get, "") => (&mut get.instance_info_count, &mut unused),
            (Method::Get, "version") => (&mut get.vmm_version_count, &mut unused),
            (Method::Get, "vm") => (&mut get.vm_config_count, &mut unused),
            (Method::Get, "machine-config") => (&mut get.machine_cfg_count, &mut unused),
            (Method::Get, "mmds") => (&mut get.mmds_count, &mut unused),
            (Method::Get, "balloon") => (&mut get.balloon_count, &mut unused),
            (Method::Get, "hotplug") => (&mut get.hotplug_memory_count, &mut unused),
            (Method::Get, "metrics") => (&mut get.metrics_count, &mut unused),
            (Method::Put, "actions") => (&mut put.actions_count, &mut put.actions_fails),
            (Method::Put, "balloon") => (&mut put.balloon_count, &mut put.balloon_fails),
            (Method::Put, "boot-source") => {
                (&mut put.boot_source_count, &mut put.boot_source_fails)
            }
            (Method::Put, "cpu-config") => (&mut put.cpu_cfg_count, &mut put.cpu_cfg_fails),
            (Method::Put, "drives") => (&mut put.drive_count, &mut put.drive_fails),
            (Method::Put, "entropy") => (&mut put.entropy_count, &mut put.entropy_fails),
            (Method::Put, "hotplug") => {
                (&mut put.hotplug_memory_count, &mut put.hotplug_memory_fails)
            }
            (Method::Put, "logger") => (&mut put.logger_count, &mut put.logger_fails),
            (Method::Put, "machine-config") => {
                (&mut put.machine_cfg_count, &mut put.machine_cfg_fails)
            }
            (Method::Put, "metrics") => (&mut put.metrics_count, &mut put.metrics_fails),
            (Method::Put, "mmds") => (&mut put.mmds_count, &mut put.mmds_fails),
            (Method::Put, "network-interfaces") => (&mut put.network_count, &mut put.network_fails),
            (Method::Put, "pmem") => (&mut put.pmem_count, &mut put.pmem_fails),
            (Method::Put, "serial") => (&mut put.serial_count, &mut put.serial_fails),
            (Method::Put, "snapshot") => (&mut put.snapshot_count, &mut put.snapshot_fails),
            (Method::Put, "vsock") => (&mut put.vsock_count, &mut put.vsock_fails),
            (Method::Patch, "balloon") => (&mut patch.balloon_count, &mut patch.balloon_fails),
            (Method::Patch, "drives") => (&mut patch.drive_count, &mut patch.drive_fails),
            (Method::Patch, "hotplug") => {
                (&mut patch.hotplug_memory_count, &mut patch.hotplug_memory_fails)
            }
            (Method::Patch, "machine-config") => {
                (&mut patch.machine_cfg_count, &mut patch.machine_cfg_fails)
            }
            (Method::Patch, "mmds") => (&mut patch.mmds_count, &mut patch.mmds_fails),
            (Method::Patch, "network-interfaces") => {
                (&mut patch.network_count, &mut patch.network_fails)
            }
            (Method::Patch, "pmem") => (&mut patch.pmem_count, &mut patch.pmem_fails),
            (Method::Patch, "vm") => (&mut patch.vm_count, &mut patch.vm_fails),
            _ => return,
        };
        *count += 1;
        *fails += u64::from(refused);
    }

    /// The numbers as they are now.
    pub fn readings(&self) -> [Readings; 4] {
        let RequestMetrics { get, put, patch, deprecated } = self;
        [get.readings(), put.readings(), patch.readings(), deprecated.readings()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_method_and_path_and_refusals_beside_them() {
        let mut metrics = RequestMetrics::default();
        metrics.count(Method::Get, "/", false);
        metrics.count(Method::Put, "/drives/rootfs", false);
        metrics.count(Method::Put, "/drives/other", true);
        metrics.count(Method::Patch, "/drives/rootfs", false);
        metrics.count(Method::Put, "/nothing", true);
        let expected = RequestMetrics {
            get: GetMetrics { instance_info_count: 1, ..GetMetrics::default() },
            put: PutMetrics { drive_count: 2, drive_fails: 1, ..PutMetrics::default() },
            patch: PatchMetrics { drive_count: 1, ..PatchMetrics::default() },
            ..RequestMetrics::default()
        };
        assert_eq!(metrics, expected);
    }
}
