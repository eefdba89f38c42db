//! Single behaviours of a download, each driven by hand.

mod rig;
mod without_control;

use std::time::Duration;

use pantala_swarm::{Action, Author, Blame, FailReason, Failure, Gone, Input, Recheck, State};
use pantala_wire::{NodeId, PieceIndex, PieceRun, PieceSet, Priority};

use rig::{READER, Rig, asks, fetches, ms, node, run, source_fetches};

#[test]
fn the_first_want_subscribes_and_asks_for_a_lease_in_one_round() {
    let mut rig = Rig::new(50).with_control().with_source().with_parents(2);
    let actions = rig.read(3, 50);
    assert!(actions.contains(&Action::Subscribe { parent: node(1) }));
    assert!(actions.contains(&Action::Subscribe { parent: node(2) }));
    assert!(actions.contains(&Action::AskLease {
        wanted: vec![run(3, 47)],
        urgent: PieceIndex(3)
    }));
    assert!(source_fetches(&actions).is_empty());
}

#[test]
fn a_silent_control_is_waited_for_exactly_as_long_as_configured() {
    let mut rig = Rig::new(50).with_control().with_source();
    rig.read(0, 50);
    let patience = rig.config.control_patience;
    assert!(source_fetches(&rig.pass(patience - ms(1))).is_empty());
    let alone = source_fetches(&rig.pass(ms(1)));
    assert_eq!(alone[0].1, run(0, 1));
    assert!(alone.iter().all(|(_, _, leased)| !leased));
}

#[test]
fn a_reader_that_control_told_to_wait_goes_alone_for_its_next_piece_only() {
    let mut rig = Rig::new(50).with_control().with_source();
    rig.read(0, 50);
    let wait = Input::LeaseWait {
        retry_after: Duration::from_secs(60),
        sharing_count: 2,
    };
    rig.feed(wait);
    let patience = rig.config.first_wait_patience;
    assert!(source_fetches(&rig.pass(patience - ms(1))).is_empty());
    let alone = source_fetches(&rig.pass(ms(1)));
    assert_eq!(alone.len(), 1, "the rest is left to who leased it");
    assert_eq!(alone[0].1, run(0, 1));
    // With its first bytes, a reader has time.
    rig.feed(Input::PieceDone {
        request: Some(alone[0].0),
        piece: PieceIndex(0),
        author: Author::This,
    });
    rig.read(1, 50);
    let mut waited = patience;
    let alone = loop {
        rig.feed(Input::LeaseWait {
            retry_after: Duration::from_secs(60),
            sharing_count: 2,
        });
        let alone = source_fetches(&rig.pass(ms(500)));
        waited += ms(500);
        if !alone.is_empty() {
            break alone;
        }
    };
    assert_eq!(alone[0].1, run(1, 1));
    assert!(waited >= rig.config.lease_wait_patience);
}

#[test]
fn while_pieces_appear_in_the_swarm_the_wait_is_longer_but_bounded() {
    let mut rig = Rig::new(50).with_control().with_source().with_parents(1);
    rig.read(0, 50);
    rig.have(1, &[]);
    let mut alone = Vec::new();
    let began = rig.now;
    for piece in 1..40 {
        rig.feed(Input::LeaseWait {
            retry_after: ms(200),
            sharing_count: 2,
        });
        alone.extend(source_fetches(&rig.pass(ms(100))));
        if !alone.is_empty() {
            break;
        }
        rig.have(1, &[run(piece, 1)]);
    }
    let waited = rig.now - began;
    assert_eq!(alone[0].1.first, 0);
    assert!(waited > rig.config.first_wait_patience);
    assert!(waited <= rig.config.first_wait_max + ms(100));
}

#[test]
fn a_lease_is_fetched_in_runs_and_what_a_parent_offers_goes_back() {
    let mut rig = Rig::new(100).with_control().with_source().with_parents(1);
    rig.fill();
    rig.have(1, &[run(40, 2)]);
    let lease = Input::Lease {
        pieces: run(0, 50),
        expires_in: Duration::from_secs(10),
    };
    let actions = rig.feed(lease);
    assert!(actions.contains(&Action::ReturnLease { pieces: run(40, 2) }));
    let runs: Vec<PieceRun> = source_fetches(&actions).iter().map(|f| f.1).collect();
    assert_eq!(runs, [run(0, 32), run(32, 8), run(42, 8)]);
    assert_eq!(
        asks(&actions),
        1,
        "all of it is under way: the next is asked for"
    );
}

