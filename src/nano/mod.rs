//! The drawn world from which the nano checkpoints learn, and the files that go with it.
//!
//! A [`Scene`](world::Scene) is one [`Identity`](identity::Identity) (a dog, with its colours, pattern, markings
//! and proportions) in one setting, perhaps dressed or recoloured, in one pose and light. It is drawn by
//! [`render`](world::render) and put into words by [`caption`](captions::caption), with the settings, accessories
//! and templates of the DreamBooth prompts. Everything follows from a seed.
//!
//! | file | what is in it |
//! |---|---|
//! | [`identity`] | classes, colours, patterns; which identities training never sees |
//! | [`world`] | scenes, and their pictures |
//! | [`captions`] | scenes to words |
//! | [`vocabulary`] | all words of captions and prompts, as tokenizers in the layout of CLIP's and T5's |
//! | [`subjects`] | the nine subjects that ship, and their reference images |
//! | [`pretrain`] | the training of the nano checkpoints |
//! | [`measure`] | how good they are |
//! | `draw` | how each class, setting and accessory looks |

pub mod captions;
mod draw;
pub mod identity;
pub mod measure;
pub mod pretrain;
pub mod subjects;
pub mod vocabulary;
pub mod world;
