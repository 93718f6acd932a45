"""The schema's versions: each is a file of SQL, and all that a database lacks are applied in one transaction."""

from pathlib import Path
from typing import Any

import psycopg
from psycopg import errors

from session_store.errors import StoreMissing, StoreUnusable

FILES = sorted((Path(__file__).parent / "migrations").glob("[0-9]*.sql"))
SCHEMA_VERSION = len(FILES)

LOCK = 1936028525  # "sesm": whoever migrates holds it to the end of its transaction, and the others wait
FOUND = "SELECT to_regclass('schema_version') IS NOT NULL AND to_regclass('session_mappings') IS NOT NULL"
VERSION = "SELECT coalesce(max(v), 0) FROM schema_version"
BEGIN = f"BEGIN; SELECT pg_advisory_xact_lock({LOCK}); CREATE TABLE IF NOT EXISTS schema_version (v bigint NOT NULL)"
NOTE_VERSION = f"DELETE FROM schema_version; INSERT INTO schema_version VALUES ({SCHEMA_VERSION})"  # noqa: S608 - a number of ours
ENCODING = "SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()"


async def migrate(connection: psycopg.AsyncConnection[Any], *, look_only: bool = False) -> None:
    """Bring the schema to SCHEMA_VERSION, or leave it as it is; the connection commits by itself.

    Where nothing is to be done, nothing is written or locked: a role that may not make tables can start then.
    With `look_only` it has to be there already. Raises StoreUnusable, having changed nothing;
    StoreMissing where there is nothing yet.
    """
    encoding = await _value(connection, ENCODING)
    if encoding != "UTF8":
        raise StoreUnusable(f"The database's encoding is {encoding}: make one with ENCODING 'UTF8'.")
    try:
        found = await _value(connection, VERSION) if await _value(connection, FOUND) else 0
        if found == SCHEMA_VERSION:
            return
        _refuse_newer(found)
        if look_only and not found:
            raise StoreMissing
        if look_only:
            raise StoreUnusable("The database has no session map of this version: start the sidecar on it once.")
        await connection.execute(BEGIN)
        found = await _value(connection, VERSION)  # somebody may have been faster
        _refuse_newer(found)
        for file in FILES[found:]:
            await connection.execute(file.read_bytes())
        if found < SCHEMA_VERSION:
            await connection.execute(NOTE_VERSION.encode())
        await connection.commit()
    except (errors.DuplicateTable, errors.DuplicateObject, errors.UndefinedColumn) as error:
        raise StoreUnusable(
            f"The database has tables of another program ({error.diag.message_primary}): give this one its own."
        ) from error
    except errors.InsufficientPrivilege as error:
        raise StoreUnusable(
            f"The tables cannot be made ({error.diag.message_primary}): make this role the database's owner, "
            "or grant it CREATE on its schema."
        ) from error


def _refuse_newer(found: int) -> None:
    if found > SCHEMA_VERSION:
        raise StoreUnusable(
            f"The database has schema {found} of a newer version, this one knows {SCHEMA_VERSION}: start the newer one."
        )


async def _value(connection: psycopg.AsyncConnection[Any], query: str) -> Any:
    ((value,),) = await (await connection.execute(query.encode())).fetchall()
    return value
