//! The pipeline as a whole, over real files, sockets and processes. The model is a pure function of the text, so that an
//! oracle can compute every number from the input alone; the real model is tested with the binary.

mod api;
mod bus;
mod bus_kill;
mod clock;
mod disk;
mod export;
mod faults;
mod jetstream;
mod kill;
mod minute;
mod nats;
mod oracle;
mod page;
mod pg;
mod place;
mod postgres;
mod replay;
mod rig;
mod soak;
mod stores;
mod x;
