//! `postgres://user:password@host:port/database?sslmode=…`, completed from the environment as libpq does it: PGHOST,
//! PGPORT, PGUSER, PGDATABASE, PGSSLMODE, PGSSLROOTCERT, PGPASSWORD, and the password file (PGPASSFILE, else ~/.pgpass).
//!
//! What holds: no message and no `Debug` shows a password, not even of an address that cannot be read.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode};

use crate::error::{Error, Result};

/// Where a store keeps its tables unless the address says `schema=…`.
const SCHEMA: &str = "cashtag";
const SOCKETS: &str = "/var/run/postgresql";
const CONNECT: Duration = Duration::from_secs(5);
/// A host that says nothing any more is given up after this time.
const SILENCE: Duration = Duration::from_secs(20);

/// Whom to believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// `prefer` and `require`: encrypted, to whoever answers.
    Anyone,
    /// `verify-ca` and `verify-full`: certificate and name are checked.
    Certificates,
}

#[derive(Clone)]
pub struct Address {
    pub(super) config: Config,
    pub(super) schema: String,
    pub(super) trust: Trust,
    pub(super) root_certificates: Option<PathBuf>,
    shown: String,
}

fn wrong(what: &str) -> Error {
    Error::Invalid(format!(
        "{what}\n  hint: --store takes postgres://user@host:5432/database; the password may come from PGPASSWORD or ~/.pgpass"
    ))
}

impl Address {
    /// # Errors
    /// What is wrong with it, without repeating it.
    pub fn parse(url: &str) -> Result<Self> {
        Self::with_environment(url, &|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    fn with_environment(url: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(wrong("the address of the store does not begin with postgres://"));
        }
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let mut ssl_mode = env("PGSSLMODE");
        let mut root_certificates = env("PGSSLROOTCERT").map(PathBuf::from);
        let mut schema = SCHEMA.to_owned();
        let mut rest = Vec::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match name {
                "sslmode" => ssl_mode = Some(decode(value)),
                "sslrootcert" => root_certificates = Some(PathBuf::from(decode(value))),
                "schema" => schema = decode(value),
                _ => rest.push(pair),
            }
        }
        if schema.is_empty()
            || schema.len() > 63
            || !schema.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        {
            return Err(wrong("schema= takes at most 63 lower-case letters, digits and _"));
        }
        let url = if rest.is_empty() { base.to_owned() } else { format!("{base}?{}", rest.join("&")) };
        // The parser's own words may repeat a part of the address.
        let mut config = Config::from_str(&url).map_err(|_| wrong("the address of the store cannot be read"))?;
        let (mode, trust) = match ssl_mode.as_deref().unwrap_or("prefer") {
            "disable" => (SslMode::Disable, Trust::Anyone),
            "allow" | "prefer" => (SslMode::Prefer, Trust::Anyone),
            "require" if root_certificates.is_none() => (SslMode::Require, Trust::Anyone),
            "require" | "verify-ca" | "verify-full" => (SslMode::Require, Trust::Certificates),
            _ => return Err(wrong("sslmode is one of disable, prefer, require, verify-ca, verify-full")),
        };
        config.ssl_mode(mode);
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            match env("PGHOST") {
                Some(host) if host.starts_with('/') => config.host_path(host),
                Some(host) => config.host(host),
                None => config.host_path(SOCKETS),
            };
        }
        if config.get_ports().is_empty() {
            let port = env("PGPORT").map(|p| p.parse::<u16>().map_err(|_| wrong("PGPORT is no port"))).transpose()?;
            config.port(port.unwrap_or(5432));
        }
        if config.get_user().is_none() {
            let user = env("PGUSER").or_else(|| env("USER")).or_else(|| env("LOGNAME"));
            config.user(user.ok_or_else(|| wrong("the address of the store names no user"))?);
        }
        let user = config.get_user().unwrap_or_default().to_owned();
        if config.get_dbname().is_none() {
            config.dbname(env("PGDATABASE").unwrap_or_else(|| user.clone()));
        }
        let (host, port) = place(&config);
        let database = config.get_dbname().unwrap_or_default().to_owned();
        if config.get_password().is_none() {
            let file = env("PGPASSFILE").or_else(|| env("HOME").map(|home| format!("{home}/.pgpass")));
            let found = env("PGPASSWORD").or_else(|| {
                let text = read_private(Path::new(&file?))?;
                password_in(&text, [&host, &port, &database, &user])
            });
            if let Some(password) = found {
                config.password(password);
            }
        }
        config.connect_timeout(CONNECT).tcp_user_timeout(SILENCE).keepalives_idle(SILENCE);
        if config.get_application_name().is_none() {
            config.application_name("cashtag live");
        }
        let place = if host.starts_with('/') {
            format!("{}:{port}", host.replace('/', "%2F"))
        } else {
            format!("{host}:{port}")
        };
        let shown = format!("postgres://{user}@{place}/{database}");
        let shown = if schema == SCHEMA { shown } else { format!("{shown}?schema={schema}") };
        Ok(Self { config, schema, trust, root_certificates, shown })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// The first host and port.
fn place(config: &Config) -> (String, String) {
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(name)) => name.clone(),
        #[cfg(unix)]
        Some(Host::Unix(path)) => path.display().to_string(),
        #[allow(unreachable_patterns)]
        Some(_) => String::new(),
        None => config.get_hostaddrs().first().map(ToString::to_string).unwrap_or_default(),
    };
    (host, config.get_ports().first().copied().unwrap_or(5432).to_string())
}

