//! The rights that loading takes, given up once it is done.

use std::io;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// What became of the rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// This thread, and those that it starts from now on, cannot load programs any more.
    Yes,
    /// The process has CAP_SYS_ADMIN, which includes them: dropping them would protect nothing, and would take
    /// large socket buffers away.
    IsAdmin,
}

/// Gives up CAP_BPF and CAP_NET_ADMIN for the calling thread and all that it starts afterwards. To be called
/// before any other thread is started, as each thread has its own.
///
/// # Errors
/// What the kernel says.
pub fn drop_capabilities() -> io::Result<Dropped> {
    let mut sets = capabilities(None)?;
    if sets.effective.contains(CapabilitySet::SYS_ADMIN) {
        return Ok(Dropped::IsAdmin);
    }
    let given_up = CapabilitySet::BPF | CapabilitySet::NET_ADMIN;
    sets.effective -= given_up;
    sets.permitted -= given_up;
    // What is inherited by programs that are started cannot be more than what is left.
    sets.inheritable -= given_up;
    set_capabilities(None, sets)?;
    Ok(Dropped::Yes)
}
