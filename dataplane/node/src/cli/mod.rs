//! The command line: what people type, what they are told, and the exit code.
//!
//! Each command returns a [`Failure`] that says what went wrong and what to do about it; this
//! module alone prints it. Results go to stdout, everything else to stderr.

mod args;
mod convert;
mod doctor;
mod failure;
mod get;
mod http;
mod mount;
mod output;
mod setup;
mod status;
mod top;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::config::Config;
pub use args::{Cli, Command};
pub use failure::Failure;

/// Runs the program on this process's arguments.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are results, not errors. A closed pipe leaves nobody to tell.
            let _ = e.print();
            return match e.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(failure::USAGE),
            };
        }
    };
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print();
            ExitCode::from(failure.code())
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Node(args) => {
            let config = Config::load(args.config.as_deref())?;
            crate::daemon::run(config).map_err(Failure::from)
        }
        Command::Get(args) => get::run(&args),
        Command::Mount(args) => mount::mount(&args),
        Command::Umount(args) => mount::umount(&args),
        Command::Mounts(args) => mount::mounts(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Setup(args) => setup::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    }
}

/// A runtime for the commands that talk to someone.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(format!("cannot start: {e}")))
}
