//! The program that `cargo xtask kernel-test` runs in an emulated machine: its `init`, its tests, and their helpers.
//!
//! It is linked statically and is the only program there. `image DIR BYTES` runs outside and makes what the tests mount.

mod init;
#[path = "../../tests/mounts/mod.rs"]
mod mounts;
mod tests;
mod worker;

use std::path::Path;
use std::process::ExitCode;

use mounts::image::{Image, digest_of};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["image", dir, bytes] => make_image(Path::new(dir), bytes),
        ["digest", paths @ ..] => digest(paths),
        ["test", name] => tests::run(name),
        ["worker", life, at] => worker::run(life, Path::new(at)),
        // The kernel passes words of its command line on.
        _ if std::process::id() == 1 => init::run(),
        _ => {
            eprintln!("this is the test program of `cargo xtask kernel-test`");
            ExitCode::FAILURE
        }
    }
}

fn make_image(dir: &Path, bytes: &str) -> ExitCode {
    let make = || {
        let bytes = bytes.parse().map_err(std::io::Error::other)?;
        let own = std::env::current_exe()?;
        let image = Image::make(dir, bytes, Some(&own))?;
        image.write_list(&dir.join("list"))
    };
    match make() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot make an image in {}: {error}", dir.display());
            ExitCode::FAILURE
        }
    }
}

/// What sha256sum does.
fn digest(paths: &[&str]) -> ExitCode {
    for path in paths {
        match std::fs::read(path) {
            Ok(bytes) => println!("{}  {path}", digest_of(&bytes)),
            Err(error) => {
                eprintln!("{path}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
