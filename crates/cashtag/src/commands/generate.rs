//! `cashtag generate`: labelled tweets written by a chat model.

use std::path::PathBuf;
use std::time::Duration;

use cashtag_corpus::chat_api::{ApiKey, ChatClient, ClientOptions};
use cashtag_corpus::generate::{Event, FormatChoice, GenerateOptions, Outcome, Progress as Listener, Stop, generate};
use cashtag_corpus::prepare::PrepareOptions;
use cashtag_corpus::recipe::{Quotas, TASK_PROMPT};
use cashtag_corpus::{Price, RetryPolicy, Totals};

use super::corpus::corpus_error;
use crate::exit::{self, Interrupted, Usage};
use crate::output;
use crate::progress::{Progress, Unit};

#[derive(clap::Args)]
#[command(after_help = "Variables: OPENAI_API_KEY, OPENAI_BASE_URL\n\n\
Examples:\n  cashtag generate --max-cost 2\n  \
cashtag generate --api-base http://localhost:11434/v1 --model llama3.1 -n 1000 --concurrency 8\n  \
cashtag generate --quota mixed=2,sarcastic=2,contextual=1 --no-system-message\n\n\
Every answer is kept in DIR/journal.jsonl before anything else happens: the same command goes on where it was.")]
pub(crate) struct Args {
    /// How many tweets to write
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    count: usize,
    /// Where the journal and the data set are kept
    #[arg(long, value_name = "DIR", default_value = "generated")]
    out: PathBuf,
    /// Another seed, other wishes and examples
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Address of an OpenAI-compatible server, up to /v1
    #[arg(
        long,
        value_name = "URL",
        env = "OPENAI_BASE_URL",
        hide_env_values = true,
        default_value = "https://api.openai.com/v1",
        help_heading = "Server"
    )]
    api_base: String,
    /// File that holds the API key [default: the variable OPENAI_API_KEY]
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    api_key_file: Option<PathBuf>,
    /// Model that writes
    #[arg(long, value_name = "NAME", default_value = "gpt-4", help_heading = "Server")]
    model: String,
    /// Requests under way at a time
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Server")]
    concurrency: usize,
    /// Seconds to wait for an answer
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0, help_heading = "Server")]
    timeout: f64,
    /// Attempts for one answer
    #[arg(long, value_name = "N", default_value_t = 3, help_heading = "Server")]
    attempts: u32,
    /// What the model to be trained is for
    #[arg(long, value_name = "TEXT", default_value = TASK_PROMPT, hide_default_value = true, help_heading = "Recipe")]
    prompt: String,
    /// 0 to 2
    #[arg(long, default_value_t = 0.5, help_heading = "Recipe")]
    temperature: f64,
    /// Earlier examples to show the model
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Recipe")]
    examples_shown: usize,
    /// Tokens of one answer, at most
    #[arg(long, value_name = "N", default_value_t = 1000, help_heading = "Recipe")]
    max_answer_tokens: u32,
    /// Shares by label and kind, as in Positive=1,Negative=1,mixed=2 [default: balanced]
    #[arg(long, value_name = "SHARES", help_heading = "Recipe")]
    quota: Option<String>,
    /// Let the model choose label and kind
    #[arg(long, conflicts_with = "quota", help_heading = "Recipe")]
    no_quotas: bool,
    /// How answers are asked for: auto, json, text
    #[arg(long, value_name = "FORMAT", default_value = "auto", value_parser = format_choice, help_heading = "Recipe")]
    format: FormatChoice,
    /// Similarity (0 to 1) from which a tweet repeats an earlier one
    #[arg(long, value_name = "SIMILARITY", default_value_t = 0.6, help_heading = "Recipe")]
    near: f64,
    /// Answers to ask for until one can be used
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Recipe")]
    max_asks: u32,
    /// Do not have a system message written
    #[arg(long, help_heading = "Recipe")]
    no_system_message: bool,
    /// Stop before the whole run costs more, in dollars
    #[arg(long, value_name = "DOLLARS", help_heading = "Budget")]
    max_cost: Option<f64>,
    /// Stop before the whole run takes more tokens
    #[arg(long, value_name = "N", help_heading = "Budget")]
    max_tokens: Option<u64>,
    /// Dollars for a million prompt and completion tokens, as in 2.5/10 [default: the list price, for OpenAI's models]
    #[arg(long, value_name = "PRICE", help_heading = "Budget")]
    price: Option<String>,
    /// Share of the tweets to hold out for evaluation
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    held_out: f64,
}

