//! The DINO-shaped vision transformer. The published DINO distils itself without labels; this one learns from pairs of
//! pictures which individual they show, which a drawn world can tell it, and is judged by the same thing.

use rand::seq::SliceRandom;
use serde_json::json;

use super::context::Context;
use super::course::Step;
use super::{contrast, files};
use crate::evaluation::preprocess::Preprocessing;
use crate::models::vit::{Config, Size, Vit};
use crate::nano::identity::Class;
use crate::{Error, Result};

/// Trains, or goes on training, `dino`.
pub fn train(context: &Context) -> Result<()> {
    let settings = &context.settings.dino;
    let per_class = settings.identities_per_class;
    let pairs = settings.training.batch_size / 2;
    if per_class == 0
        || pairs == 0
        || !pairs.is_multiple_of(per_class)
        || pairs / per_class > Class::ALL.len()
    {
        return Err(Error::invalid(
            format!(
                "dino: {per_class} identities per class in a batch of {}",
                settings.training.batch_size
            ),
            format!(
                "half the batch must be a multiple of identities_per_class, and at most {} times it",
                Class::ALL.len()
            ),
        ));
    }
    let folder = context.out.join("dino");
    let config = Config {
        hidden_size: settings.vision.width,
        num_hidden_layers: settings.vision.layers,
        num_attention_heads: settings.vision.heads,
        intermediate_size: 4 * settings.vision.width,
        image_size: Size::square(context.settings.side(&settings.training)),
        patch_size: Size::square(settings.patch_size),
        ..Config::default()
    };
    let file = folder.join("model.safetensors");
    let opened = context.open("dino", &file, |weights| Vit::new(&config, weights))?;
    let (weights, model) = (opened.weights, opened.model);
    let preprocessing = preprocessing(context.settings.side(&settings.training));
    let scenes = context.scenes("dino", &settings.training);
    let course = context.course("dino", &settings.training, &folder, weights.variables());
    let step = |seen: usize, _spent: f64| {
        let mut classes = Class::ALL;
        classes.shuffle(&mut scenes.generator("classes", seen));
        let batch: Vec<_> = (0..pairs)
            .flat_map(|i| scenes.pair(seen + i, classes[i / per_class]))
            .collect();
        let labels: Vec<usize> = (0..2 * pairs).map(|i| i / 2).collect();
        let targets = contrast::targets(&labels, &context.device)?;
        let pixels = preprocessing.apply(&scenes.draw(&batch), &context.device)?;
        let views = contrast::unit(&model.forward(&pixels)?)?;
        let loss = contrast::views(&views, &targets, settings.temperature)?;
        Ok(Step {
            loss,
            figures: Vec::new(),
        })
    };
    course.run(step, || {
        write_configs(context, &config)?;
        files::write_weights(&file, &weights.variables())
    })
}

/// DINO's mean and deviation, without its larger short side: the drawn pictures fill their frame.
pub fn preprocessing(image_size: usize) -> Preprocessing {
    let side = image_size as u32;
    Preprocessing {
        resize: Some(crate::evaluation::preprocess::Resize::ShortSide(side)),
        ..Preprocessing::dino(side)
    }
}

fn write_configs(context: &Context, config: &Config) -> Result<()> {
    let folder = context.out.join("dino");
    files::write_json(
        &folder.join("config.json"),
        &json!({
            "architectures": ["ViTModel"],
            "model_type": "vit",
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "hidden_act": "gelu",
            "layer_norm_eps": config.layer_norm_eps,
            "image_size": config.image_size.width,
            "patch_size": config.patch_size.width,
            "num_channels": config.num_channels,
            "qkv_bias": config.qkv_bias,
        }),
    )?;
    let side = config.image_size.width;
    files::write_json(
        &folder.join("preprocessor_config.json"),
        &json!({
            "image_processor_type": "ViTImageProcessor",
            "do_resize": true,
            "size": { "shortest_edge": side },
            "resample": 3,
            "do_center_crop": true,
            "crop_size": { "height": side, "width": side },
            "do_rescale": true,
            "rescale_factor": 1.0 / 255.0,
            "do_normalize": true,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }),
    )
}
