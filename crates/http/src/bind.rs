//! Where a service listens: loopback unless told otherwise, and elsewhere only with a key.

use std::net::SocketAddr;

use tokio::net::TcpListener;

use crate::error::{Error, Result};

/// A host and a port. Port 0 takes a free one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    pub host: String,
    pub port: u16,
    /// Listen on an address that other machines reach even without a key.
    pub allow_no_key: bool,
}

impl Default for Listen {
    fn default() -> Self {
        Self { host: "127.0.0.1".into(), port: 8000, allow_no_key: false }
    }
}

impl Listen {
    /// # Errors
    /// [`Error::Unprotected`] for an address beyond loopback without a key; an address that is unknown or taken.
    pub(crate) async fn bind(&self, has_keys: bool) -> Result<TcpListener> {
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let found: Vec<SocketAddr> = tokio::net::lookup_host((host, self.port))
            .await
            .map_err(|source| Error::Resolve { host: self.host.clone(), source })?
            .collect();
        let open = found.iter().find(|a| !a.ip().is_loopback());
        if let Some(address) = open.filter(|_| !has_keys && !self.allow_no_key) {
            return Err(Error::Unprotected { address: address.to_string() });
        }
        TcpListener::bind(&*found)
            .await
            .map_err(|source| Error::Bind { address: format!("{}:{}", self.host, self.port), source })
    }
}

/// Whether the `Host` of a request names this machine as only this machine can: what a page from elsewhere cannot have.
pub(crate) fn is_local_name(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = name.trim_end_matches('.');
    // `parse` knows every address; a name that merely begins like one is none.
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn beyond_loopback_only_with_a_key() {
        let listen = |host: &str, allow_no_key| Listen { host: host.into(), port: 0, allow_no_key };
        for host in ["127.0.0.1", "localhost", "127.3.2.1"] {
            assert!(listen(host, false).bind(false).await.is_ok(), "{host}");
        }
        let refused = listen("0.0.0.0", false).bind(false).await.unwrap_err().to_string();
        assert!(
            refused.contains("0.0.0.0:0 can be reached from other machines") && refused.contains("hint: make a key")
        );
        assert!(listen("0.0.0.0", true).bind(false).await.is_ok());
        assert!(listen("0.0.0.0", false).bind(true).await.is_ok());
        assert!(matches!(listen("no.such.host.invalid", false).bind(true).await, Err(Error::Resolve { .. })));
    }

    #[test]
    fn names_of_this_machine() {
        for name in ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:80", "[::1]", "localhost."] {
            assert!(is_local_name(name), "{name}");
        }
        for name in
            ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]", "::1"]
        {
            assert!(!is_local_name(name), "{name}");
        }
    }
}
