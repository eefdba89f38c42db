//! A tree of real files, the image made of it, and programs that read it where it is mounted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::process::Child;

use crate::e2e::Stage;
use crate::rig::files::gather;
use crate::rig::image::{Image, digest_of};
use crate::rig::lazy::mkfs;
use crate::rig::process::run_to_end;

/// Programs of the tree that are executed; each says its version and ends.
const PROGRAMS: [&str; 12] = [
    "ls", "cat", "sort", "sed", "grep", "tar", "find", "cp", "od", "tr", "wc", "env",
];
/// Smaller than a page fault's read-ahead, so that the reads of one file go to many places of the device.
const CHUNK_BYTES: u32 = 4096;
/// How long any reader may take, on a slow machine and with faults on the way.
pub(super) const READ_MAX: Duration = Duration::from_secs(240);
/// Maps each file and hashes what it sees there.
const MMAP_READER: &str = "
import hashlib, mmap, sys
for line in open(sys.argv[1]):
    wanted, path = line.rstrip('\\n').split('  ', 1)
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        if hashlib.sha256(mapped).hexdigest() != wanted:
            sys.exit('another content than in the source: ' + path)
";

/// Files with their sha256, and an image of them.
pub(super) struct Tree {
    pub(super) image: Image,
    /// Paths from the tree's root, with the sha256 of each.
    files: Vec<(PathBuf, String)>,
    lists: PathBuf,
}

/// Shuffles, the same way for the same seed (xorshift64*).
fn shuffle<T>(items: &mut [T], seed: u64) {
    let mut state = seed | 1;
    for last in (1..items.len()).rev() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let number = state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16;
        items.swap(last, number as usize % (last + 1));
    }
}

impl Tree {
    /// Some `megabytes` of this machine's files in `layers` EROFS layers.
    pub(super) fn build(stage: &Stage, megabytes: u64, layers: usize) -> Result<Self> {
        let dir = stage.rig.scratch("tree")?;
        let found = gather(megabytes * 1_000_000);
        ensure!(!found.is_empty(), "no files found to make an image of");
        let programs = PROGRAMS.iter().map(|name| Path::new("/usr/bin").join(name));
        let sources: Vec<PathBuf> = programs.chain(found.into_iter().map(|f| f.path)).collect();
        let mut files = Vec::new();
        let mut pairs = Vec::new();
        for (number, part) in sources.chunks(sources.len().div_ceil(layers)).enumerate() {
            let root = dir.join(format!("root-{number}"));
            for source in part {
                let name = source.strip_prefix("/")?;
                let copy = root.join(name);
                fs::create_dir_all(copy.parent().context("a file has a parent")?)?;
                // A file that vanished or cannot be read is no reason to fail.
                if fs::copy(source, &copy).is_ok() && fs::metadata(&copy)?.len() > 0 {
                    files.push((name.to_owned(), digest_of(&copy)?.0));
                }
            }
            pairs.push(mkfs(&dir, number, &root, CHUNK_BYTES)?);
            fs::remove_dir_all(&root)?;
        }
        Ok(Self {
            image: Image::erofs(&dir.join("layout"), &pairs)?,
            files,
            lists: dir,
        })
    }

    /// Bytes of all layers.
    pub(super) fn bytes(&self) -> u64 {
        self.image.layers.iter().map(|layer| layer.bytes).sum()
    }

    /// Writes a list of all files below `at`, for `sha256sum --check`, in the order that `seed` says.
    fn list(&self, at: &Path, seed: u64) -> Result<PathBuf> {
        let mut lines: Vec<String> = self
            .files
            .iter()
            .map(|(name, digest)| {
                let hex = digest.trim_start_matches("sha256:");
                format!("{hex}  {}\n", at.join(name).display())
            })
            .collect();
        shuffle(&mut lines, seed);
        let name = at.to_string_lossy().replace('/', "-");
        let path = self.lists.join(format!("list{name}-{seed}"));
        fs::write(&path, lines.concat())?;
        Ok(path)
    }

    /// A process that reads every file and compares its sha256.
    pub(super) fn reader(&self, at: &Path, seed: u64) -> Result<Command> {
        let mut command = Command::new("sha256sum");
        command
            .args(["--check", "--quiet"])
            .arg(self.list(at, seed)?);
        Ok(command)
    }

    /// The same through mappings.
    pub(super) fn mapping_reader(&self, at: &Path, seed: u64) -> Result<Command> {
        let mut command = Command::new("python3");
        command.args(["-c", MMAP_READER]).arg(self.list(at, seed)?);
        Ok(command)
    }

    /// Reads all by `readers` processes of each kind at once, and executes the programs meanwhile.
    pub(super) async fn verify(&self, at: &Path, readers: u64, seed: u64) -> Result<()> {
        let mut commands = Vec::new();
        for number in 0..readers {
            commands.push(self.reader(at, seed + number)?);
            commands.push(self.mapping_reader(at, seed + 1000 + number)?);
        }
        let reads = commands.into_iter().map(|command| async move {
            let what = format!("{command:?}");
            run_to_end(command, READ_MAX).await?.ok(&what)
        });
        let executions = PROGRAMS.iter().map(|name| execute(at, name));
        let (reads, executions) = tokio::join!(
            futures_util::future::join_all(reads),
            futures_util::future::join_all(executions)
        );
        for ended in reads {
            ended?;
        }
        executions.into_iter().collect()
    }
}

/// Runs the program of the mount; it must do what this machine's own does.
async fn execute(at: &Path, name: &str) -> Result<()> {
    let own = Path::new("/usr/bin").join(name);
    let version = |program: PathBuf| {
        let mut command = Command::new(program);
        command.arg("--version");
        run_to_end(command, READ_MAX)
    };
    let here = version(own.clone())
        .await?
        .ok("a program of this machine")?;
    let there = version(at.join(own.strip_prefix("/")?)).await?;
    let there = there.ok(&format!("executing {name} of the mount"))?;
    // The name that it was called by may be in it.
    let plain = |text: &str| text.replace(&at.display().to_string(), "");
    ensure!(
        plain(&there.output) == plain(&here.output),
        "{name} of the mount says {:?}",
        there.output
    );
    Ok(())
}

/// Starts `command` in the background; it is killed when the result is dropped.
pub(super) fn start(command: Command) -> Result<Child> {
    let described = format!("{command:?}");
    tokio::process::Command::from(command)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {described}"))
}

/// Waits for it; what it said, where it failed.
pub(super) async fn end(child: Child, what: &str) -> Result<Result<(), String>> {
    let Ok(output) = tokio::time::timeout(READ_MAX, child.wait_with_output()).await else {
        bail!("{what} has not ended within {READ_MAX:?}");
    };
    let output = output?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let last: Vec<&str> = said.lines().rev().take(5).collect();
    Ok(Err(format!("{}: {}", output.status, last.join(" | "))))
}
