//! The kinds of keys, each with the versions of it that are known.

use std::path::Path;

use super::settings;
use super::{Digest, Versions, checkpoint_digest};
use crate::Result;
use crate::config::{DiffusionSampling, Dtype, Resolved, Sampling, Subject, Supervisor};
use crate::plan::{EvaluationImage, EvaluationPlan, Plan, Proxy, Schedule};

/// The known versions of a kind: the newest, and those that are looked for too, the newest of them first.
struct Known {
    newest: &'static str,
    older: &'static [&'static str],
}

impl Known {
    /// The only version so far.
    const fn first(newest: &'static str) -> Self {
        Self { newest, older: &[] }
    }

    /// The key in each version, of which `write` is given the kind with its version.
    fn keys<K>(&self, write: impl Fn(&str) -> K) -> Versions<K> {
        let older = self.older.iter().map(|kind| write(kind)).collect();
        Versions::new(write(self.newest), older)
    }
}

const SUPERVISOR: Known = Known::first("supervisor 1");
const PROXY: Known = Known::first("proxy 1");
const SAMPLE: Known = Known::first("sample 1");

/// Digest of the photos of a subject, from the digests of their bytes in the order in which the plan numbers them.
pub fn photos_digest(photos: &[String]) -> String {
    Digest::new("photos 1").list("photos", photos).finish()
}

/// [`photos_digest`] of photos some of which may have captions of their own; where none has, it is the same.
pub fn captioned_photos_digest(photos: &[String], captions: &[Option<String>]) -> String {
    let digest = Digest::new("photos 1").list("photos", photos);
    let any = captions.iter().any(Option::is_some);
    let digest = digest.added(&any, &false, |digest, _| {
        captions.iter().fold(digest, |digest, caption| {
            digest.field("caption", caption.as_deref().unwrap_or_default())
        })
    });
    digest.finish()
}

/// Keys of a supervisor: the photos ([`captioned_photos_digest`]), the base checkpoint ([`checkpoint_digest`]), the subject as
/// prompts name it, the seed, and all of `supervisor` but what cannot affect it. With prior preservation also
/// `sampling`, by which it draws its class images. Where its adapter is given neither photos nor seed affect it.
pub fn supervisor_keys(
    photos: &str,
    base: &str,
    subject: &Subject,
    supervisor: &Supervisor,
    sampling: &DiffusionSampling,
    seed: u64,
) -> Versions<String> {
    SUPERVISOR.keys(|kind| {
        let digest = Digest::new(kind);
        let is_learnt = supervisor.adapter_digest.is_none();
        let digest = match is_learnt {
            true => digest.field("photos", photos),
            false => digest,
        };
        let digest = digest
            .field("base", base)
            .field("subject", &subject.name)
            .field("class", &subject.class)
            .field("token", &subject.token);
        let digest = match is_learnt {
            true => digest.number("seed", seed),
            false => digest,
        };
        let digest = settings::supervisor(digest, supervisor);
        match supervisor.prior_preservation {
            Some(_) => settings::diffusion_sampling(digest, sampling).finish(),
            None => digest.finish(),
        }
    })
}

/// Key of a program's own source of images, from the key that it gives itself.
pub fn source_key(own: &str) -> String {
    Digest::new("custom source 1").field("key", own).finish()
}

/// Keys of the proxies of batch `batch` of `plan`, in the order of their numbers: the supervisor ([`supervisor_keys`]) or
/// a program's own source ([`source_key`]), how a supervisor samples, the prompts and seeds of the whole batch, as batches are remade whole, and the place in it. The
/// number of the batch has no part in it, so that more subjects or more proxies leave whole batches as they are.
pub fn proxy_keys(
    plan: &Plan,
    batch: usize,
    supervisors: &Versions<String>,
    sampling: Option<&DiffusionSampling>,
) -> Versions<Vec<String>> {
    let members = &plan.proxies()[plan.batch(batch).numbers.clone()];
    let of = |supervisor: &String| {
        PROXY.keys(|kind| {
            let digest = Digest::new(kind).field("supervisor", supervisor);
            let digest = match sampling {
                Some(sampling) => settings::diffusion_sampling(digest, sampling),
                None => digest,
            };
            let digest = digest.number("members", members.len() as u64);
            let digest = members
                .iter()
                .fold(digest, |digest, Proxy { prompt, seed, .. }| {
                    digest.field("prompt", prompt).number("seed", *seed)
                });
            places(&digest, members.len())
        })
    };
    // Proxies stay what they are while the supervisor that made them is known, though it is not in the store.
    let mut all = supervisors.all().flat_map(|supervisor| {
        let Versions { newest, older } = of(supervisor);
        std::iter::once(newest).chain(older)
    });
    let newest = all.next().unwrap_or_default();
    Versions::new(newest, all.collect())
}

/// What was asked for with the samples of one planned batch of an evaluation.
#[derive(Debug, Clone, Copy)]
pub struct Sampled<'a> {
    /// Who drew them, by its name in the store.
    pub method: &'a str,
    /// What was loaded to draw them ([`drawing_key`]).
    pub model: &'a str,
    /// Digest of the values of what was trained.
    pub adapter: &'a str,
    /// Training steps taken.
    pub step: usize,
    pub sampling: &'a Sampling,
    /// Digests of the references that samples are scored against.
    pub photos: &'a [String],
    pub images: &'a [EvaluationImage],
}

