//! The set-ups for kernels older than the one that runs the tests.

use std::time::{Duration, Instant};

use super::*;
use crate::kernel::real::{RealKernel, SetUp};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn every_set_up_sends_receives_sleeps_and_wakes_up() {
    for set_up in SetUp::ALL {
        let config = small();
        let kernel = RealKernel::new(
            &[set_up],
            config.entries,
            config.completions_max(),
            config.receive_buffers,
        )
        .unwrap();
        let mut core = Core::new(kernel, &config).unwrap();
        let udp = socket();
        let destination = udp.local_addr().unwrap();
        let id = core.add_socket(udp).unwrap();
        for round in 0..100 {
            let mut buffer = core.take_send_buffer().unwrap();
            buffer.extend_from_slice(&pattern(round, 1500));
            core.send(
                id,
                buffer,
                &SendHead {
                    destination,
                    ..head()
                },
            );
            let waker = core.waker();
            let thread = std::thread::spawn(move || waker.wake());
            let (mut is_sent, mut is_received, mut is_woken) = (false, false, false);
            let deadline = Instant::now() + PATIENCE;
            while !(is_sent && is_received && is_woken) {
                assert!(Instant::now() < deadline, "{set_up:?}");
                core.wait(Some(PATIENCE)).unwrap();
                while let Some(event) = core.next_event() {
                    match event {
                        Event::Received(received) => {
                            assert_eq!(received.payload, pattern(round, 1500));
                            is_received = true;
                        }
                        Event::Sent { result, .. } => {
                            assert_eq!(result.unwrap(), 1500);
                            is_sent = true;
                        }
                        Event::Woken => is_woken = true,
                        other => panic!("{other:?}"),
                    }
                }
            }
            thread.join().unwrap();
        }
    }
}
