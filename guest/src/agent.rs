//! The guest's end of the agent protocol.

#![allow(unsafe_code, reason = "takes over a descriptor of accept4")]

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use agent_protocol::{
    AGENT_PORT, Hello, HelloReply, Message, Purpose, READY_PORT, Request, StartFailure, Stream,
    VERSION, read_frame, write_frame,
};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername,
    listen, socket,
};

use crate::error::{Context, SetupError};
use crate::freezer::{self, Frozen};
use crate::process::Process;
use crate::{early, process};

/// Streams that may be open before their process is started.
const MAX_STREAMS: usize = 64;

/// What the connections share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    streams: HashMap<(u32, Stream), File>,
    /// The newest control connection, for messages, and its number.
    control: Option<(u64, File)>,
    controls: u64,
    started: bool,
    main: Option<Arc<Process>>,
    /// Processes that stand still for a snapshot.
    frozen: Option<Frozen>,
    /// The last word on the main process, for a host that comes back for it.
    last: Option<Message>,
}

impl State {
    /// The streams of a process that the host has attached.
    fn take_streams(&mut self, process: u32, wanted: &[Stream]) -> HashMap<Stream, File> {
        let take = |stream: &Stream| Some((*stream, self.streams.remove(&(process, *stream))?));
        wanted.iter().filter_map(take).collect()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message to the host, if one listens.
    fn tell(&self, message: &Message) {
        let mut state = self.lock();
        if let Some((_, control)) = &mut state.control
            && let Err(error) = write_frame(control, message)
        {
            early::log(&format!("message to the host: {error}"));
            state.control = None;
        }
    }

    /// Closes all that is left of connections which were reset: the host is going to use their ports
    /// again. Those that somebody waits for close themselves.
    fn forget_connections(&self) {
        let mut state = self.lock();
        state.streams.clear();
        state.control = None;
        let main = state.main.clone();
        drop(state);
        if let Some(main) = main {
            main.disconnect();
        }
    }

    /// Leaves the last message, and waits until the host has hung up: it does so when it has read
    /// all output. Without a host the machine ends a second later.
    fn finish(&self, message: Message) -> ! {
        self.tell(&message);
        let mut state = self.lock();
        state.last = Some(message);
        loop {
            let host = state.control.is_some();
            let waited = if host {
                (self.changed.wait(state).unwrap_or_else(PoisonError::into_inner), false)
            } else {
                let (state, timeout) = self
                    .changed
                    .wait_timeout(state, Duration::from_secs(1))
                    .unwrap_or_else(PoisonError::into_inner);
                (state, timeout.timed_out())
            };
            state = waited.0;
            // A host that was there and has gone has heard it.
            if waited.1 || (host && state.control.is_none()) {
                crate::power_off();
            }
        }
    }
}

/// Listens, tells the host so, and answers until the machine ends.
pub fn serve() -> Result<(), SetupError> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)
        .context(|| "vsock".to_owned())?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_PORT))
        .context(|| "vsock: bind".to_owned())?;
    listen(&listener, Backlog::MAXCONN).context(|| "vsock: listen".to_owned())?;
    let notice = announce()?;
    let shared = Arc::new(Shared::default());
    let told = shared.clone();
    thread::Builder::new()
        .stack_size(256 << 10)
        .spawn(move || stay_announced(&told, notice))
        .context(|| "vsock".to_owned())?;
    loop {
        let connection = match accept4(listener.as_raw_fd(), flags) {
            // SAFETY: accept4 has just returned this descriptor, and nobody else knows it.
            Ok(descriptor) => unsafe {
                <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(descriptor)
            },
            Err(nix::Error::EINTR | nix::Error::ECONNABORTED) => continue,
            Err(error) => return Err(error).context(|| "vsock: accept".to_owned()),
        };
        // Where the kernel has vsock's loopback, any process of the guest could ask for what only
        // the host may.
        let peer = getpeername::<VsockAddr>(connection.as_raw_fd()).map(|address| address.cid());
        if peer != Ok(libc::VMADDR_CID_HOST) {
            early::log(&format!("refused a connection of {peer:?}, who is not the host"));
            continue;
        }
        let shared = shared.clone();
        let spawned = thread::Builder::new().stack_size(256 << 10).spawn(move || {
            greet(&shared, File::from(connection));
        });
        if let Err(error) = spawned {
            early::log(&format!("no thread for a connection: {error}"));
        }
    }
}

