//! What one question may cost: anyone can write a query that would run for years, or take all memory.

use std::time::{Duration, Instant};

use datafusion::error::DataFusionError;
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};
use tokio::task::JoinHandle;

use crate::store::columns::broken;
use crate::{Error, Result};

/// What one query may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryLimits {
    /// How long an answer may be waited for; what the reader of the answer takes does not count.
    pub time: Duration,
    /// Bytes of rows that are held at once. What does not fit is put on disk where that can be done.
    pub memory: u64,
}

impl Default for QueryLimits {
    /// Half a minute and 1 GiB: questions to a store of a hundred thousand proxies take seconds and some hundred MiB.
    fn default() -> Self {
        Self {
            time: Duration::from_secs(30),
            memory: 1 << 30,
        }
    }
}

impl QueryLimits {
    /// Bytes that may be put on disk.
    pub(super) fn disk(&self) -> u64 {
        self.memory.saturating_mul(4)
    }
}

/// The most operations of one query. The engine calls itself once for each, and its threads have stacks for four times
/// as many: see [`crate::STACK`].
const OPERATIONS: usize = 1000;

/// Fails where `sql` has more operations than can be planned.
pub(super) fn check_operations(sql: &str) -> Result<()> {
    // What is no SQL at all is told by the parser.
    let tokens = Tokenizer::new(&GenericDialect {}, sql)
        .tokenize()
        .unwrap_or_default();
    let words = [
        Keyword::AND,
        Keyword::OR,
        Keyword::NOT,
        Keyword::UNION,
        Keyword::EXCEPT,
        Keyword::INTERSECT,
        Keyword::JOIN,
        Keyword::CASE,
        Keyword::WHEN,
        Keyword::BETWEEN,
        Keyword::LIKE,
        Keyword::ILIKE,
        Keyword::IS,
        Keyword::IN,
    ];
    let is_operation = |token: &&Token| match token {
        Token::Word(word) => words.contains(&word.keyword),
        Token::Comma | Token::Whitespace(_) | Token::Period | Token::SemiColon => false,
        Token::Number(..) | Token::SingleQuotedString(_) | Token::LParen | Token::RParen => false,
        _ => true,
    };
    let count = tokens.iter().filter(is_operation).count();
    match count <= OPERATIONS {
        true => Ok(()),
        false => Err(Error::invalid(
            format!("query: it has {count} operations, at most {OPERATIONS} are planned"),
            "ask with IN (…), which may list any number of values, or in several queries",
        )),
    }
}

/// Between two looks at what a query has taken.
const LOOK: Duration = Duration::from_millis(100);

/// How much of its limits a query has used.
pub(super) struct Meter {
    limits: QueryLimits,
    waited: Duration,
    /// Bytes that the process held when it began.
    before: u64,
}

impl Meter {
    pub fn new(limits: QueryLimits) -> Self {
        Self {
            limits,
            waited: Duration::ZERO,
            before: resident().unwrap_or(0),
        }
    }

    /// Waits for `work`, which runs on another thread: it may compute without a pause.
    ///
    /// Errors: it takes longer than what is left of the limit, or the process has come to hold too much.
    pub async fn wait<T>(&mut self, work: impl Future<Output = T>) -> Result<T> {
        let start = Instant::now();
        let mut work = std::pin::pin!(work);
        loop {
            self.check(start.elapsed())?;
            tokio::select! {
                biased;
                done = &mut work => {
                    self.waited += start.elapsed();
                    return Ok(done);
                }
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    fn check(&self, since: Duration) -> Result<()> {
        let QueryLimits { time, memory } = self.limits;
        if self.waited + since > time {
            return Err(Error::invalid(
                format!("query: no whole answer within {} s", time.as_secs_f64()),
                "narrow it (each JOIN needs its ON, LIMIT comes last), or allow more with --timeout SECONDS",
            ));
        }
        // What functions allocate is not counted by the engine. Twice, as what it does count is held by others, too.
        let grown = resident().unwrap_or(0).saturating_sub(self.before);
        if grown > memory.saturating_mul(2) {
            return Err(Error::invalid(
                format!(
                    "query: it takes more memory than {:.2} GiB",
                    gibibytes(memory)
                ),
                "ask for less at once, or allow more with --memory GIB",
            ));
        }
        Ok(())
    }
}

pub(super) fn gibibytes(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// Bytes of memory that this process holds now; `None` where the system does not say.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Work on another thread, which is told to stop when nobody waits for it any more.
pub(super) struct Running<T>(JoinHandle<T>);

impl<T: Send + 'static> Running<T> {
    pub fn start(work: impl Future<Output = T> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }

    /// Its result.
    ///
    /// Errors: it panicked.
    pub async fn end(&mut self) -> Result<T> {
        let ended = (&mut self.0).await;
        ended.map_err(|e| broken(format!("a query ended unexpectedly: {e}")))
    }
}

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Whether `cause` says that memory or the room on disk for it was not enough.
pub(super) fn is_exhausted(cause: &DataFusionError) -> bool {
    matches!(cause, DataFusionError::ResourcesExhausted(_))
}
