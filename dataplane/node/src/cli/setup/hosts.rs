//! `hosts.toml` as text: our block put in front of the other hosts, and taken out again.
//!
//! containerd asks hosts in the order of the file, so order is meaning and the file is edited as
//! text; what other people wrote, comments included, stays byte for byte. Every result is parsed
//! again and compared with what it must mean before anyone may write it.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

/// First line of our block in a file of others; containerd takes it for a comment.
const BEGIN: &str =
    "# pantala: begin (written by `pantala setup containerd`, removed by its --undo)";
/// First line of a file that we made.
const BEGIN_FILE: &str =
    "# pantala: begin file (written by `pantala setup containerd`, removed by its --undo)";
const END: &str = "# pantala: end";
/// What identifies our block, whatever a later version explains behind it.
const BEGIN_PREFIX: &str = "# pantala: begin";

/// What a new file must say about the registry itself.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    /// Where containerd goes when the node is down; absent for `_default`.
    pub(super) server: Option<String>,
    /// CA files that stood alone in the directory: containerd stops to look for them once there is
    /// a `hosts.toml`.
    pub(super) ca: Vec<String>,
    /// Pairs of client certificate and key that stood there.
    pub(super) client: Vec<[String; 2]>,
}

/// Why a file cannot be edited.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum MergeError {
    #[error("it is not valid TOML: {0}")]
    Syntax(String),
    #[error("it names {0} already, but behind another host")]
    NotFirst(String),
    #[error("its hosts are written in a form that cannot be edited safely")]
    Form,
}

/// The text with `mirror` as first host. `existing` is the file as it is, if there is one.
pub(super) fn with_mirror(
    existing: Option<&str>,
    mirror: &str,
    origin: &Origin,
) -> Result<String, MergeError> {
    let Some(existing) = existing else {
        return Ok(new_file(mirror, origin));
    };
    if is_wholly_ours(existing) {
        return Ok(new_file(mirror, origin));
    }
    let original = without_block(existing);
    let tree = DeTable::parse(&original).map_err(|e| MergeError::Syntax(e.message().to_owned()))?;
    let hosts = hosts_in_order(tree.get_ref());
    match hosts.iter().position(|(host, _)| same_host(host, mirror)) {
        Some(0) => return Ok(original),
        Some(_) => return Err(MergeError::NotFirst(mirror.to_owned())),
        None => {}
    }
    let block = format!("{BEGIN}\n{}{END}\n", host_block(mirror));
    let merged = match hosts.first() {
        Some((_, start)) => {
            let at = start_of_block(&original, *start).ok_or(MergeError::Form)?;
            format!("{}{block}{}", &original[..at], &original[at..])
        }
        None if original.is_empty() || original.ends_with('\n') => format!("{original}{block}"),
        None => format!("{original}\n{block}"),
    };
    prove(&original, &merged, mirror)?;
    Ok(merged)
}

/// The text without our block.
pub(super) fn without_block(text: &str) -> String {
    match block_range(text) {
        Some(range) => text[..range.start].to_owned() + &text[range.end..],
        None => text.to_owned(),
    }
}

/// Whether our block stands in the text.
pub(super) fn has_block(text: &str) -> bool {
    block_range(text).is_some()
}

/// Our block with both its marks. Where someone removed one of them, nothing is ours any more.
fn block_range(text: &str) -> Option<Range<usize>> {
    let mut offset = 0;
    let mut begin = None;
    for line in text.split_inclusive('\n') {
        let start = offset;
        offset += line.len();
        if line.starts_with(BEGIN_PREFIX) {
            begin = Some(start);
        } else if line.trim_end() == END
            && let Some(begin) = begin
        {
            return Some(begin..offset);
        }
    }
    None
}

/// Whether we made the file and nobody added to it.
pub(super) fn is_wholly_ours(text: &str) -> bool {
    text.starts_with(BEGIN_FILE) && has_block(text) && without_block(text).trim().is_empty()
}

