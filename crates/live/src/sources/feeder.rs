//! A queue between a connection and the log: the connection is read on while the disk is slow, and posts that wait are
//! written together.

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::inlet::Inlet;
use crate::post::Incoming;

const WAITING: usize = 10_000;
const TOGETHER: usize = 500;

pub(super) struct Feeder {
    sender: mpsc::Sender<Incoming>,
    task: JoinHandle<Result<()>>,
}

impl Feeder {
    pub(super) fn start(inlet: Inlet, source: String) -> Self {
        let (sender, mut receiver) = mpsc::channel(WAITING);
        let task = tokio::spawn(async move {
            let mut batch = Vec::with_capacity(TOGETHER);
            while receiver.recv_many(&mut batch, TOGETHER).await > 0 {
                inlet.deliver(&source, std::mem::take(&mut batch)).await?;
            }
            Ok(())
        });
        Self { sender, task }
    }

    /// # Errors
    /// The process stops.
    pub(super) async fn feed(&self, post: Incoming) -> Result<()> {
        self.sender.send(post).await.map_err(|_| Error::Stopped)
    }

    /// Waits until all that was fed is in the log.
    ///
    /// # Errors
    /// The process stops.
    pub(super) async fn finish(self) -> Result<()> {
        drop(self.sender);
        self.task.await.map_err(|_| Error::Stopped)?
    }
}
