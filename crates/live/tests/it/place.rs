//! A data directory, and a store of either kind for it: what is tested on one is tested on both.

use std::path::PathBuf;

use cashtag_live::LiveOptions;
use cashtag_live::store::Location;

use crate::pg::Server;
use crate::rig;

pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) data: PathBuf,
    pub(crate) location: Location,
    /// The address of the server's database.
    pub(crate) url: Option<String>,
}

impl Place {
    pub(crate) fn sqlite() -> Option<Self> {
        Some(Self::with(None))
    }

    /// On the shared server; `None` where there is none.
    pub(crate) fn postgres() -> Option<Self> {
        Server::shared().map(|server| Self::with(Some(server.database().1)))
    }

    pub(crate) fn with(url: Option<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let location = Location::of(url.as_deref(), &data).unwrap();
        Self { dir, data, location, url }
    }

    pub(crate) fn options(&self) -> LiveOptions {
        LiveOptions { location: self.location.clone(), ..rig::options(&self.data) }
    }

    pub(crate) fn listening(&self) -> LiveOptions {
        LiveOptions { location: self.location.clone(), ..rig::listening(&self.data) }
    }
}

/// Functions of a [`Place`] as tests on both stores.
macro_rules! on_both {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(#[test]
            fn $name() {
                super::$name(&crate::place::Place::sqlite().unwrap());
            })+
        }
        mod postgres {
            $(#[test]
            fn $name() {
                if let Some(place) = crate::place::Place::postgres() {
                    super::$name(&place);
                }
            })+
        }
    };
}
pub(crate) use on_both;
