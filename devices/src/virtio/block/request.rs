//! What a descriptor chain asks a drive to do. Parsing touches nothing but the chain.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::MAX_RANGES;
use crate::GuestMemory;
use crate::virtio::queue::Chain;

/// Bytes of the header of each request (virtio 1.2, 5.2.6).
pub const HEADER: usize = 16;
/// Bytes of one range of a discard or write-zeroes request.
const RANGE: usize = 16;
/// Bytes of a drive's id.
pub const ID: usize = 20;

/// Sectors to discard or to fill with zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub count: u32,
    /// The blocks may be given back to the host.
    pub unmap: bool,
}

/// A request, its lengths consistent with its chain. Whether it fits the disk is the disk's affair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the first `length` writable bytes from this sector on.
    Read { sector: u64, length: usize },
    /// Store the `length` readable bytes behind the header from this sector on.
    Write { sector: u64, length: usize },
    /// Make what was written durable.
    Flush,
    /// Write the drive's id.
    GetId,
    /// Forget ranges.
    Discard(Vec<SectorRange>),
    /// Zero ranges.
    WriteZeroes(Vec<SectorRange>),
}

/// One request.
pub type Request = Operation;

/// Why a chain is not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A type that was not offered.
    Unsupported,
    /// Its parts do not fit together.
    Malformed(&'static str),
}

impl Operation {
    /// Bytes that are moved from or to the disk, for a limit on bandwidth. Zeroes count: the host
    /// may have to write them. What is discarded or flushed does not.
    pub fn bytes(&self) -> u64 {
        match self {
            Operation::Read { length, .. } | Operation::Write { length, .. } => *length as u64,
            Operation::WriteZeroes(ranges) => {
                ranges.iter().map(|range| u64::from(range.count) * 512).sum()
            }
            Operation::Flush | Operation::GetId | Operation::Discard(_) => 0,
        }
    }

    /// Reads the chain's header, and for ranges its data.
    pub fn parse(memory: &GuestMemory, chain: &Chain) -> Result<Operation, Refused> {
        let mut header = [0; HEADER];
        let got = chain.readable.read(memory, 0, &mut header);
        if got.ok() != Some(HEADER) {
            return Err(Refused::Malformed("header is too short"));
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let payload = chain.readable.len() - HEADER;
        // The last writable byte is the status; the caller has seen that there is one.
        let room = chain.writable.len().saturating_sub(1);
        match kind {
            VIRTIO_BLK_T_IN if room.is_multiple_of(512) => {
                Ok(Operation::Read { sector, length: room })
            }
            VIRTIO_BLK_T_OUT if payload.is_multiple_of(512) => {
                Ok(Operation::Write { sector, length: payload })
            }
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => {
                Err(Refused::Malformed("data is not a multiple of 512 bytes"))
            }
            VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            VIRTIO_BLK_T_GET_ID if room < ID => Err(Refused::Malformed("no room for an id")),
            VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId),
            VIRTIO_BLK_T_DISCARD => ranges(memory, chain, payload, kind).map(Operation::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                ranges(memory, chain, payload, kind).map(Operation::WriteZeroes)
            }
            _ => Err(Refused::Unsupported),
        }
    }
}

fn ranges(
    memory: &GuestMemory,
    chain: &Chain,
    payload: usize,
    kind: u32,
) -> Result<Vec<SectorRange>, Refused> {
    const UNMAP: u32 = 1;
    if payload == 0 || !payload.is_multiple_of(RANGE) {
        return Err(Refused::Malformed("ranges are not a multiple of 16 bytes"));
    }
    if payload / RANGE > MAX_RANGES as usize {
        return Err(Refused::Malformed("more ranges than offered"));
    }
    let mut ranges = Vec::with_capacity(payload / RANGE);
    for index in 0..payload / RANGE {
        let mut bytes = [0; RANGE];
        if chain.readable.read(memory, HEADER + index * RANGE, &mut bytes).ok() != Some(RANGE) {
            return Err(Refused::Malformed("ranges are too short"));
        }
        let (sector, rest) = bytes.split_at(8);
        let word =
            |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let flags = word(&rest[4..]) as u32;
        // A flag that means nothing here must be refused (virtio 1.2, 5.2.6.2).
        let allowed = if kind == VIRTIO_BLK_T_WRITE_ZEROES { UNMAP } else { 0 };
        if flags & !allowed != 0 {
            return Err(Refused::Unsupported);
        }
        ranges.push(SectorRange {
            sector: word(sector),
            count: word(&rest[..4]) as u32,
            unmap: kind == VIRTIO_BLK_T_DISCARD || flags & UNMAP != 0,
        });
    }
    Ok(ranges)
}
