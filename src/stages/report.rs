//! report: the results of a run: `sheet.png`, `report.html`, `report.json`, and the table on the terminal. Everything
//! is read back from the store, so a report can be written again at any time.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::evaluate::Evaluated;
use super::{LazyEvaluator, Method, Subjects, Warning};
use crate::config::{Resolved, Source};
use crate::evaluation::metrics::{ScoredImage, Scores};
use crate::evaluation::plot::{Chart, Series};
use crate::evaluation::report::{ModelScores, Report, StageTime};
use crate::evaluation::sheet::{Block, Row, Sheet};
use crate::images::{decode_png, encode_png};
use crate::plan::Plan;
use crate::store::{Columns, EvaluationRow, MetricStage, Row as _, Store, Table, one_of};
use crate::stream::{StageReport, blocking};
use crate::{Result, files};

/// How the table and the sheet call a method, for a student that learnt from `source`.
pub fn label(method: Method, source: Source) -> &'static str {
    match (method, source) {
        (Method::Untouched, _) => "untouched student",
        (Method::Supervisor, _) => "supervisor",
        (Method::Student, Source::Proxies) => "proxy-tuned student",
        (Method::Student, Source::Custom) => "student tuned on a custom source",
        (Method::Student, Source::Augmented) => "student tuned on augmented references",
        (Method::Direct, _) | (Method::Student, Source::References) => "directly tuned student",
    }
}

/// What a run knows at its end beside what the store holds.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct RunSummary {
    /// What every stage did, from the last start to the end.
    pub stages: Vec<StageReport>,
    pub wall_seconds: f64,
    /// Proxies that were committed when the first training step ran, and planned in all.
    pub first_training_proxy: Option<(usize, usize)>,
    pub warnings: Vec<Warning>,
    /// Methods, steps and the keys of their samples.
    pub evaluated: Vec<Sampled>,
    /// What scored: one sentence each.
    pub protocol: Vec<String>,
}

/// The samples of one checkpoint, as `complete.json` keeps them.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Sampled {
    pub method: Method,
    pub step: usize,
    /// Digest of what was trained.
    pub adapter: String,
    /// Keys of rows of the evaluations table, with their positions in the evaluation plan.
    pub samples: Vec<(usize, String)>,
}

impl From<Evaluated> for Sampled {
    fn from(evaluated: Evaluated) -> Self {
        Self {
            method: evaluated.method,
            step: evaluated.step,
            adapter: evaluated.adapter,
            samples: evaluated.samples,
        }
    }
}

/// What a report is written from.
#[derive(Clone)]
pub struct ReportNeeds {
    /// The run's name in the store.
    pub run: String,
    /// The run's directory.
    pub dir: PathBuf,
    pub resolved: Arc<Resolved>,
    pub plan: Arc<Plan>,
    pub subjects: Subjects,
    /// The key of each subject's supervisor; empty without.
    pub supervisors: Vec<String>,
    pub store: Arc<Store>,
    pub evaluator: LazyEvaluator,
}

impl ReportNeeds {
    async fn table(&self) -> Result<Table<EvaluationRow>> {
        super::evaluations(&self.store, &self.evaluator).await
    }

    /// For example `Proxy-Tuning of nano by nano-sd3`.
    fn title(&self) -> String {
        let Resolved {
            student,
            supervisor,
            ..
        } = &*self.resolved;
        match (supervisor, student.source) {
            (Some(supervisor), _) => {
                format!("Proxy-Tuning of {} by {}", student.model, supervisor.model)
            }
            (None, Source::Custom) => format!("Tuning of {} on a custom source", student.model),
            (None, _) => format!("Direct tuning of {}", student.model),
        }
    }
}

/// The samples to show of `method`: those of its last checkpoint, for every subject.
fn last_samples(summary: &RunSummary, method: Method) -> BTreeMap<usize, String> {
    let own = summary
        .evaluated
        .iter()
        .filter(|sampled| sampled.method == method);
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
    needs: &ReportNeeds,
    evaluated: Vec<Evaluated>,
    before: Option<RunSummary>,
) -> Result<Vec<Sampled>> {
    let mut all: Vec<Sampled> = evaluated.into_iter().map(Sampled::from).collect();
    let table = needs.table().await?;
    let anew: Vec<(Method, usize)> = all.iter().map(|s| (s.method, s.step)).collect();
    for sampled in before.into_iter().flat_map(|summary| summary.evaluated) {
        let keys: Vec<String> = sampled.samples.iter().map(|(_, key)| key.clone()).collect();
        let is_anew = anew.contains(&(sampled.method, sampled.step));
        if !is_anew && table.missing(&keys).is_empty() {
            all.push(sampled);
        }
    }
    all.sort_by_key(|sampled| (sampled.method, sampled.step));
    Ok(all)
}

