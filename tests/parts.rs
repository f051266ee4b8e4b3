//! Learners cut a batch into parts and compute equal pairs once: the nano models' losses and gradients are those of the
//! whole batch all the same.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use proxytune::config::{Dtype, Family, Memory};
use proxytune::models::sd3::{self, Sd3};
use proxytune::models::{Example, Learner, LearnerOptions, TrainingExample, Tuning, open};
use proxytune::nn::{Adapter, LoraConfig, backward};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn checkpoint(name: &str) -> PathBuf {
    root().join("datasets/nano/checkpoints").join(name)
}

fn lora(family: Family) -> LoraConfig {
    let defaults = family.training();
    LoraConfig {
        rank: 4,
        alpha: 4.0,
        targets: defaults.targets,
    }
}

fn learner(family: Family, dir: &Path) -> Box<dyn Learner> {
    let learner = open(&LearnerOptions {
        dir: dir.to_path_buf(),
        name: "nano".into(),
        family,
        resolution: None,
        tuning: Tuning::Lora(lora(family)),
        seed: 3,
        device: Device::Cpu,
        dtype: Dtype::F32,
        memory: Memory::Fast,
        dropout: 0.0,
        condition_dropout: 0.0,
    })
    .unwrap();
    disturb(&learner.variables());
    learner
}

/// An adapter starts without effect: B is zero, and with it the gradient of A.
fn disturb(variables: &[(String, Var)]) {
    let mut generator = ChaCha8Rng::seed_from_u64(11);
    for (_, v) in variables {
        let values: Vec<f32> = StandardNormal
            .sample_iter(&mut generator)
            .take(v.elem_count())
            .map(|x: f32| x * 0.05)
            .collect();
        v.set(&Tensor::from_vec(values, v.shape(), v.device()).unwrap())
            .unwrap();
    }
}

/// One example of each of four photos.
fn examples(learner: &mut dyn Learner) -> Vec<Example> {
    let photos: Vec<image::RgbImage> = ["dog1/00.png", "dog1/01.png", "toy1/00.png", "cat1/02.png"]
        .iter()
        .map(|photo| {
            let path = root().join("datasets/nano/subjects").join(photo);
            let side = learner.resolution();
            let photo = image::open(path).unwrap();
            photo
                .resize_exact(side, side, image::imageops::FilterType::Nearest)
                .to_rgb8()
        })
        .collect();
    learner.encode(&photos).unwrap()
}

/// The loss, and its gradients one after the other.
fn differentiate(loss: &Tensor, variables: &[(String, Var)]) -> (f32, Vec<f32>) {
    let gradients = backward(loss).unwrap();
    let of = |(_, v): &(String, Var)| {
        let gradient = gradients.get(v).unwrap();
        gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    (
        loss.to_scalar().unwrap(),
        variables.iter().flat_map(of).collect(),
    )
}

fn learnt(learner: &mut dyn Learner, batch: &[TrainingExample]) -> (f32, Vec<f32>) {
    let mut generator = ChaCha8Rng::seed_from_u64(1);
    let loss = learner.loss(batch, &mut generator).unwrap();
    differentiate(&loss, &learner.variables())
}

fn assert_close((loss, gradients): (f32, Vec<f32>), (wanted, all): (f32, Vec<f32>)) {
    assert!(
        (loss - wanted).abs() < 1e-5 * wanted.abs(),
        "{loss} and {wanted}"
    );
    let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let off: Vec<f32> = gradients.iter().zip(&all).map(|(a, b)| a - b).collect();
    assert!(norm(&all) > 0.0 && gradients.len() == all.len());
    assert!(
        norm(&off) < 1e-4 * norm(&all),
        "gradients off by {:e} of {:e}",
        norm(&off),
        norm(&all)
    );
}

/// Nine pairs, of which two pairs of photo and prompt occur twice and one three times.
#[test]
fn an_autoregressive_batch_is_the_mean_of_its_lessons() {
    for (family, dir) in [
        (proxytune::models::llamagen::FAMILY, "llamagen"),
        (proxytune::models::chameleon::FAMILY, "lumina"),
    ] {
        let mut learner = learner(family, &checkpoint(dir));
        let examples = examples(learner.as_mut());
        let batch: Vec<TrainingExample> = [
            (0, "a dog"),
            (1, "a dog in the snow"),
            (0, "a dog"),
            (2, "a toy"),
            (3, "a cat on a beach"),
            (0, "a dog in the snow"),
            (1, "a dog in the snow"),
            (0, "a dog"),
            (2, "a toy"),
        ]
        .into_iter()
        .map(|(i, prompt)| TrainingExample {
            example: examples[i].clone(),
            prompt: prompt.into(),
        })
        .collect();
        let whole = learnt(learner.as_mut(), &batch);
        let (mut loss, mut gradients) = (0.0, vec![0.0; whole.1.len()]);
        for pair in &batch {
            let one = learnt(learner.as_mut(), std::slice::from_ref(pair));
            loss += one.0 / batch.len() as f32;
            for (sum, g) in gradients.iter_mut().zip(one.1) {
                *sum += g / batch.len() as f32;
            }
        }
        assert_close(whole, (loss, gradients));
    }
}

/// The model's own loss takes the whole batch at once.
#[test]
fn a_diffusion_batch_in_parts_has_the_draws_and_the_loss_of_the_whole() {
    let dir = checkpoint("sd3");
    let mut learner = learner(proxytune::models::sd3::FAMILY, &dir);
    let examples = examples(learner.as_mut());
    let prompts = ["a dog", "a dog in the snow", "a toy", "a cat", "a dog"];
    let batch: Vec<TrainingExample> = prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| TrainingExample {
            example: examples[i % examples.len()].clone(),
            prompt: (*prompt).into(),
        })
        .collect();
    let parts = learnt(learner.as_mut(), &batch);

    let adapter = Arc::new(Adapter::new(lora(proxytune::models::sd3::FAMILY), 3));
    let files = sd3::transformer_files(&dir).unwrap();
    let weights = files.open(DType::F32, &Device::Cpu).unwrap();
    let model = Sd3::open(&dir, &weights.with_adapter(adapter.clone())).unwrap();
    disturb(&adapter.variables());
    let (means, logvars): (Vec<Tensor>, Vec<Tensor>) = batch
        .iter()
        .map(|pair| match &pair.example {
            Example::Latents { mean, logvar, .. } => (mean.clone(), logvar.clone()),
            Example::Tokens(_) => panic!("a diffusion model learns latents"),
        })
        .unzip();
    let stack = |x: &[Tensor]| Tensor::stack(x, 0).unwrap();
    let mut generator = ChaCha8Rng::seed_from_u64(1);
    let latents = model.sample_latents(&stack(&means), &stack(&logvars), &mut generator);
    let latents = latents.unwrap();
    // For each caption it is drawn whether it is dropped.
    prompts.iter().for_each(|_| {
        generator.random::<f64>();
    });
    let prompts = prompts.map(String::from);
    let conditioning = model.encode_prompts(&prompts).unwrap();
    let loss = model.loss(&latents, &conditioning, &mut generator).unwrap();
    assert_close(parts, differentiate(&loss, &adapter.variables()));
}

