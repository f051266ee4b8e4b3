//! Questions to a store: SQL over its tables and the views that make it humane, nearest neighbours by embedding.
//!
//! A [`Snapshot`] opens a table when it is first asked for, in the version that is then the latest, and shows the first
//! row of each key. Nothing can be changed through it but the index that [`Snapshot::build_index`] makes.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::StringArray;
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use datafusion::error::DataFusionError;
use datafusion::execution::SendableRecordBatchStream;
use datafusion::execution::context::SQLOptions;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::logical_expr::LogicalPlan;
use datafusion::prelude::{DataFrame, SessionConfig, SessionContext};
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast;
use futures::StreamExt;
use futures::future::BoxFuture;
use lance::Dataset;
use lance::session::Session;
use tokio::sync::{OnceCell, mpsc};

mod describe;
mod failure;
mod functions;
mod index;
mod limits;
mod nearest;
mod present;
mod tables;
mod views;

pub use super::rows::PictureKind;
pub use describe::{ColumnInfo, TableInfo, tables_text};
pub(super) use index::is_of_an_index;
pub use index::{IndexReport, Recall};
pub use limits::QueryLimits;
pub use nearest::{Neighbour, Search, Space};
pub use present::{Format, write};

use self::failure::{explained, not_a_query, unknown_table};
use self::limits::{Meter, Running};
pub(in crate::store) use self::tables::TableKind;
use super::columns::{column, text};
use super::identity::no_store;
use super::{Access, INDEX_CACHE, METADATA_CACHE, in_use, quoted};
use crate::{Error, Result};

/// The tables of a store, to be asked.
pub struct Snapshot {
    path: PathBuf,
    context: SessionContext,
    session: Arc<Session>,
    /// The tables that exist, without `.lance`.
    names: Vec<String>,
    /// Opened datasets by name.
    open: Mutex<BTreeMap<String, Arc<Dataset>>>,
    /// The evaluators that were asked for, as the name of their table ends.
    evaluators: Option<String>,
    /// The table of the evaluators that are asked, once it was looked for.
    evaluations: OnceCell<Option<String>>,
    /// What each query may take.
    limits: QueryLimits,
    /// Says that this process uses the store; none where it cannot be locked.
    in_use: Option<File>,
}

/// What a query answers: columns, and rows as they are found.
pub struct Answer {
    /// The columns.
    pub schema: SchemaRef,
    rows: mpsc::Receiver<Result<RecordBatch, DataFusionError>>,
    /// What computes them.
    running: Running<()>,
    meter: Meter,
}

impl Answer {
    /// An answer whose `rows` are computed on another thread, one batch ahead.
    fn new(mut rows: SendableRecordBatchStream, meter: Meter) -> Self {
        let schema = rows.schema();
        let (sender, receiver) = mpsc::channel(1);
        let running = Running::start(async move {
            while let Some(batch) = rows.next().await {
                if sender.send(batch).await.is_err() {
                    break;
                }
            }
        });
        Self {
            schema,
            rows: receiver,
            running,
            meter,
        }
    }

    /// The next rows; none at the end.
    ///
    /// Errors: files that cannot be read; a value that an expression cannot take; more than the limits allow.
    pub fn next<'a>(&'a mut self) -> BoxFuture<'a, Result<Option<RecordBatch>>> {
        Box::pin(async move {
            match self.meter.wait(self.rows.recv()).await? {
                Some(batch) => batch.map(Some).map_err(|e| explained(e, None)),
                None => self.running.end().await.map(|()| None),
            }
        })
    }

    /// All rows.
    ///
    /// Errors: as [`Answer::next`].
    pub async fn all(mut self) -> Result<Vec<RecordBatch>> {
        let mut batches = Vec::new();
        while let Some(batch) = self.next().await? {
            batches.push(batch);
        }
        Ok(batches)
    }
}

impl Snapshot {
    /// Opens the store in `path`, once nobody erases from it. Of several pairs of evaluators, `evaluators` (the end of their table's name, or its
    /// beginning) are asked; without it, those of the latest run.
    ///
    /// Errors: there is no store; no such evaluators.
    pub async fn open(path: impl AsRef<Path>, evaluators: Option<&str>) -> Result<Self> {
        Self::open_with(path, evaluators, QueryLimits::default()).await
    }

