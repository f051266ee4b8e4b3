//! references: folders of photos become subjects. A bad photo is set aside by name; a folder without a usable one
//! stops the run before it starts.

use std::sync::Arc;

use async_stream::try_stream;
use futures::Stream;

use super::{Context, Subject};
use crate::config;
use crate::evaluation::captions::{few, side_files};
use crate::images::{Filter, encode_png, folder, resize_exact, square};
use crate::plan::reference_key;
use crate::store::{SubjectRow, now_us};
use crate::stream::{Meter, blocking};
use crate::{Error, Result};

/// Larger photos are reduced to squares of this side before anything else reads them.
const LARGEST: u32 = 1024;

/// Reads the photos of one subject; beside it, what was set aside or is ignored. Blocks.
///
/// # Errors
/// When the folder is missing or holds nothing usable.
pub fn load(subject: &config::Subject) -> Result<(Subject, Vec<String>)> {
    let name = &subject.name;
    let reduced = folder(&subject.images, |image| {
        let side = image.width().min(image.height()).min(LARGEST);
        Ok(square(&image, side))
    });
    let folder = reduced.map_err(|error| match error {
        Error::Invalid { what, .. } => Error::invalid(
            format!("subject {name}: {what}"),
            "put 3 to 6 photos of the subject there, as JPEG, PNG or WebP",
        ),
        other => other,
    })?;
    let mut warnings: Vec<String> = folder
        .set_aside
        .iter()
        .map(|fault| format!("subject {name}: set aside: {fault}"))
        .collect();
    let paths: Vec<_> = folder
        .photos
        .iter()
        .map(|photo| photo.path.clone())
        .collect();
    let beside = side_files(&subject.images, &paths, false)?;
    if !beside.is_empty() {
        warnings.push(format!(
            "subject {name}: captions beside its photos are ignored ({}): all photos have the same prompt",
            few(&beside)
        ));
    }
    if paths.len() == 1 {
        warnings.push(format!(
            "subject {name}: there is one photo only, so that its background and pose are learnt as well; 3 to 6 are \
             better"
        ));
    }
    let mut loaded = Subject {
        name: subject.name.clone(),
        class: subject.class.clone(),
        token: subject.token.clone(),
        digests: Vec::new(),
        files: Vec::new(),
        images: Vec::new(),
    };
    for photo in folder.photos {
        loaded.digests.push(photo.digest);
        loaded.files.push(
            photo
                .path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        );
        loaded.images.push(photo.image);
    }
    Ok((loaded, warnings))
}

/// The subject's images at the side length that a model wants.
pub fn at_resolution(subject: &Subject, side: u32) -> Vec<image::RgbImage> {
    subject
        .images
        .iter()
        .map(|image| resize_exact(image, side, side, Filter::Lanczos))
        .collect()
}

/// Commits the subjects to the store and passes their numbers on.
pub fn references(context: Arc<Context>, meter: Meter) -> impl Stream<Item = Result<usize>> + Send {
    try_stream! {
        let table = context.store.subjects().await?;
        for (index, subject) in context.subjects.iter().enumerate() {
            let own = subject.clone();
            let encoding = blocking("encoding photos", move || {
                own.images.iter().map(encode_png).collect::<Result<Vec<_>>>()
            });
            let mut rows = Vec::new();
            for (number, png) in meter.busy(encoding).await?.into_iter().enumerate() {
                let image = &subject.images[number];
                rows.push(SubjectRow {
                    key: reference_key(&subject.name, &subject.digests[number]),
                    subject: subject.name.clone(),
                    class: subject.class.clone(),
                    token: subject.token.clone(),
                    index: number as u32,
                    file_name: subject.files[number].clone(),
                    width: image.width(),
                    height: image.height(),
                    image: png,
                    created_us: now_us(),
                });
            }
            meter.busy(table.append(&rows)).await?;
            meter.add(1);
            yield index;
        }
    }
}
