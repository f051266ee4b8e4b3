//! `proxytune remove`: a subject and everything made of it, gone.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::{Ended, StoreArgs, block_on, output_failed};
use crate::store::Store;
use crate::store::identity::{is_store, no_store};
use crate::watch::remove::Leaving;
use crate::{Error, Result};

/// `proxytune remove`
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  proxytune remove rex --watch photos\n  proxytune remove dog1 --store datasets/store --yes"
)]
pub struct RemoveArgs {
    /// The subject, as status and the store call it
    pub subject: String,
    #[command(flatten)]
    pub store: StoreArgs,
    /// The watched folder that it is in; the store is then the watch's
    #[arg(long, value_name = "DIR")]
    pub watch: Option<PathBuf>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

pub(super) fn remove(args: &RemoveArgs, out: &mut impl Write) -> Result<Ended> {
    let leaving = match &args.watch {
        Some(dir) => Some(Leaving::find(dir, &args.subject)?),
        None => None,
    };
    let name = leaving
        .as_ref()
        .map_or(args.subject.clone(), |leaving| leaving.id().to_string());
    let store = match &leaving {
        Some(leaving) => leaving.store(args.store.store.as_deref())?,
        None => args.store.path(),
    };
    if !is_store(&store) {
        return Err(no_store(&store));
    }
    let mut say = |line: String| writeln!(out, "{line}").map_err(output_failed);
    for photo in leaving.iter().flat_map(|leaving| leaving.photos()) {
        say(format!("{}", photo.display()))?;
    }
    for link in leaving.iter().filter_map(Leaving::link) {
        say(format!("{}, a link", link.display()))?;
    }
    for photo in leaving.iter().flat_map(|leaving| leaving.shared()) {
        say(format!(
            "{} stays: it lies in another subject's folder",
            photo.display()
        ))?;
    }
    if !args.yes {
        let kept = "photos, proxies, tokens, scores, samples, curves and supervisors of it, in all versions";
        say(format!(
            "This deletes {name} for good from {}: {kept}.",
            store.display()
        ))?;
        say("Type its name to go on:".to_string())?;
        let mut answer = String::new();
        std::io::stdin()
            .read_line(&mut answer)
            .map_err(Error::io("standard input"))?;
        if answer.trim() != name {
            return Err(Error::invalid(
                "nothing was deleted",
                "type the name, or give --yes",
            ));
        }
    }
    let removed = block_on(async {
        let store = Store::open_alone(&store).await?;
        store.remove_subject(&name).await
    })?;
    let watched = leaving.is_some();
    let mut left = removed.left.clone();
    if let Some(leaving) = leaving {
        let stays = |(path, why): &(PathBuf, String)| format!("{}: {why}", path.display());
        left.extend(leaving.left().iter().map(stays));
        leaving.remove()?;
    }
    for (table, rows) in removed.rows.iter().filter(|(_, rows)| *rows > 0) {
        say(format!("{rows:>8} rows of {table}"))?;
    }
    say(format!("{:>8} supervisors", removed.adapters))?;
    for tag in &removed.tags {
        say(format!("the tag {tag} kept rows of it, and is gone"))?;
    }
    if removed.rows.iter().all(|(_, rows)| *rows == 0) && removed.adapters == 0 && !watched {
        return Err(Error::invalid(
            format!("{} holds nothing of a subject {name:?}", store.display()),
            "proxytune query \"SELECT DISTINCT subject FROM proxies\" names those that it holds",
        ));
    }
    if !removed.runs.is_empty() {
        say("What students have learnt of it stays in their adapters. These runs had it; where their folders are".into())?;
        say("kept, they hold pictures and adapters of it:".into())?;
        for run in &removed.runs {
            say(format!("  {run}"))?;
        }
    }
    if left.is_empty() {
        return Ok(Ended::Well);
    }
    say("This is left of it:".into())?;
    for line in left {
        say(format!("  {line}"))?;
    }
    Ok(Ended::WithWarnings)
}
