//! What runs in the kernel: [`count`] adds up each peer's traffic, [`steer`] sends datagrams to their thread.
//!
//! Nothing here changes, delays or drops a packet. Whatever a program does not understand it leaves to the
//! kernel as if it were not there.

#![no_std]
#![no_main]
// Inline assembly for this target is not stable; `cargo xtask ebpf` allows it to this crate alone.
#![feature(asm_experimental_arch)]

mod atomic;
mod count;
mod steer;

/// The kernel gives the helpers that these programs call to programs of any licence but GPL's own.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier refuses a program that could.
    loop {}
}
