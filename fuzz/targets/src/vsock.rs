//! Packets of a guest that knows what connections there are, and lies about each.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use arbitrary::Unstructured;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Device, Kind, MEMORY, Rig};

const HEADER: usize = 44;
const GUEST: u64 = 3;
const HOST: u64 = 2;
/// Queues.
const RX: usize = 0;
const TX: usize = 1;
const SIZE: u16 = 64;
/// Where receive buffers are, how long each is, and where packets to send are laid out.
const BUFFERS: u64 = 0x2_0000;
const BUFFER: u64 = 0x1000;
const PACKET: u64 = 0x8_0000;
/// Operations (virtio 1.2, 5.10.6).
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const DATA: u16 = 5;
/// Programs on the host, all of which are there until the guest's end.
const PROGRAMS: usize = 64;

/// Packets both ways, and programs of the host that come and go. What the device sends is a packet
/// of this guest's, no longer than it says; and no more data than there is room for, where the guest
/// did not lie about that.
pub fn vsock_packets(input: &[u8]) {
    let mut guest = Guest::new();
    let _ = guest.run(&mut Unstructured::new(input));
    guest.rig.check_reset();
}

/// One connection as the guest knows it: by the guest's port and the host's.
#[derive(Default)]
struct Connection {
    /// Bytes that came since it began, and how many of them the device was told to have been taken.
    received: u32,
    forwarded: u32,
    /// Room that was announced.
    room: u32,
    /// Whether the device was told nothing but the truth, so that it is known what it knows.
    is_honest: bool,
}

struct Guest {
    rig: Rig,
    programs: Vec<UnixStream>,
    connections: BTreeMap<(u32, u32), Connection>,
    /// Index of the receive queue's used ring up to which it was read.
    used: u16,
}

impl Guest {
    fn new() -> Guest {
        let mut guest = Guest {
            rig: Rig::new(Kind::Vsock),
            programs: Vec::new(),
            connections: BTreeMap::new(),
            used: 0,
        };
        guest.boot();
        guest
    }

    fn boot(&mut self) {
        self.connections.clear();
        self.used = 0;
        // Without EVENT_IDX, so that nothing depends on what the ring's end says.
        self.rig.set_up(u64::MAX << 32, SIZE);
        for index in 0..SIZE {
            self.offer(index);
        }
        self.rig.settle();
    }

    fn offer(&mut self, index: u16) {
        let address = BUFFERS + u64::from(index) * BUFFER;
        self.rig.put(RX, index, address, BUFFER as u32, 2, 0);
        self.rig.offer(RX, index);
    }

    fn run(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        while !input.is_empty() {
            match input.arbitrary::<u8>()? % 12 {
                0..=4 => self.send(input)?,
                5 | 6 => self.receive(),
                7 => {
                    let port: u8 = input.arbitrary()?;
                    let Device::Vsock { folder, .. } = &self.rig.device else { return Ok(()) };
                    if self.programs.len() < PROGRAMS
                        && let Ok(mut program) = UnixStream::connect(Device::path(folder))
                    {
                        program.set_nonblocking(true).unwrap();
                        let _ = program.write(format!("CONNECT {port}\n").as_bytes());
                        self.programs.push(program);
                    }
                }
                8 => {
                    let Device::Vsock { listener, .. } = &self.rig.device else { return Ok(()) };
                    if let Ok((program, _)) = listener.accept() {
                        program.set_nonblocking(true).unwrap();
                        self.programs.push(program);
                    }
                }
                9 => {
                    let (which, length): (u8, u16) = input.arbitrary()?;
                    if let Some(program) = self.program(which) {
                        let _ = program.write(&vec![7; length.into()]);
                    }
                }
                10 => {
                    let which: u8 = input.arbitrary()?;
                    if let Some(program) = self.program(which) {
                        let _ = program.read(&mut [0; 1 << 16]);
                    }
                }
                _ => {
                    let (what, which): (u8, u8) = input.arbitrary()?;
                    match what % 8 {
                        0 => self.boot(),
                        1 => {
                            if let Device::Vsock { device, .. } = &self.rig.device {
                                device.lock().unwrap().transport_reset();
                            }
                            self.connections.clear();
                        }
                        _ if self.programs.is_empty() => {}
                        _ => {
                            let which = usize::from(which) % self.programs.len();
                            drop(self.programs.swap_remove(which));
                        }
                    }
                }
            }
            self.rig.settle();
        }
        self.receive();
        Ok(())
    }

    fn program(&mut self, which: u8) -> Option<&mut UnixStream> {
        let count = self.programs.len().max(1);
        self.programs.get_mut(usize::from(which) % count)
    }

