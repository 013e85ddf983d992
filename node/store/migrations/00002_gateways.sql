-- +goose Up
CREATE TABLE gateways (
    gateway  TEXT    NOT NULL,
    plugin   TEXT    NOT NULL, -- the build's "version+digest", in the gateway's own words
    first_us INTEGER NOT NULL,
    last_us  INTEGER NOT NULL,
    seen     INTEGER NOT NULL, -- exchanges
    errors   INTEGER NOT NULL, -- of the plugin
    PRIMARY KEY (gateway, plugin)
) WITHOUT ROWID;

-- +goose Down
DROP TABLE gateways;
