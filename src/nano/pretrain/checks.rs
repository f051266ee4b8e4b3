//! Which values the settings of a pretraining cannot have: all faults at once, each with a hint.

use super::settings::{Flux, Sd3, Sdxl, Settings, Tower, Training};

#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn push(&mut self, what: String, hint: &str) {
        self.0.push(format!("{what}\n  hint: {hint}"));
    }

    /// Whole numbers of at least 1.
    fn counts(&mut self, section: &str, counts: &[(&str, usize)]) {
        for (name, count) in counts.iter().filter(|(_, count)| *count == 0) {
            let what = format!("{section}.{name} = {count} is out of range");
            self.push(what, "a whole number from 1");
        }
    }

    /// Reports a `value` that is no multiple of `part`; a `part` of 0 is reported by [`Faults::counts`].
    fn divides(&mut self, section: &str, (name, value): (&str, usize), (by, part): (&str, usize)) {
        if part > 0 && !value.is_multiple_of(part) {
            let what = format!("{section}.{name} = {value} is no multiple of {by} = {part}");
            self.push(
                what,
                &format!("for example {}", value.next_multiple_of(part)),
            );
        }
    }

    fn shares(&mut self, section: &str, shares: &[(&str, f64)]) {
        for (name, share) in shares {
            if !(0.0..1.0).contains(share) {
                let what = format!("{section}.{name} = {share} is out of range");
                self.push(what, "a number of at least 0 and below 1");
            }
        }
    }

    /// Numbers above 0.
    fn above_zero(&mut self, section: &str, numbers: &[(&str, f64)]) {
        for (name, number) in numbers {
            if !(number.is_finite() && *number > 0.0) {
                let what = format!("{section}.{name} = {number} is out of range");
                self.push(what, "a number above 0");
            }
        }
    }

    fn training(&mut self, model: &str, training: &Training) {
        let section = format!("{model}.training");
        let side = ("image_size", training.image_size.unwrap_or(1));
        self.counts(&section, &[("batch_size", training.batch_size), side]);
        self.above_zero(
            &section,
            &[
                ("learning_rate", training.learning_rate),
                ("max_grad_norm", training.max_grad_norm),
            ],
        );
        self.shares(&section, &[("beta2", training.beta2)]);
        if !(training.weight_decay.is_finite() && training.weight_decay >= 0.0) {
            let what = format!(
                "{section}.weight_decay = {} is out of range",
                training.weight_decay
            );
            self.push(what, "a number of at least 0");
        }
    }

    fn tower(&mut self, section: &str, tower: &Tower) {
        let (width, heads) = (tower.width, tower.heads);
        let counts = [("width", width), ("layers", tower.layers), ("heads", heads)];
        self.counts(section, &counts);
        self.divides(section, ("width", width), ("heads", heads));
    }

    fn mmdit(&mut self, name: &str, s: &Sd3) {
        self.training(name, &s.training);
        let counts = [
            ("layers", s.layers),
            ("heads", s.heads),
            ("head_dim", s.head_dim),
            ("patch_size", s.patch_size),
            ("pool", s.pool),
        ];
        self.counts(name, &counts);
        self.above_zero(name, &[("shift", s.shift)]);
        self.shares(name, &[("condition_dropout", s.condition_dropout)]);
    }

    fn flux(&mut self, s: &Flux) {
        self.training("flux", &s.training);
        let counts = [
            ("layers", s.layers),
            ("single_layers", s.single_layers),
            ("heads", s.heads),
            ("head_dim", s.head_dim),
            ("pool", s.pool),
        ];
        self.counts("flux", &counts);
        let [least, most] = s.guidance;
        if !(least.is_finite() && most.is_finite() && 0.0 <= least && least <= most) {
            let what = format!("flux.guidance = {:?} is out of range", s.guidance);
            self.push(
                what,
                "two numbers from 0, the smaller first, such as [1, 4]",
            );
        }
        let turned: usize = s.axes.iter().fold(0, |sum, &axis| sum.saturating_add(axis));
        if turned != s.head_dim || s.axes.iter().any(|axis| axis % 2 != 0) {
            let what = format!("flux.axes = {:?} for heads {} wide", s.axes, s.head_dim);
            self.push(what, "three even numbers that are head_dim together");
        }
    }

    fn sdxl(&mut self, s: &Sdxl) {
        self.training("sdxl", &s.training);
        self.levels("sdxl", "channels", &s.channels);
        let counts = [
            ("layers_per_block", s.layers_per_block),
            ("head_dim", s.head_dim),
            ("norm_groups", s.norm_groups),
            ("size_channels", s.size_channels),
            ("pool", s.pool),
        ];
        self.counts("sdxl", &counts);
        for &channels in &s.channels {
            for by in [("head_dim", s.head_dim), ("norm_groups", s.norm_groups)] {
                self.divides("sdxl", ("channels", channels), by);
            }
        }
        if s.depths.len() != s.channels.len() {
            let what = format!("sdxl.depths = {:?} for {:?}", s.depths, s.channels);
            self.push(what, "one whole number from 0 for each of the channels");
        }
        self.shares("sdxl", &[("condition_dropout", s.condition_dropout)]);
    }

    /// The levels of a tokenizer or an autoencoder.
    fn levels(&mut self, section: &str, name: &str, levels: &[usize]) {
        if levels.is_empty() || levels.contains(&0) {
            let what = format!("{section}.{name} = {levels:?} is out of range");
            self.push(
                what,
                "one whole number from 1 for each level, such as [1, 1, 2]",
            );
        }
    }
}

