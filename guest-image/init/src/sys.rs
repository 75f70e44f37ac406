//! Linux system calls behind safe functions. The only room with `unsafe`, but for the entry command's fork.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

use crate::failure::Failure;

/// Turns the C convention (-1 and errno) into a result.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// This process's id.
pub fn process_id() -> i32 {
    std::process::id() as i32
}

/// `mount(2)`.
pub fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong, options: &str) -> io::Result<()> {
    let (source, target, kind, options) = (c_string(source)?, c_string(target)?, c_string(kind)?, c_string(options)?);
    // SAFETY: all four pointers are to NUL-terminated strings that outlive the call.
    let result =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) };
    check(result.into()).map(drop)
}

/// Makes `/dev/console` standard input, output and error where the kernel could not (its `/dev` was empty when it
/// started init).
pub fn open_console() {
    // SAFETY: a constant NUL-terminated path; descriptors 0 to 2 belong to nobody else in this single thread.
    unsafe {
        let console = libc::open(c"/dev/console".as_ptr(), libc::O_RDWR | libc::O_NOCTTY);
        if console >= 0 {
            for standard in 0..3 {
                libc::dup2(console, standard);
            }
            if console > 2 {
                libc::close(console);
            }
        }
    }
}

/// Loads a kernel module from its file, `finit_module(2)`.
pub fn load_module(file: &File) -> io::Result<()> {
    // SAFETY: an open descriptor, an empty NUL-terminated parameter string, no flags.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    check(result).map(drop)
}

/// `sethostname(2)`.
pub fn set_host_name(name: &str) -> Result<(), Failure> {
    // SAFETY: pointer and length describe the string.
    let result = unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) };
    check(result.into()).map(drop).map_err(|error| Failure::Network { step: "sethostname", error })
}

/// Sets the loopback interface up, by `SIOCSIFFLAGS` of netdevice(7).
pub fn bring_up_loopback() -> Result<(), Failure> {
    let failure = |step| move |error| Failure::Network { step, error };
    // SAFETY: a plain system call.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    let socket = check(socket.into()).map_err(failure("socket"))? as i32;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is a valid ifreq that outlives the call; the socket was opened above and is closed once.
    let result = unsafe {
        let result = check(libc::ioctl(socket, libc::SIOCSIFFLAGS as _, ptr::from_ref(&request)).into());
        libc::close(socket);
        result
    };
    result.map(drop).map_err(failure("SIOCSIFFLAGS lo"))
}

/// Makes the calling process a session leader with the serial console as its controlling terminal, so that job
/// control and Ctrl-C work. Meant for the child between fork and exec: async-signal-safe. Without a serial console
/// the inherited descriptors stay.
pub fn become_session_leader() -> io::Result<()> {
    // SAFETY: plain system calls on a constant path and on descriptors that this process owns.
    unsafe {
        libc::setsid();
        let terminal = libc::open(c"/dev/ttyS0".as_ptr(), libc::O_RDWR);
        if terminal >= 0 {
            libc::ioctl(terminal, libc::TIOCSCTTY as _, 0);
            for standard in 0..3 {
                libc::dup2(terminal, standard);
            }
            if terminal > 2 {
                libc::close(terminal);
            }
        }
    }
    Ok(())
}

/// Opens a terminal for reading and writing, without making it the controlling one.
pub fn open_terminal(path: &str) -> io::Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path)?;
    Ok(file.into())
}

/// Makes a terminal pass bytes as they are: no echo, no lines, no signals.
pub fn make_raw(terminal: &impl AsRawFd) {
    // SAFETY: all zeroes is a valid termios, which tcgetattr fills in; the descriptor is open.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(terminal.as_raw_fd(), &mut settings) == 0 {
            libc::cfmakeraw(&mut settings);
            libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &settings);
        }
    }
}

/// Makes a child of this process with a name, a session of its own, and nothing as standard input, output and error.
/// True in the child, false in the parent and on failure.
pub fn fork_daemon(name: &str) -> bool {
    // SAFETY: init has one thread, so the child may do whatever the parent may.
    if unsafe { libc::fork() } != 0 {
        return false;
    }
    let name = c_string(name).unwrap_or_default();
    // SAFETY: constant and owned NUL-terminated strings; descriptors 0 to 2 belong to this process alone.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        libc::setsid();
        let nothing = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        if nothing >= 0 {
            for standard in 0..3 {
                libc::dup2(nothing, standard);
            }
            if nothing > 2 {
                libc::close(nothing);
            }
        }
    }
    true
}

