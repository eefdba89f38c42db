//! EROFS images: whatever they say, the walk ends, and asks for nothing outside of them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pantala_lazy::format::erofs::{Progress, SUPERBLOCK_END, Superblock, Walk, check_image};

/// Where the superblock says whether it has a checksum, which no mutation gets right by chance.
const FEATURES: usize = 1024 + 8;

fuzz_target!(|data: &[u8]| {
    let mut image = data.to_vec();
    if image.len() >= SUPERBLOCK_END as usize {
        image[FEATURES] &= !1;
    }
    let _ = check_image(&image, &[1 << 20]);
    let Ok(superblock) = Superblock::parse(&image) else {
        return;
    };
    let Ok(mut walk) = Walk::new(&superblock, image.len() as u64) else {
        return;
    };
    if let Ok(progress) = walk.resume(&image[..], &mut |_| Ok(())) {
        assert_eq!(progress, Progress::Done);
        for range in walk.metadata().iter() {
            assert!(range.end() <= image.len() as u64);
        }
    }
});