/// Every fault of `settings`, each as what and a hint.
pub(super) fn faults(settings: &Settings) -> Vec<String> {
    let mut faults = Faults::default();
    faults.counts("settings", &[("image_size", settings.image_size)]);
    let size = |training| ("image_size", settings.side(training));

    let s = &settings.clip;
    faults.training("clip", &s.training);
    faults.tower("clip.vision", &s.vision);
    faults.tower("clip.text", &s.text);
    let counts = [("patch_size", s.patch_size), ("projection", s.projection)];
    faults.counts("clip", &counts);
    faults.divides(
        "settings",
        size(&s.training),
        ("clip.patch_size", s.patch_size),
    );
    faults.above_zero("clip", &[("pair_temperature", s.pair_temperature)]);
    if s.max_positions < 3 {
        let what = format!("clip.max_positions = {} is out of range", s.max_positions);
        faults.push(what, "a whole number from 3: a word between two end tokens");
    }

    let s = &settings.dino;
    faults.training("dino", &s.training);
    faults.tower("dino.vision", &s.vision);
    faults.counts("dino", &[("patch_size", s.patch_size)]);
    faults.divides(
        "settings",
        size(&s.training),
        ("dino.patch_size", s.patch_size),
    );
    faults.above_zero("dino", &[("temperature", s.temperature)]);

    let s = &settings.vq;
    faults.training("vq", &s.training);
    faults.levels("vq", "encoder_multipliers", &s.encoder_multipliers);
    faults.levels("vq", "decoder_multipliers", &s.decoder_multipliers);
    let groups = ("norm_groups", s.norm_groups);
    let counts = [
        ("channels", s.channels),
        groups,
        ("z_channels", s.z_channels),
        ("codebook_size", s.codebook_size),
        ("codebook_dim", s.codebook_dim),
    ];
    faults.counts("vq", &counts);
    faults.divides("vq", ("channels", s.channels), groups);

    let s = &settings.vae;
    faults.training("vae", &s.training);
    faults.levels("vae", "channels", &s.channels);
    let groups = ("norm_groups", s.norm_groups);
    let counts = [groups, ("latent_channels", s.latent_channels)];
    faults.counts("vae", &counts);
    for &channels in &s.channels {
        faults.divides("vae", ("channels", channels), groups);
    }

    let s = &settings.gpt;
    faults.training("gpt", &s.training);
    let counts = [
        ("width", s.width),
        ("layers", s.layers),
        ("heads", s.heads),
        ("multiple_of", s.multiple_of),
        ("caption_positions", s.caption_positions),
        ("pool", s.pool),
    ];
    faults.counts("gpt", &counts);
    faults.divides("gpt", ("width", s.width), ("heads", s.heads));
    let shares = [
        ("condition_dropout", s.condition_dropout),
        ("dropout", s.dropout),
    ];
    faults.shares("gpt", &shares);
    let counts = [
        ("d_model", s.t5.d_model),
        ("d_ff", s.t5.d_ff),
        ("d_kv", s.t5.d_kv),
        ("heads", s.t5.heads),
        ("layers", s.t5.layers),
    ];
    faults.counts("gpt.t5", &counts);

    for (name, s) in [("sd3", &settings.sd3), ("sd35", &settings.sd35)] {
        faults.mmdit(name, s);
    }
    faults.flux(&settings.flux);
    faults.sdxl(&settings.sdxl);

    let s = &settings.vqgan;
    faults.training("vqgan", &s.training);
    faults.levels("vqgan", "multipliers", &s.multipliers);
    let groups = ("norm_groups", s.norm_groups);
    let counts = [
        ("channels", s.channels),
        groups,
        ("res_blocks", s.res_blocks),
        ("z_channels", s.z_channels),
        ("codebook_size", s.codebook_size),
        ("codebook_dim", s.codebook_dim),
    ];
    faults.counts("vqgan", &counts);
    faults.divides("vqgan", ("channels", s.channels), groups);

    let s = &settings.chameleon;
    faults.training("chameleon", &s.training);
    let counts = [
        ("width", s.width),
        ("layers", s.layers),
        ("heads", s.heads),
        ("feed_forward", s.feed_forward),
        ("patch_size", s.patch_size),
        ("positions", s.positions),
        ("pool", s.pool),
    ];
    faults.counts("chameleon", &counts);
    faults.divides("chameleon", ("width", s.width), ("heads", s.heads));
    faults.divides(
        "settings",
        size(&s.training),
        ("chameleon.patch_size", s.patch_size),
    );
    let shares = [
        ("condition_dropout", s.condition_dropout),
        ("dropout", s.dropout),
    ];
    faults.shares("chameleon", &shares);
    faults.0
}
