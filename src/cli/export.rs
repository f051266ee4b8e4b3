//! `proxytune export`: chosen pictures as images with captions, or as one picture.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::query::{Clock, LikeArgs, LimitArgs, neighbours};
use super::{Ended, StoreArgs, at_least_one, block_on, output_failed};
use crate::evaluation::contact::{Cell, contact_sheet};
use crate::images::{decode_png, encode_png};
use crate::store::export::{
    Choice, Chosen, Layout, choose, export as write_folder, refuse_existing,
};
use crate::store::query::{PictureKind, Search, Snapshot};
use crate::{Error, Result, files};

/// Pictures that a sheet has at most.
const SHEET: usize = 1000;

/// `proxytune export`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  proxytune export --subject dog1 --to train --layout kohya --repeats 10\n  \
    proxytune export --where \"dino > 0.6\" --order \"dino DESC\" --limit 50 --to best --layout imagefolder\n  \
    proxytune export --like \"a dog in the snow\" --limit 24 --sheet snow.png\n  \
    proxytune export --where \"kind = 'sample' AND method = 'student' AND step = 50\" --sheet step-50.png"
)]
pub struct ExportArgs {
    #[command(flatten)]
    pub store: StoreArgs,
    /// Only pictures of this subject; may be given several times
    #[arg(long = "subject", value_name = "NAME")]
    pub subjects: Vec<String>,
    #[command(flatten)]
    pub like: LikeArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Which pictures; proxies if neither this nor --where speaks of kinds; may be given several times
    #[arg(long = "kind", value_enum, value_name = "KIND")]
    pub kinds: Vec<PictureKind>,
    /// In this order, such as \"dino DESC\"; if not said by likeness with --like, else by subject and number
    #[arg(long, value_name = "SQL")]
    pub order: Option<String>,
    /// Write images and captions to this new folder
    #[arg(long, value_name = "DIR", required_unless_present = "sheet")]
    pub to: Option<PathBuf>,
    /// For which trainer
    #[arg(long, value_enum, default_value = "imagefolder", requires = "to")]
    pub layout: Layout,
    /// How often an epoch takes each picture, in the names of kohya's folders; once if not said
    #[arg(long, value_name = "N", requires = "to", value_parser = at_least_one)]
    pub repeats: Option<usize>,
    /// Write them as one picture to this new file
    #[arg(long, value_name = "FILE.png")]
    pub sheet: Option<PathBuf>,
    /// Pictures in a row of the sheet
    #[arg(long, value_name = "N", default_value_t = 8, requires = "sheet", value_parser = crate::config::limits::COLUMNS.parser())]
    pub columns: usize,
}

pub(super) fn export(args: &ExportArgs, out: &mut impl Write) -> Result<Ended> {
    args.like.check_by()?;
    if args.repeats.is_some() && args.layout != Layout::Kohya {
        return Err(Error::invalid(
            "--repeats is in the names of kohya's folders alone",
            "give --layout kohya, or leave it out",
        ));
    }
    for path in [&args.to, &args.sheet].into_iter().flatten() {
        refuse_existing(path)?;
    }
    block_on(async {
        let (evaluators, limits) = (args.like.evaluators.as_deref(), args.limits.limits());
        let snapshot = Snapshot::open_with(args.store.path(), evaluators, limits).await?;
        let (chosen, ended) = chosen(&snapshot, args).await?;
        if chosen.is_empty() {
            return Err(Error::invalid(
                match args.kinds.is_empty() {
                    true => "no proxy is chosen",
                    false => "no picture is chosen",
                },
                "proxytune query \"SELECT kind, subject, count(*) FROM evaluations GROUP BY kind, subject\" says which \
                 there are; --kind sample and --kind reference choose others than proxies",
            ));
        }
        if let Some(dir) = &args.to {
            write_folder(
                &snapshot,
                &chosen,
                args.layout,
                args.repeats.unwrap_or(1),
                dir,
            )
            .await?;
            writeln!(out, "{} in {}", counted(&chosen), dir.display()).map_err(output_failed)?;
        }
        if let Some(path) = &args.sheet {
            let sheet = sheet(&snapshot, &chosen, args).await?;
            refuse_existing(path)?;
            files::write(path, &sheet)?;
            writeln!(out, "{} on {}", counted(&chosen), path.display()).map_err(output_failed)?;
        }
        Ok(ended)
    })
}

