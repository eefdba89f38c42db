//! What a registry says of a blob before it is fetched, and what is made of it.

mod origin;

use origin::{Act, Origin, blob, digest, head, honest, probe, reply, source};
use pantala_source::{Credential, Lie, SourceError};

#[tokio::test]
async fn nobody_listening_is_an_error_in_bounded_time() {
    let origin = Origin::start(|_, _| vec![]).await;
    let upstream = origin.upstream();
    drop(origin);
    let error = source()
        .probe_blob(
            &upstream,
            &"test/app".parse().unwrap(),
            &digest(b""),
            &Credential::NONE,
        )
        .await
        .unwrap_err();
    assert!(
        matches!(error, SourceError::Unavailable { .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_size_is_found_where_head_does_not_tell_it() {
    let data = blob(1234, 5);
    type Head = fn(&[u8]) -> Vec<Act>;
    let heads: [Head; 5] = [
        |_| vec![Act::Send(head(200, &[("Connection", "close")])), Act::Close],
        |_| reply(200, &[], b""),
        |_| vec![Act::Send(head(405, &[("Content-Length", "0")]))],
        |_| vec![Act::Send(head(501, &[("Content-Length", "0")]))],
        |_| {
            let lines = [("Content-Length", "99"), ("Content-Encoding", "gzip")];
            vec![Act::Send(head(200, &lines))]
        },
    ];
    for (i, answer_head) in heads.into_iter().enumerate() {
        for ranges in [true, false] {
            let served = data.clone();
            let origin = Origin::start(move |_, request| {
                if request.method == "HEAD" {
                    answer_head(&served)
                } else if ranges {
                    honest(&served, request)
                } else {
                    reply(200, &[], &served)
                }
            })
            .await;
            let info = probe(&source(), &origin, &data).await.unwrap();
            assert_eq!(
                (info.size, info.accepts_ranges),
                (1234, Some(ranges)),
                "{i}"
            );
        }
    }
}

#[tokio::test]
async fn the_empty_blob_may_have_no_bytes_and_another_blob_may_not_stand_in() {
    let origin = Origin::start(|_, _| reply(200, &[], b"")).await;
    assert_eq!(probe(&source(), &origin, b"").await.unwrap().size, 0);
    let other = digest(b"other").to_string();
    let origin = Origin::start(move |_, _| {
        let lines = [("Content-Length", "5"), ("Docker-Content-Digest", &other)];
        vec![Act::Send(head(200, &lines))]
    })
    .await;
    let error = probe(&source(), &origin, b"this").await.unwrap_err();
    assert!(matches!(
        error,
        SourceError::Lied {
            lie: Lie::Digest(_),
            ..
        }
    ));
}