fn format_choice(text: &str) -> Result<FormatChoice, String> {
    match text {
        "auto" => Ok(FormatChoice::Auto),
        "json" => Ok(FormatChoice::Json),
        "text" => Ok(FormatChoice::Text),
        _ => Err("expected auto, json or text".into()),
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let timeout = Duration::try_from_secs_f64(args.timeout)
        .ok()
        .filter(|timeout| !timeout.is_zero())
        .ok_or_else(|| Usage(format!("--timeout: expected a number of seconds above 0, found {}", args.timeout)))?;
    let client = ChatClient::new(ClientOptions {
        api_base: args.api_base,
        key: ApiKey::find(args.api_key_file.as_deref()).map_err(corpus_error)?,
        timeout,
        retry: RetryPolicy { attempts: args.attempts.max(1), ..RetryPolicy::default() },
        seed: args.seed,
        ..ClientOptions::default()
    })
    .map_err(corpus_error)?;
    let price = match &args.price {
        Some(price) => Some(Price::parse(price).map_err(corpus_error)?),
        None => Price::listed(&args.model, client.url()),
    };
    let quotas = match (args.no_quotas, &args.quota) {
        (true, _) => None,
        (false, Some(quota)) => Some(Quotas::parse(quota).map_err(Usage)?),
        (false, None) => Some(Quotas::default()),
    };
    let options = GenerateOptions {
        count: args.count,
        seed: args.seed,
        task: args.prompt,
        model: args.model,
        temperature: args.temperature,
        examples_shown: args.examples_shown,
        max_answer_tokens: args.max_answer_tokens,
        quotas,
        format: args.format,
        concurrency: args.concurrency,
        near: args.near,
        max_asks: args.max_asks,
        max_cost: args.max_cost,
        max_tokens: args.max_tokens,
        price,
        system_message_tokens: (!args.no_system_message).then_some(500),
    };
    let journal = args.out.join("journal.jsonl");
    let outcome = {
        // Answers that are under way are paid for: the first Ctrl-C waits for them.
        let _stop = exit::clean_stop();
        let bar = Bar(Progress::new("generate", Unit::Of("tweets"), Some(args.count as u64)));
        generate(&client, &options, &journal, &bar).map_err(corpus_error)?
    };
    tell(&outcome, args.count);
    if outcome.stop == Some(Stop::Asked) {
        return Err(Interrupted.into());
    }
    if outcome.examples.is_empty() {
        anyhow::bail!("no tweet was written; the answers are in {}", journal.display());
    }
    super::prepare::run_with(&PrepareOptions {
        inputs: vec![journal],
        out_dir: args.out,
        held_out: args.held_out,
        seed: args.seed,
        ..PrepareOptions::default()
    })
}

struct Bar(Progress);

impl Listener for Bar {
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Started { answers: 0, .. } => {}
            Event::Started { answers, .. } => {
                output::note(format!("going on: the journal holds {}", counted(*answers, "answer")))
            }
            Event::Accepted { done, totals, .. } => {
                self.0.set_position(*done as u64);
                self.0.message(spent(totals));
            }
            Event::Rejected { slot, reason, totals } => {
                output::detail(format!("tweet {slot}: {reason}"));
                self.0.message(spent(totals));
            }
            Event::Failed { problem, pause } => {
                let next =
                    pause.map_or("giving up".to_owned(), |pause| format!("again in {:.0} s", pause.as_secs_f64()));
                output::detail(format!("{problem}; {next}"));
                self.0.message(format!("{next}: {}", problem.lines().next().unwrap_or_default()));
            }
            Event::Note(note) => output::note(note),
        }
    }

    fn stop_asked(&self) -> bool {
        exit::stop_requested()
    }
}

/// `1 tweet`, `2 tweets`.
fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

fn spent(totals: &Totals) -> String {
    match totals.cost {
        Some(cost) => format!("${cost:.4}"),
        None => format!("{} tokens", totals.prompt_tokens + totals.completion_tokens),
    }
}

fn tell(outcome: &Outcome, count: usize) {
    output::note(format!("{} of {count} tweets, {}", outcome.examples.len(), spent(&outcome.totals)));
    for (reason, answers) in &outcome.rejected {
        output::note(format!("not used: {}: {reason}", counted(*answers as usize, "answer")));
    }
    match &outcome.stop {
        Some(Stop::Budget) => output::warn("stopped: the next request would not have fitted into the budget"),
        Some(Stop::Stuck(reason)) => output::warn(format!("stopped: no answer could be used any more ({reason})")),
        Some(Stop::Down(error)) => output::warn(format!("stopped: {error}")),
        Some(Stop::Asked) | None => {}
    }
    if outcome.given_up > 0 {
        output::warn(format!("given up: {}, none of whose answers could be used", counted(outcome.given_up, "tweet")));
    }
    if outcome.unanswered > 0 {
        let left = counted(outcome.unanswered, "tweet");
        output::warn(format!("still to be written: {left}; the same command goes on"));
    }
}
