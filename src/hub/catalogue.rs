//! The published checkpoints that are known by name: their repositories, files and terms. Names of files are those of
//! the repositories; sizes are rounded.

use super::published::Wanted::{Needed, OneOf, Useful};
use super::published::{ByHand, Published, Repository, Wanted};

/// A whole set of transformers' weights in the folder's root.
const WEIGHTS: Wanted = OneOf(&[
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
]);

const FLAN_T5_XL: Repository = Repository {
    id: "google/flan-t5-xl",
    role: "caption encoder (its decoder is not loaded) and its tokenizer",
    gated: false,
    into: "t5",
    files: &[Needed("config.json"), Needed("tokenizer.json"), WEIGHTS],
    megabytes: 11_400,
};

/// LlamaGen's GPT-XL for images of 512 pixels, trained in two stages.
pub const LLAMAGEN_XL: Published = Published {
    licence: "MIT; flan-t5-xl: Apache 2.0",
    million_parameters: 778 + 72 + 1_223,
    repositories: &[
        Repository {
            id: "peizesun/llamagen_t2i",
            role: "GPT and VQ image tokenizer",
            gated: false,
            into: "",
            files: &[Needed("t2i_XL_stage2_512.pt"), Needed("vq_ds16_t2i.pt")],
            megabytes: 3_400,
        },
        FLAN_T5_XL,
    ],
    by_hand: &[],
};

/// LlamaGen's GPT-XL for images of 256 pixels, after the first stage.
pub const LLAMAGEN_XL_256: Published = Published {
    licence: LLAMAGEN_XL.licence,
    million_parameters: LLAMAGEN_XL.million_parameters,
    repositories: &[
        Repository {
            id: "peizesun/llamagen_t2i",
            role: "GPT and VQ image tokenizer",
            gated: false,
            into: "",
            files: &[Needed("t2i_XL_stage1_256.pt"), Needed("vq_ds16_t2i.pt")],
            megabytes: 3_400,
        },
        FLAN_T5_XL,
    ],
    by_hand: &[],
};

/// Lumina-mGPT after flexible progressive supervised finetuning up to 768 pixels.
pub const LUMINA_MGPT_7B_768: Published = Published {
    licence: "Chameleon Research License",
    million_parameters: 7_040 + 46,
    repositories: &[Repository {
        id: "Alpha-VLLM/Lumina-mGPT-7B-768",
        role: "Chameleon backbone",
        gated: false,
        into: "",
        files: &[Needed("config.json"), WEIGHTS],
        megabytes: 28_200,
    }],
    by_hand: CHAMELEON_TOKENIZERS,
};

/// What Meta gives out after a form has been filled in.
const CHAMELEON_TOKENIZERS: &[ByHand] = &[
    ByHand {
        path: "tokenizer/vqgan.yaml",
        or: None,
        role: "settings of the image tokenizer",
        from: "data/tokenizer of Meta's Chameleon, https://ai.meta.com/resources/models-and-libraries/chameleon-downloads",
    },
    ByHand {
        path: "tokenizer/vqgan.ckpt",
        or: None,
        role: "image tokenizer",
        from: "the same place",
    },
    ByHand {
        path: "tokenizer/text_tokenizer.json",
        or: Some("tokenizer.json"),
        role: "text tokenizer",
        from: "the same place",
    },
];

const SCHEDULER: Wanted = Needed("scheduler/scheduler_config.json");

macro_rules! weights {
    ($folder:literal, $stem:literal) => {
        OneOf(&[
            concat!($folder, "/", $stem, ".safetensors.index.json"),
            concat!($folder, "/", $stem, ".safetensors"),
            concat!($folder, "/", $stem, ".safetensors.index.fp16.json"),
            concat!($folder, "/", $stem, ".fp16.safetensors"),
        ])
    };
}

/// CLIP's tokenizers come as one file or as two.
const CLIP_TOKENIZER: Wanted = OneOf(&["tokenizer/tokenizer.json", "tokenizer/vocab.json"]);
const CLIP_TOKENIZER_2: Wanted = OneOf(&["tokenizer_2/tokenizer.json", "tokenizer_2/vocab.json"]);

/// Stable Diffusion XL 1.0.
pub const SDXL: Published = Published {
    licence: "CreativeML Open RAIL++-M",
    million_parameters: 2_567 + 123 + 695 + 84,
    repositories: &[Repository {
        id: "stabilityai/stable-diffusion-xl-base-1.0",
        role: "U-Net, autoencoder, two CLIP text encoders",
        gated: false,
        into: "",
        files: &[
            Needed("model_index.json"),
            SCHEDULER,
            Needed("unet/config.json"),
            weights!("unet", "diffusion_pytorch_model"),
            Needed("vae/config.json"),
            weights!("vae", "diffusion_pytorch_model"),
            Needed("text_encoder/config.json"),
            weights!("text_encoder", "model"),
            Needed("text_encoder_2/config.json"),
            weights!("text_encoder_2", "model"),
            CLIP_TOKENIZER,
            Useful("tokenizer/merges.txt"),
            Useful("tokenizer/tokenizer_config.json"),
            Useful("tokenizer/special_tokens_map.json"),
            CLIP_TOKENIZER_2,
            Useful("tokenizer_2/merges.txt"),
            Useful("tokenizer_2/tokenizer_config.json"),
            Useful("tokenizer_2/special_tokens_map.json"),
        ],
        megabytes: 13_900,
    }],
    by_hand: &[],
};

