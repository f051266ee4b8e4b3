//! `proxytune query`: SQL over the store, nearest proxies, and what there is to ask.

use std::io::{BufWriter, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use super::{Ended, StoreArgs, at_least_one, block_on, output_failed};
use crate::config::limits::{ABOVE_ZERO, TEXT_BYTES};
use crate::console::{self, Output, Watched};
use crate::evaluation::likeness::Like;
use crate::files::Aside;
use crate::store::export::refuse_existing;
use crate::store::query::{
    Answer, Format, IndexReport, QueryLimits, Recall, Search, Snapshot, Space, tables_text, write,
};
use crate::store::quoted;
use crate::{Error, Result};

/// From so many embeddings on, a search without an index says that there could be one.
const MANY: usize = 50_000;

/// `proxytune query`
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  proxytune query --tables\n  \
    proxytune query \"SELECT subject, avg(dino), avg(clip_t), count(*) FROM scored GROUP BY subject\"\n  \
    proxytune query \"SELECT * FROM metrics WHERE name = 'loss'\" --format csv --out losses.csv\n  \
    proxytune query --like photo.jpg --where \"clip_t > 0.3\" --limit 20\n  \
    proxytune query --like \"a dog in the snow\"")]
pub struct QueryArgs {
    /// One query, in quotes; - reads it from standard input. With --like it may use the table near(key, similarity)
    pub sql: Option<String>,
    #[command(flatten)]
    pub store: StoreArgs,
    /// Explain tables and columns, with their rows and sizes
    #[arg(long, conflicts_with_all = ["sql", "like", "index", "recall", "format", "out"])]
    pub tables: bool,
    #[command(flatten)]
    pub like: LikeArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Compare all embeddings, even where there is an index
    #[arg(long, requires = "like")]
    pub exact: bool,
    /// Build the index for --like anew, and measure its recall
    #[arg(long, conflicts_with_all = ["sql", "like", "format", "out"])]
    pub index: bool,
    /// Measure the recall of the index as it is now
    #[arg(long, conflicts_with_all = ["sql", "like", "format", "out"])]
    pub recall: bool,
    /// How the answer is written
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Write the answer to this new file
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Say how long opening, searching and answering took
    #[arg(long)]
    pub timing: bool,
}

/// What a question to the store may take.
#[derive(Debug, Clone, Args)]
pub struct LimitArgs {
    /// Give up when a query has no whole answer after so long
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = ABOVE_ZERO.parser())]
    pub timeout: f64,
    /// Memory that a query may take
    #[arg(long, value_name = "GIB", default_value = "1", value_parser = ABOVE_ZERO.parser())]
    pub memory: f64,
}

impl LimitArgs {
    pub(super) fn limits(&self) -> QueryLimits {
        QueryLimits {
            time: Duration::try_from_secs_f64(self.timeout).unwrap_or(Duration::MAX),
            memory: (self.memory * (1u64 << 30) as f64) as u64,
        }
    }
}

/// What proxies are to be like.
#[derive(Debug, Clone, Args)]
pub struct LikeArgs {
    /// The nearest proxies: to a picture's file, to the proxy whose key begins so (4 digits or more, as
    /// tables print them), or to a text
    #[arg(long, value_name = "IMAGE|KEY|TEXT")]
    pub like: Option<String>,
    /// Which embedding is compared; pictures by DINO and texts by CLIP if not said
    #[arg(long, value_enum)]
    pub by: Option<Space>,
    /// Only proxies that satisfy this condition on the columns of the view scored
    #[arg(long = "where", value_name = "SQL")]
    pub filter: Option<String>,
    /// How many
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub limit: Option<usize>,
    /// Digits of the evaluators whose scores and embeddings are meant; if not said, those of the latest run
    #[arg(long, value_name = "DIGITS")]
    pub evaluators: Option<String>,
}

impl LikeArgs {
    /// Refuses an embedding where nothing is compared.
    pub(super) fn check_by(&self) -> Result<()> {
        match (self.by, &self.like) {
            (Some(_), None) => Err(Error::invalid(
                "--by goes with --like",
                "say what proxies are to be like with --like IMAGE|KEY|TEXT",
            )),
            _ => Ok(()),
        }
    }
}

