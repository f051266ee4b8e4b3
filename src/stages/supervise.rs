//! supervise: a diffusion model learns each subject from its photos (DreamBooth with LoRA, Ruiz et al. 2023). An
//! adapter that the store has for the very same photos, checkpoint and settings is not trained again.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_stream::try_stream;
use candle_core::DType;
use futures::{Stream, StreamExt};

use super::class_images::{ClassImages, Drawing};
use super::references::photo_examples;
use super::session::{SessionSettings, TrainingSession};
use super::{LazyLearner, Log, OpenLearner, Subject, Subjects, Supervisor};
use crate::config::{self, DiffusionSampling, prompts};
use crate::models::adapters::DIFFUSERS_WEIGHTS;
use crate::models::lora_write::{Layout, Written};
use crate::models::{Example, TrainingExample, sampling_file};
use crate::nn::Factors;
use crate::plan::{Plan, Versions};
use crate::store::{Claim, MetricStage, Store};
use crate::training::{Checkpoints, Trainer};
use crate::{Error, Result, files};

/// What the stage needs.
pub struct Supervise {
    pub plan: Arc<Plan>,
    pub subjects: Subjects,
    pub settings: config::Supervisor,
    /// How supervisors sample.
    pub sampling: DiffusionSampling,
    /// The key of each subject's supervisor.
    pub keys: Vec<String>,
    /// Opens the model for training.
    pub open: OpenLearner,
    /// Draws class images.
    pub sampler: LazyLearner,
    /// The adapter that is the supervisor of every subject, by layer; `None` where supervisors are trained.
    pub given: Option<Arc<BTreeMap<String, Factors>>>,
    pub store: Arc<Store>,
    /// The run's directory.
    pub dir: PathBuf,
    /// The run's.
    pub seed: u64,
    pub log: Log,
}

/// Where the store keeps the adapter of the supervisor `key`.
fn adapter_dir(store: &Store, key: &str) -> PathBuf {
    store.path().join("adapters").join(key)
}

/// Under which of its keys the store at `store` has a supervisor, published or begun; the newest where it has none.
pub fn key_in<'a>(store: &Path, keys: &'a Versions<String>) -> &'a String {
    let is_in = |folder: &str, key: &String| store.join(folder).join(key).is_dir();
    match keys.all().any(|key| is_in("adapters", key)) {
        true => keys.found(|key| is_in("adapters", key)),
        false => keys.found(|key| is_in("training", key)),
    }
}

/// Where it stands with a supervisor, when looked at.
enum Turn {
    /// It is in the store.
    Published,
    /// This process trains it, and nobody else while this lives.
    Ours(Claim),
    /// Another process trains it.
    Theirs,
}

/// Between two looks at supervisors that other processes train.
const LOOK: Duration = Duration::from_millis(200);

impl Supervise {
    /// Trains a supervisor for each subject of `input` and yields it when its adapter is published. Processes that need
    /// the same one train it once: a subject that another has in hand is put off, and waited for when nothing else is
    /// left. Should the other be killed, its checkpoints are in the store and the next one goes on.
    pub fn run(
        self,
        input: impl Stream<Item = usize> + Send,
    ) -> impl Stream<Item = Result<Supervisor>> + Send {
        try_stream! {
            let Log { meter, stop, .. } = &self.log;
            clear_leftovers(&self.store)?;
            let mut input = std::pin::pin!(input);
            let mut put_off = VecDeque::new();
            let mut ended = false;
            loop {
                let next = match ended {
                    false => input.next().await,
                    true => put_off.pop_front(),
                };
                let Some(subject) = next else {
                    if ended {
                        break;
                    }
                    ended = true;
                    continue;
                };
                let (key, name) = (&self.keys[subject], &self.subjects[subject].name);
                match turn(&self.store, key)? {
                    Turn::Theirs => {
                        put_off.push_back(subject);
                        if ended {
                            meter.say(format!("another process trains the supervisor of {name}"));
                            tokio::select! {
                                () = tokio::time::sleep(LOOK) => {}
                                () = stop.wait() => return,
                            }
                        }
                        continue;
                    }
                    Turn::Published => meter.reuse(self.settings.steps()),
                    Turn::Ours(claim) => {
                        let learnt = match &self.given {
                            Some(layers) => self.publish_given(layers, key).map(|()| true)?,
                            None => self.learn(subject).await?,
                        };
                        drop(claim);
                        if !learnt {
                            return;
                        }
                    }
                }
                let adapter = adapter_dir(&self.store, key);
                let own = self.dir.join("supervisor").join(name);
                files::copy_dir(&adapter, &own)?;
                // The run that trained it may have drawn otherwise.
                sampling_file::write(&own, &self.noted_sampling())?;
                yield Supervisor { subject, key: key.clone(), adapter };
            }
        }
    }

