//! How good the nano checkpoints are, on individuals that no training saw: every row of the table in
//! `datasets/nano/README.md`, with what it aims at. [`models`] measures each checkpoint by itself, [`adaptation`] what
//! the nano job makes of them.

pub mod adaptation;
pub mod models;

use std::fmt::Write;

use serde::Serialize;

/// What a value counts, and how it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// From 0 to 1; written as a percentage.
    Share,
    /// Area under a curve, from 0 to 1.
    Area,
    Decibel,
    /// Difference of two cosines.
    Difference,
    /// Change relative to a starting value; written as a percentage with its sign.
    Change,
    Count,
}

/// One measured figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub model: String,
    pub measure: String,
    pub unit: Unit,
    pub value: f64,
    pub standard_error: Option<f64>,
    /// The least that is aimed at; `None` for what is told for information.
    pub aim: Option<f64>,
}

impl Row {
    /// A row without standard error.
    pub fn new(
        model: &str,
        measure: impl Into<String>,
        unit: Unit,
        value: f64,
        aim: Option<f64>,
    ) -> Self {
        Self {
            model: model.to_string(),
            measure: measure.into(),
            unit,
            value,
            standard_error: None,
            aim,
        }
    }

    /// The share `right` of `count` with its standard error.
    pub fn share(
        model: &str,
        measure: impl Into<String>,
        right: usize,
        count: usize,
        aim: Option<f64>,
    ) -> Self {
        let n = count.max(1) as f64;
        let share = right as f64 / n;
        Self {
            standard_error: Some((share * (1.0 - share) / n).sqrt()),
            ..Self::new(model, measure, Unit::Share, share, aim)
        }
    }

    /// Whether the aim is reached; `None` where there is none.
    pub fn met(&self) -> Option<bool> {
        self.aim.map(|aim| self.value >= aim)
    }

    fn written(&self, value: f64) -> String {
        match self.unit {
            Unit::Share => format!("{:.1} %", 100.0 * value),
            Unit::Area => format!("{value:.3}"),
            Unit::Decibel => format!("{value:.2} dB"),
            Unit::Difference => format!("{value:+.3}"),
            Unit::Change => format!("{:+.1} %", 100.0 * value),
            Unit::Count => format!("{value:.0}"),
        }
    }
}

/// The rows as a Markdown table, and a sentence that counts the aims that are met.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::from("| model | measure | value | aim | |\n|---|---|---|---|---|\n");
    for row in rows {
        let mut value = row.written(row.value);
        if let Some(error) = row.standard_error {
            let error = match row.unit {
                Unit::Share | Unit::Change => format!("{:.1}", 100.0 * error),
                _ => format!("{error:.3}"),
            };
            let _ = write!(value, " ± {error}");
        }
        let aim = row.aim.map(|aim| row.written(aim)).unwrap_or_default();
        let met = match row.met() {
            Some(true) => "met",
            Some(false) => "missed",
            None => "",
        };
        let _ = writeln!(
            text,
            "| {} | {} | {value} | {aim} | {met} |",
            row.model, row.measure
        );
    }
    let aims: Vec<bool> = rows.iter().filter_map(Row::met).collect();
    let met = aims.iter().filter(|met| **met).count();
    let _ = writeln!(text, "\n{met} of {} aims are met.", aims.len());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_is_met() {
        let rows = [
            Row::share("clip", "names the class", 450, 500, Some(0.9)),
            Row::new("vq", "PSNR", Unit::Decibel, 24.5, Some(25.0)),
            Row::new("vq", "codes used", Unit::Count, 512.0, None),
            Row {
                standard_error: Some(0.01),
                ..Row::new("sd3", "DINO", Unit::Difference, 0.05, Some(0.03))
            },
        ];
        let text = table(&rows);
        for line in [
            "| clip | names the class | 90.0 % ± 1.3 | 90.0 % | met |",
            "| vq | PSNR | 24.50 dB | 25.00 dB | missed |",
            "| vq | codes used | 512 |  |  |",
            "| sd3 | DINO | +0.050 ± 0.010 | +0.030 | met |",
            "2 of 3 aims are met.",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
