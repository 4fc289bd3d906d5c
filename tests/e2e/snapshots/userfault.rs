//! Memory whose pages another process brings as they are touched: this one (userfaultfd(2)).

#![allow(unsafe_code, reason = "takes over a descriptor, and ioctls of userfaultfd")]

use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use serde_json::{Value, json};

use super::{Files, end, goes_on};

const PAGE: u64 = 4096;
/// Events (linux/userfaultfd.h).
const PAGEFAULT: u8 = 0x12;
const REMOVE: u8 = 0x15;

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    copied: i64,
}

nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, Copy);

/// A piece of the guest's memory: where the monitor has it, and where the file does.
struct Piece {
    address: u64,
    length: u64,
    offset: u64,
}

/// What was asked of the handler.
#[derive(Default)]
struct Counts {
    brought: AtomicU64,
    removed: AtomicU64,
    zeroes: AtomicU64,
}

/// Brings the pages of one machine from a snapshot's memory file.
struct Handler {
    counts: Arc<Counts>,
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Handler {
    fn listen(socket: &Path, memory: &Path) -> Handler {
        let listener = UnixListener::bind(socket).unwrap();
        let (counts, over) = (Arc::<Counts>::default(), Arc::<AtomicBool>::default());
        let (counted, ends, memory) = (counts.clone(), over.clone(), File::open(memory).unwrap());
        let thread = std::thread::spawn(move || {
            let (faults, pieces) = handed(&listener);
            bring(&faults, &pieces, &memory, &counted, &ends);
        });
        Handler { counts, over, thread }
    }

    /// Once the machine is gone.
    fn end(self) -> Arc<Counts> {
        self.over.store(true, Ordering::Release);
        self.thread.join().unwrap();
        self.counts
    }
}

/// The descriptor that tells of faults, and where memory is.
fn handed(listener: &UnixListener) -> (OwnedFd, Vec<Piece>) {
    let (peer, _) = listener.accept().unwrap();
    let mut bytes = vec![0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message =
        recvmsg::<UnixAddr>(peer.as_raw_fd(), &mut buffers, Some(&mut space), flags).unwrap();
    let descriptors: Vec<RawFd> = message
        .cmsgs()
        .unwrap()
        .filter_map(|message| match message {
            ControlMessageOwned::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let length = message.bytes;
    assert_eq!(descriptors.len(), 1);
    // SAFETY: the kernel has just put this descriptor into this process; nobody else has it.
    let faults = unsafe { OwnedFd::from_raw_fd(descriptors[0]) };
    let text: Value = serde_json::from_slice(&bytes[..length]).unwrap();
    let number = |piece: &Value, name: &str| piece[name].as_u64().unwrap();
    let pieces = text.as_array().unwrap().iter().map(|piece| {
        assert_eq!(number(piece, "page_size"), PAGE);
        Piece {
            address: number(piece, "base_host_virt_addr"),
            length: number(piece, "size"),
            offset: number(piece, "offset"),
        }
    });
    (faults, pieces.collect())
}

fn bring(faults: &OwnedFd, pieces: &[Piece], memory: &File, counts: &Counts, over: &AtomicBool) {
    let mut file = File::from(faults.try_clone().unwrap());
    let mut removed: Vec<std::ops::Range<u64>> = Vec::new();
    while !over.load(Ordering::Acquire) {
        let mut descriptors = [PollFd::new(faults.as_fd(), PollFlags::POLLIN)];
        poll(&mut descriptors, PollTimeout::from(20u8)).unwrap();
        let mut event = [0; 32];
        // `struct uffd_msg`: the kind in the first byte, and from the eighth on what belongs to it.
        let Ok(32) = file.read(&mut event) else { continue };
        let field = |at: usize| u64::from_ne_bytes(event[at..at + 8].try_into().unwrap());
        match event[0] {
            PAGEFAULT => {
                let address = field(16) & !(PAGE - 1);
                let is_in = |piece: &&Piece| {
                    (piece.address..piece.address + piece.length).contains(&address)
                };
                let piece = pieces.iter().find(is_in).expect("a fault that is in no memory");
                let mut page = [0; PAGE as usize];
                if removed.iter().any(|range| range.contains(&address)) {
                    counts.zeroes.fetch_add(1, Ordering::Relaxed);
                } else {
                    let offset = piece.offset + (address - piece.address);
                    memory.read_exact_at(&mut page, offset).unwrap();
                    counts.brought.fetch_add(1, Ordering::Relaxed);
                }
                let from = page.as_ptr() as u64;
                let mut copy = Copy { to: address, from, length: PAGE, mode: 0, copied: 0 };
                // SAFETY: the descriptor is open; the call reads one page, which is ours and lives,
                // and writes to memory of the other process only.
                match unsafe { uffdio_copy(faults.as_raw_fd(), &raw mut copy) } {
                    // Two processors at one page; a page that is being removed; a process that ended.
                    Ok(_) | Err(nix::Error::EEXIST | nix::Error::EAGAIN | nix::Error::ESRCH) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            REMOVE => {
                removed.push(field(8)..field(16));
                counts.removed.fetch_add((field(16) - field(8)) / PAGE, Ordering::Relaxed);
            }
            kind => panic!("event {kind:#x}"),
        }
    }
}

/// Memory that comes page by page, of which a balloon gives some back.
#[test]
fn pages_come_from_another_process_as_they_are_touched() {
    let script = "$b mount -t tmpfs tmpfs /tmp
        i=0
        while :; do
            i=$((i+1)); echo \"tick $i\"
            $b dd if=/dev/zero of=/tmp/fill bs=64k count=64 2>/dev/null; $b rm /tmp/fill
            $b sleep 0.2
        done\n";
    let files = Files::new(script);
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": false });
    let vmm = files.boot(1, &[("/balloon", balloon)]);
    let from = goes_on(&vmm, "tick ", 0);
    files.save(&vmm, "state", "memory", "Full");
    end(vmm);

    let (socket, memory) = (files.path("pages"), files.path("memory"));
    let load = json!({
        "snapshot_path": files.path("state"),
        "mem_backend": { "backend_type": "Uffd", "backend_path": socket },
        "resume_vm": true,
    });
    // Nobody is there yet.
    let vmm = files.start(1);
    vmm.refused("PUT", "/snapshot/load", &load.to_string(), &socket);
    let handler = Handler::listen(Path::new(&socket), Path::new(&memory));
    vmm.done("PUT", "/snapshot/load", &load);
    goes_on(&vmm, "tick ", from);
    let pages = std::fs::metadata(&memory).unwrap().len() / PAGE;
    let brought = handler.counts.brought.load(Ordering::Relaxed);
    assert!((100..pages * 9 / 10).contains(&brought), "{brought} of {pages}");
    vmm.done("PATCH", "/balloon", &json!({ "amount_mib": 64 }));
    let since = Instant::now();
    while handler.counts.removed.load(Ordering::Relaxed) < 1 << 14 {
        assert!(since.elapsed() < Duration::from_secs(150), "the balloon does not grow");
        std::thread::sleep(Duration::from_millis(20));
    }
    // What comes back is empty.
    vmm.done("PATCH", "/balloon", &json!({ "amount_mib": 0 }));
    let now = super::last(&vmm.process.stdout(), "tick ");
    goes_on(&vmm, "tick ", now);
    end(vmm);
    let counts = handler.end();
    assert!(counts.zeroes.load(Ordering::Relaxed) > 0);
}
