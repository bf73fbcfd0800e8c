//! What the commands that use a model have in common: the device, the model and its prompts, the data, judging, training.
//! Generic over the backend, so that a GPU runs the same code.

pub(crate) mod answer_journal;
pub(crate) mod answers;
pub(crate) mod data;
pub(crate) mod device;
pub(crate) mod engine;
pub(crate) mod fine_tune;
pub(crate) mod generation;
pub(crate) mod injections;
pub(crate) mod plan;
pub(crate) mod ranks;
pub(crate) mod report;
pub(crate) mod sides;
pub(crate) mod stream;
pub(crate) mod training;
