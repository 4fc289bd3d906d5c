//! virtio-rng (virtio 1.2, 5.4): the host's random numbers.

use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use telemetry::Readings;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Chain, DeviceQueue, QueueError};
use super::{ActivateError, Activation, DeviceState, QueuePosition, RestoreError, VirtioDevice};
use crate::rate_limiter::{BucketUpdate, RateLimiter};

const QUEUE_SIZE: u16 = 64;
/// Events: the queue's, and the limiter's timer.
const QUEUE: u32 = 0;
const TIMER: u32 = 1;
/// Most bytes given for one chain, whatever its length: a driver asks again.
const MAX_BYTES: usize = 4096;
/// Chains served for one event.
const BUDGET: usize = 64;

/// How an entropy device is presented.
#[derive(Debug, Default)]
pub struct RngOptions {
    /// Limits on bytes given, and on requests.
    pub rate_limiter: RateLimiter,
}

telemetry::metrics! {
    /// What an entropy device has done since it was made.
    pub struct RngMetrics("entropy", Counter) {
        /// Times that the driver could not be served from the start.
        activate_fails,
        /// Times that the driver broke the rules, so that it had to reset the device.
        entropy_event_fails,
        /// Notifications of the driver.
        entropy_event_count,
        /// Random bytes that the guest got.
        entropy_bytes,
        /// Times that the host had no random bytes.
        host_rng_fails,
        /// Times that the rate limiter refused a request for a while.
        entropy_rate_limiter_throttled,
        /// Times that the rate limiter's timer fired.
        rate_limiter_event_count,
    }
}

/// An entropy device.
pub struct Rng {
    options: RngOptions,
    event: [EventFd; 1],
    queue: Option<DeviceQueue>,
    chain: Chain,
    metrics: RngMetrics,
}

impl Rng {
    /// An entropy device. Fails where no eventfd can be made.
    pub fn new(options: RngOptions) -> std::io::Result<Rng> {
        let event = [EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?];
        let metrics = RngMetrics::default();
        Ok(Rng { options, event, queue: None, chain: Chain::default(), metrics })
    }

    /// Its limits, for a snapshot.
    pub fn rate_limiter(&self) -> &RateLimiter {
        &self.options.rate_limiter
    }

    /// Changes limits, also while the guest asks. Fails as [`RateLimiter::update`] does.
    pub fn update_rate_limiter(
        &mut self,
        bandwidth: BucketUpdate,
        ops: BucketUpdate,
    ) -> std::io::Result<()> {
        self.options.rate_limiter.update(bandwidth, ops)?;
        // A request that was refused is asked for again.
        let _ = self.event[0].write(1);
        Ok(())
    }

    fn process(&mut self) -> Result<(), QueueError> {
        let Some(queue) = self.queue.as_mut() else { return Ok(()) };
        let limiter = &mut self.options.rate_limiter;
        if limiter.is_blocked() {
            // The timer calls again.
            return Ok(());
        }
        let mut bytes = [0; MAX_BYTES];
        let mut budget = BUDGET;
        while queue.pop(&mut self.chain)? {
            let wanted = self.chain.writable.len().min(MAX_BYTES);
            if !limiter.allows(wanted as u64, 1) {
                self.metrics.entropy_rate_limiter_throttled += 1;
                queue.undo_pop();
                break;
            }
            let filled = fill(&mut bytes[..wanted]);
            let written = self.chain.writable.write(queue.memory(), 0, &bytes[..filled]);
            let written = written.unwrap_or(0);
            queue.push(&self.chain, written)?;
            self.metrics.host_rng_fails += u64::from(filled < wanted);
            self.metrics.entropy_bytes += written as u64;
            budget -= 1;
            if budget == 0 {
                let _ = self.event[0].write(1);
                break;
            }
        }
        queue.signal()
    }
}

