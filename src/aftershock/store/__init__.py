"""The run folder: append, read, query; missing is missing.

Write with `RunWriter.open`, read with `RunReader` and `Study`. Knows nothing of what trains.
"""

from aftershock.store.reader import Event, RunReader, Series, StatSeries
from aftershock.store.study import RunRef, Study, StudyRow, write_manifest
from aftershock.store.writer import RunWriter

__all__ = [
    "Event",
    "RunReader",
    "RunRef",
    "RunWriter",
    "Series",
    "StatSeries",
    "Study",
    "StudyRow",
    "write_manifest",
]