    /// The same, where each query may take as much as `limits` say.
    ///
    /// Errors: there is no store; no such evaluators.
    pub async fn open_with(
        path: impl AsRef<Path>,
        evaluators: Option<&str>,
        limits: QueryLimits,
    ) -> Result<Self> {
        let path = path.as_ref();
        let entries = std::fs::read_dir(path).map_err(|_| no_store(path))?;
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(Error::io(path))?.file_name();
            let name = name.to_str().and_then(|name| name.strip_suffix(".lance"));
            names.extend(name.map(str::to_string));
        }
        if names.is_empty() {
            return Err(no_store(path));
        }
        names.sort_unstable();
        // Reading needs neither the right to write nor locks.
        let in_use = in_use(path, Access::Shared).await.ok().flatten();
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_limit(limits.memory as usize, 1.0)
            .with_max_temp_directory_size(limits.disk())
            .build_arc()
            .map_err(|e| explained(e, None))?;
        let config = SessionConfig::new().with_target_partitions(1);
        let context = SessionContext::new_with_config_rt(config, runtime);
        context.register_udf(functions::json_text());
        let mut snapshot = Self {
            path: std::fs::canonicalize(path).map_err(Error::io(path))?,
            context,
            session: Arc::new(Session::new(INDEX_CACHE, METADATA_CACHE, Arc::default())),
            names,
            open: Mutex::default(),
            evaluators: None,
            evaluations: OnceCell::new(),
            limits,
            in_use,
        };
        if let Some(asked) = evaluators {
            let known: Vec<&str> = snapshot.all_evaluators().collect();
            let found = known.iter().find(|digits| digits.starts_with(asked));
            let found = found.ok_or_else(|| {
                Error::invalid(
                    format!("no evaluators {asked:?} in {}", path.display()),
                    format!("there are: {}", known.join(", ")),
                )
            })?;
            snapshot.evaluators = Some(found.to_string());
        }
        Ok(snapshot)
    }

    /// The directory, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Answers `sql`, one query over the store's tables and views (`SELECT …`, `WITH …`, `EXPLAIN …`, `DESCRIBE …`).
    ///
    /// Errors: what is no query, or cannot be understood; a table of a newer layout; files that cannot be read; more than
    /// the limits allow.
    pub fn sql<'a>(&'a self, sql: &'a str) -> BoxFuture<'a, Result<Answer>> {
        Box::pin(async move {
            let plan = self.plan(sql).await?;
            let explain = |e| explained(e, Some(self));
            let only_queries = SQLOptions::new()
                .with_allow_ddl(false)
                .with_allow_dml(false)
                .with_allow_statements(false);
            only_queries.verify_plan(&plan).map_err(|_| not_a_query())?;
            let frame = self
                .context
                .execute_logical_plan(plan)
                .await
                .map_err(explain)?;
            let mut meter = Meter::new(self.limits);
            // Constants are computed here already.
            let starting: BoxFuture<'static, _> = Box::pin(frame.execute_stream());
            let mut starting = Running::start(starting);
            let rows = meter.wait(starting.end()).await??.map_err(explain)?;
            Ok(Answer::new(rows, meter))
        })
    }

    /// Makes `batch` a table called `name` for the queries of this snapshot.
    ///
    /// Errors: the name is taken.
    pub fn add_table(&self, name: &str, batch: RecordBatch) -> Result<()> {
        let explain = |e| explained(e, Some(self));
        self.context.register_batch(name, batch).map_err(explain)?;
        Ok(())
    }

    /// The texts of the one column that `sql` selects.
    async fn texts(&self, sql: &str) -> Result<Vec<String>> {
        let mut texts = Vec::new();
        for batch in self.sql(sql).await?.all().await? {
            let name = batch.schema().field(0).name().clone();
            let values: &StringArray = column(&batch, &name)?;
            texts.extend(values.iter().flatten().map(str::to_string));
        }
        Ok(texts)
    }

    /// A query for the pictures of `kinds`, with what is known of them.
    ///
    /// Errors: there can be none; files that cannot be read.
    pub async fn pictures_sql(&self, kinds: &[PictureKind]) -> Result<String> {
        views::pictures(self, kinds).await
    }

    /// The table that has the pictures of `kind`.
    ///
    /// Errors: files that cannot be read.
    pub async fn table_of(&self, kind: PictureKind) -> Result<Option<String>> {
        match kind {
            PictureKind::Proxy => Ok(Some("proxies".into())),
            PictureKind::Reference => Ok(Some("subjects".into())),
            PictureKind::Sample => self.evaluations().await,
        }
    }

    /// Plans `sql` once every table that it names is open.
    fn plan<'a>(&'a self, sql: &'a str) -> BoxFuture<'a, Result<LogicalPlan>> {
        Box::pin(async move {
            let explain = |e| explained(e, Some(self));
            let state = self.context.state();
            limits::check_operations(sql)?;
            let dialect = state.config().options().sql_parser.dialect;
            let statement = state.sql_to_statement(sql, &dialect).map_err(explain)?;
            if !is_query(&statement) {
                return Err(not_a_query());
            }
            for reference in state
                .resolve_table_references(&statement)
                .map_err(explain)?
            {
                self.ensure(reference.table()).await?;
            }
            // The state is taken again, for it is a copy; the tables in it are shared.
            self.context
                .state()
                .statement_to_plan(statement)
                .await
                .map_err(explain)
        })
    }

    /// Makes the table or view called `name` known to SQL.
    async fn ensure(&self, name: &str) -> Result<()> {
        let explain = |e| explained(e, Some(self));
        if self.context.table_exist(name).map_err(explain)? {
            return Ok(());
        }
        let provider = match views::sql(self, name).await? {
            Some(view) => {
                let plan = self.plan(&view).await?;
                DataFrame::new(self.context.state(), plan).into_view()
            }
            None if name == views::SETTINGS => tables::settings(self).await?,
            None if self.names.iter().any(|known| known == name) || TableKind::is_fixed(name) => {
                tables::provider(self, name, false).await?
            }
            None => return Err(unknown_table(self, name)),
        };
        self.context
            .register_table(name, provider)
            .map_err(explain)?;
        Ok(())
    }

    /// Makes the table `name` known to SQL with Lance's ids of its rows, and returns what it is called there.
    async fn with_row_ids(&self, name: &str) -> Result<String> {
        let explain = |e| explained(e, Some(self));
        let with_ids = format!("rows_of_{name}");
        if !self
            .context
            .table_exist(with_ids.as_str())
            .map_err(explain)?
        {
            let provider = tables::provider(self, name, true).await?;
            self.context
                .register_table(with_ids.as_str(), provider)
                .map_err(explain)?;
        }
        Ok(with_ids)
    }

    /// The dataset called `name`, opened; none when it has no committed row.
    pub(super) async fn dataset(&self, name: &str) -> Result<Option<Arc<Dataset>>> {
        let open = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dataset) = open().get(name) {
            return Ok(Some(dataset.clone()));
        }
        let Some(dataset) =
            tables::open(&self.path.join(format!("{name}.lance")), &self.session).await?
        else {
            return Ok(None);
        };
        let dataset = Arc::new(dataset);
        open().insert(name.to_string(), dataset.clone());
        Ok(Some(dataset))
    }

    /// Makes `latest` the version of the table `name` that is asked from now on.
    fn replace(&self, name: &str, latest: Dataset) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(name.to_string(), Arc::new(latest));
    }

    /// What the names of the evaluations tables end with.
    fn all_evaluators(&self) -> impl Iterator<Item = &str> {
        self.names
            .iter()
            .filter_map(|name| name.strip_prefix("evaluations_"))
    }

    /// The name of the table of the evaluators that are asked; none where nothing was evaluated.
    ///
    /// Errors: files that cannot be read.
    pub fn evaluations<'a>(&'a self) -> BoxFuture<'a, Result<Option<String>>> {
        Box::pin(async move {
            let looking = self.evaluations.get_or_try_init(|| self.find_evaluations());
            looking.await.cloned()
        })
    }

    async fn find_evaluations(&self) -> Result<Option<String>> {
        let known: Vec<&str> = self.all_evaluators().collect();
        let digits = match (&self.evaluators, known.as_slice()) {
            (Some(asked), _) => asked.clone(),
            (None, []) => return Ok(None),
            (None, [only]) => only.to_string(),
            (None, [first, ..]) => {
                let latest =
                    "SELECT json_text(versions, 'evaluators') FROM runs ORDER BY event_us DESC";
                let by_run = self.texts(latest).await?;
                let mut used = by_run
                    .iter()
                    .filter_map(|digest| known.iter().find(|digits| digest.starts_with(**digits)));
                used.next().unwrap_or(first).to_string()
            }
        };
        Ok(Some(format!("evaluations_{digits}")))
    }

    /// Names or directories of the CLIP and DINO that the runs with these evaluators were given.
    ///
    /// Errors: files that cannot be read.
    pub fn evaluator_names<'a>(
        &'a self,
        digits: &'a str,
    ) -> BoxFuture<'a, Result<Vec<(String, String)>>> {
        Box::pin(async move {
            let sql = format!(
                "SELECT DISTINCT c.value AS clip, d.value AS dino FROM latest_runs \
             JOIN settings c ON c.run = latest_runs.run AND c.setting = 'evaluation.clip' \
             JOIN settings d ON d.run = latest_runs.run AND d.setting = 'evaluation.dino' \
             WHERE starts_with(json_text(versions, 'evaluators'), {}) ORDER BY 1, 2",
                quoted(digits)
            );
            let mut names = Vec::new();
            for batch in self.sql(&sql).await?.all().await? {
                let (clip, dino) = (text(&batch, "clip")?, text(&batch, "dino")?);
                names.extend((0..batch.num_rows()).map(|i| (clip(i), dino(i))));
            }
            Ok(names)
        })
    }

    /// Every name that SQL may use, sorted.
    fn all_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.names.clone();
        names.extend(TableKind::FIXED.iter().map(|(name, _)| name.to_string()));
        names.extend(views::names().map(str::to_string));
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// Whether `statement` only asks. A query can still hold one that changes something; the plan tells.
fn is_query(statement: &Statement) -> bool {
    match statement {
        Statement::Statement(statement) => matches!(
            **statement,
            ast::Statement::Query(_)
                | ast::Statement::Explain { .. }
                | ast::Statement::ExplainTable { .. }
        ),
        Statement::Explain(explain) => is_query(&explain.statement),
        Statement::CreateExternalTable(_) | Statement::CopyTo(_) | Statement::Reset(_) => false,
    }
}
