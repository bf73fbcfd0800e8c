//! Why a request has no answer.

/// What a caller is told. Messages are for people and hold nothing of the text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    /// Refused at once; there may be room in so many seconds.
    #[error("the service is overloaded; try again in {retry_after} s")]
    Overloaded { retry_after: u64 },
    #[error("the model is being loaded")]
    Loading,
    #[error("the service is ending")]
    Ended,
    #[error("there is no model {name:?}; there are {known}")]
    NoSuchModel { name: String, known: String },
    #[error("no answer within {seconds} s")]
    Deadline { seconds: f64 },
    #[error("{0} texts in one request, at most {1} are taken")]
    TooManyTexts(usize, usize),
    /// The request cannot be met, now or later.
    #[error("{0}")]
    Invalid(String),
    /// A name that is taken.
    #[error("{0}")]
    Conflict(String),
    #[error("the model could not be run: {0}")]
    Device(String),
}