    /// Sends a packet, good or not, in one piece or two.
    fn send(&mut self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (lies, which, op, length): (u8, u8, u8, u16) = input.arbitrary()?;
        let length = u32::from(length % 4096);
        let known = self.connections.keys().copied().nth(usize::from(which) % 8);
        let (ours, theirs) = known.unwrap_or((7000 + u32::from(which), 1024));
        let mut op = u16::from(op % 9);
        if known.is_none() && lies & 1 == 0 {
            op = REQUEST;
        }
        let is_data = op == DATA;
        let mut source = GUEST;
        let mut announced = if is_data { length } else { 0 };
        let (mut kind, mut flags, mut target) = (1u16, 0u32, theirs);
        let mut room = 1 << 16;
        let mut forwarded = self.connections.get(&(ours, theirs)).map_or(0, |known| known.received);
        for lie in 1..8 {
            if lies >> lie & 1 == 0 {
                continue;
            }
            match lie {
                1 => source = input.arbitrary()?,
                2 => announced = input.arbitrary()?,
                3 => kind = input.arbitrary()?,
                4 => flags = input.arbitrary::<u32>()? % 8,
                5 => room = input.arbitrary()?,
                6 => forwarded = input.arbitrary()?,
                _ => target = input.arbitrary()?,
            }
        }
        if target != theirs {
            // It may be another one's.
            self.connections.values_mut().for_each(|known| known.is_honest = false);
        }
        let is_new = op == REQUEST && !self.connections.contains_key(&(ours, theirs));
        let known = self.connections.entry((ours, theirs)).or_default();
        // The first request, or the first answer to one, says how much room there is.
        let is_first = is_new || (op == RESPONSE && known.room == 0);
        known.is_honest = lies >> 1 == 0
            && if is_first { is_new || known.is_honest } else { known.is_honest && op != REQUEST };
        (known.room, known.forwarded) = (room, forwarded);
        let mut packet = Vec::with_capacity(HEADER + length as usize);
        for field in [source, HOST] {
            packet.extend(field.to_le_bytes());
        }
        for field in [ours, target, announced] {
            packet.extend(field.to_le_bytes());
        }
        packet.extend(kind.to_le_bytes());
        packet.extend(op.to_le_bytes());
        for field in [flags, room, forwarded] {
            packet.extend(field.to_le_bytes());
        }
        if is_data {
            packet.resize(packet.len() + length as usize, which);
        }
        self.rig.write(PACKET, &packet);
        let cut = if lies & 1 == 0 { HEADER } else { usize::from(which) % packet.len().max(1) };
        if cut == 0 || cut == packet.len() {
            self.rig.put(TX, 0, PACKET, packet.len() as u32, 0, 0);
        } else {
            self.rig.put(TX, 0, PACKET, cut as u32, 1, 1);
            let rest = (packet.len() - cut) as u32;
            self.rig.put(TX, 1, PACKET + cut as u64, rest, 0, 0);
        }
        self.rig.offer(TX, 0);
        Ok(())
    }

    /// Takes what has come, and gives the buffers back.
    fn receive(&mut self) {
        let ring = Rig::rings(RX)[2];
        // Each buffer once: what is given back may be filled at once.
        for _ in 0..SIZE {
            let index: u16 = self.rig.memory.read_obj(GuestAddress(ring + 2)).unwrap();
            if index == self.used {
                return;
            }
            assert!(index.wrapping_sub(self.used) <= SIZE);
            let entry = ring + 4 + 8 * u64::from(self.used % SIZE);
            self.used = self.used.wrapping_add(1);
            let head: u32 = self.rig.memory.read_obj(GuestAddress(entry)).unwrap();
            let length: u32 = self.rig.memory.read_obj(GuestAddress(entry + 4)).unwrap();
            assert!(head < SIZE.into() && u64::from(length) <= BUFFER);
            let mut packet = vec![0; length as usize];
            let address = BUFFERS + u64::from(head) * BUFFER;
            assert!(address < MEMORY);
            self.rig.memory.read_slice(&mut packet, GuestAddress(address)).unwrap();
            self.look_at(&packet);
            self.offer(head as u16);
            self.rig.settle();
        }
    }

    fn look_at(&mut self, packet: &[u8]) {
        let word = |at: usize| u32::from_le_bytes(packet[at..at + 4].try_into().unwrap());
        assert!(packet.len() >= HEADER && packet.len() == HEADER + word(24) as usize);
        assert_eq!(packet[..8], HOST.to_le_bytes());
        assert_eq!(packet[8..16], GUEST.to_le_bytes());
        let (theirs, ours, op) = (word(16), word(20), word(28) >> 16);
        assert!((1..=7).contains(&op));
        if op != u32::from(DATA) {
            assert_eq!(packet.len(), HEADER);
            if op == 1 {
                let new = Connection { is_honest: true, ..Connection::default() };
                self.connections.insert((ours, theirs), new);
            } else if op == 3 {
                self.connections.remove(&(ours, theirs));
            }
            return;
        }
        let known = self.connections.entry((ours, theirs)).or_default();
        known.received = known.received.wrapping_add(word(24));
        let untaken = known.received.wrapping_sub(known.forwarded);
        assert!(!known.is_honest || untaken <= known.room, "{untaken} bytes in {}", known.room);
    }
}
