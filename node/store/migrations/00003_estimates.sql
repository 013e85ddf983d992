-- The variance of estimated is the sum of w(w-1) over hits of weight w. Of what
-- was counted before, only the mean of weights is known: all may have been equal.

-- +goose Up
ALTER TABLE attacks ADD COLUMN variance REAL NOT NULL DEFAULT 0;
ALTER TABLE attack_minute ADD COLUMN estimated REAL NOT NULL DEFAULT 0;
ALTER TABLE attack_minute ADD COLUMN variance REAL NOT NULL DEFAULT 0;
UPDATE attacks SET variance = max(0, estimated * (estimated / hits - 1)) WHERE hits > 0;
UPDATE attack_minute SET estimated = attack_minute.hits * a.estimated / a.hits, variance = attack_minute.hits * a.variance / a.hits
    FROM attacks AS a WHERE a.id = attack_id AND a.hits > 0;

-- +goose Down
ALTER TABLE attack_minute DROP COLUMN variance;
ALTER TABLE attack_minute DROP COLUMN estimated;
ALTER TABLE attacks DROP COLUMN variance;