    fn noted_sampling(&self) -> config::Sampling {
        config::Sampling::Diffusion(self.sampling.clone())
    }

    /// Puts the given adapter into the store as the supervisor `key`, as one that was trained here: in diffusers' layout.
    fn publish_given(&self, layers: &BTreeMap<String, Factors>, key: &str) -> Result<()> {
        let written = Written {
            layers,
            family: self.settings.family,
            base: Some(&self.settings.model),
            dtype: DType::F32,
        };
        files::write_dir(&adapter_dir(&self.store, key), |aside| {
            written.write(Layout::Diffusers, &aside.join(DIFFUSERS_WEIGHTS))?;
            sampling_file::write(aside, &self.noted_sampling())
        })
    }

    /// Trains the supervisor of a subject and publishes it in the store; false if the run was asked to stop before.
    async fn learn(&self, subject: usize) -> Result<bool> {
        let key = &self.keys[subject];
        let place = self.store.path().join("training").join(key);
        if place.is_dir() {
            files::remove_leftovers(&place)?;
        }
        let settings = SessionSettings {
            log: self.log.clone(),
            stage: MetricStage::Supervise(self.subjects[subject].name.clone()),
            owner: key.clone(),
            training: self.settings.training.clone(),
            checkpoints: Checkpoints::new(&place, format!("supervisor {key}")),
            seed: self.seed,
            sampling: self.noted_sampling(),
            evaluated: None,
        };
        let session = TrainingSession::start(&self.open, settings).await?;
        let learnt = self.train(&session, subject).await?;
        if learnt {
            session
                .publish(adapter_dir(&self.store, key), false)
                .await?;
            std::fs::remove_dir_all(&place).map_err(Error::io(&place))?;
        }
        Ok(learnt)
    }

    /// Takes all steps; false if the run was asked to stop before.
    async fn train(&self, session: &TrainingSession, subject: usize) -> Result<bool> {
        let planned = self
            .plan
            .supervisor(subject)
            .ok_or_else(|| Error::Invalid {
                what: "a supervisor that is not planned".into(),
                hint: None,
            })?;
        let steps = self.settings.training.steps;
        let subject = &self.subjects[subject];
        let photos = self.photos(session, subject).await?;
        let prompt = prompts::fill(&self.settings.prompt, &subject.token, &subject.class);
        self.foresee(session, subject, &prompt).await?;
        // Before a checkpoint is restored.
        let untouched = match self.settings.prior_preservation {
            Some(_) => Some(session.snapshot().await?),
            None => None,
        };
        let mut step = session.resume().await?;
        let prior = self.settings.prior_preservation.as_ref();
        let mut class = match (prior, &planned.class_images, untouched) {
            (Some(prior), Some(schedule), Some(untouched)) => {
                let drawing = Drawing {
                    sampler: self.sampler.clone(),
                    untouched,
                    prompt: prompts::fill_without_token(&prior.prompt, &subject.class),
                    seeds: planned.class_seeds.clone(),
                    sampling: self.noted_sampling(),
                    batch_size: self.settings.training.batch_size,
                    meter: self.log.meter.clone(),
                };
                Some((prior.weight, ClassImages::start(drawing, schedule, step)))
            }
            _ => None,
        };
        while step < steps && !self.log.stop.requested() {
            let pair = |&photo: &usize| TrainingExample {
                example: photos[photo].clone(),
                prompt: subject.captions[photo].as_ref().unwrap_or(&prompt).clone(),
            };
            let learnt = planned.references.batch(step).iter().map(pair);
            let mut batches = vec![(1.0, learnt.collect())];
            if let Some((weight, images)) = &mut class {
                batches.push((*weight, images.batch(session, step).await?));
            }
            session.step(step, batches).await?;
            step += 1;
        }
        if step < steps {
            session.save(step).await?;
        }
        Ok(step >= steps)
    }

    /// The photos of `subject` as the model learns them.
    async fn photos(
        &self,
        session: &TrainingSession,
        subject: &Arc<Subject>,
    ) -> Result<Vec<Example>> {
        let (subject, settings, seed) = (subject.clone(), self.settings.clone(), self.seed);
        let learn = move |trainer: &mut Trainer| {
            photo_examples(trainer.learner(), &subject, &settings, seed)
        };
        session.call(learn).await
    }

