//! What a store costs to read: opening its proxies, scanning a column, taking random rows.
//!
//! ```sh
//! cargo run --release --example store_costs datasets/store
//! ```

use std::time::{Duration, Instant};

use futures::TryStreamExt;
use proxytune::store::{Columns, Store};
use proxytune::{Error, Result};
use rand::{SeedableRng, rngs::StdRng, seq::index::sample};

const TIMES: usize = 20;

/// Does `work` several times and prints the median.
async fn measure<T>(what: &str, mut work: impl AsyncFnMut(u64) -> Result<T>) -> Result<T> {
    let mut times: Vec<Duration> = Vec::new();
    let mut last = None;
    for round in 0..TIMES as u64 {
        let start = Instant::now();
        last = Some(work(round).await?);
        times.push(start.elapsed());
    }
    times.sort();
    let [median, most] = [times[TIMES / 2], times[TIMES - 1]].map(|t| t.as_secs_f64() * 1e3);
    println!("{what:<44} {median:>8.1} ms, at most {most:.1} ms");
    last.ok_or_else(|| Error::invalid("nothing was measured", "set TIMES to 1 or more"))
}

#[tokio::main]
async fn main() -> Result<()> {
    let path = std::env::args().nth(1).unwrap_or("datasets/store".into());
    let open = async |_| Store::open(&path).await?.proxies().await;
    let table = measure("open the proxies, index of keys included", open).await?;
    let Some(dataset) = table.dataset() else {
        return Err(Error::invalid(
            format!("{path} has no proxies"),
            "run a pipeline first",
        ));
    };
    let (keys, fragments) = (table.keys().await?, dataset.count_fragments());
    println!("{} proxies in {fragments} fragments", keys.len());
    let scan = async |_| {
        let failed = |e: lance::Error| Error::Store {
            what: e.to_string(),
            hint: None,
        };
        let mut scan = dataset.scan();
        let batches = scan
            .project(&["prompt"])
            .map_err(failed)?
            .try_into_stream()
            .await;
        let batches = batches.map_err(failed)?;
        batches
            .map_err(failed)
            .try_fold(0, async |n, batch| Ok(n + batch.num_rows()))
            .await
    };
    let rows = measure("scan the prompts", scan).await?;
    assert_eq!(rows, keys.len(), "a key is there twice");
    let take = async |round| {
        let mut generator = StdRng::seed_from_u64(round);
        let picked = sample(&mut generator, keys.len(), 32.min(keys.len()));
        let picked: Vec<String> = picked.iter().map(|i| keys[i].clone()).collect();
        table.get(&picked, Columns::All).await
    };
    measure("take 32 random rows, images included", take)
        .await
        .map(drop)
}
