//! The committed object of `ebpf/`, built by `cargo xtask ebpf`.

/// Aligned as ELF wants it: what is embedded byte by byte may lie anywhere.
#[repr(C, align(32))]
struct Aligned<T: ?Sized>(T);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../../ebpf/pantala.bpf.o"));

/// The programs, as ELF.
pub(super) fn bytes() -> &'static [u8] {
    &OBJECT.0
}