    /// Tells the model every prompt that is to come: `prompt`, that of `subject`, among them.
    async fn foresee(
        &self,
        session: &TrainingSession,
        subject: &Subject,
        prompt: &str,
    ) -> Result<()> {
        let negative = self.sampling.negative_prompt.clone();
        let mut foreseen = vec![prompt.to_string(), String::new(), negative];
        foreseen.extend(subject.captions.iter().flatten().cloned());
        let prior = self.settings.prior_preservation.iter();
        let class = |prior: &config::PriorPreservation| {
            prompts::fill_without_token(&prior.prompt, &subject.class)
        };
        foreseen.extend(prior.map(class));
        session
            .call(move |trainer| trainer.learner().foresee(&foreseen))
            .await
    }
}

fn claim_of(key: &str) -> String {
    format!("supervisors/{key}")
}

/// Looks where it stands with the supervisor `key`, and claims it if nobody has.
fn turn(store: &Store, key: &str) -> Result<Turn> {
    let adapter = adapter_dir(store, key);
    if adapter.is_dir() {
        return Ok(Turn::Published);
    }
    let Some(claim) = store.locks().try_claim(&claim_of(key))? else {
        return Ok(Turn::Theirs);
    };
    // Whoever had the claim may have published meanwhile. A network disk shows that when the folder around it is
    // read again.
    if let Some(around) = adapter.parent() {
        files::create_dir(around)?;
        std::fs::read_dir(around).map_err(Error::io(around))?.next();
    }
    Ok(match adapter.is_dir() {
        true => Turn::Published,
        false => Turn::Ours(claim),
    })
}

