//! The embedded page as a server sends it, and, where node and Chromium are there, as a browser shows it.

mod browser;
mod page;
