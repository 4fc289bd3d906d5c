//! The metadata service on the guest's link.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api_server::machine::{MachineError, MmdsConfig, MmdsVersion};
use devices::virtio::net::Responder;
use mmds::{Mmds, MmdsState, Stack, StackConfig};

use crate::StartError;
use crate::machine::lock;

/// The service as the API's object describes it.
pub fn state(config: &MmdsConfig) -> MmdsState {
    MmdsState {
        version: match config.version {
            MmdsVersion::V1 => mmds::MmdsVersion::V1,
            MmdsVersion::V2 => mmds::MmdsVersion::V2,
        },
        ipv4_address: config.ipv4_address,
        imds_compat: config.imds_compat,
    }
}

/// A service that has nothing to tell yet.
pub fn service(size_limit: usize) -> Result<Arc<Mutex<Mmds>>, MachineError> {
    let service = Mmds::new(MmdsState::default(), size_limit);
    let service = service.map_err(|error| MachineError::new(&error.to_string()))?;
    Ok(Arc::new(Mutex::new(service)))
}

/// The service's end of one interface.
pub struct Link {
    stack: Stack,
    service: Arc<Mutex<Mmds>>,
    since: Instant,
}

impl Link {
    /// Puts the service on a link.
    pub fn new(config: &MmdsConfig, service: Arc<Mutex<Mmds>>) -> Result<Link, StartError> {
        let own = StackConfig { ipv4_address: config.ipv4_address, ..StackConfig::default() };
        let stack = Stack::new(own).map_err(StartError::device("metadata service"))?;
        Ok(Link { stack, service, since: Instant::now() })
    }
}

impl Responder for Link {
    fn wants(&self, head: &[u8]) -> bool {
        self.stack.wants(head)
    }

    fn receive(&mut self, frame: &[u8]) {
        self.stack.receive(frame);
    }

    fn poll(&mut self) -> Option<Duration> {
        let now = self.since.elapsed();
        self.stack.poll(now, &mut lock(&self.service));
        Some(self.stack.next_deadline()?.saturating_sub(now))
    }

    fn transmit(&mut self, buffer: &mut [u8]) -> Option<usize> {
        self.stack.transmit(buffer)
    }
}
