//! Processor faults inside translated code arrive as signals; the handler turns them into exits.
//!
//! Guest RSP lives in host RSP, so every handler runs on an alternate stack. The handler touches nothing but the
//! interrupted context and the vCPU block that the thread runs.

use super::block::VcpuBlock;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Once;

/// Signals that guest instructions can raise in the host.
const SIGNALS: [libc::c_int; 4] = [libc::SIGFPE, libc::SIGSEGV, libc::SIGILL, libc::SIGBUS];

static mut PREVIOUS: [Option<libc::sigaction>; 4] = [None; 4];
static INSTALLED: Once = Once::new();

thread_local! {
    /// The vCPU block that the thread runs, or null. It needs no initialisation, so a handler may read it.
    static RUNNING: Cell<*mut VcpuBlock> = const { Cell::new(std::ptr::null_mut()) };
}

/// Installs the handlers, once per process. Handlers that were there before get every other fault.
pub fn install() {
    INSTALLED.call_once(|| {
        for (i, signal) in SIGNALS.into_iter().enumerate() {
            // SAFETY: plain sigaction calls with valid structures; PREVIOUS is written here only, before the
            // handler that reads it is installed.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                let mut previous: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, std::ptr::null(), &mut previous);
                PREVIOUS[i] = Some(previous);
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
    });
}

/// A signal stack for the calling thread, given back on drop.
pub struct SignalStack<'a> {
    previous: libc::stack_t,
    _memory: PhantomData<&'a mut [u8]>,
}

impl SignalStack<'_> {
    /// Bytes of memory that a stack needs.
    pub const SIZE: usize = 256 * 1024;

    /// Installs a stack for this thread's handlers. Disarmed while a handler runs, so that an RSP chosen by the
    /// guest cannot make the kernel believe that it is already there.
    pub fn install(memory: &mut [u8]) -> SignalStack<'_> {
        const SS_AUTODISARM: libc::c_int = 1 << 31;
        // SAFETY: the structures are valid; the memory outlives the installation (see drop).
        let previous = unsafe {
            let stack =
                libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: SS_AUTODISARM, ss_size: memory.len() };
            let mut previous: libc::stack_t = std::mem::zeroed();
            let result = libc::sigaltstack(&stack, &mut previous);
            assert_eq!(result, 0, "sigaltstack with a valid stack");
            previous
        };
        SignalStack { previous, _memory: PhantomData }
    }
}

impl Drop for SignalStack<'_> {
    fn drop(&mut self) {
        // SAFETY: gives back the stack that was there before.
        unsafe { libc::sigaltstack(&self.previous, std::ptr::null_mut()) };
    }
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid context to an SA_SIGINFO handler; RUNNING is null, or a vCPU block that the
    // interrupted thread is running.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let registers = &mut context.uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        let block = RUNNING.get();
        if !block.is_null() && rip >= (*block).code_start && rip < (*block).code_end {
            (*block).fault_vector = registers[libc::REG_TRAPNO as usize] as u32;
            (*block).fault_rip = rip;
            (*block).fault_flags = registers[libc::REG_EFL as usize] as u64;
            (*block).fault_address = (*info).si_addr() as u64;
            registers[libc::REG_RIP as usize] = (*block).fault_exit as i64;
            return;
        }
        let index = SIGNALS.iter().position(|s| *s == signal).unwrap_or(0);
        let previous = (*std::ptr::addr_of!(PREVIOUS))[index];
        match previous {
            Some(action) if action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN => {
                let function: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(action.sa_sigaction);
                function(signal, info, (context as *mut libc::ucontext_t).cast());
            }
            _ => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, std::ptr::null_mut());
            }
        }
    }
}

/// Faults of the calling thread's translated code go to this vCPU block from now on; returns whose they were.
pub fn watch(block: *mut VcpuBlock) -> *mut VcpuBlock {
    RUNNING.replace(block)
}
