//! Requests carried out by io_uring: the kernel has many of a drive at once, and the event loop goes
//! on meanwhile.
//!
//! Each request is one job, and each job has one operation in the kernel at a time: what a short
//! read or write left, and the next of several ranges, follow when it completes.

#![allow(unsafe_code, reason = "the kernel uses guest memory while requests are in flight")]

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vmm_sys_util::eventfd::EventFd;

use super::QUEUE_SIZE;
use super::disk::{Action, Disk, Step, unsupported};
use super::request::Operation;
use crate::GuestMemory;
use crate::virtio::queue::Chain;

/// The drive's file among the registered ones.
const FILE: Fixed = Fixed(0);
/// `IORING_REGISTER_FILES_UPDATE` (linux/io_uring.h), which the crate does not export.
const REGISTER_FILES_UPDATE: u8 = 6;

/// A request that is over.
pub struct Finished {
    /// Where it came from.
    pub chain: Chain,
    /// What it was.
    pub request: Operation,
    /// Why it failed, where it did.
    pub error: Option<io::Error>,
}

/// An io_uring with one file, and what it is at.
pub struct Uring {
    ring: IoUring,
    completed: EventFd,
    /// By the number that the kernel has of them.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// What the kernel reads and writes. Only replaced while nothing is in flight.
    memory: Option<GuestMemory>,
}

struct Job {
    chain: Chain,
    request: Operation,
    /// Steps begun.
    begun: usize,
    /// What is left of the last of them.
    step: Option<Step>,
    pieces: Pieces,
}

#[derive(Default)]
struct Pieces(Vec<libc::iovec>);

// SAFETY: these are addresses for the kernel, which nobody here follows; what is there (guest memory,
// and zeroes that never change) is no thread's own.
unsafe impl Send for Pieces {}

impl Uring {
    /// A ring for this disk's file that can do what such a disk needs, and nothing else.
    pub fn new(disk: &Disk) -> io::Result<Uring> {
        Uring::restricted(disk).map_err(|error| unavailable(&error))
    }

