//! Counters, gauges and histograms in Prometheus' text format.
//!
//! A family has a name, a help line and the names of its labels; its members are made when they are first used. Label
//! values come from the program (routes, adapters, outcomes), never from a request, so their number is bounded.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A number that only grows, or (as a gauge) is set.
#[derive(Default)]
pub struct Number(AtomicU64);

impl Number {
    pub fn inc(&self) {
        self.add(1);
    }

    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How often values fell below each bound.
pub struct Histogram {
    bounds: Arc<[f64]>,
    counts: Box<[AtomicU64]>,
    /// Bits of an f64.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: Arc<[f64]>) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }

    pub fn observe(&self, value: f64) {
        let at = self.bounds.partition_point(|b| *b < value);
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        let add = |bits| Some((f64::from_bits(bits) + value).to_bits());
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().map(|c| c.load(Ordering::Relaxed)).sum()
    }
}

/// Seconds, from 1 ms to 65 s by factors of two: classification takes milliseconds, generation minutes.
pub fn seconds() -> Vec<f64> {
    (0..17).map(|i| 0.001 * f64::from(1 << i)).collect()
}

enum Kind {
    Counter,
    Gauge,
    Histogram(Arc<[f64]>),
}

enum Member {
    Number(Arc<Number>),
    Histogram(Arc<Histogram>),
}

/// Members of one name, told apart by label values.
pub struct Family {
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
    kind: Kind,
    members: Mutex<BTreeMap<Vec<String>, Member>>,
}

impl Family {
    fn member<T>(&self, values: &[&str], take: impl Fn(&Member) -> Option<Arc<T>>) -> Option<Arc<T>> {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let key: Vec<String> = values.iter().map(|v| v.to_string()).collect();
        take(members.entry(key).or_insert_with(|| match &self.kind {
            Kind::Histogram(bounds) => Member::Histogram(Arc::new(Histogram::new(bounds.clone()))),
            _ => Member::Number(Arc::default()),
        }))
    }

    fn type_name(&self) -> &'static str {
        match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        }
    }

    fn write(&self, out: &mut String) {
        let _ = writeln!(out, "# HELP {} {}\n# TYPE {} {}", self.name, self.help, self.name, self.type_name());
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        for (values, member) in members.iter() {
            let mut labels: Vec<String> =
                self.labels.iter().zip(values).map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
            match member {
                Member::Number(n) => {
                    let _ = writeln!(out, "{}{} {}", self.name, braced(&labels), n.get());
                }
                Member::Histogram(h) => {
                    let mut total = 0;
                    let bounds = h.bounds.iter().map(f64::to_string).chain(["+Inf".to_string()]);
                    for (bound, count) in bounds.zip(&h.counts) {
                        total += count.load(Ordering::Relaxed);
                        labels.push(format!("le=\"{bound}\""));
                        let _ = writeln!(out, "{}_bucket{} {total}", self.name, braced(&labels));
                        labels.pop();
                    }
                    let sum = f64::from_bits(h.sum.load(Ordering::Relaxed));
                    let labels = braced(&labels);
                    let _ = writeln!(out, "{0}_sum{labels} {sum}\n{0}_count{labels} {total}", self.name);
                }
            }
        }
    }
}

fn braced(labels: &[String]) -> String {
    if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// All families of a service; clones are the same.
#[derive(Clone, Default)]
pub struct Registry {
    families: Arc<Mutex<Vec<Arc<Family>>>>,
}

/// A family of counters or gauges.
#[derive(Clone)]
pub struct Numbers(Arc<Family>);

impl Numbers {
    /// The member with these label values, in the order of the family's labels.
    pub fn with(&self, values: &[&str]) -> Arc<Number> {
        let take = |m: &Member| if let Member::Number(n) = m { Some(n.clone()) } else { None };
        self.0.member(values, take).unwrap_or_default()
    }

    pub fn one(&self) -> Arc<Number> {
        self.with(&[])
    }
}

/// A family of histograms.
#[derive(Clone)]
pub struct Histograms(Arc<Family>);

impl Histograms {
    pub fn with(&self, values: &[&str]) -> Arc<Histogram> {
        let take = |m: &Member| if let Member::Histogram(h) = m { Some(h.clone()) } else { None };
        self.0.member(values, take).unwrap_or_else(|| Arc::new(Histogram::new(Arc::from([]))))
    }

    pub fn one(&self) -> Arc<Histogram> {
        self.with(&[])
    }
}

impl Registry {
    fn family(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
        kind: Kind,
    ) -> Arc<Family> {
        let family = Arc::new(Family { name, help, labels, kind, members: Mutex::default() });
        self.families.lock().unwrap_or_else(PoisonError::into_inner).push(family.clone());
        family
    }

    pub fn counters(&self, name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Numbers {
        Numbers(self.family(name, help, labels, Kind::Counter))
    }

    pub fn gauges(&self, name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Numbers {
        Numbers(self.family(name, help, labels, Kind::Gauge))
    }

    /// `bounds` ascend.
    pub fn histograms(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
        bounds: Vec<f64>,
    ) -> Histograms {
        Histograms(self.family(name, help, labels, Kind::Histogram(bounds.into())))
    }

    /// Everything, as `/metrics` answers it.
    pub fn text(&self) -> String {
        let families = self.families.lock().unwrap_or_else(PoisonError::into_inner).clone();
        families.iter().fold(String::new(), |mut out, family| {
            family.write(&mut out);
            out
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_format() {
        let registry = Registry::default();
        let requests = registry.counters("requests_total", "Requests.", &["route", "status"]);
        requests.with(&["/predict", "200"]).add(2);
        requests.with(&["/a\"b", "200"]).inc();
        registry.gauges("queue", "Waiting.", &[]).one().set(7);
        let time = registry.histograms("time_seconds", "Time.", &[], vec![0.1, 1.0]);
        for value in [0.1, 0.5, 3.0] {
            time.one().observe(value);
        }
        assert_eq!(
            registry.text(),
            "# HELP requests_total Requests.\n# TYPE requests_total counter\n\
             requests_total{route=\"/a\\\"b\",status=\"200\"} 1\nrequests_total{route=\"/predict\",status=\"200\"} 2\n\
             # HELP queue Waiting.\n# TYPE queue gauge\nqueue 7\n\
             # HELP time_seconds Time.\n# TYPE time_seconds histogram\n\
             time_seconds_bucket{le=\"0.1\"} 1\ntime_seconds_bucket{le=\"1\"} 2\ntime_seconds_bucket{le=\"+Inf\"} 3\n\
             time_seconds_sum 3.6\ntime_seconds_count 3\n"
        );
    }
}
