//! The curves of a training in the store, beside those of runs.

use std::path::Path;

use tokio::runtime::Runtime;

use crate::store::{MetricRow, MetricStage, Store, now_us};
use crate::{Error, Result};

/// A run of `pretrain` in the metrics table: its stages are `pretrain:MODEL`, its steps count images.
pub struct Curves {
    store: Store,
    runtime: Runtime,
    run: String,
}

impl Curves {
    /// Opens the store in `folder` for a new run, which is named by the time.
    ///
    /// # Errors
    /// When the store cannot be opened.
    pub fn open(folder: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::io("a thread for the store"))?;
        Ok(Self {
            store: runtime.block_on(Store::open(folder))?,
            runtime,
            run: format!("pretrain-{}", now_us() / 1_000_000),
        })
    }

    /// The run's name in the table.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// Appends `points` of the curve of `model`: values in the order of `names`, the first of which is `images`, the
    /// number that the session has seen, which also serves as the step.
    ///
    /// # Errors
    /// When the rows cannot be committed.
    pub fn log(&self, model: &str, names: &[String], points: &[Vec<f64>]) -> Result<()> {
        let stage = MetricStage::Pretrain(model.to_string());
        let created_us = now_us();
        let mut rows = Vec::new();
        for point in points {
            let Some((&images, values)) = point.split_first() else {
                continue;
            };
            for (name, &value) in names.iter().skip(1).zip(values) {
                rows.push(MetricRow {
                    run: self.run.clone(),
                    stage: stage.clone(),
                    step: images as u64,
                    name: name.clone(),
                    value,
                    created_us,
                });
            }
        }
        self.runtime.block_on(async {
            let metrics = self.store.metrics().await?;
            metrics.append(&rows).await.map(|_| ())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Columns;

    #[test]
    fn a_curve_is_found_in_the_metrics_table() {
        let folder = tempfile::tempdir().unwrap();
        let curves = Curves::open(folder.path()).unwrap();
        let names = ["images", "loss", "psnr"].map(String::from);
        let points = [vec![640.0, 0.5, 20.0], vec![1280.0, 0.25, 23.0]];
        curves.log("vq", &names, &points).unwrap();
        let rows = curves.runtime.block_on(async {
            let metrics = curves.store.metrics().await.unwrap();
            let filter = Some("stage = 'pretrain:vq' AND name = 'psnr'");
            metrics.rows(filter, Columns::All).await.unwrap()
        });
        let found: Vec<(u64, f64)> = rows.iter().map(|row| (row.step, row.value)).collect();
        assert_eq!(found, [(640, 20.0), (1280, 23.0)]);
        assert!(rows.iter().all(|row| row.run == curves.run()));
    }
}
