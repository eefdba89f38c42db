//! Little-endian fields of structures on disk, read only where the bytes are there.

use super::FormatError;

/// The bytes of one structure. The accessors take offsets within it that the caller knows to lie
/// inside the length it was made with; beyond it they give zeros, never a panic.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// `len` bytes of `image` from `start`.
    pub(super) fn of(
        image: &'a [u8],
        what: &'static str,
        start: u64,
        len: u64,
    ) -> Result<Self, FormatError> {
        slice(image, what, start, len).map(Self)
    }

    /// Bytes that the caller has cut out already.
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        if let Some(from) = self.0.get(at..).and_then(|rest| rest.get(..N)) {
            out.copy_from_slice(from);
        }
        out
    }
    pub(super) fn u8(&self, at: usize) -> u8 {
        self.bytes::<1>(at)[0]
    }
    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }
    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }
    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

/// `len` bytes of `image` from `start`, or the error that says which structure is cut.
pub(super) fn slice<'a>(
    image: &'a [u8],
    what: &'static str,
    start: u64,
    len: u64,
) -> Result<&'a [u8], FormatError> {
    let cut = || FormatError::Truncated {
        what,
        start,
        len,
        end: image.len() as u64,
    };
    let from = usize::try_from(start).map_err(|_| cut())?;
    let len = usize::try_from(len).map_err(|_| cut())?;
    let to = from.checked_add(len).ok_or_else(cut)?;
    image.get(from..to).ok_or_else(cut)
}
