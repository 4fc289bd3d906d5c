//! Kernel images: the ELF file inside a bzImage, and a kernel's version.

use std::io::Read;
use std::path::Path;

use super::KernelError;

/// Most bytes that a kernel unpacks to.
const MAX_UNPACKED: u64 = 1 << 30;

/// The fastest form that boots: the ELF file, unpacked from a bzImage where that has one with a
/// PVH entry; else the bzImage as it is.
pub fn bootable(path: &Path, image: Vec<u8>) -> Result<Vec<u8>, KernelError> {
    if image.starts_with(b"\x7fELF") {
        return match has_pvh_note(&image) {
            true => Ok(image),
            false => Err(KernelError::Lacks {
                path: path.to_owned(),
                what: "a PVH entry (CONFIG_PVH=y)".to_owned(),
            }),
        };
    }
    if !is_bzimage(&image) {
        return Err(KernelError::NotAKernel(path.to_owned()));
    }
    let payload = payload(&image)
        .ok_or_else(|| malformed(path, "the bzImage's payload is outside the file"))?;
    match unpack(payload) {
        Ok(Some(elf)) if elf.starts_with(b"\x7fELF") && has_pvh_note(&elf) => Ok(elf),
        Ok(_) => Ok(image),
        Err(error) => {
            Err(malformed(path, &format!("the bzImage's payload does not unpack: {error}")))
        }
    }
}

fn malformed(path: &Path, reason: &str) -> KernelError {
    KernelError::Malformed { path: path.to_owned(), reason: reason.to_owned() }
}

fn is_bzimage(image: &[u8]) -> bool {
    image.get(0x202..0x206) == Some(b"HdrS")
}

fn word(image: &[u8], at: usize) -> Option<usize> {
    let bytes = image.get(at..at.checked_add(4)?)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(bytes)).ok()
}

/// The compressed kernel (Linux boot protocol: `payload_offset` and `payload_length`, from the end
/// of the real-mode code).
fn payload(image: &[u8]) -> Option<&[u8]> {
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512;
    let from = start.checked_add(word(image, 0x248)?)?;
    image.get(from..from.checked_add(word(image, 0x24c)?)?)
}

/// Unpacks what Linux's own build packs with; `None` for another format.
fn unpack(payload: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
    let mut unpacked = Vec::new();
    // gzip ends with the unpacked size by itself; to the others Linux's build adds it.
    let packed = payload.split_at(payload.len().saturating_sub(4)).0;
    let mut reader: Box<dyn Read + '_> = match packed {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::GzDecoder::new(payload)),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Box::new(xz2::read::XzDecoder::new(packed)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::new(packed)?.single_frame()),
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => {
            return check_size(payload, unpack_lz4(rest)?).map(Some);
        }
        _ => return Ok(None),
    };
    reader.by_ref().take(MAX_UNPACKED + 1).read_to_end(&mut unpacked)?;
    drop(reader);
    check_size(payload, unpacked).map(Some)
}

/// A payload ends with the size it unpacks to, so a part of one is told from the whole.
fn check_size(payload: &[u8], unpacked: Vec<u8>) -> std::io::Result<Vec<u8>> {
    if unpacked.len() as u64 > MAX_UNPACKED {
        return Err(std::io::Error::other("it unpacks to more than 1 GiB"));
    }
    let size = payload.len().checked_sub(4).and_then(|at| word(payload, at));
    if size != Some(unpacked.len()) {
        return Err(std::io::Error::other("it does not unpack to the size it says"));
    }
    Ok(unpacked)
}

/// The legacy LZ4 frame: blocks of at most 8 MiB, each behind its packed size.
fn unpack_lz4(mut rest: &[u8]) -> std::io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let mut unpacked = Vec::new();
    let mut block = vec![0; BLOCK];
    while let Some(size) = word(rest, 0) {
        let Some(packed) = rest.get(4..4 + size) else { break };
        let count =
            lz4_flex::block::decompress_into(packed, &mut block).map_err(std::io::Error::other)?;
        unpacked.extend_from_slice(&block[..count]);
        rest = &rest[4 + size..];
        if unpacked.len() as u64 > MAX_UNPACKED {
            return Err(std::io::Error::other("it unpacks to more than 1 GiB"));
        }
    }
    Ok(unpacked)
}

/// Whether an ELF kernel has Xen's note 18, `XEN_ELFNOTE_PHYS32_ENTRY`.
fn has_pvh_note(elf: &[u8]) -> bool {
    // Name size 4, any descriptor size, type 18, name "Xen". Notes are aligned to 4 bytes.
    elf.windows(16).any(|window| {
        window[12..16] == *b"Xen\0"
            && window[0..4] == [4, 0, 0, 0]
            && window[8..12] == [18, 0, 0, 0]
    })
}

