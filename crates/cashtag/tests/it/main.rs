//! The whole program, run as a user runs it: what it prints, with which code it ends, what it leaves behind.

mod bus;
mod cli;
mod combine;
mod config;
mod context;
mod export;
mod generate;
mod generation;
mod killed;
mod labels;
mod live;
mod model_commands;
mod page;
mod plan;
mod predict_files;
mod pull;
mod ranks;
mod serve;
mod serve_documented;
mod serve_hostile;
mod serve_restarts;
#[allow(dead_code, unreachable_pub, reason = "shared with the unit tests of the hub")]
mod server;
mod serving;
mod tiny;
