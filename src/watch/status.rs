//! A watch for people: who is there, what is learnt, what waits, and what happened.

use std::collections::BTreeMap;
use std::path::Path;

use super::state::{Home, State, Subject};
use crate::store::Store;
use crate::store::identity::is_store;
use crate::{Error, Result};
use futures::future::BoxFuture;

/// The status of the watch on `dir`, whether it runs or not.
///
/// # Errors
/// When nothing was ever watched there, or its files or its store cannot be read.
pub fn status<'a>(dir: &'a Path) -> BoxFuture<'a, Result<String>> {
    Box::pin(async move {
        let home = Home::of(dir)?;
        if !home.exists() {
            return Err(Error::invalid(
                format!("{} has never been watched", home.watched.display()),
                "start with: proxytune watch DIR",
            ));
        }
        let state = home.load()?;
        let mut proxies: BTreeMap<String, usize> = BTreeMap::new();
        // Whose store is away is told of all the same.
        if let Ok(place) = home.store(&state, None)
            && is_store(&place)
        {
            let store = Store::open_existing(&place).await?;
            for subject in store.proxies().await?.texts("subject").await? {
                *proxies.entry(subject).or_default() += 1;
            }
        }
        Ok(text(&home, &state, &proxies, home.is_watched()))
    })
}

/// What [`status`] says of `state`; `proxies` are the store's, by subject.
pub fn text(
    home: &Home,
    state: &State,
    proxies: &BTreeMap<String, usize>,
    is_watched: bool,
) -> String {
    let running = match (is_watched, &state.run) {
        (true, _) => "watching",
        (false, None) => "not running",
        (false, Some(_)) => "not running; the same command goes on with the run that is under way",
    };
    let mut text = format!("{}: {running}\n", home.watched.display());
    text += &match &state.published {
        None => "published   nothing yet\n".to_string(),
        Some(published) => format!(
            "published   {} (run {}, adapter {})\n",
            home.published().display(),
            published.number,
            &published.adapter[..12]
        ),
    };
    text += &format!("store       {}\n\n", state.store.path.display());
    text += &format!(
        "{:<16} {:<24} {:<6} {:>6} {:>7} {:>7} {:>7} {:>7}  state\n",
        "subject", "folder", "token", "photos", "proxies", "CLIP-I", "CLIP-T", "DINO"
    );
    for subject in &state.subjects {
        let scores = state
            .published
            .as_ref()
            .and_then(|published| published.scores.get(&subject.id));
        let [clip_i, clip_t, dino] = match scores {
            Some(scores) => {
                [scores.clip_i, scores.clip_t, scores.dino].map(|score| format!("{score:.3}"))
            }
            None => ["-"; 3].map(String::from),
        };
        text += &format!(
            "{:<16} {:<24} {:<6} {:>6} {:>7} {clip_i:>7} {clip_t:>7} {dino:>7}  {}\n",
            subject.id,
            subject.folder,
            subject.token,
            subject.photos.len(),
            proxies.get(&subject.id).copied().unwrap_or(0),
            standing(state, subject)
        );
    }
    let mut part = |heading: &str, lines: Vec<String>| {
        if !lines.is_empty() {
            text += &format!("\n{heading}\n");
            lines.iter().for_each(|line| text += &format!("  {line}\n"));
        }
    };
    let waiting = state
        .waiting
        .iter()
        .map(|(folder, why)| format!("{folder}: {why}"));
    part("waiting", waiting.collect());
    let bad = state
        .set_aside
        .iter()
        .map(|bad| format!("{}: {}", bad.path, bad.reason));
    part("set aside", bad.collect());
    let runs = state.history.iter().map(|ended| {
        let end = match &ended.refused {
            None => "published".to_string(),
            Some(why) => format!("not published: {why}"),
        };
        let dino: Vec<String> = ended
            .scores
            .iter()
            .map(|(subject, scores)| format!("{subject} {:.3}", scores.dino))
            .collect();
        let scores = if dino.is_empty() {
            String::new()
        } else {
            format!("; DINO {}", dino.join(", "))
        };
        format!(
            "{:>4}  {:<16} {:>5.0} s  {end}{scores}",
            ended.number, ended.subject, ended.seconds
        )
    });
    part("runs", runs.collect());
    text
}

/// Where one subject stands, in words.
fn standing(state: &State, subject: &Subject) -> String {
    if let Some(run) = state.run.as_ref().filter(|run| run.subject == subject.id) {
        return format!("run {} is learning it", run.number);
    }
    let known = match &subject.learnt {
        Some(look) if *look == subject.look() => "learnt",
        Some(_) => "learnt with other photos",
        None => "not learnt",
    };
    if subject.retired {
        return format!("retired, {known}");
    }
    if let Some(arrival) = subject.pending {
        let before = state
            .subjects
            .iter()
            .filter(|other| other.pending.is_some_and(|p| p < arrival))
            .count();
        return format!("{known}; waits for its run, {before} before it");
    }
    match &subject.held {
        Some((_, why)) if subject.is_held() => {
            format!("{known}; held back until its photos or the settings change: {why}")
        }
        _ => known.to_string(),
    }
}

/// What is new between two states, line by line.
pub fn changes(before: &State, after: &State) -> Vec<String> {
    let mut lines = Vec::new();
    for subject in &after.subjects {
        let id = &subject.id;
        let Some(old) = before.subject(id) else {
            lines.push(format!(
                "{id}: arrived in {} and is called \"{} {}\"",
                subject.folder, subject.token, subject.class
            ));
            continue;
        };
        match (old.retired, subject.retired) {
            (false, true) => lines.push(format!("{id}: retired, {} is gone", old.folder)),
            (true, false) => lines.push(format!("{id}: is back in {}", subject.folder)),
            _ if old.folder != subject.folder => {
                lines.push(format!("{id}: moved to {}", subject.folder))
            }
            _ => {}
        }
        if old.look() != subject.look() {
            lines.push(format!("{id}: its photos or its class changed"));
        }
    }
    for bad in after
        .set_aside
        .iter()
        .filter(|bad| !before.set_aside.contains(bad))
    {
        lines.push(format!("set aside {}: {}", bad.path, bad.reason));
    }
    lines
}

/// A time in microseconds since 1970 as `2026-11-24T03:05:12Z`.
pub fn time(us: i64) -> String {
    let seconds = us.div_euclid(1_000_000);
    let (day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Hinnant's days-to-civil: years that begin in March, in eras of 400.
    let day = day + 719_468;
    let (era, of_era) = (day.div_euclid(146_097), day.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let (date, month) = (
        of_year - (153 * month + 2) / 5 + 1,
        if month < 10 { month + 3 } else { month - 9 },
    );
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::time;

    #[test]
    fn times_are_written_as_calendars_have_them() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_399_999_999), "2000-02-28T23:59:59Z");
        assert_eq!(time(951_782_400_000_000), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_709_164_800_000_000), "2024-02-29T00:00:00Z");
        assert_eq!(time(1_795_489_512_000_000), "2026-11-24T03:05:12Z");
    }
}
