//! Headers, encodings and references of the embedded files.

use cashtag_web::{CONTENT_SECURITY_POLICY, answer, assets, is_built};

fn header<'a>(answer: &'a cashtag_web::Answer, name: &str) -> Option<&'a str> {
    answer.headers.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str())
}

#[test]
fn every_file_is_sent_with_its_type_and_the_policy() {
    for asset in assets() {
        let plain = answer(asset.path, None, None).unwrap();
        assert_eq!(plain.status, 200);
        assert_eq!(plain.body, asset.identity);
        assert_eq!(header(&plain, "content-type"), Some(asset.content_type), "{}", asset.path);
        assert_eq!(header(&plain, "content-encoding"), None);
        assert_eq!(header(&plain, "content-security-policy"), Some(CONTENT_SECURITY_POLICY));
        assert_eq!(header(&plain, "x-content-type-options"), Some("nosniff"));
        let expected = if asset.path.starts_with("/assets/") { "immutable" } else { "no-cache" };
        assert!(header(&plain, "cache-control").unwrap().contains(expected), "{}", asset.path);
    }
    assert!(answer("/assets/../index.html", None, None).is_none());
    assert!(answer("/etc/passwd", None, None).is_none());
    assert!(answer("", None, None).is_none());
}

#[test]
fn a_known_tag_gets_no_body_and_each_encoding_has_its_own() {
    let first = answer("/", Some("gzip, br"), None).unwrap();
    let tag = header(&first, "etag").unwrap().to_string();
    let again = answer("/", Some("gzip, br"), Some(&tag)).unwrap();
    assert_eq!((again.status, again.body.len()), (304, 0));
    assert_eq!(header(&again, "etag"), Some(tag.as_str()));
    assert_eq!(answer("/", Some("gzip, br"), Some("\"other\"")).unwrap().status, 200);
    if !is_built() {
        eprintln!("skipped: the page is not built (make web), so there are no encodings to compare");
        return;
    }
    let gzip = answer("/", Some("gzip"), None).unwrap();
    assert_eq!(header(&first, "content-encoding"), Some("br"));
    assert_eq!(header(&gzip, "content-encoding"), Some("gzip"));
    assert_eq!(gzip.body[..2], [0x1f, 0x8b]);
    assert_ne!(header(&gzip, "etag"), header(&first, "etag"));
    assert_eq!(answer("/", Some("gzip"), Some(&tag)).unwrap().status, 200, "a tag of another encoding is not ours");
}

/// The policy would stop inline code in the browser; this says so before.
#[test]
fn the_page_has_no_inline_code_and_refers_only_to_embedded_files() {
    let page = std::str::from_utf8(answer("/", None, None).unwrap().body).unwrap();
    for forbidden in ["<style", " style=", " onload", " onclick", "http://", "https://", "//cdn"] {
        assert!(!page.contains(forbidden), "{forbidden} in the page");
    }
    for script in page.split("<script").skip(1) {
        let (tag, rest) = script.split_once('>').unwrap();
        assert!(tag.contains(" src=") && rest.starts_with("</script>"), "an inline script");
    }
    let mut references = 0;
    for attribute in ["src=\"/", "href=\"/"] {
        for part in page.split(attribute).skip(1) {
            let path = format!("/{}", part.split('"').next().unwrap());
            assert!(answer(&path, None, None).is_some(), "{path} is not embedded");
            references += 1;
        }
    }
    assert!(references >= 1);
}
