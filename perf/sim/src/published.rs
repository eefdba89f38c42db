//! What others have measured and published, to stand beside what the simulator finds.
//!
//! Such a figure includes what the simulator does not have: the start of a container, unpacking, disks,
//! a registry that gets slower under load. It says what order of magnitude to expect, not what to hit.

/// A point of Dragonfly's published benchmark: so many pods start one image at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// The image.
    pub image: Image,
    /// How many pods start.
    pub pods: usize,
    /// Seconds until all run, when each pulls from the registry.
    pub registry_only_s: f64,
    /// Seconds until all run, with Dragonfly.
    pub dragonfly_s: f64,
    /// GiB out of the registry, when each pulls from it.
    pub registry_only_gib: f64,
    /// GiB out of the registry, with Dragonfly.
    pub dragonfly_gib: f64,
}

impl Point {
    /// How many times Dragonfly took the image from the registry, if what one pod pulled without it is
    /// one copy.
    #[must_use]
    pub fn dragonfly_copies(&self) -> f64 {
        self.dragonfly_gib / (self.registry_only_gib / self.pods as f64)
    }
}

/// The two images of Dragonfly's published benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// nginx, 500 MB.
    Nginx,
    /// TensorFlow, 3 GB.
    TensorFlow,
}

impl Image {
    /// The size that was named.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Nginx => 500_000_000,
            Self::TensorFlow => 3_000_000_000,
        }
    }

    /// The name that was used.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::TensorFlow => "TensorFlow",
        }
    }
}

/// The registry's link in Dragonfly's published benchmark.
pub const DRAGONFLY_REGISTRY_GBIT_PER_S: f64 = 10.0;

/// A node's link in Dragonfly's published benchmark.
pub const DRAGONFLY_NODE_GBIT_PER_S: f64 = 6.0;

/// Dragonfly v2.0.8, as its project has published it.
pub const DRAGONFLY: [Point; 8] = [
    point(Image::Nginx, 50, [35.0, 10.0], [27.39, 0.54]),
    point(Image::Nginx, 100, [65.0, 10.0], [54.78, 0.71]),
    point(Image::Nginx, 200, [135.0, 15.0], [109.57, 0.76]),
    point(Image::Nginx, 500, [1020.0, 25.0], [273.93, 0.82]),
    point(Image::TensorFlow, 50, [260.0, 40.0], [156.74, 3.13]),
    point(Image::TensorFlow, 100, [1380.0, 40.0], [313.78, 3.22]),
    point(Image::TensorFlow, 200, [4245.0, 50.0], [626.95, 3.42]),
    point(Image::TensorFlow, 500, [10_800.0, 55.0], [1567.38, 4.88]),
];

/// Kraken, as its project has published it: a 3 GB image to 2,600 hosts at a cap of 300 MB/s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KrakenPoint {
    /// The size of the image.
    pub bytes: u64,
    /// How many hosts pull it.
    pub hosts: usize,
    /// What a host sends and receives at most.
    pub cap_bytes_per_s: f64,
    /// Half of the hosts had it by then.
    pub p50_s: f64,
    /// 99 of 100 hosts had it by then.
    pub p99_s: f64,
    /// 999 of 1,000 hosts had it by then.
    pub p999_s: f64,
}

/// The published figures of Kraken.
pub const KRAKEN: KrakenPoint = KrakenPoint {
    bytes: 3_000_000_000,
    hosts: 2600,
    cap_bytes_per_s: 300e6,
    p50_s: 10.0,
    p99_s: 18.0,
    p999_s: 22.0,
};

const fn point(image: Image, pods: usize, seconds: [f64; 2], gib: [f64; 2]) -> Point {
    Point {
        image,
        pods,
        registry_only_s: seconds[0],
        dragonfly_s: seconds[1],
        registry_only_gib: gib[0],
        dragonfly_gib: gib[1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_copies_grow_with_the_pods() {
        let copies: Vec<f64> = DRAGONFLY.iter().map(Point::dragonfly_copies).collect();
        assert!((copies[0] - 0.99).abs() < 0.01 && (copies[3] - 1.50).abs() < 0.01);
        assert!((copies[4] - 1.0).abs() < 0.01 && (copies[7] - 1.56).abs() < 0.01);
    }
}
