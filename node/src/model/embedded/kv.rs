//! What a sequence remembers of its tokens: the keys and values of every layer.
//!
//! It lies in blocks of 64 positions, taken as the sequence grows. A full block never changes
//! again, so sequences that begin alike share it. Within a block the keys of a head are rows by
//! position and its values are rows by dimension, so that attention is dot products of rows that
//! lie together.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Positions in one block.
pub(super) const BLOCK: usize = 64;

/// The dimensions of what is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) layers: usize,
    /// Heads of keys and values.
    pub(super) heads: usize,
    /// The dimensions of one head.
    pub(super) width: usize,
}

impl Shape {
    /// The bytes of one block.
    pub(super) fn block_bytes(self) -> usize {
        self.floats() * size_of::<f32>()
    }

    fn floats(self) -> usize {
        self.layers * self.heads * self.width * BLOCK * 2
    }

    /// Where the keys of a head begin in a block; its values follow.
    fn at(self, layer: usize, head: usize) -> usize {
        (layer * self.heads + head) * self.width * BLOCK * 2
    }
}

/// The blocks in memory, for whoever watches.
#[derive(Clone, Debug, Default)]
pub(super) struct Counter(Arc<AtomicUsize>);

impl Counter {
    pub(super) fn blocks(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Block {
    data: Box<[f32]>,
    counter: Counter,
}

impl Block {
    fn new(shape: Shape, counter: &Counter) -> Self {
        counter.0.fetch_add(1, Ordering::Relaxed);
        let data = vec![0.0; shape.floats()].into_boxed_slice();
        Self { data, counter: counter.clone() }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.counter.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What one sequence remembers.
#[derive(Debug)]
pub(super) struct Cache {
    shape: Shape,
    blocks: Vec<Arc<Block>>,
    counter: Counter,
    /// The positions that are filled.
    len: usize,
}

impl Cache {
    pub(super) fn new(shape: Shape, counter: &Counter) -> Self {
        Self { shape, blocks: Vec::new(), counter: counter.clone(), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// A sequence that begins with the first `len` positions of this one. Full blocks are shared.
    pub(super) fn prefix(&self, len: usize) -> Self {
        let len = len.min(self.len);
        let mut blocks = self.blocks[..len / BLOCK].to_vec();
        let rest = len % BLOCK;
        if rest > 0 {
            let mut block = Block::new(self.shape, &self.counter);
            let width = self.shape.width;
            let heads = self.blocks[len / BLOCK].data.chunks_exact(width * BLOCK * 2);
            for (from, to) in heads.zip(block.data.chunks_exact_mut(width * BLOCK * 2)) {
                to[..rest * width].copy_from_slice(&from[..rest * width]);
                let (from, to) = (&from[width * BLOCK..], &mut to[width * BLOCK..]);
                for (from, to) in from.chunks_exact(BLOCK).zip(to.chunks_exact_mut(BLOCK)) {
                    to[..rest].copy_from_slice(&from[..rest]);
                }
            }
            blocks.push(Arc::new(block));
        }
        Self { shape: self.shape, blocks, counter: self.counter.clone(), len }
    }

    /// Makes room for so many positions more. They count once [`Cache::advance`] says so.
    pub(super) fn reserve(&mut self, more: usize) {
        let blocks = (self.len + more).div_ceil(BLOCK);
        while self.blocks.len() < blocks {
            self.blocks.push(Arc::new(Block::new(self.shape, &self.counter)));
        }
    }

    /// Writes the key and value of a head at a position that was reserved. Whether it could: a
    /// block that others share cannot be written, and never needs to be.
    pub(super) fn write(
        &mut self,
        (layer, head): (usize, usize),
        position: usize,
        key: &[f32],
        value: &[f32],
    ) -> bool {
        let width = self.shape.width;
        let Some(block) = self.blocks.get_mut(position / BLOCK).and_then(Arc::get_mut) else {
            return false;
        };
        let slot = position % BLOCK;
        let at = self.shape.at(layer, head);
        let (keys, values) = block.data[at..at + width * BLOCK * 2].split_at_mut(width * BLOCK);
        keys[slot * width..(slot + 1) * width].copy_from_slice(key);
        for (row, value) in values.chunks_exact_mut(BLOCK).zip(value) {
            row[slot] = *value;
        }
        true
    }

    /// So many positions more are filled, in every layer.
    pub(super) fn advance(&mut self, by: usize) {
        self.len += by;
    }

    /// The keys (rows by position) and values (rows by dimension) of a head in a block.
    pub(super) fn block(&self, (layer, head): (usize, usize), block: usize) -> (&[f32], &[f32]) {
        let part = self.shape.width * BLOCK;
        let at = self.shape.at(layer, head);
        self.blocks[block].data[at..at + part * 2].split_at(part)
    }
}