#[test]
fn an_overrun_or_cut_lease_ends_with_the_piece_that_is_arriving() {
    for is_cut in [false, true] {
        let mut rig = Rig::new(4).with_control().with_source();
        rig.fill();
        let lease = Input::Lease {
            pieces: run(0, 4),
            expires_in: ms(200),
        };
        let (request, ..) = source_fetches(&rig.feed(lease))[0];
        let pieces = run(1, 3);
        match is_cut {
            true => assert_eq!(rig.feed(Input::LeaseCut { pieces }), []),
            false => drop(rig.pass(ms(250))),
        }
        let actions = rig.done(request, 0);
        assert!(actions.contains(&Action::Cancel { request }));
        // What was cut is another's, and not this node's to return.
        let is_returned = actions.contains(&Action::ReturnLease { pieces });
        assert_eq!(is_returned, !is_cut);
        assert!(source_fetches(&actions).is_empty());
    }
}

#[test]
fn a_stalled_parent_loses_its_piece_which_goes_on_elsewhere() {
    let mut rig = Rig::new(1).with_parents(2);
    rig.fill();
    let (request, parent, ..) = fetches(&rig.have(1, &[run(0, 1)]))[0];
    rig.feed(Input::Progress { request, groups: 5 });
    let stall = rig.config.stall_timeout;
    assert_eq!(rig.pass(stall - ms(1)), []);
    rig.have(2, &[]);
    let actions = rig.pass(ms(1));
    assert!(actions.contains(&Action::Cancel { request }));
    assert!(actions.contains(&Action::Unsubscribe {
        parent,
        failed: true
    }));
    let again = fetches(&rig.have(2, &[run(0, 1)]));
    assert_eq!((again[0].1, again[0].3), (node(2), 5));
}

#[test]
fn a_slow_urgent_piece_travels_twice_and_the_loser_is_cancelled() {
    let mut rig = Rig::new(1).with_parents(3);
    rig.read(0, 1);
    let (slow, ..) = fetches(&rig.have(1, &[run(0, 1)]))[0];
    rig.have(2, &[run(0, 1)]);
    rig.have(3, &[run(0, 1)]);
    let hedge = fetches(&rig.pass(rig.config.hedge_after));
    assert_eq!(hedge.len(), 1);
    assert_eq!(fetches(&rig.pass(rig.config.hedge_after)), []);
    let actions = rig.done(hedge[0].0, 0);
    assert!(actions.contains(&Action::Cancel { request: slow }));
    assert!(actions.contains(&Action::Verify));
}

#[test]
fn the_rarest_piece_goes_first_and_slots_are_left_for_urgent_ones() {
    let mut rig = Rig::new(40).with_parents(2);
    rig.fill();
    rig.have(2, &[]);
    // Parent 2 makes all pieces but the last common before parent 1 can be asked for anything.
    rig.core.handle(
        rig.now,
        Input::Have {
            parent: node(2),
            runs: vec![run(0, 39)],
            complete: false,
        },
    );
    let actions = rig.feed(Input::Have {
        parent: node(1),
        runs: vec![],
        complete: true,
    });
    let fetched = fetches(&actions);
    assert_eq!((fetched[0].1, fetched[0].2), (node(1), 39));
    assert_eq!(fetched.len(), 12, "six of eight slots at each parent");
    let urgent = fetches(&rig.read(39, 40));
    assert!(urgent.is_empty(), "in flight already");
    let free = (0..39).find(|p| fetched.iter().all(|f| f.2 != *p)).unwrap();
    assert_eq!(fetches(&rig.read(free, free + 1))[0].2, free);
}

#[test]
fn a_liar_is_blamed_and_never_asked_again() {
    let mut rig = Rig::new(3).with_parents(1);
    rig.fill();
    let fetched = fetches(&rig.have(1, &[run(0, 3)]));
    let actions = rig.fail(fetched[0].0, Failure::Lied);
    assert!(actions.contains(&Action::Unsubscribe {
        parent: node(1),
        failed: true
    }));
    assert!(actions.contains(&Action::Blame {
        node: node(1),
        why: Blame::WrongBytes
    }));
    rig.feed(Input::Parents(vec![node(1).into(), node(2).into()]));
    rig.have(1, &[run(0, 3)]);
    let later = rig.pass(Duration::from_secs(2));
    let again = |a: &Action| matches!(a, Action::Subscribe { parent } if *parent == node(1));
    assert!(!later.iter().any(again) && fetches(&later).is_empty());
}

