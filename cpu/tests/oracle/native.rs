//! Executes cases on the host processor, in this process, at the linear addresses they ask for.
//!
//! IRETQ loads RIP, RSP and RFLAGS at once, after everything else has been loaded, so nothing of the test harness
//! is visible to the case. Every case ends in an exception (INT3 at the latest); the kernel's signal frame then
//! holds all registers as the exception found them, with the vector, the error code and CR2.

use std::arch::naked_asm;
use std::cell::UnsafeCell;
use std::mem::{offset_of, size_of};
use std::ptr;
use std::sync::{Mutex, MutexGuard};

use iced_x86::{Instruction, Mnemonic};
use orrery_cpu::state::{XSAVE_SIZE, XsaveImage};

use crate::case::{Case, Ending, Executor, Outcome, PAGE, PAGES, REGIONS, Refusal, Registers, Rights, pages};

/// Everything the two naked functions touch, at offsets they know.
#[repr(C, align(64))]
struct Context {
    fpu: [u8; XSAVE_SIZE],
    gpr: [u64; 16],
    /// RIP, CS, RFLAGS, RSP, SS for IRETQ.
    frame: [u64; 5],
    fs_base: u64,
    gs_base: u64,
    host_fs_base: u64,
    host_gs_base: u64,
    host_rsp: u64,
    /// Nonzero between entry and the signal that ends the case.
    running: u64,
    /// Nonzero to stop after every instruction and count it.
    stepping: u64,
    last_rip: u64,
    steps: u64,
    /// Nonzero to give BSF and BSR, when stepping, the flags of the model: all but ZF as they were.
    corrects_scans: u64,
    last_flags: u64,
    /// 64 or 32.
    bits: u64,
    /// DS and ES.
    data_selector: u64,
    /// Counts runs, and the run during which the timer last rang.
    run: u64,
    rang_in_run: u64,
    captured: Captured,
}

/// What the signal handler saw.
#[repr(C)]
struct Captured {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    fs_base: u64,
    gs_base: u64,
    vector: u64,
    error_code: u64,
    address: u64,
    fpu: [u8; XSAVE_SIZE],
}

struct Shared(UnsafeCell<Context>);

// SAFETY: `Native` holds RUNNER for its whole life and is the only user of the context; signals that touch it are
// raised by the thread that runs the case.
unsafe impl Sync for Shared {}

static RUNNER: Mutex<()> = Mutex::new(());
// SAFETY: Context is made of integers; all zeros is a value of it.
static CONTEXT: Shared = Shared(UnsafeCell::new(unsafe { std::mem::zeroed() }));

struct Handlers(UnsafeCell<[libc::sigaction; 5]>);

// SAFETY: written by `Native::new`, which holds RUNNER, before the handler that reads it is installed.
unsafe impl Sync for Handlers {}

// SAFETY: an all-zero sigaction is a value of it: the default.
static PREVIOUS: Handlers = Handlers(UnsafeCell::new(unsafe { std::mem::zeroed() }));

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];
const ALTERNATE_STACK_SIZE: usize = 256 << 10;
const USER_CS: u64 = 0x33;
const USER_CS_32: u64 = 0x23;
const USER_SS: u64 = 0x2B;
const TF: u64 = 1 << 8;
const STATUS_BUT_ZF: u64 = 0x895;
/// In place of a vector: the timer ended the case.
const ENDLESS: u64 = 1 << 32;
/// A case may take this long, and once more.
const TIMER_NS: i64 = 100_000_000;

