//! Parse, run, exit code.

use std::process::ExitCode;

use clap::Parser;
use proxytune::Error;
use proxytune::cli::{self, Cli};
use proxytune::console;

/// Tensors of a few sizes come and go all the time. This allocator gives what was freed last, which the caches still have.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Something was set aside or warned about, but the command did what it was asked.
const EXIT_WITH_WARNINGS: u8 = 3;

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { proxytune::nn::prepare_process() };
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => {
            let code = usage.exit_code() as u8;
            return cli::explain(&usage).map_or_else(failed, |()| ExitCode::from(code));
        }
    };
    // The main thread's stack is the system's choice.
    let work = std::thread::Builder::new()
        .stack_size(proxytune::STACK)
        .spawn(|| cli::dispatch(cli));
    let ended = work.map_err(Error::io("a thread for the command"));
    let ended = ended.and_then(|work| {
        work.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    match ended {
        Ok(cli::Ended::Well) => ExitCode::SUCCESS,
        Ok(cli::Ended::WithWarnings) => ExitCode::from(EXIT_WITH_WARNINGS),
        Err(error) => failed(error),
    }
}

fn failed(error: Error) -> ExitCode {
    console::note(format!("error: {error}"));
    if let Some(hint) = error.hint() {
        console::note(format!("hint: {hint}"));
    }
    match error {
        Error::Interrupted => ExitCode::from(130),
        Error::Config(_) | Error::Unusable(_) => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    }
}
