//! nydus bootstraps: whatever they say, a chunk lies inside of its blob and its device.
//!
//! The first four bytes of the input are the length of the bootstrap; the blob's own table follows it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pantala_lazy::format::rafs::Bootstrap;

fuzz_target!(|data: &[u8]| {
    let Some((len, rest)) = data.split_first_chunk::<4>() else {
        return;
    };
    let len = (u32::from_le_bytes(*len) as usize).min(rest.len());
    let (image, meta) = rest.split_at(len);
    let Ok(bootstrap) = Bootstrap::parse(image) else {
        return;
    };
    let blobs = bootstrap.blobs();
    let metas: Vec<_> = blobs
        .iter()
        .map(|blob| blob.meta_range().map(|_| meta))
        .collect();
    if let Ok(maps) = bootstrap.chunk_maps(image, &metas) {
        for (map, blob) in maps.iter().zip(blobs) {
            for pair in map.chunks().windows(2) {
                assert!(pair[0].device_end() <= pair[1].unpacked.start());
            }
            for chunk in map.chunks() {
                assert!(
                    chunk.unpacked.end() <= blob.device_len
                        && chunk.packed.end() <= blob.packed_len
                );
            }
        }
    }
    let _ = bootstrap.prefetch(image);
});
