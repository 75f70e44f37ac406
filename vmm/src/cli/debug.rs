//! `orrery debug`.

use std::net::{TcpListener, TcpStream};
use std::process::Command;

use super::args::DebugArgs;
use super::exit::{self, Failure};
use super::place::{Place, debug_failure};
use crate::debug::stub::{self, Disconnected};
use crate::debug::{DebugError, Session};

/// What gdb is taught when it is started from here.
const SCRIPT: &str = "\
define goto
  monitor goto $arg0
  maintenance flush register-cache
  frame
end
document goto
Go to a moment of the run: goto ICOUNT, or goto end.
end
";

pub(super) fn debug(arguments: DebugArgs) -> Result<u8, Failure> {
    let place = Place::find(&arguments.moment.run, &arguments.reach)?;
    let icount = place.icount(arguments.moment.icount.map(|icount| icount.0))?;
    let address = if arguments.gdb { "127.0.0.1:0" } else { &arguments.listen };
    let failed = |action: String| move |source| debug_failure(DebugError::Network { action, source });
    let listener = TcpListener::bind(address).map_err(failed(format!("listen at {address}")))?;
    let address = listener.local_addr().map_err(failed("tell the address".to_owned()))?;
    let mut session = place.session(icount)?;
    if arguments.gdb {
        return with_gdb(&mut session, &listener, &arguments.gdb_arguments);
    }
    eprintln!("orrery: at icount {icount}; waiting for gdb: target remote {address}");
    loop {
        let (stream, peer) = listener.accept().map_err(failed(format!("accept a connection at {address}")))?;
        eprintln!("orrery: connected to {peer}");
        match serve(&mut session, stream)? {
            Disconnected::Killed => return Ok(0),
            _ if arguments.once => return Ok(0),
            _ => eprintln!("orrery: waiting for gdb: target remote {address}"),
        }
    }
}

fn serve(session: &mut Session, stream: TcpStream) -> Result<Disconnected, Failure> {
    let ended = stub::serve(session, stream).map_err(debug_failure)?;
    match &ended {
        Disconnected::Broken(reason) => eprintln!("orrery: the connection is over: {reason}"),
        Disconnected::Detached => eprintln!("orrery: gdb has detached at icount {}", session.position().icount),
        Disconnected::Killed => {}
    }
    Ok(ended)
}

/// Starts gdb, serves it, and gives its exit code.
fn with_gdb(session: &mut Session, listener: &TcpListener, arguments: &[String]) -> Result<u8, Failure> {
    let host = |what: String| Failure::new(exit::HOST, what);
    let address = listener.local_addr().map_err(|error| host(format!("cannot tell the address: {error}")))?;
    let script = std::env::temp_dir().join(format!("orrery-{}.gdb", std::process::id()));
    std::fs::write(&script, SCRIPT).map_err(|error| host(format!("cannot write {}: {error}", script.display())))?;
    let started = Command::new("gdb")
        .arg("-q")
        .args(["-ex", "set architecture i386:x86-64", "-ex", "set remotetimeout 60"])
        .arg("-x")
        .arg(&script)
        .args(["-ex", &format!("target remote {address}")])
        .args(arguments)
        .spawn();
    let mut gdb = match started {
        Ok(gdb) => gdb,
        Err(error) => {
            let _ = std::fs::remove_file(&script);
            return Err(host(format!("cannot start gdb: {error}; install it (Debian: apt-get install gdb)")));
        }
    };
    ignore_interrupts();
    let result = match accept_from(listener, &mut gdb) {
        Some(stream) => stub::serve(session, stream).map_err(debug_failure).map(|ended| {
            if let Disconnected::Broken(reason) = ended
                && gdb.try_wait().is_ok_and(|status| status.is_none())
            {
                eprintln!("orrery: the connection is over: {reason}");
            }
        }),
        None => Ok(()),
    };
    let status = gdb.wait();
    let _ = std::fs::remove_file(&script);
    result?;
    let code = status.ok().and_then(|status| status.code()).and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(exit::HOST))
}

/// Waits for gdb to connect; None if it ends without.
fn accept_from(listener: &TcpListener, gdb: &mut std::process::Child) -> Option<TcpStream> {
    listener.set_nonblocking(true).ok()?;
    loop {
        if let Ok((stream, _)) = listener.accept() {
            return Some(stream);
        }
        if !matches!(gdb.try_wait(), Ok(None)) {
            return None;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Ctrl-C on the terminal is meant for gdb, which tells us.
fn ignore_interrupts() {
    extern "C" fn nothing(_signal: libc::c_int) {}
    // SAFETY: the handler does nothing, which is allowed at any moment.
    unsafe { libc::signal(libc::SIGINT, nothing as extern "C" fn(libc::c_int) as libc::sighandler_t) };
}
