//! The sizes of Chameleon's VQGAN, from either file that states them.

use serde::Deserialize;

use crate::models::limits::{CHANNELS, LAYERS, LEVELS, Limited, Limits, SIDE, VOCABULARY};
use crate::{Error, Result};

/// Sizes in taming-transformers' terms, with Chameleon's as defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Channels at full resolution, a multiple of `norm_num_groups`. Default 128.
    pub ch: usize,
    /// Factors on `ch` from the highest resolution to the lowest. Default 1, 1, 2, 2, 4.
    pub ch_mult: Vec<usize>,
    /// Residual blocks at each resolution of the encoder; the decoder has one more. Default 2.
    pub num_res_blocks: usize,
    /// Sides, where an image has `resolution` pixels, at which every residual block is followed by attention; none by
    /// default.
    pub attn_resolutions: Vec<usize>,
    /// Whether there is attention at all, in the middle too. Default true.
    pub attention: bool,
    /// Side of an image in pixels that `attn_resolutions` are counted for. Default 512.
    pub resolution: usize,
    /// Channels between the encoder and the codebook. Default 256.
    pub z_channels: usize,
    /// Number of codes. Default 8192.
    pub n_embed: usize,
    /// Width of a code. Default 256.
    pub embed_dim: usize,
    /// Groups of every group norm. Not in published files: the references always have 32, the default.
    pub norm_num_groups: usize,
}

/// `vq_config` in the `config.json` of a Hugging Face `ChameleonModel`.
#[derive(Deserialize)]
#[serde(default)]
struct HuggingFace {
    embed_dim: usize,
    num_embeddings: usize,
    double_latent: bool,
    latent_channels: usize,
    resolution: usize,
    in_channels: usize,
    base_channels: usize,
    channel_multiplier: Vec<usize>,
    num_res_blocks: usize,
    attn_resolutions: Option<Vec<usize>>,
    attn_type: Option<String>,
}

impl Default for HuggingFace {
    fn default() -> Self {
        Self {
            embed_dim: 256,
            num_embeddings: 8192,
            double_latent: false,
            latent_channels: 256,
            resolution: 512,
            in_channels: 3,
            base_channels: 128,
            channel_multiplier: vec![1, 1, 2, 2, 4],
            num_res_blocks: 2,
            attn_resolutions: None,
            attn_type: Some("vanilla".into()),
        }
    }
}

/// A `vqgan.yaml`.
#[derive(Deserialize)]
struct Document {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    params: Taming,
}

#[derive(Deserialize)]
struct Taming {
    ddconfig: Sizes,
    embed_dim: usize,
    n_embed: usize,
}

#[derive(Deserialize)]
struct Sizes {
    ch: usize,
    ch_mult: Vec<usize>,
    num_res_blocks: usize,
    attn_resolutions: Vec<usize>,
    in_channels: usize,
    out_ch: usize,
    resolution: usize,
    z_channels: usize,
    #[serde(default = "yes")]
    double_z: bool,
    #[serde(default = "yes")]
    resamp_with_conv: bool,
    #[serde(default = "groups")]
    norm_num_groups: usize,
    #[serde(default)]
    use_linear_attn: bool,
    #[serde(default)]
    attn_type: Option<String>,
    #[serde(default)]
    tanh_out: bool,
    #[serde(default)]
    give_pre_end: bool,
}

fn yes() -> bool {
    true
}

fn groups() -> usize {
    32
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ch: 128,
            ch_mult: vec![1, 1, 2, 2, 4],
            num_res_blocks: 2,
            attn_resolutions: Vec::new(),
            attention: true,
            resolution: 512,
            z_channels: 256,
            n_embed: 8192,
            embed_dim: 256,
            norm_num_groups: groups(),
        }
    }
}

impl Limited for Config {
    fn limit(&self, limits: &mut Limits) {
        limits.within("ch", self.ch, &CHANNELS);
        limits.within("number of ch_mult", self.ch_mult.len(), &LEVELS);
        limits.all_within("ch_mult", &self.ch_mult, &(1..=64));
        limits.within("num_res_blocks", self.num_res_blocks, &LAYERS);
        limits.within("resolution", self.resolution, &SIDE);
        limits.within("z_channels", self.z_channels, &CHANNELS);
        limits.within("n_embed", self.n_embed, &VOCABULARY);
        limits.within("embed_dim", self.embed_dim, &CHANNELS);
        limits.within("norm_num_groups", self.norm_num_groups, &CHANNELS);
    }
}

