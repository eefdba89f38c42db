//! `WWW-Authenticate`: what a registry asks for. Pure; made for hostile input.
//!
//! RFC 9110, section 11.6.1: a comma-separated list of challenges, each a scheme followed by a
//! token68 or a comma-separated list of parameters, so a comma may end either a parameter or a
//! challenge.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// Longest header value that is looked at: a realm, a service and a few scopes fit well.
const HEADER_LEN_MAX: usize = 8 * 1024;
/// Most header lines, and most challenges, that are looked at.
const CHALLENGES_MAX: usize = 16;
/// Most parameters of one challenge.
const PARAMETERS_MAX: usize = 16;

/// How a registry wants to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password (RFC 7617).
    Basic,
    /// A token of the named service (the registries' token authentication).
    Bearer {
        /// URL of the token service.
        realm: String,
        /// Whom the token is for.
        service: Option<String>,
        /// What the token is to allow.
        scope: Option<String>,
    },
}

/// The challenges of all `WWW-Authenticate` lines that are understood; malformed ones are left out.
pub(crate) fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .take(CHALLENGES_MAX)
        .filter_map(|value| value.to_str().ok())
        .flat_map(parse)
        .take(CHALLENGES_MAX)
        .collect()
}

/// The challenges of one header line.
pub(crate) fn parse(value: &str) -> Vec<Challenge> {
    if value.len() > HEADER_LEN_MAX {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut scanner = Scanner(value);
    for _ in 0..CHALLENGES_MAX {
        scanner.skip(|b| b == b',' || is_space(b));
        let Some(scheme) = scanner.token() else {
            break;
        };
        scanner.skip(is_space);
        let Some(parameters) = scanner.parameters() else {
            break;
        };
        found.extend(understood(scheme, parameters));
    }
    found
}

type Parameters<'a> = Vec<(&'a str, String)>;

fn understood(scheme: &str, parameters: Parameters<'_>) -> Option<Challenge> {
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let mut parameters = parameters;
    // The first of equal names counts, so that nothing appended later can replace it.
    let mut take = |name: &str| {
        parameters
            .iter_mut()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| std::mem::take(value))
    };
    Some(Challenge::Bearer {
        realm: take("realm")?,
        service: take("service"),
        scope: take("scope"),
    })
}

fn is_space(b: u8) -> bool {
    matches!(b, b' ' | b'\t')
}

/// RFC 9110, section 5.6.2: the characters of a token.
fn is_token_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

struct Scanner<'a>(&'a str);

impl<'a> Scanner<'a> {
    fn skip(&mut self, matches: impl Fn(u8) -> bool) {
        self.take(matches);
    }

