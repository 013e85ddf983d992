-- Times are microseconds since the epoch, minutes are minutes since it.
-- Text columns can hold any bytes: they come from traffic.

-- +goose Up
CREATE TABLE attacks (
    id          TEXT    NOT NULL PRIMARY KEY,
    akey        TEXT    NOT NULL, -- attack.Key: hits with the same key may be one attack
    type        TEXT    NOT NULL,
    severity    INTEGER NOT NULL,
    tenant      TEXT    NOT NULL,
    application TEXT    NOT NULL,
    policy      TEXT    NOT NULL,
    gateway     TEXT    NOT NULL,
    client      TEXT    NOT NULL,
    method      TEXT    NOT NULL,
    host        TEXT    NOT NULL,
    path        TEXT    NOT NULL,
    place       TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    rule_ids    TEXT    NOT NULL, -- JSON array of numbers, ascending
    payload     BLOB    NOT NULL,
    status      INTEGER NOT NULL,
    first_us    INTEGER NOT NULL,
    last_us     INTEGER NOT NULL,
    hits        INTEGER NOT NULL,
    estimated   REAL    NOT NULL,
    search      TEXT    NOT NULL  -- lower-case valid UTF-8 of what a search looks at
);
CREATE INDEX attacks_by_last ON attacks (last_us, id);
CREATE INDEX attacks_by_key ON attacks (akey, last_us);

CREATE TABLE attack_minute (
    attack_id TEXT    NOT NULL REFERENCES attacks (id) ON DELETE CASCADE,
    minute    INTEGER NOT NULL,
    hits      INTEGER NOT NULL,
    PRIMARY KEY (attack_id, minute)
) WITHOUT ROWID;
CREATE INDEX attack_minute_by_minute ON attack_minute (minute);

CREATE TABLE hits (
    id        TEXT    NOT NULL PRIMARY KEY,
    attack_id TEXT    NOT NULL REFERENCES attacks (id) ON DELETE CASCADE,
    ts_us     INTEGER NOT NULL,
    digest    INTEGER NOT NULL, -- of the payload: equal ones are kept once an hour
    record    BLOB    NOT NULL  -- the hit, encoded and compressed, see sample.go
);
CREATE INDEX hits_by_attack ON hits (attack_id, ts_us, id, digest);
CREATE INDEX hits_by_time ON hits (ts_us);

-- +goose Down
DROP TABLE hits;
DROP TABLE attack_minute;
DROP TABLE attacks;
