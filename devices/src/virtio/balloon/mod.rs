//! virtio-balloon (virtio 1.2, 5.5): memory that the guest does not need goes back to the host.
//!
//! The guest fills the *balloon* with pages, as many as the host wishes. Where that is enabled, it
//! also *reports* ranges as they fall free, *hints* all its free pages when the host asks for them,
//! and gives *statistics* of its memory.
//!
//! A driver that breaks off a run of hints, as Linux does when memory runs out, may use a hinted page
//! again before the hint is read, and lose what it wrote: hints are for a guest that has memory to
//! spare. Reports have no such weakness.

mod channel;
mod hinting;
mod metrics;
mod statistics;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::errno::Errno;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};
use telemetry::Readings;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Chain, DeviceQueue, QueueError};
use super::{
    ActivateError, Activation, DeviceState, Interrupt, QueuePosition, RestoreError, VirtioDevice,
};
use crate::GuestMemory;
use crate::discard::PAGE;
use channel::{Channel, Given, Progress, discard_writable, inflate};
use hinting::Hinting;
pub use hinting::HintingStatus;
pub use metrics::BalloonMetrics;
pub use statistics::BalloonStatistics;

const QUEUE_SIZE: u16 = 256;
/// Queues there can be, one for each [`Role`].
const MAX_QUEUES: usize = 5;
/// Number of the timer among the events; those below are queues.
const TIMER: u32 = MAX_QUEUES as u32;

const PAGES_PER_MIB: u32 = (1 << 20) / PAGE as u32;

// Feature bits (virtio 1.2, 5.5.3), which virtio-bindings does not have.
const STATS_VQ: u64 = 1;
const DEFLATE_ON_OOM: u64 = 2;
const FREE_PAGE_HINT: u64 = 3;
const REPORTING: u64 = 5;

/// How a balloon is presented. The names are those of Firecracker's `Balloon`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonOptions {
    /// MiB that the host wants in the balloon.
    pub amount_mib: u32,
    /// The guest may take pages out of the balloon where it has no others.
    pub deflate_on_oom: bool,
    /// Seconds between two updates of the statistics; 0 for no statistics.
    pub stats_polling_interval_s: u16,
    /// The guest may be asked for its free pages.
    pub free_page_hinting: bool,
    /// The guest tells of pages as they fall free.
    pub free_page_reporting: bool,
}

/// What cannot be asked of a balloon.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BalloonError {
    /// The interval of statistics that were not enabled.
    #[error("the balloon has no statistics: they can only be enabled before the machine starts")]
    NoStatistics,
    /// An interval of zero.
    #[error(
        "the balloon's statistics cannot be disabled: the interval must be one second at the least"
    )]
    StatisticsStay,
    /// The timer.
    #[error("the interval of the balloon's statistics cannot be set: {0}")]
    Timer(Errno),
    /// A run of hints where they were not enabled.
    #[error(
        "the balloon has no free page hinting: it can only be enabled before the machine starts"
    )]
    NoHinting,
    /// A state of a balloon with other features.
    #[error("the balloon's saved state is of one with other features")]
    OtherFeatures,
}

/// What a snapshot keeps of a balloon beside its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// As they are now, the target and the interval among them. A balloon to restore is made of them.
    pub options: BalloonOptions,
    actual_pages: u32,
    statistics: statistics::Values,
    /// Head of the buffer of statistics that the device holds.
    held: Option<u16>,
    hinting: Hinting,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

/// What there is while the driver is.
struct Active {
    /// By queue index; what the driver did not set up, or not ask for, is `None`.
    channels: Vec<Option<Channel>>,
    interrupt: Arc<dyn Interrupt>,
}

/// A balloon.
pub struct Balloon {
    options: BalloonOptions,
    /// By queue index: queues of features that are not offered are not there, and those behind them
    /// move up.
    roles: Vec<Role>,
    events: Vec<EventFd>,
    timer: TimerFd,
    /// Pages in the balloon, as the driver says.
    actual_pages: u32,
    statistics: statistics::Values,
    /// Head of the driver's buffer of statistics: returning it asks for an update.
    held: Option<u16>,
    hinting: Hinting,
    active: Option<Active>,
    chain: Chain,
    metrics: BalloonMetrics,
}

