use std::collections::BTreeSet;

use super::*;

const EXAMPLE: &str = include_str!("../../pantala.example.toml");

/// The example with its settings, and if wanted its indented samples, un-commented.
fn uncommented(with_samples: bool) -> String {
    EXAMPLE
        .lines()
        .map(|line| {
            let sample = line.strip_prefix("#     ").filter(|_| with_samples);
            let setting = line
                .strip_prefix('#')
                .filter(|l| l.starts_with(|c: char| c.is_ascii_lowercase() || c == '['));
            sample.or(setting).unwrap_or(line).to_owned() + "\n"
        })
        .collect()
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, "pantala.toml")
}

fn keys_in(table: &toml::Table, section: &str, out: &mut BTreeSet<String>) {
    for (key, value) in table {
        let here = match section {
            "" => key.clone(),
            "registries" => "registries.*".to_owned(),
            _ => format!("{section}.{key}"),
        };
        match value {
            toml::Value::Table(inner) => keys_in(inner, &here, out),
            _ => assert!(out.insert(here), "twice: {key}"),
        }
    }
}

#[test]
fn the_example_as_it_stands_is_the_defaults() {
    assert_eq!(parse(EXAMPLE).unwrap(), parse("").unwrap());
}

#[test]
fn the_example_with_every_key_uncommented_is_the_defaults() {
    assert_eq!(parse(&uncommented(false)).unwrap(), parse("").unwrap());
}

#[test]
fn the_example_names_every_key_and_no_other() {
    let text = uncommented(true);
    parse(&text).unwrap();
    let mut named = BTreeSet::new();
    keys_in(&text.parse().unwrap(), "", &mut named);
    assert_eq!(named, known_keys().into_iter().collect());
    assert!(named.contains("mirror.listen") && named.contains("registries.*.ca_file"));
}

#[test]
fn the_defaults_suit_one_machine() {
    let config = parse("").unwrap();
    assert_eq!(config.mirror.listen.to_string(), "127.0.0.1:65001");
    assert_eq!(config.mirror.first_byte_timeout, Duration::from_secs(4));
    assert_eq!(config.store.limit, StoreLimit::PercentOfDisk(80));
    assert_eq!(config.control.join, None);
    assert_eq!(config.peer.advertise, None);
    assert!(!config.labels.host.is_empty());
    assert!(config.data_dir.is_absolute());
    assert_eq!(
        config.registry_url("docker.io").unwrap().as_str(),
        "https://registry-1.docker.io/"
    );
    assert_eq!(config.registry_url("elsewhere.test"), None);
}

