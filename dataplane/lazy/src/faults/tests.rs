use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const DEVICE: DeviceId = DeviceId(1);

fn faults(fills_max: usize, background: bool) -> Faults<u32> {
    let mut faults = Faults::new(Limits {
        fills_max,
        ..Limits::default()
    });
    faults.add(DEVICE, 100 * MIB, background);
    faults
}

fn actions(faults: &mut Faults<u32>) -> Vec<Action<u32>> {
    std::iter::from_fn(|| faults.poll()).collect()
}

/// The fills among the actions: first byte, bytes, urgent.
fn fills(faults: &mut Faults<u32>) -> Vec<(FillId, u64, u64, bool)> {
    let fills = actions(faults)
        .into_iter()
        .filter_map(|action| match action {
            Action::Fill {
                fill,
                range,
                urgency,
                ..
            } => Some((fill, range.start(), range.len(), urgency == Priority::Fault)),
            Action::Answer { .. } => None,
        });
    fills.collect()
}

#[test]
fn a_fault_within_a_fill_under_way_waits_for_it() {
    let mut faults = faults(4, false);
    faults.fault(1, DEVICE, 5 * KIB, 4 * KIB);
    faults.fault(2, DEVICE, 60 * KIB, 4 * KIB);
    let fills: Vec<_> = fills(&mut faults).into_iter().filter(|f| f.3).collect();
    assert_eq!(fills.len(), 1);
    assert_eq!((fills[0].1, fills[0].2), (0, 64 * KIB));
    faults.filled(fills[0].0, true);
    let answer = |event| Action::Answer { event, ok: true };
    assert_eq!(actions(&mut faults), [answer(1), answer(2)]);
}

#[test]
fn faults_without_a_place_become_one_fill_with_their_neighbours() {
    let mut faults = faults(1, false);
    faults.fault(0, DEVICE, 50 * MIB, 4 * KIB);
    for event in 1..10 {
        faults.fault(event, DEVICE, u64::from(event) * 64 * KIB, 4 * KIB);
    }
    let first = fills(&mut faults).into_iter().find(|fill| fill.3).unwrap();
    faults.filled(first.0, true);
    let then: Vec<_> = fills(&mut faults).into_iter().filter(|f| f.3).collect();
    assert_eq!(then.len(), 1);
    assert_eq!((then[0].1, then[0].2), (64 * KIB, 9 * 64 * KIB));
}

#[test]
fn read_ahead_doubles_while_faults_follow_each_other_and_not_when_they_jump() {
    let mut faults = faults(64, false);
    let mut ahead = Vec::new();
    let mut fetched_to = 0;
    for event in 0..200 {
        let at = u64::from(event) * 128 * KIB;
        faults.fault(event, DEVICE, at, 128 * KIB);
        for (id, start, len, urgent) in fills(&mut faults) {
            if !urgent {
                assert!(start >= fetched_to, "nothing is read ahead twice");
                fetched_to = start + len;
                ahead.push(len);
            }
            faults.filled(id, true);
        }
    }
    assert_eq!(ahead[0], 512 * KIB);
    assert!((33 * MIB..=41 * MIB).contains(&fetched_to));
    let mut faults = self::faults(64, false);
    for event in 0..50 {
        faults.fault(event, DEVICE, u64::from(event * 37 % 50) * 2 * MIB, 4 * KIB);
    }
    assert!(fills(&mut faults).iter().all(|fill| fill.3));
}

#[test]
fn the_background_fill_goes_through_the_device_once_and_pauses_after_a_failure() {
    let mut faults = faults(4, true);
    let mut at = 0;
    let mut failed = false;
    loop {
        let fills = fills(&mut faults);
        let Some(&(id, start, len, urgent)) = fills.first() else {
            break;
        };
        assert!((start, fills.len(), urgent) == (at, 1, false));
        if !failed && start > 0 {
            failed = true;
            faults.filled(id, false);
            assert!(faults.poll().is_none());
            faults.tick();
            continue;
        }
        at += len;
        faults.filled(id, true);
    }
    assert_eq!(at, 100 * MIB);
}

