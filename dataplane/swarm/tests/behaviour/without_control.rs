//! What nodes fetch from the source when control does not answer.

use std::time::Duration;

use pantala_swarm::{Action, Download, DownloadConfig, Input};
use pantala_wire::{PieceIndex, PieceLayout, PieceSet, Priority};

use crate::rig::{MIB, Rig, fetches, ms, node, run, source_fetches};

#[test]
fn without_control_and_parents_the_source_is_asked_at_once_in_reading_order() {
    let mut rig = Rig::new(50).with_source();
    let alone = source_fetches(&rig.read(5, 50));
    assert_eq!(alone.len(), rig.config.alone_fetches_max as usize);
    assert_eq!((alone[0].1, alone[1].1), (run(5, 8), run(13, 8)));
}

#[test]
fn nodes_without_control_fill_from_different_places() {
    let starts: Vec<u32> = (0..8)
        .map(|seed| {
            let layout = PieceLayout::new(1000 * MIB).unwrap();
            let held = PieceSet::empty(1000);
            let config = DownloadConfig::default();
            let mut core = Download::new(config, layout, held, seed, ms(0));
            core.handle(ms(0), Input::SourceChanged { available: true });
            core.handle(
                ms(0),
                Input::FetchAll {
                    priority: Priority::Bulk,
                },
            );
            let actions: Vec<Action> = std::iter::from_fn(|| core.poll_action()).collect();
            source_fetches(&actions)[0].1.first
        })
        .collect();
    let mut distinct = starts.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), starts.len(), "{starts:?}");
}

/// One node of a swarm of `sharing_count`: connected to a parent that has nothing yet.
fn one_of(sharing_count: u32, seed: u64) -> Rig {
    let mut rig = Rig::seeded(256, seed)
        .with_control()
        .with_source()
        .with_parents(1);
    rig.fill();
    rig.have(1, &[]);
    rig.feed(Input::LeaseWait {
        retry_after: Duration::from_secs(5),
        sharing_count,
    });
    rig
}

#[test]
fn nodes_that_lose_control_share_the_source_out_and_leave_nothing() {
    const NODES: u32 = 200;
    const RUNS: u32 = 256 / 8;
    let mut fetchers_max = 0;
    for salt in 0..8 {
        let mut first_round = 0;
        let mut drawn = PieceSet::empty(256);
        for seed in 0..NODES {
            let mut rig = one_of(NODES, u64::from(seed + salt * NODES));
            let at_once = source_fetches(&rig.feed(Input::ControlDown));
            first_round += at_once.len() as u32;
            // Whatever a node has drawn it fetches, one run after the other.
            let mut alone = at_once;
            let rounds = rig.config.draw_patience * 10;
            while let Some((request, pieces, leased)) = alone.pop() {
                assert!(!leased && pieces.count <= rig.config.alone_run_pieces_max);
                drawn.insert_run(pieces);
                for piece in pieces.range() {
                    alone.extend(source_fetches(&rig.done(request, piece)));
                }
            }
            let later = source_fetches(&rig.pass(rounds));
            assert!(
                !later.is_empty(),
                "after ten rounds everybody has drawn everything"
            );
        }
        fetchers_max = fetchers_max.max(first_round);
        assert!(!drawn.is_empty());
    }
    // Half of the runs, on average; all nodes at once would be two hundred times as many.
    assert!((1..=2 * RUNS).contains(&fetchers_max), "{fetchers_max}");
}

#[test]
fn while_the_swarm_grows_nobody_else_goes_to_the_source() {
    let mut rig = one_of(100_000, 7);
    assert!(source_fetches(&rig.feed(Input::ControlDown)).is_empty());
    for piece in 0..100 {
        let actions = rig.pass(rig.config.draw_patience - ms(1));
        assert!(source_fetches(&actions).is_empty(), "piece {piece}");
        for (request, _, piece, _) in fetches(&rig.have(1, &[run(piece, 1)])) {
            rig.done(request, piece);
        }
    }
    assert!(rig.core.held().contains(PieceIndex(99)));
    // Nothing grows any more: in the end it goes, however large the swarm is said to be.
    let alone = rig.pass(rig.config.starve_patience);
    assert!(!source_fetches(&alone).is_empty());
}

#[test]
fn who_is_connected_to_nobody_does_not_draw() {
    let mut rig = one_of(100_000, 7);
    rig.feed(Input::ControlDown);
    let gone = Input::ParentGone {
        parent: node(1),
        reason: pantala_swarm::Gone::Closed,
    };
    assert!(!source_fetches(&rig.feed(gone)).is_empty());
}