#[test]
fn a_full_file_is_read() {
    let config = parse(
        r#"
        data_dir = "/srv/p"
        [mirror]
        listen = "[::1]:1"
        tls_certificate = "/c.pem"
        tls_key = "/k.pem"
        [registries."registry.test:5000"]
        url = "http://127.0.0.1:5000"
        [registries."quay.test"]
        ca_file = "/ca.pem"
        [peer]
        advertise = "10.0.0.7:65003"
        [control]
        join = "control.test:65004"
        token_file = "/t"
        [store]
        limit = "100GiB"
        [labels]
        host = "n1"
        [log]
        format = "json"
        "#,
    )
    .unwrap();
    assert_eq!(config.data_dir, Path::new("/srv/p"));
    assert_eq!(config.mirror.tls.as_ref().unwrap().key, Path::new("/k.pem"));
    let url = |host| config.registry_url(host).unwrap().to_string();
    assert_eq!(url("registry.test:5000"), "http://127.0.0.1:5000/");
    assert_eq!(url("quay.test"), "https://quay.test/");
    assert_eq!(config.control.join.as_deref(), Some("control.test:65004"));
    assert_eq!(config.store.limit, StoreLimit::Bytes(100 << 30));
    assert_eq!(config.labels.host, "n1");
    assert_eq!(config.log.format, LogFormat::Json);
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_known() {
    for (text, place, key, hint) in [
        (
            "[mirror]\nlisten_addr = 1",
            "pantala.toml:2",
            "mirror.listen_addr",
            "known here: listen, ",
        ),
        (
            "[mirror]\nlisen = \"x\"",
            "pantala.toml:2",
            "mirror.lisen",
            "did you mean `mirror.listen`?",
        ),
        (
            "datadir = \"/x\"",
            "pantala.toml:1",
            "datadir",
            "did you mean `data_dir`?",
        ),
        (
            "\n[mirrors]\nlisten = \"x\"",
            "pantala.toml:2",
            "mirrors",
            "did you mean `mirror`?",
        ),
        (
            "[mirror]\nstall_timeout_ms = 1",
            "pantala.toml:2",
            "mirror.stall_timeout_ms",
            "did you mean `source.stall_timeout_ms`?",
        ),
        (
            "[registries.\"a.test\"]\nuri = \"x\"",
            "pantala.toml:2",
            "registries.a.test.uri",
            "did you mean `registries.\"HOST\".url`?",
        ),
        (
            "[zzzzzzzz]",
            "pantala.toml:1",
            "zzzzzzzz",
            "known here: data_dir, mirror, ",
        ),
    ] {
        let error = parse(text).unwrap_err();
        assert!(matches!(error, ConfigError::UnknownKey { .. }), "{error:?}");
        assert_eq!(error.to_string(), format!("{place}: unknown key `{key}`"));
        assert!(error.hint().starts_with(hint), "{key}: {}", error.hint());
    }
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_its_key() {
    for (text, start) in [
        (
            "[store]\nlimit = 5",
            "pantala.toml:2: `store.limit`: invalid type",
        ),
        (
            "[mirror]\n\nfirst_byte_timeout_ms = -1",
            "pantala.toml:3: `mirror.first_byte_timeout_ms`: ",
        ),
        ("mirror = 1", "pantala.toml:1: `mirror`: "),
        (
            "[registries]\nhost = \"x\"",
            "pantala.toml:2: `registries.host`: ",
        ),
    ] {
        let message = parse(text).unwrap_err().to_string();
        assert!(message.starts_with(start), "{message}");
    }
}

#[test]
fn a_value_that_makes_no_sense_is_explained() {
    for (text, key) in [
        ("data_dir = \"relative\"", "data_dir"),
        ("[mirror]\nlisten = \"localhost:1\"", "mirror.listen"),
        (
            "[mirror]\ndefault_registry = \"https://x\"",
            "mirror.default_registry",
        ),
        (
            "[mirror]\nfirst_byte_timeout_ms = 0",
            "mirror.first_byte_timeout_ms",
        ),
        ("[mirror]\nconnections_max = 0", "mirror.connections_max"),
        ("[mirror]\ntls_key = \"/k\"", "mirror.tls_key"),
        (
            "[mirror]\ntls_certificate = \"/c\"",
            "mirror.tls_certificate",
        ),
        ("[registries.\"a b\"]", "registries.a b"),
        (
            "[registries.\"a.test\"]\nurl = \"ftp://x\"",
            "registries.a.test.url",
        ),
        (
            "[registries.\"a.test\"]\nurl = \"a.test:5000\"",
            "registries.a.test.url",
        ),
        (
            "[registries.\"a.test\"]\nurl = \"http://u:p@x\"",
            "registries.a.test.url",
        ),
        (
            "[registries.\"a.test\"]\nurl = \"http://x/v2\"",
            "registries.a.test.url",
        ),
        ("[peer]\nadvertise = \"0.0.0.0:1\"", "peer.advertise"),
        ("[peer]\ndriver = \"dpdk\"", "peer.driver"),
        ("[peer]\nthreads = 9", "peer.threads"),
        ("[peer]\nuplink = \"fast\"", "peer.uplink"),
        ("[peer]\nuplink = \"1 Mbit/s\"", "peer.uplink"),
        ("[control]\njoin = \"control\"", "control.join"),
        ("[control]\njoin = \"https://control:1\"", "control.join"),
        ("[store]\nlimit = \"lots\"", "store.limit"),
        (
            "[store]\nlow_watermark_percent = 0",
            "store.low_watermark_percent",
        ),
        ("[source]\nretries_max = 101", "source.retries_max"),
        ("[log]\nformat = \"xml\"", "log.format"),
        ("[log]\nfilter = \"a=b=c\"", "log.filter"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(
            matches!(error, ConfigError::Invalid { .. }),
            "{text}: {error:?}"
        );
        assert!(error.to_string().contains(&format!("`{key}`: ")), "{error}");
        assert!(!error.hint().is_empty());
        assert!(!format!("{error:?}").contains("u:p@"), "{error:?}");
    }
}

#[test]
fn what_is_no_toml_is_refused_with_its_line() {
    let error = parse("[mirror]\nlisten = 127.0.0.1:1\n").unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("pantala.toml:2: not valid TOML"),
        "{error}"
    );
    assert!(
        parse("a = 1\na = 1")
            .unwrap_err()
            .to_string()
            .contains(":2:")
    );
}

#[test]
fn a_missing_file_is_an_error_only_if_it_was_asked_for() {
    let error = Config::load(Some(Path::new("/nonexistent/p.toml"))).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/p.toml"));
    assert!(error.hint().contains("--config"));
}
