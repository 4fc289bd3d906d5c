//! A driver on one side, a socket that keeps frames apart on the other. Tests that need a real TAP
//! are in `tap`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, send, setsockopt, socketpair, sockopt,
};

use super::*;
use crate::rate_limiter::TokenBucket;
use crate::virtio::test_driver::{BUFFERS, Driver, readable, writable};

const MAC: [u8; 6] = [2, 0x76, 172, 20, 0, 2];
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// One end of a pair that keeps frames apart.
struct Wire(OwnedFd);

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Backend for Wire {
    fn set_offloads(&self, _features: u64) -> io::Result<()> {
        Ok(())
    }
}

/// The host's end of a wire, and the device's.
fn wire() -> (OwnedFd, OwnedFd) {
    let ends = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    for end in [&ends.0, &ends.1] {
        setsockopt(end, sockopt::SndBuf, &(4 << 20)).unwrap();
    }
    ends
}

/// A driver with these features and queues of this size, and the host's end of the wire.
fn start(features: u64, size: u16) -> (Driver<Net<Wire>>, OwnedFd) {
    let (host, ours) = wire();
    let options =
        NetOptions { id: "eth0".into(), mac: Some(MAC), mtu: Some(1500), ..NetOptions::default() };
    let mut driver = Driver::new(Net::new(options, Wire(ours)).unwrap());
    driver.activate(features, size);
    (driver, host)
}

/// A frame from the guest, the header before it; the bytes after the addresses are a pattern.
fn frame(length: usize) -> Vec<u8> {
    let mut frame = vec![0; LENGTH];
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&MAC);
    frame.extend((frame.len()..LENGTH + length).map(|at| (at % 251) as u8));
    frame
}

fn arrived(host: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 2 * LARGEST];
    let count = nix::unistd::read(host, &mut bytes).ok()?;
    bytes.truncate(count);
    Some(bytes)
}

fn arrive(host: &OwnedFd, frame: &[u8]) {
    let sent = send(std::os::fd::AsRawFd::as_raw_fd(host), frame, MsgFlags::MSG_DONTWAIT);
    assert_eq!(sent.unwrap(), frame.len());
}

/// Adds receive buffers of these lengths, one behind the other.
fn offer(driver: &mut Driver<Net<Wire>>, lengths: &[u32]) {
    let mut at = BUFFERS;
    for length in lengths {
        driver.send(RX, &[writable(at, *length)]);
        at += u64::from(*length);
    }
}

#[test]
fn frames_go_out_whole_however_they_are_cut_up() {
    for features in [0, EVENT_IDX] {
        let (mut driver, host) = start(features, 64);
        for cuts in [&[72][..], &[12, 60], &[1, 30, 0, 41], &[5, 1, 1, 1, 1, 1, 1, 1, 1, 59]] {
            let sent = frame(60);
            driver.write(BUFFERS, &sent);
            let mut at = BUFFERS;
            let mut parts = Vec::new();
            for length in cuts {
                parts.push(readable(at, *length));
                at += u64::from(*length);
            }
            let head = driver.send(TX, &parts);
            assert_eq!(arrived(&host).as_ref(), Some(&sent));
            assert_eq!(driver.used(TX), [(head, 0)]);
            assert_eq!(driver.interrupts(), 1);
        }
    }
}

#[test]
fn frames_that_go_and_frames_that_are_lost_are_counted() {
    let (mut driver, host) = start(0, 64);
    driver.write(BUFFERS, &frame(60));
    driver.send(TX, &[readable(BUFFERS, (LENGTH + 60) as u32)]);
    let mut spoofed = frame(60);
    spoofed[LENGTH + 6] ^= 4;
    driver.write(BUFFERS, &spoofed);
    driver.send(TX, &[readable(BUFFERS, (LENGTH + 60) as u32)]);
    driver.send(TX, &[readable(BUFFERS, 20)]);
    arrive(&host, &frame(100));
    driver.run();
    let metrics = driver.device().metrics;
    assert_eq!((metrics.tx_packets_count, metrics.tx_bytes_count), (1, 60));
    assert_eq!((metrics.tx_fails, metrics.tx_spoofed_mac_count), (2, 1));
    assert_eq!(metrics.tx_malformed_frames, 1);
    assert_eq!((metrics.rx_packets_count, metrics.rx_bytes_count), (0, 0));
    assert!(metrics.no_rx_avail_buffer > 0);
    // One for the frame that waits, one into which the next does not fit.
    offer(&mut driver, &[2048, 50]);
    arrive(&host, &frame(100));
    driver.run();
    let metrics = driver.device().metrics;
    assert_eq!((metrics.rx_packets_count, metrics.rx_bytes_count), (1, 100));
    assert_eq!((metrics.rx_count, metrics.rx_fails), (2, 1));
    drop(host);
    driver.run();
    assert!(driver.device().metrics.tap_read_fails > 0);
}