fn new_file(mirror: &str, origin: &Origin) -> String {
    let mut text = format!("{BEGIN_FILE}\n");
    let quote = |s: &String| toml::Value::String(s.clone()).to_string();
    if let Some(server) = &origin.server {
        text += &format!("server = {}\n", quote(server));
    }
    if !origin.ca.is_empty() {
        let list: Vec<String> = origin.ca.iter().map(quote).collect();
        text += &format!("ca = [{}]\n", list.join(", "));
    }
    if !origin.client.is_empty() {
        let pair =
            |[certificate, key]: &[String; 2]| format!("[{}, {}]", quote(certificate), quote(key));
        let list: Vec<String> = origin.client.iter().map(pair).collect();
        text += &format!("client = [{}]\n", list.join(", "));
    }
    if text.lines().count() > 1 {
        text.push('\n');
    }
    text + &host_block(mirror) + END + "\n"
}

/// The lines that make containerd ask `mirror`.
pub(super) fn host_block(mirror: &str) -> String {
    format!("[host.\"{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n")
}

/// The hosts with the places of their names, first in the file first.
fn hosts_in_order<'a>(tree: &'a DeTable<'_>) -> Vec<(&'a str, usize)> {
    let Some((_, hosts)) = tree.iter().find(|(key, _)| key.get_ref() == "host") else {
        return Vec::new();
    };
    let DeValue::Table(hosts) = hosts.get_ref() else {
        return Vec::new();
    };
    let mut found: Vec<_> = hosts
        .iter()
        .map(|(name, _)| (name.get_ref().as_ref(), name.span().start))
        .collect();
    found.sort_by_key(|(_, start)| *start);
    found
}

fn same_host(a: &str, b: &str) -> bool {
    a.trim_end_matches('/')
        .eq_ignore_ascii_case(b.trim_end_matches('/'))
}

/// Where the lines begin that belong to the table header around `offset`: the header and the
/// comments right above it. Nothing where `offset` is not in a header.
fn start_of_block(text: &str, offset: usize) -> Option<usize> {
    let line_start = |offset: usize| text[..offset].rfind('\n').map_or(0, |at| at + 1);
    let mut start = line_start(offset);
    if !text[start..].trim_start().starts_with('[') {
        return None;
    }
    while start > 0 {
        let above = line_start(start - 1);
        if !text[above..start].trim_start().starts_with('#') {
            break;
        }
        start = above;
    }
    Some(start)
}