/// Tells the host anew that we listen when the notice is lost: this machine was restored, and all
/// connections were reset. The host must not call before, for its calls would be lost too.
fn stay_announced(shared: &Shared, mut notice: Option<File>) {
    while let Some(mut connection) = notice.take() {
        match connection.read(&mut [0]) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                drop(connection);
                shared.forget_connections();
                notice = announce().unwrap_or_else(|error| {
                    early::log(&format!("{error}"));
                    None
                });
            }
            Err(_) => notice = Some(connection),
            // The host has hung up, as it may.
            Ok(_) => {}
        }
    }
}

/// Calls the host's port, so that it knows that we listen; none where nobody is there. The transport
/// may still be on its way.
fn announce() -> Result<Option<File>, SetupError> {
    for _ in 0..1000 {
        let probe = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .context(|| "vsock".to_owned())?;
        match connect(probe.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, READY_PORT)) {
            Err(nix::Error::ENODEV | nix::Error::ENETUNREACH | nix::Error::EADDRNOTAVAIL) => {
                thread::sleep(Duration::from_millis(2));
            }
            Ok(()) => return Ok(Some(File::from(probe))),
            // Nobody there is fine: the host may call all the same.
            Err(_) => return Ok(None),
        }
    }
    Err(SetupError::setup("vsock: there is no vsock device"))
}

fn greet(shared: &Arc<Shared>, mut connection: File) {
    let Ok(Some(hello)) = read_frame::<Hello>(&mut connection) else { return };
    if hello.version != VERSION {
        let _ = write_frame(&mut connection, &HelloReply::WrongVersion(VERSION));
        return;
    }
    match hello.purpose {
        Purpose::Control => control(shared, connection),
        Purpose::Snapshot => hold_still(shared, connection),
        Purpose::Stream { process, stream } => {
            let mut state = shared.lock();
            let refusal = if state.streams.contains_key(&(process, stream)) {
                Some("the stream is attached already")
            } else if state.streams.len() >= MAX_STREAMS {
                Some("too many streams")
            } else {
                None
            };
            let reply = match refusal {
                Some(reason) => HelloReply::Refused(reason.to_owned()),
                None => HelloReply::Accepted,
            };
            if write_frame(&mut connection, &reply).is_ok() && refusal.is_none() {
                state.streams.insert((process, stream), connection);
            }
        }
    }
}

/// Has all processes stand still while the host takes a snapshot. In a machine restored from it the
/// connection is not hung up but reset: there they wait for the machine's identity.
fn hold_still(shared: &Arc<Shared>, mut connection: File) {
    let frozen = {
        let mut state = shared.lock();
        match (&state.frozen, &state.main) {
            (Some(_), _) => Err("a snapshot is being taken already".to_owned()),
            (None, None) => Err("its process does not run yet".to_owned()),
            (None, Some(_)) => freezer::freeze()
                .map(|frozen| state.frozen = Some(frozen))
                .map_err(|error| format!("its processes do not stand still: {error}")),
        }
    };
    if let Err(reason) = frozen {
        let _ = write_frame(&mut connection, &HelloReply::Refused(reason));
        return;
    }
    // What only the guest's memory has would not be in a copy of the disk.
    nix::unistd::sync();
    let told = write_frame(&mut connection, &HelloReply::Accepted);
    if told.is_err() || connection.read(&mut [0]).is_ok() {
        shared.lock().frozen = None;
    }
}