#[test]
fn the_largest_frame_goes_both_ways() {
    let (mut driver, host) = start(MERGEABLE | EVENT_IDX, 64);
    let large = frame(MAX_FRAME);
    driver.write(BUFFERS, &large);
    driver.send(TX, &[readable(BUFFERS, large.len() as u32)]);
    assert_eq!(arrived(&host).as_ref(), Some(&large));
    assert_eq!(driver.interrupts(), 1);

    // In place, and with too little room for any frame but enough for this one.
    for buffers in [vec![1500; 60], vec![large.len() as u32 - 100, 90, 20]] {
        driver.device().reset();
        driver.activate(MERGEABLE | EVENT_IDX, 64);
        driver.write(BUFFERS, &vec![0xee; 100_000]);
        offer(&mut driver, &buffers);
        arrive(&host, &large);
        driver.run();
        let used = driver.used(RX);
        let lengths: Vec<_> = used.iter().map(|(_, length)| *length as usize).collect();
        assert_eq!(lengths.iter().sum::<usize>(), large.len());
        let full = lengths.iter().zip(&buffers).rev().skip(1).all(|(a, b)| *a == *b as usize);
        assert!(full, "{lengths:?}");
        let mut expected = large.clone();
        expected[10..12].copy_from_slice(&(used.len() as u16).to_le_bytes());
        assert!(driver.read(BUFFERS, large.len()) == expected);
        assert_eq!(driver.read(BUFFERS + large.len() as u64, 1), [0xee]);
        assert_eq!(driver.interrupts(), 1);
    }
}

#[test]
fn small_frames_take_one_buffer_each_in_order() {
    for features in [0, EVENT_IDX, MERGEABLE, MERGEABLE | EVENT_IDX] {
        let (mut driver, host) = start(features, 64);
        offer(&mut driver, &[2000; 50]);
        for round in 0..20u8 {
            arrive(&host, &[round; 100]);
        }
        driver.run();
        let used = driver.used(RX);
        assert_eq!(used, (0..20).map(|head| (head, 100)).collect::<Vec<_>>());
        for round in 0..20u8 {
            let got = driver.read(BUFFERS + 2000 * u64::from(round), 100);
            assert_eq!(got[10..12], [1, 0]);
            assert_eq!(got[12..], [round; 88]);
        }
    }
}

/// The driver that ran out of buffers is heard when it adds some, with no frame coming after.
#[test]
fn a_frame_waits_for_buffers() {
    for features in [0, EVENT_IDX, MERGEABLE, MERGEABLE | EVENT_IDX] {
        let (mut driver, host) = start(features, 8);
        for round in 0..100u8 {
            arrive(&host, &[round; 1000]);
            driver.run();
            assert_eq!(driver.used(RX), []);
            driver.send(RX, &[writable(BUFFERS, 1000)]);
            assert_eq!(driver.used(RX).len(), 1);
            assert_eq!(driver.read(BUFFERS + 12, 1), [round]);
        }
        // One that needs two comes when the second is there.
        if features & MERGEABLE != 0 {
            arrive(&host, &[7; 1500]);
            driver.send(RX, &[writable(BUFFERS, 1000)]);
            assert_eq!(driver.used(RX), []);
            driver.send(RX, &[writable(BUFFERS + 1000, 1000)]);
            assert_eq!(driver.used(RX).iter().map(|used| used.1).sum::<u32>(), 1500);
        }
    }
}

