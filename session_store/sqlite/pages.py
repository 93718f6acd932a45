"""The SQL of a page of mappings, which goes by creation whatever narrows the list.

Without a prefix it is one walk along an index, in either direction, from any position. With one, such a walk passes by
all that begin otherwise, and nothing says beforehand how many these are. So there are three ways, tried in this order:
look at the next NEARBY, which will do where many begin so; sort those that begin so, where they are FEW; walk. The walk
is long only where more than FEW begin so and all of them are far away: some 100 ms for each million passed by.
"""

from typing import Literal

Of = Literal["one", "forks", "all"]
"""Whose mappings: a resource's, the forks of one of its threads, or those of all resources."""

NEARBY = 5_000  # looked at in 2 ms
FEW = 50_000  # counted in 5 ms and sorted in 10

_SCOPE = {
    "one": "resource_id = :resource_id",
    "forks": "resource_id = :resource_id AND parent_thread_id = :parent_thread_id",
    "all": "TRUE",
}
_BY_AGE = {
    "one": "session_mappings INDEXED BY session_mappings_by_age",
    "forks": "session_mappings INDEXED BY session_mappings_by_parent",
    "all": "session_mappings INDEXED BY session_mappings_by_age_of_all",
}
_BY_NAME = {
    "one": "session_mappings",  # whose own key it is
    "forks": "session_mappings INDEXED BY session_mappings_by_parent",  # one thread's are never that many
    "all": "session_mappings INDEXED BY session_mappings_by_thread",
}

# SQLite compares text by its UTF-8, and no UTF-8 has a byte as high as the 0xFF that `beyond` ends with.
_BEGINS = "thread_id >= :prefix AND thread_id < CAST(:beyond AS TEXT)"


def page(of: Of, *, descending: bool) -> str:
    """A page without a prefix."""
    where, order = _position(of, descending=descending)
    return _select("*", "session_mappings", where, order)


def page_of_nearby(of: Of, *, descending: bool) -> str:
    """A page of those that begin with a prefix, looked for among the next NEARBY only."""
    where, order = _position(of, descending=descending)
    nearby = _select("created_at, resource_id, thread_id", _BY_AGE[of], where, order, limit=str(NEARBY))
    return _looked_up(f"({nearby})", _BEGINS, order)


def count(of: Of) -> str:
    """How many begin with a prefix, as far as they are few."""
    where = f"{_SCOPE[of]} AND {_BEGINS}"
    return f"SELECT count(*) FROM (SELECT 1 FROM {_BY_NAME[of]} WHERE {where} LIMIT {FEW + 1})"  # noqa: S608 - as below


def page_by_sort(of: Of, *, descending: bool) -> str:
    """The page of a prefix that few begin with: found along the names."""
    # The plus keeps SQLite from walking along the age after all, which would spare it the sort.
    where, order = _position(of, "+created_at", descending=descending)
    return _looked_up(_BY_NAME[of], f"{where} AND {_BEGINS}", order)


def page_by_walk(of: Of, *, descending: bool) -> str:
    """The page of a prefix that many begin with: found along the age."""
    where, order = _position(of, descending=descending)
    return _looked_up(_BY_AGE[of], f"{where} AND {_BEGINS}", order)


def _position(of: Of, age: str = "created_at", *, descending: bool) -> tuple[str, str]:
    past, way = ("<", "DESC") if descending else (">", "ASC")
    position = f"({age}, thread_id) {past} (:created_at, :after_thread_id)"
    if of == "all":
        position = f"({age}, resource_id, thread_id) {past} (:created_at, :after_resource_id, :after_thread_id)"
    return f"{_SCOPE[of]} AND {position}", f"{age} {way}, resource_id {way}, thread_id {way}"


def _looked_up(source: str, where: str, order: str) -> str:
    """A page by its keys, which an index has: of the table only what is on the page is read, not what is passed by."""
    keys = _select("resource_id, thread_id", source, where, order)
    return _select("*", "session_mappings", f"(resource_id, thread_id) IN ({keys})", order)


def _select(what: str, source: str, where: str, order: str, *, limit: str = ":limit") -> str:
    return f"SELECT {what} FROM {source} WHERE {where} ORDER BY {order} LIMIT {limit}"  # noqa: S608 - all of it is ours