/// Loads the registers of the case and jumps to it; returns when [`on_signal`] sends the thread to [`leave`].
#[unsafe(naked)]
unsafe extern "C" fn enter(context: *mut Context) {
    naked_asm!(
        // IRETQ refuses to work with NT set.
        "push 0x202",
        "popfq",
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi + {host_rsp}], rsp",
        "rdfsbase rax",
        "mov [rdi + {host_fs}], rax",
        "rdgsbase rax",
        "mov [rdi + {host_gs}], rax",
        "mov qword ptr [rdi + {running}], 1",
        // 32-bit code needs data segments; 64-bit code sees null ones in them.
        "mov eax, [rdi + {data_selector}]",
        "mov ds, eax",
        "mov es, eax",
        "mov eax, 7",
        "xor edx, edx",
        "xrstor64 [rdi]",
        "mov rax, [rdi + {fs}]",
        "wrfsbase rax",
        "mov rax, [rdi + {gs}]",
        "wrgsbase rax",
        "mov rax, [rdi + {gpr}]",
        "mov rcx, [rdi + {gpr} + 8]",
        "mov rdx, [rdi + {gpr} + 16]",
        "mov rbx, [rdi + {gpr} + 24]",
        "mov rbp, [rdi + {gpr} + 40]",
        "mov rsi, [rdi + {gpr} + 48]",
        "mov r8, [rdi + {gpr} + 64]",
        "mov r9, [rdi + {gpr} + 72]",
        "mov r10, [rdi + {gpr} + 80]",
        "mov r11, [rdi + {gpr} + 88]",
        "mov r12, [rdi + {gpr} + 96]",
        "mov r13, [rdi + {gpr} + 104]",
        "mov r14, [rdi + {gpr} + 112]",
        "mov r15, [rdi + {gpr} + 120]",
        "lea rsp, [rdi + {frame}]",
        "mov rdi, [rdi + {gpr} + 56]",
        "iretq",
        host_rsp = const offset_of!(Context, host_rsp),
        host_fs = const offset_of!(Context, host_fs_base),
        host_gs = const offset_of!(Context, host_gs_base),
        running = const offset_of!(Context, running),
        data_selector = const offset_of!(Context, data_selector),
        fs = const offset_of!(Context, fs_base),
        gs = const offset_of!(Context, gs_base),
        gpr = const offset_of!(Context, gpr),
        frame = const offset_of!(Context, frame),
    )
}

/// Where the signal handler's return goes: restores what `enter` saved and returns from it.
#[unsafe(naked)]
unsafe extern "C" fn leave() {
    naked_asm!("fninit", "push 0x202", "popfq", "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",)
}

/// The signal handler: puts the host's FS and GS bases back before any compiled code runs.
#[unsafe(naked)]
unsafe extern "C" fn on_signal(_signal: i32, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    naked_asm!(
        // The kernel leaves AC as the case had it.
        "push 0x202",
        "popfq",
        "lea rcx, [rip + {context}]",
        "cmp qword ptr [rcx + {running}], 0",
        "je {record}",
        "rdfsbase rax",
        "mov [rcx + {captured_fs}], rax",
        "rdgsbase rax",
        "mov [rcx + {captured_gs}], rax",
        "mov rax, [rcx + {host_fs}]",
        "wrfsbase rax",
        "mov rax, [rcx + {host_gs}]",
        "wrgsbase rax",
        "sub rsp, 8",
        "call {record}",
        "add rsp, 8",
        "test eax, eax",
        "jz 2f",
        "lea rcx, [rip + {context}]",
        "mov rax, [rcx + {captured_fs}]",
        "wrfsbase rax",
        "mov rax, [rcx + {captured_gs}]",
        "wrgsbase rax",
        "2: ret",
        context = sym CONTEXT,
        record = sym record,
        running = const offset_of!(Context, running),
        captured_fs = const offset_of!(Context, captured) + offset_of!(Captured, fs_base),
        captured_gs = const offset_of!(Context, captured) + offset_of!(Captured, gs_base),
        host_fs = const offset_of!(Context, host_fs_base),
        host_gs = const offset_of!(Context, host_gs_base),
    )
}

const GREGS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// The instruction at `code` has a REP or REPNE prefix.
///
/// # Safety
/// `code` must be where an instruction can be fetched from.
unsafe fn has_rep_prefix(mut code: *const u8) -> bool {
    loop {
        // SAFETY: a byte of the instruction, which has been executed.
        match unsafe { code.read() } {
            0xF2 | 0xF3 => return true,
            0x26 | 0x2E | 0x36 | 0x3E | 0x40..=0x4F | 0x64..=0x67 | 0xF0 => code = code.wrapping_add(1),
            _ => return false,
        }
    }
}

/// The instruction at `code` is BSF or BSR.
///
/// # Safety
/// As for [`has_rep_prefix`].
unsafe fn is_scan(mut code: *const u8, bits: u64) -> bool {
    let mut counts_zeros = false;
    loop {
        // SAFETY: a byte of the instruction, which has been executed.
        match unsafe { code.read() } {
            // The last of these two decides whether it is TZCNT or LZCNT.
            byte @ (0xF2 | 0xF3) => counts_zeros = byte == 0xF3,
            0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 => {}
            0x40..=0x4F if bits == 64 => {}
            // SAFETY: no instruction ends with this byte.
            0x0F => return !counts_zeros && matches!(unsafe { code.add(1).read() }, 0xBC | 0xBD),
            _ => return false,
        }
        code = code.wrapping_add(1);
    }
}

