//! score: proxies are scored as they arrive, and the references' own embeddings kept beside them.

use std::sync::Arc;

use async_stream::try_stream;
use futures::{Stream, StreamExt};
use image::RgbImage;

use super::tokenize::pictures;
use super::{LazyEvaluator, Log, Method, ProxyBatch, Subjects};
use crate::Result;
use crate::config::prompts::{fill_without_token, without_token};
use crate::evaluation::embed::Embeddings;
use crate::evaluation::metrics::Scores;
use crate::plan::{Plan, reference_key};
use crate::store::{Columns, EvaluationRow, PictureKind, Store, Table, now_us};
use crate::stream::Meter;

/// Scores images of subjects against their references.
#[derive(Clone)]
pub struct Scorer {
    pub subjects: Subjects,
    pub store: Arc<Store>,
    pub evaluator: LazyEvaluator,
    /// The run's name in the store.
    pub run: String,
}

impl Scorer {
    /// The table of the evaluators.
    pub(super) async fn table(&self) -> Result<Table<EvaluationRow>> {
        super::evaluations(&self.store, &self.evaluator).await
    }

    /// The embeddings of a subject's references, from the store or made now.
    async fn references(&self, subject: usize, meter: &Meter) -> Result<Embeddings> {
        let table = self.table().await?;
        let subject = self.subjects[subject].clone();
        let key = |photo: &String| reference_key(&subject.name, photo);
        let keys: Vec<String> = subject.digests.iter().map(key).collect();
        let found = table.get(&keys, Columns::All).await?;
        let (mut clip, mut dino) = (Vec::new(), Vec::new());
        for row in found.into_iter().flatten() {
            clip.extend(row.clip_embedding);
            dino.extend(row.dino_embedding);
        }
        if clip.len() == keys.len() && dino.len() == keys.len() {
            return Ok(Embeddings { clip, dino });
        }
        let own = subject.clone();
        let evaluator = self.evaluator.get().await?;
        let made = evaluator
            .call(meter, move |evaluator| evaluator.embed(&own.images))
            .await?;
        let rows: Vec<EvaluationRow> = keys
            .iter()
            .zip(made.clip.iter().zip(&made.dino))
            .map(|(key, (clip, dino))| EvaluationRow {
                key: key.clone(),
                kind: PictureKind::Reference,
                run: self.run.clone(),
                method: None,
                step: 0,
                subject: subject.name.clone(),
                prompt: String::new(),
                seed: 0,
                clip_i: None,
                clip_t: None,
                dino: None,
                clip_embedding: Some(clip.clone()),
                dino_embedding: Some(dino.clone()),
                image: None,
                created_us: now_us(),
                adapter: None,
            })
            .collect();
        table.append(&rows).await?;
        Ok(made)
    }

    /// Embeds and scores `images` of one subject against its references; `texts` are their prompts without the token.
    pub(super) async fn score(
        &self,
        subject: usize,
        images: Arc<Vec<RgbImage>>,
        texts: Vec<String>,
        meter: &Meter,
    ) -> Result<(Embeddings, Vec<Scores>)> {
        let references = self.references(subject, meter).await?;
        let evaluator = self.evaluator.get().await?;
        evaluator
            .call(meter, move |evaluator| {
                let embeddings = evaluator.embed(&images)?;
                let scores = evaluator.score(&references, &embeddings, &texts)?;
                Ok((embeddings, scores))
            })
            .await
    }
}

/// What the stage needs.
pub struct ScoreProxies {
    pub plan: Arc<Plan>,
    /// The templates of the proxies' prompts, which are taken in turn.
    pub prompts: Vec<String>,
    pub scorer: Scorer,
    pub log: Log,
}

impl ScoreProxies {
    /// Scores each batch of `input`; yields how many proxies have scores.
    pub fn run(
        self,
        input: impl Stream<Item = ProxyBatch> + Send,
    ) -> impl Stream<Item = Result<usize>> + Send {
        try_stream! {
            let meter = &self.log.meter;
            let table = self.scorer.table().await?;
            let mut input = std::pin::pin!(input);
            while let Some(batch) = input.next().await {
                if self.log.stop.requested() {
                    // What is committed is scored by the run that goes on.
                    continue;
                }
                if table.missing(&batch.keys).is_empty() {
                    meter.reuse(batch.keys.len());
                    yield batch.keys.len();
                    continue;
                }
                let (images, prompts) = pictures(&self.scorer.store, &batch).await?;
                let subject = self.plan.batch(batch.batch).subject;
                let texts = self.texts(&batch, &prompts);
                let (embeddings, scores) = self.scorer.score(subject, images, texts, meter).await?;
                let rows = self.rows(&batch, &prompts, embeddings, &scores);
                meter.busy(table.append(&rows)).await?;
                meter.add(rows.len());
                yield rows.len();
            }
        }
    }

