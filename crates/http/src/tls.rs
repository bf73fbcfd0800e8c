//! TLS by rustls: a certificate chain and a key in PEM files, read again when they change.
//!
//! Certificates are renewed while a service runs. The files' times are looked at with new connections, once a minute at most;
//! files that cannot be read then leave the old pair in force.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::{Error, Result};

/// Where certificate chain and private key lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

pub(crate) struct Tls {
    files: TlsFiles,
    state: Mutex<State>,
}

struct State {
    acceptor: TlsAcceptor,
    times: Option<(SystemTime, SystemTime)>,
    looked: Instant,
}

const LOOK_EVERY: Duration = Duration::from_secs(60);

impl Tls {
    pub(crate) fn open(files: TlsFiles) -> Result<Self> {
        let times = times(&files);
        let state = State { acceptor: load(&files)?, times, looked: Instant::now() };
        Ok(Self { files, state: Mutex::new(state) })
    }

    /// What to accept the next connection with, and what went wrong if changed files cannot be used.
    pub(crate) fn acceptor(&self) -> (TlsAcceptor, Option<Error>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut failed = None;
        if state.looked.elapsed() >= LOOK_EVERY {
            state.looked = Instant::now();
            let now = times(&self.files);
            if now.is_some() && now != state.times {
                match load(&self.files) {
                    Ok(acceptor) => (state.acceptor, state.times) = (acceptor, now),
                    Err(e) => failed = Some(e),
                }
            }
        }
        (state.acceptor.clone(), failed)
    }
}

fn times(files: &TlsFiles) -> Option<(SystemTime, SystemTime)> {
    let time = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    Some((time(&files.certificate)?, time(&files.key)?))
}

fn load(files: &TlsFiles) -> Result<TlsAcceptor> {
    let failed = |path: &Path, what: String| Error::Tls(format!("{}: {what}", path.display()));
    let path = &files.certificate;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| failed(path, format!("no certificates in PEM format: {e}")))?;
    if chain.is_empty() {
        return Err(failed(path, "no certificate in it, expected PEM (-----BEGIN CERTIFICATE-----)".into()));
    }
    let path = &files.key;
    let key = PrivateKeyDer::from_pem_file(path)
        .map_err(|e| failed(path, format!("no private key in PEM format without a password: {e}")))?;
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|e| {
            failed(
                path,
                format!("cannot be used with {}: {e}\n  hint: do they belong together?", files.certificate.display()),
            )
        })?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
