//! Shows an origin who asks: what it asked for last time at once, and what it asks for now.

use std::num::NonZeroUsize;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use lru::LruCache;
use parking_lot::Mutex;
use tokio::time::timeout;
use url::Url;

use crate::challenge::{Challenge, challenges};
use crate::client::{Answer, Client, Request, drain};
use crate::clock::Clock;
use crate::counters::Counters;
use crate::credential::{Credential, CredentialFingerprint, basic, bearer};
use crate::error::{Phase, SourceError, TokenFault};
use crate::reply::read_bounded;
use crate::token::{TOKEN_ANSWER_BYTES_MAX, Token, TokenCache, TokenKey};
use crate::upstream::host_port;

/// Places whose demands are remembered: one for each repository and credential in use.
const DEMANDS_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// Where a demand was made, and of whom.
#[derive(PartialEq, Eq, Hash)]
struct Place {
    origin: String,
    repository: String,
    credential: CredentialFingerprint,
}

/// Answers challenges, and remembers them.
pub(crate) struct Authenticator {
    /// Keys the fingerprints, which never leave this process.
    key: [u8; 32],
    demands: Mutex<LruCache<Place, Challenge>>,
    tokens: TokenCache,
}

impl Authenticator {
    pub(crate) fn new() -> Self {
        Self {
            key: blake3::derive_key("pantala source: credentials in caches", &[]),
            demands: Mutex::new(LruCache::new(DEMANDS_MAX)),
            tokens: TokenCache::new(),
        }
    }

    /// Sends a request in the credential's name; after a 401 that the credential can answer, once
    /// more.
    pub(crate) async fn send(
        &self,
        shell: Shell<'_>,
        request: Request,
        credential: &Credential,
    ) -> Result<Answer, SourceError> {
        let place = Place {
            origin: request.url.origin().ascii_serialization(),
            repository: repository_of(request.url.path()).to_owned(),
            credential: credential.fingerprint(&self.key),
        };
        let shown = match credential {
            Credential::Header(value) => {
                let mut value = value.clone();
                value.set_sensitive(true);
                Some(value)
            }
            // Not even a token that was fetched for somebody else without a name.
            Credential::Anonymous {
                fetch_tokens: false,
            } => None,
            _ => {
                let known = self.demands.lock().get(&place).cloned();
                match known {
                    Some(demand) => {
                        let answer =
                            self.answer(shell, &request.url, &place, &demand, credential, None);
                        // A demand that cannot be met is forgotten: the origin may want
                        // something else by now.
                        answer.await.inspect_err(|_| {
                            self.demands.lock().pop(&place);
                        })?
                    }
                    None => None,
                }
            }
        };
        let mut first = request.clone();
        first.authorization.clone_from(&shown);
        let answer = shell.client.send(first).await?;
        // A challenge of another origin is not answered: it would be given the password.
        if answer.status() != StatusCode::UNAUTHORIZED || answer.crossed_origin {
            return Ok(answer);
        }
        let demands = challenges(answer.headers());
        let Some(demand) = choose(demands, credential) else {
            return Ok(answer);
        };
        let fresh = self
            .answer(
                shell,
                &request.url,
                &place,
                &demand,
                credential,
                shown.as_ref(),
            )
            .await?;
        if fresh.is_none() || fresh == shown {
            // The same again would be refused again.
            return Ok(answer);
        }
        drain(answer.response).await;
        let mut second = request;
        second.authorization = fresh;
        let answer = shell.client.send(second).await?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            self.demands.lock().put(place, demand);
        }
        Ok(answer)
    }

    /// The `Authorization` that meets a demand; `rejected` is one that no longer does.
    async fn answer(
        &self,
        shell: Shell<'_>,
        url: &Url,
        place: &Place,
        demand: &Challenge,
        credential: &Credential,
        rejected: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let (realm, service, scope) = match (demand, credential) {
            (Challenge::Basic, Credential::Login { user, password }) => {
                return Ok(basic(user, password));
            }
            (Challenge::Basic, _) => return Ok(None),
            (
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                },
                _,
            ) => (realm, service, scope),
        };
        let scope = scope.clone().or_else(|| {
            (!place.repository.is_empty()).then(|| format!("repository:{}:pull", place.repository))
        });
        let key = TokenKey {
            realm: realm.clone(),
            service: service.clone(),
            scope,
            credential: place.credential,
        };
        let slot = self.tokens.slot(&key);
        // Whoever holds the lock may wait for a service that does not answer; the others do not
        // wait one after the other.
        let mut token = timeout(shell.token_patience, slot.lock())
            .await
            .map_err(|_| SourceError::TimedOut {
                host: host_port(url),
                phase: Phase::Token,
                limit: shell.token_patience,
            })?;
        let kept = token
            .as_ref()
            .filter(|token| token.is_usable(shell.clock.now()))
            .and_then(|token| bearer(&token.secret));
        if kept.is_some() && kept.as_ref() != rejected {
            return Ok(kept);
        }
        *token = None;
        let secure = url.scheme() == "https";
        let fresh = fetch_token(shell, &key, secure, credential).await?;
        let header = bearer(&fresh.secret);
        *token = Some(fresh);
        Ok(header)
    }
}

