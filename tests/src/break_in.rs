//! A process taken over, as by somebody who has found a way from the guest into its VMM: any system
//! call is made in its name, on its own thread, with its own rights.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// A process whose main thread does what it is told.
pub struct TakenOver {
    pid: Pid,
    memory: File,
    before: user_regs_struct,
}

/// An argument of a system call.
pub enum Argument<'a> {
    /// A number.
    Number(i64),
    /// A pointer to these bytes.
    Bytes(&'a [u8]),
}

/// How a system call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// What it returned.
    Returned(i64),
    /// This error.
    Failed(nix::Error),
    /// The process is no more.
    Killed(Signal),
}

/// Bytes of each pointer's place, on the stack below what is in use.
const PLACE: u64 = 512;

impl TakenOver {
    /// Stops the process once it waits in a system call.
    pub fn new(pid: u32) -> TakenOver {
        let pid = Pid::from_raw(pid as i32);
        let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"));
        let memory = memory.unwrap();
        loop {
            ptrace::attach(pid).unwrap();
            let stopped = waitpid(pid, None).unwrap();
            assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
            let before = ptrace::getregs(pid).unwrap();
            // What it waits in was entered by this instruction.
            let mut instruction = [0; 2];
            memory.read_exact_at(&mut instruction, before.rip - 2).unwrap();
            if instruction == [0x0f, 0x05] {
                return TakenOver { pid, memory, before };
            }
            ptrace::detach(pid, None).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Makes a system call.
    pub fn call(&self, number: i64, arguments: &[Argument]) -> Outcome {
        let mut values = [0; 6];
        for (index, (value, argument)) in (1..).zip(values.iter_mut().zip(arguments)) {
            *value = match argument {
                Argument::Number(number) => *number as u64,
                Argument::Bytes(bytes) => {
                    let place = self.before.rsp - 4096 - index * PLACE;
                    self.memory.write_all_at(bytes, place).unwrap();
                    place
                }
            };
        }
        let [rdi, rsi, rdx, r10, r8, r9] = values;
        let registers = user_regs_struct {
            rip: self.before.rip - 2,
            rax: number as u64,
            // Not the call that it was stopped in: that would be begun again.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.before
        };
        ptrace::setregs(self.pid, registers).unwrap();
        loop {
            ptrace::step(self.pid, None).unwrap();
            match waitpid(self.pid, None).unwrap() {
                WaitStatus::Signaled(_, signal, _) => return Outcome::Killed(signal),
                WaitStatus::Stopped(_, Signal::SIGTRAP) => break,
                WaitStatus::Stopped(..) => {}
                other => panic!("{other:?}"),
            }
        }
        match ptrace::getregs(self.pid).unwrap().rax as i64 {
            error @ -4095..0 => Outcome::Failed(nix::Error::from_raw(-error as i32)),
            value => Outcome::Returned(value),
        }
    }
}