impl Balloon {
    /// A balloon. Fails where no eventfd or timer can be made.
    pub fn new(options: BalloonOptions) -> io::Result<Balloon> {
        let mut roles = vec![Role::Inflate, Role::Deflate];
        if options.stats_polling_interval_s > 0 {
            roles.push(Role::Statistics);
        }
        if options.free_page_hinting {
            roles.push(Role::Hinting);
        }
        if options.free_page_reporting {
            roles.push(Role::Reporting);
        }
        let event = |_: &Role| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let events = roles.iter().map(event).collect::<io::Result<_>>()?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Balloon {
            options,
            roles,
            events,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            actual_pages: 0,
            statistics: Default::default(),
            held: None,
            hinting: Hinting::default(),
            active: None,
            chain: Chain::default(),
            metrics: BalloonMetrics::default(),
        })
    }

    /// How the balloon is now, the target and the interval as they were last set.
    pub fn options(&self) -> &BalloonOptions {
        &self.options
    }

    /// Asks the guest for a balloon of so many MiB, which the caller has compared with the size of
    /// memory. Said again, it makes a guest that ran out of memory try again.
    pub fn set_target_mib(&mut self, amount_mib: u32) {
        self.options.amount_mib = amount_mib;
        self.config_changed();
    }

    /// The latest statistics; `None` where they are not enabled.
    pub fn statistics(&self) -> Option<BalloonStatistics> {
        let (target, actual) = (self.target_pages(), self.actual_pages);
        (self.options.stats_polling_interval_s > 0)
            .then(|| BalloonStatistics::new(self.statistics, target, actual))
    }

    /// Changes the interval of statistics, in seconds. The first update is at once. Statistics can be
    /// neither enabled nor disabled: their queue is there or not when the driver starts.
    pub fn set_stats_interval(&mut self, interval_s: u16) -> Result<(), BalloonError> {
        match (self.options.stats_polling_interval_s, interval_s) {
            (0, 0) => return Ok(()),
            (0, _) => return Err(BalloonError::NoStatistics),
            (_, 0) => return Err(BalloonError::StatisticsStay),
            _ => self.options.stats_polling_interval_s = interval_s,
        }
        if self.active.is_some() {
            self.start_timer(Duration::from_nanos(1)).map_err(BalloonError::Timer)?;
        }
        Ok(())
    }

    /// Asks the guest for its free pages. With `acknowledge_on_stop` it has them back as soon as it
    /// says that these were all; without, at [`stop_hinting`](Balloon::stop_hinting).
    pub fn start_hinting(&mut self, acknowledge_on_stop: bool) -> Result<(), BalloonError> {
        if !self.options.free_page_hinting {
            return Err(BalloonError::NoHinting);
        }
        self.hinting.start(acknowledge_on_stop);
        self.config_changed();
        Ok(())
    }

    /// Ends a run of hints; the guest has its pages back.
    pub fn stop_hinting(&mut self) -> Result<(), BalloonError> {
        if !self.options.free_page_hinting {
            return Err(BalloonError::NoHinting);
        }
        self.hinting.stop();
        self.config_changed();
        Ok(())
    }

    /// How far hinting is; `None` where it is not enabled.
    pub fn hinting_status(&self) -> Option<HintingStatus> {
        self.options.free_page_hinting.then(|| self.hinting.status())
    }

    /// What a snapshot keeps, beside the queues, which are the transport's to save. A chain that is
    /// half done is done again from its beginning: it has not been returned.
    pub fn save(&self) -> BalloonState {
        BalloonState {
            options: self.options.clone(),
            actual_pages: self.actual_pages,
            statistics: self.statistics,
            held: self.held,
            hinting: self.hinting.clone(),
        }
    }

    /// Makes this the balloon that was saved. To be called before activation, on a balloon made with
    /// the same features; another is left as it was.
    pub fn restore(&mut self, state: BalloonState) -> Result<(), BalloonError> {
        if features(&state.options) != self.features() {
            return Err(BalloonError::OtherFeatures);
        }
        self.options = state.options;
        self.actual_pages = state.actual_pages;
        self.statistics = state.statistics;
        self.held = state.held;
        self.hinting = state.hinting;
        Ok(())
    }

    fn target_pages(&self) -> u32 {
        self.options.amount_mib.saturating_mul(PAGES_PER_MIB)
    }

    /// Tells the driver that the host wants something else than before.
    fn config_changed(&self) {
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
    }

    /// Has statistics asked for after `first`, and then at their interval.
    fn start_timer(&self, first: Duration) -> Result<(), Errno> {
        let interval = Duration::from_secs(self.options.stats_polling_interval_s.into());
        self.timer.set(
            Expiration::IntervalDelayed(first.into(), interval.into()),
            TimerSetTimeFlags::empty(),
        )
    }

    /// Deals with what is in a queue, as far as one event goes.
    fn process_queue(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(active) = self.active.as_mut() else { return Ok(()) };
        let (Some(role), Some(Some(channel))) =
            (self.roles.get(index), active.channels.get_mut(index))
        else {
            return Ok(());
        };
        let (hinting, metrics) = (&mut self.hinting, &mut self.metrics);
        let more = match role {
            Role::Statistics => return self.collect_statistics(),
            Role::Inflate => channel.serve(&mut self.chain, |memory, chain, from, allowance| {
                metrics.inflate_count += u64::from(from == 0);
                inflate(memory, chain, from, allowance)
            })?,
            // The guest finds its pages where they were; the host gives them as they are touched.
            Role::Deflate => channel.serve(&mut self.chain, |_, _, _, _| {
                metrics.deflate_count += 1;
                Progress::Finished
            })?,
            Role::Hinting => channel.serve(&mut self.chain, |memory, chain, from, allowance| {
                if from == 0 && read_command(memory, chain, hinting) {
                    active.interrupt.config_changed();
                }
                if !hinting.is_current() {
                    return Progress::Finished;
                }
                let given = Given {
                    count: &mut metrics.free_page_hint_count,
                    freed: &mut metrics.free_page_hint_freed,
                };
                discard_writable(memory, chain, from, allowance, given)
            })?,
            Role::Reporting => {
                channel.serve(&mut self.chain, |memory, chain, from, allowance| {
                    let given = Given {
                        count: &mut metrics.free_page_report_count,
                        freed: &mut metrics.free_page_report_freed,
                    };
                    discard_writable(memory, chain, from, allowance, given)
                })?
            }
        };
        channel.queue.signal()?;
        if more {
            // The rest in the next round of the event loop.
            let _ = self.events[index].write(1);
        }
        Ok(())
    }

    /// Takes the driver's buffer of statistics and keeps it. There is only one (virtio 1.2,
    /// 5.5.6.3); where a driver has more, they wait for their turn.
    fn collect_statistics(&mut self) -> Result<(), QueueError> {
        let Some(queue) = statistics_queue(&self.roles, &mut self.active) else { return Ok(()) };
        if self.held.is_none() && queue.pop(&mut self.chain)? {
            statistics::update(&mut self.statistics, &self.chain.readable, queue.memory());
            self.held = Some(self.chain.head());
            self.metrics.stats_updates_count += 1;
        }
        Ok(())
    }

    /// Returns the driver's buffer, which asks for another. One that has not come yet was asked for
    /// before.
    fn request_statistics(&mut self) -> Result<(), QueueError> {
        let Some(queue) = statistics_queue(&self.roles, &mut self.active) else { return Ok(()) };
        let Some(head) = self.held.take() else { return Ok(()) };
        queue.push_head(head, 0)?;
        queue.signal()?;
        // Asks to be notified of it, too.
        self.collect_statistics()
    }

    /// Lets go of the driver.
    fn detach(&mut self) -> Option<Active> {
        self.held = None;
        if let Err(error) = self.timer.unset() {
            tracing::debug!(%error, "balloon: timer not stopped");
        }
        self.active.take()
    }
}

