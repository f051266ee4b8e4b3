//! references: folders of photos become subjects. A bad photo is set aside by name; a folder without a usable one
//! stops the run before it starts.

use std::sync::Arc;

use async_stream::try_stream;
use futures::Stream;
use image::RgbImage;
use image::imageops::{crop_imm, flip_horizontal_in_place};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Log, Subject, Subjects, Warning};
use crate::config;
use crate::config::prompts;
use crate::evaluation::captions::{captions, few, side_files};
use crate::images::{Filter, encode_png, folder, resize_exact, resize_short_side, square};
use crate::models::latent_diffusion::Framing;
use crate::models::{Example, Learner};
use crate::plan::{derive_seed, reference_key};
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
        Ok((
            square(&image, side),
            resize_short_side(&image, side, Filter::Lanczos),
        ))
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
    let beside = side_files(&subject.images, &paths, true)?;
    if !beside.is_empty() {
        warnings.push(Warning::Other(format!(
            "subject {name}: captions beside its photos are ignored ({}): those in metadata.jsonl are read, and a .txt of \
             a photo's name",
            few(&beside)
        )));
    }
    let captions: Vec<Option<String>> = captions(&subject.images, &paths)?
        .into_iter()
        .map(|caption| Some(prompts::fill(&caption?, &subject.token, &subject.class)))
        .collect();
    let lacks = |caption: &&String| !caption.contains(&subject.token);
    if let Some(caption) = captions.iter().flatten().find(lacks) {
        warnings.push(Warning::Other(format!(
            "subject {name}: a caption does not name it, so that the photo is not learnt as {:?}: {caption:?}",
            subject.token
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
        whole: Vec::new(),
        captions,
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
        let (square, whole) = photo.image;
        loaded.images.push(square);
        loaded.whole.push(whole);
    }
    Ok((loaded, warnings))
}

/// Square images, photos or proxies, at the side length that a model wants.
pub fn at_side(images: &[RgbImage], side: u32) -> Vec<RgbImage> {
    images
        .iter()
        .map(|image| resize_exact(image, side, side, Filter::Lanczos))
        .collect()
}

/// What a supervisor's `learner` makes of the photos of `subject`: their squares or, where `settings` ask for it, parts cut
/// and flipped by `seed`, once for the whole training, as diffusers' DreamBooth scripts do.
///
/// # Errors
/// Those of [`Learner::encode`].
pub fn photo_examples(
    learner: &mut dyn Learner,
    subject: &Subject,
    settings: &config::Supervisor,
    seed: u64,
) -> Result<Vec<Example>> {
    if settings.center_crop && !settings.random_flip {
        return examples(learner, &subject.images);
    }
    let side = learner.resolution();
    let (cut, framings): (Vec<_>, Vec<_>) = (0..subject.images.len())
        .map(|index| cut(subject, index, side, settings, seed))
        .unzip();
    let examples = learner.encode(&cut)?.into_iter().zip(framings);
    Ok(examples
        .map(|(example, framing)| example.framed(framing))
        .collect())
}

/// Photo `index` at `side` pixels, and which part of it that is.
fn cut(
    subject: &Subject,
    index: usize,
    side: u32,
    settings: &config::Supervisor,
    seed: u64,
) -> (RgbImage, Framing) {
    let name = format!("photo/{}", subject.name);
    let mut generator = ChaCha8Rng::seed_from_u64(derive_seed(seed, &name, index));
    let is_flipped = settings.random_flip && generator.random_bool(0.5);
    let source = match settings.center_crop {
        true => &subject.images[index],
        false => &subject.whole[index],
    };
    let mut resized = resize_short_side(source, side, Filter::Lanczos);
    if is_flipped {
        flip_horizontal_in_place(&mut resized);
    }
    let top = generator.random_range(0..=resized.height().saturating_sub(side));
    let left = generator.random_range(0..=resized.width().saturating_sub(side));
    let framing = Framing {
        original: [source.height() as usize, source.width() as usize],
        crop: [top as usize, left as usize],
        target: [side as usize; 2],
    };
    (
        crop_imm(&resized, left, top, side, side).to_image(),
        framing,
    )
}

/// What `learner` makes of square images of any size, of which it may be told.
///
/// # Errors
/// Those of [`Learner::encode`].
pub fn examples(learner: &mut dyn Learner, images: &[RgbImage]) -> Result<Vec<Example>> {
    let resized = at_side(images, learner.resolution());
    let sizes = images.iter().map(|image| {
        let (width, height) = image.dimensions();
        [height as usize, width as usize]
    });
    let examples = learner.encode(&resized)?.into_iter().zip(sizes);
    Ok(examples
        .map(|(example, size)| example.of_original(size))
        .collect())
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
    use image::Rgb;

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

    const PIPELINE: &str = "[subject.dog]\nimages = \"x\"\nclass = \"dog\"\n[supervisor]\nmodel = \"sdxl\"\n\
                            [student]\nmodel = \"llamagen-xl\"\n";

    fn settings(overrides: &[&str]) -> config::Supervisor {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        let document =
            config::Document::parse(PIPELINE, "test.toml", &overrides, &crate::models::Registry);
        document.resolve().unwrap().supervisor.unwrap()
    }

    /// Columns grow brighter from left to right, over 240 levels.
    fn subject(count: usize) -> Subject {
        let whole = RgbImage::from_fn(80, 40, |x, _| Rgb([(3 * x) as u8; 3]));
        Subject {
            name: "dog".into(),
            class: "dog".into(),
            token: "sks".into(),
            digests: Vec::new(),
            files: Vec::new(),
            images: vec![square(&whole, 40); count],
            whole: vec![whole; count],
            captions: vec![None; count],
        }
    }

    #[test]
    fn photos_are_cut_at_random_places_once_and_the_model_is_told_where() {
        let (subject, settings) = (subject(20), settings(&["supervisor.center_crop=false"]));
        let mut lefts = std::collections::BTreeSet::new();
        for index in 0..20 {
            let (photo, framing) = cut(&subject, index, 20, &settings, 7);
            assert_eq!(photo.dimensions(), (20, 20));
            assert_eq!(framing.original, [40, 80]);
            assert_eq!((framing.crop[0], framing.target), (0, [20, 20]));
            let left = framing.crop[1];
            assert!(left <= 20);
            // At half the size columns are twice as far apart.
            let brightness = i32::from(photo.get_pixel(10, 0).0[0]);
            assert!(
                (brightness - 6 * (left as i32 + 10)).abs() < 6,
                "{left}: {brightness}"
            );
            assert_eq!(cut(&subject, index, 20, &settings, 7).0, photo);
            lefts.insert(left);
        }
        assert!(lefts.len() > 5, "{lefts:?}");
    }

    #[test]
    fn half_of_the_photos_are_flipped() {
        let (subject, settings) = (subject(100), settings(&["supervisor.random_flip=true"]));
        let flipped = (0..100).filter(|index| {
            let (photo, framing) = cut(&subject, *index, 20, &settings, 7);
            assert_eq!((framing.original, framing.crop), ([40, 40], [0, 0]));
            photo.get_pixel(0, 0).0[0] > photo.get_pixel(19, 0).0[0]
        });
        let flipped = flipped.count();
        assert!((30..70).contains(&flipped), "{flipped}");
    }
}
