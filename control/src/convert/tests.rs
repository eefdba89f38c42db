use super::*;
use proptest::prelude::*;
use prost::Message;

fn read(message: &proto::FromNode) -> FromNode {
    let bytes = message.encode_to_vec();
    assert!(bytes.len() <= MESSAGE_SIZE_MAX);
    match Inbound::try_from(proto::FromNode::decode(&bytes[..]).unwrap()).unwrap() {
        Inbound::Message(message) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_command_arrives_as_it_was_sent() {
    let digest = BlobDigest::new([1; 32]);
    let node = NodeId::new([2; 32]);
    let runs = vec![PieceRun { first: 3, count: 4 }];
    let piece_digest = PieceDigest([5; 32]);
    let claim = Claim {
        piece_digest,
        author: node,
        signature: [6; 64],
    };
    for command in [
        FromNode::OpenTask {
            digest,
            size_bytes: 7,
            has_source: true,
            held: runs.clone(),
            complete: false,
        },
        FromNode::AskOpening { digest },
        FromNode::ReturnOpening { digest },
        FromNode::CloseTask { digest },
        FromNode::AskLease {
            digest,
            wanted: runs.clone(),
            urgent: Some(PieceIndex(0)),
        },
        FromNode::ReturnLease {
            digest,
            pieces: runs.clone(),
        },
        FromNode::Fetched {
            digest,
            pieces: runs.clone(),
        },
        FromNode::Holding {
            digest,
            runs,
            complete: true,
        },
        FromNode::SourceHost {
            digest,
            host: "registry.example:5000".into(),
        },
        FromNode::SourceLimited {
            host: "registry.example".into(),
            retry_after: Some(Duration::from_millis(1)),
        },
        FromNode::Paths {
            reports: vec![PathReport {
                node,
                bytes: 11,
                busy: Duration::from_micros(12),
                failures: 13,
            }],
        },
        FromNode::Dropped { digest },
        FromNode::ParentFailed { digest, node },
        FromNode::FalseClaim {
            digest,
            piece: PieceIndex(8),
            claim,
            true_digest: PieceDigest([9; 32]),
            relayer: NodeId::new([10; 32]),
        },
        FromNode::Announce {
            holdings: Vec::new(),
            last: true,
        },
    ] {
        let sent = commands(&command);
        assert_eq!(sent.len(), 1);
        assert_eq!(read(&sent[0]), command);
    }
}

#[test]
fn every_answer_arrives_as_it_was_sent() {
    let digest = BlobDigest::new([1; 32]);
    let node = NodeId::new([2; 32]);
    let peer = Peer {
        node,
        address: "[::1]:5".parse().unwrap(),
        near: true,
    };
    let pieces = PieceRun { first: 3, count: 4 };
    let time = Duration::from_millis(6);
    let read = |message: &ToNode| event(message.into()).unwrap().unwrap();
    assert_eq!(
        read(&ToNode::Parents {
            digest,
            peers: vec![peer]
        }),
        Event::Parents {
            digest,
            peers: vec![peer]
        }
    );
    assert_eq!(
        read(&ToNode::Lease {
            digest,
            pieces,
            expires_in: time
        }),
        Event::Lease {
            digest,
            pieces,
            expires_in: time
        }
    );
    // A wait of less than a millisecond is still a wait.
    assert_eq!(
        read(&ToNode::LeaseWait {
            digest,
            retry_after: Duration::from_nanos(1),
            sharing_count: 7,
        }),
        Event::LeaseWait {
            digest,
            retry_after: Duration::from_millis(1),
            sharing_count: 7,
        }
    );
    for granted in [true, false] {
        assert_eq!(
            read(&ToNode::Opening { digest, granted }),
            Event::Opening { digest, granted }
        );
    }
    assert_eq!(
        read(&ToNode::ShutOut(vec![node])),
        Event::ShutOut(vec![node])
    );
    for reason in [
        RefusedReason::Full,
        RefusedReason::Size,
        RefusedReason::UnknownTask,
        RefusedReason::ShutOut,
    ] {
        assert_eq!(
            read(&ToNode::Refused { digest, reason }),
            Event::Refused { digest, reason }
        );
    }
}

#[test]
fn an_announcement_of_any_size_is_cut_into_messages_that_fit_and_ends_once() {
    let report = |number: u16, run_count: u32| {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&number.to_le_bytes());
        TaskReport {
            digest: BlobDigest::new(bytes),
            size_bytes: u64::MAX,
            has_source: true,
            wanted: true,
            complete: false,
            held: (0..run_count)
                .map(|i| PieceRun {
                    first: 2 * i,
                    count: 1,
                })
                .collect(),
            fetching: Vec::new(),
        }
    };
    let holdings: Vec<TaskReport> = (0..1000)
        .map(|number| report(number, u32::from(number) * 8))
        .collect();
    let sent = commands(&FromNode::Announce {
        holdings: holdings.clone(),
        last: true,
    });
    let mut arrived = Vec::new();
    for (index, message) in sent.iter().enumerate() {
        let FromNode::Announce { holdings, last } = read(message) else {
            panic!("no announcement");
        };
        assert_eq!(last, index + 1 == sent.len());
        arrived.extend(holdings);
    }
    assert_eq!(arrived, holdings);
}

proptest! {
    #[test]
    fn rubbish_is_an_error_or_a_message_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(message) = proto::FromNode::decode(&bytes[..]) {
            drop(Inbound::try_from(message));
        }
        if let Ok(message) = proto::ToNode::decode(&bytes[..]) {
            drop(event(message));
        }
    }
}