const SD3_FILES: &[Wanted] = &[
    Needed("model_index.json"),
    SCHEDULER,
    Needed("transformer/config.json"),
    weights!("transformer", "diffusion_pytorch_model"),
    Needed("vae/config.json"),
    weights!("vae", "diffusion_pytorch_model"),
    Needed("text_encoder/config.json"),
    weights!("text_encoder", "model"),
    Needed("text_encoder_2/config.json"),
    weights!("text_encoder_2", "model"),
    Needed("text_encoder_3/config.json"),
    weights!("text_encoder_3", "model"),
    CLIP_TOKENIZER,
    Useful("tokenizer/merges.txt"),
    Useful("tokenizer/tokenizer_config.json"),
    Useful("tokenizer/special_tokens_map.json"),
    CLIP_TOKENIZER_2,
    Useful("tokenizer_2/merges.txt"),
    Useful("tokenizer_2/tokenizer_config.json"),
    Useful("tokenizer_2/special_tokens_map.json"),
    Needed("tokenizer_3/tokenizer.json"),
    Useful("tokenizer_3/tokenizer_config.json"),
];

/// Stable Diffusion 3 Medium.
pub const SD3_MEDIUM: Published = Published {
    licence: "Stability AI Community License",
    million_parameters: 2_028 + 124 + 695 + 4_762 + 84,
    repositories: &[Repository {
        id: "stabilityai/stable-diffusion-3-medium-diffusers",
        role: "MMDiT, autoencoder, two CLIP text encoders and T5",
        gated: true,
        into: "",
        files: SD3_FILES,
        megabytes: 26_500,
    }],
    by_hand: &[],
};

/// Stable Diffusion 3.5 Large.
pub const SD35_LARGE: Published = Published {
    licence: "Stability AI Community License",
    million_parameters: 8_057 + 124 + 695 + 4_762 + 84,
    repositories: &[Repository {
        id: "stabilityai/stable-diffusion-3.5-large",
        role: "MMDiT, autoencoder, two CLIP text encoders and T5",
        gated: true,
        into: "",
        files: SD3_FILES,
        megabytes: 27_800,
    }],
    by_hand: &[],
};

/// FLUX.1-dev.
pub const FLUX_1_DEV: Published = Published {
    licence: "FLUX.1 [dev] Non-Commercial License",
    million_parameters: 11_901 + 123 + 4_762 + 84,
    repositories: &[Repository {
        id: "black-forest-labs/FLUX.1-dev",
        role: "transformer, autoencoder, CLIP text encoder and T5",
        gated: true,
        into: "",
        files: &[
            Needed("model_index.json"),
            SCHEDULER,
            Needed("transformer/config.json"),
            weights!("transformer", "diffusion_pytorch_model"),
            Needed("vae/config.json"),
            weights!("vae", "diffusion_pytorch_model"),
            Needed("text_encoder/config.json"),
            weights!("text_encoder", "model"),
            Needed("text_encoder_2/config.json"),
            weights!("text_encoder_2", "model"),
            CLIP_TOKENIZER,
            Useful("tokenizer/merges.txt"),
            Useful("tokenizer/tokenizer_config.json"),
            Useful("tokenizer/special_tokens_map.json"),
            Needed("tokenizer_2/tokenizer.json"),
            Useful("tokenizer_2/tokenizer_config.json"),
        ],
        megabytes: 33_700,
    }],
    by_hand: &[],
};

/// CLIP ViT-B/32.
pub const CLIP_VIT_BASE_PATCH32: Published = Published {
    licence: "MIT",
    million_parameters: 151,
    repositories: &[Repository {
        id: "openai/clip-vit-base-patch32",
        role: "both towers and the tokenizer",
        gated: false,
        into: "",
        files: &[
            Needed("config.json"),
            WEIGHTS,
            OneOf(&["tokenizer.json", "vocab.json"]),
            Useful("merges.txt"),
            Useful("preprocessor_config.json"),
        ],
        megabytes: 610,
    }],
    by_hand: &[],
};

/// DINO ViT-S/16.
pub const DINO_VITS16: Published = Published {
    licence: "Apache 2.0",
    million_parameters: 22,
    repositories: &[Repository {
        id: "facebook/dino-vits16",
        role: "vision transformer",
        gated: false,
        into: "",
        files: &[
            Needed("config.json"),
            WEIGHTS,
            Useful("preprocessor_config.json"),
        ],
        megabytes: 90,
    }],
    by_hand: &[],
};
