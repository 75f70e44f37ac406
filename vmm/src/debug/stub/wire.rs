//! The connection to gdb: answers are gathered and sent whole.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use gdbstub::conn::{Connection, ConnectionExt};

/// Bytes read at once.
const CHUNK: usize = 4096;

/// A TCP connection with buffers.
pub struct Wire {
    stream: TcpStream,
    out: Vec<u8>,
    incoming: std::collections::VecDeque<u8>,
}

impl Wire {
    /// Takes a connection.
    pub fn new(stream: TcpStream) -> io::Result<Wire> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(false)?;
        Ok(Wire { stream, out: Vec::new(), incoming: Default::default() })
    }

    /// True if there is something to read, or the connection is gone, which reading will tell.
    pub fn has_incoming(&mut self) -> bool {
        if !self.incoming.is_empty() {
            return true;
        }
        if self.stream.set_nonblocking(true).is_err() {
            return true;
        }
        let seen = self.stream.peek(&mut [0]);
        let restored = self.stream.set_nonblocking(false);
        match seen {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => restored.is_err(),
            _ => true,
        }
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
        if let Some(byte) = self.incoming.pop_front() {
            return Ok(byte);
        }
        let mut chunk = [0; CHUNK];
        let count = Read::read(&mut self.stream, &mut chunk)?;
        if count == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the debugger has closed the connection"));
        }
        self.incoming.extend(&chunk[1..count]);
        Ok(chunk[0])
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        if self.incoming.is_empty() && self.has_incoming() {
            let byte = self.read()?;
            self.incoming.push_front(byte);
        }
        Ok(self.incoming.front().copied())
    }
}