/// What authentication needs of its surroundings.
#[derive(Clone, Copy)]
pub(crate) struct Shell<'a> {
    pub(crate) client: &'a Client,
    pub(crate) clock: &'a Clock,
    pub(crate) counters: &'a Counters,
    pub(crate) stall_timeout: Duration,
    /// How long a token that another request is fetching is waited for.
    pub(crate) token_patience: Duration,
}

async fn fetch_token(
    shell: Shell<'_>,
    key: &TokenKey,
    secure: bool,
    credential: &Credential,
) -> Result<Token, SourceError> {
    let (account, authorization) = match credential {
        Credential::Login { user, password } => (Some(user.as_str()), basic(user, password)),
        _ => (None, None),
    };
    let url = key
        .url(account, secure)
        .map_err(|reason| SourceError::Token {
            host: "an unusable realm".to_owned(),
            reason,
        })?;
    let host = host_port(&url);
    tracing::debug!(service = %host, scope = key.scope.as_deref(), "asking for a token");
    let request = Request {
        method: Method::GET,
        url,
        headers: HeaderMap::new(),
        authorization,
        body: Bytes::new(),
    };
    let answer = shell.client.send(request).await?;
    let fault = |reason| SourceError::Token {
        host: host.clone(),
        reason,
    };
    if !answer.status().is_success() {
        return Err(fault(TokenFault::Refused(answer.status())));
    }
    let json = read_bounded(answer, TOKEN_ANSWER_BYTES_MAX, shell.stall_timeout).await?;
    shell.counters.token_fetched();
    Token::parse(&json, shell.clock.now()).map_err(fault)
}

/// The demand that this credential meets best.
fn choose(demands: Vec<Challenge>, credential: &Credential) -> Option<Challenge> {
    let is_bearer = |demand: &&Challenge| matches!(demand, Challenge::Bearer { .. });
    let bearer = demands.iter().find(is_bearer);
    match credential {
        Credential::Header(_) => None,
        Credential::Anonymous { fetch_tokens } => bearer.filter(|_| *fetch_tokens).cloned(),
        Credential::Login { .. } => bearer.or_else(|| demands.first()).cloned(),
    }
}

/// The repository in a registry's path, or an empty text.
fn repository_of(path: &str) -> &str {
    let Some(rest) = path.strip_prefix("/v2/") else {
        return "";
    };
    // A repository may be called "blobs", too: the last such component is the API's.
    ["/manifests/", "/blobs/", "/tags/", "/referrers/"]
        .iter()
        .filter_map(|part| rest.rfind(part))
        .max()
        .map_or("", |end| &rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_found_in_every_kind_of_path() {
        for (path, repository) in [
            ("/v2/", ""),
            ("/v2/a/manifests/v1", "a"),
            ("/v2/a/b/blobs/sha256:00", "a/b"),
            ("/v2/x/blobs/y/manifests/v1", "x/blobs/y"),
            ("/v2/a/tags/list", "a"),
            ("/file", ""),
        ] {
            assert_eq!(repository_of(path), repository, "{path}");
        }
    }

    #[test]
    fn a_credential_answers_only_what_it_is_for() {
        let token = || Challenge::Bearer {
            realm: "http://t/".into(),
            service: None,
            scope: None,
        };
        let both = || vec![Challenge::Basic, token()];
        let header = Credential::Header(HeaderValue::from_static("Basic x"));
        assert_eq!(choose(both(), &header), None);
        assert_eq!(choose(both(), &Credential::NONE), None);
        assert_eq!(choose(both(), &Credential::ANONYMOUS), Some(token()));
        assert_eq!(choose(vec![Challenge::Basic], &Credential::ANONYMOUS), None);
        let login = Credential::login("u", "p");
        assert_eq!(choose(both(), &login), Some(token()));
        assert_eq!(
            choose(vec![Challenge::Basic], &login),
            Some(Challenge::Basic)
        );
    }
}
