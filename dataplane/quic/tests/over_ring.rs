//! The suite over io_uring; where the kernel forbids it, it runs over tokio once more and says why.

mod suite;

use pantala_quic::{DriverChoice, DriverKind};

const DRIVER: DriverChoice = DriverChoice::Auto;

#[tokio::test]
async fn the_ring_is_taken_wherever_the_kernel_allows_it() {
    let endpoint = suite::cluster::Authority::new().node();
    let report = endpoint.driver();
    match (pantala_uring::probe(), report.kind) {
        (Ok(()), DriverKind::Ring { threads }) => assert!(threads > 0),
        (Err(error), DriverKind::Tokio) => {
            eprintln!("NOT TESTED: the ring driver: {error}");
            assert_eq!(report.why, error.to_string());
        }
        (probed, kind) => panic!("{probed:?}, but the driver is {kind:?}"),
    }
}