    /// What CLIP-T compares with: the prompts without the subject's token.
    fn texts(&self, batch: &ProxyBatch, prompts: &[String]) -> Vec<String> {
        let planned = self.plan.batch(batch.batch);
        let subject = &self.scorer.subjects[planned.subject];
        let members = &self.plan.proxies()[planned.numbers.clone()];
        let text = |(proxy, prompt): (&crate::plan::Proxy, &String)| match *prompt == proxy.prompt {
            true => fill_without_token(
                &self.prompts[proxy.index % self.prompts.len()],
                &subject.class,
            ),
            // A source's own.
            false => without_token(prompt, &subject.token),
        };
        members.iter().zip(prompts).map(text).collect()
    }

    fn rows(
        &self,
        batch: &ProxyBatch,
        prompts: &[String],
        embeddings: Embeddings,
        scores: &[Scores],
    ) -> Vec<EvaluationRow> {
        let planned = self.plan.batch(batch.batch);
        let subject = &self.scorer.subjects[planned.subject];
        let members = &self.plan.proxies()[planned.numbers.clone()];
        members
            .iter()
            .zip(prompts)
            .zip(&batch.keys)
            .zip(embeddings.clip.into_iter().zip(embeddings.dino))
            .zip(scores)
            .map(
                |((((proxy, prompt), key), (clip, dino)), scores)| EvaluationRow {
                    key: key.clone(),
                    kind: PictureKind::Proxy,
                    run: self.log.run.clone(),
                    method: Some(Method::Supervisor),
                    step: 0,
                    subject: subject.name.clone(),
                    prompt: prompt.clone(),
                    seed: proxy.seed,
                    clip_i: Some(scores.clip_i as f32),
                    clip_t: Some(scores.clip_t as f32),
                    dino: Some(scores.dino as f32),
                    clip_embedding: Some(clip),
                    dino_embedding: Some(dino),
                    image: None,
                    created_us: now_us(),
                    adapter: None,
                },
            )
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;

    use futures::stream;

    use super::super::Caption;
    use super::super::fakes::{Fakes, all, next};
    use super::*;

    async fn stage(fakes: &Fakes) -> ScoreProxies {
        ScoreProxies {
            plan: fakes.plan.clone(),
            prompts: fakes.resolved.proxies.as_ref().unwrap().prompts.clone(),
            scorer: fakes.scorer(),
            log: fakes.log("score").await,
        }
    }

    #[tokio::test]
    async fn proxies_are_scored_in_order_and_once_against_references_that_are_embedded_once() {
        let fakes = Fakes::new(&[]).await;
        let batches = fakes.kept().await;
        let scored = all(stage(&fakes).await.run(stream::iter(batches.clone()))).await;
        assert_eq!(scored.unwrap(), [4; 6]);
        // 24 proxies and 3 photos of each subject.
        assert_eq!(fakes.work.embedded.load(SeqCst), 30);
        let table = fakes.scorer().table().await.unwrap();
        let rows = table.get(&batches[1].keys, Columns::All).await.unwrap();
        let row = rows[2].clone().unwrap();
        let told = (row.kind, row.method, row.subject.as_str(), row.dino);
        let expected = (
            PictureKind::Proxy,
            Some(Method::Supervisor),
            "cat1",
            Some(0.25),
        );
        assert_eq!(told, expected);
        assert_eq!(row.clip_t, Some("a cat".len() as f32 / 1000.0));
        let again = fakes.again(&[]);
        let scored = all(stage(&again).await.run(stream::iter(batches))).await;
        assert_eq!(scored.unwrap(), [4; 6]);
        assert_eq!(again.work.embedded.load(SeqCst), 0);
    }

    #[tokio::test]
    async fn what_a_source_says_of_an_image_is_compared_with_it_without_the_token() {
        let fakes = Fakes::new(&[]).await;
        let token = &fakes.subjects[0].token;
        let caption = Caption {
            prompt: format!("a {token} dog that sleeps"),
            settings: "{}".into(),
        };
        let mut batch = fakes.batch(0);
        let made = batch.made.as_mut().unwrap();
        made.captions = Arc::new(vec![caption; 4]);
        all(stage(&fakes).await.run(stream::iter([batch.clone()])))
            .await
            .unwrap();
        let table = fakes.scorer().table().await.unwrap();
        let row = table
            .get(&batch.keys[..1], Columns::All)
            .await
            .unwrap()
            .remove(0)
            .unwrap();
        assert_eq!(row.clip_t, Some("a dog that sleeps".len() as f32 / 1000.0));
        assert_eq!(row.prompt, format!("a {token} dog that sleeps"));
    }

    #[tokio::test]
    async fn after_a_stop_nothing_more_is_scored_and_a_lost_proxy_ends_it() {
        let fakes = Fakes::new(&[]).await;
        let stage_of = stage(&fakes).await.run(stream::iter(fakes.batches()));
        let mut running = std::pin::pin!(stage_of);
        assert_eq!(next(&mut running).await.unwrap().unwrap(), 4);
        fakes.stop.request();
        assert!(next(&mut running).await.is_none());
        assert_eq!(fakes.work.embedded.load(SeqCst), 7);
        let again = fakes.again(&[]);
        let mut lost = again.batch(2);
        lost.made = None;
        let error = all(stage(&again).await.run(stream::iter([lost])))
            .await
            .unwrap_err();
        assert!(error.to_string().starts_with("keep: "), "{error}");
    }
}
