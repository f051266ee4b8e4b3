//! Idea 2: time does not change the result. The plan says what happens in which order, and is made from the resolved
//! file and the number of usable photos before anything starts: which proxy has which subject, prompt and seed, which
//! are made together, and which each training step uses. Nothing here reads a clock or a store.

mod key;
mod schedule;

use std::collections::BTreeSet;
use std::ops::Range;

pub use key::{
    Digest, Sampled, Versions, captioned_photos_digest, checkpoint_digest, drawing_key,
    evaluators_key, photos_digest, proxy_keys, reference_key, sample_keys, settings_digest,
    source_key, student_key, supervisor_keys, tokens_key,
};
pub use schedule::Schedule;

use crate::config::{Resolved, Source, Subject, prompts};
use crate::{Error, Result};

/// Everything that a run will do.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    proxies: Vec<Proxy>,
    batches: Vec<Batch>,
    references: Vec<Reference>,
    student: Schedule,
    student_seed: u64,
    growth: Growth,
    supervisors: Vec<SupervisorPlan>,
    direct: Option<Schedule>,
    evaluation: EvaluationPlan,
    digest: String,
}

/// One image that a supervisor will make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// From 0, over all subjects, in the order in which they are made.
    pub number: usize,
    /// The subject's position in the file.
    pub subject: usize,
    /// From 0, within the subject. Prompt and seed depend on it, so that more proxies leave the first ones as they are.
    pub index: usize,
    /// The batch it is made in.
    pub batch: usize,
    pub prompt: String,
    pub seed: u64,
}

/// Proxies of one subject that are generated, tokenized and scored together, always whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// From 0, over all subjects, in the order in which they are made.
    pub number: usize,
    /// The subject's position in the file.
    pub subject: usize,
    /// The numbers of its proxies.
    pub numbers: Range<usize>,
}

/// A photo of a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    /// The subject's position in the file.
    pub subject: usize,
    /// The photo's position among the subject's usable ones.
    pub index: usize,
}

/// What the supervisor of one subject learns from at each step.
#[derive(Debug, Clone, PartialEq)]
pub struct SupervisorPlan {
    /// Positions of the subject's photos.
    pub references: Schedule,
    /// Positions of class images, as many per step as photos; `None` without prior preservation.
    pub class_images: Option<Schedule>,
    /// One seed per class image; empty without prior preservation.
    pub class_seeds: Vec<u64>,
}

/// The images that are drawn and scored for every evaluated checkpoint: the same prompts and seeds for every method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvaluationPlan {
    /// By subject, then prompt, then repetition.
    pub images: Vec<EvaluationImage>,
    /// Positions in `images` that are drawn together; one subject each.
    pub batches: Vec<Range<usize>>,
}

/// One image of the evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvaluationImage {
    /// The subject's position in the file.
    pub subject: usize,
    /// The prompt's position in the list, from 0.
    pub prompt_index: usize,
    /// The repetition, from 0.
    pub image_index: usize,
    /// What is drawn, with the subject's token.
    pub prompt: String,
    /// What CLIP-T compares with: the prompt without the token.
    pub text: String,
    pub seed: u64,
}

/// How the number of batches that training may use grows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Growth {
    /// Steps over which it grows; 0: all from the start.
    steps: usize,
    /// For each batch, how many proxies that the student learns there are with it and all before it; at least one.
    ends: Vec<usize>,
}

impl Growth {
    /// How many batches step `step` may use, at least 1 where there are any: as many whole ones as fit into n, which
    /// grows linearly from the first batch to all.
    fn batches(&self, step: usize) -> usize {
        let (Some(first), Some(all)) = (self.ends.first(), self.ends.last()) else {
            return 0;
        };
        if step >= self.steps {
            return self.ends.len();
        }
        // wide, as step times proxies may be large
        let grown = (all - first) as u128 * step as u128 / self.steps as u128;
        let available = *first as u128 + grown;
        self.ends.partition_point(|end| *end as u128 <= available)
    }
}

