-- One process writes, any number read. Everything between two checkpoints is one transaction.
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
-- Where each source goes on, and the newest event time heard from it (NULL: the watermark does not wait for it).
CREATE TABLE IF NOT EXISTS sources (name TEXT PRIMARY KEY, cursor TEXT, newest INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS models (id INTEGER PRIMARY KEY, version TEXT NOT NULL UNIQUE, info TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS posts (
    seq INTEGER PRIMARY KEY,
    identity BLOB NOT NULL, -- of (source, id)
    model INTEGER NOT NULL,
    source TEXT NOT NULL, id TEXT NOT NULL, author TEXT NOT NULL,
    event_time INTEGER NOT NULL, received_at INTEGER NOT NULL, scored_at INTEGER NOT NULL, available_at INTEGER NOT NULL,
    text TEXT, url TEXT, copy_of TEXT,
    damped INTEGER NOT NULL, too_late INTEGER NOT NULL, weight REAL NOT NULL, fingerprint INTEGER NOT NULL,
    tickers TEXT NOT NULL, sectors TEXT NOT NULL, probabilities TEXT NOT NULL,
    label INTEGER NOT NULL, score REAL NOT NULL,
    UNIQUE (identity, model)
);
CREATE INDEX IF NOT EXISTS posts_by_time ON posts (event_time);
CREATE TABLE IF NOT EXISTS post_keys (
    scope INTEGER NOT NULL, key TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (scope, key, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS series (scope INTEGER NOT NULL, key TEXT NOT NULL, name TEXT, PRIMARY KEY (scope, key)) WITHOUT ROWID;
-- The state of each window.
CREATE TABLE IF NOT EXISTS windows (
    window INTEGER NOT NULL, scope INTEGER NOT NULL, key TEXT NOT NULL, start INTEGER NOT NULL,
    revision INTEGER NOT NULL, available_at INTEGER NOT NULL, data TEXT NOT NULL,
    PRIMARY KEY (window, scope, key, start)
) WITHOUT ROWID;
-- Every revision of each closed window: what could be known when.
CREATE TABLE IF NOT EXISTS bars (
    window INTEGER NOT NULL, scope INTEGER NOT NULL, key TEXT NOT NULL, start INTEGER NOT NULL,
    revision INTEGER NOT NULL, available_at INTEGER NOT NULL, data TEXT NOT NULL,
    PRIMARY KEY (window, scope, key, start, revision)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS alerts (
    id INTEGER PRIMARY KEY, rule TEXT NOT NULL, key TEXT NOT NULL, window INTEGER NOT NULL, start INTEGER NOT NULL,
    at INTEGER NOT NULL, fields TEXT NOT NULL, text TEXT NOT NULL, delivered INTEGER NOT NULL,
    UNIQUE (rule, key, window, start)
);
CREATE TABLE IF NOT EXISTS dead_letters (
    id INTEGER PRIMARY KEY, at INTEGER NOT NULL, source TEXT NOT NULL, reason TEXT NOT NULL, raw TEXT NOT NULL
);