/// Removes what processes left that were killed while they published a supervisor, or just after.
fn clear_leftovers(store: &Store) -> Result<()> {
    // Who is publishing holds the claim, so what cannot be claimed is left alone.
    let clear = |key: &str, path: &Path| {
        let claim = store.locks().try_claim(&claim_of(key))?;
        match claim.is_some() && path.is_dir() {
            true => std::fs::remove_dir_all(path).map_err(Error::io(path)),
            false => Ok(()),
        }
    };
    for (name, path) in files::list(&store.path().join("adapters"))? {
        if let Some(key) = files::written_aside(&name) {
            clear(key, &path)?;
        }
    }
    for (key, path) in files::list(&store.path().join("training"))? {
        if adapter_dir(store, &key).is_dir() {
            clear(&key, &path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use candle_core::{Device, Tensor};
    use futures::stream;

    use super::super::fakes::{Fakes, all, next};
    use super::*;

    async fn stage(fakes: &Fakes) -> Supervise {
        Supervise {
            plan: fakes.plan.clone(),
            subjects: fakes.subjects.clone(),
            settings: fakes.resolved.supervisor.clone().unwrap(),
            sampling: fakes.keys().sampling.unwrap(),
            keys: vec!["key0".into(), "key1".into()],
            open: fakes.learner(),
            sampler: fakes.sampler(),
            given: None,
            store: fakes.store.clone(),
            dir: fakes.dir.path().to_path_buf(),
            seed: fakes.resolved.seed,
            log: fakes.log("supervise").await,
        }
    }

    fn order(supervisors: &[Supervisor]) -> Vec<(usize, &str)> {
        let told = supervisors.iter().map(|s| (s.subject, s.key.as_str()));
        told.collect()
    }

    #[tokio::test]
    async fn each_subject_is_learnt_once_in_order_and_found_by_the_next_run() {
        let fakes = Fakes::new(&[]).await;
        let learnt = all(stage(&fakes).await.run(stream::iter([0, 1])))
            .await
            .unwrap();
        assert_eq!(order(&learnt), [(0, "key0"), (1, "key1")]);
        // Four steps for each of two subjects, each on two photos.
        assert_eq!(fakes.work.losses.load(SeqCst), 8);
        let prompts = fakes.work.learnt.lock().unwrap().clone();
        assert_eq!((prompts.len(), prompts[8].as_str()), (16, "a ohw cat"));
        for (supervisor, name) in learnt.iter().zip(["dog1", "cat1"]) {
            assert!(supervisor.adapter.starts_with(fakes.store.path()));
            assert!(fakes.dir.path().join("supervisor").join(name).is_dir());
        }
        assert!(!fakes.store.path().join("training/key0").exists());
        let again = fakes.again(&[]);
        let found = all(stage(&again).await.run(stream::iter([1, 0])))
            .await
            .unwrap();
        assert_eq!(order(&found), [(1, "key1"), (0, "key0")]);
        assert_eq!(again.work.of_learners(), [0; 4]);
    }

    #[tokio::test]
    async fn an_adapter_that_is_given_is_put_into_the_store_and_nothing_is_trained() {
        let fakes = Fakes::new(&[]).await;
        let factor = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        let layer = "transformer_blocks.0.attn.to_q";
        let factors = Factors {
            a: factor(&[2, 4]),
            b: factor(&[4, 2]),
            scale: 1.0,
        };
        let mut stage = stage(&fakes).await;
        stage.given = Some(Arc::new([(layer.to_string(), factors)].into()));
        let ready = all(stage.run(stream::iter([0, 1]))).await.unwrap();
        assert_eq!(order(&ready), [(0, "key0"), (1, "key1")]);
        assert_eq!(fakes.work.of_learners(), [0; 4]);
        for supervisor in ready {
            let file = crate::models::lora_file::LoraFile::read(&supervisor.adapter).unwrap();
            assert_eq!(file.layers.keys().collect::<Vec<_>>(), [layer]);
        }
    }

    #[tokio::test]
    async fn a_photo_is_learnt_by_its_own_caption() {
        let mut fakes = Fakes::new(&[]).await;
        let subject = Subject {
            captions: vec![None, Some("sks dog in a car".into()), None],
            ..Subject::clone(&fakes.subjects[0])
        };
        fakes.subjects = Arc::new(vec![Arc::new(subject), fakes.subjects[1].clone()]);
        all(stage(&fakes).await.run(stream::iter([0])))
            .await
            .unwrap();
        let planned = &fakes.plan.supervisor(0).unwrap().references;
        let caption = |&photo: &usize| match photo {
            1 => "sks dog in a car",
            _ => "a sks dog",
        };
        let expected: Vec<&str> = planned.items().iter().map(caption).collect();
        assert_eq!(*fakes.work.learnt.lock().unwrap(), expected);
    }

    #[tokio::test]
    async fn what_another_process_trains_is_put_off_and_taken_when_it_lets_go() {
        let fakes = Fakes::new(&[]).await;
        let theirs = fakes.store.locks().try_claim("supervisors/key0").unwrap();
        assert!(theirs.is_some());
        let stage = stage(&fakes).await.run(stream::iter([0, 1]));
        let mut stage = std::pin::pin!(stage);
        assert_eq!(next(&mut stage).await.unwrap().unwrap().subject, 1);
        // The other is killed before it has published anything.
        drop(theirs);
        assert_eq!(next(&mut stage).await.unwrap().unwrap().subject, 0);
        assert!(next(&mut stage).await.is_none());
    }

    #[tokio::test]
    async fn a_stopped_supervisor_is_gone_on_with_from_its_checkpoint() {
        let fakes = Fakes::new(&["supervisor.checkpoint_every=1"]).await;
        // The curve is committed, and a checkpoint written, at the first step: there it is stopped.
        let (work, stopping) = (fakes.work.clone(), fakes.stop.clone());
        let watch = tokio::spawn(async move {
            while work.losses.load(SeqCst) < 2 {
                tokio::task::yield_now().await;
            }
            stopping.request();
        });
        let first = stage(&fakes).await;
        assert!(
            all(first.run(stream::iter([0, 1])))
                .await
                .unwrap()
                .is_empty()
        );
        watch.await.unwrap();
        let taken = fakes.work.losses.load(SeqCst);
        assert!((2..4).contains(&taken), "{taken}");
        let again = fakes.again(&["supervisor.checkpoint_every=1"]);
        let learnt = all(stage(&again).await.run(stream::iter([0])))
            .await
            .unwrap();
        assert_eq!(learnt.len(), 1);
        assert_eq!(again.work.losses.load(SeqCst), 4 - taken);
    }

    #[tokio::test]
    async fn class_images_are_drawn_by_the_model_as_it_was_and_a_failure_comes_out() {
        let prior = ["supervisor.prior_preservation.class_images=4"];
        let fakes = Fakes::new(&prior).await;
        all(stage(&fakes).await.run(stream::iter([1])))
            .await
            .unwrap();
        assert_eq!(fakes.work.drawn.load(SeqCst), 4);
        let learnt = fakes.work.learnt.lock().unwrap().clone();
        let class = learnt.iter().filter(|prompt| *prompt == "a cat").count();
        assert_eq!((class, learnt.len()), (8, 16));
        let broken = Fakes::new(&prior).await;
        broken.work.fails_after.store(1, SeqCst);
        let error = all(stage(&broken).await.run(stream::iter([0])))
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "the model is broken");
        // Its claim is free for whoever tries next.
        assert!(
            broken
                .store
                .locks()
                .try_claim("supervisors/key0")
                .unwrap()
                .is_some()
        );
    }
}