#[test]
fn parents_that_disagree_are_not_blamed_and_the_piece_comes_whole() {
    let mut rig = Rig::new(1).with_parents(2);
    rig.fill();
    let (first, ..) = fetches(&rig.have(1, &[run(0, 1)]))[0];
    let request = first;
    rig.feed(Input::Progress { request, groups: 9 });
    rig.have(2, &[run(0, 1)]);
    let gone = Input::ParentGone {
        parent: node(1),
        reason: Gone::Closed,
    };
    let resumed = fetches(&rig.feed(gone))[0];
    assert_eq!(resumed.3, 9);
    let actions = rig.fail(resumed.0, Failure::Conflict);
    assert_eq!(fetches(&actions)[0].3, 0);
    assert!(!actions.iter().any(|a| matches!(a, Action::Blame { .. })));
}

#[test]
fn a_source_that_has_not_the_blob_fails_it_soon_unless_a_parent_helps() {
    for helped in [false, true] {
        let mut rig = Rig::new(1).with_source().with_parents(u8::from(helped));
        let (request, ..) = source_fetches(&rig.fill())[0];
        rig.fail(request, Failure::Fatal("404 Not Found".into()));
        let actions = rig.pass(rig.config.lonely_patience);
        let reason = FailReason::Source("404 Not Found".into());
        assert_eq!(actions.contains(&Action::Fail { reason }), !helped);
        if helped {
            let fetched = fetches(&rig.have(1, &[run(0, 1)]));
            assert!(rig.done(fetched[0].0, 0).contains(&Action::Verify));
        }
    }
}

#[test]
fn a_new_credential_revives_a_source_that_refused() {
    let mut rig = Rig::new(1).with_source();
    let (request, ..) = source_fetches(&rig.fill())[0];
    assert!(source_fetches(&rig.fail(request, Failure::Unauthorised)).is_empty());
    let again = rig.feed(Input::SourceChanged { available: true });
    assert_eq!(source_fetches(&again).len(), 1);
}

#[test]
fn nobody_waits_so_nothing_is_fetched_any_more() {
    let mut rig = Rig::new(9).with_control().with_source().with_parents(1);
    rig.read(0, 9);
    let fetched = fetches(&rig.have(1, &[run(0, 1)]));
    rig.feed(Input::Lease {
        pieces: run(1, 3),
        expires_in: Duration::from_secs(9),
    });
    let actions = rig.feed(Input::Unwant { reader: READER });
    let request = fetched[0].0;
    // A single piece under way is let finish; a run is not.
    assert!(!actions.contains(&Action::Cancel { request }));
    assert!(actions.iter().any(|a| matches!(a, Action::Cancel { .. })));
    rig.feed(Input::PieceDone {
        request: Some(request),
        piece: PieceIndex(0),
        author: Author::Other(node(1)),
    });
    assert!(actions.contains(&Action::ReturnLease { pieces: run(1, 3) }));
    let later = rig.pass(rig.config.unsubscribe_after);
    assert_eq!(
        later,
        [Action::Unsubscribe {
            parent: node(1),
            failed: false
        }]
    );
    assert_eq!(rig.core.next_timeout(), None);
}

#[test]
fn a_wrong_sha256_finds_the_author_of_the_wrong_piece() {
    let mut rig = Rig::holding(20, PieceSet::full(20)).with_source();
    for piece in 0..20 {
        let author = match piece {
            3 | 15 => Author::Other(node(6)),
            7 => Author::Other(node(5)),
            _ => Author::This,
        };
        rig.core.set_author(PieceIndex(piece), author);
    }
    rig.fill();
    let asked = rig.feed(Input::Verified { ok: false });
    let rechecked = |actions: &[Action]| -> Vec<u32> {
        let piece = |a: &Action| match a {
            Action::Recheck { piece } => Some(piece.0),
            _ => None,
        };
        actions.iter().filter_map(piece).collect()
    };
    assert_eq!(rechecked(&asked), [3, 7, 15, 0]);
    let outcome = Recheck::Replaced {
        author: Author::Other(node(6)),
    };
    let piece = PieceIndex(3);
    let actions = rig.feed(Input::Rechecked { piece, outcome });
    let why = Blame::FalseClaim(PieceIndex(3));
    assert!(actions.contains(&Action::Blame { node: node(6), why }));
    let mut last = Vec::new();
    for piece in [7, 15, 0] {
        assert_eq!(last, []);
        last = rig.feed(Input::Rechecked {
            piece: PieceIndex(piece),
            outcome: Recheck::Same,
        });
    }
    assert_eq!(
        last,
        [Action::Verify],
        "the culprit is found: no need to read all again"
    );
    assert_eq!(rig.feed(Input::Verified { ok: true }), [Action::Complete]);
}

