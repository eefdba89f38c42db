//! Tokens of the registries' token authentication: what a token service answers, and the cache.
//! Tokens live in memory only.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::Mutex as AsyncMutex;
use url::Url;

use crate::credential::{CredentialFingerprint, Secret};
use crate::error::TokenFault;

/// Tokens kept. Each is for one repository and user; a node pulls from far fewer at a time.
const TOKENS_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// Largest answer of a token service; tokens with many grants have some 10 KiB.
pub(crate) const TOKEN_ANSWER_BYTES_MAX: u64 = 256 * 1024;
/// Longest token that fits in a request's header everywhere.
const TOKEN_LEN_MAX: usize = 64 * 1024;
/// Life of a token that does not say: the specification's 60 s.
const LIFE_DEFAULT: Duration = Duration::from_secs(60);
/// Tokens are asked for anew after this long, whatever they say: rights are withdrawn, too.
const LIFE_MAX: Duration = Duration::from_secs(3600);
/// A token this close to its end is not used: it has to arrive before it expires.
const MARGIN: Duration = Duration::from_secs(10);

/// A token and how long it can be used.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) secret: Secret,
    usable_until: Duration,
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Token {
    /// Reads a token service's answer that came `now`.
    pub(crate) fn parse(json: &[u8], now: Duration) -> Result<Self, TokenFault> {
        let answer: Answer = serde_json::from_slice(json).map_err(|_| TokenFault::Malformed)?;
        let text = [answer.token, answer.access_token]
            .into_iter()
            .flatten()
            .find(|text| !text.is_empty())
            .filter(|text| text.len() <= TOKEN_LEN_MAX)
            .ok_or(TokenFault::Malformed)?;
        let life = match answer.expires_in {
            // Services that say 0 mean "not told".
            None | Some(0) => LIFE_DEFAULT,
            Some(seconds) => Duration::from_secs(seconds).min(LIFE_MAX),
        };
        // A short-lived token is still used for half of its life.
        let margin = MARGIN.min(life / 2);
        Ok(Self {
            secret: Secret::new(text),
            usable_until: now + (life - margin),
        })
    }

    /// Whether it can still be used.
    pub(crate) fn is_usable(&self, now: Duration) -> bool {
        now < self.usable_until
    }
}

/// What a token is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenKey {
    pub(crate) realm: String,
    pub(crate) service: Option<String>,
    pub(crate) scope: Option<String>,
    pub(crate) credential: CredentialFingerprint,
}

impl TokenKey {
    /// The URL to ask, for `account` where there is one.
    pub(crate) fn url(&self, account: Option<&str>, secure: bool) -> Result<Url, TokenFault> {
        let mut url = Url::parse(&self.realm).map_err(|_| TokenFault::Realm)?;
        let is_allowed = match url.scheme() {
            "https" => true,
            // A registry behind TLS does not get to send passwords into the open.
            "http" => !secure,
            _ => false,
        };
        if !is_allowed || !url.username().is_empty() || url.password().is_some() {
            return Err(TokenFault::Realm);
        }
        url.set_fragment(None);
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.service {
                query.append_pair("service", service);
            }
            for scope in self.scope.iter().flat_map(|scope| scope.split_whitespace()) {
                query.append_pair("scope", scope);
            }
            if let Some(account) = account {
                query.append_pair("account", account);
            }
        }
        Ok(url)
    }
}

/// One token's place: whoever holds the lock fetches it, and the others wait and find it there.
pub(crate) type Slot = Arc<AsyncMutex<Option<Token>>>;

/// The tokens that are there or on their way.
pub(crate) struct TokenCache(Mutex<LruCache<TokenKey, Slot>>);

impl TokenCache {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(LruCache::new(TOKENS_MAX)))
    }

    pub(crate) fn slot(&self, key: &TokenKey) -> Slot {
        Arc::clone(self.0.lock().get_or_insert_mut_ref(key, Slot::default))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn token(json: &str) -> Token {
        Token::parse(json.as_bytes(), Duration::ZERO).unwrap()
    }

    fn key(realm: &str, scope: Option<&str>) -> TokenKey {
        TokenKey {
            realm: realm.to_owned(),
            service: Some("s v".to_owned()),
            scope: scope.map(str::to_owned),
            credential: crate::Credential::NONE.fingerprint(&[0; 32]),
        }
    }

    #[test]
    fn both_names_of_a_token_are_read_and_it_ends_before_it_expires() {
        let first = token(r#"{"token":"a","access_token":"b","expires_in":300,"issued_at":"x"}"#);
        assert_eq!(first.secret.expose(), "a");
        assert!(first.is_usable(SECOND * 289));
        assert!(!first.is_usable(SECOND * 290));
        let second = token(r#"{"access_token":"b"}"#);
        assert_eq!(second.secret.expose(), "b");
        assert!(second.is_usable(SECOND * 49) && !second.is_usable(SECOND * 50));
    }

    #[test]
    fn odd_lifetimes_are_bounded() {
        assert!(token(r#"{"token":"a","expires_in":2}"#).is_usable(Duration::from_millis(999)));
        assert!(!token(r#"{"token":"a","expires_in":2}"#).is_usable(SECOND));
        assert!(token(r#"{"token":"a","expires_in":0}"#).is_usable(SECOND));
        let long = token(r#"{"token":"a","expires_in":18446744073709551615}"#);
        assert!(!long.is_usable(LIFE_MAX));
    }

    #[test]
    fn an_answer_without_a_token_is_malformed() {
        for json in [
            "",
            "{}",
            "[]",
            r#"{"token":""}"#,
            r#"{"token":5}"#,
            r#"{"token":"a","expires_in":-1}"#,
            "<html>",
        ] {
            let result = Token::parse(json.as_bytes(), Duration::ZERO);
            assert_eq!(result.unwrap_err(), TokenFault::Malformed, "{json}");
        }
        let huge = format!(r#"{{"token":"{}"}}"#, "x".repeat(TOKEN_LEN_MAX + 1));
        assert!(Token::parse(huge.as_bytes(), Duration::ZERO).is_err());
    }

    #[test]
    fn the_token_url_carries_service_scopes_and_account() {
        let url = key(
            "https://auth/token?x=1",
            Some("repository:a:pull repository:b:pull"),
        )
        .url(Some("al&ice"), true)
        .unwrap();
        assert_eq!(
            url.as_str(),
            "https://auth/token?x=1&service=s+v&scope=repository%3Aa%3Apull&scope=repository%3Ab%3Apull&account=al%26ice"
        );
    }

    #[test]
    fn realms_that_may_not_be_asked_are_refused() {
        assert!(key("http://auth/token", None).url(None, false).is_ok());
        for realm in [
            "http://auth/token",
            "ftp://auth/",
            "file:///etc/shadow",
            "token",
            "https://u:p@auth/",
            "",
        ] {
            let result = key(realm, None).url(None, true);
            assert_eq!(result.unwrap_err(), TokenFault::Realm, "{realm}");
        }
    }
}
