//! Chat templates against Jinja as Transformers runs it.

use cashtag_llama::chat::{ChatTemplate, Message};

use crate::{golden, list, text};

#[test]
fn renders_as_transformers_does() {
    let golden = golden("templates.json");
    for template in list(&golden) {
        let name = text(&template["name"]);
        let compiled = ChatTemplate::new(text(&template["template"]), "<s>", "</s>").unwrap();
        for case in list(&template["cases"]) {
            let messages: Vec<Message> =
                list(&case["messages"]).iter().map(|m| Message::new(text(&m["role"]), text(&m["content"]))).collect();
            let rendered = compiled.render(&messages, case["add_generation_prompt"].as_bool().unwrap());
            match case["text"].as_str() {
                None => assert!(rendered.is_err(), "{name}: {messages:?}"),
                Some(expected) => {
                    let rendered = rendered.unwrap_or_else(|error| panic!("{name}: {error}: {messages:?}"));
                    assert_eq!(rendered.text, expected, "{name}");
                    let cores = messages
                        .iter()
                        .map(|m| m.content.trim().trim_matches(['\u{1C}']))
                        .filter(|core| !core.is_empty());
                    let found: Vec<&str> = rendered.content.iter().map(|range| &rendered.text[range.clone()]).collect();
                    assert_eq!(found.len(), cores.clone().count(), "{name}");
                    for (found, core) in found.iter().zip(cores) {
                        assert!(found.contains(core), "{name}: {found:?} {core:?}");
                    }
                }
            }
        }
    }
}
