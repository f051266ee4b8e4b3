//! What a run has to show: `report.html`, one page without scripts that opens offline; `report.json`, the same numbers;
//! and a table for the terminal.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::html::{STYLE, base64, escape};
use super::metrics::{Basis, Estimate, ScoredImage, Scores, Summary, summarise};
use super::plot::Chart;
use crate::{Error, Result};

/// Everything that the report shows. What is empty is left out of the page.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// For example `Proxy-Tuning of nano by nano-sd3`.
    pub title: String,
    /// One or two sentences below the title.
    pub lead: String,
    /// Name and value of what a reader wants to know first: subjects, models, number of proxies, wall time.
    pub facts: Vec<(String, String)>,
    /// The bytes of `sheet.png`; not part of the JSON.
    #[serde(skip)]
    pub sheet_png: Vec<u8>,
    /// The models in the order of the table: untouched student, directly tuned, supervisor, proxy-tuned.
    pub models: Vec<ModelScores>,
    /// How scores are made: the evaluators' checkpoints and how pictures are prepared, one sentence each.
    pub protocol: Vec<String>,
    /// Losses first, then whatever else has a curve, scores over checkpoints among it.
    pub charts: Vec<Chart>,
    pub stages: Vec<StageTime>,
    /// Seconds from start to end, interruptions left out.
    pub wall_seconds: f64,
    /// Number of the newest committed proxy when the first training step ran, and how many there were in the end.
    pub first_training_proxy: Option<(usize, usize)>,
    /// The resolved pipeline file.
    pub settings: String,
    /// Name and value: seed, plan digest, versions, digests of adapters and checkpoints.
    pub provenance: Vec<(String, String)>,
    /// Photos that were left out, each with its reason.
    pub set_aside: Vec<String>,
    pub warnings: Vec<String>,
}

/// The scored images of one model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelScores {
    /// For example `proxy-tuned student`.
    pub name: String,
    pub images: Vec<ScoredImage>,
}

impl ModelScores {
    /// The model's line in the table; `None` without images.
    pub fn summary(&self) -> Option<Summary> {
        summarise(&self.images)
    }
}

/// How one stage spent its time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StageTime {
    pub name: String,
    /// Items that left the stage, and what they are ("images", "steps").
    pub done: usize,
    pub unit: String,
    /// Seconds at work.
    pub busy_seconds: f64,
    /// Seconds waiting for input or for room downstream.
    pub waiting_seconds: f64,
}

impl StageTime {
    /// Items per busy second; 0 when it was never busy.
    pub fn rate(&self) -> f64 {
        if self.busy_seconds > 0.0 {
            self.done as f64 / self.busy_seconds
        } else {
            0.0
        }
    }
}

