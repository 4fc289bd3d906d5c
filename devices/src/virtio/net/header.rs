//! `struct virtio_net_hdr_v1` (virtio 1.2, 5.1.6), and whether a guest's makes sense.

/// Bytes of the header.
pub const LENGTH: usize = 12;
/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Bytes of a VLAN tag.
const VLAN: usize = 4;
/// Longest packet with its Ethernet header, a segmentation left to the host.
pub const MAX_FRAME: usize = 65535 + ETHERNET + VLAN;

/// The fault of a frame whose source is not the guest's MAC address.
pub const SPOOFED: &str = "not from the guest's address";

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Why a frame from a guest is dropped; `None` where it is good. `head` is what it begins with:
/// this header and the Ethernet header; `length` is the length of all of it.
pub fn fault(head: &[u8], length: usize, mac: Option<[u8; 6]>) -> Option<&'static str> {
    let Some((header, ethernet)) = head.split_at_checked(LENGTH) else {
        return Some("shorter than a header");
    };
    if ethernet.len() < ETHERNET || length < LENGTH + ETHERNET {
        return Some("shorter than an Ethernet header");
    }
    let packet = length - LENGTH;
    if packet > MAX_FRAME {
        return Some("longer than any packet");
    }
    let half = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (flags, gso_type) = (header[0], header[1]);
    let (header_length, gso_size, start, offset) = (half(2), half(4), half(6), half(8));
    if flags & NEEDS_CHECKSUM != 0 && start + offset + 2 > packet {
        return Some("checksum outside the packet");
    }
    match gso_type & !GSO_ECN {
        GSO_NONE => {}
        GSO_TCP4 | GSO_TCP6 => {
            if gso_size == 0 || flags & NEEDS_CHECKSUM == 0 {
                return Some("segmentation without a size or a checksum");
            }
            if header_length > packet {
                return Some("headers longer than the packet");
            }
        }
        _ => return Some("unknown segmentation"),
    }
    if mac.is_some_and(|mac| ethernet[6..12] != mac) {
        return Some(SPOOFED);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0x76, 172, 20, 0, 2];

    /// Judges a frame from [`MAC`] with this header and so many bytes behind it.
    fn judge(header: [u8; LENGTH], length: usize, mac: Option<[u8; 6]>) -> Option<&'static str> {
        let mut head = header.to_vec();
        head.extend_from_slice(&[0xff; 6]);
        head.extend_from_slice(&MAC);
        head.extend_from_slice(&[8, 0]);
        head.truncate(LENGTH + length);
        fault(&head, LENGTH + length, mac)
    }

    #[test]
    fn plain_and_segmented_packets_pass() {
        assert_eq!(judge([0; LENGTH], 60, Some(MAC)), None);
        let tcp = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        assert_eq!(judge(tcp, 30_000, Some(MAC)), None);
    }

    /// docs/hostile.md 11.
    #[test]
    fn hostile_11_what_a_driver_must_not_send_is_dropped() {
        assert!(fault(&[0; 5], 5, None).is_some());
        assert!(fault(&[0; LENGTH], LENGTH, None).is_some());
        assert!(judge([0; LENGTH], 13, None).is_some());
        assert_eq!(judge([0; LENGTH], 14, None), None);
        assert_eq!(judge([0; LENGTH], MAX_FRAME, None), None);
        assert!(judge([0; LENGTH], MAX_FRAME + 1, None).is_some());
        assert!(judge([0; LENGTH], u32::MAX as usize, None).is_some());
        for header in [
            [0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0],
            [1, 1, 0xff, 0xff, 1, 0, 34, 0, 16, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
            [1, 0, 0, 0, 0, 0, 60, 0, 0, 0, 0, 0],
        ] {
            assert!(judge(header, 60, Some(MAC)).is_some(), "{header:?}");
        }
        let spoofed = judge([0; LENGTH], 60, Some([2, 0, 0, 0, 0, 1]));
        assert_eq!(spoofed, Some(SPOOFED));
    }
}