mod of_any_loss {
    use candle_core::{DType, Device, Tensor, Var};
    use proxytune::nn::{backward, mean_over_parts, ops};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// The loss of examples that count differently, in parts of `at_once`, with its gradients.
    fn run(at_once: usize, threads: usize) -> Vec<f32> {
        let weight =
            Var::from_tensor(&Tensor::new(&[[0.3f32, -0.2], [0.1, 0.7]], &Device::Cpu).unwrap());
        let (weight, bias) = (
            weight.unwrap(),
            Var::zeros(2, DType::F32, &Device::Cpu).unwrap(),
        );
        let variables = [
            ("w".to_string(), weight.clone()),
            ("b".to_string(), bias.clone()),
        ];
        let x: Vec<f32> = (0..14).map(|i| (i as f32 * 0.7).sin()).collect();
        let x = Tensor::from_vec(x, (7, 2), &Device::Cpu).unwrap();
        let shares = [1, 2, 3, 1, 1, 2, 4];
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| {
            let mut generator = ChaCha8Rng::seed_from_u64(1);
            let loss = mean_over_parts(&shares, at_once, &variables, &mut generator, |part, _| {
                let own = &shares[part.clone()];
                let weights: Vec<f32> = own.iter().map(|&s| s as f32).collect();
                let sum = weights.iter().sum::<f32>();
                let weights = Tensor::from_vec(weights, (own.len(), 1), &Device::Cpu)?;
                let y = ops::linear(&x.narrow(0, part.start, own.len())?, &weight, Some(&bias))?;
                let y = ops::silu(&y)?.sqr()?.broadcast_mul(&weights)?;
                Ok((y.sum_all()? / f64::from(sum))?)
            });
            let loss = (loss.unwrap() * 3.0).unwrap();
            let gradients = backward(&loss).unwrap();
            let of = |v: &Var| gradients.get(v).unwrap().flatten_all().unwrap();
            let mut all = vec![loss.to_scalar::<f32>().unwrap()];
            for v in [&weight, &bias] {
                all.extend(of(v).to_vec1::<f32>().unwrap());
            }
            all
        })
    }

    #[test]
    fn parts_give_the_mean_and_the_gradients_of_the_whole() {
        let whole = run(7, 2);
        for at_once in [1, 2, 3, 4] {
            for (one, other) in run(at_once, 2).iter().zip(&whole) {
                assert!(
                    (one - other).abs() < 1e-5 * (1.0 + other.abs()),
                    "{at_once}"
                );
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let alone = run(2, 1);
        for threads in [2, 3, 5] {
            assert_eq!(run(2, threads), alone);
        }
    }

    #[test]
    fn each_part_draws_from_a_generator_of_its_own() {
        let draws = |at_once: usize| {
            let w = Var::zeros((), DType::F32, &Device::Cpu).unwrap();
            let variables = [("w".to_string(), w.clone())];
            let mut generator = ChaCha8Rng::seed_from_u64(5);
            let seen = std::sync::Mutex::new(Vec::new());
            mean_over_parts(&[1; 6], at_once, &variables, &mut generator, |part, own| {
                seen.lock().unwrap().push((part.start, own.random::<u64>()));
                Ok(w.as_tensor().sqr()?)
            })
            .unwrap();
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            seen
        };
        let parts = draws(2);
        assert_eq!(parts, draws(2));
        assert_eq!(
            parts.iter().map(|(start, _)| *start).collect::<Vec<_>>(),
            [0, 2, 4]
        );
        assert!(parts[0].1 != parts[1].1 && parts[1].1 != parts[2].1);
        assert_eq!(
            draws(6),
            [(0, ChaCha8Rng::seed_from_u64(5).random::<u64>())]
        );
    }
}
