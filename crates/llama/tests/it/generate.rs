//! Generation on the real model: the tokens that Transformers writes (`generation.json`, by `make_generation_goldens.py`),
//! and that a sequence does not depend on what is written beside it.

use std::sync::{Arc, OnceLock};

use cashtag_backend_cpu::{CpuBackend, Precision};
use cashtag_llama::chat::{ChatTemplate, Message};
use cashtag_llama::checkpoint::Checkpoint;
use cashtag_llama::generate::{FinishReason, Generator, GeneratorOptions, Request, Sampling, SequenceId};
use cashtag_llama::model::Llama;
use cashtag_llama::tokenizer::Tokenizer;

use super::{golden, ids, list, model, text};

struct Loaded {
    backend: CpuBackend,
    model: Llama<CpuBackend>,
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
}

fn loaded() -> &'static Loaded {
    static LOADED: OnceLock<Loaded> = OnceLock::new();
    LOADED.get_or_init(|| {
        let backend = CpuBackend::new(Precision::F32, 2).unwrap();
        let checkpoint = Checkpoint::open(&model()).unwrap();
        let model = Llama::load(&backend, &checkpoint, |_, _| {}).unwrap();
        let tokenizer = Arc::new(checkpoint.tokenizer().unwrap());
        Loaded { backend, model, tokenizer, template: checkpoint.chat_template().unwrap() }
    })
}

impl Loaded {
    fn generator(
        &self,
        prefix: &[u32],
        kv_rows: usize,
        max_tokens: usize,
        max_sequences: usize,
    ) -> Generator<CpuBackend> {
        let options = GeneratorOptions { prefix: prefix.to_vec(), kv_rows, max_tokens, max_sequences };
        Generator::new(&self.backend, &self.model, None, Arc::clone(&self.tokenizer), options).unwrap()
    }

    fn prompt(&self, user: &str) -> Vec<u32> {
        self.tokenizer.encode_rendered(&self.template.render(&[Message::new("user", user)], true).unwrap())
    }
}

/// What became of a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
struct Written {
    tokens: Vec<u32>,
    text: String,
    finish: Option<FinishReason>,
}

/// Steps until nothing is left to do; `between` is called after each step.
fn run(
    l: &Loaded,
    generator: &mut Generator<CpuBackend>,
    written: &mut Vec<(SequenceId, Written)>,
    mut between: impl FnMut(usize, &mut Generator<CpuBackend>, &mut Vec<(SequenceId, Written)>),
) {
    for step in 0.. {
        if generator.is_idle() {
            return;
        }
        for event in generator.step(&l.backend, &l.model, None).unwrap() {
            let (_, w) = written.iter_mut().find(|(id, _)| *id == event.id).expect("an event of a known sequence");
            assert_eq!(w.finish, None, "nothing comes after the end");
            w.tokens.push(event.token.token);
            w.text += &event.text;
            w.finish = event.finish;
        }
        between(step, generator, written);
        assert!(step < 10_000, "it does not end");
    }
}

fn add(
    generator: &mut Generator<CpuBackend>,
    written: &mut Vec<(SequenceId, Written)>,
    request: Request,
) -> SequenceId {
    let id = generator.add(request).unwrap();
    written.push((id, Written::default()));
    id
}

fn alone(l: &Loaded, request: Request) -> Written {
    let mut generator = l.generator(&[], 512, 512, 1);
    let mut written = Vec::new();
    add(&mut generator, &mut written, request);
    run(l, &mut generator, &mut written, |_, _, _| {});
    written.remove(0).1
}

/// 20 prompts of up to 100 tokens, written together, token by token as Transformers writes them one by one.
#[test]
fn greedy_is_transformers() {
    let l = loaded();
    let cases = golden("generation.json");
    let mut generator = l.generator(&[], 20 * 256, 256, 20);
    let mut written = Vec::new();
    for case in list(&cases) {
        let prompt = match case.get("text") {
            Some(plain) => l.tokenizer.encode(text(plain)),
            None => {
                let mut messages = Vec::new();
                messages.extend(case["system"].as_str().map(|s| Message::new("system", s)));
                messages.push(Message::new("user", text(&case["user"])));
                l.tokenizer.encode_rendered(&l.template.render(&messages, true).unwrap())
            }
        };
        assert_eq!(prompt, ids(&case["prompt"]), "{case}");
        add(
            &mut generator,
            &mut written,
            Request { continues: case.get("text").is_some(), ..Request::new(prompt, 100) },
        );
    }
    run(l, &mut generator, &mut written, |_, _, _| {});
    let (mut tokens, mut smallest) = (0, f64::INFINITY);
    for ((_, found), case) in written.iter().zip(list(&cases)) {
        let expected = ids(&case["tokens"]);
        let leads: Vec<f64> = list(&case["leads"]).iter().map(|x| x.as_f64().unwrap()).collect();
        if let Some(at) = (0..expected.len()).find(|&i| found.tokens.get(i) != Some(&expected[i])) {
            panic!(
                "{:?}: token {at} is {:?}, Transformers has {} with a lead of {}",
                case.get("user").or(case.get("text")),
                found.tokens.get(at),
                expected[at],
                leads[at]
            );
        }
        assert_eq!(found.tokens, expected);
        assert_eq!(found.text, text(&case["output"]));
        let ended = expected.last() == Some(&2);
        assert_eq!(found.finish, Some(if ended { FinishReason::Stop } else { FinishReason::Length }));
        tokens += expected.len();
        smallest = leads.iter().copied().fold(smallest, f64::min);
    }
    println!("{tokens} tokens are equal; the closest decision has a lead of {smallest}");
}

