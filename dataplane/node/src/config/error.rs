//! What can be wrong with a configuration, and what to do about it.

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {file}: {cause}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{file}:{line}: not valid TOML: {problem}")]
    Syntax {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// What the parser says.
        problem: String,
    },
    /// A key that does not exist.
    #[error("{file}:{line}: unknown key `{key}`")]
    UnknownKey {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// The key with its section.
        key: String,
        /// The nearest key that exists, if one is near.
        nearest: Option<String>,
        /// What may stand in that place.
        known: Vec<String>,
    },
    /// A key whose value has the wrong type.
    #[error("{file}:{line}: `{key}`: {problem}")]
    WrongType {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// The key with its section.
        key: String,
        /// What the parser says.
        problem: String,
    },
    /// A key whose value makes no sense.
    #[error("{file}:{line}: `{key}`: {problem}")]
    Invalid {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// The key with its section.
        key: String,
        /// What is wrong.
        problem: String,
        /// What would be right.
        hint: String,
    },
}

impl ConfigError {
    /// What the user can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Read { cause, .. } if cause.kind() == std::io::ErrorKind::NotFound => {
                "check the path given with --config; without --config the defaults are used".into()
            }
            Self::Read { .. } => "the file must be readable UTF-8 text".into(),
            Self::Syntax { .. } => {
                "texts need quotes, tables are written [section]; see pantala.example.toml".into()
            }
            Self::UnknownKey {
                nearest: Some(nearest),
                ..
            } => format!("did you mean `{nearest}`?"),
            Self::UnknownKey { known, .. } => format!("known here: {}", known.join(", ")),
            Self::WrongType { .. } => {
                "pantala.example.toml shows every key with a value of its type".into()
            }
            Self::Invalid { hint, .. } => hint.clone(),
        }
    }
}
