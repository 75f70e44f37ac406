//! Linux system calls behind safe functions. The only room with `unsafe`, but for the entry command's fork.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
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
