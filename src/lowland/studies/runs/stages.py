"""A stage of a study: pieces of one kind, computed together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from lowland.studies.runs.jobs import Pieces, Store, Tensors, run_pieces

Progress = Callable[[str, int, int], None]
"""Called with the title of a stage, and how many of its pieces are done and in all."""


def run_stage(
    title: str,
    pieces: Pieces,
    store: Store,
    *,
    executor: Executor | None,
    on_progress: Progress | None,
) -> dict[str, Tensors]:
    """Compute what is missing of a stage's pieces, and load them all.

    Raises:
        JobError: If a worker process died.
    """

    def on_done(done: int) -> None:
        if on_progress is not None:
            on_progress(title, done, len(pieces))

    if pieces:
        run_pieces(pieces, store, executor=executor, on_done=on_done)
    return {piece: store.load(piece) for piece in pieces}
