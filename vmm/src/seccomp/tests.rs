#![allow(unsafe_code, reason = "forks, and makes system calls that are forbidden")]
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use serde_json::{Value, json};

use super::*;

const POLICY: &[u8] = include_bytes!("../../../resources/seccomp/x86_64.json");

/// How a process ends that makes this system call under the filters, and ends with 0 where the call
/// is allowed, and the low byte of the error's number otherwise.
fn end(threads: &[Thread], number: libc::c_long, arguments: [libc::c_long; 5]) -> WaitStatus {
    let seccomp = Seccomp::built_in();
    // SAFETY: the child makes system calls alone, with what was made before the fork.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        ForkResult::Child => {
            let installed = threads.iter().all(|thread| seccomp.install(*thread).is_ok());
            let [a, b, c, d, e] = arguments;
            let status = if installed {
                // SAFETY: the tests' calls touch no memory of this process, or fail.
                let result = unsafe { libc::syscall(number, a, b, c, d, e) };
                let error = io::Error::last_os_error().raw_os_error().unwrap_or_default();
                if result < 0 { error } else { 0 }
            } else {
                255
            };
            // SAFETY: the call has no preconditions.
            unsafe { libc::_exit(status) }
        }
    }
}

fn is_killed(threads: &[Thread], number: libc::c_long, arguments: [libc::c_long; 5]) -> bool {
    match end(threads, number, arguments) {
        WaitStatus::Signaled(_, Signal::SIGSYS, _) => true,
        WaitStatus::Exited(_, status) if status != 255 => false,
        other => panic!("{other:?}"),
    }
}

const ALL: [Thread; 4] = [Thread::Start, Thread::EventLoop, Thread::Vcpu, Thread::Api];

#[test]
fn a_processor_opens_no_file() {
    let path = c"/".as_ptr() as libc::c_long;
    let open = [libc::AT_FDCWD.into(), path, libc::O_RDONLY.into(), 0, 0];
    assert!(is_killed(&[Thread::Vcpu], libc::SYS_openat, open));
    assert!(is_killed(&[Thread::Api], libc::SYS_openat, open));
    assert!(!is_killed(&[Thread::Start, Thread::EventLoop], libc::SYS_openat, open));
    // What it is for goes on: the descriptor is none of KVM's.
    assert!(!is_killed(&[Thread::Start, Thread::Vcpu], libc::SYS_ioctl, [-1, 0xae80, 0, 0, 0]));
}

#[test]
fn nobody_runs_a_program_or_code_or_reaches_a_network() {
    let exec = libc::PROT_READ | libc::PROT_EXEC;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let map = |protection: i32| [0, 4096, protection.into(), anonymous.into(), -1];
    let none = [0; 5];
    for thread in ALL {
        for number in [libc::SYS_execve, libc::SYS_fork, libc::SYS_ptrace, libc::SYS_bpf] {
            assert!(is_killed(&[thread], number, none), "{thread:?}: {number}");
        }
        assert!(is_killed(&[thread], libc::SYS_mmap, map(exec)), "{thread:?}");
        assert!(!is_killed(&[thread], libc::SYS_mmap, map(libc::PROT_READ)), "{thread:?}");
        assert!(is_killed(&[thread], libc::SYS_mprotect, [0, 4096, exec.into(), 0, 0]));
        for family in [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET] {
            let socket = [family.into(), libc::SOCK_RAW.into(), 0, 0, 0];
            assert!(is_killed(&[thread], libc::SYS_socket, socket), "{thread:?}: {family}");
        }
        // What is typed into a terminal that it shares with whoever started it.
        let push = [0, libc::TIOCSTI as libc::c_long, 0, 0, 0];
        assert!(is_killed(&[thread], libc::SYS_ioctl, push), "{thread:?}");
    }
}

#[test]
fn the_main_thread_makes_threads_until_there_is_a_machine() {
    let (before, after) = ([Thread::Start], [Thread::Start, Thread::EventLoop]);
    let process = [libc::SIGCHLD.into(), 0, 0, 0, 0];
    assert!(is_killed(&before, libc::SYS_clone, process));
    // Not killed, so that the C library knows what to do instead.
    let refused = end(&before, libc::SYS_clone3, [0; 5]);
    assert!(matches!(refused, WaitStatus::Exited(_, libc::ENOSYS)), "{refused:?}");
    assert!(is_killed(&after, libc::SYS_clone3, [0; 5]));
    // KVM_CREATE_VM
    assert!(!is_killed(&before, libc::SYS_ioctl, [-1, 0xae01, 0, 0, 0]));
    assert!(is_killed(&after, libc::SYS_ioctl, [-1, 0xae01, 0, 0, 0]));
}

#[test]
fn a_policy_is_taken_whole_or_not_at_all() {
    Seccomp::from_policy(POLICY).unwrap_or_else(|error| panic!("{error}"));
    let policy: Value = serde_json::from_slice(POLICY).unwrap();
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut policy = policy.clone();
        change(&mut policy);
        let text = serde_json::to_vec(&policy).unwrap();
        Seccomp::from_policy(&text).err().unwrap_or_else(|| panic!("taken: {policy}")).to_string()
    };
    let add = |policy: &mut Value, entry: Value| {
        policy["api"]["filter"].as_array_mut().unwrap().push(entry);
    };
    let argument = json!([{ "index": 0, "type": "dword", "op": "eq", "val": 1 }]);
    for entry in [
        json!({ "syscall": "read" }),
        json!({ "syscall": "read", "args": argument }),
        json!({ "syscall": "fcntl" }),
    ] {
        let twice = refused(&|policy| add(policy, entry.clone()));
        assert!(twice.contains("twice"), "{twice}");
    }
    let unknown = refused(&|policy| add(policy, json!({ "syscall": "no_such_call" })));
    assert!(unknown.contains("no_such_call"), "{unknown}");
    let names = |policy: &mut Value| drop(policy.as_object_mut().unwrap().remove("vcpu"));
    assert!(refused(&names).contains("vcpu"));
    let more = |policy: &mut Value| policy["more"] = policy["api"].clone();
    assert!(refused(&more).contains("no others"));
    assert!(refused(&|policy| policy["api"]["filter"] = json!(1)).contains("api"));
    assert!(Seccomp::from_policy(b"{").is_err());
}
