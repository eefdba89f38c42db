//! The file as written: which key stands on which line, and which keys may stand there at all.

use std::ops::Range;

use serde::de::{DeserializeOwned, Deserializer, Visitor};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::ConfigError;
use super::raw;

/// Stands for any host in a path of [`known_keys`].
pub(super) const ANY: &str = "*";

/// A parsed file that still knows where everything stands.
pub(super) struct Document<'a> {
    text: &'a str,
    file: &'a str,
    tree: Spanned<DeTable<'a>>,
}

impl<'a> Document<'a> {
    pub(super) fn parse(text: &'a str, file: &'a str) -> Result<Self, ConfigError> {
        match DeTable::parse(text) {
            Ok(tree) => Ok(Self { text, file, tree }),
            Err(e) => Err(ConfigError::Syntax {
                file: file.to_owned(),
                line: line_at(text, e.span().map_or(0, |span| span.start)),
                problem: e.message().to_owned(),
            }),
        }
    }

    /// Reads the typed form. Unknown keys must have been refused before.
    pub(super) fn deserialize<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(self.text).map_err(|e| {
            let start = e.span().map_or(0, |span| span.start);
            let mut key = Vec::new();
            path_at(self.tree.get_ref(), start, &mut key);
            ConfigError::WrongType {
                file: self.file.to_owned(),
                line: line_at(self.text, start),
                key: if key.is_empty() {
                    "(top level)".to_owned()
                } else {
                    key.join(".")
                },
                problem: e.message().to_owned(),
            }
        })
    }

    pub(super) fn refuse_unknown_keys(&self) -> Result<(), ConfigError> {
        let known = known_keys();
        self.refuse_in(self.tree.get_ref(), &mut Vec::new(), &known)
    }

    fn refuse_in(
        &self,
        table: &DeTable<'_>,
        section: &mut Vec<String>,
        known: &[String],
    ) -> Result<(), ConfigError> {
        // The map is ordered by name; a person expects to hear of the first mistake in the file.
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, value) in entries {
            section.push(key.get_ref().to_string());
            if !known.iter().any(|k| starts_with(k, section)) {
                return Err(self.unknown(section, key.span(), known));
            }
            if let DeValue::Table(inner) = value.get_ref() {
                self.refuse_in(inner, section, known)?;
            }
            section.pop();
        }
        Ok(())
    }

    fn unknown(&self, path: &[String], span: Range<usize>, known: &[String]) -> ConfigError {
        let (section, _) = path.split_at(path.len() - 1);
        let typed = path.join(".");
        let mut here: Vec<String> = known
            .iter()
            .filter(|k| starts_with(k, section))
            .filter_map(|k| k.split('.').nth(section.len()).map(str::to_owned))
            .collect();
        here.dedup();
        // Both the same place and any other: a good name in the wrong section is a common slip.
        let sections = known.iter().filter_map(|k| k.rsplit_once('.').map(|p| p.0));
        let nearest = known
            .iter()
            .map(String::as_str)
            .chain(sections)
            .map(|candidate| {
                let last = |p: &str| p.rsplit('.').next().unwrap_or_default().to_owned();
                let by_name = distance(&last(candidate), &last(&typed));
                let elsewhere = usize::from(!starts_with(candidate, section));
                (by_name, elsewhere, candidate)
            })
            .min()
            .filter(|(by_name, _, candidate)| *by_name <= 1 + candidate.len() / 5)
            .map(|(_, _, candidate)| candidate.replace(ANY, "\"HOST\""));
        ConfigError::UnknownKey {
            file: self.file.to_owned(),
            line: line_at(self.text, span.start),
            key: typed,
            nearest,
            known: here,
        }
    }

    /// An error about the value of `path`.
    pub(super) fn invalid(&self, path: &[&str], problem: String, hint: &str) -> ConfigError {
        ConfigError::Invalid {
            file: self.file.to_owned(),
            line: line_at(self.text, span_of(self.tree.get_ref(), path).start),
            key: path.join("."),
            problem,
            hint: hint.to_owned(),
        }
    }
}

/// Every key there is, with its section: `mirror.listen`, `registries.*.url`.
pub fn known_keys() -> Vec<String> {
    raw::SECTIONS
        .iter()
        .flat_map(|(section, fields)| {
            fields()
                .iter()
                .filter(|field| !raw::is_section(section, field))
                .map(move |field| match *section {
                    "" => (*field).to_owned(),
                    section => format!("{section}.{field}"),
                })
        })
        .collect()
}

/// Whether `path` is the beginning of the known key `known`, or the whole of it.
fn starts_with(known: &str, path: &[String]) -> bool {
    let mut parts = known.split('.');
    path.iter()
        .all(|p| parts.next().is_some_and(|k| k == ANY || k == p))
}

fn line_at(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|b| *b == b'\n').count()
}

fn span_of(table: &DeTable<'_>, path: &[&str]) -> Range<usize> {
    let Some((first, rest)) = path.split_first() else {
        return 0..0;
    };
    let Some((key, value)) = table.iter().find(|(key, _)| key.get_ref() == first) else {
        return 0..0;
    };
    match value.get_ref() {
        DeValue::Table(inner) if !rest.is_empty() => span_of(inner, rest),
        _ => key.span(),
    }
}

/// The innermost key whose value holds `offset`.
fn path_at(table: &DeTable<'_>, offset: usize, out: &mut Vec<String>) {
    for (key, value) in table {
        if let DeValue::Table(inner) = value.get_ref() {
            let depth = out.len();
            out.push(key.get_ref().to_string());
            path_at(inner, offset, out);
            if out.len() > depth + 1 || value.span().contains(&offset) {
                return;
            }
            out.truncate(depth);
        } else if value.span().contains(&offset) || key.span().contains(&offset) {
            out.push(key.get_ref().to_string());
            return;
        }
    }
}

/// Edits from one text to the other: characters inserted, removed, replaced.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

/// The names of a struct's fields as serde knows them, so that no second list can go stale.
pub(super) fn fields_of<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Ask<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Ask<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("only structs are asked"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
            option unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier
            ignored_any
        }
    }

    let mut fields: &'static [&'static str] = &[];
    // It always fails: the names are taken on the way.
    let _ = T::deserialize(Ask(&mut fields));
    fields
}