#[test]
fn who_waits_for_a_device_that_is_removed_or_unknown_is_refused() {
    let mut faults = faults(1, false);
    for event in 0..3 {
        faults.fault(event, DEVICE, u64::from(event) * 10 * MIB, 1);
    }
    let first = fills(&mut faults)[0].0;
    faults.remove(DEVICE);
    faults.fault(3, DEVICE, 0, 1);
    faults.filled(first, true);
    let mut refused: Vec<_> = actions(&mut faults)
        .into_iter()
        .map(|action| match action {
            Action::Answer { event, ok: false } => event,
            other => panic!("{other:?}"),
        })
        .collect();
    refused.sort_unstable();
    assert_eq!(refused, [0, 1, 2, 3]);
}

#[test]
fn a_read_past_the_end_is_answered_at_once() {
    let mut faults = faults(1, false);
    faults.fault(1, DEVICE, 100 * MIB, u64::MAX);
    faults.fault(2, DEVICE, u64::MAX, u64::MAX);
    let answer = |event| Action::Answer { event, ok: true };
    assert_eq!(actions(&mut faults), [answer(1), answer(2)]);
}

#[derive(Debug, Clone)]
enum Step {
    Fault {
        device: u64,
        offset: u64,
        count: u64,
    },
    End {
        which: usize,
        ok: bool,
    },
    Remove {
        device: u64,
    },
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3_u64, 0..90 * MIB, prop_oneof![1..MIB, Just(u64::MAX)])
            .prop_map(|(device, offset, count)| Step::Fault { device, offset, count }),
        6 => (any::<usize>(), any::<bool>()).prop_map(|(which, ok)| Step::End { which, ok }),
        1 => (0..3_u64).prop_map(|device| Step::Remove { device }),
        1 => Just(Step::Tick),
    ]
}

proptest! {
    /// Whatever happens in whatever order: each fault is answered once, with a yes only after a fill
    /// that covers it has succeeded, and fills in flight stay below their bounds.
    #[test]
    fn each_fault_is_answered_once_and_never_before_its_bytes_are_there(
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let limits = Limits { fills_max: 3, ahead_max: 2, ..Limits::default() };
        let mut faults = Faults::new(limits);
        for device in 0..3 {
            faults.add(DeviceId(device), 90 * MIB, device == 0);
        }
        let mut asked: BTreeMap<u32, (u64, u64, u64)> = BTreeMap::new();
        let mut running: Vec<(FillId, DeviceId, ByteRange, Priority)> = Vec::new();
        let mut done: Vec<(DeviceId, ByteRange)> = Vec::new();
        let mut answers = 0;
        let mut event = 0;
        let mut steps = steps.into_iter();
        loop {
            while let Some(action) = faults.poll() {
                match action {
                    Action::Fill { fill, device, range, urgency } => {
                        running.push((fill, device, range, urgency));
                    }
                    Action::Answer { event, ok } => {
                        let (device, offset, count) = asked.remove(&event).expect("asked and not answered");
                        answers += 1;
                        let end = offset.saturating_add(count).min(90 * MIB);
                        let covered = offset >= end || done.iter().any(|(of, range)| {
                            of.0 == device && range.start() <= offset && end <= range.end()
                        });
                        prop_assert!(!ok || covered);
                    }
                }
            }
            let urgent = running.iter().filter(|r| r.3 == Priority::Fault).count();
            prop_assert!(urgent <= 3 && running.len() <= 3 + 2 + 1);
            let end_one = |running: &mut Vec<_>, which: usize| match running.len() {
                0 => None,
                len => Some(running.swap_remove(which % len)),
            };
            match steps.next() {
                Some(Step::Fault { device, offset, count }) => {
                    asked.insert(event, (device, offset, count));
                    faults.fault(event, DeviceId(device), offset, count);
                    event += 1;
                }
                Some(Step::End { which, ok }) => {
                    if let Some((fill, device, range, _)) = end_one(&mut running, which) {
                        if ok {
                            done.push((device, range));
                        }
                        faults.filled(fill, ok);
                    }
                }
                Some(Step::Remove { device }) => faults.remove(DeviceId(device)),
                Some(Step::Tick) => faults.tick(),
                None => match end_one(&mut running, 0) {
                    Some((fill, ..)) => faults.filled(fill, false),
                    None => break,
                },
            }
        }
        prop_assert!(asked.is_empty() && answers == event && faults.waiting() == 0);
    }
}
