//! The metadata service, from both its sides: the host's JSON and the guest's frames.

use std::time::Duration;

use arbitrary::Unstructured;
use mmds::{
    DEFAULT_ADDRESS, DEFAULT_SIZE_LIMIT, HEAD, MAX_FRAME, Mmds, MmdsState, MmdsVersion, Stack,
    StackConfig,
};

const GUEST_MAC: [u8; 6] = [0xaa, 0xfc, 0, 0, 0, 1];
const GUEST: [u8; 4] = [172, 16, 0, 2];
const ETHERNET: usize = 14;
/// Bytes before a segment's data where there are no options.
const HEADERS: usize = ETHERNET + 20 + 20;
const SYN: u8 = 2;
const PSH: u8 = 8;
const ACK: u8 = 16;

/// A byte of settings, the contents, and then steps of a guest that has a TCP connection open and
/// keeps its numbers in mind. Answers are of bounded size and number.
pub fn mmds(input: &[u8]) {
    let _ = run(&mut Unstructured::new(input));
}

fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let settings: u8 = input.arbitrary()?;
    let version = if settings & 1 == 0 { MmdsVersion::V1 } else { MmdsVersion::V2 };
    let state = MmdsState { version, imds_compat: settings & 2 != 0, ..MmdsState::default() };
    let mut guest = Guest {
        mmds: Mmds::new(state, DEFAULT_SIZE_LIMIT).unwrap(),
        stack: Stack::new(StackConfig::default()).unwrap(),
        now: Duration::from_secs(3),
        port: 4000,
        seq: 100,
        ack: 0,
    };
    if let Ok(contents) = serde_json::from_slice(bytes(input)?) {
        let _ = guest.mmds.put(contents);
    }
    guest.open();
    while !input.is_empty() {
        match input.arbitrary::<u8>()? % 8 {
            0 => guest.exchange(bytes(input)?),
            1 => {
                let (flags, near, known) = input.arbitrary::<(u8, i8, i8)>()?;
                let seq = guest.seq.wrapping_add_signed(near.into());
                let ack = guest.ack.wrapping_add_signed(known.into());
                let window = input.arbitrary()?;
                let frame = guest.segment(flags, seq, ack, window, bytes(input)?);
                guest.exchange(&frame);
            }
            2 => guest.say(bytes(input)?),
            3 => {
                guest.now += Duration::from_millis(input.arbitrary::<u16>()?.into());
                guest.exchange(&[]);
            }
            4 => {
                // An ARP request for the service.
                let mut frame =
                    [&[0xff; 6][..], &GUEST_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
                frame.extend_from_slice(&GUEST_MAC);
                frame.extend_from_slice(&GUEST);
                frame.extend_from_slice(&[0; 6]);
                frame.extend_from_slice(&DEFAULT_ADDRESS.octets());
                guest.exchange(&frame);
            }
            5 => guest.open(),
            6 => {
                if let Ok(patch) = serde_json::from_slice(bytes(input)?) {
                    let _ = guest.mmds.patch(&patch);
                }
            }
            _ => {
                // A good segment of which one byte is not, and some are missing.
                let (at, byte, missing) = input.arbitrary::<(u8, u8, u8)>()?;
                let data = b"GET /a HTTP/1.1\r\n\r\n";
                let mut frame = guest.segment(PSH | ACK, guest.seq, guest.ack, 8192, data);
                if let Some(place) = frame.get_mut(usize::from(at)) {
                    *place = byte;
                }
                frame.truncate(frame.len().saturating_sub(missing.into()));
                guest.exchange(&frame);
            }
        }
    }
    guest.now += Duration::from_secs(120);
    guest.exchange(&[]);
    Ok(())
}

/// Bytes that come with their number before them.
fn bytes<'a>(input: &mut Unstructured<'a>) -> arbitrary::Result<&'a [u8]> {
    let length = usize::from(input.arbitrary::<u16>()?).min(input.len());
    input.bytes(length)
}

struct Guest {
    mmds: Mmds,
    stack: Stack,
    now: Duration,
    port: u16,
    /// The numbers of the next segments, the guest's and the stack's.
    seq: u32,
    ack: u32,
}

impl Guest {
    /// Begins a connection, on a port that was not used.
    fn open(&mut self) {
        self.port += 1;
        let frame = self.segment(SYN, self.seq, 0, 8192, &[]);
        self.seq = self.seq.wrapping_add(1);
        self.exchange(&frame);
        self.say(&[]);
    }

    /// Sends data, as it should be.
    fn say(&mut self, data: &[u8]) {
        for part in data.chunks(1400).chain(data.is_empty().then_some(data)) {
            let frame = self.segment(PSH | ACK, self.seq, self.ack, 8192, part);
            self.seq = self.seq.wrapping_add(part.len() as u32);
            self.exchange(&frame);
        }
    }

    /// Gives the stack a frame and takes what it has to say.
    fn exchange(&mut self, frame: &[u8]) {
        let wanted = self.stack.wants(frame);
        assert_eq!(wanted, self.stack.wants(&frame[..frame.len().min(HEAD)]));
        self.stack.receive(frame);
        self.stack.poll(self.now, &mut self.mmds);
        let mut buffer = [0; MAX_FRAME];
        let mut count = 0;
        while let Some(length) = self.stack.transmit(&mut buffer) {
            count += 1;
            assert!(count < 10_000, "no end of frames");
            let frame = &buffer[..length];
            if length >= HEADERS && frame[12..14] == [8, 0] && frame[23] == 6 {
                self.take(frame);
            }
            self.stack.poll(self.now, &mut self.mmds);
        }
        let _ = self.stack.next_deadline();
    }

    /// Notes what the stack has sent.
    fn take(&mut self, frame: &[u8]) {
        let tcp = &frame[ETHERNET + 20..];
        let number = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        let data = total - 20 - usize::from(tcp[12] >> 4) * 4;
        if u16::from_be_bytes([tcp[2], tcp[3]]) == self.port {
            // SYN and FIN count as a byte each.
            let flags = u32::from(tcp[13] & 1) + u32::from(tcp[13] >> 1 & 1);
            self.ack = number.wrapping_add(data as u32).wrapping_add(flags);
        }
    }

    /// A frame with a TCP segment; its checksums are left to the device.
    fn segment(&self, flags: u8, seq: u32, ack: u32, window: u16, data: &[u8]) -> Vec<u8> {
        let mut frame = [&StackConfig::default().mac[..], &GUEST_MAC, &[8, 0, 0x45, 0]].concat();
        let total = (40 + data.len()).min(usize::from(u16::MAX)) as u16;
        frame.extend_from_slice(&total.to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0, 0, 64, 6, 0, 0]);
        frame.extend_from_slice(&GUEST);
        frame.extend_from_slice(&DEFAULT_ADDRESS.octets());
        frame.extend_from_slice(&self.port.to_be_bytes());
        frame.extend_from_slice(&80u16.to_be_bytes());
        frame.extend_from_slice(&seq.to_be_bytes());
        frame.extend_from_slice(&ack.to_be_bytes());
        frame.extend_from_slice(&[5 << 4, flags]);
        frame.extend_from_slice(&window.to_be_bytes());
        frame.extend_from_slice(&[0; 4]);
        frame.extend_from_slice(data);
        frame
    }
}
