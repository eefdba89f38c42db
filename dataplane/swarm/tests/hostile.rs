//! Inputs in any order, with any content: the machine stays consistent and within its bounds.

use std::time::Duration;

use pantala_swarm::{
    Action, Author, Candidate, Download, DownloadConfig, Failure, Gone, Input, ReaderId, Recheck,
    RequestId,
};
use pantala_wire::{ByteRange, NodeId, PieceIndex, PieceLayout, PieceRun, PieceSet, Priority};
use proptest::prelude::*;

fn failure() -> impl Strategy<Value = Failure> {
    let after = proptest::option::of((0u64..100_000).prop_map(Duration::from_millis));
    prop_oneof![
        Just(Failure::Unreachable),
        Just(Failure::Stalled),
        Just(Failure::Busy),
        Just(Failure::NotHeld),
        Just(Failure::Lied),
        Just(Failure::Conflict),
        Just(Failure::Refused {
            detail: "no".into()
        }),
        after.prop_map(|after| Failure::Retry {
            after,
            detail: "cut".into()
        }),
        Just(Failure::Fatal("404".into())),
        Just(Failure::Unauthorised),
    ]
}

fn input() -> impl Strategy<Value = Input> {
    let parent = || (0u8..20).prop_map(|n| NodeId::new([n; 32]));
    let request = || (0u64..120).prop_map(RequestId);
    let piece = || (0u32..45).prop_map(PieceIndex);
    let run = || {
        (0u32..45, prop_oneof![0u32..20, Just(u32::MAX)])
            .prop_map(|(first, count)| PieceRun { first, count })
    };
    let author = || {
        prop_oneof![
            Just(Author::This),
            Just(Author::Unknown),
            parent().prop_map(Author::Other)
        ]
    };
    let priority = || (0u32..5).prop_map(Priority::from_wire);
    let reader = || (0u64..4).prop_map(ReaderId);
    let time = || (0u64..20_000).prop_map(Duration::from_millis);
    let range = (0u64..50 << 20, 1u64..50 << 20)
        .prop_map(|(start, len)| ByteRange::new(start, start + len).unwrap());
    let gone = prop_oneof![
        Just(Gone::Unreachable),
        Just(Gone::Closed),
        Just(Gone::Dropped),
        Just(Gone::Refused),
        Just(Gone::Lied)
    ];
    let outcome = prop_oneof![
        Just(Recheck::Same),
        author().prop_map(|author| Recheck::Replaced { author }),
        failure().prop_map(Recheck::Failed)
    ];
    let demand = prop_oneof![
        (reader(), range, priority()).prop_map(|(reader, range, priority)| Input::Want {
            reader,
            range,
            priority
        }),
        reader().prop_map(|reader| Input::Unwant { reader }),
        priority().prop_map(|priority| Input::FetchAll { priority }),
        Just(Input::FetchAllEnd),
    ];
    let control = prop_oneof![
        Just(Input::ControlUp),
        Just(Input::ControlDown),
        proptest::collection::vec((parent(), any::<bool>()), 0..30).prop_map(|parents| {
            let candidate = |(id, near)| Candidate { id, near };
            Input::Parents(parents.into_iter().map(candidate).collect())
        }),
        (run(), time()).prop_map(|(pieces, expires_in)| Input::Lease { pieces, expires_in }),
        run().prop_map(|pieces| Input::LeaseCut { pieces }),
        proptest::collection::vec(parent(), 0..3).prop_map(Input::ShutOut),
        (time(), any::<u32>()).prop_map(|(retry_after, sharing_count)| Input::LeaseWait {
            retry_after,
            sharing_count,
        }),
    ];
    let peers = prop_oneof![
        (
            parent(),
            proptest::collection::vec(run(), 0..4),
            any::<bool>()
        )
            .prop_map(|(parent, runs, complete)| Input::Have {
                parent,
                runs,
                complete
            }),
        (parent(), gone).prop_map(|(parent, reason)| Input::ParentGone { parent, reason }),
    ];
    let requests = prop_oneof![
        (request(), 0u32..600).prop_map(|(request, groups)| Input::Progress { request, groups }),
        (proptest::option::of(request()), piece(), author()).prop_map(
            |(request, piece, author)| Input::PieceDone {
                request,
                piece,
                author
            }
        ),
        request().prop_map(|request| Input::RequestDone { request }),
        (request(), failure())
            .prop_map(|(request, failure)| Input::RequestFailed { request, failure }),
    ];
    let rest = prop_oneof![
        any::<bool>().prop_map(|available| Input::SourceChanged { available }),
        piece().prop_map(|piece| Input::PieceLost { piece }),
        any::<bool>().prop_map(|ok| Input::Verified { ok }),
        (piece(), outcome).prop_map(|(piece, outcome)| Input::Rechecked { piece, outcome }),
        Just(Input::Tick),
    ];
    prop_oneof![1 => demand, 2 => control, 3 => peers, 4 => requests, 1 => rest]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_inputs_leave_the_books_right(
        pieces in 0u32..40,
        seed in any::<u64>(),
        inputs in proptest::collection::vec((input(), 0u64..3000), 1..150),
    ) {
        let layout = PieceLayout::new(u64::from(pieces) << 20).unwrap();
        let config = DownloadConfig::default();
        let mut now = Duration::from_secs(1);
        let held = PieceSet::empty(pieces);
        let mut core = Download::new(config.clone(), layout, held, seed, now);
        core.handle(now, Input::SourceChanged { available: true });
        let mut actions_count = 0;
        for (input, pause_ms) in inputs {
            now += Duration::from_millis(pause_ms);
            core.handle(now, input);
            while let Some(action) = core.poll_action() {
                actions_count += 1;
                if let Action::FetchSource { pieces, .. } = action {
                    prop_assert!(pieces.count <= config.source_run_pieces_max);
                }
            }
            prop_assert_eq!(core.inconsistency(), None);
            prop_assert!(core.next_timeout().is_none_or(|due| due > now));
        }
        prop_assert!(actions_count < 150 * 400);
    }
}
