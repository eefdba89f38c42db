//! `pantala mount`, `pantala umount`, `pantala mounts`: lazy mounts of the node on this machine.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use pantala_wire::name::ImageReference;
use serde::Serialize;
use tokio::net::UnixStream;

use super::args::{MountArgs, MountsArgs, UmountArgs};
use super::failure::Failure;
use super::get::auth;
use super::http as node_http;
use super::output::{plain, say, table};
use crate::config::{ByteSize, Config};
use crate::lazy::MountSummary;
use crate::lazy::operator::{MountBody, UnmountBody, socket_in};

/// An answer is a summary or a sentence.
const ANSWER_BYTES_MAX: usize = 1 << 20;

pub(super) fn mount(args: &MountArgs) -> Result<(), Failure> {
    let config = Config::load(args.config.as_deref())?;
    let image: ImageReference = args.image.parse().map_err(|e| {
        Failure::usage(format!("{:?} is not an image reference: {e}", args.image))
            .hint("write HOST/REPOSITORY:TAG")
    })?;
    let login = auth::login(args.user.as_deref())?;
    let credential = match login {
        Some(login) => login,
        None => auth::stored(
            args.auth_file.as_deref(),
            &image.registry,
            image.repository.as_str(),
        )?,
    };
    let body = MountBody {
        image: args.image.clone(),
        at: directory(&args.dir)?,
    };
    let mut request = ask("/mounts", &body)?;
    if let Some(value) = credential.basic_authorization() {
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    let answer = super::runtime()?.block_on(send(&config, request))?;
    let summary: MountSummary = serde_json::from_slice(&answer).map_err(|e| strange(&e))?;
    say(&format!(
        "{} is mounted on {}: {} of {} are here\n",
        plain(&summary.image),
        summary.at.display(),
        ByteSize(summary.held_bytes),
        ByteSize(summary.size_bytes),
    ))
}

pub(super) fn umount(args: &UmountArgs) -> Result<(), Failure> {
    let config = Config::load(args.config.as_deref())?;
    let body = UnmountBody {
        at: directory(&args.dir)?,
    };
    let request = ask("/unmount", &body)?;
    super::runtime()?.block_on(send(&config, request))?;
    Ok(())
}

pub(super) fn mounts(args: &MountsArgs) -> Result<(), Failure> {
    let admin = match args.admin {
        Some(admin) => admin,
        None => Config::load(args.config.as_deref())?.admin.listen,
    };
    let body = super::runtime()?.block_on(node_http::get(admin, "/mounts"))?;
    let mounts: Vec<MountSummary> = serde_json::from_slice(&body).map_err(|e| strange(&e))?;
    if args.json {
        let value: serde_json::Value = serde_json::from_slice(&body).map_err(|e| strange(&e))?;
        return say(&format!("{value:#}\n"));
    }
    say(&render(&mounts))
}

fn render(mounts: &[MountSummary]) -> String {
    if mounts.is_empty() {
        return "nothing is mounted\n".into();
    }
    let row = |mount: &MountSummary| {
        let size = |bytes| ByteSize(bytes).to_string();
        vec![
            mount.at.display().to_string(),
            plain(&mount.image),
            plain(&mount.state),
            size(mount.held_bytes),
            size(mount.size_bytes),
            mount.totals.faults.to_string(),
            size(mount.totals.local_bytes),
            size(mount.totals.remote_bytes),
            mount.totals.failed.to_string(),
        ]
    };
    let rows: Vec<_> = mounts.iter().map(row).collect();
    let head = [
        "DIRECTORY",
        "IMAGE",
        "STATE",
        "HELD",
        "SIZE",
        "FAULTS",
        "LOCAL",
        "REMOTE",
        "FAILED",
    ];
    let mut text = table(&head, &rows);
    if mounts.iter().any(|mount| mount.state == "poisoned") {
        text.push_str(
            "\npoisoned: the node and its supervisor died together, and reads may have given zeros in place of data.\n\
             The mount is taken down. End what used it, then `pantala umount DIR` and mount it again.\n",
        );
    }
    text
}

/// The directory's own name. One that does not exist (any more) is passed on as it is.
fn directory(dir: &Path) -> Result<String, Failure> {
    let absolute =
        std::path::absolute(dir).map_err(|e| Failure::usage(format!("{}: {e}", dir.display())))?;
    let own: PathBuf = absolute.canonicalize().unwrap_or(absolute);
    own.into_os_string().into_string().map_err(|name| {
        Failure::usage(format!("{} is not valid UTF-8", Path::new(&name).display()))
    })
}

fn strange(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("the node's answer is not understood: {error}"))
        .hint("is the node of another version than this program?")
}

fn ask(path: &str, body: &impl Serialize) -> Result<Request<Full<Bytes>>, Failure> {
    let body = serde_json::to_vec(body).map_err(|e| strange(&e))?;
    Request::post(path)
        .header(header::HOST, "node")
        .body(Full::new(body.into()))
        .map_err(|e| strange(&e))
}

/// A mount takes as long as its metadata; the node sets the limits.
async fn send(config: &Config, request: Request<Full<Bytes>>) -> Result<Bytes, Failure> {
    let dir = config.data_dir.join("lazy");
    let no_node = |e: std::io::Error| {
        Failure::new(format!("no node listens in {}: {e}", dir.display()))
            .hint("start it, give its --config, and run this as the user that it runs as")
    };
    let (_dir, path) = socket_in(&dir).map_err(no_node)?;
    let stream = UnixStream::connect(path).await.map_err(no_node)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| strange(&e))?;
    let connection = tokio::spawn(connection);
    let answer = sender
        .send_request(request)
        .await
        .map_err(|e| Failure::new(format!("the node ended the connection: {e}")))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
        .collect()
        .await
        .map_err(|e| strange(&e))?;
    connection.abort();
    let body = body.to_bytes();
    match status {
        StatusCode::OK => Ok(body),
        _ => Err(Failure::new(plain(&String::from_utf8_lossy(&body)))),
    }
}
