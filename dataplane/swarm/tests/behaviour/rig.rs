//! A download that is driven by hand.

use std::time::Duration;

use pantala_swarm::{
    Action, Author, Download, DownloadConfig, Failure, Input, ReaderId, RequestId,
};
use pantala_wire::{ByteRange, NodeId, PieceIndex, PieceLayout, PieceRun, PieceSet, Priority};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const READER: ReaderId = ReaderId(1);

/// A download, the time, and what it did last.
pub(crate) struct Rig {
    pub(crate) core: Download,
    pub(crate) now: Duration,
    pub(crate) config: DownloadConfig,
}

pub(crate) fn node(n: u8) -> NodeId {
    NodeId::new([n; 32])
}
pub(crate) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}
pub(crate) fn run(first: u32, count: u32) -> PieceRun {
    PieceRun { first, count }
}

impl Rig {
    pub(crate) fn new(pieces: u32) -> Self {
        Self::holding(pieces, PieceSet::empty(pieces))
    }
    pub(crate) fn seeded(pieces: u32, seed: u64) -> Self {
        Self::made(pieces, PieceSet::empty(pieces), seed)
    }
    pub(crate) fn holding(pieces: u32, held: PieceSet) -> Self {
        Self::made(pieces, held, 42)
    }
    fn made(pieces: u32, held: PieceSet, seed: u64) -> Self {
        let layout = PieceLayout::new(u64::from(pieces) * MIB).unwrap();
        let config = DownloadConfig {
            source_fetches_max: 4,
            ..DownloadConfig::default()
        };
        let now = Duration::from_secs(100);
        Self {
            core: Download::new(config.clone(), layout, held, seed, now),
            now,
            config,
        }
    }
    pub(crate) fn feed(&mut self, input: Input) -> Vec<Action> {
        self.core.handle(self.now, input);
        let actions = std::iter::from_fn(|| self.core.poll_action()).collect();
        assert_eq!(self.core.inconsistency(), None);
        actions
    }
    /// Lets time pass, with a tick whenever one is due.
    pub(crate) fn pass(&mut self, time: Duration) -> Vec<Action> {
        let end = self.now + time;
        let mut actions = Vec::new();
        while let Some(due) = self.core.next_timeout().filter(|due| *due <= end) {
            self.now = due;
            actions.extend(self.feed(Input::Tick));
        }
        self.now = end;
        actions
    }
    pub(crate) fn read(&mut self, first: u32, end: u32) -> Vec<Action> {
        let range = ByteRange::new(u64::from(first) * MIB, u64::from(end) * MIB).unwrap();
        self.feed(Input::Want {
            reader: READER,
            range,
            priority: Priority::Client,
        })
    }
    pub(crate) fn fill(&mut self) -> Vec<Action> {
        self.feed(Input::FetchAll {
            priority: Priority::Bulk,
        })
    }
    pub(crate) fn with_control(mut self) -> Self {
        self.feed(Input::ControlUp);
        self
    }
    pub(crate) fn with_source(mut self) -> Self {
        self.feed(Input::SourceChanged { available: true });
        self
    }
    /// Parents 1 to `count`, listed.
    pub(crate) fn with_parents(mut self, count: u8) -> Self {
        self.feed(Input::Parents(
            (1..=count).map(|n| node(n).into()).collect(),
        ));
        self
    }
    pub(crate) fn have(&mut self, parent: u8, runs: &[PieceRun]) -> Vec<Action> {
        self.feed(Input::Have {
            parent: node(parent),
            runs: runs.to_vec(),
            complete: false,
        })
    }
    pub(crate) fn done(&mut self, request: RequestId, piece: u32) -> Vec<Action> {
        self.feed(Input::PieceDone {
            request: Some(request),
            piece: PieceIndex(piece),
            author: Author::Other(node(9)),
        })
    }
    pub(crate) fn fail(&mut self, request: RequestId, failure: Failure) -> Vec<Action> {
        self.feed(Input::RequestFailed { request, failure })
    }
}

pub(crate) fn fetches(actions: &[Action]) -> Vec<(RequestId, NodeId, u32, u32)> {
    let fetch = |action: &Action| match action {
        Action::Fetch {
            request,
            parent,
            piece,
            first_group,
            ..
        } => Some((*request, *parent, piece.0, *first_group)),
        _ => None,
    };
    actions.iter().filter_map(fetch).collect()
}

pub(crate) fn source_fetches(actions: &[Action]) -> Vec<(RequestId, PieceRun, bool)> {
    let fetch = |action: &Action| match action {
        Action::FetchSource {
            request,
            pieces,
            leased,
            ..
        } => Some((*request, *pieces, *leased)),
        _ => None,
    };
    actions.iter().filter_map(fetch).collect()
}

pub(crate) fn asks(actions: &[Action]) -> usize {
    let ask = |a: &&Action| matches!(a, Action::AskLease { .. });
    actions.iter().filter(ask).count()
}
