//! Free page hinting: which command is running (virtio 1.2, 5.5.6.5).

use serde::{Deserialize, Serialize};

/// The run is over; the guest keeps the pages it has hinted.
const STOP: u32 = 0;
/// The guest may use the pages it has hinted again.
const DONE: u32 = 1;

/// How far free page hinting is. The names are those of Firecracker's `BalloonHintingStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct HintingStatus {
    /// The last command of the host: 0 before the first run, 1 after one, else the run's number.
    pub host_cmd: u32,
    /// The last command of the guest: 0 when it has hinted all, else the number of the run that it
    /// hints for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_cmd: Option<u32>,
}

/// The commands of both sides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hinting {
    host: u32,
    guest: Option<u32>,
    /// Number of the latest run: a driver takes a number that it has seen for no command at all.
    latest: u32,
    acknowledge_on_stop: bool,
}

impl Hinting {
    /// Asks for a new run.
    pub fn start(&mut self, acknowledge_on_stop: bool) {
        self.latest = self.latest.wrapping_add(1).max(DONE + 1);
        self.host = self.latest;
        self.acknowledge_on_stop = acknowledge_on_stop;
    }

    /// Ends the run, if there is one, and lets the guest have its pages again.
    pub fn stop(&mut self) {
        self.host = DONE;
    }

    /// The driver's command; whether the host's has changed by it.
    pub fn guest_command(&mut self, command: u32) -> bool {
        let before = self.guest.replace(command);
        // A stop that belongs to an earlier run must not end the one that was started since.
        let finished = command == STOP && self.is_running() && before == Some(self.host);
        if finished && self.acknowledge_on_stop {
            self.stop();
            return true;
        }
        false
    }

    /// The driver is gone. What the host wants stays, for the next one.
    pub fn forget_guest(&mut self) {
        self.guest = None;
    }

    /// What the host wants, for the configuration space.
    pub fn host_command(&self) -> u32 {
        self.host
    }

    /// Whether the host wants hints.
    pub fn is_running(&self) -> bool {
        self.host > DONE
    }

    /// Whether hints that come now are for the run that the host wants.
    pub fn is_current(&self) -> bool {
        self.is_running() && self.guest == Some(self.host)
    }

    /// Both sides' commands, to be shown.
    pub fn status(&self) -> HintingStatus {
        HintingStatus { host_cmd: self.host, guest_cmd: self.guest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_current_from_the_guests_start_to_its_stop() {
        let mut hinting = Hinting::default();
        assert!(!hinting.is_running() && !hinting.is_current());
        hinting.start(true);
        assert!(hinting.is_running() && !hinting.is_current());
        assert!(!hinting.guest_command(2));
        assert!(hinting.is_current());
        assert!(hinting.guest_command(STOP));
        assert!(!hinting.is_running());
        assert_eq!(hinting.status(), HintingStatus { host_cmd: DONE, guest_cmd: Some(STOP) });
    }

    #[test]
    fn without_acknowledgement_the_host_ends_the_run() {
        let mut hinting = Hinting::default();
        hinting.start(false);
        hinting.guest_command(2);
        assert!(!hinting.guest_command(STOP));
        assert!(!hinting.is_current());
        assert_eq!(hinting.host_command(), 2);
        hinting.stop();
        assert_eq!(hinting.host_command(), DONE);
    }

    #[test]
    fn the_stop_of_an_earlier_run_does_not_end_a_new_one() {
        let mut hinting = Hinting::default();
        hinting.start(true);
        hinting.guest_command(2);
        hinting.start(true);
        assert!(!hinting.is_current());
        assert!(!hinting.guest_command(STOP));
        hinting.guest_command(3);
        assert!(hinting.is_current());
        assert!(hinting.guest_command(STOP));
    }

    #[test]
    fn numbers_go_round_without_those_that_mean_something_else() {
        let mut hinting = Hinting { latest: u32::MAX - 1, ..Hinting::default() };
        let mut next = || {
            hinting.start(true);
            hinting.host_command()
        };
        assert_eq!([next(), next(), next()], [u32::MAX, 2, 3]);
    }

    #[test]
    fn hostile_13_a_guest_cannot_make_up_a_run() {
        let mut hinting = Hinting::default();
        for command in [STOP, DONE, 2, u32::MAX] {
            assert!(!hinting.guest_command(command));
            assert!(!hinting.is_current());
        }
        hinting.stop();
        hinting.guest_command(DONE);
        assert!(!hinting.is_current());
    }
}