/// Copies the signal frame into the context and redirects it to [`leave`]; returns 1 to go on with the case instead.
unsafe extern "C" fn record(signal: i32, info: *mut libc::siginfo_t, frame: *mut libc::c_void) -> u32 {
    // SAFETY: the kernel passes a complete ucontext with an XSAVE area (checked by its magic number) to a
    // SA_SIGINFO handler; the context is ours, see `Shared`.
    unsafe {
        let context = &mut *CONTEXT.0.get();
        let machine = &mut (*frame.cast::<libc::ucontext_t>()).uc_mcontext;
        if signal == libc::SIGALRM {
            if context.running == 0 {
                return 0;
            }
            if context.rang_in_run != context.run {
                context.rang_in_run = context.run;
                return 1;
            }
            // The second time in one case: it has no end.
        } else if context.running == 0 {
            // Not ours: the engine's, whose handler was there before.
            let index = SIGNALS.iter().position(|s| *s == signal).unwrap_or(0);
            let before = (*PREVIOUS.0.get())[index];
            if before.sa_sigaction != libc::SIG_DFL && before.sa_sigaction != libc::SIG_IGN {
                let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(before.sa_sigaction);
                handler(signal, info, frame);
                return 0;
            }
            // Nor that: a bug of the harness. Let the same fault kill the process.
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &action, ptr::null_mut());
            return 0;
        }
        let mut vector = machine.gregs[libc::REG_TRAPNO as usize] as u64;
        if signal == libc::SIGALRM {
            vector = ENDLESS;
        }
        let rip = machine.gregs[libc::REG_RIP as usize] as u64;
        if vector == 1 && context.stepping != 0 {
            let flags = &mut machine.gregs[libc::REG_EFL as usize];
            if context.corrects_scans != 0 && is_scan(context.last_rip as *const u8, context.bits) {
                let kept = STATUS_BUT_ZF as i64;
                *flags = *flags & !kept | context.last_flags as i64 & kept;
            }
            context.last_flags = *flags as u64;
            // A REP string instruction traps after every iteration, with RIP still on it; a branch to itself does too,
            // but retires every time.
            if rip != context.last_rip || !has_rep_prefix(rip as *const u8) {
                context.steps += 1;
                context.last_rip = rip;
            }
            return 1;
        }
        context.running = 0;
        let captured = &mut context.captured;
        for (value, index) in captured.gpr.iter_mut().zip(GREGS) {
            *value = machine.gregs[index as usize] as u64;
        }
        captured.rip = rip;
        captured.rflags = machine.gregs[libc::REG_EFL as usize] as u64;
        captured.vector = vector;
        captured.error_code = machine.gregs[libc::REG_ERR as usize] as u64;
        captured.address = machine.gregs[libc::REG_CR2 as usize] as u64;
        let area = machine.fpregs.cast::<u8>();
        ptr::copy_nonoverlapping(area, captured.fpu.as_mut_ptr(), XSAVE_SIZE);

        // What the interrupted code resumes with: a clean FPU, and the stack of `enter`.
        area.cast::<u16>().write(0x37F);
        area.add(2).cast::<u16>().write(0);
        area.add(24).cast::<u32>().write(0x1F80);
        machine.gregs[libc::REG_RIP as usize] = leave as *const () as i64;
        machine.gregs[libc::REG_RSP as usize] = context.host_rsp as i64;
        machine.gregs[libc::REG_EFL as usize] = 0x202;
        let selectors = &mut machine.gregs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xFFFF | USER_CS as i64;
        0
    }
}

/// BSF or BSR
pub fn scans(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr)
}

/// The host processor as an executor.
pub struct Native {
    _only_one: MutexGuard<'static, ()>,
    alternate_stack: Vec<u8>,
    pristine: Vec<u8>,
    timer: libc::timer_t,
    previous_stack: libc::stack_t,
    /// Stop after each instruction to count them. Slow (a signal each), and the case sees TF in PUSHF.
    pub count: bool,
    /// Give BSF and BSR the flags of the model: for hosts where they leave others. Then cases with them are stepped.
    pub corrects_scans: bool,
}

