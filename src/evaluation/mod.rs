//! How good an image is: CLIP-I, CLIP-T and DINO as the Proxy-Tuning paper reports them, and what shows it: a sheet of
//! pictures, a page, a table.

pub mod captions;
pub mod contact;
pub mod embed;
pub mod embedders;
pub mod likeness;
pub mod metrics;
pub mod plot;
pub mod preprocess;
pub mod report;
pub mod sheet;

mod html;