fn control(shared: &Arc<Shared>, mut connection: File) {
    let Ok(writer) = connection.try_clone() else { return };
    let number = {
        let mut state = shared.lock();
        if write_frame(&mut connection, &HelloReply::Accepted).is_err() {
            return;
        }
        state.controls += 1;
        let number = state.controls;
        if let Some((_, older)) = state.control.replace((number, writer)) {
            let _ = nix::sys::socket::shutdown(older.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
        if let Some(last) = state.last.clone()
            && let Some((_, control)) = &mut state.control
        {
            let _ = write_frame(control, &last);
        }
        number
    };
    while let Ok(Some(request)) = read_frame::<Request>(&mut connection) {
        handle(shared, request);
    }
    // Whatever is left unread must not keep the host's end open.
    let _ = connection.take(0);
    let mut state = shared.lock();
    if state.control.as_ref().is_some_and(|(current, _)| *current == number) {
        state.control = None;
        shared.changed.notify_all();
    }
}

fn handle(shared: &Arc<Shared>, request: Request) {
    match request {
        Request::Start(start) => {
            let streams = {
                let mut state = shared.lock();
                if std::mem::replace(&mut state.started, true) {
                    drop(state);
                    let message = "the machine runs already".to_owned();
                    shared.tell(&Message::StartFailed { kind: StartFailure::Setup, message });
                    return;
                }
                state.take_streams(start.process.id, &start.process.streams)
            };
            let id = start.process.id;
            // In a thread of its own: signals must reach the process meanwhile.
            let starting = shared.clone();
            let run = move || match process::start_machine(&start, streams) {
                Ok(process) => {
                    let process = Arc::new(process);
                    starting.lock().main = Some(process.clone());
                    starting.tell(&Message::Started { process: id });
                    let end = process.wait();
                    nix::unistd::sync();
                    let (status, out_of_memory) = (end.status, end.out_of_memory);
                    starting.finish(Message::Exited { process: id, status, out_of_memory });
                }
                Err(error) => {
                    let SetupError { kind, message } = error;
                    starting.finish(Message::StartFailed { kind, message });
                }
            };
            if let Err(error) = thread::Builder::new().spawn(run) {
                let message = format!("no thread to start the process: {error}");
                shared.finish(Message::StartFailed { kind: StartFailure::Setup, message });
            }
        }
        Request::Identity(identity) => {
            let mut state = shared.lock();
            let main = state.main.clone();
            let id = main.as_ref().map(|main| main.id());
            let streams = state.take_streams(id.unwrap_or_default(), &identity.streams);
            drop(state);
            match process::identify(&identity, main.as_deref(), streams) {
                Ok(()) => {
                    shared.tell(&Message::Identified { process: id });
                    shared.lock().frozen = None;
                }
                Err(SetupError { kind, message }) => {
                    shared.tell(&Message::StartFailed { kind, message });
                }
            }
        }
        Request::Signal { process, signal, group } => {
            let main = shared.lock().main.clone();
            if let Some(main) = main.filter(|main| main.id() == process) {
                main.signal(signal, group);
            }
        }
        Request::Resize { process, size } => {
            let main = shared.lock().main.clone();
            if let Some(main) = main.filter(|main| main.id() == process) {
                main.resize(size);
            }
        }
        Request::PowerOff => {
            let main = shared.lock().main.clone();
            match main {
                // Its end is the machine's.
                Some(main) => main.signal(libc::SIGKILL, false),
                None => crate::power_off(),
            }
        }
    }
}

// None of these may send a valid `Start` to an agent that has not started, nor a `PowerOff`: it
// would be this machine's.
#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    use agent_protocol::{MAX_FRAME, Process as Description, Root, Start, Writable};

    use super::*;

    /// The host's end of a connection, and the agent's thread.
    fn open(shared: &Arc<Shared>) -> (UnixStream, JoinHandle<()>) {
        let (host, guest) = UnixStream::pair().unwrap();
        let shared = shared.clone();
        let agent = thread::spawn(move || greet(&shared, File::from(OwnedFd::from(guest))));
        (host, agent)
    }

    fn hello(
        shared: &Arc<Shared>,
        version: u32,
        purpose: Purpose,
    ) -> (UnixStream, JoinHandle<()>, HelloReply) {
        let (mut host, agent) = open(shared);
        write_frame(&mut host, &Hello { version, purpose }).unwrap();
        let reply = read_frame(&mut host).unwrap().unwrap();
        (host, agent, reply)
    }

    fn start() -> Request {
        Request::Start(Box::new(Start {
            root: Root { device: String::new(), writable: Writable::No },
            mounts: vec![],
            hostname: String::new(),
            network: None,
            time_ns: 0,
            entropy: vec![],
            machine_id: String::new(),
            process: Description {
                id: 0,
                argv: vec![],
                env: vec![],
                cwd: "/".to_owned(),
                user: String::new(),
                groups: vec![],
                terminal: None,
                streams: vec![],
                rlimits: vec![],
            },
        }))
    }

    #[test]
    fn another_version_is_told_ours() {
        let shared = Arc::default();
        let (mut host, agent, reply) = hello(&shared, VERSION + 1, Purpose::Control);
        assert_eq!(reply, HelloReply::WrongVersion(VERSION));
        agent.join().unwrap();
        assert!(read_frame::<Message>(&mut host).unwrap().is_none());
        assert!(shared.lock().control.is_none());
    }

    #[test]
    fn a_stream_is_attached_once_and_their_number_is_bounded() {
        let shared = Arc::default();
        let purpose = |process| Purpose::Stream { process, stream: Stream::Stdin };
        let mut held = Vec::new();
        for process in 0..MAX_STREAMS as u32 {
            let (host, agent, reply) = hello(&shared, VERSION, purpose(process));
            assert_eq!(reply, HelloReply::Accepted);
            agent.join().unwrap();
            held.push(host);
        }
        for (process, reason) in [(0, "attached already"), (1000, "too many")] {
            let (_, agent, reply) = hello(&shared, VERSION, purpose(process));
            agent.join().unwrap();
            assert!(
                matches!(&reply, HelloReply::Refused(why) if why.contains(reason)),
                "{reply:?}"
            );
        }
        assert_eq!(shared.lock().streams.len(), MAX_STREAMS);
    }

    #[test]
    fn the_newest_control_connection_wins_and_hears_the_last_word() {
        let shared: Arc<Shared> = Arc::default();
        let (mut older, first, _) = hello(&shared, VERSION, Purpose::Control);
        shared.tell(&Message::Started { process: 1 });
        assert_eq!(read_frame(&mut older).unwrap(), Some(Message::Started { process: 1 }));
        let last = Message::Exited { process: 1, status: 3, out_of_memory: false };
        shared.lock().last = Some(last.clone());
        let (mut newer, second, _) = hello(&shared, VERSION, Purpose::Control);
        first.join().unwrap();
        assert_eq!(read_frame::<Message>(&mut older).unwrap(), None);
        assert_eq!(read_frame(&mut newer).unwrap(), Some(last));
        assert!(shared.lock().control.is_some(), "the older one's end is not the newer one's");
        drop(newer);
        second.join().unwrap();
        assert!(shared.lock().control.is_none());
    }

    #[test]
    fn a_machine_starts_once_and_strangers_get_no_signal() {
        let shared: Arc<Shared> = Arc::default();
        shared.lock().started = true;
        let (mut host, agent, _) = hello(&shared, VERSION, Purpose::Control);
        write_frame(&mut host, &Request::Signal { process: 9, signal: 9, group: true }).unwrap();
        write_frame(&mut host, &start()).unwrap();
        let reply = read_frame(&mut host).unwrap();
        assert!(matches!(reply, Some(Message::StartFailed { kind: StartFailure::Setup, .. })));
        drop(host);
        agent.join().unwrap();
    }

    #[test]
    fn a_machine_without_a_process_does_not_stand_still_for_a_snapshot() {
        let shared: Arc<Shared> = Arc::default();
        let (_, agent, reply) = hello(&shared, VERSION, Purpose::Snapshot);
        agent.join().unwrap();
        assert!(matches!(&reply, HelloReply::Refused(why) if why.contains("yet")), "{reply:?}");
    }

    /// docs/hostile.md 15, from the other side: what is no frame ends its connection and nothing else.
    #[test]
    fn hostile_15_broken_frames_end_their_connection_only() {
        let shared: Arc<Shared> = Arc::default();
        let giant = (MAX_FRAME + 1).to_le_bytes();
        // No request has the number 255.
        let unknown = [1, 0, 0, 0, 255];
        let broken: [&[u8]; 4] = [&giant, &unknown, &[0, 0, 0, 0], &[9, 0, 0, 0, 1]];
        for bytes in broken {
            let (mut host, agent) = open(&shared);
            host.write_all(bytes).unwrap();
            host.shutdown(std::net::Shutdown::Write).unwrap();
            agent.join().unwrap();
            let (mut host, agent, _) = hello(&shared, VERSION, Purpose::Control);
            host.write_all(bytes).unwrap();
            host.shutdown(std::net::Shutdown::Write).unwrap();
            agent.join().unwrap();
            assert!(shared.lock().control.is_none());
        }
        assert_eq!(hello(&shared, VERSION, Purpose::Control).2, HelloReply::Accepted);
    }
}
