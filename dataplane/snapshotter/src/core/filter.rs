//! containerd's filters, as far as they reach a snapshotter: `labels."a.b"==x,parent!="y"`.
//!
//! Selectors are joined by commas and must all match; of several filters one must. A selector without
//! an operator asks whether the field is there. `~=` (regular expressions) is refused: containerd
//! sends none to a snapshotter.

use super::snapshot::Snapshot;

/// Bytes of one filter: a name and a digest, quoted, fit many times.
const FILTER_MAX_BYTES: usize = 16_384;
/// Filters of one request.
const FILTERS_MAX: usize = 64;

/// Why a text is no filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the filter {filter:?} is wrong at byte {at}: {why}")]
pub struct FilterError {
    filter: String,
    at: usize,
    why: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

/// What of a list is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    any_of: Vec<Vec<Selector>>,
}

impl Filter {
    /// Reads the filters of one request; none means everything.
    ///
    /// # Errors
    /// Where one cannot be read, or they are too many or too long.
    pub fn parse(filters: &[String]) -> Result<Self, FilterError> {
        if filters.len() > FILTERS_MAX {
            return Err(FilterError {
                filter: format!("{} filters", filters.len()),
                at: 0,
                why: "too many",
            });
        }
        let any_of = filters.iter().map(|text| Reader::new(text).selectors());
        Ok(Self {
            any_of: any_of.collect::<Result<_, _>>()?,
        })
    }

    /// Whether `snapshot` is wanted.
    pub fn matches(&self, snapshot: &Snapshot) -> bool {
        self.any_of.is_empty()
            || self
                .any_of
                .iter()
                .any(|all| all.iter().all(|selector| selector.matches(snapshot)))
    }
}

impl Selector {
    fn matches(&self, snapshot: &Snapshot) -> bool {
        let value = field(snapshot, &self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(unwanted) => value != Some(unwanted),
        }
    }
}

fn field<'a>(snapshot: &'a Snapshot, path: &[String]) -> Option<&'a str> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "name" => Some(&snapshot.name),
        "kind" => Some(snapshot.kind.name()),
        "parent" => Some(snapshot.parent.as_deref().unwrap_or_default()),
        "labels" => snapshot.labels.get(&rest.join(".")).map(String::as_str),
        _ => None,
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    const fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    fn wrong(&self, why: &'static str) -> FilterError {
        FilterError {
            filter: self.text.chars().take(100).collect(),
            at: self.at,
            why,
        }
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn take(&mut self, token: &str) -> bool {
        let is_next = self.rest().starts_with(token);
        if is_next {
            self.at += token.len();
        }
        is_next
    }

    fn selectors(mut self) -> Result<Vec<Selector>, FilterError> {
        if self.text.len() > FILTER_MAX_BYTES {
            return Err(self.wrong("too long"));
        }
        let mut selectors = vec![self.selector()?];
        while !self.rest().is_empty() {
            if !self.take(",") {
                return Err(self.wrong("expected a comma or the end"));
            }
            selectors.push(self.selector()?);
        }
        Ok(selectors)
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.name()?];
        while self.take(".") {
            path.push(self.name()?);
        }
        let test = if self.take("==") {
            Test::Equal(self.value()?)
        } else if self.take("!=") {
            Test::NotEqual(self.value()?)
        } else if self.take("~=") {
            return Err(self.wrong("regular expressions are not supported"));
        } else {
            Test::Present
        };
        Ok(Selector { path, test })
    }

    fn name(&mut self) -> Result<String, FilterError> {
        if self.rest().starts_with('"') {
            return self.quoted();
        }
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        self.until(|c| !is_part(c), "expected the name of a field")
    }

    fn value(&mut self) -> Result<String, FilterError> {
        if self.rest().starts_with('"') {
            return self.quoted();
        }
        self.until(|c| c == ',', "expected a value")
    }

    fn until(
        &mut self,
        stop: impl Fn(char) -> bool,
        why: &'static str,
    ) -> Result<String, FilterError> {
        let rest = self.rest();
        let length = rest.find(stop).unwrap_or(rest.len());
        if length == 0 {
            return Err(self.wrong(why));
        }
        self.at += length;
        Ok(rest[..length].to_owned())
    }

    /// A text in double quotes, with the escapes that Go writes.
    fn quoted(&mut self) -> Result<String, FilterError> {
        self.at += 1;
        let mut value = String::new();
        let mut chars = self.rest().char_indices();
        while let Some((index, c)) = chars.next() {
            match c {
                '"' => {
                    self.at += index + 1;
                    return Ok(value);
                }
                '\\' => {
                    let escaped = match chars.next().map(|(_, c)| c) {
                        Some('n') => Some('\n'),
                        Some('t') => Some('\t'),
                        Some('r') => Some('\r'),
                        Some(c @ ('"' | '\\')) => Some(c),
                        Some('x') => hex_char(&mut chars, 2),
                        Some('u') => hex_char(&mut chars, 4),
                        Some('U') => hex_char(&mut chars, 8),
                        _ => None,
                    };
                    value.push(escaped.ok_or_else(|| self.wrong("an escape that is none"))?);
                }
                c => value.push(c),
            }
        }
        Err(self.wrong("a quote without its end"))
    }
}

