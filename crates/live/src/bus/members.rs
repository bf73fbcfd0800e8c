//! Who is there, and who owns which partition of keys.
//!
//! Workers say twice a second that they are there; who says nothing for three seconds is gone. A partition goes to the
//! worker with the highest hash of both, so that one that comes or leaves moves as few partitions as can be.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::wire::Presence;

pub(super) const BEAT: Duration = Duration::from_millis(250);
pub(super) const PRESENCE: Duration = Duration::from_millis(500);
const GONE: Duration = Duration::from_secs(3);
/// More are not listened to.
const MAX_WORKERS: usize = 1_024;

struct Member {
    heard: Instant,
    presence: Presence,
    /// Posts a second, a mean over about ten seconds.
    rate: f64,
}

#[derive(Default)]
pub(super) struct Members(BTreeMap<String, Member>);

impl Members {
    pub(super) fn heard(&mut self, presence: Presence, now: Instant) {
        if presence.leaving {
            self.0.remove(&presence.id);
            return;
        }
        if self.0.len() >= MAX_WORKERS && !self.0.contains_key(&presence.id) {
            return;
        }
        let (before, rate) = match self.0.get(&presence.id) {
            Some(m) => (Some((m.presence.scored, m.heard)), m.rate),
            None => (None, 0.0),
        };
        let rate = before.map_or(0.0, |(scored, heard)| {
            let seconds = now.duration_since(heard).as_secs_f64().max(0.001);
            let keep = (-seconds / 10.0).exp();
            rate * keep + presence.scored.saturating_sub(scored) as f64 / seconds * (1.0 - keep)
        });
        self.0.insert(presence.id.clone(), Member { heard: now, presence, rate });
    }

    pub(super) fn forget_the_gone(&mut self, now: Instant) {
        self.0.retain(|_, m| now.duration_since(m.heard) < GONE);
    }

    pub(super) fn owners(&self, partitions: u32) -> Vec<Option<String>> {
        let able: Vec<&str> = self.0.values().filter(|m| m.presence.windows).map(|m| &*m.presence.id).collect();
        (0..partitions).map(|p| able.iter().max_by_key(|id| (weight(p, id), **id)).map(|id| (*id).to_owned())).collect()
    }

    /// Workers that score with this version, and others that score.
    pub(super) fn scorers(&self, version: &str) -> (usize, usize) {
        let all = self.0.values().filter_map(|m| m.presence.version.as_deref());
        let (ours, others): (Vec<&str>, Vec<&str>) = all.partition(|v| *v == version);
        (ours.len(), others.len())
    }

    pub(super) fn to_json(&self, now: Instant) -> Value {
        let show = |m: &Member| {
            json!({
                "id": m.presence.id, "scores_with": m.presence.version, "scored_total": m.presence.scored,
                "failed_total": m.presence.failed, "posts_per_s": (m.rate * 100.0).round() / 100.0,
                "windows": m.presence.partitions.iter().map(|(_, n)| n).sum::<u64>(),
                "partitions": m.presence.partitions.iter().map(|(p, _)| p).collect::<Vec<_>>(),
                "heard_ms_ago": now.duration_since(m.heard).as_millis() as u64,
            })
        };
        self.0.values().map(show).collect()
    }
}

/// A hash of both. A checksum of the two in a row would not do: for workers with names of one length it has the same order in
/// nearly every partition. The end is SplitMix64's.
fn weight(partition: u32, id: &str) -> u64 {
    let mut x = u64::from(crc32fast::hash(id.as_bytes())) << 32 | u64::from(partition);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn presence(id: &str, windows: bool) -> Presence {
        Presence { id: id.into(), windows, version: Some("v".into()), ..Presence::default() }
    }

    #[test]
    fn partitions_move_only_from_those_that_leave_and_to_those_that_come() {
        let (mut members, now) = (Members::default(), Instant::now());
        assert_eq!(members.owners(2), [None, None]);
        for id in ["a", "b", "c"] {
            members.heard(presence(id, true), now);
        }
        members.heard(presence("scorer", false), now);
        let before = members.owners(64);
        let count = |owners: &[Option<String>], id: &str| owners.iter().flatten().filter(|o| *o == id).count();
        assert!(["a", "b", "c"].iter().all(|id| count(&before, id) > 8) && count(&before, "scorer") == 0);
        members.heard(Presence { leaving: true, ..presence("b", true) }, now);
        let after = members.owners(64);
        for (old, new) in before.iter().zip(&after) {
            assert!(old == new || old.as_deref() == Some("b"));
        }
        assert_eq!(count(&after, "b"), 0);
        assert_eq!((members.scorers("v"), members.scorers("w")), ((3, 0), (0, 3)));
        members.forget_the_gone(now + GONE);
        assert_eq!(members.owners(1), [None]);
    }
}
