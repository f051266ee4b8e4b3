//! report: what a run came to: `sheet.png`, `report.html`, `report.json`, and the table on the terminal. Everything
//! is read back from the store, so a report can be written again at any time.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::evaluate::Evaluated;
use super::{Context, Method, score};
use crate::config::Source;
use crate::evaluation::metrics::{ScoredImage, Scores};
use crate::evaluation::plot::{Chart, Series};
use crate::evaluation::report::{ModelScores, Report, StageTime};
use crate::evaluation::sheet::{Block, Row, Sheet};
use crate::images::{decode_png, encode_png};
use crate::store::{Columns, EvaluationRow, Row as _, one_of};
use crate::stream::{StageReport, blocking};
use crate::{Result, files};

/// How the table and the sheet call a method, for a student that learnt from `source`.
pub fn label(method: Method, source: Source) -> &'static str {
    match (method, source) {
        (Method::Untouched, _) => "untouched student",
        (Method::Supervisor, _) => "supervisor",
        (Method::Student, Source::Proxies) => "proxy-tuned student",
        (Method::Student, Source::Augmented) => "student tuned on augmented references",
        (Method::Direct, _) | (Method::Student, Source::References) => "directly tuned student",
    }
}

/// What a run knows at its end beside what the store holds.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct Ending {
    /// What every stage did, from the last start to the end.
    pub stages: Vec<StageReport>,
    pub wall_seconds: f64,
    /// Proxies that were committed when the first training step ran, and planned in all.
    pub first_training_proxy: Option<(usize, usize)>,
    pub warnings: Vec<String>,
    /// Methods, steps and the keys of their samples.
    pub evaluated: Vec<Sampled>,
    /// What scored: one sentence each.
    pub protocol: Vec<String>,
}

/// The samples of one checkpoint, as `complete.json` keeps them.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Sampled {
    pub method: String,
    pub step: usize,
    /// Digest of what was trained.
    pub adapter: String,
    /// Keys of rows of the evaluations table, with their positions in the evaluation plan.
    pub samples: Vec<(usize, String)>,
}

impl From<Evaluated> for Sampled {
    fn from(evaluated: Evaluated) -> Self {
        Self {
            method: evaluated.method.name().into(),
            step: evaluated.step,
            adapter: evaluated.adapter,
            samples: evaluated.samples,
        }
    }
}

const METHODS: [Method; 4] = [
    Method::Untouched,
    Method::Direct,
    Method::Supervisor,
    Method::Student,
];

/// The samples to show of `method`: those of its last checkpoint, for every subject.
fn last_samples(ending: &Ending, method: Method) -> BTreeMap<usize, String> {
    let own = ending
        .evaluated
        .iter()
        .filter(|sampled| sampled.method == method.name());
    let last = own.clone().map(|sampled| sampled.step).max();
    own.filter(|sampled| Some(sampled.step) == last)
        .flat_map(|sampled| sampled.samples.iter().cloned())
        .collect()
}

/// Adds to what was `evaluated` what the same run had evaluated when it ended well `before`, if its samples are there: of
/// checkpoints between the first and the last nothing is kept then but the samples.
///
/// # Errors
/// When the store cannot be read.
pub async fn with_earlier(
    context: &Context,
    evaluated: Vec<Evaluated>,
    before: Option<Ending>,
) -> Result<Vec<Sampled>> {
    let mut all: Vec<Sampled> = evaluated.into_iter().map(Sampled::from).collect();
    let table = score::table(context).await?;
    let anew: Vec<(String, usize)> = all.iter().map(|s| (s.method.clone(), s.step)).collect();
    for sampled in before.into_iter().flat_map(|ending| ending.evaluated) {
        let keys: Vec<String> = sampled.samples.iter().map(|(_, key)| key.clone()).collect();
        let is_anew = anew.contains(&(sampled.method.clone(), sampled.step));
        if !is_anew && table.missing(&keys).is_empty() {
            all.push(sampled);
        }
    }
    let place = |name: &str| METHODS.iter().position(|method| method.name() == name);
    all.sort_by_key(|sampled| (place(&sampled.method), sampled.step));
    Ok(all)
}