impl Plan {
    /// Plans the run of `resolved`; `subjects` gives each subject's name with the number of its usable photos, in the
    /// order of the file.
    ///
    /// # Errors
    /// When `subjects` does not fit `resolved`, or a subject has no photo.
    pub fn new(resolved: &Resolved, subjects: &[(String, usize)]) -> Result<Self> {
        let names = resolved.subjects.iter().map(|subject| &subject.name);
        if !names.eq(subjects.iter().map(|(name, _)| name)) {
            return Err(Error::invalid(
                "the photos are not those of the subjects of the pipeline",
                "give one entry per subject, in the order of the file",
            ));
        }
        if let Some((name, _)) = subjects.iter().find(|(_, photos)| *photos == 0) {
            return Err(Error::invalid(
                format!("subject {name} has no usable photo"),
                "place 3 to 6 photos of it in its folder, as JPEG, PNG or WebP",
            ));
        }
        let seed = resolved.seed;
        let references: Vec<Reference> = subjects
            .iter()
            .enumerate()
            .flat_map(|(subject, (_, photos))| {
                (0..*photos).map(move |index| Reference { subject, index })
            })
            .collect();
        let student_seed = match &resolved.student.init_digest {
            Some(digest) => derive_seed(seed, &format!("student from {digest}"), 0),
            None => seed,
        };
        let (proxies, batches, learnt) = plan_proxies(resolved, student_seed);
        let training = &resolved.student.training;
        let growth = Growth {
            // 0 ≤ overlap ≤ 1, so this is at most `steps`
            steps: (resolved.student.overlap * training.steps as f64).ceil() as usize,
            ends: batches
                .iter()
                .map(|batch| learnt.partition_point(|number| *number < batch.numbers.end))
                .collect(),
        };
        let student = match resolved.student.source {
            Source::Proxies | Source::Custom => {
                let seeds: Vec<u64> = learnt.iter().map(|number| proxies[*number].seed).collect();
                let available = |step| growth.ends[growth.batches(step) - 1]; // proxies imply a first batch
                let (steps, batch_size) = (training.steps, training.examples_per_step());
                Schedule::least_used(steps, batch_size, &seeds, student_seed, available).of(&learnt)
            }
            Source::References | Source::Augmented => Schedule::epochs(
                training.steps,
                training.examples_per_step(),
                references.len(),
                student_seed,
                "student",
            ),
        };
        let supervisors = subjects
            .iter()
            .filter_map(|(name, photos)| {
                Some(plan_supervisor(
                    resolved.supervisor.as_ref()?,
                    name,
                    *photos,
                    seed,
                ))
            })
            .collect();
        let direct = resolved.direct().map(|direct| {
            let training = &direct.training;
            Schedule::epochs(
                training.steps,
                training.examples_per_step(),
                references.len(),
                seed,
                "direct",
            )
        });
        let evaluation = plan_evaluation(resolved);
        let digest = key::plan_digest(resolved, subjects, &proxies, &student, &evaluation);
        Ok(Plan {
            proxies,
            batches,
            references,
            student,
            student_seed,
            growth,
            supervisors,
            direct,
            evaluation,
            digest,
        })
    }

    /// All proxies by number; empty when the student does not learn from proxies.
    pub fn proxies(&self) -> &[Proxy] {
        &self.proxies
    }

    /// Proxy `number`, which must be planned.
    pub fn proxy(&self, number: usize) -> &Proxy {
        &self.proxies[number]
    }

    /// How many batches of proxies are planned.
    pub fn batches(&self) -> usize {
        self.batches.len()
    }

    /// Batch `number`, which must be planned.
    pub fn batch(&self, number: usize) -> &Batch {
        &self.batches[number]
    }

    /// How many batches, from the first, must be committed before the student's step `step` (from 0) can be taken.
    pub fn needs(&self, step: usize) -> usize {
        self.growth.batches(step)
    }

    /// What the student's step `step` (from 0) learns from: numbers of proxies or, when it learns from references,
    /// positions in [`Plan::references`]. The step must be planned.
    pub fn examples(&self, step: usize) -> &[usize] {
        self.student.batch(step)
    }

    /// Where the student's randomness comes from: the run's seed, and the digest of the adapter that it starts from.
    pub fn student_seed(&self) -> u64 {
        self.student_seed
    }

    /// The photos of all subjects, in the order of the file.
    pub fn references(&self) -> &[Reference] {
        &self.references
    }

    /// What the supervisor of the subject at position `subject` learns from; `None` without proxies.
    pub fn supervisor(&self, subject: usize) -> Option<&SupervisorPlan> {
        self.supervisors.get(subject)
    }

    /// Positions in [`Plan::references`] that each step of the direct baseline uses; `None` when it is disabled.
    pub fn direct(&self) -> Option<&Schedule> {
        self.direct.as_ref()
    }

    /// What is drawn for every evaluated checkpoint.
    pub fn evaluation(&self) -> &EvaluationPlan {
        &self.evaluation
    }

