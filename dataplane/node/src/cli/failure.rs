//! How a command fails: one line of what, one line of what to do, one exit code.

use std::fmt;

use crate::config::ConfigError;

/// What was asked for was not achieved.
pub(super) const FAILED: u8 = 1;
/// The command line or the configuration is wrong; nothing was tried. The same as clap's.
pub(super) const USAGE: u8 = 2;

/// A failure as the user meets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    /// What was asked for was not achieved.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            code: FAILED,
        }
    }

    /// What was asked for cannot be asked for.
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            code: USAGE,
            ..Self::new(message)
        }
    }

    /// A result that was printed already and is bad.
    pub(super) fn silent() -> Self {
        Self::new("")
    }

    /// With what was being done in front.
    #[must_use]
    pub(super) fn prefixed(mut self, doing: &str) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// With what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The exit code of the process.
    pub(super) fn code(&self) -> u8 {
        self.code
    }

    pub(super) fn print(&self) {
        if !self.message.is_empty() {
            eprintln!("{self}");
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(error.to_string()).hint(error.hint())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(failure) => failure,
            Err(error) => Self::new(format!("{error:#}")),
        }
    }
}

/// A failure to read or write `path`, with what usually helps.
pub(super) fn about_file(doing: &str, path: &std::path::Path, error: &std::io::Error) -> Failure {
    let failure = Failure::new(format!("cannot {doing} {}: {error}", path.display()));
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => failure.hint("run the command as root"),
        std::io::ErrorKind::StorageFull => failure.hint("free some space on that file system"),
        std::io::ErrorKind::NotFound => failure.hint("check the path"),
        _ => failure,
    }
}
