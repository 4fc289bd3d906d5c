//! Virtio devices and their registers, as a driver that keeps to nothing uses them.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use arbitrary::Unstructured;
use devices::bus::BusDevice;
use devices::virtio::block::Disk;
use nix::sys::socket::{MsgFlags, send};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_QUEUE_NOTIFY};

use crate::driver::{Device, Kind, Rig};
use crate::{memory_file, path_of};

/// Snapshots in an input: a new device takes long to make.
const SNAPSHOTS: u32 = 3;

/// A byte for the device, and then steps of its driver and of the host. The device comes to rest
/// after each, and works after a reset.
pub fn virtio_queues(input: &[u8]) {
    let Some((kind, steps)) = input.split_first() else { return };
    let kinds = [
        Kind::Block,
        Kind::Rng,
        Kind::Balloon,
        Kind::Vsock,
        Kind::Console,
        Kind::Mem,
        Kind::Pmem,
        Kind::BlockAsync,
    ];
    drive(kinds[usize::from(*kind) % kinds.len()], steps);
}

/// The same for a network interface, whose steps have frames of the host's among them.
pub fn tap_frames(input: &[u8]) {
    drive(Kind::Net, input);
}

fn drive(kind: Kind, steps: &[u8]) {
    let mut rig = Rig::new(kind);
    let mut programs = Vec::new();
    let _ = run(&mut rig, &mut programs, &mut Unstructured::new(steps));
    rig.check_reset();
}

fn run(
    rig: &mut Rig,
    programs: &mut Vec<UnixStream>,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let mut snapshots = 0;
    while !input.is_empty() {
        match input.arbitrary::<u8>()? % 16 {
            0 => {
                let (features, size): (u32, u8) = input.arbitrary()?;
                // The feature bits above 32 that matter are VIRTIO_F_VERSION_1 and one of net's.
                rig.set_up(u64::from(features) | u64::MAX << 32, u16::from(size) + 1);
            }
            1 => {
                let (register, value): (u8, u32) = input.arbitrary()?;
                rig.set_register(u32::from(register) * 4, value);
            }
            2 => {
                let register: u8 = input.arbitrary()?;
                rig.register(u32::from(register) * 4);
            }
            3 => {
                let address = address(input)?;
                rig.write(address, bytes(input)?);
            }
            4 => {
                let (queue, index) = (queue(rig, input)?, input.arbitrary()?);
                let (address, length, flags, next) = input.arbitrary()?;
                rig.put(queue, index, address, length, flags, next);
            }
            5 => {
                let queue = queue(rig, input)?;
                rig.offer(queue, input.arbitrary()?);
            }
            6 => chain(rig, input)?,
            7 => {
                let queue = queue(rig, input)?;
                rig.set_available(queue, input.arbitrary()?);
            }
            8 => {
                let offset: u8 = input.arbitrary()?;
                let mut data = [0; 8];
                let width = 1 << (input.arbitrary::<u8>()? % 4);
                rig.transport
                    .read((VIRTIO_MMIO_CONFIG + u32::from(offset)).into(), &mut data[..width]);
            }
            9 => {
                let offset: u8 = input.arbitrary()?;
                let data: [u8; 8] = input.arbitrary()?;
                let width = 1 << (input.arbitrary::<u8>()? % 4);
                rig.transport
                    .write((VIRTIO_MMIO_CONFIG + u32::from(offset)).into(), &data[..width]);
            }
            10 => {
                snapshots += 1;
                if snapshots <= SNAPSHOTS {
                    rig.restore_elsewhere();
                }
            }
            11 => {
                let queue = queue(rig, input)?;
                rig.set_register(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
            }
            12 | 13 => host(rig, programs, input)?,
            // Any access, however it is aligned, also one that no processor makes.
            14 => {
                let (offset, size): (u16, u8) = input.arbitrary()?;
                let mut data = [0xee; 16];
                rig.transport.read(offset.into(), &mut data[..usize::from(size % 17)]);
            }
            _ => {
                let (offset, size, data): (u16, u8, [u8; 8]) = input.arbitrary()?;
                rig.transport.write(offset.into(), &data[..usize::from(size % 9)]);
            }
        }
        rig.settle();
    }
    Ok(())
}

fn queue(rig: &Rig, input: &mut Unstructured<'_>) -> arbitrary::Result<usize> {
    Ok(usize::from(input.arbitrary::<u8>()?) % rig.queues())
}

/// One in guest memory, a multiple of 16.
fn address(input: &mut Unstructured<'_>) -> arbitrary::Result<u64> {
    Ok(u64::from(input.arbitrary::<u16>()?) << 4)
}

/// Bytes that come with their number before them.
fn bytes<'a>(input: &mut Unstructured<'a>) -> arbitrary::Result<&'a [u8]> {
    let length = usize::from(input.arbitrary::<u8>()?).min(input.len());
    input.bytes(length)
}

