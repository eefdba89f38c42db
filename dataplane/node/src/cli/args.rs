//! What can be typed.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use pantala_wire::BlobDigest;

pub(super) use super::convert::ConvertArgs;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  not achieved: the error on stderr says why and what to do
  2  wrong command line or configuration; nothing was tried";

/// Carries container images to many machines: each takes what it needs from its nearest peers, and
/// the registry is read once.
#[derive(Debug, Parser)]
#[command(name = "pantala", version, max_term_width = 100, after_help = EXIT_CODES)]
#[command(after_long_help = format!("\
Examples:
  pantala node                            run a node; needs no configuration on one machine
  pantala setup containerd --all          make containerd pull through it
  pantala get nginx:1.27 -o nginx         fetch an image through it, as an OCI layout
  pantala status                          what it does, and where the bytes come from
  pantala doctor                          what this machine allows, and what to do about the rest

{EXIT_CODES}"))]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a node in the foreground
    Node(NodeArgs),
    /// Fetch an image or a file, verified, and say where its bytes came from
    Get(GetArgs),
    /// Mount an image now, and have the node fetch what is read of it
    Mount(MountArgs),
    /// Take such a mount down
    Umount(UmountArgs),
    /// Show what is mounted, and what its readers waited for
    Mounts(MountsArgs),
    /// Turn an OCI image into EROFS layers that can be mounted lazily, and push it
    Convert(ConvertArgs),
    /// Show what a running node does: tasks, peers, bytes by origin
    Status(StatusArgs),
    /// Watch peers, paths and tasks of a running node
    Top(TopArgs),
    /// Make a container runtime pull through the node
    Setup(SetupArgs),
    /// Check what the kernel, rights and settings of this machine allow
    Doctor(DoctorArgs),
}

/// `pantala node`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pantala node                                 one machine, defaults
  pantala node --config /etc/pantala/n1.toml

