//! Which certificate authorities are believed: those of the system, as for `curl` and `pip`, so that a company's own is among
//! them; the ones built into the program only where the system has none.

use std::path::{Path, PathBuf};

use ureq::tls::{PemItem, RootCerts, parse_pem};

use crate::output;

/// Bundles of Debian, Fedora, openSUSE, and of Alpine and macOS.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// A bundle has some 200 kB.
const MAX_BYTES: u64 = 16 << 20;

/// `SSL_CERT_FILE` if it is set, else the first bundle of the system that there is.
pub(super) fn roots() -> RootCerts {
    let named = std::env::var_os("SSL_CERT_FILE").filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = &named {
        match read(path) {
            Some(roots) => return roots,
            None => output::warn(format!("SSL_CERT_FILE: no certificates in {}", path.display())),
        }
    }
    BUNDLES.iter().find_map(|path| read(Path::new(path))).unwrap_or(RootCerts::WebPki)
}

/// All certificates of a file; `None` if there are none.
fn read(path: &Path) -> Option<RootCerts> {
    if std::fs::metadata(path).ok()?.len() > MAX_BYTES {
        return None;
    }
    let text = std::fs::read(path).ok()?;
    let certificates: Vec<_> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    (!certificates.is_empty()).then(|| RootCerts::new_with_certs(&certificates))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_and_what_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.pem");
        assert!(read(&path).is_none());
        std::fs::write(&path, "no certificate").unwrap();
        assert!(read(&path).is_none());
        std::fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n").unwrap();
        let Some(RootCerts::Specific(found)) = read(&path) else { panic!() };
        assert_eq!(found[0].der(), [0, 1, 2]);
    }
}