/// docs/hostile.md 11: nothing but what the guest may send reaches the wire; every buffer comes back.
#[test]
fn hostile_11_bad_frames_are_dropped_and_good_ones_still_pass() {
    let (mut driver, host) = start(EVENT_IDX, 64);
    let mut spoofed = frame(60);
    spoofed[LENGTH + 6] ^= 4;
    let mut unknown = frame(60);
    unknown[1] = 9;
    let mut outside = frame(60);
    outside[0] = 1;
    outside[6..8].copy_from_slice(&60u16.to_le_bytes());
    for bad in
        [&frame(60)[..5], &frame(60)[..LENGTH], &frame(60)[..20], &spoofed, &unknown, &outside]
    {
        driver.write(BUFFERS, bad);
        driver.send(TX, &[readable(BUFFERS, bad.len() as u32)]);
        assert_eq!(arrived(&host), None);
        assert_eq!(driver.used(TX).len(), 1);
    }
    // Nothing at all, only what the device may write, and more than any frame.
    driver.send(TX, &[readable(BUFFERS, 0)]);
    driver.send(TX, &[writable(BUFFERS, 60)]);
    driver.write(BUFFERS, &frame(60));
    driver.send(TX, &[readable(BUFFERS, 72), readable(BUFFERS, 1 << 20)]);
    driver.send(TX, &[readable(BUFFERS, (LARGEST + 1) as u32)]);
    assert_eq!(arrived(&host), None);
    assert_eq!(driver.used(TX).len(), 4);
    assert!(!driver.is_broken());
    driver.send(TX, &[readable(BUFFERS, 72)]);
    assert_eq!(arrived(&host), Some(frame(60)));
}

/// docs/hostile.md 11: receive buffers of 0 and 1 byte, and fewer than a frame needs in all.
#[test]
fn hostile_11_useless_receive_buffers_come_back_and_nothing_stalls() {
    for features in [0, EVENT_IDX, MERGEABLE, MERGEABLE | EVENT_IDX] {
        let (mut driver, host) = start(features, 8);
        arrive(&host, &[1; 100]);
        driver.send(RX, &[writable(BUFFERS, 0)]);
        driver.send(RX, &[writable(BUFFERS, 1)]);
        driver.send(RX, &[readable(BUFFERS, 100)]);
        assert_eq!(driver.used(RX), [(0, 0), (1, 0), (2, 0)]);
        driver.send(RX, &[writable(BUFFERS, 100)]);
        assert_eq!(driver.used(RX), [(3, 100)]);
        // The whole queue is too small for this one, which is lost; the next one is not.
        arrive(&host, &[2; 1000]);
        arrive(&host, &[3; 50]);
        for _ in 0..8 {
            driver.send(RX, &[writable(BUFFERS, 64)]);
        }
        assert_eq!(driver.used(RX), [(4, 50)], "{features:#x}");
        assert_eq!(driver.read(BUFFERS + 12, 1), [3]);
        assert!(!driver.is_broken());
    }
}

#[test]
fn hostile_1_broken_queues_are_survived() {
    crate::virtio::testing::survives_broken_queues(|| {
        // One frame waits, so that the device looks at both queues.
        let (host, ours) = wire();
        arrive(&host, &[1; 100]);
        Net::new(NetOptions::default(), Wire(ours)).unwrap()
    });
}

/// docs/hostile.md 2: a broken chain stops the device until it is reset, and it works again then.
#[test]
fn hostile_2_a_chain_outside_memory_needs_a_reset() {
    for queue in [RX, TX] {
        let (mut driver, host) = start(EVENT_IDX, 8);
        arrive(&host, &[1; 100]);
        driver.send(queue, &[(1 << 40, 100, queue == RX)]);
        assert!(driver.is_broken());
        driver.send(queue, &[(u64::MAX - 5, 100, queue == RX)]);
        assert_eq!(driver.used(queue), []);
        driver.device().reset();
        driver.activate(EVENT_IDX, 8);
        driver.send(RX, &[writable(BUFFERS, 100)]);
        assert_eq!(driver.used(RX), [(0, 100)]);
    }
}

