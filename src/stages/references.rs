//! references: folders of photos become subjects. A bad photo is set aside by name; a folder without a usable one
//! stops the run before it starts.

use std::sync::Arc;

use async_stream::try_stream;
use futures::Stream;

use super::{Log, Subject, Subjects, Warning};
use crate::config;
use crate::evaluation::captions::{few, side_files};
use crate::images::{Filter, encode_png, folder, resize_exact, square};
use crate::plan::reference_key;
use crate::store::{Store, SubjectRow, now_us};
use crate::stream::blocking;
use crate::{Error, Result};

/// Larger photos are reduced to squares of this side before anything else reads them.
const LARGEST: u32 = 1024;

/// Reads the photos of one subject; beside it, what was set aside or is ignored. Blocks.
///
/// # Errors
/// When the folder is missing or holds nothing usable.
pub fn load(subject: &config::Subject) -> Result<(Subject, Vec<Warning>)> {
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
    let mut warnings: Vec<Warning> = folder
        .set_aside
        .iter()
        .map(|fault| Warning::SetAside(format!("subject {name}: set aside: {fault}")))
        .collect();
    let paths: Vec<_> = folder
        .photos
        .iter()
        .map(|photo| photo.path.clone())
        .collect();
    let beside = side_files(&subject.images, &paths, false)?;
    if !beside.is_empty() {
        warnings.push(Warning::Other(format!(
            "subject {name}: captions beside its photos are ignored ({}): all photos have the same prompt",
            few(&beside)
        )));
    }
    if paths.len() == 1 {
        warnings.push(Warning::Other(format!(
            "subject {name}: there is one photo only, so that its background and pose are learnt as well; 3 to 6 are \
             better"
        )));
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

/// What the stage needs.
pub struct References {
    pub subjects: Subjects,
    pub store: Arc<Store>,
    pub log: Log,
}

impl References {
    /// Commits the subjects to the store and passes their numbers on.
    pub fn run(self) -> impl Stream<Item = Result<usize>> + Send {
        try_stream! {
            let meter = &self.log.meter;
            let table = self.store.subjects().await?;
            for (index, subject) in self.subjects.iter().enumerate() {
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
}

#[cfg(test)]
mod tests {
    use super::super::fakes::{Fakes, all};
    use super::*;
    use crate::store::Columns;

    #[tokio::test]
    async fn subjects_come_out_in_their_order_once_their_photos_are_rows() {
        let fakes = Fakes::new(&[]).await;
        let stage = async || References {
            subjects: fakes.subjects.clone(),
            store: fakes.store.clone(),
            log: fakes.log("references").await,
        };
        assert_eq!(all(stage().await.run()).await.unwrap(), [0, 1]);
        let table = fakes.store.subjects().await.unwrap();
        let rows = table.rows(None, Columns::All).await.unwrap();
        let photos: Vec<(String, u32)> = rows.into_iter().map(|r| (r.subject, r.index)).collect();
        let of = |name: &str| (0..3).map(move |index| (name.to_string(), index)).collect();
        let expected: [Vec<(String, u32)>; 2] = [of("dog1"), of("cat1")];
        assert_eq!(photos, expected.concat());
        // A second run finds them.
        assert_eq!(all(stage().await.run()).await.unwrap(), [0, 1]);
        assert_eq!(table.count(), 6);
    }
}
