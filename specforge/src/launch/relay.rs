//! What the processes of a run print, line by line, each line with its rank before it.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::foreign;

/// A longer line is printed in pieces.
const LONGEST_LINE: u64 = 1 << 16;

/// Where lines go. A line is written in one piece.
#[derive(Clone)]
pub struct Sink {
    writer: Arc<Mutex<Box<dyn Write + Send>>>,
    /// Written before each line.
    clear: &'static str,
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Sink")
    }
}

impl Sink {
    /// Writes to `writer`. On a terminal, where a progress bar may stand in the last line, lines take its place.
    pub fn new(writer: Box<dyn Write + Send>, is_terminal: bool) -> Self {
        Self { writer: Arc::new(Mutex::new(writer)), clear: if is_terminal { "\r\x1b[K" } else { "" } }
    }

    /// Prints a line of the launcher itself.
    pub(super) fn say(&self, line: &str) {
        self.line("", foreign::message(line).as_bytes());
    }

    fn line(&self, prefix: &str, line: &[u8]) {
        let mut text = Vec::with_capacity(self.clear.len() + prefix.len() + line.len() + 1);
        text.extend_from_slice(self.clear.as_bytes());
        text.extend_from_slice(prefix.as_bytes());
        text.extend_from_slice(line);
        if !line.ends_with(b"\n") {
            text.push(b'\n');
        }
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        // A reader that went away is no reason to end a run.
        let _ = writer.write_all(&text).and_then(|()| writer.flush());
    }
}

/// A thread that copies one stream of one process to the sink.
pub(super) struct Relay {
    ended: Receiver<()>,
}

impl Relay {
    pub(super) fn start(stream: impl Read + Send + 'static, prefix: String, sink: Sink) -> Self {
        let (end, ended) = mpsc::channel::<()>();
        thread::spawn(move || {
            copy(stream, &prefix, &sink);
            drop(end);
        });
        Self { ended }
    }

    /// Waits until everything is printed. A stream that somebody else still holds open is left to itself.
    pub(super) fn finish(&self, deadline: Instant) {
        let _ =
            self.ended.recv_timeout(deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
    }
}

fn copy(stream: impl Read, prefix: &str, sink: &Sink) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => sink.line(prefix, &line),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A sink whose text can be read.
    #[derive(Clone, Default)]
    pub(in super::super) struct Page(Arc<Mutex<Vec<u8>>>);

    impl Page {
        pub(in super::super) fn sink(&self) -> Sink {
            Sink::new(Box::new(self.clone()), false)
        }

        pub(in super::super) fn text(&self) -> String {
            String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
        }
    }

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            // One byte at a time: whoever does not hold the lock for a whole line is found out.
            self.0.lock().unwrap().extend_from_slice(&bytes[..1.min(bytes.len())]);
            Ok(1.min(bytes.len()))
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_carry_their_rank_and_stay_whole() {
        let page = Page::default();
        let sink = page.sink();
        let body = |letter: &str| format!("{}\n", letter.repeat(50)).repeat(200) + "the end";
        let relays: Vec<_> = ["a", "b", "c"]
            .into_iter()
            .enumerate()
            .map(|(rank, letter)| {
                let stream = std::io::Cursor::new(body(letter).into_bytes());
                Relay::start(stream, format!("[rank {rank}] "), sink.clone())
            })
            .collect();
        relays.iter().for_each(|relay| relay.finish(Instant::now() + Duration::from_secs(20)));
        let text = page.text();
        for (rank, letter) in ["a", "b", "c"].into_iter().enumerate() {
            let own: Vec<&str> =
                text.lines().filter_map(|line| line.strip_prefix(&format!("[rank {rank}] "))).collect();
            assert_eq!(own.join("\n"), body(letter));
        }
        assert_eq!(text.lines().count(), 3 * 201);
    }

    #[test]
    fn a_line_without_end_is_cut_and_nothing_is_lost() {
        let page = Page::default();
        copy(std::io::Cursor::new(vec![b'x'; (LONGEST_LINE + 5) as usize]), "> ", &page.sink());
        let lengths: Vec<usize> = page.text().lines().map(str::len).collect();
        assert_eq!(lengths, [LONGEST_LINE as usize + 2, 7]);
        let empty = Page::default();
        copy(std::io::Cursor::new(b"\n\nlast"), "> ", &empty.sink());
        assert_eq!(empty.text(), "> \n> \n> last\n");
    }

    #[test]
    fn on_a_terminal_a_line_takes_the_place_of_the_bar() {
        let page = Page::default();
        Sink::new(Box::new(page.clone()), true).say("hello");
        assert_eq!(page.text(), "\r\x1b[Khello\n");
    }
}