    /// Hex digest of everything planned and of every setting that affects the result. The photos' content is not in
    /// it, only their number.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

/// A seed that depends on `seed`, `name` and `index` alone.
pub fn derive_seed(seed: u64, name: &str, index: usize) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(&(name.len() as u64).to_le_bytes());
    hasher.update(name.as_bytes());
    hasher.update(&(index as u64).to_le_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// The seed of everything random in step `step` of the stage called `stage`.
pub fn step_seed(seed: u64, stage: &str, step: usize) -> u64 {
    derive_seed(seed, &format!("step/{stage}"), step)
}

/// Batches of the subjects take turns, so that early training sees every subject. Returns, beside proxies and batches,
/// the numbers of the proxies that the student learns: all, or of a subject that is replayed some, with the batches
/// that they are made in alone.
fn plan_proxies(resolved: &Resolved, student_seed: u64) -> (Vec<Proxy>, Vec<Batch>, Vec<usize>) {
    let (mut planned, mut batches, mut learnt) = (Vec::new(), Vec::new(), Vec::new());
    let Some(proxies) = &resolved.proxies else {
        return (planned, batches, learnt);
    };
    let replayed: Vec<Option<BTreeSet<usize>>> = resolved
        .subjects
        .iter()
        .map(|subject| replayed(subject, proxies.count, student_seed))
        .collect();
    for first in (0..proxies.count).step_by(proxies.batch_size) {
        let indices = first..proxies.count.min(first + proxies.batch_size);
        for (
            subject,
            Subject {
                name, class, token, ..
            },
        ) in resolved.subjects.iter().enumerate()
        {
            let start = planned.len();
            let is_learnt = |index: &usize| {
                let replayed = replayed[subject].as_ref();
                replayed.is_none_or(|replayed| replayed.contains(index))
            };
            let before = learnt.len();
            learnt.extend(
                indices
                    .clone()
                    .filter(is_learnt)
                    .map(|index| start + index - first),
            );
            if learnt.len() == before {
                continue;
            }
            planned.extend(indices.clone().map(|index| Proxy {
                number: start + index - first,
                subject,
                index,
                batch: batches.len(),
                prompt: prompts::fill(
                    &proxies.prompts[index % proxies.prompts.len()],
                    token,
                    class,
                ),
                seed: derive_seed(resolved.seed, &format!("proxy/{name}"), index),
            }));
            batches.push(Batch {
                number: batches.len(),
                subject,
                numbers: start..planned.len(),
            });
        }
    }
    (planned, batches, learnt)
}

/// Which of a subject's `count` proxies are replayed; `None`: it is not replayed but learnt whole.
fn replayed(subject: &Subject, count: usize, student_seed: u64) -> Option<BTreeSet<usize>> {
    let name = format!("replay/{}", subject.name);
    let mut indices: Vec<usize> = (0..count).collect();
    indices.sort_by_key(|index| (derive_seed(student_seed, &name, *index), *index));
    Some(indices.into_iter().take(subject.replay?).collect())
}

fn plan_supervisor(
    supervisor: &crate::config::Supervisor,
    name: &str,
    photos: usize,
    seed: u64,
) -> SupervisorPlan {
    let training = &supervisor.training;
    let schedule = |items, what: &str| {
        Schedule::epochs(
            training.steps,
            training.examples_per_step(),
            items,
            seed,
            &format!("{what}/{name}"),
        )
    };
    let prior = supervisor.prior_preservation.as_ref();
    let class_images = prior.map_or(0, |prior| prior.class_images);
    SupervisorPlan {
        references: schedule(photos, "supervisor"),
        class_images: prior.map(|prior| schedule(prior.class_images, "class images")),
        class_seeds: (0..class_images)
            .map(|index| derive_seed(seed, &format!("class image/{name}"), index))
            .collect(),
    }
}

fn plan_evaluation(resolved: &Resolved) -> EvaluationPlan {
    let evaluation = &resolved.evaluation;
    let (mut images, mut batches) = (Vec::new(), Vec::new());
    for (
        subject,
        Subject {
            name, class, token, ..
        },
    ) in resolved.subjects.iter().enumerate()
    {
        let start = images.len();
        for (prompt_index, template) in evaluation.prompts.templates(class).iter().enumerate() {
            images.extend(
                (0..evaluation.images_per_prompt).map(|image_index| EvaluationImage {
                    subject,
                    prompt_index,
                    image_index,
                    prompt: prompts::fill(template, token, class),
                    text: prompts::fill_without_token(template, class),
                    seed: derive_seed(
                        resolved.seed,
                        &format!("evaluation/{name}/{template}"),
                        image_index,
                    ),
                }),
            );
        }
        let end = images.len();
        let firsts = (start..end).step_by(evaluation.batch_size);
        batches.extend(firsts.map(|first| first..end.min(first + evaluation.batch_size)));
    }
    EvaluationPlan { images, batches }
}
