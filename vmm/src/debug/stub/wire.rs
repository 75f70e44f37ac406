//! The connection to gdb: answers are gathered and sent whole.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;

use gdbstub::conn::{Connection, ConnectionExt};

/// Bytes read at once.
const CHUNK: usize = 4096;

/// Where in the stream of packets reading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frame {
    Between,
    Inside,
    /// So many digits of the checksum are to come.
    Checksum(u8),
}

/// A TCP connection with buffers.
pub struct Wire {
    stream: TcpStream,
    out: Vec<u8>,
    incoming: VecDeque<u8>,
    frame: Frame,
}

impl Wire {
    /// Takes a connection.
    pub fn new(stream: TcpStream) -> io::Result<Wire> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(false)?;
        Ok(Wire { stream, out: Vec::new(), incoming: VecDeque::new(), frame: Frame::Between })
    }

    /// True if there is something to read, or the connection is gone, which reading will tell.
    pub fn has_incoming(&mut self) -> bool {
        self.drop_impatience();
        if !self.incoming.is_empty() {
            return true;
        }
        if self.stream.set_nonblocking(true).is_err() {
            return true;
        }
        let received = self.receive();
        if self.stream.set_nonblocking(false).is_err() {
            return true;
        }
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(_) => true,
            Ok(()) => {
                self.drop_impatience();
                !self.incoming.is_empty()
            }
        }
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        let count = Read::read(&mut self.stream, &mut chunk)?;
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the debugger has closed the connection"));
        }
        self.incoming.extend(&chunk[..count]);
        Ok(())
    }

    /// Between packets, a minus asks for the last answer again. Nothing is lost on this connection: gdb has only
    /// waited for long, and the answer is coming.
    fn drop_impatience(&mut self) {
        while self.frame == Frame::Between && self.incoming.front() == Some(&b'-') {
            self.incoming.pop_front();
        }
    }

    fn next(&mut self) -> Option<u8> {
        self.drop_impatience();
        let byte = self.incoming.pop_front()?;
        self.frame = match (self.frame, byte) {
            (Frame::Between, b'$') => Frame::Inside,
            (Frame::Inside, b'#') => Frame::Checksum(2),
            (Frame::Checksum(2), _) => Frame::Checksum(1),
            (Frame::Checksum(_), _) => Frame::Between,
            (frame, _) => frame,
        };
        Some(byte)
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.out.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Write::write_all(&mut self.stream, &self.out)?;
        self.out.clear();
        Ok(())
    }
}

impl ConnectionExt for Wire {
    fn read(&mut self) -> io::Result<u8> {
        self.flush()?;
        loop {
            if let Some(byte) = self.next() {
                return Ok(byte);
            }
            self.receive()?;
        }
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        if self.has_incoming() && self.incoming.is_empty() {
            self.receive()?;
        }
        Ok(self.incoming.front().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impatience_is_dropped_between_packets_alone() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut wire = Wire::new(listener.accept().unwrap().0).unwrap();
        assert!(!wire.has_incoming());
        Write::write_all(&mut peer, b"+--$a-b#2d---$-#2d-").unwrap();
        drop(peer);
        let mut read = Vec::new();
        while let Ok(byte) = ConnectionExt::read(&mut wire) {
            read.push(byte);
        }
        assert_eq!(read, b"+$a-b#2d$-#2d");
        assert!(wire.has_incoming(), "the end is to be read");
    }
}