fn hex_char(chars: &mut std::str::CharIndices<'_>, digits: usize) -> Option<char> {
    let mut code = 0;
    for _ in 0..digits {
        code = code * 16 + chars.next()?.1.to_digit(16)?;
    }
    char::from_u32(code)
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::{Kind, Usage};
    use super::*;

    fn snapshot() -> Snapshot {
        Snapshot {
            id: 1,
            name: "default/3/sha256:ab".into(),
            parent: Some("default/2/x \"y\"".into()),
            kind: Kind::Committed,
            labels: [
                ("containerd.io/snapshot.ref".into(), "sha256:ab".into()),
                ("plain".into(), "1".into()),
            ]
            .into(),
            created_unix_ns: 0,
            updated_unix_ns: 0,
            usage: Usage::default(),
            image: None,
        }
    }

    fn matches(filters: &[&str]) -> bool {
        let filters: Vec<String> = filters.iter().map(|text| (*text).to_owned()).collect();
        Filter::parse(&filters).unwrap().matches(&snapshot())
    }

    #[test]
    fn the_search_for_a_layer_that_is_there_already_matches() {
        // As containerd's metadata store words it.
        let search =
            r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="default/2/x \"y\"""#;
        assert!(matches(&[search]));
        assert!(!matches(&[&search.replace("sha256:ab", "sha256:ac")]));
    }

    #[test]
    fn selectors_are_all_needed_and_filters_one_suffices() {
        assert!(matches(&[]));
        assert!(matches(&["kind==committed,labels.plain"]));
        assert!(!matches(&["kind==active,labels.plain"]));
        assert!(matches(&["kind==active", "labels.plain!=2"]));
        assert!(!matches(&["labels.absent", "nonsense"]));
        assert!(matches(&["labels.absent!=x"]));
    }

    #[test]
    fn what_is_no_filter_is_refused_with_its_place() {
        for text in [
            "",
            ",",
            "name==",
            "name=",
            "name==\"x",
            "name==x,",
            "labels.",
            "name~=x.*",
            "name==\"\\q\"",
            "name==\"\\ud800\"",
            "a b",
        ] {
            assert!(Filter::parse(&[text.to_owned()]).is_err(), "{text:?}");
        }
        assert!(Filter::parse(&["x".repeat(FILTER_MAX_BYTES + 1)]).is_err());
        assert!(Filter::parse(&vec!["name".to_owned(); FILTERS_MAX + 1]).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in ".{0,64}") {
            // Only that it returns counts.
            let _ = Filter::parse(&[text]);
        }

        #[test]
        fn a_quoted_value_comes_back(value in "[ -~]{1,40}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let mut wanted = snapshot();
            wanted.name = value;
            let filter = Filter::parse(&[format!("name==\"{quoted}\"")]).unwrap();
            proptest::prop_assert!(filter.matches(&wanted));
        }
    }
}
