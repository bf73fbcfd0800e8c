//! The two request headers that decide what is sent: `Accept-Encoding` and `If-None-Match` (RFC 9110, 12.5.3 and 13.1.2).

/// Whether `header` allows `coding`: named with a weight above zero, or covered by `*`. Content that is not encoded needs no
/// permission here, since an empty or missing header gets it.
pub(crate) fn accepts(header: &str, coding: &str) -> bool {
    let mut star = false;
    for part in header.split(',') {
        let mut fields = part.split(';');
        let name = fields.next().unwrap_or("").trim();
        // A weight that cannot be read counts as a refusal: plain content is always right.
        let weight = fields
            .find_map(|f| f.trim().strip_prefix("q=").or_else(|| f.trim().strip_prefix("Q=")))
            .map_or(1.0, |q| q.trim().parse::<f32>().unwrap_or(0.0));
        if name.eq_ignore_ascii_case(coding) {
            return weight > 0.0;
        }
        if name == "*" {
            star = weight > 0.0;
        }
    }
    star
}

/// Whether one of the listed tags is ours, by the weak comparison that `If-None-Match` uses.
pub(crate) fn etag_matches(header: &str, etag: &str) -> bool {
    header.split(',').map(str::trim).any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_are_taken_when_named_and_not_refused() {
        for (header, coding, expected) in [
            ("gzip, deflate, br", "br", true),
            ("gzip;q=1.0, br;q=0", "br", false),
            ("gzip; q=0.5", "gzip", true),
            ("*", "br", true),
            ("*;q=0", "br", false),
            ("br;q=0, *", "br", false),
            ("BR", "br", true),
            ("", "gzip", false),
            ("gzipped", "gzip", false),
            ("gzip;q=nonsense", "gzip", false),
        ] {
            assert_eq!(accepts(header, coding), expected, "{header:?} {coding}");
        }
    }

    #[test]
    fn tags_match_weakly_and_in_lists() {
        assert!(etag_matches("\"a\", W/\"b\"", "\"b\""));
        assert!(etag_matches("*", "\"b\""));
        assert!(!etag_matches("\"a\", b", "\"b\""));
    }
}
