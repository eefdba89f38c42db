//! Who asks: what an origin is shown, and how it is kept out of logs and off the disk.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a password or token.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// In whose name a request is made.
#[derive(Clone)]
pub enum Credential {
    /// In nobody's name.
    Anonymous {
        /// Whether to fetch an anonymous token where the registry asks for one (Docker Hub does).
        /// Without it, the registry's 401 comes back to the caller, who may know better.
        fetch_tokens: bool,
    },
    /// With a caller's own `Authorization`, passed on as it is; a 401 comes back to the caller.
    Header(HeaderValue),
    /// With a user's password, by whichever scheme the registry asks for.
    Login {
        /// The user's name.
        user: String,
        /// The password or access token.
        password: Secret,
    },
}

/// A number for a credential that gives nothing of it away without the key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CredentialFingerprint([u8; 32]);

impl fmt::Debug for CredentialFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "credential {:02x}{:02x}…", self.0[0], self.0[1])
    }
}

impl Credential {
    /// Nobody's name, nothing fetched: a request as it came.
    pub const NONE: Self = Self::Anonymous {
        fetch_tokens: false,
    };
    /// Nobody's name, with a token where one is asked for.
    pub const ANONYMOUS: Self = Self::Anonymous { fetch_tokens: true };

    /// A user and password.
    pub fn login(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self::Login {
            user: user.into(),
            password: Secret::new(password),
        }
    }

    /// The same for equal credentials under one `key`; for caches of what a credential may do.
    ///
    /// All anonymous credentials are equal here: a registry sees no difference between them.
    pub fn fingerprint(&self, key: &[u8; 32]) -> CredentialFingerprint {
        let mut hasher = blake3::Hasher::new_keyed(key);
        match self {
            Self::Anonymous { .. } => {
                hasher.update(b"anonymous");
            }
            Self::Header(value) => {
                hasher.update(b"header").update(value.as_bytes());
            }
            Self::Login { user, password } => {
                // The length keeps ("ab", "c") apart from ("a", "bc").
                hasher
                    .update(b"login")
                    .update(&(user.len() as u64).to_le_bytes())
                    .update(user.as_bytes())
                    .update(password.expose().as_bytes());
            }
        }
        CredentialFingerprint(*hasher.finalize().as_bytes())
    }

    /// A login as the value of an `Authorization` header, marked as sensitive: to hand it to another
    /// program on this machine.
    pub fn basic_authorization(&self) -> Option<HeaderValue> {
        match self {
            Self::Login { user, password } => basic(user, password),
            Self::Anonymous { .. } | Self::Header(_) => None,
        }
    }

    /// Whether this is nobody's name.
    pub fn is_anonymous(&self) -> bool {
        matches!(self, Self::Anonymous { .. })
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous { .. } => "Credential::Anonymous",
            Self::Header(_) => "Credential::Header(secret)",
            Self::Login { .. } => "Credential::Login(secret)",
        })
    }
}

/// `Basic` authorization (RFC 7617), marked so that nothing prints it.
pub(crate) fn basic(user: &str, password: &Secret) -> Option<HeaderValue> {
    // RFC 7617, section 2: "a user-id containing a colon character is invalid".
    if user.contains(':') {
        return None;
    }
    let encoded = STANDARD.encode(format!("{user}:{}", password.expose()));
    sensitive(&format!("Basic {encoded}"))
}

/// `Bearer` authorization (RFC 6750), or `None` where the token cannot stand in a header.
pub(crate) fn bearer(token: &Secret) -> Option<HeaderValue> {
    sensitive(&format!("Bearer {}", token.expose()))
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_credential_shows_in_debug_output() {
        let header = HeaderValue::from_static("Bearer hunter2");
        for credential in [
            Credential::login("alice", "hunter2"),
            Credential::Header(header),
        ] {
            let text = format!("{credential:?}");
            assert!(!text.contains("hunter2") && !text.contains("alice"));
        }
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "(secret)");
        let value = basic("alice", &Secret::new("hunter2")).unwrap();
        assert!(!format!("{value:?}").contains("YWxpY2U"));
    }

    #[test]
    fn fingerprints_tell_credentials_and_keys_apart() {
        let key = [7; 32];
        let all = [
            Credential::NONE,
            Credential::login("ab", "c"),
            Credential::login("a", "bc"),
            Credential::login("a", "b"),
            Credential::Header(HeaderValue::from_static("Basic YTpi")),
            Credential::Header(HeaderValue::from_static("Basic YTpj")),
        ];
        for (i, a) in all.iter().enumerate() {
            assert_eq!(a.fingerprint(&key), a.clone().fingerprint(&key));
            assert!(a.fingerprint(&key) != a.fingerprint(&[8; 32]));
            for b in &all[i + 1..] {
                assert!(a.fingerprint(&key) != b.fingerprint(&key));
            }
        }
        assert_eq!(
            Credential::NONE.fingerprint(&key),
            Credential::ANONYMOUS.fingerprint(&key)
        );
    }

    #[test]
    fn basic_follows_its_rfc() {
        let value = basic("Aladdin", &Secret::new("open sesame")).unwrap();
        assert_eq!(
            value.to_str().unwrap(),
            "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
        );
        assert!(basic("a:b", &Secret::new("c")).is_none());
        assert!(bearer(&Secret::new("a\r\nb")).is_none());
    }
}