/// The version that a kernel's banner names, for example `6.1.0-40-cloud-amd64`.
pub fn version(image: &[u8]) -> Option<String> {
    let text = if is_bzimage(image) {
        let at = usize::from(u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?)) + 0x200;
        image.get(at..)?
    } else {
        const BANNER: &[u8] = b"Linux version ";
        // Format strings begin like the banner and name no version.
        let found = image.windows(BANNER.len()).enumerate().filter(|(_, text)| *text == BANNER);
        return found.filter_map(|(at, _)| version_at(image.get(at + BANNER.len()..)?)).next();
    };
    version_at(text)
}

fn version_at(text: &[u8]) -> Option<String> {
    let length = text.iter().take(128).position(|byte| matches!(byte, b' ' | 0))?;
    let version = std::str::from_utf8(text.get(..length)?).ok()?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_+~".contains(&byte);
    (version.starts_with(|first: char| first.is_ascii_digit()) && version.bytes().all(plain))
        .then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        elf.resize(64, 0);
        elf.extend_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        elf.extend_from_slice(b"Xen\0\0\0\x10\0Linux version 6.1.2-test (a@b) #1\0");
        elf
    }

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x30b].copy_from_slice(b"6.1.2-test ");
        image[0x248..0x24c].copy_from_slice(&0u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn the_elf_file_comes_out_of_every_packing() {
        use std::io::Write;
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&elf()).unwrap();
        let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&elf()).unwrap();
        let packed = lz4_flex::block::compress(&elf());
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        lz4.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        lz4.extend_from_slice(&packed);
        let size = (elf().len() as u32).to_le_bytes();
        for mut payload in [
            gzip.finish().unwrap(),
            xz.finish().unwrap(),
            zstd::encode_all(elf().as_slice(), 1).unwrap(),
            lz4,
        ] {
            payload.extend_from_slice(&size);
            let image = bzimage(&payload);
            assert_eq!(version(&image).as_deref(), Some("6.1.2-test"));
            assert_eq!(bootable(Path::new("k"), image).unwrap(), elf());
        }
        assert_eq!(version(&elf()).as_deref(), Some("6.1.2-test"));
    }

    #[test]
    fn a_format_string_is_not_the_version() {
        let mut elf = elf();
        elf.splice(64..64, b"Linux version %s (%s)\0Linux version \0".iter().copied());
        assert_eq!(version(&elf).as_deref(), Some("6.1.2-test"));
    }

    /// docs/hostile.md 22: a part of a payload is no kernel, however much of it unpacks.
    #[test]
    fn hostile_22_a_payload_that_is_cut_is_refused() {
        use std::io::Write;
        let mut whole = elf();
        let mut noise = 1u32;
        whole.extend((0..100_000).map(|_| {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (noise >> 24) as u8
        }));
        let size = (whole.len() as u32).to_le_bytes();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&whole).unwrap();
        let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&whole).unwrap();
        let blocks = whole.chunks(40_000).map(lz4_flex::block::compress);
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        for block in blocks {
            lz4.extend_from_slice(&(block.len() as u32).to_le_bytes());
            lz4.extend_from_slice(&block);
        }
        let zstd = zstd::encode_all(whole.as_slice(), 1).unwrap();
        for packed in [gzip.finish().unwrap(), xz.finish().unwrap(), zstd, lz4] {
            let with_size = |packed: &[u8]| bzimage(&[packed, &size].concat());
            assert_eq!(bootable(Path::new("k"), with_size(&packed)).unwrap(), whole);
            for kept in [packed.len() / 2, packed.len() - 9] {
                assert!(bootable(Path::new("k"), with_size(&packed[..kept])).is_err());
            }
            let lies = bzimage(&[packed.as_slice(), &[1, 0, 0, 0]].concat());
            assert!(bootable(Path::new("k"), lies).is_err());
        }
    }

    /// docs/hostile.md 22.
    #[test]
    fn hostile_22_what_is_no_kernel_is_refused() {
        for image in [&b""[..], b"MZ", b"\x7fELF", &[0; 4096]] {
            assert!(bootable(Path::new("k"), image.to_vec()).is_err());
            assert_eq!(version(image), None);
        }
        for (at, value) in [(0x248, u32::MAX), (0x24c, u32::MAX), (0x248, 5000)] {
            let mut image = bzimage(b"\x1f\x8bgarbage");
            image[at..at + 4].copy_from_slice(&value.to_le_bytes());
            assert!(bootable(Path::new("k"), image).is_err());
        }
        assert!(bootable(Path::new("k"), bzimage(b"\x1f\x8bgarbage")).is_err());
        let mut image = bzimage(b"");
        image[0x300..0x30b].copy_from_slice(b"../../etc/x");
        assert_eq!(version(&image), None);
    }
}