/// A chain as it should be: descriptors one after the other, some for the device to write.
fn chain(rig: &mut Rig, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let queue = queue(rig, input)?;
    let (head, count, writable): (u8, u8, u8) = input.arbitrary()?;
    let count = u16::from(count % 8);
    let head = u16::from(head);
    for part in 0..=count {
        let address = address(input)?;
        let length: u16 = input.arbitrary()?;
        let write = if writable >> part & 1 != 0 { WRITE } else { 0 };
        let more = if part < count { NEXT } else { 0 };
        rig.put(queue, head + part, address, length.into(), write | more, head + part + 1);
    }
    rig.offer(queue, head);
    Ok(())
}

/// Something that the host does with the device. It may be refused.
fn host(
    rig: &mut Rig,
    programs: &mut Vec<UnixStream>,
    input: &mut Unstructured<'_>,
) -> arbitrary::Result<()> {
    let (what, number): (u8, u8) = input.arbitrary()?;
    match &rig.device {
        Device::Block(device) => {
            let file = memory_file();
            file.set_len((u64::from(number) + 1) << 9).unwrap();
            let disk = Disk::open(&path_of(&file), false).unwrap();
            let _ = device.lock().unwrap().replace_disk(disk);
        }
        Device::Balloon(device) => {
            let mut device = device.lock().unwrap();
            match what % 5 {
                0 => device.set_target_mib(number.into()),
                1 => drop(device.set_stats_interval(number.into())),
                2 => drop(device.start_hinting(number & 1 != 0)),
                3 => drop(device.stop_hinting()),
                _ => {
                    device.statistics();
                    device.hinting_status();
                }
            }
        }
        Device::Mem(device) => {
            let _ = device.lock().unwrap().set_requested_mib(u32::from(number) << 1);
        }
        Device::Vsock { device, folder, listener } => match what % 6 {
            0 => {
                if let Ok(mut program) = UnixStream::connect(Device::path(folder)) {
                    program.set_nonblocking(true).unwrap();
                    let _ = program.write(format!("CONNECT {}\n", u32::from(number)).as_bytes());
                    programs.push(program);
                }
            }
            1 => programs.extend(listener.accept().ok().map(|(program, _)| program)),
            2 => {
                let data = bytes(input)?;
                if let Some(program) = pick(programs, number) {
                    program.set_nonblocking(true).unwrap();
                    let _ = program.write(data);
                }
            }
            3 => {
                if let Some(program) = pick(programs, number) {
                    program.set_nonblocking(true).unwrap();
                    let _ = program.read(&mut [0; 4096]);
                }
            }
            4 => {
                if !programs.is_empty() {
                    programs.swap_remove(usize::from(number) % programs.len());
                }
            }
            _ => device.lock().unwrap().transport_reset(),
        },
        Device::Net { host, .. } => {
            // A virtio-net header of zeros, as the kernel's, and a frame.
            let mut frame = vec![0; 12];
            frame.extend_from_slice(bytes(input)?);
            frame.resize(frame.len() + usize::from(number) * 8, 0);
            let _ = send(host.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT);
            let mut room = [0; 1 << 16];
            if what & 1 != 0 {
                while nix::unistd::read(host.as_fd(), &mut room).is_ok_and(|count| count > 0) {}
            }
        }
        Device::Other(_) => {}
    }
    Ok(())
}

fn pick(programs: &mut [UnixStream], number: u8) -> Option<&mut UnixStream> {
    let count = programs.len().max(1);
    programs.get_mut(usize::from(number) % count)
}
