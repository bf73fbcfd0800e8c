//! Integration tests: files, the built-in corpus, `prepare`, and generation against a real server on a real socket.

mod builtin;
mod faults;
mod formats;
mod generation;
mod hostile;
mod interrupted;
mod prepare;
mod server;