/// How many pictures these are, and of which kind.
fn counted(chosen: &[Chosen]) -> String {
    let is = |kind| chosen.iter().all(|one| one.kind == kind);
    let (one, several) = match () {
        () if is(PictureKind::Proxy) => ("proxy", "proxies"),
        () if is(PictureKind::Sample) => ("sample", "samples"),
        () if is(PictureKind::Reference) => ("reference", "references"),
        () => ("picture", "pictures"),
    };
    format!(
        "{} {}",
        chosen.len(),
        if chosen.len() == 1 { one } else { several }
    )
}

/// The proxies that are meant, and whether there was something to warn of.
async fn chosen(snapshot: &Snapshot, args: &ExportArgs) -> Result<(Vec<Chosen>, Ended)> {
    let mut ended = Ended::Well;
    let choice = Choice {
        subjects: args.subjects.clone(),
        kinds: args.kinds.clone(),
        filter: args.like.filter.clone(),
        order: args.order.clone(),
        limit: args.like.limit,
    };
    let near = match &args.like.like {
        None => None,
        Some(_) if args.kinds.iter().any(|kind| *kind != PictureKind::Proxy) => {
            return Err(Error::invalid(
                "--like finds proxies alone",
                "leave --kind out, or choose samples and references with --where",
            ));
        }
        Some(wanted) => {
            let limit = args.like.limit.ok_or_else(|| {
                Error::invalid(
                    "--like without a number",
                    "say how many of the nearest with --limit N",
                )
            })?;
            let (condition, mut clock) = (choice.condition(), Clock::new(false));
            let (near, with) = neighbours(
                snapshot,
                wanted,
                &args.like,
                condition.as_deref(),
                limit,
                Search::Fast,
                &mut clock,
            )
            .await?;
            ended = with;
            Some(near)
        }
    };
    let chosen = choose(snapshot, &choice, near.as_deref()).await?;
    Ok((chosen, ended))
}

async fn sheet(snapshot: &Snapshot, chosen: &[Chosen], args: &ExportArgs) -> Result<Vec<u8>> {
    if chosen.len() > SHEET {
        return Err(Error::invalid(
            format!("{} are too many for one picture", counted(chosen)),
            format!("choose at most {SHEET} with --limit or --where"),
        ));
    }
    let mut cells = Vec::with_capacity(chosen.len());
    snapshot
        .pictures(chosen, |i, picture| {
            let one = &chosen[i];
            let score =
                |name: &str, score: Option<f32>| score.map(|score| format!("{name} {score:.2}"));
            let notes = [
                score("like", one.similarity),
                score("DINO", one.dino),
                score("CLIP-T", one.clip_t),
            ];
            cells.push(Cell {
                image: decode_png(picture, &format!("{} {}", one.kind.name(), one.key))?,
                caption: one.prompt.clone(),
                note: notes
                    .into_iter()
                    .flatten()
                    .take(2)
                    .collect::<Vec<_>>()
                    .join(" "),
            });
            Ok(())
        })
        .await?;
    encode_png(&contact_sheet(
        &title(chosen, args),
        &cells,
        args.columns as u32,
    ))
}

fn title(chosen: &[Chosen], args: &ExportArgs) -> String {
    let mut subjects: Vec<&str> = chosen.iter().map(|one| one.subject.as_str()).collect();
    subjects.sort_unstable();
    subjects.dedup();
    let mut title = match subjects.as_slice() {
        few if few.len() <= 4 => format!("{} of {}", counted(chosen), few.join(", ")),
        many => format!("{} of {} subjects", counted(chosen), many.len()),
    };
    for (name, value) in [
        ("like", &args.like.like),
        ("where", &args.like.filter),
        ("by", &args.order),
    ] {
        if let Some(value) = value {
            title += &format!("; {name} {value}");
        }
    }
    title
}
