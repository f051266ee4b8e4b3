//! Scenes that are drawn and encoded once and then used again, because encoding costs as much as learning.

use rand::Rng;

use super::scenes::Scenes;
use crate::nano::world::Scene;
use crate::{Error, Result};

/// Scenes with what an encoder made of them. It fills as scenes are needed, then chooses among what it has. Nothing of
/// it is stored: it follows from the numbers of its scenes.
pub struct Pool<T> {
    items: Vec<(Scene, T)>,
    size: usize,
    first: usize,
}

impl<T: Clone> Pool<T> {
    /// An empty pool for `size` scenes, whose numbers start at `first`.
    pub fn new(size: usize, first: usize) -> Self {
        Self {
            items: Vec::new(),
            size,
            first,
        }
    }

    /// `count` scenes of `scenes` with their parts: new ones until the pool is full, then any. `encode` gives the
    /// parts of new scenes, one for each.
    pub fn take(
        &mut self,
        scenes: &Scenes,
        count: usize,
        generator: &mut impl Rng,
        encode: impl FnOnce(&[Scene]) -> Result<Vec<T>>,
    ) -> Result<Vec<(Scene, T)>> {
        if self.items.is_empty() || self.items.len() + count <= self.size {
            let fresh = scenes.batch(self.first + self.items.len(), count);
            let parts = encode(&fresh)?;
            if parts.len() != count {
                return Err(Error::Invalid {
                    what: format!("{} of {count} scenes were encoded", parts.len()),
                    hint: None,
                });
            }
            let fresh: Vec<(Scene, T)> = fresh.into_iter().zip(parts).collect();
            self.items.extend(fresh.iter().cloned());
            return Ok(fresh);
        }
        Ok((0..count)
            .map(|_| self.items[generator.random_range(0..self.items.len())].clone())
            .collect())
    }
}
