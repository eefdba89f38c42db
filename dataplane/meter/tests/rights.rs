//! With which rights the programs load, and what is left of them when the process dies. Needs root, to start
//! processes with less; without it these tests say so and pass.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aya::programs::loaded_programs;
use pantala_meter::kernel::{
    Dropped, KernelConfig, KernelError, KernelMeter, drop_capabilities, own_cgroup,
};

/// How long the kernel may take to clean up after a process.
const CLEAN_UP_MAX: Duration = Duration::from_secs(20);
/// What a process of these tests says when it has come so far.
const READY: &str = "ready";

/// A user of its own, so that its programs are told from those of other tests.
fn user(number: u32) -> u32 {
    1_000_000 + std::process::id() * 4 + number
}

/// Runs the ignored test `name` of this file as `user`, with `rights` and no others.
fn start(name: &str, user: u32, rights: &str) -> Option<Child> {
    if !rustix::process::geteuid().is_root() || own_cgroup().is_err() {
        println!("NOT TESTED HERE: it takes root and cgroup v2");
        return None;
    }
    let caps = |prefix: &str| format!("--{prefix}=-all{rights}");
    let user = user.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
    command.args([caps("inh-caps"), caps("ambient-caps"), caps("bounding-set")]);
    command.args(["--no-new-privs", "--pdeathsig", "KILL", "--"]);
    command.arg(std::env::current_exe().expect("this program"));
    command.args([
        "--ignored",
        "--exact",
        "--nocapture",
        "--test-threads=1",
        name,
    ]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    Some(child.expect("setpriv is in util-linux"))
}

fn passes(name: &str, user: u32, rights: &str) {
    let Some(child) = start(name, user, rights) else {
        return;
    };
    let output = child.wait_with_output().expect("ends");
    let said = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&said)
    );
}

/// The programs that `user` has loaded.
fn programs_of(user: u32) -> usize {
    loaded_programs()
        .flatten()
        .filter(|program| program.created_by_uid() == Some(user))
        .count()
}

#[test]
fn two_capabilities_are_enough_and_are_given_up_after_loading() {
    passes("child_loads_and_gives_up", user(0), ",+bpf,+net_admin");
}

#[test]
#[ignore = "runs as another user, started by the test above"]
fn child_loads_and_gives_up() {
    let meter = KernelMeter::load(&KernelConfig::default()).expect("two capabilities do");
    assert_eq!(drop_capabilities().expect("dropped"), Dropped::Yes);
    let refused = KernelMeter::load(&KernelConfig::default());
    assert!(
        matches!(refused, Err(KernelError::NotPermitted { .. })),
        "{refused:?}"
    );
    // What is loaded goes on without them.
    meter.steered().expect("still read");
}

#[test]
fn without_the_capabilities_the_refusal_says_which_are_missing() {
    passes("child_is_refused", user(1), "");
}

#[test]
#[ignore = "runs as another user, started by the test above"]
fn child_is_refused() {
    let error = KernelMeter::load(&KernelConfig::default()).expect_err("no rights");
    assert!(matches!(error, KernelError::NotPermitted { .. }), "{error}");
    assert!(error.to_string().contains("CAP_BPF"), "{error}");
}

#[test]
fn a_process_that_is_killed_leaves_nothing_in_the_kernel() {
    let user = user(2);
    let Some(mut child) = start("child_waits_to_be_killed", user, ",+bpf,+net_admin") else {
        return;
    };
    let stdout = BufReader::new(child.stdout.take().expect("piped"));
    let is_ready = stdout
        .lines()
        .any(|line| line.is_ok_and(|line| line.contains(READY)));
    assert!(is_ready, "the process ended before it was ready");
    assert_eq!(programs_of(user), 3);
    child.kill().expect("killed");
    child.wait().expect("ended");
    let start = Instant::now();
    while programs_of(user) > 0 {
        assert!(start.elapsed() < CLEAN_UP_MAX, "programs are left");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "runs as another user, started by the test above"]
fn child_waits_to_be_killed() {
    let _meter = KernelMeter::load(&KernelConfig::default()).expect("two capabilities do");
    println!("{READY}");
    std::thread::sleep(CLEAN_UP_MAX * 2);
}
