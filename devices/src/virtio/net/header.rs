//! `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6), and whether a guest's makes sense.

/// Bytes of the header.
pub const LENGTH: usize = 12;
/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Longest packet with its Ethernet header, a segmentation left to the host.
pub const MAX_FRAME: usize = 65535 + ETHERNET;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Why a frame from a guest is dropped; `None` where it is good. `frame` begins with the header.
pub fn fault(frame: &[u8], mac: Option<[u8; 6]>) -> Option<&'static str> {
    let Some((header, packet)) = frame.split_at_checked(LENGTH) else {
        return Some("shorter than a header");
    };
    if packet.len() < ETHERNET {
        return Some("shorter than an Ethernet header");
    }
    if packet.len() > MAX_FRAME {
        return Some("longer than any packet");
    }
    let half = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (flags, gso_type) = (header[0], header[1]);
    let (header_length, gso_size, start, offset) = (half(2), half(4), half(6), half(8));
    if flags & NEEDS_CHECKSUM != 0 && start + offset + 2 > packet.len() {
        return Some("checksum outside the packet");
    }
    match gso_type & !GSO_ECN {
        GSO_NONE => {}
        GSO_TCP4 | GSO_TCP6 => {
            if gso_size == 0 || flags & NEEDS_CHECKSUM == 0 {
                return Some("segmentation without a size or a checksum");
            }
            if header_length > packet.len() {
                return Some("headers longer than the packet");
            }
        }
        _ => return Some("unknown segmentation"),
    }
    if mac.is_some_and(|mac| packet[6..12] != mac) {
        return Some("not from the guest's address");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0x76, 172, 20, 0, 2];

    fn frame(header: [u8; LENGTH], length: usize) -> Vec<u8> {
        let mut frame = header.to_vec();
        frame.extend_from_slice(&[0xff; 6]);
        frame.extend_from_slice(&MAC);
        frame.resize(LENGTH + length, 0);
        frame
    }

    #[test]
    fn plain_and_segmented_packets_pass() {
        assert_eq!(fault(&frame([0; LENGTH], 60), Some(MAC)), None);
        let tcp = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        assert_eq!(fault(&frame(tcp, 30_000), Some(MAC)), None);
    }

    /// HOSTILE.md 11.
    #[test]
    fn hostile_11_what_a_driver_must_not_send_is_dropped() {
        assert!(fault(&[0; 5], None).is_some());
        assert!(fault(&[0; LENGTH], None).is_some());
        assert!(fault(&frame([0; LENGTH], 13), None).is_some());
        assert!(fault(&frame([0; LENGTH], MAX_FRAME + 1), None).is_some());
        for header in [
            [0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0],
            [1, 1, 0xff, 0xff, 1, 0, 34, 0, 16, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
            [1, 0, 0, 0, 0, 0, 60, 0, 0, 0, 0, 0],
        ] {
            assert!(fault(&frame(header, 60), Some(MAC)).is_some(), "{header:?}");
        }
        let spoofed = fault(&frame([0; LENGTH], 60), Some([2, 0, 0, 0, 0, 1]));
        assert_eq!(spoofed, Some("not from the guest's address"));
    }
}
