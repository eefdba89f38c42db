//! The request that asks for a blob of which nothing is known, and what is made of its answers.

mod origin;

use futures_util::TryStreamExt as _;
use origin::{Act, Origin, blob, digest, head, honest, reply, source};
use pantala_source::{Credential, Lie, OpenedBlob, SourceError};

const FIRST_BYTES: u64 = 1000;

async fn open(origin: &Origin, data: &[u8]) -> Result<OpenedBlob, SourceError> {
    source()
        .open_blob(
            &origin.upstream(),
            &"test/app".parse().unwrap(),
            &digest(data),
            FIRST_BYTES,
            &Credential::NONE,
        )
        .await
}

async fn bytes(opened: OpenedBlob, end: u64) -> Result<Vec<u8>, SourceError> {
    let body = opened.into_body(end).unwrap();
    body.try_fold(Vec::new(), |mut all, chunk| async move {
        all.extend_from_slice(&chunk);
        Ok(all)
    })
    .await
}

#[tokio::test]
async fn one_request_tells_the_size_and_brings_the_bytes() {
    for len in [1, 999, 1000, 1001, 5000] {
        let data = blob(len, 1);
        let served = data.clone();
        let origin = Origin::start(move |_, request| honest(&served, request)).await;
        let mut opened = open(&origin, &data).await.unwrap();
        assert_eq!(opened.size(), len as u64);
        let head = opened.peek().await.unwrap();
        assert!(!head.is_empty() && data.starts_with(&head));
        let end = data.len().min(FIRST_BYTES as usize);
        assert_eq!(bytes(opened, end as u64).await.unwrap(), data[..end]);
        let requests = origin.requests();
        assert_eq!(requests.len(), 1, "{len}");
        assert_eq!(requests[0].range(), Some((0, FIRST_BYTES)));
    }
}

#[tokio::test]
async fn what_comes_with_the_answer_is_cut_or_continued_to_what_is_wanted() {
    let data = blob(5000, 2);
    let served = data.clone();
    let origin = Origin::start(move |_, request| honest(&served, request)).await;
    for end in [1, 500, 1000, 1001, 4000, 5000, 9000] {
        let opened = open(&origin, &data).await.unwrap();
        let wanted = end.min(data.len());
        assert_eq!(bytes(opened, end as u64).await.unwrap(), data[..wanted]);
    }
    assert!(open(&origin, &data).await.unwrap().into_body(0).is_none());
}

#[tokio::test]
async fn an_origin_that_ignores_ranges_or_cuts_still_gives_the_bytes() {
    let data = blob(5000, 3);
    let served = data.clone();
    let origin = Origin::start(move |_, _| reply(200, &[], &served)).await;
    let opened = open(&origin, &data).await.unwrap();
    assert_eq!(opened.size(), 5000);
    assert_eq!(bytes(opened, 1000).await.unwrap(), data[..1000]);

    let served = data.clone();
    let origin = Origin::start(move |number, request| match number {
        0 => {
            let lines = [
                ("Content-Range", "bytes 0-999/5000"),
                ("Content-Length", "1000"),
            ];
            let cut = [head(206, &lines), served[..300].to_vec()].concat();
            vec![Act::Send(cut), Act::Close]
        }
        _ => honest(&served, request),
    })
    .await;
    let opened = open(&origin, &data).await.unwrap();
    assert_eq!(bytes(opened, 1000).await.unwrap(), data[..1000]);
    assert_eq!(origin.requests()[1].range(), Some((300, 1000)));
}

#[tokio::test]
async fn a_refusal_is_told_as_one_and_asked_for_once() {
    type Is = fn(&SourceError) -> bool;
    let cases: [(u16, Is); 6] = [
        (
            401,
            |e| matches!(e, SourceError::Refused { headers, .. } if headers["www-authenticate"] == "Basic realm=r"),
        ),
        (403, |e| matches!(e, SourceError::Refused { .. })),
        (404, |e| matches!(e, SourceError::NotFound { .. })),
        (429, |e| matches!(e, SourceError::RateLimited { .. })),
        (503, |e| matches!(e, SourceError::Unavailable { .. })),
        (416, |e| {
            matches!(
                e,
                SourceError::Lied {
                    lie: Lie::RangeRefused,
                    ..
                }
            )
        }),
    ];
    for (status, is_right) in cases {
        let origin =
            Origin::start(move |_, _| reply(status, &[("WWW-Authenticate", "Basic realm=r")], b""))
                .await;
        let error = open(&origin, b"x").await.unwrap_err();
        assert!(is_right(&error), "{status}: {error:?}");
        assert_eq!(origin.requests().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_refusal_of_an_object_store_is_no_word_on_the_callers_right() {
    for status in [401, 403, 404] {
        let store = Origin::start(move |_, _| reply(status, &[], b"")).await;
        let location = store.url("/signed");
        let origin = Origin::start(move |_, _| reply(307, &[("Location", &location)], b"")).await;
        let error = open(&origin, b"x").await.unwrap_err();
        assert!(
            matches!(error, SourceError::Unavailable { .. }),
            "{error:?}"
        );
    }
    let data = blob(2000, 4);
    let served = data.clone();
    let store = Origin::start(move |_, request| honest(&served, request)).await;
    let location = store.url("/signed");
    let origin = Origin::start(move |_, _| reply(307, &[("Location", &location)], b"")).await;
    let opened = open(&origin, &data).await.unwrap();
    assert_eq!(bytes(opened, 1000).await.unwrap(), data[..1000]);
}

#[tokio::test]
async fn an_answer_without_a_size_or_about_something_else_opens_nothing() {
    let other = digest(b"other").to_string();
    let cases: Vec<Vec<u8>> = vec![
        head(
            206,
            &[("Content-Range", "bytes 0-9/*"), ("Content-Length", "10")],
        ),
        head(206, &[("Content-Length", "10")]),
        head(
            206,
            &[("Content-Range", "bytes 5-9/10"), ("Content-Length", "5")],
        ),
        head(
            206,
            &[("Content-Range", "bytes 0-9/20"), ("Content-Length", "11")],
        ),
        head(
            206,
            &[
                ("Content-Range", "bytes 0-4999/5000"),
                ("Content-Length", "5000"),
            ],
        ),
        head(200, &[("Connection", "close")]),
        head(200, &[("Content-Length", "0")]),
        head(
            200,
            &[("Content-Length", "10"), ("Content-Encoding", "gzip")],
        ),
        head(
            200,
            &[("Content-Length", "10"), ("Docker-Content-Digest", &other)],
        ),
        head(204, &[]),
        head(304, &[]),
    ];
    for (number, head) in cases.into_iter().enumerate() {
        let origin = Origin::start(move |_, _| vec![Act::Send(head.clone()), Act::Close]).await;
        let error = open(&origin, b"0123456789").await.unwrap_err();
        assert!(
            matches!(error, SourceError::Lied { .. }),
            "{number}: {error:?}"
        );
    }
}
