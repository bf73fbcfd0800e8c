//! Publishing with an answer for each message: its place in the stream, or one line about what is wrong.

use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use bytes::Bytes;
use futures_util::future::join_all;

use super::Kind;
use super::connection::Bus;

/// A message, and an id by which the server knows it when it comes again.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    pub(super) subject: String,
    pub(super) id: String,
    pub(super) payload: Bytes,
}

/// One line about what is wrong.
pub(super) type Complaint = String;

impl Bus {
    /// Publishes messages in any order; one answer for each.
    pub(super) async fn publish(&self, kind: Kind, messages: &[Outgoing]) -> Vec<Result<u64, Complaint>> {
        let stream = self.names.stream(kind);
        let send = |m: &Outgoing| {
            let message = PublishMessage::build().payload(m.payload.clone()).message_id(&m.id).expected_stream(&stream);
            let (context, subject) = (self.context.clone(), m.subject.clone());
            async move {
                let acknowledged = match context.send_publish(subject, message).await {
                    Ok(waiting) => waiting.await,
                    Err(e) => Err(e),
                };
                acknowledged.map(|ack| ack.sequence).map_err(|e| complaint(kind.word(), &e))
            }
        };
        join_all(messages.iter().map(send)).await
    }
}

fn complaint(stream: &str, error: &async_nats::jetstream::context::PublishError) -> Complaint {
    match error.kind() {
        PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe => "NATS does not answer".into(),
        PublishErrorKind::StreamNotFound => format!("NATS has no stream of {stream} at the moment"),
        _ => {
            let text = error.to_string();
            if text.contains("maximum bytes") || text.contains("insufficient") || text.contains("resources") {
                format!("the stream of {stream} is full: {text}; --bus-max-bytes, or room on the server's disk")
            } else {
                format!("NATS refuses {stream}: {text}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_nats::jetstream::context::PublishError;

    #[test]
    fn complaints_are_one_line_and_say_the_mend() {
        let full = PublishError::with_source(PublishErrorKind::Other, std::io::Error::other("maximum bytes exceeded"));
        let said = complaint("tasks", &full);
        assert!(said.contains("full") && said.contains("--bus-max-bytes") && !said.contains('\n'), "{said}");
        assert_eq!(complaint("tasks", &PublishError::new(PublishErrorKind::TimedOut)), "NATS does not answer");
    }
}
