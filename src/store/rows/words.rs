//! Columns of a few fixed words, as types: each has one spelling in the tables.

use std::fmt;
use std::str::FromStr;

use arrow::record_batch::RecordBatch;

use crate::store::columns::text;
use crate::{Error, Result};

/// What a picture of the store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum PictureKind {
    /// Made by a supervisor, for a student to learn from
    Proxy,
    /// Drawn for an evaluation
    Sample,
    /// A photo of a subject, as models saw it
    Reference,
}

impl PictureKind {
    pub const ALL: [Self; 3] = [Self::Proxy, Self::Sample, Self::Reference];

    /// How the column `kind` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Sample => "sample",
            Self::Reference => "reference",
        }
    }
}

impl FromStr for PictureKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == text);
        known.ok_or_else(|| unknown("kind of picture", text))
    }
}

/// Who drew an evaluated image.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The student before it learnt anything.
    Untouched,
    /// The student tuned on the references.
    Direct,
    /// A diffusion model tuned on the references.
    Supervisor,
    /// The student of a pipeline.
    Student,
}

impl Method {
    /// In the order of reports.
    pub const ALL: [Self; 4] = [
        Self::Untouched,
        Self::Direct,
        Self::Supervisor,
        Self::Student,
    ];

    /// How the column `method` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Untouched => "untouched",
            Self::Direct => "direct",
            Self::Supervisor => "supervisor",
            Self::Student => "student",
        }
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|method| method.name() == text);
        known.ok_or_else(|| unknown("method", text))
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RunStatus {
    Started,
    /// It was asked to stop, and has stopped cleanly.
    Interrupted,
    Failed,
    /// It has ended well.
    Complete,
}

impl RunStatus {
    pub const ALL: [Self; 4] = [
        Self::Started,
        Self::Interrupted,
        Self::Failed,
        Self::Complete,
    ];

    /// How the column `status` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
            Self::Complete => "complete",
        }
    }
}

impl FromStr for RunStatus {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|status| status.name() == text);
        known.ok_or_else(|| unknown("status of a run", text))
    }
}

/// Which training a number was measured in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum MetricStage {
    /// A supervisor learns this subject.
    Supervise(String),
    /// The student learns.
    Train,
    /// The baseline is tuned on the references.
    Direct,
    /// A nano model of this name is trained from nothing.
    Pretrain(String),
}

const SUPERVISE: &str = "supervise:";
const PRETRAIN: &str = "pretrain:";

/// How the column `stage` has it.
impl fmt::Display for MetricStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Supervise(subject) => write!(f, "{SUPERVISE}{subject}"),
            Self::Train => f.write_str("train"),
            Self::Direct => f.write_str("direct"),
            Self::Pretrain(model) => write!(f, "{PRETRAIN}{model}"),
        }
    }
}

impl FromStr for MetricStage {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let own = |rest: &str| rest.to_string();
        match text {
            "train" => Ok(Self::Train),
            "direct" => Ok(Self::Direct),
            _ => {
                let supervise = text.strip_prefix(SUPERVISE).map(own).map(Self::Supervise);
                let pretrain = || text.strip_prefix(PRETRAIN).map(own).map(Self::Pretrain);
                let known = supervise.or_else(pretrain);
                known.ok_or_else(|| unknown("stage", text))
            }
        }
    }
}

fn unknown(what: &str, text: &str) -> Error {
    Error::Store {
        what: format!("{text:?} is no {what} that this program knows"),
        hint: Some("a newer program wrote it, or another one: read the table with that".into()),
    }
}

/// The words of column `name` of `batch`, row by row.
pub(super) fn words<T: FromStr<Err = Error>>(batch: &RecordBatch, name: &str) -> Result<Vec<T>> {
    let text = text(batch, name)?;
    (0..batch.num_rows()).map(|row| text(row).parse()).collect()
}

/// The words of column `name` of `batch`, row by row; none where it is empty.
pub(super) fn maybe_words<T: FromStr<Err = Error>>(
    batch: &RecordBatch,
    name: &str,
) -> Result<Vec<Option<T>>> {
    let text = text(batch, name)?;
    let word = |row| match text(row).as_str() {
        "" => Ok(None),
        word => word.parse().map(Some),
    };
    (0..batch.num_rows()).map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comes_back<T>(words: &[T], spelling: impl Fn(&T) -> String)
    where
        T: FromStr<Err = Error> + PartialEq + fmt::Debug,
    {
        for word in words {
            assert_eq!(spelling(word).parse::<T>().unwrap(), *word);
        }
        assert!("something else".parse::<T>().is_err());
    }

    #[test]
    fn every_word_of_the_tables_is_read_as_it_is_written_and_no_other() {
        comes_back(&PictureKind::ALL, |kind| kind.name().into());
        comes_back(&Method::ALL, |method| method.name().into());
        comes_back(&RunStatus::ALL, |status| status.name().into());
        let stages = [
            MetricStage::Supervise("dog1".into()),
            MetricStage::Supervise("train".into()),
            MetricStage::Train,
            MetricStage::Direct,
            MetricStage::Pretrain("vq".into()),
        ];
        comes_back(&stages, MetricStage::to_string);
        assert_eq!(stages[0].to_string(), "supervise:dog1");
        assert_eq!(stages[4].to_string(), "pretrain:vq");
    }
}
