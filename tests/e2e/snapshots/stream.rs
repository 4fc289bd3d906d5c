//! The host's end of streams over vsock: numbers go to the guest and come back in order.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Streams that guests make to one port, one after the other.
pub struct Streams {
    listener: UnixListener,
    current: Stream,
}

struct Stream {
    /// Bytes that came back as they should.
    arrived: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Streams {
    /// Waits for guests whose vsock device has this path, at port 5000.
    pub fn new(path: &str) -> Streams {
        let listener = UnixListener::bind(format!("{path}_5000")).unwrap();
        let current = Stream::next(&listener);
        Streams { listener, current }
    }

    /// Waits until numbers have gone to the guest and back for a while. More are on their way.
    #[track_caller]
    pub fn flow(&self) {
        let since = Instant::now();
        while self.current.arrived.load(Ordering::SeqCst) < 16 << 10 {
            assert!(since.elapsed().as_secs() < 150, "the stream does not flow");
            assert!(!self.current.thread.is_finished(), "the stream has ended");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the end of the stream, whose monitor is gone, and for another guest's; how many bytes
    /// had come back by then.
    #[track_caller]
    pub fn ended(&mut self) -> u64 {
        let next = Stream::next(&self.listener);
        let ended = std::mem::replace(&mut self.current, next);
        ended.thread.join().unwrap();
        ended.arrived.load(Ordering::SeqCst)
    }
}

impl Stream {
    fn next(listener: &UnixListener) -> Stream {
        let listener = listener.try_clone().unwrap();
        let arrived = Arc::new(AtomicU64::new(0));
        let count = arrived.clone();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let writer = stream.try_clone().unwrap();
            let sender = std::thread::spawn(move || send(writer));
            receive(stream, &count);
            sender.join().unwrap();
        });
        Stream { arrived, thread }
    }
}

/// Sends numbers until nobody takes them.
fn send(mut stream: UnixStream) {
    let mut numbers = 0u64..;
    loop {
        let bytes: Vec<u8> = numbers.by_ref().take(512).flat_map(u64::to_le_bytes).collect();
        if stream.write_all(&bytes).is_err() {
            return;
        }
        // There is other load to be carried.
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Fails unless what comes back, up to the end, is a beginning of what was sent.
fn receive(mut stream: UnixStream, arrived: &AtomicU64) {
    let mut expected = (0u64..).flat_map(u64::to_le_bytes);
    let mut buffer = vec![0; 8192];
    // Either an end or an error says that the other side is gone.
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        let wanted: Vec<u8> = expected.by_ref().take(count).collect();
        let before = arrived.fetch_add(count as u64, Ordering::SeqCst);
        assert!(wanted == buffer[..count], "other bytes than were sent, after {before}");
    }
}