/// Prompts come and go, wait for room and are read in pieces; each is written as if it were alone.
#[test]
fn sequences_do_not_see_each_other() {
    let l = loaded();
    let prompts = ["What is a bond?", "Name three colours.", "Why is the sky blue?", "Say hello.", "Count to five."];
    let request = |i: usize| Request::new(l.prompt(prompts[i]), 8);
    let expected: Vec<Written> = (0..prompts.len()).map(|i| alone(l, request(i))).collect();
    // Room for three at a time, and steps of seven rows: a prompt of some 30 tokens takes several.
    let prefix = &l.prompt("x")[..12];
    let rows = generator_rows(l, prefix, &request(0)) * 3;
    let mut generator = l.generator(prefix, rows, 7, 4);
    let mut written = Vec::new();
    let mut removed = None;
    for i in 0..3 {
        add(&mut generator, &mut written, request(i));
    }
    run(l, &mut generator, &mut written, |step, generator, written| match step {
        4 => {
            add(generator, written, request(3));
            removed = Some(add(generator, written, request(0)));
        }
        9 => {
            add(generator, written, request(4));
        }
        14 => assert!(generator.remove(removed.unwrap()) && !generator.remove(removed.unwrap())),
        _ => {}
    });
    let kept: Vec<&Written> = written.iter().filter(|(id, _)| Some(*id) != removed).map(|(_, w)| w).collect();
    assert_eq!(kept, expected.iter().collect::<Vec<_>>());
}

fn generator_rows(l: &Loaded, prefix: &[u32], request: &Request) -> usize {
    l.generator(prefix, 512, 16, 1).rows_of(request) + 2
}

#[test]
fn stop_strings_seeds_and_limits() {
    let l = loaded();
    let prompt = l.prompt("Name three colours.");
    let plain = alone(l, Request::new(prompt.clone(), 24));
    assert!(plain.text.len() > 20, "{plain:?}");
    // The text ends before the stop string, wherever tokens are cut.
    let stop = plain.text.char_indices().nth(12).map(|(at, _)| plain.text[at..at + 3].to_string()).unwrap();
    let cut = alone(l, Request { stop: vec!["never".into(), stop.clone()], ..Request::new(prompt.clone(), 24) });
    assert_eq!(cut.text, plain.text[..plain.text.find(&stop).unwrap()]);
    assert_eq!(cut.finish, Some(FinishReason::Stop));
    assert!(cut.tokens.len() < plain.tokens.len() && plain.tokens.starts_with(&cut.tokens));
    // A seed gives the same text, whatever is written beside it.
    let drawn = |seed| Request {
        sampling: Sampling { temperature: 1.0, top_p: 0.9, top_k: 50, seed },
        ..Request::new(prompt.clone(), 12)
    };
    let first = alone(l, drawn(1));
    assert_ne!(first, alone(l, drawn(2)));
    let mut generator = l.generator(&[], 512, 64, 8);
    let mut written = Vec::new();
    for seed in [2, 1, 3] {
        add(&mut generator, &mut written, drawn(seed));
    }
    run(l, &mut generator, &mut written, |_, _, _| {});
    assert_eq!(written[1].1, first);
    // What could never be done is refused at once.
    let refused = |r: Request| l.generator(&[], 64, 64, 1).add(r).unwrap_err().to_string();
    assert!(refused(Request::new(Vec::new(), 5)).starts_with("a prompt has no tokens"));
    assert!(refused(Request::new(vec![1; 8192], 1)).starts_with("a prompt of 8192 tokens leaves no room"));
    assert!(refused(Request::new(vec![1; 60], 6)).starts_with("prompt and answer take 65 rows"));
    assert!(refused(Request::new(vec![1], 0)).starts_with("max_new_tokens is 0"));
    let error = l.generator(&[], 64, 64, 1);
    let mut error = error;
    error.add(Request::new(vec![60_000], 1)).unwrap();
    let error = error.step(&l.backend, &l.model, None).unwrap_err().to_string();
    assert!(error.starts_with("token 60000 is outside the model's vocabulary"), "{error}");
}

/// A conversation goes on from the rows of its earlier turns and says what it would have said from the start.
#[test]
fn a_kept_sequence_goes_on() {
    let l = loaded();
    let mut messages = vec![Message::new("user", "My name is Ada.")];
    let tokens = |messages: &[Message]| l.tokenizer.encode_rendered(&l.template.render(messages, true).unwrap());
    let mut generator = l.generator(&[], 256, 256, 1);
    let mut written = Vec::new();
    let keep = |prompt| Request { keep: Some(200), ..Request::new(prompt, 12) };
    let id = add(&mut generator, &mut written, keep(tokens(&messages)));
    run(l, &mut generator, &mut written, |_, _, _| {});
    let first = written.remove(0).1;
    messages.push(Message::new("assistant", first.text));
    messages.push(Message::new("user", "What is my name?"));
    let prompt = tokens(&messages);
    generator.again(id, keep(prompt.clone())).unwrap();
    written.push((id, Written::default()));
    run(l, &mut generator, &mut written, |_, _, _| {});
    assert_eq!(written[0].1, alone(l, Request::new(prompt, 12)));
    let error = generator.again(id, keep(vec![1; 250])).unwrap_err().to_string();
    assert!(error.starts_with("prompt and answer take 261 rows of keys and values, there are 256"), "{error}");
    assert!(generator.remove(id) && generator.again(id, keep(vec![1])).is_err());
}
