"""The two statements of a turn, as functions in the database.

Their plans are made once for a connection to PostgreSQL, whoever uses it: a turn costs two calls
that are planned at once. A function that is in use never changes: what does more has another name,
and servers of the release before go on with theirs.

enable_seqscan: a plan that is made while a table is empty must do when it is large.
"""

NUM_TURNS = 16
"""Of a session that are remembered by name, for commits in doubt."""

ACQUIRE = """
CREATE FUNCTION cottention.acquire_v1(
    p_id text, p_owner text, p_replica text, p_turn bigint, p_seconds double precision)
RETURNS json LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    leased json;
BEGIN
    UPDATE cottention.sessions AS s
    SET fence = s.fence + 1, lease_owner = p_replica, lease_turn = p_turn,
        lease_version = s.version,
        lease_until = clock_timestamp() + make_interval(secs => p_seconds)
    WHERE s.id = p_id AND s.lease_owner IS NULL AND (p_owner IS NULL OR s.owner = p_owner)
        AND (s.expires_at IS NULL OR s.expires_at > extract(epoch FROM clock_timestamp())::float8)
    RETURNING json_build_array(s.fence, s.id, s.owner, s.created, s.version, s.metadata,
        s.expires_at, s.was_interrupted, s.states) INTO leased;
    RETURN leased;
END $$;
"""
"""Lease a session that nobody has: its new fence, and the columns of queries.RECORD; else null."""

COMMIT = f"""
CREATE FUNCTION cottention.commit_v1(
    p_id text, p_fence bigint, p_replica text, p_version bigint, p_turn bigint,
    p_keeps_lease boolean, p_states json, p_total bigint, p_changed bytea[], p_digest bytea,
    p_position bigint, p_nbytes bigint, p_policy text, p_events bigint, p_bytes bytea,
    p_replaced bytea)
RETURNS boolean LANGUAGE plpgsql SET enable_seqscan = off SET lock_timeout = '10s' AS $$
DECLARE
    each bytea;
    remaining bigint;
BEGIN
    UPDATE cottention.sessions AS s
    SET version = p_version + 1, states = p_states, nbytes = p_total, was_interrupted = false,
        turns = p_turn || s.turns[1:{NUM_TURNS - 1}],
        lease_owner = CASE WHEN p_keeps_lease THEN s.lease_owner END,
        lease_turn = CASE WHEN p_keeps_lease THEN s.lease_turn END,
        lease_until = CASE WHEN p_keeps_lease THEN s.lease_until END,
        lease_version = CASE WHEN p_keeps_lease THEN s.lease_version END
    WHERE s.id = p_id AND s.fence = p_fence AND s.lease_owner = p_replica
        AND s.version = p_version;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF p_replaced IS NOT NULL THEN
        UPDATE cottention.blobs AS b
        SET digest = p_digest, position = p_position, nbytes = p_nbytes,
            context_policy = p_policy, events_nbytes = p_events, bytes = p_bytes
        WHERE b.digest = p_replaced AND b.refs = 1;
        IF FOUND THEN
            RETURN true;
        END IF;
    END IF;
    FOREACH each IN ARRAY p_changed LOOP
        IF each = p_digest THEN
            INSERT INTO cottention.blobs AS b
                (digest, refs, position, nbytes, context_policy, events_nbytes, bytes)
            VALUES (p_digest, 1, p_position, p_nbytes, p_policy, p_events, p_bytes)
            ON CONFLICT (digest) DO UPDATE SET refs = b.refs + 1;
            CONTINUE;
        END IF;
        DELETE FROM cottention.blobs AS b WHERE b.digest = each AND b.refs <= 1;
        IF NOT FOUND THEN
            UPDATE cottention.blobs AS b SET refs = b.refs - 1 WHERE b.digest = each
            RETURNING b.refs INTO remaining;
            IF remaining <= 0 THEN  -- another session has dropped it between the two
                DELETE FROM cottention.blobs AS b WHERE b.digest = each;
            END IF;
        END IF;
    END LOOP;
    RETURN true;
END $$;
"""
"""Give a session its next version; false: it is not at p_version under this lease.

p_changed: digests of the states that come (p_digest) and go, in order, so that no two transactions
wait for each other. A blob goes with its last state. p_replaced: that of the only state that goes;
the new blob takes the row of its blob, where no other state has that, and it is a unique_violation
if the new one is stored already. Null: blobs are always inserted and deleted.
"""
