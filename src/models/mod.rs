//! One file or folder per architecture. Names of weights equal the names in the published files.

pub mod clip;
pub mod encoder;
pub mod llamagen;
pub mod t5;
pub mod tokenizer;
pub mod vit;