impl Config {
    /// From the `vq_config` of a Hugging Face `config.json`; null stands for the defaults.
    pub fn from_vq_config(json: &serde_json::Value) -> Result<Self> {
        let read = match json {
            serde_json::Value::Null => HuggingFace::default(),
            json => HuggingFace::deserialize(json).map_err(|e| unlike(&e.to_string()))?,
        };
        if read.double_latent || read.in_channels != 3 {
            return Err(unlike("double_latent or in_channels other than 3"));
        }
        let config = Self {
            ch: read.base_channels,
            ch_mult: read.channel_multiplier,
            num_res_blocks: read.num_res_blocks,
            attn_resolutions: read.attn_resolutions.unwrap_or_default(),
            attention: read.attn_type.as_deref() == Some("vanilla"),
            resolution: read.resolution,
            z_channels: read.latent_channels,
            n_embed: read.num_embeddings,
            embed_dim: read.embed_dim,
            norm_num_groups: groups(),
        };
        config.validated()
    }

    /// From the text of a `vqgan.yaml`.
    pub fn from_yaml(text: &str) -> Result<Self> {
        // What a published one takes is a hundredth of this; aliases may not multiply it.
        let options = serde_saphyr::options! {
            with_snippet: false,
            budget: serde_saphyr::budget! {
                max_depth: 32,
                max_nodes: 10_000,
                max_events: 100_000,
                max_aliases: 100,
            },
            alias_limits: serde_saphyr::alias_limits! {
                max_total_replayed_events: 10_000,
            },
        };
        let Document { model } = serde_saphyr::from_str_with_options(text, options)
            .map_err(|e| unlike(&e.to_string()))?;
        let read = model.params;
        let sizes = read.ddconfig;
        let foreign = [
            ("double_z", sizes.double_z),
            ("use_linear_attn", sizes.use_linear_attn),
            ("tanh_out", sizes.tanh_out),
            ("give_pre_end", sizes.give_pre_end),
            ("resamp_with_conv = false", !sizes.resamp_with_conv),
            ("in_channels other than 3", sizes.in_channels != 3),
            ("out_ch other than 3", sizes.out_ch != 3),
        ];
        if let Some((what, _)) = foreign.iter().find(|(_, is_so)| *is_so) {
            return Err(unlike(what));
        }
        let attention = match sizes.attn_type.as_deref() {
            None | Some("vanilla") => true,
            Some("none") => false,
            Some(other) => return Err(unlike(&format!("attn_type {other}"))),
        };
        let config = Self {
            ch: sizes.ch,
            ch_mult: sizes.ch_mult,
            num_res_blocks: sizes.num_res_blocks,
            attn_resolutions: sizes.attn_resolutions,
            attention,
            resolution: sizes.resolution,
            z_channels: sizes.z_channels,
            n_embed: read.n_embed,
            embed_dim: read.embed_dim,
            norm_num_groups: sizes.norm_num_groups,
        };
        config.validated()
    }

    /// As the text of a `vqgan.yaml`.
    pub fn to_yaml(&self) -> String {
        let attn_type = if self.attention { "vanilla" } else { "none" };
        format!(
            "model:\n  target: taming.models.vqgan.VQModel\n  params:\n    embed_dim: {}\n    n_embed: {}\n    \
             ddconfig:\n      double_z: false\n      z_channels: {}\n      resolution: {}\n      in_channels: 3\n      \
             out_ch: 3\n      ch: {}\n      ch_mult: {:?}\n      num_res_blocks: {}\n      attn_resolutions: {:?}\n      \
             attn_type: {attn_type}\n      norm_num_groups: {}\n      dropout: 0.0\n",
            self.embed_dim,
            self.n_embed,
            self.z_channels,
            self.resolution,
            self.ch,
            self.ch_mult,
            self.num_res_blocks,
            self.attn_resolutions,
            self.norm_num_groups,
        )
    }

    /// Pixels along one side of the square that one code stands for.
    pub fn downsampling(&self) -> usize {
        1 << self.ch_mult.len().saturating_sub(1)
    }

    /// Whether the encoder's residual blocks of `level`, counted from the highest resolution, are followed by attention.
    pub(super) fn encoder_attends(&self, level: usize) -> bool {
        self.attends_at(self.resolution >> level)
    }

    /// The same for the decoder, which counts its resolutions from the lowest: they differ from the encoder's where
    /// `resolution` is no multiple of the downsampling.
    pub(super) fn decoder_attends(&self, level: usize) -> bool {
        let lowest = self.ch_mult.len().saturating_sub(1);
        let above = lowest.saturating_sub(level);
        self.attends_at((self.resolution >> lowest) << above)
    }

    fn attends_at(&self, resolution: usize) -> bool {
        self.attention && self.attn_resolutions.contains(&resolution)
    }