/// A metric's name and its place in a summary.
type Metric = (&'static str, fn(&Summary) -> Estimate);

const METRICS: [Metric; 3] = [
    ("CLIP-I", |s| s.clip_i),
    ("CLIP-T", |s| s.clip_t),
    ("DINO", |s| s.dino),
];

impl Report {
    /// The page.
    pub fn html(&self) -> String {
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n",
            escape(&self.title)
        );
        self.header(&mut page);
        self.score_table(&mut page);
        if !self.sheet_png.is_empty() {
            let _ = write!(
                page,
                "<h2>Samples</h2>\n<img class=\"sheet\" alt=\"References beside the images of every model, one prompt and seed per line\" src=\"data:image/png;base64,{}\">\n",
                base64(&self.sheet_png)
            );
        }
        if !self.charts.is_empty() {
            page.push_str("<h2>Training</h2>\n<div class=\"charts\">\n");
            for chart in &self.charts {
                page.push_str(&chart.html());
            }
            page.push_str("</div>\n");
            if self.charts.iter().any(|chart| chart.smoothed) {
                page.push_str("<p class=\"note\">Losses: every value faintly, their running mean over about a twelfth of the curve boldly.</p>\n");
            }
        }
        self.prompt_table(&mut page);
        self.stage_table(&mut page);
        self.origin(&mut page);
        page.push_str("</main>\n</body>\n</html>\n");
        page
    }

    /// The same numbers for programs: the fields of this struct but the sheet, with `table` added, the summary of each
    /// model by its name.
    pub fn json(&self) -> Result<String> {
        let failed = |e: serde_json::Error| {
            Error::invalid(
                format!("the report cannot be written as JSON: {e}"),
                "look for scores or losses that are not finite",
            )
        };
        let mut value = serde_json::to_value(self).map_err(failed)?;
        let mut table = serde_json::Map::new();
        for model in &self.models {
            let summary = serde_json::to_value(model.summary()).map_err(failed)?;
            table.insert(model.name.clone(), summary);
        }
        if let serde_json::Value::Object(fields) = &mut value {
            fields.insert("table".into(), table.into());
        }
        serde_json::to_string_pretty(&value).map_err(failed)
    }

    /// The table of scores for the terminal, with a line on how its errors were taken.
    pub fn text(&self) -> String {
        let mut lines = vec![{
            let mut heads = vec![String::new()];
            heads.extend(METRICS.iter().map(|(name, _)| name.to_string()));
            heads.push("images".into());
            heads
        }];
        for model in &self.models {
            let Some(summary) = model.summary() else {
                continue;
            };
            let mut line = vec![model.name.clone()];
            line.extend(METRICS.iter().map(|(_, score)| plain(score(&summary))));
            line.push(summary.images.to_string());
            lines.push(line);
        }
        let width = |column: usize| lines.iter().map(|l| l[column].chars().count()).max();
        let widths: Vec<usize> = (0..5).map(|column| width(column).unwrap_or(0)).collect();
        let mut text = String::new();
        for line in &lines {
            let _ = write!(text, "{:<w$}", line[0], w = widths[0]);
            for (cell, w) in line.iter().zip(&widths).skip(1) {
                let _ = write!(text, "  {cell:>w$}");
            }
            text.push('\n');
        }
        if let Some(basis) = self.basis() {
            let _ = writeln!(text, "{}", basis_note(basis));
        }
        text
    }

    fn basis(&self) -> Option<Basis> {
        let summaries = self.models.iter().filter_map(ModelScores::summary);
        summaries.map(|s| s.basis).next()
    }

    fn header(&self, page: &mut String) {
        let _ = writeln!(page, "<h1>{}</h1>", escape(&self.title));
        if !self.lead.is_empty() {
            let _ = writeln!(page, "<p class=\"lead\">{}</p>", escape(&self.lead));
        }
        if !self.facts.is_empty() {
            page.push_str("<dl class=\"facts\">");
            for (name, value) in &self.facts {
                let _ = write!(
                    page,
                    "<div><dt>{}</dt><dd>{}</dd></div>",
                    escape(name),
                    escape(value)
                );
            }
            page.push_str("</dl>\n");
        }
        for (heading, entries) in [
            ("Photos set aside", &self.set_aside),
            ("Warnings", &self.warnings),
        ] {
            if !entries.is_empty() {
                let _ = write!(page, "<h2>{heading}</h2>\n<ul class=\"warnings\">");
                for entry in entries {
                    let _ = write!(page, "<li>{}</li>", escape(entry));
                }
                page.push_str("</ul>\n");
            }
        }
    }

    fn score_table(&self, page: &mut String) {
        let rows: Vec<(&str, Summary)> = self
            .models
            .iter()
            .filter_map(|model| Some((model.name.as_str(), model.summary()?)))
            .collect();
        if rows.is_empty() {
            return;
        }
        // The best of each column, unless all look the same.
        let shown = |value: f64| format!("{value:.3}");
        let best: Vec<Option<String>> = METRICS
            .iter()
            .map(|(_, score)| {
                let means = || rows.iter().map(|(_, s)| score(s).mean);
                let highest = shown(means().fold(f64::MIN, f64::max));
                means()
                    .any(|mean| shown(mean) != highest)
                    .then_some(highest)
            })
            .collect();
        page.push_str(
            "<h2>Scores</h2>\n<div class=\"scroll\"><table class=\"scores\"><thead><tr><th></th>",
        );
        for (name, _) in METRICS {
            let _ = write!(page, "<th class=\"n\">{name}</th>");
        }
        page.push_str("<th class=\"n\">images</th></tr></thead><tbody>\n");
        for (name, summary) in &rows {
            let _ = write!(page, "<tr><th>{}</th>", escape(name));
            for ((_, score), best) in METRICS.iter().zip(&best) {
                let estimate = score(summary);
                let mean = shown(estimate.mean);
                let class = if best.as_ref() == Some(&mean) {
                    "n best"
                } else {
                    "n"
                };
                let error = estimate
                    .standard_error
                    .map(|e| format!(" <small>± {e:.3}</small>"))
                    .unwrap_or_default();
                let _ = write!(page, "<td class=\"{class}\">{mean}{error}</td>");
            }
            let _ = writeln!(page, "<td class=\"n\">{}</td></tr>", summary.images);
        }
        page.push_str("</tbody></table></div>\n");
        page.push_str("<p class=\"note\">Higher is better. CLIP-I and DINO: mean cosine over all pairs of a reference and a generated image, the likeness to the subject. CLIP-T: mean cosine of an image and its prompt without the subject’s token. ");
        page.push_str(self.basis().map(basis_note).unwrap_or_default());
        for sentence in &self.protocol {
            let _ = write!(page, " {}", escape(sentence));
        }
        page.push_str("</p>\n");
    }

    fn prompt_table(&self, page: &mut String) {
        let mut prompts: Vec<(&str, &str)> = Vec::new();
        for image in self.models.iter().flat_map(|model| &model.images) {
            let key = (image.subject.as_str(), image.prompt.as_str());
            if !prompts.contains(&key) {
                prompts.push(key);
            }
        }
        if prompts.is_empty() {
            return;
        }
        page.push_str("<h2>Scores by prompt</h2>\n<div class=\"scroll\"><table class=\"dense\"><thead><tr><th rowspan=\"2\">Prompt</th>");
        for model in &self.models {
            let _ = write!(
                page,
                "<th class=\"first\" colspan=\"3\">{}</th>",
                escape(&model.name)
            );
        }
        page.push_str("</tr><tr>");
        for _ in &self.models {
            for (index, (name, _)) in METRICS.iter().enumerate() {
                let _ = write!(page, "<th class=\"{}\">{name}</th>", column_class(index));
            }
        }
        page.push_str("</tr></thead><tbody>\n");
        let several = prompts.iter().any(|(subject, _)| *subject != prompts[0].0);
        for (subject, prompt) in &prompts {
            let label = if several {
                format!("{} <small>{}</small>", escape(prompt), escape(subject))
            } else {
                escape(prompt)
            };
            let _ = write!(page, "<tr><td>{label}</td>");
            for model in &self.models {
                let scores: Vec<Scores> = model
                    .images
                    .iter()
                    .filter(|image| image.subject == *subject && image.prompt == *prompt)
                    .map(|image| image.scores)
                    .collect();
                let mean = |score: fn(&Scores) -> f64| {
                    if scores.is_empty() {
                        return "–".to_string();
                    }
                    let sum: f64 = scores.iter().map(score).sum();
                    format!("{:.3}", sum / scores.len() as f64)
                };
                let cells = [mean(|s| s.clip_i), mean(|s| s.clip_t), mean(|s| s.dino)];
                for (index, cell) in cells.iter().enumerate() {
                    let _ = write!(page, "<td class=\"{}\">{cell}</td>", column_class(index));
                }
            }
            page.push_str("</tr>\n");
        }
        page.push_str("</tbody></table></div>\n");
    }

    fn stage_table(&self, page: &mut String) {
        if self.stages.is_empty() {
            return;
        }
        page.push_str("<h2>Stages</h2>\n<div class=\"scroll\"><table><thead><tr><th>Stage</th><th class=\"n\">done</th><th></th><th class=\"n\">busy</th><th class=\"n\">waiting</th><th class=\"n\">rate</th></tr></thead><tbody>\n");
        for stage in &self.stages {
            let _ = writeln!(
                page,
                "<tr><th>{}</th><td class=\"n\">{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}/s</td></tr>",
                escape(&stage.name),
                stage.done,
                escape(&stage.unit),
                duration(stage.busy_seconds),
                duration(stage.waiting_seconds),
                rate(stage.rate())
            );
        }
        let _ = write!(
            page,
            "</tbody></table></div>\n<p class=\"note\">Wall time {}.",
            duration(self.wall_seconds)
        );
        if let Some((proxy, of)) = self.first_training_proxy {
            let _ = write!(
                page,
                " The student’s first training step ran at proxy {proxy} of {of}."
            );
        }
        page.push_str("</p>\n");
    }

    fn origin(&self, page: &mut String) {
        if self.provenance.is_empty() && self.settings.is_empty() {
            return;
        }
        page.push_str("<h2>Where this comes from</h2>\n");
        if !self.provenance.is_empty() {
            page.push_str("<div class=\"scroll\"><table><tbody>\n");
            for (name, value) in &self.provenance {
                let _ = writeln!(
                    page,
                    "<tr><th>{}</th><td class=\"wrap\"><code>{}</code></td></tr>",
                    escape(name),
                    escape(value)
                );
            }
            page.push_str("</tbody></table></div>\n");
        }
        if !self.settings.is_empty() {
            let _ = writeln!(
                page,
                "<details><summary>The resolved pipeline file</summary><pre>{}</pre></details>",
                escape(&self.settings)
            );
        }
    }
}

/// Class of a number's cell; the first of a model's three has a line before it.
fn column_class(index: usize) -> &'static str {
    if index == 0 { "n first" } else { "n" }
}

fn basis_note(basis: Basis) -> &'static str {
    match basis {
        Basis::Images => "± is the standard error over the images of one adapter.",
        Basis::Adapters => {
            "± is the standard error over adapters (pairs of subject and training seed)."
        }
    }
}

fn plain(estimate: Estimate) -> String {
    match estimate.standard_error {
        Some(error) => format!("{:.3} ± {error:.3}", estimate.mean),
        None => format!("{:.3}", estimate.mean),
    }
}

fn duration(seconds: f64) -> String {
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    if whole < 3600 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
    }
}

fn rate(per_second: f64) -> String {
    if per_second >= 100.0 {
        format!("{per_second:.0}")
    } else {
        format!("{per_second:.2}")
    }
}
