//! The sums of one window. Posts are added in the order of the log, so a restart that adds the stored posts again has the
//! same sums to the bit.

use super::authors::Authors;
use crate::id::Id;
use crate::post::ScoredPost;
use crate::scorer::Polarity;

/// Posts shown behind a number.
const TOP: usize = 5;

#[derive(Clone, Debug, Default)]
pub(super) struct Accumulator {
    pub(super) mentions: u64,
    pub(super) positive: u64,
    pub(super) negative: u64,
    pub(super) copies: u64,
    pub(super) damped: u64,
    pub(super) weight: f64,
    pub(super) weight_squares: f64,
    pub(super) weighted_score: f64,
    pub(super) weighted_square: f64,
    pub(super) positive_weight: f64,
    pub(super) negative_weight: f64,
    pub(super) authors: Authors,
    pub(super) top: Vec<Top>,
    /// 0 while open.
    pub(super) revision: u32,
}

#[derive(Clone, Debug)]
pub(super) struct Top {
    pub(super) rank: f64,
    pub(super) seq: u64,
    pub(super) id: Id,
}

impl Accumulator {
    pub(super) fn add(&mut self, post: &ScoredPost, id: &Id, polarity: Polarity, author: u64) {
        self.authors.add(author);
        self.copies += u64::from(post.is_copy_of.is_some());
        self.damped += u64::from(post.damped);
        let (positive, negative) = (post.label == polarity.positive, post.label == polarity.negative);
        self.add_score(post.seq, id, post.score, post.weight, positive, negative);
    }

    pub(super) fn add_score(&mut self, seq: u64, id: &Id, score: f64, weight: f64, positive: bool, negative: bool) {
        self.mentions += 1;
        self.positive += u64::from(positive);
        self.negative += u64::from(negative);
        self.weight += weight;
        self.weight_squares += weight * weight;
        self.weighted_score += weight * score;
        self.weighted_square += weight * score * score;
        self.positive_weight += if positive { weight } else { 0.0 };
        self.negative_weight += if negative { weight } else { 0.0 };
        let rank = weight * score.abs();
        // The most decided posts; of equals the newer.
        let at = self.top.partition_point(|t| (t.rank, t.seq) > (rank, seq));
        if at < TOP {
            // Never more room than is used: most windows have few posts, and there are many of them.
            self.top.truncate(TOP - 1);
            self.top.reserve_exact(1);
            self.top.insert(at, Top { rank, seq, id: id.clone() });
        }
    }
}