/// Writes `sheet.png`, `report.html` and `report.json` into the run's directory and returns the report.
///
/// # Errors
/// When the store cannot be read, or the files cannot be written.
pub async fn write(context: &Arc<Context>, ending: &Ending) -> Result<Report> {
    let table = score::table(context).await?;
    let mut shown: Vec<(Method, BTreeMap<usize, EvaluationRow>)> = Vec::new();
    for method in METHODS {
        let samples = last_samples(ending, method);
        let keys: Vec<String> = samples.values().cloned().collect();
        let rows = table.get(&keys, Columns::All).await?;
        let rows = samples
            .into_keys()
            .zip(rows)
            .filter_map(|(place, row)| Some((place, row?)))
            .collect();
        shown.push((method, rows));
    }
    shown.retain(|(_, rows)| !rows.is_empty());
    let shown = Arc::new(shown);
    let (own, rows) = (context.clone(), shown.clone());
    let drawing = blocking("drawing the sheet", move || {
        let sheet = encode_png(&sheet(&own, &rows)?.draw())?;
        files::write(&own.dir.join("sheet.png"), &sheet)?;
        Ok(sheet)
    });
    let report = compose(context, ending, &shown, drawing.await?).await?;
    let dir = context.dir.clone();
    let writing = blocking("writing the report", move || {
        files::write(&dir.join("report.html"), report.html().as_bytes())?;
        files::write(&dir.join("report.json"), report.json()?.as_bytes())?;
        Ok(report)
    });
    writing.await
}

fn sheet(context: &Context, shown: &[(Method, BTreeMap<usize, EvaluationRow>)]) -> Result<Sheet> {
    let columns: Vec<_> = [Method::Supervisor, Method::Direct, Method::Student]
        .iter()
        .filter_map(|wanted| shown.iter().find(|(method, _)| method == wanted))
        .collect();
    let mut blocks = Vec::new();
    for (index, subject) in context.subjects.iter().enumerate() {
        let mut rows = Vec::new();
        for (place, image) in context.plan.evaluation().images.iter().enumerate() {
            if image.subject != index || image.image_index > 0 {
                continue;
            }
            let images = columns
                .iter()
                .map(|(_, rows)| {
                    match rows
                        .get(&place)
                        .and_then(|row| row.image.as_ref().map(|png| (row, png)))
                    {
                        Some((row, png)) => decode_png(png, &row.key()).map(Some),
                        None => Ok(None),
                    }
                })
                .collect::<Result<Vec<_>>>()?;
            rows.push(Row {
                prompt: image.prompt.clone(),
                images,
            });
        }
        blocks.push(Block {
            heading: format!("{}: \"{} {}\"", subject.name, subject.token, subject.class),
            references: subject.images.clone(),
            rows,
        });
    }
    let student = &context.resolved.student.model;
    Ok(Sheet {
        title: match &context.resolved.supervisor {
            Some(supervisor) => format!("Proxy-Tuning of {student} by {}", supervisor.model),
            None => format!("Direct tuning of {student}"),
        },
        subtitle: format!(
            "same prompts and seeds in every column; run {}",
            context.run
        ),
        columns: columns
            .iter()
            .map(|(method, _)| label(*method, context.resolved.student.source).to_string())
            .collect(),
        blocks,
    })
}

async fn compose(
    context: &Context,
    ending: &Ending,
    shown: &[(Method, BTreeMap<usize, EvaluationRow>)],
    sheet_png: Vec<u8>,
) -> Result<Report> {
    let resolved = &context.resolved;
    let scored = |row: &EvaluationRow| {
        Some(ScoredImage {
            subject: row.subject.clone(),
            prompt: row.prompt.clone(),
            run_seed: resolved.seed,
            scores: Scores {
                clip_i: f64::from(row.clip_i?),
                clip_t: f64::from(row.clip_t?),
                dino: f64::from(row.dino?),
            },
        })
    };
    let models = shown
        .iter()
        .map(|(method, rows)| ModelScores {
            name: label(*method, context.resolved.student.source).into(),
            images: rows.values().filter_map(scored).collect(),
        })
        .collect();
    let names: Vec<&str> = resolved
        .subjects
        .iter()
        .map(|subject| subject.name.as_str())
        .collect();
    let mut facts = vec![
        ("subjects".to_string(), names.join(", ")),
        ("student".into(), resolved.student.model.clone()),
    ];
    if let Some((supervisor, proxies)) = resolved.teacher() {
        facts.push(("supervisor".into(), supervisor.model.clone()));
        if let Some(adapter) = &supervisor.adapter {
            facts.push((
                "adapter of the supervisor".into(),
                adapter.display().to_string(),
            ));
        }
        facts.push(("proxies per subject".into(), proxies.count.to_string()));
    }
    facts.push(("wall time".into(), format!("{:.0} s", ending.wall_seconds)));
    let mut provenance = vec![
        ("run".to_string(), context.run.clone()),
        ("seed".into(), resolved.seed.to_string()),
        ("plan".into(), context.plan.digest().to_string()),
        ("proxytune".into(), env!("CARGO_PKG_VERSION").into()),
    ];
    for sampled in &ending.evaluated {
        provenance.push((
            format!("{} at step {}", sampled.method, sampled.step),
            sampled.adapter.clone(),
        ));
    }
    Ok(Report {
        title: match &resolved.supervisor {
            Some(supervisor) => format!(
                "Proxy-Tuning of {} by {}",
                resolved.student.model, supervisor.model
            ),
            None => format!("Direct tuning of {}", resolved.student.model),
        },
        lead: "Every model drew the same prompts with the same seeds.".into(),
        facts,
        sheet_png,
        models,
        protocol: ending.protocol.clone(),
        charts: charts(context, ending).await?,
        stages: ending
            .stages
            .iter()
            .map(|stage| StageTime {
                name: stage.stage.clone(),
                done: stage.done as usize,
                unit: stage.unit.clone(),
                busy_seconds: stage.busy,
                waiting_seconds: stage.waiting_in + stage.waiting_out,
            })
            .collect(),
        wall_seconds: ending.wall_seconds,
        first_training_proxy: ending.first_training_proxy,
        settings: resolved.to_toml()?,
        provenance,
        set_aside: ending
            .warnings
            .iter()
            .filter(|warning| warning.contains("set aside"))
            .cloned()
            .collect(),
        warnings: ending
            .warnings
            .iter()
            .filter(|warning| !warning.contains("set aside"))
            .cloned()
            .collect(),
    })
}

