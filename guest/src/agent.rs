//! The guest's end of the agent protocol.

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
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, listen, socket,
};

use crate::error::{Context, SetupError};
use crate::process::Process;
use crate::{early, mounts, process};

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
    /// The last word on the main process, for a host that comes back for it.
    last: Option<Message>,
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
    announce()?;
    let shared = Arc::new(Shared::default());
    loop {
        let connection = match accept4(listener.as_raw_fd(), flags) {
            // SAFETY: accept4 has just returned this descriptor, and nobody else knows it.
            Ok(descriptor) => unsafe {
                <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(descriptor)
            },
            Err(nix::Error::EINTR | nix::Error::ECONNABORTED) => continue,
            Err(error) => return Err(error).context(|| "vsock: accept".to_owned()),
        };
        let shared = shared.clone();
        let spawned = thread::Builder::new().stack_size(256 << 10).spawn(move || {
            greet(&shared, File::from(connection));
        });
        if let Err(error) = spawned {
            early::log(&format!("no thread for a connection: {error}"));
        }
    }
}

/// Touches the host's port, so that it knows that we listen. The transport may still be on its way.
fn announce() -> Result<(), SetupError> {
    for _ in 0..1000 {
        let probe = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .context(|| "vsock".to_owned())?;
        match connect(probe.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, READY_PORT)) {
            Err(nix::Error::ENODEV | nix::Error::ENETUNREACH | nix::Error::EADDRNOTAVAIL) => {
                thread::sleep(Duration::from_millis(2));
            }
            // Nobody there is fine: the host may call all the same.
            _ => return Ok(()),
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
                let id = start.process.id;
                let wanted = start.process.streams.iter();
                wanted
                    .filter_map(|stream| Some((*stream, state.streams.remove(&(id, *stream))?)))
                    .collect()
            };
            let id = start.process.id;
            // In a thread of its own: signals must reach the process meanwhile.
            let shared = shared.clone();
            thread::spawn(move || match process::start_machine(&start, streams) {
                Ok(process) => {
                    let process = Arc::new(process);
                    shared.lock().main = Some(process.clone());
                    shared.tell(&Message::Started { process: id });
                    let end = process.wait();
                    mounts::release(&start.mounts);
                    nix::unistd::sync();
                    let (status, out_of_memory) = (end.status, end.out_of_memory);
                    shared.finish(Message::Exited { process: id, status, out_of_memory });
                }
                Err(error) => {
                    mounts::release(&start.mounts);
                    let SetupError { kind, message } = error;
                    shared.finish(Message::StartFailed { kind, message });
                }
            });
        }
        Request::Signal { process, signal, group } => {
            let main = shared.lock().main.clone();
            if let (Some(main), Ok(signal)) = (main, Signal::try_from(signal))
                && main.id() == process
            {
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
                Some(main) => main.signal(Signal::SIGKILL, false),
                None => crate::power_off(),
            }
        }
    }
}
