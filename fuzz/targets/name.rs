//! Image references and their parts: what parses is safe in paths and survives its text form.

#![no_main]

use std::fmt::Display;
use std::str::FromStr;

use libfuzzer_sys::fuzz_target;
use pantala_wire::name::{
    HOST_LEN_MAX, ImageReference, ManifestReference, REPOSITORY_LEN_MAX, RepositoryName,
    TAG_LEN_MAX,
};
use pantala_wire::{BlobDigest, NodeId};

fuzz_target!(|text: &str| {
    if let Some(image) = round_trip::<ImageReference>(text) {
        assert!(image.registry.len() <= HOST_LEN_MAX);
        assert!(!image.registry.contains('/'));
    }
    if let Some(name) = round_trip::<RepositoryName>(text) {
        let name = name.as_str();
        assert!(name.len() <= REPOSITORY_LEN_MAX && !name.contains(".."));
        assert!(
            name.bytes()
                .all(|b| b.is_ascii_graphic() && !b.is_ascii_uppercase())
        );
    }
    if let Some(ManifestReference::Tag(tag)) = round_trip(text) {
        assert!(tag.len() <= TAG_LEN_MAX && !tag.contains('/') && !tag.starts_with('.'));
    }
    round_trip::<BlobDigest>(text);
    round_trip::<NodeId>(text);
});

fn round_trip<T: FromStr + Display + PartialEq>(text: &str) -> Option<T> {
    let parsed = text.parse::<T>().ok()?;
    let again = parsed.to_string().parse::<T>().ok();
    assert!(
        again.as_ref() == Some(&parsed),
        "{parsed} is read as another"
    );
    Some(parsed)
}
