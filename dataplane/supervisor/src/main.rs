//! `pantala-supervisor DIR`: keeps the descriptors of lazy mounts. The node starts it; nobody needs to.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(dir), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: pantala-supervisor DIR (the node starts it where it is needed)");
        return ExitCode::from(2);
    };
    // A session of its own: what ends the daemon's terminal or group of processes does not end this.
    if let Err(error) = rustix::process::setsid() {
        eprintln!("not in a session of its own, which may end it early: {error}");
    }
    // Short of memory, the kernel shall look elsewhere: this process has next to none to give.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        eprintln!("not protected from the end by lack of memory: {error}");
    }
    // A descriptor for each file that is kept and each read that waits; the usual limit is 1024.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised) {
        eprintln!("the limit of open files stays low: {error}");
    }
    match pantala_supervisor::serve::serve(Path::new(&dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pantala-supervisor {}: {error}", dir.display());
            ExitCode::FAILURE
        }
    }
}