    pub(super) fn validated(self) -> Result<Self> {
        let mut limits = Limits::default();
        self.limit(&mut limits);
        let faults = limits.faults();
        if !faults.is_empty() {
            return Err(unlike(&faults.join("; ")));
        }
        let groups = self.norm_num_groups;
        let whole = |channels: usize| channels > 0 && groups > 0 && channels.is_multiple_of(groups);
        if self.ch_mult.is_empty() || !self.ch_mult.iter().all(|m| whole(self.ch * m)) {
            return Err(unlike(&format!(
                "channels {} times {:?}, which are not multiples of {groups}",
                self.ch, self.ch_mult
            )));
        }
        if self.num_res_blocks == 0 || self.n_embed < 2 || self.z_channels * self.embed_dim == 0 {
            return Err(unlike("no residual blocks, or fewer than two codes"));
        }
        Ok(self)
    }
}

fn unlike(what: &str) -> Error {
    Error::invalid(
        format!("the VQGAN's config: {what}"),
        "only the image tokenizer of Chameleon, in other sizes, is supported",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The part of Meta's file that is read, as PyYAML writes it with and without brackets.
    #[test]
    fn metas_file_is_read_in_every_style() {
        let sizes = "attn_resolutions: []\n      ch: 128\n      ch_mult:\n      - 1\n      - 1\n      - 2\n      - 2\n      \
                     - 4\n      double_z: false\n      dropout: 0.0\n      in_channels: 3\n      num_res_blocks: 2\n      \
                     out_ch: 3\n      resolution: 512\n      z_channels: 256\n";
        let blocks = format!(
            "model:\n  base_learning_rate: 4.5e-06  # per image\n  target: taming.models.vqgan.VQModel\n  params:\n    \
             embed_dim: 256\n    n_embed: 8192\n    ddconfig:\n      {sizes}    lossconfig:\n      params: {{disc_weight: \
             0.8, name: 'a: {{b', perceptual_weight: null}}\n      target: 'x # y'\n"
        );
        assert_eq!(Config::from_yaml(&blocks).unwrap(), Config::default());
        let brackets = "---\n{model: {params: {ddconfig: {attn_resolutions: [], ch: 128, ch_mult: [1, 1, 2,\n        2, 4], \
                        double_z: False, in_channels: 3, num_res_blocks: 2, out_ch: 3, resolution: 512,\n      z_channels: \
                        256}, embed_dim: 256, n_embed: 8192}, target: taming.VQModel}}\n";
        assert_eq!(Config::from_yaml(brackets).unwrap(), Config::default());
    }

    #[test]
    fn yaml_that_would_take_all_memory_or_stack_is_refused() {
        let deep = format!("model: {}", "[".repeat(1_000_000));
        let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_string();
        for level in 1..12 {
            let before = vec![format!("*a{}", level - 1); 10].join(", ");
            laughs += &format!("a{level}: &a{level} [{before}]\n");
        }
        laughs += &Config::default().to_yaml();
        let wide = format!(
            "{}model: [{}]",
            Config::default().to_yaml(),
            "1,".repeat(1_000_000)
        );
        let own = "model: &model\n  params: *model\n".to_string();
        for text in [deep, laughs, wide, own] {
            let begun = std::time::Instant::now();
            assert!(Config::from_yaml(&text).is_err());
            assert!(begun.elapsed().as_secs() < 2);
        }
    }

    #[test]
    fn a_config_survives_its_own_yaml() {
        let config = Config {
            ch: 32,
            ch_mult: vec![1, 2],
            attn_resolutions: vec![16],
            norm_num_groups: 8,
            ..Config::default()
        };
        assert_eq!(Config::from_yaml(&config.to_yaml()).unwrap(), config);
        assert!(!config.encoder_attends(0) && config.downsampling() == 2);
    }

    #[test]
    fn the_decoder_counts_its_resolutions_from_the_lowest() {
        let config = Config {
            ch_mult: vec![1, 1, 2],
            resolution: 50,
            attn_resolutions: vec![25, 48],
            ..Config::default()
        };
        let levels = [0, 1, 2];
        // 50, 25, 12 on the way down; 12, 24, 48 on the way up.
        assert_eq!(
            levels.map(|i| config.encoder_attends(i)),
            [false, true, false]
        );
        assert_eq!(
            levels.map(|i| config.decoder_attends(i)),
            [true, false, false]
        );
    }

    #[test]
    fn an_absent_vq_config_means_transformers_defaults() {
        let config = Config::from_vq_config(&serde_json::Value::Null).unwrap();
        assert_eq!(config, Config::default());
    }

    #[test]
    fn another_autoencoder_is_refused_with_the_reason() {
        let yaml = Config::default()
            .to_yaml()
            .replace("double_z: false", "double_z: true");
        let error = Config::from_yaml(&yaml).unwrap_err().to_string();
        assert!(error.contains("double_z"), "{error}");
    }
}