impl Native {
    /// Maps the regions of [`crate::case`] into this process.
    pub fn new() -> Native {
        let only_one = RUNNER.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let pristine = crate::case::pristine_memory();
        for region in REGIONS {
            // SAFETY: a fresh anonymous mapping; NOREPLACE keeps it from covering anything of this process.
            let at = unsafe {
                libc::mmap(
                    region.start as *mut libc::c_void,
                    (region.pages * PAGE) as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE,
                    -1,
                    0,
                )
            };
            assert_eq!(at as u64, region.start, "linear {:#x} is taken in this process", region.start);
        }
        let mut native = Native {
            timer: start_timer(),
            _only_one: only_one,
            alternate_stack: vec![0; ALTERNATE_STACK_SIZE],
            pristine,
            // SAFETY: integers and a pointer.
            previous_stack: unsafe { std::mem::zeroed() },
            count: false,
            corrects_scans: false,
        };
        native.take_signals();
        native.restore_memory(true);
        for region in REGIONS {
            let protection = match region.rights {
                Rights::Code => libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                Rights::Data => libc::PROT_READ | libc::PROT_WRITE,
                Rights::ReadOnly => libc::PROT_READ,
            };
            // SAFETY: the mapping made above.
            let done = unsafe {
                libc::mprotect(region.start as *mut libc::c_void, (region.pages * PAGE) as usize, protection)
            };
            assert_eq!(done, 0, "mprotect of the test regions");
        }
        native
    }

    fn restore_memory(&self, read_only_too: bool) {
        for (index, (linear, rights)) in pages().enumerate() {
            if rights == Rights::ReadOnly && !read_only_too {
                continue;
            }
            let source = &self.pristine[index * PAGE as usize..][..PAGE as usize];
            // SAFETY: `linear` is a page of our mappings, writable as checked above.
            unsafe { ptr::copy_nonoverlapping(source.as_ptr(), linear as *mut u8, PAGE as usize) };
        }
    }

    /// Installs the handlers, over those of the engine, which get what is not ours.
    fn take_signals(&mut self) {
        // SAFETY: plain system calls on values of ours; what was there before comes back in `drop`.
        unsafe {
            let stack = libc::stack_t {
                ss_sp: self.alternate_stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: self.alternate_stack.len(),
            };
            libc::sigaltstack(&stack, &mut self.previous_stack);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // The timer must not ring while a case's registers are taken.
            libc::sigaddset(&mut action.sa_mask, libc::SIGALRM);
            for (signal, old) in SIGNALS.iter().zip(&mut *PREVIOUS.0.get()) {
                libc::sigaction(*signal, &action, old);
            }
        }
    }
}

/// A timer that keeps ringing in this thread, to end cases without an end.
fn start_timer() -> libc::timer_t {
    // SAFETY: plain system calls on values of ours. The handler stays for the life of the process and does nothing
    // outside a case.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigaction(libc::SIGALRM, &action, ptr::null_mut());
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGALRM;
        event.sigev_notify_thread_id = libc::gettid();
        let mut timer: libc::timer_t = ptr::null_mut();
        assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer), 0, "timer_create");
        let period = libc::timespec { tv_sec: 0, tv_nsec: TIMER_NS };
        let times = libc::itimerspec { it_interval: period, it_value: period };
        assert_eq!(libc::timer_settime(timer, 0, &times, ptr::null_mut()), 0, "timer_settime");
        timer
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: made by `start_timer`, deleted once; the handlers and the stack are those that were there before.
        unsafe {
            libc::timer_delete(self.timer);
            for (signal, old) in SIGNALS.iter().zip(&*PREVIOUS.0.get()) {
                libc::sigaction(*signal, old, ptr::null_mut());
            }
            libc::sigaltstack(&self.previous_stack, ptr::null_mut());
        }
        for region in REGIONS {
            // SAFETY: our own mapping, used by nobody else.
            unsafe { libc::munmap(region.start as *mut libc::c_void, (region.pages * PAGE) as usize) };
        }
    }
}

/// Gives compiled code the floating-point environment it expects, after a panic in the middle of a guest.
pub fn reset_floating_point() {
    let mxcsr: u32 = 0x1F80;
    // SAFETY: the default environment of the System V ABI.
    unsafe { std::arch::asm!("fninit", "ldmxcsr [{}]", in(reg) &mxcsr, options(nostack)) };
}