async fn charts(context: &Context, ending: &Ending) -> Result<Vec<Chart>> {
    let metrics = context.store.metrics().await?;
    let mut supervisors: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    let mut students: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    let owners: Vec<&String> = context.supervisors.iter().chain([&context.run]).collect();
    let mut losses = Vec::new();
    for owned in one_of("run", &owners) {
        let filter = format!("name = 'loss' AND {owned}");
        losses.extend(metrics.rows(Some(&filter), Columns::All).await?);
    }
    for row in losses {
        let point = (row.step as f64, row.value);
        match row.stage.strip_prefix("supervise:") {
            Some(subject) => supervisors
                .entry(subject.to_string())
                .or_default()
                .push(point),
            None => students.entry(row.stage).or_default().push(point),
        }
    }
    let mut charts = Vec::new();
    for (title, curves) in [("Supervisor loss", supervisors), ("Student loss", students)] {
        let series: Vec<Series> = curves
            .into_iter()
            .map(|(name, mut points)| {
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                Series { name, points }
            })
            .collect();
        if !series.is_empty() {
            charts.push(Chart {
                title: title.into(),
                x_label: "step".into(),
                y_label: "loss".into(),
                series,
                smoothed: true,
            });
        }
    }
    charts.extend(score_chart(context, ending).await?);
    Ok(charts)
}

/// The student's scores over its checkpoints, where there are several.
async fn score_chart(context: &Context, ending: &Ending) -> Result<Option<Chart>> {
    let table = score::table(context).await?;
    let mut curves: [(&str, Vec<(f64, f64)>); 3] =
        [("CLIP-I", vec![]), ("CLIP-T", vec![]), ("DINO", vec![])];
    let is_student =
        |sampled: &&Sampled| sampled.method == "student" || sampled.method == "untouched";
    for sampled in ending.evaluated.iter().filter(is_student) {
        let keys: Vec<String> = sampled.samples.iter().map(|(_, key)| key.clone()).collect();
        let rows = table.get(&keys, Columns::WithoutPictures).await?;
        let rows: Vec<EvaluationRow> = rows.into_iter().flatten().collect();
        if rows.is_empty() {
            continue;
        }
        let mean = |score: fn(&EvaluationRow) -> Option<f32>| {
            rows.iter().filter_map(score).map(f64::from).sum::<f64>() / rows.len() as f64
        };
        let step = sampled.step as f64;
        for ((_, points), value) in curves.iter_mut().zip([
            mean(|row| row.clip_i),
            mean(|row| row.clip_t),
            mean(|row| row.dino),
        ]) {
            points.push((step, value));
        }
    }
    if curves[0].1.len() < 2 {
        return Ok(None);
    }
    Ok(Some(Chart {
        title: "Student scores over checkpoints".into(),
        x_label: "step".into(),
        y_label: "cosine".into(),
        series: curves
            .into_iter()
            .map(|(name, mut points)| {
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                Series {
                    name: name.into(),
                    points,
                }
            })
            .collect(),
        smoothed: false,
    }))
}