/// Keys of the samples of one planned batch: what drew them, and everything that it was asked.
pub fn sample_keys(sampled: &Sampled<'_>) -> Versions<Vec<String>> {
    SAMPLE.keys(|kind| {
        let digest = Digest::new(kind)
            .field("method", sampled.method)
            .field("model", sampled.model)
            .field("adapter", sampled.adapter)
            .number("step", sampled.step as u64);
        let digest = settings::sampling(digest, sampled.sampling)
            .list("photos", sampled.photos)
            .number("images", sampled.images.len() as u64);
        let digest = sampled.images.iter().fold(digest, |digest, image| {
            digest
                .field("prompt", &image.prompt)
                .number("seed", image.seed)
        });
        places(&digest, sampled.images.len())
    })
}

/// `digest` with each of `count` places.
fn places(digest: &Digest, count: usize) -> Vec<String> {
    (0..count as u64)
        .map(|place| digest.clone().number("place", place).finish())
        .collect()
}

/// Key of the tokens of proxies of `drawn` pixels a side for a tokenizer that reads `learnt`. Where the two are equal it is
/// `tokenizer`, the digest of its files ([`checkpoint_digest`]); else proxies are resized on their way, and tokens of what
/// was resized in another way are others.
pub fn tokens_key(tokenizer: &str, drawn: u32, learnt: u32) -> String {
    if drawn == learnt {
        return tokenizer.to_string();
    }
    Digest::new("resized tokens 1")
        .field("tokenizer", tokenizer)
        .number("drawn", drawn.into())
        .number("learnt", learnt.into())
        .field("filter", "Lanczos")
        .finish()
}

/// Key of what decides, beside an adapter, what a backbone draws: the checkpoint ([`checkpoint_digest`]), the side
/// length in pixels (`None`: the checkpoint's own), the type of the weights and the kind of device, "cpu" or "cuda".
pub fn drawing_key(base: &str, resolution: Option<u32>, dtype: Dtype, device: &str) -> String {
    let digest = Digest::new("drawing 1").field("base", base);
    let digest = settings::resolution(digest, resolution.map(u64::from));
    settings::dtype(digest, dtype)
        .field("device", device)
        .finish()
}

/// Key of a pair of evaluators, from the folders of their checkpoints: scores and embeddings of one key can be compared.
///
/// # Errors
/// Those of [`checkpoint_digest`].
pub fn evaluators_key(clip: &Path, dino: &Path) -> Result<String> {
    Ok(Digest::new("evaluators 1")
        .field("clip", checkpoint_digest(clip)?)
        .field("dino", checkpoint_digest(dino)?)
        .finish())
}

/// Key of a reference image, from its subject's name and the digest of its bytes.
pub fn reference_key(subject: &str, photo: &str) -> String {
    Digest::new("reference 1")
        .field("subject", subject)
        .field("photo", photo)
        .finish()
}

/// Key of a student: a checkpoint of another one is not continued. `plan` is the plan's digest, `base` that of the
/// student's checkpoint, `photos` are those of all subjects, `supervisors` the newest key of each, none without proxies.
pub fn student_key(plan: &str, base: &str, photos: &[String], supervisors: &[&String]) -> String {
    Digest::new("student 1")
        .field("plan", plan)
        .field("base", base)
        .list("photos", photos)
        .list("supervisors", supervisors)
        .finish()
}

/// Digest of every setting that affects the result of a run.
pub fn settings_digest(resolved: &Resolved) -> String {
    settings::pipeline(Digest::new("settings 1"), resolved).finish()
}

/// Digest of a plan with the settings that affect the result. `subjects` have their numbers of photos.
pub(in crate::plan) fn plan_digest(
    resolved: &Resolved,
    subjects: &[(String, usize)],
    proxies: &[Proxy],
    student: &Schedule,
    evaluation: &EvaluationPlan,
) -> String {
    let digest = settings::pipeline(Digest::new("plan 1"), resolved);
    let digest = subjects.iter().fold(digest, |digest, (name, photos)| {
        digest
            .field("subject", name)
            .number("photos", *photos as u64)
    });
    let digest = digest.number("proxies", proxies.len() as u64);
    let digest = proxies.iter().fold(digest, |digest, proxy| {
        digest
            .number("subject", proxy.subject as u64)
            .field("prompt", &proxy.prompt)
            .number("seed", proxy.seed)
    });
    let uses: Vec<u8> = student
        .items()
        .iter()
        .flat_map(|item| (*item as u64).to_le_bytes())
        .collect();
    let digest = digest
        .field("uses", uses)
        .number("evaluation images", evaluation.images.len() as u64);
    let digest = evaluation.images.iter().fold(digest, |digest, image| {
        digest
            .field("prompt", &image.prompt)
            .number("seed", image.seed)
    });
    digest.finish()
}
