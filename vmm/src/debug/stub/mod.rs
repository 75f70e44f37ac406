//! gdb's view of a session: the remote serial protocol, forwards and backwards.
//!
//! [`description`] says which registers there are and [`registers`] fills them, [`target`] maps gdb's wishes to a
//! [`Session`], [`monitor`] answers `monitor` commands, [`wire`] is the connection. A peer that breaks the protocol or
//! goes away ends its connection and nothing else: the session stays where it is, and the run's files are not
//! touched.

pub mod description;
pub mod monitor;
pub mod registers;
pub mod target;
pub mod wire;

use std::net::TcpStream;

use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{DisconnectReason, GdbStub, SingleThreadStopReason};

pub use target::GdbTarget;
pub use wire::Wire;

use super::{DebugError, Session};

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disconnected {
    /// gdb took its leave (`detach`, `quit`).
    Detached,
    /// gdb asked to kill the guest: a run cannot be killed, but the session is over.
    Killed,
    /// The peer went away or broke the protocol; why.
    Broken(String),
}

/// Serves one connection until it ends.
pub fn serve(session: &mut Session, stream: TcpStream) -> Result<Disconnected, DebugError> {
    let failed = |source| DebugError::Network { action: "use the connection".to_owned(), source };
    let wire = Wire::new(stream).map_err(failed)?;
    let mut target = GdbTarget::new(session);
    Ok(match GdbStub::new(wire).run_blocking::<EventLoop>(&mut target) {
        Ok(DisconnectReason::Kill) => Disconnected::Killed,
        Ok(_) => Disconnected::Detached,
        Err(error) if error.is_target_error() => match error.into_target_error() {
            Some(error) => return Err(error),
            None => Disconnected::Broken("the target failed".to_owned()),
        },
        Err(error) => Disconnected::Broken(error.to_string()),
    })
}

/// Moves the session while looking at the connection.
struct EventLoop<'a>(std::marker::PhantomData<&'a ()>);

impl<'a> BlockingEventLoop for EventLoop<'a> {
    type Target = GdbTarget<'a>;
    type Connection = Wire;
    type StopReason = SingleThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut GdbTarget<'a>,
        wire: &mut Wire,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<DebugError, std::io::Error>> {
        let mut incoming = || wire.has_incoming();
        match target.go(&mut incoming).map_err(WaitForStopReasonError::Target)? {
            Some(reason) => Ok(Event::TargetStopped(reason)),
            None => {
                use gdbstub::conn::ConnectionExt;
                wire.read().map(Event::IncomingData).map_err(WaitForStopReasonError::Connection)
            }
        }
    }

    fn on_interrupt(target: &mut GdbTarget<'a>) -> Result<Option<Self::StopReason>, DebugError> {
        target.forget_motion();
        Ok(Some(SingleThreadStopReason::Signal(gdbstub::common::Signal::SIGINT)))
    }
}