/// docs/hostile.md 7: after a reset no buffer of the old driver is written.
#[test]
fn hostile_7_a_reset_forgets_buffers_and_frames() {
    let (mut driver, host) = start(MERGEABLE | EVENT_IDX, 8);
    driver.send(RX, &[writable(BUFFERS, 50)]);
    arrive(&host, &[1; 100]);
    driver.run();
    driver.device().reset();
    driver.write(BUFFERS, &[0xee; 200]);
    arrive(&host, &[2; 100]);
    driver.run();
    assert_eq!(driver.read(BUFFERS, 200), [0xee; 200]);
    driver.activate(MERGEABLE | EVENT_IDX, 8);
    driver.send(RX, &[writable(BUFFERS, 100)]);
    assert_eq!(driver.read(BUFFERS + 12, 1), [2]);
}

/// The TAP was removed: no busy loop (the driver fails a test that does not come to rest), and
/// what the guest sends comes back to it.
#[test]
fn hostile_26_a_wire_that_is_gone_is_let_alone() {
    let (mut driver, host) = start(EVENT_IDX, 8);
    offer(&mut driver, &[2000; 4]);
    drop(host);
    driver.run();
    driver.write(BUFFERS, &frame(60));
    driver.send(TX, &[readable(BUFFERS, 72)]);
    assert_eq!(driver.used(TX).len(), 1);
    assert!(!driver.is_broken());
}

/// More than one event's work.
#[test]
fn a_flood_is_worked_off_in_portions() {
    let (mut driver, host) = start(EVENT_IDX, 256);
    driver.write(BUFFERS, &frame(60));
    for round in 0..3 {
        for _ in 0..256 {
            driver.add(TX, &[readable(BUFFERS, 72)]);
        }
        // All at once, as after a stop of the host's process.
        driver.device().queue_events()[TX].write(1).unwrap();
        driver.run();
        assert_eq!(driver.used(TX).len(), 256, "round {round}");
        assert_eq!(std::iter::from_fn(|| arrived(&host)).count(), 256);
    }
}

#[test]
fn the_configuration_says_mac_and_mtu() {
    let (driver, _host) = start(0, 8);
    let mut config = [0xee; 16];
    driver.device().read_config(0, &mut config);
    assert_eq!(config, [2, 0x76, 172, 20, 0, 2, 0, 0, 0, 0, 0xdc, 5, 0, 0, 0, 0]);
    driver.device().read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 16]);
}

/// So many tokens in an hour, beside which the duration of a test is nothing.
fn hourly(tokens: u64) -> Option<TokenBucket> {
    TokenBucket::new(tokens, 0, 3_600_000)
}

/// A driver of an interface with these limits, and the host's end of the wire.
fn start_limited(
    rx_rate_limiter: RateLimiter,
    tx_rate_limiter: RateLimiter,
    features: u64,
) -> (Driver<Net<Wire>>, OwnedFd) {
    let (host, ours) = wire();
    let options = NetOptions { rx_rate_limiter, tx_rate_limiter, ..NetOptions::default() };
    let mut driver = Driver::new(Net::new(options, Wire(ours)).unwrap());
    driver.activate(features, 64);
    (driver, host)
}

/// As if so much time had passed for both directions.
fn pass(driver: &mut Driver<Net<Wire>>, minutes: u64) {
    let time = Duration::from_secs(60 * minutes);
    driver.device().options.rx_rate_limiter.pass(time);
    driver.device().options.tx_rate_limiter.pass(time);
    driver.run();
}

#[test]
fn sent_frames_beyond_the_limit_wait_in_the_queue() {
    for features in [0, EVENT_IDX] {
        // Two frames of 60 bytes, or three frames.
        let limiter = RateLimiter::new(hourly(120), hourly(3)).unwrap();
        let (mut driver, host) = start_limited(RateLimiter::default(), limiter, features);
        driver.write(BUFFERS, &frame(60));
        for _ in 0..4 {
            driver.send(TX, &[readable(BUFFERS, 72)]);
        }
        let arrived = |_: &_| std::iter::from_fn(|| arrived(&host)).count();
        assert_eq!((arrived(&driver), driver.used(TX).len()), (2, 2));
        pass(&mut driver, 29);
        assert_eq!(arrived(&driver), 0);
        pass(&mut driver, 1);
        assert_eq!((arrived(&driver), driver.used(TX).len()), (1, 1));
        // What is received is not limited by that.
        arrive(&host, &[1; 100]);
        driver.send(RX, &[writable(BUFFERS + 4096, 2000)]);
        assert_eq!(driver.used(RX).len(), 1);
        let (bandwidth, ops) = (BucketUpdate::Disabled, BucketUpdate::Disabled);
        driver.device().update_tx_rate_limiter(bandwidth, ops).unwrap();
        driver.run();
        assert_eq!((arrived(&driver), driver.used(TX).len()), (1, 1));
        driver.send(TX, &[readable(BUFFERS, 72)]);
        assert_eq!((arrived(&driver), driver.used(TX).len()), (1, 1));
    }
}

