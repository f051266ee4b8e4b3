//! Measuring as on a lesser processor: AVX-512 is hidden from everything in this process that asks what there is, the
//! libraries for matrix products included. Linux lets `cpuid` fault on Intel processors (`arch_prctl(2)`), and the
//! handler answers in its place.

use clap::ValueEnum;

use crate::{Error, Result};

/// Which vector instructions both sides may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Instructions {
    /// All that the processor has
    Native,
    /// AVX2 and FMA, as on processors without AVX-512
    Avx2,
}

impl Instructions {
    /// Settles it for this process: to be called before anything has asked what the processor has.
    ///
    /// # Errors
    /// When the processor or the system cannot hide instructions, or something has asked already.
    pub fn settle(self) -> Result<()> {
        match self {
            Instructions::Native => Ok(()),
            Instructions::Avx2 => hidden::hide_avx512().map_err(|what| {
                let hint = "Linux on an Intel processor can; elsewhere leave --instructions out";
                Error::invalid(format!("AVX-512 cannot be hidden: {what}"), hint)
            }),
        }
    }

    /// What says the same to torch and its libraries.
    pub fn variables(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Instructions::Native => &[],
            Instructions::Avx2 => &[
                ("ATEN_CPU_CAPABILITY", "avx2"),
                ("ONEDNN_MAX_CPU_ISA", "AVX2"),
                ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
            ],
        }
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
mod hidden {
    pub fn hide_avx512() -> std::result::Result<(), String> {
        Err("this is not Linux on x86-64".into())
    }
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod hidden {
    use std::arch::x86_64::__cpuid_count;
    use std::io::Error;

    /// `arch_prctl`'s name for whether `cpuid` may run.
    const SET_CPUID: libc::c_int = 0x1012;

    /// The bits of leaf 7 that belong to AVX-512 and AMX, in ebx, ecx and edx, and those of its second part in eax.
    const EBX: u32 = 1 << 16 | 1 << 17 | 1 << 21 | 0b111 << 26 | 0b11 << 30;
    const ECX: u32 = 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14;
    const EDX: u32 = 1 << 2 | 1 << 3 | 1 << 8 | 0b1111 << 22;
    const EAX_OF_SECOND: u32 = 1 << 4 | 1 << 5 | 1 << 21;

    pub fn hide_avx512() -> Result<(), String> {
        // SAFETY: all zeros are a valid action; its fields are set as sigaction(2) asks, and the handler has the form
        // that SA_SIGINFO stands for.
        let failed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = answer as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut()) != 0 || !set_cpuid(false)
        };
        if failed {
            return Err(Error::last_os_error().to_string());
        }
        match is_x86_feature_detected!("avx512f") {
            true => Err("something has asked for it already".into()),
            false => Ok(()),
        }
    }

    fn set_cpuid(runs: bool) -> bool {
        // SAFETY: the call takes two numbers.
        unsafe { libc::syscall(libc::SYS_arch_prctl, SET_CPUID, libc::c_ulong::from(runs)) == 0 }
    }

    /// Answers a `cpuid` that faulted; any other fault happens again, with the system's own answer.
    extern "C" fn answer(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        const CPUID: [u8; 2] = [0x0f, 0xa2];
        // SAFETY: the system hands a handler of this form its context; the instruction that faulted can be read.
        unsafe {
            let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
            let at = registers[libc::REG_RIP as usize] as *const [u8; 2];
            if at.read_unaligned() != CPUID {
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                return;
            }
            let leaf = registers[libc::REG_RAX as usize] as u32;
            let part = registers[libc::REG_RCX as usize] as u32;
            set_cpuid(true);
            let mut found = __cpuid_count(leaf, part);
            set_cpuid(false);
            match (leaf, part) {
                (7, 0) => {
                    found.ebx &= !EBX;
                    found.ecx &= !ECX;
                    found.edx &= !EDX;
                }
                (7, 1) => found.eax &= !EAX_OF_SECOND,
                _ => {}
            }
            for (register, value) in [
                (libc::REG_RAX, found.eax),
                (libc::REG_RBX, found.ebx),
                (libc::REG_RCX, found.ecx),
                (libc::REG_RDX, found.edx),
            ] {
                registers[register as usize] = i64::from(value);
            }
            registers[libc::REG_RIP as usize] += 2;
        }
    }
}
