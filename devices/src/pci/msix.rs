//! MSI-X (PCI 3.0, 6.8.2): a table of messages in a BAR, masks, and the bits of what waits behind
//! them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Capability identifier.
pub const CAPABILITY: u8 = 0x11;
/// Size of one vector in the table, in bytes.
pub const ENTRY_SIZE: u64 = 16;
/// Most vectors of one function.
pub const MAX_VECTORS: u16 = 2048;

/// Message control: MSI-X is enabled.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const MASK_ALL: u16 = 1 << 14;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;

/// How messages of one function reach the guest's processors.
///
/// Implemented where KVM is known: `route` by `KVM_SET_GSI_ROUTING`, `trigger` by an irqfd. Neither
/// may call back into the function or the bus.
pub trait MsiSink: Send + Sync {
    /// From now on this vector means this message (address and data, as a processor is to see them
    /// written). Only called when that is new.
    fn route(&self, vector: u16, address: u64, data: u32);
    /// Sends the vector's message. `route` was called before.
    fn trigger(&self, vector: u16);
}

/// One vector of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vector {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Vector control; only bit 0 exists.
    pub masked: bool,
    /// Whether a message waits until the vector is unmasked.
    pub pending: bool,
}

/// As after a reset (PCI 3.0, 6.8.2.9).
const RESET: Vector = Vector { address: 0, data: 0, masked: true, pending: false };

/// Table and pending bits of one function. Its message control register is in the function's
/// configuration space, which tells of every change by [`set_control`](Msix::set_control).
pub struct Msix {
    vectors: Vec<Vector>,
    /// The message that the sink was told, of each vector.
    routed: Vec<Option<(u64, u32)>>,
    control: u16,
    sink: Arc<dyn MsiSink>,
}

impl Msix {
    /// A table of so many vectors, at most [`MAX_VECTORS`] and at least one.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Msix {
        let count = usize::from(vectors.clamp(1, MAX_VECTORS));
        Msix { vectors: vec![RESET; count], routed: vec![None; count], control: 0, sink }
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// The capability's body behind identifier and link, and its writable bits: table and pending
    /// bits are in this BAR at these offsets (multiples of 8).
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.count() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        (body, (ENABLE | MASK_ALL).to_le_bytes())
    }

    /// The message control register is now this.
    pub fn set_control(&mut self, control: u16) {
        if self.control != control {
            self.control = control;
            self.update_all();
        }
    }

    /// Sends a vector's message, or keeps it pending while it is masked. A vector that is not there
    /// is none, and so is every one while MSI-X is off.
    pub fn trigger(&mut self, vector: u16) {
        let Some(entry) = self.vectors.get_mut(usize::from(vector)) else { return };
        if self.control & ENABLE == 0 {
            return;
        }
        entry.pending = true;
        self.update(vector);
    }

    fn update_all(&mut self) {
        for vector in 0..self.count() {
            self.update(vector);
        }
    }

    /// Tells the sink what is new of a vector that is not masked.
    fn update(&mut self, vector: u16) {
        let index = usize::from(vector);
        let (Some(entry), Some(routed)) = (self.vectors.get_mut(index), self.routed.get_mut(index))
        else {
            return;
        };
        if self.control & (ENABLE | MASK_ALL) != ENABLE || entry.masked {
            return;
        }
        let message = (entry.address, entry.data);
        if *routed != Some(message) {
            self.sink.route(vector, entry.address, entry.data);
            *routed = Some(message);
        }
        if std::mem::take(&mut entry.pending) {
            self.sink.trigger(vector);
        }
    }

    /// The guest reads the table. Accesses are of 4 or 8 aligned bytes; others read zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        read_words(offset, data, |at| {
            let entry = self.vectors.get(usize::try_from(at / ENTRY_SIZE).ok()?)?;
            Some(match at % ENTRY_SIZE {
                0 => entry.address as u32,
                4 => (entry.address >> 32) as u32,
                8 => entry.data,
                _ => u32::from(entry.masked),
            })
        });
    }

    /// The guest writes the table. Accesses are of 4 or 8 aligned bytes; others do nothing.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !is_access(offset, data.len()) {
            return;
        }
        let Ok(vector) = u16::try_from(offset / ENTRY_SIZE) else { return };
        let Some(entry) = self.vectors.get_mut(usize::from(vector)) else { return };
        for (at, word) in (offset % ENTRY_SIZE..).step_by(4).zip(data.as_chunks().0) {
            let value = u32::from_le_bytes(*word);
            match at {
                // The lowest bits of an address are zero.
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                8 => entry.data = value,
                _ => entry.masked = value & MASKED != 0,
            }
        }
        self.update(vector);
    }

    /// The guest reads pending bits, 64 vectors in eight bytes. It cannot write them.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        read_words(offset, data, |at| {
            let first = usize::try_from(at.checked_mul(8)?).ok()?;
            let vectors = self.vectors.get(first..)?.iter().take(32);
            Some(
                (0..)
                    .zip(vectors)
                    .fold(0, |bits, (bit, vector)| bits | u32::from(vector.pending) << bit),
            )
        });
    }

    /// The table, for a snapshot.
    pub fn save(&self) -> Vec<Vector> {
        self.vectors.clone()
    }

    /// Takes the table out of a snapshot; false where it is of another size. The message control
    /// register is to be set after that, which tells the sink of everything.
    pub fn restore(&mut self, vectors: &[Vector]) -> bool {
        if vectors.len() != self.vectors.len() {
            return false;
        }
        self.vectors.copy_from_slice(vectors);
        self.routed.fill(None);
        self.control = 0;
        true
    }
}

fn is_access(offset: u64, size: usize) -> bool {
    matches!(size, 4 | 8) && offset.is_multiple_of(size as u64)
}

