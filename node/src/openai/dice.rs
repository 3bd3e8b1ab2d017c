//! For tests: seeded dice, and bytes damaged by them.

/// Dice that fall the same for the same seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From 0 up to one less than `sides`, which is not 0.
    pub(crate) fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }

    /// Changes, adds, removes or doubles bytes in a few places; at least one byte is left.
    pub(crate) fn damage(&mut self, bytes: &mut Vec<u8>) {
        const BYTES: &[u8] = b"{}[]\",:0123456789-+.eE\\u \n\r\x00\xff\xc3ntf";
        for _ in 0..=self.roll(4) {
            if bytes.is_empty() {
                bytes.push(b'{');
            }
            let at = self.roll(bytes.len());
            match self.roll(4) {
                0 => bytes[at] = BYTES[self.roll(BYTES.len())],
                1 => bytes.insert(at, BYTES[self.roll(BYTES.len())]),
                2 => drop(bytes.remove(at)),
                _ => {
                    let end = at + self.roll(bytes.len() - at);
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
            }
        }
    }
}
