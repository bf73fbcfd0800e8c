-- One process writes, any number read. Everything between two checkpoints is one transaction. Times are milliseconds since
-- 1970 in UTC; the views at the end have them as timestamps.
CREATE TABLE owner (log text NOT NULL); -- the log that `meta.seq` counts in
CREATE TABLE meta (key text PRIMARY KEY, value bigint NOT NULL);
-- Where each source goes on, and the newest event time heard from it (NULL: the watermark does not wait for it).
CREATE TABLE sources (name text PRIMARY KEY, cursor text, newest bigint);
CREATE TABLE models (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, version text NOT NULL UNIQUE, info json NOT NULL);
CREATE TABLE posts (
    seq bigint PRIMARY KEY,
    identity bytea NOT NULL, -- of (source, id)
    model integer NOT NULL REFERENCES models,
    source text NOT NULL, id text NOT NULL, author text NOT NULL,
    event_time bigint NOT NULL, received_at bigint NOT NULL, scored_at bigint NOT NULL, available_at bigint NOT NULL,
    text text, url text, copy_of text,
    damped boolean NOT NULL, too_late boolean NOT NULL, weight double precision NOT NULL, fingerprint bigint NOT NULL,
    tickers json NOT NULL, sectors json NOT NULL, probabilities json NOT NULL,
    label integer NOT NULL, score double precision NOT NULL,
    UNIQUE (identity, model)
);
CREATE INDEX posts_by_time ON posts (event_time);
CREATE TABLE post_keys (scope smallint NOT NULL, key text NOT NULL, seq bigint NOT NULL, PRIMARY KEY (scope, key, seq));
CREATE INDEX post_keys_by_seq ON post_keys USING brin (seq);
CREATE TABLE series (scope smallint NOT NULL, key text NOT NULL, name text, PRIMARY KEY (scope, key));
-- The state of each window.
CREATE TABLE windows (
    "window" smallint NOT NULL, scope smallint NOT NULL, key text NOT NULL, start bigint NOT NULL,
    revision integer NOT NULL, available_at bigint NOT NULL, data json NOT NULL,
    PRIMARY KEY ("window", scope, key, start)
);
-- Every revision of each closed window: what could be known when.
CREATE TABLE bars (
    "window" smallint NOT NULL, scope smallint NOT NULL, key text NOT NULL, start bigint NOT NULL,
    revision integer NOT NULL, available_at bigint NOT NULL, data json NOT NULL,
    PRIMARY KEY ("window", scope, key, start, revision)
);
CREATE INDEX windows_by_age ON windows USING brin (available_at);
CREATE INDEX bars_by_age ON bars USING brin (available_at);
CREATE TABLE alerts (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, rule text NOT NULL, key text NOT NULL, "window" smallint NOT NULL,
    start bigint NOT NULL, at bigint NOT NULL, fields json NOT NULL, text text NOT NULL, delivered boolean NOT NULL,
    UNIQUE (rule, key, "window", start)
);
CREATE TABLE dead_letters (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at bigint NOT NULL, source text NOT NULL, reason text NOT NULL,
    raw text NOT NULL
);
-- For people with psql, Grafana and the like.
CREATE VIEW scores AS
    SELECT seq, source, id, author, to_timestamp(event_time / 1000.0) AS event_time,
           to_timestamp(available_at / 1000.0) AS available_at, text, url, damped, too_late, weight, copy_of AS is_copy_of,
           ARRAY(SELECT t ->> 'symbol' FROM json_array_elements(tickers) AS t) AS tickers, score AS sentiment_score
    FROM posts;
CREATE VIEW signals AS
    SELECT (ARRAY['1m', '5m', '1h', '1d'])["window" + 1] AS "window",
           (ARRAY['ticker', 'sector', 'market'])[scope + 1] AS scope, key, to_timestamp(start / 1000.0) AS start, revision,
           to_timestamp(available_at / 1000.0) AS available_at, (data ->> 'mentions')::bigint AS mentions,
           (data ->> 'unique_authors')::bigint AS unique_authors,
           (data ->> 'sentiment_score')::double precision AS sentiment_score,
           (data ->> 'ci_low')::double precision AS ci_low, (data ->> 'ci_high')::double precision AS ci_high,
           (data ->> 'buzz_score')::double precision AS buzz_score, (data ->> 'attention')::double precision AS attention,
           (data ->> 'momentum')::double precision AS momentum, data ->> 'trend' AS trend
    FROM windows;