fn read_words(offset: u64, data: &mut [u8], word: impl Fn(u64) -> Option<u32>) {
    data.fill(0);
    if is_access(offset, data.len()) {
        for (at, to) in (offset..=u64::MAX).step_by(4).zip(data.as_chunks_mut().0) {
            *to = word(at).unwrap_or(0).to_le_bytes();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// What reached the processors.
    #[derive(Debug, PartialEq, Eq)]
    pub(crate) enum Sent {
        Route(u16, u64, u32),
        Message(u16),
    }

    #[derive(Default)]
    pub(crate) struct Recorder(Mutex<Vec<Sent>>);

    impl Recorder {
        pub(crate) fn take(&self) -> Vec<Sent> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl MsiSink for Recorder {
        fn route(&self, vector: u16, address: u64, data: u32) {
            self.0.lock().unwrap().push(Sent::Route(vector, address, data));
        }
        fn trigger(&self, vector: u16) {
            self.0.lock().unwrap().push(Sent::Message(vector));
        }
    }

    fn msix(count: u16) -> (Msix, Arc<Recorder>) {
        let sink = Arc::new(Recorder::default());
        (Msix::new(count, sink.clone()), sink)
    }

    fn put(msix: &mut Msix, offset: u64, value: u32) {
        msix.write_table(offset, &value.to_le_bytes());
    }

    fn word(msix: &Msix, offset: u64) -> u32 {
        let mut data = [0; 4];
        msix.read_table(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn pending(msix: &Msix) -> u64 {
        let mut data = [0; 8];
        msix.read_pending(0, &mut data);
        u64::from_le_bytes(data)
    }

    /// Vector 1 has a message, everything is as Linux leaves it before it unmasks vectors.
    fn with_message() -> (Msix, Arc<Recorder>) {
        let (mut msix, sink) = msix(3);
        msix.set_control(ENABLE | MASK_ALL);
        put(&mut msix, 16, 0xfee0_1003);
        put(&mut msix, 20, 7);
        put(&mut msix, 24, 0x4021);
        msix.set_control(ENABLE);
        assert_eq!(sink.take(), []);
        (msix, sink)
    }

    #[test]
    fn a_vector_is_routed_once_it_is_unmasked_and_again_when_it_changes() {
        let (mut msix, sink) = with_message();
        assert_eq!([16, 20, 24, 28].map(|at| word(&msix, at)), [0xfee0_1000, 7, 0x4021, 1]);
        put(&mut msix, 28, 0);
        let address = 0x7_fee0_1000;
        assert_eq!(sink.take(), [Sent::Route(1, address, 0x4021)]);
        msix.trigger(1);
        assert_eq!(sink.take(), [Sent::Message(1)]);
        put(&mut msix, 28, 1);
        put(&mut msix, 28, 0);
        assert_eq!(sink.take(), []);
        // Moved to another processor by eight bytes at once.
        put(&mut msix, 28, 1);
        msix.write_table(24, &[0x22, 0x40, 0, 0, 0, 0, 0, 0]);
        assert_eq!(sink.take(), [Sent::Route(1, address, 0x4022)]);
    }

    #[test]
    fn what_is_masked_waits_and_comes_once() {
        let (mut msix, sink) = with_message();
        msix.trigger(1);
        msix.trigger(1);
        assert_eq!((sink.take(), pending(&msix)), (vec![], 0b010));
        msix.set_control(ENABLE | MASK_ALL);
        put(&mut msix, 28, 0);
        assert_eq!((sink.take(), pending(&msix)), (vec![], 0b010));
        msix.set_control(ENABLE);
        assert_eq!(sink.take(), [Sent::Route(1, 0x7_fee0_1000, 0x4021), Sent::Message(1)]);
        assert_eq!(pending(&msix), 0);
        // Nothing is kept while MSI-X is off.
        msix.set_control(0);
        msix.trigger(1);
        msix.set_control(ENABLE);
        assert_eq!((sink.take(), pending(&msix)), (vec![], 0));
        // Vectors that are not there, "none" among them.
        for vector in [3, 0x7ff, 0xffff] {
            msix.trigger(vector);
        }
        assert_eq!(sink.take(), []);
    }

    #[test]
    fn a_restored_table_tells_the_sink_of_everything() {
        let (mut before, _) = with_message();
        put(&mut before, 28, 0);
        before.set_control(ENABLE | MASK_ALL);
        before.trigger(1);
        let saved = serde_json::to_string(&before.save()).unwrap();
        let (mut after, sink) = msix(3);
        assert!(after.restore(&serde_json::from_str::<Vec<_>>(&saved).unwrap()));
        after.set_control(ENABLE);
        assert_eq!(sink.take(), [Sent::Route(1, 0x7_fee0_1000, 0x4021), Sent::Message(1)]);
        assert!(!after.restore(&[RESET]));
    }

    /// docs/hostile.md 9: every offset and size.
    #[test]
    fn hostile_9_every_offset_and_size_of_the_table_is_answered() {
        let (mut msix, sink) = msix(2);
        msix.set_control(ENABLE);
        for offset in (0..0x100).chain([u64::MAX - 7, u64::MAX - 3, u64::MAX]) {
            for size in (0..=9).chain([64]) {
                let mut data = vec![0xee; size];
                msix.read_table(offset, &mut data);
                msix.read_pending(offset, &mut data);
                assert_eq!(data, vec![0; size]);
                if !is_access(offset, size) {
                    msix.write_table(offset, &[0xee; 64][..size]);
                }
            }
        }
        assert_eq!(msix.vectors, [RESET; 2]);
        for offset in (0..0x100).step_by(4) {
            put(&mut msix, offset, 0xffff_fffe);
        }
        assert_eq!(sink.take().len(), 2);
    }
}
