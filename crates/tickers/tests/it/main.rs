//! The crate from outside: texts as people write them, symbol files as people make them, and random ones.

mod finder;
mod properties;
mod symbols;
