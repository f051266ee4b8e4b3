//! Which items each training step uses.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::derive_seed;

/// For every step the items that it uses, as many for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    batch_size: usize,
    items: Vec<usize>,
}

impl Schedule {
    /// What step `step` (from 0) uses; the step must be planned.
    pub fn batch(&self, step: usize) -> &[usize] {
        &self.items[step * self.batch_size..(step + 1) * self.batch_size]
    }

    /// How many steps are planned.
    pub fn steps(&self) -> usize {
        self.items.len() / self.batch_size
    }

    /// All uses, step after step.
    pub fn items(&self) -> &[usize] {
        &self.items
    }

    /// The same uses, where an item is a position in `names` and becomes what stands there.
    pub(super) fn of(mut self, names: &[usize]) -> Self {
        self.items.iter_mut().for_each(|item| *item = names[*item]);
        self
    }

    /// Goes through all of `0..count` again and again, each time in another order, which depends on `seed` and `name`.
    pub fn epochs(steps: usize, batch_size: usize, count: usize, seed: u64, name: &str) -> Self {
        let uses = steps * batch_size;
        let mut items = Vec::with_capacity(uses);
        let mut epoch = 0;
        while items.len() < uses {
            let order = format!("epoch {epoch}/{name}");
            let mut shuffled: Vec<usize> = (0..count).collect();
            shuffled.sort_by_key(|item| (derive_seed(seed, &order, *item), *item));
            shuffled.truncate(uses - items.len());
            items.extend(shuffled);
            epoch += 1;
        }
        Self { batch_size, items }
    }

    /// Each use takes, among the first `available(step)` items, the least used; ties fall by a hash of `seed`, the
    /// item's own seed and the number of its uses. `available` must not shrink and is at least 1.
    pub(super) fn least_used(
        steps: usize,
        batch_size: usize,
        seeds: &[u64],
        seed: u64,
        available: impl Fn(usize) -> usize,
    ) -> Self {
        let entry = |item: usize, uses: usize| {
            let tie = derive_seed(seed ^ seeds[item], "tie", uses);
            Reverse((uses, tie, item))
        };
        let mut waiting = BinaryHeap::new();
        let mut arrived = 0;
        let mut items = Vec::with_capacity(steps * batch_size);
        for step in 0..steps {
            while arrived < available(step) {
                waiting.push(entry(arrived, 0));
                arrived += 1;
            }
            for _ in 0..batch_size {
                // what is taken goes back, and one item is always there
                let Some(Reverse((uses, _, item))) = waiting.pop() else {
                    continue;
                };
                waiting.push(entry(item, uses + 1));
                items.push(item);
            }
        }
        Self { batch_size, items }
    }
}