#[test]
fn a_source_whose_bytes_are_wrong_is_told_from_a_liar() {
    let mut rig = Rig::holding(1, PieceSet::full(1)).with_source();
    rig.fill();
    rig.feed(Input::Verified { ok: false });
    rig.feed(Input::Rechecked {
        piece: PieceIndex(0),
        outcome: Recheck::Same,
    });
    let actions = rig.feed(Input::Verified { ok: false });
    let reason = FailReason::SourceCorrupt;
    assert_eq!(actions, [Action::Fail { reason }]);
    assert!(matches!(rig.core.state(), State::Failed(_)));
    assert_eq!(rig.core.next_timeout(), None);
}

#[test]
fn an_empty_blob_is_verified_like_any_other() {
    let mut rig = Rig::new(0);
    assert_eq!(rig.fill(), [Action::Verify]);
    assert_eq!(rig.feed(Input::Verified { ok: true }), [Action::Complete]);
}

#[test]
fn a_piece_that_rots_after_the_end_is_fetched_and_the_whole_verified_again() {
    let mut rig = Rig::holding(2, PieceSet::full(2)).with_source();
    rig.fill();
    rig.feed(Input::Verified { ok: true });
    let lost = Input::PieceLost {
        piece: PieceIndex(1),
    };
    let (request, pieces, _) = source_fetches(&rig.feed(lost))[0];
    assert_eq!((pieces, rig.core.state()), (run(1, 1), &State::Running));
    assert_eq!(rig.done(request, 1), [Action::Verify]);
}

#[test]
fn the_parents_kept_are_those_that_control_names() {
    let mut rig = Rig::new(9).with_parents(40);
    let max = rig.config.parents_max as usize;
    let subscribed = |actions: &[Action]| -> Vec<NodeId> {
        let parent = |a: &Action| match a {
            Action::Subscribe { parent } => Some(*parent),
            _ => None,
        };
        actions.iter().filter_map(parent).collect()
    };
    assert_eq!(subscribed(&rig.fill()).len(), max);
    rig.have(1, &[]);
    let actions = rig.feed(Input::Parents(vec![node(50).into(), node(1).into()]));
    assert_eq!(subscribed(&actions), [node(50)]);
    let left = |a: &&Action| matches!(a, Action::Unsubscribe { .. });
    assert_eq!(actions.iter().filter(left).count(), 1);
}

#[test]
fn the_largest_number_of_pieces_is_fetched_from_many_parents_and_verified() {
    let count = 16 * 1024;
    let mut rig = Rig::new(count)
        .with_control()
        .with_source()
        .with_parents(16);
    rig.core.handle(
        rig.now,
        Input::FetchAll {
            priority: Priority::Bulk,
        },
    );
    let mut actions: Vec<Action> = std::iter::from_fn(|| rig.core.poll_action()).collect();
    for parent in 1..=16 {
        let have = Input::Have {
            parent: node(parent),
            runs: vec![],
            complete: true,
        };
        rig.core.handle(rig.now, have);
        actions.extend(std::iter::from_fn(|| rig.core.poll_action()));
    }
    let mut queue: std::collections::VecDeque<_> = fetches(&actions).into();
    while let Some((request, _, piece, _)) = queue.pop_front() {
        rig.now += Duration::from_micros(100);
        let piece = PieceIndex(piece);
        let (request, author) = (Some(request), Author::Unknown);
        rig.core.handle(
            rig.now,
            Input::PieceDone {
                request,
                piece,
                author,
            },
        );
        actions = std::iter::from_fn(|| rig.core.poll_action()).collect();
        queue.extend(fetches(&actions));
    }
    assert_eq!(actions, [Action::Verify]);
}