/// The queue of statistics, while there is one.
fn statistics_queue<'a>(
    roles: &[Role],
    active: &'a mut Option<Active>,
) -> Option<&'a mut DeviceQueue> {
    let index = roles.iter().position(|role| *role == Role::Statistics)?;
    let channel = active.as_mut()?.channels.get_mut(index)?.as_mut()?;
    Some(&mut channel.queue)
}

/// Takes the driver's command, if the chain has one; whether the host's has changed by it.
fn read_command(memory: &GuestMemory, chain: &Chain, hinting: &mut Hinting) -> bool {
    if chain.readable.is_empty() {
        return false;
    }
    let mut command = [0; 4];
    match chain.readable.read(memory, 0, &mut command) {
        Ok(4) => hinting.guest_command(u32::from_le_bytes(command)),
        _ => {
            guest_warning!("balloon: a hinting command shorter than four bytes");
            false
        }
    }
}

/// Features of a balloon with these options.
fn features(options: &BalloonOptions) -> u64 {
    let optional = [
        (options.stats_polling_interval_s > 0, STATS_VQ),
        (options.deflate_on_oom, DEFLATE_ON_OOM),
        (options.free_page_hinting, FREE_PAGE_HINT),
        (options.free_page_reporting, REPORTING),
    ];
    optional.iter().filter(|(wanted, _)| *wanted).fold(
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC),
        |features, (_, bit)| features | 1 << bit,
    )
}