/// Neighbours where no number is given.
const NEIGHBOURS: usize = 10;

pub(super) fn query(args: &QueryArgs) -> Result<Ended> {
    block_on(answer(args))
}

async fn answer(args: &QueryArgs) -> Result<Ended> {
    let mut clock = Clock::new(args.timing);
    let like = &args.like;
    if like.like.is_none() && (like.filter.is_some() || like.limit.is_some()) {
        return Err(Error::invalid(
            "--where and --limit go with --like",
            "in a query they are SQL: SELECT … WHERE … LIMIT …",
        ));
    }
    if !args.index && !args.recall {
        like.check_by()?;
    }
    let limits = args.limits.limits();
    let snapshot =
        Snapshot::open_with(args.store.path(), like.evaluators.as_deref(), limits).await?;
    clock.lap("opened");
    if args.tables {
        let tables = snapshot.tables().await?;
        write!(Output, "{}", tables_text(&tables)).map_err(output_failed)?;
        clock.lap("described");
        return Ok(Ended::Well);
    }
    if args.index || args.recall {
        for space in like
            .by
            .map_or(vec![Space::Clip, Space::Dino], |space| vec![space])
        {
            let line = match args.index {
                true => built(&snapshot.build_index(space).await?),
                false => measured(space, snapshot.recall(space).await?),
            };
            console::print(line)?;
        }
        return Ok(Ended::Well);
    }
    let typed = match args.sql.as_deref() {
        Some("-") => {
            let mut text = String::new();
            let read = std::io::stdin()
                .take(TEXT_BYTES + 1)
                .read_to_string(&mut text);
            read.map_err(Error::io("standard input"))?;
            if text.len() as u64 > TEXT_BYTES {
                return Err(Error::invalid(
                    format!("standard input has more than {TEXT_BYTES} bytes"),
                    "give one query",
                ));
            }
            Some(text)
        }
        other => other.map(str::to_string),
    };
    let mut ended = Ended::Well;
    let sql = match (&like.like, typed) {
        (None, None) => {
            return Err(Error::invalid(
                "there is nothing to ask",
                "give a query in quotes, --like IMAGE|TEXT, or --tables to see what there is",
            ));
        }
        (None, Some(sql)) => sql,
        (Some(wanted), typed) => {
            let search = if args.exact {
                Search::Exact
            } else {
                Search::Fast
            };
            let limit = like.limit.unwrap_or(NEIGHBOURS);
            let (near, with) = neighbours(
                &snapshot,
                wanted,
                like,
                like.filter.as_deref(),
                limit,
                search,
                &mut clock,
            )
            .await?;
            ended = with;
            snapshot.add_neighbours(&near)?;
            typed.unwrap_or_else(|| {
                let keys: Vec<String> = near.iter().map(|near| quoted(&near.key)).collect();
                let keys = if keys.is_empty() { "NULL".into() } else { keys.join(", ") };
                format!(
                    "SELECT similarity, subject, number, prompt, clip_i, clip_t, dino, near.key FROM near \
                     JOIN scored ON scored.key = near.key WHERE scored.key IN ({keys}) ORDER BY similarity DESC, near.key"
                )
            })
        }
    };
    let answer = snapshot.sql(&sql).await?;
    clock.lap("planned");
    deliver(answer, args.format, args.out.as_deref()).await?;
    clock.lap("answered");
    Ok(ended)
}

/// The proxies nearest to what was typed.
pub(super) async fn neighbours(
    snapshot: &Snapshot,
    wanted: &str,
    args: &LikeArgs,
    filter: Option<&str>,
    limit: usize,
    search: Search,
    clock: &mut Clock,
) -> Result<(Vec<crate::store::query::Neighbour>, Ended)> {
    let wanted = Like::parse(wanted)?;
    if let Like::Text(text) = &wanted
        && text.bytes().all(|byte| byte.is_ascii_hexdigit())
        && snapshot.is_key(&text.to_ascii_lowercase()).await?
    {
        console::note(format!(
            "hint: {text} is taken for a text, but a key begins so, too: give more of its digits if it is meant"
        ));
    }
    let space = args.by.unwrap_or(wanted.usual_space());
    let mut ended = Ended::Well;
    for warning in wanted.unread(snapshot, space).await? {
        console::note(format!("warning: {warning}"));
        ended = Ended::WithWarnings;
    }
    let vector = wanted.embedding(snapshot, space).await?;
    clock.lap("embedded");
    let near = snapshot
        .nearest(space, &vector, limit, filter, search)
        .await?;
    clock.lap("searched");
    let (indexed, rows) = snapshot.indexed(space).await?;
    if !indexed && rows >= MANY && filter.is_none() {
        console::note(format!(
            "hint: {rows} embeddings were compared one by one; proxytune query --index makes this quicker"
        ));
    }
    Ok((near, ended))
}