/// Writes `sheet.png`, `report.html` and `report.json` into the run's directory and returns the report.
///
/// # Errors
/// When the store cannot be read, or the files cannot be written.
pub async fn write(needs: &ReportNeeds, summary: &RunSummary) -> Result<Report> {
    let table = needs.table().await?;
    let mut shown: Vec<(Method, BTreeMap<usize, EvaluationRow>)> = Vec::new();
    for method in Method::ALL {
        let samples = last_samples(summary, method);
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
    let (own, rows) = (needs.clone(), shown.clone());
    let drawing = blocking("drawing the sheet", move || {
        let sheet = encode_png(&sheet(&own, &rows)?.draw())?;
        files::write(&own.dir.join("sheet.png"), &sheet)?;
        Ok(sheet)
    });
    let report = compose(needs, summary, &shown, drawing.await?).await?;
    let dir = needs.dir.clone();
    let writing = blocking("writing the report", move || {
        files::write(&dir.join("report.html"), report.html().as_bytes())?;
        files::write(&dir.join("report.json"), report.json()?.as_bytes())?;
        Ok(report)
    });
    writing.await
}

fn sheet(needs: &ReportNeeds, shown: &[(Method, BTreeMap<usize, EvaluationRow>)]) -> Result<Sheet> {
    let columns: Vec<_> = [Method::Supervisor, Method::Direct, Method::Student]
        .iter()
        .filter_map(|wanted| shown.iter().find(|(method, _)| method == wanted))
        .collect();
    let mut blocks = Vec::new();
    for (index, subject) in needs.subjects.iter().enumerate() {
        let mut rows = Vec::new();
        for (place, image) in needs.plan.evaluation().images.iter().enumerate() {
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
    Ok(Sheet {
        title: needs.title(),
        subtitle: format!("same prompts and seeds in every column; run {}", needs.run),
        columns: columns
            .iter()
            .map(|(method, _)| label(*method, needs.resolved.student.source).to_string())
            .collect(),
        blocks,
    })
}

async fn compose(
    needs: &ReportNeeds,
    summary: &RunSummary,
    shown: &[(Method, BTreeMap<usize, EvaluationRow>)],
    sheet_png: Vec<u8>,
) -> Result<Report> {
    let resolved = &needs.resolved;
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
            name: label(*method, needs.resolved.student.source).into(),
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
    if let Some((supervisor, proxies, _)) = resolved.teacher() {
        facts.push(("supervisor".into(), supervisor.model.clone()));
        if let Some(adapter) = &supervisor.adapter {
            facts.push((
                "adapter of the supervisor".into(),
                adapter.display().to_string(),
            ));
        }
        facts.push(("proxies per subject".into(), proxies.count.to_string()));
    }
    facts.push(("wall time".into(), format!("{:.0} s", summary.wall_seconds)));
    let mut provenance = vec![
        ("run".to_string(), needs.run.clone()),
        ("seed".into(), resolved.seed.to_string()),
        ("plan".into(), needs.plan.digest().to_string()),
        ("proxytune".into(), env!("CARGO_PKG_VERSION").into()),
    ];
    for sampled in &summary.evaluated {
        provenance.push((
            format!("{} at step {}", sampled.method, sampled.step),
            sampled.adapter.clone(),
        ));
    }
    let is_set_aside = |warning: &&Warning| matches!(warning, Warning::SetAside(_));
    let (set_aside, warnings): (Vec<_>, Vec<_>) = summary.warnings.iter().partition(is_set_aside);
    let [set_aside, warnings] =
        [set_aside, warnings].map(|list| list.iter().map(|warning| warning.to_string()).collect());
    Ok(Report {
        title: needs.title(),
        lead: "Every model drew the same prompts with the same seeds.".into(),
        facts,
        sheet_png,
        models,
        protocol: summary.protocol.clone(),
        charts: charts(needs, summary).await?,
        stages: summary
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
        wall_seconds: summary.wall_seconds,
        first_training_proxy: summary.first_training_proxy,
        settings: resolved.to_toml()?,
        provenance,
        set_aside,
        warnings,
    })
}

async fn charts(needs: &ReportNeeds, summary: &RunSummary) -> Result<Vec<Chart>> {
    let metrics = needs.store.metrics().await?;
    let mut supervisors: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    let mut students: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    let owners: Vec<&String> = needs.supervisors.iter().chain([&needs.run]).collect();
    let mut losses = Vec::new();
    for owned in one_of("run", &owners) {
        let filter = format!("name = 'loss' AND {owned}");
        losses.extend(metrics.rows(Some(&filter), Columns::All).await?);
    }
    for row in losses {
        let point = (row.step as f64, row.value);
        let curve = match row.stage {
            MetricStage::Supervise(subject) => supervisors.entry(subject),
            stage @ (MetricStage::Train | MetricStage::Direct | MetricStage::Pretrain(_)) => {
                students.entry(stage.to_string())
            }
        };
        curve.or_default().push(point);
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
    charts.extend(score_chart(needs, summary).await?);
    Ok(charts)
}

/// The student's scores over its checkpoints, where there are several.
async fn score_chart(needs: &ReportNeeds, summary: &RunSummary) -> Result<Option<Chart>> {
    let table = needs.table().await?;
    let mut curves: [(&str, Vec<(f64, f64)>); 3] =
        [("CLIP-I", vec![]), ("CLIP-T", vec![]), ("DINO", vec![])];
    let is_student =
        |sampled: &&Sampled| matches!(sampled.method, Method::Student | Method::Untouched);
    for sampled in summary.evaluated.iter().filter(is_student) {
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

#[cfg(test)]
mod tests {
    use super::super::fakes::Fakes;
    use super::*;
    use crate::store::MetricRow;

    async fn needs(fakes: &Fakes) -> ReportNeeds {
        ReportNeeds {
            run: "run".into(),
            dir: fakes.dir.path().to_path_buf(),
            resolved: Arc::new(fakes.resolved.clone()),
            plan: fakes.plan.clone(),
            subjects: fakes.subjects.clone(),
            supervisors: vec!["key0".into(), "key1".into()],
            store: fakes.store.clone(),
            evaluator: fakes.evaluator(),
        }
    }

    #[tokio::test]
    async fn photos_that_were_set_aside_and_curves_of_supervisors_stand_apart_from_the_others() {
        let fakes = Fakes::new(&[]).await;
        let metrics = fakes.store.metrics().await.unwrap();
        let curves = [
            ("key0", MetricStage::Supervise("dog1".into())),
            ("key1", MetricStage::Supervise("cat1".into())),
            ("run", MetricStage::Train),
            ("another run", MetricStage::Direct),
        ];
        let rows = curves.map(|(owner, stage)| MetricRow {
            run: owner.into(),
            stage,
            step: 0,
            name: "loss".into(),
            value: 0.5,
            created_us: 1,
        });
        metrics.append(&rows).await.unwrap();
        let summary = RunSummary {
            warnings: vec![
                Warning::Other("no photo was set aside".into()),
                Warning::SetAside("subject dog1: a.jpg is empty".into()),
            ],
            ..RunSummary::default()
        };
        let report = write(&needs(&fakes).await, &summary).await.unwrap();
        assert_eq!(report.set_aside, ["subject dog1: a.jpg is empty"]);
        assert_eq!(report.warnings, ["no photo was set aside"]);
        let told = |chart: &Chart| {
            let names = chart.series.iter().map(|series| series.name.clone());
            (chart.title.clone(), names.collect::<Vec<_>>().join(" "))
        };
        let charts: Vec<(String, String)> = report.charts.iter().map(told).collect();
        let expected = [("Supervisor loss", "cat1 dog1"), ("Student loss", "train")];
        let expected = expected.map(|(title, names)| (title.to_string(), names.to_string()));
        assert_eq!(charts, expected);
        assert!(fakes.dir.path().join("report.html").is_file());
    }

    #[tokio::test]
    async fn what_the_same_run_evaluated_earlier_stays_while_its_samples_are_in_the_store() {
        let fakes = Fakes::new(&[]).await;
        let needs = needs(&fakes).await;
        let evaluated = |method, step| Evaluated {
            method,
            step,
            adapter: "anew".into(),
            samples: Vec::new(),
        };
        let earlier = |method, step, samples: &[(usize, String)]| Sampled {
            method,
            step,
            adapter: "earlier".into(),
            samples: samples.to_vec(),
        };
        let before = RunSummary {
            evaluated: vec![
                earlier(Method::Student, 4, &[]),
                earlier(Method::Student, 8, &[]),
                earlier(Method::Untouched, 0, &[(0, "gone".into())]),
            ],
            ..RunSummary::default()
        };
        let anew = vec![evaluated(Method::Student, 8), evaluated(Method::Direct, 2)];
        let all = with_earlier(&needs, anew, Some(before)).await.unwrap();
        let told: Vec<_> = all
            .iter()
            .map(|s| (s.method, s.step, s.adapter.as_str()))
            .collect();
        let expected = [
            (Method::Direct, 2, "anew"),
            (Method::Student, 4, "earlier"),
            (Method::Student, 8, "anew"),
        ];
        assert_eq!(told, expected);
    }
}