/// Read into the driver's buffers, where the largest frame fits into them, or into ours.
#[test]
fn received_frames_beyond_the_limit_come_later_and_whole() {
    for features in [0, EVENT_IDX, MERGEABLE, MERGEABLE | EVENT_IDX] {
        for buffer in [2000, LARGEST as u32] {
            let limiter = RateLimiter::new(hourly(176), None).unwrap();
            let (mut driver, host) = start_limited(limiter, RateLimiter::default(), features);
            offer(&mut driver, &[buffer; 8]);
            // 88 bytes and a header each.
            for round in 0..5u8 {
                arrive(&host, &[round; 100]);
            }
            driver.run();
            let mut came = driver.used(RX);
            assert_eq!(came.len(), 2);
            for minutes in [30, 15, 15] {
                pass(&mut driver, minutes);
                came.extend(driver.used(RX));
            }
            assert_eq!(came.len(), 4);
            // What is sent is not limited by that.
            driver.write(BUFFERS + 3 * (1 << 20) - 4096, &frame(60));
            driver.send(TX, &[readable(BUFFERS + 3 * (1 << 20) - 4096, 72)]);
            assert!(arrived(&host).is_some());
            // Lifted: at once.
            let (bandwidth, ops) = (BucketUpdate::Disabled, BucketUpdate::None);
            driver.device().update_rx_rate_limiter(bandwidth, ops).unwrap();
            driver.run();
            came.extend(driver.used(RX));
            assert_eq!(came, (0..5).map(|head| (head, 100)).collect::<Vec<_>>());
            for round in 0..5u8 {
                let got = driver.read(BUFFERS + u64::from(buffer) * u64::from(round), 100);
                assert_eq!((&got[10..12], &got[12..]), (&[1, 0][..], &[round; 88][..]));
            }
        }
    }
}

/// A large frame over many buffers, some of which come while it is held.
#[test]
fn a_held_frame_keeps_its_buffers_while_others_are_added() {
    for count in [1, 50] {
        let limiter = RateLimiter::new(None, hourly(1)).unwrap();
        let (mut driver, host) =
            start_limited(limiter, RateLimiter::default(), MERGEABLE | EVENT_IDX);
        offer(&mut driver, &vec![2000; count]);
        let large = frame(60_000);
        arrive(&host, &[1; 100]);
        arrive(&host, &large);
        arrive(&host, &[3; 100]);
        driver.run();
        assert_eq!(driver.used(RX), [(0, 100)]);
        for slot in count..60 {
            driver.send(RX, &[writable(BUFFERS + 2000 * slot as u64, 2000)]);
        }
        assert_eq!(driver.used(RX), []);
        pass(&mut driver, 60);
        let used = driver.used(RX);
        assert_eq!(used.iter().map(|used| used.1 as usize).sum::<usize>(), large.len());
        let mut expected = large;
        expected[10..12].copy_from_slice(&(used.len() as u16).to_le_bytes());
        assert!(driver.read(BUFFERS + 2000, expected.len()) == expected);
        pass(&mut driver, 60);
        assert_eq!(driver.used(RX).len(), 1);
    }
}

/// docs/hostile.md 7: nor a frame that was held for the limiter; and the limit is still there.
#[test]
fn hostile_7_a_reset_forgets_a_held_frame_and_lifts_no_limit() {
    let limiter = RateLimiter::new(None, hourly(1)).unwrap();
    let (mut driver, host) = start_limited(limiter, RateLimiter::default(), MERGEABLE | EVENT_IDX);
    offer(&mut driver, &[2000; 50]);
    arrive(&host, &[1; 100]);
    arrive(&host, &[2; 100]);
    driver.run();
    assert_eq!(driver.used(RX).len(), 1);
    driver.device().reset();
    driver.write(BUFFERS, &[0xee; 100_000]);
    arrive(&host, &[3; 100]);
    driver.run();
    driver.activate(MERGEABLE | EVENT_IDX, 64);
    offer(&mut driver, &[2000; 50]);
    assert_eq!(driver.used(RX), []);
    assert_eq!(driver.read(BUFFERS, 100_000), [0xee; 100_000]);
    pass(&mut driver, 60);
    assert_eq!(driver.used(RX), [(0, 100)]);
    assert_eq!(driver.read(BUFFERS + 12, 88), [3; 88]);
}

