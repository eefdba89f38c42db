//! Sandboxes that forbid the ring, as container runtimes do: a seccomp filter on one thread.

use pantala_uring::{Ring, RingError, Unsupported, probe};

use crate::rig::small;

/// Runs `test` on a thread for which `io_uring_setup` fails with `errno`.
fn without_io_uring(errno: i32, test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        let line = |code: u32, if_true: u8, if_false: u8, k: u32| libc::sock_filter {
            code: code as u16,
            jt: if_true,
            jf: if_false,
            k,
        };
        let mut program = [
            // The number of the system call.
            line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            line(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                0,
                1,
                libc::SYS_io_uring_setup as u32,
            ),
            line(
                libc::BPF_RET | libc::BPF_K,
                0,
                0,
                libc::SECCOMP_RET_ERRNO | errno as u32,
            ),
            line(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: the program lives through the calls, and the filter changes nothing but one system call of this thread.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            let mode = libc::SECCOMP_MODE_FILTER;
            assert_eq!(
                libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program),
                0
            );
        }
        test();
    })
    .join()
    .unwrap();
}

#[test]
fn a_sandbox_that_forbids_the_ring_is_named_as_the_reason() {
    without_io_uring(libc::EPERM, || {
        let refused = probe().unwrap_err();
        assert!(
            matches!(refused, Unsupported::Forbidden | Unsupported::Sysctl(_)),
            "{refused}"
        );
        let refused = Ring::new(&small()).err();
        assert!(
            matches!(refused, Some(RingError::Unsupported(_))),
            "{refused:?}"
        );
    });
}

#[test]
fn a_kernel_without_the_ring_is_named_as_the_reason() {
    without_io_uring(libc::ENOSYS, || {
        let refused = probe().unwrap_err();
        assert!(matches!(refused, Unsupported::Absent), "{refused}");
        assert!(refused.to_string().contains("no io_uring"), "{refused}");
    });
}

#[test]
fn too_little_memory_is_named_as_the_reason() {
    without_io_uring(libc::ENOMEM, || {
        let refused = probe().unwrap_err();
        assert!(refused.to_string().contains("RLIMIT_MEMLOCK"), "{refused}");
    });
}

#[test]
fn a_configuration_out_of_bounds_is_an_error_that_says_which() {
    let mut config = small();
    config.send_buffers = 0;
    let error = Ring::new(&config).err().unwrap();
    assert_eq!(
        error.to_string(),
        "ring: send_buffers is 0, and must be from 1 to 16,384"
    );
}
