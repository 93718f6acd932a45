"""The SQL of a page of mappings, which goes by creation whatever narrows the list.

Without a prefix it is one walk along an index, in either direction, from any position. With one there are three
ways, tried in this order: look at the next NEARBY, which will do where many begin so; sort those that begin so, where
they are FEW; else leave it to the planner, which expects those many to lie evenly.
"""

from typing import Literal

Of = Literal["one", "forks", "all"]
"""Whose mappings: a resource's, the forks of one of its threads, or those of all resources."""

COLUMNS = "thread_id, resource_id, sdk_session_id, parent_thread_id, parent_message_id, version, created_at, updated_at"
NEARBY = 5_000
FEW = 50_000

_SCOPE = {
    "one": "resource_id = %(resource_id)s",
    "forks": "resource_id = %(resource_id)s AND parent_thread_id = %(parent_thread_id)s",
    "all": "TRUE",
}
_BEGINS = "thread_id >= %(prefix)s AND (%(beyond)s::text IS NULL OR thread_id < %(beyond)s)"


def beyond(prefix: str) -> str | None:
    """The first text behind all that begin with `prefix`, byte by byte in UTF-8; None where there is none."""
    stem = prefix.rstrip("\U0010ffff")
    if not stem:
        return None
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(0xE000 if 0xD800 <= following < 0xE000 else following)  # what lies between is no character


def page(of: Of, *, descending: bool) -> str:
    """A page without a prefix."""
    return _select(COLUMNS, "session_mappings", *_position(of, descending=descending))


def page_of_nearby(of: Of, *, descending: bool) -> str:
    """A page of those that begin with a prefix, looked for among the next NEARBY only."""
    where, order = _position(of, descending=descending)
    nearby = _select(COLUMNS, "session_mappings", where, order, limit=f"{NEARBY}")
    return _select(COLUMNS, f"({nearby}) AS nearby", _BEGINS, order)


def count(of: Of) -> str:
    """How many begin with a prefix, as far as they are few."""
    few = f"SELECT 1 FROM session_mappings WHERE {_SCOPE[of]} AND {_BEGINS} LIMIT {FEW + 1}"  # noqa: S608 - as below
    return f"SELECT count(*) FROM ({few}) AS few"  # noqa: S608 - as below


def page_by_sort(of: Of, *, descending: bool) -> str:
    """The page of a prefix that few begin with: found along the names."""
    # The sum keeps the planner from walking along the age after all, which would spare it the sort.
    where, order = _position(of, "(created_at + 0)", descending=descending)
    return _select(COLUMNS, "session_mappings", f"{where} AND {_BEGINS}", order)


def page_of_many(of: Of, *, descending: bool) -> str:
    """The page of a prefix that many begin with."""
    where, order = _position(of, descending=descending)
    return _select(COLUMNS, "session_mappings", f"{where} AND {_BEGINS}", order)


def _position(of: Of, age: str = "created_at", *, descending: bool) -> tuple[str, str]:
    past, way = ("<", "DESC") if descending else (">", "ASC")
    position = f"({age}, thread_id) {past} (%(created_at)s, %(after_thread_id)s)"
    order = f"{age} {way}, thread_id {way}"
    if of == "all":
        position = (
            f"({age}, resource_id, thread_id) {past} (%(created_at)s, %(after_resource_id)s, %(after_thread_id)s)"
        )
        order = f"{age} {way}, resource_id {way}, thread_id {way}"
    return f"{_SCOPE[of]} AND {position}", order


def _select(what: str, source: str, where: str, order: str, *, limit: str = "%(limit)s") -> str:
    return f"SELECT {what} FROM {source} WHERE {where} ORDER BY {order} LIMIT {limit}"  # noqa: S608 - all of it is ours