/// That `merged` means what `original` means, and our host first.
fn prove(original: &str, merged: &str, mirror: &str) -> Result<(), MergeError> {
    let parse = |text: &str| text.parse::<toml::Table>().map_err(|_| MergeError::Form);
    let mut expected = parse(original)?;
    let ours = parse(&host_block(mirror))?;
    let ours = ours.get("host").and_then(|h| h.get(mirror)).cloned();
    expected
        .entry("host")
        .or_insert_with(|| toml::Value::Table(toml::Table::new()))
        .as_table_mut()
        .zip(ours)
        .map(|(hosts, ours)| hosts.insert(mirror.to_owned(), ours))
        .ok_or(MergeError::Form)?;
    let tree = DeTable::parse(merged).map_err(|_| MergeError::Form)?;
    let first = hosts_in_order(tree.get_ref());
    let is_first = first.first().is_some_and(|(host, _)| *host == mirror);
    match is_first && parse(merged)? == expected {
        true => Ok(()),
        false => Err(MergeError::Form),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIRROR: &str = "http://127.0.0.1:65001";

    fn origin(server: &str) -> Origin {
        Origin {
            server: Some(server.into()),
            ..Origin::default()
        }
    }

    fn merge(existing: &str) -> Result<String, MergeError> {
        with_mirror(Some(existing), MIRROR, &origin("https://r.test"))
    }

    #[test]
    fn a_new_file_names_the_registry_and_the_mirror() {
        let text = with_mirror(None, MIRROR, &origin("https://r.test")).unwrap();
        let table: toml::Table = text.parse().unwrap();
        assert_eq!(table["server"].as_str(), Some("https://r.test"));
        let caps = table["host"][MIRROR]["capabilities"].as_array().unwrap();
        assert_eq!(caps.len(), 2);
        assert!(is_wholly_ours(&text));
        assert_eq!(merge(&text).unwrap(), text, "idempotent");
    }

    #[test]
    fn certificates_that_stood_alone_are_named() {
        let origin = Origin {
            ca: vec!["my \"ca\".crt".into()],
            client: vec![["c.cert".into(), "c.key".into()]],
            ..Origin::default()
        };
        let table: toml::Table = with_mirror(None, MIRROR, &origin).unwrap().parse().unwrap();
        assert_eq!(table["ca"][0].as_str(), Some("my \"ca\".crt"));
        assert_eq!(table["client"][0][1].as_str(), Some("c.key"));
        assert!(!table.contains_key("server"));
    }

    #[test]
    fn our_host_comes_first_and_the_rest_stays() {
        for existing in [
            "",
            "\n\n",
            "# only a comment",
            "server = \"https://r.test\"",
            "server = \"https://r.test\"\n",
            "server = 'x'\r\n[host.\"https://a.test\"]\r\n  skip_verify = true\r\n",
            "server = \"x\"\n\n# about a\n# more\n[host.\"https://a.test\"]\ncapabilities=[\"pull\"]\n\n[host.\"https://b.test\"]\n",
            "[header]\nx = \"1\"\n",
            "[host.\"https://z.test\".header]\nx = \"1\"\n[host.\"https://a.test\"]\n",
            "[host]\n",
            "  [ host . 'https://a.test' ] # spaced\n",
            "# [host.\"https://no.test\"]\nserver = \"[host.x]\"\n",
        ] {
            let merged = merge(existing).unwrap_or_else(|e| panic!("{existing:?}: {e}"));
            assert!(has_block(&merged));
            assert_eq!(merge(&merged).unwrap(), merged, "idempotent: {existing:?}");
            let left = without_block(&merged);
            assert_eq!(
                left.strip_suffix('\n').unwrap_or(&left),
                existing.strip_suffix('\n').unwrap_or(existing)
            );
        }
    }

    #[test]
    fn another_address_of_the_mirror_replaces_the_block() {
        let existing = "server = \"x\"\n\n[host.\"https://a.test\"]\n";
        let first = merge(existing).unwrap();
        let second = with_mirror(Some(&first), "http://127.0.0.1:7", &Origin::default()).unwrap();
        assert!(!second.contains(MIRROR) && second.contains("http://127.0.0.1:7"));
        assert_eq!(without_block(&second), existing);
    }

    #[test]
    fn a_mirror_that_a_person_named_is_left_alone_or_reported() {
        let first = format!("[host.\"{MIRROR}/\"]\n[host.\"https://a.test\"]\n");
        assert_eq!(merge(&first).unwrap(), first);
        let second = format!("[host.\"https://a.test\"]\n[host.\"{MIRROR}\"]\n");
        assert_eq!(merge(&second), Err(MergeError::NotFirst(MIRROR.into())));
    }

    #[test]
    fn a_block_that_lost_a_mark_is_not_ours_any_more() {
        let merged = merge("[host.\"https://a.test\"]\n").unwrap();
        let edited = merged.replace(END, "");
        assert!(!has_block(&edited));
        assert_eq!(without_block(&edited), edited);
        assert_eq!(merge(&edited).unwrap(), edited);
    }

    #[test]
    fn what_cannot_be_edited_safely_is_refused() {
        assert!(matches!(merge("server = "), Err(MergeError::Syntax(_))));
        for form in [
            "host = {\"https://a.test\" = {}}\n",
            "host = {}\n",
            "host.\"https://a.test\".skip_verify = true\n",
            "[host]\n\"https://a.test\" = {}\n",
            "host = 5\n",
        ] {
            assert_eq!(merge(form), Err(MergeError::Form), "{form}");
        }
    }
}
