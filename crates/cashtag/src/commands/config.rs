//! `cashtag config`: every value in force with where it came from, as a recipe.

use crate::output;
use crate::settings::{Flags, reference};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print every value and where it came from; the output is a recipe (this is the default)
    #[arg(long)]
    show: bool,
    /// Print what there is to configure, as Markdown
    #[arg(long, conflicts_with = "show")]
    reference: bool,
    #[command(flatten)]
    settings: Flags,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if args.reference {
        return output::data(&reference());
    }
    output::data(&args.settings.resolve()?.to_toml_with_sources())
}
