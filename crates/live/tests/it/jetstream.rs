//! Bluesky's Jetstream, played by a small server that misbehaves.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cashtag_live::sources::Source;
use cashtag_live::sources::jetstream::{Jetstream, JetstreamOptions};
use futures_util::SinkExt;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

use crate::rig::{Letters, Rig, listening};

type Socket = WebSocketStream<TcpStream>;

/// What the server does with connection number n; the requested address is kept.
async fn serve(listener: TcpListener, asked: Arc<Mutex<Vec<String>>>) {
    let mut number = 0;
    while let Ok((socket, _)) = listener.accept().await {
        let asked = asked.clone();
        tokio::spawn(async move {
            if number == 0 {
                // Accepted, and gone.
                return;
            }
            let mut path = String::new();
            #[allow(clippy::result_large_err, reason = "the signature is the library's")]
            let note = |request: &Request, response: Response| {
                path = request.uri().to_string();
                Ok(response)
            };
            let mut socket = tokio_tungstenite::accept_hdr_async(socket, note).await.unwrap();
            asked.lock().unwrap().push(path);
            let _ = play(number, &mut socket).await;
        });
        number += 1;
    }
}

fn now_us() -> i64 {
    cashtag_live::time::now() * 1_000
}

fn post(n: u32, text: &str) -> Message {
    let event = json!({"did": format!("did:plc:{}", n % 5), "time_us": now_us() + i64::from(n), "kind": "commit", "commit": {
        "operation": "create", "collection": "app.bsky.feed.post", "rkey": format!("r{n}"),
        "record": {"text": text, "createdAt": cashtag_live::time::rfc3339(cashtag_live::time::now())}}});
    Message::text(event.to_string())
}

async fn play(number: u32, socket: &mut Socket) -> Result<(), tokio_tungstenite::tungstenite::Error> {
    match number {
        // Ten posts, among what others get as well, and the connection drops in the middle of nothing.
        1 => {
            socket.send(Message::text(r#"{"did":"x","time_us":1,"kind":"identity"}"#)).await?;
            for n in 0..10 {
                socket.send(post(n, &format!("$AAA goes up, says number {n}"))).await?;
                socket.send(post(1_000 + n, "no ticker here")).await?;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            Ok(())
        }
        // Five again, garbage, five new, then silence.
        2 => {
            for n in 5..15 {
                socket.send(post(n, &format!("$AAA goes up, says number {n}"))).await?;
                socket.send(Message::text("{\"kind\": \"commit\", ")).await?;
                socket.send(Message::binary(vec![0xff; 100])).await?;
            }
            tokio::time::sleep(Duration::from_secs(3_600)).await;
            Ok(())
        }
        // A message that is too long to be one.
        3 => socket.send(Message::text("x".repeat(3 << 20))).await,
        // A flood, properly closed.
        4 => {
            for n in 0..3_000 {
                socket.send(post(n, &format!("$BBB goes down, says number {n}"))).await?;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
            socket.close(None).await
        }
        _ => {
            tokio::time::sleep(Duration::from_secs(3_600)).await;
            Ok(())
        }
    }
}

#[test]
fn posts_come_through_drops_silence_garbage_and_floods() {
    let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = server.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    server.spawn(serve(listener, asked.clone()));
    let dir = tempfile::tempdir().unwrap();
    let options = JetstreamOptions {
        url: format!("ws://{address}/subscribe"),
        silence: Duration::from_secs(1),
        time_scale: 0.1,
        ..JetstreamOptions::default()
    };
    let source: Box<dyn Source> = Box::new(Jetstream::new(options, Arc::new(Letters)));
    let rig = Rig::start(listening(&dir.path().join("data")), vec![source]);
    // 15 of $AAA; of the flood those numbers that were not $AAA's already (the same author and key are the same post).
    rig.until("every post once", |r| r.scored() == 3_000);
    rig.until("the market knows", |r| r.get("/v1/overview?window=1d")["market"]["mentions"] == 3_000);
    let aaa = rig.get("/v1/signals/AAA?window=1d");
    assert_eq!(aaa["signals"].as_array().unwrap().iter().map(|s| s["mentions"].as_u64().unwrap()).sum::<u64>(), 15);
    let letters = rig.get("/v1/dead-letters");
    assert_eq!(letters["items"].as_array().unwrap().len(), 10, "{letters}");
    let source = &rig.get("/v1/overview")["sources"][0];
    assert!(source["reconnects"].as_u64().unwrap() >= 3, "{source}");
    let asked = asked.lock().unwrap().clone();
    assert!(asked.len() >= 4, "{asked:?}");
    assert!(asked[0].contains("wantedCollections=app.bsky.feed.post") && !asked[0].contains("cursor"), "{asked:?}");
    // Five seconds before what was seen last.
    let cursor: i64 = asked[1].split("cursor=").nth(1).unwrap().parse().unwrap();
    assert!((now_us() - cursor) < 60_000_000 && now_us() - cursor > 4_000_000, "{asked:?}");
}
