//! `pantala convert`: an OCI image as EROFS layers, which can be mounted before their data has arrived.
//!
//! Each layer becomes two blobs, an EROFS image with all metadata and the device with all data. Everything
//! happens in a private temporary folder, which is removed at the end; a process that is killed leaves it.

mod archive;
mod document;
mod erofs;
mod push;
#[cfg(test)]
mod tests;
mod unpack;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use pantala_source::{Source, Upstream};
use pantala_wire::BlobDigest;
use pantala_wire::name::{ImageReference, ManifestReference};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::args::GetArgs;
use super::failure::{Failure, about_file};
use super::get::{self, Progress};
use super::output::say;
use crate::config::{ByteSize, Config};
use document::{Made, Plan};
use push::Target;

/// A registry that stores what it was sent answers late.
const PUSH_ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// `pantala convert`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pantala convert nginx:1.27 r.test:5000/nginx:1.27-erofs
  pantala convert r.test:5000/app:v1 r.test:5000/app:v1-erofs --plain-http --target-plain-http
  pantala convert quay.io/team/app:v1 r.test/app:v1 --platform linux/arm64 --json | jq -r .digest

Each layer becomes an EROFS image with its metadata and a blob with its data. IMAGE comes as with
`pantala get`; the logins of podman, skopeo and docker are used for both registries. The same image
gives the same digests. Needs root (owners, devices), mkfs.erofs (erofs-utils 1.5 or later), and in the
working folder the space of the image, of all its layers unpacked, and of the largest once more.")]
pub struct ConvertArgs {
    /// Image to convert
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// Name for the converted image, with a tag
    #[arg(value_name = "TARGET")]
    pub target: String,
    /// Platform of the image [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub platform: Option<String>,
    /// User to log in as, at both registries
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
    /// Read IMAGE from its registry directly
    #[arg(long, conflicts_with = "node")]
    pub no_node: bool,
    /// IMAGE's registry speaks HTTP, not HTTPS; implies --no-node
    #[arg(long, conflicts_with = "node")]
    pub plain_http: bool,
    /// TARGET's registry speaks HTTP, not HTTPS
    #[arg(long)]
    pub target_plain_http: bool,
    /// Folder for temporary files
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    pub work_dir: PathBuf,
    /// The program that makes EROFS images
    #[arg(long, value_name = "PROGRAM", default_value = "mkfs.erofs")]
    pub mkfs: PathBuf,
    /// Configuration file with the node's addresses and the registries
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the result for programs
    #[arg(long)]
    pub json: bool,
}

/// What was made.
#[derive(Debug, Serialize)]
struct Done {
    image: String,
    target: String,
    /// The digest of the new manifest.
    digest: String,
    layers: usize,
    /// What must be local before a mount.
    metadata_bytes: u64,
    /// What comes when it is touched.
    data_bytes: u64,
    /// What the registry did not have yet.
    pushed_bytes: u64,
    seconds: f64,
}

pub(super) fn run(args: &ConvertArgs) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(
            Failure::usage("owners and devices of an image can be kept by root only")
                .hint("run the command as root"),
        );
    }
    let started = Instant::now();
    let config = Config::load(args.config.as_deref())?;
    let get_args = get_args(args);
    let login = get::login_of_arguments(&get_args)?;
    let target = target(args, &config, login.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Failure::new(format!("cannot start: {e}")))?;
    let fail = |e: std::io::Error| about_file("create a folder in", &args.work_dir, &e);
    let work = tempfile::Builder::new()
        .prefix("pantala-convert-")
        .tempdir_in(&args.work_dir)
        .map_err(fail)?;
    let layout = work.path().join("image");
    let get_args = GetArgs {
        output: layout.clone(),
        ..get_args
    };
    let digest = runtime.block_on(get::image_layout(&get_args, &config, login))?;
    let layout = Layout(layout);
    let done = convert(args, &layout, &digest, work.path(), &target, &runtime)?;
    let done = Done {
        seconds: started.elapsed().as_secs_f64(),
        ..done
    };
    work.close()
        .map_err(|e| about_file("remove the folder in", &args.work_dir, &e))?;
    match args.json {
        true => {
            let text = serde_json::to_string_pretty(&done)
                .map_err(|e| Failure::new(format!("cannot write the result: {e}")))?;
            say(&format!("{text}\n"))
        }
        false => say(&render(&done)),
    }
}

/// An image layout that `get` has made.
struct Layout(PathBuf);

impl Layout {
    fn blob(&self, digest: &BlobDigest) -> PathBuf {
        self.0.join("blobs/sha256").join(digest.to_hex())
    }
    fn read(&self, digest: &BlobDigest) -> Result<Vec<u8>, Failure> {
        let path = self.blob(digest);
        std::fs::read(&path).map_err(|e| about_file("read", &path, &e))
    }
}