impl Role {
    /// The feature without which its queue is not used; `None` where it always is.
    fn feature(self) -> Option<u64> {
        match self {
            Role::Inflate | Role::Deflate => None,
            Role::Statistics => Some(STATS_VQ),
            Role::Hinting => Some(FREE_PAGE_HINT),
            Role::Reporting => Some(REPORTING),
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; MAX_QUEUES][..self.roles.len()]
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    fn features(&self) -> u64 {
        features(&self.options)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_balloon_config` (virtio 1.2, 5.5.4), without the poison value.
        let fields = [self.target_pages(), self.actual_pages, self.hinting.host_command()];
        super::read_bytes(fields.map(u32::to_le_bytes).as_flattened(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only `actual`, the second field, is the driver's to write.
        const ACTUAL: std::ops::Range<u64> = 4..8;
        let mut actual = self.actual_pages.to_le_bytes();
        for (at, byte) in (offset..u64::MAX).zip(data) {
            if ACTUAL.contains(&at) {
                actual[(at - ACTUAL.start) as usize] = *byte;
            }
        }
        self.actual_pages = u32::from_le_bytes(actual);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let failed = |reason| ActivateError { device: "balloon".to_owned(), reason };
        let mut channels = Vec::with_capacity(queues.len());
        for ((index, queue), role) in queues.into_iter().enumerate().zip(&self.roles) {
            let feature = role.feature();
            let used = feature.is_none_or(|bit| features & 1 << bit != 0);
            if queue.is_none() && feature.is_none() {
                self.metrics.activate_fails += 1;
                return Err(failed(format!("queue {index} was not set up")));
            }
            channels.push(queue.filter(|_| used).map(|queue| {
                let (memory, interrupt) = (memory.clone(), interrupt.clone());
                Channel::new(DeviceQueue::new(queue, index as u16, memory, interrupt))
            }));
        }
        if self.options.stats_polling_interval_s > 0 {
            let first = Duration::from_secs(self.options.stats_polling_interval_s.into());
            self.start_timer(first).map_err(|error| failed(format!("no timer: {error}")))?;
        }
        self.active = Some(Active { channels, interrupt });
        if self.hinting.is_running() {
            // Asked for before there was a driver; it only looks when it is told to.
            self.config_changed();
        }
        // Notifications may have come while the queues were not there yet.
        for event in &self.events {
            let _ = event.write(1);
        }
        Ok(())
    }

    fn reset(&mut self) {
        // What the host wants stays; what the driver said does not.
        self.detach();
        self.actual_pages = 0;
        self.statistics = Default::default();
        self.hinting.forget_guest();
    }

    fn queue_positions(&self) -> Vec<Option<QueuePosition>> {
        let channels = self.active.iter().flat_map(|active| &active.channels);
        channels.map(|channel| Some(channel.as_ref()?.queue.position(0))).collect()
    }

    fn metrics(&self) -> Option<Readings> {
        Some(self.metrics.readings())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(Balloon::save(self))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Balloon(state) = state else { return Err(state.mismatch()) };
        Balloon::restore(self, state).map_err(|error| RestoreError(error.to_string()))
    }
}

impl MutEventSubscriber for Balloon {
    fn init(&mut self, ops: &mut EventOps) {
        for (index, event) in self.events.iter().enumerate() {
            super::register(ops, event, index as u32, EventSet::IN);
        }
        super::register(ops, &self.timer.as_fd(), TIMER, EventSet::IN);
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let result = match events.data() {
            // Set anew meanwhile, it has not expired.
            TIMER => self.timer.wait().map_or(Ok(()), |()| self.request_statistics()),
            index => {
                let index = index as usize;
                if let Some(event) = self.events.get(index) {
                    let _ = event.read();
                }
                self.process_queue(index)
            }
        };
        if let Err(error) = result {
            guest_warning!(%error, "balloon: device needs a reset");
            self.metrics.event_fails += 1;
            let index = usize::try_from(events.data()).unwrap_or(usize::MAX);
            let statistics =
                events.data() == TIMER || self.roles.get(index) == Some(&Role::Statistics);
            self.metrics.stats_update_fails += u64::from(statistics);
            if let Some(active) = self.detach() {
                active.interrupt.needs_reset();
            }
        }
    }
}
