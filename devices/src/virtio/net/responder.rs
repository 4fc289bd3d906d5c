//! Somebody on the guest's link who answers it from within the monitor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Bytes of a frame that are enough to know whom it is for: Ethernet, and ARP or IPv4 with the
/// beginning of what follows.
pub const HEAD: usize = 42;

/// Answers some of the guest's frames. A frame is as on a wire: no virtio-net header, no checksum
/// of the link; those of packets that the guest sends may be left blank.
pub trait Responder: Send {
    /// Whether a frame that begins so is for it, and not for the TAP.
    fn wants(&self, head: &[u8]) -> bool;
    /// Takes such a frame.
    fn receive(&mut self, frame: &[u8]);
    /// Does what is to be done by now, and says in what time to be called again, if at all.
    fn poll(&mut self) -> Option<Duration>;
    /// Writes the next frame for the guest into the buffer and returns its length.
    fn transmit(&mut self, buffer: &mut [u8]) -> Option<usize>;
}

/// A responder with its clock.
pub struct Answers {
    responder: Box<dyn Responder>,
    timer: TimerFd,
    /// The guest's frame.
    frame: Vec<u8>,
}

impl Answers {
    /// Fails where no timer can be made.
    pub fn new(responder: Box<dyn Responder>) -> io::Result<Answers> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Answers { responder, timer, frame: Vec::new() })
    }

    /// Expires when [`Answers::timer_fired`] is to be called.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Whether a frame that begins so is for the responder.
    pub fn wants(&self, head: &[u8]) -> bool {
        self.responder.wants(&head[..head.len().min(HEAD)])
    }

    /// Gives the responder a frame of so many bytes, which `read` fills in.
    pub fn receive(&mut self, length: usize, read: impl FnOnce(&mut [u8]) -> io::Result<()>) {
        self.frame.resize(length, 0);
        if read(&mut self.frame).is_ok() {
            self.responder.receive(&self.frame);
        }
        self.poll();
    }

    /// The responder's time has come.
    pub fn timer_fired(&mut self) {
        // Empties the descriptor; it is not blocking.
        let _ = nix::unistd::read(&self.timer, &mut [0; 8]);
        self.poll();
    }

    /// Writes the next frame for the guest into the buffer and returns its length.
    pub fn transmit(&mut self, buffer: &mut [u8]) -> Option<usize> {
        self.responder.transmit(buffer).or_else(|| {
            // There is room for more now.
            self.poll();
            self.responder.transmit(buffer)
        })
    }

    fn poll(&mut self) {
        let set = match self.responder.poll() {
            Some(wait) => {
                // Zero would disarm the timer.
                let wait = TimeSpec::from_duration(wait.max(Duration::from_micros(1)));
                self.timer.set(Expiration::OneShot(wait), TimerSetTimeFlags::empty())
            }
            None => self.timer.unset(),
        };
        if let Err(error) = set {
            tracing::error!(%error, "a timer of the metadata service");
        }
    }
}