/// Ends this process at once.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: a plain system call that does not return.
    unsafe { libc::_exit(code) }
}

/// Waits until one of the descriptors has something to be read or is closed on the other side, or until the timeout
/// in milliseconds (negative: for ever). Says which.
pub fn wait_readable(fds: &[i32], timeout_ms: i32) -> io::Result<Vec<bool>> {
    let mut polled: Vec<libc::pollfd> =
        fds.iter().map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: pointer and length describe the array.
    let result = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout_ms) };
    match check(result.into()) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        Err(_) => Ok(vec![false; fds.len()]),
        Ok(_) => Ok(polled.iter().map(|poll| poll.revents != 0).collect()),
    }
}

/// An empty file that exists in memory alone; programs that are started do not inherit it.
pub fn memory_file(name: &str) -> io::Result<File> {
    let name = c_string(name)?;
    // SAFETY: a NUL-terminated string; a descriptor that is returned is owned by nobody else.
    unsafe {
        let fd = check(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC).into())?;
        Ok(File::from_raw_fd(fd as i32))
    }
}

/// A descriptor that becomes readable when a child ends, before anybody has waited for it; None on kernels before 5.3.
pub fn watch_process(pid: u32) -> Option<OwnedFd> {
    // SAFETY: a system call without pointers; a descriptor that it returns is owned by nobody else.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_pidfd_open, pid, 0)).ok()?;
        Some(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// A pair of pseudo-terminals: our side, and the command's.
pub fn open_pseudo_terminal() -> io::Result<(File, File)> {
    // SAFETY: plain system calls on a descriptor that is owned at once; the name's buffer has the length given.
    unsafe {
        let ours = check(libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC).into())? as i32;
        let ours = File::from_raw_fd(ours);
        check(libc::grantpt(ours.as_raw_fd()).into())?;
        check(libc::unlockpt(ours.as_raw_fd()).into())?;
        let mut name = [0u8; 64];
        let failed = libc::ptsname_r(ours.as_raw_fd(), name.as_mut_ptr().cast(), name.len());
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        let len = name.iter().position(|byte| *byte == 0).unwrap_or(0);
        let theirs = open_terminal(&String::from_utf8_lossy(&name[..len]))?;
        Ok((ours, File::from(theirs)))
    }
}

/// Makes writing to a file return instead of waiting for room.
pub fn set_nonblocking(file: &File) {
    // SAFETY: plain system calls on an open descriptor.
    unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK);
    }
}

/// Sets a terminal's size.
pub fn set_size(terminal: &File, rows: u16, columns: u16) {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request takes a winsize, which outlives the call.
    unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ as _, ptr::from_ref(&size)) };
}

/// Makes the calling process a session leader with its standard input as controlling terminal. For the child between
/// fork and exec: async-signal-safe.
pub fn take_terminal() -> io::Result<()> {
    // SAFETY: plain system calls on this process and its standard input.
    unsafe {
        libc::setsid();
        libc::ioctl(0, libc::TIOCSCTTY as _, 0);
    }
    Ok(())
}

/// Stops every process but this one and the first.
pub fn stop_all() {
    // SAFETY: a plain system call; the sender and process 1 are not among those that it reaches.
    unsafe { libc::kill(-1, libc::SIGSTOP) };
}

/// Waits for any child to end: its id and its status as wait(2) gives it. `ECHILD` when there is none.
pub fn wait_any() -> io::Result<(i32, i32)> {
    let mut status = 0;
    // SAFETY: the status is a valid place for the result.
    let id = unsafe { libc::waitpid(-1, &mut status, 0) };
    check(id.into()).map(|id| (id as i32, status))
}

/// Kills every process but this one.
pub fn kill_all() {
    // SAFETY: a plain system call; as process 1 this signals all others and never itself.
    unsafe { libc::kill(-1, libc::SIGKILL) };
}

/// Writes all dirty file system data to the disks.
pub fn sync() {
    // SAFETY: a plain system call.
    unsafe { libc::sync() };
}

/// Writes a byte to an I/O port.
pub fn write_port(port: u16, value: u8) -> io::Result<()> {
    // SAFETY: a plain system call that grants access to this one port.
    check(unsafe { libc::ioperm(port.into(), 1, 1) }.into())?;
    // SAFETY: access was granted just above; the instruction touches no memory and no flags.
    unsafe { std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
    Ok(())
}

/// The kernel's orderly power-off; returns only if it is refused.
pub fn power_off() {
    // SAFETY: a plain system call.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
}
