//! Layouts of tables: what an older table lacks, and bringing it up to the present.
//!
//! A layout may only gain columns that may be null ([`columns::SINCE`] says with which number), so a table of any older
//! one can be read as it is, with nulls in the columns that it lacks, and upgraded without rewriting a row.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use futures::future::BoxFuture;
use lance::Dataset;
use lance::dataset::NewColumnTransform;

use super::columns::{SCHEMA_VERSION, SINCE};
use super::failure::{failed, refused};
use super::rows;
use crate::{Error, Result};

/// The columns of `ours` that `dataset`, a table of an older layout, lacks, perhaps none; `None` when its layout is the
/// present one.
///
/// Errors: a newer layout, or none; a column that is missing without being newer than the table; one of another type.
pub(super) fn lacks(
    path: &Path,
    ours: &SchemaRef,
    dataset: &Dataset,
) -> Result<Option<Vec<FieldRef>>> {
    let theirs = dataset.schema();
    let version = theirs
        .metadata
        .get(SCHEMA_VERSION)
        .and_then(|text| text.parse().ok());
    let version: u32 = match version {
        Some(version) if version <= rows::SCHEMA_VERSION => version,
        found => return Err(refused(path, found, rows::SCHEMA_VERSION)),
    };
    let kinds = |schema: &Schema| -> BTreeMap<String, DataType> {
        let fields = schema.fields().iter();
        fields
            .map(|f| (f.name().clone(), f.data_type().clone()))
            .collect()
    };
    let (theirs, known) = (kinds(&theirs.into()), kinds(ours));
    let newer = |field: &Field| since(field).is_some_and(|since| since > version);
    let lacking: Vec<FieldRef> = ours
        .fields()
        .iter()
        .filter(|field| !theirs.contains_key(field.name()) && newer(field))
        .cloned()
        .collect();
    let excused = |name: &String| lacking.iter().any(|field| field.name() == name);
    let differing = |name: &&String| theirs.get(*name) != known.get(*name) && !excused(name);
    if let Some(name) = known.keys().chain(theirs.keys()).find(differing) {
        let kind = |kind: Option<&DataType>| kind.map_or("absent".to_string(), DataType::to_string);
        return Err(Error::Store {
            what: format!(
                "{}: column {name} is {}, but {} is asked for",
                path.display(),
                kind(theirs.get(name)),
                kind(known.get(name)),
            ),
            hint: Some("the table was made for another model or by another program: choose another --store".into()),
        });
    }
    Ok((version < rows::SCHEMA_VERSION).then_some(lacking))
}

/// The layout with which `field` came, for a column that older tables lack.
fn since(field: &Field) -> Option<u32> {
    field.metadata().get(SINCE)?.parse().ok()
}

/// Adds the columns `lacking`, all null, then notes the present layout. Killed in between, it is done again.
///
/// Errors: a read-only directory; another process that changed the table's columns at the same moment.
pub(super) async fn upgrade(
    path: &Path,
    dataset: &mut Dataset,
    lacking: Vec<FieldRef>,
) -> Result<()> {
    let failed = |e| failed("upgrade", path, e);
    if !lacking.is_empty() {
        let columns = NewColumnTransform::AllNulls(Arc::new(Schema::new(lacking)));
        // Behind a `dyn`, or the compiler looks through all of Lance's types for every stage that may wait for this.
        let adding: BoxFuture<'_, _> = Box::pin(dataset.add_columns(columns, None, None));
        adding.await.map_err(failed)?;
    }
    let version = rows::SCHEMA_VERSION.to_string();
    dataset
        .update_schema_metadata([(SCHEMA_VERSION, version.as_str())])
        .await
        .map_err(failed)?;
    tracing::info!("{} is now of layout {version}", path.display());
    Ok(())
}