/// Brings an XSAVE image to the form of `CpuState`: all components present, nothing of the host's addresses.
fn normalised(area: &[u8; XSAVE_SIZE]) -> XsaveImage {
    let mut image = Registers::default().fpu;
    let present = area[512];
    if present & 1 != 0 {
        image.0[0..6].copy_from_slice(&area[0..6]);
        for register in 0..8 {
            let at = 32 + register * 16;
            image.0[at..at + 10].copy_from_slice(&area[at..at + 10]);
        }
    } else {
        image.0[28..32].fill(0);
    }
    image.0[24..28].copy_from_slice(&area[24..28]);
    image.0[28..32].copy_from_slice(&0xFFFFu32.to_le_bytes());
    if present & 2 != 0 {
        image.0[160..416].copy_from_slice(&area[160..416]);
    }
    if present & 4 != 0 {
        image.0[576..832].copy_from_slice(&area[576..832]);
    }
    image
}

impl Executor for Native {
    fn run(&mut self, case: &Case) -> Result<Outcome, Refusal> {
        self.restore_memory(false);
        for (address, bytes) in
            case.pokes.iter().map(|(a, b)| (*a, b.as_slice())).chain([(case.registers.rip, case.code.as_slice())])
        {
            for (offset, byte) in bytes.iter().enumerate() {
                let at = address.wrapping_add(offset as u64);
                let writable =
                    REGIONS.iter().any(|r| r.rights != Rights::ReadOnly && at.wrapping_sub(r.start) < r.pages * PAGE);
                if writable {
                    // SAFETY: inside a writable mapping of ours.
                    unsafe { (at as *mut u8).write(*byte) };
                }
            }
        }
        let corrects = self.corrects_scans && case.instructions.iter().any(scans);
        let stepping = self.count || corrects;
        assert_eq!(case.registers.rflags & 0x4000, 0, "NT");
        let r = &case.registers;
        // SAFETY: RUNNER is held, so nobody else uses the context; no signal of ours is on its way.
        let context = unsafe { &mut *CONTEXT.0.get() };
        context.fpu = r.fpu.0;
        context.gpr = r.gpr;
        let cs = if case.bits == 64 { USER_CS } else { USER_CS_32 };
        context.frame = [r.rip, cs, r.rflags | if stepping { TF } else { 0 }, r.gpr[4], USER_SS];
        context.fs_base = r.fs_gs_base[0];
        context.gs_base = r.fs_gs_base[1];
        context.stepping = stepping as u64;
        context.last_rip = r.rip;
        context.last_flags = r.rflags;
        context.corrects_scans = corrects as u64;
        context.bits = case.bits.into();
        context.steps = 0;
        context.run += 1;
        context.data_selector = if case.bits == 64 { 0 } else { USER_SS };
        let context: *mut Context = context;
        // SAFETY: the case's code is user-mode code generated to touch our regions only, ends in an exception, and
        // its registers are all saved and restored by enter/leave.
        unsafe { enter(context) };
        // SAFETY: as above, and the handler is done.
        let context = unsafe { &*context };
        let captured = &context.captured;
        if captured.vector == ENDLESS {
            return Err(Refusal::Endless);
        }
        let vector = captured.vector as u8;
        Ok(Outcome {
            registers: Registers {
                gpr: captured.gpr,
                rip: captured.rip,
                rflags: captured.rflags & !TF,
                fs_gs_base: [captured.fs_base, captured.gs_base],
                fpu: normalised(&captured.fpu),
            },
            ending: Ending {
                vector,
                error_code: if matches!(vector, 8 | 10..=14 | 17) { captured.error_code as u32 } else { 0 },
                address: if vector == 14 { captured.address } else { 0 },
            },
            retired: stepping.then_some(context.steps + (vector == 3) as u64),
        })
    }

    fn page(&self, linear: u64) -> &[u8] {
        assert!(pages().any(|(page, _)| page == linear & !(PAGE - 1)), "{linear:#x} is not a test page");
        // SAFETY: a readable page of our mappings, which live as long as self; nothing runs meanwhile.
        unsafe { std::slice::from_raw_parts((linear & !(PAGE - 1)) as *const u8, PAGE as usize) }
    }
}

const _: () = assert!(offset_of!(Context, fpu) == 0 && size_of::<Context>().is_multiple_of(64) && PAGES == 12);