fn convert(
    args: &ConvertArgs,
    layout: &Layout,
    digest: &BlobDigest,
    work: &std::path::Path,
    target: &Target,
    runtime: &tokio::runtime::Runtime,
) -> Result<Done, Failure> {
    let unusable = |e: document::DocumentError| Failure::new(e.to_string());
    let manifest = layout.read(digest)?;
    let config = layout.read(&document::config_digest(&manifest).map_err(unusable)?)?;
    let plan = Plan::new(&manifest, &config).map_err(unusable)?;
    let len =
        |digest: &BlobDigest| std::fs::metadata(layout.blob(digest)).map_or(0, |meta| meta.len());
    let total = plan.layers.iter().map(|(layer, _)| len(layer)).sum();
    let progress = Progress::new("converting", Some(total), !args.json);
    // Layers repeat: empty ones most of all.
    let mut converted = BTreeMap::new();
    for (index, (layer, diff)) in plan.layers.iter().enumerate() {
        if converted.contains_key(layer) {
            progress.add(len(layer));
            continue;
        }
        let dir = work.join(format!("layer-{index}"));
        std::fs::create_dir(&dir).map_err(|e| about_file("create", &dir, &e))?;
        let layer_file = layout.blob(layer);
        let made = erofs::convert(&layer_file, *diff, &dir, &args.mkfs, |bytes| {
            progress.add(bytes);
        })?;
        converted.insert(*layer, made);
    }
    progress.finish();
    let pairs: Vec<_> = plan
        .layers
        .iter()
        .map(|(layer, _)| converted[layer].pair.clone())
        .collect();
    let config = plan.config(&pairs).into_bytes();
    let made_config = made_of(&config);
    let manifest = plan.manifest(&made_config, &pairs).into_bytes();
    let new_digest = made_of(&manifest).digest;
    if matches!(target.image.reference, ManifestReference::Digest(wanted) if wanted != new_digest) {
        return Err(Failure::usage(format!(
            "the converted image is {new_digest}, not what TARGET says"
        ))
        .hint("give TARGET a tag"));
    }
    let metadata_bytes = pairs.iter().map(|pair| pair.metadata.size).sum();
    let data_bytes = pairs
        .iter()
        .filter_map(|pair| pair.data.as_ref())
        .map(|data| data.size)
        .sum();
    let progress = Progress::new("pushing", Some(metadata_bytes + data_bytes), !args.json);
    let pushed_bytes = runtime.block_on(async {
        let mut pushed = 0;
        for layer in converted.values() {
            pushed += target
                .push_file(&layer.pair.metadata, &layer.metadata, &progress)
                .await?;
            if let Some(data) = &layer.pair.data {
                pushed += target.push_file(data, &layer.data, &progress).await?;
            }
        }
        pushed += target.push_bytes(&made_config, config.into()).await?;
        target.push_manifest(manifest.into()).await?;
        Ok::<_, Failure>(pushed)
    })?;
    progress.finish();
    Ok(Done {
        image: args.image.clone(),
        target: target.image.to_string(),
        digest: new_digest.to_string(),
        layers: pairs.len(),
        metadata_bytes,
        data_bytes,
        pushed_bytes,
        seconds: 0.0,
    })
}

fn made_of(bytes: &[u8]) -> Made {
    Made {
        digest: BlobDigest::new(Sha256::digest(bytes).into()),
        size: bytes.len() as u64,
    }
}

fn render(done: &Done) -> String {
    format!(
        "{}\n{}\n{} layers: {} of metadata, {} of data; {} pushed, in {:.1} s\n",
        done.target,
        done.digest,
        done.layers,
        ByteSize(done.metadata_bytes),
        ByteSize(done.data_bytes),
        ByteSize(done.pushed_bytes),
        done.seconds,
    )
}

/// The arguments with which `get` would fetch the image.
fn get_args(args: &ConvertArgs) -> GetArgs {
    GetArgs {
        what: args.image.clone(),
        output: PathBuf::new(),
        digest: None,
        platform: args.platform.clone(),
        user: args.user.clone(),
        password_stdin: args.password_stdin,
        auth_file: args.auth_file.clone(),
        node: args.node,
        no_node: args.no_node,
        plain_http: args.plain_http,
        config: args.config.clone(),
        json: args.json,
    }
}

fn target(
    args: &ConvertArgs,
    config: &Config,
    login: Option<pantala_source::Credential>,
) -> Result<Target, Failure> {
    let image: ImageReference = args.target.parse().map_err(|e| {
        Failure::usage(format!("{:?} is not an image reference: {e}", args.target))
            .hint("write HOST/REPOSITORY:TAG")
    })?;
    let host = &image.registry;
    let text = match (args.target_plain_http, config.registry_url(host)) {
        (true, _) => format!("http://{host}"),
        (false, Some(url)) => url.to_string(),
        (false, None) => host.clone(),
    };
    let upstream: Upstream = text
        .parse()
        .map_err(|e| Failure::usage(format!("{host} cannot be asked: {e}")))?;
    let credential = match login {
        Some(login) => login,
        None => get::stored_login(args.auth_file.as_deref(), host, image.repository.as_str())?,
    };
    let mut source = get::source_config(config);
    source.first_byte_timeout = source.first_byte_timeout.max(PUSH_ANSWER_TIMEOUT);
    Ok(Target {
        source: Source::new(source).map_err(|e| Failure::usage(e.to_string()))?,
        upstream,
        image,
        credential,
    })
}