/// Fills with random bytes and returns how many there are: none before the host's pool is ready.
fn fill(bytes: &mut [u8]) -> usize {
    getrandom(bytes, GetRandomFlags::NONBLOCK).unwrap_or(0)
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.event
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [queue] = super::take_queues("entropy", activation)
            .inspect_err(|_| self.metrics.activate_fails += 1)?;
        self.queue = Some(queue);
        let _ = self.event[0].write(1);
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
    }

    fn queue_positions(&self) -> Vec<Option<QueuePosition>> {
        self.queue.iter().map(|queue| Some(queue.position(0))).collect()
    }

    fn metrics(&self) -> Option<Readings> {
        Some(self.metrics.readings())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng(self.options.rate_limiter.save(Instant::now()))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Rng(limits) = state else { return Err(state.mismatch()) };
        self.options.rate_limiter = super::restore_limits(&limits)?;
        Ok(())
    }
}

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        super::register(ops, &self.event[0], QUEUE, EventSet::IN);
        super::register_timer(ops, &mut self.options.rate_limiter, TIMER);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        super::register_timer(ops, &mut self.options.rate_limiter, TIMER);
        if events.data() == TIMER {
            self.options.rate_limiter.timer_fired();
            self.metrics.rate_limiter_event_count += 1;
        } else {
            let _ = self.event[0].read();
            self.metrics.entropy_event_count += 1;
        }
        if let Err(error) = Rng::process(self) {
            self.metrics.entropy_event_fails += 1;
            super::broken("entropy", &mut self.queue, &error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::rate_limiter::TokenBucket;
    use crate::virtio::testing::{Driver, survives_broken_queues};

    #[test]
    fn a_buffer_comes_back_filled_and_a_huge_one_in_part() {
        let mut driver = Driver::new(Rng::new(RngOptions::default()).unwrap());
        let small = driver.buffer(&[0; 64]);
        let large = driver.buffer(&[0; 2 * MAX_BYTES]);
        driver.send(0, &[], &[(small, 64)]);
        driver.send(0, &[], &[(large, 2 * MAX_BYTES as u32)]);
        driver.notify(0);
        assert_eq!(driver.used(0), [(0, 64), (1, MAX_BYTES as u32)]);
        assert_ne!(driver.read(small, 64), [0; 64]);
        assert_eq!(driver.read(large + MAX_BYTES as u64, 64), [0; 64]);
    }

    #[test]
    fn bytes_that_the_guest_got_are_counted() {
        let mut driver = Driver::new(Rng::new(RngOptions::default()).unwrap());
        let into = driver.buffer(&[0; 64]);
        driver.send(0, &[], &[(into, 64)]);
        driver.send(0, &[], &[(into, 10)]);
        driver.notify(0);
        let metrics = driver.device.lock().unwrap().metrics;
        let expected =
            RngMetrics { entropy_bytes: 74, entropy_event_count: 1, ..RngMetrics::default() };
        assert_eq!(metrics, expected);
    }

    #[test]
    fn what_goes_beyond_the_limit_waits_for_the_timer() {
        let hour = 3_600_000;
        let bytes = TokenBucket::new(100, 0, hour);
        let rate_limiter = RateLimiter::new(bytes, None).unwrap();
        let mut driver = Driver::new(Rng::new(RngOptions { rate_limiter }).unwrap());
        let into = driver.buffer(&[0; 100]);
        for length in [60, 40, 50, 25] {
            driver.send(0, &[], &[(into, length)]);
        }
        let pass = |driver: &mut Driver<Rng>, minutes: u64| {
            let time = Duration::from_secs(60 * minutes);
            driver.device.lock().unwrap().options.rate_limiter.pass(time);
            driver.run();
            driver.used(0).len()
        };
        driver.notify(0);
        assert_eq!(pass(&mut driver, 0), 2);
        assert_eq!(pass(&mut driver, 29), 2);
        assert_eq!(pass(&mut driver, 1), 3);
        // One request in an hour, instead, and then as many as there are.
        let one = BucketUpdate::Set(TokenBucket::new(1, 0, hour).unwrap());
        for _ in 0..2 {
            driver.send(0, &[], &[(into, 25)]);
        }
        driver.device.lock().unwrap().update_rate_limiter(BucketUpdate::Disabled, one).unwrap();
        assert_eq!(pass(&mut driver, 0), 4);
        assert_eq!(pass(&mut driver, 60), 5);
        let (none, all) = (BucketUpdate::None, BucketUpdate::Disabled);
        driver.device.lock().unwrap().update_rate_limiter(none, all).unwrap();
        driver.run();
        assert_eq!(driver.used(0).len(), 6);
    }

    #[test]
    fn hostile_1_broken_queues_are_survived() {
        survives_broken_queues(|| Rng::new(RngOptions::default()).unwrap());
    }
}
