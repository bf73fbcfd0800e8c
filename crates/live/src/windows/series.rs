//! The series that there are: numbers for keys, and what each remembers.

use std::collections::HashMap;
use std::sync::Arc;

use super::baseline::Baseline;
use super::signal::History;
use super::{MARKET, Scope};
use crate::post::ScoredPost;
use crate::tickers::Tickers;

pub(super) struct Series {
    pub(super) scope: Scope,
    pub(super) key: Arc<str>,
    pub(super) name: Option<String>,
    pub(super) baseline: Baseline,
    /// One for each window.
    pub(super) histories: [History; 4],
}

pub(super) struct AllSeries {
    series: Vec<Series>,
    ids: [HashMap<Arc<str>, u32>; 3],
    max: usize,
}

impl AllSeries {
    pub(super) fn new(max: usize) -> Self {
        Self { series: Vec::new(), ids: Default::default(), max }
    }

    pub(super) fn get(&self, id: u32) -> &Series {
        &self.series[id as usize]
    }

    pub(super) fn get_mut(&mut self, id: u32) -> &mut Series {
        &mut self.series[id as usize]
    }

    pub(super) fn find(&self, scope: Scope, key: &str) -> Option<u32> {
        self.ids[scope as usize].get(key).copied()
    }

    /// The number of a series, new if there is room.
    pub(super) fn id(&mut self, scope: Scope, key: &str, name: impl FnOnce() -> Option<String>) -> Option<u32> {
        if let Some(id) = self.find(scope, key) {
            return Some(id);
        }
        if scope == Scope::Ticker && self.series.len() >= self.max {
            return None;
        }
        let id = self.series.len() as u32;
        let key: Arc<str> = key.into();
        self.ids[scope as usize].insert(key.clone(), id);
        self.series.push(Series {
            scope,
            key,
            name: name(),
            baseline: Baseline::default(),
            histories: Default::default(),
        });
        Some(id)
    }

    /// All series that a post counts for, each once.
    pub(super) fn of_post(&mut self, post: &ScoredPost, tickers: &dyn Tickers) -> Vec<u32> {
        let mut ids = Vec::with_capacity(post.tickers.len() + post.sectors.len() + 1);
        for mention in &post.tickers {
            ids.extend(self.id(Scope::Ticker, &mention.symbol, || tickers.name(&mention.symbol)));
        }
        for sector in &post.sectors {
            ids.extend(self.id(Scope::Sector, sector, || None));
        }
        ids.extend(self.id(Scope::Market, MARKET, || None));
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}