/// A password file that others may read is not used, as libpq does it.
fn read_private(path: &Path) -> Option<String> {
    let about = std::fs::metadata(path).ok().filter(|m| m.is_file() && m.len() < 1 << 20)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        if about.permissions().mode() & 0o077 != 0 {
            return None;
        }
    }
    let _ = about;
    std::fs::read_to_string(path).ok()
}

/// The password of the first line of `host:port:database:user:password` that fits; `*` fits everything, `\` takes the next
/// character as it is.
fn password_in(text: &str, wanted: [&str; 4]) -> Option<String> {
    let local = wanted[0] == SOCKETS;
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut fields = vec![String::new()];
        let mut characters = line.chars();
        while let Some(c) = characters.next() {
            let last = fields.len() - 1;
            match c {
                '\\' => fields[last].extend(characters.next()),
                ':' if fields.len() < 5 => fields.push(String::new()),
                c => fields[last].push(c),
            }
        }
        let [host, port, database, user, password] = <[String; 5]>::try_from(fields).ok()?;
        let fits = |pattern: &str, value: &str| pattern == "*" || pattern == value;
        let host_fits = fits(&host, wanted[0]) || (local && host == "localhost");
        (host_fits && fits(&port, wanted[1]) && fits(&database, wanted[2]) && fits(&user, wanted[3]))
            .then_some(password)
    })
}

fn decode(value: &str) -> String {
    let bytes = value.as_bytes();
    let (mut out, mut i) = (Vec::with_capacity(bytes.len()), 0);
    while i < bytes.len() {
        let hex = |b: Option<&u8>| b.and_then(|b| char::from(*b).to_digit(16));
        match (bytes[i], hex(bytes.get(i + 1)), hex(bytes.get(i + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                i += 3;
            }
            (byte, ..) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str, env: &[(&str, &str)]) -> Result<Address> {
        Address::with_environment(url, &|name| env.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    fn password(address: &Address) -> Option<&str> {
        address.config.get_password().map(|p| std::str::from_utf8(p).unwrap())
    }

    #[test]
    fn an_address_is_completed_and_never_shows_its_password() {
        let full =
            parse("postgres://ann:s%40cret@db.example:6543/live?schema=one&sslmode=verify-full&connect_timeout=9", &[])
                .unwrap();
        assert_eq!(password(&full), Some("s@cret"));
        assert_eq!((full.schema.as_str(), full.trust), ("one", Trust::Certificates));
        for shown in [full.to_string(), format!("{full:?}")] {
            assert_eq!(shown, "postgres://ann@db.example:6543/live?schema=one");
        }
        let bare = parse("postgres://", &[("USER", "bob"), ("PGPASSWORD", "pw")]).unwrap();
        assert_eq!(bare.to_string(), "postgres://bob@%2Fvar%2Frun%2Fpostgresql:5432/bob");
        assert_eq!(password(&bare), Some("pw"));
        let environment =
            [("PGHOST", "h"), ("PGPORT", "1"), ("PGUSER", "u"), ("PGDATABASE", "d"), ("PGPASSWORD", "no")];
        let named = parse("postgres://", &environment).unwrap();
        assert_eq!(named.to_string(), "postgres://u@h:1/d");
        assert_eq!(password(&parse("postgres://x:own@h", &environment).unwrap()), Some("own"));
    }

    #[test]
    fn what_is_wrong_is_said_without_the_password() {
        for url in [
            "mysql://ann:hunter2@h/d",
            "postgres://ann:hunter2@h:port/d",
            "postgres://ann:hunter2@h/d?sslmode=maybe",
            "postgres://ann:hunter2@h/d?schema=A-b",
            "postgres://ann:hunter2@h/d?nonsense=1",
            "postgres://h/d",
        ] {
            let message = parse(url, &[]).unwrap_err().to_string();
            assert!(message.contains("hint:") && !message.contains("hunter2"), "{message}");
        }
    }

    #[test]
    fn passwords_come_from_a_private_file() {
        let text = "# all\nother:*:*:*:no\nh:5432:d:u:a\\:b\\\\c\n*:*:*:u:any\nlocalhost:*:*:*:local\n";
        assert_eq!(password_in(text, ["h", "5432", "d", "u"]).as_deref(), Some("a:b\\c"));
        assert_eq!(password_in(text, ["x", "1", "d", "u"]).as_deref(), Some("any"));
        assert_eq!(password_in(text, [SOCKETS, "1", "d", "v"]).as_deref(), Some("local"));
        assert_eq!(password_in(text, ["x", "1", "d", "v"]), None);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pgpass");
        std::fs::write(&path, "h:*:*:*:filed").unwrap();
        use std::os::unix::fs::PermissionsExt;
        let named = path.display().to_string();
        for (mode, want) in [(0o600, Some("filed")), (0o644, None)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(password(&parse("postgres://u@h/d", &[("PGPASSFILE", &named)]).unwrap()), want);
        }
    }
}