    /// The longest run of bytes that match; all callers match ASCII, so it ends on a character.
    fn take(&mut self, matches: impl Fn(u8) -> bool) -> &'a str {
        let len = self
            .0
            .bytes()
            .position(|b| !matches(b))
            .unwrap_or(self.0.len());
        let (run, rest) = self.0.split_at(len);
        self.0 = rest;
        run
    }

    fn token(&mut self) -> Option<&'a str> {
        let run = self.take(is_token_byte);
        (!run.is_empty()).then_some(run)
    }

    fn eat(&mut self, b: u8) -> bool {
        match self.0.strip_prefix(char::from(b)) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }

    /// The parameters up to the next challenge or the end; `None` where it is malformed.
    fn parameters(&mut self) -> Option<Parameters<'a>> {
        let mut found = Vec::new();
        loop {
            let start = self.0;
            let Some(name) = self.token() else {
                // Nothing, or a stray character: the former ends the list, the latter all of it.
                return (self.0.is_empty() || self.0.starts_with(',')).then_some(found);
            };
            self.skip(is_space);
            if !self.eat(b'=') {
                // No parameter but the scheme of the next challenge.
                self.0 = start;
                return Some(found);
            }
            self.skip(is_space);
            let value = if self.0.starts_with('"') {
                self.quoted()?
            } else {
                // Also swallows a token68 with its padding, which no scheme here has.
                self.take(|b| is_token_byte(b) || matches!(b, b'=' | b'/' | b':'))
                    .to_owned()
            };
            if found.len() == PARAMETERS_MAX {
                return None;
            }
            found.push((name, value));
            self.skip(is_space);
            if !self.eat(b',') {
                return self.0.is_empty().then_some(found);
            }
            self.skip(|b| b == b',' || is_space(b));
        }
    }

    /// RFC 9110, section 5.6.4: a quoted string, where `\` quotes the next character.
    fn quoted(&mut self) -> Option<String> {
        let mut value = String::new();
        let mut characters = self.0.char_indices().skip(1);
        while let Some((index, character)) = characters.next() {
            match character {
                '"' => {
                    self.0 = &self.0[index + 1..];
                    return Some(value);
                }
                '\\' => value.push(characters.next()?.1),
                _ => value.push(character),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    #[test]
    fn the_challenges_of_real_registries_are_understood() {
        assert_eq!(
            parse(
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/nginx:pull""#
            ),
            [bearer(
                "https://auth.docker.io/token",
                Some("registry.docker.io"),
                Some("repository:library/nginx:pull")
            )]
        );
        assert_eq!(parse(r#"Basic realm="Registry Realm""#), [Challenge::Basic]);
        assert_eq!(parse("Basic"), [Challenge::Basic]);
        assert_eq!(
            parse(
                r#"bearer REALM = "http://a/t" , scope="repository:a:pull,push", error="invalid_token""#
            ),
            [bearer("http://a/t", None, Some("repository:a:pull,push"))]
        );
    }

    #[test]
    fn several_challenges_in_one_line_or_in_several_are_all_found() {
        let line =
            r#"Negotiate, Basic realm="a, Bearer realm=x", Bearer realm="http://t/",service=s"#;
        let expected = [Challenge::Basic, bearer("http://t/", Some("s"), None)];
        assert_eq!(parse(line), expected);
        let mut headers = HeaderMap::new();
        headers.append(WWW_AUTHENTICATE, r#"Basic realm="r""#.parse().unwrap());
        headers.append(
            WWW_AUTHENTICATE,
            r#"Bearer realm="http://t/",service=s"#.parse().unwrap(),
        );
        assert_eq!(challenges(&headers), expected);
    }

    #[test]
    fn quoting_is_undone_and_an_open_quote_is_no_challenge() {
        assert_eq!(
            parse(r#"Bearer realm="a\"b\\c""#),
            [bearer(r#"a"b\c"#, None, None)]
        );
        for bad in [
            r#"Bearer realm="a"#,
            r#"Bearer realm="a\"#,
            "Bearer",
            "Bearer service=s",
            "Bearer realm=\"a\" junk=\"b\"",
            "=",
            "\"",
            "",
            ",,,",
        ] {
            assert_eq!(parse(bad), [], "{bad}");
        }
    }

    #[test]
    fn the_first_of_equal_parameters_counts() {
        assert_eq!(
            parse(r#"Bearer realm="http://good/",realm="http://evil/""#),
            [bearer("http://good/", None, None)]
        );
    }

    #[test]
    fn absurd_input_is_bounded() {
        assert!(parse(&"Basic, ".repeat(100)).len() <= CHALLENGES_MAX);
        assert_eq!(parse(&"x".repeat(HEADER_LEN_MAX + 1)), []);
        let many: String = (0..1000).map(|i| format!("p{i}=v,")).collect();
        assert_eq!(parse(&format!("Bearer {many} realm=\"r\"")), []);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in ".{0,200}") {
            parse(&text);
        }

        #[test]
        fn nothing_made_of_its_own_characters_makes_it_panic(
            text in r#"[Bb "\\,=a-cé\t]{0,60}"#
        ) {
            parse(&text);
        }

        #[test]
        fn any_quoted_realm_comes_back(realm in r#"[ -~]{0,80}"#) {
            let quoted = realm.replace('\\', r"\\").replace('"', "\\\"");
            let line = format!("Basic realm=\"x\", Bearer realm=\"{quoted}\", service=\"s\"");
            prop_assert_eq!(parse(&line), [Challenge::Basic, bearer(&realm, Some("s"), None)]);
        }
    }
}