/// A limit that comes while the machine runs: its timer was not there when the event loop began.
#[test]
fn an_interface_may_be_limited_while_the_guest_runs() {
    let (mut driver, host) = start(EVENT_IDX, 64);
    let one = || BucketUpdate::Set(hourly(1).unwrap());
    driver.device().update_rx_rate_limiter(BucketUpdate::None, one()).unwrap();
    driver.device().update_tx_rate_limiter(BucketUpdate::None, one()).unwrap();
    driver.run();
    offer(&mut driver, &[2000; 4]);
    driver.write(BUFFERS + 10_000, &frame(60));
    for hour in 0..3 {
        for _ in 0..2 {
            arrive(&host, &[1; 100]);
            driver.send(TX, &[readable(BUFFERS + 10_000, 72)]);
        }
        assert_eq!((driver.used(RX).len(), driver.used(TX).len()), (1, 1), "{hour}");
        pass(&mut driver, 60);
        assert_eq!((driver.used(RX).len(), driver.used(TX).len()), (1, 1), "{hour}");
        pass(&mut driver, 60);
        driver.send(RX, &[writable(BUFFERS, 2000)]);
        driver.send(RX, &[writable(BUFFERS, 2000)]);
    }
}

/// Answers frames whose first byte is 0xff with the same bytes backwards; the second one later.
struct Echo {
    answers: Vec<Vec<u8>>,
    late: Option<Vec<u8>>,
    polls: u32,
}

impl Responder for Echo {
    fn wants(&self, head: &[u8]) -> bool {
        head[..6] == [0xff; 6]
    }
    fn receive(&mut self, frame: &[u8]) {
        self.late = Some(frame.iter().rev().copied().collect());
    }
    fn poll(&mut self) -> Option<Duration> {
        self.polls += 1;
        // Not at once: only its timer brings it out.
        if self.polls > 1 {
            self.answers.extend(self.late.take());
        }
        self.late.is_some().then_some(Duration::from_millis(1))
    }
    fn transmit(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let answer = self.answers.pop()?;
        buffer[..answer.len()].copy_from_slice(&answer);
        Some(answer.len())
    }
}

#[test]
fn a_responder_takes_its_frames_and_its_answers_come_when_it_has_them() {
    let (host, ours) = wire();
    let options = NetOptions { id: "eth0".into(), mac: Some(MAC), ..NetOptions::default() };
    let mut net = Net::new(options, Wire(ours)).unwrap();
    net.set_responder(Box::new(Echo { answers: Vec::new(), late: None, polls: 0 })).unwrap();
    let mut driver = Driver::new(net);
    driver.activate(MERGEABLE, 64);
    let (asked, mut other) = (frame(60), frame(60));
    other[LENGTH..LENGTH + 6].fill(2);
    driver.write(BUFFERS, &asked);
    driver.write(BUFFERS + 4096, &other);
    driver.send(RX, &[writable(BUFFERS + 8192, 70_000)]);
    driver.send(TX, &[readable(BUFFERS, asked.len() as u32)]);
    driver.send(TX, &[readable(BUFFERS + 4096, other.len() as u32)]);
    // Only the other frame is on the wire.
    assert_eq!(arrived(&host), Some(other));
    assert_eq!(arrived(&host), None);
    let answer: Vec<u8> = asked[LENGTH..].iter().rev().copied().collect();
    for _ in 0..1000 {
        std::thread::sleep(Duration::from_millis(1));
        driver.run();
        if driver.used(RX).len() == 1 {
            assert_eq!(driver.read(BUFFERS + 8192 + LENGTH as u64, answer.len()), answer);
            return;
        }
    }
    panic!("no answer came");
}