    fn restricted(disk: &Disk) -> io::Result<Uring> {
        use io_uring::register::Restriction;
        let entries = usize::from(QUEUE_SIZE);
        let ring = IoUring::builder().setup_r_disabled().build(entries as u32)?;
        let completed = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let fixed = Flags::FIXED_FILE.bits();
        let mut allowed = vec![
            Restriction::register_op(REGISTER_FILES_UPDATE),
            Restriction::sqe_flags_required(fixed),
            Restriction::sqe_flags_allowed(fixed),
            Restriction::sqe_op(opcode::Readv::CODE),
        ];
        if !disk.read_only() {
            let codes = [opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
            allowed.extend(codes.map(Restriction::sqe_op));
        }
        let submitter = ring.submitter();
        submitter.register_files(&[disk.file().as_raw_fd()])?;
        submitter.register_eventfd(completed.as_raw_fd())?;
        submitter.register_restrictions(&mut allowed)?;
        submitter.register_enable_rings()?;
        let jobs = (0..entries).map(|_| None).collect();
        Ok(Uring { ring, completed, jobs, free: (0..entries).collect(), memory: None })
    }

    /// Written by the kernel when something has completed.
    pub fn completed(&self) -> &EventFd {
        &self.completed
    }

    /// Takes requests from now on, whose buffers are in this memory.
    pub fn begin(&mut self, memory: &GuestMemory) {
        self.stop();
        self.memory = Some(memory.clone());
    }

    /// Waits until the kernel has nothing left to do, and lets go of memory. Requests are not gone
    /// on with, and nobody hears of them.
    pub fn stop(&mut self) {
        while self.wait() {
            while self.reap().is_some() {}
        }
        self.memory = None;
    }

    /// Works on this disk's file from now on. Nothing may be in flight.
    pub fn replace_file(&mut self, disk: &Disk) -> io::Result<()> {
        self.ring.submitter().register_files_update(FILE.0, &[disk.file().as_raw_fd()]).map(drop)
    }

    /// Requests that are not over.
    pub fn in_flight(&self) -> usize {
        self.jobs.len() - self.free.len()
    }

    /// Whether no request can be started until one is over.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Begins a request, which the kernel is told of by [`Uring::submit`]. Gives it back where it is
    /// over at once.
    pub fn start(&mut self, disk: &Disk, chain: Chain, request: Operation) -> Option<Finished> {
        let pieces = Pieces::default();
        self.go_on(Job { chain, request, begun: 0, step: None, pieces }, disk)
    }

    /// The next request that is over.
    pub fn finished(&mut self, disk: &Disk) -> Option<Finished> {
        while let Some((job, result)) = self.reap() {
            let finished = match result {
                Ok(()) => self.go_on(job, disk),
                Err(error) => Some(job.over(Some(error))),
            };
            if finished.is_some() {
                return finished;
            }
        }
        None
    }

    /// Tells the kernel of what was begun. Where it cannot take it now, it is asked again in the
    /// next round of the event loop.
    pub fn submit(&mut self) {
        // It stops at an operation that it refuses, which completes with an error.
        while !self.ring.submission().is_empty() {
            if let Err(error) = self.ring.submit() {
                guest_warning!(%error, "io_uring does not take requests now");
                let _ = self.completed.write(1);
                return;
            }
        }
    }

    /// Waits until something has completed; false where nothing is in flight.
    pub fn wait(&mut self) -> bool {
        if self.in_flight() == 0 {
            return false;
        }
        if let Err(error) = self.ring.submit_and_wait(1)
            && error.kind() != io::ErrorKind::Interrupted
        {
            // Memory is short. There is no giving up: the kernel has addresses of ours.
            guest_warning!(%error, "cannot wait for io_uring");
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// The next job of which an operation has completed, and what became of that.
    fn reap(&mut self) -> Option<(Job, io::Result<()>)> {
        loop {
            let completion = self.ring.completion().next()?;
            let index = completion.user_data() as usize;
            let Some(mut job) = self.jobs.get_mut(index).and_then(Option::take) else { continue };
            self.free.push(index);
            let result = match &self.memory {
                Some(memory) => job.account(memory, completion.result()),
                None => Ok(()),
            };
            return Some((job, result));
        }
    }

    /// Begins what a job has left to do.
    fn go_on(&mut self, mut job: Job, disk: &Disk) -> Option<Finished> {
        let entry = match &self.memory {
            Some(memory) => job.operation(disk, memory),
            None => Err(busy()),
        };
        let entry = match entry {
            Ok(Some(entry)) => entry,
            Ok(None) => return Some(job.over(None)),
            Err(error) => return Some(job.over(Some(error))),
        };
        let free = self.free.pop().and_then(|index| Some((index, self.jobs.get_mut(index)?)));
        let Some((index, place)) = free else { return Some(job.over(Some(busy()))) };
        // SAFETY: the entry refers to the registered file, and to the job's pieces, which name guest
        // memory that vm-memory has checked, or zeroes that are static. All of that stays until the
        // operation has completed: the job is in the table until `reap` has seen the completion (the
        // pieces are on the heap and are not touched there), and memory is let go of by `stop` only,
        // which waits for every job, as `drop` does. The guest may change its memory meanwhile; the
        // kernel only copies bytes, and no Rust reference to it exists.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(index as u64)) };
        if pushed.is_err() {
            // Never: it has an entry for each job.
            self.free.push(index);
            return Some(job.over(Some(busy())));
        }
        *place = Some(job);
        None
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Job {
    /// The next thing for the kernel to do; none where the request is complete.
    fn operation(&mut self, disk: &Disk, memory: &GuestMemory) -> io::Result<Option<Entry>> {
        if self.step.is_none() {
            self.step = disk.step(&self.request, self.begun)?;
            self.begun += 1;
        }
        let Some(step) = &self.step else { return Ok(None) };
        let Step { action, offset, length, .. } = *step;
        if let Action::Read | Action::Write | Action::Fill = action {
            step.pieces(memory, &self.chain, &mut self.pieces.0)?;
        }
        let (pieces, count) = (self.pieces.0.as_ptr(), self.pieces.0.len() as u32);
        Ok(Some(match action {
            Action::Read => opcode::Readv::new(FILE, pieces, count).offset(offset).build(),
            Action::Write | Action::Fill => {
                opcode::Writev::new(FILE, pieces, count).offset(offset).build()
            }
            Action::Sync => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
            Action::Discard | Action::Unmap | Action::Zero => {
                let mode = action.mode().bits();
                opcode::Fallocate::new(FILE, length).offset(offset).mode(mode).build()
            }
        }))
    }

    /// Notes what became of the operation: a number of bytes, zero, or an error's negative.
    fn account(&mut self, memory: &GuestMemory, result: i32) -> io::Result<()> {
        let Some(step) = &mut self.step else { return Ok(()) };
        match (step.action, usize::try_from(result)) {
            (Action::Read | Action::Write | Action::Fill, Ok(done)) => {
                step.advance(done, memory, &self.chain)?;
                if step.length == 0 {
                    self.step = None;
                }
            }
            (_, Ok(_)) => self.step = None,
            (action, Err(_)) => {
                let error = io::Error::from_raw_os_error(result.wrapping_neg());
                match action {
                    _ if error.kind() == io::ErrorKind::Interrupted => {}
                    Action::Discard | Action::Unmap | Action::Zero if unsupported(&error) => {
                        self.step = action.instead().map(|action| Step { action, ..*step });
                    }
                    _ => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn over(self, error: Option<io::Error>) -> Finished {
        Finished { chain: self.chain, request: self.request, error }
    }
}

/// Of what its caller has seen to be there.
fn busy() -> io::Error {
    io::Error::from(io::ErrorKind::ResourceBusy)
}

fn unavailable(error: &io::Error) -> io::Error {
    let hint = match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL) => "it takes Linux 5.10 or later, built with io_uring",
        Some(libc::EPERM | libc::EACCES) => {
            "it is forbidden by the sysctl kernel.io_uring_disabled, or by a seccomp filter"
        }
        Some(libc::ENOMEM) => "memory is short, or the limit on locked memory is low",
        _ => return io::Error::other(format!("no io_uring for asynchronous requests: {error}")),
    };
    io::Error::other(format!("no io_uring for asynchronous requests: {error}: {hint}"))
}

#[cfg(test)]
mod tests {
    use io_uring::types::Fd;
    use vm_memory::GuestAddress;

    use super::super::request::SectorRange;
    use super::super::tests::has_uring;
    use super::*;

    const SECTORS: u64 = 16384;

    fn disk(read_only: bool) -> (Disk, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; SECTORS as usize * 512]).unwrap();
        (Disk::open(file.path(), read_only).unwrap(), file)
    }

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn job(request: Operation) -> Job {
        let (chain, pieces) = (Chain::default(), Pieces::default());
        Job { chain, request, begun: 0, step: None, pieces }
    }

    fn zeroes(unmap: bool) -> Vec<SectorRange> {
        let range = |sector, count| SectorRange { sector, count, unmap };
        vec![range(1, SECTORS as u32 - 2), range(0, 0), range(0, 1)]
    }

    fn run(uring: &mut Uring, disk: &Disk) -> Finished {
        loop {
            if let Some(finished) = uring.finished(disk) {
                return finished;
            }
            assert!(uring.wait());
        }
    }

    #[test]
    fn the_ring_does_what_a_drive_needs_and_nothing_else() {
        if !has_uring() {
            return;
        }
        for read_only in [false, true] {
            let (disk, file) = disk(read_only);
            let mut uring = Uring::new(&disk).unwrap();
            let mut result = |entry: Entry| {
                // SAFETY: an entry of this test has no pieces, so that it refers to no memory.
                unsafe { uring.ring.submission().push(&entry) }.unwrap();
                uring.ring.submit_and_wait(1).unwrap();
                uring.ring.completion().next().unwrap().result()
            };
            let none = std::ptr::null();
            assert_eq!(result(opcode::Readv::new(FILE, none, 0).build()), 0);
            let written = result(opcode::Writev::new(FILE, none, 0).build());
            let synced = result(opcode::Fsync::new(FILE).build());
            let refused = if read_only { -libc::EACCES } else { 0 };
            assert_eq!((written, synced), (refused, refused));
            for entry in [
                opcode::Nop::new().build(),
                opcode::Readv::new(Fd(file.as_file().as_raw_fd()), none, 0).build(),
                opcode::Readv::new(FILE, none, 0).build().flags(Flags::ASYNC),
                opcode::Close::new(Fd(file.as_file().as_raw_fd())).build(),
            ] {
                assert_eq!(result(entry), -libc::EACCES);
            }
            let event = uring.completed.as_raw_fd();
            let error = uring.ring.submitter().register_eventfd(event).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        }
    }

    #[test]
    fn zeroes_are_written_where_the_file_system_makes_none() {
        if !has_uring() {
            return;
        }
        let (disk, file) = disk(false);
        let memory = memory();
        let mut uring = Uring::new(&disk).unwrap();
        uring.begin(&memory);
        let mut job = job(Operation::WriteZeroes(zeroes(true)));
        job.operation(&disk, &memory).unwrap().unwrap();
        job.account(&memory, -libc::EOPNOTSUPP).unwrap();
        assert_eq!(job.step.unwrap().action, Action::Fill);
        // The other range is for fallocate again.
        assert!(uring.go_on(job, &disk).is_none());
        assert!(run(&mut uring, &disk).error.is_none());
        let bytes = std::fs::read(file.path()).unwrap();
        let last = (SECTORS as usize - 1) * 512;
        assert!(bytes[..last].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[last..], [7; 512]);
    }

    #[test]
    fn a_discard_that_cannot_be_is_no_error_and_one_that_fails_is() {
        let (disk, _file) = disk(false);
        let memory = memory();
        for (error, good) in [(libc::EOPNOTSUPP, true), (libc::EIO, false)] {
            let mut job = job(Operation::Discard(zeroes(true)));
            for _ in 0..2 {
                job.operation(&disk, &memory).unwrap().unwrap();
                assert_eq!(job.account(&memory, -error).is_ok(), good);
            }
            assert_eq!(job.operation(&disk, &memory).unwrap().is_none(), good);
        }
    }

    #[test]
    fn an_operation_that_was_interrupted_or_short_is_gone_on_with() {
        let (disk, _file) = disk(false);
        let memory = memory();
        let mut job = job(Operation::WriteZeroes(zeroes(false)));
        job.operation(&disk, &memory).unwrap().unwrap();
        job.account(&memory, -libc::EINTR).unwrap();
        assert_eq!(job.step.unwrap().action, Action::Zero);
        job.account(&memory, -libc::ENODEV).unwrap();
        let length = (SECTORS - 2) * 512;
        for (done, left) in [(1000, length - 1000), (1 << 20, length - 1000 - (1 << 20))] {
            job.operation(&disk, &memory).unwrap().unwrap();
            job.account(&memory, done).unwrap();
            let step = job.step.unwrap();
            assert_eq!((step.offset, step.length), (512 + length - left, left));
            job.operation(&disk, &memory).unwrap().unwrap();
            let pieces: u64 = job.pieces.0.iter().map(|piece| piece.iov_len as u64).sum();
            assert_eq!(pieces, left);
            job.account(&memory, -libc::EINTR).unwrap();
        }
        // Nothing at all is the end of the file.
        let error = job.account(&memory, 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_host_without_io_uring_is_told_what_is_missing() {
        let message = |code| unavailable(&io::Error::from_raw_os_error(code)).to_string();
        assert!(message(libc::EPERM).contains("kernel.io_uring_disabled"));
        assert!(message(libc::ENOSYS).contains("Linux 5.10"));
        assert!(message(libc::EMFILE).contains("open files"));
    }
}
