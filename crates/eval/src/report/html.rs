//! Writing HTML that cannot be broken out of.
//!
//! Tags, attribute names and raw markup are `&'static str`: they can only come from this program's source. Everything
//! else passes through [`escape`]. There is no other way to put a string into [`Html`].

use std::fmt::Write as _;

/// A piece of markup.
#[derive(Default, Clone)]
pub(super) struct Html(String);

/// Attributes of a tag: the name from the source, the value escaped.
pub(super) type Attributes<'a> = &'a [(&'static str, &'a str)];

impl Html {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Markup from this program's own source.
    pub(super) fn raw(&mut self, markup: &'static str) -> &mut Self {
        self.0.push_str(markup);
        self
    }

    /// Text: escaped.
    pub(super) fn text(&mut self, text: &str) -> &mut Self {
        escape(text, &mut self.0);
        self
    }

    /// A piece that was built before.
    pub(super) fn append(&mut self, piece: &Html) -> &mut Self {
        self.0.push_str(&piece.0);
        self
    }

    pub(super) fn open(&mut self, tag: &'static str, attributes: Attributes<'_>) -> &mut Self {
        self.tag(tag, attributes).raw(">")
    }

    pub(super) fn close(&mut self, tag: &'static str) -> &mut Self {
        self.raw("</").raw(tag).raw(">\n")
    }

    /// `<tag …>text</tag>`
    pub(super) fn leaf(&mut self, tag: &'static str, attributes: Attributes<'_>, text: &str) -> &mut Self {
        self.open(tag, attributes).text(text).close(tag)
    }

    /// `<tag …/>`, for the shapes of SVG.
    pub(super) fn void(&mut self, tag: &'static str, attributes: Attributes<'_>) -> &mut Self {
        self.tag(tag, attributes).raw("/>")
    }

    fn tag(&mut self, tag: &'static str, attributes: Attributes<'_>) -> &mut Self {
        self.raw("<").raw(tag);
        for (name, value) in attributes {
            self.raw(" ").raw(name).raw("=\"").text(value).raw("\"");
        }
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn into_string(self) -> String {
        self.0
    }

    #[cfg(test)]
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Escapes for text and for attribute values in double or single quotes. Control characters that HTML forbids become
/// the replacement character.
fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
}

/// A coordinate: at most two decimals, never "NaN" or "inf".
pub(super) fn px(value: f64) -> String {
    if !value.is_finite() {
        return "0".into();
    }
    trim(format!("{value:.2}"))
}

/// Joins commands of an SVG path: `M1 2L3 4`.
pub(super) fn path(points: &[(f64, f64)]) -> String {
    let mut d = String::new();
    for (i, (x, y)) in points.iter().enumerate() {
        let _ = write!(d, "{}{} {}", if i == 0 { 'M' } else { 'L' }, px(*x), px(*y));
    }
    d
}

fn trim(number: String) -> String {
    if !number.contains('.') {
        return number;
    }
    let short = number.trim_end_matches('0').trim_end_matches('.');
    if short == "-0" { "0".into() } else { short.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        let mut html = Html::new();
        html.leaf("p", &[("title", "a\" onload='x'>&")], "</style><script>alert('1')</script>\u{0}\u{8}&amp;");
        assert_eq!(
            html.as_str(),
            "<p title=\"a&quot; onload=&#39;x&#39;&gt;&amp;\">&lt;/style&gt;&lt;script&gt;alert(&#39;1&#39;)\
             &lt;/script&gt;\u{fffd}\u{fffd}&amp;amp;</p>\n"
        );
    }

    #[test]
    fn coordinates_are_short() {
        assert_eq!([px(1.0), px(-0.001), px(2.346), px(f64::NAN)], ["1", "0", "2.35", "0"]);
        assert_eq!(path(&[(0.0, 1.5), (2.0, 3.0)]), "M0 1.5L2 3");
    }
}