/// Writes the answer where it is wanted.
async fn deliver(answer: Answer, format: Format, out: Option<&std::path::Path>) -> Result<()> {
    match out {
        Some(path) => {
            refuse_existing(path)?;
            let mut aside = Aside::create(path)?;
            stream(answer, format, aside.file())
                .await?
                .map_err(Error::io(path))?;
            refuse_existing(path)?;
            aside.finish()
        }
        None if format == Format::Parquet && std::io::stdout().is_terminal() => Err(
            Error::invalid("Parquet is nothing for a terminal", "give --out FILE"),
        ),
        None => {
            // What is for people is made harmless, what is for programs stays as it is.
            let written = match format == Format::Table || std::io::stdout().is_terminal() {
                true => stream(answer, format, Output).await?,
                false => stream(answer, format, std::io::stdout()).await?,
            };
            match written {
                // Whoever reads has seen enough: `proxytune query … | head`.
                Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
                written => written.map_err(output_failed),
            }
        }
    }
}

/// Writes the answer to `out`; the inner result is that of the output alone.
async fn stream(
    answer: Answer,
    format: Format,
    out: impl Write + Send,
) -> Result<std::io::Result<()>> {
    let mut watched = Watched::new(out);
    let written = {
        let mut buffer = BufWriter::new(&mut watched);
        let written = write(answer, format, &mut buffer).await;
        // A failure is kept by `watched`.
        let _ = buffer.flush();
        written
    };
    match watched.failure {
        Some(failure) => Ok(Err(failure)),
        None => written.map(|_| Ok(())),
    }
}

fn built(report: &IndexReport) -> String {
    let (table, space, rows) = (&report.table, name(report.space), report.rows);
    match (report.groups, report.recall) {
        (Some((groups, probed)), Some(recall)) => format!(
            "{table}: index of {rows} {space} embeddings built in {:.1} s: {groups} groups, {probed} of them compared; {}",
            report.built_in.as_secs_f64(),
            quality(&recall)
        ),
        _ => format!(
            "{table}: {rows} {space} embeddings are too few for an index; all are compared, exactly"
        ),
    }
}

fn measured(space: Space, recall: Option<Recall>) -> String {
    match recall {
        Some(recall) => format!("{}: {}", name(space), quality(&recall)),
        None => format!(
            "{}: no index; every search is exact (--index builds one)",
            name(space)
        ),
    }
}

fn quality(recall: &Recall) -> String {
    format!(
        "recall {:.3} of the {} nearest against the exact search, over {} proxies; {:.1} ms a search, exact {:.1} ms",
        recall.recall,
        recall.neighbours,
        recall.sample,
        recall.fast.as_secs_f64() * 1e3,
        recall.exact.as_secs_f64() * 1e3
    )
}

fn name(space: Space) -> &'static str {
    match space {
        Space::Clip => "CLIP",
        Space::Dino => "DINO",
    }
}

/// Times of the parts of a command, told on standard error if wanted.
pub(super) struct Clock {
    wanted: bool,
    last: Instant,
}

impl Clock {
    pub(super) fn new(wanted: bool) -> Self {
        Self {
            wanted,
            last: Instant::now(),
        }
    }

    pub(super) fn lap(&mut self, part: &str) {
        if self.wanted {
            console::note(format!(
                "{part} in {:.1} ms",
                self.last.elapsed().as_secs_f64() * 1e3
            ));
        }
        self.last = Instant::now();
    }
}