Without --config, /etc/pantala/pantala.toml is read if it exists. SIGTERM ends the node cleanly.")]
pub struct NodeArgs {
    /// Configuration file (every key is explained in pantala.example.toml)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `pantala get`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pantala get nginx:1.27 -o nginx                         an OCI image layout (a directory)
  pantala get registry.test:5000/app@sha256:... -o app.tar  an OCI archive
  pantala get quay.io/team/app:v1 --platform linux/arm64 -o app
  pantala get r.test/private:v1 --user me --password-stdin -o p < password.txt
  pantala get https://files.test/model.bin --digest sha256:... -o model.bin

Images come through the node on this machine if one answers, else from the registry; the last line
says which. Files come from their source. Every digest is verified; PATH appears only when all is
complete. An interrupted image, or file with --digest, is taken up where it stopped.")]
pub struct GetArgs {
    /// Image reference, or http(s) address
    #[arg(value_name = "IMAGE|URL")]
    pub what: String,
    /// Where to write: a directory for an image, an archive if it ends in .tar
    #[arg(long, short, value_name = "PATH")]
    pub output: PathBuf,
    /// The digest that the manifest (or index) or the file must have
    #[arg(long, value_name = "sha256:HEX")]
    pub digest: Option<BlobDigest>,
    /// Platform of the image [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub platform: Option<String>,
    /// User to log in as
    #[arg(long, requires = "password_stdin")]
    pub user: Option<String>,
    /// Read the password from stdin
    #[arg(long, requires = "user")]
    pub password_stdin: bool,
    /// Logins in the format of docker and podman [default: where those keep them]
    #[arg(long, value_name = "FILE", conflicts_with = "user")]
    pub auth_file: Option<PathBuf>,
    /// Address of the node's mirror [default: mirror.listen of the configuration]
    #[arg(long, value_name = "IP:PORT")]
    pub node: Option<SocketAddr>,
    /// Go to the registry directly
    #[arg(long, conflicts_with = "node")]
    pub no_node: bool,
    /// The registry speaks HTTP, not HTTPS; implies --no-node
    #[arg(long, conflicts_with = "node")]
    pub plain_http: bool,
    /// Configuration file with the node's addresses and the registries
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the result for programs
    #[arg(long)]
    pub json: bool,
}

/// `pantala mount`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pantala mount registry.test:5000/app:v1-erofs /mnt/app
  pantala mount r.test/private:v1 /mnt/p --user me --password-stdin < password.txt

The image must have been made for it: EROFS metadata and data layers. The mount outlives the node's
restarts; `pantala umount` ends it. Run it as the user that the node runs as (root).")]
pub struct MountArgs {
    /// Image reference
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// Directory to mount on
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// User to log in as
    #[arg(long, requires = "password_stdin")]
    pub user: Option<String>,
    /// Read the password from stdin
    #[arg(long, requires = "user")]
    pub password_stdin: bool,
    /// Logins in the format of docker and podman [default: where those keep them]
    #[arg(long, value_name = "FILE", conflicts_with = "user")]
    pub auth_file: Option<PathBuf>,
    /// Configuration file of the node
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `pantala umount`
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// Directory of the mount
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Configuration file of the node
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `pantala mounts`
#[derive(Debug, Args)]
#[command(after_help = "\
LOCAL and REMOTE are the bytes that readers waited for since the node was started: those on this disk,
and those that had to come from peers or the registry. A read that FAILED got EIO.")]
pub struct MountsArgs {
    /// Print the node's own JSON
    #[arg(long)]
    pub json: bool,
    /// Admin address of the node [default: admin.listen of the configuration]
    #[arg(long, value_name = "IP:PORT")]
    pub admin: Option<SocketAddr>,
    /// Configuration file that names the admin address
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    pub config: Option<PathBuf>,
}

/// `pantala status`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pantala status
  pantala status --peers
  pantala status --json | jq .totals
  pantala status --admin 10.0.0.7:65002")]
pub struct StatusArgs {
    /// Print the node's own JSON
    #[arg(long)]
    pub json: bool,
    /// Show what the path to each peer delivers
    #[arg(long, conflicts_with = "json")]
    pub peers: bool,
    /// Admin address of the node [default: admin.listen of the configuration]
    #[arg(long, value_name = "IP:PORT")]
    pub admin: Option<SocketAddr>,
    /// Configuration file that names the admin address
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    pub config: Option<PathBuf>,
}

/// `pantala top`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pantala top
  pantala top --admin 10.0.0.7:65002

q or Ctrl-C ends it.")]
pub struct TopArgs {
    /// Admin address of the node [default: admin.listen of the configuration]
    #[arg(long, value_name = "IP:PORT")]
    pub admin: Option<SocketAddr>,
    /// Configuration file that names the admin address
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    pub config: Option<PathBuf>,
}

/// `pantala setup`
#[derive(Debug, Args)]
pub struct SetupArgs {
    /// Which runtime.
    #[command(subcommand)]
    pub runtime: Runtime,
}

/// Which runtime to set up.
#[derive(Debug, Subcommand)]
pub enum Runtime {
    /// Write certs.d/HOST/hosts.toml for containerd, or tell it of the snapshotter
    Containerd(ContainerdArgs),
}

/// `pantala setup containerd`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pantala setup containerd --all                          every registry
  pantala setup containerd --registry docker.io --registry quay.io
  pantala setup containerd --registry r.test:5000=http://10.0.0.5:5000
  pantala setup containerd --all --dry-run                only show the changes
  pantala setup containerd --undo                         take everything back
  pantala setup containerd --snapshotter                  tell containerd of the node's snapshotter
  pantala setup containerd --snapshotter --undo           and take that back

The changes are shown first and made after a yes. containerd reads these files at each pull and needs
no restart for them. It asks the node first and goes to the registry itself if the node is down.")]
pub struct ContainerdArgs {
    /// Registry to pull through the node, as in image names; with =URL if it is not at https://HOST
    #[arg(long, value_name = "HOST[=URL]", required_unless_present_any = ["all", "undo", "snapshotter"])]
    pub registry: Vec<String>,
    /// All registries that have no file of their own (certs.d/_default)
    #[arg(long)]
    pub all: bool,
    /// Name the node's snapshotter in containerd's own configuration
    #[arg(long, conflicts_with_all = ["registry", "all"])]
    pub snapshotter: bool,
    /// Where containerd looks for hosts.toml files
    #[arg(long, value_name = "DIR", default_value = "/etc/containerd/certs.d")]
    pub certs_dir: PathBuf,
    /// Address of the node's mirror
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:65001")]
    pub mirror: String,
    /// containerd's own configuration: checked that it reads the directory, or changed for the snapshotter
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/containerd/config.toml"
    )]
    pub containerd_config: PathBuf,
    /// The node's configuration, to check that it serves these registries or has a snapshotter
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Restore the files as they were before the setup
    #[arg(long)]
    pub undo: bool,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
    /// Show the changes and make none
    #[arg(long, alias = "print")]
    pub dry_run: bool,
}

/// `pantala doctor`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pantala doctor
  pantala doctor --json | jq '.checks[] | select(.level != \"ok\")'

Run it as the user that the node runs as. Exit code 1 means that a check found a problem; a warning
means that the node works, but not as well as it could.")]
pub struct DoctorArgs {
    /// Configuration file of the node
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the result for programs
    #[arg(long)]
    pub json: bool,
    /// containerd's configuration
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/containerd/config.toml"
    )]
    pub containerd_config: PathBuf,
}
