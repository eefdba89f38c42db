//! The kernel's atomic addition, which the standard library lacks for this target.

use core::arch::asm;

/// A sender may be preempted by another on the same processor, so that even a processor's own count needs
/// this; on a line that no other processor touches it is cheap.
#[inline(always)]
pub(crate) fn add(count: &mut u64, more: u64) {
    let at: *mut u64 = count;
    // SAFETY: writes the 8 bytes that `count` refers to, and nothing else.
    unsafe { asm!("lock *(u64 *)({at} + 0) += {more}", at = in(reg) at, more = in(reg) more) };
}
