//! `cashtag pull`: fetches a model or a data set once, and prints where it lies.

use anyhow::bail;

use crate::exit::Usage;
use crate::{hub, output};

#[derive(clap::Args)]
#[command(after_help = "Variables: CASHTAG_CACHE (where smollm2-135m is kept), HF_HOME, HF_TOKEN, HF_ENDPOINT\n\n\
Examples:\n  cashtag pull smollm2-135m\n  cashtag pull NousResearch/Llama-2-7b-chat-hf\n  \
cashtag pull dataset zeroshot/twitter-financial-news-sentiment")]
pub(crate) struct Args {
    /// `smollm2-135m`, OWNER/NAME[@REVISION] of the Hugging Face hub, or the word `dataset`
    #[arg(value_name = "MODEL")]
    model: String,
    /// With `dataset`: OWNER/NAME[@REVISION] of a data set
    #[arg(value_name = "DATASET")]
    dataset: Option<String>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let path = match (args.model.as_str(), args.dataset) {
        ("dataset", Some(name)) => hub::pull_dataset(&name)?,
        ("dataset", None) => {
            bail!(Usage("which data set?\n  hint: cashtag pull dataset OWNER/NAME".into()))
        }
        (name, None) => hub::pull_model(name)?,
        (_, Some(second)) => bail!(Usage(format!(
            "\"{second}\" is one name too many\n  hint: pull models one at a time; for a data set: cashtag pull dataset OWNER/NAME"
        ))),
    };
    output::data(&format!("{}\n", path.display()))
}
